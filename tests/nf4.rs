//! 4-bit weights beside bitsandbytes: bytes, checkpoints both ways, and LoRA on them.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ferrotune::io::adapter::AdapterConfig;
use ferrotune::io::{QuantState, Weights};
use ferrotune::models::FastLanguageModel;
use ferrotune::nn::LoadOptions;
use ferrotune::ops::{self, Linear, Lora, Nf4, Part, PartWeight, Pass, Policy, Weight};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::golden::{Fed, Flat, assert_close, ids, logits, rel, root, tensors};
use crate::ops::random;
use crate::parity::gradients_of;

const STATE: &str = ".quant_state.bitsandbytes__nf4";
const MODELS: [&str; 3] = ["nested", "plain_bf16_storage", "mixed"];

fn folder(name: &str) -> PathBuf {
    root().join("nf4").join(name)
}

fn load(dir: &Path, kind: Kind, load_in_4bit: bool) -> FastLanguageModel {
    let options = LoadOptions { load_in_4bit, ..LoadOptions::new(kind, Device::Cpu) };
    FastLanguageModel::from_pretrained_with(dir, options).unwrap_or_else(|error| panic!("{error:#}"))
}

/// The matrices of tests/golden/nf4, by name.
pub fn matrices() -> BTreeMap<String, Tensor> {
    tensors(&folder("matrices.safetensors"))
        .into_iter()
        .filter_map(|(key, tensor)| Some((key.strip_suffix(".weight")?.to_string(), tensor)))
        .collect()
}

#[test]
fn bytes_are_those_of_bitsandbytes() {
    let golden = tensors(&folder("matrices.safetensors"));
    for (name, weight) in matrices() {
        let ours = Nf4::quantize(&weight).unwrap();
        let nested = ours.nested.as_ref().unwrap();
        let theirs = |key: &str| golden[&format!("{name}.{key}")].shallow_clone();
        assert_eq!(ours.packed, theirs("packed").flatten(0, -1), "{name}: weight");
        assert_eq!(ours.quant_map, golden["quant_map"], "{name}: quant_map");
        assert_eq!(nested.quant_map, golden["nested_quant_map"], "{name}: nested_quant_map");
        let offset = theirs("nested_offset").double_value(&[]);
        let ulps = ((nested.offset as f32).to_bits() as i64 - (offset as f32).to_bits() as i64).abs();
        assert!(ulps <= 1, "{name}: nested_offset is {}, bitsandbytes has {offset}", nested.offset);
        // The last bit of a mean depends on the width of the processor's vectors, and the second level on that bit.
        if ulps == 0 {
            assert_eq!(ours.absmax, theirs("absmax"), "{name}: absmax");
            assert_eq!(nested.absmax, theirs("nested_absmax"), "{name}: nested_absmax");
        }
    }
}

#[test]
fn values_are_those_of_bitsandbytes() {
    let golden = tensors(&folder("dequantized.safetensors"));
    let mut compared = 0;
    for (name, weight) in matrices() {
        let nf4 = Nf4::quantize(&weight).unwrap();
        let f32 = nf4.dequantize(Kind::Float).unwrap();
        assert_eq!(nf4.dequantize(Kind::Double).unwrap(), f32.to_kind(Kind::Double), "{name}");
        for (kind, word) in [(Kind::Float, "float32"), (Kind::Half, "float16"), (Kind::BFloat16, "bfloat16")]
        {
            let found = nf4.dequantize(kind).unwrap();
            // Rows of a wider tensor; columns, which the plain formula fills.
            let [rows, columns] = nf4.shape;
            let wide = Tensor::zeros([rows, columns + 3], (kind, Device::Cpu));
            nf4.dequantize_into(&wide.narrow(1, 0, columns)).unwrap();
            assert_eq!(wide.narrow(1, 0, columns), found, "{name} {word}, wide");
            assert_eq!(wide.narrow(1, columns, 3).abs().sum(Kind::Float).double_value(&[]), 0.0);
            let turned = Tensor::zeros([columns, rows], (kind, Device::Cpu));
            nf4.dequantize_into(&turned.transpose(0, 1)).unwrap();
            assert_eq!(turned.transpose(0, 1), found, "{name} {word}, formula");
            if let Some(theirs) = golden.get(&format!("{name}.{word}")) {
                assert_eq!(found, *theirs, "{name} {word}");
                compared += 1;
            }
        }
    }
    assert!(compared >= 20, "{compared}");
}

