//! A checkpoint with a LoRA adapter added into it, read one tensor at a time.
//!
//! ```text
//! W' = W + s B A          s = alpha / R, or alpha / sqrt(R) with rslora
//! ```
//!
//! The sum is made in f32 from the stored values; whoever writes it rounds once.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::data::{ChatTemplate, Tokenizer};
use crate::io::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig, AdapterTensor, text_module};
use crate::io::lora_spec::LoraSpec;
use crate::io::{QuantKeys, Weights, write_atomically};
use crate::models::{Config, Decoder, FastLanguageModel, prefix_of};
use crate::nn::{dequantize_stored, quantize_stored};

/// Tensors that bitsandbytes keeps beside a 4-bit weight.
const QUANT_SUFFIXES: [&str; 5] =
    [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"];

/// A checkpoint folder and what is added to it.
pub struct Merged {
    pub dir: PathBuf,
    pub config: Config,
    pub weights: Weights,
    prefix: &'static str,
    adapter: Option<Adapter>,
    /// Projections are taken as NF4 would give them back: what QLoRA trained the adapter on.
    onto_nf4: bool,
    projections: HashMap<String, [i64; 2]>,
}

struct Adapter {
    dir: PathBuf,
    weights: Weights,
    /// Of each module of the checkpoint: keys of A and B, and s.
    loras: BTreeMap<String, Lora>,
    /// Module of `modules_to_save` -> key of its whole weight.
    saved: BTreeMap<String, String>,
}

struct Lora {
    a: String,
    b: String,
    scale: f64,
}

/// A file of the checkpoint: its name, and the names of the weights that go into it.
pub struct Shard {
    pub file: String,
    pub names: Vec<String>,
}

impl Merged {
    /// Opens the checkpoint in `dir` and the adapter in `adapter`. With `onto_nf4` the base is quantised to NF4 and
    /// dequantised before the sum, as an adapter trained with `load_in_4bit` saw it.
    ///
    /// # Errors
    /// An adapter of another model: the message names its tensor.
    pub fn open(dir: &Path, adapter: Option<&Path>, onto_nf4: bool) -> Result<Merged> {
        let config = Config::from_dir(dir)?;
        let weights = Weights::open(dir)?;
        let prefix = prefix_of(&weights)?;
        let projections: HashMap<String, [i64; 2]> =
            Decoder::projections(&config, &weights)?.into_iter().collect();
        let mut merged =
            Merged { dir: dir.to_path_buf(), config, weights, prefix, adapter: None, onto_nf4, projections };
        if let Some(folder) = adapter {
            merged.adapter = Some(merged.read_adapter(folder).context("--adapter")?);
        }
        Ok(merged)
    }

    fn read_adapter(&self, folder: &Path) -> Result<Adapter> {
        let spec = LoraSpec::new(&AdapterConfig::load(folder)?)?;
        let path = folder.join(ADAPTER_WEIGHTS);
        if !path.is_file() {
            bail!("{}: there is no {ADAPTER_WEIGHTS} in this adapter folder", folder.display());
        }
        let weights = Weights::open_files(std::slice::from_ref(&path))?;
        let mut keys: HashMap<(String, AdapterTensor), String> = HashMap::new();
        for name in weights.names() {
            let parsed = AdapterTensor::parse(name).with_context(|| {
                format!("{}: tensor {name} is of no kind that ferrotune knows", path.display())
            })?;
            keys.insert(parsed, name.to_string());
        }
        let mut adapter =
            Adapter { dir: folder.to_path_buf(), weights, loras: BTreeMap::new(), saved: BTreeMap::new() };
        let mut modules: Vec<(&str, [i64; 2])> = self
            .projections
            .iter()
            .filter_map(|(name, shape)| Some((name.strip_suffix(".weight")?, *shape)))
            .collect();
        modules.sort_unstable();
        for (module, [rows, in_features]) in modules {
            let text = self.text_name(module);
            let in_peft = self.peft_name(module);
            let Some(lora) = (match spec.for_module(&in_peft)? {
                Some(lora) => Some(lora),
                None => spec.for_module(&text)?,
            }) else {
                continue;
            };
            let mut take = |kind: AdapterTensor, shape: [i64; 2]| -> Result<String> {
                let key = keys
                    .remove(&(text.clone(), kind))
                    .with_context(|| format!("{}: no tensor named {}", path.display(), kind.key(&in_peft)))?;
                adapter.weights.expect_shape(&key, &shape)?;
                Ok(key)
            };
            let r = i64::from(lora.r);
            let a = take(AdapterTensor::LoraA, [r, in_features])?;
            let b = take(AdapterTensor::LoraB, [rows, r])?;
            adapter.loras.insert(module.to_string(), Lora { a, b, scale: lora.scale });
        }
        let size = [self.config.vocab_size, self.config.hidden_size];
        for ((module, kind), key) in keys {
            let module = match (module.as_str(), kind) {
                ("lm_head", AdapterTensor::Weight) => self.head_module().to_string(),
                ("model.embed_tokens", AdapterTensor::Weight) => format!("{}embed_tokens", self.prefix),
                _ => bail!(
                    "{}: tensor {key} belongs to no module that {ADAPTER_CONFIG} targets",
                    path.display()
                ),
            };
            adapter.weights.expect_shape(&key, &size)?;
            adapter.saved.insert(module, key);
        }
        Ok(adapter)
    }

    /// `model.layers.0.mlp.up_proj`, whatever the checkpoint puts before `layers.0`.
    fn text_name(&self, module: &str) -> String {
        match module.strip_prefix(self.prefix) {
            Some(rest) => format!("model.{rest}"),
            None => text_module(module),
        }
    }

    fn peft_name(&self, module: &str) -> String {
        let text = self.text_name(module);
        match text.strip_prefix("model.") {
            Some(rest) if self.config.ignores_vision => format!("model.language_model.{rest}"),
            _ => text,
        }
    }

    /// What the checkpoint puts before `layers.0`.
    pub fn prefix(&self) -> &'static str {
        self.prefix
    }

    /// The head's name in the checkpoint, or the one that it would have.
    fn head_module(&self) -> &'static str {
        let old = "language_model.lm_head";
        if self.prefix == "language_model.model." || self.weights.contains(&format!("{old}.weight")) {
            old
        } else {
            "lm_head"
        }
    }

    /// The adapter's folder.
    pub fn adapter_dir(&self) -> Option<&Path> {
        self.adapter.as_ref().map(|adapter| adapter.dir.as_path())
    }

    /// Whether the base comes out of 4 bits, so that the result keeps the rounding of NF4.
    pub fn is_dequantized(&self) -> bool {
        self.onto_nf4 || self.weights.is_quantized()
    }

    /// Whether head and embedding were one matrix and no longer are, because the adapter holds a trained copy of one.
    pub fn unties(&self) -> bool {
        self.config.tie_word_embeddings
            && self.adapter.as_ref().is_some_and(|adapter| !adapter.saved.is_empty())
    }

    /// The model's name of the head where it has one of its own.
    pub fn head(&self) -> Option<String> {
        let own = !self.config.tie_word_embeddings || self.unties();
        own.then(|| format!("{}.weight", self.head_module()))
    }

    /// The files of the checkpoint and the weights that go into each, without what belongs to 4-bit weights.
    pub fn shards(&self) -> Result<Vec<Shard>> {
        let is_part = |name: &str| {
            QUANT_SUFFIXES.iter().any(|suffix| {
                name.strip_suffix(suffix)
                    .is_some_and(|weight| self.weights.contains(&QuantKeys::of(weight).quant_state))
            })
        };
        let mut shards = Vec::new();
        for (path, names) in self.weights.shards() {
            let file = path.file_name().context("a shard without a name")?.to_string_lossy().into_owned();
            let names = names.into_iter().filter(|name| !is_part(name)).map(str::to_string).collect();
            shards.push(Shard { file, names });
        }
        if let (true, Some(head), Some(last)) = (self.unties(), self.head(), shards.last_mut())
            && !self.weights.contains(&head)
        {
            last.names.push(head);
        }
        Ok(shards)
    }

    /// Its shape, unpacked.
    pub fn shape(&self, name: &str) -> Result<Vec<i64>> {
        if self.is_new_head(name) {
            return Ok(vec![self.config.vocab_size, self.config.hidden_size]);
        }
        match self.weights.quant_state(name)? {
            Some(state) => Ok(state.shape),
            None => self.weights.shape(name),
        }
    }

    /// The dtype it has in 16 or 32 bits.
    pub fn kind(&self, name: &str) -> Result<Kind> {
        let name = if self.is_new_head(name) { &self.embedding() } else { name };
        Ok(match self.weights.quant_state(name)?.as_ref().map(|state| state.dtype.as_str()) {
            Some("bfloat16") => Kind::BFloat16,
            Some("float16") => Kind::Half,
            Some(_) => Kind::Float,
            None => self.weights.kind(name)?,
        })
    }

    /// The shape of a projection of a layer: what 4-bit checkpoints quantise.
    pub fn projection(&self, name: &str) -> Option<[i64; 2]> {
        self.projections.get(name).copied()
    }

    /// Whether it differs from the bytes of the checkpoint.
    pub fn changes(&self, name: &str) -> Result<bool> {
        let module = module_of(name);
        let adapted = self
            .adapter
            .as_ref()
            .is_some_and(|adapter| adapter.saved.contains_key(module) || adapter.loras.contains_key(module));
        let from_nf4 = self.onto_nf4 && self.projections.contains_key(name);
        Ok(adapted || from_nf4 || self.is_new_head(name) || self.weights.quant_state(name)?.is_some())
    }

    /// Its values in f32 on the CPU, in the shape of [`Merged::shape`].
    ///
    /// # Errors
    /// Values that are NaN or infinite.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.rows(name, 0, self.shape(name)?.first().copied().unwrap_or(1))
    }

    /// The `count` rows of it from row `first` on: of a large matrix only these stand in memory.
    pub fn rows(&self, name: &str, first: i64, count: i64) -> Result<Tensor> {
        let module = module_of(name);
        let saved = self.adapter.as_ref().and_then(|adapter| Some((adapter, adapter.saved.get(module)?)));
        if let Some((adapter, key)) = saved {
            return rows_in_f32(&adapter.weights, key, first, count);
        }
        let stored = if self.is_new_head(name) { self.embedding() } else { name.to_string() };
        let base = match (self.weights.quant_state(&stored)?, self.projections.get(&stored)) {
            (Some(state), _) => dequantize_stored(&self.weights, &stored, two(&stored, &state.shape)?)?
                .f_narrow(0, first, count)?,
            (None, Some(shape)) if self.onto_nf4 => {
                let nf4 = quantize_stored(&self.weights, &stored, *shape, Device::Cpu)?;
                nf4.dequantize(Kind::Float)?.f_narrow(0, first, count)?
            }
            _ => rows_in_f32(&self.weights, &stored, first, count)?,
        };
        let lora = self.adapter.as_ref().and_then(|adapter| Some((adapter, adapter.loras.get(module)?)));
        let Some((adapter, lora)) = lora.filter(|_| name.ends_with(".weight")) else { return Ok(base) };
        let a = rows_in_f32(&adapter.weights, &lora.a, 0, adapter.weights.shape(&lora.a)?[0])?;
        let b = rows_in_f32(&adapter.weights, &lora.b, first, count)?;
        let mut sum = base;
        // In place: W + s B A without a second matrix of that size.
        Ok(sum.f_addmm_(&b.f_mul_scalar(lora.scale)?, &a)?)
    }

    /// Every module with LoRA: its name in the checkpoint, A `[R, in]`, B `[out, R]` and s.
    pub fn loras(&self) -> Result<Vec<(String, Tensor, Tensor, f64)>> {
        let Some(adapter) = &self.adapter else { return Ok(Vec::new()) };
        let read = |key: &str| rows_in_f32(&adapter.weights, key, 0, adapter.weights.shape(key)?[0]);
        (adapter.loras.iter())
            .map(|(module, lora)| Ok((module.clone(), read(&lora.a)?, read(&lora.b)?, lora.scale)))
            .collect()
    }

    /// Whether the adapter holds whole matrices (`modules_to_save`).
    pub fn saves_modules(&self) -> bool {
        self.adapter.as_ref().is_some_and(|adapter| !adapter.saved.is_empty())
    }

    /// The checkpoint's tokenizer, if it has one, with the chat template of the adapter where that brings its own.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        if !self.dir.join("tokenizer.json").is_file() {
            return Ok(None);
        }
        let mut tokenizer = FastLanguageModel::tokenizer_of(&self.dir)?;
        if let Some(template) = self.adapter_template() {
            tokenizer.set_chat_template(ChatTemplate::from_file(&template)?);
        }
        Ok(Some(tokenizer))
    }

    fn adapter_template(&self) -> Option<PathBuf> {
        let template = self.adapter.as_ref()?.dir.join("chat_template.jinja");
        template.is_file().then_some(template)
    }

    fn embedding(&self) -> String {
        format!("{}embed_tokens.weight", self.prefix)
    }

    /// A head that the checkpoint does not store.
    fn is_new_head(&self, name: &str) -> bool {
        self.unties() && !self.weights.contains(name) && self.head().as_deref() == Some(name)
    }

    /// The checkpoint's config.json without a `quantization_config`, untied where the result is.
    pub fn config_json(&self) -> Result<Value> {
        let path = self.dir.join("config.json");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let mut config: Value =
            serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
        config.as_object_mut().map(|config| config.shift_remove("quantization_config"));
        if self.unties() {
            if config["text_config"].is_object() {
                config["text_config"]["tie_word_embeddings"] = Value::Bool(false);
            }
            config["tie_word_embeddings"] = Value::Bool(false);
        }
        Ok(config)
    }

    /// Copies tokenizer, chat template, generation config and licence into `folder`; a template beside the adapter is
    /// the one it was trained with, and wins.
    pub fn copy_companions(&self, folder: &Path) -> Result<()> {
        copy_companions(&self.dir, folder)?;
        if let Some(template) = self.adapter_template() {
            let bytes = fs::read(&template).with_context(|| format!("reading {}", template.display()))?;
            write_atomically(&folder.join("chat_template.jinja"), &bytes)?;
        }
        Ok(())
    }
}

fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

fn two(name: &str, shape: &[i64]) -> Result<[i64; 2]> {
    <[i64; 2]>::try_from(shape)
        .ok()
        .with_context(|| format!("{name}: {shape:?} is not the shape of a matrix"))
}

fn rows_in_f32(weights: &Weights, name: &str, first: i64, count: i64) -> Result<Tensor> {
    weights.with_stored(name, |stored| {
        let rows =
            if stored.dim() == 0 { stored.shallow_clone() } else { stored.f_narrow(0, first, count)? };
        let values = rows.f_to_dtype(Kind::Float, false, true)?;
        // A sum is finite only if every element is.
        if !values.f_sum(Kind::Double)?.double_value(&[]).is_finite() {
            return Err(weights.corrupt(name, "holds NaN or infinite values").into());
        }
        Ok(values)
    })
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
        let other = ["config.json", "adapter_config.json", "train_results.json", super::EXPORT_REPORT];
        if belongs
            && path.is_file()
            && !other.contains(&name.as_str())
            && !name.ends_with(".safetensors.index.json")
        {
            let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            write_atomically(&folder.join(name), &bytes)?;
        }
    }
    Ok(())
}
