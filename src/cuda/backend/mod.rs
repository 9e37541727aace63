//! Backend over kernels/: which kernel runs each op, on whatever machine the driver is.
//!
//! Matmul operands and activations are bf16, or f32 for parity; statistics, losses, master weights
//! and gradients are f32. Kernels are looked up, products planned and tensor maps made when a
//! program is prepared; a step then only launches, or replays what was recorded as a graph, on one
//! stream; what is read after it is waited for, and reports what went wrong. The layers of each op
//! know the kernels; here stand only addresses.

mod footprint;
mod layers;
mod loss;

use std::ffi::CStr;
use std::ops::Range;

use half::bf16;

use layers::Layers;

use crate::backend::{
    AdamWStep, AttentionBackward, AttentionForward, Backend, CachedAttention, CrossEntropyBackward,
    CrossEntropyForward, EmbeddingBackward, EmbeddingForward, FlatBuffers, Footprint, HeadSpec,
    LinearBackward, LinearForward, NormBackward, NormForward, OFFLOAD_CHUNK, Reading, Recording,
    Rotary, ScaledResidualBackward, ScaledResidualForward, SwiGluBackward, SwiGluForward,
    VectorCopy,
};
use crate::config::{Dtype, Master};
use crate::cuda::adamw::{AdamW, AdamWBuffers, FlatPart};
use crate::cuda::attention::Angles;
use crate::cuda::gemm::{Layout, Output, Product, Rotation};
use crate::cuda::nvtx;
use crate::cuda::offload::Offload;
use crate::cuda::peaks::MatmulPeaks;
use crate::cuda::pointwise;
use crate::cuda::residual::{Gain, GainBackward, ResidualBackward, ResidualForward};
use crate::cuda::transfers::Transfers;
use crate::cuda::{
    Allocation, DevicePointer, Driver, Family, Fusion, Fusions, GraphId, StreamId, Switches, halves,
};
use crate::error::Result;
use crate::sensors::Sensors;
use crate::tensor::{BufferId, Kind, View};

const STREAM: StreamId = StreamId::MAIN;
/// Elements whose halves lie in host memory at one time on their way.
const STAGED_ELEMENTS: usize = 1 << 22;

pub struct Cuda {
    driver: Box<dyn Driver>,
    dtype: Dtype,
    family: Option<Family>,
    buffers: Vec<Allocation>,
    /// Those that lie in the host's memory.
    on_host: Vec<BufferId>,
    offload_chunk: usize,
    layers: Layers,
    transfers: Option<Transfers>,
    /// The program may enqueue a step before the previous one is over.
    steps_ahead: bool,
    /// Of what the layers allocated when they were made.
    scratch_bytes: u64,
    /// Ops are checked and made ready, nothing is launched.
    preparing: bool,
    /// What can be recorded is replayed as a graph.
    graphs: bool,
    /// Equal steps give equal bits.
    deterministic: bool,
    fusions: Fusions,
}

impl Cuda {
    /// `family`: of the kernels for matmuls and attention; `None`: the best for this machine.
    ///
    /// Errors: a machine or build without the kernels that every model needs.
    pub fn new(mut driver: Box<dyn Driver>, dtype: Dtype, family: Option<Family>) -> Result<Self> {
        let allocated_before = driver.allocated_bytes();
        let layers = Layers::new(&mut *driver, dtype, family)?;
        let scratch_bytes = driver.allocated_bytes() - allocated_before;
        driver.overlap(true);
        let steps_ahead = driver.is_asynchronous();
        Ok(Cuda {
            driver,
            dtype,
            family,
            buffers: Vec::new(),
            on_host: Vec::new(),
            offload_chunk: OFFLOAD_CHUNK,
            layers,
            transfers: None,
            steps_ahead,
            scratch_bytes,
            preparing: false,
            graphs: true,
            deterministic: true,
            fusions: Fusions::default(),
        })
    }

    /// Without graphs, every kernel of every step is launched on its own. The bits are the same.
    pub fn with_graphs(self, graphs: bool) -> Self {
        Cuda { graphs, ..self }
    }

