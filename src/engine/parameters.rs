//! A model's parameters on a device: the master weights, and the copy that matmuls read.
//!
//! Where activations are narrower than f32 the copy holds every parameter rounded to their type,
//! in the same order; else there is none and the master is read. Or the master holds no more than
//! the copy lacks ([`Master::Split`]); then vectors, which are read in f32, have a copy in f32. The
//! optimizer writes all of them.

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
        parameters.write(table, values, backend)?;
        Ok(parameters)
    }

    /// Replaces every parameter.
    pub(super) fn write(
        &self,
        table: &ParameterTable,
        values: &[f32],
        backend: &mut impl Backend,
    ) -> Result<()> {
        let Some(upper) = self.halves() else {
            backend.write(self.master, values)?;
            return self.working.map_or(Ok(()), |working| backend.round(self.master, working));
        };
        backend.write_halves(upper, self.master, values)?;
        let vectors = table.entries().iter().filter(|parameter| parameter.vector.is_some());
        for vector in vectors {
            backend.write(self.view(vector, Kind::Statistic), &values[vector.range()])?;
        }
        Ok(())
    }

    /// Every parameter as it would be stored in f32.
    pub(super) fn read(&self, values: &mut [f32], backend: &mut impl Backend) -> Result<()> {
        match self.halves() {
            Some(upper) => backend.read_halves(upper, self.master, values),
            None => backend.read(self.master, values),
        }
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
