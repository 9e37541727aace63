//! What `isobath bench` measures, predicts and refuses.

use std::process::Output;

use isobath::bench::{
    self, AdamwRequest, AttentionRequest, Benchmark, GemmRequest, LossRequest, Machine,
    NormRequest, ProductsRequest, Request, StepRequest, TimedStepRequest, Unit,
};
use isobath::config::{Dtype, NormKind};
use isobath::cuda::gemm::tuned::Table;
use isobath::cuda::gemm::{self, Epilogue, Gemm, Layout};
use isobath::cuda::host::{self, Host, Options};

use isobath::cuda::peaks::{self, MatmulPeaks, Peaks};
use isobath::cuda::{Driver, Family, Fusion};

use isobath::predict::{Kernel, KernelFamily, Prediction, StepProduct};
use isobath::{Error, Result};
use serde_json::{Value, json};

use crate::cuda::counting::{Calls, Counting};
use crate::support::{assert_close, isobath};

pub fn open() -> Result<Box<dyn Driver>> {
    Ok(Box::new(Host::new(Options::default())?))
}

fn timed(benchmarks: Vec<Benchmark>, dtype: Option<Dtype>) -> Request {
    Request { benchmarks, options: bench::Options { dtype, samples: Some(4) } }
}

const GEMM: GemmRequest = GemmRequest { product: Some([128, 64, 72]), layout: None, family: None };
const ATTENTION: AttentionRequest =
    AttentionRequest { shape: Some([2, 40, 4, 2, 32]), family: None };
const NORM: NormRequest = NormRequest { kind: None, rows: Some(16), columns: Some(64) };
const LOSS: LossRequest = LossRequest { rows: Some(16), vocab: Some(80) };
const ADAMW: AdamwRequest = AdamwRequest { elements: Some(3000) };

fn step(step: StepRequest) -> Benchmark {
    Benchmark::Step(TimedStepRequest { step, without: vec![] })
}

fn all_small() -> Request {
    let step = step(StepRequest::default());
    let kernels = [
        Benchmark::Gemm(GEMM),
        Benchmark::Attention(ATTENTION),
        Benchmark::Norm(NORM),
        Benchmark::Loss(LOSS),
        Benchmark::Adamw(ADAMW),
    ];
    timed(kernels.into_iter().chain([step]).collect(), None)
}

/// Whether there is no simt here, which the test then says.
pub fn skipped() -> bool {
    host::present().inspect_err(|error| println!("skipped: {error}")).is_err()
}

/// Runs on simt and checks the arithmetic of every row.
fn amounts(benchmark: Benchmark, dtype: Dtype) -> Vec<u64> {
    let report = bench::run(open, &timed(vec![benchmark], Some(dtype)), |_| ()).unwrap();
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
        3 * activations + 5 * gain + statistics,
        4 * activations + 5 * gain + statistics,
    ];
    assert_eq!(amounts(Benchmark::Norm(NORM), Dtype::Bf16), expected);
    let layer_norm = NormRequest { kind: Some(NormKind::Layer), ..NORM };
    let expected = [
        4 * activations + gain + 2 * statistics,
        6 * activations + 5 * gain + 2 * statistics,
        8 * activations + 5 * gain + 2 * statistics,
    ];
    assert_eq!(amounts(Benchmark::Norm(layer_norm), Dtype::F32), expected);

    let work = 2 * 128 * 64 * 72;
    let products = |request| amounts(Benchmark::Gemm(request), Dtype::Bf16);
    assert_eq!(products(GEMM), [work; 3], "every layout");
    assert_eq!(products(GemmRequest { layout: Some(Layout::Tn), ..GEMM }), [work]);
    let family = Some(Family::Sm90);
    assert_eq!(products(GemmRequest { family, ..GEMM }), [work; 3], "every layout");
    assert_eq!(amounts(Benchmark::Gemm(GEMM), Dtype::F32), [work; 3]);

    // Those that are not asked for by size: three layouts, then what is fused, of 256 each way.
    let all = GemmRequest { product: None, ..GEMM };
    assert_eq!(products(all.clone()), [2 * 256 * 256 * 256; 7]);
    let fused = products(GemmRequest { family: Some(Family::Sm80), ..all }).len() - 3;
    assert_eq!(fused, 1, "an addend alone");

    // Two products, and five, of 2 B H S^2 D; the causal half of each. Five in two passes, in one
    // in order and in any, and in one of short rows; at last all seven.
    let square = 2 * 4 * 40 * 40 * 32;
    let [five, seven] = [5, 7].map(|products| products * square);
    let expected = [2 * square, five, five, five, five, seven];
    assert_eq!(amounts(Benchmark::Attention(ATTENTION), Dtype::Bf16), expected);
    let expected = [2 * square, five, seven];
    assert_eq!(amounts(Benchmark::Attention(ATTENTION), Dtype::F32), expected);

    let logits = 16 * 80 * 2;
    let losses = |request| amounts(Benchmark::Loss(request), Dtype::Bf16);
    assert_eq!(losses(LOSS), [logits + 2 * 4 * 16, 2 * logits + 2 * 4 * 16 + 4]);
    // A cluster holds the row; after the largest, all tiles but the last are read twice.
    let gradient = |vocab| losses(LossRequest { rows: Some(1), vocab: Some(vocab) })[1];
    assert_eq!(gradient(131_080), 2 * 2 * 131_080 + 2 * 4 + 4);
    assert_eq!(gradient(524_296), (2 * 524_296 + 524_288) * 2 + 2 * 4 + 4);
    assert_eq!(
        amounts(Benchmark::Adamw(ADAMW), Dtype::Bf16),
        [4 * 3000, 30 * 3000, 22 * 3000, 28 * 3000, 20 * 3000]
    );
    let expected = [4 * 3000, 28 * 3000, 20 * 3000];
    assert_eq!(amounts(Benchmark::Adamw(ADAMW), Dtype::F32), expected);
}

