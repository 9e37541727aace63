//! What a device says of itself while it trains: clocks, temperature, power, and what holds its
//! clocks down. A thread of its own asks, because between two steps a device would be asked while
//! it is idle. Which readings there are is the device's to say; here they are only gathered.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Of one moment; what the device does not tell is left out.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Reading {
    /// Of the multiprocessors.
    pub sm_clock_mhz: Option<f64>,
    pub memory_clock_mhz: Option<f64>,
    pub temperature_celsius: Option<f64>,
    pub power_watts: Option<f64>,
    /// What holds the clocks down, as NVML names it: "SW_POWER_CAP".
    pub throttled_by: Vec<String>,
}

/// Asks a device.
pub type Sensors = Box<dyn FnMut() -> Reading + Send>;

/// Least, mean and most of what was read.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Span {
    pub least: f64,
    pub mean: f64,
    pub most: f64,
}

/// Of a session, while it trained.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Conditions {
    pub readings: u64,
    pub sm_clock_mhz: Option<Span>,
    pub memory_clock_mhz: Option<Span>,
    pub temperature_celsius: Option<Span>,
    pub power_watts: Option<Span>,
    /// The share of the readings in which this held the clocks down.
    pub throttled: BTreeMap<String, f64>,
}

impl Conditions {
    /// `None` without readings.
    pub fn of<'a>(readings: impl IntoIterator<Item = &'a Reading>) -> Option<Self> {
        let mut tally = Tally::default();
        readings.into_iter().for_each(|reading| tally.add(reading));
        tally.conditions()
    }
}

/// One line, without its end.
impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "while it trained, {} readings", self.readings)?;
        let spans = [
            ("SM clock", self.sm_clock_mhz, "MHz"),
            ("memory clock", self.memory_clock_mhz, "MHz"),
            ("temperature", self.temperature_celsius, "C"),
            ("power", self.power_watts, "W"),
        ];
        for (what, span, unit) in spans {
            if let Some(Span { least, mean, most }) = span {
                write!(f, "; {what} {mean:.0} {unit} ({least:.0} to {most:.0})")?;
            }
        }
        for (reason, share) in &self.throttled {
            write!(f, "; {reason} in {:.0}%", 100.0 * share)?;
        }
        Ok(())
    }
}

#[derive(Default)]
struct Tally {
    readings: u64,
    /// In the order of [`values`].
    sums: [Sum; 4],
    throttled: BTreeMap<String, u64>,
}

#[derive(Clone, Copy, Default)]
struct Sum {
    count: u64,
    sum: f64,
    least: f64,
    most: f64,
}

fn values(reading: &Reading) -> [Option<f64>; 4] {
    let Reading { sm_clock_mhz, memory_clock_mhz, temperature_celsius, power_watts, .. } = reading;
    [*sm_clock_mhz, *memory_clock_mhz, *temperature_celsius, *power_watts]
}

impl Sum {
    fn add(&mut self, value: f64) {
        let first = self.count == 0;
        self.least = if first { value } else { self.least.min(value) };
        self.most = if first { value } else { self.most.max(value) };
        self.sum += value;
        self.count += 1;
    }

    fn span(self) -> Option<Span> {
        let Sum { count, sum, least, most } = self;
        (count > 0).then(|| Span { least, mean: sum / count as f64, most })
    }
}

impl Tally {
    fn add(&mut self, reading: &Reading) {
        self.readings += 1;
        for (sum, value) in self.sums.iter_mut().zip(values(reading)) {
            value.into_iter().for_each(|value| sum.add(value));
        }
        for reason in &reading.throttled_by {
            *self.throttled.entry(reason.clone()).or_default() += 1;
        }
    }

    fn conditions(self) -> Option<Conditions> {
        let Tally { readings, sums, throttled } = self;
        let [sm_clock_mhz, memory_clock_mhz, temperature_celsius, power_watts] =
            sums.map(Sum::span);
        let share = |(reason, count): (String, u64)| (reason, count as f64 / readings as f64);
        (readings > 0).then(|| Conditions {
            readings,
            sm_clock_mhz,
            memory_clock_mhz,
            temperature_celsius,
            power_watts,
            throttled: throttled.into_iter().map(share).collect(),
        })
    }
}

/// Reads sensors at intervals, whenever [`Monitor::training`] is on.
pub struct Monitor {
    training: Arc<AtomicBool>,
    /// Dropped to end the thread.
    end: Sender<()>,
    thread: JoinHandle<Option<Conditions>>,
}

impl Monitor {
    pub fn start(mut sensors: Sensors, every: Duration) -> Self {
        let training = Arc::new(AtomicBool::new(false));
        let (end, ended) = mpsc::channel::<()>();
        let wanted = Arc::clone(&training);
        let thread = thread::spawn(move || {
            let mut tally = Tally::default();
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(every) {
                if wanted.load(Ordering::Relaxed) {
                    tally.add(&sensors());
                }
            }
            tally.conditions()
        });
        Monitor { training, end, thread }
    }

    /// Evaluations, samples and checkpoints are not to be read.
    pub fn training(&self, on: bool) {
        self.training.store(on, Ordering::Relaxed);
    }

    /// `None` if nothing was read.
    pub fn finish(self) -> Option<Conditions> {
        drop(self.end);
        self.thread.join().unwrap_or(None)
    }
}
