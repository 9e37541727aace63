//! What the operating system says of this machine's memory (Linux: /proc/meminfo).

/// Bytes that can still be allocated; `u64::MAX` where the system does not say.
pub fn available_bytes() -> u64 {
    field("MemAvailable").unwrap_or(u64::MAX)
}

/// Bytes of memory that are there; 0 where the system does not say.
pub fn total_bytes() -> u64 {
    field("MemTotal").unwrap_or(0)
}

fn field(name: &str) -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let mut fields = meminfo.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = fields.find(|(field, _)| *field == name)?;
    let kibibytes: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1 << 10)
}
