//! Interrupts: exit code 130, what was said stays said, nothing half-written is left.
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::*;

fn send(child: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &child.id().to_string()]).status().expect("kill");
    assert!(status.success(), "{signal}");
}

#[test]
fn an_interrupted_answer_keeps_what_was_said() {
    let folder = Folder::with_model();
    let mut child =
        clsa(["run", "-m", &folder.model(), "-p", "Go on", "-n", "4000", "--ignore-eos", "-c", "4096"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
    let mut first = [0u8; 8];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut first).expect("it says something");
    send(&child, "-INT");
    let out = child.wait_with_output().expect("it ends");
    assert_eq!(out.status.code(), Some(130), "{out:?}");
    assert!(String::from_utf8_lossy(&out.stderr).contains("interrupted"), "{out:?}");
}

#[test]
fn an_interrupted_conversion_leaves_the_old_file_and_nothing_else() {
    let folder = Folder::empty();
    let out = folder.write("model.gguf", b"the file that was there");
    // The 4B shape takes long enough to be interrupted in the middle.
    let mut child = clsa(["synth", "clsa-4b", "--type", "Q4_K_M", "-o", &out])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    while folder.names().len() == 1 {
        assert!(child.try_wait().expect("its state").is_none(), "it ended before it wrote anything");
        std::thread::sleep(Duration::from_millis(5));
    }
    send(&child, "-INT");
    let said = said(child.wait_with_output().expect("it ends"));
    said.assert_fails(130, &["interrupted"]);
    assert_eq!(folder.names(), ["model.gguf"]);
    assert_eq!(std::fs::read(out).expect("the old file"), b"the file that was there");
}
