//! Every matrix product of a training step: which kernel, which tile, what is refused.
//!
//! [`Gemm`] knows the kernels of one machine and type. [`Gemm::plan`] checks a product and chooses
//! among them; the plan is then launched as often as wanted, for the values that lie at its
//! addresses at that time. [`Gemm::new`] allocates at most [`TURNS_BYTES`] on the device, for the
//! launches of one stream; nothing else does. The families stand in files of their own, each with the
//! table of its kernels: sm80.rs, sm90.rs, f32.rs.

mod f32;
mod sm80;
mod sm90;

use std::ops::Range;

use super::{Allocation, Arguments, DevicePointer, Driver, KernelId, Launch, Properties, StreamId};
use crate::config::Dtype;
use crate::config::choice::choice;
use crate::error::{Error, Result};

choice! {
    /// How the operands of a product [M,N] lie in memory: row-major, rows without gaps.
    #[derive(Hash)]
    pub enum Layout {
        /// A [M,K] times B [N,K]^T: a layer forward.
        Nt = "nt",
        /// A [M,K] times B [K,N]: the gradient of its input.
        Nn = "nn",
        /// A [K,M]^T times B [K,N]: the gradient of its weight.
        Tn = "tn",
    }
}

choice! {
    /// A file of kernels.
    #[derive(Hash)]
    pub enum Family {
        /// bf16 with mma.sync, from compute capability 8.0 on; every layout.
        Sm80 = "sm80",
        /// bf16 with wgmma and TMA, compute capability 9.0; every layout.
        Sm90 = "sm90",
        /// fp32 without tensor cores; every layout.
        F32 = "f32",
    }
}

impl Family {
    /// Those that multiply this type on a machine, the fastest first.
    ///
    /// Errors: a GPU that is too old for all.
    pub fn of(device: &str, machine: &Properties, dtype: Dtype) -> Result<&'static [Family]> {
        let (major, minor) = machine.compute_capability;
        match (dtype, (major, minor)) {
            _ if major < 8 => Err(refusal(
                device,
                format!("{} has compute capability {major}.{minor}", machine.name),
                "choose a GPU of compute capability 8.0 or more, or --device simt".to_string(),
            )),
            (Dtype::F32, _) => Ok(&[Family::F32]),
            // wgmma exists on 9.0 only, not above.
            (Dtype::Bf16, (9, 0)) => Ok(&[Family::Sm90, Family::Sm80]),
            (Dtype::Bf16, _) => Ok(&[Family::Sm80]),
        }
    }

    /// `choice` alone, or all of [`Family::of`]. Errors: as there; one that is not among them.
    pub fn chosen(
        device: &str,
        machine: &Properties,
        dtype: Dtype,
        choice: Option<Family>,
    ) -> Result<Vec<Family>> {
        let families = Family::of(device, machine, dtype)?;
        match choice {
            None => Ok(families.to_vec()),
            Some(chosen) if families.contains(&chosen) => Ok(vec![chosen]),
            Some(chosen) => {
                let (major, minor) = machine.compute_capability;
                let names: Vec<&str> = families.iter().map(|family| family.name()).collect();
                Err(refusal(
                    device,
                    format!(
                        "{} (compute capability {major}.{minor}) has no {dtype} products of the \
                         family {chosen}",
                        machine.name
                    ),
                    format!("choose {}, or leave the choice open", names.join(" or ")),
                ))
            }
        }
    }

    /// Its kernels, for every layout that it has.
    pub fn variants(self) -> &'static [Variant] {
        match self {
            Family::Sm80 => &sm80::VARIANTS,
            Family::Sm90 => &sm90::VARIANTS,
            Family::F32 => &f32::VARIANTS,
        }
    }
}

/// What becomes of the product.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Output {
    /// out [M,N] =, in the operands' type. The addend [M,N] is added before the one rounding; it
    /// may be `out` itself. For NT and NN.
    Store { addend: Option<DevicePointer> },
    /// out [M,N] +=, in fp32. For TN.
    Accumulate,
}

