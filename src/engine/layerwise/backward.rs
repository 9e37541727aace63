//! Backward passes of a model in pieces: the gradient of the blocks' parameters, and the Jacobian
//! of one block.
//!
//! Every block is a vector-Jacobian product that computes its forward pass again from the stream in
//! front of it, so a backward pass holds the activations of one block at a time.

use super::pieces::{Rotary, stored};
use crate::backend::{Backend, Footprint};
use crate::config::ModelConfig;
use crate::engine::flat_view;
use crate::error::Result;
use crate::model::RotaryInputs;
use crate::model::parameters::ParameterTable;
use crate::model::pieces::{BlockTape, HeadTape, record_block, record_head};
use crate::tape::{BoundProgram, External, Program, Purpose, ValueId};
use crate::tensor::{BufferId, Kind, Shape, View};
use std::ops::Range;

/// d_inp of one block from d_out, not yet bound to memory.
struct PullbackPlan {
    program: Program,
    inputs: PullbackInputs,
}

#[derive(Clone, Copy)]
struct PullbackInputs {
    inp: ValueId,
    rotary: RotaryInputs,
    /// To be written before every run.
    d_out: ValueId,
    d_inp: ValueId,
}

struct BoundPullback {
    program: BoundProgram,
    inputs: PullbackInputs,
}

impl PullbackPlan {
    fn new(block: BlockTape, element_bytes: impl Fn(Kind) -> usize) -> Result<Self> {
        let BlockTape { tape, inp, rotary, out } = block;
        let purpose = Purpose::VectorJacobian { out: Some(out), inp };
        let program = Program::new(tape, purpose, &[], element_bytes)?;
        let gradient = |of| program.gradient(of).expect("the purpose names it");
        let inputs = PullbackInputs { inp, rotary, d_out: gradient(out), d_inp: gradient(inp) };
        Ok(PullbackPlan { program, inputs })
    }

    fn bind(self, arena: BufferId, external: impl Fn(External, Kind) -> View) -> BoundPullback {
        BoundPullback { program: self.program.bind(arena, external), inputs: self.inputs }
    }
}

fn pullbacks(
    config: &ModelConfig,
    table: &ParameterTable,
    size: [usize; 2],
    element_bytes: impl Fn(Kind) -> usize + Copy,
) -> Result<Vec<PullbackPlan>> {
    (1..=config.layers)
        .map(|layer| PullbackPlan::new(record_block(config, table, layer, size)?, element_bytes))
        .collect()
}

fn largest_arena(blocks: &[PullbackPlan]) -> usize {
    blocks.iter().map(|block| block.program.arena_bytes()).max().unwrap_or(0)
}

/// Where the parameters of one block lie in the flat buffer, padding included.
fn block_range(table: &ParameterTable, layer: usize) -> Range<usize> {
    let prefix = format!("layers.{layer}.");
    let ours = || table.entries().iter().filter(|p| p.name.starts_with(&prefix));
    let start = ours().map(|p| p.range().start).min().unwrap_or(0);
    start..ours().map(|p| p.range().end).max().unwrap_or(0)
}

/// The gradient of the mean loss, not yet bound to memory.
pub(super) struct GradientPlan {
    head: Program,
    head_inputs: HeadInputs,
    blocks: Vec<PullbackPlan>,
    /// [T,C]
    stream: Shape,
    parameters: usize,
}

#[derive(Clone, Copy)]
struct HeadInputs {
    inp: ValueId,
    targets: ValueId,
    scale: ValueId,
    d_inp: ValueId,
}

pub(super) struct BoundGradient {
    head: BoundProgram,
    head_inputs: HeadInputs,
    blocks: Vec<BoundPullback>,
    /// [T,C]
    d_stream: View,
    /// The table's stored elements; only the blocks' are ever read.
    gradients: View,
    /// [L]: elements of each block's parameters in it.
    ranges: Vec<Range<usize>>,
}

