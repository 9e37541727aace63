//! Every matrix product of a training step: which kernel, which tile, what is refused.
//!
//! [`Gemm`] knows the kernels of one machine and type. [`Gemm::plan`] checks a product and chooses
//! among them; the plan is then launched as often as wanted, for the values that lie at its
//! addresses at that time. [`Gemm::new`] allocates at most [`SEMAPHORE_BYTES`] on the device, for
//! the launches of one stream; nothing else does. The families stand in files of their own, each
//! with the table of its kernels: sm80.rs, sm90.rs, f32.rs; choice.rs chooses among them, tuned.rs
//! before it.

mod choice;
mod f32;
mod sm80;
mod sm90;
pub mod tuned;

use std::collections::HashMap;
use std::ops::Range;

use choice::Speed;
pub use choice::{Choice, Rates, Variant, choose};

use super::{
    Allocation, Arguments, DevicePointer, Driver, Family, KernelId, Launch, Properties, StreamId,
};
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

impl Family {
    /// Its kernels, for every layout that it has.
    pub fn variants(self) -> &'static [Variant] {
        match self {
            Family::Sm80 => &sm80::VARIANTS,
            Family::Sm90 => &sm90::VARIANTS,
            Family::F32 => &f32::VARIANTS,
        }
    }

    /// Its kernels for a product.
    pub fn variants_for(
        self,
        layout: Layout,
        output: Output,
    ) -> impl Iterator<Item = &'static Variant> {
        self.variants().iter().filter(move |it| it.layout == layout && it.makes(&output))
    }

    /// Whether one of its kernels does this in one launch.
    pub fn fuses(self, layout: Layout, output: Output) -> bool {
        self.variants_for(layout, output).next().is_some()
    }
}

/// What becomes of the product.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Output {
    /// out [M,N] =, in the operands' type. The addend [M,N] is added before the one rounding; it
    /// may be `out` itself. For NT and NN.
    Store { addend: Option<DevicePointer> },
    /// out [M,N] +=, in fp32. For TN. On compute capability 9.0 the L2 cache adds, for which
    /// subnormal numbers (below 2^-126) are zeros, sums included.
    Accumulate,
    /// out [M,N] =, the first of its columns being heads that are rotated before the one rounding.
    /// For NT.
    Rotate(Rotation),
    /// out [M,2,N] = A times each half of B [2,N,K], gate and up; product [M,N] = silu(gate) up.
    /// For NT.
    SwiGlu { product: DevicePointer },
    /// out [M,2,N] = the gradients of gate_up [M,2,N], where the product's own [M,N] is A B. For
    /// NN.
    SwiGluGradient { gate_up: DevicePointer },
}

/// Rotary embedding of the columns of a fused projection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Rotation {
    /// [P,D] in fp32: D/2 cosines of a position, then D/2 sines
    pub table: DevicePointer,
    /// [M], each below P
    pub positions: DevicePointer,
    /// Columns of the heads that are rotated, which come first.
    pub columns: usize,
    /// D
    pub head_dim: usize,
}

/// What a kernel does after its product; [`Output`] says with which operands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Epilogue {
    /// Stores or accumulates, as its layout says.
    Plain,
    Rotary,
    SwiGlu,
}

choice! {
    /// What a training step has after a product in the product's kernel. What was timed counts
    /// for it.
    #[derive(Hash)]
    pub enum Ending {
        /// Stored or accumulated, as its layout says.
        Plain = "plain",
        /// Another matrix is added.
        Addend = "addend",
        Rotary = "rotary",
        /// Of NN, its gradient.
        SwiGlu = "swiglu",
    }
}

impl Ending {
    /// Of the kernels that do it.
    pub fn epilogue(self) -> Epilogue {
        match self {
            Ending::Plain | Ending::Addend => Epilogue::Plain,
            Ending::Rotary => Epilogue::Rotary,
            Ending::SwiGlu => Epilogue::SwiGlu,
        }
    }

    /// Factors [N,K] that B is made of.
    pub fn halves_of_b(self, layout: Layout) -> usize {
        if (layout, self) == (Layout::Nt, Ending::SwiGlu) { 2 } else { 1 }
    }
}

impl Output {
    /// With nothing but the product.
    pub fn plain(layout: Layout) -> Self {
        match layout {
            Layout::Nt | Layout::Nn => Output::Store { addend: None },
            Layout::Tn => Output::Accumulate,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Output::Store { .. } => "a store",
            Output::Accumulate => "an addition",
            Output::Rotate(_) => "rotary embedding",
            Output::SwiGlu { .. } => "SwiGLU",
            Output::SwiGluGradient { .. } => "the gradient of SwiGLU",
        }
    }

