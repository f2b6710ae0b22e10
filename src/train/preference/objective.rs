//! Preference losses as an objective: one forward pass for both sides of the pairs.

use std::cell::Cell;

use anyhow::{Context, Result, bail};
use tch::{Kind, Tensor};

use super::losses::{Kto, PairLogProbs};
use super::{LossType, PreferenceArguments};
use crate::data::{Batch, Preference};
use crate::device;
use crate::models::{Decoder, DeviceBatch};
use crate::ops::Pass;
use crate::train::objective::{Measured, Objective, upload};

/// Places of the sums that a step measures.
const CHOSEN: i64 = 0;
const REJECTED: i64 = 1;
const ACCURACIES: i64 = 2;
const LOG_PROBS_CHOSEN: i64 = 3;
const LOG_PROBS_REJECTED: i64 = 4;
const NLL: i64 = 5;
const MEASURED: i64 = 6;

/// DPO and its family. The loss of a step is the mean over its pairs (KTO: its examples), with NLL terms as the mean over its
/// chosen tokens, so any split into micro-batches gives the same gradient.
///
/// With `precomputes` the batches carry the reference's log-probabilities; else each pass runs once more without the adapter.
pub struct PreferenceLoss<'a> {
    args: &'a PreferenceArguments,
    /// On the device, so that a recorded step reads and adds to them: what is measured `[MEASURED]`,
    sums: Tensor,
    /// of the step's pairs, how many there are a chosen token, and a chosen token of prompt or completion,
    pairs_per_token: Tensor,
    pairs_per_whole_token: Tensor,
    /// and KTO's z.
    z: Tensor,
    counts: Cell<Counts>,
}

/// Of a step.
#[derive(Clone, Copy, Default)]
struct Counts {
    pairs: usize,
    chosen: usize,
    /// Predicted tokens of chosen completions, and of all of chosen samples.
    chosen_tokens: usize,
    chosen_whole_tokens: usize,
}

impl<'a> PreferenceLoss<'a> {
    pub fn new(args: &'a PreferenceArguments, decoder: &Decoder) -> Result<PreferenceLoss<'a>> {
        let kind = if decoder.kind == Kind::Double { Kind::Double } else { Kind::Float };
        let zeros = |size: &[i64]| Tensor::f_zeros(size, (kind, decoder.device));
        Ok(PreferenceLoss {
            args,
            sums: zeros(&[MEASURED])?,
            pairs_per_token: zeros(&[])?,
            pairs_per_whole_token: zeros(&[])?,
            z: zeros(&[])?,
            counts: Cell::default(),
        })
    }

    fn is_kto(&self) -> bool {
        self.args.has(LossType::Kto)
    }

    /// Notes `values` for the mean of what `at` measures.
    fn measure(&self, at: i64, values: &Tensor) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let sum = values.f_sum(self.sums.kind())?;
        let _ = self.sums.f_select(0, at)?.f_add_(&sum)?;
        Ok(())
    }

    /// The reference's log-probabilities of the completions, `[S]`.
    fn reference(&self, decoder: &Decoder, batch: &DeviceBatch) -> Result<Tensor> {
        if self.args.precomputes() {
            return Ok(extra(batch, REFERENCES)?.f_to_kind(self.sums.kind())?);
        }
        let _no_grad = tch::no_grad_guard();
        let sums = completion_log_probs(decoder, batch, Pass { without_lora: true, ..Pass::INFERENCE })?;
        Ok(sums.f_narrow(0, 0, sums.size()[0] / 2)?)
    }

