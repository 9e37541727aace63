//! What a launch takes at least.

use super::cost::Cost;
use crate::cuda::peaks::Peaks;

impl Cost {
    /// Microseconds through memory, on the tensor cores, on the special function units, and over
    /// the link to the host; `rates`: bytes and FLOPs in a second.
    fn times(&self, machine: &Peaks, rates: [f64; 2]) -> [f64; 4] {
        let amounts = [self.bytes, self.flops, self.exponentials, self.link_bytes];
        let [bytes, flops] = rates;
        let per_second =
            [bytes, flops, machine.exponentials_per_second(), machine.link_bytes_per_second];
        [0, 1, 2, 3].map(|at| amounts[at] as f64 / per_second[at] * 1e6)
    }

    /// Microseconds that it takes at least.
    pub(super) fn least(&self, machine: &Peaks, rates: [f64; 2]) -> f64 {
        self.times(machine, rates).into_iter().fold(0.0, f64::max)
    }

    /// What takes the longest of these.
    pub(super) fn bound_by(&self, machine: &Peaks, rates: [f64; 2]) -> &'static str {
        let [moving, multiplying, _, fetching] = self.times(machine, rates);
        match self.least(machine, rates) {
            least if fetching == least && fetching > 0.0 => "host link",
            least if multiplying == least => "products",
            least if moving == least => "memory",
            _ => "exponentials",
        }
    }

    /// Whether both are the same launch.
    pub(super) fn is(&self, cost: &Cost) -> bool {
        self.what == cost.what && self.sizes == cost.sizes && self.bytes == cost.bytes
    }
}
