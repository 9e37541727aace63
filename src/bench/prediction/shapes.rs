//! Every matrix product of the paper's models, and what the choice of a kernel reckons for it on an
//! H200: a ranked list for the next hour on a GPU. No device is asked, and nothing is measured.

use std::fmt;

use serde::Serialize;

use super::Prediction;
use crate::bench::sizes::Sizes;
use crate::config::{Config, Dtype};
use crate::cuda::gemm::{Choice, Layout, Output, Rotation, choose};
use crate::cuda::peaks::{H200, Peaks};
use crate::cuda::{DevicePointer, Family};
use crate::error::Result;

/// Of which products are listed if nobody names one.
const PRESETS: [&str; 6] = ["60m", "130m", "250m", "350m", "1b", "7b"];
/// Tokens of a micro-batch.
const TOKENS: [usize; 3] = [16 << 10, 32 << 10, 64 << 10];
/// Share of the datasheet's FLOPs that a machine full of the fastest tiles is taken to do: what the
/// best product measured anywhere does (794.5 of 989.5 TFLOP/s on an H100 and an H200).
pub(in crate::bench) const FASTEST: f64 = 0.8;

#[derive(Serialize, Clone, Debug)]
pub struct GemmPrediction {
    pub machine: &'static str,
    pub multiprocessors: usize,
    /// The datasheet's, dense.
    pub flops_per_second: f64,
    pub source: &'static str,
    /// Taken, not measured.
    pub fastest_tile_share: f64,
    /// Geometric mean over the products, of the share of `flops_per_second`.
    pub mean_share: f64,
    /// The least share first.
    pub products: Vec<GemmRow>,
}

/// One product of a training step.
#[derive(Serialize, Clone, Debug)]
pub struct GemmRow {
    pub preset: String,
    pub tokens: usize,
    /// "gemm_nt_swiglu"
    pub op: &'static str,
    pub layout: Layout,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// In a micro-batch.
    pub launches: u64,
    pub kernel: &'static str,
    pub splits: usize,
    pub cluster: usize,
    /// Tiles for each multiprocessor.
    pub waves: f64,
    /// Of the last wave counted whole and of what tiles overhang: FLOPs that are asked for, of those
    /// that are done.
    pub fill: f64,
    pub stages: usize,
    pub shared_bytes: usize,
    pub bytes: u64,
    pub flops: u64,
    pub microseconds: f64,
    /// Of the datasheet's FLOPs.
    pub share: f64,
    /// All launches of it, of the reckoned time of a training step over one micro-batch.
    pub step_share: f64,
}

impl GemmPrediction {
    /// Of these presets with `sets` above them; if there are none, of those that are listed here.
    ///
    /// Errors: an unknown preset; sizes that cannot be planned.
    pub fn new(presets: &[String], sets: &[String]) -> Result<Self> {
        let mut products = listed(presets, sets)?;
        products.sort_by(|a, b| a.share.total_cmp(&b.share));
        let logarithms = products.iter().map(|row| row.share.ln()).sum::<f64>();
        Ok(GemmPrediction {
            machine: H200.name,
            multiprocessors: H200.multiprocessors,
            flops_per_second: H200.flops_per_second(Dtype::Bf16),
            source: H200.source,
            fastest_tile_share: FASTEST,
            mean_share: (logarithms / products.len().max(1) as f64).exp(),
            products,
        })
    }
}

/// As [`GemmPrediction::new`], in the order of presets and tokens.
pub(in crate::bench) fn listed(presets: &[String], sets: &[String]) -> Result<Vec<GemmRow>> {
    let presets = match presets {
        [] => PRESETS.to_vec(),
        given => given.iter().map(String::as_str).collect(),
    };
    let mut products = vec![];
    for preset in presets {
        let mut config = Config::preset(preset)?.with_sets(sets)?;
        config.dtype = Dtype::Bf16;
        for tokens in TOKENS {
            config.train.micro_batch = (tokens / config.data.sequence).max(1);
            config.train.grad_accumulation = 1;
            products.extend(rows(&config, &H200)?);
        }
    }
    Ok(products)
}

