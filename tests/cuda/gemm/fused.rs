//! The epilogues that kernels/gemm_sm90.cu has beyond an addend: rotary embedding, SwiGLU and its
//! gradient, against the f64 formulas and against the kernels that do the same on their own.

use isobath::backend::HeadSpec;
use isobath::config::Dtype;
use isobath::cuda::gemm::{Choice, Gemm, Layout, Output, Product, Rotation, Variant};
use isobath::cuda::pointwise::{Pointwise, SwigluForward};
use isobath::cuda::{Allocation, DevicePointer, Driver, Family, StreamId};

use super::super::machines::*;
use super::{MARGIN, UNTOUCHED, assert_equal, bits, shapes, transposed};
use crate::support::tokens;

const BF16: Dtype = Dtype::Bf16;
const POSITIONS: usize = 21;
const NULL: DevicePointer = DevicePointer::NULL;

#[derive(Clone, Copy, Debug)]
enum Fusion {
    Rotary { heads: HeadSpec },
    SwiGlu,
    SwiGluGradient,
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

/// The result, and behind SwiGLU the product.
#[derive(Clone, PartialEq)]
struct Found {
    out: Vec<f64>,
    product: Vec<f64>,
}

impl Case {
    fn new(fusion: Fusion, sizes: [usize; 3]) -> Self {
        let [m, n, k] = sizes;
        let (halves, head_dim) = match fusion {
            Fusion::Rotary { heads } => (1, heads.head_dim),
            Fusion::SwiGlu => (2, 0),
            Fusion::SwiGluGradient => (1, 0),
        };
        // So that gates stay where a sigmoid bends.
        let scale = (k as f64).sqrt().recip();
        let a = draws(BF16, 1, m * k).into_iter().map(|it| rounded(BF16, it * scale)).collect();
        let angles = draws(Dtype::F32, 5, POSITIONS * head_dim.max(1));
        let table = angles.iter().map(|it| rounded(Dtype::F32, (3.0 * it).cos())).collect();
        Case {
            fusion,
            sizes,
            a,
            b: draws(BF16, 2, halves * n * k),
            gate_up: draws(BF16, 3, 2 * m * n),
            table,
            positions: tokens(4, m, POSITIONS),
        }
    }

    /// Entry [row,column] of A B^T, in f64 and in f32.
    fn entry(&self, row: usize, column: usize) -> (f64, f32) {
        let k = self.sizes[2];
        let pairs = self.a[row * k..][..k].iter().zip(&self.b[column * k..][..k]);
        pairs.fold((0.0, 0.0), |(exact, plain), (a, b)| {
            (exact + a * b, plain + *a as f32 * *b as f32)
        })
    }

