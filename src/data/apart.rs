use std::sync::Once;
use std::{panic, thread};

use anyhow::{Context, Result};

/// What `work` gives on a thread with much stack; `None` if it panics, as libraries do on broken files. Such a panic
/// prints nothing: what there is to say is in the error.
pub(super) fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> Result<Option<T>> {
    const NAME: &str = "parser";
    const STACK: usize = 256 << 20; // Address space: only what is used becomes memory.
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if thread::current().name() != Some(NAME) {
                print(panic);
            }
        }));
    });
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(NAME.to_owned()).stack_size(STACK);
        let thread = thread.spawn_scoped(scope, work).context("starting a thread")?;
        Ok(thread.join().ok())
    })
}
