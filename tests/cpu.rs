//! The CPU backend: every op's gradient against finite differences in f64, f32 against f64, and
//! the same bits for any number of threads.

use isobath::backend::*;
use isobath::config::NormKind;
use isobath::cpu::{Cpu, Float};
use isobath::tensor::{IGNORE_INDEX, Kind, Shape, View};

use crate::support::{assert_close, normals, tokens};

/// Largest allowed error of a gradient, relative to the largest element of its tensor.
const TOLERANCE: f64 = 1e-6;

fn view<T: Float>(cpu: &mut Cpu<T>, sizes: &[usize]) -> View {
    let shape = Shape::new(sizes);
    let buffer = cpu.allocate("test", shape.elements() * size_of::<T>()).unwrap();
    View { buffer, offset: 0, kind: Kind::Activation, shape }
}

fn filled<T: Float>(cpu: &mut Cpu<T>, sizes: &[usize], seed: u64) -> View {
    let view = view(cpu, sizes);
    let values = normals(seed, view.shape.elements());
    cpu.values_mut(view).iter_mut().zip(values).for_each(|(to, value)| *to = T::of(value));
    view
}

fn index<T: Float>(cpu: &mut Cpu<T>, values: &[i32]) -> View {
    let shape = Shape::new(&[values.len()]);
    let buffer = cpu.allocate("test", values.len() * 4).unwrap();
    let view = View { buffer, offset: 0, kind: Kind::Index, shape };
    cpu.write_index(view, values).unwrap();
    view
}

fn values<T: Float>(cpu: &mut Cpu<T>, view: View) -> Vec<f64> {
    cpu.values(view).iter().map(|value| value.to_f64()).collect()
}

/// Compares the gradient that `backward` left in `gradient` with central differences of
/// L = sum over `outs` of out . d_out, as `forward` computes it from `inp`.
fn check(
    what: &str,
    cpu: &mut Cpu<f64>,
    inp: View,
    gradient: View,
    outs: &[(View, View)],
    mut forward: impl FnMut(&mut Cpu<f64>),
) {
    let mut loss = |cpu: &mut Cpu<f64>| -> f64 {
        forward(cpu);
        let mut loss = 0.0;
        for &(out, d_out) in outs {
            let d_out = values(cpu, d_out);
            loss += values(cpu, out).iter().zip(d_out).map(|(a, b)| a * b).sum::<f64>();
        }
        loss
    };
    let step = 1e-5;
    let mut numeric = vec![0.0; inp.shape.elements()];
    for (i, numeric) in numeric.iter_mut().enumerate() {
        let kept = cpu.values(inp)[i];
        cpu.values_mut(inp)[i] = kept + step;
        let above = loss(cpu);
        cpu.values_mut(inp)[i] = kept - step;
        let below = loss(cpu);
        cpu.values_mut(inp)[i] = kept;
        *numeric = (above - below) / (2.0 * step);
    }
    let found = values(cpu, gradient);
    assert!(numeric.iter().any(|g| g.abs() > 1e-3), "{what}: the numeric gradient vanishes");
    assert_close(what, &found, &numeric, TOLERANCE);
}

