//! Causal attention with grouped KV heads: forward, backward, and of new tokens to a cache.
//!
//! [`Attention`] knows the kernels for one type and one arrangement of heads: the fastest that this
//! machine runs and this build holds. A plan is a pass over matrices at given addresses, of any
//! batch and sequence; it is then launched as often as wanted. Only the plan of a backward pass in
//! one ([`Passes::One`]) may allocate. The formulas, and what is written, stand at the heads of the
//! kernel files: attention_sm90.cu is launched by sm90.rs, attention_backward_sm90.cu by
//! one_pass.rs, attention_backward_short_sm90.cu by short.rs, attention_sm80.cu and
//! attention_f32.cu by tiled.rs, attention_decode.cu here.

pub mod estimate;
mod maps;
mod one_pass;
mod short;
mod sm90;
mod tiled;

use super::{Arguments, DevicePointer, Driver, Family, KernelId, Launch, StreamId};
use crate::backend::{self, AttentionSpec, HeadSpec};
use crate::config::Dtype;
use crate::error::{Error, Result};

const HEAD_DIMS: [usize; 5] = [32, 48, 64, 96, 128];

/// Those that there are kernels for.
pub fn head_dims() -> [usize; HEAD_DIMS.len()] {
    HEAD_DIMS
}

const DECODE_THREADS: u32 = 256;

/// Sizes and addresses of a forward pass; nobody checks the document starts.
pub type AttentionForward = backend::AttentionForward<DevicePointer>;

/// Sizes and addresses of a backward pass: what the forward pass read and wrote, and more.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AttentionBackward {
    pub forward: AttentionForward,
    /// [T,HD]
    pub d_out: DevicePointer,
    /// [B,H,S], f32, scratch for the row sums of out * d_out.
    pub delta: DevicePointer,
    /// [T,(H+2K)D]
    pub d_qkv: DevicePointer,
    /// By which q and k were rotated, to rotate their gradients back; where
    /// [`Attention::rotates_back`].
    pub angles: Option<Angles>,
}

/// Of rotary embedding.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Angles {
    /// [P,D] in f32: D/2 cosines of a position, then D/2 sines
    pub table: DevicePointer,
    /// [T], i32, each below P
    pub positions: DevicePointer,
}

/// How a backward pass on Hopper goes over the scores.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Passes {
    /// Once, of rows of at most 256 tokens: a block has a head to itself. Others are as for `Two`.
    Short,
    /// Once: d_q, d_k and d_v together; d_q is summed in device memory. Sequences whose sums have
    /// no place are refused.
    One,
    /// Twice: d_q, then d_k and d_v.
    Two,
}

/// Bytes that the backward pass over such matrices in bf16 allocates on a machine of compute
/// capability 9.0, with the passes that [`Attention::plan_backward`] chooses.
pub fn backward_scratch_bytes(multiprocessors: usize, spec: AttentionSpec, documents: bool) -> u64 {
    let AttentionSpec { heads, batch, sequence } = spec;
    let sizes = Sizes { batch, sequence };
    let way = sm90::Way::chosen(multiprocessors, heads, sizes, documents, None);
    way.scratch_bytes(heads, sizes)
}

/// A pass that is ready to be launched.
#[derive(Clone)]
pub struct AttentionPlan {
    /// Of a backward pass.
    passes: Option<Passes>,
    launches: Vec<(Launch, Arguments)>,
}

impl AttentionPlan {
    /// How a backward pass goes over the scores; `None`: a forward pass, or one of nothing.
    pub fn passes(&self) -> Option<Passes> {
        self.passes
    }

    /// The names of its kernels, in their order. Errors: another driver than the plan's.
    pub fn kernels(&self, driver: &dyn Driver) -> Result<Vec<String>> {
        let launches = self.launches.iter();
        launches.map(|(launch, _)| Ok(driver.kernel_info(launch.kernel)?.name.clone())).collect()
    }

    /// Errors: what the driver finds wrong.
    pub fn launch(&self, driver: &mut dyn Driver, stream: StreamId) -> Result<()> {
        let mut launches = self.launches.iter();
        launches.try_for_each(|(launch, arguments)| driver.launch(&launch.on(stream), arguments))
    }
}

/// The kernels for one type and arrangement of heads on one machine.
#[derive(Clone, Debug)]
pub struct Attention {
    device: &'static str,
    heads: HeadSpec,
    kernels: Kernels,
    decode: KernelId,
}

#[derive(Clone, Debug)]
enum Kernels {
    Tiled(tiled::Kernels),
    Sm90(sm90::Kernels),
}

impl Kernels {
    /// Errors: a build without them.
    fn new(driver: &mut dyn Driver, family: Family, heads: HeadSpec) -> Result<Self> {
        Ok(match family {
            Family::Sm80 => Kernels::Tiled(tiled::Kernels::new(driver, Dtype::Bf16, heads)?),
            Family::F32 => Kernels::Tiled(tiled::Kernels::new(driver, Dtype::F32, heads)?),
            Family::Sm90 => Kernels::Sm90(sm90::Kernels::new(driver, heads)?),
        })
    }
}

