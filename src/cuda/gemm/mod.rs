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
mod product;
mod sm80;
mod sm90;
pub mod tuned;

use std::collections::HashMap;
use std::fmt;

use choice::Speed;
pub use choice::{Choice, Rates, Variant, choose};
use product::Matrix;
pub use product::{Epilogue, Layout, Output, Product, Rotation};

use super::{
    Allocation, Arguments, DevicePointer, Driver, Family, KernelId, Launch, Properties, StreamId,
};
use crate::config::Dtype;
use crate::error::{Error, Result};

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

    /// What was fastest for a product [M,N,K] and its epilogue, if that was timed on this
    /// machine; else what was fastest with another epilogue, on the same tile; else
    /// [`Gemm::by_cost_model`].
    ///
    /// Errors: the chosen family does not have this layout, or not with this output.
    pub fn choose(&self, layout: Layout, output: Output, sizes: [usize; 3]) -> Result<Choice> {
        let mut epilogues = [output.epilogue()].into_iter().chain(Epilogue::ALL.iter().copied());
        match epilogues.find_map(|epilogue| self.timed(layout, output, sizes, epilogue)) {
            Some(timed) => Ok(timed),
            None => self.by_cost_model(layout, output, sizes),
        }
    }

    /// Whether the very product was timed, with its epilogue.
    pub fn is_tuned(&self, layout: Layout, output: Output, sizes: [usize; 3]) -> bool {
        self.timed(layout, output, sizes, output.epilogue()).is_some()
    }

    /// What was fastest where the product was timed with this epilogue.
    fn timed(
        &self,
        layout: Layout,
        output: Output,
        [m, n, k]: [usize; 3],
        epilogue: Epilogue,
    ) -> Option<Choice> {
        let timed = self.timed.get(&(
            layout,
            epilogue,
            [m, n * output.epilogue().halves_of_b(layout), k],
        ))?;
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

    fn refused(&self, product: &Product, what: impl fmt::Display, remedy: &str) -> Error {
        Error::launch("gemm", self.device, format!("{}{what}", product.name()), remedy)
    }

    fn empty(&self, product: &Product) -> Error {
        let remedy = "launch nothing for an empty product; an empty sum is zero";
        self.refused(product, " is empty", remedy)
    }

    fn check(&self, variant: &Variant, product: &Product) -> Result<()> {
        self.check_output(variant, product)?;
        self.check_sizes(variant, product)?;
        self.check_memory(product)
    }

    /// Whether the layout has this output, and the kernel, too.
    fn check_output(&self, variant: &Variant, product: &Product) -> Result<()> {
        let &Product { layout, output, .. } = product;
        let refused = |what: String, remedy: &str| Err(self.refused(product, what, remedy));
        if variant.layout != layout {
            let what = format!(": {} is for another layout", variant.kernel);
            return refused(what, "choose another");
        }
        match (layout, output) {
            (Layout::Nt | Layout::Nn, Output::Store { .. })
            | (Layout::Tn, Output::Accumulate)
            | (Layout::Nt, Output::Rotate(_) | Output::SwiGlu { .. })
            | (Layout::Nn, Output::SwiGluGradient { .. }) => {}
            (Layout::Nt | Layout::Nn, Output::Accumulate) => {
                return refused(" cannot be accumulated".to_string(), "store it, with an addend");
            }
            (Layout::Tn, Output::Store { .. }) => {
                return refused(
                    " cannot be stored".to_string(),
                    "accumulate it, in fp32, onto zeros if nothing else",
                );
            }
            (Layout::Nn | Layout::Tn, Output::Rotate(_) | Output::SwiGlu { .. })
            | (Layout::Nt | Layout::Tn, Output::SwiGluGradient { .. }) => {
                return refused(
                    format!(" cannot end with {}", output.name()),
                    "rotary embedding and SwiGLU follow an NT product, SwiGLU's gradient an NN one",
                );
            }
        }
        if !variant.makes(&output) {
            return refused(
                format!(": {} cannot end with {}", variant.kernel, output.name()),
                "choose one of Gemm::variants_for",
            );
        }
        if let Output::Rotate(Rotation { columns, head_dim, .. }) = output
            && (columns > product.n || !columns.is_multiple_of(head_dim))
        {
            return refused(
                format!(": {columns} of its columns are no heads of {head_dim}"),
                "rotate whole heads of q and k",
            );
        }
        Ok(())
    }

    fn check_sizes(&self, variant: &Variant, product: &Product) -> Result<()> {
        let &Product { m, n, k, .. } = product;
        if [m, n, k].contains(&0) {
            return Err(self.empty(product));
        }
        let multiple = ALIGNMENT / self.dtype.bytes();
        let [[_, columns_of_a], [_, columns_of_b]] = product.factors();
        if [columns_of_a, columns_of_b, n].iter().any(|columns| columns % multiple != 0) {
            return Err(self.refused(
                product,
                format!(": rows of {} must be multiples of {multiple} values", self.dtype),
                "choose model.hidden, model.ffn and the head size as multiples of it, and pad the \
                 vocabulary to one",
            ));
        }
        // The last tile's end, and the step to the tile after the last, stay within an i32.
        let most = i32::MAX as usize - 256;
        if [m, n, k].iter().any(|&size| size > most)
            || variant.tiles(m, n) > most - self.multiprocessors
        {
            let what = ": an i32 has to count rows, columns and tiles";
            return Err(self.refused(product, what, "split the product"));
        }
        Ok(())
    }

    /// Whether every matrix is aligned, and no result overlaps what is read or another result.
    fn check_memory(&self, product: &Product) -> Result<()> {
        let (operands, results) = product.matrices(self.dtype.bytes());
        for matrix in operands.iter().chain(&results) {
            let address = matrix.address.0;
            if !address.is_multiple_of(ALIGNMENT as u64) {
                return Err(self.refused(
                    product,
                    format!(": the address {address:#x} of {} is no multiple of 16", matrix.name),
                    "begin every matrix at a multiple of 16 bytes in its buffer",
                ));
            }
        }
        let overlap = |one: &Matrix, other: &Matrix| {
            let (one, other) = (one.bytes(), other.bytes());
            one.start < other.end && other.start < one.end
        };
        for (index, result) in results.iter().enumerate() {
            let others = operands.iter().chain(&results[index + 1..]);
            if let Some(other) = others.into_iter().find(|other| overlap(result, other)) {
                return Err(self.refused(
                    product,
                    format!(": {} overlaps {}", result.name, other.name),
                    "write it to a place of its own; an addend may only be the result itself",
                ));
            }
        }
        Ok(())
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
