//! A model that is only read, piece by piece: embedding, blocks and head run one after the other
//! over the residual stream, which is kept at every depth.
//!
//! So a block can be left out or replaced without running those before it again, and one block
//! can be differentiated alone. "After block l" counts from 1; after block 0 stands the embedding.
//! All pieces run in one arena over one upload of the parameters; whatever outlives a piece lies
//! outside the arena and is copied in and out. Nothing is allocated once a [`Layerwise`] exists.

mod backward;
mod pieces;

use std::ops::Range;

use super::batches::check_no_documents;
use super::{Parameters, Rows, check_available};
use crate::backend::Backend;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::parameters::ParameterTable;
use crate::model::pieces::{EmbeddingTape, HeadTape, record_block, record_embedding, record_head};
use crate::tape::{BoundProgram, External, Program, Purpose, ValueId};
use crate::tensor::{Kind, Shape, View};

use backward::{BoundGradient, BoundJacobian, GradientPlan, JacobianPlan};
use pieces::{BlockPlan, BoundBlock, Rotary, stored};

/// Backward passes that a [`Layerwise`] is to be able to run.
#[derive(Clone, Copy, Default, Debug)]
pub struct Backward {
    /// [`Layerwise::accumulate_gradient`]
    pub gradient: bool,
    /// [`Layerwise::jacobian`]: [rows at one time, tokens in a row].
    pub jacobian: Option<[usize; 2]>,
}

/// A model that is only read, its residual stream kept at every depth.
pub struct Layerwise<B> {
    backend: B,
    hidden: usize,
    vocab: usize,
    /// [T]
    tokens: View,
    /// [T]
    targets: View,
    rotary: Rotary,
    /// [T,C] each; entry l stands after block l.
    streams: Vec<View>,
    /// [T,C]: the stream of a changed model, at whatever depth it has come to.
    changed: View,
    embedding: BoundEmbedding,
    blocks: Vec<BoundBlock>,
    head: BoundHead,
    gradient: Option<BoundGradient>,
    jacobian: Option<BoundJacobian>,
    losses: Vec<f32>,
}

struct BoundEmbedding {
    program: BoundProgram,
    tokens: ValueId,
    out: ValueId,
}

struct BoundHead {
    program: BoundProgram,
    inp: ValueId,
    targets: ValueId,
    losses: ValueId,
}

impl<B: Backend> Layerwise<B> {
    /// For B rows of S tokens; `parameters`: the table's stored elements.
    pub fn new(
        config: &ModelConfig,
        table: &ParameterTable,
        parameters: &[f32],
        [batch, sequence]: [usize; 2],
        backward: Backward,
        mut backend: B,
    ) -> Result<Self> {
        let bytes = |kind| backend.element_bytes(kind);
        let (t, size) = (batch * sequence, [batch, sequence]);
        let EmbeddingTape { tape, tokens: ids, out } = record_embedding(config, table, t)?;
        let embedding = Program::new(tape, Purpose::Inference, &[out], bytes)?;
        let blocks: Vec<BlockPlan> = (1..=config.layers)
            .map(|layer| BlockPlan::new(record_block(config, table, layer, size)?, bytes))
            .collect::<Result<_>>()?;
        let HeadTape { tape, inp, targets, losses, .. } =
            record_head(config, table, t, backend.held_logits())?;
        let head = Program::new(tape, Purpose::Inference, &[losses], bytes)?;
        let head = (head, inp, targets, losses);
        let gradient = match backward.gradient {
            true => Some(GradientPlan::new(config, table, size, &backend)?),
            false => None,
        };
        let jacobian = match backward.jacobian {
            Some(size) => Some(JacobianPlan::new(config, table, size, bytes)?),
            None => None,
        };

        let stream_bytes = t * config.hidden * bytes(Kind::Activation);
        let arena_bytes = [embedding.arena_bytes(), head.0.arena_bytes()]
            .into_iter()
            .chain(blocks.iter().map(BlockPlan::arena_bytes))
            .chain(gradient.iter().map(GradientPlan::arena_bytes))
            .chain(jacobian.iter().map(JacobianPlan::arena_bytes))
            .max()
            .unwrap_or(0);
        let gradient_bytes = gradient.as_ref().map_or(0, |plan| plan.gradient_bytes(bytes))
            + jacobian.as_ref().map_or(0, |plan| plan.scratch_bytes(bytes));
        check_available(
            &[
                ("parameters", Parameters::bytes(table, bytes)),
                ("residual stream at every depth", (config.layers + 3) * stream_bytes),
                ("gradients", gradient_bytes),
                ("activations", arena_bytes),
            ],
            "give a smaller --batch or --sequence, or leave out the measurements of gradients with \
             --measure",
            &backend,
        )?;

        let parameters = Parameters::upload(table, parameters, &mut backend)?;
        let arena = backend.allocate("activations", arena_bytes)?;
        let external = |external, kind| match external {
            External::Parameter(i) => parameters.view(&table.entries()[i], kind),
            other => unreachable!("an inference program asks for {other:?}"),
        };
        let streams: Vec<View> = (0..=config.layers)
            .map(|_| stored("residual stream", &[t, config.hidden], Kind::Activation, &mut backend))
            .collect::<Result<_>>()?;
        let changed =
            stored("changed residual stream", &[t, config.hidden], Kind::Activation, &mut backend)?;
        let embedding =
            BoundEmbedding { program: embedding.bind(arena, external), tokens: ids, out };
        let blocks: Vec<BoundBlock> =
            blocks.into_iter().map(|block| block.bind(arena, external)).collect();
        let (program, inp, head_targets, losses) = head;
        let head = BoundHead {
            program: program.bind(arena, external),
            inp,
            targets: head_targets,
            losses,
        };
        let own = |i: usize, kind| parameters.view(&table.entries()[i], kind);
        let gradient = match gradient {
            Some(plan) => Some(plan.bind(table, arena, own, &mut backend)?),
            None => None,
        };
        let jacobian = match jacobian {
            Some(plan) => Some(plan.bind(config, table, arena, own, &mut backend)?),
            None => None,
        };
        embedding.program.prepare(&mut backend)?;
        blocks.iter().try_for_each(|block| block.prepare(&mut backend))?;
        head.program.prepare(&mut backend)?;
        Ok(Layerwise {
            hidden: config.hidden,
            vocab: config.vocab,
            tokens: stored("tokens", &[t], Kind::Index, &mut backend)?,
            targets: stored("targets", &[t], Kind::Index, &mut backend)?,
            rotary: Rotary::write(config, size, &mut backend)?,
            streams,
            changed,
            embedding,
            blocks,
            head,
            gradient,
            jacobian,
            losses: vec![0.0; t],
            backend,
        })
    }

