//! src/predict: what a training step and its products cost, and how long they are estimated to
//! take.

use isobath::Error;
use isobath::bench::{Machine, StepRequest};
use isobath::config::{Attention, Config, Dtype, Master, NormKind, Placement, Recompute};
use isobath::cuda::gemm::tuned::Table;
use isobath::cuda::gemm::{self, Epilogue, Layout};
use isobath::cuda::host::{Host, Options};
use isobath::cuda::norm::Norm;
use isobath::cuda::peaks::{self, MATMUL_PEAKS, MatmulPeaks};
use isobath::cuda::{Cuda, DevicePointer, Fusion};
use isobath::engine::{Plan, Rows, Trainer};
use isobath::model::init::initial_parameters;
use isobath::plan::PlanReport;
use isobath::predict::cost::Cost;
use isobath::predict::{
    FusionTime, GemmPrediction, GemmRow, Kernel, KernelFamily, Prediction, Sizes, StepProduct,
};
use serde_json::{Value, json};

use crate::bench::{answer, bench, open, skipped};
use crate::cuda::counting::{Counting, Counts};
use crate::support::{assert_close, run_config, small_model, tokens};

/// Bytes of what no benchmark counts in bytes.
#[test]
fn products_and_attention_have_bytes_too() {
    let nt = |output| Cost::product(Layout::Nt, Dtype::Bf16, [128, 64, 72], output).bytes;
    let factors = (128 * 72 + 64 * 72) * 2;
    use gemm::Output::{Accumulate, Store};
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

/// Dense figures are 16 times those of fp32 on machines for computing (32 from Blackwell on), 4
/// times on those for workstations, and twice on GeForce, which sums half as fast in fp32; with
/// sparsity it would be twice as much.
#[test]
fn peaks_are_dense_and_each_machine_has_one() {
    for (at, peaks) in MATMUL_PEAKS.iter().enumerate() {
        let ratio = peaks.flops_per_second(Dtype::Bf16) / peaks.flops_per_second(Dtype::F32);
        let expected = match peaks.name {
            name if name.contains("GeForce") => 2.0,
            "NVIDIA B200" => 32.0,
            name if ["A10", "A40", "L4", "RTX"].iter().any(|it| name.contains(it))
                && !name.contains("A100") =>
            {
                4.0
            }
            _ => 16.0,
        };
        // The clock at which a datasheet counts tensor cores may be lower.
        assert!((0.85..1.01).contains(&(ratio / expected)), "{}: {ratio}", peaks.name);
        assert_eq!(MatmulPeaks::of(peaks.name), Some(&MATMUL_PEAKS[at]), "{} twice", peaks.name);
        assert!(peaks.source.contains("NVIDIA") && peaks.source.contains("bf16"), "{}", peaks.name);
    }
    for machine in peaks::MACHINES {
        assert_eq!(MatmulPeaks::of(machine.name), Some(&machine.matmul));
    }
}

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

fn sum(prediction: &Prediction, of: impl Fn(&Kernel) -> bool) -> u64 {
    let kernels = prediction.kernels.iter().filter(|kernel| of(kernel));
    kernels.map(|kernel| kernel.launches * kernel.cost.flops).sum()
}

#[test]
fn a_prediction_multiplies_as_often_as_the_plans_formula_says() {
    let large = StepRequest::default().resolve(Machine::Gpu, None).unwrap();
    for config in [unpadded(), large] {
        let prediction = Prediction::new(&config).unwrap();
        let plan = PlanReport::new(&config).unwrap();
        let tokens = plan.tokens_per_step;
        let products = sum(&prediction, |kernel| kernel.cost.op.starts_with("gemm"));
        assert_eq!(products, 6 * plan.matmul_parameters * tokens, "{}", config.name);
        let attention = plan.flops_per_token * tokens - products;
        // Of the formula's 6 L S C, 2 are forward; backward has one product more than the 4.
        assert_eq!(3 * sum(&prediction, |kernel| kernel.cost.op == "attention_forward"), attention);
        assert_eq!(
            6 * sum(&prediction, |kernel| kernel.cost.op == "attention_backward"),
            5 * attention
        );
        assert_eq!(prediction.flops, products + attention / 6 * 7);

        let recomputing = |level| {
            let mut config = config.clone();
            config.train.recompute = level;
            Prediction::new(&config).unwrap()
        };
        let [norms, attention, block] =
            [Recompute::Norms, Recompute::Attention, Recompute::Block].map(recomputing);
        // Norms multiply nothing; attention has q, k, v and itself again; a block all of its
        // forward pass but for its last product, whose result nobody reads.
        let per_token = |weights: usize| 2 * (weights * config.model.layers) as u64 * tokens;
        let (c, f) = (config.model.hidden, config.model.ffn);
        let qkv = c * (config.model.heads + 2 * config.model.kv_heads) * config.model.head_dim();
        assert_eq!(norms.flops, prediction.flops);
        let forward = |it: &Prediction| sum(it, |kernel| kernel.cost.op == "attention_forward");
        let again = per_token(qkv) + forward(&prediction);
        assert_eq!(attention.flops, prediction.flops + again, "{}", config.name);
        let again = again + per_token(c * c + 2 * f * c);
        assert_eq!(block.flops, prediction.flops + again, "{}", config.name);
        assert_eq!(forward(&block), 2 * forward(&prediction));
        let milliseconds =
            [&prediction, &norms, &attention, &block].map(|it| it.estimates.datasheet.milliseconds);
        assert!(milliseconds.is_sorted_by(|a, b| a < b), "{milliseconds:?}");
    }
}

#[test]
fn a_prediction_adds_up_and_stays_below_the_peak() {
    let config = StepRequest { preset: Some("130m".to_string()), ..Default::default() };
    let config = config.resolve(Machine::Gpu, None).unwrap();
    let prediction = Prediction::new(&config).unwrap();
    let estimates = prediction.estimates.clone();
    let (datasheet, Some(measured), Some(expected)) =
        (estimates.datasheet, estimates.measured, estimates.expected)
    else {
        panic!("{prediction}")
    };
    let of_expected = |kernel: &Kernel| kernel.microseconds.expected.unwrap();
    let bytes: u64 = prediction.kernels.iter().map(|it| it.launches * it.cost.bytes).sum();
    assert_eq!(prediction.bytes, bytes);
    let at_datasheet: fn(&Kernel) -> f64 = |kernel| kernel.microseconds.datasheet;
    let at_measured: fn(&Kernel) -> f64 = |kernel| kernel.microseconds.measured.unwrap();
    for (bound, microseconds) in [(&datasheet, at_datasheet), (&measured, at_measured)] {
        let mut milliseconds = 0.0;
        for kernel in &prediction.kernels {
            // 16 on each multiprocessor in a clock, in which tensor cores do 4096 FLOPs.
            let exponentials = kernel.cost.exponentials as f64 / (989.5e12 / 256.0);
            let moving = kernel.cost.bytes as f64 / bound.bytes_per_second;
            let multiplying = kernel.cost.flops as f64 / bound.flops_per_second;
            let least = moving.max(multiplying).max(exponentials);
            assert!((microseconds(kernel) / (least * 1e6) - 1.0).abs() < 1e-12);
            milliseconds += kernel.launches as f64 * least * 1e3;
        }
        assert!((bound.milliseconds / milliseconds - 1.0).abs() < 1e-9);
        let tokens_per_second = prediction.tokens_per_step as f64 / bound.milliseconds * 1e3;
        assert!((bound.tokens_per_second / tokens_per_second - 1.0).abs() < 1e-12);
        let mfu = prediction.flops_per_token as f64 * tokens_per_second / 989.5e12;
        assert!((bound.mfu / mfu - 1.0).abs() < 1e-12);
    }
    assert!(measured.mfu < datasheet.mfu && datasheet.mfu < 1.0);
    assert!(expected.mfu < measured.mfu, "{} of {}", expected.mfu, measured.mfu);
    // Bytes at 78 % of the datasheet's and 2 us for each kernel; products as they are listed by
    // themselves, and so much.
    for (op, kernels) in [("norm_forward", 1.0), ("norm_backward", 2.0), ("loss_backward", 1.0)] {
        let kernel = prediction.kernels.iter().find(|kernel| kernel.cost.op == op).unwrap();
        let microseconds = kernel.cost.bytes as f64 / (0.78 * 4.8e12) * 1e6 + 2.0 * kernels;
        assert!((of_expected(kernel) / microseconds - 1.0).abs() < 1e-12, "{op}");
    }
    let products = GemmPrediction::new(&["130m".to_string()], &[], &[]).unwrap().products;
    for kernel in prediction.kernels.iter().filter(|it| it.cost.product.is_some()) {
        let Sizes::Product { m, n, k } = kernel.cost.sizes else { panic!("{}", kernel.cost.what) };
        let listed = products.iter().find(|row| {
            let product = row.product;
            let of = (product.layout, product.epilogue, product.sizes());
            (row.tokens, of.2, Some((of.0, of.1))) == (16_384, [m, n, k], kernel.cost.product)
        });
        let microseconds =
            listed.unwrap_or_else(|| panic!("{}", kernel.cost.what)).microseconds + 2.0;
        assert!((of_expected(kernel) / microseconds - 1.0).abs() < 1e-12, "{}", kernel.cost.what);
    }
    let sum: f64 =
        prediction.kernels.iter().map(|it| it.launches as f64 * of_expected(it) / 1e3).sum();
    assert!((expected.milliseconds / sum - 1.0).abs() < 1e-12);
    // Of each parameter, once a step; 512 rows are eight micro-batches.
    let find = |op| prediction.kernels.iter().find(|kernel| kernel.cost.op == op).unwrap();
    let stored = PlanReport::new(&config).unwrap().stored_elements;
    assert_eq!((find("adamw").launches, find("adamw").cost.bytes), (1, 30 * stored));
    assert_eq!((find("gradient_norm").launches, find("gradient_norm").cost.bytes), (1, 4 * stored));
    assert_eq!(find("attention_backward").launches, 8 * 12);
    let mut narrow = config.clone();
    narrow.optimizer.moments = Dtype::Bf16;
    let narrow = Prediction::new(&narrow).unwrap();
    assert_eq!(prediction.bytes - narrow.bytes, 8 * stored, "moments in bf16");
    let mut halves = config.clone();
    halves.optimizer.master = Master::Split;
    let halves = Prediction::new(&halves).unwrap();
    assert_eq!(prediction.bytes - halves.bytes, 2 * stored, "parameters in halves");
    let mut offloads = config.clone();
    offloads.optimizer.offload = true;
    let offloads = Prediction::new(&offloads).unwrap();
    assert_eq!(offloads.bytes - prediction.bytes, 16 * stored, "moments come and go");
    let adamw = offloads.kernels.iter().find(|kernel| kernel.cost.op == "adamw").unwrap();
    assert_eq!((adamw.cost.link_bytes, adamw.bound), (8 * stored, "host link"));
    for microseconds in [at_datasheet(adamw), at_measured(adamw)] {
        let least = 8.0 * stored as f64 / 64e9 * 1e6;
        assert!((microseconds / least - 1.0).abs() < 1e-12, "{microseconds} {least}");
    }

    let without = Prediction::new(&Config { dtype: Dtype::F32, ..config }).unwrap();
    assert_eq!(without.estimates.iter().count(), 1, "nobody measured fp32 products");
    let odd = StepRequest { preset: Some("40m".to_string()), ..Default::default() };
    let error = Prediction::new(&odd.resolve(Machine::Gpu, None).unwrap()).unwrap_err();
    assert!(matches!(&error, Error::Config { what, .. } if what.contains("head dim of 52")));
}

/// Of attention of one head dim and length, 16384 tokens of a hidden size of 2048 for each: what is
/// expected, and the TFLOP/s that were published.
#[test]
fn what_is_expected_of_attention_is_near_what_was_published() {
    let expected = |op: &str, head_dim: usize, sequence: usize| {
        let (heads, tokens) = (2048 / head_dim, 16_384);
        let sets = [
            "model.layers=1".to_string(),
            format!("model.heads={heads}"),
            format!("model.kv_heads={heads}"),
            format!("model.max_sequence={sequence}"),
            format!("data.sequence={sequence}"),
            format!("train.micro_batch={}", tokens / sequence),
        ];
        let step = StepRequest { sets: sets.to_vec(), ..Default::default() };
        let prediction = Prediction::new(&step.resolve(Machine::Gpu, None).unwrap()).unwrap();
        let kernel = prediction.kernels.iter().find(|kernel| kernel.cost.op == op).unwrap();
        kernel.cost.flops as f64 / kernel.microseconds.expected.unwrap() / 1e6
    };
    // FlashAttention-3 on an H100; the last one, cuDNN's with grouped heads on an H200, is what the
    // model was fitted to.
    for (op, head_dim, sequence, published) in [
        ("attention_forward", 64, 16_384, 473.0),
        ("attention_forward", 128, 16_384, 616.0),
        ("attention_forward", 64, 2048, 371.0),
        ("attention_forward", 128, 2048, 521.0),
        ("attention_backward", 128, 8192, 541.0),
    ] {
        let found = expected(op, head_dim, sequence);
        println!("{op} {head_dim} {sequence}: {found:.0} expected, {published} published");
        assert!((found / published - 1.0).abs() < 0.12, "{op} {head_dim} {sequence}: {found}");
    }
}

/// What lies between two ops is stored and read once more, by so many kernels more.
#[test]
fn a_prediction_says_what_each_fusion_is_worth() {
    let config = unpadded();
    let prediction = Prediction::new(&config).unwrap();
    let (model, train) = (&config.model, &config.train);
    let tokens = train.micro_batch * config.data.sequence;
    let passes = (model.layers * train.grad_accumulation) as u64;
    let rotated = (model.heads + model.kv_heads) * model.head_dim();
    let bf16 = |columns: usize| (2 * tokens * columns) as u64;
    // A residual would be read where its product is stored, anyway.
    let expected = [
        (Fusion::Residual, 2, 2 * (3 - 1) * bf16(model.hidden)),
        (Fusion::Rotary, 1, 2 * bf16(rotated)),
        (Fusion::SwiGlu, 1, bf16(2 * model.ffn)),
        (Fusion::SwiGluBackward, 1, 2 * bf16(model.ffn)),
        (Fusion::RotaryBackward, 1, 2 * bf16(rotated)),
    ];
    let found: Vec<_> =
        prediction.fusions.iter().map(|it| (it.fusion, it.more_launches, it.more_bytes)).collect();
    assert_eq!(
        found,
        expected.map(|(it, launches, bytes)| (it, launches * passes, bytes * passes))
    );
    for FusionTime { fusion, more_bytes, more_milliseconds, .. } in &prediction.fusions {
        assert!(more_milliseconds.expected.is_some());
        let (more, bounds) = (more_milliseconds, &prediction.estimates);
        let measured = (more.measured.unwrap(), bounds.measured.as_ref().unwrap());
        // Where the products' time hides their bytes, all of the new kernel's come on top.
        for (more, bound) in [(more.datasheet, &bounds.datasheet), measured] {
            let least = *more_bytes as f64 / bound.bytes_per_second * 1e3;
            assert!(more >= 0.999 * least, "{fusion}: {more} ms, {least} for the bytes");
        }
    }
    let text = prediction.to_string();
    assert!(text.contains("a step without"), "{text}");
    for fusion in Fusion::ALL.iter() {
        assert!(text.contains(&format!("\n{fusion} ")), "{fusion} is missing in:\n{text}");
    }
    let f32 = Prediction::new(&Config { dtype: Dtype::F32, ..config }).unwrap();
    let more: Vec<u64> = f32.fusions.iter().map(|it| it.more_launches).collect();
    assert_eq!(more, [2 * passes, 0, 0, 0, 0], "the kernels for f32 add a residual, and no more");
}

#[test]
fn every_kernel_of_every_placement_is_of_a_family() {
    for (placement, norm) in
        Placement::NAMES.iter().flat_map(|it| [(it, NormKind::Rms), (it, NormKind::Layer)])
    {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let mut config = Config { dtype, ..unpadded() };
            config.model.placement = placement.parse().unwrap();
            config.model.norm = norm;
            let prediction = Prediction::new(&config).unwrap();
            let launches: u64 = prediction.kernels.iter().map(|it| it.launches).sum();
            let of_families: u64 = prediction.families.iter().map(|it| it.launches).sum();
            assert_eq!(launches, of_families, "{placement} {norm} {dtype}");
            assert!(prediction.families.iter().all(|it| it.launches > 0), "{placement} {dtype}");
        }
    }
}

