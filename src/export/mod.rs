//! Models in the formats that other programs read.

mod quantize;

pub use quantize::{Quantized, quantize};
