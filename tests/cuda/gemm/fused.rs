//! The epilogues that kernels/gemm_sm90.cu has beyond an addend: rotary embedding, SwiGLU and its
//! gradient, against the f64 formulas and against the kernels that do the same on their own.

use std::collections::HashMap;

use isobath::backend::HeadSpec;
use isobath::config::Dtype;
use isobath::cuda::gemm::{Choice, Gemm, Layout, Output, Product, Rotation, Variant};
use isobath::cuda::pointwise::{Pointwise, SwiGluForward};
use isobath::cuda::{DevicePointer, Driver, Family, StreamId};

use super::super::machines::*;
use super::{
    PERIOD, Placed, Repeated, alone_and_in_pairs, assert_equal, cycled, digest, hopper, one_hot,
    places, ramp, row_by_row, several_tiles, shapes, transposed, with_margin,
};
use crate::support::tokens;

const BF16: Dtype = Dtype::Bf16;
const POSITIONS: usize = 21;
const NULL: DevicePointer = DevicePointer::NULL;

#[derive(Clone, Copy, Debug)]
pub(super) enum Fusion {
    Rotary { heads: HeadSpec },
    SwiGlu,
    SwiGluGradient,
}

/// Of the factors: random normals; or integers whose sums are exact in fp32 in any order, with
/// angles that are quarters of a turn, and gates whose sigmoid is one.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Values {
    Normal,
    Ramp,
    /// A selects columns of B.
    OneHot,
}

/// What is multiplied and what else is read, as mathematics sees it.
struct Case {
    fusion: Fusion,
    /// N is F where there is a SwiGLU.
    sizes: [usize; 3],
    /// [M,K]
    a: Vec<f64>,
    /// [N,K], or [2,N,K]
    b: Vec<f64>,
    /// [M,2,N]
    gate_up: Vec<f64>,
    /// [POSITIONS,D]
    table: Vec<f64>,
    /// [M]
    positions: Vec<i32>,
}

/// The result, and after SwiGLU the product.
#[derive(Clone, PartialEq)]
struct Found {
    out: Vec<f64>,
    product: Vec<f64>,
}

impl Case {
    fn new(values: Values, fusion: Fusion, sizes: [usize; 3]) -> Self {
        let [m, n, k] = sizes;
        let (columns, head_dim) = match fusion {
            Fusion::Rotary { heads } => (n, heads.head_dim),
            Fusion::SwiGlu => (2 * n, 0),
            Fusion::SwiGluGradient => (n, 0),
        };
        let (a, b) = match values {
            Values::Normal => {
                // So that gates stay where a sigmoid bends.
                let scale = (k as f64).sqrt().recip();
                let a = draws(BF16, 1, m * k).into_iter().map(|it| rounded(BF16, it * scale));
                (a.collect(), draws(BF16, 2, columns * k))
            }
            // So small that products with gates are exact, too.
            Values::Ramp => (ramp(m, k, 17, 127), ramp(columns, k, 29, 11)),
            Values::OneHot => (one_hot(m, k), places(columns, k)),
        };
        let (gate_up, table) = match values {
            Values::Normal => {
                let angles = draws(Dtype::F32, 5, POSITIONS * head_dim.max(1));
                let table = angles.iter().map(|it| rounded(Dtype::F32, (3.0 * it).cos())).collect();
                (draws(BF16, 3, 2 * m * n), table)
            }
            Values::Ramp | Values::OneHot => {
                let ramp = ramp(m, 2 * n, 41, 127);
                let gate_up =
                    |(i, up)| if i % (2 * n) < n { 64.0 + (i * 3 % 31) as f64 } else { up };
                (ramp.into_iter().enumerate().map(gate_up).collect(), quarter_turns(head_dim))
            }
        };
        Case { fusion, sizes, a, b, gate_up, table, positions: tokens(4, m, POSITIONS) }
    }

    /// With so many rows, the same again and again.
    fn repeated(&self, m: usize) -> Self {
        let [_, n, k] = self.sizes;
        Case {
            fusion: self.fusion,
            sizes: [m, n, k],
            a: cycled(&self.a, m * k),
            b: self.b.clone(),
            gate_up: cycled(&self.gate_up, 2 * m * n),
            table: self.table.clone(),
            positions: cycled(&self.positions, m),
        }
    }

    /// Of the result's rows.
    fn columns(&self) -> usize {
        match self.fusion {
            Fusion::Rotary { .. } => self.sizes[1],
            Fusion::SwiGlu | Fusion::SwiGluGradient => 2 * self.sizes[1],
        }
    }

