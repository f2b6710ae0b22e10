//! LoRA beside peft: its adapters read, ours written in its format, and training step by step.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use ferrotune::data::{Batch, BatchOptions, BatchStream, TokenDataset};
use ferrotune::io::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig};
use ferrotune::models::FastLanguageModel;
use ferrotune::ops::Pass;
use ferrotune::train::observer::{StepMetrics, TrainObserver};
use ferrotune::train::schedule::SchedulerType;
use ferrotune::train::{Objective, Sft, Trainer, TrainingArguments, objective};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::golden::{Flat, adapters, assert_close, ids, logits, rel, root, shared_data, tensors};

fn folder(adapter: &str) -> PathBuf {
    root().join("adapters").join(adapter)
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The model that an adapter of tests/golden was made for, without the adapter.
fn base_of(adapter: &str) -> FastLanguageModel {
    let config = json(&folder(adapter).join(ADAPTER_CONFIG));
    let dir = root().join(config["base_model_name_or_path"].as_str().unwrap());
    FastLanguageModel::from_pretrained(&dir, Kind::Float, Device::Cpu).unwrap()
}

fn with_adapter(adapter: &str, from: &Path) -> FastLanguageModel {
    let mut model = base_of(adapter);
    model.load_adapter(from).unwrap_or_else(|error| panic!("{adapter}: {error:#}"));
    model
}

#[test]
fn adapters_of_peft_give_its_logits() {
    let distance = |name: String| {
        let model = with_adapter(&name, &folder(&name));
        let golden = tensors(&folder(&name).join("golden.safetensors"));
        let found = logits(&model.decoder, &Flat::new([&ids(&golden["input_ids"])[..]]));
        (name, rel(&found, &golden["logits"]))
    };
    assert_close(1e-5, adapters().into_iter().map(distance));
}

/// Weights and LoRA come from a generator of their own: who else draws in the process moves nothing.
#[test]
fn a_seed_gives_the_same_start_whatever_else_draws() {
    let start = |seed| {
        let dir = root().join("llama");
        let mut model = FastLanguageModel::from_scratch(&dir, Kind::Float, Device::Cpu, seed).unwrap();
        model.get_peft_model(AdapterConfig::default(), seed).unwrap();
        let mut drawn: Vec<Tensor> = model.decoder.trainable().into_iter().map(|lora| lora.tensor).collect();
        let keep = |_: &str, weight: &Tensor| {
            drawn.push(weight.copy());
            Ok(())
        };
        model.decoder.each_weight(keep).unwrap();
        drawn
    };
    let first = start(7);
    let _other_draws = Tensor::randn([3, 5], (Kind::Float, Device::Cpu));
    let again = start(7);
    assert!(first.len() > 20 && first.len() == again.len());
    assert!(first.iter().zip(&again).all(|(a, b)| a == b));
    assert!(first.iter().zip(&start(8)).any(|(a, b)| a != b));
}

#[test]
fn without_lora_the_base_model_stays() {
    let (base, model) =
        (base_of("phi3_all_linear"), with_adapter("phi3_all_linear", &folder("phi3_all_linear")));
    let flat = Flat::new([&[5, 9, 3, 7][..]]);
    let pass = Pass { without_lora: true, ..Pass::INFERENCE };
    let hidden =
        |model: &FastLanguageModel| tch::no_grad(|| model.decoder.hidden(flat.input(), pass).unwrap());
    assert_eq!(hidden(&model), hidden(&base));
    assert_ne!(logits(&model.decoder, &flat), logits(&base.decoder, &flat));
}

#[test]
fn adapters_written_here_are_those_of_peft() {
    for name in adapters() {
        let written = tempfile::tempdir().unwrap();
        with_adapter(&name, &folder(&name)).save_trained(written.path()).unwrap();
        let theirs = tensors(&folder(&name).join(ADAPTER_WEIGHTS));
        let ours = tensors(&written.path().join(ADAPTER_WEIGHTS));
        let shapes = |tensors: &HashMap<String, Tensor>| {
            tensors.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect::<BTreeMap<_, _>>()
        };
        assert_eq!(shapes(&ours), shapes(&theirs), "{name}");
        assert!(ours.iter().all(|(key, tensor)| *tensor == theirs[key]), "{name}");

        let (theirs, ours) =
            (json(&folder(&name).join(ADAPTER_CONFIG)), json(&written.path().join(ADAPTER_CONFIG)));
        for (key, value) in theirs.as_object().unwrap() {
            let ours = ours.get(key).unwrap_or_else(|| panic!("{name}: {key} is missing"));
            // 8 and 8.0 are one number to peft, and to this comparison.
            let same = ours == value || ours.as_f64().is_some_and(|ours| Some(ours) == value.as_f64());
            assert!(same, "{name}: {key} is {ours}, peft wrote {value}");
        }
    }
}

#[test]
fn fresh_adapters_have_the_tensors_of_peft() {
    for name in adapters() {
        let mut model = base_of(&name);
        let before = logits(&model.decoder, &Flat::new([&[4, 8, 15, 16, 23, 42][..]]));
        model.get_peft_model(AdapterConfig::load(&folder(&name)).unwrap(), 3407).unwrap();
        let theirs: BTreeMap<String, Vec<i64>> = tensors(&folder(&name).join(ADAPTER_WEIGHTS))
            .into_iter()
            .map(|(key, tensor)| (key, tensor.size()))
            .collect();
        let ours =
            model.decoder.adapter_state().into_iter().map(|(key, tensor)| (key, tensor.size())).collect();
        assert_eq!(theirs, ours, "{name}");
        // B is zero at the start: the model is still the base model.
        let after = logits(&model.decoder, &Flat::new([&[4, 8, 15, 16, 23, 42][..]]));
        assert_eq!(before, after, "{name}");
    }
}

/// The padded rows `[steps, rows, longest]` of a training golden, as samples without padding.
fn samples(golden: &HashMap<String, Tensor>, lengths: &[i64]) -> Vec<(Vec<i64>, Vec<i64>)> {
    let longest = *golden["input_ids"].size().last().unwrap() as usize;
    let (input_ids, labels) = (ids(&golden["input_ids"]), ids(&golden["labels"]));
    let row = |(row, &length): (usize, &i64)| {
        let range = row * longest..row * longest + length as usize;
        (input_ids[range.clone()].to_vec(), labels[range].to_vec())
    };
    lengths.iter().enumerate().map(row).collect()
}

/// Distances of the LoRA gradients on `batch` to the `grad.*` of a golden.
fn gradient_distances(
    name: &str,
    model: &FastLanguageModel,
    batch: &Batch,
    golden: &HashMap<String, Tensor>,
) -> Vec<(String, f64)> {
    let on_device = objective::upload(&model.decoder, batch).unwrap();
    let loss =
        Sft.loss_sum(&model.decoder, &on_device, Pass::INFERENCE).unwrap() / batch.num_targets() as f64;
    loss.backward();
    let mut parameters = model.decoder.trainable();
    let distances = parameters
        .iter_mut()
        .map(|parameter| {
            let key = parameter.name.trim_start_matches("base_model.model.").to_string();
            let distance = rel(&parameter.tensor.grad(), &golden[&format!("grad.{key}")]);
            parameter.tensor.zero_grad();
            (format!("{name} gradient of {key}"), distance)
        })
        .collect();
    assert_eq!(parameters.len(), golden.keys().filter(|key| key.starts_with("grad.")).count(), "{name}");
    distances
}

#[derive(Default)]
struct Losses(Vec<f64>);

impl TrainObserver for Losses {
    fn on_step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.0.push(metrics.loss);
        Ok(())
    }
}

