//! Tells a model's reasoning from its answer while the text streams.

/// The tags that models put around their reasoning.
pub const TAGS: [(&str, &str); 5] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
];

/// A piece of a model's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Part of the answer.
    Answer(&'a str),
    /// Part of the reasoning.
    Thought(&'a str),
    /// A tag that opens reasoning.
    Open(&'a str),
    /// A tag that closes it.
    Close(&'a str),
}

/// The state between two pieces of a text.
#[derive(Clone, Debug, Default)]
pub struct Splitter {
    /// The pair of tags that the text is inside of.
    inside: Option<usize>,
    /// Nothing but white space has come on this line; a tag that opens stands at the beginning of a line.
    mid_line: bool,
    /// What may be the beginning of a tag.
    held: String,
}

impl Splitter {
    /// A splitter for what follows `prompt`, which may end with a tag that opens.
    #[must_use]
    pub fn after(prompt: &str) -> Self {
        let end = prompt.trim_end();
        Self { inside: TAGS.iter().position(|(open, _)| end.ends_with(open)), ..Self::default() }
    }

    /// Whether the text is inside of reasoning.
    #[must_use]
    pub fn is_thinking(&self) -> bool {
        self.inside.is_some()
    }

    /// Splits the next piece of text.
    pub fn push(&mut self, text: &str, mut sink: impl FnMut(Piece<'_>)) {
        self.held.push_str(text);
        let held = std::mem::take(&mut self.held);
        let mut rest = held.as_str();
        while let Some(at) = self.next_tag(rest) {
            let (before, tag) = rest.split_at(at);
            self.text(before, &mut sink);
            match self.match_tag(tag) {
                Match::Whole(pair, len) => {
                    let (tag, after) = tag.split_at(len);
                    sink(if self.inside.is_some() { Piece::Close(tag) } else { Piece::Open(tag) });
                    self.inside = if self.inside.is_some() { None } else { Some(pair) };
                    rest = after;
                }
                Match::Partial => {
                    self.held = tag.to_owned();
                    return;
                }
                Match::No => {
                    let first = tag.chars().next().map_or(0, char::len_utf8);
                    let (text, after) = tag.split_at(first);
                    self.text(text, &mut sink);
                    rest = after;
                }
            }
        }
        self.text(rest, &mut sink);
    }

    /// Gives what is held back.
    pub fn finish(&mut self, mut sink: impl FnMut(Piece<'_>)) {
        let held = std::mem::take(&mut self.held);
        self.text(&held, &mut sink);
    }

    fn next_tag(&self, rest: &str) -> Option<usize> {
        rest.find(['<', '['])
    }

    fn match_tag(&self, text: &str) -> Match {
        let candidates = TAGS.iter().enumerate().filter_map(|(i, (open, close))| match self.inside {
            Some(pair) => (pair == i).then_some((i, *close)),
            None => (!self.mid_line).then_some((i, *open)),
        });
        let mut best = Match::No;
        for (i, tag) in candidates {
            if text.starts_with(tag) {
                return Match::Whole(i, tag.len());
            }
            if tag.starts_with(text) {
                best = Match::Partial;
            }
        }
        best
    }

    fn text(&mut self, text: &str, sink: &mut impl FnMut(Piece<'_>)) {
        if text.is_empty() {
            return;
        }
        self.mid_line = match text.rsplit_once('\n') {
            Some((_, last)) => !last.trim().is_empty(),
            None => self.mid_line || !text.trim().is_empty(),
        };
        sink(if self.inside.is_some() { Piece::Thought(text) } else { Piece::Answer(text) });
    }
}

enum Match {
    /// The pair, and the length of the tag.
    Whole(usize, usize),
    Partial,
    No,
}

/// A whole text without its reasoning, and the reasoning.
#[must_use]
pub fn split(text: &str, prompt: &str) -> (String, String) {
    let (mut answer, mut thought) = (String::new(), String::new());
    let mut sink = |piece: Piece<'_>| match piece {
        Piece::Answer(t) => answer.push_str(t),
        Piece::Thought(t) => thought.push_str(t),
        Piece::Open(_) | Piece::Close(_) => {}
    };
    let mut splitter = Splitter::after(prompt);
    splitter.push(text, &mut sink);
    splitter.finish(&mut sink);
    (answer.trim().to_owned(), thought.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(parts: &[&str], prompt: &str) -> Vec<(char, String)> {
        let mut out: Vec<(char, String)> = vec![];
        let mut sink = |piece: Piece<'_>| {
            let (kind, text) = match piece {
                Piece::Answer(t) => ('a', t),
                Piece::Thought(t) => ('t', t),
                Piece::Open(t) => ('<', t),
                Piece::Close(t) => ('>', t),
            };
            match out.last_mut() {
                Some((last, whole)) if *last == kind => whole.push_str(text),
                _ => out.push((kind, text.to_owned())),
            }
        };
        let mut splitter = Splitter::after(prompt);
        parts.iter().for_each(|p| splitter.push(p, &mut sink));
        splitter.finish(&mut sink);
        out
    }

    fn owned(list: &[(char, &str)]) -> Vec<(char, String)> {
        list.iter().map(|(k, t)| (*k, (*t).to_owned())).collect()
    }

    #[test]
    fn tags_are_found_across_pieces() {
        let want = owned(&[('<', "<think>"), ('t', "hm < 3"), ('>', "</think>"), ('a', "yes")]);
        assert_eq!(pieces(&["<th", "ink>hm <", " 3</thi", "nk>yes"], ""), want);
        assert_eq!(
            pieces(&["hm</think>", "yes"], "<|assistant|>\n<think>\n"),
            owned(&[('t', "hm"), ('>', "</think>"), ('a', "yes")])
        );
    }

    #[test]
    fn a_tag_that_is_only_talked_about_is_text() {
        let text = "The <think> tag, and </think>, and a < b.";
        assert_eq!(pieces(&[text], ""), owned(&[('a', text)]));
        let wrong = "<think>a</reasoning>b";
        assert_eq!(pieces(&[wrong], ""), owned(&[('<', "<think>"), ('t', "a</reasoning>b")]));
    }

    #[test]
    fn reasoning_is_separated_from_the_answer() {
        assert_eq!(split("<think>\na\n</think>\n\nb", ""), ("b".into(), "a".into()));
        assert_eq!(split("b <", ""), ("b <".into(), String::new()));
    }

    proptest! {
        /// However a text is cut, the pieces are the same and together are the text.
        #[test]
        fn pieces_are_the_text(parts in proptest::collection::vec("(<think>|</think>|<|/|think|>|[THINK]|\n|a|é| ){0,5}", 0..8)) {
            let refs: Vec<&str> = parts.iter().map(String::as_str).collect();
            let whole = parts.concat();
            let got = pieces(&refs, "");
            prop_assert_eq!(got.iter().map(|(_, t)| t.as_str()).collect::<String>(), whole.clone());
            prop_assert_eq!(got, pieces(&[&whole], ""));
        }
    }
}
