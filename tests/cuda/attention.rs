//! kernels/attention_sm90.cu and its two siblings for backward, attention_sm80.cu, attention_f32.cu
//! and attention_decode.cu against the f64 CPU backend.

mod any_order;
mod grid;
mod long;
mod planted;

use std::sync::OnceLock;

use isobath::backend::{self, AttentionSpec, Backend, HeadSpec};
use isobath::config::Dtype;
use isobath::cpu::Cpu;
use isobath::cuda::attention::{Angles, Attention, AttentionBackward, AttentionForward, Passes};
use isobath::cuda::host::{self, Asynchronous, Host, Options, Order};
use isobath::cuda::{DevicePointer, Driver, Family, StreamId};
use isobath::tensor::View;

use super::counting::Counting;
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
            document_starts: None,
            d_out: self.draw(2, self.out_columns()),
        }
    }

    /// As [`Case::inputs`]; each row is documents of these lengths, and the rest of it one more.
    /// Every other row has them in the opposite order.
    fn packed(self, lengths: &[usize]) -> Inputs {
        let AttentionSpec { batch, sequence, .. } = self.spec;
        let rows = (0..batch).flat_map(|row| {
            let mut lengths = lengths.to_vec();
            lengths.push(sequence - lengths.iter().sum::<usize>());
            if row % 2 == 1 {
                lengths.reverse();
            }
            let mut start = 0;
            let starts = lengths.into_iter().flat_map(move |length| {
                start += length;
                std::iter::repeat_n((start - length) as i32, length)
            });
            starts.collect::<Vec<i32>>()
        });
        Inputs { document_starts: Some(rows.collect()), ..self.inputs() }
    }
}

/// What goes in, representable in the case's type.
struct Inputs {
    qkv: Vec<f64>,                     // [T,(H+2K)D]
    document_starts: Option<Vec<i32>>, // [T]
    d_out: Vec<f64>,                   // [T,HD]
}

impl Inputs {
    fn start(&self, token: usize) -> usize {
        self.document_starts.as_ref().map_or(0, |starts| starts[token] as usize)
    }
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

    /// All of them, as rows of one head of one sequence.
    fn parts(&self, Case { dtype, spec }: Case) -> [Part; 6] {
        let AttentionSpec { heads, sequence, .. } = spec;
        let d = heads.head_dim;
        // In bf16 every row by itself; but d_q and d_k add up what nearly cancels, so that by
        // chance a row of the plain formula's may be far better than the next one. In f32 all rows
        // together: the tolerance is so tight that no missing row could hide within it.
        let [alone, few] = [1, 16];
        let part = |name, dtype, columns, together, values: Vec<f64>| {
            let all = values.len() / columns;
            let (rows, together) = match dtype {
                Dtype::Bf16 => (sequence, together),
                Dtype::F32 => (all, all),
            };
            Part { name, dtype, of: Matrices { rows, columns, together }, values }
        };
        // Single numbers, too few for a row of them to have the plain formula's typical error.
        let statistics = |name, values: &[f64]| {
            let of = Matrices { rows: values.len(), columns: 1, together: values.len() };
            Part { name, dtype: Dtype::F32, of, values: values.to_vec() }
        };
        // [T,heads,D] to [B,heads,S,D]
        let by_head = |matrix: &[f64]| {
            let count = matrix.len() / (spec.batch * sequence * d);
            let mut rows = vec![];
            for sequence in matrix.chunks_exact(sequence * count * d) {
                for head in 0..count {
                    let tokens = sequence.chunks_exact(count * d);
                    tokens.for_each(|token| rows.extend_from_slice(&token[head * d..][..d]));
                }
            }
            rows
        };
        let [d_q, d_k, d_v] = self.gradients(heads).map(|it| by_head(&it));
        [
            part("out", dtype, d, alone, by_head(&self.out)),
            statistics("log_sum_exp", &self.log_sum_exp),
            statistics("delta", &self.delta),
            part("d_q", dtype, d, few, d_q),
            part("d_k", dtype, d, few, d_k),
            part("d_v", dtype, d, alone, d_v),
        ]
    }

    fn bits(&self) -> Vec<u8> {
        let Outputs { out, log_sum_exp, delta, d_qkv } = self;
        let all = [out, log_sum_exp, delta, d_qkv].into_iter().flatten();
        all.flat_map(|value| value.to_bits().to_le_bytes()).collect()
    }
}

/// One of the results, [B,heads,S,columns].
struct Part {
    name: &'static str,
    dtype: Dtype,
    of: Matrices,
    values: Vec<f64>,
}

// ------------------------------------------------------------------ on a device

/// Which kernels; `Kernels::default()`: what [`Attention`] chooses.
#[derive(Clone, Copy, Default, Debug)]
struct Kernels {
    family: Option<Family>,
    passes: Option<Passes>,
    any_order: bool,
}

impl Kernels {
    /// Whether dS is made of P as it is rounded for d_v: one pass over wide heads has no registers
    /// for both.
    fn d_s_of_rounded(self, heads: HeadSpec) -> bool {
        self.passes == Some(Passes::One) && heads.head_dim > 64
    }
}

const SM80: Kernels = Kernels { family: Some(Family::Sm80), passes: None, any_order: false };

/// All kernels that a case can be run by on this machine: what the machine runs best, and what is
/// there for older ones.
fn kernels_for(driver: &mut dyn Driver, case: Case) -> Vec<Kernels> {
    let mut all = hopper_kernels(driver, case);
    if case.dtype == Dtype::Bf16 {
        all.push(SM80);
    }
    all
}

/// The same without those for older machines.
fn hopper_kernels(driver: &mut dyn Driver, Case { dtype, spec }: Case) -> Vec<Kernels> {
    let hopper = driver.properties().compute_capability.0 == 9 && dtype == Dtype::Bf16;
    if !hopper {
        return vec![Kernels::default()];
    }
    let passes = Attention::new(driver, dtype, spec.heads, None).unwrap().all_passes(spec);
    passes.into_iter().map(|it| Kernels { passes: Some(it), ..Kernels::default() }).collect()
}

