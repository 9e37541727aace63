//! Causal attention with grouped KV heads, streaming softmax, forward and backward.
//!
//! Tiles of 64 queries by 64 keys; no S x S matrix exists. q, k and v are read where the fused
//! projection put them. One task owns one (sequence, kv head) in the backward pass and loops over
//! that group's query heads, so nothing is added to by two tasks. Dao 2023, algorithms 1 and 2.
//! A task keeps its tiles to itself: tens of KiB.

use std::ops::Range;

use rayon::prelude::*;

use super::float::Float;
use super::memory::Columns;
use super::tile::TileProduct;
use super::vectorise::vectorised;
use crate::backend::{AttentionSpec, HeadSpec};

/// Queries and keys in a tile: 64 x 64 f32 scores are 16 KiB, half of a first-level cache.
const TILE: usize = 64;

/// Rows of a tile that are worked on together, up to the last key that one of them sees: what the
/// causal mask hides from all of them is not computed. As many as the widest vector has elements.
const BAND: usize = 16;

fn bands(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(BAND).map(move |first| first..rows.min(first + BAND))
}

/// Changes pairs of elements, in groups of a fixed size so that short rows vectorise too.
#[inline(always)]
fn for_each_pair<T: Float>(a: &mut [T], b: &mut [T], change: impl Fn(&mut T, &mut T)) {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks_mut::<BAND>(), b.as_chunks_mut::<BAND>());
    for (a, b) in a.iter_mut().zip(b) {
        a.iter_mut().zip(b).for_each(|(a, b)| change(a, b));
    }
    a_rest.iter_mut().zip(b_rest).for_each(|(a, b)| change(a, b));
}

/// As [`for_each_pair`], for one slice.
#[inline(always)]
fn for_each<T: Float>(a: &mut [T], change: impl Fn(&mut T)) {
    let (a, rest) = a.as_chunks_mut::<BAND>();
    a.iter_mut().for_each(|a| a.iter_mut().for_each(&change));
    rest.iter_mut().for_each(change);
}

/// Where the heads of one token lie in a row of qkv.
#[derive(Clone, Copy)]
struct Layout {
    heads: HeadSpec,
    columns: usize,
}

impl Layout {
    fn new(heads: HeadSpec) -> Self {
        Layout { heads, columns: heads.qkv_columns() }
    }

    fn q(&self, head: usize) -> usize {
        head * self.heads.head_dim
    }

    fn k(&self, kv_head: usize) -> usize {
        (self.heads.heads + kv_head) * self.heads.head_dim
    }

    fn v(&self, kv_head: usize) -> usize {
        (self.heads.heads + self.heads.kv_heads + kv_head) * self.heads.head_dim
    }

    fn group(&self) -> usize {
        self.heads.heads / self.heads.kv_heads
    }
}

/// out [columns, rows] = the first `columns` of each row of inp, transposed; rows `stride` apart.
#[inline(always)]
fn transpose<T: Float>(inp: &[T], stride: usize, rows: usize, columns: usize, out: &mut [T]) {
    for row in 0..rows {
        for column in 0..columns {
            out[column * TILE + row] = inp[row * stride + column];
        }
    }
}

/// Where the document of each token begins in its row, [T]; `None`: every row is one document.
#[derive(Clone, Copy)]
pub(super) struct Documents<'a>(pub Option<&'a [i32]>);

impl Documents<'_> {
    /// The first key that the query of this token sees.
    fn start(&self, token: usize) -> usize {
        self.0.map_or(0, |starts| starts[token] as usize)
    }
}

/// A tile of queries of one head, and one sequence's keys and values.
struct Queries<'a, T> {
    /// Rows `q_stride` apart, the first of them at position `first`.
    q: &'a [T],
    q_stride: usize,
    rows: usize,
    first: usize,
    /// The first of them is token `token`.
    documents: Documents<'a>,
    token: usize,
    /// Rows `kv_stride` apart, from position 0 on.
    keys: &'a [T],
    values: &'a [T],
    kv_stride: usize,
    d: usize,
}