    /// Result and product: exact, and by the plain formula, every tensor rounded when it is
    /// written.
    fn expected(&self) -> [Found; 2] {
        let [m, _, k] = self.sizes;
        let columns = self.b.len() / k;
        let narrow = |values: &[f64]| values.iter().map(|&it| it as f32).collect::<Vec<f32>>();
        let round = |value: f64| rounded(BF16, value);
        let exact = row_by_row([m, columns, k], &self.a, &self.b);
        let plain = row_by_row([m, columns, k], &narrow(&self.a), &narrow(&self.b));
        let plain: Vec<f64> = plain.into_iter().map(|it| round(it.into())).collect();
        [self.behind(&exact, columns, |value| value), self.behind(&plain, columns, round)]
    }

    /// What becomes of the product, each value that is written rounded so.
    fn behind(&self, product: &[f64], columns: usize, round: impl Fn(f64) -> f64) -> Found {
        let n = self.sizes[1];
        let mut found = Found { out: vec![], product: vec![] };
        for (row, values) in product.chunks_exact(columns).enumerate() {
            match self.fusion {
                Fusion::Rotary { heads } => {
                    let position = self.positions[row] as usize;
                    let table = &self.table[position * heads.head_dim..][..heads.head_dim];
                    found.out.extend(rotated(heads, table, values, &round));
                }
                Fusion::SwiGlu => {
                    let pairs = values[..n].iter().zip(&values[n..]);
                    found.product.extend(pairs.map(|(&gate, &up)| round(swiglu(gate, up))));
                    found.out.extend(values);
                }
                Fusion::SwiGluGradient => {
                    let (gate, up) = self.gate_up[row * 2 * n..][..2 * n].split_at(n);
                    for half in 0..2 {
                        let of = |i| round(swiglu_gradient(gate[i], up[i], values[i])[half]);
                        found.out.extend((0..n).map(of));
                    }
                }
            }
        }
        found
    }
}

/// [POSITIONS,D], as a rotation's table.
fn quarter_turns(head_dim: usize) -> Vec<f64> {
    let half = head_dim / 2;
    let element = |i: usize| {
        let (position, i) = (i / head_dim, i % head_dim);
        let cosine = i < half;
        let quarter = position + i % half;
        [1.0, 0.0, -1.0, 0.0][(quarter + if cosine { 0 } else { 3 }) % 4]
    };
    (0..POSITIONS * head_dim).map(element).collect()
}

fn rotated(heads: HeadSpec, table: &[f64], row: &[f64], round: impl Fn(f64) -> f64) -> Vec<f64> {
    let half = heads.head_dim / 2;
    let mut out = row.to_vec();
    for head in 0..heads.heads + heads.kv_heads {
        for i in 0..half {
            let low = head * heads.head_dim + i;
            let (x, y, cos, sin) = (row[low], row[low + half], table[i], table[half + i]);
            out[low] = round(x * cos - y * sin);
            out[low + half] = round(y * cos + x * sin);
        }
    }
    out
}

fn swiglu(gate: f64, up: f64) -> f64 {
    gate / (1.0 + (-gate).exp()) * up
}

fn swiglu_gradient(gate: f64, up: f64, d_out: f64) -> [f64; 2] {
    let sigmoid = 1.0 / (1.0 + (-gate).exp());
    let silu = gate * sigmoid;
    [d_out * up * (sigmoid + silu * (1.0 - sigmoid)), d_out * silu]
}

impl Case {
    fn place(&self, driver: &mut dyn Driver, layout: Layout) -> Placed {
        let [m, n, k] = self.sizes;
        let a = upload(driver, "a", BF16, &self.a);
        let b = match layout {
            Layout::Nn => upload(driver, "b", BF16, &transposed(&self.b, n, k)),
            Layout::Nt | Layout::Tn => upload(driver, "b", BF16, &self.b),
        };
        let unwritten = |count: usize| vec![f64::NAN; count];
        let out = with_margin(driver, "out", BF16, unwritten(m * self.columns()));
        let (mut read, mut written) = (vec![a, b], vec![out]);
        let output = match self.fusion {
            Fusion::Rotary { heads } => {
                let table = upload(driver, "table", Dtype::F32, &self.table);
                let positions = driver.upload("positions", &self.positions).unwrap();
                read.extend([table, positions]);
                Output::Rotate(Rotation {
                    table: table.address,
                    positions: positions.address,
                    columns: (heads.heads + heads.kv_heads) * heads.head_dim,
                    head_dim: heads.head_dim,
                })
            }
            Fusion::SwiGlu => {
                let product = with_margin(driver, "product", BF16, unwritten(m * n));
                written.push(product);
                Output::SwiGlu { product: product.0.address }
            }
            Fusion::SwiGluGradient => {
                let gate_up = upload(driver, "gate and up", BF16, &self.gate_up);
                read.push(gate_up);
                Output::SwiGluGradient { gate_up: gate_up.address }
            }
        };
        let (a, b, out) = (a.address, b.address, out.0.address);
        Placed { product: Product { layout, m, n, k, a, b, out, output }, read, written }
    }
}

