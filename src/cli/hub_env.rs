//! The environment variables of Hugging Face's own tools, read with the same precedence.

use std::env::var;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::io::hub::HubOptions;

/// The hub as the environment describes it: `HF_HUB_CACHE`, `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` (or the file that
/// `hf auth login` wrote) and `HF_HUB_OFFLINE`. `revision` is a branch, a tag or a commit.
pub fn hub_options(revision: &str) -> Result<HubOptions> {
    let home = match set("HF_HOME") {
        Some(home) => PathBuf::from(home),
        None => {
            let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")));
            cache.context("no place for downloads: set HF_HOME")?.join("huggingface")
        }
    };
    let cache_dir = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE"));
    let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
    let stored = || {
        let path = set("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let text = fs::read_to_string(path).ok().filter(|_| !is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN"))?;
        Some(text.trim().to_owned()).filter(|token| !token.is_empty())
    };
    Ok(HubOptions {
        cache_dir: cache_dir.map_or_else(|| home.join("hub"), PathBuf::from),
        endpoint: endpoint.trim_end_matches('/').to_owned(),
        token: set("HF_TOKEN").or_else(|| set("HUGGING_FACE_HUB_TOKEN")).or_else(stored),
        offline: is_true("HF_HUB_OFFLINE") || is_true("TRANSFORMERS_OFFLINE"),
        revision: revision.to_owned(),
    })
}

/// The variable, if it is set to something.
fn set(name: &str) -> Option<String> {
    Some(var(name).ok()?.trim().to_owned()).filter(|value| !value.is_empty())
}

fn is_true(name: &str) -> bool {
    set(name).is_some_and(|value| matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
}
