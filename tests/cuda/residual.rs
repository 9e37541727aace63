//! kernels/residual.cu against the f64 CPU backend, with and without gains and scales.

use isobath::backend::{self, Backend, GainGradient, NORM_PARTIAL_ROWS, ResidualSpec};
use isobath::config::Dtype;
use isobath::cpu::Cpu;
use isobath::cuda::residual::{
    Gain, GainBackward, ResidualBackward, ResidualForward, ScaledResidual,
};
use isobath::cuda::{DevicePointer, Driver, StreamId};
use isobath::tensor::{Kind, View};

use super::machines::*;

/// out, d_inp, d_out after the backward pass, d_gain.
type Results = [Vec<f64>; 4];

#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    columns: usize,
    /// 0: none
    gains: usize,
    spec: ResidualSpec,
}

struct Operands {
    inp: Vec<f64>,
    residual: Vec<f64>,
    gain: Vec<f64>,
    d_out: Vec<f64>,
    d_gain: Vec<f64>,
}

impl Operands {
    fn new(dtype: Dtype, case: Case) -> Self {
        let count = case.rows * case.columns;
        Operands {
            inp: draws(dtype, 1, count),
            residual: draws(dtype, 2, count),
            gain: draws(Dtype::F32, 3, case.gains),
            d_out: draws(dtype, 4, count),
            d_gain: draws(Dtype::F32, 5, case.gains),
        }
    }
}

fn on_device(driver: &mut dyn Driver, dtype: Dtype, case: Case, with: &Operands) -> Results {
    let Case { rows, columns, gains, spec } = case;
    let kernels = ScaledResidual::new(driver, dtype, columns).unwrap();
    let count = rows * columns;
    let inp = upload(driver, "inp", dtype, &with.inp).address;
    let gain = (gains > 0).then(|| Gain {
        gain: upload(driver, "gain", Dtype::F32, &with.gain).address,
        count: gains,
    });
    let out = unwritten(driver, "out", dtype, count);
    let residual = upload(driver, "residual", dtype, &with.residual).address;
    let args = ResidualForward { inp, residual, gain, out: out.address };
    kernels.forward(driver, StreamId::MAIN, spec, rows, &args).unwrap();

    let d_out = upload(driver, "d_out", dtype, &with.d_out);
    let d_inp = unwritten(driver, "d_inp", dtype, count);
    let d_gain = upload(driver, "d_gain", Dtype::F32, &[&with.d_gain[..], &[7.0]].concat());
    let sums = rows.div_ceil(NORM_PARTIAL_ROWS) * columns;
    let partial = unwritten(driver, "partial", Dtype::F32, sums).address;
    let gain = gain.map(|gain| GainBackward { gain, inp, partial, d_gain: d_gain.address });
    let args = ResidualBackward { d_out: d_out.address, d_inp: d_inp.address, gain };
    kernels.backward(driver, StreamId::MAIN, spec, rows, &args).unwrap();
    let mut d_gain = download(driver, Dtype::F32, d_gain);
    assert_eq!(d_gain.pop(), Some(7.0), "what lies after d_gain stays");
    let [out, d_inp, d_out] = [out, d_inp, d_out].map(|it| download(driver, dtype, it));
    [out, d_inp, d_out, d_gain]
}

fn on_cpu(case: Case, with: &Operands) -> Results {
    let Case { rows, columns, gains, spec } = case;
    let cpu = &mut Cpu::<f64>::new();
    let sizes = [rows, columns];
    let inp = filled(cpu, &sizes, &with.inp);
    let residual = filled(cpu, &sizes, &with.residual);
    let gain = (gains > 0).then(|| filled(cpu, &[gains], &with.gain));
    let out = filled(cpu, &sizes, &[]);
    cpu.scaled_residual_forward(backend::ScaledResidualForward { spec, inp, residual, gain, out })
        .unwrap();
    let d_out = filled(cpu, &sizes, &with.d_out);
    let d_inp = filled(cpu, &sizes, &[]);
    let partial = filled(cpu, &[rows.div_ceil(NORM_PARTIAL_ROWS), columns], &[]);
    let d_gain = filled(cpu, &[gains.max(1)], &with.d_gain);
    let gradient = gain.map(|gain| GainGradient { inp, gain, partial, d_gain });
    cpu.scaled_residual_backward(backend::ScaledResidualBackward {
        spec,
        d_out,
        d_inp,
        gain: gradient,
    })
    .unwrap();
    let mut read = |view: View| cpu.values(View { kind: Kind::Activation, ..view }).to_vec();
    let mut d_gain = read(d_gain);
    d_gain.truncate(gains);
    [read(out), read(d_inp), read(d_out), d_gain]
}