/// One product; addresses and rows are multiples of 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Product {
    pub layout: Layout,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: DevicePointer,
    pub b: DevicePointer,
    pub out: DevicePointer,
    pub output: Output,
}

impl Product {
    fn name(&self) -> String {
        let Product { layout, m, n, k, .. } = self;
        match layout {
            Layout::Nt => format!("A [{m},{k}] times B [{n},{k}]^T"),
            Layout::Nn => format!("A [{m},{k}] times B [{k},{n}]"),
            Layout::Tn => format!("A [{k},{m}]^T times B [{k},{n}]"),
        }
    }
}

/// One kernel, and the tile of the result that a block of it makes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Variant {
    pub family: Family,
    pub layout: Layout,
    pub kernel: &'static str,
    /// Of the tile.
    pub rows: usize,
    pub columns: usize,
    /// Values of k in a stage, and stages of the ring, as the kernel is compiled.
    pub depth: usize,
    pub stages: usize,
    threads: u32,
    pub dynamic_shared_bytes: usize,
    speed: Speed,
}

/// What the choice of a tile reckons with. Estimates, as long as no GPU has timed them.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Speed {
    /// Of a machine full of these tiles, relative to the family's fastest.
    relative: f64,
    /// Values of k that could be multiplied while a tile is written.
    epilogue: f64,
    /// Whether the next tile is multiplied meanwhile.
    overlapped: bool,
    /// Values of k that could be multiplied while one split of a tile waits for another; `None`: K
    /// is not split.
    turn: Option<f64>,
}

impl Speed {
    const fn plain(relative: f64) -> Self {
        Speed { relative, epilogue: 0.0, overlapped: false, turn: None }
    }
}

/// A kernel, and how it is launched.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Choice {
    pub variant: &'static Variant,
    /// Blocks that share the K of a tile; 1: none.
    pub splits: usize,
}

impl Choice {
    pub fn whole(variant: &'static Variant) -> Self {
        Choice { variant, splits: 1 }
    }

    /// The time that the choice reckons with, where the machine's fastest tile does so many FLOPs in
    /// a second on all multiprocessors: an estimate as long as no GPU has timed what it is made of.
    pub fn seconds(&self, sizes: [usize; 3], multiprocessors: usize, flops_per_second: f64) -> f64 {
        let products = self.variant.time(sizes, self.splits, multiprocessors);
        2.0 * products * multiprocessors as f64 / flops_per_second
    }
}

impl Variant {
    /// Of a result [M,N].
    pub fn tiles(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.rows) * n.div_ceil(self.columns)
    }

    /// The most splits that a product [M,N,K] has on so many multiprocessors: one block for each,
    /// none of them empty.
    pub fn most_splits(&self, [m, n, k]: [usize; 3], multiprocessors: usize) -> usize {
        match self.speed.turn {
            Some(_) => (multiprocessors / self.tiles(m, n)).min(k.div_ceil(self.depth)).max(1),
            None => 1,
        }
    }

    /// The time of the multiprocessor with the most tiles, in products of the fastest tile.
    fn time(&self, [m, n, k]: [usize; 3], splits: usize, multiprocessors: usize) -> f64 {
        let Speed { relative, epilogue, overlapped, turn } = self.speed;
        let items = (self.tiles(m, n) * splits).div_ceil(multiprocessors) as f64;
        let steps = k.div_ceil(self.depth).div_ceil(splits);
        let written = if overlapped { 1.0 } else { items };
        let depth = items * (steps * self.depth) as f64
            + written * epilogue
            + (splits - 1) as f64 * turn.unwrap_or(0.0);
        depth * (self.rows * self.columns) as f64 / relative
    }
}

