//! benches/peers/kernels.py, products.py and training.py without a GPU: how they join reports,
//! their tables of a record, and what they ask of the program and of PyTorch.

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
        "| norm_forward | T=8 | 50 | 2 | 50.0% | compiled | 25 | 4 | 100.0% | 0.50 |",
        "| gemm_nt | T=8 | 200 | 400 | 50.0% | matmul | 300 | 266.7 | 33.3% | 1.50 |",
        "| gemm_tn | T=8 | 2000 | 40 |  | none |  |  |  |  |",
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

/// A line for each pass and shape: the fastest of isobath's kernels, and every twin.
#[test]
fn attention_has_a_table_of_its_own() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let peers = json!([
        {"name": "cuDNN", "microseconds": [500.0]},
        {"name": "flash", "microseconds": [800.0]},
        {"name": "FlashAttention-3", "error": "ModuleNotFoundError: not here"},
    ]);
    let of = |op: &str, what: &str, variant: Value, us: f64, peers: &Value| {
        let mut row = row(op, "bf16", "flops", 200_000_000_000, &[us], peers.clone());
        (row["what"], row["variant"], row["shape"]) = (json!(what), variant, json!("S=8192"));
        row
    };
    let (two, one) = (json!("two passes"), json!("one pass"));
    let rows = vec![
        of("attention_forward", "f", Value::Null, 400.0, &json!([])),
        of("attention_backward", "q and kv", two, 1000.0, &peers),
        of("attention_backward", "one", one.clone(), 625.0, &peers),
        of("attention", "f and one", one, 400.0, &peers),
    ];
    let file = write(folder.path(), "attention.json", &record("H200", rows));
    let output = python(&["kernels.py", "--replay", &file]);
    let table = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for line in [
        "| pass | shape | isobath | variant | cuDNN | flash |",
        "| forward | S=8192 | 500 |  |  |  |",
        "| backward | S=8192 | 320 | one pass | 400 | 250 |",
        "| both | S=8192 | 500 | one pass | 400 | 250 |",
        "- q and kv, S=8192 and 2 more: FlashAttention-3: ModuleNotFoundError: not here",
    ] {
        assert!(table.lines().any(|found| found == line), "no line {line:?} in:\n{table}");
    }
}

/// What stands in for PyTorch: whatever is asked of it can be called, and tells who was.
const FAKE_TORCH: &str = r#"
import sys, types
from unittest.mock import MagicMock
for name in "torch", "torch._dynamo", "torch._functorch", "torch._functorch.config", "torch.nn",             "torch.nn.attention", "step":
    sys.modules[name] = MagicMock(name=name)
torch = sys.modules["torch"]
torch.bfloat16, torch.float32 = (types.SimpleNamespace(itemsize=size) for size in (2, 4))
torch.autograd.grad = lambda out, inputs, d_out, **keep: ("gradients of", out)
import twins
row = lambda op, dtype="bf16": {"op": op, "dtype": dtype,
                                "sizes": {"B": 2, "S": 64, "H": 4, "K": 2, "D": 128}}
"#;

