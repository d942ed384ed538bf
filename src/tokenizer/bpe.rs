//! Byte-pair encoding through the crate `tokenizers`: its normalizers, pre-tokenizers and merges, fed with a vocabulary
//! that has been checked first.
use super::{
    added::Matcher,
    error::{Error, Result, cut},
};
use ahash::{AHashMap, AHashSet};
use std::{collections::HashSet, ops::Range};
use tokenizers::{
    Model, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Token,
    models::bpe::{BPE, Vocab},
    normalizer::Range as Slice,
};

/// Stands for a character without a token until it is left out. No token has this id: there are at most `u32::MAX`.
const GAP: u32 = u32::MAX;

/// A vocabulary and its merges, as a file gives them.
#[derive(Default)]
pub(super) struct Parts<'a> {
    /// Each token's text and id; no text and no id twice.
    pub tokens: Vec<(&'a str, u32)>,
    /// Pairs in the order of their rank.
    pub merges: Vec<(&'a str, &'a str)>,
    /// Control tokens: the model never produces them from text.
    pub special: HashSet<u32>,
    /// A word that is a token is taken without merging.
    pub ignore_merges: bool,
    /// Characters without a token become byte tokens `<0xNN>`.
    pub byte_fallback: bool,
    /// Token for characters that have none.
    pub unk: Option<&'a str>,
    /// Neighbouring unknown characters become one unknown token.
    pub fuse_unk: bool,
    /// Characters without a token are left out after merging, as llama.cpp does; otherwise, without `unk`, before.
    pub keep_gaps: bool,
}

impl Parts<'_> {
    /// Checks the merges and builds the model.
    fn build(self) -> Result<BPE> {
        let ids: AHashMap<&str, u32> = self.tokens.iter().copied().collect();
        // Control tokens that merges need.
        let mut needed: HashSet<u32> = HashSet::new();
        let mut seen = AHashSet::with_capacity(self.merges.len());
        let mut joined = String::new();
        for (rank, &(left, right)) in self.merges.iter().enumerate() {
            let id = |part: &str| {
                let what = || format!("{:?} is not a token", cut(part));
                let error = || Error::merge(rank, &format!("{left} {right}"), what());
                ids.get(part).copied().ok_or_else(error)
            };
            joined.clear();
            joined.extend([left, right]);
            let all = [id(left)?, id(right)?, id(&joined)?];
            if !seen.insert((all[0], all[1])) {
                return Err(Error::merge(rank, &format!("{left} {right}"), "is in the list twice"));
            }
            needed.extend(all.into_iter().filter(|id| self.special.contains(id)));
        }
        // A control token must not come out of text. Where merges or single characters need it, it cannot be left out.
        let reachable = |text: &str, id: u32| {
            !self.special.contains(&id)
                || needed.contains(&id)
                || Some(text) == self.unk
                || text.chars().nth(1).is_none()
        };
        let mut vocab: Vocab = self
            .tokens
            .iter()
            .filter(|(text, id)| reachable(text, *id))
            .map(|(text, id)| ((*text).to_owned(), *id))
            .collect();
        let mut unk = self.unk.map(str::to_owned);
        if let Some(unk) = self.unk.filter(|unk| !ids.contains_key(unk)) {
            return Err(Error::Json(format!("unk_token {:?} is not in the vocabulary", cut(unk))));
        }
        if self.keep_gaps {
            let mut gap = String::from("\0");
            while ids.contains_key(gap.as_str()) {
                gap.push('\0');
            }
            vocab.insert(gap.clone(), GAP);
            unk = Some(gap);
        }
        let merges = self.merges.iter().map(|(l, r)| ((*l).to_owned(), (*r).to_owned())).collect();
        let mut builder = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(self.ignore_merges)
            .byte_fallback(self.byte_fallback)
            .fuse_unk(self.fuse_unk);
        if let Some(unk) = unk {
            builder = builder.unk_token(unk);
        }
        builder.build().map_err(|e| Error::Encode(e.to_string()))
    }
}

/// Text to ids: added tokens, normalizer, added tokens in normalized text, pre-tokenizer, merges.
pub(super) struct Bpe {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    model: BPE,
}

impl Bpe {
    pub fn new(
        parts: Parts<'_>,
        normalizer: Option<NormalizerWrapper>,
        pre_tokenizer: Option<PreTokenizerWrapper>,
    ) -> Result<Self> {
        Ok(Self { normalizer, pre_tokenizer, model: parts.build()? })
    }

    /// Appends the ids of `text`. `special` tells at which bytes of `text` a special token may stand.
    pub fn encode(
        &self,
        text: &str,
        raw: &Matcher,
        normalized: &Matcher,
        special: &dyn Fn(&Range<usize>) -> bool,
        ids: &mut Vec<u32>,
    ) -> Result<()> {
        let mut parts = PreTokenizedString::from(text);
        let mut run = || -> tokenizers::Result<()> {
            parts.split(|_, part| cut_out(&part, raw, special))?;
            parts.split(|_, mut part| {
                if let Some(normalizer) = &self.normalizer {
                    normalizer.normalize(&mut part)?;
                }
                // Offsets inside normalized text say nothing about the raw one: judge by the whole part.
                let (start, end) = part.offsets_original();
                cut_out(&part, normalized, &|_| special(&(start..end)))
            })?;
            if let Some(pre_tokenizer) = &self.pre_tokenizer {
                pre_tokenizer.pre_tokenize(&mut parts)?;
            }
            parts.tokenize(|part| self.model.tokenize(part.get()))
        };
        run().map_err(|e| Error::Encode(e.to_string()))?;
        for (_, _, tokens) in parts.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            ids.extend(tokens.iter().flatten().map(|t| t.id).filter(|id| *id != GAP));
        }
        Ok(())
    }
}

type Split = (NormalizedString, Option<Vec<Token>>);

fn cut_out(
    part: &NormalizedString,
    matcher: &Matcher,
    special: &dyn Fn(&Range<usize>) -> bool,
) -> tokenizers::Result<Vec<Split>> {
    matcher
        .split(part.get(), special)
        .into_iter()
        .map(|(range, id)| {
            let len = range.len();
            let piece = part.slice(Slice::Normalized(range)).ok_or("a token ends inside a character")?;
            Ok((piece, id.map(|id| vec![Token::new(id, String::new(), (0, len))])))
        })
        .collect()
}
