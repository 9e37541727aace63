//! The CPU backend: plain Rust over f32, or over f64 as the reference that everything else is
//! checked against.
//!
//! Large matmuls go through the `gemm` crate; the rest is ours. Work is cut into pieces of a
//! fixed size, never by the number of threads, so that any number of threads gives the same bits.
//! Inner loops are compiled once for each instruction set and chosen at run time.

mod adamw;
mod attention;
mod float;
mod loss;
mod matmul;
mod memory;
mod norm;
mod pointwise;
mod residual;
mod tile;
mod vectorise;

pub use float::Float;
pub(crate) use matmul::{Matrix, matmul};
pub use tile::TileProduct;
pub use vectorise::Level;

use std::ops::Range;

use memory::Memory;

use crate::backend::{
    AdamWStep, AttentionBackward, AttentionForward, Backend, CachedAttention, CrossEntropyBackward,
    CrossEntropyForward, EmbeddingBackward, EmbeddingForward, FlatBuffers, Footprint, GainGradient,
    LinearBackward, LinearForward, NormBackward, NormForward, Rotary, ScaledResidualBackward,
    ScaledResidualForward, SwiGluBackward, SwiGluForward, VectorCopy,
};
use crate::error::{Error, Result};
use crate::host_memory;
use crate::tensor::{BufferId, Kind, Shape, View};

#[derive(Default)]
pub struct Cpu<T> {
    memory: Memory,
    element: std::marker::PhantomData<T>,
}

impl<T: Float> Cpu<T> {
    pub fn new() -> Self {
        Cpu { memory: Memory::default(), element: std::marker::PhantomData }
    }

    /// The elements of a view, in the backend's own precision.
    pub fn values(&mut self, view: View) -> &[T] {
        let ([], [values]) = self.memory.borrow([], [view]);
        values
    }

    /// As [`Cpu::values`], to be written.
    pub fn values_mut(&mut self, view: View) -> &mut [T] {
        let ([values], []) = self.memory.borrow([view], []);
        values
    }

    fn rotate(&mut self, op: Rotary, inverse: bool) {
        let ([qkv], [table], [positions]) =
            self.memory.borrow_with_index::<T, 1, 1, 1>([op.qkv], [op.table], [op.positions]);
        pointwise::rotary(op.heads, table, positions, qkv, inverse);
    }
}

/// No indices, where `view` begins.
fn nothing_at(view: View) -> View {
    View { kind: Kind::Index, shape: Shape::new(&[0]), ..view }
}

/// The program, its threads, and a tokenizer and text of the size of the bundled ones.
const PROGRAM_BYTES: usize = 56 << 20;

impl<T: Float> Footprint for Cpu<T> {
    fn element_bytes(&self, kind: Kind) -> usize {
        match kind {
            Kind::Activation | Kind::Statistic => size_of::<T>(),
            Kind::Bf16 | Kind::LowerHalf => 2,
            Kind::Index => size_of::<i32>(),
        }
    }

    fn process_bytes(&self, [rows, columns]: [usize; 2]) -> usize {
        PROGRAM_BYTES + matmul::packing_bytes::<T>(rows, columns)
    }
}

impl<T: Float> Backend for Cpu<T> {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn available_bytes(&self) -> Result<u64> {
        Ok(host_memory::available_bytes())
    }

    fn peak_bytes(&self) -> Option<u64> {
        host_memory::peak_of_process()
    }

    fn allocate(&mut self, label: &'static str, bytes: usize) -> Result<BufferId> {
        self.memory.allocate(label, bytes)
    }

    fn on_worker<R: Send>(&mut self, work: impl FnOnce(&mut Self) -> R + Send) -> R {
        rayon::scope(|_| work(self))
    }

    fn write(&mut self, view: View, values: &[f32]) -> Result<()> {
        let to = self.values_mut(view);
        assert_eq!(to.len(), values.len(), "write: a view of {}", view.shape);
        to.iter_mut().zip(values).for_each(|(to, &value)| *to = T::of(value as f64));
        Ok(())
    }