#[test]
fn a_training_step_counts_its_formula_in_each_type() {
    if skipped() {
        return;
    }
    let sets = ["model.layers=1", "data.sequence=32", "train.grad_accumulation=3"];
    let sets = sets.map(String::from).to_vec();
    let small = step(StepRequest { sets, ..Default::default() });
    for dtype in [Dtype::Bf16, Dtype::F32] {
        // hidden 64, ffn 176, 2 heads of 32 and one for keys and values, 512 tokens
        let matmuls = (2 + 2) * 32 * 64 + 64 * 64 + 3 * 176 * 64 + 512 * 64;
        let tokens = 3 * 2 * 32;
        assert_eq!(amounts(small.clone(), dtype), [6 * (matmuls + 32 * 64) * tokens]);
        let report = bench::run(open, &timed(vec![small.clone()], Some(dtype)), |_| ()).unwrap();
        let row = &report.rows[0];
        let seconds = row.median_microseconds * 1e-6;
        let details = row.step.as_ref().unwrap();
        let tokens_per_second = details.tokens_per_second;
        assert!((tokens_per_second * seconds / tokens as f64 - 1.0).abs() < 1e-12);
        assert!(report.copy.is_none(), "no row counts bytes");
    }
}

/// Whoever ends a run early has seen what it measured.
#[test]
fn each_row_is_told_when_it_has_been_timed() {
    if skipped() {
        return;
    }
    let mut told = vec![];
    let request = all_small();
    let report = bench::run(open, &request, |row| told.push(row.clone())).unwrap();
    // A step first without its kernels, which take as long again.
    let steps: Vec<bool> =
        told.iter().filter(|row| row.op == "step").map(|row| row.step.is_some()).collect();
    assert_eq!(steps, [false, true]);
    told.retain(|row| row.op != "step" || row.step.is_some());
    let key = |row: &bench::Row| (row.what.clone(), row.median_microseconds.to_bits());
    let told: Vec<_> = told.iter().map(key).collect();
    assert_eq!(told, report.rows.iter().map(key).collect::<Vec<_>>());
    let output = bench("norm --device simt --samples 1 --rows 8 --columns 64 --json", &[]);
    let lines = String::from_utf8(output.stderr).unwrap();
    assert_eq!(lines.lines().filter(|line| line.contains("T=8 C=64")).count(), 3, "{lines}");
}

/// No sample begins while the device waits for the host: launches and events are enqueued without a
/// pause, after launches that do not count.
#[test]
fn samples_follow_each_other_without_a_gap() {
    if skipped() {
        return;
    }
    let calls = Calls::default();
    let open = || -> Result<Box<dyn Driver>> {
        let host = Host::new(Options::default())?;
        Ok(Box::new(Counting { calls: calls.clone(), ..Counting::new(host) }))
    };
    bench::run(open, &timed(vec![Benchmark::Loss(LOSS)], None), |_| ()).unwrap();
    let calls = calls.borrow().join(" ");
    // Forward, backward, and the copy that they are compared with.
    let pass = "launch event ".repeat(5);
    let times = "elapsed ".repeat(4);
    assert_eq!(calls.matches(&format!("{pass}{times}synchronize")).count(), 2, "{calls}");
    assert_eq!(calls.matches("event").count(), 15, "{calls}");
}

#[test]
fn percentages_are_those_of_the_ceilings() {
    if skipped() {
        return;
    }
    let mut report = bench::run(open, &all_small(), |_| ()).unwrap();
    let row = |op| report.rows.iter().find(|row| row.op == op).unwrap().clone();
    let mut product = row("gemm_nt");
    product.per_second = 494.75e12;
    product.compare(report.copy.as_ref(), Some(&peaks::H200.matmul));
    assert_eq!((product.percent_of_peak, product.percent_of_copy), (Some(50.0), None));
    product.dtype = Dtype::F32;
    product.compare(None, Some(&peaks::H200.matmul));
    assert_eq!(product.percent_of_peak, Some(100.0 * 494.75 / 67.0), "without tensor cores");
    let (mut loss, mut copy) = (row("loss_forward"), report.copy.clone().unwrap());
    (loss.per_second, copy.per_second) = (3e12, 4e12);
    loss.compare(Some(&copy), Some(&peaks::H200.matmul));
    assert_eq!((loss.percent_of_copy, loss.percent_of_peak), (Some(75.0), None));
    let mut step = row("step");
    step.per_second = 395.8e12;
    step.compare(report.copy.as_ref(), Some(&peaks::H200.matmul));
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
    assert_eq!(MatmulPeaks::of("simt (CPU)"), None);
}

