//! Dynamic loss scaling: what keeps gradients inside f16.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// The factor of the loss in an f16 run, arXiv:1710.03740: gradients of activations smaller than 6e-8 would be zeros, so the
/// loss is multiplied before the backward pass, and the gradients of the weights, in f32, are divided in the update. Halved by
/// a gradient that is not finite, whose step changes nothing, and doubled after [`LossScale::GROWTH_INTERVAL`] steps without.
///
/// Both numbers are on the device, so that recorded steps read and write them.
pub(super) struct LossScale {
    /// f32, a power of two.
    scale: Tensor,
    /// f32: steps since the scale changed.
    good_steps: Tensor,
}

impl LossScale {
    pub(super) const INITIAL: f64 = 65536.0;
    pub(super) const GROWTH_INTERVAL: f64 = 2000.0;

    pub(super) fn new(device: Device) -> Result<LossScale> {
        let full = |value: f64| Tensor::f_full([0i64; 0], value, (Kind::Float, device));
        Ok(LossScale { scale: full(LossScale::INITIAL)?, good_steps: full(0.0)? })
    }

    pub(super) fn scale(&self) -> &Tensor {
        &self.scale
    }

    /// After a step whose gradient was finite (1) or not (0).
    pub(super) fn adjust(&mut self, finite: &Tensor) -> Result<()> {
        let counted = self.good_steps.f_add_scalar(1.0)?.f_mul(finite)?;
        let grows = counted.f_ge(LossScale::GROWTH_INTERVAL)?.f_to_kind(Kind::Float)?;
        let kept = finite.f_add_scalar(1.0)?.f_mul_scalar(0.5)?;
        let _ = self.scale.f_mul_(&kept.f_mul(&grows.f_add_scalar(1.0)?)?)?;
        self.good_steps.f_copy_(&counted.f_mul(&grows.f_neg()?.f_add_scalar(1.0)?)?)?;
        Ok(())
    }

    /// For a checkpoint, by name.
    pub(super) fn tensors(&self) -> [(&'static str, &Tensor); 2] {
        [("loss_scale", &self.scale), ("good_steps", &self.good_steps)]
    }
}
