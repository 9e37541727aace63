//! src/compare: what several variants share, what their table says, and that nothing is trained
//! twice.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use isobath::compare::{COMPARISON, Comparison, Request, Spread, Variant, compare};
use isobath::config::{Config, Placement};
use isobath::rundir::checkpoint_folder;
use isobath::train::{Console, Interrupt};
use tempfile::tempdir;

use crate::support::{isobath, metrics, run_config, small_model, text_file, tiny_run};

fn request(folder: &Path, variants: &[&str], seeds: u64) -> Request {
    let mut base = run_config(&small_model());
    base.model.vocab = 0;
    base.train.steps = 4;
    base.data.train = vec![text_file(folder, 6000).display().to_string()];
    let variants = variants.iter().map(|text| match text.contains(':') {
        true => Variant::parse(text).unwrap(),
        false => Variant::of_placement(text).unwrap(),
    });
    Request { base, variants: variants.collect(), seeds, folder: folder.join("runs") }
}

fn compared(request: &Request) -> Comparison {
    compare(request, Interrupt::none(), &mut Console::quiet()).unwrap().expect("not interrupted")
}

fn modified(run: &Path) -> SystemTime {
    fs::metadata(run.join("metrics.jsonl")).unwrap().modified().unwrap()
}

#[test]
fn every_variant_is_trained_from_every_seed_on_the_same_rows() {
    let folder = tempdir().unwrap();
    let request = request(folder.path(), &["pre", "post", "slow:optimizer.lr=1e-5"], 2);
    let found = compared(&request);
    let names: Vec<&str> = found.variants.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["pre", "post", "slow"]);
    let seed = request.base.seed;
    for variant in &found.variants {
        let seeds: Vec<u64> = variant.runs.iter().map(|run| run.seed).collect();
        assert_eq!(seeds, [seed, seed + 1]);
        for run in &variant.runs {
            assert_eq!(
                run.folder,
                request.folder.join(format!("{}-seed{}", variant.name, run.seed))
            );
            let lines = metrics(&run.folder);
            assert_eq!(lines.len(), 4);
            assert_eq!(run.val_loss.unwrap(), lines[3]["val_loss"].as_f64().unwrap());
            assert_eq!(run.train_loss, lines[3]["loss"].as_f64(), "2 % of 4 steps: one");
            let config = fs::read_to_string(run.folder.join("run.toml")).unwrap();
            let placement = if variant.name == "post" { "post" } else { "lns" };
            let placement = if variant.name == "pre" { "pre" } else { placement };
            assert!(config.contains(&format!("placement = \"{placement}\"")), "{config}");
        }
    }
    // The same rows: the parameters, and so the first loss, are those of the same seed.
    let first_loss = |variant: usize, run: usize| {
        metrics(&found.variants[variant].runs[run].folder)[0]["loss"].as_f64().unwrap()
    };
    assert_ne!(first_loss(0, 0), first_loss(0, 1), "another seed, other rows and values");
    // With one block pre and lns are the same function, and nothing else differs.
    let mut one = request.clone();
    (one.base.model.layers, one.folder) = (1, folder.path().join("one"));
    one.variants = ["pre", "lns"].map(|name| Variant::of_placement(name).unwrap()).to_vec();
    let same = compared(&one);
    assert_eq!(same.variants[0].val_loss, same.variants[1].val_loss);
    assert_eq!(same.variants[1].against_first.unwrap(), Spread { mean: 0.0, std: Some(0.0) });
    // The file says what was returned.
    let file = fs::read_to_string(one.folder.join(COMPARISON)).unwrap();
    assert_eq!(file, serde_json::to_string_pretty(&same).unwrap());
}

#[test]
fn what_is_complete_is_only_read_and_what_is_not_goes_on() {
    let folder = tempdir().unwrap();
    let mut request = request(folder.path(), &["pre", "lns"], 1);
    request.base.checkpoint.every = 2;
    let first = compared(&request);
    let [pre, lns] = [0, 1].map(|at| first.variants[at].runs[0].folder.clone());
    let before = modified(&pre);
    // As if the process had died after step 2 of the second run.
    fs::remove_dir_all(checkpoint_folder(&lns, 4)).unwrap();
    let weights = |run: &Path| fs::read(checkpoint_folder(run, 4).join("model.safetensors"));
    let again = compared(&request);
    assert_eq!(modified(&pre), before, "trained again");
    assert_eq!(again.variants[1].val_loss, first.variants[1].val_loss);
    assert!(weights(&lns).is_ok());
    // A third variant joins.
    request.variants.push(Variant::of_placement("sandwich").unwrap());
    let more = compared(&request);
    assert_eq!(modified(&pre), before);
    assert_eq!(more.variants.len(), 3);
    // Another configuration is not mixed in.
    request.base.optimizer.lr *= 2.0;
    let error = compare(&request, Interrupt::none(), &mut Console::quiet()).unwrap_err();
    let error = error.to_string();
    for part in ["holds a run of another configuration", "optimizer.lr is", "--out"] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
}

