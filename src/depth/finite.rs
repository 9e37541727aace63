//! Weights, streams and results that are not finite are errors; no report has a NaN in it.

use std::path::Path;

use rayon::prelude::*;

use super::report::DepthReport;
use crate::error::{Error, Result};
use crate::loaded::LoadedModel;

/// Refuses weights that are not finite, by the name of the first such tensor.
pub fn check_parameters(model: &LoadedModel) -> Result<()> {
    let entries = model.table.entries();
    let broken = entries
        .par_iter()
        .find_first(|entry| model.parameters[entry.range()].iter().any(|value| !value.is_finite()));
    let Some(entry) = broken else { return Ok(()) };
    let columns = entry.stored.columns();
    let values = &model.parameters[entry.range()];
    let at = values.iter().position(|value| !value.is_finite()).unwrap_or(0);
    // A gain is one row.
    let row = if entry.stored.sizes().len() == 1 { 0 } else { at / columns };
    let tensor = entry.tensors.iter().rfind(|tensor| tensor.first_row <= row);
    let (name, first_row) = tensor.map_or((&entry.name, 0), |t| (&t.name, t.first_row));
    Err(refused(
        &model.folder,
        format!("{name} holds {} at [{}, {}]", values[at], row - first_row, at % columns),
    ))
}

/// `layer`: the first one after which the stream is not finite; 0: the embedding.
pub fn stream_not_finite(folder: &Path, layer: usize) -> Error {
    let place = match layer {
        0 => "the embedding gives numbers that are not finite".to_string(),
        layer => format!("the residual stream is no longer finite after layer {layer}"),
    };
    refused(folder, place)
}

pub fn losses_not_finite(folder: &Path) -> Error {
    refused(folder, "the final norm or the head gives losses that are not finite".to_string())
}

fn refused(folder: &Path, what: String) -> Error {
    Error::Checkpoint {
        path: folder.to_path_buf(),
        what,
        remedy: "use an earlier checkpoint, or --dtype f32 if the weights are good".to_string(),
    }
}

/// Refuses a result that is not finite: a model that overflows once it is changed.
pub fn check_report(report: &DepthReport) -> Result<()> {
    // Infinite as soon as the loss is large.
    let skipped = report.skipped.iter().flatten().map(|skipped| skipped.perplexity);
    let gradient = report.gradient_norm.iter().flatten().copied();
    let jacobian = report.jacobian.iter().flat_map(|all| &all.blocks).map(|j| j.relative_distance);
    let linear = report.linear.iter().flat_map(|all| &all.blocks).map(|linear| linear.loss);
    // After each name the layer's number follows.
    let results: [(&str, Vec<f64>); 4] = [
        ("the perplexity without", skipped.collect()),
        ("the gradient of", gradient.collect()),
        ("the Jacobian of", jacobian.collect()),
        ("the loss with an affine map in the place of", linear.collect()),
    ];
    for (what, layers) in results {
        if let Some(at) = layers.iter().position(|value| !value.is_finite()) {
            return Err(refused(&report.model, format!("{what} layer {} is not finite", at + 1)));
        }
    }
    Ok(())
}
