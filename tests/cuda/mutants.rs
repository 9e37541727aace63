//! Mutation tests of the CPU machine: real kernels with one thing broken must be found out.
//!
//! Two sets: planted bugs, each with what the machine has to say about it; and every line with a
//! barrier, fence, wait, arrival, commit or swizzle, found by scanning the kernels, removed or
//! altered in turn. Each mutant is compiled and runs in a process of its own (`child_mutant`): in
//! race mode first, then plain under several schedules, until a fault or other bits than those of
//! the true kernel give it away. At least 95% must be caught, and all that are not must stand in
//! [`EQUIVALENT`] with a reason or fail the test.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use isobath::backend::{AttentionSpec, HeadSpec, NormSpec};
use isobath::config::{Dtype, NormKind};
use isobath::cuda::attention::{Attention, AttentionBackward, AttentionForward, Passes};
use isobath::cuda::gemm::{Choice, Gemm, Layout, Output, Product};
use isobath::cuda::host::{Asynchronous, Host, Options, Order};
use isobath::cuda::loss::{Loss, LossBackward, LossForward};
use isobath::cuda::norm::{Norm, NormBackward, NormForward};
use isobath::cuda::{Allocation, Arguments, Driver, Family, Launch, StreamId};

use isobath::tensor::IGNORE_INDEX;

use super::library;
use super::machines::{download, unwritten, upload};
use crate::support::normals;

// ------------------------------------------------------------------ the kernels

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kernels {
    Norm,
    /// Of loss_sm90.cu.
    Loss,
    GemmSm90,
    /// Of gemm_sm90.cu, with SwiGLU's gradient, what its section on epilogues that read says.
    GemmGradient,
    GemmMma,
    /// Of attention_sm90.cu, each with what is in its own section.
    AttentionForward,
    AttentionBackward,
    /// Of attention_backward_sm90.cu.
    AttentionOnePass,
    /// Of attention_backward_short_sm90.cu.
    AttentionShort,
}

const ALL: [Kernels; 9] = [
    Kernels::Norm,
    Kernels::Loss,
    Kernels::GemmSm90,
    Kernels::GemmGradient,
    Kernels::GemmMma,
    Kernels::AttentionForward,
    Kernels::AttentionBackward,
    Kernels::AttentionOnePass,
    Kernels::AttentionShort,
];

impl Kernels {
    fn name(self) -> &'static str {
        match self {
            Kernels::Norm => "norm",
            Kernels::Loss => "loss_sm90",
            Kernels::GemmSm90 => "gemm_sm90",
            Kernels::GemmGradient => "gemm_sm90_gradient",
            Kernels::GemmMma => "gemm_mma",
            Kernels::AttentionForward => "attention_forward",
            Kernels::AttentionBackward => "attention_backward",
            Kernels::AttentionOnePass => "attention_one_pass",
            Kernels::AttentionShort => "attention_short",
        }
    }

    fn named(name: &str) -> Self {
        ALL.into_iter().find(|it| it.name() == name).unwrap()
    }

    /// The kernel file, with no more of its variants than the mutants run: they are compiled often.
    fn text(self) -> String {
        match self {
            Kernels::Norm => patched(
                include_str!("../../kernels/norm.cu"),
                &[
                    (
                        "NORM_KERNELS_OF(bf16)\nNORM_KERNELS_OF(f32)\n",
                        "NORM_KERNELS(bf16, 32, 1, 8, 4)\nNORM_KERNELS(bf16, 256, 1, 8, 4)\n",
                    ),
                    ("NORM_KERNELS(f32, 512, 4, 2, 1)\n", ""),
                ],
            ),
            Kernels::Loss => patched(
                include_str!("../../kernels/loss_sm90.cu"),
                &[(
                    "LOSS_KERNELS_OF(bf16)\nLOSS_KERNELS_OF(f32)\n",
                    "LOSS_KERNELS(bf16, 256, 16, 2)\n",
                )],
            ),
            Kernels::GemmSm90 => with_some_gemms(&[
                "STORE_KERNEL(nt, ALONG_K, 128, 128, 6, false)",
                "ADD_KERNEL(128, 256, 4, true)",
            ]),
            Kernels::GemmGradient => {
                with_some_gemms(&["SWIGLU_GRADIENT_KERNEL(128, 192, 4, false)"])
            }
            Kernels::GemmMma => include_str!("../kernels/gemm_mma.cu").to_string(),
            Kernels::AttentionForward => with_one_attention(
                ATTENTION,
                &["FORWARD_KERNEL(128, 32)"],
                &[
                    "forward_sm90_192x32",
                    "backward_q_sm90_128x32",
                    "backward_kv_sm90_128x32",
                    "delta_sm90_32",
                    "backward_sm90_128x32",
                    "backward_short_sm90_256x32",
                    "decode_bf16_32",
                ],
            ),
            Kernels::AttentionBackward => with_one_attention(
                ATTENTION,
                &["BACKWARD_KERNELS(32)"],
                &[
                    "forward_sm90_128x32",
                    "forward_sm90_192x32",
                    "delta_sm90_32",
                    "backward_sm90_128x32",
                    "backward_short_sm90_256x32",
                    "decode_bf16_32",
                ],
            ),
            Kernels::AttentionOnePass => with_one_attention(
                ATTENTION_ONE_PASS,
                &["BACKWARD_KERNELS(32)"],
                &[
                    "forward_sm90_128x32",
                    "forward_sm90_192x32",
                    "backward_q_sm90_128x32",
                    "backward_kv_sm90_128x32",
                    "backward_short_sm90_256x32",
                    "decode_bf16_32",
                ],
            ),
            Kernels::AttentionShort => with_one_attention(
                ATTENTION_SHORT,
                &["BACKWARD_KERNEL(32)"],
                &[
                    "forward_sm90_128x32",
                    "forward_sm90_192x32",
                    "backward_q_sm90_128x32",
                    "backward_kv_sm90_128x32",
                    "delta_sm90_32",
                    "backward_sm90_128x32",
                    "decode_bf16_32",
                ],
            ),
        }
    }

    /// The part of the text whose calls are broken: of the Hopper products, the epilogues that read,
    /// or all but those; of attention, one pass after the other, and with the second
    /// one what both share.
    fn breaks(self, text: &str, at: usize) -> bool {
        let section = |name: &str| {
            let start = text.find(&format!("---- {name}\n"));
            start.unwrap_or_else(|| panic!("no section `{name}`"))
        };
        let in_forward = || (section("forward")..section("backward")).contains(&at);
        let in_reading = || (section("epilogues that read")..section("blocks")).contains(&at);
        match self {
            Kernels::Norm | Kernels::Loss | Kernels::GemmMma => true,
            Kernels::GemmSm90 => !in_reading(),
            Kernels::GemmGradient => in_reading(),
            Kernels::AttentionForward => in_forward(),
            Kernels::AttentionBackward => !in_forward(),
            Kernels::AttentionOnePass | Kernels::AttentionShort => at > section("the work"),
        }
    }

    /// Runs every path of the kernels on a few small shapes: several rows and tiles for each block,
    /// more steps than stages, tails, with and without a residual. All bits that come out.
    fn run(self, driver: &mut dyn Driver) -> Result<Vec<u8>, String> {
        let found = match self {
            Kernels::Norm => run_norm(driver, &NORMS),
            Kernels::Loss => run_loss(driver, &LOSSES),
            Kernels::GemmSm90 => run_gemm_sm90(driver, &PRODUCTS),
            Kernels::GemmGradient => run_swiglu(driver, Layout::Nn, 192, &GRADIENTS),
            Kernels::GemmMma => run_gemm_mma(driver),
            Kernels::AttentionForward => run_attention_forward(driver),
            Kernels::AttentionBackward => {
                run_attention_backward(driver, Passes::Two, true, &ATTENTIONS)
            }
            Kernels::AttentionOnePass => {
                let mut run =
                    |in_order| run_attention_backward(driver, Passes::One, in_order, &ATTENTIONS);
                run(true).and_then(|in_order| Ok([in_order, run(false)?].concat()))
            }
            Kernels::AttentionShort => {
                run_attention_backward(driver, Passes::Short, true, &SHORT_ATTENTIONS)
            }
        };
        found.map_err(|error| error.to_string())
    }
}

