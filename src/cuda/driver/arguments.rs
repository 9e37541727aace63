//! What a kernel is launched with.

use std::ffi::c_void;

use super::{Allocation, DevicePointer, MappedTensor, TensorMap};

/// The largest argument, a tensor map, and the strictest alignment that CUDA's headers ask of it.
const SLOT_BYTES: usize = 128;

#[derive(Clone, Copy)]
#[repr(align(128))]
struct Slot([u8; SLOT_BYTES]);

/// What a kernel may reach of the device's memory through an argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    Nothing,
    /// The buffer with this address in it; null is none.
    From(DevicePointer),
    Tensor(MappedTensor),
}

/// A value that a kernel takes as one parameter.
pub trait Argument {
    /// As people write it: "u32".
    const KIND: &'static str;
    /// The value's bytes, as the kernel reads them.
    fn bytes(&self) -> &[u8];
    fn reach(&self) -> Reach {
        Reach::Nothing
    }
}

macro_rules! scalar_arguments {
    ($($kind:ident)+) => {
        $(impl Argument for $kind {
            const KIND: &'static str = stringify!($kind);
            fn bytes(&self) -> &[u8] {
                bytemuck::bytes_of(self)
            }
        })+
    };
}
scalar_arguments!(i32 u32 f32 i64 u64);

impl Argument for DevicePointer {
    const KIND: &'static str = "pointer";
    fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(&self.0)
    }
    fn reach(&self) -> Reach {
        Reach::From(*self)
    }
}

impl Argument for Allocation {
    const KIND: &'static str = "pointer";
    fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(&self.address.0)
    }
    fn reach(&self) -> Reach {
        Reach::From(self.address)
    }
}

impl Argument for TensorMap {
    const KIND: &'static str = "tensor map";
    fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(&self.opaque)
    }
    fn reach(&self) -> Reach {
        Reach::Tensor(self.tensor)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Passed {
    pub(super) kind: &'static str,
    pub(super) bytes: u32,
    pub(super) reach: Reach,
}

/// The arguments of a launch, in order, by value:
/// `Arguments::new().with(out.address).with(inp.address).with(columns)`.
#[derive(Clone, Default)]
pub struct Arguments {
    slots: Vec<Slot>,
    pub(super) passed: Vec<Passed>,
}

impl Arguments {
    pub fn new() -> Self {
        Arguments::default()
    }

    pub fn with<A: Argument>(mut self, value: A) -> Self {
        let bytes = value.bytes();
        let mut slot = Slot([0; SLOT_BYTES]);
        slot.0[..bytes.len()].copy_from_slice(bytes);
        self.slots.push(slot);
        let (kind, reach) = (A::KIND, value.reach());
        self.passed.push(Passed { kind, bytes: bytes.len() as u32, reach });
        self
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// What a kernel may reach through each.
    pub fn reaches(&self) -> impl Iterator<Item = Reach> + '_ {
        self.passed.iter().map(|passed| passed.reach)
    }

    /// What both machines take: one pointer to each value, aligned to 128 bytes, to be read only
    /// and not after `self` is gone.
    pub fn pointers(&self) -> Vec<*mut c_void> {
        self.slots.iter().map(|slot| slot.0.as_ptr().cast_mut().cast()).collect()
    }
}
