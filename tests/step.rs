//! Optimizer steps: what a step that goes wrong leaves alone, the learning rate, resuming; and on a GPU (tests/gpu.rs) the
//! same of steps that are launched as CUDA graphs, beside those that are not.

use std::collections::HashMap;

use ferrotune::data::Batch;
use ferrotune::io::adapter::InitLoraWeights;
use ferrotune::models::{Config, FastLanguageModel};
use ferrotune::nn::LoadOptions;
use ferrotune::ops::{Pass, Policy};
use ferrotune::train::{
    GradientCheckpointing, Objective, Optim, Sft, StepOutcome, Stepper, TrainingArguments, objective,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
    "hidden_act": "silu", "initializer_range": 0.05}"#;

/// The same model each time.
fn model(arguments: &TrainingArguments, kind: Kind, device: Device) -> FastLanguageModel {
    model_with(arguments, LoadOptions::new(kind, device))
}

fn model_with(arguments: &TrainingArguments, options: LoadOptions) -> FastLanguageModel {
    let mut model = FastLanguageModel::untrained(Config::from_json(CONFIG).unwrap(), options, 7).unwrap();
    model.get_peft_model(arguments.adapter_config("model"), 7).unwrap();
    // Drawn again: a GPU has other numbers than the CPU.
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut draw = |to: &Tensor| {
        if to.dim() > 1 {
            let values: Vec<f32> = (0..to.numel()).map(|_| random.random_range(-0.08..0.08)).collect();
            to.shallow_clone().copy_(&Tensor::from_slice(&values).view_as(to));
        }
    };
    let _no_grad = tch::no_grad_guard();
    let each = |_: &str, to: &Tensor| {
        draw(to);
        Ok(())
    };
    model.decoder.each_weight(each).unwrap();
    model.decoder.trainable().iter().for_each(|parameter| draw(&parameter.tensor));
    model
}

fn arguments() -> TrainingArguments {
    TrainingArguments { init_lora_weights: InitLoraWeights::Random, max_grad_norm: 0.5, ..Default::default() }
}

/// Two micro-batches of two shapes; some tokens have no label. Step 5 has a third shape.
fn batches(step: u64) -> Vec<Batch> {
    let sample = |length: i64, seed: i64| {
        let ids: Vec<i64> =
            (0..length).map(|i| (i * i * 31 + 17 * seed + 101 * step as i64) % 1000).collect();
        let labels = ids.iter().enumerate().map(|(i, &id)| if i % 5 == 0 { -100 } else { id }).collect();
        (ids, labels)
    };
    let batch = |lengths: &[i64]| {
        let samples: Vec<(Vec<i64>, Vec<i64>)> =
            lengths.iter().zip(0..).map(|(&length, seed)| sample(length, seed)).collect();
        Batch::from_samples(samples.iter().map(|(ids, labels)| (&ids[..], &labels[..])))
    };
    if step == 5 { vec![batch(&[40, 40])] } else { vec![batch(&[64, 64]), batch(&[96])] }
}

fn rate(step: u64) -> f64 {
    1e-3 * (step + 1) as f64
}

fn weights(model: &FastLanguageModel) -> Vec<Tensor> {
    model.decoder.trainable().iter().map(|parameter| parameter.tensor.detach().copy()).collect()
}

fn equal(a: &[Tensor], b: &[Tensor]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.equal(b))
}

/// All tensors as one vector in f64.
fn joined(tensors: &[Tensor]) -> Tensor {
    let flat = |t: &Tensor| t.to_device(Device::Cpu).to_kind(Kind::Double).flatten(0, -1);
    Tensor::cat(&tensors.iter().map(flat).collect::<Vec<_>>(), 0)
}

fn distance(a: &[Tensor], b: &[Tensor]) -> f64 {
    let (a, b) = (joined(a), joined(b));
    ((&a - &b).norm() / b.norm()).double_value(&[])
}

/// Losses, norms and the weights after ten steps.
fn ten_steps(
    arguments: &TrainingArguments,
    kind: Kind,
    device: Device,
    graphs: bool,
) -> (Vec<StepOutcome>, Vec<Tensor>) {
    ten_steps_of(&model(arguments, kind, device), arguments, graphs)
}

