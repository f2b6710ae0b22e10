//! Names of tensors, and what llama.cpp changes in their values.

use anyhow::Result;

use super::super::config::Config;
use super::super::decoder::projections;
use crate::nn::RopeScaling;

/// What happens to a tensor on its way into a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    None,
    /// Rows of this many heads go from halves to pairs: llama.cpp rotates dims 2i and 2i + 1 of a head together where a
    /// checkpoint rotates i and i + D/2.
    Pairs(i64),
    /// Gemma's norms are stored minus one, and llama.cpp multiplies by what it reads.
    PlusOne,
}

/// A tensor of a checkpoint under both names.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTensor {
    pub checkpoint: String,
    pub name: String,
    pub shape: Vec<i64>,
    pub change: Change,
}

impl Change {
    /// The row of the checkpoint that row `row` of the file is.
    pub fn source_row(self, row: usize, rows: usize) -> usize {
        match self {
            Change::Pairs(heads) => {
                let dim = rows / heads as usize;
                let (head, within) = (row / dim, row % dim);
                head * dim + within % 2 * (dim / 2) + within / 2
            }
            Change::None | Change::PlusOne => row,
        }
    }
}

/// Every tensor of a model, in the order of llama.cpp's files; `prefix` is what the checkpoint puts before `layers.0`, and
/// `head` the name of a head that is not the embedding.
pub fn gguf_tensors(config: &Config, prefix: &str, head: Option<&str>) -> Vec<GgufTensor> {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let norm_change = if config.norm_offset == 1.0 { Change::PlusOne } else { Change::None };
    let plain = |checkpoint: String, name: &str, shape: Vec<i64>, change: Change| GgufTensor {
        checkpoint,
        name: name.to_string(),
        shape,
        change,
    };
    let mut tensors = vec![plain(
        format!("{prefix}embed_tokens.weight"),
        "token_embd.weight",
        vec![vocab, hidden],
        Change::None,
    )];
    for index in 0..config.layers.len() {
        layer_tensors(config, index, prefix, norm_change, &mut tensors);
    }
    tensors.push(plain(format!("{prefix}norm.weight"), "output_norm.weight", vec![hidden], norm_change));
    if let Some(head) = head {
        tensors.push(plain(head.to_string(), "output.weight", vec![vocab, hidden], Change::None));
    }
    tensors
}

fn layer_tensors(
    config: &Config,
    index: usize,
    prefix: &str,
    norm_change: Change,
    tensors: &mut Vec<GgufTensor>,
) {
    let spec = &config.layers[index].attention;
    let pairs = matches!(config.model_type.as_str(), "llama" | "mistral");
    let norm = |from: &str, to: &str, size: i64| GgufTensor {
        checkpoint: format!("{prefix}layers.{index}.{from}.weight"),
        name: format!("blk.{index}.{to}.weight"),
        shape: vec![size],
        change: norm_change,
    };
    tensors.push(norm("input_layernorm", "attn_norm", config.hidden_size));
    if config.qk_norm {
        tensors.push(norm("self_attn.q_norm", "attn_q_norm", spec.head_dim));
        tensors.push(norm("self_attn.k_norm", "attn_k_norm", spec.head_dim));
    }
    if config.post_norms {
        tensors.push(norm("post_attention_layernorm", "post_attention_norm", config.hidden_size));
        tensors.push(norm("pre_feedforward_layernorm", "ffn_norm", config.hidden_size));
        tensors.push(norm("post_feedforward_layernorm", "post_ffw_norm", config.hidden_size));
    } else {
        tensors.push(norm("post_attention_layernorm", "ffn_norm", config.hidden_size));
    }
    let biases = [config.qkv_bias, config.o_bias, config.mlp_bias, config.mlp_bias];
    for ((parts, in_features), bias) in projections(config, index, prefix).into_iter().zip(biases) {
        for (module, rows) in parts {
            let last = module.rsplit('.').next().unwrap_or_default();
            let (name, change) = match last {
                "q_proj" if pairs => ("attn_q", Change::Pairs(spec.num_heads)),
                "k_proj" if pairs => ("attn_k", Change::Pairs(spec.num_kv_heads)),
                "q_proj" => ("attn_q", Change::None),
                "k_proj" => ("attn_k", Change::None),
                "v_proj" => ("attn_v", Change::None),
                "qkv_proj" => ("attn_qkv", Change::None),
                "o_proj" => ("attn_output", Change::None),
                "gate_proj" => ("ffn_gate", Change::None),
                // Phi-3's gate and up in one, in this order.
                "up_proj" | "gate_up_proj" => ("ffn_up", Change::None),
                _ => ("ffn_down", Change::None),
            };
            let mut add = |part: &str, shape: Vec<i64>| {
                tensors.push(GgufTensor {
                    checkpoint: format!("{module}.{part}"),
                    name: format!("blk.{index}.{name}.{part}"),
                    shape,
                    change,
                });
            };
            add("weight", vec![rows, in_features]);
            if bias {
                add("bias", vec![rows]);
            }
        }
    }
}

/// Divisors of the rope's frequencies that no metadata key can say, `[R/2]` in f32: `rope_freqs.weight` of Llama 3.1,
/// `rope_factors_long.weight` and `rope_factors_short.weight` of longrope.
pub fn rope_tensors(config: &Config) -> Result<Vec<(String, Vec<f32>)>> {
    let rope = &config.ropes[0];
    let f32s = |values: &[f64]| values.iter().map(|&value| value as f32).collect();
    Ok(match &rope.scaling {
        RopeScaling::Llama3 { .. } => vec![("rope_freqs.weight".to_string(), rope.divisors()?)],
        RopeScaling::LongRope { short_factor, long_factor, .. } if config.model_type == "phi3" => vec![
            ("rope_factors_long.weight".to_string(), f32s(long_factor)),
            ("rope_factors_short.weight".to_string(), f32s(short_factor)),
        ],
        // What was read from a `rope_freqs.weight`.
        RopeScaling::LongRope { short_factor, .. } => {
            vec![("rope_freqs.weight".to_string(), f32s(short_factor))]
        }
        _ => vec![],
    })
}
