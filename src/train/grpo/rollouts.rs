//! Completions by the model in training, judged and made ready for its steps.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::advantages::{mean, std};
use super::batches::{Completion, step_batches};
use super::loss::add_log_probs;
use super::writer::Writer;
use super::{GrpoArguments, Prompt, Prompts, advantages};
use crate::data::{Batch, shuffle};
use crate::generate::{FinishReason, Generation, Request, SamplingParams};
use crate::models::FastLanguageModel;
use crate::rewards::{Rewards, Sample, Scores, Stop};
use crate::train::observer::{CompletionRow, Completions};
use crate::train::{Evaluation, Interrupted, StepSource};

/// Lets the model answer prompts, judges the answers, and gives them out as micro-batches: `num_iterations` times those of a
/// generation batch of `steps_per_generation` micro-batches. Prompts are read in a new order in each epoch; those that fill no
/// generation batch at its end are left out.
///
/// A completion is a function of the weights, the seed, and the numbers of its generation batch, prompt and sample, so that a
/// resumed run writes the same ones.
pub struct Rollouts<'a> {
    arguments: &'a GrpoArguments,
    prompts: Prompts,
    rewards: Rewards,
    params: SamplingParams,
    writer: Writer,
    /// Asked now and then, never trained on.
    held_out: Option<Prompts>,
    stop: Stop,
    at: Place,
    /// Of the last generation, where no step has told of them.
    metrics: Vec<(String, f64)>,
    /// Times that rewards were started again, before the last generation.
    restarts: u64,
    /// Tokens of the last step.
    step_tokens: usize,
}

/// Where the source stands: what a checkpoint keeps.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Place {
    /// Generation batches so far.
    generations: u64,
    /// Micro-batches of the last one that were given out, all iterations together.
    given: usize,
    /// The micro-batches, where not all of them were given out.
    micro_batches: Vec<Batch>,
    /// What they were made of, and the steps that they were part of.
    #[serde(default)]
    rows: Vec<CompletionRow>,
    #[serde(default)]
    steps: u64,
    /// Of the prompts.
    fingerprint: u32,
    /// Of the run; older checkpoints have none.
    #[serde(default)]
    shape: Option<Shape>,
}

/// What the numbers of a place count, in the words of the flags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Shape {
    num_generations: usize,
    per_device_train_batch_size: usize,
    steps_per_generation: usize,
    gradient_accumulation_steps: usize,
    num_iterations: usize,
    /// Whether micro-batches have the reference's log-probabilities, those from before the steps, and at which temperature.
    reference: bool,
    off_policy: bool,
    temperature: f64,
}

impl Shape {
    fn of(args: &GrpoArguments) -> Shape {
        Shape {
            num_generations: args.num_generations,
            per_device_train_batch_size: args.training.per_device_train_batch_size,
            steps_per_generation: args.steps_per_generation(),
            gradient_accumulation_steps: args.training.gradient_accumulation_steps,
            num_iterations: args.num_iterations,
            reference: args.beta != 0.0,
            off_policy: args.is_off_policy(),
            temperature: args.temperature,
        }
    }

    fn prompts(&self) -> usize {
        self.per_device_train_batch_size * self.steps_per_generation / self.num_generations
    }

    /// That a run of this shape goes on from a place of another one.
    fn check_goes_on_from(&self, before: &Shape, within_generation: bool) -> Result<()> {
        ensure!(
            self.prompts() == before.prompts(),
            "the run asked {} prompts at once and now would ask {}, so that the next ones cannot be told: continue with the same \
             --num-generations, --per-device-train-batch-size and --steps-per-generation",
            before.prompts(),
            self.prompts()
        );
        ensure!(
            !within_generation || self == before,
            "the checkpoint stands within a generation batch, made with --num-generations {}, --per-device-train-batch-size {}, \
             --steps-per-generation {}, --gradient-accumulation-steps {}, --num-iterations {}, --temperature {} and {} --beta: \
             continue with the same, or from a checkpoint behind its last step",
            before.num_generations,
            before.per_device_train_batch_size,
            before.steps_per_generation,
            before.gradient_accumulation_steps,
            before.num_iterations,
            before.temperature,
            if before.reference { "a" } else { "no" }
        );
        Ok(())
    }
}

