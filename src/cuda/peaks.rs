//! What machines can do at most, as their vendor's documents have it.
//!
//! Only machines whose part is known from the name that the driver gives: an H100 of another form
//! factor has other clocks and other memory. Tensor-core figures are dense, with sums in fp32; what
//! a document prints with sparsity is twice as high.

use crate::config::Dtype;

/// Of matrix products on one GPU: what MFU is a share of.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MatmulPeaks {
    /// As the driver names the machine.
    pub name: &'static str,
    bf16_flops_per_second: f64,
    f32_flops_per_second: f64,
    pub source: &'static str,
}

const fn matmul(name: &'static str, bf16: f64, f32: f64, source: &'static str) -> MatmulPeaks {
    let (bf16_flops_per_second, f32_flops_per_second) = (bf16 * 1e12, f32 * 1e12);
    MatmulPeaks { name, bf16_flops_per_second, f32_flops_per_second, source }
}

const A100: &str = "NVIDIA A100 datasheet: 312 TFLOP/s bf16 (624 with sparsity); 19.5 fp32";
const SXM: &str = "NVIDIA H100 datasheet, SXM: 1979 TFLOP/s bf16 with sparsity, half of it dense; 67 \
                   TFLOP/s fp32";
const NVL: &str = "NVIDIA H100 and H200 datasheets, NVL: 1671 TFLOP/s bf16 with sparsity, half of it \
                   dense; 60 TFLOP/s fp32";

/// Every GPU whose peaks are known here.
pub const MATMUL_PEAKS: [MatmulPeaks; 22] = [
    H200.matmul,
    H100.matmul,
    // Of this one it is said that it computes as the H100 does.
    matmul("NVIDIA H800", 989.5, 67.0, SXM),
    matmul("NVIDIA GH200 480GB", 989.5, 67.0, SXM),
    matmul("NVIDIA H200 NVL", 835.5, 60.0, NVL),
    matmul("NVIDIA H100 NVL", 835.5, 60.0, NVL),
    matmul(
        "NVIDIA H100 PCIe",
        756.5,
        51.0,
        "NVIDIA H100 datasheet, PCIe: 1513 TFLOP/s bf16 with sparsity, half of it dense; 51 fp32",
    ),
    matmul("NVIDIA A100-SXM4-40GB", 312.0, 19.5, A100),
    matmul("NVIDIA A100-SXM4-80GB", 312.0, 19.5, A100),
    matmul("NVIDIA A100-PCIE-40GB", 312.0, 19.5, A100),
    matmul("NVIDIA A100 80GB PCIe", 312.0, 19.5, A100),
    matmul(
        "NVIDIA A40",
        149.7,
        37.4,
        "NVIDIA A40 datasheet: 149.7 TFLOP/s bf16 (299.4 with sparsity); 37.4 fp32",
    ),
    matmul(
        "NVIDIA A10",
        125.0,
        31.2,
        "NVIDIA A10 datasheet: 125 TFLOP/s bf16 (250 with sparsity); 31.2 fp32",
    ),
    matmul(
        "NVIDIA L40S",
        362.05,
        91.6,
        "NVIDIA L40S datasheet: 362.05 TFLOP/s bf16 (733 with sparsity); 91.6 fp32",
    ),
    matmul(
        "NVIDIA L4",
        121.0,
        30.3,
        "NVIDIA L4 datasheet: 242 TFLOP/s bf16 with sparsity, half of it dense; 30.3 fp32",
    ),
    matmul(
        "NVIDIA RTX A6000",
        154.8,
        38.7,
        "NVIDIA GA102 whitepaper: 154.8 TFLOP/s bf16 (309.6 with sparsity); 38.7 fp32",
    ),
    matmul(
        "NVIDIA RTX 6000 Ada Generation",
        364.0,
        91.1,
        "NVIDIA Ada whitepaper: 364 TFLOP/s bf16 (728 with sparsity); 91.1 fp32",
    ),
    matmul(
        "NVIDIA GeForce RTX 3090",
        71.0,
        35.6,
        "NVIDIA GA102 whitepaper: 71 TFLOP/s bf16 with sums in fp32 (142 with sparsity); 35.6 fp32",
    ),
    matmul(
        "NVIDIA GeForce RTX 4090",
        165.2,
        82.6,
        "NVIDIA Ada whitepaper: 165.2 TFLOP/s bf16 with sums in fp32 (330.4 with sparsity); 82.6 \
         fp32",
    ),
    matmul(
        "NVIDIA GeForce RTX 5090",
        209.5,
        104.8,
        "NVIDIA RTX Blackwell whitepaper: 209.5 TFLOP/s bf16 with sums in fp32 (419 with \
         sparsity); 104.8 fp32",
    ),
    matmul(
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
        503.8,
        125.0,
        "NVIDIA RTX PRO Blackwell whitepaper: 503.8 TFLOP/s bf16, dense; 125 fp32",
    ),
    matmul(
        "NVIDIA B200",
        2250.0,
        75.0,
        "NVIDIA Blackwell datasheet: 4.5 PFLOP/s bf16 with sparsity, half of it dense; 75 fp32",
    ),
];

