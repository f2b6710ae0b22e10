use std::fmt;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use bytemuck::Pod;

use crate::io::Mmap;

use super::Preference;
use super::order::chosen;
use super::select::held_out;

/// Tokenised samples, compact: 4 bytes and 1 bit a token, 8 bytes a sample. In memory, or in the files of a
/// [`TokenCache`](super::TokenCache), which the system reads as they are needed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenDataset {
    ids: Numbers<u32>,
    /// Bit n: token n is trained (its label is its id).
    trained: Numbers<u64>,
    ends: Numbers<u64>,
    /// One a sample in preference data, else none.
    preferences: Vec<Preference>,
}

/// Numbers in memory or in a mapped file.
#[derive(Clone)]
enum Numbers<T> {
    Owned(Vec<T>),
    Mapped(Arc<Mmap>),
}

impl<T: Pod> Deref for Numbers<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Numbers::Owned(numbers) => numbers,
            // A map begins with a page, so it is aligned; its length was checked.
            Numbers::Mapped(file) => bytemuck::cast_slice(file.bytes()),
        }
    }
}

impl<T: Pod> Numbers<T> {
    /// To append to them, they must be in memory.
    fn owned(&mut self) -> &mut Vec<T> {
        if let Numbers::Mapped(_) = self {
            *self = Numbers::Owned(self.to_vec());
        }
        match self {
            Numbers::Owned(numbers) => numbers,
            Numbers::Mapped(_) => unreachable!("they were just copied"),
        }
    }

    fn map(path: &Path, len: u64) -> Result<Numbers<T>> {
        let file = Mmap::open(path)?;
        let expected = len * size_of::<T>() as u64;
        if file.bytes().len() as u64 != expected {
            bail!("{}: {} bytes, expected {expected}: remove its folder", path.display(), file.bytes().len());
        }
        Ok(Numbers::Mapped(Arc::new(file)))
    }
}

impl<T> Default for Numbers<T> {
    fn default() -> Numbers<T> {
        Numbers::Owned(Vec::new())
    }
}

impl<T: Pod + PartialEq> PartialEq for Numbers<T> {
    fn eq(&self, other: &Numbers<T>) -> bool {
        **self == **other
    }
}

impl<T: Pod + Eq> Eq for Numbers<T> {}

impl<T: Pod + fmt::Debug> fmt::Debug for Numbers<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl TokenDataset {
    /// An empty dataset.
    pub fn new() -> TokenDataset {
        TokenDataset::default()
    }

    /// Appends a sample; `trained[n]` says whether token n is a target. Both have one length.
    pub fn push(&mut self, ids: &[u32], trained: &[bool]) {
        assert_eq!(ids.len(), trained.len(), "one mask bit a token");
        for (n, trained) in (self.ids.len()..).zip(trained) {
            let bits = self.trained.owned();
            if n % 64 == 0 {
                bits.push(0);
            }
            bits[n / 64] |= u64::from(*trained) << (n % 64);
        }
        self.ids.owned().extend_from_slice(ids);
        self.ends.owned().push(self.ids.len() as u64);
    }

    /// Appends two samples that stay together in every order, each with what preference training knows of it.
    pub fn push_pair(&mut self, pair: [(&[u32], &[bool], Preference); 2]) {
        assert_eq!(self.preferences.len(), self.len(), "the other samples are no pairs");
        for (ids, trained, preference) in pair {
            self.push(ids, trained);
            self.preferences.push(preference);
        }
    }

    /// What preference training knows of each sample; empty in other data.
    pub fn preferences(&self) -> &[Preference] {
        &self.preferences
    }

    /// Notes the reference model's log-probability of each sample's completion.
    pub fn set_references(&mut self, log_probs: &[f32]) {
        assert_eq!(log_probs.len(), self.preferences.len(), "one number a sample");
        for (preference, log_prob) in self.preferences.iter_mut().zip(log_probs) {
            preference.reference = Some(*log_prob);
        }
    }