/// Hopper's, and one pass that adds up d_q in any order.
fn every_hopper_kernel(driver: &mut dyn Driver, case: Case) -> Vec<Kernels> {
    let mut all = hopper_kernels(driver, case);
    let one = all.iter().copied().find(|it| it.passes == Some(Passes::One));
    all.extend(one.map(|one| Kernels { any_order: true, ..one }));
    all
}

/// All that there are.
fn every_kernel(driver: &mut dyn Driver, case: Case) -> Vec<Kernels> {
    let older = (case.dtype == Dtype::Bf16).then_some(SM80);
    every_hopper_kernel(driver, case).into_iter().chain(older).collect()
}

const SHORT: Kernels = Kernels { family: None, passes: Some(Passes::Short), any_order: false };

fn on_device(driver: &mut dyn Driver, kernels: Kernels, case: Case, inputs: &Inputs) -> Outputs {
    rotated_back_on_device(driver, kernels, case, inputs, None)
}

/// `rotary`: a table and positions, by which the gradients of q and k are rotated back.
fn rotated_back_on_device(
    driver: &mut dyn Driver,
    Kernels { family, passes, any_order }: Kernels,
    case: Case,
    inputs: &Inputs,
    rotary: Option<(&[f64], &[i32])>,
) -> Outputs {
    let Case { dtype, spec } = case;
    let mut attention = Attention::new(driver, dtype, spec.heads, family).unwrap();
    if let Some(passes) = passes {
        attention = attention.with_passes(passes).unwrap();
    }
    attention = attention.with_deterministic(!any_order);
    let rotary = rotary.map(|(table, positions)| {
        let table = upload(driver, "table", Dtype::F32, table);
        [table, driver.upload("positions", positions).unwrap()]
    });
    let angles = rotary
        .map(|[table, positions]| Angles { table: table.address, positions: positions.address });
    let qkv = upload(driver, "qkv", dtype, &inputs.qkv);
    let starts = inputs.document_starts.as_ref();
    let starts = starts.map(|starts| driver.upload("document starts", starts).unwrap());
    let d_out = upload(driver, "d_out", dtype, &inputs.d_out);
    let out = unwritten(driver, "out", dtype, inputs.d_out.len());
    let d_qkv = unwritten(driver, "d_qkv", dtype, inputs.qkv.len());
    let log_sum_exp = unwritten(driver, "log_sum_exp", Dtype::F32, case.statistics());
    let delta = unwritten(driver, "delta", Dtype::F32, case.statistics());
    let main = StreamId::MAIN;
    let forward = AttentionForward {
        spec,
        qkv: qkv.address,
        document_starts: starts.map(|it| it.address),
        out: out.address,
        log_sum_exp: log_sum_exp.address,
    };
    let backward = AttentionBackward {
        forward,
        d_out: d_out.address,
        delta: delta.address,
        d_qkv: d_qkv.address,
        angles,
    };
    let forward = attention.plan_forward(driver, &forward).unwrap();
    let backward = attention.plan_backward(driver, &backward).unwrap();
    forward.launch(driver, main).unwrap();
    backward.launch(driver, main).unwrap();
    let outputs = Outputs {
        out: download(driver, dtype, out),
        log_sum_exp: download(driver, Dtype::F32, log_sum_exp),
        delta: download(driver, Dtype::F32, delta),
        d_qkv: download(driver, dtype, d_qkv),
    };
    let optional = starts.into_iter().chain(rotary.into_iter().flatten());
    for buffer in [qkv, d_out, out, d_qkv, log_sum_exp, delta].into_iter().chain(optional) {
        driver.release(buffer).unwrap();
    }
    attention.release(driver).unwrap();
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
    let starts = inputs.document_starts.as_ref().map(|starts| filled_index(cpu, starts));
    cpu.attention_forward(backend::AttentionForward {
        spec,
        qkv,
        document_starts: starts,
        out,
        log_sum_exp,
    })
    .unwrap();
    cpu.attention_backward(backend::AttentionBackward {
        spec,
        qkv,
        document_starts: starts,
        out,
        log_sum_exp,
        d_out,
        delta,
        d_qkv,
    })
    .unwrap();
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
/// rounded to the case's type where they are multiplied, results where they are stored. dS is made
/// of P as it is, or as it was rounded.
fn plain(case: Case, inputs: &Inputs, d_s_of_rounded: bool) -> Outputs {
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
                let start = inputs.start(b * sequence + query);
                let scores: Vec<f32> =
                    (start..=query).map(|key| dot(q_row, &qkv[k(key)]) * scale).collect();
                let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f32 = scores.iter().map(|score| (score - most).exp()).sum();
                let mut row = vec![0.0; d];
                for (key, score) in (start..).zip(&scores) {
                    add_scaled(&mut row, stored((score - most).exp()), &qkv[v(key)]);
                }
                row.iter_mut().for_each(|value| *value = stored(*value / total));
                let log_sum_exp = most + total.ln();
                let d_row = &d_out[in_out.clone()];
                // In another order than dP below: where a softmax has one large p, the two are
                // nearly the same, and in one order they would cancel better than anyone's.
                let products = row.iter().zip(d_row).rev();
                let delta = products.map(|(out, d_out)| out * d_out).sum::<f32>();
                let mut d_q = vec![0.0; d];
                for (key, score) in (start..).zip(&scores) {
                    let p = (score - log_sum_exp).exp();
                    let of = if d_s_of_rounded { stored(p) } else { p };
                    let d_s = stored(of * (dot(d_row, &qkv[v(key)]) - delta));
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

/// A case and what it must give; computed once for all machines.
struct Check {
    case: Case,
    inputs: Inputs,
    plain: Outputs,
    /// Of [`Kernels::d_s_of_rounded`].
    plain_of_rounded: OnceLock<Outputs>,
    exact: Outputs,
    /// Whether rows differ so little, or their errors so much, that all are judged together.
    whole: bool,
}

impl Check {
    fn new(case: Case, inputs: Inputs) -> Self {
        let (plain, exact) = (plain(case, &inputs, false), exact(case, &inputs));
        Check { case, inputs, plain, plain_of_rounded: OnceLock::new(), exact, whole: false }
    }

    /// The bits that a device gives, found to be exact enough; none where they may be others next
    /// time.
    fn run(&self, driver: &mut dyn Driver, kernels: Kernels) -> Vec<u8> {
        let Check { case, inputs, exact, whole, .. } = self;
        let plain = match kernels.d_s_of_rounded(case.spec.heads) {
            false => &self.plain,
            true => self.plain_of_rounded.get_or_init(|| plain(*case, inputs, true)),
        };
        let found = on_device(driver, kernels, *case, inputs);
        let what = format!("{kernels:?} {case:?}");
        if case.spec.sequence == 1 {
            assert_a_single_token(&what, *case, inputs, &found, plain, exact);
        } else {
            let [parts, plain, exact] = [&found, plain, exact].map(|it| it.parts(*case));
            for ((found, plain), exact) in parts.iter().zip(&plain).zip(&exact) {
                let Part { name, dtype, of, values } = found;
                let together = if *whole { of.rows } else { of.together };
                let (what, of) = (format!("{what} {name}"), Matrices { together, ..*of });
                assert_exact_by_rows(&what, *dtype, of, values, &plain.values, &exact.values);
            }
        }
        if kernels.any_order { vec![] } else { found.bits() }
    }
}

/// out = v, lse = the score, d_v = d_out; d_q and d_k are 0, what is left of dP - delta.
fn assert_a_single_token(
    what: &str,
    case: Case,
    inputs: &Inputs,
    found: &Outputs,
    plain: &Outputs,
    exact: &Outputs,
) {
    let heads = case.spec.heads;
    assert_eq!(found.out, exact.out, "{what}: out");
    let of = [found, plain, exact].map(|it| &it.log_sum_exp);
    assert_exact(&format!("{what} lse"), Dtype::F32, of[0], of[1], of[2]);
    let group = heads.heads / heads.kv_heads;
    let [d_q, d_k, d_v] = found.gradients(heads);
    if group == 1 {
        assert_eq!(d_v, inputs.d_out, "{what}: d_v");
    } else {
        let of = [plain, exact].map(|it| it.gradients(heads).into_iter().last().unwrap());
        assert_exact(&format!("{what} d_v"), case.dtype, &d_v, &of[0], &of[1]);
    }
    // Two sums of D products in different orders, times a value of k or q.
    let most = |values: &[f64]| values.iter().fold(0.0f64, |most, it| most.max(it.abs()));
    let products = most(&inputs.qkv) * most(&inputs.d_out) * heads.head_dim as f64;
    let allowed = products * most(&inputs.qkv) * unit_roundoff(Dtype::F32);
    assert!(most(&d_q) <= allowed, "{what}: d_q {} > {allowed}", most(&d_q));
    let allowed = allowed * group as f64;
    assert!(most(&d_k) <= allowed, "{what}: d_k {} > {allowed}", most(&d_k));
}

fn check_all(checks: &[Check]) {
    on_every_machine(|driver| {
        let mut all = vec![];
        for check in checks {
            for kernels in kernels_for(driver, check.case) {
                all.extend(check.run(driver, kernels));
            }
        }
        all
    });
}

/// Every head dim, grouped and not, sequences at the edges of tiles (bf16: 32, 64 and 128 rows;
/// f32: 32) and of warps (16 and 32), one and several; a single token has a test of its own.
fn cases(dtype: Dtype) -> Vec<Case> {
    let [long, pair, group] = match dtype {
        Dtype::Bf16 => [[129, 97, 161, 33, 65], [63, 65, 31, 64, 32], [17, 2, 16, 15, 33]],
        Dtype::F32 => [[65, 64, 63, 34, 33], [31, 33, 16, 32, 17], [17, 2, 16, 15, 9]],
    };
    let mut cases = vec![];
    for (index, head_dim) in HEAD_DIMS.into_iter().enumerate() {
        let case = |count, kv_heads, batch, sequence| {
            Case::new(dtype, heads(count, kv_heads, head_dim), batch, sequence)
        };
        cases.push(case(1, 1, 1, long[index]));
        cases.push(case(2, 1, 2, pair[index]));
        cases.push(case(6, 2, 1, group[index]));
    }
    cases.push(Case::new(dtype, heads(4, 1, 32), 1, 64));
    if dtype == Dtype::Bf16 {
        cases.push(Case::new(dtype, heads(1, 1, 32), 1, 128));
        cases.push(Case::new(dtype, heads(1, 1, 128), 1, 128));
    }
    cases
}

fn every_case(dtype: Dtype) {
    let checks = cases(dtype).into_iter().map(|case| Check::new(case, case.inputs()));
    check_all(&checks.collect::<Vec<_>>());
}

#[test]
fn bf16_of_every_head_dim() {
    every_case(Dtype::Bf16);
}

#[test]
fn f32_of_every_head_dim() {
    every_case(Dtype::F32);
}

/// Every number of tiles that a row of at most 256 tokens has, whole and not, alone and with
/// several heads for each block, one after the other through the same stages.
#[test]
fn bf16_of_short_rows() {
    let cases = [
        (4, 1, 64, 3, 1),
        (1, 1, 48, 9, 7),
        (2, 2, 64, 1, 64),
        (4, 1, 32, 1, 65),
        (4, 4, 64, 2, 113),
        (4, 1, 64, 1, 128),
        (1, 1, 32, 5, 129),
        (2, 1, 64, 3, 192),
        (2, 2, 48, 3, 203),
        (3, 3, 64, 3, 255),
        (4, 1, 48, 1, 256),
        (1, 1, 64, 9, 256),
    ];
    let checks = cases.map(|(count, kv_heads, head_dim, batch, sequence)| {
        let case = Case::new(Dtype::Bf16, heads(count, kv_heads, head_dim), batch, sequence);
        Check::new(case, case.inputs())
    });
    on_every_machine(|driver| {
        let hopper = driver.properties().compute_capability.0 == 9;
        let kernels = if hopper { SHORT } else { Kernels::default() };
        checks.iter().flat_map(|check| check.run(driver, kernels)).collect()
    });
}

/// However many heads are walked together, which depends on the machine's L2 cache: the same bits.
#[test]
fn the_order_of_the_heads_changes_no_bit() {
    if !has_simt() {
        return;
    }
    let case = Case::new(Dtype::Bf16, heads(6, 3, 32), 3, 130);
    let inputs = case.packed(&[70]);
    let kv_head_bytes = 2 * 2 * 130 * 32;
    let mut found = [0, 2, 4, 1000].map(|kv_heads| {
        let mut driver = Counting::new(Host::new(Options::default()).unwrap());
        driver.properties.l2_bytes = 2 * kv_heads * kv_head_bytes;
        let two = Kernels { passes: Some(Passes::Two), ..Kernels::default() };
        on_device(&mut driver, two, case, &inputs).bits()
    });
    let first = found[0].clone();
    assert!(found.iter_mut().all(|bits| *bits == first));
}

/// One pass adds up d_q in one order, however many blocks share a head and whoever comes first.
#[test]
fn the_size_of_a_team_changes_no_bit() {
    if !has_simt() {
        return;
    }
    let case = Case::new(Dtype::Bf16, heads(4, 2, 32), 2, 700);
    for inputs in [case.inputs(), case.packed(&[70, 300, 129])] {
        let bits = |multiprocessors, order| {
            let seed = u64::from(multiprocessors);
            let asynchronous = Asynchronous::Anytime;
            let options =
                Options { multiprocessors, order, seed, asynchronous, ..Options::default() };
            let mut driver = Counting::new(Host::new(options).unwrap());
            let one = Kernels { passes: Some(Passes::One), ..Kernels::default() };
            let found = on_device(&mut driver, one, case, &inputs).bits();
            let counts = driver.counts.borrow();
            assert_eq!(counts["attention_backward_sm90_128x32"], 1);
            found
        };
        let expected = bits(1, Order::Fifo);
        for (multiprocessors, order) in [
            (2, Order::Fifo),
            (2, Order::Random),
            (3, Order::Lifo),
            (5, Order::Random),
            (6, Order::Fifo),
            (6, Order::Lifo),
            (13, Order::Lifo),
            (13, Order::Random),
        ] {
            assert!(bits(multiprocessors, order) == expected, "{multiprocessors}, {order:?}");
        }
    }
}

/// However many heads of short rows a block has.
#[test]
fn the_number_of_blocks_changes_no_bit_of_short_rows() {
    if !has_simt() {
        return;
    }
    let case = Case::new(Dtype::Bf16, heads(4, 2, 32), 3, 200);
    for inputs in [case.inputs(), case.packed(&[70, 65])] {
        let mut found = [1, 2, 4, 5, 6].map(|multiprocessors| {
            let options = Options { multiprocessors, ..Options::default() };
            let mut driver = Counting::new(Host::new(options).unwrap());
            let found = on_device(&mut driver, SHORT, case, &inputs).bits();
            assert_eq!(driver.counts.borrow()["attention_backward_short_sm90_256x32"], 1);
            found
        });
        let first = found[0].clone();
        assert!(found.iter_mut().all(|bits| *bits == first));
    }
}

/// A block for each head where rows are short, and heads enough; one pass of teams where a sequence
/// is long enough, has no documents, and heads can be dealt evenly.
#[test]
fn passes_are_chosen_by_the_cost_model() {
    if !has_simt() {
        return;
    }
    let launched = |head_dim, batch, sequence, documents: bool| {
        let mut driver = Counting::new(Host::new(Options::default()).unwrap());
        let case = Case::new(Dtype::Bf16, heads(1, 1, head_dim), batch, sequence);
        let inputs = if documents { case.packed(&[5]) } else { case.inputs() };
        on_device(&mut driver, Kernels::default(), case, &inputs);
        let counts = driver.counts.borrow();
        let name = counts.keys().find(|it| it.contains("_backward_")).unwrap();
        name.split("_sm90").next().unwrap().to_string()
    };
    let [short, one, two] =
        ["backward_short", "backward", "backward_kv"].map(|it| format!("attention_{it}"));
    assert_eq!(launched(32, 1, 1024, false), one);
    assert_eq!(launched(64, 1, 900, false), one);
    assert_eq!(launched(32, 1, 1024, true), two, "documents");
    assert_eq!(launched(32, 2, 512, false), one);
    assert_eq!(launched(32, 2, 384, false), two, "too short");
    assert_eq!(launched(32, 1, 512, false), two, "four tiles of keys for as many multiprocessors");
    assert_eq!(launched(48, 1, 1024, false), two, "no kernel");
    // On four multiprocessors.
    assert_eq!(launched(64, 4, 256, false), short);
    assert_eq!(launched(48, 5, 200, true), short);
    assert_eq!(launched(32, 1, 128, false), short);
    assert_eq!(launched(64, 2, 256, false), two, "two multiprocessors would have nothing to do");
    assert_eq!(launched(64, 4, 257, false), two, "too long");
    assert_eq!(launched(96, 4, 256, false), two, "no kernel");
}

/// Three consumers take 192 rows; where two waste fewer rows, they do it.
#[test]
fn items_of_forward_fit_the_sequence() {
    if !has_simt() {
        return;
    }
    let launched = |head_dim, sequence| {
        let mut driver = Counting::new(Host::new(Options::default()).unwrap());
        let case = Case::new(Dtype::Bf16, heads(1, 1, head_dim), 1, sequence);
        on_device(&mut driver, Kernels::default(), case, &case.inputs());
        let counts = driver.counts.borrow();
        let forward = counts.keys().find(|it| it.contains("_forward_")).unwrap();
        forward.rsplit_once('_').unwrap().1.to_string()
    };
    for (head_dim, sequence, expected) in [
        (32, 64, "128x32"),
        (48, 128, "128x48"),
        (64, 129, "192x64"),
        (64, 192, "192x64"),
        (64, 256, "128x64"),
        (64, 1024, "128x64"),
        (96, 192, "128x96"),
        (128, 192, "128x128"),
    ] {
        assert_eq!(launched(head_dim, sequence), expected, "{sequence}");
    }
}

/// A build for sm_80 alone has no wgmma kernels, and a chosen family is not replaced.
#[test]
fn hopper_runs_its_own_kernels_where_the_build_has_them() {
    if !has_simt() {
        return;
    }
    let heads = heads(2, 1, 64);
    let case = Case::new(Dtype::Bf16, heads, 1, 9);
    let launched = |lacks, family| {
        let mut driver = Counting::new(Host::new(Options::default()).unwrap());
        driver.lacks = lacks;
        on_device(&mut driver, Kernels { family, ..Kernels::default() }, case, &case.inputs());
        driver
            .counts
            .borrow()
            .keys()
            .filter(|it| it.starts_with("attention_"))
            .cloned()
            .collect::<Vec<_>>()
    };
    let sm90 = ["backward_short_sm90_256x64", "forward_sm90_128x64"];
    let sm90 = sm90.map(|it| format!("attention_{it}"));
    let sm80 = ["backward_kv", "backward_q", "forward"].map(|it| format!("attention_{it}_bf16_64"));
    assert_eq!(launched(None, None), sm90);
    assert_eq!(launched(None, Some(Family::Sm80)), sm80);
    assert_eq!(launched(Some("attention_backward_kv_sm90"), None), sm80);
    assert_eq!(launched(Some("attention_delta_sm90"), None), sm80);
    assert_eq!(launched(Some("attention_backward_short_sm90"), None), sm80);
    let driver = &mut Counting::new(Host::new(Options::default()).unwrap());
    driver.lacks = Some("attention_forward_sm90");
    let error = Attention::new(driver, Dtype::Bf16, heads, Some(Family::Sm90)).unwrap_err();
    assert!(error.to_string().contains("attention_forward_sm90_128x64"), "{error}");
    let error = Attention::new(driver, Dtype::F32, heads, Some(Family::Sm90)).unwrap_err();
    assert!(error.to_string().contains("choose f32"), "{error}");
}

/// Documents that begin on tiles' and warps' borders and beside them, of one token too, longer and
/// shorter than a tile, and some that end rows that no tile divides.
fn packed_cases(dtype: Dtype) -> Vec<Check> {
    let cut: [(usize, &[usize]); HEAD_DIMS.len()] = match dtype {
        Dtype::Bf16 => [
            (129, &[1, 63, 64]),
            (200, &[16, 1, 1, 77, 33]),
            (161, &[100, 28]),
            (97, &[31, 33, 32]),
            (81, &[32, 1, 15, 32]),
        ],
        Dtype::F32 => [
            (65, &[1, 31, 32]),
            (70, &[33, 1, 1, 30]),
            (63, &[7, 55]),
            (64, &[32]),
            (34, &[15, 1, 17]),
        ],
    };
    let mut checks = vec![];
    for (head_dim, (sequence, lengths)) in HEAD_DIMS.into_iter().zip(cut) {
        for (count, kv_heads, batch) in [(1, 1, 2), (4, 2, 1)] {
            let case = Case::new(dtype, heads(count, kv_heads, head_dim), batch, sequence);
            checks.push(Check::new(case, case.packed(lengths)));
        }
    }
    // Longer than all tiles of the other side, so that whole ones lie before and after.
    let case = Case::new(dtype, heads(2, 1, 32), 1, 330);
    checks.push(Check::new(case, case.packed(&[65, 190, 10])));
    checks
}

#[test]
fn bf16_of_packed_documents() {
    check_all(&packed_cases(Dtype::Bf16));
}

#[test]
fn f32_of_packed_documents() {
    check_all(&packed_cases(Dtype::F32));
}

/// A row of one document gives the bits of the kernels that know no documents.
#[test]
fn one_document_is_a_row() {
    on_each_machine(|driver| {
        for (dtype, sequence) in [(Dtype::Bf16, 150), (Dtype::F32, 70)] {
            let case = Case::new(dtype, heads(4, 2, 64), 2, sequence);
            for kernels in kernels_for(driver, case) {
                let whole = on_device(driver, kernels, case, &case.inputs());
                let packed = on_device(driver, kernels, case, &case.packed(&[]));
                assert!(whole.bits() == packed.bits(), "{kernels:?} {case:?}");
            }
        }
    });
}

/// What lies in other documents changes no bit, however large it is.
#[test]
fn documents_know_nothing_of_each_other() {
    on_each_machine(|driver| {
        for (dtype, lengths) in [(Dtype::Bf16, [70, 40, 50]), (Dtype::F32, [20, 30, 25])] {
            let case = Case::new(dtype, heads(2, 1, 32), 1, lengths.iter().sum());
            let inputs = case.packed(&lengths[..2]);
            let mut disturbed = case.packed(&lengths[..2]);
            let (begin, end) = (lengths[0], lengths[0] + lengths[1]);
            let columns = case.spec.heads.qkv_columns();
            for token in (0..begin).chain(end..case.tokens()) {
                let row = &mut disturbed.qkv[token * columns..][..columns];
                row.iter_mut().for_each(|value| *value = rounded(dtype, *value * 100.0 + 3.0));
            }
            for kernels in kernels_for(driver, case) {
                let [found, expected] =
                    [&disturbed, &inputs].map(|inputs| on_device(driver, kernels, case, inputs));
                let own = |of: &[f64], columns: usize| of[begin * columns..end * columns].to_vec();
                let out = [&found, &expected].map(|it| own(&it.out, case.out_columns()));
                assert_eq!(out[0], out[1], "{kernels:?} {case:?}");
                let d_qkv = [&found, &expected].map(|it| own(&it.d_qkv, columns));
                assert_eq!(d_qkv[0], d_qkv[1], "{kernels:?} {case:?}");
            }
        }
    });
}

/// Rotary embedding undone in the epilogue: every head width, several tiles, a tail, and rows whose
/// positions do not count from 0.
#[test]
fn gradients_are_rotated_back() {
    const POSITIONS: usize = 300;
    on_each_machine(|driver| {
        for (index, head_dim) in HEAD_DIMS.into_iter().enumerate() {
            let case = Case::new(Dtype::Bf16, heads(4, [1, 2, 4][index % 3], head_dim), 2, 139);
            let of = case.spec.heads;
            let attention = Attention::new(driver, case.dtype, of, None).unwrap();
            if !attention.rotates_back() {
                println!("skipped: only Hopper's kernels rotate back");
                return;
            }
            let half = head_dim / 2;
            let angle = |i: usize| 0.37 * (i / head_dim + 1) as f64 * (i % half + 1) as f64;
            let table: Vec<f64> = (0..POSITIONS * head_dim)
                .map(|i| if i % head_dim < half { angle(i).cos() } else { angle(i).sin() })
                .map(|value| rounded(Dtype::F32, value))
                .collect();
            let positions: Vec<i32> =
                (0..case.tokens()).map(|token| (token * 7 % POSITIONS) as i32).collect();
            let rotate_back = |d_qkv: &[f64], round: &dyn Fn(f64) -> f64| -> Vec<f64> {
                let mut out = d_qkv.to_vec();
                for (row, &position) in out.chunks_exact_mut(of.qkv_columns()).zip(&positions) {
                    let angles = &table[position as usize * head_dim..][..head_dim];
                    for head in row[..v_column(of, 0)].chunks_exact_mut(head_dim) {
                        for i in 0..half {
                            let (x, y, cos, sin) =
                                (head[i], head[i + half], angles[i], angles[half + i]);
                            head[i] = round(x * cos + y * sin);
                            head[i + half] = round(y * cos - x * sin);
                        }
                    }
                }
                out
            };
            let inputs = case.inputs();
            let rotary = Some((table.as_slice(), positions.as_slice()));
            let mut exact = exact(case, &inputs);
            exact.d_qkv = rotate_back(&exact.d_qkv, &|value| value);
            let exact = exact.gradients(of);
            let plain = [false, true].map(|d_s_of_rounded| {
                let mut plain = plain(case, &inputs, d_s_of_rounded);
                plain.d_qkv = rotate_back(&plain.d_qkv, &|value| rounded(case.dtype, value));
                plain.gradients(of)
            });
            for kernels in hopper_kernels(driver, case) {
                let found = rotated_back_on_device(driver, kernels, case, &inputs, rotary);
                let found = found.gradients(of);
                let plain = &plain[usize::from(kernels.d_s_of_rounded(of))];
                for (part, name) in ["d_q", "d_k", "d_v"].into_iter().enumerate() {
                    let what = format!("{kernels:?} {name} rotated back, {of:?}");
                    assert_exact(&what, case.dtype, &found[part], &plain[part], &exact[part]);
                }
            }
        }
    });
}

/// Scores in the thousands: exp(score) is far beyond any f32.
#[test]
fn large_scores() {
    let checks: [(Dtype, usize, usize, &[usize]); 9] = [
        (Dtype::Bf16, 32, 130, &[]),
        (Dtype::Bf16, 48, 65, &[]),
        (Dtype::Bf16, 64, 70, &[]),
        (Dtype::Bf16, 96, 33, &[]),
        (Dtype::Bf16, 128, 270, &[]),
        (Dtype::Bf16, 32, 150, &[64, 1, 40]),
        (Dtype::Bf16, 128, 90, &[33, 31]),
        (Dtype::F32, 48, 34, &[]),
        (Dtype::F32, 32, 40, &[7, 1, 25]),
    ];
    let checks = checks.map(|(dtype, head_dim, sequence, lengths)| {
        let case = Case::new(dtype, heads(2, 1, head_dim), 1, sequence);
        let mut inputs = if lengths.is_empty() { case.inputs() } else { case.packed(lengths) };
        let columns = case.spec.heads.qkv_columns();
        let scaled = v_column(case.spec.heads, 0);
        for row in inputs.qkv.chunks_exact_mut(columns) {
            row[..scaled].iter_mut().for_each(|value| *value = rounded(dtype, *value * 32.0));
        }
        // A softmax of one large p leaves of dS what the order of its sums left.
        let check = Check { whole: true, ..Check::new(case, inputs) };
        let largest = check.exact.log_sum_exp.iter().fold(0.0f64, |most, &it| most.max(it));
        assert!(largest > 1000.0, "{largest}");
        check
    });
    on_each_machine(|driver| {
        for check in &checks {
            for kernels in every_kernel(driver, check.case) {
                check.run(driver, kernels);
            }
        }
    });
}

/// Query i sees nothing but key (7 i + 3 head) mod (i + 1): every value goes to one place, exactly.
#[test]
fn layouts() {
    on_each_machine(|driver| {
        for dtype in [Dtype::Bf16, Dtype::F32] {
            for head_dim in HEAD_DIMS {
                let heads = heads(4, 2, head_dim);
                let case = Case::new(dtype, heads, 2, head_dim);
                let AttentionSpec { batch, sequence, .. } = case.spec;
                let (columns, out_columns) = (heads.qkv_columns(), case.out_columns());
                let seen = |query: usize, head: usize| (7 * query + 3 * head) % (query + 1);
                // Scores of 64 * 64 / sqrt(D), 362 or more, or 0.
                let mut qkv = vec![0.0; case.tokens() * columns];
                let mut d_out = vec![0.0; case.tokens() * out_columns];
                for token in 0..case.tokens() {
                    let row = &mut qkv[token * columns..][..columns];
                    for head in 0..heads.heads {
                        row[q_column(heads, head) + seen(token % sequence, head)] = 64.0;
                        row[k_column(heads, head) + token % sequence] = 64.0;
                    }
                    let values = &mut row[v_column(heads, 0)..];
                    for (column, value) in values.iter_mut().enumerate() {
                        *value = ((31 * token + 7 * column) % 251) as f64;
                    }
                    let d_row = &mut d_out[token * out_columns..][..out_columns];
                    for (column, value) in d_row.iter_mut().enumerate() {
                        *value = ((5 * token + 3 * column) % 4) as f64;
                    }
                }
                let mut out = vec![0.0; d_out.len()];
                let mut d_qkv = vec![0.0; qkv.len()];
                for token in 0..case.tokens() {
                    for head in 0..heads.heads {
                        let query = token % sequence;
                        let from = (token - query + seen(query, head)) * columns;
                        let v = from + v_column(heads, head);
                        let to = token * out_columns + q_column(heads, head);
                        out[to..][..head_dim].copy_from_slice(&qkv[v..][..head_dim]);
                        let d_rows = d_qkv[v..][..head_dim].iter_mut().zip(&d_out[to..]);
                        d_rows.for_each(|(d_v, d_out)| *d_v += d_out);
                    }
                }
                // A sum that bf16 does not hold would be rounded.
                let most = d_qkv.iter().fold(0.0f64, |most, &it| most.max(it));
                assert!(most > 3.0 && most <= 256.0, "{most}");
                let inputs = Inputs { qkv, document_starts: None, d_out };
                let score = 64.0 * 64.0 / (head_dim as f64).sqrt();
                for kernels in kernels_for(driver, case) {
                    let found = on_device(driver, kernels, case, &inputs);
                    assert_eq!(found.out, out, "{kernels:?} {case:?}: out");
                    assert_eq!(found.d_qkv, d_qkv, "{kernels:?} {case:?}: d_qkv");
                    assert_eq!(found.log_sum_exp.len(), batch * heads.heads * sequence);
                    for (at, &found) in found.log_sum_exp.iter().enumerate() {
                        let error = (found - score).abs() / score;
                        assert!(error <= 4.0 * unit_roundoff(Dtype::F32), "{at}: {found}, {score}");
                    }
                }
            }
        }
    });
}

/// See [`assert_a_single_token`].
#[test]
fn a_single_token() {
    let mut checks = vec![];
    for dtype in [Dtype::Bf16, Dtype::F32] {
        for head_dim in HEAD_DIMS {
            let case = Case::new(dtype, heads(2, 2, head_dim), 2, 1);
            checks.push(Check::new(case, case.inputs()));
        }
    }
    check_all(&checks);
}

/// What stands after a row's last document, padding that nobody learns from, is a document of its
/// own: so every row sees a key, as the contract asks (engine's `Rows` refuses others). It gets no
/// gradient.
#[test]
fn padding_after_the_last_document_gets_no_gradient() {
    on_each_machine(|driver| {
        for (dtype, head_dim) in [(Dtype::Bf16, 32), (Dtype::Bf16, 128), (Dtype::F32, 48)] {
            let case = Case::new(dtype, heads(2, 1, head_dim), 1, 140);
            let padding = 83;
            let mut inputs = case.packed(&[20, padding - 20]);
            inputs.d_out[padding * case.out_columns()..].fill(0.0);
            for kernels in every_kernel(driver, case) {
                let found = on_device(driver, kernels, case, &inputs);
                let behind = &found.d_qkv[padding * case.spec.heads.qkv_columns()..];
                assert!(behind.iter().all(|&it| it == 0.0), "{kernels:?} {case:?}");
                let finite = found.out.iter().chain(&found.log_sum_exp).all(|it| it.is_finite());
                assert!(finite, "{kernels:?} {case:?}");
            }
        }
    });
}

// ------------------------------------------------------------------ decode

/// A sequence of which the first `start` rows are in the cache, the rest are new.
struct Decode {
    check: Check,
    start: usize,
}

impl Decode {
    fn new(dtype: Dtype, heads: HeadSpec, start: usize, tokens: usize) -> Self {
        let case = Case::new(dtype, heads, 1, start + tokens);
        Decode { check: Check::new(case, case.inputs()), start }
    }

    /// Columns of each row of qkv: k or v of all heads.
    fn cached(&self, first_column: usize) -> Vec<f64> {
        let heads = self.check.case.spec.heads;
        let rows = self.check.inputs.qkv.chunks_exact(heads.qkv_columns());
        let columns = first_column..first_column + heads.kv_heads * heads.head_dim;
        rows.flat_map(|row| row[columns.clone()].iter().copied()).collect()
    }

    /// The rows of out, which must be those of attention to the whole sequence.
    fn run(&self, driver: &mut dyn Driver) -> Vec<u8> {
        let Decode { check: Check { case, inputs, plain, exact, .. }, start } = self;
        let Case { dtype, spec: AttentionSpec { heads, sequence, .. } } = *case;
        let attention = Attention::new(driver, dtype, heads, None).unwrap();
        let tokens = sequence - start;
        let cache_columns = heads.kv_heads * heads.head_dim;
        // What is not written yet, and three rows after it, is NaN.
        let cache_rows = sequence + 3;
        let [written_keys, written_values] =
            [k_column(heads, 0), v_column(heads, 0)].map(|column| {
                let mut rows = self.cached(column);
                rows.resize(cache_rows * cache_columns, f64::NAN);
                rows
            });
        let before = |rows: &[f64]| {
            let mut rows = rows.to_vec();
            rows[start * cache_columns..].fill(f64::NAN);
            rows
        };
        let keys = upload(driver, "keys", dtype, &before(&written_keys));
        let values = upload(driver, "values", dtype, &before(&written_values));
        let new = start * heads.qkv_columns();
        let qkv = upload(driver, "qkv", dtype, &inputs.qkv[new..]);
        let positions: Vec<i32> = (*start as i32..sequence as i32).collect();
        let positions = driver.upload("positions", &positions).unwrap();
        let out = unwritten(driver, "out", dtype, tokens * case.out_columns());
        attention
            .decode(
                driver,
                StreamId::MAIN,
                tokens,
                cache_rows,
                qkv.address,
                keys.address,
                values.address,
                positions.address,
                out.address,
            )
            .unwrap();
        let found = download(driver, dtype, out);
        let rows = |all: &[f64]| all[start * case.out_columns()..].to_vec();
        let what = format!("{case:?} decoded from {start} on");
        assert_exact(&what, dtype, &found, &rows(&plain.out), &rows(&exact.out));
        for (buffer, expected) in [(keys, written_keys), (values, written_values)] {
            let cache = download(driver, dtype, buffer);
            let same = cache.iter().zip(&expected).all(|(a, b)| a == b || a.is_nan() && b.is_nan());
            assert!(same, "{what}: the cache is not what was written to it");
        }
        for buffer in [keys, values, qkv, positions, out] {
            driver.release(buffer).unwrap();
        }
        found.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect()
    }
}

/// Prompts and single tokens, fewer and more rows than a block walks over at once (64).
#[test]
fn decoded_rows_are_those_of_forward() {
    let mut all = vec![];
    for dtype in [Dtype::Bf16, Dtype::F32] {
        for head_dim in HEAD_DIMS {
            all.push(Decode::new(dtype, heads(4, 2, head_dim), 0, 5));
            all.push(Decode::new(dtype, heads(1, 1, head_dim), 130, 2));
        }
        all.push(Decode::new(dtype, heads(3, 1, 32), 64, 1));
        all.push(Decode::new(dtype, heads(2, 2, 64), 0, 1));
        all.push(Decode::new(dtype, heads(1, 1, 32), 2, 66));
    }
    on_every_machine(|driver| all.iter().flat_map(|decode| decode.run(driver)).collect());
}

// ------------------------------------------------------------------ refusals

#[test]
fn what_has_no_kernel_is_refused() {
    on_each_machine(|driver| {
        for dtype in [Dtype::Bf16, Dtype::F32] {
            for (heads, why) in [
                (heads(4, 2, 40), "32, 48, 64, 96, 128"),
                (heads(4, 2, 40), "model.hidden / model.heads"),
                (heads(4, 2, 0), "head dim of 0"),
                (heads(4, 3, 64), "multiple of model.kv_heads"),
                (heads(0, 1, 64), "at least one of each"),
                (heads(1, 0, 64), "at least one of each"),
                (heads(1 << 26, 1 << 26, 32), "smaller model.hidden"),
            ] {
                let error = Attention::new(driver, dtype, heads, None).unwrap_err().to_string();
                assert!(error.contains(why), "{error}");
            }
        }
        for heads in [heads(4, 2, 48), heads(4, 2, 64)] {
            let attention = Attention::new(driver, Dtype::Bf16, heads, Some(Family::Sm80)).unwrap();
            for passes in [Passes::One, Passes::Short] {
                let error = attention.clone().with_passes(passes).unwrap_err().to_string();
                assert!(error.contains("choose Passes::Two"), "{error}");
            }
        }
        let own = heads(4, 2, 64);
        let mut attention = Attention::new(driver, Dtype::Bf16, own, None).unwrap();
        let buffer = driver.allocate("all", 64).unwrap();
        let (all, main) = (buffer.address, StreamId::MAIN);
        let spec = |heads, batch, sequence| AttentionSpec { heads, batch, sequence };
        let pass = |spec, at| {
            let (qkv, document_starts) = (at, None);
            let forward = AttentionForward { spec, qkv, document_starts, out: at, log_sum_exp: at };
            AttentionBackward { forward, d_out: at, delta: at, d_qkv: at, angles: None }
        };
        for (spec, why) in [
            (spec(heads(4, 4, 64), 1, 8), "for these heads"),
            (spec(own, 1, 1 << 40), "choose data.sequence"),
            (spec(own, 1 << 40, 8), "train.micro_batch"),
        ] {
            let pass = pass(spec, all);
            let error = attention.plan_forward(driver, &pass.forward).err().unwrap().to_string();
            assert!(error.contains(why), "{error}");
            let error = attention.plan_backward(driver, &pass).err().unwrap().to_string();
            assert!(error.contains(why), "{error}");
        }
        if attention.rotates_back() {
            one_pass_without_a_place_for_its_sums_is_refused(driver);
        }
        let odd = all.offset(8);
        let aligned = pass(spec(own, 1, 8), all);
        let forward = AttentionForward { out: odd, ..aligned.forward };
        let error = attention.plan_forward(driver, &forward).err().unwrap().to_string();
        assert!(error.contains("multiple of 16"), "{error}");
        let backward = AttentionBackward { d_qkv: odd, ..aligned };
        let error = attention.plan_backward(driver, &backward).err().unwrap().to_string();
        assert!(error.contains("d_qkv begins at"), "{error}");
        let error = attention.decode(driver, main, 1, 8, all, odd, all, all, all).unwrap_err();
        assert!(error.to_string().contains("keys begins at"), "{error}");
        let mut decode =
            |tokens, rows| attention.decode(driver, main, tokens, rows, all, all, all, all, all);
        let error = decode(9, 8).unwrap_err().to_string();
        assert!(error.contains("model.max_sequence"), "{error}");
        let error = decode(1 << 30, 1 << 30).unwrap_err().to_string();
        assert!(error.contains("in parts"), "{error}");
        // Nothing to do, and nothing that a driver could refuse.
        decode(0, 0).unwrap();
        let nothing = DevicePointer::NULL;
        for spec in [spec(own, 0, 8), spec(own, 2, 0)] {
            let pass = pass(spec, nothing);
            attention.plan_forward(driver, &pass.forward).unwrap().launch(driver, main).unwrap();
            attention.plan_backward(driver, &pass).unwrap().launch(driver, main).unwrap();
        }
    });
}

/// Of 2^16 rows of a head of 128 the sums take all that there is, 32 MiB; and of 16 query heads for
/// one of k and v, 256 MiB.
fn one_pass_without_a_place_for_its_sums_is_refused(driver: &mut dyn Driver) {
    for (heads, most) in [(heads(1, 1, 128), 1 << 16), (heads(16, 1, 64), 1 << 16)] {
        let attention = Attention::new(driver, Dtype::Bf16, heads, None).unwrap();
        let spec = |sequence| AttentionSpec { heads, batch: 1, sequence };
        assert_eq!(attention.all_passes(spec(most)), [Passes::Two, Passes::One]);
        assert_eq!(attention.all_passes(spec(most + 1)), [Passes::Two]);
        let mut attention = attention.with_passes(Passes::One).unwrap();
        let at = DevicePointer::NULL;
        let pass = AttentionForward {
            spec: spec(most + 1),
            qkv: at,
            document_starts: None,
            out: at,
            log_sum_exp: at,
        };
        let pass =
            AttentionBackward { forward: pass, d_out: at, delta: at, d_qkv: at, angles: None };
        let error = attention.plan_backward(driver, &pass).err().unwrap().to_string();
        for part in ["Passes::Two", &format!("{most} tokens"), &format!("{} tokens", most + 1)] {
            assert!(error.contains(part), "{error}");
        }
    }
}

/// On a GPU a trap is the end of the context; so only here.
#[test]
fn positions_that_break_the_contract_end_the_kernel() {
    if let Err(error) = host::present() {
        println!("skipped: no simt: {error}");
        return;
    }
    for positions in [[3, 5], [7, 8], [-1, 0]] {
        let driver: &mut dyn Driver = &mut Host::new(Options::default()).unwrap();
        let attention = Attention::new(driver, Dtype::F32, heads(1, 1, 32), None).unwrap();
        let at = driver.upload("positions", &positions).unwrap();
        let all = driver.upload("all", &[0.0f32; 8 * 32]).unwrap().address;
        let decoded = attention
            .decode(driver, StreamId::MAIN, 2, 8, all, all, all, at.address, all)
            .and_then(|()| driver.synchronize());
        let error = decoded.unwrap_err().to_string();
        assert!(error.contains("the kernel gave up"), "{positions:?}: {error}");
    }
}
