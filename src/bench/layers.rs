//! The layers whose products are timed.

use crate::cuda::gemm::Layout;

/// Of a model of about 1B parameters (hidden 2048, ffn 5632, 32 heads, 8 of them for keys and
/// values, 32000 tokens): inputs, outputs and tokens of the layers qkv, attention out, gate and up,
/// and down; of the head, with the tokens whose logits exist at one time.
pub(super) const LAYERS: [Layer; 5] = [
    Layer { tokens: 8192, inputs: 2048, outputs: 3072 },
    Layer { tokens: 8192, inputs: 2048, outputs: 2048 },
    Layer { tokens: 8192, inputs: 2048, outputs: 11264 },
    Layer { tokens: 8192, inputs: 5632, outputs: 2048 },
    Layer { tokens: 512, inputs: 2048, outputs: 32000 },
];

/// A side of a product on the CPU machine.
pub(super) const ON_CPU: usize = 256;

#[derive(Clone, Copy)]
pub(super) struct Layer {
    tokens: usize,
    inputs: usize,
    outputs: usize,
}

impl Layer {
    /// M, N, K
    pub fn product(self, layout: Layout) -> [usize; 3] {
        let Layer { tokens, inputs, outputs } = self;
        match layout {
            Layout::Nt => [tokens, outputs, inputs],
            Layout::Nn => [tokens, inputs, outputs],
            Layout::Tn => [outputs, inputs, tokens],
        }
    }
}
