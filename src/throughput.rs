//! How fast a session trained: which of its steps count, and what is said of them.
//!
//! The first steps of a process never count: kernels are loaded, buffers touched, clocks raised.
//! What is not training (evaluations, samples, checkpoints) is not handed in. A session's figures
//! are one line of throughput.jsonl.

use std::collections::VecDeque;
use std::fmt;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::sensors::Conditions;
use crate::statistics::{quantile, sorted};

/// Steps of a process that do not count.
pub const WARM_UP_STEPS: u64 = 3;

/// What a person is shown while it trains: the rate over so many seconds of training, or over the
/// last step if that took longer.
const WINDOW_SECONDS: f64 = 30.0;

/// Fewer steps have no quarters to compare.
const STEPS_WITH_DRIFT: usize = 8;

/// The steps of a session.
#[derive(Default)]
pub struct Meter {
    seen: u64,
    /// Tokens and seconds.
    window: VecDeque<[f64; 2]>,
    /// Tokens per second of each step that counts.
    rates: Vec<f64>,
    seconds: f64,
}

impl Meter {
    pub fn add(&mut self, tokens: u64, seconds: f64) {
        self.seen += 1;
        if self.seen <= WARM_UP_STEPS {
            return;
        }
        self.rates.push(tokens as f64 / seconds);
        self.seconds += seconds;
        self.window.push_back([tokens as f64, seconds]);
        let mut inside: f64 = self.window.iter().map(|step| step[1]).sum();
        while self.window.len() > 1 && inside > WINDOW_SECONDS {
            inside -= self.window.pop_front().map_or(0.0, |step| step[1]);
        }
    }

    /// Tokens per second over the last steps; `None` while none counts.
    pub fn recent(&self) -> Option<f64> {
        let sum = |of: usize| self.window.iter().map(|step| step[of]).sum::<f64>();
        (!self.window.is_empty()).then(|| sum(0) / sum(1))
    }

    /// Whether the next step counts.
    pub fn is_warm(&self) -> bool {
        self.seen >= WARM_UP_STEPS
    }

    /// `None` where no step counts.
    pub fn steady(&self) -> Option<Steady> {
        if self.rates.is_empty() {
            return None;
        }
        let drift = || {
            let quarter = self.rates.len() / 4;
            let ends = [&self.rates[..quarter], &self.rates[self.rates.len() - quarter..]];
            let [first, last] = ends.map(|rates| quantile(&sorted(rates.to_vec()), 0.5));
            last / first - 1.0
        };
        let rates = sorted(self.rates.clone());
        Some(Steady {
            warm_up_steps: WARM_UP_STEPS,
            counted_steps: self.rates.len() as u64,
            seconds: self.seconds,
            tokens_per_second: quantile(&rates, 0.5),
            middle_half: [quantile(&rates, 0.25), quantile(&rates, 0.75)],
            slowest: rates[0],
            drift: (self.rates.len() >= STEPS_WITH_DRIFT).then(drift),
        })
    }
}

/// Splits a session's time into that of steps, that of the run (steps, evaluations and samples) and
/// the rest, which counts for neither (checkpoints). The caller gives every instant.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// When the step before was over, or the first of those under way was enqueued.
    step_from: Instant,
    /// From when on time counts as the run's.
    run_from: Instant,
}

impl Clock {
    pub fn new(now: Instant) -> Self {
        Clock { step_from: now, run_from: now }
    }

    /// A step is enqueued with none under way: what passed since the last one was no training.
    pub fn step_begins(&mut self, now: Instant) {
        self.step_from = now;
    }

    /// Seconds of a step that is over. The one after it, if it is under way, counts from here on.
    pub fn step_ends(&mut self, now: Instant) -> f64 {
        let seconds = now.duration_since(self.step_from).as_secs_f64();
        self.step_from = now;
        seconds
    }

    /// Seconds of the run, up to a pause that is not its own.
    pub fn run_pauses(&self, now: Instant) -> f64 {
        now.duration_since(self.run_from).as_secs_f64()
    }

    pub fn run_goes_on(&mut self, now: Instant) {
        self.run_from = now;
    }
}

/// Of the steps that count.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Steady {
    /// Left out, at the beginning of the process.
    pub warm_up_steps: u64,
    pub counted_steps: u64,
    /// Of the steps that count.
    pub seconds: f64,
    /// Median over the steps.
    pub tokens_per_second: f64,
    /// First and third quartile.
    pub middle_half: [f64; 2],
    pub slowest: f64,
    /// Median of the last quarter of the steps over that of the first one, less 1.
    pub drift: Option<f64>,
}

