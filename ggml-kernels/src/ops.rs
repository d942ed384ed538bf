//! The ops of `include/*.h` on the CPU: a table of kernels per instruction set, and the checks that stand before a call.
//!
//! A caller fills a parameter struct of [`crate::contracts`], calls [`Op::check`] once per batch and shape, and then has every
//! thread of a team call [`Ops::run`]. That is how a ggml custom op (`ggml_custom_4d`) calls its callback; [`run_team`] does the same
//! with threads of its own.
use crate::contracts::*;
use crate::mapping;
use crate::simd::{Level, LevelError};
use memmap2::{MmapMut, MmapRaw};
use std::{
    alloc::Layout,
    ffi::{c_int, c_void},
};

/// A kernel: thread `ith` of `nth` does its share.
pub type Kernel<P> = unsafe extern "C" fn(p: *const P, ith: c_int, nth: c_int, scratch: *mut c_void);

/// The kernels of one instruction set.
#[derive(Debug)]
pub struct Ops {
    /// The instruction set.
    pub level: Level,
    rope_append: Kernel<clsa_rope_append>,
    attention: Kernel<clsa_attention>,
    gather_attention: Kernel<clsa_gather_attention>,
    route: Kernel<clsa_route>,
    score: Kernel<clsa_score>,
    topk: Kernel<clsa_topk>,
    pack: Kernel<clsa_pack>,
    matmul: Kernel<clsa_matmul>,
}

macro_rules! table {
    ($level:ident: $rope:ident $attention:ident $gather:ident $route:ident $score:ident $topk:ident) => {
        Ops {
            level: Level::$level,
            rope_append: $rope,
            attention: $attention,
            gather_attention: $gather,
            route: $route,
            score: $score,
            topk: $topk,
            pack: crate::matmul::kernels(Level::$level).0,
            matmul: crate::matmul::kernels(Level::$level).1,
        }
    };
}

static TABLES: &[Ops] = &[
    table!(Ref: clsa_rope_append_ref clsa_attention_ref clsa_gather_attention_ref clsa_route_ref clsa_score_ref clsa_topk_ref),
    #[cfg(target_arch = "x86_64")]
    table!(Avx2: clsa_rope_append_avx2 clsa_attention_avx2 clsa_gather_attention_avx2 clsa_route_avx2 clsa_score_avx2 clsa_topk_avx2),
    #[cfg(target_arch = "x86_64")]
    table!(Avx512: clsa_rope_append_avx512 clsa_attention_avx512 clsa_gather_attention_avx512 clsa_route_avx512 clsa_score_avx512 clsa_topk_avx512),
    #[cfg(all(target_arch = "x86_64", clsa_amx))]
    table!(Amx: clsa_rope_append_avx512 clsa_attention_amx clsa_gather_attention_avx512 clsa_route_avx512 clsa_score_avx512 clsa_topk_avx512),
];

impl Ops {
    /// The kernels of the level in use ([`Level::chosen`]).
    ///
    /// # Errors
    /// `CLSA_SIMD` cannot be honoured.
    pub fn best() -> Result<&'static Self, LevelError> {
        let level = Level::chosen()?;
        Ok(Self::at(level).unwrap_or(&TABLES[0]))
    }

    /// The kernels of one level; `None` where this CPU cannot run it.
    #[must_use]
    pub fn at(level: Level) -> Option<&'static Self> {
        TABLES.iter().find(|t| t.level == level && level.available())
    }

    /// Every table that this CPU can run, the scalar references first.
    pub fn all() -> impl Iterator<Item = &'static Self> {
        TABLES.iter().filter(|t| t.level.available())
    }

    /// Thread `ith` of `nth` does its share of `p`; the op is done when all threads have returned.
    ///
    /// # Panics
    /// `scratch` is too small, or `ith >= nth`.
    ///
    /// # Safety
    /// - `p.check()` holds, and the pointers of `p` are valid for the shapes that its header states; outputs overlap nothing else.
    /// - All `nth` threads make this call with the same `p` and `scratch`, and nothing else uses them, nor writes what `p` reads, until
    ///   all have returned.
    pub unsafe fn run<P: Op>(&self, p: &P, ith: usize, nth: usize, scratch: &Scratch) {
        assert!(ith < nth && nth <= MAX_THREADS, "thread {ith} of {nth}");
        let wanted = p.scratch_bytes(nth);
        assert!(
            scratch.len() >= wanted,
            "{}: {wanted} bytes of scratch wanted, {} given",
            P::NAME,
            scratch.len()
        );
        // SAFETY: the kernel's contract is this function's; the scratch is large enough and its sync words are zero between ops.
        unsafe { P::kernel(self)(p, ith as c_int, nth as c_int, scratch.as_ptr()) }
    }
}

