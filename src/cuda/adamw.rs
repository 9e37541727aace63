//! Launches kernels/adamw.cu: the global gradient norm, and AdamW over the flat buffers.
//!
//! [`AdamW`] is for one number of elements and one set of decaying ranges. It allocates once, when
//! it is made: [`AdamW::device_bytes`] of scratch, step scalars and the table of ranges. A step is
//! [`AdamW::prepare`], which copies this step's scalars to the device and waits for it (a caller
//! that does not want to wait copies [`AdamW::scalars`] itself), and may not be captured; then
//! [`AdamW::gradient_norm`] and [`AdamW::launch`], which may. The formulas stand at the head of
//! kernels/adamw.cu and in its function `update`.
//!
//! Moments in bf16 are rounded stochastically. The random bits are a pure function of seed, update
//! and the element's index in the whole flat buffer: [`ROUNDING_STREAM`] says which.

use std::ops::Range;

use super::{Allocation, Arguments, DevicePointer, Driver, KernelId, Launch, StreamId};
use crate::backend::{AdamWStep, VectorCopy};
use crate::config::{Dtype, Master};
use crate::error::{Error, Result};

/// Elements of a block of adamw_update, and its threads.
const CHUNK: u64 = 2048;
const THREADS: u32 = 256;
/// Elements that a block of adamw_norm_partials takes at once. There are never more blocks than
/// these: about what a large GPU holds, but the same on every machine, so that a sum has one order.
const NORM_TILE: u64 = 4096;
const MAX_PARTIALS: u64 = 1024;

/// The most elements: a grid has 2^31 - 1 blocks. 4 TiB of f32.
pub const MAX_ELEMENTS: u64 = 1 << 40;
/// What every address must be a multiple of.
const ALIGNMENT: u64 = 16;
/// Elements that share one draw of random bits.
const DRAWN_AT_ONCE: u64 = 4;

/// Element i of update t has word i % 4 of Philox4x32-7 under the run's seed, stream
/// `ROUNDING_STREAM ^ t`, counter i / 4: the lower half for its first moment, the upper half for
/// its second one.
pub const ROUNDING_STREAM: u64 = 0x4d4f_4d53 << 32;

/// The part of the flat buffers that an optimizer is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlatPart {
    /// Elements before it; a multiple of 4.
    pub first: u64,
    pub elements: u64,
    pub master: Master,
    /// What both moments are stored in.
    pub moments: Dtype,
}

/// What an update reads from device memory, as kernels/adamw.cu lays it out. Everything that a
/// step may change is in it, so that a captured graph can be replayed for another step.
#[derive(Clone, Copy, PartialEq, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(16))]
pub struct Scalars {
    lr: f32,
    beta1: f32,
    /// 1 - beta1
    rest1: f32,
    beta2: f32,
    rest2: f32,
    /// 1 / (1 - beta1^step)
    inverse1: f32,
    inverse2: f32,
    eps: f32,
    /// Weight decay of the parameter, and of the gradient; one of them is 0.
    decoupled: f32,
    coupled: f32,
    /// 0: off
    clip: f32,
    alignment: f32,
    seed: u64,
    /// [`ROUNDING_STREAM`] and the update.
    stream: u64,
}

/// Addresses of what is updated, f32 unless it says so; all multiples of 16.
#[derive(Clone, Copy, Debug)]
pub struct AdamWBuffers {
    /// [N], f32 or lower halves.
    pub parameters: DevicePointer,
    /// [N]
    pub gradients: DevicePointer,
    /// [N], f32 or bf16.
    pub moment1: DevicePointer,
    /// [N], f32 or bf16.
    pub moment2: DevicePointer,
    /// [N], bf16: the new parameters, rounded; the upper halves.
    pub working: Option<DevicePointer>,
    /// Copies of all vectors; not read where parameters are f32.
    pub vectors: Option<DevicePointer>,
    /// [1], of these gradients: what they are clipped by.
    pub grad_norm: DevicePointer,
}

