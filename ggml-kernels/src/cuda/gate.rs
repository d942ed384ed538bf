//! Keeps recordings apart from allocations.
//!
//! While one thread records a graph, the driver refuses work of other threads that would wait for the whole device (freeing memory,
//! loading modules, copies that wait), or spoils the recording. Such work and recordings therefore wait for each other.
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{self, ThreadId};

struct State {
    /// The thread that records.
    recording: Option<ThreadId>,
    /// Threads at work that a recording must not meet.
    working: usize,
}

static STATE: Mutex<State> = Mutex::new(State { recording: None, working: 0 });
static CHANGED: Condvar = Condvar::new();

/// Work that must not meet another thread's recording, until it is dropped.
#[must_use]
pub struct Work {
    counted: bool,
}

/// A recording, until it is dropped.
#[must_use]
pub struct Recording(());

fn change<T>(ready: impl Fn(&State) -> bool, change: impl FnOnce(&mut State) -> T) -> T {
    let state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut state = CHANGED.wait_while(state, |s| !ready(s)).unwrap_or_else(PoisonError::into_inner);
    let result = change(&mut state);
    CHANGED.notify_all();
    result
}

/// Waits until no other thread records. A thread that records itself goes on: what it must not do the driver says.
pub fn work() -> Work {
    let me = thread::current().id();
    let counted = change(
        |s| s.recording.is_none_or(|r| r == me),
        |s| {
            let counted = s.recording.is_none();
            s.working += usize::from(counted);
            counted
        },
    );
    Work { counted }
}

/// Waits until nobody records or works.
pub fn record() -> Recording {
    change(|s| s.recording.is_none() && s.working == 0, |s| s.recording = Some(thread::current().id()));
    Recording(())
}

impl Drop for Work {
    fn drop(&mut self) {
        if self.counted {
            change(|_| true, |s| s.working -= 1);
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        change(|_| true, |s| s.recording = None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn recordings_meet_nobody_elses_work() {
        static WORKING: AtomicUsize = AtomicUsize::new(0);
        static RECORDING: AtomicUsize = AtomicUsize::new(0);
        thread::scope(|scope| {
            for i in 0..4 {
                scope.spawn(move || {
                    for _ in 0..200 {
                        if i % 2 == 0 {
                            let _recording = record();
                            let _own = work();
                            assert_eq!(RECORDING.fetch_add(1, Ordering::SeqCst), 0);
                            assert_eq!(WORKING.load(Ordering::SeqCst), 0);
                            thread::yield_now();
                            RECORDING.fetch_sub(1, Ordering::SeqCst);
                        } else {
                            let _work = work();
                            WORKING.fetch_add(1, Ordering::SeqCst);
                            assert_eq!(RECORDING.load(Ordering::SeqCst), 0);
                            thread::yield_now();
                            WORKING.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
    }
}
