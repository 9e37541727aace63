//! kernels/gemm_*.cu: every layout, output and tile of every family. Random normals against the f64
//! product, one-hot and ramp matrices exactly, every tail.

mod fused;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};
use std::time::{Duration, Instant};

use isobath::config::Dtype;
use isobath::cuda::gemm::{Choice, Gemm, GemmPlan, Layout, Output, Product, Variant};
use isobath::cuda::host::{self, Asynchronous, Host, Options, Order};
use isobath::cuda::{Allocation, DevicePointer, Driver, Family, StreamId};

use super::counting::Counting;
use super::machines::*;
use crate::support::normals;

/// Elements after the result that must not be touched.
const MARGIN: usize = 4096;
const UNTOUCHED: f64 = -77.0;

const LAYOUTS: [Layout; 3] = [Layout::Nt, Layout::Nn, Layout::Tn];

/// The families that this machine runs, each alone.
fn families(driver: &mut dyn Driver) -> Vec<(Dtype, Gemm)> {
    let mut all = vec![];
    for dtype in [Dtype::Bf16, Dtype::F32] {
        for &family in Family::of(driver.device(), driver.properties(), dtype).unwrap() {
            all.push((dtype, Gemm::new(driver, dtype, Some(family)).unwrap()));
        }
    }
    all
}

/// The Hopper kernels, where the machine has them.
fn hopper(driver: &mut dyn Driver) -> Option<Gemm> {
    if driver.properties().compute_capability != (9, 0) {
        println!("skipped: the machine has no Hopper kernels");
        return None;
    }
    Some(Gemm::new(driver, Dtype::Bf16, Some(Family::Sm90)).unwrap())
}

// ------------------------------------------------------------------ matrices

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Epilogue {
    Store,
    Add,
    /// The addend is where the result goes.
    AddInPlace,
    Accumulate,
}

/// What is multiplied, as mathematics sees it: A [M,K], B [N,K]; what is added [M,N].
struct Matrices {
    dtype: Dtype,
    m: usize,
    n: usize,
    k: usize,
    a: Vec<f64>,
    b: Vec<f64>,
    added: Vec<f64>,
}

impl Matrices {
    /// Representable in their type.
    fn normal(dtype: Dtype, [m, n, k]: [usize; 3]) -> Self {
        let draw = |seed, count| -> Vec<f64> {
            normals(seed, count).into_iter().map(|value| rounded(dtype, value)).collect()
        };
        Matrices { dtype, m, n, k, a: draw(1, m * k), b: draw(2, n * k), added: draw(3, m * n) }
    }

    /// Elements (17 row + 3 column) mod 127 - 63 and the like: integers whose sums are exact in
    /// fp32 in any order, and no row or column like its neighbours.
    fn ramp(dtype: Dtype, [m, n, k]: [usize; 3]) -> Self {
        let (a, b) = (ramp(m, k, 17, 127), ramp(n, k, 29, 127));
        Matrices { dtype, m, n, k, a, b, added: ramp(m, n, 41, 127) }
    }

    /// Row i of A selects column `selected(i)` of B: a wrong layout shows another column.
    fn one_hot(dtype: Dtype, [m, n, k]: [usize; 3]) -> Self {
        let (a, b) = (one_hot(m, k), places(n, k));
        Matrices { dtype, m, n, k, a, b, added: vec![0.0; m * n] }
    }

    /// With so many rows, the same again and again.
    fn repeated(&self, m: usize) -> Self {
        let &Matrices { dtype, n, k, ref a, ref b, ref added, .. } = self;
        let (a, added) = (cycled(a, m * k), cycled(added, m * n));
        Matrices { dtype, m, n, k, a, b: b.clone(), added }
    }

    /// Entry by entry: the sum in f64, and in f32 in order, each plus what is added.
    fn products(&self, epilogue: Epilogue) -> (Vec<f64>, Vec<f64>) {
        let &Matrices { m, n, k, ref a, ref b, ref added, .. } = self;
        let dtype = self.result(epilogue);
        let narrow = |values: &[f64]| values.iter().map(|&it| it as f32).collect::<Vec<f32>>();
        let mut exact = row_by_row([m, n, k], a, b);
        let sums = row_by_row([m, n, k], &narrow(a), &narrow(b));
        let mut plain = vec![0.0; m * n];
        for (i, (exact, plain)) in exact.iter_mut().zip(&mut plain).enumerate() {
            let added = if epilogue == Epilogue::Store { 0.0 } else { added[i] };
            *exact += added;
            *plain = rounded(dtype, f64::from(sums[i] + added as f32));
        }
        (exact, plain)
    }

    /// The type of what comes out.
    fn result(&self, epilogue: Epilogue) -> Dtype {
        if epilogue == Epilogue::Accumulate { Dtype::F32 } else { self.dtype }
    }
}

/// The products of rows of `a` [m,k] with rows of `b` [n,k]; the sum of each is in the order of k.
fn row_by_row<T>([m, n, k]: [usize; 3], a: &[T], b: &[T]) -> Vec<T>
where
    T: Copy + Default + std::ops::Mul<Output = T> + std::ops::AddAssign,
{
    // Along columns, so that the compiler takes many sums at once.
    let columns: Vec<T> = (0..k * n).map(|i| b[i % n * k + i / n]).collect();
    let mut all = vec![T::default(); m * n];
    for (sums, a) in all.chunks_exact_mut(n).zip(a.chunks_exact(k)) {
        for (&factor, others) in a.iter().zip(columns.chunks_exact(n)) {
            for (sum, &other) in sums.iter_mut().zip(others) {
                *sum += factor * other;
            }
        }
    }
    all
}

/// Integers around zero, of an odd number of them.
fn ramp(rows: usize, columns: usize, step: usize, numbers: usize) -> Vec<f64> {
    let element = |i: usize| (i / columns * step + i % columns * 3) % numbers;
    (0..rows * columns).map(|i| element(i) as f64 - (numbers / 2) as f64).collect()
}