vectorised! {
    /// Attends to the keys from each query's document's start to its position; out [rows,D],
    /// log_sum_exp [rows].
    fn attend<T: Float>(queries: Queries<'_, T>, out: &mut [T], log_sum_exp: &mut [T]) {
        let Queries { q, q_stride, rows, first, documents, token, keys, values, kv_stride, d } =
            queries;
        let scale = T::of(1.0 / (d as f64).sqrt());
        let mut k_transposed = vec![T::ZERO; d * TILE];
        let mut scores = [T::ZERO; BAND * TILE];
        let mut highest = [T::NEG_INFINITY; TILE];
        let mut total = [T::ZERO; TILE];
        out.fill(T::ZERO);
        // Starts do not descend: the first query sees the first key that any of them sees.
        let first_tile = documents.start(token) / TILE * TILE;
        for first_key in (first_tile..first + rows).step_by(TILE) {
            let tile_keys = TILE.min(first + rows - first_key);
            transpose(&keys[first_key * kv_stride..], kv_stride, tile_keys, d, &mut k_transposed);
            for band in bands(rows) {
                let reach = tile_keys.min((first + band.end).saturating_sub(first_key));
                if reach == 0 {
                    continue;
                }
                let scores = &mut scores[..band.len() * TILE];
                let product = TileProduct {
                    m: band.len(),
                    n: reach,
                    k: d,
                    a_row: q_stride,
                    a_column: 1,
                    b_row: TILE,
                    c_row: TILE,
                    accumulate: false,
                };
                T::tile_product(product, &q[band.start * q_stride..], &k_transposed, scores);
                for (row, scores) in band.clone().zip(scores.chunks_exact_mut(TILE)) {
                    let end = reach.min((first + row + 1).saturating_sub(first_key));
                    let start = documents.start(token + row).saturating_sub(first_key);
                    let scores = &mut scores[..reach];
                    if start >= end {
                        scores.fill(T::ZERO);
                        continue;
                    }
                    let highest_here = super::norm::maximum(&scores[start..end]) * scale;
                    let max = highest[row].maximum(highest_here);
                    for_each(scores, |score| *score = (*score * scale - max).exp());
                    scores[..start].fill(T::ZERO);
                    scores[end..].fill(T::ZERO);
                    let rescale = (highest[row] - max).exp();
                    total[row] = total[row] * rescale + super::norm::sum(reach, |i| scores[i]);
                    highest[row] = max;
                    if rescale != T::ONE {
                        for_each(&mut out[row * d..][..d], |out| *out *= rescale);
                    }
                }
                let product = TileProduct {
                    m: band.len(),
                    n: d,
                    k: reach,
                    a_row: TILE,
                    a_column: 1,
                    b_row: kv_stride,
                    c_row: d,
                    accumulate: true,
                };
                let out = &mut out[band.start * d..];
                T::tile_product(product, scores, &values[first_key * kv_stride..], out);
            }
        }
        for row in 0..rows {
            let inverse = T::ONE / total[row];
            for_each(&mut out[row * d..][..d], |out| *out *= inverse);
            log_sum_exp[row] = highest[row] + total[row].ln();
        }
    }
}

