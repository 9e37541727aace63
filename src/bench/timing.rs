//! How a launch is timed: once on each of several copies of its buffers, between two events.
//!
//! There are enough copies that none is still in L2 when its turn comes again. A sample is the mean
//! over the copies; the median of the samples counts. Each sample is enqueued while the device
//! works on the one before, so that the host's time to launch is in none of them, if the device's
//! is longer.

use crate::config::Dtype;
use crate::cuda::{Allocation, DevicePointer, Driver, EventId, StreamId};
use crate::error::{Error, Result};
use crate::predict::cost::element_bytes;
use crate::random::Philox;
use crate::statistics::{quantile, sorted};

use half::bf16;

/// A GPU's L2 has forgotten a buffer after so many times its own size.
const L2_SIZES: u64 = 4;
const MOST_COPIES: u64 = 64;

/// How many copies keep L2 cold, where one launch touches so many bytes.
pub(super) fn cold_copies(driver: &dyn Driver, touched: u64) -> u64 {
    (L2_SIZES * driver.properties().l2_bytes).div_ceil(touched.max(1)).clamp(1, MOST_COPIES)
}

pub(super) fn on_cpu(driver: &dyn Driver) -> bool {
    driver.properties().l2_bytes == 0
}

/// How many samples by default.
pub(super) fn samples(driver: &dyn Driver, asked: Option<usize>) -> usize {
    asked.unwrap_or(if on_cpu(driver) { 3 } else { 30 }).max(1)
}

/// What one launch works on, as many times as L2 needs to be cold.
pub(super) struct Copies<T> {
    pub copies: Vec<T>,
    allocations: Vec<Allocation>,
}

/// Allocates the buffers of one copy.
pub(super) struct Buffers<'a> {
    pub driver: &'a mut dyn Driver,
    allocations: &'a mut Vec<Allocation>,
}

impl<T> Copies<T> {
    /// `touched`: bytes that one launch touches, the fewest of all that will be timed; `allocated`:
    /// bytes of one copy.
    ///
    /// Errors: they do not fit the device's memory.
    pub fn new(
        driver: &mut dyn Driver,
        touched: u64,
        allocated: u64,
        mut make: impl FnMut(&mut Buffers) -> Result<T>,
    ) -> Result<Self> {
        let count = cold_copies(driver, touched);
        check_fits(driver, count * allocated)?;
        let mut allocations = vec![];
        let mut buffers = Buffers { driver, allocations: &mut allocations };
        let copies: Result<Vec<T>> = (0..count).map(|_| make(&mut buffers)).collect();
        Ok(Copies { copies: copies?, allocations })
    }

    /// Times `launch`, once on each copy in a sample, one sample after the other without a gap. One
    /// before the first does not count: after it the host is ahead of the device.
    pub fn time(
        &self,
        driver: &mut dyn Driver,
        samples: usize,
        mut launch: impl FnMut(&mut dyn Driver, &T) -> Result<()>,
    ) -> Result<Timing> {
        let [timing] =
            self.time_in_turn(driver, samples, |driver, copy, _| launch(driver, copy))?;
        Ok(timing)
    }

    /// The same of `N` things to launch, whose samples alternate; `launch` gets which one.
    pub fn time_in_turn<const N: usize>(
        &self,
        driver: &mut dyn Driver,
        samples: usize,
        mut launch: impl FnMut(&mut dyn Driver, &T, usize) -> Result<()>,
    ) -> Result<[Timing; N]> {
        let ends: Vec<EventId> =
            (0..=N * samples).map(|_| driver.new_event()).collect::<Result<_>>()?;
        // The one that does not count comes before its first that does.
        let turns = [0].into_iter().chain((0..N * samples).map(|sample| sample % N));
        for (&end, turn) in ends.iter().zip(turns) {
            for copy in &self.copies {
                launch(driver, copy, turn)?;
            }
            driver.record(end, StreamId::MAIN)?;
        }
        let count = self.copies.len();
        let microseconds = between(driver, &ends)?;
        driver.synchronize()?;
        Ok(std::array::from_fn(|turn| {
            let of_turn = microseconds.iter().skip(turn).step_by(N);
            Timing::new(of_turn.map(|all| all / count as f64).collect(), count)
        }))
    }

    /// Gives the memory back.
    pub fn release(self, driver: &mut dyn Driver) -> Result<()> {
        self.allocations.into_iter().try_for_each(|buffer| driver.release(buffer))
    }
}