/// [m,k], a one in each row.
fn one_hot(m: usize, k: usize) -> Vec<f64> {
    let mut all = vec![0.0; m * k];
    (0..m).for_each(|row| all[row * k + selected(row, k)] = 1.0);
    all
}

fn selected(row: usize, k: usize) -> usize {
    row * 37 % k
}

/// [n,k]: each value says its place; neighbours in a row and in a column differ.
fn places(n: usize, k: usize) -> Vec<f64> {
    (0..n * k).map(|i| ((i / k * 5 + i % k) % 251) as f64).collect()
}

fn cycled<T: Copy>(values: &[T], count: usize) -> Vec<T> {
    values.iter().copied().cycle().take(count).collect()
}

fn transposed(values: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
}

/// A product whose matrices lie on a machine.
struct Placed {
    product: Product,
    read: Vec<Allocation>,
    /// Each with its type and a margin after it.
    written: Vec<(Allocation, Dtype)>,
}

impl Placed {
    fn plan(&self, driver: &mut dyn Driver, gemm: &Gemm, choice: Choice) -> GemmPlan {
        gemm.plan_with(driver, choice, &self.product).unwrap()
    }

    /// The results of one launch; nothing is written past their ends.
    fn run(self, driver: &mut dyn Driver, gemm: &Gemm, choice: Choice) -> Vec<Vec<f64>> {
        self.plan(driver, gemm, choice).launch(driver, StreamId::MAIN).unwrap();
        let download = |&(buffer, dtype): &(Allocation, Dtype)| {
            let mut found = download(driver, dtype, buffer);
            let margin = found.split_off(found.len() - MARGIN);
            let untouched = margin.iter().all(|&it| it == UNTOUCHED);
            assert!(untouched, "{choice} wrote past its end: {:?}", self.product);
            found
        };
        let found = self.written.iter().map(download).collect();
        self.release(driver);
        found
    }

    fn release(self, driver: &mut dyn Driver) {
        let written = self.written.into_iter().map(|(buffer, _)| buffer);
        self.read.into_iter().chain(written).for_each(|it| driver.release(it).unwrap());
    }
}

/// A result that holds these values before.
fn with_margin(
    driver: &mut dyn Driver,
    label: &str,
    dtype: Dtype,
    mut before: Vec<f64>,
) -> (Allocation, Dtype) {
    before.resize(before.len() + MARGIN, UNTOUCHED);
    (upload(driver, label, dtype, &before), dtype)
}

impl Matrices {
    fn place(&self, driver: &mut dyn Driver, layout: Layout, epilogue: Epilogue) -> Placed {
        let &Matrices { dtype, m, n, k, .. } = self;
        let a = match layout {
            Layout::Tn => upload(driver, "a", dtype, &transposed(&self.a, m, k)),
            Layout::Nt | Layout::Nn => upload(driver, "a", dtype, &self.a),
        };
        let b = match layout {
            Layout::Nt => upload(driver, "b", dtype, &self.b),
            Layout::Nn | Layout::Tn => upload(driver, "b", dtype, &transposed(&self.b, n, k)),
        };
        let mut read = vec![a, b];
        let before = match epilogue {
            Epilogue::Store | Epilogue::Add => vec![f64::NAN; m * n],
            Epilogue::AddInPlace | Epilogue::Accumulate => self.added.clone(),
        };
        let out = with_margin(driver, "out", self.result(epilogue), before);
        let (a, b, out_at) = (a.address, b.address, out.0.address);
        let output = match epilogue {
            Epilogue::Store => Output::Store { addend: None },
            Epilogue::Add => {
                let addend = upload(driver, "addend", dtype, &self.added);
                read.push(addend);
                Output::Store { addend: Some(addend.address) }
            }
            Epilogue::AddInPlace => Output::Store { addend: Some(out_at) },
            Epilogue::Accumulate => Output::Accumulate,
        };
        let product = Product { layout, m, n, k, a, b, out: out_at, output };
        Placed { product, read, written: vec![out] }
    }
}

/// out [M,N], and nothing written after it.
fn multiply(
    driver: &mut dyn Driver,
    gemm: &Gemm,
    choice: Choice,
    matrices: &Matrices,
    epilogue: Epilogue,
) -> Vec<f64> {
    let placed = matrices.place(driver, choice.variant.layout, epilogue);
    placed.run(driver, gemm, choice).remove(0)
}

#[track_caller]
fn assert_equal(what: &str, found: &[f64], expected: &[f64], columns: usize) {
    let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
    if let Some(i) = wrong {
        let (row, column) = (i / columns, i % columns);
        let count = found.iter().zip(expected).filter(|(f, e)| f != e).count();
        panic!(
            "{what}: at [{row},{column}] found {}, expected {}; {count} of {} are wrong",
            found[i],
            expected[i],
            found.len()
        );
    }
}

fn bits(values: &[f64]) -> impl Iterator<Item = u8> + '_ {
    values.iter().flat_map(|value| value.to_bits().to_le_bytes())
}

// ------------------------------------------------------------------ shapes

/// Sizes that the layout allows: `size` up to the next multiple where it is a row's.
fn allowed(layout: Layout, dtype: Dtype, [m, n, k]: [usize; 3]) -> [usize; 3] {
    let row = |size: usize| match dtype {
        Dtype::Bf16 => size.next_multiple_of(8),
        Dtype::F32 => size.next_multiple_of(4),
    };
    match layout {
        Layout::Nt | Layout::Nn => [m, row(n), row(k)],
        Layout::Tn => [row(m), row(n), k],
    }
}

