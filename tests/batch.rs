//! `clsa batch` through the real binary: results, shared prefixes, bad lines, and being killed.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

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

/// Kills a run of `n` jobs `kills` times, at random moments before its last job ends, and compares with a run that nobody killed.
/// Answers are `length` times as long as those of [`jobs`].
fn killed(n: usize, kills: usize, length: u64) {
    let lines: String = (jobs(n).lines())
        .map(|line| {
            let mut job: Value = serde_json::from_str(line).expect("a job");
            job["max_tokens"] = (job["max_tokens"].as_u64().expect("a number") * length).into();
            format!("{job}\n")
        })
        .collect();
    let work = Work::new(&lines);
    let more = ["--parallel", "4"];
    let spawn =
        |output: &Path| work.command(output, &more).stderr(Stdio::null()).spawn().expect("clsa batch");
    let results =
        |output: &Path| std::fs::read(output).unwrap_or_default().iter().filter(|b| **b == b'\n').count();
    // When the first result comes, and how long one takes.
    let path = work.dir.path().join("whole.jsonl");
    let started = Instant::now();
    let mut child = spawn(&path);
    while results(&path) == 0 && child.try_wait().expect("a status").is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let first = started.elapsed();
    assert!(child.wait().expect("a status").success());
    let each = (started.elapsed() - first) / n as u32;
    let whole = by_id(&path);
    // Moments: a number of results, up to nine tenths of them, and some time after that one, or in the start of the program.
    let mut random = 1u64;
    let mut uniform = |most: usize| {
        // Knuth's multiplier.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % most
    };
    let mut moments: Vec<usize> = (0..kills).map(|_| uniform(n * 9 / 10)).collect();
    moments.sort_unstable();
    let output = work.dir.path().join("killed.jsonl");
    let mut starting = 0;
    for (kill, moment) in moments.into_iter().enumerate() {
        let mut child = spawn(&output);
        let (before, part) = (results(&output), uniform(256) as u32);
        let wait = if before < moment { each } else { first };
        starting += usize::from(before >= moment);
        let ended = |child: &mut std::process::Child| child.try_wait().expect("a status").is_some();
        while results(&output) < moment && !ended(&mut child) {
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(wait * part / 256);
        assert!(!ended(&mut child), "kill {kill}: the run had ended, with {} results", results(&output));
        child.kill().expect("kill");
        child.wait().expect("a status");
    }
    let before = results(&output);
    let finished = work.command(&output, &more).output().expect("clsa batch");
    assert!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
    assert_eq!(by_id(&output), whole, "after {kills} kills");
    println!(
        "{n} jobs, {kills} kills, {starting} of them soon after a start; {before} results before the last run, all byte-identical"
    );
    assert!((1..n).contains(&before), "{before} results before the last run");
}

#[test]
fn killed_at_any_moment_it_goes_on() {
    killed(60, 12, 4);
}

#[test]
#[ignore = "slow: a thousand jobs, killed fifty times"]
fn killed_fifty_times_it_goes_on() {
    killed(1000, 50, 10);
}

#[test]
fn bad_lines_are_results_and_the_rest_goes_on() {
    let lines = [
        r#"{"id": "good", "prompt": "abc", "max_tokens": 2}"#,
        "not json",
        r#"{"custom_id": "open", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [], "n": 3}}"#,
        r#"{"id": "long", "prompt": "abc", "max_tokens": 99999999}"#,
    ];
    let work = Work::new(&lines.join("\n"));
    let results = work.run("r.jsonl", &[]);
    assert_eq!(results.len(), 4);
    let error = |id: &str| serde_json::from_str::<Value>(&results[id]).expect("JSON")["error"].to_string();
    assert_eq!(error("good"), "null");
    assert!(error("line-2").contains("not JSON"));
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

fn code_and_error(done: &std::process::Output) -> (Option<i32>, String) {
    (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
}

#[test]
fn a_vanished_document_holds_up_its_own_jobs_only() {
    let lines = [
        r#"{"id": "good", "prompt": "abc", "max_tokens": 2}"#,
        r#"{"id": "gone", "prompt": "abc", "documents": ["missing.txt"], "max_tokens": 2}"#,
    ];
    let work = Work::new(&lines.join("\n"));
    let output = work.dir.path().join("r.jsonl");
    let (code, said) = code_and_error(&work.command(&output, &[]).output().expect("clsa batch"));
    assert_eq!(code, Some(1));
    assert!(said.contains("missing.txt") && said.contains("put it back"), "{said}");
    assert_eq!(by_id(&output).keys().collect::<Vec<_>>(), ["good"]);
    std::fs::write(work.dir.path().join("missing.txt"), "a document").expect("a file");
    assert_eq!(work.run("r.jsonl", &[]).len(), 2);
}

#[test]
fn a_full_disk_stops_the_run_which_then_goes_on() {
    let work = Work::new(&jobs(40));
    let whole = work.run("whole.jsonl", &[]);
    let output = work.dir.path().join("r.jsonl");
    // No file may grow beyond one block here; the signal for it is ignored, so that the write fails.
    let command = work.command(&output, &["--ordered"]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 2; exec \"$0\" \"$@\""]).arg(command.get_program());
    let (code, said) = code_and_error(&limited.args(command.get_args()).output().expect("sh"));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("make room on that disk") && said.contains("File too large"), "{said}");
    let some = by_id(&output).len();
    assert!(some > 0 && some < 40, "{some} results");
    assert_eq!(work.run("r.jsonl", &["--ordered"]), whole);
}

#[test]
fn one_interrupt_finishes_what_runs_and_two_leave() {
    // Long answers, so that both come in their midst.
    let lines: String = (0..6)
        .map(|i| format!("{{\"id\": \"{i}\", \"prompt\": \"{i} abc\", \"max_tokens\": 1500}}\n"))
        .collect();
    let work = Work::new(&lines);
    let more = ["--parallel", "2"];
    let whole = work.run("whole.jsonl", &more);
    let mut finished = 0;
    for signals in [1, 2] {
        let output = work.dir.path().join(format!("r{signals}.jsonl"));
        let child = work.command(&output, &more).stderr(Stdio::piped()).spawn().expect("clsa batch");
        while !output.exists() {
            std::thread::sleep(Duration::from_millis(2));
        }
        // Until the jobs run.
        std::thread::sleep(Duration::from_millis(100));
        for _ in 0..signals {
            let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
            assert!(sent.expect("kill").success());
            std::thread::sleep(Duration::from_millis(30));
        }
        let (code, said) = code_and_error(&child.wait_with_output().expect("it ends"));
        assert_eq!(code, Some(130), "{said}");
        let done = by_id(&output).len();
        match signals {
            // What ran has ended, and nothing was begun.
            1 => assert!((2..6).contains(&done), "{said}"),
            _ => assert!(done < finished, "{done} of {finished}: {said}"),
        }
        finished = done;
        assert!(said.contains("are brought to their end"), "{said}");
        assert!(said.contains(&format!("{} jobs are left", 6 - done)), "{said}");
        assert_eq!(work.run(&format!("r{signals}.jsonl"), &more), whole);
    }
}

#[test]
fn ordered_results_are_the_same_file_after_any_kill() {
    let work = Work::new(&jobs(30));
    let (whole, killed) = (work.dir.path().join("whole.jsonl"), work.dir.path().join("killed.jsonl"));
    work.run("whole.jsonl", &["--ordered", "--parallel", "5"]);
    let ids: Vec<_> = std::fs::read_to_string(&whole)
        .expect("results")
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).expect("JSON")["id"].as_str().expect("an id").to_owned())
        .collect();
    assert_eq!(ids, (0..30).map(|i| format!("job {i}")).collect::<Vec<_>>());
    for wait in [30, 50, 70, 90] {
        let mut child = work
            .command(&killed, &["--ordered", "--parallel", "5"])
            .stderr(Stdio::null())
            .spawn()
            .expect("clsa batch");
        std::thread::sleep(Duration::from_millis(wait));
        let _ = child.kill();
        child.wait().expect("a status");
    }
    work.run("killed.jsonl", &["--ordered", "--parallel", "5"]);
    assert_eq!(std::fs::read(&killed).expect("results"), std::fs::read(&whole).expect("results"));
    assert!(!work.dir.path().join("killed.jsonl.early").exists());
}

