//! `clsa quantize --tune`: types for a size, by measured divergence.
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use clsa_convert::gguf::File;
use clsa_convert::imatrix::Imatrix;
use clsa_convert::{Mix, Model as Source, Options, Override, Plan, Recipe};
use ggml_kernels::quant::Type;
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::Xxh3;

use super::eval::perplexity::read_tokens;
use super::model::ModelArgs;
use super::{human_bytes, stdout_error, token_bar};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::eval::Mean;
use crate::eval::perplexity::Windows;
use crate::eval::state::State;
use crate::interrupt;
use crate::model::Model;
use crate::session::model_hash;
use crate::tune::{Candidate, Group, Reference, choose, groups};

/// Options of `--tune`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Tuning")]
pub struct TuneArgs {
    /// Choose a type for each group of tensors so that the file has at most this size (90MB, 1.5GiB) and diverges least on --tune-text
    #[arg(long, value_name = "SIZE", requires = "tune_text", conflicts_with_all = ["mix", "tensor_type", "output_tensor_type", "token_embedding_type", "pure", "dry_run"])]
    pub tune: Option<Size>,
    /// The text to measure on
    #[arg(long, value_name = "FILE", requires = "tune")]
    tune_text: Option<PathBuf>,
    /// Windows of 512 tokens to measure on
    #[arg(long, value_name = "N", default_value_t = 4, requires = "tune", value_parser = clap::value_parser!(u32).range(1..))]
    tune_windows: u32,
    /// Keep measurements here: the same command goes on with the others, and another size needs none again [default: OUTPUT.tune]
    #[arg(long, value_name = "FILE", requires = "tune")]
    tune_state: Option<PathBuf>,
}

/// A number of bytes: `90000000`, `90MB`, `1.5GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let at = s.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(s.len());
        let (number, unit) = s.split_at(at);
        let factor = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "kb" | "k" => 1e3,
            "mb" | "m" => 1e6,
            "gb" | "g" => 1e9,
            "kib" => 1024.0,
            "mib" => 1024.0 * 1024.0,
            "gib" => 1024.0 * 1024.0 * 1024.0,
            _ => return Err(format!("found {s:?}, expected a number of bytes with MB, MiB, GB or GiB")),
        };
        let bytes = number.parse::<f64>().map_err(|e| format!("{s:?}: {e}"))? * factor;
        if (1.0..1e18).contains(&bytes) {
            Ok(Self(bytes as u64))
        } else {
            Err(format!("{s:?} is no size of a file"))
        }
    }
}

/// Types to try for each group, where rows allow them.
const TYPES: [Type; 11] = [
    Type::Q2_K,
    Type::Q3_K,
    Type::Q4_0,
    Type::IQ4_XS,
    Type::IQ4_NL,
    Type::Q4_K,
    Type::Q5_0,
    Type::Q5_K,
    Type::Q5_1,
    Type::Q6_K,
    Type::Q8_0,
];

/// Tokens of a window.
const WINDOW: usize = 512;

/// Measures, chooses and writes.
///
/// # Errors
/// [`Error::Input`] for a source that is quantized already, and for a size that is too small; those of the engine and the files.
pub fn run(
    args: &TuneArgs,
    size: Size,
    input: &Path,
    output: &Path,
    imatrix: Option<&Path>,
    threads: usize,
) -> Result<()> {
    let text = args.tune_text.as_deref().unwrap_or_else(|| Path::new(""));
    Tuning::new(args, input, output, imatrix, threads, text)?.run(size)
}

struct Tuning<'a> {
    file: &'a Path,
    output: &'a Path,
    threads: usize,
    model: Model,
    /// Mix that leaves everything as it is.
    as_is: Mix,
    imatrix: Option<Imatrix>,
    tokens: Vec<u32>,
    windows: Windows,
    state: State,
    /// Where models to measure are written.
    folder: tempfile::TempDir,
}

