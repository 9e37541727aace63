//! One block of the model: the one place that knows where norms stand.

use super::{Recorder, RotaryInputs, cache_index, heads};
use crate::backend::AttentionSpec;
use crate::config::Placement;
use crate::error::Result;
use crate::tape::{External, ValueId};
use crate::tensor::Kind;

/// What the block's queries attend to.
pub(crate) enum Attention {
    /// Whole rows: [B,S] tokens at once.
    Whole { rotary: RotaryInputs, batch: usize, sequence: usize },
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
    let parameters = recorder.table.block(layer);
    match recorder.config.placement {
        // x + f(norm(x) / sqrt(depth)); the parameter table knows the depth, 1 for `pre`.
        Placement::Pre | Placement::Lns => {
            let inp = recorder.norm(stream, parameters.attention_norm)?;
            let weight = recorder.parameter(parameters.qkv);
            let qkv = recorder.tape.linear("qkv", inp, weight, None)?;
            let out = attend(recorder, layer, qkv, attention)?;
            let weight = recorder.parameter(parameters.attention_out);
            let stream = recorder.tape.linear("residual stream", out, weight, Some(stream))?;

            let inp = recorder.norm(stream, parameters.ffn_norm)?;
            let weight = recorder.parameter(parameters.gate_up);
            let gate_up = recorder.tape.linear("gate and up", inp, weight, None)?;
            let out = recorder.tape.swiglu(gate_up)?;
            let weight = recorder.parameter(parameters.down);
            recorder.tape.linear("residual stream", out, weight, Some(stream))
        }
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
        Attention::Whole { rotary, batch, sequence } => {
            tape.rotary(heads, rotary.table, rotary.positions, qkv)?;
            tape.attention(AttentionSpec { heads, batch, sequence }, qkv)
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
