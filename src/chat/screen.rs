//! Where a chat writes: answers to standard output, everything else to standard error.
use std::io::{self, Write};
use std::ops::ControlFlow;

use super::progress::DelayedBar;
use super::render::{Look, Renderer};
use super::status::count;
use super::style::{Style, paint};
use super::talk::Audience;

/// The two outputs, and how to write to them. Failures of standard error are ignored: nobody is left to be told.
pub struct Screen {
    out: Box<dyn Write>,
    err: Box<dyn Write>,
    /// How answers look.
    pub look: Look,
    /// Whether notes are styled: standard error is a terminal that knows colour.
    pub styled_notes: bool,
}

impl Screen {
    /// A screen over two outputs.
    #[must_use]
    pub fn new(out: Box<dyn Write>, err: Box<dyn Write>, look: Look, styled_notes: bool) -> Self {
        Self { out, err, look, styled_notes }
    }

    /// Part of an answer.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn answer(&mut self, text: &str) -> io::Result<()> {
        self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush())
    }

    /// What a command was asked for.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn result(&mut self, text: &str) -> io::Result<()> {
        writeln!(self.out, "{text}").and_then(|()| self.out.flush())
    }

    /// A note beside the conversation.
    pub fn note(&mut self, text: &str) {
        let text = paint(self.styled_notes, Style::DIM, text);
        let _ = writeln!(self.err, "{text}").and_then(|()| self.err.flush());
    }

    /// Something went wrong, and the conversation goes on.
    pub fn error(&mut self, text: &str) {
        let label = paint(self.styled_notes, Style::BOLD.colour(31), "error:");
        let _ = writeln!(self.err, "{label} {text}").and_then(|()| self.err.flush());
    }

    /// A sequence for the terminal itself.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn sequence(&mut self, sequence: &str) -> io::Result<()> {
        self.answer(sequence)
    }
}

/// An answer on its way to a screen.
pub struct Stage<'a> {
    screen: &'a mut Screen,
    bar: Option<DelayedBar>,
    renderer: Option<Renderer>,
    /// The last character written was the end of a line.
    line_ended: bool,
    /// Standard output failed.
    pub failed: Option<io::Error>,
    /// The end of the prompt that was answered.
    pub prompt: String,
}

impl<'a> Stage<'a> {
    /// A stage for one answer.
    #[must_use]
    pub fn new(screen: &'a mut Screen) -> Self {
        let bar = Some(DelayedBar::new("prompt", 0));
        Self { screen, bar, renderer: None, line_ended: true, failed: None, prompt: String::new() }
    }

    /// Ends the answer and its line.
    pub fn finish(&mut self) {
        self.bar = None;
        if let Some(mut renderer) = self.renderer.take() {
            let rest = renderer.finish();
            let _ = self.write(&rest);
        }
        if !self.line_ended {
            let _ = self.write("\n");
        }
    }

    fn write(&mut self, text: &str) -> ControlFlow<()> {
        if let Some(last) = text.chars().next_back() {
            self.line_ended = last == '\n';
        }
        match self.screen.answer(text) {
            _ if self.failed.is_some() => ControlFlow::Break(()),
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                self.failed = Some(e);
                ControlFlow::Break(())
            }
        }
    }
}

impl Audience for Stage<'_> {
    fn prompt(&mut self, done: usize, total: usize) -> ControlFlow<()> {
        if let Some(bar) = &self.bar {
            bar.set(done, total);
        }
        if done == total {
            self.bar = None;
        }
        ControlFlow::Continue(())
    }

    fn begin(&mut self, prompt: &str) {
        let tail = prompt.char_indices().rev().nth(200).map_or(0, |(at, _)| at);
        self.prompt = prompt[tail..].to_owned();
        self.renderer = Some(Renderer::new(self.screen.look, &self.prompt));
    }

    fn text(&mut self, text: &str) -> ControlFlow<()> {
        self.bar = None;
        let rendered = self.renderer.as_mut().map(|r| r.push(text)).unwrap_or_default();
        self.write(&rendered)
    }

    fn dropped(&mut self, turns: usize) {
        if !self.line_ended {
            let _ = self.write("\n");
        }
        let plural = if turns == 1 { "turn was" } else { "turns were" };
        let note =
            format!("context: the {} oldest {plural} dropped to make room (--context-shift)", count(turns));
        self.screen.note(&note);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::chat::render::Reasoning;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Shared {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    #[test]
    fn answers_and_notes_go_to_different_places() {
        let (out, err) = (Shared::default(), Shared::default());
        let mut screen = Screen::new(Box::new(out.clone()), Box::new(err.clone()), Look::PIPE, false);
        let mut stage = Stage::new(&mut screen);
        stage.begin("...<think>\n");
        assert!(stage.text("**a**\x1b").is_continue());
        stage.dropped(2);
        stage.finish();
        screen.error("bad");
        assert_eq!(out.text(), "**a**\x1b\n");
        assert_eq!(
            err.text(),
            "context: the 2 oldest turns were dropped to make room (--context-shift)\nerror: bad\n"
        );
    }

    #[test]
    fn an_answer_that_is_broken_off_still_ends_its_styles_and_its_line() {
        let out = Shared::default();
        let look = Look { terminal: true, styled: true, markdown: true, reasoning: Reasoning::Show };
        let mut screen = Screen::new(Box::new(out.clone()), Box::new(io::sink()), look, true);
        let mut stage = Stage::new(&mut screen);
        stage.begin("");
        let _ = stage.text("`code");
        stage.finish();
        assert_eq!(out.text(), "\x1b[0;33m`code\x1b[0m\n");
    }

    #[test]
    fn a_reader_that_left_ends_the_answer() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut screen = Screen::new(Box::new(Closed), Box::new(io::sink()), Look::PIPE, false);
        let mut stage = Stage::new(&mut screen);
        stage.begin("");
        assert!(stage.text("x").is_break());
        assert_eq!(stage.failed.unwrap().kind(), io::ErrorKind::BrokenPipe);
    }
}
