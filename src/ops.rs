//! One safe function an op: the operands as Rust structs, the work in csrc/.
//!
//! Dimensions: `N` rows (tokens of a flat batch), `C` hidden_size, `F` intermediate_size, `H` query heads, `K` key/value
//! heads, `D` head_dim, `V` vocab_size, `R` LoRA rank. Every function checks its shapes and returns an error that
//! names them. On the CPU each op is its plain ATen formula in any float dtype, f64 included.

use anyhow::{Result, anyhow};
use cxx::SharedPtr;
use tch::Tensor;

pub use crate::ffi::bridge::{Activation, BlockPolicy, Place};
use crate::ffi::{self, bridge};

mod bf12;
mod decode;
mod fp8;
mod head;
mod lora_casts;
mod nf4;
mod optim;
mod pages;
mod pass;
pub mod plain;
mod policy;
pub mod proof;
mod sample;
mod script;

pub use bf12::Bf12;
pub use decode::{DecodeInput, DecodeStack};
pub use fp8::Fp8;
pub use head::{
    Head, Targets, head_scores, linear_cross_entropy, token_log_probs, token_log_probs_and_entropy,
};
use lora_casts::LinearCast;
pub use lora_casts::LoraCasts;
pub use nf4::{Nested, Nf4, Nf4Quantizer, nf4_bytes, shared_map};
pub use optim::{
    AdamW, Moments8bit, adamw_8bit_maps, adamw_8bit_step, adamw_step, drop_grads, grad_norm, zero_grads,
};
pub use pages::{LayerPages, PagedBatch};
pub use pass::{DropoutKey, LoraRun, LoraSet, Pass};
pub use policy::Policy;
pub use sample::{Draw, Drawn, Draws, put_words, sample};
pub use script::save_script;

/// Low-rank update of one part of a [`Linear`]: `y += scale * dropout(x) A^T B^T`. arXiv:2106.09685
#[derive(Debug)]
pub struct Lora {
    /// `[R, in]`, f32.
    pub a: Tensor,
    /// `[rows, R]`, f32.
    pub b: Tensor,
    /// `lora_alpha / R`, or `lora_alpha / sqrt(R)` with rslora.
    pub scale: f64,
    /// Probability that an element of the input is dropped in training.
    pub dropout: f64,
}

/// Neighbouring output rows of a [`Linear`] that the checkpoint and peft know by a name of their own.
#[derive(Debug)]
pub struct Part {
    /// The module's name in the checkpoint, for instance `model.layers.0.self_attn.q_proj`.
    pub name: String,
    pub rows: i64,
    pub lora: Option<Lora>,
}

/// Where the values of a [`Linear`]'s matrix are.
#[derive(Debug)]
pub enum Weight {
    /// `[rows, in]`, the parts below each other.
    Joined(Tensor),
    /// One for each part, in their order: a quantised checkpoint's. They never train.
    Parts(Vec<PartWeight>),
    /// All parts below each other. It never trains.
    Fp8(Fp8),
}

/// The frozen matrix `[rows, in]` of one part.
#[derive(Debug)]
pub enum PartWeight {
    Dense(Tensor),
    Nf4(Nf4),
}

/// A projection `[in] -> [sum of rows]`: q, k and v are one Linear of three parts, gate and up of two.
#[derive(Debug)]
pub struct Linear {
    pub weight: Weight,
    /// `[rows]`.
    pub bias: Option<Tensor>,
    pub parts: Vec<Part>,
}

/// RMSNorm: `y = x / sqrt(mean(x^2) + eps) * (weight + offset)`. arXiv:1910.07467
#[derive(Debug)]
pub struct RmsNorm {
    /// The tensor's name in the checkpoint, for instance `model.norm.weight`.
    pub name: String,
    /// `[C]`.
    pub weight: Tensor,
    pub eps: f64,
    /// 1 for Gemma, whose checkpoints hold the weight minus one; else 0.
    pub offset: f64,
}

