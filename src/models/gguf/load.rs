//! A GGUF file as a model: dequantised to the dtype it runs in.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tch::Tensor;

use super::metadata::config_json;
use super::tensors::{Change, GgufTensor, gguf_tensors};
use crate::data::Tokenizer;
use crate::error::Error;
use crate::io::gguf::Gguf;
use crate::models::{Config, Decoder, FastLanguageModel};
use crate::nn::LoadOptions;

impl FastLanguageModel {
    /// Loads a GGUF file with its tokenizer and chat template, weights converted to the options' dtype.
    ///
    /// # Errors
    /// A file that is torn or lacks a tensor; an architecture, a tensor type or a tokenizer that ferrotune does not know.
    pub fn from_gguf(path: &Path, options: LoadOptions) -> Result<FastLanguageModel> {
        let gguf = Gguf::open(path)?;
        let config = Config::from_json(&config_json(&gguf)?.to_string())
            .with_context(|| format!("in {}", path.display()))?;
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let decoder = Decoder::unset(config, options)?;
        fill(&decoder, &gguf)?;
        // The file itself: what lies beside it may belong to another model.
        Ok(FastLanguageModel { decoder, tokenizer, dir: path.to_path_buf(), adapter: None })
    }
}

fn fill(decoder: &Decoder, gguf: &Gguf) -> Result<()> {
    let head = (!decoder.config.tie_word_embeddings).then_some("lm_head.weight");
    let named: HashMap<String, GgufTensor> = gguf_tensors(&decoder.config, decoder.module_prefix(), head)
        .into_iter()
        .map(|tensor| (tensor.checkpoint.clone(), tensor))
        .collect();
    let _no_grad = tch::no_grad_guard();
    decoder.each_weight(|checkpoint, destination| {
        let tensor =
            named.get(checkpoint).with_context(|| format!("{checkpoint} has no name in GGUF files"))?;
        let values = read(gguf, tensor)?;
        let source = Tensor::f_from_slice(&values)?.f_view(&tensor.shape[..])?;
        Ok(destination.shallow_clone().f_copy_(&source)?)
    })
}

/// The values of `tensor` as a checkpoint would have them.
fn read(gguf: &Gguf, tensor: &GgufTensor) -> Result<Vec<f32>> {
    let file = gguf.path().display().to_string();
    let Some(info) = gguf.tensor(&tensor.name) else {
        bail!(Error::MissingTensor { file, name: tensor.name.clone() });
    };
    if info.shape != tensor.shape {
        let (name, expected, found) = (tensor.name.clone(), tensor.shape.clone(), info.shape.clone());
        bail!(Error::ShapeMismatch { file, name, expected, found });
    }
    let mut values = gguf.dequantize(&tensor.name)?;
    // A sum is finite only if every element is.
    if !values.iter().map(|&value| f64::from(value)).sum::<f64>().is_finite() {
        let reason = format!("tensor {} holds NaN or infinite values", tensor.name);
        bail!(Error::Corrupt { file, reason });
    }
    match tensor.change {
        Change::None => {}
        Change::PlusOne => values.iter_mut().for_each(|value| *value -= 1.0),
        Change::Pairs(_) => {
            let rows = tensor.shape[0] as usize;
            let length = values.len() / rows;
            let mut halves = vec![0f32; values.len()];
            for (row, stored) in values.chunks(length).enumerate() {
                let to = tensor.change.source_row(row, rows) * length;
                halves[to..to + length].copy_from_slice(stored);
            }
            values = halves;
        }
    }
    Ok(values)
}
