//! The ways to estimate what a training step takes, and a figure for each.

use serde::Serialize;

/// A figure by each way to estimate it: two bounds, and what is expected. JSON has those that there
/// are by their names.
#[derive(Serialize, Clone, Copy, PartialEq, Debug)]
pub struct Estimates<T> {
    /// At the rates of the machine's datasheet: a bound.
    pub datasheet: T,
    /// At rates that somebody measured on this machine: a tighter bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured: Option<T>,
    /// By the models of expected.rs; in bf16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<T>,
}

impl<T> Estimates<T> {
    /// With their names, the loosest first.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &T)> {
        let Estimates { datasheet, measured, expected } = self;
        let others = [("measured", measured), ("expected", expected)];
        let others = others.into_iter().filter_map(|(name, it)| Some((name, it.as_ref()?)));
        [("datasheet", datasheet)].into_iter().chain(others)
    }

    /// The tightest, with its name.
    pub fn tightest(&self) -> (&'static str, &T) {
        self.iter().last().expect("the datasheet's is always there")
    }

    pub fn map<U>(self, mut of: impl FnMut(T) -> U) -> Estimates<U> {
        Estimates {
            datasheet: of(self.datasheet),
            measured: self.measured.map(&mut of),
            expected: self.expected.map(&mut of),
        }
    }

    pub fn as_ref(&self) -> Estimates<&T> {
        Estimates {
            datasheet: &self.datasheet,
            measured: self.measured.as_ref(),
            expected: self.expected.as_ref(),
        }
    }

    /// Of two of the same ways.
    pub fn zip<U>(self, other: Estimates<U>) -> Estimates<(T, U)> {
        Estimates {
            datasheet: (self.datasheet, other.datasheet),
            measured: self.measured.zip(other.measured),
            expected: self.expected.zip(other.expected),
        }
    }
}

/// What a machine is taken to do, and the training step on it.
#[derive(Serialize, Clone, Debug)]
pub struct Estimate {
    pub bytes_per_second: f64,
    pub flops_per_second: f64,
    pub source: &'static str,
    pub milliseconds: f64,
    pub tokens_per_second: f64,
    /// FLOPs of the formula per second, as a share of the datasheet's peak.
    pub mfu: f64,
}
