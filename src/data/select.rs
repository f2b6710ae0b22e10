//! Some of a dataset's rows, or those of several: split, sample, dedup, mix.

use std::collections::HashSet;

use anyhow::{Context, Result, bail};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::fingerprint::{Fingerprint, fingerprint, row_fingerprint, row_text, whole_text};
use super::minhash::{NearDuplicates, Signature};
use super::order::chosen;
use super::records::{Record, Records, Row};
use super::{DatasetFormat, RowOptions};

/// The rows that a share (below 1) or a number (from 1 on) of `rows` sets aside: at least one, and not all.
pub fn held_out(rows: u64, share: f64) -> u64 {
    let wanted = if share < 1.0 { (rows as f64 * share).round() } else { share };
    (wanted as u64).clamp(1, rows.max(2) - 1)
}

/// Rows in their order, as they are read.
pub type SelectedRows = Box<dyn Iterator<Item = Result<Row>>>;

/// The rows of `sources` in two parts that `seed` chooses: training and evaluation, which has `test_size` of the rows as
/// [`held_out`] counts them. Each part reads the files when it is asked for. `ferrotune train --test-size` with the same
/// seed sets the same rows aside if it drops none.
///
/// # Errors
/// Fewer than two rows, or a file that cannot be read.
pub fn split_rows(sources: &[String], test_size: f64, seed: u64) -> Result<(SelectedRows, SelectedRows)> {
    let rows = count(sources)?;
    if rows < 2 {
        bail!("{}: {rows} rows cannot be split", sources.join(", "));
    }
    let is_held_out = chosen(rows, held_out(rows as u64, test_size) as usize, seed);
    let part = |wanted: bool| -> Result<SelectedRows> {
        let is_held_out = is_held_out.clone();
        let records = Records::open(sources)?.enumerate();
        Ok(Box::new(
            records
                .filter(move |(at, _)| is_held_out.get(*at) == Some(&wanted))
                .map(|(_, record)| Ok(record?.row)),
        ))
    };
    Ok((part(false)?, part(true)?))
}

/// As many rows of `sources` as asked for, chosen by `seed`, in their order; all if there are fewer.
pub fn sample_rows(sources: &[String], rows: usize, seed: u64) -> Result<SelectedRows> {
    let is_chosen = chosen(count(sources)?, rows, seed);
    let records = Records::open(sources)?.enumerate();
    Ok(Box::new(
        records
            .filter(move |(at, _)| is_chosen.get(*at).copied().unwrap_or(false))
            .map(|(_, record)| Ok(record?.row)),
    ))
}

fn count(sources: &[String]) -> Result<usize> {
    Records::open(sources)?.try_fold(0, |count, record| record.map(|_| count + 1))
}

/// Leaves out rows that say what an earlier one said: the same sample of a known shape, or the same row of any other.
pub struct Dedup {
    options: RowOptions,
    seen: HashSet<Fingerprint>,
    near: Option<NearDuplicates>,
}

impl Dedup {
    /// `near` is the similarity (0 to 1) from which on rows count as the same, too.
    pub fn new(options: RowOptions, near: Option<f64>) -> Dedup {
        Dedup { options, seen: HashSet::new(), near: near.map(NearDuplicates::new) }
    }

    /// Whether `record` is new.
    ///
    /// # Errors
    /// A row of a known shape that cannot be understood.
    pub fn is_new(&mut self, record: &Record) -> Result<bool> {
        let given = self.options.template.is_some()
            || self.options.text_column.is_some()
            || self.options.dataset_format.is_some();
        let (fingerprint, text) = if given || DatasetFormat::recognise(&record.row).is_some() {
            let example =
                self.options.example(&record.row, true).with_context(|| record.place.to_string())?;
            (fingerprint(&example), self.near.is_some().then(|| whole_text(&example)))
        } else {
            (row_fingerprint(&record.row), self.near.is_some().then(|| row_text(&record.row)))
        };
        if !self.seen.insert(fingerprint) {
            return Ok(false);
        }
        let signature = text.and_then(|text| Signature::new(&text));
        Ok(match (&mut self.near, signature) {
            (Some(near), Some(signature)) => near.insert(&signature).is_ok(),
            _ => true,
        })
    }
}

/// When a mix ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoppingStrategy {
    /// When the first of the datasets has no more rows.
    FirstExhausted,
    /// When each has been gone through at least once; those that end earlier begin again.
    AllExhausted,
}

/// Rows of several datasets, each next one drawn from a dataset by its weight (`datasets.interleave_datasets`).
pub struct Mix {
    sources: Vec<Vec<String>>,
    open: Vec<Records>,
    exhausted: Vec<bool>,
    /// Sums of the weights up to each dataset.
    bounds: Vec<f64>,
    rng: ChaCha8Rng,
    strategy: StoppingStrategy,
    done: bool,
}

impl Mix {
    /// Mixes `datasets`, each given as its files and its weight.
    ///
    /// # Errors
    /// A weight that is not above 0, or files that cannot be found.
    pub fn new(datasets: Vec<(Vec<String>, f64)>, seed: u64, strategy: StoppingStrategy) -> Result<Mix> {
        let mut sum = 0.0;
        let mut bounds = Vec::new();
        for (sources, weight) in &datasets {
            if !(*weight > 0.0 && weight.is_finite()) {
                bail!("{}: the weight {weight} is not above 0", sources.join(", "));
            }
            sum += weight;
            bounds.push(sum);
        }
        let sources: Vec<Vec<String>> = datasets.into_iter().map(|(sources, _)| sources).collect();
        let open = sources.iter().map(|sources| Records::open(sources)).collect::<Result<Vec<_>>>()?;
        let exhausted = vec![false; open.len()];
        Ok(Mix {
            sources,
            open,
            exhausted,
            bounds,
            rng: ChaCha8Rng::seed_from_u64(seed),
            strategy,
            done: false,
        })
    }

    fn next_row(&mut self) -> Result<Option<Row>> {
        let drawn = self.rng.random::<f64>() * self.bounds.last().copied().unwrap_or(0.0);
        let at = self.bounds.partition_point(|bound| *bound <= drawn).min(self.open.len() - 1);
        if let Some(record) = self.open[at].next() {
            return Ok(Some(record?.row));
        }
        self.exhausted[at] = true;
        if self.strategy == StoppingStrategy::FirstExhausted
            || self.exhausted.iter().all(|exhausted| *exhausted)
        {
            return Ok(None);
        }
        self.open[at] = Records::open(&self.sources[at])?;
        match self.open[at].next() {
            Some(record) => Ok(Some(record?.row)),
            None => bail!("{}: no rows", self.sources[at].join(", ")),
        }
    }
}

impl Iterator for Mix {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        if self.done || self.open.is_empty() {
            return None;
        }
        let row = self.next_row().transpose();
        self.done = !matches!(row, Some(Ok(_)));
        row
    }
}