fn norm_case(kind: NormKind, t: usize, c: usize, depth: usize) {
    let cpu = &mut Cpu::<f64>::new();
    let spec = NormSpec { kind, eps: 1e-6, depth };
    let (inp, gain) = (filled(cpu, &[t, c], 1), filled(cpu, &[c], 3));
    let out = view(cpu, &[t, c]);
    let (rstd, mean) = (view(cpu, &[t]), view(cpu, &[t]));
    let mean = (kind == NormKind::Layer).then_some(mean);
    let d_out = filled(cpu, &[t, c], 4);
    let partial = view(cpu, &[t.div_ceil(NORM_PARTIAL_ROWS), c]);
    let (d_inp, d_gain) = (view(cpu, &[t, c]), view(cpu, &[c]));
    let mut forward = |cpu: &mut Cpu<f64>| {
        cpu.norm_forward(NormForward { spec, inp, gain, out, mean, rstd }).unwrap();
    };
    forward(cpu);
    let backward = |accumulate| {
        let d_inp = Sink { to: d_inp, accumulate };
        NormBackward { spec, inp, gain, mean, rstd, d_out, partial, d_inp, d_gain }
    };
    cpu.norm_backward(backward(false)).unwrap();
    let name = format!("{kind:?} [{t},{c}] depth {depth}");
    let outs = [(out, d_out)];
    check(&format!("{name} d_inp"), cpu, inp, d_inp, &outs, &mut forward);
    check(&format!("{name} d_gain"), cpu, gain, d_gain, &outs, &mut forward);
    // A second backward pass adds where it is told to; the differences left other statistics.
    forward(cpu);
    let once = values(cpu, d_inp);
    cpu.norm_backward(backward(true)).unwrap();
    let twice: Vec<f64> = once.iter().map(|d| 2.0 * d).collect();
    assert_close("accumulated d_inp", &values(cpu, d_inp), &twice, 1e-12);
}

#[test]
fn norm_gradients() {
    norm_case(NormKind::Rms, 5, 7, 1);
    norm_case(NormKind::Rms, 66, 17, 3);
    norm_case(NormKind::Layer, 5, 7, 2);
    norm_case(NormKind::Layer, 65, 33, 1);
}

/// `gains`: 0 for none, 1, or C.
fn scaled_residual_case(t: usize, c: usize, gains: usize, spec: ResidualSpec) {
    let cpu = &mut Cpu::<f64>::new();
    let (inp, residual) = (filled(cpu, &[t, c], 1), filled(cpu, &[t, c], 2));
    let gain = (gains > 0).then(|| filled(cpu, &[gains], 3));
    let (out, d_inp) = (view(cpu, &[t, c]), view(cpu, &[t, c]));
    let d_out = filled(cpu, &[t, c], 4);
    let partial = view(cpu, &[t.div_ceil(NORM_PARTIAL_ROWS), c]);
    let d_gain = filled(cpu, &[gains.max(1)], 5);
    let before = values(cpu, d_gain);
    let mut forward = |cpu: &mut Cpu<f64>| {
        cpu.scaled_residual_forward(ScaledResidualForward { spec, inp, residual, gain, out })
            .unwrap();
    };
    // d_out becomes the gradient of the residual, so the differences read a copy.
    let d_residual = filled(cpu, &[t, c], 4);
    let gradient = gain.map(|gain| GainGradient { inp, gain, partial, d_gain });
    cpu.scaled_residual_backward(ScaledResidualBackward {
        spec,
        d_out: d_residual,
        d_inp,
        gain: gradient,
    })
    .unwrap();
    let name = format!("[{t},{c}] gains {gains} {spec:?}");
    let outs = [(out, d_out)];
    check(&format!("{name} d_inp"), cpu, inp, d_inp, &outs, &mut forward);
    check(&format!("{name} d_residual"), cpu, residual, d_residual, &outs, &mut forward);
    if let Some(gain) = gain {
        cpu.values_mut(d_gain).iter_mut().zip(before).for_each(|(d, before)| *d -= before);
        check(&format!("{name} d_gain"), cpu, gain, d_gain, &outs, &mut forward);
    }
}

#[test]
fn scaled_residual_gradients() {
    let plain = ResidualSpec { stream_scale: 1.0, branch_scale: 1.0 };
    let both = ResidualSpec { stream_scale: 1.7, branch_scale: 0.4 };
    scaled_residual_case(5, 7, 0, plain);
    scaled_residual_case(66, 17, 0, both);
    scaled_residual_case(66, 17, 17, both);
    scaled_residual_case(5, 33, 1, plain);
    scaled_residual_case(130, 5, 1, both);
}

