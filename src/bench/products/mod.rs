//! The products of training steps, each with its epilogue, to be timed one
//! after the other: which there are, the buffers that all of them share, and how their launches are
//! timed.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

pub mod table;
pub mod tune;

use super::sizes;
use super::step_request::{Machine, StepRequest};
use super::timing::{between, check_fits, cold_copies, drawn_normals, on_cpu};
use crate::config::Dtype;
use crate::cuda::gemm::tuned::{self, Table};
use crate::cuda::gemm::{Choice, Epilogue, Gemm, GemmPlan, Layout};
use crate::cuda::peaks::H200;
use crate::cuda::{Allocation, DevicePointer, Driver, EventId, Family, StreamId};
use crate::error::Result;
use crate::predict::cost::element_bytes;
use crate::predict::product::{Addresses, MOST_POSITIONS, Operands};
use crate::predict::{GemmRow, StepProduct, products};

/// Which products, and how long. Empty or `None`: what suits the machine.
#[derive(Clone, Default, Debug)]
pub struct ProductsRequest {
    /// Of the paper's models; on the CPU one tiny model.
    pub presets: Vec<String>,
    /// key=value
    pub sets: Vec<String>,
    /// Of the heads; empty: the presets' own.
    pub vocabs: Vec<usize>,
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
    #[serde(flatten)]
    pub product: StepProduct,
    /// "130m, 16384 tokens"
    pub of: Vec<String>,
    /// The largest share that it is estimated to have of one of these training steps.
    pub step_share: f64,
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

    /// Each product once, the largest share of a step first; with its epilogue, where these kernels
    /// have that.
    ///
    /// Errors: an unknown preset or key; sizes that cannot be counted.
    pub(super) fn wanted(&self, driver: &dyn Driver, kernels: &Gemm) -> Result<Vec<Wanted>> {
        let is_asked = |layout| self.layout.is_none_or(|asked| asked == layout);
        if let Some(sizes) = self.product {
            check_sizes(sizes)?;
            let layouts = [Layout::Nt, Layout::Nn, Layout::Tn].into_iter();
            let one = |layout| {
                let product = StepProduct::plain(layout, sizes);
                Wanted { product, of: vec![], step_share: 0.0 }
            };
            return Ok(layouts.filter(|&layout| is_asked(layout)).map(one).collect());
        }
        let mut rows = if self.presets.is_empty() && self.vocabs.is_empty() && on_cpu(driver) {
            let tiny = StepRequest { sets: self.sets.clone(), ..StepRequest::default() };
            let tiny = tiny.resolve(Machine::Cpu, Some(Dtype::Bf16))?;
            products::rows(&tiny, &H200, tuned::built_in())?
        } else {
            products::listed(&self.presets, &self.sets, &self.vocabs)?
        };
        rows.retain(|row| is_asked(row.product.layout));
        for GemmRow { product, .. } in &mut rows {
            if !kernels.fuses(product.layout, product.output()) {
                *product = StepProduct::plain(product.layout, product.sizes());
            }
        }
        Ok(distinct(rows))
    }
}

/// Errors: a factor or a result that cannot be counted.
fn check_sizes([m, n, k]: [usize; 3]) -> Result<()> {
    let matrices = [[m, k], [n, k], [m, n]];
    matrices.iter().try_for_each(|sides| sizes::check("a factor or result", sides))
}