/// M, N and K below one tile, exactly one, and just above; as many steps of K as there are stages,
/// one fewer and one more; odd numbers of tiles; more tile rows than are visited together.
fn shapes(variant: &Variant, dtype: Dtype) -> Vec<[usize; 3]> {
    let &Variant { layout, rows, columns, depth, stages, .. } = variant;
    let all = [
        [1, 1, 1],
        [1, columns, depth],
        [rows / 2 + 1, 1, depth + 1],
        [rows - 1, columns - 8, 2 * depth - 1],
        [rows, columns, depth - 8],
        [rows + 1, columns + 1, depth + 3],
        [rows, columns, (stages - 1) * depth],
        [rows, columns, stages * depth],
        [rows, columns, (stages + 1) * depth],
        [2 * rows + 3, 2 * columns + 5, (stages + 1) * depth + 5],
        [9 * rows + 1, 1, depth + 7],
        [5, 3 * columns + 1, 3],
    ];
    all.into_iter().map(|shape| allowed(layout, dtype, shape)).collect()
}

/// Rows that differ, where there are many: odd, so that no tile begins like the next ones.
const PERIOD: usize = 131;

/// Three tiles for each block of a persistent kernel, and four for some, alone and in pairs, with a
/// tail each way: consumers that take tiles in turn come to a second one each. With one step of K
/// fewer than the ring has stages, each begins at another stage, and the ring ends within tiles.
fn several_tiles(variant: &Variant, multiprocessors: usize) -> [usize; 3] {
    let &Variant { layout, rows, columns, depth, stages, .. } = variant;
    let m = 2 * (multiprocessors - 1) * rows + 9;
    allowed(layout, Dtype::Bf16, [m, 2 * columns - 40, (stages - 2) * depth + 9])
}

/// Of these clusters those for many tiles: one block after the other is slow on the machine for
/// PTX.
fn clusters_of_many(driver: &dyn Driver, clusters: &[usize]) -> Vec<usize> {
    let pairs_alone = driver.device() == "ptx";
    clusters.iter().copied().filter(|&it| it == 2 || !pairs_alone).collect()
}

/// Panics unless some block has so many tiles.
#[track_caller]
fn assert_several(driver: &dyn Driver, choice: Choice, sizes: [usize; 3], least: usize) {
    let multiprocessors = driver.properties().multiprocessors as usize;
    let [tiles, _] = choice.variant.longest(sizes, &choice, multiprocessors);
    assert!(tiles >= least, "{choice} {sizes:?}: a block has {tiles} tiles at most");
}

/// Runs a product of which some block has four tiles at least in each of these clusters, all of
/// which give the same bits. Those of all runs.
fn alone_and_in_pairs(
    driver: &mut dyn Driver,
    variant: &'static Variant,
    clusters: &[usize],
    sizes: [usize; 3],
    mut run: impl FnMut(&mut dyn Driver, Choice) -> Vec<u8>,
) -> Vec<u8> {
    let mut all: Vec<Vec<u8>> = vec![];
    for cluster in clusters_of_many(driver, clusters) {
        let choice = Choice { cluster, ..Choice::whole(variant) };
        assert_several(driver, choice, sizes, 4);
        let bits = run(driver, choice);
        assert!(
            all.iter().all(|alone| *alone == bits),
            "{choice} {sizes:?}: other bits than alone"
        );
        all.push(bits);
    }
    all.concat()
}

/// For many values instead of [`bits`].
fn digest(values: &[f64]) -> [u8; 8] {
    let mut hasher = DefaultHasher::new();
    values.iter().for_each(|value| hasher.write_u64(value.to_bits()));
    hasher.finish().to_le_bytes()
}

fn epilogues(layout: Layout) -> &'static [Epilogue] {
    match layout {
        Layout::Nt | Layout::Nn => &[Epilogue::Store, Epilogue::Add, Epilogue::AddInPlace],
        Layout::Tn => &[Epilogue::Accumulate],
    }
}

/// Each shape of each kernel; the epilogues take turns, and so do whole and most split tiles, and
/// blocks alone and in clusters. `turn`: 0, 1 and 2 together give every epilogue to every shape.
fn each_shape(
    driver: &mut dyn Driver,
    turn: usize,
    mut test: impl FnMut(&mut dyn Driver, &Gemm, Dtype, Choice, [usize; 3], Epilogue),
) {
    let multiprocessors = driver.properties().multiprocessors as usize;
    for (dtype, gemm) in families(driver) {
        for variant in LAYOUTS.into_iter().flat_map(|layout| gemm.variants(layout)) {
            let epilogues = epilogues(variant.layout);
            for (index, shape) in shapes(variant, dtype).into_iter().enumerate() {
                let epilogue = epilogues[(index + turn) % epilogues.len()];
                let cluster = *variant.clusters().iter().cycle().nth(index / 2 + turn).unwrap();
                let most = variant.most_splits(shape, cluster, multiprocessors);
                let splits = if (index + turn).is_multiple_of(2) { most } else { 1 };
                test(driver, &gemm, dtype, Choice { variant, splits, cluster }, shape, epilogue);
            }
        }
        gemm.release(driver).unwrap();
    }
}

// ------------------------------------------------------------------ tests

fn named(choice: Choice, [m, n, k]: [usize; 3], epilogue: Epilogue) -> String {
    format!("{choice} {m}x{n}x{k} {epilogue:?}")
}

#[test]
fn random_matrices_of_every_shape() {
    on_each_machine(|driver| {
        each_shape(driver, 0, |driver, gemm, dtype, choice, shape, epilogue| {
            let matrices = Matrices::normal(dtype, shape);
            let found = multiply(driver, gemm, choice, &matrices, epilogue);
            let (exact, plain) = matrices.products(epilogue);
            let what = named(choice, shape, epilogue);
            assert_exact(&what, matrices.result(epilogue), &found, &plain, &exact);
        });
    });
}

#[test]
fn ramps_are_exact() {
    on_each_machine(|driver| {
        each_shape(driver, 1, |driver, gemm, dtype, choice, shape, epilogue| {
            let matrices = Matrices::ramp(dtype, shape);
            let found = multiply(driver, gemm, choice, &matrices, epilogue);
            let (exact, _) = matrices.products(epilogue);
            let largest = exact.iter().fold(0.0f64, |largest, it| largest.max(it.abs()));
            assert!(largest < 2f64.powi(24), "fp32 must hold the sums exactly");
            let result = matrices.result(epilogue);
            let expected: Vec<f64> = exact.iter().map(|&it| rounded(result, it)).collect();
            assert_equal(&named(choice, shape, epilogue), &found, &expected, matrices.n);
        });
    });
}

