//! The machines that a kernel test runs on, and how exact a kernel must be.
//!
//! A machine that is not here is skipped with the reason, unless ISOBATH_TEST_MACHINES (of simt,
//! ptx and cuda those that it names, with commas) asks for it: then it must be here, and the others
//! are left alone.

use half::bf16;
use isobath::backend::Backend;
use isobath::config::Dtype;
use isobath::cpu::Cpu;
use isobath::cuda::host::{Asynchronous, Host, Options, Order};
use isobath::cuda::nvidia::{self, Nvidia};
use isobath::cuda::{Allocation, Driver, host};
use isobath::tensor::{Kind, Shape, View};

use super::ptx::{self, Ptx};
use crate::support::normals;

/// Runs `test` on the CPU machine under several schedules, then with its race detector; on the
/// machine for PTX; and on a GPU. What it returns must be the same bits every time on one kind of
/// machine. Each kernel must wait for the one before it, whether there is one or not.
pub fn on_every_machine(test: impl FnMut(&mut dyn Driver) -> Vec<u8>) {
    on_every_machine_with(true, test);
}

/// The same for kernels that do not wait, which are those of kernels/conformance*.cu.
pub fn on_every_machine_in_turn(test: impl FnMut(&mut dyn Driver) -> Vec<u8>) {
    on_every_machine_with(false, test);
}

fn on_every_machine_with(dependent: bool, mut test: impl FnMut(&mut dyn Driver) -> Vec<u8>) {
    match simt_here() {
        Ok(()) => {
            let mut first: Option<Vec<u8>> = None;
            for options in schedules() {
                let options = Options { dependent, ..options };
                let found = test(&mut Host::new(options).unwrap());
                let expected = first.get_or_insert_with(|| found.clone());
                assert!(found == *expected, "{options:?} gives other bits than the first schedule");
            }
        }
        Err(error) => println!("skipped: no simt: {error}"),
    }
    let mut first: Option<Vec<u8>> = None;
    for seed in 0..ptx_schedules() {
        on_ptx(seed, |driver| {
            let found = test(driver);
            let expected = first.get_or_insert_with(|| found.clone());
            assert!(found == *expected, "PTX gives other bits under another schedule");
        });
    }
    on_gpu(|driver| {
        let first = test(driver);
        assert!(test(driver) == first, "the GPU gives other bits the second time");
    });
}

/// Runs `test` once on each machine, for what no schedule can change.
pub fn on_each_machine(mut test: impl FnMut(&mut dyn Driver)) {
    match simt_here() {
        Ok(()) => test(&mut Host::new(Options::default()).unwrap()),
        Err(error) => println!("skipped: no simt: {error}"),
    }
    on_ptx(0, &mut test);
    on_gpu(test);
}

/// One, because the machine is slow; several where it is asked for by name.
fn ptx_schedules() -> u64 {
    if std::env::var_os("ISOBATH_TEST_MACHINES").is_some() { 3 } else { 1 }
}

fn on_ptx(seed: u64, test: impl FnOnce(&mut dyn Driver)) {
    if let Some(mut machine) = ptx_machine(seed) {
        test(&mut machine);
    }
}

/// Prints why there is none.
pub fn ptx_machine(seed: u64) -> Option<Ptx> {
    match asked_for("ptx", ptx::present()) {
        Ok(()) => Some(ptx::open(6, seed).unwrap()),
        Err(why) => {
            println!("skipped: no PTX: {why}");
            None
        }
    }
}

fn on_gpu(mut test: impl FnMut(&mut dyn Driver)) {
    match asked_for("cuda", nvidia::present()) {
        Ok(()) => test(&mut Nvidia::open(0).unwrap()),
        Err(why) => println!("skipped: no GPU: {why}"),
    }
}

fn simt_here() -> Result<(), String> {
    asked_for("simt", host::present())
}

/// Whether simt is to be tested here; prints why not.
pub fn has_simt() -> bool {
    simt_here().inspect_err(|why| println!("skipped: no simt: {why}")).is_ok()
}

/// The machines to be tested here that are fast enough for whole models, opened anew.
pub fn machines() -> Vec<Box<dyn Driver>> {
    let mut all: Vec<Box<dyn Driver>> = vec![];
    if has_simt() {
        all.push(Box::new(Host::new(Options::default()).unwrap()));
    }
    match asked_for("cuda", nvidia::present()) {
        Ok(()) => all.push(Box::new(Nvidia::open(0).unwrap())),
        Err(why) => println!("skipped: no GPU: {why}"),
    }
    all
}

