//! Checkpoints that transformers loads: merged in 16 bits, or in NF4 as transformers + bitsandbytes would save them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::{DynamicPlan, Merged};
use crate::error::Error;
use crate::io::{
    Filling, NF4, QuantKeys, QuantState, TensorFile, check_free_space, write_atomically,
    write_folder_atomically,
};
use crate::nn::quantize_stored;
use crate::ops::Nf4;

const BLOCKSIZE: i64 = 64;
const NESTED_BLOCKSIZE: i64 = 256;
/// The longest text of a number in JSON.
const LONGEST_NUMBER: usize = 25;

/// Sizes of the tensors on disk, in bytes, before and after.
pub struct Sizes {
    pub before: u64,
    pub after: u64,
}

/// How projections are written.
#[derive(Clone, Copy)]
pub enum Layout {
    /// In the 16 bits that the checkpoint has; f32 becomes bf16.
    SixteenBit,
    /// Quantised on this device.
    Nf4(Device),
}

/// How one tensor is written.
enum Form {
    /// The bytes of the checkpoint.
    Copy,
    Dense(Kind),
    Nf4([i64; 2]),
}

/// A file that is announced and not yet written.
struct Planned {
    file: String,
    tensors: TensorFile,
    forms: Vec<(String, Form)>,
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
    progress: impl FnMut(u64, u64),
) -> Result<Sizes> {
    let merged = Merged::open(model_dir, None, false)?;
    if merged.weights.is_quantized() {
        bail!(Error::Usage(format!("{} is quantised already", model_dir.display())));
    }
    let mut sizes = None;
    write_folder_atomically(output_dir, |folder| {
        sizes = Some(write_checkpoint(&merged, folder, Layout::Nf4(device), plan, progress)?);
        plan.map_or(Ok(()), |plan| plan.save(folder))
    })?;
    sizes.context("nothing was written")
}

/// Writes the merged checkpoint into `folder`, sharded as before, with index, config, generation config, tokenizer and chat
/// template. One matrix at a time stands in memory: in f32, rounded, and as bytes. A model in 4 bits stays in 4 bits only
/// under [`Layout::Nf4`], and then keeps the projections in 16 bits that it has so.
///
/// # Errors
/// A disk without the space that it needs, before anything is written; a `plan` of another model.
pub fn write_checkpoint(
    merged: &Merged,
    folder: &Path,
    layout: Layout,
    plan: Option<&DynamicPlan>,
    mut progress: impl FnMut(u64, u64),
) -> Result<Sizes> {
    let mut kept = BTreeSet::new();
    for module in plan.iter().flat_map(|plan| plan.kept()) {
        let name = format!("{module}.weight");
        if merged.projection(&name).is_none() {
            bail!("{}: the plan keeps {module}, which it has not", merged.dir.display());
        }
        kept.insert(name);
    }
    let planned = plan_files(merged, layout, &kept)?;
    let after: u64 =
        planned.iter().flat_map(|file| file.tensors.sizes()).map(|(_, bytes)| bytes as u64).sum();
    check_free_space(folder, after)?;
    let (mut read, before) = (0, merged.weights.bytes());
    let mut places = BTreeMap::new();
    let (mut quantized, mut skipped) = (Vec::new(), Vec::new());
    let sharded = planned.len() > 1 || planned.iter().any(|file| file.file != "model.safetensors");
    for Planned { file, tensors, forms } in planned {
        for (name, _) in tensors.sizes() {
            places.insert(name.to_string(), file.clone());
        }
        let mut filling = tensors.create(&folder.join(&file))?;
        for (name, form) in forms {
            write_tensor(&mut filling, merged, &name, &form, layout)?;
            read += merged.weights.with_bytes(&name, |bytes| Ok(bytes.len() as u64)).unwrap_or(0);
            progress(read.min(before), before);
            let module = name.strip_suffix(".weight").unwrap_or(&name).to_string();
            match form {
                Form::Nf4(_) => quantized.push(name),
                _ if merged.shape(&name)?.len() == 2 && !module.ends_with("embed_tokens") => {
                    skipped.push(module)
                }
                _ => {}
            }
        }
        filling.finish()?;
    }
    if sharded {
        let index = json!({"metadata": {"total_size": after}, "weight_map": places});
        write_atomically(&folder.join("model.safetensors.index.json"), &serde_json::to_vec_pretty(&index)?)?;
    }
    let mut config = merged.config_json()?;
    match layout {
        Layout::SixteenBit => set_dtype(&mut config, merged)?,
        Layout::Nf4(_) => {
            let first = quantized.iter().min().context("no projection is left to quantise")?;
            config["quantization_config"] = quantization_config(merged.kind(first)?, skipped, plan);
        }
    }
    write_atomically(&folder.join("config.json"), &serde_json::to_vec_pretty(&config)?)?;
    merged.copy_companions(folder)?;
    Ok(Sizes { before, after })
}

