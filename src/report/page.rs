//! The page: a table of the runs, what they differ in, figures, configurations.
//!
//! One file without script. Its content security policy forbids every request, so that a mistake
//! here cannot make one.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use jiff::Timestamp;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use toml::{Table, Value};

use super::curves::{Captioned, curves};
use super::groups::{Group, groups};
use super::layers::{angular, angular_rescaled, bars, variance};
use super::run::Run;
use crate::figure::{Figure, GROUND, INK, MUTED, PAPER, RULE, STYLE, Themed, sample, short};
use crate::metrics::final_loss;
use crate::sensors::{Conditions, Span};
use crate::throughput::Throughput;
use crate::version::Program;

/// What stands above the page.
#[derive(Clone, Debug)]
pub struct Heading {
    /// `None`: the runs' names.
    pub title: Option<String>,
    /// When the page was made.
    pub made: Timestamp,
}

/// The whole page, as UTF-8 HTML. `runs` has at least one.
pub fn page(heading: &Heading, runs: &[Run]) -> String {
    let title = heading.title.clone().unwrap_or_else(|| match runs {
        [run] => run.name.clone(),
        [first, second] => format!("{} and {}", first.name, second.name),
        [first, ..] => format!("{} and {} more runs", first.name, runs.len() - 1),
        [] => String::new(),
    });
    let groups = groups(runs);
    let torn: Vec<&str> = runs.iter().filter(|r| r.torn).map(|r| r.name.as_str()).collect();
    let program = Program::this();
    let sections = [
        ("runs", "Runs", Some(summary(&groups, &torn))),
        ("differences", "What differs", differences(runs, &groups)),
        ("training", "Training", Some(figures("", &curves(&groups)))),
        ("variance", "Variance by layer", section(VARIANCE, &variance(&groups))),
        ("angular", "Angular distance", angular_section(&groups)),
        ("layers", "What each layer does", section(LAYERS, &bars(&groups))),
        ("configurations", "Configurations", Some(configurations(runs))),
    ];
    let present =
        || sections.iter().filter_map(|(id, name, body)| Some((id, name, body.as_ref()?)));
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy"
                    content="default-src 'none'; style-src 'unsafe-inline'; img-src data:";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta name="generator" content={ "isobath " (program.version) };
                title { (title) }
                link rel="icon" href="data:,";
                style { (PreEscaped(variables())) (PreEscaped(STYLE.as_str()))
                    (PreEscaped(include_str!("page.css"))) }
            }
            body {
                header {
                    h1 { (title) }
                    p .quiet {
                        "isobath " (program.version)
                        @if let Some(commit) = program.commit_words() { " (" (commit) ")" }
                        ", " time datetime=(heading.made) { (minute(heading.made)) }
                    }
                    nav aria-label="Sections" {
                        ul { @for (id, name, _) in present() { li { a href={ "#" (id) } { (name) } } } }
                    }
                }
                main {
                    @for (id, name, body) in present() {
                        section aria-labelledby=(id) { h2 id=(id) { (name) } (body) }
                    }
                }
                footer { p {
                    "Runs that differ in their seed alone are drawn as their mean, with a band from the \
                     lowest to the highest. Losses are in nats per token. Hold the pointer over a marker, \
                     a bar or a cell for its value."
                } }
            }
        }
    };
    markup.into_string()
}

const VARIANCE: &str = "Without a scale that grows with depth the variance of the residual stream rises \
                        from layer to layer, until what a block adds hardly counts.";
const ANGULAR: &str = "How far the stream turns between two blocks. Rows near zero: neighbours do almost \
                       the same, and some could go.";
const LAYERS: &str = "Of the last checkpoint that was measured. A layer that costs little when it is \
                      skipped, or that an affine map replaces, contributes little.";

/// The page's colours, taken from the figures'.
fn variables() -> String {
    let colours =
        [("paper", PAPER), ("ground", GROUND), ("ink", INK), ("muted", MUTED), ("line", RULE)];
    let of = |pick: fn(Themed) -> &'static str| {
        colours.iter().fold(String::new(), |mut css, (name, colour)| {
            let _ = write!(css, "--{name}:{};", pick(*colour));
            css
        })
    };
    let (light, dark) = (of(|colour| colour.light), of(|colour| colour.dark));
    format!(":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}")
}

/// "2026-11-28 22:14 UTC"
fn minute(time: Timestamp) -> String {
    let text = time.to_string();
    let minute = text.get(..16).unwrap_or(&text).replace('T', " ");
    format!("{minute} UTC")
}

/// `None` without figures.
fn section<F: Figure>(words: &str, all: &[Captioned<F>]) -> Option<Markup> {
    (!all.is_empty()).then(|| figures(words, all))
}

/// The raw maps in rows of their own, so that runs stand beside runs.
fn angular_section(groups: &[Group]) -> Option<Markup> {
    let raw = section(ANGULAR, &angular(groups))?;
    Some(html! { (raw) (figures("", &angular_rescaled(groups))) })
}