#[test]
fn prefixes_are_kept_on_disk_and_damaged_ones_are_not_used() {
    let document = "A line of a document. ".repeat(60);
    let line = |i: usize| {
        let prompt = format!("Question {i}?");
        let documents = [serde_json::json!({ "text": document })];
        let id = format!("job {i}");
        serde_json::json!({ "id": id, "prompt": prompt, "documents": documents, "max_tokens": 9 })
    };
    let work = Work::new(&line(0).to_string());
    let cache = work.dir.path().join("cache");
    let cached = ["--cache-dir", cache.to_str().expect("UTF-8"), "--log-json"];
    let run = |work: &Work, name: &str, more: &[&str]| {
        let output = work.dir.path().join(name);
        let done = work.command(&output, more).output().expect("clsa batch");
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{said}");
        let last = said.lines().last().expect("a summary");
        let summary: Value = serde_json::from_str(last).expect("a JSON line");
        assert_eq!(summary["event"], "summary");
        let read = summary["prompt_tokens_read"].as_u64().expect("a number");
        (by_id(&output), read, said)
    };
    let (_, read, _) = run(&work, "first.jsonl", &cached);
    assert_eq!(read, 0);
    // Another question about the same document finds it, and says what it says without.
    std::fs::write(work.dir.path().join("jobs.jsonl"), line(1).to_string()).expect("jobs");
    let plain = work.run("plain.jsonl", &[]);
    let (found, read, _) = run(&work, "second.jsonl", &cached);
    assert!(read > 1000, "{read} tokens were read");
    assert_eq!(found, plain);
    // Damage is a note, not an error, and is mended.
    let file =
        std::fs::read_dir(&cache).expect("the folder").next().expect("a file").expect("an entry").path();
    let mut bytes = std::fs::read(&file).expect("the file");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).expect("the file");
    let (found, read, said) = run(&work, "third.jsonl", &cached);
    assert_eq!((found, read), (plain.clone(), 0));
    assert!(said.contains("damaged"), "{said}");
    let (found, read, _) = run(&work, "fourth.jsonl", &cached);
    assert!(read > 1000 && found == plain);
    // Nothing of a size that is not allowed stays.
    let (found, ..) = run(&work, "fifth.jsonl", &[&cached[..], &["--cache-size", "1K"]].concat());
    assert_eq!(found, plain);
}

