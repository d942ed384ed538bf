//! Texts to hide things in.
use std::collections::HashMap;

use super::random::Random;
use super::words::{adjectives, nouns, verbs};

/// What the sentences around the needles are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Haystack {
    /// The same few sentences over and over.
    Noise,
    /// Prose: the sentences of a given text, over and over where it is too short, or generated ones where there is none.
    Prose,
    /// Other needles, with keys and values of the same kinds as the ones asked for.
    Needles,
}

/// Sentences repeated as noise.
const NOISE: [&str; 5] = [
    "The river is wide.",
    "The hill is steep.",
    "The road is long.",
    "We walk on for a while.",
    "Then we walk home again.",
];

/// The first `n` sentences of the noise.
pub fn noise(n: usize) -> Vec<String> {
    NOISE.iter().cycle().take(n).map(|s| (*s).to_owned()).collect()
}

/// The first `n` sentences of `text`, from the beginning again where it ends.
pub fn repeated(text: &[String], n: usize) -> Vec<String> {
    text.iter().cycle().take(n).cloned().collect()
}

/// Cuts a text into sentences; line ends count as spaces.
#[must_use]
pub fn sentences(text: &str) -> Vec<String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut all = vec![];
    let mut sentence = String::new();
    for word in words {
        if !sentence.is_empty() {
            sentence.push(' ');
        }
        sentence.push_str(word);
        let ends = word.trim_end_matches(['"', '\'', ')', '”', '’']).ends_with(['.', '!', '?']);
        // Tables and lists have no sentences: no piece is very long.
        if (ends && sentence.len() > 20) || sentence.len() > 600 {
            all.push(std::mem::take(&mut sentence));
        }
    }
    if !sentence.is_empty() {
        all.push(sentence);
    }
    all
}

/// `n` generated sentences that make plain, if dull, prose. The first `m` of them are those of `prose(m)` by the same generator.
pub fn prose(n: usize, random: &mut Random) -> Vec<String> {
    (0..n).map(|_| sentence(random)).collect()
}

fn sentence(r: &mut Random) -> String {
    const PLACES: [&str; 10] = [
        "near",
        "behind",
        "above",
        "beside",
        "beyond",
        "inside",
        "under",
        "across from",
        "next to",
        "opposite",
    ];
    const TIMES: [&str; 10] = [
        "in the morning",
        "every evening",
        "before noon",
        "once a week",
        "in early spring",
        "after the rain",
        "at the end of the day",
        "during the holidays",
        "late at night",
        "when the wind turns",
    ];
    const FEELINGS: [&str; 8] =
        ["seems", "looks", "remains", "becomes", "feels", "stays", "turned out", "has always been"];
    let (a, b, c) = (r.one(adjectives()), r.one(adjectives()), r.one(adjectives()));
    let (x, y, z) = (r.one(nouns()), r.one(nouns()), r.one(nouns()));
    let (v, w) = (r.one(verbs()), r.one(verbs()));
    let (place, time, feels) = (r.one(&PLACES), r.one(&TIMES), r.one(&FEELINGS));
    let text = match r.below(12) {
        0 => format!("the {a} {x} {v} the {y} {place} the {b} {z}."),
        1 => format!("{time}, a {x} {v} the {a} {y}, and the {z} {w} it too."),
        2 => format!("nobody {v} the {x} as often as the {a} {y} does {time}."),
        3 => format!("the {x} {place} the {y} {feels} {a}, although the {z} {feels} {b}."),
        4 => format!("whoever {v} a {a} {x} also {w} the {y} that stands {place} the {z}."),
        5 => format!("there is a {a} {x} {place} the {y}, and {time} it {v} every {b} {z}."),
        6 => format!("because the {x} {feels} {a}, the {y} {v} the {b} {z} only {time}."),
        7 => format!("if the {a} {x} {v} the {y}, then the {z} {feels} {b} again."),
        8 => format!("people say that the {x} {v} a {a} {y}, but the {z} rarely {w} anything {time}."),
        9 => format!("some think of the {a} {x} {time}; others prefer the {b} {y} {place} the {c} {z}."),
        10 => format!("the {x} and the {y} share a {a} {z}, which {feels} {b} {time}."),
        _ => format!("when the {a} {x} {v} its {y}, a {b} {z} {w} the {c} part of it."),
    };
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// Puts every piece before the sentence with its index; pieces with the same index keep their order.
pub fn insert(sentences: Vec<String>, pieces: Vec<(usize, String)>) -> String {
    let mut at: HashMap<usize, Vec<String>> = HashMap::new();
    for (i, piece) in pieces {
        at.entry(i.min(sentences.len())).or_default().push(piece);
    }
    let n = sentences.len();
    let mut all = vec![];
    for (i, sentence) in sentences.into_iter().enumerate() {
        all.extend(at.remove(&i).unwrap_or_default());
        all.push(sentence);
    }
    all.extend(at.remove(&n).unwrap_or_default());
    all.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_into_sentences() {
        let text = "This is the first sentence. And this\nis \"the second one!\" Short. A third with no end";
        let expected =
            ["This is the first sentence.", "And this is \"the second one!\"", "Short. A third with no end"];
        assert_eq!(sentences(text), expected);
        assert!(sentences(" \n").is_empty());
        assert_eq!(sentences(&"word ".repeat(1000)).len(), 9, "no piece is very long");
    }

    #[test]
    fn prose_is_reproducible_and_varied() {
        let text = prose(500, &mut Random::new(1, "prose"));
        assert_eq!(text[..20], prose(20, &mut Random::new(1, "prose")));
        let different: std::collections::HashSet<_> = text.iter().collect();
        assert_eq!(different.len(), 500);
        assert!(text.iter().all(|s| s.starts_with(char::is_uppercase) && s.ends_with('.')));
    }

    #[test]
    fn pieces_go_before_their_sentence() {
        let pieces =
            vec![(2, "x".to_owned()), (0, "y".to_owned()), (2, "z".to_owned()), (9, "end".to_owned())];
        assert_eq!(insert(noise(2), pieces), "y The river is wide. The hill is steep. x z end");
    }
}
