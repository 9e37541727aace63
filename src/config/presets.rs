//! Presets: `demo`, and the models and recipes of "The Curse of Depth in Large Language Models"
//! (arXiv 2502.05795) as its published configurations and run scripts have them: pretraining, and
//! fine-tuning of a model that is there.
//!
//! The paper's runs differ from these in precision: they kept weights and moments in bf16, here
//! masters and moments are f32. They read C4 with the t5-base tokenizer; neither is bundled, so
//! `data.train` and `data.tokenizer` are empty and have to be given.

use super::{
    Attention, CheckpointConfig, Config, DEFAULT_LAYER_SCALE, DEFAULT_MIX_POST, DataConfig,
    DeviceKind, Dtype, Format, InitKind, LnsPosition, Master, ModelConfig, NormKind,
    OptimizerConfig, OptimizerKind, Placement, Recompute, Rows, ScheduleKind, TrainConfig, nearest,
};
use crate::error::{Error, Result};

/// The preset when none is named.
pub const DEFAULT: &str = "demo";

/// Supervised fine-tuning of all parameters, and of a few random layers at a time.
const FULL_TUNING: &str = "sft";
const LISA_TUNING: &str = "sft-lisa";

/// Layers that the paper's group trains at a time, and for how many updates.
const LISA_LAYERS: usize = 4;
const LISA_INTERVAL: u64 = 3;

/// Rows in an optimizer step of every published recipe.
const PAPER_ROWS: usize = 512;

/// What differs between the published run scripts.
struct Recipe {
    lr: f64,
    steps: u64,
    warmup: u64,
    /// Rows on one GPU; the scripts split the rest over GPUs, here it is accumulated.
    micro_batch: usize,
}

const SCRIPT_71M: Recipe = Recipe { lr: 1e-3, steps: 10_000, warmup: 1_000, micro_batch: 256 };
const SCRIPT_130M: Recipe = Recipe { lr: 1e-3, steps: 20_000, warmup: 2_000, micro_batch: 64 };
const SCRIPT_250M: Recipe = Recipe { lr: 1e-3, steps: 40_000, warmup: 4_000, micro_batch: 128 };
/// The script's learning rate; the paper's text says 1e-3.
const SCRIPT_350M: Recipe = Recipe { lr: 5e-4, steps: 60_000, warmup: 6_000, micro_batch: 128 };
/// The script's warm-up of 1%; every other one is 10%.
const SCRIPT_1B: Recipe = Recipe { lr: 5e-4, steps: 100_000, warmup: 1_000, micro_batch: 32 };
/// Of the Mix-LN repository by the same group.
const SCRIPT_7B: Recipe = Recipe { lr: 5e-4, steps: 150_000, warmup: 15_000, micro_batch: 4 };

struct PaperModel {
    name: &'static str,
    hidden: usize,
    ffn: usize,
    layers: usize,
    heads: usize,
    vocab: usize,
    max_sequence: usize,
    recipe: &'static Recipe,
}

#[rustfmt::skip]
const PAPER: [PaperModel; 13] = {
    const fn model(
        name: &'static str,
        [hidden, ffn, layers, heads, vocab, max_sequence]: [usize; 6],
        recipe: &'static Recipe,
    ) -> PaperModel {
        PaperModel { name, hidden, ffn, layers, heads, vocab, max_sequence, recipe }
    }
    [
        // 9m to 60m, 100m and 3b have a configuration but no script: they take the script of the
        // model whose parameter count is nearest in ratio.
        //            hidden    ffn  layers heads  vocab  max_sequence
        model("9m",      [128,   352,      4,    4, 32000, 1024], &SCRIPT_71M),
        model("20m",     [256,   688,      4,    4, 32000, 1024], &SCRIPT_71M),
        model("35m",     [384,  1024,      6,    8, 32000, 1024], &SCRIPT_71M),
        model("40m",     [416,  1024,      8,    8, 32000, 1024], &SCRIPT_71M),
        model("60m",     [512,  1376,      8,    8, 32000, 1024], &SCRIPT_71M),
        model("71m",     [512,  1368,     12,    8, 32000, 1024], &SCRIPT_71M),
        model("100m",    [640,  1708,     12,   10, 32100, 1024], &SCRIPT_130M),
        model("130m",    [768,  2048,     12,   12, 32000, 1024], &SCRIPT_130M),
        model("250m",    [768,  2560,     24,   16, 32000, 1024], &SCRIPT_250M),
        model("350m",   [1024,  2736,     24,   16, 32000, 1024], &SCRIPT_350M),
        model("1b",     [2048,  5461,     24,   32, 32000, 1024], &SCRIPT_1B),
        model("3b",     [2560,  6848,     32,   32, 32000, 1024], &SCRIPT_1B),
        model("7b",     [4096, 11008,     32,   32, 32000, 2048], &SCRIPT_7B),
    ]
};

/// Names of all presets, the default first.
pub fn preset_names() -> Vec<&'static str> {
    let pretraining = PAPER.iter().map(|model| model.name);
    std::iter::once(DEFAULT).chain(pretraining).chain([FULL_TUNING, LISA_TUNING]).collect()
}

impl Config {
    /// The values of a preset.
    ///
    /// Errors: no preset has this name.
    pub fn preset(name: &str) -> Result<Self> {
        match name {
            DEFAULT => return Ok(demo()),
            FULL_TUNING => return Ok(tuning(name, 0)),
            LISA_TUNING => return Ok(tuning(name, LISA_LAYERS)),
            _ => {}
        }
        PAPER.iter().find(|model| model.name == name).map(paper).ok_or_else(|| Error::Config {
            what: format!("unknown preset `{name}`"),
            remedy: nearest::one_of(name, &preset_names()),
        })
    }
}