fn plan_files(merged: &Merged, layout: Layout, kept: &BTreeSet<String>) -> Result<Vec<Planned>> {
    let mut planned = Vec::new();
    for shard in merged.shards()? {
        let mut tensors = TensorFile::default();
        let mut forms = Vec::new();
        for name in shard.names {
            let form = form_of(merged, &name, layout, kept)?;
            match &form {
                Form::Copy => tensors.add_copy(&name, &merged.weights)?,
                Form::Dense(kind) => tensors.add(&name, *kind, &merged.shape(&name)?)?,
                Form::Nf4(shape) => announce(&mut tensors, &name, *shape, merged.kind(&name)?)?,
            }
            forms.push((name, form));
        }
        planned.push(Planned { file: shard.file, tensors, forms });
    }
    Ok(planned)
}

fn form_of(merged: &Merged, name: &str, layout: Layout, kept: &BTreeSet<String>) -> Result<Form> {
    if let (Layout::Nf4(_), Some(shape)) = (layout, merged.projection(name)) {
        let is_kept = kept.contains(name)
            || merged.weights.is_quantized() && merged.weights.quant_state(name)?.is_none();
        if !is_kept {
            merged
                .weights
                .quant_state(name)?
                .map_or_else(|| merged.weights.expect_shape(name, &shape), |_| Ok(()))?;
            return Ok(Form::Nf4(shape));
        }
    }
    let kind = merged.kind(name)?;
    let written = written_kind(kind, layout);
    Ok(if written == kind && !merged.changes(name)? { Form::Copy } else { Form::Dense(written) })
}

fn written_kind(kind: Kind, layout: Layout) -> Kind {
    match (kind, layout) {
        (Kind::Float | Kind::Double, Layout::SixteenBit) => Kind::BFloat16,
        (kind, _) => kind,
    }
}

fn write_tensor(file: &mut Filling, merged: &Merged, name: &str, form: &Form, layout: Layout) -> Result<()> {
    match (form, layout) {
        (Form::Copy, _) => merged.weights.with_bytes(name, |bytes| file.write_bytes(name, bytes)),
        (Form::Nf4(shape), Layout::Nf4(device)) => {
            let kind = merged.kind(name)?;
            let nf4 = if merged.changes(name)? {
                Nf4::quantize(&merged.tensor(name)?.f_to_kind(kind)?.f_to_device(device)?)?
            } else {
                quantize_stored(&merged.weights, name, *shape, device)?
            };
            let text = state_text(*shape, nf4.nested.as_ref().map(|nested| nested.offset), kind)?;
            for (name, tensor) in tensors(name, &nf4)? {
                file.write(&name, tensor)?;
            }
            file.write_bytes(&QuantKeys::of(name).quant_state, text.as_bytes())
        }
        (Form::Dense(kind), _) => file.write(name, &merged.tensor(name)?.f_to_kind(*kind)?),
        (Form::Nf4(_), Layout::SixteenBit) => bail!("{name}: 4 bits in a 16-bit checkpoint"),
    }
}

fn announce(file: &mut TensorFile, name: &str, shape: [i64; 2], kind: Kind) -> Result<()> {
    let keys = QuantKeys::of(name);
    let ceil_div = |a: i64, b: i64| (a + b - 1) / b;
    let n = shape[0] * shape[1];
    let blocks = ceil_div(n, BLOCKSIZE);
    file.add(name, Kind::Uint8, &[ceil_div(n, 2), 1])?;
    file.add(&keys.absmax, Kind::Uint8, &[blocks])?;
    file.add(&keys.quant_map, Kind::Float, &[16])?;
    file.add(&keys.nested_absmax, Kind::Float, &[ceil_div(blocks, NESTED_BLOCKSIZE)])?;
    file.add(&keys.nested_quant_map, Kind::Float, &[256])?;
    let text = state_text(shape, None, kind)?;
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
fn state_text(shape: [i64; 2], offset: Option<f64>, kind: Kind) -> Result<String> {
    let state = QuantState {
        quant_type: NF4.to_string(),
        blocksize: BLOCKSIZE,
        dtype: dtype_name(kind).to_string(),
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

/// The dtype under the words of transformers 4 and 5.
fn set_dtype(config: &mut Value, merged: &Merged) -> Result<()> {
    let norm = format!("{}norm.weight", merged.prefix());
    let name = dtype_name(written_kind(merged.kind(&norm)?, Layout::SixteenBit));
    let text = if config["text_config"].is_object() { Some("text_config") } else { None };
    for key in ["torch_dtype", "dtype"] {
        if config.get(key).is_some() {
            config[key] = name.into();
        }
        if let Some(part) = text
            && config[part].get(key).is_some()
        {
            config[part][key] = name.into();
        }
    }
    Ok(())
}

fn quantization_config(kind: Kind, skipped: Vec<String>, plan: Option<&DynamicPlan>) -> Value {
    // transformers takes every other matrix for a quantised one. The head is named also where it is tied and not stored.
    let mut modules = vec!["lm_head".to_string()];
    modules.extend(skipped.into_iter().filter(|module| module != "lm_head"));
    // transformers may know a module by another name than the checkpoint.
    for module in plan.iter().flat_map(|plan| &plan.modules) {
        if module.kept && !modules.contains(&module.loaded_as) {
            modules.push(module.loaded_as.clone());
        }
    }
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": dtype_name(kind),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": NF4,
        "bnb_4bit_use_double_quant": true,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": modules,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}