#[test]
fn pieces_give_the_same_bytes() {
    let weight = random(&[50, 70]).to_kind(Kind::BFloat16);
    let whole = Nf4::quantize(&weight).unwrap();
    let mut quantizer = ops::Nf4Quantizer::new([50, 70], Device::Cpu).unwrap();
    let flat = weight.view([-1]);
    for (start, length) in [(0, 640), (640, 64), (704, 3500 - 704)] {
        quantizer.push(&flat.narrow(0, start, length)).unwrap();
    }
    let pieces = quantizer.finish().unwrap();
    assert_eq!(pieces.packed, whole.packed);
    assert_eq!(pieces.absmax, whole.absmax);
    let incomplete = ops::Nf4Quantizer::new([50, 70], Device::Cpu).unwrap().finish().unwrap_err();
    assert_eq!(incomplete.to_string(), "nf4: 0 of 3500 elements");
    for poison in [f64::NAN, f64::INFINITY] {
        let broken = weight.shallow_clone();
        let _ = broken.narrow(0, 13, 1).fill_(poison);
        assert_eq!(Nf4::quantize(&broken).unwrap_err().to_string(), "NaN or infinite values");
    }
}

#[test]
fn models_of_bitsandbytes_give_its_logits() {
    let dense = load(&folder("source"), Kind::Float, false);
    let distance = |name: &str| {
        let model = load(&folder(name), Kind::Float, false);
        assert!(model.decoder.is_quantized());
        assert_eq!(model.decoder.num_parameters(), dense.decoder.num_parameters());
        let golden = tensors(&folder(name).join("golden.safetensors"));
        let found = logits(&model.decoder, &Flat::new([&ids(&golden["input_ids"])[..]]));
        (name.to_string(), rel(&found, &golden["logits"]))
    };
    assert_close(1e-5, MODELS.map(distance));
}

#[test]
fn quantising_while_loading_is_what_bitsandbytes_does() {
    let flat = Flat::new([&[5, 9, 3, 7, 11, 2][..]]);
    let ours = load(&folder("source"), Kind::Float, true);
    assert_eq!(
        logits(&ours.decoder, &flat),
        logits(&load(&folder("nested"), Kind::Float, false).decoder, &flat)
    );
    // What a quantised checkpoint keeps in 16 bits stays so.
    let flagged = load(&folder("mixed"), Kind::Float, true);
    assert_eq!(
        logits(&flagged.decoder, &flat),
        logits(&load(&folder("mixed"), Kind::Float, false).decoder, &flat)
    );
}

/// One token after the other on the row path, and all at once.
#[test]
fn decoding_reads_quantised_rows() {
    for kind in [Kind::Float, Kind::Double] {
        let model = load(&folder("mixed"), kind, false);
        let sequence = [5, 9, 3, 7, 11, 2];
        let whole = logits(&model.decoder, &Flat::new([&sequence[..]]));
        let mut fed = Fed::new(&model.decoder, 8);
        for length in 1..=sequence.len() {
            let found = fed.logits(&sequence[..length], length);
            let distance = rel(&found, &whole.get(length as i64 - 1));
            assert!(distance < if kind == Kind::Double { 1e-12 } else { 1e-5 }, "{kind:?}: {distance:e}");
        }
    }
}