#[test]
fn norm_multiplies_by_the_rounded_effective_gain() {
    let cpu = &mut Cpu::<f32>::new();
    let (t, c) = (3, 40);
    let inp = filled(cpu, &[t, c], 1);
    let (gain, folded) = (filled(cpu, &[c], 2), view(cpu, &[c]));
    let divided: Vec<f32> = cpu.values(gain).iter().map(|w| w / 3f32.sqrt()).collect();
    cpu.write(folded, &divided).unwrap();
    let (scaled, stock, rstd) = (view(cpu, &[t, c]), view(cpu, &[t, c]), view(cpu, &[t]));
    let spec = |depth| NormSpec { kind: NormKind::Rms, eps: 1e-6, depth };
    cpu.norm_forward(NormForward { spec: spec(3), inp, gain, out: scaled, mean: None, rstd })
        .unwrap();
    cpu.norm_forward(NormForward {
        spec: spec(1),
        inp,
        gain: folded,
        out: stock,
        mean: None,
        rstd,
    })
    .unwrap();
    assert_eq!(cpu.values(scaled).to_vec(), cpu.values(stock).to_vec());
}

#[test]
fn linear_gradients() {
    let cpu = &mut Cpu::<f64>::new();
    for (t, i, o) in [(5, 7, 3), (1, 4, 9), (33, 18, 20)] {
        let (inp, weight) = (filled(cpu, &[t, i], 1), filled(cpu, &[o, i], 2));
        let (residual, out) = (filled(cpu, &[t, o], 3), view(cpu, &[t, o]));
        let d_out = filled(cpu, &[t, o], 4);
        let (d_inp, d_weight) = (filled(cpu, &[t, i], 5), view(cpu, &[o, i]));
        let mut forward = |cpu: &mut Cpu<f64>| {
            cpu.linear_forward(LinearForward { inp, weight, residual: Some(residual), out })
                .unwrap();
        };
        forward(cpu);
        let sink = Sink { to: d_inp, accumulate: false };
        cpu.linear_backward(LinearBackward { inp, weight, d_out, d_inp: sink, d_weight }).unwrap();
        let outs = [(out, d_out)];
        check("linear d_inp", cpu, inp, d_inp, &outs, &mut forward);
        check("linear d_weight", cpu, weight, d_weight, &outs, &mut forward);
        check("linear d_residual", cpu, residual, d_out, &outs, &mut forward);
        let expected: Vec<f64> = values(cpu, d_weight).iter().map(|d| 2.0 * d).collect();
        let sink = Sink { to: d_inp, accumulate: true };
        cpu.linear_backward(LinearBackward { inp, weight, d_out, d_inp: sink, d_weight }).unwrap();
        assert_close("accumulated d_weight", &values(cpu, d_weight), &expected, 1e-12);
    }
}

#[test]
fn swiglu_gradients() {
    let cpu = &mut Cpu::<f64>::new();
    let (t, f) = (35, 5);
    let (inp, out) = (filled(cpu, &[t, 2 * f], 1), view(cpu, &[t, f]));
    let (d_out, d_inp) = (filled(cpu, &[t, f], 2), view(cpu, &[t, 2 * f]));
    cpu.swiglu_backward(SwiGluBackward { inp, d_out, d_inp }).unwrap();
    check("swiglu", cpu, inp, d_inp, &[(out, d_out)], |cpu| {
        cpu.swiglu_forward(SwiGluForward { inp, out }).unwrap();
    });
}

#[test]
fn embedding_gradients_with_repeated_tokens() {
    let cpu = &mut Cpu::<f64>::new();
    let (v, c) = (6, 40);
    let ids = index(cpu, &[2, 5, 2, 2, 0]);
    let (table, out) = (filled(cpu, &[v, c], 1), view(cpu, &[5, c]));
    let (d_out, d_table) = (filled(cpu, &[5, c], 2), view(cpu, &[v, c]));
    cpu.embedding_backward(EmbeddingBackward { tokens: ids, d_out, d_table }).unwrap();
    check("embedding", cpu, table, d_table, &[(out, d_out)], |cpu| {
        cpu.embedding_forward(EmbeddingForward { tokens: ids, table, out }).unwrap();
    });
}

