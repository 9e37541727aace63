//! A random order without a table: a keyed permutation of 0..n.
//!
//! A Feistel network with Philox as its round function permutes the next even power of two, at
//! least 64; values outside 0..n walk on along their cycle until they are inside, at most four
//! steps on average for n > 16 (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

use crate::random::Philox;

const ROUNDS: u64 = 6;

/// With smaller halves the network reaches only some orders of a few elements.
const LEAST_HALF_BITS: u32 = 3;

/// A permutation of `0..n` that a seed and an epoch decide.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    rounds: Philox,
}

impl Permutation {
    pub fn new(n: u64, seed: u64, epoch: u64) -> Self {
        let bits = 64 - n.saturating_sub(1).leading_zeros();
        /// Keeps this stream apart from those of model init and sampling.
        const STREAM: u64 = 0x5348_5546 << 32;
        Permutation {
            n,
            half_bits: bits.div_ceil(2).max(LEAST_HALF_BITS),
            rounds: Philox::new(seed, STREAM ^ epoch),
        }
    }

    /// The `index`-th element. Panics unless `index < n`.
    pub fn at(&self, index: u64) -> u64 {
        assert!(index < self.n, "element {index} of a permutation of {}", self.n);
        let mut value = index;
        loop {
            value = self.permute(value);
            if value < self.n {
                return value;
            }
        }
    }

    fn permute(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            let mixed = u64::from(self.rounds.at(round << 32 | right)[0]) & mask;
            (left, right) = (right, left ^ mixed);
        }
        left << self.half_bits | right
    }
}
