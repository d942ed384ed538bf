//! `clsa eval`.
use serde_json::Value;

use super::*;

/// A model and a text of a few hundred tokens.
fn folder() -> (Folder, String, String) {
    let folder = Folder::with_model();
    let words = ["route", "the", "token", "once", "and", "share", "what", "was", "selected", "here"];
    let text: String = (0..600).map(|i| format!("{} ", words[(i * i + i / 7) % words.len()])).collect();
    let (model, text) = (folder.model(), folder.write("text.txt", text.as_bytes()));
    (folder, model, text)
}

fn json(said: &Said) -> Value {
    serde_json::from_str(&said.assert_succeeds().stdout).expect("one JSON object")
}

#[test]
fn coverage_goes_on_where_it_was() {
    let (folder, model, text) = folder();
    let state = path_str(&folder.file("state"));
    let base = [
        "eval", "coverage", "-m", &model, "-f", &text, "-c", "96", "--rows", "4", "--k", "4,16,96", "--json",
    ];
    let with = |more: &[&str]| output(base.iter().chain(more));
    let fresh = with(&["--limit", "2"]);
    let result = json(&fresh);
    assert_eq!(result["windows"], 2);
    let of_k = &result["selections"][0]["k"];
    assert_eq!((&of_k[0]["k"], &of_k[2]["coverage"]["rows"]), (&Value::from(4), &Value::from(8)));
    assert!((of_k[2]["coverage"]["mean"].as_f64().expect("a mean") - 1.0).abs() < 1e-6);
    with(&["--limit", "1", "--state", &state]).assert_succeeds();
    let resumed = with(&["--limit", "2", "--state", &state]);
    assert!(resumed.stderr.contains("1 parts are done already"), "{resumed:?}");
    assert_eq!(resumed.stdout, fresh.stdout, "the same as in one go");
    with(&["--limit", "2", "--state", &state, "--routing", "block-8"]).assert_fails(2, &[&state, "routing"]);
}

#[test]
fn coverage_prints_a_table_and_draws() {
    let (folder, model, text) = folder();
    let (out, plots) = (path_str(&folder.file("out.json")), path_str(&folder.file("plots")));
    let said = output([
        "eval", "coverage", "-m", &model, "-f", &text, "-c", "96", "--rows", "4", "--limit", "1", "-o", &out,
        "--plot", &plots,
    ]);
    said.assert_succeeds();
    for words in ["share of dense attention mass", "best shared", "overlap of the layers' own top"] {
        assert!(said.stdout.contains(words), "{words}: {said:?}");
    }
    let result: Value = serde_json::from_slice(&std::fs::read(&out).expect("a file")).expect("JSON");
    assert_eq!(result["evaluation"], "coverage");
    assert!(folder.names().contains(&"out.json.state".to_owned()), "{:?}", folder.names());
    for name in ["coverage-k", "coverage-heads-clsa", "coverage-depth-clsa", "coverage-layers"] {
        let svg = std::fs::read_to_string(folder.file("plots").join(format!("{name}.svg"))).expect(name);
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{name}");
    }
}

#[test]
fn coverage_refuses_what_it_cannot_measure() {
    let (_folder, model, text) = folder();
    let cases: [(&[&str], &[&str]); 4] = [
        (&["-c", "96", "--routing", "per-layer"], &["per-layer", "clsa"]),
        (&["-c", "96", "--rows", "60"], &["--rows 60", "48"]),
        (&["-c", "96", "--k", "0,4"], &["--k"]),
        (&["-c", "100000"], &["100000"]),
    ];
    for (more, words) in cases {
        output(["eval", "coverage", "-m", &model, "-f", &text].iter().chain(more)).assert_fails(2, words);
    }
}

#[test]
fn needles_are_looked_for_in_every_mode() {
    let (folder, model, _) = folder();
    let (out, plots) = (path_str(&folder.file("out.json")), path_str(&folder.file("plots")));
    let base = [
        "eval",
        "needle",
        "-m",
        &model,
        "--raw",
        "--lengths",
        "1K",
        "--depths",
        "0,100",
        "--routing",
        "clsa,dense",
    ];
    let said = output(base.iter().chain(&["--limit", "2", "-o", &out, "--plot", &plots]));
    said.assert_succeeds();
    for words in ["routing clsa", "routing dense", "depth 0 %", "depth 100 %", "1024", "mean"] {
        assert!(said.stdout.contains(words), "{words}: {said:?}");
    }
    let state = std::fs::read_to_string(folder.file("out.json.state")).expect("a state");
    assert_eq!(state.lines().count(), 1 + 2 * 2 * 2, "a line for each sample and mode");
    assert!(folder.file("plots").join("needle-dense.svg").is_file());
    // A torn line is done again, the others are not, and more samples are added.
    std::fs::write(folder.file("out.json.state"), &state[..state.len() - 10]).expect("a state");
    let more = output(base.iter().chain(&["--limit", "3", "-o", &out, "--json"]));
    let again = output(base.iter().chain(&["--limit", "3", "--json"]));
    assert!(more.stderr.contains("7 parts are done already"), "{more:?}");
    assert_eq!(json(&more), json(&again));
    assert_eq!(json(&again)["scores"].as_array().expect("scores").len(), 4);
}

