//! What a grammar or a schema allows next.
use super::Result;

/// Decides, token by token, what may come next. A grammar compiled by a parser library goes behind this.
pub trait Constraint: Send {
    /// The tokens that may come next, among them the end-of-answer tokens where the answer may end.
    ///
    /// # Errors
    /// [`super::Error::Constraint`].
    fn mask(&mut self) -> Result<&TokenSet>;

    /// Goes on past a token that [`Self::mask`] allowed.
    ///
    /// # Errors
    /// [`super::Error::Constraint`].
    fn accept(&mut self, id: u32) -> Result<()>;

    /// Whether nothing can follow but the end.
    fn is_finished(&self) -> bool;
}

/// A set of token ids, one bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSet {
    words: Vec<u64>,
}

impl TokenSet {
    /// A set from its words: token `id` is bit `id % 64` of word `id / 64`.
    #[must_use]
    pub fn from_words(words: Vec<u64>) -> Self {
        Self { words }
    }

    /// Whether the set holds `id`.
    #[must_use]
    pub fn contains(&self, id: u32) -> bool {
        self.words.get(id as usize / 64).is_some_and(|word| word >> (id % 64) & 1 == 1)
    }

    /// Adds `id`.
    pub fn insert(&mut self, id: u32) {
        let at = id as usize / 64;
        if self.words.len() <= at {
            self.words.resize(at + 1, 0);
        }
        self.words[at] |= 1 << (id % 64);
    }

    /// Sets the logits of all other tokens to -inf.
    pub fn apply(&self, logits: &mut [f32]) {
        for (i, chunk) in logits.chunks_mut(64).enumerate() {
            match self.words.get(i).copied().unwrap_or(0) {
                u64::MAX => {}
                0 => chunk.fill(f32::NEG_INFINITY),
                word => {
                    for (bit, logit) in chunk.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }
}

impl FromIterator<u32> for TokenSet {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> Self {
        let mut set = Self::default();
        ids.into_iter().for_each(|id| set.insert(id));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_leaves_its_tokens_alone() {
        let set: TokenSet = (64..128).chain([0, 63, 130]).collect();
        let mut logits = vec![1.0; 200];
        set.apply(&mut logits);
        for (id, logit) in (0..).zip(&logits) {
            assert_eq!(set.contains(id), *logit == 1.0, "{id}");
            assert_eq!(set.contains(id), (64..128).contains(&id) || [0, 63, 130].contains(&id));
        }
        assert!(!set.contains(u32::MAX));
        assert_eq!(TokenSet::from_words(vec![5]), [0, 2].into_iter().collect());
    }
}
