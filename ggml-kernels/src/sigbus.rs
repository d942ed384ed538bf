//! A clear end when a mapped file is truncated while it is read.
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

static TEXT: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static LEN: AtomicUsize = AtomicUsize::new(0);

/// From now on SIGBUS writes `message` to standard error and ends the process with exit code 1, instead of a core dump. The system
/// sends it when a page of a mapped file is read that the file no longer has, and there is no way to go on.
pub fn report(message: &str) {
    // The handler may run at any time from now on: the text must never go away.
    let text: &'static mut [u8] = Box::leak(message.as_bytes().into());
    LEN.store(0, Ordering::SeqCst);
    TEXT.store(text.as_mut_ptr(), Ordering::SeqCst);
    LEN.store(text.len(), Ordering::SeqCst);
    // SAFETY: a zeroed sigaction is valid; `on_sigbus` has the signature that sa_handler asks for without SA_SIGINFO and calls
    // async-signal-safe functions only.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}

extern "C" fn on_sigbus(_: libc::c_int) {
    let (text, len) = (TEXT.load(Ordering::SeqCst), LEN.load(Ordering::SeqCst));
    // SAFETY: `text` points to `len` leaked bytes, or `len` is 0; write and _exit may be called in a signal handler.
    unsafe {
        if !text.is_null() {
            libc::write(2, text.cast(), len);
        }
        libc::_exit(1);
    }
}
