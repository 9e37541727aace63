//! A matrix product: its sizes, where its operands lie, and what becomes of the result.

use std::ops::Range;

use crate::config::choice::choice;
use crate::cuda::DevicePointer;

choice! {
    /// How the operands of a product [M,N] lie in memory: row-major, rows without gaps.
    #[derive(Hash)]
    pub enum Layout {
        /// A [M,K] times B [N,K]^T: a layer forward.
        Nt = "nt",
        /// A [M,K] times B [K,N]: the gradient of its input.
        Nn = "nn",
        /// A [K,M]^T times B [K,N]: the gradient of its weight.
        Tn = "tn",
    }
}

/// What becomes of the product.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Output {
    /// out [M,N] =, in the operands' type. The addend [M,N] is added before the one rounding; it
    /// may be `out` itself. For NT and NN.
    Store { addend: Option<DevicePointer> },
    /// out [M,N] +=, in fp32. For TN. On compute capability 9.0 the L2 cache adds, for which
    /// subnormal numbers (below 2^-126) are zeros, sums included.
    Accumulate,
    /// out [M,N] =, the first of its columns being heads that are rotated before the one rounding.
    /// For NT.
    Rotate(Rotation),
    /// out [M,2,N] = A times each half of B [2,N,K], gate and up; product [M,N] = silu(gate) up.
    /// For NT.
    SwiGlu { product: DevicePointer },
    /// out [M,2,N] = the gradients of gate_up [M,2,N], where the product's own [M,N] is A B. For
    /// NN.
    SwiGluGradient { gate_up: DevicePointer },
}

/// Rotary embedding of the columns of a fused projection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Rotation {
    /// [P,D] in fp32: D/2 cosines of a position, then D/2 sines
    pub table: DevicePointer,
    /// [M], each below P
    pub positions: DevicePointer,
    /// Columns of the heads that are rotated, which come first.
    pub columns: usize,
    /// D
    pub head_dim: usize,
}

choice! {
    /// What a kernel does after its product; [`Output`] says with which operands. What was timed
    /// counts for one of them.
    #[derive(Hash)]
    pub enum Epilogue {
        /// Stores or accumulates, as its layout says.
        Plain = "plain",
        /// Adds another matrix; every plain kernel that stores does it.
        Addend = "addend",
        Rotary = "rotary",
        /// Of NN, its gradient.
        SwiGlu = "swiglu",
    }
}

impl Epilogue {
    /// The one that kernels are compiled with.
    pub(super) fn compiled(self) -> Epilogue {
        match self {
            Epilogue::Plain | Epilogue::Addend => Epilogue::Plain,
            Epilogue::Rotary | Epilogue::SwiGlu => self,
        }
    }

    /// Factors [N,K] that B is made of.
    pub const fn halves_of_b(self, layout: Layout) -> usize {
        if matches!((layout, self), (Layout::Nt, Epilogue::SwiGlu)) { 2 } else { 1 }
    }
}

impl Output {
    /// With nothing but the product.
    pub fn plain(layout: Layout) -> Self {
        match layout {
            Layout::Nt | Layout::Nn => Output::Store { addend: None },
            Layout::Tn => Output::Accumulate,
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Output::Store { .. } => "a store",
            Output::Accumulate => "an addition",
            Output::Rotate(_) => "rotary embedding",
            Output::SwiGlu { .. } => "SwiGLU",
            Output::SwiGluGradient { .. } => "the gradient of SwiGLU",
        }
    }

    pub fn epilogue(&self) -> Epilogue {
        match self {
            Output::Store { addend: Some(_) } => Epilogue::Addend,
            Output::Store { addend: None } | Output::Accumulate => Epilogue::Plain,
            Output::Rotate(_) => Epilogue::Rotary,
            Output::SwiGlu { .. } | Output::SwiGluGradient { .. } => Epilogue::SwiGlu,
        }
    }

    /// Matrices [M,N] that lie side by side in the result.
    pub(super) fn parts(&self) -> usize {
        match self {
            Output::Store { .. } | Output::Accumulate | Output::Rotate(_) => 1,
            Output::SwiGlu { .. } | Output::SwiGluGradient { .. } => 2,
        }
    }
}

/// One product; addresses and rows are multiples of 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Product {
    pub layout: Layout,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: DevicePointer,
    pub b: DevicePointer,
    pub out: DevicePointer,
    pub output: Output,
}

impl Product {
    pub(super) fn name(&self) -> String {
        let [[a, a_columns], [b, b_columns]] = self.factors();
        let [transposed_a, transposed_b] = match self.layout {
            Layout::Nt => ["", "^T"],
            Layout::Nn => ["", ""],
            Layout::Tn => ["^T", ""],
        };
        format!("A [{a},{a_columns}]{transposed_a} times B [{b},{b_columns}]{transposed_b}")
    }

    /// Rows and columns of A and of B.
    pub(super) fn factors(&self) -> [[usize; 2]; 2] {
        let &Product { layout, m, n, k, output, .. } = self;
        match layout {
            Layout::Nt => [[m, k], [n * output.epilogue().halves_of_b(layout), k]],
            Layout::Nn => [[m, k], [k, n]],
            Layout::Tn => [[k, m], [k, n]],
        }
    }

    /// What is read, and what is written; `element`: bytes of one of a factor.
    pub(super) fn matrices(&self, element: usize) -> (Vec<Matrix>, Vec<Matrix>) {
        let &Product { m, n, a, b, out, output, .. } = self;
        let [shape_a, shape_b] = self.factors();
        let columns = n * output.parts();
        let matrix = |name, address, shape| Matrix { name, address, shape, element };
        let mut results = vec![matrix("the result", out, [m, columns])];
        let mut operands = vec![matrix("A", a, shape_a), matrix("B", b, shape_b)];
        match output {
            Output::Accumulate => results[0].element = size_of::<f32>(),
            // What is added to where it lies is read before it is written.
            Output::Store { addend } => {
                let apart = addend.filter(|&addend| addend != out);
                operands.extend(apart.map(|address| matrix("the addend", address, [m, n])));
            }
            Output::Rotate(Rotation { table, positions, head_dim, .. }) => {
                // How many positions there are is the caller's knowledge.
                operands.push(Matrix { element: 4, ..matrix("the table", table, [1, head_dim]) });
                operands.push(Matrix { element: 4, ..matrix("the positions", positions, [m, 1]) });
            }
            Output::SwiGlu { product } => results.push(matrix("the product", product, [m, n])),
            Output::SwiGluGradient { gate_up } => {
                operands.push(matrix("gate and up", gate_up, [m, columns]));
            }
        }
        (operands, results)
    }
}

/// What is read or written; rows without gaps.
pub(super) struct Matrix {
    pub name: &'static str,
    pub address: DevicePointer,
    pub shape: [usize; 2],
    /// Bytes of one.
    pub element: usize,
}

impl Matrix {
    /// The addresses; wide enough for any shape that an i32 counts.
    pub fn bytes(&self) -> Range<u128> {
        let start = u128::from(self.address.0);
        let elements: u128 = self.shape.map(|size| size as u128).iter().product();
        start..start + elements * self.element as u128
    }
}
