//! Steps in which every sequence has one new token, as CUDA graphs: launched kernel by kernel such a step takes longer than
//! the kernels do.

use std::collections::{BTreeSet, HashMap};
use std::ops::RangeInclusive;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::device::{self, Graph};
use crate::models::{Decoder, DeviceRows};
use crate::nn::{KvPages, PAGE_SIZE, RopeTables};
use crate::ops::{self, LoraRun, LoraSet};

/// One new token of a sequence.
pub(super) struct Row<'a> {
    pub(super) id: i64,
    /// With the new token.
    pub(super) length: usize,
    pub(super) pages: &'a [i32],
}

/// What a batch shares, and what is recorded for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    longest: usize,
    /// The number of a loaded adapter that all rows have.
    adapter: Option<u64>,
    regime: Vec<i64>,
}

struct Recorded {
    batch: Batch,
    /// When it was last used, counted in uses of any.
    used: u64,
    /// None where the shape has been seen once: the first time also chooses kernels and makes workspaces.
    graph: Option<(Graph, Tensor)>,
}

/// The tensors that a graph reads.
struct Batch {
    /// int64: ids, positions, lengths, tables one after another, filled by one launch.
    words: Tensor,
    rows: DeviceRows,
    /// Whole tables: a graph reads them where they were.
    angles: Vec<(Tensor, Tensor)>,
}

/// Rows of a product on few rows; more are dequantised for, and a graph saves less.
const MOST_ROWS: usize = 256;
/// Each keeps its kernels' parameters; all share one pool of memory.
const MOST_GRAPHS: usize = 64;

pub(super) struct DecodeGraphs {
    enabled: bool,
    device: Device,
    recorded: HashMap<Shape, Recorded>,
    uses: u64,
}

impl DecodeGraphs {
    pub(super) fn new(decoder: &Decoder) -> DecodeGraphs {
        let enabled = Graph::available(decoder.device)
            && matches!(decoder.kind, Kind::BFloat16 | Kind::Half)
            && !decoder.offloads_embedding();
        DecodeGraphs { enabled, device: decoder.device, recorded: HashMap::new(), uses: 0 }
    }

    /// Whether steps are recorded here.
    pub(super) fn are_recorded(&self) -> bool {
        self.enabled
    }

    /// Forgets what was recorded with adapters that `keeps` does not know.
    pub(super) fn retain(&mut self, keeps: impl Fn(u64) -> bool) {
        let keep = |shape: &Shape| shape.adapter.is_none_or(&keeps);
        if !self.recorded.keys().all(keep) {
            self.finish();
            self.recorded.retain(|shape, _| keep(shape));
        }
    }

    /// A graph must not go while the GPU runs it.
    fn finish(&self) {
        if let Err(error) = device::synchronize(self.device) {
            tracing::warn!("waiting for the GPU: {error:#}");
        }
    }

    /// Logits `[at least rows, V]` of the new tokens, f32; none where this batch is for the ordinary way. `lora` is that of the
    /// adapter of that number.
    pub(super) fn logits(
        &mut self,
        decoder: &Decoder,
        rows: &[Row],
        (pages, ropes): (&KvPages, &mut RopeTables),
        (adapter, lora): (Option<u64>, Option<&LoraSet>),
    ) -> Result<Option<Tensor>> {
        let Some(shape) = self.shape(decoder, rows, adapter) else { return Ok(None) };
        if !self.recorded.contains_key(&shape) {
            if self.recorded.len() >= MOST_GRAPHS {
                self.finish();
                let oldest = self.recorded.iter().min_by_key(|(_, recorded)| recorded.used);
                if let Some(oldest) = oldest.map(|(shape, _)| shape.clone()) {
                    self.recorded.remove(&oldest);
                }
            }
            let batch = Batch::new(decoder, &shape, ropes)?;
            self.recorded.insert(shape.clone(), Recorded { batch, used: 0, graph: None });
        }
        self.uses += 1;
        let recorded = self.recorded.get_mut(&shape).expect("it was just put there");
        recorded.used = self.uses;
        recorded.batch.assign(&shape, rows, None)?;
        if let Some((graph, logits)) = &mut recorded.graph {
            graph.replay()?;
            return Ok(Some(logits.shallow_clone()));
        }
        let run = [LoraRun { rows: 0..shape.rows, adapter: lora }];
        let lora = if lora.is_some() { &run[..] } else { &[] };
        let batch = &recorded.batch;
        let work = || {
            let hidden = decoder.decode_on_device(&batch.rows, pages, &batch.angles, lora)?;
            let _no_grad = tch::no_grad_guard();
            decoder.logits(&hidden)
        };
        let first = work();
        let logits = match first {
            Ok(logits) => logits,
            Err(error) => {
                self.give_up(&error);
                return Ok(None);
            }
        };
        match Graph::record(work) {
            Ok(graph) => recorded.graph = Some(graph),
            Err(error) => self.give_up(&error),
        }
        Ok(Some(logits))
    }

