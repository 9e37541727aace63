//! Every wrapper of kernels/: the goldens against the formulas, the machines against the goldens.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use isobath::Error;
use isobath::cuda::conformance::{
    Case, Golden, Goldens, Mismatch, Needs, Report, Tolerance, Watch, cases, chosen, record, replay,
};
use isobath::cuda::host::{Host, Options};
use isobath::cuda::{Driver, host};

use super::counting::{Counting, OnItsWay};
use super::machines::on_every_machine_in_turn;
use crate::support::{isobath, source};

fn nobody(_: &Case, _: &Golden, _: &Goldens, _: &Report) {}

/// Every launch on every machine and schedule; the bits are the same on all schedules of one.
#[test]
fn every_case_gives_its_golden_output() {
    let goldens = Goldens::compiled_in().unwrap();
    on_every_machine_in_turn(|driver| {
        let report = replay(driver, cases(), &goldens, &mut nobody).unwrap();
        assert!(report.failed.is_empty(), "{report}");
        assert_eq!(report.passed + report.skipped.len(), cases().len(), "{report}");
        let capability = driver.properties().compute_capability;
        let outputs = cases().into_iter().filter(|case| case.runs_on(capability));
        let words = outputs.flat_map(|case| case.run(driver).unwrap());
        words.flat_map(u32::to_le_bytes).collect()
    });
}

/// One golden for each case and no other; a recorded one must not contradict the formula, and one
/// that says "formula" must be it.
#[test]
fn each_golden_agrees_with_the_formula() {
    let goldens = Goldens::compiled_in().unwrap();
    let mut names = BTreeSet::new();
    for case in cases() {
        let golden = goldens.of(&case.name).unwrap();
        if golden.is_recorded() {
            if let Err(mismatch) = case.compare(&case.expected, &golden.out) {
                panic!("{} ({}): {mismatch}", case.name, golden.source);
            }
        } else {
            assert_eq!(golden.out, case.expected, "{}: the formula has changed", case.name);
        }
        assert!(names.insert(case.name.clone()), "two cases are named {}", case.name);
    }
    let known: BTreeSet<String> = goldens.iter().map(|(name, _)| name.clone()).collect();
    assert_eq!(known, names);
}

/// A kernel without a case proves nothing.
#[test]
fn every_kernel_of_the_two_files_has_a_case() {
    if let Err(error) = host::present() {
        println!("skipped: no simt: {error}");
        return;
    }
    let driver = Host::new(Options::default()).unwrap();
    let is_ours = |name: &String| name.starts_with("conform_");
    let kernels: BTreeSet<String> = driver.kernel_names().into_iter().filter(is_ours).collect();
    let with_case: BTreeSet<String> = cases().into_iter().map(|case| case.kernel).collect();
    assert_eq!(kernels, with_case);
}

/// Every wrapper that host/wrappers.h declares is called in one of the two files.
#[test]
fn every_wrapper_has_a_kernel() {
    let read = |name: &str| {
        let path = source().join("kernels").join(name);
        std::fs::read_to_string(path).unwrap()
    };
    let header = read("host/wrappers.h");
    // What is in namespace simt is the machine's own; what a macro makes, the TMA wrappers of
    // each rank, has indented lines.
    let mut wrappers = BTreeSet::new();
    let mut own = false;
    for line in header.lines() {
        own |= line.starts_with("namespace simt") && !line.contains('}');
        own &= !line.starts_with("}");
        let declares = line.contains('(') && !line.starts_with([' ', '/', '#', '}', 'n', 'S']);
        if declares && !own {
            let name = line.split('(').next().and_then(|text| text.split_whitespace().last());
            wrappers.extend(name.map(|name| name.trim_start_matches('*').to_string()));
        }
    }
    for rank in 1..=5 {
        let families = ["tma_load", "tma_load_multicast", "tma_store", "tma_reduce_add"];
        wrappers.extend(families.map(|family| format!("{family}_{rank}d")));
    }
    assert!(wrappers.len() > 100, "only {} found: {wrappers:?}", wrappers.len());

    // The kernel file makes the TMA kernels by rank too.
    let kernels = [read("conformance.cu"), read("conformance_sm80.cu")].concat();
    let by_rank = |rank: usize| kernels.replace("##rank##", &rank.to_string());
    let all: String = (1..=5).map(by_rank).collect();
    let called: BTreeSet<&str> = all.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    // __trap ends the launch with an error: it has no output.
    wrappers.retain(|name| name != "__trap" && !called.contains(name.as_str()));
    assert!(wrappers.is_empty(), "no kernel calls {wrappers:?}");
}

