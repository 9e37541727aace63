//! kernels/pointwise.cu against the f64 CPU backend: rotary, SwiGLU, addition and casts.

use half::bf16;
use isobath::backend::{self, Backend, HeadSpec};
use isobath::config::Dtype;
use isobath::cpu::Cpu;
use isobath::cuda::pointwise::{Pointwise, Rotary, SwiGluBackward, SwiGluForward};
use isobath::cuda::{DevicePointer, Driver, StreamId};
use isobath::random::Philox;

use super::machines::*;
use crate::support::{normals, tokens};

// ------------------------------------------------------------------ rotary

const POSITIONS: usize = 19;

/// Cosines and sines of random angles, [POSITIONS,D].
fn angles(head_dim: usize) -> Vec<f64> {
    let generator = Philox::new(3, 0);
    let half = head_dim / 2;
    let turn = |position: usize, i: usize| 10.0 * generator.normal((position * half + i) as u64);
    let row = |position| {
        let cosines = (0..half).map(move |i| turn(position, i).cos());
        cosines.chain((0..half).map(move |i| turn(position, i).sin()))
    };
    (0..POSITIONS).flat_map(row).map(|value| rounded(Dtype::F32, value)).collect()
}

/// The formula in f32, one pair after the other.
fn plain_rotary(
    dtype: Dtype,
    heads: HeadSpec,
    table: &[f64],
    positions: &[i32],
    qkv: &[f64],
    inverse: bool,
) -> Vec<f64> {
    let (columns, half) = (heads.qkv_columns(), heads.head_dim / 2);
    let mut out = qkv.to_vec();
    for (row, &position) in positions.iter().enumerate() {
        let table = &table[position as usize * heads.head_dim..][..heads.head_dim];
        for head in 0..heads.heads + heads.kv_heads {
            for i in 0..half {
                let low = row * columns + head * heads.head_dim + i;
                let (x, y) = (qkv[low] as f32, qkv[low + half] as f32);
                let cos = table[i] as f32;
                let sin = if inverse { -table[half + i] } else { table[half + i] } as f32;
                out[low] = rounded(dtype, f64::from(x * cos - y * sin));
                out[low + half] = rounded(dtype, f64::from(y * cos + x * sin));
            }
        }
    }
    out
}

fn check_rotary(
    driver: &mut dyn Driver,
    dtype: Dtype,
    heads: HeadSpec,
    rows: usize,
    inverse: bool,
) -> Vec<u8> {
    let columns = heads.qkv_columns();
    let qkv = draws(dtype, 1, rows * columns);
    let table = angles(heads.head_dim);
    let positions = tokens(2, rows, POSITIONS);

    let kernels = Pointwise::new(driver, dtype).unwrap();
    let on_device = upload(driver, "qkv", dtype, &qkv);
    let args = Rotary {
        table: upload(driver, "table", Dtype::F32, &table).address,
        positions: driver.upload("positions", &positions).unwrap().address,
        qkv: on_device.address,
        inverse,
    };
    kernels.rotary(driver, StreamId::MAIN, heads, rows, &args).unwrap();
    let found = download(driver, dtype, on_device);

    let cpu = &mut Cpu::<f64>::new();
    let rotated = filled(cpu, &[rows, columns], &qkv);
    let cpu_table = filled(cpu, &[POSITIONS, heads.head_dim], &table);
    let cpu_positions = filled_index(cpu, &positions);
    match inverse {
        false => cpu
            .rotary_forward(backend::Rotary {
                heads,
                table: cpu_table,
                positions: cpu_positions,
                qkv: rotated,
            })
            .unwrap(),
        true => cpu
            .rotary_backward(backend::Rotary {
                heads,
                table: cpu_table,
                positions: cpu_positions,
                qkv: rotated,
            })
            .unwrap(),
    }
    let plain = plain_rotary(dtype, heads, &table, &positions, &qkv, inverse);
    let what = format!("rotary {dtype} {heads:?} {rows} rows, inverse {inverse}");
    assert_exact(&what, dtype, &found, &plain, cpu.values(rotated));
    let untouched = (heads.heads + heads.kv_heads) * heads.head_dim;
    for (found, before) in found.chunks(columns).zip(qkv.chunks(columns)) {
        assert_eq!(found[untouched..], before[untouched..], "{what}: v stays");
    }
    bits(&found).collect()
}