fn figures<F: Figure>(words: &str, all: &[Captioned<F>]) -> Markup {
    html! {
        @if !words.is_empty() { p .quiet { (words) } }
        div .figures {
            @for Captioned { figure, caption } in all {
                figure { (figure.inline()) figcaption { (caption) } }
            }
        }
    }
}

/// A table in a box of its own that scrolls.
fn scrolling(label: &str, table: Markup) -> Markup {
    html! { div .scroll role="region" aria-label=(label) tabindex="0" { (table) } }
}

/// One line for each run, in the order of the groups.
fn summary(groups: &[Group], torn: &[&str]) -> Markup {
    let rows: Vec<(&Group, &Run)> =
        groups.iter().flat_map(|group| group.runs.iter().map(move |run| (group, *run))).collect();
    let evaluation = |run: &Run| run.evaluations().last().map(|(_, evaluation)| *evaluation);
    let best = rows
        .iter()
        .filter_map(|(_, run)| evaluation(run))
        .map(|evaluation| evaluation.val_loss)
        .min_by(f64::total_cmp);
    let is_best = |loss: f64| rows.len() > 1 && best == Some(loss);
    let setting = |run: &Run, key: &str| run.setting(key).unwrap_or_default();
    let table = html! {
        table {
            thead { tr {
                th scope="col" { "run" }
                th .text scope="col" { "placement" }
                th scope="col" { "validation loss" }
                th scope="col" { "perplexity" }
                th scope="col" { "bits per byte" }
                th scope="col" { "training loss" }
                th scope="col" { "tokens" }
                th scope="col" { "time" }
                th scope="col" { "tokens/s" }
                th scope="col" { "parameters" }
                th .text scope="col" { "machine" }
                th .text scope="col" { "commit" }
            } }
            tbody {
                @for (group, run) in &rows {
                    tr {
                        th scope="row" { span .swatch { (sample(group.style)) } (run.name) }
                        td .text { (setting(run, "model.placement")) }
                        @match evaluation(run) {
                            Some(evaluation) => {
                                td .best[is_best(evaluation.val_loss)] {
                                    (format!("{:.4}", evaluation.val_loss))
                                }
                                td { (format!("{:.2}", evaluation.val_perplexity)) }
                                td { (format!("{:.4}", evaluation.val_bits_per_byte)) }
                            }
                            None => { td { "\u{2013}" } td { "\u{2013}" } td { "\u{2013}" } }
                        }
                        td { (format!("{:.4}", final_loss(&run.steps))) }
                        td { (short(run.last().tokens as f64)) }
                        td { (duration(run.seconds[run.seconds.len() - 1])) }
                        td { (short(speed(run))) }
                        td { (run.parameters.map_or("\u{2013}".into(), |n| short(n as f64))) }
                        td .text { (machines(run)) }
                        td .text { (commits(run)) }
                    }
                }
            }
        }
    };
    html! {
        (scrolling("Runs", table))
        p .quiet {
            "Validation: the last one. Training loss: mean over the last 2% of the steps. Time: of the \
             optimizer steps alone. Tokens/s: median over the steps, of the last process and after its \
             first steps where that was recorded."
            @if !torn.is_empty() {
                " The last line of the metrics of " (torn.join(", ")) " was not whole and is left out."
            }
        }
    }
}

fn speed(run: &Run) -> f64 {
    if let Some(last) = run.throughput.last() {
        return last.steady.tokens_per_second;
    }
    let mut speeds: Vec<f64> = run.steps.iter().map(|step| step.tokens_per_second).collect();
    speeds.sort_by(f64::total_cmp);
    speeds[speeds.len() / 2]
}

const NOT_RECORDED: &str = "not recorded";

/// What each process computed on, once each; the configured device where none was recorded.
fn machines(run: &Run) -> String {
    let recorded = distinct(run.sessions.iter().map(|session| session.machine.clone()));
    recorded.or_else(|| run.setting("device")).unwrap_or_else(|| NOT_RECORDED.into())
}

fn commits(run: &Run) -> String {
    let commits = run.sessions.iter().filter_map(|session| session.program.commit_words());
    distinct(commits).unwrap_or_else(|| NOT_RECORDED.into())
}

/// Without repetitions, in their order.
fn distinct(texts: impl Iterator<Item = String>) -> Option<String> {
    let mut seen = BTreeSet::new();
    let all: Vec<String> = texts.filter(|text| seen.insert(text.clone())).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// "2 d 3 h", "1 h 5 min", "3 min 20 s", "42 s"
fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.0} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// Settings that are not the same in all runs, a column for each group; `None` for a single run.
fn differences(runs: &[Run], groups: &[Group]) -> Option<Markup> {
    if runs.len() < 2 {
        return None;
    }
    let keys: BTreeSet<String> = runs.iter().flat_map(|run| keys(&run.config)).collect();
    let differs = |key: &&String| {
        *key != "name" && runs.iter().any(|run| run.setting(key) != runs[0].setting(key))
    };
    let keys: Vec<&String> = keys.iter().filter(differs).collect();
    if keys.is_empty() {
        return Some(html! { p { "Nothing: the runs have the same settings." } });
    }
    let table = html! {
        table {
            thead { tr {
                th scope="col" { "setting" }
                @for group in groups { th .text scope="col" { (group.name) } }
            } }
            tbody {
                @for key in keys {
                    tr {
                        th scope="row" { code { (key) } }
                        @for group in groups {
                            td .text {
                                (distinct(group.runs.iter().filter_map(|run| run.setting(key)))
                                    .unwrap_or_else(|| "\u{2013}".into()))
                            }
                        }
                    }
                }
            }
        }
    };
    Some(scrolling("Settings that differ", table))
}

