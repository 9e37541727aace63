//! kernels/norm.cu against the f64 CPU backend: every variant, type, kind and option.

use isobath::backend::{self, Backend, NORM_PARTIAL_ROWS, NormSpec, Sink};
use isobath::config::{Dtype, NormKind};
use isobath::cpu::Cpu;
use isobath::cuda::norm::{Norm, NormBackward, NormForward};
use isobath::cuda::{Driver, StreamId};
use isobath::tensor::View;

use super::machines::*;
use crate::support::normals;

const EPS: f64 = 1e-6;

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: Dtype,
    kind: NormKind,
    rows: usize,
    columns: usize,
    depth: usize,
    accumulate: bool,
}

impl Case {
    fn spec(self) -> NormSpec {
        NormSpec { kind: self.kind, eps: EPS, depth: self.depth }
    }

    fn is_layer(self) -> bool {
        self.kind == NormKind::Layer
    }
}

/// What goes in, representable in the case's type where it is an activation, else in f32.
struct Inputs {
    inp: Vec<f64>,           // [T,C]
    gain: Vec<f64>,          // [C]
    d_out: Vec<f64>,         // [T,C]
    d_inp_before: Vec<f64>,  // [T,C]
    d_gain_before: Vec<f64>, // [C]
}

impl Inputs {
    fn new(case: Case) -> Self {
        let draw = |seed, count, dtype| -> Vec<f64> {
            normals(seed, count).into_iter().map(|value| rounded(dtype, value)).collect()
        };
        let activations = |seed| draw(seed, case.rows * case.columns, case.dtype);
        Inputs {
            // Off centre, so that a layer norm has something to take away.
            inp: activations(1).iter().map(|x| rounded(case.dtype, x + 0.5)).collect(),
            gain: draw(3, case.columns, Dtype::F32),
            d_out: activations(4),
            d_inp_before: activations(5),
            d_gain_before: draw(6, case.columns, Dtype::F32),
        }
    }
}

/// What comes out.
#[derive(Default)]
struct Outputs {
    out: Vec<f64>,    // [T,C]
    mean: Vec<f64>,   // [T], empty for RMSNorm
    rstd: Vec<f64>,   // [T]
    d_inp: Vec<f64>,  // [T,C]
    d_gain: Vec<f64>, // [C]
}

// ------------------------------------------------------------------ on a device

fn on_device(driver: &mut dyn Driver, case: Case, inputs: &Inputs) -> Outputs {
    let Case { dtype, rows, columns, .. } = case;
    let norm = Norm::new(driver, dtype, columns).unwrap();
    let elements = rows * columns;
    let inp = upload(driver, "inp", dtype, &inputs.inp);
    let gain = upload(driver, "gain", Dtype::F32, &inputs.gain);
    let out = unwritten(driver, "out", dtype, elements);
    let mean = unwritten(driver, "mean", Dtype::F32, rows);
    let rstd = unwritten(driver, "rstd", Dtype::F32, rows);
    let mean_address = case.is_layer().then_some(mean.address);
    let forward = NormForward {
        spec: case.spec(),
        inp: inp.address,
        gain: gain.address,
        out: out.address,
        mean: mean_address,
        rstd: rstd.address,
    };
    norm.forward(driver, StreamId::MAIN, rows, &forward).unwrap();

    let d_out = upload(driver, "d_out", dtype, &inputs.d_out);
    let d_inp = match case.accumulate {
        true => upload(driver, "d_inp", dtype, &inputs.d_inp_before),
        false => unwritten(driver, "d_inp", dtype, elements),
    };
    let d_gain = upload(driver, "d_gain", Dtype::F32, &inputs.d_gain_before);
    let partial = unwritten(driver, "partial", Dtype::F32, norm.partials(rows) * columns);
    let backward = NormBackward {
        spec: case.spec(),
        inp: inp.address,
        gain: gain.address,
        mean: mean_address,
        rstd: rstd.address,
        d_out: d_out.address,
        partial: partial.address,
        d_inp: Sink { to: d_inp.address, accumulate: case.accumulate },
        d_gain: d_gain.address,
    };
    norm.backward(driver, StreamId::MAIN, rows, &backward).unwrap();

    let means = download(driver, Dtype::F32, mean);
    if !case.is_layer() {
        assert!(means.iter().all(|mean| mean.is_nan()), "{case:?}: RMSNorm wrote a mean");
    }
    let outputs = Outputs {
        out: download(driver, dtype, out),
        mean: if case.is_layer() { means } else { vec![] },
        rstd: download(driver, Dtype::F32, rstd),
        d_inp: download(driver, dtype, d_inp),
        d_gain: download(driver, Dtype::F32, d_gain),
    };
    for buffer in [inp, gain, out, mean, rstd, d_out, d_inp, d_gain, partial] {
        driver.release(buffer).unwrap();
    }
    outputs
}

// ------------------------------------------------------------------ exact and plain

