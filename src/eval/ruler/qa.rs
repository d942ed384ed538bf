//! Questions about paragraphs, from files in the formats of `SQuAD` and `HotpotQA`.
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use serde::Deserialize;

use super::random::Random;
use super::{Growing, Sample, Task};
use crate::error::{Error, Result};

/// Questions and the paragraphs that answer them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Questions {
    documents: Vec<String>,
    questions: Vec<Question>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Question {
    question: String,
    answers: Vec<String>,
    /// Indices of documents that it is about.
    about: Vec<usize>,
}

#[derive(Deserialize)]
struct Squad {
    data: Vec<Article>,
}

#[derive(Deserialize)]
struct Article {
    paragraphs: Vec<Paragraph>,
}

#[derive(Deserialize)]
struct Paragraph {
    context: String,
    qas: Vec<SquadQuestion>,
}

#[derive(Deserialize)]
struct SquadQuestion {
    question: String,
    #[serde(default)]
    answers: Vec<SquadAnswer>,
    #[serde(default)]
    is_impossible: bool,
}

#[derive(Deserialize)]
struct SquadAnswer {
    text: String,
}

#[derive(Deserialize)]
struct HotpotQuestion {
    question: String,
    answer: String,
    /// Title and sentences.
    context: Vec<(String, Vec<String>)>,
}

impl Questions {
    /// A file like SQuAD's `dev-v2.0.json`: questions that the text cannot answer are left out.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Input`] for a file of another form, or without questions.
    pub fn squad(path: &Path) -> Result<Self> {
        let file: Squad = read(path, "SQuAD: {\"data\": [{\"paragraphs\": [{\"context\", \"qas\"}]}]}")?;
        let mut all = Self::default();
        for paragraph in file.data.into_iter().flat_map(|a| a.paragraphs) {
            let about = all.document(paragraph.context);
            for q in paragraph.qas.into_iter().filter(|q| !q.is_impossible) {
                let mut answers: Vec<String> = q.answers.into_iter().map(|a| a.text).collect();
                answers.sort();
                answers.dedup();
                all.add(q.question, answers, vec![about]);
            }
        }
        all.check(path)
    }

    /// A file like HotpotQA's `hotpot_dev_distractor_v1.json`: every paragraph that comes with a question stays with it.
    ///
    /// # Errors
    /// As [`Self::squad`].
    pub fn hotpotqa(path: &Path) -> Result<Self> {
        let form = "HotpotQA: [{\"question\", \"answer\", \"context\": [[title, [sentence, ...]], ...]}]";
        let file: Vec<HotpotQuestion> = read(path, form)?;
        let mut all = Self::default();
        let mut known = std::collections::HashMap::new();
        for q in file {
            let texts = q.context.into_iter().map(|(title, text)| format!("{title}\n{}", text.concat()));
            let about =
                texts.map(|text| *known.entry(text.clone()).or_insert_with(|| all.document(text))).collect();
            all.add(q.question, vec![q.answer], about);
        }
        all.check(path)
    }

    fn document(&mut self, text: String) -> usize {
        self.documents.push(text);
        self.documents.len() - 1
    }

    fn add(&mut self, question: String, answers: Vec<String>, about: Vec<usize>) {
        let answers: Vec<String> = answers.into_iter().filter(|a| !a.trim().is_empty()).collect();
        if !answers.is_empty() && !about.is_empty() {
            self.questions.push(Question { question, answers, about });
        }
    }

    fn check(self, path: &Path) -> Result<Self> {
        if self.questions.is_empty() {
            return Err(Error::Input(format!("{}: it has no question with an answer", path.display())));
        }
        Ok(self)
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path, form: &str) -> Result<T> {
    let file = File::open(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    serde_json::from_reader(BufReader::new(file))
        .map_err(|e| Error::Input(format!("{}: {e}; expected the form of {form}", path.display())))
}

/// A question with other paragraphs around its own.
struct Asked<'a> {
    questions: &'a Questions,
    question: &'a Question,
    /// Other documents, in the order in which they are added.
    others: Vec<usize>,
    random: Random,
}

/// A question of `task`; `flag` names the file that is missing.
pub(super) fn growing<'a>(
    task: Task,
    questions: Option<&'a Questions>,
    flag: &str,
    index: usize,
    random: &mut Random,
) -> Result<Box<dyn Growing + 'a>> {
    let questions = questions.ok_or_else(|| {
        Error::Input(format!("{} needs a file of questions: give one with {flag}", task.name()))
    })?;
    let question = &questions.questions[index % questions.questions.len()];
    let mut others: Vec<usize> =
        (0..questions.documents.len()).filter(|d| !question.about.contains(d)).collect();
    random.shuffle(&mut others);
    Ok(Box::new(Asked { questions, question, others, random: random.clone() }))
}

impl Growing for Asked<'_> {
    fn range(&self) -> (usize, usize) {
        (0, self.others.len())
    }

    fn build(&self, n: usize) -> Sample {
        let mut documents: Vec<usize> =
            self.question.about.iter().chain(&self.others[..n]).copied().collect();
        self.random.clone().shuffle(&mut documents);
        let texts = documents.iter().enumerate();
        let texts: Vec<String> = texts
            .map(|(i, d)| format!("Document {}:\n{}", i + 1, self.questions.documents[*d].trim()))
            .collect();
        const TASK: &str =
            "Answer the question from the given documents. Give only the answer, no other words.";
        Sample {
            prompt: format!(
                "{TASK} These are the documents.\n\n{}\n\n{TASK}\n\nQuestion: {}",
                texts.join("\n\n"),
                self.question.question.trim()
            ),
            answer_prefix: "Answer:".into(),
            answers: self.question.answers.clone(),
        }
    }
}
