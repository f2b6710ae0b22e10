//! What of a decoder trains, under which name it is saved, and how LoRA gets into it.

use std::collections::{BTreeSet, HashMap};

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use super::decoder::{Decoder, DecoderLayer};
use crate::device::Generator;
use crate::error::Error;
use crate::io::adapter::{AdapterConfig, InitLoraWeights, text_module};
use crate::io::lora_spec::LoraSpec;
use crate::ops::{Head, Linear, Lora, LoraCasts, PartWeight, RmsNorm, Weight};

/// Which rule a parameter follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterRole {
    /// A matrix: weight decay applies.
    Matrix,
    /// A norm weight or a bias: no weight decay.
    Vector,
}

/// One trainable tensor.
#[derive(Debug)]
pub struct Parameter {
    /// Its name in the file it is saved to: peft's for LoRA and modules_to_save, else the checkpoint's. A fused tensor
    /// of several checkpoint entries has the names of all, joined by `+`.
    pub name: String,
    pub tensor: Tensor,
    pub role: ParameterRole,
}

/// What `modules_to_save` can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SavedModule {
    Embedding,
    Head,
}

impl SavedModule {
    /// Which one `module` is.
    ///
    /// # Errors
    /// It is none of these, or lies where it cannot train: in the host's memory, in 4 bits.
    pub fn named(module: &str, offloads_embedding: bool, nf4_head: bool) -> Result<SavedModule> {
        match module.rsplit('.').next() {
            Some("embed_tokens") if offloads_embedding => {
                Err(unsupported("training an embedding with offload_embedding", "it on the device"))
            }
            Some("embed_tokens") => Ok(SavedModule::Embedding),
            Some("lm_head") if nf4_head => {
                Err(unsupported("training a head with nf4_head", "one in 16 bits"))
            }
            Some("lm_head") => Ok(SavedModule::Head),
            _ => Err(unsupported(&format!("modules_to_save {module:?}"), "embed_tokens, lm_head")),
        }
    }
}

/// Refuses full fine-tuning of weights that cannot train.
pub fn check_trains_all(quantized: bool, offloads_embedding: bool) -> Result<()> {
    match () {
        () if quantized => Err(unsupported("full fine-tuning of a 4-bit model", "a LoRA adapter on it")),
        () if offloads_embedding => {
            Err(unsupported("full fine-tuning with offload_embedding", "a LoRA adapter"))
        }
        () => Ok(()),
    }
}

fn unsupported(what: &str, supported: &str) -> anyhow::Error {
    Error::Unsupported { what: what.to_string(), supported: supported.to_string() }.into()
}

/// What LoRA to put on one module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraModule {
    pub r: i64,
    /// `lora_alpha / r` or `lora_alpha / sqrt(r)`.
    pub scale: f64,
    pub dropout: f64,
}

/// The LoRA that `config` asks for, by the checkpoint's names of `modules`, which are given behind peft's.
pub(super) fn choose_lora(
    config: &AdapterConfig,
    modules: impl Iterator<Item = (String, String)>,
) -> Result<HashMap<String, LoraModule>> {
    let spec = LoraSpec::new(config)?;
    let mut chosen = HashMap::new();
    for (name, module) in modules {
        // A pattern may also have been written for the text model alone.
        let lora = match spec.for_module(&name)? {
            Some(lora) => Some(lora),
            None => spec.for_module(&text_module(&name))?,
        };
        if let Some(lora) = lora {
            let module_lora =
                LoraModule { r: i64::from(lora.r), scale: lora.scale, dropout: lora.lora_dropout };
            chosen.insert(module, module_lora);
        }
    }
    Ok(chosen)
}

/// Refuses an adapter that would be on nothing.
pub(super) fn check_targets<'a>(
    chosen: &HashMap<String, LoraModule>,
    modules: impl Iterator<Item = &'a str>,
) -> Result<()> {
    if chosen.is_empty() {
        let known: BTreeSet<&str> = modules.map(|name| name.rsplit('.').next().unwrap_or_default()).collect();
        bail!(
            "target_modules matches no layer of the model (linear layers: {})",
            known.into_iter().collect::<Vec<_>>().join(", ")
        );
    }
    Ok(())
}

