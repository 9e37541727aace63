//! What `isobath bench` measures and refuses.

use std::process::Output;

use isobath::bench::{self, Benchmark, Request};
use isobath::config::{Dtype, NormKind};
use isobath::cuda::gemm::{Family, Layout};
use isobath::cuda::host::{self, Host, Options};

use crate::support;

const SMALL: Request = Request {
    benchmark: Benchmark::Norm,
    norm: NormKind::Rms,
    dtype: Dtype::Bf16,
    rows: Some(16),
    columns: Some(64),
    product: Some([128, 64, 72]),
    layout: None,
    family: None,
    samples: Some(4),
};

#[test]
fn work_is_counted_by_its_formula() {
    if let Err(error) = host::present() {
        println!("skipped: {error}");
        return;
    }
    let mut host = Host::new(Options::default()).unwrap();
    let mut amounts = |request: &Request| {
        let report = bench::run(&mut host, request).unwrap();
        for row in &report.rows {
            assert_eq!(row.samples, 4);
            assert!(0.0 < row.fastest_microseconds);
            assert!(row.fastest_microseconds <= row.median_microseconds);
            let per_second = row.work.amount as f64 / (row.median_microseconds * 1e-6);
            assert!((row.per_second / per_second - 1.0).abs() < 1e-12);
        }
        report.rows.iter().map(|row| row.work.amount).collect::<Vec<_>>()
    };
    let activations = 16 * 64 * 2;
    let (gain, statistics) = (64 * 4, 16 * 4);
    // 16 rows give one row of partial sums.
    let expected = [
        2 * activations + gain + statistics,
        4 * activations + gain + statistics,
        3 * activations + 5 * gain + statistics,
    ];
    assert_eq!(amounts(&SMALL), expected);
    let wide = Request { norm: NormKind::Layer, dtype: Dtype::F32, ..SMALL };
    let expected = [
        4 * activations + gain + 2 * statistics,
        8 * activations + gain + 2 * statistics,
        6 * activations + 5 * gain + 2 * statistics,
    ];
    assert_eq!(amounts(&wide), expected);
    let products = Request { benchmark: Benchmark::Gemm, ..SMALL };
    let work = 2 * 128 * 64 * 72;
    assert_eq!(amounts(&products), [work; 3], "every layout");
    assert_eq!(amounts(&Request { layout: Some(Layout::Tn), ..products }), [work]);
    assert_eq!(amounts(&Request { family: Some(Family::Sm90), ..products }), [work], "only NT");
    assert_eq!(amounts(&Request { dtype: Dtype::F32, ..products }), [work; 3]);

    for wrong in [
        Request { rows: Some(0), ..SMALL },
        Request { rows: Some(usize::MAX), ..SMALL },
        Request { benchmark: Benchmark::Gemm, product: Some([0, 8, 8]), ..SMALL },
        Request { benchmark: Benchmark::Gemm, product: Some([1 << 30; 3]), ..SMALL },
    ] {
        let error = bench::run(&mut host, &wrong).err().unwrap().to_string();
        assert!(error.contains("cannot be timed"), "{error}");
    }
}

fn bench(arguments: &str, variables: &[(&str, &str)]) -> Output {
    let mut command = support::isobath();
    command.arg("bench").args(arguments.split_whitespace()).envs(variables.iter().copied());
    command.output().unwrap()
}

#[test]
fn kernels_are_timed_and_checked_from_the_command_line() {
    if let Err(error) = host::present() {
        println!("skipped: {error}");
        return;
    }
    let output = bench(
        "norm --device simt --race --order random --seed 7 --rows 16 --columns 64 --samples 1 --json",
        &[("SIMT_WORKERS", "1")],
    );
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["device"], "simt");
    assert_eq!(report["rows"].as_array().unwrap().len(), 3);
    assert_eq!(report["rows"][0]["work"]["amount"], 4416);
    let output = bench("gemm --device simt --product 64,64,64 --samples 1", &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["gemm_sm90", "gemm_sm80_tn", "M=64 N=64 K=64", "GFLOP/s", "on simt (CPU)"] {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    let output = bench(
        "gemm --device simt --product 64,64,63 --layout tn --family sm80 --samples 1 --json",
        &[],
    );
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["rows"].as_array().unwrap().len(), 1);
    assert_eq!(report["rows"][0]["what"], "gemm_sm80_tn_64x64, bf16");
}

#[test]
fn wrong_arguments_of_bench_are_refused() {
    let refused = [
        ("norms", &[][..], &["norms", "norm"][..]),
        ("gemm --product 1,2", &[], &["three sizes"]),
        ("gemm --layout tt", &[], &["--layout", "nt"]),
        ("gemm --family sm100", &[], &["--family", "sm90"]),
        ("norm --rows 0", &[], &["--rows"]),
        ("norm --order last", &[], &["--order", "fifo"]),
        ("norm --device cpu", &[], &["device cpu", "--device simt"]),
        ("norm --device simt", &[("SIMT_SEED", "first")], &["SIMT_SEED", "`first`"]),
    ];
    for (arguments, variables, parts) in refused {
        let output = bench(arguments, variables);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments}: {text}");
        for part in parts {
            assert!(text.contains(part), "{arguments}: `{part}` is missing in:\n{text}");
        }
    }
}
