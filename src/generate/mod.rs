//! Text from a decoder: many requests at once, each token chosen by its request's own parameters.
//!
//! [`Engine`] is the whole of it; [`generate`] runs one prompt to its end and [`TokenStream`] shows its tokens as they come.
//! [`FastLanguageModel`](crate::models::FastLanguageModel) adds the tokenizer, the chat template and the defaults of
//! `generation_config.json`.
//!
//! ```
//! use ferrotune::generate::{FinishReason, SamplingParams, generate};
//! use ferrotune::models::{Config, Decoder};
//! use ferrotune::nn::LoadOptions;
//!
//! # fn main() -> anyhow::Result<()> {
//! let config = Config::from_json(
//!     r#"{"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32,
//!         "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}"#,
//! )?;
//! let decoder = Decoder::random(config, LoadOptions::new(tch::Kind::Float, tch::Device::Cpu), 3407)?;
//! let params = SamplingParams { temperature: 0.8, top_p: 0.9, max_new_tokens: 5, ..Default::default() };
//! let generation = generate(&decoder, &[1, 2, 3], &params)?;
//! assert_eq!(generation.token_ids.len(), 5);
//! assert_eq!(generation.finish_reason, FinishReason::Length);
//! // The same seed gives the same tokens, whatever else the process did.
//! assert_eq!(generate(&decoder, &[1, 2, 3], &params)?.token_ids, generation.token_ids);
//! # Ok(())
//! # }
//! ```

mod ahead;
mod engine;
mod grammar;
mod graphs;
mod model;
mod pages;
mod params;
mod request;
mod run;
mod sampler;
mod sequence;
mod step;
mod text_stream;

pub use engine::{Engine, EngineOptions, EngineStats, KvBudget, pages_of_samples};
pub use grammar::{Grammar, Grammars};
pub use graphs::recorded_rows;
pub use params::{GenerationConfig, SamplingParams};
pub use request::{
    Event, EventKind, FinishReason, Generation, Logprobs, ModelRef, Request, RequestId, Token,
};
pub use run::{TokenStream, generate};
pub use sampler::{Sampler, logprobs};
pub use step::MOST_PROMPT_ROWS;
pub use text_stream::TextStream;
