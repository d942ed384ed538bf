//! Whether a model says the same however its work is cut: alone or batched, in other chunks, from saved sessions, on other devices.
//!
//! The baseline answers each prompt greedily, alone. Every other way is given the baseline's tokens and must come to the same logits.
use std::ops::ControlFlow;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::argmax;
use crate::engine::{Engine, Row, SeqId};
use crate::error::Result;
use crate::session::{Identity, Session, SessionFile};

/// A prompt and what the baseline made of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Tokens of the prompt.
    pub prompt: Vec<u32>,
    /// Greedy tokens after it.
    pub tokens: Vec<u32>,
    /// Logits that each of them was chosen from, `[token][vocab]`.
    logits: Vec<Vec<f32>>,
}

/// How another way compares with the baseline.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Tokens compared.
    pub tokens: usize,
    /// Tokens that both prefer.
    pub same: usize,
    /// The first one that they do not: prompt and number after it, from 0.
    pub first_difference: Option<(usize, usize)>,
    /// The largest difference of a logit.
    pub largest: f64,
    /// Logits that are not the same number.
    pub unequal: u64,
}

impl Agreement {
    fn push(&mut self, traces: &[Trace], prompt: usize, step: usize, logits: &[f32]) {
        let base = &traces[prompt].logits[step];
        for (a, b) in base.iter().zip(logits) {
            let difference = f64::from((a - b).abs());
            self.unequal += u64::from(a != b);
            // A NaN is the largest difference of all.
            if difference > self.largest || difference.is_nan() {
                self.largest = if difference.is_nan() { f64::MAX } else { difference };
            }
        }
        self.tokens += 1;
        if argmax(logits) == traces[prompt].tokens[step] {
            self.same += 1;
        } else {
            self.first_difference = self.first_difference.min(Some((prompt, step))).or(Some((prompt, step)));
        }
    }

    /// Whether no logit differs by more than `tolerance`.
    #[must_use]
    pub fn within(&self, tolerance: f64) -> bool {
        self.largest <= tolerance
    }
}

