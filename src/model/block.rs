//! One block of the model, recorded in the form that its placement has.

use super::parameters::{BlockParameters, BranchParameters};
use super::placement::{BlockForm, NormForm, Order, block_form};
use super::{Recorder, RotaryInputs, cache_index, heads};
use crate::backend::{AttentionSpec, ResidualSpec};
use crate::error::Result;
use crate::tape::{External, ValueId};
use crate::tensor::Kind;

/// What the block's queries attend to.
pub(crate) enum Attention {
    /// Whole rows: [B,S] tokens at once; with `document_starts` [T], documents by themselves.
    Whole { rotary: RotaryInputs, batch: usize, sequence: usize, document_starts: Option<ValueId> },
    /// One sequence, its past in a cache of `context` positions.
    Cached { rotary: RotaryInputs, context: usize },
}

/// residual stream [T,C] -> residual stream [T,C]; `layer` counts from 1.
pub(crate) fn record(
    recorder: &mut Recorder,
    layer: usize,
    stream: ValueId,
    attention: &Attention,
) -> Result<ValueId> {
    let form = block_form(recorder.config, layer);
    let BlockParameters { attention: around, qkv, ffn, gate_up } = recorder.table.block(layer);
    let stream =
        add_branch(recorder, &form, form.attention_norm, around, stream, |recorder, inp| {
            let weight = recorder.parameter(qkv);
            let qkv = recorder.tape.linear("qkv", inp, weight, None)?;
            attend(recorder, layer, qkv, attention)
        })?;
    add_branch(recorder, &form, form.ffn_norm, ffn, stream, |recorder, inp| {
        let weight = recorder.parameter(gate_up);
        let gate_up = recorder.tape.linear("gate and up", inp, weight, None)?;
        recorder.tape.swiglu(gate_up)
    })
}

/// Adds one branch to the stream. `inner` is the branch without the projection out of it.
fn add_branch(
    recorder: &mut Recorder,
    form: &BlockForm,
    norm: NormForm,
    parameters: BranchParameters,
    stream: ValueId,
    inner: impl FnOnce(&mut Recorder, ValueId) -> Result<ValueId>,
) -> Result<ValueId> {
    let inp = match form.order {
        Order::Pre | Order::Sandwich => recorder.norm(stream, parameters.norm, norm.input_depth)?,
        Order::Post => stream,
    };
    let inner = inner(recorder, inp)?;
    let weight = recorder.parameter(parameters.out);
    let sum = if form.order != Order::Sandwich && form.sum.is_plain() {
        recorder.tape.linear("residual stream", inner, weight, Some(stream))?
    } else {
        let mut branch = recorder.tape.linear("branch", inner, weight, None)?;
        if let Some(out_norm) = parameters.out_norm {
            branch = recorder.norm(branch, out_norm, 1)?;
        }
        let gain = parameters.gain.map(|id| recorder.parameter(id));
        let spec = ResidualSpec {
            stream_scale: form.sum.stream_scale,
            branch_scale: form.sum.branch_scale,
        };
        recorder.tape.scaled_residual(spec, branch, stream, gain)?
    };
    match form.order {
        Order::Pre | Order::Sandwich => Ok(sum),
        Order::Post => recorder.norm(sum, parameters.norm, norm.input_depth),
    }
}

fn attend(
    recorder: &mut Recorder,
    layer: usize,
    qkv: ValueId,
    attention: &Attention,
) -> Result<ValueId> {
    let heads = heads(recorder.config);
    let tape = &mut recorder.tape;
    match *attention {
        Attention::Whole { rotary, batch, sequence, document_starts } => {
            // Rotated by the position in the row: scores depend on differences alone.
            tape.rotary(heads, rotary.table, rotary.positions, qkv)?;
            tape.attention(AttentionSpec { heads, batch, sequence }, qkv, document_starts)
        }
        Attention::Cached { rotary, context } => {
            tape.rotary(heads, rotary.table, rotary.positions, qkv)?;
            let sizes = [context, heads.kv_heads * heads.head_dim];
            let (keys, values) = cache_index(layer);
            let keys = tape.external("keys", &sizes, Kind::Activation, External::Cache(keys));
            let values = tape.external("values", &sizes, Kind::Activation, External::Cache(values));
            tape.cached_attention(heads, qkv, keys, values, rotary.positions)
        }
    }
}
