//! Conversations to prompts, through the chat template that came with the model.
//!
//! A template is a program from outside. It runs without access to files, with limits on its steps, its recursion, its memory and the
//! size of its output.
mod guard;
mod python;
mod scan;
#[cfg(test)]
mod tests;

use crate::{
    gguf::File,
    tokenizer::{Prompt, Tokenizer},
};
use ggml_kernels::budget;
use guard::Guard;
use minijinja::{Environment, ErrorKind, syntax::SyntaxConfig};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{io, sync::Arc};

/// Steps that one rendering may take: about a tenth of a second. Ten thousand messages need less with every
/// family's template that is tested.
const FUEL: u64 = 4_000_000;
/// How deep macros and loops may nest.
const RECURSION: usize = 100;
/// Bytes of output beyond four times the input.
const OUTPUT: usize = 16 << 20;
/// Bytes of memory beyond four times the output.
const MEMORY: usize = 128 << 20;
/// Stack of the thread in which templates are parsed and run, for the nesting that [`scan`] allows.
const STACK: usize = 128 << 20;

/// A template that is missing or cannot be used. Exit code 2.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file has none.
    #[error(
        "the model has no chat template (tokenizer.chat_template): give one with --chat-template or --chat-template-file, \
         or use raw completion (--no-chat)"
    )]
    Missing,
    /// It cannot be parsed.
    #[error("the chat template is broken{}: {what}", at(*line))]
    Syntax {
        /// The line, from 1.
        line: Option<usize>,
        /// What the parser says.
        what: String,
    },
    /// A part of it is too large.
    #[error("the chat template has {found} {what}, at most {limit} are allowed")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        found: usize,
        /// The most.
        limit: usize,
    },
    /// It failed on this conversation.
    #[error("the chat template failed{}: {what}", at(*line))]
    Render {
        /// The line, from 1.
        line: Option<usize>,
        /// What went wrong.
        what: String,
    },
    /// It refuses this conversation (`raise_exception`).
    #[error("the chat template refuses the conversation: {0}")]
    Refused(String),
    /// It took too many steps.
    #[error("the chat template takes more than {FUEL} steps")]
    Steps,
    /// It wrote too much.
    #[error("the chat template writes more than {limit} bytes")]
    Output {
        /// The most for this conversation.
        limit: usize,
    },
    /// It took too much memory.
    #[error("the chat template takes more than {limit} bytes of memory")]
    Memory {
        /// The most for this conversation.
        limit: usize,
    },
    /// The conversation uses all characters that could mark user text.
    #[error("the conversation holds every noncharacter and private-use character up to U+E0FF: remove some")]
    NoMark,
    /// The thread that runs templates could not be started.
    #[error("cannot start a thread for the chat template: {0}")]
    Thread(io::Error),
}

fn at(line: Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!(" (line {line})"))
}

impl Error {
    /// The process exit code: 1 run-time failure, 2 bad input file.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::Thread(_)) { 1 } else { 2 }
    }
}

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A message of a conversation. Its fields are what the template sees.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub role: String,
    /// The text; null, or parts (`{"type": "text", "text": ...}`), where an interface gives them so.
    #[serde(default)]
    pub content: Value,
    /// Other fields, such as `tool_calls`, `reasoning_content` or `name`.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Message {
    /// A message of a text.
    pub fn new(role: impl Into<String>, text: impl Into<String>) -> Self {
        Self { role: role.into(), content: Value::String(text.into()), more: Map::new() }
    }

    /// The text of the message: parts of the type `text` with line ends between them. `None` when there is none, or another
    /// kind of part.
    #[must_use]
    pub fn text(&self) -> Option<String> {
        match &self.content {
            Value::String(text) => Some(text.clone()),
            Value::Array(parts) => {
                let text = |part: &Value| match part.get("type")?.as_str()? {
                    "text" => part.get("text")?.as_str().map(str::to_owned),
                    _ => None,
                };
                parts.iter().map(text).collect::<Option<Vec<_>>>().map(|texts| texts.join("\n"))
            }
            _ => None,
        }
    }
}

/// What a template may see beside the messages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RenderOptions {
    /// Tools as JSON schemas; none in the template when empty.
    pub tools: Vec<Value>,
    /// Documents as objects, by convention with `title` and `text`; none in the template when empty.
    pub documents: Vec<Value>,
    /// Ends the prompt with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Further variables, such as `enable_thinking`.
    pub variables: Map<String, Value>,
}

