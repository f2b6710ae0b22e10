//! Near-duplicates by MinHash (Broder 1997) with banding (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4).

use std::collections::HashMap;

/// Minima of a signature: the estimate of a similarity s has a standard deviation of sqrt(s (1 - s) / 128) < 0.045.
const MINIMA: usize = 128;
/// Rows of a band. Two rows of similarity s share one of the 16 bands with probability 1 - (1 - s^8)^16: 0.95 at 0.8.
const BAND: usize = 8;
const BANDS: usize = MINIMA / BAND;
/// Words of a shingle.
const SHINGLE: usize = 3;

/// The minima of 128 hash functions over a text's shingles.
#[derive(Clone, Debug)]
pub struct Signature([u32; MINIMA]);

impl Signature {
    /// The signature of `text`'s sets of three words in a row, without regard to case and punctuation; `None` of a text
    /// without words.
    pub fn new(text: &str) -> Option<Signature> {
        let words: Vec<u64> = text
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(|word| word.chars().flat_map(char::to_lowercase).fold(0, |hash, c| mix(hash ^ u64::from(c))))
            .collect();
        if words.is_empty() {
            return None;
        }
        let mut minima = [u32::MAX; MINIMA];
        for shingle in words.windows(SHINGLE.min(words.len())) {
            let hash = shingle.iter().fold(0, |hash, word| mix(hash ^ word));
            for (function, minimum) in (0..).zip(&mut minima) {
                // Multiply-shift: a family of hash functions by odd multipliers.
                let value = (hash.wrapping_mul(mix(function) | 1) >> 32) as u32;
                *minimum = value.min(*minimum);
            }
        }
        Some(Signature(minima))
    }

    fn bands(&self) -> impl Iterator<Item = u64> {
        self.0.chunks(BAND).map(|band| band.iter().fold(0, |hash, minimum| mix(hash ^ u64::from(*minimum))))
    }
}

/// The finaliser of SplitMix64: each bit of the result depends on each bit of `x`, and 0 is not a fixed point.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The signatures seen so far, about 0.6 KB each.
#[derive(Debug)]
pub struct NearDuplicates {
    threshold: f64,
    /// The low byte of each minimum: two differ in it where the minima do, but for 1 in 256.
    minima: Vec<[u8; MINIMA]>,
    bands: Vec<HashMap<u64, u32>>,
}

impl NearDuplicates {
    /// Finds texts whose sets of shingles have a Jaccard similarity of about `threshold` or more.
    pub fn new(threshold: f64) -> NearDuplicates {
        NearDuplicates { threshold, minima: Vec::new(), bands: vec![HashMap::new(); BANDS] }
    }

    /// Remembers `signature`, unless it is near to one that is remembered: then gives that one's number and the
    /// estimated similarity. Numbers count the remembered ones from 0.
    pub fn insert(&mut self, signature: &Signature) -> Result<u32, (u32, f64)> {
        let bytes = signature.0.map(|minimum| minimum as u8);
        let bands: Vec<u64> = signature.bands().collect();
        let candidates = bands.iter().zip(&self.bands).filter_map(|(band, seen)| seen.get(band));
        let nearest = candidates
            .map(|candidate| (*candidate, similarity(&bytes, &self.minima[*candidate as usize])))
            .max_by(|a, b| a.1.total_cmp(&b.1));
        if let Some(near) = nearest.filter(|(_, similarity)| *similarity >= self.threshold) {
            return Err(near);
        }
        let number = self.minima.len() as u32;
        self.minima.push(bytes);
        for (band, seen) in bands.into_iter().zip(&mut self.bands) {
            seen.entry(band).or_insert(number);
        }
        Ok(number)
    }
}

/// The share of equal minima, less what equal low bytes of unequal minima add.
fn similarity(a: &[u8; MINIMA], b: &[u8; MINIMA]) -> f64 {
    let equal = a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / MINIMA as f64;
    ((equal - 1.0 / 256.0) / (1.0 - 1.0 / 256.0)).max(0.0)
}