#[test]
fn one_hot_rows_select_columns() {
    on_each_machine(|driver| {
        each_shape(driver, 2, |driver, gemm, dtype, choice, shape, epilogue| {
            let matrices = Matrices::one_hot(dtype, shape);
            let found = multiply(driver, gemm, choice, &matrices, epilogue);
            let &Matrices { m, n, k, ref b, .. } = &matrices;
            let expected: Vec<f64> =
                (0..m * n).map(|i| b[i % n * k + selected(i / n, k)]).collect();
            assert_equal(&named(choice, shape, epilogue), &found, &expected, n);
        });
    });
}

/// Kernels with a block for each tile: two tiles each way with tails, and more steps than stages.
#[test]
fn no_schedule_changes_a_bit() {
    on_every_machine(|driver| {
        let mut all = vec![];
        for (dtype, gemm) in families(driver) {
            let kernels = LAYOUTS.into_iter().flat_map(|layout| gemm.variants(layout));
            for variant in kernels.filter(|it| it.family != Family::Sm90) {
                let k = (variant.stages + 1) * variant.depth + 9;
                for &epilogue in epilogues(variant.layout) {
                    let shape = match epilogue {
                        Epilogue::Store => [33, variant.columns - 8, variant.depth / 2],
                        _ => [variant.rows + 9, variant.columns + 1, k],
                    };
                    let shape = allowed(variant.layout, dtype, shape);
                    let matrices = Matrices::normal(dtype, shape);
                    let choice = Choice::whole(variant);
                    all.extend(bits(&multiply(driver, &gemm, choice, &matrices, epilogue)));
                }
            }
            gemm.release(driver).unwrap();
        }
        all
    });
}

/// Persistent kernels, each with every epilogue, alone and in pairs: what a block keeps from one
/// tile to the next, its ring, its barriers' phases and its store tiles, is right in every
/// schedule.
#[test]
fn blocks_go_from_tile_to_tile() {
    let mut known = HashMap::new();
    on_every_machine(|driver| {
        let mut all = vec![];
        let Some(gemm) = hopper(driver) else { return all };
        let multiprocessors = driver.properties().multiprocessors as usize;
        for variant in LAYOUTS.into_iter().flat_map(|layout| gemm.variants(layout)) {
            for &epilogue in epilogues(variant.layout) {
                let shape @ [m, n, k] = several_tiles(variant, multiprocessors);
                let clusters = match epilogue {
                    Epilogue::Store | Epilogue::Accumulate => variant.clusters(),
                    Epilogue::Add => &[2],
                    Epilogue::AddInPlace => &[1],
                };
                let (few, exact, plain) =
                    known.entry((variant.kernel, epilogue)).or_insert_with(|| {
                        let few = Matrices::normal(Dtype::Bf16, [PERIOD, n, k]);
                        let (exact, plain) = few.products(epilogue);
                        (few, exact, plain)
                    });
                let many = few.repeated(m);
                all.extend(alone_and_in_pairs(
                    driver,
                    variant,
                    clusters,
                    shape,
                    |driver, choice| {
                        let what = named(choice, shape, epilogue);
                        let found = multiply(driver, &gemm, choice, &many, epilogue);
                        let first = &found[..PERIOD * n];
                        assert_exact(&what, few.result(epilogue), first, plain, exact);
                        assert_equal(&what, &found, &cycled(first, m * n), n);
                        digest(&found).to_vec()
                    },
                ));
            }
        }
        gemm.release(driver).unwrap();
        all
    });
}

/// The same where after two whole tiles of each block there are two that all share.
#[test]
fn splits_come_after_whole_tiles() {
    on_every_machine(|driver| {
        let mut all = vec![];
        let Some(gemm) = hopper(driver) else { return all };
        let multiprocessors = driver.properties().multiprocessors as usize;
        for variant in gemm.variants(Layout::Tn) {
            let [_, _, k] = several_tiles(variant, multiprocessors);
            // One tile more for each of a pair, both of which have rows of the result.
            let m = (2 * multiprocessors + 1) * variant.rows + 16;
            let shape = [m, variant.columns - 8, k];
            let n = shape[1];
            let few = Matrices::ramp(Dtype::Bf16, [PERIOD, n, k]);
            let (exact, _) = few.products(Epilogue::Accumulate);
            let many = few.repeated(m);
            for cluster in clusters_of_many(driver, variant.clusters()) {
                let splits = variant.most_splits(shape, cluster, multiprocessors);
                assert!(splits >= 2, "{splits} splits");
                let choice = Choice { variant, splits, cluster };
                assert_several(driver, choice, shape, 3);
                let found = multiply(driver, &gemm, choice, &many, Epilogue::Accumulate);
                let what = named(choice, shape, Epilogue::Accumulate);
                assert_equal(&what, &found, &cycled(&exact, m * n), n);
                all.extend(digest(&found));
            }
        }
        gemm.release(driver).unwrap();
        all
    });
}

