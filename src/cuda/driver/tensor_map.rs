//! Tensor maps: what TMA is told of a tensor, and the rules of CUDA for it.

use super::DevicePointer;
use crate::error::{Error, Result};

/// A CUtensorMap of a driver, what a kernel takes as `const __grid_constant__ TensorMap`, and
/// the tensor that it was made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TensorMap {
    /// As the driver's own TMA reads it.
    pub opaque: [u64; 16],
    /// What [`Ledger::tensor`] gave for it.
    pub tensor: MappedTensor,
}

/// Bytes of one buffer, which may be released meanwhile: see [`Ledger::has`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MappedTensor {
    pub(super) address: DevicePointer,
    pub(super) bytes: u64,
    /// Of the buffer: no other one of the driver ever has the same.
    pub(super) serial: u64,
}

/// The numbers are those of CUtensorMapDataType.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum TensorType {
    U8 = 0,
    U16 = 1,
    U32 = 2,
    I32 = 3,
    U64 = 4,
    I64 = 5,
    F16 = 6,
    F32 = 7,
    F64 = 8,
    Bf16 = 9,
}

impl TensorType {
    pub fn bytes(self) -> u64 {
        match self {
            TensorType::U8 => 1,
            TensorType::U16 | TensorType::F16 | TensorType::Bf16 => 2,
            TensorType::U32 | TensorType::I32 | TensorType::F32 => 4,
            TensorType::U64 | TensorType::I64 | TensorType::F64 => 8,
        }
    }

    fn is_float(self) -> bool {
        matches!(self, TensorType::F16 | TensorType::F32 | TensorType::F64 | TensorType::Bf16)
    }
}

/// How 16-byte chunks are permuted in shared memory; the numbers are those of CUtensorMapSwizzle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Swizzle {
    None = 0,
    Bytes32 = 1,
    Bytes64 = 2,
    Bytes128 = 3,
}

impl Swizzle {
    /// The widest row of a box; `None`: any.
    pub fn span_bytes(self) -> Option<u64> {
        match self {
            Swizzle::None => None,
            Swizzle::Bytes32 => Some(32),
            Swizzle::Bytes64 => Some(64),
            Swizzle::Bytes128 => Some(128),
        }
    }
}

/// What a load brings into L2 at least; the numbers are those of CUtensorMapL2promotion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum L2Promotion {
    None = 0,
    Bytes64 = 1,
    Bytes128 = 2,
    Bytes256 = 3,
}

/// What is read outside the tensor; the numbers are those of CUtensorMapFloatOOBfill.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Fill {
    Zeros = 0,
    Nans = 1,
}

/// A tensor in the device's memory and the box that one TMA instruction moves: the arguments of
/// cuTensorMapEncodeTiled, not interleaved, without element strides.
///
/// Dimensions are innermost first, in elements; the innermost is contiguous.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TensorMapSpec<'a> {
    pub data_type: TensorType,
    pub address: DevicePointer,
    /// 1 to 5 of them.
    pub dimensions: &'a [u64],
    /// From one element to the next of dimension 1, 2, ...: one fewer than dimensions.
    pub stride_bytes: &'a [u64],
    pub box_dimensions: &'a [u32],
    pub swizzle: Swizzle,
    pub l2_promotion: L2Promotion,
    pub fill: Fill,
}

impl<'a> TensorMapSpec<'a> {
    /// A row-major matrix and its boxes, [columns, rows] as everywhere here.
    pub fn matrix(
        data_type: TensorType,
        address: DevicePointer,
        dimensions: &'a [u64; 2],
        row_bytes: &'a [u64; 1],
        box_dimensions: &'a [u32; 2],
        swizzle: Swizzle,
    ) -> Self {
        TensorMapSpec {
            data_type,
            address,
            dimensions,
            stride_bytes: row_bytes,
            box_dimensions,
            swizzle,
            l2_promotion: L2Promotion::Bytes256,
            fill: Fill::Zeros,
        }
    }

