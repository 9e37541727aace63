//! How fast a run trains: its clock, the rates of its steps, and what a GPU's sensors say
//! meanwhile.

use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::sensors::{Monitor, Sensors};
use crate::throughput::{Clock, MemoryUse, Meter, Throughput, TokenCost, Utilisation};

/// How often a device is asked for its clocks, temperature and power.
const READINGS_EVERY: Duration = Duration::from_secs(1);

/// Of one process.
pub struct Pace {
    clock: Clock,
    meter: Meter,
    monitor: Option<Monitor>,
    cost: TokenCost,
    /// By the memory table.
    planned_bytes: u64,
    free_after_warm_up: Option<u64>,
}

/// Of one step.
pub struct StepRate {
    pub tokens_per_second: f64,
    /// `None` where the machine's peak is not known.
    pub mfu: Option<f64>,
}

impl Pace {
    pub fn new(cost: TokenCost, planned_bytes: u64, sensors: Option<Sensors>) -> Self {
        let monitor = sensors.map(|sensors| Monitor::start(sensors, READINGS_EVERY));
        let (clock, meter) = (Clock::new(Instant::now()), Meter::default());
        Pace { clock, meter, monitor, cost, planned_bytes, free_after_warm_up: None }
    }

    /// A step is to be enqueued, and none is under way.
    pub fn step_begins(&mut self) {
        self.clock.step_begins(Instant::now());
        self.read_sensors(true);
    }

    /// A step of so many positions is over; `another`: the next one is under way.
    pub fn step_ends(&mut self, tokens: u64, another: bool, device: &impl Backend) -> StepRate {
        let seconds = self.clock.step_ends(Instant::now());
        if !another {
            self.read_sensors(false);
        }
        self.meter.add(tokens, seconds);
        if self.meter.is_warm() && self.free_after_warm_up.is_none() {
            self.free_after_warm_up = device.own_free_bytes();
        }
        let tokens_per_second = tokens as f64 / seconds;
        let mfu = Utilisation::of(tokens_per_second, &self.cost).map(|used| used.mfu);
        StepRate { tokens_per_second, mfu }
    }

    /// Tokens per second over the last steps; `None` while none counts.
    pub fn recent(&self) -> Option<f64> {
        self.meter.recent()
    }

    /// What follows is the run's own time.
    pub fn run_goes_on(&mut self) {
        self.clock.run_goes_on(Instant::now());
    }

    /// Seconds since [`Pace::run_goes_on`].
    pub fn run_pauses(&self) -> f64 {
        self.clock.run_pauses(Instant::now())
    }

    /// Of all steps, `first_step` not among them; `None` if too few were trained to say.
    pub fn finish(
        &mut self,
        first_step: u64,
        last_step: u64,
        device: &impl Backend,
    ) -> Option<Throughput> {
        let conditions = self.monitor.take().and_then(Monitor::finish);
        let steady = self.meter.steady()?;
        Some(Throughput {
            first_step,
            last_step,
            utilisation: Utilisation::of(steady.tokens_per_second, &self.cost),
            steady,
            memory: MemoryUse::of(self.planned_bytes, self.free_after_warm_up, device),
            conditions,
        })
    }

    fn read_sensors(&self, on: bool) {
        if let Some(monitor) = &self.monitor {
            monitor.training(on);
        }
    }
}
