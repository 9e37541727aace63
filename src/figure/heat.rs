//! Heat maps: rows of cells from the bottom up; rows may differ in length.

use maud::html;

use super::drawing::{Drawing, Figure, LINE, MARGIN, WIDTH, fixed, left_out, text_width};
use super::line::range;
use super::scale::{Scale, ScaleKind, short};
use super::theme::viridis;

const HEIGHT: f64 = 232.0;
/// Steps of the colour bar.
const STEPS: usize = 48;
const BAR_WIDTH: f64 = 150.0;
const BAR_HEIGHT: f64 = 9.0;

#[derive(Clone, PartialEq, Debug)]
pub struct HeatMap {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    /// What the colours stand for.
    pub value_label: String,
    /// Numbers of the first column and of the first row.
    pub first: (usize, usize),
    /// `rows[y][x]`; row 0 is drawn at the bottom.
    pub rows: Vec<Vec<f64>>,
    /// Values of the two ends of the colours; `None`: the extremes.
    pub range: Option<(f64, f64)>,
}

impl Figure for HeatMap {
    fn draw(&self) -> Drawing {
        let values = || self.rows.iter().flatten().copied();
        let finite = || values().filter(|value| value.is_finite());
        let ends = self.range.or_else(|| range(finite()));
        let colours = Scale::tight(ScaleKind::Linear, ends, 0.0, 1.0);
        let (low, high) = ends.unwrap_or((0.0, 1.0));

        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let lines = self.rows.len().max(1);
        let top = 26.0 + 2.0 * LINE + 9.0;
        let bottom = top + HEIGHT;
        let row_name = |y: usize| (self.first.1 + y).to_string();
        let widest = text_width(&row_name(lines - 1));
        let (left, right) = (MARGIN + widest + 6.0, WIDTH - MARGIN - 8.0);
        let (width, height) = ((right - left) / columns as f64, HEIGHT / lines as f64);
        let gap = if width.min(height) > 6.0 { 1.0 } else { 0.0 };
        let every_column = ((text_width("99") + 6.0) / width).ceil().max(1.0) as usize;
        let every_row = (12.0 / height).ceil().max(1.0) as usize;
        let cell_top = |y: usize| bottom - (y + 1) as f64 * height;

        let bar_y = 26.0 + 3.0;
        let bar_left = MARGIN + text_width(&short(low)) + 6.0;
        let step = BAR_WIDTH / STEPS as f64;
        let body = html! {
            text .fig-text x=(MARGIN) y=(fixed(bar_y + 8.5)) { (short(low)) }
            @for n in 0..STEPS {
                rect x=(fixed(bar_left + n as f64 * step)) y=(fixed(bar_y))
                    width=(fixed(step + 0.3)) height=(BAR_HEIGHT)
                    shape-rendering="crispEdges"
                    fill=(viridis((n as f64 + 0.5) / STEPS as f64)) {}
            }
            text .fig-text x=(fixed(bar_left + BAR_WIDTH + 6.0)) y=(fixed(bar_y + 8.5)) {
                (short(high))
            }
            text .fig-text x=(fixed(bar_left + BAR_WIDTH + 18.0 + text_width(&short(high))))
                y=(fixed(bar_y + 8.5)) { (self.value_label) }
            text .fig-text x=(MARGIN) y=(fixed(top - 8.0)) { (self.y_label) }
            @for (y, row) in self.rows.iter().enumerate() {
                @if y.is_multiple_of(every_row) {
                    text .fig-text.fig-end x=(fixed(left - 6.0))
                        y=(fixed(cell_top(y) + height / 2.0 + 3.8)) { (row_name(y)) }
                }
                @for (x, value) in row.iter().enumerate() {
                    rect x=(fixed(left + x as f64 * width)) y=(fixed(cell_top(y)))
                        width=(fixed(width - gap)) height=(fixed(height - gap))
                        class=[(!value.is_finite()).then_some("fig-empty")]
                        fill=[value.is_finite().then(|| viridis(colours.at(*value)))]
                    {
                        title {
                            (self.x_label) " " (self.first.0 + x) ", " (self.y_label) " "
                            (row_name(y)) ": " (short(*value))
                        }
                    }
                }
            }
            @for x in (0..columns).step_by(every_column) {
                text .fig-text.fig-mid x=(fixed(left + (x as f64 + 0.5) * width))
                    y=(fixed(bottom + LINE)) { (self.first.0 + x) }
            }
            text .fig-text.fig-end x=(fixed(right)) y=(fixed(bottom + 2.0 * LINE)) { (self.x_label) }
            @if finite().next().is_none() {
                text .fig-text.fig-mid x=(fixed((left + right) / 2.0))
                    y=(fixed((top + bottom) / 2.0)) { "no data" }
            }
        };
        let missing = values().count() - finite().count();
        let why = if missing == 1 { "is not finite" } else { "are not finite" };
        Drawing::new(&self.title, bottom + 2.0 * LINE + 4.0, body)
            .describe(&format!(
                "Heat map of {} over {} and {}, from {} to {}.",
                self.value_label,
                self.x_label,
                self.y_label,
                short(low),
                short(high)
            ))
            .note(left_out(missing, why))
    }
}
