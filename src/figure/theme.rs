//! Colours, dashes and markers: what tells one series from another, in light and in dark.
//!
//! The series colours are those of Okabe and Ito ("Color Universal Design", 2008), moved in
//! lightness until each has a contrast of at least 3 to 1 against the paper of its scheme (WCAG
//! 2.2, criterion 1.4.11) and every two stay apart under protanopia, deuteranopia and tritanopia;
//! tests/figure.rs computes both. Heat maps use viridis.

use std::fmt::Write as _;
use std::sync::LazyLock;

/// One colour in the light and in the dark scheme, `#rrggbb`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Themed {
    pub light: &'static str,
    pub dark: &'static str,
}

const fn themed(light: &'static str, dark: &'static str) -> Themed {
    Themed { light, dark }
}

/// What figures are drawn on, and what lies around them on a page.
pub const PAPER: Themed = themed("#ffffff", "#14181d");
pub const GROUND: Themed = themed("#f5f6f8", "#0c0f13");
pub const INK: Themed = themed("#1c2126", "#e3e8ed");
pub const MUTED: Themed = themed("#59626c", "#9aa5b1");
/// Lines that only divide.
pub const RULE: Themed = themed("#e1e5ea", "#2b323a");
const AXIS: Themed = themed("#8a939d", "#6b7681");

/// Blue, vermilion, green, plum, olive, indigo, grey, brown; their counterparts in the dark.
pub const SERIES: [Themed; 8] = [
    themed("#0072b2", "#56b4e9"),
    themed("#d55e00", "#e69f00"),
    themed("#43a584", "#79f8d6"),
    themed("#601157", "#a3529a"),
    themed("#3b3e00", "#f1e948"),
    themed("#3810cd", "#6358f0"),
    themed("#767078", "#8d8d8e"),
    themed("#7b4149", "#d5392a"),
];

/// Lengths of dash and gap, in the order of [`SERIES`].
const DASHES: [&str; 8] =
    ["none", "7 2.5", "2.5 2", "9 2.5 2.5 2.5", "4.5 2", "9 2 2 2 2 2", "1.5 1.5", "12 2.5"];

/// Classes of [`Style::Ordered`].
const ORDERED: usize = 9;

/// What a series looks like.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Style {
    /// The n-th of things without an order, such as runs.
    Nth(usize),
    /// A place in an order, such as a checkpoint's in training: 0 first, 1 last. The last has
    /// the strongest contrast.
    Ordered(f64),
}

impl Style {
    /// The class that sets `color`, and with it every stroke and fill.
    pub(super) fn class(self) -> String {
        match self {
            Style::Nth(n) => format!("fig-c{}", n % SERIES.len()),
            Style::Ordered(place) => {
                let last = (ORDERED - 1) as f64;
                format!("fig-o{}", (place.clamp(0.0, 1.0) * last).round())
            }
        }
    }

    pub(super) fn dashes(self) -> Option<&'static str> {
        match self {
            Style::Nth(n) => Some(DASHES[shape(n)]).filter(|dashes| *dashes != "none"),
            Style::Ordered(_) => None,
        }
    }

    /// Path of the marker around (x, y).
    pub(super) fn marker(self, x: f64, y: f64) -> String {
        let n = match self {
            Style::Nth(n) => shape(n),
            Style::Ordered(_) => 0,
        };
        let shape = match n {
            0 => "m-2.6,0a2.6,2.6 0 1 0 5.2,0a2.6,2.6 0 1 0 -5.2,0z",
            1 => "m-2.4,-2.4h4.8v4.8h-4.8z",
            2 => "m0,-3.4l3.2,5.6h-6.4z",
            3 => "m0,-3.4l3.4,3.4l-3.4,3.4l-3.4,-3.4z",
            4 => "m0,3.4l3.2,-5.6h-6.4z",
            5 => "m-3.2,-1h2.2v-2.2h2v2.2h2.2v2h-2.2v2.2h-2v-2.2h-2.2z",
            6 => "m-1.2,-3.4h2.4v6.8h-2.4z",
            _ => "m-3.4,-1.2h6.8v2.4h-6.8z",
        };
        format!("M{x:.1},{y:.1}{shape}")
    }
}

