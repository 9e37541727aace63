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
    pub multiprocessors: usize,
    /// Of device memory, read and written together.
    pub bytes_per_second: f64,
    bf16_flops_per_second: f64,
    f32_flops_per_second: f64,
    pub source: &'static str,
}

pub const H200: Peaks = Peaks {
    name: "NVIDIA H200",
    multiprocessors: 132,
    bytes_per_second: 4.8e12,
    bf16_flops_per_second: 989.5e12,
    f32_flops_per_second: 67e12,
    source: "NVIDIA H200 datasheet, SXM: 4.8 TB/s; 1979 TFLOP/s bf16 with sparsity, half of it \
             dense; 67 TFLOP/s fp32",
};

pub const H100: Peaks = Peaks {
    name: "NVIDIA H100 80GB HBM3",
    multiprocessors: 132,
    bytes_per_second: 3.35e12,
    bf16_flops_per_second: 989.5e12,
    f32_flops_per_second: 67e12,
    source: "NVIDIA H100 datasheet, SXM: 3.35 TB/s; 1979 TFLOP/s bf16 with sparsity, half of it \
             dense; 67 TFLOP/s fp32",
};

impl Peaks {
    /// Of the machine that the driver names so, if it is known here.
    pub fn of(name: &str) -> Option<&'static Peaks> {
        [&H200, &H100].into_iter().find(|peaks| peaks.name == name)
    }

    /// Of products of operands of this type: bf16 on tensor cores, fp32 without them.
    pub fn flops_per_second(&self, dtype: Dtype) -> f64 {
        match dtype {
            Dtype::Bf16 => self.bf16_flops_per_second,
            Dtype::F32 => self.f32_flops_per_second,
        }
    }
}
