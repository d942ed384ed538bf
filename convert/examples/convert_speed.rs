//! Times the conversion of a full-size F16 checkpoint to Q4_K_M beside llama.cpp's own quantizer, on the same tensors and threads,
//! and checks that both wrote the same bytes.
//!
//! `cargo run --release -p clsa-convert --example convert_speed -- FOLDER [PRESET [THREADS]]` makes the checkpoint in FOLDER first,
//! where it is missing; `transformer-4b` needs 16 GB there.
use std::{
    error::Error,
    fs,
    io::{BufWriter, Write},
    path::Path,
    time::Instant,
};

use clsa_convert::{
    Mix, Model, Options, Plan, Recipe,
    checkpoint::Checkpoint,
    family::{Layout, Origin},
    gguf::File,
    synth,
};
use ggml_kernels::llama::quantize;
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("usage: convert_speed FOLDER [PRESET [THREADS]]")?;
    let preset = args.next().unwrap_or_else(|| "transformer-4b".into());
    let threads = match args.next() {
        Some(n) => n.parse()?,
        None => std::thread::available_parallelism()?.get(),
    };
    let folder = Path::new(&folder).join(&preset);
    let (half, checkpoint) = (folder.join("f16.gguf"), folder.join("checkpoint"));
    if !checkpoint.join("model.safetensors").exists() {
        eprintln!("making {}", checkpoint.display());
        fs::create_dir_all(&checkpoint)?;
        make(&preset, &half, &checkpoint)?;
        println!("made; run again to time");
        return Ok(());
    }

    let (ours, theirs) = (folder.join("ours.gguf"), folder.join("theirs.gguf"));
    let values = File::open(&half)?.tensors().iter().map(|t| t.n_elements()).sum::<usize>() as f64;
    let source = fs::metadata(checkpoint.join("model.safetensors"))?.len() as f64;
    let report = |who: &str, seconds: f64| {
        let (values, bytes) = (values / seconds / 1e6, source / seconds / 1e6);
        println!(
            "{who:<10} {seconds:7.2} s  {values:6.1} M values/s  {bytes:6.0} MB/s read  peak RSS {:5} MiB",
            peak_mib()
        );
    };
    reset_peak()?;
    let start = Instant::now();
    let opened = Checkpoint::open(&checkpoint)?;
    let plan = Plan::new(Model::from_checkpoint(&opened)?, &Recipe::new(Mix::Q4_K_M), None)?;
    plan.write(&ours, &Options { threads, abort: None, progress: &|_| () })?;
    report("clsa", start.elapsed().as_secs_f64());

    reset_peak()?;
    let start = Instant::now();
    let options = quantize::Options { file_type: Mix::Q4_K_M.file_type(), threads, ..Default::default() };
    if !quantize::file(&half, &theirs, &options) {
        return Err("llama.cpp could not quantize".into());
    }
    report("llama.cpp", start.elapsed().as_secs_f64());

    let (a, b) = (File::open(&ours)?, File::open(&theirs)?);
    for t in b.tensors() {
        let mine = a.tensor(&t.name).ok_or("a tensor is missing")?;
        if a.data(mine) != b.data(t) {
            return Err(format!("{} differs", t.name).into());
        }
    }
    println!("same bytes in all {} tensors, {threads} threads", b.tensors().len());
    fs::remove_file(ours)?;
    fs::remove_file(theirs)?;
    Ok(())
}

/// Random weights as an F16 GGUF file, and the same as a Hugging Face checkpoint.
fn make(preset: &str, half: &Path, dir: &Path) -> Result<()> {
    let threads = std::thread::available_parallelism()?.get();
    let plan = Plan::new(synth::model(preset, 1)?, &Recipe::new(Mix::F16), None)?;
    plan.write(half, &Options { threads, abort: None, progress: &|_| () })?;
    let config = synth::PRESETS.iter().find(|(name, _)| *name == preset).ok_or("no such preset")?.1;
    fs::write(dir.join("config.json"), config)?;
    let layout = Layout::from_config(serde_json::from_str(config)?)?;
    let file = File::open(half)?;
    let (mut header, mut order, mut at) = (serde_json::Map::new(), Vec::new(), 0);
    for wanted in &layout.tensors {
        let (Origin::Stored { name, .. }, Some(t)) = (&wanted.origin, file.tensor(&wanted.name)) else {
            continue;
        };
        let shape: Vec<u64> = t.shape.iter().rev().copied().collect();
        let entry = json!({"dtype": t.ty.name(), "shape": shape, "data_offsets": [at, at + t.bytes]});
        header.insert(name.clone(), entry);
        order.push(t);
        at += t.bytes;
    }
    let header = serde_json::to_vec(&header)?;
    let mut out = BufWriter::new(fs::File::create(dir.join("model.safetensors"))?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for t in order {
        out.write_all(file.data(t))?;
        file.mapping().release(t.offset..t.offset + t.bytes);
    }
    Ok(out.into_inner()?.sync_all()?)
}

/// The peak of resident memory since [`reset_peak`].
fn peak_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

fn reset_peak() -> Result<()> {
    Ok(fs::write("/proc/self/clear_refs", "5")?)
}
