//! A warp: its registers, where its threads are, and what they wait for.

use std::collections::VecDeque;

use super::code::Value;
use super::matrix::{MatrixA, Operands, WgmmaShape};
use super::tensor::Chunk;

pub const LANES: usize = 32;
pub type Lanes<T> = [T; LANES];

/// The lanes of a mask, the lowest first.
pub fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..LANES).filter(move |lane| mask >> lane & 1 == 1)
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Wait {
    Nothing,
    /// Until this named barrier of the block is in another round.
    Barrier {
        id: usize,
        round: u64,
    },
    /// The same of the cluster's barrier.
    Cluster {
        round: u64,
    },
}

pub struct Warp {
    /// Its block's place among those that are resident.
    pub block: usize,
    /// Of its threads in the block.
    pub first_thread: u32,
    /// [register][lane]
    registers: Vec<u64>,
    /// Threads that have not returned.
    pub live: u32,
    /// Threads that have come to an instruction that they share with others, who have not.
    pub held: u32,
    /// Whether all live threads are at one place, which is `place`; else `places` has them.
    together: bool,
    place: usize,
    places: Lanes<usize>,
    pub wait: Wait,
    /// Its last turn ended at something that was not ready.
    pub polled: bool,
    /// The round of the cluster's barrier at which it has arrived.
    pub arrived: Option<u64>,
    pub copies: Lanes<Groups<Copy>>,
    pub stores: Lanes<Groups<BulkStore>>,
    products: Groups<Product>,
    /// By register: whether one of `products` has it.
    in_products: Vec<bool>,
}

/// What a thread has begun: not in a group yet, and in groups, the oldest first.
pub struct Groups<T> {
    pub open: Vec<T>,
    pub committed: VecDeque<Vec<T>>,
}

impl<T> Default for Groups<T> {
    fn default() -> Self {
        Groups { open: vec![], committed: VecDeque::new() }
    }
}

impl<T> Groups<T> {
    pub fn is_empty(&self) -> bool {
        self.open.is_empty() && self.committed.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.committed.iter().flatten().chain(&self.open)
    }

    pub fn commit(&mut self) {
        self.committed.push_back(std::mem::take(&mut self.open));
    }

    /// All but the newest `left` groups.
    pub fn older_than(&mut self, left: usize) -> Vec<T> {
        let count = self.committed.len().saturating_sub(left);
        self.committed.drain(..count).flatten().collect()
    }
}

/// cp.async
pub struct Copy {
    pub to: u32,
    pub from: u64,
    pub bytes: u32,
    pub of_source: u32,
}

/// cp.async.bulk to global memory, or a reduction there.
pub struct BulkStore {
    pub from: u32,
    pub bytes: u32,
    pub target: Target,
    /// What was read of shared memory, once it was.
    pub values: Option<Vec<u8>>,
}

pub enum Target {
    Range(u64),
    Box(Vec<Chunk>),
    AddF32(u64),
    AddBf16(u64),
    AddBox(Vec<Chunk>),
}

/// wgmma: what it reads until it is waited for.
pub struct Product {
    pub shape: WgmmaShape,
    pub a: MatrixA,
    pub b: u64,
    pub operands: Operands,
    pub instruction: usize,
    /// Accumulators, and A where it is in registers.
    pub d: Vec<u32>,
    pub in_a: Vec<u32>,
}

impl Product {
    fn registers(&self) -> impl Iterator<Item = u32> {
        self.d.iter().chain(&self.in_a).copied()
    }
}

impl Warp {
    pub fn new(block: usize, first_thread: u32, threads: u32, registers: usize) -> Self {
        Warp {
            block,
            first_thread,
            // There are thousands, and most warps come to a few: zeros are given page by page.
            registers: vec![0; registers * LANES],
            live: if threads >= 32 { u32::MAX } else { (1 << threads) - 1 },
            held: 0,
            together: true,
            place: 0,
            places: [0; LANES],
            wait: Wait::Nothing,
            polled: false,
            arrived: None,
            copies: std::array::from_fn(|_| Groups::default()),
            stores: std::array::from_fn(|_| Groups::default()),
            products: Groups::default(),
            in_products: vec![false; registers],
        }
    }

    // -------------------------------------------------------------- products

