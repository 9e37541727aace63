//! Every matrix product of the paper's models, with its epilogue, and what the cost model
//! expects of it on an H200: a list for the next hour on a GPU, ranked by the time
//! that is at stake. No device is asked, and nothing is measured.

use std::fmt;

use serde::Serialize;

use super::expected::chosen;
use super::{FASTEST, Prediction, Sizes, StepProduct, memory, rates};
use crate::config::{Config, Dtype};
use crate::cuda::Fusions;
use crate::cuda::gemm::Choice;
use crate::cuda::gemm::tuned::{self, Table};
use crate::cuda::peaks::{H200, Peaks};
use crate::error::Result;
use crate::model::{self, parameters::WIDTH_MULTIPLE};

/// Of which products are listed if nobody names one.
const PRESETS: [&str; 6] = ["60m", "130m", "250m", "350m", "1b", "7b"];
/// Tokens of a micro-batch.
const TOKENS: [usize; 3] = [16 << 10, 32 << 10, 64 << 10];

#[derive(Serialize, Clone, Debug)]
pub struct GemmPrediction {
    pub machine: &'static str,
    pub multiprocessors: usize,
    /// The datasheet's, dense.
    pub flops_per_second: f64,
    pub source: &'static str,
    /// Taken, not measured.
    pub fastest_tile_share: f64,
    /// Of device memory, read and written together: the other bound.
    pub bytes_per_second: f64,
    pub bytes_source: &'static str,
    /// Geometric mean over the products, of the share of `flops_per_second`.
    pub mean_share: f64,
    /// What takes the longest in its step, with all launches, first.
    pub products: Vec<GemmRow>,
}

/// One product of a training step.
#[derive(Serialize, Clone, Debug)]
pub struct GemmRow {
    pub preset: String,
    pub tokens: usize,
    /// "gemm_nt_swiglu"
    pub op: &'static str,
    #[serde(flatten)]
    pub product: StepProduct,
    /// In a micro-batch.
    pub launches: u64,
    pub kernel: &'static str,
    pub splits: usize,
    pub cluster: usize,
    /// Tiles for each multiprocessor.
    pub waves: f64,
    /// Of the last wave counted whole and of what tiles overhang: FLOPs that are asked for, of
    /// those that are done.
    pub fill: f64,
    pub stages: usize,
    pub shared_bytes: usize,
    pub bytes: u64,
    pub flops: u64,
    /// Estimated, of one launch.
    pub microseconds: f64,
    /// What its bytes alone take; where that is all of `microseconds`, memory is the limit.
    pub memory_microseconds: f64,
    /// Of the datasheet's FLOPs.
    pub share: f64,
    /// All launches of it in a micro-batch: what is at stake.
    pub milliseconds: f64,
    /// All launches of it, of the predicted time of a training step over one micro-batch.
    pub step_share: f64,
    /// What this kernel took for this product on this machine; `None`: nobody has timed it.
    pub timed_microseconds: Option<f64>,
}

impl GemmPrediction {
    /// Of these presets with `sets` above them; if there are none, of those that are listed here.
    /// With the first vocabulary, and the heads with the others, too; if there are none, with the
    /// presets'.
    ///
    /// Errors: an unknown preset; sizes that cannot be planned.
    pub fn new(presets: &[String], sets: &[String], vocabs: &[usize]) -> Result<Self> {
        GemmPrediction::with_table(presets, sets, vocabs, tuned::built_in())
    }

    /// The same, with the choices of this table.
    pub fn with_table(
        presets: &[String],
        sets: &[String],
        vocabs: &[usize],
        table: &Table,
    ) -> Result<Self> {
        let mut products = of_presets(presets, sets, vocabs, table)?;
        products.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        let (bytes_per_second, bytes_source) = memory(&H200);
        let logarithms = products.iter().map(|row| row.share.ln()).sum::<f64>();
        Ok(GemmPrediction {
            machine: H200.name,
            multiprocessors: H200.multiprocessors,
            flops_per_second: H200.flops_per_second(Dtype::Bf16),
            source: H200.source,
            fastest_tile_share: FASTEST,
            bytes_per_second,
            bytes_source,
            mean_share: (logarithms / products.len().max(1) as f64).exp(),
            products,
        })
    }
}

/// As [`GemmPrediction::new`], in the order of presets and tokens.
pub(crate) fn listed(
    presets: &[String],
    sets: &[String],
    vocabs: &[usize],
) -> Result<Vec<GemmRow>> {
    of_presets(presets, sets, vocabs, tuned::built_in())
}

fn of_presets(
    presets: &[String],
    sets: &[String],
    vocabs: &[usize],
    table: &Table,
) -> Result<Vec<GemmRow>> {
    let presets = match presets {
        [] => PRESETS.to_vec(),
        given => given.iter().map(String::as_str).collect(),
    };
    let mut products = vec![];
    for preset in presets {
        let mut config = Config::preset(preset)?.with_sets(sets)?;
        config.dtype = Dtype::Bf16;
        let of_config = [config.model.vocab];
        let vocabs = if vocabs.is_empty() { &of_config[..] } else { vocabs };
        for tokens in TOKENS {
            config.train.micro_batch = (tokens / config.data.sequence).max(1);
            config.train.grad_accumulation = 1;
            for (index, &vocab) in vocabs.iter().enumerate() {
                config.model.vocab = vocab;
                let mut rows = rows(&config, &H200, table)?;
                let head = vocab.next_multiple_of(WIDTH_MULTIPLE);
                rows.retain(|row| index == 0 || row.product.sizes().contains(&head));
                products.extend(rows);
            }
        }
    }
    Ok(products)
}