/// Of the Hopper products, the kernels that these lines make; the others are there in name, as
/// src/cuda/gemm/sm90.rs wants to find them.
fn with_some_gemms(kept: &[&str]) -> String {
    let text = include_str!("../../kernels/gemm_sm90.cu");
    let mut found = 0;
    let line = |line: &str| -> String {
        let Some((kind, rest)) = line.split_once('(') else { return line.to_string() };
        let of_tile = |name: &str, first: usize| -> String {
            let parts: Vec<&str> = rest.split(", ").collect();
            format!("gemm_sm90_{name}_{}x{}", parts[first], parts[first + 1])
        };
        let name = match kind {
            _ if kept.contains(&line) => {
                found += 1;
                return line.to_string();
            }
            "STORE_KERNEL" => of_tile(&rest[..2], 2),
            "ADD_KERNEL" => of_tile("tn", 0),
            "ROTARY_KERNEL" => of_tile("nt_rotary", 0),
            "SWIGLU_KERNEL" => of_tile("nt_swiglu", 0),
            "SWIGLU_GRADIENT_KERNEL" => of_tile("nn_swiglu", 0),
            _ => return line.to_string(),
        };
        format!("KERNEL({name}, 1)() {{}} EXPORT_KERNEL({name})")
    };
    let text = text.lines().map(line).collect::<Vec<_>>().join("\n") + "\n";
    assert_eq!(found, kept.len(), "{kept:?} must be there");
    text
}

const ATTENTION: &str = include_str!("../../kernels/attention_sm90.cu");
const ATTENTION_ONE_PASS: &str = include_str!("../../kernels/attention_backward_sm90.cu");
const ATTENTION_SHORT: &str = include_str!("../../kernels/attention_backward_short_sm90.cu");
const ATTENTION_HEADER: &str = include_str!("../../kernels/attention_sm90.cuh");

/// A kernel file of the Hopper attention, with the header that its lines are to be broken in, too.
fn with_header(text: &str) -> String {
    let header = ATTENTION_HEADER.replace("#pragma once\n", "");
    patched(text, &[("#include \"attention_sm90.cuh\"\n", &header)])
}

/// Of the Hopper attention, the kernels that these lines make, and others in name.
fn with_one_attention(text: &str, kept: &[&str], named: &[&str]) -> String {
    let text = with_header(text);
    let makes = |line: &str| {
        let makers = ["FORWARD_KERNEL(", "BACKWARD_KERNELS(", "BACKWARD_KERNEL("];
        makers.iter().any(|maker| line.starts_with(maker))
    };
    let lines = text.lines().filter(|line| !makes(line) || kept.contains(line));
    let mut text: String = lines.map(|line| format!("{line}\n")).collect();
    for name in named {
        let _ =
            writeln!(text, "KERNEL(attention_{name}, 1)() {{}} EXPORT_KERNEL(attention_{name})");
    }
    assert!(kept.iter().all(|line| text.contains(&format!("\n{line}\n"))), "{kept:?}");
    text
}

/// Replaces each old text, which must be there once.
fn patched(text: &str, edits: &[(&str, &str)]) -> String {
    let mut text = text.to_string();
    for (old, new) in edits {
        assert_eq!(text.matches(old).count(), 1, "this must occur once: {old}");
        text = text.replace(old, new);
    }
    text
}

fn bytes(values: &[f64], all: &mut Vec<u8>) {
    // NaNs of all kinds are one kind.
    all.extend(values.iter().flat_map(|value| match value.is_nan() {
        true => f64::NAN.to_bits().to_le_bytes(),
        false => value.to_bits().to_le_bytes(),
    }));
}

/// Type, rows, columns, kind and whether there is a residual.
type NormCase = (Dtype, usize, usize, NormKind, bool);

const NORMS: [NormCase; 3] = [
    (Dtype::Bf16, 70, 248, NormKind::Layer, false),
    (Dtype::Bf16, 35, 2040, NormKind::Layer, true),
    (Dtype::Bf16, 21, 2048, NormKind::Rms, false),
];
/// The remaining variants.
const MORE_NORMS: [NormCase; 6] = [
    (Dtype::F32, 70, 124, NormKind::Rms, false),
    (Dtype::Bf16, 67, 504, NormKind::Rms, true),
    (Dtype::F32, 66, 508, NormKind::Layer, true),
    (Dtype::Bf16, 9, 4088, NormKind::Layer, false),
    (Dtype::F32, 9, 4096, NormKind::Rms, true),
    (Dtype::F32, 9, 8188, NormKind::Layer, true),
];

fn run_norm(driver: &mut dyn Driver, cases: &[NormCase]) -> isobath::error::Result<Vec<u8>> {
    let mut all = vec![];
    for &(dtype, rows, columns, kind, residual) in cases {
        let norm = Norm::new(driver, dtype, columns)?;
        let spec = NormSpec { kind, eps: 1e-6, depth: 3 };
        let inp = upload(driver, "inp", dtype, &normals(1, rows * columns));
        let added = upload(driver, "residual", dtype, &normals(2, rows * columns));
        let gain = upload(driver, "gain", Dtype::F32, &normals(3, columns));
        let d_out = upload(driver, "d_out", dtype, &normals(4, rows * columns));
        let d_inp = upload(driver, "d_inp", dtype, &normals(5, rows * columns));
        let d_gain = upload(driver, "d_gain", Dtype::F32, &normals(6, columns));
        let sum = unwritten(driver, "sum", dtype, rows * columns);
        let out = unwritten(driver, "out", dtype, rows * columns);
        let mean = unwritten(driver, "mean", Dtype::F32, rows);
        let rstd = unwritten(driver, "rstd", Dtype::F32, rows);
        let partials = norm.partials(rows);
        let partial = unwritten(driver, "partial", Dtype::F32, partials * columns);
        let of_layer = (kind == NormKind::Layer).then_some(mean.address);
        let forward = NormForward {
            inp: inp.address,
            residual: residual.then_some((added.address, sum.address)),
            gain: gain.address,
            out: out.address,
            mean: of_layer,
            rstd: rstd.address,
        };
        norm.forward(driver, StreamId::MAIN, spec, rows, &forward)?;
        let backward = NormBackward {
            inp: if residual { sum.address } else { inp.address },
            gain: gain.address,
            mean: of_layer,
            rstd: rstd.address,
            d_out: d_out.address,
            partial: partial.address,
            d_inp: d_inp.address,
            accumulate: residual,
            d_gain: d_gain.address,
        };
        norm.backward(driver, StreamId::MAIN, spec, rows, &backward)?;
        for (dtype, buffer) in
            [(dtype, sum), (dtype, out), (Dtype::F32, rstd), (dtype, d_inp), (Dtype::F32, d_gain)]
        {
            bytes(&download(driver, dtype, buffer), &mut all);
        }
        for buffer in [inp, added, gain, d_out, d_inp, d_gain, sum, out, mean, rstd, partial] {
            driver.release(buffer)?;
        }
    }
    Ok(all)
}

/// Classes and columns, of a cluster of four and of eight.
const LOSSES: [(usize, usize); 2] = [(65_541, 65_544), (163_841, 163_848)];

/// Rows with targets in the second block and in the first, and an ignored one between them.
fn run_loss(driver: &mut dyn Driver, cases: &[(usize, usize)]) -> isobath::error::Result<Vec<u8>> {
    let mut all = vec![];
    for &(classes, columns) in cases {
        let loss = Loss::new(driver, Dtype::Bf16, classes, columns)?;
        let targets = driver.upload("targets", &[2048, IGNORE_INDEX, 7])?;
        let rows = 3;
        let logits = upload(driver, "logits", Dtype::Bf16, &normals(1, rows * columns));
        let scale = driver.upload("scale", &[0.5f32])?;
        let losses = unwritten(driver, "losses", Dtype::F32, rows);
        let (at, targets_at, losses_at) = (logits.address, targets.address, losses.address);
        let forward = LossForward { logits: at, targets: targets_at, losses: losses_at };
        loss.forward(driver, StreamId::MAIN, rows, 1e-2, &forward)?;
        bytes(&download(driver, Dtype::F32, losses), &mut all);
        let backward = LossBackward {
            logits: at,
            targets: targets_at,
            scale: scale.address,
            losses: losses_at,
        };
        loss.backward(driver, StreamId::MAIN, rows, 1e-2, &backward)?;
        for (dtype, buffer) in [(Dtype::F32, losses), (Dtype::Bf16, logits)] {
            bytes(&download(driver, dtype, buffer), &mut all);
        }
        for buffer in [targets, logits, scale, losses] {
            driver.release(buffer)?;
        }
    }
    Ok(all)
}

