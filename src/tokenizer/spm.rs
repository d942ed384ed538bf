//! SentencePiece's byte-pair encoding: the neighbours whose joint piece has the best score are merged first, the left
//! pair first among equals; what is no piece falls apart into byte tokens.
use super::error::{Error, Result};
use ahash::AHashMap;
use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
};

/// The pieces that text can become.
pub(super) struct SentencePiece {
    /// Id and score.
    pieces: AHashMap<Box<str>, (u32, f32)>,
    /// The longest piece in bytes.
    longest: usize,
    /// The token of each byte.
    bytes: [u32; 256],
}

/// Two neighbouring symbols whose texts together are a piece.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both when the pair was found: it is stale when a symbol has grown since.
    len: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(Reverse(self.left).cmp(&Reverse(other.left)))
    }
}
impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Pair {}

/// A stretch of the text in the chain of those that are left; empty once merged into its left neighbour.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    prev: Option<usize>,
    next: Option<usize>,
}

impl SentencePiece {
    /// `pieces`: text, id and finite score of each token that text may become. `bytes`: the token for each byte.
    pub fn new<'a>(
        pieces: impl IntoIterator<Item = (&'a str, u32, f32)>,
        bytes: [Option<u32>; 256],
        unk: Option<u32>,
    ) -> Result<Self> {
        let mut map = AHashMap::new();
        let mut longest = 0;
        for (text, id, score) in pieces {
            if !score.is_finite() {
                return Err(Error::token(
                    id,
                    text,
                    format!("its score is {score}, expected a finite number"),
                ));
            }
            longest = longest.max(text.len());
            // -0 and 0 are one score.
            map.insert(text.into(), (id, score + 0.0));
        }
        let mut found = [0; 256];
        for (byte, slot) in (0u8..=255).zip(&mut found) {
            let single = std::str::from_utf8(std::slice::from_ref(&byte)).ok().and_then(|s| map.get(s));
            let id = bytes[usize::from(byte)].or(single.map(|(id, _)| *id)).or(unk);
            *slot = id.ok_or_else(|| {
                Error::key(
                    "tokenizer.ggml.tokens",
                    format!("no token for the byte <0x{byte:02X}>, and no unknown token to stand for it"),
                )
            })?;
        }
        Ok(Self { pieces: map, longest, bytes: found })
    }

    /// Appends the ids of `text`, in which spaces are already written as `▁`.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start,
                len: c.len_utf8(),
                prev: i.checked_sub(1),
                next: Some(i + 1),
            })
            .collect();
        let Some(last) = symbols.last_mut() else { return };
        last.next = None;
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() {
            queue.extend(self.pair(text, &symbols, right - 1, right));
        }
        while let Some(pair) = queue.pop() {
            let (left, right) = (symbols[pair.left], symbols[pair.right]);
            if left.len == 0 || right.len == 0 || left.len + right.len != pair.len {
                continue;
            }
            symbols[pair.left].len = pair.len;
            symbols[pair.left].next = right.next;
            symbols[pair.right].len = 0;
            if let Some(next) = right.next {
                symbols[next].prev = Some(pair.left);
                queue.extend(self.pair(text, &symbols, pair.left, next));
            }
            if let Some(prev) = left.prev {
                queue.extend(self.pair(text, &symbols, prev, pair.left));
            }
        }
        let mut at = Some(0);
        while let Some(i) = at {
            let symbol = symbols[i];
            let piece = &text[symbol.start..symbol.start + symbol.len];
            match self.pieces.get(piece) {
                Some((id, _)) => ids.push(*id),
                None => ids.extend(piece.bytes().map(|b| self.bytes[usize::from(b)])),
            }
            at = symbol.next;
        }
    }

    fn pair(&self, text: &str, symbols: &[Symbol], left: usize, right: usize) -> Option<Pair> {
        let len = symbols[left].len + symbols[right].len;
        if len > self.longest {
            return None;
        }
        let start = symbols[left].start;
        let (_, score) = self.pieces.get(&text[start..start + len])?;
        Some(Pair { score: *score, left, right, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model(pieces: &[(&str, f32)]) -> SentencePiece {
        let bytes = std::array::from_fn(|b| Some(1000 + u32::try_from(b).unwrap()));
        let pieces = pieces.iter().zip(0..).map(|((text, score), id)| (*text, id, *score));
        SentencePiece::new(pieces, bytes, None).unwrap()
    }

    fn encode(m: &SentencePiece, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        m.encode(text, &mut ids);
        ids
    }

    /// The definition: as long as a pair is a piece, merge the best one, the leftmost among equals.
    fn naive(m: &SentencePiece, text: &str) -> Vec<u32> {
        let mut symbols: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let mut best: Option<(f32, usize)> = None;
            for i in 1..symbols.len() {
                let joint = format!("{}{}", symbols[i - 1], symbols[i]);
                if let Some((_, score)) = m.pieces.get(joint.as_str())
                    && best.is_none_or(|(top, _)| *score > top)
                {
                    best = Some((*score, i));
                }
            }
            let Some((_, i)) = best else { break };
            let right = symbols.remove(i);
            symbols[i - 1] += &right;
        }
        let bytes = |s: &String| s.bytes().map(|b| m.bytes[usize::from(b)]).collect();
        symbols
            .iter()
            .flat_map(|s| m.pieces.get(s.as_str()).map_or_else(|| bytes(s), |(id, _)| vec![*id]))
            .collect()
    }

    #[test]
    fn best_score_first_then_the_left() {
        let m = model(&[("a", 0.), ("b", 0.), ("ab", -2.), ("ba", -1.), ("aba", -3.), ("aa", -1.)]);
        assert_eq!(encode(&m, "ab"), [2]);
        assert_eq!(encode(&m, "abab"), [4, 1]);
        assert_eq!(encode(&m, "bab"), [3, 1]);
        assert_eq!(encode(&m, "aaa"), [5, 0]);
        assert!(encode(&m, "").is_empty());
        assert_eq!(encode(&m, "a€"), [0, 1000 + 0xe2, 1000 + 0x82, 1000 + 0xac]);
    }

    #[test]
    fn scores_must_be_finite_and_bytes_must_have_tokens() {
        for score in [f32::NAN, f32::INFINITY] {
            let e = SentencePiece::new([("a", 7, score)], [Some(0); 256], None).err().unwrap();
            assert!(matches!(e, Error::Token { id: 7, .. }), "{e}");
        }
        let mut bytes = [Some(0); 256];
        bytes[0x80] = None;
        let e = SentencePiece::new([], bytes, None).err().unwrap();
        assert!(e.to_string().contains("<0x80>"), "{e}");
        assert_eq!(SentencePiece::new([], bytes, Some(3)).unwrap().bytes[0x80], 3);
        bytes[0x61] = None;
        assert_eq!(SentencePiece::new([("a", 9, 0.)], bytes, Some(3)).unwrap().bytes[0x61], 9);
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            pieces in proptest::collection::btree_map("[abc▁]{1,4}", -4i8..4, 0..24),
            text in "[abcd▁]{0,24}",
        ) {
            let pieces: Vec<(&str, f32)> = pieces.iter().map(|(t, s)| (t.as_str(), f32::from(*s))).collect();
            let m = model(&pieces);
            prop_assert_eq!(encode(&m, &text), naive(&m, &text));
        }
    }
}
