//! Causal attention with grouped heads, forward and backward.

use super::Request;
use super::cost::{Cost, element_bytes};
use super::report::Row;
use super::sizes;
use super::timing::{Copies, on_cpu, samples};
use crate::backend::{AttentionSpec, HeadSpec};
use crate::cuda::attention::{Attention, AttentionBackward, AttentionForward};
use crate::cuda::{Driver, StreamId};
use crate::error::Result;

/// B, S, H, K, D of models of about 1B parameters: 2048 values in heads of 64 and of 128, 8192
/// tokens.
const ON_GPU: [[usize; 5]; 3] = [[4, 2048, 32, 8, 64], [2, 4096, 32, 8, 64], [4, 2048, 16, 4, 128]];
const ON_CPU: [usize; 5] = [1, 128, 4, 2, 64];

pub(super) fn rows(driver: &mut dyn Driver, request: &Request) -> Result<Vec<Row>> {
    let shapes = match request.attention {
        Some(shape) => vec![shape],
        None if on_cpu(driver) => vec![ON_CPU],
        None => ON_GPU.to_vec(),
    };
    let mut table = vec![];
    for shape in shapes {
        table.extend(pair(driver, request, shape)?);
    }
    Ok(table)
}

fn pair(
    driver: &mut dyn Driver,
    request: &Request,
    [batch, sequence, heads, kv_heads, head_dim]: [usize; 5],
) -> Result<[Row; 2]> {
    sizes::check("attention (B, S, H, K, D)", &[batch, sequence, heads, kv_heads, head_dim])?;
    // Scores are never stored, but their products are counted.
    sizes::check("attention to scores", &[batch, heads, sequence, sequence])?;
    let dtype = request.kernel_dtype();
    let heads = HeadSpec { heads, kv_heads, head_dim };
    let spec = AttentionSpec { heads, batch, sequence };
    let mut kernels = Attention::new(driver, dtype, heads, request.family)?;
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
        let forward = kernels.plan_forward(buffers.driver, &forward)?;
        Ok([forward, kernels.plan_backward(buffers.driver, &backward)?])
    })?;
    let samples = samples(driver, request.samples);
    let stream = StreamId::MAIN;
    // Leaves what the backward pass reads.
    let forward =
        copies.time(driver, samples, |driver, [forward, _]| forward.launch(driver, stream))?;
    let backward =
        copies.time(driver, samples, |driver, [_, backward]| backward.launch(driver, stream))?;
    let mut names = vec![];
    for plan in &copies.copies[0] {
        names.push(plan.kernels(driver)?.join(" and "));
    }
    copies.release(driver)?;
    kernels.release(driver)?;
    let row = |name: &str, cost: Cost, timing| {
        Row::new(Cost { what: format!("{name}, {dtype}"), ..cost }, timing)
    };
    Ok([
        row(&names[0], Cost::attention_forward(spec, dtype), &forward),
        row(&names[1], Cost::attention_backward(spec, dtype), &backward),
    ])
}
