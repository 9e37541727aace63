//! Rules: what the values of a configuration have to be, alone and together.
//!
//! Two steps. The shape rules are enough to count parameters and plan memory; the run rules are
//! what training needs besides. Each message names the key, its value and the remedy. The first
//! broken rule is reported. Rules on numbers are written so that NaN breaks them.

use std::fmt::{Debug, Display};

use super::BYTE_VOCAB;
use super::{
    Attention, Config, DeviceKind, Dtype, Format, LnsPosition, Master, ModelConfig, Placement, Rows,
};
use crate::error::{Error, Result};

// Far above any model that can be stored; below them no product of sizes overflows: the parameters
// of all layers together are fewer than 2^14 (4 2^34 + 3 2^37) < 2^53.
pub(crate) const MOST_HIDDEN: usize = 1 << 17;
pub(crate) const MOST_FFN: usize = 1 << 20;
pub(crate) const MOST_LAYERS: usize = 1 << 14;
pub(crate) const MOST_VOCAB: usize = 1 << 24;
pub(crate) const MOST_SEQUENCE: usize = 1 << 24;
const MOST_GRAD_ACCUMULATION: usize = 1 << 20;

/// Positions of a micro-batch are counted in i32.
const MOST_POSITIONS: usize = i32::MAX as usize;

const LONGEST_NAME_BYTES: usize = 100;

impl Config {
    /// Whether the model and its batches have sizes that can be counted and planned.
    pub fn validate_shape(&self) -> Result<()> {
        self.model.validate()?;
        let (data, train) = (&self.data, &self.train);
        let sequence = data.sequence;
        at_least_one("data.sequence", sequence)?;
        rule(sequence <= self.model.max_sequence, "data.sequence", sequence, || {
            let longest = self.model.max_sequence;
            (
                format!("longer than model.max_sequence = {longest}"),
                format!("set data.sequence to at most {longest}, or raise model.max_sequence"),
            )
        })?;
        at_least_one("train.micro_batch", train.micro_batch)?;
        let positions = train.micro_batch.checked_mul(sequence);
        rule(
            positions.is_some_and(|positions| positions <= MOST_POSITIONS),
            "train.micro_batch",
            train.micro_batch,
            || {
                (
                    format!(
                        "with data.sequence = {sequence} that is more than 2^31 - 1 tokens at once"
                    ),
                    "lower train.micro_batch and raise train.grad_accumulation".into(),
                )
            },
        )?;
        let accumulated = train.grad_accumulation;
        at_least_one("train.grad_accumulation", accumulated)?;
        at_most("train.grad_accumulation", accumulated, MOST_GRAD_ACCUMULATION)?;
        at_least_one("train.steps", train.steps)?;
        let (master, dtype) = (self.optimizer.master, self.dtype);
        rule(master == Master::F32 || dtype == Dtype::Bf16, "optimizer.master", master, || {
            (
                format!("with dtype = {dtype} there is no bf16 copy that could be half of it"),
                "add --set optimizer.master=f32, or train in bf16 on cuda or simt".into(),
            )
        })?;
        let tokens = self.tokens_per_step().checked_mul(train.steps);
        rule(
            tokens.is_some_and(|tokens| tokens <= i64::MAX as u64),
            "train.steps",
            train.steps,
            || ("that is more than 2^63 tokens".into(), "lower train.steps".into()),
        )
    }

    /// Whether the configuration can be trained, as far as that is known without opening a file
    /// or a device: the shape rules and the run rules. [`Config::validate_on`] follows when the
    /// device is known.
    pub fn validate(&self) -> Result<()> {
        self.validate_shape()?;
        plain_name(&self.name)?;
        rule(self.seed <= i64::MAX as u64, "seed", self.seed, || {
            ("TOML cannot hold it".into(), "set seed to at most 2^63 - 1".into())
        })?;
        self.validate_optimizer()?;
        self.validate_data()?;
        self.validate_on(self.device)
    }

    /// Whether `device`, the one that `auto` turned out to be, can train this.
    pub fn validate_on(&self, device: DeviceKind) -> Result<()> {
        let cpu = device == DeviceKind::Cpu;
        rule(!(cpu && self.dtype == Dtype::Bf16), "dtype", self.dtype, || {
            ("the CPU trains in f32".into(), "add --set dtype=f32".into())
        })?;
        let moments = self.optimizer.moments;
        rule(!(cpu && moments == Dtype::Bf16), "optimizer.moments", moments, || {
            (
                "the CPU keeps moments in f32".into(),
                "add --set optimizer.moments=f32, or train on cuda or simt".into(),
            )
        })?;
        let offload = self.optimizer.offload;
        rule(!(cpu && offload), "optimizer.offload", offload, || {
            (
                "on the CPU all memory is the host's".into(),
                "add --set optimizer.offload=false, or train on cuda or simt".into(),
            )
        })
    }