/// How the kernels of an op begin; the op after a name that several of them share.
const KERNELS: [(&str, &str); 18] = [
    ("gemm_sm90_nt_128", "gemm_nt"),
    ("gemm_sm90_nt_rotary_", "gemm_nt_rotary"),
    ("gemm_sm90_nt_swiglu_", "gemm_nt_swiglu"),
    ("gemm_sm90_nn_128", "gemm_nn"),
    ("gemm_sm90_nn_swiglu_", "gemm_nn_swiglu"),
    ("gemm_sm90_tn_", "gemm_tn"),
    ("norm_forward_", "norm_forward"),
    ("norm_backward_bf16_", "norm_backward"),
    ("norm_backward_gain", "norm_backward"),
    ("rotary_", "rotary"),
    ("swiglu_forward_", "swiglu_forward"),
    ("attention_forward_", "attention_forward"),
    ("attention_backward_short_", "attention_backward"),
    ("embedding_forward", "embedding_forward"),
    ("embedding_backward_", "embedding_backward"),
    ("loss_backward_", "loss_backward"),
    ("adamw_norm_", "gradient_norm"),
    ("adamw_update", "adamw"),
];

/// Rotary embedding has two ops, and one kernel for both.
fn is(op: &str, name: &str) -> bool {
    op == name || name == "rotary" && op.starts_with("rotary_")
}

