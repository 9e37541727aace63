//! The sheet a figure is drawn on: title, legend, notes, and the SVG around them.

use maud::{Markup, PreEscaped, html};

use super::theme::{STYLE, Style};

/// Units of every figure's width. At 310 pixels, what a phone leaves, text is 9 pixels high.
pub(super) const WIDTH: f64 = 380.0;
/// Free space on the left and right of everything.
pub(super) const MARGIN: f64 = 8.0;
/// Height of a line of text.
pub(super) const LINE: f64 = 15.0;
/// Mean width of a character, a little generous.
const CHARACTER: f64 = 6.1;
const TITLE_CHARACTER: f64 = 7.3;

/// A figure of numbers.
pub trait Figure {
    fn draw(&self) -> Drawing;

    /// A file of its own.
    fn svg(&self) -> String {
        self.draw().svg()
    }

    /// For a page that contains [`STYLE`].
    fn inline(&self) -> Markup {
        self.draw().inline()
    }
}

/// A finished drawing.
#[derive(Clone, Debug)]
pub struct Drawing {
    title: String,
    /// For people who cannot see the drawing.
    description: String,
    /// Lines below the drawing, what was left out among them.
    notes: Vec<String>,
    /// Height of everything above the notes.
    height: f64,
    body: Markup,
}

impl Drawing {
    pub(super) fn new(title: &str, height: f64, body: Markup) -> Self {
        Drawing {
            title: title.to_string(),
            description: String::new(),
            notes: Vec::new(),
            height,
            body,
        }
    }

    pub(super) fn describe(mut self, description: &str) -> Self {
        self.description = description.to_string();
        self
    }

    /// `None` adds nothing.
    pub(super) fn note(mut self, note: Option<String>) -> Self {
        let most = ((WIDTH - 2.0 * MARGIN) / CHARACTER) as usize;
        self.notes.extend(note.iter().flat_map(|note| wrap(note, most)));
        self
    }

    pub fn svg(&self) -> String {
        let style = html! { style { (PreEscaped(STYLE.as_str())) } };
        format!("{}\n", self.root(Some(style)).into_string())
    }

    pub fn inline(&self) -> Markup {
        self.root(None)
    }

    fn root(&self, style: Option<Markup>) -> Markup {
        let note_at = |n: usize| self.height + 4.0 + LINE * (n as f64 + 0.75);
        let height = self.height + LINE * self.notes.len() as f64 + MARGIN;
        let markup = html! {
            svg .fig xmlns="http://www.w3.org/2000/svg" role="img" aria-label=(self.title)
                viewBox={ "0 0 " (WIDTH) " " (fixed(height)) }
            {
                title { (self.title) }
                desc {
                    (self.description)
                    @for note in &self.notes { " " (note) }
                }
                @if let Some(style) = style { (style) }
                rect .fig-paper width=(WIDTH) height=(fixed(height)) {}
                text .fig-title.fig-ink x=(MARGIN) y="19" {
                    (shortened(&self.title, ((WIDTH - 2.0 * MARGIN) / TITLE_CHARACTER) as usize))
                }
                (self.body)
                @for (n, note) in self.notes.iter().enumerate() {
                    text .fig-text x=(MARGIN) y=(fixed(note_at(n))) { (note) }
                }
            }
        };
        PreEscaped(clean(&markup.into_string()))
    }
}

/// The key of a figure's series, below its title.
pub(super) struct Legend {
    pub body: Markup,
    /// Where it ends.
    pub bottom: f64,
}

/// Length of a series' line in the legend, and the space after it and after its name.
const SAMPLE: f64 = 22.0;
const GAP: f64 = 5.0;

/// Entries in rows from left to right; a single series needs no key unless it has a name.
pub(super) fn legend(entries: &[(&str, Style)]) -> Legend {
    let most = ((WIDTH - 2.0 * MARGIN - SAMPLE - GAP) / CHARACTER) as usize;
    let (mut x, mut y) = (MARGIN, 26.0 + LINE * 0.5);
    let mut placed = Vec::new();
    for (name, style) in entries.iter().filter(|(name, _)| !name.is_empty()) {
        let text = shortened(name, most);
        let width = SAMPLE + GAP + text_width(&text);
        if x > MARGIN && x + width > WIDTH - MARGIN {
            (x, y) = (MARGIN, y + LINE);
        }
        placed.push((x, y, text, name, *style));
        x += width + 2.0 * GAP;
    }
    let body = html! {
        @for (x, y, text, name, style) in &placed {
            g class=(style.class()) {
                title { (name) }
                path .fig-line stroke-dasharray=[style.dashes()]
                    d={ "M" (fixed(*x)) "," (fixed(*y)) "h" (SAMPLE) } {}
                path .fig-mark d=(style.marker(x + SAMPLE / 2.0, *y)) {}
                text .fig-ink x=(fixed(x + SAMPLE + GAP)) y=(fixed(y + 3.8)) { (text) }
            }
        }
    };
    let bottom = if placed.is_empty() { 26.0 } else { y + LINE * 0.5 };
    Legend { body, bottom }
}

/// A piece of a series' line with its marker, for a text beside the figures.
pub fn sample(style: Style) -> Markup {
    html! {
        svg .fig-sample viewBox={ "0 0 " (SAMPLE) " 8" } aria-hidden="true" {
            g class=(style.class()) {
                path .fig-line stroke-dasharray=[style.dashes()] d={ "M0,4h" (SAMPLE) } {}
                path .fig-mark d=(style.marker(SAMPLE / 2.0, 4.0)) {}
            }
        }
    }
}

/// About how wide a text of the ordinary size is.
pub(super) fn text_width(text: &str) -> f64 {
    text.chars().count() as f64 * CHARACTER
}

/// One decimal: a tenth of a unit is less than a pixel is worth.
pub(super) fn fixed(value: f64) -> String {
    let text = format!("{value:.1}");
    match text.strip_suffix(".0") {
        Some("-0") => "0".to_string(),
        Some(whole) => whole.to_string(),
        None => text,
    }
}

/// At most `most` characters; what is too long loses its middle, since names that belong together
/// differ at the end.
fn shortened(text: &str, most: usize) -> String {
    let characters: Vec<char> = text.chars().collect();
    if characters.len() <= most {
        return text.to_string();
    }
    let (front, back) = (most / 2, most - most / 2 - 1);
    let front: String = characters[..front].iter().collect();
    let back: String = characters[characters.len() - back..].iter().collect();
    format!("{front}\u{2026}{back}")
}

fn wrap(text: &str, most: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= most => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(shortened(word, most)),
        }
    }
    lines
}

/// Without the characters that XML cannot hold at all.
fn clean(text: &str) -> String {
    let allowed = |c: char| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}');
    text.chars().map(|c| if allowed(c) { c } else { ' ' }).collect()
}

/// "3 values are not finite and left out."; `None` for none.
pub(super) fn left_out(count: usize, why: &str) -> Option<String> {
    match count {
        0 => None,
        1 => Some(format!("1 value {why} and is left out.")),
        count => Some(format!("{count} values {why} and are left out.")),
    }
}
