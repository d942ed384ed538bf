//! Which tensor gets which type: the named mixes, and what the user overrides.
use std::{fmt, str::FromStr};

use ggml_kernels::{ggml, quant::Type};
use regex::Regex;

use crate::{Error, Result};

macro_rules! mixes {
    ($($variant:ident, $base:ident, $number:ident, $aliases:expr;)*) => {
        /// A named recipe for a whole file, as llama.cpp calls them.
        #[allow(non_camel_case_types, missing_docs)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Mix { $($variant,)* }

        impl Mix {
            /// Every mix.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];
            /// The name that users know.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }
            /// The type of tensors that the mix says nothing special about.
            #[must_use]
            pub const fn base(self) -> Type {
                match self { $(Self::$variant => Type::$base,)* }
            }
            /// llama.cpp's number of the mix, the value of `general.file_type`.
            #[must_use]
            pub const fn file_type(self) -> u32 {
                match self { $(Self::$variant => ggml::$number as u32,)* }
            }
            const fn aliases(self) -> &'static [&'static str] {
                match self { $(Self::$variant => &$aliases,)* }
            }
        }
    };
}

mixes! {
    F32, F32, LLAMA_FTYPE_ALL_F32, [];
    F16, F16, LLAMA_FTYPE_MOSTLY_F16, [];
    BF16, BF16, LLAMA_FTYPE_MOSTLY_BF16, [];
    Q4_0, Q4_0, LLAMA_FTYPE_MOSTLY_Q4_0, [];
    Q4_1, Q4_1, LLAMA_FTYPE_MOSTLY_Q4_1, [];
    Q5_0, Q5_0, LLAMA_FTYPE_MOSTLY_Q5_0, [];
    Q5_1, Q5_1, LLAMA_FTYPE_MOSTLY_Q5_1, [];
    Q8_0, Q8_0, LLAMA_FTYPE_MOSTLY_Q8_0, [];
    Q2_K, Q2_K, LLAMA_FTYPE_MOSTLY_Q2_K, [];
    Q3_K_S, Q3_K, LLAMA_FTYPE_MOSTLY_Q3_K_S, [];
    Q3_K_M, Q3_K, LLAMA_FTYPE_MOSTLY_Q3_K_M, ["Q3_K"];
    Q3_K_L, Q3_K, LLAMA_FTYPE_MOSTLY_Q3_K_L, [];
    Q4_K_S, Q4_K, LLAMA_FTYPE_MOSTLY_Q4_K_S, [];
    Q4_K_M, Q4_K, LLAMA_FTYPE_MOSTLY_Q4_K_M, ["Q4_K"];
    Q5_K_S, Q5_K, LLAMA_FTYPE_MOSTLY_Q5_K_S, [];
    Q5_K_M, Q5_K, LLAMA_FTYPE_MOSTLY_Q5_K_M, ["Q5_K"];
    Q6_K, Q6_K, LLAMA_FTYPE_MOSTLY_Q6_K, [];
    IQ4_NL, IQ4_NL, LLAMA_FTYPE_MOSTLY_IQ4_NL, [];
    IQ4_XS, IQ4_XS, LLAMA_FTYPE_MOSTLY_IQ4_XS, [];
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Mix {
    type Err = String;
    /// Case-insensitive.
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let names = |m: &Self| {
            s.eq_ignore_ascii_case(m.name()) || m.aliases().iter().any(|a| s.eq_ignore_ascii_case(a))
        };
        Self::ALL.iter().copied().find(names).ok_or_else(|| {
            let all: Vec<_> = Self::ALL.iter().map(|m| m.name()).collect();
            format!("unknown type {s:?}: expected one of {}", all.join(", "))
        })
    }
}

/// The type of every tensor whose name a regular expression finds, written `REGEX=TYPE`.
#[derive(Clone, Debug)]
pub struct Override {
    /// What is searched in the name.
    pub pattern: Regex,
    /// The type it gets.
    pub ty: Type,
}

impl FromStr for Override {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let (pattern, ty) = s.rsplit_once('=').ok_or_else(|| format!("expected REGEX=TYPE, found {s:?}"))?;
        let pattern = Regex::new(pattern).map_err(|e| e.to_string())?;
        Ok(Self { pattern, ty: ty.parse().map_err(|e: ggml_kernels::quant::UnknownType| e.to_string())? })
    }
}

/// Everything that decides on types.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// The mix.
    pub mix: Mix,
    /// The first whose pattern fits decides, before everything else.
    pub overrides: Vec<Override>,
    /// Type of `output.weight`, and of `token_embd.weight` where it serves as the output too.
    pub output: Option<Type>,
    /// Type of `token_embd.weight`.
    pub token_embedding: Option<Type>,
    /// Give every matrix the base type: no mix.
    pub pure: bool,
    /// Whether an importance matrix is at hand; some mixes are bolder then.
    pub imatrix: bool,
}

