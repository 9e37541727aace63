//! Choices that were timed: for a machine and a product, the kernel, splits and cluster that were
//! fastest.
//!
//! `isobath bench gemm --tune` makes such a table; tuned.toml beside this file is compiled in, and
//! comes before the model that chooses everything else. An entry counts for the machine of its name
//! and for the kernels that a [`Gemm`](super::Gemm) has. It was timed with what a step has after
//! the product; where only another epilogue of the same product was timed, its tile is taken over.
//! Nothing is taken over to other sizes.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::{Choice, Epilogue, Layout, Variant};
use crate::cuda::{Family, Properties};
use crate::error::{Error, Result};

/// What was timed on any number of machines; empty by default. Written as TOML, a line a product:
/// files one after the other are a table again.
#[derive(Serialize, Deserialize, Clone, PartialEq, Default, Debug)]
#[serde(deny_unknown_fields)]
pub struct Table {
    #[serde(default, rename = "machine")]
    pub machines: Vec<Machine>,
}

/// One run of the tuner.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// As the driver names it.
    pub name: String,
    pub multiprocessors: usize,
    /// The CUDA version of the driver.
    pub driver: String,
    /// Of the program that timed; empty: not recorded.
    pub commit: String,
    pub products: Vec<Timed>,
}

/// What was fastest for one product, and what the model would have taken.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Timed {
    pub family: Family,
    pub layout: Layout,
    pub epilogue: Epilogue,
    pub m: usize,
    /// Of the matrix product: gate and up of a SwiGLU together.
    pub n: usize,
    pub k: usize,
    pub best: Launched,
    pub model: Launched,
}

#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Launched {
    pub kernel: String,
    pub splits: usize,
    pub cluster: usize,
    /// Median, L2 cold.
    pub microseconds: f64,
}

/// The table that is compiled in.
pub fn built_in() -> &'static Table {
    static TABLE: LazyLock<Table> = LazyLock::new(|| {
        let table = include_str!("tuned.toml").parse();
        table.unwrap_or_else(|why| panic!("tuned.toml, which a test reads: {why}"))
    });
    &TABLE
}

impl Table {
    /// Errors: no such file; no table; an entry that [`Table::check`] refuses.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let checked = text.parse().and_then(|table: Table| table.check().map(|()| table));
        checked.map_err(|what| Error::Data {
            path: path.to_path_buf(),
            what,
            remedy: "give a file that `isobath bench gemm --tune --out` of this program wrote"
                .to_string(),
        })
    }

    /// Whether every entry can be launched: the kernel exists, and its machine has that many
    /// splits; and no product stands here twice. Errors: the first entry that cannot.
    pub fn check(&self) -> Result<(), String> {
        let mut seen = vec![];
        for machine in &self.machines {
            for timed in &machine.products {
                let named = |what: String| {
                    let Timed { layout, epilogue, m, n, k, .. } = timed;
                    let of = &machine.name;
                    Err(format!("{layout} {epilogue} M={m} N={n} K={k} of {of}: {what}"))
                };
                if timed.tiled().contains(&0) {
                    return named("it is empty".to_string());
                }
                for launched in [&timed.best, &timed.model] {
                    let &Launched { ref kernel, splits, cluster, microseconds } = launched;
                    let Some(variant) = timed.variant(kernel) else {
                        let what = format!("no {kernel} with this epilogue");
                        return named(format!("the family {} has {what}", timed.family));
                    };
                    let choice = Choice { variant, splits, cluster };
                    choice.check(timed.tiled(), machine.multiprocessors).or_else(named)?;
                    if !(microseconds.is_finite() && microseconds > 0.0) {
                        return named(format!("{kernel} took {microseconds} us"));
                    }
                }
                let key = (&machine.name, machine.multiprocessors, timed.family, timed.key());
                if seen.contains(&key) {
                    return named("it stands here twice".to_string());
                }
                seen.push(key);
            }
        }
        Ok(())
    }

    /// What was fastest on this machine among these kernels, by product. An entry that names
    /// another kernel, or more splits or larger clusters than there are, is passed over.
    pub(super) fn choices(
        &self,
        machine: &Properties,
        kernels: &[&'static Variant],
    ) -> HashMap<Key, Choice> {
        let multiprocessors = machine.multiprocessors as usize;
        let choice = |timed: &Timed| {
            let &Launched { ref kernel, splits, cluster, .. } = &timed.best;
            if timed.tiled().contains(&0) {
                return None;
            }
            let variant: &'static Variant = kernels.iter().find(|it| timed.is_of(it, kernel))?;
            let choice = Choice { variant, splits, cluster };
            choice.check(timed.tiled(), multiprocessors).ok().map(|()| (timed.key(), choice))
        };
        self.of(&machine.name, multiprocessors).filter_map(choice).collect()
    }

    /// What was timed on this machine for this product, if it was.
    pub fn find(
        &self,
        machine: &str,
        multiprocessors: usize,
        family: Family,
        key: Key,
    ) -> Option<&Timed> {
        self.of(machine, multiprocessors).find(|it| (it.family, it.key()) == (family, key))
    }

    fn of(&self, machine: &str, multiprocessors: usize) -> impl Iterator<Item = &Timed> {
        let is = move |it: &&Machine| {
            (it.name.as_str(), it.multiprocessors) == (machine, multiprocessors)
        };
        self.machines.iter().filter(is).flat_map(|it| &it.products)
    }
}