/// Dotted names of all settings.
fn keys(config: &Table) -> Vec<String> {
    let inner = |(name, value): (&String, &Value)| match value {
        Value::Table(table) => table.keys().map(|key| format!("{name}.{key}")).collect(),
        _ => vec![name.clone()],
    };
    config.iter().flat_map(inner).collect()
}

/// run.toml of each run, and the processes that trained it.
fn configurations(runs: &[Run]) -> Markup {
    html! {
        @for run in runs {
            details {
                summary { (run.name) }
                p .quiet { (run.folder.display()) ", " (run.last().step) " steps" }
                @if run.sessions.is_empty() {
                    p { "Program, commit and machine were not recorded." }
                } @else {
                    (scrolling("Processes", html! {
                        table {
                            thead { tr {
                                th scope="col" { "started" }
                                th scope="col" { "after step" }
                                th .text scope="col" { "machine" }
                                th .text scope="col" { "version" }
                                th .text scope="col" { "commit" }
                            } }
                            tbody { @for session in &run.sessions { tr {
                                th scope="row" { (session.started) }
                                td { (session.step) }
                                td .text { (session.machine) }
                                td .text { (session.program.version) }
                                td .text { (commit(&session.program)) }
                            } } }
                        }
                    }))
                }
                @if !run.throughput.is_empty() { (throughput(&run.throughput)) }
                pre tabindex="0" { code { (run.toml) } }
            }
        }
    }
}

/// What each process that came to its end said of its speed.
fn throughput(sessions: &[Throughput]) -> Markup {
    let none = || "\u{2013}".to_string();
    let percent = |share: Option<f64>| share.map_or_else(none, |it| format!("{:.1}%", 100.0 * it));
    let mib = |bytes: Option<u64>| {
        bytes.map_or_else(none, |it| format!("{:.0}", it as f64 / (1u64 << 20) as f64))
    };
    let mean = |of: fn(&Conditions) -> Option<Span>, it: &Throughput| {
        it.conditions.as_ref().and_then(of).map_or_else(none, |it| format!("{:.0}", it.mean))
    };
    let table = html! {
        table {
            thead { tr {
                th scope="col" { "after step" }
                th scope="col" { "to step" }
                th scope="col" { "tokens/s" }
                th scope="col" { "middle half" }
                th scope="col" { "drift" }
                th scope="col" { "MFU" }
                th scope="col" { "MiB planned" }
                th scope="col" { "taken" }
                th scope="col" { "SM clock, MHz" }
                th scope="col" { "power, W" }
                th .text scope="col" { "clocks held down by" }
            } }
            tbody { @for it in sessions { tr {
                th scope="row" { (it.first_step) }
                td { (it.last_step) }
                td { (short(it.steady.tokens_per_second)) }
                td { (it.steady.middle_half.map(short).join(" to ")) }
                td { (percent(it.steady.drift)) }
                td { (percent(it.utilisation.as_ref().map(|used| used.mfu))) }
                td { (mib(Some(it.memory.planned))) }
                td { (mib(it.memory.peak)) }
                td { (mean(|all| all.sm_clock_mhz, it)) }
                td { (mean(|all| all.power_watts, it)) }
                td .text { (held_down(it).unwrap_or_else(none)) }
            } } }
        }
    };
    let formulas = distinct(sessions.iter().filter_map(|it| {
        let used = it.utilisation.as_ref()?;
        Some(format!("({}) x tokens/s / {:e}", used.flops_formula, used.peak_flops_per_second))
    }));
    html! {
        (scrolling("Throughput", table))
        @if let Some(formulas) = formulas { p .quiet { "MFU = " (formulas) ", the dense peak." } }
    }
}

/// "SW_POWER_CAP (12%)"
fn held_down(session: &Throughput) -> Option<String> {
    let reasons = &session.conditions.as_ref()?.throttled;
    let share = |(reason, share): (&String, &f64)| format!("{reason} ({:.0}%)", 100.0 * share);
    distinct(reasons.iter().map(share))
}

/// All digits.
fn commit(program: &Program) -> String {
    match (&program.commit, program.changed) {
        (None, _) => NOT_RECORDED.to_string(),
        (Some(commit), Some(true)) => format!("{commit} with changes"),
        (Some(commit), _) => commit.clone(),
    }
}
