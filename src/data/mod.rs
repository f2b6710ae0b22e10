//! Records -> chat template -> label mask -> tokens -> packed batches. No tensors, no model knowledge.
//!
//! [`prepare`] reads files into a [`TokenDataset`]: [`Records`] gives rows, [`RowOptions`] understands their columns,
//! the [`Tokenizer`] and its [`ChatTemplate`] make tokens and label masks of them. [`BatchStream`] then gives a
//! [`Batch`] after another, shuffled and packed, from any [`Cursor`] on.

mod batch;
mod encode;
mod format;
mod gguf_tokenizer;
mod named_templates;
mod order;
mod parquet;
mod prepare;
mod preview;
pub mod problems;
mod python;
mod records;
mod template;
mod tokenizer;
mod tokens;
mod turns;

pub use batch::{Batch, BatchOptions, BatchStream, Cursor, IGNORE_INDEX};
pub use format::{Conversation, DatasetFormat, Example, RowOptions};
pub use named_templates::{NAMED_TEMPLATES, NamedTemplate};
pub use prepare::{DatasetOptions, DatasetReport, prepare};
pub use preview::{PreviewSpan, preview};
pub use records::{Place, Record, Records, Row};
pub use template::{ChatTemplate, RenderOptions, Rendered};
pub use tokenizer::{Offsets, SpecialToken, Tokenizer};
pub use tokens::TokenDataset;
pub use turns::end_of_turn;
