//! Where the time of a test goes, stage by stage and layer by layer (the paper's Figure 6).
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use super::{Bench, Fill, Test};
use crate::backend::{Stage, Timing};
use crate::engine::Row;
use crate::error::Result;
use crate::sampler::{Sampler, SamplerParams};
use crate::tokenizer::Tokenizer;

/// Sums of times by stage and layer, in the order in which they first came.
#[derive(Default)]
struct Sums(Vec<Timing>);

impl Sums {
    fn add(&mut self, timing: Timing) {
        match self.0.iter_mut().find(|t| (t.stage, t.layer) == (timing.stage, timing.layer)) {
            Some(sum) => sum.seconds += timing.seconds,
            None => self.0.push(timing),
        }
    }
}

impl Bench {
    /// Runs the test `repetitions` times with the backend's clock on; returns the seconds of each stage in one repetition of prompt
    /// processing, or in one step where there is generation (the prompt is then left out). A step ends with sampling by the default
    /// parameters, where the file has a vocabulary.
    ///
    /// # Errors
    /// As [`Bench::run`], and when the backend has no clock.
    pub fn breakdown(&mut self, test: &Test, fill: Fill, repetitions: usize) -> Result<Vec<Timing>> {
        self.engine.backend_mut().set_timing(true)?;
        let sums = self.timed(test, fill, repetitions);
        self.engine.backend_mut().set_timing(false)?;
        let times = repetitions * test.generate.max(1);
        let mut sums = sums?.0;
        sums.iter_mut().for_each(|t| t.seconds /= times as f64);
        Ok(sums)
    }

    fn timed(&mut self, test: &Test, fill: Fill, repetitions: usize) -> Result<Sums> {
        let mut sums = Sums::default();
        let file = &self.engine.model().file;
        let tokenizer = Tokenizer::from_gguf(file).ok().map(Arc::new);
        for repetition in 0..=repetitions {
            self.prepare(test, fill)?;
            // The first time around graphs are recorded.
            let mut kept = if repetition == 0 { None } else { Some(&mut sums) };
            if test.generate == 0 {
                self.timed_prompt(test, &mut kept)?;
            } else {
                let params = SamplerParams { seed: Some(1), ..SamplerParams::default() };
                let mut sampler = tokenizer.clone().map(|t| Sampler::new(params, t)).transpose()?;
                self.timed_steps(test, sampler.as_mut(), &mut kept)?;
            }
            self.rewind(test)?;
        }
        Ok(sums)
    }

    fn timed_prompt(&mut self, test: &Test, kept: &mut Option<&mut Sums>) -> Result<()> {
        let most = self.engine.spec().max_rows;
        for seq in self.ready.clone() {
            let prompt = self.tokens.take(test.prompt);
            let parts = prompt.chunks(most).count();
            for (i, part) in prompt.chunks(most).enumerate() {
                let last = |n| i + 1 == parts && n + 1 == part.len();
                let rows: Vec<Row> =
                    part.iter().enumerate().map(|(n, &token)| Row { seq, token, output: last(n) }).collect();
                self.engine.run(&rows)?;
                keep(kept, self.engine.backend_mut().timings()?);
            }
        }
        Ok(())
    }

    fn timed_steps(
        &mut self,
        test: &Test,
        mut sampler: Option<&mut Sampler>,
        kept: &mut Option<&mut Sums>,
    ) -> Result<()> {
        for seq in self.ready.clone() {
            let prompt = self.tokens.take(test.prompt);
            if !prompt.is_empty() {
                self.engine.prefill(seq, &prompt, |_| std::ops::ControlFlow::Continue(()))?;
            }
        }
        let vocab = self.engine.model().config.vocab;
        for _ in 0..test.generate {
            let rows: Vec<_> = self.ready.iter().map(|&seq| (seq, self.tokens.next())).collect();
            let mut logits = self.engine.step(&rows)?.to_vec();
            keep(kept, self.engine.backend_mut().timings()?);
            let started = Instant::now();
            if let Some(sampler) = sampler.as_mut() {
                for row in logits.chunks_mut(vocab) {
                    sampler.sample(row)?;
                }
                let seconds = started.elapsed().as_secs_f64();
                keep(kept, vec![Timing { stage: Stage::Sampling, layer: None, seconds }]);
            }
        }
        Ok(())
    }
}

fn keep(sums: &mut Option<&mut Sums>, timings: Vec<Timing>) {
    if let Some(sums) = sums {
        timings.into_iter().for_each(|t| sums.add(t));
    }
}

/// Seconds and layers of each stage that there was, in the order of [`Stage::ALL`].
#[must_use]
pub fn by_stage(timings: &[Timing]) -> Vec<(Stage, f64, usize)> {
    let of = |stage| {
        let own = || timings.iter().filter(move |t| t.stage == stage);
        (stage, own().map(|t| t.seconds).sum(), own().filter(|t| t.layer.is_some()).count())
    };
    Stage::ALL.into_iter().map(of).filter(|(stage, ..)| timings.iter().any(|t| t.stage == *stage)).collect()
}

/// A Markdown table of the stages: milliseconds, share, layers, microseconds of one layer.
#[must_use]
pub fn table(title: &str, timings: &[Timing]) -> String {
    let stages = by_stage(timings);
    let total: f64 = stages.iter().map(|p| p.1).sum();
    let mut out =
        format!("| {title} | ms | share | layers | us a layer |\n| --- | ---: | ---: | ---: | ---: |\n");
    for (stage, seconds, layers) in &stages {
        let each = if *layers > 0 { format!("{:.1}", seconds * 1e6 / *layers as f64) } else { String::new() };
        let layers = if *layers > 0 { layers.to_string() } else { String::new() };
        let share = 100.0 * seconds / total;
        let _ = writeln!(out, "| {stage} | {:.3} | {share:.1} % | {layers} | {each} |", seconds * 1e3);
    }
    let _ = writeln!(out, "| all | {:.3} | | | |", total * 1e3);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_sums_over_layers() {
        let timing = |stage, layer, seconds| Timing { stage, layer, seconds };
        let timings = [
            timing(Stage::FeedForward, Some(0), 0.001),
            timing(Stage::Logits, None, 0.002),
            timing(Stage::FeedForward, Some(1), 0.001),
        ];
        assert_eq!(by_stage(&timings), [(Stage::FeedForward, 0.002, 2), (Stage::Logits, 0.002, 0)]);
        let table = table("tg8", &timings);
        assert!(table.contains("| feed forward | 2.000 | 50.0 % | 2 | 1000.0 |"), "{table}");
        assert!(table.contains("| all | 4.000 |"), "{table}");
    }
}
