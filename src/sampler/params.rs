//! How to sample: every parameter with its default, range and names.
use super::{Error, Result};
use crate::gguf::File;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Values that a parameter can have, written as text.
trait Setting: Sized {
    fn parse(text: &str) -> Option<Self>;
    fn show(&self) -> String;
}

macro_rules! numbers {
    ($($ty:ty)*) => {$(
        impl Setting for $ty {
            fn parse(text: &str) -> Option<Self> {
                text.parse().ok()
            }
            fn show(&self) -> String {
                self.to_string()
            }
        }
    )*};
}
numbers! { f32 i32 u32 }

impl Setting for Option<u64> {
    fn parse(text: &str) -> Option<Self> {
        if matches!(text, "-1" | "random") { Some(None) } else { text.parse().ok().map(Some) }
    }
    fn show(&self) -> String {
        self.map_or_else(|| "random".into(), |seed| seed.to_string())
    }
}

impl Setting for Vec<String> {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "none" => Some(Vec::new()),
            _ if text.starts_with('[') => serde_json::from_str(text).ok(),
            _ => Some(vec![text.to_owned()]),
        }
    }
    fn show(&self) -> String {
        serde_json::json!(self).to_string()
    }
}

impl Setting for BTreeMap<u32, f32> {
    /// `none`, or entries with commas between: `15043+1`, `15043-0.5`, `15043=-1000`.
    fn parse(text: &str) -> Option<Self> {
        if text == "none" {
            return Some(Self::new());
        }
        text.split(',')
            .map(|entry| {
                let at = entry.find(['+', '-', '='])?;
                let (id, bias) = entry.split_at(at);
                Some((id.trim().parse().ok()?, bias.strip_prefix('=').unwrap_or(bias).trim().parse().ok()?))
            })
            .collect()
    }
    fn show(&self) -> String {
        let entries: Vec<String> = self.iter().map(|(id, bias)| format!("{id}={bias}")).collect();
        if entries.is_empty() { "none".into() } else { entries.join(",") }
    }
}

/// Lower-case, with `-` for `_`.
fn canonical(name: &str) -> String {
    name.trim().trim_start_matches("--").to_lowercase().replace('_', "-")
}

