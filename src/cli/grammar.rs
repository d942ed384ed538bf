//! Arguments that say what answers must look like.
use std::path::Path;

use clap::Args;

use super::read_text;
use crate::error::{Error, Result};
use crate::sampler::Grammar;

/// What answers must look like.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Structured output")]
pub struct GrammarArgs {
    /// Only answers of this grammar, in llguidance's variant of Lark (rules such as `start: "yes" | "no"`)
    #[arg(long, value_name = "FILE|TEXT", conflicts_with = "json_schema")]
    grammar: Option<String>,
    /// Only JSON that this JSON schema allows; {} is any JSON value
    #[arg(short, long, value_name = "FILE|TEXT")]
    json_schema: Option<String>,
}

impl GrammarArgs {
    /// The grammar that was asked for.
    ///
    /// # Errors
    /// [`Error::Input`] for a file that is not there and for a schema that is no JSON.
    pub fn grammar(&self) -> Result<Option<Grammar>> {
        if let Some(given) = &self.json_schema {
            let text = text_or_file(given)?;
            let schema = serde_json::from_str(text.as_deref().unwrap_or(given));
            return schema.map(|s| Some(Grammar::JsonSchema(s))).map_err(|e| {
                Error::Input(match text {
                    Some(_) => format!("--json-schema {given}: the file is no JSON: {e}"),
                    None => format!(
                        "--json-schema {given}: no such file, and no JSON ({e}): give a file, or a schema such \
                         as '{{\"type\": \"object\"}}'"
                    ),
                })
            });
        }
        let Some(given) = &self.grammar else { return Ok(None) };
        match text_or_file(given)? {
            Some(text) => Ok(Some(Grammar::Lark(text))),
            None if given.contains(':') => Ok(Some(Grammar::Lark(given.clone()))),
            None => Err(Error::Input(format!(
                "--grammar {given}: no such file, and no grammar: give a file, or rules such as 'start: \"yes\" | \"no\"'"
            ))),
        }
    }

    /// Whether answers must look like anything.
    #[must_use]
    pub fn is_given(&self) -> bool {
        self.grammar.is_some() || self.json_schema.is_some()
    }

    /// Refuses what would let answers end where the grammar does not allow it.
    ///
    /// # Errors
    /// [`Error::Input`].
    pub fn check(&self, stops: &[String], ignore_eos: bool) -> Result<()> {
        let other = match (stops.is_empty(), ignore_eos) {
            (false, _) => "--stop",
            (true, true) => "--ignore-eos",
            (true, false) => return Ok(()),
        };
        if !self.is_given() {
            return Ok(());
        }
        Err(Error::Input(format!(
            "with --grammar or --json-schema an answer ends where it is complete: leave out {other}"
        )))
    }
}

/// What the file of this name holds, if there is one.
fn text_or_file(given: &str) -> Result<Option<String>> {
    let path = Path::new(given);
    if path.is_file() { read_text(path).map(Some) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn grammar(grammar: Option<&str>, schema: Option<&str>) -> Result<Option<Grammar>> {
        GrammarArgs { grammar: grammar.map(Into::into), json_schema: schema.map(Into::into) }.grammar()
    }

    #[test]
    fn texts_and_files_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let schema = Some(Grammar::JsonSchema(json!({"type": "object"})));
        assert_eq!(grammar(None, Some(r#"{"type": "object"}"#)).unwrap(), schema);
        assert_eq!(grammar(None, Some(&file("s.json", r#"{"type": "object"}"#))).unwrap(), schema);
        let lark = Some(Grammar::Lark("start: \"a\"".into()));
        assert_eq!(grammar(Some("start: \"a\""), None).unwrap(), lark);
        assert_eq!(grammar(Some(&file("g.lark", "start: \"a\"")), None).unwrap(), lark);
        assert_eq!(grammar(None, None).unwrap(), None);
        for (g, s, what) in [
            (None, Some("gone.json"), "no such file, and no JSON"),
            (None, Some("{\"type\""), "no such file, and no JSON"),
            (None, Some(&*file("bad.json", "{")), "the file is no JSON"),
            (Some("gone.lark"), None, "no such file, and no grammar"),
        ] {
            let e = grammar(g, s).unwrap_err();
            assert!(e.to_string().contains(what) && e.exit_code() == 2, "{e}");
        }
    }

    #[test]
    fn what_cuts_answers_short_is_refused() {
        let given = GrammarArgs { grammar: Some("start: \"a\"".into()), json_schema: None };
        assert!(given.check(&[], false).is_ok());
        assert!(given.check(&["x".into()], false).unwrap_err().to_string().contains("--stop"));
        assert!(given.check(&[], true).unwrap_err().to_string().contains("--ignore-eos"));
        assert!(GrammarArgs::default().check(&["x".into()], true).is_ok());
    }
}
