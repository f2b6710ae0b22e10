//! What one decoder needs to know of a `config.json`, and the parts of it that all architectures write alike.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};

use super::ARCHITECTURES;
use crate::error::Error;
use crate::nn::{Rope, RopeScaling};
use crate::ops::{Activation, AttentionSpec};

/// The description of a decoder. Field names follow config.json.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub model_type: String,
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub max_position_embeddings: i64,
    pub rms_norm_eps: f64,
    /// 1 where checkpoints hold norm weights minus one (Gemma), else 0.
    pub norm_offset: f64,
    pub hidden_act: Activation,
    pub tie_word_embeddings: bool,
    /// Biases of q, k, v; of o; of gate, up, down.
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// RMSNorm on each query and key head.
    pub qk_norm: bool,
    /// Norms of the attention and MLP outputs before they are added (Gemma).
    pub post_norms: bool,
    /// One `qkv_proj` and one `gate_up_proj` (Phi-3).
    pub fused_projections: bool,
    /// Factor of the embeddings (Gemma: sqrt(hidden_size)).
    pub embedding_scale: Option<f64>,
    pub final_logit_softcapping: Option<f64>,
    pub ropes: Vec<Rope>,
    pub layers: Vec<LayerConfig>,
    pub initializer_range: f64,
    pub bos_token_id: Option<i64>,
    pub eos_token_ids: Vec<i64>,
    /// The checkpoint also holds a vision tower, which is not loaded.
    pub ignores_vision: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct LayerConfig {
    pub attention: AttentionSpec,
    /// Index into [`Config::ropes`].
    pub rope: usize,
}

impl Config {
    /// Reads `config.json` of a model folder.
    pub fn from_dir(dir: &Path) -> Result<Config> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Config::from_json(&text).with_context(|| format!("in {}", path.display()))
    }

    /// Parses the text of a config.json written by transformers 4 or 5.
    pub fn from_json(text: &str) -> Result<Config> {
        let json = Json(serde_json::from_str(text).context("not a JSON object")?);
        let model_type = json.text("model_type")?.ok_or_else(|| anyhow!("the key model_type is missing"))?;
        let architecture = ARCHITECTURES.iter().find(|a| a.model_type == model_type).ok_or_else(|| {
            let supported = ARCHITECTURES.iter().map(|a| a.model_type).collect::<Vec<_>>().join(", ");
            Error::Unsupported { what: format!("model_type {model_type:?}"), supported }
        })?;
        if let Some(quantization) = json.object("quantization_config")? {
            // Which weights are quantised, and how, their own quant_state says.
            let method = quantization.text("quant_method")?.unwrap_or_default();
            if method != "bitsandbytes" || quantization.flag("load_in_8bit", false)? {
                let what = format!("quantization_config with quant_method {method:?}");
                let supported = "bitsandbytes in 4 bits".to_string();
                return Err(Error::Unsupported { what, supported }.into());
            }
        }
        let config = (architecture.config)(&json)?;
        config.check()?;
        Ok(config)
    }

    /// Gemma's: its residual stream passes f16's largest number, 65504, the embedding factor and trained post-norms make it so.
    pub fn overflows_f16(&self) -> bool {
        self.model_type.starts_with("gemma")
    }

    pub fn num_hidden_layers(&self) -> usize {
        self.layers.len()
    }

    fn check(&self) -> Result<()> {
        let spec = &self.layers[0].attention;
        for (key, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", spec.num_heads),
            ("num_key_value_heads", spec.num_kv_heads),
            ("head_dim", spec.head_dim),
        ] {
            // The upper limit keeps every product of two of them within i64.
            if !(1..=i64::from(i32::MAX)).contains(&value) {
                bail!("{key} is {value}, expected a positive number of at most {}", i32::MAX);
            }
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            bail!("rms_norm_eps is {}, expected a small positive number", self.rms_norm_eps);
        }
        if spec.num_heads % spec.num_kv_heads != 0 {
            bail!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {}",
                spec.num_heads,
                spec.num_kv_heads
            );
        }
        if spec.head_dim % 2 != 0 {
            bail!("head_dim is {}, expected an even number", spec.head_dim);
        }
        Ok(())
    }
}

/// A JSON object with typed look-ups whose errors name the key. A null counts as absent.
pub struct Json(pub Map<String, Value>);