/// What attention does in one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    pub num_heads: i64,
    pub num_kv_heads: i64,
    pub head_dim: i64,
    /// Factor of `q k^T`.
    pub scale: f64,
    /// `c tanh(s / c)` on the scores.
    pub softcap: Option<f64>,
    /// A query sees the last `sliding_window` keys, itself included.
    pub sliding_window: Option<i64>,
}

/// The samples of a flat batch; rows attend only to rows of their own. Made once a batch: what kernels read of it stays on
/// the device.
pub struct Segments(SharedPtr<bridge::Segments>);

impl Segments {
    /// `cu_seqlens` are the rows where the samples start, then N.
    pub fn new(cu_seqlens: &[i32], device: tch::Device) -> Result<Segments> {
        Segments::of(cu_seqlens, &Tensor::new(), &Tensor::new(), device)
    }

    /// The same of pieces: `prefixes[i]` is the piece before piece i in its samples, or -1. A piece with pieces behind it begins each
    /// of their samples, and is none itself.
    ///
    /// # Errors
    /// A prefix that does not stand before its pieces, or has one itself.
    pub fn sharing(cu_seqlens: &[i32], prefixes: &[i32], device: tch::Device) -> Result<Segments> {
        if prefixes.is_empty() {
            return Segments::new(cu_seqlens, device);
        }
        let pieces = cu_seqlens.len().saturating_sub(1);
        let wrong = |(piece, &prefix): (usize, &i32)| {
            prefix >= 0 && (prefix as usize >= piece || prefixes[prefix as usize] >= 0)
        };
        if prefixes.len() != pieces || prefixes.iter().enumerate().any(wrong) {
            anyhow::bail!("segments: {prefixes:?} are no prefixes of {pieces} pieces");
        }
        let (mut samples, mut places) = (vec![0], Vec::new());
        let mut firsts = vec![-1; cu_seqlens[pieces] as usize];
        for (piece, &prefix) in prefixes.iter().enumerate() {
            if prefixes.contains(&(piece as i32)) {
                continue;
            }
            for part in usize::try_from(prefix).into_iter().chain([piece]) {
                for row in cu_seqlens[part]..cu_seqlens[part + 1] {
                    let first = &mut firsts[row as usize];
                    if *first < 0 {
                        *first = places.len() as i64;
                    }
                    places.push(i64::from(row));
                }
            }
            samples.push(places.len() as i32);
        }
        let upload = |values: &[i64]| crate::device::upload(values, device);
        Segments::of(&samples, &upload(&places)?, &upload(&firsts)?, device)
    }

    fn of(cu_seqlens: &[i32], places: &Tensor, firsts: &Tensor, device: tch::Device) -> Result<Segments> {
        let mut starts: Vec<i64> = cu_seqlens.iter().map(|&row| i64::from(row)).collect();
        // Kernels are built for powers of two of samples.
        let count = cu_seqlens.len().saturating_sub(1).next_power_of_two();
        starts.resize(count + 1, starts.last().copied().unwrap_or(0));
        let starts = crate::device::upload(&starts, device)?;
        let [starts, places, firsts] = [&starts, places, firsts].map(ffi::borrow);
        bridge::segments(cu_seqlens, starts, places, firsts).map(Segments).map_err(op_error)
    }
}

/// Where the rows of a batch stand.
pub struct Rows<'a> {
    /// `[N, R/2]`, f32 (f64 in an f64 model).
    pub cos: &'a Tensor,
    pub sin: &'a Tensor,
    pub keys: Keys<'a>,
}

/// The keys that a row may attend to.
#[derive(Clone, Copy)]
pub enum Keys<'a> {
    /// Those of its own sample, in the batch.
    Segments(&'a Segments),
    /// Those of its sequence in the pages of the layer, where the batch's own are written first.
    Pages(&'a PagedBatch, &'a LayerPages),
}

/// `y = x W^T + bias + LoRA`: x `[N, in]` -> `[N, rows]`.
pub fn linear(x: &Tensor, linear: &Linear, pass: Pass) -> Result<Tensor> {
    let absent = Tensor::new();
    let parts = part_views(linear, &absent, pass, None, 0, 0);
    checked(bridge::op_linear(ffi::borrow(x), &linear_view(linear, &absent, &parts, None, &[])))
}