    /// Result and product: exact, and by the plain formula, every tensor rounded when it is written.
    fn expected(&self) -> [Found; 2] {
        let [m, n, _] = self.sizes;
        let row = |row: usize| -> [[Vec<f64>; 2]; 2] {
            let columns = self.b.len() / self.sizes[2];
            let entries: Vec<(f64, f32)> = (0..columns).map(|it| self.entry(row, it)).collect();
            let exact: Vec<f64> = entries.iter().map(|it| it.0).collect();
            let plain: Vec<f64> = entries.iter().map(|it| rounded(BF16, it.1.into())).collect();
            match self.fusion {
                Fusion::Rotary { heads } => {
                    let position = self.positions[row] as usize;
                    let table = &self.table[position * heads.head_dim..][..heads.head_dim];
                    let round = |value| rounded(BF16, value);
                    [
                        [rotated(heads, table, &exact, |value| value), vec![]],
                        [rotated(heads, table, &plain, round), vec![]],
                    ]
                }
                Fusion::SwiGlu => {
                    let of = |gate_up: &[f64]| -> Vec<f64> {
                        let (gate, up) = gate_up.split_at(n);
                        gate.iter().zip(up).map(|(&gate, &up)| swiglu(gate, up)).collect()
                    };
                    let product = of(&plain).into_iter().map(|it| rounded(BF16, it)).collect();
                    let exact_product = of(&exact);
                    [[exact, exact_product], [plain, product]]
                }
                Fusion::SwiGluGradient => {
                    let (gate, up) = self.gate_up[row * 2 * n..][..2 * n].split_at(n);
                    let of = |d_out: &[f64]| -> Vec<f64> {
                        let all: Vec<[f64; 2]> =
                            (0..n).map(|i| swiglu_gradient(gate[i], up[i], d_out[i])).collect();
                        all.iter().map(|it| it[0]).chain(all.iter().map(|it| it[1])).collect()
                    };
                    let rounded = of(&plain).into_iter().map(|it| rounded(BF16, it)).collect();
                    [[of(&exact), vec![]], [rounded, vec![]]]
                }
            }
        };
        let mut found = [0, 1].map(|_| Found { out: vec![], product: vec![] });
        for all in (0..m).map(row) {
            for (found, [out, product]) in found.iter_mut().zip(all) {
                found.out.extend(out);
                found.product.extend(product);
            }
        }
        found
    }
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

/// Runs it; nothing is written behind the results.
fn multiply(driver: &mut dyn Driver, gemm: &Gemm, choice: Choice, case: &Case) -> Found {
    let variant = choice.variant;
    let [m, n, k] = case.sizes;
    let layout = variant.layout;
    let b = if layout == Layout::Nn { transposed(&case.b, n, k) } else { case.b.clone() };
    let with_margin = |count: usize| -> Vec<f64> {
        let mut all = vec![f64::NAN; count];
        all.resize(count + MARGIN, UNTOUCHED);
        all
    };
    let (parts, products) = match case.fusion {
        Fusion::Rotary { .. } => (1, 0),
        Fusion::SwiGlu => (2, m * n),
        Fusion::SwiGluGradient => (2, 0),
    };
    let a = upload(driver, "a", BF16, &case.a);
    let b = upload(driver, "b", BF16, &b);
    let out = upload(driver, "out", BF16, &with_margin(parts * m * n));
    let product = upload(driver, "product", BF16, &with_margin(products));
    let gate_up = upload(driver, "gate and up", BF16, &case.gate_up);
    let table = upload(driver, "table", Dtype::F32, &case.table);
    let positions = driver.upload("positions", &case.positions).unwrap();
    let output = match case.fusion {
        Fusion::Rotary { heads } => Output::Rotate(Rotation {
            table: table.address,
            positions: positions.address,
            columns: (heads.heads + heads.kv_heads) * heads.head_dim,
            head_dim: heads.head_dim,
        }),
        Fusion::SwiGlu => Output::SwiGlu { product: product.address },
        Fusion::SwiGluGradient => Output::SwiGluGradient { gate_up: gate_up.address },
    };
    let (a_at, b_at, out_at) = (a.address, b.address, out.address);
    let whole = Product { layout, m, n, k, a: a_at, b: b_at, out: out_at, output };
    let plan = gemm.plan_with(driver, choice, &whole).unwrap();
    plan.launch(driver, StreamId::MAIN).unwrap();
    let mut taken = |from: Allocation, count: usize| -> Vec<f64> {
        let mut found = download(driver, BF16, from);
        let margin = found.split_off(count);
        assert!(margin.iter().all(|&it| it == UNTOUCHED), "{} wrote too far", variant.kernel);
        found
    };
    let found = Found { out: taken(out, parts * m * n), product: taken(product, products) };
    for buffer in [a, b, out, product, gate_up, table, positions] {
        driver.release(buffer).unwrap();
    }
    found
}

/// The Hopper kernels, where the machine has them.
fn hopper(driver: &mut dyn Driver) -> Option<Gemm> {
    if driver.properties().compute_capability != (9, 0) {
        println!("skipped: only Hopper's products have more than an addend");
        return None;
    }
    Some(Gemm::new(driver, BF16, Some(Family::Sm90)).unwrap())
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

/// The shapes of the plain kernels, and one whose last tile ends with its first box of 32 columns;
/// columns are whole heads where they are rotated, up to as many as there are in two tiles, some of
/// them v's.
fn cases(variant: &Variant, fusion: Fusion) -> Vec<Case> {
    let boxes = [variant.rows + 9, variant.columns + 32, variant.depth];
    let shapes = shapes(variant, BF16).into_iter().chain([boxes]);
    let case = |[m, n, k]: [usize; 3]| match fusion {
        Fusion::Rotary { heads: HeadSpec { head_dim, .. } } => {
            let count = n.div_ceil(head_dim).max(3);
            let kv_heads = if count % 2 == 1 { 1 + (count - 3) / 4 } else { 1 };
            let heads = HeadSpec { heads: count - 2 * kv_heads, kv_heads, head_dim };
            let columns = heads.qkv_columns();
            Case::new(Fusion::Rotary { heads }, [m, columns, k.next_multiple_of(8)])
        }
        _ => Case::new(fusion, [m, n, k]),
    };
    shapes.map(case).collect()
}

#[test]
fn every_kernel_follows_its_formula() {
    on_each_machine(|driver| {
        let Some(gemm) = hopper(driver) else { return };
        let all = fusions(&gemm);
        let kernels: Vec<&str> = all.iter().map(|(variant, _)| variant.kernel).collect();
        for epilogue in ["nt_rotary_", "nt_swiglu_", "nn_swiglu_"] {
            for tile in ["128x256", "128x192", "128x128"] {
                let name = format!("gemm_sm90_{epilogue}{tile}");
                assert!(kernels.contains(&name.as_str()), "{name} is missing in {kernels:?}");
            }
        }
        let alone = Pointwise::new(driver, BF16).unwrap();
        for (index, (variant, fusion)) in all.into_iter().enumerate() {
            for (other, case) in cases(variant, fusion).into_iter().enumerate() {
                // Heads of five widths share kernels, whose shapes take turns.
                if matches!(fusion, Fusion::Rotary { .. }) && (index + other) % 3 != 0 {
                    continue;
                }
                // Blocks alone and in pairs.
                let cluster = 1 + (index / 3 + other) % 2;
                let choice = Choice { cluster, ..Choice::whole(variant) };
                let what = format!("{choice} {:?} {:?}", case.fusion, case.sizes);
                let found = multiply(driver, &gemm, choice, &case);
                let [exact, plain] = case.expected();
                assert_exact(&what, BF16, &found.out, &plain.out, &exact.out);
                if matches!(fusion, Fusion::SwiGlu) {
                    let what = format!("{what}, product");
                    assert_exact(&what, BF16, &found.product, &plain.product, &exact.product);
                    let expected = swiglu_alone(driver, &alone, &case, &found.out);
                    assert_equal(&what, &found.product, &expected, case.sizes[1]);
                }
            }
        }
        gemm.release(driver).unwrap();
    });
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
    let args = SwigluForward { inp: inp.address, out: out.address };
    kernels.swiglu_forward(driver, StreamId::MAIN, m, n, &args).unwrap();
    let found = download(driver, BF16, out);
    driver.release(inp).unwrap();
    driver.release(out).unwrap();
    found
}

/// Two tiles each way with tails, and more steps than stages.
#[test]
fn no_schedule_changes_a_bit() {
    on_every_machine(|driver| {
        let Some(gemm) = hopper(driver) else { return vec![] };
        let mut all = vec![];
        let mut seen = vec![];
        for (variant, fusion) in fusions(&gemm) {
            if seen.contains(&variant.kernel) {
                continue;
            }
            seen.push(variant.kernel);
            let k = (variant.stages + 1) * variant.depth + 8;
            let sizes = [variant.rows + 9, variant.columns + 8, k];
            let case = match fusion {
                Fusion::Rotary { heads: HeadSpec { head_dim, .. } } => {
                    let count = (variant.columns / head_dim + 1).max(3);
                    let heads = HeadSpec { heads: count - 2, kv_heads: 1, head_dim };
                    let fusion = Fusion::Rotary { heads };
                    Case::new(fusion, [sizes[0], heads.qkv_columns(), k])
                }
                _ => Case::new(fusion, sizes),
            };
            let mut alone: Option<Found> = None;
            for &cluster in variant.clusters() {
                let choice = Choice { cluster, ..Choice::whole(variant) };
                let found = multiply(driver, &gemm, choice, &case);
                let alone = alone.get_or_insert_with(|| found.clone());
                assert!(found == *alone, "{choice} gives other bits than blocks alone");
                all.extend(bits(&found.out));
                all.extend(bits(&found.product));
            }
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
