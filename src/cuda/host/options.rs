//! How the machine runs kernels.

use std::ffi::OsString;
use std::time::Duration;

use super::abi;
use crate::config::choice::choice;
use crate::error::{Error, Result};

choice! {
    /// Which ready thread of a block runs next.
    pub enum Order {
        Fifo = "fifo",
        Lifo = "lifo",
        Random = "random",
    }
}

choice! {
    /// When an asynchronous copy happens: when it must, when it is issued, or at any time between.
    pub enum Asynchronous {
        Late = "late",
        Early = "early",
        Anytime = "anytime",
    }
}

/// How the machine runs kernels. A correct kernel gives the same bits under all of them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Options {
    pub order: Order,
    pub asynchronous: Asynchronous,
    /// Of the random schedules.
    pub seed: u64,
    /// Checks every access for races, bounds and uninitialised shared memory; many times slower.
    pub race: bool,
    /// Threads of the operating system that run blocks; 0: one for each core.
    pub workers: u32,
    /// How long a thread may run without a wrapper call; zero: the machine's own limit.
    pub watchdog: Duration,
    /// How many multiprocessors the machine says it has: cooperative grids are limited by it.
    pub multiprocessors: u32,
    /// Every launch is checked as a dependent one, whatever is before it.
    pub dependent: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            order: Order::Fifo,
            asynchronous: Asynchronous::Late,
            seed: 0,
            race: false,
            workers: 0,
            watchdog: Duration::ZERO,
            multiprocessors: 4,
            dependent: false,
        }
    }
}

impl Options {
    /// From SIMT_ORDER, SIMT_ASYNC, SIMT_SEED, SIMT_RACE, SIMT_WORKERS and SIMT_WATCHDOG_MS; what
    /// is not set is as in [`Options::default`].
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// As [`Options::from_env`], of any set of variables. Errors name the variable.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let read = |name: &str| variable(name).map(|text| text.to_string_lossy().into_owned());
        let mut options = Options::default();
        if let Some(order) = read("SIMT_ORDER") {
            options.order = order.parse().map_err(named("SIMT_ORDER"))?;
        }
        if let Some(asynchronous) = read("SIMT_ASYNC") {
            options.asynchronous = asynchronous.parse().map_err(named("SIMT_ASYNC"))?;
        }
        if let Some(seed) = read("SIMT_SEED") {
            options.seed = number("SIMT_SEED", &seed, u64::MAX)?;
        }
        if let Some(race) = read("SIMT_RACE") {
            options.race = number("SIMT_RACE", &race, 1)? == 1;
        }
        if let Some(workers) = read("SIMT_WORKERS") {
            options.workers = number("SIMT_WORKERS", &workers, 1024)? as u32;
        }
        if let Some(watchdog) = read("SIMT_WATCHDOG_MS") {
            let most = u64::from(u32::MAX);
            options.watchdog = Duration::from_millis(number("SIMT_WATCHDOG_MS", &watchdog, most)?);
        }
        Ok(options)
    }

    /// The variables that give the same schedule again.
    pub(super) fn variables(&self) -> String {
        let Options { order, asynchronous, seed, race, .. } = self;
        let race = u8::from(*race);
        format!("SIMT_ORDER={order} SIMT_ASYNC={asynchronous} SIMT_SEED={seed} SIMT_RACE={race}")
    }

    pub(super) fn abi(&self) -> abi::Options {
        abi::Options {
            seed: self.seed,
            workers: self.workers,
            order: match self.order {
                Order::Fifo => 0,
                Order::Lifo => 1,
                Order::Random => 2,
            },
            asynchronous: match self.asynchronous {
                Asynchronous::Late => 0,
                Asynchronous::Early => 1,
                Asynchronous::Anytime => 2,
            },
            race: u32::from(self.race),
            watchdog_ms: u32::try_from(self.watchdog.as_millis()).unwrap_or(u32::MAX),
        }
    }
}

fn named(variable: &'static str) -> impl Fn(Error) -> Error {
    move |error| match error {
        Error::Usage { what, remedy } => {
            Error::Usage { what: format!("{variable}: {what}"), remedy }
        }
        other => other,
    }
}

pub(in crate::cuda) fn number(variable: &str, text: &str, most: u64) -> Result<u64> {
    match text.parse::<u64>() {
        Ok(number) if number <= most => Ok(number),
        _ => Err(Error::Usage {
            what: format!("{variable}: `{text}` is not a number from 0 to {most}"),
            remedy: format!("set {variable} to such a number, or unset it"),
        }),
    }
}