/// Layout, columns of the tile, splits, blocks of a cluster, M, N, K and whether there is an addend.
type ProductCase = (Layout, usize, usize, usize, usize, usize, usize, bool);

const PRODUCTS: [ProductCase; 4] = [
    (Layout::Nt, 128, 1, 1, 200, 264, 456, true),
    (Layout::Nt, 128, 1, 1, 130, 136, 40, false),
    (Layout::Tn, 256, 3, 1, 104, 104, 390, false),
    (Layout::Nt, 128, 1, 2, 130, 264, 456, false),
];
const MORE_PRODUCTS: [ProductCase; 6] = [
    (Layout::Nt, 256, 1, 1, 130, 264, 328, true),
    (Layout::Nn, 192, 1, 1, 130, 200, 72, true),
    (Layout::Nn, 128, 1, 1, 64, 72, 64, false),
    (Layout::Tn, 128, 1, 1, 136, 264, 72, false),
    (Layout::Tn, 256, 1, 2, 136, 264, 328, false),
    (Layout::Tn, 128, 2, 1, 136, 200, 136, false),
];

fn run_gemm_sm90(
    driver: &mut dyn Driver,
    cases: &[ProductCase],
) -> isobath::error::Result<Vec<u8>> {
    let mut all = vec![];
    let gemm = Gemm::new(driver, Dtype::Bf16, Some(Family::Sm90))?;
    for &(layout, columns, splits, cluster, m, n, k, with_addend) in cases {
        let a = upload(driver, "a", Dtype::Bf16, &normals(1, m * k));
        let b = upload(driver, "b", Dtype::Bf16, &normals(2, n * k));
        let addend = upload(driver, "addend", Dtype::Bf16, &normals(3, m * n));
        let (dtype, out) = match layout {
            Layout::Tn => (Dtype::F32, upload(driver, "out", Dtype::F32, &normals(4, m * n))),
            _ => (Dtype::Bf16, unwritten(driver, "out", Dtype::Bf16, m * n)),
        };
        let output = match layout {
            Layout::Tn => Output::Accumulate,
            _ => Output::Store { addend: with_addend.then_some(addend.address) },
        };
        let (a_at, b_at, out_at) = (a.address, b.address, out.address);
        let product = Product { layout, m, n, k, a: a_at, b: b_at, out: out_at, output };
        let variant = gemm.variants(layout).find(|it| it.columns == columns).unwrap();
        let plan = gemm.plan_with(driver, Choice { variant, splits, cluster }, &product)?;
        // Twice where there are turns, which have to be as they were.
        for _ in 0..splits.min(2) {
            plan.launch(driver, StreamId::MAIN)?;
        }
        bytes(&download(driver, dtype, out), &mut all);
        for buffer in [a, b, addend, out] {
            driver.release(buffer)?;
        }
    }
    gemm.release(driver)?;
    Ok(all)
}

/// Blocks of a cluster, M, N and K of the gradient of SwiGLU: several tiles for each consumer of a
/// block, with tails, and a pair of blocks.
const GRADIENTS: [[usize; 4]; 2] = [[1, 300, 584, 72], [2, 130, 264, 328]];
const MORE_GRADIENTS: [[usize; 4]; 2] = [[1, 250, 712, 136], [2, 136, 264, 72]];
/// The same of gate and up.
const GATED: [[usize; 4]; 2] = [[1, 300, 296, 72], [2, 130, 128, 328]];

/// SwiGLU behind an NT product, its gradient behind an NN one. `columns`: of the tile.
fn run_swiglu(
    driver: &mut dyn Driver,
    layout: Layout,
    columns: usize,
    cases: &[[usize; 4]],
) -> isobath::error::Result<Vec<u8>> {
    let mut all = vec![];
    let gemm = Gemm::new(driver, Dtype::Bf16, Some(Family::Sm90))?;
    for &[cluster, m, n, k] in cases {
        let halves_of_b = if layout == Layout::Nt { 2 } else { 1 };
        let a = upload(driver, "a", Dtype::Bf16, &normals(1, m * k));
        let b = upload(driver, "b", Dtype::Bf16, &normals(2, halves_of_b * n * k));
        let gate_up = upload(driver, "gate and up", Dtype::Bf16, &normals(3, 2 * m * n));
        let out = unwritten(driver, "out", Dtype::Bf16, 2 * m * n);
        let gated = unwritten(driver, "product", Dtype::Bf16, m * n);
        let output = match layout {
            Layout::Nt => Output::SwiGlu { product: gated.address },
            _ => Output::SwiGluGradient { gate_up: gate_up.address },
        };
        let (a_at, b_at, out_at) = (a.address, b.address, out.address);
        let product = Product { layout, m, n, k, a: a_at, b: b_at, out: out_at, output };
        let mut variants = gemm.variants_for(layout, output);
        let variant = variants.find(|it| it.columns == columns).unwrap();
        let choice = Choice { cluster, ..Choice::whole(variant) };
        gemm.plan_with(driver, choice, &product)?.launch(driver, StreamId::MAIN)?;
        for found in [out, gated] {
            bytes(&download(driver, Dtype::Bf16, found), &mut all);
        }
        for buffer in [a, b, gate_up, out, gated] {
            driver.release(buffer)?;
        }
    }
    gemm.release(driver)?;
    Ok(all)
}

/// Batch and sequence, and where a document begins in each row of the second: more stages than the
/// rings have, several items for a block, and whole tiles that a consumer passes over.
const ATTENTIONS: [(usize, usize, Option<usize>); 2] = [(1, 600, None), (2, 330, Some(200))];
/// For one block: more steps than stages, tiles of keys that the next head is loaded into, and a
/// consumer that has none.
const SHORT_ATTENTIONS: [(usize, usize, Option<usize>); 3] =
    [(2, 230, None), (3, 140, Some(70)), (5, 50, None)];
const ATTENTION_HEADS: HeadSpec = HeadSpec { heads: 2, kv_heads: 1, head_dim: 32 };

fn run_attention_forward(driver: &mut dyn Driver) -> isobath::error::Result<Vec<u8>> {
    let mut all = vec![];
    let attention = Attention::new(driver, Dtype::Bf16, ATTENTION_HEADS, Some(Family::Sm90))?;
    for (batch, sequence, document) in ATTENTIONS {
        let (inputs, pass) = attention_forward(driver, batch, sequence, document);
        attention.plan_forward(driver, &pass)?.launch(driver, StreamId::MAIN)?;
        for (dtype, buffer) in [(Dtype::Bf16, inputs[1]), (Dtype::F32, inputs[2])] {
            bytes(&download(driver, dtype, buffer), &mut all);
        }
        for buffer in inputs {
            driver.release(buffer)?;
        }
    }
    Ok(all)
}

/// From results of a forward pass that are none: no formula needs them to be.
fn run_attention_backward(
    driver: &mut dyn Driver,
    passes: Passes,
    in_order: bool,
    attentions: &[(usize, usize, Option<usize>)],
) -> isobath::error::Result<Vec<u8>> {
    let mut all = vec![];
    let attention = Attention::new(driver, Dtype::Bf16, ATTENTION_HEADS, Some(Family::Sm90))?;
    let mut attention = attention.with_passes(passes)?.with_order(in_order);
    for &(batch, sequence, document) in attentions {
        let (inputs, mut forward) = attention_forward(driver, batch, sequence, document);
        let tokens = batch * sequence;
        let out = upload(driver, "out", Dtype::Bf16, &normals(5, tokens * 64));
        let lse = upload(driver, "lse", Dtype::F32, &vec![5.0; tokens * 2]);
        (forward.out, forward.log_sum_exp) = (out.address, lse.address);
        let d_out = upload(driver, "d_out", Dtype::Bf16, &normals(6, tokens * 64));
        let delta = unwritten(driver, "delta", Dtype::F32, tokens * 2);
        let d_qkv = unwritten(driver, "d_qkv", Dtype::Bf16, tokens * 128);
        let pass = AttentionBackward {
            forward,
            d_out: d_out.address,
            delta: delta.address,
            d_qkv: d_qkv.address,
            angles: None,
        };
        attention.plan_backward(driver, &pass)?.launch(driver, StreamId::MAIN)?;
        let columns = ATTENTION_HEADS.qkv_columns();
        // d_q has other bits in every order.
        let skipped = if in_order { 0 } else { ATTENTION_HEADS.heads * ATTENTION_HEADS.head_dim };
        for token in download(driver, Dtype::Bf16, d_qkv).chunks_exact(columns) {
            bytes(&token[skipped..], &mut all);
        }
        bytes(&download(driver, Dtype::F32, delta), &mut all);
        for buffer in inputs.into_iter().chain([out, lse, d_out, delta, d_qkv]) {
            driver.release(buffer)?;
        }
    }
    attention.release(driver)?;
    Ok(all)
}

