//! `clsa chat`: a conversation in a terminal; a single turn where there is none.
use std::io::{self, IsTerminal, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;

use clap::Args;

use super::grammar::GrammarArgs;
use super::model::ModelArgs;
use super::read_text;
use super::sampling::SamplingArgs;
use crate::chat::app::App;
use crate::chat::editor::{LineEditor, history_path};
use crate::chat::format::Format;
use crate::chat::render::{Look, Reasoning};
use crate::chat::screen::Screen;
use crate::chat::talk::Talk;
use crate::chat::watch::FileWatch;
use crate::chat::{show, signals, terminal};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::sampler::SamplerParams;
use crate::session::Session;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// How messages become prompts.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Conversation")]
pub struct FormatArgs {
    /// System prompt (-sys)
    #[arg(long, value_name = "TEXT", conflicts_with = "system_file")]
    pub system: Option<String>,
    /// A file with the system prompt (-sysf)
    #[arg(long, value_name = "FILE")]
    pub system_file: Option<PathBuf>,
    /// Chat template (Jinja) to use instead of the model's own
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "chat_template_file")]
    pub chat_template: Option<String>,
    /// A file with the chat template
    #[arg(long, value_name = "FILE")]
    pub chat_template_file: Option<PathBuf>,
    /// Raw completion: messages go to the model as they are
    #[arg(long, conflicts_with_all = ["system", "system_file", "chat_template", "chat_template_file"])]
    pub no_chat: bool,
}

impl FormatArgs {
    /// The format for a model.
    ///
    /// # Errors
    /// A template that is missing or broken.
    pub fn format(&self, model: &Model, tokenizer: &Tokenizer) -> Result<Format> {
        let source = match (&self.chat_template, &self.chat_template_file) {
            _ if self.no_chat => return Ok(Format::Raw),
            (Some(source), _) => source.clone(),
            (None, Some(path)) => read_text(path)?,
            (None, None) => {
                return Ok(Format::Chat(Box::new(ChatTemplate::from_gguf(&model.file, tokenizer)?)));
            }
        };
        Ok(Format::Chat(Box::new(ChatTemplate::new(&source, tokenizer)?)))
    }

    /// The system prompt, if one was given.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn system_prompt(&self) -> Result<Option<String>> {
        match &self.system_file {
            Some(path) => read_text(path).map(|text| Some(text.trim_end().to_owned())),
            None => Ok(self.system.clone()),
        }
    }
}

/// Arguments of `clsa chat`.
#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    format: FormatArgs,
    /// The first message
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// A document that goes with the first message (repeatable)
    #[arg(short, long, value_name = "FILE")]
    file: Vec<PathBuf>,
    /// Answer one message and leave (-st)
    #[arg(long)]
    single_turn: bool,
    /// Session file: goes on from it where there is one, and keeps caches and history in it
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// Drop the oldest turns whole when the context is full, instead of an error
    #[arg(long)]
    context_shift: bool,
    /// Tokens of an answer at most
    #[arg(short = 'n', long, value_name = "N")]
    n_predict: Option<usize>,
    /// End answers at this text, which is not part of them (repeatable)
    #[arg(short = 'r', long, value_name = "TEXT", visible_alias = "reverse-prompt")]
    stop: Vec<String>,
    /// Go on past the tokens that end an answer
    #[arg(long)]
    ignore_eos: bool,
    /// Do not style Markdown on a terminal
    #[arg(long)]
    no_markdown: bool,
    /// Fold reasoning into one line on a terminal
    #[arg(long)]
    fold_reasoning: bool,
    #[command(flatten)]
    grammar: GrammarArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs `clsa chat`.
