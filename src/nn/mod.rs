//! The pieces a decoder is made of: projections and their LoRA, rotary embedding, KV cache.

mod kv_cache;
mod linear;
mod nf4;
mod rope;

pub use kv_cache::KvCache;
pub use linear::{Init, LoadOptions, Loader};
pub use nf4::{dequantize_stored, quantize_stored};
pub use rope::{Rope, RopeScaling};
