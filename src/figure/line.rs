//! Line charts: several series over one axis, each with an optional band around it.

use maud::{Markup, html};

use super::drawing::{Drawing, Figure, LINE, MARGIN, WIDTH, fixed, left_out, legend, text_width};
use super::scale::{Scale, ScaleKind, TICKS, short};
use super::theme::Style;
use super::thin::{Place, thin, thin_band};

/// Height of the plot itself.
const HEIGHT: f64 = 190.0;
/// Marks on the x axis.
const X_TICKS: usize = 6;
/// Series with more points than this have no markers.
const MARKED: usize = 40;
/// Lines may leave the plot by this much: half their width, and that of a marker.
const OVERHANG: f64 = 4.0;

/// (x, y)
pub type Point = (f64, f64);

#[derive(Clone, PartialEq, Debug)]
pub struct Series {
    pub name: String,
    pub style: Style,
    /// In the order in which the line goes.
    pub points: Vec<Point>,
    /// (x, low, high), with x ascending: a shaded band. May be empty.
    pub band: Vec<(f64, f64, f64)>,
}

impl Series {
    pub fn new(name: impl Into<String>, style: Style, points: Vec<Point>) -> Self {
        Series { name: name.into(), style, points, band: Vec::new() }
    }

    pub fn with_band(mut self, band: Vec<(f64, f64, f64)>) -> Self {
        self.band = band;
        self
    }
}

#[derive(Clone, PartialEq, Debug, Default)]
pub struct Axis {
    /// Quantity and unit.
    pub label: String,
    pub scale: ScaleKind,
    /// From and to; `None`: what the series need. Points outside are cut off, and the figure says
    /// so.
    pub range: Option<(f64, f64)>,
}

impl Axis {
    pub fn linear(label: impl Into<String>) -> Self {
        Axis { label: label.into(), scale: ScaleKind::Linear, range: None }
    }

    pub fn log(label: impl Into<String>) -> Self {
        Axis { label: label.into(), scale: ScaleKind::Log, range: None }
    }

    pub fn with_range(mut self, range: Option<(f64, f64)>) -> Self {
        self.range = range;
        self
    }
}

#[derive(Clone, PartialEq, Debug)]
pub struct LineChart {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
}

impl Figure for LineChart {
    fn draw(&self) -> Drawing {
        let holds = |p: &Point| self.x.scale.holds(p.0) && self.y.scale.holds(p.1);
        let bands = |series: &Series| -> Vec<(f64, f64, f64)> {
            let fits = |b: &(f64, f64, f64)| holds(&(b.0, b.1)) && holds(&(b.0, b.2));
            series.band.iter().filter(|b| fits(b)).copied().collect()
        };
        let bands: Vec<_> = self.series.iter().map(bands).collect();
        let points = || self.series.iter().flat_map(|s| &s.points);
        let drawable = || points().filter(|p| holds(p));
        let edges = || bands.iter().flatten();
        let xs =
            self.x.range.or_else(|| range(drawable().map(|p| p.0).chain(edges().map(|b| b.0))));
        let ys = self
            .y
            .range
            .or_else(|| range(drawable().map(|p| p.1).chain(edges().flat_map(|b| [b.1, b.2]))));

        let entries: Vec<_> = self.series.iter().map(|s| (s.name.as_str(), s.style)).collect();
        let legend = legend(&entries);
        let plot = Plot::new(legend.bottom, (&self.x, xs), (&self.y, ys), HEIGHT);
        let outside = drawable().filter(|p| !plot.x.contains(p.0) || !plot.y.contains(p.1)).count();
        let missing = points().count() - drawable().count();
        let logarithmic = [self.x.scale, self.y.scale].contains(&ScaleKind::Log);
        let why = match logarithmic {
            true => "cannot be shown on a logarithmic axis",
            false if missing == 1 => "is not finite",
            false => "are not finite",
        };
        let body = html! {
            (legend.body)
            (plot.frame(true))
            (plot.clipped(html! {
                @for (series, band) in self.series.iter().zip(&bands) {
                    g class=(series.style.class()) {
                        (plot.band(band))
                        (plot.line(series, &holds))
                    }
                }
            }))
            @if drawable().next().is_none() { (plot.words("no data")) }
        };
        Drawing::new(&self.title, plot.bottom + 2.0 * LINE + 4.0, body)
            .describe(&self.description())
            .note(left_out(missing, why))
            .note(match outside {
                0 => None,
                1 => Some("1 value is outside.".to_string()),
                many => Some(format!("{many} values are outside.")),
            })
    }
}

impl LineChart {
    /// What a reader who does not see the figure should know.
    fn description(&self) -> String {
        let mut text = format!("Line chart of {} over {}.", self.y.label, self.x.label);
        for series in &self.series {
            let finite = |p: &&Point| p.0.is_finite() && p.1.is_finite();
            let (first, last) =
                (series.points.iter().find(finite), series.points.iter().rfind(finite));
            if let (Some(first), Some(last)) = (first, last) {
                let [x0, y0, x1, y1] = [first.0, first.1, last.0, last.1].map(short);
                text.push_str(&format!(" {}: {y0} at {x0} to {y1} at {x1}.", series.name));
            }
        }
        text
    }
}

/// Smallest and largest.
pub(super) fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |range, value| {
        let (low, high) = range.unwrap_or((value, value));
        Some((low.min(value), high.max(value)))
    })
}

/// The rectangle between two axes.
pub(super) struct Plot {
    pub x: Scale,
    pub y: Scale,
    pub left: f64,
    pub top: f64,
    pub right: f64,
    pub bottom: f64,
    x_label: String,
    y_label: String,
    y_ticks: Vec<(f64, String)>,
}