fn ten_steps_of(
    model: &FastLanguageModel,
    arguments: &TrainingArguments,
    graphs: bool,
) -> (Vec<StepOutcome>, Vec<Tensor>) {
    let device = model.decoder.device;
    let mut stepper = Stepper::new(&Sft, arguments, &model.decoder).unwrap();
    if !graphs {
        stepper = stepper.without_graphs();
    }
    let outcomes =
        (0..10).map(|step| stepper.run(&model.decoder, &batches(step), step, rate(step)).unwrap()).collect();
    assert_eq!(stepper.not_recorded(), None);
    assert_eq!(stepper.graphs(), if graphs && device.is_cuda() { 2 } else { 0 });
    (outcomes, weights(model))
}

/// Recorded steps differ from others by no more than two runs of those differ from each other.
pub fn check_recorded_steps(device: Device) {
    for kind in [Kind::Float, Kind::BFloat16] {
        let (first, first_weights) = ten_steps(&arguments(), kind, device, false);
        let (second, second_weights) = ten_steps(&arguments(), kind, device, false);
        let (recorded, recorded_weights) = ten_steps(&arguments(), kind, device, true);
        let noise = distance(&second_weights, &first_weights);
        let found = distance(&recorded_weights, &first_weights);
        println!("{kind:?}: weights of recorded steps off by {found:.1e}, of repeated ones by {noise:.1e}");
        let allowed = 4.0 * noise + if kind == Kind::Float { 1e-6 } else { 1e-4 };
        assert!(found <= allowed, "{found} > {allowed}");
        for (step, (a, b)) in recorded.iter().zip(&first).enumerate() {
            let noise = first.iter().zip(&second).map(|(a, b)| (a.loss - b.loss).abs()).fold(0.0, f64::max);
            let allowed = 4.0 * noise + if kind == Kind::Float { 1e-5 } else { 1e-3 };
            assert!((a.loss - b.loss).abs() <= allowed, "step {step}: loss {} and {}", a.loss, b.loss);
            assert!((a.grad_norm / b.grad_norm - 1.0).abs() <= 0.02, "step {step}: {a:?} {b:?}");
        }
    }
}

/// A gradient that is not finite changes nothing, a learning rate of 0 no weight, and both only for their step.
pub fn check_bad_steps(device: Device) {
    let arguments = arguments();
    let model = model(&arguments, Kind::Float, device);
    let mut stepper = Stepper::new(&Sft, &arguments, &model.decoder).unwrap();
    let mut run = |step: u64, rate: f64| {
        let outcome = stepper.run(&model.decoder, &batches(step), step, rate).unwrap();
        let state: Vec<Tensor> =
            stepper.optimizer.state().into_iter().map(|(_, tensor)| tensor.copy()).collect();
        (outcome, state)
    };
    for step in 0..5 {
        assert!(run(step, rate(step)).0.is_finite());
    }
    let (outcome, state) = run(6, rate(6));
    assert!(outcome.is_finite());

    let mut poisoned = model.decoder.trainable().remove(3).tensor.detach();
    let whole = poisoned.copy();
    let _ = poisoned.fill_(f64::NAN);
    let before = weights(&model);
    let (outcome, after) = run(7, rate(7));
    assert!(!outcome.is_finite(), "{outcome:?}");
    assert!(equal(&state, &after), "moments or step changed");
    let others = |tensors: Vec<Tensor>| -> Vec<Tensor> {
        tensors.into_iter().enumerate().filter(|(i, _)| *i != 3).map(|(_, tensor)| tensor).collect()
    };
    assert!(equal(&others(before), &others(weights(&model))), "weights changed");

    poisoned.copy_(&whole);
    let before = weights(&model);
    assert!(run(8, 0.0).0.is_finite());
    assert!(equal(&before, &weights(&model)), "a learning rate of 0 changed weights");
    assert!(run(9, rate(9)).0.is_finite());
    assert!(!before.iter().zip(&weights(&model)).any(|(a, b)| a.equal(b)), "a weight stayed");
}

