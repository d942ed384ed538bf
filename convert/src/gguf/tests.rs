//! Round trips, and one test per error.
use std::sync::atomic::AtomicBool;

use ggml_kernels::quant::Type;
use proptest::prelude::*;

use super::*;

fn metadata() -> Metadata {
    let mut m = Metadata::default();
    m.string("general.architecture", "yoco-clsa");
    m.u32("a.u32", 7);
    m.u64("a.u64", u64::MAX);
    m.i32("a.i32", -3);
    m.f32("a.f32", 0.5);
    m.bool("a.bool", true);
    m.strings("a.strings", &["", "é", "<0x0A>"]);
    m.i32s("a.i32s", &[1, -2]);
    m.f32s("a.f32s", &[0.25, -0.5]);
    m
}

fn plan(name: &str, shape: &[u64], ty: Type) -> TensorPlan {
    TensorPlan { name: name.into(), shape: shape.into(), ty }
}

/// A small valid file; returns its folder (kept alive) and path.
fn sample() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sample.gguf");
    let tensors = vec![plan("a.weight", &[3], Type::F32), plan("b.weight", &[32, 2], Type::Q8_0)];
    let mut w = Writer::create(&path, metadata(), tensors, None).unwrap();
    w.append(&[1; 5]).unwrap();
    w.append(&[2; 7]).unwrap();
    w.append(&[3; 68]).unwrap();
    w.finish().unwrap();
    (dir, path)
}

#[test]
fn round_trip() {
    let (dir, path) = sample();
    let file = File::open(&path).unwrap();
    assert_eq!(file.require::<u32>("a.u32").unwrap(), 7);
    assert_eq!(file.require::<usize>("a.u32").unwrap(), 7);
    assert_eq!(file.require::<u64>("a.u64").unwrap(), u64::MAX);
    assert_eq!(file.require::<i32>("a.i32").unwrap(), -3);
    assert_eq!(file.require::<f32>("a.f32").unwrap(), 0.5);
    assert!(file.require::<bool>("a.bool").unwrap());
    assert_eq!(file.require::<&str>("general.architecture").unwrap(), "yoco-clsa");
    assert_eq!(file.require::<Vec<&str>>("a.strings").unwrap(), ["", "é", "<0x0A>"]);
    assert_eq!(file.require::<Vec<i32>>("a.i32s").unwrap(), [1, -2]);
    assert_eq!(file.require::<Vec<f32>>("a.f32s").unwrap(), [0.25, -0.5]);
    assert_eq!(file.optional::<u32>("absent").unwrap(), None);
    let b = file.tensor("b.weight").unwrap();
    assert_eq!((b.row_len(), b.n_rows(), b.n_elements(), b.ty), (32, 2, 64, Type::Q8_0));
    assert_eq!(file.data(b), [3; 68]);
    assert_eq!(file.data(&file.tensors()[0]), [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]);
    assert_eq!(b.offset % file.alignment(), 0);
    let checked = std::sync::atomic::AtomicUsize::new(0);
    file.verify(|n| _ = checked.fetch_add(n, std::sync::atomic::Ordering::Relaxed)).unwrap();
    assert_eq!(checked.into_inner(), file.len());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn values_copied_from_a_file_are_the_same() {
    let (dir, path) = sample();
    let file = File::open(&path).unwrap();
    let mut copy = Metadata::default();
    file.metadata().for_each(|(key, value)| copy.value(key, value));
    let out = dir.path().join("copy.gguf");
    Writer::create(&out, copy, Vec::new(), None).unwrap().finish().unwrap();
    let copied = File::open(&out).unwrap();
    for (key, value) in file.metadata().filter(|(k, _)| !k.starts_with("clsa.checksum")) {
        assert_eq!(copied.get(key), Some(value), "{key}");
    }
    copied.verify(|_| ()).unwrap();
}

#[test]
fn wrong_or_missing_keys_name_key_and_types() {
    let (_dir, path) = sample();
    let file = File::open(&path).unwrap();
    let message = |e: Error| e.to_string();
    let e = message(file.require::<u32>("a.f32").unwrap_err());
    assert!(e.contains("key a.f32: expected u32, found f32"), "{e}");
    let e = message(file.require::<u32>("a.i32").unwrap_err());
    assert!(e.contains("expected u32, found i32 -3"), "{e}");
    let e = message(file.require::<&str>("nowhere").unwrap_err());
    assert!(e.contains("key nowhere: expected string, found nothing"), "{e}");
    let e = message(file.require::<Vec<f32>>("a.strings").unwrap_err());
    assert!(e.contains("expected array of f32, found array of 3 string"), "{e}");
}

#[test]
fn an_unfinished_or_aborted_file_leaves_the_old_one() {
    let (dir, path) = sample();
    let before = std::fs::read(&path).unwrap();
    let tensors = vec![plan("x", &[8], Type::F32)];
    let abort = AtomicBool::new(false);
    let mut w = Writer::create(&path, metadata(), tensors.clone(), Some(&abort)).unwrap();
    w.append(&[0; 16]).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    abort.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(w.append(&[0; 16]), Err(crate::Error::Interrupted)));
    drop(w);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let w = Writer::create(dir.path().join("new.gguf"), metadata(), tensors, None).unwrap();
    drop(w);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let bad = |name: &str, shape: &[u64], ty| {
        Writer::file_size(&metadata(), &[plan(name, shape, ty)]).unwrap_err().to_string()
    };
    assert!(bad("x", &[33], Type::Q8_0).contains("not whole blocks"));
    assert!(bad("x", &[0], Type::F32).contains("zero"));
    assert!(bad("x", &[1 << 40, 1 << 40], Type::F32).contains("counted"));
    assert!(bad("x", &[1; 5], Type::F32).contains("dimensions"));
    assert!(bad(&"n".repeat(64), &[1], Type::F32).contains("64 bytes"));
    let twice = [plan("x", &[1], Type::F32), plan("x", &[2], Type::F32)];
    assert!(Writer::file_size(&metadata(), &twice).unwrap_err().to_string().contains("two tensors"));
    let dir = tempfile::tempdir().unwrap();
    assert!(Writer::create(dir.path(), metadata(), vec![], None).unwrap_err().to_string().contains("folder"));
    assert!(Writer::create(dir.path().join("no/such/x.gguf"), metadata(), vec![], None).is_err());
}

