//! How llama.cpp names what a checkpoint holds: architectures, tensors and hyper-parameters, both ways.

mod load;
mod metadata;
mod tensors;

pub(super) use load::{gguf_config, gguf_decoder};
pub use metadata::{metadata, metadata_architecture};
pub use tensors::{Change, GgufTensor, gguf_tensors, rope_tensors};
