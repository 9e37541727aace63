//! src/throughput.rs: which steps count, whose time it is, and every figure of a session whose
//! steps are known.

use std::time::{Duration, Instant};

use isobath::config::{Dtype, ModelConfig};
use isobath::cuda::peaks::H200;
use isobath::model::parameters::ParameterTable;
use isobath::plan::{FLOPS_FORMULA, flops_per_token};
use isobath::sensors::{Conditions, Reading};
use isobath::throughput::{
    Clock, MemoryUse, Meter, Steady, Throughput, TokenCost, Utilisation, WARM_UP_STEPS,
};

use crate::support::small_model;

/// Steps of 1000 tokens that take so many seconds, after a warm-up that takes 1000 times as long.
fn meter(seconds: &[f64]) -> Meter {
    let mut meter = Meter::default();
    (0..WARM_UP_STEPS).for_each(|_| meter.add(1000, 1000.0));
    seconds.iter().for_each(|&seconds| meter.add(1000, seconds));
    meter
}

fn steady(seconds: &[f64]) -> Steady {
    meter(seconds).steady().unwrap()
}

#[test]
fn the_first_steps_of_a_process_never_count() {
    const { assert!(WARM_UP_STEPS > 0) };
    let warming_up = meter(&[]);
    assert_eq!((warming_up.recent(), warming_up.steady()), (None, None));
    let one = meter(&[2.0]);
    assert_eq!(one.recent(), Some(500.0));
    let steady = one.steady().unwrap();
    assert_eq!((steady.warm_up_steps, steady.counted_steps), (WARM_UP_STEPS, 1));
    assert_eq!((steady.tokens_per_second, steady.seconds, steady.drift), (500.0, 2.0, None));
}

#[test]
fn a_session_is_its_median_its_quartiles_and_its_drift() {
    // 1000, 500, 250, 125 and 100 tokens a second; the mean would be 232, of tokens over seconds.
    let spread = steady(&[4.0, 1.0, 8.0, 2.0, 10.0]);
    assert_eq!(spread.tokens_per_second, 250.0);
    assert_eq!((spread.middle_half, spread.slowest), ([125.0, 500.0], 100.0));
    assert_eq!((spread.seconds, spread.drift), (25.0, None));
    // Between the two in the middle, and a quarter of the way.
    let even = steady(&[1.0, 2.0]);
    assert_eq!((even.tokens_per_second, even.middle_half), (750.0, [625.0, 875.0]));

    // Quarters of two steps: 1000 and 500, then 400 and 200 tokens a second.
    let slower = steady(&[1.0, 2.0, 9.0, 9.0, 9.0, 9.0, 2.5, 5.0]);
    assert!((slower.drift.unwrap() - (300.0 / 750.0 - 1.0)).abs() < 1e-12, "{slower:?}");
    assert_eq!(steady(&[1.0; 8]).drift, Some(0.0));
}

#[test]
fn what_is_shown_follows_the_last_half_minute() {
    // Of 20 seconds, all; of more, the last 30.
    let mut meter = meter(&[10.0, 10.0]);
    assert_eq!(meter.recent(), Some(100.0));
    (0..30).for_each(|_| meter.add(1000, 1.0));
    assert_eq!(meter.recent(), Some(1000.0));
    // A step that takes longer is all that counts.
    meter.add(1000, 100.0);
    assert_eq!(meter.recent(), Some(10.0));
}

/// Moments of one session, in seconds from its beginning.
#[test]
fn a_step_has_no_time_of_an_evaluation_and_the_run_none_of_a_checkpoint() {
    let first = Instant::now();
    let at = |seconds: u64| first + Duration::from_secs(seconds);
    let mut clock = Clock::new(at(0));
    clock.run_goes_on(at(10)); // loaded
    // Two steps, the second of which was enqueued while the first one ran.
    clock.step_begins(at(11));
    assert_eq!(clock.step_ends(at(15)), 4.0);
    assert_eq!(clock.run_pauses(at(15)), 5.0);
    clock.run_goes_on(at(15));
    assert_eq!(clock.step_ends(at(18)), 3.0, "from the end of the one before it");
    // An evaluation up to 40, which is the run's; a checkpoint up to 70, which is nobody's.
    assert_eq!(clock.run_pauses(at(40)), 25.0);
    clock.run_goes_on(at(70));
    clock.step_begins(at(71));
    assert_eq!(clock.step_ends(at(73)), 2.0);
    assert_eq!(clock.run_pauses(at(74)), 4.0);
}