#[test]
fn impossible_sizes_are_refused() {
    if skipped() {
        return;
    }
    let step = |sets: &[&str]| {
        let sets = sets.iter().map(ToString::to_string).collect();
        step(StepRequest { sets, ..Default::default() })
    };
    let norm = |rows, columns| {
        Benchmark::Norm(NormRequest { rows: Some(rows), columns: Some(columns), ..NORM })
    };
    let product =
        |sizes| Benchmark::Gemm(GemmRequest { product: Some(sizes), ..GemmRequest::default() });
    let attention =
        |sizes| Benchmark::Attention(AttentionRequest { shape: Some(sizes), ..ATTENTION });
    let loss = |vocab| Benchmark::Loss(LossRequest { vocab: Some(vocab), ..LOSS });
    let update = |elements| Benchmark::Adamw(AdamwRequest { elements: Some(elements) });
    let refused = [
        (norm(0, 64), "cannot be timed"),
        (norm(usize::MAX, 64), "cannot be timed"),
        (norm(1 << 31, 8), "cannot be timed"),
        (norm(1 << 30, 8192), "these sizes need"),
        (norm(16, 63), "63"),
        (product([0, 8, 8]), "cannot be timed"),
        (product([1 << 30; 3]), "cannot be timed"),
        (product([8, 8, 1 << 38]), "these sizes need"),
        (attention([1, 0, 4, 2, 32]), "cannot be timed"),
        (attention([1, 1 << 25, 1, 1, 64]), "cannot be timed"),
        (attention([1, 64, 4, 3, 32]), "4 heads share 3 KV heads"),
        (attention([1, 64, 4, 2, 40]), "head dim of 40"),
        (loss(81), "81"),
        (loss(0), "cannot be timed"),
        (update(0), "cannot be timed"),
        (update(1 << 43), "these sizes need"),
        (step(&["model.heads=3"]), "model.heads"),
        (step(&["model.depth=3"]), "model.depth"),
        (step(&["model.heads=1", "model.hidden=40"]), "head dim"),
        (step(&["train.micro_batch=1000000", "model.layers=64"]), "MiB free"),
        (step(&["model.init_std=1e38"]), "the loss is"),
        (step(&["optimizer.lr=1e300"]), "no finite f32"),
    ];
    for (benchmark, part) in refused {
        let request = timed(vec![benchmark], None);
        let Err(error) = bench::run(open, &request, |_| ()) else { panic!("timed: {request:?}") };
        let error = error.to_string();
        assert!(error.contains(part), "{request:?}:\n`{part}` is missing in:\n{error}");
        assert!(error.contains("remedy"), "{error}");
    }
}

/// Once with all fusions, then without those that are named, each in a row of its own, and at last
/// once more with all.
#[test]
fn a_step_is_timed_without_the_fusions_that_are_named() {
    if skipped() {
        return;
    }
    let all = Fusion::ALL.to_vec();
    let without = vec![vec![Fusion::Residual, Fusion::SwiGluBackward], all.clone()];
    let sets = vec!["data.sequence=32".to_string()];
    let step = StepRequest { sets, ..Default::default() };
    let request = |dtype, without: &[Vec<Fusion>]| {
        let step = TimedStepRequest { step: step.clone(), without: without.to_vec() };
        let options = bench::Options { dtype, samples: Some(2) };
        Request { benchmarks: vec![Benchmark::Step(step)], options }
    };
    // Each launch takes as long, so that what is launched more is the time.
    let one_ms_each = || -> Result<Box<dyn Driver>> {
        let counting = Counting::new(Host::new(Options::default())?);
        Ok(Box::new(Counting { one_ms_each: true, ..counting }))
    };
    let report = bench::run(one_ms_each, &request(None, &without), |_| ()).unwrap();
    let rows: Vec<_> = report.rows.iter().map(|row| (row, row.step.as_ref().unwrap())).collect();
    let [whole, two, none, again] = rows[..] else { panic!("{report}") };
    assert_eq!([whole, again].map(|(_, step)| step.without.len()), [0, 0]);
    assert_eq!((two.1.without.len(), &none.1.without), (2, &all));
    assert!(two.1.memory.planned > whole.1.memory.planned, "it has an operand more");
    assert_eq!(again.0.what, "step, bf16, again");
    // Of two layers; graphs count as one launch each, so the ratio is not known.
    let percents = [whole, two, none, again].map(|(_, step)| step.percent_over_fused);
    assert_eq!((percents[0], percents[3]), (None, Some(0.0)));
    assert!(percents[1].is_some() && percents[2].is_some(), "{percents:?}");
    let families: Vec<usize> = rows.iter().map(|(_, step)| step.families.len()).collect();
    assert!(families[0] > 0 && families[1..] == [0, 0, 0], "{families:?}");
    let text = report.to_string();
    for part in ["step, bf16, without residual, swiglu-backward", " % over all fusions\n"] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }

    let in_f32 = request(Some(Dtype::F32), &without);
    let error = bench::run(open, &in_f32, |_| ()).unwrap_err();
    assert!(matches!(error, Error::Usage { .. }), "{error}");
    assert!(error.to_string().contains("--without swiglu-backward"), "{error}");
    let of_residual = request(Some(Dtype::F32), &[all]);
    let report = bench::run(open, &of_residual, |_| ()).unwrap();
    assert_eq!(report.rows[1].step.as_ref().unwrap().without, [Fusion::Residual]);
}