    pub fn ending(&self) -> Ending {
        match self {
            Output::Store { addend: Some(_) } => Ending::Addend,
            Output::Store { addend: None } | Output::Accumulate => Ending::Plain,
            Output::Rotate(_) => Ending::Rotary,
            Output::SwiGlu { .. } | Output::SwiGluGradient { .. } => Ending::SwiGlu,
        }
    }

    fn epilogue(&self) -> Epilogue {
        self.ending().epilogue()
    }

    /// Factors [N,K] that B is made of.
    fn halves_of_b(&self) -> usize {
        if matches!(self, Output::SwiGlu { .. }) { 2 } else { 1 }
    }

    /// Matrices [M,N] that lie side by side in the result.
    fn parts(&self) -> usize {
        match self {
            Output::Store { .. } | Output::Accumulate | Output::Rotate(_) => 1,
            Output::SwiGlu { .. } | Output::SwiGluGradient { .. } => 2,
        }
    }
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
        let Product { layout, m, n, k, output, .. } = self;
        match layout {
            Layout::Nt => format!("A [{m},{k}] times B [{},{k}]^T", n * output.halves_of_b()),
            Layout::Nn => format!("A [{m},{k}] times B [{k},{n}]"),
            Layout::Tn => format!("A [{k},{m}]^T times B [{k},{n}]"),
        }
    }
}

/// The kernels for one type on one machine.
#[derive(Clone, Debug)]
pub struct Gemm {
    device: &'static str,
    multiprocessors: usize,
    dtype: Dtype,
    kernels: Vec<(&'static Variant, KernelId)>,
    /// Whose turn it is among the splits of each tile; zeros between launches.
    semaphores: Option<Allocation>,
    /// Before the model: what was fastest on this machine.
    timed: HashMap<tuned::Key, Choice>,
}

/// A product that is ready to be launched.
#[derive(Clone)]
pub struct GemmPlan {
    pub choice: Choice,
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
        let semaphores = match kernels.iter().any(splits) {
            false => None,
            true => {
                let semaphores =
                    driver.allocate("semaphores of split products", SEMAPHORE_BYTES)?;
                driver.fill(StreamId::MAIN, semaphores.address, semaphores.bytes, 0)?;
                Some(semaphores)
            }
        };
        let gemm =
            Gemm { device, multiprocessors, dtype, kernels, semaphores, timed: HashMap::new() };
        Ok(gemm.with_table(driver.properties(), tuned::built_in()))
    }

    /// With the choices of this table instead of those that are compiled in. `machine`: the one
    /// that this was made for.
    pub fn with_table(self, machine: &Properties, table: &tuned::Table) -> Self {
        let variants: Vec<&Variant> = self.kernels.iter().map(|&(variant, _)| variant).collect();
        Gemm { timed: table.choices(machine, &variants), ..self }
    }

    /// Gives its memory back, after all its work has run.
    pub fn release(self, driver: &mut dyn Driver) -> Result<()> {
        self.semaphores.map_or(Ok(()), |semaphores| driver.release(semaphores))
    }

    /// What [`Gemm::plan`] chooses from for a product that is stored or accumulated.
    pub fn variants(&self, layout: Layout) -> impl Iterator<Item = &'static Variant> + '_ {
        self.of_layout(layout).filter(|it| it.epilogue == Epilogue::Plain)
    }

    /// The same for any output.
    pub fn variants_for(
        &self,
        layout: Layout,
        output: Output,
    ) -> impl Iterator<Item = &'static Variant> + '_ {
        self.of_layout(layout).filter(move |it| it.makes(&output))
    }

    fn of_layout(&self, layout: Layout) -> impl Iterator<Item = &'static Variant> + '_ {
        self.kernels.iter().map(|&(variant, _)| variant).filter(move |it| it.layout == layout)
    }

    /// Whether there is a kernel that does this in one launch.
    pub fn fuses(&self, layout: Layout, output: Output) -> bool {
        self.variants_for(layout, output).next().is_some()
    }

    /// What was fastest for a product [M,N,K] and what stands after it, if that was timed on this
    /// machine; else what was fastest with something else after it, on the same tile; else
    /// [`Gemm::by_cost_model`].
    ///
    /// Errors: the chosen family does not have this layout, or not with this output.
    pub fn choose(&self, layout: Layout, output: Output, sizes: [usize; 3]) -> Result<Choice> {
        let mut endings = [output.ending()].into_iter().chain(Ending::ALL.iter().copied());
        match endings.find_map(|ending| self.timed(layout, output, sizes, ending)) {
            Some(timed) => Ok(timed),
            None => self.by_cost_model(layout, output, sizes),
        }
    }

    /// Whether the very product was timed, with what stands after it.
    pub fn is_tuned(&self, layout: Layout, output: Output, sizes: [usize; 3]) -> bool {
        self.timed(layout, output, sizes, output.ending()).is_some()
    }

