//! kernels/gemm_sm90.cu: random normals against the f64 product, one-hot and ramp matrices exactly,
//! every tail, every tile.

use isobath::config::Dtype;
use isobath::cuda::gemm::{Gemm, Product, Tile};
use isobath::cuda::{DevicePointer, Driver, StreamId};

use super::machines::*;
use crate::support::normals;

const TILES: [Tile; 2] = [Tile::Columns128, Tile::Columns256];
const DTYPE: Dtype = Dtype::Bf16;
/// Elements behind the result that must not be touched.
const MARGIN: usize = 4096;
const UNTOUCHED: f64 = -77.0;

/// A [M,K], B [N,K] and perhaps a residual [M,N], all representable in bf16.
struct Matrices {
    m: usize,
    n: usize,
    k: usize,
    a: Vec<f64>,
    b: Vec<f64>,
    residual: Option<Vec<f64>>,
}

impl Matrices {
    fn normal(m: usize, n: usize, k: usize, with_residual: bool) -> Self {
        let draw = |seed, count| -> Vec<f64> {
            normals(seed, count).into_iter().map(|value| rounded(DTYPE, value)).collect()
        };
        let residual = with_residual.then(|| draw(3, m * n));
        Matrices { m, n, k, a: draw(1, m * k), b: draw(2, n * k), residual }
    }

    /// Elements (17 row + 3 column) mod 127 - 63 and the like: integers whose sums are exact in
    /// fp32 in any order, and no row or column like its neighbours.
    fn ramp(m: usize, n: usize, k: usize) -> Self {
        let ramp = |rows: usize, columns: usize, step: usize| -> Vec<f64> {
            let element = |i: usize| (i / columns * step + i % columns * 3) % 127;
            (0..rows * columns).map(|i| element(i) as f64 - 63.0).collect()
        };
        Matrices { m, n, k, a: ramp(m, k, 17), b: ramp(n, k, 29), residual: None }
    }

    /// Row i of A selects column `selected(i)` of B: a wrong layout shows another column.
    fn one_hot(m: usize, n: usize, k: usize) -> Self {
        let mut a = vec![0.0; m * k];
        (0..m).for_each(|row| a[row * k + selected(row, k)] = 1.0);
        // Each value says its place; neighbours in a row and in a column differ.
        let b = (0..n * k).map(|i| ((i / k * 5 + i % k) % 251) as f64).collect();
        Matrices { m, n, k, a, b, residual: None }
    }

    /// Entry by entry: the sum in f64, and in f32 in order, each plus the residual.
    fn products(&self) -> (Vec<f64>, Vec<f64>) {
        let &Matrices { m, n, k, ref a, ref b, ref residual } = self;
        let mut exact = vec![0.0; m * n];
        let mut plain = vec![0.0; m * n];
        for (i, (exact, plain)) in exact.iter_mut().zip(&mut plain).enumerate() {
            let (a, b) = (&a[i / n * k..][..k], &b[i % n * k..][..k]);
            let added = residual.as_ref().map_or(0.0, |residual| residual[i]);
            *exact = a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() + added;
            let sum = a.iter().zip(b).fold(0.0f32, |sum, (&a, &b)| sum + a as f32 * b as f32);
            *plain = rounded(DTYPE, f64::from(sum + added as f32));
        }
        (exact, plain)
    }
}

fn selected(row: usize, k: usize) -> usize {
    row * 37 % k
}

/// out [M,N], and nothing written behind it.
fn multiply(driver: &mut dyn Driver, gemm: &Gemm, tile: Tile, matrices: &Matrices) -> Vec<f64> {
    let &Matrices { m, n, k, .. } = matrices;
    let a = upload(driver, "a", DTYPE, &matrices.a);
    let b = upload(driver, "b", DTYPE, &matrices.b);
    let residual = matrices.residual.as_ref().map(|it| upload(driver, "residual", DTYPE, it));
    let mut before = vec![f64::NAN; m * n];
    before.resize(m * n + MARGIN, UNTOUCHED);
    let out = upload(driver, "out", DTYPE, &before);
    let product = Product {
        m,
        n,
        k,
        a: a.address,
        b: b.address,
        residual: residual.map(|it| it.address),
        out: out.address,
    };
    let plan = gemm.plan_with(driver, tile, &product).unwrap();
    plan.launch(driver, StreamId::MAIN).unwrap();
    let mut found = download(driver, DTYPE, out);
    let margin = found.split_off(m * n);
    assert!(margin.iter().all(|&it| it == UNTOUCHED), "{tile:?} {m}x{n}x{k} wrote behind its end");
    for buffer in [Some(a), Some(b), residual, Some(out)].into_iter().flatten() {
        driver.release(buffer).unwrap();
    }
    found
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
    values.iter().flat_map(|&value| half::bf16::from_f64(value).to_bits().to_le_bytes())
}

/// M, N and K inside one tile, exactly one, and more; as many steps of K as there are stages, one
/// fewer and one more; tiles that the blocks cannot share evenly.
fn shapes(tile: Tile) -> Vec<[usize; 3]> {
    let columns = match tile {
        Tile::Columns128 => 128,
        Tile::Columns256 => 256,
    };
    let stages = tile.stages() as usize;
    vec![
        [1, 8, 8],
        [1, columns, 64],
        [64, 8, 72],
        [65, 72, 56],
        [127, columns - 8, 120],
        [128, columns, 64],
        [129, columns + 8, 136],
        [128, columns, (stages - 1) * 64],
        [128, columns, stages * 64],
        [128, columns, (stages + 1) * 64],
        [200, 2 * columns + 40, 3 * stages * 64 + 8],
        // 3 x 3 tiles, and 11 x 1: more than a group of 8 tile rows.
        [300, 2 * columns + 8, 200],
        [1300, 64, 72],
    ]
}

