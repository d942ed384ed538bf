//! Job lines: OpenAI batch lines, and a plain form.
use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::sampler::{Grammar, SamplerParams};
use crate::template::Message;

/// In which form a job came; its result has the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `custom_id`, `method`, `url`, `body`.
    OpenAi,
    /// `id`, `prompt` or `messages`, ...
    Plain,
}

/// What a job asks.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// Text to continue as it is.
    Prompt(String),
    /// A conversation, through the model's chat template.
    Messages(Vec<Message>),
}

/// One job.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its name, unique in the file.
    pub id: String,
    /// Its form.
    pub form: Form,
    /// What it asks.
    pub ask: Ask,
    /// Texts that stand before the question; equal paths share one text.
    pub documents: Vec<Arc<str>>,
    /// Sampling parameters.
    pub params: SamplerParams,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// What the answer must look like.
    pub grammar: Option<Grammar>,
}

/// A line that is no job: what is wrong, and the id it goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    /// The line's own id, or `line-N`.
    pub id: String,
    /// The line's form.
    pub form: Form,
    /// What was found and what was expected.
    pub what: String,
    /// A document cannot be read now: the line is sound, and can be done once it is there.
    pub later: bool,
}

/// What jobs have in common.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// Sampling parameters that a job may override.
    pub params: SamplerParams,
    /// Tokens to generate at most, where a job does not say.
    pub max_tokens: usize,
    /// What answers must look like, where a job does not say.
    pub grammar: Option<Grammar>,
    /// Where relative paths of documents begin.
    pub folder: PathBuf,
}

/// Documents that were read, each once.
pub type Documents = HashMap<PathBuf, Arc<str>>;

/// What is wrong with a line.
struct Problem {
    what: String,
    later: bool,
}

