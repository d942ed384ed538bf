//! `clsa inspect`: what is in a GGUF file.
use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::PathBuf,
};

use clap::Args;
use clsa_convert::gguf::{Array, File, TensorInfo, Value};
use serde_json::{Map, json};

use super::{human_bytes, stdout_error};
use crate::error::Result;

/// Arguments of `clsa inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The GGUF file
    file: PathBuf,
    /// List every tensor with type, shape, bytes and offset
    #[arg(long)]
    tensors: bool,
    /// Print JSON: arrays and strings whole
    #[arg(long)]
    json: bool,
}

/// Runs `clsa inspect`.
///
/// # Errors
/// When the file cannot be read or is damaged.
pub fn run(args: &InspectArgs) -> Result<()> {
    let file = File::open(&args.file)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    let written =
        if args.json { json(&mut out, &file, args.tensors) } else { text(&mut out, &file, args.tensors) };
    written.and_then(|()| out.flush()).map_err(stdout_error)
}

/// Count, values and bytes of the tensors of each type.
fn by_type(file: &File) -> BTreeMap<&'static str, (usize, usize, usize)> {
    let mut types = BTreeMap::new();
    for t in file.tensors() {
        let entry: &mut (usize, usize, usize) = types.entry(t.ty.name()).or_default();
        *entry = (entry.0 + 1, entry.1 + t.n_elements(), entry.2 + t.bytes);
    }
    types
}

fn n_parameters(file: &File) -> usize {
    file.tensors().iter().map(TensorInfo::n_elements).sum()
}

fn text(out: &mut impl Write, file: &File, tensors: bool) -> io::Result<()> {
    let (parameters, bytes) = (n_parameters(file), file.tensors().iter().map(|t| t.bytes).sum::<usize>());
    writeln!(
        out,
        "{}: GGUF version {}, {}",
        file.path().display(),
        file.version(),
        human_bytes(file.len() as u64)
    )?;
    let bits = if parameters == 0 { 0.0 } else { bytes as f64 * 8.0 / parameters as f64 };
    writeln!(out, "{parameters} parameters in {} tensors, {bits:.2} bits each", file.tensors().len())?;
    for (name, (count, values, bytes)) in by_type(file) {
        writeln!(
            out,
            "  {name:<7} {count:>5} tensors {values:>13} values {:>11}",
            human_bytes(bytes as u64)
        )?;
    }
    let checksums = if file.has_checksums() { "yes (clsa verify checks them)" } else { "none" };
    writeln!(out, "checksums: {checksums}\n\nmetadata:")?;
    for (key, value) in file.metadata() {
        writeln!(out, "  {key} = {}", brief(value))?;
    }
    if tensors {
        writeln!(out, "\ntensors:")?;
        let width = file.tensors().iter().map(|t| t.name.len()).max().unwrap_or(0);
        for t in file.tensors() {
            let shape = t.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
            writeln!(
                out,
                "  {:width$}  {:<7} {shape:<20} {:>12} bytes at {}",
                t.name, t.ty, t.bytes, t.offset
            )?;
        }
    }
    Ok(())
}

/// A value in one short line.
fn brief(value: Value<'_>) -> String {
    const SHOWN: usize = 6;
    match value {
        Value::String(s) => quoted(s),
        Value::Array(array) => {
            let shown: Vec<_> = array.iter().take(SHOWN).map(brief).collect();
            let more = if array.len() > SHOWN { ", ..." } else { "" };
            format!("[{}{more}] ({})", shown.join(", "), value.describe())
        }
        Value::Unsigned(_, v) => v.to_string(),
        Value::Signed(_, v) => v.to_string(),
        Value::F32(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
        Value::Bool(v) => v.to_string(),
    }
}

/// The string in quotes, control characters escaped, cut at 100 characters.
fn quoted(s: &str) -> String {
    const SHOWN: usize = 100;
    match s.char_indices().nth(SHOWN) {
        Some((cut, _)) => format!("{:?}... ({} bytes)", &s[..cut], s.len()),
        None => format!("{s:?}"),
    }
}

fn json(out: &mut impl Write, file: &File, tensors: bool) -> io::Result<()> {
    let metadata: Map<_, _> = file.metadata().map(|(key, value)| (key.to_owned(), to_json(value))).collect();
    let types: Map<_, _> = by_type(file)
        .into_iter()
        .map(|(name, (n, values, bytes))| {
            (name.to_owned(), json!({"tensors": n, "values": values, "bytes": bytes}))
        })
        .collect();
    let mut whole = json!({
        "path": file.path().to_string_lossy(),
        "version": file.version(),
        "bytes": file.len(),
        "alignment": file.alignment(),
        "data_offset": file.data_offset(),
        "parameters": n_parameters(file),
        "types": types,
        "checksums": file.has_checksums(),
        "metadata": metadata,
    });
    if tensors {
        let list = file.tensors().iter().map(|t| {
            json!({"name": t.name, "type": t.ty.name(), "shape": t.shape, "offset": t.offset, "bytes": t.bytes})
        });
        whole["tensors"] = list.collect();
    }
    serde_json::to_writer_pretty(&mut *out, &whole)?;
    writeln!(out)
}

/// A value in JSON; floats that JSON has no notation for become null.
fn to_json(value: Value<'_>) -> serde_json::Value {
    match value {
        Value::Unsigned(_, v) => v.into(),
        Value::Signed(_, v) => v.into(),
        Value::F32(v) => v.into(),
        Value::F64(v) => v.into(),
        Value::Bool(v) => v.into(),
        Value::String(v) => v.into(),
        Value::Array(array) => Array::iter(&array).map(to_json).collect(),
    }
}

#[cfg(test)]
mod tests {
    use clsa_convert::gguf::{Metadata, TensorPlan, Writer};

    use super::*;

    fn sample() -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        let mut m = Metadata::default();
        m.string("general.architecture", "yoco-clsa");
        m.string("long", &"é".repeat(200));
        m.strings("tokens", &["a", "b\n", "c", "d", "e", "f", "g"]);
        m.f32("nan", f32::NAN);
        let ty = ggml_kernels::quant::Type::Q8_0;
        let plan = TensorPlan { name: "t.weight".into(), shape: vec![32, 2], ty };
        let mut w = Writer::create(&path, m, vec![plan], None).unwrap();
        w.append(&[0; 68]).unwrap();
        w.finish().unwrap();
        let file = File::open(path).unwrap();
        (dir, file)
    }

    #[test]
    fn text_is_brief() {
        let (_dir, file) = sample();
        let mut out = Vec::new();
        text(&mut out, &file, true).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(out.contains("64 parameters in 1 tensors, 8.50 bits each"), "{out}");
        assert!(
            out.contains(r#"tokens = ["a", "b\n", "c", "d", "e", "f", ...] (array of 7 string)"#),
            "{out}"
        );
        assert!(out.contains("... (400 bytes)"), "{out}");
        assert!(out.contains("t.weight  Q8_0    32 x 2 "), "{out}");
    }

    #[test]
    fn json_is_whole() {
        let (_dir, file) = sample();
        let mut out = Vec::new();
        json(&mut out, &file, true).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(value["metadata"]["tokens"][6], "g");
        assert_eq!(value["metadata"]["long"].as_str().unwrap().len(), 400);
        assert!(value["metadata"]["nan"].is_null());
        assert_eq!(value["tensors"][0]["shape"], json!([32, 2]));
        assert_eq!(value["types"]["Q8_0"]["bytes"], 68);
        json(&mut out, &file, false).unwrap();
    }
}
