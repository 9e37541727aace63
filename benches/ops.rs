//! Every op of the CPU backend, forward and backward, at the shapes of `demo` (8 x 256 tokens) and
//! of the 20m model (4 x 256), and tokenizing.
//!
//! `cargo bench --bench ops -- NAME` runs those whose name contains NAME. Throughput is in FLOP
//! where matrix products dominate (criterion prints elem/s), causal attention counted without its
//! hidden half, and else in the bytes that have to be read and written at least once.

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use isobath::Result;
use isobath::backend::{
    AdamWStep, AttentionBackward, AttentionForward, AttentionSpec, Backend, CrossEntropyBackward,
    CrossEntropyForward, EmbeddingBackward, EmbeddingForward, FlatBuffers, HeadSpec,
    LinearBackward, LinearForward, LossSpec, NORM_PARTIAL_ROWS, NormBackward, NormForward,
    NormSpec, Rotary, Sink, SwiGluBackward, SwiGluForward,
};
use isobath::config::{Config, ModelConfig, NormKind};
use isobath::cpu::Cpu;
use isobath::data::tokenizer::Tokenizer;
use isobath::model::parameters::ParameterTable;
use isobath::model::{heads, rotary_table};
use isobath::random::Philox;
use isobath::tensor::{Kind, Shape, View};

/// Tokens whose logits exist at one time.
const LOSS_CHUNK: usize = 512;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for (preset, batch) in [("demo", 8), ("20m", 4)] {
        let mut config = Config::preset(preset).expect("a preset");
        config.model.vocab = config.vocab().expect("presets know their vocabulary");
        let mut group = criterion.benchmark_group(preset);
        group.sample_size(20);
        Ops { model: &config.model, batch, sequence: 256, cpu: Cpu::new(), filled: 0 }
            .run(&mut group)
            .expect("the CPU backend refuses nothing here");
    }
    tokenizing(&mut criterion);
    criterion.final_summary();
}

struct Ops<'a> {
    model: &'a ModelConfig,
    batch: usize,
    sequence: usize,
    cpu: Cpu<f32>,
    /// Tensors that have been filled: each gets its own random stream.
    filled: u64,
}

type Group<'a> = BenchmarkGroup<'a, WallTime>;

