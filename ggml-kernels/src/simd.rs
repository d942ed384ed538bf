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
    /// AMX-TILE, AMX-BF16 and AMX-INT8, with AVX-512 VNNI, VBMI, VBMI2 and BF16 (Sapphire Rapids).
    Amx,
}

impl Level {
    /// Every level, weakest first.
    pub const ALL: [Self; 4] = [Self::Ref, Self::Avx2, Self::Avx512, Self::Amx];

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
            #[cfg(all(target_arch = "x86_64", clsa_amx))]
            Self::Amx => {
                Self::Avx512.available()
                    && crate::matmul::has_vnni()
                    && is_x86_feature_detected!("avx512bf16")
                    && amx_permitted()
            }
            #[cfg(not(all(target_arch = "x86_64", clsa_amx)))]
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

/// Whether the CPU has AMX and the system lets this process use it, which has to be asked for once.
#[cfg(all(target_arch = "x86_64", clsa_amx, not(feature = "amx-emulator")))]
fn amx_permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        // Leaf 7, EDX: AMX-BF16 is bit 22, AMX-TILE bit 24, AMX-INT8 bit 25.
        let has = std::arch::x86_64::__cpuid_count(7, 0).edx;
        [22, 24, 25].into_iter().all(|bit| has >> bit & 1 == 1) && ask_for_tiles()
    })
}

/// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`: Linux saves the tiles only of processes that asked.
#[cfg(all(target_arch = "x86_64", clsa_amx, not(feature = "amx-emulator"), target_os = "linux"))]
fn ask_for_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: takes two numbers and touches no memory; kernels that do not know it return an error.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", clsa_amx, not(feature = "amx-emulator"), not(target_os = "linux")))]
fn ask_for_tiles() -> bool {
    false
}

/// The emulated tiles run anywhere.
#[cfg(all(target_arch = "x86_64", clsa_amx, feature = "amx-emulator"))]
fn amx_permitted() -> bool {
    true
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Ref => "ref",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
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
    #[error("CLSA_SIMD={0}: unknown level; use ref, avx2, avx512 or amx, or unset it")]
    Unknown(String),
    /// A level that this CPU cannot run.
    #[error("CLSA_SIMD={0}: this CPU, system or build cannot run it; use a lower level, or unset it")]
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
