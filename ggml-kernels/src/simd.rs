//! Which instruction set the CPU kernels use: detected once, or forced by the environment variable `CLSA_SIMD`.
use std::{fmt, str::FromStr, sync::OnceLock};

/// Instruction sets that the kernels are written for, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// The scalar references.
    Ref,
    /// AVX2, FMA and F16C (x86-64-v3).
    Avx2,
    /// AVX-512 F, BW, CD, DQ, VL (x86-64-v4).
    Avx512,
}

impl Level {
    /// Every level, weakest first.
    pub const ALL: [Self; 3] = [Self::Ref, Self::Avx2, Self::Avx512];

    /// Whether this CPU can run it.
    #[must_use]
    pub fn available(self) -> bool {
        match self {
            Self::Ref => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("bmi1")
                    && is_x86_feature_detected!("bmi2")
                    && is_x86_feature_detected!("lzcnt")
                    && is_x86_feature_detected!("movbe")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512cd")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The level in use: what `CLSA_SIMD` asks for, otherwise the best that this CPU can run.
    ///
    /// # Errors
    /// `CLSA_SIMD` holds an unknown name, or a level that this CPU lacks.
    pub fn chosen() -> Result<Self, LevelError> {
        static CHOSEN: OnceLock<Result<Level, LevelError>> = OnceLock::new();
        CHOSEN
            .get_or_init(|| match std::env::var("CLSA_SIMD") {
                Ok(name) if !name.is_empty() => {
                    let level: Self = name.parse()?;
                    if level.available() { Ok(level) } else { Err(LevelError::Unavailable(level)) }
                }
                _ => Ok(Self::ALL.into_iter().rev().find(|l| l.available()).unwrap_or(Self::Ref)),
            })
            .clone()
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Ref => "ref",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        })
    }
}

impl FromStr for Level {
    type Err = LevelError;
    fn from_str(name: &str) -> Result<Self, LevelError> {
        Self::ALL
            .into_iter()
            .find(|l| l.to_string() == name.to_ascii_lowercase())
            .ok_or_else(|| LevelError::Unknown(name.to_owned()))
    }
}

/// `CLSA_SIMD` cannot be honoured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LevelError {
    /// Not a level's name.
    #[error("CLSA_SIMD={0}: unknown level; use ref, avx2 or avx512, or unset it")]
    Unknown(String),
    /// A level that this CPU cannot run.
    #[error("CLSA_SIMD={0}: this CPU cannot run it; use a lower level, or unset it")]
    Unavailable(Level),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for level in Level::ALL {
            assert_eq!(level.to_string().parse(), Ok(level));
        }
        assert_eq!("sse9".parse::<Level>(), Err(LevelError::Unknown("sse9".into())));
    }
}
