//! The decoder: embedding, layers of two ops each, final norm, head.

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Result, bail};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::config::Config;
use super::device_batch::{DeviceBatch, DeviceInput};
use crate::device::{self, Generator};
use crate::error::Error;
use crate::io::Weights;
use crate::nn::{Init, LoadOptions, Loader};
use crate::ops::{
    self, AttentionBlock, Bf12, BlockInput, Keys, Linear, MlpBlock, Nf4, Pass, RmsNorm, Rows, Targets,
};

/// A flat batch: samples one after another, no padding.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// `[N]`.
    pub input_ids: &'a [i64],
    /// `[N]`, starting at 0 in each segment.
    pub position_ids: &'a [i64],
    /// Starts of the segments, then N.
    pub cu_seqlens: &'a [i32],
    /// Of each segment the one that stands before it in its sample, or -1; empty for none. What several samples begin with is computed
    /// once.
    pub prefixes: &'a [i32],
}

pub(super) struct DecoderLayer {
    pub(super) input_norm: RmsNorm,
    pub(super) qkv: Linear,
    pub(super) o: Linear,
    pub(super) q_norm: Option<RmsNorm>,
    pub(super) k_norm: Option<RmsNorm>,
    pub(super) post_attention_norm: Option<RmsNorm>,
    pub(super) mlp_norm: RmsNorm,
    pub(super) gate_up: Linear,
    pub(super) down: Linear,
    pub(super) post_mlp_norm: Option<RmsNorm>,
}

/// A causal language model.
pub struct Decoder {
    pub config: Config,
    /// Dtype of the activations, and of the weights that do not train.
    pub kind: Kind,
    pub device: Device,
    /// What the checkpoint puts before `layers.0`: `model.`, `language_model.model.`, ...
    pub(super) prefix: String,
    /// `[V, C]`; on the CPU where `offloads_embedding`.
    pub(super) embed_tokens: Tensor,
    pub(super) offloads_embedding: bool,
    pub(super) layers: Vec<DecoderLayer>,
    pub(super) norm: RmsNorm,
    /// `[V, C]`; none where the embedding is also the head.
    pub(super) lm_head: Option<Tensor>,
    /// The head, if it is in 12 bits; then `lm_head` is none.
    pub(super) bf12_head: Option<Bf12>,
    /// The head, if it is in 4 bits; then `lm_head` is none.
    pub(super) nf4_head: Option<Nf4>,
}

/// What of a model a [`Decoder`] holds. What it lacks are layers, or tensors that are not defined.
pub(super) enum Extent {
    Whole,
    Embedding,
    Layers(Range<usize>),
    /// The last norm and the head.
    Head,
}

/// Sees each layer (none for the embedding) with its input and its output.
pub(super) type Watch<'a> = dyn FnMut(Option<&DecoderLayer>, &Tensor, &Tensor) -> Result<()> + 'a;

const PREFIXES: [&str; 4] = ["model.", "language_model.model.", "model.language_model.", ""];

/// Refuses an embedding in the host's memory that is `tied` to a head in 16 bits.
pub fn check_embeddings(tied: bool, offload_embedding: bool, nf4_head: bool) -> Result<()> {
    if offload_embedding && tied && !nf4_head {
        let what = "offload_embedding where the embedding is also the head".to_string();
        let supported = "it with nf4_head, which gives the head a copy of its own".to_string();
        return Err(Error::Unsupported { what, supported }.into());
    }
    Ok(())
}

/// Refuses projections in fp8 where they cannot be.
fn check_fp8(loader: &Loader) -> Result<()> {
    let LoadOptions { kind, device, load_in_4bit, base_fp8, .. } = loader.options;
    if !base_fp8 {
        return Ok(());
    }
    let quantized =
        load_in_4bit || matches!(&loader.init, Init::Checkpoint(weights) if weights.is_quantized());
    let (what, supported) = if quantized {
        ("a base dtype of fp8 with weights in 4 bits", "one of them")
    } else if matches!(loader.init, Init::Unset) {
        ("a base dtype of fp8 for a GGUF file", "a checkpoint folder")
    } else if !device::supports_fp8(device) {
        ("a base dtype of fp8 on this GPU", "compute capability 8.9 (Ada) or newer")
    } else if device.is_cuda() && kind != Kind::BFloat16 {
        ("a base dtype of fp8 beside activations that are not in bf16, on a GPU", "bf16")
    } else {
        return Ok(());
    };
    Err(Error::Unsupported { what: what.to_string(), supported: supported.to_string() }.into())
}