    fn write_index(&mut self, view: View, values: &[i32]) -> Result<()> {
        let ([to], []) = self.memory.borrow::<i32, 1, 0>([view], []);
        to.copy_from_slice(values);
        Ok(())
    }

    fn read(&mut self, view: View, values: &mut [f32]) -> Result<()> {
        let from = self.values(view);
        assert_eq!(from.len(), values.len(), "read: a view of {}", view.shape);
        values.iter_mut().zip(from).for_each(|(value, from)| *value = from.to_f64() as f32);
        Ok(())
    }

    fn zero(&mut self, view: View) -> Result<()> {
        use rayon::prelude::*;
        self.values_mut(view).par_chunks_mut(1 << 16).for_each(|chunk| chunk.fill(T::ZERO));
        Ok(())
    }

    fn copy(&mut self, from: View, to: View) -> Result<()> {
        if from.kind == Kind::Index {
            let ([to], [from]) = self.memory.borrow::<i32, 1, 1>([to], [from]);
            to.copy_from_slice(from);
            return Ok(());
        }
        let ([to], [from]) = self.memory.borrow::<T, 1, 1>([to], [from]);
        matmul::parallel_copy(from, to);
        Ok(())
    }

    fn round(&mut self, from: View, to: View) -> Result<()> {
        self.copy(from, to)
    }

    fn add(&mut self, from: View, to: View) -> Result<()> {
        let ([to], [from]) = self.memory.borrow::<T, 1, 1>([to], [from]);
        matmul::parallel_add(from, to);
        Ok(())
    }

    fn embedding_forward(&mut self, op: EmbeddingForward) -> Result<()> {
        let EmbeddingForward { tokens, table, out } = op;
        let c = table.shape.columns();
        let ([out], [table], [tokens]) =
            self.memory.borrow_with_index::<T, 1, 1, 1>([out], [table], [tokens]);
        pointwise::embedding_forward(tokens, table, out, c);
        Ok(())
    }

    fn embedding_backward(&mut self, op: EmbeddingBackward) -> Result<()> {
        let EmbeddingBackward { tokens, d_out, d_table } = op;
        let c = d_table.shape.columns();
        let ([d_table], [d_out], [tokens]) =
            self.memory.borrow_with_index::<T, 1, 1, 1>([d_table], [d_out], [tokens]);
        pointwise::embedding_backward(tokens, d_out, d_table, c);
        Ok(())
    }

    fn norm_forward(&mut self, op: NormForward) -> Result<()> {
        let NormForward { spec, inp, gain, out, mean, rstd } = op;
        // Absent operands are empty views, so that one call borrows all of them.
        let empty = View { shape: crate::tensor::Shape::new(&[0]), ..inp };
        let ([out, rstd, mean_out], [inp, gain]) =
            self.memory.borrow::<T, 3, 2>([out, rstd, mean.unwrap_or(empty)], [inp, gain]);
        let mean = mean.map(|_| mean_out);
        norm::forward(spec, norm::Forward { inp, gain, out, mean, rstd });
        Ok(())
    }

    fn norm_backward(&mut self, op: NormBackward) -> Result<()> {
        let NormBackward { spec, inp, gain, mean, rstd, d_out, partial, d_inp, d_gain } = op;
        let accumulate = d_inp.accumulate;
        let ([partial, d_inp, d_gain], [inp, gain, mean_in, rstd, d_out]) =
            self.memory.borrow::<T, 3, 5>(
                [partial, d_inp.to, d_gain],
                [inp, gain, mean.unwrap_or(rstd), rstd, d_out],
            );
        let mean = mean.map(|_| mean_in);
        norm::backward(
            spec,
            norm::Backward { inp, gain, mean, rstd, d_out, partial, d_inp, accumulate, d_gain },
        );
        Ok(())
    }