///
/// # Errors
/// Whatever ends the conversation other than the person.
pub fn run(args: &ChatArgs) -> Result<()> {
    let _mode = terminal::ModeGuard::new();
    let interactive = terminal::is_interactive() && !args.single_turn;
    // Before the model is touched, so that a pipe that brings nothing costs nothing.
    args.grammar.check(&args.stop, args.ignore_eos)?;
    let grammar = args.grammar.grammar()?;
    let message = args.message(interactive)?;
    let stop = Arc::new(AtomicBool::new(false));
    let (events, received) = channel();
    signals::listen(Arc::clone(&stop), events.clone())?;

    let model = args.model.open()?;
    let watch = FileWatch::new(model.file.path(), model.file.len())?;
    ggml_kernels::sigbus::report(&format!(
        "error: a mapped file was truncated while in use ({}, or a session file): restore it, then start again\n",
        model.file.path().display()
    ));
    let mut talk = talk(&args.model, &args.format, &args.sampling, &model, Arc::clone(&stop))?;
    talk.limits.max_tokens = args.n_predict;
    talk.limits.stop.clone_from(&args.stop);
    talk.limits.ignore_eos = args.ignore_eos;
    talk.context_shift = args.context_shift;
    if let Some(grammar) = &grammar {
        talk.set_grammar(grammar)?;
    }
    let title = title(&talk);

    let look = args.look();
    let colour = terminal::wants_colour();
    let styled_notes = colour && io::stderr().is_terminal();
    let screen = Screen::new(Box::new(io::stdout()), Box::new(io::stderr()), look, styled_notes);
    let mut app = App::new(talk, screen, watch, stop, received, args.session.clone());
    args.start(&mut app, &model)?;
    match message {
        Some(message) if !interactive => app.single(&message, args.model.verbose),
        first => {
            let editor = LineEditor::start(history_path(), colour, events)?;
            app.note(&title);
            app.converse(&editor, first.as_deref())
        }
    }
}

/// A conversation with a model: tokenizer, template, engine, sampler.
///
/// # Errors
/// Whatever of these fails.
pub(super) fn talk(
    model_args: &ModelArgs,
    format: &FormatArgs,
    sampling: &SamplingArgs,
    model: &Model,
    stop: Arc<AtomicBool>,
) -> Result<Talk> {
    let tokenizer = Arc::new(Tokenizer::from_gguf(&model.file)?);
    let format = format.format(model, &tokenizer)?;
    let params = sampling.params(&model.file)?;
    let engine = model_args.engine(model, &model_args.options(model, 1), stop)?;
    Talk::new(Session::new(engine)?, tokenizer, format, params)
}

fn title(talk: &Talk) -> String {
    let engine = talk.session().engine();
    let name = engine.model().file.path().file_stem().unwrap_or_default().to_string_lossy().into_owned();
    format!(
        "{name} | {} | context {} | {} | /help lists the commands",
        engine.backend().describe(),
        crate::chat::status::count(engine.context()),
        show::routing(talk),
    )
}

impl ChatArgs {
    /// The message of a single turn: -p, or all of standard input; in a terminal the first one, if there is one.
    fn message(&self, interactive: bool) -> Result<Option<String>> {
        if self.prompt.is_some() || interactive {
            return Ok(self.prompt.clone());
        }
        if io::stdin().is_terminal() {
            eprintln!("reading the message from standard input, up to Ctrl-D");
        }
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidData => Error::Input("standard input: not UTF-8 text".into()),
            _ => Error::Io { path: "standard input".into(), source: e },
        })?;
        if text.trim().is_empty() && self.file.is_empty() {
            return Err(Error::Input("no message: give -p TEXT, or text on standard input".into()));
        }
        Ok(Some(text.trim_end_matches('\n').to_owned()))
    }

    fn look(&self) -> Look {
        if !io::stdout().is_terminal() {
            return Look::PIPE;
        }
        let reasoning = if self.fold_reasoning { Reasoning::Fold } else { Reasoning::Show };
        Look { terminal: true, styled: terminal::wants_colour(), markdown: !self.no_markdown, reasoning }
    }

    /// Loads the session, where there is one, then what the arguments say in its place.
    fn start(&self, app: &mut App, model: &Model) -> Result<()> {
        if let Some(path) = self.session.as_ref().filter(|p| p.exists()) {
            let given = app.talk_mut().params().clone();
            app.load(path)?;
            self.override_params(app.talk_mut(), &given, model)?;
        }
        if let Some(system) = self.format.system_prompt()? {
            app.talk_mut().conversation.system = Some(system);
        }
        self.file.iter().try_for_each(|path| app.add_document(path))
    }

    /// Parameters on the command line win over those of the session file.
    fn override_params(&self, talk: &mut Talk, given: &SamplerParams, model: &Model) -> Result<()> {
        let own = SamplerParams::from_gguf(&model.file)?;
        let mut params = talk.params().clone();
        for (name, _) in SamplerParams::names() {
            if let Some(value) = given.get(name).filter(|value| own.get(name).as_ref() != Some(value)) {
                params.set(name, &value)?;
            }
        }
        if params == *talk.params() { Ok(()) } else { talk.set_params(params) }
    }
}
