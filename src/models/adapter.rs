//! LoRA adapters that stand beside the model: several in memory, chosen row by row.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use tch::{Device, Kind, Tensor};

use super::parameters::{check_targets, choose_lora};
use super::{FastLanguageModel, LoraModule};
use crate::error::Error;
use crate::io::Weights;
use crate::io::adapter::{ADAPTER_WEIGHTS, AdapterConfig, AdapterTensor};
use crate::ops::{Lora, LoraSet, Part};

/// An adapter's tensors, in the shape of the decoder it was loaded for.
#[derive(Debug)]
pub struct Adapter {
    pub config: AdapterConfig,
    lora: LoraSet,
    state: Vec<(String, Tensor)>,
}

impl Adapter {
    pub fn lora(&self) -> &LoraSet {
        &self.lora
    }

    /// The matrices by peft's names, in the model's dtype where that has 16 bits and else f32; they share the adapter's memory.
    pub fn tensors(&self) -> &[(String, Tensor)] {
        &self.state
    }

    /// Copies `value` over the matrix `name`.
    ///
    /// # Errors
    /// A name that the adapter does not have; another shape.
    pub fn set(&self, name: &str, value: &Tensor) -> Result<()> {
        let Some((_, tensor)) = self.state.iter().find(|(own, _)| own == name) else {
            bail!("the adapter has no tensor named {name}");
        };
        if tensor.size() != value.size() {
            bail!("tensor {name} has shape {:?}, expected {:?}", value.size(), tensor.size());
        }
        let _no_grad = tch::no_grad_guard();
        Ok(tensor.shallow_clone().f_copy_(value)?)
    }

    /// The same on another device.
    pub fn to_device(mut self, device: Device) -> Result<Adapter> {
        let matrices = self.lora.0.iter_mut().flatten().flatten().flat_map(|lora| [&mut lora.a, &mut lora.b]);
        // In the order that they were read in.
        for (matrix, (_, tensor)) in matrices.zip(&mut self.state) {
            *matrix = matrix.f_to_device(device)?;
            *tensor = matrix.shallow_clone();
        }
        Ok(self)
    }
}

/// Reads adapters for a model, without the model itself: any thread may have it.
#[derive(Debug, Clone)]
pub struct AdapterReader {
    kind: Kind,
    /// The parts of each linear layer, in the decoder's order.
    linears: Vec<Vec<Module>>,
}

#[derive(Debug, Clone)]
struct Module {
    name: String,
    peft_name: String,
    rows: i64,
    in_features: i64,
}

impl FastLanguageModel {
    /// For answers alone: the LoRA matrices take the dtype that products read them in, half of the memory where that has 16 bits, and train no
    /// more. No number changes: each is rounded once, here and not in every product. Of a model in 4 bits on a GPU an untied bf16 head is packed
    /// into 12 bits without loss ([`Bf12`](crate::ops::Bf12)): a quarter less for decoding to read, and logits that differ by rounding alone.
    pub fn for_inference(&mut self) -> Result<()> {
        let kind = kind_beside(self.decoder.decode_kind());
        let lora = self
            .decoder
            .linears_mut()
            .flat_map(|linear| &mut linear.parts)
            .filter_map(|part| part.lora.as_mut());
        for matrix in lora.flat_map(|lora| [&mut lora.a, &mut lora.b]) {
            *matrix = matrix.f_detach()?.f_to_kind(kind)?;
        }
        self.decoder.pack_head()
    }

    /// Reads an adapter folder written by peft or by [`FastLanguageModel::save_trained`]; the model stays as it is.
    ///
    /// # Errors
    /// An adapter of another model; one with `modules_to_save`, which is more than LoRA.
    pub fn read_adapter(&self, folder: &Path) -> Result<Adapter> {
        self.adapter_reader().read(folder, self.decoder.device)
    }

    /// What [`read_adapter`](FastLanguageModel::read_adapter) needs to know of the model.
    pub fn adapter_reader(&self) -> AdapterReader {
        let decoder = &self.decoder;
        let linears = decoder.linears().map(|linear| {
            let module = |part: &Part| Module {
                name: part.name.clone(),
                peft_name: decoder.peft_module(&part.name),
                rows: part.rows,
                in_features: linear.in_features(),
            };
            linear.parts.iter().map(module).collect()
        });
        AdapterReader { kind: kind_beside(decoder.decode_kind()), linears: linears.collect() }
    }
}