impl AdamWBuffers {
    /// From element `at` of `part` on, but for the moments, which lie elsewhere.
    pub(super) fn of_chunk(&self, at: u64, part: &FlatPart, moments: [DevicePointer; 2]) -> Self {
        let parameter_bytes = match part.master {
            Master::F32 => 4,
            Master::Split => 2,
        };
        let [moment1, moment2] = moments;
        AdamWBuffers {
            parameters: self.parameters.offset(parameter_bytes * at),
            gradients: self.gradients.offset(4 * at),
            moment1,
            moment2,
            working: self.working.map(|working| working.offset(2 * at)),
            ..*self
        }
    }
}

/// The optimizer of one flat buffer on one machine.
#[derive(Clone, Debug)]
pub struct AdamW {
    device: &'static str,
    part: FlatPart,
    decay: Vec<Range<usize>>,
    boundaries: i32,
    vectors: i32,
    /// Step scalars, then partial sums of the norm, then boundaries of the decaying ranges, then
    /// those of the vectors, then where each has its copy.
    memory: Allocation,
    norm_partials: KernelId,
    norm_total: KernelId,
    update: KernelId,
}

const PARTIALS_AT: u64 = size_of::<Scalars>() as u64;
const BOUNDARIES_AT: u64 = PARTIALS_AT + MAX_PARTIALS * size_of::<f64>() as u64;

impl AdamW {
    /// Bytes that [`AdamW::new`] allocates, whatever the number of elements: 8 KiB, 16 for each
    /// range that decays, 24 for each vector that has a copy; at least one of both.
    pub fn device_bytes(decay: &[Range<usize>], vectors: &[VectorCopy]) -> u64 {
        let words = 2 * decay.len().max(1) + 3 * vectors.len().max(1);
        BOUNDARIES_AT + (words * size_of::<u64>()) as u64
    }

    /// `decay`: as [`AdamWStep::decay`] will be in every step. `vectors`: what has a copy in f32,
    /// where parameters are halves.
    ///
    /// Each of the two tables costs a block of 2048 elements one binary search while its loads are
    /// under way, and each element another one in the few blocks that a range begins or ends in, or
    /// a vector lies in.
    ///
    /// Errors: more than [`MAX_ELEMENTS`]; a part that does not begin where four elements do;
    /// ranges that do not ascend, overlap, or leave the buffer.
    pub fn new(
        driver: &mut dyn Driver,
        part: FlatPart,
        decay: &[Range<usize>],
        vectors: &[VectorCopy],
    ) -> Result<Self> {
        let device = driver.device();
        let FlatPart { first, elements, master, moments } = part;
        if !first.is_multiple_of(DRAWN_AT_ONCE) {
            return Err(Error::launch(
                "adamw",
                device,
                format!("a part from element {first} on; {DRAWN_AT_ONCE} share one random draw"),
                "begin every part of the flat buffer at a multiple of 4 elements",
            ));
        }
        if elements > MAX_ELEMENTS {
            return Err(Error::launch(
                "adamw",
                device,
                format!("{elements} elements; at most {MAX_ELEMENTS} can be counted"),
                "choose a smaller model, or shard its parameters",
            ));
        }
        let ends = |what, ranges: &mut dyn Iterator<Item = &Range<usize>>| {
            boundaries(device, what, ranges, &part)
        };
        let mut table = ends("decaying range", &mut decay.iter())?;
        let boundaries = counted(device, "decaying ranges", &table)?;
        // Where the kernel looks for what follows, if none decays, too.
        table.resize(table.len().max(2), 0);
        let of_vectors = ends("vector", &mut vectors.iter().map(|it| &it.from))?;
        counted(device, "vectors", &of_vectors)?;
        table.extend(of_vectors);
        table.extend(vectors.iter().map(|it| it.to as u64));
        let norm_partials = driver.kernel("adamw_norm_partials")?;
        let norm_total = driver.kernel("adamw_norm_total")?;
        let update = driver.kernel(&match master {
            Master::F32 => format!("adamw_update_{moments}"),
            Master::Split => format!("adamw_update_split_{moments}"),
        })?;
        let bytes = Self::device_bytes(decay, vectors);
        let memory = driver.allocate("optimizer scalars and scratch", bytes)?;
        let adamw = AdamW {
            device,
            part,
            decay: decay.to_vec(),
            boundaries,
            vectors: vectors.len() as i32,
            memory,
            norm_partials,
            norm_total,
            update,
        };
        let to = memory.address.offset(BOUNDARIES_AT);
        driver.to_device(StreamId::MAIN, bytemuck::cast_slice(&table), to)?;
        Ok(adamw)
    }

