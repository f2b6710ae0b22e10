//! A LoRA adapter as the GGUF file that llama.cpp loads beside a model.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tch::Tensor;

use super::write::append;
use crate::error::Error;
use crate::export::Merged;
use crate::io::adapter::AdapterConfig;
use crate::io::gguf::{GgmlType, Gguf, GgufWriter, Value};
use crate::models::{Change, GgufTensor, gguf_tensors, metadata_architecture};

/// One module: its tensor's name, A `[R, in]` and B `[out, R]` as the file has them.
struct Pair {
    name: String,
    a: (Vec<f32>, i64),
    b: (Vec<f32>, i64),
    r: i64,
}

/// Writes the adapter of `merged` in f32. llama.cpp adds `alpha / R B A`; where a module's own factor differs from the file's
/// alpha (rslora, `alpha_pattern`), B carries the rest. The file is read back and compared element by element. Returns its size.
///
/// # Errors
/// No adapter; one with `modules_to_save`, which such a file cannot hold.
pub fn write_gguf_lora(merged: &Merged, path: &Path) -> Result<u64> {
    let Some(dir) = merged.adapter_dir() else {
        bail!(Error::Usage("--format gguf-lora needs --adapter".to_string()));
    };
    if merged.saves_modules() {
        let what = format!("{}: modules_to_save in a GGUF adapter", dir.display());
        bail!(Error::Unsupported { what, supported: "LoRA alone; --format gguf merges both".to_string() });
    }
    let alpha = AdapterConfig::load(dir)?.lora_alpha;
    let named: HashMap<String, GgufTensor> = gguf_tensors(&merged.config, merged.prefix(), None)
        .into_iter()
        .map(|tensor| (tensor.checkpoint.clone(), tensor))
        .collect();
    let mut pairs = Vec::new();
    for (module, a, b, scale) in merged.loras()? {
        let tensor = named
            .get(&format!("{module}.weight"))
            .with_context(|| format!("{module} has no name in GGUF files"))?;
        pairs.push(pair(tensor, &a, &b, scale, alpha)?);
    }
    let layout: Vec<(String, Vec<i64>, GgmlType)> = pairs
        .iter()
        .flat_map(|pair| {
            let a = (format!("{}.lora_a", pair.name), vec![pair.r, pair.a.1], GgmlType::F32);
            [a, (format!("{}.lora_b", pair.name), vec![pair.b.1, pair.r], GgmlType::F32)]
        })
        .collect();
    let text = |text: &str| Value::String(text.to_string());
    let metadata = [
        ("general.architecture", text(metadata_architecture(&merged.config))),
        ("general.type", text("adapter")),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", Value::F32(alpha as f32)),
    ]
    .map(|(key, value)| (key.to_string(), value));
    let mut writer = GgufWriter::create(path, &metadata, &layout)?;
    for pair in &pairs {
        append(&mut writer, &format!("{}.lora_a", pair.name), GgmlType::F32, &pair.a.0, pair.a.0.len())?;
        append(&mut writer, &format!("{}.lora_b", pair.name), GgmlType::F32, &pair.b.0, pair.b.0.len())?;
    }
    let size = writer.size();
    writer.finish()?;
    let read = Gguf::open(path).context("reading the export back")?;
    for pair in &pairs {
        for (suffix, values) in [("lora_a", &pair.a.0), ("lora_b", &pair.b.0)] {
            if &read.dequantize(&format!("{}.{suffix}", pair.name))? != values {
                bail!("{}: {}.{suffix} is not what was written", path.display(), pair.name);
            }
        }
    }
    Ok(size)
}

fn pair(tensor: &GgufTensor, a: &Tensor, b: &Tensor, scale: f64, alpha: f64) -> Result<Pair> {
    let (r, in_features, rows) = (a.size()[0], a.size()[1], b.size()[0]);
    let rest = scale * r as f64 / alpha;
    // 1 within rounding: B stays as it is, bit for bit.
    let b = if (rest - 1.0).abs() < 1e-12 { b.shallow_clone() } else { b.f_mul_scalar(rest)? };
    let stored = Vec::<f32>::try_from(b.f_contiguous()?.f_view([-1])?)?;
    let values = match tensor.change {
        Change::Pairs(_) => {
            let length = r as usize;
            let row = |row: usize| tensor.change.source_row(row, rows as usize) * length;
            (0..rows as usize).flat_map(|i| stored[row(i)..row(i) + length].to_vec()).collect()
        }
        Change::None | Change::PlusOne => stored,
    };
    let a_values = Vec::<f32>::try_from(a.f_contiguous()?.f_view([-1])?)?;
    Ok(Pair { name: tensor.name.clone(), a: (a_values, in_features), b: (values, rows), r })
}
