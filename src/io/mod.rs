//! Bytes in and out: checkpoints, configuration, downloads. No model knowledge.

pub mod adapter;
mod atomic;
pub mod hub;
pub mod lora_spec;
mod mmap;
mod weights;

pub use atomic::{is_unfinished, write_atomically, write_atomically_with};
pub use weights::{Weights, write_safetensors};
