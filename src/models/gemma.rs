//! Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786): norm weights stored minus one, norms on both sides of each
//! block, scaled embeddings, GeGLU, layers that alternate between a sliding window and full attention. Gemma 2 caps scores
//! and logits; Gemma 3 normalises heads and gives its local layers a rope of their own.

use anyhow::{Result, anyhow};

use super::config::{self, Config, Json};

pub fn gemma2(json: &Json) -> Result<Config> {
    let mut config = common(json)?;
    config.ropes = vec![config::rope(json, config.layers[0].attention.head_dim, 10_000.0)?];
    let sliding = config::sliding_layers(json, config.layers.len(), |i| i % 2 == 0)?;
    let window = json.int("sliding_window")?.or(Some(4096));
    config.final_logit_softcapping = json.number_or("final_logit_softcapping", 30.0)?;
    let softcap = json.number_or("attn_logit_softcapping", 50.0)?;
    for (layer, sliding) in config.layers.iter_mut().zip(sliding) {
        layer.attention.sliding_window = window.filter(|_| sliding);
        layer.attention.softcap = softcap;
    }
    Ok(config)
}

pub fn gemma3(json: &Json) -> Result<Config> {
    let mut config = common(json)?;
    config.qk_norm = true;
    let head_dim = config.layers[0].attention.head_dim;
    // transformers 5 nests the parameters by layer type; 4 has the local base apart and scales the global rope alone.
    let nested = json.object("rope_parameters")?;
    let of = |kind: &str| nested.as_ref().and_then(|p| p.object(kind).transpose()).transpose();
    let (global, local) = (of("full_attention")?, of("sliding_attention")?);
    let global =
        global.or(nested.filter(|p| !p.present("sliding_attention"))).or(json.object("rope_scaling")?);
    let theta = json.number("rope_theta")?.unwrap_or(1_000_000.0);
    let local_theta = json.number("rope_local_base_freq")?.unwrap_or(10_000.0);
    config.ropes = vec![
        config::rope_from(json, global.as_ref(), head_dim, theta)?,
        config::rope_from(json, local.as_ref(), head_dim, local_theta)?,
    ];
    let pattern = json.int("sliding_window_pattern")?.unwrap_or(6).max(1) as usize;
    let sliding = config::sliding_layers(json, config.layers.len(), |i| !(i + 1).is_multiple_of(pattern))?;
    let window = json.int("sliding_window")?.or(Some(4096));
    for (layer, sliding) in config.layers.iter_mut().zip(sliding) {
        layer.attention.sliding_window = window.filter(|_| sliding);
        layer.rope = usize::from(sliding);
    }
    Ok(config)
}

/// The text part of a multimodal Gemma 3.
pub fn gemma3_multimodal(json: &Json) -> Result<Config> {
    let mut text = json.object("text_config")?.ok_or_else(|| anyhow!("the key text_config is missing"))?;
    // Files on the hub leave out what equals transformers' defaults.
    let defaults = [
        ("vocab_size", 262_208),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 256),
        ("max_position_embeddings", 131_072),
    ];
    for (key, value) in defaults {
        if !text.present(key) {
            text.0.insert(key.into(), value.into());
        }
    }
    for key in ["eos_token_id", "bos_token_id"] {
        if let (false, Some(value)) = (text.present(key), json.value(key)) {
            text.0.insert(key.into(), value.clone());
        }
    }
    let mut config = gemma3(&text)?;
    config.ignores_vision = true;
    Ok(config)
}

fn common(json: &Json) -> Result<Config> {
    let mut config = config::base(json)?;
    config.norm_offset = 1.0;
    config.post_norms = true;
    if !json.present("hidden_act") && !json.present("hidden_activation") {
        config.hidden_act = crate::ops::Activation::GeluTanh;
    }
    config.tie_word_embeddings = json.flag("tie_word_embeddings", true)?;
    config.embedding_scale = Some((config.hidden_size as f64).sqrt());
    config.final_logit_softcapping = json.number("final_logit_softcapping")?;
    let bias = json.flag("attention_bias", false)?;
    config.qkv_bias = bias;
    config.o_bias = bias;
    let scalar = json.number("query_pre_attn_scalar")?.unwrap_or(256.0);
    let softcap = json.number("attn_logit_softcapping")?;
    for layer in &mut config.layers {
        layer.attention.scale = scalar.powf(-0.5);
        layer.attention.softcap = softcap;
    }
    Ok(config)
}
