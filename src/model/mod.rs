//! The LLaMA, recorded on the tape: RMSNorm, rotary attention with grouped kv heads, SwiGLU, no
//! biases. Touvron et al. 2023.
//!
//! Where norms stand and what scales them is decided in [`placement`] alone.

pub mod block;
pub mod init;
pub mod parameters;
pub mod pieces;
pub mod placement;

use crate::backend::{HeadSpec, NormSpec};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::parameters::{ParameterId, ParameterTable};
use crate::tape::{External, Tape, ValueId};
use crate::tensor::Kind;

/// A forward pass with a loss over [B,S] tokens.
pub struct LossTape {
    pub tape: Tape,
    /// [T] token ids
    pub tokens: ValueId,
    /// [T] token ids, or IGNORE_INDEX
    pub targets: ValueId,
    /// [1]; training differentiates scale * sum(losses)
    pub scale: ValueId,
    pub rotary: RotaryInputs,
    /// [T] where each token's document begins in its row; `None`: at its beginning.
    pub document_starts: Option<ValueId>,
    /// [T]
    pub losses: ValueId,
}

/// A forward pass over the next tokens of one sequence, whose past is in a cache.
pub struct DecodeTape {
    pub tape: Tape,
    /// [T] token ids
    pub tokens: ValueId,
    pub rotary: RotaryInputs,
    /// [T,V]
    pub logits: ValueId,
}

#[derive(Clone, Copy, Debug)]
pub struct RotaryInputs {
    /// [P,D], see [`rotary_table`]
    pub table: ValueId,
    /// [T]
    pub positions: ValueId,
}

/// Keys of layer l (from 1) are cache 2 (l - 1), its values the one after it.
pub fn cache_index(layer: usize) -> (usize, usize) {
    (2 * (layer - 1), 2 * (layer - 1) + 1)
}

pub fn heads(config: &ModelConfig) -> HeadSpec {
    HeadSpec { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim() }
}

/// [positions, head_dim]: cos(p theta^(-2i/D)) for i < D/2, then the sines; Su et al. 2021,
/// equation 15. Computed in f64, rounded once.
pub fn rotary_table(config: &ModelConfig, positions: usize) -> Vec<f32> {
    let half = config.head_dim() / 2;
    let angle = |position: usize, i: usize| {
        position as f64 * config.rope_theta.powf(-(i as f64) / half as f64)
    };
    (0..positions)
        .flat_map(|p| {
            let cosines = (0..half).map(move |i| angle(p, i).cos() as f32);
            cosines.chain((0..half).map(move |i| angle(p, i).sin() as f32))
        })
        .collect()
}

/// Records parameters on a tape, each once.
pub(crate) struct Recorder<'a> {
    pub tape: Tape,
    pub config: &'a ModelConfig,
    pub table: &'a ParameterTable,
    values: Vec<Option<ValueId>>,
}

impl<'a> Recorder<'a> {
    fn new(config: &'a ModelConfig, table: &'a ParameterTable) -> Self {
        let values = vec![None; table.entries().len()];
        Recorder { tape: Tape::new(), config, table, values }
    }

    /// The tape's value for a parameter: gains are statistics, matrices are matmul operands.
    pub(crate) fn parameter(&mut self, id: ParameterId) -> ValueId {
        let shape = self.table.get(id).stored;
        let kind = if shape.sizes().len() == 1 { Kind::Statistic } else { Kind::Activation };
        let tape = &mut self.tape;
        *self.values[id.0].get_or_insert_with(|| {
            tape.external("parameter", shape.sizes(), kind, External::Parameter(id.0))
        })
    }

