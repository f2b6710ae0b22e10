//! Whether an exported file is the model that was trained: the same prompts through both.
//!
//! Of each position t of each prompt, with p and q the next-token distributions of the trained and the exported model:
//!
//! ```text
//! KL = mean_t sum_v p_v (log p_v - log q_v)      (nats a token, f64)
//! ```

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::{Kind, Tensor};

use super::dynamic::CALIBRATION_TEXT;
use crate::data::{RenderOptions, Tokenizer, end_of_turn};
use crate::models::StreamedModel;

/// Stands beside what was exported.
pub const EXPORT_REPORT: &str = "export_report.json";
const PROMPTS: usize = 8;
const TOKENS: usize = 48;
/// Texts on which tokenizers often differ.
const PROBES: [&str; 8] = [
    "Hello world",
    "  two spaces, a\ttab\n\nand lines ",
    "don't 12345 3.14 I'LL",
    "naïve café Ünïcödé",
    "日本語 русский עברית",
    "🙂👩‍👩‍👧 emoji",
    "def f(x):\n    return x**2  # comment\n",
    "",
];

/// How far an exported model is from the trained one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Positions that were compared.
    pub tokens: usize,
    pub largest_logit_difference: f64,
    /// Mean over the positions, in nats.
    pub kl: f64,
    /// Share of the positions whose likeliest token is the same.
    pub greedy_agreement: f64,
}

/// What the trained model says: logits of some prompts, and how its tokenizer cuts texts.
pub struct Reference {
    prompts: Vec<Vec<i64>>,
    /// `[T, V]` of each prompt, f32 on the CPU.
    logits: Vec<Tensor>,
    words: Option<Words>,
}

/// What a tokenizer does with texts, and which tokens begin and end.
#[derive(PartialEq)]
struct Words {
    probes: Vec<Vec<u32>>,
    bos: Option<u32>,
    eos: Option<u32>,
    end_of_turn: Option<u32>,
    chat: Option<String>,
    chat_ids: Option<Vec<u32>>,
}

impl Reference {
    /// Scores the prompts with `model`.
    pub fn of(model: &StreamedModel) -> Result<Reference> {
        let mut prompts = match model.tokenizer() {
            Some(tokenizer) => prompts(tokenizer)?,
            None => synthetic_prompts(model.config().vocab_size),
        };
        let longest = model.config().max_position_embeddings.max(1) as usize;
        prompts.iter_mut().for_each(|ids| ids.truncate(longest.min(TOKENS)));
        prompts.retain(|ids| !ids.is_empty());
        let words = model.tokenizer().map(Words::of).transpose()?;
        Ok(Reference { logits: model.logits(&prompts)?, prompts, words })
    }

    /// Scores the same prompts with `exported`.
    ///
    /// # Errors
    /// A tokenizer that is not there or cuts a text differently, another BOS, EOS or end of turn, another rendered chat.
    pub fn compare(&self, exported: &StreamedModel) -> Result<Agreement> {
        if let Some(ours) = &self.words {
            let tokenizer = exported.tokenizer().context("the export has no tokenizer")?;
            ours.expect(&Words::of(tokenizer)?)?;
        }
        let mut logits = exported.logits(&self.prompts)?.into_iter();
        self.compare_logits(|_| logits.next().context("a prompt without logits"))
    }

