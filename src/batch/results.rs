//! The results file: one JSON line a job, appended and synced as each job ends.
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};

use super::job::Form;
use crate::error::{Error, Result};
use crate::generate::{FinishReason, Timings};

/// What a finished job says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The answer.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub generated_tokens: usize,
    /// What it took; `None` leaves it out, so that files of equal jobs are equal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
}

/// A results file.
pub struct Results {
    file: File,
    path: PathBuf,
    finished: HashSet<String>,
}

impl Results {
    /// Opens or makes the file, and learns which jobs it has. A last line that was not written whole is cut off.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] for a line that is no result, with its number.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io)?;
        let (mut finished, mut whole, mut line, mut number) = (HashSet::new(), 0, vec![], 0);
        let mut reader = BufReader::new(&file);
        loop {
            line.clear();
            number += 1;
            let n = reader.read_until(b'\n', &mut line).map_err(io)?;
            if n == 0 || line.last() != Some(&b'\n') {
                break;
            }
            let id = serde_json::from_slice::<Value>(&line).ok().and_then(|v| {
                let id = v.get("custom_id").or_else(|| v.get("id"))?;
                Some(id.as_str()?.to_owned())
            });
            let Some(id) = id else {
                let what =
                    format!("{}: line {number} is no result of a batch: move the file away", path.display());
                return Err(Error::Input(what));
            };
            finished.insert(id);
            whole += n as u64;
        }
        drop(reader);
        file.set_len(whole).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        Ok(Self { file, path: path.to_owned(), finished })
    }

    /// Whether the job has a result already.
    #[must_use]
    pub fn has(&self, id: &str) -> bool {
        self.finished.contains(id)
    }

    /// Appends one result; it is on disk when this returns.
    ///
    /// # Errors
    /// [`Error::Io`], on a full disk for example; the file is then as it was before.
    pub fn push(&mut self, id: &str, form: Form, outcome: &Result<Outcome, String>) -> Result<()> {
        let value = match form {
            Form::Plain => plain(id, outcome),
            Form::OpenAi => open_ai(id, outcome),
        };
        let before = self.file.stream_position();
        let written = before.and_then(|before| {
            let line = format!("{value}\n");
            self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data()).inspect_err(|_| {
                // Best effort: a torn line is also cut off at the next start.
                let _ = self.file.set_len(before);
            })
        });
        written.map_err(|source| Error::Io { path: self.path.clone(), source })?;
        self.finished.insert(id.to_owned());
        Ok(())
    }
}

fn plain(id: &str, outcome: &Result<Outcome, String>) -> Value {
    match outcome {
        Ok(o) => {
            let mut value = json!({ "id": id });
            if let (Value::Object(to), Value::Object(from)) = (&mut value, json!(o)) {
                to.extend(from);
            }
            value
        }
        Err(e) => json!({ "id": id, "error": e }),
    }
}

fn open_ai(id: &str, outcome: &Result<Outcome, String>) -> Value {
    match outcome {
        Ok(o) => {
            let finish = match o.finish_reason {
                FinishReason::Stop => "stop",
                FinishReason::Length | FinishReason::ContextFull => "length",
                FinishReason::Interrupted => "cancelled",
            };
            let mut body = json!({
                "object": "chat.completion",
                "choices": [{
                    "index": 0,
                    "message": { "role": "assistant", "content": o.text },
                    "finish_reason": finish,
                }],
                "usage": {
                    "prompt_tokens": o.prompt_tokens,
                    "completion_tokens": o.generated_tokens,
                    "total_tokens": o.prompt_tokens + o.generated_tokens,
                },
            });
            if let Some(t) = &o.timings {
                body["timings"] = json!(t);
            }
            json!({ "id": format!("batch_req_{id}"), "custom_id": id, "response": { "status_code": 200, "body": body }, "error": null })
        }
        Err(e) => json!({
            "id": format!("batch_req_{id}"), "custom_id": id, "response": null,
            "error": { "code": "invalid_request", "message": e },
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome() -> Outcome {
        Outcome {
            text: "x\n".into(),
            finish_reason: FinishReason::Stop,
            prompt_tokens: 3,
            generated_tokens: 2,
            timings: None,
        }
    }

    #[test]
    fn results_are_found_again_and_torn_lines_are_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.jsonl");
        let mut results = Results::open(&path).unwrap();
        results.push("a", Form::Plain, &Ok(outcome())).unwrap();
        results.push("b", Form::OpenAi, &Err("bad".into())).unwrap();
        drop(results);
        let whole = std::fs::read(&path).unwrap();
        for cut in 1..20 {
            std::fs::write(&path, [&whole[..], &whole[..cut.min(whole.len())]].concat()).unwrap();
            let results = Results::open(&path).unwrap();
            assert!(results.has("a") && results.has("b") && !results.has("c"));
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn a_file_of_something_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        std::fs::write(&path, "my notes\n").unwrap();
        assert!(Results::open(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "my notes\n");
    }
}
