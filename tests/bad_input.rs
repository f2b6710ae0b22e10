//! Broken checkpoints: a clear error each, naming the file, tensor or key, and never a panic.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use ferrotune::error::Error;
use ferrotune::models::{Config, FastLanguageModel};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::golden::{root, tensors};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const GATE: &str = "model.layers.1.mlp.gate_proj.weight";

/// A copy of a checkpoint of tests/golden, to be broken.
fn copy_of(name: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(root().join(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

fn error_of(dir: &Path) -> anyhow::Error {
    let loaded = FastLanguageModel::from_pretrained(dir, Kind::Float, Device::Cpu);
    loaded.err().expect("a broken checkpoint must not load")
}

/// The whole error, after checking that it names everything in `expected` and fits on a few lines.
#[track_caller]
fn assert_names(error: &anyhow::Error, expected: &[&str]) {
    let message = format!("{error:#}");
    for word in expected {
        assert!(message.contains(word), "{word:?} is not named: {message}");
    }
    assert!(message.len() < 1000, "too long: {message}");
}

/// The llama golden with its config.json changed.
fn with_config(change: impl FnOnce(&mut Value)) -> TempDir {
    let copy = copy_of("llama");
    let path = copy.path().join(CONFIG);
    let mut config = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
    copy
}

/// The llama golden with its tensors changed.
fn with_tensors(change: impl FnOnce(&mut HashMap<String, Tensor>)) -> TempDir {
    let copy = copy_of("llama");
    let path = copy.path().join(WEIGHTS);
    let mut weights = tensors(&path);
    change(&mut weights);
    let weights: Vec<_> = weights.iter().collect();
    Tensor::write_safetensors(&weights, path).unwrap();
    copy
}

/// The llama golden with a safetensors file of this header and `data` bytes behind it.
fn with_header(header: &str, data: usize) -> TempDir {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    with_bytes(&bytes)
}

fn with_bytes(bytes: &[u8]) -> TempDir {
    let copy = copy_of("llama");
    fs::write(copy.path().join(WEIGHTS), bytes).unwrap();
    copy
}

#[test]
fn shards_that_are_missing_or_wrong() {
    let copy = copy_of("llama_sharded");
    fs::remove_file(copy.path().join("model-00002-of-00003.safetensors")).unwrap();
    assert_names(&error_of(copy.path()), &["model-00002-of-00003.safetensors", "missing"]);

    // The right name with another shard's tensors in it.
    let copy = copy_of("llama_sharded");
    let shard = |n: u32| copy.path().join(format!("model-0000{n}-of-00003.safetensors"));
    fs::copy(shard(1), shard(3)).unwrap();
    assert_names(&error_of(copy.path()), &["model-00003-of-00003.safetensors"]);

    let index = "model.safetensors.index.json";
    for (text, expected) in [
        ("{", &[index][..]),
        (r#"{"metadata": {}}"#, &[index, "weight_map"]),
        (r#"{"weight_map": {"a": "../../secret.safetensors"}}"#, &[index, "secret"]),
        (r#"{"weight_map": {}}"#, &["model.norm.weight"]),
    ] {
        let copy = copy_of("llama_sharded");
        fs::write(copy.path().join(index), text).unwrap();
        assert_names(&error_of(copy.path()), expected);
    }
}

#[test]
fn no_weights_at_all() {
    let copy = copy_of("llama");
    fs::remove_file(copy.path().join(WEIGHTS)).unwrap();
    assert_names(&error_of(copy.path()), &[WEIGHTS, "model.safetensors.index.json"]);
    fs::write(copy.path().join("pytorch_model.bin"), b"pickle").unwrap();
    assert_names(&error_of(copy.path()), &[".bin", "safetensors"]);
    assert_names(&error_of(&copy.path().join("nowhere")), &["nowhere"]);
}

#[test]
fn truncated_at_any_length() {
    let whole = fs::read(root().join("llama").join(WEIGHTS)).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [0, 7, 8, 9, header, header + 7, header + 8, header + 9, whole.len() / 2, whole.len() - 1] {
        let copy = with_bytes(&whole[..length]);
        let error = error_of(copy.path());
        assert_names(&error, &[WEIGHTS]);
        if length > 0 {
            assert!(matches!(error.downcast_ref(), Some(Error::Corrupt { .. })), "{length}: {error:#}");
        }
    }
    let longer = [&whole[..], &[0; 4]].concat();
    assert_names(&error_of(with_bytes(&longer).path()), &[WEIGHTS]);
}

#[test]
fn hostile_headers() {
    let embed = r#""model.embed_tokens.weight""#;
    let tensor = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{{embed}:{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let cases = [
        ("no JSON", "not json at all".to_string()),
        ("no object", "[1, 2]".to_string()),
        ("deep nesting", "[".repeat(100_000)),
        ("unknown dtype", tensor("F7", "[2,2]", "[0,16]")),
        ("past the end", tensor("F32", "[64,32]", "[0,8192]")),
        ("far past the end", tensor("F32", "[2,2]", "[18446744073709551600,18446744073709551615]")),
        ("reversed", tensor("F32", "[2,2]", "[16,0]")),
        ("negative offset", tensor("F32", "[2,2]", "[-16,0]")),
        ("fewer bytes than the shape", tensor("F32", "[4,4]", "[0,16]")),
        ("a product that overflows", tensor("F32", "[4294967296,4294967296]", "[0,0]")),
        ("a product that wraps to 16", tensor("F32", "[4611686018427387905,4]", "[0,16]")),
        ("negative dimension", tensor("F32", "[-2,-2]", "[0,16]")),
        ("a hole", tensor("F32", "[2,2]", "[16,32]")),
        (
            "overlap",
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}"#
                .to_string(),
        ),
        ("missing fields", format!("{{{embed}:{{}}}}")),
    ];
    for (what, header) in &cases {
        let copy = with_header(header, 16);
        let error = error_of(copy.path());
        assert!(matches!(error.downcast_ref(), Some(Error::Corrupt { .. })), "{what}: {error:#}");
        assert_names(&error, &[WEIGHTS]);
    }
    for length in [u64::MAX, 1 << 62, 100_000_001, 1000] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend([b'{'; 100]);
        assert_names(&error_of(with_bytes(&bytes).path()), &[WEIGHTS]);
    }
}

#[test]
fn tensors_that_do_not_fit_the_config() {
    let copy = with_config(|config| config["intermediate_size"] = json!(48));
    let error = error_of(copy.path());
    let Some(Error::ShapeMismatch { name, expected, found, .. }) = error.downcast_ref() else {
        panic!("{error:#}")
    };
    assert!(name.ends_with("mlp.gate_proj.weight"), "{name}");
    assert_eq!((&expected[..], &found[..]), (&[48, 32][..], &[40, 32][..]));
    assert_names(&error, &[WEIGHTS, "mlp.gate_proj.weight", "[48, 32]", "[40, 32]"]);

    let copy = with_tensors(|weights| {
        drop(weights.insert(GATE.into(), Tensor::zeros([40 * 32], (Kind::Float, Device::Cpu))))
    });
    assert_names(&error_of(copy.path()), &[WEIGHTS, GATE, "[1280]"]);

    let copy = with_tensors(|weights| drop(weights.remove(GATE)));
    let error = error_of(copy.path());
    assert!(
        matches!(error.downcast_ref(), Some(Error::MissingTensor { name, .. }) if name == GATE),
        "{error:#}"
    );
    assert_names(&error, &[WEIGHTS, GATE]);

    let copy = with_config(|config| config["num_hidden_layers"] = json!(3));
    assert_names(&error_of(copy.path()), &[WEIGHTS, "model.layers.2."]);

    let copy = with_config(|config| config["attention_bias"] = json!(true));
    assert_names(&error_of(copy.path()), &[WEIGHTS, "q_proj.bias"]);
}

#[test]
fn values_that_are_not_finite() {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let copy = with_tensors(|weights| {
            let _ = weights[GATE].get(39).get(31).fill_(value);
        });
        assert_names(&error_of(copy.path()), &[WEIGHTS, GATE, "NaN"]);
    }
}

#[test]
fn dtypes_that_are_no_weights() {
    // A dtype that safetensors knows and no decoder computes in.
    let header = r#"{"model.norm.weight":{"dtype":"F32","shape":[32],"data_offsets":[0,128]},
        "model.embed_tokens.weight":{"dtype":"F8_E4M3","shape":[64,32],"data_offsets":[128,2176]}}"#;
    assert_names(
        &error_of(with_header(header, 2176).path()),
        &[WEIGHTS, "model.embed_tokens.weight", "F8_E4M3", "BF16"],
    );

    let copy = with_tensors(|weights| {
        let bytes = weights[GATE].ones_like().to_kind(Kind::Uint8);
        weights.insert(GATE.into(), bytes);
    });
    assert_names(&error_of(copy.path()), &[WEIGHTS, GATE, "U8"]);
}

#[test]
fn models_that_are_not_supported() {
    let copy = with_config(|config| config["model_type"] = json!("mamba"));
    let error = error_of(copy.path());
    assert!(matches!(error.downcast_ref(), Some(Error::Unsupported { .. })), "{error:#}");
    assert_names(
        &error,
        &[CONFIG, "mamba", "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gemma3"],
    );

    let rope = |rope: Value| with_config(|config| config["rope_parameters"] = rope);
    for (copy, expected) in [
        (rope(json!({"rope_type": "spiral"})), &["spiral", "yarn"][..]),
        (rope(json!({"rope_type": "llama3", "factor": 8.0})), &["low_freq_factor"]),
        (rope(json!({"rope_type": "linear", "factor": "four"})), &["factor", "four"]),
        (
            rope(json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]})),
            &["short_factor", "4"],
        ),
        (with_config(|config| config["hidden_act"] = json!("relu6")), &["relu6", "silu"]),
        (
            with_config(|config| config["quantization_config"] = json!({"quant_method": "gptq"})),
            &["quantization_config"],
        ),
    ] {
        let error = error_of(copy.path());
        assert_names(&error, &[CONFIG]);
        assert_names(&error, expected);
    }
}

#[test]
fn configs_that_are_broken() {
    let copy = copy_of("llama");
    fs::remove_file(copy.path().join(CONFIG)).unwrap();
    assert_names(&error_of(copy.path()), &[CONFIG]);
    for text in ["", "{", "[]", "null", r#"{"model_type": 5}"#, "{}", "\u{0}"] {
        fs::write(copy.path().join(CONFIG), text).unwrap();
        assert_names(&error_of(copy.path()), &[CONFIG]);
    }

    for key in [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    ] {
        let copy = with_config(|config| drop(config.as_object_mut().unwrap().remove(key)));
        assert_names(&error_of(copy.path()), &[CONFIG, key, "missing"]);
    }
    let numbers = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
    ];
    for key in numbers {
        for value in [json!(0), json!(-1), json!("many"), json!([]), json!(1.5)] {
            let copy = with_config(|config| config[key] = value.clone());
            assert_names(&error_of(copy.path()), &[CONFIG, key]);
        }
        // Sizes whose products overflow: an error of some kind, before memory is asked for.
        let copy = with_config(|config| config[key] = json!(i64::MAX));
        assert_names(&error_of(copy.path()), &[]);
    }
    for (key, value) in [
        ("num_key_value_heads", json!(3)),
        ("rms_norm_eps", json!("tiny")),
        ("rms_norm_eps", json!(-1.0)),
        ("tie_word_embeddings", json!("yes")),
        ("rope_parameters", json!([])),
        ("head_dim", json!(7)),
    ] {
        let copy = with_config(|config| config[key] = value.clone());
        assert_names(&error_of(copy.path()), &[CONFIG, key]);
    }
    let layers = |layers: Value| {
        let text = fs::read_to_string(root().join("gemma2").join(CONFIG)).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        config["layer_types"] = layers;
        Config::from_json(&config.to_string()).unwrap_err()
    };
    assert_names(&layers(json!(["full_attention"])), &["layer_types", "1", "3"]);
    assert_names(
        &layers(json!(["full_attention", "linear_attention", "full_attention"])),
        &["linear_attention"],
    );
}

