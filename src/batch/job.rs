//! Job lines: OpenAI batch lines, and a plain form.
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::sampler::SamplerParams;
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
    /// Texts that stand before the question.
    pub documents: Vec<String>,
    /// Sampling parameters.
    pub params: SamplerParams,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Texts that end the answer.
    pub stop: Vec<String>,
}

/// A line that is no job: what is wrong, and the id it goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    /// The line's own id, or `line-N`.
    pub id: String,
    /// Whether it is in the OpenAI form.
    pub open_ai: bool,
    /// What was found and what was expected.
    pub what: String,
}

/// What jobs have in common.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// Sampling parameters that a job may override.
    pub params: SamplerParams,
    /// Tokens to generate at most, where a job does not say.
    pub max_tokens: usize,
    /// Where relative paths of documents begin.
    pub folder: PathBuf,
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
#[serde(deny_unknown_fields)]
struct PlainLine {
    id: Value,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    #[serde(default)]
    documents: Vec<Document>,
    #[serde(default)]
    params: Map<String, Value>,
    max_tokens: Option<usize>,
    stop: Option<OneOrMany>,
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

/// Reads line `number` (from 1).
///
/// # Errors
/// [`BadLine`].
pub fn parse(line: &str, number: usize, defaults: &Defaults) -> Result<Job, BadLine> {
    let fallback = format!("line-{number}");
    let bad = |id: &str, open_ai, what: String| BadLine { id: id.to_owned(), open_ai, what };
    let value: Value = serde_json::from_str(line)
        .map_err(|e| bad(&fallback, false, format!("line {number} is not JSON: {e}")))?;
    let Value::Object(object) = &value else {
        return Err(bad(&fallback, false, format!("line {number} is not a JSON object")));
    };
    let open_ai = object.contains_key("custom_id") || object.contains_key("body");
    let id = match object.get(if open_ai { "custom_id" } else { "id" }) {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        _ => {
            let key = if open_ai { "custom_id" } else { "id" };
            return Err(bad(
                &fallback,
                open_ai,
                format!("line {number} has no \"{key}\" that is a text or a number"),
            ));
        }
    };
    let job = if open_ai { open_ai_job(value, &id, defaults) } else { plain_job(value, &id, defaults) };
    job.map_err(|what| bad(&id, open_ai, what))
}

fn plain_job(value: Value, id: &str, defaults: &Defaults) -> Result<Job, String> {
    let line: PlainLine = serde_json::from_value(value).map_err(|e| e.to_string())?;
    let _ = line.id;
    let ask = match (line.prompt, line.messages) {
        (Some(prompt), None) => Ask::Prompt(prompt),
        (None, Some(messages)) => Ask::Messages(messages),
        _ => return Err("expected either \"prompt\" or \"messages\"".into()),
    };
    let documents =
        line.documents.into_iter().map(|d| document(d, &defaults.folder)).collect::<Result<_, _>>()?;
    Ok(Job {
        id: id.to_owned(),
        form: Form::Plain,
        ask: check(ask)?,
        documents,
        params: params(defaults, &line.params)?,
        max_tokens: line.max_tokens.unwrap_or(defaults.max_tokens),
        stop: line.stop.map_or_else(Vec::new, OneOrMany::list),
    })
}

fn open_ai_job(value: Value, id: &str, defaults: &Defaults) -> Result<Job, String> {
    let line: OpenAiLine = serde_json::from_value(value).map_err(|e| e.to_string())?;
    let _ = line.custom_id;
    if line.method.as_deref().is_some_and(|m| m != "POST") {
        return Err("expected \"method\": \"POST\"".into());
    }
    if let Some(url) = line.url.as_deref().filter(|url| !url.ends_with("/chat/completions")) {
        return Err(format!("found \"url\": \"{url}\", expected \"/v1/chat/completions\""));
    }
    let Body { messages, max_tokens, max_completion_tokens, stop, n, rest } = line.body;
    if n.is_some_and(|n| n != 1) {
        return Err("found \"n\" that is not 1: one answer for each job is supported".into());
    }
    let (sampling, other): (Map<_, _>, Map<_, _>) =
        rest.into_iter().partition(|(key, _)| OPEN_AI_PARAMS.contains(&key.as_str()));
    if let Some((key, _)) = other.iter().find(|(k, v)| !OPEN_AI_IGNORED.contains(&k.as_str()) && !v.is_null())
    {
        return Err(format!("\"{key}\" is not supported: leave it out"));
    }
    Ok(Job {
        id: id.to_owned(),
        form: Form::OpenAi,
        ask: check(Ask::Messages(messages))?,
        documents: vec![],
        params: params(defaults, &sampling)?,
        max_tokens: max_completion_tokens.or(max_tokens).unwrap_or(defaults.max_tokens),
        stop: stop.map_or_else(Vec::new, OneOrMany::list),
    })
}

fn check(ask: Ask) -> Result<Ask, String> {
    match &ask {
        Ask::Prompt(text) if text.is_empty() => Err("\"prompt\" is empty".into()),
        Ask::Messages(messages) if messages.is_empty() => Err("\"messages\" is empty".into()),
        _ => Ok(ask),
    }
}

fn params(defaults: &Defaults, given: &Map<String, Value>) -> Result<SamplerParams, String> {
    let mut params = defaults.params.clone();
    for (name, value) in given.iter().filter(|(_, v)| !v.is_null()) {
        let text = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        params.set(name, &text).map_err(|e| e.to_string())?;
    }
    Ok(params)
}

fn document(document: Document, folder: &Path) -> Result<String, String> {
    let path = match document {
        Document::Text { text } => return Ok(text),
        Document::Path(path) | Document::Named { path } => folder.join(path),
    };
    std::fs::read_to_string(&path).map_err(|e| format!("document {}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults() -> Defaults {
        Defaults { params: SamplerParams::default(), max_tokens: 64, folder: PathBuf::from("/nonexistent") }
    }

    fn read(line: &str) -> Result<Job, BadLine> {
        parse(line, 3, &defaults())
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
        assert_eq!(job.documents, ["long"]);
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
            assert!(bad.id == id && bad.what.contains(what), "{line}: {bad:?}");
        }
    }
}
