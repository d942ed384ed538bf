//! Sampling flags: one for each parameter of the sampler, so that flags, `/set` and JSON never differ.
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use crate::error::Result;
use crate::gguf::File;
use crate::sampler::SamplerParams;

/// The parameters that were given, over the model's own defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SamplingArgs {
    given: Vec<(&'static str, String)>,
}

impl SamplingArgs {
    /// The model's defaults with what was given in their place.
    ///
    /// # Errors
    /// A value that is none or out of range; keys of the file that are not usable.
    pub fn params(&self, file: &File) -> Result<SamplerParams> {
        let mut params = SamplerParams::from_gguf(file)?;
        for (name, value) in &self.given {
            params.set(name, value)?;
        }
        Ok(params)
    }
}

impl FromArgMatches for SamplingArgs {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        let mut args = Self::default();
        args.update_from_arg_matches(matches)?;
        Ok(args)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        for (name, _) in SamplerParams::names() {
            if let Some(value) = matches.get_one::<String>(name) {
                self.given.push((name, value.clone()));
            }
        }
        Ok(())
    }
}

impl Args for SamplingArgs {
    fn augment_args(mut command: Command) -> Command {
        for (name, help) in SamplerParams::names() {
            let mut arg = Arg::new(*name)
                .long(*name)
                .help(help.trim())
                .value_name("VALUE")
                .allow_hyphen_values(true)
                .help_heading("Sampling");
            arg = match *name {
                "temp" => arg.visible_alias("temperature"),
                "seed" => arg.short('s'),
                _ => arg,
            };
            command = command.arg(arg);
        }
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}