impl GradientPlan {
    pub fn new(
        config: &ModelConfig,
        table: &ParameterTable,
        size: [usize; 2],
        device: &impl Footprint,
    ) -> Result<Self> {
        let t = size[0] * size[1];
        let element_bytes = |kind| device.element_bytes(kind);
        let HeadTape { tape, inp, targets, scale, .. } =
            record_head(config, table, t, device.held_logits())?;
        let purpose = Purpose::VectorJacobian { out: None, inp };
        let head = Program::new(tape, purpose, &[], element_bytes)?;
        let d_inp = head.gradient(inp).expect("the purpose names it");
        Ok(GradientPlan {
            head,
            head_inputs: HeadInputs { inp, targets, scale, d_inp },
            blocks: pullbacks(config, table, size, element_bytes)?,
            stream: Shape::new(&[t, config.hidden]),
            parameters: table.stored_elements(),
        })
    }

    pub fn arena_bytes(&self) -> usize {
        largest_arena(&self.blocks).max(self.head.arena_bytes())
    }

    pub fn gradient_bytes(&self, element_bytes: impl Fn(Kind) -> usize) -> usize {
        self.parameters * element_bytes(Kind::Statistic)
    }

    /// `parameter`: where one lies.
    pub fn bind(
        self,
        table: &ParameterTable,
        arena: BufferId,
        parameter: impl Fn(usize, Kind) -> View + Copy,
        backend: &mut impl Backend,
    ) -> Result<BoundGradient> {
        let bytes = backend.element_bytes(Kind::Statistic);
        let buffer = backend.allocate("gradients", self.parameters * bytes)?;
        let gradients = flat_view(buffer, self.parameters);
        let external = |external, kind| match external {
            External::Parameter(i) => parameter(i, kind),
            External::ParameterGradient(i) => table.entries()[i].view(gradients, bytes),
            External::Cache(_) => unreachable!("a loss has no cache"),
        };
        let layers = self.blocks.len();
        let head = self.head.bind(arena, external);
        let blocks: Vec<BoundPullback> =
            self.blocks.into_iter().map(|block| block.bind(arena, external)).collect();
        head.prepare(backend)?;
        blocks.iter().try_for_each(|block| block.program.prepare(backend))?;
        Ok(BoundGradient {
            head,
            head_inputs: self.head_inputs,
            blocks,
            d_stream: stored("stream gradient", self.stream.sizes(), Kind::Activation, backend)?,
            gradients,
            ranges: (1..=layers).map(|layer| block_range(table, layer)).collect(),
        })
    }
}

impl BoundGradient {
    /// `streams` [L+1] of [T,C], `targets` [T].
    pub fn accumulate(
        &self,
        scale: f32,
        targets: View,
        rotary: &Rotary,
        streams: &[View],
        backend: &mut impl Backend,
    ) -> Result<()> {
        let (head, inputs) = (&self.head, self.head_inputs);
        backend.copy(streams[self.blocks.len()], head.view(inputs.inp))?;
        backend.copy(targets, head.view(inputs.targets))?;
        backend.write(head.view(inputs.scale), &[scale])?;
        head.run(backend)?;
        backend.copy(head.view(inputs.d_inp), self.d_stream)?;
        for (block, &stream) in self.blocks.iter().zip(streams).rev() {
            let BoundPullback { program, inputs } = block;
            rotary.copy_to(program, inputs.rotary, backend)?;
            backend.copy(stream, program.view(inputs.inp))?;
            backend.copy(self.d_stream, program.view(inputs.d_out))?;
            program.run(backend)?;
            backend.copy(program.view(inputs.d_inp), self.d_stream)?;
        }
        Ok(())
    }

    pub fn norms(&self, backend: &mut impl Backend) -> Result<Vec<f64>> {
        /// Elements that are read at one time.
        const CHUNK: usize = 1 << 22;
        let bytes = backend.element_bytes(Kind::Statistic);
        let mut values = vec![0.0; CHUNK];
        let mut norm = |range: &Range<usize>| -> Result<f64> {
            let mut sum = 0.0;
            for start in range.clone().step_by(CHUNK) {
                let values = &mut values[..CHUNK.min(range.end - start)];
                let shape = Shape::new(&[values.len()]);
                let offset = self.gradients.offset + start * bytes;
                backend.read(View { offset, shape, ..self.gradients }, values)?;
                sum += values.iter().map(|&value| (value as f64).powi(2)).sum::<f64>();
            }
            Ok(sum.sqrt())
        };
        self.ranges.iter().map(&mut norm).collect()
    }
}