impl Recipe {
    /// The plain recipe of a mix.
    #[must_use]
    pub fn new(mix: Mix) -> Self {
        Self { mix, overrides: Vec::new(), output: None, token_embedding: None, pure: false, imatrix: false }
    }
}

/// What deciding needs to know of a tensor.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// Its dimensions, row length first.
    pub shape: &'a [u64],
    /// Its type in the source.
    pub source: Type,
}

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The type to store.
    pub ty: Type,
    /// The type that was wanted, where rows are not whole blocks of it.
    pub instead_of: Option<Type>,
}

/// What a tensor does, as far as mixes care.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    TokenEmbedding,
    Output,
    AttentionV,
    AttentionOutput,
    FfnDown,
    /// The shared memory's and the indexer's projections: computed once per token and read by every cross layer.
    Shared,
    Other,
}

fn role(name: &str, tied: bool) -> Role {
    match name {
        "output.weight" => return Role::Output,
        "token_embd.weight" if tied => return Role::Output,
        "token_embd.weight" => return Role::TokenEmbedding,
        _ => {}
    }
    let layer = name.starts_with("blk.");
    if name.starts_with("shared_kv.") || name.starts_with("indexer.") {
        Role::Shared
    } else if layer && name.ends_with(".attn_v.weight") {
        Role::AttentionV
    } else if layer && name.ends_with(".attn_output.weight") {
        Role::AttentionOutput
    } else if layer && name.ends_with(".ffn_down.weight") {
        Role::FfnDown
    } else {
        Role::Other
    }
}

/// The layer number in `blk.N.`.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// Position of a layer among those with the same role.
#[derive(Clone, Copy)]
struct Place {
    i: usize,
    n: usize,
}

impl Place {
    /// The first and last eighth and every third between: where more bits help most.
    fn wants_more_bits(self) -> bool {
        let eighth = self.n / 8;
        self.i < eighth || self.i >= 7 * self.n / 8 || (self.i - eighth) % 3 == 2
    }
    fn in_first(self, part: usize) -> bool {
        self.i < self.n / part
    }
}

