//! From completions to micro-batches: samples side by side without padding, and the numbers beside them that the loss reads.

use super::{GrpoArguments, LossType};
use crate::data::{Batch, IGNORE_INDEX};

/// Columns of [`Batch::columns`]. Each number stands on the row that predicts its token; prompts have zeros.
pub(super) mod column {
    /// What the token's loss is multiplied by, 0 where it counts nothing: all averaging is in it.
    pub const WEIGHT: usize = 0;
    pub const ADVANTAGE: usize = 1;
    /// Log-probability in the distribution that the sampler drew from.
    pub const SAMPLER: usize = 2;
    /// Number of the sample in its micro-batch.
    pub const SEQUENCE: usize = 3;
    /// Log-probability by the policy before the steps on these completions; unused where there is one step.
    pub const OLD: usize = 4;
    /// Log-probability by the reference; unused where beta is 0.
    pub const REFERENCE: usize = 5;
    pub const COUNT: usize = 6;
}

/// One completion and what the loss needs to know of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Completion {
    pub prompt_ids: Vec<i64>,
    pub completion_ids: Vec<i64>,
    /// One for each token of the completion.
    pub sampler_log_probs: Vec<f32>,
    /// It ended at the longest length, not at a stop token.
    pub truncated: bool,
    pub advantage: f64,
}

/// The micro-batches of a generation batch, `per_device_train_batch_size` completions each: `gradient_accumulation_steps` of them
/// are an optimizer step. With `m` tokens that count in completion i (all of them, or none where truncated ones are masked), `B`
/// completions in a step and `M` counted tokens in it, a token's loss is multiplied by
///
/// ```text
/// grpo, sapo   1 / (m_i B)                                bnpo    1 / M
/// dapo, cispo  1 / (mean of M over the generation's steps)     dr_grpo 1 / (B max_completion_length)
/// luspo        1 / B
/// ```
///
/// so that a step's loss is the sum of its tokens' and its split into micro-batches changes nothing.
///
/// With `shares_prompts` completions of the same prompt in a micro-batch share its rows, all but the last, which predicts a token of
/// each. That needs ropes that turn a prompt alike whatever follows it.
pub fn step_batches(
    completions: &[Completion],
    arguments: &GrpoArguments,
    shares_prompts: bool,
) -> Vec<Batch> {
    let rows = arguments.training.per_device_train_batch_size;
    let of_step = rows * arguments.training.gradient_accumulation_steps;
    let counted = |completion: &Completion| {
        let masked = arguments.mask_truncated_completions && completion.truncated;
        if masked { 0 } else { completion.completion_ids.len() }
    };
    let steps = completions.len().div_ceil(of_step).max(1);
    let tokens = |completions: &[Completion]| completions.iter().map(counted).sum::<usize>().max(1) as f64;
    let tokens_per_step = tokens(completions) / steps as f64;
    let mut batches = Vec::new();
    for step in completions.chunks(of_step) {
        let (sequences, step_tokens) = (step.len() as f64, tokens(step));
        let weight = |completion: &Completion| match (counted(completion), arguments.loss_type) {
            (0, _) => 0.0,
            (m, LossType::Grpo | LossType::Sapo) => 1.0 / (m as f64 * sequences),
            (_, LossType::Bnpo) => 1.0 / step_tokens,
            (_, LossType::DrGrpo) => 1.0 / (sequences * arguments.max_completion_length as f64),
            (_, LossType::Dapo | LossType::Cispo) => 1.0 / tokens_per_step,
            (_, LossType::Luspo) => 1.0 / sequences,
        };
        batches.extend(step.chunks(rows).map(|completions| batch(completions, weight, shares_prompts)));
    }
    batches
}

fn batch(completions: &[Completion], weight: impl Fn(&Completion) -> f64, shares_prompts: bool) -> Batch {
    let mut batch = Batch::default();
    // Completions in the order of their segments, and these.
    let mut placed = Vec::with_capacity(completions.len());
    for (first, completion) in completions.iter().enumerate() {
        let prompt = &completion.prompt_ids;
        if completions[..first].iter().any(|before| before.prompt_ids == *prompt) {
            continue;
        }
        let group: Vec<&Completion> =
            completions[first..].iter().filter(|other| other.prompt_ids == *prompt).collect();
        let shared = if shares_prompts && group.len() > 1 { prompt.len() - 1 } else { 0 };
        let prefix = (shared > 0).then(|| {
            batch.push_segment(None, &prompt[..shared], &vec![IGNORE_INDEX; shared]);
            batch.cu_seqlens.len() - 2
        });
        for completion in group {
            let own = &prompt[shared..];
            let labels = [vec![IGNORE_INDEX; own.len()], completion.completion_ids.clone()].concat();
            batch.push_segment(prefix, &[own, &completion.completion_ids].concat(), &labels);
            placed.push((batch.cu_seqlens.len() - 2, completion));
        }
    }
    if batch.prefixes.iter().all(|&prefix| prefix < 0) {
        batch.prefixes.clear();
    }
    batch.columns = vec![vec![0.0; batch.tokens()]; column::COUNT];
    for (sequence, (segment, completion)) in placed.into_iter().enumerate() {
        let rows = batch.cu_seqlens[segment] as usize..batch.cu_seqlens[segment + 1] as usize;
        batch.columns[column::SEQUENCE][rows.clone()].fill(sequence as f32);
        let predicting = rows.end - 1 - completion.completion_ids.len()..rows.end - 1;
        batch.columns[column::WEIGHT][predicting.clone()].fill(weight(completion) as f32);
        batch.columns[column::ADVANTAGE][predicting.clone()].fill(completion.advantage as f32);
        batch.columns[column::SAMPLER][predicting].copy_from_slice(&completion.sampler_log_probs);
    }
    batch
}
