//! The products of training steps, to be timed one after the other: which there are, the buffers
//! that all of them share, and how their launches are timed.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

pub mod table;
pub mod tune;

use super::cost::{Cost, element_bytes};
use super::prediction::shapes::{self, GemmRow};
use super::sizes;
use super::step::{Machine, StepRequest};
use super::timing::{between, check_fits, cold_copies, drawn_normals, on_cpu};
use crate::config::Dtype;
use crate::cuda::gemm::tuned::Table;
use crate::cuda::gemm::{Choice, Gemm, GemmPlan, Layout, Output, Product};
use crate::cuda::peaks::H200;
use crate::cuda::{Allocation, Driver, EventId, Family, StreamId};
use crate::error::Result;

/// Which products, and how long. Empty or `None`: what suits the machine.
#[derive(Clone, Default, Debug)]
pub struct ProductsRequest {
    /// Of the paper's models; on the CPU one tiny model.
    pub presets: Vec<String>,
    /// key=value
    pub sets: Vec<String>,
    /// M, N, K instead of those of any model.
    pub product: Option<[usize; 3]>,
    pub layout: Option<Layout>,
    pub family: Option<Family>,
    pub dtype: Option<Dtype>,
    pub samples: Option<usize>,
    /// After so many no further product is begun.
    pub seconds: Option<f64>,
    /// Instead of the table that is compiled in.
    pub choices: Option<Table>,
}

/// One product, however many steps and places of a step it is in.
#[derive(Serialize, Clone, PartialEq, Debug)]
pub struct Wanted {
    pub layout: Layout,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// "130m, 16384 tokens"
    pub of: Vec<String>,
    /// The largest share that it is reckoned to have of one of these training steps.
    pub step_share: f64,
}

impl Wanted {
    pub fn sizes(&self) -> [usize; 3] {
        [self.m, self.n, self.k]
    }
}

impl ProductsRequest {
    pub(super) fn dtype(&self) -> Dtype {
        self.dtype.unwrap_or(Dtype::Bf16)
    }

    /// The kernels to be timed or to be chosen from, with the choices that were given.
    pub(super) fn kernels(&self, driver: &mut dyn Driver) -> Result<Gemm> {
        let kernels = Gemm::new(driver, self.dtype(), self.family)?;
        Ok(match &self.choices {
            Some(table) => kernels.with_table(driver.properties(), table),
            None => kernels,
        })
    }

    /// Each product once, the largest share of a step first.
    ///
    /// Errors: an unknown preset or key; sizes that cannot be counted.
    pub(super) fn wanted(&self, driver: &dyn Driver) -> Result<Vec<Wanted>> {
        let layouts = [Layout::Nt, Layout::Nn, Layout::Tn].into_iter();
        let layouts = layouts.filter(|&it| self.layout.is_none_or(|layout| layout == it));
        if let Some([m, n, k]) = self.product {
            for sides in [[m, k], [n, k], [m, n]] {
                sizes::check("a factor or result", &sides)?;
            }
            let one = |layout| Wanted { layout, m, n, k, of: vec![], step_share: 0.0 };
            return Ok(layouts.map(one).collect());
        }
        let rows = if self.presets.is_empty() && on_cpu(driver) {
            let tiny = StepRequest { preset: None, sets: self.sets.clone() };
            shapes::rows(&tiny.resolve(Machine::Cpu, Some(Dtype::Bf16))?, &H200)?
        } else {
            shapes::listed(&self.presets, &self.sets)?
        };
        let asked = rows.into_iter().filter(|row| self.layout.is_none_or(|it| it == row.layout));
        Ok(distinct(asked))
    }
}