/// Threads of the largest team.
pub const MAX_THREADS: usize = 512;

/// A parameter struct of `include/*.h`.
pub trait Op: sealed::Sealed + Sized {
    /// The op's name, as its header is called.
    const NAME: &'static str;
    /// Checks everything that can be checked without reading what the pointers other than `batch`'s point to: shapes, types, strides,
    /// positions, slots and page numbers against the memory of the pools.
    ///
    /// # Errors
    /// What is wrong, with the values found.
    fn check(&self) -> Result<(), OpError>;
    /// Bytes of scratch that a team of `nth` threads wants. Reads no pointer, grows with `n_rows`, never with positions.
    fn scratch_bytes(&self, nth: usize) -> usize;
    #[doc(hidden)]
    fn kernel(ops: &Ops) -> Kernel<Self>;
}

mod sealed {
    pub trait Sealed {}
}

/// Parameters that an op cannot run with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{op}: {what}")]
pub struct OpError {
    /// The op.
    pub op: &'static str,
    /// What was found and what was expected.
    pub what: String,
}

macro_rules! op {
    ($params:ident, $field:ident, $scratch:ident) => {
        impl sealed::Sealed for $params {}
        impl Op for $params {
            const NAME: &'static str = stringify!($field);
            fn check(&self) -> Result<(), OpError> {
                crate::check::$field(self).map_err(|what| OpError { op: Self::NAME, what })
            }
            fn scratch_bytes(&self, nth: usize) -> usize {
                // SAFETY: reads plain fields of the struct, no pointer.
                unsafe { $scratch(self, nth.min(MAX_THREADS) as c_int) }
            }
            fn kernel(ops: &Ops) -> Kernel<Self> {
                ops.$field
            }
        }
    };
}

op!(clsa_rope_append, rope_append, clsa_rope_append_scratch);
op!(clsa_attention, attention, clsa_attention_scratch);
op!(clsa_gather_attention, gather_attention, clsa_gather_attention_scratch);
op!(clsa_route, route, clsa_route_scratch);
op!(clsa_score, score, clsa_score_scratch);
op!(clsa_topk, topk, clsa_topk_scratch);
op!(clsa_pack, pack, clsa_pack_scratch);
op!(clsa_matmul, matmul, clsa_matmul_scratch);

/// Memory that the threads of an op share: on pages of its own, huge ones where the system has them, and zero at first.
#[derive(Debug)]
pub struct Scratch {
    memory: MmapRaw,
    bytes: usize,
}
const _: () = assert!(4096 % CLSA_ALIGN == 0, "pages are aligned to CLSA_ALIGN");

impl Scratch {
    /// Room for `bytes`.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let memory = MmapMut::map_anon(bytes.max(1)).unwrap_or_else(|_| {
            // As where a Vec finds no memory.
            let layout = Layout::from_size_align(bytes, CLSA_ALIGN as usize);
            std::alloc::handle_alloc_error(layout.unwrap_or(Layout::new::<[u8; 4096]>()))
        });
        mapping::advise_huge_pages(memory.as_ptr(), memory.len());
        Self { memory: memory.into(), bytes }
    }

    /// Room for a team of `nth` threads to run `p`.
    #[must_use]
    pub fn of(p: &impl Op, nth: usize) -> Self {
        Self::new(p.scratch_bytes(nth))
    }

    /// Bytes held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub(crate) fn as_ptr(&self) -> *mut c_void {
        self.memory.as_mut_ptr().cast()
    }
}

/// Runs `p` on a team of `nth` threads made for it.
///
/// # Safety
/// As for [`Ops::run`], whose calls this makes.
pub unsafe fn run_team<P: Op>(ops: &Ops, p: &P, nth: usize, scratch: &Scratch) {
    struct Shared<'a, P>(&'a P);
    // SAFETY: the threads use the struct's pointers by the rules of include/clsa.h, which the caller vouches for.
    unsafe impl<P> Sync for Shared<'_, P> {}
    let shared = Shared(p);
    std::thread::scope(|scope| {
        for ith in 1..nth {
            let shared = &shared;
            // SAFETY: the caller's.
            scope.spawn(move || unsafe { ops.run(shared.0, ith, nth, scratch) });
        }
        // SAFETY: the caller's.
        unsafe { ops.run(p, 0, nth, scratch) }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_level_has_a_table() {
        let ops = Ops::best().unwrap();
        assert_eq!(ops.level, Level::chosen().unwrap());
        assert_eq!(Ops::at(Level::Ref).unwrap().level, Level::Ref);
    }
}