impl Ops<'_> {
    /// A tensor of normal random numbers.
    fn tensor(&mut self, sizes: &[usize]) -> Result<View> {
        let shape = Shape::new(sizes);
        let buffer = self.cpu.allocate("bench", 4 * shape.elements())?;
        let view = View { buffer, offset: 0, kind: Kind::Activation, shape };
        Philox::new(1, self.filled).fill_normal(0, self.cpu.values_mut(view));
        self.filled += 1;
        Ok(view)
    }

    fn index(&mut self, values: &[i32]) -> Result<View> {
        let shape = Shape::new(&[values.len()]);
        let buffer = self.cpu.allocate("bench", 4 * values.len())?;
        let view = View { buffer, offset: 0, kind: Kind::Index, shape };
        self.cpu.write_index(view, values)?;
        Ok(view)
    }

    fn time(
        &mut self,
        group: &mut Group,
        name: &str,
        work: Throughput,
        op: impl Fn(&mut Cpu<f32>) -> Result<()>,
    ) {
        group.throughput(work);
        group.bench_function(name, |bencher| {
            bencher.iter(|| op(&mut self.cpu).expect("shapes agree"));
        });
    }

    fn run(mut self, group: &mut Group) -> Result<()> {
        let random = Philox::new(2, 0);
        let (t, v) = (self.batch * self.sequence, self.model.vocab);
        let ids: Vec<i32> = (0..t as u64).map(|i| (random.at(i)[0] % v as u32) as i32).collect();
        let ids = self.index(&ids)?;
        self.embedding(group, ids)?;
        self.norm(group)?;
        self.linears(group)?;
        self.rotary(group)?;
        self.attention(group)?;
        self.swiglu(group)?;
        self.cross_entropy(group, ids)?;
        self.optimizer(group)
    }

    fn tokens(&self) -> usize {
        self.batch * self.sequence
    }

    fn embedding(&mut self, group: &mut Group, tokens: View) -> Result<()> {
        let (t, c, v) = (self.tokens(), self.model.hidden, self.model.vocab);
        let [table, out] = [self.tensor(&[v, c])?, self.tensor(&[t, c])?];
        self.time(group, "embedding forward", floats(2 * t * c), |cpu| {
            cpu.embedding_forward(EmbeddingForward { tokens, table, out })
        });
        self.time(group, "embedding backward", floats(3 * t * c), |cpu| {
            cpu.embedding_backward(EmbeddingBackward { tokens, d_out: out, d_table: table })
        });
        Ok(())
    }

    fn norm(&mut self, group: &mut Group) -> Result<()> {
        let (t, c) = (self.tokens(), self.model.hidden);
        let spec = NormSpec { kind: NormKind::Rms, eps: 1e-6, depth: 2 };
        let [inp, out, d_inp] =
            [self.tensor(&[t, c])?, self.tensor(&[t, c])?, self.tensor(&[t, c])?];
        let [gain, d_gain, rstd] = [self.tensor(&[c])?, self.tensor(&[c])?, self.tensor(&[t])?];
        let partial = self.tensor(&[t.div_ceil(NORM_PARTIAL_ROWS), c])?;
        self.time(group, "norm forward", floats(2 * t * c), |cpu| {
            cpu.norm_forward(NormForward { spec, inp, gain, out, mean: None, rstd })
        });
        let sink = Sink { to: d_inp, accumulate: false };
        self.time(group, "norm backward", floats(3 * t * c), |cpu| {
            cpu.norm_backward(NormBackward {
                spec,
                inp,
                gain,
                mean: None,
                rstd,
                d_out: out,
                partial,
                d_inp: sink,
                d_gain,
            })
        });
        Ok(())
    }

    /// The four matrices of a block.
    fn linears(&mut self, group: &mut Group) -> Result<()> {
        let (c, f) = (self.model.hidden, self.model.ffn);
        let qkv = heads(self.model).qkv_columns();
        self.linear(group, "qkv", c, qkv, false)?;
        self.linear(group, "attention_out", c, c, true)?;
        self.linear(group, "gate_up", c, 2 * f, false)?;
        self.linear(group, "down", f, c, true)
    }

    fn linear(
        &mut self,
        group: &mut Group,
        name: &str,
        i: usize,
        o: usize,
        residual: bool,
    ) -> Result<()> {
        let t = self.tokens();
        let [inp, out, add] = [self.tensor(&[t, i])?, self.tensor(&[t, o])?, self.tensor(&[t, o])?];
        let [weight, d_weight] = [self.tensor(&[o, i])?, self.tensor(&[o, i])?];
        let d_inp = Sink { to: self.tensor(&[t, i])?, accumulate: false };
        self.time(group, &format!("linear {name} forward"), flops(2 * t * i * o), |cpu| {
            cpu.linear_forward(LinearForward {
                inp,
                weight,
                residual: residual.then_some(add),
                out,
            })
        });
        self.time(group, &format!("linear {name} backward"), flops(4 * t * i * o), |cpu| {
            cpu.linear_backward(LinearBackward { inp, weight, d_out: out, d_inp, d_weight })
        });
        Ok(())
    }

    fn qkv(&mut self) -> Result<(HeadSpec, View)> {
        let spec = heads(self.model);
        Ok((spec, self.tensor(&[self.tokens(), spec.qkv_columns()])?))
    }

    fn rotary(&mut self, group: &mut Group) -> Result<()> {
        let (spec, qkv) = self.qkv()?;
        let positions: Vec<i32> = (0..self.batch).flat_map(|_| 0..self.sequence as i32).collect();
        let positions = self.index(&positions)?;
        let table = self.tensor(&[self.sequence, spec.head_dim])?;
        self.cpu.write(table, &rotary_table(self.model, self.sequence))?;
        let rotated = self.tokens() * (spec.heads + spec.kv_heads) * spec.head_dim;
        self.time(group, "rotary forward", floats(2 * rotated), |cpu| {
            cpu.rotary_forward(Rotary { heads: spec, table, positions, qkv })
        });
        self.time(group, "rotary backward", floats(2 * rotated), |cpu| {
            cpu.rotary_backward(Rotary { heads: spec, table, positions, qkv })
        });
        Ok(())
    }

    fn attention(&mut self, group: &mut Group) -> Result<()> {
        let (heads, qkv) = self.qkv()?;
        let (_, d_qkv) = self.qkv()?;
        let (b, s, columns) = (self.batch, self.sequence, heads.heads * heads.head_dim);
        let spec = AttentionSpec { heads, batch: b, sequence: s };
        let [out, d_out] = [self.tensor(&[b * s, columns])?, self.tensor(&[b * s, columns])?];
        let [lse, delta] = [self.tensor(&[b, heads.heads, s])?, self.tensor(&[b, heads.heads, s])?];
        let product = b * s * s * columns; // half of a product of all queries and all keys
        self.time(group, "attention forward", flops(2 * product), |cpu| {
            cpu.attention_forward(AttentionForward {
                spec,
                qkv,
                document_starts: None,
                out,
                log_sum_exp: lse,
            })
        });
        self.time(group, "attention backward", flops(5 * product), |cpu| {
            cpu.attention_backward(AttentionBackward {
                spec,
                qkv,
                document_starts: None,
                out,
                log_sum_exp: lse,
                d_out,
                delta,
                d_qkv,
            })
        });
        Ok(())
    }

    fn swiglu(&mut self, group: &mut Group) -> Result<()> {
        let (t, f) = (self.tokens(), self.model.ffn);
        let [inp, d_inp, out] =
            [self.tensor(&[t, 2 * f])?, self.tensor(&[t, 2 * f])?, self.tensor(&[t, f])?];
        self.time(group, "swiglu forward", floats(3 * t * f), |cpu| {
            cpu.swiglu_forward(SwiGluForward { inp, out })
        });
        self.time(group, "swiglu backward", floats(5 * t * f), |cpu| {
            cpu.swiglu_backward(SwiGluBackward { inp, d_out: out, d_inp })
        });
        Ok(())
    }

    fn cross_entropy(&mut self, group: &mut Group, targets: View) -> Result<()> {
        let (t, c, v) = (self.tokens(), self.model.hidden, self.model.vocab);
        let spec = LossSpec { classes: v, chunk: LOSS_CHUNK, z_loss: 0.0 };
        let [inp, d_inp] = [self.tensor(&[t, c])?, self.tensor(&[t, c])?];
        let [weight, d_weight] = [self.tensor(&[v, c])?, self.tensor(&[v, c])?];
        let [logits, losses, scale] =
            [self.tensor(&[LOSS_CHUNK, v])?, self.tensor(&[t])?, self.tensor(&[1])?];
        self.time(group, "cross-entropy forward", flops(2 * t * c * v), |cpu| {
            cpu.cross_entropy_forward(CrossEntropyForward {
                spec,
                inp,
                weight,
                targets,
                logits,
                losses,
            })
        });
        self.time(group, "cross-entropy backward", flops(6 * t * c * v), |cpu| {
            cpu.cross_entropy_backward(CrossEntropyBackward {
                forward: CrossEntropyForward { spec, inp, weight, targets, logits, losses },
                scale,
                d_inp,
                d_weight,
            })
        });
        Ok(())
    }

    /// Over all parameters of the model.
    fn optimizer(&mut self, group: &mut Group) -> Result<()> {
        let n = ParameterTable::new(self.model).stored_elements();
        let flat = FlatBuffers {
            parameters: self.tensor(&[n])?,
            working: None,
            vectors: None,
            gradients: self.tensor(&[n])?,
            moment1: self.tensor(&[n])?,
            moment2: self.tensor(&[n])?,
            grad_norm: self.tensor(&[1])?,
            first: 0,
        };
        self.cpu.values_mut(flat.moment2).iter_mut().for_each(|v| *v = v.abs());
        let all = 0..n;
        let step = AdamWStep {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            decoupled: true,
            correction1: 0.5,
            correction2: 0.5,
            clip: 1.0,
            decay: std::slice::from_ref(&all),
            seed: 0,
            update: 1,
        };
        self.time(group, "gradient norm", floats(n), |cpu| cpu.gradient_norm(&flat));
        self.time(group, "adamw", floats(7 * n), |cpu| cpu.adamw(&flat, &step));
        Ok(())
    }
}