/// The products of the head, of few tokens and features: as many columns, steps of K and rows as
/// there are words.
#[test]
fn vocabularies_of_every_size() {
    on_each_machine(|driver| {
        let Some(gemm) = hopper(driver) else { return };
        let (tokens, features) = (9, 8);
        let all = [32_100, 50_257, 128_256];
        // The machine for PTX is slow.
        let few = if driver.device() == "ptx" { 1 } else { all.len() };
        for vocabulary in all[..few].iter().map(|words: &usize| words.next_multiple_of(8)) {
            for layout in LAYOUTS {
                let (shape, epilogue) = match layout {
                    Layout::Nt => ([tokens, vocabulary, features], Epilogue::Store),
                    Layout::Nn => ([tokens, features, vocabulary], Epilogue::Store),
                    Layout::Tn => ([vocabulary, features, tokens], Epilogue::Accumulate),
                };
                let choice = gemm.choose(layout, Output::plain(layout), shape).unwrap();
                let matrices = Matrices::normal(Dtype::Bf16, shape);
                let found = multiply(driver, &gemm, choice, &matrices, epilogue);
                let (exact, plain) = matrices.products(epilogue);
                let what = named(choice, shape, epilogue);
                assert_exact(&what, matrices.result(epilogue), &found, &plain, &exact);
            }
        }
        gemm.release(driver).unwrap();
    });
}

/// Tiles whose K is split: every number of splits is exact, each has its own bits under every
/// schedule, and the semaphores are back at zero for the launch that follows.
#[test]
fn splits_add_in_their_order() {
    on_every_machine(|driver| {
        let mut all = vec![];
        let multiprocessors = driver.properties().multiprocessors as usize;
        let Some(gemm) = hopper(driver) else { return all };
        for variant in gemm.variants(Layout::Tn) {
            // One tile with tails, then two, of eight steps and a bit: unequal splits. Then one for
            // each block and one more, which is split after them.
            let more = (multiprocessors + 1) * variant.columns - 8;
            let cases = [(variant.columns - 8, 8, 4), (variant.columns + 8, 8, 2), (more, 4, 4)];
            for (columns, steps, least) in cases {
                let shape = [variant.rows - 8, columns, steps * variant.depth + 5];
                let most = variant.most_splits(shape, 1, multiprocessors);
                assert!(most >= least, "{most} splits on {multiprocessors} multiprocessors");
                let matrices = Matrices::ramp(Dtype::Bf16, shape);
                let (exact, _) = matrices.products(Epilogue::Accumulate);
                let normal = Matrices::normal(Dtype::Bf16, shape);
                let in_pairs = variant.most_splits(shape, 2, multiprocessors);
                let all_splits = (1..=most.min(4)).map(|splits| (splits, 1));
                for (splits, cluster) in all_splits.chain([(in_pairs, 2)]).rev() {
                    let choice = Choice { variant, splits, cluster };
                    let found = multiply(driver, &gemm, choice, &matrices, Epilogue::Accumulate);
                    assert_equal(
                        &named(choice, shape, Epilogue::Accumulate),
                        &found,
                        &exact,
                        columns,
                    );
                    let found = multiply(driver, &gemm, choice, &normal, Epilogue::Accumulate);
                    all.extend(bits(&found));
                }
            }
        }
        let [variant, ..] = gemm.variants(Layout::Tn).collect::<Vec<_>>()[..] else { panic!() };
        let (m, n, k) = (variant.rows, variant.columns, variant.depth);
        assert_eq!(variant.most_splits([m, n, k], 1, 132), 1, "no split is empty");
        assert_eq!(variant.most_splits([3 * m, 6 * n, 100 * k], 1, 132), 7, "a block for each");
        assert_eq!(variant.most_splits([12 * m, 11 * n, 100 * k], 1, 132), 1, "a full wave");
        let sizes = [12 * m, 12 * n, 100 * k];
        assert_eq!(variant.most_splits(sizes, 1, 132), 11, "of the last twelve");
        assert_eq!(variant.most_splits(sizes, 2, 132), 11, "of the last six pairs, by 66");
        let split = Choice { splits: 11, ..Choice::whole(variant) };
        assert_eq!(variant.longest(sizes, &split, 132), [2, 100 + 10], "100 / 11, rounded up");
        assert_eq!(variant.longest(sizes, &Choice::whole(variant), 132), [2, 200]);
        let nt = gemm.variants(Layout::Nt).next().unwrap();
        assert_eq!(nt.most_splits([m, n, 100 * k], 1, 132), 1, "what is stored is not split");
        gemm.release(driver).unwrap();
        all
    });
}

#[test]
fn the_number_of_workers_changes_no_bit() {
    if let Err(error) = host::present() {
        println!("skipped: no simt: {error}");
        return;
    }
    let mut first: Option<Vec<u8>> = None;
    for workers in [1, 2, 5] {
        let driver: &mut dyn Driver =
            &mut Host::new(Options { workers, ..Options::default() }).unwrap();
        let mut all = vec![];
        for (dtype, gemm) in families(driver) {
            for layout in LAYOUTS {
                let Some(variant) = gemm.variants(layout).last() else { continue };
                let shape = [3 * variant.rows, 2 * variant.columns, 72];
                let matrices = Matrices::normal(dtype, shape);
                let epilogue = *epilogues(layout).last().unwrap();
                let whole = Choice::whole(variant);
                all.extend(bits(&multiply(driver, &gemm, whole, &matrices, epilogue)));
            }
        }
        let expected = first.get_or_insert_with(|| all.clone());
        assert!(all == *expected, "{workers} workers give other bits than one");
    }
}

#[test]
fn a_plan_is_launched_again() {
    on_each_machine(|driver| {
        for (dtype, gemm) in families(driver) {
            let shape @ [m, n, k] = [40, 48, 80];
            let first = Matrices::ramp(dtype, shape);
            let second = Matrices::one_hot(dtype, shape);
            let a = upload(driver, "a", dtype, &first.a);
            let b = upload(driver, "b", dtype, &first.b);
            let out = unwritten(driver, "out", dtype, m * n);
            let product = Product {
                layout: Layout::Nt,
                m,
                n,
                k,
                a: a.address,
                b: b.address,
                out: out.address,
                output: Output::Store { addend: None },
            };
            let plan = gemm.plan(driver, &product).unwrap();
            for matrices in [first, second] {
                for (values, to) in [(&matrices.a, a), (&matrices.b, b)] {
                    let from = upload(driver, "values", dtype, values);
                    driver.on_device(StreamId::MAIN, from.address, to.address, to.bytes).unwrap();
                    driver.release(from).unwrap();
                }
                plan.launch(driver, StreamId::MAIN).unwrap();
                let found = download(driver, dtype, out);
                let (exact, _) = matrices.products(Epilogue::Store);
                let expected: Vec<f64> = exact.iter().map(|&it| rounded(dtype, it)).collect();
                assert_equal("launched again", &found, &expected, n);
            }
        }
    });
}

