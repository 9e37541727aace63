//! What `isobath depth` measured: figures over layers, run beside run.

use super::curves::{Captioned, captioned};
use super::groups::Group;
use super::run::Run;
use crate::depth::{Angular, DepthReport, Jacobian};
use crate::figure::{Axis, BarChart, BarGroup, HeatMap, LineChart, Point, Series, Style};

/// More checkpoints than this are not drawn into one figure; those between are left out evenly.
const CHECKPOINTS: usize = 10;

/// A line whose top is below this share of the scale cannot be read.
const FLAT: f64 = 0.05;

/// The newest measurement of a kind: not every checkpoint has all of them.
fn latest<'a, T>(run: &'a Run, of: impl Fn(&'a DepthReport) -> Option<T>) -> Option<T> {
    run.depth.iter().rev().find_map(of)
}

/// The same of every run that has it, in the order of the groups.
fn all_latest<'a, T: 'a>(
    groups: &'a [Group<'a>],
    of: impl Fn(&'a DepthReport) -> Option<T> + 'a,
) -> impl Iterator<Item = (&'a Run, T)> {
    let runs = groups.iter().flat_map(|group| group.runs.iter().copied());
    runs.filter_map(move |run| Some((run, latest(run, &of)?)))
}

fn largest<'a>(values: impl Iterator<Item = &'a f64>) -> f64 {
    values.copied().filter(|value| value.is_finite()).fold(0.0, f64::max)
}

/// Variance by layer: all runs at their ends, then each over training, on one scale.
pub(super) fn variance(groups: &[Group]) -> Vec<Captioned<LineChart>> {
    let layers = |variance: &[f64]| -> Vec<Point> {
        variance.iter().enumerate().map(|(layer, value)| (layer as f64, *value)).collect()
    };
    let x = || Axis::linear("layer (0: the embedding)");
    let last = |run: &Run| {
        latest(run, |depth| depth.variance.as_ref()).map(|v| layers(v)).unwrap_or_default()
    };
    let ends: Vec<Series> = groups
        .iter()
        .map(|group| group.series(last))
        .filter(|series| !series.points.is_empty())
        .collect();
    if ends.is_empty() {
        return Vec::new();
    }
    let mut figures = vec![captioned(
        LineChart {
            title: "Variance by layer, last checkpoints".into(),
            x: x(),
            y: Axis::log("variance"),
            series: ends,
        },
        "Variance of the residual stream over its features, mean over tokens, after each block.",
    )];
    let runs: Vec<&Run> = groups.iter().flat_map(|group| group.runs.iter().copied()).collect();
    let scale = shared_scale(&runs);
    for run in runs {
        let measured: Vec<(&DepthReport, &Vec<f64>)> =
            run.depth.iter().filter_map(|d| Some((d, d.variance.as_ref()?))).collect();
        if measured.is_empty() {
            continue;
        }
        let shown = evenly(&measured, CHECKPOINTS);
        let count = shown.len();
        let place = |n: usize| if count > 1 { n as f64 / (count - 1) as f64 } else { 1.0 };
        let series = shown.iter().enumerate().map(|(n, (depth, variance))| {
            let name = depth.step.map_or("final".to_string(), |step| format!("step {step}"));
            Series::new(name, Style::Ordered(place(n)), layers(variance))
        });
        let left_out = match measured.len() - count {
            0 => String::new(),
            some => format!(" {some} checkpoints between these are not shown."),
        };
        figures.push(captioned(
            LineChart {
                title: format!("Variance over training: {}", run.name),
                x: x(),
                y: scale.clone(),
                series: series.collect(),
            },
            format!("One line per checkpoint; the scale is that of all runs.{left_out}"),
        ));
    }
    figures
}

/// One axis for the variance of all runs: linear, as in the paper, unless one of them would lie
/// flat on its bottom.
fn shared_scale(runs: &[&Run]) -> Axis {
    let values = |run: &&Run| -> Vec<f64> {
        run.depth.iter().filter_map(|d| d.variance.as_ref()).flatten().copied().collect()
    };
    let all: Vec<Vec<f64>> = runs.iter().map(values).filter(|v| !v.is_empty()).collect();
    let tops = || all.iter().map(|values| largest(values.iter()));
    let (calmest, highest) = (tops().fold(f64::MAX, f64::min), tops().fold(0.0, f64::max));
    let lowest =
        all.iter().flatten().copied().filter(|value| *value > 0.0).fold(f64::MAX, f64::min);
    match calmest >= highest * FLAT {
        true => Axis::linear("variance").with_range(Some((0.0, highest))),
        false => Axis::log("variance").with_range(Some((lowest, highest))),
    }
}

/// The first, the last, and as many between them as make `most`.
fn evenly<T: Copy>(all: &[T], most: usize) -> Vec<T> {
    match all.len() {
        count if count <= most => all.to_vec(),
        count => (0..most).map(|n| all[n * (count - 1) / (most - 1)]).collect(),
    }
}

/// Angular distance of each run's last checkpoint, on one scale.
pub(super) fn angular(groups: &[Group]) -> Vec<Captioned<HeatMap>> {
    let maps = || all_latest(groups, |depth| depth.angular.as_ref());
    let highest = largest(maps().flat_map(|(_, angular)| angular.distance.iter().flatten()));
    let figure = |(run, angular): (&Run, &Angular)| {
        let title = format!("Angular distance: {}", run.name);
        let map = heat_map(title, &angular.distance, "angle / \u{3c0}", highest);
        captioned(map, "Between the inputs of two blocks; 0.5 is a right angle. One scale for all.")
    };
    maps().map(figure).collect()
}

