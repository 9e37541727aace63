//! src/report: the page of synthetic runs, as text and in a browser; what is refused.
//!
//! With ISOBATH_SCREENSHOTS=FOLDER the browser's pictures stay there.

mod browser;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use isobath::config::{Config, Placement};
use isobath::depth::{
    Angular, DepthReport, Jacobian, JacobianReport, Linear, LinearReport, Skipped, TaskReport,
};
use isobath::figure::{GROUND, PAPER, SERIES, short};
use isobath::metrics::{Evaluation, SessionRecord, StepRecord};
use isobath::report::{Heading, page, read_runs};
use isobath::rundir::RunDir;
use isobath::throughput::WARM_UP_STEPS;
use isobath::train::{Console, Interrupt, Run, train};
use isobath::version::Program;
use jiff::Timestamp;
use roxmltree::Document;
use tempfile::{TempDir, tempdir};

use crate::support::{isobath, json_lines, run_config, small_model, text_file};
use browser::{Browser, Screen};

const LAYERS: usize = 6;
const STEPS: u64 = 400;
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A number that looks random.
fn noise(step: u64) -> f64 {
    (step * 7919 % 101) as f64 / 101.0 - 0.5
}

/// The step's loss; `worse` is how much more than another run's.
fn step_record(step: u64, worse: f64) -> StepRecord {
    let share = step as f64 / STEPS as f64;
    let loss = 3.0 + worse + 4.0 * (-6.0 * share).exp();
    let evaluated = step.is_multiple_of(50);
    StepRecord {
        step,
        tokens: step * 1000,
        loss: loss + 0.1 * noise(step),
        grad_norm: (0.5 + 0.2 * noise(step + 1)) * (1.0 + worse),
        lr: 1e-3 * share.min(1.0 - 0.9 * share),
        tokens_per_second: 10_000.0 * (1.0 - 0.5 * worse + 0.2 * noise(step + 3)),
        mfu: Some(0.4 + 0.1 * worse + 0.01 * noise(step + 2)),
        evaluation: evaluated.then(|| Evaluation::new(loss * 500.0, 500, 2000)),
    }
}

fn depth_report(step: u64, growth: f64) -> DepthReport {
    let layers = |of: &dyn Fn(f64) -> f64| (0..LAYERS).map(|l| of(l as f64)).collect::<Vec<_>>();
    let rows = |of: &dyn Fn(f64, f64) -> f64| -> Vec<Vec<f64>> {
        let row = |n| (0..=LAYERS - n).map(|l| of(n as f64, l as f64)).collect();
        (1..=LAYERS).map(row).collect()
    };
    let blocks = |of: &dyn Fn(f64) -> f64| -> Vec<Linear> {
        let linear = |increase: &f64| Linear {
            loss: 3.0 + increase,
            loss_increase: *increase,
            explained: 1.0 - increase,
        };
        layers(of).iter().map(linear).collect()
    };
    DepthReport {
        model: PathBuf::from("model"),
        placement: None,
        step: Some(step),
        data: vec!["text.txt".into()],
        layers: LAYERS,
        hidden: 24,
        tokens: 4096,
        sequence: 32,
        loss: 3.0,
        perplexity: 20.0,
        variance: Some((0..=LAYERS).map(|l| growth.powi(l as i32) * step as f64).collect()),
        angular: Some(Angular {
            distance: rows(&|n, l| 0.4 * n / (n + l + 1.0)),
            rescaled: rows(&|n, l| (l / (LAYERS as f64 - n + 0.01)).min(1.0)),
        }),
        skipped: Some(
            layers(&|l| 0.3 / (l + 1.0))
                .into_iter()
                .map(|increase| Skipped {
                    loss: 3.0 + increase,
                    perplexity: 20.0 * increase.exp(),
                    loss_increase: increase,
                    perplexity_increase: 20.0 * (increase.exp() - 1.0),
                })
                .collect(),
        ),
        gradient_norm: Some(layers(&|l| 0.5 + 0.1 * l)),
        jacobian: Some(JacobianReport {
            tokens: 8,
            context: 16,
            blocks: layers(&|l| l + 1.0)
                .into_iter()
                .map(|l| Jacobian {
                    diagonal_mean: 1.0 / l,
                    off_diagonal_norm: l,
                    relative_distance: l / 4.0,
                })
                .collect(),
        }),
        linear: Some(LinearReport { fitted_tokens: 4096, blocks: blocks(&|l| 0.1 / (l + 1.0)) }),
        task: Some(TaskReport {
            task: PathBuf::from("task.jsonl"),
            shots: 0,
            questions: 100,
            accuracy: 0.4,
            standard_error: Some(0.05),
            change: layers(&|l| l - 4.0),
        }),
    }
}

