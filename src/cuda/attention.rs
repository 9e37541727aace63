//! Launches kernels/attention_sm80.cu (bf16), attention_f32.cu and attention_decode.cu: causal
//! attention with grouped KV heads, forward, backward, and of new tokens to a cache.
//!
//! [`Attention`] knows the kernels for one type and one arrangement of heads; it launches them for
//! any batch and sequence. It allocates nothing. The formulas, and what is written, stand at the
//! heads of the kernel files.

use super::{Arguments, DevicePointer, Driver, KernelId, Launch, StreamId};
use crate::backend::{AttentionSpec, HeadSpec};
use crate::config::Dtype;
use crate::error::{Error, Result};

/// The tiles of one head dim's kernels, as they are compiled.
struct Variant {
    head_dim: usize,
    /// bf16: keys of a tile of the forward kernel, keys of a stage of the kernel for d_q, queries
    /// of a stage of the one for d_k and d_v.
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

/// Those that there are kernels for.
pub fn head_dims() -> [usize; VARIANTS.len()] {
    VARIANTS.map(|it| it.head_dim)
}

const fn variant(
    head_dim: usize,
    forward_keys: usize,
    backward_keys: usize,
    backward_queries: usize,
) -> Variant {
    Variant { head_dim, forward_keys, backward_keys, backward_queries }
}

const THREADS: u32 = 128;
const DECODE_THREADS: u32 = 256;
/// Rows of a block: of bf16 kernels, and of all f32 kernels.
const FORWARD_QUERIES: usize = 128;
const FORWARD_RING: usize = 3;
const BACKWARD_ROWS: usize = 64;
const F32_ROWS: usize = 32;
/// Floats between the rows of f32 tiles, beyond what a row holds.
const F32_PADDING: usize = 4;
/// Blocks along y.
const MAX_TILES: usize = 65535;

/// A kernel, the rows of the result that a block makes, and its dynamic shared memory.
#[derive(Clone, Copy, Debug)]
struct Tiled {
    kernel: KernelId,
    rows: usize,
    shared_bytes: u32,
}

/// The kernels for one type and arrangement of heads on one machine.
#[derive(Clone, Debug)]
pub struct Attention {
    device: &'static str,
    heads: HeadSpec,
    /// Of rows that are one document each.
    whole: Kernels,
    /// Of rows whose tokens see their own document alone.
    documents: Kernels,
    decode: KernelId,
}

#[derive(Clone, Copy, Debug)]
struct Kernels {
    forward: Tiled,
    backward_q: Tiled,
    backward_kv: Tiled,
}

impl Attention {
    /// Errors: a head dim without a kernel; heads that are no multiple of the KV heads.
    pub fn new(driver: &mut dyn Driver, dtype: Dtype, heads: HeadSpec) -> Result<Self> {
        let device = driver.device();
        let HeadSpec { heads: count, kv_heads, head_dim } = heads;
        if count == 0 || kv_heads == 0 || !count.is_multiple_of(kv_heads) {
            return Err(refusal(
                device,
                format!("{count} heads share {kv_heads} KV heads"),
                "choose model.heads as a multiple of model.kv_heads, at least one of each"
                    .to_string(),
            ));
        }
        let Some(variant) = VARIANTS.iter().find(|it| it.head_dim == head_dim) else {
            let dims = head_dims().map(|it| it.to_string()).join(", ");
            return Err(refusal(
                device,
                format!("no kernel for a head dim of {head_dim}; there are {dims}"),
                "choose model.hidden and model.heads so that model.hidden / model.heads is one of \
                 these"
                    .to_string(),
            ));
        };
        // The kernels count the columns of a token with an i32.
        if i32::try_from(heads.qkv_columns()).is_err() {
            return Err(refusal(
                device,
                format!("a token has {} columns of q, k and v", heads.qkv_columns()),
                "choose a smaller model.hidden".to_string(),
            ));
        }
        let [whole, documents] = ["", "documents_"].map(|of| {
            let mut tiled = |name: &str, rows: usize, shared_bytes: usize| -> Result<Tiled> {
                let kernel = driver.kernel(&format!("attention_{name}_{of}{dtype}_{head_dim}"))?;
                Ok(Tiled { kernel, rows, shared_bytes: shared_bytes as u32 })
            };
            match dtype {
                Dtype::Bf16 => {
                    let tile = |rows: usize| rows * head_dim * 2;
                    let queries = variant.backward_queries;
                    let statistics = 2 * queries * 4;
                    let own_tiles = 2 * tile(BACKWARD_ROWS);
                    let of_keys = own_tiles + 2 * 2 * tile(variant.backward_keys);
                    let of_queries = own_tiles + 2 * (2 * tile(queries) + statistics);
                    let forward = tile(FORWARD_QUERIES) + FORWARD_RING * tile(variant.forward_keys);
                    Ok(Kernels {
                        forward: tiled("forward", FORWARD_QUERIES, forward)?,
                        backward_q: tiled("backward_q", BACKWARD_ROWS, of_keys)?,
                        backward_kv: tiled("backward_kv", BACKWARD_ROWS, of_queries)?,
                    })
                }
                Dtype::F32 => {
                    let tile = F32_ROWS * (head_dim + F32_PADDING) * 4;
                    let exchange = F32_ROWS * (F32_ROWS + F32_PADDING) * 4;
                    Ok(Kernels {
                        forward: tiled("forward", F32_ROWS, 3 * tile + exchange)?,
                        backward_q: tiled("backward_q", F32_ROWS, 4 * tile + exchange)?,
                        backward_kv: tiled("backward_kv", F32_ROWS, 4 * tile + exchange)?,
                    })
                }
            }
        });
        let decode = driver.kernel(&format!("attention_decode_{dtype}_{head_dim}"))?;
        Ok(Attention { device, heads, whole: whole?, documents: documents?, decode })
    }

