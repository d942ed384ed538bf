//! Samples are reproducible, whole and within their length; scores are RULER's.
use std::collections::HashMap;

use super::*;

/// As a tokenizer would: a word, a number or a mark is a token for every four bytes.
fn count(s: &Sample) -> Result<usize> {
    let text = format!("{}\n\n{}", s.prompt, s.answer_prefix);
    Ok(text.split(|c: char| !c.is_alphanumeric()).map(|w| w.len().div_ceil(4) + 1).sum())
}

fn sources() -> Sources {
    let squad = r#"{"data": [{"paragraphs": [
        {"context": "Paris is the capital of France.", "qas": [
            {"question": "What is the capital of France?", "answers": [{"text": "Paris"}, {"text": "Paris"}]},
            {"question": "Who?", "is_impossible": true, "answers": []}]},
        {"context": "Oslo is the capital of Norway.", "qas": []},
        {"context": "Rome is the capital of Italy.", "qas": []}]}]}"#;
    let hotpot = r#"[{"question": "Which river?", "answer": "Seine", "context": [["Paris", ["It lies ", "on the Seine."]], ["Oslo", ["North."]]]},
        {"question": "Which sea?", "answer": "Tyrrhenian", "context": [["Rome", ["Near the Tyrrhenian sea."]]]}]"#;
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    Sources {
        squad: Some(qa::Questions::squad(&file("squad.json", squad)).unwrap()),
        hotpot: Some(qa::Questions::hotpotqa(&file("hotpot.json", hotpot)).unwrap()),
        ..Sources::default()
    }
}

fn make(spec: Spec, budget: usize, index: usize, seed: u64) -> Sample {
    sample(spec, budget, index, seed, &sources(), count).unwrap()
}

fn all_specs() -> Vec<Spec> {
    Task::ALL.into_iter().map(Spec::Task).chain([Spec::Needle { depth: 0.5 }]).collect()
}

#[test]
fn names_are_those_of_ruler() {
    for task in Task::ALL {
        assert_eq!(task.name().parse(), Ok(task));
    }
    assert!("niah".parse::<Task>().unwrap_err().contains("niah_single_1"));
}

#[test]
fn samples_are_reproducible_and_differ_by_number_and_seed() {
    for spec in all_specs() {
        let first = make(spec, 2048, 0, 7);
        assert_eq!(first, make(spec, 2048, 0, 7), "{spec:?}");
        if !matches!(spec, Spec::Task(Task::Qa1)) {
            assert_ne!(first.answers, make(spec, 2048, 1, 7).answers, "{spec:?}");
        }
        if !matches!(spec, Spec::Task(Task::Qa1 | Task::Qa2)) {
            assert_ne!(first.answers, make(spec, 2048, 0, 8).answers, "{spec:?}");
        }
    }
}

#[test]
fn samples_fill_their_length_and_hold_their_answers() {
    for spec in all_specs() {
        for budget in [2048, 4096, 16_384] {
            let s = make(spec, budget, 3, 1);
            let tokens = count(&s).unwrap() + spec.answer_tokens();
            assert!(tokens <= budget, "{spec:?}: {tokens} of {budget}");
            // The questions of the test have three short paragraphs only.
            let whole = matches!(spec, Spec::Task(Task::Qa1 | Task::Qa2)) || tokens * 100 >= budget * 93;
            assert!(whole, "{spec:?}: {tokens} of {budget}");
            assert!(!s.answers.is_empty() && s.answers.iter().all(|a| s.prompt.contains(a)), "{spec:?}");
            assert!(
                s.answers.iter().all(|a| !s.answer_prefix.contains(a)),
                "{spec:?}: no answer is given away"
            );
        }
    }
}

#[test]
fn needles_are_as_the_task_says() {
    let needles = |task| {
        let s = make(Spec::Task(task), 4096, 0, 1);
        (s.prompt.matches("magic number").count() + s.prompt.matches("magic uuid").count(), s)
    };
    for (task, hidden, asked) in [
        (Task::NiahSingle1, 1, 1),
        (Task::NiahSingle2, 1, 1),
        (Task::NiahSingle3, 1, 1),
        (Task::NiahMultikey1, 4, 1),
        (Task::NiahMultivalue, 4, 4),
        (Task::NiahMultiquery, 4, 4),
    ] {
        let (n, s) = needles(task);
        // The introduction and the question name them too.
        assert_eq!((n, s.answers.len()), (hidden + 2, asked), "{task:?}");
    }
    for task in [Task::NiahMultikey2, Task::NiahMultikey3] {
        let (n, s) = needles(task);
        assert!(n > 60 && s.answers.len() == 1, "{task:?}: {n} needles");
        assert_eq!(s.prompt.matches(&s.answers[0]).count(), 1, "{task:?}");
    }
    assert_eq!(needles(Task::NiahSingle3).1.answers[0].len(), 36);
}

#[test]
fn a_needle_stands_at_its_depth() {
    for depth in [0.0, 0.25, 0.5, 1.0] {
        let s = make(Spec::Needle { depth }, 8192, 0, 1);
        let at = s.prompt.find(&s.answers[0]).unwrap() as f64 / s.prompt.len() as f64;
        assert!((at - depth).abs() < 0.03, "{at} for {depth}");
    }
}

