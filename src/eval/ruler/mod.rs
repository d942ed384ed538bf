//! RULER's thirteen synthetic tasks for long contexts (arXiv 2404.06654), and the needle in a haystack, written from their description.
//!
//! A sample is made to fill a budget of tokens: what is hidden and asked is drawn first, from the seed, the task, the length and the
//! sample's number; then the text around it grows as far as it fits. Wording and word lists are our own, so results compare with
//! each other and not with published ones.
mod answer;
mod haystack;
mod lists;
mod needles;
pub mod qa;
mod random;
mod words;

use std::str::FromStr;

use crate::error::{Error, Result};

pub use answer::{Answer, Prompter, answers};
pub use haystack::sentences;
pub use random::Random;

/// The tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// One needle (word, number) in noise.
    NiahSingle1,
    /// One needle (word, number) in prose.
    NiahSingle2,
    /// One needle (word, UUID) in prose.
    NiahSingle3,
    /// Four needles in prose, one of them asked for.
    NiahMultikey1,
    /// One needle (word, number) among needles of the same kind.
    NiahMultikey2,
    /// One needle (UUID, UUID) among needles of the same kind.
    NiahMultikey3,
    /// Four values of one key.
    NiahMultivalue,
    /// Four keys asked for at once.
    NiahMultiquery,
    /// Variables assigned to each other over four hops.
    VariableTracking,
    /// The ten words that a list has most often.
    CommonWords,
    /// The three coded words that a text has most often, by a Zipf distribution.
    FrequentWords,
    /// A question about one of many paragraphs, `SQuAD`.
    Qa1,
    /// A question about two of many paragraphs, `HotpotQA`.
    Qa2,
}

impl Task {
    /// All of them, in the order of the paper.
    pub const ALL: [Self; 13] = [
        Self::NiahSingle1,
        Self::NiahSingle2,
        Self::NiahSingle3,
        Self::NiahMultikey1,
        Self::NiahMultikey2,
        Self::NiahMultikey3,
        Self::NiahMultivalue,
        Self::NiahMultiquery,
        Self::VariableTracking,
        Self::CommonWords,
        Self::FrequentWords,
        Self::Qa1,
        Self::Qa2,
    ];

    /// The name that RULER gives it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NiahSingle1 => "niah_single_1",
            Self::NiahSingle2 => "niah_single_2",
            Self::NiahSingle3 => "niah_single_3",
            Self::NiahMultikey1 => "niah_multikey_1",
            Self::NiahMultikey2 => "niah_multikey_2",
            Self::NiahMultikey3 => "niah_multikey_3",
            Self::NiahMultivalue => "niah_multivalue",
            Self::NiahMultiquery => "niah_multiquery",
            Self::VariableTracking => "vt",
            Self::CommonWords => "cwe",
            Self::FrequentWords => "fwe",
            Self::Qa1 => "qa_1",
            Self::Qa2 => "qa_2",
        }
    }

    /// Tokens that an answer may have; they are part of the length.
    #[must_use]
    pub fn answer_tokens(self) -> usize {
        match self {
            Self::VariableTracking => 30,
            Self::CommonWords => 120,
            Self::FrequentWords => 50,
            Self::Qa1 | Self::Qa2 => 32,
            _ => 128,
        }
    }
}

impl FromStr for Task {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        (Self::ALL.into_iter().find(|t| t.name() == s))
            .ok_or_else(|| format!("found '{s}', expected one of {}", names()))
    }
}

/// What a sample is made for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spec {
    /// One of RULER's tasks.
    Task(Task),
    /// One needle (word, number) in prose, after this share of it.
    Needle {
        /// 0: at the beginning, 1: at the end.
        depth: f64,
    },
}

impl Spec {
    /// Names it in results and in what the random numbers begin with.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::Task(task) => task.name().to_owned(),
            Self::Needle { depth } => format!("depth {:.0} %", 100.0 * depth),
        }
    }

    /// As [`Task::answer_tokens`].
    #[must_use]
    pub fn answer_tokens(self) -> usize {
        match self {
            Self::Task(task) => task.answer_tokens(),
            Self::Needle { .. } => 32,
        }
    }

    /// The share of the expected answers that `text` has, as RULER scores it, 0 to 1: all of them, or any where several mean the same.
    #[must_use]
    pub fn score(self, text: &str, answers: &[String]) -> f64 {
        match self {
            Self::Task(Task::Qa1 | Task::Qa2) => match_part(text, answers),
            _ => match_all(text, answers),
        }
    }
}

/// Share of `answers` that stand in `text`, in any case.
#[must_use]
pub fn match_all(text: &str, answers: &[String]) -> f64 {
    let text = text.to_lowercase();
    let found = answers.iter().filter(|a| text.contains(&a.to_lowercase())).count();
    found as f64 / answers.len().max(1) as f64
}

/// 1 when any of `answers` stands in `text`, in any case.
#[must_use]
pub fn match_part(text: &str, answers: &[String]) -> f64 {
    let text = text.to_lowercase();
    f64::from(u8::from(answers.iter().any(|a| text.contains(&a.to_lowercase()))))
}

