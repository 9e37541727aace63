//! What each kernel has to move and to multiply, by formula: counted here once, for benchmarks and
//! predictions alike.
//!
//! Bytes are those that a launch reads from and writes to device memory if every operand moves
//! once; a scratch buffer that one kernel of an op writes for the next one counts, too. FLOPs are
//! those of matrix products, two for a multiplication and its addition; the arithmetic of
//! element-wise kernels is not counted. Sizes are known to be countable.

use serde::Serialize;

use super::sizes::Sizes;
use crate::backend::{AttentionSpec, HeadSpec};
use crate::config::choice::choice;
use crate::config::{Dtype, Master, NormKind};
use crate::cuda::gemm::{Epilogue, Layout, Output};
use crate::cuda::loss::Shape;

/// One launch of an op's kernels.
#[derive(Serialize, Clone, PartialEq, Debug)]
pub struct Cost {
    pub op: &'static str,
    /// The op, its type, and what else tells launches of equal sizes apart.
    pub what: String,
    pub dtype: Dtype,
    pub sizes: Sizes,
    pub bytes: u64,
    pub bytes_formula: &'static str,
    pub flops: u64,
    /// Empty where there are none.
    pub flops_formula: &'static str,
    /// Of scores and logits; SwiGLU's, as many, are far below its bytes and products.
    pub exponentials: u64,
    /// How many kernels one launch of the op is.
    pub kernels: u64,
    /// Of a matrix product: how its operands lie, and its epilogue.
    pub product: Option<(Layout, Epilogue)>,
    /// Over the link to the host's memory, in each direction.
    pub link_bytes: u64,
}

pub fn element_bytes(dtype: Dtype) -> u64 {
    dtype.bytes() as u64
}

/// Bytes of the statistics of a row.
fn statistics(norm: NormKind) -> u64 {
    match norm {
        NormKind::Rms => 4,
        NormKind::Layer => 8,
    }
}

choice! {
    /// Kernels that are counted together. Products are those of every op, the loss included.
    pub enum KernelFamily {
        Gemm = "gemm",
        Attention = "attention",
        Norm = "norm",
        Pointwise = "pointwise",
        Loss = "loss",
        Optimizer = "optimizer",
    }
}

impl KernelFamily {
    /// Of an op, or of one of its kernels.
    pub fn of(op: &str) -> Self {
        match op.split('_').next() {
            Some("gemm") => KernelFamily::Gemm,
            Some("attention") => KernelFamily::Attention,
            Some("norm") => KernelFamily::Norm,
            Some("rotary" | "swiglu" | "scaled" | "embedding" | "copy" | "add" | "cast") => {
                KernelFamily::Pointwise
            }
            Some("loss") => KernelFamily::Loss,
            Some("gradient" | "adamw" | "zero") => KernelFamily::Optimizer,
            _ => unreachable!("{op} is of no family"),
        }
    }
}

fn product(sizes: &[usize]) -> u64 {
    sizes.iter().map(|&size| size as u64).product()
}

/// Each query sees half of its row.
fn causal_scores(spec: AttentionSpec) -> u64 {
    product(&[spec.batch, spec.heads.heads, spec.sequence, spec.sequence]) / 2
}

impl Cost {
    /// One that multiplies nothing.
    fn moving(
        op: &'static str,
        detail: &str,
        dtype: Dtype,
        sizes: Sizes,
        bytes: u64,
        bytes_formula: &'static str,
    ) -> Self {
        let what = format!("{op}, {dtype}{detail}");
        Cost {
            op,
            what,
            dtype,
            sizes,
            bytes,
            bytes_formula,
            flops: 0,
            flops_formula: "",
            exponentials: 0,
            kernels: 1,
            product: None,
            link_bytes: 0,
        }
    }

