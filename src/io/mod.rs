//! Bytes in and out: checkpoints, configuration, downloads. No model knowledge.

pub mod adapter;
mod atomic;
pub mod gguf;
pub mod hub;
pub mod lora_spec;
mod mmap;
mod quant_state;
mod tensor_file;
mod weights;

pub(crate) use mmap::Mmap;

pub use atomic::{
    check_free_space, is_unfinished, write_atomically, write_atomically_with, write_folder_atomically,
};
pub use quant_state::{NF4, QuantKeys, QuantState};
pub use tensor_file::{Filling, TensorFile};
pub use weights::{Weights, write_safetensors};
