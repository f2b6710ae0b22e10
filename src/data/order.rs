//! The order of an epoch: shuffled, packed, and the same wherever and whenever it is computed.

use std::collections::{BTreeMap, VecDeque};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::TokenDataset;

/// Fisher-Yates, written out because the order must not change with a version of `rand`.
pub(crate) fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for i in (1..items.len()).rev() {
        let j = ((u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64) as usize;
        items.swap(i, j);
    }
}

/// Which of `len` rows are the `count` ones that `seed` chooses.
pub(super) fn chosen(len: usize, count: usize, seed: u64) -> Vec<bool> {
    let mut order: Vec<u32> = (0..len as u32).collect();
    shuffle(&mut order, &mut ChaCha8Rng::seed_from_u64(seed));
    let mut is_chosen = vec![false; len];
    for row in order.into_iter().take(count) {
        is_chosen[row as usize] = true;
    }
    is_chosen
}

/// The rows of one epoch. A row is what counts as one of `batch_size`: a sample, a pair, or a pack of samples.
#[derive(Clone, Debug, Default)]
pub(super) struct Order {
    samples: Vec<u32>,
    row_ends: Vec<u32>,
}

impl Order {
    /// The rows of `epoch`. With `pack_to`, samples are packed into rows of at most so many tokens; with `seed`, samples
    /// and rows are shuffled, differently in each epoch.
    pub(super) fn new(data: &TokenDataset, pack_to: Option<usize>, seed: Option<u64>, epoch: u64) -> Order {
        let together = data.row_samples() as u32;
        let mut samples: Vec<u32> = (0..data.len() as u32 / together).collect();
        let mut rng = seed.map(|seed| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(epoch);
            rng
        });
        if let Some(rng) = &mut rng {
            shuffle(&mut samples, rng);
        }
        let Some(pack_to) = pack_to else {
            let row_ends = (1..=samples.len() as u32).map(|row| row * together).collect();
            let of_row = |row: u32| row * together..(row + 1) * together;
            return Order { samples: samples.into_iter().flat_map(of_row).collect(), row_ends };
        };
        let mut packs = best_fit_decreasing(data, samples, pack_to);
        if let Some(rng) = &mut rng {
            shuffle(&mut packs, rng);
        }
        let row_ends = packs
            .iter()
            .scan(0, |end, pack| {
                *end += pack.len() as u32;
                Some(*end)
            })
            .collect();
        Order { samples: packs.concat(), row_ends }
    }

    pub(super) fn num_rows(&self) -> usize {
        self.row_ends.len()
    }

    /// The samples of `count` rows from `row` on.
    pub(super) fn samples(&self, row: usize, count: usize) -> &[u32] {
        let end = |row: usize| if row == 0 { 0 } else { self.row_ends[row - 1] as usize };
        &self.samples[end(row)..end((row + count).min(self.num_rows()))]
    }
}

/// Bin packing: samples from the longest to the shortest, each into the fullest pack that has room.
///
/// The number of packs depends on the lengths alone, not on the order of samples of one length, so every epoch has as
/// many. TRL's packing strategy `bfd`.
fn best_fit_decreasing(data: &TokenDataset, mut samples: Vec<u32>, capacity: usize) -> Vec<Vec<u32>> {
    samples.sort_by_key(|sample| std::cmp::Reverse(data.sample_len(*sample as usize)));
    let mut packs: Vec<Vec<u32>> = Vec::new();
    let mut by_room: BTreeMap<usize, VecDeque<u32>> = BTreeMap::new();
    for sample in samples {
        let length = data.sample_len(sample as usize);
        let fullest = by_room.range(length..).next().map(|(room, _)| *room);
        let (pack, room) = match fullest {
            Some(room) => {
                let packs_with_room = by_room.entry(room).or_default();
                let pack = packs_with_room.pop_front().expect("an entry without packs is removed");
                if packs_with_room.is_empty() {
                    by_room.remove(&room);
                }
                (pack, room)
            }
            None => {
                packs.push(Vec::new());
                (packs.len() as u32 - 1, capacity.max(length))
            }
        };
        packs[pack as usize].push(sample);
        by_room.entry(room - length).or_default().push_back(pack);
    }
    packs
}