/// RMSNorm over the last dimension: x `[.., C]` -> `[.., C]`. Statistics in f32 for 16-bit inputs.
pub fn rms_norm(x: &Tensor, norm: &RmsNorm) -> Result<Tensor> {
    checked(bridge::op_rms_norm(ffi::borrow(x), ffi::borrow(&norm.weight), norm.eps, norm.offset))
}

/// Rotary position embedding in Hugging Face's half-split pairing: x `[N, H, D]`, cos and sin `[N, R/2]` with
/// `R <= D`; dims `R..D` pass through. arXiv:2104.09864
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    checked(bridge::op_rope(ffi::borrow(x), ffi::borrow(cos), ffi::borrow(sin)))
}

/// `act(gate) * up` for `gate_up = [gate | up]`: `[N, 2F]` -> `[N, F]`. arXiv:2002.05202
pub fn swiglu(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    checked(bridge::op_swiglu(ffi::borrow(gate_up), activation))
}

/// Causal attention inside each segment: q `[N, H, D]`, k and v `[N, K, D]` -> `[N, H*D]`. arXiv:1706.03762
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &Segments,
    spec: &AttentionSpec,
) -> Result<Tensor> {
    checked(bridge::op_attention(
        ffi::borrow(q),
        ffi::borrow(k),
        ffi::borrow(v),
        segments.0.clone(),
        spec.scale,
        spec.softcap.unwrap_or(0.0),
        spec.sliding_window.unwrap_or(0),
    ))
}

/// The x of a block.
pub(crate) enum BlockInput<'a> {
    /// It stays as it is.
    Kept(&'a Tensor),
    /// No other tensor shares its memory, which may become the result's. With autograd it stays as it is.
    Given(Tensor),
}

impl BlockInput<'_> {
    fn tensor(&self) -> &Tensor {
        match self {
            BlockInput::Kept(x) => x,
            BlockInput::Given(x) => x,
        }
    }

    fn is_given(&self) -> bool {
        matches!(self, BlockInput::Given(_))
    }
}

/// Operands of [`attention_block`].
pub struct AttentionBlock<'a> {
    pub layer: usize,
    pub norm: &'a RmsNorm,
    pub qkv: &'a Linear,
    pub o: &'a Linear,
    /// Per-head norms before the rotation (Qwen3, Gemma 3).
    pub q_norm: Option<&'a RmsNorm>,
    pub k_norm: Option<&'a RmsNorm>,
    /// Norm of the output before the residual sum (Gemma).
    pub post_norm: Option<&'a RmsNorm>,
    pub spec: &'a AttentionSpec,
}

/// `x + post_norm(o(attention(rope(qkv(norm(x))))))`: `[N, C]` -> `[N, C]`.
pub fn attention_block(x: &Tensor, block: &AttentionBlock, rows: &Rows, pass: Pass) -> Result<Tensor> {
    attention_block_of(BlockInput::Kept(x), block, rows, pass)
}

pub(crate) fn attention_block_of(
    x: BlockInput,
    block: &AttentionBlock,
    rows: &Rows,
    pass: Pass,
) -> Result<Tensor> {
    checked(attention_views(block, rows, pass, |norm, qkv, o, post_norm, attention| {
        let policy = pass.policy(block.layer).attention;
        let overwrites = x.is_given();
        bridge::attention_block(
            ffi::borrow(x.tensor()),
            norm,
            qkv,
            o,
            post_norm,
            attention,
            policy,
            overwrites,
        )
    }))
}