    /// The norm of inp / sqrt(input_depth) whose gain is parameter `id`, scaled with that
    /// parameter's depth.
    pub(crate) fn norm(
        &mut self,
        stream: ValueId,
        id: ParameterId,
        input_depth: usize,
    ) -> Result<ValueId> {
        let depth = self.table.get(id).depth;
        // x/r / sqrt(var(x)/r^2 + eps) = x / sqrt(var(x) + r^2 eps), with r^2 = input_depth.
        let eps = self.config.norm_eps * input_depth as f64;
        let spec = NormSpec { kind: self.config.norm, eps, depth };
        let gain = self.parameter(id);
        self.tape.norm(spec, stream, gain)
    }

    fn rotary_inputs(&mut self, tokens: usize, positions: usize) -> RotaryInputs {
        let head_dim = self.config.head_dim();
        RotaryInputs {
            table: self.tape.input("rotary table", &[positions, head_dim]),
            positions: self.tape.index_input("positions", &[tokens]),
        }
    }

    /// tokens [T] -> residual stream [T,C]
    fn embed(&mut self, tokens: ValueId) -> Result<ValueId> {
        let embedding = self.parameter(self.table.embedding());
        self.tape.embedding(tokens, embedding)
    }

    /// tokens [T] -> final norm [T,C]
    fn body(&mut self, tokens: ValueId, attention: &block::Attention) -> Result<ValueId> {
        let mut stream = self.embed(tokens)?;
        for layer in 1..=self.config.layers {
            self.tape.begin_block(layer);
            stream = block::record(self, layer, stream, attention)?;
            self.tape.end_block();
        }
        self.final_norm(stream)
    }

    fn final_norm(&mut self, stream: ValueId) -> Result<ValueId> {
        self.norm(stream, self.table.final_norm(), 1)
    }

    /// final norm [T,C] -> losses [T]
    fn losses(
        &mut self,
        out: ValueId,
        targets: ValueId,
        scale: ValueId,
        z_loss: f64,
    ) -> Result<ValueId> {
        let head = self.parameter(self.table.head());
        self.tape.cross_entropy(out, head, targets, scale, self.config.vocab, z_loss)
    }
}

/// Records the loss of `batch` rows of `sequence` tokens, with `documents` such that tokens attend
/// to their own document alone; `logits`: see [`Tape::hold_logits`], `None` for the tape's own
/// number.
pub fn record_loss(
    config: &ModelConfig,
    table: &ParameterTable,
    batch: usize,
    sequence: usize,
    documents: bool,
    z_loss: f64,
    logits: Option<usize>,
) -> Result<LossTape> {
    let t = batch * sequence;
    let mut recorder = Recorder::new(config, table);
    if let Some(elements) = logits {
        recorder.tape.hold_logits(elements);
    }
    let tokens = recorder.tape.index_input("tokens", &[t]);
    let targets = recorder.tape.index_input("targets", &[t]);
    let scale = recorder.tape.input("loss scale", &[1]);
    let rotary = recorder.rotary_inputs(t, sequence);
    let document_starts = documents.then(|| recorder.tape.index_input("document starts", &[t]));
    let attention = block::Attention::Whole { rotary, batch, sequence, document_starts };
    let out = recorder.body(tokens, &attention)?;
    let losses = recorder.losses(out, targets, scale, z_loss)?;
    Ok(LossTape { tape: recorder.tape, tokens, targets, scale, rotary, document_starts, losses })
}

/// Records the logits of the next `tokens` tokens of a sequence of at most `context`.
pub fn record_decode(
    config: &ModelConfig,
    table: &ParameterTable,
    tokens: usize,
    context: usize,
) -> Result<DecodeTape> {
    let mut recorder = Recorder::new(config, table);
    let inp = recorder.tape.index_input("tokens", &[tokens]);
    let rotary = recorder.rotary_inputs(tokens, context);
    let out = recorder.body(inp, &block::Attention::Cached { rotary, context })?;
    let head = recorder.parameter(table.head());
    let logits = recorder.tape.linear("logits", out, head, None)?;
    Ok(DecodeTape { tape: recorder.tape, tokens: inp, rotary, logits })
}