/// Whether a test runs on this machine, or why not. Panics where it is asked for and not here.
fn asked_for(machine: &str, present: isobath::Result<()>) -> Result<(), String> {
    let Ok(asked) = std::env::var("ISOBATH_TEST_MACHINES") else {
        return present.map_err(|error| error.to_string());
    };
    if !asked.split(',').any(|name| name == machine) {
        return Err(format!("ISOBATH_TEST_MACHINES is `{asked}`"));
    }
    present.unwrap_or_else(|error| panic!("ISOBATH_TEST_MACHINES asks for {machine}: {error}"));
    Ok(())
}

fn plain(order: Order, asynchronous: Asynchronous, seed: u64) -> Options {
    Options { order, asynchronous, seed, ..Options::default() }
}

/// Without the race detector.
pub fn plain_schedules() -> [Options; 4] {
    [
        plain(Order::Fifo, Asynchronous::Late, 0),
        Options { workers: 1, ..plain(Order::Lifo, Asynchronous::Early, 0) },
        plain(Order::Random, Asynchronous::Anytime, 1),
        plain(Order::Random, Asynchronous::Late, 2),
    ]
}

/// Those of every kernel's tests, or the one that SIMT_ORDER and the like ask for.
fn schedules() -> Vec<Options> {
    if std::env::vars_os().any(|(name, _)| name.to_string_lossy().starts_with("SIMT_")) {
        return vec![Options::from_env().unwrap()];
    }
    let race = |options: Options| Options { race: true, ..options };
    let mut all = plain_schedules().to_vec();
    all.push(race(plain(Order::Fifo, Asynchronous::Late, 0)));
    all.push(race(plain(Order::Random, Asynchronous::Anytime, 3)));
    all
}

// ------------------------------------------------------------------ values of a type

pub const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F32];

/// Values that a kernel loads at once, 16 bytes.
pub fn vector(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 4,
        Dtype::Bf16 => 8,
    }
}

/// Independent draws from N(0, 1), rounded to this type.
pub fn draws(dtype: Dtype, seed: u64, count: usize) -> Vec<f64> {
    normals(seed, count).into_iter().map(|value| rounded(dtype, value)).collect()
}

/// What [`on_every_machine`] compares.
pub fn bits(values: &[f64]) -> impl Iterator<Item = u8> + '_ {
    values.iter().flat_map(|value| value.to_bits().to_le_bytes())
}

/// The nearest value of this type.
pub fn rounded(dtype: Dtype, value: f64) -> f64 {
    match dtype {
        Dtype::F32 => f64::from(value as f32),
        Dtype::Bf16 => f64::from(bf16::from_f32(value as f32)),
    }
}

/// A parameter in bf16: the nearest, and of two equally near the one farther from zero.
pub fn rounded_parameter(value: f32) -> bf16 {
    match value.is_nan() {
        true => bf16::NAN,
        false => bf16::from_bits(((value.to_bits() + 0x8000) >> 16) as u16),
    }
}

/// Half the distance from 1 to the next value: the relative error of one rounding.
pub fn unit_roundoff(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 2f64.powi(-24),
        Dtype::Bf16 => 2f64.powi(-8),
    }
}

pub fn upload(driver: &mut dyn Driver, label: &str, dtype: Dtype, values: &[f64]) -> Allocation {
    match dtype {
        Dtype::F32 => {
            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            driver.upload(label, &values)
        }
        Dtype::Bf16 => {
            let values: Vec<bf16> =
                values.iter().map(|&value| bf16::from_f32(value as f32)).collect();
            driver.upload(label, &values)
        }
    }
    .unwrap()
}

/// A buffer for `count` values, all NaN.
pub fn unwritten(driver: &mut dyn Driver, label: &str, dtype: Dtype, count: usize) -> Allocation {
    upload(driver, label, dtype, &vec![f64::NAN; count])
}

pub fn download(driver: &mut dyn Driver, dtype: Dtype, from: Allocation) -> Vec<f64> {
    match dtype {
        Dtype::F32 => {
            let values = driver.download::<f32>(from.address, from.bytes as usize / 4).unwrap();
            values.into_iter().map(f64::from).collect()
        }
        Dtype::Bf16 => {
            let values = driver.download::<bf16>(from.address, from.bytes as usize / 2).unwrap();
            values.into_iter().map(f64::from).collect()
        }
    }
}