#[test]
fn rotary_gradients_and_known_rotation() {
    let cpu = &mut Cpu::<f64>::new();
    let heads = HeadSpec { heads: 3, kv_heads: 1, head_dim: 6 };
    let (t, columns) = (4, heads.qkv_columns());
    // Four positions, not in order; angles 0.5 p / (i + 1).
    let positions = index(cpu, &[3, 0, 1, 2]);
    let table = view(cpu, &[4, 6]);
    for p in 0..4 {
        for i in 0..3 {
            let angle = 0.5 * p as f64 / (i + 1) as f64;
            cpu.values_mut(table)[p * 6 + i] = angle.cos();
            cpu.values_mut(table)[p * 6 + 3 + i] = angle.sin();
        }
    }
    let (inp, out) = (filled(cpu, &[t, columns], 1), view(cpu, &[t, columns]));
    let d_out = filled(cpu, &[t, columns], 2);
    let d_inp = view(cpu, &[t, columns]);
    cpu.copy(d_out, d_inp).unwrap();
    cpu.rotary_backward(Rotary { heads, table, positions, qkv: d_inp }).unwrap();
    let mut forward = |cpu: &mut Cpu<f64>| {
        cpu.copy(inp, out).unwrap();
        cpu.rotary_forward(Rotary { heads, table, positions, qkv: out }).unwrap();
    };
    check("rotary", cpu, inp, d_inp, &[(out, d_out)], &mut forward);
    // Token 0 stands at position 3: pair (0, 3) of its first head turns by 1.5.
    forward(cpu);
    let (before, after) = (values(cpu, inp), values(cpu, out));
    let expected = before[0] * 1.5f64.cos() - before[3] * 1.5f64.sin();
    assert_close("rotated", &after[..1], &[expected], 1e-12);
    assert_eq!(before[4 * 6..5 * 6], after[4 * 6..5 * 6], "v must not turn");
}

/// With `starts` [T], rows hold several documents.
fn attention_case(batch: usize, sequence: usize, heads: HeadSpec, starts: Option<&[i32]>) {
    let cpu = &mut Cpu::<f64>::new();
    let spec = AttentionSpec { heads, batch, sequence };
    let (t, columns, d) = (batch * sequence, heads.qkv_columns(), heads.head_dim);
    let (qkv, out) = (filled(cpu, &[t, columns], 1), view(cpu, &[t, heads.heads * d]));
    let (lse, delta) = ([batch, heads.heads, sequence], [batch, heads.heads, sequence]);
    let (lse, delta) = (view(cpu, &lse), view(cpu, &delta));
    let d_out = filled(cpu, &[t, heads.heads * d], 2);
    let d_qkv = filled(cpu, &[t, columns], 3);
    let documents = starts.map(|starts| index(cpu, starts));
    let forward = AttentionForward { spec, qkv, document_starts: documents, out, log_sum_exp: lse };
    cpu.attention_forward(forward).unwrap();

    // The plain formula.
    let (x, found) = (values(cpu, qkv), values(cpu, out));
    let mut expected = vec![0.0; found.len()];
    for b in 0..batch {
        for h in 0..heads.heads {
            let kv = h / (heads.heads / heads.kv_heads);
            let at = |s: usize, column: usize| (b * sequence + s) * columns + column * d;
            for i in 0..sequence {
                let score = |j: usize| {
                    let (q, k) = (at(i, h), at(j, heads.heads + kv));
                    (0..d).map(|e| x[q + e] * x[k + e]).sum::<f64>() / (d as f64).sqrt()
                };
                let start = starts.map_or(0, |starts| starts[b * sequence + i] as usize);
                let weights: Vec<f64> = (start..=i).map(|j| score(j).exp()).collect();
                let total: f64 = weights.iter().sum();
                for e in 0..d {
                    let v = |j: usize| x[at(j, heads.heads + heads.kv_heads + kv) + e];
                    let sum: f64 = (start..=i).map(|j| weights[j - start] * v(j)).sum();
                    expected[(b * sequence + i) * heads.heads * d + h * d + e] = sum / total;
                }
            }
        }
    }
    let name = format!("attention B{batch} S{sequence} {heads:?} {starts:?}");
    assert_close(&name, &found, &expected, 1e-12);

    cpu.attention_backward(AttentionBackward {
        spec,
        qkv,
        document_starts: documents,
        out,
        log_sum_exp: lse,
        d_out,
        delta,
        d_qkv,
    })
    .unwrap();
    check(&name, cpu, qkv, d_qkv, &[(out, d_out)], |cpu| {
        cpu.attention_forward(forward).unwrap();
    });
}