/// Shows `body` the block as the bridge has it: norm, qkv, o, the norm behind them, attention.
fn attention_views<R>(
    block: &AttentionBlock,
    rows: &Rows,
    pass: Pass,
    body: impl FnOnce(
        &bridge::NormView,
        &bridge::LinearView,
        &bridge::LinearView,
        &bridge::NormView,
        &bridge::AttentionView,
    ) -> R,
) -> R {
    let absent = Tensor::new();
    let (qkv_cast, o_cast) = (pass.cast(block.layer, 0), pass.cast(block.layer, 1));
    let qkv = part_views(block.qkv, &absent, pass, qkv_cast, block.layer, 0);
    let o = part_views(block.o, &absent, pass, o_cast, block.layer, qkv.len());
    let (qkv_rows, o_rows) =
        (pass.lora_rows(block.qkv, block.layer, 0), pass.lora_rows(block.o, block.layer, 1));
    let (segments, pages, pages_k, pages_v) = match rows.keys {
        Keys::Segments(segments) => (segments.0.clone(), SharedPtr::null(), &absent, &absent),
        Keys::Pages(batch, layer) => (SharedPtr::null(), batch.0.clone(), &layer.k, &layer.v),
    };
    let attention = bridge::AttentionView {
        num_heads: block.spec.num_heads,
        num_kv_heads: block.spec.num_kv_heads,
        head_dim: block.spec.head_dim,
        scale: block.spec.scale,
        softcap: block.spec.softcap.unwrap_or(0.0),
        window: block.spec.sliding_window.unwrap_or(0),
        q_norm: norm_view(block.q_norm, &absent),
        k_norm: norm_view(block.k_norm, &absent),
        cos: ffi::borrow(rows.cos),
        sin: ffi::borrow(rows.sin),
        segments,
        pages,
        pages_k: ffi::borrow(pages_k),
        pages_v: ffi::borrow(pages_v),
    };
    body(
        &norm_view(Some(block.norm), &absent),
        &linear_view(block.qkv, &absent, &qkv, qkv_cast, &qkv_rows),
        &linear_view(block.o, &absent, &o, o_cast, &o_rows),
        &norm_view(block.post_norm, &absent),
        &attention,
    )
}

/// Operands of [`mlp_block`].
pub struct MlpBlock<'a> {
    pub layer: usize,
    pub norm: &'a RmsNorm,
    pub gate_up: &'a Linear,
    pub down: &'a Linear,
    /// Norm of the output before the residual sum (Gemma).
    pub post_norm: Option<&'a RmsNorm>,
    pub activation: Activation,
}

/// `x + post_norm(down(act(gate) * up))`, `[gate | up] = gate_up(norm(x))`: `[N, C]` -> `[N, C]`.
pub fn mlp_block(x: &Tensor, block: &MlpBlock, pass: Pass) -> Result<Tensor> {
    mlp_block_of(BlockInput::Kept(x), block, pass)
}

pub(crate) fn mlp_block_of(x: BlockInput, block: &MlpBlock, pass: Pass) -> Result<Tensor> {
    checked(mlp_views(block, pass, |norm, gate_up, down, post_norm| {
        let policy = pass.policy(block.layer).mlp;
        let overwrites = x.is_given();
        bridge::mlp_block(
            ffi::borrow(x.tensor()),
            norm,
            gate_up,
            down,
            post_norm,
            block.activation,
            policy,
            overwrites,
        )
    }))
}

/// Shows `body` the block as the bridge has it: norm, gate_up, down, the norm behind them.
fn mlp_views<R>(
    block: &MlpBlock,
    pass: Pass,
    body: impl FnOnce(&bridge::NormView, &bridge::LinearView, &bridge::LinearView, &bridge::NormView) -> R,
) -> R {
    let absent = Tensor::new();
    // Module numbers after those of the attention block, so that no two modules share a dropout mask.
    let (gate_up_cast, down_cast) = (pass.cast(block.layer, 2), pass.cast(block.layer, 3));
    let gate_up = part_views(block.gate_up, &absent, pass, gate_up_cast, block.layer, 8);
    let down = part_views(block.down, &absent, pass, down_cast, block.layer, 8 + gate_up.len());
    let gate_up_rows = pass.lora_rows(block.gate_up, block.layer, 2);
    let down_rows = pass.lora_rows(block.down, block.layer, 3);
    body(
        &norm_view(Some(block.norm), &absent),
        &linear_view(block.gate_up, &absent, &gate_up, gate_up_cast, &gate_up_rows),
        &linear_view(block.down, &absent, &down, down_cast, &down_rows),
        &norm_view(block.post_norm, &absent),
    )
}