#[test]
fn given_prose_is_used_and_repeated() {
    let sources =
        Sources { prose: sentences("A first sentence of my own. And then a second one."), ..sources() };
    let s = sample(Spec::Task(Task::NiahSingle2), 2048, 0, 1, &sources, count).unwrap();
    assert!(s.prompt.matches("A first sentence of my own.").count() > 10);
}

#[test]
fn variables_are_a_chain() {
    let s = make(Spec::Task(Task::VariableTracking), 2048, 0, 1);
    let text = s.prompt.rsplit("Remember the assignments").next().unwrap();
    let assignments: Vec<_> =
        text.match_indices("VAR ").filter(|(i, _)| text[i + 9..].starts_with(" = ")).collect();
    assert_eq!((assignments.len(), s.answers.len()), (5, 5));
    let mut before = None;
    for name in &s.answers {
        let at = text.find(&format!("VAR {name} = ")).unwrap();
        let value = &text[at + 12..];
        match before {
            None => assert!(value.starts_with(|c: char| c.is_ascii_digit())),
            Some((place, other)) => assert!(place < at && value.starts_with(&format!("VAR {other}."))),
        }
        before = Some((at, name));
    }
}

fn counts(text: &str) -> HashMap<&str, usize> {
    let mut counts = HashMap::new();
    text.split_whitespace().for_each(|w| *counts.entry(w).or_insert(0) += 1);
    counts
}

#[test]
fn common_words_are_the_most_common() {
    for budget in [1024, 4096, 131_072] {
        let s = make(Spec::Task(Task::CommonWords), budget, 0, 1);
        let text = s.prompt.rsplit("Below is").next().unwrap();
        let list = text.split("\n\n").nth(1).unwrap();
        let counts = counts(list);
        let word = |w: &&&str| !w.ends_with('.');
        let least = s.answers.iter().map(|a| counts[a.as_str()]).min().unwrap();
        let others = counts.keys().filter(word).filter(|w| !s.answers.iter().any(|a| a == *w));
        let most = others.map(|w| counts[w]).max().unwrap();
        assert!(least >= most + 2 && most == 3, "{budget}: {least} and {most}");
        assert!(budget < 4096 || least == 30, "{budget}: {least}");
        for a in &s.answers {
            let inside = counts.keys().filter(|w| w.contains(a.as_str())).count();
            assert_eq!(inside, 1, "{a} is part of another word");
        }
    }
}

#[test]
fn frequent_words_are_the_most_frequent() {
    for budget in [1024, 4096, 32_768] {
        let s = make(Spec::Task(Task::FrequentWords), budget, 0, 1);
        let mut counts: Vec<_> = counts(s.prompt.split("\n\n").nth(1).unwrap()).into_iter().collect();
        counts.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
        assert_eq!(counts[0].0, "...", "the most frequent one is noise");
        assert_eq!(s.answers, counts[1..4].iter().map(|(w, _)| (*w).to_owned()).collect::<Vec<_>>());
        assert!(counts[1].1 > counts[2].1 && counts[2].1 > counts[3].1 && counts[3].1 > counts[4].1);
    }
}

#[test]
fn questions_come_with_their_documents() {
    let s = make(Spec::Task(Task::Qa1), 4096, 0, 1);
    assert_eq!(s.answers, ["Paris"]);
    assert_eq!((s.prompt.matches("Document ").count(), s.prompt.matches("capital of").count()), (3, 4));
    let s = make(Spec::Task(Task::Qa2), 400, 0, 1);
    assert!(s.prompt.contains("It lies on the Seine.") && s.prompt.contains("Oslo\nNorth."), "{s:?}");
}

#[test]
fn files_of_questions_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qa.json");
    for (text, words) in [("[]", "SQuAD"), ("{\"data\": []}", "no question"), ("{", "qa.json")] {
        std::fs::write(&path, text).unwrap();
        let message = qa::Questions::squad(&path).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    }
    std::fs::write(&path, "{}").unwrap();
    assert!(qa::Questions::hotpotqa(&path).unwrap_err().to_string().contains("HotpotQA"));
    let missing = sample(Spec::Task(Task::Qa1), 4096, 0, 1, &Sources::default(), count).unwrap_err();
    assert!(missing.to_string().contains("--squad"), "{missing}");
}

#[test]
fn lengths_that_hold_no_question_are_refused() {
    for spec in all_specs() {
        let message = sample(spec, 100, 0, 1, &sources(), count).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("needs at least") && message.contains("100"), "{spec:?}: {message}");
    }
}

#[test]
fn scores_are_shares_of_what_was_expected() {
    let answers = ["Alpha".to_owned(), "42".to_owned()];
    assert_eq!(match_all("alpha and 42", &answers), 1.0);
    assert_eq!(match_all("ALPHA", &answers), 0.5);
    assert_eq!(match_all("", &answers), 0.0);
    assert_eq!((match_part("x 42 y", &answers), match_part("beta", &answers)), (1.0, 0.0));
    assert_eq!(Spec::Task(Task::Qa1).score("alpha", &answers), 1.0);
    assert_eq!(Spec::Task(Task::CommonWords).score("alpha", &answers), 0.5);
}