/// qkv [T,(H+2K)D] -> out [T,HD], log_sum_exp [B,H,S]
pub(super) fn forward<T: Float>(
    spec: AttentionSpec,
    qkv: &[T],
    documents: Documents,
    out: &mut [T],
    log_sum_exp: &mut [T],
) {
    let AttentionSpec { heads, batch, sequence } = spec;
    let layout = Layout::new(heads);
    let d = heads.head_dim;
    let tiles = sequence.div_ceil(TILE);
    let out = Columns::new(out, heads.heads * d);
    let log_sum_exp = Columns::new(log_sum_exp, sequence);
    (0..batch * heads.heads * tiles).into_par_iter().for_each(|task| {
        // The longest tiles first.
        let (tile, bh) = (tiles - 1 - task / (batch * heads.heads), task % (batch * heads.heads));
        let (b, head) = (bh / heads.heads, bh % heads.heads);
        let first = tile * TILE;
        let rows = TILE.min(sequence - first);
        let kv_head = head / layout.group();
        let token = |t: usize| (b * sequence + t) * layout.columns;
        let queries = Queries {
            q: &qkv[token(first) + layout.q(head)..],
            q_stride: layout.columns,
            rows,
            first,
            documents,
            token: b * sequence + first,
            keys: &qkv[token(0) + layout.k(kv_head)..],
            values: &qkv[token(0) + layout.v(kv_head)..],
            kv_stride: layout.columns,
            d,
        };
        let mut tile = vec![T::ZERO; rows * d];
        // SAFETY: tasks have different heads or different rows.
        let log_sum_exp = unsafe { log_sum_exp.row(bh, first, rows) };
        attend(queries, &mut tile, log_sum_exp);
        for (row, from) in tile.chunks_exact(d).enumerate() {
            // SAFETY: as above; one slice after the other.
            unsafe { out.row(b * sequence + first + row, head * d, d) }.copy_from_slice(from);
        }
    });
}

/// qkv [T,(H+2K)D] of one sequence whose first token stands at `positions[0]`; its k and v go to
/// those rows of keys and values [P,KD]; out [T,HD].
pub(super) fn cached<T: Float>(
    heads: HeadSpec,
    qkv: &[T],
    keys: &mut [T],
    values: &mut [T],
    positions: &[i32],
    out: &mut [T],
) {
    let layout = Layout::new(heads);
    let d = heads.head_dim;
    let kv_columns = heads.kv_heads * d;
    for (qkv, &position) in qkv.chunks_exact(layout.columns).zip(positions) {
        let row = position as usize * kv_columns;
        keys[row..][..kv_columns].copy_from_slice(&qkv[layout.k(0)..][..kv_columns]);
        values[row..][..kv_columns].copy_from_slice(&qkv[layout.v(0)..][..kv_columns]);
    }
    let (keys, values) = (&*keys, &*values);
    let start = positions.first().map_or(0, |&p| p as usize);
    let tiles = positions.len().div_ceil(TILE);
    let out = Columns::new(out, heads.heads * d);
    (0..tiles * heads.heads).into_par_iter().for_each(|task| {
        let (tile, head) = (task / heads.heads, task % heads.heads);
        let first = tile * TILE;
        let rows = TILE.min(positions.len() - first);
        let kv_head = head / layout.group();
        let queries = Queries {
            q: &qkv[first * layout.columns + layout.q(head)..],
            q_stride: layout.columns,
            rows,
            first: start + first,
            documents: Documents(None),
            token: 0,
            keys: &keys[kv_head * d..],
            values: &values[kv_head * d..],
            kv_stride: kv_columns,
            d,
        };
        let (mut tile, mut log_sum_exp) = (vec![T::ZERO; rows * d], [T::ZERO; TILE]);
        attend(queries, &mut tile, &mut log_sum_exp);
        for (row, from) in tile.chunks_exact(d).enumerate() {
            // SAFETY: tasks have different heads or different rows; one slice after the other.
            unsafe { out.row(first + row, head * d, d) }.copy_from_slice(from);
        }
    });
}

pub(super) struct Backward<'a, T> {
    pub qkv: &'a [T], // [T,(H+2K)D]
    pub documents: Documents<'a>,
    pub out: &'a [T],         // [T,HD]
    pub log_sum_exp: &'a [T], // [B,H,S]
    pub d_out: &'a [T],       // [T,HD]
    pub delta: &'a mut [T],   // [B,H,S]
    pub d_qkv: &'a mut [T],   // [T,(H+2K)D], =
}

