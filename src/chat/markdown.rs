//! Markdown, lightly styled while it streams: only styles are added, so that what is copied from the terminal is what the model wrote.
use super::style::{Pen, Style};

const HEADING: Style = Style::BOLD.colour(36);
const CODE: Style = Style::PLAIN.colour(33);
const MARKER: Style = Style::PLAIN.colour(36);
const QUOTE: Style = Style { italic: true, ..Style::DIM };

/// What the rest of a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// Its beginning has not told yet; it is held back.
    Undecided,
    Text,
    Heading,
    Quote,
    /// The line that opens or closes a block of code.
    Fence,
    Code,
}

/// The state between two pieces of a text.
#[derive(Clone, Debug)]
pub struct Markdown {
    pen: Pen,
    line: Line,
    held: String,
    /// The fence that a block of code waits for: its character and length.
    fence: Option<(char, usize)>,
    bold: bool,
    code: bool,
    /// Asterisks held back.
    stars: usize,
}

impl Markdown {
    /// A renderer that adds styles where `styled`.
    #[must_use]
    pub fn new(styled: bool) -> Self {
        Self {
            pen: Pen::new(styled),
            line: Line::Undecided,
            held: String::new(),
            fence: None,
            bold: false,
            code: false,
            stars: 0,
        }
    }

    /// Renders the next piece.
    pub fn push(&mut self, text: &str, out: &mut String) {
        text.chars().for_each(|c| self.char(c, out));
    }

    /// Renders what is held back and returns to plain style; a later piece goes on in the same line.
    pub fn flush(&mut self, out: &mut String) {
        if self.line == Line::Undecided && !self.held.is_empty() {
            self.decide(out);
        }
        self.release_stars(out);
        self.pen.reset(out);
    }

    /// Ends the text: [`Self::flush`], after which another text may begin.
    pub fn finish(&mut self, out: &mut String) {
        self.flush(out);
        *self = Self::new(self.pen.is_on());
    }

    fn char(&mut self, c: char, out: &mut String) {
        if self.line != Line::Undecided {
            return self.inline(c, out);
        }
        if c != '\n' && may_be_marker(&self.held, c) {
            self.held.push(c);
            return;
        }
        // A space completes a marker; anything else only ends the wait.
        if c == ' ' {
            self.held.push(c);
            self.decide(out);
        } else {
            self.decide(out);
            self.inline(c, out);
        }
    }

    /// Tells from the beginning of a line what it is, and writes that beginning.
    fn decide(&mut self, out: &mut String) {
        let held = std::mem::take(&mut self.held);
        let marker = held.trim();
        let spaced = held.ends_with(' ') && !marker.is_empty();
        let fence = fence_of(marker);
        self.line = match (self.fence, fence) {
            (Some((c, n)), Some((d, m))) if c == d && m >= n => {
                self.fence = None;
                Line::Fence
            }
            (Some(_), _) => Line::Code,
            (None, Some(fence)) => {
                self.fence = Some(fence);
                Line::Fence
            }
            (None, None) if spaced && marker.bytes().all(|b| b == b'#') && marker.len() <= 6 => Line::Heading,
            (None, None) if marker.starts_with('>') => Line::Quote,
            (None, None) => Line::Text,
        };
        if self.line == Line::Text && spaced && is_list_marker(marker) {
            held.chars().for_each(|c| self.pen.put(c, MARKER, out));
        } else {
            held.chars().for_each(|c| self.inline(c, out));
        }
    }

    fn inline(&mut self, c: char, out: &mut String) {
        if c == '\n' {
            self.release_stars(out);
            (self.line, self.bold, self.code) = (Line::Undecided, false, false);
            return self.pen.put(c, Style::PLAIN, out);
        }
        if self.line == Line::Text && c == '*' && !self.code {
            self.stars += 1;
            if self.stars == 2 {
                self.bold = !self.bold;
                self.stars = 0;
                let style = Style { bold: true, ..Style::DIM };
                (0..2).for_each(|_| self.pen.put('*', style, out));
            }
            return;
        }
        self.release_stars(out);
        let style = self.style();
        if self.line == Line::Text && c == '`' {
            self.code = !self.code;
            return self.pen.put(c, CODE, out);
        }
        self.pen.put(c, style, out);
    }

    fn style(&self) -> Style {
        match self.line {
            Line::Heading => HEADING,
            Line::Quote => QUOTE,
            Line::Fence => Style::DIM,
            Line::Code => CODE,
            Line::Text | Line::Undecided if self.code => CODE,
            Line::Text | Line::Undecided => Style { bold: self.bold, ..Style::PLAIN },
        }
    }

