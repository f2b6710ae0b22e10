//! Mistral: Llama with a sliding window in every layer and a head_dim of its own. arXiv:2310.06825

use anyhow::Result;

use super::config::{self, Config, Json};

pub fn config(json: &Json) -> Result<Config> {
    let mut config = config::base(json)?;
    config.ropes = vec![config::rope(json, config.layers[0].attention.head_dim, 10_000.0)?];
    let window = json.number_or("sliding_window", 4096.0)?.map(|window| window as i64);
    let sliding = config::sliding_layers(json, config.layers.len(), |_| window.is_some())?;
    for (layer, sliding) in config.layers.iter_mut().zip(sliding) {
        layer.attention.sliding_window = window.filter(|_| sliding);
    }
    Ok(config)
}
