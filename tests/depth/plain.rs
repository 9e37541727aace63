//! A LLaMA as plain loops in f64, one row of tokens at a time: what the tests of depth compare
//! with.
//!
//! Weights are read by their Hugging Face names; placements are the formulas of their papers, so a
//! stored gain is divided by the root of its layer here, too.

use isobath::config::{LnsPosition, ModelConfig, Placement};
use isobath::model::parameters::ParameterTable;

/// [S][C]
pub type Stream = Vec<Vec<f64>>;

pub struct Plain<'a> {
    pub config: &'a ModelConfig,
    pub table: &'a ParameterTable,
    pub parameters: &'a [f32],
}

impl Plain<'_> {
    /// Rows of a tensor, without padding.
    pub fn matrix(&self, name: &str) -> Stream {
        let entries = self.table.entries().iter();
        let mut all = entries.flat_map(|entry| entry.tensors.iter().map(move |t| (entry, t)));
        let (entry, tensor) = all.find(|(_, tensor)| tensor.name == name).unwrap();
        let columns = entry.stored.columns();
        let row = |r: usize| {
            let start = entry.offset + (tensor.first_row + r) * columns;
            let values = &self.parameters[start..start + tensor.shape.columns()];
            values.iter().map(|&value| value as f64).collect()
        };
        (0..tensor.shape.rows()).map(row).collect()
    }

    pub fn of_layer(&self, layer: usize, name: &str) -> Stream {
        self.matrix(&format!("model.layers.{}.{name}.weight", layer - 1))
    }

    fn norm(&self, x: &[f64], gain: &[f64]) -> Vec<f64> {
        let square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (square + self.config.norm_eps).sqrt();
        x.iter().zip(gain).map(|(x, gain)| x * scale * gain).collect()
    }

    fn norms(&self, stream: &Stream, name: &str) -> Stream {
        let gain = &self.matrix(&format!("{name}.weight"))[0];
        stream.iter().map(|x| self.norm(x, gain)).collect()
    }

    /// Block `layer` in the depth scale of layer `depth`.
    pub fn block_at_depth(&self, layer: usize, depth: usize, stream: &Stream) -> Stream {
        let attention = |inp: &Stream| self.attention(layer, inp);
        let ffn = |inp: &Stream| self.ffn(layer, inp);
        let between =
            self.around(layer, depth, stream, ["input_layernorm", "self_attn"], attention);
        self.around(layer, depth, &between, ["post_attention_layernorm", "mlp"], ffn)
    }

    /// A branch of block `layer` with what stands around it.
    fn around(
        &self,
        layer: usize,
        depth: usize,
        stream: &Stream,
        [norm, branch]: [&str; 2],
        f: impl Fn(&Stream) -> Stream,
    ) -> Stream {
        let Plain { config, .. } = self;
        let hf = |name: &str| format!("model.layers.{}.{name}", layer - 1);
        let normed = |stream: &Stream| self.norms(stream, &hf(norm));
        let root = (depth as f64).sqrt();
        let posts = (config.mix_post * config.layers as f64).round() as usize;
        let post = |alpha: f64| normed(&sum(&times(stream, alpha), &f(stream)));
        match (config.placement, config.lns_position) {
            (Placement::Post, _) => post(1.0),
            (Placement::Mix, _) if layer <= posts => post(1.0),
            (Placement::Pre | Placement::Mix, _) => sum(stream, &f(&normed(stream))),
            (Placement::Lns, LnsPosition::AfterNorm) => {
                sum(stream, &f(&times(&normed(stream), 1.0 / root)))
            }
            (Placement::Lns, LnsPosition::BeforeNorm) => {
                sum(stream, &f(&normed(&times(stream, 1.0 / root))))
            }
            (Placement::Deepnorm, _) => post((2.0 * config.layers as f64).powf(0.25)),
            (Placement::Sandwich, _) => {
                let out = f(&normed(stream));
                sum(stream, &self.norms(&out, &hf(&format!("{branch}.out_norm"))))
            }
            other => panic!("{other:?} is a stock LLaMA when it is read"),
        }
    }

    fn attention(&self, layer: usize, inp: &Stream) -> Stream {
        let (heads, kv_heads, d) =
            (self.config.heads, self.config.kv_heads, self.config.head_dim());
        let [q, k, v, o] = ["q_proj", "k_proj", "v_proj", "o_proj"]
            .map(|name| self.of_layer(layer, &format!("self_attn.{name}")));
        let project = |matrix: &Stream| inp.iter().map(|x| apply(matrix, x)).collect::<Stream>();
        let (mut q, mut k, v) = (project(&q), project(&k), project(&v));
        for (position, (q, k)) in q.iter_mut().zip(&mut k).enumerate() {
            q.chunks_exact_mut(d).for_each(|head| self.rotate(head, position));
            k.chunks_exact_mut(d).for_each(|head| self.rotate(head, position));
        }
        let attend = |t: usize| {
            let mut attended = vec![0.0; heads * d];
            for head in 0..heads {
                let kv = head / (heads / kv_heads) * d..(head / (heads / kv_heads) + 1) * d;
                let query = &q[t][head * d..(head + 1) * d];
                let scores: Vec<f64> =
                    (0..=t).map(|s| dot(query, &k[s][kv.clone()]) / (d as f64).sqrt()).collect();
                let shares = softmax(&scores);
                for (s, share) in shares.iter().enumerate() {
                    let values = v[s][kv.clone()].iter();
                    let attended = attended[head * d..].iter_mut();
                    attended.zip(values).for_each(|(out, value)| *out += share * value);
                }
            }
            apply(&o, &attended)
        };
        (0..inp.len()).map(attend).collect()
    }

    fn ffn(&self, layer: usize, inp: &Stream) -> Stream {
        let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"]
            .map(|name| self.of_layer(layer, &format!("mlp.{name}")));
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let token = |x: &Vec<f64>| {
            let (gate, up) = (apply(&gate, x), apply(&up, x));
            let inner: Vec<f64> = gate.iter().zip(&up).map(|(gate, up)| silu(*gate) * up).collect();
            apply(&down, &inner)
        };
        inp.iter().map(token).collect()
    }

    pub fn block(&self, layer: usize, stream: &Stream) -> Stream {
        self.block_at_depth(layer, layer, stream)
    }

    fn rotate(&self, head: &mut [f64], position: usize) {
        let half = head.len() / 2;
        for i in 0..half {
            let angle = position as f64 * self.config.rope_theta.powf(-(i as f64) / half as f64);
            let (a, b) = (head[i], head[half + i]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[half + i] = b * angle.cos() + a * angle.sin();
        }
    }

    pub fn embed(&self, tokens: &[i32]) -> Stream {
        let embedding = self.matrix("model.embed_tokens.weight");
        tokens.iter().map(|&token| embedding[token as usize].clone()).collect()
    }

    /// [L+1]: the stream before block 1, 2, ... and after the last.
    pub fn streams(&self, tokens: &[i32]) -> Vec<Stream> {
        let mut streams = vec![self.embed(tokens)];
        for layer in 1..=self.config.layers {
            streams.push(self.block(layer, &streams[layer - 1]));
        }
        streams
    }

    /// [S]: the losses of a model whose stream after block `layer` is `stream`.
    pub fn losses_after(&self, layer: usize, stream: &Stream, targets: &[i32]) -> Vec<f64> {
        let mut stream = stream.clone();
        for layer in layer + 1..=self.config.layers {
            stream = self.block(layer, &stream);
        }
        let gain = &self.matrix("model.norm.weight")[0];
        let head = self.matrix("lm_head.weight");
        let loss = |(x, &target): (&Vec<f64>, &i32)| {
            let shares = softmax(&apply(&head, &self.norm(x, gain)));
            -shares[target as usize].ln()
        };
        stream.iter().zip(targets).map(loss).collect()
    }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn apply(matrix: &Stream, x: &[f64]) -> Vec<f64> {
    matrix.iter().map(|row| dot(row, x)).collect()
}

fn sum(a: &Stream, b: &Stream) -> Stream {
    let token = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| a + b).collect();
    a.iter().zip(b).map(token).collect()
}

fn times(stream: &Stream, factor: f64) -> Stream {
    stream.iter().map(|x| x.iter().map(|x| x * factor).collect()).collect()
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.iter().map(|e| e / sum).collect()
}

/// x with a x = b, by Gaussian elimination with pivoting; a [n][n], b [n][m].
pub fn solve(mut a: Stream, mut b: Stream) -> Stream {
    let n = a.len();
    for column in 0..n {
        let pivot = (column..n).max_by(|&i, &j| a[i][column].abs().total_cmp(&a[j][column].abs()));
        let pivot = pivot.unwrap();
        a.swap(column, pivot);
        b.swap(column, pivot);
        for row in (0..n).filter(|&row| row != column) {
            let factor = a[row][column] / a[column][column];
            let (from_a, from_b) = (a[column].clone(), b[column].clone());
            a[row].iter_mut().zip(&from_a).for_each(|(x, y)| *x -= factor * y);
            b[row].iter_mut().zip(&from_b).for_each(|(x, y)| *x -= factor * y);
        }
    }
    for (row, values) in b.iter_mut().enumerate() {
        values.iter_mut().for_each(|value| *value /= a[row][row]);
    }
    b
}
