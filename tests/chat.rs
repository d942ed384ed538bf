//! Chat: the real binary in a pseudo-terminal, and in pipes.
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

#[path = "common/pty.rs"]
mod pty;
use pty::{Chat, Home};

/// An $EDITOR that keeps what it was given and, if `replacement` is not empty, writes that instead.
fn editor(home: &Home, replacement: &str) -> (PathBuf, PathBuf) {
    let (script, seen) = (home.path("editor.sh"), home.path("seen"));
    let write =
        if replacement.is_empty() { String::new() } else { format!("printf %s '{replacement}' > \"$1\"\n") };
    std::fs::write(&script, format!("#!/bin/sh\ncp \"$1\" {}\n{write}", seen.display())).unwrap();
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    (script, seen)
}

fn with_editor(home: &Home, script: &std::path::Path, args: &[&str]) -> Chat {
    let mut command = home.command("chat", &[&["--temp", "0", "-c", "4096"], args].concat());
    command.env("EDITOR", script).env_remove("VISUAL");
    let mut chat = Chat::spawn(command);
    chat.expect(">>> ");
    chat
}

fn piped(home: &Home, args: &[&str], stdin: &str) -> Output {
    let mut command = home.command("chat", args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn two_turns_reuse_what_is_cached_and_history_survives_a_restart() {
    let home = Home::new();
    let mut chat = home.chat(&["-n", "12"]);
    let (first, line) = chat.ask("What is the capital of France?");
    assert!(!first.is_empty());
    assert!(
        line.contains("answer 12 tokens") && !line.contains("cached") && line.contains("/4,096"),
        "{line}"
    );
    let (_, line) = chat.ask("And of Italy?");
    assert!(line.contains(" cached)"), "{line}");
    assert!(chat.command("/stats").contains("answers    2"));
    chat.send("/exit\r");
    assert_eq!(chat.exit_code(), 0);

    let mut again = home.chat(&["-n", "4"]);
    // Two entries up: /exit, /stats, then the last message.
    again.send("\x1b[A\x1b[A\x1b[A");
    again.expect("And of Italy?");
    again.send("\r");
    again.expect("\r\nprompt ");
    again.expect(">>> ");
    again.send("\x04");
    assert_eq!(again.exit_code(), 0, "Ctrl-D leaves");
}

#[test]
fn ctrl_c_keeps_what_was_said_and_twice_at_the_prompt_leaves() {
    let home = Home::new();
    // A fast machine says thousands of tokens until it is stopped, and they are more when they are read again.
    let mut chat = home.chat(&["--ignore-eos", "-c", "65536"]);
    chat.send("Tell me a long story.\r");
    chat.expect(pty::EDITED);
    std::thread::sleep(Duration::from_millis(500));
    chat.send("\x03");
    let (answer, line) = chat.answer();
    assert!(line.contains("(stopped)"), "{line}");
    assert!(answer.len() > 3, "{answer:?}");
    // The partial answer is part of the conversation: the next prompt finds it in the cache.
    chat.command("/set max-tokens 3");
    let (_, line) = chat.ask("Go on.");
    let cached: usize =
        line.split(" cached").next().unwrap().rsplit('(').next().unwrap().replace(',', "").parse().unwrap();
    assert!(cached > 20, "{line}");
    chat.send("half a line\x03");
    chat.expect("Ctrl-C again");
    chat.expect(">>> ");
    chat.send("\x03");
    assert_eq!(chat.exit_code(), 0);
}

#[test]
fn several_lines_reach_the_model_as_they_were_typed_or_pasted() {
    let home = Home::new();
    let (script, seen) = editor(&home, "");
    let mut chat = with_editor(&home, &script, &["-n", "2"]);
    for (keys, message) in [
        ("\x1b[200~one \\\ntwo\n/three\x1b[201~\r", "one \\\ntwo\n/three"),
        ("\"\"\"a\r\rb\"\"\"\r", "a\n\nb"),
        ("first\\\rsecond\r", "first\nsecond"),
    ] {
        chat.send(keys);
        chat.expect(pty::EDITED);
        chat.answer();
        let said = chat.command("/edit");
        assert!(said.contains("not changed"), "{said}");
        assert_eq!(std::fs::read_to_string(&seen).unwrap(), message);
    }
}

#[test]
fn an_edited_message_takes_the_place_of_the_last_one() {
    let home = Home::new();
    let (script, _) = editor(&home, "What is two plus two?");
    let mut chat = with_editor(&home, &script, &["-n", "4"]);
    chat.ask("What is one plus one?");
    chat.send("/edit\r");
    chat.expect(pty::EDITED);
    let (_, line) = chat.answer();
    assert!(line.contains(" cached)"), "{line}");
    assert!(chat.command("/stats").contains("1 turn\r\n"));
    assert!(chat.command("/undo").contains("took back: What is two plus two?"));
    assert!(chat.command("/undo").contains("nothing to take back"));
}

#[test]
fn a_saved_session_goes_on_byte_for_byte() {
    let home = Home::new();
    let file = home.path("s.session").display().to_string();
    let mut live = home.chat(&["-n", "24"]);
    live.ask("Name three colours.");
    assert!(live.command(&format!("/save {file}")).contains("saved"));
    let (want, _) = live.ask("And three animals?");
    let (want_again, _) = {
        live.send("/regen\r");
        live.expect(pty::EDITED);
        live.answer()
    };
    assert_eq!(want, want_again, "another greedy answer to the same prompt is the same");

    let mut loaded = home.chat(&["-n", "24"]);
    let said = loaded.command(&format!("/load {file}"));
    assert!(said.contains("1 turn,") && said.contains("Name three colours."), "{said}");
    let (got, line) = loaded.ask("And three animals?");
    assert_eq!(got, want);
    assert!(line.contains(" cached)"), "{line}");

    // With --session the file is loaded at the start and kept up to date.
    let mut session = home.chat(&["-n", "24", "--session", &file]);
    let (got, _) = session.ask("And three animals?");
    assert_eq!(got, want);
    session.send("/bye\r");
    assert_eq!(session.exit_code(), 0);
    let mut later = home.chat(&["--session", &file]);
    assert!(later.command("/stats").contains("2 turns"));
}

#[test]
fn a_session_that_does_not_fit_leaves_the_conversation_as_it_is() {
    let home = Home::new();
    let file = home.path("s.session").display().to_string();
    let mut chat = home.chat(&["-n", "4"]);
    chat.ask("Hello");
    chat.command(&format!("/save {file}"));
    let mut other = home.chat(&["-n", "4", "-ctk", "q8_0"]);
    other.ask("Hi");
    let said = other.command(&format!("/load {file}"));
    assert!(said.contains("cannot be used here") && said.contains("-ctk"), "{said}");
    assert!(other.command("/stats").contains("1 turn"));
    let (_, line) = other.ask("Still there?");
    assert!(line.contains(" cached)"), "{line}");
    std::fs::write(home.path("bad"), "not a session").unwrap();
    assert!(other.command("/load bad").contains("no session file"));
    assert!(other.command("/load missing").contains("missing"));
}

#[test]
fn sigterm_and_sighup_save_the_session() {
    let home = Home::new();
    for (signal, wait) in [("TERM", false), ("HUP", false), ("TERM", true)] {
        let file = home.path(&format!("{signal}-{wait}.session"));
        let mut chat = home.chat(&["--session", &file.display().to_string(), "-n", "4"]);
        chat.ask("Hello");
        if wait {
            // In the middle of an answer.
            chat.command("/set max-tokens unlimited");
            chat.send("Tell me a long story.\r");
            chat.expect(pty::EDITED);
            std::thread::sleep(Duration::from_millis(500));
        }
        chat.signal(signal);
        assert_eq!(chat.exit_code(), 130);
        let mut again = home.chat(&["--session", &file.display().to_string()]);
        let stats = again.command("/stats");
        assert!(stats.contains(if wait { "2 turns" } else { "1 turn" }), "{stats}");
    }
}

#[test]
fn a_resized_terminal_goes_on() {
    let home = Home::new();
    let mut chat = home.chat(&["-n", "8"]);
    chat.ask("Hello there.");
    chat.send("some text that is long enough to wrap in a narrow window");
    chat.resize(30, 10);
    std::thread::sleep(Duration::from_millis(200));
    chat.send("\r");
    chat.expect(pty::EDITED);
    chat.answer();
    let narrow = chat.command("/route");
    let bars = |text: &str| text.split('|').nth(1).map_or(0, |b| b.chars().count());
    assert!((1..=28).contains(&bars(&narrow)), "{narrow}");
    chat.resize(100, 30);
    std::thread::sleep(Duration::from_millis(200));
    let wide = chat.command("/route");
    assert!(bars(&wide) > 28, "{wide}");
}

#[test]
fn commands_say_what_is_wrong_and_settings_are_shown() {
    let home = Home::new();
    let mut chat = home.chat(&["-n", "4"]);
    assert!(chat.command("/regne").contains("did you mean /regen?"));
    assert!(chat.command("/regen").contains("no message"));
    assert!(chat.command("/set tmep 1").contains("did you mean temp?"));
    assert!(chat.command("/set temp hot").contains("expected 0 to 100"));
    assert!(chat.command("/set top-k 7").contains("top-k = 7"));
    let params = chat.command("/show params");
    assert!(params.contains("top-k") && params.contains("  7 "), "{params}");
    assert!(chat.command("/show model").contains("self-decoder + "));
    assert!(chat.command("/show memory").contains("scratch"));
    assert!(chat.command("/show template").contains("messages"));
    assert!(chat.command("/system Be brief.").contains("is set"));
    assert!(chat.command("/system").contains("Be brief."));
    assert!(chat.command("/copy").contains("no answer"));
    assert!(chat.command("/help").contains("/route"));
    chat.send("/sav\t");
    chat.expect("/save ");
    chat.send("\x15");
    chat.ask("Hello");
    chat.send("/copy\r");
    chat.expect("\x1b]52;c;");
    chat.expect("copied");
    assert!(chat.command("/clear").contains("cleared"));
    assert!(chat.command("/undo").contains("1 turn is back"));
}

#[test]
fn a_document_is_read_with_its_token_count_and_routed_to() {
    let home = Home::new();
    let text: String = (0..120).map(|i| format!("Line {i} of the document says {}.\n", i * 7)).collect();
    std::fs::write(home.path("doc.txt"), text).unwrap();
    let mut chat = home.chat(&["-n", "6"]);
    let said = chat.command("/read doc.txt");
    assert!(said.contains("doc.txt: ") && said.contains(" tokens, added to the next message"), "{said}");
    chat.ask("What does line 7 say?");
    let route = chat.command("/route");
    assert!(route.contains("1. ") && route.contains(" % "), "{route}");
    assert!(chat.command("/read none.txt").contains("no such file"));
}

#[test]
fn the_context_limit_is_an_error_with_choices_and_nothing_is_cut() {
    let home = Home::new();
    let mut chat = home.chat(&["-n", "8", "-c", "256"]);
    chat.ask("Hello");
    let long = "word ".repeat(400);
    chat.send(&format!("\x1b[200~{long}\x1b[201~\r"));
    chat.expect(pty::EDITED);
    let said = chat.expect("choices:");
    assert!(said.contains("tokens but the context holds 256"), "{said}");
    chat.expect("nothing was cut");
    chat.expect("word"); // It is back at the prompt.
    chat.send("\x15\x03");
    chat.expect("Ctrl-C again");
    assert!(chat.command("/stats").contains("1 turn"));
}

#[test]
fn context_shift_drops_whole_turns_and_keeps_the_system_prompt() {
    let home = Home::new();
    let mut chat =
        home.chat(&["-n", "40", "-c", "256", "--context-shift", "--ignore-eos", "--system", "Be kind."]);
    let mut dropped = String::new();
    for i in 0..8 {
        let (answer, _) = chat.ask(&format!("Question number {i}?"));
        dropped += &answer;
    }
    assert!(dropped.contains("oldest turn"), "{dropped}");
    let turns = chat.command("/stats");
    assert!(!turns.contains("8 turns"), "{turns}");
    assert!(chat.command("/system").contains("Be kind."));
}

#[test]
fn pipes_get_one_plain_answer() {
    let home = Home::new();
    let out = piped(&home, &["--temp", "0", "-n", "8"], "What is the capital of France?\n");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(!out.stdout.contains(&0x1b) && out.stdout.ends_with(b"\n"));
    let prompt = piped(&home, &["--temp", "0", "-n", "8", "-p", "What is the capital of France?"], "");
    assert_eq!(prompt.stdout, out.stdout);
    let none = piped(&home, &[], "");
    assert_eq!(none.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&none.stderr).contains("no message"));
}

#[test]
fn a_single_turn_in_a_terminal_leaves_after_it() {
    let home = Home::new();
    let mut chat = Chat::spawn(home.command("chat", &["-st", "-p", "Hello", "-n", "4", "--temp", "0"]));
    assert_eq!(chat.exit_code(), 0);
}

#[test]
fn colour_is_used_only_where_it_is_wanted() {
    let home = Home::tiny();
    let styled = |s: &str| {
        s.split("\x1b[")
            .skip(1)
            .any(|p| p.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').starts_with('m'))
    };
    let mut plain = Chat::spawn(home.command("chat", &["-n", "4"]));
    assert!(!styled(&plain.expect(">>> ")));
    let (answer, line) = plain.ask("Hello");
    assert!(!styled(&answer) && !styled(&line), "{line:?}");
    let mut command = home.command("chat", &["-n", "4"]);
    command.env_remove("NO_COLOR");
    let mut coloured = Chat::spawn(command);
    assert!(styled(&coloured.expect("Send a message")));
}

#[test]
fn templates_are_never_replaced_in_silence() {
    let home = Home::tiny();
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_clsa"));
        command.args(["chat", "-p", "x", "-n", "2", "-t", "1", "-m"]).arg(home.model()).args(args);
        let out = command.stdin(Stdio::null()).output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (code, error) = run(&["--chat-template", "{% for %}"]);
    assert!(code == Some(2) && error.contains("chat template is broken"), "{error}");
    let (code, error) = run(&["--chat-template", "{{ raise_exception('no system') }}"]);
    assert!(code == Some(2) && error.contains("no system"), "{error}");
    let (code, error) = run(&["--chat-template-file", "/nonexistent"]);
    assert!(code == Some(2) && error.contains("no such file"), "{error}");
    assert_eq!(run(&["--no-chat"]).0, Some(0));
}

#[test]
fn a_model_that_changes_while_in_use_is_reported() {
    let home = Home::tiny();
    let mut chat = home.chat(&["-n", "4"]);
    chat.ask("Hello");
    let copy = home.path("copy.gguf");
    std::fs::copy(home.model(), &copy).unwrap();
    std::fs::rename(&copy, home.model()).unwrap();
    chat.send("Replaced?\r");
    assert!(chat.expect("\r\nprompt ").contains("was replaced"));
    chat.expect(">>> ");

    // The first chat still maps the old file; a new one maps the new file, which then shrinks.
    let mut chat = home.chat(&["-n", "4"]);
    chat.ask("Hello");
    let file = std::fs::OpenOptions::new().write(true).open(home.model()).unwrap();
    file.set_len(4096).unwrap();
    let said = chat.command("Truncated?");
    assert!(said.contains("was truncated while in use"), "{said}");
}

#[test]
fn a_model_truncated_in_the_middle_of_an_answer_ends_with_a_message() {
    let home = Home::tiny();
    let mut chat = home.chat(&["--ignore-eos", "-c", "60000"]);
    chat.send("Hello\r");
    chat.expect(pty::EDITED);
    std::thread::sleep(Duration::from_millis(300));
    std::fs::OpenOptions::new().write(true).open(home.model()).unwrap().set_len(4096).unwrap();
    chat.expect("was truncated while in use");
    assert_eq!(chat.exit_code(), 1);
}

#[test]
fn a_prefilled_session_waits_for_the_question_and_resumes_after_an_interruption() {
    let home = Home::tiny();
    let text: String = (0..2000).map(|i| format!("Line {i} says {}.\n", i * 7)).collect();
    std::fs::write(home.path("doc.txt"), text).unwrap();
    let session = home.path("s.session");
    let prefill = |more: &[&str]| {
        let args = [&["-f", "doc.txt", "--session", "s.session", "-c", "65536", "--ubatch-size", "64"], more]
            .concat();
        home.command("prefill", &args)
    };
    let mut child = prefill(&[]).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let _ = std::process::Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status();
    let code = child.wait().unwrap().code();
    if code == Some(130) {
        assert!(session.exists(), "what was done is saved");
    }
    let out = prefill(&[]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{said}");
    if code == Some(130) {
        assert!(!said.contains("(0 were there)"), "{said}");
    }
    let mut chat = home.chat(&["--session", "s.session", "-c", "65536", "-n", "3"]);
    let (_, line) = chat.ask("What does line 7 say?");
    let number = |s: &str| s.trim().replace(',', "").parse::<usize>().unwrap();
    let prompt = number(line.split(" tokens").next().unwrap());
    let cached = number(line.split(" cached").next().unwrap().rsplit('(').next().unwrap());
    assert!(prompt - cached < 100, "{line}");

    // A conversation is never overwritten by another document.
    chat.send("/exit\r");
    assert_eq!(chat.exit_code(), 0);
    let out = prefill(&[]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(2) && said.contains("holds a conversation"), "{said}");
}

#[test]
fn completions_manual_pages_and_versions_are_there() {
    let run = |args: &[&str]| {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_clsa")).args(args).output().unwrap();
        assert!(out.status.success());
        String::from_utf8(out.stdout).unwrap()
    };
    assert!(run(&["completions", "bash"]).contains("--context-shift"));
    assert!(run(&["completions", "zsh"]).contains("#compdef clsa"));
    assert!(run(&["completions", "fish"]).contains("complete -c clsa"));
    assert!(run(&["man"]).contains(".TH clsa 1"));
    assert!(run(&["--version"]).contains("backends"));
    assert!(run(&["--list-devices"]).contains("cpu "));
}
