//! The flags that say how an answer is written.

use anyhow::Result;
use clap::Args;

use crate::error::Error;
use crate::generate::SamplingParams;
use crate::models::FastLanguageModel;

/// How tokens are chosen and what ends an answer. What is not given is as the model's generation_config.json says, or
/// else greedy.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Sampling [defaults: the model's generation_config.json, or else greedy]")]
pub struct SamplingArgs {
    /// 0 always takes the likeliest token, 1 samples as the model predicts; more is wilder
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// Sample from the K likeliest tokens only; 0 turns it off
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Sample from the likeliest tokens that together have this probability; 1 turns it off
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Sample only tokens at least P times as likely as the likeliest; 0 turns it off
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f64>,
    /// Make tokens less likely that occurred already; 1 turns it off, 1.1 is gentle
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f64>,
    /// Make tokens less likely that the answer contains; 0 turns it off
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub presence_penalty: Option<f64>,
    /// Make tokens less likely for each time that the answer contains them; 0 turns it off
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f64>,
    /// End an answer where this text would begin (may be repeated)
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Longest answer in tokens
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<usize>,
    /// The same seed gives the same answer [default: another one each time]
    #[arg(long, allow_negative_numbers = true)]
    pub seed: Option<u64>,
}

impl SamplingArgs {
    /// The flags over what the model suggests. `max_new_tokens` is the command's own default, for models that suggest
    /// none.
    pub fn params(&self, model: &FastLanguageModel, max_new_tokens: usize) -> Result<SamplingParams> {
        let suggested = model.generation_params()?;
        let filters =
            self.top_k.is_some_and(|k| k > 0) || self.top_p.is_some_and(|p| p < 1.0) || self.min_p.is_some();
        let temperature = match self.temperature {
            Some(given) => given,
            // Who asks for a filter wants to sample.
            None if suggested.temperature == 0.0 && filters => 1.0,
            None => suggested.temperature,
        };
        let params = SamplingParams {
            temperature,
            top_k: self.top_k.unwrap_or(suggested.top_k),
            top_p: self.top_p.unwrap_or(suggested.top_p),
            min_p: self.min_p.unwrap_or(suggested.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(suggested.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(suggested.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(suggested.frequency_penalty),
            max_new_tokens: self.max_new_tokens.unwrap_or(max_new_tokens),
            stop: self.stop.clone(),
            seed: self.seed.unwrap_or_else(rand::random),
            stop_token_ids: suggested.stop_token_ids,
            logprobs: None,
        };
        params.check().map_err(|error| {
            // It begins with the name.
            let message = format!("{error:#}");
            let (name, rest) = message.split_once(' ').unwrap_or((&message, ""));
            Error::Usage(format!("--{} {rest}", name.replace('_', "-")))
        })?;
        Ok(params)
    }
}
