//! A tokenizer.json with parts replaced: refused, or a tokenizer that takes any text.
#![no_main]
use clsa::tokenizer::Tokenizer;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use serde_json::{Value, json};
use std::sync::LazyLock;

static DATA: LazyLock<Value> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../tests/data/tokenizers.json")).expect("valid JSON")
});

#[derive(Arbitrary, Debug)]
enum Part {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<String>),
    /// A copy of what lies at another path.
    Copy(Vec<u8>),
    Delete,
}

#[derive(Arbitrary, Debug)]
struct Input {
    variant: u8,
    /// Where, and what comes there.
    changes: Vec<(Vec<u8>, Part)>,
    size: u16,
    text: String,
    special: bool,
}

/// The node at a path: each byte chooses a member.
fn at<'a>(mut node: &'a mut Value, path: &[u8]) -> &'a mut Value {
    for step in path {
        let step = usize::from(*step);
        let len = match &*node {
            Value::Object(map) => map.len(),
            Value::Array(list) => list.len(),
            _ => 0,
        };
        if len == 0 {
            break;
        }
        node = match node {
            Value::Object(map) => map.values_mut().nth(step % len).expect("in range"),
            Value::Array(list) => &mut list[step % len],
            _ => unreachable!("has members"),
        };
    }
    node
}

libfuzzer_sys::fuzz_target!(|input: Input| {
    let variants = DATA["variants"].as_object().expect("an object");
    let variant = variants.values().nth(usize::from(input.variant) % variants.len()).expect("in range");
    let mut config = variant["config"].clone();
    config["model"] = DATA[config["model"]["is"].as_str().expect("a name")].clone();
    for (path, part) in input.changes {
        let value = match part {
            Part::Null => Value::Null,
            Part::Bool(v) => json!(v),
            Part::Int(v) => json!(v),
            Part::Float(v) => json!(v),
            Part::Text(v) => json!(v),
            Part::List(v) => json!(v),
            Part::Copy(path) => at(&mut config, &path).clone(),
            Part::Delete => {
                if let Some((last, parent)) = path.split_last() {
                    match at(&mut config, parent) {
                        Value::Object(map) if !map.is_empty() => {
                            let key = map.keys().nth(usize::from(*last) % map.len()).cloned();
                            key.and_then(|key| map.shift_remove(&key));
                        }
                        Value::Array(list) if !list.is_empty() => {
                            list.remove(usize::from(*last) % list.len());
                        }
                        _ => {}
                    }
                }
                continue;
            }
        };
        *at(&mut config, &path) = value;
    }
    let Ok(tokenizer) = Tokenizer::from_tokenizer_json(&config.to_string(), usize::from(input.size)) else {
        return;
    };
    if let Ok(ids) = tokenizer.encode(&input.text, input.special) {
        tokenizer.decode(&ids, true).expect("ids are in the vocabulary");
    }
});
