//! From a row of logits to a token.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Logprobs, SamplingParams};
use crate::ops::Draw;

/// Chooses tokens for one sequence. Its generator is its own: equal parameters, stream and logits give equal tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    /// `[V]`: whether a token has occurred; empty where no repetition penalty asks for it.
    seen: Vec<bool>,
    /// How often the answer contains a token; empty where no penalty asks for it.
    counts: HashMap<i64, u32>,
    /// The tokens left by the filters with their weights; kept between tokens for its memory.
    kept: Vec<Candidate>,
    logprob: f64,
}

pub(super) const NO_LOGITS: &str =
    "the model's logits are NaN or infinite: try --dtype f32, and check the weights";

#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: usize,
    score: f32,
    /// `exp(score - best score)`.
    weight: f64,
}

impl Sampler {
    /// `stream` tells apart the samples of one seed; `prompt` counts for the repetition penalty. Ids must be below
    /// `vocab_size`.
    pub fn new(params: &SamplingParams, stream: u64, prompt: &[i64], vocab_size: usize) -> Sampler {
        let mut rng = ChaCha8Rng::seed_from_u64(params.seed);
        rng.set_stream(stream);
        let seen = if params.repetition_penalty == 1.0 { Vec::new() } else { vec![false; vocab_size] };
        let mut sampler = Sampler {
            params: params.clone(),
            rng,
            seen,
            counts: HashMap::new(),
            kept: Vec::new(),
            logprob: 0.0,
        };
        for &id in prompt {
            sampler.mark(id);
        }
        sampler
    }

    /// A sampler with what this one has seen and another stream of the seed, from its start.
    pub fn stream(&self, stream: u64) -> Sampler {
        let mut rng = ChaCha8Rng::seed_from_u64(self.params.seed);
        rng.set_stream(stream);
        Sampler { rng, ..self.clone() }
    }

