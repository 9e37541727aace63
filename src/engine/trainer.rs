//! Training steps: forward and backward over micro-batches, the update, evaluation in between.

use std::ffi::CStr;

use super::batches::{Batches, BatchesRead};
use super::decoder::Decoder;
use super::loss::BoundLoss;
use super::plan::Plan;
use super::replay::Replay;
use super::{Parameters, Rows, flat_view, sum};
use crate::backend::{Backend, FlatBuffers};
use crate::config::{Config, ModelConfig, OptimizerConfig};
use crate::error::{Error, Result};
use crate::flat::FlatBuffer;
use crate::model::parameters::ParameterTable;
use crate::optim::{self, LayerSampling, UpdateGroup, UpdateTime};
use crate::tape::External;
use crate::tensor::{Kind, View};

/// What one optimizer step saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean loss over the predicted tokens of all micro-batches.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    pub predicted: usize,
}

/// A step whose gradient is enqueued; what it saw comes with [`Trainer::outcome`].
#[must_use]
#[derive(Debug)]
pub struct StepUnderWay {
    read: BatchesRead,
    predicted: usize,
}

/// Everything a training step needs, allocated.
pub struct Trainer<B> {
    backend: B,
    config: ModelConfig,
    seed: u64,
    table: ParameterTable,
    parameters: Parameters,
    flat: FlatBuffers,
    /// The whole first; after it, with `sampling`, what is updated on its own.
    groups: Vec<UpdateGroup>,
    sampling: Option<LayerSampling>,
    training: BoundLoss,
    evaluation: BoundLoss,
    arena_holds: Use,
    decoder: Option<Decoder>,
    batches: Batches,
    /// What is computed for a micro-batch, by its place.
    computing: [[Replay; 2]; 2],
    losses: Vec<f32>,
}

/// What of a micro-batch's place in its step decides what is computed for it.
#[derive(Clone, Copy)]
struct MicroBatchPlace {
    first: bool,
    last: bool,
}

impl MicroBatchPlace {
    fn new(i: usize, count: usize) -> Self {
        MicroBatchPlace { first: i == 0, last: i + 1 == count }
    }

    fn replay(self, all: &mut [[Replay; 2]; 2]) -> &mut Replay {
        &mut all[usize::from(self.first)][usize::from(self.last)]
    }

