//! `clsa run` as scripts use it.
use super::*;

fn run(folder: &Folder, more: &[&str]) -> Said {
    let model = folder.model();
    output(["run", "-m", &model, "--temp", "0"].iter().chain(more))
}

#[test]
fn standard_output_is_the_text_alone() {
    let folder = Folder::with_model();
    let text = run(&folder, &["-p", "A long way to go", "-n", "24", "--ignore-eos"]);
    text.assert_succeeds();
    let json = run(&folder, &["-p", "A long way to go", "-n", "24", "--ignore-eos", "--json"]);
    let answer: serde_json::Value =
        serde_json::from_str(&json.assert_succeeds().stdout).expect("one JSON object");
    assert_eq!(answer["tokens"].as_array().map(Vec::len), Some(24));
    assert_eq!(answer["finish_reason"], "length");
    assert_eq!(text.stdout.trim_end_matches('\n'), answer["text"].as_str().expect("text"));
    let verbose = run(&folder, &["-p", "A long way to go", "-n", "24", "--ignore-eos", "-v"]);
    assert_eq!(verbose.assert_succeeds().stdout, text.stdout);
    for word in ["backend", "routing", "cache", "weights"] {
        assert!(verbose.stderr.contains(word), "{word}: {verbose:?}");
    }
}

#[test]
fn a_prompt_comes_from_an_argument_a_file_or_standard_input() {
    let folder = Folder::with_model();
    let text = "Two ways to say\nthe same";
    let file = folder.write("prompt.txt", text.as_bytes());
    let want = run(&folder, &["-p", text, "-n", "8"]);
    assert_eq!(run(&folder, &["-f", &file, "-n", "8"]).assert_succeeds().stdout, want.stdout);
    let model = folder.model();
    let piped = with_input(&["run", "-m", &model, "--temp", "0", "-n", "8"], text.as_bytes());
    assert_eq!(piped.assert_succeeds().stdout, want.stdout);
}

#[test]
fn prompts_that_cannot_be_used_are_errors() {
    let folder = Folder::with_model();
    let model = folder.model();
    let bytes = folder.write("prompt.bin", &[0xff, 0xfe, 0x00]);
    run(&folder, &["-f", &bytes, "-n", "1"]).assert_fails(2, &["UTF-8"]);
    run(&folder, &["-f", "/no/such/prompt", "-n", "1"]).assert_fails(2, &["/no/such/prompt"]);
    with_input(&["run", "-m", &model, "-n", "1"], b"").assert_fails(2, &["empty prompt"]);
    with_input(&["run", "-m", &model, "-n", "1"], b"\xc3(").assert_fails(2, &["UTF-8"]);
    let long = run(&folder, &["-p", &"word ".repeat(3000), "-c", "512", "-n", "1"]);
    long.assert_fails(2, &["512", "-c"]);
    let counts = long.stderr.split(|c: char| !c.is_ascii_digit()).filter(|n| n.len() > 2).count();
    assert_eq!(counts, 2, "both token counts: {long:?}");
}

#[test]
fn the_answer_depends_on_the_seed_and_nothing_else() {
    let folder = Folder::with_model();
    let sample = |more: &[&str]| {
        let model = folder.model();
        let args = ["run", "-m", &model, "-p", "Chance", "-n", "32", "--ignore-eos", "--temp", "1.5"];
        let said = output(args.iter().chain(more));
        said.assert_succeeds();
        said.stdout
    };
    let want = sample(&["--seed", "7"]);
    for same in [&["-t", "1"][..], &["-t", "3"], &["--ubatch-size", "1"], &["-c", "1024"]] {
        assert_eq!(sample(&[&["--seed", "7"], same].concat()), want, "{same:?}");
    }
    assert_ne!(sample(&["--seed", "8"]), want);
}

#[test]
fn every_routing_mode_answers() {
    let folder = Folder::with_model();
    let prompt = "a b c d e f g h ".repeat(30);
    let answer = |mode: &str| {
        let said = run(&folder, &["-p", &prompt, "-n", "12", "--ignore-eos", "--routing", mode]);
        said.assert_succeeds();
        said.stdout
    };
    let clsa = answer("clsa");
    assert_eq!(answer("per-layer"), clsa, "the same scores select the same positions");
    assert_eq!(answer("every-2"), clsa);
    for mode in ["dense", "block-16"] {
        assert!(!answer(mode).is_empty(), "{mode}");
    }
    let all = run(&folder, &["-p", &prompt, "-n", "12", "--ignore-eos", "--top-k-tokens", "4096"]);
    assert_eq!(all.assert_succeeds().stdout, answer("dense"), "selecting everything is dense attention");
}

#[test]
fn a_stop_string_ends_the_answer_before_it() {
    let folder = Folder::with_model();
    let whole = run(&folder, &["-p", "Stop", "-n", "24", "--ignore-eos"]).stdout;
    let text = whole.trim_end_matches('\n');
    let middle: String = text.chars().skip(text.chars().count() / 2).take(3).collect();
    let cut = run(&folder, &["-p", "Stop", "-n", "24", "--ignore-eos", "-r", &middle, "--json"]);
    let answer: serde_json::Value = serde_json::from_str(&cut.assert_succeeds().stdout).expect("JSON");
    assert_eq!(answer["finish_reason"], "stop");
    assert_eq!(answer["text"].as_str(), text.find(&middle).map(|at| &text[..at]));
}