    pub fn begin(&mut self, product: Product) {
        product.registers().for_each(|register| self.in_products[register as usize] = true);
        self.products.open.push(product);
    }

    pub fn commit_products(&mut self) {
        self.products.commit();
    }

    /// All but those of the newest `left` groups, which end.
    pub fn end_products(&mut self, left: usize) -> Vec<Product> {
        let ended = self.products.older_than(left);
        for register in ended.iter().flat_map(Product::registers) {
            self.in_products[register as usize] = false;
        }
        for register in self.products.iter().flat_map(Product::registers) {
            self.in_products[register as usize] = true;
        }
        ended
    }

    pub fn has_products(&self) -> bool {
        !self.products.is_empty()
    }

    /// Those under way, if any has one of these registers.
    pub fn products_with(&self, registers: &[u32]) -> impl Iterator<Item = &Product> {
        let any = self.has_products()
            && registers.iter().any(|&register| self.in_products[register as usize]);
        any.then(|| self.products.iter()).into_iter().flatten()
    }

    // -------------------------------------------------------------- places

    /// The place that comes first in the program among those of threads that can run, or the last
    /// of them, and all threads that are there. `None`: every thread is held.
    pub fn next(&self, last: bool) -> Option<(usize, u32)> {
        if self.together {
            return (self.held != self.live).then_some((self.place, self.live));
        }
        let places = lanes(self.live & !self.held).map(|lane| self.places[lane]);
        let place = if last { places.max() } else { places.min() }?;
        Some((place, self.at(place)))
    }

    pub fn is_together(&self) -> bool {
        self.together
    }

    /// The live threads at this place.
    fn at(&self, place: usize) -> u32 {
        lanes(self.live)
            .filter(|&lane| self.places[lane] == place)
            .fold(0, |mask, lane| mask | 1 << lane)
    }

    pub fn place(&self, lane: usize) -> usize {
        if self.together { self.place } else { self.places[lane] }
    }

    /// These threads, which were at one place, go on at another.
    pub fn go(&mut self, mask: u32, place: usize) {
        self.held &= !mask;
        if self.together {
            if mask == self.live {
                self.place = place;
                return;
            }
            self.places = [self.place; LANES];
            self.together = false;
        }
        lanes(mask).for_each(|lane| self.places[lane] = place);
        self.join();
    }

    pub fn leave(&mut self, mask: u32) {
        self.live &= !mask;
        // Nobody waits for those that have returned: whoever was held tries again.
        self.held = 0;
        if !self.together && self.live != 0 {
            self.join();
        }
    }

    fn join(&mut self) {
        let first = self.live.trailing_zeros() as usize;
        if first < LANES && self.at(self.places[first]) == self.live {
            self.together = true;
            self.place = self.places[first];
        }
    }

    pub fn hold(&mut self, mask: u32) {
        self.held |= mask;
    }

    // -------------------------------------------------------------- registers

    pub fn values(&self, value: Value) -> Lanes<u64> {
        match value {
            Value::Constant(value) => [value; LANES],
            Value::Register(register) => *self.register(register),
        }
    }

    pub fn value(&self, value: Value, lane: usize) -> u64 {
        match value {
            Value::Constant(value) => value,
            Value::Register(register) => self.register(register)[lane],
        }
    }

    /// Errors: threads of `mask` have different values.
    pub fn uniform(&self, value: Value, mask: u32) -> Result<u64, String> {
        let values = self.values(value);
        let first = values[mask.trailing_zeros() as usize % LANES];
        match lanes(mask).all(|lane| values[lane] == first) {
            true => Ok(first),
            false => Err(format!("threads of the warp have different operands: {values:x?}")),
        }
    }

    fn register(&self, register: u32) -> &Lanes<u64> {
        let from = register as usize * LANES;
        self.registers[from..from + LANES].try_into().expect("as many as lanes")
    }

    pub fn set(&mut self, register: u32, lane: usize, value: u64) {
        self.registers[register as usize * LANES + lane] = value;
    }

    pub fn set_all(&mut self, register: u32, mask: u32, values: &Lanes<u64>) {
        let from = register as usize * LANES;
        let to = &mut self.registers[from..from + LANES];
        if mask == u32::MAX {
            to.copy_from_slice(values);
        } else {
            lanes(mask).for_each(|lane| to[lane] = values[lane]);
        }
    }
}