struct Runs {
    folder: TempDir,
}

impl Runs {
    fn new() -> Self {
        Runs { folder: tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A finished run, written as training writes it.
    fn add(&self, name: &str, worse: f64, change: impl FnOnce(&mut Config)) -> PathBuf {
        let path = self.path(name);
        let run = RunDir::create(&path).unwrap();
        let mut config = run_config(&small_model());
        change(&mut config);
        run.write_config(&config.to_toml().unwrap()).unwrap();
        let mut metrics = run.metrics().unwrap();
        for step in 1..=STEPS {
            metrics.append(&step_record(step, worse)).unwrap();
        }
        let program =
            Program { version: "0.1.0".into(), commit: Some(COMMIT.into()), changed: Some(false) };
        let mut session = SessionRecord::new(0, "NVIDIA H200".into());
        session.program = program;
        run.sessions().unwrap().append(&session).unwrap();
        path
    }

    /// Measurements of two checkpoints.
    fn add_depth(&self, name: &str, growth: f64) {
        let folder = self.path(name).join("depth");
        fs::create_dir(&folder).unwrap();
        for step in [200, 400] {
            let report = serde_json::to_vec(&depth_report(step, growth)).unwrap();
            fs::write(folder.join(format!("step-{step:08}.json")), report).unwrap();
        }
    }

    fn pre_and_lns(&self) -> [PathBuf; 2] {
        let pre = self.add("pre", 0.3, |config| config.model.placement = Placement::Pre);
        let lns = self.add("lns", 0.0, |_| {});
        self.add_depth("pre", 2.0);
        self.add_depth("lns", 1.2);
        [pre, lns]
    }
}

fn html(folders: &[PathBuf]) -> String {
    let made: Timestamp = "2026-11-28T22:14:03Z".parse().unwrap();
    page(&Heading { title: None, made }, &read_runs(folders).unwrap())
}

/// The error of reading these, as its text.
#[track_caller]
fn assert_refused(folders: &[&Path], parts: &[&str]) {
    let folders: Vec<PathBuf> = folders.iter().map(|folder| folder.to_path_buf()).collect();
    let error = read_runs(&folders).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "no {part:?} in: {error}");
    }
}

/// The figures of a page, each as a document of its own.
fn figures(html: &str) -> Vec<String> {
    let mut rest = html;
    let mut found = Vec::new();
    while let Some(start) = rest.find("<svg class=\"fig\"") {
        let end = start + rest[start..].find("<figcaption>").unwrap();
        found.push(rest[start..end].to_string());
        rest = &rest[end..];
    }
    found
}

/// Every title of a figure, with the text of the figure.
fn titled(html: &str) -> Vec<(String, String)> {
    let figures = figures(html).into_iter();
    let title = |figure: String| {
        let svg = Document::parse(&figure).unwrap_or_else(|error| panic!("{error}: {figure}"));
        (svg.root_element().attribute("aria-label").unwrap().to_string(), figure)
    };
    figures.map(title).collect()
}

