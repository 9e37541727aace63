//! Runs that differ in their seed alone, drawn as one: their mean, and a band from the lowest to
//! the highest.

use toml::Table;

use super::run::Run;
use crate::figure::{BarGroup, Point, Series, Style};

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
    /// The group's name where all its runs are shown; the run's own where it is one of several, and
    /// how many of them where they are some.
    fn name_of_some(&self, shown: &[&Run]) -> String {
        match (shown, self.runs.len()) {
            ([run], _) => run.name.clone(),
            (some, all) if some.len() < all => format!("{}: {} of {all}", self.name, some.len()),
            _ => self.name.clone(),
        }
    }

    /// What `values` gives for the runs that have the most of it, with those runs: a run that ended
    /// early would cut the mean of the others.
    fn whole<T>(&self, values: impl Fn(&Run) -> Vec<T>) -> (Vec<&Run>, Vec<Vec<T>>) {
        let all: Vec<_> = self.runs.iter().map(|run| (*run, values(run))).collect();
        let longest = all.iter().map(|(_, values)| values.len()).max().unwrap_or(0);
        all.into_iter().filter(|(_, values)| values.len() == longest && longest > 0).unzip()
    }

    /// One line for the group. `points` gives a run's, of which the n-th belong together.
    pub fn series(&self, points: impl Fn(&Run) -> Vec<Point>) -> Series {
        let (runs, mut lines) = self.whole(points);
        let name = self.name_of_some(&runs);
        if lines.len() < 2 {
            return Series::new(name, self.style, lines.pop().unwrap_or_default());
        }
        let mean = |of: &dyn Fn(&Point) -> f64, n: usize| {
            lines.iter().map(|line| of(&line[n])).sum::<f64>() / lines.len() as f64
        };
        let (mut middle, mut band) = (Vec::new(), Vec::new());
        for n in 0..lines[0].len() {
            let x = mean(&|point| point.0, n);
            middle.push((x, mean(&|point| point.1, n)));
            let ys = || lines.iter().map(|line| line[n].1);
            band.push((x, ys().fold(f64::MAX, f64::min), ys().fold(f64::MIN, f64::max)));
        }
        Series::new(name, self.style, middle).with_band(band)
    }

    /// The mean over the group's runs, layer by layer; `None` where no run has `values`.
    pub fn bars(&self, values: impl Fn(&Run) -> Option<Vec<f64>>) -> Option<BarGroup> {
        let (runs, all) = self.whole(|run| values(run).unwrap_or_default());
        let layers = all.first()?.len();
        let mean = |layer| all.iter().map(|v| v[layer]).sum::<f64>() / all.len() as f64;
        let means = (0..layers).map(mean).collect();
        Some(BarGroup::new(self.name_of_some(&runs), self.style, means))
    }
}