const REPEATS: usize = 1000;
/// Of results that take a GPU's bus long, with tens of times as many tiles.
const REPEATS_OF_MANY: usize = 100;
/// For all products on simt, but at least so many launches of each; a GPU takes the time that it
/// takes.
const REPEATING: Duration = Duration::from_secs(5);
const LEAST_REPEATS: usize = 100;

/// Launches of equal work give equal bits: all of `REPEATS` on a GPU, for every kernel with every
/// epilogue, alone and in pairs, and fewer where each block has several tiles; on simt as many as
/// its time allows, each under another schedule, for the smallest tiles that several blocks share.
#[test]
fn every_launch_gives_the_same_bits() {
    if has_simt() {
        let mut host = Host::new(Options::default()).unwrap();
        let gemm = Gemm::new(&mut host, Dtype::Bf16, Some(Family::Sm90)).unwrap();
        // Four tiles each; one tile in four splits; two tiles in pairs, each in two.
        let cases = [
            (Layout::Nt, Epilogue::Store, 1, [136, 136, 72]),
            (Layout::Nt, Epilogue::Add, 2, [136, 136, 72]),
            (Layout::Nn, Epilogue::AddInPlace, 2, [136, 136, 72]),
            (Layout::Tn, Epilogue::Accumulate, 1, [120, 120, 4 * 64 + 5]),
            (Layout::Tn, Epilogue::Accumulate, 2, [136, 120, 2 * 64 + 5]),
        ];
        let driver: &mut dyn Driver = &mut host;
        let mut all = vec![];
        for (layout, epilogue, cluster, shape) in cases {
            let variant = gemm.variants(layout).find(|it| it.columns == 128).unwrap();
            let dtype = Dtype::Bf16;
            all.push(Repeated::new(driver, &gemm, dtype, variant, cluster, shape, epilogue));
        }
        for (variant, fusion) in fused::kernels(&gemm) {
            if variant.kernel.ends_with("128x128") {
                all.push(fused::repeated(driver, &gemm, variant, fusion, 2, [136, 136, 72]));
            }
        }
        let time = REPEATING / all.len() as u32;
        for repeated in all {
            let first = repeated.launch(&mut host);
            let end = Instant::now() + time;
            let mut launches = 1;
            while launches < LEAST_REPEATS || launches < REPEATS && Instant::now() < end {
                let (order, asynchronous) = (Order::Random, Asynchronous::Anytime);
                let seed = launches as u64;
                host.set_options(Options { order, asynchronous, seed, ..Options::default() });
                repeated.assert_same(&first, &repeated.launch(&mut host), launches);
                launches += 1;
            }
            println!("{}: {launches} launches on simt", repeated.name);
        }
    }
    for mut driver in machines().into_iter().filter(|it| it.device() != "simt") {
        repeat_on_a_gpu(&mut *driver, [REPEATS, REPEATS_OF_MANY]);
    }
}
fn repeat_on_a_gpu(driver: &mut dyn Driver, [few, many]: [usize; 2]) {
    let multiprocessors = driver.properties().multiprocessors as usize;
    for (dtype, gemm) in families(driver) {
        // Shapes, clusters and repeats.
        let all = |variant: &'static Variant| {
            let &Variant { rows, columns, depth, .. } = variant;
            let nine_tiles = [2 * rows + 9, 2 * columns + 1, 16 * depth + 9];
            let mut all = vec![(nine_tiles, variant.clusters(), few)];
            if variant.family == Family::Sm90 {
                all.push((several_tiles(variant, multiprocessors), &[2], many));
            }
            all.into_iter().map(|(shape, clusters, repeats)| {
                (allowed(variant.layout, dtype, shape), clusters, repeats)
            })
        };
        for variant in LAYOUTS.into_iter().flat_map(|layout| gemm.variants(layout)) {
            for (shape, clusters, repeats) in all(variant) {
                for &epilogue in epilogues(variant.layout) {
                    for &cluster in clusters {
                        Repeated::new(driver, &gemm, dtype, variant, cluster, shape, epilogue)
                            .repeat(driver, repeats);
                    }
                }
            }
        }
        for (variant, fusion) in fused::kernels(&gemm) {
            for (shape, clusters, repeats) in all(variant) {
                for &cluster in clusters {
                    fused::repeated(driver, &gemm, variant, fusion, cluster, shape)
                        .repeat(driver, repeats);
                }
            }
        }
        gemm.release(driver).unwrap();
    }
}

/// A product of random normals that is launched again and again.
struct Repeated {
    name: String,
    plan: GemmPlan,
    placed: Placed,
    /// What each result holds before a launch.
    before: Vec<Allocation>,
}

impl Repeated {
    /// In as many splits as it has.
    fn new(
        driver: &mut dyn Driver,
        gemm: &Gemm,
        dtype: Dtype,
        variant: &'static Variant,
        cluster: usize,
        shape @ [m, n, k]: [usize; 3],
        epilogue: Epilogue,
    ) -> Self {
        let multiprocessors = driver.properties().multiprocessors as usize;
        let splits = variant.most_splits(shape, cluster, multiprocessors);
        let matrices = Matrices::normal(dtype, [m.min(PERIOD), n, k]).repeated(m);
        let placed = matrices.place(driver, variant.layout, epilogue);
        let choice = Choice { variant, splits, cluster };
        Self::of(driver, gemm, choice, named(choice, shape, epilogue), placed)
    }

