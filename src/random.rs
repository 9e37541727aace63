//! The one random number generator: Philox4x32-10, counter-based.
//!
//! A number is a pure function of (seed, stream, counter), so there is no state to save: model
//! init, shuffling and sampling each own a stream and address it by index, in any order, on any
//! device. Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
//! Not for cryptography.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// One stream of one seed: 2^64 blocks of 128 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Philox {
    seed: u64,
    stream: u64,
}

impl Philox {
    /// The key is `seed`; `stream` is the upper half of the 128-bit counter.
    pub fn new(seed: u64, stream: u64) -> Self {
        Philox { seed, stream }
    }

    /// The block at `counter`, the lower half of the 128-bit counter.
    pub fn at(&self, counter: u64) -> [u32; 4] {
        self.after_rounds(ROUNDS, counter)
    }

    /// The block that as many rounds make: of another generator, Philox4x32-`rounds`. With 7 or
    /// more it passes BigCrush; only kernels that draw for every element take fewer than 10.
    pub fn after_rounds(&self, rounds: usize, counter: u64) -> [u32; 4] {
        let [mut x0, mut x1] = [counter as u32, (counter >> 32) as u32];
        let [mut x2, mut x3] = [self.stream as u32, (self.stream >> 32) as u32];
        let [mut key0, mut key1] = [self.seed as u32, (self.seed >> 32) as u32];
        for _ in 0..rounds {
            let product0 = u64::from(MULTIPLIERS[0]) * u64::from(x0);
            let product1 = u64::from(MULTIPLIERS[1]) * u64::from(x2);
            (x0, x1, x2, x3) = (
                (product1 >> 32) as u32 ^ x1 ^ key0,
                product1 as u32,
                (product0 >> 32) as u32 ^ x3 ^ key1,
                product0 as u32,
            );
            key0 = key0.wrapping_add(WEYL[0]);
            key1 = key1.wrapping_add(WEYL[1]);
        }
        [x0, x1, x2, x3]
    }

    /// The `index`-th uniform number in [0, 1), 53 random bits; two come from one block.
    pub fn uniform_f64(&self, index: u64) -> f64 {
        self.uniform_pair(index / 2)[(index % 2) as usize]
    }

    /// The `index`-th standard normal number; two come from one block (Box and Muller, 1958).
    pub fn normal(&self, index: u64) -> f64 {
        self.normal_pair(index / 2)[(index % 2) as usize]
    }

    /// `out[i] = normal(first + i)`, at half the cost of asking one by one.
    pub fn fill_normal(&self, first: u64, out: &mut [f32]) {
        let mut index = first;
        let mut filled = 0;
        while filled < out.len() {
            let pair = self.normal_pair(index / 2);
            let from = (index % 2) as usize;
            let count = (2 - from).min(out.len() - filled);
            for (slot, value) in out[filled..filled + count].iter_mut().zip(&pair[from..]) {
                *slot = *value as f32;
            }
            filled += count;
            index += count as u64;
        }
    }

    fn uniform_pair(&self, block: u64) -> [f64; 2] {
        let [a, b, c, d] = self.at(block);
        [(a, b), (c, d)]
            .map(|(low, high)| ((u64::from(high) << 32 | u64::from(low)) >> 11) as f64)
            .map(|integer| integer * 2f64.powi(-53))
    }

    fn normal_pair(&self, block: u64) -> [f64; 2] {
        let [u, v] = self.uniform_pair(block);
        let radius = (-2.0 * (1.0 - u).ln()).sqrt(); // 1 - u is in (0, 1]: never ln(0)
        let angle = std::f64::consts::TAU * v;
        [radius * angle.cos(), radius * angle.sin()]
    }
}