/// A Linear of two parts with LoRA and bias: quantised, dense and quantised; then the same with one dense matrix.
fn linears(kind: Kind) -> [Linear; 2] {
    let drawn = |shape: &[i64]| random(shape).to_kind(kind);
    let quantized = |rows: i64| Nf4::quantize(&random(&[rows, 37]).to_kind(Kind::Float)).unwrap();
    let (first, second, third) = (quantized(24), drawn(&[10, 37]), quantized(11));
    let joined = Tensor::cat(
        &[first.dequantize(kind).unwrap(), second.shallow_clone(), third.dequantize(kind).unwrap()],
        0,
    );
    let lora = |rows| Lora {
        a: drawn(&[4, 37]).set_requires_grad(true),
        b: drawn(&[rows, 4]).set_requires_grad(true),
        scale: 0.5,
        dropout: 0.0,
    };
    let (bias, loras) = (drawn(&[45]), [lora(24), lora(11)]);
    let parts = || {
        let copy = |lora: &Lora| Lora {
            a: lora.a.detach().copy().set_requires_grad(true),
            b: lora.b.detach().copy().set_requires_grad(true),
            ..*lora
        };
        vec![
            Part { name: "a".into(), rows: 24, lora: Some(copy(&loras[0])) },
            Part { name: "b".into(), rows: 10, lora: None },
            Part { name: "c".into(), rows: 11, lora: Some(copy(&loras[1])) },
        ]
    };
    let weights = vec![PartWeight::Nf4(first), PartWeight::Dense(second), PartWeight::Nf4(third)];
    [
        Linear { weight: Weight::Parts(weights), bias: Some(bias.shallow_clone()), parts: parts() },
        Linear { weight: Weight::Joined(joined), bias: Some(bias), parts: parts() },
    ]
}

#[test]
fn gradients_pass_through_quantised_weights() {
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        let (x, dy) = (random(&[7, 37]).to_kind(kind), random(&[7, 45]).to_kind(kind));
        let [ours, dense] = linears(kind).map(|linear| {
            let x = x.detach().copy().set_requires_grad(true);
            let y = ops::linear(&x, &linear, Pass::INFERENCE).unwrap();
            let loras = linear.parts.iter().filter_map(|part| part.lora.as_ref());
            let inputs: Vec<&Tensor> =
                loras.flat_map(|lora| [&lora.a, &lora.b]).chain(std::iter::once(&x)).collect();
            let gradients = Tensor::run_backward(&[(&y * &dy).sum(kind)], &inputs, false, false);
            // One row takes another path on the CPU.
            let row = tch::no_grad(|| ops::linear(&x.narrow(0, 2, 1), &linear, Pass::INFERENCE).unwrap());
            let distance = rel(&row, &y.narrow(0, 2, 1));
            assert!(distance < if kind == Kind::BFloat16 { 1e-2 } else { 1e-5 }, "{kind:?}: {distance:e}");
            (y, gradients)
        });
        assert_eq!(ours.0, dense.0, "{kind:?}");
        assert!(ours.1.iter().zip(&dense.1).all(|(a, b)| a == b), "{kind:?}");
    }
}

/// A whole model in 4 bits beside a dense one that holds the same values, with and without recomputation.
#[test]
fn a_model_in_4_bits_trains_as_its_dense_twin() {
    for name in MODELS {
        let twin = tempfile::tempdir().unwrap();
        load(&folder(name), Kind::Float, false).save_pretrained(twin.path(), Kind::Float).unwrap();
        let gradients = |dir: &Path, policy| {
            let mut model = load(dir, Kind::Double, false);
            let config =
                AdapterConfig { r: 4, init_lora_weights: "false".parse().unwrap(), ..Default::default() };
            model.get_peft_model(config, 7).unwrap();
            gradients_of(&model.decoder, &[&[3, 8, 5, 9, 14], &[7, 6, 5]], policy)
        };
        for policy in [Policy::KEEP, Policy::RECOMPUTE] {
            let (loss, ours) = gradients(&folder(name), policy);
            let (expected, dense) = gradients(twin.path(), policy);
            assert_eq!(ours.len(), 14, "{name}");
            let distances = ours.iter().map(|(key, gradient)| (key.clone(), rel(gradient, &dense[key])));
            assert_close(1e-11, distances);
            assert!((loss - expected).abs() < 1e-12 * expected, "{name}: {loss} {expected}");
        }
    }
}