    /// Without overlap, each kernel begins when the one before it has ended. The bits are the
    /// same.
    pub fn with_overlap(mut self, overlap: bool) -> Self {
        self.driver.overlap(overlap);
        self
    }

    /// Without it, several blocks may add to attention's gradients in the order in which they come.
    /// Before anything is prepared.
    pub fn with_deterministic(self, deterministic: bool) -> Self {
        Cuda { deterministic, ..self }
    }

    /// Only these; without one, its op has a kernel of its own, which may round once more. Before
    /// anything is planned.
    pub fn with_fusions(self, fusions: Fusions) -> Self {
        Cuda { fusions, ..self }
    }

    pub fn with_switches(mut self, switches: Switches) -> Self {
        self.steps_ahead = switches.steps_ahead.unwrap_or(self.steps_ahead);
        self.with_graphs(switches.graphs).with_overlap(switches.overlap)
    }

    /// Moments in host memory pass through in chunks of as many elements, a multiple of 64.
    pub fn with_offload_chunk(self, elements: usize) -> Self {
        Cuda { offload_chunk: elements, ..self }
    }

    pub fn driver(&mut self) -> &mut dyn Driver {
        &mut *self.driver
    }

    /// Copies to the device after all that is enqueued; waited for where nothing was prepared.
    fn send(&mut self, bytes: &[u8], to: DevicePointer) -> Result<()> {
        match &mut self.transfers {
            Some(transfers) => transfers.send(&mut *self.driver, bytes, to),
            None => self.driver.to_device(STREAM, bytes, to),
        }
    }

    fn bytes(&self, view: View) -> usize {
        view.shape.elements() * self.element_bytes(view.kind)
    }

    fn address(&self, view: View) -> DevicePointer {
        let buffer = &self.buffers[view.buffer.0 as usize];
        let end = (view.offset + self.bytes(view)) as u64;
        assert!(end <= buffer.bytes, "a view up to byte {end} of a buffer of {}", buffer.bytes);
        buffer.address.offset(view.offset as u64)
    }

    /// inp weight^T, and what `output` makes of it, `columns` wide.
    fn multiply_forward(
        &mut self,
        op: LinearForward,
        columns: usize,
        output: Output,
    ) -> Result<()> {
        self.multiply(Product {
            layout: Layout::Nt,
            m: op.inp.shape.rows(),
            n: columns,
            k: op.inp.shape.columns(),
            a: self.address(op.inp),
            b: self.address(op.weight),
            out: self.address(op.out),
            output,
        })
    }

    /// d_out weight to `to`, as `output` says; d_weight += d_out^T inp.
    fn multiply_backward(
        &mut self,
        op: LinearBackward,
        to: DevicePointer,
        output: Output,
    ) -> Result<()> {
        let LinearBackward { inp, weight, d_out, d_weight, .. } = op;
        let (tokens, inner, outer) = (inp.shape.rows(), inp.shape.columns(), d_out.shape.columns());
        self.multiply(Product {
            layout: Layout::Nn,
            m: tokens,
            n: inner,
            k: outer,
            a: self.address(d_out),
            b: self.address(weight),
            out: to,
            output,
        })?;
        self.multiply(Product {
            layout: Layout::Tn,
            m: outer,
            n: inner,
            k: tokens,
            a: self.address(d_out),
            b: self.address(inp),
            out: self.address(d_weight),
            output: Output::Accumulate,
        })
    }

    fn rotate(&mut self, op: Rotary, inverse: bool) -> Result<()> {
        let rows = op.qkv.shape.rows();
        let Rotary { heads, table, positions, qkv } = op.map(&mut |view, _| self.address(view));
        let Some((driver, pointwise)) = self.pointwise() else { return Ok(()) };
        let args = pointwise::Rotary { table, positions, qkv, inverse };
        pointwise.rotary(driver, STREAM, heads, rows, &args)
    }

