//! A product as a training step launches it: its sizes, its epilogue, and the operands that both
//! need.

use serde::Serialize;

use super::cost::{Cost, element_bytes};
use crate::backend::HeadSpec;
use crate::config::Dtype;
use crate::cuda::DevicePointer;
use crate::cuda::gemm::{Choice, Epilogue, Layout, Output, Product, Rotation};

#[derive(Serialize, Clone, Copy, PartialEq, Debug)]
pub struct StepProduct {
    pub layout: Layout,
    pub epilogue: Epilogue,
    pub m: usize,
    /// Of the matrix product: gate and up of a SwiGLU together.
    pub n: usize,
    pub k: usize,
    /// Of the projection, where q and k are rotated; else without a meaning.
    #[serde(skip)]
    pub heads: HeadSpec,
}

/// Rows of the table of angles, if the product has as many: those of a training step's rows.
pub(crate) const MOST_POSITIONS: usize = 2048;

/// Elements of each operand; 0: there is none.
pub(crate) struct Operands {
    pub a: usize,
    pub b: usize,
    /// The addend, or gate and up.
    pub read: usize,
    pub out: usize,
    /// Of gate and up.
    pub product: usize,
}

/// Where the operands lie; NULL where there is none, or where nobody will launch.
#[derive(Clone, Copy)]
pub(crate) struct Addresses {
    pub a: DevicePointer,
    pub b: DevicePointer,
    pub read: DevicePointer,
    pub out: DevicePointer,
    pub product: DevicePointer,
    /// Of angles, [`StepProduct::positions`] rows of f32, and for each row of the product one of
    /// them.
    pub table: DevicePointer,
    pub positions: DevicePointer,
}

impl Addresses {
    pub const NOWHERE: Addresses = Addresses {
        a: DevicePointer::NULL,
        b: DevicePointer::NULL,
        read: DevicePointer::NULL,
        out: DevicePointer::NULL,
        product: DevicePointer::NULL,
        table: DevicePointer::NULL,
        positions: DevicePointer::NULL,
    };
}

impl StepProduct {
    pub fn plain(layout: Layout, [m, n, k]: [usize; 3]) -> Self {
        let heads = HeadSpec { heads: 0, kv_heads: 0, head_dim: 0 };
        StepProduct { layout, epilogue: Epilogue::Plain, m, n, k, heads }
    }

    /// Whether it is the same work; heads of another width are.
    pub fn is(&self, other: &StepProduct) -> bool {
        let key = |it: &StepProduct| (it.layout, it.epilogue, it.sizes());
        key(self) == key(other)
    }

    /// M, N, K
    pub fn sizes(&self) -> [usize; 3] {
        [self.m, self.n, self.k]
    }

    /// The sizes that kernels are chosen by: gate and up of a SwiGLU are two factors of one column.
    pub fn tiled(&self) -> [usize; 3] {
        [self.m, self.n / self.epilogue.halves_of_b(self.layout), self.k]
    }

    pub(crate) fn positions(&self) -> usize {
        self.m.min(MOST_POSITIONS)
    }

    /// What kernels are chosen by, without addresses.
    pub fn output(&self) -> Output {
        self.output_at(&Addresses::NOWHERE)
    }

    fn output_at(&self, at: &Addresses) -> Output {
        match (self.layout, self.epilogue) {
            (Layout::Nt | Layout::Nn, Epilogue::Addend) => Output::Store { addend: Some(at.read) },
            (Layout::Nt, Epilogue::Rotary) => {
                let HeadSpec { heads, kv_heads, head_dim } = self.heads;
                let columns = (heads + kv_heads) * head_dim;
                let (table, positions) = (at.table, at.positions);
                Output::Rotate(Rotation { table, positions, columns, head_dim })
            }
            (Layout::Nt, Epilogue::SwiGlu) => Output::SwiGlu { product: at.product },
            (Layout::Nn, Epilogue::SwiGlu) => Output::SwiGluGradient { gate_up: at.read },
            (layout, Epilogue::Plain) => Output::plain(layout),
            (layout, epilogue) => unreachable!("no {layout} has the epilogue {epilogue}"),
        }
    }

    pub(crate) fn operands(&self) -> Operands {
        let StepProduct { layout, epilogue, m, n, k, .. } = *self;
        let gradient = (layout, epilogue) == (Layout::Nn, Epilogue::SwiGlu);
        let read = match epilogue {
            Epilogue::Addend => m * n,
            _ if gradient => 2 * m * n,
            _ => 0,
        };
        let product =
            if (layout, epilogue) == (Layout::Nt, Epilogue::SwiGlu) { m * n / 2 } else { 0 };
        let out = if gradient { 2 * m * n } else { m * n };
        Operands { a: m * k, b: n * k, read, out, product }
    }

    /// Bytes of an element of the result.
    pub(crate) fn out_element(&self, dtype: Dtype) -> u64 {
        match self.layout {
            Layout::Nt | Layout::Nn => element_bytes(dtype),
            Layout::Tn => element_bytes(Dtype::F32),
        }
    }

    /// Of all operands of one copy.
    pub(crate) fn bytes(&self, dtype: Dtype) -> u64 {
        let Operands { a, b, read, out, product } = self.operands();
        let moved = (a + b + read + product) as u64 * element_bytes(dtype);
        moved + out as u64 * self.out_element(dtype)
    }

    pub(crate) fn at(&self, at: &Addresses) -> Product {
        let [m, n, k] = self.tiled();
        let output = self.output_at(at);
        Product { layout: self.layout, m, n, k, a: at.a, b: at.b, out: at.out, output }
    }

    /// Of one launch; called by the kernel that was chosen.
    pub(crate) fn cost(&self, choice: &Choice, dtype: Dtype) -> Cost {
        let StepProduct { layout, epilogue, heads, .. } = *self;
        let sizes = self.sizes();
        let cost = match (layout, epilogue) {
            (_, Epilogue::Plain | Epilogue::Addend) => {
                Cost::product(layout, dtype, sizes, self.output())
            }
            (_, Epilogue::Rotary) => Cost::product_rotary(heads, dtype, sizes, self.positions()),
            (Layout::Nn, Epilogue::SwiGlu) => Cost::product_swiglu_gradient(dtype, sizes),
            (_, Epilogue::SwiGlu) => Cost::product_swiglu(dtype, sizes),
        };
        let addend = if epilogue == Epilogue::Addend { ", addend" } else { "" };
        Cost { what: format!("{choice}, {dtype}{addend}"), ..cost }
    }
}
