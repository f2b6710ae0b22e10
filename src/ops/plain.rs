//! The ops as one writes them in plain libtorch: what they are measured by, in error and in speed.

use anyhow::Result;
use tch::{Kind, Reduction, Tensor};

use super::{Activation, AttentionSpec, RmsNorm};

/// f32 for 16-bit inputs.
fn accumulation(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// As [`super::rms_norm`].
pub fn rms_norm(x: &Tensor, norm: &RmsNorm) -> Result<Tensor> {
    let acc = accumulation(x.kind());
    let xa = x.f_to_kind(acc)?;
    let rstd = xa.f_square()?.f_mean_dim(-1, true, acc)?.f_add_scalar(norm.eps)?.f_rsqrt()?;
    let normed = xa.f_mul(&rstd)?.f_to_kind(x.kind())?;
    Ok(normed.f_mul(&norm.weight.f_add_scalar(norm.offset)?)?)
}

/// As [`super::rope`], by transformers' formula: `x cos + rotate_half(x) sin` on the first R dims.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = cos.size()[1];
    let turned = x.f_narrow(-1, 0, 2 * half)?;
    let twice = |t: &Tensor| Tensor::f_cat(&[t, t], -1)?.f_unsqueeze(1)?.f_to_kind(x.kind());
    let parts = turned.f_chunk(2, -1)?;
    let rotated = Tensor::f_cat(&[&parts[1].f_neg()?, &parts[0]], -1)?;
    let y = turned.f_mul(&twice(cos)?)?.f_add(&rotated.f_mul(&twice(sin)?)?)?;
    Ok(Tensor::f_cat(&[y, x.f_narrow(-1, 2 * half, x.size()[2] - 2 * half)?], -1)?)
}

/// As [`super::swiglu`].
pub fn swiglu(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let parts = gate_up.f_chunk(2, -1)?;
    let (gate, up) = (&parts[0], &parts[1]);
    let activated = match activation {
        Activation::Silu => gate.f_silu()?,
        Activation::GeluTanh => gate.f_gelu("tanh")?,
        _ => gate.f_gelu("none")?,
    };
    Ok(activated.f_mul(up)?)
}

/// As [`super::attention`], by its definition: every score of a sample in memory.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    cu_seqlens: &[i32],
    spec: &AttentionSpec,
) -> Result<Tensor> {
    let segment = |start: i64, length: i64| -> Result<Tensor> {
        let heads_first = |x: &Tensor| x.f_narrow(0, start, length)?.f_transpose(0, 1);
        let group = spec.num_heads / spec.num_kv_heads;
        let repeat = |x: &Tensor| heads_first(x)?.f_repeat_interleave_self_int(group, 0, None);
        let mut scores =
            heads_first(q)?.f_matmul(&repeat(k)?.f_transpose(1, 2)?)?.f_mul_scalar(spec.scale)?;
        if let Some(softcap) = spec.softcap {
            scores = scores.f_div_scalar(softcap)?.f_tanh()?.f_mul_scalar(softcap)?;
        }
        let ones = Tensor::f_ones([length, length], (Kind::Bool, scores.device()))?;
        let window = spec.sliding_window.unwrap_or(length);
        let visible = ones.f_tril(0)?.f_logical_and(&ones.f_triu(1 - window)?)?;
        let scores = scores.f_masked_fill(&visible.f_logical_not()?, f64::NEG_INFINITY)?;
        let y = scores.f_softmax(-1, scores.kind())?.f_matmul(&repeat(v)?)?;
        Ok(y.f_transpose(0, 1)?.f_reshape([length, -1])?)
    };
    let rows = cu_seqlens
        .windows(2)
        .map(|ends| segment(i64::from(ends[0]), i64::from(ends[1] - ends[0])))
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_cat(&rows, 0)?)
}

/// As [`super::linear_cross_entropy`]: logits in the dtype of `hidden`, then everything in f32 (f64 for f64). -100 is no
/// label.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    labels: &[i64],
    softcap: Option<f64>,
) -> Result<Tensor> {
    let mut z = hidden.f_matmul(&weight.f_tr()?)?.f_to_kind(accumulation(hidden.kind()))?;
    if let Some(cap) = softcap {
        z = z.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?;
    }
    let labels = Tensor::f_from_slice(labels)?.f_to_device(hidden.device())?;
    Ok(z.f_cross_entropy_loss::<Tensor>(&labels, None, Reduction::Sum, -100, 0.0)?)
}

/// As [`super::token_log_probs`], in the same precisions; -100 is no label.
pub fn token_log_probs(
    hidden: &Tensor,
    weight: &Tensor,
    labels: &[i64],
    temperature: f64,
    softcap: Option<f64>,
) -> Result<Tensor> {
    let mut z = hidden.f_matmul(&weight.f_tr()?)?.f_to_kind(accumulation(hidden.kind()))?;
    if let Some(cap) = softcap {
        z = z.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?;
    }
    let log_p = z.f_div_scalar(temperature)?.f_log_softmax(-1, None)?;
    let labels = Tensor::f_from_slice(labels)?.f_to_device(hidden.device())?.f_unsqueeze(1)?;
    let chosen = log_p.f_gather(1, &labels.f_clamp_min(0)?, false)?;
    Ok(chosen.f_masked_fill(&labels.f_lt(0)?, 0.0)?.f_squeeze_dim(1)?)
}