#[test]
fn formats_of_answers_hold_and_bad_ones_are_results() {
    let line = |i: usize, more: &str| {
        format!("{{\"id\": \"{i}\", \"prompt\": \"{i}: \", \"max_tokens\": 200, {more}}}\n")
    };
    let lines: String = (0..12)
        .map(|i| match i % 3 {
            0 => line(i, r#""json_schema": {"enum": ["red", "green", 7]}"#),
            1 => line(i, r#""response_format": {"type": "json_object"}, "params": {"temperature": 1}"#),
            _ => line(i, r#""grammar": "start: \"yes\" | \"no\"""#),
        })
        .chain([line(99, r#""json_schema": {"type": "colour"}"#)])
        .collect();
    let work = Work::new(&lines);
    let results = work.run("r.jsonl", &["--parallel", "5"]);
    let mut ended = 0;
    for (id, result) in &results {
        let result: Value = serde_json::from_str(result).expect("JSON");
        if id == "99" {
            assert!(result["error"].as_str().expect("an error").contains("colour"), "{result}");
            continue;
        }
        if result["finish_reason"] != "stop" {
            continue;
        }
        ended += 1;
        let text = result["text"].as_str().expect("text");
        match id.parse::<usize>().expect("a number") % 3 {
            0 => assert!(["\"red\"", "\"green\"", "7"].contains(&text), "{result}"),
            1 => assert!(serde_json::from_str::<Value>(text).is_ok_and(|v| v.is_object()), "{result}"),
            _ => assert!(["yes", "no"].contains(&text), "{result}"),
        }
    }
    assert!(ended >= 8, "{ended} answers ended");
    // One on the command line that is wrong is no result of every job.
    let output = work.dir.path().join("wrong.jsonl");
    let done = work.command(&output, &["--grammar", "start: ("]).output().expect("clsa batch");
    let (code, said) = code_and_error(&done);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("grammar") && !output.exists(), "{said}");
    assert_eq!(work.run("one.jsonl", &["--parallel", "1"]), results);
}

#[test]
fn a_dry_run_estimates_and_writes_nothing() {
    let work = Work::new(&jobs(12));
    let output = work.dir.path().join("r.jsonl");
    let done = work.command(&output, &["--dry-run"]).output().expect("clsa batch");
    let (code, said) = code_and_error(&done);
    assert_eq!(code, Some(0), "{said}");
    for word in ["12 to do", "prefixes   2 shared", "memory", "measured", "time       at most"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(std::fs::metadata(&output).map_or(0, |m| m.len()), 0);
}
