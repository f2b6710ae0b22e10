//! A GGUF file as a model: dequantised to the dtype it runs in.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tch::Tensor;

use super::metadata::config_json;
use super::tensors::{Change, GgufTensor, gguf_tensors};
use crate::data::Tokenizer;
use crate::error::Error;
use crate::io::gguf::Gguf;
use crate::models::decoder::Extent;
use crate::models::{Config, Decoder, FastLanguageModel};
use crate::nn::LoadOptions;

/// f32 elements that stand in memory beside the model: 64 MiB.
const PIECE: usize = 1 << 24;

impl FastLanguageModel {
    /// Loads a GGUF file with its tokenizer and chat template, weights converted to the options' dtype.
    ///
    /// # Errors
    /// A file that is torn or lacks a tensor; an architecture, a tensor type or a tokenizer that ferrotune does not know.
    pub fn from_gguf(path: &Path, options: LoadOptions) -> Result<FastLanguageModel> {
        let gguf = Gguf::open(path)?;
        let config = gguf_config(&gguf)?;
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let decoder = gguf_decoder(&gguf, &config, options, &Extent::Whole)?;
        // The file itself: what lies beside it may belong to another model.
        Ok(FastLanguageModel { decoder, tokenizer, dir: path.to_path_buf(), adapter: None })
    }
}

pub fn gguf_config(gguf: &Gguf) -> Result<Config> {
    Config::from_json(&config_json(gguf)?.to_string())
        .with_context(|| format!("in {}", gguf.path().display()))
}

/// `extent` of the model of `config`.
pub fn gguf_decoder(gguf: &Gguf, config: &Config, options: LoadOptions, extent: &Extent) -> Result<Decoder> {
    let decoder = Decoder::unset(config.clone(), options, extent)?;
    let head = (!config.tie_word_embeddings).then_some("lm_head.weight");
    let named: HashMap<String, GgufTensor> = gguf_tensors(config, decoder.module_prefix(), head)
        .into_iter()
        .map(|tensor| (tensor.checkpoint.clone(), tensor))
        .collect();
    let _no_grad = tch::no_grad_guard();
    decoder.each_weight(|checkpoint, destination| {
        let tensor =
            named.get(checkpoint).with_context(|| format!("{checkpoint} has no name in GGUF files"))?;
        check(gguf, tensor)?;
        // A vector is one row, and pairs go back to halves in the whole matrix.
        let rows = if tensor.shape.len() == 1 { 1 } else { tensor.shape[0] as usize };
        let step = match tensor.change {
            Change::Pairs(_) => rows,
            Change::None | Change::PlusOne => (PIECE * rows / destination.numel().max(1)).clamp(1, rows),
        };
        for first in (0..rows).step_by(step) {
            let values = read(gguf, tensor, first..(first + step).min(rows))?;
            let part = if rows == 1 {
                destination.shallow_clone()
            } else {
                destination.f_narrow(0, first as i64, step.min(rows - first) as i64)?
            };
            let source = Tensor::f_from_slice(&values)?.f_view(&part.size()[..])?;
            part.shallow_clone().f_copy_(&source)?;
        }
        Ok(())
    })?;
    Ok(decoder)
}

fn check(gguf: &Gguf, tensor: &GgufTensor) -> Result<()> {
    let file = gguf.path().display().to_string();
    let Some(info) = gguf.tensor(&tensor.name) else {
        bail!(Error::MissingTensor { file, name: tensor.name.clone() });
    };
    if info.shape != tensor.shape {
        let (name, expected, found) = (tensor.name.clone(), tensor.shape.clone(), info.shape.clone());
        bail!(Error::ShapeMismatch { file, name, expected, found });
    }
    Ok(())
}

/// The values of the `rows` of `tensor` as a checkpoint would have them.
fn read(gguf: &Gguf, tensor: &GgufTensor, rows: Range<usize>) -> Result<Vec<f32>> {
    let mut values = gguf.dequantize_rows(&tensor.name, rows)?;
    // A sum is finite only if every element is.
    if !values.iter().map(|&value| f64::from(value)).sum::<f64>().is_finite() {
        let reason = format!("tensor {} holds NaN or infinite values", tensor.name);
        bail!(Error::Corrupt { file: gguf.path().display().to_string(), reason });
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
