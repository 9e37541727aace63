//! The products of a training step: a layer forward (NT), and the gradients of its input (NN) and
//! of its weight (TN).

use super::Options;
use super::epilogues;
use super::layers::{LAYERS, ON_CPU};
use super::report::{Row, TimedRows};
use super::sizes;
use super::timing::{Copies, on_cpu, samples};
use crate::cuda::gemm::{Gemm, Layout};
use crate::cuda::{Driver, Family, StreamId};
use crate::error::Result;
use crate::predict::StepProduct;

/// `None`: what suits the machine.
#[derive(Clone, Default, Debug)]
pub struct GemmRequest {
    /// M, N, K
    pub product: Option<[usize; 3]>,
    /// `None`: every layout that the family has.
    pub layout: Option<Layout>,
    /// `None`: the best of the machine.
    pub family: Option<Family>,
}

const SQUARES: [usize; 2] = [4096, 8192];

pub(super) fn rows(
    driver: &mut dyn Driver,
    request: &GemmRequest,
    options: Options,
    table: &mut TimedRows,
) -> Result<()> {
    let kernels = Gemm::new(driver, options.kernel_dtype(), request.family)?;
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
            table.push(row(driver, options, &kernels, layout, product)?);
        }
    }
    if request.layout.is_none() && request.product.is_none() {
        epilogues::rows(driver, options, &kernels, table)?;
    }
    kernels.release(driver)
}

fn row(
    driver: &mut dyn Driver,
    options: Options,
    kernels: &Gemm,
    layout: Layout,
    [m, n, k]: [usize; 3],
) -> Result<Row> {
    for sides in [[m, k], [n, k], [m, n]] {
        sizes::check("a factor or result", &sides)?;
    }
    let dtype = options.kernel_dtype();
    let product = StepProduct::plain(layout, [m, n, k]);
    let choice = kernels.choose(layout, product.output(), product.tiled())?;
    let bytes = product.bytes(dtype);
    let copies = Copies::new(driver, bytes, bytes, |buffers| {
        let at = product.allocate(buffers, dtype)?;
        kernels.plan_with(buffers.driver, choice, &product.at(&at))
    })?;
    let samples = samples(driver, options.samples);
    let timing =
        copies.time(driver, samples, |driver, plan| plan.launch(driver, StreamId::MAIN))?;
    copies.release(driver)?;
    Ok(Row::new(product.cost(&choice, dtype), &timing))
}
