//! The choice of the next token: greedy, or at random with temperature, top-k and top-p.

use crate::error::{Error, Result};
use crate::random::Philox;

/// The random stream of sampling, apart from those of the parameters.
const SAMPLING_STREAM: u64 = 1 << 40;

/// How the next token is chosen from the logits.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampling {
    /// 0: always the likeliest token.
    pub temperature: f64,
    /// Only the k likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1: all. Holtzman et al.
    /// 2020, section 3.1.
    pub top_p: f64,
    pub seed: u64,
}

impl Sampling {
    pub fn validate(&self) -> Result<()> {
        let error =
            |what: String, remedy: &str| Err(Error::Usage { what, remedy: remedy.to_string() });
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return error(
                format!("--temperature is {}", self.temperature),
                "give 0 (greedy) or a positive number such as 0.8",
            );
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return error(format!("--top-p is {}", self.top_p), "give a number in (0, 1]");
        }
        Ok(())
    }

    /// The token at `index` of its sequence; ties go to the lower id. Each index has a random
    /// number of its own.
    pub fn choose(&self, logits: &[f32], index: u64) -> u32 {
        let by_logit =
            |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        if self.temperature == 0.0 {
            return ids.into_iter().min_by(by_logit).unwrap_or(0);
        }
        ids.sort_unstable_by(by_logit);
        if self.top_k > 0 {
            ids.truncate(self.top_k);
        }
        let highest = logits[ids[0] as usize] as f64;
        let weight = |id: u32| ((logits[id as usize] as f64 - highest) / self.temperature).exp();
        let mut weights: Vec<f64> = ids.iter().map(|&id| weight(id)).collect();
        let total: f64 = weights.iter().sum();
        let mut sum = 0.0;
        let kept = weights.iter().position(|weight| {
            sum += weight;
            sum >= self.top_p * total
        });
        weights.truncate(kept.map_or(weights.len(), |last| last + 1));
        let total: f64 = weights.iter().sum();
        let mut left = Philox::new(self.seed, SAMPLING_STREAM).uniform_f64(index) * total;
        for (&id, &weight) in ids.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        ids[weights.len() - 1]
    }
}
