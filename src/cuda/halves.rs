//! An f32 as bf16 and the lower half of its bits: 2 x 16 bits that are the f32 exactly.
//!
//! bf16 is the nearest, ties away from zero, so the upper half is one more than that of the f32
//! where the lower half is 0x8000 or more, and never otherwise. A NaN stays one, but not each of
//! its bits. Kernels do the same (kernels/isobath.cuh, kernels/adamw.cu).

use half::bf16;

/// bf16, and the lower half.
pub fn split(value: f32) -> (bf16, u16) {
    let bits = value.to_bits();
    let upper = match value.is_nan() {
        true => 0x7fff,
        false => ((bits + 0x8000) >> 16) as u16,
    };
    (bf16::from_bits(upper), bits as u16)
}

pub fn join(upper: bf16, lower: u16) -> f32 {
    let upper = u32::from(upper.to_bits()) << 16;
    f32::from_bits(upper.wrapping_add_signed(i32::from(lower as i16)))
}