/// A golden that is off by one bit is found, and the message tells where.
#[test]
fn a_wrong_output_is_found() {
    let by_name = |name: &str| cases().into_iter().find(|case| case.name == name).unwrap();
    for name in ["ldmatrix_x4_trans", "tma_load_3d", "wgmma_n64_a1_b1", "atomic_cas_u32"] {
        let case = by_name(name);
        let mut found = case.expected.clone();
        found[7] ^= 1;
        match case.compare(&case.expected, &found) {
            Err(Mismatch::Word { word: 7, wrong: 1, .. }) => {}
            other => panic!("{name}: {other:?}"),
        }
        found.pop();
        assert!(matches!(case.compare(&case.expected, &found), Err(Mismatch::Length { .. })));
    }
    let case = by_name("tanh_approx");
    let Tolerance::Float { relative, .. } = case.tolerance else { panic!("{:?}", case.tolerance) };
    let changed = |factor: f64| -> Vec<u32> {
        let change = |&word: &u32| (f64::from(f32::from_bits(word)) * (1.0 + factor)) as f32;
        case.expected.iter().map(|word| change(word).to_bits()).collect()
    };
    case.compare(&case.expected, &changed(0.9 * relative)).unwrap();
    let Err(Mismatch::Word { used_tolerance, .. }) =
        case.compare(&case.expected, &changed(1.5 * relative))
    else {
        panic!("an error of 1.5 tolerances passes");
    };
    assert!((used_tolerance - 1.5).abs() < 0.01, "{used_tolerance}");
    let nan = vec![f32::NAN.to_bits(); case.expected.len()];
    assert!(case.compare(&case.expected, &nan).is_err());
}

/// A kernel that does nothing fails every case.
#[test]
fn every_expected_output_differs_from_what_was_there() {
    for Case { name, initial, expected, .. } in cases() {
        assert_eq!(initial.len(), expected.len(), "{name}");
        assert!(initial != expected, "{name}");
    }
}

#[test]
fn goldens_survive_the_file_and_damage_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("conformance.json");
    let goldens = Goldens::compiled_in().unwrap();
    goldens.save(folder.path()).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(Goldens::parse(&text, &path).unwrap(), goldens);

    let line = |out: &str| format!(r#"{{"name":"a","source":"formula","out":"{out}"}}"#);
    let twice = format!("[{0},{0}]", line("00000001"));
    let damaged = [
        ("[", "EOF"),
        (r#"[{"name":"a"}]"#, "source"),
        (&twice, "twice"),
        (&format!("[{}]", line("0000000")), "8 digits"),
        (&format!("[{}]", line("0000000g")), "8 digits"),
        (&format!("[{}]", line("zlib:12")), "case a"),
        (&format!("[{}]", line("zlib:1")), "2 digits"),
    ];
    for (text, says) in damaged {
        let error = Goldens::parse(text, &path).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("remedy"), "{text}: {error}");
    }
    assert!(matches!(Goldens::default().of("bf16_bits"), Err(Error::Usage { .. })));
}

/// A recorded golden stays when the formulas are written anew; one of a case that is gone goes.
#[test]
fn formulas_never_replace_what_a_gpu_recorded() {
    let recorded = Golden { source: "NVIDIA H200, today".to_string(), out: vec![1, 2] };
    let stale = Golden { source: Golden::FORMULA.to_string(), out: vec![3] };
    let mut goldens = Goldens::default();
    goldens.insert("bf16_bits", recorded.clone());
    goldens.insert("ldmatrix_x1", stale);
    goldens.insert("no such case", recorded.clone());
    let goldens = goldens.with_formulas();
    assert_eq!(*goldens.of("bf16_bits").unwrap(), recorded);
    let formula = cases().into_iter().find(|case| case.name == "ldmatrix_x1").unwrap().expected;
    assert_eq!(goldens.of("ldmatrix_x1").unwrap().out, formula);
    assert!(goldens.of("no such case").is_err());
    assert_eq!(goldens.iter().count(), cases().len());
}

