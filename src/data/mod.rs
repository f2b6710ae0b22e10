//! Records -> chat template -> label mask -> tokens -> packed batches. No tensors, no model knowledge.
//!
//! [`prepare`] reads files into a [`TokenDataset`]: [`Records`] gives rows, [`RowOptions`] understands their columns,
//! the [`Tokenizer`] and its [`ChatTemplate`] make tokens and label masks of them. [`BatchStream`] then gives a
//! [`Batch`] after another, shuffled and packed, from any [`Cursor`] on.

mod batch;
mod byte_bpe;
mod chunks;
mod column_types;
mod documents;
mod encode;
mod example_template;
mod fingerprint;
mod format;
mod gguf_tokenizer;
mod histogram;
mod images;
mod inspect;
mod json;
mod lint;
mod minhash;
mod named_templates;
mod numpy_rng;
mod order;
mod panics;
mod parallel;
mod parquet;
mod parquet_write;
mod pdf;
mod preference;
mod prepare;
mod preview;
pub mod problems;
mod python;
mod records;
mod responses;
mod select;
mod share_gpt;
mod standardize;
mod stream;
mod template;
mod token_bytes;
mod token_cache;
mod tokenizer;
mod tokens;
mod turns;
mod write;

pub use batch::{Batch, BatchOptions, BatchStream, Cursor, IGNORE_INDEX};
pub use chunks::{ChunkOptions, chunks};
pub use documents::{DOCUMENT_ENDINGS, read_document};
pub use example_template::ExampleTemplate;
pub use format::{Conversation, DatasetFormat, Example, RowOptions};
pub use histogram::{Bin, Histogram};
pub use images::{ImageInfo, ImageSource, images};
pub use inspect::{Inspection, TokenCounts, inspect};
pub use lint::{Finding, Lint, LintCounts, LintOptions, LintedRow, Rule};
pub use minhash::{NearDuplicates, Signature};
pub use named_templates::{NAMED_TEMPLATES, NamedTemplate};
pub(crate) use order::shuffle;
pub use preference::{Preference, PreferenceKind, PreferenceOptions, prepare_preferences};
pub use prepare::{DatasetOptions, DatasetReport, prepare, prepare_with};
pub use preview::{PreviewSpan, preview};
pub use records::{BrokenRow, Place, Record, Records, Row, data_files, is_data_file};
pub use responses::ResponseMarkers;
pub use select::{Dedup, Mix, StoppingStrategy, held_out, sample_rows, split_rows};
pub use share_gpt::{MergedPrompt, ShareGptOptions, to_sharegpt};
pub use standardize::{RoleAliases, standardize_sharegpt, to_messages};
pub use stream::{RowCursor, RowStream, StreamOptions};
pub use template::{ChatTemplate, RenderOptions, Rendered};
pub use token_bytes::TokenBytes;
pub use token_cache::TokenCache;
pub use tokenizer::{Offsets, SpecialToken, Tokenizer};
pub use tokens::TokenDataset;
pub use turns::end_of_turn;
pub use write::{output_format, write_rows};
