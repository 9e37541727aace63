//! The kernels that are broken, and what each suite of them runs.

use std::fmt::Write as _;

use isobath::backend::{AttentionSpec, HeadSpec, NormSpec, Sink};
use isobath::config::{Dtype, NormKind};
use isobath::cuda::attention::{Attention, AttentionBackward, AttentionForward, Passes};
use isobath::cuda::gemm::{Choice, Gemm, Layout, Output, Product};
use isobath::cuda::loss::{Loss, LossBackward, LossForward};
use isobath::cuda::norm::{Norm, NormBackward, NormForward};
use isobath::cuda::{Allocation, Arguments, Driver, Family, Launch, StreamId};
use isobath::tensor::IGNORE_INDEX;

use super::super::machines::{download, unwritten, upload};
use crate::support::normals;

#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Kernels {
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

pub(super) const ALL: [Kernels; 9] = [
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
    pub(super) fn name(self) -> &'static str {
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

    pub(super) fn named(name: &str) -> Self {
        ALL.into_iter().find(|it| it.name() == name).unwrap()
    }

    /// The kernel file, with no more of its variants than the mutants run.
    pub(super) fn text(self) -> String {
        match self {
            Kernels::Norm => patched(
                include_str!("../../../kernels/norm.cu"),
                &[
                    (
                        "NORM_KERNELS_OF(bf16)\nNORM_KERNELS_OF(f32)\n",
                        "NORM_KERNELS(bf16, 32, 1, 8, 4)\nNORM_KERNELS(bf16, 256, 1, 8, 4)\n",
                    ),
                    ("NORM_KERNELS(f32, 512, 4, 2, 1)\n", ""),
                ],
            ),
            Kernels::Loss => patched(
                include_str!("../../../kernels/loss_sm90.cu"),
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
            Kernels::GemmMma => include_str!("../../kernels/gemm_mma.cu").to_string(),
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

    /// The part of the text whose calls are broken: of the Hopper products, the epilogues that
    /// read, or all but those; of attention, one pass after the other, and with the second one what
    /// both share.
    pub(super) fn breaks(self, text: &str, at: usize) -> bool {
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
    /// more steps than stages, tails, with and without an addend. All bits that come out.
    pub(super) fn run(self, driver: &mut dyn Driver) -> Result<Vec<u8>, String> {
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
pub(super) fn with_some_gemms(kept: &[&str]) -> String {
    let text = include_str!("../../../kernels/gemm_sm90.cu");
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

pub(super) const ATTENTION: &str = include_str!("../../../kernels/attention_sm90.cu");
pub(super) const ATTENTION_ONE_PASS: &str =
    include_str!("../../../kernels/attention_backward_sm90.cu");
pub(super) const ATTENTION_SHORT: &str =
    include_str!("../../../kernels/attention_backward_short_sm90.cu");
pub(super) const ATTENTION_HEADER: &str = include_str!("../../../kernels/attention_sm90.cuh");

/// A kernel file of the Hopper attention, with the header that its lines are to be broken in, too.
pub(super) fn with_header(text: &str) -> String {
    let header = ATTENTION_HEADER.replace("#pragma once\n", "");
    patched(text, &[("#include \"attention_sm90.cuh\"\n", &header)])
}

/// Of the Hopper attention, the kernels that these lines make, and others in name.
pub(super) fn with_one_attention(text: &str, kept: &[&str], named: &[&str]) -> String {
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
pub(super) fn patched(text: &str, edits: &[(&str, &str)]) -> String {
    let mut text = text.to_string();
    for (old, new) in edits {
        assert_eq!(text.matches(old).count(), 1, "this must occur once: {old}");
        text = text.replace(old, new);
    }
    text
}

pub(super) fn bytes(values: &[f64], all: &mut Vec<u8>) {
    // NaNs of all kinds are one kind.
    all.extend(values.iter().flat_map(|value| match value.is_nan() {
        true => f64::NAN.to_bits().to_le_bytes(),
        false => value.to_bits().to_le_bytes(),
    }));
}

/// Type, rows, columns, kind and whether the gradient is added to what is there.
pub(super) type NormCase = (Dtype, usize, usize, NormKind, bool);

pub(super) const NORMS: [NormCase; 3] = [
    (Dtype::Bf16, 70, 248, NormKind::Layer, false),
    (Dtype::Bf16, 35, 2040, NormKind::Layer, true),
    (Dtype::Bf16, 21, 2048, NormKind::Rms, false),
];
/// The remaining variants.
pub(super) const MORE_NORMS: [NormCase; 6] = [
    (Dtype::F32, 70, 124, NormKind::Rms, false),
    (Dtype::Bf16, 67, 504, NormKind::Rms, true),
    (Dtype::F32, 66, 508, NormKind::Layer, true),
    (Dtype::Bf16, 9, 4088, NormKind::Layer, false),
    (Dtype::F32, 9, 4096, NormKind::Rms, true),
    (Dtype::F32, 9, 8188, NormKind::Layer, true),
];

pub(super) fn run_norm(
    driver: &mut dyn Driver,
    cases: &[NormCase],
) -> isobath::error::Result<Vec<u8>> {
    let mut all = vec![];
    for &(dtype, rows, columns, kind, accumulate) in cases {
        let norm = Norm::new(driver, dtype, columns)?;
        let spec = NormSpec { kind, eps: 1e-6, depth: 3 };
        let inp = upload(driver, "inp", dtype, &normals(1, rows * columns));
        let gain = upload(driver, "gain", Dtype::F32, &normals(3, columns));
        let d_out = upload(driver, "d_out", dtype, &normals(4, rows * columns));
        let d_inp = upload(driver, "d_inp", dtype, &normals(5, rows * columns));
        let d_gain = upload(driver, "d_gain", Dtype::F32, &normals(6, columns));
        let out = unwritten(driver, "out", dtype, rows * columns);
        let mean = unwritten(driver, "mean", Dtype::F32, rows);
        let rstd = unwritten(driver, "rstd", Dtype::F32, rows);
        let partials = norm.partials(rows);
        let partial = unwritten(driver, "partial", Dtype::F32, partials * columns);
        let of_layer = (kind == NormKind::Layer).then_some(mean.address);
        let forward = NormForward {
            spec,
            inp: inp.address,
            gain: gain.address,
            out: out.address,
            mean: of_layer,
            rstd: rstd.address,
        };
        norm.forward(driver, StreamId::MAIN, rows, &forward)?;
        let backward = NormBackward {
            spec,
            inp: inp.address,
            gain: gain.address,
            mean: of_layer,
            rstd: rstd.address,
            d_out: d_out.address,
            partial: partial.address,
            d_inp: Sink { to: d_inp.address, accumulate },
            d_gain: d_gain.address,
        };
        norm.backward(driver, StreamId::MAIN, rows, &backward)?;
        for (dtype, buffer) in
            [(dtype, out), (Dtype::F32, rstd), (dtype, d_inp), (Dtype::F32, d_gain)]
        {
            bytes(&download(driver, dtype, buffer), &mut all);
        }
        for buffer in [inp, gain, d_out, d_inp, d_gain, out, mean, rstd, partial] {
            driver.release(buffer)?;
        }
    }
    Ok(all)
}

/// Classes and columns, of a cluster of four and of eight.
pub(super) const LOSSES: [(usize, usize); 2] = [(65_541, 65_544), (163_841, 163_848)];

/// Rows with targets in the second block and in the first, and an ignored one between them.
pub(super) fn run_loss(
    driver: &mut dyn Driver,
    cases: &[(usize, usize)],
) -> isobath::error::Result<Vec<u8>> {
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

/// Layout, columns of the tile, splits, blocks of a cluster, M, N, K and whether there is an
/// addend.
pub(super) type ProductCase = (Layout, usize, usize, usize, usize, usize, usize, bool);

pub(super) const PRODUCTS: [ProductCase; 4] = [
    (Layout::Nt, 128, 1, 1, 200, 264, 456, true),
    (Layout::Nt, 128, 1, 1, 130, 136, 40, false),
    (Layout::Tn, 256, 3, 1, 104, 104, 390, false),
    (Layout::Nt, 128, 1, 2, 130, 264, 456, false),
];
pub(super) const MORE_PRODUCTS: [ProductCase; 6] = [
    (Layout::Nt, 256, 1, 1, 130, 264, 328, true),
    (Layout::Nn, 192, 1, 1, 130, 200, 72, true),
    (Layout::Nn, 128, 1, 1, 64, 72, 64, false),
    (Layout::Tn, 128, 1, 1, 136, 264, 72, false),
    (Layout::Tn, 256, 1, 2, 136, 264, 328, false),
    (Layout::Tn, 128, 2, 1, 136, 200, 136, false),
];

pub(super) fn run_gemm_sm90(
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
        // Twice where there are semaphores, which have to be as they were.
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
pub(super) const GRADIENTS: [[usize; 4]; 2] = [[1, 300, 584, 72], [2, 130, 264, 328]];
pub(super) const MORE_GRADIENTS: [[usize; 4]; 2] = [[1, 250, 712, 136], [2, 136, 264, 72]];
/// The same of gate and up.
pub(super) const GATED: [[usize; 4]; 2] = [[1, 300, 296, 72], [2, 130, 128, 328]];

/// SwiGLU after an NT product, its gradient after an NN one. `columns`: of the tile.
pub(super) fn run_swiglu(
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
pub(super) const ATTENTIONS: [(usize, usize, Option<usize>); 2] =
    [(1, 600, None), (2, 330, Some(200))];
/// For one block: more steps than stages, tiles of keys that the next head is loaded into, and a
/// consumer that has none.
pub(super) const SHORT_ATTENTIONS: [(usize, usize, Option<usize>); 3] =
    [(2, 230, None), (3, 140, Some(70)), (5, 50, None)];
pub(super) const ATTENTION_HEADS: HeadSpec = HeadSpec { heads: 2, kv_heads: 1, head_dim: 32 };

pub(super) fn run_attention_forward(driver: &mut dyn Driver) -> isobath::error::Result<Vec<u8>> {
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
pub(super) fn run_attention_backward(
    driver: &mut dyn Driver,
    passes: Passes,
    in_order: bool,
    attentions: &[(usize, usize, Option<usize>)],
) -> isobath::error::Result<Vec<u8>> {
    let mut all = vec![];
    let attention = Attention::new(driver, Dtype::Bf16, ATTENTION_HEADS, Some(Family::Sm90))?;
    let mut attention = attention.with_passes(passes)?.with_deterministic(in_order);
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
pub(super) fn attention_forward(
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

pub(super) fn run_gemm_mma(driver: &mut dyn Driver) -> isobath::error::Result<Vec<u8>> {
    let mut all = vec![];
    for (m, n, k) in [(64, 128, 160), (64, 64, 32)] {
        let (_, out) = gemm_mma(driver, m, n, k)?;
        bytes(&out, &mut all);
    }
    Ok(all)
}

/// The exact product of whole numbers, and what the kernel makes of it.
pub(super) fn gemm_mma(
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