/// What makes a product [M,N,K] in the least time of the multiprocessor with the most tiles; `None`
/// where there are no variants. The first one of equals.
pub fn choose(
    variants: impl Iterator<Item = &'static Variant>,
    sizes: [usize; 3],
    multiprocessors: usize,
) -> Option<Choice> {
    let all = variants.flat_map(|variant| {
        (1..=variant.most_splits(sizes, multiprocessors))
            .map(move |splits| Choice { variant, splits })
    });
    let time = |it: &Choice| it.variant.time(sizes, it.splits, multiprocessors);
    all.min_by(|a, b| time(a).total_cmp(&time(b)))
}

/// The kernels for one type on one machine.
#[derive(Clone, Debug)]
pub struct Gemm {
    device: &'static str,
    multiprocessors: usize,
    dtype: Dtype,
    kernels: Vec<(&'static Variant, KernelId)>,
    /// Whose turn it is among the splits of each tile; zeros between launches.
    turns: Option<Allocation>,
}

/// A product that is ready to be launched.
#[derive(Clone)]
pub struct GemmPlan {
    pub variant: &'static Variant,
    pub splits: usize,
    launch: Launch,
    arguments: Arguments,
}

impl Gemm {
    /// `choice`: one family for all layouts that it has; `None`: for each layout the best one that
    /// this machine runs and this build holds.
    ///
    /// Errors: a family that this machine or this type does not have; a build without its kernels.
    pub fn new(driver: &mut dyn Driver, dtype: Dtype, choice: Option<Family>) -> Result<Self> {
        let device = driver.device();
        let properties = driver.properties();
        let multiprocessors = properties.multiprocessors as usize;
        let families = Family::chosen(device, properties, dtype, choice)?;
        let mut kernels = vec![];
        for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
            let of = |it: Family| it.variants().iter().filter(move |it| it.layout == layout);
            // The chosen one may lack the layout, which is found out when it is asked for.
            let candidates = families.iter().copied();
            let candidates = candidates.filter(|&it| choice.is_some() || of(it).next().is_some());
            // A build for fewer architectures lacks whole files: the next family is as right.
            let mut missing = None;
            for family in candidates {
                let found = of(family).map(|it| Ok((it, driver.kernel(it.kernel)?)));
                match found.collect::<Result<Vec<_>>>() {
                    Ok(found) => {
                        kernels.extend(found);
                        missing = None;
                        break;
                    }
                    Err(error) => missing = missing.or(Some(error)),
                }
            }
            if let Some(error) = missing {
                return Err(error);
            }
        }
        let splits = |(variant, _): &(&Variant, KernelId)| variant.speed.turn.is_some();
        let turns = match kernels.iter().any(splits) {
            false => None,
            true => {
                let turns = driver.allocate("turns of split products", TURNS_BYTES)?;
                driver.fill(StreamId::MAIN, turns.address, turns.bytes, 0)?;
                Some(turns)
            }
        };
        Ok(Gemm { device, multiprocessors, dtype, kernels, turns })
    }

    /// Gives its memory back, after all its work has run.
    pub fn release(self, driver: &mut dyn Driver) -> Result<()> {
        self.turns.map_or(Ok(()), |turns| driver.release(turns))
    }

    /// What [`Gemm::plan`] chooses from.
    pub fn variants(&self, layout: Layout) -> impl Iterator<Item = &'static Variant> + '_ {
        self.kernels.iter().map(|&(variant, _)| variant).filter(move |it| it.layout == layout)
    }

    /// What fills this machine best for a product [M,N,K]; see [`choose`].
    ///
    /// Errors: the chosen family does not have this layout.
    pub fn choose(&self, layout: Layout, sizes: [usize; 3]) -> Result<Choice> {
        let best = choose(self.variants(layout), sizes, self.multiprocessors);
        best.ok_or_else(|| {
            let families = [Family::Sm80, Family::Sm90, Family::F32].into_iter();
            let other = families.filter(|it| it.variants().iter().any(|it| it.layout == layout));
            let names: Vec<&str> = other.map(Family::name).collect();
            refusal(
                self.device,
                format!("the chosen family has no kernel for the layout {layout}"),
                format!("choose {}, or leave the choice of the family open", names.join(" or ")),
            )
        })
    }

