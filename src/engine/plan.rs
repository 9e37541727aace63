//! What a training run allocates, known and shown before anything is.

use super::decoder::DecoderPlan;
use super::loss::LossProgram;
use crate::backend::Backend;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::model::parameters::ParameterTable;
use crate::tape::{MemoryLine, Purpose};
use crate::tensor::Kind;

/// What a training run allocates, known before anything is.
pub struct Plan {
    pub table: ParameterTable,
    pub(super) training: LossProgram,
    pub(super) evaluation: LossProgram,
    pub(super) sampling: DecoderPlan,
    pub(super) flat_bytes: usize,
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
