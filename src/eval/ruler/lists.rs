//! Tracing variables, and counting words.
use super::haystack::{insert, noise};
use super::random::Random;
use super::words::{adjectives, nouns};
use super::{Growing, Sample};

/// A chain of variables: the first is a number, each other one is the one before.
struct Chain {
    value: String,
    names: Vec<String>,
    /// Where the assignments stand, increasing.
    depths: Vec<f64>,
}

/// Assignments after the first.
const HOPS: usize = 4;

impl Chain {
    fn new(names: Vec<String>, random: &mut Random) -> Self {
        let mut depths: Vec<f64> = names.iter().map(|_| random.below(1000) as f64 / 1000.0).collect();
        depths.sort_by(f64::total_cmp);
        Self { value: (10_000 + random.below(90_000)).to_string(), names, depths }
    }

    fn text(&self, n: usize) -> String {
        let of = |i: usize| match i {
            0 => format!("VAR {} = {}.", self.names[0], self.value),
            _ => format!("VAR {} = VAR {}.", self.names[i], self.names[i - 1]),
        };
        let pieces = self.depths.iter().enumerate().map(|(i, d)| ((d * n as f64).round() as usize, of(i)));
        let pieces = pieces.collect();
        insert(noise(n), pieces)
    }

    fn question(&self) -> String {
        format!(
            "Which variables have the value {}, directly or through others? List all of them.",
            self.value
        )
    }

    fn prefix(&self) -> String {
        format!("{} variables have the value {}. They are:", self.names.len(), self.value)
    }
}

/// Variable tracking: one chain in noise, after a short worked example.
pub struct Variables {
    chain: Chain,
    example: Chain,
}

impl Variables {
    pub fn new(random: &mut Random) -> Self {
        let mut names = random.distinct(2 * (HOPS + 1), |r| r.letters(5, b'A'));
        let own = names.split_off(HOPS + 1);
        Self { chain: Chain::new(own, random), example: Chain::new(names, random) }
    }
}

impl Growing for Variables {
    fn range(&self) -> (usize, usize) {
        (0, usize::MAX)
    }

    fn build(&self, n: usize) -> Sample {
        let ask = |chain: &Chain, n| {
            format!(
                "Remember the assignments of variables that are hidden in the following text.\n\n{}\n\n{}",
                chain.text(n),
                chain.question()
            )
        };
        let example =
            format!("{} {} {}", ask(&self.example, 10), self.example.prefix(), self.example.names.join(" "));
        Sample {
            prompt: format!("{example}\n\n{}", ask(&self.chain, n)),
            answer_prefix: self.chain.prefix(),
            answers: self.chain.names.clone(),
        }
    }
}

/// Words that are asked for.
const COMMON: usize = 10;
/// How often a list has each of them, and each of the others.
const OFTEN: (usize, usize) = (30, 3);

/// Common words: ten of a list come far more often than all others; a short worked example comes first.
pub struct CommonWords {
    words: Vec<String>,
    example: Vec<String>,
    random: Random,
}

impl CommonWords {
    pub fn new(random: &mut Random) -> Self {
        let mut words: Vec<&str> = nouns().iter().chain(adjectives()).copied().collect();
        random.shuffle(&mut words);
        // A common word inside another one would be found in an answer that does not name it.
        let mut common: Vec<&str> = vec![];
        for i in 0..words.len() {
            let word = words[i];
            if common.len() < 2 * COMMON
                && word.len() > 3
                && !words.iter().any(|other| *other != word && other.contains(word))
            {
                common.push(word);
            }
        }
        let rest = words.into_iter().filter(|w| !common.contains(w)).map(str::to_owned);
        let (own, example) = (&common[..COMMON], &common[COMMON..]);
        let owned = |list: &[&str]| list.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        Self {
            words: owned(own).into_iter().chain(rest).collect(),
            example: owned(example),
            random: random.clone(),
        }
    }