    fn of(
        driver: &mut dyn Driver,
        gemm: &Gemm,
        choice: Choice,
        name: String,
        placed: Placed,
    ) -> Self {
        let plan = placed.plan(driver, gemm, choice);
        let copy = |&(from, _): &(Allocation, Dtype)| {
            let to = driver.allocate("before", from.bytes).unwrap();
            driver.on_device(StreamId::MAIN, from.address, to.address, from.bytes).unwrap();
            to
        };
        let before = placed.written.iter().map(copy).collect();
        Repeated { name, plan, placed, before }
    }

    fn launch(&self, driver: &mut dyn Driver) -> Vec<Vec<u8>> {
        for (&before, &(to, _)) in self.before.iter().zip(&self.placed.written) {
            driver.on_device(StreamId::MAIN, before.address, to.address, to.bytes).unwrap();
        }
        self.plan.launch(driver, StreamId::MAIN).unwrap();
        let bytes = |&(result, _): &(Allocation, Dtype)| {
            let mut found = vec![0; result.bytes as usize];
            driver.to_host(StreamId::MAIN, result.address, &mut found).unwrap();
            found
        };
        self.placed.written.iter().map(bytes).collect()
    }

    fn repeat(self, driver: &mut dyn Driver, repeats: usize) {
        let first = self.launch(driver);
        for launch in 1..repeats {
            self.assert_same(&first, &self.launch(driver), launch);
        }
        println!("{}: {repeats} launches on {}", self.name, driver.device());
        self.release(driver);
    }

    #[track_caller]
    fn assert_same(&self, first: &[Vec<u8>], found: &[Vec<u8>], launch: usize) {
        if first == found {
            return;
        }
        let (first, found) = (first.concat(), found.concat());
        let at = first.iter().zip(&found).position(|(a, b)| a != b);
        panic!("{}: launch {launch} has other bits than the first, at byte {at:?}", self.name);
    }

    fn release(self, driver: &mut dyn Driver) {
        self.before.into_iter().for_each(|buffer| driver.release(buffer).unwrap());
        self.placed.release(driver);
    }
}

// ------------------------------------------------------------------ choices

#[test]
fn the_family_fits_the_machine_and_the_type() {
    if let Err(error) = host::present() {
        println!("skipped: no simt: {error}");
        return;
    }
    let host = &mut Host::new(Options::default()).unwrap();
    let mut machine = (host as &mut dyn Driver).properties().clone();
    let mut of = |compute_capability, dtype| {
        machine.compute_capability = compute_capability;
        Family::of("cuda", &machine, dtype)
    };
    for capability in [(8, 0), (8, 9), (10, 0), (12, 1)] {
        assert_eq!(of(capability, Dtype::Bf16).unwrap(), [Family::Sm80]);
    }
    assert_eq!(of((9, 0), Dtype::Bf16).unwrap(), [Family::Sm90, Family::Sm80]);
    assert_eq!(of((9, 0), Dtype::F32).unwrap(), [Family::F32]);
    let error = of((7, 5), Dtype::F32).unwrap_err().to_string();
    assert!(error.contains("7.5") && error.contains("8.0 or more"), "{error}");

    let driver: &mut dyn Driver = host;
    let mut chosen = |dtype, choice, layout, m, n| {
        let gemm = Gemm::new(driver, dtype, choice).map_err(|error| error.to_string())?;
        let Choice { variant, .. } = gemm
            .choose(layout, Output::plain(layout), [m, n, 512])
            .map_err(|error| error.to_string())?;
        Ok::<_, String>((variant.family, variant.rows, variant.columns))
    };
    // simt says that it is 9.0.
    let mut best = |dtype, layout| chosen(dtype, None, layout, 64, 64).unwrap().0;
    assert!(LAYOUTS.into_iter().all(|layout| best(Dtype::Bf16, layout) == Family::Sm90));
    assert!(LAYOUTS.into_iter().all(|layout| best(Dtype::F32, layout) == Family::F32));
    let sm80 = Some(Family::Sm80);
    assert_eq!(chosen(Dtype::Bf16, sm80, Layout::Nt, 64, 64).unwrap(), (Family::Sm80, 64, 64));
    let error = chosen(Dtype::F32, sm80, Layout::Nt, 64, 64).unwrap_err();
    assert!(error.contains("f32") && error.contains("choose f32"), "{error}");
}

/// A build for sm_80 alone holds no wgmma kernels, and still trains on an H100.
#[test]
fn a_family_that_is_not_in_the_build_is_passed_over() {
    if !has_simt() {
        return;
    }
    let host = || Host::new(Options::default()).unwrap();
    let driver = &mut Counting { lacks: Some("gemm_sm90"), ..Counting::new(host()) };
    let gemm = Gemm::new(driver, Dtype::Bf16, None).unwrap();
    assert!(LAYOUTS.iter().flat_map(|&it| gemm.variants(it)).all(|it| it.family == Family::Sm80));
    let error = Gemm::new(driver, Dtype::Bf16, Some(Family::Sm90)).unwrap_err().to_string();
    assert!(error.contains("gemm_sm90"), "{error}");
    let driver = &mut Counting { lacks: Some("gemm_"), ..Counting::new(host()) };
    let error = Gemm::new(driver, Dtype::Bf16, None).unwrap_err().to_string();
    assert!(error.contains("gemm_sm90"), "{error}");
}