/// The bits of losses, norms and weights: of LoRA and of a trained embedding and head, run again, recorded and not, resumed.
pub fn check_deterministic_steps(device: Device) {
    let lora = TrainingArguments { deterministic: true, ..arguments() };
    let modules_to_save = vec!["embed_tokens".into(), "lm_head".into()];
    let embedding = TrainingArguments { modules_to_save, ..lora.clone() };
    let recompute =
        TrainingArguments { use_gradient_checkpointing: GradientCheckpointing::On, ..lora.clone() };
    let host =
        TrainingArguments { use_gradient_checkpointing: GradientCheckpointing::Unsloth, ..lora.clone() };
    let moments = TrainingArguments { optim: Some(Optim::Adamw8bit), ..embedding.clone() };
    for (name, arguments) in [
        ("LoRA", lora),
        ("embedding", embedding),
        ("recompute", recompute),
        ("host", host),
        ("8-bit moments", moments),
    ] {
        for kind in [Kind::Float, Kind::BFloat16] {
            let (first, first_weights) = ten_steps(&arguments, kind, device, true);
            for (what, graphs) in [("again", true), ("without graphs", false)] {
                let (second, second_weights) = ten_steps(&arguments, kind, device, graphs);
                for (a, b) in first.iter().zip(&second) {
                    let bits = |o: &StepOutcome| (o.loss.to_bits(), o.grad_norm.to_bits());
                    assert_eq!(bits(a), bits(b), "{name}, {kind:?}, {what}: {a:?} {b:?}");
                }
                assert!(equal(&first_weights, &second_weights), "{name}, {kind:?}, {what}");
            }
            assert_eq!(resumed_distance(&arguments, kind, device), (0.0, 0.0), "{name}, {kind:?}, resumed");
        }
    }
}

pub fn check_resumed_steps(device: Device) {
    let allowed = if device.is_cuda() { 1e-4 } else { 0.0 };
    let (losses, weights) = resumed_distance(&arguments(), Kind::Float, device);
    assert!(losses <= allowed && weights <= allowed, "{losses} {weights}");
}

/// Another stepper goes on from the weights and the optimizer's state: the largest difference of a loss, and that of the
/// weights.
fn resumed_distance(arguments: &TrainingArguments, kind: Kind, device: Device) -> (f64, f64) {
    let (first, second) = (model(arguments, kind, device), model(arguments, kind, device));
    let mut stepper = Stepper::new(&Sft, arguments, &first.decoder).unwrap();
    for step in 0..6 {
        stepper.run(&first.decoder, &batches(step), step, rate(step)).unwrap();
    }
    let mut resumed = Stepper::new(&Sft, arguments, &second.decoder).unwrap();
    let state: HashMap<String, Tensor> =
        stepper.optimizer.state().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
    resumed.optimizer.load_state(state, "state").unwrap();
    for (to, from) in second.decoder.trainable().iter().zip(first.decoder.trainable()) {
        to.tensor.detach().copy_(&from.tensor.detach());
    }
    let mut losses: f64 = 0.0;
    for step in 6..10 {
        let a = stepper.run(&first.decoder, &batches(step), step, rate(step)).unwrap();
        let b = resumed.run(&second.decoder, &batches(step), step, rate(step)).unwrap();
        losses = losses.max((a.loss - b.loss).abs());
    }
    (losses, distance(&weights(&second), &weights(&first)))
}

/// Steps whose embedding is in the host's memory, recorded and not, repeat those with it on the device bit for bit.
pub fn check_offloaded_steps(device: Device) {
    let arguments = TrainingArguments { deterministic: true, ..arguments() };
    let options = LoadOptions::new(Kind::BFloat16, device);
    let on_host = LoadOptions { offload_embedding: true, ..options };
    for graphs in [true, false] {
        let model = model_with(&arguments, options);
        let other = model_with(&arguments, on_host);
        let (expected, expected_weights) = ten_steps_of(&model, &arguments, graphs);
        let (found, found_weights) = ten_steps_of(&other, &arguments, graphs);
        let bits =
            |outcomes: &[StepOutcome]| -> Vec<u64> { outcomes.iter().map(|o| o.loss.to_bits()).collect() };
        assert_eq!(bits(&found), bits(&expected), "graphs: {graphs}");
        assert!(equal(&found_weights, &expected_weights), "graphs: {graphs}");
    }
}

