//! The program that computes the loss of [B,S] tokens, and in training its gradient.

use super::Rows;
use super::batches::{MicroBatch, check_no_documents, stage_starts};
use super::replay::Replay;
use crate::backend::{Backend, Footprint};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::parameters::ParameterTable;
use crate::model::{LossTape, RotaryInputs, record_loss, rotary_table};
use crate::tape::{BoundProgram, External, MemoryLine, Program, Purpose, ValueId};
use crate::tensor::{BufferId, Kind, View};

/// The loss of [B,S] tokens, not yet bound to memory.
pub(super) struct LossProgram {
    program: Program,
    inputs: LossInputs,
}

#[derive(Clone, Copy)]
pub(super) struct LossInputs {
    tokens: ValueId,
    targets: ValueId,
    scale: ValueId,
    rotary: RotaryInputs,
    document_starts: Option<ValueId>,
    losses: ValueId,
    batch: usize,
    sequence: usize,
    /// V: token ids that the model has.
    classes: usize,
}

impl LossProgram {
    pub(super) fn new(
        config: &ModelConfig,
        table: &ParameterTable,
        [batch, sequence]: [usize; 2],
        documents: bool,
        z_loss: f64,
        purpose: Purpose,
        device: &impl Footprint,
    ) -> Result<Self> {
        let logits = device.held_logits();
        let LossTape { tape, tokens, targets, scale, rotary, document_starts, losses } =
            record_loss(config, table, batch, sequence, documents, z_loss, logits)?;
        let inputs = LossInputs {
            tokens,
            targets,
            scale,
            rotary,
            document_starts,
            losses,
            batch,
            sequence,
            classes: config.vocab,
        };
        let kept = [losses];
        let element_bytes = |kind| device.element_bytes(kind);
        let fuses = device.fuses_swiglu_backward();
        let program = Program::fused(tape, purpose, &kept, element_bytes, fuses)?;
        Ok(LossProgram { program, inputs })
    }

    pub(super) fn program(&self) -> &Program {
        &self.program
    }

    pub(super) fn arena_bytes(&self) -> usize {
        self.program.arena_bytes()
    }

    pub(super) fn memory_lines(&self) -> &[MemoryLine] {
        &self.program.memory().lines
    }

    pub(super) fn bind(
        self,
        arena: BufferId,
        external: impl Fn(External, Kind) -> View,
    ) -> BoundLoss {
        let program = self.program.bind(arena, external);
        BoundLoss { inputs: self.inputs, program, replay: Replay::default() }
    }
}

/// A [`LossProgram`] with an address for every operand.
pub(super) struct BoundLoss {
    program: BoundProgram,
    inputs: LossInputs,
    /// Of [`BoundLoss::run`].
    replay: Replay,
}

impl BoundLoss {
    /// Where the losses [T] of the last run lie.
    pub(super) fn losses(&self) -> View {
        self.program.view(self.inputs.losses)
    }

    /// Makes everything ready that the backend needs to run it.
    pub(super) fn prepare(&self, backend: &mut impl Backend) -> Result<()> {
        self.program.prepare(backend)
    }

    /// Writes what does not change from batch to batch; again after another program used the arena.
    pub(super) fn write_constants(
        &self,
        config: &ModelConfig,
        backend: &mut impl Backend,
    ) -> Result<()> {
        let LossInputs { rotary, batch, sequence, .. } = self.inputs;
        let positions: Vec<i32> = (0..batch).flat_map(|_| 0..sequence as i32).collect();
        backend.write(self.program.view(rotary.table), &rotary_table(config, sequence))?;
        backend.write_index(self.program.view(rotary.positions), &positions)
    }

    /// Brings one micro-batch of a step into place; its token ids have been checked.
    pub(super) fn load(&self, micro_batch: &MicroBatch, backend: &mut impl Backend) -> Result<()> {
        backend.copy(micro_batch.tokens, self.program.view(self.inputs.tokens))?;
        backend.copy(micro_batch.targets, self.program.view(self.inputs.targets))?;
        if let (Some(from), Some(to)) = (micro_batch.document_starts, self.inputs.document_starts) {
            backend.copy(from, self.program.view(to))?;
        }
        Ok(())
    }

    /// Forward and, in training, backward over the micro-batch that was loaded last.
    pub(super) fn compute(&self, backend: &mut impl Backend) -> Result<()> {
        self.program.run(backend)
    }

    /// Puts the losses of the last run to those of the step.
    pub(super) fn store(&self, micro_batch: &MicroBatch, backend: &mut impl Backend) -> Result<()> {
        backend.copy(self.losses(), micro_batch.losses)
    }

    /// What the gradients of the next runs are scaled by.
    pub(super) fn set_scale(&self, scale: f32, backend: &mut impl Backend) -> Result<()> {
        backend.write(self.program.view(self.inputs.scale), &[scale])
    }

    /// Refuses rows that the model cannot read.
    pub(super) fn check(&self, rows: &Rows) -> Result<()> {
        rows.check_documents(self.inputs.sequence)?;
        rows.check(self.inputs.classes)
    }

    /// Records what [`BoundLoss::run`] replays.
    pub(super) fn record(&mut self, backend: &mut impl Backend) -> Result<()> {
        let BoundLoss { program, replay, .. } = self;
        replay.record(backend, |backend| program.run(backend))
    }

    /// Runs one micro-batch and reads its losses; there is no gradient to scale.
    pub(super) fn run(
        &mut self,
        rows: Rows,
        losses: &mut [f32],
        backend: &mut impl Backend,
    ) -> Result<()> {
        self.check(&rows)?;
        backend.write_index(self.program.view(self.inputs.tokens), rows.tokens)?;
        backend.write_index(self.program.view(self.inputs.targets), rows.targets)?;
        match self.inputs.document_starts {
            None => check_no_documents(&rows)?,
            Some(to) => {
                let mut starts = Vec::with_capacity(rows.tokens.len());
                stage_starts(&rows, &mut starts);
                backend.write_index(self.program.view(to), &starts)?;
            }
        }
        let BoundLoss { program, replay, .. } = self;
        replay.run(backend, |backend| program.run(backend))?;
        backend.read(self.losses(), losses)
    }
}