#[test]
fn a_page_shows_every_quantity_of_every_run() {
    let runs = Runs::new();
    let html = html(&runs.pre_and_lns());
    let titles: Vec<String> = titled(&html).into_iter().map(|(title, _)| title).collect();
    let expected = [
        "Training loss",
        "Training loss over time",
        "Training loss, second half",
        "Validation loss",
        "Validation loss, second half",
        "Gradient norm",
        "Learning rate",
        "Throughput",
        "Model FLOPs utilisation",
        "Variance by layer, last checkpoints",
        "Variance over training: pre",
        "Variance over training: lns",
        "Angular distance: pre",
        "Angular distance: lns",
        "Rescaled: pre",
        "Rescaled: lns",
        "Loss without the layer",
        "Accuracy without the layer",
        "Layer replaced by an affine map",
        "Explained by the affine map",
        "Gradient norm by layer",
        "Jacobian: distance from the identity",
        "Jacobian: mean of the diagonal",
        "Jacobian: beside the diagonal",
    ];
    assert_eq!(titles, expected);
    let last = step_record(STEPS, 0.0).evaluation.unwrap();
    let mut speeds: Vec<f64> =
        (1..=STEPS).map(|step| step_record(step, 0.0).tokens_per_second).collect();
    speeds.sort_by(f64::total_cmp);
    let seconds: f64 = speeds.iter().map(|speed| 1000.0 / speed).sum();
    let median = isobath::figure::short(speeds[speeds.len() / 2]);
    for text in [
        "<title>pre and lns</title>".to_string(),
        "2026-11-28 22:14 UTC".to_string(),
        format!("isobath {}", env!("CARGO_PKG_VERSION")),
        format!("<td class=\"best\">{:.4}</td>", last.val_loss),
        format!("<td>{:.2}</td>", last.val_perplexity),
        format!("<td>{:.4}</td>", last.val_bits_per_byte),
        format!("<td>400k</td><td>{seconds:.0} s</td><td>{median}</td>"),
        "NVIDIA H200".to_string(),
        format!("<td class=\"text\">{}</td>", &COMMIT[..12]),
        format!("<td class=\"text\">{COMMIT}</td>"),
        "hidden = 24".to_string(),
    ] {
        assert!(html.contains(&text), "no {text}");
    }
}

#[test]
fn settings_that_differ_are_named_and_others_are_not() {
    let runs = Runs::new();
    let folders = runs.pre_and_lns();
    let section = |html: &str| {
        let from = html.find("aria-label=\"Settings that differ\"").unwrap();
        html[from..from + html[from..].find("</table>").unwrap()].to_string()
    };
    let differences = section(&html(&folders));
    assert!(differences.contains("<code>model.placement</code>"), "{differences}");
    assert!(!differences.contains("model.hidden") && !differences.contains("seed"));
    // A key that only one version of the program knows.
    let path = folders[0].join("run.toml");
    let toml = fs::read_to_string(&path).unwrap().replace("[model]", "[model]\nexperts = 8");
    fs::write(path, toml).unwrap();
    let html = html(&folders);
    assert!(section(&html).contains("<code>model.experts</code>"));
    assert!(html.contains("\u{2013}"), "the number of parameters is not known");
}

#[test]
fn runs_that_differ_in_their_seed_alone_are_one_line_with_a_band() {
    let runs = Runs::new();
    for seed in 1..=3 {
        runs.add(&format!("lns-seed{seed}"), 0.1 * seed as f64, |config| config.seed = seed);
    }
    runs.add("pre-seed1", 0.5, |config| config.model.placement = Placement::Pre);
    // The folder of runs stands for its runs.
    let html = html(&[runs.folder.path().to_path_buf()]);
    let figures = titled(&html);
    let (_, validation) = figures.iter().find(|(title, _)| title == "Validation loss").unwrap();
    let svg = Document::parse(validation).unwrap();
    let texts: Vec<&str> = svg.descendants().filter_map(|node| node.text()).collect();
    assert!(texts.contains(&"lns (3 seeds)") && texts.contains(&"pre-seed1"), "{texts:?}");
    // After the last step: the mean of 0.1, 0.2 and 0.3 more than the loss of `worse` = 0.
    let mean = step_record(STEPS, 0.2).evaluation.unwrap().val_loss;
    let tip = format!("lns (3 seeds) (400k, {})", isobath::figure::short(mean));
    assert!(texts.contains(&tip.as_str()), "no {tip} in {texts:?}");
    let bands = svg.descendants().filter(|node| node.attribute("class") == Some("fig-band"));
    assert_eq!(bands.count(), 1, "a band around the group alone");
    let from = html.find("aria-label=\"Settings that differ\"").unwrap();
    assert!(html[from..].contains("<td class=\"text\">1, 2, 3</td><td class=\"text\">"));
}