    fn validate_optimizer(&self) -> Result<()> {
        let (optimizer, train) = (&self.optimizer, &self.train);
        positive("optimizer.lr", optimizer.lr)?;
        within("optimizer.min_lr_ratio", optimizer.min_lr_ratio, "from 0 to 1", |ratio| {
            (0.0..=1.0).contains(&ratio)
        })?;
        not_negative("train.epochs", train.epochs)?;
        // Epochs are counted in steps when the rows have been counted, and this is asked again.
        if train.epochs == 0.0 {
            self.validate_warmup()?;
        }
        let (sampled, layers) = (optimizer.sampled_layers, self.model.layers);
        rule(sampled <= layers, "optimizer.sampled_layers", sampled, || {
            (
                format!("the model has {layers} layers"),
                format!("set it to at most {layers}, or to 0 to train all of them at all times"),
            )
        })?;
        at_least_one("optimizer.sample_interval", optimizer.sample_interval)?;
        within("optimizer.decay_share", optimizer.decay_share, "above 0 and up to 1", |share| {
            share > 0.0 && share <= 1.0
        })?;
        for (key, beta) in
            [("optimizer.beta1", optimizer.beta1), ("optimizer.beta2", optimizer.beta2)]
        {
            within(key, beta, "from 0 to below 1", |beta| (0.0..1.0).contains(&beta))?;
        }
        positive("optimizer.eps", optimizer.eps)?;
        not_negative("optimizer.weight_decay", optimizer.weight_decay)?;
        not_negative("optimizer.clip", optimizer.clip)?;
        not_negative("train.z_loss", train.z_loss)
    }

    /// Whether the run is at least as long as its warm-up.
    pub(crate) fn validate_warmup(&self) -> Result<()> {
        let (warmup, steps) = (self.optimizer.warmup, self.train.steps);
        rule(warmup <= steps, "optimizer.warmup", warmup, || {
            (
                format!("longer than the run, train.steps = {steps}"),
                format!("set optimizer.warmup to at most {steps}"),
            )
        })
    }

    fn validate_data(&self) -> Result<()> {
        let data = &self.data;
        let supervised = data.format == Format::Supervised;
        rule(
            !supervised || data.rows == Rows::Document || data.attention == Attention::Document,
            "data.attention",
            data.attention,
            || {
                (
                    "several supervised examples in a row would attend to each other".into(),
                    "set data.attention to document, or data.rows to document".into(),
                )
            },
        )?;
        let most = match self.model.vocab {
            0 => String::new(),
            vocab => format!(" with at most {vocab} entries"),
        };
        rule(!data.train.is_empty(), "data.train", "[]", || {
            (
                "there is nothing to train on".into(),
                match data.tokenizer.as_str() {
                    _ if supervised => {
                        "set data.train to .jsonl files of prompts and answers".to_string()
                    }
                    "" => format!(
                        "set data.train to your text or shards and data.tokenizer to a tokenizer.json{most}"
                    ),
                    _ => "set data.train to your text or shards, or to bundled:austen".into(),
                },
            )
        })?;
        for (key, sources) in [("data.train", &data.train), ("data.valid", &data.valid)] {
            rule(sources.iter().all(|source| !source.is_empty()), key, quoted(sources), || {
                ("an empty name is no file".into(), format!("take it out of {key}"))
            })?;
        }
        rule(!data.tokenizer.is_empty(), "data.tokenizer", "\"\"", || {
            (
                "text needs a tokenizer".into(),
                match supervised {
                    true => {
                        "start from a model (--init FOLDER), whose tokenizer is then used".into()
                    }
                    false => {
                        format!(
                            "set data.tokenizer to a tokenizer.json{most}, `bytes` or `train:N`"
                        )
                    }
                },
            )
        })?;
        if let Some(entries) = data.tokenizer.strip_prefix("train:") {
            let entries = entries.parse().unwrap_or(0);
            let range = BYTE_VOCAB..=MOST_VOCAB;
            rule(range.contains(&entries), "data.tokenizer", quoted(&data.tokenizer), || {
                (
                    format!("N of train:N is a whole number from {BYTE_VOCAB} to {MOST_VOCAB}"),
                    "for instance train:1024".into(),
                )
            })?;
        }
        rule(!data.field.is_empty(), "data.field", "\"\"", || {
            ("no JSON field has this name".into(), "name the field with the text".into())
        })?;
        within("data.held_out", data.held_out, "from 0 to 0.5", |share| {
            (0.0..=0.5).contains(&share)
        })
    }
}

