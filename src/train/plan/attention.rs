//! What attention's kernels hold beside their operands and results: csrc/attention_fused.cpp, attention_formula.cpp.

use super::{Layer, Work};

/// Which kernel attends. The one for capped scores in 16 bits holds less than cuDNN and is taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    Cudnn,
    Flash,
    Efficient,
    Formula,
}

/// Queries of a chunk of the formula.
const FORMULA_QUERIES: u64 = 256;

impl Work {
    pub(super) fn attention_kernel(&self, layer: &Layer) -> Kernel {
        let windowed = layer.window.is_some_and(|window| window < self.sample);
        match self.element {
            4 if layer.softcap => Kernel::Formula,
            4 => Kernel::Efficient,
            _ if !layer.softcap && (windowed || self.deterministic.is_some()) => Kernel::Flash,
            _ => Kernel::Cudnn,
        }
    }

    /// While `rows` attend; q, k, v, the output and its statistics apart.
    pub(super) fn attention_forward_bytes(&self, layer: &Layer, rows: u64) -> u64 {
        match self.attention_kernel(layer) {
            Kernel::Cudnn | Kernel::Flash => 0,
            // Keys and values once for each query head.
            Kernel::Efficient if layer.k < layer.h => 2 * self.element * rows * layer.query(),
            Kernel::Efficient => 0,
            // Scores, what they are less their sums, and probabilities.
            Kernel::Formula => 3 * self.scores_of_chunk(layer),
        }
    }

    /// In its backward; the gradients of q, k and v where they belong apart, too.
    pub(super) fn attention_backward_bytes(&self, layer: &Layer, rows: u64) -> u64 {
        let (query, key) = (layer.query(), layer.k * layer.d);
        let groups = self.head_groups(layer, rows);
        match self.attention_kernel(layer) {
            // dq is summed in f32, and dk where heads share keys.
            Kernel::Cudnn => {
                let shared = if layer.window.is_some() || layer.k < layer.h { 2 * query } else { 0 };
                2 * rows * (2 * query + shared) / groups
            }
            // dq in f32, in a fixed order in copies for the processors that would have nothing to do otherwise; one sum a row and
            // head; dk and dv of every query head where heads share keys; then all three in 16 bits.
            Kernel::Flash => {
                let (samples, heads) = (rows.div_ceil(self.sample.max(1)), layer.h / groups);
                let copies = self.deterministic.map_or(1, |processors| processors.div_ceil(samples * heads));
                let padded = rows.max(samples * self.sample.next_multiple_of(128));
                let sums = 4 * padded * heads * (copies * layer.d.next_multiple_of(32) + 1);
                let shared = if layer.k < layer.h { 2 * query } else { 0 };
                sums + self.element * rows * (shared + query + 2 * key) / groups
            }
            // The same copies as in the forward, dq, dk and dv of every query head, one sum a row and head.
            Kernel::Efficient => {
                self.attention_forward_bytes(layer, rows) + self.element * rows * (3 * query + layer.h)
            }
            // Scores before and behind the cap, probabilities and their gradient; dk and dv.
            Kernel::Formula => 4 * self.scores_of_chunk(layer) + 4 * rows * 2 * key,
        }
    }

    fn scores_of_chunk(&self, layer: &Layer) -> u64 {
        let keys = layer.window.map_or(self.sample, |window| self.sample.min(window + FORMULA_QUERIES));
        4 * layer.h * FORMULA_QUERIES.min(self.sample) * keys
    }

    /// Groups of heads whose backward goes one after the other, so that its sums stay small.
    fn head_groups(&self, layer: &Layer, rows: u64) -> u64 {
        const MOST_BYTES: u64 = 256 << 20;
        let mut groups = 1;
        while 8 * rows * layer.query() > groups * MOST_BYTES && layer.k.is_multiple_of(2 * groups) {
            groups *= 2;
        }
        groups
    }
}
