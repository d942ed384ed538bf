//! Whether an engine computes the right thing, before anything is timed.
use std::ops::ControlFlow;

use super::Tokens;
use crate::backend::reference::Reference;
use crate::cache::CacheType;
use crate::engine::{Engine, Options};
use crate::error::{Error, Result};

/// Steps that are compared.
const STEPS: usize = 4;
/// Relative difference that rounded activations, caches and selections explain; a wrong result is off by about 1.
const TOLERANCE: f64 = 0.1;

/// Positions that [`against_reference`] needs: more than routing selects, where the reference gets there in reasonable time.
#[must_use]
pub fn positions(top_k: usize) -> usize {
    let prompt = if top_k <= 256 { top_k + 40 } else { 48 };
    prompt + STEPS
}

/// Processes a short prompt and some steps with `engine` and with the f32 reference, and returns the relative difference of their
/// logits, `||got - want|| / ||want||`.
///
/// # Errors
/// [`Error::Runtime`] when they differ by more than rounding explains; as [`Engine::prefill`].
pub fn against_reference(engine: &mut Engine) -> Result<f64> {
    let (routing, top_k) = engine.routing();
    let length = positions(top_k);
    let options = Options {
        context: length,
        k: CacheType::F32,
        v: CacheType::F32,
        index: CacheType::F32,
        routing: Some(routing),
        top_k: Some(top_k),
        ..Options::default()
    };
    let model = engine.model().clone();
    let reference = Reference::new(model.clone(), options.cache_spec())?;
    let mut reference = Engine::new(model, Box::new(reference), &options)?;
    let tokens = Tokens::new(engine.model().config.vocab).take(length);
    let got = logits(engine, &tokens)?;
    let want = logits(&mut reference, &tokens)?;
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let difference =
        (square(&mut got.iter().zip(&want).map(|(a, b)| a - b)) / square(&mut want.iter().copied())).sqrt();
    if difference.is_nan() || difference > TOLERANCE {
        return Err(Error::Runtime(format!(
            "the logits of {} with routing '{routing}' differ from the reference's by {difference:.2e} of their size, at most \
             {TOLERANCE} was expected: nothing was timed",
            engine.backend().describe()
        )));
    }
    Ok(difference)
}

/// Logits of the last prompt token and of each step.
fn logits(engine: &mut Engine, tokens: &[u32]) -> Result<Vec<f32>> {
    let seq = engine.create()?;
    let (prompt, steps) = tokens.split_at(tokens.len() - STEPS);
    let mut out = engine.prefill(seq, prompt, |_| ControlFlow::Continue(()))?.to_vec();
    for &token in steps {
        out.extend_from_slice(engine.step(&[(seq, token)])?);
    }
    engine.free(seq);
    Ok(out)
}
