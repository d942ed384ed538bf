//! The results file: one JSON line a job, appended and synced as each job ends.
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

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
    out: Lines,
    finished: HashSet<String>,
    ordered: Option<Ordered>,
}

/// Results that came before their turn are kept in a file of their own, `OUT.early`, so that nothing is lost.
struct Ordered {
    early: Lines,
    /// Lines of that file which are not yet in the results, by id.
    kept: HashMap<String, String>,
    /// Ids in their order, the next one last.
    order: Vec<String>,
}

impl Results {
    /// Opens or makes the file, and learns which jobs it has. A last line that was not written whole is cut off.
    ///
    /// With `order`, the ids in the order of the input, results are written in it; those that come before their turn wait in
    /// `OUT.early`, also those that the file has before their turn (it was begun without an order, or a job could not be done then).
    /// Without it what waits there is taken over.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] for a line that is no result, with its number, and for what is no regular file.
    pub fn open(path: &Path, order: Option<Vec<String>>) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let (mut out, lines) = Lines::open(path)?;
        let aside = early_path(path);
        let Some(mut order) = order else {
            let mut finished: HashSet<_> = lines.into_iter().map(|(id, _)| id).collect();
            // Ordered results leave the other file only when they are on disk in this one.
            if aside.exists() {
                let (early, mut waiting) = Lines::open(&aside)?;
                waiting.retain(|(id, _)| finished.insert(id.clone()));
                out.append(&waiting.into_iter().map(|(_, line)| line).collect::<String>())?;
                early.remove()?;
            }
            out.syncer = Some(Syncer::new(&out.file).map_err(io)?);
            return Ok(Self { out, finished, ordered: None });
        };
        let (mut early, waiting) = Lines::open(&aside)?;
        let mut next = order.iter().peekable();
        let known: HashSet<_> = order.iter().collect();
        let (stay, leave): (Vec<_>, Vec<_>) =
            lines.into_iter().partition(|(id, _)| next.next_if_eq(&id).is_some() || !known.contains(id));
        if !leave.is_empty() {
            early.append(&leave.iter().map(|(_, line)| line.as_str()).collect::<String>())?;
            out.replace(&stay.iter().map(|(_, line)| line.as_str()).collect::<String>())?;
        }
        let mut finished: HashSet<_> = stay.into_iter().map(|(id, _)| id).collect();
        order.retain(|id| !finished.contains(id));
        order.reverse();
        let kept: HashMap<_, _> =
            waiting.into_iter().chain(leave).filter(|(id, _)| !finished.contains(id)).collect();
        finished.extend(kept.keys().cloned());
        let mut results = Self { out, finished, ordered: Some(Ordered { early, kept, order }) };
        results.catch_up()?;
        Ok(results)
    }

    /// Whether the job has a result already.
    #[must_use]
    pub fn has(&self, id: &str) -> bool {
        self.finished.contains(id)
    }

    /// Appends one result. It is on disk when this returns, or, without an order, while the next ones are computed; [`Self::close`] waits.
    ///
    /// # Errors
    /// [`Error::Io`], on a full disk for example; the file is then as it was before.
    pub fn push(&mut self, id: &str, form: Form, outcome: &Result<Outcome, String>) -> Result<()> {
        let value = match form {
            Form::Plain => plain(id, outcome),
            Form::OpenAi => open_ai(id, outcome),
        };
        let line = format!("{value}\n");
        match &mut self.ordered {
            Some(ordered) if ordered.order.last().is_none_or(|next| next != id) => {
                ordered.early.append(&line)?;
                ordered.kept.insert(id.to_owned(), line);
            }
            Some(ordered) => {
                self.out.append(&line)?;
                ordered.order.pop();
                self.catch_up()?;
            }
            None => self.out.append(&line)?,
        }
        self.finished.insert(id.to_owned());
        Ok(())
    }

    /// Writes the results whose turn has come.
    fn catch_up(&mut self) -> Result<()> {
        let Some(ordered) = &mut self.ordered else { return Ok(()) };
        let mut lines = String::new();
        let mut n = 0;
        while let Some(line) = ordered.order.iter().rev().nth(n).and_then(|id| ordered.kept.get(id)) {
            lines += line;
            n += 1;
        }
        if n > 0 {
            self.out.append(&lines)?;
            for id in ordered.order.split_off(ordered.order.len() - n) {
                ordered.kept.remove(&id);
            }
        }
        Ok(())
    }

    /// Ends the file: what came before its turn is written behind the rest when `all` jobs have been tried, and otherwise waits.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn close(mut self, all: bool) -> Result<()> {
        let Some(mut ordered) = self.ordered.take() else { return self.out.settle() };
        if all {
            // Jobs that could not be done leave gaps.
            let kept = ordered.order.iter().rev().filter_map(|id| ordered.kept.remove(id));
            let lines: String = kept.collect();
            self.out.append(&lines)?;
        }
        if ordered.kept.is_empty() { ordered.early.remove() } else { Ok(()) }
    }
}

