//! Writing a merged model as GGUF files, several quantisations in one pass over the checkpoint.

use std::path::PathBuf;

use anyhow::{Result, bail};
use rayon::prelude::*;

use super::Quantization;
use crate::error::Error;
use crate::export::Merged;
use crate::io::check_free_space;
use crate::io::gguf::{GgmlType, GgufWriter, Value, quantize_row};
use crate::models::{Change, GgufTensor, gguf_metadata, gguf_tensors, metadata_architecture, rope_tensors};

/// f32 elements that stand in memory: 64 MiB.
const PIECE: usize = 1 << 24;
/// The largest number of f16.
const F16_MAX: f32 = 65504.0;

/// A file to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufFile {
    pub path: PathBuf,
    pub quantization: Quantization,
}

/// Writes `files`, all in one folder; `name` is the model's. Quantises on all cores of rayon's pool. `progress` hears the elements
/// written so far and those to write. Returns the size of each file.
///
/// # Errors
/// A feature of the model or the tokenizer that llama.cpp has not; a disk without the space, before anything is written; in f16 a
/// number that it cannot hold.
pub fn write_gguf(
    merged: &Merged,
    files: &[GgufFile],
    name: &str,
    mut progress: impl FnMut(u64, u64),
) -> Result<Vec<u64>> {
    let tied = merged.head().is_none();
    if !tied && metadata_architecture(&merged.config) == "gemma2" {
        let what = "a gemma2 model whose head is not its embedding, in a GGUF file".to_string();
        bail!(Error::Unsupported { what, supported: "a tied one".to_string() });
    }
    let tensors = gguf_tensors(&merged.config, merged.prefix(), merged.head().as_deref());
    let ropes = rope_tensors(&merged.config)?;
    let mut metadata = gguf_metadata(&merged.config)?;
    match merged.tokenizer()? {
        Some(tokenizer) => metadata.extend(tokenizer.gguf_metadata(merged.config.vocab_size as usize)?),
        None => metadata.push(("tokenizer.ggml.model".to_string(), Value::String("none".to_string()))),
    }
    let layouts: Vec<Vec<(String, Vec<i64>, GgmlType)>> =
        files.iter().map(|file| layout(&tensors, &ropes, file.quantization, merged, tied)).collect();
    if let Some(folder) = files.first().and_then(|file| file.path.parent()) {
        check_free_space(folder, layouts.iter().map(|layout| GgufWriter::data_bytes(layout)).sum())?;
    }
    let mut writers = Vec::new();
    for (file, layout) in files.iter().zip(&layouts) {
        let general = [
            ("general.type", Value::String("model".to_string())),
            ("general.name", Value::String(name.to_string())),
            ("general.file_type", Value::U32(file.quantization.file_type())),
            ("general.quantization_version", Value::U32(2)),
        ];
        let general = general.into_iter().map(|(key, value)| (key.to_string(), value));
        // The architecture first: readers look there.
        let all: Vec<_> =
            metadata[..1].iter().cloned().chain(general).chain(metadata[1..].iter().cloned()).collect();
        writers.push(GgufWriter::create(&file.path, &all, layout)?);
    }
    for (name, values) in &ropes {
        writers
            .iter_mut()
            .try_for_each(|writer| append(writer, name, GgmlType::F32, values, values.len()))?;
    }
    let total: u64 = tensors.iter().map(|tensor| tensor.shape.iter().product::<i64>() as u64).sum();
    let mut written = 0;
    for tensor in &tensors {
        let kinds: Vec<GgmlType> = files
            .iter()
            .map(|file| file.quantization.tensor_type(&tensor.name, &tensor.shape, &merged.config, tied))
            .collect();
        for_each_piece(merged, tensor, |values, row| {
            for (writer, kind) in writers.iter_mut().zip(&kinds) {
                append(writer, &tensor.name, *kind, values, row)?;
            }
            written += values.len() as u64;
            progress(written, total);
            Ok(())
        })?;
    }
    let sizes = writers.iter().map(GgufWriter::size).collect();
    writers.into_iter().try_for_each(GgufWriter::finish)?;
    Ok(sizes)
}

fn layout(
    tensors: &[GgufTensor],
    ropes: &[(String, Vec<f32>)],
    quantization: Quantization,
    merged: &Merged,
    tied: bool,
) -> Vec<(String, Vec<i64>, GgmlType)> {
    let ropes = ropes.iter().map(|(name, values)| (name.clone(), vec![values.len() as i64], GgmlType::F32));
    let own = tensors.iter().map(|tensor| {
        let kind = quantization.tensor_type(&tensor.name, &tensor.shape, &merged.config, tied);
        (tensor.name.clone(), tensor.shape.clone(), kind)
    });
    ropes.chain(own).collect()
}

/// Gives `use_piece` runs of rows of a tensor as the file has them, and the length of a row.
fn for_each_piece(
    merged: &Merged,
    tensor: &GgufTensor,
    mut use_piece: impl FnMut(&[f32], usize) -> Result<()>,
) -> Result<()> {
    let rows = tensor.shape[0] as usize;
    let length = tensor.shape[1..].iter().product::<i64>() as usize;
    if merged.shape(&tensor.checkpoint)? != tensor.shape {
        merged.weights.expect_shape(&tensor.checkpoint, &tensor.shape)?;
    }
    let step = match tensor.change {
        Change::Pairs(_) => rows,
        // Taken back from 4 bits as a whole, once.
        _ if merged.is_dequantized() && merged.projection(&tensor.checkpoint).is_some() => rows,
        Change::None | Change::PlusOne => (PIECE / length.max(1)).clamp(1, rows),
    };
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        let read = merged.rows(&tensor.checkpoint, first as i64, count as i64)?;
        let mut values = Vec::<f32>::try_from(read.f_reshape([-1])?)?;
        match tensor.change {
            Change::None => {}
            Change::PlusOne => values.iter_mut().for_each(|value| *value += 1.0),
            Change::Pairs(_) => {
                let mut pairs = Vec::with_capacity(values.len());
                for row in 0..rows {
                    let from = tensor.change.source_row(row, rows) * length;
                    pairs.extend_from_slice(&values[from..from + length]);
                }
                values = pairs;
            }
        }
        // A vector is one row.
        use_piece(&values, if tensor.shape.len() == 1 { values.len() } else { length })?;
    }
    Ok(())
}

/// Quantises whole rows on all cores and appends them.
pub(super) fn append(
    writer: &mut GgufWriter,
    name: &str,
    kind: GgmlType,
    values: &[f32],
    row: usize,
) -> Result<()> {
    if kind == GgmlType::F16
        && let Some(value) = values.iter().find(|value| value.abs() > F16_MAX)
    {
        bail!(Error::Usage(format!("{name} holds {value}, f16 ends at {F16_MAX}: choose bf16, f32 or q8_0")));
    }
    // Enough rows for a core to be worth the hand-over.
    let task = row.max(1) * (16_384 / row.max(1)).max(1);
    let blocks: Vec<Vec<u8>> = values
        .par_chunks(task)
        .map(|values| {
            let mut bytes = Vec::with_capacity(kind.bytes(values.len()));
            quantize_row(kind, values, &mut bytes);
            bytes
        })
        .collect();
    writer.append(name, &blocks.concat())
}