/// Launch by launch: as many as are predicted for each family, and the time of each of them, on a
/// machine on which all take one millisecond.
#[test]
fn a_step_is_the_sum_of_its_families() {
    if skipped() {
        return;
    }
    let sets = ["train.grad_accumulation=2", "model.layers=3"].map(String::from).to_vec();
    let step = StepRequest { sets, ..Default::default() };
    let config = step.resolve(Machine::Cpu, None).unwrap();
    let one_ms_each = || -> Result<Box<dyn Driver>> {
        let counting = Counting::new(Host::new(Options::default())?);
        Ok(Box::new(Counting { one_ms_each: true, ..counting }))
    };
    let request = timed(vec![Benchmark::Step(TimedStepRequest { step, without: vec![] })], None);
    let report = bench::run(one_ms_each, &request, |_| ()).unwrap();
    let row = &report.rows[0];
    let details = row.step.as_ref().unwrap();
    let prediction = Prediction::new(&config).unwrap();
    for share in &details.families {
        let of_family = |it: &&Kernel| KernelFamily::of(it.cost.op) == share.family;
        let kernels = |it: &Kernel| it.cost.kernels * it.launches;
        let launches: u64 = prediction.kernels.iter().filter(of_family).map(kernels).sum();
        assert_eq!(share.launches as u64, launches, "{share:?}");
        assert_eq!(share.microseconds, 1e3 * share.launches as f64, "{share:?}");
    }
    let process = open().unwrap().process_bytes();
    assert_eq!(details.memory.allocated, Some(details.memory.planned - process));
    let shown = report.to_string();
    let together: usize = details.families.iter().map(|it| it.launches).sum();
    for part in ["together, one by one", "a whole step", &format!(" {together} "), "MiB planned"] {
        assert!(shown.contains(part), "no {part:?} in:\n{shown}");
    }
}

// ------------------------------------------------------------------ products of models

fn products() -> ProductsRequest {
    ProductsRequest { product: Some([136, 72, 320]), samples: Some(3), ..Default::default() }
}

#[test]
fn the_tuner_times_every_candidate_beside_the_models_choice() {
    if skipped() {
        return;
    }
    let mut driver = open().unwrap();
    let mut told = 0;
    let report = bench::tune(&mut *driver, &products(), |report| {
        told += 1;
        assert_eq!(report.products.len(), told);
        assert!(report.progress().contains("72    320"), "{}", report.progress());
        Ok(())
    })
    .unwrap();
    assert_eq!((told, report.not_reached.len()), (3, 0));
    let gemm = Gemm::new(&mut *driver, Dtype::Bf16, None).unwrap();
    let mut logarithms = 0.0;
    for found in &report.products {
        let product = &found.wanted.product;
        let (layout, sizes) = (product.layout, product.sizes());
        assert_eq!(sizes, [136, 72, 320]);
        // Two tiles on four multiprocessors: TN whole and in two; each alone and as a cluster.
        let splits = if layout == Layout::Tn { 2 } else { 1 };
        let mut expected: Vec<(&str, usize, usize)> = vec![];
        for variant in gemm.variants(layout) {
            for cluster in [1, 2] {
                expected.extend((1..=splits).map(|splits| (variant.kernel, splits, cluster)));
            }
        }
        let mut timed: Vec<(&str, usize, usize)> =
            found.candidates.iter().map(|it| (it.kernel, it.splits, it.cluster)).collect();
        timed.sort_unstable();
        expected.sort_unstable();
        assert_eq!(timed, expected);

        let model = gemm.by_cost_model(layout, gemm::Output::plain(layout), sizes).unwrap();
        let [best, model_is] = [0, found.model].map(|i| &found.candidates[i]);
        assert_eq!((model_is.kernel, model_is.splits), (model.variant.kernel, model.splits));
        let of_all: Vec<f64> = found
            .candidates
            .iter()
            .filter(|it| it.samples == 3)
            .map(|it| it.microseconds)
            .collect();
        assert!(of_all.is_sorted() && of_all[0] > 0.0 && of_all[0] == best.microseconds);
        assert!(found.candidates.iter().all(|it| [2, 3].contains(&it.samples)));
        let loss = model_is.microseconds / best.microseconds - 1.0;
        assert_close("loss", &[found.loss_percent], &[100.0 * loss], 1e-9);
        logarithms += loss.ln_1p();
    }
    let mean = 100.0 * ((logarithms / 3.0).exp() - 1.0);
    assert_close("mean loss", &[report.mean_loss_percent], &[mean], 1e-9);
    let same = report.products.iter().filter(|it| it.model == 0).count();
    assert_eq!(report.same, same);
    assert!(report.right >= same);
    let text = report.to_string();
    for part in ["3 products in", "within 1 % of the fastest", "best of 12", "simt (CPU)"] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }

    // As text and back, its choices are taken.
    let table: Table = report.table().to_string().parse().unwrap();
    table.check().unwrap();
    let gemm = gemm.with_table(driver.properties(), &table);
    for found in &report.products {
        let product = &found.wanted.product;
        let (layout, sizes) = (product.layout, product.sizes());
        let choice = gemm.choose(layout, gemm::Output::plain(layout), sizes).unwrap();
        let best = &found.candidates[0];
        assert_eq!((choice.variant.kernel, choice.splits), (best.kernel, best.splits));
    }
}