#[test]
fn a_run_that_diverges_is_a_result() {
    let folder = tempdir().unwrap();
    let mut request = request(folder.path(), &["lns", "wild:optimizer.lr=1e38"], 1);
    request.base.optimizer.clip = 0.0;
    for _ in 0..2 {
        let found = compared(&request);
        let wild = &found.variants[1];
        assert_eq!((wild.diverged, wild.val_loss, wild.against_first), (1, None, None));
        assert!(wild.runs[0].diverged && wild.runs[0].step < 4, "{wild:?}");
        assert!(found.variants[0].val_loss.is_some());
        assert!(found.to_string().contains("1 diverged"), "{found}");
    }
}

#[test]
fn the_spread_is_the_sample_standard_deviation() {
    assert_eq!(Spread::of(&[]), None);
    assert_eq!(Spread::of(&[3.0]), Some(Spread { mean: 3.0, std: None }));
    // deviations -1, 0, 1: sqrt(2 / 2)
    assert_eq!(Spread::of(&[1.0, 2.0, 3.0]), Some(Spread { mean: 2.0, std: Some(1.0) }));
}

#[test]
fn variants_that_make_no_sense_are_refused() {
    let folder = tempdir().unwrap();
    let refused = |variants: &[&str], seeds| {
        let request = request(folder.path(), variants, seeds);
        compare(&request, Interrupt::none(), &mut Console::quiet()).unwrap_err().to_string()
    };
    assert!(refused(&["pre", "pre"], 1).contains("two variants are called `pre`"));
    assert!(refused(&["pre"], 0).contains("0 seeds"));
    assert!(refused(&["x:model.heads=5"], 1).contains("model.heads = 5"));
    assert!(refused(&["../x:optimizer.lr=1e-3"], 1).contains("the run's folder gets this name"));
    assert!(!folder.path().join("runs").exists(), "nothing was begun");
    for text in ["x", "x:", ":a=1", "x:lr"] {
        assert!(Variant::parse(text).unwrap_err().to_string().contains("NAME:key=value"), "{text}");
    }
    assert!(Variant::of_placement("pree").unwrap_err().to_string().contains("`pre`"));
    let deepnorm = Variant::of_placement("deepnorm").unwrap();
    let config = Config::preset("demo").unwrap().with_sets(&deepnorm.sets).unwrap();
    assert_eq!(config.model.placement, Placement::Deepnorm);
}

#[test]
fn the_program_compares_and_prints_a_table_or_json() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("runs");
    let text = text_file(folder.path(), 5000);
    // The arguments of a tiny run, for another command.
    let mut arguments = tiny_run(&text, &out, &["train.steps=2", "optimizer.warmup=0"]);
    arguments[0] = "compare".to_string();
    arguments.extend(["--norms", "pre,lns", "--device", "cpu"].map(str::to_string));
    let output = isobath().args(&arguments).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.lines().count(), 4, "{text}");
    for part in ["variant", "pre", "lns", "bits per byte"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("pre-seed") && page.contains("<svg"), "no figures");
    arguments.push("--json".to_string());
    let output = isobath().args(&arguments).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["variants"][1]["name"], "lns");
    assert!(json["variants"][0]["runs"][0]["val_loss"].as_f64().unwrap() > 1.0);
}

#[test]
fn a_variant_may_hold_a_list_and_not_what_tells_runs_apart() {
    let list = Variant::parse("x:data.train=[\"a\",\"b\"],optimizer.lr=1e-3").unwrap();
    assert_eq!(list.sets, ["data.train=[\"a\",\"b\"]", "optimizer.lr=1e-3"]);
    for text in ["x:seed=3", "x:optimizer.lr=1,name=y"] {
        let error = Variant::parse(text).unwrap_err().to_string();
        assert!(error.contains("tells its runs apart"), "{error}");
    }
}

#[test]
fn what_would_compare_nothing_or_another_model_is_refused() {
    let folder = tempdir().unwrap();
    let mut request = request(folder.path(), &["pre"], 1);
    request.base.train.init_from = Some(folder.path().join("model"));
    let refused = |request: &Request| {
        compare(request, Interrupt::none(), &mut Console::quiet()).unwrap_err().to_string()
    };
    assert!(refused(&request).contains("train.init_from"));
    request.base.train.init_from = None;
    request.seeds = u64::MAX;
    assert!(refused(&request).contains("give --seeds 1000 or fewer"));
    request.seeds = 1;
    request.base.model.vocab = 300;
    compared(&request);
    request.base.model.vocab = 400;
    assert!(refused(&request).contains("model.vocab is 300 there and 400 now"));
}

#[test]
fn a_torn_last_line_is_repaired() {
    let folder = tempdir().unwrap();
    let mut request = request(folder.path(), &["pre"], 1);
    request.base.checkpoint.every = 2;
    let first = compared(&request);
    let run = &first.variants[0].runs[0].folder;
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    fs::write(run.join("metrics.jsonl"), &text[..text.len() - 9]).unwrap();
    fs::remove_dir_all(checkpoint_folder(run, 4)).unwrap();
    assert_eq!(compared(&request).variants[0].val_loss, first.variants[0].val_loss);
}

/// The loss of the last step is finite, and what its update left is not.
#[test]
fn an_evaluation_that_is_not_finite_is_a_divergence() {
    let folder = tempdir().unwrap();
    let mut request = request(folder.path(), &["wild:optimizer.lr=1e38"], 1);
    request.base.train.steps = 1;
    request.base.optimizer.warmup = 0;
    request.base.optimizer.clip = 0.0;
    let found = compared(&request);
    assert_eq!((found.variants[0].diverged, found.variants[0].val_loss), (1, None));
}
