//! Tokens that are cut out of a text whole, before the model of the tokenizer sees it.
use super::error::{Error, Result};
use aho_corasick::{AhoCorasick, Input, MatchKind};
use std::ops::Range;

/// A token added beside the vocabulary of the model, as in `added_tokens` of a tokenizer.json.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
pub(super) struct AddedToken {
    pub id: u32,
    pub content: String,
    /// A control token: found only where special tokens are asked for, and invisible in decoded text.
    #[serde(default)]
    pub special: bool,
    /// Not inside a word.
    #[serde(default)]
    pub single_word: bool,
    /// Takes the white space before it along.
    #[serde(default)]
    pub lstrip: bool,
    /// Takes the white space after it along.
    #[serde(default)]
    pub rstrip: bool,
    /// Looked for in the normalized text instead of the raw one.
    #[serde(default)]
    pub normalized: bool,
}

/// Finds added tokens, leftmost and longest first.
pub(super) struct Matcher {
    /// `None` without tokens.
    search: Option<AhoCorasick>,
    tokens: Vec<AddedToken>,
}

impl Matcher {
    pub fn new(tokens: Vec<AddedToken>) -> Result<Self> {
        let search = if tokens.is_empty() {
            None
        } else {
            let search = AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(tokens.iter().map(|t| t.content.as_bytes()))
                .map_err(|e| Error::Encode(format!("{} added tokens: {e}", tokens.len())))?;
            Some(search)
        };
        Ok(Self { search, tokens })
    }

    /// Splits `text` into ranges that cover it; those with an id are added tokens. A special token counts only where
    /// `special` allows its range.
    pub fn split(
        &self,
        text: &str,
        special: impl Fn(&Range<usize>) -> bool,
    ) -> Vec<(Range<usize>, Option<u32>)> {
        let mut parts = Vec::new();
        let mut done = 0;
        let mut from = 0;
        while let Some(m) =
            self.search.as_ref().and_then(|s| s.find(Input::new(text.as_bytes()).range(from..)))
        {
            let token = &self.tokens[m.pattern().as_usize()];
            let (before, after) = (&text[..m.start()], &text[m.end()..]);
            let refused = (token.special && !special(&m.range()))
                || (token.single_word && (before.ends_with(in_word) || after.starts_with(in_word)));
            if refused {
                // Past the first character: a shorter or later token may begin inside.
                from = m.start() + text[m.start()..].chars().next().map_or(1, char::len_utf8);
                continue;
            }
            let start = if token.lstrip { before.trim_end().len().max(done) } else { m.start() };
            let end = if token.rstrip { text.len() - after.trim_start().len() } else { m.end() };
            if done < start {
                parts.push((done..start, None));
            }
            parts.push((start..end, Some(token.id)));
            done = end;
            from = end;
        }
        if done < text.len() {
            parts.push((done..text.len(), None));
        }
        parts
    }
}

fn in_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, content: &str) -> AddedToken {
        AddedToken { id, content: content.into(), ..AddedToken::default() }
    }

    fn ids(parts: &[(Range<usize>, Option<u32>)]) -> Vec<(usize, usize, Option<u32>)> {
        parts.iter().map(|(r, id)| (r.start, r.end, *id)).collect()
    }

    #[test]
    fn longest_token_at_the_leftmost_place_wins() {
        let m = Matcher::new(vec![token(1, "<a>"), token(2, "<a><b>"), token(3, "><")]).unwrap();
        let parts = m.split("x<a><b>y<a>", |_| true);
        assert_eq!(ids(&parts), [(0, 1, None), (1, 7, Some(2)), (7, 8, None), (8, 11, Some(1))]);
    }

    #[test]
    fn refused_special_token_leaves_its_text_and_later_tokens() {
        let special = AddedToken { special: true, ..token(1, "<end>") };
        let m = Matcher::new(vec![special, token(2, "end")]).unwrap();
        assert_eq!(ids(&m.split("a<end>", |_| true)), [(0, 1, None), (1, 6, Some(1))]);
        assert_eq!(ids(&m.split("a<end>", |_| false)), [(0, 2, None), (2, 5, Some(2)), (5, 6, None)]);
    }

    #[test]
    fn strips_and_single_words() {
        let m = Matcher::new(vec![
            AddedToken { lstrip: true, rstrip: true, ..token(1, "<m>") },
            AddedToken { single_word: true, ..token(2, "day") },
        ])
        .unwrap();
        assert_eq!(
            ids(&m.split("a \u{3000}<m>\n b", |_| true)),
            [(0, 1, None), (1, 10, Some(1)), (10, 11, None)]
        );
        assert_eq!(ids(&m.split("<m> <m>", |_| true)), [(0, 4, Some(1)), (4, 7, Some(1))]);
        assert_eq!(ids(&m.split("monday", |_| true)), [(0, 6, None)]);
        assert_eq!(ids(&m.split("a day", |_| true)), [(0, 2, None), (2, 5, Some(2))]);
    }

    proptest::proptest! {
        /// The parts cover the text in order, whatever the tokens.
        #[test]
        fn parts_cover_the_text(
            tokens in proptest::collection::vec(("[<>aé ]{1,4}", 0u8..32), 0..8),
            text in "[<>aé ]{0,40}",
        ) {
            let tokens = tokens.into_iter().enumerate().map(|(i, (content, bits))| AddedToken {
                id: u32::try_from(i).unwrap(),
                content,
                special: bits & 1 > 0,
                single_word: bits & 2 > 0,
                lstrip: bits & 4 > 0,
                rstrip: bits & 8 > 0,
                normalized: bits & 16 > 0,
            });
            let m = Matcher::new(tokens.collect()).unwrap();
            let mut at = 0;
            for (range, _) in m.split(&text, |r| r.start % 2 == 0) {
                proptest::prop_assert_eq!(range.start, at);
                proptest::prop_assert!(range.end > at && text.is_char_boundary(range.end));
                at = range.end;
            }
            proptest::prop_assert_eq!(at, text.len());
        }
    }
}