fn distinct(rows: impl Iterator<Item = GemmRow>) -> Vec<Wanted> {
    let mut all: Vec<Wanted> = vec![];
    for GemmRow { layout, m, n, k, preset, tokens, step_share, .. } in rows {
        let of = format!("{preset}, {tokens} tokens");
        let same = |it: &&mut Wanted| (it.layout, it.sizes()) == (layout, [m, n, k]);
        match all.iter_mut().find(same) {
            Some(found) => {
                found.step_share = found.step_share.max(step_share);
                found.of.push(of);
            }
            None => all.push(Wanted { layout, m, n, k, of: vec![of], step_share }),
        }
    }
    all.sort_by(|a, b| b.step_share.total_cmp(&a.step_share));
    all
}

/// Nothing, if there are none.
pub(super) fn write_not_reached(f: &mut fmt::Formatter<'_>, products: &[Wanted]) -> fmt::Result {
    if products.is_empty() {
        return Ok(());
    }
    writeln!(f, "not reached, {}; give more with --seconds:", products.len())?;
    products.iter().try_for_each(|Wanted { layout, m, n, k, step_share, .. }| {
        writeln!(f, "  {layout} M={m} N={n} K={k}, {:.1} % of a step", 100.0 * step_share)
    })
}

// ------------------------------------------------------------------ buffers

/// Factors that no launch writes, random normals; and results that are only added to.
pub(super) struct Arena {
    dtype: Dtype,
    factors: Allocation,
    results: Allocation,
}

/// What one product needs of it.
struct Room {
    copies: u64,
    /// Of a copy.
    a_bytes: u64,
    b_bytes: u64,
    result_bytes: u64,
}

/// A multiple of what addresses are aligned to, and of a line of the caches.
const LINE_BYTES: u64 = 256;

fn room(driver: &dyn Driver, dtype: Dtype, layout: Layout, [m, n, k]: [usize; 3]) -> Room {
    let element = element_bytes(dtype);
    let result_element = match layout {
        Layout::Nt | Layout::Nn => element,
        Layout::Tn => element_bytes(Dtype::F32),
    };
    let bytes = |rows: usize, columns: usize, element: u64| {
        ((rows * columns) as u64 * element).next_multiple_of(LINE_BYTES)
    };
    let (a_bytes, b_bytes) = (bytes(m, k, element), bytes(n, k, element));
    let result_bytes = bytes(m, n, result_element);
    let copies = cold_copies(driver, a_bytes + b_bytes + result_bytes);
    Room { copies, a_bytes, b_bytes, result_bytes }
}

impl Arena {
    /// Room for each of these products alone. Errors: it does not fit the device's memory.
    pub fn new(
        driver: &mut dyn Driver,
        dtype: Dtype,
        products: impl Iterator<Item = (Layout, [usize; 3])>,
    ) -> Result<Self> {
        let [mut factors, mut results] = [LINE_BYTES; 2];
        for (layout, sizes) in products {
            let room = room(driver, dtype, layout, sizes);
            factors = factors.max(room.copies * (room.a_bytes + room.b_bytes));
            results = results.max(room.copies * room.result_bytes);
        }
        check_fits(driver, factors + results)?;
        let arena = Arena {
            dtype,
            factors: driver.allocate("factors", factors)?,
            results: driver.allocate("results", results)?,
        };
        driver.fill(StreamId::MAIN, arena.results.address, results, 0)?;
        let drawn = drawn_normals("factors", dtype, (factors / element_bytes(dtype)) as usize);
        driver.to_device(StreamId::MAIN, &drawn, arena.factors.address)?;
        let mut filled = drawn.len() as u64;
        while filled < factors {
            let more = filled.min(factors - filled);
            let to = arena.factors.address.offset(filled);
            driver.on_device(StreamId::MAIN, arena.factors.address, to, more)?;
            filled += more;
        }
        Ok(arena)
    }

    /// Whether there is room for this product.
    pub fn holds(&self, driver: &dyn Driver, layout: Layout, sizes: [usize; 3]) -> bool {
        let room = room(driver, self.dtype, layout, sizes);
        room.copies * (room.a_bytes + room.b_bytes) <= self.factors.bytes
            && room.copies * room.result_bytes <= self.results.bytes
    }