impl Decoder {
    /// Names of all modules that can carry LoRA, with `(rows, in_features)`.
    pub fn linear_modules(&self) -> Vec<(String, i64, i64)> {
        self.linears()
            .flat_map(|linear| {
                linear.parts.iter().map(|part| (part.name.clone(), part.rows, linear.in_features()))
            })
            .collect()
    }

    /// Index of the layer that `module` belongs to.
    pub fn layer_of(&self, module: &str) -> Option<usize> {
        module.strip_prefix(&self.prefix)?.strip_prefix("layers.")?.split('.').next()?.parse().ok()
    }

    /// The LoRA that `config` asks for, by the names of the modules; none where it targets nothing that is here.
    pub(super) fn lora_modules(&self, config: &AdapterConfig) -> Result<HashMap<String, LoraModule>> {
        let modules = self.linear_modules().into_iter();
        choose_lora(config, modules.map(|(module, ..)| (self.peft_module(&module), module)))
    }

    /// Puts fresh LoRA (A random, B zero) on every module for which `choose` returns some. Returns how many it chose. The
    /// same seed gives the same start.
    pub fn add_lora(
        &mut self,
        choose: impl Fn(&str) -> Option<LoraModule>,
        init: InitLoraWeights,
        seed: u64,
    ) -> Result<usize> {
        let (device, generator) = (self.device, Generator::new(Device::Cpu, seed)?);
        let mut count = 0;
        for linear in self.linears_mut() {
            let in_features = linear.in_features();
            for part in &mut linear.parts {
                if let Some(LoraModule { r, scale, dropout }) = choose(&part.name) {
                    if r <= 0 {
                        bail!("LoRA rank of {} is {r}, expected at least 1", part.name);
                    }
                    let shape = [part.rows, in_features];
                    part.lora = Some(Lora::new(shape, r, (scale, dropout), init, &generator, device)?);
                    count += 1;
                }
            }
        }
        Ok(count)
    }

    /// Makes a trainable f32 copy of the embedding or the head, as peft's `modules_to_save` does.
    pub fn train_module(&mut self, module: &str) -> Result<()> {
        let trainable = |tensor: &Tensor| -> Result<Tensor> {
            Ok(tensor.f_to_dtype(Kind::Float, false, true)?.f_set_requires_grad(true)?)
        };
        let saved = SavedModule::named(module, self.offloads_embedding, self.nf4_head.is_some())?;
        self.unpack_head()?;
        match saved {
            SavedModule::Embedding => {
                // A tied head stays the original embedding, as in peft.
                if self.lm_head.is_none() && self.nf4_head.is_none() {
                    self.lm_head = Some(self.embed_tokens.shallow_clone());
                }
                self.embed_tokens = trainable(&self.embed_tokens)?;
            }
            SavedModule::Head => {
                if let Head::Dense(head) = self.head() {
                    self.lm_head = Some(trainable(head)?);
                }
            }
        }
        Ok(())
    }

    /// Makes every weight trainable, in f32: activations keep the decoder's dtype.
    pub fn train_all(&mut self) -> Result<()> {
        if self.is_fp8() {
            let what = "full fine-tuning of a model in fp8".to_string();
            return Err(Error::Unsupported { what, supported: "a LoRA adapter on it".to_string() }.into());
        }
        check_trains_all(self.is_quantized(), self.offloads_embedding)?;
        let trainable = |tensor: &mut Tensor| -> Result<()> {
            *tensor = tensor.f_to_kind(Kind::Float)?.f_set_requires_grad(true)?;
            Ok(())
        };
        self.unpack_head()?;
        trainable(&mut self.embed_tokens)?;
        trainable(&mut self.norm.weight)?;
        if let Some(head) = &mut self.lm_head {
            trainable(head)?;
        }
        for layer in &mut self.layers {
            for norm in layer.norms_mut() {
                trainable(&mut norm.weight)?;
            }
            for linear in layer.linears_mut() {
                if let Weight::Joined(weight) = &mut linear.weight {
                    trainable(weight)?;
                }
                if let Some(bias) = &mut linear.bias {
                    trainable(bias)?;
                }
            }
        }
        Ok(())
    }