    /// The same for rows whose ids are still to be drawn, `tokens` (int64 `[rows]` on the GPU, any for a negative one); none where
    /// this batch has not been recorded.
    pub(super) fn logits_of_drawn(
        &mut self,
        decoder: &Decoder,
        rows: &[Row],
        tokens: &Tensor,
        adapter: Option<u64>,
    ) -> Result<Option<Tensor>> {
        let shape = self.shape(decoder, rows, adapter);
        let Some((shape, recorded)) =
            shape.and_then(|shape| self.recorded.get_mut(&shape).map(|it| (shape, it)))
        else {
            return Ok(None);
        };
        let Some((graph, logits)) = &mut recorded.graph else { return Ok(None) };
        self.uses += 1;
        recorded.used = self.uses;
        recorded.batch.assign(&shape, rows, Some(tokens))?;
        graph.replay()?;
        Ok(Some(logits.shallow_clone()))
    }

    /// What a batch is recorded as; none where it cannot be.
    fn shape(&self, decoder: &Decoder, rows: &[Row], adapter: Option<u64>) -> Option<Shape> {
        let longest = rows.iter().map(|row| row.length).max().unwrap_or(0);
        let regime = decoder.rope_regime(longest);
        let alike = || rows.iter().all(|row| decoder.rope_regime(row.length) == regime);
        if !self.enabled || rows.len() > MOST_ROWS || rows.is_empty() || !alike() {
            return None;
        }
        let context = decoder.config.max_position_embeddings as usize;
        let longest = bucket(longest).min(context.next_multiple_of(PAGE_SIZE));
        Some(Shape { rows: padded(rows.len()), longest, adapter, regime })
    }

    fn give_up(&mut self, error: &anyhow::Error) {
        tracing::warn!("decoding is launched kernel by kernel, not as CUDA graphs: {error:#}");
        self.enabled = false;
        self.finish();
        self.recorded.clear();
    }
}

impl Drop for DecodeGraphs {
    fn drop(&mut self) {
        if !self.recorded.is_empty() {
            self.finish();
        }
    }
}

/// Rows of logits that the recorded steps of up to `sequences` sequences of any of `lengths` keep together at most.
pub fn recorded_rows(sequences: usize, lengths: RangeInclusive<usize>) -> usize {
    let sizes: BTreeSet<usize> = (1..=sequences.min(MOST_ROWS)).map(padded).collect();
    let buckets = bucket(*lengths.end()).ilog2() - bucket(*lengths.start()).ilog2() + 1;
    sizes.into_iter().sum::<usize>() * buckets as usize
}

/// Of the longest sequence.
fn bucket(length: usize) -> usize {
    length.next_power_of_two().max(512)
}

/// Few sizes, so that few graphs serve all.
fn padded(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=64 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(32),
    }
}

impl Batch {
    fn new(decoder: &Decoder, shape: &Shape, ropes: &mut RopeTables) -> Result<Batch> {
        let (n, width) = (shape.rows as i64, shape.longest.div_ceil(PAGE_SIZE) as i64);
        let words = Tensor::f_zeros([n * (3 + width)], (Kind::Int64, decoder.device))?;
        let column = |at: i64| words.f_narrow(0, at * n, n);
        let rows = DeviceRows {
            input_ids: column(0)?,
            positions: column(1)?,
            lengths: column(2)?,
            tables: words.f_narrow(0, 3 * n, n * width)?.f_view([n, width])?,
            longest: shape.longest,
        };
        let angles = decoder.config.ropes.iter().enumerate().map(|(index, rope)| {
            ropes.table(index, rope, decoder.device, shape.longest, shape.longest as i64)
        });
        Ok(Batch { angles: angles.collect::<Result<_>>()?, rows, words })
    }

    /// `drawn`: the ids, where the rows' own are still unknown.
    fn assign(&mut self, shape: &Shape, rows: &[Row], drawn: Option<&Tensor>) -> Result<()> {
        let (n, width) = (shape.rows, shape.longest.div_ceil(PAGE_SIZE));
        let mut words = vec![0_i32; n * (3 + width)];
        for (at, row) in rows.iter().enumerate() {
            words[at] = row.id as i32;
            words[n + at] = row.length as i32 - 1;
            words[2 * n + at] = row.length as i32;
            let own = &mut words[3 * n + at * width..][..row.pages.len()];
            own.copy_from_slice(row.pages);
        }
        ops::put_words(&self.words, &words, drawn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_sizes_serve_all() {
        let sizes: BTreeSet<usize> = (1..=256).map(padded).collect();
        assert!((1..=256).all(|rows| padded(rows) >= rows));
        assert_eq!(sizes.len(), 4 + 7 + 6, "{sizes:?}");
        assert_eq!(recorded_rows(8, 129..=384), 1 + 2 + 4 + 8);
        assert_eq!(recorded_rows(12, 129..=1100), 3 * (1 + 2 + 4 + 8 + 16));
    }
}
