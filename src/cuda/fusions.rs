//! Ops that another op's kernel does on its way, and a training step without some of them: what
//! each is worth can be timed, and what it costs in exactness be seen.

use crate::config::choice::choice;

choice! {
    /// An op that needs no kernel of its own.
    pub enum Fusion {
        /// A residual is added where a product is stored.
        Residual = "residual",
        /// q and k are rotated where their product is stored.
        Rotary = "rotary",
        /// SwiGLU is computed where the product of gate and up is stored.
        SwiGlu = "swiglu",
        /// Its gradient, where the product that makes the gradient of its output would be.
        SwiGluBackward = "swiglu-backward",
        /// The gradients of q and k are rotated back where attention stores them.
        RotaryBackward = "rotary-backward",
    }
}

/// Those that are made use of, where the machine has kernels that do both.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Fusions {
    without: Vec<Fusion>,
}

impl Fusions {
    /// All but these.
    pub fn without(without: &[Fusion]) -> Self {
        Fusions { without: without.to_vec() }
    }

    pub fn has(&self, fusion: Fusion) -> bool {
        !self.without.contains(&fusion)
    }
}
