//! Bytes in and out: checkpoints, configuration, downloads. No model knowledge.

mod atomic;
mod mmap;
mod weights;

pub use atomic::{write_atomically, write_atomically_with};
pub use weights::{Weights, write_safetensors};