/// The tiles of a long batch share what is dequantised once for them.
#[test]
fn long_batches_give_the_same_gradients_in_tiles() {
    let sequences: Vec<Vec<i64>> = (0..1265).map(|i| (0..13).map(|j| (i * 5 + j) % 16).collect()).collect();
    let all: Vec<&[i64]> = sequences.iter().map(Vec::as_slice).collect();
    let mut model = load(&folder("nested"), Kind::Float, false);
    let config = AdapterConfig { r: 4, init_lora_weights: "false".parse().unwrap(), ..Default::default() };
    model.get_peft_model(config, 7).unwrap();
    let gradients = |policy| {
        for mut parameter in model.decoder.trainable() {
            parameter.tensor.zero_grad();
        }
        let (_, found) = gradients_of(&model.decoder, &all, policy);
        found.into_iter().map(|(key, gradient)| (key, gradient.copy())).collect::<HashMap<_, _>>()
    };
    let (whole, tiled) = (gradients(Policy::KEEP), gradients(Policy::RECOMPUTE));
    assert_close(1e-5, tiled.iter().map(|(key, gradient)| (key.clone(), rel(gradient, &whole[key]))));
}

#[test]
fn whole_4_bit_weights_do_not_train() {
    let error = load(&folder("nested"), Kind::Float, false).train_all().unwrap_err().to_string();
    assert!(error.starts_with("full fine-tuning of a 4-bit model is not supported"), "{error}");
}

