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
    /// See [`KvCache::rotated_for`].
    rotated_for: usize,
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
        Ok(KvCache { layers, len: 0, capacity, rotated_for: 0 })
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

    /// The longest sequence that the filled positions were part of. Where a rope depends on the length, their keys are
    /// rotated for that one, also after a [`truncate`](KvCache::truncate).
    pub fn rotated_for(&self) -> usize {
        self.rotated_for
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        if self.len == 0 {
            self.rotated_for = 0;
        }
    }

    /// Makes room for `capacity` positions in all, keeping the filled ones.
    pub fn grow(&mut self, capacity: usize) -> Result<()> {
        if capacity <= self.capacity {
            return Ok(());
        }
        let len = self.len as i64;
        for tensor in self.layers.iter_mut().flat_map(|(k, v)| [k, v]) {
            let size = tensor.size();
            let larger =
                Tensor::f_empty([size[0], capacity as i64, size[2]], (tensor.kind(), tensor.device()))?;
            larger.f_narrow(1, 0, len)?.f_copy_(&tensor.f_narrow(1, 0, len)?)?;
            *tensor = larger;
        }
        self.capacity = capacity;
        Ok(())
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
        self.rotated_for = self.rotated_for.max(self.len);
    }
}
