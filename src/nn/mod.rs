//! The pieces a decoder is made of: projections and their LoRA, rotary embedding, KV cache.

mod kv_cache;
mod linear;
mod rope;

pub use kv_cache::KvCache;
pub use linear::{Init, Loader};
pub use rope::{Rope, RopeScaling};
