//! The conversation in a terminal: reads lines, carries out commands, shows answers, keeps the session file.
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use super::command::{Command, Input, nearest, parse};
use super::conversation::{Conversation, Document};
use super::editor::{Event, LineEditor, SETTINGS};
use super::reasoning;
use super::render::Reasoning;
use super::route::Looked;
use super::screen::{Screen, Stage};
use super::status::{Totals, answer_line, count, plural};
use super::talk::Talk;
use super::watch::FileWatch;
use super::{show, terminal};
use crate::cli::human_bytes;
use crate::error::{Error, Result};
use crate::generate::FinishReason;

/// A chat.
pub struct App {
    talk: Talk,
    screen: Screen,
    watch: FileWatch,
    /// Set by signals; stops the engine.
    stop: Arc<AtomicBool>,
    events: Receiver<Event>,
    session_file: Option<PathBuf>,
    totals: Totals,
    last: Option<Last>,
    /// What `/clear` or `/load` replaced, for `/undo`.
    replaced: Option<Conversation>,
    saving: Saving,
}

/// What is known about the last answer.
struct Last {
    looked: Looked,
    tokens: Vec<u32>,
    thought: String,
}

/// How the session file is kept up to date.
#[derive(Default)]
struct Saving {
    needed: bool,
    /// The last automatic save took too long to be done after each answer.
    slow: bool,
    failed: Option<Error>,
}

/// What follows a line.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Another line, which begins with this text.
    Read(String),
    Leave,
}

impl Next {
    fn read() -> Self {
        Self::Read(String::new())
    }
}

/// Saves that take longer are left for the end.
const SLOW_SAVE: Duration = Duration::from_secs(2);

impl App {
    /// A chat over a conversation.
    #[must_use]
    pub fn new(
        talk: Talk,
        screen: Screen,
        watch: FileWatch,
        stop: Arc<AtomicBool>,
        events: Receiver<Event>,
        session_file: Option<PathBuf>,
    ) -> Self {
        let (totals, last, replaced, saving) = Default::default();
        Self { talk, screen, watch, stop, events, session_file, totals, last, replaced, saving }
    }

    /// Adds a document to the next message, with its token count.
    ///
    /// # Errors
    /// When it cannot be read, or does not fit.
    pub fn add_document(&mut self, path: &Path) -> Result<()> {
        let document = read_document(path)?;
        let tokens = self.talk.count_tokens(&document.text)?;
        let context = self.talk.session().engine().context();
        let name = document.name.clone();
        self.talk.conversation.pending.push(document);
        let needed = self.talk.count_prompt("")?;
        if needed > context {
            self.talk.conversation.pending.pop();
            return Err(Error::ContextFull { needed, context });
        }
        let (tokens, needed, context) = (count(tokens), count(needed), count(context));
        self.screen.note(&format!(
            "{name}: {tokens} tokens, added to the next message ({needed}/{context} of the context)"
        ));
        Ok(())
    }

    /// One message, one answer.
    ///
    /// # Errors
    /// Whatever ends the answer other than its end; [`Error::Interrupted`] after a signal.
    pub fn single(&mut self, message: &str, status: bool) -> Result<()> {
        let reason = self.turn(|c| c.say(message), status);
        let saved = self.save_session();
        let reason = reason?;
        saved?;
        match reason {
            FinishReason::Interrupted => Err(Error::Interrupted),
            FinishReason::ContextFull => {
                let context = self.talk.session().engine().context();
                let more = "raise -c, or let the oldest turns go with --context-shift";
                self.screen.note(&format!(
                    "the answer ends because the context of {context} tokens is full: {more}"
                ));
                Ok(())
            }
            FinishReason::Stop | FinishReason::Length => Ok(()),
        }
    }