/// A parsed chat template.
pub struct ChatTemplate {
    source: String,
    environment: Arc<Environment<'static>>,
    bos: Option<String>,
    eos: Option<String>,
    specials: Vec<String>,
    /// Taken in its place when there are tools.
    tool_use: Option<Box<Self>>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// The template of a file; where it has one for tools (`tokenizer.chat_template.tool_use`), that is used when there are some.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Syntax`], [`Error::TooLarge`]; [`crate::Error::Gguf`] for a key of a wrong type.
    pub fn from_gguf(file: &File, tokenizer: &Tokenizer) -> crate::Result<Self> {
        let source: Option<&str> = file.optional("tokenizer.chat_template")?;
        let mut template = Self::new(source.ok_or(Error::Missing)?, tokenizer)?;
        if let Some(source) = file.optional("tokenizer.chat_template.tool_use")? {
            template.tool_use = Some(Box::new(Self::new(source, tokenizer)?));
        }
        Ok(template)
    }

    /// The template `source`. The tokenizer says which texts are control tokens.
    ///
    /// # Errors
    /// [`Error::Syntax`], [`Error::TooLarge`].
    pub fn new(source: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let text = |id: Option<u32>| {
            let piece = id.and_then(|id| tokenizer.piece(id).ok());
            piece.map(|piece| String::from_utf8_lossy(piece).into_owned())
        };
        let specials = tokenizer.special_texts().map(str::to_owned).collect();
        Self::with_tokens(source, text(tokenizer.special().bos), text(tokenizer.special().eos), specials)
    }

    /// The template `source`, with the texts of BOS, of EOS, and of all control tokens.
    ///
    /// # Errors
    /// [`Error::Syntax`], [`Error::TooLarge`].
    pub fn with_tokens(
        source: &str,
        bos: Option<String>,
        eos: Option<String>,
        specials: Vec<String>,
    ) -> Result<Self> {
        let prepared = scan::prepare(source)?;
        let environment = bounded(MEMORY, move || {
            let mut environment = environment();
            environment.add_template_owned(NAME, prepared).map_err(|e| Error::Syntax {
                line: e.line(),
                what: e.detail().map_or_else(|| e.kind().to_string(), str::to_owned),
            })?;
            Ok(environment)
        })?;
        Ok(Self {
            source: source.to_owned(),
            environment: Arc::new(environment),
            bos,
            eos,
            specials,
            tool_use: None,
        })
    }

    /// The template's text.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template looks at the variable `name` (`tools`, `documents`, `enable_thinking`, ...).
    #[must_use]
    pub fn uses(&self, name: &str) -> bool {
        let all = |template: &Self| {
            let environment = Arc::clone(&template.environment);
            let found = bounded(MEMORY, move || {
                Ok(environment.get_template(NAME).map(|t| t.undeclared_variables(false)).unwrap_or_default())
            });
            found.is_ok_and(|names| names.contains(name))
        };
        all(self) || self.tool_use.as_deref().is_some_and(all)
    }

    /// The prompt for a conversation. Texts from `messages` and `options` are guarded: control tokens that they spell stay text.
    ///
    /// # Errors
    /// [`Error::Render`], [`Error::Refused`], [`Error::Steps`], [`Error::Output`], [`Error::Memory`], [`Error::NoMark`].
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<Prompt> {
        if let Some(tool_use) = self.tool_use.as_ref().filter(|_| !options.tools.is_empty()) {
            return tool_use.render(messages, options);
        }
        let mut input = Map::new();
        input.insert("messages".into(), messages.iter().map(message).collect());
        for (name, list) in [("tools", &options.tools), ("documents", &options.documents)] {
            let value = if list.is_empty() { Value::Null } else { Value::Array(list.clone()) };
            input.insert(name.into(), value);
        }
        input.extend(options.variables.clone());
        let size = Value::Object(input.clone()).to_string().len();
        let mut texts = vec![self.source.as_str()];
        input.values().for_each(|value| collect_texts(value, &mut texts));
        let guard = Guard::new(&self.specials, texts)?;

        // The names of variables are the program's, and the template's own tokens are not the user's.
        let mut context: Map<String, Value> =
            input.iter().map(|(name, value)| (name.clone(), guard.value(value))).collect();
        context.insert("add_generation_prompt".into(), options.add_generation_prompt.into());
        for (name, token) in [("bos_token", &self.bos), ("eos_token", &self.eos)] {
            if let Some(token) = token {
                context.insert(name.into(), token.as_str().into());
            }
        }
        let limit = OUTPUT.saturating_add(size.saturating_mul(4));
        let environment = Arc::clone(&self.environment);
        let memory = MEMORY.saturating_add(limit.saturating_mul(4));
        let text = bounded(memory, move || Self::run(&environment, &context, limit))?;
        Ok(guard.remove(&text))
    }