/// Trains with the AdamW settings of the goldens, four samples a step in their order. Returns the losses.
fn train(model: &mut FastLanguageModel, samples: &[(Vec<i64>, Vec<i64>)], steps: usize) -> Vec<f64> {
    let mut data = TokenDataset::new();
    for (input_ids, labels) in samples {
        let ids: Vec<u32> = input_ids.iter().map(|&id| id as u32).collect();
        data.push(&ids, &labels.iter().map(|&label| label != -100).collect::<Vec<_>>());
    }
    let output = tempfile::tempdir().unwrap();
    let arguments = TrainingArguments {
        max_steps: Some(steps as u64),
        per_device_train_batch_size: 4,
        gradient_accumulation_steps: 1,
        learning_rate: Some(1e-3),
        lr_scheduler_type: SchedulerType::Constant,
        warmup_ratio: 0.0,
        weight_decay: 0.01,
        max_grad_norm: 0.0,
        output_dir: output.path().to_path_buf(),
        ..TrainingArguments::default()
    };
    let options =
        BatchOptions { batch_size: 4, max_seq_length: 512, packing: false, shuffle: false, seed: 0 };
    let mut losses = Losses::default();
    let trainer = Trainer {
        model,
        objective: &Sft,
        arguments: &arguments,
        train: Box::new(BatchStream::new(Arc::new(data), options).unwrap()),
        eval: None,
        observer: &mut losses,
        plan: None,
        stop: &AtomicBool::new(false),
    };
    trainer.run(None).unwrap();
    losses.0
}