/// The formulas in f32, one value after the other, each stored as the kernels store it.
fn plain(dtype: Dtype, case: Case, with: &Operands) -> Results {
    let ResidualSpec { stream_scale, branch_scale } = case.spec;
    let (a, b) = (stream_scale as f32, branch_scale as f32);
    let stored = |value: f32| rounded(dtype, f64::from(value));
    let factor = |column: usize| match case.gains {
        0 => b,
        1 => b * with.gain[0] as f32,
        _ => b * with.gain[column] as f32,
    };
    let mut results: Results = Default::default();
    let (mut sums, mut total) = (vec![0f32; case.columns], 0f32);
    for i in 0..case.rows * case.columns {
        let column = i % case.columns;
        let (inp, d) = (with.inp[i] as f32, with.d_out[i] as f32);
        results[0].push(stored(a * with.residual[i] as f32 + factor(column) * inp));
        results[1].push(stored(factor(column) * d));
        results[2].push(stored(a * d));
        sums[column] += d * inp;
        total += d * inp;
    }
    let d_gain = with.d_gain.iter().map(|&before| before as f32);
    results[3] = match case.gains {
        1 => d_gain.map(|before| f64::from(before + b * total)).collect(),
        _ => d_gain.zip(sums).map(|(before, sum)| f64::from(before + b * sum)).collect(),
    };
    results
}

fn check(driver: &mut dyn Driver, dtype: Dtype, case: Case) -> Vec<u8> {
    let with = Operands::new(dtype, case);
    let found = on_device(driver, dtype, case, &with);
    let (plain, exact) = (plain(dtype, case, &with), on_cpu(case, &with));
    for (i, name) in ["out", "d_inp", "d_out"].into_iter().enumerate() {
        let what = format!("{dtype} {case:?}, {name}");
        assert_exact(&what, dtype, &found[i], &plain[i], &exact[i]);
    }
    if case.gains > 0 {
        let what = format!("{dtype} {case:?}, d_gain");
        assert_exact(&what, Dtype::F32, &found[3], &plain[3], &exact[3]);
    }
    found.iter().flat_map(|values| bits(values).collect::<Vec<_>>()).collect()
}

const PLAIN: ResidualSpec = ResidualSpec { stream_scale: 1.0, branch_scale: 1.0 };
const BOTH: ResidualSpec = ResidualSpec { stream_scale: 2.213, branch_scale: 0.577 };

#[test]
fn branches_are_added_with_every_kind_of_gain() {
    on_every_machine(|driver| {
        let mut all = vec![];
        for dtype in DTYPES {
            // Rows around the 64 of a block, strips of less, of exactly and of more than 32
            // vectors.
            for (rows, vectors) in [(1, 1), (63, 5), (64, 32), (65, 33), (200, 70)] {
                let columns = vectors * vector(dtype);
                for (gains, spec) in
                    [(0, PLAIN), (0, BOTH), (columns, PLAIN), (columns, BOTH), (1, BOTH)]
                {
                    all.extend(check(driver, dtype, Case { rows, columns, gains, spec }));
                }
            }
        }
        all
    });
}

/// A one in each column: each value's place shows, and no gradient comes from a padded lane.
#[test]
fn each_column_has_its_own_gain() {
    on_each_machine(|driver| {
        for dtype in DTYPES {
            let columns = 40 * vector(dtype);
            let case = Case { rows: columns, columns, gains: columns, spec: PLAIN };
            let ones: Vec<f64> =
                (0..columns * columns).map(|i| f64::from(i % (columns + 1) == 0)).collect();
            let ramp: Vec<f64> = (0..columns).map(|i| (i + 1) as f64).collect();
            let with = Operands {
                inp: ones.clone(),
                residual: vec![0.0; columns * columns],
                gain: ramp.clone(),
                d_out: ones,
                d_gain: vec![0.0; columns],
            };
            let [out, d_inp, _, d_gain] = on_device(driver, dtype, case, &with);
            assert_eq!(d_gain, vec![1.0; columns], "{dtype}");
            for (i, gain) in ramp.into_iter().enumerate() {
                let at = i * (columns + 1);
                let gain = rounded(dtype, gain);
                assert_eq!((out[at], d_inp[at]), (gain, gain), "{dtype}, column {i}");
            }
            assert_eq!(out.iter().filter(|value| **value != 0.0).count(), columns);
        }
    });
}

#[test]
fn what_the_kernels_cannot_take_is_refused() {
    on_each_machine(|driver| {
        let error = ScaledResidual::new(driver, Dtype::Bf16, 12).unwrap_err().to_string();
        assert!(error.contains("choose model.hidden as a multiple of 8"), "{error}");
        let kernels = ScaledResidual::new(driver, Dtype::Bf16, 64).unwrap();
        let all = driver.allocate("all", 4096).unwrap().address;
        let mut forward = |rows, inp| {
            let args = ResidualForward { inp, residual: all, gain: None, out: all.offset(1024) };
            kernels.forward(driver, StreamId::MAIN, PLAIN, rows, &args)
        };
        let error = forward(1, all.offset(8)).unwrap_err().to_string();
        assert!(error.contains("let inp begin at a multiple of 16 bytes"), "{error}");
        let error = forward(i32::MAX as usize, all).unwrap_err().to_string();
        assert!(error.contains("smaller train.micro_batch"), "{error}");
        forward(0, DevicePointer::NULL).unwrap();
    });
}
