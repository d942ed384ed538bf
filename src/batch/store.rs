//! Prefixes on disk between runs: session files in a folder, least recently used first out.
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Value, json};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::engine::{Engine, SeqId};
use crate::error::{Error, Result};
use crate::session::{Contents, Identity, SessionFile, write};

/// A folder of prefixes.
///
/// A file's name tells what it is for, so that nothing is read that does not fit: a hash of what caches depend on, how many tokens, and
/// a hash of these.
pub struct Store {
    folder: PathBuf,
    /// Bytes that its files may have together.
    most: u64,
    identity: Identity,
    key: String,
    /// Files whose like is not worth another warning.
    warned: bool,
}

/// What is put in front of every warning.
type Warn<'a> = &'a mut dyn FnMut(String);

impl Store {
    /// Opens, or makes, a folder.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be made.
    pub fn open(folder: &Path, most: u64, engine: &Engine) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|source| Error::Io { path: folder.to_owned(), source })?;
        let identity = Identity::new(engine, "");
        let key = json!(identity).to_string();
        let key = format!("{:016x}", xxhash_rust::xxh3::xxh3_64(key.as_bytes()));
        Ok(Self { folder: folder.to_owned(), most, identity, key, warned: false })
    }

    fn name(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        format!("{}-{}-{:032x}.session", self.key, tokens.len(), xxh3_128(&bytes))
    }

    /// The file of the longest beginning of `tokens` that is longer than `least`, with its length.
    #[must_use]
    pub fn find(&self, tokens: &[u32], least: usize) -> Option<(PathBuf, usize)> {
        let mut found: Vec<(usize, String)> = fs::read_dir(&self.folder)
            .ok()?
            .filter_map(|e| {
                let name = e.ok()?.file_name().into_string().ok()?;
                let (len, hash) = name
                    .strip_prefix(&self.key)?
                    .strip_prefix('-')?
                    .strip_suffix(".session")?
                    .split_once('-')?;
                let len = len.parse().ok().filter(|len| (least + 1..=tokens.len()).contains(len))?;
                Some((len, hash.to_owned()))
            })
            .collect();
        found.sort_unstable();
        // One pass over the tokens gives the hash of every beginning.
        let (mut hasher, mut at, mut best) = (Xxh3::new(), 0, None);
        for (len, hash) in found {
            tokens[at..len].iter().for_each(|t| hasher.update(&t.to_le_bytes()));
            at = len;
            if format!("{:032x}", hasher.digest128()) == hash {
                best = Some(len);
            }
        }
        best.map(|len| (self.folder.join(self.name(&tokens[..len])), len))
    }

    /// Puts the longest kept beginning of `tokens`, longer than `least`, into the empty sequence `seq`. Returns its length, 0 without one.
    /// A file that is damaged or does not fit is passed over with a warning.
    ///
    /// # Errors
    /// What the engine reports.
    pub fn load(
        &mut self,
        engine: &mut Engine,
        seq: SeqId,
        tokens: &[u32],
        least: usize,
        warn: Warn<'_>,
    ) -> Result<usize> {
        let Some((path, len)) = self.find(tokens, least) else { return Ok(0) };
        let opened = SessionFile::open(&path).and_then(|file| {
            file.check(&self.identity, engine)?;
            Ok(file)
        });
        match opened {
            Ok(file) if file.contents().tokens == tokens[..len] => {
                file.import(engine, seq)?;
                // Used now; a folder that may only be read keeps its order.
                let _ = File::open(&path).and_then(|f| f.set_modified(SystemTime::now()));
                Ok(len)
            }
            Ok(_) => {
                warn(format!("{}: it holds other tokens than its name says: not used", path.display()));
                Ok(0)
            }
            Err(e) => {
                warn(format!("not used, and made anew: {e}"));
                // What cannot be used only takes room.
                let _ = fs::remove_file(&path);
                Ok(0)
            }
        }
    }

    /// Keeps what `seq` holds, which is `tokens`. What was not used for longest makes room. That it cannot be kept is a warning: the
    /// results do not depend on it.
    pub fn save(&mut self, engine: &mut Engine, seq: SeqId, tokens: &[u32], warn: Warn<'_>) {
        let path = self.folder.join(self.name(tokens));
        if path.exists() {
            return;
        }
        let (row, windows) = engine.export_sizes(tokens.len());
        let size = (tokens.len() * (row + 4) + windows) as u64;
        if size > self.most {
            if !std::mem::replace(&mut self.warned, true) {
                warn(format!("a prefix of {size} bytes is not kept: --cache-size is {}", self.most));
            }
            return;
        }
        self.make_room(self.most - size);
        let contents = Contents { tokens: tokens.to_vec(), logits: None, state: Value::Null };
        if let Err(e) = write(&path, &self.identity, &contents, engine, seq, &[])
            && !std::mem::replace(&mut self.warned, true)
        {
            warn(format!("a prefix is not kept: {e}"));
        }
        // The directory of a file is small, but it counts too.
        self.make_room(self.most);
    }

    /// Removes what was not used for longest until at most `most` bytes are left.
    fn make_room(&self, most: u64) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = entries
            .filter_map(|e| {
                let entry = e.ok()?;
                let (meta, path) = (entry.metadata().ok()?, entry.path());
                let ours = meta.is_file() && is_ours(entry.file_name().to_str()?);
                ours.then_some((meta.modified().ok()?, meta.len(), path))
            })
            .collect();
        files.sort_unstable();
        let mut total: u64 = files.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in files {
            if total <= most {
                return;
            }
            if fs::remove_file(path).is_ok() {
                total -= len;
            }
        }
    }
}

/// Whether a file has a name of ours: other session files in the folder are somebody's own.
fn is_ours(name: &str) -> bool {
    let parts: Vec<&str> = name.strip_suffix(".session").unwrap_or("").split('-').collect();
    let hash = |text: &str, digits| text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
    matches!(parts[..], [key, len, tokens] if hash(key, 16) && hash(tokens, 32) && len.parse::<usize>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::is_ours;

    #[test]
    fn only_our_own_names_are_removed() {
        let (key, tokens) = ("0".repeat(16), "a".repeat(32));
        assert!(is_ours(&format!("{key}-12-{tokens}.session")));
        for name in ["contract.session", "-12-.session", &format!("{key}-x-{tokens}.session"), ".session"] {
            assert!(!is_ours(name), "{name}");
        }
        assert!(!is_ours(&format!("{key}-12-{tokens}")));
    }
}