#[test]
fn a_tokenizer_that_does_not_fit() {
    let tokenizer = |words: usize| {
        let vocab: serde_json::Map<String, Value> =
            (0..words).map(|id| (format!("w{id}"), json!(id))).collect();
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
               "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
               "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}})
    };
    let copy = copy_of("llama");
    let path = copy.path().join("tokenizer.json");
    fs::write(&path, tokenizer(64).to_string()).unwrap();
    let model = FastLanguageModel::from_pretrained(copy.path(), Kind::Float, Device::Cpu).unwrap();
    assert_eq!(model.tokenizer().unwrap().encode("w5 w63", false).unwrap(), [5, 63]);

    fs::write(&path, tokenizer(65).to_string()).unwrap();
    assert_names(&error_of(copy.path()), &["tokenizer", "64", "vocab_size"]);
    for text in ["", "{", r#"{"model": {"type": "Spiral"}}"#] {
        fs::write(&path, text).unwrap();
        assert_names(&error_of(copy.path()), &["tokenizer.json"]);
    }
}

#[test]
fn token_ids_outside_the_vocabulary() {
    let model = FastLanguageModel::from_pretrained(&root().join("llama"), Kind::Float, Device::Cpu).unwrap();
    for id in [64, -1, i64::MAX] {
        let error = model.decoder.log_probs(&[1, id, 2]).unwrap_err();
        assert_names(&error, &[&id.to_string(), "64"]);
    }
    // The last id is only predicted, and must be in the vocabulary as well.
    assert_names(&model.decoder.log_probs(&[1, 2, 64]).unwrap_err(), &["64"]);
}

