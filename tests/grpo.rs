//! GRPO: losses and gradients of TRL's trainer, splits into micro-batches, and whole runs.

use std::collections::HashMap;

use ferrotune::data::Batch;
use ferrotune::io::adapter::{AdapterConfig, InitLoraWeights};
use ferrotune::models::FastLanguageModel;
use ferrotune::ops::{Pass, Policy};
use ferrotune::rewards::{Length, Rewards};
use ferrotune::train::grpo::{
    Completion, Grpo, GrpoArguments, PromptOptions, Prompts, Rollouts, add_log_probs, advantages,
    step_batches,
};
use ferrotune::train::{Objective, StepSource, Stepper};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::golden::{ids, rel, root, tensors};

/// What scripts/golden_grpo.py wrote.
struct Golden {
    tensors: HashMap<String, Tensor>,
    defaults: Map<String, Value>,
    cases: Map<String, Value>,
}

const GENERATIONS: usize = 4;

impl Golden {
    fn load() -> Golden {
        let path = root().join("grpo.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let about = header.metadata().clone().unwrap();
        let map = |key: &str| serde_json::from_str(&about[key]).unwrap();
        Golden { tensors: tensors(&path), defaults: map("defaults"), cases: map("cases") }
    }

    /// The arguments of a case; a step has `rows` times `accumulation` completions.
    fn arguments(&self, case: &str, accumulation: usize) -> GrpoArguments {
        let mut keys = self.defaults.clone();
        keys.extend(self.cases[case].as_object().unwrap().clone());
        let steps = keys["steps_per_generation"].as_u64().unwrap() as usize;
        let mut given = serde_json::to_value(GrpoArguments::default()).unwrap();
        let of_step = self.count() / steps;
        keys.insert("per_device_train_batch_size".into(), (of_step / accumulation).into());
        keys.insert("gradient_accumulation_steps".into(), accumulation.into());
        keys.insert("steps_per_generation".into(), (steps * accumulation).into());
        keys.insert("num_generations".into(), GENERATIONS.into());
        keys.insert("max_completion_length".into(), 12.into());
        given.as_object_mut().unwrap().extend(keys);
        serde_json::from_value(given).unwrap()
    }

    fn count(&self) -> usize {
        self.tensors["rewards"].size()[0] as usize
    }

    /// Weighted sums of what is a number.
    fn rewards(&self) -> Vec<Option<f64>> {
        let weights = Vec::<f64>::try_from(self.tensors["reward_weights"].to_kind(Kind::Double)).unwrap();
        let rows = Vec::<Vec<f64>>::try_from(self.tensors["rewards"].to_kind(Kind::Double)).unwrap();
        let total = |row: &Vec<f64>| {
            let known = row.iter().zip(&weights).filter(|(reward, _)| !reward.is_nan());
            known.map(|(reward, weight)| reward * weight).reduce(|a, b| a + b)
        };
        rows.iter().map(total).collect()
    }

    fn completions(&self, arguments: &GrpoArguments) -> Vec<Completion> {
        let found = advantages(&self.rewards(), GENERATIONS, arguments.scale_rewards);
        let completion = |n: usize| {
            let completion_ids = ids(&self.tensors[&format!("completion_ids.{n}")]);
            Completion {
                prompt_ids: ids(&self.tensors[&format!("prompt_ids.{n}")]),
                truncated: completion_ids.last() != Some(&2),
                completion_ids,
                sampler_log_probs: Vec::try_from(&self.tensors[&format!("sampler.{n}")]).unwrap(),
                advantage: found.values[n],
            }
        };
        (0..self.count()).map(completion).collect()
    }
}

fn model() -> FastLanguageModel {
    let mut model =
        FastLanguageModel::from_pretrained(&root().join("llama"), Kind::Float, Device::Cpu).unwrap();
    model.load_adapter(&root().join("adapters/llama_layers")).unwrap();
    model
}

/// Loss and gradient of the first step on a case's completions, in `accumulation` micro-batches.
fn first_step(
    golden: &Golden,
    case: &str,
    accumulation: usize,
    policy: Policy,
    shares_prompts: bool,
) -> (f64, Tensor) {
    let model = model();
    let arguments = golden.arguments(case, accumulation);
    let mut batches = step_batches(&golden.completions(&arguments), &arguments, shares_prompts);
    add_log_probs(&model.decoder, &arguments, &mut batches).unwrap();
    let step = &batches[..accumulation];
    if arguments.num_iterations > 1 {
        let _no_grad = tch::no_grad_guard();
        for (name, mut weight) in model.decoder.adapter_state() {
            weight.copy_(&golden.tensors[&format!("moved.{name}")]);
        }
    }
    loss_and_gradient(&model, &arguments, step, policy)
}

fn loss_and_gradient(
    model: &FastLanguageModel,
    arguments: &GrpoArguments,
    step: &[Batch],
    policy: Policy,
) -> (f64, Tensor) {
    let objective = Grpo::new(arguments);
    objective.start_step(&model.decoder, step).unwrap();
    let pass = Pass { policies: &[policy], ..Pass::INFERENCE };
    let loss = |batch: &Batch| {
        let batch = objective.upload(&model.decoder, batch).unwrap();
        let loss = objective.loss_sum(&model.decoder, &batch, pass).unwrap();
        loss.backward();
        loss.double_value(&[])
    };
    let loss = step.iter().map(loss).sum();
    let mut state = model.decoder.adapter_state();
    state.sort_by(|(a, _), (b, _)| a.cmp(b));
    let gradients: Vec<Tensor> = state.iter().map(|(_, weight)| weight.grad().flatten(0, -1)).collect();
    (loss, Tensor::cat(&gradients, 0))
}

#[test]
fn losses_and_gradients_are_those_of_trl() {
    let golden = Golden::load();
    assert!(golden.cases.len() > 30);
    for case in golden.cases.keys() {
        for shares_prompts in [false, true] {
            let (loss, gradient) = first_step(&golden, case, 1, Policy::KEEP, shares_prompts);
            let expected = golden.tensors[&format!("loss.{case}")].double_value(&[0]);
            assert!((loss - expected).abs() < 1e-5, "{case}: loss {loss}, of TRL {expected}");
            let off = rel(&gradient, &golden.tensors[&format!("gradient.{case}")]);
            assert!(off < 1e-5, "{case}: gradient {off:e} apart");
        }
    }
}

/// Completions of a few prompts, mixed: one with a prompt of its own, some with one of a single token.
fn mixed_completions() -> Vec<Completion> {
    let completion = |n: i64, prompt: i64| {
        let ids = |from: i64, count: i64| (0..count).map(|i| 3 + (from + 5 * i) % 60).collect::<Vec<i64>>();
        Completion {
            prompt_ids: ids(prompt, if prompt == 2 { 1 } else { 11 + prompt }),
            completion_ids: ids(7 * n, 1 + n % 5),
            sampler_log_probs: vec![-1.0; 1 + n as usize % 5],
            truncated: false,
            advantage: n as f64 - 3.5,
        }
    };
    [0, 1, 0, 2, 0, 1, 3, 2].into_iter().zip(0..).map(|(prompt, n)| completion(n, prompt)).collect()
}

/// Loss and gradient of LoRA on one of the golden checkpoints.
fn step_of(name: &str, batches: &[Batch], policy: Policy, kind: Kind, device: Device) -> (f64, Tensor) {
    let mut model = FastLanguageModel::from_pretrained(&root().join(name), kind, device).unwrap();
    let config = AdapterConfig { init_lora_weights: InitLoraWeights::Random, ..AdapterConfig::default() };
    model.get_peft_model(config, 1).unwrap();
    let (loss, gradient) = loss_and_gradient(&model, &sharing_arguments(), batches, policy);
    (loss, gradient.to_device(Device::Cpu))
}

fn sharing_arguments() -> GrpoArguments {
    GrpoArguments { num_generations: 3, max_completion_length: 12, ..GrpoArguments::default() }
}

/// In 16 bits on a GPU, by each of its attention kernels: as far from f64 as with a prompt for each completion, twice.
pub fn check_shared_prompts(device: Device) {
    let [apart, shared] =
        [false, true].map(|shares| step_batches(&mixed_completions(), &sharing_arguments(), shares));
    for name in ["llama", "llama_gqa_llama3", "mistral", "gemma2"] {
        let (_, exact) = step_of(name, &apart, Policy::KEEP, Kind::Double, Device::Cpu);
        for policy in [Policy::KEEP, Policy::RECOMPUTE, Policy::HOST] {
            let [far, off] = [&apart, &shared]
                .map(|batches| rel(&step_of(name, batches, policy, Kind::BFloat16, device).1, &exact));
            println!("{name}, {policy:?}: {off:.2e} shared, {far:.2e} apart");
            assert!(off <= (2.0 * far).max(1.6e-2), "{name}, {policy:?}: {off:e} shared, {far:e} apart");
        }
    }
}

/// A prompt that stands once before its completions, against one for each: the same in f64, whatever attention a model has, wherever
/// the copies of a prompt stand, whatever is kept.
#[test]
fn a_prompt_is_computed_once() {
    let (arguments, completions) = (sharing_arguments(), mixed_completions());
    let apart = step_batches(&completions, &arguments, false);
    let shared = step_batches(&completions, &arguments, true);
    assert_eq!(apart[0].tokens() - shared[0].tokens(), 2 * 10 + 11);
    assert_eq!((apart[0].samples(), shared[0].samples()), (8, 8));
    for name in ["llama", "mistral", "qwen3", "gemma2", "phi4"] {
        for policy in [Policy::KEEP, Policy::RECOMPUTE] {
            let step = |batches: &[Batch]| step_of(name, batches, policy, Kind::Double, Device::Cpu);
            let ((loss, gradient), (other_loss, other)) = (step(&apart), step(&shared));
            assert!((loss / other_loss - 1.0).abs() < 1e-12, "{name}: {loss}, {other_loss} shared");
            let off = rel(&other, &gradient);
            assert!(off < 1e-11, "{name}, {policy:?}: gradient {off:e} apart");
        }
    }
}

#[test]
fn advantages_are_those_of_trl() {
    let golden = Golden::load();
    for case in ["dapo", "batch", "none"] {
        let ours = advantages(&golden.rewards(), GENERATIONS, golden.arguments(case, 1).scale_rewards).values;
        let theirs = Vec::<f32>::try_from(&golden.tensors[&format!("advantages.{case}")]).unwrap();
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert!((ours - f64::from(*theirs)).abs() < 1e-5, "{case}: {ours}, of TRL {theirs}");
        }
    }
}