fn copy_of(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

/// The tensors of a quantised golden, changed.
fn broken(name: &str, change: impl FnOnce(&mut HashMap<String, Tensor>)) -> String {
    let copy = copy_of(&folder(name));
    let path = copy.path().join("model.safetensors");
    let mut weights = tensors(&path);
    change(&mut weights);
    Tensor::write_safetensors(&weights.iter().collect::<Vec<_>>(), &path).unwrap();
    let error = FastLanguageModel::from_pretrained(copy.path(), Kind::Float, Device::Cpu).err();
    format!("{:#}", error.unwrap_or_else(|| panic!("{name} loads")))
}

#[test]
fn damaged_quant_states_are_named() {
    const WEIGHT: &str = "model.layers.0.mlp.up_proj.weight";
    let state = |change: &dyn Fn(&mut Value)| {
        let found = tensors(&folder("nested").join("model.safetensors"));
        let bytes: Vec<u8> = (&found[&format!("{WEIGHT}{STATE}")]).try_into().unwrap();
        let mut value = serde_json::from_slice(&bytes).unwrap();
        change(&mut value);
        Tensor::from_slice(value.to_string().as_bytes())
    };
    let with_state = |change: &dyn Fn(&mut Value)| {
        broken("nested", |weights| drop(weights.insert(format!("{WEIGHT}{STATE}"), state(change))))
    };
    let shortened = |suffix: &str| {
        broken("nested", |weights| {
            let tensor = weights.get_mut(&format!("{WEIGHT}{suffix}")).unwrap();
            *tensor = tensor.narrow(0, 0, tensor.size()[0] - 1).copy();
        })
    };
    let without =
        |suffix: &str| broken("nested", |weights| drop(weights.remove(&format!("{WEIGHT}{suffix}"))));
    let cases = [
        (shortened(""), vec!["holds 4095 bytes, expected 4096 for [128, 64]"]),
        (shortened(".absmax"), vec![".absmax has shape [127], expected [128]"]),
        (shortened(".quant_map"), vec![".quant_map has shape [15], expected [16]"]),
        (shortened(".nested_quant_map"), vec![".nested_quant_map has shape [255], expected [256]"]),
        (shortened(STATE), vec![STATE, "is no quant_state"]),
        (without(".absmax"), vec!["no tensor named", ".absmax"]),
        (without(".nested_quant_map"), vec!["no tensor named", ".nested_quant_map"]),
        (without(".nested_absmax"), vec![".absmax holds Uint8, expected Float"]),
        // Without its state the weight is a matrix of bytes.
        (without(STATE), vec!["has shape [4096, 1], expected [128, 64]"]),
        (
            with_state(&|state| state["shape"] = json!([64, 128])),
            vec![STATE, "has shape [64, 128], expected [128, 64]"],
        ),
        (with_state(&|state| state["blocksize"] = json!(48)), vec![STATE, "has blocksize 48"]),
        (with_state(&|state| state["quant_type"] = json!("fp4")), vec![STATE, "\"fp4\""]),
        (
            with_state(&|state| drop(state.as_object_mut().unwrap().remove("nested_offset"))),
            vec![STATE, "nested_offset None"],
        ),
        (
            broken("nested", |weights| {
                let state = weights.remove(&format!("{WEIGHT}{STATE}")).unwrap();
                weights.insert(format!("{WEIGHT}.quant_state.bitsandbytes__fp4"), state);
            }),
            vec!["of type fp4 is not supported (supported: nf4)"],
        ),
        (
            broken("nested", |weights| {
                let _ = weights.get_mut(&format!("{WEIGHT}.nested_absmax")).unwrap().fill_(f64::NAN);
            }),
            vec![".nested_absmax holds NaN"],
        ),
        (
            broken("plain_bf16_storage", |weights| {
                let absmax = weights.get_mut(&format!("{WEIGHT}.absmax")).unwrap();
                *absmax = absmax.to_kind(Kind::Uint8);
            }),
            vec![".absmax holds Uint8, expected Float"],
        ),
    ];
    for (error, words) in cases {
        for word in words.iter().chain(&["model.safetensors", WEIGHT]) {
            assert!(error.contains(word), "{word:?} is not named: {error}");
        }
    }
}

fn ferrotune(command: &str, flags: &[&str], paths: &[(&str, &Path)]) -> Output {
    let mut run = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
    run.args([command, "--device", "cpu", "--threads", "1"]).args(flags);
    for (flag, path) in paths {
        run.arg(flag).arg(path);
    }
    run.output().unwrap()
}

#[test]
fn the_command_writes_what_bitsandbytes_writes() {
    for (source, sharded) in
        [("nf4/source", false), ("llama_sharded", true), ("llama_gqa_llama3", false), ("phi3", false)]
    {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("out");
        let dir = copy_of(&root().join(source));
        fs::write(dir.path().join("generation_config.json"), "{\"temperature\": 0.5}").unwrap();
        let output = ferrotune("quantize", &[], &[("--model", dir.path()), ("--output-dir", &out)]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(fs::read(out.join("generation_config.json")).unwrap(), b"{\"temperature\": 0.5}");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1, "something was left beside");
        let names = |dir: &Path| {
            let shard =
                |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
            let mut names: Vec<String> =
                fs::read_dir(dir).unwrap().map(shard).filter(|name| name.contains("safetensors")).collect();
            names.sort();
            names
        };
        let model_files =
            |dir: &Path| names(dir).into_iter().filter(|name| name.starts_with("model")).collect::<Vec<_>>();
        assert_eq!(model_files(&out), model_files(dir.path()), "{source}");
        assert_eq!(model_files(&out).len() > 1, sharded);

        let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["quantization_config"]["quant_method"], "bitsandbytes");
        assert_eq!(config["quantization_config"]["llm_int8_skip_modules"], json!(["lm_head"]));

        let flat = Flat::new([&[5, 9, 3, 7, 11, 2][..]]);
        let (ours, flagged) = (load(&out, Kind::Float, false), load(dir.path(), Kind::Float, true));
        assert!(ours.decoder.is_quantized());
        assert_eq!(logits(&ours.decoder, &flat), logits(&flagged.decoder, &flat), "{source}");

        if source == "nf4/source" {
            let state = |tensor: &Tensor| -> QuantState {
                serde_json::from_slice(&Vec::<u8>::try_from(tensor).unwrap()).unwrap()
            };
            let weights = "model.safetensors";
            let (ours, theirs) = (tensors(&out.join(weights)), tensors(&folder("nested").join(weights)));
            assert_eq!(ours.len(), theirs.len());
            for (name, tensor) in &ours {
                match name.ends_with(STATE) {
                    true => assert_eq!(state(tensor), state(&theirs[name]), "{name}"),
                    false => assert_eq!(*tensor, theirs[name], "{name}"),
                }
            }
        }
        let again =
            ferrotune("quantize", &[], &[("--model", &out), ("--output-dir", &place.path().join("again"))]);
        assert_eq!(again.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&again.stderr).contains("is quantised already"));
        let over = ferrotune("quantize", &[], &[("--model", dir.path()), ("--output-dir", &out)]);
        assert_eq!(over.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&over.stderr).contains("is there already"));
    }
}