impl Decoder {
    /// Loads the weights that `config` describes, converted to `kind` on `device`. Layers are read in parallel.
    pub fn load(config: Config, weights: &Weights, kind: Kind, device: Device) -> Result<Decoder> {
        Decoder::load_with(config, weights, LoadOptions::new(kind, device))
    }

    /// As [`Decoder::load`], with more to choose.
    pub fn load_with(config: Config, weights: &Weights, options: LoadOptions) -> Result<Decoder> {
        Decoder::load_keeping(config, weights, options, &BTreeSet::new())
    }

    /// As [`Decoder::load_with`]; the modules `kept` are not quantised.
    pub fn load_keeping(
        config: Config,
        weights: &Weights,
        options: LoadOptions,
        kept: &BTreeSet<String>,
    ) -> Result<Decoder> {
        Decoder::load_extent(config, weights, options, kept, &Extent::Whole)
    }

    pub(super) fn load_extent(
        config: Config,
        weights: &Weights,
        options: LoadOptions,
        kept: &BTreeSet<String>,
        extent: &Extent,
    ) -> Result<Decoder> {
        let prefix = prefix_of(weights)?;
        let loader = Loader { init: Init::Checkpoint(weights), options, kept };
        let decoder = Decoder::build(config, prefix, &loader, extent)?;
        // The reading threads worked on a stream of their own.
        device::synchronize(options.device)?;
        // What they freed only they could use again.
        device::empty_cache(options.device)?;
        Ok(decoder)
    }

    /// Name and shape of the weight of every projection in a checkpoint's layers: what `load_in_4bit` quantises.
    pub fn projections(config: &Config, weights: &Weights) -> Result<Vec<(String, [i64; 2])>> {
        let prefix = prefix_of(weights)?;
        let weight =
            |(name, rows): (String, i64), in_features| (format!("{name}.weight"), [rows, in_features]);
        let layers = (0..config.layers.len()).flat_map(|index| projections(config, index, prefix));
        Ok(layers
            .flat_map(|(parts, in_features)| parts.into_iter().map(move |part| weight(part, in_features)))
            .collect())
    }

    /// A decoder with random weights: N(0, `initializer_range`^2). The same seed gives the same on every device.
    pub fn random(config: Config, options: LoadOptions, seed: u64) -> Result<Decoder> {
        Decoder::random_by(config, options, Generator::new(Device::Cpu, seed)?)
    }

    /// As [`Decoder::random`], with the numbers of `generator`: a GPU draws its own 8 billion in a second.
    pub fn random_by(config: Config, options: LoadOptions, generator: Generator) -> Result<Decoder> {
        let init = Init::Random { std: config.initializer_range, generator };
        let loader = Loader { init, options, kept: &BTreeSet::new() };
        Decoder::build(config, PREFIXES[0], &loader, &Extent::Whole)
    }

    /// A decoder whose tensors have no values yet.
    ///
    /// # Errors
    /// Options that quantise: there is nothing to quantise.
    pub(super) fn unset(config: Config, options: LoadOptions, extent: &Extent) -> Result<Decoder> {
        if options.load_in_4bit || options.nf4_head {
            let what = "quantising a GGUF file to NF4 while it loads".to_string();
            return Err(Error::Unsupported { what, supported: "a checkpoint folder".to_string() }.into());
        }
        let loader = Loader { init: Init::Unset, options, kept: &BTreeSet::new() };
        Decoder::build(config, PREFIXES[0], &loader, extent)
    }

