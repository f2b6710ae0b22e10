//! Plans on a GPU: random runs that were admitted stay within their budget.

use ferrotune::data::Batch;
use ferrotune::device;
use ferrotune::io::adapter::AdapterConfig;
use ferrotune::models::{Config, FastLanguageModel};
use ferrotune::nn::LoadOptions;
use ferrotune::train::plan::{Budget, Card, Memory, Work};
use ferrotune::train::{Optim, Sft, Stepper, TrainingArguments};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind};

use crate::gpu::{gpu, in_child, is_child};

/// A small decoder of some shape, and a batch for it.
struct Shape {
    family: &'static str,
    config: Config,
    vocab: i64,
    batch: usize,
    length: usize,
}

fn one_of(random: &mut ChaCha8Rng, choices: &[i64]) -> i64 {
    choices[random.random_range(0..choices.len())]
}

impl Shape {
    fn draw(random: &mut ChaCha8Rng) -> Shape {
        let mut pick = |choices: &[i64]| one_of(random, choices);
        let (heads, head_dim) = (pick(&[4, 8, 16]), pick(&[64, 128]));
        let kv_heads = heads / pick(&[1, 2, 4]);
        let hidden = heads * head_dim;
        let (layers, vocab) = (pick(&[1, 2, 4, 7]), pick(&[1000, 8192, 32000]));
        let family = ["llama", "qwen3", "phi3", "gemma2"][pick(&[0, 0, 1, 2, 3]) as usize];
        let text = format!(
            r#"{{"model_type": "{family}", "hidden_size": {hidden}, "intermediate_size": {}, "num_hidden_layers": {layers},
                "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads}, "head_dim": {head_dim}, "vocab_size": {vocab},
                "max_position_embeddings": 32768, "original_max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0, "tie_word_embeddings": {}, "query_pre_attn_scalar": {head_dim},
                "initializer_range": 0.02}}"#,
            pick(&[2, 3, 4]) * hidden,
            pick(&[0, 1]) == 1,
        );
        let config = Config::from_json(&text).unwrap_or_else(|error| panic!("{text}: {error:#}"));
        let (batch, length) =
            (pick(&[1, 2, 3, 8]) as usize, pick(&[100, 256, 777, 1024, 2048, 4096]) as usize);
        Shape { family, config, vocab, batch, length }
    }
}

/// Runs of one kind: how far their allocated peaks were from the prediction.
struct Runs {
    device: Device,
    card: Card,
    random: ChaCha8Rng,
    below: f64,
    above: f64,
}

impl Runs {
    fn new(device: Device, card: Card, seed: u64) -> Runs {
        Runs { device, card, random: ChaCha8Rng::seed_from_u64(seed), below: 0.0, above: 0.0 }
    }

