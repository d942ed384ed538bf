//! A hundred damaged model files: each an error with exit code 2, never a panic or a signal.
use super::*;

/// A fixed generator (SplitMix64), so that failures repeat.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// Damaged copies of a model, each with what was done to it.
fn damages(whole: &[u8], header: usize) -> Vec<(String, Vec<u8>)> {
    let mut random = Random(1);
    let mut all = vec![];
    for i in 0..30 {
        let len = if i < 15 { random.below(header) } else { header + random.below(whole.len() - header) };
        all.push((format!("cut to {len} bytes"), whole[..len].to_vec()));
    }
    for _ in 0..40 {
        let (at, bit) = (random.below(header), random.below(8));
        let mut bytes = whole.to_vec();
        bytes[at] ^= 1 << bit;
        all.push((format!("bit {bit} of byte {at} of the header flipped"), bytes));
    }
    for _ in 0..15 {
        let at = header + random.below(whole.len() - header);
        let mut bytes = whole.to_vec();
        bytes[at] ^= 0x10;
        all.push((format!("byte {at} of the data changed"), bytes));
    }
    // Version, number of tensors, number of keys, and the length of the first key: absurd values.
    for (what, at) in [("version", 4), ("tensors", 8), ("keys", 16), ("key length", 24)] {
        for value in [0u64, 1 << 31, u64::MAX / 2, u64::MAX] {
            let mut bytes = whole.to_vec();
            let width = if what == "version" { 4 } else { 8 };
            bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            all.push((format!("{what} set to {value}"), bytes));
        }
    }
    all
}

#[test]
fn a_hundred_damaged_files_are_refused() {
    let folder = Folder::with_model();
    let whole = std::fs::read(folder.file("model.gguf")).expect("the model");
    let facts = output(["inspect", "--json", &folder.model()]);
    let facts: serde_json::Value = serde_json::from_str(&facts.assert_succeeds().stdout).expect("JSON");
    let header = facts["data_offset"].as_u64().expect("where the data begins") as usize;
    let damages = damages(&whole, header);
    assert!(damages.len() > 100, "{}", damages.len());
    let path = folder.write("damaged.gguf", b"");
    let (mut refused, mut ran) = (0, 0);
    for (what, bytes) in damages {
        std::fs::write(&path, &bytes).expect("a damaged copy");
        // The checksums find every change.
        let verified = output(["verify", &path]);
        assert_eq!(verified.code, Some(2), "{what}: {verified:?}");
        verified.assert_fails(2, &[&path]);
        // Without looking at every byte a change of a value may pass; it must not crash.
        let ran_it = output(["run", "-m", &path, "-p", "x", "-n", "2", "-c", "256", "--temp", "0"]);
        match ran_it.code {
            Some(0) => ran += 1,
            _ => {
                ran_it.assert_fails(2, &[]);
                refused += 1;
            }
        }
        let inspected = output(["inspect", &path]);
        assert!(matches!(inspected.code, Some(0 | 2)), "{what}: {inspected:?}");
        if bytes.len() != whole.len() {
            ran_it.assert_fails(2, &[&path]);
            inspected.assert_fails(2, &[&path]);
        }
    }
    println!("verify refused all; run refused {refused} and ran {ran} whose values alone were changed");
    assert!(refused > 60, "{refused}");
}
