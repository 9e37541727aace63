//! The parameter table: every trainable tensor in the order in which it lies in the flat buffer.
//!
//! One table is walked by the initialiser, the optimizer, the checkpoint, the gradient norm and
//! the Hugging Face export. A stored parameter may hold several Hugging Face tensors (q, k and v
//! are one matrix here) and may be padded; counts are of what a Hugging Face folder would hold.

use std::ops::Range;

use super::placement::{BranchGain, NormForm, Order, block_form, block_init, stock_obstacle};
use crate::config::ModelConfig;
use crate::tensor::{Shape, View};

/// Every parameter starts at a multiple of this many elements (256 bytes of f32).
pub const ALIGNMENT: usize = 64;

/// The FFN width and the vocabulary are stored rounded up to a multiple of this, so that rows of
/// activations and of logits are multiples of 16 bytes in bf16.
pub const WIDTH_MULTIPLE: usize = 8;

/// How a parameter gets its first values.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Init {
    Constant(f64),
    /// N(0, std^2)
    Normal {
        std: f64,
    },
    /// Three parts of the rows, each N(0, std^2) of its own; the second and the third begin at
    /// `rows`.
    NormalRows {
        std: [f64; 3],
        rows: [usize; 2],
    },
}

/// What the rows of a matrix are multiplied by where it is used, and exported.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RowScale {
    pub constant: f64,
    /// One factor for each row, or one for all.
    pub parameter: Option<ParameterId>,
}

/// One Hugging Face tensor inside a stored parameter: rows `first_row..` and the first columns.
#[derive(Clone, PartialEq, Debug)]
pub struct HfTensor {
    pub name: String,
    pub first_row: usize,
    /// [rows, columns], or [columns] for a norm gain.
    pub shape: Shape,
}

/// One entry of the flat buffer.
#[derive(Clone, PartialEq, Debug)]
pub struct Parameter {
    pub name: String,
    /// Shape in the flat buffer, padding included.
    pub stored: Shape,
    /// First element in the flat buffer.
    pub offset: usize,
    pub init: Init,
    /// First element of its f32 copy among those of all vectors, where parameters are not stored in
    /// f32: kernels read vectors (gains) in f32. `None`: a matrix.
    pub vector: Option<usize>,
    /// Whether weight decay applies (matrices: yes; norm gains and embeddings: no).
    pub decay: bool,
    /// The gain is divided by sqrt(depth) where it is used and exported (LNS); 1: not scaled.
    pub depth: usize,
    /// `None`: as they are. Only where the export folds it, see [`stock_obstacle`].
    pub row_scale: Option<RowScale>,
    /// The random stream of the first values: the same matrix has the same in every placement.
    pub stream: u64,
    /// Empty where the export folds it into another parameter.
    pub tensors: Vec<HfTensor>,
}

impl Parameter {
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.stored.elements()
    }

    /// This parameter inside a flat buffer whose elements have `element_bytes`.
    pub fn view(&self, flat: View, element_bytes: usize) -> View {
        View { offset: flat.offset + self.offset * element_bytes, shape: self.stored, ..flat }
    }

    /// Elements without padding, as a Hugging Face folder has them.
    pub fn elements(&self) -> usize {
        self.tensors.iter().map(|t| t.shape.elements()).sum()
    }
}

/// Index into [`ParameterTable::entries`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct ParameterId(pub usize);

#[derive(Clone, PartialEq, Debug)]
pub struct ParameterTable {
    entries: Vec<Parameter>,
    stored: usize,
    vectors: usize,
    streams: u64,
    blocks: Vec<BlockParameters>,
    final_norm: ParameterId,
    head: ParameterId,
}

/// What stands around one branch of a block.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BranchParameters {
    pub norm: ParameterId,
    /// The projection out of the branch: [C, H D] or [C, F].
    pub out: ParameterId,
    /// Of the norm after the projection.
    pub out_norm: Option<ParameterId>,
    /// [C] or [1]: the learnt factor of the branch.
    pub gain: Option<ParameterId>,
}