/// By what an entry is found.
pub type Key = (Layout, Epilogue, [usize; 3]);

impl Timed {
    pub fn sizes(&self) -> [usize; 3] {
        [self.m, self.n, self.k]
    }

    /// As the kernels take them.
    fn tiled(&self) -> [usize; 3] {
        [self.m, self.n / self.epilogue.halves_of_b(self.layout), self.k]
    }

    fn key(&self) -> Key {
        (self.layout, self.epilogue, self.sizes())
    }

    /// The choice that was fastest. `None`: no such kernel.
    pub fn choice(&self) -> Option<Choice> {
        let &Launched { ref kernel, splits, cluster, .. } = &self.best;
        self.variant(kernel).map(|variant| Choice { variant, splits, cluster })
    }

    fn variant(&self, kernel: &str) -> Option<&'static Variant> {
        self.family.variants().iter().find(|it| self.is_of(it, kernel))
    }

    /// Whether the kernel has this name and can do this.
    fn is_of(&self, variant: &Variant, kernel: &str) -> bool {
        let wanted = (self.layout, self.epilogue.compiled(), kernel);
        (variant.layout, variant.epilogue, variant.kernel) == wanted
    }
}

impl std::str::FromStr for Table {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |text: &str| toml::Value::String(text.to_string());
        for machine in &self.machines {
            writeln!(f, "[[machine]]")?;
            writeln!(f, "name = {}", quoted(&machine.name))?;
            writeln!(f, "multiprocessors = {}", machine.multiprocessors)?;
            writeln!(f, "driver = {}", quoted(&machine.driver))?;
            writeln!(f, "commit = {}", quoted(&machine.commit))?;
            writeln!(f, "products = [")?;
            for Timed { family, layout, epilogue, m, n, k, best, model } in &machine.products {
                writeln!(
                    f,
                    "  {{ family = \"{family}\", layout = \"{layout}\", epilogue = \"{epilogue}\", \
                     m = {m}, n = {n}, k = {k}, best = {best}, model = {model} }},"
                )?;
            }
            writeln!(f, "]")?;
        }
        Ok(())
    }
}

impl fmt::Display for Launched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Launched { kernel, splits, cluster, microseconds } = self;
        write!(
            f,
            "{{ kernel = \"{kernel}\", splits = {splits}, cluster = {cluster}, \
             microseconds = {microseconds:.2} }}"
        )
    }
}