/// Model FLOPs utilisation at [`Steady::tokens_per_second`], and what it is made of.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Utilisation {
    pub mfu: f64,
    pub flops_per_token: u64,
    pub flops_formula: String,
    /// Of the machine's matmul units, dense, in the type of activations.
    pub peak_flops_per_second: f64,
}

impl Utilisation {
    /// `None` where the machine's peak is not known.
    pub fn of(tokens_per_second: f64, cost: &TokenCost) -> Option<Self> {
        let peak_flops_per_second = cost.peak_flops_per_second?;
        Some(Utilisation {
            mfu: tokens_per_second * cost.flops as f64 / peak_flops_per_second,
            flops_per_token: cost.flops,
            flops_formula: cost.flops_formula.to_string(),
            peak_flops_per_second,
        })
    }
}

/// What training on one token costs, and what the machine does at most.
#[derive(Clone, Copy, Debug)]
pub struct TokenCost {
    pub flops: u64,
    pub flops_formula: &'static str,
    pub peak_flops_per_second: Option<f64>,
}

/// The device's memory, in bytes; what it does not tell is left out.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct MemoryUse {
    /// By the memory table, all of it.
    pub planned: u64,
    /// In buffers; the table without what the program itself takes.
    pub allocated: Option<u64>,
    /// The most that the process had at one time, the program included: of host memory. No GPU
    /// keeps count of it.
    pub peak: Option<u64>,
    /// Of a GPU's memory, what nobody had taken after the steps that do not count, and at the end:
    /// equal where a run takes no memory while it trains and no other program uses the GPU.
    pub free_after_warm_up: Option<u64>,
    pub free_at_end: Option<u64>,
}

impl MemoryUse {
    /// Of a program that has run on this backend, at its end.
    pub fn of(planned: u64, free_after_warm_up: Option<u64>, backend: &impl Backend) -> Self {
        let (allocated, peak) = (backend.allocated_bytes(), backend.peak_bytes());
        let free_at_end = backend.own_free_bytes();
        MemoryUse { planned, allocated, peak, free_after_warm_up, free_at_end }
    }
}

/// One session, a line of throughput.jsonl.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Throughput {
    /// Steps done when it began and when it ended.
    pub first_step: u64,
    pub last_step: u64,
    #[serde(flatten)]
    pub steady: Steady,
    pub utilisation: Option<Utilisation>,
    pub memory: MemoryUse,
    pub conditions: Option<Conditions>,
}

/// "0.3% slower than the first"
fn drift_words(drift: f64) -> String {
    let percent = format!("{:.1}%", 100.0 * drift.abs());
    match percent.as_str() {
        "0.0%" => "as fast as the first".to_string(),
        _ if drift < 0.0 => format!("{percent} slower than the first"),
        _ => format!("{percent} faster than the first"),
    }
}

/// The lines that people read; no line end after the last.
impl fmt::Display for Throughput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Steady {
            warm_up_steps, counted_steps, tokens_per_second, middle_half, slowest, ..
        } = &self.steady;
        write!(
            f,
            "{tokens_per_second:.0} tokens/s: median of {counted_steps} steps after the first \
             {warm_up_steps}; half of them {:.0} to {:.0}, the slowest {slowest:.0}",
            middle_half[0], middle_half[1]
        )?;
        if let Some(drift) = self.steady.drift {
            write!(f, "; the last quarter {}", drift_words(drift))?;
        }
        if let Some(used) = &self.utilisation {
            write!(
                f,
                "\n{:.1}% MFU = tokens/s x {} FLOPs per token ({}) / {:.1}e12, the dense peak",
                100.0 * used.mfu,
                used.flops_per_token,
                used.flops_formula,
                used.peak_flops_per_second / 1e12
            )?;
        }
        write!(f, "\n{}", self.memory)?;
        self.conditions.iter().try_for_each(|conditions| write!(f, "\n{conditions}"))
    }
}

/// One line, without its end.
impl fmt::Display for MemoryUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / (1u64 << 20) as f64;
        let MemoryUse { planned, allocated, peak, free_after_warm_up, free_at_end } = *self;
        write!(f, "memory: {:.1} MiB planned", mib(planned))?;
        for (what, bytes) in [("in buffers", allocated), ("taken at most", peak)] {
            if let Some(bytes) = bytes {
                write!(f, ", {:.1} {what}", mib(bytes))?;
            }
        }
        if let (Some(warm), Some(end)) = (free_after_warm_up, free_at_end) {
            let (warm, end) = (mib(warm), mib(end));
            write!(f, "; {warm:.1} MiB of the GPU free after the warm-up, {end:.1} at the end")?;
        }
        Ok(())
    }
}