#[test]
fn a_broken_source_leaves_nothing_behind() {
    let dir = copy_of(&root().join("llama"));
    let path = dir.path().join("model.safetensors");
    let mut weights = tensors(&path);
    let name = "model.layers.1.mlp.up_proj.weight";
    let _ = weights.get_mut(name).unwrap().narrow(0, 3, 1).fill_(f64::NAN);
    Tensor::write_safetensors(&weights.iter().collect::<Vec<_>>(), &path).unwrap();
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let output = ferrotune("quantize", &[], &[("--model", dir.path()), ("--output-dir", &out)]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        error.contains(name) && error.contains("NaN or infinite") && error.contains("model.safetensors"),
        "{error}"
    );
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    let error = FastLanguageModel::from_pretrained_with(
        dir.path(),
        LoadOptions { load_in_4bit: true, ..LoadOptions::new(Kind::Float, Device::Cpu) },
    );
    assert!(format!("{:#}", error.err().unwrap()).contains(name));
}

#[test]
fn flags() {
    let score = |flags: &[&str], dir: &Path| {
        let output = ferrotune("score", flags, &[("--model", dir)]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let ids = ["--input-ids", "[5, 9, 3, 7]"];
    let (dense, nested) = (folder("source"), folder("nested"));
    assert_eq!(score(&[&ids[..], &["--load-in-4bit"]].concat(), &dense), score(&ids, &nested));
    assert_ne!(score(&ids, &dense), score(&ids, &nested));

    for all_weights in ["--full-finetuning", "--from-scratch"] {
        let output = ferrotune(
            "train",
            &["--load-in-4bit", all_weights, "--dataset", "data.jsonl"],
            &[("--model", &root().join("llama"))],
        );
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("--load-in-4bit and --full-finetuning"));
    }
}

#[test]
fn weights_are_4_bits_on_disk() {
    let place = tempfile::tempdir().unwrap();
    let source = root().join("llama_bf16");
    let out = place.path().join("out");
    ferrotune::export::quantize(&source, &out, Device::Cpu, None, |_, _| ()).unwrap();
    let weights = Weights::open(&out).unwrap();
    let state = weights.quant_state("model.layers.0.mlp.gate_proj.weight").unwrap().unwrap();
    assert_eq!((state.dtype.as_str(), &state.shape[..]), ("bfloat16", &[40, 32][..]));
    assert_eq!(weights.kind("model.embed_tokens.weight").unwrap(), Kind::BFloat16);
}
