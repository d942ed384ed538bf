//! What a line at the prompt means: a message, or a command.
use std::path::PathBuf;

/// A line, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Nothing.
    Empty,
    /// Text for the model.
    Message(String),
    /// A command.
    Command(Command),
}

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// List the commands.
    Help,
    /// Leave.
    Exit,
    /// Start over.
    Clear,
    /// Answer the last message again.
    Regen,
    /// Take back the last message and its answer.
    Undo,
    /// Edit the last message in an editor and send it again.
    Edit,
    /// Save the session.
    Save(PathBuf),
    /// Load a session.
    Load(PathBuf),
    /// Add a document to the next message.
    Read(PathBuf),
    /// Set the system prompt; without a text show it; `none` removes it.
    System(Option<String>),
    /// Set a parameter.
    Set(String, String),
    /// Show something.
    Show(Topic),
    /// Counts and rates of this session.
    Stats,
    /// What the router selected for the last answer.
    Route,
    /// Copy the last answer.
    Copy,
    /// Show the reasoning of the last answer.
    Think,
}

/// What `/show` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// Sampling parameters.
    Params,
    /// The chat template.
    Template,
    /// The model.
    Model,
    /// Memory.
    Memory,
}

/// Topics by name.
pub const TOPICS: [(&str, Topic); 4] = [
    ("params", Topic::Params),
    ("template", Topic::Template),
    ("model", Topic::Model),
    ("memory", Topic::Memory),
];

/// A line of `/help`; completion and suggestions use it too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The command.
    pub name: &'static str,
    /// Other names for it.
    pub aliases: &'static [&'static str],
    /// What follows it.
    pub args: &'static str,
    /// What it does.
    pub help: &'static str,
    /// Whether a file path follows.
    pub takes_path: bool,
}

const fn entry(name: &'static str, args: &'static str, help: &'static str) -> Entry {
    Entry { name, aliases: &[], args, help, takes_path: false }
}

/// Every command.
pub const COMMANDS: [Entry; 17] = [
    Entry { aliases: &["/?"], ..entry("/help", "", "list the commands") },
    Entry { aliases: &["/bye", "/quit"], ..entry("/exit", "", "leave (Ctrl-D too)") },
    entry("/clear", "", "start over; the system prompt stays"),
    Entry { aliases: &["/retry"], ..entry("/regen", "", "answer the last message again") },
    entry("/undo", "", "take back the last message and its answer"),
    entry("/edit", "", "edit the last message in $EDITOR and send it again"),
    Entry { takes_path: true, ..entry("/save", "FILE", "save caches and history") },
    Entry { takes_path: true, ..entry("/load", "FILE", "go on from a saved session") },
    Entry { takes_path: true, ..entry("/read", "FILE", "add a document to the next message") },
    entry("/system", "[TEXT|none]", "set, remove or show the system prompt"),
    entry("/set", "PARAM VALUE", "set a parameter (/show params lists them)"),
    entry("/show", "[params|template|model|memory]", "show settings"),
    entry("/stats", "", "counts and rates of this session"),
    entry("/route", "", "which passages the router selected for the last answer"),
    entry("/copy", "", "copy the last answer to the clipboard"),
    entry("/think", "", "show the reasoning of the last answer"),
    entry("\"\"\"", "", "begins and ends a message of several lines; so does a \\ at the end of a line"),
];

/// What is wrong with a command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// There is no such command.
    #[error("unknown command {found}{}; /help lists them, a leading space sends the line as a message", hint(*nearest))]
    Unknown {
        /// What was typed.
        found: String,
        /// The command that looks most like it.
        nearest: Option<&'static str>,
    },
    /// Something must follow.
    #[error("{name} needs {args}")]
    Missing {
        /// The command.
        name: &'static str,
        /// What it takes.
        args: &'static str,
    },
    /// Nothing may follow, or not this.
    #[error("{name} takes {}, not {found:?}", if args.is_empty() { "nothing" } else { args })]
    Unexpected {
        /// The command.
        name: &'static str,
        /// What it takes.
        args: &'static str,
        /// What followed.
        found: String,
    },
}