    /// Every trainable tensor, in a fixed order.
    pub fn trainable(&self) -> Vec<Parameter> {
        let mut parameters = Vec::new();
        let mut add = |name: String, tensor: &Tensor| {
            if tensor.defined() && tensor.requires_grad() {
                let role = if tensor.dim() == 1 { ParameterRole::Vector } else { ParameterRole::Matrix };
                parameters.push(Parameter { name, tensor: tensor.shallow_clone(), role });
            }
        };
        add(format!("{}embed_tokens.weight", self.prefix), &self.embed_tokens);
        for layer in &self.layers {
            for norm in layer.norms() {
                add(norm.name.clone(), &norm.weight);
            }
            for linear in layer.linears() {
                let joined = |suffix: &str| {
                    let names: Vec<String> =
                        linear.parts.iter().map(|part| format!("{}.{suffix}", part.name)).collect();
                    names.join("+")
                };
                if let Weight::Joined(weight) = &linear.weight {
                    add(joined("weight"), weight);
                }
                if let Some(bias) = &linear.bias {
                    add(joined("bias"), bias);
                }
                for part in &linear.parts {
                    if let Some(lora) = &part.lora {
                        add(format!("base_model.model.{}.lora_A.weight", part.name), &lora.a);
                        add(format!("base_model.model.{}.lora_B.weight", part.name), &lora.b);
                    }
                }
            }
        }
        add(self.norm.name.clone(), &self.norm.weight);
        if let Some(head) = &self.lm_head {
            add("lm_head.weight".into(), head);
        }
        parameters
    }

    /// Room for LoRA in the decoder's dtype; none where LoRA has it already.
    pub fn lora_casts(&self) -> Result<Option<LoraCasts>> {
        LoraCasts::new(self.linears(), self.kind)
    }

    /// Whether some LoRA drops inputs in training.
    pub fn has_dropout(&self) -> bool {
        let mut loras = self.linears().flat_map(|linear| &linear.parts).filter_map(|part| part.lora.as_ref());
        loras.any(|lora| lora.dropout > 0.0)
    }

    /// Number of elements of all weights, LoRA apart; a tied head counts once.
    pub fn num_parameters(&self) -> i64 {
        let count = |tensor: &Tensor| tensor.numel() as i64;
        let layers = self.layers.iter().flat_map(DecoderLayer::norms).map(|norm| count(&norm.weight)).chain(
            self.linears().map(|linear| {
                let rows: i64 = linear.parts.iter().map(|part| part.rows).sum();
                rows * linear.in_features() + linear.bias.as_ref().map_or(0, count)
            }),
        );
        // A 4-bit copy of a tied embedding is no weight of its own.
        let in_4_bits = self.nf4_head.as_ref().filter(|_| !self.config.tie_word_embeddings);
        let packed = in_4_bits.map(|nf4| nf4.shape).or(self.bf12_head.as_ref().map(|bf12| bf12.shape));
        let head = self.lm_head.as_ref().map_or(0, count) + packed.map_or(0, |[rows, width]| rows * width);
        layers.sum::<i64>() + count(&self.embed_tokens) + count(&self.norm.weight) + head
    }

    /// Whether any projection, or the head, is in 4 bits.
    pub fn is_quantized(&self) -> bool {
        self.nf4_head.is_some() || self.linears().any(Linear::is_quantized)
    }

    /// Whether the projections are in e4m3.
    pub fn is_fp8(&self) -> bool {
        self.linears().any(|linear| matches!(linear.weight, Weight::Fp8(_)))
    }

    /// The name that `module` has in the model that transformers makes of the checkpoint, which is what peft sees: a
    /// checkpoint may hold another prefix, and transformers renames it.
    pub fn peft_module(&self, module: &str) -> String {
        match module.strip_prefix(&self.prefix) {
            Some(rest) if rest.starts_with("layers.") || rest.starts_with("embed_tokens") => {
                format!(
                    "{}{rest}",
                    if self.config.ignores_vision { "model.language_model." } else { "model." }
                )
            }
            _ => module.to_string(),
        }
    }