/// qkv, out, log-sum-exp and the documents' starts.
fn attention_forward(
    driver: &mut dyn Driver,
    batch: usize,
    sequence: usize,
    document: Option<usize>,
) -> ([Allocation; 4], AttentionForward) {
    let tokens = batch * sequence;
    let second = document.unwrap_or(0);
    let starts = (0..tokens).map(|it| if it % sequence < second { 0 } else { second as i32 });
    let starts = driver.upload("starts", &starts.collect::<Vec<i32>>()).unwrap();
    let qkv = upload(driver, "qkv", Dtype::Bf16, &normals(1, tokens * 128));
    let out = unwritten(driver, "out", Dtype::Bf16, tokens * 64);
    let lse = unwritten(driver, "lse", Dtype::F32, tokens * 2);
    let pass = AttentionForward {
        spec: AttentionSpec { heads: ATTENTION_HEADS, batch, sequence },
        qkv: qkv.address,
        document_starts: document.map(|_| starts.address),
        out: out.address,
        log_sum_exp: lse.address,
    };
    ([qkv, out, lse, starts], pass)
}

fn run_gemm_mma(driver: &mut dyn Driver) -> isobath::error::Result<Vec<u8>> {
    let mut all = vec![];
    for (m, n, k) in [(64, 128, 160), (64, 64, 32)] {
        let (_, out) = gemm_mma(driver, m, n, k)?;
        bytes(&out, &mut all);
    }
    Ok(all)
}

/// The exact product of whole numbers, and what the kernel makes of it.
fn gemm_mma(
    driver: &mut dyn Driver,
    m: usize,
    n: usize,
    k: usize,
) -> isobath::error::Result<(Vec<f64>, Vec<f64>)> {
    let ramp = |count: usize, step: usize| -> Vec<f64> {
        (0..count).map(|i| ((i * step + i / k * 7) % 31) as f64 - 15.0).collect()
    };
    let (values_a, values_b) = (ramp(m * k, 5), ramp(n * k, 3));
    let element = |i: usize| -> f64 {
        let (a, b) = (&values_a[i / n * k..][..k], &values_b[i % n * k..][..k]);
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    };
    let exact = (0..m * n).map(element).collect();
    let a = upload(driver, "a", Dtype::Bf16, &values_a);
    let b = upload(driver, "b", Dtype::Bf16, &values_b);
    let out = unwritten(driver, "out", Dtype::F32, m * n);
    let kernel = driver.kernel("gemm_mma")?;
    let grid = [n as u32 / 64, m as u32 / 64, 1];
    let launch = Launch::new(kernel, grid, [128, 1, 1]).shared_bytes(2 * 2 * 64 * 64);
    let (n, k) = (n as i32, k as i32);
    let arguments = Arguments::new().with(a).with(b).with(out).with(n).with(k);
    driver.launch(&launch, &arguments)?;
    let found = download(driver, Dtype::F32, out);
    for buffer in [a, b, out] {
        driver.release(buffer)?;
    }
    Ok((exact, found))
}

// ------------------------------------------------------------------ schedules

/// One block after the other, and each takes as many rows and tiles as a small machine makes it.
fn options(race: bool, order: Order, asynchronous: Asynchronous, seed: u64) -> Options {
    let watchdog = Duration::from_secs(2);
    let (workers, multiprocessors, dependent) = (1, 1, true);
    Options { race, order, asynchronous, seed, workers, watchdog, multiprocessors, dependent }
}

/// How a machine for these kernels begins; it keeps its number of multiprocessors.
fn first_options(kernels: Kernels) -> Options {
    let multiprocessors = match kernels {
        Kernels::GemmSm90 => 3,     // for as many splits
        Kernels::GemmGradient => 2, // for a pair of blocks
        _ => 1,
    };
    Options { multiprocessors, ..options(true, Order::Fifo, Asynchronous::Late, 0) }
}

/// What a mutant has to pass, the most telling first.
fn schedules() -> Vec<Options> {
    use Asynchronous::*;
    use Order::*;
    let mut all = vec![];
    for race in [true, false] {
        all.push(options(race, Fifo, Late, 0));
        all.push(options(race, Lifo, Early, 0));
        all.extend((1..=3).map(|seed| options(race, Random, Anytime, seed)));
    }
    all
}

// ------------------------------------------------------------------ a mutant and its process

/// A kernel file with something changed.
struct Mutant {
    kernels: Kernels,
    /// "kernels/gemm_sm90.cu:112 `wgmma_commit();`: removed"
    name: String,
    text: String,
}

/// What became of one.
#[derive(Clone, Debug, PartialEq)]
enum Verdict {
    /// The machine's words.
    Fault(String),
    /// Other bits, and under which schedule.
    Wrong(String),
    NotCompiled(String),
    /// Nothing was noticed, or the process died of it: the machine failed.
    Survived,
    Died(String),
}

const LIBRARY: &str = "ISOBATH_MUTANT_LIBRARY";
const SUITE: &str = "ISOBATH_MUTANT_KERNELS";
/// The bits of the true kernel: written if it is not there.
const REFERENCE: &str = "ISOBATH_MUTANT_REFERENCE";
const ANSWER: &str = "ISOBATH_MUTANT_ANSWER";

#[test]
#[ignore = "child process of other tests"]
fn child_mutant() {
    let (Ok(library), Ok(reference)) = (env::var(LIBRARY), env::var(REFERENCE)) else { return };
    let kernels = Kernels::named(&env::var(SUITE).unwrap());
    let (reference, answer) = (PathBuf::from(reference), PathBuf::from(env::var(ANSWER).unwrap()));
    let mut host = Host::load(Path::new(&library), first_options(kernels)).unwrap();
    for options in schedules() {
        host.set_options(options);
        let schedule = format!(
            "{}{} {} {}",
            if options.race { "race " } else { "" },
            options.order,
            options.asynchronous,
            options.seed
        );
        match kernels.run(&mut host) {
            Err(error) => return fs::write(answer, format!("fault\n{schedule}: {error}")).unwrap(),
            Ok(bits) if !reference.exists() => fs::write(&reference, bits).unwrap(),
            Ok(bits) if fs::read(&reference).unwrap() != bits => {
                return fs::write(answer, format!("wrong\n{schedule}")).unwrap();
            }
            Ok(_) => {}
        }
    }
    fs::write(answer, "survived\n").unwrap();
}

/// Compiles and runs one. `folder` also holds the references.
fn judge(folder: &Path, index: usize, mutant: &Mutant) -> Verdict {
    let name = format!("mutant{index}");
    let compiled =
        std::panic::catch_unwind(|| library::compile(folder, &name, &[(&name, &mutant.text)]));
    let library = match compiled {
        Ok(library) => library,
        Err(panic) => {
            let said = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            return Verdict::NotCompiled(said);
        }
    };
    let answer = folder.join(format!("{name}.answer"));
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", "cuda::mutants::child_mutant", "--ignored", "--nocapture"]);
    child.env(LIBRARY, &library).env(SUITE, mutant.kernels.name()).env(ANSWER, &answer);
    child.env(REFERENCE, folder.join(format!("{}.reference", mutant.kernels.name())));
    child.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = child.spawn().unwrap();
    let limit = Instant::now() + Duration::from_secs(120);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > limit {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        thread::sleep(Duration::from_millis(5));
    };
    fs::remove_file(library).unwrap();
    let text = match (status, fs::read_to_string(&answer)) {
        (Some(_), Ok(text)) => text,
        (status, _) => return Verdict::Died(format!("{status:?}")),
    };
    match text.split_once('\n').unwrap() {
        ("fault", said) => Verdict::Fault(said.to_string()),
        ("wrong", schedule) => Verdict::Wrong(schedule.to_string()),
        _ => Verdict::Survived,
    }
}