fn hint(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |n| format!(": did you mean {n}?"))
}

/// Understands what was typed or pasted.
///
/// # Errors
/// [`CommandError`] for a command that is unknown or has wrong arguments.
pub fn parse(line: &str) -> Result<Input, CommandError> {
    let text = line.trim();
    if text.is_empty() {
        return Ok(Input::Empty);
    }
    if let Some(inner) = unquote(text) {
        return Ok(if inner.trim().is_empty() { Input::Empty } else { Input::Message(inner.to_owned()) });
    }
    // A leading space sends a message that looks like a command; `/usr/bin/env ...` never is one.
    let word = text.split_whitespace().next().unwrap_or_default();
    if !line.starts_with('/') || word[1..].contains('/') {
        return Ok(Input::Message(text.to_owned()));
    }
    command(word, text[word.len()..].trim()).map(Input::Command)
}

/// Whether more lines belong to what was typed: a `"""` is open.
#[must_use]
pub fn is_open(text: &str) -> bool {
    let text = text.trim();
    text.starts_with(QUOTES) && unquote(text).is_none()
}

const QUOTES: &str = "\"\"\"";

fn unquote(text: &str) -> Option<&str> {
    let inner = text.strip_prefix(QUOTES)?.strip_suffix(QUOTES)?;
    Some(inner.strip_prefix('\n').unwrap_or(inner).trim_end_matches('\n'))
}

fn command(word: &str, rest: &str) -> Result<Command, CommandError> {
    let entry = COMMANDS.iter().find(|e| e.name == word || e.aliases.contains(&word)).ok_or_else(|| {
        CommandError::Unknown {
            found: word.to_owned(),
            nearest: nearest(word, COMMANDS.iter().map(|e| e.name)),
        }
    })?;
    let Entry { name, args, .. } = *entry;
    let missing = || CommandError::Missing { name, args };
    let unexpected = || CommandError::Unexpected { name, args, found: rest.to_owned() };
    if args.is_empty() && !rest.is_empty() {
        return Err(unexpected());
    }
    let path = || if rest.is_empty() { Err(missing()) } else { Ok(path_argument(rest)) };
    Ok(match name {
        "/help" => Command::Help,
        "/exit" => Command::Exit,
        "/clear" => Command::Clear,
        "/regen" => Command::Regen,
        "/undo" => Command::Undo,
        "/edit" => Command::Edit,
        "/save" => Command::Save(path()?),
        "/load" => Command::Load(path()?),
        "/read" => Command::Read(path()?),
        "/system" => Command::System((!rest.is_empty()).then(|| unquote(rest).unwrap_or(rest).to_owned())),
        "/set" => {
            let (param, value) = rest.split_once([' ', '=']).ok_or_else(missing)?;
            Command::Set(param.trim().to_owned(), value.trim().to_owned())
        }
        "/show" => match TOPICS.iter().find(|(t, _)| *t == rest) {
            Some((_, topic)) => Command::Show(*topic),
            None if rest.is_empty() => return Err(missing()),
            None => return Err(unexpected()),
        },
        "/stats" => Command::Stats,
        "/route" => Command::Route,
        "/copy" => Command::Copy,
        "/think" => Command::Think,
        _ => return Err(CommandError::Unknown { found: word.to_owned(), nearest: None }),
    })
}