#[test]
fn q_and_k_are_rotated_and_back() {
    on_every_machine(|driver| {
        let mut all = vec![];
        for dtype in DTYPES {
            // The narrowest head, those of attention kernels, rows of less and of more than one
            // task of 64 vectors, and enough rows that a warp takes several.
            for (heads, kv_heads, head_dim, rows) in [
                (1, 1, 2 * vector(dtype), 301),
                (3, 1, 32, 5),
                (5, 2, 48, 7),
                (12, 4, 64, 67),
                (2, 2, 96, 1),
                (9, 3, 128, 19),
            ] {
                let heads = HeadSpec { heads, kv_heads, head_dim };
                all.extend(check_rotary(driver, dtype, heads, rows, rows % 2 == 0));
                all.extend(check_rotary(driver, dtype, heads, rows, rows % 2 != 0));
            }
        }
        all
    });
}

/// A one in each column, so that each value's place shows.
#[test]
fn a_quarter_turn_exchanges_the_halves() {
    on_each_machine(|driver| {
        for dtype in DTYPES {
            let heads = HeadSpec { heads: 2, kv_heads: 1, head_dim: 32 };
            let columns = heads.qkv_columns();
            let kernels = Pointwise::new(driver, dtype).unwrap();
            let ones: Vec<f64> =
                (0..columns * columns).map(|i| f64::from(i % (columns + 1) == 0)).collect();
            let qkv = upload(driver, "qkv", dtype, &ones);
            let table: Vec<f64> = (0..32).map(|i| if i < 16 { 0.0 } else { 1.0 }).collect();
            let args = Rotary {
                table: upload(driver, "table", Dtype::F32, &table).address,
                positions: driver.upload("positions", &vec![0i32; columns]).unwrap().address,
                qkv: qkv.address,
                inverse: false,
            };
            kernels.rotary(driver, StreamId::MAIN, heads, columns, &args).unwrap();
            let found = download(driver, dtype, qkv);
            for row in 0..columns {
                let mut expected = vec![0.0; columns];
                match (row < 96, row % 32 < 16) {
                    (true, true) => expected[row + 16] = 1.0,
                    (true, false) => expected[row - 16] = -1.0,
                    (false, _) => expected[row] = 1.0,
                }
                assert_eq!(found[row * columns..][..columns], expected, "{dtype}, row {row}");
            }
        }
    });
}

// ------------------------------------------------------------------ SwiGLU

/// out [T,F] and d_inp [T,2F].
fn swiglu_on_device(
    driver: &mut dyn Driver,
    dtype: Dtype,
    ffn: usize,
    inp: &[f64],
    d_out: &[f64],
) -> (Vec<f64>, Vec<f64>) {
    let rows = d_out.len() / ffn;
    let kernels = Pointwise::new(driver, dtype).unwrap();
    let out = unwritten(driver, "out", dtype, rows * ffn);
    let d_inp = unwritten(driver, "d_inp", dtype, rows * 2 * ffn);
    let inp = upload(driver, "inp", dtype, inp).address;
    let args = SwiGluForward { inp, out: out.address };
    kernels.swiglu_forward(driver, StreamId::MAIN, rows, ffn, &args).unwrap();
    let d_out = upload(driver, "d_out", dtype, d_out).address;
    let args = SwiGluBackward { inp, d_out, d_inp: d_inp.address };
    kernels.swiglu_backward(driver, StreamId::MAIN, rows, ffn, &args).unwrap();
    (download(driver, dtype, out), download(driver, dtype, d_inp))
}

