//! The kernels of kernels/attention_sm80.cu (bf16) and attention_f32.cu: a block for each tile of
//! rows of each head, all launched alike.

use super::{AttentionBackward, AttentionForward, Sizes, scale, scale_log2};
use crate::backend::HeadSpec;
use crate::config::Dtype;
use crate::cuda::{Arguments, Driver, KernelId, Launch};
use crate::error::Result;

/// The tiles of one head dim's bf16 kernels, as they are compiled.
struct Variant {
    head_dim: usize,
    /// Keys of a tile of the forward kernel, keys of a stage of the kernel for d_q, queries of a
    /// stage of the one for d_k and d_v.
    forward_keys: usize,
    backward_keys: usize,
    backward_queries: usize,
}

const VARIANTS: [Variant; 5] = [
    variant(32, 64, 64, 64),
    variant(48, 64, 64, 64),
    variant(64, 64, 64, 64),
    variant(96, 64, 64, 32),
    variant(128, 32, 32, 32),
];

const fn variant(
    head_dim: usize,
    forward_keys: usize,
    backward_keys: usize,
    backward_queries: usize,
) -> Variant {
    Variant { head_dim, forward_keys, backward_keys, backward_queries }
}

const THREADS: u32 = 128;
/// Rows of a block: of bf16 kernels, and of all f32 kernels.
const FORWARD_QUERIES: usize = 128;
const FORWARD_RING: usize = 3;
const BACKWARD_ROWS: usize = 64;
const F32_ROWS: usize = 32;
/// Floats between the rows of f32 tiles, beyond what a row holds.
const F32_PADDING: usize = 4;
/// Tiles are blocks along y.
pub(super) const MAX_SEQUENCE: usize = 65535 * F32_ROWS;

#[derive(Clone, Debug)]
pub(super) struct Kernels {
    heads: HeadSpec,
    /// Of rows that are one document each.
    whole: Passes,
    /// Of rows whose tokens see their own document alone.
    documents: Passes,
}

#[derive(Clone, Copy, Debug)]
struct Passes {
    forward: Tiled,
    backward_q: Tiled,
    backward_kv: Tiled,
}

/// A kernel, the rows of the result that a block makes, and its dynamic shared memory.
#[derive(Clone, Copy, Debug)]
struct Tiled {
    kernel: KernelId,
    rows: usize,
    shared_bytes: u32,
}

impl Kernels {
    /// Errors: a build without them.
    pub fn new(driver: &mut dyn Driver, dtype: Dtype, heads: HeadSpec) -> Result<Self> {
        let head_dim = heads.head_dim;
        let [whole, documents] = ["", "documents_"].map(|of| {
            let mut tiled = |name: &str, rows: usize, shared_bytes: usize| -> Result<Tiled> {
                let kernel = driver.kernel(&format!("attention_{name}_{of}{dtype}_{head_dim}"))?;
                Ok(Tiled { kernel, rows, shared_bytes: shared_bytes as u32 })
            };
            match dtype {
                Dtype::Bf16 => {
                    let variant = VARIANTS.iter().find(|it| it.head_dim == head_dim);
                    let variant = variant.expect("the head dim was checked");
                    let tile = |rows: usize| rows * head_dim * 2;
                    let queries = variant.backward_queries;
                    let statistics = 2 * queries * 4;
                    let own_tiles = 2 * tile(BACKWARD_ROWS);
                    let of_keys = own_tiles + 2 * 2 * tile(variant.backward_keys);
                    let of_queries = own_tiles + 2 * (2 * tile(queries) + statistics);
                    let forward = tile(FORWARD_QUERIES) + FORWARD_RING * tile(variant.forward_keys);
                    Ok(Passes {
                        forward: tiled("forward", FORWARD_QUERIES, forward)?,
                        backward_q: tiled("backward_q", BACKWARD_ROWS, of_keys)?,
                        backward_kv: tiled("backward_kv", BACKWARD_ROWS, of_queries)?,
                    })
                }
                Dtype::F32 => {
                    let tile = F32_ROWS * (head_dim + F32_PADDING) * 4;
                    let exchange = F32_ROWS * (F32_ROWS + F32_PADDING) * 4;
                    Ok(Passes {
                        forward: tiled("forward", F32_ROWS, 3 * tile + exchange)?,
                        backward_q: tiled("backward_q", F32_ROWS, 4 * tile + exchange)?,
                        backward_kv: tiled("backward_kv", F32_ROWS, 4 * tile + exchange)?,
                    })
                }
            }
        });
        Ok(Kernels { heads, whole: whole?, documents: documents? })
    }

    fn of(&self, pass: &AttentionForward) -> Passes {
        if pass.document_starts.is_some() { self.documents } else { self.whole }
    }

    pub fn forward(&self, sizes: Sizes, pass: &AttentionForward) -> (Launch, Arguments) {
        let arguments = Arguments::new()
            .with(pass.qkv)
            .with(pass.document_starts.unwrap_or_default())
            .with(pass.out)
            .with(pass.log_sum_exp);
        self.launch(self.of(pass).forward, self.heads.heads, sizes, arguments)
    }

    pub fn backward(&self, sizes: Sizes, pass: &AttentionBackward) -> [(Launch, Arguments); 2] {
        let AttentionBackward { forward, d_out, delta, d_qkv, angles: _ } = *pass;
        let Passes { backward_q, backward_kv, .. } = self.of(&forward);
        let starts = forward.document_starts.unwrap_or_default();
        let of_q = Arguments::new()
            .with(forward.qkv)
            .with(starts)
            .with(forward.out)
            .with(forward.log_sum_exp)
            .with(d_out)
            .with(delta)
            .with(d_qkv);
        let of_kv = Arguments::new()
            .with(forward.qkv)
            .with(starts)
            .with(forward.log_sum_exp)
            .with(d_out)
            .with(delta)
            .with(d_qkv);
        [
            self.launch(backward_q, self.heads.heads, sizes, of_q),
            self.launch(backward_kv, self.heads.kv_heads, sizes, of_kv),
        ]
    }

    /// Blocks for all rows of `heads` heads of each sequence, heads first.
    fn launch(
        &self,
        tiled: Tiled,
        heads: usize,
        Sizes { batch, sequence }: Sizes,
        arguments: Arguments,
    ) -> (Launch, Arguments) {
        let arguments = arguments
            .with(sequence as i32)
            .with(self.heads.heads as i32)
            .with(self.heads.kv_heads as i32)
            .with(scale(self.heads) as f32)
            .with(scale_log2(self.heads) as f32);
        let grid = [(batch * heads) as u32, sequence.div_ceil(tiled.rows) as u32, 1];
        let launch =
            Launch::new(tiled.kernel, grid, [THREADS, 1, 1]).shared_bytes(tiled.shared_bytes);
        (launch, arguments)
    }
}
