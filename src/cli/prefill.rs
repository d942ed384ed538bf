//! `clsa prefill`: prepares a session with documents ahead of time.
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;

use super::chat::{FormatArgs, talk};
use super::model::ModelArgs;
use super::sampling::SamplingArgs;
use super::{human_bytes, token_bar};
use crate::chat::app::read_document;
use crate::chat::conversation::{Conversation, Document};
use crate::chat::status::count;
use crate::chat::talk::Talk;
use crate::error::{Error, Result};
use crate::interrupt;

/// Arguments of `clsa prefill`.
#[derive(Debug, Args)]
pub struct PrefillArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    format: FormatArgs,
    /// The document; the question comes later, in the chat (repeatable)
    #[arg(short, long, value_name = "FILE", required = true)]
    file: Vec<PathBuf>,
    /// The session file to write; an interrupted run of the same documents goes on from it
    #[arg(long, value_name = "FILE")]
    session: PathBuf,
    /// Replace a session file that holds something else
    #[arg(long)]
    force: bool,
    /// Save what is done every so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    save_every: u64,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs `clsa prefill`.
///
/// # Errors
/// Documents that do not fit, a session file that holds something else; [`Error::Interrupted`] after what is done was saved.
pub fn run(args: &PrefillArgs) -> Result<()> {
    let stop = interrupt::requested()?;
    let documents = args.file.iter().map(|path| read_document(path)).collect::<Result<Vec<_>>>()?;
    let model = args.model.open()?;
    let mut talk = talk(&args.model, &args.format, &args.sampling, &model, Arc::clone(&stop))?;
    let system = args.format.system_prompt()?;
    args.resume(&mut talk, &documents, system.as_deref())?;
    talk.conversation = Conversation { system, pending: documents, ..Conversation::default() };

    let tokens = talk.prepared_tokens()?;
    let context = talk.session().engine().context();
    if tokens.len() >= context {
        return Err(Error::ContextFull { needed: tokens.len() + 1, context });
    }
    let (total, started) = (tokens.len(), Instant::now());
    let reused = talk.session().common_prefix(&tokens);
    let bar = token_bar("prefill").with_position(reused as u64);
    bar.set_length(total as u64);
    bar.reset_eta();
    loop {
        let saved = Instant::now();
        let every = Duration::from_secs(args.save_every.max(1));
        let mut due = false;
        let result = talk.prepare(|done, todo| {
            bar.set_position((total - todo + done) as u64);
            due = saved.elapsed() >= every && done < todo;
            if due { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        match result {
            Ok(_) => break,
            Err(Error::Interrupted) if due && interrupt::check(&stop).is_ok() => {
                talk.save(&args.session)?;
            }
            Err(Error::Interrupted) => {
                bar.finish_and_clear();
                let size = human_bytes(talk.save(&args.session)?);
                let (done, total) = (count(talk.session().tokens().len()), count(total));
                eprintln!(
                    "saved {done} of {total} tokens to {} ({size}): run the same command to go on",
                    args.session.display()
                );
                return Err(Error::Interrupted);
            }
            Err(e) => return Err(e),
        }
    }
    bar.finish_and_clear();
    let (seconds, run) = (started.elapsed().as_secs_f64(), total - reused);
    let size = human_bytes(talk.save(&args.session)?);
    eprintln!(
        "{}: {} tokens ({} were there), {:.1} t/s, {size}",
        args.session.display(),
        count(total),
        count(reused),
        run as f64 / seconds.max(1e-9),
    );
    Ok(())
}

impl PrefillArgs {
    /// Takes over what an earlier run of the same documents has done. A file that holds something else is left alone.
    fn resume(&self, talk: &mut Talk, documents: &[Document], system: Option<&str>) -> Result<()> {
        if !self.session.exists() {
            return Ok(());
        }
        let loaded = talk.load(&self.session);
        let c = &talk.conversation;
        let same = c.messages.is_empty() && c.pending == documents && c.system.as_deref() == system;
        match loaded {
            Ok(()) if same => Ok(()),
            _ if self.force => talk.clear(),
            Err(e) => Err(e),
            Ok(()) => Err(Error::Input(format!(
                "{}: this session holds {}: choose another file, or replace it with --force",
                self.session.display(),
                if c.messages.is_empty() { "other documents" } else { "a conversation" }
            ))),
        }
    }
}