    fn scaled_residual_forward(&mut self, op: ScaledResidualForward) -> Result<()> {
        let ScaledResidualForward { spec, inp, residual, gain, out } = op;
        let columns = inp.shape.columns();
        let ([out], [inp, residual, values]) =
            self.memory.borrow::<T, 1, 3>([out], [inp, residual, gain.unwrap_or(inp)]);
        residual::forward(spec, columns, inp, residual, gain.map(|_| values), out);
        Ok(())
    }

    fn scaled_residual_backward(&mut self, op: ScaledResidualBackward) -> Result<()> {
        let ScaledResidualBackward { spec, d_out, d_inp, gain } = op;
        let columns = d_out.shape.columns();
        let Some(gain) = gain else {
            let ([d_out, d_inp], []) = self.memory.borrow::<T, 2, 0>([d_out, d_inp], []);
            residual::backward(spec, columns, d_out, d_inp, None);
            return Ok(());
        };
        let GainGradient { inp, gain, partial, d_gain } = gain;
        let ([d_out, d_inp, partial, d_gain], [inp, gain]) =
            self.memory.borrow::<T, 4, 2>([d_out, d_inp, partial, d_gain], [inp, gain]);
        let gain = residual::Gain { inp, gain, partial, d_gain };
        residual::backward(spec, columns, d_out, d_inp, Some(gain));
        Ok(())
    }

    fn linear_forward(&mut self, op: LinearForward) -> Result<()> {
        let LinearForward { inp, weight, residual, out } = op;
        let sizes = [inp.shape.rows(), inp.shape.columns(), out.shape.columns()];
        let ([out], [inp, weight, add]) =
            self.memory.borrow::<T, 1, 3>([out], [inp, weight, residual.unwrap_or(inp)]);
        matmul::linear_forward(inp, weight, residual.map(|_| add), out, sizes);
        Ok(())
    }

    fn linear_backward(&mut self, op: LinearBackward) -> Result<()> {
        let LinearBackward { inp, weight, d_out, d_inp, d_weight } = op;
        let sizes = [inp.shape.rows(), inp.shape.columns(), d_out.shape.columns()];
        let accumulate = d_inp.accumulate;
        let ([d_inp, d_weight], [inp, weight, d_out]) =
            self.memory.borrow::<T, 2, 3>([d_inp.to, d_weight], [inp, weight, d_out]);
        matmul::linear_d_inp(weight, d_out, d_inp, accumulate, sizes);
        matmul::linear_d_weight(inp, d_out, d_weight, sizes);
        Ok(())
    }

    fn rotary_forward(&mut self, op: Rotary) -> Result<()> {
        self.rotate(op, false);
        Ok(())
    }

    fn rotary_backward(&mut self, op: Rotary) -> Result<()> {
        self.rotate(op, true);
        Ok(())
    }

    fn attention_forward(&mut self, op: AttentionForward) -> Result<()> {
        let AttentionForward { spec, qkv, document_starts, out, log_sum_exp } = op;
        let starts = document_starts.unwrap_or(nothing_at(qkv));
        let ([out, log_sum_exp], [qkv], [starts]) =
            self.memory.borrow_with_index::<T, 2, 1, 1>([out, log_sum_exp], [qkv], [starts]);
        let documents = attention::Documents(document_starts.map(|_| starts));
        attention::forward(spec, qkv, documents, out, log_sum_exp);
        Ok(())
    }

    fn attention_backward(&mut self, op: AttentionBackward) -> Result<()> {
        let AttentionBackward { spec, qkv, document_starts, out, log_sum_exp, d_out, delta, d_qkv } =
            op;
        let starts = document_starts.unwrap_or(nothing_at(qkv));
        let ([delta, d_qkv], [qkv, out, log_sum_exp, d_out], [starts]) =
            self.memory.borrow_with_index::<T, 2, 4, 1>(
                [delta, d_qkv],
                [qkv, out, log_sum_exp, d_out],
                [starts],
            );
        let documents = attention::Documents(document_starts.map(|_| starts));
        attention::backward(
            spec,
            attention::Backward { qkv, documents, out, log_sum_exp, d_out, delta, d_qkv },
        );
        Ok(())
    }