#[test]
fn a_figure_names_the_seeds_that_it_shows_and_not_those_that_it_lacks() {
    let runs = Runs::new();
    for seed in 1..=3 {
        runs.add(&format!("lns-seed{seed}"), 0.0, |config| config.seed = seed);
    }
    let shown = |title: &str| -> Vec<String> {
        let figures = titled(&html(&[runs.folder.path().to_path_buf()]));
        let (_, figure) = figures.into_iter().find(|(other, _)| other == title).unwrap();
        let svg = Document::parse(&figure).unwrap();
        let texts = svg.descendants().filter(|node| node.has_tag_name("text"));
        texts.filter_map(|node| node.text().map(str::to_string)).collect()
    };
    runs.add_depth("lns-seed2", 1.2);
    for figure in ["Variance by layer, last checkpoints", "Loss without the layer"] {
        let texts = shown(figure);
        assert!(texts.contains(&"lns-seed2".to_string()), "{texts:?}");
        assert!(!texts.iter().any(|text| text.contains("seeds")), "{texts:?}");
    }
    runs.add_depth("lns-seed3", 1.2);
    let texts = shown("Loss without the layer");
    assert!(texts.contains(&"lns (3 seeds): 2 of 3".to_string()), "{texts:?}");
}

#[test]
fn a_run_without_depth_or_evaluations_has_a_shorter_page() {
    let runs = Runs::new();
    let path = runs.add("plain", 0.0, |_| {});
    let plain = StepRecord { evaluation: None, mfu: None, ..step_record(1, 0.0) };
    fs::write(path.join("metrics.jsonl"), format!("{}\n", serde_json::json!(plain))).unwrap();
    fs::remove_file(path.join("sessions.jsonl")).unwrap();
    let html = html(&[path]);
    let titles: Vec<String> = titled(&html).into_iter().map(|(title, _)| title).collect();
    let expected = [
        "Training loss",
        "Training loss over time",
        "Training loss, second half",
        "Gradient norm",
        "Learning rate",
        "Throughput",
    ];
    assert_eq!(titles, expected);
    assert!(html.contains("not recorded") && !html.contains("What differs"));
}

#[test]
fn names_from_outside_cannot_become_markup_and_nothing_is_requested() {
    let runs = Runs::new();
    let hostile = "<script>alert(1)<\u{2215}script>&\"'";
    runs.add(hostile, 0.0, |config| {
        config.name = hostile.into();
        config.data.train = vec!["</pre><img src=x onerror=alert(2)>".into()];
    });
    runs.add_depth(hostile, 1.5);
    let html = html(&[runs.path(hostile)]);
    for forbidden in ["<script", "<img", "http:", "https:", "@import", "url("] {
        // The one address is the name of SVG's namespace.
        let html = html.replace("http://www.w3.org/2000/svg", "");
        assert!(!html.contains(forbidden), "{forbidden}");
    }
    assert!(html.contains("&lt;script&gt;alert(1)"));
    for link in html.split("href=\"").skip(1).chain(html.split("src=\"").skip(1)) {
        assert!(link.starts_with('#') || link.starts_with("data:,"), "{}", &link[..40]);
    }
    assert_eq!(figures(&html).len(), titled(&html).len(), "every figure is whole XML");
}

#[test]
fn what_is_no_run_is_refused_by_name() {
    let runs = Runs::new();
    let empty = runs.path("empty");
    fs::create_dir(&empty).unwrap();
    assert_refused(&[&empty], &["empty", "run.toml", "isobath train"]);
    assert_refused(&[&runs.path("nowhere")], &["nowhere", "run.toml"]);

    let path = runs.add("run", 0.0, |_| {});
    assert_refused(&[&path, &path], &["named twice"]);
    let metrics = path.join("metrics.jsonl");
    let lines = fs::read_to_string(&metrics).unwrap();
    let broken = lines.replacen("\"step\":3,", "\"step\":3.5,", 1);
    fs::write(&metrics, &broken).unwrap();
    assert_refused(&[&path], &["metrics.jsonl", "line 3"]);
    fs::write(&metrics, "").unwrap();
    assert_refused(&[&path], &["metrics.jsonl", "no step"]);
    fs::remove_file(&metrics).unwrap();
    assert_refused(&[&path], &["metrics.jsonl"]);
    fs::write(&metrics, &lines).unwrap();

    fs::create_dir(path.join("depth")).unwrap();
    fs::write(path.join("depth/step-00000400.json"), "{\"layers\": 6}").unwrap();
    assert_refused(&[&path], &["step-00000400.json", "isobath depth"]);
    fs::write(path.join("run.toml"), "name = ").unwrap();
    assert_refused(&[&path], &["run.toml", "TOML"]);
}