    fn release_stars(&mut self, out: &mut String) {
        let style = self.style();
        (0..std::mem::take(&mut self.stars)).for_each(|_| self.pen.put('*', style, out));
    }
}

/// Whether `held` followed by `c` may still become a marker at the beginning of a line. Bounded, so that nothing waits long.
fn may_be_marker(held: &str, c: char) -> bool {
    const LONGEST: usize = 24;
    if held.len() >= LONGEST {
        return false;
    }
    let marker = held.trim_start();
    let Some(first) = marker.chars().next() else {
        return c == ' ' || c == '\t' || matches!(c, '#' | '>' | '`' | '~' | '-' | '*' | '+' | '0'..='9');
    };
    match first {
        '#' => c == '#' && marker.len() < 6,
        '`' | '~' => c == first,
        '0'..='9' => {
            let digits = marker.bytes().all(|b| b.is_ascii_digit());
            digits && marker.len() < 4 && (c.is_ascii_digit() || c == '.' || c == ')')
        }
        _ => false,
    }
}

fn fence_of(marker: &str) -> Option<(char, usize)> {
    let c = marker.chars().next().filter(|c| matches!(c, '`' | '~'))?;
    (marker.len() >= 3 && marker.chars().all(|d| d == c)).then_some((c, marker.len()))
}

fn is_list_marker(marker: &str) -> bool {
    let digits = marker.trim_end_matches(['.', ')']);
    matches!(marker, "-" | "*" | "+")
        || (digits.len() + 1 == marker.len()
            && !digits.is_empty()
            && digits.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chat::style::{tests::strip, visible};

    fn render(pieces: &[&str]) -> String {
        let (mut md, mut out) = (Markdown::new(true), String::new());
        pieces.iter().for_each(|p| md.push(p, &mut out));
        md.finish(&mut out);
        out
    }

    #[test]
    fn headings_lists_code_and_emphasis_are_styled() {
        assert_eq!(render(&["## Title\nx"]), "\x1b[0;1;36m## Title\x1b[0m\nx");
        assert_eq!(render(&["- one\n12. two"]), "\x1b[0;36m- \x1b[0mone\n\x1b[0;36m12. \x1b[0mtwo");
        assert_eq!(
            render(&["```rust\n# no heading\n```\n# yes"]),
            "\x1b[0;2m```rust\x1b[0m\n\x1b[0;33m# no heading\x1b[0m\n\x1b[0;2m```\x1b[0m\n\x1b[0;1;36m# yes\x1b[0m"
        );
        assert_eq!(
            render(&["a **b** `c*d`"]),
            "a \x1b[0;1;2m**\x1b[0;1mb\x1b[0;1;2m**\x1b[0m \x1b[0;33m`c*d`\x1b[0m"
        );
        assert_eq!(render(&["> said"]), "\x1b[0;2;3m> said\x1b[0m");
    }

    #[test]
    fn what_only_looks_like_markdown_is_plain() {
        for text in ["#hash", "1.5 apples", "2024 was", "-5 degrees", "a*b", "####### seven", "``x", "~"] {
            assert_eq!(strip(&render(&[text])), text);
        }
        for text in ["#hash", "1.5 apples", "-5 degrees", "a*b", "2 * 3", "####### seven"] {
            assert_eq!(render(&[text]), text);
        }
    }

    #[test]
    fn a_style_left_open_ends_with_its_line() {
        assert_eq!(render(&["**a\nb"]), "\x1b[0;1;2m**\x1b[0;1ma\x1b[0m\nb");
        assert_eq!(render(&["`a\nb"]), "\x1b[0;33m`a\x1b[0m\nb");
    }

    #[test]
    fn text_appears_at_once() {
        let (mut md, mut out) = (Markdown::new(true), String::new());
        md.push("Hello", &mut out);
        assert_eq!(out, "Hello");
    }

    proptest! {
        /// Nothing but styles is added, however the text is cut, and the same styles each time.
        #[test]
        fn only_styles_are_added(text in "([#*`~>+ \n.)0-9a\\-]|\\PC|\x1b){0,120}", cuts in proptest::collection::vec(0usize..200, 0..6)) {
            let whole = render(&[&text]);
            prop_assert_eq!(strip(&whole), text.chars().map(visible).collect::<String>());
            let mut at: Vec<usize> = cuts.into_iter().filter(|&c| text.is_char_boundary(c)).chain([0, text.len()]).collect();
            at.sort_unstable();
            let pieces: Vec<&str> = at.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            prop_assert_eq!(render(&pieces), whole);
        }
    }
}