    fn run(environment: &Environment, context: &Map<String, Value>, limit: usize) -> Result<String> {
        let mut out = Limited { bytes: Vec::new(), limit, exceeded: false };
        let context = minijinja::Value::from(minijinja::value::Serde(context));
        let template = environment.get_template(NAME);
        let done = template.and_then(|t| t.render_captured_to(context, &mut out).map(drop));
        if out.exceeded {
            return Err(Error::Output { limit });
        }
        done.map_err(|e| render_error(&e))?;
        String::from_utf8(out.bytes).map_err(|e| Error::Render { line: None, what: e.to_string() })
    }
}

/// A message as the template sees it: parts that are all text become one text, which every template takes.
fn message(message: &Message) -> Value {
    let mut fields = Map::new();
    fields.insert("role".into(), message.role.clone().into());
    fields.insert("content".into(), message.text().map_or_else(|| message.content.clone(), Value::String));
    fields.extend(message.more.clone());
    Value::Object(fields)
}

fn collect_texts<'a>(value: &'a Value, texts: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => texts.push(text),
        Value::Array(list) => list.iter().for_each(|v| collect_texts(v, texts)),
        Value::Object(map) => map.iter().for_each(|(key, value)| {
            texts.push(key);
            collect_texts(value, texts);
        }),
        _ => {}
    }
}

/// Raised by a template through `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn render_error(e: &minijinja::Error) -> Error {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return Error::Refused(message.clone());
        }
        source = cause.source();
    }
    match e.kind() {
        ErrorKind::OutOfFuel => Error::Steps,
        kind => {
            let what = e.detail().map_or_else(|| kind.to_string(), |detail| format!("{kind}: {detail}"));
            Error::Render { line: e.line(), what }
        }
    }
}

/// The environment in which Hugging Face's `apply_chat_template` runs templates.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    // The delimiters are the default ones, which are valid.
    env.set_syntax(syntax.unwrap_or_default());
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_formatter(python::print);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("debug", || -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::UnknownFunction, "debug is unknown"))
    });
    env.add_filter("tojson", python::tojson);
    env.add_filter("indent", python::indent);
    env.add_filter("string", |value: minijinja::Value| python::text(&value));
    env.add_test("sequence", |value: minijinja::Value| python::is_sequence(&value));
    env.add_test("iterable", |value: minijinja::Value| python::is_iterable(&value));
    env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception");
        Err(error.with_source(Raised(message)))
    });
    env.add_function("strftime_now", |format: String| -> Result<String, minijinja::Error> {
        jiff::fmt::strtime::format(&format, &jiff::Zoned::now())
            .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
    });
    env
}

/// Runs `work` in a thread with a stack of [`STACK`] bytes, of which the system gives out only what is used, and `memory` bytes beside it.
fn bounded<T: Send + 'static>(memory: usize, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    budget::within("template", STACK, memory, work).unwrap_or_else(|e| match e {
        budget::Error::Exceeded(limit) => Err(Error::Memory { limit }),
        budget::Error::Thread(e) => Err(Error::Thread(e)),
        // The template is from outside: a fault of the engine that it brings out is its error.
        budget::Error::Panicked => {
            Err(Error::Render { line: None, what: "the template engine gave up (a panic)".into() })
        }
    })
}

/// Output up to a limit.
struct Limited {
    bytes: Vec<u8>,
    limit: usize,
    exceeded: bool,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.bytes.len() {
            self.exceeded = true;
            return Err(io::Error::other("the output is too large"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Templates are shared by sessions that render at the same time.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Arc<ChatTemplate>>();
};
