//! The global gradient norm, and AdamW over flat buffers that all decay, with its state stored in
//! each way.

use std::slice;

use super::Options;
use super::report::{Row, TimedRows};
use super::sizes;
use super::timing::{Copies, on_cpu, samples};
use crate::backend::AdamWStep;
use crate::config::{Dtype, Master};
use crate::cuda::adamw::{AdamW, AdamWBuffers, FlatPart};
use crate::cuda::{Driver, StreamId};
use crate::error::Result;
use crate::predict::cost::{Cost, element_bytes};

/// `None`: what suits the machine.
#[derive(Clone, Default, Debug)]
pub struct AdamwRequest {
    /// N
    pub elements: Option<usize>,
}

pub(super) fn rows(
    driver: &mut dyn Driver,
    request: &AdamwRequest,
    options: Options,
    table: &mut TimedRows,
) -> Result<()> {
    let default = if on_cpu(driver) { 1 << 18 } else { 1 << 28 };
    let elements = request.elements.unwrap_or(default);
    sizes::check("an update", &[elements])?;
    table.push(norm(driver, options, elements)?);
    let masters: &[Master] = match options.kernel_dtype() {
        Dtype::F32 => &[Master::F32],
        Dtype::Bf16 => &[Master::F32, Master::Split],
    };
    for &master in masters {
        for moments in [Dtype::F32, Dtype::Bf16] {
            table.push(update(driver, options, part(elements, master, moments))?);
        }
    }
    Ok(())
}

fn norm(driver: &mut dyn Driver, options: Options, elements: usize) -> Result<Row> {
    let flat = element_bytes(Dtype::F32) * elements as u64;
    let copies = Copies::new(driver, flat, flat + 4, |buffers| {
        let gradients = buffers.normals("gradients", Dtype::F32, elements)?;
        Ok((gradients, buffers.zeros("gradient norm", 4)?))
    })?;
    let kernels = AdamW::new(driver, part(elements, Master::F32, Dtype::F32), &[], &[])?;
    let samples = samples(driver, options.samples);
    let timing = copies.time(driver, samples, |driver, &(gradients, grad_norm)| {
        kernels.gradient_norm(driver, StreamId::MAIN, gradients, grad_norm)
    })?;
    kernels.release(driver)?;
    copies.release(driver)?;
    Ok(Row::new(Cost::gradient_norm(elements), &timing))
}

fn update(driver: &mut dyn Driver, options: Options, part: FlatPart) -> Result<Row> {
    let (dtype, elements) = (options.kernel_dtype(), part.elements as usize);
    let whole = 0..elements;
    let decay = slice::from_ref(&whole);
    let bytes = |dtype| element_bytes(dtype) * part.elements;
    let (gradients, moment) = (bytes(Dtype::F32), bytes(part.moments));
    let parameters = match part.master {
        Master::F32 => bytes(Dtype::F32),
        Master::Split => bytes(Dtype::Bf16),
    };
    let working = match dtype {
        Dtype::F32 => None,
        Dtype::Bf16 => Some(bytes(dtype)),
    };
    let allocated = parameters + gradients + 2 * moment + working.unwrap_or(0) + 8;
    let copies = Copies::new(driver, gradients, allocated, |buffers| {
        Ok(AdamWBuffers {
            parameters: match part.master {
                Master::F32 => buffers.normals("parameters", Dtype::F32, elements)?,
                Master::Split => buffers.normals("parameters", Dtype::Bf16, elements)?,
            },
            gradients: buffers.normals("gradients", Dtype::F32, elements)?,
            moment1: buffers.zeros("moment1", moment)?,
            moment2: buffers.zeros("moment2", moment)?,
            working: working.map(|bytes| buffers.zeros("working copy", bytes)).transpose()?,
            vectors: Some(buffers.zeros("copies of vectors", 4)?),
            grad_norm: buffers.zeros("gradient norm", 4)?,
        })
    })?;
    let kernels = AdamW::new(driver, part, decay, &[])?;
    let step = AdamWStep {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        decoupled: true,
        correction1: 1.0 - 0.9,
        correction2: 1.0 - 0.95,
        clip: 1.0,
        decay,
        seed: 1,
        update: 1,
    };
    kernels.prepare(driver, StreamId::MAIN, &step)?;
    let samples = samples(driver, options.samples);
    let timing =
        copies.time(driver, samples, |driver, it| kernels.launch(driver, StreamId::MAIN, it))?;
    kernels.release(driver)?;
    copies.release(driver)?;
    Ok(Row::new(Cost::adamw(dtype, part.master, part.moments, elements), &timing))
}

fn part(elements: usize, master: Master, moments: Dtype) -> FlatPart {
    FlatPart { first: 0, elements: elements as u64, master, moments }
}
