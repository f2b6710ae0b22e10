//! Plans on a GPU: random runs that were admitted stay within their budget.

use ferrotune::data::Batch;
use ferrotune::device;
use ferrotune::io::adapter::AdapterConfig;
use ferrotune::models::{Config, FastLanguageModel};
use ferrotune::nn::LoadOptions;
use ferrotune::train::plan::{Budget, Card, Memory, Work};
use ferrotune::train::{Sft, Stepper, TrainingArguments};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Kind;

use crate::gpu::gpu;

const RUNS: usize = 200;

/// A small decoder of some shape, a batch for it, and a budget between the least that fits and a little more than everything.
#[test]
fn random_admitted_runs_stay_within_their_budget() {
    let Some(device) = gpu("random plans") else { return };
    let card = Card::measure("this one".into(), device).unwrap();
    let mut random = ChaCha8Rng::seed_from_u64(14);
    let (mut worst, mut widest) = (0.0f64, 0.0f64);
    let started = std::time::Instant::now();
    let mut done = 0;
    for run in 0..RUNS {
        let mut pick = |choices: &[i64]| choices[random.random_range(0..choices.len())];
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
        let (r, load_in_4bit) = (pick(&[1, 8, 16, 64]) as u32, pick(&[0, 1]) == 1);
        let work = Work::uniform(&config, (batch, length), r, load_in_4bit, None);
        let host = if pick(&[0, 1]) == 1 { 8 << 30 } else { 0 };
        let least = work.smallest(&card, host).memory.device();
        let most = work.fastest(&card, Budget { device: u64::MAX, host }).unwrap().memory.device();
        let share: f64 = random.random_range(0.0..1.1);
        let budget = Budget { device: least + ((most - least) as f64 * share) as u64, host };
        let plan = work.fastest(&card, budget).unwrap();

        let arguments = TrainingArguments { r, ..TrainingArguments::default() };
        let options = LoadOptions { load_in_4bit, ..LoadOptions::new(Kind::BFloat16, device) };
        device::limit_memory(device, Memory::allocator_limit(budget.device), budget.host, work.tokens)
            .unwrap();
        let mut model = FastLanguageModel::untrained(config, options).unwrap();
        model.get_peft_model(AdapterConfig { r, ..AdapterConfig::default() }, 1).unwrap();
        device::empty_cache(device).unwrap();
        device::reset_peak_memory(device).unwrap();
        let sample: Vec<i64> = (0..length as i64).map(|i| (i * i + 3 * i) % vocab).collect();
        let samples = vec![(&sample[..], &sample[..]); batch];
        let batch_of = Batch::from_samples(samples);
        let mut stepper = Stepper::new(&Sft, &arguments, &model.decoder).unwrap().with_plan(plan.run(budget));
        for step in 0..4 {
            let outcome = stepper.run(&model.decoder, std::slice::from_ref(&batch_of), step, 1e-4);
            let outcome = outcome.unwrap_or_else(|error| {
                panic!(
                    "run {run}: {family}, {hidden} wide, {layers} layers, {batch} x {length}, r {r}, 4 bits \
                     {load_in_4bit}, {share:.2} of the way, {:?}: {error:#}",
                    plan.memory
                )
            });
            assert!(outcome.is_finite(), "run {run}, step {step}: {outcome:?}");
        }
        let memory = device::memory(device).unwrap();
        assert!(memory.peak_reserved <= Memory::allocator_limit(budget.device), "run {run}");
        let apart = memory.peak_allocated as f64 / plan.memory.allocated() as f64 - 1.0;
        (worst, widest) = (worst.max(apart), widest.min(apart));
        drop(stepper);
        drop(model);
        device::empty_cache(device).unwrap();
        done += 1;
        // A machine that is lent by the minute.
        if started.elapsed().as_secs() > 170 {
            break;
        }
    }
    device::limit_memory(device, u64::MAX >> 8, u64::MAX, 0).unwrap();
    println!(
        "{done} of {RUNS} runs; allocated peaks were {:.1} % below to {:.1} % above the prediction",
        -100.0 * widest,
        100.0 * worst
    );
    assert_eq!(done, RUNS, "the rest was not run: too slow");
}
