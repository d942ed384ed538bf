//! Samples to prompts, and greedy answers to them in several routing modes.
use std::ops::ControlFlow;

use super::Sample;
use crate::backend::Routing;
use crate::engine::{Engine, SeqId};
use crate::error::Result;
use crate::eval::argmax;
use crate::template::{ChatTemplate, Message, RenderOptions};
use crate::tokenizer::Tokenizer;

/// How samples become prompts.
pub struct Prompter<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The model's chat template; the bare text without.
    pub template: Option<&'a ChatTemplate>,
}

impl Prompter<'_> {
    /// The tokens of a sample's prompt, up to and with the beginning of the answer.
    ///
    /// # Errors
    /// Those of the template and the tokenizer.
    pub fn tokens(&self, sample: &Sample) -> Result<Vec<u32>> {
        let Some(template) = self.template else {
            let text = format!("{}\n\n{}", sample.prompt, sample.answer_prefix);
            return Ok(self.tokenizer.begin(self.tokenizer.encode(&text, false)?));
        };
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        let mut prompt = template.render(&[Message::new("user", sample.prompt.as_str())], &options)?;
        prompt.text.push_str(&sample.answer_prefix);
        Ok(self.tokenizer.encode_prompt(&prompt)?)
    }
}

/// What a model said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its text, without control tokens.
    pub text: String,
    /// Tokens of it.
    pub tokens: usize,
}

/// Greedy answers of at most `max_tokens` to one prompt, one for each routing mode and k. The prompt is run once: no cached row depends
/// on the mode. `progress` hears the prompt tokens that are done.
///
/// # Errors
/// Those of [`Engine::prefill`] and the tokenizer.
pub fn answers(
    engine: &mut Engine,
    prompt: &[u32],
    modes: &[(Routing, usize)],
    max_tokens: usize,
    tokenizer: &Tokenizer,
    progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Answer>> {
    let seq = engine.create()?;
    let result = (|| {
        // The last token runs anew in each mode, for its logits.
        let (last, before) = prompt.split_last().map_or((0, prompt), |(last, before)| (*last, before));
        if !before.is_empty() {
            engine.prefill(seq, before, progress)?;
            engine.checkpoint(seq)?;
        }
        let of = |&(routing, top_k): &(Routing, usize)| {
            engine.set_routing(routing, top_k)?;
            let kept = engine.rewind(seq, before.len())?;
            if kept < before.len() {
                engine.prefill(seq, &before[kept..], |_| ControlFlow::Continue(()))?;
            }
            answer(engine, seq, last, max_tokens, tokenizer)
        };
        modes.iter().map(of).collect()
    })();
    engine.free(seq);
    result
}

fn answer(
    engine: &mut Engine,
    seq: SeqId,
    last: u32,
    max_tokens: usize,
    tokenizer: &Tokenizer,
) -> Result<Answer> {
    let (mut token, mut tokens) = (last, vec![]);
    while tokens.len() < max_tokens {
        token = argmax(engine.step(&[(seq, token)])?);
        if tokenizer.is_stop(token) {
            break;
        }
        tokens.push(token);
    }
    Ok(Answer { text: tokenizer.decode(&tokens, false)?, tokens: tokens.len() })
}