    /// `sampled`: whether layers are, so that the norm is that of what does not rest.
    fn compute<B: Backend>(
        self,
        training: &BoundLoss,
        flat: &FlatBuffers,
        sampled: bool,
        backend: &mut B,
    ) -> Result<()> {
        if self.first {
            backend.zero(flat.gradients)?;
        }
        training.compute(backend)?;
        if self.last && !sampled {
            backend.gradient_norm(flat)?;
        }
        Ok(())
    }
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
        let Plan { table, training, evaluation, sampling, flat_bytes, moment_bytes, .. } = plan;
        let bytes = backend.element_bytes(Kind::Statistic);
        let parameters = Parameters::allocate(&table, config.optimizer.master, &mut backend)?;
        let (kind, elements) = (optim::moment_kind(&config.optimizer), table.stored_elements());
        let mut moment = |label, label_on_host| -> Result<View> {
            let buffer = match config.optimizer.offload {
                true => backend.allocate_host(label_on_host, moment_bytes)?,
                false => backend.allocate(label, moment_bytes)?,
            };
            Ok(View { kind, ..flat_view(buffer, elements) })
        };
        let moment1 = moment("first moment", "first moment in host memory")?;
        let moment2 = moment("second moment", "second moment in host memory")?;
        let flat = FlatBuffers {
            parameters: parameters.master,
            working: parameters.working,
            vectors: parameters.vectors,
            gradients: flat_view(backend.allocate("gradients", flat_bytes)?, elements),
            moment1,
            moment2,
            grad_norm: flat_view(backend.allocate("gradient norm", bytes)?, 1),
            first: 0,
        };
        let groups = UpdateGroup::all(&table, &config.optimizer);
        for group in &groups {
            let part = flat.part(&group.range, |kind| backend.element_bytes(kind));
            backend.prepare_optimizer(&part, &group.decay, &group.vectors)?;
        }
        let layer_sampling = layer_sampling(config);
        let external = |external, kind| match external {
            External::Parameter(i) => parameters.view(&table.entries()[i], kind),
            External::ParameterGradient(i) => table.entries()[i].view(flat.gradients, bytes),
            External::Cache(_) => unreachable!("a loss has no cache"),
        };
        let training = training.bind(arena, external);
        let evaluation = evaluation.bind(arena, external);
        let tokens = config.train.micro_batch * config.data.sequence;
        let (count, documents) = (config.train.grad_accumulation, config.data.packs_documents());
        let batches = Batches::allocate(count, tokens, documents, &mut backend)?;
        let losses = vec![0.0; tokens];
        training.prepare(&mut backend)?;
        evaluation.prepare(&mut backend)?;
        let (config, seed) = (config.model.clone(), config.seed);
        training.write_constants(&config, &mut backend)?;
        let decoder = sampling.map(|it| it.allocate(&parameters, &mut backend)).transpose()?;
        let arena_holds = Use::Training;
        let mut trainer = Trainer {
            backend,
            config,
            seed,
            table,
            parameters,
            flat,
            groups,
            sampling: layer_sampling,
            training,
            evaluation,
            arena_holds,
            decoder,
            batches,
            computing: Default::default(),
            losses,
        };
        trainer.record(count)?;
        Ok(trainer)
    }

    /// Records what steps of `count` micro-batches and evaluations replay, so that all memory that
    /// it takes is taken before the first step.
    fn record(&mut self, count: usize) -> Result<()> {
        let sampled = self.sampling.is_some();
        for i in 0..count {
            let place = MicroBatchPlace::new(i, count);
            let (training, flat) = (&self.training, &self.flat);
            let compute = |backend: &mut B| place.compute(training, flat, sampled, backend);
            place.replay(&mut self.computing).record(&mut self.backend, compute)?;
        }
        self.evaluation.record(&mut self.backend)
    }

    pub fn table(&self) -> &ParameterTable {
        &self.table
    }

    pub fn set_parameters(&mut self, parameters: &[f32]) -> Result<()> {
        self.write_flat(FlatBuffer::Parameters, 0, parameters)
    }

    /// Parameters and the two moments, copied out whole: for comparisons. A checkpoint reads them
    /// piece by piece.
    pub fn state(&mut self) -> Result<[Vec<f32>; 3]> {
        let mut state = [(); 3].map(|()| vec![0.0; self.table.stored_elements()]);
        for (buffer, values) in FlatBuffer::ALL.into_iter().zip(&mut state) {
            self.read_flat(buffer, 0, values)?;
        }
        Ok(state)
    }

    /// Replaces elements of a buffer, from `first` on.
    pub fn write_flat(&mut self, buffer: FlatBuffer, first: usize, values: &[f32]) -> Result<()> {
        match self.moment(buffer) {
            None => self.parameters.write(&self.table, first, values, &mut self.backend),
            Some(moment) => {
                let part = self.part(moment, first, values.len());
                self.backend.write(part, values)
            }
        }
    }

    /// Copies elements of a buffer out, from `first` on.
    pub fn read_flat(
        &mut self,
        buffer: FlatBuffer,
        first: usize,
        values: &mut [f32],
    ) -> Result<()> {
        match self.moment(buffer) {
            None => self.parameters.read(first, values, &mut self.backend),
            Some(moment) => {
                let part = self.part(moment, first, values.len());
                self.backend.read(part, values)
            }
        }
    }

    fn moment(&self, buffer: FlatBuffer) -> Option<View> {
        match buffer {
            FlatBuffer::Parameters => None,
            FlatBuffer::Moment1 => Some(self.flat.moment1),
            FlatBuffer::Moment2 => Some(self.flat.moment2),
        }
    }

    fn part(&self, view: View, first: usize, elements: usize) -> View {
        view.part(&(first..first + elements), self.backend.element_bytes(view.kind))
    }

    /// The losses [T] of the last micro-batch, on the device.
    pub fn losses_view(&self) -> View {
        self.training.losses()
    }

    /// The gradient of the last [`Trainer::accumulate`], in table order.
    pub fn gradients(&mut self) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.table.stored_elements()];
        self.backend.read(self.flat.gradients, &mut values)?;
        Ok(values)
    }

    /// Goes to update `update`, counted from 1: the one that [`Trainer::accumulate`] and
    /// [`Trainer::update`] are for. Where layers are sampled, this decides which of them are
    /// frozen; else it does nothing.
    pub fn begin(&mut self, update: u64) {
        if let Some(sampling) = &mut self.sampling {
            sampling.go_to(update);
        }
    }

    /// Forward and backward over all micro-batches of a step. Every predicted token weighs the
    /// same, in whichever micro-batch it stands. Frozen layers have no gradient.
    ///
    /// What is computed for a micro-batch is replayed: forward and backward; before the first, the
    /// fill of gradients; after the last, their norm. So there are three recordings, however many
    /// micro-batches a step has, made with the trainer (and a fourth when a step has a single one
    /// and others have more). Outside stay the copies of a micro-batch into place and of its losses
    /// out of it, whose addresses differ, and with sampled layers, of which others are frozen in
    /// other steps, the fill of frozen layers' gradients and the norm.
    ///
    /// Errors: no micro-batch, or one that does not fit.
    pub fn accumulate<'a>(
        &mut self,
        micro_batches: impl Iterator<Item = Rows<'a>> + Clone,
    ) -> Result<StepOutcome> {
        let step = self.enqueue(micro_batches)?;
        self.outcome(step)
    }

    /// [`Trainer::accumulate`] without waiting for it. The update, and one more step, may be
    /// enqueued before [`Trainer::outcome`] is asked.
    pub fn enqueue<'a>(
        &mut self,
        micro_batches: impl Iterator<Item = Rows<'a>> + Clone,
    ) -> Result<StepUnderWay> {
        self.use_arena_for(Use::Training)?;
        let mut predicted = 0;
        for rows in micro_batches.clone() {
            self.training.check(&rows)?;
            predicted += rows.predicted();
        }
        let scale = 1.0 / predicted.max(1) as f32;
        self.training.set_scale(scale, &mut self.backend)?;
        let micro_batches = self.batches.write(micro_batches, &mut self.backend)?;
        let (training, flat, sampled) = (&self.training, &self.flat, self.sampling.is_some());
        for (i, micro_batch) in micro_batches.iter().enumerate() {
            let place = MicroBatchPlace::new(i, micro_batches.len());
            let replay = place.replay(&mut self.computing);
            self.backend.range(c"micro-batch", |backend| {
                training.load(micro_batch, backend)?;
                replay.run(backend, |backend| place.compute(training, flat, sampled, backend))?;
                training.store(micro_batch, backend)
            })?;
        }
        if let Some(sampling) = &self.sampling {
            let frozen = |layer: &usize| sampling.count(*layer).is_none();
            for layer in (1..=self.table.layers()).filter(frozen) {
                let range = self.table.block_range(layer);
                let part = self.flat.part(&range, |kind| self.backend.element_bytes(kind));
                self.backend.zero(part.gradients)?;
            }
            self.backend.gradient_norm(&self.flat)?;
        }
        let read = self.batches.begin_read(self.flat.grad_norm, &mut self.backend)?;
        Ok(StepUnderWay { read, predicted })
    }

    /// Waits until the step's gradient is there. Steps in the order in which they were enqueued.
    pub fn outcome(&mut self, step: StepUnderWay) -> Result<StepOutcome> {
        let StepUnderWay { read, predicted } = step;
        let (total, grad_norm) = self.batches.finish_read(read, &mut self.backend)?;
        Ok(StepOutcome { loss: total / predicted.max(1) as f64, grad_norm, predicted })
    }

    /// Waits for all that is enqueued.
    pub fn wait(&mut self) -> Result<()> {
        self.backend.read(self.flat.grad_norm, &mut [0.0])
    }

    /// Whether a step is to be enqueued before the previous one is waited for.
    pub fn steps_ahead(&self) -> bool {
        self.backend.steps_ahead()
    }

    /// Clips and updates; `update` counts updates from 1. A gradient that is not finite changes
    /// nothing. Enqueued, like [`Trainer::enqueue`]. On a GPU this is one kernel after the copy of
    /// its scalars: a recording would save nothing. Where moments lie in host memory, it is one for
    /// each chunk of them, between its copies.
    ///
    /// Errors: where layers are sampled, another step than that of [`Trainer::begin`].
    pub fn update(&mut self, optimizer: &OptimizerConfig, update: u64, lr: f64) -> Result<()> {
        let time = UpdateTime { seed: self.seed, update, count: update };
        let Some(sampling) = &self.sampling else {
            let arguments = optim::adamw_step(optimizer, time, lr, &self.groups[0].decay);
            return self.backend.adamw(&self.flat, &arguments);
        };
        if sampling.update() != update {
            return Err(Error::Internal {
                what: format!("update {update} with the gradient of update {}", sampling.update()),
                remedy: "begin the update before its gradient is computed".to_string(),
            });
        }
        for group in &self.groups[1..] {
            let count = match group.layer {
                None => Some(update),
                Some(layer) => sampling.count(layer),
            };
            let Some(count) = count else { continue };
            let part = self.flat.part(&group.range, |kind| self.backend.element_bytes(kind));
            let time = UpdateTime { count, ..time };
            let arguments = optim::adamw_step(optimizer, time, lr, &group.decay);
            self.backend.adamw(&part, &arguments)?;
        }
        Ok(())
    }

    /// Sum of the losses of at most B rows, and how many tokens were predicted.
    pub fn evaluate(&mut self, rows: Rows) -> Result<(f64, u64)> {
        self.use_arena_for(Use::Evaluation)?;
        self.evaluation.run(rows, &mut self.losses, &mut self.backend)?;
        Ok((sum(&self.losses), rows.predicted() as u64))
    }

    /// `work` in a range of this name, for profilers.
    pub fn range<T>(
        &mut self,
        name: &'static CStr,
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        self.backend.begin_range(name);
        let done = work(self);
        self.backend.end_range();
        done
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

    /// What a sample is drawn from: the model as it stands. `None`: `train.sample_tokens` was 0.
    pub fn decoder(&mut self) -> Option<(&mut Decoder, &mut B)> {
        Some((self.decoder.as_mut()?, &mut self.backend))
    }

    /// The device and the flat master parameters on it.
    pub fn device(&mut self) -> (&mut B, View) {
        (&mut self.backend, self.flat.parameters)
    }
}

fn layer_sampling(config: &Config) -> Option<LayerSampling> {
    let (layers, optimizer) = (config.model.layers, &config.optimizer);
    (optimizer.sampled_layers > 0).then(|| {
        let OptimizerConfig { sampled_layers, sample_interval, .. } = *optimizer;
        LayerSampling::new(config.seed, layers, sampled_layers, sample_interval)
    })
}