    /// The next token, drawn from what the filters leave of `logits` `[V]`, which are changed.
    ///
    /// # Errors
    /// Logits that are NaN or infinite.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<i64> {
        self.penalise(logits);
        let best = best(logits)?;
        let id = if self.params.temperature == 0.0 {
            self.logprob = 0.0;
            best
        } else {
            self.filter(logits, best);
            self.draw()
        };
        self.note(id as i64);
        Ok(id as i64)
    }

    /// The log-probability of the last token in the distribution that it was drawn from: after penalties, temperature and filters.
    pub fn logprob(&self) -> f64 {
        self.logprob
    }

    /// The next draw, for a device that applies the filters itself; [`take`](Sampler::take) then gets its token.
    pub(super) fn draw_elsewhere(&mut self) -> Draw {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        let uniform = if temperature == 0.0 { 0.0 } else { self.rng.random::<f64>() };
        Draw { temperature, top_k, top_p, min_p, uniform }
    }

    /// The token that the device drew, with its log-probability in the distribution that it was drawn from.
    pub(super) fn take(&mut self, id: i64, logprob: f32) {
        self.logprob = f64::from(logprob);
        self.note(id);
    }

    /// A token of the answer, which counts for the penalties.
    fn note(&mut self, id: i64) {
        self.mark(id);
        if self.params.presence_penalty != 0.0 || self.params.frequency_penalty != 0.0 {
            *self.counts.entry(id).or_default() += 1;
        }
    }

    /// Whether penalties change any logit.
    pub(super) fn penalises(&self) -> bool {
        !self.seen.is_empty() || !self.counts.is_empty()
    }

    /// What the penalties do to the logits: of each token that has occurred, what its logit is divided by (multiplied, if it is
    /// negative), and what is then taken from it.
    pub(super) fn penalties(&self) -> impl Iterator<Item = (i64, f64, f64)> {
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.params;
        let count = |id: i64| self.counts.get(&id).copied();
        let taken = move |count: u32| presence_penalty + frequency_penalty * f64::from(count);
        let seen = (0..).zip(&self.seen).filter(|(_, seen)| **seen).map(|(id, _)| id);
        let counted = self.counts.keys().copied().filter(|_| self.seen.is_empty());
        seen.chain(counted).map(move |id| (id, repetition_penalty, count(id).map_or(0.0, taken)))
    }

    /// The probabilities `[V]` that [`sample`](Sampler::sample) would draw from.
    pub fn probabilities(&mut self, logits: &mut [f32]) -> Result<Vec<f64>> {
        self.penalise(logits);
        let best = best(logits)?;
        let mut probabilities = vec![0.0; logits.len()];
        if self.params.temperature == 0.0 {
            probabilities[best] = 1.0;
        } else {
            self.filter(logits, best);
            let total: f64 = self.kept.iter().map(|candidate| candidate.weight).sum();
            for candidate in &self.kept {
                probabilities[candidate.id] = candidate.weight / total;
            }
        }
        Ok(probabilities)
    }

    fn mark(&mut self, id: i64) {
        if let Some(seen) = self.seen.get_mut(id as usize) {
            *seen = true;
        }
    }

    fn penalise(&self, logits: &mut [f32]) {
        let penalty = self.params.repetition_penalty as f32;
        for (logit, _) in logits.iter_mut().zip(&self.seen).filter(|(_, seen)| **seen) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
        let SamplingParams { presence_penalty, frequency_penalty, .. } = self.params;
        for (&id, &count) in &self.counts {
            logits[id as usize] -= (presence_penalty + frequency_penalty * f64::from(count)) as f32;
        }
    }

    /// Fills `kept`: temperature, top-k, top-p, min-p, in this order.
    fn filter(&mut self, logits: &mut [f32], best: usize) {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        for logit in logits.iter_mut() {
            *logit /= temperature as f32;
        }
        let highest = logits[best];
        let candidate =
            |(id, &score): (usize, &f32)| Candidate { id, score, weight: f64::from(score - highest).exp() };
        self.kept.clear();
        self.kept.extend(logits.iter().enumerate().map(candidate));
        if top_k > 0 && top_k < self.kept.len() {
            let (_, last, _) =
                self.kept.select_nth_unstable_by(top_k - 1, |a, b| b.score.total_cmp(&a.score));
            let lowest = last.score;
            self.kept.retain(|candidate| candidate.score >= lowest);
        }
        if top_p < 1.0 {
            self.keep_top_p(top_p);
        }
        if min_p > 0.0 {
            self.kept.retain(|candidate| candidate.weight >= min_p);
        }
        // An order of their own, whatever the filters did: the draw depends on it.
        self.kept.sort_unstable_by_key(|candidate| candidate.id);
    }

    /// Drops the least likely tokens as long as all dropped together have at most the probability `1 - top_p`.
    fn keep_top_p(&mut self, top_p: f64) {
        let total: f64 = self.kept.iter().map(|candidate| candidate.weight).sum();
        let budget = (1.0 - top_p) * total;
        // Tokens below budget / n go in any case, together they are less than the budget: most of a large vocabulary
        // never needs sorting.
        let share = budget / self.kept.len() as f64;
        let mut dropped = 0.0;
        self.kept.retain(|candidate| {
            let keep = candidate.weight >= share;
            dropped += if keep { 0.0 } else { candidate.weight };
            keep
        });
        self.kept.sort_unstable_by(|a, b| a.score.total_cmp(&b.score).then(a.id.cmp(&b.id)));
        let mut first = 0;
        while first + 1 < self.kept.len() && dropped + self.kept[first].weight <= budget {
            dropped += self.kept[first].weight;
            first += 1;
        }
        self.kept.drain(..first);
    }

    fn draw(&mut self) -> usize {
        let total: f64 = self.kept.iter().map(|candidate| candidate.weight).sum();
        let mut left = self.rng.random::<f64>() * total;
        let mut chosen = self.kept[0];
        for candidate in self.kept.iter().filter(|candidate| candidate.weight > 0.0) {
            chosen = *candidate;
            left -= candidate.weight;
            if left < 0.0 {
                break;
            }
        }
        self.logprob = (chosen.weight / total).ln();
        chosen.id
    }
}

/// `log softmax(logits)` of `id` and of the `top` likeliest tokens, equals in the order of their ids.
pub fn logprobs(logits: &[f32], id: i64, top: usize) -> Logprobs {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - highest).exp()).sum();
    let logprob = |id: usize| (f64::from(logits[id] - highest) - sum.ln()) as f32;
    let order = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    let top = top.min(ids.len());
    if top > 0 && top < ids.len() {
        ids.select_nth_unstable_by(top - 1, order);
    }
    ids.truncate(top);
    ids.sort_unstable_by(order);
    let top = ids.into_iter().map(|id| (id as i64, logprob(id))).collect();
    Logprobs { logprob: logprob(id as usize), top }
}

/// Index of the largest logit, the first of equals.
fn best(logits: &[f32]) -> Result<usize> {
    /// Side by side, so that a vector of them is one comparison.
    const LANES: usize = 16;
    let (mut largest, mut invalid) = ([f32::NEG_INFINITY; LANES], [0_u32; LANES]);
    let mut compare = |some: &[f32]| {
        for ((largest, invalid), &logit) in largest.iter_mut().zip(&mut invalid).zip(some) {
            *largest = if logit > *largest { logit } else { *largest };
            // Infinite or NaN; a masked token may have -inf.
            *invalid |= u32::from(logit.is_nan() || logit == f32::INFINITY);
        }
    };
    let (whole, rest) = logits.as_chunks::<LANES>();
    whole.iter().for_each(|some| compare(some));
    compare(rest);
    let highest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if invalid != [0; LANES] || highest == f32::NEG_INFINITY {
        bail!(NO_LOGITS);
    }
    logits.iter().position(|&logit| logit == highest).context(NO_LOGITS)
}
