//! Bar charts: one bar per category and group, such as layers and runs; values may be negative.
//!
//! Groups stand side by side while their bars are wide enough to be told apart, else one above the
//! other over one scale.

use maud::{Markup, html};

use super::drawing::{Drawing, Figure, LINE, fixed, left_out, legend, text_width};
use super::line::{Axis, Plot, range};
use super::scale::short;
use super::theme::Style;

const HEIGHT: f64 = 190.0;
/// Of each plot where groups are stacked.
const STACKED_HEIGHT: f64 = 76.0;
/// Bars narrower than this are not set side by side.
const NARROWEST: f64 = 4.0;
/// Share of a category's width that its bars fill.
const FILLED: f64 = 0.78;

#[derive(Clone, PartialEq, Debug)]
pub struct BarGroup {
    pub name: String,
    pub style: Style,
    /// One for each category; fewer leave the last ones empty.
    pub values: Vec<f64>,
}

impl BarGroup {
    pub fn new(name: impl Into<String>, style: Style, values: Vec<f64>) -> Self {
        BarGroup { name: name.into(), style, values }
    }
}

#[derive(Clone, PartialEq, Debug)]
pub struct BarChart {
    pub title: String,
    /// What the categories are, such as "layer".
    pub x_label: String,
    pub categories: Vec<String>,
    /// Linear; zero is on it unless its range says otherwise. Bars that a range cuts off are
    /// marked, and their values written below.
    pub y: Axis,
    pub groups: Vec<BarGroup>,
}

impl BarChart {
    /// Layers 1 to the longest group's length.
    pub fn of_layers(title: impl Into<String>, y: Axis, groups: Vec<BarGroup>) -> Self {
        let layers = groups.iter().map(|group| group.values.len()).max().unwrap_or(0);
        let categories = (1..=layers).map(|layer| layer.to_string()).collect();
        BarChart { title: title.into(), x_label: "layer".into(), categories, y, groups }
    }

    fn description(&self) -> String {
        let mut text = format!("Bar chart of {} by {}.", self.y.label, self.x_label);
        for group in &self.groups {
            if let Some((low, high)) = range(group.values.iter().copied().filter(|v| v.is_finite()))
            {
                let (low, high) = (short(low), short(high));
                text.push_str(&format!(" {}: from {low} to {high}.", group.name));
            }
        }
        text
    }
}

impl Figure for BarChart {
    fn draw(&self) -> Drawing {
        let values = || self.groups.iter().flat_map(|group| &group.values).copied();
        let finite = || values().filter(|value| value.is_finite());
        let ys = self.y.range.or_else(|| range(finite().chain([0.0])));
        let xs = Some((0.0, self.categories.len().max(1) as f64));
        let x = Axis::linear(&self.x_label);

        let entries: Vec<_> = self.groups.iter().map(|g| (g.name.as_str(), g.style)).collect();
        let legend = legend(&entries);
        let plot = Plot::new(legend.bottom, (&x, xs), (&self.y, ys), HEIGHT);
        let slot = (plot.right - plot.left) / self.categories.len().max(1) as f64;
        let side_by_side = slot * FILLED / self.groups.len().max(1) as f64 >= NARROWEST;
        let (body, bottom) = if side_by_side || self.groups.len() < 2 {
            let body = html! {
                (plot.frame(false))
                (self.marks(&plot))
                (self.bars(&plot, &self.groups))
                @if finite().next().is_none() { (plot.words("no data")) }
            };
            (body, plot.bottom)
        } else {
            self.stacked(legend.bottom, ys)
        };
        let missing = values().count() - finite().count();
        let why = if missing == 1 { "is not finite" } else { "are not finite" };
        Drawing::new(&self.title, bottom + 2.0 * LINE + 4.0, html! { (legend.body) (body) })
            .describe(&self.description())
            .note(left_out(missing, why))
            .note(self.cut_off(&plot))
    }
}