/// The same, each row on a scale of its own.
pub(super) fn angular_rescaled(groups: &[Group]) -> Vec<Captioned<HeatMap>> {
    let figure = |(run, angular): (&Run, &Angular)| {
        let title = format!("Rescaled: {}", run.name);
        let map = heat_map(title, &angular.rescaled, "share of the row's range", 1.0);
        captioned(
            map,
            "Each row cut off at its 1st and 99th percentile and stretched to 0..1, as in \
             \u{201c}The Curse of Depth\u{201d}.",
        )
    };
    all_latest(groups, |depth| depth.angular.as_ref()).map(figure).collect()
}

/// `rows[n - 1][l]` as in [`Angular`].
fn heat_map(title: String, rows: &[Vec<f64>], value_label: &str, highest: f64) -> HeatMap {
    HeatMap {
        title,
        x_label: "layer".into(),
        y_label: "blocks apart".into(),
        value_label: value_label.into(),
        first: (1, 1),
        rows: rows.to_vec(),
        range: Some((0.0, highest)),
    }
}

/// Bars for every layer: what the model loses without it, and what it is like inside.
pub(super) fn bars(groups: &[Group]) -> Vec<Captioned<BarChart>> {
    let mut figures = Vec::new();
    let mut add = |title: &str, axis: &str, caption: &str, of: &Measure| {
        let bars = groups.iter().filter_map(|group| group.bars(|run| latest(run, of)));
        let bars: Vec<BarGroup> = bars.collect();
        if !bars.is_empty() {
            let axis = Axis::linear(axis).with_range(without_giants(&bars));
            let figure = BarChart::of_layers(title, axis, bars);
            figures.push(captioned(figure, caption));
        }
    };
    add(
        "Loss without the layer",
        "increase, nats per token",
        "One block is skipped at a time; nothing is trained again.",
        &|depth| Some(depth.skipped.as_ref()?.iter().map(|s| s.loss_increase).collect()),
    );
    add(
        "Accuracy without the layer",
        "change, percentage points",
        "Below zero: the task is solved worse without the block.",
        &|depth| Some(depth.task.as_ref()?.change.clone()),
    );
    add(
        "Layer replaced by an affine map",
        "increase of the loss, nats per token",
        "The map that fits the block's output best; little increase means that the block does little \
         that is not linear.",
        &|depth| Some(depth.linear.as_ref()?.blocks.iter().map(|b| b.loss_increase).collect()),
    );
    add(
        "Explained by the affine map",
        "share of the variance",
        "Of the block's output minus its input.",
        &|depth| Some(depth.linear.as_ref()?.blocks.iter().map(|b| b.explained).collect()),
    );
    add(
        "Gradient norm by layer",
        "Euclidean norm",
        "Of the gradient of the mean loss over the block's parameters.",
        &|depth| depth.gradient_norm.clone(),
    );
    add(
        "Jacobian: distance from the identity",
        "\u{2016}J \u{2212} I\u{2016} / \u{2016}I\u{2016}",
        "J: derivative of a token's output by its input, Frobenius norm, mean over sampled tokens. Near \
         0 the block passes its input on.",
        &|depth| jacobian(depth, |block| block.relative_distance),
    );
    add(
        "Jacobian: mean of the diagonal",
        "1 for the identity",
        "Of the same derivative.",
        &|depth| jacobian(depth, |block| block.diagonal_mean),
    );
    add(
        "Jacobian: beside the diagonal",
        "Frobenius norm",
        "Of the same derivative without its diagonal.",
        &|depth| jacobian(depth, |block| block.off_diagonal_norm),
    );
    figures
}

/// Where a few layers tower over all others (the first one often does): a range for the others,
/// in which the giants are cut off. `None` where there are no giants.
fn without_giants(groups: &[BarGroup]) -> Option<(f64, f64)> {
    let layers = groups.iter().map(|group| group.values.len()).max()?;
    let size = |layer: usize| {
        let values = groups.iter().filter_map(|group| group.values.get(layer));
        values.filter(|v| v.is_finite()).fold(0.0f64, |max, v| max.max(v.abs()))
    };
    let mut sizes: Vec<f64> = (0..layers).map(size).collect();
    sizes.sort_by(|a, b| b.total_cmp(a));
    let (largest, ordinary) = (sizes[0], *sizes.get(layers / GIANTS + 1)?);
    if ordinary == 0.0 || largest < TOWERING * ordinary {
        return None;
    }
    let most = ordinary * ROOM;
    let values = || groups.iter().flat_map(|group| group.values.iter().copied());
    let within = |value: f64| value.clamp(-most, most);
    let finite = || values().filter(|value| value.is_finite()).map(within);
    Some((finite().fold(0.0, f64::min), finite().fold(0.0, f64::max)))
}

/// One layer in so many may be a giant, and one more.
const GIANTS: usize = 12;
/// How many times as large as the largest ordinary layer a giant is at least.
const TOWERING: f64 = 4.0;
/// The range's share beyond the largest ordinary layer.
const ROOM: f64 = 1.25;

type Measure = dyn Fn(&DepthReport) -> Option<Vec<f64>>;

/// One number of each block's Jacobian.
fn jacobian(depth: &DepthReport, of: fn(&Jacobian) -> f64) -> Option<Vec<f64>> {
    Some(depth.jacobian.as_ref()?.blocks.iter().map(of).collect())
}
