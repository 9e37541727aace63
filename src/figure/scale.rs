//! From values to places along an axis, and the round numbers to write beside it.

/// How values are spread along an axis.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ScaleKind {
    #[default]
    Linear,
    /// Base 10. A value that is not positive has no place.
    Log,
}

impl ScaleKind {
    /// Whether `value` has a place on such an axis.
    pub(super) fn holds(self, value: f64) -> bool {
        value.is_finite() && (self == ScaleKind::Linear || value > 0.0)
    }
}

/// An axis: values between `low` and `high` lie between `from` and `to` in the drawing.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    kind: ScaleKind,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    /// Ends at the values given. Without any, or if all are one, around it.
    pub fn tight(kind: ScaleKind, range: Option<(f64, f64)>, from: f64, to: f64) -> Self {
        let (low, high) = match (range, kind) {
            (Some((low, high)), _) if low < high => (low, high),
            (Some((value, _)), ScaleKind::Log) => (value / 2.0, value * 2.0),
            (Some((value, _)), ScaleKind::Linear) if value != 0.0 => {
                (value - value.abs() / 2.0, value + value.abs() / 2.0)
            }
            (_, ScaleKind::Log) => (1.0, 10.0),
            (_, ScaleKind::Linear) => (0.0, 1.0),
        };
        Scale { kind, low, high, from, to }
    }

    /// Ends at round numbers on or outside the values given, if the axis is linear.
    pub fn round(kind: ScaleKind, range: Option<(f64, f64)>, from: f64, to: f64) -> Self {
        let mut scale = Scale::tight(kind, range, from, to);
        match kind {
            ScaleKind::Linear => {
                let step = step(scale.high - scale.low, TICKS);
                scale.low = (scale.low / step + 1e-9).floor() * step;
                scale.high = (scale.high / step - 1e-9).ceil() * step;
            }
            ScaleKind::Log => {
                let margin = (scale.high / scale.low).powf(0.04);
                (scale.low, scale.high) = (scale.low / margin, scale.high * margin);
            }
        }
        scale
    }

    /// Where `value` lies in the drawing.
    pub fn at(&self, value: f64) -> f64 {
        let share = match self.kind {
            ScaleKind::Linear => (value - self.low) / (self.high - self.low),
            ScaleKind::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        self.from + share * (self.to - self.from)
    }

    /// Whether `value` lies between the ends, give or take rounding.
    pub fn contains(&self, value: f64) -> bool {
        let tolerance = (self.high - self.low) * 1e-9;
        self.low - tolerance <= value && value <= self.high + tolerance
    }

    /// About `count` round values with their texts.
    pub fn ticks(&self, count: usize) -> Vec<(f64, String)> {
        let values = match self.kind {
            ScaleKind::Linear => self.linear_ticks(count),
            ScaleKind::Log => self.log_ticks(count),
        };
        let step = match self.kind {
            ScaleKind::Linear => values.windows(2).map(|w| w[1] - w[0]).next(),
            ScaleKind::Log => None,
        };
        let texts = labels(&values, step);
        values.into_iter().zip(texts).collect()
    }

    fn linear_ticks(&self, count: usize) -> Vec<f64> {
        let step = step(self.high - self.low, count);
        let first = (self.low / step - 1e-9).ceil() as i64;
        let last = (self.high / step + 1e-9).floor() as i64;
        (first..=last).map(|n| n as f64 * step).collect()
    }

    /// Powers of ten; 1, 2, 5 or 1 to 9 of each where these are few.
    fn log_ticks(&self, count: usize) -> Vec<f64> {
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let of = |digits: &[u32]| -> Vec<f64> {
            (first..=last)
                .flat_map(|power| digits.iter().map(move |d| power_of_ten(power, *d)))
                .filter(|value| self.contains(*value))
                .collect()
        };
        let finest: [&[u32]; 3] = [&[1, 2, 3, 4, 5, 6, 7, 8, 9], &[1, 2, 5], &[1]];
        if let Some(values) =
            finest.into_iter().map(of).find(|values| (3..=count + 2).contains(&values.len()))
        {
            return values;
        }
        if self.high / self.low < 10.0 {
            return self.linear_ticks(count);
        }
        let decades = of(&[1]);
        let every = decades.len().div_ceil(count).max(1);
        decades.into_iter().step_by(every).collect()
    }
}

/// Of a whole number of tenths, hundredths and so on, as near as `f64` gets: 3e-4, not 2.9999e-4.
fn power_of_ten(power: i32, digit: u32) -> f64 {
    format!("{digit}e{power}").parse().unwrap_or(f64::NAN)
}

/// Marks on a value axis.
pub(super) const TICKS: usize = 5;

/// 1, 2 or 5 times a power of ten, of which about `count` make `span`.
fn step(span: f64, count: usize) -> f64 {
    let rough = span / count.max(1) as f64;
    let power = rough.log10().floor() as i32;
    [1, 2, 5, 10]
        .into_iter()
        .map(|digit| power_of_ten(power, digit))
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(rough)
}

/// Thousand, million and so on, with the letter that stands for it.
const UNITS: [(f64, &str); 4] = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")];

/// From here on numbers are written with a letter, below [`SMALL`] with an exponent.
const LARGE: f64 = 1e4;
const SMALL: f64 = 1e-3;

/// Texts of the marks of one axis: one unit and one number of decimals for all of them if they
/// have a `step`, else each as [`short`].
fn labels(values: &[f64], step: Option<f64>) -> Vec<String> {
    let largest = values.iter().fold(0.0f64, |max, value| max.max(value.abs()));
    let Some(step) = step.filter(|_| largest >= SMALL) else {
        return values.iter().map(|value| short(*value)).collect();
    };
    let (unit, letter) = match UNITS.into_iter().find(|(unit, _)| largest >= *unit) {
        Some(found) if largest >= LARGE => found,
        _ => (1.0, ""),
    };
    let decimals = (-(step / unit * 1.000_001).log10().floor()).max(0.0) as usize;
    values
        .iter()
        .map(|value| match *value {
            0.0 => "0".to_string(),
            value => format!("{:.decimals$}{letter}", value / unit),
        })
        .collect()
}

/// Three digits, a letter for large numbers, an exponent for small ones: 1.5M, 3e-4, 0.25.
pub fn short(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() || size == 0.0 {
        return format!("{value}");
    }
    if !(SMALL..1e15).contains(&size) {
        let text = format!("{value:.2e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{exponent}", trimmed(digits));
    }
    let (unit, letter) = match UNITS.into_iter().find(|(unit, _)| size >= *unit * 0.9995) {
        Some(found) if size >= LARGE * 0.9995 => found,
        _ => (1.0, ""),
    };
    let scaled = value / unit;
    let decimals = (2.0 - scaled.abs().log10().floor()).clamp(0.0, 5.0) as usize;
    format!("{}{letter}", trimmed(&format!("{scaled:.decimals$}")))
}

/// Without zeros after the point.
fn trimmed(text: &str) -> &str {
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => text,
    }
}