    /// Whether this machine's kernels for this type have it, in a model with such heads.
    pub fn has(&self, fusion: Fusion, heads: HeadSpec) -> bool {
        let null = DevicePointer::NULL;
        let gemm = &self.layers.gemm;
        match fusion {
            Fusion::Residual => true,
            Fusion::Rotary => {
                let (columns, head_dim) = (heads.rotated_columns(), heads.head_dim);
                let rotation = Rotation { table: null, positions: null, columns, head_dim };
                gemm.fuses(Layout::Nt, Output::Rotate(rotation))
            }
            Fusion::SwiGlu => gemm.fuses(Layout::Nt, Output::SwiGlu { product: null }),
            Fusion::SwiGluBackward => {
                gemm.fuses(Layout::Nn, Output::SwiGluGradient { gate_up: null })
            }
            Fusion::RotaryBackward => self.attention_family() == Some(Family::Sm90),
        }
    }

    /// Of the kernels that attention has here.
    fn attention_family(&self) -> Option<Family> {
        let properties = self.driver.properties();
        let families = Family::chosen(self.name(), properties, self.dtype, self.family);
        families.unwrap_or_default().first().copied()
    }

    fn fuses(&self, fusion: Fusion, layout: Layout, output: Output) -> bool {
        self.fusions.has(fusion) && self.layers.gemm.fuses(layout, output)
    }

    fn gain(&self, gain: View) -> Gain {
        Gain { gain: self.address(gain), count: gain.shape.elements() }
    }

    /// Row `row` of a matrix, element `row` of a vector.
    fn row(&self, view: View, row: usize) -> DevicePointer {
        let columns = if view.shape.sizes().len() > 1 { view.shape.columns() } else { 1 };
        let bytes = row * columns * self.element_bytes(view.kind);
        self.address(view).offset(bytes as u64)
    }
}

