//! Times whole training steps: forward, backward, gradient norm, clipping, AdamW.
//!
//! `cargo bench --bench step -- --preset demo --json`. Tokens are random, the model is freshly
//! initialised, and the learning rate warms up as in training. Nothing is read from disk; with
//! `--record` the first steps are written out for benches/peers/step.py to reproduce.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use isobath::config::Config;
use isobath::cpu::Cpu;
use isobath::engine::{Plan, Rows, StepOutcome, Trainer};
use isobath::model::init::initial_parameters;
use isobath::optim;
use isobath::plan::PlanReport;
use isobath::random::Philox;
use isobath::tensor_file::{Dtype, Entry, TensorWriter};
use serde::Serialize;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value = "demo")]
    preset: String,
    /// Rows in a step
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens in a row
    #[arg(long, default_value_t = 256)]
    sequence: usize,
    /// Overrides one value of the preset
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Steps that are timed
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Steps before them that are not
    #[arg(long, default_value_t = 5)]
    warm_up: usize,
    /// Write parameters, tokens, losses and gradient norms of the steps to a safetensors file
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Cargo says so
    #[arg(long, hide = true)]
    bench: bool,
}

/// What was timed, on what, and how long it took; `config` lets a peer do the same.
#[derive(Serialize)]
struct Report {
    program: &'static str,
    version: &'static str,
    commit: Option<String>,
    cpu: String,
    threads: usize,
    batch: usize,
    sequence: usize,
    median_ms: f64,
    min_ms: f64,
    /// Of all threads, mean over the steps.
    cpu_ms: f64,
    tokens_per_second: f64,
    /// By the formula of `isobath plan`, at the median.
    gflops: f64,
    step_ms: Vec<f64>,
    loss: f64,
    config: Config,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut config = Config::resolve(Some(&args.preset), None, &args.set)?;
    config.train.micro_batch = args.batch;
    config.train.grad_accumulation = 1;
    config.data.sequence = args.sequence;
    config.model.vocab = config.vocab().context("the preset has no vocabulary")?;
    config.validate_shape()?;

    let cpu = Cpu::<f32>::new();
    let mut trainer = Trainer::new(Plan::new(&config, &cpu)?, &config, cpu)?;
    let parameters = initial_parameters(trainer.table(), config.seed);
    trainer.set_parameters(&parameters)?;
    if let Some(path) = &args.record {
        return record(path, &config, &parameters, args.steps, &mut trainer);
    }

    let mut steps = Steps { config: &config, done: 0 };
    for _ in 0..args.warm_up {
        steps.run(&mut trainer)?;
    }
    let (mut step_ms, mut loss) = (Vec::with_capacity(args.steps), f64::NAN);
    let cpu_before = cpu_seconds();
    for _ in 0..args.steps {
        let start = Instant::now();
        loss = steps.run(&mut trainer)?.loss;
        step_ms.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let cpu_ms = (cpu_seconds() - cpu_before) * 1e3 / args.steps as f64;
    let mut sorted = step_ms.clone();
    sorted.sort_by(f64::total_cmp);
    let (median_ms, min_ms) = (sorted[sorted.len() / 2], sorted[0]);
    let tokens = (config.train.micro_batch * config.data.sequence) as f64;
    let flops = PlanReport::new(&config)?.flops_per_token as f64 * tokens;
    let report = Report {
        program: "isobath",
        version: env!("CARGO_PKG_VERSION"),
        commit: commit(),
        cpu: cpu_model(),
        threads: rayon::current_num_threads(),
        batch: config.train.micro_batch,
        sequence: config.data.sequence,
        median_ms,
        min_ms,
        cpu_ms,
        tokens_per_second: tokens / median_ms * 1e3,
        gflops: flops / median_ms / 1e6,
        step_ms,
        loss,
        config: config.clone(),
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "{} {}x{}: median {:.1} ms, min {:.1} ms, cpu {:.1} ms, {:.0} tokens/s, {:.0} GFLOP/s",
            args.preset,
            report.batch,
            report.sequence,
            report.median_ms,
            report.min_ms,
            report.cpu_ms,
            report.tokens_per_second,
            report.gflops
        );
    }
    Ok(())
}

