//! src/cuda/nvml.rs without a GPU, and with one.

use isobath::cuda::nvidia::{self, Nvidia};
use isobath::cuda::{Driver, nvml};

#[test]
fn a_uuid_is_written_as_nvidia_smi_does() {
    let bytes = std::array::from_fn(|i| 0xf0 + i as u8);
    assert_eq!(nvml::uuid_text(bytes), "GPU-f0f1f2f3-f4f5-f6f7-f8f9-fafbfcfdfeff");
}

/// Without NVML, as here, and with one that does not know it.
#[test]
fn a_gpu_that_nvml_does_not_know_has_no_sensors() {
    assert!(nvml::sensors(&nvml::uuid_text([0; 16])).is_none());
}

#[test]
fn a_gpu_has_clocks() {
    if let Err(why) = nvidia::present() {
        println!("skipped: no GPU: {why}");
        return;
    }
    let Some(mut sensors) = Nvidia::open(0).unwrap().sensors() else {
        println!("skipped: no NVML that knows this GPU");
        return;
    };
    let reading = sensors();
    let clock = reading.sm_clock_mhz.unwrap();
    assert!((100.0..5000.0).contains(&clock), "{reading:?}");
}
