//! What a training run allocates, known and shown before anything is.

use std::fmt;

use serde::Serialize;

use super::batches::Batches;
use super::decoder::DecoderPlan;
use super::loss::LossProgram;
use super::parameters::ParameterBytes;
use crate::backend::{AttentionSpec, Backend, Footprint, offload_bytes};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::host_memory;
use crate::model::{self, parameters::ParameterTable};
use crate::optim::{self, UpdateGroup};
use crate::tape::{MemoryLine, Program, Purpose};
use crate::tensor::Kind;

/// What a training run allocates, known before anything is.
pub struct Plan {
    pub table: ParameterTable,
    pub(super) training: LossProgram,
    pub(super) evaluation: LossProgram,
    /// `None`: the run draws no samples.
    pub(super) sampling: Option<DecoderPlan>,
    pub(super) flat_bytes: usize,
    /// Of each of the two.
    pub(super) moment_bytes: usize,
    /// Moments lie in host memory, and pass through as many bytes of the device's.
    offload_bytes: Option<usize>,
    parameter_bytes: ParameterBytes,
    batch_bytes: usize,
    /// Of host memory, see [`Footprint::transfer_bytes`].
    transfer_bytes: usize,
    /// Of the gradient's norm.
    norm_bytes: usize,
    optimizer_bytes: usize,
    attention_bytes: usize,
    /// Allocated by the backend when it was opened.
    opened_bytes: usize,
    process_bytes: usize,
    reserve_bytes: usize,
}

/// Longest sample, prompt included, that training prints.
const SAMPLE_CONTEXT: usize = 256;

/// The memory of a device, row by row; all in bytes.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct MemoryTable {
    /// In f32; or what the working copy lacks of it, and vectors in f32.
    pub parameters: u64,
    /// The parameters as matmuls read them, where that is not f32.
    pub working_copy: u64,
    pub gradients: u64,
    /// Both moments, or what those in host memory pass through, and what the optimizer needs
    /// besides: the gradient's norm, scalars, scratch.
    pub moments: u64,
    /// The one arena that training and evaluation share.
    pub activations: u64,
    /// Tokens, targets and losses of a step.
    pub batches: u64,
    /// For the samples that training prints.
    pub sampling: u64,
    /// What kernels need besides their operands: semaphores of split products, sums of attention's
    /// gradients.
    pub scratch: u64,
    /// What the program itself takes of the device's memory, as measured.
    pub process: u64,
    /// What a GPU's driver will take besides buffers: graphs, kernels' code, rounding. Estimated.
    pub reserve: u64,
    pub total: u64,
    /// Both moments, where they lie in host memory: not in the total.
    pub host_moments: u64,
    /// What passes through host memory on its way to a device and back: not in the total.
    pub host_transfers: u64,
    /// What lies in the arena, the largest at the fullest step first.
    pub tensors: Vec<MemoryLine>,
}

impl Plan {
    /// For training on this device.
    pub fn new(config: &Config, device: &impl Footprint) -> Result<Self> {
        let table = ParameterTable::new(&config.model);
        let (batch, sequence) = (config.train.micro_batch, config.data.sequence);
        let size = [batch, sequence];
        let documents = config.data.packs_documents();
        let program = |purpose, z_loss| {
            LossProgram::new(&config.model, &table, size, documents, z_loss, purpose, device)
        };
        let training =
            program(Purpose::Training { recompute: config.train.recompute }, config.train.z_loss)?;
        // Held-out loss is plain cross-entropy.
        let evaluation = program(Purpose::Inference, 0.0)?;
        let element_bytes = |kind| device.element_bytes(kind);
        let context = config.model.max_sequence.min(SAMPLE_CONTEXT);
        let sampling = (config.train.sample_tokens > 0)
            .then(|| DecoderPlan::new(&config.model, &table, context, element_bytes))
            .transpose()?;
        let optimizer = &config.optimizer;
        let moment_element_bytes = element_bytes(optim::moment_kind(optimizer));
        let passage = offload_bytes(device.offload_chunk(), moment_element_bytes);
        let groups = UpdateGroup::all(&table, optimizer);
        let of_groups = groups.iter().map(|it| device.optimizer_bytes(&it.decay, &it.vectors));
        let heads = model::heads(&config.model);
        let step_tokens = config.train.grad_accumulation * batch * sequence;
        let [sent, read] = Batches::transfers(step_tokens);
        Ok(Plan {
            training,
            evaluation,
            sampling,
            flat_bytes: table.stored_elements() * element_bytes(Kind::Statistic),
            moment_bytes: table.stored_elements() * moment_element_bytes,
            offload_bytes: optimizer.offload.then_some(passage),
            parameter_bytes: ParameterBytes::new(&table, optimizer.master, element_bytes),
            batch_bytes: Batches::bytes(
                config.train.grad_accumulation,
                batch * sequence,
                documents,
                element_bytes,
            ),
            transfer_bytes: device.transfer_bytes(sent, read),
            norm_bytes: element_bytes(Kind::Statistic),
            optimizer_bytes: of_groups.sum(),
            attention_bytes: device
                .attention_scratch_bytes(AttentionSpec { heads, batch, sequence }, documents),
            opened_bytes: device.scratch_bytes(),
            process_bytes: device.process_bytes(largest_matrix(&table)),
            reserve_bytes: device.reserve_bytes(),
            table,
        })
    }

