//! Drawing tokens on a GPU, and what the next step reads there.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::op_error;
use crate::device::Download;
use crate::ffi::{self, bridge, take};

/// How one row's token is drawn: the rules and their order of `generate::Sampler`, without the penalties.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// 0 takes the largest logit.
    pub temperature: f64,
    /// 0 keeps all.
    pub top_k: usize,
    pub top_p: f64,
    pub min_p: f64,
    /// From [0, 1).
    pub uniform: f64,
}

/// A token, or none where the logits are NaN, infinite or all minus infinity, and `log softmax(logits)` of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    pub id: Option<i64>,
    pub logprob: f32,
    /// That of the token in the distribution that it was drawn from: after temperature and filters.
    pub sampling_logprob: f32,
}

/// Tokens that a GPU draws.
pub struct Draws {
    tokens: Tensor,
    download: Download,
}

/// Draws a token of each row of `logits` (f32 `[N, V]` on a GPU) by a kernel; the calling thread does not wait.
pub fn sample(logits: &Tensor, draws: &[Draw]) -> Result<Draws> {
    let params: Vec<f64> = draws
        .iter()
        .flat_map(|draw| [draw.temperature, draw.top_k as f64, draw.top_p, draw.min_p, draw.uniform])
        .collect();
    let tokens = Tensor::f_empty([draws.len() as i64], (Kind::Int64, logits.device()))?;
    // Written by the kernel itself.
    let results = bridge::sample(ffi::borrow(logits), &params, ffi::borrow(&tokens)).map_err(op_error)?;
    Ok(Draws { download: Download::new(take(results), logits.device())?, tokens })
}

/// `to` (int64 `[n]` on a GPU) = `words`, of which the first are those of `ids` (int64 on that GPU), 0 for a negative one. The calling thread does
/// not wait.
pub fn put_words(to: &Tensor, words: &[i32], ids: Option<&Tensor>) -> Result<()> {
    let absent = Tensor::new();
    bridge::put_words(ffi::borrow(to), words, ffi::borrow(ids.unwrap_or(&absent))).map_err(op_error)
}

impl Draws {
    /// int64 `[N]` on the GPU, -1 for none.
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }

    /// The tokens, once they are drawn.
    pub fn wait(self) -> Result<Vec<Drawn>> {
        let host = self.download.wait()?;
        let mut values = vec![0_i64; host.numel()];
        let count = values.len();
        host.f_copy_data(&mut values, count)?;
        let n = count / 2;
        let (ids, packed) = values.split_at(n);
        let logprob = |at: usize| f32::from_bits((packed[at / 2] as u64 >> (32 * (at % 2))) as u32);
        let drawn = |(at, &id): (usize, &i64)| Drawn {
            id: (id >= 0).then_some(id),
            logprob: logprob(at),
            sampling_logprob: logprob(n + at),
        };
        Ok(ids.iter().enumerate().map(drawn).collect())
    }
}