/// Every kernel is timed with what a step has after the product, and the table says so.
#[test]
fn the_tuner_times_what_a_step_launches() {
    if skipped() {
        return;
    }
    let mut driver = open().unwrap();
    let sets = ["model.layers=1", "data.sequence=32"].map(String::from).to_vec();
    let request = ProductsRequest { samples: Some(1), sets, ..Default::default() };
    let report = bench::tune(&mut *driver, &request, |_| Ok(())).unwrap();
    let mut epilogues: Vec<(&str, &str)> = vec![];
    let gemm = Gemm::new(&mut *driver, Dtype::Bf16, None).unwrap();
    let table: Table = report.table().to_string().parse().unwrap();
    table.check().unwrap();
    let tuned = gemm.clone().with_table(driver.properties(), &table);
    for found in &report.products {
        let product = &found.wanted.product;
        let StepProduct { layout, epilogue, .. } = *product;
        epilogues.push((layout.name(), epilogue.name()));
        let part = match epilogue {
            Epilogue::Plain | Epilogue::Addend => format!("_{layout}_128x"),
            Epilogue::Rotary | Epilogue::SwiGlu => format!("_{layout}_{epilogue}_128x"),
        };
        let kernels: Vec<&str> = found.candidates.iter().map(|it| it.kernel).collect();
        for kernel in &kernels {
            assert!(kernel.contains(&part), "{layout} {epilogue}: {kernel}");
        }
        for width in ["x256", "x192", "x128"] {
            assert!(
                kernels.iter().any(|it| it.ends_with(width)),
                "{epilogue} {width}: {kernels:?}"
            );
        }
        let (output, sizes) = (product.output(), product.tiled());
        let choice = tuned.choose(layout, output, sizes).unwrap();
        assert!(tuned.is_tuned(layout, output, sizes), "{product:?}");
        let best = &found.candidates[0];
        assert_eq!((choice.variant.kernel, choice.cluster), (best.kernel, best.cluster));
    }
    epilogues.sort_unstable();
    epilogues.dedup();
    let expected = [
        ("nn", "plain"),
        ("nn", "swiglu"),
        ("nt", "addend"),
        ("nt", "plain"),
        ("nt", "rotary"),
        ("nt", "swiglu"),
        ("tn", "plain"),
    ];
    assert_eq!(epilogues, expected);
}

#[test]
fn the_tuner_keeps_its_time_and_begins_with_the_dearest() {
    if skipped() {
        return;
    }
    let request = ProductsRequest { seconds: Some(1e-9), ..Default::default() };
    let report = bench::tune(&mut *open().unwrap(), &request, |_| Ok(())).unwrap();
    assert_eq!(report.products.len(), 0, "no time at all");
    let shares: Vec<f64> = report.not_reached.iter().map(|it| it.step_share).collect();
    assert!(
        shares.is_sorted_by(|a, b| a >= b) && shares[0] < 0.5 && shares[14] > 0.0,
        "{shares:?}"
    );
    assert!(report.to_string().contains("not reached, 15"), "{report}");
    let mut reached = 0;
    let stopped = bench::tune(&mut *open().unwrap(), &ProductsRequest::default(), |_| {
        reached += 1;
        Err(Error::Usage { what: "enough".to_string(), remedy: String::new() })
    });
    assert!(stopped.unwrap_err().to_string().contains("enough") && reached == 1);
}

