//! The objective of GRPO and its relatives.

use std::cell::RefCell;

use anyhow::Result;
use tch::{Kind, Tensor};

use super::batches::column;
use super::{GrpoArguments, ImportanceSamplingLevel, ImportanceSamplingMode, LossType};
use crate::data::Batch;
use crate::models::{Decoder, DeviceBatch};
use crate::ops::Pass;
use crate::train::Objective;
use crate::train::objective::{Measured, upload};

/// With `log pi` the log-probability of a completion's token at the sampling temperature, `log pi_old` the same before the steps
/// on these completions (where there is one step, itself without gradient) and A the advantage, a token's loss is
///
/// ```text
/// rho = exp(log pi - log pi_old), or with importance_sampling_level sequence exp(its mean over the completion)
/// grpo, bnpo, dr_grpo, dapo, luspo   -min(min(rho, delta) A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)
/// cispo    -min(rho, epsilon_high) A log pi, no gradient through rho                     (arXiv:2506.13585)
/// sapo     -sigmoid(t (rho - 1)) 4 / t A, t by the sign of A                              (arXiv:2511.20347)
/// ```
///
/// 0 with off_policy_mask_threshold where A < 0 and the mean of `log pi_sampler - log pi` over the completion is above it,
/// times the importance ratio of the sampler where it is asked for, plus `beta (exp(d) - d - 1)`, `d = log pi_ref - log pi`
/// (times rho with use_bias_correction_kl), all times the token's weight ([`step_batches`](super::step_batches)).
pub struct Grpo<'a> {
    arguments: &'a GrpoArguments,
    /// Sums over counted tokens since they were read; see [`Sums`].
    sums: RefCell<Option<Tensor>>,
    /// The largest difference between sampler and trainer.
    largest: RefCell<Option<Tensor>>,
    /// With top_entropy_quantile, of the present step.
    least_entropy: RefCell<Option<Tensor>>,
}

/// Places in [`Grpo::sums`].
#[derive(Clone, Copy)]
enum Sums {
    Tokens,
    Kl,
    Entropy,
    LowClipped,
    HighClipped,
    Difference,
    Ratio,
}

/// What the loss of a micro-batch is made of, by row.
struct Terms {
    loss: Tensor,
    /// Of [`Sums`], without `Tokens`: each `[N]`.
    statistics: [Tensor; 6],
}