    fn build(mut config: Config, prefix: &str, loader: &Loader, extent: &Extent) -> Result<Decoder> {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let LoadOptions { kind, device, offload_embedding, nf4_head, .. } = loader.options;
        check_fp8(loader)?;
        if kind == Kind::Half && config.overflows_f16() {
            let what = format!("{} in f16, which its hidden states overflow,", config.model_type);
            return Err(Error::Unsupported { what, supported: "bf16, f32".to_string() }.into());
        }
        check_embeddings(config.tie_word_embeddings, offload_embedding, nf4_head)?;
        let named = |name: &str| match &loader.init {
            Init::Checkpoint(weights) => weights.contains(name),
            Init::Random { .. } | Init::Unset => false,
        };
        let head = ["lm_head.weight", "language_model.lm_head.weight"].into_iter().find(|name| named(name));
        let embed = format!("{prefix}embed_tokens.weight");
        // Some tools keep only the head of a tied pair.
        let stored = head.filter(|_| config.tie_word_embeddings && !named(&embed)).unwrap_or(&embed);
        let embedding_device = if offload_embedding { Device::Cpu } else { device };
        let ties = config.tie_word_embeddings;
        let embed_tokens = match extent {
            Extent::Whole | Extent::Embedding => loader.matrix(stored, [vocab, hidden], embedding_device)?,
            Extent::Head if ties => loader.matrix(stored, [vocab, hidden], device)?,
            Extent::Head | Extent::Layers(_) => Tensor::new(),
        };
        let range = match extent {
            Extent::Whole => 0..config.layers.len(),
            Extent::Layers(range) => range.clone(),
            Extent::Embedding | Extent::Head => 0..0,
        };
        let build = |index: usize| DecoderLayer::build(&config, index, prefix, loader);
        let layers = match loader.init {
            Init::Checkpoint(_) => device::reading_threads()?
                .install(|| range.clone().into_par_iter().map(build).collect::<Result<_>>())?,
            // One generator: in order.
            Init::Random { .. } | Init::Unset => range.clone().map(build).collect::<Result<_>>()?,
        };
        config.layers = config.layers[range].to_vec();
        let norm =
            loader.norm(format!("{prefix}norm.weight"), hidden, config.rms_norm_eps, config.norm_offset)?;
        let (mut lm_head, mut in_4_bits) = (None, None);
        let has_head = matches!(extent, Extent::Whole | Extent::Head);
        if nf4_head && has_head {
            in_4_bits = Some(match &loader.init {
                Init::Random { .. } if ties => {
                    let known = if kind == Kind::Double { Kind::Float } else { kind };
                    Nf4::quantize(&embed_tokens.f_to_device(device)?.f_to_kind(known)?)?
                }
                _ => {
                    let own = head.unwrap_or("lm_head.weight");
                    loader.nf4_matrix(if ties { stored } else { own }, [vocab, hidden])?
                }
            });
        } else if !ties && has_head {
            lm_head = Some(loader.matrix(head.unwrap_or("lm_head.weight"), [vocab, hidden], device)?);
        }
        Ok(Decoder {
            config,
            kind,
            device,
            prefix: prefix.to_string(),
            embed_tokens,
            offloads_embedding: offload_embedding,
            layers,
            norm,
            lm_head,
            bf12_head: None,
            nf4_head: in_4_bits,
        })
    }

    /// Hidden states after the final norm: `[N, C]`.
    pub fn hidden(&self, input: Input, pass: Pass) -> Result<Tensor> {
        self.hidden_watched(&self.upload_input(input)?, pass, &mut |_, _, _| Ok(()))
    }

