//! The line editor, on a thread of its own, so that signals are answered while it waits for keys.
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};

use rustyline::completion::{Completer, FilenameCompleter, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{
    Cmd, CompletionType, ConditionalEventHandler, Config, Context, EditMode, Editor, Event as KeySequence,
    EventContext, EventHandler, Helper, KeyCode, KeyEvent, Modifiers, RepeatCount,
};

use super::command::{COMMANDS, TOPICS, is_open};
use super::style::{Style, paint};
use crate::error::{Error, Result};
use crate::sampler::SamplerParams;

/// What happens while a conversation waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A line, or several, was entered.
    Line(String),
    /// Ctrl-C; whether something had been typed.
    Interrupt,
    /// Ctrl-D.
    Eof,
    /// The terminal failed.
    Failed(String),
    /// SIGTERM or SIGHUP came.
    Terminate,
}

/// The text that a line begins with.
pub const PROMPT: &str = ">>> ";

/// Names that `/set` takes beside the sampler's.
pub const SETTINGS: [&str; 4] = ["max-tokens", "markdown", "reasoning", "context-shift"];

/// A handle to the editor's thread.
pub struct LineEditor(Sender<String>);

impl LineEditor {
    /// Starts the editor; what it reads arrives as [`Event`]s.
    ///
    /// # Errors
    /// [`Error::Runtime`] when the terminal cannot be used.
    pub fn start(history: Option<PathBuf>, colour: bool, events: Sender<Event>) -> Result<Self> {
        let failed = |e: ReadlineError| Error::Runtime(format!("the terminal cannot be used: {e}"));
        let config = Config::builder()
            .max_history_size(10_000)
            .map_err(failed)?
            .completion_type(CompletionType::List)
            .edit_mode(EditMode::Emacs)
            .bracketed_paste(true)
            .build();
        let mut editor = Editor::with_config(config).map_err(failed)?;
        editor.set_helper(Some(ChatHelper { paths: FilenameCompleter::new(), colour }));
        let enter = KeyEvent(KeyCode::Enter, Modifiers::NONE);
        editor.bind_sequence(enter, EventHandler::Conditional(Box::new(Backslash)));
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), Cmd::Newline);
        if let Some(path) = &history {
            // There is none the first time.
            let _ = editor.load_history(path);
        }
        let (requests, wait) = channel();
        std::thread::Builder::new()
            .name("editor".into())
            .spawn(move || serve(&mut editor, history.as_deref(), &wait, &events))
            .map_err(|e| Error::Runtime(format!("cannot start the line editor: {e}")))?;
        Ok(Self(requests))
    }

    /// Asks for a line that begins with `initial`.
    ///
    /// # Errors
    /// When the editor has ended.
    pub fn read(&self, initial: &str) -> Result<()> {
        self.0.send(initial.to_owned()).map_err(|_| Error::Runtime("the line editor has ended".into()))
    }
}

type ChatEditor = Editor<ChatHelper, rustyline::history::FileHistory>;

fn serve(editor: &mut ChatEditor, history: Option<&Path>, wait: &Receiver<String>, events: &Sender<Event>) {
    let colour = editor.helper().is_some_and(|h| h.colour);
    let prompt = (PROMPT, paint(colour, Style::BOLD.colour(36), PROMPT));
    for initial in wait {
        let event = match editor.readline_with_initial(&prompt, (&initial, "")) {
            Ok(line) => {
                let line = without_marks(&line);
                if !line.trim().is_empty() && editor.add_history_entry(&line).unwrap_or(false) {
                    // A history that cannot be written is no reason to stop; /help would still work.
                    let _ = history.map(|path| editor.append_history(path));
                }
                Event::Line(line)
            }
            Err(ReadlineError::Interrupted) => Event::Interrupt,
            Err(ReadlineError::Eof) => Event::Eof,
            Err(e) => Event::Failed(e.to_string()),
        };
        if events.send(event).is_err() {
            return;
        }
    }
}

/// Where the history is kept: `$XDG_STATE_HOME/clsa/history`. The folder is made, readable for its owner only.
#[must_use]
pub fn history_path() -> Option<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let folder = state.or_else(|| Some(std::env::home_dir()?.join(".local/state")))?.join("clsa");
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).ok()?;
    Some(folder.join("history"))
}

/// The end of a line that Enter after a backslash made: a word joiner, which has no width and which nobody types, tells it from a pasted one.
const MARKED_NEWLINE: &str = "\u{2060}\n";