/// N_matmul by hand: qkv 24x48, attention out 24x24, gate and up 24x74, down 37x24, the head 53x24.
#[test]
fn mfu_is_the_formulas_flops_over_the_dense_peak() {
    let model = ModelConfig { hidden: 24, ffn: 37, vocab: 53, layers: 2, ..small_model() };
    let sequence = 32;
    let flops = flops_per_token(&model, &ParameterTable::new(&model), sequence);
    let matmul = 2 * (24 * 48 + 24 * 24 + 24 * 74 + 37 * 24) + 53 * 24;
    assert_eq!(flops, 6 * matmul + 6 * 2 * 32 * 24);
    let cost =
        |peak| TokenCost { flops, flops_formula: FLOPS_FORMULA, peak_flops_per_second: peak };
    assert_eq!(Utilisation::of(1e6, &cost(None)), None);
    // Half of the 1979 TFLOP/s that the datasheet prints: those are with sparsity.
    let peak = H200.flops_per_second(Dtype::Bf16);
    assert_eq!(peak, 1979e12 / 2.0);
    let used = Utilisation::of(1e6, &cost(Some(peak))).unwrap();
    assert_eq!(used.mfu, 1e6 * flops as f64 / 989.5e12);
    assert_eq!((used.flops_per_token, used.flops_formula.as_str()), (flops, FLOPS_FORMULA));
}

fn session() -> Throughput {
    let steady = steady(&[1.0, 2.0, 9.0, 9.0, 9.0, 9.0, 2.5, 5.0]);
    let cost =
        TokenCost { flops: 2_000_000, flops_formula: "6*N", peak_flops_per_second: Some(1e9) };
    let reading = |mhz: f64, reasons: &[&str]| Reading {
        sm_clock_mhz: Some(mhz),
        power_watts: Some(700.0),
        throttled_by: reasons.iter().map(ToString::to_string).collect(),
        ..Reading::default()
    };
    let readings = [reading(1980.0, &[]), reading(1700.0, &["SW_POWER_CAP"])];
    Throughput {
        first_step: 0,
        last_step: 11,
        utilisation: Utilisation::of(steady.tokens_per_second, &cost),
        steady,
        memory: MemoryUse {
            planned: 3 << 20,
            allocated: Some(2 << 20),
            peak: Some(5 << 20),
            free_after_warm_up: Some(7 << 20),
            free_at_end: Some(6 << 20),
        },
        conditions: Conditions::of(&readings),
    }
}

#[test]
fn a_summary_says_all_of_it_and_survives_json() {
    let session = session();
    let shown = session.to_string();
    for part in [
        "156 tokens/s: median of 8 steps after the first 3; half of them 111 to 425, the slowest 111",
        "the last quarter 60.0% slower than the first",
        "31.1% MFU = tokens/s x 2000000 FLOPs per token (6*N) / 0.0e12, the dense peak",
        "memory: 3.0 MiB planned, 2.0 in buffers, 5.0 taken at most; 7.0 MiB of the GPU free after \
         the warm-up, 6.0 at the end",
        "while it trained, 2 readings; SM clock 1840 MHz (1700 to 1980); power 700 W (700 to 700); \
         SW_POWER_CAP in 50%",
    ] {
        assert!(shown.contains(part), "no {part:?} in:\n{shown}");
    }
    let line = serde_json::to_string(&session).unwrap();
    assert_eq!(serde_json::from_str::<Throughput>(&line).unwrap(), session);
    let known = Throughput { utilisation: None, conditions: None, ..session };
    assert!(!known.to_string().contains("MFU") && !known.to_string().contains("readings"));
}
