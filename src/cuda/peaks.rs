//! What machines can do at most, as their vendor's datasheets have it.
//!
//! Only machines whose part is known from the name that the driver gives: an H100 of another form
//! factor has other clocks and other memory. Tensor-core figures are dense; the datasheets print
//! those with sparsity, twice as high.

use crate::config::Dtype;

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Peaks {
    /// As the driver names the machine.
    pub name: &'static str,
    /// As a command line names it.
    pub short_name: &'static str,
    pub multiprocessors: usize,
    /// Of device memory, read and written together.
    pub bytes_per_second: f64,
    /// Between the host's memory and the device's, in each direction at once.
    pub link_bytes_per_second: f64,
    bf16_flops_per_second: f64,
    f32_flops_per_second: f64,
    pub source: &'static str,
    /// Of device memory, all of it.
    pub memory_bytes: u64,
    pub memory_source: &'static str,
}

pub const H200: Peaks = Peaks {
    name: "NVIDIA H200",
    short_name: "h200",
    multiprocessors: 132,
    bytes_per_second: 4.8e12,
    link_bytes_per_second: 64e9,
    bf16_flops_per_second: 989.5e12,
    f32_flops_per_second: 67e12,
    source: "NVIDIA H200 datasheet, SXM: 4.8 TB/s; 1979 TFLOP/s bf16 with sparsity, half of it \
             dense; 67 TFLOP/s fp32; PCIe 5.0: 128 GB/s, half of it each way",
    memory_bytes: 139 << 30,
    memory_source: "139 GiB, as seen on a rented NVIDIA H200; its datasheet says 141 GB",
};

pub const H100: Peaks = Peaks {
    name: "NVIDIA H100 80GB HBM3",
    short_name: "h100",
    multiprocessors: 132,
    bytes_per_second: 3.35e12,
    link_bytes_per_second: 64e9,
    bf16_flops_per_second: 989.5e12,
    f32_flops_per_second: 67e12,
    source: "NVIDIA H100 datasheet, SXM: 3.35 TB/s; 1979 TFLOP/s bf16 with sparsity, half of it \
             dense; 67 TFLOP/s fp32; PCIe 5.0: 128 GB/s, half of it each way",
    memory_bytes: 80_000_000_000,
    memory_source: "80 GB, as its datasheet says, of 10^9 bytes",
};

/// Every machine that is known here.
pub const MACHINES: [&Peaks; 2] = [&H200, &H100];

impl Peaks {
    /// Of the machine that the driver names so, if it is known here.
    pub fn of(name: &str) -> Option<&'static Peaks> {
        MACHINES.into_iter().find(|peaks| peaks.name == name)
    }

    /// Of the machine that a command line names so.
    pub fn of_short_name(name: &str) -> Option<&'static Peaks> {
        MACHINES.into_iter().find(|peaks| peaks.short_name == name)
    }

    /// Of the special function units, which compute exponentials: 16 a clock on each multiprocessor,
    /// whose tensor cores do 4,096 FLOPs in bf16 in it.
    pub fn exponentials_per_second(&self) -> f64 {
        self.bf16_flops_per_second / 256.0
    }

    /// Of products of operands of this type: bf16 on tensor cores, fp32 without them.
    pub fn flops_per_second(&self, dtype: Dtype) -> f64 {
        match dtype {
            Dtype::Bf16 => self.bf16_flops_per_second,
            Dtype::F32 => self.f32_flops_per_second,
        }
    }
}
