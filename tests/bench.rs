//! What `isobath bench` measures, predicts and refuses.

use std::process::Output;

use isobath::bench::cost::Cost;
use isobath::bench::{self, Benchmark, Machine, Prediction, Request, Sizes, StepRequest, Unit};
use isobath::config::{Config, Dtype, NormKind, Recompute};
use isobath::cuda::gemm::{Family, Layout};
use isobath::cuda::host::{self, Host, Options};
use isobath::cuda::norm::Norm;
use isobath::cuda::peaks::{self, Peaks};
use isobath::cuda::{Cuda, DevicePointer, Driver};
use isobath::engine::{Plan, Rows, Trainer};
use isobath::model::init::initial_parameters;
use isobath::plan::PlanReport;
use isobath::{Error, Result};
use serde_json::{Value, json};

use crate::cuda::counting::{Counting, Counts};
use crate::support::{assert_close, isobath, run_config, small_model, tokens};

fn open() -> Result<Box<dyn Driver>> {
    Ok(Box::new(Host::new(Options::default())?))
}

fn small(benchmark: Benchmark) -> Request {
    Request {
        samples: Some(4),
        rows: Some(16),
        columns: Some(64),
        vocab: Some(80),
        product: Some([128, 64, 72]),
        attention: Some([2, 40, 4, 2, 32]),
        elements: Some(3000),
        ..Request::new(benchmark)
    }
}

/// Whether there is no simt here, which the test then says.
fn skipped() -> bool {
    host::present().inspect_err(|error| println!("skipped: {error}")).is_err()
}

/// Runs on simt and checks the arithmetic of every row.
fn amounts(request: &Request) -> Vec<u64> {
    let report = bench::run(open, request).unwrap();
    for row in report.rows.iter().chain(&report.copy) {
        assert_eq!(row.samples, 4);
        assert!(0.0 < row.fastest_microseconds);
        assert!(row.fastest_microseconds <= row.median_microseconds);
        let per_second = row.work.amount as f64 / (row.median_microseconds * 1e-6);
        assert!((row.per_second / per_second - 1.0).abs() < 1e-12);
        assert!(row.percent_of_peak.is_none(), "nobody knows the peak of this CPU");
    }
    for row in &report.rows {
        let percent = match row.work.unit {
            Unit::Flops => None,
            Unit::Bytes => Some(100.0 * row.per_second / report.copy.as_ref().unwrap().per_second),
        };
        assert_eq!(row.percent_of_copy, percent);
    }
    report.rows.iter().map(|row| row.work.amount).collect()
}

#[test]
fn work_is_counted_by_its_formula() {
    if skipped() {
        return;
    }
    let activations = 16 * 64 * 2;
    let (gain, statistics) = (64 * 4, 16 * 4);
    // 16 rows give one row of partial sums.
    let expected = [
        2 * activations + gain + statistics,
        4 * activations + gain + statistics,
        3 * activations + 5 * gain + statistics,
        4 * activations + 5 * gain + statistics,
    ];
    assert_eq!(amounts(&small(Benchmark::Norm)), expected);
    let wide = |request| Request { dtype: Some(Dtype::F32), ..request };
    let layer_norm = Request { norm: NormKind::Layer, ..wide(small(Benchmark::Norm)) };
    let expected = [
        4 * activations + gain + 2 * statistics,
        8 * activations + gain + 2 * statistics,
        6 * activations + 5 * gain + 2 * statistics,
        8 * activations + 5 * gain + 2 * statistics,
    ];
    assert_eq!(amounts(&layer_norm), expected);

    let products = small(Benchmark::Gemm);
    let work = 2 * 128 * 64 * 72;
    assert_eq!(amounts(&products), [work; 3], "every layout");
    assert_eq!(amounts(&Request { layout: Some(Layout::Tn), ..products.clone() }), [work]);
    let family = Some(Family::Sm90);
    assert_eq!(amounts(&Request { family, ..products.clone() }), [work; 3], "every layout");
    assert_eq!(amounts(&wide(products)), [work; 3]);

    // Two products, and five, of 2 B H S^2 D; the causal half of each.
    let square = 2 * 4 * 40 * 40 * 32;
    assert_eq!(amounts(&small(Benchmark::Attention)), [2 * square, 5 * square]);
    assert_eq!(amounts(&wide(small(Benchmark::Attention))), [2 * square, 5 * square]);

    let logits = 16 * 80 * 2;
    let loss = [logits + 2 * 4 * 16, 2 * logits + 2 * 4 * 16 + 4];
    assert_eq!(amounts(&small(Benchmark::Loss)), loss);
    assert_eq!(amounts(&small(Benchmark::Adamw)), [4 * 3000, 30 * 3000]);
    assert_eq!(amounts(&wide(small(Benchmark::Adamw))), [4 * 3000, 28 * 3000]);
}