/// Runs it; nothing is written after the results.
fn multiply(driver: &mut dyn Driver, gemm: &Gemm, choice: Choice, case: &Case) -> Found {
    let placed = case.place(driver, choice.variant.layout);
    let mut found = placed.run(driver, gemm, choice).into_iter();
    Found { out: found.next().unwrap(), product: found.next().unwrap_or_default() }
}

fn rotation(head_dim: usize) -> Output {
    Output::Rotate(Rotation { table: NULL, positions: NULL, columns: head_dim, head_dim })
}

/// Every kernel with every head that it takes.
fn fusions(gemm: &Gemm) -> Vec<(&'static Variant, Fusion)> {
    let mut all = vec![];
    for head_dim in [32, 48, 64, 96, 128] {
        let heads = HeadSpec { heads: 2, kv_heads: 1, head_dim };
        let kernels = gemm.variants_for(Layout::Nt, rotation(head_dim));
        all.extend(kernels.map(|it| (it, Fusion::Rotary { heads })));
    }
    let swiglu = gemm.variants_for(Layout::Nt, Output::SwiGlu { product: NULL });
    all.extend(swiglu.map(|it| (it, Fusion::SwiGlu)));
    let gradient = gemm.variants_for(Layout::Nn, Output::SwiGluGradient { gate_up: NULL });
    all.extend(gradient.map(|it| (it, Fusion::SwiGluGradient)));
    all
}

/// Every kernel, with the smallest head that it takes.
pub(super) fn kernels(gemm: &Gemm) -> Vec<(&'static Variant, Fusion)> {
    let mut all: Vec<(&Variant, Fusion)> = vec![];
    for (variant, fusion) in fusions(gemm) {
        if all.iter().all(|(other, _)| other.kernel != variant.kernel) {
            all.push((variant, fusion));
        }
    }
    all
}

/// One of random normals, to be launched again and again.
pub(super) fn repeated(
    driver: &mut dyn Driver,
    gemm: &Gemm,
    variant: &'static Variant,
    fusion: Fusion,
    cluster: usize,
    shape: [usize; 3],
) -> Repeated {
    let (fusion, sizes) = fitted(fusion, shape);
    let [m, n, k] = sizes;
    let case = Case::new(Values::Normal, fusion, [m.min(PERIOD), n, k]).repeated(m);
    let placed = case.place(driver, variant.layout);
    let choice = Choice { cluster, ..Choice::whole(variant) };
    Repeated::of(driver, gemm, choice, format!("{choice} {fusion:?} {sizes:?}"), placed)
}

/// Columns are whole heads where they are rotated, at least three; some of them are v's.
fn fitted(fusion: Fusion, [m, n, k]: [usize; 3]) -> (Fusion, [usize; 3]) {
    let Fusion::Rotary { heads: HeadSpec { head_dim, .. } } = fusion else {
        return (fusion, [m, n, k]);
    };
    let count = n.div_ceil(head_dim).max(3);
    let kv_heads = if count % 2 == 1 { 1 + (count - 3) / 4 } else { 1 };
    let heads = HeadSpec { heads: count - 2 * kv_heads, kv_heads, head_dim };
    (Fusion::Rotary { heads }, [m, heads.qkv_columns(), k])
}