#[test]
fn attention_gradients() {
    attention_case(2, 9, HeadSpec { heads: 4, kv_heads: 2, head_dim: 6 }, None);
    attention_case(1, 1, HeadSpec { heads: 1, kv_heads: 1, head_dim: 2 }, None);
    attention_case(1, 67, HeadSpec { heads: 2, kv_heads: 1, head_dim: 5 }, None);
    attention_case(1, 130, HeadSpec { heads: 1, kv_heads: 1, head_dim: 3 }, None);
}

/// Where the documents of a row of these lengths begin, for each of its tokens.
fn starts_of(lengths: &[usize]) -> Vec<i32> {
    let mut start = 0;
    let mut starts = vec![];
    for &length in lengths {
        starts.extend(std::iter::repeat_n(start, length));
        start += length as i32;
    }
    starts
}

/// Borders on tiles (64) and bands (16) and off them, a document of one token, rows that differ.
#[test]
fn attention_gradients_of_packed_documents() {
    let rows = [starts_of(&[1, 3, 5]), starts_of(&[4, 4, 1])].concat();
    attention_case(2, 9, HeadSpec { heads: 4, kv_heads: 2, head_dim: 6 }, Some(&rows));
    let one = HeadSpec { heads: 1, kv_heads: 1, head_dim: 3 };
    attention_case(1, 130, one, Some(&starts_of(&[64, 64, 2])));
    attention_case(1, 150, one, Some(&starts_of(&[17, 48, 1, 68, 16])));
    let pair = HeadSpec { heads: 2, kv_heads: 1, head_dim: 5 };
    attention_case(1, 67, pair, Some(&starts_of(&[67])));
}

/// Outputs and gradients of a packed row are those of its documents, each by itself.
#[test]
fn packed_documents_attend_as_if_alone() {
    let heads = HeadSpec { heads: 4, kv_heads: 2, head_dim: 6 };
    let (lengths, columns) = ([70, 1, 33, 64, 12], heads.qkv_columns());
    let t = lengths.iter().sum();
    let cpu = &mut Cpu::<f64>::new();
    let (qkv, d_out) = (filled(cpu, &[t, columns], 1), filled(cpu, &[t, 24], 2));
    let mut run = |qkv: View, d_out: View, starts: Option<&[i32]>| {
        let t = qkv.shape.rows();
        let spec = AttentionSpec { heads, batch: 1, sequence: t };
        let (out, d_qkv) = (view(cpu, &[t, 24]), view(cpu, &[t, columns]));
        let (lse, delta) = (view(cpu, &[1, 4, t]), view(cpu, &[1, 4, t]));
        let starts = starts.map(|starts| index(cpu, starts));
        cpu.attention_forward(AttentionForward {
            spec,
            qkv,
            document_starts: starts,
            out,
            log_sum_exp: lse,
        })
        .unwrap();
        cpu.attention_backward(AttentionBackward {
            spec,
            qkv,
            document_starts: starts,
            out,
            log_sum_exp: lse,
            d_out,
            delta,
            d_qkv,
        })
        .unwrap();
        [values(cpu, out), values(cpu, d_qkv)]
    };
    let [out, d_qkv] = run(qkv, d_out, Some(&starts_of(&lengths)));
    let mut first = 0;
    for length in lengths {
        let rows = |view: View| {
            let columns = view.shape.columns();
            View { offset: first * columns * 8, shape: Shape::new(&[length, columns]), ..view }
        };
        let [alone, d_alone] = run(rows(qkv), rows(d_out), None);
        let part = |values: &[f64], columns| values[first * columns..][..length * columns].to_vec();
        assert_close("out", &part(&out, 24), &alone, 1e-12);
        assert_close("d_qkv", &part(&d_qkv, columns), &d_alone, 1e-12);
        first += length;
    }
}

