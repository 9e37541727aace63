//! kernels/attention_sm80.cu, attention_f32.cu and attention_decode.cu against the f64 CPU backend.

use isobath::backend::{AttentionSpec, Backend, HeadSpec};
use isobath::config::Dtype;
use isobath::cpu::Cpu;
use isobath::cuda::attention::Attention;
use isobath::cuda::{Driver, StreamId};
use isobath::tensor::View;

use super::machines::*;
use crate::support::normals;

const HEAD_DIMS: [usize; 5] = [32, 48, 64, 96, 128];

fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> HeadSpec {
    HeadSpec { heads, kv_heads, head_dim }
}

/// Where the heads of a token begin: in a row of qkv, and in one of out.
fn q_column(heads: HeadSpec, head: usize) -> usize {
    head * heads.head_dim
}
fn k_column(heads: HeadSpec, head: usize) -> usize {
    (heads.heads + head / (heads.heads / heads.kv_heads)) * heads.head_dim
}
fn v_column(heads: HeadSpec, head: usize) -> usize {
    k_column(heads, head) + heads.kv_heads * heads.head_dim
}

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: Dtype,
    spec: AttentionSpec,
}

impl Case {
    fn new(dtype: Dtype, heads: HeadSpec, batch: usize, sequence: usize) -> Self {
        Case { dtype, spec: AttentionSpec { heads, batch, sequence } }
    }

    fn tokens(self) -> usize {
        self.spec.batch * self.spec.sequence
    }

    fn out_columns(self) -> usize {
        self.spec.heads.heads * self.spec.heads.head_dim
    }

    fn statistics(self) -> usize {
        self.tokens() * self.spec.heads.heads
    }

    fn draw(self, seed: u64, columns: usize) -> Vec<f64> {
        let values = normals(seed, self.tokens() * columns);
        values.into_iter().map(|value| rounded(self.dtype, value)).collect()
    }

    fn inputs(self) -> Inputs {
        Inputs {
            qkv: self.draw(1, self.spec.heads.qkv_columns()),
            d_out: self.draw(2, self.out_columns()),
        }
    }
}

/// What goes in, representable in the case's type.
struct Inputs {
    qkv: Vec<f64>,   // [T,(H+2K)D]
    d_out: Vec<f64>, // [T,HD]
}

#[derive(Default)]
struct Outputs {
    out: Vec<f64>,         // [T,HD]
    log_sum_exp: Vec<f64>, // [B,H,S]
    delta: Vec<f64>,       // [B,H,S]
    d_qkv: Vec<f64>,       // [T,(H+2K)D]
}

impl Outputs {
    /// Columns of all rows of d_qkv: [d_q, d_k, d_v].
    fn gradients(&self, heads: HeadSpec) -> [Vec<f64>; 3] {
        let (k, v) = (k_column(heads, 0), v_column(heads, 0));
        [0..k, k..v, v..heads.qkv_columns()].map(|columns| {
            let rows = self.d_qkv.chunks_exact(heads.qkv_columns());
            rows.flat_map(|row| row[columns.clone()].iter().copied()).collect()
        })
    }

    fn bits(&self) -> Vec<u8> {
        let Outputs { out, log_sum_exp, delta, d_qkv } = self;
        let all = [out, log_sum_exp, delta, d_qkv].into_iter().flatten();
        all.flat_map(|value| value.to_bits().to_le_bytes()).collect()
    }
}

// ------------------------------------------------------------------ on a device

fn on_device(driver: &mut dyn Driver, case: Case, inputs: &Inputs) -> Outputs {
    let Case { dtype, spec } = case;
    let attention = Attention::new(driver, dtype, spec.heads).unwrap();
    let qkv = upload(driver, "qkv", dtype, &inputs.qkv);
    let d_out = upload(driver, "d_out", dtype, &inputs.d_out);
    let out = unwritten(driver, "out", dtype, inputs.d_out.len());
    let d_qkv = unwritten(driver, "d_qkv", dtype, inputs.qkv.len());
    let log_sum_exp = unwritten(driver, "log_sum_exp", Dtype::F32, case.statistics());
    let delta = unwritten(driver, "delta", Dtype::F32, case.statistics());
    let main = StreamId::MAIN;
    attention.forward(driver, main, spec, qkv.address, out.address, log_sum_exp.address).unwrap();
    attention
        .backward(
            driver,
            main,
            spec,
            qkv.address,
            out.address,
            log_sum_exp.address,
            d_out.address,
            delta.address,
            d_qkv.address,
        )
        .unwrap();
    let outputs = Outputs {
        out: download(driver, dtype, out),
        log_sum_exp: download(driver, Dtype::F32, log_sum_exp),
        delta: download(driver, Dtype::F32, delta),
        d_qkv: download(driver, dtype, d_qkv),
    };
    for buffer in [qkv, d_out, out, d_qkv, log_sum_exp, delta] {
        driver.release(buffer).unwrap();
    }
    outputs
}

