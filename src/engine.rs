//! A model on a device: its buffers and its programs.
//!
//! [`Plan`] says what will be needed, [`Trainer`] and [`Evaluator`] allocate exactly that, once,
//! and then only run. Neither knows where batches come from or where checkpoints go.

use std::borrow::Cow;
use std::ops::Range;

use crate::backend::{Backend, FlatBuffers};
use crate::config::{Config, ModelConfig, OptimizerConfig};
use crate::error::{Error, Result};
use crate::generate::{Decoder, DecoderPlan, Sampling, generate};
use crate::model::parameters::ParameterTable;
use crate::model::{LossTape, RotaryInputs, record_loss, rotary_table};
use crate::optim;
use crate::tape::{BoundProgram, External, MemoryLine, Program, Purpose, ValueId};
use crate::tensor::{BufferId, IGNORE_INDEX, Kind, Shape, View};

/// Tokens and what they are to predict: [B,S] each, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    pub tokens: &'a [i32],
    pub targets: &'a [i32],
}

impl Rows<'_> {
    /// Number of targets that are tokens.
    pub fn predicted(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE_INDEX).count()
    }
}

fn sum(losses: &[f32]) -> f64 {
    losses.iter().map(|&loss| loss as f64).sum()
}

/// What a training run allocates, known before anything is.
pub struct Plan {
    pub table: ParameterTable,
    training: LossProgram,
    evaluation: LossProgram,
    sampling: DecoderPlan,
    flat_bytes: usize,
}

/// Longest sample, prompt included, that training prints.
const SAMPLE_CONTEXT: usize = 256;

impl Plan {
    pub fn new(config: &Config, backend: &impl Backend) -> Result<Self> {
        let table = ParameterTable::new(&config.model);
        let (batch, sequence) = (config.train.micro_batch, config.data.sequence);
        let program = |purpose, z_loss| {
            LossProgram::new(&config.model, &table, [batch, sequence], z_loss, purpose, backend)
        };
        let training =
            program(Purpose::Training { recompute: config.train.recompute }, config.train.z_loss)?;
        // Held-out loss is plain cross-entropy.
        let evaluation = program(Purpose::Inference, 0.0)?;
        let context = config.model.max_sequence.min(SAMPLE_CONTEXT);
        let sampling = DecoderPlan::new(&config.model, &table, context, backend)?;
        let flat_bytes = table.stored_elements() * backend.element_bytes(Kind::Statistic);
        Ok(Plan { table, training, evaluation, sampling, flat_bytes })
    }

    /// Bytes of the one arena that training and evaluation share.
    pub fn arena_bytes(&self) -> usize {
        self.training.arena_bytes().max(self.evaluation.arena_bytes())
    }

    /// Bytes of one flat buffer: parameters, gradients, and each of the two moments.
    pub fn flat_bytes(&self) -> usize {
        self.flat_bytes
    }

    /// Bytes for the samples that training prints.
    pub fn sampling_bytes(&self) -> usize {
        self.sampling.bytes()
    }

    pub fn total_bytes(&self) -> usize {
        4 * self.flat_bytes + self.arena_bytes() + self.sampling_bytes()
    }

    /// What lies in the arena, the largest at the fullest step first.
    pub fn activations(&self) -> &[MemoryLine] {
        self.training.memory_lines()
    }

    /// A table for people.
    pub fn memory_table(&self) -> String {
        let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
        let mut table = format!("  {:<22} {:>10} {:>9}\n", "memory", "MiB", "tensors");
        for name in ["parameters", "gradients", "first moment", "second moment"] {
            table += &format!("  {name:<22} {:>10.1}\n", mib(self.flat_bytes));
        }
        let arena = self.arena_bytes();
        table += &format!(
            "  {:<22} {:>10.1}   of which, at the fullest step:\n",
            "activations",
            mib(arena)
        );
        for line in self.activations().iter().filter(|line| line.live > 0) {
            let (name, live) = (&line.name, mib(line.live_bytes));
            table += &format!("    {name:<20} {live:>10.1} {:>9}\n", line.live);
        }
        table += &format!("  {:<22} {:>10.1}\n", "sampling", mib(self.sampling_bytes()));
        table + &format!("  {:<22} {:>10.1}", "total", mib(self.total_bytes()))
    }

    /// Refuses what does not fit, with the numbers and the setting to change.
    pub fn check_fits(&self, backend: &impl Backend) -> Result<()> {
        let (needed, available) = (self.total_bytes() as u64, backend.available_bytes());
        if needed <= available {
            return Ok(());
        }
        Err(Error::Memory {
            device: backend.name().to_string(),
            needed,
            available,
            table: self.memory_table(),
            remedy: "lower train.micro_batch (and raise train.grad_accumulation by as much), \
                     set train.recompute=\"block\", or lower data.sequence"
                .to_string(),
        })
    }
}

/// The loss of [B,S] tokens, not yet bound to memory.
struct LossProgram {
    program: Program,
    inputs: LossInputs,
}