#[test]
fn a_training_step_counts_its_formula_in_each_type() {
    if skipped() {
        return;
    }
    let sets = ["model.layers=1", "data.sequence=32", "train.grad_accumulation=3"];
    let step = StepRequest { preset: None, sets: sets.map(String::from).to_vec() };
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let request = Request { step: step.clone(), dtype: Some(dtype), ..small(Benchmark::Step) };
        // hidden 64, ffn 176, 2 heads of 32 and one for keys and values, 512 tokens
        let matmuls = (2 + 2) * 32 * 64 + 64 * 64 + 3 * 176 * 64 + 512 * 64;
        let tokens = 3 * 2 * 32;
        assert_eq!(amounts(&request), [6 * (matmuls + 32 * 64) * tokens]);
        let report = bench::run(open, &request).unwrap();
        let row = &report.rows[0];
        let seconds = row.median_microseconds * 1e-6;
        let tokens_per_second = row.tokens_per_second.unwrap();
        assert!((tokens_per_second * seconds / tokens as f64 - 1.0).abs() < 1e-12);
        assert!(report.copy.is_none(), "no row counts bytes");
    }
}

/// Bytes of what no benchmark counts in bytes.
#[test]
fn products_and_attention_have_bytes_too() {
    let nt = |output| Cost::product(Layout::Nt, Dtype::Bf16, [128, 64, 72], output).bytes;
    let factors = (128 * 72 + 64 * 72) * 2;
    use isobath::cuda::gemm::Output::{Accumulate, Store};
    assert_eq!(nt(Store { addend: None }), factors + 128 * 64 * 2);
    assert_eq!(nt(Store { addend: Some(DevicePointer::NULL) }), factors + 2 * 128 * 64 * 2);
    assert_eq!(nt(Accumulate), factors + 2 * 128 * 64 * 4, "fp32, read and written");
    use isobath::backend::{AttentionSpec, HeadSpec};
    let heads = HeadSpec { heads: 4, kv_heads: 2, head_dim: 32 };
    let spec = AttentionSpec { heads, batch: 2, sequence: 40 };
    let (qkv, out, row_sums) = (80 * (4 + 2 * 2) * 32 * 2, 80 * 4 * 32 * 2, 80 * 4 * 4);
    let forward = Cost::attention_forward(spec, Dtype::Bf16);
    assert_eq!(forward.bytes, qkv + out + row_sums);
    let backward = Cost::attention_backward(spec, Dtype::Bf16);
    assert_eq!(backward.bytes, 2 * qkv + 2 * out + 3 * row_sums);
}