    /// As [`Decoder::hidden`], showing `watch` each layer's input and output; for the embedding (no layer) its output
    /// twice.
    pub(super) fn hidden_watched(
        &self,
        input: &DeviceInput,
        pass: Pass,
        watch: &mut Watch,
    ) -> Result<Tensor> {
        let mut x = self.embed(&input.input_ids, input.embedded.as_ref(), self.kind)?;
        watch(None, &x, &x)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let layer_input = x.shallow_clone();
            let keys = Keys::Segments(&input.segments);
            x = self.layer_output(index, BlockInput::Kept(&x), &input.angles, keys, pass)?;
            watch(Some(layer), &layer_input, &x)?;
        }
        ops::rms_norm(&x, &self.norm)
    }

    /// The embedding's rows `[N, C]` in `kind`, which are `embedded` already where it is in the host's memory.
    pub(super) fn embed(&self, input_ids: &Tensor, embedded: Option<&Tensor>, kind: Kind) -> Result<Tensor> {
        let x = match embedded {
            Some(rows) => rows.shallow_clone(),
            None => Tensor::f_embedding(&self.embed_tokens, input_ids, -1, false, false)?.f_to_kind(kind)?,
        };
        match self.config.embedding_scale {
            // Rounded to the decoder's dtype first, as Gemma was trained.
            Some(scale) => {
                let scale = Tensor::from(scale).f_to_kind(self.kind)?.double_value(&[]);
                Ok(x.f_mul_scalar(scale)?)
            }
            None => Ok(x),
        }
    }

    /// Both blocks of layer `index` on `x`; `angles` are cos and sin of the rows for each of the config's ropes.
    pub(super) fn layer_output(
        &self,
        index: usize,
        x: BlockInput,
        angles: &[(Tensor, Tensor)],
        keys: Keys,
        pass: Pass,
    ) -> Result<Tensor> {
        let (attention, mlp) = self.blocks(index);
        let x = ops::attention_block_of(x, &attention, &self.rows(index, angles, keys), pass)?;
        ops::mlp_block_of(BlockInput::Given(x), &mlp, pass)
    }

    pub(super) fn rows<'a>(&self, index: usize, angles: &'a [(Tensor, Tensor)], keys: Keys<'a>) -> Rows<'a> {
        let (cos, sin) = &angles[self.config.layers[index].rope];
        Rows { cos, sin, keys }
    }

    /// The two blocks of layer `index`.
    pub(super) fn blocks(&self, index: usize) -> (AttentionBlock<'_>, MlpBlock<'_>) {
        let layer = &self.layers[index];
        let attention = AttentionBlock {
            layer: index,
            norm: &layer.input_norm,
            qkv: &layer.qkv,
            o: &layer.o,
            q_norm: layer.q_norm.as_ref(),
            k_norm: layer.k_norm.as_ref(),
            post_norm: layer.post_attention_norm.as_ref(),
            spec: &self.config.layers[index].attention,
        };
        let mlp = MlpBlock {
            layer: index,
            norm: &layer.mlp_norm,
            gate_up: &layer.gate_up,
            down: &layer.down,
            post_norm: layer.post_mlp_norm.as_ref(),
            activation: self.config.hidden_act,
        };
        (attention, mlp)
    }

    /// # Errors
    /// Names the first id that the embedding has no row for.
    pub fn check_ids(&self, input_ids: &[i64]) -> Result<()> {
        let vocab_size = self.config.vocab_size;
        match input_ids.iter().find(|&&id| id < 0 || id >= vocab_size) {
            Some(id) => bail!("token id {id} is outside the model's vocabulary (vocab_size {vocab_size})"),
            None => Ok(()),
        }
    }

    /// Whether the embedding is in the host's memory; each batch then has its rows uploaded.
    pub fn offloads_embedding(&self) -> bool {
        self.offloads_embedding
    }

    /// Sum of the cross-entropy over the tokens whose label is not -100, as a scalar that can be differentiated.
    /// `labels[n]` is the label of token n; inside each segment token n predicts label n + 1.
    pub fn loss_sum(&self, input: Input, labels: &[i64], pass: Pass) -> Result<Tensor> {
        self.batch_loss_sum(&self.upload(input, labels)?, pass)
    }

    /// As [`Decoder::loss_sum`] of a batch that is on the device: it uploads nothing.
    pub fn batch_loss_sum(&self, batch: &DeviceBatch, pass: Pass) -> Result<Tensor> {
        let hidden = self.hidden_watched(&batch.input, pass, &mut |_, _, _| Ok(()))?;
        ops::linear_cross_entropy(&hidden, self.head(), &batch.targets, self.config.final_logit_softcapping)
    }

    /// Log-probabilities of the batch's labels at `temperature`, differentiable: `[N]`, row n for the label of token n + 1, 0 where
    /// that has none.
    pub fn batch_log_probs(&self, batch: &DeviceBatch, temperature: f64, pass: Pass) -> Result<Tensor> {
        let hidden = self.hidden_watched(&batch.input, pass, &mut |_, _, _| Ok(()))?;
        let softcap = self.config.final_logit_softcapping;
        ops::token_log_probs(&hidden, self.head(), &batch.targets, temperature, softcap)
    }

    /// As [`Decoder::batch_log_probs`], with the entropies of the same distributions, which are not differentiable.
    pub fn batch_log_probs_and_entropy(
        &self,
        batch: &DeviceBatch,
        temperature: f64,
        pass: Pass,
    ) -> Result<(Tensor, Tensor)> {
        let hidden = self.hidden_watched(&batch.input, pass, &mut |_, _, _| Ok(()))?;
        let softcap = self.config.final_logit_softcapping;
        ops::token_log_probs_and_entropy(&hidden, self.head(), &batch.targets, temperature, softcap)
    }

    /// Log-probability of each token after the first, given those before it: `[T - 1]` in f32.
    pub fn log_probs(&self, input_ids: &[i64]) -> Result<Tensor> {
        if input_ids.len() < 2 {
            return Ok(Tensor::f_zeros([0], (Kind::Float, Device::Cpu))?);
        }
        self.check_ids(input_ids)?;
        let _no_grad = tch::no_grad_guard();
        let n = input_ids.len() - 1;
        let positions: Vec<i64> = (0..n as i64).collect();
        let input = Input {
            input_ids: &input_ids[..n],
            position_ids: &positions,
            cu_seqlens: &[0, n as i32],
            prefixes: &[],
        };
        let hidden = self.hidden(input, Pass::INFERENCE)?;
        let targets = Targets::new(&input_ids[1..], self.device)?;
        ops::token_log_probs(&hidden, self.head(), &targets, 1.0, self.config.final_logit_softcapping)
    }
}

