//! SentencePiece vocabularies: `tokenizer.model`, and byte-fallback BPE in tokenizer.json.
use std::collections::HashMap;

use super::{Kind, Vocabulary};

/// Whether a token is one byte, written `<0x0A>`.
pub(super) fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    digits
        .is_some_and(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_lowercase()))
}

/// Scores that make a SentencePiece tokenizer merge in the order of `merges`: the earlier, the higher.
pub(super) fn scores_of_merges(tokens: &[String], merges: &[String]) -> Vec<f32> {
    let mut rank: HashMap<String, usize> = HashMap::new();
    for (i, merge) in merges.iter().enumerate() {
        rank.entry(merge.replacen(' ', "", 1)).or_insert(i);
    }
    // Tokens that no merge makes are never the result of one; single characters lie below all.
    let last = merges.len();
    tokens.iter().map(|t| -(*rank.get(t).unwrap_or(&last) as f32)).collect()
}

/// Reads `tokenizer.model`, a protocol buffer whose field 1 repeats pieces of text (1), score (2) and kind (3). Tokens of
/// `added` with ids beyond it are appended as user-defined.
pub(super) fn read(bytes: &[u8], vocab: usize, added: &HashMap<String, u32>) -> Result<Vocabulary, String> {
    let mut list = Vocabulary::unused(vocab);
    list.scores = vec![-10_000.0; vocab];
    let mut n = 0;
    let mut message = Message { bytes };
    while let Some((field, value)) = message.next()? {
        let (1, Field::Bytes(piece)) = (field, value) else { continue };
        let (text, score, kind) = piece_fields(piece)?;
        list.set(n, text, kind)?;
        if let Some(s) = list.scores.get_mut(n) {
            *s = score;
        }
        n += 1;
    }
    if n == 0 {
        return Err("no pieces: not a SentencePiece model".into());
    }
    for (token, &id) in added {
        if id as usize >= n {
            list.set(id as usize, token, Kind::UserDefined)?;
        }
    }
    Ok(list)
}

fn piece_fields(piece: &[u8]) -> Result<(&str, f32, Kind), String> {
    let (mut text, mut score, mut kind) = ("", 0.0, Kind::Normal);
    let mut message = Message { bytes: piece };
    while let Some((field, value)) = message.next()? {
        match (field, value) {
            (1, Field::Bytes(b)) => {
                text = std::str::from_utf8(b).map_err(|_| "a piece is not UTF-8".to_owned())?
            }
            (2, Field::Fixed32(bits)) => score = f32::from_bits(bits),
            (3, Field::Varint(v)) => {
                kind = match v {
                    1 => Kind::Normal,
                    2 => Kind::Unknown,
                    3 => Kind::Control,
                    4 => Kind::UserDefined,
                    5 => Kind::Unused,
                    6 => Kind::Byte,
                    other => return Err(format!("piece {text:?} has kind {other}: expected 1 to 6")),
                }
            }
            _ => {}
        }
    }
    if score.is_finite() { Ok((text, score, kind)) } else { Err(format!("piece {text:?} has score {score}")) }
}

/// A protocol buffer's fields, one after another.
struct Message<'a> {
    bytes: &'a [u8],
}

enum Field<'a> {
    Varint(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
    Fixed64,
}

impl<'a> Message<'a> {
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Field::Varint(self.varint()?),
            1 => self.take(8).map(|_| Field::Fixed64)?,
            2 => {
                let len = self.varint()?;
                Field::Bytes(self.take(len)?)
            }
            5 => {
                let mut bits = [0; 4];
                bits.copy_from_slice(self.take(4)?);
                Field::Fixed32(u32::from_le_bytes(bits))
            }
            other => return Err(format!("wire type {other}: not a protocol buffer")),
        };
        Ok(Some((key >> 3, value)))
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let &[byte] = self.take(1)? else { break };
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number of more than 64 bits: not a protocol buffer".into())
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let split = usize::try_from(n).ok().and_then(|n| self.bytes.split_at_checked(n));
        let (taken, rest) = split.ok_or("it ends in the middle of a field")?;
        self.bytes = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
        let mut p = vec![0x0a, text.len() as u8];
        p.extend(text.as_bytes());
        p.push(0x15);
        p.extend(score.to_le_bytes());
        p.extend([0x18, kind]);
        let mut m = vec![0x0a, p.len() as u8];
        m.extend(p);
        m
    }

    #[test]
    fn pieces_scores_and_kinds_are_read() {
        let model = [piece("<unk>", 0.0, 2), piece("<0x0A>", 0.0, 6), piece("▁the", -3.5, 1)].concat();
        let added = HashMap::from([("<s2>".to_owned(), 3)]);
        let list = read(&model, 5, &added).unwrap();
        assert_eq!(list.tokens, ["<unk>", "<0x0A>", "▁the", "<s2>", "[PAD4]"]);
        assert_eq!(list.kinds, [Kind::Unknown, Kind::Byte, Kind::Normal, Kind::UserDefined, Kind::Unused]);
        assert_eq!(list.scores[2], -3.5);
        assert!(read(&model, 2, &added).unwrap_err().contains("2 rows"));
        assert!(read(&model[..model.len() - 1], 5, &added).is_err());
        assert!(read(b"", 5, &added).is_err());
    }

    #[test]
    fn earlier_merges_score_higher() {
        let tokens = ["a", "b", "ab", "abc"].map(String::from);
        let merges = ["a b", "ab c"].map(String::from);
        assert_eq!(scores_of_merges(&tokens, &merges), [-2.0, -2.0, 0.0, -1.0]);
    }

    #[test]
    fn bytes_are_two_upper_case_digits() {
        assert!(is_byte("<0x0A>"));
        for not in ["<0x-1>", "<0x0a>", "<0x00A>", "<0x0A", "<0x>"] {
            assert!(!is_byte(not), "{not}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes, 100, &HashMap::new());
        }
    }
}
