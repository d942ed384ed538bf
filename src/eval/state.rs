//! Finished items of an evaluation in a file, so that it can go on where it was stopped.
//!
//! One JSON line each: first what is evaluated, then `{"item": NAME, "result": ...}` as items end. A torn last line is cut off.
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Finished items, on disk where a file was named.
pub struct State {
    file: Option<(File, PathBuf)>,
    items: HashMap<String, Value>,
}

impl State {
    /// Opens or makes the file at `path`, which belongs to an evaluation with these `settings`; without a path nothing is kept.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] for a file that is none, or of other settings, with the first that differs.
    pub fn open(path: Option<&Path>, settings: &Map<String, Value>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self { file: None, items: HashMap::new() }) };
        let io = |source| Error::Io { path: path.to_owned(), source };
        let bad = |what: String| {
            Error::Input(format!("{}: {what}: move the file away or name another", path.display()))
        };
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io)?;
        let (mut items, mut whole, mut line, mut number) = (HashMap::new(), 0, vec![], 0);
        let mut reader = BufReader::new(&file);
        loop {
            line.clear();
            number += 1;
            let n = reader.read_until(b'\n', &mut line).map_err(io)?;
            if n == 0 || line.last() != Some(&b'\n') {
                break;
            }
            let value = serde_json::from_slice::<Value>(&line).ok();
            let value =
                value.ok_or_else(|| bad(format!("line {number} is not of a state file of clsa eval")))?;
            if number == 1 {
                check(&value, settings).map_err(bad)?;
            } else {
                let item = value.get("item").and_then(Value::as_str).zip(value.get("result"));
                let (name, result) =
                    item.ok_or_else(|| bad(format!("line {number} has no item and result")))?;
                items.insert(name.to_owned(), result.clone());
            }
            whole += n as u64;
        }
        drop(reader);
        file.set_len(whole).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        let mut state = Self { file: Some((file, path.to_owned())), items };
        if whole == 0 {
            state.append(&json!({ "clsa_eval": settings }).to_string())?;
        }
        Ok(state)
    }

    /// The result of an item that ended before.
    ///
    /// # Errors
    /// [`Error::Input`] when it is not what such an item gives.
    pub fn get<T: DeserializeOwned>(&self, item: &str) -> Result<Option<T>> {
        self.items.get(item).map(|v| T::deserialize(v)).transpose().map_err(|e| {
            let path = self.file.as_ref().map_or_else(PathBuf::new, |(_, path)| path.clone());
            Error::Input(format!("{}: item {item}: {e}: move the file away or name another", path.display()))
        })
    }

    /// Items that ended before or were added since.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether nothing has ended yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Adds the result of an item; it is on disk when this returns. Gives it back as a later run reads it, so that results in one go and
    /// in several are the same: reading JSON may change the last bit of a number.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Runtime`] for a result that does not come back, such as one with a NaN.
    pub fn push<T: Serialize + DeserializeOwned>(&mut self, item: &str, result: &T) -> Result<T> {
        let line = json!({ "item": item, "result": result }).to_string();
        self.append(&line)?;
        let mut read: Value = serde_json::from_str(&line).unwrap_or_default();
        let result = read["result"].take();
        let read = T::deserialize(&result)
            .map_err(|e| Error::Runtime(format!("the result of {item} cannot be kept as JSON: {e}")))?;
        self.items.insert(item.to_owned(), result);
        Ok(read)
    }

    fn append(&mut self, line: &str) -> Result<()> {
        let Some((file, path)) = &mut self.file else { return Ok(()) };
        let written = file.stream_position().and_then(|before| {
            file.write_all(format!("{line}\n").as_bytes()).and_then(|()| file.sync_data()).inspect_err(|_| {
                // Best effort: a torn line is also cut off at the next start.
                let _ = file.set_len(before);
            })
        });
        written.map_err(|source| Error::Io { path: path.clone(), source })
    }
}

/// Why `found`, the first line of a file, is not of these settings.
fn check(found: &Value, settings: &Map<String, Value>) -> Result<(), String> {
    let found = found.get("clsa_eval").and_then(Value::as_object);
    let found = found.ok_or("it does not begin like a state file of clsa eval")?;
    for (name, value) in settings {
        match found.get(name) {
            Some(other) if other == value => {}
            Some(other) => return Err(format!("it is of an evaluation with {name} {other}, here {value}")),
            None => return Err(format!("it is of an evaluation without {name}")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(k: usize) -> Map<String, Value> {
        let Value::Object(map) = json!({ "command": "test", "k": k }) else { unreachable!() };
        map
    }

    #[test]
    fn items_come_back_and_a_torn_line_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let mut state = State::open(Some(&path), &settings(1)).unwrap();
        state.push("a", &vec![1, 2]).unwrap();
        state.push("b", &"x".to_owned()).unwrap();
        drop(state);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let mut state = State::open(Some(&path), &settings(1)).unwrap();
        assert_eq!(
            (state.get::<Vec<u32>>("a").unwrap(), state.get::<String>("b").unwrap()),
            (Some(vec![1, 2]), None)
        );
        state.push("b", &"y".to_owned()).unwrap();
        drop(state);
        let state = State::open(Some(&path), &settings(1)).unwrap();
        assert_eq!((state.len(), state.get::<String>("b").unwrap()), (2, Some("y".into())));
        assert!(state.get::<u32>("b").is_err(), "a result of another kind");
    }

    #[test]
    fn files_of_other_evaluations_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        State::open(Some(&path), &settings(1)).unwrap();
        let message =
            |settings: &Map<String, Value>| State::open(Some(&path), settings).err().unwrap().to_string();
        assert!(message(&settings(2)).contains("with k 1, here 2"));
        let more = Map::from_iter([("new".to_owned(), json!(true))]);
        assert!(message(&more).contains("without new"));
        for text in ["no json\n", "{}\n", "{\"clsa_eval\":{\"command\":\"test\",\"k\":1}}\n{}\n"] {
            std::fs::write(&path, text).unwrap();
            assert!(State::open(Some(&path), &settings(1)).is_err(), "{text}");
        }
    }

    #[test]
    fn without_a_file_items_are_kept_in_memory() {
        let mut state = State::open(None, &settings(1)).unwrap();
        assert!(state.is_empty());
        state.push("a", &1).unwrap();
        assert_eq!(state.get::<u32>("a").unwrap(), Some(1));
    }
}
