//! The flags of an engine: how much it may hold at once.

use anyhow::Result;
use clap::Args;
use tch::Device;

use crate::device;
use crate::generate::{EngineOptions, KvBudget, MOST_PROMPT_ROWS};
use crate::models::Decoder;
use crate::train::Size;

/// Of the memory that is free once the model is loaded: on a GPU nobody else asks for it.
const SHARE_OF_HOST: f64 = 0.25;
const SHARE_OF_DEVICE: f64 = 0.85;

/// How many answers are written at once, and in how much memory.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Answers that are written at once; others wait
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_num_seqs: u32,
    /// Memory for keys and values, such as 4GiB [default: a quarter of the host's free memory, 85 % of a GPU's]
    #[arg(long, value_name = "SIZE")]
    pub kv_cache_memory: Option<Size>,
    /// Tokens of one pass, those of prompts and those that are decoded beside them: more read many prompts faster, fewer hold up running answers
    /// less. They need memory beside that of keys and values [default: 8192 on a GPU with 32 GiB free, else 2048]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_num_batched_tokens: Option<u32>,
}

impl EngineArgs {
    /// For a model that is loaded.
    pub fn options(&self, decoder: &Decoder) -> Result<EngineOptions> {
        let bytes = kv_bytes(self.kv_cache_memory, decoder.device)?;
        Ok(EngineOptions {
            kv_budget: KvBudget::Bytes(bytes),
            max_num_seqs: self.max_num_seqs as usize,
            max_num_batched_tokens: batched_tokens(self.max_num_batched_tokens, decoder.device)?,
        })
    }
}

/// `--max-num-batched-tokens`, or its default once the model is loaded: of the 8B shape 8,192 rows read prompts a fifth faster than 2,048, and take 0.5 GiB
/// more.
pub(super) fn batched_tokens(given: Option<u32>, device: Device) -> Result<usize> {
    let room = device.is_cuda() && device::memory(device)?.free >= 32 << 30;
    Ok(given.map_or(if room { 4 * MOST_PROMPT_ROWS } else { MOST_PROMPT_ROWS }, |rows| rows as usize))
}

/// `--kv-cache-memory`, or its default once the model is loaded.
pub(super) fn kv_bytes(given: Option<Size>, device: Device) -> Result<u64> {
    let share = if device == Device::Cpu { SHARE_OF_HOST } else { SHARE_OF_DEVICE };
    given.map_or_else(|| Ok((device::memory(device)?.free as f64 * share) as u64), |size| Ok(size.0))
}