#[test]
fn percentages_are_those_of_the_ceilings() {
    if skipped() {
        return;
    }
    let mut report = bench::run(open, &small(Benchmark::All)).unwrap();
    let row = |op| report.rows.iter().find(|row| row.op == op).unwrap().clone();
    let mut product = row("gemm_nt");
    product.per_second = 494.75e12;
    product.compare(report.copy.as_ref(), Some(&peaks::H200));
    assert_eq!((product.percent_of_peak, product.percent_of_copy), (Some(50.0), None));
    product.dtype = Dtype::F32;
    product.compare(None, Some(&peaks::H200));
    assert_eq!(product.percent_of_peak, Some(100.0 * 494.75 / 67.0), "without tensor cores");
    let (mut loss, mut copy) = (row("loss_forward"), report.copy.clone().unwrap());
    (loss.per_second, copy.per_second) = (3e12, 4e12);
    loss.compare(Some(&copy), Some(&peaks::H200));
    assert_eq!((loss.percent_of_copy, loss.percent_of_peak), (Some(75.0), None));
    let mut step = row("step");
    step.per_second = 395.8e12;
    step.compare(report.copy.as_ref(), Some(&peaks::H200));
    report.rows = vec![loss, step];
    report.peak_source = Some(peaks::H200.source);
    let text = report.to_string();
    for part in ["75.0 % of copy", "40.0 % MFU", "tokens/s\n", "MFU = FLOPs / time / peak", "1979"]
    {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    assert_eq!(Peaks::of("NVIDIA H200"), Some(&peaks::H200));
    assert_eq!(Peaks::of("NVIDIA H100 80GB HBM3"), Some(&peaks::H100));
    for other in ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "simt (CPU)"] {
        assert_eq!(Peaks::of(other), None, "another part, another peak");
    }
}

#[test]
fn impossible_sizes_are_refused() {
    if skipped() {
        return;
    }
    let step = |sets: &[&str]| Request {
        step: StepRequest { preset: None, sets: sets.iter().map(ToString::to_string).collect() },
        ..small(Benchmark::Step)
    };
    let norm = || small(Benchmark::Norm);
    let attention = |sizes| Request { attention: Some(sizes), ..small(Benchmark::Attention) };
    let refused = [
        (Request { rows: Some(0), ..norm() }, "cannot be timed"),
        (Request { rows: Some(usize::MAX), ..norm() }, "cannot be timed"),
        (Request { rows: Some(1 << 31), columns: Some(8), ..norm() }, "cannot be timed"),
        (Request { rows: Some(1 << 30), columns: Some(8192), ..norm() }, "these sizes need"),
        (Request { columns: Some(63), ..norm() }, "63"),
        (Request { product: Some([0, 8, 8]), ..small(Benchmark::Gemm) }, "cannot be timed"),
        (Request { product: Some([1 << 30; 3]), ..small(Benchmark::Gemm) }, "cannot be timed"),
        (Request { product: Some([8, 8, 1 << 38]), ..small(Benchmark::Gemm) }, "these sizes need"),
        (attention([1, 0, 4, 2, 32]), "cannot be timed"),
        (attention([1, 1 << 25, 1, 1, 64]), "cannot be timed"),
        (attention([1, 64, 4, 3, 32]), "4 heads share 3 KV heads"),
        (attention([1, 64, 4, 2, 40]), "head dim of 40"),
        (Request { vocab: Some(81), ..small(Benchmark::Loss) }, "81"),
        (Request { vocab: Some(0), ..small(Benchmark::Loss) }, "cannot be timed"),
        (Request { elements: Some(0), ..small(Benchmark::Adamw) }, "cannot be timed"),
        (Request { elements: Some(1 << 43), ..small(Benchmark::Adamw) }, "these sizes need"),
        (step(&["model.heads=3"]), "model.heads"),
        (step(&["model.depth=3"]), "model.depth"),
        (step(&["model.heads=1", "model.hidden=40"]), "head dim"),
        (step(&["train.micro_batch=1000000", "model.layers=64"]), "MiB free"),
        (step(&["model.init_std=1e38"]), "the loss is"),
        (step(&["optimizer.lr=1e300"]), "no finite f32"),
    ];
    for (request, part) in refused {
        let Err(error) = bench::run(open, &request) else { panic!("timed: {request:?}") };
        let error = error.to_string();
        assert!(error.contains(part), "{request:?}:\n`{part}` is missing in:\n{error}");
        assert!(error.contains("remedy"), "{error}");
    }
}