impl<'a> Rollouts<'a> {
    /// `stop_token_ids` end a completion; keys and values take at most `kv_bytes` while completions are written.
    ///
    /// # Errors
    /// Fewer prompts than a generation batch has.
    pub fn new(
        arguments: &'a GrpoArguments,
        prompts: Prompts,
        rewards: Rewards,
        stop_token_ids: Vec<i64>,
        kv_bytes: u64,
    ) -> Result<Rollouts<'a>> {
        let of_generation = arguments.generation_batch_size() / arguments.num_generations;
        ensure!(
            prompts.rows.len() >= of_generation,
            "the dataset has {} prompts, and a generation batch takes {of_generation}: lower --per-device-train-batch-size or \
             --gradient-accumulation-steps",
            prompts.rows.len()
        );
        let params = SamplingParams {
            temperature: arguments.temperature,
            top_k: arguments.top_k,
            top_p: arguments.top_p,
            min_p: arguments.min_p,
            repetition_penalty: arguments.repetition_penalty,
            max_new_tokens: arguments.max_completion_length,
            stop_token_ids,
            ..SamplingParams::default()
        };
        params.check()?;
        let at = Place {
            fingerprint: prompts.fingerprint(),
            shape: Some(Shape::of(arguments)),
            ..Place::default()
        };
        Ok(Rollouts {
            arguments,
            prompts,
            rewards,
            params,
            writer: Writer::new(kv_bytes).at_most(arguments.generation_batch_size()),
            held_out: None,
            stop: Stop::default(),
            at,
            metrics: Vec::new(),
            restarts: 0,
            step_tokens: 0,
        })
    }

    /// The same with an engine that stays while the model trains: keys and values keep their memory, and decoding steps that were
    /// recorded are not recorded again.
    pub fn keeping_its_engine(mut self) -> Rollouts<'a> {
        self.writer = self.writer.staying();
        self
    }

    /// The same, leaving a generation batch that is not judged once `stop` is raised.
    pub fn until(self, stop: Stop) -> Rollouts<'a> {
        Rollouts { stop, ..self }
    }

    /// The same with prompts that evaluations ask about.
    pub fn holding_out(self, prompts: Prompts) -> Rollouts<'a> {
        Rollouts { held_out: Some(prompts), ..self }
    }

    fn generations_per_epoch(&self) -> u64 {
        let of_generation = self.arguments.generation_batch_size() / self.arguments.num_generations;
        (self.prompts.rows.len() / of_generation) as u64
    }

    fn is_used_up(&self) -> bool {
        self.at.given >= self.at.micro_batches.len() * self.arguments.num_iterations
    }

    fn generate(&mut self, model: &FastLanguageModel) -> Result<()> {
        let args = self.arguments;
        let count = args.generation_batch_size() / args.num_generations;
        let (epoch, place) = (
            self.at.generations / self.generations_per_epoch(),
            self.at.generations % self.generations_per_epoch(),
        );
        let order = self.prompts.order(args.training.seed, epoch);
        let chosen = &order[place as usize * count..][..count];
        let mut rng = ChaCha8Rng::seed_from_u64(args.training.seed);
        rng.set_stream(u64::MAX - self.at.generations);

        let started = Instant::now();
        let requests: Vec<Request> = chosen
            .iter()
            .map(|&row| {
                let params = SamplingParams { seed: rng.next_u64(), ..self.params.clone() };
                Request::samples(&self.prompts.rows[row].ids, &params, args.num_generations)
            })
            .collect();
        let groups = self.writer.answers(model, requests)?;
        let seconds = started.elapsed().as_secs_f64();
        let generations: Vec<(usize, Generation)> = chosen
            .iter()
            .zip(groups)
            .flat_map(|(&row, group)| group.into_iter().map(move |generation| (row, generation)))
            .collect();

        let prompts = std::mem::take(&mut self.prompts);
        let answers: Vec<(&Prompt, &Generation)> =
            generations.iter().map(|(row, generation)| (&prompts.rows[*row], generation)).collect();
        let scores = self.judge(&answers);
        let found = advantages(&scores.total, args.num_generations, args.scale_rewards);
        let tokens: usize = answers.iter().map(|(_, generation)| generation.token_ids.len()).sum();
        let restarts = self.rewards.restarts();
        self.metrics = self.means(&answers, &scores);
        self.metrics.extend([
            ("frac_reward_zero_std".to_owned(), found.zero_std as f64 / answers.len() as f64),
            ("reward_restarts".to_owned(), (restarts - self.restarts) as f64),
            ("rollout_tokens_per_second".to_owned(), tokens as f64 / seconds.max(1e-9)),
        ]);
        self.restarts = restarts;
        self.prompts = prompts;
        self.check_judged(&scores)?;
        let mut completions = Vec::with_capacity(generations.len());
        let mut rows = Vec::with_capacity(generations.len());
        for (sample, (row, generation)) in generations.into_iter().enumerate() {
            let prompt = &self.prompts.rows[row];
            rows.push(CompletionRow {
                prompt: prompt.text.clone(),
                completion: generation.text,
                rewards: scores.values[sample].clone(),
                reward: scores.total[sample],
                advantage: found.values[sample],
                errors: scores.errors_of(sample).collect(),
            });
            completions.push(Completion {
                prompt_ids: prompt.ids.clone(),
                completion_ids: generation.token_ids,
                sampler_log_probs: generation.sampling_logprobs,
                truncated: generation.finish_reason == FinishReason::Length,
                advantage: found.values[sample],
            });
        }
        // Where several steps share a generation, each gets its part of every group.
        if args.steps_per_generation() != args.training.gradient_accumulation_steps {
            shuffle(&mut completions, &mut rng);
        }
        let decoder = &model.decoder;
        // Where angles depend on the length of a sample, its prompt is its own.
        let longest = completions.iter().map(|one| one.prompt_ids.len() + one.completion_ids.len()).max();
        let shares_prompts = decoder.rope_regime(1) == decoder.rope_regime(longest.unwrap_or(1));
        let mut batches = step_batches(&completions, args, shares_prompts);
        add_log_probs(decoder, args, &mut batches)?;
        self.at.micro_batches = batches;
        self.at.rows = rows;
        (self.at.given, self.at.steps) = (0, 0);
        self.at.generations += 1;
        Ok(())
    }

    fn judge(&mut self, answers: &[(&Prompt, &Generation)]) -> Scores {
        let samples = samples(answers.iter().copied());
        let scores = self.rewards.score(&samples);
        if self.stop.is_raised() {
            return scores;
        }
        // One line a reward: a server that is away fails with every sample.
        for name in self.rewards.names() {
            let mut failures = scores.failures.iter().filter(|failure| failure.reward == *name);
            if let Some(first) = failures.next() {
                tracing::warn!(
                    "reward {name} failed for {} of {} completions, which count nothing; the first, {:?}: {:#}",
                    failures.count() + 1,
                    samples.len(),
                    samples[first.sample].completion,
                    first.error
                );
            }
        }
        scores
    }

    /// Where the run was asked to stop, a failure is perhaps one only for lack of time: a resumed run asks again.
    fn check_judged(&self, scores: &Scores) -> Result<()> {
        if self.stop.is_raised() && !scores.failures.is_empty() {
            return Err(Interrupted.into());
        }
        Ok(())
    }

    /// TRL's names.
    fn means(&self, answers: &[(&Prompt, &Generation)], scores: &Scores) -> Vec<(String, f64)> {
        let lengths = |ended: bool| -> Vec<f64> {
            let wanted =
                answers.iter().filter(|(_, answer)| !ended || answer.finish_reason != FinishReason::Length);
            wanted.map(|(_, answer)| answer.token_ids.len() as f64).collect()
        };
        let average = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let (all, ended) = (lengths(false), lengths(true));
        let mut means = vec![
            ("reward".to_owned(), mean(&scores.total)),
            ("reward_std".to_owned(), std(&scores.total)),
            ("completions/mean_length".to_owned(), average(&all)),
            ("completions/min_length".to_owned(), all.iter().copied().fold(f64::INFINITY, f64::min)),
            ("completions/max_length".to_owned(), all.iter().copied().fold(0.0, f64::max)),
            ("completions/clipped_ratio".to_owned(), (all.len() - ended.len()) as f64 / all.len() as f64),
            ("completions/mean_terminated_length".to_owned(), average(&ended)),
            ("reward_failures".to_owned(), scores.failures.len() as f64),
        ];
        for (index, name) in self.rewards.names().iter().enumerate() {
            let values: Vec<Option<f64>> = scores.values.iter().map(|values| values[index]).collect();
            means.push((format!("rewards/{name}/mean"), mean(&values)));
            means.push((format!("rewards/{name}/std"), std(&values)));
        }
        means
    }
}

