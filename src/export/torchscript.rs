//! A model as a TorchScript archive: source with registered parameters, so that it runs at any batch and length. Not a trace.
//!
//! ```text
//! forward(input_ids: int64 [B, T]) -> f32 [B, T, V]
//! ```
//!
//! No cache and no padding: every position of each row attends to those before it. Formulas and rounding are those of
//! transformers' eager attention.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use tch::{CModule, Device, Kind, Tensor};

use super::Merged;
use crate::models::{Config, LayerConfig, projections};
use crate::nn::{Rope, RopeScaling};
use crate::ops::{self, Activation};

// 6 in the source is f32: libtorch's own compiler knows dtypes by number only.

/// The archive's name in the output folder.
pub const TORCHSCRIPT_FILE: &str = "model.pt";

/// Writes the merged model in `kind` to `path`. All of it stands in memory while it is written: an archive is one file of one
/// module.
pub fn write_torchscript(
    merged: &Merged,
    path: &Path,
    kind: Kind,
    mut progress: impl FnMut(u64, u64),
) -> Result<()> {
    let mut script = Script::new(&merged.config, merged.prefix(), merged.head());
    script.write()?;
    let total = script.parameters.len() as u64;
    let mut tensors = Vec::new();
    for (index, name) in script.parameters.iter().enumerate() {
        tensors.push((identifier(name), merged.tensor(name)?.f_to_kind(kind)?));
        progress(index as u64 + 1, total);
    }
    tensors.extend(script.frequencies);
    ops::save_script(path, &script.source, &tensors)
}

/// An archive read back, on `device`.
pub struct TorchScript(CModule);

impl TorchScript {
    pub fn load(path: &Path, device: Device) -> Result<TorchScript> {
        Ok(TorchScript(CModule::load_on_device(path, device)?))
    }

    /// Logits `[T, V]` of one sequence, f32 on the CPU.
    pub fn logits(&self, input_ids: &[i64], device: Device) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let ids = Tensor::f_from_slice(input_ids)?.f_unsqueeze(0)?.f_to_device(device)?;
        Ok(self.0.forward_ts(&[ids])?.f_squeeze_dim(0)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?)
    }
}

/// Names of parameters as TorchScript allows them.
fn identifier(name: &str) -> String {
    name.replace('.', "_")
}

struct Script<'a> {
    config: &'a Config,
    prefix: &'a str,
    head: Option<String>,
    source: String,
    /// Names in the checkpoint.
    parameters: Vec<String>,
    /// Of each rope, f32.
    frequencies: Vec<(String, Tensor)>,
}

