//! Runs that differ in their seed alone, drawn as one: their mean, and a band from the lowest to
//! the highest.

use toml::Table;

use super::run::Run;
use crate::figure::{Point, Series, Style};

/// Keys in which runs of one group may differ.
const FREE: [&str; 2] = ["seed", "name"];

#[derive(Clone, Debug)]
pub(super) struct Group<'a> {
    pub name: String,
    pub style: Style,
    /// At least one.
    pub runs: Vec<&'a Run>,
}

/// In the order of their first runs.
pub(super) fn groups(runs: &[Run]) -> Vec<Group<'_>> {
    let mut found: Vec<(Table, Vec<&Run>)> = Vec::new();
    for run in runs {
        let mut settings = run.config.clone();
        settings.retain(|key, _| !FREE.contains(&key));
        match found.iter_mut().find(|(other, _)| *other == settings) {
            Some((_, members)) => members.push(run),
            None => found.push((settings, vec![run])),
        }
    }
    let members = found.into_iter().map(|(_, runs)| runs).enumerate();
    members.map(|(n, runs)| Group { name: name_of(&runs), style: Style::Nth(n), runs }).collect()
}

/// A run's own name, or what the names have in common at the front.
fn name_of(runs: &[&Run]) -> String {
    let first = &runs[0].name;
    if runs.len() == 1 {
        return first.clone();
    }
    let shared = |name: &str| {
        first.char_indices().zip(name.chars()).find(|((_, a), b)| a != b).map(|((i, _), _)| i)
    };
    let shortest = runs.iter().map(|run| run.name.len()).min().unwrap_or(0);
    let end = runs.iter().filter_map(|run| shared(&run.name)).min().unwrap_or(shortest);
    let front = first[..end].trim_end_matches(|c: char| c.is_ascii_digit());
    let front = front.trim_end_matches("seed").trim_end_matches(['-', '_', '.', '/', ' ']);
    match front {
        "" => format!("{first} and {} more seeds", runs.len() - 1),
        front => format!("{front} ({} seeds)", runs.len()),
    }
}

impl Group<'_> {
    /// One line for the group. `points` gives a run's, of which the n-th belong together.
    pub fn series(&self, points: impl Fn(&Run) -> Vec<Point>) -> Series {
        let lines: Vec<Vec<Point>> =
            self.runs.iter().map(|run| points(run)).filter(|line| !line.is_empty()).collect();
        // A run that ended early would cut the mean of the others; it is left out, and said so.
        let longest = lines.iter().map(Vec::len).max().unwrap_or(0);
        let all = lines.len();
        let lines: Vec<Vec<Point>> =
            lines.into_iter().filter(|line| line.len() == longest).collect();
        let name = match lines.len() {
            whole if whole < all => format!("{} ({whole} of {all})", self.name),
            _ => self.name.clone(),
        };
        if lines.len() < 2 {
            let line = lines.into_iter().next().unwrap_or_default();
            return Series::new(&name, self.style, line);
        }
        let mean = |of: &dyn Fn(&Point) -> f64, n: usize| {
            lines.iter().map(|line| of(&line[n])).sum::<f64>() / lines.len() as f64
        };
        let (mut middle, mut band) = (Vec::new(), Vec::new());
        for n in 0..longest {
            let x = mean(&|point| point.0, n);
            middle.push((x, mean(&|point| point.1, n)));
            let ys = || lines.iter().map(|line| line[n].1);
            band.push((x, ys().fold(f64::MAX, f64::min), ys().fold(f64::MIN, f64::max)));
        }
        Series::new(&name, self.style, middle).with_band(band)
    }

    /// The mean over the group's runs, layer by layer. Runs without `values`, or with fewer layers
    /// than the first, do not count.
    pub fn mean(&self, values: impl Fn(&Run) -> Option<Vec<f64>>) -> Option<Vec<f64>> {
        let all: Vec<Vec<f64>> = self.runs.iter().filter_map(|run| values(run)).collect();
        let layers = all.first()?.len();
        let all: Vec<_> = all.into_iter().filter(|values| values.len() == layers).collect();
        let mean = |layer| all.iter().map(|v| v[layer]).sum::<f64>() / all.len() as f64;
        Some((0..layers).map(mean).collect())
    }
}
