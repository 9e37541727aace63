//! Losses of a model that is only read.

use super::loss::{BoundLoss, LossProgram};
use super::{Rows, allocate_parameters, check_available, sum};
use crate::backend::Backend;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::parameters::ParameterTable;
use crate::tape::{External, Purpose};
use crate::tensor::{Kind, View};

/// A model that is only read: its parameters, and the loss of [B,S] tokens.
pub struct Evaluator<B> {
    backend: B,
    parameters: View,
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
        let program = LossProgram::new(config, table, [batch, sequence], 0.0, purpose, bytes)?;
        let flat_bytes = table.stored_elements() * bytes(Kind::Statistic);
        check_available(
            &[("parameters", flat_bytes), ("activations", program.arena_bytes())],
            "evaluate fewer windows at one time, or shorter ones",
            &backend,
        )?;
        let arena = backend.allocate("activations", program.arena_bytes())?;
        let parameters = allocate_parameters(table, parameters, &mut backend)?;
        let bytes = backend.element_bytes(Kind::Statistic);
        let program = program.bind(arena, |external, _| match external {
            External::Parameter(i) => table.entries()[i].view(parameters, bytes),
            other => unreachable!("an inference program asks for {other:?}"),
        });
        program.write_constants(config, &mut backend)?;
        Ok(Evaluator { backend, parameters, program, losses: vec![0.0; batch * sequence] })
    }

    /// The loss of each of the B*S tokens; 0 where nothing is predicted.
    pub fn losses(&mut self, rows: Rows) -> Result<&[f32]> {
        self.program.run(rows, 1.0, &mut self.losses, &mut self.backend)?;
        Ok(&self.losses)
    }

    /// Sum of the losses, and how many tokens were predicted.
    pub fn evaluate(&mut self, rows: Rows) -> Result<(f64, u64)> {
        let predicted = rows.predicted() as u64;
        Ok((sum(self.losses(rows)?), predicted))
    }

    pub fn device(&mut self) -> (&mut B, View) {
        (&mut self.backend, self.parameters)
    }
}