impl<'a> Script<'a> {
    fn new(config: &'a Config, prefix: &'a str, head: Option<String>) -> Script<'a> {
        Script { config, prefix, head, source: String::new(), parameters: vec![], frequencies: vec![] }
    }

    /// `self.<name>`, which becomes a parameter.
    fn parameter(&mut self, name: String) -> String {
        let reference = format!("self.{}", identifier(&name));
        if !self.parameters.contains(&name) {
            self.parameters.push(name);
        }
        reference
    }

    fn line(&mut self, line: &str) {
        self.source.push_str("    ");
        self.source.push_str(line);
        self.source.push('\n');
    }

    fn write(&mut self) -> Result<()> {
        self.helpers()?;
        self.source += "def forward(self, input_ids: Tensor) -> Tensor:\n";
        let embedding = self.parameter(format!("{}embed_tokens.weight", self.prefix));
        self.line("b = input_ids.size(0)");
        self.line("t = input_ids.size(1)");
        self.line(&format!("x = torch.embedding({embedding}, input_ids)"));
        if let Some(scale) = self.config.embedding_scale {
            // Rounded to the dtype first, as Gemma was trained.
            self.line(&format!("x = x * torch.tensor({scale:?}).to(x.dtype)"));
        }
        self.line("place = torch.arange(t, device=input_ids.device)");
        self.line("later = place.unsqueeze(0) > place.unsqueeze(1)");
        for index in 0..self.config.ropes.len() {
            self.rope(index)?;
        }
        for index in 0..self.config.layers.len() {
            self.layer(index);
        }
        let norm = self.parameter(format!("{}norm.weight", self.prefix));
        self.line(&format!("x = self.norm(x, {norm})"));
        let head = match self.head.clone() {
            Some(head) => self.parameter(head),
            None => embedding,
        };
        self.line(&format!("y = torch.linear(x, {head}, None).to(6)"));
        if let Some(cap) = self.config.final_logit_softcapping {
            self.line(&format!("y = torch.tanh(y / {cap:?}) * {cap:?}"));
        }
        self.line("return y");
        Ok(())
    }

    fn helpers(&mut self) -> Result<()> {
        let eps = self.config.rms_norm_eps;
        let scaled = if self.config.norm_offset == 0.0 {
            "weight * f.to(x.dtype)".to_string()
        } else {
            format!("(f * (weight.to(6) + {:?})).to(x.dtype)", self.config.norm_offset)
        };
        write!(
            self.source,
            "def norm(self, x: Tensor, weight: Tensor) -> Tensor:\n    \
             f = x.to(6)\n    \
             f = f * torch.rsqrt(f.pow(2).mean([-1], True) + {eps:?})\n    \
             return {scaled}\n\
             def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:\n    \
             r = cos.size(-1)\n    \
             left = x.narrow(-1, 0, r)\n    \
             right = x.narrow(-1, r, r)\n    \
             rest = x.narrow(-1, 2 * r, x.size(-1) - 2 * r)\n    \
             return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)\n"
        )?;
        Ok(())
    }

    /// `cos{index}` and `sin{index}`, `[T, R/2]` in the model's dtype.
    fn rope(&mut self, index: usize) -> Result<()> {
        let rope: &Rope = &self.config.ropes[index];
        let name = format!("inv_freq{index}");
        let lengths: Vec<(String, i64)> = match rope.scaling {
            RopeScaling::LongRope { original_max_position_embeddings: original, .. } => {
                vec![(name.clone(), original as i64), (format!("{name}_long"), original as i64 + 1)]
            }
            _ => vec![(name.clone(), 1)],
        };
        for (name, length) in lengths {
            self.frequencies.push((name, rope.inv_freq(length, Device::Cpu)?));
        }
        self.line(&format!("w = self.{name}"));
        match rope.scaling {
            RopeScaling::LongRope { original_max_position_embeddings: original, .. } => {
                self.line(&format!("if t > {}:", original as i64));
                self.line(&format!("    w = self.{name}_long"));
            }
            RopeScaling::Dynamic { factor, max_position_embeddings: longest } => {
                // The base grows with the length: w_i = (theta g)^(-2i/R) = w_i g^(-2i/R).
                let power = rope.dim as f64 / (rope.dim as f64 - 2.0);
                self.line(&format!("if t > {}:", longest as i64));
                self.line(&format!(
                    "    growth = ({factor:?} * float(t) / {longest:?} - {:?}) ** {power:?}",
                    factor - 1.0
                ));
                self.line(&format!(
                    "    w = w * torch.pow(growth, torch.arange(0, {0}, 2, device=w.device).to(6) / {0}.0).reciprocal()",
                    rope.dim
                ));
            }
            _ => {}
        }
        self.line("angles = place.to(6).unsqueeze(1) * w.unsqueeze(0)");
        let factor = rope.attention_factor;
        self.line(&format!("cos{index} = (torch.cos(angles) * {factor:?}).to(x.dtype)"));
        self.line(&format!("sin{index} = (torch.sin(angles) * {factor:?}).to(x.dtype)"));
        Ok(())
    }

    /// `y = linear(input)` of a module, with its bias where it has one.
    fn linear(&mut self, to: &str, module: &str, input: &str, bias: bool) {
        let weight = self.parameter(format!("{module}.weight"));
        let bias = if bias { self.parameter(format!("{module}.bias")) } else { "None".to_string() };
        self.line(&format!("{to} = torch.linear({input}, {weight}, {bias})"));
    }

    fn layer(&mut self, index: usize) {
        let config = self.config;
        let LayerConfig { attention: spec, rope } = &config.layers[index];
        let (heads, kv, dim) = (spec.num_heads, spec.num_kv_heads, spec.head_dim);
        let [(qkv, _), (o, _), (gate_up, _), (down, _)] = projections(config, index, self.prefix);
        let norm = |script: &mut Script, from: &str, to: &str, name: &str| {
            let weight = script.parameter(format!("{}layers.{index}.{name}.weight", script.prefix));
            script.line(&format!("{to} = self.norm({from}, {weight})"));
        };
        norm(self, "x", "h", "input_layernorm");
        if let [(fused, _)] = &qkv[..] {
            self.linear("qkv", fused, "h", config.qkv_bias);
            let mut start = 0;
            for (to, count) in [("q", heads), ("k", kv), ("v", kv)] {
                self.line(&format!("{to} = qkv.narrow(-1, {start}, {})", count * dim));
                start += count * dim;
            }
        } else {
            for (to, (module, _)) in ["q", "k", "v"].iter().zip(&qkv) {
                self.linear(to, module, "h", config.qkv_bias);
            }
        }
        for (to, count) in [("q", heads), ("k", kv), ("v", kv)] {
            self.line(&format!("{to} = {to}.reshape([b, t, {count}, {dim}]).transpose(1, 2)"));
        }
        if config.qk_norm {
            norm(self, "q", "q", "self_attn.q_norm");
            norm(self, "k", "k", "self_attn.k_norm");
        }
        self.line(&format!("q = self.turn(q, cos{rope}, sin{rope})"));
        self.line(&format!("k = self.turn(k, cos{rope}, sin{rope})"));
        if heads != kv {
            self.line(&format!("k = k.repeat_interleave({}, 1)", heads / kv));
            self.line(&format!("v = v.repeat_interleave({}, 1)", heads / kv));
        }
        self.line(&format!("s = torch.matmul(q, k.transpose(2, 3)) * {:?}", spec.scale));
        if let Some(cap) = spec.softcap {
            self.line(&format!("s = torch.tanh(s / {cap:?}) * {cap:?}"));
        }
        match spec.sliding_window {
            Some(window) => {
                self.line(&format!("far = place.unsqueeze(1) - place.unsqueeze(0) >= {window}"));
                self.line("s = s.masked_fill(torch.logical_or(later, far), float('-inf'))");
            }
            None => self.line("s = s.masked_fill(later, float('-inf'))"),
        }
        self.line("p = torch.softmax(s, -1, dtype=6).to(q.dtype)");
        self.line(&format!("h = torch.matmul(p, v).transpose(1, 2).reshape([b, t, {}])", heads * dim));
        self.linear("h", &o[0].0, "h", config.o_bias);
        if config.post_norms {
            norm(self, "h", "h", "post_attention_layernorm");
        }
        self.line("x = x + h");
        let before = if config.post_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        norm(self, "x", "h", before);
        if let [(fused, _)] = &gate_up[..] {
            self.linear("h", fused, "h", config.mlp_bias);
            let size = config.intermediate_size;
            self.line(&format!("up = h.narrow(-1, {size}, {size})"));
            self.line(&format!("gate = h.narrow(-1, 0, {size})"));
        } else {
            self.linear("gate", &gate_up[0].0, "h", config.mlp_bias);
            self.linear("up", &gate_up[1].0, "h", config.mlp_bias);
        }
        let activation = match config.hidden_act {
            Activation::Silu => "torch.silu(gate)",
            Activation::GeluTanh => "torch.gelu(gate, approximate='tanh')",
            _ => "torch.gelu(gate)",
        };
        self.line(&format!("h = {activation} * up"));
        self.linear("h", &down[0].0, "h", config.mlp_bias);
        if config.post_norms {
            norm(self, "h", "h", "post_feedforward_layernorm");
        }
        self.line("x = x + h");
    }
}