/// Computes the gradients of `inputs` from `dy`, that of `y`, and drops them: a backward pass to measure.
pub fn backward<'a>(y: &Tensor, dy: &Tensor, inputs: impl IntoIterator<Item = &'a Tensor>) -> Result<()> {
    bridge::backward(ffi::borrow(y), ffi::borrow(dy), &ffi::list(inputs)).map_err(op_error)
}

fn part_views<'a>(
    linear: &'a Linear,
    absent: &'a Tensor,
    pass: Pass,
    cast: Option<&'a LinearCast>,
    layer: usize,
    first_module: usize,
) -> Vec<bridge::PartView<'a>> {
    let view = |(module, part): (usize, &'a Part)| {
        let lora = part.lora.as_ref().filter(|_| !pass.without_lora && pass.lora.is_empty());
        let (dense, nf4) = match &linear.weight {
            Weight::Joined(_) | Weight::Fp8(_) => (absent, None),
            Weight::Parts(weights) => match &weights[module] {
                PartWeight::Dense(tensor) => (tensor, None),
                PartWeight::Nf4(nf4) => (absent, Some(nf4)),
            },
        };
        bridge::PartView {
            rows: part.rows,
            dense: ffi::borrow(dense),
            nf4: nf4::view(nf4, absent),
            lora_a: ffi::borrow(lora.map_or(absent, |lora| &lora.a)),
            lora_b: ffi::borrow(lora.map_or(absent, |lora| &lora.b)),
            b_cast: ffi::borrow(cast.map_or(absent, |cast| &cast.b[module])),
            scale: lora.map_or(0.0, |lora| lora.scale),
            dropout: pass.dropout.and(lora).map_or(0.0, |lora| lora.dropout),
            dropout_key: pass.dropout.map_or(0, |key| key.module(layer, first_module + module)),
        }
    };
    linear.parts.iter().enumerate().map(view).collect()
}

fn linear_view<'a>(
    linear: &'a Linear,
    absent: &'a Tensor,
    parts: &'a [bridge::PartView<'a>],
    cast: Option<&'a LinearCast>,
    lora_rows: &'a [bridge::LoraRowsView<'a>],
) -> bridge::LinearView<'a> {
    let (weight, fp8) = match &linear.weight {
        Weight::Joined(weight) => (weight, None),
        Weight::Parts(_) => (absent, None),
        Weight::Fp8(fp8) => (absent, Some(fp8)),
    };
    bridge::LinearView {
        weight: ffi::borrow(weight),
        fp8: fp8::view(fp8, absent),
        bias: ffi::borrow(linear.bias.as_ref().unwrap_or(absent)),
        a_cast: ffi::borrow(cast.map_or(absent, |cast| &cast.a)),
        parts,
        lora_rows,
    }
}

fn norm_view<'a>(norm: Option<&'a RmsNorm>, absent: &'a Tensor) -> bridge::NormView<'a> {
    match norm {
        Some(norm) => {
            bridge::NormView { weight: ffi::borrow(&norm.weight), eps: norm.eps, offset: norm.offset }
        }
        None => bridge::NormView { weight: ffi::borrow(absent), eps: 0.0, offset: 0.0 },
    }
}

fn checked(result: Result<cxx::UniquePtr<bridge::Tensor>, cxx::Exception>) -> Result<Tensor> {
    result.map(ffi::take).map_err(op_error)
}

/// libtorch's out-of-memory message becomes the error that callers branch on.
fn op_error(error: cxx::Exception) -> anyhow::Error {
    let message = error.what();
    if message.contains("out of memory") {
        let advice = "lower --per-device-train-batch-size or --max-seq-length, or use \
                      --use-gradient-checkpointing"
            .to_string();
        return anyhow::Error::new(crate::error::Error::OutOfMemory { device: "the device".into(), advice })
            .context(message.to_string());
    }
    anyhow!("{message}")
}