#[test]
fn a_line_that_is_just_being_written_is_left_out_and_said_so() {
    let runs = Runs::new();
    let path = runs.add("run", 0.0, |_| {});
    let metrics = path.join("metrics.jsonl");
    let lines = fs::read_to_string(&metrics).unwrap();
    fs::write(&metrics, format!("{lines}{{\"step\":401,\"tok")).unwrap();
    let read = read_runs(std::slice::from_ref(&path)).unwrap();
    assert_eq!((read[0].steps.len(), read[0].torn), (400, true));
    assert!(html(&[path]).contains("The last line of the metrics of run was not whole"));
}

#[test]
fn runs_of_one_name_are_told_apart_by_their_folders() {
    let runs = Runs::new();
    let paths = ["a/run", "b/run", "other"].map(|name| runs.add(name, 0.0, |_| {}));
    let names: Vec<String> = read_runs(&paths).unwrap().into_iter().map(|run| run.name).collect();
    assert_eq!(names, ["a/run", "b/run", "other"]);
}

#[test]
fn many_steps_make_no_large_page() {
    let runs = Runs::new();
    let path = runs.add("long", 0.0, |_| {});
    let line = |step: u64| format!("{}\n", serde_json::json!(step_record(step, 0.0)));
    let lines: String = (1..=60_000).map(line).collect();
    fs::write(path.join("metrics.jsonl"), &lines).unwrap();
    let html = html(&[path]);
    assert!(lines.len() > 8 << 20, "{} bytes", lines.len());
    assert!(html.len() < 400 << 10, "{} bytes", html.len());
}

#[test]
fn a_run_records_the_program_and_the_machine_of_each_process() {
    let folder = tempdir().unwrap();
    let mut config = run_config(&small_model());
    config.model.vocab = 0;
    config.data.train = vec![text_file(folder.path(), 4000).display().to_string()];
    let out = folder.path().join("run");
    for (steps, resume) in [(3, false), (5, true)] {
        config.train.steps = steps;
        let run = Run { config: config.clone(), folder: out.clone(), resume };
        train(run, Interrupt::none(), &mut Console::quiet()).unwrap();
    }
    let sessions = json_lines(&out.join("sessions.jsonl"));
    assert_eq!(sessions.len(), 2);
    for (session, step) in sessions.iter().zip([0, 3]) {
        assert_eq!((&session["step"], &session["machine"]), (&step.into(), &"cpu".into()));
        let started: Timestamp = session["started"].as_str().unwrap().parse().unwrap();
        let age = Timestamp::now().as_second() - started.as_second();
        assert!((0..600).contains(&age), "{session}");
        let program: Program = serde_json::from_value(session.clone()).unwrap();
        assert_eq!(program, Program::this());
    }
    assert!(html(&[out]).contains(">cpu</td>"));
}

