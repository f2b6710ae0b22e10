//! Records -> chat template -> label mask -> tokens -> packed batches. No tensors, no model knowledge.

mod python;
mod template;
mod tokenizer;

pub use template::{ChatTemplate, RenderOptions, Rendered};
pub use tokenizer::{SpecialToken, Tokenizer};