macro_rules! parameters {
    ($(
        $(#[doc = $doc:literal])+
        $field:ident: $ty:ty = $default:expr, $name:literal $(| $alias:literal)*, $expected:literal, $valid:expr;
    )*) => {
        /// Sampling parameters. Filters apply in this order: logit bias, penalties, DRY, top-n-sigma, top-k, typical, top-p,
        /// min-p, XTC, temperature. In JSON each parameter has its field's name; missing ones are at their defaults.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct SamplerParams {
            $($(#[doc = $doc])+ pub $field: $ty,)*
        }

        impl Default for SamplerParams {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl SamplerParams {
            /// The parameters' names, as [`Self::set`] and [`Self::get`] take them, with what each does.
            #[must_use]
            pub fn names() -> &'static [(&'static str, &'static str)] {
                &[$(($name, concat!($($doc),+)),)*]
            }

            /// Sets the parameter `name` (with `-` or `_`, in any case, or an alias) from its text. Nothing changes on an error.
            ///
            /// # Errors
            /// [`Error::UnknownParameter`]; [`Error::Parameter`] for a text that is no value or out of range.
            pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
                match canonical(name).as_str() {
                    $($name $(| $alias)* => {
                        let valid: fn(&$ty) -> bool = $valid;
                        self.$field = <$ty as Setting>::parse(value.trim()).filter(valid).ok_or_else(|| {
                            Error::Parameter { name: $name, found: value.to_owned(), expected: $expected }
                        })?;
                        Ok(())
                    })*
                    _ => Err(Error::UnknownParameter {
                        name: name.to_owned(),
                        known: Self::names().iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "),
                    }),
                }
            }

            /// The parameter `name` as text that [`Self::set`] takes.
            #[must_use]
            pub fn get(&self, name: &str) -> Option<String> {
                match canonical(name).as_str() {
                    $($name $(| $alias)* => Some(self.$field.show()),)*
                    _ => None,
                }
            }

            /// Checks every parameter's range.
            ///
            /// # Errors
            /// [`Error::Parameter`] for the first one out of range.
            pub fn validate(&self) -> Result<()> {
                $({
                    let valid: fn(&$ty) -> bool = $valid;
                    if !valid(&self.$field) {
                        let found = self.$field.show();
                        return Err(Error::Parameter { name: $name, found, expected: $expected });
                    }
                })*
                Ok(())
            }
        }
    };
}

parameters! {
    /// Where the random numbers begin; random when not set.
    seed: Option<u64> = None, "seed", "a whole number from 0 to 18446744073709551615, or random", |_| true;
    /// Divides the logits: higher is more varied, 0 always takes the most probable token.
    temperature: f32 = 0.8, "temp" | "temperature", "0 to 100", |v| (0.0..=100.0).contains(v);
    /// Keeps the k most probable tokens; 0 or -1 keeps all.
    top_k: i32 = 40, "top-k", "a whole number from -1 to 2147483647", |v| *v >= -1;
    /// Keeps the most probable tokens that together have this probability; 1 keeps all.
    top_p: f32 = 0.95, "top-p", "0 to 1", |v| (0.0..=1.0).contains(v);
    /// Keeps tokens at least this probable compared with the most probable one; 0 keeps all.
    min_p: f32 = 0.05, "min-p", "0 to 1", |v| (0.0..=1.0).contains(v);
    /// Keeps the tokens whose surprise is nearest to the expected one and that together have this probability; 1 keeps all.
    typical_p: f32 = 1.0, "typical" | "typical-p", "0 to 1", |v| (0.0..=1.0).contains(v);
    /// Keeps logits at most this many standard deviations below the largest; 0 or less keeps all.
    top_n_sigma: f32 = -1.0, "top-n-sigma" | "top-nsigma", "-1 to 1000", |v| (-1.0..=1000.0).contains(v);
    /// The chance that all but the least probable of the tokens above xtc-threshold are dropped; 0 is off.
    xtc_probability: f32 = 0.0, "xtc-probability", "0 to 1", |v| (0.0..=1.0).contains(v);
    /// The probability from which XTC may drop a token; above 0.5 it drops none.
    xtc_threshold: f32 = 0.1, "xtc-threshold", "0 to 1", |v| (0.0..=1.0).contains(v);
    /// How many of the last tokens are penalized; -1 is all of them, 0 none.
    repeat_last_n: i32 = 64, "repeat-last-n" | "penalty-last-n", "a whole number from -1 to 2147483647", |v| *v >= -1;
    /// Positive logits of tokens seen before are divided by this, negative ones multiplied; 1 is off.
    repeat_penalty: f32 = 1.0, "repeat-penalty" | "repetition-penalty" | "penalty-repeat", "0.01 to 100",
        |v| (0.01..=100.0).contains(v);
    /// Subtracted from logits of tokens seen before.
    presence_penalty: f32 = 0.0, "presence-penalty", "-100 to 100", |v| (-100.0..=100.0).contains(v);
    /// Subtracted from logits once for each time that the token was seen.
    frequency_penalty: f32 = 0.0, "frequency-penalty", "-100 to 100", |v| (-100.0..=100.0).contains(v);
    /// DRY subtracts multiplier * base^(n - allowed-length) from a token that would make n repeated tokens n + 1; 0 is off.
    dry_multiplier: f32 = 0.0, "dry-multiplier", "0 to 100", |v| (0.0..=100.0).contains(v);
    /// The base of DRY's penalty.
    dry_base: f32 = 1.75, "dry-base", "1 to 100", |v| (1.0..=100.0).contains(v);
    /// How many repeated tokens DRY lets pass.
    dry_allowed_length: u32 = 2, "dry-allowed-length", "a whole number from 0 to 4294967295", |_| true;
    /// How many of the last tokens DRY searches; -1 is all of them.
    dry_penalty_last_n: i32 = -1, "dry-penalty-last-n", "a whole number from -1 to 2147483647", |v| *v >= -1;
    /// Texts that end a repetition; a JSON list, or none.
    dry_sequence_breakers: Vec<String> = ["\n", ":", "\"", "*"].map(String::from).to_vec(),
        "dry-sequence-breakers" | "dry-sequence-breaker", "none, a text, or a JSON list of texts of 1 to 64 bytes",
        |v| v.iter().all(|text| (1..=64).contains(&text.len()));
    /// Added to the logits of tokens: 15043+1,2-0.5,13=-1000. From -1000 on a token never comes.
    logit_bias: BTreeMap<u32, f32> = BTreeMap::new(), "logit-bias",
        "none, or entries ID+BIAS, ID-BIAS or ID=BIAS with commas between, BIAS from -1000 to 1000",
        |v| v.values().all(|bias| (-1000.0..=1000.0).contains(bias));
    /// 1 or 2: aims at a constant surprise with this version of mirostat, in place of the filters from top-n-sigma to XTC; 0 is off.
    mirostat: u32 = 0, "mirostat", "0, 1 or 2", |v| *v <= 2;
    /// The surprise that mirostat aims at, in bits.
    mirostat_tau: f32 = 5.0, "mirostat-tau" | "mirostat-ent", "0 to 100", |v| (0.0..=100.0).contains(v);
    /// How fast mirostat corrects itself.
    mirostat_eta: f32 = 0.1, "mirostat-eta" | "mirostat-lr", "0 to 1", |v| (0.0..=1.0).contains(v);
    /// How many of the most probable tokens are reported with each token, with log probabilities; -1 reports none at all.
    logprobs: i32 = -1, "logprobs" | "n-probs", "a whole number from -1 to 1000", |v| (-1..=1000).contains(v);
}

impl SamplerParams {
    /// The defaults of a model: those of its file (`clsa.sampling.*` from the checkpoint's generation_config.json, or
    /// `general.sampling.*` of files made by others), and ours for what it does not say.
    ///
    /// # Errors
    /// [`crate::Error::Gguf`] for keys of a wrong type, [`Error::Key`] for values out of range.
    pub fn from_gguf(file: &File) -> crate::Result<Self> {
        let mut params = Self::default();
        for family in ["general", "clsa"] {
            for name in [
                "temp",
                "temperature",
                "top_p",
                "min_p",
                "typical_p",
                "xtc_probability",
                "xtc_threshold",
                "penalty_repeat",
                "repetition_penalty",
                "mirostat_tau",
                "mirostat_eta",
            ] {
                let key = format!("{family}.sampling.{name}");
                if let Some(value) = file.optional::<f32>(&key)? {
                    params.set_key(key, name, &value.to_string())?;
                }
            }
            for name in ["top_k", "penalty_last_n", "mirostat"] {
                let key = format!("{family}.sampling.{name}");
                if let Some(value) = file.optional::<i32>(&key)? {
                    params.set_key(key, name, &value.to_string())?;
                }
            }
        }
        Ok(params)
    }

    fn set_key(&mut self, key: String, name: &str, value: &str) -> Result<()> {
        self.set(name, value).map_err(|e| Error::Key { key, error: Box::new(e) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Metadata, Writer};

    #[test]
    fn every_parameter_can_be_set_got_and_is_documented() {
        let mut params = SamplerParams::default();
        for (name, what) in SamplerParams::names() {
            assert!(what.trim().len() > 10, "{name}");
            let value = params.get(name).unwrap();
            params.set(&name.replace('-', "_").to_uppercase(), &value).unwrap();
        }
        assert_eq!(params, SamplerParams::default());
        params.validate().unwrap();
        let fields = serde_json::to_value(&params).unwrap();
        assert_eq!(fields.as_object().unwrap().len(), SamplerParams::names().len());
    }

    #[test]
    fn texts_become_values() {
        let mut p = SamplerParams::default();
        for (name, value) in [
            ("--temperature", "0.5"),
            ("TOP_K", " 7 "),
            ("seed", "42"),
            ("logit-bias", "15043+1,2-0.5, 13=-1000"),
            ("dry-sequence-breaker", "[\"\\n\", \"END\"]"),
            ("repetition_penalty", "1.1"),
        ] {
            p.set(name, value).unwrap();
        }
        assert_eq!((p.temperature, p.top_k, p.seed, p.repeat_penalty), (0.5, 7, Some(42), 1.1));
        assert_eq!(p.logit_bias, BTreeMap::from([(15043, 1.0), (2, -0.5), (13, -1000.0)]));
        assert_eq!(p.dry_sequence_breakers, ["\n", "END"]);
        let mut again = SamplerParams::default();
        for (name, _) in SamplerParams::names() {
            again.set(name, &p.get(name).unwrap()).unwrap();
        }
        assert_eq!(again, p);
        p.set("seed", "random").unwrap();
        p.set("logit-bias", "none").unwrap();
        p.set("dry-sequence-breakers", "none").unwrap();
        assert_eq!((p.seed, p.logit_bias.len(), p.dry_sequence_breakers.len()), (None, 0, 0));
    }

    #[test]
    fn bad_values_are_refused_with_name_found_and_range() {
        let mut p = SamplerParams::default();
        for (name, value) in [
            ("temp", "-0.1"),
            ("temp", "nan"),
            ("temp", "hot"),
            ("temp", "inf"),
            ("temp", ""),
            ("top-k", "-2"),
            ("top-k", "4.5"),
            ("top-p", "1.01"),
            ("min-p", "-1"),
            ("typical", "2"),
            ("top-n-sigma", "-2"),
            ("xtc-probability", "1.5"),
            ("xtc-threshold", "-0.5"),
            ("repeat-last-n", "-2"),
            ("repeat-penalty", "0"),
            ("presence-penalty", "101"),
            ("frequency-penalty", "NaN"),
            ("dry-multiplier", "-1"),
            ("dry-base", "0.5"),
            ("dry-allowed-length", "-1"),
            ("dry-penalty-last-n", "-3"),
            ("dry-sequence-breakers", "[1]"),
            ("dry-sequence-breakers", "[\"\"]"),
            ("logit-bias", "5"),
            ("logit-bias", "x+1"),
            ("logit-bias", "5+1001"),
            ("logit-bias", "5=inf"),
            ("logit-bias", "5=nan"),
            ("mirostat", "3"),
            ("mirostat-tau", "-1"),
            ("mirostat-eta", "2"),
            ("logprobs", "1001"),
            ("seed", "-2"),
        ] {
            let e = p.set(name, value).unwrap_err();
            let shown = e.to_string();
            assert!(
                shown.contains(name) && shown.contains(&format!("{value:?}")) && shown.contains("expected"),
                "{shown}"
            );
            assert_eq!(p, SamplerParams::default());
        }
        let e = p.set("temprature", "1").unwrap_err().to_string();
        assert!(e.contains("temprature") && e.contains("top-n-sigma"), "{e}");
        assert_eq!(p.get("temprature"), None);
        let e = SamplerParams { top_p: 7.0, ..p }.validate().unwrap_err().to_string();
        assert_eq!(e, "top-p: expected 0 to 1, found \"7\"");
    }

    #[test]
    fn json_has_field_names_and_refuses_others() {
        let p: SamplerParams =
            serde_json::from_str(r#"{"temperature": 0, "top_k": 3, "logit_bias": {"5": -1.5}}"#).unwrap();
        assert_eq!((p.temperature, p.top_k, p.top_p), (0.0, 3, 0.95));
        assert_eq!(p.logit_bias, BTreeMap::from([(5, -1.5)]));
        let e = serde_json::from_str::<SamplerParams>(r#"{"temprature": 0}"#).unwrap_err();
        assert!(e.to_string().contains("temprature"), "{e}");
    }

    #[test]
    fn a_file_has_its_own_defaults() {
        let read = |fill: &dyn Fn(&mut Metadata)| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x.gguf");
            let mut m = Metadata::default();
            m.string("general.architecture", "llama");
            fill(&mut m);
            Writer::create(&path, m, Vec::new(), None).unwrap().finish().unwrap();
            SamplerParams::from_gguf(&File::open(&path).unwrap())
        };
        assert_eq!(read(&|_| ()).unwrap(), SamplerParams::default());
        let p = read(&|m| {
            m.f32("general.sampling.temp", 0.6);
            m.i32("general.sampling.penalty_last_n", 9);
            m.f32("clsa.sampling.temperature", 0.3);
            m.f32("clsa.sampling.repetition_penalty", 1.1);
            m.u32("clsa.sampling.top_k", 0);
        })
        .unwrap();
        let expected = SamplerParams {
            temperature: 0.3,
            repeat_penalty: 1.1,
            repeat_last_n: 9,
            top_k: 0,
            ..SamplerParams::default()
        };
        assert_eq!(p, expected);
        let e = read(&|m| m.f32("clsa.sampling.top_p", 3.0)).unwrap_err();
        assert_eq!(e.to_string(), "clsa.sampling.top_p: top-p: expected 0 to 1, found \"3\"");
        assert_eq!(e.exit_code(), 2);
        assert!(read(&|m| m.string("clsa.sampling.top_p", "x")).is_err());
    }
}