    /// Bytes from the address to the end of the last element, if every rule holds.
    ///
    /// Source: the CUDA driver API's page of cuTensorMapEncodeTiled. Errors: the first rule that
    /// is broken.
    pub fn extent_bytes(&self) -> Result<u64> {
        let rank = self.dimensions.len();
        if !(1..=5).contains(&rank) {
            return broken(
                format!("a tensor map has 1 to 5 dimensions, this one has {rank}"),
                "merge dimensions that are contiguous in memory",
            );
        }
        if self.stride_bytes.len() != rank - 1 {
            return broken(
                format!("{rank} dimensions need {} strides, got {:?}", rank - 1, self.stride_bytes),
                "give one stride for each dimension but the innermost",
            );
        }
        if self.box_dimensions.len() != rank {
            return broken(
                format!("{rank} dimensions need a box of {rank}, got {:?}", self.box_dimensions),
                "give the box one extent for each dimension",
            );
        }
        let DevicePointer(address) = self.address;
        if address == 0 || !address.is_multiple_of(16) {
            return broken(
                format!("the address {address:#x} is not a multiple of 16 bytes"),
                "begin the tensor at a multiple of 16 bytes in its buffer",
            );
        }
        for (index, &dimension) in self.dimensions.iter().enumerate() {
            if dimension == 0 || dimension > 1 << 32 {
                return broken(
                    format!("dimension {index} is {dimension}; 1 to 2^32 are allowed"),
                    "launch nothing for an empty tensor; split a larger one",
                );
            }
        }
        for (index, &stride) in self.stride_bytes.iter().enumerate() {
            if stride == 0 || !stride.is_multiple_of(16) {
                return broken(
                    format!("stride {index} is {stride} bytes, not a multiple of 16"),
                    "pad the rows to a multiple of 16 bytes",
                );
            }
            if stride >= 1 << 40 {
                return broken(
                    format!("stride {index} is {stride} bytes; it must be below 2^40"),
                    "split the tensor",
                );
            }
        }
        self.check_box()?;
        if self.fill == Fill::Nans && !self.data_type.is_float() {
            return broken(
                format!("{:?} has no NaN to fill with", self.data_type),
                "fill with zeros",
            );
        }
        let inner = u128::from(self.dimensions[0]) * u128::from(self.data_type.bytes());
        let outer = self.dimensions[1..].iter().zip(self.stride_bytes);
        let steps = outer.map(|(&count, &stride)| u128::from(count - 1) * u128::from(stride));
        let extent = inner + steps.sum::<u128>();
        match u64::try_from(extent) {
            Ok(extent) => Ok(extent),
            Err(_) => broken(
                format!("the tensor spans {extent} bytes"),
                "no memory is so large: check dimensions and strides",
            ),
        }
    }

    fn check_box(&self) -> Result<()> {
        for (index, &extent) in self.box_dimensions.iter().enumerate() {
            if extent == 0 || extent > 256 {
                return broken(
                    format!("box dimension {index} is {extent}; 1 to 256 are allowed"),
                    "move a larger tile with several boxes",
                );
            }
        }
        let row = u64::from(self.box_dimensions[0]) * self.data_type.bytes();
        if !row.is_multiple_of(16) {
            return broken(
                format!("a row of the box is {row} bytes, not a multiple of 16"),
                "widen the box; what lies outside the tensor is filled",
            );
        }
        match self.swizzle.span_bytes() {
            Some(span) if row > span => broken(
                format!("a row of the box is {row} bytes, the swizzle's span {span}"),
                "move a wider tile with several boxes, or with one dimension more",
            ),
            _ => Ok(()),
        }
    }
}

fn broken<T>(what: String, remedy: &str) -> Result<T> {
    Err(Error::TensorMap { what, remedy: remedy.to_string() })
}
