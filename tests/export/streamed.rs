//! A model that is read piece by piece has the logits of the whole one.

use std::path::Path;

use ferrotune::export::{GgufFile, Merged, Quantization, write_gguf};
use ferrotune::io::Weights;
use ferrotune::io::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use ferrotune::io::write_safetensors;
use ferrotune::models::{FastLanguageModel, StreamedModel};
use ferrotune::nn::LoadOptions;
use tch::{Device, Kind, Tensor};

use crate::golden::{Flat, adapters, assert_close, checkpoints, logits, rel, root};

fn prompts() -> Vec<Vec<i64>> {
    vec![vec![5, 9, 3, 7, 11, 2, 8, 4, 1, 6, 10, 13], vec![12, 15], vec![14, 20, 19, 3, 3, 1, 7]]
}

fn options() -> LoadOptions {
    LoadOptions::new(Kind::Float, Device::Cpu)
}

fn open(dir: &Path, adapter: Option<&Path>) -> StreamedModel {
    // One layer at a time, which the default would not do with models as small as these.
    let mut model =
        StreamedModel::from_pretrained(dir, adapter, options()).unwrap_or_else(|e| panic!("{e:#}"));
    model.layer_bytes = 0;
    model
}

fn distance(streamed: &StreamedModel, whole: &FastLanguageModel) -> f64 {
    let found = streamed.logits(&prompts()).unwrap_or_else(|e| panic!("{e:#}"));
    let one = |(ids, found): (&Vec<i64>, &Tensor)| {
        rel(found, &logits(&whole.decoder, &Flat::new([&ids[..]])).to_kind(Kind::Float))
    };
    prompts().iter().zip(&found).map(one).fold(0.0, f64::max)
}

#[test]
fn checkpoints_and_gguf_files() {
    let place = tempfile::tempdir().unwrap();
    let mut distances = Vec::new();
    for name in checkpoints() {
        let dir = root().join(&name);
        let whole = FastLanguageModel::from_pretrained_with(&dir, options()).unwrap();
        distances.push((name.clone(), distance(&open(&dir, None), &whole)));
        let file = GgufFile { path: place.path().join("model.gguf"), quantization: Quantization::F32 };
        let merged = Merged::open(&dir, None, false).unwrap();
        // Some have no words in GGUF.
        if write_gguf(&merged, std::slice::from_ref(&file), "model", |_, _| ()).is_ok() {
            let mut streamed = StreamedModel::from_gguf(&file.path, options()).unwrap();
            streamed.layer_bytes = 0;
            distances.push((format!("{name}, gguf"), distance(&streamed, &whole)));
        }
    }
    assert!(distances.len() > checkpoints().len() + 10);
    assert_close(1e-5, distances);
}

/// LoRA of each layer, and whole matrices beside it.
#[test]
fn adapters_of_peft() {
    let mut distances = Vec::new();
    for name in adapters() {
        let adapter = root().join("adapters").join(&name);
        let config = std::fs::read_to_string(adapter.join(ADAPTER_CONFIG)).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        let dir = root().join(config["base_model_name_or_path"].as_str().unwrap());
        let mut whole = FastLanguageModel::from_pretrained_with(&dir, options()).unwrap();
        whole.load_adapter(&adapter).unwrap();
        distances.push((name, distance(&open(&dir, Some(&adapter)), &whole)));
    }
    assert_close(1e-5, distances);
}

#[test]
fn an_adapter_of_another_model() {
    let place = tempfile::tempdir().unwrap();
    let adapter = root().join("adapters/llama_all_linear");
    let weights = Weights::open_files(&[adapter.join(ADAPTER_WEIGHTS)]).unwrap();
    let all: Vec<_> = weights.names().map(|name| (name.to_string(), weights.get(name).unwrap())).collect();
    std::fs::copy(adapter.join(ADAPTER_CONFIG), place.path().join(ADAPTER_CONFIG)).unwrap();
    let verdict = |tensors: &[(String, Tensor)]| {
        write_safetensors(&place.path().join(ADAPTER_WEIGHTS), tensors).unwrap();
        let config = std::fs::read_to_string(adapter.join(ADAPTER_CONFIG)).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        let dir = root().join(config["base_model_name_or_path"].as_str().unwrap());
        open(&dir, Some(place.path())).logits(&prompts()).map(|_| ()).map_err(|error| format!("{error:#}"))
    };
    assert_eq!(verdict(&all), Ok(()));
    let (first, tensor) = &all[0];
    let missing = verdict(&all[1..]).unwrap_err();
    assert!(missing.contains(&first[..first.len() - 20]), "{missing}");
    let stray = first.replace("layers.", "layers.7");
    let mut more: Vec<_> = all.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    more.push((stray.clone(), tensor.shallow_clone()));
    let error = verdict(&more).unwrap_err();
    assert!(error.contains(&stray) && error.contains("targets"), "{error}");
}
