//! Hyper-parameters as llama.cpp's metadata keys, and a config.json of them.

use anyhow::{Result, bail};
use serde_json::{Map, Value as Json, json};

use super::super::config::Config;
use crate::error::Error;
use crate::io::gguf::{Gguf, Value};
use crate::nn::RopeScaling;
use crate::ops::Activation;

fn unsupported(what: String, supported: &str) -> anyhow::Error {
    Error::Unsupported { what: format!("{what} in a GGUF file"), supported: supported.to_string() }.into()
}

/// llama.cpp's name of the architecture.
pub fn metadata_architecture(config: &Config) -> &'static str {
    match config.model_type.as_str() {
        "qwen2" => "qwen2",
        "qwen3" => "qwen3",
        "phi3" => "phi3",
        "gemma2" => "gemma2",
        "gemma3_text" | "gemma3" => "gemma3",
        _ => "llama",
    }
}

/// The scale of attention scores that llama.cpp takes for an architecture of this many layers.
fn attention_scale(architecture: &str, layers: usize, hidden: i64, heads: i64, head_dim: i64) -> f64 {
    let of_27b = architecture == "gemma2" && layers == 46 || architecture == "gemma3" && layers == 62;
    let size = if of_27b { hidden / heads } else { head_dim };
    (size as f64).powf(-0.5)
}

/// Layers with a sliding window where a file does not say: Gemma's.
fn usual_sliding(architecture: &str, layer: usize) -> bool {
    match architecture {
        "gemma2" => layer.is_multiple_of(2),
        "gemma3" => !(layer + 1).is_multiple_of(6),
        _ => true,
    }
}

/// Refuses what llama.cpp would compute otherwise.
fn check(config: &Config, architecture: &str) -> Result<()> {
    let spec = &config.layers[0].attention;
    let (layers, heads, head_dim) = (config.layers.len(), spec.num_heads, spec.head_dim);
    let gemma = architecture.starts_with("gemma");
    let activation = if gemma { Activation::GeluTanh } else { Activation::Silu };
    if config.hidden_act != activation {
        return Err(unsupported(
            format!("hidden_act {:?} of {architecture}", config.hidden_act),
            "llama.cpp's own",
        ));
    }
    let expected = attention_scale(architecture, layers, config.hidden_size, heads, head_dim);
    if (spec.scale / expected - 1.0).abs() > 1e-6 {
        let what = format!("query_pre_attn_scalar {}", spec.scale.powi(-2));
        return Err(unsupported(what, &format!("{} for this architecture", expected.powi(-2))));
    }
    if matches!(architecture, "qwen2" | "phi3") && heads * head_dim != config.hidden_size {
        let what = format!("{architecture} whose heads have {} dims in all", heads * head_dim);
        return Err(unsupported(what, &format!("{}, the hidden_size", config.hidden_size)));
    }
    if config.o_bias && architecture != "llama" {
        return Err(unsupported(format!("attention_bias of {architecture}"), "false"));
    }
    if architecture == "gemma2" && (spec.softcap.is_none() || config.final_logit_softcapping.is_none()) {
        return Err(unsupported("gemma2 without softcaps".to_string(), "both softcaps"));
    }
    if architecture == "gemma3" && spec.softcap.is_some() {
        return Err(unsupported("attn_logit_softcapping of gemma3".to_string(), "null"));
    }
    if architecture != "phi3" && config.ropes[0].dim != head_dim {
        return Err(unsupported(format!("partial_rotary_factor of {architecture}"), "1"));
    }
    let local_scaled = config.ropes.get(1).is_some_and(|rope| rope.scaling != RopeScaling::Default);
    if local_scaled {
        return Err(unsupported("a scaled rope of sliding layers".to_string(), "a rope_theta alone"));
    }
    Ok(())
}