/// The formulas in f32, one value after the other.
fn plain_swiglu(dtype: Dtype, ffn: usize, inp: &[f64], d_out: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let stored = |value: f32| rounded(dtype, f64::from(value));
    let (mut out, mut d_inp) = (vec![], vec![]);
    for (inp, d_out) in inp.chunks(2 * ffn).zip(d_out.chunks(ffn)) {
        let mut d_up = vec![];
        for i in 0..ffn {
            let (gate, up, d) = (inp[i] as f32, inp[ffn + i] as f32, d_out[i] as f32);
            let sigmoid = 1.0 / (1.0 + (-gate).exp());
            let silu = gate * sigmoid;
            out.push(stored(silu * up));
            d_inp.push(stored(d * up * (sigmoid + silu * (1.0 - sigmoid))));
            d_up.push(stored(d * silu));
        }
        d_inp.extend(d_up);
    }
    (out, d_inp)
}

fn check_swiglu(driver: &mut dyn Driver, dtype: Dtype, rows: usize, ffn: usize) -> Vec<u8> {
    let wide = |value: &f64| rounded(dtype, 3.0 * value);
    let inp: Vec<f64> = draws(dtype, 1, rows * 2 * ffn).iter().map(wide).collect();
    let d_out = draws(dtype, 2, rows * ffn);
    let (out, d_inp) = swiglu_on_device(driver, dtype, ffn, &inp, &d_out);
    let (plain_out, plain_d_inp) = plain_swiglu(dtype, ffn, &inp, &d_out);

    let cpu = &mut Cpu::<f64>::new();
    let cpu_inp = filled(cpu, &[rows, 2 * ffn], &inp);
    let cpu_out = filled(cpu, &[rows, ffn], &[]);
    cpu.swiglu_forward(backend::SwiGluForward { inp: cpu_inp, out: cpu_out }).unwrap();
    let cpu_d_out = filled(cpu, &[rows, ffn], &d_out);
    let cpu_d_inp = filled(cpu, &[rows, 2 * ffn], &[]);
    cpu.swiglu_backward(backend::SwiGluBackward {
        inp: cpu_inp,
        d_out: cpu_d_out,
        d_inp: cpu_d_inp,
    })
    .unwrap();
    let what = format!("swiglu {dtype} {rows} rows of {ffn}");
    assert_exact(&format!("{what}, out"), dtype, &out, &plain_out, cpu.values(cpu_out));
    assert_exact(&format!("{what}, d_inp"), dtype, &d_inp, &plain_d_inp, cpu.values(cpu_d_inp));
    bits(&out).chain(bits(&d_inp)).collect()
}

#[test]
fn swiglu_of_every_width() {
    on_every_machine(|driver| {
        let mut all = vec![];
        for dtype in DTYPES {
            // Around one task of 64 vectors, and enough rows that a warp takes several.
            for (vectors, rows) in [(1, 301), (31, 3), (33, 2), (64, 13), (65, 70), (172, 5)] {
                all.extend(check_swiglu(driver, dtype, rows, vectors * vector(dtype)));
            }
        }
        all
    });
}

/// Each value of a long ramp of gates has the error of its own size, also where the sigmoid is tiny
/// or rounds to one; where it is too small for a float, the result is no larger than that.
#[test]
fn swiglu_is_exact_for_gates_of_every_size() {
    on_each_machine(|driver| {
        for dtype in DTYPES {
            let ffn = 2048;
            let ramp = |i: usize| rounded(dtype, (i as f64 - 1024.0) / 8.0);
            let mut inp: Vec<f64> = (0..ffn).map(ramp).collect();
            inp[0] = rounded(dtype, -1e30);
            inp[ffn - 1] = rounded(dtype, 1e30);
            inp.resize(2 * ffn, 1.0);
            let d_out = vec![1.0; ffn];
            let (out, d_inp) = swiglu_on_device(driver, dtype, ffn, &inp, &d_out);
            // The rounding of the result, and six of f32 before it: e^-x, 1 + e^-x, the quotient
            // and the products.
            let unit = unit_roundoff(dtype) + 6.0 * unit_roundoff(Dtype::F32);
            let close = |name: &str, i: usize, found: f64, exact: f64, size: f64| {
                let allowed = unit * size + 1e-35;
                assert!(
                    (found - exact).abs() <= allowed,
                    "{dtype} {name} of gate {}: found {found:e}, expected {exact:e}, {:.2} of the \
                     tolerance",
                    inp[i],
                    (found - exact).abs() / allowed
                );
            };
            for i in 0..ffn {
                let gate = inp[i];
                let sigmoid = 1.0 / (1.0 + (-gate).exp());
                let silu = if sigmoid == 0.0 { 0.0 } else { gate * sigmoid };
                // 1 - sigmoid in f32 has the error of the sigmoid, not its own.
                let slope = silu * (1.0 / (1.0 + gate.exp()));
                let cancelled = silu.abs().min(1e3) * unit_roundoff(Dtype::F32) / unit;
                close("out", i, out[i], silu, silu.abs());
                close("d_up", i, d_inp[ffn + i], silu, silu.abs());
                let size = sigmoid + slope.abs() + 4.0 * cancelled;
                close("d_gate", i, d_inp[i], sigmoid + slope, size);
            }
        }
    });
}