/// Each process that trained more than its warm-up says how fast it was, and the page shows it.
#[test]
fn a_run_records_the_throughput_of_each_process() {
    let folder = tempdir().unwrap();
    let mut config = run_config(&small_model());
    config.model.vocab = 0;
    config.data.train = vec![text_file(folder.path(), 4000).display().to_string()];
    config.train.eval_every = 2;
    let out = folder.path().join("run");
    let sessions = [(9, false), (9 + WARM_UP_STEPS, true), (20, true)];
    let outcomes = sessions.map(|(steps, resume)| {
        config.train.steps = steps;
        let run = Run { config: config.clone(), folder: out.clone(), resume };
        train(run, Interrupt::none(), &mut Console::quiet()).unwrap()
    });
    assert!(outcomes[1].throughput.is_none(), "nothing but its warm-up was trained");
    let lines = json_lines(&out.join("throughput.jsonl"));
    assert_eq!(lines.len(), 2, "{lines:?}");
    let metrics = json_lines(&out.join("metrics.jsonl"));
    for (line, [first, last]) in lines.iter().zip([[0, 9], [9 + WARM_UP_STEPS, 20]]) {
        assert_eq!((&line["first_step"], &line["last_step"]), (&first.into(), &last.into()));
        let counted = &metrics[(first + WARM_UP_STEPS) as usize..last as usize];
        assert_eq!(line["counted_steps"], counted.len());
        // As metrics.jsonl has each step, so evaluations are in neither.
        let seconds: f64 =
            counted.iter().map(|step| 64.0 / step["tokens_per_second"].as_f64().unwrap()).sum();
        let found = line["seconds"].as_f64().unwrap();
        assert!((found / seconds - 1.0).abs() < 1e-9, "{found} s of {seconds}");
        let peak = line["memory"]["peak"].as_u64().unwrap();
        assert!(peak > 1 << 20 && line["memory"]["planned"].as_u64().unwrap() > 1 << 20, "{line}");
    }
    let html = html(&[out]);
    let speed = short(lines[1]["tokens_per_second"].as_f64().unwrap());
    // In the table of runs, and in that of its processes.
    assert_eq!(html.matches(&format!("<td>{speed}</td>")).count(), 2, "{speed}");
    assert!(html.contains("clocks held down by"));
}

#[test]
fn the_program_writes_the_page_where_it_is_told() {
    let runs = Runs::new();
    let path = runs.add("run", 0.0, |_| {});
    let out = runs.path("page.html");
    let mut command = isobath();
    command.arg("report").arg(&path).arg("--out").arg(&out).args(["--title", "A & B"]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout, format!("{}\n", out.display()).into_bytes());
    assert!(fs::read_to_string(&out).unwrap().contains("<h1>A &amp; B</h1>"));
    let output = isobath().arg("report").arg(runs.path("nowhere")).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_page_is_written_as_a_whole_or_to_what_is_no_file() {
    let runs = Runs::new();
    let (path, out) = (runs.add("run", 0.0, |_| {}), runs.path("pages/page.html"));
    let report = |out: &Path| {
        let mut command = isobath();
        command.arg("report").arg(&path).arg("--out").arg(out);
        command
    };
    assert!(report(&out).status().unwrap().success());
    let page = fs::read_to_string(&out).unwrap();

    // A limit on file sizes stands for a full disk.
    let command = report(&out);
    let mut limited = Command::new("sh");
    limited.arg("-c").arg("ulimit -f 1; trap '' XFSZ; exec \"$0\" \"$@\"");
    limited.arg(command.get_program()).args(command.get_args());
    let output = limited.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read_to_string(&out).unwrap(), page, "the page that was there is lost");
    assert_eq!(fs::read_dir(runs.path("pages")).unwrap().count(), 1, "something stays");

    // A link stays one; what it points to is written.
    let link = runs.path("link.html");
    std::os::unix::fs::symlink(&out, &link).unwrap();
    fs::write(&out, "").unwrap();
    assert!(report(&link).output().unwrap().status.success());
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert!(fs::read_to_string(&out).unwrap().contains("</html>"));

    let output = report(Path::new("/dev/stdout")).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("</html>") && printed.ends_with("/dev/stdout\n"), "{printed}");
    let to_file = fs::File::create(&out).unwrap();
    assert!(report(Path::new("/dev/stdout")).stdout(to_file).status().unwrap().success());
    let written = fs::read_to_string(&out).unwrap();
    assert!(written.starts_with(&printed[..15]) && written.ends_with("</html>/dev/stdout\n"));
}

/// Boxes [left, top, width, height] of everything that is asked for, in pixels of the page.
const BOX: &str = "(e => { const r = e.getBoundingClientRect();
    return [r.left + scrollX, r.top + scrollY, r.width, r.height]; })";