fn flops(count: usize) -> Throughput {
    Throughput::Elements(count as u64)
}

fn floats(count: usize) -> Throughput {
    Throughput::Bytes(4 * count as u64)
}

/// The bundled text with the tokenizer of `demo`: ours on all cores, and the crate's own calls
/// over the same text, cut at line ends so that it can use all cores as well.
fn tokenizing(criterion: &mut Criterion) {
    let text = include_str!("../assets/austen.txt");
    let ours = Tokenizer::train([text], 1024).expect("the text makes a tokenizer");
    let crates =
        tokenizers::Tokenizer::from_bytes(ours.json().as_bytes()).expect("the crate's own format");
    let mut lines: Vec<&str> = Vec::new();
    let mut rest = text;
    while let Some(end) = rest.get(1 << 14..).and_then(|after| after.find('\n')) {
        let (piece, after) = rest.split_at((1 << 14) + end);
        lines.push(piece);
        rest = after;
    }
    lines.push(rest);
    let mut group = criterion.benchmark_group("tokenizing");
    group.throughput(Throughput::Bytes(text.len() as u64)).sample_size(10);
    group.bench_function("isobath", |b| b.iter(|| ours.encode_long(text).expect("text")));
    group.bench_function("tokenizers, one call", |b| {
        b.iter(|| crates.encode_fast(text, false).expect("text"));
    });
    group.bench_function("tokenizers, batch of lines", |b| {
        b.iter(|| crates.encode_batch_fast(lines.clone(), false).expect("text"));
    });
}