impl Attention {
    /// `choice`: a family; `None`: the best one that this machine runs and this build holds.
    ///
    /// Errors: a head dim without a kernel; heads that are no multiple of the KV heads; a family
    /// that this machine or this type does not have; a build without its kernels.
    pub fn new(
        driver: &mut dyn Driver,
        dtype: Dtype,
        heads: HeadSpec,
        choice: Option<Family>,
    ) -> Result<Self> {
        let device = driver.device();
        let HeadSpec { heads: count, kv_heads, head_dim } = heads;
        if count == 0 || kv_heads == 0 || !count.is_multiple_of(kv_heads) {
            return Err(Error::launch(
                "attention",
                device,
                format!("{count} heads share {kv_heads} KV heads"),
                "choose model.heads as a multiple of model.kv_heads, at least one of each"
                    .to_string(),
            ));
        }
        if !HEAD_DIMS.contains(&head_dim) {
            let dims = HEAD_DIMS.map(|it| it.to_string()).join(", ");
            return Err(Error::launch(
                "attention",
                device,
                format!("no kernel for a head dim of {head_dim}; there are {dims}"),
                "choose model.hidden and model.heads so that model.hidden / model.heads is one of \
                 these"
                    .to_string(),
            ));
        }
        // The kernels count the columns of a token with an i32.
        if i32::try_from(heads.qkv_columns()).is_err() {
            return Err(Error::launch(
                "attention",
                device,
                format!("a token has {} columns of q, k and v", heads.qkv_columns()),
                "choose a smaller model.hidden",
            ));
        }
        let families = Family::chosen(device, driver.properties(), dtype, choice)?;
        // A build for fewer architectures lacks whole files: the next family is as right.
        let mut found = families.iter().map(|&family| Kernels::new(driver, family, heads));
        let first = found.next().expect("every machine has a family");
        let kernels = first.or_else(|missing| found.find_map(Result::ok).ok_or(missing))?;
        drop(found);
        let decode = driver.kernel(&format!("attention_decode_{dtype}_{head_dim}"))?;
        Ok(Attention { device, heads, kernels, decode })
    }

    /// Chooses how backward passes are run; otherwise the cost model does, by the sizes.
    ///
    /// Errors: a family or a head dim that has no such kernel.
    pub fn with_passes(mut self, passes: Passes) -> Result<Self> {
        let can = match &mut self.kernels {
            Kernels::Sm90(kernels) => kernels.set_passes(passes),
            Kernels::Tiled(_) => passes == Passes::Two,
        };
        if can {
            return Ok(self);
        }
        Err(Error::launch(
            "attention",
            self.device,
            format!("no backward pass as Passes::{passes:?} for {:?}", self.heads),
            "choose Passes::Two; the others are for bf16 on compute capability 9.0, One with head \
             dims of 32, 64 and 128, Short with 32, 48 and 64"
                .to_string(),
        ))
    }

    /// All passes that [`Attention::with_passes`] can choose for such matrices.
    pub fn all_passes(&self, spec: AttentionSpec) -> Vec<Passes> {
        match &self.kernels {
            Kernels::Tiled(_) => vec![Passes::Two],
            Kernels::Sm90(kernels) => {
                kernels.all_passes(Sizes { batch: spec.batch, sequence: spec.sequence })
            }
        }
    }

    /// Whether sums that several blocks add to are added up in one order, as they are unless this
    /// is called. Only backward passes in one have such sums; without an order, the bits of d_q
    /// depend on who comes first.
    pub fn with_deterministic(mut self, deterministic: bool) -> Self {
        if let Kernels::Sm90(kernels) = &mut self.kernels {
            kernels.set_deterministic(deterministic);
        }
        self
    }

    /// Gives its memory back, after all its work has run.
    pub fn release(self, driver: &mut dyn Driver) -> Result<()> {
        match self.kernels {
            Kernels::Tiled(_) => Ok(()),
            Kernels::Sm90(kernels) => kernels.release(driver),
        }
    }

    /// Errors: other heads than these kernels', sizes that they cannot count, matrices that do not
    /// begin at a multiple of 16 bytes or leave their buffers.
    pub fn plan_forward(
        &self,
        driver: &mut dyn Driver,
        pass: &AttentionForward,
    ) -> Result<AttentionPlan> {
        let mut launches = vec![];
        if let Some(sizes) = self.check(pass.spec)? {
            self.check_alignment(&[("qkv", pass.qkv), ("out", pass.out)])?;
            launches.push(match &self.kernels {
                Kernels::Tiled(kernels) => kernels.forward(sizes, pass),
                Kernels::Sm90(kernels) => kernels.forward(driver, sizes, pass)?,
            });
        }
        Ok(AttentionPlan { passes: None, launches })
    }