    /// What runs for every micro-batch of training.
    pub fn training_program(&self) -> &Program {
        self.training.program()
    }

    /// Bytes of the one arena that training and evaluation share.
    pub fn arena_bytes(&self) -> usize {
        self.training.arena_bytes().max(self.evaluation.arena_bytes())
    }

    pub fn memory(&self) -> MemoryTable {
        let flat = self.flat_bytes as u64;
        let activations = self.arena_bytes() as u64;
        let sampling = self.sampling.as_ref().map_or(0, DecoderPlan::bytes) as u64;
        let ParameterBytes { master, working, vectors } = self.parameter_bytes;
        let (parameters, working_copy) = ((master + vectors) as u64, working as u64);
        let batches = self.batch_bytes as u64;
        let both = 2 * self.moment_bytes;
        let (on_device, on_host) = self.offload_bytes.map_or((both, 0), |bytes| (bytes, both));
        let moments = (on_device + self.norm_bytes + self.optimizer_bytes) as u64;
        let scratch = (self.opened_bytes + self.attention_bytes) as u64;
        let (process, reserve) = (self.process_bytes as u64, self.reserve_bytes as u64);
        let flat_buffers = parameters + working_copy + flat + moments;
        let besides = batches + sampling + scratch + process + reserve;
        MemoryTable {
            parameters,
            working_copy,
            gradients: flat,
            moments,
            activations,
            batches,
            sampling,
            scratch,
            process,
            reserve,
            total: flat_buffers + activations + besides,
            host_moments: on_host as u64,
            host_transfers: self.transfer_bytes as u64,
            tensors: self.training.memory_lines().to_vec(),
        }
    }

    /// Refuses what does not fit, with the numbers and the setting to change.
    pub fn check_fits(&self, backend: &impl Backend) -> Result<()> {
        let memory = self.memory();
        let available = backend.available_bytes()? + self.opened_bytes as u64;
        let available_on_host = host_memory::available_bytes();
        let on_host = memory.host_moments + memory.host_transfers;
        if on_host > available_on_host {
            return Err(Error::Memory {
                device: "host".to_string(),
                needed: on_host,
                available: available_on_host,
                table: memory.to_string(),
                remedy: "set optimizer.moments to bf16, or optimizer.offload to false; lower \
                         train.micro_batch or train.grad_accumulation"
                    .to_string(),
            });
        }
        if memory.total <= available {
            return Ok(());
        }
        // Devices that compute in bf16 can also store optimizer state in it.
        let narrower = match memory.working_copy {
            0 => "",
            _ => {
                ", set optimizer.moments to bf16 and optimizer.master to bf16+16, or \
                 optimizer.offload to true"
            }
        };
        Err(Error::Memory {
            device: backend.name().to_string(),
            needed: memory.total,
            available,
            table: memory.to_string(),
            remedy: format!(
                "lower train.micro_batch (and raise train.grad_accumulation by as much), \
                 raise train.recompute (norms, attention, block){narrower}, or lower data.sequence"
            ),
        })
    }
}

/// [rows, columns] of the parameter with the most elements.
fn largest_matrix(table: &ParameterTable) -> [usize; 2] {
    let shapes = table.entries().iter().map(|parameter| parameter.stored);
    let largest = shapes.max_by_key(|shape| shape.elements());
    largest.map_or([0, 0], |shape| [shape.rows(), shape.columns()])
}

/// The table that people read; no line end after the last row.
impl fmt::Display for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / (1u64 << 20) as f64;
        writeln!(f, "{:<30}{:>22}", "memory", "MiB")?;
        for (name, bytes) in [
            ("parameters", self.parameters),
            ("working copy", self.working_copy),
            ("gradients", self.gradients),
            ("moments", self.moments),
            ("activations", self.activations),
        ] {
            if bytes > 0 {
                writeln!(f, "{name:<30}{:>22.1}", mib(bytes))?;
            }
        }
        // At the fullest step; what is too small to show is left out.
        let shown = |line: &&MemoryLine| mib(line.live_bytes as u64) >= 0.05;
        for line in self.tensors.iter().filter(shown) {
            let name = format!("  {} x {}", line.live, line.name);
            writeln!(f, "{name:<30}{:>12.1}", mib(line.live_bytes as u64))?;
        }
        let rest = [
            ("batches", self.batches),
            ("sampling", self.sampling),
            ("scratch", self.scratch),
            ("process", self.process),
            ("graphs and code (estimated)", self.reserve),
        ];
        for (name, bytes) in rest.into_iter().filter(|(_, bytes)| *bytes > 0) {
            writeln!(f, "{name:<30}{:>22.1}", mib(bytes))?;
        }
        write!(f, "{:<30}{:>22.1}", "together", mib(self.total))?;
        let on_host = [
            ("moments in host memory", self.host_moments),
            ("transfers in host memory", self.host_transfers),
        ];
        on_host
            .into_iter()
            .filter(|(_, bytes)| *bytes > 0)
            .try_for_each(|(name, bytes)| write!(f, "\n{name:<30}{:>22.1}", mib(bytes)))
    }
}
