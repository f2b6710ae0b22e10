use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::order::Order;
use super::{Preference, TokenDataset};

/// The label of a token that is not trained.
pub const IGNORE_INDEX: i64 = -100;

/// Samples side by side, without padding: N tokens in all, S samples.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// Token ids, `[N]`.
    pub input_ids: Vec<i64>,
    /// Each token's own id where it is a target, else -100; not shifted. `[N]`
    pub labels: Vec<i64>,
    /// The place of each token in its sample, `[N]`.
    pub position_ids: Vec<i64>,
    /// Sample s is the tokens `cu_seqlens[s]..cu_seqlens[s + 1]`; `[S + 1]`, from 0 to N.
    pub cu_seqlens: Vec<i32>,
    /// Of each segment of `cu_seqlens` the one that stands before it in its sample, or -1: what several samples begin with stands here
    /// once. Empty where nothing is shared, and every segment is a sample.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<i32>,
    /// Numbers that an objective reads beside each row, `[K][N]`; which they are is its own matter.
    pub columns: Vec<Vec<f32>>,
    /// In preference training what is known of each sample, `[S]`, else empty.
    pub preferences: Vec<Preference>,
}

impl Batch {
    /// A batch of samples, each given as token ids and labels of one length.
    pub fn from_samples<'a>(samples: impl IntoIterator<Item = (&'a [i64], &'a [i64])>) -> Batch {
        let mut batch = Batch { cu_seqlens: vec![0], ..Default::default() };
        for (ids, labels) in samples {
            batch.push(ids.iter().copied().zip(labels.iter().copied()));
        }
        batch
    }

    fn push(&mut self, tokens: impl Iterator<Item = (i64, i64)>) {
        self.push_from(0, tokens);
    }

    /// Adds a segment, the whole of a sample or what follows `prefix` in it, in a batch that is made of these alone.
    pub fn push_segment(&mut self, prefix: Option<usize>, ids: &[i64], labels: &[i64]) {
        if self.cu_seqlens.is_empty() {
            self.cu_seqlens.push(0);
        }
        let before = prefix.map_or(0, |prefix| self.cu_seqlens[prefix + 1] - self.cu_seqlens[prefix]);
        self.prefixes.push(prefix.map_or(-1, |prefix| prefix as i32));
        self.push_from(i64::from(before), ids.iter().copied().zip(labels.iter().copied()));
    }

    fn push_from(&mut self, position: i64, tokens: impl Iterator<Item = (i64, i64)>) {
        for (position, (id, label)) in (position..).zip(tokens) {
            self.input_ids.push(id);
            self.labels.push(label);
            self.position_ids.push(position);
        }
        self.cu_seqlens.push(self.input_ids.len() as i32);
    }

    /// N.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// S.
    pub fn samples(&self) -> usize {
        let shared: BTreeSet<i32> = self.prefixes.iter().copied().filter(|&prefix| prefix >= 0).collect();
        self.cu_seqlens.len() - 1 - shared.len()
    }

    /// The labels that are predicted: other than -100 and not the first of a sample, which nothing predicts.
    pub fn num_targets(&self) -> usize {
        let targets = self.labels.iter().zip(&self.position_ids);
        targets.filter(|(label, position)| **label != IGNORE_INDEX && **position > 0).count()
    }
}

/// How samples become batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Rows a batch: samples, pairs, or packs (TRL's `per_device_train_batch_size`).
    pub batch_size: usize,
    /// The most tokens in a pack.
    pub max_seq_length: usize,
    /// Packs samples into rows of up to `max_seq_length` tokens. They still do not see each other.
    pub packing: bool,
    /// A new order in each epoch, from `seed`; otherwise the order of the data.
    pub shuffle: bool,
    /// The seed of the order.
    pub seed: u64,
}

/// A place in the endless sequence of batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Epochs done.
    pub epoch: u64,
    /// Rows of the epoch that were given out.
    pub index: u64,
    /// [`TokenDataset::fingerprint`] of the data.
    pub fingerprint: u32,
}

/// Batches of a dataset, epoch after epoch, from any [`Cursor`] on.
#[derive(Clone, Debug)]
pub struct BatchStream {
    data: Arc<TokenDataset>,
    options: BatchOptions,
    cursor: Cursor,
    order: Order,
    order_epoch: u64,
}