    /// Whether [`AttentionBackward::angles`] are taken.
    pub fn rotates_back(&self) -> bool {
        matches!(self.kernels, Kernels::Sm90(_))
    }

    /// Errors: as [`Attention::plan_forward`]; angles for kernels that do not take them; sizes that
    /// the passes that were chosen cannot do; no memory.
    pub fn plan_backward(
        &mut self,
        driver: &mut dyn Driver,
        pass: &AttentionBackward,
    ) -> Result<AttentionPlan> {
        let AttentionBackward { forward: AttentionForward { spec, qkv, out, .. }, .. } = *pass;
        if pass.angles.is_some() && !self.rotates_back() {
            return Err(Error::launch(
                "attention",
                self.device,
                "these kernels do not rotate gradients back".to_string(),
                "ask Attention::rotates_back first, and rotate them by a kernel of their own"
                    .to_string(),
            ));
        }
        let (mut passes, mut launches) = (None, vec![]);
        if let Some(sizes) = self.check(spec)? {
            let (d_out, d_qkv) = (pass.d_out, pass.d_qkv);
            let matrices = [("qkv", qkv), ("out", out), ("d_out", d_out), ("d_qkv", d_qkv)];
            self.check_alignment(&matrices)?;
            if let Some(Angles { table, positions }) = pass.angles {
                self.check_alignment(&[("table", table), ("positions", positions)])?;
            }
            // Delta comes with the first one.
            let (chosen, of_passes) = match &mut self.kernels {
                Kernels::Tiled(kernels) => (Passes::Two, kernels.backward(sizes, pass).into()),
                Kernels::Sm90(kernels) => kernels.backward(driver, sizes, pass)?,
            };
            (passes, launches) = (Some(chosen), of_passes);
        }
        Ok(AttentionPlan { passes, launches })
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
            return Err(Error::launch(
                "attention",
                self.device,
                format!("{tokens} new tokens, but a cache of {cache_rows} rows"),
                "use a shorter prompt, or a model with a larger model.max_sequence",
            ));
        }
        let blocks = tokens.checked_mul(self.heads.heads).and_then(|it| i32::try_from(it).ok());
        // A thread's last step, 64 keys after the last row, stays within an i32.
        let rows = i32::try_from(cache_rows).ok().filter(|&rows| rows <= i32::MAX - 64);
        let (Some(blocks), Some(rows)) = (blocks, rows) else {
            return Err(Error::launch(
                "attention",
                self.device,
                format!("{tokens} tokens of {} heads, {cache_rows} rows", self.heads.heads),
                "give the prompt in parts; an i32 has to count blocks and rows",
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
            .with(scale(self.heads) as f32);
        let launch =
            Launch::new(self.decode, [blocks as u32, 1, 1], [DECODE_THREADS, 1, 1]).on(stream);
        driver.launch(&launch, &arguments)
    }

    /// Rows are moved 16 bytes at a time.
    fn check_alignment(&self, matrices: &[(&str, DevicePointer)]) -> Result<()> {
        match matrices.iter().find(|(_, address)| !address.0.is_multiple_of(16)) {
            None => Ok(()),
            Some((name, address)) => Err(Error::launch(
                "attention",
                self.device,
                format!("{name} begins at {:#x}, no multiple of 16", address.0),
                "begin it at a multiple of 16 bytes in its buffer",
            )),
        }
    }

    /// The sizes, found to be countable; `None` where there is nothing to do.
    fn check(&self, spec: AttentionSpec) -> Result<Option<Sizes>> {
        let AttentionSpec { heads, batch, sequence } = spec;
        if heads != self.heads {
            return Err(Error::launch(
                "attention",
                self.device,
                format!("{heads:?} given to the kernels for {:?}", self.heads),
                "make an Attention for these heads",
            ));
        }
        if batch == 0 || sequence == 0 {
            return Ok(None);
        }
        // So many tiles of 32 rows, the smallest that a kernel has.
        let most_items = i32::MAX as usize - 1024;
        let items = sequence.div_ceil(32).checked_mul(heads.heads);
        let items = items.and_then(|it| it.checked_mul(batch)).filter(|&it| it <= most_items);
        if items.is_none() || sequence > tiled::MAX_SEQUENCE {
            return Err(Error::launch(
                "attention",
                self.device,
                format!("{batch} sequences of {sequence} tokens with {} heads", heads.heads),
                format!(
                    "choose data.sequence up to {}, and a train.micro_batch with at most \
                     {most_items} tiles of 32 rows of all heads",
                    tiled::MAX_SEQUENCE
                ),
            ));
        }
        Ok(Some(Sizes { batch, sequence }))
    }
}

/// 1 / sqrt(D), what scores are multiplied by.
fn scale(heads: HeadSpec) -> f64 {
    1.0 / (heads.head_dim as f64).sqrt()
}

/// The same where exponents are those of two.
fn scale_log2(heads: HeadSpec) -> f64 {
    scale(heads) * std::f64::consts::LOG2_E
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    sequence: usize,
}