/// Micro-batches of another size, and what is kept for the backward, change rounding alone.
#[test]
fn a_split_into_micro_batches_changes_nothing() {
    let golden = Golden::load();
    for case in golden.cases.keys().filter(|case| !case.ends_with("_half")) {
        let (loss, gradient) = first_step(&golden, case, 1, Policy::KEEP, true);
        for (accumulation, policy) in [(2, Policy::KEEP), (8, Policy::RECOMPUTE)] {
            let (split_loss, split) = first_step(&golden, case, accumulation, policy, true);
            assert!((loss - split_loss).abs() < 1e-6, "{case} in {accumulation}: {split_loss}, whole {loss}");
            let off = rel(&split, &gradient);
            assert!(off < 1e-5, "{case} in {accumulation}: gradient {off:e} apart");
        }
    }
}

/// What an engine found in its pages before a step does not reach the completions after it.
#[test]
fn an_engine_that_stays_writes_the_same() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny");
    let arguments =
        GrpoArguments { num_generations: 4, max_completion_length: 12, ..GrpoArguments::default() };
    let written = |stays: bool| -> Vec<Batch> {
        ferrotune::device::init(ferrotune::device::Choice::Cpu, None).unwrap();
        let mut model =
            FastLanguageModel::from_pretrained(&folder.join("model"), Kind::Float, Device::Cpu).unwrap();
        model.get_peft_model(arguments.training.adapter_config("tiny"), 1).unwrap();
        let options = PromptOptions { prompt_column: "prompt", system_prompt: None, longest: 100 };
        let file = folder.join("heldout.jsonl").display().to_string();
        let mut prompts = Prompts::read(&[file], model.tokenizer().unwrap(), options).unwrap();
        // The same prompts again and again.
        prompts.rows.truncate(2);
        let rewards = Rewards::new(vec![(Box::new(Length { min: 0, max: 4 }), 1.0)]);
        let mut rollouts = Rollouts::new(&arguments, prompts, rewards, Vec::new(), 1 << 30).unwrap();
        if stays {
            rollouts = rollouts.keeping_its_engine();
        }
        let objective = Grpo::new(&arguments);
        let mut stepper = Stepper::new(&objective, &arguments.training, &model.decoder).unwrap();
        (0..3)
            .map(|step| {
                assert_eq!(rollouts.needs_device(), !stays);
                let batches = rollouts.next_step(&model, 1).unwrap();
                // Large enough to change what is written.
                stepper.run(&model.decoder, &batches, step, 0.05).unwrap();
                batches[0].clone()
            })
            .collect()
    };
    let fresh = written(false);
    assert_ne!(fresh[0].input_ids, fresh[1].input_ids);
    assert_eq!(written(true), fresh);
}