/// What `rewards` say of one answer to each prompt.
pub fn evaluate(
    model: &FastLanguageModel,
    prompts: &Prompts,
    rewards: &mut Rewards,
    params: &SamplingParams,
    kv_bytes: u64,
) -> Result<Scores> {
    let generations = Writer::new(kv_bytes).answers(model, one_each(prompts, params))?.concat();
    Ok(rewards.score(&samples(prompts.rows.iter().zip(&generations))))
}

fn one_each(prompts: &Prompts, params: &SamplingParams) -> Vec<Request> {
    prompts.rows.iter().map(|prompt| Request::new(&prompt.ids, params)).collect()
}

fn samples<'s>(answers: impl Iterator<Item = (&'s Prompt, &'s Generation)>) -> Vec<Sample<'s>> {
    let sample = |(prompt, answer): (&'s Prompt, &'s Generation)| Sample {
        prompt: &prompt.value,
        completion: &answer.text,
        completion_ids: &answer.token_ids,
        truncated: answer.finish_reason == FinishReason::Length,
        columns: &prompt.columns,
    };
    answers.map(sample).collect()
}

impl StepSource for Rollouts<'_> {
    fn steps_per_epoch(&self, accumulation: u64) -> u64 {
        let steps =
            (self.arguments.steps_per_generation() * self.arguments.num_iterations) as u64 / accumulation;
        self.generations_per_epoch() * steps
    }

    fn next_step(&mut self, model: &FastLanguageModel, accumulation: u64) -> Result<Vec<Batch>> {
        if self.is_used_up() {
            self.generate(model)?;
        }
        let first = self.at.given % self.at.micro_batches.len();
        let batches = self.at.micro_batches[first..first + accumulation as usize].to_vec();
        self.at.given += accumulation as usize;
        self.at.steps += 1;
        self.step_tokens = batches.iter().map(Batch::tokens).sum();
        Ok(batches)
    }

    fn needs_device(&self) -> bool {
        self.is_used_up() && self.writer.needs_device()
    }

    fn cursor(&self) -> Result<Value> {
        let at = match self.is_used_up() {
            true => {
                Place { given: 0, micro_batches: Vec::new(), rows: Vec::new(), steps: 0, ..self.at.clone() }
            }
            false => self.at.clone(),
        };
        Ok(serde_json::to_value(at)?)
    }

    fn seek(&mut self, cursor: &Value) -> Result<()> {
        let at: Place = serde_json::from_value(cursor.clone()).context("not a place in a GRPO run")?;
        ensure!(
            at.fingerprint == self.at.fingerprint,
            "the prompts are not those that the checkpoint was made with (checksum {:08x}, then {:08x}): resume with the same \
             files, chat template and system prompt",
            self.at.fingerprint,
            at.fingerprint
        );
        let shape = Shape::of(self.arguments);
        if let Some(before) = &at.shape {
            shape.check_goes_on_from(before, !at.micro_batches.is_empty())?;
        }
        self.at = Place { shape: Some(shape), ..at };
        Ok(())
    }

    fn epoch(&self) -> f64 {
        let all = self.at.micro_batches.len() * self.arguments.num_iterations;
        let left = if all == 0 { 0.0 } else { 1.0 - self.at.given as f64 / all as f64 };
        (self.at.generations as f64 - left) / self.generations_per_epoch() as f64
    }

    fn is_epoch_end(&self) -> bool {
        self.is_used_up() && self.at.generations.is_multiple_of(self.generations_per_epoch())
    }

    fn metrics(&mut self, training_seconds: f64) -> BTreeMap<String, f64> {
        let speed = self.step_tokens as f64 / training_seconds.max(1e-9);
        let of_rollout = std::mem::take(&mut self.metrics);
        let of_training = ("training_tokens_per_second".to_owned(), speed);
        of_rollout.into_iter().chain([of_training]).filter(|(_, value)| value.is_finite()).collect()
    }

    fn evaluates(&self) -> bool {
        self.held_out.is_some()
    }

    fn evaluate(&mut self, model: &FastLanguageModel) -> Result<Evaluation> {
        let Some(prompts) = self.held_out.take() else { return Ok(Evaluation::default()) };
        let params = SamplingParams {
            temperature: self.arguments.eval_temperature,
            seed: self.arguments.training.seed,
            ..self.params.clone()
        };
        let written = self.writer.answers(model, one_each(&prompts, &params));
        let found = written.and_then(|generations| {
            let generations = generations.concat();
            let answers: Vec<(&Prompt, &Generation)> = prompts.rows.iter().zip(&generations).collect();
            let scores = self.judge(&answers);
            self.check_judged(&scores)?;
            Ok(Evaluation {
                loss: None,
                tokens: generations.iter().map(|generation| generation.token_ids.len()).sum(),
                samples: generations.len(),
                means: self
                    .means(&answers, &scores)
                    .into_iter()
                    .filter(|(_, mean)| mean.is_finite())
                    .collect(),
            })
        });
        self.held_out = Some(prompts);
        found
    }

    fn completions(&self) -> Option<Completions<'_>> {
        let Place { steps, rows, .. } = &self.at;
        (!rows.is_empty()).then(|| Completions { steps: *steps, rewards: self.rewards.names(), rows })
    }
}