// ------------------------------------------------------------------ flat buffers

/// Nothing, less than a vector, tails, and more than all threads of the CPU machine take at once.
const ELEMENTS: [usize; 9] = [0, 1, 7, 8, 9, 1000, 4 * 256, 4 * 8 * 256 * 4 + 3, 65549];

#[test]
fn sums_are_rounded_once() {
    on_every_machine(|driver| {
        let mut all = vec![];
        for dtype in DTYPES {
            let kernels = Pointwise::new(driver, dtype).unwrap();
            for elements in ELEMENTS {
                for in_f32 in [false, true] {
                    let dtype = if in_f32 { Dtype::F32 } else { dtype };
                    // 5 values after the end must stay.
                    let from = draws(dtype, 1, elements + 5);
                    let mut expected = draws(dtype, 2, elements + 5);
                    let added = upload(driver, "from", dtype, &from).address;
                    let to = upload(driver, "to", dtype, &expected);
                    let count = elements as u64;
                    match in_f32 {
                        true => kernels.add_f32(driver, StreamId::MAIN, count, added, to.address),
                        false => kernels.add(driver, StreamId::MAIN, count, added, to.address),
                    }
                    .unwrap();
                    for (to, from) in expected.iter_mut().zip(&from[..elements]) {
                        *to = rounded(dtype, f64::from(*to as f32 + *from as f32));
                    }
                    let found = download(driver, dtype, to);
                    assert!(found == expected, "{dtype}, {elements} elements");
                    all.extend(bits(&found));
                }
            }
        }
        all
    });
}

/// Normals, and what rounding can get wrong.
fn castable(count: usize) -> Vec<f32> {
    let halfway = f32::from_bits(0x3f80_8000); // between 1 and the next bf16: up
    let odd_halfway = f32::from_bits(0x3f81_8000); // up, too
    let special = [
        halfway,
        odd_halfway,
        -odd_halfway,
        f32::from_bits(0x3f80_8001),
        f32::MAX, // rounds to infinity
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::from_bits(0x7fff_ffff), // a NaN that would become -0
        -0.0,
        f32::from_bits(1),
        f32::from_bits(0x0001_8000),
        f32::MIN_POSITIVE,
    ];
    let normals = normals(4, count).into_iter().map(|value| value as f32);
    // The special ones last: tails have them too.
    let mut values: Vec<f32> = normals.collect();
    values.iter_mut().rev().zip(special).for_each(|(to, special)| *to = special);
    values
}

#[test]
fn a_cast_rounds_to_nearest_halves_away() {
    on_every_machine(|driver| {
        let mut all = vec![];
        let kernels = Pointwise::new(driver, Dtype::Bf16).unwrap();
        for elements in ELEMENTS {
            let values = castable(elements);
            let behind = bf16::from_f32(7.0);
            let from = driver.upload("f32", &[&values[..], &[0.0]].concat()).unwrap();
            let narrow = driver.upload("bf16", &vec![behind; elements + 1]).unwrap();
            let (count, main) = (elements as u64, StreamId::MAIN);
            kernels.cast_to_bf16(driver, main, count, from.address, narrow.address).unwrap();
            let narrow = driver.download::<bf16>(narrow.address, elements + 1).unwrap();
            for (i, &value) in values.iter().enumerate() {
                let expected = rounded_parameter(value);
                if value.is_nan() {
                    assert!(narrow[i].is_nan(), "{elements}: NaN at {i}");
                } else {
                    assert_eq!(narrow[i].to_bits(), expected.to_bits(), "{elements}: {value:e}");
                }
            }
            assert_eq!(narrow[elements], behind, "{elements}: the end");
            all.extend(narrow.iter().flat_map(|value| value.to_bits().to_le_bytes()));
        }
        all
    });
}

