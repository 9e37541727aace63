//! TMA: loads, multicasts, stores and additions of boxes, ranks 1 to 5, inside and across every
//! edge of the tensor, with and without swizzles.
//!
//! The formula: element b of the box is element start + b of the tensor. Loads fill what lies
//! outside with zeros, stores leave it out. In shared memory the box is dense, innermost
//! dimension first, and the swizzle permutes 16-byte chunks.

use super::{Case, Inputs, MARGIN, Map, Needs, UNTOUCHED, bits};
use crate::cuda::{Swizzle, TensorType};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![];
    for tensor in ranks() {
        cases.extend([tensor.load(), tensor.store(), tensor.reduce_add()]);
        cases.push(tensor.multicast("", 0b11));
    }
    cases.push(ranks()[1].multicast(" to the other block", 0b10));
    for tensor in swizzles() {
        cases.extend([tensor.load(), tensor.store()]);
    }
    cases
}

/// Words of a kernel's header, before the tensor (loads) or the tile (stores).
const HEADER: usize = 64;

/// A tensor, its box and the coordinates of the boxes to move, innermost first.
#[derive(Clone)]
struct Tensor {
    /// After the rank in the case's name.
    suffix: &'static str,
    data_type: TensorType,
    dimensions: Vec<usize>,
    box_dimensions: Vec<usize>,
    swizzle: Swizzle,
    shots: Vec<Vec<i32>>,
}

/// f32 without a swizzle: one box inside, others over the low edges, over the high edges, and
/// outside. No two neighbours among the second box's coordinates are equal.
fn ranks() -> Vec<Tensor> {
    let tensor = |dimensions: &[usize], box_dimensions: &[usize], shots: &[&[i32]]| Tensor {
        suffix: "",
        data_type: TensorType::F32,
        dimensions: dimensions.to_vec(),
        box_dimensions: box_dimensions.to_vec(),
        swizzle: Swizzle::None,
        shots: shots.iter().map(|at| at.to_vec()).collect(),
    };
    vec![
        tensor(&[37], &[16], &[&[3], &[-5], &[30], &[37], &[-16]]),
        tensor(&[21, 9], &[8, 4], &[&[4, 2], &[-3, -1], &[18, 7], &[30, 2], &[5, 9], &[5, -4]]),
        tensor(&[10, 5, 4], &[4, 3, 2], &[&[3, 1, 1], &[-1, -2, -1], &[8, 4, 3], &[0, 0, 7]]),
        tensor(
            &[6, 3, 3, 3],
            &[4, 2, 2, 2],
            &[&[1, 0, 1, 0], &[-2, -1, 1, 0], &[-2, -1, -1, -1], &[4, 2, 2, 2], &[0, 0, -2, 0]],
        ),
        tensor(
            &[5, 3, 2, 3, 2],
            &[4, 2, 2, 2, 2],
            &[
                &[0, 1, 0, 1, 0],
                &[3, 2, 0, 1, -1],
                &[-1, -1, -1, -1, -1],
                &[3, 2, 1, 2, 1],
                &[1, 1, 1, 1, -2],
            ],
        ),
    ]
}

/// bf16, a row of the box as wide as the swizzle's span; rows of the outer dimensions count on.
fn swizzles() -> Vec<Tensor> {
    let tensor =
        |suffix, swizzle, dimensions: &[usize], box_dimensions: &[usize], shots: &[&[i32]]| {
            Tensor {
                suffix,
                data_type: TensorType::Bf16,
                dimensions: dimensions.to_vec(),
                box_dimensions: box_dimensions.to_vec(),
                swizzle,
                shots: shots.iter().map(|at| at.to_vec()).collect(),
            }
        };
    vec![
        tensor(" swizzle 32", Swizzle::Bytes32, &[40, 20], &[16, 16], &[&[8, 2], &[-7, 15]]),
        tensor(" swizzle 64", Swizzle::Bytes64, &[72, 20], &[32, 16], &[&[8, 2], &[45, -3]]),
        tensor(" swizzle 128", Swizzle::Bytes128, &[136, 20], &[64, 16], &[&[8, 2], &[-9, 11]]),
        tensor(" swizzle 128", Swizzle::Bytes128, &[72, 6, 4], &[64, 3, 4], &[&[3, 2, -1]]),
    ]
}

impl Tensor {
    fn rank(&self) -> usize {
        self.dimensions.len()
    }

    fn element_bytes(&self) -> usize {
        self.data_type.bytes() as usize
    }

    /// Bytes from one element to the next of each dimension: rows and planes are padded, by a
    /// different amount each, so that a wrong stride reads padding.
    fn strides(&self) -> Vec<usize> {
        let mut strides = vec![self.element_bytes()];
        for (outer, &count) in self.dimensions[..self.rank() - 1].iter().enumerate() {
            let dense = strides[outer] * count;
            strides.push(dense.next_multiple_of(16) + 16 * (outer + 1));
        }
        strides
    }

    /// Words from the first element to the end of the last, padding after it included.
    fn words(&self) -> usize {
        let outermost = self.rank() - 1;
        (self.strides()[outermost] * self.dimensions[outermost]).div_ceil(4)
    }

    fn box_elements(&self) -> usize {
        self.box_dimensions.iter().product()
    }

    fn box_words(&self) -> usize {
        self.box_elements() * self.element_bytes() / 4
    }