    /// The first `n` words that are not asked for: single ones, then pairs.
    fn others(&self, n: usize, random: &mut Random) -> Vec<String> {
        let single = self.words[COMMON..].iter().take(n).cloned();
        let mut all: Vec<String> = single.collect();
        if all.len() < n {
            let more = n - all.len();
            let asked = |word: &str| self.words[..COMMON].iter().any(|w| w == word);
            all.extend(random.distinct(more, |r| {
                loop {
                    let (a, b) = (r.one(adjectives()), r.one(nouns()));
                    if !asked(a) && !asked(b) {
                        return format!("{a}-{b}");
                    }
                }
            }));
        }
        all
    }
}

fn list(mut words: Vec<String>, random: &mut Random) -> String {
    random.shuffle(&mut words);
    let numbered: Vec<String> = words.iter().enumerate().map(|(i, w)| format!("{}. {w}", i + 1)).collect();
    format!(
        "Below is a numbered list of words, some of which come more often than others. Remember those that come most often.\n\n{}\n\n\
         Which {COMMON} words come most often in the list?",
        numbered.join(" ")
    )
}

const COMMON_PREFIX: &str = "The words that come most often in the list are:";

impl Growing for CommonWords {
    fn range(&self) -> (usize, usize) {
        (1, adjectives().len() * nouns().len() / 4)
    }

    fn build(&self, n: usize) -> Sample {
        let mut random = self.random.clone();
        let times = |words: &[String], n| -> Vec<String> {
            words.iter().flat_map(|w| std::iter::repeat_n(w.clone(), n)).collect()
        };
        let mut example = times(&self.example, 3);
        example.extend(self.words[COMMON..].iter().rev().take(20).cloned());
        let example = list(example, &mut random);
        let answers = self.words[..COMMON].to_vec();
        // A list that is too short for thirty times keeps the proportion.
        let often = (OFTEN.1 * n / 2).clamp(OFTEN.1 + 2, OFTEN.0);
        let mut words = times(&answers, often);
        words.extend(times(&self.others(n, &mut random), OFTEN.1));
        let text = list(words, &mut random);
        Sample {
            prompt: format!("{example} {COMMON_PREFIX} {}\n\n{text}", self.example.join(", ")),
            answer_prefix: COMMON_PREFIX.into(),
            answers,
        }
    }
}

/// Frequent words: coded words by a Zipf distribution of this exponent; the most frequent one is noise.
pub struct FrequentWords {
    words: Vec<String>,
    random: Random,
}

const ALPHA: i32 = 2;

impl FrequentWords {
    pub fn new(random: &mut Random) -> Self {
        // A word at rank r comes n / (1.645 r^2) times: no text here is long enough for rank 1000.
        Self { words: random.distinct(1000, |r| r.letters(6, b'a')), random: random.clone() }
    }
}

impl Growing for FrequentWords {
    fn range(&self) -> (usize, usize) {
        // From 60 words on the ranks 2, 3 and 4 and the rest differ in number.
        (60, usize::MAX)
    }

    fn build(&self, n: usize) -> Sample {
        let zeta: f64 = (1..10_000).map(|r| f64::from(r).powi(-ALPHA)).sum();
        let times = |rank: usize| (n as f64 * (rank as f64).powi(-ALPHA) / zeta).round() as usize;
        let noise = std::iter::once("...");
        let ranked = noise.chain(self.words.iter().map(String::as_str)).enumerate();
        let mut text: Vec<&str> = vec![];
        for (i, word) in ranked.take_while(|(i, _)| times(i + 1) > 0) {
            text.extend(std::iter::repeat_n(word, times(i + 1)));
        }
        self.random.clone().shuffle(&mut text);
        Sample {
            prompt: format!(
                "Read the following coded text and count how often each coded word comes. Do not mind the dots '...' between them.\n\n{}\n\n\
                 Which three coded words come most often in the text?",
                text.join(" ")
            ),
            answer_prefix: "The three coded words that come most often in the text are:".into(),
            answers: self.words[..3].to_vec(),
        }
    }
}