    /// KTO's estimate: the mean log-ratio of the mismatched samples, at least 0.
    fn estimate_z(&self, decoder: &Decoder, batches: &[Batch]) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let mut total = self.z.f_zeros_like()?;
        for batch in batches {
            let batch = upload_samples(decoder, &every_other(batch, 1))?;
            let sums = completion_log_probs(decoder, &batch, Pass::INFERENCE)?;
            let ours = sums.f_narrow(0, 0, sums.size()[0] / 2)?;
            total = total.f_add(&ours.f_sub(&self.reference(decoder, &batch)?)?.f_sum(self.sums.kind())?)?;
        }
        let samples: usize = batches.iter().map(|batch| batch.samples() / 2).sum();
        let z = total.f_div_scalar(samples.max(1) as f64)?.f_clamp_min(0.0)?;
        self.z.shallow_clone().f_copy_(&z)?;
        Ok(())
    }

    fn pair_loss(&self, decoder: &Decoder, batch: &DeviceBatch, sums: &Tensor) -> Result<Tensor> {
        let samples = sums.size()[0] / 2;
        // Chosen and rejected take turns.
        let of = |tensor: &Tensor, side: i64| tensor.f_slice(0, side, samples, 2);
        let lengths = extra(batch, LENGTHS)?.f_to_kind(self.sums.kind())?;
        let reference = match self.args.has_reference() {
            true => {
                let all = self.reference(decoder, batch)?;
                Some((of(&all, 0)?, of(&all, 1)?))
            }
            false => None,
        };
        let pairs = PairLogProbs {
            chosen: of(sums, 0)?,
            rejected: of(sums, 1)?,
            chosen_len: of(&lengths, 0)?,
            rejected_len: of(&lengths, 1)?,
            reference,
        };
        let mut total = self.z.f_zeros_like()?;
        for (loss, weight) in self.args.losses() {
            let losses = pairs.loss(loss, self.args)?;
            total = total.f_add(&losses.f_sum(self.sums.kind())?.f_mul_scalar(weight)?)?;
        }
        let (of_completions, of_whole) = self.args.nll_weights();
        if of_completions > 0.0 || of_whole > 0.0 {
            let completions = pairs.chosen.f_sum(self.sums.kind())?.f_neg()?;
            if of_completions > 0.0 {
                let nll = completions.f_mul(&self.pairs_per_token)?;
                total = total.f_add(&nll.f_mul_scalar(of_completions)?)?;
            }
            if of_whole > 0.0 {
                let prompts = sums.f_slice(0, samples, 2 * samples, 2)?;
                let whole = completions.f_sub(&prompts.f_sum(self.sums.kind())?)?;
                total = total.f_add(&whole.f_mul(&self.pairs_per_whole_token)?.f_mul_scalar(of_whole)?)?;
            }
            self.measure(NLL, &completions)?;
        }
        let (chosen, rejected) = pairs.scores(self.args.loss_type[0])?;
        self.measure(CHOSEN, &chosen)?;
        self.measure(REJECTED, &rejected)?;
        self.measure(ACCURACIES, &chosen.f_gt_tensor(&rejected)?)?;
        self.measure(LOG_PROBS_CHOSEN, &pairs.chosen)?;
        self.measure(LOG_PROBS_REJECTED, &pairs.rejected)?;
        Ok(total)
    }

    fn kto_loss(&self, decoder: &Decoder, batch: &DeviceBatch, sums: &Tensor) -> Result<Tensor> {
        let ours = sums.f_narrow(0, 0, sums.size()[0] / 2)?;
        let desirable = extra(batch, IS_CHOSEN)?.f_to_kind(self.sums.kind())?;
        let log_ratio = ours.f_sub(&self.reference(decoder, batch)?)?;
        let undesirable = desirable.f_neg()?.f_add_scalar(1.0)?;
        for (at, values, which) in [
            (CHOSEN, &log_ratio, &desirable),
            (REJECTED, &log_ratio, &undesirable),
            (LOG_PROBS_CHOSEN, &ours, &desirable),
            (LOG_PROBS_REJECTED, &ours, &undesirable),
        ] {
            self.measure(at, &values.f_detach()?.f_mul(which)?)?;
        }
        let kto = Kto { log_ratio, desirable, z: self.z.shallow_clone() };
        Ok(kto.loss(self.args)?.f_sum(self.sums.kind())?)
    }
}

impl Objective for PreferenceLoss<'_> {
    fn loss_sum(&self, decoder: &Decoder, batch: &DeviceBatch, pass: Pass) -> Result<Tensor> {
        // The reference has no dropout to compare with.
        let sums = completion_log_probs(decoder, batch, Pass { dropout: None, ..pass })?;
        match self.is_kto() {
            true => self.kto_loss(decoder, batch, &sums),
            false => self.pair_loss(decoder, batch, &sums),
        }
    }

    fn targets(&self, batch: &Batch) -> usize {
        batch.samples() / 2
    }

    fn upload(&self, decoder: &Decoder, batch: &Batch) -> Result<DeviceBatch> {
        match self.is_kto() {
            true => upload_samples(decoder, &every_other(batch, 0)),
            false => upload_samples(decoder, batch),
        }
    }

    fn start_step(&self, decoder: &Decoder, batches: &[Batch]) -> Result<()> {
        let mut counts = Counts::default();
        for batch in batches {
            counts.pairs += batch.samples() / 2;
            for (sample, known) in
                batch.preferences.iter().enumerate().step_by(2).filter(|(_, known)| known.chosen)
            {
                let length = sample_range(batch, sample).len();
                counts.chosen += 1;
                counts.chosen_tokens += completion_len(length, known);
                counts.chosen_whole_tokens += length - 1;
            }
        }
        self.counts.set(counts);
        let _ = self.sums.shallow_clone().f_zero_()?;
        let share = |tokens: usize| counts.pairs as f64 / tokens.max(1) as f64;
        let _ = self.pairs_per_token.shallow_clone().f_fill_(share(counts.chosen_tokens))?;
        let _ = self.pairs_per_whole_token.shallow_clone().f_fill_(share(counts.chosen_whole_tokens))?;
        match self.is_kto() {
            true => self.estimate_z(decoder, batches),
            false => Ok(()),
        }
    }

    fn measured(&self) -> Result<Vec<Measured>> {
        let sums: Vec<f64> = self.sums.f_to_kind(Kind::Double)?.try_into()?;
        let counts = self.counts.get();
        let sum = |at: i64| sums[at as usize];
        let (chosen, rejected) = match self.is_kto() {
            true => (counts.chosen, counts.pairs - counts.chosen),
            false => (counts.pairs, counts.pairs),
        };
        let (of_chosen, of_rejected) = (self.args.beta * sum(CHOSEN), self.args.beta * sum(REJECTED));
        let mut all = vec![
            ("rewards/chosen", of_chosen, chosen),
            ("rewards/rejected", of_rejected, rejected),
            ("logps/chosen", sum(LOG_PROBS_CHOSEN), chosen),
            ("logps/rejected", sum(LOG_PROBS_REJECTED), rejected),
        ];
        if self.is_kto() {
            // Its sides have numbers of their own; weighted by the smaller one where steps are added.
            let weight = chosen.min(rejected);
            let margin = of_chosen / chosen.max(1) as f64 - of_rejected / rejected.max(1) as f64;
            all.push(("rewards/margins", margin * weight as f64, weight));
            all.push(("kl", self.z.f_double_value(&[])? * counts.pairs as f64, counts.pairs));
        } else {
            all.push(("rewards/margins", of_chosen - of_rejected, chosen));
            all.push(("rewards/accuracies", sum(ACCURACIES), chosen));
        }
        let nll = self.args.nll_weights();
        if nll.0 > 0.0 || nll.1 > 0.0 {
            all.push(("nll_loss", sum(NLL), counts.chosen_tokens));
        }
        let measured = |(name, sum, count)| Measured { name, sum, count: count as f64 };
        Ok(all.into_iter().map(|(name, sum, count)| measured((name, sum, count))).collect())
    }

    fn config(&self) -> Result<String> {
        self.args.own_yaml()
    }
}

