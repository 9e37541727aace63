//! Shapes, element kinds and views: how the tape and the backends name a piece of memory.
//!
//! Nothing here owns memory. A [`View`] is a region of a buffer that a backend allocated; it is
//! resolved once, when the memory plan is made, and is then plain data.

use std::fmt;
use std::ops::Range;

/// A target that is not to be predicted: padding, or the position after a document's end.
pub const IGNORE_INDEX: i32 = -100;

/// Sizes of a row-major tensor, at most four dimensions.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    sizes: [usize; 4],
    rank: u8,
}

impl Shape {
    pub fn new(sizes: &[usize]) -> Self {
        assert!(sizes.len() <= 4, "a shape has at most four dimensions, not {}", sizes.len());
        let mut shape = Shape { sizes: [1; 4], rank: sizes.len() as u8 };
        shape.sizes[..sizes.len()].copy_from_slice(sizes);
        shape
    }

    pub fn sizes(&self) -> &[usize] {
        &self.sizes[..self.rank as usize]
    }

    /// Number of elements. Panics if it does not fit: what is in bounds is decided with it.
    pub fn elements(&self) -> usize {
        product(self.sizes())
    }

    /// Size of the last dimension, 1 for a scalar.
    pub fn columns(&self) -> usize {
        self.sizes().last().copied().unwrap_or(1)
    }

    /// Product of all dimensions but the last. Panics if it does not fit.
    pub fn rows(&self) -> usize {
        self.sizes().split_last().map_or(1, |(_, rows)| product(rows))
    }
}

fn product(sizes: &[usize]) -> usize {
    let product = sizes.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
    product.unwrap_or_else(|| panic!("the product of the sizes {sizes:?} does not fit"))
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[")?;
        for (i, size) in self.sizes().iter().enumerate() {
            write!(f, "{}{size}", if i > 0 { ", " } else { "" })?;
        }
        write!(f, "]")
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the elements of a tensor are; the backend decides how many bytes each takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Kind {
    /// Matmul operands and activations: bf16 on a GPU, f32 (f64 in tests) on the CPU.
    Activation,
    /// Row statistics, losses, gains and master weights: never below f32.
    Statistic,
    /// bf16 whatever activations are: optimizer state that is stored narrow.
    Bf16,
    /// The lower 16 bits of an f32 whose bf16 is stored elsewhere.
    LowerHalf,
    /// Token ids, targets, positions: i32.
    Index,
}

/// A buffer that a backend allocated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct BufferId(pub u32);

/// A tensor in a buffer: `shape` elements of `kind`, row-major, from byte `offset` on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct View {
    pub buffer: BufferId,
    /// In bytes.
    pub offset: usize,
    pub kind: Kind,
    pub shape: Shape,
}

impl View {
    /// The elements of a flat buffer's `range`.
    pub fn part(self, range: &Range<usize>, element_bytes: usize) -> Self {
        View {
            offset: self.offset + range.start * element_bytes,
            shape: Shape::new(&[range.len()]),
            ..self
        }
    }
}
