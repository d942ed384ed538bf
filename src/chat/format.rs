//! How messages become the text that a model is given.
use super::conversation::{Conversation, Role};
use crate::error::Result;
use crate::template::{ChatTemplate, Message, RenderOptions};
use crate::tokenizer::Prompt;

/// How messages become a prompt.
#[derive(Debug)]
pub enum Format {
    /// By the chat template.
    Chat(Box<ChatTemplate>),
    /// As they are, one after the other: raw completion.
    Raw,
}

impl Format {
    /// The template's text; nothing for raw completion.
    #[must_use]
    pub fn source(&self) -> &str {
        match self {
            Self::Chat(template) => template.source(),
            Self::Raw => "",
        }
    }

    /// The prompt for a conversation, up to where the model's answer begins.
    ///
    /// # Errors
    /// A template that fails on this conversation or refuses it.
    pub fn render(&self, conversation: &Conversation) -> Result<Prompt> {
        let messages = conversation.messages.iter();
        match self {
            Self::Raw => Ok(Prompt { text: messages.map(|m| m.content()).collect(), guards: vec![] }),
            Self::Chat(template) => {
                let system = conversation.system.iter().map(|text| Message::new("system", text));
                let messages = messages.map(|m| match m.role {
                    Role::User => Message::new("user", m.content()),
                    Role::Assistant => Message::new("assistant", &m.text),
                });
                let messages: Vec<Message> = system.chain(messages).collect();
                let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
                Ok(template.render(&messages, &options)?)
            }
        }
    }
}
