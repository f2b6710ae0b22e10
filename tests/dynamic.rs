//! Dynamic 4-bit: what modules are judged by, what is chosen, and what is written of it.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ferrotune::data::Batch;
use ferrotune::export::{CalibrationReport, DYNAMIC_PLAN, DynamicPlan, PlannedModule};
use ferrotune::io::Weights;
use ferrotune::models::FastLanguageModel;
use ferrotune::nn::LoadOptions;
use ferrotune::ops::{Nf4, Policy, nf4_bytes};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::golden::{Flat, assert_close, checkpoints, load, logits, root};
use crate::parity::gradients_of;

fn tiny() -> PathBuf {
    root().join("../../examples/tiny/model")
}

fn ferrotune(flags: &[&str], paths: &[(&str, &Path)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
    command.args(flags).args(["--device", "cpu", "--threads", "1"]);
    for (flag, path) in paths {
        command.arg(flag).arg(path);
    }
    command.output().unwrap()
}

fn done(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// `<G_s, NF4(W) - W>` against the gradients of all weights by autograd over the whole model, f64.
#[test]
fn changes_are_gradients_times_errors() {
    let mut distances = Vec::new();
    for name in checkpoints() {
        let mut decoder = load(&root().join(&name), Kind::Double);
        let sequences: [&[i64]; 2] = [&[5, 9, 3, 7, 11, 2, 8], &[4, 4, 10, 6]];
        let samples: Vec<Batch> = sequences.iter().map(|ids| Batch::from_samples([(*ids, *ids)])).collect();
        let found = decoder.nf4_sensitivity(&samples, |_| ()).unwrap();
        assert_eq!(found.targets, 9);
        let weights: HashMap<String, Tensor> =
            decoder.state_dict(Kind::Double).unwrap().into_iter().collect();
        // In f32 from here on: their gradients are rounded to that.
        decoder.train_all().unwrap();
        for (index, sequence) in sequences.iter().enumerate() {
            let (_, gradients) = gradients_of(&decoder, &[*sequence], Policy::KEEP);
            for module in &found.modules {
                let key = format!("{}.weight", module.module);
                let weight = &weights[&key];
                let nf4 = Nf4::quantize(&weight.to_kind(Kind::Float)).unwrap();
                let error = nf4.dequantize(Kind::Double).unwrap() - weight;
                let gradient = gradients[&key].to_kind(Kind::Double) * (sequence.len() - 1) as f64;
                let expected = (&gradient * &error).sum(Kind::Double).double_value(&[]);
                let scale = gradient.norm().double_value(&[]) * error.norm().double_value(&[]);
                let distance = (module.changes[index] - expected).abs() / scale;
                distances.push((format!("{name}, {}, sample {index}", module.module), distance));
            }
            // They are views of what the next sample would add to.
            for parameter in decoder.trainable() {
                let _ = parameter.tensor.grad().zero_();
            }
        }
        assert!(found.modules.iter().all(|module| module.module.contains("layers.")), "{name}");
        assert!(found.modules.iter().all(|module| !module.module.contains("vision")), "{name}");
    }
    assert_close(1e-6, distances);
}

fn module(name: &str, rows: i64, score: f64) -> PlannedModule {
    PlannedModule {
        module: name.to_string(),
        loaded_as: name.to_string(),
        shape: [rows, 64],
        score,
        nf4_bytes: nf4_bytes([rows, 64]),
        kept_bytes: 2 * 64 * rows as u64,
        kept: false,
    }
}

#[test]
fn the_budget_goes_to_the_highest_score_a_byte() {
    let calibration = CalibrationReport { source: String::new(), samples: 1, targets: 1, loss: 0.0 };
    let choose = |budget: f64| {
        let modules = vec![
            module("large", 4096, 5.0),
            module("small", 256, 1.0),
            module("equal", 256, 1.0),
            module("useless", 256, 0.0),
            module("rest", 20_000, 1.0),
        ];
        DynamicPlan::choose(modules, budget, calibration.clone())
    };
    let kept = |budget: f64| choose(budget).kept().into_iter().collect::<Vec<_>>().join(" ");
    assert_eq!(kept(0.0), "");
    // The first of two that are equal; then both; the large one is skipped for what still fits.
    assert_eq!(kept(0.03), "small");
    assert_eq!(kept(0.1), "equal small");
    assert_eq!(kept(0.6), "equal large small");
    assert_eq!(kept(9.0), "equal large rest small");
    let plan = choose(0.6);
    assert!(plan.bytes > plan.nf4_bytes && plan.bytes as f64 <= 1.6 * plan.nf4_bytes as f64);
}

/// The command, twice: the plan beside the weights, what it keeps to the byte, and both ways of loading it.
#[test]
fn a_checkpoint_and_its_plan() {
    let place = tempfile::tempdir().unwrap();
    let (out, again) = (place.path().join("out"), place.path().join("again"));
    let data = place.path().join("data.jsonl");
    let rows = fs::read_to_string(tiny().join("../train.jsonl")).unwrap();
    fs::write(&data, rows.lines().take(20).collect::<Vec<_>>().join("\n")).unwrap();
    let dynamic = ["--quant", "dynamic-nf4", "--quant-budget", "0.2", "--calibration-dataset"];
    let flags = [&dynamic[..], &[data.to_str().unwrap()]].concat();
    let quantize = |to: &Path| {
        done(ferrotune(&[&["quantize"], &flags[..]].concat(), &[("--model", &tiny()), ("--output-dir", to)]))
    };
    let table = quantize(&out);
    quantize(&again);
    for file in ["model.safetensors", "config.json", DYNAMIC_PLAN] {
        assert_eq!(fs::read(out.join(file)).unwrap(), fs::read(again.join(file)).unwrap(), "{file}");
    }

    let plan = DynamicPlan::load(&out).unwrap();
    let kept = plan.kept();
    assert_eq!(plan.modules.len(), 28);
    assert!(!kept.is_empty() && plan.bytes as f64 <= 1.2 * plan.nf4_bytes as f64);
    assert!(kept.iter().all(|name| table.contains(name.as_str())), "{table}");
    let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    let skipped = config["quantization_config"]["llm_int8_skip_modules"].as_array().unwrap();
    let expected: BTreeSet<&str> = kept.iter().map(String::as_str).chain(["lm_head"]).collect();
    assert_eq!(skipped.iter().map(|name| name.as_str().unwrap()).collect::<BTreeSet<_>>(), expected);
    let (before, after) = (Weights::open(&tiny()).unwrap(), Weights::open(&out).unwrap());
    for module in &plan.modules {
        let weight = format!("{}.weight", module.module);
        assert_eq!(after.quant_state(&weight).unwrap().is_none(), module.kept, "{weight}");
        let bytes = |weights: &Weights| weights.with_bytes(&weight, |bytes| Ok(bytes.to_vec())).unwrap();
        assert_eq!(bytes(&before) == bytes(&after), module.kept, "{weight}");
    }

    let load = |dir: &Path, load_in_4bit: bool, kept: &BTreeSet<String>| {
        let options = LoadOptions { load_in_4bit, ..LoadOptions::new(Kind::Float, Device::Cpu) };
        FastLanguageModel::from_pretrained_keeping(dir, options, kept).unwrap().decoder
    };
    let flat = Flat::new([&[5, 9, 3, 7, 11, 2][..]]);
    let stored = logits(&load(&out, false, &BTreeSet::new()), &flat);
    assert_eq!(stored, logits(&load(&tiny(), true, &kept), &flat));
    assert_ne!(stored, logits(&load(&tiny(), true, &BTreeSet::new()), &flat));
    let score = |flags: &[&str], model: &Path| {
        done(ferrotune(&[&["score", "--text", "What is 1+1?"], flags].concat(), &[("--model", model)]))
    };
    assert_eq!(score(&[], &out), score(&[&["--load-in-4bit"], &flags[..]].concat(), &tiny()));
}

/// QLoRA on a dynamic base: the plan stands in the output folder and in run.yaml, and a resumed run goes by it.
#[test]
fn training_on_a_dynamic_base() {
    let place = tempfile::tempdir().unwrap();
    let (out, data) = (place.path().join("out"), tiny().join("../train.jsonl"));
    let train = |more: &[&str]| {
        let flags = ["train", "--load-in-4bit", "--quant", "dynamic-nf4", "--save-steps", "2"];
        let paths = [("--model", &*tiny()), ("--dataset", &data), ("--output-dir", &out)];
        ferrotune(&[&flags, more].concat(), &paths)
    };
    let text = done(train(&["--max-steps", "2"]));
    assert!(text.contains("dynamic-nf4 by shipped text"), "{text}");
    assert!(!DynamicPlan::load(&out).unwrap().kept().is_empty());
    assert!(fs::read_to_string(out.join("run.yaml")).unwrap().contains("quant: dynamic-nf4"));
    let mut plan: Value = serde_json::from_slice(&fs::read(out.join(DYNAMIC_PLAN)).unwrap()).unwrap();
    plan["calibration"]["source"] = json!("marked");
    fs::write(out.join(DYNAMIC_PLAN), plan.to_string()).unwrap();
    done(train(&["--max-steps", "3", "--resume-from-checkpoint"]));
    assert_eq!(DynamicPlan::load(&out).unwrap().calibration.source, "marked");
}

#[test]
fn refusals() {
    let place = tempfile::tempdir().unwrap();
    let refused = |flags: &[&str], paths: &[(&str, &Path)], what: &str| {
        let output = ferrotune(flags, paths);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(what), "{error}");
    };
    let dynamic = ["--quant", "dynamic-nf4"];
    let model = [("--model", &*tiny())];
    let alone = "says how --load-in-4bit loads";
    refused(&[&["score", "--text", "a"], &dynamic[..]].concat(), &model, alone);
    refused(&[&["train", "--dataset", "data.jsonl"], &dynamic[..]].concat(), &model, alone);
    let quantized = root().join("nf4/nested");
    let paths = [("--model", &*quantized), ("--output-dir", &*place.path().join("out"))];
    refused(&[&["quantize"], &dynamic[..]].concat(), &paths, "is quantised already");
    let paths = [("--model", &*tiny()), ("--output-dir", &*place.path().join("out"))];
    refused(&[&["quantize", "--quant-budget=-1"], &dynamic[..]].concat(), &paths, "--quant-budget -1");
}
