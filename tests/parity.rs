//! The decoder beside transformers: logits and gradients of tests/golden and of the trained models in the shared test
//! data, f32 on the CPU. And the decoder beside itself: cached and uncached, packed and apart, kept and recomputed.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use ferrotune::models::{Config, Decoder};
use ferrotune::ops::{Pass, Policy};
use tch::{Kind, Tensor};

use crate::golden::{
    Fed, Flat, assert_close, checkpoints, ids, load, logits, rel, root, shared_data, tensors,
};

/// The goldens of a checkpoint: `golden.safetensors`, and where rope depends on the length a second, longer one.
pub fn cases(dir: &Path) -> Vec<(String, Vec<i64>, Tensor)> {
    ["golden.safetensors", "golden_long.safetensors"]
        .into_iter()
        .filter(|file| dir.join(file).is_file())
        .map(|file| {
            let golden = tensors(&dir.join(file));
            let name = format!("{}/{file}", dir.file_name().unwrap().display());
            (name, ids(&golden["input_ids"]), golden["logits"].shallow_clone())
        })
        .collect()
}

#[test]
fn logits_of_every_architecture() {
    let mut distances = Vec::new();
    for name in checkpoints() {
        let dir = root().join(&name);
        let decoder = load(&dir, Kind::Float);
        assert_eq!(decoder.config.ignores_vision, name.contains("multimodal"), "{name}");
        for (case, input_ids, expected) in cases(&dir) {
            distances.push((case, rel(&logits(&decoder, &Flat::new([&input_ids[..]])), &expected)));
        }
    }
    assert_close(1e-5, distances);
}

#[test]
fn configs_of_transformers_4_and_5_say_the_same() {
    for name in checkpoints() {
        let dir = root().join(&name);
        let Ok(text) = fs::read_to_string(dir.join("config_v4.json")) else { continue };
        let five = Config::from_dir(&dir).unwrap();
        let four = Config::from_json(&text).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        // Special tokens are stated by tokenizer and generation config as well, and left out here where they are defaults.
        let four =
            Config { bos_token_id: five.bos_token_id, eos_token_ids: five.eos_token_ids.clone(), ..four };
        assert_eq!(four, five, "{name}");
    }
}

#[test]
fn an_absent_key_is_the_default_and_null_is_none() {
    let config = |name: &str, change: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let text = fs::read_to_string(root().join(name).join("config.json")).unwrap();
        let mut config = serde_json::from_str(&text).unwrap();
        change(&mut config);
        Config::from_json(&serde_json::to_string(&config).unwrap()).unwrap()
    };
    let absent = |name: &str, key: &str| config(name, &|config| drop(config.remove(key)));
    let null = |name: &str, key: &str| {
        config(name, &|config| drop(config.insert(key.into(), serde_json::Value::Null)))
    };
    let softcap = |config: Config| config.layers[0].attention.softcap;
    let window = |config: Config| config.layers[0].attention.sliding_window;
    assert_eq!(softcap(absent("gemma2", "attn_logit_softcapping")), Some(50.0));
    assert_eq!(softcap(null("gemma2", "attn_logit_softcapping")), None);
    assert_eq!(absent("gemma2", "final_logit_softcapping").final_logit_softcapping, Some(30.0));
    assert_eq!(null("gemma2", "final_logit_softcapping").final_logit_softcapping, None);
    assert_eq!(softcap(absent("gemma3", "attn_logit_softcapping")), None);
    assert_eq!(window(absent("mistral", "sliding_window")), Some(4096));
    assert_eq!(window(null("mistral", "sliding_window")), None);
}

#[test]
fn cached_logits_equal_uncached() {
    let mut distances = Vec::new();
    for name in checkpoints() {
        let dir = root().join(&name);
        let decoder = load(&dir, Kind::Float);
        // f64, so that a difference is a mistake and not rounding.
        let exact = load(&dir, Kind::Double);
        for (case, sequence, expected) in cases(&dir) {
            let mut cached_exact = Fed::new(&exact, sequence.len());
            let mut rounded = Fed::new(&decoder, sequence.len());
            // A prompt, a chunk (longer than the sliding windows), then token by token.
            let ends = [5, 16].into_iter().chain(17..=sequence.len());
            for end in ends {
                let uncached = logits(&exact, &Flat::new([&sequence[..end]])).get(end as i64 - 1);
                let cached = cached_exact.logits(&sequence[..end], end);
                distances.push((format!("{case} to {end}, f64"), 1e6 * rel(&cached, &uncached)));
                let last = rounded.logits(&sequence[..end], end);
                if end == sequence.len() {
                    distances.push((
                        format!("{case}, against transformers"),
                        rel(&last, &expected.get(end as i64 - 1)),
                    ));
                }
            }
        }
    }
    assert_close(1e-5, distances);
}