#[test]
fn adapters_that_do_not_fit() {
    let adapter = root().join("adapters/llama_all_linear");
    let load = |change: &dyn Fn(&Path)| {
        let copy = tempfile::tempdir().unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(adapter.join(file), copy.path().join(file)).unwrap();
        }
        change(copy.path());
        let mut model =
            FastLanguageModel::from_pretrained(&root().join("llama"), Kind::Float, Device::Cpu).unwrap();
        model.load_adapter(copy.path()).expect_err("a broken adapter must not load")
    };
    let config = |change: &'static dyn Fn(&mut Value)| {
        move |dir: &Path| {
            let path = dir.join("adapter_config.json");
            let mut config = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
            change(&mut config);
            fs::write(path, config.to_string()).unwrap();
        }
    };
    let remove = |file: &'static str| move |dir: &Path| fs::remove_file(dir.join(file)).unwrap();
    assert_names(&load(&remove("adapter_config.json")), &["adapter_config.json"]);
    assert_names(&load(&remove("adapter_model.safetensors")), &["adapter_model.safetensors"]);
    let torn = |dir: &Path| fs::write(dir.join("adapter_model.safetensors"), b"torn").unwrap();
    assert_names(&load(&torn), &["adapter_model.safetensors"]);
    assert_names(
        &load(&config(&|config| config["r"] = json!(5))),
        &["adapter_model.safetensors", "lora_", "5", "4"],
    );
    assert_names(&load(&config(&|config| config["r"] = json!(0))), &["r"]);
    assert_names(&load(&config(&|config| config["peft_type"] = json!("IA3"))), &["IA3", "LORA"]);
    assert_names(&load(&config(&|config| config["use_dora"] = json!(true))), &["use_dora"]);
    assert_names(
        &load(&config(&|config| config["target_modules"] = json!(["q_proj"]))),
        &["adapter_model.safetensors"],
    );
    assert_names(
        &load(&config(&|config| config["target_modules"] = json!(["w1"]))),
        &["target_modules", "q_proj"],
    );
    assert_names(&load(&config(&|config| config["target_modules"] = json!("("))), &["target_modules"]);
    assert_names(
        &load(&config(&|config| config["modules_to_save"] = json!(["score"]))),
        &["score", "lm_head"],
    );
}
