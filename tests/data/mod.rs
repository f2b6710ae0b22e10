//! Tokenizers, chat templates, records, label masks and batches.

mod batches;
mod golden;
mod named_templates;
mod prepare;
mod records;
mod templates;
mod tokenizers;

use std::path::PathBuf;

/// The shared test data, or a printed line and `None` where it is absent.
fn test_data(what: &str) -> Option<PathBuf> {
    let dir = std::env::var_os("FERROTUNE_TEST_DATA")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/data"), PathBuf::from);
    let path = dir.join(what);
    if !path.exists() {
        println!("skipped: {} is absent (set FERROTUNE_TEST_DATA)", path.display());
        return None;
    }
    Some(dir)
}