// ------------------------------------------------------------------ the reference

/// A tensor of the CPU backend in f64 with these values; zeros after their end.
pub fn filled(cpu: &mut Cpu<f64>, sizes: &[usize], values: &[f64]) -> View {
    let shape = Shape::new(sizes);
    let buffer = cpu.allocate("test", shape.elements() * size_of::<f64>()).unwrap();
    let view = View { buffer, offset: 0, kind: Kind::Activation, shape };
    cpu.values_mut(view).iter_mut().zip(values).for_each(|(to, &value)| *to = value);
    view
}

/// Token ids or positions of the CPU backend.
pub fn filled_index(cpu: &mut Cpu<f64>, values: &[i32]) -> View {
    let buffer = cpu.allocate("test", size_of_val(values)).unwrap();
    let view = View { buffer, offset: 0, kind: Kind::Index, shape: Shape::new(&[values.len()]) };
    cpu.write_index(view, values).unwrap();
    view
}

// ------------------------------------------------------------------ how exact

/// Panics unless the largest error of `found` is at most twice that of `plain`, the same
/// computation by the plain formula in the same type. Both are errors against `exact`. Where the
/// plain formula happens to be better than one rounding of the largest value, that rounding counts.
#[track_caller]
pub fn assert_exact(what: &str, dtype: Dtype, found: &[f64], plain: &[f64], exact: &[f64]) {
    let whole = Matrices { rows: 1, columns: exact.len(), together: 1 };
    assert_exact_by_rows(what, dtype, whole, found, plain, exact);
}

/// A tensor as matrices one after the other, and the rows that are judged together.
#[derive(Clone, Copy, Debug)]
pub struct Matrices {
    pub rows: usize,
    pub columns: usize,
    pub together: usize,
}

/// As [`assert_exact`], for each `together` rows of each matrix by themselves; the last ones with
/// those before them. Where rows differ in size, small ones that are missing are seen.
#[track_caller]
pub fn assert_exact_by_rows(
    what: &str,
    dtype: Dtype,
    of: Matrices,
    found: &[f64],
    plain: &[f64],
    exact: &[f64],
) {
    match exactness(dtype, of, found, plain, exact) {
        Ok(used) => println!("{what}: {used}"),
        Err(why) => panic!("{what}: {why}"),
    }
}

/// What [`assert_exact_by_rows`] finds: the largest error, or one that is too large.
pub fn exactness(
    dtype: Dtype,
    Matrices { rows, columns, together }: Matrices,
    found: &[f64],
    plain: &[f64],
    exact: &[f64],
) -> Result<String, String> {
    if (found.len(), plain.len()) != (exact.len(), exact.len()) {
        return Err(format!("{}, {}, {} values", found.len(), plain.len(), exact.len()));
    }
    let together = together.min(rows);
    let firsts = (0..rows).step_by(together).map(|first| first.min(rows - together));
    let matrices = (0..exact.len()).step_by(rows * columns);
    let begins = matrices.flat_map(|matrix| firsts.clone().map(move |row| matrix + row * columns));
    // Error, allowed, plain error, place.
    let judged = begins.map(|begin| {
        let values = begin..begin + together * columns;
        let error = |value: f64, at: usize| (value - exact[at]).abs();
        // A NaN is larger than everything here.
        let worst = |of: &[f64]| {
            let errors = values.clone().map(|at| (error(of[at], at), at));
            errors.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
        };
        let largest = exact[values.clone()].iter().fold(0.0f64, |most, it| most.max(it.abs()));
        let ((found_error, at), (plain_error, _)) = (worst(found), worst(plain));
        (found_error, 2.0 * plain_error.max(largest * unit_roundoff(dtype)), plain_error, at)
    });
    let used = |error: f64, allowed: f64| if error == 0.0 { 0.0 } else { error / allowed };
    let worst = judged.max_by(|a, b| used(a.0, a.1).total_cmp(&used(b.0, b.1)));
    let Some((error, allowed, plain_error, at)) = worst else { return Ok("no values".to_string()) };
    let fraction = used(error, allowed);
    if error <= allowed {
        return Ok(format!("error {error:.3e}, {fraction:.2} of the tolerance"));
    }
    Err(format!(
        "at {at} found {:e}, expected {:e}: error {error:e}, {fraction:.2} of the tolerance \
         {allowed:e} (plain formula {plain_error:e})",
        found[at], exact[at],
    ))
}