#[test]
fn a_prediction_lists_what_a_training_step_launches() {
    if skipped() {
        return;
    }
    let levels = Recompute::NAMES.iter().map(|name| (name.parse().unwrap(), Attention::Row));
    for (recompute, attention) in levels.chain([(Recompute::None, Attention::Document)]) {
        let mut config = unpadded();
        config.train.recompute = recompute;
        config.data.attention = attention;
        let counts = Counts::default();
        let host = Host::new(Options::default()).unwrap();
        let driver = Box::new(Counting { counts: counts.clone(), ..Counting::new(host) });
        let backend = Cuda::new(driver, config.dtype, None).unwrap().with_graphs(false);
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
            kernels.filter(|it| is(it.cost.op, op)).map(|it| it.launches).sum()
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
                ops.iter().any(|op| is(kernel.cost.op, op)),
                "{} is not launched",
                kernel.cost.op
            );
        }
    }
}

#[test]
fn every_kernel_of_this_build_is_of_a_family() {
    if skipped() {
        return;
    }
    let names = open().unwrap().kernel_names();
    let names = names.iter().filter(|name| !name.starts_with("conform"));
    let families: Vec<&str> = names.map(|name| KernelFamily::of(name).name()).collect();
    // Each has some.
    for family in KernelFamily::NAMES {
        assert!(families.contains(family), "{family}: {families:?}");
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
    assert!(more["estimates"]["datasheet"]["tokens_per_second"].is_f64());
}

#[test]
fn the_products_of_a_model_are_estimated_and_ranked_without_a_device() {
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
    assert!(rows.is_sorted_by(|a, b| number(a, "milliseconds") >= number(b, "milliseconds")));
    for row in rows {
        let all = number(row, "launches") * number(row, "microseconds") / 1e3;
        assert_close("milliseconds", &[number(row, "milliseconds")], &[all], 1e-9);
        assert!(row["timed_microseconds"].is_null(), "{row}");
    }
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
    let row =
        text.lines().find(|line| line.contains("nn_swiglu") && line.contains("65536")).unwrap();
    // Stages, KiB of shared memory, MB and GFLOP stand in it, what holds it up, and that nobody
    // timed.
    for part in [" memory ", "  never", " 224 ", " 789.9 "] {
        assert!(row.contains(part), "`{part}` is missing in: {row}");
    }
}

/// No product is estimated to be faster than its FLOPs at the datasheet's rate, or than its bytes
/// at the rate that a copy has reached. Some, fewer than half, take as long as their bytes.
#[test]
fn no_product_is_estimated_faster_than_its_bytes_or_its_flops() {
    let prediction = GemmPrediction::new(&[], &[], &[]).unwrap();
    assert_eq!(prediction.bytes_per_second, 4.3e12);
    let mut held_up = 0;
    for row in &prediction.products {
        let moving = row.bytes as f64 / prediction.bytes_per_second * 1e6;
        let multiplying = row.flops as f64 / prediction.flops_per_second * 1e6;
        // What is added to is read and written, whatever else there is.
        let StepProduct { layout, epilogue, m, n, k, .. } = row.product;
        let result = match (layout, epilogue) {
            (Layout::Tn, _) => 8 * m * n,
            (Layout::Nn, Epilogue::SwiGlu) => 8 * m * n,
            (Layout::Nt, Epilogue::SwiGlu) => 3 * m * n,
            (_, Epilogue::Addend) => 4 * m * n,
            _ => 2 * m * n,
        };
        let least = (2 * (m * k + n * k) + result) as u64;
        assert!((least..=least + least / 20).contains(&row.bytes), "{row:?}");
        assert!(row.microseconds >= moving && row.microseconds >= multiplying, "{row:?}");
        held_up += usize::from(row.microseconds == moving && row.bound() == "memory");
    }
    assert!(held_up > 0 && held_up < prediction.products.len() / 2, "{held_up} are held up");
    let of_60m = |row: &&GemmRow| {
        let sizes = row.product.sizes();
        row.op == "gemm_nn_swiglu" && row.preset == "60m" && sizes[0] == 65536
    };
    let gradient = prediction.products.iter().find(of_60m).unwrap();
    assert!(gradient.microseconds >= 164.6, "its bytes at the datasheet's 4.8 TB/s: {gradient:?}");
}

/// The head of every vocabulary in one list, what else the models have once; rows of the logits are
/// stored as wide as a multiple of 8.
#[test]
fn heads_of_several_vocabularies_are_estimated() {
    let rows = |vocabs: &[usize]| {
        let presets = ["130m".to_string()];
        GemmPrediction::new(&presets, &[], vocabs).unwrap().products
    };
    let vocabs = [32100, 50257, 128256];
    let (all, first) = (rows(&vocabs), rows(&vocabs[..1]));
    let of_head = |rows: &[GemmRow], vocab| -> usize {
        rows.iter().filter(|row| row.product.sizes().contains(&vocab)).count()
    };
    for vocab in [32104, 50264, 128256] {
        // Each layout, of whole chunks at least.
        assert!(of_head(&all, vocab) >= 9, "{vocab}: {}", of_head(&all, vocab));
    }
    let others = |rows: &[GemmRow]| rows.len() - of_head(rows, 50264) - of_head(rows, 128256);
    assert_eq!(others(&all), first.len());
}

/// What was timed on an H200 is what is predicted, and its time stands beside the cost model's.
#[test]
fn a_prediction_says_what_has_been_timed() {
    let text = r#"
[[machine]]
name = "NVIDIA H200"
multiprocessors = 132
driver = "13.0"
commit = ""
products = [
  { family = "sm90", layout = "nt", epilogue = "swiglu", m = 16384, n = 2816, k = 512, best = { kernel = "gemm_sm90_nt_swiglu_128x128", splits = 1, cluster = 2, microseconds = 77.25 }, model = { kernel = "gemm_sm90_nt_swiglu_128x192", splits = 1, cluster = 1, microseconds = 80.0 } },
]
"#;
    let mut table: Table = text.parse().unwrap();
    let presets = ["60m".to_string()];
    let untimed = GemmPrediction::with_table(&presets, &[], &[], &Table::default()).unwrap();
    let of = |prediction: &GemmPrediction| {
        let is = |row: &&GemmRow| row.op == "gemm_nt_swiglu" && row.tokens == 16384;
        prediction.products.iter().find(is).unwrap().clone()
    };
    let sizes = of(&untimed).product.sizes();
    let timed = &mut table.machines[0].products[0];
    (timed.m, timed.n, timed.k) = (sizes[0], sizes[1], sizes[2]);
    table.check().unwrap();
    let prediction = GemmPrediction::with_table(&presets, &[], &[], &table).unwrap();
    let row = of(&prediction);
    assert_eq!((row.kernel, row.cluster), ("gemm_sm90_nt_swiglu_128x128", 2));
    assert_eq!(row.timed_microseconds, Some(77.25));
    assert!(row.to_string().ends_with("  77.2 us") || row.to_string().ends_with("  77.3 us"));
    let others = prediction.products.iter().filter(|it| it.timed_microseconds.is_none()).count();
    assert_eq!(others, prediction.products.len() - 1);
    table.machines[0].name = "NVIDIA H100 80GB HBM3".to_string();
    let elsewhere = GemmPrediction::with_table(&presets, &[], &[], &table).unwrap();
    assert_eq!(of(&elsewhere).timed_microseconds, None);
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