/// What a checkpoint puts before `layers.0`.
pub fn prefix_of(weights: &Weights) -> Result<&'static str> {
    let found = PREFIXES.into_iter().find(|prefix| weights.contains(&format!("{prefix}norm.weight")));
    // The error for the usual name is the one that helps.
    found.map_or_else(
        || weights.shape("model.norm.weight").and_then(|_| bail!("the checkpoint has no norm.weight")),
        Ok,
    )
}

/// The parts `(module name, rows)` and the width of the input of a layer's qkv, o, gate_up and down.
pub fn projections(config: &Config, index: usize, prefix: &str) -> [(Vec<(String, i64)>, i64); 4] {
    let at = |name: &str| format!("{prefix}layers.{index}.{name}");
    let spec = &config.layers[index].attention;
    let (hidden, ff) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
    let qkv = if config.fused_projections {
        vec![(at("self_attn.qkv_proj"), q + 2 * kv)]
    } else {
        vec![(at("self_attn.q_proj"), q), (at("self_attn.k_proj"), kv), (at("self_attn.v_proj"), kv)]
    };
    let gate_up = if config.fused_projections {
        vec![(at("mlp.gate_up_proj"), 2 * ff)]
    } else {
        vec![(at("mlp.gate_proj"), ff), (at("mlp.up_proj"), ff)]
    };
    let (o, down) = (vec![(at("self_attn.o_proj"), hidden)], vec![(at("mlp.down_proj"), hidden)]);
    [(qkv, hidden), (o, q), (gate_up, hidden), (down, ff)]
}

impl DecoderLayer {
    fn build(config: &Config, index: usize, prefix: &str, loader: &Loader) -> Result<DecoderLayer> {
        let at = |name: &str| format!("{prefix}layers.{index}.{name}");
        let spec = &config.layers[index].attention;
        let hidden = config.hidden_size;
        let [qkv, o, gate_up, down] = projections(config, index, prefix);
        let linear =
            |(parts, in_features): (Vec<(String, i64)>, i64), bias| loader.linear(&parts, in_features, bias);
        let norm = |name: &str, size: i64| {
            loader.norm(at(&format!("{name}.weight")), size, config.rms_norm_eps, config.norm_offset)
        };
        let mlp_norm =
            if config.post_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let post = |name: &str| config.post_norms.then(|| norm(name, hidden)).transpose();
        let head_norm = |name: &str| config.qk_norm.then(|| norm(name, spec.head_dim)).transpose();
        Ok(DecoderLayer {
            input_norm: norm("input_layernorm", hidden)?,
            qkv: linear(qkv, config.qkv_bias)?,
            o: linear(o, config.o_bias)?,
            q_norm: head_norm("self_attn.q_norm")?,
            k_norm: head_norm("self_attn.k_norm")?,
            post_attention_norm: post("post_attention_layernorm")?,
            mlp_norm: norm(mlp_norm, hidden)?,
            gate_up: linear(gate_up, config.mlp_bias)?,
            down: linear(down, config.mlp_bias)?,
            post_mlp_norm: post("post_feedforward_layernorm")?,
        })
    }
}