fn distinct(rows: Vec<GemmRow>) -> Vec<Wanted> {
    let mut all: Vec<Wanted> = vec![];
    for GemmRow { product, preset, tokens, step_share, .. } in rows {
        let of = format!("{preset}, {tokens} tokens");
        match all.iter_mut().find(|it| it.product.is(&product)) {
            Some(found) => {
                found.step_share = found.step_share.max(step_share);
                found.of.push(of);
            }
            None => all.push(Wanted { product, of: vec![of], step_share }),
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
    products.iter().try_for_each(|Wanted { product, step_share, .. }| {
        let StepProduct { layout, epilogue, m, n, k, .. } = product;
        writeln!(
            f,
            "  {layout} {epilogue} M={m} N={n} K={k}, {:.1} % of a step",
            100.0 * step_share
        )
    })
}

// ------------------------------------------------------------------ buffers

/// Matrices that no launch writes, random normals; and results that are only added to.
pub(super) struct Arena {
    dtype: Dtype,
    factors: Allocation,
    results: Allocation,
    /// Of rotary embedding, where a product asks for it: a table, after it the rows' positions.
    angles: Option<Allocation>,
}

/// What one product needs of it: copies, and the bytes of each operand of one of them.
struct Room {
    copies: u64,
    a_bytes: u64,
    b_bytes: u64,
    read_bytes: u64,
    out_bytes: u64,
    product_bytes: u64,
}

impl Room {
    /// Of a copy.
    fn factors(&self) -> u64 {
        self.a_bytes + self.b_bytes + self.read_bytes
    }

    /// Of a copy.
    fn results(&self) -> u64 {
        self.out_bytes + self.product_bytes
    }
}

/// A multiple of what addresses are aligned to, and of a line of the caches.
const LINE_BYTES: u64 = 256;
/// Heads of any width find a table.
const TABLE_BYTES: u64 = (MOST_POSITIONS * 256 * size_of::<f32>()) as u64;

fn room(driver: &dyn Driver, dtype: Dtype, asked: &StepProduct) -> Room {
    let Operands { a, b, read, out, product } = asked.operands();
    let bytes =
        |elements: usize, element: u64| (elements as u64 * element).next_multiple_of(LINE_BYTES);
    let [a_bytes, b_bytes, read_bytes, product_bytes] =
        [a, b, read, product].map(|elements| bytes(elements, element_bytes(dtype)));
    let out_bytes = bytes(out, asked.out_element(dtype));
    let room = Room { copies: 1, a_bytes, b_bytes, read_bytes, out_bytes, product_bytes };
    Room { copies: cold_copies(driver, room.factors() + room.results()), ..room }
}

impl Arena {
    /// Room for each of these products alone. Errors: it does not fit the device's memory.
    pub fn new<'a>(
        driver: &mut dyn Driver,
        dtype: Dtype,
        products: impl Iterator<Item = &'a StepProduct>,
    ) -> Result<Self> {
        let [mut factors, mut results] = [LINE_BYTES; 2];
        let mut most_rotated = 0;
        for product in products {
            let room = room(driver, dtype, product);
            factors = factors.max(room.copies * room.factors());
            results = results.max(room.copies * room.results());
            if product.epilogue == Epilogue::Rotary {
                most_rotated = most_rotated.max(product.m);
            }
        }
        check_fits(driver, factors + results)?;
        let arena = Arena {
            dtype,
            factors: driver.allocate("factors", factors)?,
            results: driver.allocate("results", results)?,
            angles: (most_rotated > 0).then(|| angles(driver, most_rotated)).transpose()?,
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
    pub fn holds(&self, driver: &dyn Driver, product: &StepProduct) -> bool {
        let room = room(driver, self.dtype, product);
        let angles = self.angles.map_or(0, |it| it.bytes);
        let rotated = product.epilogue == Epilogue::Rotary;
        room.copies * room.factors() <= self.factors.bytes
            && room.copies * room.results() <= self.results.bytes
            && (!rotated || TABLE_BYTES + positions_bytes(product.m) <= angles)
    }

    pub fn release(self, driver: &mut dyn Driver) -> Result<()> {
        let all = [Some(self.factors), Some(self.results), self.angles];
        all.into_iter().flatten().try_for_each(|memory| driver.release(memory))
    }

    /// As many plans as keep L2 cold, each of a copy of its own.
    pub fn plans(
        &self,
        driver: &mut dyn Driver,
        kernels: &Gemm,
        choice: Choice,
        product: &StepProduct,
    ) -> Result<Vec<GemmPlan>> {
        let room = room(driver, self.dtype, product);
        let table = self.angles.map_or(DevicePointer::NULL, |it| it.address);
        let plan = |copy: u64| {
            let a = self.factors.address.offset(copy * room.factors());
            let out = self.results.address.offset(copy * room.results());
            let b = a.offset(room.a_bytes);
            let at = Addresses {
                a,
                b,
                read: b.offset(room.b_bytes),
                out,
                product: out.offset(room.out_bytes),
                table,
                positions: table.offset(TABLE_BYTES),
            };
            kernels.plan_with(driver, choice, &product.at(&at))
        };
        (0..room.copies).map(plan).collect()
    }
}

fn positions_bytes(rows: usize) -> u64 {
    (rows * size_of::<i32>()) as u64
}

/// A table, numbers that are no sines, and the positions of so many rows, which every product with
/// fewer rows may take, too: those of its table come first, again and again.
fn angles(driver: &mut dyn Driver, rows: usize) -> Result<Allocation> {
    let memory = driver.allocate("angles", TABLE_BYTES + positions_bytes(rows))?;
    let values = (TABLE_BYTES / element_bytes(Dtype::F32)) as usize;
    let table = drawn_normals("angles", Dtype::F32, values);
    driver.to_device(StreamId::MAIN, &table, memory.address)?;
    let positions: Vec<i32> = (0..rows).map(|row| (row % MOST_POSITIONS) as i32).collect();
    let to = memory.address.offset(TABLE_BYTES);
    driver.to_device(StreamId::MAIN, bytemuck::cast_slice(&positions), to)?;
    Ok(memory)
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
/// Of a product that is launched without an end, on a GPU: the length of a sample, and how many of
/// one product alone.
const SLOT_MICROSECONDS: f64 = 20_000.0;
const SLOTS: usize = 5;

impl Stopwatch {
    /// Microseconds of a launch in each of these sequences; each sequence launches its plans in
    /// turn, so many launches in all. The first sequence runs twice, and the first time does not
    /// count: the host is not yet ahead of the device.
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

    /// Samples of one product that is launched on and on, before which as long a time does not
    /// count; without a rest, but for what else the device did not do.
    pub fn sustained(
        &mut self,
        driver: &mut dyn Driver,
        plans: &[GemmPlan],
        asked: Option<usize>,
    ) -> Result<Vec<f64>> {
        let first = self.time(driver, &[(plans, plans.len())])?[0];
        let slot = match on_cpu(driver) {
            true => plans.len(),
            false => ((SLOT_MICROSECONDS / first) as usize).max(plans.len()),
        };
        let samples = asked.unwrap_or(if on_cpu(driver) { 1 } else { SLOTS }).max(1);
        let times = self.time(driver, &vec![(plans, slot); 2 * samples])?;
        Ok(times[samples..].to_vec())
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
