//! A model's parameters on a device: the master weights, and the copy that matmuls read.
//!
//! Where activations are narrower than f32 the copy holds every parameter rounded to their type, in
//! the same order; else there is none and the master is read. With [`Master::Split`] the master
//! holds only the lower 16 bits of each f32, of which the copy has the upper ones, and vectors,
//! which are read in f32, have a copy in f32. The optimizer writes all of them.

use std::ops::Range;

use crate::backend::Backend;
use crate::config::Master;
use crate::error::Result;
use crate::model::parameters::{Parameter, ParameterTable};
use crate::tensor::{Kind, View};

use super::flat_view;

/// The flat buffers, in table order.
#[derive(Clone, Copy, Debug)]
pub struct Parameters {
    /// f32, or lower halves.
    pub master: View,
    pub working: Option<View>,
    /// f32 copies of all vectors, if the master is lower halves: see [`Parameter::vector`].
    pub(super) vectors: Option<View>,
    element_bytes: ElementBytes,
}

/// Bytes of an element of each buffer.
#[derive(Clone, Copy, Debug)]
struct ElementBytes {
    f32: usize,
    working: usize,
}

impl ElementBytes {
    fn new(element_bytes: impl Fn(Kind) -> usize) -> Self {
        let [f32, working] = [Kind::Statistic, Kind::Activation].map(element_bytes);
        ElementBytes { f32, working }
    }

    fn has_copy(self) -> bool {
        self.working != self.f32
    }
}

/// Bytes of each of the buffers of [`Parameters`]; 0: there is none.
#[derive(Clone, Copy, Debug)]
pub(super) struct ParameterBytes {
    pub(super) master: usize,
    pub(super) working: usize,
    pub(super) vectors: usize,
}

impl ParameterBytes {
    pub(super) fn new(
        table: &ParameterTable,
        master: Master,
        element_bytes: impl Fn(Kind) -> usize,
    ) -> Self {
        let elements = table.stored_elements();
        let bytes = ElementBytes::new(&element_bytes);
        let working = if bytes.has_copy() { elements * bytes.working } else { 0 };
        let (master, vectors) = match master {
            Master::F32 => (elements * bytes.f32, 0),
            Master::Split => {
                (elements * element_bytes(Kind::LowerHalf), table.vector_elements() * bytes.f32)
            }
        };
        ParameterBytes { master, working, vectors }
    }
}

impl Parameters {
    /// Bytes of a model that is only read.
    pub(super) fn bytes(table: &ParameterTable, element_bytes: impl Fn(Kind) -> usize) -> usize {
        let bytes = ParameterBytes::new(table, Master::F32, element_bytes);
        bytes.master + bytes.working
    }

    /// Zeros. Halves are for bf16 activations only.
    pub(super) fn allocate(
        table: &ParameterTable,
        master: Master,
        backend: &mut impl Backend,
    ) -> Result<Self> {
        let elements = table.stored_elements();
        let element_bytes = ElementBytes::new(|kind| backend.element_bytes(kind));
        let bytes = ParameterBytes::new(table, master, |kind| backend.element_bytes(kind));
        let mut view = |label, bytes, elements, kind| -> Result<View> {
            Ok(View { kind, ..flat_view(backend.allocate(label, bytes)?, elements) })
        };
        let working = match element_bytes.has_copy() {
            false => None,
            true => {
                let label = "working copy of the parameters";
                Some(view(label, bytes.working, elements, Kind::Activation)?)
            }
        };
        let (label, kind) = match master {
            Master::F32 => ("parameters", Kind::Statistic),
            Master::Split => ("lower halves of the parameters", Kind::LowerHalf),
        };
        let vectors = match master {
            Master::F32 => None,
            Master::Split => {
                let elements = table.vector_elements();
                Some(view("f32 copies of vectors", bytes.vectors, elements, Kind::Statistic)?)
            }
        };
        let master = view(label, bytes.master, elements, kind)?;
        Ok(Parameters { master, working, vectors, element_bytes })
    }

    /// A model that is only read; `values` are the table's stored elements.
    pub fn upload(
        table: &ParameterTable,
        values: &[f32],
        backend: &mut impl Backend,
    ) -> Result<Self> {
        let parameters = Self::allocate(table, Master::F32, backend)?;
        parameters.write(table, 0, values, backend)?;
        Ok(parameters)
    }

    /// Replaces the parameters of `values`, which are stored elements from `first` on.
    pub(super) fn write(
        &self,
        table: &ParameterTable,
        first: usize,
        values: &[f32],
        backend: &mut impl Backend,
    ) -> Result<()> {
        let written = first..first + values.len();
        let master = Self::part(self.master, &written, backend);
        let Some(upper) = self.halves() else {
            backend.write(master, values)?;
            let working = self.working.map(|working| Self::part(working, &written, backend));
            return working.map_or(Ok(()), |working| backend.round(master, working));
        };
        backend.write_halves(Self::part(upper, &written, backend), master, values)?;
        let vectors = table.entries().iter().filter(|parameter| parameter.vector.is_some());
        for vector in vectors {
            let Range { start, end } = vector.range();
            let common = start.max(written.start)..end.min(written.end);
            if !common.is_empty() {
                let inside = common.start - start..common.end - start;
                let view = self.view(vector, Kind::Statistic);
                let view = Self::part(view, &inside, backend);
                backend.write(view, &values[common.start - first..common.end - first])?;
            }
        }
        Ok(())
    }

    /// Stored elements from `first` on, as they would be stored in f32.
    pub(super) fn read(
        &self,
        first: usize,
        values: &mut [f32],
        backend: &mut impl Backend,
    ) -> Result<()> {
        let range = first..first + values.len();
        let master = Self::part(self.master, &range, backend);
        match self.halves() {
            Some(upper) => backend.read_halves(Self::part(upper, &range, backend), master, values),
            None => backend.read(master, values),
        }
    }

    fn part(view: View, range: &Range<usize>, backend: &impl Backend) -> View {
        view.part(range, backend.element_bytes(view.kind))
    }

    /// The upper halves, if the master is lower ones.
    fn halves(&self) -> Option<View> {
        self.working.filter(|_| self.master.kind == Kind::LowerHalf)
    }

    /// Where an op that takes operands of `kind` finds a parameter.
    pub(super) fn view(&self, parameter: &Parameter, kind: Kind) -> View {
        let ElementBytes { f32, working } = self.element_bytes;
        match (self.working, self.vectors, parameter.vector) {
            (Some(copy), ..) if kind == Kind::Activation => parameter.view(copy, working),
            (_, Some(vectors), Some(at)) => {
                View { offset: vectors.offset + at * f32, shape: parameter.stored, ..vectors }
            }
            (_, Some(_), None) => unreachable!("{} is read in f32", parameter.name),
            (_, None, _) => parameter.view(self.master, f32),
        }
    }
}
