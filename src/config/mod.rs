//! Configuration: what a run is, as one value.
//!
//! Layers, weakest first: the preset's values, the TOML file, `--set key=value` (layers.rs).
//! Unknown keys and wrong values are refused by name. The resolved file is saved with the run and
//! reads back as the same value. A resolved value has the right types and nothing more:
//! [`Config::validate`] says whether it can be trained, [`Config::validate_shape`] whether it
//! can be planned (rules.rs).

pub(crate) mod choice;
mod layers;
pub(crate) mod nearest;
mod presets;
pub(crate) mod rules;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use choice::choice;
pub use presets::{DEFAULT as DEFAULT_PRESET, preset_names};

/// `model.mix_post` of every preset: "Mix-LN", table 3.
pub const DEFAULT_MIX_POST: f64 = 0.25;
/// `model.layer_scale` of every preset.
pub const DEFAULT_LAYER_SCALE: f64 = 1e-4;

/// Entries of the tokenizer `bytes`: 256 bytes and the end of text. No tokenizer has fewer.
pub const BYTE_VOCAB: usize = 257;

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Config {
    pub name: String,
    pub seed: u64,
    pub dtype: Dtype,
    pub device: DeviceKind,
    pub model: ModelConfig,
    pub data: DataConfig,
    pub train: TrainConfig,
    pub optimizer: OptimizerConfig,
    pub checkpoint: CheckpointConfig,
}

impl Config {
    /// Entries of the vocabulary, as far as that is known before the data is read: `None` where
    /// `model.vocab` is 0 and the tokenizer is a file, or none is given.
    pub fn vocab(&self) -> Option<usize> {
        match (self.model.vocab, self.data.tokenizer.as_str()) {
            (0, "bytes") => Some(BYTE_VOCAB),
            (0, tokenizer) => tokenizer.strip_prefix("train:")?.parse().ok(),
            (vocab, _) => Some(vocab),
        }
    }

    /// This configuration with its vocabulary in `model.vocab`; it can be planned.
    ///
    /// Errors: a broken shape rule; a vocabulary that only a tokenizer file knows.
    pub fn with_vocab(&self) -> Result<Config> {
        self.validate_shape()?;
        let vocab = self.vocab().ok_or_else(|| Error::Config {
            what: format!(
                "model.vocab = 0 and data.tokenizer = {:?}: the vocabulary is not known before \
                 the tokenizer is read",
                self.data.tokenizer
            ),
            remedy: "set model.vocab to its number of entries".into(),
        })?;
        let config = Config { model: ModelConfig { vocab, ..self.model.clone() }, ..self.clone() };
        config.model.validate()?;
        Ok(config)
    }

    /// Tokens that an optimizer step reads.
    pub fn tokens_per_step(&self) -> u64 {
        (self.train.micro_batch * self.train.grad_accumulation * self.data.sequence) as u64
    }
}

choice! {
    /// Type of matmul operands and activations, or of what the optimizer stores.
    pub enum Dtype {
        F32 = "f32",
        Bf16 = "bf16",
    }
}

impl Dtype {
    /// Of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }
}