// ------------------------------------------------------------------ exact and plain

/// The CPU backend in f64; nothing is rounded.
fn exact(case: Case, inputs: &Inputs) -> Outputs {
    let spec = case.spec;
    let cpu = &mut Cpu::<f64>::new();
    let columns = spec.heads.qkv_columns();
    let qkv = filled(cpu, &[case.tokens(), columns], &inputs.qkv);
    let d_out = filled(cpu, &[case.tokens(), case.out_columns()], &inputs.d_out);
    let out = filled(cpu, &[case.tokens(), case.out_columns()], &[]);
    let d_qkv = filled(cpu, &[case.tokens(), columns], &[]);
    let statistics = [spec.batch, spec.heads.heads, spec.sequence];
    let log_sum_exp = filled(cpu, &statistics, &[]);
    let delta = filled(cpu, &statistics, &[]);
    cpu.attention_forward(spec, qkv, out, log_sum_exp).unwrap();
    cpu.attention_backward(spec, qkv, out, log_sum_exp, d_out, delta, d_qkv).unwrap();
    let mut values = |view: View| cpu.values(view).to_vec();
    Outputs {
        out: values(out),
        log_sum_exp: values(log_sum_exp),
        delta: values(delta),
        d_qkv: values(d_qkv),
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(to: &mut [f32], scale: f32, from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += scale * from);
}

/// softmax(q k^T / sqrt(D)) v and its gradient in f32, one row after the other. P and dS are
/// rounded to the case's type where they are multiplied, results where they are stored.
fn plain(case: Case, inputs: &Inputs) -> Outputs {
    let AttentionSpec { heads, batch, sequence } = case.spec;
    let d = heads.head_dim;
    let (columns, out_columns) = (heads.qkv_columns(), case.out_columns());
    let stored = |value: f32| rounded(case.dtype, f64::from(value)) as f32;
    let f32s = |values: &[f64]| -> Vec<f32> { values.iter().map(|&it| it as f32).collect() };
    let (qkv, d_out) = (f32s(&inputs.qkv), f32s(&inputs.d_out));
    let scale = (1.0 / (d as f64).sqrt()) as f32;
    let mut out = vec![0.0; d_out.len()];
    let mut d_qkv = vec![0.0; qkv.len()];
    let (mut log_sum_exps, mut deltas) = (vec![], vec![]);
    for b in 0..batch {
        for head in 0..heads.heads {
            let at = |token: usize, column: usize| {
                let begin = (b * sequence + token) * columns + column;
                begin..begin + d
            };
            let q = |token| at(token, q_column(heads, head));
            let k = |token| at(token, k_column(heads, head));
            let v = |token| at(token, v_column(heads, head));
            for query in 0..sequence {
                let begin = (b * sequence + query) * out_columns + q_column(heads, head);
                let in_out = begin..begin + d;
                let q_row = &qkv[q(query)];
                let scores: Vec<f32> =
                    (0..=query).map(|key| dot(q_row, &qkv[k(key)]) * scale).collect();
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f32 = scores.iter().map(|score| (score - most).exp()).sum();
                let mut row = vec![0.0; d];
                for (key, score) in scores.iter().enumerate() {
                    add_scaled(&mut row, stored((score - most).exp()), &qkv[v(key)]);
                }
                row.iter_mut().for_each(|value| *value = stored(*value / total));
                let log_sum_exp = most + total.ln();
                let d_row = &d_out[in_out.clone()];
                let delta = dot(&row, d_row);
                let mut d_q = vec![0.0; d];
                for (key, score) in scores.iter().enumerate() {
                    let p = (score - log_sum_exp).exp();
                    let d_s = stored(p * (dot(d_row, &qkv[v(key)]) - delta));
                    add_scaled(&mut d_q, d_s * scale, &qkv[k(key)]);
                    add_scaled(&mut d_qkv[k(key)], d_s * scale, q_row);
                    add_scaled(&mut d_qkv[v(key)], stored(p), d_row);
                }
                d_qkv[q(query)].copy_from_slice(&d_q);
                out[in_out].copy_from_slice(&row);
                log_sum_exps.push(f64::from(log_sum_exp));
                deltas.push(f64::from(delta));
            }
        }
    }
    let round = |values: Vec<f32>| values.into_iter().map(|it| f64::from(stored(it))).collect();
    Outputs { out: round(out), log_sum_exp: log_sum_exps, delta: deltas, d_qkv: round(d_qkv) }
}

// ------------------------------------------------------------------ comparisons

/// What a device computed, and how exact that is.
fn check(driver: &mut dyn Driver, case: Case, inputs: &Inputs) -> Outputs {
    let found = on_device(driver, case, inputs);
    let plain = plain(case, inputs);
    let exact = exact(case, inputs);
    let what = |name: &str| format!("{case:?} {name}");
    assert_exact(&what("out"), case.dtype, &found.out, &plain.out, &exact.out);
    let lse = |it: &Outputs| it.log_sum_exp.clone();
    assert_exact(&what("lse"), Dtype::F32, &lse(&found), &lse(&plain), &lse(&exact));
    assert_exact(&what("delta"), Dtype::F32, &found.delta, &plain.delta, &exact.delta);
    let [found_parts, plain_parts, exact_parts] =
        [&found, &plain, &exact].map(|it| it.gradients(case.spec.heads));
    for (index, name) in ["d_q", "d_k", "d_v"].into_iter().enumerate() {
        let [found, plain, exact] = [&found_parts, &plain_parts, &exact_parts];
        assert_exact(&what(name), case.dtype, &found[index], &plain[index], &exact[index]);
    }
    found
}

/// Every head dim, grouped and not, sequences at the edges of tiles (32, 64 and 128 rows) and of
/// warps (16 and 32), in one and several sequences; a single token has a test of its own.
fn cases(dtype: Dtype) -> Vec<Case> {
    let mut cases = vec![];
    for (index, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        let case = |count, kv_heads, batch, sequence| {
            Case::new(dtype, heads(count, kv_heads, head_dim), batch, sequence)
        };
        cases.push(case(1, 1, 1, [129, 97, 161, 33, 65][index]));
        cases.push(case(2, 1, 2, [63, 65, 31, 64, 32][index]));
        cases.push(case(6, 2, 1, [17, 2, 16, 15, 33][index]));
    }
    cases.push(Case::new(dtype, heads(4, 1, 32), 1, 64));
    cases.push(Case::new(dtype, heads(1, 1, 32), 1, 128));
    cases.push(Case::new(dtype, heads(1, 1, 128), 1, 128));
    cases
}

fn every_case(dtype: Dtype) {
    on_every_machine(|driver| {
        let mut all = vec![];
        for case in cases(dtype) {
            all.extend(check(driver, case, &case.inputs()).bits());
        }
        all
    });
}

#[test]
fn bf16_of_every_head_dim() {
    every_case(Dtype::Bf16);
}

#[test]
fn f32_of_every_head_dim() {
    every_case(Dtype::F32);
}

/// out = v, lse = the score, d_v = d_out; d_q and d_k are 0, what is left of dP - delta.
#[test]
fn a_single_token() {
    on_every_machine(|driver| {
        let mut all = vec![];
        for dtype in [Dtype::Bf16, Dtype::F32] {
            for head_dim in HEAD_DIMS {
                let heads = heads(2, 2, head_dim);
                let case = Case::new(dtype, heads, 3, 1);
                let inputs = case.inputs();
                let found = on_device(driver, case, &inputs);
                let exact = exact(case, &inputs);
                let plain = plain(case, &inputs);
                assert_eq!(found.out, exact.out, "{case:?}: out");
                let [of_found, of_plain, of_exact] =
                    [&found, &plain, &exact].map(|it| &it.log_sum_exp);
                assert_exact(&format!("{case:?} lse"), Dtype::F32, of_found, of_plain, of_exact);
                let [d_q, d_k, d_v] = found.gradients(heads);
                assert_eq!(d_v, inputs.d_out, "{case:?}: d_v");
                // Two sums of D products in different orders, times a value of k or q.
                let most =
                    |values: &[f64]| values.iter().fold(0.0f64, |most, it| most.max(it.abs()));
                let products = most(&inputs.qkv) * most(&inputs.d_out) * head_dim as f64;
                let allowed = products * most(&inputs.qkv) * unit_roundoff(Dtype::F32);
                assert!(most(&d_q) <= allowed, "{case:?}: d_q {} > {allowed}", most(&d_q));
                assert!(most(&d_k) <= allowed, "{case:?}: d_k {} > {allowed}", most(&d_k));
                all.extend(found.bits());
            }
        }
        all
    });
}
