//! benches/peers/kernels.py without a GPU: how it joins reports, and its table of a record.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::support::{python_is_missing, source};

fn python(arguments: &[&str]) -> Output {
    let peers = source().join("benches").join("peers");
    let mut command = Command::new("python3");
    command.current_dir(peers).env("PYTHONDONTWRITEBYTECODE", "1").args(arguments);
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn row(op: &str, dtype: &str, unit: &str, amount: u64, ours: &[f64], peers: Value) -> Value {
    json!({
        "benchmark": "norm", "op": op, "dtype": dtype, "sizes": {}, "what": op, "shape": "T=8",
        "work": {"unit": unit, "amount": amount, "formula": ""}, "samples": 3,
        "isobath": {"microseconds": ours, "of": "samples"}, "peers": peers,
    })
}

fn record(device: &str, rows: Vec<Value>) -> Value {
    json!({
        "date": "2026-01-02", "device": device, "driver": "580.1", "torch": "2.9", "cuda": "13.0",
        "python": "3.11", "commit": "0123abc", "rounds": 2, "reports": [],
        "ceilings": {
            "bytes": {"what": "a copy", "per_second": 4e12},
            "flops bf16": {"what": "a matmul", "per_second": 8e14},
        },
        "rows": rows,
    })
}

fn write(folder: &Path, name: &str, record: &Value) -> String {
    let path = folder.join(name);
    fs::write(&path, record.to_string()).unwrap();
    path.display().to_string()
}

/// Times whose medians, ratio and shares of the ceilings are known.
#[test]
fn the_table_has_medians_ratios_and_shares_of_the_ceiling() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let peers = json!([
        {"name": "eager", "microseconds": [40.0, 30.0, 50.0]},
        {"name": "compiled", "microseconds": [25.0, 24.0, 900.0]},
        {"name": "cuDNN", "error": "no such backend"},
    ]);
    // 1e8 bytes in 50 us are 2e12 a second, half of the ceiling; in 25 us all of it.
    let bytes = row("norm_forward", "bf16", "bytes", 100_000_000, &[10.0, 50.0, 60.0], peers);
    // 8e10 operations in 200 us are 4e14 a second.
    let twin = json!([{"name": "matmul", "microseconds": [100.0, 500.0]}]);
    let flops = row("gemm_nt", "bf16", "flops", 80_000_000_000, &[200.0], twin);
    // No ceiling has been measured for f32.
    let f32 = row("gemm_tn", "f32", "flops", 80_000_000_000, &[2000.0], json!([]));
    let first = write(folder.path(), "first.json", &record("H200", vec![bytes, flops]));
    let second = write(folder.path(), "second.json", &record("H200", vec![f32]));

    let output = python(&["kernels.py", "--replay", &first, &second]);
    let table = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for line in [
        "| norm_forward | T=8 | 50 | 50.0% | compiled | 25 | 100.0% | 0.50 |",
        "| gemm_nt | T=8 | 200 | 50.0% | matmul | 300 | 33.3% | 1.50 |",
        "| gemm_tn | T=8 | 2000 |  | none |  |  |  |",
        "- norm_forward, T=8: eager, 40 us",
        "- norm_forward, T=8: cuDNN: no such backend",
        "Ceiling of bytes: 4 T/s, measured with a copy.",
    ] {
        assert!(table.lines().any(|found| found == line), "no line {line:?} in:\n{table}");
    }

    let other = write(folder.path(), "other.json", &record("H100", vec![]));
    for (files, parts) in [
        (vec![first.as_str(), other.as_str()], ["different devices", "a table of each"]),
        (vec!["/nowhere.json"], ["is no record", "--out"]),
    ] {
        let output = python(&[&["kernels.py", "--replay"], files.as_slice()].concat());
        assert_eq!(output.status.code(), Some(1));
        for part in parts {
            assert!(text(&output.stderr).contains(part), "{part}: {}", text(&output.stderr));
        }
    }
}

/// Rounds of the same work become one row; another size, type or variant is another row.
#[test]
fn rounds_are_joined_by_their_work() {
    if python_is_missing() {
        return;
    }
    let row = |what: &str, n: u32, median: f64| {
        json!({
            "op": "gemm_nt", "dtype": "bf16", "sizes": {"M": 8, "N": n, "K": 8}, "what": what,
            "shape": "", "samples": 2, "median_microseconds": median,
            "work": {"unit": "flops", "amount": 1, "formula": ""},
        })
    };
    let mut sampled = row("c", 8, 0.0);
    sampled["sample_microseconds"] = json!([7.0, 9.0]);
    let report = |rows: &[Value]| json!({"benchmark": "gemm", "rows": rows});
    let reports = json!([
        report(&[row("a", 8, 1.0), row("a", 16, 2.0), row("b", 8, 3.0), sampled]),
        report(&[row("a", 8, 4.0), row("a", 16, 5.0)]),
    ]);
    let script = "import json, sys, kernels\n\
                  rows = kernels.join(json.loads(sys.argv[1])).values()\n\
                  print(json.dumps([[r['what'], r['sizes']['N'], r['isobath']['microseconds'],\n\
                                     r['isobath']['of']] for r in rows]))";
    let output = python(&["-c", script, &reports.to_string()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let joined: Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = json!([
        ["a", 8, [1.0, 4.0], "medians of rounds"],
        ["a", 16, [2.0, 5.0], "medians of rounds"],
        ["b", 8, [3.0], "medians of rounds"],
        ["c", 8, [7.0, 9.0], "samples"],
    ]);
    assert_eq!(joined, expected);
}

/// Nothing is timed on a machine that cannot, and nothing looks as if it had been.
#[test]
fn without_a_gpu_it_says_so_and_exits_with_2() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.json");
    let out_text = out.display().to_string();
    let arguments = ["kernels.py", "--program", "isobath", "--device", "simt", "--out", &out_text];
    let output = python(&arguments);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert!(text(&output.stderr).starts_with("skipped: twins are timed on a GPU"));
    assert_eq!(text(&output.stdout), "");
    assert!(!out.exists());
}
