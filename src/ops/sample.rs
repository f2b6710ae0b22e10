//! Drawing tokens on a GPU.

use anyhow::Result;
use tch::{Kind, Tensor};

use super::op_error;
use crate::device::Download;
use crate::ffi::{self, bridge};

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
    let n = draws.len() as i64;
    let words: Vec<i64> = draws
        .iter()
        .flat_map(|draw| [draw.temperature, draw.top_k as f64, draw.top_p, draw.min_p, draw.uniform])
        .map(|value| value.to_bits() as i64)
        .collect();
    let params =
        crate::device::upload(&words, logits.device())?.f_view_dtype(Kind::Double)?.f_view([n, 5])?;
    // All results in one tensor: one copy back.
    let out = Tensor::f_empty([2 * n], (Kind::Int64, logits.device()))?;
    let tokens = out.f_narrow(0, 0, n)?;
    let logprobs = out.f_narrow(0, n, n)?.f_view_dtype(Kind::Float)?.f_view([2, n])?;
    let [logits, params, tokens, logprobs] = [logits, &params, &tokens, &logprobs].map(ffi::borrow);
    bridge::sample(logits, params, tokens, logprobs).map_err(op_error)?;
    Ok(Draws { tokens: out.f_narrow(0, 0, n)?, download: Download::new(&out)? })
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