/// Training steps on random tokens, each on others.
struct Steps<'a> {
    config: &'a Config,
    done: u64,
}

impl Steps<'_> {
    /// [B,S] tokens of step `step`, and targets.
    fn rows(&self, step: u64) -> [Vec<i32>; 2] {
        let count = (self.config.train.micro_batch * self.config.data.sequence) as u64;
        [0, 1].map(|stream| {
            let random = Philox::new(self.config.seed, 1 << 32 | stream);
            let tokens = (step * count..(step + 1) * count).map(|i| random.at(i)[0]);
            tokens.map(|token| (token % self.config.model.vocab as u32) as i32).collect()
        })
    }

    fn run(&mut self, trainer: &mut Trainer<Cpu<f32>>) -> isobath::Result<StepOutcome> {
        let [tokens, targets] = self.rows(self.done);
        self.done += 1;
        let rows = Rows::new(&tokens, &targets);
        let outcome = trainer.accumulate(std::iter::once(rows))?;
        let optimizer = &self.config.optimizer;
        let lr = optim::learning_rate(optimizer, self.done, self.config.train.steps);
        trainer.update(optimizer, self.done, lr)?;
        Ok(outcome)
    }
}

/// Writes the first `count` steps: parameters by their names in the table, "tokens" and "targets"
/// [steps,B,S] as f32 (ids are below 2^24), "losses" and "gradient_norms" [steps].
fn record(
    path: &Path,
    config: &Config,
    parameters: &[f32],
    count: usize,
    trainer: &mut Trainer<Cpu<f32>>,
) -> anyhow::Result<()> {
    let mut steps = Steps { config, done: 0 };
    let rows: Vec<_> = (0..count as u64).map(|step| steps.rows(step)).collect();
    let outcomes = (0..count).map(|_| steps.run(trainer)).collect::<isobath::Result<Vec<_>>>()?;
    let ids = |which: usize| -> Vec<f32> {
        rows.iter().flat_map(|rows| rows[which].iter().map(|&id| id as f32)).collect()
    };
    let per_step = |of: fn(&StepOutcome) -> f64| outcomes.iter().map(|o| of(o) as f32).collect();
    let batch = [count, config.train.micro_batch, config.data.sequence];
    let recorded: [(&str, &[usize], Vec<f32>); 4] = [
        ("tokens", &batch, ids(0)),
        ("targets", &batch, ids(1)),
        ("losses", &[count], per_step(|outcome| outcome.loss)),
        ("gradient_norms", &[count], per_step(|outcome| outcome.grad_norm)),
    ];

    let entry = |name: &str, shape: &[usize]| Entry {
        name: name.to_string(),
        dtype: Dtype::F32,
        shape: shape.to_vec(),
    };
    let table = trainer.table().entries();
    let entries = table.iter().map(|p| entry(&p.name, p.stored.sizes()));
    let entries = entries.chain(recorded.iter().map(|(name, shape, _)| entry(name, shape)));
    let mut file = TensorWriter::create(path, &entries.collect::<Vec<_>>())?;
    for parameter in table {
        file.write_f32(&parameters[parameter.range()])?;
    }
    for (_, _, values) in &recorded {
        file.write_f32(values)?;
    }
    file.finish()?;
    Ok(())
}

/// User and system time of this process.
fn cpu_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_SECOND
}

fn cpu_model() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("model name"));
    line.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, name)| name).to_string()
}

fn commit() -> Option<String> {
    let mut git = std::process::Command::new("git");
    let output = git.args(["rev-parse", "--short=12", "HEAD"]).output().ok()?;
    if !output.status.success() {
        return None;
    }
    Some(String::from_utf8_lossy(&output.stdout).trim().to_string())
}