impl Recipe {
    /// Decides on the type of each tensor. `n_gqa` is the number of query heads per KV head.
    ///
    /// # Errors
    /// When an override fits no tensor.
    pub fn choose(&self, tensors: &[Candidate<'_>], n_gqa: usize) -> Result<Vec<Choice>> {
        let matrices = || tensors.iter().filter(|t| t.shape.len() > 1);
        if let Some(unused) = self.overrides.iter().find(|o| !matrices().any(|t| o.pattern.is_match(t.name)))
        {
            return Err(Error::Input(format!(
                "--tensor-type {}={}: no matrix has such a name",
                unused.pattern, unused.ty
            )));
        }
        let tied = !tensors.iter().any(|t| t.name == "output.weight");
        let mut v_layers: Vec<usize> = tensors
            .iter()
            .filter(|t| role(t.name, tied) == Role::AttentionV)
            .filter_map(|t| layer_of(t.name))
            .collect();
        v_layers.sort_unstable();
        let n_layer = tensors.iter().filter_map(|t| layer_of(t.name)).max().map_or(0, |l| l + 1);
        let place = |name: &str, role| {
            let layer = layer_of(name).unwrap_or(0);
            match role {
                Role::AttentionV => Place { i: v_layers.partition_point(|&l| l < layer), n: v_layers.len() },
                _ => Place { i: layer, n: n_layer },
            }
        };
        Ok(tensors
            .iter()
            .map(|t| {
                // Vectors are small and every op wants them as floats.
                if t.shape.len() < 2 {
                    return Choice { ty: Type::F32, instead_of: None };
                }
                let role = role(t.name, tied);
                let row = t.shape.first().map_or(0, |&n| n as usize);
                fit(self.wanted(t, role, place(t.name, role), n_gqa), row)
            })
            .collect())
    }

    fn wanted(&self, t: &Candidate<'_>, role: Role, place: Place, n_gqa: usize) -> Type {
        if let Some(over) = self.overrides.iter().find(|o| o.pattern.is_match(t.name)) {
            return over.ty;
        }
        if !t.name.ends_with(".weight") || t.name.ends_with("_norm.weight") {
            return t.source;
        }
        if let (Role::TokenEmbedding | Role::Output, "token_embd.weight", Some(ty)) =
            (role, t.name, self.token_embedding)
        {
            return ty;
        }
        if let (Role::Output, Some(ty)) = (role, self.output) {
            return ty;
        }
        let base = self.mix.base();
        if self.pure || !base.is_quantized() { base } else { self.mixed(role, place, n_gqa) }
    }

    /// The mixes, as llama.cpp chooses for dense models, and high precision for what this architecture shares.
    fn mixed(&self, role: Role, place: Place, n_gqa: usize) -> Type {
        let base = self.mix.base();
        let few_kv_heads = n_gqa >= 4;
        match (role, self.mix) {
            (Role::Shared, _) => Type::Q8_0,

            (Role::Output, Mix::Q8_0) => Type::Q8_0,
            (Role::Output, _) => Type::Q6_K,

            (Role::AttentionV, Mix::Q2_K) => {
                if few_kv_heads {
                    Type::Q4_K
                } else {
                    Type::Q3_K
                }
            }
            (Role::AttentionV, Mix::Q3_K_M) => {
                if place.i < 2 {
                    Type::Q5_K
                } else {
                    Type::Q4_K
                }
            }
            (Role::AttentionV, Mix::Q3_K_L) => Type::Q5_K,
            (Role::AttentionV, Mix::IQ4_NL | Mix::IQ4_XS) if few_kv_heads => Type::Q5_K,
            (Role::AttentionV, Mix::Q4_K_M | Mix::Q5_K_M) if place.wants_more_bits() => Type::Q6_K,
            (Role::AttentionV, Mix::Q4_K_S) if place.i < 4 => Type::Q5_K,

            (Role::FfnDown, Mix::Q2_K) => Type::Q3_K,
            (Role::FfnDown, Mix::Q3_K_M) => {
                if place.in_first(16) {
                    Type::Q5_K
                } else {
                    Type::Q4_K
                }
            }
            (Role::FfnDown, Mix::Q3_K_L) => Type::Q5_K,
            (Role::FfnDown, Mix::Q4_K_M | Mix::Q5_K_M) if place.wants_more_bits() => Type::Q6_K,
            (Role::FfnDown, Mix::Q4_K_S) if place.in_first(8) => Type::Q5_K,
            (Role::FfnDown, Mix::IQ4_NL | Mix::IQ4_XS) if place.in_first(8) && !self.imatrix => Type::Q5_K,
            (Role::FfnDown, Mix::Q4_0) if place.in_first(8) && self.imatrix => Type::Q4_1,
            (Role::FfnDown, Mix::Q5_0) if place.in_first(8) && self.imatrix => Type::Q5_1,

            (Role::AttentionOutput, Mix::Q2_K) => Type::Q3_K,
            (Role::AttentionOutput, Mix::Q3_K_M) => Type::Q4_K,
            (Role::AttentionOutput, Mix::Q3_K_L) => Type::Q5_K,

            _ => base,
        }
    }
}

/// The wanted type, or one of 32-value blocks with at least its precision, or F16, whichever rows are whole blocks of.
fn fit(wanted: Type, row: usize) -> Choice {
    let smaller = match wanted {
        Type::IQ4_XS => Type::IQ4_NL,
        Type::Q2_K | Type::Q3_K => Type::Q4_0,
        Type::Q4_K => Type::Q5_0,
        Type::Q5_K => Type::Q5_1,
        Type::Q6_K => Type::Q8_0,
        other => other,
    };
    let whole = |ty: &Type| row.is_multiple_of(ty.block_len());
    let ty = [wanted, smaller].into_iter().find(whole).unwrap_or(Type::F16);
    Choice { ty, instead_of: (ty != wanted).then_some(wanted) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A yoco-clsa model of 16 + 16 layers with rows of `row`.
    fn choose(recipe: &Recipe, row: u64) -> Result<Vec<(String, Choice)>> {
        let mut names =
            vec!["token_embd.weight".to_owned(), "output.weight".into(), "output_norm.weight".into()];
        names.extend(
            ["shared_kv.attn_k", "shared_kv.attn_v", "indexer.attn_q"].map(|n| format!("{n}.weight")),
        );
        for layer in 0..32 {
            names.extend(["attn_q", "attn_output", "ffn_down"].map(|n| format!("blk.{layer}.{n}.weight")));
            if layer < 16 {
                names.push(format!("blk.{layer}.attn_v.weight"));
            }
        }
        let shapes: Vec<Vec<u64>> =
            names.iter().map(|n| if n.contains("norm") { vec![row] } else { vec![row, 4] }).collect();
        let candidates: Vec<Candidate<'_>> = names
            .iter()
            .zip(&shapes)
            .map(|(name, shape)| Candidate { name, shape, source: Type::BF16 })
            .collect();
        let choices = recipe.choose(&candidates, 5)?;
        Ok(names.into_iter().zip(choices).collect())
    }

    fn of(choices: &[(String, Choice)], name: &str) -> Type {
        choices.iter().find(|(n, _)| n == name).unwrap().1.ty
    }

    #[test]
    fn a_mix_gives_more_bits_to_what_matters() {
        let c = choose(&Recipe::new(Mix::Q4_K_M), 256).unwrap();
        assert_eq!(of(&c, "token_embd.weight"), Type::Q4_K);
        assert_eq!(of(&c, "output.weight"), Type::Q6_K);
        assert_eq!(of(&c, "output_norm.weight"), Type::F32);
        assert_eq!(of(&c, "blk.0.attn_q.weight"), Type::Q4_K);
        for name in ["shared_kv.attn_k.weight", "shared_kv.attn_v.weight", "indexer.attn_q.weight"] {
            assert_eq!(of(&c, name), Type::Q8_0);
        }
        let more = |part: &str, n| {
            (0..n).filter(|i| of(&c, &format!("blk.{i}.{part}.weight")) == Type::Q6_K).collect::<Vec<_>>()
        };
        // Of 32 layers the first and last four and every third between; of the 16 with a V of their own likewise.
        assert_eq!(more("ffn_down", 32), [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]);
        assert_eq!(more("attn_v", 16), [0, 1, 4, 7, 10, 13, 14, 15]);
    }

    #[test]
    fn pure_and_float_types_know_no_mix() {
        let pure = choose(&Recipe { pure: true, ..Recipe::new(Mix::Q4_K_M) }, 256).unwrap();
        assert!(pure.iter().all(|(n, c)| c.ty == if n.contains("norm") { Type::F32 } else { Type::Q4_K }));
        let half = choose(&Recipe::new(Mix::F16), 256).unwrap();
        assert!(half.iter().all(|(n, c)| c.ty == if n.contains("norm") { Type::F32 } else { Type::F16 }));
    }

    #[test]
    fn rows_that_are_not_whole_blocks_fall_back() {
        let c = choose(&Recipe::new(Mix::Q4_K_M), 96).unwrap();
        let choice = |name: &str| c.iter().find(|(n, _)| n == name).unwrap().1;
        assert_eq!(choice("blk.0.attn_q.weight"), Choice { ty: Type::Q5_0, instead_of: Some(Type::Q4_K) });
        assert_eq!(choice("output.weight"), Choice { ty: Type::Q8_0, instead_of: Some(Type::Q6_K) });
        assert_eq!(choice("shared_kv.attn_k.weight"), Choice { ty: Type::Q8_0, instead_of: None });
        let c = choose(&Recipe::new(Mix::Q4_0), 40).unwrap();
        assert_eq!(of(&c, "blk.0.attn_q.weight"), Type::F16);
        for (wanted, smaller) in
            [(Type::IQ4_XS, Type::IQ4_NL), (Type::Q3_K, Type::Q4_0), (Type::Q5_K, Type::Q5_1)]
        {
            assert_eq!(fit(wanted, 32).ty, smaller);
        }
    }

    #[test]
    fn overrides_come_first_and_must_fit_something() {
        let overrides = vec![r"ffn_down=q8_0".parse().unwrap(), r"^(blk\.1\.|output)=f16".parse().unwrap()];
        let recipe = Recipe { overrides, output: Some(Type::Q5_K), ..Recipe::new(Mix::Q4_0) };
        let c = choose(&recipe, 256).unwrap();
        assert_eq!(of(&c, "blk.1.ffn_down.weight"), Type::Q8_0);
        assert_eq!(of(&c, "blk.1.attn_q.weight"), Type::F16);
        assert_eq!(of(&c, "output.weight"), Type::F16);
        assert_eq!(of(&c, "output_norm.weight"), Type::F32);
        let unused = Recipe { overrides: vec!["ffn_dwon=q8_0".parse().unwrap()], ..Recipe::new(Mix::Q4_0) };
        assert!(
            choose(&unused, 256)
                .unwrap_err()
                .to_string()
                .contains("ffn_dwon=Q8_0: no matrix has such a name")
        );
        assert!("ffn".parse::<Override>().unwrap_err().contains("REGEX=TYPE"));
        assert!("(=q8_0".parse::<Override>().unwrap_err().contains("unclosed"));
        assert!("a=q9".parse::<Override>().unwrap_err().contains("unknown tensor type"));
    }

    #[test]
    fn mixes_have_names_in_any_case() {
        assert_eq!("q4_k".parse(), Ok(Mix::Q4_K_M));
        assert_eq!("iq4_XS".parse(), Ok(Mix::IQ4_XS));
        assert!("q4_k_l".parse::<Mix>().unwrap_err().contains("Q4_K_S, Q4_K_M"));
    }
}