/// Where the parameters of one block lie in the table.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BlockParameters {
    pub attention: BranchParameters,
    /// [(H + 2K) D, C]: rows of q, then k, then v.
    pub qkv: ParameterId,
    pub ffn: BranchParameters,
    /// [2 F, C]: rows of gate, then up; F rounded up to [`WIDTH_MULTIPLE`].
    pub gate_up: ParameterId,
}

impl BlockParameters {
    /// The four matrices that a token is multiplied with.
    pub fn matrices(&self) -> [ParameterId; 4] {
        [self.qkv, self.attention.out, self.gate_up, self.ffn.out]
    }
}

impl ParameterTable {
    pub fn new(config: &ModelConfig) -> Self {
        let mut table = ParameterTable {
            entries: Vec::new(),
            stored: 0,
            vectors: 0,
            streams: 0,
            blocks: Vec::new(),
            final_norm: ParameterId(0),
            head: ParameterId(0),
        };
        let (c, v) = (config.hidden, config.vocab);
        let v_stored = v.next_multiple_of(WIDTH_MULTIPLE);
        let embedding = one("model.embed_tokens.weight", &[v, c]);
        let init = Init::Normal { std: config.embedding_std };
        table.push("embedding", &[v_stored, c], init, embedding);
        for layer in 1..=config.layers {
            let block = table.push_block(config, layer);
            table.blocks.push(block);
        }
        let gain = one("model.norm.weight", &[c]);
        table.final_norm = table.push("final_norm", &[c], Init::Constant(1.0), gain);
        if !config.tied {
            let init = Init::Normal { std: config.init_std };
            table.head = table.push("head", &[v_stored, c], init, one("lm_head.weight", &[v, c]));
            table.entries[table.head.0].decay = true;
        }
        table
    }

    /// The first six parameters are those of stock LLaMA, in the same order for every placement.
    fn push_block(&mut self, config: &ModelConfig, layer: usize) -> BlockParameters {
        let (form, init) = (block_form(config, layer), block_init(config, layer));
        let (c, f) = (config.hidden, config.ffn);
        let f_stored = f.next_multiple_of(WIDTH_MULTIPLE);
        let (q, kv) = (config.heads * config.head_dim(), config.kv_heads * config.head_dim());
        let ours = |name: &str| format!("layers.{layer}.{name}");
        let hf = |name: &str| format!("model.layers.{}.{name}.weight", layer - 1);
        let rows = |name: &str, first_row: usize, rows: usize| HfTensor {
            name: hf(name),
            first_row,
            shape: Shape::new(&[rows, c]),
        };
        let norm = |table: &mut Self, name: &str, tensor: &str, norm: NormForm| {
            let init = Init::Constant(norm.gain);
            let id = table.push(&ours(name), &[c], init, one(&hf(tensor), &[c]));
            table.entries[id.0].depth = norm.depth;
            id
        };
        let matrix = |table: &mut Self, name: &str, sizes: [usize; 2], init, tensors| {
            let id = table.push(&ours(name), &sizes, init, tensors);
            table.entries[id.0].decay = true;
            id
        };
        let normal = |std| Init::Normal { std };

        let attention_norm = norm(self, "attention_norm", "input_layernorm", form.attention_norm);
        let tensors = vec![
            rows("self_attn.q_proj", 0, q),
            rows("self_attn.k_proj", q, kv),
            rows("self_attn.v_proj", q + kv, kv),
        ];
        let stds = [init.query, init.key, init.value];
        let qkv_init = match stds == [init.query; 3] {
            true => normal(init.query),
            false => Init::NormalRows { std: stds, rows: [q, q + kv] },
        };
        let qkv = matrix(self, "qkv", [q + 2 * kv, c], qkv_init, tensors);
        let tensors = one(&hf("self_attn.o_proj"), &[c, q]);
        let std = normal(init.attention_out);
        let attention_out = matrix(self, "attention_out", [c, q], std, tensors);
        let ffn_norm = norm(self, "ffn_norm", "post_attention_layernorm", form.ffn_norm);
        let tensors = vec![rows("mlp.gate_proj", 0, f), rows("mlp.up_proj", f_stored, f)];
        let gate_up = matrix(self, "gate_up", [2 * f_stored, c], normal(init.gate_up), tensors);
        let tensors = one(&hf("mlp.down_proj"), &[c, f]);
        let down = matrix(self, "down", [c, f_stored], normal(init.down), tensors);

        // What only some placements have draws no random numbers and takes no random stream.
        let streams = self.streams;
        let mut around = |norm: ParameterId, out: ParameterId, name: &str, tensor: &str| {
            let out_norm = (form.order == Order::Sandwich).then(|| {
                let tensors = one(&hf(&format!("{tensor}.out_norm")), &[c]);
                self.push(&ours(&format!("{name}_out_norm")), &[c], Init::Constant(1.0), tensors)
            });
            let gain = form.sum.gain.map(|gain| {
                let (size, first) = match gain {
                    BranchGain::Channels(first) => (c, first),
                    BranchGain::Scalar(first) => (1, first),
                };
                let init = Init::Constant(first);
                self.push(&ours(&format!("{name}_gain")), &[size], init, Vec::new())
            });
            let scaled = gain.is_some() || form.sum.branch_scale != 1.0;
            if scaled && stock_obstacle(config).is_none() {
                let constant = form.sum.branch_scale;
                self.entries[out.0].row_scale = Some(RowScale { constant, parameter: gain });
            }
            BranchParameters { norm, out, out_norm, gain }
        };
        let attention = around(attention_norm, attention_out, "attention", "self_attn");
        let ffn = around(ffn_norm, down, "ffn", "mlp");
        self.streams = streams;
        BlockParameters { attention, qkv, ffn, gate_up }
    }

