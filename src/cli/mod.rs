//! The command line: one module per subcommand, each with its arguments and `run`.
pub mod batch;
pub mod bench;
pub mod chat;
pub mod completions;
pub mod convert;
pub mod devices;
pub mod eval;
pub mod grammar;
pub mod imatrix;
pub mod inspect;
pub mod model;
pub mod prefill;
pub mod quantize;
pub mod recipe;
pub mod run;
pub mod sampling;
pub mod synth;
pub mod tune;
pub mod verify;

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::path::Path;

use clap::{Parser, Subcommand, builder::RangedU64ValueParser};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error::{Error, Result};

/// Quantized local inference for YOCO models with Cross-Layer Sparse Attention.
#[derive(Debug, Parser)]
#[command(name = "clsa", version, long_version = devices::long_version(), about, propagate_version = true)]
pub struct Cli {
    /// List the devices that --device can name, and leave
    #[arg(long)]
    list_devices: bool,
    /// What to do; a chat without it.
    #[command(subcommand)]
    command: Option<Command>,
}

impl Cli {
    /// Does what was asked for.
    ///
    /// # Errors
    /// Whatever it fails with; `main` prints it and chooses the exit code.
    pub fn run(self) -> Result<()> {
        match self.command {
            _ if self.list_devices => devices::list(),
            Some(command) => command.run(),
            // As if `clsa chat` had been typed: environment variables count.
            None => Self::parse_from(["clsa", "chat"]).run(),
        }
    }
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Chat in a terminal; one answer to standard input elsewhere. What plain `clsa` does
    Chat(Box<chat::ChatArgs>),
    /// Prepare a session with documents ahead of time
    Prefill(Box<prefill::PrefillArgs>),
    /// Time prompt processing and generation
    Bench(Box<bench::BenchArgs>),
    /// Convert a checkpoint folder to a GGUF file
    Convert(convert::ConvertArgs),
    /// Convert a GGUF file to other tensor types
    Quantize(quantize::QuantizeArgs),
    /// Make a model of random weights in one of the paper's shapes
    Synth(synth::SynthArgs),
    /// Answer one prompt
    Run(Box<run::RunArgs>),
    /// Do a file of jobs, many at a time
    Batch(Box<batch::BatchArgs>),
    /// Measure what quantization, sparsity and length cost
    Eval(eval::EvalArgs),
    /// Measure which columns of the weights matter, for better quantization
    Imatrix(Box<imatrix::ImatrixArgs>),
    /// Show what is in a GGUF file
    Inspect(inspect::InspectArgs),
    /// Prove that every byte of a GGUF file is as it was written
    Verify(verify::VerifyArgs),
    /// Print the completion script of a shell
    Completions(completions::CompletionsArgs),
    /// Print or write the manual pages
    Man(completions::ManArgs),
}

impl Command {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// Whatever it fails with; `main` prints it and chooses the exit code.
    pub fn run(self) -> Result<()> {
        match self {
            Self::Chat(args) => chat::run(&args),
            Self::Prefill(args) => prefill::run(&args),
            Self::Bench(args) => bench::run(&args),
            Self::Convert(args) => convert::run(&args),
            Self::Quantize(args) => quantize::run(&args),
            Self::Synth(args) => synth::run(&args),
            Self::Run(args) => run::run(&args),
            Self::Batch(args) => batch::run(&args),
            Self::Eval(args) => eval::run(&args),
            Self::Imatrix(args) => imatrix::run(&args),
            Self::Inspect(args) => inspect::run(&args),
            Self::Verify(args) => verify::run(&args),
            Self::Completions(args) => completions::completions(&args),
            Self::Man(args) => completions::man(&args),
        }
    }
}

/// Rewrites llama.cpp's short flags of several letters (`-ub 512`, `-ctk=q8_0`) to their long forms, which is what the parser knows.
/// Stops at `--`.
pub fn expand_short_flags(args: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    let mut literal = false;
    args.map(move |arg| {
        literal |= arg == "--";
        let Some(text) = arg.to_str().filter(|_| !literal) else { return arg };
        let (flag, value) = text.split_once('=').map_or((text, None), |(f, v)| (f, Some(v)));
        match (SHORT_FLAGS.iter().find(|(short, _)| *short == flag), value) {
            (Some((_, long)), Some(value)) => format!("{long}={value}").into(),
            (Some((_, long)), None) => (*long).into(),
            (None, _) => arg,
        }
    })
}

/// Short flags of several letters, as llama.cpp has them.
const SHORT_FLAGS: [(&str, &str); 10] = [
    ("-ub", "--ubatch-size"),
    ("-tb", "--threads-batch"),
    ("-ngl", "--gpu-layers"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-np", "--parallel"),
    ("-pg", "--prompt-gen"),
    ("-sys", "--system"),
    ("-sysf", "--system-file"),
    ("-st", "--single-turn"),
];

/// Reads a number of threads, from `least` to what any machine here can use; more would only exhaust it.
pub(crate) fn threads_from(least: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(least..=512)
}

/// Reads a text file that was named on the command line.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::Input(format!("{}: no such file", path.display())),
        io::ErrorKind::InvalidData => Error::Input(format!("{}: not UTF-8 text", path.display())),
        _ => Error::Io { path: path.to_owned(), source: e },
    })
}

/// An error of writing results.
pub(crate) fn stdout_error(source: io::Error) -> Error {
    Error::Io { path: "standard output".into(), source }
}

/// A progress bar over `len` bytes on standard error, with rate and time left; invisible when that is no terminal.
pub(crate) fn byte_bar(len: u64) -> ProgressBar {
    let target =
        if io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let template = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(len), target).with_style(style)
}

/// A progress bar over tokens on standard error, with rate and time left; invisible when that is no terminal.
pub(crate) fn token_bar(what: &'static str) -> ProgressBar {
    count_bar(what, "tokens")
}

/// A progress bar over things with a name, as [`token_bar`].
pub(crate) fn count_bar(what: &'static str, unit: &str) -> ProgressBar {
    let target =
        if io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let template = format!("{{msg}} {{wide_bar}} {{pos}}/{{len}} {unit} {{per_sec}} {{eta}}");
    let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(None, target).with_style(style).with_message(what)
}

/// Bytes for people: `1.66 GiB`.
pub(crate) fn human_bytes(n: u64) -> String {
    indicatif::BinaryBytes(n).to_string()
}