    /// Runs the whole model on B*S tokens and keeps its streams. The loss of each token; 0 where
    /// nothing is predicted.
    pub fn forward(&mut self, rows: Rows) -> Result<&[f32]> {
        rows.check(self.vocab)?;
        check_no_documents(&rows)?;
        self.backend.write_index(self.tokens, rows.tokens)?;
        self.backend.write_index(self.targets, rows.targets)?;
        let BoundEmbedding { program, tokens, out } = &self.embedding;
        self.backend.copy(self.tokens, program.view(*tokens))?;
        program.run(&mut self.backend)?;
        self.backend.copy(program.view(*out), self.streams[0])?;
        for (i, block) in self.blocks.iter().enumerate() {
            block.run(&self.rotary, self.streams[i], self.streams[i + 1], &mut self.backend)?;
        }
        self.head_losses(self.streams[self.blocks.len()])
    }

    /// The losses of the last [`Layerwise::forward`]'s tokens without block `layer`: the next one
    /// reads what that one would have read.
    pub fn losses_without(&mut self, layer: usize) -> Result<&[f32]> {
        self.losses_from(layer, self.streams[layer - 1])
    }

    /// The same with what [`Layerwise::write_changed`] wrote after block `layer`.
    pub fn losses_of_changed(&mut self, layer: usize) -> Result<&[f32]> {
        self.losses_from(layer, self.changed)
    }

    /// The losses of a model whose stream after block `layer` is `stream`.
    fn losses_from(&mut self, layer: usize, stream: View) -> Result<&[f32]> {
        let mut from = stream;
        for block in &self.blocks[layer..] {
            block.run(&self.rotary, from, self.changed, &mut self.backend)?;
            from = self.changed;
        }
        self.head_losses(from)
    }

    fn head_losses(&mut self, stream: View) -> Result<&[f32]> {
        let BoundHead { program, inp, targets, losses } = &self.head;
        self.backend.copy(stream, program.view(*inp))?;
        self.backend.copy(self.targets, program.view(*targets))?;
        program.run(&mut self.backend)?;
        self.backend.read(program.view(*losses), &mut self.losses)?;
        Ok(&self.losses)
    }

    /// The stream after block `layer`, of some of the B*S tokens: [n,C].
    pub fn read_stream(
        &mut self,
        layer: usize,
        tokens: Range<usize>,
        out: &mut [f32],
    ) -> Result<()> {
        self.backend.read(self.rows(self.streams[layer], tokens), out)
    }

    /// Replaces [n,C] of the changed stream, from token `first` on.
    pub fn write_changed(&mut self, first: usize, values: &[f32]) -> Result<()> {
        let tokens = first..first + values.len() / self.hidden;
        self.backend.write(self.rows(self.changed, tokens), values)
    }

    /// Adds the gradients of scale * sum(losses) of the last [`Layerwise::forward`] to those of the
    /// blocks' parameters, which are 0 at first. Panics unless it was made for this.
    pub fn accumulate_gradient(&mut self, scale: f32) -> Result<()> {
        let gradient = self.gradient.as_ref().expect("made without Backward::gradient");
        gradient.accumulate(scale, self.targets, &self.rotary, &self.streams, &mut self.backend)
    }

    /// [L]: Euclidean norm of each block's gradient, summed in f64.
    pub fn gradient_norms(&mut self) -> Result<Vec<f64>> {
        let gradient = self.gradient.as_ref().expect("made without Backward::gradient");
        gradient.norms(&mut self.backend)
    }

    /// [C,C], row-major: d out / d inp of one token of one block, by C vector-Jacobian products.
    /// `stream`: what stands before the block in one row, as many tokens as
    /// [`Backward::jacobian`] says; those after `token` have no influence. Panics unless it was
    /// made for this.
    pub fn jacobian(&mut self, layer: usize, stream: &[f32], token: usize) -> Result<Vec<f32>> {
        let jacobian = self.jacobian.as_ref().expect("made without Backward::jacobian");
        jacobian.rows_of(layer, stream, token, &mut self.backend)
    }

    fn rows(&self, stream: View, tokens: Range<usize>) -> View {
        let row = self.hidden * self.backend.element_bytes(stream.kind);
        let shape = Shape::new(&[tokens.len(), self.hidden]);
        View { offset: stream.offset + tokens.start * row, shape, ..stream }
    }
}