/// Texts of figures that leave their figure or lie on one another.
const BAD_TEXTS: &str = "(() => { const bad = [];
    for (const figure of document.querySelectorAll('svg.fig')) {
        const all = figure.getBoundingClientRect();
        const boxes = [...figure.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
        boxes.forEach(([t, r], i) => {
            const name = figure.getAttribute('aria-label') + ': ' + t.textContent;
            if (r.left < all.left || r.right > all.right || r.bottom > all.bottom) bad.push(name);
            for (const [u, s] of boxes.slice(0, i)) {
                const x = Math.min(r.right, s.right) - Math.max(r.left, s.left);
                const y = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
                if (x > 0 && y > 4) bad.push(name + ' on ' + u.textContent);
            }
        });
    }
    return bad; })()";

/// The two ends of viridis.
const ENDS: [&str; 2] = ["#440154", "#fde725"];

#[test]
fn a_browser_shows_the_page_in_light_and_dark_on_a_phone_and_on_a_desk() {
    let Some(mut browser) = Browser::start() else { return };
    let runs = Runs::new();
    let file = runs.path("report.html");
    fs::write(&file, html(&runs.pre_and_lns())).unwrap();
    let url = format!("file://{}", file.display());
    for scheme in ["light", "dark"] {
        for width in [360, 1280] {
            let screen = Screen { width, scheme };
            browser.open(&url, screen);
            browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)");
            let widths = "[document.documentElement.scrollWidth, innerWidth]";
            let widths = browser.evaluate(widths);
            assert_eq!(widths[0], widths[1], "{screen:?}: the page scrolls sideways");
            let bad = browser.evaluate(BAD_TEXTS);
            assert_eq!(bad.as_array().map(Vec::len), Some(0), "{screen:?}: {bad:#}");
            let size = "Math.min(...[...document.querySelectorAll('svg.fig')].map(
                f => 11 * f.getBoundingClientRect().width / f.viewBox.baseVal.width))";
            let size = browser.evaluate(size).as_f64().unwrap();
            assert!(size >= 9.0, "{screen:?}: text of figures is {size:.1} pixels high");

            let boxes = format!(
                "[...document.querySelectorAll('svg.fig')].map(f => [f.getAttribute('aria-label'),
                    {BOX}(f.querySelector('svg') ?? f)])"
            );
            let boxes = browser.evaluate(&boxes);
            let picture = browser.picture();
            let pick = |colour: isobath::figure::Themed| match scheme {
                "dark" => colour.dark,
                _ => colour.light,
            };
            let corner = picture.count([0.0, 0.0, 8.0, 8.0], pick(GROUND));
            assert_eq!(corner, 64, "{screen:?}: the ground is {}", pick(GROUND));
            let boxes = boxes.as_array().unwrap();
            assert_eq!(boxes.len(), 24);
            for entry in boxes {
                let name = entry[0].as_str().unwrap();
                let plot = [0, 1, 2, 3].map(|i| entry[1][i].as_f64().unwrap());
                // Runs by colour, checkpoints and angles by viridis.
                let colours = match name {
                    _ if name.starts_with("Variance over") => vec![],
                    _ if name.starts_with("Angular") || name.starts_with("Rescaled") => {
                        ENDS.to_vec()
                    }
                    // Both runs have one learning rate: the second lies on the first.
                    "Learning rate" => vec![pick(SERIES[1])],
                    _ => vec![pick(SERIES[0]), pick(SERIES[1])],
                };
                for colour in colours {
                    let found = picture.count(plot, colour);
                    assert!(found >= 20, "{screen:?}, {name}: {found} pixels are {colour}");
                }
                let paper = picture.count(plot, pick(PAPER)) as f64 / (plot[2] * plot[3]);
                assert!(paper >= 0.1, "{screen:?}, {name}: {paper:.2} of the plot is paper");
            }
            assert_eq!(browser.console(), [""; 0], "{screen:?}");
            assert_eq!(browser.requests(), [url.as_str()], "{screen:?}");
        }
    }

    // The browser tells of what the page must not do.
    let bad = runs.path("bad.html");
    let text =
        "<link rel=icon href=data:,><img src=elsewhere.png><script>console.error('x')</script>";
    fs::write(&bad, text).unwrap();
    browser.open(&format!("file://{}", bad.display()), Screen { width: 360, scheme: "light" });
    assert!(browser.requests().iter().any(|url| url.ends_with("elsewhere.png")));
    assert!(browser.console().iter().any(|message| message.contains("\"x\"")));
}
