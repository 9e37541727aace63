//! A program: steps whose memory is planned, and, once bound, whose operands are views.

use std::collections::HashSet;

use super::differentiate::{Gradients, inference_steps, training_steps, vector_jacobian_steps};
use super::fuse::{fuse, scratch_of_pairs};
use super::memory::MemoryPlan;
use super::{External, Role, Step, Tape, Value, ValueId};
use crate::backend::Backend;
use crate::config::Recompute;
use crate::error::{Error, Result};
use crate::tensor::{BufferId, Kind, Shape, View};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    Inference,
    Training {
        recompute: Recompute,
    },
    /// The gradient of `inp` from that of `out`, which the caller writes before a run; `None`: from
    /// the tape's own loss. Both are [`Program::gradient`]s. Parameter gradients accumulate as in
    /// training.
    VectorJacobian {
        out: Option<ValueId>,
        inp: ValueId,
    },
}

/// A tape made ready for one purpose; it needs [`Program::arena_bytes`] of memory to run.
#[derive(Clone, Debug)]
pub struct Program {
    tape: Tape,
    steps: Vec<Step<ValueId>>,
    /// Of the values that the purpose names.
    gradients: Gradients,
    memory: MemoryPlan,
}

/// A program with an address for every operand.
#[derive(Clone, Debug)]
pub struct BoundProgram {
    program: Program,
    arena: BufferId,
    steps: Vec<Step<View>>,
}

impl Program {
    /// `kept`: activations that the caller reads after a run.
    pub fn new(
        tape: Tape,
        purpose: Purpose,
        kept: &[ValueId],
        element_bytes: impl Fn(Kind) -> usize,
    ) -> Result<Self> {
        Self::fused(tape, purpose, kept, element_bytes, false)
    }

    /// For a device that does more at once: `swiglu_backward` as
    /// [`Backend::fuses_swiglu_backward`], which spares memory.
    pub fn fused(
        mut tape: Tape,
        purpose: Purpose,
        kept: &[ValueId],
        element_bytes: impl Fn(Kind) -> usize,
        swiglu_backward: bool,
    ) -> Result<Self> {
        let (steps, gradients) = match purpose {
            Purpose::Inference => (inference_steps(&tape), Vec::new()),
            Purpose::Training { recompute } => {
                (training_steps(&mut tape, recompute, kept)?, Vec::new())
            }
            Purpose::VectorJacobian { out, inp } => {
                vector_jacobian_steps(&mut tape, out, inp, kept)?
            }
        };
        let read = gradients.iter().map(|(_, gradient)| gradient);
        let kept: Vec<ValueId> = kept.iter().chain(read).copied().collect();
        let steps = fuse(steps, &kept);
        let spared = if swiglu_backward { scratch_of_pairs(&steps) } else { HashSet::new() };
        let memory = MemoryPlan::new(&steps, &tape.values, &kept, &spared, element_bytes);
        Ok(Program { tape, steps, gradients, memory })
    }

    /// The gradient of a value that [`Purpose::VectorJacobian`] names. That of `out` may share its
    /// memory with that of `inp`, so it is to be written before every run.
    pub fn gradient(&self, of: ValueId) -> Option<ValueId> {
        self.gradients.iter().find(|(value, _)| *value == of).map(|(_, gradient)| *gradient)
    }

    pub fn arena_bytes(&self) -> usize {
        self.memory.arena_bytes
    }

    pub fn memory(&self) -> &MemoryPlan {
        &self.memory
    }

    pub fn steps(&self) -> &[Step<ValueId>] {
        &self.steps
    }

    pub fn value(&self, id: ValueId) -> &Value {
        self.tape.value(id)
    }

    fn view(
        &self,
        id: ValueId,
        arena: BufferId,
        external: &impl Fn(External, Kind) -> View,
    ) -> View {
        let value = &self.tape.values[id.0];
        match (value.role, self.memory.offset(id)) {
            (Role::External(which), _) => {
                View { shape: value.shape, ..external(which, value.kind) }
            }
            (_, Some(offset)) => {
                View { buffer: arena, offset, kind: value.kind, shape: value.shape }
            }
            // Spared, see [`Fused::run`].
            (_, None) => {
                View { buffer: arena, offset: 0, kind: value.kind, shape: Shape::new(&[0]) }
            }
        }
    }

    /// `arena` holds at least [`Program::arena_bytes`]; `external` says where the rest lies, which
    /// may depend on the kind: a matmul reads a parameter's working copy, a norm its master.
    pub fn bind(self, arena: BufferId, external: impl Fn(External, Kind) -> View) -> BoundProgram {
        let steps = self
            .steps
            .iter()
            .map(|step| step.map(&mut |id, _| self.view(id, arena, &external)))
            .collect();
        BoundProgram { program: self, arena, steps }
    }
}

impl BoundProgram {
    /// Where an input is to be written, or a kept value to be read.
    pub fn view(&self, id: ValueId) -> View {
        self.program.view(id, self.arena, &|_, _| unreachable!("externals are the caller's"))
    }

    /// What will run, in order.
    pub fn steps(&self) -> &[Step<View>] {
        &self.steps
    }

    /// Has the backend check every step and make ready what it needs to run it, so that the first
    /// run is like the later ones. Nothing is computed.
    pub fn prepare(&self, backend: &mut impl Backend) -> Result<()> {
        if !backend.begin_preparation() {
            return Ok(());
        }
        let ready = self.run(backend);
        backend.end_preparation();
        ready.map_err(Error::before_running)
    }

    /// Runs every step, in order. The backward pass begins with the first gradient; what it
    /// computes again is a part of it.
    pub fn run<B: Backend>(&self, backend: &mut B) -> Result<()> {
        backend.on_worker(|backend| self.run_here(backend))
    }

    fn run_here<B: Backend>(&self, backend: &mut B) -> Result<()> {
        let backward = self.steps.iter().position(Step::is_backward);
        let (forward, backward) = self.steps.split_at(backward.unwrap_or(self.steps.len()));
        let run = |steps: &[Step<View>], backend: &mut B| {
            steps.iter().try_for_each(|step| step.run(backend))
        };
        backend.range(c"forward", |backend| run(forward, backend))?;
        match backward.is_empty() {
            true => Ok(()),
            false => backend.range(c"backward", |backend| run(backward, backend)),
        }
    }
}
