//! The bytes that each token stands for, and their way back to text.
use super::{
    Tokenizer,
    error::{Error, Result},
};

/// How the text of a token in the file writes its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's alphabet: each character is a byte (`Ġ` is a space).
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0xNN>` is a byte.
    SentencePiece,
}

impl Spelling {
    /// The bytes of a token that is not an added one.
    pub fn bytes(self, text: &str) -> Vec<u8> {
        match self {
            // A text outside the alphabet stands for itself, as in the Python package `tokenizers`.
            Self::ByteLevel => {
                text.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| text.as_bytes().into())
            }
            Self::SentencePiece => match byte_token(text) {
                Some(byte) => vec![byte],
                None => text.replace('▁', " ").into_bytes(),
            },
        }
    }
}

/// The byte that a character of GPT-2's byte-level alphabet stands for: printable Latin-1 characters are themselves, the
/// other 68 bytes follow in order from U+0100.
pub(super) fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        v @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(v).ok(),
        v @ 0x100..=0x143 => {
            let n = u8::try_from(v - 0x100).ok()?;
            Some(match n {
                0..=0x20 => n,
                0x21..=0x42 => 0x7f + (n - 0x21),
                _ => 0xad,
            })
        }
        _ => None,
    }
}

/// The byte of a token `<0xNN>`.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if hex { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The bytes of all tokens, side by side.
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// Where each token ends in `bytes`.
    ends: Vec<usize>,
}

impl Pieces {
    /// Takes the bytes of the tokens 0, 1, ... in order; empty for ids without a token.
    pub fn new<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut all = Self { bytes: Vec::new(), ends: Vec::new() };
        for piece in pieces {
            all.bytes.extend_from_slice(piece);
            all.ends.push(all.bytes.len());
        }
        all
    }
    pub fn len(&self) -> usize {
        self.ends.len()
    }
    pub fn get(&self, id: u32) -> Result<&[u8]> {
        let out = || Error::IdOutOfRange { id, size: self.len() };
        let at = usize::try_from(id).map_err(|_| out())?;
        let end = *self.ends.get(at).ok_or_else(out)?;
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        Ok(&self.bytes[start..end])
    }
}

/// Turns tokens into text as they come, in whole characters. What it has returned in all, with [`Self::finish`], is what
/// `String::from_utf8_lossy` makes of all bytes: a byte that cannot be part of a character becomes U+FFFD.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StreamDecoder {
    /// The beginning of a character, at most 3 bytes.
    pending: Vec<u8>,
    /// Special tokens appear as their text.
    show_special: bool,
}

impl StreamDecoder {
    /// A decoder; `show_special` makes control tokens visible.
    #[must_use]
    pub fn new(show_special: bool) -> Self {
        Self { pending: Vec::new(), show_special }
    }

    /// Takes the next token and returns the characters that it completes, perhaps none.
    ///
    /// # Errors
    /// [`Error::IdOutOfRange`].
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        let piece = tokenizer.piece(id)?;
        if tokenizer.is_special(id) && !self.show_special {
            return Ok(String::new());
        }
        Ok(self.push_bytes(piece))
    }

    pub(super) fn push_bytes(&mut self, piece: &[u8]) -> String {
        self.pending.extend_from_slice(piece);
        let mut text = String::new();
        let mut whole = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            whole += chunk.valid().len();
            let rest = chunk.invalid();
            if rest.is_empty() {
                continue;
            }
            let at_end = whole + rest.len() == self.pending.len();
            if at_end && std::str::from_utf8(rest).is_err_and(|e| e.error_len().is_none()) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            whole += rest.len();
        }
        self.pending.drain(..whole);
        text
    }

    /// Ends the text: a character left unfinished becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn byte_alphabet_is_the_one_of_the_tokenizers_crate() {
        let mut bytes: Vec<u8> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet()
            .into_iter()
            .filter_map(byte_of)
            .collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(
            "Ġ Ċ ĉ ġ ł Ń ! ÿ".split(' ').map(|s| byte_of(s.chars().next().unwrap())).collect::<Vec<_>>(),
            [
                Some(b' '),
                Some(b'\n'),
                Some(b'\t'),
                Some(0x7f),
                Some(0xa0),
                Some(0xad),
                Some(b'!'),
                Some(0xff)
            ]
        );
        assert_eq!(byte_of('▁'), None);
        assert_eq!(byte_of('\u{144}'), None);
        assert_eq!(byte_of(' '), None);
    }

    #[test]
    fn byte_tokens_are_two_hexadecimal_digits() {
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0xff>"), Some(255));
        for bad in
            ["<0x-1>", "<0x+1>", "<0x1>", "<0x001>", "<0x>", "<0xG0>", "<0x0A", "0x0A>", "<0x0A> ", "<0xé>"]
        {
            assert_eq!(byte_token(bad), None, "{bad}");
        }
    }

    #[test]
    fn spellings() {
        assert_eq!(Spelling::ByteLevel.bytes("Ġé"), [b' ', 0xe9]);
        assert_eq!(Spelling::ByteLevel.bytes("Ġ▁"), "Ġ▁".as_bytes());
        assert_eq!(Spelling::SentencePiece.bytes("▁a▁"), b" a ");
        assert_eq!(Spelling::SentencePiece.bytes("<0x0A>"), b"\n");
    }

    #[test]
    fn characters_come_whole_and_broken_ones_are_replaced() {
        let mut d = StreamDecoder::new(false);
        let euro = "€".as_bytes();
        assert_eq!(d.push_bytes(&euro[..1]), "");
        assert_eq!(d.push_bytes(&euro[1..2]), "");
        assert_eq!(d.push_bytes(&euro[2..]), "€");
        assert_eq!(d.push_bytes(&[b'a', 0xf0, 0x9f]), "a");
        assert_eq!(d.push_bytes(b"b"), "\u{fffd}b");
        assert_eq!(d.push_bytes(&[0xff, 0xe2]), "\u{fffd}");
        assert_eq!(d.finish(), "\u{fffd}");
        assert_eq!(d.finish(), "");
    }

    proptest! {
        #[test]
        fn stream_equals_lossy_whole(bytes in proptest::collection::vec(prop_oneof![
            any::<u8>(), Just(0xe2), Just(0x82), Just(0xac), Just(0xf0), Just(0x9f), Just(b'a')
        ], 0..64), cuts in proptest::collection::vec(1usize..5, 64)) {
            let mut d = StreamDecoder::new(false);
            let mut text = String::new();
            let mut rest = &bytes[..];
            for cut in cuts {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                text += &d.push_bytes(now);
                prop_assert!(d.pending.len() <= 3);
                rest = later;
            }
            text += &d.push_bytes(rest);
            text += &d.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
