//! GGUF, version 3: the container of llama.cpp's models, and its quantised blocks.
//!
//! ```text
//! "GGUF"  u32 version  u64 tensors  u64 pairs
//! pairs:    string key, u32 type, value
//! tensors:  string name, u32 dims, u64 sizes[] (the innermost first), u32 type, u64 offset
//! padding to `general.alignment`, then the data; every tensor starts at a multiple of it
//! ```
//!
//! Little-endian; a string is a u64 length and UTF-8 bytes. Format: ggml's docs/gguf.md.

mod blocks;
mod dequantize;
mod k_quants;
mod lanes;
mod reader;
mod search;
mod types;
mod value;
mod writer;

pub use blocks::quantize_row;
pub use dequantize::dequantize_row;
pub use reader::Gguf;
pub use types::GgmlType;
pub use value::Value;
pub use writer::GgufWriter;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
const ALIGNMENT: u64 = 32;

/// A tensor's place in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    pub name: String,
    /// As in a checkpoint, the innermost last; the file has it the other way round.
    pub shape: Vec<i64>,
    pub kind: GgmlType,
    /// From the start of the data.
    pub offset: u64,
}

impl TensorInfo {
    pub fn numel(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// Elements of the innermost dimension.
    pub fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(1) as usize
    }

    pub fn bytes(&self) -> usize {
        self.kind.bytes(self.numel())
    }
}