    /// The same of anything that gives logits `[T, V]`, f32 on the CPU, of a sequence of ids.
    pub fn compare_logits(&self, mut exported: impl FnMut(&[i64]) -> Result<Tensor>) -> Result<Agreement> {
        let (mut tokens, mut largest, mut kl, mut same) = (0, 0f64, 0.0, 0.0);
        for (ids, ours) in self.prompts.iter().zip(&self.logits) {
            let theirs = exported(ids)?;
            if theirs.size() != ours.size() {
                bail!("the export has logits {:?}, the model {:?}", theirs.size(), ours.size());
            }
            let difference = ours.f_sub(&theirs)?.f_abs()?.f_max()?.double_value(&[]);
            // A NaN must not pass.
            largest = if difference.is_nan() { f64::INFINITY } else { largest.max(difference) };
            let log = |logits: &Tensor| logits.f_log_softmax(-1, Kind::Double);
            let (p, q) = (log(ours)?, log(&theirs)?);
            kl += p.f_exp()?.f_mul(&p.f_sub(&q)?)?.f_sum(Kind::Double)?.double_value(&[]);
            let agree = ours.f_argmax(-1, false)?.f_eq_tensor(&theirs.f_argmax(-1, false)?)?;
            same += agree.f_sum(Kind::Double)?.double_value(&[]);
            tokens += ids.len();
        }
        let count = tokens as f64;
        let kl = if kl.is_nan() { f64::INFINITY } else { (kl / count).max(0.0) };
        Ok(Agreement { tokens, largest_logit_difference: largest, kl, greedy_agreement: same / count })
    }
}

fn prompts(tokenizer: &Tokenizer) -> Result<Vec<Vec<i64>>> {
    let mut prompts = Vec::new();
    for paragraph in CALIBRATION_TEXT.split("\n\n").take(PROMPTS) {
        prompts.push(tokenizer.encode(paragraph, true)?);
    }
    if let Some(template) = tokenizer.chat_template()
        && let Ok(text) = template.render(&conversation(), &RenderOptions::default())
    {
        prompts.push(tokenizer.encode(&text, false)?);
    }
    Ok(prompts.into_iter().map(|ids| ids.into_iter().map(i64::from).collect()).collect())
}

fn conversation() -> [serde_json::Value; 3] {
    [
        json!({"role": "user", "content": "What is the opposite of hot?"}),
        json!({"role": "assistant", "content": "Cold."}),
        json!({"role": "user", "content": "And of large?"}),
    ]
}

/// Ids spread over the vocabulary, for a model without a tokenizer.
fn synthetic_prompts(vocab_size: i64) -> Vec<Vec<i64>> {
    let id = |i: i64| (i * 7919 + i * i * 31) % vocab_size.max(1);
    (0..PROMPTS as i64).map(|p| (0..TOKENS as i64).map(|t| id(p * TOKENS as i64 + t)).collect()).collect()
}

impl Words {
    fn of(tokenizer: &Tokenizer) -> Result<Words> {
        let probes = PROBES.iter().map(|text| tokenizer.encode(text, true)).collect::<Result<_>>()?;
        let template = tokenizer.chat_template();
        let options = RenderOptions { add_generation_prompt: true, ..Default::default() };
        let chat = template.and_then(|template| template.render(&conversation(), &options).ok());
        let chat_ids = chat.as_ref().map(|text| tokenizer.encode(text, false)).transpose()?;
        Ok(Words {
            probes,
            bos: tokenizer.bos_token_id(),
            eos: tokenizer.eos_token_id(),
            end_of_turn: template.and_then(|template| end_of_turn(tokenizer, template)).map(|token| token.id),
            chat,
            chat_ids,
        })
    }

    fn expect(&self, other: &Words) -> Result<()> {
        for ((text, ours), theirs) in PROBES.iter().zip(&self.probes).zip(&other.probes) {
            if ours != theirs {
                bail!("the exported tokenizer makes {theirs:?} of {text:?}, the model's {ours:?}");
            }
        }
        for (what, ours, theirs) in [
            ("bos_token", self.bos, other.bos),
            ("eos_token", self.eos, other.eos),
            ("the token that ends a turn", self.end_of_turn, other.end_of_turn),
        ] {
            if ours != theirs {
                bail!("{what} is {theirs:?} in the export and {ours:?} in the model");
            }
        }
        if self.chat != other.chat || self.chat_ids != other.chat_ids {
            bail!("the exported chat template renders {:?}, the model's {:?}", other.chat, self.chat);
        }
        Ok(())
    }
}
