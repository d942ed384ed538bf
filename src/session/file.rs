//! Session files: what a conversation's caches hold and its history, checksummed, and checked whole before anything is used.
//!
//! ```text
//! 0   magic "CLSASESS"
//! 8   version                u32
//! 12  0                      u32
//! 16  offset of directory    u64
//! 24  bytes of directory     u64
//! 32  XXH3-128 of directory  16 bytes
//! 48  XXH3-128 of the above, and 16 bytes of its digest
//! 64  sections, each at a multiple of 64 bytes
//! ..  directory              JSON: identity, positions, sections with their checksums, the application's state
//! ```
//!
//! Numbers are little endian. Section `cache` is what [`Engine::export`] wrote, so a map of the file is imported as it lies.
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use ggml_kernels::mapping::Mapping;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use super::identity::{Identity, hash, hex};
use crate::engine::{Engine, SeqId};
use crate::error::{Error as CrateError, Result as CrateResult};

/// Bytes before the first section.
const HEADER: usize = 64;
const ALIGN: u64 = 64;
const MAGIC: &[u8; 8] = b"CLSASESS";
/// Version of the format.
pub const VERSION: u32 = 1;
/// The directory holds the history as text; more than this is no session.
const MAX_DIRECTORY: u64 = 1 << 30;

/// Why a session file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is no session file, cut short or damaged. Exit code 2.
    #[error("{}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found and expected.
        what: String,
    },
    /// It fits neither this model nor these settings. Exit code 2.
    #[error("{}: this session cannot be used here: {why}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// The reason, and the remedy.
        why: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Directory {
    identity: Identity,
    positions: u64,
    sections: Vec<Section>,
    state: Value,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    kind: Kind,
    offset: u64,
    bytes: u64,
    xxh3: String,
}

/// What a section holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Kind {
    /// Token ids, u32.
    Tokens,
    /// [`Engine::export`].
    Cache,
    /// The windows at an earlier position.
    Windows { position: u64 },
    /// Logits after the last prompt, f32, and the routing that made them.
    Logits { position: u64, routing: String },
}

/// What a session holds beside its caches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// Tokens in the cache.
    pub tokens: Vec<u32>,
    /// Position and logits of the last prompt's end, and the routing that made them.
    pub logits: Option<(usize, String, Vec<f32>)>,
    /// The application's own state.
    pub state: Value,
}

/// Writes `contents`, the cache of `seq` and its checkpoints at `checkpoints` to `path`. The file appears whole or not at all.
/// Returns its size.
///
/// # Errors
/// [`CrateError::Io`], and what the backend reports.
pub fn write(
    path: &Path,
    identity: &Identity,
    contents: &Contents,
    engine: &mut Engine,
    seq: SeqId,
    checkpoints: &[usize],
) -> CrateResult<u64> {
    let io = |source| CrateError::Io { path: path.to_owned(), source };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = tempfile::Builder::new().prefix(".clsa-session-").tempfile_in(folder).map_err(io)?;
    let size = fill(temporary.as_file(), path, identity, contents, engine, seq, checkpoints)?;
    temporary.as_file().sync_all().map_err(io)?;
    temporary.persist(path).map_err(|e| io(e.error))?;
    // The new name is on disk when the folder is.
    File::open(folder).and_then(|f| f.sync_all()).map_err(io)?;
    Ok(size)
}

fn fill(
    file: &File,
    path: &Path,
    identity: &Identity,
    contents: &Contents,
    engine: &mut Engine,
    seq: SeqId,
    checkpoints: &[usize],
) -> CrateResult<u64> {
    let io = |source| CrateError::Io { path: path.to_owned(), source };
    let mut out = Writer { out: BufWriter::with_capacity(1 << 20, file), at: 0, sections: vec![] };
    out.raw(&[0; HEADER]).map_err(io)?;
    let tokens: Vec<u8> = contents.tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    out.section(Kind::Tokens, |put| put(&tokens).map_err(io))?;
    out.section(Kind::Cache, |put| engine.export(seq, |bytes| put(bytes).map_err(io)))?;
    for (position, windows) in engine.checkpoints(seq).filter(|(p, _)| checkpoints.contains(p)) {
        out.section(Kind::Windows { position: position as u64 }, |put| put(windows).map_err(io))?;
    }
    if let Some((position, routing, logits)) = &contents.logits {
        let kind = Kind::Logits { position: *position as u64, routing: routing.clone() };
        let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
        out.section(kind, |put| put(&bytes).map_err(io))?;
    }
    let (identity, state) = (identity.clone(), contents.state.clone());
    let (positions, sections) = (contents.tokens.len() as u64, out.sections);
    let directory = serde_json::to_vec(&Directory { identity, positions, sections, state })
        .map_err(|e| CrateError::Runtime(format!("the session's state cannot be written: {e}")))?;
    let (mut file, at) = (out.out, out.at);
    file.write_all(&directory).map_err(io)?;
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    file.write_all(&header(at, &directory)).and_then(|()| file.flush()).map_err(io)?;
    Ok(at + directory.len() as u64)
}

