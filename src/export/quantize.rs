//! A checkpoint in 16 or 32 bits as the NF4 checkpoint that transformers + bitsandbytes would save of it.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::DynamicPlan;
use crate::error::Error;
use crate::io::{NF4, QuantKeys, QuantState, TensorFile, Weights, write_atomically, write_folder_atomically};
use crate::models::{Config, Decoder};
use crate::nn::quantize_stored;
use crate::ops::Nf4;

const BLOCKSIZE: i64 = 64;
const NESTED_BLOCKSIZE: i64 = 256;
/// The longest text of a number in JSON.
const LONGEST_NUMBER: usize = 25;

/// Sizes of the tensors on disk, in bytes, before and after.
pub struct Quantized {
    pub before: u64,
    pub after: u64,
}

/// Writes `model_dir` with every projection of its layers in NF4, but for those that `plan` keeps, to `output_dir`: sharded as
/// before, with tokenizer, generation config and plan, all of it or nothing. Each matrix is quantised on `device`; at most one stands in memory. `progress`
/// hears the bytes read so far and those to read.
///
/// # Errors
/// A checkpoint that is quantised already, or no whole one; an output folder that is not empty.
pub fn quantize(
    model_dir: &Path,
    output_dir: &Path,
    device: Device,
    plan: Option<&DynamicPlan>,
    mut progress: impl FnMut(u64, u64),
) -> Result<Quantized> {
    let config = Config::from_dir(model_dir)?;
    let weights = Weights::open(model_dir)?;
    if weights.is_quantized() {
        bail!(Error::Usage(format!("{} is quantised already", model_dir.display())));
    }
    let mut projections: HashMap<String, [i64; 2]> =
        Decoder::projections(&config, &weights)?.into_iter().collect();
    for (name, shape) in &projections {
        weights.expect_shape(name, shape)?;
    }
    for module in plan.iter().flat_map(|plan| plan.kept()) {
        projections
            .remove(&format!("{module}.weight"))
            .with_context(|| format!("{}: the plan keeps {module}, which it has not", model_dir.display()))?;
    }
    let (mut read, before, mut after) = (0, weights.bytes(), 0);
    write_folder_atomically(output_dir, |folder| {
        let mut places = BTreeMap::new();
        let mut sharded = false;
        for (path, names) in weights.shards() {
            let file_name =
                path.file_name().context("a shard without a name")?.to_string_lossy().into_owned();
            sharded |= file_name != "model.safetensors";
            let mut file = TensorFile::default();
            for name in &names {
                match projections.get(*name) {
                    Some(shape) => announce(&mut file, name, *shape, &weights)?,
                    None => file.add_copy(name, &weights)?,
                }
            }
            for (name, bytes) in file.sizes() {
                places.insert(name.to_string(), file_name.clone());
                after += bytes as u64;
            }
            let mut file = file.create(&folder.join(&file_name))?;
            for name in names {
                let bytes = match projections.get(name) {
                    Some(shape) => {
                        let nf4 = quantize_stored(&weights, name, *shape, device)?;
                        let state = state_text(
                            name,
                            *shape,
                            nf4.nested.as_ref().map(|nested| nested.offset),
                            &weights,
                        )?;
                        for (name, tensor) in tensors(name, &nf4)? {
                            file.write(&name, tensor)?;
                        }
                        file.write_bytes(&QuantKeys::of(name).quant_state, state.as_bytes())?;
                        weights.with_bytes(name, |bytes| Ok(bytes.len()))?
                    }
                    None => weights.with_bytes(name, |bytes| {
                        file.write_bytes(name, bytes)?;
                        Ok(bytes.len())
                    })?,
                };
                read += bytes as u64;
                progress(read, before);
            }
            file.finish()?;
        }
        if sharded {
            let index = json!({"metadata": {"total_size": after}, "weight_map": places});
            write_atomically(
                &folder.join("model.safetensors.index.json"),
                &serde_json::to_vec_pretty(&index)?,
            )?;
        }
        write_config(model_dir, folder, &weights, &projections, plan)?;
        copy_companions(model_dir, folder)?;
        plan.map_or(Ok(()), |plan| plan.save(folder))
    })?;
    Ok(Quantized { before, after })
}