impl<'a> Tuning<'a> {
    fn new(
        args: &TuneArgs,
        input: &'a Path,
        output: &'a Path,
        imatrix: Option<&Path>,
        threads: usize,
        text: &Path,
    ) -> Result<Self> {
        let model = Model::open(input)?;
        let as_is = match model.weights.layers.first().map_or(model.weights.token_embd.ty, |l| l.ffn.up.ty) {
            Type::F32 => Mix::F32,
            Type::F16 => Mix::F16,
            Type::BF16 => Mix::BF16,
            other => {
                return Err(Error::Input(format!(
                    "{}: its weights are {other}: --tune measures against a file of F32, F16 or BF16",
                    input.display()
                )));
            }
        };
        let tokens = read_tokens(&model, text)?;
        let windows = Windows { len: WINDOW, limit: Some(args.tune_windows as usize), last: None };
        let cut = windows.cut(&tokens)?;
        let mut hasher = Xxh3::new();
        cut.iter().flat_map(|w| w.iter()).for_each(|t| hasher.update(&t.to_le_bytes()));
        let importance = match imatrix {
            Some(path) => {
                let bytes =
                    std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
                format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&bytes))
            }
            None => "none".to_owned(),
        };
        let settings: Map<String, Value> = [
            ("command".to_owned(), json!("tune")),
            ("model".into(), json!(model_hash(&model.file))),
            ("text".into(), json!(format!("{:032x}", hasher.digest128()))),
            ("imatrix".into(), json!(importance)),
        ]
        .into_iter()
        .collect();
        let beside = || {
            let mut name = output.as_os_str().to_owned();
            name.push(".tune");
            PathBuf::from(name)
        };
        let state = State::open(Some(&args.tune_state.clone().unwrap_or_else(beside)), &settings)?;
        let parent = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = tempfile::Builder::new().prefix(".clsa-tune-").tempdir_in(parent);
        let folder = folder.map_err(|source| Error::Io { path: parent.to_owned(), source })?;
        Ok(Self {
            file: input,
            output,
            threads,
            model,
            as_is,
            imatrix: imatrix.map(Imatrix::open).transpose()?,
            tokens,
            windows,
            state,
            folder,
        })
    }

    /// The plan of the source with these groups in these types.
    fn plan<'f>(&'f self, file: &'f File, types: &[(&Group, Type)]) -> Result<Plan<'f>> {
        let overrides = types.iter().map(|(group, ty)| {
            let names = group.tensors.join("|").replace('.', r"\.");
            format!("^({names})$={ty}").parse::<Override>().map_err(Error::Input)
        });
        let recipe = Recipe { overrides: overrides.collect::<Result<_>>()?, ..Recipe::new(self.as_is) };
        Ok(Plan::new(Source::from_gguf(file)?, &recipe, self.imatrix.as_ref())?)
    }

    fn write(&self, plan: &Plan<'_>, path: &Path) -> Result<()> {
        let abort = interrupt::requested()?;
        Ok(plan.write(path, &Options { threads: self.threads, abort: Some(&abort), progress: &|_| () })?)
    }

    fn engine(&self, model: &Model) -> Result<Engine> {
        let args = ModelArgs::on_cpu_with(self.threads, WINDOW);
        let mut options = args.options(model, 1);
        options.max_outputs = Some(options.max_rows);
        args.engine(model, &options, Arc::clone(&interrupt::requested()?))
    }

    /// Candidates of a group whose divergence is not known yet, with the type that gives each; the last is the group as it is.
    fn candidates(&self, file: &File, group: &Group) -> Result<Vec<(Candidate, Option<Type>)>> {
        let mut found: Vec<(Candidate, Option<Type>)> = vec![];
        for ty in TYPES.into_iter().map(Some).chain([None]) {
            let types: Vec<_> = ty.map(|ty| (group, ty)).into_iter().collect();
            let plan = self.plan(file, &types)?;
            let (mut bytes, mut names) = (0, vec![]);
            for line in plan.lines().filter(|l| group.tensors.iter().any(|t| t == l.name)) {
                bytes += line.bytes as u64;
                let name = line.choice.ty.to_string();
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            let name = names.join("+");
            // Where rows fall back, several types are the same.
            if !found.iter().any(|(c, _)| c.name == name) {
                found.push((Candidate { name, bytes, kl: 0.0, error: 0.0 }, ty));
            }
        }
        Ok(found)
    }

    fn run(mut self, size: Size) -> Result<()> {
        let file = File::open(self.file)?;
        let groups = groups(&self.model);
        let all = groups.iter().map(|g| self.candidates(&file, g)).collect::<Result<Vec<_>>>()?;
        let (mut candidates, mut types) = (vec![], vec![]);
        for of_group in all {
            let (c, t): (Vec<Candidate>, Vec<Option<Type>>) = of_group.into_iter().unzip();
            candidates.push(c);
            types.push(t);
        }
        let smallest: Vec<usize> =
            candidates.iter().map(|g| (0..g.len()).min_by_key(|&i| g[i].bytes).unwrap_or(0)).collect();
        let chosen = |choice: &[usize]| -> Vec<(&Group, Type)> {
            (groups.iter().zip(choice).enumerate())
                .filter_map(|(g, (group, &i))| types[g][i].map(|ty| (group, ty)))
                .collect()
        };
        // What the file has besides the groups. Groups are whole multiples of the alignment, or nearly: checked at the end.
        let least = self.plan(&file, &chosen(&smallest))?.file_size()?;
        let of_groups: u64 = candidates.iter().zip(&smallest).map(|(g, &i)| g[i].bytes).sum();
        let too_small =
            || Error::Input(format!("--tune {}: the smallest file has {least} bytes: give more", size.0));
        if least > size.0 {
            return Err(too_small());
        }
        let mut reference = self.measure(&file, &groups, &mut candidates, &types)?;
        let mut budget = size.0 - (least - of_groups);
        let (choice, plan) = loop {
            let choice = choose(&candidates, budget).ok_or_else(too_small)?;
            let plan = self.plan(&file, &chosen(&choice))?;
            match plan.file_size()?.checked_sub(size.0) {
                None | Some(0) => break (choice, plan),
                Some(excess) => budget = budget.checked_sub(excess).ok_or_else(too_small)?,
            }
        };
        self.write(&plan, self.output)?;
        let bar = token_bar("measuring the result");
        bar.set_length(((1 + usize::from(reference.0.is_none())) * self.windows_tokens()) as u64);
        let model = Model::open(self.output)?;
        let result =
            reference.get(&self, &bar)?.divergence(&mut self.engine(&model)?, |n| bar.inc(n as u64))?;
        bar.finish_and_clear();
        print(&groups, &candidates, &choice, plan.file_size()?, result).map_err(stdout_error)?;
        eprintln!("wrote {}: {}", self.output.display(), human_bytes(plan.file_size()?));
        Ok(())
    }

    fn windows_tokens(&self) -> usize {
        self.windows.limit.unwrap_or(0).min(self.tokens.len() / WINDOW) * WINDOW
    }

    /// Fills in the divergence of every candidate: from the state, or measured.
    fn measure(
        &mut self,
        file: &File,
        groups: &[Group],
        candidates: &mut [Vec<Candidate>],
        types: &[Vec<Option<Type>>],
    ) -> Result<Lazy> {
        let mut reference = Lazy(None);
        let count = types.iter().flatten().flatten().count();
        let missing = count - self.state.len().min(count);
        if missing < count {
            eprintln!("{} of {count} measurements are there", count - missing);
        }
        let bar = token_bar("tuning");
        bar.set_length(((missing + usize::from(missing > 0)) * self.windows_tokens()) as u64);
        for (g, group) in groups.iter().enumerate() {
            for (candidate, ty) in candidates[g].iter_mut().zip(&types[g]) {
                let Some(ty) = *ty else { continue };
                let item = format!("{}: {}", group.name, candidate.name);
                if let Some([kl, error]) = self.state.get::<[f64; 2]>(&item)? {
                    (candidate.kl, candidate.error) = (kl, error);
                    continue;
                }
                let path = self.folder.path().join("model.gguf");
                self.write(&self.plan(file, &[(group, ty)])?, &path)?;
                let model = Model::open(&path)?;
                let base = reference.get(self, &bar)?;
                let mean = base.divergence(&mut self.engine(&model)?, |n| bar.inc(n as u64))?;
                (candidate.kl, candidate.error) = (mean.mean(), mean.error());
                self.state.push(&item, &[candidate.kl, candidate.error])?;
            }
        }
        bar.finish_and_clear();
        Ok(reference)
    }
}

