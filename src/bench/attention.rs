//! Causal attention with grouped heads, forward and backward.

use super::Options;
use super::report::{Row, TimedRows};
use super::sizes;
use super::timing::{Copies, on_cpu, samples};
use crate::backend::{AttentionSpec, HeadSpec};
use crate::cuda::attention::{
    Attention, AttentionBackward, AttentionForward, AttentionPlan, Passes,
};
use crate::cuda::{Driver, Family, StreamId};
use crate::error::Result;
use crate::predict::cost::{Cost, element_bytes};

/// `None`: what suits the machine.
#[derive(Clone, Default, Debug)]
pub struct AttentionRequest {
    /// B, S, H, K, D
    pub shape: Option<[usize; 5]>,
    /// `None`: the best of the machine.
    pub family: Option<Family>,
}

/// Tokens of every pass over heads of the same width in the table below, whatever their sequence;
/// and values of a token's heads.
const TOKENS: usize = 16 << 10;
const VALUES: usize = 2048;
/// The goal's lengths first.
const SEQUENCES: [usize; 6] = [2048, 4096, 8192, 256, 512, 1024];
const HEAD_DIMS: [usize; 2] = [128, 64];
/// B, S, H, K, D of the 130m preset, 65,536 tokens in rows of 256; and of a model of about 1B
/// parameters whose heads share keys and values.
const OF_MODELS: [[usize; 5]; 2] = [[256, 256, 12, 12, 64], [8, 2048, 32, 8, 64]];
const ON_CPU: [usize; 5] = [1, 128, 4, 2, 64];

/// Every length with every head dim, as others' tables have it: each head has its own keys.
fn on_gpu() -> Vec<[usize; 5]> {
    let of = |sequence: usize| {
        HEAD_DIMS.map(|head_dim| {
            let heads = VALUES / head_dim;
            [TOKENS / sequence, sequence, heads, heads, head_dim]
        })
    };
    SEQUENCES.into_iter().flat_map(of).chain(OF_MODELS).collect()
}

pub(super) fn rows(
    driver: &mut dyn Driver,
    request: &AttentionRequest,
    options: Options,
    table: &mut TimedRows,
) -> Result<()> {
    let shapes = match request.shape {
        Some(shape) => vec![shape],
        None if on_cpu(driver) => vec![ON_CPU],
        None => on_gpu(),
    };
    let family = request.family;
    shapes.into_iter().try_for_each(|shape| rows_of(driver, family, options, shape, table))
}

/// Forward; backward in every way that there are kernels for; and both, one after the other,
/// backward in the way that a training step takes.
fn rows_of(
    driver: &mut dyn Driver,
    family: Option<Family>,
    options: Options,
    [batch, sequence, heads, kv_heads, head_dim]: [usize; 5],
    table: &mut TimedRows,
) -> Result<()> {
    sizes::check("attention (B, S, H, K, D)", &[batch, sequence, heads, kv_heads, head_dim])?;
    // Scores are never stored, but their products are counted.
    sizes::check("attention to scores", &[batch, heads, sequence, sequence])?;
    let dtype = options.kernel_dtype();
    let heads = HeadSpec { heads, kv_heads, head_dim };
    let spec = AttentionSpec { heads, batch, sequence };
    let mut chosen = Attention::new(driver, dtype, heads, family)?;
    let mut ways = vec![];
    for passes in chosen.all_passes(spec) {
        let kernels = chosen.clone().with_passes(passes)?;
        ways.push((kernels.clone(), ""));
        if passes == Passes::One {
            ways.push((kernels.with_deterministic(false), ", sums in any order"));
        }
    }
    let tokens = batch * sequence;
    let qkv_values = tokens * heads.qkv_columns();
    let out_values = tokens * heads.heads * head_dim;
    let [qkv_bytes, out_bytes] =
        [qkv_values, out_values].map(|it| it as u64 * element_bytes(dtype));
    let row_bytes = 4 * (tokens * heads.heads) as u64;
    let forward_bytes = qkv_bytes + out_bytes + row_bytes;
    let copies = Copies::new(driver, forward_bytes, 2 * forward_bytes, |buffers| {
        let forward = AttentionForward {
            spec,
            qkv: buffers.normals("qkv", dtype, qkv_values)?,
            document_starts: None,
            out: buffers.zeros("out", out_bytes)?,
            log_sum_exp: buffers.zeros("log-sum-exp", row_bytes)?,
        };
        let backward = AttentionBackward {
            forward,
            d_out: buffers.normals("d_out", dtype, out_values)?,
            delta: buffers.zeros("delta", row_bytes)?,
            d_qkv: buffers.zeros("d_qkv", qkv_bytes)?,
            angles: None,
        };
        let both = [
            chosen.plan_forward(buffers.driver, &forward)?,
            chosen.plan_backward(buffers.driver, &backward)?,
        ];
        // Forward first: it leaves what the backward passes read.
        let mut timed = vec![Timed { plans: vec![both[0].clone()], how: "" }];
        for (kernels, how) in &mut ways {
            let plan = kernels.plan_backward(buffers.driver, &backward)?;
            timed.push(Timed { plans: vec![plan], how });
        }
        timed.push(Timed { plans: both.to_vec(), how: "" });
        Ok(timed)
    })?;
    let samples = samples(driver, options.samples);
    for index in 0..copies.copies[0].len() {
        let launch = |driver: &mut dyn Driver, timed: &Vec<Timed>| {
            timed[index].plans.iter().try_for_each(|plan| plan.launch(driver, StreamId::MAIN))
        };
        let timing = copies.time(driver, samples, launch)?;
        let Timed { plans, how } = &copies.copies[0][index];
        let kernels = plans.iter().map(|plan| plan.kernels(driver));
        let names = kernels.collect::<Result<Vec<_>>>()?.concat().join(" and ");
        let (cost, variant) = match plans.as_slice() {
            [_, backward] => (Cost::attention(spec, dtype), variant(backward)),
            [plan] if plan.passes().is_none() => {
                (Cost::attention_forward(spec, dtype), variant(plan))
            }
            plans => (Cost::attention_backward(spec, dtype), variant(&plans[0])),
        };
        let what = format!("{names}{how}, {dtype}");
        table.push(Row { variant, ..Row::new(Cost { what, ..cost }, &timing) });
    }
    copies.release(driver)?;
    chosen.release(driver)?;
    ways.into_iter().try_for_each(|(kernels, _)| kernels.release(driver))
}

/// Passes that are launched one after the other, and what else tells them apart.
struct Timed {
    plans: Vec<AttentionPlan>,
    how: &'static str,
}

/// How a backward pass goes over the scores, in words.
fn variant(plan: &AttentionPlan) -> Option<&'static str> {
    plan.passes().map(|passes| match passes {
        Passes::Short => "one pass of short rows",
        Passes::One => "one pass",
        Passes::Two => "two passes",
    })
}