impl Json {
    pub fn present(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    pub fn value(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        let parse =
            |value: &Value| value.as_f64().ok_or_else(|| anyhow!("{key} is {value}, expected a number"));
        self.value(key).map(parse).transpose()
    }

    pub fn int(&self, key: &str) -> Result<Option<i64>> {
        let parse =
            |value: &Value| value.as_i64().ok_or_else(|| anyhow!("{key} is {value}, expected an integer"));
        self.value(key).map(parse).transpose()
    }

    /// A number whose absence means `default` and whose null means none.
    pub fn number_or(&self, key: &str, default: f64) -> Result<Option<f64>> {
        if self.0.contains_key(key) { self.number(key) } else { Ok(Some(default)) }
    }

    pub fn required(&self, key: &str) -> Result<i64> {
        self.int(key)?.ok_or_else(|| anyhow!("the key {key} is missing"))
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let parse = |value: &Value| {
            value.as_bool().ok_or_else(|| anyhow!("{key} is {value}, expected true or false"))
        };
        Ok(self.value(key).map(parse).transpose()?.unwrap_or(default))
    }

    pub fn text(&self, key: &str) -> Result<Option<String>> {
        let parse = |value: &Value| {
            value.as_str().map(str::to_string).ok_or_else(|| anyhow!("{key} is {value}, expected a string"))
        };
        self.value(key).map(parse).transpose()
    }

    pub fn object(&self, key: &str) -> Result<Option<Json>> {
        let parse = |value: &Value| {
            value
                .as_object()
                .cloned()
                .map(Json)
                .ok_or_else(|| anyhow!("{key} is {value}, expected an object"))
        };
        self.value(key).map(parse).transpose()
    }

    /// One integer or a list of them.
    pub fn ints(&self, key: &str) -> Result<Vec<i64>> {
        match self.value(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| item.as_i64().ok_or_else(|| anyhow!("{key} holds {item}, expected integers")))
                .collect(),
            Some(_) => Ok(self.int(key)?.into_iter().collect()),
        }
    }

    fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let items =
            self.value(key).and_then(Value::as_array).ok_or_else(|| anyhow!("{key} is not a list"))?;
        items
            .iter()
            .map(|item| item.as_f64().ok_or_else(|| anyhow!("{key} holds {item}, expected numbers")))
            .collect()
    }
}

/// Sizes, biases off, one default rope for all layers, full attention: what an architecture starts from and changes.
pub fn base(json: &Json) -> Result<Config> {
    let hidden_size = json.required("hidden_size")?;
    let num_heads = json.required("num_attention_heads")?;
    if num_heads <= 0 {
        bail!("num_attention_heads is {num_heads}, expected a positive number");
    }
    let head_dim = json.int("head_dim")?.unwrap_or(hidden_size / num_heads);
    let attention = AttentionSpec {
        num_heads,
        num_kv_heads: json.int("num_key_value_heads")?.unwrap_or(num_heads),
        head_dim,
        scale: (head_dim as f64).powf(-0.5),
        softcap: None,
        sliding_window: None,
    };
    let layers = json.required("num_hidden_layers")?;
    if !(1..=10_000).contains(&layers) {
        bail!("num_hidden_layers is {layers}, expected a positive number");
    }
    let act = json.text("hidden_act")?.or(json.text("hidden_activation")?).unwrap_or_else(|| "silu".into());
    Ok(Config {
        model_type: json.text("model_type")?.unwrap_or_default(),
        vocab_size: json.required("vocab_size")?,
        hidden_size,
        intermediate_size: json.required("intermediate_size")?,
        max_position_embeddings: json.int("max_position_embeddings")?.unwrap_or(2048),
        rms_norm_eps: json.number("rms_norm_eps")?.unwrap_or(1e-6),
        norm_offset: 0.0,
        hidden_act: activation(&act)?,
        tie_word_embeddings: json.flag("tie_word_embeddings", false)?,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        post_norms: false,
        fused_projections: false,
        embedding_scale: None,
        final_logit_softcapping: None,
        ropes: vec![],
        layers: vec![LayerConfig { attention, rope: 0 }; layers as usize],
        initializer_range: json.number("initializer_range")?.unwrap_or(0.02),
        bos_token_id: json.int("bos_token_id")?,
        eos_token_ids: json.ints("eos_token_id")?,
        ignores_vision: false,
    })
}

