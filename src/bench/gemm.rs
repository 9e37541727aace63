//! The products of a training step: a layer forward (NT), and the gradients of its input (NN) and
//! of its weight (TN).

use super::Request;
use super::cost::element_bytes;
use super::fusions;
use super::layers::{LAYERS, ON_CPU};
use super::products;
use super::report::{Row, TimedRows};
use super::sizes;
use super::timing::{Copies, on_cpu, samples};
use crate::config::Dtype;
use crate::cuda::gemm::{Gemm, Layout, Output, Product};
use crate::cuda::{Driver, StreamId};
use crate::error::Result;

const SQUARES: [usize; 2] = [4096, 8192];

pub(super) fn rows(
    driver: &mut dyn Driver,
    request: &Request,
    table: &mut TimedRows,
) -> Result<()> {
    let kernels = Gemm::new(driver, request.kernel_dtype(), request.family)?;
    let layouts = match request.layout {
        Some(layout) => vec![layout],
        None => {
            let all = [Layout::Nt, Layout::Nn, Layout::Tn].into_iter();
            all.filter(|&layout| kernels.variants(layout).next().is_some()).collect()
        }
    };
    for layout in layouts {
        let products = match request.product {
            Some(product) => vec![product],
            None if on_cpu(driver) => vec![[ON_CPU; 3]],
            None => {
                let layers = LAYERS.iter().map(|layer| layer.product(layout));
                layers.chain(SQUARES.iter().map(|&size| [size; 3])).collect()
            }
        };
        for product in products {
            table.push(row(driver, request, &kernels, layout, product)?);
        }
    }
    if request.layout.is_none() && request.product.is_none() {
        fusions::rows(driver, request, &kernels, table)?;
    }
    kernels.release(driver)
}

fn row(
    driver: &mut dyn Driver,
    request: &Request,
    kernels: &Gemm,
    layout: Layout,
    [m, n, k]: [usize; 3],
) -> Result<Row> {
    for sides in [[m, k], [n, k], [m, n]] {
        sizes::check("a factor or result", &sides)?;
    }
    let dtype = request.kernel_dtype();
    let element_out = match layout {
        Layout::Nt | Layout::Nn => element_bytes(dtype),
        Layout::Tn => element_bytes(Dtype::F32),
    };
    let out_bytes = (m * n) as u64 * element_out;
    let bytes = (m * k + n * k) as u64 * element_bytes(dtype) + out_bytes;
    let copies = Copies::new(driver, bytes, bytes, |buffers| {
        let a = buffers.normals("A", dtype, m * k)?;
        let b = buffers.normals("B", dtype, n * k)?;
        let out = buffers.zeros("out", out_bytes)?;
        let output = Output::plain(layout);
        kernels.plan(buffers.driver, &Product { layout, m, n, k, a, b, out, output })
    })?;
    let samples = samples(driver, request.samples);
    let timing =
        copies.time(driver, samples, |driver, plan| plan.launch(driver, StreamId::MAIN))?;
    let choice = copies.copies[0].choice;
    copies.release(driver)?;
    Ok(Row::new(products::cost(&choice, dtype, [m, n, k]), &timing))
}