/// The shapes of the plain kernels, and one whose last tile ends with its first box of 32 columns.
/// Heads of several widths share kernels: of each width every shape has one kind of values, and of
/// all together every kind. Blocks are alone and in pairs.
fn each_case(
    driver: &mut dyn Driver,
    values: Values,
    mut test: impl FnMut(&mut dyn Driver, &Gemm, Choice, Case),
) {
    let Some(gemm) = hopper(driver) else { return };
    let all = fusions(&gemm);
    for (index, &(variant, fusion)) in all.iter().enumerate() {
        let width = all[..index].iter().filter(|(other, _)| other.kernel == variant.kernel).count();
        let boxes = [variant.rows + 9, variant.columns + 32, variant.depth];
        for (other, shape) in shapes(variant, BF16).into_iter().chain([boxes]).enumerate() {
            let turn = other + values as usize;
            // The machine for PTX is slow: there, SwiGLU's values take turns, too.
            let all_values = !matches!(fusion, Fusion::Rotary { .. }) && driver.device() != "ptx";
            if !all_values && !(width + turn).is_multiple_of(3) {
                continue;
            }
            let choice = Choice { cluster: 1 + turn % 2, ..Choice::whole(variant) };
            let (fusion, sizes) = fitted(fusion, shape);
            test(driver, &gemm, choice, Case::new(values, fusion, sizes));
        }
    }
    gemm.release(driver).unwrap();
}

#[test]
fn every_tile_has_every_epilogue() {
    on_each_machine(|driver| {
        let Some(gemm) = hopper(driver) else { return };
        let kernels: Vec<&str> = kernels(&gemm).iter().map(|(it, _)| it.kernel).collect();
        for epilogue in ["nt_rotary_", "nt_swiglu_", "nn_swiglu_"] {
            for tile in ["128x256", "128x192", "128x128"] {
                let name = format!("gemm_sm90_{epilogue}{tile}");
                assert!(kernels.contains(&name.as_str()), "{name} is missing in {kernels:?}");
            }
        }
        gemm.release(driver).unwrap();
    });
}

#[test]
fn every_kernel_follows_its_formula() {
    on_each_machine(|driver| {
        let alone = Pointwise::new(driver, BF16).unwrap();
        each_case(driver, Values::Normal, |driver, gemm, choice, case| {
            let found = multiply(driver, gemm, choice, &case);
            let [exact, plain] = case.expected();
            assert_formula(&named(choice, &case), &found, &plain, &exact);
            assert_product(driver, &alone, choice, &case, &found);
        });
    });
}

#[test]
fn ramps_are_exact() {
    on_each_machine(|driver| assert_integers(driver, Values::Ramp));
}

#[test]
fn one_hot_rows_select_columns() {
    on_each_machine(|driver| assert_integers(driver, Values::OneHot));
}

fn assert_integers(driver: &mut dyn Driver, values: Values) {
    let alone = Pointwise::new(driver, BF16).unwrap();
    each_case(driver, values, |driver, gemm, choice, case| {
        let found = multiply(driver, gemm, choice, &case);
        let [exact, _] = case.expected();
        let largest = exact.out.iter().fold(0.0f64, |largest, it| largest.max(it.abs()));
        assert!(largest < 2f64.powi(24), "fp32 must hold the results exactly: {largest}");
        let expected: Vec<f64> = exact.out.iter().map(|&it| rounded(BF16, it)).collect();
        assert_equal(&named(choice, &case), &found.out, &expected, case.columns());
        assert_product(driver, &alone, choice, &case, &found);
    });
}

fn named(choice: Choice, case: &Case) -> String {
    format!("{choice} {:?} {:?}", case.fusion, case.sizes)
}

#[track_caller]
fn assert_formula(what: &str, found: &Found, plain: &Found, exact: &Found) {
    assert_exact(what, BF16, &found.out, &plain.out, &exact.out);
    if !exact.product.is_empty() {
        let what = format!("{what}, product");
        assert_exact(&what, BF16, &found.product, &plain.product, &exact.product);
    }
}

/// SwiGLU's product is that of the gate and up that were stored.
#[track_caller]
fn assert_product(
    driver: &mut dyn Driver,
    alone: &Pointwise,
    choice: Choice,
    case: &Case,
    found: &Found,
) {
    if matches!(case.fusion, Fusion::SwiGlu) {
        let what = format!("{}, product", named(choice, case));
        let expected = swiglu_alone(driver, alone, case, &found.out);
        assert_equal(&what, &found.product, &expected, case.sizes[1]);
    }
}

/// What the kernel for SwiGLU alone makes of gate and up: to the bit the same, so that either may
/// stand in for the other when a block is computed again.
fn swiglu_alone(
    driver: &mut dyn Driver,
    kernels: &Pointwise,
    case: &Case,
    gate_up: &[f64],
) -> Vec<f64> {
    let [m, n, _] = case.sizes;
    let inp = upload(driver, "gate and up", BF16, gate_up);
    let out = unwritten(driver, "product", BF16, m * n);
    let args = SwiGluForward { inp: inp.address, out: out.address };
    kernels.swiglu_forward(driver, StreamId::MAIN, m, n, &args).unwrap();
    let found = download(driver, BF16, out);
    driver.release(inp).unwrap();
    driver.release(out).unwrap();
    found
}

