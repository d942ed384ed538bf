//! Where the time of a graph goes, node by node. Off, it costs one look at a flag for each node.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::backend::{Stage, Timing};

/// What a node belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    pub stage: Stage,
    pub layer: Option<usize>,
}

/// The times of the last run.
#[derive(Default)]
pub struct Clock {
    on: AtomicBool,
    run: Mutex<Run>,
}

#[derive(Default)]
struct Run {
    /// When the last timed node ended, or the graph began.
    last: Option<Instant>,
    timings: Vec<Timing>,
}

impl Clock {
    pub fn switch(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
        *self.run() = Run::default();
    }

    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    fn run(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A graph begins.
    pub fn begin(&self) {
        if self.is_on() {
            *self.run() = Run { last: Some(Instant::now()), timings: vec![] };
        }
    }

    /// A graph ended: what came after its last node is nobody's.
    pub fn end(&self) {
        if self.is_on() {
            self.run().gap(Instant::now());
        }
    }

    /// Runs a node. With the clock on, `alone` runs after it: a part of its work once more by itself, whose time is taken from the
    /// node's and put down as `alone`'s part.
    pub fn time(&self, label: Label, work: impl FnOnce(), alone: Option<(Stage, impl FnOnce())>) {
        if !self.is_on() {
            return work();
        }
        self.run().gap(Instant::now());
        let started = Instant::now();
        work();
        let mut seconds = started.elapsed().as_secs_f64();
        let mut run = self.run();
        if let Some((stage, alone)) = alone {
            let started = Instant::now();
            alone();
            let apart = started.elapsed().as_secs_f64().min(seconds);
            seconds -= apart;
            run.timings.push(Timing { stage, layer: label.layer, seconds: apart });
        }
        run.timings.push(Timing { stage: label.stage, layer: label.layer, seconds });
        run.last = Some(Instant::now());
    }

    /// The times of the last graph, in the order of its nodes.
    pub fn take(&self) -> Vec<Timing> {
        std::mem::take(&mut self.run().timings)
    }
}

impl Run {
    /// What passed since the last node: first comes ggml's own lookup of the embeddings, later its copy of the output rows.
    fn gap(&mut self, now: Instant) {
        let Some(last) = self.last.replace(now) else { return };
        let stage = if self.timings.is_empty() { Stage::Embedding } else { Stage::Other };
        self.timings.push(Timing { stage, layer: None, seconds: (now - last).as_secs_f64() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const LABEL: Label = Label { stage: Stage::TopK, layer: Some(3) };

    #[test]
    fn off_it_only_runs() {
        let (clock, mut ran) = (Clock::default(), false);
        clock.begin();
        clock.time(LABEL, || ran = true, None::<(Stage, fn())>);
        clock.end();
        assert!(ran && clock.take().is_empty());
    }

    #[test]
    fn every_moment_is_somebodys() {
        let clock = Clock::default();
        clock.switch(true);
        let started = Instant::now();
        clock.begin();
        let pause = |ms| move || std::thread::sleep(Duration::from_millis(ms));
        pause(4)();
        clock.time(LABEL, pause(12), Some((Stage::Scoring, pause(4))));
        let total = started.elapsed().as_secs_f64();
        clock.end();
        let timings = clock.take();
        let parts: Vec<_> = timings.iter().map(|t| (t.stage, t.layer)).collect();
        assert_eq!(
            parts,
            [
                (Stage::Embedding, None),
                (Stage::Scoring, Some(3)),
                (Stage::TopK, Some(3)),
                (Stage::Other, None)
            ]
        );
        let sum: f64 = timings.iter().map(|t| t.seconds).sum();
        assert!(sum > 0.015 && sum < total, "{sum} of {total}: the second run of a part counts for nothing");
        assert!(timings[1].seconds >= 0.004 && timings[0].seconds >= 0.004, "{timings:?}");
    }
}
