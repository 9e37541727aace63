//! Next-token logits of one growing sequence, its past in a key-value cache.
//!
//! The prompt runs through in chunks of 64 tokens, everything after it token by token. No device
//! memory is allocated once a [`Decoder`] exists.

use super::replay::Replay;
use super::{Parameters, check_available};
use crate::backend::Backend;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::parameters::ParameterTable;
use crate::model::{DecodeTape, RotaryInputs, record_decode, rotary_table};
use crate::tape::{BoundProgram, External, Program, Purpose, ValueId};
use crate::tensor::{BufferId, Kind, Shape, View};

/// Tokens of a prompt that run through the model at once.
const CHUNK: usize = 64;

/// A model's next-token logits over one growing sequence.
pub struct Decoder {
    chunk: Forward,
    single: Forward,
    vocab: usize,
    context: usize,
    /// Tokens in the cache.
    length: usize,
    logits: Vec<f32>,
}

/// A forward pass over a fixed number of tokens.
struct Forward {
    program: BoundProgram,
    replay: Replay,
    tokens: ValueId,
    rotary: RotaryInputs,
    logits: ValueId,
    count: usize,
}

/// What a [`Decoder`] will allocate, known before anything is.
pub struct DecoderPlan {
    table: ParameterTable,
    chunk: Recorded,
    single: Recorded,
    rotary: Vec<f32>,
    vocab: usize,
    context: usize,
    /// [context, K D], two a layer
    cache: Shape,
    caches: usize,
    cache_bytes: usize,
}

/// A forward pass that is not bound to memory yet.
struct Recorded {
    program: Program,
    tokens: ValueId,
    rotary: RotaryInputs,
    logits: ValueId,
    count: usize,
}

impl DecoderPlan {
    /// For sequences of at most `context` tokens, prompt included.
    pub fn new(
        config: &ModelConfig,
        table: &ParameterTable,
        context: usize,
        element_bytes: impl Fn(Kind) -> usize,
    ) -> Result<Self> {
        let record = |count: usize| -> Result<Recorded> {
            let DecodeTape { tape, tokens, rotary, logits } =
                record_decode(config, table, count, context)?;
            let program = Program::new(tape, Purpose::Inference, &[logits], &element_bytes)?;
            Ok(Recorded { program, tokens, rotary, logits, count })
        };
        let cache = Shape::new(&[context, config.kv_heads * config.head_dim()]);
        Ok(DecoderPlan {
            table: table.clone(),
            chunk: record(CHUNK.min(context))?,
            single: record(1)?,
            rotary: rotary_table(config, context),
            vocab: config.vocab,
            context,
            cache,
            caches: 2 * config.layers,
            cache_bytes: cache.elements() * element_bytes(Kind::Activation),
        })
    }

    pub fn bytes(&self) -> usize {
        let arenas = self.chunk.program.arena_bytes() + self.single.program.arena_bytes();
        self.caches * self.cache_bytes + arenas
    }

    /// `parameters` lie on `backend`.
    pub fn allocate(self, parameters: &Parameters, backend: &mut impl Backend) -> Result<Decoder> {
        let parts = [("key-value cache and activations", self.bytes())];
        check_available(&parts, "ask for fewer tokens", backend)?;
        let caches: Vec<BufferId> = (0..self.caches)
            .map(|_| backend.allocate("key-value cache", self.cache_bytes))
            .collect::<Result<_>>()?;
        let external = |external, kind| match external {
            External::Parameter(i) => parameters.view(&self.table.entries()[i], kind),
            External::Cache(i) => {
                View { buffer: caches[i], offset: 0, kind: Kind::Activation, shape: self.cache }
            }
            External::ParameterGradient(_) => unreachable!("decoding has no gradients"),
        };
        let mut bind = |recorded: Recorded| -> Result<Forward> {
            let Recorded { program, tokens, rotary, logits, count } = recorded;
            let arena = backend.allocate("activations of a sample", program.arena_bytes())?;
            let program = program.bind(arena, external);
            program.prepare(backend)?;
            backend.write(program.view(rotary.table), &self.rotary)?;
            let mut replay = Replay::default();
            replay.record(backend, |backend| program.run(backend))?;
            Ok(Forward { program, replay, tokens, rotary, logits, count })
        };
        Ok(Decoder {
            chunk: bind(self.chunk)?,
            single: bind(self.single)?,
            vocab: self.vocab,
            context: self.context,
            length: 0,
            logits: vec![0.0; self.vocab],
        })
    }
}

impl Decoder {
    /// Forgets the sequence.
    pub fn clear(&mut self) {
        self.length = 0;
    }

    /// Tokens that still fit.
    pub fn room(&self) -> usize {
        self.context - self.length
    }

    /// Appends `tokens` (at least one) and returns the logits [V] after the last of them.
    pub fn push(&mut self, tokens: &[u32], backend: &mut impl Backend) -> Result<&[f32]> {
        if tokens.is_empty() || tokens.len() > self.room() {
            return Err(Error::Usage {
                what: format!(
                    "{} tokens are to follow {} in a context of {}",
                    tokens.len(),
                    self.length,
                    self.context
                ),
                remedy: "use a shorter, non-empty prompt or ask for fewer tokens".to_string(),
            });
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.vocab) {
            return Err(Error::Usage {
                what: format!("token {token} in a vocabulary of {}", self.vocab),
                remedy: "use the tokenizer that the model was trained with".to_string(),
            });
        }
        let mut rest = tokens;
        while !rest.is_empty() {
            let whole = rest.len() >= self.chunk.count;
            let forward = if whole { &mut self.chunk } else { &mut self.single };
            let (now, later) = rest.split_at(forward.count);
            let ids: Vec<i32> = now.iter().map(|&token| token as i32).collect();
            let start = self.length as i32;
            let positions: Vec<i32> = (start..start + forward.count as i32).collect();
            backend.write_index(forward.program.view(forward.tokens), &ids)?;
            backend.write_index(forward.program.view(forward.rotary.positions), &positions)?;
            let Forward { program, replay, .. } = forward;
            replay.run(backend, |backend| program.run(backend))?;
            if later.is_empty() {
                let all = forward.program.view(forward.logits);
                let row = all.shape.columns() * backend.element_bytes(all.kind);
                // The padding of the vocabulary stays behind.
                let last = View {
                    offset: all.offset + (forward.count - 1) * row,
                    shape: Shape::new(&[self.vocab]),
                    ..all
                };
                backend.read(last, &mut self.logits)?;
            }
            self.length += forward.count;
            rest = later;
        }
        Ok(&self.logits)
    }
}
