//! One block as a program of its own, and the memory that programs share by copying.

use crate::backend::Backend;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::pieces::BlockTape;
use crate::model::{RotaryInputs, rotary_table};
use crate::tape::{BoundProgram, External, Program, Purpose, ValueId};
use crate::tensor::{BufferId, Kind, Shape, View};

/// A buffer of its own.
pub(super) fn stored(
    label: &'static str,
    sizes: &[usize],
    kind: Kind,
    backend: &mut impl Backend,
) -> Result<View> {
    let shape = Shape::new(sizes);
    let bytes = shape.elements() * backend.element_bytes(kind);
    Ok(View { buffer: backend.allocate(label, bytes)?, offset: 0, kind, shape })
}

/// What every block reads besides the stream; outside the arena.
pub(super) struct Rotary {
    table: View,
    positions: View,
}

impl Rotary {
    /// For B rows of S tokens.
    pub fn write(
        config: &ModelConfig,
        [batch, sequence]: [usize; 2],
        backend: &mut impl Backend,
    ) -> Result<Self> {
        let sizes = [sequence, config.head_dim()];
        let table = stored("rotary table", &sizes, Kind::Statistic, backend)?;
        backend.write(table, &rotary_table(config, sequence))?;
        let positions = stored("positions", &[batch * sequence], Kind::Index, backend)?;
        let values: Vec<i32> = (0..batch).flat_map(|_| 0..sequence as i32).collect();
        backend.write_index(positions, &values)?;
        Ok(Rotary { table, positions })
    }

    pub fn copy_to(
        &self,
        program: &BoundProgram,
        inputs: RotaryInputs,
        backend: &mut impl Backend,
    ) -> Result<()> {
        backend.copy(self.table, program.view(inputs.table))?;
        backend.copy(self.positions, program.view(inputs.positions))
    }
}

/// A block's forward pass, not yet bound to memory.
pub(super) struct BlockPlan {
    program: Program,
    inp: ValueId,
    rotary: RotaryInputs,
    out: ValueId,
}

pub(super) struct BoundBlock {
    program: BoundProgram,
    inp: ValueId,
    rotary: RotaryInputs,
    out: ValueId,
}

impl BlockPlan {
    pub fn new(block: BlockTape, element_bytes: impl Fn(Kind) -> usize) -> Result<Self> {
        let BlockTape { tape, inp, rotary, out } = block;
        let program = Program::new(tape, Purpose::Inference, &[out], element_bytes)?;
        Ok(BlockPlan { program, inp, rotary, out })
    }

    pub fn arena_bytes(&self) -> usize {
        self.program.arena_bytes()
    }

    pub fn bind(self, arena: BufferId, external: impl Fn(External, Kind) -> View) -> BoundBlock {
        let BlockPlan { program, inp, rotary, out } = self;
        BoundBlock { program: program.bind(arena, external), inp, rotary, out }
    }
}

impl BoundBlock {
    pub fn prepare(&self, backend: &mut impl Backend) -> Result<()> {
        self.program.prepare(backend)
    }

    /// `from`, `to` [T,C], outside the arena; they may be the same.
    pub fn run(
        &self,
        rotary: &Rotary,
        from: View,
        to: View,
        backend: &mut impl Backend,
    ) -> Result<()> {
        rotary.copy_to(&self.program, self.rotary, backend)?;
        backend.copy(from, self.program.view(self.inp))?;
        self.program.run(backend)?;
        backend.copy(self.program.view(self.out), to)
    }
}
