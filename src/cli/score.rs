//! `ferrotune score`: how likely a model finds a text, token by token.

use std::io::{Write, stdout};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;
use tch::Kind;

use super::model_args::ModelArgs;

/// Prints the log-probability of every token after the first, given those before it, as one line of JSON:
/// {"input_ids": [..], "logprobs": [..]}
///
/// Computed in f32 unless --dtype says otherwise.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  ferrotune score --model DIR --text 'Once upon a time'")]
pub struct ScoreArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to score, with the special tokens that the tokenizer adds; no chat template is applied
    #[arg(long, value_name = "TEXT", required_unless_present = "input_ids", conflicts_with = "input_ids")]
    pub text: Option<String>,
    /// Token ids to score, a JSON list; needs no tokenizer
    #[arg(long, value_name = "JSON")]
    pub input_ids: Option<String>,
}

/// Runs what the flags ask for.
pub fn run(args: ScoreArgs) -> Result<()> {
    let given: Option<Vec<i64>> = match &args.input_ids {
        Some(text) => Some(serde_json::from_str(text).with_context(|| {
            format!("--input-ids: {text:?} is not a JSON list of token ids such as [1, 2, 3]")
        })?),
        None => None,
    };
    let model = args.model.load(Some(Kind::Float))?;
    let input_ids = match (given, &args.text) {
        (Some(ids), _) => ids,
        (None, text) => model.prompt_ids(text.as_deref().unwrap_or_default())?,
    };
    if input_ids.is_empty() {
        bail!("--input-ids: the list is empty, there is nothing to score");
    }
    let logprobs: Vec<f32> = (&model.decoder.log_probs(&input_ids)?).try_into()?;
    writeln!(stdout(), "{}", json!({"input_ids": input_ids, "logprobs": logprobs}))
        .context("writing to stdout")
}
