//! Penalties on what was said before: repetition, presence and frequency, and DRY.
use super::params::SamplerParams;
use crate::tokenizer::Tokenizer;
use std::{collections::HashMap, sync::Arc};

/// The tokens so far, counted as the penalties need them.
#[derive(Clone, Debug)]
pub(super) struct History {
    tokens: Vec<u32>,
    /// How often each token is among the last `repeat_last_n`.
    counts: HashMap<u32, u32>,
    /// Tokens that the penalties look back on; `None`: all.
    window: Option<usize>,
    breakers: Breakers,
}

impl History {
    pub fn new(params: &SamplerParams, tokenizer: &Arc<Tokenizer>) -> Self {
        let penalized =
            params.repeat_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        Self {
            tokens: Vec::new(),
            counts: HashMap::new(),
            window: if penalized { usize::try_from(params.repeat_last_n).ok() } else { Some(0) },
            breakers: Breakers::new(params, tokenizer),
        }
    }

    pub fn push(&mut self, id: u32) {
        if self.window != Some(0) {
            *self.counts.entry(id).or_default() += 1;
        }
        self.tokens.push(id);
        self.breakers.push(id, self.tokens.len());
        let left = self.window.filter(|n| *n > 0).and_then(|n| self.tokens.len().checked_sub(n + 1));
        if let Some(left) = left {
            let id = self.tokens[left];
            let count = self.counts.entry(id).or_default();
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&id);
            }
        }
    }

    /// Lowers the logits of tokens seen before.
    pub fn penalize(&self, params: &SamplerParams, logits: &mut [f32]) {
        for (id, count) in &self.counts {
            let Some(logit) = logits.get_mut(*id as usize) else { continue };
            let positive = *logit > 0.0;
            *logit = if positive { *logit / params.repeat_penalty } else { *logit * params.repeat_penalty };
            *logit -= *count as f32 * params.frequency_penalty + params.presence_penalty;
        }
    }

    /// Lowers the logits of tokens that would continue a repetition (DRY, "don't repeat yourself", by p-e-w).
    pub fn dry(&self, params: &SamplerParams, logits: &mut [f32]) {
        if params.dry_multiplier == 0.0 || params.dry_penalty_last_n == 0 {
            return;
        }
        let n = usize::try_from(params.dry_penalty_last_n).unwrap_or(usize::MAX).min(self.tokens.len());
        let window = &self.tokens[self.tokens.len() - n..];
        let limit = (self.tokens.len() - self.breakers.last).min(n);
        for (id, repeated) in continuations(window, limit, params.dry_allowed_length as usize) {
            if self.breakers.contains(id) {
                continue;
            }
            let more = (repeated - params.dry_allowed_length as usize).min(i32::MAX as usize) as i32;
            let penalty = params.dry_multiplier * params.dry_base.powi(more);
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit -= penalty.min(f32::MAX);
            }
        }
    }
}

/// Tokens that followed an earlier occurrence of the window's last tokens, with the length of the longest such occurrence, from
/// `allowed` up and counted up to `limit`.
fn continuations(window: &[u32], limit: usize, allowed: usize) -> HashMap<u32, usize> {
    let mut found = HashMap::new();
    if limit < allowed {
        return found;
    }
    // z[j]: how many tokens, going backwards, agree between the end of the window and j tokens before it (Z-algorithm).
    let back = |i: usize| window[window.len() - 1 - i];
    let mut z = vec![0; window.len()];
    let (mut left, mut right) = (0, 0);
    for j in 1..window.len() {
        let mut n = if j < right { z[j - left].min(right - j) } else { 0 };
        while j + n < window.len() && back(n) == back(j + n) {
            n += 1;
        }
        if j + n > right {
            (left, right) = (j, j + n);
        }
        z[j] = n;
        let repeated = n.min(limit);
        if repeated >= allowed {
            let longest = found.entry(back(j - 1)).or_default();
            *longest = repeated.max(*longest);
        }
    }
    found
}

/// Finds texts that end a repetition, also where they are spread over several tokens.
#[derive(Clone)]
struct Breakers {
    texts: Vec<Vec<u8>>,
    tokenizer: Arc<Tokenizer>,
    /// The last bytes so far: enough for a text to be completed by the next token.
    tail: Vec<u8>,
    /// Tokens up to and including the last one that completed a text.
    last: usize,
}

impl std::fmt::Debug for Breakers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Breakers")
            .field("texts", &self.texts)
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

impl Breakers {
    fn new(params: &SamplerParams, tokenizer: &Arc<Tokenizer>) -> Self {
        let texts = if params.dry_multiplier == 0.0 { &[][..] } else { &params.dry_sequence_breakers };
        let texts = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
        Self { texts, tokenizer: tokenizer.clone(), tail: Vec::new(), last: 0 }
    }

    /// Whether the token alone holds one of the texts.
    fn contains(&self, id: u32) -> bool {
        let piece = self.tokenizer.piece(id).unwrap_or_default();
        self.texts.iter().any(|text| piece.windows(text.len()).any(|w| w == text))
    }