fn activation(name: &str) -> Result<Activation> {
    Ok(match name {
        "silu" | "swish" => Activation::Silu,
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Activation::GeluTanh,
        "gelu" => Activation::Gelu,
        other => {
            let supported = "silu, gelu, gelu_pytorch_tanh".to_string();
            return Err(Error::Unsupported { what: format!("hidden_act {other:?}"), supported }.into());
        }
    })
}

/// `layer_types` of the config, or `is_sliding(i)` where it has none: true for the layers with a sliding window.
pub fn sliding_layers(json: &Json, layers: usize, is_sliding: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
    let Some(types) = json.value("layer_types") else {
        return Ok((0..layers).map(is_sliding).collect());
    };
    let types = types.as_array().ok_or_else(|| anyhow!("layer_types is not a list"))?;
    if types.len() != layers {
        bail!("layer_types has {} entries for {layers} layers", types.len());
    }
    types
        .iter()
        .map(|kind| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => {
                let supported = "full_attention, sliding_attention".to_string();
                Err(Error::Unsupported { what: format!("layer type {kind}"), supported }.into())
            }
        })
        .collect()
}

/// The rope of the whole config: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4).
pub fn rope(json: &Json, head_dim: i64, default_theta: f64) -> Result<Rope> {
    let parameters = json.object("rope_parameters")?.or(json.object("rope_scaling")?);
    rope_from(json, parameters.as_ref(), head_dim, json.number("rope_theta")?.unwrap_or(default_theta))
}

/// A rope from one dictionary of parameters, with `theta` where that names none.
pub fn rope_from(json: &Json, parameters: Option<&Json>, head_dim: i64, theta: f64) -> Result<Rope> {
    let empty = Json(Map::new());
    let p = parameters.unwrap_or(&empty);
    let theta = p.number("rope_theta")?.unwrap_or(theta);
    let partial = p.number("partial_rotary_factor")?.or(json.number("partial_rotary_factor")?).unwrap_or(1.0);
    let dim = (head_dim as f64 * partial) as i64;
    let max_position_embeddings = json.number("max_position_embeddings")?.unwrap_or(2048.0);
    // Phi-3 states the original context beside the rope parameters, and that one counts.
    let original = json
        .number("original_max_position_embeddings")?
        .or(p.number("original_max_position_embeddings")?)
        .unwrap_or(max_position_embeddings);
    let need = |key: &str| p.number(key)?.ok_or_else(|| anyhow!("rope parameters: the key {key} is missing"));
    let kind = p.text("rope_type")?.or(p.text("type")?).unwrap_or_else(|| "default".into());
    // Early Phi-3 files say "su" or "yarn" and mean longrope.
    let kind = if p.present("long_factor") { "longrope" } else { kind.as_str() };
    let mut attention_factor = 1.0;
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "dynamic" => RopeScaling::Dynamic { factor: need("factor")?, max_position_embeddings },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_max_position_embeddings: original,
        },
        "yarn" => {
            let factor = p.number("factor")?.unwrap_or(max_position_embeddings / original);
            let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
            attention_factor =
                match (p.number("attention_factor")?, p.number("mscale")?, p.number("mscale_all_dim")?) {
                    (Some(given), _, _) => given,
                    (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
                    _ => mscale(1.0),
                };
            RopeScaling::Yarn {
                factor,
                beta_fast: p.number("beta_fast")?.unwrap_or(32.0),
                beta_slow: p.number("beta_slow")?.unwrap_or(1.0),
                truncate: p.flag("truncate", true)?,
                original_max_position_embeddings: original,
            }
        }
        "longrope" => {
            let factor = p.number("factor")?.unwrap_or(max_position_embeddings / original);
            let derived = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
            attention_factor = p.number("attention_factor")?.unwrap_or(derived);
            let (short_factor, long_factor) = (p.numbers("short_factor")?, p.numbers("long_factor")?);
            for (key, list) in [("short_factor", &short_factor), ("long_factor", &long_factor)] {
                if list.len() as i64 != dim / 2 {
                    bail!("rope parameters: {key} has {} entries, expected {}", list.len(), dim / 2);
                }
            }
            RopeScaling::LongRope { short_factor, long_factor, original_max_position_embeddings: original }
        }
        other => {
            let supported = "default, linear, dynamic, llama3, yarn, longrope".to_string();
            return Err(Error::Unsupported { what: format!("rope_type {other:?}"), supported }.into());
        }
    };
    Ok(Rope { theta, dim, scaling, attention_factor })
}