// ------------------------------------------------------------------ prediction

/// No width is padded, so that the formula counts what is multiplied.
fn unpadded() -> Config {
    let model = isobath::config::ModelConfig {
        hidden: 64,
        layers: 3,
        heads: 2,
        kv_heads: 1,
        ffn: 168,
        vocab: 264,
        ..small_model()
    };
    let mut config = run_config(&model);
    config.dtype = Dtype::Bf16;
    config.train.grad_accumulation = 2;
    config
}

fn sum(prediction: &Prediction, of: impl Fn(&bench::Kernel) -> bool) -> u64 {
    let kernels = prediction.kernels.iter().filter(|kernel| of(kernel));
    kernels.map(|kernel| kernel.launches * kernel.flops).sum()
}

#[test]
fn a_prediction_multiplies_as_often_as_the_plans_formula_says() {
    let large = StepRequest::default().resolve(Machine::Gpu, None).unwrap();
    for config in [unpadded(), large] {
        let prediction = Prediction::new(&config).unwrap();
        let plan = PlanReport::new(&config).unwrap();
        let tokens = plan.tokens_per_step;
        let products = sum(&prediction, |kernel| kernel.op.starts_with("gemm"));
        assert_eq!(products, 6 * plan.matmul_parameters * tokens, "{}", config.name);
        let attention = plan.flops_per_token * tokens - products;
        // Of the formula's 6 L S C, 2 are forward; backward has one product more than the 4.
        assert_eq!(3 * sum(&prediction, |kernel| kernel.op == "attention_forward"), attention);
        assert_eq!(6 * sum(&prediction, |kernel| kernel.op == "attention_backward"), 5 * attention);
        assert_eq!(prediction.flops, products + attention / 6 * 7);

        // A block's forward pass again, but for its last product, whose result nobody reads.
        let recomputing = {
            let mut config = config.clone();
            config.train.recompute = Recompute::Block;
            Prediction::new(&config).unwrap()
        };
        let forward = |it: &Prediction| sum(it, |kernel| kernel.op == "attention_forward");
        assert_eq!(forward(&recomputing), 2 * forward(&prediction), "{}", config.name);
        assert!(recomputing.roofs[0].milliseconds > prediction.roofs[0].milliseconds);
    }
}

#[test]
fn a_prediction_adds_up_and_stays_below_the_peak() {
    let config = StepRequest { preset: Some("130m".to_string()), sets: vec![] };
    let config = config.resolve(Machine::Gpu, None).unwrap();
    let prediction = Prediction::new(&config).unwrap();
    let [datasheet, measured] = &prediction.roofs[..] else { panic!("{prediction}") };
    let bytes: u64 = prediction.kernels.iter().map(|it| it.launches * it.bytes).sum();
    assert_eq!(prediction.bytes, bytes);
    for (i, roof) in [datasheet, measured].into_iter().enumerate() {
        let mut milliseconds = 0.0;
        for kernel in &prediction.kernels {
            let least = f64::max(
                kernel.bytes as f64 / roof.bytes_per_second,
                kernel.flops as f64 / roof.flops_per_second,
            );
            assert!((kernel.microseconds[i] / (least * 1e6) - 1.0).abs() < 1e-12);
            milliseconds += kernel.launches as f64 * least * 1e3;
        }
        assert!((roof.milliseconds / milliseconds - 1.0).abs() < 1e-9);
        let tokens_per_second = prediction.tokens_per_step as f64 / roof.milliseconds * 1e3;
        assert!((roof.tokens_per_second / tokens_per_second - 1.0).abs() < 1e-12);
        let mfu = prediction.flops_per_token as f64 * tokens_per_second / 989.5e12;
        assert!((roof.mfu / mfu - 1.0).abs() < 1e-12);
    }
    assert!(measured.mfu < datasheet.mfu && datasheet.mfu < 1.0);
    // Of each parameter, once a step; 512 rows are eight micro-batches.
    let find = |op| prediction.kernels.iter().find(|kernel| kernel.op == op).unwrap();
    let stored = PlanReport::new(&config).unwrap().stored_elements;
    assert_eq!((find("adamw").launches, find("adamw").bytes), (1, 30 * stored));
    assert_eq!((find("gradient_norm").launches, find("gradient_norm").bytes), (1, 4 * stored));
    assert_eq!(find("attention_backward").launches, 8 * 12);

    let without = Prediction::new(&Config { dtype: Dtype::F32, ..config }).unwrap();
    assert_eq!(without.roofs.len(), 1, "nobody measured fp32 products");
    let odd = StepRequest { preset: Some("40m".to_string()), sets: vec![] };
    let error = Prediction::new(&odd.resolve(Machine::Gpu, None).unwrap()).unwrap_err();
    assert!(matches!(&error, Error::Config { what, .. } if what.contains("head dim of 52")));
}

