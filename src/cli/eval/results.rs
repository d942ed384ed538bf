//! Where an evaluation puts its results, and what it keeps to go on later.
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value, json};

use crate::cli::stdout_error;
use crate::error::{Error, Result};
use crate::eval::state::State;
use crate::model::Model;
use crate::session::model_hash;

/// Results, state and plots.
#[derive(Debug, Args)]
#[command(next_help_heading = "Results")]
pub struct ResultArgs {
    /// Write the results to a file, as JSON
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Keep finished parts here; the same command goes on with the others. FILE.state beside -o FILE without it
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Draw the results as SVG files into a folder
    #[arg(long, value_name = "FOLDER")]
    pub plot: Option<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long)]
    pub json: bool,
}

impl ResultArgs {
    /// The state of an evaluation of `model` with these settings.
    ///
    /// # Errors
    /// As [`State::open`].
    pub fn state(&self, model: &Model, command: &str, settings: Value) -> Result<State> {
        let mut all = Map::new();
        all.insert("command".into(), json!(command));
        all.insert("model".into(), json!(model_hash(&model.file)));
        if let Value::Object(settings) = settings {
            all.extend(settings);
        }
        let beside = || {
            let mut name = self.output.clone()?.into_os_string();
            name.push(".state");
            Some(PathBuf::from(name))
        };
        let path = self.state.clone().or_else(beside);
        let state = State::open(path.as_deref(), &all)?;
        if let Some(path) = path.filter(|_| !state.is_empty()) {
            eprintln!("{}: {} parts are done already", path.display(), state.len());
        }
        Ok(state)
    }

    /// Writes `result` to -o, and prints it with --json; otherwise prints what `table` writes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn report(&self, result: &Value, table: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        if let Some(path) = &self.output {
            let io = |source| Error::Io { path: path.clone(), source };
            std::fs::write(path, format!("{result:#}\n")).map_err(io)?;
        }
        let mut out = io::stdout().lock();
        if self.json { writeln!(out, "{result}") } else { table(&mut out) }.map_err(stdout_error)
    }

    /// The folder for plots, made where it is missing; `None` when none are wanted.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn plots(&self) -> Result<Option<&Path>> {
        if let Some(path) = &self.plot {
            std::fs::create_dir_all(path).map_err(|source| Error::Io { path: path.clone(), source })?;
        }
        Ok(self.plot.as_deref())
    }
}

/// A share as per cent, or a dash.
pub fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".into(), |s| format!("{:.1}", 100.0 * s))
}
