//! What was said: messages, the documents that wait for the next one, and what may be dropped when the context is full.
use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What the person wrote, or the model.
    pub text: String,
    /// Documents that come before the text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub documents: Vec<Document>,
}

/// A document that a person adds to a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// Its file's name.
    pub name: String,
    /// Its text.
    pub text: String,
}

impl Message {
    /// What the model is given.
    #[must_use]
    pub fn content(&self) -> String {
        documents_block(&self.documents) + &self.text
    }
}

/// Documents as the model is given them, before a message's text.
#[must_use]
pub fn documents_block(documents: &[Document]) -> String {
    documents.iter().fold(String::new(), |mut all, d| {
        let _ =
            write!(all, "Document {}:\n\n{}\n\nEnd of document {}.\n\n", d.name, d.text.trim_end(), d.name);
        all
    })
}

/// A conversation. Messages alternate, the person's first; the last one may wait for its answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conversation {
    /// The system prompt.
    pub system: Option<String>,
    /// Messages, oldest first.
    pub messages: Vec<Message>,
    /// Documents for the next message.
    pub pending: Vec<Document>,
}

impl Conversation {
    /// Adds a message of the person, with the documents that waited for it.
    pub fn say(&mut self, text: &str) {
        let documents = std::mem::take(&mut self.pending);
        self.messages.push(Message { role: Role::User, text: text.to_owned(), documents });
    }

    /// Adds the model's answer.
    pub fn answer(&mut self, text: &str) {
        self.messages.push(Message { role: Role::Assistant, text: text.to_owned(), documents: vec![] });
    }

    /// The model's last answer.
    #[must_use]
    pub fn last_answer(&self) -> Option<&str> {
        self.messages.iter().rev().find(|m| m.role == Role::Assistant).map(|m| m.text.as_str())
    }

    /// The person's last message.
    #[must_use]
    pub fn last_said(&self) -> Option<&Message> {
        self.messages.iter().rev().find(|m| m.role == Role::User)
    }

    /// Whether the last message waits for its answer.
    #[must_use]
    pub fn awaits_answer(&self) -> bool {
        self.messages.last().is_some_and(|m| m.role == Role::User)
    }

    /// Takes the last answer back, so that the message before it awaits another. Returns whether there is such a message.
    pub fn retract_answer(&mut self) -> bool {
        if self.messages.last().is_some_and(|m| m.role == Role::Assistant) {
            self.messages.pop();
        }
        self.awaits_answer()
    }

    /// Takes the last message and its answer back; its documents wait for the next one again. Returns its text.
    pub fn undo(&mut self) -> Option<String> {
        let at = self.messages.iter().rposition(|m| m.role == Role::User)?;
        let message = self.messages.drain(at..).next()?;
        self.pending = message.documents;
        Some(message.text)
    }

    /// Drops the oldest message and its answer, whole. The last message always stays. Returns whether anything was dropped.
    pub fn drop_oldest(&mut self) -> bool {
        let last = self.messages.iter().rposition(|m| m.role == Role::User);
        let second = self.messages.iter().skip(1).position(|m| m.role == Role::User).map(|i| i + 1);
        match (second, last) {
            (Some(second), Some(last)) if second <= last => {
                self.messages.drain(..second);
                true
            }
            _ => false,
        }
    }

    /// Messages of the person.
    #[must_use]
    pub fn turns(&self) -> usize {
        self.messages.iter().filter(|m| m.role == Role::User).count()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn conversation(turns: usize) -> Conversation {
        let mut c = Conversation { system: Some("s".into()), ..Conversation::default() };
        for i in 0..turns {
            c.say(&format!("q{i}"));
            c.answer(&format!("a{i}"));
        }
        c
    }

    #[test]
    fn documents_come_before_the_text_of_the_next_message() {
        let mut c = conversation(0);
        c.pending.push(Document { name: "a.txt".into(), text: "A\n\n".into() });
        c.say("what?");
        assert_eq!(c.messages[0].content(), "Document a.txt:\n\nA\n\nEnd of document a.txt.\n\nwhat?");
        assert!(c.pending.is_empty() && c.awaits_answer());
        assert_eq!(c.undo().as_deref(), Some("what?"));
        assert_eq!(c.pending.len(), 1, "they wait again");
    }

    #[test]
    fn undo_and_retract_take_back_whole_messages() {
        let mut c = conversation(2);
        assert!(c.retract_answer());
        assert_eq!(c.messages.len(), 3);
        assert!(c.retract_answer(), "nothing is left to retract, but the message still awaits");
        assert_eq!(c.undo().as_deref(), Some("q1"));
        assert_eq!(c.undo().as_deref(), Some("q0"));
        assert_eq!(c.undo(), None);
        assert!(!c.retract_answer());
    }

    #[test]
    fn the_oldest_turns_are_dropped_whole_and_the_last_stays() {
        let mut c = conversation(2);
        c.say("q2");
        assert!(c.drop_oldest() && c.drop_oldest());
        assert_eq!(c.messages.iter().map(|m| m.text.as_str()).collect::<Vec<_>>(), ["q2"]);
        assert!(!c.drop_oldest());
        assert_eq!(c.system.as_deref(), Some("s"));
        let mut answered = conversation(1);
        assert!(!answered.drop_oldest());
    }

    proptest! {
        #[test]
        fn messages_alternate_whatever_is_done(steps in proptest::collection::vec(0u8..5, 0..40)) {
            let mut c = Conversation::default();
            for step in steps {
                match step {
                    0 if !c.awaits_answer() => c.say("q"),
                    1 if c.awaits_answer() => c.answer("a"),
                    2 => { c.undo(); }
                    3 => { c.retract_answer(); }
                    4 => { c.drop_oldest(); }
                    _ => {}
                }
                let want = |i: usize| if i.is_multiple_of(2) { Role::User } else { Role::Assistant };
                prop_assert!(c.messages.iter().enumerate().all(|(i, m)| m.role == want(i)));
                let json = serde_json::to_string(&c).unwrap();
                prop_assert_eq!(serde_json::from_str::<Conversation>(&json).unwrap(), c.clone());
            }
        }
    }
}