impl AdapterReader {
    /// As [`FastLanguageModel::read_adapter`], to `device`.
    pub fn read(&self, folder: &Path, device: Device) -> Result<Adapter> {
        self.read_folder(folder, device).with_context(|| format!("adapter {}", folder.display()))
    }

    fn read_folder(&self, folder: &Path, device: Device) -> Result<Adapter> {
        let config = AdapterConfig::load(folder)?;
        if let Some(module) = config.modules_to_save.iter().flatten().next() {
            let what = format!("modules_to_save {module:?} in an adapter beside others");
            return Err(Error::Unsupported { what, supported: "LoRA matrices".into() }.into());
        }
        let modules = || self.linears.iter().flatten();
        let names = modules().map(|module| (module.peft_name.clone(), module.name.clone()));
        let chosen = choose_lora(&config, names)?;
        check_targets(&chosen, modules().map(|module| module.name.as_str()))?;
        let mut state = Vec::new();
        let zeros = |shape: [i64; 2]| Tensor::f_zeros(shape, (self.kind, device));
        let mut lora = |module: &Module| -> Result<Option<Lora>> {
            let Some(&LoraModule { r, scale, .. }) = chosen.get(&module.name) else { return Ok(None) };
            let (a, b) = (zeros([r, module.in_features])?, zeros([module.rows, r])?);
            for (letter, tensor) in [("A", &a), ("B", &b)] {
                let name = format!("base_model.model.{}.lora_{letter}.weight", module.peft_name);
                state.push((name, tensor.shallow_clone()));
            }
            Ok(Some(Lora { a, b, scale, dropout: 0.0 }))
        };
        let linears = self.linears.iter().map(|parts| parts.iter().map(&mut lora).collect());
        let lora = LoraSet(linears.collect::<Result<_>>()?);
        fill_adapter(folder, state.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())))?;
        Ok(Adapter { config, lora, state })
    }
}

/// The dtype of LoRA matrices that do not train, beside rows of `kind`.
fn kind_beside(kind: Kind) -> Kind {
    if matches!(kind, Kind::BFloat16 | Kind::Half) { kind } else { Kind::Float }
}

/// Reads the weights of an adapter folder into `state`, tensors under peft's names.
///
/// # Errors
/// A tensor that the file lacks, or one that belongs to no module.
pub(super) fn fill_adapter(folder: &Path, state: impl IntoIterator<Item = (String, Tensor)>) -> Result<()> {
    let weights = open_adapter(folder)?;
    match fill(&weights, state)?.first() {
        Some(name) => Err(no_module(&weights, name)),
        None => Ok(()),
    }
}

pub(super) fn open_adapter(folder: &Path) -> Result<Weights> {
    let path = folder.join(ADAPTER_WEIGHTS);
    if !path.is_file() {
        bail!("{}: there is no {ADAPTER_WEIGHTS} in this adapter folder", folder.display());
    }
    Weights::open_files(&[path])
}

pub(super) fn no_module(weights: &Weights, name: &str) -> anyhow::Error {
    let file = weights.file(name).unwrap_or_default();
    anyhow!("{file}: tensor {name} belongs to no module that adapter_config.json targets")
}

/// Reads `state`, tensors under peft's names, and returns the names of the tensors that stand for none of it.
///
/// # Errors
/// A tensor that the file lacks.
pub(super) fn fill(
    weights: &Weights,
    state: impl IntoIterator<Item = (String, Tensor)>,
) -> Result<BTreeSet<String>> {
    // Vision-language checkpoints name the same module in several ways: compare by the text model's names.
    let mut ours: HashMap<(String, AdapterTensor), Tensor> = HashMap::new();
    for (name, tensor) in state {
        if let Some(key) = AdapterTensor::parse(&name) {
            ours.insert(key, tensor);
        }
    }
    let _no_grad = tch::no_grad_guard();
    let mut others = BTreeSet::new();
    for name in weights.names() {
        match AdapterTensor::parse(name).and_then(|key| ours.remove(&key)) {
            Some(tensor) => weights.copy_into(name, &tensor)?,
            None => {
                others.insert(name.to_string());
            }
        }
    }
    match ours.keys().min() {
        Some((module, tensor)) => {
            let name = tensor.key(module);
            bail!(Error::MissingTensor { file: weights.first_file(), name })
        }
        None => Ok(others),
    }
}
