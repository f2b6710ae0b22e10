//! What an optimizer does to all parameters at once.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

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
    bridge::adamw_step(&ffi::list(params), &ffi::list(exp_avg), &ffi::list(exp_avg_sq), &adamw.view())
        .map_err(op_error)
}

impl<'a> AdamW<'a> {
    fn view(&self) -> bridge::AdamWStep<'a> {
        bridge::AdamWStep {
            step: ffi::borrow(self.step),
            learning_rate: ffi::borrow(self.learning_rate),
            grad_scale: ffi::borrow(self.grad_scale),
            skip: ffi::borrow(self.skip),
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
        }
    }
}

/// AdamW's moments of one parameter in 8 bits, by the words of bitsandbytes' state (arXiv:2110.02861): in blocks of 256
/// elements, `values[index] * absmax` with the values of a "dynamic" map.
#[derive(Debug)]
pub struct Moments8bit {
    /// Indices of exp_avg and exp_avg_sq, uint8 `[n]`.
    pub state1: Tensor,
    pub state2: Tensor,
    /// f32 `[ceil(n / 256)]`.
    pub absmax1: Tensor,
    pub absmax2: Tensor,
}

impl Moments8bit {
    /// Elements that share one absmax.
    pub const BLOCKSIZE: i64 = 256;

    /// Moments of zero, for a parameter of `n` elements.
    pub fn zeros(n: i64, device: Device) -> Result<Moments8bit> {
        let index = || Tensor::f_zeros([n], (Kind::Uint8, device));
        let absmax =
            || Tensor::f_zeros([(n as u64).div_ceil(Self::BLOCKSIZE as u64) as i64], (Kind::Float, device));
        Ok(Moments8bit { state1: index()?, state2: index()?, absmax1: absmax()?, absmax2: absmax()? })
    }
}

/// The maps that [`adamw_8bit_step`] reads.
pub fn adamw_8bit_maps(device: Device) -> Result<Tensor> {
    Ok(checked(bridge::adamw_8bit_maps())?.f_to_device(device)?)
}

/// The same as [`adamw_step`] with moments in 8 bits: they are read, updated and stored again as the nearest values.
/// Parameters are f32 or f64. On the CPU and by the kernel of a GPU, bytes are the same.
pub fn adamw_8bit_step<'a>(
    params: impl IntoIterator<Item = &'a Tensor>,
    moments: &[&Moments8bit],
    maps: &Tensor,
    adamw: AdamW,
) -> Result<()> {
    let list = |tensor: fn(&Moments8bit) -> &Tensor| ffi::list(moments.iter().map(|moments| tensor(moments)));
    bridge::adamw_8bit_step(
        &ffi::list(params),
        &list(|moments| &moments.state1),
        &list(|moments| &moments.state2),
        &list(|moments| &moments.absmax1),
        &list(|moments| &moments.absmax2),
        ffi::borrow(maps),
        &adamw.view(),
    )
    .map_err(op_error)
}
