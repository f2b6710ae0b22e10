//! `numpy.random.default_rng(seed).permutation(n)`, to the number: what `datasets.Dataset.shuffle(seed)` orders rows by.
//!
//! SeedSequence (O'Neill's seed_seq_fe) makes 256 bits of the seed, PCG64 is the generator (O'Neill 2014: 128-bit LCG,
//! XSL-RR output), and the shuffle is Fisher-Yates on masked, rejected 32-bit halves.

/// 256 bits from a seed.
fn seed_sequence(seed: u64) -> [u64; 4] {
    let mut hash = 0x43b0_d7e5_u32;
    let mut hashed = |value: u32| {
        let value = value ^ hash;
        hash = hash.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(hash);
        value ^ (value >> 16)
    };
    let mixed = |x: u32, y: u32| {
        let value = 0xca01_f9dd_u32.wrapping_mul(x).wrapping_sub(0x4973_f715_u32.wrapping_mul(y));
        value ^ (value >> 16)
    };
    let mut pool = [seed as u32, (seed >> 32) as u32, 0, 0].map(&mut hashed);
    for source in 0..4 {
        for target in (0..4).filter(|target| *target != source) {
            pool[target] = mixed(pool[target], hashed(pool[source]));
        }
    }
    let mut hash = 0x8b51_f9dd_u32;
    let mut half = |at: usize| {
        let value = pool[at % 4] ^ hash;
        hash = hash.wrapping_mul(0x58f3_8ded);
        let value = value.wrapping_mul(hash);
        u64::from(value ^ (value >> 16))
    };
    std::array::from_fn(|at| half(2 * at) | half(2 * at + 1) << 32)
}

struct Pcg64 {
    state: u128,
    increment: u128,
    half: Option<u32>,
}

impl Pcg64 {
    fn new(seed: u64) -> Pcg64 {
        let [a, b, c, d] = seed_sequence(seed).map(u128::from);
        let mut rng = Pcg64 { state: 0, increment: (c << 64 | d) << 1 | 1, half: None };
        rng.step();
        rng.state = rng.state.wrapping_add(a << 64 | b);
        rng.step();
        rng
    }

    fn step(&mut self) {
        const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;
        self.state = self.state.wrapping_mul(MULTIPLIER).wrapping_add(self.increment);
    }

    fn next_u64(&mut self) -> u64 {
        self.step();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    /// The low half of a number, then its high half.
    fn next_u32(&mut self) -> u32 {
        self.half.take().unwrap_or_else(|| {
            let both = self.next_u64();
            self.half = Some((both >> 32) as u32);
            both as u32
        })
    }

    /// A number from 0 to `most`, which is included.
    fn up_to(&mut self, most: u32) -> u32 {
        let mask = u32::MAX.checked_shr(most.leading_zeros()).unwrap_or(0);
        loop {
            let value = self.next_u32() & mask;
            if value <= most {
                return value;
            }
        }
    }
}

/// The order of `len` rows after `Dataset.shuffle(seed)`: place i holds row `permutation[i]`.
pub(super) fn permutation(seed: u64, len: u32) -> Vec<u32> {
    let mut rng = Pcg64::new(seed);
    let mut order: Vec<u32> = (0..len).collect();
    for last in (1..len).rev() {
        order.swap(last as usize, rng.up_to(last) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::permutation;

    #[test]
    fn numpy_gives_the_same() {
        // numpy 2: np.random.default_rng(seed).permutation(n)
        assert_eq!(permutation(3407, 5), [3, 4, 0, 1, 2]);
        assert_eq!(permutation(3408, 5), [4, 0, 3, 1, 2]);
        assert_eq!(permutation(3409, 5), [1, 0, 4, 3, 2]);
        assert_eq!(permutation(1, 1), [0]);
        assert!(permutation(1, 0).is_empty());
    }
}
