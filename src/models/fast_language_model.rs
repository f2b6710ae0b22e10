//! A checkpoint ready to use: decoder, tokenizer, and the adapter on it.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use tch::{Device, Kind};

use super::adapter::fill_adapter;
use super::parameters::check_targets;
use super::{Config, Decoder, LoraModule};
use crate::data::{ChatTemplate, Tokenizer};
use crate::device::Generator;
use crate::io::adapter::{ADAPTER_WEIGHTS, AdapterConfig};
use crate::io::{Weights, write_safetensors};
use crate::nn::LoadOptions;

/// The two calls of Unsloth's users: [`FastLanguageModel::from_pretrained`], then
/// [`FastLanguageModel::get_peft_model`].
pub struct FastLanguageModel {
    pub decoder: Decoder,
    pub(super) tokenizer: Option<Tokenizer>,
    /// The folder that the base model came from.
    pub dir: PathBuf,
    /// The adapter's configuration, where there is one.
    pub adapter: Option<AdapterConfig>,
}

/// Files beside the weights that a model folder needs to be complete.
const COMPANIONS: [&str; 2] = ["config.json", "generation_config.json"];
const WEIGHTS: &str = "model.safetensors";

impl FastLanguageModel {
    /// Loads a Hugging Face model folder, weights converted to `kind` on `device`.
    pub fn from_pretrained(dir: &Path, kind: Kind, device: Device) -> Result<FastLanguageModel> {
        FastLanguageModel::from_pretrained_with(dir, LoadOptions::new(kind, device))
    }

    /// As [`FastLanguageModel::from_pretrained`], with more to choose: `load_in_4bit`. A checkpoint that bitsandbytes has
    /// quantised loads as it is, with and without that.
    pub fn from_pretrained_with(dir: &Path, options: LoadOptions) -> Result<FastLanguageModel> {
        FastLanguageModel::from_pretrained_keeping(dir, options, &BTreeSet::new())
    }

    /// As [`FastLanguageModel::from_pretrained_with`]; `load_in_4bit` does not quantise the modules `kept`, named as in the
    /// checkpoint.
    pub fn from_pretrained_keeping(
        dir: &Path,
        options: LoadOptions,
        kept: &BTreeSet<String>,
    ) -> Result<FastLanguageModel> {
        let config = Config::from_dir(dir)?;
        let tokenizer = load_tokenizer(&config, dir)?;
        if config.ignores_vision {
            tracing::warn!("{}: the vision tower is ignored, only the text model is loaded", dir.display());
        }
        let decoder = Decoder::load_keeping(config, &Weights::open(dir)?, options, kept)?;
        Ok(FastLanguageModel { decoder, tokenizer, dir: dir.to_path_buf(), adapter: None })
    }

    /// A model with random weights from the folder's config.json and tokenizer. The same seed gives the same weights.
    pub fn from_scratch(dir: &Path, kind: Kind, device: Device, seed: u64) -> Result<FastLanguageModel> {
        let config = Config::from_dir(dir)?;
        let tokenizer = load_tokenizer(&config, dir)?;
        let decoder = Decoder::random(config, LoadOptions::new(kind, device), seed)?;
        Ok(FastLanguageModel { decoder, tokenizer, dir: dir.to_path_buf(), adapter: None })
    }

    /// A model of any shape with random weights that the device draws itself, and no tokenizer: to measure with. The same
    /// seed gives the same weights on the same kind of device.
    pub fn untrained(config: Config, options: LoadOptions, seed: u64) -> Result<FastLanguageModel> {
        let decoder = Decoder::random_by(config, options, Generator::new(options.device, seed)?)?;
        Ok(FastLanguageModel { decoder, tokenizer: None, dir: PathBuf::new(), adapter: None })
    }

    /// The tokenizer of a model folder, before anything else of it is read.
    pub fn tokenizer_of(dir: &Path) -> Result<Tokenizer> {
        match load_tokenizer(&Config::from_dir(dir)?, dir)? {
            Some(tokenizer) => Ok(tokenizer),
            // The reason is the one that reading it gives.
            None => Tokenizer::from_dir(dir),
        }
    }