#[test]
fn only_a_gpu_records() {
    if let Err(error) = host::present() {
        println!("skipped: no simt: {error}");
        return;
    }
    let mut driver = Host::new(Options::default()).unwrap();
    let none = Goldens::default();
    let error = record(&mut driver, cases(), &none, "2026-01-01", &mut nobody).unwrap_err();
    assert!(error.to_string().contains("recorded on a GPU"), "{error}");
}

/// simt, which says that it is a GPU; `None` where there is none.
fn gpu() -> Option<Counting> {
    host::present().inspect_err(|error| println!("skipped: no simt: {error}")).ok()?;
    let host = Host::new(Options::default()).unwrap();
    Some(Counting { device: "cuda", ..Counting::new(host) })
}

const SOME: [&str; 5] =
    ["bf16_bits", "ldmatrix_x1", "tanh_approx", "atomic_cas_u32", "ldmatrix_x4_trans"];

fn some_cases() -> Vec<Case> {
    chosen(&SOME.map(String::from), None).unwrap()
}

fn names(cases: &[Case]) -> Vec<String> {
    cases.iter().map(|case| case.name.clone()).collect()
}

fn failed(report: &Report) -> Vec<&str> {
    report.failed.iter().map(|failure| failure.case.as_str()).collect()
}

/// What came before a fault is kept, what comes after it is left to another process, which adds to
/// what the first has written.
#[test]
fn recording_stops_at_a_fault_and_goes_on_in_another_process() {
    let Some(mut driver) = gpu() else { return };
    let before = Goldens::compiled_in().unwrap();
    let all = names(&some_cases());
    driver.faults = Some(format!("conform_{}", all[2]));
    let mut told = vec![];
    let mut progress = |case: &Case, _: &Golden, goldens: &Goldens, report: &Report| {
        assert_eq!(report.passed, told.len());
        let recorded = goldens.iter().filter(|(_, golden)| golden.source.contains("today"));
        assert_eq!(recorded.count(), told.len());
        told.push(case.name.clone());
    };
    let (goldens, report) =
        record(&mut driver, some_cases(), &before, "today", &mut progress).unwrap();
    assert_eq!(told, all[..3]);
    assert_eq!((report.passed, failed(&report)), (2, vec![all[2].as_str()]));
    assert!(report.failed[0].why.contains("illegal memory access"), "{report}");
    assert_eq!(report.not_reached, all[3..]);
    let hint = format!("2 not reached: go on with --from \"{}\"", all[3]);
    assert!(report.to_string().ends_with(&hint), "{report}");
    let is_new = |goldens: &Goldens, name: &str| goldens.of(name).unwrap().source.contains("today");
    assert_eq!(all.iter().filter(|name| is_new(&goldens, name)).count(), 2);
    assert_eq!(goldens.of(&all[2]).unwrap(), before.of(&all[2]).unwrap());

    let folder = tempfile::tempdir().unwrap();
    assert_eq!(Goldens::of_folder(folder.path()).unwrap(), before);
    goldens.save(folder.path()).unwrap();
    let before = Goldens::of_folder(folder.path()).unwrap();
    let rest = chosen(&SOME.map(String::from), Some(&report.not_reached[0])).unwrap();
    assert_eq!(names(&rest), all[3..]);
    let (goldens, report) =
        record(&mut gpu().unwrap(), rest, &before, "today", &mut nobody).unwrap();
    assert!(report.failed.is_empty() && report.not_reached.is_empty(), "{report}");
    let missing: Vec<&String> = all.iter().filter(|name| !is_new(&goldens, name)).collect();
    assert_eq!(missing, [&all[2]]);
    assert_eq!(goldens.iter().count(), cases().len());
}

/// What is known of the cases before it is handed over, once; one that ends in time is nobody's
/// business.
#[test]
fn a_case_that_does_not_end_is_a_failure_and_the_rest_is_not_reached() {
    let Some(mut driver) = gpu() else { return };
    let before = Goldens::compiled_in().unwrap();
    let limit = Duration::from_millis(400);
    let (send, hung) = mpsc::channel();
    let watch = Watch::start(limit, move |goldens, report| {
        send.send((goldens.clone(), report.clone())).unwrap();
    });
    let all = names(&some_cases());
    let mut progress = |case: &Case, golden: &Golden, goldens: &Goldens, report: &Report| {
        watch.begins(case, golden, goldens, report);
        if case.name == all[1] {
            thread::sleep(2 * limit);
        }
    };
    record(&mut driver, some_cases(), &before, "today", &mut progress).unwrap();
    watch.ends();
    let (goldens, report) = hung.recv().unwrap();
    assert_eq!((report.passed, failed(&report)), (1, vec![all[1].as_str()]));
    let failure = &report.failed[0];
    assert_eq!(
        (failure.why.as_str(), failure.golden.as_str()),
        ("did not end within 0.4 s", "formula")
    );
    assert_eq!((report.against_formula, report.not_reached), (2, all[2..].to_vec()));
    assert!(goldens.of(&all[0]).unwrap().source.contains("today"));
    assert!(!goldens.of(&all[1]).unwrap().source.contains("today"));
    assert!(hung.recv().is_err(), "a second time");
}

