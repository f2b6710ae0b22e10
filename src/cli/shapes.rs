//! Shapes of well-known models, as the lines of their config.json that decide time and memory.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::PossibleValuesParser;
use tch::{Device, Kind};

use crate::error::Error;
use crate::models::Config;
use crate::nn::LoadOptions;

/// (name, config.json)
const SHAPES: [(&str, &str); 8] = [
    ("llama-3.2-1b", include_str!("shapes/llama-3.2-1b.json")),
    ("llama-3.2-3b", include_str!("shapes/llama-3.2-3b.json")),
    ("llama-3.1-8b", include_str!("shapes/llama-3.1-8b.json")),
    ("llama-3.1-70b", include_str!("shapes/llama-3.1-70b.json")),
    ("mistral-7b", include_str!("shapes/mistral-7b.json")),
    ("qwen2.5-1.5b", include_str!("shapes/qwen2.5-1.5b.json")),
    ("qwen3-8b", include_str!("shapes/qwen3-8b.json")),
    ("phi-4", include_str!("shapes/phi-4.json")),
];

fn names() -> Vec<&'static str> {
    SHAPES.iter().map(|(name, _)| *name).collect()
}

/// The shape's description; none for an unknown name.
fn config(name: &str) -> Option<Result<Config>> {
    SHAPES.iter().find(|(known, _)| *known == name).map(|(_, json)| Config::from_json(json))
}

/// The rows of random tokens that a benchmark runs on.
#[derive(Debug, Args)]
pub struct RowsArgs {
    /// Rows of a forward pass
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub batch: usize,
    /// Tokens of a row
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub seq: usize,
}

/// How the weights of a shape lie in memory.
#[derive(Debug, Args)]
pub struct WeightsArgs {
    #[arg(long, help = "Quantise the weights of the layers to NF4")]
    pub load_in_4bit: bool,
    #[arg(long, help = "Leave the embedding in the host's memory")]
    pub offload_embedding: bool,
    #[arg(long, help = "Quantise the head to NF4")]
    pub nf4_head: bool,
}

impl WeightsArgs {
    pub fn options(&self, kind: Kind, device: Device) -> LoadOptions {
        LoadOptions {
            load_in_4bit: self.load_in_4bit,
            offload_embedding: self.offload_embedding,
            nf4_head: self.nf4_head,
            ..LoadOptions::new(kind, device)
        }
    }
}

/// The shape of a model that need not be there.
#[derive(Debug, Args)]
pub struct ShapeArgs {
    /// Shape of a known model
    #[arg(long, value_parser = PossibleValuesParser::new(names()), required_unless_present = "model")]
    pub shape: Option<String>,
    /// Folder whose config.json gives the shape instead; its weights are not read
    #[arg(long, value_name = "DIR", conflicts_with = "shape")]
    pub model: Option<PathBuf>,
}

impl ShapeArgs {
    /// Its name and description.
    pub fn config(&self) -> Result<(String, Config)> {
        match (&self.shape, &self.model) {
            (Some(name), _) => {
                let config = config(name).context("--shape")?;
                Ok((name.clone(), config?))
            }
            (None, Some(dir)) => Ok((dir.display().to_string(), Config::from_dir(dir).context("--model")?)),
            (None, None) => bail!(Error::Usage("--shape or --model: give one of them".into())),
        }
    }
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
