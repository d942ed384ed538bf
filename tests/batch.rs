//! `clsa batch` through the real binary: results, shared prefixes, bad lines, and being killed.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

const CLSA: &str = env!("CARGO_BIN_EXE_clsa");

struct Work {
    dir: tempfile::TempDir,
    model: PathBuf,
}

impl Work {
    fn new(jobs: &str) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let model = dir.path().join("tiny.gguf");
        let made = Command::new(CLSA)
            .args(["synth", "clsa-tiny", "--type", "Q8_0", "--seed", "3", "-o"])
            .arg(&model)
            .output()
            .expect("clsa synth");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        std::fs::write(dir.path().join("jobs.jsonl"), jobs).expect("jobs");
        Self { dir, model }
    }

    fn command(&self, output: &Path, more: &[&str]) -> Command {
        let mut command = Command::new(CLSA);
        command
            .args(["batch", "--no-timings", "--temp", "0", "-t", "1", "-m"])
            .arg(&self.model)
            .arg("-i")
            .arg(self.dir.path().join("jobs.jsonl"))
            .arg("-o")
            .arg(output)
            .args(more)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, name: &str, more: &[&str]) -> BTreeMap<String, String> {
        let output = self.dir.path().join(name);
        let done = self.command(&output, more).output().expect("clsa batch");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert!(done.stdout.is_empty(), "standard output is for results that were asked for there");
        by_id(&output)
    }
}

/// The lines of a results file by id.
fn by_id(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).expect("results");
    let lines = text.lines().map(|line| {
        let value: Value = serde_json::from_str(line).expect("a JSON line");
        let id = value.get("custom_id").or_else(|| value.get("id")).and_then(Value::as_str).expect("an id");
        (id.to_owned(), line.to_owned())
    });
    let (all, n) = (lines.collect::<BTreeMap<_, _>>(), text.lines().count());
    assert_eq!(all.len(), n, "a job has two results");
    all
}

/// Jobs about two documents, and some of their own, of uneven lengths.
fn jobs(n: usize) -> String {
    let document = |seed: usize| (0..40 + seed).map(|i| format!("line {i} of {seed}. ")).collect::<String>();
    (0..n)
        .map(|i| {
            let prompt = match i % 3 {
                0 => format!("{}Question {i}?", document(1)),
                1 => format!("{}Question {i}?", document(2)),
                _ => "x".repeat(1 + i * 7 % 90),
            };
            let max = 1 + i * 5 % 23;
            format!(
                "{}\n",
                serde_json::json!({ "id": format!("job {i}"), "prompt": prompt, "max_tokens": max })
            )
        })
        .collect()
}

#[test]
fn a_result_depends_neither_on_neighbours_nor_on_sharing() {
    let work = Work::new(&jobs(24));
    let one = work.run("one.jsonl", &["--parallel", "1"]);
    let many = work.run("many.jsonl", &["--parallel", "7", "--ubatch-size", "64"]);
    assert_eq!(one.len(), 24);
    assert_eq!(one, many);
    // Each prompt as the only job of its file shares nothing.
    for (i, line) in jobs(24).lines().enumerate().take(5) {
        let alone = Work::new(line);
        let result = alone.run("alone.jsonl", &[]);
        assert_eq!(result.get(&format!("job {i}")), one.get(&format!("job {i}")));
    }
}

#[test]
fn killed_at_any_moment_it_goes_on() {
    let work = Work::new(&jobs(40));
    let whole = work.run("whole.jsonl", &["--parallel", "4"]);
    let output = work.dir.path().join("killed.jsonl");
    let mut kills = 0;
    for attempt in 0..60u64 {
        let mut child =
            work.command(&output, &["--parallel", "4"]).stderr(Stdio::null()).spawn().expect("clsa batch");
        std::thread::sleep(Duration::from_millis(20 + attempt * 37 % 160));
        if child.try_wait().expect("a status").is_some_and(|s| s.success()) {
            break;
        }
        kills += 1;
        child.kill().expect("kill");
        child.wait().expect("a status");
    }
    let finished = work.command(&output, &["--parallel", "4"]).output().expect("clsa batch");
    assert!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
    assert_eq!(by_id(&output), whole, "after {kills} kills");
}

#[test]
fn bad_lines_are_results_and_the_rest_goes_on() {
    let lines = [
        r#"{"id": "good", "prompt": "abc", "max_tokens": 2}"#,
        "not json",
        r#"{"id": "gone", "prompt": "abc", "documents": ["missing.txt"]}"#,
        r#"{"custom_id": "open", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [], "n": 3}}"#,
        r#"{"id": "long", "prompt": "abc", "max_tokens": 99999999}"#,
    ];
    let work = Work::new(&lines.join("\n"));
    let results = work.run("r.jsonl", &[]);
    assert_eq!(results.len(), 5);
    let error = |id: &str| serde_json::from_str::<Value>(&results[id]).expect("JSON")["error"].to_string();
    assert_eq!(error("good"), "null");
    assert!(error("line-2").contains("not JSON"));
    assert!(error("gone").contains("missing.txt"));
    assert!(error("open").contains("one answer"));
    assert!(error("long").contains("context holds"));
    // A second run finds all of them done.
    assert_eq!(work.run("r.jsonl", &[]), results);
}

#[test]
fn two_jobs_of_one_name_and_foreign_files_are_refused() {
    let work = Work::new("{\"id\": 1, \"prompt\": \"a\"}\n{\"id\": \"1\", \"prompt\": \"b\"}\n");
    let output = work.dir.path().join("r.jsonl");
    let done = work.command(&output, &[]).output().expect("clsa batch");
    assert_eq!(done.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&done.stderr).contains("line 2"));
    std::fs::write(&output, "my notes\n").expect("a file");
    let done = work.command(&output, &[]).output().expect("clsa batch");
    assert_eq!(done.status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&output).expect("the file"), "my notes\n");
}
