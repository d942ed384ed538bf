//! `clsa eval perplexity`: windows that go on where they were cut off, references, routing modes beside each other, llama.cpp.
mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::*;
use serde_json::Value;

fn clsa(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_clsa"))
        .args(["eval", "perplexity", "-t", "1"])
        .args(args)
        .output()
        .expect("the binary runs")
}

fn ok(args: &[&str]) -> Vec<Value> {
    let output = clsa(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().map(|l| serde_json::from_str(l).expect("JSON lines")).collect()
}

/// Whether two results are the same, numbers up to the last digits, which text does not keep.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(k, v)| b.get(k).is_some_and(|w| same(v, w)))
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(v, w)| same(v, w)),
        _ => match (a.as_f64(), b.as_f64()) {
            (Some(a), Some(b)) => (a - b).abs() <= 1e-9 * a.abs().max(1e-3),
            _ => a == b,
        },
    }
}

fn assert_same(a: &[Value], b: &[Value]) {
    assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)), "{a:?}\n{b:?}");
}

struct Setting {
    dir: tempfile::TempDir,
    model: TempModel,
}

impl Setting {
    fn new(preset: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
        std::fs::copy(readme, dir.path().join("text")).expect("a text");
        Self { dir, model: synth(preset, "F16", 2) }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    fn model(&self) -> String {
        self.model.path().to_str().expect("UTF-8").to_owned()
    }
}

#[test]
fn runs_go_on_where_they_were_cut_off() {
    let s = Setting::new("clsa-tiny");
    let (text, model, state, base) = (s.path("text"), s.model(), s.path("state"), s.path("base"));
    let args = ["-m", &model, "-f", &text, "-c", "64", "--json", "--routing", "clsa,dense"];
    let with = |more: &[&str]| ok(&[&args[..], more].concat());
    let whole = with(&["--limit", "3"]);
    // A limit grows with the same state.
    assert_eq!(with(&["--limit", "1", "--state", &state])[0]["windows"], 1);
    assert_same(&with(&["--limit", "3", "--state", &state]), &whole);
    let lines: Vec<String> =
        std::fs::read_to_string(&state).expect("a state file").lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 7);
    std::fs::write(&state, format!("{}\n{}", lines[..3].join("\n"), &lines[3][..20])).expect("written");
    assert_same(&with(&["--limit", "3", "--state", &state]), &whole);
    assert_eq!(std::fs::read_to_string(&state).expect("a state file").lines().count(), 7);
    assert_eq!(with(&["--limit", "2", "--state", &state])[1]["windows"], 2);
    let other = clsa(&[&args[..], &["--score-last", "5", "--state", &state]].concat());
    assert_eq!(other.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&other.stderr).contains("first"), "{other:?}");
    assert_eq!(clsa(&[&args[..], &["--limit", "0"]].concat()).status.code(), Some(2));
    // A reference that was cut off ends up the same.
    let one = ["-m", &model, "-f", &text, "-c", "64", "--limit", "3", "--json"];
    ok(&[&one[..], &["--kl-base", &base]].concat());
    let saved = std::fs::read(&base).expect("a reference");
    let state = s.path("state2");
    let part = s.path("base2.part");
    ok(&[&one[..], &["--kl-base", &s.path("base2"), "--state", &state]].concat());
    assert_eq!(std::fs::read(s.path("base2")).expect("a reference"), saved);
    std::fs::write(&part, &saved[..saved.len() - 1]).expect("written");
    std::fs::remove_file(s.path("base2")).expect("removed");
    ok(&[&one[..], &["--kl-base", &s.path("base2"), "--state", &state]].concat());
    assert_eq!(std::fs::read(s.path("base2")).expect("a reference"), saved);
    // The same model does not diverge from itself, however many windows are taken from a state.
    let kl = ["-m", &model, "--kl", &base, "--json", "--state", &s.path("state3")];
    let first = ok(&kl);
    let mean = first[0]["divergence"]["kl_mean"].as_f64().expect("a mean");
    assert!(mean < 1e-6 && first[0]["divergence"]["same_top"] == 1.0, "{first:?}");
    let lines = std::fs::read_to_string(s.path("state3")).expect("a state file");
    let two: Vec<_> = lines.lines().take(2).collect();
    std::fs::write(s.path("state3"), two.join("\n") + "\n").expect("written");
    assert_same(&ok(&kl), &first);
}

#[test]
fn modes_windows_and_depths_are_told_apart() {
    let s = Setting::new("clsa-tiny");
    let (text, model) = (s.path("text"), s.model());
    let lines = ok(&[
        "-m",
        &model,
        "-f",
        &text,
        "-c",
        "64",
        "--limit",
        "2",
        "--json",
        "--routing",
        "dense,clsa,dense",
        "--top-k-tokens",
        "4",
    ]);
    let modes: Vec<_> = lines.iter().map(|l| l["routing"].as_str().expect("a mode")).collect();
    assert_eq!(modes, ["dense", "clsa", "dense"]);
    assert!(lines[0].get("difference_to_first_mode").is_none());
    let difference = &lines[1]["difference_to_first_mode"];
    let loss = |i: usize| lines[i]["cross_entropy"]["loss"].as_f64().expect("a loss");
    let told = difference["loss"].as_f64().expect("a difference");
    assert!((told - (loss(1) - loss(0))).abs() < 1e-9 && told != 0.0);
    assert!(difference["error"].as_f64().expect("an error") > 0.0);
    assert_eq!(lines[2]["difference_to_first_mode"]["loss"], 0.0);
    let summary = &lines[0]["cross_entropy"];
    assert_eq!(summary["loss_by_window"].as_array().map(Vec::len), Some(2));
    // Eighths of the second half are scored.
    let depths = summary["loss_by_depth"].as_array().expect("depths");
    assert!(depths[..4].iter().all(Value::is_null) && depths[4..].iter().all(Value::is_f64), "{depths:?}");
    let last = ok(&["-m", &model, "-f", &text, "-c", "64", "--limit", "2", "--json", "--score-last", "5"]);
    assert_eq!(last[0]["cross_entropy"]["tokens"], 10);
}

#[test]
fn llama_cpp_says_the_same_of_a_transformer() {
    let s = Setting::new("transformer-tiny");
    let (text, model, base) = (s.path("text"), s.model(), s.path("base"));
    let run = ["-m", &model, "-f", &text, "-c", "64", "--limit", "2", "--json", "--kl-base", &base];
    let theirs = ok(&[&run[..], &["--peer"]].concat());
    assert_eq!(theirs[0]["routing"], "llama.cpp");
    let ours = ok(&["-m", &model, "--kl", &base, "--json"]);
    let kl = ours[0]["divergence"]["kl_mean"].as_f64().expect("a mean");
    println!("KL of ours to llama.cpp's: {kl:.2e}");
    assert!(kl < 1e-4);
    assert!(Path::new(&base).exists());
    let refused = clsa(&["-m", &Setting::new("clsa-tiny").model(), "-f", &text, "-c", "64", "--peer"]);
    assert_eq!(refused.status.code(), Some(2), "{}", String::from_utf8_lossy(&refused.stderr));
}