/// Bytes of a file, written by hand so that each field can be damaged.
struct Raw(Vec<u8>);
impl Raw {
    fn new(n_tensors: u64, n_entries: u64) -> Self {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(n_tensors.to_le_bytes());
        bytes.extend(n_entries.to_le_bytes());
        Self(bytes)
    }
    fn u32(mut self, v: u32) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u64(mut self, v: u64) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn str(self, v: &[u8]) -> Self {
        let mut raw = self.u64(v.len() as u64);
        raw.0.extend(v);
        raw
    }
    fn tensor(self, name: &[u8], shape: &[u64], ty: u32, offset: u64) -> Self {
        let raw = self.str(name).u32(shape.len() as u32);
        shape.iter().fold(raw, |raw, &n| raw.u64(n)).u32(ty).u64(offset)
    }
    /// Pads to the data and adds `n` bytes of it.
    fn data(mut self, n: usize) -> Self {
        let len = self.0.len().next_multiple_of(32) + n;
        self.0.resize(len, 0);
        self
    }
}

/// The error about these bytes: offset and text.
fn refused(raw: Raw) -> (u64, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.gguf");
    std::fs::write(&path, raw.0).unwrap();
    match File::open(&path).expect_err("refused") {
        Error::Damaged { offset, what, .. } => (offset, what),
        other => panic!("{other}"),
    }
}

