//! Configuration: what a run is, as one validated value.
//!
//! Layers, weakest first: the preset's values, the TOML file, `--set key=value`. Unknown keys and
//! wrong values are refused by name. The resolved file is saved with the run and reads back as
//! the same value.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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

/// Type of matmul operands and activations.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    F32,
    Bf16,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    Auto,
    Cpu,
    Cuda,
    Simt,
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

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    Rms,
    /// LayerNorm without bias.
    Layer,
}

/// Where the norms stand in a block and what scales them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// x + f(norm(x))
    Pre,
    /// x + f(norm(x) / sqrt(l)), l the 1-based block index: "The Curse of Depth", equation 12.
    Lns,
}

impl Placement {
    /// The number whose square root divides both norms of block `layer` (counted from 1).
    pub fn depth(self, layer: usize) -> usize {
        match self {
            Placement::Pre => 1,
            Placement::Lns => layer,
        }
    }
}

/// How the matrices get their first values.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitKind {
    /// N(0, init_std^2), not scaled with depth.
    Normal,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DataConfig {
    /// Text (.txt, .jsonl, also .gz or .zst), shards (.tok, or folders of them), or `bundled:austen`.
    pub train: Vec<String>,
    /// As `train`; empty: the last `held_out` of `train` is kept out of training.
    pub valid: Vec<String>,
    /// Share of the text that is held out when `valid` is empty.
    pub held_out: f64,
    /// A tokenizer.json, `bytes`, or `train:N`: a byte-level BPE of N entries trained on `train`.
    pub tokenizer: String,
    /// The JSON field of .jsonl files that holds the text.
    pub field: String,
    pub rows: Rows,
    /// Tokens in a row.
    pub sequence: usize,
}

/// How documents become rows of `sequence` tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rows {
    /// The continuous stream of all documents, cut into rows.
    Packed,
    /// One document per row, cut off or padded; padding is not predicted (the paper's way).
    Document,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: u64,
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
    /// Weight of log^2(Z) in the loss; 0: off.
    pub z_loss: f64,
    /// A Hugging Face LLaMA folder to start from.
    pub init_from: Option<PathBuf>,
}

/// Which activations are computed again in the backward pass instead of being kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    None,
    /// Only the input of each block is kept.
    Block,
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
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Decoupled weight decay.
    Adamw,
    /// Weight decay added to the gradient.
    Adam,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    Constant,
    Linear,
    Cosine,
    /// Warm-up, stable, decay.
    Wsd,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0: only at the end.
    pub every: u64,
    /// How many of the newest checkpoints stay; 0: all.
    pub keep_last: usize,
    /// Checkpoints whose step is a multiple of this stay for ever; 0: none.
    pub keep_every: u64,
}