impl<'a> Grpo<'a> {
    /// The objective that `arguments`, resolved, describe.
    pub fn new(arguments: &'a GrpoArguments) -> Grpo<'a> {
        Grpo {
            arguments,
            sums: RefCell::new(None),
            largest: RefCell::new(None),
            least_entropy: RefCell::new(None),
        }
    }

    /// From log-probabilities and entropies `[N]`.
    fn terms(&self, log_probs: &Tensor, entropy: &Tensor, batch: &DeviceBatch) -> Result<Terms> {
        let args = self.arguments;
        let columns = batch.extra[0].f_to_kind(log_probs.kind())?;
        let column = |index: usize| columns.f_select(0, index as i64);
        let (advantage, counted) = (column(column::ADVANTAGE)?, counted(&columns)?);
        let sequences = Sequences::new(&columns, &counted, batch.segments())?;
        let now = log_probs.detach();
        let old = if args.is_off_policy() { column(column::OLD)? } else { now.shallow_clone() };

        let log_ratio = log_probs.f_sub(&old)?;
        let ratio = match args.importance_sampling_level {
            ImportanceSamplingLevel::Token => log_ratio.f_exp()?,
            ImportanceSamplingLevel::Sequence => sequences.mean(&log_ratio)?.f_exp()?,
        };
        let (low, high) = (1.0 - args.epsilon, 1.0 + args.epsilon_high());
        let policy = match args.loss_type {
            LossType::Cispo => {
                let clipped = ratio.f_clamp_max(args.epsilon_high())?.detach();
                clipped.f_mul(&advantage)?.f_mul(log_probs)?
            }
            LossType::Sapo => {
                let positive = advantage.f_gt(0.0)?.f_to_kind(log_probs.kind())?;
                let span = args.sapo_temperature_pos - args.sapo_temperature_neg;
                let t = positive.f_mul_scalar(span)?.f_add_scalar(args.sapo_temperature_neg)?;
                let soft = ratio.f_sub_scalar(1.0)?.f_mul(&t)?.f_sigmoid()?;
                soft.f_mul_scalar(4.0)?.f_div(&t)?.f_mul(&advantage)?
            }
            _ => {
                let clipped = ratio.f_clamp(low, high)?.f_mul(&advantage)?;
                let bounded = match args.delta {
                    Some(delta) => ratio.f_clamp_max(delta)?,
                    None => ratio.shallow_clone(),
                };
                bounded.f_mul(&advantage)?.f_minimum(&clipped)?
            }
        };
        let mut loss = policy.f_neg()?;
        if let Some(threshold) = args.off_policy_mask_threshold {
            let drift = sequences.mean(&column(column::SAMPLER)?.f_sub(&now)?)?;
            let kept = advantage.f_ge(0.0)?.f_logical_or(&drift.f_le(threshold)?)?;
            loss = loss.f_mul(&kept)?;
        }
        if let Some(least) = &*self.least_entropy.borrow() {
            loss = loss.f_mul(&entropy.f_ge_tensor(least)?)?;
        }
        let difference = old.f_sub(&column(column::SAMPLER)?)?.f_mul(&counted)?;
        let correction = self.correction(&difference, &sequences)?;
        if args.importance_sampling_correction {
            loss = loss.f_mul(&correction)?;
        }
        let mut kl = log_probs.f_zeros_like()?;
        if args.beta != 0.0 {
            let d = column(column::REFERENCE)?.f_sub(log_probs)?;
            kl = d.f_exp()?.f_sub(&d)?.f_sub_scalar(1.0)?;
            if args.use_bias_correction_kl {
                kl = kl.f_mul(&ratio)?;
            }
            loss = loss.f_add(&kl.f_mul_scalar(args.beta)?)?;
        }

        let is = |condition: Tensor| condition.f_to_kind(log_probs.kind());
        let (worse, better) = (is(advantage.f_lt(0.0)?)?, is(advantage.f_gt(0.0)?)?);
        let above = if args.loss_type == LossType::Cispo { args.epsilon_high() } else { high };
        let ratio = ratio.detach();
        Ok(Terms {
            loss,
            statistics: [
                kl.detach(),
                entropy.shallow_clone(),
                is(ratio.f_lt(low)?)?.f_mul(&worse)?,
                is(ratio.f_gt(above)?)?.f_mul(&better)?,
                difference.f_abs()?,
                correction,
            ],
        })
    }

    /// `exp(log pi_old - log pi_sampler)`, of the token or of the whole completion, cut to what is allowed; `[N]`.
    fn correction(&self, difference: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        use ImportanceSamplingMode::{SequenceMask, SequenceTruncate, TokenMask, TokenTruncate};
        let args = self.arguments;
        let mode = args.importance_sampling_mode;
        let ratio = match mode {
            TokenTruncate | TokenMask => difference.f_exp()?,
            SequenceTruncate | SequenceMask => sequences.sum(difference)?.f_exp()?,
        };
        let (least, most) = (args.importance_sampling_clip_min, args.importance_sampling_clip_max);
        let (least, most) = (least.unwrap_or(0.0), most.unwrap_or(f64::INFINITY));
        Ok(match mode {
            TokenTruncate | SequenceTruncate => ratio.f_clamp(least, most)?,
            TokenMask | SequenceMask => {
                let outside = ratio.f_lt(least)?.f_logical_or(&ratio.f_gt(most)?)?;
                ratio.f_masked_fill(&outside, 0.0)?
            }
        })
    }

    fn note(&self, terms: &Terms, columns: &Tensor) -> Result<()> {
        let counted = counted(columns)?;
        let mut sums = vec![counted.f_sum(Kind::Float)?];
        for values in &terms.statistics {
            sums.push(values.f_mul(&counted)?.f_sum(Kind::Float)?);
        }
        let sums = Tensor::f_stack(&sums, 0)?;
        let difference = &terms.statistics[Sums::Difference as usize - 1];
        let largest = difference.f_max()?.f_to_kind(Kind::Float)?;
        let mut kept = self.sums.borrow_mut();
        let _ = kept.get_or_insert_with(|| sums.zeros_like()).f_add_(&sums)?;
        let mut kept = self.largest.borrow_mut();
        let kept = kept.get_or_insert_with(|| largest.zeros_like());
        kept.f_copy_(&kept.f_maximum(&largest)?)?;
        Ok(())
    }
}

/// 1 where a token counts, else 0.
fn counted(columns: &Tensor) -> Result<Tensor> {
    Ok(columns.f_select(0, column::WEIGHT as i64)?.f_gt(0.0)?.f_to_kind(columns.kind())?)
}

/// Sums and means over the counted tokens of each completion, given to all of its rows.
struct Sequences<'a> {
    /// int64 `[N]`: the completion of a row.
    of_row: Tensor,
    counted: &'a Tensor,
    /// Of completions.
    count: i64,
}