impl BarChart {
    /// The values of bars that end outside of the plot.
    fn cut_off(&self, plot: &Plot) -> Option<String> {
        let mut cut = Vec::new();
        for (n, category) in self.categories.iter().enumerate() {
            let outside = |value: &f64| value.is_finite() && !plot.y.contains(*value);
            let values: Vec<String> = self
                .groups
                .iter()
                .filter_map(|group| Some((group, group.values.get(n).copied().filter(outside)?)))
                .map(|(group, value)| format!("{} {}", group.name, short(value)))
                .collect();
            if !values.is_empty() {
                cut.push(format!("{} {category}: {}", self.x_label, values.join(", ")));
            }
        }
        (!cut.is_empty()).then(|| format!("Cut off: {}.", cut.join("; ")))
    }

    /// One plot for each group; the marks of the categories below the last.
    fn stacked(&self, above: f64, ys: Option<(f64, f64)>) -> (Markup, f64) {
        let xs = Some((0.0, self.categories.len() as f64));
        let mut bottom = above;
        let mut plots = Vec::new();
        for (n, group) in self.groups.iter().enumerate() {
            let last = n + 1 == self.groups.len();
            let x = Axis::linear(if last { self.x_label.as_str() } else { "" });
            let label = match n {
                0 => format!("{}: {}", self.y.label, group.name),
                _ => group.name.clone(),
            };
            let plot = Plot::new(
                bottom,
                (&x, xs),
                (&Axis { label, ..self.y.clone() }, ys),
                STACKED_HEIGHT,
            );
            bottom = plot.bottom + 4.0;
            plots.push((plot, std::slice::from_ref(group), last));
        }
        let body = html! {
            @for (plot, group, last) in &plots {
                (plot.frame(false))
                @if *last { (self.marks(plot)) }
                (self.bars(plot, group))
            }
        };
        (body, bottom - 4.0)
    }

    /// Names of as many categories as there is room for.
    fn marks(&self, plot: &Plot) -> Markup {
        let slot = (plot.right - plot.left) / self.categories.len().max(1) as f64;
        let widest = self.categories.iter().map(|name| text_width(name)).fold(0.0, f64::max);
        let every = ((widest + 4.0) / slot).ceil().max(1.0) as usize;
        html! {
            @for (n, name) in self.categories.iter().enumerate().step_by(every) {
                text .fig-text.fig-mid x=(fixed(plot.x.at(n as f64 + 0.5)))
                    y=(fixed(plot.bottom + LINE)) { (name) }
            }
        }
    }

    fn bars(&self, plot: &Plot, groups: &[BarGroup]) -> Markup {
        let slot = (plot.right - plot.left) / self.categories.len().max(1) as f64;
        let width = (slot * FILLED / groups.len().max(1) as f64).min(26.0);
        let all = width * groups.len() as f64;
        let left = |category: usize, group: usize| {
            plot.x.at(category as f64 + 0.5) - all / 2.0 + width * group as f64
        };
        let gap = if width > 6.0 { 1.0 } else { 0.0 };
        let zero = plot.y.at(0.0);
        html! {
            (plot.clipped(html! {
                @for (g, group) in groups.iter().enumerate() {
                    g class=(group.style.class()) {
                        @for (n, (value, name)) in
                            group.values.iter().zip(&self.categories).enumerate()
                        {
                            @if value.is_finite() {
                                rect .fig-mark x=(fixed(left(n, g))) width=(fixed(width - gap))
                                    y=(fixed(plot.y.at(*value).min(zero)))
                                    height=(fixed((plot.y.at(*value) - zero).abs().max(0.1)))
                                {
                                    title {
                                        (group.name) ", " (self.x_label) " " (name) ": "
                                        (short(*value))
                                    }
                                }
                                @if !plot.y.contains(*value) {
                                    path .fig-cut d=(cut(left(n, g), width, plot, *value)) {}
                                }
                            }
                        }
                    }
                }
            }))
            path .fig-axis d={ "M" (fixed(plot.left)) "," (fixed(zero)) "H" (fixed(plot.right)) } {}
        }
    }
}

/// Two slanting lines across the end of a bar that does not end in the plot.
fn cut(left: f64, width: f64, plot: &Plot, value: f64) -> String {
    let y = if value > 0.0 { plot.top + 9.0 } else { plot.bottom - 9.0 };
    let line = |y: f64| format!("M{},{}l{},-4", fixed(left - 1.0), fixed(y), fixed(width + 2.0));
    format!("{}{}", line(y), line(y + 4.0))
}