    /// A plan with the variant that [`Gemm::choose`] finds.
    ///
    /// Errors: an empty product; rows that are no multiple of 16 bytes; sizes beyond an i32;
    /// addresses that are not aligned to 16 bytes; a result that overlaps what is read; an output
    /// that the layout does not have.
    pub fn plan(&self, driver: &mut dyn Driver, product: &Product) -> Result<GemmPlan> {
        let &Product { layout, m, n, k, .. } = product;
        if [m, n, k].contains(&0) {
            return Err(self.empty(product));
        }
        self.plan_with(driver, self.choose(layout, [m, n, k])?, product)
    }

    /// A plan with one of [`Gemm::variants`], and splits up to [`Variant::most_splits`]. Errors: as
    /// [`Gemm::plan`]; other splits.
    pub fn plan_with(
        &self,
        driver: &mut dyn Driver,
        choice: Choice,
        product: &Product,
    ) -> Result<GemmPlan> {
        let Choice { variant, splits } = choice;
        self.check(variant, product)?;
        let most = variant.most_splits([product.m, product.n, product.k], self.multiprocessors);
        if !(1..=most).contains(&splits) {
            return Err(refusal(
                self.device,
                format!("{splits} splits of {}", variant.kernel),
                format!("choose from 1 to {most} for this product and machine"),
            ));
        }
        let Some(&(_, kernel)) = self.kernels.iter().find(|(other, _)| *other == variant) else {
            return Err(refusal(
                self.device,
                format!("{} is not among the kernels chosen for this machine", variant.kernel),
                "give one of Gemm::variants".to_string(),
            ));
        };
        let tiles = variant.tiles(product.m, product.n);
        let (blocks, arguments) = match variant.family {
            Family::Sm80 | Family::F32 => (tiles, arguments(product)),
            Family::Sm90 => {
                let turns = self.turns.map_or(DevicePointer::NULL, |turns| turns.address);
                let arguments = sm90::arguments(driver, choice, product, turns)?;
                ((tiles * splits).min(self.multiprocessors), arguments)
            }
        };
        let launch = Launch::new(kernel, [blocks as u32, 1, 1], [variant.threads, 1, 1])
            .shared_bytes(variant.dynamic_shared_bytes as u32);
        Ok(GemmPlan { variant, splits, launch, arguments })
    }

    fn empty(&self, product: &Product) -> Error {
        refusal(
            self.device,
            format!("{} is empty", product.name()),
            "launch nothing for an empty product; an empty sum is zero".to_string(),
        )
    }