/// Steps in f16 follow those in f32; a scale that is too large is halved until the gradient is finite again, and nothing else
/// changes meanwhile; after 2,000 good steps it doubles. All of it goes on from a checkpoint.
pub fn check_f16_steps(device: Device) {
    let arguments = arguments();
    for graphs in [true, false] {
        let wide = model(&arguments, Kind::Float, device);
        let narrow = model_with(&arguments, LoadOptions::new(Kind::Half, device));
        let (expected, _) = ten_steps_of(&wide, &arguments, graphs);
        let (found, _) = ten_steps_of(&narrow, &arguments, graphs);
        for (step, (a, b)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(a.loss_scale, Some(65536.0), "step {step}");
            assert!((a.loss - b.loss).abs() < 5e-3 * b.loss, "step {step}: {a:?} {b:?}");
            assert!((a.grad_norm / b.grad_norm - 1.0).abs() < 0.03, "step {step}: {a:?} {b:?}");
        }
    }
    let model = model(&arguments, Kind::Half, device);
    let mut stepper = Stepper::new(&Sft, &arguments, &model.decoder).unwrap();
    for step in 0..4 {
        assert!(stepper.run(&model.decoder, &batches(step), step, rate(step)).unwrap().is_finite());
    }
    let with = |stepper: &mut Stepper, scale: f32, good_steps: f32| {
        let mut state: HashMap<String, Tensor> = stepper.optimizer.state().into_iter().collect();
        state.insert("loss_scale".into(), Tensor::from_slice(&[scale]));
        state.insert("good_steps".into(), Tensor::from_slice(&[good_steps]));
        let state = state.into_iter().map(|(name, tensor)| (name, tensor.copy())).collect();
        stepper.optimizer.load_state(state, "state").unwrap();
    };
    let tensors = |stepper: &Stepper| -> Vec<Tensor> {
        let state = stepper.optimizer.state().into_iter();
        state
            .filter(|(name, _)| name != "loss_scale" && name != "good_steps")
            .map(|(_, t)| t.copy())
            .collect()
    };
    let too_large = 2f32.powi(40);
    with(&mut stepper, too_large, 0.0);
    let (before, state) = (weights(&model), tensors(&stepper));
    let mut scale = f64::from(too_large);
    let recovered = (4..40).find(|_| {
        let outcome = stepper.run(&model.decoder, &batches(4), 4, rate(4)).unwrap();
        if outcome.is_finite() {
            return true;
        }
        scale /= 2.0;
        assert!(outcome.overflowed() && outcome.loss_scale == Some(scale), "{outcome:?}");
        assert!(equal(&before, &weights(&model)) && equal(&state, &tensors(&stepper)), "{outcome:?}");
        false
    });
    assert!(recovered.is_some_and(|tries| tries > 4), "{recovered:?}");
    assert!(!equal(&before, &weights(&model)));
    with(&mut stepper, 1024.0, 1999.0);
    let scales: Vec<Option<f64>> = (0..2)
        .map(|step| stepper.run(&model.decoder, &batches(step), step, rate(step)).unwrap().loss_scale)
        .collect();
    assert_eq!(scales, [Some(2048.0); 2]);
    let saved: HashMap<String, Tensor> = stepper.optimizer.state().into_iter().collect();
    assert_eq!(saved["good_steps"].double_value(&[0]), 1.0);
    assert_eq!(saved["loss_scale"].double_value(&[0]), 2048.0);
}

#[test]
fn f16_and_offloading_on_the_cpu() {
    check_offloaded_steps(Device::Cpu);
    check_f16_steps(Device::Cpu);
}

/// Gemma's hidden states overflow f16.
#[test]
fn gemma_is_refused_in_f16() {
    let config = Config::from_dir(&crate::golden::root().join("gemma2")).unwrap();
    let options = LoadOptions::new(Kind::Half, Device::Cpu);
    let error = FastLanguageModel::untrained(config, options, 7).err().unwrap();
    assert!(
        error.to_string().starts_with("gemma2 in f16, which its hidden states overflow, is not supported"),
        "{error}"
    );
}

/// LoRA cast once for the step, and at each product.
#[test]
fn casts_change_nothing() {
    let arguments = arguments();
    let model = model(&arguments, Kind::BFloat16, Device::Cpu);
    let decoder = &model.decoder;
    let batch = objective::upload(decoder, &batches(0)[0]).unwrap();
    let casts = decoder.lora_casts().unwrap().unwrap();
    casts.refresh().unwrap();
    let gradients = |casts, policy| {
        let pass = Pass { casts, policies: &[policy], ..Pass::INFERENCE };
        let loss = Sft.loss_sum(decoder, &batch, pass).unwrap();
        let weights: Vec<Tensor> = decoder.trainable().into_iter().map(|p| p.tensor).collect();
        Tensor::run_backward(&[loss], &weights, false, false)
    };
    for policy in [Policy::KEEP, Policy::RECOMPUTE] {
        assert!(equal(&gradients(Some(&casts), policy), &gradients(None, policy)));
    }
}

#[test]
fn steps_on_the_cpu() {
    check_recorded_steps(Device::Cpu);
    check_bad_steps(Device::Cpu);
    check_resumed_steps(Device::Cpu);
    check_deterministic_steps(Device::Cpu);
}