/// P = exp(q k^T scale - lse), dP = d_out v^T, dS = P (dP - delta) scale;
/// dv = P^T d_out, dk = dS^T q, dq = dS k.
pub(super) fn backward<T: Float>(spec: AttentionSpec, args: Backward<T>) {
    let Backward { qkv, documents, out, log_sum_exp, d_out, delta, d_qkv } = args;
    let AttentionSpec { heads, batch, sequence } = spec;
    let layout = Layout::new(heads);
    let d = heads.head_dim;
    let out_columns = heads.heads * d;
    delta.par_chunks_mut(sequence).enumerate().for_each(|(bh, delta)| {
        let (b, head) = (bh / heads.heads, bh % heads.heads);
        let at = b * sequence * out_columns + head * d;
        row_products(&out[at..], &d_out[at..], out_columns, d, delta);
    });
    let delta = &*delta;
    let d_qkv = Columns::new(d_qkv, layout.columns);
    (0..batch * heads.kv_heads).into_par_iter().for_each(|task| {
        let (b, kv_head) = (task / heads.kv_heads, task % heads.kv_heads);
        let group =
            Group { layout, sequence, b, kv_head, qkv, documents, log_sum_exp, d_out, delta };
        // Tasks have different sequences or different kv heads, hence different q, k and v.
        group_backward(group, d_qkv);
    });
}

/// One kv head of one sequence, with its query heads.
struct Group<'a, T> {
    layout: Layout,
    sequence: usize,
    b: usize,
    kv_head: usize,
    qkv: &'a [T],
    documents: Documents<'a>,
    log_sum_exp: &'a [T],
    d_out: &'a [T],
    delta: &'a [T],
}