/// A question over a long text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// What is given to the model.
    pub prompt: String,
    /// How the answer begins, which is given too.
    pub answer_prefix: String,
    /// What is to be in the answer.
    pub answers: Vec<String>,
}

/// Texts from outside that samples are made of.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Sentences of the prose; generated ones where there are none.
    pub prose: Vec<String>,
    /// Questions of `qa_1`.
    pub squad: Option<qa::Questions>,
    /// Questions of `qa_2`.
    pub hotpot: Option<qa::Questions>,
}

/// A sample that can have any amount of text around what it asks.
trait Growing {
    /// The least and the largest amount.
    fn range(&self) -> (usize, usize);
    /// The sample with `n` units of text.
    fn build(&self, n: usize) -> Sample;
}

/// Makes sample `index` of `spec` with as much text as fits into `budget` tokens, answer included; `count` says how many tokens a prompt
/// with its answer prefix has.
///
/// # Errors
/// [`Error::Input`] when not even the least text fits, or a source is missing; those of `count`.
pub fn sample(
    spec: Spec,
    budget: usize,
    index: usize,
    seed: u64,
    sources: &Sources,
    mut count: impl FnMut(&Sample) -> Result<usize>,
) -> Result<Sample> {
    let mut random = Random::new(seed, &format!("{} {budget} {index}", spec.name()));
    let growing = growing(spec, index, &mut random, sources)?;
    let room = budget.saturating_sub(spec.answer_tokens());
    let (least, most) = growing.range();
    let mut best = growing.build(least);
    let (mut low, mut tokens) = (least, count(&best)?);
    if tokens > room {
        return Err(Error::Input(format!(
            "{} needs at least {} tokens, its length is {budget}: use longer --lengths",
            spec.name(),
            tokens + spec.answer_tokens()
        )));
    }
    // Tokens grow nearly in proportion to units: each guess lies on the line through what is known.
    let mut high: Option<(usize, usize)> = None;
    let enough = room - (room / 100).max(16).min(room);
    while low < most && tokens < enough {
        let (slope, end) = match high {
            Some((n, t)) => ((t - tokens) as f64 / (n - low) as f64, n - 1),
            None => ((tokens as f64 / low.max(1) as f64).max(0.5), most),
        };
        let guess = low + (((room - tokens) as f64 / slope) as usize).max(1);
        // Without an upper end the first slope counts the question too: at most fourfold, then on from there.
        let guess = if high.is_none() { guess.min(4 * low.max(8)) } else { guess };
        let n = guess.min(end);
        if n <= low {
            break;
        }
        let sample = growing.build(n);
        let t = count(&sample)?;
        if t <= room {
            (low, tokens, best) = (n, t, sample);
        } else {
            high = Some((n, t));
        }
    }
    Ok(best)
}

/// `n` generated sentences of the kind that haystacks are made of.
#[must_use]
pub fn generated_prose(n: usize) -> String {
    haystack::prose(n, &mut Random::new(0, "prose")).join(" ")
}

fn growing<'a>(
    spec: Spec,
    index: usize,
    random: &mut Random,
    sources: &'a Sources,
) -> Result<Box<dyn Growing + 'a>> {
    use haystack::Haystack::{Needles, Noise, Prose};
    use needles::{Kind, Niah};
    let niah =
        |haystack, kinds, keys, values, queries| Niah { haystack, kinds, keys, values, queries, depth: None };
    let (word, number, uuid) = (Kind::Words, Kind::Number, Kind::Uuid);
    let niah = match spec {
        Spec::Needle { depth } => Niah { depth: Some(depth), ..niah(Prose, (word, number), 1, 1, 1) },
        Spec::Task(task) => match task {
            Task::NiahSingle1 => niah(Noise, (word, number), 1, 1, 1),
            Task::NiahSingle2 => niah(Prose, (word, number), 1, 1, 1),
            Task::NiahSingle3 => niah(Prose, (word, uuid), 1, 1, 1),
            Task::NiahMultikey1 => niah(Prose, (word, number), 4, 1, 1),
            Task::NiahMultikey2 => niah(Needles, (word, number), 1, 1, 1),
            Task::NiahMultikey3 => niah(Needles, (uuid, uuid), 1, 1, 1),
            Task::NiahMultivalue => niah(Prose, (word, number), 1, 4, 1),
            Task::NiahMultiquery => niah(Prose, (word, number), 4, 1, 4),
            Task::VariableTracking => return Ok(Box::new(lists::Variables::new(random))),
            Task::CommonWords => return Ok(Box::new(lists::CommonWords::new(random))),
            Task::FrequentWords => return Ok(Box::new(lists::FrequentWords::new(random))),
            Task::Qa1 => return qa::growing(task, sources.squad.as_ref(), "--squad", index, random),
            Task::Qa2 => return qa::growing(task, sources.hotpot.as_ref(), "--hotpotqa", index, random),
        },
    };
    Ok(Box::new(needles::Hidden::new(niah, &sources.prose, random)))
}

#[cfg(test)]
mod tests;