/// How the kernels of an op begin; the op behind a name that several of them share.
const KERNELS: [(&str, &str); 17] = [
    ("gemm_sm80_nt_", "gemm_nt"),
    ("gemm_sm80_nn_", "gemm_nn"),
    ("gemm_sm80_tn_", "gemm_tn"),
    ("norm_forward_", "norm_forward"),
    ("norm_backward_bf16_", "norm_backward"),
    ("norm_backward_gain", "norm_backward"),
    ("rotary_", "rotary"),
    ("attention_forward_", "attention_forward"),
    ("attention_backward_q_", "attention_backward"),
    ("attention_backward_kv_", "attention_backward"),
    ("swiglu_forward_", "swiglu_forward"),
    ("swiglu_backward_", "swiglu_backward"),
    ("embedding_forward", "embedding_forward"),
    ("embedding_backward_", "embedding_backward"),
    ("loss_backward_", "loss_backward"),
    ("adamw_norm_", "gradient_norm"),
    ("adamw_update", "adamw"),
];

#[test]
fn a_prediction_lists_what_a_training_step_launches() {
    if skipped() {
        return;
    }
    for recompute in [Recompute::None, Recompute::Block] {
        let mut config = unpadded();
        config.train.recompute = recompute;
        let counts = Counts::default();
        let host = Host::new(Options::default()).unwrap();
        let driver = Box::new(Counting { counts: counts.clone(), ..Counting::new(host) });
        let backend = Cuda::new(driver, config.dtype, Some(Family::Sm80)).unwrap();
        let plan = Plan::new(&config, &backend).unwrap();
        let mut trainer = Trainer::new(plan, &config, backend).unwrap();
        let parameters = initial_parameters(trainer.table(), 1);
        trainer.set_parameters(&parameters).unwrap();
        let count = config.train.micro_batch * config.data.sequence;
        let ids = tokens(3, 2 * count, config.model.vocab);
        let rows = ids.chunks_exact(count).map(|ids| Rows::new(ids, ids));
        counts.borrow_mut().clear();
        trainer.accumulate(rows).unwrap();
        trainer.update(&config.optimizer, 1, 1e-3).unwrap();

        let launched = counts.borrow().clone();
        let prediction = Prediction::new(&config).unwrap();
        let predicted = |op: &str| -> u64 {
            let kernels = prediction.kernels.iter();
            kernels.filter(|it| it.op.starts_with(op)).map(|it| it.launches).sum()
        };
        let mut explained = 0;
        for (prefix, op) in KERNELS {
            let found: u64 =
                launched.iter().filter(|(name, _)| name.starts_with(prefix)).map(|it| it.1).sum();
            // adamw_norm_partials and adamw_norm_total
            let kernels = if op == "gradient_norm" { 2 } else { 1 };
            assert_eq!(found, kernels * predicted(op), "{prefix} {recompute}: {launched:?}");
            explained += found;
        }
        assert_eq!(launched["copy"], predicted("copy"));
        assert_eq!(launched["fill"], predicted("zero"));
        let all: u64 = launched.values().sum();
        assert_eq!(all, explained + launched["copy"] + launched["fill"], "{launched:?}");
        let ops: Vec<&str> = KERNELS.iter().map(|it| it.1).chain(["copy", "zero"]).collect();
        for kernel in &prediction.kernels {
            assert!(
                ops.iter().any(|op| kernel.op.starts_with(op)),
                "{} is not launched",
                kernel.op
            );
        }
    }
}