/// The products of one configuration.
pub(crate) fn rows(config: &Config, machine: &Peaks, table: &Table) -> Result<Vec<GemmRow>> {
    let peak = machine.flops_per_second(Dtype::Bf16);
    let rates = rates(machine, Dtype::Bf16);
    let multiprocessors = machine.multiprocessors;
    let heads = model::heads(&config.model);
    let mut rows: Vec<GemmRow> = vec![];
    let mut others = 0.0;
    for kernel in Prediction::with(config, machine, &Fusions::default())?.kernels {
        let (Sizes::Product { m, n, k }, Some((layout, epilogue))) =
            (kernel.cost.sizes.clone(), kernel.cost.product)
        else {
            // What is expected, as of the products.
            others += kernel.launches as f64 * kernel.microseconds.tightest().1;
            continue;
        };
        let product = StepProduct { layout, epilogue, m, n, k, heads };
        let tiled = product.tiled();
        let Some((choice, timed)) = chosen(machine, table, &product) else { continue };
        if let Some(row) = rows.iter_mut().find(|it| it.product.is(&product)) {
            row.launches += kernel.launches;
            continue;
        }
        let Choice { variant, splits, cluster } = choice;
        let tile: usize = variant.tile().iter().product();
        let [_, steps] = variant.longest(tiled, &choice, multiprocessors);
        let done = (multiprocessors * tile) as f64 * (steps * variant.depth) as f64;
        let seconds = choice.seconds(tiled, kernel.cost.bytes, multiprocessors, rates);
        rows.push(GemmRow {
            preset: config.name.clone(),
            tokens: config.train.micro_batch * config.data.sequence,
            op: kernel.cost.op,
            product,
            launches: kernel.launches,
            kernel: variant.kernel,
            splits,
            cluster,
            waves: variant.tiles(tiled[0], tiled[1]) as f64 / multiprocessors as f64,
            fill: (m * n) as f64 * k as f64 / done,
            stages: variant.stages,
            shared_bytes: variant.dynamic_shared_bytes,
            bytes: kernel.cost.bytes,
            flops: kernel.cost.flops,
            microseconds: 1e6 * seconds,
            memory_microseconds: 1e6 * kernel.cost.bytes as f64 / rates.bytes_per_second,
            share: kernel.cost.flops as f64 / seconds / peak,
            milliseconds: 0.0,
            step_share: 0.0,
            timed_microseconds: timed.map(|it| it.best.microseconds),
        });
    }
    for row in &mut rows {
        row.milliseconds = row.launches as f64 * row.microseconds / 1e3;
    }
    let step = others / 1e3 + rows.iter().map(|row| row.milliseconds).sum::<f64>();
    rows.iter_mut().for_each(|row| row.step_share = row.milliseconds / step);
    Ok(rows)
}

impl GemmRow {
    /// "memory" where its bytes alone take all of the estimated time.
    pub fn bound(&self) -> &'static str {
        if self.memory_microseconds >= self.microseconds { "memory" } else { "products" }
    }
}

impl fmt::Display for GemmPrediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "matrix products of a training step in bf16 on one {}: estimated by the model that chooses \
             kernels, **not timed** but where the last column has a time; what takes the longest \
             of a micro-batch first\n",
            self.machine
        )?;
        writeln!(
            f,
            "{:<6} {:>6} {:>2} {:<6} {:>6} {:>6} {:>6} {:>8}  {:<29} {:>2} {:>2} {:>6} {:>4} {:>6} \
             {:>6} {:>8} {:>8} {:>9} {:>7} {:>7} {:<8} {:>8} {:>6}  timed",
            "preset",
            "tokens",
            "",
            "with",
            "M",
            "N",
            "K",
            "launches",
            "kernel",
            "by",
            "in",
            "stages",
            "KiB",
            "waves",
            "fill",
            "MB",
            "GFLOP",
            "us",
            "TFLOP/s",
            "share",
            "bound by",
            "ms",
            "step"
        )?;
        self.products.iter().try_for_each(|row| writeln!(f, "{row}"))?;
        writeln!(
            f,
            "\nMB, GFLOP and us of one launch, ms of all that a micro-batch has; KiB of shared memory\n\
             geometric mean {:.1} % of {:.1} TFLOP/s ({}); a machine full of the fastest tiles is \
             taken to do {:.0} % of it\n\
             no product is estimated faster than its bytes at {:.1} TB/s ({})",
            100.0 * self.mean_share,
            self.flops_per_second / 1e12,
            self.source,
            100.0 * self.fastest_tile_share,
            self.bytes_per_second / 1e12,
            self.bytes_source
        )
    }
}

impl fmt::Display for GemmRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StepProduct { layout, epilogue, m, n, k, .. } = self.product;
        write!(
            f,
            "{:<6} {:>6} {layout:>2} {epilogue:<6} {m:>6} {n:>6} {k:>6} {:>8}  {:<29} {:>2} {:>2} {:>6} \
             {:>4} {:>6.2} {:>4.0} % {:>8.1} {:>8.1} {:>9.1} {:>7.0} {:>5.1} % {:<8} {:>8.2} {:>4.1} %  ",
            self.preset,
            self.tokens,
            self.launches,
            self.kernel,
            self.cluster,
            self.splits,
            self.stages,
            self.shared_bytes >> 10,
            self.waves,
            100.0 * self.fill,
            self.bytes as f64 / 1e6,
            self.flops as f64 / 1e9,
            self.microseconds,
            self.flops as f64 / self.microseconds / 1e6,
            100.0 * self.share,
            self.bound(),
            self.milliseconds,
            100.0 * self.step_share
        )?;
        match self.timed_microseconds {
            Some(microseconds) => write!(f, "{microseconds:.1} us"),
            None => write!(f, "never"),
        }
    }
}