    pub fn release(self, driver: &mut dyn Driver) -> Result<()> {
        driver.release(self.factors)?;
        driver.release(self.results)
    }

    /// As many plans as keep L2 cold, each of a copy of its own.
    pub fn plans(
        &self,
        driver: &mut dyn Driver,
        kernels: &Gemm,
        choice: Choice,
        sizes @ [m, n, k]: [usize; 3],
    ) -> Result<Vec<GemmPlan>> {
        let layout = choice.variant.layout;
        let Room { copies, a_bytes, b_bytes, result_bytes } =
            room(driver, self.dtype, layout, sizes);
        let plan = |copy: u64| {
            let a = self.factors.address.offset(copy * (a_bytes + b_bytes));
            let out = self.results.address.offset(copy * result_bytes);
            let output = Output::plain(layout);
            let product = Product { layout, m, n, k, a, b: a.offset(a_bytes), out, output };
            kernels.plan_with(driver, choice, &product)
        };
        (0..copies).map(plan).collect()
    }
}

pub(super) fn cost(choice: &Choice, dtype: Dtype, sizes: [usize; 3]) -> Cost {
    let what = format!("{choice}, {dtype}");
    let layout = choice.variant.layout;
    Cost { what, ..Cost::product(layout, dtype, sizes, Output::plain(layout)) }
}

// ------------------------------------------------------------------ timing

/// Times plans between events, with no gap for the host between one and the next.
#[derive(Default)]
pub(super) struct Stopwatch {
    /// Used again and again: a driver keeps every event that it gave.
    events: Vec<EventId>,
}

/// A GPU rests so long before a burst, and a burst is about as long as it takes to draw all of its
/// power: what follows is the speed of a product alone.
const REST: Duration = Duration::from_millis(50);
const BURST_MICROSECONDS: f64 = 50_000.0;
const MOST_SAMPLES: usize = 30;

impl Stopwatch {
    /// Microseconds of a launch in each of these sequences; each sequence launches its plans in
    /// turn, so many launches in all. The first sequence comes once more in front and does not
    /// count, while the host is not yet ahead of the device.
    pub fn time(
        &mut self,
        driver: &mut dyn Driver,
        sequences: &[(&[GemmPlan], usize)],
    ) -> Result<Vec<f64>> {
        while self.events.len() <= sequences.len() {
            self.events.push(driver.new_event()?);
        }
        let events = &self.events[..=sequences.len()];
        let ahead = sequences.first().copied();
        for (index, (plans, launches)) in
            ahead.into_iter().chain(sequences.iter().copied()).enumerate()
        {
            for plan in plans.iter().cycle().take(launches) {
                plan.launch(driver, StreamId::MAIN)?;
            }
            driver.record(events[index], StreamId::MAIN)?;
        }
        let times = between(driver, events)?;
        Ok(times
            .iter()
            .zip(sequences)
            .map(|(time, (_, launches))| time / *launches as f64)
            .collect())
    }

    /// Samples of one product after a rest; `asked`: how many.
    pub fn burst(
        &mut self,
        driver: &mut dyn Driver,
        plans: &[GemmPlan],
        asked: Option<usize>,
    ) -> Result<Vec<f64>> {
        let first = match (asked, on_cpu(driver)) {
            (Some(asked), _) => asked.max(1),
            (None, true) => 1,
            (None, false) => 3,
        };
        if !on_cpu(driver) {
            driver.synchronize()?;
            std::thread::sleep(REST);
        }
        let mut times = self.time(driver, &vec![(plans, plans.len()); first])?;
        if asked.is_none() && !on_cpu(driver) {
            let sample = times[0] * plans.len() as f64;
            let more = ((BURST_MICROSECONDS / sample) as usize).clamp(first, MOST_SAMPLES) - first;
            times.extend(self.time(driver, &vec![(plans, plans.len()); more])?);
        }
        Ok(times)
    }
}