#[test]
fn attention_does_not_overflow_with_large_scores() {
    let cpu = &mut Cpu::<f32>::new();
    let heads = HeadSpec { heads: 1, kv_heads: 1, head_dim: 4 };
    let spec = AttentionSpec { heads, batch: 1, sequence: 3 };
    let qkv = view(cpu, &[3, 12]);
    cpu.values_mut(qkv).fill(100.0);
    let (out, lse) = (view(cpu, &[3, 4]), view(cpu, &[1, 1, 3]));
    cpu.attention_forward(AttentionForward {
        spec,
        qkv,
        document_starts: None,
        out,
        log_sum_exp: lse,
    })
    .unwrap();
    assert_eq!(cpu.values(out), [100.0; 12]);
}

#[test]
fn cached_attention_equals_attention() {
    let cpu = &mut Cpu::<f64>::new();
    let heads = HeadSpec { heads: 4, kv_heads: 2, head_dim: 6 };
    let (t, columns) = (75, heads.qkv_columns());
    let spec = AttentionSpec { heads, batch: 1, sequence: t };
    let (qkv, out) = (filled(cpu, &[t, columns], 1), view(cpu, &[t, 24]));
    let lse = view(cpu, &[1, 4, t]);
    cpu.attention_forward(AttentionForward {
        spec,
        qkv,
        document_starts: None,
        out,
        log_sum_exp: lse,
    })
    .unwrap();
    let expected = values(cpu, out);
    let (keys, cached) = (view(cpu, &[80, 12]), view(cpu, &[80, 12]));
    // 70 tokens at once, then one by one.
    let mut start = 0;
    for count in [70, 1, 1, 1, 1, 1] {
        let ids: Vec<i32> = (start as i32..(start + count) as i32).collect();
        let positions = index(cpu, &ids);
        let rows = |view: View, columns: usize| View {
            offset: start * columns * 8,
            shape: Shape::new(&[count, columns]),
            ..view
        };
        let (qkv, out) = (rows(qkv, columns), rows(out, 24));
        cpu.values_mut(out).fill(f64::NAN);
        cpu.cached_attention_forward(CachedAttention {
            heads,
            qkv,
            keys,
            values: cached,
            positions,
            out,
        })
        .unwrap();
        start += count;
    }
    assert_close("cached", &values(cpu, out), &expected, 1e-12);
}

fn cross_entropy_case(t: usize, v: usize, classes: usize, chunk: usize, z_loss: f64) {
    let cpu = &mut Cpu::<f64>::new();
    let c = 6;
    let spec = LossSpec { classes, chunk, z_loss };
    let (inp, weight) = (filled(cpu, &[t, c], 1), filled(cpu, &[v, c], 2));
    let mut ids = tokens(3, t, classes);
    ids[t / 2] = IGNORE_INDEX;
    let targets = index(cpu, &ids);
    let (scale, losses) = (view(cpu, &[1]), view(cpu, &[t]));
    cpu.values_mut(scale)[0] = 0.25;
    let scales = view(cpu, &[t]);
    cpu.values_mut(scales).fill(0.25);
    let logits = view(cpu, &[chunk, v]);
    let (d_inp, d_weight) = (view(cpu, &[t, c]), view(cpu, &[v, c]));
    cpu.cross_entropy_backward(CrossEntropyBackward {
        forward: CrossEntropyForward { spec, inp, weight, targets, logits, losses },
        scale,
        d_inp,
        d_weight,
    })
    .unwrap();
    let with_gradient = values(cpu, losses);
    assert_eq!(with_gradient[t / 2], 0.0, "an ignored target has no loss");

    let (x, w) = (values(cpu, inp), values(cpu, weight));
    let expected: Vec<f64> = (0..t)
        .map(|t| {
            let logit = |k: usize| (0..c).map(|i| x[t * c + i] * w[k * c + i]).sum::<f64>();
            let log_z = (0..classes).map(|k| logit(k).exp()).sum::<f64>().ln();
            match ids[t] {
                IGNORE_INDEX => 0.0,
                id => log_z - logit(id as usize) + z_loss * log_z * log_z,
            }
        })
        .collect();
    assert_close("losses", &with_gradient, &expected, 1e-12);

    let mut forward = |cpu: &mut Cpu<f64>| {
        cpu.cross_entropy_forward(CrossEntropyForward {
            spec,
            inp,
            weight,
            targets,
            logits,
            losses,
        })
        .unwrap();
    };
    forward(cpu);
    assert_eq!(values(cpu, losses), with_gradient, "the two passes must agree to the bit");
    check("cross-entropy d_inp", cpu, inp, d_inp, &[(losses, scales)], &mut forward);
    check("cross-entropy d_weight", cpu, weight, d_weight, &[(losses, scales)], &mut forward);
}

