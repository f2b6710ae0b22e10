//! AdamW over a fixed list of parameters, with its state as named tensors.

use std::collections::HashMap;

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::Optim;
use super::loss_scale::LossScale;
use crate::error::Error;
use crate::models::{Parameter, ParameterRole};
use crate::ops::{self, Moments8bit};

/// AdamW (arXiv:1711.05101) as torch.optim.AdamW computes it, moments in f32 or in 8 bits. Weight decay applies to matrices,
/// not to biases and norms, as transformers' Trainer groups them.
///
/// What changes from step to step is on the device, and nothing is read back, so that [`AdamW::update`] can be recorded as
/// a CUDA graph.
pub struct AdamW {
    params: Vec<Parameter>,
    moments: Vec<Moments>,
    optim: Optim,
    /// What 8-bit moments are read and written by.
    maps: Tensor,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
    /// Updates made, f32: exact up to 2^24.
    step: Tensor,
    learning_rate: Tensor,
    /// By which the gradients are too large.
    loss_scale: Option<LossScale>,
}

/// Of one parameter.
enum Moments {
    Full { exp_avg: Tensor, exp_avg_sq: Tensor },
    Bits8(Moments8bit),
}

impl Moments {
    /// As bitsandbytes and transformers choose them: f32 for tensors so small that 8 bits save nothing, and for embeddings,
    /// whose gradients are zeros but for few rows.
    fn zeros(param: &Parameter, optim: Optim) -> Result<Moments> {
        const LEAST: usize = 4096;
        let small = param.tensor.numel() < LEAST || param.name.ends_with("embed_tokens.weight");
        if optim == Optim::Adamw8bit && !small {
            let moments = Moments8bit::zeros(param.tensor.numel() as i64, param.tensor.device())?;
            return Ok(Moments::Bits8(moments));
        }
        let zeros = || Tensor::f_zeros_like(&param.tensor.detach());
        Ok(Moments::Full { exp_avg: zeros()?, exp_avg_sq: zeros()? })
    }

    /// Each by what its name ends in.
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Moments::Full { exp_avg, exp_avg_sq } => vec![("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)],
            Moments::Bits8(moments) => vec![
                ("state1", &moments.state1),
                ("state2", &moments.state2),
                ("absmax1", &moments.absmax1),
                ("absmax2", &moments.absmax2),
            ],
        }
    }

    fn full(&self) -> Option<(&Tensor, &Tensor)> {
        match self {
            Moments::Full { exp_avg, exp_avg_sq } => Some((exp_avg, exp_avg_sq)),
            Moments::Bits8(_) => None,
        }
    }

    fn bits8(&self) -> Option<&Moments8bit> {
        match self {
            Moments::Full { .. } => None,
            Moments::Bits8(moments) => Some(moments),
        }
    }
}

impl AdamW {
    pub fn new(
        params: Vec<Parameter>,
        optim: Optim,
        betas: (f64, f64),
        epsilon: f64,
        weight_decay: f64,
    ) -> Result<AdamW> {
        let moments = params.iter().map(|param| Moments::zeros(param, optim)).collect::<Result<_>>()?;
        let device = params.first().map_or(Device::Cpu, |param| param.tensor.device());
        let maps = ops::adamw_8bit_maps(device)?;
        let scalar = || Tensor::f_zeros([0i64; 0], (Kind::Float, device));
        let (step, learning_rate) = (scalar()?, scalar()?);
        Ok(AdamW {
            params,
            moments,
            optim,
            maps,
            betas,
            epsilon,
            weight_decay,
            step,
            learning_rate,
            loss_scale: None,
        })
    }

    /// For gradients of a loss that is multiplied by [`AdamW::loss_scale`].
    pub fn with_loss_scale(mut self) -> Result<AdamW> {
        self.loss_scale = Some(LossScale::new(self.step.device())?);
        Ok(self)
    }

    /// What the loss is to be multiplied by, a scalar; none for 1.
    pub fn loss_scale(&self) -> Option<&Tensor> {
        self.loss_scale.as_ref().map(LossScale::scale)
    }

    pub fn params(&self) -> &[Parameter] {
        &self.params
    }

    pub fn optim(&self) -> Optim {
        self.optim
    }