fn header(at: u64, directory: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&at.to_le_bytes());
    header[24..32].copy_from_slice(&(directory.len() as u64).to_le_bytes());
    header[32..48].copy_from_slice(&hash(directory));
    let digest = hash(&header[..48]);
    header[48..].copy_from_slice(&digest);
    header
}

struct Writer<W> {
    out: W,
    at: u64,
    sections: Vec<Section>,
}

impl<W: Write> Writer<W> {
    fn raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.at += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    /// Writes one section: `fill` hands its bytes to the function that it is given.
    fn section(
        &mut self,
        kind: Kind,
        fill: impl FnOnce(&mut dyn FnMut(&[u8]) -> std::io::Result<()>) -> CrateResult<()>,
    ) -> CrateResult<()> {
        let (offset, mut hasher) = (self.at, Xxh3::new());
        fill(&mut |bytes| {
            hasher.update(bytes);
            self.raw(bytes)
        })?;
        let (bytes, xxh3) = (self.at - offset, hex(&hasher.digest128().to_be_bytes()));
        self.sections.push(Section { kind, offset, bytes, xxh3 });
        let padding = self.at.next_multiple_of(ALIGN) - self.at;
        let zeros = [0; ALIGN as usize];
        self.raw(&zeros[..padding as usize])
            .map_err(|source| CrateError::Io { path: "the session file".into(), source })
    }
}

/// A session file whose every byte has been checked.
pub struct SessionFile {
    path: PathBuf,
    mapping: Mapping,
    identity: Identity,
    contents: Contents,
    cache: Range<usize>,
    windows: Vec<(usize, Range<usize>)>,
}

impl SessionFile {
    /// Maps a session file and checks it whole.
    ///
    /// # Errors
    /// [`CrateError::Io`], or [`Error::Damaged`].
    pub fn open(path: &Path) -> CrateResult<Self> {
        let mapping =
            Mapping::open(path).map_err(|source| CrateError::Io { path: path.to_owned(), source })?;
        let damaged = |what: String| CrateError::from(Error::Damaged { path: path.to_owned(), what });
        let directory = directory(&mapping).map_err(damaged)?;
        let ranges = check_sections(&mapping, &directory.sections).map_err(damaged)?;
        let mut file = Self {
            path: path.to_owned(),
            mapping,
            identity: directory.identity,
            contents: Contents { state: directory.state, ..Contents::default() },
            cache: 0..0,
            windows: vec![],
        };
        file.take(directory.positions, directory.sections, ranges).map_err(damaged)?;
        Ok(file)
    }

    /// Sorts the sections, each of which may be there once (windows once for a position), and checks what they claim.
    fn take(
        &mut self,
        positions: u64,
        sections: Vec<Section>,
        ranges: Vec<Range<usize>>,
    ) -> Result<(), String> {
        let (mut tokens, mut cache) = (None, None);
        for (section, range) in sections.into_iter().zip(ranges) {
            let twice = match section.kind {
                Kind::Tokens => tokens.replace(range).is_some(),
                Kind::Cache => cache.replace(range).is_some(),
                Kind::Windows { position } => {
                    let position = inside(position, positions)?;
                    let twice = self.windows.iter().any(|(p, _)| *p == position);
                    self.windows.push((position, range));
                    twice
                }
                Kind::Logits { position, routing } => {
                    if range.len() % 4 != 0 {
                        return Err(format!("it is damaged: {} bytes of logits", range.len()));
                    }
                    let values = self.mapping[range].chunks_exact(4);
                    let logits = values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                    self.contents.logits.replace((inside(position, positions)?, routing, logits)).is_some()
                }
            };
            if twice {
                return Err("it is damaged: a section is there twice".into());
            }
        }
        let tokens = tokens.ok_or("it is damaged: it holds no tokens")?;
        self.cache = cache.ok_or("it is damaged: it holds no cache")?;
        if Some(tokens.len() as u64) != positions.checked_mul(4) {
            return Err(format!("it is damaged: {} bytes of tokens for {positions} positions", tokens.len()));
        }
        let ids = self.mapping[tokens].chunks_exact(4);
        self.contents.tokens = ids.map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        self.windows.sort_by_key(|(position, _)| *position);
        Ok(())
    }