impl BatchStream {
    /// A stream at the start of epoch 0.
    ///
    /// # Errors
    /// No samples, a `batch_size` of 0, or, with packing, a sample longer than `max_seq_length`.
    pub fn new(data: Arc<TokenDataset>, options: BatchOptions) -> Result<BatchStream> {
        if data.is_empty() {
            bail!("the dataset has no samples");
        }
        if options.batch_size == 0 {
            bail!("the batch size is 0: expected at least 1");
        }
        if options.packing && data.max_len() > options.max_seq_length {
            bail!(
                "a sample of {} tokens does not fit into packs of {}",
                data.max_len(),
                options.max_seq_length
            );
        }
        if options.packing && data.row_samples() > 1 {
            bail!("pairs of samples are not packed: a batch of them has no padding without that");
        }
        let cursor = Cursor { fingerprint: data.fingerprint(), ..Default::default() };
        let mut stream = BatchStream { data, options, cursor, order: Order::default(), order_epoch: 0 };
        stream.order = stream.order(0);
        Ok(stream)
    }

    fn order(&self, epoch: u64) -> Order {
        let pack_to = self.options.packing.then_some(self.options.max_seq_length);
        Order::new(&self.data, pack_to, self.options.shuffle.then_some(self.options.seed), epoch)
    }

    /// The next batch, or `None` at the end of an epoch; the call after that starts the next epoch. An epoch's last batch
    /// may be smaller.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        if self.order_epoch != self.cursor.epoch {
            self.order = self.order(self.cursor.epoch);
            self.order_epoch = self.cursor.epoch;
        }
        let row = self.cursor.index as usize;
        if row >= self.order.num_rows() {
            self.cursor.epoch += 1;
            self.cursor.index = 0;
            return Ok(None);
        }
        let mut batch = Batch { cu_seqlens: vec![0], ..Default::default() };
        for &sample in self.order.samples(row, self.options.batch_size) {
            let ids = self.data.ids(sample as usize).iter().map(|id| i64::from(*id));
            let tokens = ids.zip(self.data.trained(sample as usize));
            batch.push(tokens.map(|(id, trained)| (id, if trained { id } else { IGNORE_INDEX })));
            batch.preferences.extend(self.data.preferences().get(sample as usize));
        }
        self.cursor.index = (row + self.options.batch_size).min(self.order.num_rows()) as u64;
        Ok(Some(batch))
    }

    /// Where the stream stands: the batches that [`seek`](Self::seek) to here gives are those that follow now.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Goes to `cursor`.
    ///
    /// # Errors
    /// The cursor was taken on other data.
    pub fn seek(&mut self, cursor: &Cursor) -> Result<()> {
        if cursor.fingerprint != self.cursor.fingerprint {
            bail!(
                "the dataset is not the one that the checkpoint was made with (checksum {:08x}, then {:08x}): resume \
                 with the same files, chat template, max_seq_length and loss options (a template that writes today's date \
                 makes other data each day)",
                self.cursor.fingerprint,
                cursor.fingerprint
            );
        }
        self.cursor = *cursor;
        Ok(())
    }

    /// Batches in one epoch, the same for every epoch.
    pub fn batches_per_epoch(&self) -> u64 {
        self.order.num_rows().div_ceil(self.options.batch_size) as u64
    }

    /// No batch has more tokens.
    pub fn most_tokens(&self) -> usize {
        let rows = self.options.batch_size;
        if self.options.packing {
            return (rows * self.options.max_seq_length).min(self.data.num_tokens() as usize);
        }
        let together = self.data.row_samples();
        let row =
            |row: usize| (row * together..(row + 1) * together).map(|sample| self.data.sample_len(sample));
        let mut lengths: Vec<usize> = (0..self.data.len() / together).map(|n| row(n).sum()).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.iter().take(rows).sum()
    }

    /// The part of the present epoch that was given out, 0 to 1.
    pub fn epoch_share(&self) -> f64 {
        self.cursor.index as f64 / self.order.num_rows() as f64
    }

    /// Whether the last batch of an epoch was the last one given out.
    pub fn is_epoch_end(&self) -> bool {
        self.cursor.index as usize >= self.order.num_rows()
    }

    /// The data behind the stream.
    pub fn data(&self) -> &Arc<TokenDataset> {
        &self.data
    }
}
