//! The LLaMA in pieces, each on a tape of its own: the embedding, every block, the head.
//!
//! Run one after the other over the same residual stream they compute what [`super::record_loss`]
//! computes, op for op; whoever runs them can look at the stream between two blocks, leave a block
//! out, or differentiate one alone. Blocks keep their number, and with it their depth scale.

use super::{Recorder, RotaryInputs, block};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::parameters::ParameterTable;
use crate::tape::{Tape, ValueId};

/// tokens -> residual stream before the first block.
pub struct EmbeddingTape {
    pub tape: Tape,
    /// [T] token ids
    pub tokens: ValueId,
    /// [T,C]
    pub out: ValueId,
}

/// Residual stream before a block -> after it.
pub struct BlockTape {
    pub tape: Tape,
    /// [T,C]
    pub inp: ValueId,
    pub rotary: RotaryInputs,
    /// [T,C]
    pub out: ValueId,
}

/// Residual stream after the last block -> losses, by way of the final norm.
pub struct HeadTape {
    pub tape: Tape,
    /// [T,C]
    pub inp: ValueId,
    /// [T] token ids, or IGNORE_INDEX
    pub targets: ValueId,
    /// [1]; a gradient is that of scale * sum(losses)
    pub scale: ValueId,
    /// [T]
    pub losses: ValueId,
}

pub fn record_embedding(
    config: &ModelConfig,
    table: &ParameterTable,
    tokens: usize,
) -> Result<EmbeddingTape> {
    let mut recorder = Recorder::new(config, table);
    let ids = recorder.tape.index_input("tokens", &[tokens]);
    let out = recorder.embed(ids)?;
    Ok(EmbeddingTape { tape: recorder.tape, tokens: ids, out })
}

/// `layer` counts from 1; B rows of S tokens.
pub fn record_block(
    config: &ModelConfig,
    table: &ParameterTable,
    layer: usize,
    [batch, sequence]: [usize; 2],
) -> Result<BlockTape> {
    let mut recorder = Recorder::new(config, table);
    let t = batch * sequence;
    let inp = recorder.tape.activation_input("residual stream", &[t, config.hidden]);
    let rotary = recorder.rotary_inputs(t, sequence);
    let attention = block::Attention::Whole { rotary, batch, sequence, document_starts: None };
    let out = block::record(&mut recorder, layer, inp, &attention)?;
    Ok(BlockTape { tape: recorder.tape, inp, rotary, out })
}

/// `logits`: see [`Tape::hold_logits`], `None` for the tape's own number.
pub fn record_head(
    config: &ModelConfig,
    table: &ParameterTable,
    tokens: usize,
    logits: Option<usize>,
) -> Result<HeadTape> {
    let mut recorder = Recorder::new(config, table);
    if let Some(elements) = logits {
        recorder.tape.hold_logits(elements);
    }
    let inp = recorder.tape.activation_input("residual stream", &[tokens, config.hidden]);
    let targets = recorder.tape.index_input("targets", &[tokens]);
    let scale = recorder.tape.input("loss scale", &[1]);
    let out = recorder.final_norm(inp)?;
    let losses = recorder.losses(out, targets, scale, 0.0)?;
    Ok(HeadTape { tape: recorder.tape, inp, targets, scale, losses })
}