    /// For element `index` of the box at `start`: its byte in the dense, swizzled tile, and its
    /// byte in the tensor unless it lies outside.
    fn element(&self, start: &[i32], index: usize) -> (usize, Option<usize>) {
        let mut rest = index;
        let mut inside = true;
        let mut in_tensor = 0;
        let strides = self.strides();
        for dimension in 0..self.rank() {
            let at = i64::from(start[dimension]) + (rest % self.box_dimensions[dimension]) as i64;
            rest /= self.box_dimensions[dimension];
            inside &= (0..self.dimensions[dimension] as i64).contains(&at);
            in_tensor += at * strides[dimension] as i64;
        }
        let dense = index * self.element_bytes();
        let in_tile = match self.swizzle.span_bytes() {
            Some(span) => dense ^ ((dense >> 3) & (span as usize - 16)),
            None => dense,
        };
        (in_tile, inside.then_some(in_tensor as usize))
    }

    /// The box as a load leaves it in shared memory.
    fn tile(&self, tensor: &[u32], start: &[i32]) -> Vec<u32> {
        let mut tile = vec![0u32; self.box_words()];
        let bytes: &[u8] = bytemuck::cast_slice(tensor);
        let into: &mut [u8] = bytemuck::cast_slice_mut(&mut tile);
        for index in 0..self.box_elements() {
            if let (to, Some(from)) = self.element(start, index) {
                let length = self.element_bytes();
                into[to..to + length].copy_from_slice(&bytes[from..from + length]);
            }
        }
        tile
    }

    /// What kernels take before the tensor or the tile.
    fn header(&self, shots: &[Vec<i32>], ranks: u32) -> Vec<u32> {
        let mut header = vec![0u32; HEADER];
        header[..3].copy_from_slice(&[shots.len() as u32, self.box_words() as u32, ranks]);
        for (shot, at) in shots.iter().enumerate() {
            for (dimension, &coordinate) in at.iter().enumerate() {
                header[4 + 5 * shot + dimension] = coordinate as u32;
            }
        }
        header
    }

    fn map(&self, in_out: bool) -> Option<Map> {
        Some(Map {
            in_out,
            offset_bytes: if in_out { 0 } else { 4 * HEADER as u64 },
            data_type: self.data_type,
            dimensions: self.dimensions.iter().map(|&count| count as u64).collect(),
            stride_bytes: self.strides()[1..].iter().map(|&stride| stride as u64).collect(),
            box_dimensions: self.box_dimensions.iter().map(|&count| count as u32).collect(),
            swizzle: self.swizzle,
        })
    }

    fn case(&self, wrapper: &str, inp: Vec<u32>, expected: Vec<u32>, in_out: bool) -> Case {
        let kernel = format!("{wrapper}_{}d", self.rank());
        let name = format!("{kernel}{}", self.suffix);
        Case {
            kernel: format!("conform_{kernel}"),
            dynamic_shared_bytes: 4 * (self.box_words() + MARGIN) as u32,
            map: self.map(in_out),
            ..Case::new(&name, Needs::Sm90a, 128, inp, expected)
        }
    }

    fn load(&self) -> Case {
        let tensor = Inputs::of(&format!("tma load {:?}", self.dimensions)).words(self.words());
        let boxes = self
            .shots
            .iter()
            .map(|start| [self.tile(&tensor, start), vec![UNTOUCHED; MARGIN]].concat());
        let expected = boxes.collect::<Vec<_>>().concat();
        let inp = [self.header(&self.shots, 0), tensor].concat();
        self.case("tma_load", inp, expected, false)
    }

    /// The second box, which crosses an edge at coordinates that differ, for the blocks of `ranks`.
    fn multicast(&self, suffix: &str, ranks: u32) -> Case {
        let tensor = Inputs::of(&format!("multicast {:?}", self.dimensions)).words(self.words());
        let shot = &self.shots[1];
        let of_block = |rank: u32| {
            let untouched = vec![UNTOUCHED; self.box_words()];
            let tile = if ranks >> rank & 1 == 1 { self.tile(&tensor, shot) } else { untouched };
            [tile, vec![UNTOUCHED; MARGIN]].concat()
        };
        let expected = [of_block(0), of_block(1)].concat();
        let inp = [self.header(std::slice::from_ref(shot), ranks), tensor].concat();
        let case = self.case("tma_load_multicast", inp, expected, false);
        Case { name: format!("{}{suffix}", case.name), blocks: 2, cluster: 2, ..case }
    }

    /// Every shot stores the same tile; what earlier shots stored is before the later ones.
    fn store(&self) -> Case {
        let tile = Inputs::of(&format!("tma store {:?}", self.dimensions)).words(self.box_words());
        let initial = vec![UNTOUCHED; self.words()];
        let inp = [self.header(&self.shots, 0), tile.clone()].concat();
        let mut expected = initial.clone();
        let from: &[u8] = bytemuck::cast_slice(&tile);
        let into: &mut [u8] = bytemuck::cast_slice_mut(&mut expected);
        for start in &self.shots {
            for index in 0..self.box_elements() {
                if let (tile_byte, Some(byte)) = self.element(start, index) {
                    let length = self.element_bytes();
                    into[byte..byte + length].copy_from_slice(&from[tile_byte..tile_byte + length]);
                }
            }
        }
        self.case("tma_store", inp, expected, true)
    }

    /// f32: one rounding for each shot, in their order.
    fn reduce_add(&self) -> Case {
        let name = format!("tma reduce {:?}", self.dimensions);
        let tile = Inputs::of(&name).normals(self.box_words());
        let initial = Inputs::of(&format!("{name} before")).normals(self.words());
        let mut expected = initial.clone();
        for start in &self.shots {
            for index in 0..self.box_elements() {
                if let (tile_byte, Some(byte)) = self.element(start, index) {
                    expected[byte / 4] += tile[tile_byte / 4];
                }
            }
        }
        let inp = [self.header(&self.shots, 0), bits(&tile)].concat();
        let case = self.case("tma_reduce_add", inp, bits(&expected), true);
        Case { initial: bits(&initial), ..case }
    }
}
