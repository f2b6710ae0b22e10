//! Llama 2, 3, 3.1, 3.2, and everything that took their shape (DeepSeek-R1 distillations, TinyLlama, ..).

use anyhow::Result;

use super::config::{self, Config, Json};

pub fn config(json: &Json) -> Result<Config> {
    let mut config = config::base(json)?;
    let bias = json.flag("attention_bias", false)?;
    config.qkv_bias = bias;
    config.o_bias = bias;
    config.mlp_bias = json.flag("mlp_bias", false)?;
    config.ropes = vec![config::rope(json, config.layers[0].attention.head_dim, 10_000.0)?];
    Ok(config)
}