    /// The name of a product's op.
    pub fn product_op(layout: Layout, epilogue: Epilogue) -> &'static str {
        match (layout, epilogue) {
            (Layout::Nt, Epilogue::Plain | Epilogue::Addend) => "gemm_nt",
            (Layout::Nt, Epilogue::Rotary) => "gemm_nt_rotary",
            (Layout::Nt, Epilogue::SwiGlu) => "gemm_nt_swiglu",
            (Layout::Nn, Epilogue::SwiGlu) => "gemm_nn_swiglu",
            (Layout::Nn, _) => "gemm_nn",
            (Layout::Tn, _) => "gemm_tn",
        }
    }

    /// Stored or accumulated.
    pub fn product(layout: Layout, dtype: Dtype, sizes: [usize; 3], output: Output) -> Self {
        let [m, n, _] = sizes;
        let out = product(&[m, n]);
        let epilogue = output.epilogue();
        let (detail, written, bytes_formula) = match output {
            Output::Store { addend: Some(_) } => {
                (", addend", 2 * element_bytes(dtype) * out, "A, B; addend and out [M,N]")
            }
            Output::Accumulate => ("", 2 * 4 * out, "A, B; out [M,N] in fp32, read and written"),
            _ => ("", element_bytes(dtype) * out, "A, B; out [M,N]"),
        };
        Cost::multiplying((layout, epilogue), detail, dtype, sizes, written, bytes_formula)
    }

    /// NT, q and k rotated; `positions`: rows of the table.
    pub fn product_rotary(
        heads: HeadSpec,
        dtype: Dtype,
        sizes: [usize; 3],
        positions: usize,
    ) -> Self {
        let [m, n, _] = sizes;
        let table = 4 * (product(&[positions, heads.head_dim]) + m as u64);
        let bytes = element_bytes(dtype) * product(&[m, n]) + table;
        let formula = "A, B; out [M,N]; table [P,D] once; positions [M]";
        Cost::multiplying((Layout::Nt, Epilogue::Rotary), "", dtype, sizes, bytes, formula)
    }

    /// NT of gate and up, N = 2F, and SwiGLU of them.
    pub fn product_swiglu(dtype: Dtype, sizes: [usize; 3]) -> Self {
        let [m, n, _] = sizes;
        let bytes = element_bytes(dtype) * (product(&[m, n]) + product(&[m, n / 2]));
        let formula = "A, B; gate and up [M,N]; their product [M,N/2]";
        Cost::multiplying((Layout::Nt, Epilogue::SwiGlu), "", dtype, sizes, bytes, formula)
    }

    /// NN with N = F, and the gradients of gate and up.
    pub fn product_swiglu_gradient(dtype: Dtype, sizes: [usize; 3]) -> Self {
        let [m, n, _] = sizes;
        let bytes = 4 * element_bytes(dtype) * product(&[m, n]);
        let formula = "A, B; gate, up and their gradients [M,N]";
        Cost::multiplying((Layout::Nn, Epilogue::SwiGlu), "", dtype, sizes, bytes, formula)
    }

    /// A product [M,N,K]; `bytes`: of what is neither A nor B.
    fn multiplying(
        (layout, epilogue): (Layout, Epilogue),
        detail: &str,
        dtype: Dtype,
        [m, n, k]: [usize; 3],
        bytes: u64,
        bytes_formula: &'static str,
    ) -> Self {
        let read = element_bytes(dtype) * (product(&[m, k]) + product(&[n, k]));
        let sizes = Sizes::Product { m, n, k };
        let op = Self::product_op(layout, epilogue);
        Cost {
            product: Some((layout, epilogue)),
            flops: 2 * product(&[m, n, k]),
            flops_formula: "2 M N K",
            ..Cost::moving(op, detail, dtype, sizes, read + bytes, bytes_formula)
        }
    }

    pub fn norm_forward(norm: NormKind, dtype: Dtype, [t, c]: [usize; 2]) -> Self {
        let bytes = 2 * element_bytes(dtype) * product(&[t, c])
            + 4 * c as u64
            + statistics(norm) * t as u64;
        let sizes = Sizes::Norm { t, c, norm, residual: false };
        let formula = "inp and out [T,C]; gain [C]; statistics [T]";
        Cost::moving("norm_forward", &format!(", {norm}"), dtype, sizes, bytes, formula)
    }

    /// `partials`: rows of partial sums; `residual`: d_inp, the gradient of the residual stream, is
    /// added to.
    pub fn norm_backward(
        norm: NormKind,
        dtype: Dtype,
        [t, c]: [usize; 2],
        partials: usize,
        residual: bool,
    ) -> Self {
        let (tensors, detail, formula) = match residual {
            false => (
                3,
                "",
                "inp, d_out and d_inp [T,C]; partial sums [P,C] written and read; gain, d_gain \
                 twice [C]; statistics [T]",
            ),
            true => (
                4,
                ", residual",
                "inp, d_out and d_inp twice [T,C]; partial sums [P,C] written and read; gain, \
                 d_gain twice [C]; statistics [T]",
            ),
        };
        let bytes = tensors * element_bytes(dtype) * product(&[t, c])
            + (2 * partials as u64 + 3) * 4 * c as u64
            + statistics(norm) * t as u64;
        let sizes = Sizes::Norm { t, c, norm, residual };
        let moving = Cost::moving(
            "norm_backward",
            &format!(", {norm}{detail}"),
            dtype,
            sizes,
            bytes,
            formula,
        );
        Cost { kernels: 2, ..moving }
    }

    pub fn scaled_residual_forward(dtype: Dtype, [t, c]: [usize; 2], gain: bool) -> Self {
        let bytes =
            3 * element_bytes(dtype) * product(&[t, c]) + if gain { 4 * c as u64 } else { 0 };
        let (detail, formula) = match gain {
            false => ("", "inp, residual and out [T,C]"),
            true => (", gain", "inp, residual and out [T,C]; gain [C]"),
        };
        let sizes = Sizes::ScaledResidual { t, c };
        Cost::moving("scaled_residual_forward", detail, dtype, sizes, bytes, formula)
    }

    /// `gain`: rows of the partial sums of its gradient; `in_place`: d_out is scaled, too.
    pub fn scaled_residual_backward(
        dtype: Dtype,
        [t, c]: [usize; 2],
        gain: Option<usize>,
        in_place: bool,
    ) -> Self {
        let tensors = 2 + u64::from(gain.is_some()) + u64::from(in_place);
        let gain_bytes = gain.map_or(0, |partials| (2 * partials as u64 + 3) * 4 * c as u64);
        let bytes = tensors * element_bytes(dtype) * product(&[t, c]) + gain_bytes;
        let (detail, formula) = match (gain.is_some(), in_place) {
            (false, false) => ("", "d_out and d_inp [T,C]"),
            (false, true) => (", in place", "d_out twice and d_inp [T,C]"),
            (true, false) => (
                ", gain",
                "inp, d_out and d_inp [T,C]; partial sums [P,C] written and read; gain, d_gain \
                 twice [C]",
            ),
            (true, true) => (
                ", gain, in place",
                "inp, d_out twice and d_inp [T,C]; partial sums [P,C] written and read; gain, \
                 d_gain twice [C]",
            ),
        };
        let sizes = Sizes::ScaledResidual { t, c };
        let moving = Cost::moving("scaled_residual_backward", detail, dtype, sizes, bytes, formula);
        Cost { kernels: 1 + u64::from(gain.is_some()), ..moving }
    }

    pub fn attention_forward(spec: AttentionSpec, dtype: Dtype) -> Self {
        let AttentionSpec { heads: HeadSpec { heads, head_dim, .. }, batch, sequence } = spec;
        let (t, columns) = (batch * sequence, spec.heads.qkv_columns());
        let activations = product(&[t, columns]) + product(&[t, heads, head_dim]);
        let bytes = element_bytes(dtype) * activations + 4 * product(&[t, heads]);
        let formula = "qkv [T,(H+2K)D]; out [T,HD]; log-sum-exp [B,H,S]";
        let sizes = Sizes::attention(spec);
        Cost {
            flops: 2 * product(&[batch, heads, sequence, sequence, head_dim]),
            flops_formula: "2 products of 2 B H S^2 D, half of it causal: 2 B H S^2 D",
            exponentials: causal_scores(spec),
            ..Cost::moving("attention_forward", "", dtype, sizes, bytes, formula)
        }
    }

    pub fn attention_backward(spec: AttentionSpec, dtype: Dtype) -> Self {
        let AttentionSpec { heads: HeadSpec { heads, head_dim, .. }, batch, sequence } = spec;
        let (t, columns) = (batch * sequence, spec.heads.qkv_columns());
        let activations = 2 * product(&[t, columns]) + 2 * product(&[t, heads, head_dim]);
        let bytes = element_bytes(dtype) * activations + 3 * 4 * product(&[t, heads]);
        let formula = "qkv and d_qkv [T,(H+2K)D]; out and d_out [T,HD]; log-sum-exp, and delta \
                       written and read [B,H,S]";
        let sizes = Sizes::attention(spec);
        Cost {
            flops: 5 * product(&[batch, heads, sequence, sequence, head_dim]),
            flops_formula: "5 products (scores again, d_scores, d_q, d_k, d_v) of 2 B H S^2 D, \
                            half of it causal: 5 B H S^2 D; whatever a kernel does twice does not \
                            count",
            exponentials: causal_scores(spec),
            ..Cost::moving("attention_backward", "", dtype, sizes, bytes, formula)
        }
    }

    /// One after the other.
    pub fn attention(spec: AttentionSpec, dtype: Dtype) -> Self {
        let [forward, backward] =
            [Cost::attention_forward(spec, dtype), Cost::attention_backward(spec, dtype)];
        Cost {
            op: "attention",
            what: format!("attention, {dtype}"),
            bytes: forward.bytes + backward.bytes,
            bytes_formula: "those of attention_forward and of attention_backward",
            flops: forward.flops + backward.flops,
            flops_formula: "2 products forward and 5 backward, half of each causal: 7 B H S^2 D; \
                            whatever a kernel does twice does not count",
            exponentials: forward.exponentials + backward.exponentials,
            ..backward
        }
    }

    /// With the gradients of q and k rotated back; `positions`: rows of the table.
    pub fn attention_rotary_backward(spec: AttentionSpec, dtype: Dtype, positions: usize) -> Self {
        let cost = Cost::attention_backward(spec, dtype);
        let tokens = spec.batch * spec.sequence;
        let table = 4 * (product(&[positions, spec.heads.head_dim]) + tokens as u64);
        Cost {
            what: format!("attention_backward, {dtype}, rotary"),
            bytes: cost.bytes + table,
            bytes_formula: "qkv and d_qkv [T,(H+2K)D]; out and d_out [T,HD]; log-sum-exp, and \
                            delta written and read [B,H,S]; table [P,D] once; positions [T]",
            ..cost
        }
    }

    /// Of T tokens that attend to P rows of a cache.
    pub fn attention_decode(heads: HeadSpec, dtype: Dtype, t: usize, p: usize) -> Self {
        let HeadSpec { heads: h, kv_heads, head_dim } = heads;
        let activations = product(&[t, heads.qkv_columns()])
            + product(&[t, h, head_dim])
            + 2 * product(&[t + p, kv_heads, head_dim]);
        let bytes = element_bytes(dtype) * activations + 4 * t as u64;
        let formula = "qkv [T,(H+2K)D]; out [T,HD]; keys and values [P,KD], T rows of them \
                       written; positions [T]";
        let sizes = Sizes::Decode { t, p, h, k: kv_heads, d: head_dim };
        Cost {
            flops: 4 * product(&[t, p, h, head_dim]),
            flops_formula: "2 products of 2 T P H D",
            ..Cost::moving("attention_decode", "", dtype, sizes, bytes, formula)
        }
    }

    /// The same in both directions.
    pub fn rotary(
        op: &'static str,
        heads: HeadSpec,
        dtype: Dtype,
        t: usize,
        positions: usize,
    ) -> Self {
        let HeadSpec { heads: h, kv_heads: k, head_dim: d } = heads;
        let rotated = product(&[t, h + k, d]);
        let table = product(&[positions, d]) + t as u64;
        let bytes = 2 * element_bytes(dtype) * rotated + 4 * table;
        let formula = "q and k [T,(H+K)D] read and written; table [P,D] once; positions [T]";
        Cost::moving(op, "", dtype, Sizes::Rotary { t, h, k, d }, bytes, formula)
    }

    pub fn swiglu_forward(dtype: Dtype, t: usize, f: usize) -> Self {
        let bytes = 3 * element_bytes(dtype) * product(&[t, f]);
        let formula = "inp [T,2F]; out [T,F]";
        Cost::moving("swiglu_forward", "", dtype, Sizes::Ffn { t, f }, bytes, formula)
    }

    pub fn swiglu_backward(dtype: Dtype, t: usize, f: usize) -> Self {
        let bytes = 5 * element_bytes(dtype) * product(&[t, f]);
        let formula = "inp and d_inp [T,2F]; d_out [T,F]";
        Cost::moving("swiglu_backward", "", dtype, Sizes::Ffn { t, f }, bytes, formula)
    }

    pub fn embedding_forward(dtype: Dtype, [t, v, c]: [usize; 3]) -> Self {
        let bytes = element_bytes(dtype) * product(&[t + t.min(v), c]) + 4 * t as u64;
        let formula = "out [T,C]; min(T,V) rows of the table; tokens [T]";
        let sizes = Sizes::Embedding { t, v, c };
        Cost::moving("embedding_forward", "", dtype, sizes, bytes, formula)
    }

    pub fn embedding_backward(dtype: Dtype, [t, v, c]: [usize; 3]) -> Self {
        let table = 2 * 4 * product(&[t.min(v), c]);
        let bytes = element_bytes(dtype) * product(&[t, c]) + table + 4 * t as u64;
        let formula = "d_out [T,C]; min(T,V) rows of d_table in fp32, read and written; tokens [T]";
        let sizes = Sizes::Embedding { t, v, c };
        Cost::moving("embedding_backward", "", dtype, sizes, bytes, formula)
    }

    pub fn loss_forward(dtype: Dtype, [t, v]: [usize; 2]) -> Self {
        let bytes = element_bytes(dtype) * product(&[t, v]) + 8 * t as u64;
        let formula = "logits [T,V]; targets and losses [T]";
        let moving = Cost::moving("loss_forward", "", dtype, Sizes::Loss { t, v }, bytes, formula);
        Cost { exponentials: product(&[t, v]), ..moving }
    }

    /// `shape`: of the kernel, which reads what it cannot hold a second time.
    pub fn loss_backward(dtype: Dtype, [t, v]: [usize; 2], shape: Shape) -> Self {
        let row_bytes = element_bytes(dtype) * v as u64;
        let read_again = shape.read_again(row_bytes as usize) as u64;
        let bytes = (2 * row_bytes + read_again) * t as u64 + 8 * t as u64 + 4;
        let formula = match read_again {
            0 => "logits read, their gradient written [T,V]; targets and losses [T]; scale",
            _ => {
                "logits read, those of all tiles but the last twice, their gradient written [T,V]; \
                 targets and losses [T]; scale"
            }
        };
        let moving = Cost::moving("loss_backward", "", dtype, Sizes::Loss { t, v }, bytes, formula);
        Cost { exponentials: product(&[t, v]), ..moving }
    }

    pub fn gradient_norm(n: usize) -> Self {
        let bytes = 4 * n as u64;
        let sizes = Sizes::Flat { n };
        let moving = Cost::moving("gradient_norm", "", Dtype::F32, sizes, bytes, "gradients [N]");
        Cost { kernels: 2, ..moving }
    }

    /// `working`: the type of matmul operands; `moments`: what both are stored in.
    pub fn adamw(working: Dtype, master: Master, moments: Dtype, n: usize) -> Self {
        use Dtype::{Bf16, F32};
        let (bytes, formula) = match (working, master, moments) {
            (F32, _, F32) => {
                (28, "parameters and both moments read and written, gradients read [N]: 28 N")
            }
            (F32, _, Bf16) => {
                (20, "parameters and both bf16 moments read and written, gradients read [N]: 20 N")
            }
            (Bf16, Master::F32, F32) => (
                30,
                "parameters and both moments read and written, gradients read, bf16 copy written \
                 [N]: 30 N",
            ),
            (Bf16, Master::F32, Bf16) => (
                22,
                "parameters and both bf16 moments read and written, gradients read, bf16 copy \
                 written [N]: 22 N",
            ),
            (Bf16, Master::Split, F32) => (
                28,
                "bf16 copy, lower halves and both moments read and written, gradients read [N]: 28 N",
            ),
            (Bf16, Master::Split, Bf16) => (
                20,
                "bf16 copy, lower halves and both bf16 moments read and written, gradients read \
                 [N]: 20 N",
            ),
        };
        let of_master = match master {
            Master::F32 => "",
            Master::Split => ", parameters in halves",
        };
        let of_moments = match moments {
            F32 => "",
            Bf16 => ", moments in bf16",
        };
        let detail = format!("{of_master}{of_moments}");
        Cost::moving("adamw", &detail, working, Sizes::Flat { n }, bytes * n as u64, formula)
    }

    /// [`Cost::adamw`] with moments in host memory: each is copied in and out of device memory,
    /// too.
    pub fn adamw_offloaded(working: Dtype, master: Master, moments: Dtype, n: usize) -> Self {
        let cost = Cost::adamw(working, master, moments, n);
        let of_moments = 2 * element_bytes(moments) * n as u64;
        let bytes_formula = match moments {
            Dtype::F32 => {
                "as without optimizer.offload, and both moments written and read [N]: + 16 N"
            }
            Dtype::Bf16 => {
                "as without optimizer.offload, and both bf16 moments written and read [N]: + 8 N"
            }
        };
        Cost {
            what: format!("{}, moments on the host", cost.what),
            bytes: cost.bytes + 2 * of_moments,
            bytes_formula,
            link_bytes: of_moments,
            ..cost
        }
    }

    /// Of numbers of any type, or of token ids.
    pub fn copy(element_bytes: u64, n: usize) -> Self {
        let dtype = if element_bytes == 2 { Dtype::Bf16 } else { Dtype::F32 };
        let bytes = 2 * element_bytes * n as u64;
        let cost =
            Cost::moving("copy", "", dtype, Sizes::Flat { n }, bytes, "[N] read and written");
        Cost { what: format!("copy of {element_bytes}-byte values"), ..cost }
    }

    pub fn add(dtype: Dtype, n: usize) -> Self {
        let bytes = 3 * element_bytes(dtype) * n as u64;
        let formula = "both operands read, one written [N]";
        Cost::moving("add", "", dtype, Sizes::Flat { n }, bytes, formula)
    }

    /// Of f32.
    pub fn zero(n: usize) -> Self {
        let bytes = 4 * n as u64;
        Cost::moving("zero", "", Dtype::F32, Sizes::Flat { n }, bytes, "[N] written")
    }
}