#[test]
fn ruler_runs_the_tasks_whose_files_are_there() {
    let (folder, model, _) = folder();
    let squad = br#"{"data": [{"paragraphs": [{"context": "Oslo lies in Norway.", "qas": [
        {"question": "Where is Oslo?", "answers": [{"text": "Norway"}]}]}]}]}"#;
    let squad = folder.write("squad.json", squad);
    let base = ["eval", "ruler", "-m", &model, "--raw", "--lengths", "4K", "--limit", "1"];
    let all = output(base.iter().chain(&["--json", "--squad", &squad]));
    assert!(all.stderr.contains("qa_2") && all.stderr.contains("--hotpotqa"), "{all:?}");
    let result = json(&all);
    let tasks: Vec<_> = result["scores"]
        .as_array()
        .expect("scores")
        .iter()
        .map(|s| s["task"].as_str().expect("a task"))
        .collect();
    assert_eq!((tasks.len(), tasks[0], tasks[11]), (12, "niah_single_1", "qa_1"));
    let with = |more: &[&str]| output(base.iter().chain(more));
    with(&["--tasks", "qa_2"]).assert_fails(2, &["qa_2", "--hotpotqa"]);
    with(&["--tasks", "niah"]).assert_fails(2, &["niah", "niah_single_1"]);
    with(&["--tasks", "vt", "--lengths", "200"]).assert_fails(2, &["vt", "200", "at least"]);
    with(&["--tasks", "vt", "--haystack", &folder.write("empty", b"")]).assert_fails(2, &["empty"]);
    let template = ["eval", "ruler", "-m", &model, "--tasks", "vt", "--lengths", "4K", "--limit", "1"];
    let said = output(template);
    assert!(
        said.code == Some(0) || said.stderr.contains("--raw"),
        "a template, or what to do without: {said:?}"
    );
}

#[test]
fn batch_consistency_fails_beyond_the_tolerance() {
    let (folder, model, text) = folder();
    let base = [
        "eval",
        "batch-consistency",
        "-m",
        &model,
        "-f",
        &text,
        "--lengths",
        "3,40,90",
        "-n",
        "4",
        "--chunks",
        "7",
        "--parallel",
        "2,3",
    ];
    let with = |more: &[&str]| output(base.iter().chain(more));
    let said = with(&["--json"]);
    let result = json(&said);
    let ways = result["ways"].as_array().expect("ways");
    assert!(
        ways.len() >= 6 && ways.iter().all(|w| w["tokens"] == 12 && w["within_tolerance"] == true),
        "{result}"
    );
    assert_eq!((&ways[0]["unequal"], &ways[0]["same"]), (&Value::from(0), &Value::from(12)), "once more");
    let f32 = ["--device", "reference", "-ctk", "f32", "-ctv", "f32"];
    let exact = with(&[&f32[..], &["--tolerance", "0"]].concat());
    exact.assert_succeeds();
    // The CPU rounds activations to 8 bits, the reference does not.
    let state = path_str(&folder.file("state"));
    let beyond = with(&[&f32[..], &["--tolerance", "0", "--devices", "cpu", "--state", &state]].concat());
    assert_eq!(beyond.code, Some(1), "{beyond:?}");
    assert!(beyond.stdout.contains("--device cpu") && beyond.stdout.contains("NO"), "{beyond:?}");
    assert!(
        beyond.stderr.contains("error: --device cpu") && beyond.stderr.contains("--tolerance"),
        "{beyond:?}"
    );
    let resumed = with(&[&f32[..], &["--tolerance", "1e9", "--devices", "cpu", "--state", &state]].concat());
    assert!(resumed.assert_succeeds().stderr.contains("parts are done already"), "{resumed:?}");
    with(&["--devices", "reference"]).assert_fails(2, &["f32"]);
    with(&["--tolerance", "-1"]).assert_fails(2, &["-1"]);
    with(&["--chunks", "0"]).assert_fails(2, &["--chunks"]);
    with(&["--lengths", "100000"]).assert_fails(2, &["100000"]);
}