/// The name that looks most like `word`, if one is near.
pub fn nearest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let bare = |s: &str| s.trim_start_matches('/').to_lowercase();
    names
        .map(|name| {
            let (a, b) = (bare(word), bare(name));
            let prefix = !a.is_empty() && b.starts_with(&a);
            (if prefix { 1.0 } else { strsim::normalized_damerau_levenshtein(&a, &b) }, name)
        })
        .filter(|(similarity, _)| *similarity >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

/// A path as people type it: in quotes, with `\ ` for a space, with `~` for the home folder.
fn path_argument(text: &str) -> PathBuf {
    let quoted = ['"', '\''].iter().find_map(|q| text.strip_prefix(*q)?.strip_suffix(*q));
    let text = quoted.map_or_else(|| unescape(text), str::to_owned);
    match (text.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) if quoted.is_none() => home.join(rest),
        _ => text.into(),
    }
}

fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or('\\') } else { c });
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn command(line: &str) -> Command {
        match parse(line) {
            Ok(Input::Command(c)) => c,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn commands_are_understood() {
        assert_eq!(command("/bye"), Command::Exit);
        assert_eq!(command("/save my\\ file"), Command::Save("my file".into()));
        assert_eq!(command("/load \"my file\""), Command::Load("my file".into()));
        assert_eq!(command("/set temp 0.5"), Command::Set("temp".into(), "0.5".into()));
        assert_eq!(command("/set temp=0.5"), Command::Set("temp".into(), "0.5".into()));
        assert_eq!(command("/show memory"), Command::Show(Topic::Memory));
        assert_eq!(command("/system"), Command::System(None));
        assert_eq!(command("/system Be brief."), Command::System(Some("Be brief.".into())));
        assert_eq!(command("/system \"\"\"a\nb\"\"\""), Command::System(Some("a\nb".into())));
    }

    #[test]
    fn every_listed_command_exists() {
        for e in COMMANDS.iter().filter(|e| e.name.starts_with('/')) {
            for name in e.aliases.iter().chain([&e.name]) {
                let line = if e.args.is_empty() { (*name).to_owned() } else { format!("{name} params x") };
                let unknown =
                    matches!(parse(&line), Err(CommandError::Unknown { .. }) | Ok(Input::Message(_)));
                assert!(!unknown, "{line}");
            }
        }
    }

    #[test]
    fn mistakes_are_explained() {
        let error = |line: &str| parse(line).unwrap_err().to_string();
        assert!(error("/regne").contains("did you mean /regen?"), "{}", error("/regne"));
        assert!(error("/sa x").contains("did you mean /save?"));
        assert!(!error("/xyzzy").contains("did you mean"));
        assert_eq!(error("/save"), "/save needs FILE");
        assert_eq!(error("/set temp"), "/set needs PARAM VALUE");
        assert_eq!(error("/undo 3"), "/undo takes nothing, not \"3\"");
        assert!(error("/show all").contains("params|template|model|memory"));
    }

    #[test]
    fn messages_are_not_commands() {
        for (line, want) in [
            ("hello", "hello"),
            (" /help me", "/help me"),
            ("/usr/bin/env is what?", "/usr/bin/env is what?"),
            ("\"\"\"\na\n\n/b\n\"\"\"", "a\n\n/b"),
            ("\"\"\"a\"\"\"", "a"),
            ("two\nlines", "two\nlines"),
        ] {
            assert_eq!(parse(line), Ok(Input::Message(want.into())), "{line}");
        }
        for empty in ["", "  ", "\"\"\"\n\n\"\"\""] {
            assert_eq!(parse(empty), Ok(Input::Empty));
        }
    }

    #[test]
    fn quotes_stay_open_until_they_are_closed() {
        assert!(is_open("\"\"\"a\nb"));
        assert!(is_open("\"\"\""));
        assert!(is_open("\"\"\"\"\""));
        assert!(!is_open("\"\"\"a\"\"\""));
        assert!(!is_open("a \"\"\" b"));
    }

    proptest! {
        #[test]
        fn nothing_typed_can_break_the_parser(line in "(/|\"\"\"|\\PC|[ \n\\\\=~]|set|show|read){0,12}") {
            let _ = (parse(&line), is_open(&line));
        }
    }
}
