//! The head of a model: its scores, and what they say of labels.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{Bf12, Nf4, bf12, checked, nf4};
use crate::ffi::{self, bridge};

/// The rows of a batch that have a label, and their labels, on the device.
#[derive(Debug)]
pub struct Targets {
    /// int64 `[n]`; `None` where all rows have one.
    rows: Option<Tensor>,
    /// int64 `[n]`.
    labels: Tensor,
}

impl Targets {
    /// `labels[i]` is the label of row i, -100 for none. Chosen here and not on the device: how many there are sizes the
    /// products, and to ask a GPU would wait for it.
    pub fn new(labels: &[i64], device: tch::Device) -> Result<Targets> {
        let upload = |values: &[i64]| crate::device::upload(values, device);
        if !labels.contains(&-100) {
            return Ok(Targets { rows: None, labels: upload(labels)? });
        }
        let (rows, kept): (Vec<i64>, Vec<i64>) =
            (0..).zip(labels).filter(|&(_, &label)| label != -100).map(|(row, &label)| (row, label)).unzip();
        Ok(Targets { rows: Some(upload(&rows)?), labels: upload(&kept)? })
    }

    /// Labels in all.
    pub fn count(&self) -> i64 {
        self.labels.size()[0]
    }

    /// Copies the rows and labels of `other`, as many, into these tensors.
    pub fn assign(&mut self, other: &Targets) -> Result<()> {
        if let (Some(rows), Some(new)) = (&mut self.rows, &other.rows) {
            rows.f_copy_(new)?;
        }
        Ok(self.labels.f_copy_(&other.labels)?)
    }
}

/// The matrix W of a head, `[V, C]`.
#[derive(Debug, Clone, Copy)]
pub enum Head<'a> {
    Dense(&'a Tensor),
    /// Frozen, and never dequantised as a whole.
    Nf4(&'a Nf4),
    /// Frozen, and never unpacked as a whole.
    Bf12(&'a Bf12),
}

impl<'a> From<&'a Tensor> for Head<'a> {
    fn from(weight: &'a Tensor) -> Head<'a> {
        Head::Dense(weight)
    }
}

impl<'a> Head<'a> {
    fn view(self, absent: &'a Tensor) -> bridge::HeadView<'a> {
        let (weight, nf4, bf12) = match self {
            Head::Dense(weight) => (weight, None, None),
            Head::Nf4(nf4) => (absent, Some(nf4), None),
            Head::Bf12(bf12) => (absent, None, Some(bf12)),
        };
        bridge::HeadView {
            weight: ffi::borrow(weight),
            nf4: nf4::view(nf4, absent),
            bf12: bf12::view(bf12, absent),
        }
    }
}

/// `sum over targets of -log softmax(cap(hidden W^T))[label]` as a scalar in f32 (f64 for f64 inputs), without ever
/// holding the logits `[N, V]`: hidden `[N, C]`. Its gradient can be taken once.
pub fn linear_cross_entropy<'a>(
    hidden: &Tensor,
    head: impl Into<Head<'a>>,
    targets: &Targets,
    softcap: Option<f64>,
) -> Result<Tensor> {
    let absent = Tensor::new();
    checked(bridge::linear_cross_entropy(
        ffi::borrow(hidden),
        &head.into().view(&absent),
        ffi::borrow(targets.rows.as_ref().unwrap_or(&absent)),
        ffi::borrow(&targets.labels),
        softcap.unwrap_or(0.0),
    ))
}

/// `log softmax(cap(hidden W^T) / temperature)[label]` of every row with a label, 0 for the others: hidden `[N, C]` -> `[N]` in f32
/// (f64 for f64). The logits `[N, V]` are never held; the backward computes them again, chunk by chunk, and writes the gradient
/// of `hidden` over it where nobody else holds it, so it can be taken once.
///
/// # Errors
/// A temperature of 0 or less; shapes that do not belong together.
pub fn token_log_probs<'a>(
    hidden: &Tensor,
    head: impl Into<Head<'a>>,
    targets: &Targets,
    temperature: f64,
    softcap: Option<f64>,
) -> Result<Tensor> {
    log_probs(hidden, head.into(), targets, temperature, softcap, &Tensor::new())
}

/// As [`token_log_probs`], and the entropy of the same distributions, `-sum_v p_v log p_v` in nats, 0 without a label: `[N]`, not
/// differentiable.
pub fn token_log_probs_and_entropy<'a>(
    hidden: &Tensor,
    head: impl Into<Head<'a>>,
    targets: &Targets,
    temperature: f64,
    softcap: Option<f64>,
) -> Result<(Tensor, Tensor)> {
    let kind = if hidden.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let entropy = Tensor::f_zeros([hidden.size()[0]], (kind, hidden.device()))?;
    Ok((log_probs(hidden, head.into(), targets, temperature, softcap, &entropy)?, entropy))
}

fn log_probs(
    hidden: &Tensor,
    head: Head,
    targets: &Targets,
    temperature: f64,
    softcap: Option<f64>,
    entropy: &Tensor,
) -> Result<Tensor> {
    let absent = Tensor::new();
    checked(bridge::token_log_probs(
        ffi::borrow(hidden),
        &head.view(&absent),
        ffi::borrow(targets.rows.as_ref().unwrap_or(&absent)),
        ffi::borrow(&targets.labels),
        temperature,
        softcap.unwrap_or(0.0),
        ffi::borrow(entropy),
    ))
}

/// `hidden W^T`, `[N, V]`. Of a dense head differentiable and in the dtype of hidden, on a GPU without autograd in f32; of a head
/// in 4 or 12 bits in f32 (f64 for f64) and not differentiable.
pub fn head_scores(hidden: &Tensor, head: Head) -> Result<Tensor> {
    let absent = Tensor::new();
    checked(bridge::head_scores(ffi::borrow(hidden), &head.view(&absent)))
}