    /// Takes the token that makes the history `len` long.
    fn push(&mut self, id: u32, len: usize) {
        let Some(longest) = self.texts.iter().map(Vec::len).max() else { return };
        self.tail.extend_from_slice(self.tokenizer.piece(id).unwrap_or_default());
        if self.texts.iter().any(|text| self.tail.windows(text.len()).any(|w| w == text)) {
            self.last = len;
            // A text counts once.
            self.tail.clear();
        }
        let spare = self.tail.len().saturating_sub(longest - 1);
        self.tail.drain(..spare);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::tokenizer;
    use super::*;
    use proptest::prelude::*;

    fn history(params: &SamplerParams, tokens: &[u32]) -> History {
        let mut h = History::new(params, &tokenizer());
        tokens.iter().for_each(|id| h.push(*id));
        h
    }

    #[test]
    fn penalties_equal_their_formula() {
        let params = SamplerParams {
            repeat_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            repeat_last_n: 3,
            ..SamplerParams::default()
        };
        let mut logits = [4.0, -4.0, 4.0, 4.0];
        history(&params, &[2, 2, 0, 1, 0]).penalize(&params, &mut logits);
        assert_eq!(logits, [2.0 - 0.5 - 0.5, -8.0 - 0.25 - 0.5, 4.0, 4.0]);
        let all = SamplerParams { repeat_last_n: -1, ..params.clone() };
        let mut logits = [4.0; 4];
        history(&all, &[2, 2, 0]).penalize(&all, &mut logits);
        assert_eq!(logits, [2.0 - 0.75, 4.0, 2.0 - 1.0, 4.0]);
        let none = SamplerParams { repeat_last_n: 0, ..params };
        history(&none, &[2, 2, 0]).penalize(&none, &mut logits);
        assert_eq!(logits, [2.0 - 0.75, 4.0, 2.0 - 1.0, 4.0]);
    }

    #[test]
    fn dry_punishes_longer_repetitions_more() {
        // a b c c b c y a b c: after "a b c" came c, after "b c" came y, after "c" came c and b.
        let window = [1, 2, 3, 3, 2, 3, 9, 1, 2, 3];
        assert_eq!(continuations(&window, 99, 1), HashMap::from([(3, 3), (2, 1), (9, 2)]));
        assert_eq!(continuations(&window, 99, 2), HashMap::from([(3, 3), (9, 2)]));
        assert_eq!(continuations(&window, 2, 2), HashMap::from([(3, 2), (9, 2)]));
        assert_eq!(continuations(&window, 1, 2), HashMap::new());
        assert_eq!(continuations(&[], 0, 0), HashMap::new());
        let params = SamplerParams {
            dry_multiplier: 0.5,
            dry_base: 2.0,
            dry_sequence_breakers: Vec::new(),
            ..SamplerParams::default()
        };
        let mut logits = [0.0; 12];
        history(&params, &window).dry(&params, &mut logits);
        assert_eq!((logits[3], logits[9], logits[2]), (-1.0, -0.5, 0.0));
        // A repetition without end stays a number.
        let mut logits = [0.0; 12];
        history(&params, &[1; 3000]).dry(&params, &mut logits);
        assert_eq!(logits[1], -f32::MAX);
    }

    #[test]
    fn breakers_end_repetitions_also_across_tokens() {
        let t = tokenizer();
        let ids = |text: &str| t.encode(text, false).unwrap();
        let last = |texts: &[&str], tokens: &[&str]| {
            let dry_sequence_breakers = texts.iter().map(|t| (*t).to_owned()).collect();
            let params =
                SamplerParams { dry_multiplier: 1.0, dry_sequence_breakers, ..SamplerParams::default() };
            let tokens: Vec<u32> = tokens.iter().flat_map(|t| ids(t)).collect();
            history(&params, &tokens).breakers.last
        };
        assert_eq!(ids("abcx").len(), 4);
        assert_eq!(last(&["b"], &["a", "b", "c"]), 2);
        assert_eq!(last(&["bc"], &["a", "b", "c", "x"]), 3);
        assert_eq!(last(&["bc", "abcx"], &["a", "b", "x"]), 0);
        assert_eq!(last(&["bb"], &["b", "b", "b"]), 2);
        let params = SamplerParams {
            dry_multiplier: 1.0,
            dry_sequence_breakers: vec!["b".into()],
            ..SamplerParams::default()
        };
        let (a, b, c) = (ids("a")[0], ids("b")[0], ids("c")[0]);
        let mut logits = vec![0.0; t.len()];
        // Only "c c" lies after the breaker; and the breaker itself is never punished.
        history(&params, &[a, c, c, a, b, c, c]).dry(&params, &mut logits);
        assert_eq!((logits[a as usize], logits[b as usize]), (-1.0, 0.0));
        let mut logits = vec![0.0; t.len()];
        history(&params, &[c, c, b, a, c, c]).dry(&params, &mut logits);
        assert_eq!(logits[b as usize], 0.0);
    }

    proptest! {
        #[test]
        fn continuations_equal_the_definition(window in proptest::collection::vec(0u32..4, 0..60), limit in 0usize..12, allowed in 0usize..5) {
            let mut naive: HashMap<u32, usize> = HashMap::new();
            for end in 1..window.len() {
                let (before, next) = (&window[..end], window[end]);
                let n = before.iter().rev().zip(window.iter().rev()).take_while(|(a, b)| a == b).count().min(limit);
                if n >= allowed && limit >= allowed {
                    let longest = naive.entry(next).or_default();
                    *longest = n.max(*longest);
                }
            }
            prop_assert_eq!(continuations(&window, limit, allowed), naive);
        }

        #[test]
        fn counts_equal_the_last_tokens(tokens in proptest::collection::vec(0u32..6, 0..40), n in -1i32..12) {
            let params = SamplerParams { repeat_penalty: 2.0, repeat_last_n: n, ..SamplerParams::default() };
            let h = history(&params, &tokens);
            let window = &tokens[tokens.len().saturating_sub(usize::try_from(n).unwrap_or(usize::MAX))..];
            let mut naive: HashMap<u32, u32> = HashMap::new();
            window.iter().for_each(|id| *naive.entry(*id).or_default() += 1);
            prop_assert_eq!(h.counts, naive);
        }
    }
}