    /// Four steps of `passes` passes under a budget between the least that fits and a little more than everything.
    fn run(&mut self, shape: Shape, work: &Work, arguments: &TrainingArguments, kind: Kind) {
        let Runs { device, card, random, .. } = self;
        let device = *device;
        let load_in_4bit = arguments.load_in_4bit;
        let host = if one_of(random, &[0, 1]) == 1 { 8 << 30 } else { 0 };
        let least = work.smallest(card, host).memory.device();
        let most = work.fastest(card, Budget { device: u64::MAX, host }).unwrap().memory.device();
        let share: f64 = random.random_range(0.0..1.1);
        let budget = Budget { device: least + (most.saturating_sub(least) as f64 * share) as u64, host };
        let plan = work.fastest(card, budget).unwrap();
        let run = format!(
            "{}, {} wide, {} layers, {} words, {} x {}, {}, {kind:?}, {share:.2} of the way, {:?}",
            shape.family,
            shape.config.hidden_size,
            shape.config.num_hidden_layers(),
            shape.vocab,
            shape.batch,
            shape.length,
            what(arguments),
            plan.memory
        );

        let options = LoadOptions { load_in_4bit, ..LoadOptions::new(kind, device) };
        device::limit_memory(device, Memory::allocator_limit(budget.device), budget.host, work.tokens)
            .unwrap();
        let mut model = FastLanguageModel::untrained(shape.config, options, 1).unwrap();
        match arguments.full_finetuning {
            true => model.train_all().unwrap(),
            false => model.get_peft_model(adapter(arguments), 1).unwrap(),
        }
        device::empty_cache(device).unwrap();
        device::reset_peak_memory(device).unwrap();
        let sample: Vec<i64> = (0..shape.length as i64).map(|i| (i * i + 3 * i) % shape.vocab).collect();
        let batches: Vec<Batch> = (0..work.gradient_accumulation_steps)
            .map(|_| Batch::from_samples(vec![(&sample[..], &sample[..]); shape.batch]))
            .collect();
        let mut stepper = Stepper::new(&Sft, arguments, &model.decoder).unwrap().with_plan(plan.run(budget));
        for step in 0..4 {
            let outcome = stepper.run(&model.decoder, &batches, step, 1e-4);
            let outcome = outcome.unwrap_or_else(|error| panic!("{run}: {error:#}"));
            assert!(outcome.is_finite(), "{run}, step {step}: {outcome:?}");
        }
        let memory = device::memory(device).unwrap();
        assert!(memory.peak_reserved <= Memory::allocator_limit(budget.device), "{run}");
        let apart = memory.peak_allocated as f64 / plan.memory.allocated() as f64 - 1.0;
        if apart.abs() > 0.15 {
            println!("{:+.1} %: {run}", 100.0 * apart);
        }
        (self.below, self.above) = (self.below.min(apart), self.above.max(apart));
        drop(stepper);
        drop(model);
        device::empty_cache(device).unwrap();
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        device::limit_memory(self.device, u64::MAX >> 8, u64::MAX, 0).unwrap();
    }
}

fn measured(device: Device) -> Card {
    let processors = device::probe().devices[0].multiprocessors as u64;
    let card = Card::measure("this one".into(), processors, device).unwrap();
    device::empty_cache(device).unwrap();
    card
}

fn adapter(arguments: &TrainingArguments) -> AdapterConfig {
    let saved = &arguments.modules_to_save;
    AdapterConfig {
        r: arguments.r,
        lora_dropout: arguments.lora_dropout,
        modules_to_save: (!saved.is_empty()).then(|| saved.clone()),
        ..AdapterConfig::default()
    }
}

fn what(arguments: &TrainingArguments) -> String {
    format!(
        "full {}, r {}, dropout {}, saved {:?}, 4 bits {}, {:?}",
        arguments.full_finetuning,
        arguments.r,
        arguments.lora_dropout,
        arguments.modules_to_save,
        arguments.load_in_4bit,
        arguments.optim
    )
}

#[test]
fn random_admitted_runs_stay_within_their_budget() {
    const RUNS: usize = 200;
    let Some(device) = gpu("random plans") else { return };
    let mut runs = Runs::new(device, measured(device), 14);
    let started = std::time::Instant::now();
    let mut done = 0;
    for _ in 0..RUNS {
        let shape = Shape::draw(&mut runs.random);
        let r = one_of(&mut runs.random, &[1, 8, 16, 64]) as u32;
        let load_in_4bit = one_of(&mut runs.random, &[0, 1]) == 1;
        let work = Work::uniform(&shape.config, (shape.batch, shape.length), r, load_in_4bit, None);
        let arguments = TrainingArguments { r, load_in_4bit, ..TrainingArguments::default() };
        runs.run(shape, &work, &arguments, Kind::BFloat16);
        done += 1;
        // A machine that is lent by the minute.
        if started.elapsed().as_secs() > 170 {
            break;
        }
    }
    println!(
        "{done} of {RUNS} runs; allocated peaks were {:.1} % below to {:.1} % above the prediction",
        -100.0 * runs.below,
        100.0 * runs.above
    );
    assert_eq!(done, RUNS, "the rest was not run: too slow");
}

