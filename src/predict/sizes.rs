//! The sizes of a launch: what JSON carries, and what people read.

use std::fmt;

use serde::Serialize;

use crate::backend::AttentionSpec;
use crate::config::{ModelConfig, NormKind, OptimizerConfig};

#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(untagged, rename_all_fields = "UPPERCASE")]
pub enum Sizes {
    Product {
        m: usize,
        n: usize,
        k: usize,
    },
    Attention {
        b: usize,
        s: usize,
        h: usize,
        k: usize,
        d: usize,
    },
    /// T tokens against P rows of a cache.
    Decode {
        t: usize,
        p: usize,
        h: usize,
        k: usize,
        d: usize,
    },
    Rotary {
        t: usize,
        h: usize,
        k: usize,
        d: usize,
    },
    /// `residual`, backward: the gradient is added to that of the residual stream.
    Norm {
        t: usize,
        c: usize,
        #[serde(rename = "norm")]
        norm: NormKind,
        #[serde(rename = "residual")]
        residual: bool,
    },
    ScaledResidual {
        t: usize,
        c: usize,
    },
    Ffn {
        t: usize,
        f: usize,
    },
    Embedding {
        t: usize,
        v: usize,
        c: usize,
    },
    Loss {
        t: usize,
        v: usize,
    },
    Flat {
        n: usize,
    },
    /// A whole optimizer step over micro-batches of [B,S].
    Step {
        #[serde(rename = "preset")]
        preset: String,
        b: usize,
        s: usize,
        #[serde(rename = "grad_accumulation")]
        grad_accumulation: usize,
        #[serde(rename = "model")]
        model: Box<ModelConfig>,
        /// With the model all that the PyTorch twin of a step needs.
        #[serde(rename = "optimizer")]
        optimizer: Box<OptimizerConfig>,
    },
}

impl Sizes {
    pub fn attention(spec: AttentionSpec) -> Self {
        let (b, s, heads) = (spec.batch, spec.sequence, spec.heads);
        Sizes::Attention { b, s, h: heads.heads, k: heads.kv_heads, d: heads.head_dim }
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Sizes::Product { m, n, k } => format!("M={m} N={n} K={k}"),
            Sizes::Attention { b, s, h, k, d } => format!("B={b} S={s} H={h} K={k} D={d}"),
            Sizes::Decode { t, p, h, k, d } => format!("T={t} P={p} H={h} K={k} D={d}"),
            Sizes::Rotary { t, h, k, d } => format!("T={t} H={h} K={k} D={d}"),
            Sizes::Norm { t, c, .. } | Sizes::ScaledResidual { t, c } => format!("T={t} C={c}"),
            Sizes::Ffn { t, f } => format!("T={t} F={f}"),
            Sizes::Embedding { t, v, c } => format!("T={t} V={v} C={c}"),
            Sizes::Loss { t, v } => format!("T={t} V={v}"),
            Sizes::Flat { n } => format!("N={n}"),
            Sizes::Step { preset, b, s, grad_accumulation: 1, .. } => {
                format!("{preset} B={b} S={s}")
            }
            Sizes::Step { preset, b, s, grad_accumulation, .. } => {
                format!("{preset} {grad_accumulation} x B={b} S={s}")
            }
        };
        f.pad(&text)
    }
}
