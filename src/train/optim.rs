//! AdamW over a fixed list of parameters, with its state as named tensors.

use std::collections::HashMap;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::error::Error;
use crate::models::{Parameter, ParameterRole};
use crate::ops;

/// AdamW (arXiv:1711.05101) as torch.optim.AdamW computes it, moments in f32. Weight decay applies to matrices, not to
/// biases and norms, as transformers' Trainer groups them.
///
/// What changes from step to step is on the device, and nothing is read back, so that [`AdamW::update`] can be recorded as
/// a CUDA graph.
pub struct AdamW {
    params: Vec<Parameter>,
    exp_avg: Vec<Tensor>,
    exp_avg_sq: Vec<Tensor>,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
    /// Updates made, f32: exact up to 2^24.
    step: Tensor,
    learning_rate: Tensor,
}

impl AdamW {
    pub fn new(params: Vec<Parameter>, betas: (f64, f64), epsilon: f64, weight_decay: f64) -> Result<AdamW> {
        let zeros = |param: &Parameter| Tensor::f_zeros_like(&param.tensor.detach());
        let exp_avg = params.iter().map(zeros).collect::<Result<_, _>>()?;
        let exp_avg_sq = params.iter().map(zeros).collect::<Result<_, _>>()?;
        let device = params.first().map_or(Device::Cpu, |param| param.tensor.device());
        let scalar = || Tensor::f_zeros([0i64; 0], (Kind::Float, device));
        let (step, learning_rate) = (scalar()?, scalar()?);
        Ok(AdamW { params, exp_avg, exp_avg_sq, betas, epsilon, weight_decay, step, learning_rate })
    }

    pub fn params(&self) -> &[Parameter] {
        &self.params
    }

    /// For the updates that follow.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<()> {
        let _ = self.learning_rate.f_fill_(learning_rate)?;
        Ok(())
    }

    /// Clips the gradients together to the norm `max_norm` (0: not at all) and updates the parameters. Where their norm or
    /// `loss`, a scalar, is not finite, nothing changes. Returns the norm before clipping, a scalar.
    pub fn update(&mut self, loss: &Tensor, max_norm: f64) -> Result<Tensor> {
        let norm = ops::grad_norm(self.params.iter().map(|param| &param.tensor))?.f_to_kind(Kind::Float)?;
        // 0 * x is NaN for infinities too.
        let verdict = loss.f_mul_scalar(0.0)?.f_add(&norm)?;
        let finite = verdict.f_isfinite()?.f_to_kind(Kind::Float)?;
        let skip = finite.f_neg()?.f_add_scalar(1.0)?;
        let grad_scale = if max_norm > 0.0 {
            // The small term is torch.nn.utils.clip_grad_norm_'s.
            norm.f_add_scalar(1e-6)?.f_div_scalar(max_norm)?.f_clamp_min(1.0)?
        } else {
            norm.f_ones_like()?
        };
        let _ = self.step.f_add_(&finite)?;
        for role in [ParameterRole::Matrix, ParameterRole::Vector] {
            let group =
                || self.params.iter().enumerate().filter(|(_, param)| param.role == role).map(|(i, _)| i);
            ops::adamw_step(
                group().map(|i| &self.params[i].tensor),
                group().map(|i| &self.exp_avg[i]),
                group().map(|i| &self.exp_avg_sq[i]),
                ops::AdamW {
                    step: &self.step,
                    learning_rate: &self.learning_rate,
                    grad_scale: &grad_scale,
                    skip: &skip,
                    beta1: self.betas.0,
                    beta2: self.betas.1,
                    epsilon: self.epsilon,
                    weight_decay: if role == ParameterRole::Matrix { self.weight_decay } else { 0.0 },
                },
            )?;
        }
        Ok(norm)
    }

    /// Sets the gradients to zero, in place.
    pub fn zero_grad(&mut self) -> Result<()> {
        ops::zero_grads(self.params.iter().map(|param| &param.tensor))
    }

    /// Leaves no gradients, which costs no kernel: the next backward keeps its own tensors as the gradients.
    pub fn drop_grad(&mut self) -> Result<()> {
        ops::drop_grads(self.params.iter().map(|param| &param.tensor))
    }

    /// The moments as `<parameter>.exp_avg` and `<parameter>.exp_avg_sq`, and the number of updates as `step`.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let step = self.step.to_kind(Kind::Int64).to_device(Device::Cpu).reshape([1]);
        let mut state = vec![("step".to_string(), step)];
        for ((param, m), v) in self.params.iter().zip(&self.exp_avg).zip(&self.exp_avg_sq) {
            state.push((format!("{}.exp_avg", param.name), m.shallow_clone()));
            state.push((format!("{}.exp_avg_sq", param.name), v.shallow_clone()));
        }
        state
    }

    /// Restores what [`AdamW::state`] gave. `file` is named in errors.
    pub fn load_state(&mut self, mut state: HashMap<String, Tensor>, file: &str) -> Result<()> {
        let mut take = |name: String, shape: Vec<i64>| -> Result<Tensor> {
            let Some(tensor) = state.remove(&name) else {
                return Err(Error::MissingTensor { file: file.into(), name }.into());
            };
            if tensor.size() != shape {
                let found = tensor.size();
                return Err(Error::ShapeMismatch { file: file.into(), name, expected: shape, found }.into());
            }
            Ok(tensor)
        };
        let _ = self.step.f_fill_(take("step".into(), vec![1])?.int64_value(&[0]))?;
        for (i, param) in self.params.iter().enumerate() {
            for (suffix, moment) in
                [("exp_avg", &mut self.exp_avg[i]), ("exp_avg_sq", &mut self.exp_avg_sq[i])]
            {
                moment.f_copy_(
                    &take(format!("{}.{suffix}", param.name), param.tensor.size())?.to_kind(Kind::Float),
                )?;
            }
        }
        Ok(())
    }
}
