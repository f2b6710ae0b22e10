//! Models as rewards.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use tch::{CModule, Device, IValue, Kind, Tensor};

use super::{Reward, Sample};
use crate::data::{RenderOptions, Tokenizer};
use crate::device;
use crate::models::SequenceClassifier;

/// The tokens of prompt and completion: a conversation through the chat template, with the completion as the assistant's last
/// turn; a text with the completion behind it, no special tokens added (as TRL).
fn tokens(tokenizer: &Tokenizer, sample: &Sample) -> Result<Vec<i64>> {
    let text = match sample.prompt {
        Value::String(prompt) => format!("{prompt}{}", sample.completion),
        Value::Array(messages) => {
            let template = tokenizer.chat_template().with_context(|| {
                format!("{} has no chat template for a conversation", tokenizer.dir().display())
            })?;
            let mut messages = messages.clone();
            messages.push(json!({"role": "assistant", "content": sample.completion}));
            template.render(&messages, &RenderOptions::default())?
        }
        _ => bail!("the prompt is neither a string nor a list of messages"),
    };
    Ok(tokenizer.encode(&text, false)?.into_iter().map(i64::from).collect())
}

/// A checkpoint of transformers' `LlamaForSequenceClassification`, `Qwen2ForSequenceClassification` and the like, with one label:
/// its logit.
pub struct RewardModel {
    model: SequenceClassifier,
    tokenizer: Tokenizer,
}

impl RewardModel {
    /// Loads the folder: weights, config.json, tokenizer, chat template.
    pub fn from_pretrained(dir: &Path, kind: Kind, device: Device) -> Result<RewardModel> {
        let model = SequenceClassifier::from_pretrained(dir, kind, device)?;
        Ok(RewardModel { model, tokenizer: Tokenizer::from_dir(dir)? })
    }
}

impl Reward for RewardModel {
    fn name(&self) -> &str {
        "reward_model"
    }

    fn score(&mut self, samples: &[Sample]) -> Vec<Result<Option<f64>>> {
        let judge = |sample: &Sample| self.model.score(&tokens(&self.tokenizer, sample)?);
        samples.iter().map(|sample| judge(sample).map(Some)).collect()
    }
}

/// A TorchScript module `forward(input_ids, attention_mask)`, both int64 `[1, T]`: a tensor of one element, or a tuple that begins
/// with one, as traced models of transformers give it.
pub struct TorchScriptReward {
    module: CModule,
    device: Device,
    tokenizer: Tokenizer,
}

impl TorchScriptReward {
    /// Loads `path`. `tokenizer` makes its tokens, if no tokenizer.json stands beside it.
    pub fn load(path: &Path, device: Device, tokenizer: &Tokenizer) -> Result<TorchScriptReward> {
        let module = CModule::load_on_device(path, device)
            .with_context(|| format!("{}: not a TorchScript module", path.display()))?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let tokenizer = match folder.join("tokenizer.json").is_file() {
            true => Tokenizer::from_dir(folder)?,
            false => tokenizer.clone(),
        };
        Ok(TorchScriptReward { module, device, tokenizer })
    }

    fn judge(&self, sample: &Sample) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let input_ids = device::upload(&tokens(&self.tokenizer, sample)?, self.device)?.f_unsqueeze(0)?;
        let attention_mask = input_ids.f_ones_like()?;
        let output = self
            .module
            .forward_is(&[IValue::Tensor(input_ids), IValue::Tensor(attention_mask)])
            .map_err(|error| anyhow!("{}", without_backtrace(&error.to_string())))?;
        let output = first_tensor(output)?;
        ensure!(output.numel() == 1, "the module gave {:?} numbers, expected one", output.size());
        Ok(output.f_to_kind(Kind::Double)?.f_view([1])?.f_double_value(&[0])?)
    }
}

/// What libtorch says, without where in its own code.
fn without_backtrace(error: &str) -> &str {
    let end = ["\nException raised from", "\nframe #"].iter().filter_map(|mark| error.find(mark)).min();
    error[..end.unwrap_or(error.len())].trim()
}

fn first_tensor(output: IValue) -> Result<Tensor> {
    match output {
        IValue::Tensor(tensor) => Ok(tensor),
        IValue::Tuple(parts) => {
            first_tensor(parts.into_iter().next().context("the module gave an empty tuple")?)
        }
        _ => bail!("the module gave neither a tensor nor a tuple of them"),
    }
}

impl Reward for TorchScriptReward {
    fn name(&self) -> &str {
        "reward_model"
    }

    fn score(&mut self, samples: &[Sample]) -> Vec<Result<Option<f64>>> {
        samples.iter().map(|sample| self.judge(sample).map(Some)).collect()
    }
}
