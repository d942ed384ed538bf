//! Models of random weights: the full shapes of the paper can be run anywhere.
use serde_json::{Value, json};

use crate::{
    Error, Result,
    family::{Layout, Origin},
    model::{Model, Source, Tensor},
    random::SplitMix,
    tokenizer,
};

macro_rules! presets {
    ($($name:literal),*) => {
        /// Names of the presets in `models/`, and their configurations.
        pub const PRESETS: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../models/", $name, ".json")))),*];
    };
}
presets!("clsa-4b", "yoco-4b", "transformer-4b", "clsa-tiny", "yoco-tiny", "transformer-tiny");

/// A model of a preset's shape with random weights: normal, of deviation `1/sqrt(fan_in)`, which keeps activations about 1; those
/// that write into the residual stream smaller by `sqrt(2 layers)`, which keeps it about 1 too; norms are 1. The same seed gives
/// the same weights, whatever the threads.
///
/// # Errors
/// When there is no such preset.
pub fn model(preset: &str, seed: u64) -> Result<Model<'static>> {
    let config =
        PRESETS.iter().find(|(name, _)| *name == preset).map(|(_, config)| *config).ok_or_else(|| {
            let all: Vec<_> = PRESETS.iter().map(|(name, _)| *name).collect();
            Error::Input(format!("unknown preset {preset:?}: expected one of {}", all.join(", ")))
        })?;
    let bad = |what: String| Error::Input(format!("preset {preset}: {what}"));
    let config: Value = serde_json::from_str(config).map_err(|e| bad(e.to_string()))?;
    let layout = Layout::from_config(config).map_err(bad)?;
    let tied = layout.tied_output.is_some();
    let tensors = layout.tensors.iter().enumerate().map(|(i, wanted)| {
        let seed = SplitMix::new(seed, i as u64).next();
        let source = match (&wanted.origin, wanted.shape.as_slice()) {
            (Origin::Computed(values), _) => Source::Values(values.clone()),
            (_, &[n]) => Source::Values(vec![1.0; n as usize]),
            (_, shape) => {
                Source::Random { deviation: deviation(&wanted.name, shape, layout.n_layer, tied), seed }
            }
        };
        Tensor { name: wanted.name.clone(), shape: wanted.shape.clone(), source }
    });
    let tensors = tensors.collect();
    let mut metadata = layout.metadata;
    metadata.string("general.name", &format!("{preset} with random weights, seed {seed}"));
    let notes = tokenizer::add_synthetic(&synthetic_tokenizer(layout.vocab), layout.vocab, &mut metadata)
        .map_err(bad)?;
    metadata.string("tokenizer.chat_template", CHAT_TEMPLATE);
    Ok(Model { metadata, tensors, n_gqa: layout.n_gqa, notes })
}

fn deviation(name: &str, shape: &[u64], n_layer: usize, tied: bool) -> f32 {
    let fan_in = shape.first().map_or(1.0, |&n| n as f32);
    if name == "token_embd.weight" && !tied {
        1.0
    } else if name.ends_with(".attn_output.weight") || name.ends_with(".ffn_down.weight") {
        1.0 / (fan_in * 2.0 * n_layer as f32).sqrt()
    } else {
        1.0 / fan_in.sqrt()
    }
}

/// Special tokens of the synthetic tokenizer; the first ids.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// A few merges, so that there are some.
const MERGES: [(&str, &str); 6] = [("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("Ġ", "a")];
/// ChatML.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + \
    '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A byte-level BPE tokenizer of `vocab` tokens: special ones, the 256 bytes, a few merges, and words that text never becomes but
/// any token can be shown as.
fn synthetic_tokenizer(vocab: usize) -> Value {
    let mut tokens: Vec<String> = SPECIAL.iter().map(|s| (*s).to_owned()).collect();
    tokens.extend((0..=255).map(|b| byte_character(b).to_string()));
    tokens.extend(MERGES.iter().map(|(a, b)| format!("{a}{b}")));
    tokens.extend((0..).map(|i| format!("Ġw{i}")).take(vocab.saturating_sub(tokens.len())));
    tokens.truncate(vocab);
    let have = |t: &str| tokens.iter().any(|x| x == t);
    let merges: Vec<_> =
        MERGES.iter().filter(|(a, b)| have(&format!("{a}{b}"))).map(|(a, b)| json!([a, b])).collect();
    let added: Vec<_> = (0..SPECIAL.len().min(vocab))
        .map(|id| {
            json!({"id": id, "content": SPECIAL[id], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let vocab: serde_json::Map<_, _> = tokens.into_iter().enumerate().map(|(id, t)| (t, json!(id))).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges},
    })
}

/// The printable character that stands for a byte in byte-level BPE: itself where it is printable, else one from U+0100 on.
fn byte_character(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + before).unwrap_or('\u{fffd}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_gpt2s_characters() {
        assert_eq!(byte_character(b' '), 'Ġ');
        assert_eq!(byte_character(b'\n'), 'Ċ');
        assert_eq!(byte_character(b'a'), 'a');
        let all: std::collections::HashSet<char> = (0..=255).map(byte_character).collect();
        assert_eq!(all.len(), 256);
    }

    #[test]
    fn every_preset_is_a_model() {
        for (name, _) in PRESETS {
            let model = model(name, 1).unwrap();
            assert!(model.notes.is_empty(), "{name}: {:?}", model.notes);
            let four_b = name.ends_with("-4b");
            let parameters: usize = model.tensors.iter().map(|t| t.row_len() * t.n_rows()).sum();
            assert_eq!(four_b, parameters > 2_500_000_000, "{name}: {parameters}");
            let rows = model.tensors.iter().filter(|t| t.shape.len() > 1).map(Tensor::row_len);
            assert!(rows.into_iter().all(|n| n.is_multiple_of(256)), "{name}");
        }
        assert!(model("clsa-5b", 1).unwrap_err().to_string().contains("clsa-4b"));
    }
}
