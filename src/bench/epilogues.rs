//! The products whose kernels do more than store: an addend, rotary embedding, SwiGLU and its
//! gradient; and what that costs: each is timed in turn with the plain kernel of the same tile, on
//! the same factors.

use super::Options;
use super::layers::{LAYERS, Layer, ON_CPU};
use super::report::{OverPlain, Row, TimedRows};
use super::timing::{Copies, on_cpu, samples};
use crate::backend::HeadSpec;
use crate::cuda::gemm::{Choice, Epilogue, Gemm, Layout};
use crate::cuda::{Driver, StreamId};
use crate::error::Result;
use crate::predict::StepProduct;

/// None where the family has no such kernels.
pub(super) fn rows(
    driver: &mut dyn Driver,
    options: Options,
    kernels: &Gemm,
    table: &mut TimedRows,
) -> Result<()> {
    let small = on_cpu(driver);
    let [heads, kv_heads] = if small { [2, 1] } else { [32, 8] };
    let heads = HeadSpec { heads, kv_heads, head_dim: 64 };
    let [qkv, attention_out, gate_up, down, _] = LAYERS;
    let all: [(Layer, Layout, Epilogue); 5] = [
        (attention_out, Layout::Nt, Epilogue::Addend),
        (down, Layout::Nt, Epilogue::Addend),
        (qkv, Layout::Nt, Epilogue::Rotary),
        (gate_up, Layout::Nt, Epilogue::SwiGlu),
        (down, Layout::Nn, Epilogue::SwiGlu),
    ];
    let mut timed: Vec<StepProduct> = vec![];
    for (layer, layout, epilogue) in all {
        let [m, n, k] = if small { [ON_CPU; 3] } else { layer.product(layout) };
        let product = StepProduct { layout, epilogue, m, n, k, heads };
        // On the CPU machine all sizes are the same.
        let is_new = !timed.iter().any(|it| it.is(&product));
        if is_new && kernels.fuses(layout, product.output()) {
            table.push(row(driver, options, kernels, &product)?);
            timed.push(product);
        }
    }
    Ok(())
}

fn row(
    driver: &mut dyn Driver,
    options: Options,
    kernels: &Gemm,
    product: &StepProduct,
) -> Result<Row> {
    let StepProduct { layout, .. } = *product;
    let dtype = options.kernel_dtype();
    let plain = StepProduct::plain(layout, product.sizes());
    let choice = kernels.choose(layout, product.output(), product.tiled())?;
    let tile = choice.variant.tile();
    let same_tile = kernels.variants(layout).find(|it| it.tile() == tile);
    // What plain kernels touch is the least.
    let copies = Copies::new(driver, plain.bytes(dtype), product.bytes(dtype), |buffers| {
        let at = product.allocate(buffers, dtype)?;
        let with = kernels.plan_with(buffers.driver, choice, &product.at(&at))?;
        let without = same_tile.map(|variant| {
            let choice = Choice { variant, ..choice };
            kernels.plan_with(buffers.driver, choice, &plain.at(&at))
        });
        Ok((with, without.transpose()?))
    })?;
    let samples = samples(driver, options.samples);
    let [with, without] = copies.time_in_turn(driver, samples, |driver, plans, turn| {
        let (with, without) = plans;
        let plan = if turn == 0 { Some(with) } else { without.as_ref() };
        plan.map_or(Ok(()), |plan| plan.launch(driver, StreamId::MAIN))
    })?;
    copies.release(driver)?;
    let over_plain = same_tile.map(|variant| OverPlain::new(variant.kernel, &with, &without));
    Ok(Row { over_plain, ..Row::new(product.cost(&choice, dtype), &with) })
}
