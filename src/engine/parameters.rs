//! A model's parameters on a device: the master weights, and the copy that matmuls read.
//!
//! Where activations are narrower than f32 the copy holds every parameter rounded to their type,
//! in the same order; else there is none and the master is read. Whoever writes the master calls
//! [`Parameters::round`]; the optimizer writes both.

use crate::backend::Backend;
use crate::error::Result;
use crate::model::parameters::{Parameter, ParameterTable};
use crate::tensor::{Kind, View};

use super::flat_view;

/// Both flat buffers, in table order.
#[derive(Clone, Copy, Debug)]
pub struct Parameters {
    pub master: View,
    pub working: Option<View>,
    element_bytes: ElementBytes,
}

/// Bytes of an element of each buffer.
#[derive(Clone, Copy, Debug)]
struct ElementBytes {
    master: usize,
    working: usize,
}

impl ElementBytes {
    fn new(element_bytes: impl Fn(Kind) -> usize) -> Self {
        let [master, working] = [Kind::Statistic, Kind::Activation].map(element_bytes);
        ElementBytes { master, working }
    }

    fn has_copy(self) -> bool {
        self.working != self.master
    }
}

impl Parameters {
    /// Bytes of the working copy.
    pub(super) fn working_bytes(
        table: &ParameterTable,
        element_bytes: impl Fn(Kind) -> usize,
    ) -> usize {
        let bytes = ElementBytes::new(element_bytes);
        if bytes.has_copy() { table.stored_elements() * bytes.working } else { 0 }
    }

    /// Bytes of both buffers.
    pub(super) fn bytes(table: &ParameterTable, element_bytes: impl Fn(Kind) -> usize) -> usize {
        let master = table.stored_elements() * element_bytes(Kind::Statistic);
        master + Self::working_bytes(table, element_bytes)
    }

    /// Zeros.
    pub(super) fn allocate(table: &ParameterTable, backend: &mut impl Backend) -> Result<Self> {
        let elements = table.stored_elements();
        let element_bytes = ElementBytes::new(|kind| backend.element_bytes(kind));
        let bytes = elements * element_bytes.master;
        let master = flat_view(backend.allocate("parameters", bytes)?, elements);
        let working = match element_bytes.has_copy() {
            false => None,
            true => {
                let bytes = elements * element_bytes.working;
                let buffer = backend.allocate("working copy of the parameters", bytes)?;
                Some(View { kind: Kind::Activation, ..flat_view(buffer, elements) })
            }
        };
        Ok(Parameters { master, working, element_bytes })
    }

    /// A model that is only read; `values` are the table's stored elements.
    pub fn upload(
        table: &ParameterTable,
        values: &[f32],
        backend: &mut impl Backend,
    ) -> Result<Self> {
        let parameters = Self::allocate(table, backend)?;
        parameters.write(values, backend)?;
        Ok(parameters)
    }

    /// Replaces every parameter.
    pub(super) fn write(&self, values: &[f32], backend: &mut impl Backend) -> Result<()> {
        backend.write(self.master, values)?;
        self.round(backend)
    }

    /// Brings the working copy up to date.
    pub(super) fn round(&self, backend: &mut impl Backend) -> Result<()> {
        self.working.map_or(Ok(()), |working| backend.round(self.master, working))
    }

    /// Where an op that takes operands of `kind` finds a parameter.
    pub(super) fn view(&self, parameter: &Parameter, kind: Kind) -> View {
        match self.working {
            Some(working) if kind == Kind::Activation => {
                parameter.view(working, self.element_bytes.working)
            }
            _ => parameter.view(self.master, self.element_bytes.master),
        }
    }
}
