//! What several test modules need: small models, random numbers, comparisons that explain.

use isobath::backend::Backend;
use isobath::config::{
    Attention, CheckpointConfig, Config, DEFAULT_MIX_POST, DataConfig, DeviceKind, Dtype, Format,
    InitKind, LnsPosition, Master, ModelConfig, NormKind, OptimizerConfig, OptimizerKind,
    Placement, Recompute, Rows, ScheduleKind, TrainConfig,
};
use isobath::engine::Trainer;
use isobath::flat::FlatBuffer;
use isobath::random::Philox;

/// Independent draws from N(0, 1).
pub fn normals(seed: u64, count: usize) -> Vec<f64> {
    let generator = Philox::new(seed, 0);
    (0..count as u64).map(|i| generator.normal(i)).collect()
}

/// Replaces parameters and both moments.
pub fn set_state<B: Backend>(trainer: &mut Trainer<B>, state: &[Vec<f32>; 3]) {
    for (buffer, values) in FlatBuffer::ALL.into_iter().zip(state) {
        trainer.write_flat(buffer, 0, values).unwrap();
    }
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
        lns_position: LnsPosition::AfterNorm,
        mix_post: DEFAULT_MIX_POST,
        layer_scale: 0.5,
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
            format: Format::Text,
            field: "text".to_string(),
            rows: Rows::Packed,
            attention: Attention::Row,
            sequence: 32,
        },
        train: TrainConfig {
            steps: 8,
            epochs: 0.0,
            micro_batch: 2,
            grad_accumulation: 1,
            recompute: Recompute::None,
            eval_every: 0,
            eval_tokens: 0,
            sample_every: 0,
            sample_tokens: 100,
            z_loss: 0.0,
            deterministic: true,
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
            moments: Dtype::F32,
            master: Master::F32,
            offload: false,
            sampled_layers: 0,
            sample_interval: 1,
        },
        checkpoint: CheckpointConfig { every: 0, keep_last: 2, keep_every: 0, initial: false },
    }
}

/// The real program: ISOBATH_PROGRAM, or the one that cargo built together with these tests.
pub fn isobath() -> std::process::Command {
    let program = std::env::var_os("ISOBATH_PROGRAM");
    std::process::Command::new(program.unwrap_or_else(|| env!("CARGO_BIN_EXE_isobath").into()))
}

/// The folder that holds kernels/ and tests/: ISOBATH_SOURCE, or where these tests were compiled.
pub fn source() -> std::path::PathBuf {
    let folder = std::env::var_os("ISOBATH_SOURCE");
    folder.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).into()
}

/// Whether there is no `python3`; prints the reason.
pub fn python_is_missing() -> bool {
    let missing = std::process::Command::new("python3").arg("--version").output().is_err();
    if missing {
        println!("skipped: no python3");
    }
    missing
}

/// A training run that takes milliseconds a step, as arguments of `isobath train`.
pub fn tiny_run(text: &std::path::Path, out: &std::path::Path, sets: &[&str]) -> Vec<String> {
    let train = format!("data.train={text:?}");
    let defaults = [
        "model.hidden=16",
        "model.layers=2",
        "model.heads=2",
        "model.kv_heads=1",
        "model.ffn=24",
        "model.max_sequence=64",
        "data.sequence=32",
        "data.tokenizer=bytes",
        "data.held_out=0.1",
        "train.micro_batch=2",
        "train.steps=8",
        "train.eval_every=0",
        "optimizer.warmup=1",
        "optimizer.schedule=constant",
        "checkpoint.every=0",
        train.as_str(),
    ];
    let mut arguments = vec!["train".to_string(), "--out".to_string(), out.display().to_string()];
    for set in defaults.iter().chain(sets) {
        arguments.extend(["--set".to_string(), set.to_string()]);
    }
    arguments
}

/// The first `bytes` of the bundled text, as a file.
pub fn text_file(folder: &std::path::Path, bytes: usize) -> std::path::PathBuf {
    let path = folder.join("text.txt");
    let text = &crate::data::AUSTEN[..crate::data::AUSTEN.floor_char_boundary(bytes)];
    std::fs::write(&path, text).unwrap();
    path
}

/// The lines of a .jsonl file.
pub fn json_lines(path: &std::path::Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// metrics.jsonl without what the clock decides.
pub fn metrics(run: &std::path::Path) -> Vec<serde_json::Value> {
    let mut lines = json_lines(&run.join("metrics.jsonl"));
    for line in &mut lines {
        line.as_object_mut().unwrap().remove("tokens_per_second").unwrap();
    }
    lines
}
