//! The products whose kernels do more than store: rotary embedding, SwiGLU and its gradient. What an
//! epilogue costs is told by the plain product of the same sizes.

use super::Request;
use super::cost::{Cost, element_bytes};
use super::layers::{LAYERS, Layer, ON_CPU};
use super::report::{Row, TimedRows};
use super::timing::{Copies, on_cpu, samples};
use crate::backend::HeadSpec;
use crate::config::Dtype;
use crate::cuda::gemm::{Gemm, Layout, Output, Product, Rotation};
use crate::cuda::{DevicePointer, Driver, StreamId};
use crate::error::Result;

/// None where the family has no such kernels.
pub(super) fn rows(
    driver: &mut dyn Driver,
    request: &Request,
    kernels: &Gemm,
    table: &mut TimedRows,
) -> Result<()> {
    let small = on_cpu(driver);
    let sizes = |layer: Layer, layout| if small { [ON_CPU; 3] } else { layer.product(layout) };
    let dtype = request.kernel_dtype();
    let [heads, kv_heads] = if small { [2, 1] } else { [32, 8] };
    let heads = HeadSpec { heads, kv_heads, head_dim: 64 };
    let [qkv, _, gate_up, down, _] = LAYERS;
    for fusion in [Fusion::Rotary(heads), Fusion::SwiGlu, Fusion::SwiGluGradient] {
        let sizes = match fusion {
            Fusion::Rotary(_) => sizes(qkv, Layout::Nt),
            Fusion::SwiGlu => sizes(gate_up, Layout::Nt),
            Fusion::SwiGluGradient => sizes(down, Layout::Nn),
        };
        if kernels.fuses(fusion.layout(), fusion.output([DevicePointer::NULL; 2])) {
            table.push(row(driver, request, kernels, fusion, dtype, sizes)?);
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Fusion {
    Rotary(HeadSpec),
    SwiGlu,
    SwiGluGradient,
}

impl Fusion {
    fn layout(self) -> Layout {
        match self {
            Fusion::Rotary(_) | Fusion::SwiGlu => Layout::Nt,
            Fusion::SwiGluGradient => Layout::Nn,
        }
    }

    /// `more`: what it reads or writes beside factors and result.
    fn output(self, more: [DevicePointer; 2]) -> Output {
        let [more, positions] = more;
        match self {
            Fusion::Rotary(HeadSpec { heads, kv_heads, head_dim }) => {
                let columns = (heads + kv_heads) * head_dim;
                Output::Rotate(Rotation { table: more, positions, columns, head_dim })
            }
            Fusion::SwiGlu => Output::SwiGlu { product: more },
            Fusion::SwiGluGradient => Output::SwiGluGradient { gate_up: more },
        }
    }

    /// N is 2F of a SwiGLU.
    fn cost(self, dtype: Dtype, sizes: [usize; 3]) -> Cost {
        match self {
            Fusion::Rotary(heads) => Cost::product_rotary(heads, dtype, sizes, sizes[0]),
            Fusion::SwiGlu => Cost::product_swiglu(dtype, sizes),
            Fusion::SwiGluGradient => Cost::product_swiglu_gradient(dtype, sizes),
        }
    }
}

fn row(
    driver: &mut dyn Driver,
    request: &Request,
    kernels: &Gemm,
    fusion: Fusion,
    dtype: Dtype,
    sizes @ [m, n, k]: [usize; 3],
) -> Result<Row> {
    let layout = fusion.layout();
    let cost = fusion.cost(dtype, sizes);
    let element = element_bytes(dtype);
    let (columns, product_n) = match fusion {
        Fusion::Rotary(_) => (n, n),
        Fusion::SwiGlu => (n, n / 2),
        Fusion::SwiGluGradient => (2 * n, n),
    };
    let copies = Copies::new(driver, cost.bytes, cost.bytes, |buffers| {
        let a = buffers.normals("A", dtype, m * k)?;
        let b = buffers.normals("B", dtype, n * k)?;
        let out = buffers.zeros("out", (m * columns) as u64 * element)?;
        let more = match fusion {
            // Numbers that are no sines take as long.
            Fusion::Rotary(heads) => {
                let table = buffers.normals("table", Dtype::F32, m * heads.head_dim)?;
                [table, buffers.below("positions", m, m)?]
            }
            Fusion::SwiGlu => {
                let product = buffers.zeros("product", (m * product_n) as u64 * element)?;
                [product, DevicePointer::NULL]
            }
            Fusion::SwiGluGradient => {
                [buffers.normals("gate and up", dtype, m * columns)?, DevicePointer::NULL]
            }
        };
        let output = fusion.output(more);
        let product = Product { layout, m, n: product_n, k, a, b, out, output };
        kernels.plan(buffers.driver, &product)
    })?;
    let samples = samples(driver, request.samples);
    let timing =
        copies.time(driver, samples, |driver, plan| plan.launch(driver, StreamId::MAIN))?;
    let what = format!("{}, {dtype}", copies.copies[0].choice);
    copies.release(driver)?;
    Ok(Row::new(Cost { what, ..cost }, &timing))
}