/// The Jacobian of a block, not yet bound to memory.
pub(super) struct JacobianPlan {
    blocks: Vec<PullbackPlan>,
    size: [usize; 2],
    hidden: usize,
    /// Elements of the largest block's parameters.
    scratch: usize,
}

pub(super) struct BoundJacobian {
    blocks: Vec<BoundPullback>,
    rotary: Rotary,
    size: [usize; 2],
    hidden: usize,
}

impl JacobianPlan {
    pub fn new(
        config: &ModelConfig,
        table: &ParameterTable,
        size: [usize; 2],
        element_bytes: impl Fn(Kind) -> usize + Copy,
    ) -> Result<Self> {
        let sizes = (1..=config.layers).map(|layer| block_range(table, layer).len());
        Ok(JacobianPlan {
            blocks: pullbacks(config, table, size, element_bytes)?,
            size,
            hidden: config.hidden,
            scratch: sizes.max().unwrap_or(0),
        })
    }

    pub fn arena_bytes(&self) -> usize {
        largest_arena(&self.blocks)
    }

    pub fn scratch_bytes(&self, element_bytes: impl Fn(Kind) -> usize) -> usize {
        self.scratch * element_bytes(Kind::Statistic)
    }

    /// `parameter`: where one lies. Parameter gradients go where nobody reads them.
    pub fn bind(
        self,
        config: &ModelConfig,
        table: &ParameterTable,
        arena: BufferId,
        parameter: impl Fn(usize, Kind) -> View + Copy,
        backend: &mut impl Backend,
    ) -> Result<BoundJacobian> {
        let bytes = backend.element_bytes(Kind::Statistic);
        let scratch = backend.allocate("unread gradients", self.scratch * bytes)?;
        let JacobianPlan { blocks, size, hidden, .. } = self;
        let mut bound = Vec::with_capacity(blocks.len());
        for (i, block) in blocks.into_iter().enumerate() {
            let start = block_range(table, i + 1).start;
            let block = block.bind(arena, |external, kind| match external {
                External::Parameter(i) => parameter(i, kind),
                External::ParameterGradient(i) => {
                    let entry = &table.entries()[i];
                    let (kind, shape) = (Kind::Statistic, entry.stored);
                    View { buffer: scratch, offset: (entry.offset - start) * bytes, kind, shape }
                }
                External::Cache(_) => unreachable!("whole rows have no cache"),
            });
            block.program.prepare(backend)?;
            bound.push(block);
        }
        let rotary = Rotary::write(config, size, backend)?;
        Ok(BoundJacobian { blocks: bound, rotary, size, hidden })
    }
}

impl BoundJacobian {
    /// See [`super::Layerwise::jacobian`]. Row j is the product with unit vector j, each in a row
    /// of the batch of its own.
    pub fn rows_of(
        &self,
        layer: usize,
        stream: &[f32],
        token: usize,
        backend: &mut impl Backend,
    ) -> Result<Vec<f32>> {
        let ([rows, sequence], c) = (self.size, self.hidden);
        let BoundPullback { program, inputs } = &self.blocks[layer - 1];
        self.rotary.copy_to(program, inputs.rotary, backend)?;
        backend.write(program.view(inputs.inp), &stream.repeat(rows))?;
        let [d_out, d_inp] = [inputs.d_out, inputs.d_inp].map(|id| program.view(id));
        let bytes = backend.element_bytes(d_out.kind);
        let of_token = |stream: View, row: usize| {
            let offset = stream.offset + (row * sequence + token) * c * bytes;
            View { offset, shape: Shape::new(&[c]), ..stream }
        };
        let mut jacobian = vec![0.0; c * c];
        for first in (0..c).step_by(rows) {
            backend.zero(d_out)?;
            let outputs = first..c.min(first + rows);
            for (row, output) in outputs.clone().enumerate() {
                let mut unit = vec![0.0; c];
                unit[output] = 1.0;
                backend.write(of_token(d_out, row), &unit)?;
            }
            program.run(backend)?;
            for (row, output) in outputs.enumerate() {
                let values = &mut jacobian[output * c..][..c];
                backend.read(of_token(d_inp, row), values)?;
            }
        }
        Ok(jacobian)
    }
}
