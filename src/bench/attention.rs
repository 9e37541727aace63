//! Causal attention with grouped heads, forward and backward.

use super::Request;
use super::cost::{Cost, element_bytes};
use super::report::{Row, TimedRows};
use super::sizes;
use super::timing::{Copies, on_cpu, samples};
use crate::backend::{AttentionSpec, HeadSpec};
use crate::cuda::attention::{
    Attention, AttentionBackward, AttentionForward, AttentionPlan, Passes,
};
use crate::cuda::{Driver, StreamId};
use crate::error::Result;

/// B, S, H, K, D of models of about 1B parameters: 2048 values in heads of 64 and of 128, 8192
/// tokens; and of the 130m preset: 65,536 tokens in rows of 256.
const ON_GPU: [[usize; 5]; 4] =
    [[4, 2048, 32, 8, 64], [2, 4096, 32, 8, 64], [4, 2048, 16, 4, 128], [256, 256, 12, 12, 64]];
const ON_CPU: [usize; 5] = [1, 128, 4, 2, 64];

pub(super) fn rows(
    driver: &mut dyn Driver,
    request: &Request,
    table: &mut TimedRows,
) -> Result<()> {
    let shapes = match request.attention {
        Some(shape) => vec![shape],
        None if on_cpu(driver) => vec![ON_CPU],
        None => ON_GPU.to_vec(),
    };
    shapes.into_iter().try_for_each(|shape| rows_of(driver, request, shape, table))
}

/// Forward, and backward in every way that there are kernels for.
fn rows_of(
    driver: &mut dyn Driver,
    request: &Request,
    [batch, sequence, heads, kv_heads, head_dim]: [usize; 5],
    table: &mut TimedRows,
) -> Result<()> {
    sizes::check("attention (B, S, H, K, D)", &[batch, sequence, heads, kv_heads, head_dim])?;
    // Scores are never stored, but their products are counted.
    sizes::check("attention to scores", &[batch, heads, sequence, sequence])?;
    let dtype = request.kernel_dtype();
    let heads = HeadSpec { heads, kv_heads, head_dim };
    let spec = AttentionSpec { heads, batch, sequence };
    let kernels = Attention::new(driver, dtype, heads, request.family)?;
    let mut variants = vec![];
    for passes in kernels.all_passes(spec) {
        let kernels = kernels.clone().with_passes(passes)?;
        variants.push((kernels.clone(), ""));
        if passes == Passes::One {
            variants.push((kernels.with_order(false), ", sums in any order"));
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
        let mut plans = vec![variants[0].0.plan_forward(buffers.driver, &forward)?];
        for (kernels, _) in &mut variants {
            plans.push(kernels.plan_backward(buffers.driver, &backward)?);
        }
        Ok(plans)
    })?;
    let samples = samples(driver, request.samples);
    // Forward first: it leaves what the backward passes read.
    for index in 0..copies.copies[0].len() {
        let launch = |driver: &mut dyn Driver, plans: &Vec<AttentionPlan>| {
            plans[index].launch(driver, StreamId::MAIN)
        };
        let timing = copies.time(driver, samples, launch)?;
        let names = copies.copies[0][index].kernels(driver)?.join(" and ");
        let (cost, how) = match index {
            0 => (Cost::attention_forward(spec, dtype), ""),
            _ => (Cost::attention_backward(spec, dtype), variants[index - 1].1),
        };
        table.push(Row::new(Cost { what: format!("{names}{how}, {dtype}"), ..cost }, &timing));
    }
    copies.release(driver)?;
    variants.into_iter().try_for_each(|(kernels, _)| kernels.release(driver))
}