#[derive(Clone, Copy)]
struct LossInputs {
    tokens: ValueId,
    targets: ValueId,
    scale: ValueId,
    rotary: RotaryInputs,
    losses: ValueId,
    batch: usize,
    sequence: usize,
}

impl LossProgram {
    fn new(
        config: &ModelConfig,
        table: &ParameterTable,
        [batch, sequence]: [usize; 2],
        z_loss: f64,
        purpose: Purpose,
        backend: &impl Backend,
    ) -> Result<Self> {
        let LossTape { tape, tokens, targets, scale, rotary, losses } =
            record_loss(config, table, batch, sequence, z_loss)?;
        let inputs = LossInputs { tokens, targets, scale, rotary, losses, batch, sequence };
        let program = Program::new(tape, purpose, &[losses], |kind| backend.element_bytes(kind))?;
        Ok(LossProgram { program, inputs })
    }

    fn arena_bytes(&self) -> usize {
        self.program.arena_bytes()
    }

    fn memory_lines(&self) -> &[MemoryLine] {
        &self.program.memory().lines
    }

    fn bind(self, arena: BufferId, external: impl Fn(External) -> View) -> BoundLoss {
        BoundLoss { inputs: self.inputs, program: self.program.bind(arena, external) }
    }
}

struct BoundLoss {
    program: BoundProgram,
    inputs: LossInputs,
}

impl BoundLoss {
    /// Writes what does not change from batch to batch; again after another program used the arena.
    fn write_constants(&self, config: &ModelConfig, backend: &mut impl Backend) -> Result<()> {
        let LossInputs { rotary, batch, sequence, .. } = self.inputs;
        let positions: Vec<i32> = (0..batch).flat_map(|_| 0..sequence as i32).collect();
        backend.write(self.program.view(rotary.table), &rotary_table(config, sequence))?;
        backend.write_index(self.program.view(rotary.positions), &positions)
    }

    /// Runs one micro-batch and reads its losses.
    fn run(
        &self,
        rows: Rows,
        scale: f32,
        losses: &mut [f32],
        backend: &mut impl Backend,
    ) -> Result<()> {
        backend.write_index(self.program.view(self.inputs.tokens), rows.tokens)?;
        backend.write_index(self.program.view(self.inputs.targets), rows.targets)?;
        backend.write(self.program.view(self.inputs.scale), &[scale])?;
        self.program.run(backend)?;
        backend.read(self.program.view(self.inputs.losses), losses)
    }
}

fn flat_view(buffer: BufferId, elements: usize) -> View {
    View { buffer, offset: 0, kind: Kind::Statistic, shape: Shape::new(&[elements]) }
}

/// What one optimizer step saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean loss over the predicted tokens of all micro-batches.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    pub predicted: usize,
}

/// Everything a training step needs, allocated.
pub struct Trainer<B> {
    backend: B,
    config: ModelConfig,
    table: ParameterTable,
    flat: FlatBuffers,
    decay: Vec<Range<usize>>,
    training: BoundLoss,
    evaluation: BoundLoss,
    arena_holds: Use,
    decoder: Decoder,
    losses: Vec<f32>,
}

/// Whose constants lie in the arena.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Training,
    Evaluation,
}

impl<B: Backend> Trainer<B> {
    /// Allocates what `plan` says; parameters and moments are zero until they are set.
    pub fn new(plan: Plan, config: &Config, mut backend: B) -> Result<Self> {
        plan.check_fits(&backend)?;
        let arena = backend.allocate("activations", plan.arena_bytes())?;
        let Plan { table, training, evaluation, sampling, flat_bytes } = plan;
        let mut flat = |label| -> Result<View> {
            Ok(flat_view(backend.allocate(label, flat_bytes)?, table.stored_elements()))
        };
        let flat = FlatBuffers {
            parameters: flat("parameters")?,
            gradients: flat("gradients")?,
            moment1: flat("first moment")?,
            moment2: flat("second moment")?,
        };
        let bytes = backend.element_bytes(Kind::Statistic);
        let external = |external| match external {
            External::Parameter(i) => table.entries()[i].view(flat.parameters, bytes),
            External::ParameterGradient(i) => table.entries()[i].view(flat.gradients, bytes),
            External::Cache(_) => unreachable!("a loss has no cache"),
        };
        let training = training.bind(arena, external);
        let evaluation = evaluation.bind(arena, external);
        let losses = vec![0.0; config.train.micro_batch * config.data.sequence];
        let decay = optim::decay_ranges(&table);
        let config = config.model.clone();
        training.write_constants(&config, &mut backend)?;
        let decoder = sampling.allocate(flat.parameters, &mut backend)?;
        let arena_holds = Use::Training;
        Ok(Trainer {
            backend,
            config,
            table,
            flat,
            decay,
            training,
            evaluation,
            arena_holds,
            decoder,
            losses,
        })
    }

    pub fn table(&self) -> &ParameterTable {
        &self.table
    }