/// As the test of the plain kernels of this name.
#[test]
fn blocks_go_from_tile_to_tile() {
    let mut known = HashMap::new();
    on_every_machine(|driver| {
        let mut all = vec![];
        let Some(gemm) = hopper(driver) else { return all };
        let multiprocessors = driver.properties().multiprocessors as usize;
        for (variant, fusion) in kernels(&gemm) {
            let shape = several_tiles(variant, multiprocessors);
            let (fusion, [m, n, k]) = fitted(fusion, shape);
            let (few, exact, plain) = known.entry(variant.kernel).or_insert_with(|| {
                let few = Case::new(Values::Normal, fusion, [PERIOD, n, k]);
                let [exact, plain] = few.expected();
                (few, exact, plain)
            });
            let many = few.repeated(m);
            let run = |driver: &mut dyn Driver, choice| {
                let what = named(choice, &many);
                let found = multiply(driver, &gemm, choice, &many);
                let first = Found {
                    out: found.out[..exact.out.len()].to_vec(),
                    product: found.product[..exact.product.len()].to_vec(),
                };
                assert_formula(&what, &first, plain, exact);
                for (found, first) in [(&found.out, &first.out), (&found.product, &first.product)] {
                    let expected = cycled(first, found.len());
                    assert_equal(&what, found, &expected, first.len() / PERIOD);
                }
                [digest(&found.out), digest(&found.product)].concat()
            };
            let clusters = variant.clusters();
            all.extend(alone_and_in_pairs(driver, variant, clusters, many.sizes, run));
        }
        gemm.release(driver).unwrap();
        all
    });
}

#[test]
fn what_cannot_be_fused_is_refused() {
    on_each_machine(|driver| {
        let sm80 = Gemm::new(driver, BF16, Some(Family::Sm80)).unwrap();
        let swiglu = Output::SwiGlu { product: NULL };
        assert!(!sm80.fuses(Layout::Nt, swiglu) && !sm80.fuses(Layout::Nt, rotation(64)));
        let error = sm80.choose(Layout::Nt, swiglu, [8; 3]).unwrap_err().to_string();
        assert!(error.contains("SwiGLU") && error.contains("Gemm::fuses"), "{error}");
        let Some(gemm) = hopper(driver) else { return };
        // A head that no tile is a multiple of, or that the kernel was not made for.
        for head_dim in [16, 40, 80, 256] {
            assert!(!gemm.fuses(Layout::Nt, rotation(head_dim)), "{head_dim}");
        }
        let buffer = unwritten(driver, "all", BF16, 16 * 4096);
        let at = |index: u64| buffer.address.offset(index * 4096);
        let (layout, a, b, out) = (Layout::Nt, at(0), at(2), at(4));
        let product = |layout, output| Product { layout, m: 8, n: 64, k: 8, a, b, out, output };
        let mut refused = |product: Product, part: &str| {
            let error = gemm.plan(driver, &product).err().expect("refused").to_string();
            assert!(error.contains(part), "`{part}` is missing in: {error}");
        };
        let rotate = |columns, table, positions| {
            Output::Rotate(Rotation { table, positions, columns, head_dim: 32 })
        };
        refused(product(layout, rotate(65, at(8), at(9))), "no heads of 32");
        refused(product(layout, rotate(96, at(8), at(9))), "no heads of 32");
        refused(product(layout, rotate(64, at(8).offset(8), at(9))), "the table is no multiple");
        refused(product(layout, rotate(64, at(8), out)), "overlaps the positions");
        refused(
            product(layout, Output::SwiGlu { product: out.offset(16) }),
            "overlaps the product",
        );
        refused(product(layout, Output::SwiGlu { product: a }), "overlaps A");
        refused(product(Layout::Nn, Output::SwiGlu { product: at(8) }), "layout nn");
        let gradient = Output::SwiGluGradient { gate_up: at(8) };
        refused(product(Layout::Tn, gradient), "layout tn");
        let gradient = Output::SwiGluGradient { gate_up: out.offset(32) };
        refused(product(Layout::Nn, gradient), "overlaps gate and up");
        driver.release(buffer).unwrap();
        gemm.release(driver).unwrap();
    });
}