fn quietly(_: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The baseline: `n` greedy tokens after each prompt, alone.
///
/// # Errors
/// As [`Engine::prefill`].
pub fn baseline(engine: &mut Engine, prompts: &[Vec<u32>], n: usize) -> Result<Vec<Trace>> {
    let mut traces = vec![];
    for prompt in prompts {
        let seq = engine.create()?;
        let mut trace = Trace { prompt: prompt.clone(), tokens: vec![], logits: vec![] };
        let mut logits = engine.prefill(seq, prompt, quietly)?.to_vec();
        for i in 0..n {
            let token = argmax(&logits);
            trace.tokens.push(token);
            trace.logits.push(logits);
            logits = if i + 1 < n { engine.step(&[(seq, token)])?.to_vec() } else { vec![] };
        }
        engine.free(seq);
        traces.push(trace);
    }
    Ok(traces)
}

/// Every prompt alone, as the baseline, on an engine that differs in something.
///
/// # Errors
/// As [`Engine::prefill`].
pub fn alone(engine: &mut Engine, traces: &[Trace]) -> Result<Agreement> {
    let mut found = Agreement::default();
    for (p, trace) in traces.iter().enumerate() {
        let seq = engine.create()?;
        found.push(traces, p, 0, engine.prefill(seq, &trace.prompt, quietly)?);
        follow(engine, seq, traces, p, &mut found)?;
        engine.free(seq);
    }
    Ok(found)
}

/// Feeds the tokens of a trace but the last to a sequence that holds its prompt.
fn follow(engine: &mut Engine, seq: SeqId, traces: &[Trace], p: usize, found: &mut Agreement) -> Result<()> {
    let tokens = &traces[p].tokens;
    for (i, &token) in tokens[..tokens.len() - 1].iter().enumerate() {
        found.push(traces, p, i + 1, engine.step(&[(seq, token)])?);
    }
    Ok(())
}

/// As many prompts at a time as the engine has sequences: their prompts in the same micro-batches, then their tokens.
///
/// # Errors
/// As [`Engine::run`].
pub fn together(engine: &mut Engine, traces: &[Trace]) -> Result<Agreement> {
    let mut found = Agreement::default();
    let (most, vocab) = (engine.spec().n_slots, engine.model().config.vocab);
    let numbered: Vec<usize> = (0..traces.len()).collect();
    for group in numbered.chunks(most) {
        let seqs: Vec<SeqId> = group.iter().map(|_| engine.create()).collect::<Result<_>>()?;
        let mut fed = vec![0; group.len()];
        let whole = |i: usize| traces[group[i]].prompt.len() + traces[group[i]].tokens.len() - 1;
        while (0..group.len()).any(|i| fed[i] < whole(i)) {
            // An equal share of the micro-batch for each prompt that is not through; a token for each answer.
            let share = (engine.spec().max_rows / group.len()).max(1);
            let (mut rows, mut outputs) = (vec![], vec![]);
            for (i, &p) in group.iter().enumerate() {
                let trace = &traces[p];
                let end = if fed[i] < trace.prompt.len() {
                    (fed[i] + share).min(trace.prompt.len())
                } else {
                    (fed[i] + 1).min(whole(i))
                };
                for at in fed[i]..end {
                    let step = (at + 1).checked_sub(trace.prompt.len());
                    let token = match step {
                        Some(step) if step > 0 => trace.tokens[step - 1],
                        _ => trace.prompt[at],
                    };
                    rows.push(Row { seq: seqs[i], token, output: step.is_some() });
                    outputs.extend(step.map(|step| (p, step)));
                }
                fed[i] = end;
            }
            let logits = engine.run(&rows)?;
            for (&(p, step), logits) in outputs.iter().zip(logits.chunks_exact(vocab)) {
                found.push(traces, p, step, logits);
            }
        }
        seqs.into_iter().for_each(|seq| engine.free(seq));
    }
    Ok(found)
}

/// Every prompt in a copy of its sequence, while the original goes on with something else; needs two sequences.
///
/// # Errors
/// As [`Engine::fork`].
pub fn forked(engine: &mut Engine, traces: &[Trace]) -> Result<Agreement> {
    let mut found = Agreement::default();
    for (p, trace) in traces.iter().enumerate() {
        let seq = engine.create()?;
        found.push(traces, p, 0, engine.prefill(seq, &trace.prompt, quietly)?);
        let copy = engine.fork(seq)?;
        // Another token than the answer's, into what was the same page.
        engine.step(&[(seq, trace.prompt[0])])?;
        follow(engine, copy, traces, p, &mut found)?;
        engine.free(seq);
        engine.free(copy);
    }
    Ok(found)
}

/// Every prompt saved to a file in `folder` and restored on a new engine, before its answer and again in the middle of it.
///
/// # Errors
/// As [`Session::save`] and [`Session::load`], and those of `engine`.
pub fn restored(
    mut engine: impl FnMut() -> Result<Engine>,
    folder: &Path,
    traces: &[Trace],
) -> Result<Agreement> {
    let mut found = Agreement::default();
    let path = folder.join("session");
    for (p, trace) in traces.iter().enumerate() {
        let mut session = Session::new(engine()?)?;
        session.sync(&trace.prompt, |_, _| ControlFlow::Continue(()))?;
        found.push(traces, p, 0, session.logits());
        session = reopened(session, &mut engine, &path)?;
        session.sync(&trace.prompt, |_, _| ControlFlow::Continue(()))?;
        let tokens = &trace.tokens[..trace.tokens.len() - 1];
        for (i, &token) in tokens.iter().enumerate() {
            if i == tokens.len() / 2 {
                session = reopened(session, &mut engine, &path)?;
            }
            session.push(token)?;
            found.push(traces, p, i + 1, session.logits());
        }
    }
    Ok(found)
}

/// Saves a session and loads it on a new engine.
fn reopened(
    mut session: Session,
    engine: &mut impl FnMut() -> Result<Engine>,
    path: &Path,
) -> Result<Session> {
    let identity = Identity::new(session.engine(), "");
    session.save(path, &identity, Value::Null)?;
    drop(session);
    let mut session = Session::new(engine()?)?;
    let identity = Identity::new(session.engine(), "");
    session.load(&SessionFile::open(path)?, &identity)?;
    Ok(session)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_counted_and_found() {
        let trace =
            Trace { prompt: vec![0], tokens: vec![1, 0], logits: vec![vec![0.0, 1.0], vec![2.0, 1.0]] };
        let traces = [trace.clone(), trace];
        let mut a = Agreement::default();
        a.push(&traces, 0, 0, &[0.0, 1.0]);
        assert_eq!((a.tokens, a.same, a.unequal, a.largest), (1, 1, 0, 0.0));
        a.push(&traces, 1, 1, &[1.0, 1.5]);
        a.push(&traces, 1, 0, &[0.5, 0.0]);
        assert_eq!((a.tokens, a.same, a.unequal, a.largest), (3, 1, 4, 1.0));
        assert_eq!(a.first_difference, Some((1, 0)));
        assert!(a.within(1.0) && !a.within(0.99));
        a.push(&traces, 0, 1, &[f32::NAN, 0.0]);
        assert!(!a.within(1e30), "a NaN is no agreement");
    }
}
