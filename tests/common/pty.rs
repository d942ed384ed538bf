//! The real binary in a pseudo-terminal.
#![allow(dead_code)]
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use expectrl::process::unix::{PtyStream, UnixProcess, WaitStatus};
use expectrl::{Expect, Needle, Session};

/// The end of line editing: what follows is what the program says.
pub const EDITED: &str = "\x1b[?2004l";
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A home for one test: state, working folder, model.
pub struct Home {
    dir: tempfile::TempDir,
    model: PathBuf,
    template: bool,
}

impl Home {
    /// The bundled model where it is there, and a tiny one of random weights in a fresh clone.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smol-clsa-135m.gguf");
        if bundled.is_file() {
            return Self { dir, model: bundled, template: true };
        }
        Self::tiny_in(dir)
    }

    /// The tiny model in any case.
    pub fn tiny() -> Self {
        Self::tiny_in(tempfile::tempdir().expect("a temporary folder"))
    }

    fn tiny_in(dir: tempfile::TempDir) -> Self {
        let model = dir.path().join("tiny.gguf");
        let made = Command::new(env!("CARGO_BIN_EXE_clsa"))
            .args(["synth", "clsa-tiny", "--type", "Q8_0", "-o"])
            .arg(&model)
            .output()
            .expect("clsa synth runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Self { dir, model, template: false }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn model(&self) -> &Path {
        &self.model
    }

    /// `clsa SUBCOMMAND ARGS` with this home's model and state, one thread, no colour.
    pub fn command(&self, subcommand: &str, args: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_clsa"));
        c.arg(subcommand).args(args).arg("-m").arg(&self.model).args(["-t", "1"]);
        if !self.template && !args.contains(&"--no-chat") && !args.contains(&"--chat-template") {
            c.args(["--chat-template", TEMPLATE]);
        }
        c.current_dir(self.dir.path())
            .env("XDG_STATE_HOME", self.path("state"))
            .env("TERM", "xterm-256color")
            .env("NO_COLOR", "1");
        c
    }

    /// A chat in a terminal, greedy, up to its first prompt.
    pub fn chat(&self, args: &[&str]) -> Chat {
        let size: &[&str] = if args.contains(&"-c") { &[] } else { &["-c", "4096"] };
        let mut chat = Chat::spawn(self.command("chat", &[&["--temp", "0"], size, args].concat()));
        chat.expect(">>> ");
        chat
    }
}

/// ChatML without control tokens, which the tiny vocabulary lacks.
pub const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ";

/// A running chat.
pub struct Chat {
    session: Session<UnixProcess, PtyStream>,
}

impl Chat {
    pub fn spawn(command: Command) -> Self {
        let mut session = Session::spawn(command).expect("a pseudo-terminal");
        session.get_process_mut().set_window_size(100, 30).expect("a window size");
        Self { session }
    }

    pub fn send(&mut self, text: &str) {
        self.session.send(text).expect("the terminal takes input");
    }

    /// Waits for `needle`; returns what came before it.
    pub fn expect(&mut self, needle: &str) -> String {
        self.wait(needle, needle)
    }

    fn wait(&mut self, needle: impl Needle, name: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.session.check(&needle) {
                Ok(found) if !found.is_empty() => {
                    return String::from_utf8_lossy(found.before()).into_owned();
                }
                Ok(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                result => {
                    let mut rest = [0; 4096];
                    let n = self.session.try_read(&mut rest).unwrap_or(0);
                    panic!("no {name:?}: {:?} {:?}", result.err(), String::from_utf8_lossy(&rest[..n]));
                }
            }
        }
    }

    /// Enters a command; returns what it says.
    pub fn command(&mut self, line: &str) -> String {
        self.send(&format!("{line}\r"));
        self.expect(EDITED);
        self.expect(">>> ")
    }

    /// Says something; returns the answer and the line after it.
    pub fn ask(&mut self, line: &str) -> (String, String) {
        self.send(&format!("{line}\r"));
        self.expect(EDITED);
        self.answer()
    }

    /// The answer that comes now, and the line after it.
    pub fn answer(&mut self) -> (String, String) {
        let answer = self.expect("\r\nprompt ");
        (answer.trim_start().replace("\r\n", "\n"), self.expect(">>> "))
    }

    pub fn resize(&mut self, columns: u16, rows: u16) {
        self.session.get_process_mut().set_window_size(columns, rows).expect("a window size");
    }

    pub fn signal(&self, name: &str) {
        let pid = self.session.get_process().pid().to_string();
        let sent = Command::new("kill").args(["-s", name, &pid]).status().expect("kill runs");
        assert!(sent.success());
    }

    /// Waits for the end; returns the exit code.
    pub fn exit_code(&mut self) -> i32 {
        let end = Instant::now() + PATIENCE;
        loop {
            // Output that nobody reads would keep it from ending.
            let mut rest = [0; 4096];
            let _ = self.session.try_read(&mut rest);
            match self.session.get_process().status() {
                Ok(WaitStatus::Exited(_, code)) => return code,
                Ok(WaitStatus::StillAlive) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
