//! The real binary: exit codes, what goes to standard output and what to standard error, signals, pipes.
mod bench;
mod eval;
mod run;
mod signals;
mod structured;
mod usage;

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The binary under test, with nothing on standard input and none of the caller's settings.
fn clsa<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_clsa"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CLSA_")) {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs to the end.
fn output<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Said {
    said(clsa(args).output().expect("the binary runs"))
}

/// What a run said and how it ended.
#[derive(Debug)]
struct Said {
    /// The exit code; `None` where a signal ended it.
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn said(out: Output) -> Said {
    Said {
        code: out.status.code(),
        stdout: String::from_utf8(out.stdout).expect("standard output is UTF-8"),
        stderr: String::from_utf8(out.stderr).expect("standard error is UTF-8"),
    }
}

impl Said {
    /// A failure: this exit code, nothing on standard output, one error of one line that holds every one of `words`.
    fn assert_fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
        let errors = self.stderr.lines().filter(|l| l.starts_with("error: ")).count();
        assert_eq!(errors, 1, "one error, printed once: {self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not said: {self:?}");
        }
    }

    fn assert_succeeds(&self) -> &Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert!(!self.stderr.contains('\u{1b}') && !self.stdout.contains('\u{1b}'), "no colours: {self:?}");
        self
    }
}

/// A folder with a tiny model in it.
struct Folder(tempfile::TempDir);

impl Folder {
    fn empty() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn with_model() -> Self {
        let folder = Self::empty();
        let model = folder.file("model.gguf");
        let args: [&OsStr; 8] =
            ["synth", "clsa-tiny", "--type", "Q8_0", "--seed", "1", "-o", ""].map(OsStr::new);
        output(args[..7].iter().copied().chain([model.as_os_str()])).assert_succeeds();
        folder
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn model(&self) -> String {
        path_str(&self.file("model.gguf"))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.file(name);
        std::fs::write(&path, bytes).expect("a file");
        path_str(&path)
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).expect("the folder");
        let mut names: Vec<String> =
            entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

fn path_str(path: &Path) -> String {
    path.to_str().expect("a path of UTF-8").to_owned()
}

/// Runs with `text` on standard input.
fn with_input(args: &[&str], text: &[u8]) -> Said {
    let mut child = clsa(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut stdin = child.stdin.take().expect("a pipe");
    // The other end may have refused and gone.
    let _ = stdin.write_all(text);
    drop(stdin);
    said(child.wait_with_output().expect("it ends"))
}
