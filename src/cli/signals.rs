//! Ctrl-C and `kill`: the first asks the run to save and end, the second ends it at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// What a shell reports for a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// A flag that the first SIGINT or SIGTERM raises; the second one ends the process with code 130.
pub fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    raise_on_signal(&stop)?;
    Ok(stop)
}

/// The same for a flag that is there already. Until then a signal ends the process at once.
pub fn raise_on_signal(stop: &Arc<AtomicBool>) -> Result<()> {
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag down and raises it.
        flag::register_conditional_shutdown(signal, INTERRUPTED, stop.clone())
            .and_then(|_| flag::register(signal, stop.clone()))
            .context("installing the handler of Ctrl-C")?;
    }
    Ok(())
}
