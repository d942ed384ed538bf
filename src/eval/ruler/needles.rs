//! Needles in haystacks.
use super::haystack::{Haystack, insert, noise, prose, repeated};
use super::random::Random;
use super::words::{adjectives, nouns};
use super::{Growing, Sample};

/// What a key or a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An adjective and a noun.
    Words,
    /// Seven digits.
    Number,
    /// A UUID.
    Uuid,
}

impl Kind {
    fn draw(self, random: &mut Random) -> String {
        match self {
            Self::Words => format!("{}-{}", random.one(adjectives()), random.one(nouns())),
            Self::Number => random.number(),
            Self::Uuid => random.uuid(),
        }
    }

    fn plural(self) -> &'static str {
        match self {
            Self::Words => "words",
            Self::Number => "numbers",
            Self::Uuid => "uuids",
        }
    }

    fn singular(self) -> &'static str {
        self.plural().trim_end_matches('s')
    }
}

/// What is hidden and asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Niah {
    pub haystack: Haystack,
    /// Of keys and of values.
    pub kinds: (Kind, Kind),
    /// Keys that are hidden.
    pub keys: usize,
    /// Values of each key.
    pub values: usize,
    /// Keys that are asked for.
    pub queries: usize,
    /// Where the first needle stands; all are at random places without it.
    pub depth: Option<f64>,
}

/// Needles with their keys, values and places.
pub struct Hidden<'a> {
    niah: Niah,
    text: &'a [String],
    /// Key, value, share of the text before it.
    needles: Vec<(String, String, f64)>,
    /// Keys asked for, with their values.
    asked: Vec<(String, Vec<String>)>,
    random: Random,
}

impl<'a> Hidden<'a> {
    pub fn new(niah: Niah, text: &'a [String], random: &mut Random) -> Self {
        let (key, value) = niah.kinds;
        let keys = random.distinct(niah.keys, |r| key.draw(r));
        let values = random.distinct(niah.keys * niah.values, |r| value.draw(r));
        let pairs = keys.iter().flat_map(|k| std::iter::repeat_n(k, niah.values)).zip(&values);
        let mut needles: Vec<_> = pairs
            .map(|(k, v)| {
                (k.clone(), v.clone(), niah.depth.unwrap_or_else(|| random.below(1000) as f64 / 1000.0))
            })
            .collect();
        let mut asked: Vec<_> =
            keys.into_iter().zip(values.chunks(niah.values).map(<[String]>::to_vec)).collect();
        random.shuffle(&mut asked);
        asked.truncate(niah.queries);
        random.shuffle(&mut needles);
        Self { niah, text, needles, asked, random: random.clone() }
    }

    fn needle(&self, key: &str, value: &str) -> String {
        let kind = self.niah.kinds.1.singular();
        if self.niah.values > 1 {
            format!("One of the special magic {kind}s for {key} is {value}.")
        } else {
            format!("The special magic {kind} for {key} is {value}.")
        }
    }
}

impl Growing for Hidden<'_> {
    fn range(&self) -> (usize, usize) {
        (0, usize::MAX)
    }

    fn build(&self, n: usize) -> Sample {
        let mut random = self.random.clone();
        let sentences = match self.niah.haystack {
            Haystack::Noise => noise(n),
            Haystack::Prose if self.text.is_empty() => prose(n, &mut random),
            Haystack::Prose => repeated(self.text, n),
            Haystack::Needles => {
                let (key, value) = self.niah.kinds;
                let taken = |k: &str| self.needles.iter().any(|(key, ..)| key == k);
                let keys = random.distinct(n + self.needles.len(), |r| key.draw(r));
                let others = keys.into_iter().filter(|k| !taken(k)).take(n);
                others.map(|k| self.needle(&k, &value.draw(&mut random))).collect()
            }
        };
        let place = |depth: f64| (depth * sentences.len() as f64).round() as usize;
        let pieces = self.needles.iter().map(|(k, v, depth)| (place(*depth), self.needle(k, v))).collect();
        let context = insert(sentences, pieces);
        let keys: Vec<&str> = self.asked.iter().map(|(k, _)| k.as_str()).collect();
        let keys = match keys.as_slice() {
            [most @ .., last] if !most.is_empty() => format!("{} and {last}", most.join(", ")),
            _ => keys.concat(),
        };
        let answers: Vec<String> = self.asked.iter().flat_map(|(_, v)| v.clone()).collect();
        let kind = self.niah.kinds.1;
        let (hidden, question, answer_prefix) = if answers.len() > 1 {
            let kinds = kind.plural();
            (
                format!(
                    "Some special magic {kinds} are hidden in the text below. Remember them: I will ask for them afterwards."
                ),
                format!("What are all the special magic {kinds} for {keys} that the text mentions?"),
                format!("The special magic {kinds} for {keys} that the text mentions are"),
            )
        } else {
            let kind = kind.singular();
            (
                format!(
                    "A special magic {kind} is hidden in the text below. Remember it: I will ask for it afterwards."
                ),
                format!("What is the special magic {kind} for {keys} that the text mentions?"),
                format!("The special magic {kind} for {keys} that the text mentions is"),
            )
        };
        Sample { prompt: format!("{hidden}\n\n{context}\n\n{question}"), answer_prefix, answers }
    }
}
