//! benches/peers/kernels.py and products.py without a GPU: how they join reports, their tables of a
//! record, and what products.py asks of the program.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use isobath::cuda::host;
use serde_json::{Value, json};

use crate::support::{isobath, python_is_missing, source};

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

// ------------------------------------------------------------------ products.py

#[test]
fn products_have_geometric_means_by_layout_and_twin() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let one = |us: f64| json!([{"name": "matmul", "microseconds": [us]}]);
    let several = json!([
        {"name": "addmm into bf16", "microseconds": [30.0]},
        {"name": "addmm into f32", "microseconds": [40.0]},
        {"name": "matmul, add to f32", "error": "no memory"},
    ]);
    let flops = |op: &str, us: f64, peers| row(op, "bf16", "flops", 8_000_000_000, &[us], peers);
    let rows = vec![
        flops("gemm_nt", 10.0, one(20.0)),
        flops("gemm_nt", 20.0, one(10.0)),
        flops("gemm_nn", 10.0, one(9.0)),
        flops("gemm_tn", 10.0, several),
        flops("gemm_tn", 10.0, json!([])),
    ];
    let mut record = record("H200", rows);
    record["not_reached"] = json!([["nt", [8, 8, 8]]]);
    let file = write(folder.path(), "products.json", &record);
    let output = python(&["products.py", "--replay", &file]);
    let table = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    // (2 / 2 * 0.9 * 3) ^ 1/4
    for line in [
        "| gemm_nt | T=8 | 10 | 100.0% | matmul | 20 | 50.0% | 2.00 |",
        "| nt | the fastest | 2 | 1.000 |",
        "| nn | matmul | 1 | 0.900 |",
        "| tn | the fastest | 1 | 3.000 |",
        "| tn | addmm into bf16 | 1 | 3.000 |",
        "| tn | addmm into f32 | 1 | 4.000 |",
        "| all | the fastest | 4 | 1.282 |",
        "No time was left for 1 products, the first of them nt [8, 8, 8].",
    ] {
        assert!(table.lines().any(|found| found == line), "no line {line:?} in:\n{table}");
    }
}

/// The list, one process that answers product by product, and its last words.
#[test]
fn products_are_asked_for_one_by_one() {
    if python_is_missing() {
        return;
    }
    if let Err(why) = host::present() {
        println!("skipped: no simt: {why}");
        return;
    }
    let program = isobath().get_program().to_string_lossy().into_owned();
    let script = "import json, sys, products\n\
                  wanted = products.products(sys.argv[1], ['60m', '130m'])\n\
                  isobath = products.Isobath(sys.argv[1], 'simt', ['--samples', '2'])\n\
                  rows = [isobath.time('nt', (64, 72, 80)), isobath.time('tn', (8, 16, 24))]\n\
                  try:\n    isobath.time('nn', (8, 8, 0))\n\
                  except ValueError as error:\n    said = str(error)\n\
                  isobath.close()\n\
                  print(json.dumps([wanted, rows, said]))";
    let output = python(&["-c", script, &program]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let wanted = found[0].as_array().unwrap();
    let is = |it: &&Value| **it == json!(["tn", [768, 768, 16384]]);
    assert_eq!(wanted.iter().filter(is).count(), 1, "{wanted:?}");
    assert!(wanted.len() > 60, "{wanted:?}");
    let sizes = [&found[1][0]["sizes"], &found[1][1]["sizes"]];
    assert_eq!(sizes, [&json!({"M": 64, "N": 72, "K": 80}), &json!({"M": 8, "N": 16, "K": 24})]);
    assert_eq!((&found[1][1]["op"], &found[1][1]["samples"]), (&json!("gemm_tn"), &json!(2)));
    let said = found[2].as_str().unwrap();
    assert!(said.contains("isobath ended with 2") && said.contains("cannot be timed"), "{said}");
}

/// Twins and a machine that are made up take the place of PyTorch: rounds, products and twins
/// alternate, and the record says what was not reached.
#[test]
fn products_alternate_with_their_twins() {
    if python_is_missing() {
        return;
    }
    if let Err(why) = host::present() {
        println!("skipped: no simt: {why}");
        return;
    }
    let program = isobath().get_program().to_string_lossy().into_owned();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.json").display().to_string();
    let script = r#"
import sys, types, kernels, products
launched = []
def twins(entry, device):
    name = f"{entry['op']} of {entry['sizes']['M']}"
    return [types.SimpleNamespace(name="one", bytes=1, setup=list,
                                  launch=lambda copy: launched.append(name))]
def ceilings(units, device):
    return [(unit, 1, types.SimpleNamespace(name="a twin", bytes=1, setup=list, launch=len))
            for unit in units]
fake = types.SimpleNamespace(twins=twins, ceilings=ceilings, NoTwin=KeyError)
torch = types.SimpleNamespace(__version__="0", version=types.SimpleNamespace(cuda=None))
kernels.modules = lambda device: (torch, fake)
status = products.main()
print(launched[:16:3])
sys.exit(status)
"#;
    let run = |seconds: &str| {
        let output = python(&[
            "-c",
            script,
            "--program",
            &program,
            "--device",
            "simt",
            "--cpu-twins",
            "--rounds",
            "2",
            "--samples",
            "2",
            "--product",
            "nt:64,72,80",
            "--product",
            "tn:8,16,24",
            "--out",
            &out,
            "--seconds",
            seconds,
        ]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let record: Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
        (text(&output.stdout).to_string(), record)
    };
    let (printed, record) = run("600");
    // One launch that does not count, two samples.
    let order = "['gemm_nt of 64', 'gemm_tn of 8', 'gemm_nt of 64', 'gemm_tn of 8']";
    assert!(printed.contains(order), "{printed}");
    assert_eq!(record["rounds"], 2);
    let rows = record["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert_eq!(row["isobath"]["microseconds"].as_array().unwrap().len(), 2, "rounds");
        assert_eq!(row["peers"][0]["microseconds"].as_array().unwrap().len(), 4, "samples");
    }
    assert!(record["not_reached"].is_null());
    let (printed, record) = run("0.000001");
    assert_eq!(record["not_reached"], json!([["nt", [64, 72, 80]], ["tn", [8, 16, 24]]]));
    assert!(printed.contains("No time was left for 2 products"), "{printed}");
}

#[test]
fn products_without_a_gpu_say_so_and_exit_with_2() {
    if python_is_missing() {
        return;
    }
    let output = python(&["products.py", "--program", "isobath", "--device", "simt"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert!(text(&output.stderr).starts_with("skipped: twins are timed on a GPU"));
    for arguments in [&["--product", "nt:1,2"][..], &["--product", "xx:1,2,3"], &[]] {
        let output = python(&[&["products.py"], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    }
}
