//! Bytes in and out: checkpoints, configuration, downloads. No model knowledge.

pub mod adapter;
mod atomic;
mod mmap;
mod weights;
pub mod lora_spec;

pub use atomic::{write_atomically, write_atomically_with};
pub use weights::{Weights, write_safetensors};