    /// Talks until the person leaves; `first` is said at once.
    ///
    /// # Errors
    /// When the terminal fails, or the session cannot be saved at the end; [`Error::Interrupted`] after SIGTERM or SIGHUP.
    pub fn converse(&mut self, editor: &LineEditor, first: Option<&str>) -> Result<()> {
        let mut armed = false;
        let mut next = match first {
            Some(message) => self.say(message)?,
            None => Next::read(),
        };
        let ended = loop {
            let Next::Read(initial) = next else { break Ok(()) };
            editor.read(&initial)?;
            // While the person types.
            self.autosave();
            let event = self.events.recv().unwrap_or(Event::Eof);
            if let Some(e) = self.saving.failed.take() {
                self.screen.error(&format!("the session could not be saved: {e}"));
            }
            let was_armed = std::mem::take(&mut armed);
            next = match event {
                Event::Line(line) => match self.line(&line) {
                    Ok(next) => next,
                    Err(e) if is_fatal(&e) => break Err(e),
                    Err(e) => {
                        self.explain(&e);
                        Next::read()
                    }
                },
                Event::Interrupt if was_armed => Next::Leave,
                Event::Interrupt => {
                    armed = true;
                    self.screen.note("(Ctrl-C again, Ctrl-D or /exit leaves)");
                    Next::read()
                }
                Event::Eof => Next::Leave,
                Event::Failed(what) => break Err(Error::Runtime(format!("the terminal failed: {what}"))),
                Event::Terminate => break Err(Error::Interrupted),
            };
            if self.terminated() {
                break Err(Error::Interrupted);
            }
        };
        let saved = self.save_session();
        ended.and(saved)
    }

    fn terminated(&self) -> bool {
        self.events.try_iter().any(|e| e == Event::Terminate)
    }

    fn line(&mut self, line: &str) -> Result<Next> {
        match parse(line) {
            Ok(Input::Empty) => Ok(Next::read()),
            Ok(Input::Message(text)) => self.say(&text),
            Ok(Input::Command(command)) => self.command(command),
            Err(e) => {
                self.screen.error(&e.to_string());
                Ok(Next::read())
            }
        }
    }

    /// Says something. A message that got no answer comes back to the prompt.
    fn say(&mut self, text: &str) -> Result<Next> {
        self.replaced = None;
        let before = self.talk.conversation.turns();
        match self.turn(|c| c.say(text), true) {
            Ok(_) if self.talk.conversation.turns() > before || self.talk.context_shift => Ok(Next::read()),
            Ok(_) => Ok(Next::Read(text.to_owned())),
            Err(e) if is_fatal(&e) => Err(e),
            Err(e) => {
                self.explain(&e);
                Ok(Next::Read(text.to_owned()))
            }
        }
    }

    /// Changes the conversation, and shows the answer to its last message. Without an answer nothing has changed.
    fn turn(&mut self, change: impl FnOnce(&mut Conversation), status: bool) -> Result<FinishReason> {
        if let Some(note) = self.watch.check()? {
            self.screen.note(&format!("note: {note}"));
        }
        let before = self.talk.conversation.clone();
        change(&mut self.talk.conversation);
        self.stop.store(false, Ordering::Relaxed);
        let mut stage = Stage::new(&mut self.screen);
        let result = self.talk.answer(&mut stage);
        stage.finish();
        let (failed, prompt) = (stage.failed.take(), std::mem::take(&mut stage.prompt));
        drop(stage);
        self.stop.store(false, Ordering::Relaxed);
        let turn = match result {
            Ok(turn) => turn,
            Err(e) => {
                self.talk.conversation = before;
                return Err(e);
            }
        };
        if let Some(source) = failed {
            return Err(Error::Io { path: "standard output".into(), source });
        }
        let (answer, reason) = (&turn.answer, turn.answer.finish_reason);
        self.totals.add(&answer.timings);
        self.saving.needed = true;
        let (used, context) = (self.talk.session().tokens().len(), self.talk.session().engine().context());
        if answer.text.is_empty() {
            self.talk.conversation = before;
            let why = if reason == FinishReason::Interrupted {
                "stopped before the answer began"
            } else {
                "the model said nothing"
            };
            self.screen.note(&format!("({why}; the conversation is as it was)"));
            return Ok(reason);
        }
        let (_, thought) = reasoning::split(&answer.text, &prompt);
        if status {
            let routing = show::routing(&self.talk);
            self.screen.note(&answer_line(&answer.timings, reason, used, context, &routing));
            if reason == FinishReason::ContextFull {
                self.screen.note("the context is full: /undo, start with --context-shift or a larger -c, or /set context-shift on");
            }
        }
        let tokens = self.talk.session().tokens().to_vec();
        self.last = Some(Last { looked: turn.looked, tokens, thought });
        Ok(reason)
    }