    /// Replaces parameters and both moments; each of the table's stored elements.
    pub fn set_state(&mut self, parameters: &[f32], m1: &[f32], m2: &[f32]) -> Result<()> {
        self.backend.write(self.flat.parameters, parameters)?;
        self.backend.write(self.flat.moment1, m1)?;
        self.backend.write(self.flat.moment2, m2)
    }

    pub fn set_parameters(&mut self, parameters: &[f32]) -> Result<()> {
        self.backend.write(self.flat.parameters, parameters)
    }

    /// Parameters and the two moments: borrowed where they lie in host memory, else copied out.
    pub fn state(&mut self) -> Result<[Cow<'_, [f32]>; 3]> {
        let views = [self.flat.parameters, self.flat.moment1, self.flat.moment2];
        if self.backend.host_values(views).is_none() {
            let mut read = |view: View| -> Result<Cow<'_, [f32]>> {
                let mut values = vec![0.0; view.shape.elements()];
                self.backend.read(view, &mut values)?;
                Ok(Cow::Owned(values))
            };
            return Ok([read(views[0])?, read(views[1])?, read(views[2])?]);
        }
        let values = self.backend.host_values(views).expect("it was there just now");
        Ok(values.map(Cow::Borrowed))
    }

    /// The losses [T] of the last micro-batch, on the device.
    pub fn losses_view(&self) -> View {
        self.training.program.view(self.training.inputs.losses)
    }

    /// The gradient of the last [`Trainer::accumulate`], in table order.
    pub fn gradients(&mut self) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.table.stored_elements()];
        self.backend.read(self.flat.gradients, &mut values)?;
        Ok(values)
    }

    /// Forward and backward over all micro-batches of a step. Every predicted token weighs the
    /// same, in whichever micro-batch it stands.
    pub fn accumulate<'a>(
        &mut self,
        micro_batches: impl Iterator<Item = Rows<'a>> + Clone,
    ) -> Result<StepOutcome> {
        self.use_arena_for(Use::Training)?;
        let predicted: usize = micro_batches.clone().map(|rows| rows.predicted()).sum();
        let scale = 1.0 / predicted.max(1) as f32;
        self.backend.zero(self.flat.gradients)?;
        let mut total = 0.0;
        for rows in micro_batches {
            self.training.run(rows, scale, &mut self.losses, &mut self.backend)?;
            total += sum(&self.losses);
        }
        let grad_norm = self.backend.gradient_norm(self.flat.gradients)?;
        Ok(StepOutcome { loss: total / predicted.max(1) as f64, grad_norm, predicted })
    }

    /// Clips and updates; `step` counts from 1.
    pub fn update(
        &mut self,
        optimizer: &OptimizerConfig,
        step: u64,
        lr: f64,
        grad_norm: f64,
    ) -> Result<()> {
        let scale = optim::clip_scale(optimizer.clip, grad_norm);
        let arguments = optim::adamw_step(optimizer, step, lr, scale, &self.decay);
        self.backend.adamw(&self.flat, &arguments)
    }

    /// Sum of the losses of at most B rows, and how many tokens were predicted.
    pub fn evaluate(&mut self, rows: Rows) -> Result<(f64, u64)> {
        self.use_arena_for(Use::Evaluation)?;
        self.evaluation.run(rows, 1.0, &mut self.losses, &mut self.backend)?;
        Ok((sum(&self.losses), rows.predicted() as u64))
    }

    fn use_arena_for(&mut self, next: Use) -> Result<()> {
        if self.arena_holds == next {
            return Ok(());
        }
        let program = match next {
            Use::Training => &self.training,
            Use::Evaluation => &self.evaluation,
        };
        program.write_constants(&self.config, &mut self.backend)?;
        self.arena_holds = next;
        Ok(())
    }

    /// Continues a prompt; see [`generate`].
    pub fn sample(
        &mut self,
        prompt: &[u32],
        count: usize,
        sampling: &Sampling,
        end: Option<u32>,
        show: impl FnMut(u32) -> Result<bool>,
    ) -> Result<Vec<u32>> {
        generate(&mut self.decoder, prompt, count, sampling, end, &mut self.backend, show)
    }

    /// The device and the flat parameter buffer on it.
    pub fn device(&mut self) -> (&mut B, View) {
        (&mut self.backend, self.flat.parameters)
    }
}

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
        let program = LossProgram::new(config, table, [batch, sequence], 0.0, purpose, &backend)?;
        let arena = backend.allocate("activations", program.arena_bytes())?;
        let parameters = allocate_parameters(table, parameters, &mut backend)?;
        let bytes = backend.element_bytes(Kind::Statistic);
        let program = program.bind(arena, |external| match external {
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

/// A flat buffer holding `parameters`.
pub fn allocate_parameters<B: Backend>(
    table: &ParameterTable,
    parameters: &[f32],
    backend: &mut B,
) -> Result<View> {
    let elements = table.stored_elements();
    let bytes = elements * backend.element_bytes(Kind::Statistic);
    let view = flat_view(backend.allocate("parameters", bytes)?, elements);
    backend.write(view, parameters)?;
    Ok(view)
}
