//! Shapes of well-known models, as the lines of their config.json that decide time and memory.

use anyhow::Result;

use crate::models::Config;

/// (name, config.json)
const SHAPES: [(&str, &str); 6] = [
    ("llama-3.2-1b", include_str!("shapes/llama-3.2-1b.json")),
    ("llama-3.2-3b", include_str!("shapes/llama-3.2-3b.json")),
    ("llama-3.1-8b", include_str!("shapes/llama-3.1-8b.json")),
    ("mistral-7b", include_str!("shapes/mistral-7b.json")),
    ("qwen3-8b", include_str!("shapes/qwen3-8b.json")),
    ("phi-4", include_str!("shapes/phi-4.json")),
];

pub(super) fn names() -> Vec<&'static str> {
    SHAPES.iter().map(|(name, _)| *name).collect()
}

/// The shape's description; none for an unknown name.
pub(super) fn config(name: &str) -> Option<Result<Config>> {
    SHAPES.iter().find(|(known, _)| *known == name).map(|(_, json)| Config::from_json(json))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_a_config() {
        for name in names() {
            let config = config(name).unwrap().unwrap_or_else(|error| panic!("{name}: {error:#}"));
            assert!(config.layers.len() >= 16, "{name}");
        }
        assert!(config("gpt-2").is_none());
    }
}