    /// For the updates that follow.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<()> {
        let _ = self.learning_rate.f_fill_(learning_rate)?;
        Ok(())
    }

    /// Clips the gradients together to the norm `max_norm` (0: not at all) and updates the parameters. Where their norm or
    /// `loss`, a scalar, is not finite, nothing changes but the loss scale. Returns the norm before clipping, a scalar.
    pub fn update(&mut self, loss: &Tensor, max_norm: f64) -> Result<Tensor> {
        let mut norm =
            ops::grad_norm(self.params.iter().map(|param| &param.tensor))?.f_to_kind(Kind::Float)?;
        if let Some(scale) = self.loss_scale() {
            norm = norm.f_div(scale)?;
        }
        // 0 * x is NaN for infinities too.
        let verdict = loss.f_mul_scalar(0.0)?.f_add(&norm)?;
        let finite = verdict.f_isfinite()?.f_to_kind(Kind::Float)?;
        let skip = finite.f_neg()?.f_add_scalar(1.0)?;
        let mut grad_scale = if max_norm > 0.0 {
            // The small term is torch.nn.utils.clip_grad_norm_'s.
            norm.f_add_scalar(1e-6)?.f_div_scalar(max_norm)?.f_clamp_min(1.0)?
        } else {
            norm.f_ones_like()?
        };
        if let Some(scale) = self.loss_scale() {
            grad_scale = grad_scale.f_mul(scale)?;
        }
        let _ = self.step.f_add_(&finite)?;
        for role in [ParameterRole::Matrix, ParameterRole::Vector] {
            let adamw = ops::AdamW {
                step: &self.step,
                learning_rate: &self.learning_rate,
                grad_scale: &grad_scale,
                skip: &skip,
                beta1: self.betas.0,
                beta2: self.betas.1,
                epsilon: self.epsilon,
                weight_decay: if role == ParameterRole::Matrix { self.weight_decay } else { 0.0 },
            };
            let group = || self.params.iter().zip(&self.moments).filter(|(param, _)| param.role == role);
            let full = || {
                group()
                    .filter_map(|(param, moments)| Some((&param.tensor, moments.full()?)))
                    .map(|(param, (exp_avg, exp_avg_sq))| (param, exp_avg, exp_avg_sq))
            };
            ops::adamw_step(full().map(|f| f.0), full().map(|f| f.1), full().map(|f| f.2), adamw)?;
            let (params, moments): (Vec<&Tensor>, Vec<&Moments8bit>) =
                group().filter_map(|(param, moments)| Some((&param.tensor, moments.bits8()?))).unzip();
            ops::adamw_8bit_step(params, &moments, &self.maps, adamw)?;
        }
        if let Some(scale) = &mut self.loss_scale {
            scale.adjust(&finite)?;
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

    /// Of all moments.
    pub fn state_bytes(&self) -> u64 {
        let tensors = self.moments.iter().flat_map(Moments::tensors);
        tensors.map(|(_, tensor)| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
    }

    /// The moments as `<parameter>.exp_avg` and `<parameter>.exp_avg_sq`, in 8 bits as `<parameter>.state1`, `.state2`,
    /// `.absmax1` and `.absmax2`, the number of updates as `step`, and with a loss scale `loss_scale` and `good_steps`.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let step = self.step.to_kind(Kind::Int64).to_device(Device::Cpu).reshape([1]);
        let mut state = vec![("step".to_string(), step)];
        for (name, tensor) in self.loss_scale.iter().flat_map(LossScale::tensors) {
            state.push((name.to_string(), tensor.to_device(Device::Cpu).reshape([1])));
        }
        for (param, moments) in self.params.iter().zip(&self.moments) {
            for (suffix, tensor) in moments.tensors() {
                state.push((format!("{}.{suffix}", param.name), tensor.shallow_clone()));
            }
        }
        state
    }

    /// Restores what [`AdamW::state`] gave. `file` is named in errors.
    ///
    /// # Errors
    /// [`Error::Usage`] where it is the state of another `--optim`.
    pub fn load_state(&mut self, mut state: HashMap<String, Tensor>, file: &str) -> Result<()> {
        let other = match self.optim {
            Optim::AdamwTorch => (Optim::Adamw8bit, "state1"),
            Optim::Adamw8bit => (Optim::AdamwTorch, "exp_avg"),
        };
        for (name, tensor) in self.loss_scale.iter().flat_map(LossScale::tensors) {
            // Of a run in another dtype there is none: the scale starts anew.
            if let Some(saved) = state.remove(name) {
                let _ = tensor.shallow_clone().f_fill_(saved.f_double_value(&[0])?)?;
            }
        }
        let mut take = |param: &str, suffix: &str, shape: Vec<i64>| -> Result<Tensor> {
            let name = if param.is_empty() { suffix.to_string() } else { format!("{param}.{suffix}") };
            let Some(tensor) = state.remove(&name) else {
                if state.contains_key(&format!("{param}.{}", other.1)) {
                    bail!(Error::Usage(format!(
                        "--optim {}: {file} holds the moments of --optim {}; continue with that, or start a new run",
                        self.optim, other.0
                    )));
                }
                return Err(Error::MissingTensor { file: file.into(), name }.into());
            };
            if tensor.size() != shape {
                let found = tensor.size();
                return Err(Error::ShapeMismatch { file: file.into(), name, expected: shape, found }.into());
            }
            Ok(tensor)
        };
        let _ = self.step.f_fill_(take("", "step", vec![1])?.int64_value(&[0]))?;
        for (param, moments) in self.params.iter().zip(&self.moments) {
            for (suffix, tensor) in moments.tensors() {
                let saved = take(&param.name, suffix, tensor.size())?.f_to_kind(tensor.kind())?;
                tensor.shallow_clone().f_copy_(&saved)?;
            }
        }
        Ok(())
    }
}