#[test]
fn the_table_has_every_product_once_in_a_burst_and_sustained() {
    if skipped() {
        return;
    }
    let mut told = vec![];
    let report = bench::table(&mut *open().unwrap(), &ProductsRequest::default(), |line| {
        told.push(line.to_string());
    })
    .unwrap();
    assert_eq!(told.len(), 15);
    for (line, row) in told.iter().zip(&report.rows) {
        let speed = format!("{:.1}", row.burst.microseconds);
        assert!(line.contains("/15 ") && line.contains(&speed), "{line}");
        assert!(line.contains(row.kernel), "{line}");
    }
    let mut keys: Vec<String> = vec![];
    for row in &report.rows {
        let [m, n, k] = row.wanted.product.sizes();
        assert_eq!(row.flops, 2 * (m * n * k) as u64);
        for speed in [row.burst, row.sustained] {
            let per_second = row.flops as f64 / speed.microseconds / 1e6;
            assert_close("TFLOP/s", &[speed.teraflops_per_second], &[per_second], 1e-9);
            assert!(speed.samples == 1 && speed.percent_of_peak.is_none());
        }
        assert!(!row.tuned && row.splits == 1);
        assert_eq!(row.wanted.of, ["tiny, 128 tokens"]);
        let StepProduct { layout, epilogue, .. } = row.wanted.product;
        keys.push(format!("{layout} {epilogue} {m} {n} {k}"));
    }
    keys.sort_unstable();
    keys.dedup();
    assert_eq!((keys.len(), report.not_reached.len()), (15, 0));
    assert_eq!(report.means.len(), 4);
    for mean in &report.means {
        let rows = || {
            let is = |row: &&bench::TableRow| {
                mean.layout.is_none_or(|it| it == row.wanted.product.layout)
            };
            report.rows.iter().filter(is)
        };
        let sum: f64 = rows().map(|row| row.burst.teraflops_per_second.ln()).sum();
        assert_eq!(rows().count(), mean.products);
        let expected = (sum / mean.products as f64).exp();
        assert_close("mean", &[mean.burst_teraflops_per_second], &[expected], 1e-9);
    }
    let text = report.to_string();
    for part in ["geometric mean of 5 nn", "geometric mean of 15 products", "without a pause"] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    // As long as it is told to: several passes, if not for every product its burst.
    let long = ProductsRequest { seconds: Some(0.3), ..products() };
    let report = bench::table(&mut *open().unwrap(), &long, |_| ()).unwrap();
    assert!(report.rows.iter().all(|row| row.sustained.samples >= 1 && row.burst.samples == 3));
    assert_eq!(report.rows.len() + report.not_reached.len(), 3);
}

// ------------------------------------------------------------------ the command line

pub fn bench(arguments: &str, variables: &[(&str, &str)]) -> Output {
    let mut command = isobath();
    command.arg("bench").args(arguments.split_whitespace()).envs(variables.iter().copied());
    command.output().unwrap()
}

pub fn answer(arguments: &str) -> Value {
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
    assert_eq!(report["rows"].as_array().unwrap().len(), 3);
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
    // On Hopper in two passes, in one, in any order, and in one of short rows; then forward and
    // what a step of these sizes takes.
    let any = "attention_delta_sm90_32 and attention_backward_sm90_128x32, sums in any order, bf16";
    let once = [
        ("attention_delta_sm90_32 and attention_backward_sm90_128x32, bf16", "one pass"),
        (any, "one pass"),
        ("attention_backward_short_sm90_256x32, bf16", "one pass of short rows"),
    ];
    for (family, sequence, names, once, (both, how)) in [
        (
            "sm80",
            8,
            ["forward_bf16_32", "backward_q_bf16_32", "backward_kv_bf16_32"],
            &once[..0],
            ("attention_backward_q_bf16_32 and attention_backward_kv_bf16_32", "two passes"),
        ),
        (
            "sm90",
            8,
            ["forward_sm90_128x32", "backward_q_sm90_128x32", "backward_kv_sm90_128x32"],
            &once,
            ("attention_backward_short_sm90_256x32", "one pass of short rows"),
        ),
        (
            "sm90",
            264,
            ["forward_sm90_128x32", "backward_q_sm90_128x32", "backward_kv_sm90_128x32"],
            &once[..2],
            (
                "attention_backward_q_sm90_128x32 and attention_backward_kv_sm90_128x32",
                "two passes",
            ),
        ),
    ] {
        let report = answer(&format!(
            "attention --device simt --attention 1,{sequence},1,1,32 --family {family} --samples 1 \
             --json"
        ));
        let [forward, q, kv] = names.map(|name| format!("attention_{name}"));
        let mut expected = vec![
            (format!("{forward}, bf16"), Value::Null),
            (format!("{q} and {kv}, bf16"), json!("two passes")),
        ];
        expected.extend(once.iter().map(|&(what, variant)| (what.to_string(), json!(variant))));
        expected.push((format!("{forward} and {both}, bf16"), json!(how)));
        let rows = report["rows"].as_array().unwrap();
        let found =
            rows.iter().map(|row| (row["what"].as_str().unwrap().to_string(), &row["variant"]));
        let found: Vec<(String, Value)> = found.map(|(what, it)| (what, it.clone())).collect();
        assert_eq!(found, expected, "{family} {sequence}");
        assert_eq!(rows.last().unwrap()["op"], "attention");
    }
}

