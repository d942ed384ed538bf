//! Importance matrices: what each column of each matrix multiplies, measured on a text.
use std::sync::atomic::{AtomicBool, Ordering};

use clsa_convert::imatrix::{Entry, Sums};

use crate::backend::probe::Probe;
use crate::engine::{Engine, Row};
use crate::error::{Error, Result};
use crate::eval::perplexity::CrossEntropy;

/// What to collect.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Also of the output matrix (and so of tied embeddings), which llama.cpp's quantizer then weighs too.
    pub process_output: bool,
    /// Chunks between two calls of `save`.
    pub save_every: usize,
}

/// Runs `chunks` through `engine`, whose backend shows its products to `probe`, and adds what was seen to `sums`. Every token passes the
/// whole model. The second half of each chunk is scored on the way.
///
/// `save` is called every so many chunks, at the end, and when the work breaks off; `sums` holds whole chunks only. `progress` hears of
/// tokens done.
///
/// # Errors
/// As [`Engine::run`] and `save`; [`Error::Input`] when `sums` is of another model.
pub fn collect(
    engine: &mut Engine,
    probe: &Probe,
    chunks: &[&[u32]],
    settings: Settings,
    sums: &mut Sums,
    mut save: impl FnMut(&Sums) -> Result<()>,
    progress: impl Fn(usize),
) -> Result<CrossEntropy> {
    let mut loss = CrossEntropy::default();
    let (mut unsaved, interrupt) = (0, engine.interrupt());
    for chunk in chunks {
        if let Err(e) = run_chunk(engine, chunk, &mut loss) {
            if unsaved > 0 {
                save(sums)?;
            }
            return Err(e);
        }
        for (name, seen) in probe.drain() {
            let output = matches!(name.as_str(), "output.weight" | "token_embd.weight");
            if (output && !settings.process_output) || seen.rows == 0 {
                continue;
            }
            if let Some(bad) = seen.sums.iter().find(|v| !v.is_finite()) {
                return Err(Error::Runtime(format!("{name}: activations are not finite ({bad})")));
            }
            sums.add(&name, &Entry { sums: seen.sums, counts: vec![seen.rows as f64] })?;
        }
        sums.chunks += 1;
        if let Some((_, done)) = &mut sums.run {
            *done += 1;
        }
        unsaved += 1;
        if unsaved >= settings.save_every || stopped(&interrupt) {
            save(sums)?;
            unsaved = 0;
        }
        progress(chunk.len());
    }
    if unsaved > 0 {
        save(sums)?;
    }
    Ok(loss)
}

fn stopped(interrupt: &AtomicBool) -> bool {
    interrupt.load(Ordering::Relaxed)
}

/// Every token is an output, so that it enters the cross-decoder too.
fn run_chunk(engine: &mut Engine, chunk: &[u32], loss: &mut CrossEntropy) -> Result<()> {
    let seq = engine.create()?;
    let (vocab, step) = (engine.model().config.vocab, engine.spec().max_rows.min(engine.spec().max_outputs));
    loss.window();
    let result = (|| {
        for (i, tokens) in chunk.chunks(step).enumerate() {
            let rows: Vec<Row> = tokens.iter().map(|&token| Row { seq, token, output: true }).collect();
            let logits = engine.run(&rows)?;
            for (p, logits) in (i * step..).zip(logits.chunks_exact(vocab)) {
                if p >= chunk.len() / 2
                    && let Some(&next) = chunk.get(p + 1)
                {
                    loss.push(p, chunk.len(), logits, next);
                }
            }
        }
        Ok(())
    })();
    engine.free(seq);
    result
}
