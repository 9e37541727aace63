//! Learning-rate schedules, what is updated together, and the arguments of each AdamW step.

mod layer_sampling;

use std::ops::Range;

pub use layer_sampling::LayerSampling;

use crate::backend::{AdamWStep, VectorCopy};
use crate::config::{Dtype, Master, OptimizerConfig, OptimizerKind, ScheduleKind};
use crate::model::parameters::ParameterTable;
use crate::tensor::Kind;

/// The learning rate of `step` (from 1) of `steps`: linear warm-up to `lr` at step `warmup`, then
/// the schedule, which reaches `lr * min_lr_ratio` at the last step exactly. `constant` stays.
pub fn learning_rate(config: &OptimizerConfig, step: u64, steps: u64) -> f64 {
    let floor = config.lr * config.min_lr_ratio;
    if step >= steps && config.schedule != ScheduleKind::Constant {
        return floor;
    }
    if step <= config.warmup {
        return config.lr * step as f64 / config.warmup as f64;
    }
    let falling = |start: u64| (step - start) as f64 / (steps - start) as f64;
    match config.schedule {
        ScheduleKind::Constant => config.lr,
        ScheduleKind::Linear => config.lr + (floor - config.lr) * falling(config.warmup),
        ScheduleKind::Cosine => {
            let angle = std::f64::consts::PI * falling(config.warmup);
            floor + (config.lr - floor) * 0.5 * (1.0 + angle.cos())
        }
        ScheduleKind::Wsd => {
            let decay = (steps as f64 * config.decay_share).round() as u64;
            let start = (steps - decay.min(steps)).max(config.warmup);
            if step <= start { config.lr } else { config.lr + (floor - config.lr) * falling(start) }
        }
    }
}

/// What both moments are stored as.
pub fn moment_kind(config: &OptimizerConfig) -> Kind {
    match config.moments {
        Dtype::F32 => Kind::Statistic,
        Dtype::Bf16 => Kind::Bf16,
    }
}

/// A stretch of the flat buffer that is updated, or frozen, as a whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UpdateGroup {
    /// Elements of the flat buffer.
    pub range: Range<usize>,
    /// Of the elements of `range`, those that decay: see [`AdamWStep::decay`].
    pub decay: Vec<Range<usize>>,
    /// The vectors among the elements of `range`.
    pub vectors: Vec<VectorCopy>,
    /// The block that lies here, counted from 1; `None`: not a single block, and never frozen.
    pub layer: Option<usize>,
}

impl UpdateGroup {
    fn new(table: &ParameterTable, range: Range<usize>, layer: Option<usize>) -> Self {
        let decay = decay_ranges(table, &range);
        let vectors = vector_copies(table, &range);
        UpdateGroup { range, decay, vectors, layer }
    }

    /// What the optimizer is made ready for: the whole first, and where layers are sampled, what is
    /// updated on its own.
    pub fn all(table: &ParameterTable, config: &OptimizerConfig) -> Vec<Self> {
        let mut groups = vec![UpdateGroup::whole(table)];
        if config.sampled_layers > 0 {
            groups.extend(UpdateGroup::blocks(table));
        }
        if config.master == Master::F32 {
            // Vectors are read where they lie.
            groups.iter_mut().for_each(|group| group.vectors.clear());
        }
        groups
    }

    /// The whole flat buffer.
    pub fn whole(table: &ParameterTable) -> Self {
        UpdateGroup::new(table, 0..table.stored_elements(), None)
    }

    /// What lies before the blocks, each block, and what lies after them.
    pub fn blocks(table: &ParameterTable) -> Vec<Self> {
        let mut groups = Vec::new();
        let mut end = 0;
        for layer in 1..=table.layers() {
            let block = table.block_range(layer);
            if end < block.start {
                groups.push(UpdateGroup::new(table, end..block.start, None));
            }
            end = block.end;
            groups.push(UpdateGroup::new(table, block, Some(layer)));
        }
        groups.push(UpdateGroup::new(table, end..table.stored_elements(), None));
        groups
    }
}

/// Ranges within `part` of the flat buffer that decay, counted from its beginning, ascending,
/// neighbours joined. No parameter lies across an end of `part`.
fn decay_ranges(table: &ParameterTable, part: &Range<usize>) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let inside = |range: &Range<usize>| part.start <= range.start && range.end <= part.end;
    let decaying = table.entries().iter().filter(|p| p.decay).map(|p| p.range());
    for range in decaying.filter(inside) {
        let range = range.start - part.start..range.end - part.start;
        match ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => ranges.push(range),
        }
    }
    ranges
}

/// The vectors within `part` of the flat buffer, counted from its beginning, ascending.
fn vector_copies(table: &ParameterTable, part: &Range<usize>) -> Vec<VectorCopy> {
    let copies = table.entries().iter().filter_map(|parameter| {
        let range = parameter.range();
        let to = parameter.vector.filter(|_| part.contains(&range.start))?;
        Some(VectorCopy { from: range.start - part.start..range.end - part.start, to })
    });
    copies.collect()
}

/// When an update is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UpdateTime {
    /// Of the run.
    pub seed: u64,
    /// Updates of the run up to this one.
    pub update: u64,
    /// Those of the parameters at hand, which may have rested: Adam's t.
    pub count: u64,
}

/// The arguments of an update.
pub fn adamw_step<'a>(
    config: &OptimizerConfig,
    UpdateTime { seed, update, count }: UpdateTime,
    lr: f64,
    decay: &'a [Range<usize>],
) -> AdamWStep<'a> {
    let correction = |beta: f64| 1.0 - beta.powf(count as f64);
    AdamWStep {
        lr,
        beta1: config.beta1,
        beta2: config.beta2,
        eps: config.eps,
        weight_decay: config.weight_decay,
        decoupled: config.kind == OptimizerKind::Adamw,
        correction1: correction(config.beta1),
        correction2: correction(config.beta2),
        clip: config.clip,
        decay,
        seed,
        update,
    }
}
