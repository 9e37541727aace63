//! What several test modules need: small models, random numbers, comparisons that explain.

use isobath::config::{
    CheckpointConfig, Config, DataConfig, DeviceKind, Dtype, InitKind, ModelConfig, NormKind,
    OptimizerConfig, OptimizerKind, Placement, Recompute, Rows, ScheduleKind, TrainConfig,
};
use isobath::random::Philox;

/// Independent draws from N(0, 1).
pub fn normals(seed: u64, count: usize) -> Vec<f64> {
    let generator = Philox::new(seed, 0);
    (0..count as u64).map(|i| generator.normal(i)).collect()
}

/// Token ids below `vocab`.
pub fn tokens(seed: u64, count: usize, vocab: usize) -> Vec<i32> {
    let generator = Philox::new(seed, 1);
    (0..count as u64).map(|i| (generator.at(i)[0] as usize % vocab) as i32).collect()
}

/// Two layers, grouped kv heads, an odd ffn width, no dimension like another.
pub fn small_model() -> ModelConfig {
    ModelConfig {
        hidden: 24,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        ffn: 37,
        vocab: 53,
        max_sequence: 64,
        norm: NormKind::Rms,
        placement: Placement::Lns,
        norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tied: false,
        init: InitKind::Normal,
        init_std: 0.2,
        embedding_std: 0.5,
    }
}

/// Panics with the worst index, both values and the used share of the tolerance unless every
/// |found - expected| <= tolerance * max |expected|.
#[track_caller]
pub fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths");
    let largest = expected.iter().fold(0.0f64, |max, e| max.max(e.abs()));
    let allowed = tolerance * largest.max(f64::MIN_POSITIVE);
    let error = |i: usize| (found[i] - expected[i]).abs();
    let worst = (0..found.len()).max_by(|&a, &b| error(a).total_cmp(&error(b))).unwrap_or(0);
    assert!(
        found.iter().all(|f| f.is_finite()) && error(worst) <= allowed,
        "{what}: at {worst} found {:e}, expected {:e}: {:.2} times the tolerance {allowed:e}",
        found[worst],
        expected[worst],
        error(worst) / allowed
    );
}

/// A run of `model` that is small in every other way.
pub fn run_config(model: &ModelConfig) -> Config {
    Config {
        name: "test".to_string(),
        seed: 7,
        dtype: Dtype::F32,
        device: DeviceKind::Cpu,
        model: model.clone(),
        data: DataConfig {
            train: vec!["bundled:austen".to_string()],
            valid: Vec::new(),
            held_out: 0.1,
            tokenizer: "bytes".to_string(),
            field: "text".to_string(),
            rows: Rows::Packed,
            sequence: 32,
        },
        train: TrainConfig {
            steps: 8,
            micro_batch: 2,
            grad_accumulation: 1,
            recompute: Recompute::None,
            eval_every: 0,
            eval_tokens: 0,
            sample_every: 0,
            z_loss: 0.0,
            init_from: None,
        },
        optimizer: OptimizerConfig {
            kind: OptimizerKind::Adamw,
            lr: 1e-3,
            min_lr_ratio: 0.1,
            warmup: 2,
            schedule: ScheduleKind::Cosine,
            decay_share: 0.2,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
        },
        checkpoint: CheckpointConfig { every: 0, keep_last: 2, keep_every: 0 },
    }
}