choice! {
    pub enum DeviceKind {
        Auto = "auto",
        Cpu = "cpu",
        Cuda = "cuda",
        Simt = "simt",
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ModelConfig {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    /// Key and value heads; `heads` must be a multiple of it.
    pub kv_heads: usize,
    pub ffn: usize,
    /// Token ids; 0 means "as many as the tokenizer has", and is resolved before training.
    pub vocab: usize,
    /// Longest sequence that generation accepts.
    pub max_sequence: usize,
    pub norm: NormKind,
    pub placement: Placement,
    /// For `lns`.
    pub lns_position: LnsPosition,
    /// Share of the blocks that `mix` makes `post`, rounded to a whole number of blocks.
    pub mix_post: f64,
    /// What the lambda of `layerscale` start from.
    pub layer_scale: f64,
    pub norm_eps: f64,
    pub rope_theta: f64,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    pub init: InitKind,
    /// Standard deviation of the matrices' first values.
    pub init_std: f64,
    /// Standard deviation of the embedding's first values.
    pub embedding_std: f64,
}

impl ModelConfig {
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }
}

choice! {
    pub enum NormKind {
        Rms = "rms",
        /// LayerNorm without bias.
        Layer = "layer",
    }
}

choice! {
    /// Where the norms stand in a block and what scales its branches. x is the residual stream, f
    /// attention or the FFN, N a norm, l the 1-based index of the block, L their number.
    pub enum Placement {
        /// x + f(N(x))
        Pre = "pre",
        /// x + f(N(x) / sqrt(l)): "The Curse of Depth", equation 12. `lns_position` moves the
        /// scale.
        Lns = "lns",
        /// N(x + f(x)): Vaswani et al. 2017.
        Post = "post",
        /// N(alpha x + f(x)), alpha = (2L)^(1/4); the first values of v, o and the FFN are
        /// multiplied by beta = (8L)^(-1/4): Wang et al. 2022, "DeepNet", decoder only.
        Deepnorm = "deepnorm",
        /// The first `mix_post` of the blocks as `post`, the rest as `pre`: Li et al. 2024,
        /// "Mix-LN".
        Mix = "mix",
        /// x + N(f(N(x))): Ding et al. 2021, "CogView".
        Sandwich = "sandwich",
        /// x + diag(lambda) f(N(x)), lambda learnt from `layer_scale` on: Touvron et al. 2021.
        Layerscale = "layerscale",
        /// x + s f(N(x)), s a number learnt from 1/sqrt(L) on: De & Smith 2020, as used in "The
        /// Curse of Depth", section 6.
        Skipinit = "skipinit",
    }
}

choice! {
    /// Where `placement = "lns"` divides by sqrt(l); "The Curse of Depth", table 8.
    pub enum LnsPosition {
        /// The output of both norms: the method.
        AfterNorm = "after-norm",
        /// The input of both norms.
        BeforeNorm = "before-norm",
        /// The output of attention and of the FFN.
        AfterBranch = "after-branch",
        /// The output of the attention's norm only.
        AttentionNorm = "attention-norm",
        /// The output of the FFN's norm only.
        FfnNorm = "ffn-norm",
        /// Nowhere: the gains of both norms start at 1/sqrt(l). The same function at first, trained
        /// otherwise; what the authors' later code does.
        GainInit = "gain-init",
    }
}

choice! {
    /// How the matrices of the blocks get their first values; the head always has N(0, init_std^2).
    pub enum InitKind {
        /// N(0, init_std^2), not scaled with depth.
        Normal = "normal",
        /// Normal, with the output projections of attention and FFN divided by sqrt(2L).
        Scaled = "scaled",
        /// Normal, with the output projections of block l divided by sqrt(2l).
        DepthScaled = "depth-scaled",
        /// N(0, 2 / (rows + columns)): Glorot & Bengio 2010, equation 12; what DeepNet starts from.
        Xavier = "xavier",
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DataConfig {
    /// Text (.txt, .jsonl, also .gz or .zst), shards (.tok, or folders of them), or
    /// `bundled:austen`.
    pub train: Vec<String>,
    /// As `train`; empty: the last `held_out` of `train` is kept out of training.
    pub valid: Vec<String>,
    /// Share of the text that is held out when `valid` is empty.
    pub held_out: f64,
    /// A tokenizer.json, `bytes`, or `train:N`: a byte-level BPE of N entries trained on `train`.
    pub tokenizer: String,
    pub format: Format,
    /// The JSON field of .jsonl files that holds the text, if `format` is `text`.
    pub field: String,
    pub rows: Rows,
    pub attention: Attention,
    /// Tokens in a row.
    pub sequence: usize,
}

impl DataConfig {
    /// Whether rows hold several documents, of which each attends to itself alone.
    pub fn packs_documents(&self) -> bool {
        match self.rows {
            Rows::Packed => self.attention == Attention::Document,
            Rows::Document => false,
        }
    }
}

choice! {
    /// What the files are.
    pub enum Format {
        /// Text, every token of which is predicted.
        Text = "text",
        /// .jsonl files of prompts and answers, of which the answers are predicted.
        Supervised = "supervised",
    }
}

choice! {
    /// How documents become rows of `sequence` tokens.
    pub enum Rows {
        /// The continuous stream of all documents, cut into rows. Supervised examples are never cut
        /// by this: as many as fit are put into a row, and each attends to itself alone.
        Packed = "packed",
        /// One document per row, cut off or padded; padding is not predicted (the paper's way).
        Document = "document",
    }
}

choice! {
    /// What the tokens of packed rows attend to, in training and in its evaluations.
    pub enum Attention {
        /// The whole row before them.
        Row = "row",
        /// The part of it that belongs to their own document.
        Document = "document",
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Times that all rows are read, which decides `steps` once they are counted; 0: `steps` does.
    pub epochs: f64,
    /// Rows in a forward pass.
    pub micro_batch: usize,
    /// Micro-batches in an optimizer step.
    pub grad_accumulation: usize,
    pub recompute: Recompute,
    /// Steps between evaluations; 0: only at the end.
    pub eval_every: u64,
    /// Most tokens that an evaluation reads; 0: all.
    pub eval_tokens: u64,
    /// Steps between samples; 0: only at the end.
    pub sample_every: u64,
    /// Most tokens of a sample, which has room for 256 with its prompt; 0: no samples.
    pub sample_tokens: usize,
    /// Weight of log^2(Z) in the loss; 0: off.
    pub z_loss: f64,
    /// Whether the same run on the same device has the same bits.
    pub deterministic: bool,
    /// A Hugging Face LLaMA folder to start from; written as "" when there is none.
    #[serde(with = "empty_is_none")]
    pub init_from: Option<PathBuf>,
}

choice! {
    /// Which activations are computed again in the backward pass instead of being kept. Weakest
    /// first: each level recomputes what the ones above it do.
    pub enum Recompute {
        None = "none",
        /// The outputs of norms and SwiGLU.
        Norms = "norms",
        /// Queries, keys, values and attention's results, too.
        Attention = "attention",
        /// All but the input of each block.
        Block = "block",
    }
}

impl Recompute {
    /// Whether this level recomputes what `weaker` does.
    pub fn includes(self, weaker: Recompute) -> bool {
        self as usize >= weaker as usize
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct OptimizerConfig {
    pub kind: OptimizerKind,
    /// Peak learning rate.
    pub lr: f64,
    /// Last learning rate as a share of the peak.
    pub min_lr_ratio: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    pub schedule: ScheduleKind,
    /// Share of the steps that `wsd` spends falling.
    pub decay_share: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// Largest global gradient norm; 0: off.
    pub clip: f64,
    /// Type that both moments are stored in; in bf16, rounded stochastically so that the mean is
    /// exact.
    pub moments: Dtype,
    pub master: Master,
    /// Whether both moments lie in host memory and pass through the device in every update.
    pub offload: bool,
    /// Blocks that are trained at one time, drawn at random, besides embedding, final norm and
    /// head; 0: all. "LISA", Pan et al. 2024.
    pub sampled_layers: usize,
    /// Updates between two draws.
    pub sample_interval: u64,
}

choice! {
    pub enum OptimizerKind {
        /// Decoupled weight decay.
        Adamw = "adamw",
        /// Weight decay added to the gradient.
        Adam = "adam",
    }
}

choice! {
    /// How the f32 parameters that an update reads and writes are stored, beside bf16 activations.
    pub enum Master {
        F32 = "f32",
        /// As the copy in bf16 that products read, and the 16 bits that it lacks.
        Split = "bf16+16",
    }
}

choice! {
    pub enum ScheduleKind {
        Constant = "constant",
        Linear = "linear",
        Cosine = "cosine",
        /// Warm-up, stable, decay.
        Wsd = "wsd",
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0: only at the end.
    pub every: u64,
    /// How many of the newest checkpoints stay; 0: all.
    pub keep_last: usize,
    /// Checkpoints whose step is a multiple of this stay for ever; 0: none.
    pub keep_every: u64,
    /// Whether the first values are a checkpoint, too: that of step 0, which stays for ever.
    pub initial: bool,
}

/// TOML has no null, and every key has to be visible in the saved file.
mod empty_is_none {
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(path: &Option<PathBuf>, out: S) -> Result<S::Ok, S::Error> {
        path.as_deref().unwrap_or(Path::new("")).serialize(out)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(inp: D) -> Result<Option<PathBuf>, D::Error> {
        Ok(Some(PathBuf::deserialize(inp)?).filter(|path| !path.as_os_str().is_empty()))
    }
}