impl Backend for Cuda {
    fn name(&self) -> &'static str {
        self.driver.device()
    }

    fn machine(&self) -> String {
        self.driver.properties().name.clone()
    }

    fn peak_flops_per_second(&self) -> Option<f64> {
        let peaks = MatmulPeaks::of(&self.driver.properties().name)?;
        Some(peaks.flops_per_second(self.dtype))
    }

    fn available_bytes(&self) -> Result<u64> {
        self.driver.free_bytes()
    }

    fn allocated_bytes(&self) -> Option<u64> {
        Some(self.driver.allocated_bytes())
    }

    fn peak_bytes(&self) -> Option<u64> {
        self.driver.peak_bytes()
    }

    fn own_free_bytes(&self) -> Option<u64> {
        self.driver.own_free_bytes()
    }

    fn sensors(&self) -> Option<Sensors> {
        self.driver.sensors()
    }

    fn begin_preparation(&mut self) -> bool {
        self.preparing = true;
        true
    }

    fn end_preparation(&mut self) {
        self.preparing = false;
    }

    fn record(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<Option<Recording>> {
        if !self.graphs {
            return Ok(None);
        }
        self.driver.begin_capture(STREAM)?;
        let worked = work(self);
        let graph = self.driver.end_capture(STREAM);
        if let (Err(_), Ok(unfinished)) = (&worked, &graph) {
            self.driver.release_graph(*unfinished)?;
        }
        worked?;
        Ok(Some(Recording(graph?.0)))
    }

    fn replay(&mut self, recording: Recording) -> Result<()> {
        self.driver.launch_graph(GraphId(recording.0), STREAM)
    }

    /// For NVTX; not while nothing is launched.
    fn begin_range(&mut self, name: &'static CStr) {
        if !self.preparing {
            nvtx::push(name);
        }
    }

    fn end_range(&mut self) {
        if !self.preparing {
            nvtx::pop();
        }
    }

    fn prepare_optimizer(
        &mut self,
        buffers: &FlatBuffers,
        decay: &[Range<usize>],
        vectors: &[VectorCopy],
    ) -> Result<()> {
        let part = FlatPart {
            first: buffers.first as u64,
            elements: buffers.parameters.shape.elements() as u64,
            master: match buffers.parameters.kind {
                Kind::LowerHalf => Master::Split,
                _ => Master::F32,
            },
            moments: match buffers.moment1.kind {
                Kind::Bf16 => Dtype::Bf16,
                _ => Dtype::F32,
            },
        };
        if self.on_host.contains(&buffers.moment1.buffer) && self.layers.offload.is_none() {
            let chunk = self.offload_chunk as u64;
            self.layers.offload = Some(Offload::new(&mut *self.driver, chunk, part.moments)?);
        }
        let optimizer = AdamW::new(&mut *self.driver, part, decay, vectors)?;
        self.layers.optimizers.push((buffers.parameters, optimizer));
        Ok(())
    }

    fn allocate(&mut self, label: &'static str, bytes: usize) -> Result<BufferId> {
        // An empty buffer has an address, too.
        let buffer = self.driver.allocate(label, bytes.max(1) as u64)?;
        self.driver.fill(STREAM, buffer.address, buffer.bytes, 0)?;
        self.buffers.push(buffer);
        Ok(BufferId(self.buffers.len() as u32 - 1))
    }

    fn allocate_host(&mut self, label: &'static str, bytes: usize) -> Result<BufferId> {
        let buffer = self.driver.allocate_host(label, bytes.max(1) as u64)?;
        self.buffers.push(buffer);
        let id = BufferId(self.buffers.len() as u32 - 1);
        self.on_host.push(id);
        Ok(id)
    }

    fn steps_ahead(&self) -> bool {
        self.steps_ahead
    }

    fn prepare_transfers(&mut self, sent: usize, read: usize) -> Result<()> {
        self.transfers = Some(Transfers::new(&mut *self.driver, sent, read)?);
        Ok(())
    }

    fn write(&mut self, view: View, values: &[f32]) -> Result<()> {
        assert_eq!(view.shape.elements(), values.len(), "write: a view of {}", view.shape);
        let to = self.address(view);
        if self.element_bytes(view.kind) == 4 {
            return self.send(bytemuck::cast_slice(values), to);
        }
        let values: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
        self.send(bytemuck::cast_slice(&values), to)
    }

    fn write_index(&mut self, view: View, values: &[i32]) -> Result<()> {
        assert_eq!(view.shape.elements(), values.len(), "write: a view of {}", view.shape);
        let to = self.address(view);
        self.send(bytemuck::cast_slice(values), to)
    }

    fn read(&mut self, view: View, values: &mut [f32]) -> Result<()> {
        assert_eq!(view.shape.elements(), values.len(), "read: a view of {}", view.shape);
        let from = self.address(view);
        if self.element_bytes(view.kind) == 4 {
            return self.driver.to_host(STREAM, from, bytemuck::cast_slice_mut(values));
        }
        let mut narrow = vec![bf16::ZERO; values.len()];
        self.driver.to_host(STREAM, from, bytemuck::cast_slice_mut(&mut narrow))?;
        values.iter_mut().zip(narrow).for_each(|(value, narrow)| *value = narrow.to_f32());
        Ok(())
    }

    fn begin_read(&mut self, views: &[View]) -> Result<Reading> {
        let range = |&view: &View| {
            assert_eq!(self.element_bytes(view.kind), 4, "a reading of what is no f32");
            (self.address(view), self.bytes(view) as u64)
        };
        let ranges: Vec<_> = views.iter().map(range).collect();
        let transfers = self.transfers.as_mut().expect("transfers were prepared");
        Ok(Reading::Place(transfers.begin_read(&mut *self.driver, &ranges)?))
    }

    fn finish_read(&mut self, reading: Reading, values: &mut [f32]) -> Result<()> {
        let Reading::Place(index) = reading else { unreachable!("nothing was read at once") };
        let transfers = self.transfers.as_mut().expect("transfers were prepared");
        transfers.finish_read(&mut *self.driver, index, bytemuck::cast_slice_mut(values))
    }

    fn write_halves(&mut self, upper: View, lower: View, values: &[f32]) -> Result<()> {
        let mut at = [upper, lower].map(|view| self.address(view));
        for values in values.chunks(STAGED_ELEMENTS) {
            let (upper, lower): (Vec<bf16>, Vec<u16>) =
                values.iter().map(|&value| halves::split(value)).unzip();
            self.driver.to_device(STREAM, bytemuck::cast_slice(&upper), at[0])?;
            self.driver.to_device(STREAM, bytemuck::cast_slice(&lower), at[1])?;
            at = at.map(|it| it.offset(2 * values.len() as u64));
        }
        Ok(())
    }

    fn read_halves(&mut self, upper: View, lower: View, values: &mut [f32]) -> Result<()> {
        let mut at = [upper, lower].map(|view| self.address(view));
        for values in values.chunks_mut(STAGED_ELEMENTS) {
            let (mut upper, mut lower) = (vec![bf16::ZERO; values.len()], vec![0; values.len()]);
            self.driver.to_host(STREAM, at[0], bytemuck::cast_slice_mut(&mut upper))?;
            self.driver.to_host(STREAM, at[1], bytemuck::cast_slice_mut::<u16, u8>(&mut lower))?;
            let joined =
                upper.into_iter().zip(lower).map(|(upper, lower)| halves::join(upper, lower));
            values.iter_mut().zip(joined).for_each(|(value, joined)| *value = joined);
            at = at.map(|it| it.offset(2 * values.len() as u64));
        }
        Ok(())
    }

    fn zero(&mut self, view: View) -> Result<()> {
        let (to, bytes) = (self.address(view), self.bytes(view) as u64);
        self.driver.fill(STREAM, to, bytes, 0)
    }

    fn copy(&mut self, from: View, to: View) -> Result<()> {
        let bytes = self.bytes(from);
        assert_eq!(bytes, self.bytes(to), "copy: {} to {}", from.shape, to.shape);
        if self.preparing {
            return Ok(());
        }
        let (from, to) = (self.address(from), self.address(to));
        self.driver.on_device(STREAM, from, to, bytes as u64)
    }

    fn round(&mut self, from: View, to: View) -> Result<()> {
        if self.element_bytes(from.kind) == self.element_bytes(to.kind) {
            return self.copy(from, to);
        }
        let elements = to.shape.elements() as u64;
        let (from, to) = (self.address(from), self.address(to));
        self.layers.pointwise.cast_to_bf16(&mut *self.driver, STREAM, elements, from, to)
    }

    fn add(&mut self, from: View, to: View) -> Result<()> {
        let elements = to.shape.elements() as u64;
        let kind = to.kind;
        let (from, to) = (self.address(from), self.address(to));
        let Some((driver, pointwise)) = self.pointwise() else { return Ok(()) };
        match kind {
            Kind::Activation => pointwise.add(driver, STREAM, elements, from, to),
            Kind::Statistic => pointwise.add_f32(driver, STREAM, elements, from, to),
            Kind::Index => unreachable!("token ids are not numbers to compute with"),
            Kind::Bf16 | Kind::LowerHalf => unreachable!("the tape has no optimizer state"),
        }
    }

    fn embedding_forward(&mut self, op: EmbeddingForward) -> Result<()> {
        let [rows, vocab, columns] =
            [op.out.shape.rows(), op.table.shape.rows(), op.table.shape.columns()];
        let op = op.map(&mut |view, _| self.address(view));
        let Some((driver, embedding)) = self.embedding(columns)? else { return Ok(()) };
        embedding.forward(driver, STREAM, rows, vocab, &op)
    }

    fn embedding_backward(&mut self, op: EmbeddingBackward) -> Result<()> {
        let [rows, vocab, columns] =
            [op.d_out.shape.rows(), op.d_table.shape.rows(), op.d_table.shape.columns()];
        let op = op.map(&mut |view, _| self.address(view));
        let Some((driver, embedding)) = self.embedding(columns)? else { return Ok(()) };
        embedding.backward(driver, STREAM, rows, vocab, &op)
    }

    fn norm_forward(&mut self, op: NormForward) -> Result<()> {
        let [rows, columns] = [op.inp.shape.rows(), op.inp.shape.columns()];
        let op = op.map(&mut |view, _| self.address(view));
        let Some((driver, norm)) = self.norm(columns)? else { return Ok(()) };
        norm.forward(driver, STREAM, rows, &op)
    }

    fn norm_backward(&mut self, op: NormBackward) -> Result<()> {
        let [rows, columns] = [op.inp.shape.rows(), op.inp.shape.columns()];
        let scratch_rows = op.partial.shape.rows();
        let op = op.map(&mut |view, _| self.address(view));
        let Some((driver, norm)) = self.norm(columns)? else { return Ok(()) };
        assert!(norm.partials(rows) <= scratch_rows, "too few rows for partial sums");
        norm.backward(driver, STREAM, rows, &op)
    }

    fn scaled_residual_forward(&mut self, op: ScaledResidualForward) -> Result<()> {
        let [rows, columns] = [op.inp.shape.rows(), op.inp.shape.columns()];
        let addresses = ResidualForward {
            inp: self.address(op.inp),
            residual: self.address(op.residual),
            gain: op.gain.map(|gain| self.gain(gain)),
            out: self.address(op.out),
        };
        let Some((driver, layer)) = self.scaled_residual(columns)? else { return Ok(()) };
        layer.forward(driver, STREAM, op.spec, rows, &addresses)
    }

    fn scaled_residual_backward(&mut self, op: ScaledResidualBackward) -> Result<()> {
        let [rows, columns] = [op.d_out.shape.rows(), op.d_out.shape.columns()];
        let addresses = ResidualBackward {
            d_out: self.address(op.d_out),
            d_inp: self.address(op.d_inp),
            gain: op.gain.map(|it| GainBackward {
                gain: self.gain(it.gain),
                inp: self.address(it.inp),
                partial: self.address(it.partial),
                d_gain: self.address(it.d_gain),
            }),
        };
        let Some((driver, layer)) = self.scaled_residual(columns)? else { return Ok(()) };
        layer.backward(driver, STREAM, op.spec, rows, &addresses)
    }

    fn linear_forward(&mut self, op: LinearForward) -> Result<()> {
        let columns = op.out.shape.columns();
        let addend = op.residual.map(|residual| self.address(residual));
        if self.fusions.has(Fusion::Residual) {
            return self.multiply_forward(op, columns, Output::Store { addend });
        }
        self.multiply_forward(op, columns, Output::Store { addend: None })?;
        op.residual.map_or(Ok(()), |residual| self.add(residual, op.out))
    }

    fn linear_backward(&mut self, op: LinearBackward) -> Result<()> {
        let to = self.address(op.d_inp.to);
        let addend = op.d_inp.accumulate.then_some(to);
        self.multiply_backward(op, to, Output::Store { addend })
    }

    fn rotary_forward(&mut self, op: Rotary) -> Result<()> {
        self.rotate(op, false)
    }

    fn rotary_backward(&mut self, op: Rotary) -> Result<()> {
        self.rotate(op, true)
    }

    fn attention_forward(&mut self, op: AttentionForward) -> Result<()> {
        let op = op.map(&mut |view, _| self.address(view));
        self.attend(op)
    }

    fn attention_backward(&mut self, op: AttentionBackward) -> Result<()> {
        self.attend_backward(op, None)
    }

    fn cached_attention_forward(&mut self, op: CachedAttention) -> Result<()> {
        let [tokens, context] = [op.qkv.shape.rows(), op.keys.shape.rows()];
        let op = op.map(&mut |view, _| self.address(view));
        let CachedAttention { heads, qkv, keys, values, positions, out } = op;
        let Some((driver, attention)) = self.attention(heads)? else { return Ok(()) };
        attention.decode(driver, STREAM, tokens, context, qkv, keys, values, positions, out)
    }

    fn swiglu_forward(&mut self, op: SwiGluForward) -> Result<()> {
        let [rows, ffn] = [op.out.shape.rows(), op.out.shape.columns()];
        let op = op.map(&mut |view, _| self.address(view));
        let Some((driver, pointwise)) = self.pointwise() else { return Ok(()) };
        pointwise.swiglu_forward(driver, STREAM, rows, ffn, &op)
    }

    fn swiglu_backward(&mut self, op: SwiGluBackward) -> Result<()> {
        let [rows, ffn] = [op.d_out.shape.rows(), op.d_out.shape.columns()];
        let op = op.map(&mut |view, _| self.address(view));
        let Some((driver, pointwise)) = self.pointwise() else { return Ok(()) };
        pointwise.swiglu_backward(driver, STREAM, rows, ffn, &op)
    }

    fn cross_entropy_forward(&mut self, op: CrossEntropyForward) -> Result<()> {
        self.cross_entropy(op, None)
    }

    fn cross_entropy_backward(&mut self, op: CrossEntropyBackward) -> Result<()> {
        let CrossEntropyBackward { forward, scale, d_inp, d_weight } = op;
        self.cross_entropy(forward, Some((scale, d_inp, d_weight)))
    }

    fn linear_rotary_forward(&mut self, linear: LinearForward, rotary: Rotary) -> Result<bool> {
        let heads = rotary.heads;
        let output = Output::Rotate(Rotation {
            table: self.address(rotary.table),
            positions: self.address(rotary.positions),
            columns: heads.rotated_columns(),
            head_dim: heads.head_dim,
        });
        let fuses = self.fuses(Fusion::Rotary, Layout::Nt, output);
        if fuses {
            self.multiply_forward(linear, linear.out.shape.columns(), output)?;
        }
        Ok(fuses)
    }

    fn linear_swiglu_forward(
        &mut self,
        linear: LinearForward,
        swiglu: SwiGluForward,
    ) -> Result<bool> {
        let output = Output::SwiGlu { product: self.address(swiglu.out) };
        let fuses = self.fuses(Fusion::SwiGlu, Layout::Nt, output);
        if fuses {
            self.multiply_forward(linear, swiglu.out.shape.columns(), output)?;
        }
        Ok(fuses)
    }

    fn linear_swiglu_backward(
        &mut self,
        linear: LinearBackward,
        swiglu: SwiGluBackward,
    ) -> Result<bool> {
        let output = Output::SwiGluGradient { gate_up: self.address(swiglu.inp) };
        let fuses = self.fuses(Fusion::SwiGluBackward, Layout::Nn, output);
        if fuses {
            self.multiply_backward(linear, self.address(swiglu.d_inp), output)?;
        }
        Ok(fuses)
    }

    fn attention_rotary_backward(
        &mut self,
        attention: AttentionBackward,
        rotary: Rotary,
    ) -> Result<bool> {
        let heads = attention.spec.heads;
        self.attention(heads)?;
        let rotates_back = self.layers.attentions[&heads].rotates_back();
        let fuses = self.fusions.has(Fusion::RotaryBackward) && rotates_back;
        if fuses {
            let [table, positions] =
                [rotary.table, rotary.positions].map(|view| self.address(view));
            self.attend_backward(attention, Some(Angles { table, positions }))?;
        }
        Ok(fuses)
    }

    fn gradient_norm(&mut self, buffers: &FlatBuffers) -> Result<()> {
        let [gradients, grad_norm] =
            [buffers.gradients, buffers.grad_norm].map(|view| self.address(view));
        self.layers.optimizer(buffers).gradient_norm(
            &mut *self.driver,
            STREAM,
            gradients,
            grad_norm,
        )
    }

    fn adamw(&mut self, buffers: &FlatBuffers, step: &AdamWStep) -> Result<()> {
        let addresses = AdamWBuffers {
            parameters: self.address(buffers.parameters),
            working: buffers.working.map(|working| self.address(working)),
            vectors: buffers.vectors.map(|vectors| self.address(vectors)),
            gradients: self.address(buffers.gradients),
            moment1: self.address(buffers.moment1),
            moment2: self.address(buffers.moment2),
            grad_norm: self.address(buffers.grad_norm),
        };
        let optimizer = self.layers.optimizer(buffers);
        let (scalars, to) = (optimizer.scalars(step)?, optimizer.scalars_address());
        self.send(bytemuck::bytes_of(&scalars), to)?;
        let optimizer = self.layers.optimizer(buffers);
        match &self.layers.offload {
            Some(offload) => offload.update(&mut *self.driver, optimizer, &addresses),
            None => optimizer.launch(&mut *self.driver, STREAM, &addresses),
        }
    }
}
