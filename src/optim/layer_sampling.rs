//! Which blocks an update trains, where not all are trained at all times.
//!
//! "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", Pan
//! et al. 2024, algorithm 1: embedding, final norm and head are always trained, and every
//! `interval` updates a few of the blocks are drawn, uniformly and without repetition. The others
//! are frozen: they keep their moments and their count of updates. The draws are a function of
//! (seed, interval), so there is no state to save.

use crate::random::Philox;

/// Keeps the draws apart from other random streams.
const STREAM: u64 = 0x4c49_5341 << 32;

#[derive(Clone, PartialEq, Debug)]
pub struct LayerSampling {
    seed: u64,
    interval: u64,
    sampled: usize,
    /// The update that `drawn` and `updates` are for, from 1.
    update: u64,
    /// Of each block: whether this update trains it.
    drawn: Vec<bool>,
    /// Of each block: updates of it up to this one.
    updates: Vec<u64>,
}

impl LayerSampling {
    /// Stands before the first update. Panics if `interval` is 0 or `sampled` more than `layers`.
    pub fn new(seed: u64, layers: usize, sampled: usize, interval: u64) -> Self {
        assert!(interval > 0 && sampled <= layers);
        let (drawn, updates) = (vec![false; layers], vec![0; layers]);
        LayerSampling { seed, interval, sampled, update: 0, drawn, updates }
    }

    /// Goes to `update`, counted from 1; forward in the time of the updates between, back to any.
    pub fn go_to(&mut self, update: u64) {
        if update < self.update {
            self.update = 0;
            self.updates.fill(0);
        }
        while self.update < update {
            if self.update.is_multiple_of(self.interval) {
                self.draw(self.update / self.interval);
            }
            self.update += 1;
            for (updates, &drawn) in self.updates.iter_mut().zip(&self.drawn) {
                *updates += u64::from(drawn);
            }
        }
    }

    /// The update of the last [`Self::go_to`].
    pub fn update(&self) -> u64 {
        self.update
    }

    /// Which of the updates of `layer`, counted from 1 as layers are, this one is; `None` if it
    /// is frozen.
    pub fn count(&self, layer: usize) -> Option<u64> {
        self.drawn[layer - 1].then_some(self.updates[layer - 1])
    }

    /// The first of a shuffled list of all blocks (Fisher and Yates).
    fn draw(&mut self, interval: u64) {
        let numbers = Philox::new(self.seed, STREAM ^ interval);
        let mut layers: Vec<usize> = (0..self.drawn.len()).collect();
        self.drawn.fill(false);
        for at in 0..self.sampled {
            let left = layers.len() - at;
            let number = numbers.uniform_f64(at as u64);
            layers.swap(at, at + ((number * left as f64) as usize).min(left - 1));
            self.drawn[layers[at]] = true;
        }
    }
}