/// The keys of `config`, without those of the tokenizer.
///
/// # Errors
/// A feature that llama.cpp's architecture does not have, by name.
pub fn metadata(config: &Config) -> Result<Vec<(String, Value)>> {
    let architecture = metadata_architecture(config);
    check(config, architecture)?;
    let spec = &config.layers[0].attention;
    let mut pairs = vec![("general.architecture".to_string(), Value::String(architecture.to_string()))];
    let mut add = |key: &str, value: Value| pairs.push((format!("{architecture}.{key}"), value));
    let int = |value: i64| Value::U32(value as u32);
    add("block_count", int(config.layers.len() as i64));
    add("context_length", int(config.max_position_embeddings));
    add("embedding_length", int(config.hidden_size));
    add("feed_forward_length", int(config.intermediate_size));
    add("vocab_size", int(config.vocab_size));
    add("attention.head_count", int(spec.num_heads));
    add("attention.head_count_kv", int(spec.num_kv_heads));
    add("attention.key_length", int(spec.head_dim));
    add("attention.value_length", int(spec.head_dim));
    add("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32));
    if architecture == "gemma2"
        && let Some(cap) = spec.softcap
    {
        add("attn_logit_softcapping", Value::F32(cap as f32));
    }
    if let Some(cap) = config.final_logit_softcapping {
        add("final_logit_softcapping", Value::F32(cap as f32));
    }
    let sliding: Vec<bool> =
        config.layers.iter().map(|layer| layer.attention.sliding_window.is_some()).collect();
    let window = config.layers.iter().find_map(|layer| layer.attention.sliding_window);
    if let Some(window) = window {
        add("attention.sliding_window", int(window));
        if sliding.iter().enumerate().any(|(layer, &is)| is != usual_sliding(architecture, layer)) {
            add("attention.sliding_window_pattern", Value::bools(sliding));
        }
    } else if architecture == "phi3" {
        add("attention.sliding_window", int(0));
    }
    rope_metadata(config, &mut add)?;
    Ok(pairs)
}

fn rope_metadata(config: &Config, add: &mut impl FnMut(&str, Value)) -> Result<()> {
    let rope = &config.ropes[0];
    let (float, int) = (|value: f64| Value::F32(value as f32), |value: f64| Value::U32(value as u32));
    add("rope.dimension_count", int(rope.dim as f64));
    add("rope.freq_base", float(rope.theta));
    if let Some(local) = config.ropes.get(1) {
        add("rope.freq_base_swa", float(local.theta));
    }
    let phi3 = config.model_type == "phi3";
    match &rope.scaling {
        RopeScaling::Default | RopeScaling::Llama3 { .. } => {
            if phi3 {
                add("rope.scaling.original_context_length", int(config.max_position_embeddings as f64));
            }
        }
        RopeScaling::Linear { factor } => {
            add("rope.scaling.type", Value::String("linear".to_string()));
            add("rope.scaling.factor", float(*factor));
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, original_max_position_embeddings } => {
            let usual = if *factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
            if !truncate || (rope.attention_factor / usual - 1.0).abs() > 1e-6 {
                return Err(unsupported(
                    "yarn with truncate or attention_factor".to_string(),
                    "yarn's defaults",
                ));
            }
            add("rope.scaling.type", Value::String("yarn".to_string()));
            add("rope.scaling.factor", float(*factor));
            add("rope.scaling.original_context_length", int(*original_max_position_embeddings));
            add("rope.scaling.yarn_beta_fast", float(*beta_fast));
            add("rope.scaling.yarn_beta_slow", float(*beta_slow));
        }
        RopeScaling::LongRope { original_max_position_embeddings, .. } if phi3 => {
            add("rope.scaling.type", Value::String("longrope".to_string()));
            add("rope.scaling.original_context_length", int(*original_max_position_embeddings));
            add("rope.scaling.attn_factor", float(rope.attention_factor));
        }
        RopeScaling::LongRope { short_factor, long_factor, .. }
            if short_factor == long_factor && rope.attention_factor == 1.0 => {}
        RopeScaling::LongRope { .. } => return Err(unsupported("longrope".to_string(), "it in phi3 models")),
        RopeScaling::Dynamic { .. } => {
            return Err(unsupported("dynamic rope scaling".to_string(), "linear, llama3, yarn, longrope"));
        }
    }
    Ok(())
}

/// A config.json of a GGUF file's metadata.
///
/// # Errors
/// An architecture that ferrotune does not have; a key that is missing or of another type. Both name it and the file.
pub(super) fn config_json(gguf: &Gguf) -> Result<Json> {
    let architecture = gguf.value("general.architecture")?.as_str().unwrap_or_default().to_string();
    let file = gguf.path().display();
    let model_type = match architecture.as_str() {
        "llama" | "qwen2" | "qwen3" | "phi3" | "gemma2" => architecture.as_str(),
        "gemma3" => "gemma3_text",
        other => {
            let what = format!("{file}: architecture {other:?}");
            let supported = "llama, qwen2, qwen3, phi3, gemma2, gemma3".to_string();
            bail!(Error::Unsupported { what, supported });
        }
    };
    let value = |key: &str| gguf.metadata.get(&format!("{architecture}.{key}"));
    let float = |key: &str| value(key).and_then(Value::as_f64);
    let int = |key: &str| value(key).and_then(Value::as_i64);
    let need = |key: &str| -> Result<i64> {
        match int(key) {
            Some(value) => Ok(value),
            None => bail!("{file}: the key {architecture}.{key} is missing or no integer"),
        }
    };
    let (layers, hidden, heads) =
        (need("block_count")?, need("embedding_length")?, need("attention.head_count")?);
    let head_dim = match int("attention.key_length").or_else(|| int("rope.dimension_count")) {
        Some(size) => size,
        None if heads > 0 => hidden / heads,
        None => bail!("{file}: {architecture}.attention.head_count is {heads}"),
    };
    let Some(embedding) = gguf.tensor("token_embd.weight") else {
        bail!("{file}: no tensor named token_embd.weight");
    };
    let has = |name: &str| gguf.tensor(name).is_some();
    let token =
        |name: &str| gguf.metadata.get(&format!("tokenizer.ggml.{name}_token_id")).and_then(Value::as_i64);
    let ends: Vec<i64> = ["eos", "eot"].into_iter().filter_map(token).collect();
    let mut config = json!({
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length")?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int("attention.head_count_kv").unwrap_or(heads),
        "head_dim": head_dim,
        "max_position_embeddings": int("context_length").unwrap_or(2048),
        "rms_norm_eps": float("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": !has("output.weight"),
        "attention_bias": has("blk.0.attn_q.bias"),
        "mlp_bias": has("blk.0.ffn_up.bias"),
        "hidden_act": if architecture.starts_with("gemma") { "gelu_pytorch_tanh" } else { "silu" },
        "rope_theta": float("rope.freq_base").unwrap_or(10_000.0),
        "bos_token_id": token("bos"),
        "eos_token_id": ends,
    });
    if architecture.starts_with("gemma") {
        let scale = attention_scale(&architecture, layers.max(0) as usize, hidden, heads.max(1), head_dim);
        config["query_pre_attn_scalar"] = json!((scale.powi(-2)).round());
        config["attn_logit_softcapping"] = json!(float("attn_logit_softcapping"));
        config["final_logit_softcapping"] = json!(float("final_logit_softcapping").filter(|cap| *cap > 0.0));
        config["rope_local_base_freq"] = json!(float("rope.freq_base_swa"));
    }
    if model_type == "phi3" {
        let dims = int("rope.dimension_count").unwrap_or(head_dim) as f64;
        // A half more: what is rounded down from the product must be these dims.
        config["partial_rotary_factor"] = json!((dims + 0.5) / head_dim as f64);
    }
    sliding(gguf, &architecture, layers, &mut config);
    config["rope_scaling"] = rope_scaling(gguf, &architecture, &config)?;
    Ok(config)
}

fn sliding(gguf: &Gguf, architecture: &str, layers: i64, config: &mut Json) {
    let value = |key: &str| gguf.metadata.get(&format!("{architecture}.attention.{key}"));
    let window = value("sliding_window").and_then(Value::as_i64).filter(|window| *window > 0);
    config["sliding_window"] = json!(window);
    let Some(_) = window else { return };
    let pattern = value("sliding_window_pattern");
    let is_sliding = |layer: usize| match (pattern.and_then(Value::as_array), pattern.and_then(Value::as_i64))
    {
        (Some(list), _) => {
            list.get(layer).and_then(|one| one.as_bool().or(one.as_i64().map(|n| n != 0))).unwrap_or(false)
        }
        (None, Some(every)) if every > 0 => !(layer + 1).is_multiple_of(every as usize),
        _ => usual_sliding(architecture, layer),
    };
    let kinds = (0..layers.max(0) as usize)
        .map(|layer| if is_sliding(layer) { "sliding_attention" } else { "full_attention" });
    config["layer_types"] = json!(kinds.collect::<Vec<_>>());
    config["use_sliding_window"] = json!(true);
    if architecture == "llama" {
        config["model_type"] = json!("mistral");
    }
}

fn rope_scaling(gguf: &Gguf, architecture: &str, config: &Json) -> Result<Json> {
    let value = |key: &str| gguf.metadata.get(&format!("{architecture}.rope.scaling.{key}"));
    let float = |key: &str| value(key).and_then(Value::as_f64);
    let factors = |name: &str| -> Result<Option<Vec<f32>>> {
        gguf.tensor(name).map(|_| gguf.dequantize(name)).transpose()
    };
    let original =
        float("original_context_length").map_or(config["max_position_embeddings"].clone(), Json::from);
    let long = |short: Vec<f32>, long: Vec<f32>, attention_factor: f64| {
        json!({"rope_type": "longrope", "short_factor": short, "long_factor": long,
               "attention_factor": attention_factor, "original_max_position_embeddings": original})
    };
    if let Some(divisors) = factors("rope_freqs.weight")? {
        return Ok(long(divisors.clone(), divisors, 1.0));
    }
    if let (Some(short), Some(far)) =
        (factors("rope_factors_short.weight")?, factors("rope_factors_long.weight")?)
    {
        return Ok(long(short, far, float("attn_factor").unwrap_or(1.0)));
    }
    let mut scaling = Map::new();
    match value("type").and_then(Value::as_str) {
        Some(kind @ ("linear" | "yarn")) => {
            scaling.insert("rope_type".to_string(), kind.into());
            scaling.insert("factor".to_string(), float("factor").unwrap_or(1.0).into());
            if kind == "yarn" {
                scaling.insert("original_max_position_embeddings".to_string(), original);
                scaling.insert("beta_fast".to_string(), float("yarn_beta_fast").unwrap_or(32.0).into());
                scaling.insert("beta_slow".to_string(), float("yarn_beta_slow").unwrap_or(1.0).into());
            }
            Ok(Json::Object(scaling))
        }
        None | Some("none") => Ok(Json::Null),
        Some(other) => {
            let what = format!("{}: rope scaling {other:?} without its factors", gguf.path().display());
            Err(Error::Unsupported { what, supported: "linear, yarn, rope_freqs, rope_factors".to_string() }
                .into())
        }
    }
}