    /// What was fastest where the product was timed with this after it.
    fn timed(
        &self,
        layout: Layout,
        output: Output,
        [m, n, k]: [usize; 3],
        ending: Ending,
    ) -> Option<Choice> {
        let timed = self.timed.get(&(layout, ending, [m, n * output.halves_of_b(), k]))?;
        let mut variants = self.variants_for(layout, output);
        let variant = variants.find(|it| it.tile() == timed.variant.tile())?;
        Some(Choice { variant, ..*timed })
    }

    /// What the cost model expects to fill this machine best; see [`choose`].
    ///
    /// Errors: as [`Gemm::choose`].
    pub fn by_cost_model(
        &self,
        layout: Layout,
        output: Output,
        sizes: [usize; 3],
    ) -> Result<Choice> {
        let best = choose(self.variants_for(layout, output), sizes, self.multiprocessors);
        best.ok_or_else(|| {
            if self.of_layout(layout).next().is_some() {
                return Error::launch(
                    "gemm",
                    self.device,
                    format!("no kernel of the layout {layout} ends with {}", output.name()),
                    "ask Gemm::fuses first, and launch the parts one after the other",
                );
            }
            let families = [Family::Sm80, Family::Sm90, Family::F32].into_iter();
            let other = families.filter(|it| it.variants().iter().any(|it| it.layout == layout));
            let names: Vec<&str> = other.map(Family::name).collect();
            Error::launch(
                "gemm",
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
        let &Product { layout, m, n, k, output, .. } = product;
        if [m, n, k].contains(&0) {
            return Err(self.empty(product));
        }
        self.plan_with(driver, self.choose(layout, output, [m, n, k])?, product)
    }

    /// A plan with one of [`Gemm::variants_for`], and splits up to [`Variant::most_splits`].
    /// Errors: as [`Gemm::plan`]; splits or clusters that there are not.
    pub fn plan_with(
        &self,
        driver: &mut dyn Driver,
        choice: Choice,
        product: &Product,
    ) -> Result<GemmPlan> {
        let Choice { variant, splits, cluster } = choice;
        self.check(variant, product)?;
        let sizes = [product.m, product.n, product.k];
        choice.check(sizes, self.multiprocessors).map_err(|what| {
            Error::launch(
                "gemm",
                self.device,
                what,
                "choose splits and clusters that Choice::check allows",
            )
        })?;
        let Some(&(_, kernel)) = self.kernels.iter().find(|(other, _)| *other == variant) else {
            return Err(Error::launch(
                "gemm",
                self.device,
                format!("{} is not among the kernels chosen for this machine", variant.kernel),
                "give one of Gemm::variants_for",
            ));
        };
        let tiles = variant.tiles_of_clusters(product.m, product.n, cluster);
        let (blocks, arguments) = match variant.family {
            Family::Sm80 | Family::F32 => (tiles, arguments(product)),
            Family::Sm90 => {
                let semaphores =
                    self.semaphores.map_or(DevicePointer::NULL, |semaphores| semaphores.address);
                let arguments = sm90::arguments(driver, choice, product, semaphores)?;
                // Whole clusters.
                let most = self.multiprocessors / cluster * cluster;
                ((tiles * splits).min(most), arguments)
            }
        };
        let launch = Launch::new(kernel, [blocks as u32, 1, 1], [variant.threads, 1, 1])
            .shared_bytes(variant.dynamic_shared_bytes as u32)
            .cluster([cluster as u32, 1, 1]);
        Ok(GemmPlan { choice, launch, arguments })
    }

    fn empty(&self, product: &Product) -> Error {
        Error::launch(
            "gemm",
            self.device,
            format!("{} is empty", product.name()),
            "launch nothing for an empty product; an empty sum is zero",
        )
    }

    fn check(&self, variant: &Variant, product: &Product) -> Result<()> {
        let &Product { layout, m, n, k, a, b, out, output } = product;
        let (shape_a, shape_b) = match layout {
            Layout::Nt => ([m, k], [n * output.halves_of_b(), k]),
            Layout::Nn => ([m, k], [k, n]),
            Layout::Tn => ([k, m], [k, n]),
        };
        let name = product.name();
        let refuse = |what: String, remedy: &str| -> Result<()> {
            Err(Error::launch("gemm", self.device, format!("{name}{what}"), remedy))
        };
        if variant.layout != layout {
            return refuse(format!(": {} is for another layout", variant.kernel), "choose another");
        }
        match (layout, output) {
            (Layout::Nt | Layout::Nn, Output::Store { .. })
            | (Layout::Tn, Output::Accumulate)
            | (Layout::Nt, Output::Rotate(_) | Output::SwiGlu { .. })
            | (Layout::Nn, Output::SwiGluGradient { .. }) => {}
            (Layout::Nt | Layout::Nn, Output::Accumulate) => {
                return refuse(" cannot be accumulated".to_string(), "store it, with an addend");
            }
            (Layout::Tn, Output::Store { .. }) => {
                return refuse(
                    " cannot be stored".to_string(),
                    "accumulate it, in fp32, onto zeros if nothing else",
                );
            }
            (Layout::Nn | Layout::Tn, Output::Rotate(_) | Output::SwiGlu { .. })
            | (Layout::Nt | Layout::Tn, Output::SwiGluGradient { .. }) => {
                return refuse(
                    format!(" cannot end with {}", output.name()),
                    "rotary embedding and SwiGLU follow an NT product, SwiGLU's gradient an NN one",
                );
            }
        }
        if !variant.makes(&output) {
            return refuse(
                format!(": {} cannot end with {}", variant.kernel, output.name()),
                "choose one of Gemm::variants_for",
            );
        }
        if [m, n, k].contains(&0) {
            return Err(self.empty(product));
        }
        let element = self.dtype.bytes();
        let multiple = ALIGNMENT / element;
        if [shape_a[1], shape_b[1], n].iter().any(|columns| columns % multiple != 0) {
            return refuse(
                format!(": rows of {} must be multiples of {multiple} values", self.dtype),
                "choose model.hidden, model.ffn and the head size as multiples of it, and pad the \
                 vocabulary to one",
            );
        }
        // The last tile's end, and the step to the tile after the last, stay within an i32.
        let most = i32::MAX as usize - 256;
        if [m, n, k].iter().any(|&size| size > most)
            || variant.tiles(m, n) > most - self.multiprocessors
        {
            return refuse(
                ": an i32 has to count rows, columns and tiles".to_string(),
                "split the product",
            );
        }
        let columns = n * output.parts();
        let matrix = |name, address, shape| Matrix { name, address, shape, element };
        let mut results = vec![matrix("the result", out, [m, columns])];
        let mut operands = vec![matrix("A", a, shape_a), matrix("B", b, shape_b)];
        match output {
            Output::Accumulate => results[0].element = size_of::<f32>(),
            // What is added to where it lies is read before it is written.
            Output::Store { addend } => {
                let apart = addend.filter(|&addend| addend != out);
                operands.extend(apart.map(|address| matrix("the addend", address, [m, n])));
            }
            Output::Rotate(rotation) => {
                let Rotation { table, positions, columns, head_dim } = rotation;
                if columns > n || !columns.is_multiple_of(head_dim) {
                    return refuse(
                        format!(": {columns} of its columns are no heads of {head_dim}"),
                        "rotate whole heads of q and k",
                    );
                }
                // How many positions there are is the caller's knowledge.
                operands.push(Matrix { element: 4, ..matrix("the table", table, [1, head_dim]) });
                operands.push(Matrix { element: 4, ..matrix("the positions", positions, [m, 1]) });
            }
            Output::SwiGlu { product } => results.push(matrix("the product", product, [m, n])),
            Output::SwiGluGradient { gate_up } => {
                operands.push(matrix("gate and up", gate_up, [m, columns]));
            }
        }
        for matrix in operands.iter().chain(&results) {
            let address = matrix.address.0;
            if !address.is_multiple_of(ALIGNMENT as u64) {
                return refuse(
                    format!(": the address {address:#x} of {} is no multiple of 16", matrix.name),
                    "begin every matrix at a multiple of 16 bytes in its buffer",
                );
            }
        }
        let overlap = |one: &Matrix, other: &Matrix| {
            let (one, other) = (one.bytes(), other.bytes());
            one.start < other.end && other.start < one.end
        };
        for (index, result) in results.iter().enumerate() {
            let others = operands.iter().chain(&results[index + 1..]);
            if let Some(other) = others.into_iter().find(|other| overlap(result, other)) {
                return refuse(
                    format!(": {} overlaps {}", result.name, other.name),
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
    /// Bytes of one.
    element: usize,
}

impl Matrix {
    /// The addresses; wide enough for any shape that an i32 counts.
    fn bytes(&self) -> Range<u128> {
        let start = u128::from(self.address.0);
        let elements: u128 = self.shape.map(|size| size as u128).iter().product();
        start..start + elements * self.element as u128
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
pub const SEMAPHORE_BYTES: u64 = 2 * 4 * 1024;

/// Bytes that addresses and rows are multiples of.
const ALIGNMENT: usize = 16;

/// Those of gemm_sm80.cu and gemm_f32.cu, which fuse nothing but an addend.
fn arguments(product: &Product) -> Arguments {
    let &Product { m, n, k, a, b, out, output, .. } = product;
    let arguments = Arguments::new().with(a).with(b).with(out);
    let arguments = match output {
        Output::Store { addend } => arguments.with(addend.unwrap_or_default()),
        _ => arguments,
    };
    arguments.with(m as i32).with(n as i32).with(k as i32)
}