/// The products of one configuration.
pub(in crate::bench) fn rows(config: &Config, machine: &Peaks) -> Result<Vec<GemmRow>> {
    let peak = machine.flops_per_second(Dtype::Bf16);
    let multiprocessors = machine.multiprocessors;
    let mut rows: Vec<GemmRow> = vec![];
    let mut others = 0.0;
    for kernel in Prediction::new(config)?.kernels {
        let Sizes::Product { m, n, k } = kernel.sizes else {
            others += kernel.launches as f64 * kernel.microseconds[0];
            continue;
        };
        let sizes = [m, n, k];
        let (layout, output) = product(kernel.op, config.model.head_dim());
        // Gate and up are two factors of each column.
        let halves = if matches!(output, Output::SwiGlu { .. }) { 2 } else { 1 };
        let tiled = [m, n / halves, k];
        let variants = Family::Sm90.variants_for(layout, output);
        let Some(choice) = choose(variants, tiled, multiprocessors) else { continue };
        // With and without an addend: one product.
        if let Some(row) =
            rows.iter_mut().find(|it| it.op == kernel.op && [it.m, it.n, it.k] == sizes)
        {
            row.launches += kernel.launches;
            continue;
        }
        let Choice { variant, splits, cluster } = choice;
        let waves = variant.tiles(m, n / halves) as f64 / multiprocessors as f64;
        let [_, steps] = variant.longest(tiled, &choice, multiprocessors);
        let done = (multiprocessors * variant.rows * variant.columns * halves) as f64
            * (steps * variant.depth) as f64;
        let seconds = choice.seconds(tiled, multiprocessors, FASTEST * peak);
        rows.push(GemmRow {
            preset: config.name.clone(),
            tokens: config.train.micro_batch * config.data.sequence,
            op: kernel.op,
            layout,
            m,
            n,
            k,
            launches: kernel.launches,
            kernel: variant.kernel,
            splits,
            cluster,
            waves,
            fill: (m * n) as f64 * k as f64 / done,
            stages: variant.stages,
            shared_bytes: variant.dynamic_shared_bytes,
            bytes: kernel.bytes,
            flops: kernel.flops,
            microseconds: 1e6 * seconds,
            share: kernel.flops as f64 / seconds / peak,
            step_share: 0.0,
        });
    }
    let all = |row: &GemmRow| row.launches as f64 * row.microseconds;
    let step = others + rows.iter().map(all).sum::<f64>();
    rows.iter_mut().for_each(|row| row.step_share = all(row) / step);
    Ok(rows)
}

/// What kernel a product's op asks for; addresses do not matter.
fn product(op: &str, head_dim: usize) -> (Layout, Output) {
    let null = DevicePointer::NULL;
    match op {
        "gemm_nt" => (Layout::Nt, Output::Store { addend: None }),
        "gemm_nn" => (Layout::Nn, Output::Store { addend: None }),
        "gemm_tn" => (Layout::Tn, Output::Accumulate),
        "gemm_nt_rotary" => {
            let rotation = Rotation { table: null, positions: null, columns: head_dim, head_dim };
            (Layout::Nt, Output::Rotate(rotation))
        }
        "gemm_nt_swiglu" => (Layout::Nt, Output::SwiGlu { product: null }),
        "gemm_nn_swiglu" => (Layout::Nn, Output::SwiGluGradient { gate_up: null }),
        _ => unreachable!("{op} has the sizes of a product"),
    }
}

impl fmt::Display for GemmPrediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "matrix products of a training step in bf16 on one {}: estimated by the model that chooses \
             kernels, **not timed**; the least share of the peak first\n",
            self.machine
        )?;
        writeln!(
            f,
            "{:<6} {:>6} {:>2} {:>6} {:>6} {:>6} {:>8}  {:<29} {:>2} {:>2} {:>6} {:>6} {:>9} {:>9} {:>7}",
            "preset",
            "tokens",
            "",
            "M",
            "N",
            "K",
            "launches",
            "kernel",
            "by",
            "in",
            "waves",
            "fill",
            "us",
            "TFLOP/s",
            "share"
        )?;
        for row in &self.products {
            writeln!(
                f,
                "{:<6} {:>6} {:>2} {:>6} {:>6} {:>6} {:>8}  {:<29} {:>2} {:>2} {:>6.2} {:>4.0} % {:>9.1} \
                 {:>9.0} {:>5.1} %",
                row.preset,
                row.tokens,
                row.layout,
                row.m,
                row.n,
                row.k,
                row.launches,
                row.kernel,
                row.cluster,
                row.splits,
                row.waves,
                100.0 * row.fill,
                row.microseconds,
                row.flops as f64 / row.microseconds / 1e6,
                100.0 * row.share
            )?;
        }
        writeln!(
            f,
            "\ngeometric mean {:.1} % of {:.1} TFLOP/s ({}); a machine full of the fastest tiles is \
             taken to do {:.0} % of it",
            100.0 * self.mean_share,
            self.flops_per_second / 1e12,
            self.source,
            100.0 * self.fastest_tile_share
        )
    }
}