    pub fn part(&self) -> &FlatPart {
        &self.part
    }

    /// Gives its memory back, after all its work has run.
    pub fn release(self, driver: &mut dyn Driver) -> Result<()> {
        driver.release(self.memory)
    }

    /// grad_norm[0] = Euclidean norm of the gradients [N], the same bits on every machine.
    ///
    /// Errors: an address that is no multiple of 16; whatever the driver finds wrong.
    pub fn gradient_norm(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        gradients: DevicePointer,
        grad_norm: DevicePointer,
    ) -> Result<()> {
        self.check_alignment("gradients", gradients)?;
        let partials = self.memory.address.offset(PARTIALS_AT);
        let blocks = self.part.elements.div_ceil(NORM_TILE).clamp(1, MAX_PARTIALS) as u32;
        let arguments = Arguments::new().with(gradients).with(partials).with(self.part.elements);
        let launch = Launch::new(self.norm_partials, [blocks, 1, 1], [THREADS, 1, 1]).on(stream);
        driver.launch(&launch, &arguments)?;
        let arguments = Arguments::new().with(partials).with(grad_norm).with(blocks as i32);
        let launch = Launch::new(self.norm_total, [1, 1, 1], [THREADS, 1, 1]).on(stream);
        driver.launch(&launch, &arguments)
    }

    /// What [`AdamW::prepare`] copies to [`AdamW::scalars_address`].
    ///
    /// Errors: ranges other than those that the table was made for; a value that f32 cannot hold.
    pub fn scalars(&self, step: &AdamWStep) -> Result<Scalars> {
        if step.decay != self.decay {
            return Err(Error::launch(
                "adamw",
                self.device,
                format!(
                    "a step with {} decaying ranges, other than the {} of the table",
                    step.decay.len(),
                    self.decay.len()
                ),
                "make a new optimizer for other ranges",
            ));
        }
        let f32_of = |name: &str, value: f64| match value as f32 {
            rounded if rounded.is_finite() => Ok(rounded),
            _ => Err(Error::launch(
                "adamw",
                self.device,
                format!("{name} is {value:e}, which is no finite f32"),
                "count steps from 1, and choose finite [optimizer] values",
            )),
        };
        let eps = f32_of("eps", step.eps)?;
        if eps <= 0.0 {
            return Err(Error::launch(
                "adamw",
                self.device,
                format!("eps is {:e}, which is not above 0 in f32", step.eps),
                "choose optimizer.eps from 1e-38 on",
            ));
        }
        let weight_decay = f32_of("weight_decay", step.weight_decay)?;
        Ok(Scalars {
            lr: f32_of("lr", step.lr)?,
            beta1: f32_of("beta1", step.beta1)?,
            rest1: f32_of("1 - beta1", 1.0 - step.beta1)?,
            beta2: f32_of("beta2", step.beta2)?,
            rest2: f32_of("1 - beta2", 1.0 - step.beta2)?,
            inverse1: f32_of("1 / (1 - beta1^step)", 1.0 / step.correction1)?,
            inverse2: f32_of("1 / (1 - beta2^step)", 1.0 / step.correction2)?,
            eps,
            decoupled: if step.decoupled { weight_decay } else { 0.0 },
            coupled: if step.decoupled { 0.0 } else { weight_decay },
            clip: f32_of("clip", step.clip)?.max(0.0),
            alignment: 0.0,
            seed: step.seed,
            stream: ROUNDING_STREAM ^ step.update,
        })
    }

    /// Where the kernel reads its [`Scalars`].
    pub fn scalars_address(&self) -> DevicePointer {
        self.memory.address
    }

    /// Copies the step's scalars to the device. The copy returns when it is done, so the place for
    /// it is where the step's tokens are copied, before the step's work is enqueued.
    ///
    /// Errors: as [`AdamW::scalars`]; whatever the driver finds wrong.
    pub fn prepare(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        step: &AdamWStep,
    ) -> Result<()> {
        let scalars = self.scalars(step)?;
        driver.to_device(stream, bytemuck::bytes_of(&scalars), self.scalars_address())
    }

