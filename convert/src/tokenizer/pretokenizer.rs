//! Recognises, by their structure, the byte-level BPE pre-tokenizers that have a name in `tokenizer.ggml.pre`.
use serde_json::Value;

/// The names that [`name`] can give.
pub(super) const NAMES: [&str; 4] = ["llama-bpe", "qwen2", "smollm", "gpt-2"];

/// The patterns of Llama 3 and Qwen 2; they differ in how many digits stay together.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// One step of a pre-tokenizer.
#[derive(Debug, PartialEq)]
enum Step<'a> {
    /// Cuts by a regular expression, keeping what it finds.
    Split(&'a str),
    /// Each digit alone.
    Digits,
    /// Bytes to characters, after GPT-2's own regular expression or without.
    ByteLevel {
        regex: bool,
    },
    Other,
}

/// The name of the pre-tokenizer in tokenizer.json, if it has one.
pub(super) fn name(pre_tokenizer: Option<&Value>) -> Option<&'static str> {
    let one;
    let steps = match pre_tokenizer?.get("type")?.as_str()? {
        "Sequence" => pre_tokenizer?.get("pretokenizers")?.as_array()?.as_slice(),
        _ => {
            one = [pre_tokenizer?.clone()];
            &one
        }
    };
    let steps: Vec<Step<'_>> = steps.iter().map(|s| step(s).unwrap_or(Step::Other)).collect();
    match steps.as_slice() {
        [Step::Split(LLAMA3), Step::ByteLevel { regex: false }] => Some("llama-bpe"),
        [Step::Split(QWEN2), Step::ByteLevel { regex: false }] => Some("qwen2"),
        [Step::Digits, Step::ByteLevel { regex: true }] => Some("smollm"),
        [Step::ByteLevel { regex: true }] => Some("gpt-2"),
        _ => None,
    }
}

fn step(value: &Value) -> Option<Step<'_>> {
    let flag = |key: &str| value.get(key).and_then(Value::as_bool);
    Some(match value.get("type")?.as_str()? {
        "Split" if value.get("behavior")?.as_str()? == "Isolated" && flag("invert") != Some(true) => {
            Step::Split(value.get("pattern")?.get("Regex")?.as_str()?)
        }
        "Digits" if flag("individual_digits") == Some(true) => Step::Digits,
        // A prefix space changes the tokens of a text's first word.
        "ByteLevel" if flag("add_prefix_space") != Some(true) => {
            Step::ByteLevel { regex: flag("use_regex").unwrap_or(true) }
        }
        _ => Step::Other,
    })
}

/// Whether the post-processor puts a special token before, and one after, a single text.
pub(super) fn added_by(post_processor: Option<&Value>) -> (bool, bool) {
    let Some(value) = post_processor else { return (false, false) };
    match value.get("type").and_then(Value::as_str) {
        Some("Sequence") => {
            let all =
                value.get("processors").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            let found = all.iter().map(|p| added_by(Some(p)));
            found.fold((false, false), |(a, b), (c, d)| (a || c, b || d))
        }
        Some("TemplateProcessing") => {
            let single = value.get("single").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            let special = |item: Option<&Value>| item.is_some_and(|i| i.get("SpecialToken").is_some());
            (special(single.first()), special(single.last()))
        }
        _ => (false, false),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_four_known_structures_are_named_and_others_are_not() {
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        let sequence = |steps: &[Value]| json!({"type": "Sequence", "pretokenizers": steps});
        let digits = json!({"type": "Digits", "individual_digits": true});
        let named = |v: Value| name(Some(&v));
        assert_eq!(named(sequence(&[split(LLAMA3), bytes(false)])), Some("llama-bpe"));
        assert_eq!(named(sequence(&[split(QWEN2), bytes(false)])), Some("qwen2"));
        assert_eq!(named(sequence(&[digits.clone(), bytes(true)])), Some("smollm"));
        assert_eq!(named(bytes(true)), Some("gpt-2"));
        assert_eq!(named(sequence(&[bytes(true)])), Some("gpt-2"));
        assert_eq!(named(bytes(false)), None);
        assert_eq!(named(sequence(&[split(r"\s+"), bytes(false)])), None);
        assert_eq!(named(sequence(&[split(QWEN2), bytes(true)])), None);
        assert_eq!(named(json!({"type": "Digits", "individual_digits": false})), None);
        assert_eq!(named(json!({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true})), None);
        assert_eq!(named(json!(null)), None);
        assert_eq!(name(None), None);
    }

    #[test]
    fn templates_tell_what_is_added() {
        let template = json!({"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
        assert_eq!(added_by(Some(&template)), (true, false));
        let sequence = json!({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]});
        assert_eq!(added_by(Some(&sequence)), (true, false));
        assert_eq!(added_by(None), (false, false));
    }
}