/// Losses and gradients of all weights by name, fused tensors split into their parts.
fn gradients(dir: &Path, kind: Kind, sequences: &[&[i64]], policy: Policy) -> (f64, HashMap<String, Tensor>) {
    let mut decoder = load(dir, kind);
    decoder.train_all().unwrap();
    gradients_of(&decoder, sequences, policy)
}

pub fn gradients_of(
    decoder: &Decoder,
    sequences: &[&[i64]],
    policy: Policy,
) -> (f64, HashMap<String, Tensor>) {
    let flat = Flat::new(sequences.iter().copied());
    let targets = flat.input_ids.len() - sequences.len();
    let pass = Pass { policies: &[policy], ..Pass::INFERENCE };
    let loss = decoder.loss_sum(flat.input(), &flat.input_ids, pass).unwrap() / targets as f64;
    loss.backward();
    let mut found = HashMap::new();
    for parameter in decoder.trainable() {
        let gradient = parameter.tensor.grad();
        assert!(gradient.defined(), "{} has no gradient", parameter.name);
        let names: Vec<&str> = parameter.name.split('+').collect();
        let rows: Vec<i64> = decoder
            .linear_modules()
            .into_iter()
            .filter(|(module, _, _)| names.iter().any(|name| name.rsplit_once('.').unwrap().0 == module))
            .map(|(_, rows, _)| rows)
            .collect();
        let parts = if names.len() == 1 { vec![gradient] } else { gradient.split_with_sizes(rows, 0) };
        for (name, part) in names.iter().zip(parts) {
            found.insert(name.to_string(), part);
        }
    }
    (loss.double_value(&[]), found)
}

/// Distances of `found` to the `grad.*` of a golden, both complete.
fn compare(
    name: &str,
    found: &HashMap<String, Tensor>,
    golden: &HashMap<String, Tensor>,
) -> Vec<(String, f64)> {
    let expected: Vec<_> =
        golden.iter().filter_map(|(key, tensor)| Some((key.strip_prefix("grad.")?, tensor))).collect();
    assert_eq!(found.len(), expected.len(), "{name}: gradients of {:?}", found.keys());
    expected.into_iter().map(|(key, tensor)| (format!("{name} {key}"), rel(&found[key], tensor))).collect()
}

#[test]
fn gradients_of_every_architecture() {
    let mut distances = Vec::new();
    for name in checkpoints() {
        let dir = root().join(&name);
        if !dir.join("gradients.safetensors").is_file() {
            continue;
        }
        let golden = tensors(&dir.join("gradients.safetensors"));
        let sequence = ids(&golden["input_ids"]);
        // f32 runs the kernels, f64 the formulas.
        let ways =
            [(Kind::Float, Policy::KEEP), (Kind::Float, Policy::RECOMPUTE), (Kind::Double, Policy::KEEP)];
        for (kind, policy) in ways {
            let (loss, found) = gradients(&dir, kind, &[&sequence], policy);
            let expected = golden["loss"].double_value(&[]);
            distances.push((format!("{name} loss"), (loss - expected).abs() / expected));
            distances.extend(compare(&name, &found, &golden));
        }
    }
    assert_close(1e-5, distances);
}

/// Past 16,384 rows the MLP goes tile by tile where its activations are not kept; the last tile is a short one.
#[test]
fn long_batches_give_the_same_gradients_in_tiles() {
    let sequences: Vec<Vec<i64>> =
        (0..1265).map(|i| (0..13).map(|j| (i * 5 + j * j + i * j) % 50).collect()).collect();
    let all: Vec<&[i64]> = sequences.iter().map(Vec::as_slice).collect();
    let mut distances = Vec::new();
    for name in ["llama_bias", "gemma2", "qwen3"] {
        let dir = root().join(name);
        let (loss, whole) = gradients(&dir, Kind::Float, &all, Policy::KEEP);
        let (tiled_loss, tiled) = gradients(&dir, Kind::Float, &all, Policy::RECOMPUTE);
        distances.push((format!("{name} loss"), (loss - tiled_loss).abs() / loss));
        distances.extend(
            tiled.iter().map(|(key, gradient)| (format!("{name} {key}"), rel(gradient, &whole[key]))),
        );
    }
    assert_close(1e-5, distances);
}

#[test]
fn packed_sequences_never_see_each_other() {
    let mut distances = Vec::new();
    for name in checkpoints() {
        let dir = root().join(&name);
        let decoder = load(&dir, Kind::Double);
        let vocab = decoder.config.vocab_size - 1;
        // Unequal lengths, one past the sliding windows and the ranges of the length-dependent ropes; then equal ones.
        for lengths in [&[3, 38, 1, 17][..], &[9, 9, 9]] {
            let sequences: Vec<Vec<i64>> = lengths
                .iter()
                .map(|&length| (0..length).map(|i| (i * i + 7 * length) % vocab).collect())
                .collect();
            let packed = logits(&decoder, &Flat::new(sequences.iter().map(Vec::as_slice)));
            let apart: Vec<Tensor> =
                sequences.iter().map(|sequence| logits(&decoder, &Flat::new([&sequence[..]]))).collect();
            distances.push((format!("{name} {lengths:?}"), rel(&packed, &Tensor::cat(&apart, 0))));
        }
    }
    assert_close(1e-12, distances);
}