/// A model that learns the bundled text on a CPU within minutes.
fn demo() -> Config {
    Config {
        name: DEFAULT.to_string(),
        seed: 1,
        dtype: Dtype::F32,
        device: DeviceKind::Auto,
        model: ModelConfig {
            hidden: 128,
            layers: 6,
            heads: 4,
            kv_heads: 4,
            ffn: 352,
            vocab: 0,
            max_sequence: 256,
            norm: NormKind::Rms,
            placement: Placement::Lns,
            lns_position: LnsPosition::AfterNorm,
            mix_post: DEFAULT_MIX_POST,
            layer_scale: DEFAULT_LAYER_SCALE,
            norm_eps: 1e-6,
            rope_theta: 10_000.0,
            tied: false,
            init: InitKind::Normal,
            init_std: 0.02,
            embedding_std: 0.02,
        },
        data: DataConfig {
            train: vec!["bundled:austen".to_string()],
            valid: vec![],
            held_out: 0.1,
            tokenizer: "train:4096".to_string(),
            format: Format::Text,
            field: "text".to_string(),
            rows: Rows::Packed,
            attention: Attention::Row,
            sequence: 256,
        },
        train: TrainConfig {
            steps: 1800,
            epochs: 0.0,
            micro_batch: 4,
            grad_accumulation: 1,
            recompute: Recompute::None,
            eval_every: 500,
            eval_tokens: 32_768,
            sample_every: 0,
            sample_tokens: 100,
            z_loss: 0.0,
            deterministic: true,
            init_from: None,
        },
        optimizer: OptimizerConfig {
            kind: OptimizerKind::Adamw,
            lr: 4e-3,
            min_lr_ratio: 0.02,
            warmup: 100,
            schedule: ScheduleKind::Cosine,
            decay_share: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
            moments: Dtype::F32,
            master: Master::F32,
            offload: false,
            sampled_layers: 0,
            sample_interval: 1,
        },
        checkpoint: CheckpointConfig { every: 500, keep_last: 2, keep_every: 0, initial: false },
    }
}

/// Supervised fine-tuning as the paper's group runs it: 4 epochs at a learning rate of 3e-4 with
/// seed 42; with LISA, 4 layers for 3 updates each. They name no more; batch, schedule and Adam's
/// numbers are ours. The model and its tokenizer are those that `train.init_from` names.
fn tuning(name: &str, sampled_layers: usize) -> Config {
    let demo = demo();
    Config {
        name: name.to_string(),
        seed: 42,
        dtype: Dtype::Bf16,
        data: DataConfig {
            train: vec![],
            tokenizer: String::new(),
            format: Format::Supervised,
            attention: Attention::Document,
            ..demo.data
        },
        train: TrainConfig { epochs: 4.0, micro_batch: 16, ..demo.train },
        optimizer: OptimizerConfig {
            lr: 3e-4,
            min_lr_ratio: 0.0,
            warmup: 0,
            schedule: ScheduleKind::Linear,
            beta2: 0.999,
            weight_decay: 0.0,
            sampled_layers,
            sample_interval: LISA_INTERVAL,
            ..demo.optimizer
        },
        ..demo
    }
}

fn paper(paper: &PaperModel) -> Config {
    let recipe = paper.recipe;
    Config {
        name: paper.name.to_string(),
        seed: 1,
        dtype: Dtype::Bf16,
        device: DeviceKind::Auto,
        model: ModelConfig {
            hidden: paper.hidden,
            layers: paper.layers,
            heads: paper.heads,
            kv_heads: paper.heads,
            ffn: paper.ffn,
            vocab: paper.vocab,
            max_sequence: paper.max_sequence,
            norm: NormKind::Rms,
            placement: Placement::Lns,
            lns_position: LnsPosition::AfterNorm,
            mix_post: DEFAULT_MIX_POST,
            layer_scale: DEFAULT_LAYER_SCALE,
            norm_eps: 1e-6,
            rope_theta: 10_000.0,
            tied: false,
            init: InitKind::Normal,
            init_std: 0.02,
            embedding_std: 0.02,
        },
        data: DataConfig {
            train: vec![],
            valid: vec![],
            held_out: 0.01,
            tokenizer: String::new(),
            format: Format::Text,
            field: "text".to_string(),
            rows: Rows::Document,
            attention: Attention::Row,
            sequence: 256,
        },
        train: TrainConfig {
            steps: recipe.steps,
            epochs: 0.0,
            micro_batch: recipe.micro_batch,
            grad_accumulation: PAPER_ROWS / recipe.micro_batch,
            recompute: Recompute::None,
            eval_every: 1_000,
            eval_tokens: 10_000_000,
            sample_every: 0,
            sample_tokens: 100,
            z_loss: 0.0,
            deterministic: true,
            init_from: None,
        },
        optimizer: OptimizerConfig {
            kind: OptimizerKind::Adam,
            lr: recipe.lr,
            min_lr_ratio: 0.1,
            warmup: recipe.warmup,
            schedule: ScheduleKind::Cosine,
            decay_share: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            clip: 0.0,
            moments: Dtype::F32,
            master: Master::F32,
            offload: false,
            sampled_layers: 0,
            sample_interval: 1,
        },
        checkpoint: CheckpointConfig { every: 1_000, keep_last: 2, keep_every: 0, initial: false },
    }
}
