//! Figures: numbers in, one SVG out. Line charts, bar charts and heat maps for the report and for
//! `isobath depth`.
//!
//! A figure is a value; [`Figure::svg`] makes a file of it that stands alone, [`Figure::inline`]
//! the same drawing for a page that contains [`STYLE`] once. Colours follow the reader's light or
//! dark scheme; series differ in colour, dashes and markers, so that none is told by colour alone
//! (theme.rs). A value that cannot be drawn is left out, and the figure says how many were.
//! Nothing here knows what the numbers mean.

mod bar;
mod drawing;
mod heat;
mod line;
mod scale;
mod theme;
mod thin;

pub use bar::{BarChart, BarGroup};
pub use drawing::{Drawing, Figure, sample};
pub use heat::HeatMap;
pub use line::{Axis, LineChart, Point, Series};
pub use scale::{ScaleKind, short};
pub use theme::{GROUND, INK, MUTED, PAPER, RULE, SERIES, STYLE, Style, Themed};