#[test]
fn every_error_of_the_header_has_its_offset() {
    let cases: Vec<(Raw, u64, &str)> = vec![
        (Raw(vec![]), 0, "ends within the magic"),
        (Raw(b"GGML\x03\0\0\0".to_vec()), 0, "not a GGUF file"),
        (Raw(b"GGUF\x01\0\0\0".to_vec()), 4, "version 1"),
        (Raw(b"GGUF\0\0\0\x03".to_vec()), 4, "big-endian"),
        (Raw(b"GGUF\x03\0\0\0".to_vec()), 8, "number of tensors"),
        (Raw::new(u64::MAX, 0), 8, "at most 0"),
        (Raw::new(0, 1 << 60), 16, "metadata entries"),
        (Raw::new(0, 1).str(b"").u32(0).data(64), 24, "empty key"),
        (Raw::new(0, 1).u64(70_000).data(64), 24, "at most 65535"),
        (Raw::new(0, 1).u64(u64::MAX).data(64), 24, "at most 65535"),
        (Raw::new(0, 1).str(b"\xffk").data(64), 32, "not UTF-8"),
        (Raw::new(0, 1).str(b"k").u32(13).data(64), 33, "unknown value type 13"),
        (Raw::new(0, 1).str(b"k").u32(7).u32(2).data(64), 37, "expected 0 or 1"),
        (Raw::new(0, 1).str(b"k").u32(8).u64(u64::MAX), 45, "ends within a string"),
        (Raw::new(0, 1).str(b"k").u32(9).u32(9).u64(0), 37, "array of arrays"),
        (Raw::new(0, 1).str(b"k").u32(9).u32(4).u64(u64::MAX / 4), 41, "elements in key k"),
        (Raw::new(0, 1).str(b"k").u32(9).u32(4).u64(13).u32(0), 49, "ends within the array"),
        (Raw::new(0, 1).str(b"k").u32(9).u32(7).u64(1).u32(9), 49, "expected 0 or 1"),
        (Raw::new(0, 1).str(b"k").u32(10).u32(0), 37, "ends within the value"),
        (Raw::new(0, 2).str(b"k").u32(4).u32(0).str(b"k").u32(4).u32(0).data(64), 41, "appears twice"),
        (Raw::new(0, 1).str(b"general.alignment").u32(4).u32(24).data(64), 53, "power of two"),
        (Raw::new(0, 1).str(b"general.alignment").u32(4).u32(0).data(64), 53, "power of two"),
        (Raw::new(0, 1).str(b"general.alignment").u32(10).u64(64).data(64), 53, "a u32"),
        (Raw::new(1, 0).tensor(&[b'n'; 64], &[1], 0, 0).data(64), 24, "at most 63"),
        (Raw::new(1, 0).tensor(b"", &[1], 0, 0).data(64), 24, "without a name"),
        (Raw::new(1, 0).tensor(b"t", &[], 0, 0).data(64), 33, "0 dimensions"),
        (Raw::new(1, 0).tensor(b"t", &[1; 5], 0, 0).data(64), 33, "5 dimensions"),
        (Raw::new(1, 0).tensor(b"t", &[0], 0, 0).data(64), 33, "zero"),
        (Raw::new(1, 0).tensor(b"t", &[1 << 33, 1 << 33], 0, 0).data(64), 33, "counted"),
        (Raw::new(1, 0).tensor(b"t", &[1 << 62], 0, 0).data(64), 33, "addressed"),
        (Raw::new(1, 0).tensor(b"t", &[33], 8, 0).data(64), 33, "whole blocks"),
        (Raw::new(1, 0).tensor(b"t", &[32], 4, 0).data(64), 45, "tensor t: type number 4"),
        (Raw::new(1, 0).tensor(b"t", &[8], 0, 8).data(64), 49, "multiple of the alignment"),
        (Raw::new(1, 0).tensor(b"t", &[8], 0, 64).data(64), 49, "end past"),
        (Raw::new(1, 0).tensor(b"t", &[8], 0, u64::MAX - 31).data(64), 49, "end past"),
        (Raw::new(2, 0).tensor(b"t", &[9], 0, 0).tensor(b"u", &[8], 0, 32).data(64), 82, "overlap"),
        (Raw::new(2, 0).tensor(b"t", &[8], 0, 0).tensor(b"t", &[8], 0, 32).data(64), 57, "appears twice"),
    ];
    for (raw, offset, text) in cases {
        let (at, what) = refused(raw);
        assert!(what.contains(text) && at == offset, "expected {text:?} at {offset}, got {what:?} at {at}");
    }
}

#[test]
fn a_missing_file_or_a_folder_cannot_be_opened() {
    assert!(matches!(File::open("/no/such/file.gguf"), Err(Error::Open { .. })));
    assert!(matches!(File::open("/"), Err(Error::Open { .. })));
}

#[test]
fn files_without_checksums_cannot_be_verified() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plain.gguf");
    std::fs::write(&path, Raw::new(1, 0).tensor(b"t", &[8], 0, 0).data(32).0).unwrap();
    let file = File::open(&path).unwrap();
    assert!(!file.has_checksums());
    assert!(matches!(file.verify(|_| ()), Err(Error::Key { .. })));
}

#[test]
fn verify_finds_every_flipped_byte_and_every_added_one() {
    let (dir, path) = sample();
    let good = std::fs::read(&path).unwrap();
    let bad = dir.path().join("bad.gguf");
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        std::fs::write(&bad, &bytes).unwrap();
        let result = File::open(&bad).and_then(|f| f.verify(|_| ()));
        assert!(result.is_err(), "a flip at byte {at} goes unnoticed");
    }
    for cut in 0..good.len() {
        std::fs::write(&bad, &good[..cut]).unwrap();
        let result = File::open(&bad).and_then(|f| f.verify(|_| ()));
        // The padding after the last tensor may be missing: nothing of value is.
        let padding_only = cut >= good.len() - (32 - 68 % 32);
        assert_eq!(result.is_err(), !padding_only, "cut to {cut} of {} bytes", good.len());
    }
    std::fs::write(&bad, [good.as_slice(), &[0; 64]].concat()).unwrap();
    assert!(File::open(&bad).unwrap().verify(|_| ()).is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(flips in prop::collection::vec((0usize..900, any::<u8>()), 1..12), cut in 0usize..1200) {
        let (dir, path) = sample();
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, value) in flips {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.truncate(cut.max(24));
        let bad = dir.path().join("bad.gguf");
        std::fs::write(&bad, bytes).unwrap();
        if let Ok(file) = File::open(&bad) {
            file.metadata().for_each(drop);
            file.tensors().iter().for_each(|t| _ = std::hint::black_box(file.data(t).to_vec()));
            let _ = file.verify(|_| ());
        }
    }
}