    fn kernels(&self, document_starts: Option<DevicePointer>) -> Kernels {
        if document_starts.is_some() { self.documents } else { self.whole }
    }

    /// qkv [T,(H+2K)D] -> out [T,HD], log_sum_exp [B,H,S] f32, with T = B S. document_starts [T]
    /// i32, where a row holds several documents: as the backend's contract says, which nobody
    /// checks here.
    ///
    /// Errors: other heads than these kernels', sizes that they cannot count, matrices that do not
    /// begin at a multiple of 16 bytes; whatever the driver finds wrong.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        spec: AttentionSpec,
        qkv: DevicePointer,
        document_starts: Option<DevicePointer>,
        out: DevicePointer,
        log_sum_exp: DevicePointer,
    ) -> Result<()> {
        let Some(sizes) = self.check(spec)? else { return Ok(()) };
        self.check_alignment(&[("qkv", qkv), ("out", out)])?;
        let starts = document_starts.unwrap_or(DevicePointer::NULL);
        let arguments = Arguments::new().with(qkv).with(starts).with(out).with(log_sum_exp);
        let kernel = self.kernels(document_starts).forward;
        self.launch(driver, stream, kernel, self.heads.heads, sizes, arguments)
    }

    /// d_qkv [T,(H+2K)D], all of it, from what forward read and wrote and d_out [T,HD]. delta
    /// [B,H,S] f32 is scratch for the row sums of out * d_out.
    ///
    /// Errors: as [`Attention::forward`].
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        spec: AttentionSpec,
        qkv: DevicePointer,
        document_starts: Option<DevicePointer>,
        out: DevicePointer,
        log_sum_exp: DevicePointer,
        d_out: DevicePointer,
        delta: DevicePointer,
        d_qkv: DevicePointer,
    ) -> Result<()> {
        let Some(sizes) = self.check(spec)? else { return Ok(()) };
        self.check_alignment(&[("qkv", qkv), ("out", out), ("d_out", d_out), ("d_qkv", d_qkv)])?;
        let Kernels { backward_q, backward_kv, .. } = self.kernels(document_starts);
        let starts = document_starts.unwrap_or(DevicePointer::NULL);
        // First, because it makes the other one's delta.
        let arguments = Arguments::new()
            .with(qkv)
            .with(starts)
            .with(out)
            .with(log_sum_exp)
            .with(d_out)
            .with(delta)
            .with(d_qkv);
        self.launch(driver, stream, backward_q, self.heads.heads, sizes, arguments)?;
        let arguments = Arguments::new()
            .with(qkv)
            .with(starts)
            .with(log_sum_exp)
            .with(d_out)
            .with(delta)
            .with(d_qkv);
        self.launch(driver, stream, backward_kv, self.heads.kv_heads, sizes, arguments)
    }

    /// Writes k and v of qkv [`tokens`,(H+2K)D] to rows `positions` (i32, ascending by 1, on the
    /// device) of keys and values [`cache_rows`,KD]; out [`tokens`,HD]: each token attends to all
    /// rows up to its own.
    ///
    /// Errors: more tokens than rows, sizes that the kernel cannot count, matrices that do not
    /// begin at a multiple of 16 bytes; whatever the driver finds wrong. Positions that break the
    /// contract end the kernel.
    #[allow(clippy::too_many_arguments)]
    pub fn decode(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        tokens: usize,
        cache_rows: usize,
        qkv: DevicePointer,
        keys: DevicePointer,
        values: DevicePointer,
        positions: DevicePointer,
        out: DevicePointer,
    ) -> Result<()> {
        if tokens == 0 {
            return Ok(());
        }
        if tokens > cache_rows {
            return Err(refusal(
                self.device,
                format!("{tokens} new tokens, but a cache of {cache_rows} rows"),
                "use a shorter prompt, or a model with a larger model.max_sequence".to_string(),
            ));
        }
        let blocks = tokens.checked_mul(self.heads.heads).and_then(|it| i32::try_from(it).ok());
        // A thread's last step, 64 keys behind the last row, stays within an i32.
        let rows = i32::try_from(cache_rows).ok().filter(|&rows| rows <= i32::MAX - 64);
        let (Some(blocks), Some(rows)) = (blocks, rows) else {
            return Err(refusal(
                self.device,
                format!("{tokens} tokens of {} heads, {cache_rows} rows", self.heads.heads),
                "give the prompt in parts; an i32 has to count blocks and rows".to_string(),
            ));
        };
        self.check_alignment(&[("qkv", qkv), ("keys", keys), ("values", values)])?;
        let arguments = Arguments::new()
            .with(qkv)
            .with(keys)
            .with(values)
            .with(positions)
            .with(out)
            .with(rows)
            .with(self.heads.heads as i32)
            .with(self.heads.kv_heads as i32)
            .with(self.scale() as f32);
        let launch =
            Launch::new(self.decode, [blocks as u32, 1, 1], [DECODE_THREADS, 1, 1]).on(stream);
        driver.launch(&launch, &arguments)
    }

    /// 1 / sqrt(D), what scores are multiplied by.
    fn scale(&self) -> f64 {
        1.0 / (self.heads.head_dim as f64).sqrt()
    }

    /// Blocks for all rows of `heads` heads of each sequence, heads first.
    fn launch(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        tiled: Tiled,
        heads: usize,
        Sizes { batch, sequence }: Sizes,
        arguments: Arguments,
    ) -> Result<()> {
        let arguments = arguments
            .with(sequence as i32)
            .with(self.heads.heads as i32)
            .with(self.heads.kv_heads as i32)
            .with(self.scale() as f32)
            .with((self.scale() * std::f64::consts::LOG2_E) as f32);
        let grid = [(batch * heads) as u32, sequence.div_ceil(tiled.rows) as u32, 1];
        let launch = Launch::new(tiled.kernel, grid, [THREADS, 1, 1])
            .shared_bytes(tiled.shared_bytes)
            .on(stream);
        driver.launch(&launch, &arguments)
    }

    /// Rows are moved 16 bytes at a time.
    fn check_alignment(&self, matrices: &[(&str, DevicePointer)]) -> Result<()> {
        match matrices.iter().find(|(_, address)| !address.0.is_multiple_of(16)) {
            None => Ok(()),
            Some((name, address)) => Err(refusal(
                self.device,
                format!("{name} begins at {:#x}, no multiple of 16", address.0),
                "begin it at a multiple of 16 bytes in its buffer".to_string(),
            )),
        }
    }

    /// The sizes, found to be countable; `None` where there is nothing to do.
    fn check(&self, spec: AttentionSpec) -> Result<Option<Sizes>> {
        let AttentionSpec { heads, batch, sequence } = spec;
        if heads != self.heads {
            return Err(refusal(
                self.device,
                format!("{heads:?} given to the kernels for {:?}", self.heads),
                "make an Attention for these heads".to_string(),
            ));
        }
        if batch == 0 || sequence == 0 {
            return Ok(None);
        }
        let blocks = batch.checked_mul(heads.heads).filter(|&it| it <= i32::MAX as usize);
        if blocks.is_none() || sequence > MAX_TILES * F32_ROWS {
            return Err(refusal(
                self.device,
                format!("{batch} sequences of {sequence} tokens with {} heads", heads.heads),
                format!(
                    "choose data.sequence up to {}, and a train.micro_batch with at most {} heads \
                     of all sequences",
                    MAX_TILES * F32_ROWS,
                    i32::MAX
                ),
            ));
        }
        Ok(Some(Sizes { batch, sequence }))
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    sequence: usize,
}

fn refusal(device: &str, what: String, remedy: String) -> Error {
    Error::Launch { kernel: "attention".to_string(), device: device.to_string(), what, remedy }
}
