//! How long a plan will take: by a short measurement on the engine that it would run on.
use std::time::{Duration, Instant};

use crate::cache::PAGE;
use crate::engine::{Engine, Row, SeqId};
use crate::error::Result;

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Prompt tokens a second.
    pub prefill: f64,
    /// Generated tokens a second, of all sequences together.
    pub decode: f64,
    /// Sequences at a time.
    pub sequences: usize,
    /// Tokens before those that were generated.
    pub depth: usize,
}

/// Time that either half of a measurement should take at least.
const LEAST: Duration = Duration::from_millis(300);

/// Runs a micro-batch of a prompt, then steps of `sequences` sequences that hold `depth` random rows, on an engine without sequences.
///
/// # Errors
/// Those of the engine.
pub fn measure(engine: &mut Engine, sequences: usize, depth: usize) -> Result<Rates> {
    let vocab = engine.model().config.vocab as u32;
    let token = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % vocab;
    let rows = engine.spec().max_rows.min(engine.context());
    // The first one is not counted: weights are read from disk.
    let mut prefill = |rows: usize| -> Result<Duration> {
        let seq = engine.create()?;
        let batch: Vec<Row> = (0..rows).map(|i| Row { seq, token: token(i), output: false }).collect();
        let started = Instant::now();
        engine.run(&batch)?;
        let took = started.elapsed();
        engine.free(seq);
        Ok(took)
    };
    prefill(rows.min(16))?;
    let (mut ran, mut took) = (0, Duration::ZERO);
    while took < LEAST {
        took += prefill(rows)?;
        ran += rows;
    }
    let prefill = ran as f64 / took.as_secs_f64();

    if engine.context() < 2 {
        // No job generates anything.
        return Ok(Rates { prefill, decode: f64::INFINITY, sequences, depth: 0 });
    }
    // One past for all, so that it costs one sequence's memory.
    let steps = PAGE.min(engine.context() / 2).max(1);
    // Each sequence copies its last page when it grows, and takes one more at most; where not all can, none leaves its first page.
    let past = engine.free_pages().saturating_sub(2 * sequences) * PAGE;
    let steps = if past == 0 { steps.min(PAGE - 1) } else { steps };
    let depth = depth.min(engine.context() - steps).min(past).max(1);
    let first = engine.create()?;
    engine.fill_random(first, depth, 1)?;
    let mut all = vec![first];
    for _ in 1..sequences.min(engine.spec().n_slots) {
        all.push(engine.fork(first)?);
    }
    let step = |engine: &mut Engine, i: usize| -> Result<()> {
        let next: Vec<(SeqId, u32)> = all.iter().enumerate().map(|(j, &seq)| (seq, token(i + j))).collect();
        engine.step(&next).map(drop)
    };
    step(engine, 0)?;
    let (started, mut done) = (Instant::now(), 0);
    while done + 1 < steps && (done == 0 || started.elapsed() < LEAST) {
        done += 1;
        step(engine, done)?;
    }
    let decode = (done * all.len()) as f64 / started.elapsed().as_secs_f64();
    let sequences = all.len();
    all.into_iter().for_each(|seq| engine.free(seq));
    Ok(Rates { prefill, decode, sequences, depth })
}