impl Plot {
    /// Below what ends at `above`, with room for the texts of both axes.
    pub fn new(
        above: f64,
        (x, xs): (&Axis, Option<(f64, f64)>),
        (y, ys): (&Axis, Option<(f64, f64)>),
        height: f64,
    ) -> Self {
        let top = above + LINE + 11.0;
        let bottom = top + height;
        let y_scale = Scale::round(y.scale, ys, bottom, top);
        let y_ticks = y_scale.ticks(TICKS);
        let widest = y_ticks.iter().map(|(_, text)| text_width(text)).fold(0.0, f64::max);
        let (left, right) = (MARGIN + widest + 6.0, WIDTH - MARGIN - 8.0);
        Plot {
            x: Scale::tight(x.scale, xs, left, right),
            y: y_scale,
            left,
            top,
            right,
            bottom,
            x_label: x.label.clone(),
            y_label: y.label.clone(),
            y_ticks,
        }
    }

    /// Grid, axes and their texts; the marks of the x axis unless the caller draws its own.
    pub fn frame(&self, x_marks: bool) -> Markup {
        let x_ticks = if x_marks { self.x.ticks(X_TICKS) } else { Vec::new() };
        let (left, right) = (fixed(self.left), fixed(self.right));
        let (top, bottom) = (fixed(self.top), fixed(self.bottom));
        html! {
            text .fig-text x=(MARGIN) y=(fixed(self.top - 11.0)) { (self.y_label) }
            @for (value, text) in &self.y_ticks {
                path .fig-grid d={ "M" (left) "," (fixed(self.y.at(*value))) "H" (right) } {}
                text .fig-text.fig-end x=(fixed(self.left - 6.0))
                    y=(fixed(self.y.at(*value) + 3.8)) { (text) }
            }
            path .fig-axis d={ "M" (left) "," (top) "V" (bottom) "H" (right) } {}
            @for (value, text) in &x_ticks {
                path .fig-axis d={ "M" (fixed(self.x.at(*value))) "," (bottom) "v4" } {}
                text .fig-text.fig-mid x=(fixed(self.x.at(*value)))
                    y=(fixed(self.bottom + LINE)) { (text) }
            }
            text .fig-text.fig-end x=(right) y=(fixed(self.bottom + 2.0 * LINE)) { (self.x_label) }
        }
    }

    /// Nothing of `content` is seen outside of the plot.
    pub fn clipped(&self, content: Markup) -> Markup {
        let (x, y) = (self.left - OVERHANG, self.top - OVERHANG);
        let width = self.right - self.left + 2.0 * OVERHANG;
        let height = self.bottom - self.top + 2.0 * OVERHANG;
        let [x, y, width, height] = [x, y, width, height].map(fixed);
        html! {
            svg x=(x) y=(y) width=(width) height=(height) overflow="hidden"
                viewBox={ (x) " " (y) " " (width) " " (height) }
            { (content) }
        }
    }

    /// In the middle, where nothing else is.
    pub fn words(&self, text: &str) -> Markup {
        html! {
            text .fig-text.fig-mid x=(fixed((self.left + self.right) / 2.0))
                y=(fixed((self.top + self.bottom) / 2.0)) { (text) }
        }
    }

    fn band(&self, band: &[(f64, f64, f64)]) -> Markup {
        let places: Vec<_> = band
            .iter()
            .map(|(x, low, high)| (self.x.at(*x), self.y.at(*high), self.y.at(*low)))
            .collect();
        let places = thin_band(&places);
        if places.len() < 2 {
            return html! {};
        }
        let upper = places.iter().map(|(x, upper, _)| (*x, *upper));
        let lower = places.iter().rev().map(|(x, _, lower)| (*x, *lower));
        let outline: Vec<Place> = upper.chain(lower).collect();
        html! { path .fig-band d={ (path(&outline)) "z" } {} }
    }

    /// Interrupted where a point cannot be drawn.
    fn line(&self, series: &Series, holds: &impl Fn(&Point) -> bool) -> Markup {
        let place = |p: &Point| (self.x.at(p.0), self.y.at(p.1));
        let pieces: Vec<Vec<Place>> = series
            .points
            .split(|point| !holds(point))
            .filter(|piece| !piece.is_empty())
            .map(|piece| thin(&piece.iter().map(place).collect::<Vec<_>>()))
            .collect();
        let lines: String =
            pieces.iter().filter(|p| p.len() > 1).map(|piece| path(piece)).collect();
        // A point alone between two gaps would otherwise be lost.
        let alone = pieces.iter().filter(|p| p.len() == 1).map(|p| p[0]);
        let marked = series.points.len() <= MARKED;
        html! {
            @if !lines.is_empty() {
                path .fig-line stroke-dasharray=[series.style.dashes()] d=(lines) {}
            }
            @if marked {
                @for point in series.points.iter().filter(|point| holds(point)) {
                    path .fig-mark d=(series.style.marker(place(point).0, place(point).1)) {
                        title { (series.name) " (" (short(point.0)) ", " (short(point.1)) ")" }
                    }
                }
            } @else {
                @for (x, y) in alone { path .fig-mark d=(series.style.marker(x, y)) {} }
            }
        }
    }
}

fn path(places: &[Place]) -> String {
    let mut text = String::new();
    for (i, (x, y)) in places.iter().enumerate() {
        text.push(if i == 0 { 'M' } else { 'L' });
        text.push_str(&fixed(*x));
        text.push(',');
        text.push_str(&fixed(*y));
    }
    text
}