impl<'a> Sequences<'a> {
    fn new(columns: &Tensor, counted: &'a Tensor, count: i64) -> Result<Sequences<'a>> {
        let of_row = columns.f_select(0, column::SEQUENCE as i64)?.f_to_kind(Kind::Int64)?;
        Ok(Sequences { of_row, counted, count })
    }

    fn sum(&self, values: &Tensor) -> Result<Tensor> {
        let zeros = Tensor::f_zeros([self.count], (values.kind(), values.device()))?;
        let sums = zeros.f_index_add(0, &self.of_row, &values.f_mul(self.counted)?)?;
        Ok(sums.f_index_select(0, &self.of_row)?)
    }

    fn mean(&self, values: &Tensor) -> Result<Tensor> {
        Ok(self.sum(values)?.f_div(&self.sum(self.counted)?.f_clamp_min(1.0)?)?)
    }
}

impl Objective for Grpo<'_> {
    fn loss_sum(&self, decoder: &Decoder, batch: &DeviceBatch, pass: Pass) -> Result<Tensor> {
        let (log_probs, entropy) =
            decoder.batch_log_probs_and_entropy(batch, self.arguments.temperature, pass)?;
        let terms = self.terms(&log_probs, &entropy, batch)?;
        self.note(&terms, &batch.extra[0].f_to_kind(log_probs.kind())?)?;
        let weight = batch.extra[0].f_select(0, column::WEIGHT as i64)?;
        Ok(terms.loss.f_mul(&weight)?.f_sum(log_probs.kind())?)
    }

    /// The weights of the tokens hold the division.
    fn targets(&self, _batch: &Batch) -> usize {
        0
    }

    fn upload(&self, decoder: &Decoder, batch: &Batch) -> Result<DeviceBatch> {
        let mut on_device = upload(decoder, batch)?;
        let shape = [batch.columns.len() as i64, batch.tokens() as i64];
        let columns = Tensor::f_from_slice(&batch.columns.concat())?.f_view(shape)?;
        on_device.extra = vec![columns.f_to_device(decoder.device)?];
        Ok(on_device)
    }