/// The CPU backend in f64; nothing is rounded.
fn exact(case: Case, inputs: &Inputs) -> Outputs {
    let Case { rows, columns, .. } = case;
    let cpu = &mut Cpu::<f64>::new();
    let matrix = [rows, columns];
    let inp = filled(cpu, &matrix, &inputs.inp);
    let gain = filled(cpu, &[columns], &inputs.gain);
    let out = filled(cpu, &matrix, &[]);
    let rstd = filled(cpu, &[rows], &[]);
    let mean = case.is_layer().then(|| filled(cpu, &[rows], &[]));
    cpu.norm_forward(backend::NormForward { spec: case.spec(), inp, gain, out, mean, rstd })
        .unwrap();
    let d_out = filled(cpu, &matrix, &inputs.d_out);
    let partial = filled(cpu, &[rows.div_ceil(NORM_PARTIAL_ROWS), columns], &[]);
    let d_inp = filled(cpu, &matrix, &inputs.d_inp_before);
    let d_gain = filled(cpu, &[columns], &inputs.d_gain_before);
    let sink = Sink { to: d_inp, accumulate: case.accumulate };
    cpu.norm_backward(backend::NormBackward {
        spec: case.spec(),
        inp,
        gain,
        mean,
        rstd,
        d_out,
        partial,
        d_inp: sink,
        d_gain,
    })
    .unwrap();
    let mut values = |view: View| cpu.values(view).to_vec();
    Outputs {
        out: values(out),
        mean: mean.map(&mut values).unwrap_or_default(),
        rstd: values(rstd),
        d_inp: values(d_inp),
        d_gain: values(d_gain),
    }
}

/// The formulas of kernels/norm.cu in f32, one value after the other; activations are rounded to
/// the case's type where they are stored.
fn plain(case: Case, inputs: &Inputs) -> Outputs {
    let columns = case.columns;
    let stored = |value: f32| rounded(case.dtype, f64::from(value));
    let f32s = |values: &[f64]| -> Vec<f32> { values.iter().map(|&it| it as f32).collect() };
    let mut outputs = Outputs::default();
    let divisor = (case.depth as f64).sqrt() as f32;
    let gain: Vec<f32> = inputs.gain.iter().map(|&w| w as f32 / divisor).collect();
    let mut d_gain = vec![0.0f32; columns];
    for row in 0..case.rows {
        let at = row * columns..(row + 1) * columns;
        let inp = f32s(&inputs.inp[at.clone()]);
        let mean = match case.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => inp.iter().sum::<f32>() / columns as f32,
        };
        let squares = inp.iter().map(|inp| (inp - mean) * (inp - mean)).sum::<f32>();
        let rstd = 1.0 / (squares / columns as f32 + EPS as f32).sqrt();
        let out = inp.iter().zip(&gain).map(|(inp, w)| stored((inp - mean) * rstd * w));
        outputs.out.extend(out);

        let d_out = f32s(&inputs.d_out[at.clone()]);
        let x: Vec<f32> = inp.iter().map(|inp| (inp - mean) * rstd).collect();
        let g: Vec<f32> = d_out.iter().zip(&gain).map(|(d_out, w)| d_out * w).collect();
        let mean_g = match case.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => g.iter().sum::<f32>() / columns as f32,
        };
        let mean_gx = g.iter().zip(&x).map(|(g, x)| g * x).sum::<f32>() / columns as f32;
        for column in 0..columns {
            let d = (g[column] - mean_g - x[column] * mean_gx) * rstd;
            let before = inputs.d_inp_before[at.start + column] as f32;
            outputs.d_inp.push(stored(if case.accumulate { before + d } else { d }));
            d_gain[column] += d_out[column] * x[column];
        }
        outputs.rstd.push(f64::from(rstd));
        if case.is_layer() {
            outputs.mean.push(f64::from(mean));
        }
    }
    let added = d_gain.iter().zip(&inputs.d_gain_before);
    outputs.d_gain = added.map(|(d, &before)| f64::from(before as f32 + d / divisor)).collect();
    outputs
}

// ------------------------------------------------------------------ comparisons

fn check(driver: &mut dyn Driver, case: Case) -> Vec<u8> {
    let inputs = Inputs::new(case);
    let found = on_device(driver, case, &inputs);
    let plain = plain(case, &inputs);
    let exact = exact(case, &inputs);
    let compare = |name: &str, dtype, of: fn(&Outputs) -> &Vec<f64>| {
        let what = format!("{case:?} {name}");
        assert_exact(&what, dtype, of(&found), of(&plain), of(&exact));
    };
    compare("out", case.dtype, |it| &it.out);
    compare("rstd", Dtype::F32, |it| &it.rstd);
    if case.is_layer() {
        compare("mean", Dtype::F32, |it| &it.mean);
    }
    compare("d_inp", case.dtype, |it| &it.d_inp);
    compare("d_gain", Dtype::F32, |it| &it.d_gain);
    bits(&found)
}

fn bits(outputs: &Outputs) -> Vec<u8> {
    let Outputs { out, mean, rstd, d_inp, d_gain } = outputs;
    let all = [out, mean, rstd, d_inp, d_gain];
    all.into_iter().flatten().flat_map(|value| value.to_bits().to_le_bytes()).collect()
}

