//! Grammars and JSON schemas as constraints, through the crate `llguidance`.
use super::{
    Error, Result,
    constraint::{Constraint, TokenSet},
};
use crate::tokenizer::Tokenizer;
use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv},
};
use serde_json::{Value, json};
use std::sync::Arc;

/// What an answer must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// A JSON value that the schema allows (`$ref` inside the schema only).
    JsonSchema(Value),
    /// A grammar in llguidance's variant of Lark, beginning at the rule `start`.
    Lark(String),
    /// A text that a regular expression matches as a whole.
    Regex(String),
}

impl Grammar {
    /// Any JSON object.
    #[must_use]
    pub fn json_object() -> Self {
        Self::JsonSchema(json!({"type": "object"}))
    }

    /// The grammar of a `response_format` of OpenAI's interface: `{"type": "json_object"}`, `{"type": "json_schema",
    /// "json_schema": {"schema": ...}}`, or `{"type": "text"}`, which is none.
    ///
    /// # Errors
    /// [`Error::Grammar`] for anything else.
    pub fn from_response_format(format: &Value) -> Result<Option<Self>> {
        match format.get("type").and_then(Value::as_str) {
            Some("text") => Ok(None),
            Some("json_object") => Ok(Some(Self::json_object())),
            Some("json_schema") => {
                let schema = format.get("json_schema").and_then(|s| s.get("schema"));
                let schema = schema
                    .ok_or_else(|| Error::Grammar("response_format.json_schema.schema is missing".into()))?;
                Ok(Some(Self::JsonSchema(schema.clone())))
            }
            found => Err(Error::Grammar(format!(
                "response_format.type: expected text, json_object or json_schema, found {}",
                found.map_or_else(|| "nothing".into(), |t| format!("{t:?}"))
            ))),
        }
    }
}

/// Makes constraints of grammars for one vocabulary.
pub struct GrammarCompiler {
    factory: ParserFactory,
    stops: Arc<[u32]>,
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler").finish_non_exhaustive()
    }
}

impl GrammarCompiler {
    /// A compiler for the vocabulary of `tokenizer`. Worth keeping: it sorts all tokens.
    ///
    /// # Errors
    /// [`Error::Grammar`] for a vocabulary without a token that ends an answer, or one that cannot be sorted.
    pub fn new(tokenizer: &Arc<Tokenizer>) -> Result<Self> {
        let stops: Arc<[u32]> = tokenizer.special().stop.clone().into();
        let Some(eos) = stops.first() else {
            return Err(Error::Grammar("the model has no token that ends an answer".into()));
        };
        let size = u32::try_from(tokenizer.len()).map_err(|e| Error::Grammar(e.to_string()))?;
        let words: Vec<Vec<u8>> = (0..size).map(|id| word(tokenizer, id)).collect();
        let trie = TokTrie::from(&TokRxInfo::new(size, *eos), &words).with_eos_tokens(&stops);
        let env: TokEnv = Arc::new(Environment { trie, tokenizer: tokenizer.clone() });
        let mut factory = ParserFactory::new_simple(&env).map_err(|e| Error::Grammar(e.to_string()))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory, stops })
    }

    /// A constraint that lets only what `grammar` allows come, and a token that ends the answer where it may end.
    ///
    /// # Errors
    /// [`Error::Grammar`] for a grammar that is wrong or too large.
    pub fn compile(&self, grammar: &Grammar) -> Result<Box<dyn Constraint>> {
        let grammar = match grammar {
            Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_short_spaces(schema)),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
            Grammar::Regex(text) => TopLevelGrammar::from_regex(text),
        };
        let matcher = Matcher::new(self.factory.create_parser(grammar));
        match matcher.get_error() {
            Some(e) => Err(Error::Grammar(e)),
            None => Ok(Box::new(Guided { matcher, mask: TokenSet::default(), stops: self.stops.clone() })),
        }
    }
}

/// The schema with a bound on the space between two tokens of JSON, where it has none of its own: a model that likes spaces would
/// write nothing else until its answer is cut off.
fn with_short_spaces(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Value::Object(object) = &mut schema {
        let options = object.entry("x-guidance").or_insert_with(|| json!({}));
        if let Value::Object(options) = options {
            options.entry("whitespace_pattern").or_insert_with(|| json!(SPACE));
        }
    }
    schema
}

/// A few blanks, or one new line with its indentation.
const SPACE: &str = r"[ \t]{1,4}|\r?\n[ \t]{0,64}";

