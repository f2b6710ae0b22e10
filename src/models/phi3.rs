//! Phi-3, Phi-3.5, Phi-4, Phi-4-mini: one fused qkv and one fused gate_up projection, longrope, partial rotation.
//! arXiv:2404.14219, arXiv:2412.08905

use anyhow::Result;

use super::config::{self, Config, Json};

pub fn config(json: &Json) -> Result<Config> {
    let mut config = config::base(json)?;
    config.fused_projections = true;
    config.rms_norm_eps = json.number("rms_norm_eps")?.unwrap_or(1e-5);
    config.ropes = vec![config::rope(json, config.layers[0].attention.head_dim, 10_000.0)?];
    let window = json.int("sliding_window")?;
    for layer in &mut config.layers {
        layer.attention.sliding_window = window;
    }
    Ok(config)
}
