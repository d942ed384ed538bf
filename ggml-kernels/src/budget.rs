//! Threads with a budget of memory, for programs from outside.
//!
//! A chat template can double a string with every step, so that counting steps does not bound what it takes, and an allocation that
//! fails ends the process. A thread that asks for more than its budget therefore stops for ever inside the request, with what it holds, and
//! whoever waits for it is told.
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// The system's allocator, which counts for threads with a budget. [`within`] needs it as the global allocator.
#[derive(Clone, Copy, Debug)]
pub struct Counted;

/// What [`LEFT`] holds in a thread without a budget.
const UNBOUNDED: usize = usize::MAX;

thread_local! {
    /// Bytes that this thread may still take.
    static LEFT: Cell<usize> = const { Cell::new(UNBOUNDED) };
    /// Set when they do not suffice.
    static EXCEEDED: Cell<*const AtomicBool> = const { Cell::new(ptr::null()) };
}

fn take(bytes: usize) {
    LEFT.with(|left| match left.get() {
        UNBOUNDED => {}
        now => match now.checked_sub(bytes) {
            Some(rest) => left.set(rest),
            None => stop(),
        },
    });
}

fn give_back(bytes: usize) {
    LEFT.with(|left| match left.get() {
        UNBOUNDED => {}
        // What other threads took may be given back here.
        now => left.set(now.saturating_add(bytes).min(UNBOUNDED - 1)),
    });
}

#[cold]
fn stop() {
    if thread::panicking() {
        // What reports a panic holds locks that others need, and comes to an end.
        LEFT.set(UNBOUNDED);
        return;
    }
    let exceeded = EXCEEDED.get();
    if !exceeded.is_null() {
        // SAFETY: `Bounded`, which holds the flag, clears the pointer before it lets go of it.
        unsafe { (*exceeded).store(true, Ordering::Release) };
    }
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

// SAFETY: all requests go to the system's allocator as they are; counting allocates nothing and does not unwind, and the thread-local values
// need no destructor, so that they are there as long as the thread is.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        give_back(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        match size.checked_sub(layout.size()) {
            Some(more) => take(more),
            None => give_back(layout.size() - size),
        }
        // SAFETY: the caller's promise.
        unsafe { System.realloc(block, layout, size) }
    }
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The work asked for more memory than it may have.
    #[error("the budget of {0} bytes is exceeded")]
    Exceeded(usize),
    /// The work panicked.
    #[error("a panic")]
    Panicked,
    /// The thread could not be started.
    #[error(transparent)]
    Thread(io::Error),
}

/// The budget of a thread while it is held.
struct Bounded(#[expect(dead_code, reason = "kept for the pointer in EXCEEDED")] Arc<AtomicBool>);

impl Bounded {
    fn new(bytes: usize, exceeded: Arc<AtomicBool>) -> Self {
        EXCEEDED.set(Arc::as_ptr(&exceeded));
        LEFT.set(bytes.min(UNBOUNDED - 1));
        Self(exceeded)
    }
}

impl Drop for Bounded {
    fn drop(&mut self) {
        LEFT.set(UNBOUNDED);
        EXCEEDED.set(ptr::null());
    }
}

/// Runs `work` in a thread called `name` with `stack` bytes of stack (of which the system gives out what is used) and at most `bytes` of other
/// memory. Work that asks for more never ends: its thread stays, with at most `bytes`, until the process ends.
///
/// # Errors
/// Those of [`Error`].
pub fn within<T: Send + 'static>(
    name: &str,
    stack: usize,
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let exceeded = Arc::new(AtomicBool::new(false));
    let ((send, receive), flag) = (channel(), Arc::clone(&exceeded));
    let bounded = move || {
        let bounded = Bounded::new(bytes, flag);
        let done = work();
        drop(bounded);
        // The receiver waits until this is sent.
        let _ = send.send(done);
    };
    thread::Builder::new().name(name.into()).stack_size(stack).spawn(bounded).map_err(Error::Thread)?;
    loop {
        match receive.recv_timeout(Duration::from_millis(5)) {
            Ok(done) => return Ok(done),
            Err(RecvTimeoutError::Disconnected) => return Err(Error::Panicked),
            Err(RecvTimeoutError::Timeout) if exceeded.load(Ordering::Acquire) => {
                return Err(Error::Exceeded(bytes));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static ALLOCATOR: Counted = Counted;

    const MIB: usize = 1 << 20;

    #[test]
    fn work_has_its_budget_and_no_more() {
        let taken = |bytes: usize| within("test", MIB, 4 * MIB, move || vec![1u8; bytes].len());
        assert_eq!(taken(3 * MIB).expect("within the budget"), 3 * MIB);
        assert!(matches!(taken(5 * MIB), Err(Error::Exceeded(b)) if b == 4 * MIB));
        // Zeroed, and grown.
        let zeroed = within("test", MIB, 4 * MIB, || vec![0u8; 5 * MIB].len());
        assert!(matches!(zeroed, Err(Error::Exceeded(_))));
        let grown = within("test", MIB, 4 * MIB, || {
            let mut all = vec![1u8; 3 * MIB];
            all.resize(5 * MIB, 1);
            all.len()
        });
        assert!(matches!(grown, Err(Error::Exceeded(_))));
    }

    #[test]
    fn what_is_freed_may_be_taken_again() {
        let all = within("test", MIB, 4 * MIB, || {
            let mut all = vec![];
            for i in 0..100 {
                all = vec![i as u8; 3 * MIB / 2];
                all.shrink_to(MIB);
            }
            all.len()
        });
        assert_eq!(all.expect("within the budget"), 3 * MIB / 2);
    }

    #[test]
    fn a_panic_is_told_and_other_threads_have_no_budget() {
        let panicked = within("test", MIB, MIB, || assert_eq!(std::hint::black_box(1), 2));
        assert!(matches!(panicked, Err(Error::Panicked)));
        assert_eq!(LEFT.get(), UNBOUNDED);
        assert_eq!(vec![1u8; 16 * MIB].len(), 16 * MIB);
    }
}
