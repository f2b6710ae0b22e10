//! Models as GGUF files for llama.cpp and what is built on it.

mod lora;
mod mixture;
mod write;

pub use lora::write_gguf_lora;
pub use mixture::Quantization;
pub use write::{GgufFile, write_gguf};
