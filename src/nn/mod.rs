//! The pieces a decoder is made of: projections and their LoRA, rotary embedding, paged keys and values.

mod kv_pages;
mod linear;
mod nf4;
mod rope;

pub use kv_pages::{KvPages, PAGE_SIZE};
pub use linear::{Init, LoadOptions, Loader};
pub use nf4::{dequantize_stored, quantize_stored};
pub use rope::{Rope, RopeScaling, RopeTables};
