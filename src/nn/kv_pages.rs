//! Keys and values of decoded tokens, in pages.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::ops::LayerPages;

/// Tokens of a page.
pub const PAGE_SIZE: usize = 16;

/// A pool of pages `[pages, PAGE_SIZE, K, D]` for the keys and one for the values of each layer. Who has which page is the
/// caller's business.
#[derive(Debug)]
pub struct KvPages {
    layers: Vec<LayerPages>,
    pages: usize,
}

impl KvPages {
    /// `2 * layers * pages * PAGE_SIZE * K * D` elements. On the CPU memory is taken from the system as pages are written.
    pub fn new(
        layers: usize,
        num_kv_heads: i64,
        head_dim: i64,
        pages: usize,
        kind: Kind,
        device: Device,
    ) -> Result<KvPages> {
        let shape = [pages as i64, PAGE_SIZE as i64, num_kv_heads, head_dim];
        let pool = || Tensor::f_empty(shape, (kind, device));
        let layers = (0..layers).map(|_| Ok(LayerPages { k: pool()?, v: pool()? })).collect::<Result<_>>()?;
        Ok(KvPages { layers, pages })
    }

    /// Pages in all.
    pub fn pages(&self) -> usize {
        self.pages
    }

    pub fn layer(&self, index: usize) -> &LayerPages {
        &self.layers[index]
    }

    /// Copies page `from` over page `to`, in every layer.
    pub fn copy_page(&self, from: i32, to: i32) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for pool in self.layers.iter().flat_map(|layer| [&layer.k, &layer.v]) {
            pool.f_select(0, i64::from(to))?.f_copy_(&pool.f_select(0, i64::from(from))?)?;
        }
        Ok(())
    }
}
