//! Steps that run as one: what makes a tensor, and what would read all of it once more.
//!
//! Which there are is said once, by [`Fused`]; what finds them (fuse.rs), what runs them and what
//! estimates their time are matches over it.

use crate::backend::{
    Access, AttentionBackward, Backend, LinearBackward, LinearForward, Rotary, SwiGluBackward,
    SwiGluForward,
};
use crate::error::{Error, Result};
use crate::tensor::View;

/// Two steps, one directly after the other. Where a backend has no kernel that does both, they run
/// one by one.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Fused<H> {
    /// A product, and the rotation of what it gives.
    LinearRotary(LinearForward<H>, Rotary<H>),
    /// A product, and SwiGLU of what it gives.
    LinearSwiGlu(LinearForward<H>, SwiGluForward<H>),
    /// Gradients of a product, and of SwiGLU from the d_inp of the first, which nobody else reads.
    LinearSwiGluBackward(LinearBackward<H>, SwiGluBackward<H>),
    /// The gradient of attention, and the rotation back of its d_qkv.
    AttentionRotaryBackward(AttentionBackward<H>, Rotary<H>),
}

impl<H: Copy> Fused<H> {
    pub fn name(&self) -> &'static str {
        match self {
            Fused::LinearRotary(..) => "linear, rotary",
            Fused::LinearSwiGlu(..) => "linear, swiglu",
            Fused::LinearSwiGluBackward(..) => "gradients of linear, swiglu",
            Fused::AttentionRotaryBackward(..) => "gradients of attention, rotary",
        }
    }

    /// Whether it consists of gradients.
    pub fn is_backward(&self) -> bool {
        match self {
            Fused::LinearRotary(..) | Fused::LinearSwiGlu(..) => false,
            Fused::LinearSwiGluBackward(..) | Fused::AttentionRotaryBackward(..) => true,
        }
    }

    /// The same over other handles; `f` sees the operands of the first, then those of the second.
    pub fn map<K>(self, f: &mut impl FnMut(H, Access) -> K) -> Fused<K> {
        match self {
            Fused::LinearRotary(linear, rotary) => {
                Fused::LinearRotary(linear.map(f), rotary.map(f))
            }
            Fused::LinearSwiGlu(linear, swiglu) => {
                Fused::LinearSwiGlu(linear.map(f), swiglu.map(f))
            }
            Fused::LinearSwiGluBackward(linear, swiglu) => {
                Fused::LinearSwiGluBackward(linear.map(f), swiglu.map(f))
            }
            Fused::AttentionRotaryBackward(attention, rotary) => {
                Fused::AttentionRotaryBackward(attention.map(f), rotary.map(f))
            }
        }
    }
}

impl Fused<View> {
    /// Whether the backend did both.
    pub(super) fn run_as_one(&self, backend: &mut impl Backend) -> Result<bool> {
        match *self {
            Fused::LinearRotary(linear, rotary) => backend.linear_rotary_forward(linear, rotary),
            Fused::LinearSwiGlu(linear, swiglu) => backend.linear_swiglu_forward(linear, swiglu),
            Fused::LinearSwiGluBackward(linear, swiglu) => {
                backend.linear_swiglu_backward(linear, swiglu)
            }
            Fused::AttentionRotaryBackward(attention, rotary) => {
                backend.attention_rotary_backward(attention, rotary)
            }
        }
    }

    /// Errors: what the first leaves to the second has no memory.
    pub(super) fn check_that_parts_can_run(&self, device: &'static str) -> Result<()> {
        match self {
            Fused::LinearSwiGluBackward(linear, _) if linear.d_inp.to.shape.elements() == 0 => {
                let what = "it was planned to compute SwiGLU's gradient with the product before it, \
                            and cannot";
                Err(Error::Device {
                    device: device.to_string(),
                    what: what.to_string(),
                    remedy: "plan for the device that trains".to_string(),
                })
            }
            _ => Ok(()),
        }
    }
}