    /// The update with the scalars that were copied last; if the norm is not finite, nothing
    /// changes.
    ///
    /// Errors: an address that is no multiple of 16, or missing; whatever the driver finds wrong.
    pub fn launch(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        args: &AdamWBuffers,
    ) -> Result<()> {
        self.launch_range(driver, stream, 0..self.part.elements, args)
    }

    /// The same for some of the elements; `args` begin where they do.
    ///
    /// Errors: as [`AdamW::launch`].
    pub fn launch_range(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        range: Range<u64>,
        args: &AdamWBuffers,
    ) -> Result<()> {
        let elements = range.end - range.start;
        self.check_alignment("parameters", args.parameters)?;
        self.check_alignment("gradients", args.gradients)?;
        self.check_alignment("moment1", args.moment1)?;
        self.check_alignment("moment2", args.moment2)?;
        self.check_alignment("working copy", args.working.unwrap_or_default())?;
        self.check_alignment("copies of vectors", args.vectors.unwrap_or_default())?;
        if elements == 0 {
            return Ok(());
        }
        let boundaries = self.memory.address.offset(BOUNDARIES_AT);
        let arguments = Arguments::new()
            .with(self.scalars_address())
            .with(args.grad_norm)
            .with(boundaries)
            .with(self.boundaries)
            .with(args.gradients)
            .with(args.moment1)
            .with(args.moment2)
            .with(elements)
            .with(self.part.first + range.start);
        let arguments = match (self.part.master, args.working, args.vectors) {
            (Master::F32, working, _) => {
                arguments.with(args.parameters).with(working.unwrap_or_default())
            }
            (Master::Split, Some(working), Some(vectors)) => {
                let of_vectors = boundaries.offset(8 * self.boundaries.max(2) as u64);
                arguments
                    .with(working)
                    .with(args.parameters)
                    .with(vectors)
                    .with(of_vectors)
                    .with(of_vectors.offset(16 * self.vectors as u64))
                    .with(self.vectors)
            }
            (Master::Split, ..) => {
                return Err(Error::launch(
                    "adamw",
                    self.device,
                    "parameters in halves without their upper halves or without copies of vectors"
                        .to_string(),
                    "give both buffers",
                ));
            }
        };
        let blocks = elements.div_ceil(CHUNK) as u32;
        let launch = Launch::new(self.update, [blocks, 1, 1], [THREADS, 1, 1]).on(stream);
        driver.launch(&launch, &arguments)
    }

    /// [`AdamW::prepare`] and [`AdamW::launch`].
    pub fn update(
        &self,
        driver: &mut dyn Driver,
        stream: StreamId,
        step: &AdamWStep,
        args: &AdamWBuffers,
    ) -> Result<()> {
        self.prepare(driver, stream, step)?;
        self.launch(driver, stream, args)
    }

    fn check_alignment(&self, name: &str, address: DevicePointer) -> Result<()> {
        if address.0.is_multiple_of(ALIGNMENT) {
            return Ok(());
        }
        Err(Error::launch(
            "adamw",
            self.device,
            format!("the {name} begin at {:#x}; {ALIGNMENT} bytes are read at once", address.0),
            "begin every flat buffer at a multiple of 16 bytes",
        ))
    }
}

/// Where ranges of a part begin and end in the whole flat buffer, one after the other.
fn boundaries(
    device: &str,
    what: &str,
    ranges: &mut dyn Iterator<Item = &Range<usize>>,
    part: &FlatPart,
) -> Result<Vec<u64>> {
    let elements = part.elements;
    let mut boundaries = vec![];
    let mut end = 0;
    for range in ranges {
        if range.start < end || range.end < range.start || range.end as u64 > elements {
            return Err(Error::launch(
                "adamw",
                device,
                format!(
                    "the {what} {range:?} of {elements} elements, after one that ends at {end}"
                ),
                "give ranges that ascend, do not overlap and end within the buffer",
            ));
        }
        end = range.end;
        boundaries.extend([range.start, range.end].map(|it| part.first + it as u64));
    }
    Ok(boundaries)
}

/// Their number, as the kernel counts them.
fn counted(device: &str, what: &str, boundaries: &[u64]) -> Result<i32> {
    i32::try_from(boundaries.len()).map_err(|_| {
        let count = boundaries.len() / 2;
        Error::launch(
            "adamw",
            device,
            format!("{count} {what}; an i32 has to count their ends"),
            "join neighbouring ranges",
        )
    })
}
