//! Ctrl-C and SIGTERM as a flag that long work looks at.
use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

use signal_hook::{consts, flag, iterator::Signals};

use crate::error::{Error, Result};

/// A flag that the first SIGINT or SIGTERM sets; the second one ends the process at once with exit code 130.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn requested() -> Result<Arc<AtomicBool>> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    if let Some(flag) = FLAG.get() {
        return Ok(Arc::clone(flag));
    }
    let set = Arc::new(AtomicBool::new(false));
    for signal in [consts::SIGINT, consts::SIGTERM] {
        // The order matters: the shutdown must see the flag as earlier signals left it.
        flag::register_conditional_shutdown(signal, 130, Arc::clone(&set))
            .and_then(|_| flag::register(signal, Arc::clone(&set)))
            .map_err(|e| Error::Runtime(format!("cannot handle signals: {e}")))?;
    }
    Ok(Arc::clone(FLAG.get_or_init(|| set)))
}

/// Flags for work in pieces: the first SIGINT or SIGTERM sets the first flag, which asks for the piece in hand to be brought to its end; the
/// second one sets the second, which stops it; the third one ends the process at once with exit code 130.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn graded() -> Result<(Arc<AtomicBool>, Arc<AtomicBool>)> {
    let failed = |e: std::io::Error| Error::Runtime(format!("cannot handle signals: {e}"));
    let (finish, leave) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    for signal in [consts::SIGINT, consts::SIGTERM] {
        flag::register_conditional_shutdown(signal, 130, Arc::clone(&leave)).map_err(failed)?;
    }
    let mut signals = Signals::new([consts::SIGINT, consts::SIGTERM]).map_err(failed)?;
    let flags = (Arc::clone(&finish), Arc::clone(&leave));
    let serve = move || {
        for _ in signals.forever() {
            if flags.0.swap(true, Ordering::SeqCst) {
                flags.1.store(true, Ordering::SeqCst);
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(serve).map_err(failed)?;
    Ok((finish, leave))
}

/// [`Error::Interrupted`] when the flag is set.
///
/// # Errors
/// [`Error::Interrupted`].
pub fn check(flag: &AtomicBool) -> Result<()> {
    if flag.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
}
