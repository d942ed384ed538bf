//! Any tokens, types, scores and merges as a `tokenizer.ggml` vocabulary: refused, or a tokenizer that takes any text.
#![no_main]
use clsa::tokenizer::{GgmlVocab, StreamDecoder, Tokenizer};
use libfuzzer_sys::arbitrary::{self, Arbitrary};

#[derive(Arbitrary, Debug)]
struct Input {
    llama: bool,
    pre: u8,
    /// Text, type, score.
    tokens: Vec<(String, u8, f32)>,
    /// Merges of tokens, and others.
    pairs: Vec<(u8, u8)>,
    merges: Vec<String>,
    space_prefix: Option<bool>,
    unk: Option<u8>,
    text: String,
    special: bool,
}

libfuzzer_sys::fuzz_target!(|input: Input| {
    let tokens: Vec<&str> = input.tokens.iter().map(|t| t.0.as_str()).collect();
    let token = |at: u8| tokens.get(usize::from(at)).copied().unwrap_or_default();
    let pairs = input.pairs.iter().map(|(l, r)| format!("{} {}", token(*l), token(*r)));
    let merges: Vec<String> = pairs.chain(input.merges.iter().cloned()).collect();
    let vocab = GgmlVocab {
        model: if input.llama { "llama" } else { "gpt2" },
        pre: Some(["llama-bpe", "qwen2", "smollm", "gpt-2"][usize::from(input.pre % 4)]),
        scores: Some(input.tokens.iter().map(|t| t.2).collect()),
        types: Some(input.tokens.iter().map(|t| i32::from(t.1 % 8)).collect()),
        merges: Some(merges.iter().map(String::as_str).collect()),
        add_space_prefix: input.space_prefix,
        unk: input.unk.map(u32::from),
        tokens,
    };
    let Ok(tokenizer) = Tokenizer::from_vocab(&vocab) else { return };
    let ids = tokenizer.encode(&input.text, input.special).expect("a text becomes ids");
    let mut decoder = StreamDecoder::new(true);
    let mut text = String::new();
    for id in &ids {
        text += &decoder.push(&tokenizer, *id).expect("ids are in the vocabulary");
    }
    text += &decoder.finish();
    let whole = tokenizer.decode(&ids, true).expect("ids are in the vocabulary");
    assert!(text == whole || text == format!(" {whole}"));
    if !input.special {
        let controls = ids.iter().filter(|id| tokenizer.is_special(**id) && Some(**id) != vocab.unk);
        for id in controls {
            // Only a control token of one character can come out of text: where it is the vocabulary's letter.
            assert!(
                tokenizer.piece(*id).is_ok_and(|p| String::from_utf8_lossy(p).chars().count() == 1)
                    || !input.llama
            );
        }
    }
});
