//! `clsa completions` and `clsa man`: what a shell and `man` need, made from the arguments themselves.
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::{Shell, generate};
use clap_mangen::Man;

use super::{Cli, stdout_error};
use crate::error::{Error, Result};

/// Arguments of `clsa completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: ShellName,
}

/// Shells with completions.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ShellName {
    /// bash: source <(clsa completions bash)
    Bash,
    /// zsh: clsa completions zsh > ~/.zfunc/_clsa
    Zsh,
    /// fish: clsa completions fish | source
    Fish,
}

/// Runs `clsa completions`.
///
/// # Errors
/// When standard output cannot be written.
pub fn completions(args: &CompletionsArgs) -> Result<()> {
    let shell = match args.shell {
        ShellName::Bash => Shell::Bash,
        ShellName::Zsh => Shell::Zsh,
        ShellName::Fish => Shell::Fish,
    };
    let mut script = vec![];
    generate(shell, &mut Cli::command(), "clsa", &mut script);
    io::stdout().write_all(&script).map_err(stdout_error)
}

/// Arguments of `clsa man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Write the pages of all subcommands into this folder (clsa.1, clsa-chat.1, ...); without it the first page goes to standard output
    #[arg(value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

/// Runs `clsa man`.
///
/// # Errors
/// When the pages cannot be written.
pub fn man(args: &ManArgs) -> Result<()> {
    let mut command = Cli::command();
    command.build();
    let Some(folder) = &args.folder else {
        return Man::new(command).render(&mut io::stdout()).map_err(stdout_error);
    };
    std::fs::create_dir_all(folder).map_err(|source| Error::Io { path: folder.clone(), source })?;
    write_pages(&command, "clsa", folder)
}

fn write_pages(command: &clap::Command, name: &str, folder: &Path) -> Result<()> {
    let path = folder.join(format!("{name}.1"));
    let io = |source| Error::Io { path: path.clone(), source };
    let mut page = vec![];
    let titled = command.clone().name(name.to_owned()).bin_name(name.replace('-', " "));
    Man::new(titled).render(&mut page).map_err(io)?;
    std::fs::write(&path, page).map_err(io)?;
    let shown = command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help");
    shown.into_iter().try_for_each(|c| write_pages(c, &format!("{name}-{}", c.get_name()), folder))
}
