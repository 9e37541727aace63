//! Buffers of the CPU backend, and the two places where slices of them are made.
//!
//! [`Memory::borrow`] hands out any number of views at once after it has checked that no written
//! one overlaps another. [`Columns`] lets parallel tasks write disjoint columns of one matrix.

use std::marker::PhantomData;

use bytemuck::Pod;

use crate::error::{Error, Result};
use crate::tensor::{BufferId, Kind, View};

/// 64 bytes: a cache line, and the widest vector.
#[repr(C, align(64))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Line([u8; 64]);

#[derive(Default)]
pub(super) struct Memory {
    buffers: Vec<Vec<Line>>,
}

impl Memory {
    /// Zeroed lazily by the operating system: untouched pages cost nothing.
    pub fn allocate(&mut self, label: &'static str, bytes: usize) -> Result<BufferId> {
        let buffer = bytemuck::allocation::try_zeroed_slice_box::<Line>(bytes.div_ceil(64))
            .map_err(|()| Error::Device {
                device: "cpu".to_string(),
                what: format!("{bytes} bytes for {label} could not be allocated"),
                remedy:
                    "lower train.micro_batch or raise train.recompute (norms, attention, block)"
                        .to_string(),
            })?;
        self.buffers.push(buffer.into_vec());
        Ok(BufferId(self.buffers.len() as u32 - 1))
    }

    fn region(&mut self, view: View, element_bytes: usize) -> (*mut u8, usize) {
        let buffer = &mut self.buffers[view.buffer.0 as usize];
        let (offset, buffer_bytes) = (view.offset, buffer.len() * 64);
        let bytes = view
            .shape
            .elements()
            .checked_mul(element_bytes)
            .filter(|bytes| offset.checked_add(*bytes).is_some_and(|end| end <= buffer_bytes));
        let Some(bytes) = bytes else {
            let shape = view.shape;
            panic!(
                "view {shape} of {element_bytes}-byte elements at byte {offset} leaves its buffer \
                 of {buffer_bytes} bytes"
            );
        };
        // SAFETY: `offset + bytes` is within the buffer, as has just been checked.
        (unsafe { buffer.as_mut_ptr().cast::<u8>().add(offset) }, bytes)
    }

    /// Slices of `write` and `read`; panics where a written view overlaps another.
    pub fn borrow<T: Pod, const W: usize, const R: usize>(
        &mut self,
        write: [View; W],
        read: [View; R],
    ) -> ([&mut [T]; W], [&[T]; R]) {
        let (write, read, _) = self.borrow_with_index(write, read, []);
        (write, read)
    }

    /// As [`Memory::borrow`], with token ids or positions besides.
    pub fn borrow_with_index<T: Pod, const W: usize, const R: usize, const I: usize>(
        &mut self,
        write: [View; W],
        read: [View; R],
        index: [View; I],
    ) -> Borrowed<'_, T, W, R, I> {
        let write = write.map(|view| self.region(view, element_bytes::<T>(view.kind)));
        let read = read.map(|view| self.region(view, element_bytes::<T>(view.kind)));
        let index = index.map(|view| self.region(view, element_bytes::<i32>(view.kind)));
        for (i, &(start, bytes)) in write.iter().enumerate() {
            let others = write.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, r)| r);
            for &(other, other_bytes) in others.chain(&read).chain(&index) {
                let apart = start as usize + bytes <= other as usize
                    || other as usize + other_bytes <= start as usize;
                assert!(apart, "a written view overlaps another view of the same op");
            }
        }
        // SAFETY: the regions lie in buffers that `self` owns and that stay borrowed as long as the
        // slices; written ones are disjoint from all others (checked above); every bit pattern
        // is a valid T (Pod); from_raw_parts demands the alignment, which cast asserts.
        unsafe {
            (
                write.map(|(start, bytes)| cast_mut::<T>(start, bytes)),
                read.map(|(start, bytes)| cast::<T>(start, bytes)),
                index.map(|(start, bytes)| cast::<i32>(start, bytes)),
            )
        }
    }
}

/// Written, read, and index slices.
type Borrowed<'a, T, const W: usize, const R: usize, const I: usize> =
    ([&'a mut [T]; W], [&'a [T]; R], [&'a [i32]; I]);

fn element_bytes<T>(kind: Kind) -> usize {
    let bytes = size_of::<T>();
    assert!(kind != Kind::Index || bytes == 4, "token ids are not numbers to compute with");
    bytes
}

/// # Safety
/// The region is valid and not written for `'a`.
unsafe fn cast<'a, T: Pod>(start: *const u8, bytes: usize) -> &'a [T] {
    assert!(start.cast::<T>().is_aligned(), "a view is not aligned to its element type");
    // SAFETY: aligned, as asserted; the rest is the caller's promise.
    unsafe { std::slice::from_raw_parts(start.cast::<T>(), bytes / size_of::<T>()) }
}

/// # Safety
/// The region is valid and not aliased for `'a`.
unsafe fn cast_mut<'a, T: Pod>(start: *mut u8, bytes: usize) -> &'a mut [T] {
    assert!(start.cast::<T>().is_aligned(), "a view is not aligned to its element type");
    // SAFETY: aligned, as asserted; the rest is the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(start.cast::<T>(), bytes / size_of::<T>()) }
}

/// A row-major matrix of which parallel tasks write disjoint columns.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a, T> {
    start: *mut T,
    rows: usize,
    stride: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `row`, whose caller keeps tasks apart.
unsafe impl<T: Send> Send for Columns<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Columns<'_, T> {}

impl<'a, T> Columns<'a, T> {
    /// `stride`: elements from one row to the next.
    pub fn new(matrix: &'a mut [T], stride: usize) -> Self {
        let rows = matrix.len().checked_div(stride).unwrap_or(0);
        Columns { start: matrix.as_mut_ptr(), rows, stride, owner: PhantomData }
    }

    /// Elements `column..column + width` of `row`.
    ///
    /// # Safety
    /// No two slices that are alive at the same time overlap.
    #[inline(always)]
    pub unsafe fn row(&self, row: usize, column: usize, width: usize) -> &'a mut [T] {
        assert!(row < self.rows && width <= self.stride && column <= self.stride - width);
        // SAFETY: by the assertion, `row * stride + column + width <= rows * stride`, which is at
        // most the matrix's length, so nothing wraps; not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride + column), width) }
    }
}