impl ModelConfig {
    /// Whether the sizes make a model; also for one that came from a checkpoint.
    pub fn validate(&self) -> Result<()> {
        let (hidden, heads, kv_heads) = (self.hidden, self.heads, self.kv_heads);
        at_least_one("model.hidden", hidden)?;
        at_most("model.hidden", hidden, MOST_HIDDEN)?;
        at_least_one("model.heads", heads)?;
        rule(hidden.is_multiple_of(heads), "model.heads", heads, || {
            (
                format!("model.hidden = {hidden} is not a multiple of it"),
                format!("{}, or change model.hidden", divisors(hidden, heads)),
            )
        })?;
        rule(self.head_dim().is_multiple_of(2), "model.heads", heads, || {
            (
                format!(
                    "a head has {} dimensions, and rotary embeddings need an even number",
                    self.head_dim()
                ),
                "choose heads so that model.hidden / model.heads is even".into(),
            )
        })?;
        at_least_one("model.kv_heads", kv_heads)?;
        rule(heads.is_multiple_of(kv_heads), "model.kv_heads", kv_heads, || {
            (
                format!("model.heads = {heads} is not a multiple of it"),
                format!("{}, or change model.heads", divisors(heads, kv_heads)),
            )
        })?;
        at_least_one("model.layers", self.layers)?;
        at_most("model.layers", self.layers, MOST_LAYERS)?;
        at_least_one("model.ffn", self.ffn)?;
        at_most("model.ffn", self.ffn, MOST_FFN)?;
        at_most("model.vocab", self.vocab, MOST_VOCAB)?;
        at_least_one("model.max_sequence", self.max_sequence)?;
        at_most("model.max_sequence", self.max_sequence, MOST_SEQUENCE)?;
        within("model.mix_post", self.mix_post, "from 0 to 1", |share| {
            (0.0..=1.0).contains(&share)
        })?;
        not_negative("model.layer_scale", self.layer_scale)?;
        rule(
            self.placement == Placement::Lns || self.lns_position == LnsPosition::AfterNorm,
            "model.lns_position",
            self.lns_position,
            || {
                (
                    format!("model.placement = {} has no 1/sqrt(l) to place", self.placement),
                    "set model.placement to lns, or model.lns_position to after-norm".into(),
                )
            },
        )?;
        positive("model.norm_eps", self.norm_eps)?;
        positive("model.rope_theta", self.rope_theta)?;
        not_negative("model.init_std", self.init_std)?;
        not_negative("model.embedding_std", self.embedding_std)
    }
}

/// `problem` gives what is wrong and the remedy.
fn rule(
    holds: bool,
    key: &str,
    value: impl Display,
    problem: impl FnOnce() -> (String, String),
) -> Result<()> {
    if holds {
        return Ok(());
    }
    let (problem, remedy) = problem();
    Err(Error::Config { what: format!("{key} = {value}: {problem}"), remedy })
}

fn at_least_one<N: Display + PartialEq + Default>(key: &str, value: N) -> Result<()> {
    rule(value != N::default(), key, value, || {
        ("has to be at least 1".into(), format!("set {key} to 1 or more"))
    })
}

fn at_most(key: &str, value: usize, most: usize) -> Result<()> {
    rule(value <= most, key, value, || ("too large".into(), format!("set {key} to at most {most}")))
}

fn within(key: &str, value: f64, range: &str, holds: impl FnOnce(f64) -> bool) -> Result<()> {
    rule(holds(value), key, value, || {
        (format!("has to be {range}"), format!("set {key} to a number {range}"))
    })
}

fn positive(key: &str, value: f64) -> Result<()> {
    within(key, value, "above 0 and finite", |value| value > 0.0 && value.is_finite())
}

fn not_negative(key: &str, value: f64) -> Result<()> {
    within(key, value, "at least 0 and finite", |value| value >= 0.0 && value.is_finite())
}

/// "set it to 8 or 16": the divisors of `whole` next to `near`.
fn divisors(whole: usize, near: usize) -> String {
    let below = (1..=near.min(whole)).rev().find(|divisor| whole.is_multiple_of(*divisor));
    let above = (near..=whole).find(|divisor| whole.is_multiple_of(*divisor));
    let found: Vec<String> = below.into_iter().chain(above).map(|d| d.to_string()).collect();
    format!("set it to {}", found.join(" or "))
}

fn quoted(value: impl Debug) -> String {
    format!("{value:?}")
}

/// The name becomes a folder in runs/.
fn plain_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.');
    let holds = !name.is_empty()
        && name.len() <= LONGEST_NAME_BYTES
        && name.chars().all(plain)
        && !name.starts_with(['.', '-']);
    rule(holds, "name", quoted(name), || {
        (
            "the run's folder gets this name".into(),
            format!(
                "use letters, digits, `-`, `_` and `.`, at most {LONGEST_NAME_BYTES} bytes, \
                 the first no `.` or `-`"
            ),
        )
    })
}
