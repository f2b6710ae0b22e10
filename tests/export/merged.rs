//! Adapters of peft merged into 16-bit and 4-bit checkpoints.

use std::fs;
use std::path::{Path, PathBuf};

use ferrotune::export::{EXPORT_REPORT, Layout, Merged, write_checkpoint};
use ferrotune::io::adapter::ADAPTER_CONFIG;
use ferrotune::io::{Weights, write_safetensors};
use ferrotune::models::FastLanguageModel;
use serde_json::Value;
use tch::{Device, Kind};

use super::{done, export, refused, tiny};
use crate::golden::{Flat, adapters, assert_close, ids, logits, rel, root, tensors};

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn adapter(name: &str) -> PathBuf {
    root().join("adapters").join(name)
}

fn base(name: &str) -> PathBuf {
    root().join(json(&adapter(name).join(ADAPTER_CONFIG))["base_model_name_or_path"].as_str().unwrap())
}

fn load(dir: &Path) -> FastLanguageModel {
    FastLanguageModel::from_pretrained(dir, Kind::Float, Device::Cpu).unwrap_or_else(|e| panic!("{e:#}"))
}

/// The sum itself, in f32, before it is rounded.
#[test]
fn merged_tensors_give_the_logits_of_peft() {
    let distance = |name: String| {
        let merged = Merged::open(&base(&name), Some(&adapter(&name)), false).unwrap();
        let golden = tensors(&adapter(&name).join("golden.safetensors"));
        let place = tempfile::tempdir().unwrap();
        let names = merged.shards().unwrap().into_iter().flat_map(|shard| shard.names);
        let tensors: Vec<_> = names.map(|name| (name.clone(), merged.tensor(&name).unwrap())).collect();
        write_safetensors(&place.path().join("model.safetensors"), &tensors).unwrap();
        fs::write(place.path().join("config.json"), merged.config_json().unwrap().to_string()).unwrap();
        let found = logits(&load(place.path()).decoder, &Flat::new([&ids(&golden["input_ids"])[..]]));
        (name, rel(&found, &golden["logits"]))
    };
    assert_close(1e-5, adapters().into_iter().map(distance));
}

#[test]
fn both_formats_with_their_report() {
    let place = tempfile::tempdir().unwrap();
    let name = "llama_modules_to_save";
    for format in ["merged-16bit", "merged-4bit"] {
        let out = place.path().join(format);
        // A random model: what 4 bits cost it says nothing.
        let flags = ["--format", format, "--max-kl", "0.5"];
        let paths = [("--model", &*base(name)), ("--adapter", &*adapter(name)), ("--output-dir", &*out)];
        let text = done(export(&flags, &paths));
        assert!(text.contains("KL"), "{text}");
        let report = json(&out.join(EXPORT_REPORT));
        assert_eq!(report["format"], format);
        assert!(report["agreement"]["tokens"].as_u64().unwrap() > 100);
        let config = json(&out.join("config.json"));
        assert_eq!(config.get("quantization_config").is_some(), format == "merged-4bit");
        let projection = "model.layers.0.self_attn.q_proj.weight";
        let quantized = Weights::open(&out).unwrap().quant_state(projection).unwrap().is_some();
        assert_eq!(quantized, format == "merged-4bit");
    }
}

#[test]
fn a_tied_head_that_was_trained_is_written_apart() {
    let place = tempfile::tempdir().unwrap();
    let name = "tied_embed_tokens";
    let merged = Merged::open(&base(name), Some(&adapter(name)), false).unwrap();
    assert!(merged.unties());
    write_checkpoint(&merged, place.path(), Layout::SixteenBit, None, |_, _| ()).unwrap();
    assert_eq!(json(&place.path().join("config.json"))["tie_word_embeddings"], false);
    assert!(Weights::open(place.path()).unwrap().contains("lm_head.weight"));
}

/// Shards, their index and everything beside them; without an adapter the bytes of a 16-bit model stay.
#[test]
fn files_beside_the_weights_are_carried_over() {
    let place = tempfile::tempdir().unwrap();
    let (sharded, out) = (root().join("llama_sharded"), place.path().join("sharded"));
    done(export(&["--format", "merged-16bit"], &[("--model", &sharded), ("--output-dir", &out)]));
    let index = |dir: &Path| json(&dir.join("model.safetensors.index.json"))["weight_map"].clone();
    assert_eq!(index(&out), index(&sharded));
    let out = place.path().join("tiny");
    done(export(&["--format", "merged-16bit"], &[("--model", &tiny()), ("--output-dir", &out)]));
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(fs::read(out.join(file)).unwrap(), fs::read(tiny().join(file)).unwrap(), "{file}");
    }
    let (before, after) = (Weights::open(&tiny()).unwrap(), Weights::open(&out).unwrap());
    for name in before.names() {
        let bytes = |weights: &Weights| weights.with_bytes(name, |bytes| Ok(bytes.to_vec())).unwrap();
        assert_eq!(bytes(&before), bytes(&after), "{name}");
    }
}

#[test]
fn refusals_leave_nothing_behind() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let adapter = adapter("llama_all_linear");
    let before = fs::read(adapter.join("adapter_model.safetensors")).unwrap();
    let paths = |model: &Path| {
        export(
            &["--format", "merged-4bit", "--max-kl", "1e-12"],
            &[("--model", model), ("--adapter", &adapter), ("--output-dir", &out)],
        )
    };
    refused(paths(&base("llama_all_linear")), "the export is not the model: KL");
    refused(paths(&root().join("phi3")), "--adapter");
    assert!(!out.exists() && fs::read_dir(place.path()).unwrap().next().is_none());
    assert_eq!(fs::read(adapter.join("adapter_model.safetensors")).unwrap(), before);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine"), "").unwrap();
    let flags = ["--format", "merged-16bit"];
    refused(export(&flags, &[("--model", &tiny()), ("--output-dir", &out)]), "is there already");
}