#[test]
fn cross_entropy_gradients() {
    cross_entropy_case(5, 7, 7, 5, 0.0);
    cross_entropy_case(11, 24, 19, 4, 1e-2);
    cross_entropy_case(9, 40, 33, 2, 0.0);
}

#[test]
fn adamw_is_the_published_formula_and_walks_decay_ranges() {
    let cpu = &mut Cpu::<f64>::new();
    let n = 40_000;
    let flat = |cpu: &mut Cpu<f64>, seed| View { kind: Kind::Statistic, ..filled(cpu, &[n], seed) };
    let (parameters, gradients) = (flat(cpu, 1), flat(cpu, 2));
    let (moment1, moment2) = (flat(cpu, 3), flat(cpu, 4));
    cpu.values_mut(moment2).iter_mut().for_each(|v| *v = v.abs());
    let [w, g, m, v] = [parameters, gradients, moment1, moment2].map(|view| values(cpu, view));
    let decay = [100..17_000, 17_100..17_101, 30_000..39_999];
    let mut step = AdamWStep {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        decoupled: true,
        correction1: 1.0 - 0.9f64.powi(3),
        correction2: 1.0 - 0.95f64.powi(3),
        clip: 1.5,
        decay: &decay,
        seed: 0,
        update: 1,
    };
    let grad_norm = view(cpu, &[1]);
    let buffers = FlatBuffers {
        parameters,
        working: None,
        vectors: None,
        gradients,
        moment1,
        moment2,
        grad_norm,
        first: 0,
    };
    for norm in [f64::NAN, f64::INFINITY] {
        cpu.values_mut(grad_norm)[0] = norm;
        cpu.adamw(&buffers, &step).unwrap();
        assert!(values(cpu, parameters) == w && values(cpu, moment2) == v, "{norm} was applied");
    }
    cpu.values_mut(grad_norm)[0] = 3.0; // clipped to 1.5: the gradient is halved
    cpu.adamw(&buffers, &step).unwrap();
    let decays = |i: usize| decay.iter().any(|range| range.contains(&i));
    let reference = |i: usize, decoupled: bool| {
        let l2 = if decays(i) { 0.1 } else { 0.0 };
        let g = 0.5 * g[i] + if decoupled { 0.0 } else { l2 * w[i] };
        let (m, v) = (0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g * g);
        let update = m / step.correction1 / ((v / step.correction2).sqrt() + 1e-8);
        w[i] - 1e-2 * (update + if decoupled { l2 * w[i] } else { 0.0 })
    };
    let expected: Vec<f64> = (0..n).map(|i| reference(i, true)).collect();
    assert_close("adamw", &values(cpu, parameters), &expected, 1e-13);

    for (view, before) in [(parameters, &w), (moment1, &m), (moment2, &v)] {
        cpu.values_mut(view).copy_from_slice(before);
    }
    step.decoupled = false;
    cpu.adamw(&buffers, &step).unwrap();
    let expected: Vec<f64> = (0..n).map(|i| reference(i, false)).collect();
    assert_close("adam with L2", &values(cpu, parameters), &expected, 1e-13);
}