    fn explain(&mut self, e: &Error) {
        self.screen.error(&e.to_string());
        if matches!(e, Error::ContextFull { .. }) {
            self.screen.note(
                "choices: /undo takes the last turn back, /set context-shift on drops the oldest turns whole, \
                 a larger -c holds more; nothing was cut",
            );
        }
    }

    fn command(&mut self, command: Command) -> Result<Next> {
        match command {
            Command::Exit => return Ok(Next::Leave),
            Command::Help => self.result(&show::help())?,
            Command::Clear => {
                self.replaced = Some(self.talk.conversation.clone());
                self.talk.clear()?;
                self.last = None;
                self.saving.needed = true;
                self.screen.note("cleared; /undo brings the conversation back");
            }
            Command::Regen if self.talk.conversation.messages.is_empty() => {
                self.screen.error("there is no message to answer yet");
            }
            Command::Regen => {
                self.turn(
                    |c| {
                        c.retract_answer();
                    },
                    true,
                )?;
            }
            Command::Undo => self.undo(),
            Command::Edit => return self.edit(),
            Command::Save(path) => {
                let started = Instant::now();
                let size = self.talk.save(&path)?;
                let seconds = started.elapsed().as_secs_f64();
                self.screen.note(&format!("saved {}: {}, {seconds:.2} s", path.display(), human_bytes(size)));
            }
            Command::Load(path) => self.load(&path)?,
            Command::Read(path) => self.add_document(&path)?,
            Command::System(text) => self.system(text)?,
            Command::Set(name, value) => self.set(&name, &value)?,
            Command::Show(topic) => self.result(&show::show(&self.talk, &self.settings(), topic))?,
            Command::Stats => self.result(&show::stats(&self.talk, &self.totals))?,
            Command::Route => self.route()?,
            Command::Copy => self.copy()?,
            Command::Think => match self.last.as_ref().map(|l| l.thought.clone()) {
                Some(thought) if !thought.is_empty() => self.screen.note(&thought),
                _ => self.screen.note("the last answer has no reasoning"),
            },
        }
        Ok(Next::read())
    }

    fn result(&mut self, text: &str) -> Result<()> {
        self.screen.result(text).map_err(|source| Error::Io { path: "standard output".into(), source })
    }

    fn undo(&mut self) {
        if let Some(before) = self.replaced.take() {
            self.talk.conversation = before;
            let turns = plural(self.talk.conversation.turns(), "turn");
            return self.screen.note(&format!("the conversation of {turns} is back"));
        }
        match self.talk.conversation.undo() {
            Some(text) => {
                self.saving.needed = true;
                self.last = None;
                let text = show::clip(text.lines().next().unwrap_or_default(), 60);
                self.screen.note(&format!("took back: {text}"));
            }
            None => self.screen.error("there is nothing to take back"),
        }
    }

    fn edit(&mut self) -> Result<Next> {
        let old = self.talk.conversation.last_said().map(|m| m.text.clone());
        let Some(text) = edit_text(old.as_deref().unwrap_or_default())? else {
            self.screen.note("not changed, nothing is sent");
            return Ok(Next::read());
        };
        if old.is_none() {
            return self.say(&text);
        }
        let change = |c: &mut Conversation| {
            c.undo();
            c.say(&text);
        };
        match self.turn(change, true) {
            Err(e) if !is_fatal(&e) => {
                self.explain(&e);
                Ok(Next::Read(text))
            }
            other => other.map(|_| Next::read()),
        }
    }

