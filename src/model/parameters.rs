//! The parameter table: every trainable tensor in the order in which it lies in the flat buffer.
//!
//! One table is walked by the initialiser, the optimizer, the checkpoint, the gradient norm and
//! the Hugging Face export. A stored parameter may hold several Hugging Face tensors (q, k and v
//! are one matrix here) and may be padded; counts are of what a Hugging Face folder would hold.

use std::ops::Range;

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
    Ones,
    /// N(0, std^2)
    Normal {
        std: f64,
    },
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
    /// Whether weight decay applies (matrices: yes; norm gains and embeddings: no).
    pub decay: bool,
    /// The gain is divided by sqrt(depth) where it is used and exported (LNS); 1: not scaled.
    pub depth: usize,
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

    /// Elements without padding.
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
}

/// Where the parameters of one block lie in the table.
#[derive(Clone, Copy, Debug)]
pub struct BlockParameters {
    pub attention_norm: ParameterId,
    /// [(H + 2K) D, C]: rows of q, then k, then v.
    pub qkv: ParameterId,
    /// [C, H D]
    pub attention_out: ParameterId,
    pub ffn_norm: ParameterId,
    /// [2 F, C]: rows of gate, then up; F rounded up to [`WIDTH_MULTIPLE`].
    pub gate_up: ParameterId,
    /// [C, F]
    pub down: ParameterId,
}

impl ParameterTable {
    pub fn new(config: &ModelConfig) -> Self {
        let mut table = ParameterTable { entries: Vec::new(), stored: 0 };
        let (c, f, v) = (config.hidden, config.ffn, config.vocab);
        let (f_stored, v_stored) =
            (f.next_multiple_of(WIDTH_MULTIPLE), v.next_multiple_of(WIDTH_MULTIPLE));
        let (q_rows, kv_rows) =
            (config.heads * config.head_dim(), config.kv_heads * config.head_dim());
        let normal = Init::Normal { std: config.init_std };
        let one = |name: &str, sizes: &[usize]| {
            vec![HfTensor { name: name.to_string(), first_row: 0, shape: Shape::new(sizes) }]
        };

        table.push(
            "embedding",
            &[v_stored, c],
            Init::Normal { std: config.embedding_std },
            false,
            1,
            one("model.embed_tokens.weight", &[v, c]),
        );
        for layer in 1..=config.layers {
            let depth = config.placement.depth(layer);
            let ours = |name: &str| format!("layers.{layer}.{name}");
            let hf = |name: &str| format!("model.layers.{}.{name}.weight", layer - 1);
            let rows = |name: &str, first_row: usize, rows: usize| HfTensor {
                name: hf(name),
                first_row,
                shape: Shape::new(&[rows, c]),
            };
            let gain = one(&hf("input_layernorm"), &[c]);
            table.push(&ours("attention_norm"), &[c], Init::Ones, false, depth, gain);
            let qkv = vec![
                rows("self_attn.q_proj", 0, q_rows),
                rows("self_attn.k_proj", q_rows, kv_rows),
                rows("self_attn.v_proj", q_rows + kv_rows, kv_rows),
            ];
            table.push(&ours("qkv"), &[q_rows + 2 * kv_rows, c], normal, true, 1, qkv);
            let out = one(&hf("self_attn.o_proj"), &[c, q_rows]);
            table.push(&ours("attention_out"), &[c, q_rows], normal, true, 1, out);
            let gain = one(&hf("post_attention_layernorm"), &[c]);
            table.push(&ours("ffn_norm"), &[c], Init::Ones, false, depth, gain);
            let gate_up = vec![rows("mlp.gate_proj", 0, f), rows("mlp.up_proj", f_stored, f)];
            table.push(&ours("gate_up"), &[2 * f_stored, c], normal, true, 1, gate_up);
            let down = one(&hf("mlp.down_proj"), &[c, f]);
            table.push(&ours("down"), &[c, f_stored], normal, true, 1, down);
        }
        table.push("final_norm", &[c], Init::Ones, false, 1, one("model.norm.weight", &[c]));
        if !config.tied {
            table.push("head", &[v_stored, c], normal, true, 1, one("lm_head.weight", &[v, c]));
        }
        table
    }

    fn push(
        &mut self,
        name: &str,
        sizes: &[usize],
        init: Init,
        decay: bool,
        depth: usize,
        tensors: Vec<HfTensor>,
    ) {
        let stored = Shape::new(sizes);
        let offset = self.stored;
        self.stored = (offset + stored.elements()).next_multiple_of(ALIGNMENT);
        let name = name.to_string();
        self.entries.push(Parameter { name, stored, offset, init, decay, depth, tensors });
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

    /// Number of parameters as a Hugging Face folder would count them.
    pub fn parameters(&self) -> usize {
        self.entries.iter().map(Parameter::elements).sum()
    }

    pub fn embedding(&self) -> ParameterId {
        ParameterId(0)
    }

    /// `layer` counts from 1.
    pub fn block(&self, layer: usize) -> BlockParameters {
        let at = |i: usize| ParameterId(1 + (layer - 1) * 6 + i);
        BlockParameters {
            attention_norm: at(0),
            qkv: at(1),
            attention_out: at(2),
            ffn_norm: at(3),
            gate_up: at(4),
            down: at(5),
        }
    }

    pub fn final_norm(&self) -> ParameterId {
        ParameterId(self.entries.iter().position(|p| p.name == "final_norm").unwrap_or(0))
    }

    /// The output projection: the embedding itself when it is tied.
    pub fn head(&self) -> ParameterId {
        match self.entries.last() {
            Some(last) if last.name == "head" => ParameterId(self.entries.len() - 1),
            _ => self.embedding(),
        }
    }
}
