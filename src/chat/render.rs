//! How a streamed answer looks: reasoning dimmed or folded, Markdown styled, or plain text where there is no terminal.
use super::markdown::Markdown;
use super::reasoning::{Piece, Splitter};
use super::style::{Pen, Style, paint};

/// What to do with reasoning on a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reasoning {
    /// Shown, dimmed.
    #[default]
    Show,
    /// One line that counts its words.
    Fold,
}

/// How answers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// A terminal: reasoning is told from the answer, and control characters are made visible. Otherwise the text goes out as it is.
    pub terminal: bool,
    /// Styles are written (a terminal, and NO_COLOR is not set).
    pub styled: bool,
    /// Markdown is styled.
    pub markdown: bool,
    /// What to do with reasoning.
    pub reasoning: Reasoning,
}

impl Look {
    /// Plain text, as for a pipe.
    pub const PIPE: Self =
        Self { terminal: false, styled: false, markdown: false, reasoning: Reasoning::Show };
}

/// Renders one answer.
#[derive(Clone, Debug)]
pub struct Renderer {
    look: Look,
    splitter: Splitter,
    markdown: Markdown,
    thought: Pen,
    /// The line of folded reasoning, while it counts.
    folded: Option<Fold>,
    /// White space after folded reasoning is skipped, so that the answer follows its line.
    skip_space: bool,
}

#[derive(Clone, Debug, Default)]
struct Fold {
    words: usize,
    in_word: bool,
    shown: usize,
}

impl Renderer {
    /// A renderer for what follows `prompt`.
    #[must_use]
    pub fn new(look: Look, prompt: &str) -> Self {
        Self {
            look,
            splitter: Splitter::after(prompt),
            markdown: Markdown::new(look.styled && look.markdown),
            thought: Pen::new(look.styled),
            folded: None,
            skip_space: false,
        }
    }

    /// Renders the next piece.
    #[must_use]
    pub fn push(&mut self, text: &str) -> String {
        if !self.look.terminal {
            return text.to_owned();
        }
        let mut out = String::new();
        let mut splitter = std::mem::take(&mut self.splitter);
        splitter.push(text, |piece| self.piece(piece, &mut out));
        self.splitter = splitter;
        out
    }

    /// Renders what is held back; the answer has ended, or was stopped.
    #[must_use]
    pub fn finish(&mut self) -> String {
        let mut out = String::new();
        let mut splitter = std::mem::take(&mut self.splitter);
        splitter.finish(|piece| self.piece(piece, &mut out));
        self.end_fold(&mut out);
        self.markdown.finish(&mut out);
        self.thought.reset(&mut out);
        out
    }

    fn piece(&mut self, piece: Piece<'_>, out: &mut String) {
        if !matches!(piece, Piece::Answer(_)) {
            self.markdown.flush(out);
        }
        match (piece, self.look.reasoning) {
            (Piece::Answer(text), _) => {
                self.end_fold(out);
                let text = if self.skip_space { text.trim_start() } else { text };
                self.skip_space &= text.is_empty();
                self.markdown.push(text, out);
            }
            (Piece::Thought(text), Reasoning::Fold) => self.fold(text, out),
            (Piece::Open(_), Reasoning::Fold) => self.fold("", out),
            (Piece::Close(_), Reasoning::Fold) => self.end_fold(out),
            (Piece::Thought(text) | Piece::Open(text) | Piece::Close(text), Reasoning::Show) => {
                text.chars().for_each(|c| self.thought.put(c, Style::DIM, out));
                self.thought.reset(out);
            }
        }
    }

    fn fold(&mut self, text: &str, out: &mut String) {
        const EVERY: usize = 10;
        let first = self.folded.is_none();
        let fold = self.folded.get_or_insert_default();
        for c in text.chars() {
            let in_word = !c.is_whitespace();
            fold.words += usize::from(in_word && !fold.in_word);
            fold.in_word = in_word;
        }
        if first || fold.words >= fold.shown + EVERY {
            fold.shown = fold.words;
            let line = format!("▸ thinking, {} words", fold.words);
            *out += &format!("\r\x1b[K{}", paint(self.look.styled, Style::DIM, &line));
        }
    }

    fn end_fold(&mut self, out: &mut String) {
        if let Some(fold) = self.folded.take() {
            let line = format!("▸ thought, {} words (/think shows them)", fold.words);
            *out += &format!("\r\x1b[K{}\n", paint(self.look.styled, Style::DIM, &line));
            self.skip_space = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chat::style::{tests::strip, visible};

    const TERMINAL: Look = Look { terminal: true, styled: true, markdown: true, reasoning: Reasoning::Show };

    fn render(look: Look, pieces: &[&str]) -> String {
        let mut r = Renderer::new(look, "");
        let mut out: String = pieces.iter().map(|p| r.push(p)).collect();
        out += &r.finish();
        out
    }

    #[test]
    fn a_pipe_gets_the_text_as_it_is() {
        let text = "<think>\x1b[1m</think># a\n**b**";
        assert_eq!(render(Look::PIPE, &[text]), text);
    }

    #[test]
    fn reasoning_is_dimmed() {
        assert_eq!(
            render(TERMINAL, &["<think>hm</th", "ink>", "# yes"]),
            "\x1b[0;2m<think>\x1b[0m\x1b[0;2mhm\x1b[0m\x1b[0;2m</think>\x1b[0m\x1b[0;1;36m# yes\x1b[0m"
        );
    }

    #[test]
    fn reasoning_folds_into_one_line() {
        let look = Look { styled: false, reasoning: Reasoning::Fold, ..TERMINAL };
        assert_eq!(
            render(look, &["<think>", "a b c</think>\n\nyes\n\nno"]),
            "\r\x1b[K▸ thinking, 0 words\r\x1b[K▸ thought, 3 words (/think shows them)\nyes\n\nno"
        );
        let stopped = render(look, &["<think>a b"]);
        assert!(stopped.ends_with("▸ thought, 2 words (/think shows them)\n"), "{stopped:?}");
    }

    #[test]
    fn without_colour_a_terminal_gets_no_escape_sequences() {
        let look = Look { styled: false, ..TERMINAL };
        assert_eq!(render(look, &["<think>hm</think># yes \x1b[1m"]), "<think>hm</think># yes ␛[1m");
    }

    proptest! {
        #[test]
        fn nothing_is_lost_on_a_terminal(text in "(<think>|</think>|[#*` \n-]|\\PC|\x1b){0,80}") {
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let pieces: Vec<&str> = chars.iter().map(String::as_str).collect();
            let shown = strip(&render(TERMINAL, &pieces));
            prop_assert_eq!(shown, text.chars().map(visible).collect::<String>());
        }
    }
}
