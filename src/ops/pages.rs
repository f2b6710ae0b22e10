//! Keys and values in pages: a pool for each layer, and the batch that reads and extends them.

use anyhow::Result;
use cxx::SharedPtr;
use tch::Tensor;

use super::op_error;
use crate::ffi::{self, bridge};

/// The pool of one layer.
#[derive(Debug)]
pub struct LayerPages {
    /// `[pages, page_size, K, D]`.
    pub k: Tensor,
    pub v: Tensor,
}

/// New rows of several sequences, one sequence after another, behind what each has cached. Key `s` of a sequence lies at
/// position `s % page_size` of its page `s / page_size`. Made once a batch and shared by the layers.
pub struct PagedBatch(pub(super) SharedPtr<bridge::PagedBatch>);

impl PagedBatch {
    /// Sequence i has `rows[i]` new rows behind `past[i]` cached ones; `pages` are those of the sequences one after
    /// another, of each as many as both need.
    pub fn new(rows: &[i64], past: &[i64], pages: &[i32], page_size: i64) -> Result<PagedBatch> {
        bridge::paged_batch(rows, past, pages, page_size).map(PagedBatch).map_err(op_error)
    }

    /// One new row of each of N sequences on a GPU: `tables` `[N, width]`, of each its pages in order, and `lengths` `[N]`, its
    /// tokens with the new one, int64; a row of length 0 belongs to no sequence. No length is over `longest`, no page is
    /// `pool` or over. What is recorded on these tensors can be replayed for what they hold then.
    pub fn on_device(
        tables: &Tensor,
        lengths: &Tensor,
        longest: usize,
        pool: usize,
        page_size: usize,
    ) -> Result<PagedBatch> {
        let (tables, lengths) = (ffi::borrow(tables), ffi::borrow(lengths));
        bridge::paged_rows(tables, lengths, longest as i64, pool as i64, page_size as i64)
            .map(PagedBatch)
            .map_err(op_error)
    }
}