/// A tile is chosen for the fewest and fastest waves.
#[test]
fn the_tile_fits_the_result() {
    on_each_machine(|driver| {
        let multiprocessors = driver.properties().multiprocessors as usize;
        let large = 128 * multiprocessors;
        let hopper = driver.properties().compute_capability == (9, 0);
        let mut choose = |family, layout, sizes| {
            let gemm = Gemm::new(driver, Dtype::Bf16, Some(family)).unwrap();
            let Choice { variant, splits, .. } =
                gemm.choose(layout, Output::plain(layout), sizes).unwrap();
            gemm.release(driver).unwrap();
            (variant.rows, variant.columns, splits)
        };
        let (nt, tn) = (Layout::Nt, Layout::Tn);
        assert_eq!(choose(Family::Sm80, nt, [large, 1024, 512]), (128, 128, 1));
        // A quarter of a tile for each multiprocessor is no slower in small tiles.
        assert_eq!(choose(Family::Sm80, nt, [64 * multiprocessors, 64, 512]), (64, 64, 1));
        if hopper {
            let mut choose = |layout, sizes| choose(Family::Sm90, layout, sizes);
            // One wave of wide tiles; narrow ones would take two.
            assert_eq!(choose(nt, [large, 256, 4096]), (128, 256, 1));
            assert_eq!(choose(nt, [large, 192, 4096]), (128, 192, 1));
            // A result of 128 columns leaves half of a wide tile empty.
            assert_eq!(choose(nt, [large, 128, 4096]), (128, 128, 1));
            // The gradient of a small weight over many tokens: every multiprocessor has a share.
            assert_eq!(choose(tn, [128, 256, 1 << 20]), (128, 256, multiprocessors));
            // Over few, waiting for one another costs more than it saves.
            assert_eq!(choose(tn, [128, 256, 128]).2, 1);
            assert_eq!(choose(tn, [large, 256, 1 << 20]), (128, 256, 1));
        }
    });
}

#[test]
fn what_cannot_be_multiplied_is_refused() {
    on_each_machine(|driver| {
        let buffer = unwritten(driver, "all", Dtype::F32, 4 * 4096);
        let all = buffer.address;
        let at = |index: u64| all.offset(index * 4096);
        for (dtype, gemm) in families(driver) {
            let multiple = if dtype == Dtype::Bf16 { "multiples of 8" } else { "multiples of 4" };
            for layout in LAYOUTS {
                if gemm.variants(layout).next().is_none() {
                    continue;
                }
                let (a, b, out) = (at(0), at(4), at(8));
                if let Some(variant) =
                    gemm.variants(layout).find(|it| it.most_splits([8; 3], 1, 1) == 1)
                {
                    let choice = Choice { splits: 2, ..Choice::whole(variant) };
                    let product = Product {
                        layout,
                        m: 8,
                        n: 8,
                        k: 8,
                        a,
                        b,
                        out,
                        output: Output::plain(layout),
                    };
                    let refused = gemm.plan_with(driver, choice, &product).err().unwrap();
                    assert!(refused.to_string().contains("2 splits of"), "{refused}");
                }
                let (stored, output) = (Output::Store { addend: None }, Output::plain(layout));
                let product = |m, n, k| Product { layout, m, n, k, a, b, out, output };
                let right = product(8, 8, 8);
                let mut refused = |product: Product| -> String {
                    let planned = gemm.plan(driver, &product);
                    planned.err().unwrap_or_else(|| panic!("accepted: {product:?}")).to_string()
                };
                for empty in [product(0, 8, 8), product(8, 0, 8), product(8, 8, 0)] {
                    assert!(refused(empty).contains("is empty"));
                }
                let error = refused(product(8, 10, 8));
                assert!(error.contains(multiple), "{error}");
                let error = refused(match layout {
                    Layout::Nt | Layout::Nn => product(8, 8, 18),
                    Layout::Tn => product(18, 8, 8),
                });
                assert!(error.contains(multiple), "{error}");
                let large = i32::MAX as usize - 7;
                for large in [product(large, 8, 8), product(8, large, 8), product(8, 8, large)] {
                    assert!(refused(large).contains("i32"));
                }
                assert!(refused(product(1 << 30, 1 << 30, 8)).contains("i32"), "too many tiles");

                let odd = |address: DevicePointer| address.offset(8);
                for (wrong, name) in [
                    (Product { a: odd(a), ..right }, "of A is"),
                    (Product { b: odd(b), ..right }, "of B is"),
                    (Product { out: odd(out), ..right }, "of the result is"),
                ] {
                    let error = refused(wrong);
                    assert!(error.contains(name) && error.contains("multiple of 16"), "{error}");
                }
                for (wrong, name) in [
                    (Product { out: a, ..right }, "overlaps A"),
                    (Product { out: b.offset(16), ..right }, "overlaps B"),
                ] {
                    let error = refused(wrong);
                    assert!(error.contains(name), "{error}");
                }
                if layout == Layout::Tn {
                    let error = refused(Product { output: stored, ..right });
                    assert!(error.contains("cannot be stored"), "{error}");
                    continue;
                }
                let error = refused(Product { output: Output::Accumulate, ..right });
                assert!(error.contains("cannot be accumulated"), "{error}");
                let add =
                    |addend| Product { output: Output::Store { addend: Some(addend) }, ..right };
                let error = refused(add(odd(at(9))));
                assert!(error.contains("addend"), "{error}");
                let error = refused(add(out.offset(16)));
                assert!(error.contains("overlaps the addend"), "{error}");
            }
        }
        driver.release(buffer).unwrap();
    });
}

/// Tensor maps know how long their buffers are.
#[test]
fn a_matrix_that_leaves_its_buffer_is_refused() {
    on_each_machine(|driver| {
        if driver.properties().compute_capability != (9, 0) {
            println!("skipped: no tensor maps");
            return;
        }
        let gemm = Gemm::new(driver, Dtype::Bf16, Some(Family::Sm90)).unwrap();
        let [a, b, out, other] =
            ["first", "b", "out", "other"].map(|label| unwritten(driver, label, Dtype::Bf16, 4096));
        // After the end of A may lie another buffer: the result must not be there.
        let behind = a.address.0..a.address.0 + 2 * a.bytes;
        let out = if behind.contains(&out.address.0) { other } else { out };
        let (layout, a, b, out) = (Layout::Nt, a.address, b.address, out.address);
        let output = Output::Store { addend: None };
        let product = Product { layout, m: 128, n: 8, k: 64, a, b, out, output };
        let error = gemm.plan(driver, &product).err().expect("refused").to_string();
        assert!(error.contains("first"), "{error}");
    });
}