    /// The adapter under peft's names: LoRA matrices and the trained copies of `modules_to_save`.
    pub fn adapter_state(&self) -> Vec<(String, Tensor)> {
        let named = |parameter: Parameter| {
            let module = parameter.name.strip_prefix("base_model.model.").unwrap_or(&parameter.name);
            (format!("base_model.model.{}", self.peft_module(module)), parameter.tensor)
        };
        self.trainable().into_iter().map(named).collect()
    }

    /// Gives every weight under its checkpoint name, fused ones as views of their parts, to `visit`; quantised
    /// ones in the decoder's dtype, one at a time.
    pub fn each_weight(&self, mut visit: impl FnMut(&str, &Tensor) -> Result<()>) -> Result<()> {
        if self.embed_tokens.defined() {
            visit(&format!("{}embed_tokens.weight", self.prefix), &self.embed_tokens)?;
        }
        for layer in &self.layers {
            for norm in layer.norms() {
                visit(&norm.name, &norm.weight)?;
            }
            for linear in layer.linears() {
                for (index, (row, part)) in linear.rows().enumerate() {
                    let rows = |tensor: &Tensor| tensor.f_narrow(0, row, part.rows);
                    let weight = match &linear.weight {
                        Weight::Joined(weight) => rows(weight)?,
                        Weight::Fp8(fp8) => rows(&fp8.dequantize(self.kind)?)?,
                        Weight::Parts(weights) => match &weights[index] {
                            PartWeight::Dense(weight) => weight.shallow_clone(),
                            PartWeight::Nf4(nf4) => nf4.dequantize(self.kind)?,
                        },
                    };
                    visit(&format!("{}.weight", part.name), &weight)?;
                    if let Some(bias) = &linear.bias {
                        visit(&format!("{}.bias", part.name), &rows(bias)?)?;
                    }
                }
            }
        }
        visit(&self.norm.name, &self.norm.weight)?;
        match (self.head(), self.config.tie_word_embeddings) {
            (Head::Nf4(nf4), false) => visit("lm_head.weight", &nf4.dequantize(self.kind)?),
            // The embedding stands for both.
            (Head::Nf4(_), true) => Ok(()),
            (Head::Bf12(bf12), _) => visit("lm_head.weight", &bf12.unpack()?),
            (Head::Dense(_), _) => self.lm_head.as_ref().map_or(Ok(()), |head| visit("lm_head.weight", head)),
        }
    }

    /// The whole model under the checkpoint's names, in `kind`.
    pub fn state_dict(&self, kind: Kind) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = tch::no_grad_guard();
        let mut tensors = Vec::new();
        self.each_weight(|name, tensor| {
            tensors.push((name.to_string(), tensor.f_to_kind(kind)?));
            Ok(())
        })?;
        Ok(tensors)
    }

    /// What the checkpoint puts before `layers.0`.
    pub fn module_prefix(&self) -> &str {
        &self.prefix
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(DecoderLayer::linears)
    }

    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(DecoderLayer::linears_mut)
    }
}

impl DecoderLayer {
    pub(super) fn linears(&self) -> [&Linear; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    fn linears_mut(&mut self) -> [&mut Linear; 4] {
        [&mut self.qkv, &mut self.o, &mut self.gate_up, &mut self.down]
    }

    fn norms(&self) -> impl Iterator<Item = &RmsNorm> {
        let optional = [&self.q_norm, &self.k_norm, &self.post_attention_norm, &self.post_mlp_norm];
        [&self.input_norm, &self.mlp_norm].into_iter().chain(optional.into_iter().flatten())
    }

    fn norms_mut(&mut self) -> impl Iterator<Item = &mut RmsNorm> {
        let optional =
            [&mut self.q_norm, &mut self.k_norm, &mut self.post_attention_norm, &mut self.post_mlp_norm];
        [&mut self.input_norm, &mut self.mlp_norm].into_iter().chain(optional.into_iter().flatten())
    }
}