/// All of them, several at once, after the true kernels have written the references.
fn judge_all(mutants: &[Mutant]) -> Vec<Verdict> {
    let folder = tempfile::tempdir().unwrap();
    let used = |kernels: &Kernels| mutants.iter().any(|it| it.kernels == *kernels);
    for (index, kernels) in ALL.into_iter().filter(used).enumerate() {
        let name = format!("{} unchanged", kernels.name());
        let same = Mutant { kernels, name, text: kernels.text() };
        let verdict = judge(folder.path(), index, &same);
        assert_eq!(verdict, Verdict::Survived, "{}", same.name);
    }
    let verdicts: Vec<OnceLock<Verdict>> = mutants.iter().map(|_| OnceLock::new()).collect();
    let next = AtomicUsize::new(0);
    let lines = Mutex::new(());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, |it| it.get()) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(mutant) = mutants.get(index) else { break };
                    let verdict = judge(folder.path(), ALL.len() + index, mutant);
                    let line = lines.lock().unwrap();
                    println!("{}: {verdict:?}", mutant.name);
                    drop(line);
                    verdicts[index].set(verdict).unwrap();
                }
            });
        }
    });
    verdicts.into_iter().map(|verdict| verdict.into_inner().unwrap()).collect()
}

// ------------------------------------------------------------------ planted bugs

/// A bug as people make it, and words of what must be said; "wrong": other bits, no fault.
struct Planted {
    kernels: Kernels,
    what: &'static str,
    edits: &'static [(&'static str, &'static str)],
    said: &'static [&'static str],
}

const fn planted(
    kernels: Kernels,
    what: &'static str,
    edits: &'static [(&'static str, &'static str)],
    said: &'static [&'static str],
) -> Planted {
    Planted { kernels, what, edits, said }
}

const WRONG: &[&str] = &[];

