//! `--grammar` and `--json-schema`: answers of the bundled model that ended are what was asked for.
use super::*;
use serde_json::Value;

const SCHEMA: &str = r#"{
    "type": "object", "additionalProperties": false, "required": ["city", "people", "capital"],
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "capital": {"type": "boolean"}
    }
}"#;

fn check_city(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert_eq!(value.as_object().expect("an object").len(), 3, "{text}");
    assert!(value["city"].as_str().expect("a text").chars().count() <= 20, "{text}");
    assert!(value["people"].as_u64().expect("a number") <= 99_999_999 && value["capital"].is_boolean());
}

fn run(more: &[&str]) -> Value {
    let args = ["run", "-p", "A city as JSON:\n", "-n", "120", "-c", "512", "--json"];
    let said = output(args.iter().chain(more));
    serde_json::from_str(&said.assert_succeeds().stdout).expect("one JSON object")
}

#[test]
fn answers_of_run_are_what_the_schema_allows() {
    let folder = Folder::empty();
    let file = folder.write("city.json", SCHEMA.as_bytes());
    let mut ended = 0;
    for sampling in [&["--temp", "0"][..], &["--temp", "1.5", "-s", "1"], &["--temp", "1.5", "-s", "2"]] {
        for schema in [SCHEMA, &file] {
            let answer = run(&[&["--json-schema", schema], sampling].concat());
            if answer["finish_reason"] == "stop" {
                ended += 1;
                check_city(answer["text"].as_str().expect("text"));
            }
        }
    }
    assert!(ended >= 4, "{ended} of 6 ended");
    let answer = run(&["--grammar", "start: \"yes\" | \"no\"", "--temp", "0"]);
    assert_eq!(answer["finish_reason"], "stop");
    assert!(["yes", "no"].contains(&answer["text"].as_str().expect("text")), "{answer}");
}

#[test]
fn every_answer_of_a_chat_is_what_the_schema_allows() {
    let args = ["chat", "-c", "1024", "--temp", "0", "-n", "120", "--json-schema", SCHEMA];
    let said = with_input(&args, b"Tell me about Paris.");
    check_city(said.assert_succeeds().stdout.trim());
}

#[test]
fn grammars_that_cannot_be_used_are_errors() {
    let folder = Folder::with_model();
    let model = folder.model();
    let fails = |command: &str, more: &[&str], words: &[&str]| {
        let args = [command, "-m", &model, "-p", "x", "-n", "2", "-c", "256"];
        output(args.iter().chain(more)).assert_fails(2, words);
    };
    for command in ["run", "chat"] {
        fails(command, &["--json-schema", "{\"type\": \"colour\"}"], &["grammar cannot be used", "colour"]);
        fails(command, &["--json-schema", "gone.json"], &["gone.json", "no such file"]);
        fails(command, &["--grammar", "start: \"a"], &["grammar cannot be used"]);
        fails(command, &["--grammar", "root ::= \"a\""], &["grammar cannot be used"]);
        fails(command, &["--grammar", "start: \"a\"", "--stop", "b"], &["--stop"]);
        fails(command, &["--grammar", "start: \"a\"", "--ignore-eos"], &["--ignore-eos"]);
    }
}
