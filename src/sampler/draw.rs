//! The draw of one token as far as a device does it itself, so that logits need not come to the host.
use super::candidates::Candidates;
use super::{Error, Result, math};

/// How one token is drawn from logits: the largest at temperature 0; else by top-k, top-p, min-p and the temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 takes the largest (of equal ones the lowest id).
    pub temperature: f32,
    /// Keeps so many of the best; 0 keeps all.
    pub top_k: usize,
    /// Keeps the best until they have this probability together.
    pub top_p: f32,
    /// Keeps tokens at least this probable compared with the best.
    pub min_p: f32,
    /// Where in [0, 1) of the probabilities laid end to end: best first after a top-k, by id without.
    pub at: f64,
}

impl Draw {
    /// The largest logit.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, at: 0.0 };

    /// Draws on the host.
    ///
    /// # Errors
    /// [`Error::NotFinite`], [`Error::NothingLeft`].
    pub fn take(&self, logits: &[f32]) -> Result<u32> {
        if self.temperature == 0.0 {
            return math::argmax(logits);
        }
        if math::max(logits)? == f32::NEG_INFINITY {
            return Err(Error::NothingLeft);
        }
        let mut c = Candidates::default();
        c.take(logits, self.top_k, f32::NEG_INFINITY);
        c.top_p(self.top_p);
        c.min_p(self.min_p);
        c.softmax(self.temperature);
        c.pick(self.at).map(|c| c.id).ok_or(Error::NothingLeft)
    }
}
