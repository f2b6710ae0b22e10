//! Tokenizers, chat templates, records, label masks and batches.

mod batches;
mod byte_bpe;
mod cache;
mod cli;
mod documents;
mod fuzz;
mod golden;
mod images;
mod inspect;
mod lint;
mod named_templates;
mod prepare;
mod records;
mod select;
mod stream;
mod templates;
mod tokenizers;
mod unsloth;
mod write;

use std::fs;
use std::path::{Path, PathBuf};

use ferrotune::data::{ChatTemplate, Tokenizer};
use tempfile::TempDir;

/// A file of `folder` by its whole name.
fn write(folder: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> String {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The golden byte-level tokenizer with one of the golden templates, or with its own.
fn tokenizer(template: &str) -> Tokenizer {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data");
    let mut tokenizer = Tokenizer::from_dir(&golden.join("bpe")).unwrap();
    let cases: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(golden.join("cases.json")).unwrap()).unwrap();
    if let Some(source) = cases["templates"][template].as_str() {
        tokenizer.set_chat_template(ChatTemplate::new(source, template).unwrap());
    }
    tokenizer
}

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
