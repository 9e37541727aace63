//! Losses of a model that is only read.

use super::loss::{BoundLoss, LossProgram};
use super::{Parameters, Rows, check_available, sum};
use crate::backend::Backend;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::parameters::ParameterTable;
use crate::tape::{External, Purpose};
use crate::tensor::View;

/// A model that is only read: its parameters, and the loss of [B,S] tokens.
pub struct Evaluator<B> {
    backend: B,
    parameters: Parameters,
    program: BoundLoss,
    losses: Vec<f32>,
}

impl<B: Backend> Evaluator<B> {
    /// `parameters`: the table's stored elements.
    pub fn new(
        config: &ModelConfig,
        table: &ParameterTable,
        parameters: &[f32],
        [batch, sequence]: [usize; 2],
        mut backend: B,
    ) -> Result<Self> {
        let purpose = Purpose::Inference;
        let bytes = |kind| backend.element_bytes(kind);
        let size = [batch, sequence];
        let program = LossProgram::new(config, table, size, false, 0.0, purpose, &backend)?;
        let flat_bytes = Parameters::bytes(table, bytes);
        check_available(
            &[("parameters", flat_bytes), ("activations", program.arena_bytes())],
            "evaluate fewer windows at one time, or shorter ones",
            &backend,
        )?;
        let arena = backend.allocate("activations", program.arena_bytes())?;
        let parameters = Parameters::upload(table, parameters, &mut backend)?;
        let program = program.bind(arena, |external, kind| match external {
            External::Parameter(i) => parameters.view(&table.entries()[i], kind),
            other => unreachable!("an inference program asks for {other:?}"),
        });
        program.prepare(&mut backend)?;
        program.write_constants(config, &mut backend)?;
        Ok(Evaluator { backend, parameters, program, losses: vec![0.0; batch * sequence] })
    }

    /// The loss of each of the B*S tokens; 0 where nothing is predicted.
    pub fn losses(&mut self, rows: Rows) -> Result<&[f32]> {
        self.program.run(rows, &mut self.losses, &mut self.backend)?;
        Ok(&self.losses)
    }

    /// Sum of the losses, and how many tokens were predicted.
    pub fn evaluate(&mut self, rows: Rows) -> Result<(f64, u64)> {
        let predicted = rows.predicted() as u64;
        Ok((sum(self.losses(rows)?), predicted))
    }

    /// The device and the flat master parameters on it.
    pub fn device(&mut self) -> (&mut B, View) {
        (&mut self.backend, self.parameters.master)
    }
}
