//! A progress bar for work that takes longer than a moment.
use std::io::{self, IsTerminal};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Work shorter than this shows no bar.
const PATIENCE: Duration = Duration::from_millis(500);

/// Tokens done, with rate and time left, on standard error; appears after half a second and only on a terminal.
pub struct DelayedBar {
    bar: ProgressBar,
    done: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl DelayedBar {
    /// A bar over `total` tokens.
    #[must_use]
    pub fn new(what: &'static str, total: usize) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::hidden());
        let template = "{msg} {wide_bar} {human_pos}/{human_len} tokens {per_sec} {eta} left";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let style =
            style.with_key("per_sec", |state: &indicatif::ProgressState, w: &mut dyn std::fmt::Write| {
                let _ = write!(w, "{:.0} t/s", state.per_sec());
            });
        let bar = bar.with_style(style).with_message(what);
        let (done, wait) = channel();
        let thread = io::stderr().is_terminal().then(|| {
            let bar = bar.clone();
            std::thread::spawn(move || show_later(&bar, &wait))
        });
        Self { bar, done: Some(done), thread }
    }

    /// `done` of `total` tokens.
    pub fn set(&self, done: usize, total: usize) {
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        drop(self.done.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.bar.finish_and_clear();
    }
}

impl Drop for DelayedBar {
    fn drop(&mut self) {
        self.finish();
    }
}

fn show_later(bar: &ProgressBar, done: &Receiver<()>) {
    if done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
        bar.set_draw_target(ProgressDrawTarget::stderr());
        // A micro-batch of a large model takes seconds: the clock goes on in between.
        bar.enable_steady_tick(Duration::from_millis(200));
        let _ = done.recv();
    }
}