#[test]
fn a_replay_stops_at_a_fault() {
    let Some(mut driver) = gpu() else { return };
    let goldens = Goldens::compiled_in().unwrap();
    let all = names(&some_cases());
    driver.faults = Some(format!("conform_{}", all[1]));
    let report = replay(&mut driver, some_cases(), &goldens, &mut nobody).unwrap();
    assert_eq!((report.passed, failed(&report)), (1, vec![all[1].as_str()]));
    assert_eq!(report.not_reached, all[2..]);
}

/// A launch that is refused, a result that is wrong every time, and one that is not always the
/// same: the other cases are recorded.
#[test]
fn what_fails_alone_does_not_end_a_recording() {
    let Some(mut driver) = gpu() else { return };
    let before = Goldens::compiled_in().unwrap();
    driver.lacks = Some("conform_ldmatrix");
    let (goldens, report) =
        record(&mut driver, some_cases(), &before, "today", &mut nobody).unwrap();
    assert_eq!((report.passed, report.not_reached.len()), (3, 0), "{report}");
    assert_eq!(failed(&report), ["ldmatrix_x1", "ldmatrix_x4_trans"]);
    assert_eq!(goldens.of("ldmatrix_x1").unwrap(), before.of("ldmatrix_x1").unwrap());
    assert!(goldens.of("bf16_bits").unwrap().is_recorded());

    let record_with = |changes: OnItsWay| {
        let mut driver = Counting { on_its_way: Some(changes), ..gpu().unwrap() };
        let case = chosen(&["bf16_bits".to_string()], None).unwrap();
        record(&mut driver, case, &before, "today", &mut nobody).unwrap()
    };
    let (goldens, report) = record_with(Box::new(|bytes| bytes[4] ^= 1));
    assert!(report.failed[0].why.starts_with("1 of "), "{report}");
    assert!(goldens.of("bf16_bits").unwrap().is_recorded(), "what a GPU does is what it does");
    let mut odd = 0;
    let (goldens, report) = record_with(Box::new(move |bytes| {
        odd ^= 1;
        bytes[4] ^= odd;
    }));
    assert!(report.failed[0].why.starts_with("two results in two runs: 1 of "), "{report}");
    assert_eq!(goldens.of("bf16_bits").unwrap(), before.of("bf16_bits").unwrap());
}

/// The name of a case is there before it runs; a name that is none is refused.
#[test]
fn the_command_runs_the_cases_that_are_asked_for() {
    if let Err(error) = host::present() {
        println!("skipped: no simt: {error}");
        return;
    }
    let run = |arguments: &[&str]| {
        let command = ["conformance", "--device", "simt", "--json"];
        isobath().args(command).args(arguments).output().unwrap()
    };
    let output = run(&["--case", "tanh_approx", "--case", "bf16_bits"]);
    assert!(output.status.success(), "{output:?}");
    let names = String::from_utf8(output.stderr).unwrap();
    let mut names: Vec<&str> = names.lines().collect();
    names.sort_unstable();
    assert_eq!(names, ["bf16_bits", "tanh_approx"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["passed"], 2);
    for wrong in [["--case", "no_such"], ["--from", "no_such"]] {
        let output = run(&wrong);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("there is no case no_such"));
    }
}

#[test]
fn an_older_gpu_runs_what_it_has() {
    let old = cases().into_iter().filter(|case| case.runs_on((8, 0)));
    assert!(old.clone().all(|case| case.needs == Needs::Sm80));
    assert!(old.count() > 30);
    assert!(cases().iter().all(|case| case.runs_on((9, 0))));
    // sm_90a code does not run on what came after it.
    assert!(cases().iter().all(|case| case.runs_on((10, 0)) == (case.needs == Needs::Sm80)));
}
