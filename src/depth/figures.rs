//! The figures of a report, in the forms of "The Curse of Depth": variance by layer (figure 4),
//! angular distance of every pair of layers (figure 2), what is lost without a layer (figure 2),
//! and how close each block is to the identity (figure 5).

use super::DepthReport;
use crate::figure::{Axis, BarChart, BarGroup, Figure, HeatMap, LineChart, Series, Style};

/// Name and SVG of each measurement that the report has.
pub fn figures(report: &DepthReport) -> Vec<(&'static str, String)> {
    let mut figures = Vec::new();
    let title = |what: &str| format!("{what}, {}", name(report));
    let bars = |what: &str, axis: Axis, values: Vec<f64>| {
        let groups = vec![BarGroup::new(name(report), Style::Nth(0), values)];
        BarChart::of_layers(title(what), axis, groups).svg()
    };
    let lines = |what: &str, y: Axis, series: Vec<Series>| {
        LineChart { title: title(what), x: Axis::linear("layer"), y, series }.svg()
    };
    let heat_map = |what: &str, value_label: &str, rows: &Vec<Vec<f64>>, range| {
        let (x_label, y_label) = ("layer", "layers further");
        let rows = rows.clone();
        let labels = [x_label, y_label, value_label].map(str::to_string);
        let [x_label, y_label, value_label] = labels;
        let first = (1, 1);
        HeatMap { title: title(what), x_label, y_label, value_label, first, rows, range }.svg()
    };

    if let Some(variance) = &report.variance {
        let series =
            Series::new(name(report), Style::Nth(0), by_layer(0, variance.iter().copied()));
        let axis = Axis::linear("variance over features");
        figures.push(("variance", lines("Output variance", axis, vec![series])));
    }
    if let Some(angular) = &report.angular {
        let title = "Angular distance";
        figures.push(("angular", heat_map(title, "angle / pi", &angular.distance, None)));
        let title = "Angular distance, each row rescaled";
        let range = Some((0.0, 1.0));
        let svg = heat_map(title, "1st to 99th percentile", &angular.rescaled, range);
        figures.push(("angular-rescaled", svg));
    }
    if let Some(skipped) = &report.skipped {
        let values = skipped.iter().map(|skipped| skipped.loss_increase).collect();
        let axis = Axis::linear("increase of the loss (nats)");
        figures.push(("skipped", bars("Loss without one layer", axis, values)));
    }
    if let Some(norms) = &report.gradient_norm {
        let points = by_layer(1, norms.iter().copied());
        let series = Series::new(name(report), Style::Nth(0), points);
        let axis = Axis::log("norm of the gradient");
        figures.push(("gradient", lines("Gradient by layer", axis, vec![series])));
    }
    if let Some(jacobian) = report.jacobian.as_ref().map(|jacobian| &jacobian.blocks) {
        let diagonal = by_layer(1, jacobian.iter().map(|j| j.diagonal_mean));
        let distance = by_layer(1, jacobian.iter().map(|j| j.relative_distance));
        let series = vec![
            Series::new("mean of the diagonal", Style::Nth(0), diagonal),
            Series::new("|J - I| / |I|", Style::Nth(1), distance),
        ];
        figures.push(("jacobian", lines("Jacobian J of each block", Axis::linear(""), series)));
    }
    if let Some(linear) = report.linear.as_ref().map(|linear| &linear.blocks) {
        let values = linear.iter().map(|linear| linear.loss_increase).collect();
        let axis = Axis::linear("increase of the loss (nats)");
        figures.push(("linear", bars("Loss with one layer made affine", axis, values)));
    }
    if let Some(task) = &report.task {
        let axis = Axis::linear("change of the accuracy (points)");
        figures.push(("task", bars("Accuracy without one layer", axis, task.change.clone())));
    }
    figures
}

/// Checkpoints that one figure holds at most.
const CHECKPOINTS: usize = 9;

/// Variance by layer at the checkpoints of one run, first to last, or at some of them (figure 9);
/// `None` where fewer than two have it.
pub fn variance_over_training(reports: &[DepthReport]) -> Option<String> {
    let measured: Vec<(u64, &Vec<f64>)> = reports
        .iter()
        .filter_map(|report| Some((report.step?, report.variance.as_ref()?)))
        .collect();
    let shown = measured.len().min(CHECKPOINTS);
    if shown < 2 {
        return None;
    }
    let series = (0..shown).map(|i| {
        let (step, variance) = measured[i * (measured.len() - 1) / (shown - 1)];
        let style = Style::Ordered(i as f64 / (shown - 1) as f64);
        Series::new(format!("step {step}"), style, by_layer(0, variance.iter().copied()))
    });
    let chart = LineChart {
        title: "Output variance over training".to_string(),
        x: Axis::linear("layer"),
        y: Axis::linear("variance over features"),
        series: series.collect(),
    };
    Some(chart.svg())
}

fn by_layer(first: usize, values: impl Iterator<Item = f64>) -> Vec<(f64, f64)> {
    (first..).map(|layer| layer as f64).zip(values).collect()
}

/// As a legend has it: placement and step, or the folder.
fn name(report: &DepthReport) -> String {
    let folder = || report.model.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match (&report.placement, report.step) {
        (Some(placement), Some(step)) => format!("{placement}, step {step}"),
        (Some(placement), None) => placement.clone(),
        (None, _) => folder(),
    }
}
