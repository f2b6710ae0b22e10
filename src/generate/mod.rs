//! Text from a decoder: prefill, decode with a KV cache, choose tokens, stream text.
//!
//! [`generate`] does all of it for one prompt; [`Generator`] is the same as an iterator over tokens, on a [`Sequence`]
//! that can go on afterwards with its cache (a chat). [`FastLanguageModel`](crate::models::FastLanguageModel) adds the
//! tokenizer, the chat template and the defaults of `generation_config.json`.
//!
//! ```
//! use ferrotune::generate::{FinishReason, SamplingParams, generate};
//! use ferrotune::models::{Config, Decoder};
//!
//! # fn main() -> anyhow::Result<()> {
//! let config = Config::from_json(
//!     r#"{"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32,
//!         "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}"#,
//! )?;
//! let decoder = Decoder::random(config, tch::Kind::Float, tch::Device::Cpu)?;
//! let params = SamplingParams { temperature: 0.8, top_p: 0.9, max_new_tokens: 5, ..Default::default() };
//! let generation = generate(&decoder, None, &[1, 2, 3], &params, |_| ())?;
//! assert_eq!(generation.token_ids.len(), 5);
//! assert_eq!(generation.finish_reason, FinishReason::Length);
//! // The same seed gives the same tokens, whatever else the process did.
//! assert_eq!(generate(&decoder, None, &[1, 2, 3], &params, |_| ())?.token_ids, generation.token_ids);
//! # Ok(())
//! # }
//! ```

mod generator;
mod model;
mod params;
mod sampler;
mod sequence;
mod text_stream;

pub use generator::{FinishReason, Generation, Generator, Token, generate, generate_several};
pub use params::{GenerationConfig, SamplingParams};
pub use sampler::Sampler;
pub use sequence::Sequence;
pub use text_stream::TextStream;