pub(super) fn check_fits(driver: &dyn Driver, needed: u64) -> Result<()> {
    let free = driver.free_bytes()?;
    if needed <= free {
        return Ok(());
    }
    Err(Error::Usage {
        what: format!(
            "these sizes need {} MiB, {} has {} MiB free",
            needed >> 20,
            driver.device(),
            free >> 20
        ),
        remedy: "give smaller sizes".to_string(),
    })
}

impl Buffers<'_> {
    /// Zeros.
    pub fn zeros(&mut self, label: &str, bytes: u64) -> Result<DevicePointer> {
        let buffer = self.driver.allocate(label, bytes)?;
        self.allocations.push(buffer);
        self.driver.fill(StreamId::MAIN, buffer.address, bytes, 0)?;
        Ok(buffer.address)
    }

    /// Independent draws from N(0, 1) in this type, the same for every run.
    pub fn normals(&mut self, label: &str, dtype: Dtype, count: usize) -> Result<DevicePointer> {
        let bytes = drawn_normals(label, dtype, count);
        self.repeated(label, &bytes, count as u64 * element_bytes(dtype))
    }

    /// Independent i32 from 0 to `end` - 1.
    pub fn below(&mut self, label: &str, end: usize, count: usize) -> Result<DevicePointer> {
        let values = integers_below(stream(label), end, count.min(DRAWN));
        self.repeated(label, bytemuck::cast_slice(&values), 4 * count as u64)
    }

    /// i32 from 0 to `end` - 1, again and again.
    pub fn counting(&mut self, label: &str, end: usize, count: usize) -> Result<DevicePointer> {
        let values: Vec<i32> = (0..end as i32).collect();
        self.repeated(label, bytemuck::cast_slice(&values), 4 * count as u64)
    }

    fn repeated(&mut self, label: &str, bytes: &[u8], total: u64) -> Result<DevicePointer> {
        let buffer = self.driver.allocate(label, total)?;
        self.allocations.push(buffer);
        let mut at = 0;
        while at < total {
            let length = (total - at).min(bytes.len() as u64);
            let to = buffer.address.offset(at);
            self.driver.to_device(StreamId::MAIN, &bytes[..length as usize], to)?;
            at += length;
        }
        Ok(buffer.address)
    }
}

/// Drawing is slow: a larger buffer repeats the first million.
const DRAWN: usize = 1 << 20;

/// Of `count` normals as they lie in memory, the first million at most.
pub(super) fn drawn_normals(label: &str, dtype: Dtype, count: usize) -> Vec<u8> {
    let mut values = vec![0f32; count.min(DRAWN)];
    Philox::new(0, stream(label)).fill_normal(0, &mut values);
    match dtype {
        Dtype::F32 => bytemuck::cast_slice(&values).to_vec(),
        Dtype::Bf16 => {
            let narrow: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            bytemuck::cast_slice(&narrow).to_vec()
        }
    }
}

fn stream(label: &str) -> u64 {
    label.bytes().fold(0, |hash: u64, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)))
}

/// Independent draws from 0 to `end` - 1, the same for every run.
pub(super) fn integers_below(stream: u64, end: usize, count: usize) -> Vec<i32> {
    let generator = Philox::new(0, stream);
    let draw = |i: u64| (generator.uniform_f64(i) * end as f64) as i32;
    (0..count as u64).map(draw).collect()
}

/// Times between events that were recorded one after the other.
pub(super) fn between(driver: &mut dyn Driver, events: &[EventId]) -> Result<Vec<f64>> {
    let pairs = events.windows(2);
    pairs.map(|pair| Ok(driver.elapsed_ms(pair[0], pair[1])? * 1e3)).collect()
}

/// Sorted samples; never empty.
pub(super) struct Timing {
    microseconds: Vec<f64>,
    pub launches_per_sample: usize,
}

impl Timing {
    pub fn new(microseconds: Vec<f64>, launches_per_sample: usize) -> Self {
        Timing { microseconds: sorted(microseconds), launches_per_sample }
    }

    pub fn samples(&self) -> usize {
        self.microseconds.len()
    }

    pub fn median(&self) -> f64 {
        quantile(&self.microseconds, 0.5)
    }

    pub fn fastest(&self) -> f64 {
        self.microseconds[0]
    }
}