/// Which dashes and which marker: the ninth series has the first one's colour, but not its shape.
fn shape(n: usize) -> usize {
    (n + n / SERIES.len()) % DASHES.len()
}

/// Every tenth colour of viridis (van der Walt and Smith, 2015; public domain).
const VIRIDIS: [[f64; 3]; 11] = [
    [68.0, 1.0, 84.0],
    [72.0, 36.0, 117.0],
    [65.0, 68.0, 135.0],
    [53.0, 95.0, 141.0],
    [42.0, 120.0, 142.0],
    [33.0, 145.0, 140.0],
    [34.0, 168.0, 132.0],
    [68.0, 191.0, 112.0],
    [122.0, 209.0, 81.0],
    [189.0, 223.0, 38.0],
    [253.0, 231.0, 37.0],
];

/// The colour of a share in 0..1, `#rrggbb`.
pub(super) fn viridis(share: f64) -> String {
    let place = share.clamp(0.0, 1.0) * (VIRIDIS.len() - 1) as f64;
    let below = (place as usize).min(VIRIDIS.len() - 2);
    let between = |c: usize| {
        let (low, high) = (VIRIDIS[below][c], VIRIDIS[below + 1][c]);
        (low + (high - low) * (place - below as f64)).round() as u8
    };
    format!("#{:02x}{:02x}{:02x}", between(0), between(1), between(2))
}

/// The rules that [`super::Figure::inline`] relies on. Every class begins with `fig-`.
pub static STYLE: LazyLock<String> = LazyLock::new(|| {
    let [light, dark] = [|c: Themed| c.light, |c: Themed| c.dark].map(|pick: fn(Themed) -> _| {
        let mut css = String::new();
        let mut rule = |selector: &str, property: &str, value: &str| {
            write!(css, "{selector}{{{property}:{value}}}").unwrap();
        };
        rule(".fig-paper", "fill", pick(PAPER));
        rule(".fig-cut", "stroke", pick(PAPER));
        rule(".fig-ink", "fill", pick(INK));
        rule(".fig-text", "fill", pick(MUTED));
        rule(".fig-grid", "stroke", pick(RULE));
        rule(".fig-axis", "stroke", pick(AXIS));
        rule(".fig-empty", "fill", pick(RULE));
        for (n, colour) in SERIES.into_iter().enumerate() {
            rule(&format!(".fig-c{n}"), "color", pick(colour));
        }
        css
    });
    let ordered = |from: f64, to: f64| -> String {
        let colour = |n: usize| viridis(from + (to - from) * n as f64 / (ORDERED - 1) as f64);
        (0..ORDERED).map(|n| format!(".fig-o{n}{{color:{}}}", colour(n))).collect()
    };
    format!(
        ".fig{{color-scheme:light dark;display:block;width:100%;height:auto;\
         font-family:system-ui,sans-serif;font-size:11px}}\
         .fig-title{{font-size:13px;font-weight:600}}\
         .fig-line{{fill:none;stroke:currentColor;stroke-width:1.6;stroke-linejoin:round}}\
         .fig-mark{{fill:currentColor}}\
         .fig-band{{fill:currentColor;fill-opacity:.2}}\
         .fig-grid,.fig-axis{{stroke-width:1;fill:none}}.fig-cut{{stroke-width:2;fill:none}}\
         .fig-end{{text-anchor:end}}.fig-mid{{text-anchor:middle}}\
         {light}{}@media(prefers-color-scheme:dark){{{dark}{}}}",
        ordered(0.78, 0.02),
        ordered(0.28, 0.98)
    )
});
