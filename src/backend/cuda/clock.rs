//! Where the time of a step goes on the GPU: an event after each stage, recorded into the step's graph where there is one.
use ggml_kernels::cuda::{Device, Event, Stream};

use crate::backend::{Stage, Timing};
use crate::error::Result;

/// Events of the step in hand.
pub struct Clock {
    device: Device,
    start: Event,
    marks: Vec<Mark>,
    /// Marks of the step in hand; those after them are left from a longer one.
    used: usize,
}

struct Mark {
    stage: Stage,
    layer: Option<usize>,
    event: Event,
}

impl Clock {
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { device: device.clone(), start: device.event()?, marks: vec![], used: 0 })
    }

    /// A step begins; `recording`: into a graph.
    pub fn start(&mut self, stream: &Stream, recording: bool) -> Result<()> {
        self.used = 0;
        Ok(stream.record_timed(&self.start, recording)?)
    }

    /// A stage ends here.
    pub fn mark(
        &mut self,
        stream: &Stream,
        recording: bool,
        stage: Stage,
        layer: Option<usize>,
    ) -> Result<()> {
        if self.used == self.marks.len() {
            self.marks.push(Mark { stage, layer, event: self.device.event()? });
        }
        let mark = &mut self.marks[self.used];
        (mark.stage, mark.layer) = (stage, layer);
        self.used += 1;
        Ok(stream.record_timed(&mark.event, recording)?)
    }

    /// The times of the last step, whose work is done.
    pub fn timings(&self) -> Result<Vec<Timing>> {
        let mut last = &self.start;
        let mut timings = vec![];
        for mark in &self.marks[..self.used] {
            let seconds = f64::from(mark.event.milliseconds_since(last)?) * 1e-3;
            timings.push(Timing { stage: mark.stage, layer: mark.layer, seconds });
            last = &mark.event;
        }
        Ok(timings)
    }
}