    /// The tokenizer; an error where the folder has none (token ids still work without).
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        match &self.tokenizer {
            Some(tokenizer) => Ok(tokenizer),
            // The reason is the one that reading it gives.
            None => bail!(
                Tokenizer::from_dir(&self.dir).err().unwrap_or_else(|| anyhow!("no tokenizer was loaded"))
            ),
        }
    }

    /// Takes another tokenizer: the model's own with another chat template, say.
    pub fn set_tokenizer(&mut self, tokenizer: Tokenizer) {
        self.tokenizer = Some(tokenizer);
    }

    /// Puts fresh LoRA on the modules that `config` targets and makes its `modules_to_save` trainable. The same seed gives
    /// the same start.
    pub fn get_peft_model(&mut self, config: AdapterConfig, seed: u64) -> Result<()> {
        if self.adapter.is_some() {
            bail!("the model already has an adapter");
        }
        config.check()?;
        let chosen = self.lora_modules(&config)?;
        self.decoder.add_lora(|module| chosen.get(module).copied(), config.init_lora_weights, seed)?;
        for module in config.modules_to_save.iter().flatten() {
            self.decoder.train_module(module)?;
        }
        self.adapter = Some(config.spelled_out(chosen.keys().map(String::as_str)));
        Ok(())
    }

    /// The LoRA that `config` asks for, by the names of the modules.
    fn lora_modules(&self, config: &AdapterConfig) -> Result<HashMap<String, LoraModule>> {
        let chosen = self.decoder.lora_modules(config)?;
        check_targets(&chosen, self.decoder.linear_modules().iter().map(|(module, ..)| module.as_str()))?;
        Ok(chosen)
    }

    /// Makes every weight trainable, in f32.
    pub fn train_all(&mut self) -> Result<()> {
        self.decoder.train_all()
    }

    /// Puts an adapter folder written by peft or by [`FastLanguageModel::save_trained`] on the model. A chat template beside
    /// the adapter is the one that it was trained with, and replaces the model's.
    pub fn load_adapter(&mut self, folder: &Path) -> Result<()> {
        let config = AdapterConfig::load(folder)?;
        self.get_peft_model(config, 0).with_context(|| format!("adapter {}", folder.display()))?;
        self.load_trained(folder)?;
        take_template(self.tokenizer.as_mut(), folder)
    }

    /// Writes what trains: the adapter in peft's format, or the whole model in f32.
    pub fn save_trained(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        match &self.adapter {
            Some(config) => {
                write_safetensors(&folder.join(ADAPTER_WEIGHTS), &self.decoder.adapter_state())?;
                config.save(folder)
            }
            None => self.save_pretrained(folder, Kind::Float),
        }
    }

    /// Reads what [`FastLanguageModel::save_trained`] wrote into the tensors in place.
    pub fn load_trained(&mut self, folder: &Path) -> Result<()> {
        if self.adapter.is_none() {
            if self.decoder.is_quantized() || self.decoder.is_fp8() {
                bail!("{}: whole weights cannot be read into a quantised model", folder.display());
            }
            let weights = Weights::open(folder)?;
            let _no_grad = tch::no_grad_guard();
            return self.decoder.each_weight(|name, tensor| weights.copy_into(name, tensor));
        }
        fill_adapter(folder, self.decoder.adapter_state())
    }

    /// Writes the whole model as a Hugging Face folder: weights in `kind`, also those that are in 4 bits here, config.json,
    /// tokenizer.
    pub fn save_pretrained(&self, folder: &Path, kind: Kind) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        write_safetensors(&folder.join(WEIGHTS), &self.decoder.state_dict(kind)?)?;
        for name in COMPANIONS {
            let from = self.dir.join(name);
            if from.is_file() {
                let mut bytes = fs::read(&from).with_context(|| format!("reading {}", from.display()))?;
                if self.decoder.is_quantized() && name == "config.json" {
                    let mut config: serde_json::Value = serde_json::from_slice(&bytes)?;
                    config.as_object_mut().map(|config| config.shift_remove("quantization_config"));
                    bytes = serde_json::to_vec_pretty(&config)?;
                }
                crate::io::write_atomically(&folder.join(name), &bytes)?;
            }
        }
        self.tokenizer.as_ref().map_or(Ok(()), |tokenizer| tokenizer.save(folder))
    }
}

/// Gives `tokenizer` the chat template in the folder of an adapter, if there is one.
pub(super) fn take_template(tokenizer: Option<&mut Tokenizer>, folder: &Path) -> Result<()> {
    let template = folder.join("chat_template.jinja");
    if let Some(tokenizer) = tokenizer.filter(|_| template.is_file()) {
        tokenizer.set_chat_template(ChatTemplate::from_file(&template)?);
    }
    Ok(())
}

/// The folder's tokenizer, if it has one. Every id that it can give must have a row in the embedding.
pub(super) fn load_tokenizer(config: &Config, dir: &Path) -> Result<Option<Tokenizer>> {
    if !dir.join("tokenizer.json").is_file() {
        return Ok(None);
    }
    let tokenizer = Tokenizer::from_dir(dir)?;
    let highest = i64::from(tokenizer.max_id());
    if highest >= config.vocab_size {
        bail!(
            "{}: the tokenizer gives ids up to {highest}, the model's vocab_size is {}: they do not belong together",
            dir.display(),
            config.vocab_size
        );
    }
    Ok(Some(tokenizer))
}