    /// With top_entropy_quantile, the entropy that a token must reach, of all micro-batches together, so that their split changes
    /// nothing.
    fn start_step(&self, decoder: &Decoder, batches: &[Batch]) -> Result<()> {
        if self.arguments.top_entropy_quantile == 1.0 {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        let mut entropies = Vec::with_capacity(batches.len());
        for batch in batches {
            let batch = self.upload(decoder, batch)?;
            let (_, entropy) =
                decoder.batch_log_probs_and_entropy(&batch, self.arguments.temperature, Pass::INFERENCE)?;
            let counts = batch.extra[0].f_select(0, column::WEIGHT as i64)?.f_gt(0.0)?;
            entropies.push(entropy.f_masked_select(&counts)?);
        }
        let all = Tensor::f_cat(&entropies, 0)?;
        let least = match all.numel() {
            0 => Tensor::f_zeros([0i64; 0], (all.kind(), all.device()))?,
            _ => quantile(&all, 1.0 - self.arguments.top_entropy_quantile)?,
        };
        // In place, as a recorded step reads it there.
        self.least_entropy.borrow_mut().get_or_insert_with(|| least.copy()).f_copy_(&least)?;
        Ok(())
    }

    /// TRL's names. `clip_ratio/*` are shares of tokens, also where a ratio belongs to a whole completion.
    fn measured(&self) -> Result<Vec<Measured>> {
        let (sums, largest) = (self.sums.borrow(), self.largest.borrow());
        let (Some(sums), Some(largest)) = (&*sums, &*largest) else { return Ok(Vec::new()) };
        let all = Tensor::f_cat(&[sums.shallow_clone(), largest.f_reshape([1])?], 0)?;
        let numbers: Vec<f64> = all.f_to_kind(Kind::Double)?.try_into()?;
        let _ = (sums.shallow_clone().f_zero_()?, largest.shallow_clone().f_zero_()?);
        let count = numbers[Sums::Tokens as usize];
        let mean = |name, of: Sums| Measured { name, sum: numbers[of as usize], count };
        let mut measured = vec![mean("entropy", Sums::Entropy)];
        if self.arguments.beta != 0.0 {
            measured.push(mean("kl", Sums::Kl));
        }
        match self.arguments.loss_type {
            LossType::Sapo => {}
            LossType::Cispo => measured.push(mean("cispo_clip_ratio", Sums::HighClipped)),
            _ => {
                measured.push(mean("clip_ratio/low_mean", Sums::LowClipped));
                measured.push(mean("clip_ratio/high_mean", Sums::HighClipped));
                let sum = numbers[Sums::LowClipped as usize] + numbers[Sums::HighClipped as usize];
                measured.push(Measured { name: "clip_ratio/region_mean", sum, count });
            }
        }
        measured.push(mean("sampling/sampling_logp_difference/mean", Sums::Difference));
        measured.push(mean("sampling/importance_sampling_ratio/mean", Sums::Ratio));
        let sum = numbers[numbers.len() - 1];
        measured.push(Measured { name: "sampling/sampling_logp_difference/max", sum, count: 1.0 });
        Ok(measured)
    }

    fn config(&self) -> Result<String> {
        self.arguments.own_yaml()
    }
}

/// Writes what the loss takes from before the steps on `batches` into their columns: the log-probabilities of the policy as it is
/// now, where several steps follow, and of the reference, where beta is not 0.
pub fn add_log_probs(decoder: &Decoder, arguments: &GrpoArguments, batches: &mut [Batch]) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let log_probs = |batch: &Batch, pass| -> Result<Vec<f32>> {
        let found = decoder.batch_log_probs(&upload(decoder, batch)?, arguments.temperature, pass)?;
        Ok(found.f_to_kind(Kind::Float)?.try_into()?)
    };
    for batch in batches {
        if arguments.is_off_policy() {
            batch.columns[column::OLD] = log_probs(batch, Pass::INFERENCE)?;
        }
        if arguments.beta != 0.0 {
            let reference = Pass { without_lora: true, ..Pass::INFERENCE };
            batch.columns[column::REFERENCE] = log_probs(batch, reference)?;
        }
    }
    Ok(())
}

/// By linear interpolation, as torch.quantile, which takes no more than 2^24 numbers.
fn quantile(values: &Tensor, quantile: f64) -> Result<Tensor> {
    let (sorted, _) = values.f_sort(0, false)?;
    let place = quantile * (sorted.size()[0] - 1) as f64;
    let (below, above) = (place.floor() as i64, place.ceil() as i64);
    Ok(sorted.f_select(0, below)?.f_lerp(&sorted.f_select(0, above)?, place - below as f64)?)
}
