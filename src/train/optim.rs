//! AdamW over a fixed list of parameters, with its state as named tensors.

use std::collections::HashMap;

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::error::Error;
use crate::models::{Parameter, ParameterRole};
use crate::ops;

/// AdamW (arXiv:1711.05101) as torch.optim.AdamW computes it, moments in f32. Weight decay applies to matrices, not to
/// biases and norms, as transformers' Trainer groups them.
pub struct AdamW {
    params: Vec<Parameter>,
    exp_avg: Vec<Tensor>,
    exp_avg_sq: Vec<Tensor>,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
    /// Updates made.
    step: u64,
}

impl AdamW {
    pub fn new(params: Vec<Parameter>, betas: (f64, f64), epsilon: f64, weight_decay: f64) -> Result<AdamW> {
        let zeros = |param: &Parameter| Tensor::f_zeros_like(&param.tensor.detach());
        let exp_avg = params.iter().map(zeros).collect::<Result<_, _>>()?;
        let exp_avg_sq = params.iter().map(zeros).collect::<Result<_, _>>()?;
        Ok(AdamW { params, exp_avg, exp_avg_sq, betas, epsilon, weight_decay, step: 0 })
    }

    pub fn params(&self) -> &[Parameter] {
        &self.params
    }

    /// 2-norm of all gradients together.
    pub fn grad_norm(&self) -> Result<f64> {
        ops::grad_norm(self.params.iter().map(|param| &param.tensor))
    }

    /// Multiplies every gradient by `factor`.
    pub fn scale_grads(&self, factor: f64) -> Result<()> {
        ops::scale_grads(self.params.iter().map(|param| &param.tensor), factor)
    }

    /// Updates the parameters from their gradients.
    pub fn step(&mut self, learning_rate: f64) -> Result<()> {
        self.step += 1;
        for role in [ParameterRole::Matrix, ParameterRole::Vector] {
            let weight_decay = if role == ParameterRole::Matrix { self.weight_decay } else { 0.0 };
            let group =
                || self.params.iter().enumerate().filter(|(_, param)| param.role == role).map(|(i, _)| i);
            let (beta1, beta2) = self.betas;
            ops::adamw_step(
                group().map(|i| &self.params[i].tensor),
                group().map(|i| &self.exp_avg[i]),
                group().map(|i| &self.exp_avg_sq[i]),
                self.step,
                ops::AdamW { learning_rate, beta1, beta2, epsilon: self.epsilon, weight_decay },
            )?;
        }
        Ok(())
    }

    /// Sets the gradients to zero, for the next backward to add to.
    pub fn zero_grad(&mut self) {
        for param in &mut self.params {
            param.tensor.zero_grad();
        }
    }

    /// The moments as `<parameter>.exp_avg` and `<parameter>.exp_avg_sq`, and the number of updates as `step`.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = vec![("step".to_string(), Tensor::from(self.step as i64).reshape([1]))];
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
        self.step = take("step".into(), vec![1])?.int64_value(&[0]) as u64;
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