vectorised! {
    /// delta[row] = out[row] . d_out[row], rows `stride` apart and D wide.
    fn row_products<T: Float>(
        out: &[T],
        d_out: &[T],
        stride: usize,
        d: usize,
        delta: &mut [T],
    ) {
        for (row, delta) in delta.iter_mut().enumerate() {
            let (out, d_out) = (&out[row * stride..][..d], &d_out[row * stride..][..d]);
            *delta = super::norm::sum(d, |i| out[i] * d_out[i]);
        }
    }

    /// Writes this group's columns of d_qkv, which no other task touches.
    fn group_backward<T: Float>(group: Group<'_, T>, d_qkv: Columns<'_, T>) {
        let Group { layout, sequence, b, kv_head, qkv, documents, .. } = group;
        let d = layout.heads.head_dim;
        let out_columns = layout.heads.heads * d;
        let scale = T::of(1.0 / (d as f64).sqrt());
        let token = |t: usize| (b * sequence + t) * layout.columns;
        let mut k_transposed = vec![T::ZERO; d * TILE];
        let mut v_transposed = vec![T::ZERO; d * TILE];
        let mut p = [T::ZERO; TILE * TILE]; // [queries,keys]
        let mut d_s = [T::ZERO; TILE * TILE];
        let mut d_k = vec![T::ZERO; TILE * d];
        let mut d_v = vec![T::ZERO; TILE * d];
        let mut d_q = vec![T::ZERO; BAND * d];
        for first_key in (0..sequence).step_by(TILE) {
            let keys = TILE.min(sequence - first_key);
            let k = &qkv[token(first_key) + layout.k(kv_head)..];
            let v = &qkv[token(first_key) + layout.v(kv_head)..];
            transpose(k, layout.columns, keys, d, &mut k_transposed);
            transpose(v, layout.columns, keys, d, &mut v_transposed);
            d_k.fill(T::ZERO);
            d_v.fill(T::ZERO);
            for head in kv_head * layout.group()..(kv_head + 1) * layout.group() {
                for first in (first_key..sequence).step_by(TILE) {
                    // Starts do not descend: from here on nobody sees these keys.
                    let first_seen = documents.start(b * sequence + first);
                    if first_seen >= first_key + keys {
                        break;
                    }
                    let first_tile = first_seen / TILE * TILE;
                    let rows = TILE.min(sequence - first);
                    let q = &qkv[token(first) + layout.q(head)..];
                    let d_out = &group.d_out[(b * sequence + first) * out_columns + head * d..];
                    let statistics = (b * layout.heads.heads + head) * sequence + first;
                    let log_sum_exp = &group.log_sum_exp[statistics..][..rows];
                    let delta = &group.delta[statistics..][..rows];

                    for band in bands(rows) {
                        let reach = keys.min(first + band.end - first_key);
                        let in_tile = band.start * TILE..band.end * TILE;
                        let (p, d_s) = (&mut p[in_tile.clone()], &mut d_s[in_tile]);
                        let scores = TileProduct {
                            m: band.len(),
                            n: reach,
                            k: d,
                            a_row: layout.columns,
                            a_column: 1,
                            b_row: TILE,
                            c_row: TILE,
                            accumulate: false,
                        };
                        T::tile_product(scores, &q[band.start * layout.columns..], &k_transposed, p);
                        let of_values = TileProduct { a_row: out_columns, ..scores };
                        T::tile_product(
                            of_values,
                            &d_out[band.start * out_columns..],
                            &v_transposed,
                            d_s,
                        );
                        let tiles = p.chunks_exact_mut(TILE).zip(d_s.chunks_exact_mut(TILE));
                        for (row, (p, d_s)) in band.clone().zip(tiles) {
                            let end = reach.min(first + row + 1 - first_key);
                            let start = documents.start(b * sequence + first + row);
                            let start = start.saturating_sub(first_key).min(end);
                            let (p, d_s) = (&mut p[..reach], &mut d_s[..reach]);
                            let (log_sum_exp, delta) = (log_sum_exp[row], delta[row]);
                            for_each_pair(p, d_s, |p, d_s| {
                                *p = (*p * scale - log_sum_exp).exp();
                                *d_s = *p * (*d_s - delta) * scale;
                            });
                            for hidden in [0..start, end..reach] {
                                p[hidden.clone()].fill(T::ZERO);
                                d_s[hidden].fill(T::ZERO);
                            }
                        }
                        // [queries,D] = [queries,keys] [keys,D]
                        let to_queries = TileProduct {
                            m: band.len(),
                            n: d,
                            k: reach,
                            a_row: TILE,
                            a_column: 1,
                            b_row: layout.columns,
                            c_row: d,
                            accumulate: false,
                        };
                        T::tile_product(to_queries, d_s, k, &mut d_q);
                        for (row, d_q) in band.zip(d_q.chunks_exact_mut(d)) {
                            let at = b * sequence + first + row;
                            // SAFETY: tasks have different sequences or kv heads (see the caller);
                            // this is the task's one slice that is alive.
                            let to = unsafe { d_qkv.row(at, layout.q(head), d) };
                            if first_key == first_tile {
                                to.copy_from_slice(d_q);
                            } else {
                                for_each_pair(to, d_q, |to, d_q| *to += *d_q);
                            }
                        }
                    }
                    for band in bands(keys) {
                        // The first query that sees one of these keys.
                        let query = (first_key + band.start).saturating_sub(first);
                        if query >= rows {
                            break;
                        }
                        // [keys,D] += [queries,keys]^T [queries,D]
                        let to_keys = TileProduct {
                            m: band.len(),
                            n: d,
                            k: rows - query,
                            a_row: 1,
                            a_column: TILE,
                            b_row: out_columns,
                            c_row: d,
                            accumulate: true,
                        };
                        let seen = query * TILE + band.start;
                        let (d_v, d_k) = (&mut d_v[band.start * d..], &mut d_k[band.start * d..]);
                        T::tile_product(to_keys, &p[seen..], &d_out[query * out_columns..], d_v);
                        let to_keys = TileProduct { b_row: layout.columns, ..to_keys };
                        T::tile_product(to_keys, &d_s[seen..], &q[query * layout.columns..], d_k);
                    }
                }
            }
            for row in 0..keys {
                let at = b * sequence + first_key + row;
                // SAFETY: as above; one slice after the other.
                unsafe {
                    d_qkv.row(at, layout.k(kv_head), d).copy_from_slice(&d_k[row * d..][..d]);
                    d_qkv.row(at, layout.v(kv_head), d).copy_from_slice(&d_v[row * d..][..d]);
                }
            }
        }
    }
}
