//! Numbers for people: the line after an answer, counts with separators.
use crate::generate::{FinishReason, Timings};

/// Groups digits: `12,345`.
#[must_use]
pub fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A count of things: `1 turn`, `2 turns`.
#[must_use]
pub fn plural(n: usize, thing: &str) -> String {
    format!("{} {thing}{}", count(n), if n == 1 { "" } else { "s" })
}

/// The line after an answer.
#[must_use]
pub fn answer_line(t: &Timings, reason: FinishReason, used: usize, context: usize, routing: &str) -> String {
    let prompt = t.prompt_reused + t.prompt_processed;
    let cached =
        if t.prompt_reused > 0 { format!(" ({} cached)", count(t.prompt_reused)) } else { String::new() };
    let rate = |rate: f64| if rate > 0.0 { format!(" {rate:.1} t/s") } else { String::new() };
    let end = match reason {
        FinishReason::Stop => "",
        FinishReason::Length => " (length limit)",
        FinishReason::ContextFull => " (context full)",
        FinishReason::Interrupted => " (stopped)",
    };
    let percent = (used * 100).checked_div(context).unwrap_or(0);
    format!(
        "prompt {} tokens{cached}{} | answer {} tokens{}{end} | context {}/{} ({percent} %) | {routing}",
        count(prompt),
        rate(t.prompt_rate()),
        count(t.generated),
        rate(t.generate_rate()),
        count(used),
        count(context),
    )
}

/// Sums over the answers of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// Answers made.
    pub answers: usize,
    /// All their timings.
    pub sum: Timings,
}

impl Totals {
    /// Adds an answer.
    pub fn add(&mut self, t: &Timings) {
        self.answers += 1;
        let s = &mut self.sum;
        s.prompt_reused += t.prompt_reused;
        s.prompt_processed += t.prompt_processed;
        s.prompt_seconds += t.prompt_seconds;
        s.generated += t.generated;
        s.generate_seconds += t.generate_seconds;
    }

    /// For `/stats`.
    #[must_use]
    pub fn lines(&self) -> String {
        let s = &self.sum;
        format!(
            "answers    {}\nprompt     {} tokens run in {:.2} s, {:.1} t/s; {} taken from the cache\ngenerated  {} tokens in {:.2} s, {:.1} t/s",
            count(self.answers),
            count(s.prompt_processed),
            s.prompt_seconds,
            s.prompt_rate(),
            count(s.prompt_reused),
            count(s.generated),
            s.generate_seconds,
            s.generate_rate(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped() {
        let shown: Vec<_> = [0, 12, 123, 1234, 123_456, 1_234_567].map(count).to_vec();
        assert_eq!(shown, ["0", "12", "123", "1,234", "123,456", "1,234,567"]);
    }

    #[test]
    fn the_line_after_an_answer_has_what_the_issue_asks_for() {
        let t = Timings {
            prompt_reused: 1200,
            prompt_processed: 50,
            prompt_seconds: 0.5,
            generated: 30,
            generate_seconds: 1.5,
        };
        assert_eq!(
            answer_line(&t, FinishReason::Stop, 1280, 8192, "clsa k=512"),
            "prompt 1,250 tokens (1,200 cached) 100.0 t/s | answer 30 tokens 20.0 t/s | context 1,280/8,192 (15 %) | clsa k=512"
        );
        let none = Timings::default();
        assert_eq!(
            answer_line(&none, FinishReason::Interrupted, 0, 0, "dense"),
            "prompt 0 tokens | answer 0 tokens (stopped) | context 0/0 (0 %) | dense"
        );
    }

    #[test]
    fn totals_add_up() {
        let mut totals = Totals::default();
        let t = Timings {
            prompt_reused: 1,
            prompt_processed: 2,
            prompt_seconds: 0.5,
            generated: 3,
            generate_seconds: 1.0,
        };
        totals.add(&t);
        totals.add(&t);
        assert_eq!((totals.answers, totals.sum.prompt_processed, totals.sum.generated), (2, 4, 6));
        assert!(totals.lines().contains("6 tokens in 2.00 s, 3.0 t/s"), "{}", totals.lines());
    }
}
