//! Several ways to run the same test that take turns, so that a machine which drifts favours none of them.
use super::peer::Peer;
use super::{Bench, Fill, Test, median};
use crate::backend::Routing;
use crate::backend::Timing;
use crate::error::{Error, Result};

/// One way to run a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Our engine number `bench`, in a routing mode.
    Ours {
        /// Index into [`Contest::benches`].
        bench: usize,
        /// How its cross layers choose positions.
        routing: Routing,
    },
    /// llama.cpp.
    LlamaCpp,
}

/// What one way took, repetition by repetition.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples {
    /// Seconds of prompt processing.
    pub prompt: Vec<f64>,
    /// Seconds of generation.
    pub generate: Vec<f64>,
}

impl Samples {
    /// Seconds of each repetition.
    #[must_use]
    pub fn seconds(&self) -> Vec<f64> {
        self.prompt.iter().zip(&self.generate).map(|(p, g)| p + g).collect()
    }

    /// How many times as fast as `base` this was: the median over the pairs of one repetition. `None` without a pair.
    #[must_use]
    pub fn speedup_over(&self, base: &Self) -> Option<f64> {
        let ratios: Vec<f64> =
            self.seconds().iter().zip(base.seconds()).map(|(own, base)| base / own).collect();
        (!ratios.is_empty()).then(|| median(&ratios))
    }
}

/// How often, and from what.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How depth is filled.
    pub fill: Fill,
    /// Repetitions.
    pub repetitions: usize,
    /// A short run before the first repetition.
    pub warm_up: bool,
}

/// Engines that are ready to run, and perhaps llama.cpp.
pub struct Contest {
    /// Our engines; several ways may share one.
    pub benches: Vec<Bench>,
    /// llama.cpp, where it takes part.
    pub peer: Option<Peer>,
}

impl Contest {
    /// Runs every test in every way; each repetition starts with another of them. Several tests take turns as the ways do, and a way is
    /// brought to the depth of each again. llama.cpp sits out tests of several sequences, and then has no samples. `progress` is
    /// called after every run. Returns the samples of each test, way by way.
    ///
    /// # Errors
    /// As [`Bench::run`].
    pub fn measure(
        &mut self,
        ways: &[Way],
        tests: &[Test],
        plan: Plan,
        mut progress: impl FnMut(),
    ) -> Result<Vec<Vec<Samples>>> {
        let mut samples = vec![vec![Samples::default(); ways.len()]; tests.len()];
        // Way by way, so that each stands at a test's depth for as long as it can.
        let turns: Vec<(usize, usize)> =
            (0..ways.len()).flat_map(|way| (0..tests.len()).map(move |test| (way, test))).collect();
        if plan.warm_up {
            for &(way, test) in &turns {
                let most = self.benches.iter().map(|b| b.engine().spec().max_rows).max().unwrap_or(1);
                let (prompt, generate) = (tests[test].prompt.min(most), tests[test].generate.min(2));
                self.run(ways[way], &Test { prompt, generate, ..tests[test] }, plan.fill)?;
                progress();
            }
        }
        for repetition in 0..plan.repetitions {
            for turn in 0..turns.len() {
                let (way, test) = turns[(repetition + turn) % turns.len()];
                if let Some((prompt, generate)) = self.run(ways[way], &tests[test], plan.fill)? {
                    samples[test][way].prompt.push(prompt);
                    samples[test][way].generate.push(generate);
                }
                progress();
            }
        }
        Ok(samples)
    }

    /// The parts of the test in one of our ways; nothing for llama.cpp.
    ///
    /// # Errors
    /// As [`Bench::breakdown`].
    pub fn breakdown(&mut self, way: Way, test: &Test, plan: Plan) -> Result<Option<Vec<Timing>>> {
        let Way::Ours { bench, routing } = way else { return Ok(None) };
        let bench = &mut self.benches[bench];
        bench.set_routing(routing)?;
        bench.breakdown(test, plan.fill, plan.repetitions).map(Some)
    }

    fn run(&mut self, way: Way, test: &Test, fill: Fill) -> Result<Option<(f64, f64)>> {
        match way {
            Way::Ours { bench, routing } => {
                let bench = (self.benches.get_mut(bench))
                    .ok_or_else(|| Error::Runtime(format!("there is no engine number {bench}")))?;
                bench.set_routing(routing)?;
                bench.prepare(test, fill)?;
                bench.run(test).map(Some)
            }
            Way::LlamaCpp => match &mut self.peer {
                Some(peer) if test.sequences == 1 => {
                    peer.prepare(test.depth, fill)?;
                    peer.run(test).map(Some)
                }
                _ => Ok(None),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speedups_are_medians_of_pairs() {
        let samples =
            |seconds: &[f64]| Samples { prompt: vec![0.0; seconds.len()], generate: seconds.into() };
        // The machine became twice as slow in the second repetition, and somebody else used it in the third.
        let base = samples(&[4.0, 8.0, 4.0]);
        let own = samples(&[2.0, 4.0, 40.0]);
        assert_eq!(own.speedup_over(&base), Some(2.0));
        assert_eq!(base.speedup_over(&base), Some(1.0));
        assert_eq!(samples(&[]).speedup_over(&base), None);
    }

    #[test]
    fn a_sample_is_prompt_and_generation_together() {
        let own = Samples { prompt: vec![1.0, 2.0], generate: vec![3.0, 4.0] };
        assert_eq!(own.seconds(), [4.0, 6.0]);
    }
}
