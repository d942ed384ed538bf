//! The terminal: whether there is one, how wide it is, its mode, and its clipboard.
use std::io::{self, IsTerminal, Write};

use base64::Engine as _;
use rustix::termios::{self, OptionalActions, Termios};

/// Whether a conversation can be held: a person types, and reads what is written.
#[must_use]
pub fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Whether to write styles to a terminal: <https://no-color.org>, and terminals that know none.
#[must_use]
pub fn wants_colour() -> bool {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|v| v == "dumb");
    !no_color && !dumb
}

/// Columns of the terminal, 80 when it does not say.
#[must_use]
pub fn width() -> usize {
    let size = termios::tcgetwinsize(io::stdout()).ok();
    size.map(|s| usize::from(s.ws_col)).filter(|&w| w > 0).unwrap_or(80)
}

/// Puts the terminal back into the mode in which it was found, also when a line is being edited on another thread.
pub struct ModeGuard(Option<Termios>);

impl ModeGuard {
    /// Remembers the present mode.
    #[must_use]
    pub fn new() -> Self {
        Self(termios::tcgetattr(io::stdin()).ok())
    }
}

impl Default for ModeGuard {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for ModeGuard {
    fn drop(&mut self) {
        if let Some(mode) = &self.0 {
            let now = termios::tcgetattr(io::stdin()).ok();
            if now.is_some_and(|now| now.local_modes != mode.local_modes) {
                let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, mode);
                // The editor turns bracketed paste on while it reads.
                let mut out = io::stdout();
                let _ = out.write_all(b"\x1b[?2004l\r\n").and_then(|()| out.flush());
            }
        }
    }
}

/// Terminals take about this much through OSC 52.
pub const CLIPBOARD_BYTES: usize = 74_994;

/// The sequence that puts `text` into the terminal's clipboard (OSC 52); `None` for more than terminals take.
#[must_use]
pub fn clipboard_sequence(text: &str) -> Option<String> {
    let encoded = base64::engine::general_purpose::STANDARD.encode(text);
    (encoded.len() <= CLIPBOARD_BYTES * 4 / 3).then(|| format!("\x1b]52;c;{encoded}\x07"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clipboard_gets_base64() {
        assert_eq!(clipboard_sequence("hi\n").as_deref(), Some("\x1b]52;c;aGkK\x07"));
        assert!(clipboard_sequence(&"x".repeat(CLIPBOARD_BYTES)).is_some());
        assert!(clipboard_sequence(&"x".repeat(CLIPBOARD_BYTES + 10)).is_none());
    }
}