#[test]
fn a_prediction_has_the_partial_sums_of_the_kernels() {
    if skipped() {
        return;
    }
    let mut driver = open().unwrap();
    let multiprocessors = driver.properties().multiprocessors as usize;
    for dtype in [Dtype::Bf16, Dtype::F32] {
        for columns in [64, 768, 2048, 8192] {
            let norm = Norm::new(&mut *driver, dtype, columns).unwrap();
            for rows in [1, 64, 65, 4096, 1 << 20] {
                let predicted = Norm::partials_on(multiprocessors, dtype, columns, rows);
                assert_eq!(predicted, Some(norm.partials(rows)), "{dtype} {columns} {rows}");
            }
        }
        assert_eq!(Norm::partials_on(132, dtype, 8200, 64), None);
    }
}

// ------------------------------------------------------------------ the command line

fn bench(arguments: &str, variables: &[(&str, &str)]) -> Output {
    let mut command = isobath();
    command.arg("bench").args(arguments.split_whitespace()).envs(variables.iter().copied());
    command.output().unwrap()
}

fn answer(arguments: &str) -> Value {
    let output = bench(arguments, &[("SIMT_WORKERS", "1")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn kernels_are_timed_and_checked_from_the_command_line() {
    if skipped() {
        return;
    }
    let report = answer(
        "norm --device simt --race --order random --seed 7 --rows 16 --columns 64 --samples 1 \
         --json",
    );
    assert_eq!(report["device"], "simt");
    assert_eq!(report["rows"].as_array().unwrap().len(), 4);
    assert_eq!(report["rows"][0]["work"]["amount"], 4416);
    let output = bench("gemm --device simt --product 64,64,64 --samples 1", &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["gemm_sm90", "gemm_sm90_tn", "M=64 N=64 K=64", "GFLOP/s", "on simt (CPU)"] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    let report = answer(
        "gemm --device simt --product 64,64,63 --layout tn --family sm80 --samples 1 --json",
    );
    assert_eq!(report["rows"].as_array().unwrap().len(), 1);
    assert_eq!(report["rows"][0]["what"], "gemm_sm80_tn_64x64, bf16");
    assert!(report["copy"].is_null());
    for (family, names) in [
        ("sm80", ["forward_bf16_32", "backward_q_bf16_32", "backward_kv_bf16_32"]),
        ("sm90", ["forward_sm90_128x32", "backward_q_sm90_128x32", "backward_kv_sm90_128x32"]),
    ] {
        let report = answer(&format!(
            "attention --device simt --attention 1,8,1,1,32 --family {family} --samples 1 --json"
        ));
        let [forward, q, kv] = names.map(|name| format!("attention_{name}"));
        assert_eq!(report["rows"][0]["what"], format!("{forward}, bf16"));
        assert_eq!(report["rows"][1]["what"], format!("{q} and {kv}, bf16"));
    }
}

/// benches/peers reads these fields and computes the same.
#[test]
fn all_benchmarks_answer_with_the_fields_that_peers_join() {
    if skipped() {
        return;
    }
    let report = answer("--device simt --samples 1 --rows 16 --elements 4096 --json");
    assert_eq!(report["benchmark"], "all");
    assert!(report["machine"]["name"].is_string() && report["copy"]["per_second"].is_f64());
    let rows = report["rows"].as_array().unwrap();
    let sizes: Vec<(&str, &Value)> =
        rows.iter().map(|row| (row["op"].as_str().unwrap(), &row["sizes"])).collect();
    let norm = |residual: bool| json!({"T": 16, "C": 1024, "norm": "rms", "residual": residual});
    let expected = [
        ("gemm_nt", json!({"M": 256, "N": 256, "K": 256})),
        ("gemm_nn", json!({"M": 256, "N": 256, "K": 256})),
        ("gemm_tn", json!({"M": 256, "N": 256, "K": 256})),
        ("attention_forward", json!({"B": 1, "S": 128, "H": 4, "K": 2, "D": 64})),
        ("attention_backward", json!({"B": 1, "S": 128, "H": 4, "K": 2, "D": 64})),
        ("norm_forward", norm(false)),
        ("norm_forward", norm(true)),
        ("norm_backward", norm(false)),
        ("norm_backward", norm(true)),
        ("loss_forward", json!({"T": 16, "V": 2048})),
        ("loss_backward", json!({"T": 16, "V": 2048})),
        ("gradient_norm", json!({"N": 4096})),
        ("adamw", json!({"N": 4096})),
    ];
    let (step, kernels) = sizes.split_last().unwrap();
    let expected: Vec<(&str, &Value)> = expected.iter().map(|(op, it)| (*op, it)).collect();
    assert_eq!(kernels, expected);
    assert_eq!(step.0, "step");
    assert_eq!(
        (&step.1["preset"], &step.1["B"], &step.1["S"]),
        (&json!("tiny"), &json!(2), &json!(64))
    );
    assert_eq!(step.1["optimizer"]["beta1"], json!(0.9));
    assert_eq!((&step.1["model"]["kv_heads"], &step.1["model"]["vocab"]), (&json!(1), &json!(512)));
    for row in rows {
        for field in ["what", "shape", "dtype"] {
            assert!(row[field].is_string(), "{field}: {row}");
        }
        let is_bytes = row["work"]["unit"] == "bytes";
        assert_eq!(row["percent_of_copy"].is_f64(), is_bytes, "{row}");
        assert!(row["percent_of_peak"].is_null() && row["work"]["formula"].is_string());
    }
    let dtype = |op: &str| &rows.iter().find(|row| row["op"] == op).unwrap()["dtype"];
    assert_eq!((dtype("gradient_norm"), dtype("adamw")), (&json!("f32"), &json!("bf16")));
}

#[test]
fn a_prediction_needs_no_device() {
    let output = bench("--predict --preset 9m", &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["9m in bf16", "NVIDIA H200", "predicted, not measured", "datasheet", "4.8 TB/s"] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    assert!(text.contains("M=65536 N=384 K=128"), "256 x 256 tokens:\n{text}");
    let more = answer("--predict --preset 9m --set train.micro_batch=4 --dtype f32 --json");
    assert_eq!((&more["micro_batch"], &more["dtype"]), (&json!(4), &json!("f32")));
    assert!(more["roofs"][0]["tokens_per_second"].is_f64());
}

#[test]
fn the_products_of_a_model_are_reckoned_and_ranked_without_a_device() {
    let report = answer("gemm --predict --preset 130m --json");
    let rows = report["products"].as_array().unwrap();
    let number = |row: &Value, name: &str| row[name].as_f64().unwrap();
    let peak = number(&report, "flops_per_second");
    let mut logarithms = 0.0;
    for row in rows {
        let [m, n, k] = ["m", "n", "k"].map(|name| number(row, name));
        assert_eq!(number(row, "flops"), 2.0 * m * n * k);
        let (share, fill) = (number(row, "share"), number(row, "fill"));
        assert!(share > 0.05 && share <= 0.8 && fill <= 1.0 && share <= fill, "{row}");
        assert_close(
            "share",
            &[share],
            &[2e6 * m * n * k / number(row, "microseconds") / peak],
            1e-9,
        );
        assert!(number(row, "shared_bytes") <= 232_448.0, "{row}");
        logarithms += share.ln();
    }
    let mean = (logarithms / rows.len() as f64).exp();
    assert_close("mean", &[number(&report, "mean_share")], &[mean], 1e-12);
    assert!(rows.is_sorted_by(|a, b| number(a, "share") <= number(b, "share")));
    let find = |tokens: u64, layout: &str, sizes: [u64; 3]| {
        let [m, n, k] = sizes;
        let is = |row: &&Value| {
            row["tokens"] == tokens
                && row["layout"] == layout
                && [&row["m"], &row["n"], &row["k"]] == [&json!(m), &json!(n), &json!(k)]
        };
        rows.iter().find(is).unwrap_or_else(|| panic!("no {layout} {sizes:?} of {tokens} tokens"))
    };
    // Twelve blocks: q, k and v forward, and the gradients of their inputs and weights.
    assert_eq!(find(16384, "nt", [16384, 2304, 768])["launches"], 12);
    assert_eq!(find(32768, "nn", [32768, 768, 2304])["launches"], 12);
    let weight = find(65536, "tn", [768, 768, 65536]);
    assert!(weight["splits"].as_u64().unwrap() > 1, "18 tiles at most for 132: {weight}");

    let output = bench("gemm --predict --preset 60m --set train.recompute=block", &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["**not timed**", "gemm_sm90_tn_", "60m", "geometric mean", "989.5 TFLOP/s"] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
}

#[test]
fn wrong_arguments_of_bench_are_refused() {
    let refused = [
        ("norms", &[][..], &["norms", "norm"][..]),
        ("gemm --product 1,2", &[], &["3 sizes"]),
        ("attention --attention 1,2,3,4", &[], &["5 sizes"]),
        ("gemm --layout tt", &[], &["--layout", "nt"]),
        ("gemm --family sm100", &[], &["--family", "sm90"]),
        ("norm --rows 0", &[], &["--rows"]),
        ("norm --product 8,8,8", &[], &["--product is of gemm", "bench gemm"]),
        ("gemm --rows 8", &[], &["--rows is of norm and loss", "bench norm"]),
        ("adamw --preset 9m", &[], &["--preset is of step"]),
        ("step --preset 8m --device simt", &[], &["8m", "9m"]),
        ("norm --order last", &[], &["--order", "fifo"]),
        ("norm --device cpu", &[], &["device cpu", "--device simt"]),
        ("norm --device simt", &[("SIMT_SEED", "first")], &["SIMT_SEED", "`first`"]),
        ("norm --predict", &[], &["--predict measures nothing"]),
        ("gemm --predict --preset 8m", &[], &["8m", "9m"]),
        ("gemm --predict --rows 8", &[], &["--rows is of norm"]),
        ("--predict --race", &[], &["--predict measures nothing"]),
        ("--predict --rows 8", &[], &["--rows is of norm"]),
        ("--predict --preset 8m", &[], &["8m", "9m"]),
        ("--predict --set model.vocab=0", &[], &["vocabulary is not known", "model.vocab"]),
    ];
    for (arguments, variables, parts) in refused {
        let output = bench(arguments, variables);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments}: {text}");
        for part in parts {
            assert!(text.contains(part), "{arguments}: `{part}` is missing in:\n{text}");
        }
    }
}

#[test]
fn sizes_say_in_words_what_json_says() {
    let step = Sizes::Step {
        preset: "1b".to_string(),
        b: 8,
        s: 2048,
        grad_accumulation: 4,
        model: Box::new(small_model()),
        optimizer: Box::new(run_config(&small_model()).optimizer),
    };
    assert_eq!(step.to_string(), "1b 4 x B=8 S=2048");
    let product = Sizes::Product { m: 1, n: 2, k: 3 };
    assert_eq!(serde_json::to_value(&product).unwrap(), json!({"M": 1, "N": 2, "K": 3}));
}
