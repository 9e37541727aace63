//! Learning-rate schedules, and the arguments of each AdamW step.

use std::ops::Range;

use crate::backend::AdamWStep;
use crate::config::{OptimizerConfig, OptimizerKind, ScheduleKind};
use crate::model::parameters::ParameterTable;

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

/// Ranges of the flat buffer that decay, ascending, neighbours joined.
pub fn decay_ranges(table: &ParameterTable) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for parameter in table.entries().iter().filter(|p| p.decay) {
        let range = parameter.range();
        match ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => ranges.push(range),
        }
    }
    ranges
}

/// The arguments of step `step` (from 1).
pub fn adamw_step<'a>(
    config: &OptimizerConfig,
    step: u64,
    lr: f64,
    decay: &'a [Range<usize>],
) -> AdamWStep<'a> {
    let correction = |beta: f64| 1.0 - beta.powf(step as f64);
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
    }
}
