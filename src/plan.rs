//! What a configuration costs, before anything is allocated: parameters, FLOPs, bytes.
//!
//! Needs no data and no device. Counts are exact; FLOPs are those of the formula that is printed
//! beside them; the memory table is the one that training prints and keeps to.

use std::fmt;

use serde::Serialize;

use crate::config::{Config, DeviceKind, Dtype, ModelConfig};
use crate::cpu::Cpu;
use crate::cuda::AbsentGpu;
use crate::cuda::peaks::H200;
use crate::device::{Device, open_kernels};
use crate::engine::{MemoryTable, Plan};
use crate::error::Result;
use crate::model::parameters::ParameterTable;

/// FLOPs of training on one token. Every weight of a matmul is used three times (forward, and
/// twice backward) by a multiplication and an addition; so is every score of causal attention,
/// of which there are S/2 on average, in two products of C each.
pub const FLOPS_FORMULA: &str = "6*N_matmul + 6*L*S*C, causal attention; \
                                 N_matmul: without embedding lookup and norm gains, with head";

#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct PlanReport {
    pub name: String,
    pub device: DeviceKind,
    pub dtype: Dtype,
    pub vocab: usize,
    /// As a Hugging Face folder counts them, without padding.
    pub parameters: u64,
    /// Without the embedding and the head.
    pub non_embedding_parameters: u64,
    /// N_matmul: weights that a token is multiplied with, the head included.
    pub matmul_parameters: u64,
    /// Elements of the flat buffer: parameters and padding.
    pub stored_elements: u64,
    pub flops_per_token: u64,
    pub flops_formula: &'static str,
    pub tokens_per_step: u64,
    pub steps: u64,
    pub tokens: u64,
    pub flops: f64,
    pub bytes: MemoryTable,
}

impl PlanReport {
    /// Errors: a broken shape rule; a vocabulary that only a tokenizer file knows.
    pub fn new(config: &Config) -> Result<Self> {
        let config = &config.with_vocab()?;
        let vocab = config.model.vocab;
        // What the CPU cannot train is planned for a machine that can.
        let trains = |device: Device| config.validate_on(device.kind()).is_ok();
        let plan = match (Device::choose(config.device), config.dtype) {
            (Ok(Device::Cpu), _) if trains(Device::Cpu) => Plan::new(config, &Cpu::<f32>::new())?,
            (Ok(Device::Simt), dtype) => Plan::new(config, &open_kernels(config.device, dtype)?)?,
            _ => plan_of_gpu(config, H200.multiprocessors)?,
        };
        let bytes = plan.memory();
        let table = plan.table;
        let count = |id| table.get(id).elements() as u64;
        let head = count(table.head());
        let embeddings = count(table.embedding()) + if config.model.tied { 0 } else { head };
        let matmul_parameters = matmul_parameters(&config.model, &table);
        let flops_per_token = flops_per_token(&config.model, &table, config.data.sequence);
        let tokens = config.tokens_per_step() * config.train.steps;
        let parameters = table.parameters() as u64;
        let stored_elements = table.stored_elements() as u64;
        Ok(PlanReport {
            name: config.name.clone(),
            device: config.device,
            dtype: config.dtype,
            vocab,
            parameters,
            non_embedding_parameters: parameters - embeddings,
            matmul_parameters,
            stored_elements,
            flops_per_token,
            flops_formula: FLOPS_FORMULA,
            tokens_per_step: config.tokens_per_step(),
            steps: config.train.steps,
            tokens,
            flops: flops_per_token as f64 * tokens as f64,
            bytes,
        })
    }
}

/// Of a GPU with compute capability 9.0 that need not be here.
pub fn plan_of_gpu(config: &Config, multiprocessors: usize) -> Result<Plan> {
    Plan::new(config, &AbsentGpu { dtype: config.dtype, multiprocessors })
}

/// N_matmul: weights that a token is multiplied with, the head included.
fn matmul_parameters(model: &ModelConfig, table: &ParameterTable) -> u64 {
    let count = |id| table.get(id).elements() as u64;
    let of_block = |layer| table.block(layer).matrices().map(count).iter().sum::<u64>();
    (1..=model.layers).map(of_block).sum::<u64>() + count(table.head())
}

/// Of training, by [`FLOPS_FORMULA`].
pub fn flops_per_token(model: &ModelConfig, table: &ParameterTable, sequence: usize) -> u64 {
    6 * matmul_parameters(model, table) + 6 * (model.layers * sequence * model.hidden) as u64
}

/// The tables that people read.
impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} on {} in {}, vocabulary {}",
            self.name, self.device, self.dtype, self.vocab
        )?;
        writeln!(f)?;
        for (what, count) in [
            ("parameters", self.parameters),
            ("  without embedding and head", self.non_embedding_parameters),
            ("  in matmuls (N_matmul)", self.matmul_parameters),
            ("stored elements", self.stored_elements),
            ("tokens per step", self.tokens_per_step),
            ("steps", self.steps),
            ("tokens", self.tokens),
            ("FLOPs per token", self.flops_per_token),
        ] {
            writeln!(f, "{what:<30}{:>22}", grouped(count))?;
        }
        writeln!(f, "{:<30}{:>22}", "FLOPs", format!("{:.3e}", self.flops))?;
        writeln!(f, "  FLOPs per token = {}", self.flops_formula)?;
        writeln!(f)?;
        writeln!(f, "{}", self.bytes)
    }
}

/// 134105856 as 134,105,856.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