    /// Its tokens, logits and the application's state.
    #[must_use]
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// What it was made with.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Checks that it fits: the same identity, token ids inside the vocabulary, sections of the right size, and room for its
    /// positions.
    ///
    /// # Errors
    /// [`Error::Unfit`], [`Error::Damaged`], [`CrateError::ContextFull`].
    pub fn check(&self, identity: &Identity, engine: &Engine) -> CrateResult<()> {
        let unfit = |why| Err(Error::Unfit { path: self.path.clone(), why }.into());
        let damaged = |what| Err(Error::Damaged { path: self.path.clone(), what }.into());
        if let Some(why) = identity.difference(&self.identity) {
            return unfit(why);
        }
        let (len, vocab) = (self.contents.tokens.len(), engine.model().config.vocab);
        if len > engine.context() {
            return unfit(format!(
                "it holds {len} tokens but the context holds {}: start with -c {len} or more",
                engine.context()
            ));
        }
        if let Some(id) = self.contents.tokens.iter().find(|&&id| id as usize >= vocab) {
            return damaged(format!("token {id} is outside the vocabulary of {vocab}"));
        }
        let (row, windows) = engine.export_sizes(len);
        if self.cache.len() != len * row + windows {
            let (found, expected) = (self.cache.len(), len * row + windows);
            return damaged(format!("{found} bytes of cache, expected {expected} for {len} positions"));
        }
        if let Some((at, range)) = self.windows.iter().find(|(at, r)| r.len() != engine.export_sizes(*at).1) {
            return damaged(format!("{} bytes of windows at position {at}", range.len()));
        }
        if self.contents.logits.as_ref().is_some_and(|(_, _, l)| l.len() != vocab) {
            return damaged(format!("logits of another vocabulary, expected {vocab}"));
        }
        Ok(())
    }

    /// Puts the cache and the checkpoints into `seq`, which is empty. Call [`Self::check`] first.
    ///
    /// # Errors
    /// As [`Engine::import`].
    pub fn import(&self, engine: &mut Engine, seq: SeqId) -> CrateResult<()> {
        engine.import(seq, self.contents.tokens.len(), &self.mapping[self.cache.clone()])?;
        for (position, range) in &self.windows {
            engine.add_checkpoint(seq, *position, &self.mapping[range.clone()]);
        }
        Ok(())
    }
}

fn inside(position: u64, positions: u64) -> Result<usize, String> {
    usize::try_from(position)
        .ok()
        .filter(|_| position <= positions)
        .ok_or_else(|| format!("it is damaged: position {position} of {positions}"))
}

/// The directory, by way of a header that is sound.
fn directory(bytes: &[u8]) -> Result<Directory, String> {
    let field = |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    if bytes.get(..8) != Some(MAGIC) {
        return Err("it is no session file of clsa".into());
    }
    let version = bytes.get(8..12).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    if version != Some(VERSION) {
        let found = version.map_or_else(|| "none".into(), |v| v.to_string());
        return Err(format!("its version is {found}, this program reads {VERSION}"));
    }
    let (Some(head), Some(digest)) = (bytes.get(..48), bytes.get(48..HEADER)) else {
        return Err(format!("it is cut short: {} bytes", bytes.len()));
    };
    if digest != hash(head) {
        return Err("its header is damaged (checksum)".into());
    }
    let (offset, len) = (field(16).unwrap_or(0), field(24).unwrap_or(0));
    if len > MAX_DIRECTORY {
        return Err(format!("its directory claims {len} bytes"));
    }
    let range = range(offset, len, bytes.len()).ok_or_else(|| {
        format!("it is cut short: {} bytes, its directory ends at {offset} + {len}", bytes.len())
    })?;
    if bytes.get(32..48) != Some(&hash(&bytes[range.clone()])) {
        return Err("its directory is damaged (checksum)".into());
    }
    serde_json::from_slice(&bytes[range]).map_err(|e| format!("its directory is damaged: {e}"))
}

/// The ranges of the sections, after comparing every checksum.
fn check_sections(bytes: &Mapping, sections: &[Section]) -> Result<Vec<Range<usize>>, String> {
    bytes.will_need(0..bytes.len());
    let check = |s: &Section| {
        let range = range(s.offset, s.bytes, bytes.len())
            .filter(|r| r.start >= HEADER)
            .ok_or_else(|| format!("it is cut short or damaged: {:?} lies outside of it", s.kind))?;
        if hex(&hash(&bytes[range.clone()])) != s.xxh3 {
            return Err(format!("it is damaged: the checksum of {:?} is wrong", s.kind));
        }
        Ok(range)
    };
    sections.par_iter().map(check).collect()
}

fn range(offset: u64, len: u64, size: usize) -> Option<Range<usize>> {
    let end = offset.checked_add(len)?;
    Some(usize::try_from(offset).ok()?..usize::try_from(end).ok().filter(|&end| end <= size)?)
}
