//! Matrices that go through tensor.rs into shared memory and through the descriptors of matrix.rs
//! out of it.

use super::matrix::{MatrixA, WgmmaShape, gather, multiply};
use super::tensor::Map;

/// Whole numbers from -7 to 7 as bf16.
fn value(row: usize, column: usize, salt: usize) -> u16 {
    let whole = ((row * 31 + column * 17 + row * column * 7 + salt) % 15) as f32 - 7.0;
    (whole.to_bits() >> 16) as u16
}

fn number(bits: u16) -> i64 {
    f32::from_bits(u32::from(bits) << 16) as i64
}

/// Loads the box at `coordinates` of a row-major matrix of `columns` columns, rows `pitch`
/// bytes apart in `global`; fills with 0.
fn load(
    global: &[u8],
    size: (usize, usize),
    boxes: (u32, u32),
    swizzle_bytes: u32,
    coordinates: (i32, i32),
    shared: &mut [u8],
    at: u32,
) {
    let (rows, columns) = size;
    let base = 0x7000_0000;
    let map = Map {
        element_bytes: 2,
        kind: 9,
        address: base,
        dimensions: vec![columns as u64, rows as u64],
        stride_bytes: vec![(global.len() / rows) as u64],
        box_dimensions: vec![boxes.0, boxes.1],
        swizzle_bytes,
        nan_fill: false,
    };
    let map = Map::decode(&map.encode()).unwrap();
    for chunk in map.chunks(&[coordinates.0, coordinates.1], at).unwrap() {
        for byte in 0..16 {
            let inside = chunk.inside.contains(&byte);
            shared[(chunk.shared + byte) as usize] =
                if inside { global[(chunk.global + u64::from(byte) - base) as usize] } else { 0 };
        }
    }
}

fn bytes(rows: usize, columns: usize, pitch: usize, at: impl Fn(usize, usize) -> u16) -> Vec<u8> {
    let mut bytes = vec![0xff; rows * pitch];
    for row in 0..rows {
        for column in 0..columns {
            let place = row * pitch + 2 * column;
            bytes[place..place + 2].copy_from_slice(&at(row, column).to_le_bytes());
        }
    }
    bytes
}

fn descriptor(start: usize, leading: usize, stride: usize, width: u32) -> u64 {
    let mode = match width {
        128 => 1u64,
        64 => 2,
        32 => 3,
        _ => 0,
    };
    (start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32) as u64 | mode << 62
}

/// Puts an operand of `extent` (M or N) by K = 64 into shared memory at `at` and returns the
/// descriptors of its four steps of 16. K-major: the matrix in global memory is [extent][k];
/// else [k][extent]. Each box is as wide as the swizzle, 16 bytes without one. `inside` is
/// the size of the tensor in both directions where it is smaller than the tile.
fn operand(
    extent: usize,
    mn_major: bool,
    width: u32,
    salt: usize,
    shared: &mut [u8],
    at: usize,
) -> [u64; 4] {
    let swizzle = if width == 16 { 0 } else { width };
    let (outer, inner) = if mn_major { (64, extent) } else { (extent, 64) };
    let pitch = (inner * 2).next_multiple_of(16) + 48;
    let global = bytes(outer, inner, pitch, |row, column| {
        if mn_major { value(column, row, salt) } else { value(row, column, salt) }
    });
    let wide = width as usize;
    let block = outer * wide;
    for start in (0..inner).step_by(wide / 2) {
        load(
            &global,
            (outer, inner),
            (width / 2, outer as u32),
            swizzle,
            (start as i32, 0),
            shared,
            (at + start / (wide / 2) * block) as u32,
        );
    }
    std::array::from_fn(|step| match (mn_major, width) {
        // K blocks of 16 bytes: LBO between them, SBO between groups of eight rows.
        (false, 16) => descriptor(at + step * 2 * block, block, 128, width),
        (false, _) => {
            let k = step * 32;
            descriptor(at + k / wide * block + k % wide, 16, 8 * wide, width)
        }
        // MN blocks of 16 bytes: SBO between them, LBO between groups of eight k.
        (true, 16) => descriptor(at + step * 256, 128, block, width),
        (true, _) => descriptor(at + step * 16 * wide, block, 8 * wide, width),
    })
}

#[test]
fn loaded_matrices_multiply() {
    for width_a in [16, 32, 64, 128] {
        for width_b in [16, 32, 64, 128] {
            for major in 0..4 {
                let (major_a, major_b) = (major % 2 == 1, major / 2 == 1);
                for n in [8, 40, 64, 256] {
                    let mut shared = vec![0x5a; 128 << 10];
                    let a = operand(64, major_a, width_a, 3, &mut shared, 2048);
                    let b = operand(n, major_b, width_b, 8, &mut shared, 32 << 10);
                    let shape = WgmmaShape { n, transposed_a: major_a, transposed_b: major_b };
                    let mut d = vec![f32::NAN; 64 * n];
                    for step in 0..4 {
                        let operands =
                            gather(&shape, &MatrixA::Shared(a[step]), b[step], &shared).unwrap();
                        multiply(&shape, &operands, 0..4, step != 0, &mut d);
                    }
                    for row in 0..64 {
                        for column in 0..n {
                            let expected: i64 = (0..64)
                                .map(|k| number(value(row, k, 3)) * number(value(column, k, 8)))
                                .sum();
                            // The ISA's figure of accumulator D: warp of 16 rows, four lanes
                            // a row, two columns a lane, four registers per eight columns.
                            let lane = row % 8 * 4 + column % 8 / 2;
                            let register =
                                column / 8 * 4 + usize::from(row % 16 >= 8) * 2 + column % 2;
                            let thread = row / 16 * 32 + lane;
                            assert_eq!(d[thread * (n / 2) + register] as i64, expected);
                        }
                    }
                }
            }
        }
    }
}

/// A box over the edge: rows and columns outside of the tensor multiply as 0.
#[test]
fn outside_is_zero() {
    let (rows, columns) = (70, 88);
    let global = bytes(rows, columns, 192, |row, column| value(row, column, 1));
    let mut shared = vec![0x5a; 16 << 10];
    load(&global, (rows, columns), (64, 64), 128, (64, 48), &mut shared, 1024);
    let shape = WgmmaShape { n: 64, transposed_a: false, transposed_b: false };
    let bits = descriptor(1024 + 32, 16, 1024, 128);
    let operands = gather(&shape, &MatrixA::Shared(bits), bits, &shared).unwrap();
    for row in 0..64 {
        for k in 0..16 {
            let (global_row, global_column) = (row + 48, k + 16 + 64);
            let inside = global_row < rows && global_column < columns;
            let expected = if inside { value(global_row, global_column, 1) } else { 0 };
            assert_eq!(operands.a[row * 16 + k], expected);
            assert_eq!(operands.b[k * 64 + row], expected);
        }
    }
}
