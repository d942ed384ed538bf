//! Ctrl-C stops what runs; SIGTERM and SIGHUP end the conversation in order.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::editor::Event;
use crate::error::{Error, Result};

/// Sets `stop` at SIGINT, SIGTERM and SIGHUP, and sends [`Event::Terminate`] at the latter two.
///
/// # Errors
/// [`Error::Runtime`] when the handlers cannot be installed.
pub fn listen(stop: Arc<AtomicBool>, events: Sender<Event>) -> Result<()> {
    let failed = |e: std::io::Error| Error::Runtime(format!("cannot handle signals: {e}"));
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
    let thread = std::thread::Builder::new().name("signals".into());
    let serve = move || {
        for signal in signals.forever() {
            stop.store(true, Ordering::Relaxed);
            if signal != SIGINT && events.send(Event::Terminate).is_err() {
                return;
            }
        }
    };
    thread.spawn(serve).map(drop).map_err(failed)
}