/// Places in [`DeviceBatch::extra`].
const GROUPS: usize = 0;
const LENGTHS: usize = 1;
const IS_CHOSEN: usize = 2;
const REFERENCES: usize = 3;

fn extra(batch: &DeviceBatch, at: usize) -> Result<&Tensor> {
    batch.extra.get(at).context("the batch has no preferences")
}

fn sample_range(batch: &Batch, sample: usize) -> std::ops::Range<usize> {
    batch.cu_seqlens[sample] as usize..batch.cu_seqlens[sample + 1] as usize
}

/// Predicted tokens of the completion of a sample of `length` tokens.
fn completion_len(length: usize, known: &Preference) -> usize {
    length - (known.prompt_len as usize).max(1)
}

/// The samples `first`, `first + 2`, .. of a batch.
fn every_other(batch: &Batch, first: usize) -> Batch {
    let samples = || (first..batch.samples()).step_by(2);
    let of = |sample| {
        let range = sample_range(batch, sample);
        (&batch.input_ids[range.clone()], &batch.labels[range])
    };
    let preferences = samples().filter_map(|sample| batch.preferences.get(sample).copied()).collect();
    Batch { preferences, ..Batch::from_samples(samples().map(of)) }
}

/// The batch on the device with, of its S samples: int64 `[N]`, where each row's target counts (s, the completion of sample s; S + s,
/// its prompt); the predicted tokens of the completions and whether they are chosen, int64 `[S]`; the reference's log-probabilities,
/// f64 `[S]`.
pub(super) fn upload_samples(decoder: &Decoder, batch: &Batch) -> Result<DeviceBatch> {
    let samples = batch.samples();
    if batch.preferences.len() != samples {
        bail!("{} samples and {} preferences", samples, batch.preferences.len());
    }
    let mut groups = Vec::with_capacity(batch.tokens());
    let mut lengths = Vec::with_capacity(samples);
    for (sample, known) in batch.preferences.iter().enumerate() {
        let length = sample_range(batch, sample).len();
        let in_completion = |row: usize| row + 1 >= known.prompt_len as usize;
        groups
            .extend((0..length).map(|row| if in_completion(row) { sample } else { samples + sample } as i64));
        lengths.push(completion_len(length, known) as i64);
    }
    let is_chosen: Vec<i64> = batch.preferences.iter().map(|known| i64::from(known.chosen)).collect();
    let bits = |known: &Preference| f64::from(known.reference.unwrap_or(0.0)).to_bits() as i64;
    let references: Vec<i64> = batch.preferences.iter().map(bits).collect();
    let mut uploaded = upload(decoder, batch)?;
    for values in [&groups, &lengths, &is_chosen, &references] {
        uploaded.extra.push(device::upload(values, decoder.device)?);
    }
    uploaded.extra[REFERENCES] = uploaded.extra[REFERENCES].f_view_dtype(Kind::Double)?;
    Ok(uploaded)
}

/// `[2 S]`: the log-probability of each completion, then of the trained tokens of each prompt.
pub(super) fn completion_log_probs(decoder: &Decoder, batch: &DeviceBatch, pass: Pass) -> Result<Tensor> {
    let log_probs = decoder.batch_log_probs(batch, 1.0, pass)?;
    let samples = extra(batch, LENGTHS)?.size()[0];
    let zeros = Tensor::f_zeros([2 * samples], (log_probs.kind(), decoder.device))?;
    Ok(zeros.f_index_add(0, extra(batch, GROUPS)?, &log_probs)?)
}
