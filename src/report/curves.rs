//! What metrics.jsonl tells: one figure for each quantity, over tokens or over time.

use super::groups::Group;
use super::run::Run;
use crate::figure::{Axis, LineChart, Point, Series};
use crate::metrics::StepRecord;
use crate::plan::FLOPS_FORMULA;

/// A smoothed line averages one step of so many around each.
const SMOOTHED: usize = 50;
/// With more lines than this, the noise around each is not drawn.
const NOISY: usize = 3;
/// With fewer evaluations than this, the second half of training gets no figure of its own.
const EVALUATIONS: usize = 6;

/// A figure and what a reader has to know about it.
pub(super) struct Captioned<F> {
    pub figure: F,
    pub caption: String,
}

pub(super) fn captioned<F>(figure: F, caption: impl Into<String>) -> Captioned<F> {
    Captioned { figure, caption: caption.into() }
}

/// Figures of training, the most important first.
pub(super) fn curves(groups: &[Group]) -> Vec<Captioned<LineChart>> {
    let runs = groups.iter().flat_map(|group| &group.runs);
    let tokens = runs.map(|run| run.last().tokens).max().unwrap_or(0) as f64;
    let training = Training { groups, tokens };
    let mut figures = training.losses();
    figures.extend(training.validation());
    figures.extend([training.gradient_norm(), training.learning_rate(), training.throughput()]);
    figures.extend(training.utilisation());
    figures
}

struct Training<'a> {
    groups: &'a [Group<'a>],
    /// Of the longest run.
    tokens: f64,
}

impl Training<'_> {
    fn runs(&self) -> impl Iterator<Item = &Run> {
        self.groups.iter().flat_map(|group| group.runs.iter().copied())
    }

    fn over_tokens(&self, title: &str, y: Axis, series: Vec<Series>) -> LineChart {
        let x = Axis::linear("tokens").with_range(Some((0.0, self.tokens)));
        LineChart { title: title.into(), x, y, series }
    }

    /// The same over its second half, where runs are closer together.
    fn second_half(&self, chart: &LineChart) -> Captioned<LineChart> {
        let from = self.tokens / 2.0;
        let cut = |series: &Series| Series {
            points: series.points.iter().filter(|point| point.0 >= from).copied().collect(),
            band: series.band.iter().filter(|edge| edge.0 >= from).copied().collect(),
            ..series.clone()
        };
        let figure = LineChart {
            title: format!("{}, second half", chart.title),
            x: chart.x.clone().with_range(Some((from, self.tokens))),
            y: chart.y.clone(),
            series: chart.series.iter().map(cut).collect(),
        };
        captioned(figure, "The same, enlarged.")
    }

    fn losses(&self) -> Vec<Captioned<LineChart>> {
        let nats = || Axis::linear("nats per token");
        let loss = |step: &StepRecord| step.loss;
        let chart = self.over_tokens("Training loss", nats(), self.smoothed(loss, by_tokens));
        let longest = self.runs().filter_map(|run| run.seconds.last()).copied();
        let longest = longest.fold(0.0, f64::max);
        let (unit, unit_name) = time_unit(longest);
        let over_time = LineChart {
            title: "Training loss over time".into(),
            x: Axis::linear(unit_name).with_range(Some((0.0, longest / unit))),
            y: nats(),
            series: self.smoothed(loss, |run, n| run.seconds[n] / unit),
        };
        let second_half = self.second_half(&chart);
        vec![
            captioned(chart, format!("{MEAN}{}{}", self.noise(), self.bands())),
            captioned(
                over_time,
                "Time of the optimizer steps alone: without evaluations, samples and checkpoints.",
            ),
            second_half,
        ]
    }

    /// Nothing if no run was evaluated.
    fn validation(&self) -> Vec<Captioned<LineChart>> {
        let count = self.runs().map(|run| run.evaluations().count()).max().unwrap_or(0);
        if count == 0 {
            return Vec::new();
        }
        let losses = |run: &Run| -> Vec<Point> {
            run.evaluations().map(|(step, e)| (step.tokens as f64, e.val_loss)).collect()
        };
        let series = self.groups.iter().map(|group| group.series(losses)).collect();
        let chart = self.over_tokens("Validation loss", Axis::linear("nats per token"), series);
        let second_half = (count >= EVALUATIONS).then(|| self.second_half(&chart));
        let caption = format!("On text that training does not see.{}", self.bands());
        [captioned(chart, caption)].into_iter().chain(second_half).collect()
    }

    /// On a logarithmic axis, so its mean is that of the logarithms.
    fn gradient_norm(&self) -> Captioned<LineChart> {
        let exponential = |series: Series| Series {
            points: series.points.iter().map(|(x, y)| (*x, y.exp())).collect(),
            band: series.band.iter().map(|(x, l, h)| (*x, l.exp(), h.exp())).collect(),
            ..series
        };
        let logarithms = self.smoothed(|step| step.grad_norm.ln(), by_tokens);
        let series = logarithms.into_iter().map(exponential).collect();
        captioned(
            self.over_tokens("Gradient norm", Axis::log("global norm before clipping"), series),
            format!("Geometric mean over 2% of the steps around each.{}", self.noise()),
        )
    }

    fn learning_rate(&self) -> Captioned<LineChart> {
        let rates = |run: &Run| -> Vec<Point> {
            run.steps.iter().map(|step| (step.tokens as f64, step.lr)).collect()
        };
        let series = self.groups.iter().map(|group| group.series(rates)).collect();
        let figure = self.over_tokens("Learning rate", Axis::linear("learning rate"), series);
        captioned(figure, "Of every step.")
    }

    fn throughput(&self) -> Captioned<LineChart> {
        let series = without_bands(self.smoothed(|step| step.tokens_per_second, by_tokens));
        let speeds = series.iter().flat_map(|series| &series.points).map(|point| point.1);
        let highest = speeds.filter(|speed| speed.is_finite()).fold(0.0, f64::max);
        let axis = Axis::linear("tokens per second").with_range(Some((0.0, highest)));
        let caption = format!("Data loading and update included. {MEAN}");
        captioned(self.over_tokens("Throughput", axis, series), caption)
    }

    /// Nothing if no device's peak is known.
    fn utilisation(&self) -> Option<Captioned<LineChart>> {
        let percent = |step: &StepRecord| step.mfu.map_or(f64::NAN, |share| share * 100.0);
        let mut series = without_bands(self.smoothed(percent, by_tokens));
        series.retain(|series| series.points.iter().any(|point| point.1.is_finite()));
        let caption = format!(
            "Tokens per second times FLOPs per token ({FLOPS_FORMULA}) over the dense peak of the \
             device. {MEAN}"
        );
        (!series.is_empty()).then(|| {
            let axis = Axis::linear("% of the device's peak");
            captioned(self.over_tokens("Model FLOPs utilisation", axis, series), caption)
        })
    }

    /// A line for each group, smoothed, with the noise of single runs around it.
    fn smoothed(
        &self,
        y: impl Fn(&StepRecord) -> f64,
        x: impl Fn(&Run, usize) -> f64,
    ) -> Vec<Series> {
        let line = |run: &Run| -> Vec<Point> {
            let values: Vec<f64> = run.steps.iter().map(&y).collect();
            let means = moving_mean(&values);
            means.into_iter().enumerate().map(|(n, mean)| (x(run, n), mean)).collect()
        };
        let noise = |run: &Run| {
            let steps = run.steps.iter().enumerate();
            steps.map(|(n, step)| (x(run, n), y(step), y(step))).collect()
        };
        let of_group = |group: &Group| match &group.runs[..] {
            [run] if self.groups.len() <= NOISY => group.series(line).with_band(noise(run)),
            _ => group.series(line),
        };
        self.groups.iter().map(of_group).collect()
    }

    fn noise(&self) -> &'static str {
        let shown = self.groups.len() <= NOISY && self.groups.iter().any(|g| g.runs.len() == 1);
        if shown { " Shade around a single run: every step." } else { "" }
    }

    fn bands(&self) -> &'static str {
        let several = self.groups.iter().any(|group| group.runs.len() > 1);
        if several { " Shade around the mean of several seeds: lowest to highest." } else { "" }
    }
}

