//! The plain bf16 formulas: the CPU backend in f32, with every operand of a matmul and every
//! activation rounded to bf16 where a kernel stores it.
//!
//! It says how exact a bf16 model can be expected to be. Sums, statistics and master weights stay
//! f32; matmuls read a rounded copy of the weights.

use std::collections::HashMap;

use half::bf16;
use isobath::Result;
use isobath::backend::{
    AdamWStep, AttentionBackward, AttentionForward, Backend, CachedAttention, CrossEntropyBackward,
    CrossEntropyForward, EmbeddingBackward, EmbeddingForward, FlatBuffers, Footprint,
    LinearBackward, LinearForward, NormBackward, NormForward, Rotary, ScaledResidualBackward,
    ScaledResidualForward, Sink, SwiGluBackward, SwiGluForward,
};
use isobath::cpu::Cpu;
use isobath::tensor::{BufferId, IGNORE_INDEX, Kind, Shape, View};

#[derive(Default)]
pub struct Plain {
    cpu: Cpu<f32>,
    /// Rounded weights, by where the master lies.
    weights: HashMap<(BufferId, usize), View>,
}

fn rounded(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

impl Plain {
    fn round_in_place(&mut self, view: View) {
        self.cpu.values_mut(view).iter_mut().for_each(|value| *value = rounded(*value));
    }

    /// The rounded copy of a weight, made anew.
    fn weight(&mut self, master: View) -> Result<View> {
        let key = (master.buffer, master.offset);
        let copy = match self.weights.get(&key) {
            Some(&copy) => copy,
            None => {
                let buffer = self.cpu.allocate("weight", 4 * master.shape.elements())?;
                View { buffer, offset: 0, ..master }
            }
        };
        self.weights.insert(key, copy);
        self.cpu.copy(master, copy)?;
        self.round_in_place(copy);
        Ok(copy)
    }

    /// Rows `first..first + rows` of a matrix or vector.
    fn rows(view: View, first: usize, rows: usize) -> View {
        let sizes = view.shape.sizes();
        let columns = sizes.get(1).copied().unwrap_or(1);
        let shape = match sizes.len() {
            1 => Shape::new(&[rows]),
            _ => Shape::new(&[rows, columns]),
        };
        View { offset: view.offset + 4 * first * columns, shape, ..view }
    }

    fn cross_entropy(
        &mut self,
        op: CrossEntropyForward,
        gradients: Option<(f32, View, View)>,
    ) -> Result<()> {
        let CrossEntropyForward { spec, inp, weight, targets, logits, losses } = op;
        let (weight, targets) = (self.weight(weight)?, self.index(targets));
        let columns = weight.shape.rows();
        for first in (0..targets.len()).step_by(spec.chunk) {
            let rows = spec.chunk.min(targets.len() - first);
            let (inp, logits) = (Self::rows(inp, first, rows), Self::rows(logits, 0, rows));
            self.cpu.linear_forward(LinearForward { inp, weight, residual: None, out: logits })?;
            self.round_in_place(logits);
            let mut found = Vec::new();
            let values = self.cpu.values_mut(logits).chunks_mut(columns);
            for (row, &target) in values.zip(&targets[first..]) {
                if target == IGNORE_INDEX {
                    row.fill(0.0);
                    found.push(0.0);
                    continue;
                }
                let (real, padding) = row.split_at_mut(spec.classes);
                let target_logit = real[target as usize];
                let max = real.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let z: f32 = real.iter().map(|logit| (logit - max).exp()).sum();
                let (log_z, z_loss) = (z.ln() + max, spec.z_loss as f32);
                found.push(log_z - target_logit + z_loss * log_z * log_z);
                if let Some((scale, ..)) = gradients {
                    for (class, logit) in real.iter_mut().enumerate() {
                        let p = (*logit - max).exp() / z * (1.0 + 2.0 * z_loss * log_z);
                        let hit = if class == target as usize { 1.0 } else { 0.0 };
                        *logit = rounded(scale * (p - hit));
                    }
                    padding.fill(0.0);
                }
            }
            self.cpu.values_mut(Self::rows(losses, first, rows)).copy_from_slice(&found);
            if let Some((_, d_inp, d_weight)) = gradients {
                let d_inp = Sink { to: Self::rows(d_inp, first, rows), accumulate: false };
                self.cpu.linear_backward(LinearBackward {
                    inp,
                    weight,
                    d_out: logits,
                    d_inp,
                    d_weight,
                })?;
                self.round_in_place(d_inp.to);
            }
        }
        Ok(())
    }

    fn index(&mut self, view: View) -> Vec<i32> {
        let as_f32 = View { kind: Kind::Statistic, ..view };
        self.cpu.values(as_f32).iter().map(|value| value.to_bits() as i32).collect()
    }
}

impl Footprint for Plain {
    fn element_bytes(&self, kind: Kind) -> usize {
        self.cpu.element_bytes(kind)
    }
    fn process_bytes(&self, largest: [usize; 2]) -> usize {
        self.cpu.process_bytes(largest)
    }
}

impl Backend for Plain {
    fn name(&self) -> &'static str {
        "plain bf16"
    }
    fn available_bytes(&self) -> Result<u64> {
        self.cpu.available_bytes()
    }
    fn allocate(&mut self, label: &'static str, bytes: usize) -> Result<BufferId> {
        self.cpu.allocate(label, bytes)
    }
    fn write(&mut self, view: View, values: &[f32]) -> Result<()> {
        self.cpu.write(view, values)
    }
    fn write_index(&mut self, view: View, values: &[i32]) -> Result<()> {
        self.cpu.write_index(view, values)
    }
    fn read(&mut self, view: View, values: &mut [f32]) -> Result<()> {
        self.cpu.read(view, values)
    }
    fn zero(&mut self, view: View) -> Result<()> {
        self.cpu.zero(view)
    }
    fn copy(&mut self, from: View, to: View) -> Result<()> {
        self.cpu.copy(from, to)
    }
    fn round(&mut self, from: View, to: View) -> Result<()> {
        self.cpu.copy(from, to)
    }
    fn add(&mut self, from: View, to: View) -> Result<()> {
        self.cpu.add(from, to)?;
        self.round_in_place(to);
        Ok(())
    }
    fn embedding_forward(&mut self, op: EmbeddingForward) -> Result<()> {
        self.cpu.embedding_forward(op)?;
        self.round_in_place(op.out);
        Ok(())
    }
    fn embedding_backward(&mut self, op: EmbeddingBackward) -> Result<()> {
        self.cpu.embedding_backward(op)
    }
    fn norm_forward(&mut self, op: NormForward) -> Result<()> {
        self.cpu.norm_forward(op)?;
        self.round_in_place(op.out);
        Ok(())
    }
    fn norm_backward(&mut self, op: NormBackward) -> Result<()> {
        self.cpu.norm_backward(op)?;
        self.round_in_place(op.d_inp.to);
        Ok(())
    }
    fn scaled_residual_forward(&mut self, op: ScaledResidualForward) -> Result<()> {
        self.cpu.scaled_residual_forward(op)?;
        self.round_in_place(op.out);
        Ok(())
    }
    fn scaled_residual_backward(&mut self, op: ScaledResidualBackward) -> Result<()> {
        self.cpu.scaled_residual_backward(op)?;
        self.round_in_place(op.d_out);
        self.round_in_place(op.d_inp);
        Ok(())
    }
    fn linear_forward(&mut self, op: LinearForward) -> Result<()> {
        let weight = self.weight(op.weight)?;
        self.cpu.linear_forward(LinearForward { weight, ..op })?;
        self.round_in_place(op.out);
        Ok(())
    }
    fn linear_backward(&mut self, op: LinearBackward) -> Result<()> {
        let weight = self.weight(op.weight)?;
        self.cpu.linear_backward(LinearBackward { weight, ..op })?;
        self.round_in_place(op.d_inp.to);
        Ok(())
    }
    fn rotary_forward(&mut self, op: Rotary) -> Result<()> {
        self.cpu.rotary_forward(op)?;
        self.round_in_place(op.qkv);
        Ok(())
    }
    fn rotary_backward(&mut self, op: Rotary) -> Result<()> {
        self.cpu.rotary_backward(op)?;
        self.round_in_place(op.qkv);
        Ok(())
    }
    fn attention_forward(&mut self, op: AttentionForward) -> Result<()> {
        self.cpu.attention_forward(op)?;
        self.round_in_place(op.out);
        Ok(())
    }
    fn attention_backward(&mut self, op: AttentionBackward) -> Result<()> {
        self.cpu.attention_backward(op)?;
        self.round_in_place(op.d_qkv);
        Ok(())
    }
    fn cached_attention_forward(&mut self, op: CachedAttention) -> Result<()> {
        self.cpu.cached_attention_forward(op)?;
        self.round_in_place(op.out);
        Ok(())
    }
    fn swiglu_forward(&mut self, op: SwiGluForward) -> Result<()> {
        self.cpu.swiglu_forward(op)?;
        self.round_in_place(op.out);
        Ok(())
    }
    fn swiglu_backward(&mut self, op: SwiGluBackward) -> Result<()> {
        self.cpu.swiglu_backward(op)?;
        self.round_in_place(op.d_inp);
        Ok(())
    }
    fn cross_entropy_forward(&mut self, op: CrossEntropyForward) -> Result<()> {
        self.cross_entropy(op, None)
    }
    fn cross_entropy_backward(&mut self, op: CrossEntropyBackward) -> Result<()> {
        let CrossEntropyBackward { forward, scale, d_inp, d_weight } = op;
        let scale = self.cpu.values(scale)[0];
        self.cross_entropy(forward, Some((scale, d_inp, d_weight)))
    }
    fn gradient_norm(&mut self, buffers: &FlatBuffers) -> Result<()> {
        self.cpu.gradient_norm(buffers)
    }
    fn adamw(&mut self, buffers: &FlatBuffers, step: &AdamWStep) -> Result<()> {
        self.cpu.adamw(buffers, step)
    }
}
