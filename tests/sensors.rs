//! src/sensors.rs: what readings become, and when a device is asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use isobath::sensors::{Conditions, Monitor, Reading, Sensors, Span};

fn reading(mhz: Option<f64>, watts: f64, reasons: &[&str]) -> Reading {
    Reading {
        sm_clock_mhz: mhz,
        power_watts: Some(watts),
        throttled_by: reasons.iter().map(ToString::to_string).collect(),
        ..Reading::default()
    }
}

#[test]
fn readings_become_spans_and_shares() {
    let readings = [
        reading(Some(1980.0), 650.0, &["SW_POWER_CAP"]),
        reading(None, 700.0, &["SW_POWER_CAP", "HW_SLOWDOWN"]),
        reading(Some(1500.0), 690.0, &[]),
        reading(Some(1830.0), 680.0, &["SW_POWER_CAP"]),
    ];
    let found = Conditions::of(&readings).unwrap();
    assert_eq!(found.readings, 4);
    // The one that was not told is left out of the mean.
    assert_eq!(found.sm_clock_mhz, Some(Span { least: 1500.0, mean: 1770.0, most: 1980.0 }));
    assert_eq!(found.power_watts, Some(Span { least: 650.0, mean: 680.0, most: 700.0 }));
    assert_eq!((found.memory_clock_mhz, found.temperature_celsius), (None, None));
    let shares: Vec<(&str, f64)> =
        found.throttled.iter().map(|(reason, share)| (reason.as_str(), *share)).collect();
    assert_eq!(shares, [("HW_SLOWDOWN", 0.25), ("SW_POWER_CAP", 0.75)]);
    assert_eq!(Conditions::of([]), None);
}

/// Sensors that say how often they were asked, and the count.
fn counting() -> (Sensors, Arc<AtomicU64>) {
    let asked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&asked);
    let sensors = move || {
        let before = count.fetch_add(1, Ordering::SeqCst);
        reading(Some(before as f64 + 1.0), 1.0, &[])
    };
    (Box::new(sensors), asked)
}

fn wait_until(done: impl Fn() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(30), "nothing was read");
        sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_device_is_asked_while_it_trains_and_not_between() {
    let (sensors, asked) = counting();
    let monitor = Monitor::start(sensors, Duration::from_millis(1));
    let count = || asked.load(Ordering::SeqCst);
    sleep(Duration::from_millis(30));
    assert_eq!(count(), 0, "asked before training");
    monitor.training(true);
    wait_until(|| count() >= 3);
    monitor.training(false);
    // One reading may be under way.
    sleep(Duration::from_millis(30));
    let during = count();
    sleep(Duration::from_millis(30));
    assert_eq!(count(), during, "asked during an evaluation");
    let found = monitor.finish().unwrap();
    assert_eq!(found.readings, during);
    let most = during as f64;
    let span = Span { least: 1.0, mean: (most + 1.0) / 2.0, most };
    assert_eq!(found.sm_clock_mhz, Some(span));
}

#[test]
fn a_session_that_ends_does_not_wait_for_the_next_reading() {
    let (sensors, _) = counting();
    let monitor = Monitor::start(sensors, Duration::from_secs(600));
    monitor.training(true);
    let started = Instant::now();
    assert_eq!(monitor.finish(), None);
    assert!(started.elapsed() < Duration::from_secs(60));
}
