//! Help, versions, arguments.
use std::process::Stdio;

use super::*;

/// Names of the subcommands, as the help lists them.
fn commands() -> Vec<String> {
    let help = output(["--help"]);
    let list =
        help.assert_succeeds().stdout.split("Commands:").nth(1).expect("a list of commands").to_owned();
    let lines = list.lines().skip(1).take_while(|l| !l.is_empty());
    lines.filter_map(|l| l.split_whitespace().next().map(str::to_owned)).filter(|c| c != "help").collect()
}

#[test]
fn every_command_has_help() {
    let commands = commands();
    for expected in ["bench", "convert", "inspect", "quantize", "run", "synth", "verify"] {
        assert!(commands.iter().any(|c| c == expected), "{expected} is not among {commands:?}");
    }
    for command in commands {
        for flag in ["--help", "-h"] {
            let help = output([command.as_str(), flag]);
            help.assert_succeeds();
            assert!(help.stdout.contains("Usage: clsa"), "{help:?}");
            assert_eq!(help.stderr, "", "{help:?}");
        }
    }
}

#[test]
fn the_version_is_that_of_the_package() {
    for flag in ["--version", "-V"] {
        let version = output([flag]);
        let first = version.assert_succeeds().stdout.lines().next().unwrap_or_default().to_owned();
        assert!(first.starts_with(concat!("clsa ", env!("CARGO_PKG_VERSION"))), "{first}");
    }
}

#[test]
fn bad_arguments_are_named() {
    let folder = Folder::with_model();
    let model = folder.model();
    let out = path_str(&folder.file("out.gguf"));
    let cases: [(&[&str], &[&str]); 12] = [
        (&["conver"], &["conver"]),
        (&["run", "--no-such-flag"], &["--no-such-flag"]),
        (&["run", "-m", &model, "-p", "x", "--routing", "sparse"], &["sparse", "clsa, dense, per-layer"]),
        (&["run", "-m", &model, "-p", "x", "--routing", "block-0"], &["block-0"]),
        (&["run", "-m", &model, "-p", "x", "--top-k-tokens", "0"], &["top-k-tokens"]),
        (&["run", "-m", &model, "-p", "x", "-ctk", "q4_0"], &["q4_0", "q8_0"]),
        (&["run", "-m", &model, "-p", "x", "-t", "100000"], &["100000"]),
        (&["run", "-m", &model, "-p", "x", "-n", "-5"], &["-5"]),
        (&["run", "-m", &model, "-p", "x", "-f", "y"], &["cannot be used with"]),
        (&["synth", "clsa-5b", "-o", &out], &["clsa-5b", "clsa-4b"]),
        (&["synth", "clsa-tiny", "-o", &out, "--type", "Q9_K"], &["Q9_K", "Q4_K_M"]),
        (&["quantize", &model, &out, "Q9_K"], &["Q9_K"]),
    ];
    for (args, words) in cases {
        output(args).assert_fails(2, words);
    }
    assert_eq!(folder.names(), ["model.gguf"], "nothing was written");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let folder = Folder::with_model();
    let out = path_str(&folder.file("out.gguf"));
    let nothing = path_str(&folder.file("nothing.gguf"));
    let text = folder.write("text.gguf", b"no model at all, but long enough to hold a header");
    let folder_name = path_str(folder.0.path());
    for path in [&nothing, &text, &folder_name, &folder.write("empty.gguf", b"")] {
        for args in [
            &["run", "-m", path, "-p", "x"][..],
            &["inspect", path],
            &["verify", path],
            &["quantize", path, &out, "Q8_0"],
        ] {
            output(args).assert_fails(2, &[path]);
        }
    }
    output(["convert", &nothing, "-o", &out]).assert_fails(2, &[&nothing]);
    output(["convert", &folder_name, "-o", &out]).assert_fails(2, &["safetensors"]);
    assert!(!folder.names().contains(&"out.gguf".to_owned()), "nothing was written");
}

#[test]
fn results_that_cannot_be_written_are_a_failure() {
    let folder = Folder::with_model();
    for args in [
        &["inspect", &folder.model()][..],
        &["verify", &folder.model()],
        &["run", "-m", &folder.model(), "-p", "x", "-n", "4"],
    ] {
        let full = std::fs::File::options().write(true).open("/dev/full").expect("/dev/full");
        let said = said(clsa(args).stdout(Stdio::from(full)).output().expect("the binary runs"));
        said.assert_fails(1, &["No space left"]);
    }
    output(["synth", "clsa-tiny", "-o", &path_str(&folder.file("no/such/folder.gguf"))])
        .assert_fails(1, &["no/such"]);
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let folder = Folder::with_model();
    for args in [
        &["inspect", "--tensors", "--json", &folder.model()][..],
        &["run", "-m", &folder.model(), "-p", "x", "-n", "500", "--ignore-eos"],
    ] {
        let mut child =
            clsa(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
        drop(child.stdout.take());
        let said = said(child.wait_with_output().expect("it ends"));
        assert_eq!((said.code, said.stderr.contains("error")), (Some(0), false), "{said:?}");
    }
}
