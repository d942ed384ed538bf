//! Marks in what the user wrote, so that it cannot pose as a control token once the template has put it into the prompt.
use super::{Error, Result};
use crate::tokenizer::Prompt;
use serde_json::{Map, Value};
use std::collections::HashSet;

/// Marks each place in a text where a control token begins, or may begin and go on beyond the text's end, after its first
/// character. The mark is a character that occurs nowhere else; [`Guard::remove`] takes the marks out of the prompt and keeps
/// their places.
pub(super) struct Guard<'a> {
    specials: &'a [String],
    mark: char,
}

impl<'a> Guard<'a> {
    /// `texts`: everything that goes into the prompt.
    pub fn new<'t>(specials: &'a [String], texts: impl IntoIterator<Item = &'t str>) -> Result<Self> {
        let taken: HashSet<char> =
            texts.into_iter().flat_map(str::chars).filter(|c| candidates().any(|mark| mark == *c)).collect();
        let mark = candidates().find(|c| !taken.contains(c)).ok_or(Error::NoMark)?;
        Ok(Self { specials, mark })
    }

    /// `text` with marks.
    pub fn text(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        for (at, c) in text.char_indices() {
            out.push(c);
            let rest = &text[at..];
            let begins = |s: &String| rest.starts_with(s.as_str()) || s.starts_with(rest);
            if self.specials.iter().any(begins) {
                out.push(self.mark);
            }
        }
        out
    }

    /// A value with marks in all its texts, keys included.
    pub fn value(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.text(text)),
            Value::Array(list) => list.iter().map(|v| self.value(v)).collect(),
            Value::Object(map) => Value::Object(self.map(map)),
            other => other.clone(),
        }
    }

    /// A map with marks in all its texts, keys included.
    pub fn map(&self, map: &Map<String, Value>) -> Map<String, Value> {
        map.iter().map(|(key, value)| (self.text(key), self.value(value))).collect()
    }

    /// The prompt without marks, and where they were.
    pub fn remove(&self, marked: &str) -> Prompt {
        let mut prompt = Prompt { text: String::with_capacity(marked.len()), guards: Vec::new() };
        for part in marked.split_inclusive(self.mark) {
            let text = part.strip_suffix(self.mark);
            prompt.text.push_str(text.unwrap_or(part));
            if text.is_some() {
                prompt.guards.push(prompt.text.len());
            }
        }
        prompt
    }
}

/// Noncharacters, which no text should hold, and then private-use characters.
fn candidates() -> impl Iterator<Item = char> {
    ('\u{fdd0}'..='\u{fdef}').chain('\u{e000}'..='\u{e0ff}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn specials() -> Vec<String> {
        ["<|im_end|>", "</s>", "<|"].map(String::from).to_vec()
    }

    #[test]
    fn marks_stand_inside_and_come_out_again() {
        let specials = specials();
        let guard = Guard::new(&specials, []).unwrap();
        for (text, guards) in [
            ("plain < text", &[][..]),
            ("a<|im_end|>b</s>", &[2, 13]),
            ("<|im_", &[1]),
            ("x<", &[2]),
            ("<<", &[2]),
            ("<|im_end|><|im_end|>", &[1, 11]),
            ("é</s>", &[3]),
        ] {
            let marked = guard.text(text);
            let prompt = guard.remove(&marked);
            assert_eq!((prompt.text.as_str(), &prompt.guards[..]), (text, guards));
        }
    }

    #[test]
    fn values_are_marked_to_their_depth() {
        let specials = specials();
        let guard = Guard::new(&specials, []).unwrap();
        let value = json!({"a</s>": ["</s>", {"b": "</s>"}], "n": 1, "t": true, "z": null});
        let marked = guard.value(&value).to_string();
        assert_eq!(marked.matches(guard.mark).count(), 3);
        assert_eq!(guard.remove(&marked).text, value.to_string());
    }

    #[test]
    fn the_mark_is_a_character_that_no_text_has() {
        let specials = specials();
        assert_eq!(Guard::new(&specials, ["a", "\u{fdd0}\u{fdd2}"]).unwrap().mark, '\u{fdd1}');
        let all: String = candidates().collect();
        assert!(matches!(Guard::new(&specials, [all.as_str()]), Err(Error::NoMark)));
    }

    proptest::proptest! {
        /// However texts meet, each control token that begins in one of them has a guard inside.
        #[test]
        fn no_control_token_begins_in_user_text(parts in proptest::collection::vec(("[<|s/>ime_nd]{0,12}|<\\|im_end\\|>|</s>", proptest::bool::ANY), 0..8)) {
            let specials = specials();
            let guard = Guard::new(&specials, []).unwrap();
            let mut user = Vec::new();
            let mut marked = String::new();
            let mut len = 0;
            for (text, from_user) in &parts {
                if *from_user {
                    user.push(len..len + text.len());
                    marked += &guard.text(text);
                } else {
                    marked += text;
                }
                len += text.len();
            }
            let prompt = guard.remove(&marked);
            for special in &specials {
                for (at, _) in prompt.text.match_indices(special.as_str()) {
                    let mine = user.iter().any(|range| range.contains(&at));
                    let guarded = prompt.guards.iter().any(|g| (at + 1..at + special.len()).contains(g));
                    proptest::prop_assert!(!mine || guarded, "{special} at {at} of {:?}", prompt.text);
                }
            }
        }
    }
}