fn announce(file: &mut TensorFile, name: &str, shape: [i64; 2], weights: &Weights) -> Result<()> {
    let keys = QuantKeys::of(name);
    let ceil_div = |a: i64, b: i64| (a + b - 1) / b;
    let n = shape[0] * shape[1];
    let blocks = ceil_div(n, BLOCKSIZE);
    file.add(name, Kind::Uint8, &[ceil_div(n, 2), 1])?;
    file.add(&keys.absmax, Kind::Uint8, &[blocks])?;
    file.add(&keys.quant_map, Kind::Float, &[16])?;
    file.add(&keys.nested_absmax, Kind::Float, &[ceil_div(blocks, NESTED_BLOCKSIZE)])?;
    file.add(&keys.nested_quant_map, Kind::Float, &[256])?;
    let text = state_text(name, shape, None, weights)?;
    file.add(&keys.quant_state, Kind::Uint8, &[text.len() as i64])
}

/// The tensors of a quantised weight under their names.
fn tensors<'a>(name: &str, nf4: &'a Nf4) -> Result<Vec<(String, &'a tch::Tensor)>> {
    let keys = QuantKeys::of(name);
    let nested = nf4.nested.as_ref().context("quantised without double quantisation")?;
    Ok(vec![
        (name.to_string(), &nf4.packed),
        (keys.absmax, &nf4.absmax),
        (keys.quant_map, &nf4.quant_map),
        (keys.nested_absmax, &nested.absmax),
        (keys.nested_quant_map, &nested.quant_map),
    ])
}

/// The quant_state as JSON, filled up with spaces: as long for every offset, because the header of the file, which is
/// written first, says how long it is.
fn state_text(name: &str, shape: [i64; 2], offset: Option<f64>, weights: &Weights) -> Result<String> {
    let state = QuantState {
        quant_type: NF4.to_string(),
        blocksize: BLOCKSIZE,
        dtype: dtype_name(weights.kind(name)?).to_string(),
        shape: shape.to_vec(),
        nested_blocksize: Some(NESTED_BLOCKSIZE),
        nested_dtype: Some("float32".to_string()),
        nested_offset: Some(offset.unwrap_or(0.0)),
    };
    let text = serde_json::to_string(&state)?;
    let length =
        serde_json::to_string(&QuantState { nested_offset: Some(0.0), ..state })?.len() + LONGEST_NUMBER;
    Ok(format!("{text:length$}"))
}

/// The dtype that bitsandbytes would quantise from.
fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

fn write_config(
    model_dir: &Path,
    folder: &Path,
    weights: &Weights,
    projections: &HashMap<String, [i64; 2]>,
    plan: Option<&DynamicPlan>,
) -> Result<()> {
    let path = model_dir.join("config.json");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut config: Value =
        serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
    // transformers takes every other matrix for a quantised one. The head is named also where it is tied and not stored.
    let mut skipped = vec!["lm_head".to_string()];
    for (_, names) in weights.shards() {
        for name in names {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let is_matrix = weights.shape(name)?.len() == 2 && !module.ends_with("embed_tokens");
            if is_matrix && !projections.contains_key(name) && module != "lm_head" {
                skipped.push(module.to_string());
            }
        }
    }
    // transformers may know a module by another name than the checkpoint.
    for module in plan.iter().flat_map(|plan| &plan.modules) {
        if module.kept && !skipped.contains(&module.loaded_as) {
            skipped.push(module.loaded_as.clone());
        }
    }
    let first = projections.keys().min().context("no projection is left to quantise")?;
    config["quantization_config"] = json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": dtype_name(weights.kind(first)?),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": NF4,
        "bnb_4bit_use_double_quant": true,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    });
    write_atomically(&folder.join("config.json"), &serde_json::to_vec_pretty(&config)?)
}

/// Tokenizer, chat template, generation config, licence.
fn copy_companions(model_dir: &Path, folder: &Path) -> Result<()> {
    for entry in fs::read_dir(model_dir).with_context(|| format!("reading {}", model_dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let belongs =
            ["json", "jinja", "txt", "model"].iter().any(|end| path.extension().is_some_and(|e| e == *end))
                || name.starts_with("LICENSE")
                || name.starts_with("NOTICE");
        if belongs && path.is_file() && name != "config.json" && !name.ends_with(".safetensors.index.json") {
            let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            write_atomically(&folder.join(name), &bytes)?;
        }
    }
    Ok(())
}