    /// How many neighbouring samples stay together: 2 in preference data, else 1.
    pub fn row_samples(&self) -> usize {
        if self.preferences.is_empty() { 1 } else { 2 }
    }

    /// The samples in the files `ids`, `trained` and `ends`, as a cache writes them.
    pub(super) fn map(files: [&Path; 3], samples: u64, tokens: u64) -> Result<TokenDataset> {
        let [ids, trained, ends] = files;
        let data = TokenDataset {
            ids: Numbers::map(ids, tokens)?,
            trained: Numbers::map(trained, tokens.div_ceil(64))?,
            ends: Numbers::map(ends, samples)?,
            preferences: Vec::new(),
        };
        if data.ends.last().copied().unwrap_or(0) != tokens || !data.ends.is_sorted() {
            bail!("{}: not the ends of samples: remove its folder", ends.display());
        }
        Ok(data)
    }

    /// The number of samples.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are no samples.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    fn range(&self, sample: usize) -> std::ops::Range<usize> {
        let start = if sample == 0 { 0 } else { self.ends[sample - 1] as usize };
        start..self.ends[sample] as usize
    }

    /// The token ids of a sample.
    pub fn ids(&self, sample: usize) -> &[u32] {
        &self.ids[self.range(sample)]
    }

    /// Which tokens of a sample are targets.
    pub fn trained(&self, sample: usize) -> impl Iterator<Item = bool> + '_ {
        self.range(sample).map(|n| self.trained[n / 64] >> (n % 64) & 1 == 1)
    }

    /// The number of tokens of a sample.
    pub fn sample_len(&self, sample: usize) -> usize {
        self.range(sample).len()
    }

    /// The number of tokens of all samples.
    pub fn num_tokens(&self) -> u64 {
        self.ids.len() as u64
    }

    /// The tokens of all samples that are predicted: trained ones, the first of a sample excepted.
    pub fn num_targets(&self) -> u64 {
        (0..self.len())
            .map(|sample| self.trained(sample).skip(1).filter(|trained| *trained).count() as u64)
            .sum()
    }

    /// The tokens of the longest sample.
    pub fn max_len(&self) -> usize {
        (0..self.len()).map(|sample| self.sample_len(sample)).max().unwrap_or(0)
    }

    /// A checksum of samples, masks and preferences, not of reference log-probabilities: two runs with one fingerprint see the same data.
    pub fn fingerprint(&self) -> u32 {
        let words =
            self.trained.iter().chain(self.ends.iter()).flat_map(|word| [*word as u32, (*word >> 32) as u32]);
        let preferences =
            self.preferences.iter().map(|known| known.prompt_len << 1 | u32::from(known.chosen));
        let mut sum = 0;
        let mut buffer = Vec::with_capacity(1 << 16);
        for word in self.ids.iter().copied().chain(words).chain(preferences) {
            buffer.extend_from_slice(&word.to_le_bytes());
            if buffer.len() == 1 << 16 {
                sum = crc32c::crc32c_append(sum, &buffer);
                buffer.clear();
            }
        }
        crc32c::crc32c_append(sum, &buffer)
    }

    /// Splits off `share` (0 to 1) of the samples (pairs, in preference data) for evaluation, at least one, chosen by `seed`: (training, evaluation),
    /// both in the old order.
    pub fn split(&self, share: f64, seed: u64) -> (TokenDataset, TokenDataset) {
        let rows = self.len() / self.row_samples();
        let is_held_out = chosen(rows, held_out(rows as u64, share) as usize, seed);
        let (mut training, mut evaluation) = (TokenDataset::new(), TokenDataset::new());
        for sample in 0..self.len() {
            let trained: Vec<bool> = self.trained(sample).collect();
            let held_out = is_held_out[sample / self.row_samples()];
            let into = if held_out { &mut evaluation } else { &mut training };
            into.push(self.ids(sample), &trained);
            into.preferences.extend(self.preferences.get(sample));
        }
        (training, evaluation)
    }
}