    /// Goes on from a session file.
    ///
    /// # Errors
    /// When it does not fit; nothing has changed then.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let (started, before) = (Instant::now(), self.talk.conversation.clone());
        self.talk.load(path)?;
        if !before.messages.is_empty() {
            self.replaced = Some(before);
        }
        self.last = None;
        let (c, seconds) = (&self.talk.conversation, started.elapsed().as_secs_f64());
        let (turns, tokens) =
            (plural(c.turns(), "turn"), plural(self.talk.session().tokens().len(), "token"));
        let waiting: Vec<_> = c.pending.iter().map(|d| d.name.as_str()).collect();
        let mut note = format!("loaded {}: {turns}, {tokens}, {seconds:.2} s", path.display());
        if !waiting.is_empty() {
            note += &format!("; waiting for your question: {}", waiting.join(", "));
        }
        if let Some(said) = c.last_said() {
            note += &format!("\nlast: {}", show::clip(said.text.lines().next().unwrap_or_default(), 70));
        }
        self.screen.note(&note);
        Ok(())
    }

    fn system(&mut self, text: Option<String>) -> Result<()> {
        match text.as_deref() {
            None => {
                let now = self.talk.conversation.system.clone();
                self.result(now.as_deref().unwrap_or("no system prompt"))?;
            }
            Some("none") => self.talk.conversation.system = None,
            Some(text) => self.talk.conversation.system = Some(text.to_owned()),
        }
        if text.is_some() {
            self.saving.needed = true;
            self.screen.note("the system prompt is set; the next message is answered with it");
        }
        Ok(())
    }

    fn settings(&self) -> Vec<(&'static str, String)> {
        let on = |on: bool| if on { "on" } else { "off" }.to_owned();
        let look = self.screen.look;
        let reasoning = if look.reasoning == Reasoning::Show { "show" } else { "fold" };
        let most = self.talk.limits.max_tokens.map_or_else(|| "unlimited".into(), count);
        let values = [most, on(look.markdown), reasoning.into(), on(self.talk.context_shift)];
        SETTINGS.into_iter().zip(values).collect()
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let bad = |expected: &str| Error::Input(format!("{name}: expected {expected}, found {value:?}"));
        let on = || match value {
            "on" | "true" | "1" => Ok(true),
            "off" | "false" | "0" => Ok(false),
            _ => Err(bad("on or off")),
        };
        match name.to_lowercase().replace('_', "-").as_str() {
            "max-tokens" => {
                let unlimited = matches!(value, "unlimited" | "-1");
                let most = if unlimited {
                    None
                } else {
                    Some(value.parse().map_err(|_| bad("a number or unlimited"))?)
                };
                self.talk.limits.max_tokens = most;
            }
            "markdown" => self.screen.look.markdown = on()?,
            "context-shift" => self.talk.context_shift = on()?,
            "reasoning" => {
                self.screen.look.reasoning = match value {
                    "show" => Reasoning::Show,
                    "fold" => Reasoning::Fold,
                    _ => return Err(bad("show or fold")),
                };
            }
            other => {
                let known = crate::sampler::SamplerParams::names().iter().map(|(n, _)| *n).chain(SETTINGS);
                if self.talk.params().get(other).is_none() {
                    let near =
                        nearest(other, known).map_or_else(String::new, |n| format!(": did you mean {n}?"));
                    return Err(Error::Input(format!(
                        "there is no parameter {name}{near} (/show params lists them)"
                    )));
                }
                self.talk.set_param(name, value)?;
            }
        }
        let now = self.talk.params().get(name).unwrap_or_else(|| value.to_owned());
        self.screen.note(&format!("{name} = {now}"));
        Ok(())
    }

    fn route(&mut self) -> Result<()> {
        let text = match &self.last {
            None => "nothing was answered yet".to_owned(),
            Some(last) => {
                let mode = self.talk.session().engine().routing();
                show::route(&last.looked, &last.tokens, self.talk.tokenizer(), mode, terminal::width())
            }
        };
        self.result(&text)
    }

    fn copy(&mut self) -> Result<()> {
        let Some(answer) = self.talk.conversation.last_answer() else {
            self.screen.error("there is no answer to copy yet");
            return Ok(());
        };
        let (answer, _) = reasoning::split(answer, "");
        match terminal::clipboard_sequence(&answer) {
            Some(sequence) => {
                self.screen
                    .sequence(&sequence)
                    .map_err(|source| Error::Io { path: "standard output".into(), source })?;
                let n = count(answer.chars().count());
                self.screen.note(&format!("copied {n} characters (OSC 52; some terminals must allow it)"));
            }
            None => {
                let most = human_bytes(terminal::CLIPBOARD_BYTES as u64);
                self.screen.error(&format!("the answer is longer than the {most} that terminals take"));
            }
        }
        Ok(())
    }

    fn autosave(&mut self) {
        let Some(path) = self.session_file.clone().filter(|_| self.saving.needed && !self.saving.slow) else {
            return;
        };
        let started = Instant::now();
        match self.talk.save(&path) {
            Ok(_) => self.saving.needed = false,
            Err(e) => self.saving.failed = Some(e),
        }
        self.saving.slow = started.elapsed() > SLOW_SAVE;
    }

    fn save_session(&mut self) -> Result<()> {
        let Some(path) = self.session_file.clone().filter(|_| self.saving.needed) else { return Ok(()) };
        let size = self.talk.save(&path)?;
        self.saving.needed = false;
        self.screen.note(&format!("saved {}: {}", path.display(), human_bytes(size)));
        Ok(())
    }

    /// Says something beside the conversation.
    pub fn note(&mut self, text: &str) {
        self.screen.note(text);
    }

    /// The conversation.
    pub fn talk_mut(&mut self) -> &mut Talk {
        &mut self.talk
    }
}

