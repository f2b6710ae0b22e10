//! The flags that every command which runs a model has, and what they load.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use tch::{Device, Kind};

use super::quant_args::QuantArgs;
use super::sources;
use crate::device;
use crate::models::{Config, FastLanguageModel};
use crate::nn::LoadOptions;
use crate::train::Dtype;

/// Which model, on what.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Checkpoint to run: a directory, a Hugging Face hub id or a GGUF file
    #[arg(long, value_name = "DIR|ID|FILE")]
    pub model: String,
    /// LoRA adapter on it: a directory as peft or `ferrotune train` writes it, or a hub id
    #[arg(long, value_name = "DIR|ID")]
    pub adapter: Option<String>,
    /// Branch, tag or commit of a hub model
    #[arg(long)]
    pub revision: Option<String>,
    /// Quantise the weights of the layers to 4 bits (NF4) while they load; a checkpoint in 4 bits needs no flag
    #[arg(long)]
    pub load_in_4bit: bool,
    #[command(flatten)]
    pub quant: QuantArgs,
    /// Leave the embedding in the host's memory
    #[arg(long)]
    pub offload_embedding: bool,
    /// Quantise the head to 4 bits (NF4); of a model whose head is its embedding, a copy of it
    #[arg(long)]
    pub nf4_head: bool,
    /// Type of weights and activations
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// What a command runs on.
#[derive(Args, Debug, Clone)]
pub struct MachineArgs {
    /// auto (a GPU when there is one), cpu, cuda, cuda:1, ..
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl MachineArgs {
    /// The device, ready for use, and libtorch's ops on that many threads.
    pub fn init(&self) -> Result<Device> {
        let device = init_device(&self.device)?;
        if let Some(threads) = self.threads {
            tch::set_num_threads(threads.max(1) as i32);
        }
        Ok(device)
    }
}

/// The kernel library that `FERROTUNE_KERNELS` names, for one that lies in an unusual place.
pub(super) fn kernel_library() -> Option<PathBuf> {
    std::env::var_os("FERROTUNE_KERNELS").map(PathBuf::from)
}

/// The device of `--device`, ready for use.
pub(super) fn init_device(name: &str) -> Result<Device> {
    device::init(name.parse().context("--device")?, kernel_library().as_deref())
}

/// The type that `--dtype` means on `device`, for a model that f16 suits or not.
pub(super) fn kind_of(dtype: Dtype, device: Device, overflows_f16: bool) -> Kind {
    match dtype {
        Dtype::Auto if device.is_cuda() && device::supports_bf16(device) => Kind::BFloat16,
        Dtype::Auto if device.is_cuda() && !overflows_f16 => Kind::Half,
        Dtype::Auto | Dtype::F32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
    }
}

/// Whether the model in `folder` overflows f16.
pub(super) fn overflows_f16(folder: &Path) -> Result<bool> {
    Ok(Config::from_dir(folder)?.overflows_f16())
}

/// The word for it.
pub(super) fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "f16",
        _ => "f32",
    }
}

/// Whether `--model` names a GGUF file.
fn is_gguf(model: &str) -> bool {
    let path = Path::new(model);
    path.is_file() && path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"))
}

impl ModelArgs {
    /// Loads the model and its adapter; `auto` is what `--dtype auto` means, if not what suits the device.
    pub fn load(&self, auto: Option<Kind>) -> Result<FastLanguageModel> {
        let device = self.machine.init()?;
        if is_gguf(&self.model) {
            return self.load_gguf(device, auto);
        }
        let folder = sources::model_dir(&self.model, self.revision.as_deref()).context("--model")?;
        let kind = match (self.dtype, auto) {
            (Dtype::Auto, Some(kind)) => kind,
            (dtype, _) => kind_of(dtype, device, overflows_f16(&folder).context("--model")?),
        };
        let options = LoadOptions {
            load_in_4bit: self.load_in_4bit,
            offload_embedding: self.offload_embedding,
            nf4_head: self.nf4_head,
            ..LoadOptions::new(kind, device)
        };
        let plan = self.quant.plan_to_load(&folder, options)?;
        let kept = plan.map(|plan| plan.kept()).unwrap_or_default();
        let mut model =
            FastLanguageModel::from_pretrained_keeping(&folder, options, &kept).context("--model")?;
        self.add_adapter(&mut model)?;
        Ok(model)
    }

    /// A GGUF file, dequantised to the dtype it runs in.
    fn load_gguf(&self, device: Device, auto: Option<Kind>) -> Result<FastLanguageModel> {
        let kind = match (self.dtype, auto) {
            (Dtype::Auto, Some(kind)) => kind,
            // Never f16 unasked: the file does not say whether the model bears it.
            (dtype, _) => kind_of(dtype, device, true),
        };
        let options = LoadOptions {
            load_in_4bit: self.load_in_4bit,
            offload_embedding: self.offload_embedding,
            nf4_head: self.nf4_head,
            ..LoadOptions::new(kind, device)
        };
        let mut model = FastLanguageModel::from_gguf(Path::new(&self.model), options).context("--model")?;
        self.add_adapter(&mut model)?;
        Ok(model)
    }

    fn add_adapter(&self, model: &mut FastLanguageModel) -> Result<()> {
        match &self.adapter {
            Some(adapter) => sources::model_dir(adapter, None)
                .and_then(|folder| model.load_adapter(&folder))
                .context("--adapter"),
            None => Ok(()),
        }
    }
}