/// Where results of `path` wait for their turn.
fn early_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".early");
    name.into()
}

/// A file of JSON lines that is only appended to.
struct Lines {
    file: File,
    path: PathBuf,
    /// Brings lines to the disk while the next ones are computed.
    syncer: Option<Syncer>,
}

/// A thread that syncs a file whenever it is asked to; what is asked meanwhile is done at once.
struct Syncer {
    ask: Option<Sender<()>>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Syncer {
    fn new(file: &File) -> std::io::Result<Self> {
        let (file, (ask, asked)) = (file.try_clone()?, channel());
        let work = move || {
            while asked.recv().is_ok() {
                while asked.try_recv().is_ok() {}
                file.sync_data()?;
            }
            Ok(())
        };
        let thread = std::thread::Builder::new().name("sync".into()).spawn(work)?;
        Ok(Self { ask: Some(ask), thread: Some(thread) })
    }

    /// Asks for a sync; an error is that of an earlier one.
    fn sync(&mut self) -> std::io::Result<()> {
        match self.ask.as_ref().is_some_and(|ask| ask.send(()).is_ok()) {
            true => Ok(()),
            false => self.wait(),
        }
    }

    /// Waits for all that was asked.
    fn wait(&mut self) -> std::io::Result<()> {
        self.ask = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(done)) => done,
            None => Ok(()),
            Some(Err(_)) => Err(std::io::Error::other("the thread that syncs ended early")),
        }
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        let _ = self.wait();
    }
}