/// As others call it, where it can be imported; and a row's own error where it cannot.
#[test]
fn flash_attention_3_is_a_twin_where_it_is_installed() {
    if python_is_missing() {
        return;
    }
    let script = format!(
        r#"{FAKE_TORCH}
import json, kernels
found = []
def launched(op):
    for twin in twins.twins(row(op)):
        if twin.name == "FlashAttention-3":
            return twin.launch(twin.setup())
OPS = "attention_forward", "attention_backward", "attention"
names = [[twin.name for twin in twins.twins(row(op))] for op in OPS]
names.append([twin.name for twin in twins.twins(row(OPS[0], "f32"))])
stopwatch = types.SimpleNamespace(device="cuda", release=lambda: None)
entry = {{**row("attention"), "what": "", "shape": "", "samples": 1, "peers": []}}
time_twin = lambda twin, samples: ([float(bool(twin.launch(twin.setup())))], 1)
twins.NoTwin = KeyError
kernels.time_peers(stopwatch, time_twin, twins, entry, {{}})
missing = entry["peers"][-1]
calls = []
def flash_attn_func(*tensors, **options):
    calls.append([len(tensors), options])
    return ("out", "lse") if len(calls) == 1 else "out"
sys.modules["flash_attn_interface"] = types.SimpleNamespace(flash_attn_func=flash_attn_func)
results = [launched(op) for op in OPS]
print(json.dumps([names, missing, calls, results]))"#
    );
    let output = python(&["-c", &script]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let sdpa = |name| format!("scaled_dot_product_attention, {name}");
    let all = json!([sdpa("flash"), sdpa("cuDNN"), "FlashAttention-3"]);
    let f32 = json!([sdpa("memory-efficient, kv heads copied")]);
    assert_eq!(found[0], json!([all, all, all, f32]));
    assert_eq!(found[1]["name"], "FlashAttention-3");
    let error = found[1]["error"].as_str().unwrap();
    assert!(error.contains("No module named 'flash_attn_interface'"), "{error}");
    let call = json!([3, {"causal": true}]);
    assert_eq!(found[2], json!([call, call, call]));
    let gradients = json!(["gradients of", "out"]);
    assert_eq!(found[3], json!(["out", gradients, gradients]));
}

/// Kernels that do the same attention are held against the same twins, which run once a round.
#[test]
fn rows_of_the_same_attention_share_their_twins() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.json").display().to_string();
    let script = r#"
import sys, types, kernels
row = lambda op, what: {
    "op": op, "dtype": "bf16", "sizes": {"S": 8}, "what": what, "shape": "S=8", "samples": 2,
    "variant": "one pass", "median_microseconds": 1.0,
    "work": {"unit": "flops", "amount": 8, "formula": ""}}
report = {"benchmark": "attention", "rows": [
    row("attention_backward", "two"), row("attention_backward", "one"), row("attention", "both"),
    row("gemm_nt", "a"), row("gemm_nt", "a, addend")]}
launched = []
def twins(entry, device):
    return [types.SimpleNamespace(name="a twin", bytes=1, setup=list,
                                  launch=lambda copy: launched.append(entry["what"]))]
fake = types.SimpleNamespace(twins=twins, ceilings=lambda *of: [], NoTwin=KeyError)
torch = types.SimpleNamespace(__version__="0", version=types.SimpleNamespace(cuda=None))
kernels.modules = lambda device: (torch, fake)
kernels.run_isobath = lambda *of: report
status = kernels.main()
print([launched.count(what) for what in ("two", "one", "both", "a", "a, addend")])
sys.exit(status)
"#;
    let arguments = ["--program", "isobath", "--device", "simt", "--cpu-twins", "--rounds", "2"];
    let of_run = ["--bench", "attention", "--out", &out];
    let output = python(&[&["-c", script], &arguments[..], &of_run].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    // Two that do not count and two samples, twice.
    assert!(text(&output.stdout).contains("[8, 0, 8, 8, 8]"), "{}", text(&output.stdout));
    let record: Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
    let rows = record["rows"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[1]["variant"]), (5, &json!("one pass")));
    for row in rows {
        assert_eq!(row["peers"][0]["microseconds"].as_array().unwrap().len(), 4, "{row}");
    }
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
    let mut slower = flops("gemm_nt", 10.0, one(20.0));
    slower["sustained"] = json!({"isobath": {"microseconds": [16.0]}, "peers": one(20.0)});
    let rows = vec![
        slower,
        flops("gemm_nt", 20.0, one(10.0)),
        flops("gemm_nn", 10.0, one(9.0)),
        flops("gemm_tn", 10.0, several),
        flops("gemm_tn", 10.0, json!([])),
    ];
    let mut record = record("H200", rows);
    record["not_reached"] = json!([["nt", [8, 8, 8]]]);
    record["peak"] = json!(1e15);
    let file = write(folder.path(), "products.json", &record);
    let output = python(&["products.py", "--replay", &file]);
    let table = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    // (2 / 2 * 0.9 * 3) ^ 1/4
    for line in [
        "| gemm_nt | T=8 | 10 | 800 | 100.0% | matmul | 20 | 400 | 50.0% | 2.00 |",
        "| nt | the fastest | 2 | 1.000 |",
        "| nn | matmul | 1 | 0.900 |",
        "| tn | the fastest | 1 | 3.000 |",
        "| tn | addmm into bf16 | 1 | 3.000 |",
        "| tn | addmm into f32 | 1 | 4.000 |",
        "| all | the fastest | 4 | 1.282 |",
        "| gemm_nt | T=8 | 800 | 80.0% | 2.00 | 500 | 50.0% | 1.25 |",
        "| gemm_nn | T=8 | 800 | 80.0% | 0.90 |  |  |  |",
        "| nt | the fastest | 1 | 1.250 |",
        "| all | the fastest | 1 | 1.250 |",
        "The peak is the datasheet's, 1000.0 TFLOP/s.",
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
print(launched[:12:3])
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
        let sustained = &row["sustained"];
        assert_eq!(sustained["isobath"]["microseconds"].as_array().unwrap().len(), 1);
        assert_eq!(sustained["peers"][0]["microseconds"].as_array().unwrap().len(), 2, "samples");
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

// ------------------------------------------------------------------ training.py

/// Programs that are made up: what they are asked goes to the file CALLS beside them, and the speed
/// of a micro-batch is known. Eight rows are too many for either.
const FAKE_ISOBATH: &str = r#"#!/usr/bin/env python3
import json, pathlib, sys
arguments = sys.argv[1:]
if "--predict" in arguments:
    print(json.dumps({"micro_batch": 4, "grad_accumulation": 4}))
    sys.exit()
sets = dict(arguments[i + 1].split("=") for i, it in enumerate(arguments) if it == "--set")
rows, count = int(sets["train.micro_batch"]), int(sets["train.grad_accumulation"])
with open(pathlib.Path(__file__).parent / "CALLS", "a") as calls:
    calls.write(f"isobath {rows} {count}\n")
if rows == 8:
    sys.exit("error: the plan needs 9 MiB, cuda has 8 MiB free")
speed = {1: 100.0, 2: 300.0, 4: 200.0}[rows]
sizes = {"S": 32, "B": rows, "grad_accumulation": count, "model": {"layers": 3}, "optimizer": {}}
families = [{"family": "gemm", "launches": 7, "microseconds": 1500.0},
            {"family": "norm", "launches": 2, "microseconds": 500.0}]
row = {"tokens_per_second": speed, "median_microseconds": 16 * 32 / speed * 1e6, "dtype": "bf16",
       "sizes": sizes, "memory": {"planned": 3 << 30, "allocated": 2 << 30, "peak": 4 << 30},
       "conditions": None, "work": {"amount": 5120, "formula": "6*N"},
       "per_second": 10 * speed, "percent_of_peak": speed / 10, "families": families}
program = {"version": "0.1.0", "commit": "0123abc", "changed": False}
print(json.dumps({"rows": [row], "machine": {"name": "H200"}, "program": program,
                  "peak_source": "a datasheet"}))
"#;
const FAKE_PYTHON: &str = r#"#!/usr/bin/env python3
import json, pathlib, sys
if sys.argv[1] == "-c":
    print("2.9 False")
    sys.exit()
work = json.load(open(sys.argv[2]))
rows, count = work["batch"], work["grad_accumulation"]
mode = sys.argv[sys.argv.index("--compile") + 1]
with open(pathlib.Path(__file__).parent / "CALLS", "a") as calls:
    layers = work["config"]["model"]["layers"]
    calls.write(f"{mode} {rows} {count} layers={layers} S={work['sequence']}\n")
if rows == 8:
    print("out of memory: so and so", file=sys.stderr)
    sys.exit(3)
speed = {1: 50.0, 2: 80.0, 4: 150.0}[rows]
print(json.dumps({"tokens_per_second": speed, "median_ms": 512e3 / speed, "step_ms": [1.0],
                  "max_memory_allocated": 5 << 30, "clocks": {"readings": 1}}))
"#;

fn executable(folder: &Path, name: &str, text: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

/// The fastest micro-batch of each side, not the largest; as many rows in every step; turns.
#[test]
fn each_side_trains_with_its_fastest_micro_batch_in_turns() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = executable(folder.path(), "isobath", FAKE_ISOBATH);
    let interpreter = executable(folder.path(), "python", FAKE_PYTHON);
    let [out, table] = ["out.json", "out.md"].map(|it| folder.path().join(it));
    let [out_text, table_text] = [&out, &table].map(|it| it.display().to_string());
    let arguments = ["--program", &program, "--python", &interpreter, "--device", "simt"];
    let more = ["--cpu-twins", "--preset", "130m", "--rounds", "2"];
    let files = ["--out", &out_text, "--table", &table_text];
    let run = |extra: &[&str]| {
        python(&[&["training.py"], &arguments[..], &more[..], &files[..], extra].concat())
    };
    let output = run(&[]);
    assert!(output.status.success(), "{}", text(&output.stderr));

    let calls = fs::read_to_string(folder.path().join("CALLS")).unwrap();
    let expected = [
        "isobath 1 16",
        "default 1 16 layers=3 S=32",
        "isobath 2 8",
        "default 2 8 layers=3 S=32",
        "isobath 4 4",
        "default 4 4 layers=3 S=32",
        "isobath 8 2",
        "default 8 2 layers=3 S=32",
        "isobath 2 8",
        "default 4 4 layers=3 S=32",
        "isobath 2 8",
        "default 4 4 layers=3 S=32",
    ];
    assert_eq!(calls.lines().collect::<Vec<_>>(), expected);

    let printed = text(&output.stdout);
    // 300 tokens a second are 30% of the peak, so 150 are 15%; 512 tokens in a step.
    for line in [
        "| isobath | 2 | 1706.67 | 300 | 30.0% | 4.00 | 3.00 | 1.00 |",
        "| PyTorch, compiled (default) | 4 | 3413.33 | 150 | 15.0% | 5.00 |  | 2.00 |",
        "| gemm | 7 | 1.50 |",
        "| together | 9 | 2.00 |",
        "MFU = tokens/s x (6*N) / the dense peak (a datasheet).",
    ] {
        assert!(printed.lines().any(|found| found == line), "no line {line:?} in:\n{printed}");
    }
    let tried = "Tried with isobath: 1 rows: 100 tokens/s; 2 rows: 300 tokens/s; 4 rows: 200 \
                 tokens/s; 8 rows: ";
    assert!(printed.contains(tried), "{printed}");
    assert!(printed.starts_with("H200, driver") && printed.contains("512 tokens in a step"));
    assert_eq!(fs::read_to_string(&table).unwrap(), printed);
    let replayed = python(&["training.py", "--replay", &out_text]);
    assert_eq!(text(&replayed.stdout), printed);
    let record: Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
    assert_eq!((&record["commit"], &record["torch"]), (&json!("0123abc"), &json!("2.9")));
    assert_eq!(record["sides"][1]["runs"][1]["clocks"]["readings"], 1);
    assert_eq!(record["sides"][0]["tried"][3]["micro_batch"], 8);

    // Without time: the same micro-batch for both, one round.
    fs::remove_file(folder.path().join("CALLS")).unwrap();
    assert!(run(&["--seconds", "0.000001"]).status.success());
    let calls = fs::read_to_string(folder.path().join("CALLS")).unwrap();
    let (ours, peers) = ("isobath 1 16\n", "default 1 16 layers=3 S=32\n");
    assert_eq!(calls, format!("{ours}{peers}{ours}{peers}"));

    for (extra, part) in [
        (&["--micro-batch", "3:4"][..], "micro-batches of 3 make no step of 16 rows"),
        (&["--first", "8"], "the plan needs 9 MiB"),
        (&["--first", "3"], "--first 3 does not divide 16 rows"),
    ] {
        let output = run(extra);
        assert_eq!(output.status.code(), Some(1), "{extra:?}");
        assert!(text(&output.stderr).contains(part), "{part}: {}", text(&output.stderr));
    }
}

/// What has been measured is on disk, whatever fails after it.
#[test]
fn a_side_that_fails_does_not_take_the_others_with_it() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = executable(folder.path(), "isobath", FAKE_ISOBATH);
    let out = folder.path().join("out.json");
    let out_text = out.display().to_string();
    let run = |python_text: &str, extra: &[&str]| {
        let interpreter = executable(folder.path(), "python", python_text);
        let arguments = ["training.py", "--program", &program, "--python", &interpreter];
        let more = ["--device", "simt", "--cpu-twins", "--rounds", "2", "--out", &out_text];
        let output = python(&[&arguments[..], &more[..], extra].concat());
        let calls = fs::read_to_string(folder.path().join("CALLS")).unwrap();
        fs::remove_file(folder.path().join("CALLS")).unwrap();
        let record: Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
        (output, calls, record)
    };
    // Without a C compiler: PyTorch as it stands.
    let mark = "if rows == 8:\n    print";
    let failing = |condition: &str, how: &str| {
        let line = format!("if {condition}:\n    {how}\n{mark}");
        FAKE_PYTHON.replace(mark, &line)
    };
    let no_compiler = failing("mode != 'none'", "sys.exit('RuntimeError: no C compiler')");
    for extra in [&[][..], &["--micro-batch", "2:4"]] {
        let (output, calls, record) = run(&no_compiler, extra);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let compiled: Vec<&str> = calls.lines().filter(|it| it.starts_with("default")).collect();
        assert_eq!(compiled.len(), 1, "it is not tried again: {calls}");
        let eager = calls.lines().filter(|it| it.starts_with("none 4 4 ")).count();
        assert_eq!(eager, if extra.is_empty() { 3 } else { 2 }, "{calls}");
        let [isobath, peer, eager] = [0, 1, 2].map(|side| &record["sides"][side]);
        assert_eq!(isobath["runs"].as_array().unwrap().len(), 2);
        assert_eq!((&peer["runs"], &eager["micro_batch"]), (&json!([]), &json!(4)));
        let printed = text(&output.stdout);
        let line = "| PyTorch eager | 4 | 3413.33 | 150 | 15.0% | 5.00 |  | 2.00 |";
        assert!(printed.contains(line), "{printed}");
        assert!(printed.contains("compiled (default): ") && printed.contains("no C compiler."));
    }
    // Too large a micro-batch is no reason to do without: the search has found another.
    let (output, calls, _) = run(&failing("rows == 4", "sys.exit('crashed')"), &[]);
    assert!(output.status.success() && !calls.contains("none"), "{calls}");
    assert!(text(&output.stdout).contains("| PyTorch, compiled (default) | 2 | 6400.00 | 80 "));
    // Ended from outside, in the first round: what was tried is there.
    let killed = failing(
        "'--steps' in sys.argv and sys.argv[-1] == '20'",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    );
    let (output, _, record) = run(&killed, &[]);
    assert!(!output.status.success());
    assert_eq!(record["sides"][0]["runs"].as_array().unwrap().len(), 1);
    assert_eq!(record["sides"][1]["tried"][2]["tokens_per_second"], 150.0);
}

/// As the first lines of the scripts say: a program of this folder.
#[test]
fn a_program_is_named_by_a_path() {
    if python_is_missing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    executable(folder.path(), "isobath", FAKE_ISOBATH);
    let interpreter = executable(folder.path(), "python", FAKE_PYTHON);
    let peers = source().join("benches").join("peers");
    let mut command = Command::new("python3");
    command.current_dir(folder.path()).env("PYTHONDONTWRITEBYTECODE", "1");
    command.arg(peers.join("training.py")).args(["--program", "./isobath", "--python"]);
    command.arg(&interpreter).args(["--device", "simt", "--cpu-twins", "--rounds", "1"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// What it reads of the real program's report.
#[test]
fn the_program_gives_training_py_what_it_reads() {
    if python_is_missing() {
        return;
    }
    if let Err(why) = host::present() {
        println!("skipped: no simt: {why}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = isobath().get_program().to_string_lossy().into_owned();
    let interpreter = executable(folder.path(), "python", FAKE_PYTHON);
    let sets = ["hidden=64", "layers=3", "heads=2", "kv_heads=1", "ffn=64", "vocab=128"];
    let sets = sets.map(|it| format!("model.{it}"));
    let sets = sets.iter().flat_map(|it| ["--set", it]);
    let mut arguments = vec!["training.py", "--program", &program, "--python", &interpreter];
    arguments.extend(["--device", "simt", "--cpu-twins", "--preset", "9m", "--rows", "2"]);
    arguments.extend(["--micro-batch", "1:2", "--steps", "1", "--rounds", "1"]);
    arguments.extend(sets.chain(["--set", "data.sequence=32"]));
    let output = python(&arguments);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let calls = fs::read_to_string(folder.path().join("CALLS")).unwrap();
    assert_eq!(calls, "default 2 1 layers=3 S=32\n");
    let printed = text(&output.stdout);
    assert!(printed.contains("64 tokens in a step") && printed.contains("| optimizer | 4 |"));
}

#[test]
fn training_py_without_a_gpu_says_so_and_exits_with_2() {
    if python_is_missing() {
        return;
    }
    for (extra, part) in [
        (&["--device", "simt"][..], "skipped: the twin is timed on a GPU"),
        (&["--python", "/nowhere/python"], "skipped: no PyTorch: /nowhere/python"),
    ] {
        let output = python(&[&["training.py", "--program", "isobath"], extra].concat());
        assert_eq!(output.status.code(), Some(2), "{extra:?}");
        assert!(text(&output.stderr).starts_with(part), "{}", text(&output.stderr));
    }
}

#[test]
fn lines_of_nvidia_smi_become_spans_and_shares() {
    if python_is_missing() {
        return;
    }
    let script = "import json, clocks\n\
                  lines = '1980, 2619, 60, 650.5, 0x0000000000000004\\n'\\\n\
                          '1700, 2619, 62, [N/A], 0x000000000000000c\\n'\\\n\
                          'torn, li'\n\
                  with clocks.Clocks(False) as none:\n    pass\n\
                  print(json.dumps([clocks.summary(lines), none.summary()]))";
    let output = python(&["-c", script]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let span =
        |least: f64, mean: f64, most: f64| json!({"least": least, "mean": mean, "most": most});
    let expected = json!({
        "readings": 2,
        "sm_clock_mhz": span(1700.0, 1840.0, 1980.0),
        "memory_clock_mhz": span(2619.0, 2619.0, 2619.0),
        "temperature_celsius": span(60.0, 61.0, 62.0),
        "power_watts": span(650.5, 650.5, 650.5),
        "throttled": {"SW_POWER_CAP": 1.0, "HW_SLOWDOWN": 0.5},
    });
    assert_eq!(found, json!([expected, null]));
}
