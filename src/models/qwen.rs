//! Qwen2 and 2.5 (biases on q, k, v; arXiv:2407.10671) and Qwen3 (norms on query and key heads; arXiv:2505.09388).

use anyhow::Result;

use super::config::{self, Config, Json};

pub fn qwen2(json: &Json) -> Result<Config> {
    let mut config = common(json)?;
    config.qkv_bias = true;
    Ok(config)
}

pub fn qwen3(json: &Json) -> Result<Config> {
    let mut config = common(json)?;
    config.qk_norm = true;
    let bias = json.flag("attention_bias", false)?;
    config.qkv_bias = bias;
    config.o_bias = bias;
    Ok(config)
}

fn common(json: &Json) -> Result<Config> {
    let mut config = config::base(json)?;
    config.ropes = vec![config::rope(json, config.layers[0].attention.head_dim, 10_000.0)?];
    let window = if json.flag("use_sliding_window", false)? { json.int("sliding_window")? } else { None };
    let full = json.int("max_window_layers")?.unwrap_or(28);
    let sliding =
        config::sliding_layers(json, config.layers.len(), |i| window.is_some() && i as i64 >= full)?;
    for (layer, sliding) in config.layers.iter_mut().zip(sliding) {
        layer.attention.sliding_window = window.filter(|_| sliding);
    }
    Ok(config)
}