    fn check(&self, variant: &Variant, product: &Product) -> Result<()> {
        let &Product { layout, m, n, k, a, b, out, output } = product;
        let (shape_a, shape_b) = match layout {
            Layout::Nt => ([m, k], [n, k]),
            Layout::Nn => ([m, k], [k, n]),
            Layout::Tn => ([k, m], [k, n]),
        };
        let name = product.name();
        let refuse = |what: String, remedy: &str| -> Result<()> {
            Err(refusal(self.device, format!("{name}{what}"), remedy.to_string()))
        };
        if variant.layout != layout {
            return refuse(format!(": {} is for another layout", variant.kernel), "choose another");
        }
        let addend = match (layout, output) {
            (Layout::Nt | Layout::Nn, Output::Store { addend }) => addend,
            (Layout::Tn, Output::Accumulate) => None,
            (Layout::Nt | Layout::Nn, Output::Accumulate) => {
                return refuse(" cannot be accumulated".to_string(), "store it, with an addend");
            }
            (Layout::Tn, Output::Store { .. }) => {
                return refuse(
                    " cannot be stored".to_string(),
                    "accumulate it, in fp32, onto zeros if nothing else",
                );
            }
        };
        if [m, n, k].contains(&0) {
            return Err(self.empty(product));
        }
        let element = element_bytes(self.dtype);
        let multiple = ALIGNMENT / element;
        if [shape_a[1], shape_b[1], n].iter().any(|columns| columns % multiple != 0) {
            return refuse(
                format!(": rows of {} must be multiples of {multiple} values", self.dtype),
                "choose model.hidden, model.ffn and the head size as multiples of it, and pad the \
                 vocabulary to one",
            );
        }
        // The last tile's end, and the step to the tile behind the last, stay within an i32.
        let most = i32::MAX as usize - 256;
        if [m, n, k].iter().any(|&size| size > most)
            || variant.tiles(m, n) > most - self.multiprocessors
        {
            return refuse(
                ": an i32 has to count rows, columns and tiles".to_string(),
                "split the product",
            );
        }
        let result_element = match output {
            Output::Store { .. } => element,
            Output::Accumulate => size_of::<u32>(),
        };
        let result = Matrix { name: "the result", address: out, shape: [m, n] };
        let mut operands = vec![
            Matrix { name: "A", address: a, shape: shape_a },
            Matrix { name: "B", address: b, shape: shape_b },
        ];
        // What is added to where it lies is read before it is written, by the same thread.
        if let Some(address) = addend.filter(|&addend| addend != out) {
            operands.push(Matrix { name: "the addend", address, shape: [m, n] });
        }
        for matrix in operands.iter().chain([&result]) {
            let address = matrix.address.0;
            if !address.is_multiple_of(ALIGNMENT as u64) {
                return refuse(
                    format!(": the address {address:#x} of {} is no multiple of 16", matrix.name),
                    "begin every matrix at a multiple of 16 bytes in its buffer",
                );
            }
        }
        let written = result.bytes(result_element);
        for matrix in &operands {
            let read = matrix.bytes(element);
            if read.start < written.end && written.start < read.end {
                return refuse(
                    format!(": the result overlaps {}", matrix.name),
                    "write it to a place of its own; an addend may only be the result itself",
                );
            }
        }
        Ok(())
    }
}

/// What is read or written; rows without gaps.
struct Matrix {
    name: &'static str,
    address: DevicePointer,
    shape: [usize; 2],
}

impl Matrix {
    /// The addresses; wide enough for any shape that an i32 counts.
    fn bytes(&self, element: usize) -> Range<u128> {
        let start = u128::from(self.address.0);
        start
            ..start + self.shape.map(|size| size as u128).iter().product::<u128>() * element as u128
    }
}

impl GemmPlan {
    /// Errors: what the driver finds wrong.
    pub fn launch(&self, driver: &mut dyn Driver, stream: StreamId) -> Result<()> {
        driver.launch(&self.launch.on(stream), &self.arguments)
    }
}

/// A word for each of two consumers of each tile that is split; there are fewer such tiles than a
/// machine has multiprocessors.
pub const TURNS_BYTES: u64 = 2 * 4 * 1024;

/// Bytes that addresses and rows are multiples of.
const ALIGNMENT: usize = 16;

fn element_bytes(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 4,
        Dtype::Bf16 => 2,
    }
}

/// Those of gemm_sm80.cu and gemm_f32.cu.
fn arguments(product: &Product) -> Arguments {
    let &Product { m, n, k, a, b, out, output, .. } = product;
    let arguments = Arguments::new().with(a).with(b).with(out);
    let arguments = match output {
        Output::Store { addend } => arguments.with(addend.unwrap_or_default()),
        Output::Accumulate => arguments,
    };
    arguments.with(m as i32).with(n as i32).with(k as i32)
}

fn refusal(device: &str, what: String, remedy: String) -> Error {
    Error::Launch { kernel: "gemm".to_string(), device: device.to_string(), what, remedy }
}