/// What was typed, with the backslashes gone that asked for another line. Pasted ones stay as they are.
fn without_marks(line: &str) -> String {
    line.replace(&format!("\\{MARKED_NEWLINE}"), "\n")
}

/// Enter after a backslash at the end of the text begins another line.
struct Backslash;

impl ConditionalEventHandler for Backslash {
    fn handle(&self, _: &KeySequence, _: RepeatCount, _: bool, context: &EventContext<'_>) -> Option<Cmd> {
        let more = context.pos() == context.line().len() && continues(context.line());
        more.then(|| Cmd::Insert(1, MARKED_NEWLINE.into()))
    }
}

/// Whether the text ends with a backslash that asks for another line; two of them are one that is meant.
fn continues(line: &str) -> bool {
    line.bytes().rev().take_while(|&b| b == b'\\').count() % 2 == 1
}

struct ChatHelper {
    paths: FilenameCompleter,
    colour: bool,
}

impl Helper for ChatHelper {}

impl Validator for ChatHelper {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(if is_open(context.input()) {
            ValidationResult::Incomplete
        } else {
            ValidationResult::Valid(None)
        })
    }
}

impl Highlighter for ChatHelper {
    fn highlight_hint<'h>(&self, hint: &'h str) -> Cow<'h, str> {
        paint(self.colour, Style::DIM, hint).into()
    }
}

impl Hinter for ChatHelper {
    type Hint = Suggestion;

    fn hint(&self, line: &str, pos: usize, _: &Context<'_>) -> Option<Suggestion> {
        if line.is_empty() {
            return Some(Suggestion {
                shown: "Send a message (/help lists the commands)".into(),
                inserts: false,
            });
        }
        let (0, mut names) = complete_word(line, pos)? else { return None };
        let name = names.pop().filter(|_| names.is_empty())?;
        Some(Suggestion { shown: name[pos..].to_owned(), inserts: true })
    }
}

/// Faint text after the cursor.
struct Suggestion {
    shown: String,
    inserts: bool,
}

impl rustyline::hint::Hint for Suggestion {
    fn display(&self) -> &str {
        &self.shown
    }
    fn completion(&self) -> Option<&str> {
        self.inserts.then_some(&self.shown)
    }
}

impl Completer for ChatHelper {
    type Candidate = Pair;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<Pair>)> {
        let command = line.split_whitespace().next().unwrap_or_default();
        let argument = pos > command.len();
        if argument && COMMANDS.iter().any(|e| e.takes_path && e.name == command) {
            return self.paths.complete_path(line, pos);
        }
        let (start, names) = complete_word(line, pos).unwrap_or_default();
        let pairs = names.into_iter().map(|n| Pair { display: n.clone(), replacement: n + " " });
        Ok((start, pairs.collect()))
    }
}

/// Commands, parameters of `/set` and topics of `/show` that the word before the cursor may become, and where it begins.
fn complete_word(line: &str, pos: usize) -> Option<(usize, Vec<String>)> {
    let before = line.get(..pos).filter(|b| b.starts_with('/') && !b.contains('\n'))?;
    let start = before.rfind(' ').map_or(0, |at| at + 1);
    let word = &before[start..];
    let names: Vec<&str> = match before[..start].trim() {
        "" => COMMANDS.iter().map(|e| e.name).collect(),
        "/set" => SETTINGS.into_iter().chain(SamplerParams::names().iter().map(|(n, _)| *n)).collect(),
        "/show" => TOPICS.iter().map(|(n, _)| *n).collect(),
        _ => return None,
    };
    let fits = names.into_iter().filter(|n| n.starts_with(word)).map(str::to_owned);
    Some((start, fits.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_parameters_and_topics_are_completed() {
        let names = |line: &str| complete_word(line, line.len()).map(|(at, n)| (at, n.join(" ")));
        assert_eq!(names("/re"), Some((0, "/regen /read".into())));
        assert_eq!(names("/set top"), Some((5, "top-k top-p top-n-sigma".into())));
        assert_eq!(names("/set m").unwrap().1.split(' ').next(), Some("max-tokens"));
        assert_eq!(names("/show t"), Some((6, "template".into())));
        assert_eq!(names("/nothing"), Some((0, String::new())));
        assert_eq!(names("hello /re"), None);
        assert_eq!(names("/undo x"), None);
    }

    #[test]
    fn an_odd_number_of_backslashes_goes_on() {
        assert!(continues("a\\") && continues("a\\\\\\"));
        assert_eq!(without_marks("a\\\u{2060}\nb\\\nc"), "a\nb\\\nc");
        assert!(!continues("a") && !continues("a\\\\") && !continues(""));
    }
}
