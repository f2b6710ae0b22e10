//! What an optimizer does to all parameters at once.

use anyhow::Result;
use tch::Tensor;

use super::{checked, op_error};
use crate::ffi::{self, bridge};

/// 2-norm of all gradients together, a scalar; parameters without one count nothing.
pub fn grad_norm<'a>(params: impl IntoIterator<Item = &'a Tensor>) -> Result<Tensor> {
    checked(bridge::grad_norm(&ffi::list(params)))
}

/// Sets every gradient to zero, in place.
pub fn zero_grads<'a>(params: impl IntoIterator<Item = &'a Tensor>) -> Result<()> {
    bridge::zero_grads(&ffi::list(params)).map_err(op_error)
}

/// Leaves every parameter without a gradient: the next backward keeps the tensors that it computes, instead of adding them
/// to zeros.
pub fn drop_grads<'a>(params: impl IntoIterator<Item = &'a Tensor>) -> Result<()> {
    bridge::drop_grads(&ffi::list(params)).map_err(op_error)
}

/// What an AdamW step reads beside the tensors. The scalars are f32 on the parameters' device.
#[derive(Debug, Clone, Copy)]
pub struct AdamW<'a> {
    /// t, 1-based.
    pub step: &'a Tensor,
    pub learning_rate: &'a Tensor,
    /// Gradients are divided by it.
    pub grad_scale: &'a Tensor,
    /// 1 for a step that changes nothing, else 0.
    pub skip: &'a Tensor,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
}

/// One AdamW step over all tensors, in place (arXiv:1711.05101, as torch.optim.AdamW): `g /= grad_scale`,
/// `p *= 1 - lr wd`, `m = b1 m + (1-b1) g`, `v = b2 v + (1-b2) g^2`,
/// `p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)`. Parameters without a gradient stay.
pub fn adamw_step<'a>(
    params: impl IntoIterator<Item = &'a Tensor>,
    exp_avg: impl IntoIterator<Item = &'a Tensor>,
    exp_avg_sq: impl IntoIterator<Item = &'a Tensor>,
    adamw: AdamW,
) -> Result<()> {
    let step = bridge::AdamWStep {
        step: ffi::borrow(adamw.step),
        learning_rate: ffi::borrow(adamw.learning_rate),
        grad_scale: ffi::borrow(adamw.grad_scale),
        skip: ffi::borrow(adamw.skip),
        beta1: adamw.beta1,
        beta2: adamw.beta2,
        epsilon: adamw.epsilon,
        weight_decay: adamw.weight_decay,
    };
    bridge::adamw_step(&ffi::list(params), &ffi::list(exp_avg), &ffi::list(exp_avg_sq), &step)
        .map_err(op_error)
}
