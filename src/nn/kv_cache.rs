//! Keys and values of the tokens decoded so far, for one sequence.

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor};

use crate::ops::LayerCache;

/// Preallocated `[K, capacity, D]` keys and values a layer, and how many positions are filled.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    len: usize,
    capacity: usize,
}

impl KvCache {
    /// Room for `capacity` positions of `layers` layers: `2 * layers * K * capacity * D` elements.
    pub fn new(
        layers: usize,
        num_kv_heads: i64,
        head_dim: i64,
        capacity: usize,
        kind: Kind,
        device: Device,
    ) -> Result<KvCache> {
        let empty = || Tensor::f_empty([num_kv_heads, capacity as i64, head_dim], (kind, device));
        let layers = (0..layers).map(|_| Ok((empty()?, empty()?))).collect::<Result<_>>()?;
        Ok(KvCache { layers, len: 0, capacity })
    }

    /// Positions filled.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The cache of layer `index`, with room checked for `tokens` more.
    pub(crate) fn layer(&self, index: usize, tokens: usize) -> Result<LayerCache<'_>> {
        if self.len + tokens > self.capacity {
            bail!("KV cache: {} + {tokens} positions exceed its capacity of {}", self.len, self.capacity);
        }
        let (k, v) = &self.layers[index];
        Ok(LayerCache { k, v, past: self.len as i64 })
    }

    /// Counts `tokens` as written by every layer.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