const MEAN: &str = "Mean over 2% of the steps around each.";

fn by_tokens(run: &Run, n: usize) -> f64 {
    run.steps[n].tokens as f64
}

fn without_bands(series: Vec<Series>) -> Vec<Series> {
    series.into_iter().map(|series| series.with_band(Vec::new())).collect()
}

/// Mean over a window around each value. At the front, where losses fall fast, it is only as wide
/// as leaves the value in its middle; at the end it has no second half. What is not finite stays so
/// and does not count for its neighbours.
fn moving_mean(values: &[f64]) -> Vec<f64> {
    let mut sums = vec![(0.0, 0usize)];
    for value in values {
        let (sum, count) = sums[sums.len() - 1];
        sums.push(if value.is_finite() { (sum + value, count + 1) } else { (sum, count) });
    }
    let widest = values.len() / (2 * SMOOTHED);
    let mean = |n: usize| {
        let half = widest.min(n);
        if half == 0 || !values[n].is_finite() {
            return values[n];
        }
        let (before, behind) = (sums[n - half], sums[(n + half + 1).min(values.len())]);
        (behind.0 - before.0) / (behind.1 - before.1) as f64
    };
    (0..values.len()).map(mean).collect()
}

/// Seconds in the unit that suits a duration, and its name.
fn time_unit(longest: f64) -> (f64, &'static str) {
    match longest {
        ..300.0 => (1.0, "seconds"),
        ..10_800.0 => (60.0, "minutes"),
        ..259_200.0 => (3600.0, "hours"),
        _ => (86_400.0, "days"),
    }
}
