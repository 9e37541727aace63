//! What the operating system says of this machine's memory and of what this process has had of it
//! (Linux: /proc).

/// Bytes that can still be allocated; `u64::MAX` where the system does not say.
pub fn available_bytes() -> u64 {
    field("/proc/meminfo", "MemAvailable").unwrap_or(u64::MAX)
}

/// Bytes of memory that are there; 0 where the system does not say.
pub fn total_bytes() -> u64 {
    field("/proc/meminfo", "MemTotal").unwrap_or(0)
}

/// The most bytes that this process has had at one time; `None` where the system does not say.
pub fn peak_of_process() -> Option<u64> {
    field("/proc/self/status", "VmHWM")
}

fn field(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = fields.find(|(field, _)| *field == name)?;
    let kibibytes: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1 << 10)
}