#[test]
fn packed_gradients_are_the_sum_of_those_apart() {
    let mut distances = Vec::new();
    for name in ["llama_gqa_llama3", "llama_rope_dynamic", "phi4_mini", "gemma3"] {
        let dir = root().join(name);
        let sequences: [Vec<i64>; 3] =
            [12, 40, 5].map(|length| (0..length).map(|i| (i * i + 3 * length) % 60).collect());
        let all: Vec<&[i64]> = sequences.iter().map(Vec::as_slice).collect();
        let mut decoder = load(&dir, Kind::Double);
        decoder.train_all().unwrap();
        let (_, packed) = gradients_of(&decoder, &all, Policy::KEEP);
        let mut sum: HashMap<String, Tensor> = HashMap::new();
        for sequence in &all {
            // A mean over T - 1 targets; the packed one is over all of them.
            let weight = (sequence.len() - 1) as f64 / (12 + 40 + 5 - 3) as f64;
            let (_, apart) = gradients(&dir, Kind::Double, &[sequence], Policy::KEEP);
            for (key, gradient) in apart {
                let before = sum.remove(&key).unwrap_or_else(|| gradient.zeros_like());
                sum.insert(key, before + gradient * weight);
            }
        }
        distances
            .extend(sum.iter().map(|(key, tensor)| (format!("{name} {key}"), rel(&packed[key], tensor))));
    }
    // train_all keeps weights, and with them gradients, in f32.
    assert_close(1e-6, distances);
}

const TRAINED: [&str; 2] = ["stories260K", "tinystories-656k"];

#[test]
fn logits_of_trained_models() {
    let Some(data) = shared_data("logits of trained models") else { return };
    let mut distances = Vec::new();
    for name in TRAINED {
        let decoder = load(&data.join("models").join(name), Kind::Float);
        let golden = tensors(&data.join("golden").join(name).join("logits.safetensors"));
        for i in 0..golden.len() / 2 {
            let input_ids = ids(&golden[&format!("input_ids.{i}")]);
            let found = logits(&decoder, &Flat::new([&input_ids[..]]));
            distances.push((format!("{name} {i}"), rel(&found, &golden[&format!("logits.{i}")])));
        }
    }
    let golden = tensors(&data.join("golden/tiny_logits.safetensors"));
    for name in ["tiny_llama3", "tiny_mistral", "tiny_qwen3", "tiny_gemma3"] {
        let decoder = load(&data.join("models/mlxd").join(name), Kind::Float);
        let found = logits(&decoder, &Flat::new([&ids(&golden[&format!("{name}.input_ids")])[..]]));
        distances.push((name.to_string(), rel(&found, &golden[&format!("{name}.logits")].squeeze_dim(0))));
    }
    assert_close(1e-5, distances);
}

#[test]
fn greedy_continuations_of_trained_models() {
    let Some(data) = shared_data("greedy continuations of trained models") else { return };
    for name in TRAINED {
        let decoder = load(&data.join("models").join(name), Kind::Float);
        let text = fs::read_to_string(data.join("golden").join(name).join("greedy.json")).unwrap();
        let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
        let list = |value: &serde_json::Value| -> Vec<i64> { serde_json::from_value(value.clone()).unwrap() };
        for case in golden["cases"].as_array().unwrap() {
            let mut sequence = list(&case["prompt_ids"]);
            let expected = list(&case["new_ids"]);
            let mut fed = Fed::new(&decoder, sequence.len() + expected.len());
            let mut found = Vec::new();
            for _ in 0..expected.len() {
                let next = fed.logits(&sequence, sequence.len()).argmax(-1, false).int64_value(&[]);
                sequence.push(next);
                found.push(next);
            }
            assert_eq!(found, expected, "{name}, prompt {}", case["prompt"]);
        }
    }
}

#[test]
fn gradients_of_trained_models() {
    let Some(data) = shared_data("gradients of trained models") else { return };
    let mut distances = Vec::new();
    for name in TRAINED {
        let golden = tensors(&data.join("golden").join(name).join("grads.safetensors"));
        let sequence = ids(&golden["input_ids"]);
        let (loss, found) =
            gradients(&data.join("models").join(name), Kind::Float, &[&sequence], Policy::KEEP);
        let expected = golden["loss"].double_value(&[]);
        distances.push((format!("{name} loss"), (loss - expected).abs() / expected));
        distances.extend(compare(name, &found, &golden));
    }
    assert_close(1e-5, distances);
}
