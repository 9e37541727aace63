//! What NVML tells of a GPU, as sensors.
//!
//! The library comes with the driver and is opened when it is asked for; where it is missing, or
//! does not know the GPU (a MIG slice), there are no sensors, and that is no error.

use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};

use crate::sensors::{Reading, Sensors};

/// The name that every driver installs; the one without a number comes with development packages.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// Of the GPU with this UUID, "GPU-" and the rest; CUDA and NVML number GPUs differently.
pub fn sensors(uuid: &str) -> Option<Sensors> {
    let nvml = Nvml::builder().lib_path(LIBRARY.as_ref()).init().ok()?;
    nvml.device_by_uuid(uuid).ok()?;
    let uuid = uuid.to_string();
    Some(Box::new(move || reading(&nvml, &uuid)))
}

fn reading(nvml: &Nvml, uuid: &str) -> Reading {
    let Ok(device) = nvml.device_by_uuid(uuid) else { return Reading::default() };
    let clock = |clock| device.clock_info(clock).ok().map(f64::from);
    let reasons = device.current_throttle_reasons().unwrap_or(ThrottleReasons::NONE);
    Reading {
        sm_clock_mhz: clock(Clock::SM),
        memory_clock_mhz: clock(Clock::Memory),
        temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok().map(f64::from),
        power_watts: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1e3),
        throttled_by: reasons.iter_names().map(|(name, _)| name.to_string()).collect(),
    }
}

/// "GPU-b08cb32d-8a0b-4e0e-9f8f-3a1d1f0e2c11", from the bytes that CUDA gives.
pub fn uuid_text(bytes: [u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let parts = [&bytes[..4], &bytes[4..6], &bytes[6..8], &bytes[8..10], &bytes[10..]];
    format!("GPU-{}", parts.map(hex).join("-"))
}
