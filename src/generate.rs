//! Text from a model: a key-value cache, and temperature, top-k and top-p sampling.
//!
//! The prompt runs through in chunks of 64 tokens, everything after it token by token. Nothing is
//! allocated once a [`Decoder`] exists.

use crate::backend::Backend;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::parameters::ParameterTable;
use crate::random::Philox;
use crate::model::{DecodeTape, RotaryInputs, record_decode, rotary_table};
use crate::tape::{BoundProgram, External, Program, Purpose, ValueId};
use crate::tensor::{BufferId, Kind, Shape, View};

/// The random stream of sampling, apart from those of the parameters.
const SAMPLING_STREAM: u64 = 1 << 40;

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
        backend: &impl Backend,
    ) -> Result<Self> {
        let record = |count: usize| -> Result<Recorded> {
            let DecodeTape { tape, tokens, rotary, logits } =
                record_decode(config, table, count, context)?;
            let program = Program::new(tape, Purpose::Inference, &[logits], |kind| {
                backend.element_bytes(kind)
            })?;
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
            cache_bytes: cache.elements() * backend.element_bytes(Kind::Activation),
        })
    }

    pub fn bytes(&self) -> usize {
        let arenas = self.chunk.program.arena_bytes() + self.single.program.arena_bytes();
        self.caches * self.cache_bytes + arenas
    }

    /// `parameters` is the flat buffer on `backend`.
    pub fn allocate(self, parameters: View, backend: &mut impl Backend) -> Result<Decoder> {
        let caches: Vec<BufferId> = (0..self.caches)
            .map(|_| backend.allocate("key-value cache", self.cache_bytes))
            .collect::<Result<_>>()?;
        let statistic = backend.element_bytes(Kind::Statistic);
        let external = |external| match external {
            External::Parameter(i) => self.table.entries()[i].view(parameters, statistic),
            External::Cache(i) => View {
                buffer: caches[i],
                offset: 0,
                kind: Kind::Activation,
                shape: self.cache,
            },
            External::ParameterGradient(_) => unreachable!("decoding has no gradients"),
        };
        let mut bind = |recorded: Recorded| -> Result<Forward> {
            let Recorded { program, tokens, rotary, logits, count } = recorded;
            let arena = backend.allocate("activations", program.arena_bytes())?;
            let program = program.bind(arena, external);
            backend.write(program.view(rotary.table), &self.rotary)?;
            Ok(Forward { program, tokens, rotary, logits, count })
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

    /// Appends `tokens` (at least one) and returns the logits [V] behind the last of them.
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
            let forward = if rest.len() >= self.chunk.count { &self.chunk } else { &self.single };
            let (now, later) = rest.split_at(forward.count);
            let ids: Vec<i32> = now.iter().map(|&token| token as i32).collect();
            let start = self.length as i32;
            let positions: Vec<i32> = (start..start + forward.count as i32).collect();
            backend.write_index(forward.program.view(forward.tokens), &ids)?;
            backend.write_index(forward.program.view(forward.rotary.positions), &positions)?;
            forward.program.run(backend)?;
            if later.is_empty() {
                let all = forward.program.view(forward.logits);
                let row = self.vocab * backend.element_bytes(all.kind);
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

/// How the next token is chosen from the logits.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampling {
    /// 0: always the likeliest token.
    pub temperature: f64,
    /// Only the k likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1: all. Holtzman et al.
    /// 2020, section 3.1.
    pub top_p: f64,
    pub seed: u64,
}

impl Sampling {
    pub fn validate(&self) -> Result<()> {
        let error = |what: String, remedy: &str| {
            Err(Error::Usage { what, remedy: remedy.to_string() })
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return error(
                format!("--temperature is {}", self.temperature),
                "give 0 (greedy) or a positive number such as 0.8",
            );
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return error(format!("--top-p is {}", self.top_p), "give a number in (0, 1]");
        }
        Ok(())
    }

    /// The token at `index` of its sequence; ties go to the lower id. Each index has a random
    /// number of its own.
    pub fn choose(&self, logits: &[f32], index: u64) -> u32 {
        let by_logit = |&a: &u32, &b: &u32| {
            logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
        };
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        if self.temperature == 0.0 {
            return ids.into_iter().min_by(by_logit).unwrap_or(0);
        }
        ids.sort_unstable_by(by_logit);
        if self.top_k > 0 {
            ids.truncate(self.top_k);
        }
        let highest = logits[ids[0] as usize] as f64;
        let weight = |id: u32| ((logits[id as usize] as f64 - highest) / self.temperature).exp();
        let mut weights: Vec<f64> = ids.iter().map(|&id| weight(id)).collect();
        let total: f64 = weights.iter().sum();
        let mut sum = 0.0;
        let kept = weights.iter().position(|weight| {
            sum += weight;
            sum >= self.top_p * total
        });
        weights.truncate(kept.map_or(weights.len(), |last| last + 1));
        let total: f64 = weights.iter().sum();
        let mut left = Philox::new(self.seed, SAMPLING_STREAM).uniform_f64(index) * total;
        for (&id, &weight) in ids.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        ids[weights.len() - 1]
    }
}

/// Continues `prompt` by at most `count` tokens and gives each to `show` as it comes; stops behind
/// `end`, at the end of the context, or when `show` returns false. Returns the new tokens.
pub fn generate(
    decoder: &mut Decoder,
    prompt: &[u32],
    count: usize,
    sampling: &Sampling,
    end: Option<u32>,
    backend: &mut impl Backend,
    mut show: impl FnMut(u32) -> Result<bool>,
) -> Result<Vec<u32>> {
    decoder.clear();
    let mut tokens = Vec::with_capacity(count);
    let mut next = prompt.to_vec();
    while tokens.len() < count && decoder.room() >= next.len() {
        let logits = decoder.push(&next, backend)?;
        let token = sampling.choose(logits, tokens.len() as u64);
        if Some(token) == end {
            break;
        }
        tokens.push(token);
        if !show(token)? {
            break;
        }
        next = vec![token];
    }
    Ok(tokens)
}