/// The reference, made when it is first needed.
struct Lazy(Option<Reference>);

impl Lazy {
    fn get(&mut self, tuning: &Tuning<'_>, bar: &ProgressBar) -> Result<&Reference> {
        if self.0.is_none() {
            let windows = tuning.windows.cut(&tuning.tokens)?;
            let mut engine = tuning.engine(&tuning.model)?;
            self.0 = Some(Reference::new(&mut engine, &windows, |n| bar.inc(n as u64))?);
        }
        self.0.as_ref().ok_or_else(|| Error::Runtime("there is no reference".into()))
    }
}

/// The table: what each group has got, and what it would have had.
fn print(
    groups: &[Group],
    candidates: &[Vec<Candidate>],
    choice: &[usize],
    size: u64,
    result: Mean,
) -> io::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    writeln!(
        out,
        "{:<24} {:>8} {:<10} {:>12} {:>10}   divergence of the others",
        "group", "tensors", "type", "bytes", "KL"
    )?;
    let mut predicted = 0.0;
    for ((group, candidates), &i) in groups.iter().zip(candidates).zip(choice) {
        let c = &candidates[i];
        predicted += c.kl;
        let others: Vec<_> = candidates
            .iter()
            .enumerate()
            .filter(|(j, _)| *j != i)
            .map(|(_, o)| format!("{} {:.5}", o.name, o.kl))
            .collect();
        let (name, n) = (&group.name, group.tensors.len());
        writeln!(
            out,
            "{name:<24} {n:>8} {:<10} {:>12} {:>10.5}   {}",
            c.name,
            c.bytes,
            c.kl,
            others.join(", ")
        )?;
    }
    writeln!(out, "sum of the groups' divergences: {predicted:.5} nats")?;
    writeln!(out, "measured together: {:.5} ± {:.5} nats, {size} bytes", result.mean(), result.error())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [("90MB", 90_000_000), ("1.5GiB", 1_610_612_736), ("123", 123), ("2 kib", 2048)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for bad in ["", "MB", "-1MB", "1e9", "90 bytes", "0", "1.2.3MB", "nanGB"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }
}