    /// Without decay and scales.
    fn push(
        &mut self,
        name: &str,
        sizes: &[usize],
        init: Init,
        tensors: Vec<HfTensor>,
    ) -> ParameterId {
        let stored = Shape::new(sizes);
        let (offset, stream) = (self.stored, self.streams);
        self.stored = (offset + stored.elements()).next_multiple_of(ALIGNMENT);
        let vector = (sizes.len() == 1).then_some(self.vectors);
        if vector.is_some() {
            self.vectors = (self.vectors + stored.elements()).next_multiple_of(ALIGNMENT);
        }
        self.streams += 1;
        let name = name.to_string();
        self.entries.push(Parameter {
            name,
            stored,
            offset,
            init,
            vector,
            decay: false,
            depth: 1,
            row_scale: None,
            stream,
            tensors,
        });
        ParameterId(self.entries.len() - 1)
    }

    pub fn entries(&self) -> &[Parameter] {
        &self.entries
    }

    pub fn get(&self, id: ParameterId) -> &Parameter {
        &self.entries[id.0]
    }

    /// Elements of the flat buffer, padding included.
    pub fn stored_elements(&self) -> usize {
        self.stored
    }

    /// Elements of the f32 copies of all vectors, padding included: see [`Parameter::vector`].
    pub fn vector_elements(&self) -> usize {
        self.vectors
    }

    /// Number of parameters as a Hugging Face folder would count them.
    pub fn parameters(&self) -> usize {
        self.entries.iter().map(Parameter::elements).sum()
    }

    pub fn embedding(&self) -> ParameterId {
        ParameterId(0)
    }

    pub fn layers(&self) -> usize {
        self.blocks.len()
    }

    /// Elements of a block in the flat buffer, padding after it included; `layer` counts from 1.
    pub fn block_range(&self, layer: usize) -> Range<usize> {
        let first = |layer: usize| self.get(self.blocks[layer - 1].attention.norm).offset;
        let end = match layer < self.blocks.len() {
            true => first(layer + 1),
            false => self.get(self.final_norm).offset,
        };
        first(layer)..end
    }

    /// `layer` counts from 1.
    pub fn block(&self, layer: usize) -> BlockParameters {
        self.blocks[layer - 1]
    }

    pub fn final_norm(&self) -> ParameterId {
        self.final_norm
    }

    /// The output projection: the embedding itself when it is tied.
    pub fn head(&self) -> ParameterId {
        self.head
    }
}

/// A parameter that is one tensor.
fn one(name: &str, sizes: &[usize]) -> Vec<HfTensor> {
    vec![HfTensor { name: name.to_string(), first_row: 0, shape: Shape::new(sizes) }]
}