const PLANTED: &[Planted] = &[
    planted(
        Kernels::GemmSm90,
        "a wrong step of K inside the swizzle atom",
        &[(
            "(ROWS == ACROSS_K ? SPAN : sizeof(bf16)) / 16",
            "(ROWS == ALONG_K ? sizeof(bf16) : SPAN) / 32",
        )],
        WRONG,
    ),
    planted(
        Kernels::GemmSm90,
        "no barrier between the initialisation of the mbarriers and their use",
        &[(
            "    fence_mbarrier_init();\n  }\n  __syncthreads();",
            "    fence_mbarrier_init();\n  }",
        )],
        &["data race on shared memory", "after a write by block (0,0,0) thread 0 "],
    ),
    planted(
        Kernels::GemmSm90,
        "a wrong parity at the producer's wait",
        &[(
            "mbarrier_wait(&empty[at.stage], at.parity ^ 1)",
            "mbarrier_wait(&empty[at.stage], at.parity)",
        )],
        &["deadlock", "for mbarrier at shared 0x", "(4 of 4 arrivals and 0 bytes are missing"],
    ),
    planted(
        Kernels::GemmSm90,
        "a parity that never blocks in the first rounds: the producer overruns the consumers",
        &[(
            "mbarrier_wait(&empty[at.stage], at.parity ^ 1);",
            "if (step >= K::STAGES) mbarrier_wait(&empty[at.stage], at.parity);",
        )],
        &["mbarrier"],
    ),
    planted(
        Kernels::GemmSm90,
        "too few expected bytes",
        &[(
            "mbarrier_arrive_expect_tx(arrived, K::STAGE_BYTES)",
            "mbarrier_arrive_expect_tx(arrived, K::A_BYTES)",
        )],
        &["data race on shared memory", "by a copy that completes on the mbarrier at shared 0x"],
    ),
    planted(
        Kernels::GemmSm90,
        "a stage is handed back before the wgmma that reads it has finished",
        &[("wgmma_wait<1>();", "wgmma_wait<2>();")],
        &["data race on shared memory", "the wgmma of block (0,0,0) thread", "asynchronous read"],
    ),
    planted(
        Kernels::GemmSm90,
        "one thread releases a stage for four warps",
        &[
            (
                "    if (lane == 0) mbarrier_arrive(empty);",
                "    if (threadIdx.x % 128 == 0) mbarrier_arrive(empty);",
            ),
            ("(SHARED_TILES ? CONSUMERS : 1) * WARPGROUP / 32", "(SHARED_TILES ? CONSUMERS : 1)"),
        ],
        &["data race on shared memory", "the wgmma of block (0,0,0) thread", "asynchronous read"],
    ),
    planted(
        Kernels::GemmSm90,
        "the store tile is written without its swizzle",
        &[("swizzle<BOX_SPAN>(offset)", "offset")],
        WRONG,
    ),
    planted(
        Kernels::GemmSm90,
        "ordinary writes are not fenced before the TMA store reads them",
        &[(
            "  fence_proxy_async();\n  barrier_sync(out.barrier, WARPGROUP);",
            "  barrier_sync(out.barrier, WARPGROUP);",
        )],
        &[
            "no fence.proxy.async between an ordinary write and an asynchronous access",
            "bulk store",
        ],
    ),
    planted(
        Kernels::GemmSm90,
        "no barrier between the writes of the tile and its TMA store",
        &[(
            "fence_proxy_async();\n  barrier_sync(out.barrier, WARPGROUP);",
            "fence_proxy_async();",
        )],
        &["data race on shared memory", "bulk store of block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmSm90,
        "accumulators are used before the last group is complete",
        &[("  wgmma_wait<0>();\n  release(&empty[previous_stage], cluster);\n", "")],
        &["accumulator of the wgmma at", "is read at", "before wgmma_wait"],
    ),
    planted(
        Kernels::GemmSm90,
        "a store tile is written while the store before the last one still reads it",
        &[("if (storing) bulk_wait_read<STORES - 1>();", "")],
        &["data race on shared memory", "bulk store of block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmSm90,
        "the consumers share one barrier",
        &[("first * BUFFER_BYTES, 1 + consumer};", "first * BUFFER_BYTES, 1};")],
        &["data race on shared memory"],
    ),
    planted(
        Kernels::GemmSm90,
        "the last stores are not waited for",
        &[("    if (threadIdx.x % WARPGROUP == 0) bulk_wait<0>();\n", "")],
        &["exits although it never waited for the tma_store at"],
    ),
    planted(
        Kernels::GemmSm90,
        "the producers keep their registers",
        &[("    setmaxnreg_dec<PRODUCER_REGISTERS>();\n", "")],
        &["setmaxnreg: no registers are free"],
    ),
    planted(
        Kernels::GemmSm90,
        "a whole warp produces",
        &[("warp == 0 && elect_one()", "warp == 0")],
        &["mbarrier"],
    ),
    planted(
        Kernels::GemmSm90,
        "consumers that take tiles in turn do not wait for each other",
        &[("      mbarrier_wait(&order[consumer], (own + (consumer == 0 ? 1 : 0)) & 1);\n", "")],
        &["shared memory"],
    ),
    planted(
        Kernels::GemmSm90,
        "a producer waits for its own consumers, and not for those of its pair",
        &[("uint32_t(K::READERS * work->cluster)", "uint32_t(K::READERS)")],
        &["data race on shared memory", "of block (1,0,0)"],
    ),
    planted(
        Kernels::GemmSm90,
        "a split does not wait for its turn",
        &[("while (load_acquire(turn) != uint32_t(item.split)) __nanosleep(64);", ";")],
        &["data race on global memory"],
    ),
    planted(
        Kernels::GemmSm90,
        "the turn is passed on before all threads have added",
        &[(
            "                   barrier_sync(1 + consumer, WARPGROUP);\n                   const int \
             next",
            "                   const int next",
        )],
        &["data race on global memory"],
    ),
    planted(
        Kernels::GemmSm90,
        "the last split leaves its turn for the next launch",
        &[("uint32_t(next == item.splits ? 0 : next)", "uint32_t(next)")],
        &["the thread spins"],
    ),
    planted(
        Kernels::GemmSm90,
        "the addend is read before it is there",
        &[("    mbarrier_wait(&exchange.loaded[buffer], parity);\n", "")],
        &["shared memory 0x", "by block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmGradient,
        "gate and up are read before they are there",
        &[("    mbarrier_wait(&exchange.loaded[buffer], parity);\n", "")],
        &["shared memory 0x", "by block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmGradient,
        "gradients are stored that other lanes may not have written yet",
        &[("    fence_proxy_async();\n    __syncwarp();\n", "    fence_proxy_async();\n")],
        &["data race on shared memory", "an asynchronous read by a bulk store of"],
    ),
    planted(
        Kernels::GemmGradient,
        "what comes next is loaded over gradients that are still being stored",
        &[("  bulk_commit();\n  bulk_wait_read<0>();\n", "  bulk_commit();\n")],
        &["shared memory", "bulk store of block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmGradient,
        "one mover for both consumers",
        &[(
            "move<K>(epilogue, exchanges[consumer], *work, consumer)",
            "move<K>(epilogue, exchanges[consumer], *work, 0)",
        )],
        &["data race on global memory", "of buffer \"out\"", "by a bulk store of block (0,0,0)"],
    ),
    planted(
        Kernels::Norm,
        "no barrier before the sums of the warps are read",
        &[(
            "    __syncthreads();\n#pragma unroll\n    for (int i = 0; i < COUNT; ++i) {\n      \
             sums[i] = 0;",
            "#pragma unroll\n    for (int i = 0; i < COUNT; ++i) {\n      sums[i] = 0;",
        )],
        &["shared memory 0x", "by block (0,0,0) thread"],
    ),
    planted(
        Kernels::Norm,
        "one half for all sums: the next one is written while the last one is read",
        &[("    turn ^= 1;\n", "")],
        &["data race on shared memory", "write by block (0,0,0) thread", "after a read by"],
    ),
    planted(
        Kernels::Norm,
        "no barrier behind the gains",
        &[("gain, four * 4, sqrt_depth);\n  __syncthreads();", "gain, four * 4, sqrt_depth);")],
        &["shared memory 0x", "by block (0,0,0) thread"],
    ),
    planted(
        Kernels::Norm,
        "no barrier between the rows that add up",
        &[("    if (row_slot < ROWS - 1) __syncthreads();\n", "")],
        &["shared memory 0x", "by block (0,0,0) thread"],
    ),
    planted(
        Kernels::Norm,
        "the tail of a row is not left out",
        &[(
            "held[i] = at < vectors ? row_of(inp, row, columns)[at] : make_uint4(0, 0, 0, 0);",
            "held[i] = row_of(inp, row, columns)[at];",
        )],
        &["read out of bounds", "buffer \"inp\" (34720 bytes)"],
    ),
    planted(
        Kernels::Loss,
        "parts of Z are added up before those of the other blocks are there",
        &[("  cluster_sync();\n", "  __syncthreads();\n")],
        &["shared memory 0x", "by block ("],
    ),
    planted(
        Kernels::Loss,
        "a block writes into another one that may not have begun",
        &[("  cluster_arrive_relaxed();\n", ""), ("  cluster_wait();\n", "")],
        &["write out of bounds: 8 bytes at shared address", "by block ("],
    ),
    planted(
        Kernels::Loss,
        "every block sends to itself",
        &[("cluster_map(partitions, uint32_t(lane))", "cluster_map(partitions, cluster_rank())")],
        &["data race on shared memory", "after a write by block (0,0,0) thread 0 "],
    ),
    planted(
        Kernels::Loss,
        "the parts of all blocks have one place",
        &[("[int(cluster_rank()) * WARPS + warp]", "[warp]")],
        &["data race on shared memory", "by block ("],
    ),
    planted(
        Kernels::Loss,
        "the first thread reads the target's logit while another block writes over it",
        &[(
            "vector % cluster_threads<THREADS>() == cluster_thread<THREADS>()",
            "cluster_thread<THREADS>() == (vector & 0)",
        )],
        &["data race on global memory", "of buffer \"logits\""],
    ),
    planted(
        Kernels::Loss,
        "each block takes the vectors of the first",
        &[("return int(cluster_rank()) * THREADS + int(threadIdx.x);", "return int(threadIdx.x);")],
        &["data race on global memory"],
    ),
    planted(
        Kernels::AttentionForward,
        "a query does not see its own key",
        &[("> mask.row + i / 2 % 2 * 8)", ">= mask.row + i / 2 % 2 * 8)")],
        WRONG,
    ),
    planted(
        Kernels::AttentionForward,
        "weighted values are multiplied by the sums' scale before they are there",
        &[("      wgmma_wait<0>();\n      release(&values_empty", "      release(&values_empty")],
        &["the accumulator of the wgmma at", "before wgmma_wait"],
    ),
    planted(
        Kernels::AttentionForward,
        "rows are stored that other lanes may not have written yet",
        &[("  fence_proxy_async();\n  __syncwarp();\n", "  fence_proxy_async();\n")],
        &["data race on shared memory", "an asynchronous read by a bulk store of"],
    ),
    planted(
        Kernels::AttentionBackward,
        "a stage is handed back by the first lane, while others read its statistics",
        &[(
            "DEVICE void release(uint64_t* empty) {\n  __syncwarp();\n",
            "DEVICE void release(uint64_t* empty) {\n",
        )],
        &["data race on shared memory", "after a read by block"],
    ),
    planted(
        Kernels::AttentionBackward,
        "a stage is full without its statistics",
        &[("init_ring<T, STAGES>(full, empty, 1 + 32);", "init_ring<T, STAGES>(full, empty, 1);")],
        &["data race on shared memory", "after a write by block (0,0,0) thread 36 (warp 1"],
    ),
    planted(
        Kernels::GemmSm90,
        "factors are loaded before the kernel in front has ended",
        &[(
            "  begin_after_previous();\n\n  if (threadIdx.x < WARPGROUP) {",
            "  if (threadIdx.x > 0) begin_after_previous();\n\n  if (threadIdx.x < WARPGROUP) {",
        )],
        &[
            "global memory is touched before grid_dependency_wait in a dependent launch: tma_load by",
            "block (0,0,0) thread 0 (warp 0, lane 0) at",
        ],
    ),
    planted(
        Kernels::AttentionOnePass,
        "threads without work do not wait for the kernel in front",
        &[(
            "  begin_after_previous();\n  const Work& work = *shared_work;",
            "  if (threadIdx.x != 5) begin_after_previous();\n  const Work& work = *shared_work;",
        )],
        &["block (0,0,0) thread 5 (warp 0, lane 5) exits without grid_dependency_wait"],
    ),
    planted(
        Kernels::GemmMma,
        "a stage is read before its copies are complete",
        &[("cp_async_wait<1>();", "cp_async_wait<2>();")],
        &["cp.async that was not waited for: shared memory 0x", "write by block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmMma,
        "a stage is loaded while it is read",
        &[("    __syncthreads();\n  }\n#pragma", "  }\n#pragma")],
        &["data race on shared memory", "after a read by block"],
    ),
];

#[test]
fn planted_bugs_are_found_and_named() {
    if library::is_missing() {
        return;
    }
    let mutants: Vec<Mutant> = PLANTED
        .iter()
        .map(|bug| Mutant {
            kernels: bug.kernels,
            name: format!("{}: {}", bug.kernels.name(), bug.what),
            text: patched(&bug.kernels.text(), bug.edits),
        })
        .collect();
    let mut missed = String::new();
    for (bug, verdict) in PLANTED.iter().zip(judge_all(&mutants)) {
        let named = match &verdict {
            Verdict::Fault(said) => {
                !bug.said.is_empty() && bug.said.iter().all(|part| said.contains(part))
            }
            Verdict::Wrong(_) => bug.said.is_empty(),
            _ => false,
        };
        if !named {
            let _ = writeln!(missed, "{:?}: {}: {verdict:?}", bug.kernels, bug.what);
        }
    }
    assert!(missed.is_empty(), "{missed}");
}

// ------------------------------------------------------------------ every line in turn

/// A call in a kernel file that is worth breaking: its name with "(" or "<" behind it.
const BREAKABLE: &[&str] = &[
    "__syncthreads",
    "__syncwarp",
    "barrier_sync",
    "barrier_arrive",
    "mbarrier_init",
    "mbarrier_wait",
    "mbarrier_wait_cluster",
    "mbarrier_arrive",
    "mbarrier_arrive_cluster",
    "mbarrier_arrive_peer",
    "mbarrier_arrive_expect_tx",
    "mbarrier_expect_tx",
    "fence_mbarrier_init",
    "fence_proxy_async",
    "fence_proxy_async_global",
    "wgmma_fence",
    "wgmma_commit",
    "wgmma_wait",
    "bulk_commit",
    "bulk_wait",
    "bulk_wait_read",
    "cp_async_commit",
    "cp_async_wait",
    "cluster_sync",
    "cluster_arrive",
    "cluster_arrive_relaxed",
    "cluster_wait",
    "elect_one",
    "swizzle",
    "__threadfence",
    "load_acquire",
    "store_release",
    "begin_after_previous",
];

/// name<template>(arguments), and where in the text it stands.
struct Call<'a> {
    name: &'a str,
    template: Option<&'a str>,
    arguments: Vec<&'a str>,
    start: usize,
    end: usize,
}

/// The text from an opening bracket to the one that closes it, and what is behind.
fn bracketed(text: &str, open: char, close: char) -> Option<(&str, usize)> {
    let inner = text.strip_prefix(open)?;
    let mut depth = 1;
    for (at, c) in inner.char_indices() {
        depth += i32::from(c == open) - i32::from(c == close);
        if depth == 0 {
            return Some((&inner[..at], at + 2));
        }
    }
    None
}

/// Splits at the commas that are in no bracket.
fn split_arguments(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, vec![]);
    for (at, c) in text.char_indices() {
        depth += i32::from("([{".contains(c)) - i32::from(")]}".contains(c));
        if c == ',' && depth == 0 {
            parts.push(text[start..at].trim());
            start = at + 1;
        }
    }
    if !text.trim().is_empty() {
        parts.push(text[start..].trim());
    }
    parts
}

/// Every breakable call of a kernel file, comments left out.
fn calls(text: &str) -> Vec<Call<'_>> {
    let mut found = vec![];
    let mut line_start = 0;
    for line in text.split_inclusive('\n') {
        let code = line.split("//").next().unwrap();
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        for &name in BREAKABLE {
            for (at, _) in code.match_indices(name) {
                let before = code[..at].chars().next_back();
                let rest = &text[line_start + at + name.len()..];
                if before.is_some_and(word) || rest.starts_with(word) {
                    continue;
                }
                let (template, template_end) = match bracketed(rest, '<', '>') {
                    Some((inner, end)) => (Some(inner), end),
                    None => (None, 0),
                };
                let Some((inner, end)) = bracketed(&rest[template_end..], '(', ')') else {
                    continue;
                };
                let start = line_start + at;
                found.push(Call {
                    name,
                    template,
                    arguments: split_arguments(inner),
                    start,
                    end: start + name.len() + template_end + end,
                });
            }
        }
        line_start += line.len();
    }
    found.sort_by_key(|call| call.start);
    found
}

/// What is done to a call: a word for it, and what stands in its place.
fn alterations(call: &Call) -> Vec<(&'static str, String)> {
    let Call { name, ref arguments, .. } = *call;
    let argument = |i: usize| arguments[i];
    let removed = ("removed", "((void)0)".to_string());
    match name {
        "swizzle" => vec![("identity", format!("({})", argument(0)))],
        "elect_one" => vec![("true", "true".to_string())],
        "load_acquire" => vec![("an ordinary load", format!("(*{})", argument(0)))],
        "store_release" => {
            vec![removed, ("an ordinary store", format!("(*({}) = {})", argument(0), argument(1)))]
        }
        "__syncthreads" => vec![
            removed,
            ("of the warp only", "__syncwarp()".to_string()),
            ("of half the block", "barrier_sync(0, int(blockDim.x) / 2)".to_string()),
        ],
        "barrier_sync" | "barrier_arrive" => {
            let (id, count) = (argument(0), argument(1));
            vec![
                removed,
                ("barrier 1", format!("{name}(1, {count})")),
                ("another barrier for odd warps", {
                    format!("{name}(({id}) + 8 * (int(threadIdx.x) / 32 % 2), {count})")
                }),
                ("count + 32", format!("{name}({id}, ({count}) + 32)")),
                ("count - 32", format!("{name}({id}, ({count}) - 32)")),
                ("of the warp only", "__syncwarp()".to_string()),
            ]
        }
        "mbarrier_init" => {
            let (barrier, count) = (argument(0), argument(1));
            vec![
                removed,
                ("count + 1", format!("mbarrier_init({barrier}, ({count}) + 1)")),
                ("count - 1", format!("mbarrier_init({barrier}, ({count}) - 1)")),
            ]
        }
        "mbarrier_wait" | "mbarrier_wait_cluster" => {
            vec![removed, ("parity", format!("{name}({}, ({}) ^ 1)", argument(0), argument(1)))]
        }
        "mbarrier_arrive" => vec![
            removed,
            ("twice", format!("(mbarrier_arrive({0}), mbarrier_arrive({0}))", argument(0))),
        ],
        "mbarrier_arrive_expect_tx" | "mbarrier_expect_tx" => {
            let (barrier, bytes) = (argument(0), argument(1));
            vec![
                removed,
                ("bytes - 16", format!("{name}({barrier}, ({bytes}) - 16)")),
                ("bytes + 16", format!("{name}({barrier}, ({bytes}) + 16)")),
                ("no bytes", format!("mbarrier_arrive({barrier})")),
            ]
        }
        "wgmma_wait" | "bulk_wait" | "bulk_wait_read" | "cp_async_wait" => {
            let groups = call.template.expect("a number of groups");
            let mut all = vec![removed, ("groups + 1", format!("{name}<({groups}) + 1>()"))];
            if name == "bulk_wait" {
                all.push(("sources only", format!("bulk_wait_read<{groups}>()")));
            }
            all
        }
        _ => vec![removed],
    }
}

/// Mutants that are no bugs: kernel file, the line, the alteration, and why nothing can come of it.
/// They do not count.
const EQUIVALENT: &[(Kernels, &str, &str, &str)] = &[
    (
        Kernels::GemmSm90,
        "if (threadIdx.x % WARPGROUP == 0) bulk_wait<0>();",
        "sources only",
        "what has been read from shared memory is written by the end of the launch, and nobody in \
         it reads the result",
    ),
    (
        Kernels::AttentionForward,
        "if (threadIdx.x % 32 == 0) bulk_wait<0>();",
        "sources only",
        "as in gemm_sm90",
    ),
    (
        Kernels::AttentionBackward,
        "if (threadIdx.x % 32 == 0) bulk_wait<0>();",
        "sources only",
        "as in gemm_sm90",
    ),
    (
        Kernels::AttentionForward,
        "wgmma_fence();  // the one above is enough, but not for ptxas, behind a loop",
        "removed",
        "no register of these products is touched behind the other fence",
    ),
    (
        Kernels::AttentionBackward,
        "wgmma_fence();  // the one above is enough, but not for ptxas, behind a branch",
        "removed",
        "no register of these products is touched behind the other fence",
    ),
    (
        Kernels::AttentionBackward,
        "wgmma_wait<0>();  // for ptxas, which does not see that the last one was enough",
        "removed",
        "the wait behind each head's tiles was for the same products",
    ),
    (
        Kernels::AttentionBackward,
        "if constexpr (D > 96) wgmma_wait<0>();  // there are no registers for the next step's scores",
        "removed",
        "for registers' sake, and of other head dims",
    ),
    (
        Kernels::AttentionBackward,
        "if constexpr (D > 96) wgmma_wait<0>();  // there are no registers for the next step's scores",
        "groups + 1",
        "for registers' sake, and of other head dims",
    ),
    (
        Kernels::AttentionOnePass,
        "wgmma_fence();  // the one of the scores is enough, but not for ptxas, behind a loop",
        "removed",
        "no register of these products is touched behind the other fence",
    ),
    (
        Kernels::AttentionOnePass,
        "if (threadIdx.x % 32 == 0) bulk_wait<0>();",
        "sources only",
        "as in gemm_sm90",
    ),
    (
        Kernels::AttentionShort,
        "wgmma_fence();  // the first one is enough, but not for ptxas, behind a loop",
        "removed",
        "no register of these products is touched behind the other fence",
    ),
    (
        Kernels::AttentionShort,
        "if (threadIdx.x % 32 == 0) bulk_wait<0>();",
        "sources only",
        "as in gemm_sm90",
    ),
    (
        Kernels::GemmMma,
        "return tile + swizzle<64>(uint32_t(row * ROW_BYTES + chunk * 16));",
        "identity",
        "copies and ldmatrix find every chunk through this one function: other banks, same values",
    ),
];

fn mutants_of(kernels: Kernels) -> Vec<(Mutant, String, &'static str)> {
    let text = kernels.text();
    let mut all = vec![];
    for call in calls(&text).iter().filter(|call| kernels.breaks(&text, call.start)) {
        let number = text[..call.start].lines().count();
        let line = text.lines().nth(number.max(1) - 1).unwrap().trim().to_string();
        let changed = |(_, it): &(&str, String)| *it != text[call.start..call.end];
        for (what, replacement) in alterations(call).into_iter().filter(changed) {
            let mutated = format!("{}{replacement}{}", &text[..call.start], &text[call.end..]);
            let name = format!("{}.cu:{number} `{line}`: {} {what}", kernels.name(), call.name);
            all.push((Mutant { kernels, name, text: mutated }, line.clone(), what));
        }
    }
    all
}

#[test]
fn every_synchronisation_that_is_broken_is_caught() {
    break_all(&[Kernels::Norm, Kernels::Loss, Kernels::GemmSm90, Kernels::GemmMma], 60);
}

#[test]
fn every_synchronisation_of_the_gradient_that_is_broken_is_caught() {
    break_all(&[Kernels::GemmGradient], 15);
}

#[test]
#[ignore = "takes minutes: to be run when kernels/attention_sm90.cu has changed"]
fn every_synchronisation_of_attention_that_is_broken_is_caught() {
    break_all(&[Kernels::AttentionForward, Kernels::AttentionBackward], 60);
}

#[test]
#[ignore = "takes minutes: to be run when kernels/attention_backward_sm90.cu has changed"]
fn every_synchronisation_of_attention_in_one_pass_that_is_broken_is_caught() {
    break_all(&[Kernels::AttentionOnePass], 60);
}

#[test]
#[ignore = "takes minutes: to be run when kernels/attention_backward_short_sm90.cu has changed"]
fn every_synchronisation_of_attention_to_short_rows_that_is_broken_is_caught() {
    break_all(&[Kernels::AttentionShort], 60);
}

/// `least`: mutants that the scan has to find.
fn break_all(suites: &[Kernels], least: usize) {
    if library::is_missing() {
        return;
    }
    let (mut mutants, mut keys) = (vec![], vec![]);
    for &kernels in suites {
        for (mutant, line, what) in mutants_of(kernels) {
            mutants.push(mutant);
            keys.push((kernels, line, what));
        }
    }
    let verdicts = judge_all(&mutants);
    let (mut faults, mut wrong, mut survivors) = (0, 0, vec![]);
    let mut equivalent = 0;
    for ((mutant, (kernels, line, what)), verdict) in mutants.iter().zip(&keys).zip(&verdicts) {
        let justified = EQUIVALENT.iter().any(|(its_kernels, its_line, its_what, _)| {
            its_kernels == kernels && its_line == line && its_what == what
        });
        match verdict {
            Verdict::Fault(_) => faults += 1,
            Verdict::Wrong(_) => wrong += 1,
            Verdict::Survived if justified => equivalent += 1,
            other => survivors.push(format!("{}: {other:?}", mutant.name)),
        }
        if justified {
            assert_eq!(*verdict, Verdict::Survived, "{} is no equivalent", mutant.name);
        }
    }
    for (kernels, line, what, _) in EQUIVALENT.iter().filter(|it| suites.contains(&it.0)) {
        let known = keys.iter().any(|key| key.0 == *kernels && key.1 == *line && key.2 == *what);
        assert!(known, "no mutant `{what}` of `{line}`: remove it from EQUIVALENT");
    }
    let counted = mutants.len() - equivalent;
    println!(
        "{counted} mutants: {faults} found by a fault, {wrong} by wrong results, {} survived; \
         {equivalent} are equivalent",
        survivors.len()
    );
    for survivor in &survivors {
        println!("survived: {survivor}");
    }
    assert!(counted >= least, "the scan finds too little");
    assert!(survivors.iter().all(|it| !it.contains("NotCompiled") && !it.contains("Died")));
    let share = (faults + wrong) as f64 / counted as f64;
    assert!(share >= 0.95, "{share:.3} of the mutants were caught, 0.95 are needed");
}

#[test]
fn the_scan_finds_calls_and_not_comments() {
    let text = "  // __syncthreads();\n  if (x) bulk_wait_read<STORES - 1>();  // wgmma_commit()\n\
                \x20 mbarrier_wait(&full[f(a, b)], at.parity ^ 1);\n  my__syncwarp();\n";
    let found = calls(text);
    let names: Vec<&str> = found.iter().map(|call| call.name).collect();
    assert_eq!(names, ["bulk_wait_read", "mbarrier_wait"]);
    assert_eq!(&text[found[0].start..found[0].end], "bulk_wait_read<STORES - 1>()");
    assert_eq!(found[0].template, Some("STORES - 1"));
    assert_eq!(found[1].arguments, ["&full[f(a, b)]", "at.parity ^ 1"]);
}

// ------------------------------------------------------------------ no false alarms

/// The true kernels under 100 random schedules each, every access checked: the same bits each time.
#[test]
fn random_schedules_of_the_true_kernels_are_clean() {
    if library::is_missing() {
        return;
    }
    const SEEDS: u64 = 100;
    let folder = tempfile::tempdir().unwrap();
    let mma = Kernels::GemmMma;
    let library = library::compile(folder.path(), mma.name(), &[(mma.name(), &mma.text())]);
    let machines = [
        (Kernels::Norm, Host::new(first_options(Kernels::Norm)).unwrap()),
        (Kernels::GemmSm90, Host::new(first_options(Kernels::GemmSm90)).unwrap()),
        (Kernels::GemmGradient, Host::new(first_options(Kernels::GemmGradient)).unwrap()),
        (mma, Host::load(&library, first_options(mma)).unwrap()),
    ];
    let run = |kernels: Kernels, host: &mut Host| {
        let driver: &mut dyn Driver = host;
        let mut bits = kernels.run(driver)?;
        let more = match kernels {
            Kernels::Norm => run_norm(driver, &MORE_NORMS),
            Kernels::GemmSm90 => run_gemm_sm90(driver, &MORE_PRODUCTS).and_then(|products| {
                let gated = run_swiglu(driver, Layout::Nt, 96, &GATED)?;
                Ok([products, gated].concat())
            }),
            Kernels::GemmGradient => run_swiglu(driver, Layout::Nn, 128, &MORE_GRADIENTS),
            Kernels::GemmMma => gemm_mma(driver, 128, 64, 96).map(|(exact, found)| {
                assert_eq!(exact, found);
                vec![]
            }),
            Kernels::Loss
            | Kernels::AttentionForward
            | Kernels::AttentionBackward
            | Kernels::AttentionOnePass
            | Kernels::AttentionShort => Ok(vec![]),
        };
        bits.extend(more.map_err(|error| error.to_string())?);
        Ok::<Vec<u8>, String>(bits)
    };
    thread::scope(|scope| {
        for (kernels, mut host) in machines {
            scope.spawn(move || {
                let expected = run(kernels, &mut host).unwrap();
                for seed in 0..SEEDS {
                    // A thread of a busy machine may stand still for seconds.
                    let watchdog = Duration::from_secs(20);
                    let random = options(true, Order::Random, Asynchronous::Anytime, seed);
                    let random = Options { watchdog, ..random };
                    host.set_options(random);
                    let found = run(kernels, &mut host).unwrap_or_else(|error| panic!("{error}"));
                    assert!(found == expected, "{}: other bits, {random:?}", kernels.name());
                }
            });
        }
    });
}
