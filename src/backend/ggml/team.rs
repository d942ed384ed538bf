//! A team of threads that shares an op piece by piece.
//!
//! An op is cut into more pieces than there are threads, and whoever is free takes the next one. A thread that the system has set aside
//! holds back only the piece in its hands, not every following op as it would at a barrier; a thread that has not even woken up
//! holds back nothing.
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// An op: does piece `i`.
type Job = *const (dyn Fn(usize) + Sync);

/// Worker threads, and the thread that calls [`Team::run`].
pub struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Epoch in the upper half; whether the job is open in bit 31; threads inside it in the bits below.
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    pieces: AtomicUsize,
    next: AtomicUsize,
    sleepers: AtomicU32,
    lock: Mutex<()>,
    wake: Condvar,
    quit: AtomicBool,
}

// SAFETY: `job` is written only while the job is closed and nobody is inside, and read only by threads that have entered.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
const EPOCH: u64 = 1 << 32;

/// How often a worker looks for the next op before it sleeps: some hundred microseconds, longer than what lies between two ops of a
/// step, or between two steps.
const LOOKS: u32 = 20_000;

impl Team {
    /// A team of `threads`, the caller's own among them.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            pieces: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            sleepers: AtomicU32::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            quit: AtomicBool::new(false),
        });
        let mut team = Self { shared, workers: vec![] };
        for i in 1..threads {
            let shared = Arc::clone(&team.shared);
            team.workers
                .push(std::thread::Builder::new().name(format!("clsa-{i}")).spawn(move || shared.work())?);
        }
        Ok(team)
    }

    /// Calls `job(i)` once for each `i < pieces`, on any thread in any order; returns when all calls have returned.
    pub fn run(&mut self, pieces: usize, job: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        if pieces <= 1 || self.workers.is_empty() {
            (0..pieces).for_each(job);
            return;
        }
        // SAFETY: no thread is inside: `run` needs &mut self, and waits below until all have left. The lifetime is erased only until then.
        unsafe { *shared.job.get() = Some(std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(job)) };
        shared.pieces.store(pieces, Ordering::Relaxed);
        shared.next.store(0, Ordering::Relaxed);
        let epoch = shared.state.load(Ordering::Relaxed) & !(EPOCH - 1);
        shared.state.store(epoch.wrapping_add(EPOCH) | OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        shared.take_pieces(job);
        let mut state = shared.state.fetch_and(!OPEN, Ordering::AcqRel) & !OPEN;
        let mut looks = 0;
        while state & INSIDE != 0 {
            looks += 1;
            if looks < 1000 {
                spin_loop()
            } else {
                std::thread::yield_now()
            }
            state = shared.state.load(Ordering::Acquire);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        {
            let _guard = self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker ends only by returning: a panic inside a job has ended the process already.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn take_pieces(&self, job: &(dyn Fn(usize) + Sync)) {
        let pieces = self.pieces.load(Ordering::Relaxed);
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= pieces {
                return;
            }
            job(i);
        }
    }

    fn work(&self) {
        let mut seen = 0;
        while let Some(state) = self.wait(seen) {
            // Enter only while the job is open: its caller then waits for us. If somebody else entered first, or it has closed, look again.
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                continue;
            }
            seen = state & !(EPOCH - 1);
            // SAFETY: the job is open and counts us as inside, so that `run` keeps it alive.
            if let Some(job) = unsafe { *self.job.get() } {
                // SAFETY: as above.
                self.take_pieces(unsafe { &*job });
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Waits for an open job that is not of the epoch `seen`; `None`: the team ends.
    fn wait(&self, seen: u64) -> Option<u64> {
        let fresh = |state: u64| state & OPEN != 0 && state & !(EPOCH - 1) != seen;
        for _ in 0..LOOKS {
            let state = self.state.load(Ordering::Acquire);
            if fresh(state) {
                return Some(state);
            }
            if self.quit.load(Ordering::Relaxed) {
                return None;
            }
            spin_loop();
        }
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let found = loop {
            let state = self.state.load(Ordering::SeqCst);
            if fresh(state) {
                break Some(state);
            }
            if self.quit.load(Ordering::SeqCst) {
                break None;
            }
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once() {
        for threads in 1..=4 {
            let mut team = Team::new(threads).expect("threads");
            for round in 0..2000 {
                let pieces = round % 17;
                let done: Vec<AtomicU32> = (0..pieces).map(|_| AtomicU32::new(0)).collect();
                team.run(pieces, &|i| {
                    done[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1), "round {round}");
                if round % 500 == 0 {
                    // Long enough for the workers to fall asleep.
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
        }
    }
}