impl<T: ToString> From<T> for Problem {
    fn from(what: T) -> Self {
        Self { what: what.to_string(), later: false }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn list(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Document {
    Path(PathBuf),
    Named { path: PathBuf },
    Text { text: String },
}

#[derive(Deserialize)]
struct PlainLine {
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    #[serde(default)]
    documents: Vec<Document>,
    #[serde(default)]
    params: Map<String, Value>,
    max_tokens: Option<usize>,
    stop: Option<OneOrMany>,
    #[serde(flatten)]
    shape: Shape,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// What the answer must look like: one of these, in both forms.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Shape {
    response_format: Option<Value>,
    json_schema: Option<Value>,
    grammar: Option<String>,
}

#[derive(Deserialize)]
struct OpenAiLine {
    custom_id: String,
    method: Option<String>,
    url: Option<String>,
    body: Body,
}

/// Fields of a chat completion request. Those that change what is generated and are not supported are refused.
#[derive(Deserialize)]
struct Body {
    messages: Vec<Message>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    stop: Option<OneOrMany>,
    n: Option<u32>,
    #[serde(flatten)]
    shape: Shape,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Sampling fields of the OpenAI interface that our parameters know, by their own name there.
const OPEN_AI_PARAMS: [&str; 7] =
    ["temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"];
/// Fields that change nothing here.
const OPEN_AI_IGNORED: [&str; 8] = [
    "model",
    "user",
    "stream",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
];

/// The id that line `number` goes by, also where it is no job.
#[must_use]
pub fn name(line: &str, number: usize) -> String {
    let value: Value = serde_json::from_str(line).unwrap_or_default();
    let open_ai = value.get("custom_id").is_some() || value.get("body").is_some();
    match value.get(if open_ai { "custom_id" } else { "id" }) {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => format!("line-{number}"),
    }
}

/// Reads line `number` (from 1).
///
/// # Errors
/// [`BadLine`].
pub fn parse(
    line: &str,
    number: usize,
    defaults: &Defaults,
    documents: &mut Documents,
) -> Result<Job, BadLine> {
    let fallback = format!("line-{number}");
    let bad = |id: &str, form, what: String| BadLine { id: id.to_owned(), form, what, later: false };
    let value: Value = serde_json::from_str(line)
        .map_err(|e| bad(&fallback, Form::Plain, format!("line {number} is not JSON: {e}")))?;
    let Value::Object(object) = &value else {
        return Err(bad(&fallback, Form::Plain, format!("line {number} is not a JSON object")));
    };
    let open_ai = object.contains_key("custom_id") || object.contains_key("body");
    let (form, key) = if open_ai { (Form::OpenAi, "custom_id") } else { (Form::Plain, "id") };
    let id = match object.get(key) {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => {
            let what = format!("line {number} has no \"{key}\" that is a text or a number");
            return Err(bad(&fallback, form, what));
        }
    };
    let job = match form {
        Form::OpenAi => open_ai_job(value, &id, defaults),
        Form::Plain => plain_job(value, &id, defaults, documents),
    };
    job.map_err(|Problem { what, later }| BadLine { id, form, what, later })
}

fn plain_job(value: Value, id: &str, defaults: &Defaults, documents: &mut Documents) -> Result<Job, Problem> {
    let line: PlainLine = serde_json::from_value(value)?;
    if let Some((key, _)) = line.rest.iter().find(|(key, _)| *key != "id" && !SHAPES.contains(&key.as_str()))
    {
        return Err(format!("\"{key}\" is unknown: leave it out").into());
    }
    let ask = match (line.prompt, line.messages) {
        (Some(prompt), None) => Ask::Prompt(prompt),
        (None, Some(messages)) => Ask::Messages(messages),
        _ => return Err("expected either \"prompt\" or \"messages\"".into()),
    };
    let mut job = Job {
        id: id.to_owned(),
        form: Form::Plain,
        ask: check(ask)?,
        documents: vec![],
        params: params(defaults, &line.params)?,
        max_tokens: line.max_tokens.unwrap_or(defaults.max_tokens),
        stop: line.stop.map_or_else(Vec::new, OneOrMany::list),
        grammar: None,
    };
    job.grammar = line.shape.grammar(defaults, &job.stop)?;
    // Last: only a line that is sound otherwise can be done later.
    let read = line.documents.into_iter().map(|d| document(d, &defaults.folder, documents));
    job.documents = read.collect::<Result<_, _>>()?;
    Ok(job)
}

fn open_ai_job(value: Value, id: &str, defaults: &Defaults) -> Result<Job, Problem> {
    let line: OpenAiLine = serde_json::from_value(value)?;
    let _ = line.custom_id;
    if line.method.as_deref().is_some_and(|m| m != "POST") {
        return Err("expected \"method\": \"POST\"".into());
    }
    if let Some(url) = line.url.as_deref().filter(|url| !url.ends_with("/chat/completions")) {
        return Err(format!("found \"url\": \"{url}\", expected \"/v1/chat/completions\"").into());
    }
    let Body { messages, max_tokens, max_completion_tokens, stop, n, shape, rest } = line.body;
    if n.is_some_and(|n| n != 1) {
        return Err("found \"n\" that is not 1: one answer for each job is supported".into());
    }
    let (sampling, other): (Map<_, _>, Map<_, _>) =
        rest.into_iter().partition(|(key, _)| OPEN_AI_PARAMS.contains(&key.as_str()));
    let known = |key: &str| OPEN_AI_IGNORED.contains(&key) || SHAPES.contains(&key);
    if let Some((key, _)) = other.iter().find(|(k, v)| !known(k) && !v.is_null()) {
        return Err(format!("\"{key}\" is not supported: leave it out").into());
    }
    let stop = stop.map_or_else(Vec::new, OneOrMany::list);
    Ok(Job {
        id: id.to_owned(),
        form: Form::OpenAi,
        ask: check(Ask::Messages(messages))?,
        documents: vec![],
        params: params(defaults, &sampling)?,
        max_tokens: max_completion_tokens.or(max_tokens).unwrap_or(defaults.max_tokens),
        grammar: shape.grammar(defaults, &stop)?,
        stop,
    })
}

/// Fields of [`Shape`].
const SHAPES: [&str; 3] = ["response_format", "json_schema", "grammar"];

impl Shape {
    fn grammar(self, defaults: &Defaults, stop: &[String]) -> Result<Option<Grammar>, Problem> {
        let given = [&self.response_format, &self.json_schema].into_iter().flatten().count()
            + usize::from(self.grammar.is_some());
        if given > 1 {
            return Err("expected one of \"response_format\", \"json_schema\", \"grammar\"".into());
        }
        let grammar = match self {
            Self { response_format: Some(format), .. } => Grammar::from_response_format(&format)?,
            Self { json_schema: Some(schema), .. } => Some(Grammar::JsonSchema(schema)),
            Self { grammar: Some(text), .. } => Some(Grammar::Lark(text)),
            _ => defaults.grammar.clone(),
        };
        if grammar.is_some() && !stop.is_empty() {
            return Err("an answer of a given format ends where it is complete: leave out \"stop\"".into());
        }
        Ok(grammar)
    }
}

fn check(ask: Ask) -> Result<Ask, Problem> {
    match &ask {
        Ask::Prompt(text) if text.is_empty() => Err("\"prompt\" is empty".into()),
        Ask::Messages(messages) if messages.is_empty() => Err("\"messages\" is empty".into()),
        _ => Ok(ask),
    }
}

fn params(defaults: &Defaults, given: &Map<String, Value>) -> Result<SamplerParams, Problem> {
    let mut params = defaults.params.clone();
    for (name, value) in given.iter().filter(|(_, v)| !v.is_null()) {
        let text = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        params.set(name, &text)?;
    }
    Ok(params)
}

fn document(document: Document, folder: &Path, read: &mut Documents) -> Result<Arc<str>, Problem> {
    let path = match document {
        Document::Text { text } => return Ok(text.into()),
        Document::Path(path) | Document::Named { path } => folder.join(path),
    };
    if let Some(text) = read.get(&path) {
        return Ok(Arc::clone(text));
    }
    let failed = |e: std::io::Error| {
        // What is there but no text stays so.
        let later = e.kind() != ErrorKind::InvalidData;
        let why = match e.kind() {
            ErrorKind::NotFound => "no such file: put it back".to_owned(),
            ErrorKind::IsADirectory => "it is a folder: name the files in it".to_owned(),
            ErrorKind::InvalidData => "it is not UTF-8 text".to_owned(),
            _ => e.to_string(),
        };
        Problem { what: format!("document {}: {why}", path.display()), later }
    };
    let text: Arc<str> = std::fs::read_to_string(&path).map_err(failed)?.into();
    read.insert(path, Arc::clone(&text));
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults() -> Defaults {
        Defaults {
            params: SamplerParams::default(),
            max_tokens: 64,
            grammar: None,
            folder: PathBuf::from("/nonexistent"),
        }
    }

    fn read(line: &str) -> Result<Job, BadLine> {
        parse(line, 3, &defaults(), &mut Documents::new())
    }

    #[test]
    fn both_forms_are_read() {
        let job = read(r#"{"id": 7, "prompt": "x", "params": {"temperature": 0, "seed": 5}, "stop": "\n", "max_tokens": 3}"#).unwrap();
        assert_eq!((job.id.as_str(), job.form, job.max_tokens), ("7", Form::Plain, 3));
        assert_eq!(
            (job.params.temperature, job.params.seed, job.stop),
            (0.0, Some(5), vec!["\n".to_owned()])
        );
        let line = r#"{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 9, "top_p": 0.5}}"#;
        let job = read(line).unwrap();
        assert_eq!(
            (job.id.as_str(), job.form, job.max_tokens, job.params.top_p),
            ("a", Form::OpenAi, 9, 0.5)
        );
        assert_eq!(job.ask, Ask::Messages(vec![Message::new("user", "hi")]));
        let job = read(r#"{"id": "d", "prompt": "x", "documents": [{"text": "long"}]}"#).unwrap();
        assert_eq!(job.documents.iter().map(|d| &**d).collect::<Vec<_>>(), ["long"]);
    }

    #[test]
    fn formats_of_answers_are_read() {
        let schema = serde_json::json!({"type": "integer"});
        for line in [
            r#"{"id": "a", "prompt": "x", "json_schema": {"type": "integer"}}"#,
            r#"{"id": "a", "prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}}"#,
            r#"{"custom_id": "a", "body": {"messages": [{"role": "user", "content": "x"}],
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}}}"#,
        ] {
            assert_eq!(read(line).expect(line).grammar, Some(Grammar::JsonSchema(schema.clone())));
        }
        let line = r#"{"id": "a", "prompt": "x", "grammar": "start: \"a\"", "stop": []}"#;
        assert_eq!(read(line).unwrap().grammar, Some(Grammar::Lark("start: \"a\"".into())));
        let default = Defaults { grammar: Some(Grammar::json_object()), ..defaults() };
        let read = |line| parse(line, 1, &default, &mut Documents::new()).unwrap().grammar;
        assert_eq!(read(r#"{"id": 1, "prompt": "x"}"#), Some(Grammar::json_object()));
        assert_eq!(read(r#"{"id": 1, "prompt": "x", "response_format": {"type": "text"}}"#), None);
    }

    #[test]
    fn a_document_is_read_once_and_may_come_later() {
        let dir = tempfile::tempdir().unwrap();
        let defaults = Defaults { folder: dir.path().to_owned(), ..defaults() };
        let mut documents = Documents::new();
        let line = r#"{"id": "a", "prompt": "x", "documents": ["d.txt", {"path": "d.txt"}]}"#;
        let bad = parse(line, 1, &defaults, &mut documents).unwrap_err();
        assert!(bad.later && bad.what.contains("d.txt"), "{bad:?}");
        std::fs::write(dir.path().join("d.txt"), "long").unwrap();
        let job = parse(line, 1, &defaults, &mut documents).unwrap();
        assert!(Arc::ptr_eq(&job.documents[0], &job.documents[1]) && &*job.documents[0] == "long");
        std::fs::write(dir.path().join("e.txt"), [0xff]).unwrap();
        let bad = parse(&line.replace("d.txt", "e.txt"), 1, &defaults, &mut documents).unwrap_err();
        assert!(!bad.later && bad.what.contains("UTF-8"), "{bad:?}");
    }

    #[test]
    fn bad_lines_say_what_is_wrong() {
        for (line, id, what) in [
            ("nonsense", "line-3", "not JSON"),
            ("[]", "line-3", "not a JSON object"),
            (r#"{"prompt": "x"}"#, "line-3", "no \"id\""),
            (r#"{"id": "a"}"#, "a", "either \"prompt\" or \"messages\""),
            (r#"{"id": "a", "prompt": "x", "messages": []}"#, "a", "either"),
            (r#"{"id": "a", "prompt": ""}"#, "a", "empty"),
            (r#"{"id": "a", "prompt": "x", "colour": 1}"#, "a", "colour"),
            (r#"{"id": "a", "prompt": "x", "params": {"temperature": -1}}"#, "a", "temp"),
            (r#"{"id": "a", "prompt": "x", "response_format": {"type": "xml"}}"#, "a", "xml"),
            (r#"{"id": "a", "prompt": "x", "grammar": "start: \"a\"", "json_schema": {}}"#, "a", "one of"),
            (r#"{"id": "a", "prompt": "x", "json_schema": {}, "stop": "b"}"#, "a", "leave out \"stop\""),
            (r#"{"id": "a", "prompt": "x", "documents": ["gone.txt"]}"#, "a", "/nonexistent/gone.txt"),
            (r#"{"custom_id": "a", "body": {"messages": [], "n": 2}}"#, "a", "not 1"),
            (
                r#"{"custom_id": "a", "body": {"messages": [{"role": "user", "content": "x"}], "tools": []}}"#,
                "a",
                "tools",
            ),
            (
                r#"{"custom_id": "a", "url": "/v1/embeddings", "body": {"messages": []}}"#,
                "a",
                "chat/completions",
            ),
        ] {
            let bad = read(line).expect_err(line);
            assert_eq!(name(line, 3), bad.id);
            assert!(bad.id == id && bad.what.contains(what), "{line}: {bad:?}");
        }
    }
}