impl MatmulPeaks {
    /// Of the machine that the driver names so, if it is known here.
    pub fn of(name: &str) -> Option<&'static MatmulPeaks> {
        MATMUL_PEAKS.iter().find(|peaks| peaks.name == name)
    }

    /// Of products of operands of this type: bf16 on tensor cores, fp32 without them.
    pub fn flops_per_second(&self, dtype: Dtype) -> f64 {
        match dtype {
            Dtype::Bf16 => self.bf16_flops_per_second,
            Dtype::F32 => self.f32_flops_per_second,
        }
    }
}

/// Of a machine that training can be planned for without one.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Peaks {
    /// As the driver names the machine.
    pub name: &'static str,
    /// As a command line names it.
    pub short_name: &'static str,
    pub matmul: MatmulPeaks,
    pub multiprocessors: usize,
    /// Of device memory, read and written together.
    pub bytes_per_second: f64,
    /// Between the host's memory and the device's, in each direction at once.
    pub link_bytes_per_second: f64,
    pub source: &'static str,
    /// Of device memory, all of it.
    pub memory_bytes: u64,
    pub memory_source: &'static str,
}

pub const H200: Peaks = Peaks {
    name: "NVIDIA H200",
    short_name: "h200",
    matmul: matmul("NVIDIA H200", 989.5, 67.0, H200_SOURCE),
    multiprocessors: 132,
    bytes_per_second: 4.8e12,
    link_bytes_per_second: 64e9,
    source: H200_SOURCE,
    memory_bytes: 139 << 30,
    memory_source: "139 GiB, as seen on a rented NVIDIA H200; its datasheet says 141 GB",
};
const H200_SOURCE: &str = "NVIDIA H200 datasheet, SXM: 4.8 TB/s; 1979 TFLOP/s bf16 with sparsity, \
                           half of it dense; 67 TFLOP/s fp32; PCIe 5.0: 128 GB/s, half of it each way";

pub const H100: Peaks = Peaks {
    name: "NVIDIA H100 80GB HBM3",
    short_name: "h100",
    matmul: matmul("NVIDIA H100 80GB HBM3", 989.5, 67.0, H100_SOURCE),
    multiprocessors: 132,
    bytes_per_second: 3.35e12,
    link_bytes_per_second: 64e9,
    source: H100_SOURCE,
    memory_bytes: 80_000_000_000,
    memory_source: "80 GB, as its datasheet says, of 10^9 bytes",
};
const H100_SOURCE: &str = "NVIDIA H100 datasheet, SXM: 3.35 TB/s; 1979 TFLOP/s bf16 with sparsity, \
                           half of it dense; 67 TFLOP/s fp32; PCIe 5.0: 128 GB/s, half of it each way";

/// Every machine that can be planned for.
pub const MACHINES: [&Peaks; 2] = [&H200, &H100];

impl Peaks {
    /// Of the machine that the driver names so, if it can be planned for.
    pub fn of(name: &str) -> Option<&'static Peaks> {
        MACHINES.into_iter().find(|peaks| peaks.name == name)
    }

    /// Of the machine that a command line names so.
    pub fn of_short_name(name: &str) -> Option<&'static Peaks> {
        MACHINES.into_iter().find(|peaks| peaks.short_name == name)
    }

    /// Of the special function units, which compute exponentials: 16 a clock on each
    /// multiprocessor, whose tensor cores do 4,096 FLOPs in bf16 in it.
    pub fn exponentials_per_second(&self) -> f64 {
        self.flops_per_second(Dtype::Bf16) / 256.0
    }

    /// As [`MatmulPeaks::flops_per_second`].
    pub fn flops_per_second(&self, dtype: Dtype) -> f64 {
        self.matmul.flops_per_second(dtype)
    }
}
