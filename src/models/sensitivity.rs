//! What quantising each projection does to the loss of a text: dynamic 4-bit spends its bytes by it.
//!
//! With `G_s = dL_s/dW` the gradient of the summed cross-entropy of sample s and `E = NF4(W) - W`, `<G_s, E>` is the change
//! of L_s to first order when W alone is quantised. As `G_s = dY_s^T X_s`, it is the output's error weighted by the
//! gradient: `<G_s, E> = sum_n <dY_sn, (X_s E^T)_n>`.

use anyhow::{Result, bail};
use tch::{Kind, Tensor};

use super::decoder::{Decoder, Input};
use crate::data::Batch;
use crate::error::Error;
use crate::ops::{self, BlockInput, Keys, Linear, Nf4, Pass, Weight};

/// What quantising single modules does to a text.
pub struct Nf4Sensitivity {
    pub modules: Vec<ModuleSensitivity>,
    /// Tokens that are predicted.
    pub targets: usize,
    /// Mean cross-entropy of them, before.
    pub loss: f64,
}

pub struct ModuleSensitivity {
    /// The module's name in the checkpoint, for instance `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// `<G_s, E>` of each sample.
    pub changes: Vec<f64>,
}

impl Decoder {
    /// Measures every projection of the layers on `samples`, one backward pass each. Beside the weights, their NF4 form, the
    /// inputs of the layers and the gradients of one layer stand in memory. Deterministic where the ops are.
    ///
    /// # Errors
    /// A model in 4 bits; samples without a target.
    pub fn nf4_sensitivity(
        &self,
        samples: &[Batch],
        mut progress: impl FnMut(usize),
    ) -> Result<Nf4Sensitivity> {
        if self.is_quantized() {
            let what = "measuring what the quantisation of a 4-bit model costs".to_string();
            return Err(Error::Unsupported { what, supported: "a checkpoint in 16 or 32 bits".into() }.into());
        }
        let targets = samples.iter().map(Batch::num_targets).sum();
        if targets == 0 {
            bail!("the calibration text has no token to predict");
        }
        let quantized = self.linears().map(quantize_parts).collect::<Result<Vec<_>>>()?;
        let mut modules: Vec<ModuleSensitivity> = (self.linear_modules().into_iter())
            .map(|(module, ..)| ModuleSensitivity { module, changes: Vec::with_capacity(samples.len()) })
            .collect();
        let mut loss = 0.0;
        for (done, sample) in samples.iter().enumerate() {
            let (sample_loss, changes) = self.sample_changes(sample, &quantized)?;
            loss += sample_loss;
            for (module, change) in modules.iter_mut().zip(changes) {
                module.changes.push(change);
            }
            progress(done + 1);
        }
        Ok(Nf4Sensitivity { modules, targets, loss: loss / targets as f64 })
    }

    /// The summed loss of one sample and `<G, E>` of every module, in the order of `linear_modules`.
    fn sample_changes(&self, sample: &Batch, quantized: &[Vec<Nf4>]) -> Result<(f64, Vec<f64>)> {
        let input = Input {
            input_ids: &sample.input_ids,
            position_ids: &sample.position_ids,
            cu_seqlens: &sample.cu_seqlens,
            prefixes: &[],
        };
        let batch = self.upload(input, &sample.labels)?;
        let mut inputs = Vec::with_capacity(self.layers.len() + 1);
        {
            let _no_grad = tch::no_grad_guard();
            let _ = self.hidden_watched(&batch.input, Pass::INFERENCE, &mut |_, _, after| {
                inputs.push(after.shallow_clone());
                Ok(())
            })?;
        }
        let leaf = |x: Option<Tensor>| -> Result<Tensor> {
            Ok(x.unwrap_or_default().f_detach()?.f_set_requires_grad(true)?)
        };
        let x = leaf(inputs.pop())?;
        let hidden = ops::rms_norm(&x, &self.norm)?;
        let softcap = self.config.final_logit_softcapping;
        let loss = ops::linear_cross_entropy(&hidden, self.head(), &batch.targets, softcap)?;
        let mut dx = gradients(&loss, &[&x])?.remove(0);

        let mut changes = Vec::new();
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let x = leaf(inputs.pop())?;
            let linears = layer.linears();
            let weights = linears.map(joined).into_iter().collect::<Result<Vec<_>>>()?;
            let trains = |on: bool| -> Result<()> {
                weights.iter().try_for_each(|weight| Ok(weight.f_set_requires_grad(on).map(drop)?))
            };
            trains(true)?;
            let wanted: Vec<&Tensor> = [&x].into_iter().chain(weights.iter().copied()).collect();
            // The gradient of sum(y * dx) towards y is dx.
            let found = self
                .layer_output(
                    index,
                    BlockInput::Kept(&x),
                    &batch.input.angles,
                    Keys::Segments(&batch.input.segments),
                    Pass::INFERENCE,
                )
                .and_then(|y| gradients(&y.f_mul(&dx)?.f_sum(None::<Kind>)?, &wanted));
            trains(false)?;
            let mut found = found?.into_iter();
            dx = found.next().unwrap_or_default();
            let _no_grad = tch::no_grad_guard();
            let mut of_layer = Vec::new();
            for ((linear, gradient), nf4s) in linears.iter().zip(found).zip(&quantized[4 * index..]) {
                of_layer.extend(linear_changes(linear, &gradient, nf4s)?);
            }
            changes.push(of_layer);
        }
        let changes = changes.into_iter().rev().flatten().collect();
        Ok((loss.f_double_value(&[])?, changes))
    }
}

fn gradients(of: &Tensor, towards: &[&Tensor]) -> Result<Vec<Tensor>> {
    Ok(Tensor::f_run_backward(&[of], towards, false, false)?)
}

fn joined(linear: &Linear) -> Result<&Tensor> {
    match &linear.weight {
        Weight::Joined(weight) => Ok(weight),
        Weight::Parts(_) => bail!("{} is stored in parts", linear.parts[0].name),
        Weight::Fp8(_) => bail!("{} is in fp8", linear.parts[0].name),
    }
}

/// The rows of each part of `tensor` `[rows, in]`.
fn part_rows(linear: &Linear, tensor: &Tensor) -> Result<Vec<Tensor>> {
    linear.rows().map(|(row, part)| Ok(tensor.f_narrow(0, row, part.rows)?)).collect()
}

fn quantize_parts(linear: &Linear) -> Result<Vec<Nf4>> {
    // NF4 takes no f64.
    let narrow = |w: Tensor| if w.kind() == Kind::Double { w.f_to_kind(Kind::Float) } else { Ok(w) };
    part_rows(linear, joined(linear)?)?.into_iter().map(|w| Nf4::quantize(&narrow(w)?)).collect()
}

/// `<G, NF4(W) - W>` of each part, products in f32 (f64 in an f64 model), the sum in f64.
fn linear_changes(linear: &Linear, gradient: &Tensor, quantized: &[Nf4]) -> Result<Vec<f64>> {
    let kind = if gradient.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let parts = part_rows(linear, joined(linear)?)?.into_iter().zip(part_rows(linear, gradient)?);
    parts
        .zip(quantized)
        .map(|((weight, gradient), nf4)| {
            let error = nf4.dequantize(kind)?.f_sub_(&weight)?;
            Ok(gradient.f_mul(&error)?.f_sum(Kind::Double)?.f_double_value(&[])?)
        })
        .collect()
}