/// All weights, dropped inputs, trained copies of embedding and head, f32, and more than one of these; by steps of one pass and
/// of more.
fn run_of_another_kind(runs: &mut Runs, kind: usize, deterministic: bool) {
    let shape = Shape::draw(&mut runs.random);
    let r = one_of(&mut runs.random, &[1, 8, 16, 64]) as u32;
    let load_in_4bit = kind > 1 && one_of(&mut runs.random, &[0, 1]) == 1;
    let optim = match one_of(&mut runs.random, &[0, 1]) {
        0 => Optim::AdamwTorch,
        _ => Optim::Adamw8bit,
    };
    let passes = one_of(&mut runs.random, &[1, 1, 2]) as u64;
    let saved: &[&str] = match one_of(&mut runs.random, &[0, 1, 2]) {
        0 => &["embed_tokens"],
        1 => &["lm_head"],
        _ => &["embed_tokens", "lm_head"],
    };
    let mut arguments = TrainingArguments {
        r,
        load_in_4bit,
        optim: Some(optim),
        deterministic,
        gradient_accumulation_steps: passes as usize,
        ..TrainingArguments::default()
    };
    arguments.full_finetuning = kind <= 1;
    if kind == 2 || kind == 5 {
        arguments.lora_dropout = 0.1;
    }
    if kind == 3 || kind == 5 {
        arguments.modules_to_save = saved.iter().map(|module| module.to_string()).collect();
    }
    let in_f32 = kind == 1 || kind == 4;
    let batch = (shape.batch, shape.length);
    let mut work = Work::uniform(&shape.config, batch, r, load_in_4bit, Some(optim));
    if in_f32 {
        work = work.in_f32();
    }
    work = match arguments.full_finetuning {
        true => work.training_all().unwrap(),
        false => work.saving(&arguments.modules_to_save).unwrap(),
    };
    work.dropout = arguments.lora_dropout > 0.0;
    work.deterministic = deterministic.then_some(runs.card.processors);
    work.gradient_accumulation_steps = passes;
    runs.run(shape, &work, &arguments, if in_f32 { Kind::Float } else { Kind::BFloat16 });
}

#[test]
fn random_admitted_runs_of_other_kinds_stay_within_their_budget() {
    const RUNS: usize = 72;
    let Some(device) = gpu("random plans of other kinds") else { return };
    const KINDS: [&str; 6] = ["full", "full f32", "dropout", "modules_to_save", "f32", "both"];
    let card = measured(device);
    for (kind, name) in KINDS.into_iter().enumerate() {
        let mut runs = Runs::new(device, card.clone(), 15 + kind as u64);
        for _ in 0..RUNS / KINDS.len() {
            run_of_another_kind(&mut runs, kind, false);
        }
        println!(
            "{name}: {} runs; allocated peaks were {:.1} % below to {:.1} % above the prediction",
            RUNS / KINDS.len(),
            -100.0 * runs.below,
            100.0 * runs.above
        );
    }
}

/// In a process of its own: what is deterministic stays so.
#[test]
fn random_admitted_deterministic_runs_stay_within_their_budget() {
    const TEST: &str = "gpu_plan::random_admitted_deterministic_runs_stay_within_their_budget";
    const RUNS: usize = 30;
    if !is_child(TEST) {
        return in_child(TEST);
    }
    let device = device::init(device::Choice::Cuda(0), None).unwrap();
    let mut runs = Runs::new(device, measured(device), 21);
    for run in 0..RUNS {
        // Without trained copies and with them, in 16 bits.
        run_of_another_kind(&mut runs, [6, 3][run % 2], true);
    }
    println!(
        "deterministic: {RUNS} runs; allocated peaks were {:.1} % below to {:.1} % above the prediction",
        -100.0 * runs.below,
        100.0 * runs.above
    );
}