/// Gradients, losses and final tensors of a training golden; `initial` holds the adapter it starts from.
fn assert_trains_like_peft(
    name: &str,
    model: &mut FastLanguageModel,
    golden: &HashMap<String, Tensor>,
    lengths: &[i64],
) {
    let samples = samples(golden, lengths);
    let first =
        Batch::from_samples(samples[..4].iter().map(|(input_ids, labels)| (&input_ids[..], &labels[..])));
    assert_close(1e-5, gradient_distances(name, model, &first, golden));

    let expected: Vec<f64> = golden["losses"].to_kind(Kind::Double).try_into().unwrap();
    let losses = train(model, &samples, expected.len());
    let steps = losses.iter().zip(&expected).enumerate();
    assert_eq!(losses.len(), expected.len());
    assert_close(
        1e-4,
        steps.map(|(step, (a, b))| (format!("{name} loss of step {}", step + 1), (a - b).abs() / b)),
    );

    // AdamW's first steps are sign(gradient) * lr: an element whose gradient is nothing but rounding goes either way, so
    // single elements (the max-norm of `rel`) say nothing.
    let euclidean = |a: &Tensor, b: &Tensor| (a - b).norm().double_value(&[]) / b.norm().double_value(&[]);
    let finals = model.decoder.trainable().into_iter().map(|parameter| {
        let key = format!("final.{}", parameter.name.trim_start_matches("base_model.model."));
        (format!("{name} {key}"), euclidean(&parameter.tensor, &golden[&key]))
    });
    assert_close(1e-3, finals);
}

#[test]
fn thirty_steps_of_every_kind_follow_peft() {
    for name in adapters() {
        let path = folder(&name).join("train.safetensors");
        if path.is_file() {
            let golden = tensors(&path);
            let lengths = ids(&golden["lengths"]);
            assert_trains_like_peft(&name, &mut with_adapter(&name, &folder(&name)), &golden, &lengths);
        }
    }
}

#[test]
fn training_of_trained_models_follows_peft() {
    let Some(data) = shared_data("LoRA training of trained models") else { return };
    for name in ["stories260K", "tinystories-656k"] {
        let golden = tensors(&data.join("golden").join(name).join("lora.safetensors"));
        let adapter = tempfile::tempdir().unwrap();
        let settings = json(&data.join("golden").join(name).join("lora.json"));
        fs::write(adapter.path().join(ADAPTER_CONFIG), settings["lora"].to_string()).unwrap();
        let initial: Vec<(String, &Tensor)> = golden
            .iter()
            .filter_map(|(key, tensor)| {
                Some((format!("base_model.model.{}", key.strip_prefix("initial.")?), tensor))
            })
            .collect();
        Tensor::write_safetensors(&initial, adapter.path().join(ADAPTER_WEIGHTS)).unwrap();

        let mut model =
            FastLanguageModel::from_pretrained(&data.join("models").join(name), Kind::Float, Device::Cpu)
                .unwrap();
        model.load_adapter(adapter.path()).unwrap();
        let lengths = ids(&golden["attention_mask"].sum_dim_intlist([1i64].as_slice(), false, Kind::Int64));
        assert_trains_like_peft(name, &mut model, &golden, &lengths);
    }
}
