//! What a person, or a program, sees of a run.
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

/// How progress is shown, on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// Not at all.
    Nothing,
    /// A bar on a terminal, a line a minute elsewhere.
    Person,
    /// JSON lines.
    Json,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Prompt tokens run.
    pub prompt: usize,
    /// Prompt tokens taken from a prefix in memory.
    pub reused: usize,
    /// Prompt tokens read from the cache folder.
    pub read: usize,
    /// Tokens generated.
    pub generated: usize,
    /// Jobs with a result.
    pub done: usize,
    /// Jobs among them whose result is an error.
    pub failed: usize,
    /// Seconds of steps with prompt tokens.
    prompt_seconds: f64,
    /// Seconds of the other steps, and the tokens that they generated.
    decode_seconds: f64,
    decoded: usize,
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default)]
pub struct State {
    /// Jobs that run.
    pub running: usize,
    /// Jobs that wait.
    pub waiting: usize,
    /// Prompt tokens still to run.
    pub prompt_left: usize,
    /// Tokens still to generate, at most.
    pub answers_left: usize,
    /// Bytes of cache in use.
    pub memory: u64,
}

/// Progress of a run.
pub struct Progress {
    show: Show,
    bar: ProgressBar,
    started: Instant,
    shown: Instant,
    /// What was done.
    pub totals: Totals,
}

/// Between two lines where there is no terminal.
const EVERY: Duration = Duration::from_secs(60);
/// Between two messages of the bar.
const REDRAW: Duration = Duration::from_millis(100);

impl Progress {
    /// Progress over `jobs` jobs.
    #[must_use]
    pub fn new(show: Show, jobs: usize) -> Self {
        let visible = show == Show::Person && std::io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} jobs  {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(jobs as u64), target).with_style(style);
        let now = Instant::now();
        Self { show, bar, started: now, shown: now, totals: Totals::default() }
    }

    /// A step of `prompt` prompt tokens and `generated` tokens took `took`.
    pub fn step(&mut self, prompt: usize, generated: usize, took: Duration) {
        let t = &mut self.totals;
        t.prompt += prompt;
        t.generated += generated;
        if prompt > 0 {
            t.prompt_seconds += took.as_secs_f64();
        } else {
            t.decode_seconds += took.as_secs_f64();
            t.decoded += generated;
        }
    }

    /// Whether it is time for [`Self::show`].
    #[must_use]
    pub fn due(&self) -> bool {
        let every = if self.bar.is_hidden() { EVERY } else { REDRAW };
        self.show != Show::Nothing && self.shown.elapsed() >= every
    }

    /// Shows where the run stands.
    pub fn show(&mut self, state: &State) {
        self.shown = Instant::now();
        if self.bar.is_hidden() {
            self.line(state);
        } else {
            self.bar.set_message(self.message(state));
        }
    }

    /// A job ended; `error` says why it failed.
    pub fn job(&mut self, id: &str, error: Option<&str>) {
        self.totals.done += 1;
        self.totals.failed += usize::from(error.is_some());
        self.bar.inc(1);
        self.event("job", || json!({ "id": id, "error": error }));
    }

    /// Something that the person should know.
    pub fn note(&self, text: &str) {
        match self.show {
            Show::Nothing => {}
            Show::Person => self.bar.suspend(|| eprintln!("note: {text}")),
            Show::Json => self.event("note", || json!({ "text": text })),
        }
    }

    /// One line to standard error where JSON lines are wanted.
    pub fn event(&self, name: &str, fields: impl FnOnce() -> Value) {
        if self.show != Show::Json {
            return;
        }
        let mut line = json!({ "event": name, "seconds": self.started.elapsed().as_secs_f64() });
        if let (Value::Object(line), Value::Object(fields)) = (&mut line, fields()) {
            line.extend(fields);
        }
        eprintln!("{line}");
    }

    /// The end, after which nothing is drawn any more.
    pub fn summary(&self, state: &State) {
        self.bar.finish_and_clear();
        let (t, seconds) = (&self.totals, self.started.elapsed().as_secs_f64());
        match self.show {
            Show::Nothing => {}
            Show::Json => self.event("summary", || self.fields(state)),
            Show::Person => {
                eprintln!(
                    "{} jobs ({} failed) in {}; {} left",
                    t.done,
                    t.failed,
                    HumanDuration(self.started.elapsed()),
                    state.running + state.waiting
                );
                eprintln!(
                    "prompts: {} tokens run, {} shared, {} read from the cache folder; answers: {} tokens, {:.1} t/s from end to end",
                    t.prompt,
                    t.reused,
                    t.read,
                    t.generated,
                    t.generated as f64 / seconds
                );
            }
        }
    }

    fn line(&self, state: &State) {
        match self.show {
            Show::Nothing => {}
            Show::Json => self.event("progress", || self.fields(state)),
            Show::Person => eprintln!(
                "{}/{} jobs  {}",
                self.totals.done,
                self.bar.length().unwrap_or(0),
                self.message(state)
            ),
        }
    }

    fn message(&self, s: &State) -> String {
        let (t, seconds) = (&self.totals, self.started.elapsed().as_secs_f64());
        let left = self.seconds_left(s).map_or_else(String::new, |left| {
            format!("; at most {}", HumanDuration(Duration::from_secs_f64(left)))
        });
        format!(
            "{} running, {} waiting; prompts {:.0} t/s, answers {:.1} t/s; {} tokens shared; cache {}{left}",
            s.running,
            s.waiting,
            t.prompt as f64 / seconds,
            t.generated as f64 / seconds,
            t.reused + t.read,
            indicatif::BinaryBytes(s.memory)
        )
    }

    /// Time left by the rates so far, were every answer as long as it may be.
    fn seconds_left(&self, s: &State) -> Option<f64> {
        let t = &self.totals;
        let prompt = match (s.prompt_left, t.prompt) {
            (0, _) => 0.0,
            (_, 0) => return None,
            (left, run) => left as f64 * t.prompt_seconds / run as f64,
        };
        // Until steps without prompt tokens were seen, answers grow beside prompts.
        let answers = match t.decoded {
            0 => 0.0,
            n => s.answers_left as f64 * t.decode_seconds / n as f64,
        };
        let left = prompt + answers;
        left.is_finite().then_some(left.min(1e9))
    }

    fn fields(&self, s: &State) -> Value {
        let t = &self.totals;
        json!({
            "done": t.done,
            "failed": t.failed,
            "running": s.running,
            "waiting": s.waiting,
            "prompt_tokens_run": t.prompt,
            "prompt_tokens_shared": t.reused,
            "prompt_tokens_read": t.read,
            "generated_tokens": t.generated,
            "prompt_seconds": t.prompt_seconds,
            "decode_seconds": t.decode_seconds,
            "decode_tokens": t.decoded,
            "cache_bytes": s.memory,
            "seconds_left": self.seconds_left(s),
        })
    }
}