/// The widest and the narrowest row of each variant, and one that does not fill its threads;
/// enough rows that a block takes several, and a number that nothing divides.
fn widths(dtype: Dtype) -> Vec<(usize, usize)> {
    let vector = match dtype {
        Dtype::F32 => 4,
        Dtype::Bf16 => 8,
    };
    let mut widths = vec![(vector, 301), (5 * vector, 67)];
    for (threads, vectors, rows) in
        [(32, 1, 263), (32, 2, 75), (32, 4, 131), (256, 1, 37), (256, 2, 35), (256, 4, 13)]
    {
        let widest = threads * vectors * vector;
        widths.push((widest, rows));
        widths.push((widest - vector, 3));
        if widest + vector <= isobath::cuda::norm::MAX_COLUMNS {
            widths.push((widest + vector, 1));
        }
    }
    if dtype == Dtype::F32 {
        widths.push((8192, 11));
    }
    widths
}

fn every_width(dtype: Dtype) {
    on_every_machine(|driver| {
        let mut all = vec![];
        for (index, (columns, rows)) in widths(dtype).into_iter().enumerate() {
            let kind = if index % 2 == 0 { NormKind::Rms } else { NormKind::Layer };
            let accumulate = index % 5 < 2;
            let depth = 1 + index % 4;
            let case = Case { dtype, kind, rows, columns, depth, accumulate };
            all.extend(check(driver, case));
        }
        all
    });
}

#[test]
fn bf16_rows_of_every_width() {
    every_width(Dtype::Bf16);
}

#[test]
fn f32_rows_of_every_width() {
    every_width(Dtype::F32);
}

#[test]
fn every_kind_and_option() {
    on_every_machine(|driver| {
        let mut all = vec![];
        // A row of one warp, and a row of a whole block.
        for (rows, columns) in [(70, 768), (10, 2560)] {
            for choice in 0..8 {
                let case = Case {
                    dtype: if choice & 1 == 0 { Dtype::Bf16 } else { Dtype::F32 },
                    kind: if choice & 2 == 0 { NormKind::Rms } else { NormKind::Layer },
                    rows,
                    columns,
                    depth: 12,
                    accumulate: choice & 4 != 0,
                };
                all.extend(check(driver, case));
            }
        }
        all
    });
}

/// A checkpoint exports round(w / sqrt(depth)) and is run without a scale.
#[test]
fn the_exported_gain_gives_the_same_bits() {
    on_each_machine(|driver| {
        for (dtype, kind, columns) in [
            (Dtype::Bf16, NormKind::Rms, 768),
            (Dtype::F32, NormKind::Rms, 2048),
            (Dtype::Bf16, NormKind::Layer, 4096),
        ] {
            let depth = 7;
            let case = Case { dtype, kind, rows: 17, columns, depth, accumulate: false };
            let mut inputs = Inputs::new(case);
            inputs.d_gain_before.fill(0.0);
            let scaled = on_device(driver, case, &inputs);
            let divisor = (depth as f64).sqrt() as f32;
            let divided = |value: f64| f64::from(value as f32 / divisor);
            inputs.gain.iter_mut().for_each(|w| *w = divided(*w));
            let exported = on_device(driver, Case { depth: 1, ..case }, &inputs);
            assert_eq!(scaled.out, exported.out, "{case:?}");
            assert_eq!(scaled.rstd, exported.rstd, "{case:?}");
            assert_eq!(scaled.d_inp, exported.d_inp, "{case:?}");
            let d_gain: Vec<f64> = exported.d_gain.iter().map(|&d| divided(d)).collect();
            assert_eq!(scaled.d_gain, d_gain, "{case:?}: d_w = d_gain / sqrt(depth)");
        }
    });
}

#[test]
fn what_cannot_be_normalised_is_refused() {
    on_each_machine(|driver| {
        for (dtype, columns, why) in [
            (Dtype::Bf16, 12, "multiple of 8"),
            (Dtype::F32, 6, "multiple of 4"),
            (Dtype::F32, 0, "multiple of 4"),
            (Dtype::Bf16, 8200, "up to 8192"),
            (Dtype::F32, 8196, "up to 8192"),
        ] {
            let error = Norm::new(driver, dtype, columns).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let norm = Norm::new(driver, Dtype::F32, 8).unwrap();
        let buffer = driver.allocate("all", 8 * 4).unwrap();
        let all = buffer.address;
        let forward = |kind, mean| NormForward {
            spec: NormSpec { kind, eps: EPS, depth: 1 },
            inp: all,
            gain: all,
            out: all,
            mean,
            rstd: all,
        };
        let mut refused = |kind, rows, mean| {
            let launched = norm.forward(driver, StreamId::MAIN, rows, &forward(kind, mean));
            launched.unwrap_err().to_string()
        };
        assert!(refused(NormKind::Layer, 1, None).contains("without a mean"));
        assert!(refused(NormKind::Rms, 1, Some(all)).contains("with a mean"));
        assert!(refused(NormKind::Rms, i32::MAX as usize, None).contains("i32"));
        // No rows: nothing to do, and nothing that a driver could refuse.
        norm.forward(driver, StreamId::MAIN, 0, &forward(NormKind::Rms, None)).unwrap();
    });
}
