//! What the machine can do at most: bytes read, int8 and f32 operations per second. Benchmarks print it beside their rates.
use crate::{contracts::*, simd::Level};
use std::time::Instant;

/// Rates of all threads together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Bytes per second, read from memory that no cache holds.
    pub read: f64,
    /// int8 operations per second (a multiply-add is two).
    pub int8: f64,
    /// f32 operations per second.
    pub float: f64,
    /// bf16 operations per second of matrix tiles, where the level has them.
    pub bf16: Option<f64>,
}

type Rate = unsafe extern "C" fn(i64) -> f64;
type Read = unsafe extern "C" fn(*const u8, usize);

#[cfg(all(target_arch = "x86_64", clsa_amx))]
unsafe extern "C" fn int8_amx(steps: i64) -> f64 {
    // SAFETY: the caller's: the level is available.
    unsafe { clsa_limit_int8_amx(steps / 16) }
}

fn kernels(level: Level) -> (Rate, Rate, Read) {
    match level {
        #[cfg(all(target_arch = "x86_64", clsa_amx))]
        Level::Amx => (int8_amx, clsa_limit_f32_avx512vnni, clsa_limit_read_avx512vnni),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 if crate::matmul::has_vnni() => {
            (clsa_limit_int8_avx512vnni, clsa_limit_f32_avx512vnni, clsa_limit_read_avx512vnni)
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx512 => (clsa_limit_int8_avx2, clsa_limit_f32_avx2, clsa_limit_read_avx2),
        _ => (clsa_limit_int8_ref, clsa_limit_f32_ref, clsa_limit_read_ref),
    }
}

/// Measures with `threads` threads of a level, in about a second and with the memory of [`Reads`]: the best of five rounds each.
///
/// # Panics
/// This CPU cannot run the level, or the memory is not to be had.
#[must_use]
pub fn measure(level: Level, threads: usize) -> Limits {
    assert!(level.available(), "{level} on this CPU");
    let threads = threads.max(1);
    let (int8, float, _) = kernels(level);
    let best = |work: &(dyn Fn(usize) -> f64 + Sync)| (0..5).map(|_| rate(threads, work)).fold(0.0, f64::max);
    const STEPS: i64 = 1_000_000;
    #[cfg(not(all(target_arch = "x86_64", clsa_amx)))]
    let bf16 = None;
    // SAFETY: the level is available; no memory is touched.
    #[cfg(all(target_arch = "x86_64", clsa_amx))]
    let bf16 = (level == Level::Amx).then(|| best(&|_| unsafe { clsa_limit_bf16_amx(STEPS / 16) }));
    let reads = Reads::new(level, threads);
    Limits {
        read: (0..5).map(|_| reads.rate()).fold(0.0, f64::max),
        bf16,
        // SAFETY: the level is available; no memory is touched.
        int8: best(&|_| unsafe { int8(STEPS) }),
        // SAFETY: as above.
        float: best(&|_| unsafe { float(STEPS) }),
    }
}

/// 512 MiB to read, again and again: next to what is timed, on a machine whose rates drift.
#[derive(Debug)]
pub struct Reads {
    memory: memmap2::MmapMut,
    level: Level,
    threads: usize,
}

impl Reads {
    /// Memory for `threads` threads of a level.
    ///
    /// # Panics
    /// This CPU cannot run the level, or the memory is not to be had.
    #[must_use]
    pub fn new(level: Level, threads: usize) -> Self {
        assert!(level.available(), "{level} on this CPU");
        // Large pages where the system has them, as the caches ask for: reads of small ones are a third slower.
        let mut memory = memmap2::MmapMut::map_anon(512 << 20).expect("512 MiB of memory to measure with");
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        // Written, so that no page is the system's page of zeros.
        memory.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i ^ i >> 8) as u8);
        Self { memory, level, threads: threads.max(1) }
    }

    /// Reads all of it once; bytes per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        let part = self.memory.len() / self.threads / 512 * 512;
        rate(self.threads, &|i| {
            read(self.level, &self.memory[i * part..(i + 1) * part]);
            part as f64
        })
    }
}

/// Reads `memory` with a level's widest loads, to be timed beside a kernel that reads the same bytes.
///
/// # Panics
/// This CPU cannot run the level.
pub fn read(level: Level, memory: &[u8]) {
    assert!(level.available(), "{level} on this CPU");
    // SAFETY: reads the slice.
    unsafe { kernels(level).2(memory.as_ptr(), memory.len()) }
}

/// Drops `memory` from every cache, where the CPU has an instruction for that.
pub fn flush(memory: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in memory.chunks(64) {
        // SAFETY: an address of the slice; what is dirty is written back.
        unsafe { std::arch::x86_64::_mm_clflush(line.as_ptr()) };
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: waits for the above.
    unsafe {
        std::arch::x86_64::_mm_mfence();
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = memory;
}

/// What `work` returns on all threads, per second.
fn rate(threads: usize, work: &(dyn Fn(usize) -> f64 + Sync)) -> f64 {
    let barrier = std::sync::Barrier::new(threads);
    let each = |i| {
        barrier.wait();
        let start = Instant::now();
        (work(i), start.elapsed().as_secs_f64())
    };
    let (mut done, mut seconds) = (0.0, 0f64);
    std::thread::scope(|s| {
        let others: Vec<_> = (1..threads).map(|i| s.spawn(move || each(i))).collect();
        let mine = each(0);
        for (d, t) in others.into_iter().filter_map(|t| t.join().ok()).chain([mine]) {
            done += d;
            seconds = seconds.max(t);
        }
    });
    done / seconds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn what_was_flushed_comes_from_memory() {
        let memory: Vec<u8> = (0..64 << 10).map(|i| i as u8).collect();
        let level = Level::ALL.into_iter().filter(|l| l.available()).max().expect("a level");
        let time = |flushed: bool| {
            if flushed {
                flush(&memory);
            }
            let started = Instant::now();
            read(level, &memory);
            started.elapsed()
        };
        let best = |flushed| (0..50).map(|_| time(flushed)).min().expect("times");
        time(false);
        let (cached, flushed) = (best(false), best(true));
        assert!(flushed > cached, "{flushed:?} after a flush, {cached:?} without");
        assert!(memory.iter().enumerate().all(|(i, b)| *b == i as u8));
    }

    #[test]
    fn rates_are_plausible() {
        for level in Level::ALL.into_iter().filter(|l| l.available()) {
            let l = measure(level, 1);
            let all = [Some(l.read), Some(l.int8), Some(l.float), l.bf16];
            assert!(all.iter().flatten().all(|r| (1e7..1e15).contains(r)), "{level}: {l:?}");
        }
    }
}
