//! A decoder that gives a text one number: reward models as transformers' `*ForSequenceClassification` saves them.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{Config, Decoder, Input};
use crate::io::Weights;
use crate::ops::Pass;

/// The head of the classifier, beside the decoder's own tensors.
const SCORE: &str = "score.weight";

/// A decoder and one row for its last hidden state.
pub struct SequenceClassifier {
    pub decoder: Decoder,
    /// `[1, C]`.
    score: Tensor,
    pad_token_id: Option<i64>,
}

impl SequenceClassifier {
    /// Loads a checkpoint folder of any architecture that [`Decoder`] knows.
    ///
    /// # Errors
    /// No `score.weight`, or one of more than one row.
    pub fn from_pretrained(dir: &Path, kind: Kind, device: Device) -> Result<SequenceClassifier> {
        let mut config = Config::from_dir(dir)?;
        let pad_token_id = pad_token_id(dir)?;
        let weights = Weights::open(dir)?;
        weights.expect_shape(SCORE, &[1, config.hidden_size])?;
        // It has no head over the vocabulary: the embedding stands there, unused.
        config.tie_word_embeddings = true;
        let decoder = Decoder::load(config, &weights, kind, device)?;
        let score = weights.get(SCORE)?.f_to_device(device)?.f_to_kind(kind)?;
        Ok(SequenceClassifier { decoder, score, pad_token_id })
    }

    /// `score h`, with h the last hidden state, of the last token that is not the padding token.
    pub fn score(&self, input_ids: &[i64]) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        // As transformers does, also where a text ends with that token.
        let pooled = input_ids.iter().rposition(|&id| Some(id) != self.pad_token_id).unwrap_or(0);
        let n = pooled + 1;
        if input_ids.is_empty() {
            bail!("a text of no tokens has no score");
        }
        let positions: Vec<i64> = (0..n as i64).collect();
        let input = Input {
            input_ids: &input_ids[..n],
            position_ids: &positions,
            cu_seqlens: &[0, n as i32],
            prefixes: &[],
        };
        let hidden = self.decoder.hidden(input, Pass::INFERENCE)?;
        let last = hidden.f_narrow(0, pooled as i64, 1)?;
        Ok(last.f_matmul(&self.score.f_transpose(0, 1)?)?.f_to_kind(Kind::Double)?.f_double_value(&[0, 0])?)
    }
}

/// That of config.json, or of the text model's part of it.
fn pad_token_id(dir: &Path) -> Result<Option<i64>> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let json: Value = serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?;
    Ok(json["pad_token_id"].as_i64().or(json["text_config"]["pad_token_id"].as_i64()))
}
