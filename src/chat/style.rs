//! Terminal styles as escape sequences, and the guard against those of others.
use std::fmt::Write;

/// How a character looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    /// Bold.
    pub bold: bool,
    /// Faint.
    pub dim: bool,
    /// Italic.
    pub italic: bool,
    /// Foreground colour, as the number of its escape sequence (31 to 37).
    pub colour: Option<u8>,
}

impl Style {
    /// No style.
    pub const PLAIN: Self = Self { bold: false, dim: false, italic: false, colour: None };
    /// Faint.
    pub const DIM: Self = Self { dim: true, ..Self::PLAIN };
    /// Bold.
    pub const BOLD: Self = Self { bold: true, ..Self::PLAIN };

    /// This style in a colour.
    #[must_use]
    pub const fn colour(self, colour: u8) -> Self {
        Self { colour: Some(colour), ..self }
    }

    /// Writes the sequence that switches to this style from any other.
    fn switch(self, out: &mut String) {
        out.push_str("\x1b[0");
        for (on, code) in [(self.bold, 1), (self.dim, 2), (self.italic, 3)] {
            if on {
                let _ = write!(out, ";{code}");
            }
        }
        if let Some(colour) = self.colour {
            let _ = write!(out, ";{colour}");
        }
        out.push('m');
    }
}

/// Text in one style, where `on`; the text as it is otherwise.
#[must_use]
pub fn paint(on: bool, style: Style, text: &str) -> String {
    let mut pen = Pen::new(on);
    let mut out = String::new();
    text.chars().for_each(|c| pen.put(c, style, &mut out));
    pen.reset(&mut out);
    out
}

/// Writes characters in styles, switching only where the style changes.
#[derive(Clone, Debug)]
pub struct Pen {
    on: bool,
    current: Style,
}

impl Pen {
    /// A pen that writes styles where `on`.
    #[must_use]
    pub fn new(on: bool) -> Self {
        Self { on, current: Style::PLAIN }
    }

    /// Whether it writes styles.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Writes one character. Lines end in plain style, so that nothing spills over when a terminal scrolls.
    pub fn put(&mut self, c: char, style: Style, out: &mut String) {
        let style = if c == '\n' { Style::PLAIN } else { style };
        if self.on && style != self.current {
            style.switch(out);
            self.current = style;
        }
        out.push(visible(c));
    }

    /// Returns to plain style.
    pub fn reset(&mut self, out: &mut String) {
        if self.on && self.current != Style::PLAIN {
            Style::PLAIN.switch(out);
            self.current = Style::PLAIN;
        }
    }
}

/// What a terminal is shown for a character: control characters, with which a text could steer the terminal, become symbols.
#[must_use]
pub fn visible(c: char) -> char {
    match c {
        '\n' | '\t' => c,
        '\0'..='\x1f' => char::from_u32(0x2400 + c as u32).unwrap_or(char::REPLACEMENT_CHARACTER),
        '\x7f' => '\u{2421}',
        '\u{80}'..='\u{9f}' => char::REPLACEMENT_CHARACTER,
        _ => c,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What is left of a styled text without its escape sequences.
    pub fn strip(styled: &str) -> String {
        let mut out = String::new();
        let mut chars = styled.chars();
        while let Some(c) = chars.next() {
            if c == '\x1b' {
                assert_eq!(chars.next(), Some('['));
                assert!(chars.by_ref().find(|c| !c.is_ascii_digit() && *c != ';') == Some('m'), "{styled:?}");
            } else {
                out.push(c);
            }
        }
        out
    }

    #[test]
    fn styles_switch_only_where_they_change_and_end_with_the_line() {
        let text = paint(true, Style::BOLD, "ab\ncd");
        assert_eq!(text, "\x1b[0;1mab\x1b[0m\n\x1b[0;1mcd\x1b[0m");
        assert_eq!(paint(false, Style::BOLD, "ab"), "ab");
        assert_eq!(paint(true, Style::DIM.colour(36), "x"), "\x1b[0;2;36mx\x1b[0m");
    }

    #[test]
    fn control_characters_cannot_reach_the_terminal() {
        assert_eq!(paint(true, Style::PLAIN, "\x1b[2J\r\u{9b}1m\x7f\tx"), "␛[2J␍\u{fffd}1m␡\tx");
    }
}