/// benches/peers reads these fields and computes the same.
#[test]
fn all_benchmarks_answer_with_the_fields_that_peers_join() {
    if skipped() {
        return;
    }
    let report = answer("--device simt --samples 1 --json");
    assert_eq!(report["benchmark"], "all");
    assert!(report["machine"]["name"].is_string() && report["copy"]["per_second"].is_f64());
    let rows = report["rows"].as_array().unwrap();
    let sizes: Vec<(&str, &Value)> =
        rows.iter().map(|row| (row["op"].as_str().unwrap(), &row["sizes"])).collect();
    let norm = |residual: bool| json!({"T": 256, "C": 1024, "norm": "rms", "residual": residual});
    let expected = [
        ("gemm_nt", json!({"M": 256, "N": 256, "K": 256})),
        ("gemm_nn", json!({"M": 256, "N": 256, "K": 256})),
        ("gemm_tn", json!({"M": 256, "N": 256, "K": 256})),
        ("gemm_nt", json!({"M": 256, "N": 256, "K": 256})), // with an addend
        ("gemm_nt_rotary", json!({"M": 256, "N": 256, "K": 256})),
        ("gemm_nt_swiglu", json!({"M": 256, "N": 256, "K": 256})),
        ("gemm_nn_swiglu", json!({"M": 256, "N": 256, "K": 256})),
        ("attention_forward", json!({"B": 1, "S": 128, "H": 4, "K": 2, "D": 64})),
        ("attention_backward", json!({"B": 1, "S": 128, "H": 4, "K": 2, "D": 64})),
        ("attention_backward", json!({"B": 1, "S": 128, "H": 4, "K": 2, "D": 64})), // in one
        ("attention_backward", json!({"B": 1, "S": 128, "H": 4, "K": 2, "D": 64})), // in any order
        ("attention_backward", json!({"B": 1, "S": 128, "H": 4, "K": 2, "D": 64})), // of short rows
        ("attention", json!({"B": 1, "S": 128, "H": 4, "K": 2, "D": 64})),
        ("norm_forward", norm(false)),
        ("norm_backward", norm(false)),
        ("norm_backward", norm(true)),
        ("loss_forward", json!({"T": 64, "V": 2048})),
        ("loss_backward", json!({"T": 64, "V": 2048})),
        ("gradient_norm", json!({"N": 1 << 18})),
        ("adamw", json!({"N": 1 << 18})), // with its state stored in each way
        ("adamw", json!({"N": 1 << 18})),
        ("adamw", json!({"N": 1 << 18})),
        ("adamw", json!({"N": 1 << 18})),
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
    // Epilogues, over the plain kernel of the same tile.
    let fused: Vec<&Value> = rows.iter().filter(|row| !row["over_plain"].is_null()).collect();
    let named = |row: &&Value| row["what"].as_str().unwrap().to_string();
    let names: Vec<String> = fused.iter().map(named).collect();
    for (name, part) in names.iter().zip(["addend", "rotary", "nt_swiglu", "nn_swiglu"]) {
        assert!(name.contains(part), "{names:?}");
    }
    assert_eq!(fused.len(), 4, "{names:?}");
    for row in fused {
        let over = &row["over_plain"];
        let tile = |name: &Value| {
            let name = name.as_str().unwrap().split([',', ' ']).next().unwrap();
            name.rsplit('_').next().unwrap().to_string()
        };
        assert_eq!(tile(&over["kernel"]), tile(&row["what"]), "{row}");
        assert!(!over["kernel"].as_str().unwrap().contains("swiglu"), "{row}");
        let time = |it: &Value| it["median_microseconds"].as_f64().unwrap();
        let percent = 100.0 * (time(row) / time(over) - 1.0);
        assert_close("percent", &[over["percent"].as_f64().unwrap()], &[percent], 1e-9);
    }
    let dtype = |op: &str| &rows.iter().find(|row| row["op"] == op).unwrap()["dtype"];
    assert_eq!((dtype("gradient_norm"), dtype("adamw")), (&json!("f32"), &json!("bf16")));
}

#[test]
fn products_are_tuned_tabled_and_asked_for_from_the_command_line() {
    if skipped() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("tuned.toml").display().to_string();
    let one = "--device simt --product 136,72,320 --layout tn --samples 1";
    let output = bench(&format!("gemm --tune {one} --out {out} --json"), &[]);
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let progress = String::from_utf8(output.stderr).unwrap();
    assert!(progress.contains("1/1"), "{progress}");
    let candidates = report["products"][0]["candidates"].as_array().unwrap();
    assert_eq!((report["products"][0]["layout"].as_str(), candidates.len()), (Some("tn"), 12));
    assert!(candidates[0]["predicted_microseconds"].is_null(), "nobody knows this CPU's peak");

    let best = &candidates[0];
    let report = answer(&format!("gemm --table {one} --choices {out} --json"));
    let row = &report["rows"][0];
    assert_eq!((&row["kernel"], &row["splits"]), (&best["kernel"], &best["splits"]));
    assert_eq!((&row["tuned"], &row["m"], &row["n"]), (&json!(true), &json!(136), &json!(72)));

    use std::io::Write;
    let asked = |arguments: &str, lines: &str| {
        let mut command = isobath();
        let arguments = format!("bench gemm --stdin --device simt {arguments}");
        command.args(arguments.split_whitespace());
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let output =
        asked(&format!("--choices {out}"), "tn 136,72,320\nnt 64,64,72 sustained\nnt 256,256,64\n");
    assert!(output.status.success(), "{output:?}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<Value> = lines.lines().map(|it| serde_json::from_str(it).unwrap()).collect();
    let what = rows[0]["what"].as_str().unwrap();
    assert!(what.starts_with(best["kernel"].as_str().unwrap()), "{what}");
    assert_eq!(rows[1]["sizes"], json!({"M": 64, "N": 64, "K": 72}));
    assert_eq!(
        rows[2]["sizes"],
        json!({"M": 256, "N": 256, "K": 64}),
        "more than there was room for"
    );
    assert_eq!((rows.len(), &rows[1]["op"]), (3, &json!("gemm_nt")));
    for (line, part) in [
        ("nt 64,64", "names no product"),
        ("nt 64,64,64 long", "names no product"),
        ("tt 8,8,8", "names no product"),
        ("nt 0,8,8", "cannot be timed"),
        ("nt 8,8,9", "multiples of 8"),
    ] {
        let output = asked("", &format!("{line}\n"));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(if line.ends_with('9') { 1 } else { 2 }), "{text}");
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    let output = bench(&format!("gemm --table {one} --choices Cargo.toml"), &[]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && text.contains("Cargo.toml"), "{text}");
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
        ("norm --product 8,8,8", &[], &["unexpected argument '--product'"]),
        ("gemm --rows 8", &[], &["unexpected argument '--rows'"]),
        ("adamw --preset 9m", &[], &["unexpected argument '--preset'"]),
        ("--rows 8", &[], &["unexpected argument '--rows'"]),
        ("step --preset 8m --device simt", &[], &["8m", "9m"]),
        ("step --preset 9m --preset 60m", &[], &["--preset", "multiple times"]),
        ("norm --order last", &[], &["--order", "fifo"]),
        ("norm --device cpu", &[], &["device cpu", "--device simt"]),
        ("norm --device simt", &[("SIMT_SEED", "first")], &["SIMT_SEED", "`first`"]),
        ("norm --predict", &[], &["unexpected argument '--predict'"]),
        ("gemm --predict --preset 8m", &[], &["8m", "9m"]),
        ("gemm --predict --layout nt", &[], &["'--predict' cannot be used with '--layout"]),
        ("gemm --predict --dtype f32", &[], &["'--predict' cannot be used with '--dtype"]),
        ("--predict --race", &[], &["'--predict' cannot be used with '--race'"]),
        ("step --predict --seed 1", &[], &["'--predict' cannot be used with '--seed"]),
        ("--predict --preset 8m", &[], &["8m", "9m"]),
        ("--tune", &[], &["unexpected argument '--tune'"]),
        ("--device simt norm", &[], &["'norm'", "cannot be used with", "--device"]),
        ("gemm --tune --table", &[], &["'--tune' cannot be used with '--table'"]),
        ("gemm --table --out a.toml", &[], &["not provided", "<--tune>"]),
        ("gemm --seconds 5", &[], &["not provided", "<--table|--tune>"]),
        ("gemm --table --seconds 0", &[], &["--seconds", "above 0"]),
        ("gemm --tune --choices a.toml", &[], &["not provided", "<--table|--stdin>"]),
        ("gemm --vocab 32000", &[], &["not provided", "<--predict|--table|--tune>"]),
        ("loss --vocab 32000 --vocab 50257", &[], &["--vocab", "multiple times"]),
        ("gemm --table --product 8,8,8 --vocab 32000", &[], &["--product", "--vocab"]),
        ("gemm --table --device simt --preset 8m", &[], &["8m", "9m"]),
        ("gemm --stdin --product 8,8,8", &[], &["'--stdin' cannot be used with '--product"]),
        ("gemm --stdin --preset 9m", &[], &["not provided", "<--predict|--table|--tune>"]),
        ("gemm --without rotary", &[], &["unexpected argument '--without'"]),
        ("step --without norm", &[], &["--without", "rotary-backward"]),
        ("step --predict --without rotary", &[], &["'--predict' cannot be used with '--without"]),
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