/// The bytes of a token as llguidance wants them: control tokens after a byte that no text has.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let piece = tokenizer.piece(id).unwrap_or_default();
    if tokenizer.is_special(id) { [&[TokTrie::SPECIAL_TOKEN_MARKER], piece].concat() } else { piece.to_vec() }
}

/// The vocabulary as llguidance sees it.
struct Environment {
    trie: TokTrie,
    tokenizer: Arc<Tokenizer>,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let text = std::str::from_utf8(bytes).ok();
        let ids = text.and_then(|text| self.tokenizer.encode(text, false).ok());
        ids.unwrap_or_else(|| self.trie.greedy_tokenize(bytes))
    }
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// A grammar on its way through an answer.
struct Guided {
    matcher: Matcher,
    mask: TokenSet,
    stops: Arc<[u32]>,
}

impl Constraint for Guided {
    fn mask(&mut self) -> Result<&TokenSet> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| Error::Constraint(e.to_string()))?;
        let words = mask.as_slice().chunks(2);
        let words =
            words.map(|pair| u64::from(pair[0]) | pair.get(1).map_or(0, |high| u64::from(*high) << 32));
        self.mask = TokenSet::from_words(words.collect());
        Ok(&self.mask)
    }

    fn accept(&mut self, id: u32) -> Result<()> {
        if self.matcher.is_stopped() && self.stops.contains(&id) {
            return Ok(());
        }
        self.matcher.consume_token(id).map_err(|e| Error::Constraint(e.to_string()))
    }

    fn is_finished(&self) -> bool {
        self.matcher.is_stopped()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Sampler, SamplerParams, tests::vocabulary_of};
    use super::*;
    use crate::tokenizer::StreamDecoder;
    use std::time::Instant;

    /// Single characters, some longer tokens, and `</s>`, which ends an answer.
    fn tokenizer() -> Arc<Tokenizer> {
        let single = (' '..='~').map(String::from).chain(["\n", "é"].map(String::from));
        let longer = ["{\"", "\":", "\": ", "\",", "true", "false", "null", "name", "ab", "12", "  "]
            .map(String::from);
        vocabulary_of(single.chain(longer))
    }

    fn compiler() -> GrammarCompiler {
        GrammarCompiler::new(&tokenizer()).unwrap()
    }

    /// An answer of random tokens under a grammar; `None` when it did not end within 400 tokens.
    fn answer(compiler: &GrammarCompiler, grammar: &Grammar, seed: u64) -> Option<String> {
        let t = tokenizer();
        let params =
            SamplerParams { seed: Some(seed), temperature: 2.0, top_k: 0, ..SamplerParams::default() };
        let mut sampler = Sampler::new(params, t.clone()).unwrap();
        sampler.set_constraint(Some(compiler.compile(grammar).unwrap()));
        let (mut text, mut decoder) = (String::new(), StreamDecoder::new(false));
        for _ in 0..400 {
            let id = sampler.sample(&mut vec![0.0; t.len()]).unwrap();
            sampler.accept(id).unwrap();
            if t.is_stop(id) {
                assert!(sampler.constraint().unwrap().is_finished());
                return Some(text + &decoder.finish());
            }
            text += &decoder.push(&t, id).unwrap();
        }
        None
    }

    #[test]
    fn answers_are_what_the_schema_allows() {
        let schema = json!({
            "type": "object", "additionalProperties": false, "required": ["name", "size"],
            "properties": {
                "name": {"type": "string", "maxLength": 5},
                "size": {"$ref": "#/$defs/size"},
                "ok": {"type": "boolean"},
            },
            "$defs": {"size": {"enum": [1, 20, null]}},
        });
        let compiler = compiler();
        let mut ended = 0;
        for seed in 0..40 {
            let Some(text) = answer(&compiler, &Grammar::JsonSchema(schema.clone()), seed) else { continue };
            ended += 1;
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(value["name"].as_str().unwrap().chars().count() <= 5, "{text}");
            assert!([json!(1), json!(20), json!(null)].contains(&value["size"]), "{text}");
            assert!(value.as_object().unwrap().keys().all(|k| ["name", "size", "ok"].contains(&k.as_str())));
        }
        assert!(ended > 20, "{ended} of 40 ended");
    }

    #[test]
    fn grammars_and_expressions_hold() {
        let compiler = compiler();
        let lark = Grammar::Lark("start: \"a\" word+ \".\"\nword: \" \" (\"ab\" | \"12\")".into());
        let regex = Grammar::Regex("[0-9]{2}-(a|é)+".into());
        let mut ended = [0, 0];
        for seed in 0..20 {
            if let Some(text) = answer(&compiler, &lark, seed) {
                ended[0] += 1;
                let words = text.strip_prefix("a ").and_then(|t| t.strip_suffix('.')).unwrap();
                assert!(words.split(' ').all(|w| w == "ab" || w == "12"), "{text}");
            }
            if let Some(text) = answer(&compiler, &regex, seed) {
                ended[1] += 1;
                assert!(text[..2].parse::<u8>().is_ok() && text[2..].starts_with('-'), "{text}");
                assert!(text.len() > 3 && text[3..].chars().all(|c| "aé".contains(c)), "{text}");
            }
        }
        assert!(ended[0] > 10 && ended[1] > 10, "{ended:?}");
    }

    #[test]
    fn space_in_json_ends() {
        let (compiler, t) = (compiler(), tokenizer());
        let blank = t.encode(" ", false).unwrap()[0];
        for schema in [json!({}), json!({"type": "array"}), json!({"x-guidance": {"item_separator": ","}})] {
            let mut constraint = compiler.compile(&Grammar::JsonSchema(schema)).unwrap();
            constraint.accept(t.encode("[", false).unwrap()[0]).unwrap();
            let spaces = (0..20).take_while(|_| {
                let more = constraint.mask().unwrap().contains(blank);
                more && constraint.accept(blank).is_ok()
            });
            assert_eq!(spaces.count(), 4);
        }
    }

    #[test]
    fn wrong_grammars_and_wrong_tokens_are_errors() {
        let compiler = compiler();
        for grammar in [
            Grammar::Lark("start: \"a".into()),
            Grammar::Lark("begin: \"a\"".into()),
            Grammar::Regex("(a".into()),
            Grammar::JsonSchema(json!({"type": "colour"})),
            Grammar::JsonSchema(json!({"$ref": "https://example.org/schema"})),
        ] {
            let e = compiler.compile(&grammar).err().unwrap_or_else(|| panic!("{grammar:?} was taken"));
            assert!(matches!(e, Error::Grammar(_)) && e.exit_code() == 2, "{grammar:?}: {e}");
        }
        let mut constraint = compiler.compile(&Grammar::Regex("ab".into())).unwrap();
        let t = tokenizer();
        let id = |text: &str| t.encode(text, false).unwrap()[0];
        assert!(
            constraint.mask().unwrap().contains(id("a")) && !constraint.mask().unwrap().contains(id("b"))
        );
        assert!(matches!(constraint.accept(id("x")), Err(Error::Constraint(_))));
        let none = vocabulary_of(["a".to_owned()].into_iter().filter(|_| false));
        assert!(GrammarCompiler::new(&none).is_ok());
        let unending = super::super::tests::tokenizer();
        assert!(matches!(GrammarCompiler::new(&unending), Err(Error::Grammar(_))));
    }

    #[test]
    fn response_formats() {
        let parse = |v: Value| Grammar::from_response_format(&v);
        assert_eq!(parse(json!({"type": "text"})).unwrap(), None);
        assert_eq!(parse(json!({"type": "json_object"})).unwrap(), Some(Grammar::json_object()));
        let schema = json!({"type": "integer"});
        let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
        assert_eq!(parse(format).unwrap(), Some(Grammar::JsonSchema(schema)));
        for bad in [json!({}), json!({"type": "xml"}), json!({"type": "json_schema"}), json!(1)] {
            assert!(matches!(parse(bad.clone()), Err(Error::Grammar(_))), "{bad}");
        }
    }

    #[test]
    #[ignore = "slow: times masks over the vocabulary of CLSA_TEST_GGUF"]
    fn timing() {
        let path = std::env::var_os("CLSA_TEST_GGUF").expect("CLSA_TEST_GGUF");
        let t = Arc::new(Tokenizer::from_gguf(&crate::gguf::File::open(path).unwrap()).unwrap());
        let start = Instant::now();
        let compiler = GrammarCompiler::new(&t).unwrap();
        println!("{} tokens sorted in {:?}", t.len(), start.elapsed());
        let start = Instant::now();
        let mut constraint = compiler.compile(&Grammar::json_object()).unwrap();
        println!("grammar compiled in {:?}", start.elapsed());
        let mut times = Vec::new();
        for id in
            t.encode("{\"name\": \"a text\", \"list\": [1, 2.5, true, {\"deeper\": null}]}", false).unwrap()
        {
            let start = Instant::now();
            assert!(constraint.mask().unwrap().contains(id));
            times.push(start.elapsed());
            constraint.accept(id).unwrap();
        }
        times.sort();
        println!("mask: {:?} median, {:?} at worst", times[times.len() / 2], times[times.len() - 1]);
    }
}