// ------------------------------------------------------------------ refusals

#[test]
fn what_the_kernels_cannot_take_is_refused() {
    on_each_machine(|driver| {
        let main = StreamId::MAIN;
        let all = driver.allocate("all", 4096).unwrap().address;
        for (dtype, head_dim, why) in [
            (Dtype::Bf16, 24, "multiple of 16"),
            (Dtype::F32, 12, "multiple of 8"),
            (Dtype::F32, 0, "multiple of 8"),
        ] {
            let kernels = Pointwise::new(driver, dtype).unwrap();
            let heads = HeadSpec { heads: 1, kv_heads: 1, head_dim };
            let args = Rotary { table: all, positions: all, qkv: all, inverse: false };
            let error = kernels.rotary(driver, main, heads, 1, &args).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let kernels = Pointwise::new(driver, Dtype::Bf16).unwrap();
        let mut swiglu = |rows, ffn, inp| {
            let args = SwiGluForward { inp, out: all };
            let forward = kernels.swiglu_forward(driver, main, rows, ffn, &args);
            let args = SwiGluBackward { inp, d_out: all, d_inp: all };
            let backward = kernels.swiglu_backward(driver, main, rows, ffn, &args);
            let (forward, backward) = (forward.unwrap_err(), backward.unwrap_err());
            format!("{forward} {backward}")
        };
        let both = |text: String, why: &str| {
            assert_eq!(text.matches(why).count(), 2, "{text}");
        };
        both(swiglu(1, 12, all), "choose model.ffn as a multiple of 8");
        both(swiglu(1, 0, all), "choose model.ffn as a multiple of 8");
        both(swiglu(1, 8, all.offset(8)), "let inp begin at a multiple of 16 bytes");
        both(swiglu(i32::MAX as usize, 8, all), "choose a smaller train.micro_batch");
        both(swiglu(usize::MAX, 1024, all), "choose a smaller train.micro_batch");
        both(swiglu(1, i32::MAX as usize - 7, all), "choose a smaller model.ffn");
        let heads = HeadSpec { heads: 1, kv_heads: 1, head_dim: 16 };
        let rotary = |qkv: DevicePointer| Rotary { table: all, positions: all, qkv, inverse: true };
        let error = kernels.rotary(driver, main, heads, 1, &rotary(all.offset(2))).unwrap_err();
        assert!(error.to_string().contains("let qkv begin"), "{error}");
        let many = i32::MAX as usize;
        let error = kernels.rotary(driver, main, heads, many, &rotary(all)).unwrap_err();
        assert!(error.to_string().contains("smaller train.micro_batch"), "{error}");
        let huge = HeadSpec { heads: 1 << 28, ..heads };
        let error = kernels.rotary(driver, main, huge, 1, &rotary(all)).unwrap_err();
        assert!(error.to_string().contains("smaller model.heads"), "{error}");
        for refused in [
            kernels.add(driver, main, 8, all.offset(4), all),
            kernels.add_f32(driver, main, 8, all, all.offset(4)),
            kernels.cast_to_bf16(driver, main, 8, all.offset(4), all),
        ] {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains("multiple of 16 bytes"), "{error}");
        }
        // Nothing to do, and nothing that a driver could refuse.
        kernels.rotary(driver, main, heads, 0, &rotary(DevicePointer::NULL)).unwrap();
        kernels.add(driver, main, 0, DevicePointer::NULL, DevicePointer::NULL).unwrap();
    });
}