impl Lines {
    /// Opens or makes the file; returns its lines with their ids.
    fn open(path: &Path) -> Result<(Self, Vec<(String, String)>)> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        if std::fs::metadata(path).is_ok_and(|m| !m.is_file()) {
            return Err(Error::Input(format!(
                "{}: no regular file: results must stay, so that an interrupted run can go on",
                path.display()
            )));
        }
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io)?;
        let (mut lines, mut whole, mut line) = (vec![], 0, vec![]);
        let mut reader = BufReader::new(&file);
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line).map_err(io)?;
            if n == 0 || line.last() != Some(&b'\n') {
                break;
            }
            let id = serde_json::from_slice::<Value>(&line).ok().and_then(|v| {
                let id = v.get("custom_id").or_else(|| v.get("id"))?;
                Some(id.as_str()?.to_owned())
            });
            let (Some(id), Ok(text)) = (id, String::from_utf8(line.clone())) else {
                let number = lines.len() + 1;
                let what =
                    format!("{}: line {number} is no result of a batch: move the file away", path.display());
                return Err(Error::Input(what));
            };
            lines.push((id, text));
            whole += n as u64;
        }
        drop(reader);
        file.set_len(whole).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        Ok((Self { file, path: path.to_owned(), syncer: None }, lines))
    }

    /// Appends whole lines; they are on disk when this returns, or soon after with a syncer. On an error the file is as it was before.
    fn append(&mut self, lines: &str) -> Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let before = self.file.stream_position();
        let written = before.and_then(|before| {
            self.file
                .write_all(lines.as_bytes())
                .and_then(|()| match &mut self.syncer {
                    Some(syncer) => syncer.sync(),
                    None => self.file.sync_data(),
                })
                .inspect_err(|_| {
                    // Best effort: a torn line is also cut off at the next start.
                    let _ = self.file.set_len(before);
                })
        });
        written.map_err(|source| Error::Io { path: self.path.clone(), source })
    }

    /// Puts `lines` in the place of all that the file holds, at once.
    fn replace(&mut self, lines: &str) -> Result<()> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let target = self.path.canonicalize().map_err(io)?; // not in the place of a link
        let folder = target.parent().unwrap_or(Path::new("/"));
        let mut new = tempfile::Builder::new().prefix(".clsa-results-").tempfile_in(folder).map_err(io)?;
        let access = self.file.metadata().map_err(io)?.permissions();
        new.write_all(lines.as_bytes())
            .and_then(|()| new.as_file().set_permissions(access))
            .and_then(|()| new.as_file().sync_all())
            .map_err(io)?;
        new.persist(&target).map_err(|e| io(e.error))?;
        File::open(folder).and_then(|f| f.sync_all()).map_err(io)?;
        *self = Self::open(&self.path)?.0;
        Ok(())
    }

    /// Waits until all lines are on disk.
    fn settle(&mut self) -> Result<()> {
        let settled = self.syncer.take().map_or(Ok(()), |mut syncer| syncer.wait());
        settled.map_err(|source| Error::Io { path: self.path.clone(), source })
    }

    fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(|source| Error::Io { path: self.path, source })
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
                "id": format!("chatcmpl-{id}"),
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
            json!({ "id": format!("batch_req_{id}"), "custom_id": id, "response": { "status_code": 200, "request_id": id, "body": body }, "error": null })
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
        let mut results = Results::open(&path, None).unwrap();
        results.push("a", Form::Plain, &Ok(outcome())).unwrap();
        results.push("b", Form::OpenAi, &Err("bad".into())).unwrap();
        drop(results);
        let whole = std::fs::read(&path).unwrap();
        for cut in 1..20 {
            std::fs::write(&path, [&whole[..], &whole[..cut.min(whole.len())]].concat()).unwrap();
            let results = Results::open(&path, None).unwrap();
            assert!(results.has("a") && results.has("b") && !results.has("c"));
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
    }

    #[test]
    fn a_file_of_something_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        std::fs::write(&path, "my notes\n").unwrap();
        assert!(Results::open(&path, None).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "my notes\n");
    }

    fn ids(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines()
            .map(|l| serde_json::from_str::<Value>(l).unwrap()["id"].as_str().unwrap().to_owned())
            .collect()
    }

    #[test]
    fn ordered_results_wait_for_their_turn_and_survive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.jsonl");
        let order = || Some(["a", "b", "c", "d", "e"].map(String::from).to_vec());
        let mut results = Results::open(&path, order()).unwrap();
        let push = |results: &mut Results, id: &str| results.push(id, Form::Plain, &Ok(outcome())).unwrap();
        push(&mut results, "c");
        push(&mut results, "b");
        assert!(ids(&path).is_empty() && results.has("c"));
        push(&mut results, "a");
        assert_eq!(ids(&path), ["a", "b", "c"]);
        push(&mut results, "e");
        // Killed here; what waits is known again, in either mode.
        drop(results);
        let mut results = Results::open(&path, order()).unwrap();
        assert!(results.has("e") && !results.has("d"));
        push(&mut results, "d");
        assert_eq!(ids(&path), ["a", "b", "c", "d", "e"]);
        results.close(true).unwrap();
        assert!(!early_path(&path).exists());

        let path = dir.path().join("s.jsonl");
        let mut results = Results::open(&path, order()).unwrap();
        push(&mut results, "b");
        drop(results);
        let results = Results::open(&path, None).unwrap();
        assert!(results.has("b") && !early_path(&path).exists());
        assert_eq!(ids(&path), ["b"]);

        // A file that was begun without an order, and holds a job that the input has no more.
        let path = dir.path().join("u.jsonl");
        let mut results = Results::open(&path, None).unwrap();
        ["c", "a", "gone", "b"].iter().for_each(|id| push(&mut results, id));
        results.close(true).unwrap();
        let mut results = Results::open(&path, order()).unwrap();
        assert!(["a", "b", "c", "gone"].iter().all(|id| results.has(id)) && !results.has("d"));
        assert_eq!(ids(&path), ["a", "gone", "b", "c"]);
        push(&mut results, "e");
        drop(results);
        let mut results = Results::open(&path, order()).unwrap();
        push(&mut results, "d");
        assert_eq!(ids(&path), ["a", "gone", "b", "c", "d", "e"]);

        // A job that could not be done leaves a gap.
        let path = dir.path().join("t.jsonl");
        let mut results = Results::open(&path, order()).unwrap();
        ["e", "b", "a", "d"].iter().for_each(|id| push(&mut results, id));
        results.close(true).unwrap();
        assert_eq!(ids(&path), ["a", "b", "d", "e"]);
        // It is done later.
        let mut results = Results::open(&path, order()).unwrap();
        push(&mut results, "c");
        results.close(true).unwrap();
        assert_eq!(ids(&path), ["a", "b", "c", "d", "e"]);
    }

    #[test]
    fn devices_are_refused() {
        assert!(matches!(Results::open(Path::new("/dev/full"), None), Err(Error::Input(_))));
    }
}