/// Whether a chat cannot go on after an error: nobody reads, or the device is gone.
fn is_fatal(e: &Error) -> bool {
    matches!(e, Error::Io { source, .. } if source.kind() == io::ErrorKind::BrokenPipe)
        || matches!(e, Error::Interrupted)
}

/// Reads a document of UTF-8 text.
///
/// # Errors
/// When it cannot be read or is not text.
pub fn read_document(path: &Path) -> Result<Document> {
    let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
        io::ErrorKind::InvalidData => Error::Input(format!("{}: not UTF-8 text", path.display())),
        io::ErrorKind::NotFound => Error::Input(format!("{}: no such file", path.display())),
        _ => Error::Io { path: path.to_owned(), source },
    })?;
    if text.trim().is_empty() {
        return Err(Error::Input(format!("{}: the document is empty", path.display())));
    }
    let name = path.file_name().map_or_else(|| path.to_string_lossy(), |n| n.to_string_lossy()).into_owned();
    Ok(Document { name, text })
}

/// Lets the person edit a text; `None` when it comes back unchanged or empty.
fn edit_text(old: &str) -> Result<Option<String>> {
    let editor =
        ["VISUAL", "EDITOR"].iter().find_map(|v| std::env::var(v).ok().filter(|e| !e.trim().is_empty()));
    let editor = editor.unwrap_or_else(|| "vi".into());
    let io = |source| Error::Io { path: "the message to edit".into(), source };
    let file = tempfile::Builder::new().prefix("clsa-message-").suffix(".md").tempfile().map_err(io)?;
    std::fs::write(file.path(), old).map_err(io)?;
    // Through the shell, because $EDITOR may hold arguments.
    let status = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("{editor} \"$1\""))
        .arg("sh")
        .arg(file.path())
        .status()
        .map_err(|e| Error::Runtime(format!("cannot run the editor {editor:?}: {e}: set $EDITOR")))?;
    if !status.success() {
        return Err(Error::Runtime(format!("the editor {editor:?} failed ({status}): set $EDITOR")));
    }
    let new = std::fs::read_to_string(file.path()).map_err(io)?;
    let new = new.trim();
    Ok((!new.is_empty() && new != old.trim()).then(|| new.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_must_be_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        assert!(read_document(&path).unwrap_err().to_string().contains("no such file"));
        std::fs::write(&path, b"\xff\xfe").unwrap();
        assert!(read_document(&path).unwrap_err().to_string().contains("not UTF-8"));
        std::fs::write(&path, b" \n").unwrap();
        assert!(read_document(&path).unwrap_err().to_string().contains("empty"));
        std::fs::write(&path, b"text").unwrap();
        assert_eq!(read_document(&path).unwrap(), Document { name: "a.txt".into(), text: "text".into() });
    }
}