#[test]
fn random_matrices() {
    on_every_machine(|driver| {
        let gemm = Gemm::new(driver).unwrap();
        let mut all = vec![];
        for tile in TILES {
            for (index, [m, n, k]) in shapes(tile).into_iter().enumerate() {
                let matrices = Matrices::normal(m, n, k, index % 2 == 1);
                let found = multiply(driver, &gemm, tile, &matrices);
                let (exact, plain) = matrices.products();
                let what = format!("{tile:?} {m}x{n}x{k}");
                assert_exact(&what, DTYPE, &found, &plain, &exact);
                all.extend(bits(&found));
            }
        }
        all
    });
}

#[test]
fn ramps_are_exact() {
    on_each_machine(|driver| {
        let gemm = Gemm::new(driver).unwrap();
        for tile in TILES {
            for [m, n, k] in shapes(tile) {
                let matrices = Matrices::ramp(m, n, k);
                let found = multiply(driver, &gemm, tile, &matrices);
                let (exact, _) = matrices.products();
                let largest = exact.iter().fold(0.0f64, |largest, it| largest.max(it.abs()));
                assert!(largest < 2f64.powi(24), "fp32 must hold the sums exactly");
                let expected: Vec<f64> = exact.iter().map(|&it| rounded(DTYPE, it)).collect();
                assert_equal(&format!("{tile:?} {m}x{n}x{k}"), &found, &expected, n);
            }
        }
    });
}

#[test]
fn one_hot_rows_select_columns() {
    on_each_machine(|driver| {
        let gemm = Gemm::new(driver).unwrap();
        for tile in TILES {
            for [m, n, k] in shapes(tile) {
                let matrices = Matrices::one_hot(m, n, k);
                let found = multiply(driver, &gemm, tile, &matrices);
                let expected: Vec<f64> =
                    (0..m * n).map(|i| matrices.b[i % n * k + selected(i / n, k)]).collect();
                assert_equal(&format!("{tile:?} {m}x{n}x{k}"), &found, &expected, n);
            }
        }
    });
}

#[test]
fn a_plan_is_launched_again() {
    on_each_machine(|driver| {
        let gemm = Gemm::new(driver).unwrap();
        let (m, n, k) = (40, 48, 80);
        let first = Matrices::ramp(m, n, k);
        let second = Matrices::one_hot(m, n, k);
        let a = upload(driver, "a", DTYPE, &first.a);
        let b = upload(driver, "b", DTYPE, &first.b);
        let out = unwritten(driver, "out", DTYPE, m * n);
        let (a_at, b_at, out_at) = (a.address, b.address, out.address);
        let product = Product { m, n, k, a: a_at, b: b_at, residual: None, out: out_at };
        let plan = gemm.plan(driver, &product).unwrap();
        for matrices in [first, second] {
            for (values, to) in [(&matrices.a, a_at), (&matrices.b, b_at)] {
                let bytes: Vec<u8> = bits(values).collect();
                driver.to_device(StreamId::MAIN, &bytes, to).unwrap();
            }
            plan.launch(driver, StreamId::MAIN).unwrap();
            let found = download(driver, DTYPE, out);
            let (exact, _) = matrices.products();
            let expected: Vec<f64> = exact.iter().map(|&it| rounded(DTYPE, it)).collect();
            assert_equal("launched again", &found, &expected, n);
        }
    });
}

/// A tile is chosen for the fewest and fastest waves.
#[test]
fn the_tile_fits_the_result() {
    on_each_machine(|driver| {
        let gemm = Gemm::new(driver).unwrap();
        let multiprocessors = driver.properties().multiprocessors as usize;
        // One wave of wide tiles; narrow ones would take two.
        assert_eq!(gemm.choose_tile(128 * multiprocessors, 256), Tile::Columns256);
        // A result of 128 columns leaves half of a wide tile empty.
        assert_eq!(gemm.choose_tile(128 * multiprocessors, 128), Tile::Columns128);
    });
}

#[test]
fn what_cannot_be_multiplied_is_refused() {
    on_each_machine(|driver| {
        let gemm = Gemm::new(driver).unwrap();
        let buffer = unwritten(driver, "all", DTYPE, 4096);
        let all = buffer.address;
        let product = |m, n, k| Product { m, n, k, a: all, b: all, residual: None, out: all };
        let mut refused = |product: Product| -> String {
            gemm.plan(driver, &product).err().expect("refused").to_string()
        };
        assert!(refused(product(0, 8, 8)).contains("empty"));
        assert!(refused(product(8, 8, 0)).contains("empty"));
        assert!(refused(product(8, 12, 8)).contains("multiples of 8"));
        assert!(refused(product(8, 8, 20)).contains("multiples of 8"));
        assert!(refused(product(i32::MAX as usize, 8, 8)).contains("i32"));
        let error = refused(Product { a: DevicePointer(all.0 + 2), ..product(8, 8, 8) });
        assert!(error.contains("multiple of 16 bytes"), "{error}");
        let error =
            refused(Product { residual: Some(DevicePointer(all.0 + 2)), ..product(8, 8, 8) });
        assert!(error.contains("residual"), "{error}");
        // 128 x 64 elements do not lie in a buffer of 4096.
        let error = refused(product(128, 8, 64));
        assert!(error.contains("all"), "{error}");
    });
}