    fn cached_attention_forward(&mut self, op: CachedAttention) -> Result<()> {
        let CachedAttention { heads, qkv, keys, values, positions, out } = op;
        let ([keys, values, out], [qkv], [positions]) =
            self.memory.borrow_with_index::<T, 3, 1, 1>([keys, values, out], [qkv], [positions]);
        attention::cached(heads, qkv, keys, values, positions, out);
        Ok(())
    }

    fn swiglu_forward(&mut self, op: SwiGluForward) -> Result<()> {
        let SwiGluForward { inp, out } = op;
        let f = out.shape.columns();
        let ([out], [inp]) = self.memory.borrow::<T, 1, 1>([out], [inp]);
        pointwise::swiglu_forward(inp, out, f);
        Ok(())
    }

    fn swiglu_backward(&mut self, op: SwiGluBackward) -> Result<()> {
        let SwiGluBackward { inp, d_out, d_inp } = op;
        let f = d_out.shape.columns();
        let ([d_inp], [inp, d_out]) = self.memory.borrow::<T, 1, 2>([d_inp], [inp, d_out]);
        pointwise::swiglu_backward(inp, d_out, d_inp, f);
        Ok(())
    }

    fn cross_entropy_forward(&mut self, op: CrossEntropyForward) -> Result<()> {
        let CrossEntropyForward { spec, inp, weight, targets, logits, losses } = op;
        let [v, c] = [weight.shape.rows(), weight.shape.columns()];
        let ([logits, losses], [inp, weight], [targets]) =
            self.memory.borrow_with_index::<T, 2, 2, 1>([logits, losses], [inp, weight], [targets]);
        let inputs = loss::Inputs { inp, weight, targets, logits, losses, c, v };
        loss::cross_entropy(spec, inputs, None);
        Ok(())
    }

    fn cross_entropy_backward(&mut self, op: CrossEntropyBackward) -> Result<()> {
        let CrossEntropyBackward { forward, scale, d_inp, d_weight } = op;
        let CrossEntropyForward { spec, inp, weight, targets, logits, losses } = forward;
        let [v, c] = [weight.shape.rows(), weight.shape.columns()];
        let ([logits, losses, d_inp, d_weight], [inp, weight, scale], [targets]) =
            self.memory.borrow_with_index::<T, 4, 3, 1>(
                [logits, losses, d_inp, d_weight],
                [inp, weight, scale],
                [targets],
            );
        let inputs = loss::Inputs { inp, weight, targets, logits, losses, c, v };
        let gradients = loss::Gradients { scale: scale[0], d_inp, d_weight };
        loss::cross_entropy(spec, inputs, Some(gradients));
        Ok(())
    }

    fn prepare_optimizer(
        &mut self,
        buffers: &FlatBuffers,
        _: &[Range<usize>],
        _: &[VectorCopy],
    ) -> Result<()> {
        match [buffers.parameters.kind, buffers.moment1.kind] {
            [Kind::Statistic, Kind::Statistic] => Ok(()),
            _ => Err(Error::Config {
                what: "optimizer.moments and optimizer.master: the CPU keeps both in f32".into(),
                remedy: "set both to f32, or train on cuda or simt".into(),
            }),
        }
    }

    fn gradient_norm(&mut self, buffers: &FlatBuffers) -> Result<()> {
        let ([grad_norm], [gradients]) =
            self.memory.borrow::<T, 1, 1>([buffers.grad_norm], [buffers.gradients]);
        grad_norm[0] = T::of(adamw::norm(gradients));
        Ok(())
    }

    fn adamw(&mut self, buffers: &FlatBuffers, step: &AdamWStep) -> Result<()> {
        let ([parameters, moment1, moment2], [gradients, grad_norm]) =
            self.memory.borrow::<T, 3, 2>(
                [buffers.parameters, buffers.moment1, buffers.moment2],
                [buffers.gradients, buffers.grad_norm],
            );
        let buffers = adamw::Buffers { parameters, gradients, moment1, moment2 };
        adamw::update(buffers, grad_norm[0].to_f64(), step);
        Ok(())
    }
}
