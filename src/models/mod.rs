//! Decoders of Hugging Face checkpoints: one [`Decoder`], many descriptions.

mod adapter;
pub mod config;
mod decode;
mod decoder;
mod device_batch;
mod fast_language_model;
mod gemma;
mod gguf;
mod head;
mod llama;
mod mistral;
mod non_finite;
mod parameters;
mod phi3;
mod qwen;
mod sensitivity;
mod sequence_classifier;
mod streamed;

use anyhow::Result;

pub use adapter::{Adapter, AdapterReader};
pub use config::{Config, LayerConfig};
pub use decode::{DeviceRows, NewRows};
pub use decoder::{Decoder, Input, check_embeddings, prefix_of, projections};
pub use device_batch::{BatchShape, DeviceBatch, DeviceInput};
pub use fast_language_model::FastLanguageModel;
pub use gguf::{
    Change, GgufTensor, gguf_tensors, metadata as gguf_metadata, metadata_architecture, rope_tensors,
};
pub use parameters::{LoraModule, Parameter, ParameterRole, SavedModule, check_trains_all};
pub use sensitivity::{ModuleSensitivity, Nf4Sensitivity};
pub use sequence_classifier::SequenceClassifier;
pub use streamed::StreamedModel;

/// A row a `model_type`: how its config.json is read.
pub struct Architecture {
    pub model_type: &'static str,
    config: fn(&config::Json) -> Result<Config>,
}

/// Every supported `model_type`.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "llama", config: llama::config },
    Architecture { model_type: "mistral", config: mistral::config },
    Architecture { model_type: "qwen2", config: qwen::qwen2 },
    Architecture { model_type: "qwen3", config: qwen::qwen3 },
    Architecture { model_type: "phi3", config: phi3::config },
    Architecture { model_type: "gemma2", config: gemma::gemma2 },
    Architecture { model_type: "gemma3_text", config: gemma::gemma3 },
    Architecture { model_type: "gemma3", config: gemma::gemma3_multimodal },
];