#[test]
fn gradient_norm_is_the_euclidean_norm() {
    let cpu = &mut Cpu::<f64>::new();
    let gradients = filled(cpu, &[50_001], 7);
    let expected = values(cpu, gradients).iter().map(|g| g * g).sum::<f64>().sqrt();
    let grad_norm = view(cpu, &[1]);
    let unused = filled(cpu, &[50_001], 8);
    let (parameters, moment1, moment2) = (unused, unused, unused);
    let buffers = FlatBuffers {
        parameters,
        working: None,
        vectors: None,
        gradients,
        moment1,
        moment2,
        grad_norm,
        first: 0,
    };
    cpu.gradient_norm(&buffers).unwrap();
    assert_close("norm", &values(cpu, grad_norm), &[expected], 1e-12);
}

#[test]
fn f32_exp_is_within_two_units_in_the_last_place() {
    for i in -87_000..=88_000i32 {
        let x = i as f32 * 1e-3;
        let (found, expected) = (Float::exp(x) as f64, (x as f64).exp());
        let unit = expected * f32::EPSILON as f64;
        assert!((found - expected).abs() <= 2.0 * unit, "exp({x}) = {found:e}, not {expected:e}");
    }
    assert_eq!(Float::exp(f32::NEG_INFINITY), 0.0);
    assert!(Float::exp(f32::NAN).is_nan());
    assert!(Float::exp(89.0f32).is_finite(), "saturates at the largest result");
}

#[test]
#[should_panic(expected = "overlaps")]
fn a_written_view_may_not_overlap_another() {
    let cpu = &mut Cpu::<f32>::new();
    let whole = filled(cpu, &[4, 8], 1);
    let part = View { offset: 32, shape: Shape::new(&[2, 8]), ..whole };
    cpu.copy(whole, part).unwrap();
}

/// Sizes and offsets whose sums or products wrap round in 64 bits.
#[test]
fn a_view_may_not_leave_its_buffer_by_wrapping_round() {
    let cpu = &mut Cpu::<f64>::new();
    let whole = filled(cpu, &[4, 8], 1);
    let sized = |sizes: &[usize]| View { shape: Shape::new(sizes), ..whole };
    let cases = [
        (sized(&[4, 9]), "leaves its buffer"),
        (View { offset: 8, ..whole }, "leaves its buffer"),
        (View { offset: usize::MAX - 7, ..sized(&[1]) }, "leaves its buffer"),
        (View { offset: usize::MAX - 7, ..sized(&[2]) }, "leaves its buffer"),
        (sized(&[1 << 61]), "leaves its buffer"),
        (sized(&[(1 << 61) + 1]), "leaves its buffer"),
        (sized(&[1 << 32, 1 << 32]), "does not fit"),
        (sized(&[1 << 33, (1 << 31) + 1, 1]), "does not fit"),
    ];
    for (view, expected) in cases {
        let message = panic_message(|| cpu.values(view).len());
        assert!(message.contains(expected), "{view:?}: {message}");
    }
    assert_eq!(cpu.values(whole).len(), 32);
}

#[test]
fn a_negative_token_reaches_no_memory_before_the_table() {
    let cpu = &mut Cpu::<f64>::new();
    let tokens = index(cpu, &[1, -1]);
    let (d_out, d_table) = (filled(cpu, &[2, 32], 1), view(cpu, &[4, 32]));
    let backward = EmbeddingBackward { tokens, d_out, d_table };
    let message = panic_message(|| cpu.embedding_backward(backward));
    assert!(message.contains("assertion failed: row < self.rows"), "{message}");
}

fn panic_message<T>(does: impl FnOnce() -> T) -> String {
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(does));
    let payload = panic.err().expect("a panic was expected");
    match payload.downcast::<String>() {
        Ok(message) => *message,
        Err(payload) => payload.downcast::<&str>().unwrap().to_string(),
    }
}

/// Where nothing waits for a thread of the pool to wake up before each op.
#[test]
fn work_is_done_on_a_worker_of_the_pool() {
    assert_eq!(rayon::current_thread_index(), None);
    let mut cpu = Cpu::<f32>::new();
    let here = |_: &mut Cpu<f32>| rayon::current_thread_index();
    assert!(cpu.on_worker(here).is_some());
    assert!(cpu.on_worker(|cpu| cpu.on_worker(here)).is_some(), "within another");
}
