//! The warp and warpgroup matrix instructions of sm_90a as pure functions, written from the PTX
//! ISA (section numbers of version 9.x): `mma.m16n8k16`, `ldmatrix`, `stmatrix` and
//! `wgmma.mma_async.m64nNk16` with bf16 operands and f32 accumulators, including the shared-memory
//! operands of wgmma: matrix descriptor, canonical layouts, swizzling.

use std::ops::Range;

/// The value of bf16 bits: a bf16 is the upper half of an f32.
fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Element 0 (low half) or 1 (high half) of a register with two bf16.
fn half(register: u32, index: usize) -> u16 {
    (register >> (16 * index)) as u16
}

/// `mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32` of one warp: d\[16]\[8] = a\[16]\[16] *
/// b\[16]\[8] + c\[16]\[8], all given and returned as fragments `[lane][register]`. The registers
/// of a and b are bf16 pairs, low half first element.
///
/// Fragments: PTX ISA "Matrix Fragments for mma.m16n8k16 with floating point type". With g =
/// lane / 4 and t = lane % 4, element i of a is at row g (i in 0, 1, 4, 5) or g + 8, column
/// 2t + i%2, plus 8 for i >= 4; element i of b at row 2t + i%2, plus 8 for i >= 2, column g;
/// element i of c and d at row g, plus 8 for i >= 2, column 2t + i%2.
///
/// The ISA leaves order and precision of the sum open ("at least single precision"); here the
/// sixteen products and c are summed in f64 and rounded once.
pub fn mma_m16n8k16(c: &[[f32; 4]; 32], a: &[[u32; 4]; 32], b: &[[u32; 2]; 32]) -> [[f32; 4]; 32] {
    let mut left = [[0f64; 16]; 16];
    let mut right = [[0f64; 8]; 16];
    for lane in 0..32 {
        let (group, thread) = (lane / 4, lane % 4);
        for i in 0..8 {
            let row = if matches!(i, 0 | 1 | 4 | 5) { group } else { group + 8 };
            let column = thread * 2 + i % 2 + if i < 4 { 0 } else { 8 };
            left[row][column] = f64::from(bf16_value(half(a[lane][i / 2], i % 2)));
        }
        for i in 0..4 {
            let row = thread * 2 + i % 2 + if i < 2 { 0 } else { 8 };
            right[row][group] = f64::from(bf16_value(half(b[lane][i / 2], i % 2)));
        }
    }
    let mut result = [[0f32; 4]; 32];
    for lane in 0..32 {
        let (group, thread) = (lane / 4, lane % 4);
        for i in 0..4 {
            let row = if i < 2 { group } else { group + 8 };
            let column = thread * 2 + i % 2;
            let mut sum = 0f64;
            for k in 0..16 {
                sum += left[row][k] * right[k][column];
            }
            result[lane][i] = (sum + f64::from(c[lane][i])) as f32;
        }
    }
    result
}

/// Which two elements (row, column) of its 8x8 matrix a lane's register holds, low half first.
///
/// PTX ISA "ldmatrix", fragment layout of one 8x8 matrix of 16-bit elements: lane l holds
/// elements 2(l%4) and 2(l%4)+1 of row l/4. With `.trans` the matrix is loaded in column-major
/// format, so the lane holds those elements of column l/4.
fn elements_of_lane(lane: usize, transposed: bool) -> [(usize, usize); 2] {
    let (slow, fast) = (lane / 4, lane % 4 * 2);
    if transposed { [(fast, slow), (fast + 1, slow)] } else { [(slow, fast), (slow, fast + 1)] }
}

fn check_count(count: usize) {
    assert!(matches!(count, 1 | 2 | 4), "ldmatrix/stmatrix .x{count}: .num is x1, x2 or x4");
}

/// `ldmatrix.sync.aligned.m8n8.x{count}{.trans}.shared.b16` of one warp: `rows[i]` is the 16-byte
/// row at the address that lane i gave; lanes 8r to 8r+7 give the rows of matrix r, lanes from
/// `8 * count` on are not used (PTX ISA "ldmatrix", table of addresses). Result
/// `[lane][register]`, register r from matrix r; unused registers 0.
pub fn ldmatrix(count: usize, transposed: bool, rows: &[[u8; 16]; 32]) -> [[u32; 4]; 32] {
    check_count(count);
    let mut registers = [[0u32; 4]; 32];
    for matrix in 0..count {
        for (lane, fragment) in registers.iter_mut().enumerate() {
            for (index, (row, column)) in elements_of_lane(lane, transposed).into_iter().enumerate()
            {
                let bytes = &rows[8 * matrix + row];
                let element = u16::from_le_bytes([bytes[2 * column], bytes[2 * column + 1]]);
                fragment[matrix] |= u32::from(element) << (16 * index);
            }
        }
    }
    registers
}

/// `stmatrix.sync.aligned.m8n8.x{count}{.trans}.shared.b16` of one warp, the inverse of
/// [`ldmatrix`] (PTX ISA "stmatrix" has the same address table and fragment layout): the 16-byte
/// row to be stored at the address that lane i gave, for i < `8 * count`; the other rows are 0
/// and not to be stored.
pub fn stmatrix(count: usize, transposed: bool, registers: &[[u32; 4]; 32]) -> [[u8; 16]; 32] {
    check_count(count);
    let mut rows = [[0u8; 16]; 32];
    for matrix in 0..count {
        for (lane, fragment) in registers.iter().enumerate() {
            for (index, (row, column)) in elements_of_lane(lane, transposed).into_iter().enumerate()
            {
                let element = half(fragment[matrix], index);
                rows[8 * matrix + row][2 * column..2 * column + 2]
                    .copy_from_slice(&element.to_le_bytes());
            }
        }
    }
    rows
}

/// Shape of `wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16`; `transposed_a` and
/// `transposed_b` are the operands imm-trans-a and imm-trans-b: false is K-major, true M- or
/// N-major (PTX ISA "Shared Memory Matrix Layout"). imm-scale-a and imm-scale-b are 1.
pub struct WgmmaShape {
    pub n: usize,
    pub transposed_a: bool,
    pub transposed_b: bool,
}

/// Matrix A of a wgmma: fragments `[thread of the warpgroup][register]`, bf16 pairs with the low
/// half first, or a matrix descriptor.
pub enum MatrixA {
    Registers(Box<[[u32; 4]; 128]>),
    Shared(u64),
}

/// What the instruction multiplies, as bf16 bits.
#[derive(Clone, PartialEq, Debug)]
pub struct Operands {
    /// \[64]\[16], row major: `a[16 * m + k]`.
    pub a: Vec<u16>,
    /// \[16]\[n], rows of k: `b[n * k + j]`.
    pub b: Vec<u16>,
}

/// A decoded matrix descriptor. PTX ISA "Matrix Descriptor Format": bits 0-13 start address,
/// 16-29 leading dimension byte offset, 32-45 stride dimension byte offset, each (x & 0x3FFFF) >>
/// 4; bits 49-51 matrix base offset; bits 62-63 swizzling mode.
struct Descriptor {
    start: usize,
    leading: usize,
    stride: usize,
    /// Bytes of one row of the swizzle pattern: 128, 64, 32, or 16 without swizzling, where a row
    /// is one 16-byte chunk.
    width: usize,
}

impl Descriptor {
    fn decode(name: &str, bits: u64) -> Result<Descriptor, String> {
        let field = |low: u32| ((bits >> low) & 0x3fff) as usize * 16;
        // The ISA gives these bits no meaning on sm_90 (on sm_100 some have one). A start address
        // that was advanced past 256 KiB carries into bit 14.
        let reserved = bits & 0x3ff1_c000_c000_c000;
        if reserved != 0 {
            return Err(format!("{name} descriptor {bits:#018x}: reserved bits {reserved:#x} set"));
        }
        // "The value of base offset is 0 when the repeating pattern of the specified swizzling
        // mode starts" at a 1024, 512 or 256-byte boundary; "otherwise [...] base offset =
        // (pattern start addr >> 0x7) & 0x7". No public description says what exactly the hardware
        // does with another value than 0 (CUTLASS always writes 0), so such a value is refused.
        let base_offset = (bits >> 49) & 7;
        if base_offset != 0 {
            return Err(format!("{name} descriptor {bits:#018x}: base offset {base_offset} not 0"));
        }
        // All four values of this field have a meaning on sm_90.
        let width = match bits >> 62 {
            0 => 16,
            1 => 128,
            2 => 64,
            _ => 32,
        };
        Ok(Descriptor { start: field(0), leading: field(16), stride: field(32), width })
    }

    /// After how many bytes the swizzle pattern repeats: eight rows.
    fn period(&self) -> usize {
        8 * self.width
    }

    /// Refuses what the canonical layouts do not cover: `inner_bytes` is the length of the matrix
    /// along its contiguous dimension, as far as it lies in one row of the pattern.
    fn check_pattern(
        &self,
        name: &str,
        inner_bytes: usize,
        strides: &[(&str, usize, bool)],
    ) -> Result<(), String> {
        if self.width == 16 {
            return Ok(());
        }
        let (start, width, period) = (self.start, self.width, self.period());
        // With base offset 0 the pattern starts at a multiple of its period. A matrix that
        // starts in another row than the first of its pattern would split groups of eight rows
        // between two patterns. It cannot come from cutting a larger matrix at multiples of
        // eight rows, and the ISA demands a base offset for a pattern that starts there.
        if start % period >= width {
            return Err(format!(
                "{name} start address {start:#x} is not in the first {width}-byte row of a \
                 swizzle pattern of {period} bytes, but the base offset is 0"
            ));
        }
        // A start address inside of that row is standard: it advances K by 32 bytes in a K-major
        // matrix (CUTLASS' DescriptorIterator adds to the start address only).
        if start % width + inner_bytes > width {
            return Err(format!(
                "{name} start address {start:#x}: {inner_bytes} bytes from there leave the \
                 {width}-byte swizzle row"
            ));
        }
        for (field, value, used) in strides {
            if *used && !value.is_multiple_of(period) {
                return Err(format!(
                    "{name} {field} {value:#x} is not a multiple of the {period} bytes after \
                     which the swizzle pattern repeats"
                ));
            }
        }
        Ok(())
    }

    /// The swizzle: PTX ISA "Swizzling Modes" has tables of 16-byte chunks in lines of 128 bytes;
    /// in them line l (counted from an aligned pattern start) has chunk c at position c ^ l, where
    /// 128B mode uses three bits of l, 64B two and 32B one. As the pattern starts are aligned,
    /// l is in bits 7 and up of the shared-memory address itself: CuTe's Swizzle<3,4,3>,
    /// Swizzle<2,4,3> and Swizzle<1,4,3> "o smem_ptr o layout", that is applied to the whole
    /// address, not to the offset from the start address.
    fn swizzle(&self, address: usize) -> usize {
        let mask = self.width - 16;
        address ^ ((address >> 3) & mask)
    }
}

/// The operand that a descriptor stands for, as `[extent][16]` (M or N by K) bf16 bits.
///
/// PTX ISA "Major-ness supported by Strides" and "Canonical Layouts", T = 8 for bf16, lengths in
/// elements; the same table is in CUTLASS' mma_traits_sm90_gmma.hpp:
///
/// | major | swizzle     | canonical layout before swizzling                     |
/// |-------|-------------|-------------------------------------------------------|
/// | MN    | none        | ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO))                  |
/// | MN    | 32, 64, 128 | ((T,w,m),(8,k)):((1,T,LBO),(wT,SBO)) with w = 2, 4, 8 |
/// | K     | none        | ((8,m),(T,2k)):((1T,SBO),(1,LBO))                     |
/// | K     | 32, 64, 128 | ((8,m),(T,2k)):((wT,SBO),(1,T)) with w = 2, 4, 8      |
///
/// So the two offsets change roles between the modes:
/// - K-major without swizzling: core matrices of 8 rows of 16 bytes, LBO to the next along K
///   ("from the first column to the second columns of the 8x2 tile in the 128-bit element type
///   normalized matrix"), SBO to the next along MN ("from the first 8 rows to the next 8 rows").
/// - K-major, swizzled: LBO "not used, assumed to be 1"; SBO as before.
/// - MN-major without swizzling ("interleave"): LBO "from the first 8 columns to the next 8
///   columns" (columns are K), SBO "from the first row to the next row" (a row of 128-bit
///   elements, that is 8 of MN).
/// - MN-major, swizzled: LBO "from the first (swizzle-byte-size/16) rows to the next" (along MN,
///   from one pattern to the next), SBO "from the first 8 columns to the next 8 columns" (K).
///
/// CUTLASS' mma_sm90_desc.hpp comments the fields for "T" (MN-major) as LBO = 8 rows to the next
/// 8 rows, SBO = 8 columns to the next 8 columns; that fits the swizzled modes only, and its own
/// make_gmma_desc follows the table above. Older ISA versions had LBO along K and SBO along MN for
/// all modes.
fn read_operand(
    name: &str,
    bits: u64,
    mn_major: bool,
    extent: usize,
    shared: &[u8],
) -> Result<Vec<u16>, String> {
    let descriptor = Descriptor::decode(name, bits)?;
    let Descriptor { start, leading, stride, width } = descriptor;
    let swizzled = width != 16;
    let load = |logical: usize| -> Result<[u16; 8], String> {
        let address = descriptor.swizzle(logical);
        let Some(bytes) = shared.get(address..address + 16) else {
            return Err(format!(
                "{name} descriptor {bits:#018x}: address {address:#x} outside of the {:#x} bytes \
                 of shared memory",
                shared.len()
            ));
        };
        Ok(std::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])))
    };
    let mut values = vec![0u16; extent * 16];
    if mn_major {
        let chunks_in_row = width / 16;
        let repeats = extent * 2 > width;
        descriptor.check_pattern(
            name,
            width.min(extent * 2),
            &[("leading byte offset", leading, repeats), ("stride byte offset", stride, true)],
        )?;
        for k in 0..16 {
            for chunk in 0..extent / 8 {
                let offset = if swizzled {
                    (chunk / chunks_in_row) * leading
                        + (chunk % chunks_in_row) * 16
                        + (k / 8) * stride
                        + (k % 8) * width
                } else {
                    chunk * stride + (k / 8) * leading + (k % 8) * 16
                };
                for (i, value) in load(start + offset)?.into_iter().enumerate() {
                    values[(chunk * 8 + i) * 16 + k] = value;
                }
            }
        }
    } else {
        descriptor.check_pattern(name, 32, &[("stride byte offset", stride, extent > 8)])?;
        for row in 0..extent {
            for chunk in 0..2 {
                let along_k = if swizzled { chunk * 16 } else { chunk * leading };
                let offset = (row / 8) * stride + (row % 8) * width + along_k;
                let at = row * 16 + chunk * 8;
                values[at..at + 8].copy_from_slice(&load(start + offset)?);
            }
        }
    }
    Ok(values)
}

/// Row and first column of a register of matrix A in a wgmma: PTX ISA "Matrix Fragments for
/// wgmma.mma_async.m64nNk16", matrix A: warp w of the warpgroup holds rows 16w to 16w+15, in them
/// the fragment is that of mma.m16n8k16.
fn place_in_a(thread: usize, register: usize) -> (usize, usize) {
    let (warp, lane) = (thread / 32, thread % 32);
    (16 * warp + lane / 4 + 8 * (register % 2), lane % 4 * 2 + 8 * (register / 2))
}

/// Collects the operands of `wgmma.mma_async.m64nNk16`: a \[64]\[16] from registers or shared
/// memory, b \[16]\[n] from shared memory; `shared` is the block's shared memory from
/// shared-memory address 0 on. PTX ISA "Register Fragments and Shared Memory Matrix Layouts".
///
/// Errors name the field: n that is no multiple of 8 up to 256, transposed A from registers (the
/// instruction has no imm-trans-a then), reserved descriptor bits, a base offset, a start address
/// or byte offset that does not fit the swizzle pattern, addresses outside of `shared`.
pub fn gather(shape: &WgmmaShape, a: &MatrixA, b: u64, shared: &[u8]) -> Result<Operands, String> {
    let n = shape.n;
    if !n.is_multiple_of(8) || !(8..=256).contains(&n) {
        return Err(format!("n = {n}: not a multiple of 8 from 8 to 256"));
    }
    let left = match a {
        MatrixA::Registers(_) if shape.transposed_a => {
            return Err("matrix A from registers cannot be transposed".to_string());
        }
        MatrixA::Registers(registers) => {
            let mut left = vec![0u16; 64 * 16];
            for (thread, fragment) in registers.iter().enumerate() {
                for (register, pair) in fragment.iter().enumerate() {
                    let (row, column) = place_in_a(thread, register);
                    left[row * 16 + column] = half(*pair, 0);
                    left[row * 16 + column + 1] = half(*pair, 1);
                }
            }
            left
        }
        MatrixA::Shared(bits) => read_operand("A", *bits, shape.transposed_a, 64, shared)?,
    };
    let columns = read_operand("B", b, shape.transposed_b, n, shared)?;
    let mut right = vec![0u16; 16 * n];
    for k in 0..16 {
        for column in 0..n {
            right[k * n + column] = columns[column * 16 + k];
        }
    }
    Ok(Operands { a: left, b: right })
}

/// The multiplication of `wgmma.mma_async.m64nNk16.f32.bf16.bf16`: d = a*b, plus d if `add`
/// (operand scale-d). `d` is `[thread of these warps of the warpgroup][n/2]`, flat.
///
/// PTX ISA "Matrix Fragments for wgmma.mma_async.m64nNk16", accumulator D: element i of a thread
/// is at row 16 * warp + lane/4, plus 8 for i%4 >= 2, and column 8 * (i/4) + 2 * (lane%4) + i%2.
///
/// The ISA leaves order and precision of the sum open; here products (exact in f64) and d are
/// summed in f64 and rounded to f32 once.
pub fn multiply(
    shape: &WgmmaShape,
    operands: &Operands,
    warps: Range<usize>,
    add: bool,
    d: &mut [f32],
) {
    let n = shape.n;
    assert_eq!(operands.a.len(), 64 * 16, "length of a");
    assert_eq!(operands.b.len(), 16 * n, "length of b");
    assert_eq!(d.len(), 32 * warps.len() * (n / 2), "length of d");
    // With the widest vectors that the processor has.
    pulp::Arch::new().dispatch(|| add_products(n, operands, warps, add, d));
}

#[inline(always)]
fn add_products(n: usize, operands: &Operands, warps: Range<usize>, add: bool, d: &mut [f32]) {
    let value = |bits: &u16| f64::from(bf16_value(*bits));
    let right: Vec<f64> = operands.b.iter().map(value).collect();
    for row in 16 * warps.start..16 * warps.end {
        let factors: [f64; 16] = std::array::from_fn(|k| value(&operands.a[row * 16 + k]));
        // The threads with elements of this row: four lanes of one warp.
        let first_thread = (row / 16 - warps.start) * 32 + row % 8 * 4;
        // Eight columns at a time, so that the sums stay in registers.
        for first_column in (0..n).step_by(8) {
            let mut sums = [0f64; 8];
            for (factor, others) in factors.iter().zip(right[first_column..].chunks(n)) {
                for (sum, other) in sums.iter_mut().zip(&others[..8]) {
                    *sum += factor * other;
                }
            }
            for (column, sum) in sums.iter().enumerate() {
                let thread = first_thread + column / 2;
                let element = first_column / 8 * 4 + row % 16 / 8 * 2 + column % 2;
                let target = &mut d[thread * (n / 2) + element];
                *target = (if add { sum + f64::from(*target) } else { *sum }) as f32;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::needless_range_loop)]
mod tests {
    use super::super::run::Random;
    use super::*;

    /// A bf16 that is a whole number from -8 to 8: sums of products stay exact.
    fn small(random: &mut Random) -> u16 {
        whole(random.below(17) as i32 - 8)
    }

    fn whole(value: i32) -> u16 {
        ((value as f32).to_bits() >> 16) as u16
    }

    fn number(bits: u16) -> i64 {
        bf16_value(bits) as i64
    }

    /// A CuTe layout (colexicographic, flattened): index to offset.
    fn layout(mut index: usize, shape: &[usize], stride: &[usize]) -> usize {
        let mut offset = 0;
        for (size, step) in shape.iter().zip(stride) {
            offset += index % size * step;
            index /= size;
        }
        assert_eq!(index, 0);
        offset
    }

    // CuTe's fragment layouts, mma_traits_sm80.hpp (SM80_16x8x16_F32BF16BF16F32_TN) and
    // mma_traits_sm90_gmma.hpp (CLayout_64xN, ALayout_64x16): thread and element to the column
    // major index of the matrix.
    fn cute_a(lane: usize, element: usize) -> (usize, usize) {
        let index = layout(lane, &[4, 8], &[32, 1]) + layout(element, &[2, 2, 2], &[16, 8, 128]);
        (index % 16, index / 16)
    }

    fn cute_b(lane: usize, element: usize) -> (usize, usize) {
        let index = layout(lane, &[4, 8], &[16, 1]) + layout(element, &[2, 2], &[8, 64]);
        (index / 8, index % 8)
    }

    fn cute_c(lane: usize, element: usize) -> (usize, usize) {
        let index = layout(lane, &[4, 8], &[32, 1]) + layout(element, &[2, 2], &[16, 8]);
        (index % 16, index / 16)
    }

    fn cute_d_of_wgmma(thread: usize, element: usize, n: usize) -> (usize, usize) {
        let index = layout(thread, &[4, 8, 4], &[128, 1, 16])
            + layout(element, &[2, 2, n / 8], &[64, 8, 512]);
        (index % 64, index / 64)
    }

    fn put(register: &mut u32, index: usize, bits: u16) {
        *register |= u32::from(bits) << (16 * index);
    }

    #[test]
    fn mma_with_cute_fragments_is_the_plain_product() {
        let mut random = Random(1);
        let mut left = [[0u16; 16]; 16];
        let mut right = [[0u16; 8]; 16];
        let mut start = [[0i64; 8]; 16];
        left.iter_mut().flatten().for_each(|value| *value = small(&mut random));
        right.iter_mut().flatten().for_each(|value| *value = small(&mut random));
        start.iter_mut().flatten().for_each(|value| *value = random.below(100) as i64);
        let (mut a, mut b, mut c) = ([[0; 4]; 32], [[0; 2]; 32], [[0f32; 4]; 32]);
        for lane in 0..32 {
            for element in 0..8 {
                let (row, column) = cute_a(lane, element);
                put(&mut a[lane][element / 2], element % 2, left[row][column]);
            }
            for element in 0..4 {
                let (row, column) = cute_b(lane, element);
                put(&mut b[lane][element / 2], element % 2, right[row][column]);
                let (row, column) = cute_c(lane, element);
                c[lane][element] = start[row][column] as f32;
            }
        }
        let d = mma_m16n8k16(&c, &a, &b);
        for lane in 0..32 {
            for element in 0..4 {
                let (row, column) = cute_c(lane, element);
                let product: i64 =
                    (0..16).map(|k| number(left[row][k]) * number(right[k][column])).sum();
                assert_eq!(d[lane][element] as i64, product + start[row][column]);
            }
        }
    }

    /// Rows of the ISA's figures of the m16n8k16 fragments, read off as thread and element.
    #[test]
    fn mma_fragments_are_those_of_the_figures() {
        // Matrix A, row 0: T0:{a0,a1} T1:{a0,a1} T2 T3 T0:{a4,a5} ...; row 8 with a2,a3, a6,a7;
        // row 9 starts with T4. Matrix B, column 0: T0:{b0,b1} T1 T2 T3 T0:{b2,b3} ...; column 1
        // starts with T4. Matrix C, row 0: T0:{c0,c1} T1 T2 T3; row 8: T0:{c2,c3}.
        let figure_a = [(0, 0, 0, 0), (0, 9, 0, 5), (8, 0, 0, 2), (9, 15, 7, 7), (15, 6, 31, 2)];
        for (row, k, lane, element) in figure_a {
            let mut a = [[0; 4]; 32];
            put(&mut a[lane][element / 2], element % 2, whole(1));
            // b[k][column] is k + 1 in every column, so that d shows where the 1 is.
            let mut b = [[0; 2]; 32];
            for (thread, registers) in b.iter_mut().enumerate() {
                let first = thread as i32 % 4 * 2;
                for (register, value) in registers.iter_mut().enumerate() {
                    put(value, 0, whole(first + 8 * register as i32 + 1));
                    put(value, 1, whole(first + 8 * register as i32 + 2));
                }
            }
            let d = mma_m16n8k16(&[[0.0; 4]; 32], &a, &b);
            for thread in 0..32 {
                for i in 0..4 {
                    let at_row = thread / 4 + [0, 0, 8, 8][i];
                    let expected = if at_row == row { k as f32 + 1.0 } else { 0.0 };
                    assert_eq!(d[thread][i], expected, "row {row}, thread {thread}, c{i}");
                }
            }
        }
    }

    /// The ISA's figure of an 8x8 matrix fragment: which lane has which pair of a row.
    const LDMATRIX_FIGURE: [[usize; 4]; 8] = [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
        [16, 17, 18, 19],
        [20, 21, 22, 23],
        [24, 25, 26, 27],
        [28, 29, 30, 31],
    ];

    fn random_rows(random: &mut Random) -> [[u8; 16]; 32] {
        std::array::from_fn(|_| std::array::from_fn(|_| random.below(256) as u8))
    }

    #[test]
    fn ldmatrix_follows_the_figure() {
        let rows = random_rows(&mut Random(2));
        for count in [1, 2, 4] {
            let registers = ldmatrix(count, false, &rows);
            for matrix in 0..count {
                for (row, lanes) in LDMATRIX_FIGURE.iter().enumerate() {
                    for (pair, lane) in lanes.iter().enumerate() {
                        let bytes = &rows[matrix * 8 + row][4 * pair..4 * pair + 4];
                        let expected = u32::from_le_bytes(bytes.try_into().unwrap());
                        assert_eq!(registers[*lane][matrix], expected);
                    }
                }
            }
            assert!(registers.iter().all(|lane| lane[count..].iter().all(|value| *value == 0)));
        }
    }

    #[test]
    fn transposed_ldmatrix_is_ldmatrix_of_transposed_matrices() {
        let rows = random_rows(&mut Random(3));
        let mut transposed = [[0u8; 16]; 32];
        for matrix in 0..4 {
            for row in 0..8 {
                for column in 0..8 {
                    for byte in 0..2 {
                        transposed[matrix * 8 + column][2 * row + byte] =
                            rows[matrix * 8 + row][2 * column + byte];
                    }
                }
            }
        }
        for count in [1, 2, 4] {
            assert_eq!(ldmatrix(count, true, &rows), ldmatrix(count, false, &transposed));
        }
    }

    #[test]
    fn stmatrix_inverts_ldmatrix() {
        let rows = random_rows(&mut Random(4));
        for count in [1, 2, 4] {
            for transposed in [false, true] {
                let stored = stmatrix(count, transposed, &ldmatrix(count, transposed, &rows));
                assert_eq!(stored[..8 * count], rows[..8 * count]);
                assert!(stored[8 * count..].iter().flatten().all(|byte| *byte == 0));
            }
        }
    }

    /// The standard use: A row major by ldmatrix.x4, B\[k]\[n] row major by ldmatrix.x2.trans.
    #[test]
    fn ldmatrix_feeds_mma() {
        let mut random = Random(5);
        let left: [[u16; 16]; 16] =
            std::array::from_fn(|_| std::array::from_fn(|_| small(&mut random)));
        let right: [[u16; 8]; 16] =
            std::array::from_fn(|_| std::array::from_fn(|_| small(&mut random)));
        let bytes = |values: &[u16]| -> [u8; 16] {
            std::array::from_fn(|i| values[i / 2].to_le_bytes()[i % 2])
        };
        let a_rows = std::array::from_fn(|lane| {
            let column = lane / 16 * 8;
            bytes(&left[lane % 16][column..column + 8])
        });
        let b_rows = std::array::from_fn(|lane| bytes(&right[lane % 16]));
        let b = ldmatrix(2, true, &b_rows).map(|lane| [lane[0], lane[1]]);
        let d = mma_m16n8k16(&[[0.0; 4]; 32], &ldmatrix(4, false, &a_rows), &b);
        for lane in 0..32 {
            for element in 0..4 {
                let (row, column) = cute_c(lane, element);
                let product: i64 =
                    (0..16).map(|k| number(left[row][k]) * number(right[k][column])).sum();
                assert_eq!(d[lane][element] as i64, product);
            }
        }
    }

    /// The tables of PTX ISA 5.5.7: the 16-byte chunks of each line of 128 bytes.
    const SWIZZLE_32: &[[usize; 8]] = &[[0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6]];
    const SWIZZLE_64: &[[usize; 8]] = &[
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [3, 2, 1, 0, 7, 6, 5, 4],
    ];
    const SWIZZLE_128: &[[usize; 8]] = &[
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [3, 2, 1, 0, 7, 6, 5, 4],
        [4, 5, 6, 7, 0, 1, 2, 3],
        [5, 4, 7, 6, 1, 0, 3, 2],
        [6, 7, 4, 5, 2, 3, 0, 1],
        [7, 6, 5, 4, 3, 2, 1, 0],
    ];

    /// Swizzles a memory image, elements of two bytes.
    fn swizzled(plain: &[u16], width: usize) -> Vec<u8> {
        let table = match width {
            32 => SWIZZLE_32,
            64 => SWIZZLE_64,
            128 => SWIZZLE_128,
            _ => &SWIZZLE_32[..1],
        };
        assert_eq!(plain.len() % 64, 0);
        let mut bytes = Vec::new();
        for (number, line) in plain.chunks(64).enumerate() {
            for chunk in table[number % table.len()] {
                bytes.extend(line[8 * chunk..8 * chunk + 8].iter().flat_map(|v| v.to_le_bytes()));
            }
        }
        bytes
    }

    fn mode(width: usize) -> u64 {
        [(16, 0), (128, 1), (64, 2), (32, 3)].iter().find(|(bytes, _)| *bytes == width).unwrap().1
    }

    fn descriptor(start: usize, leading: usize, stride: usize, width: usize) -> u64 {
        let encode = |value: usize| (value as u64 & 0x3ffff) >> 4;
        encode(start) | encode(leading) << 16 | encode(stride) << 32 | mode(width) << 62
    }

    const NO_A: fn() -> MatrixA = || MatrixA::Registers(Box::new([[0; 4]; 128]));

    /// The examples in the ISA's "Canonical Layouts" for bf16, MN-major, exact layout and
    /// encoding of the byte offsets as printed there, and its two K-major examples with T = 8
    /// instead of tf32's 4 and k = 1.
    #[test]
    fn examples_of_the_canonical_layouts() {
        type Example<'a> =
            (bool, usize, usize, u64, u64, &'a [usize], &'a [usize], &'a [usize], &'a [usize]);
        let examples: [Example; 5] = [
            (true, 16, 16, 16, 8, &[8, 1, 2], &[1, 8, 64], &[8, 2], &[8, 128]),
            (true, 32, 32, 16, 32, &[8, 2, 2], &[1, 8, 128], &[8, 2], &[16, 256]),
            (true, 64, 64, 32, 64, &[8, 4, 2], &[1, 8, 256], &[8, 2], &[32, 512]),
            (false, 16, 16, 16, 8, &[8, 2], &[8, 64], &[8, 2], &[1, 128]),
            (false, 16, 32, 1, 16, &[8, 2], &[16, 128], &[8, 2], &[1, 8]),
        ];
        for (mn_major, n, width, leading, stride, shape_n, stride_n, shape_k, stride_k) in examples
        {
            let mut image = vec![0xffffu16; 4096];
            for column in 0..n {
                for k in 0..16 {
                    let offset = layout(column, shape_n, stride_n) + layout(k, shape_k, stride_k);
                    assert_eq!(image[offset], 0xffff, "two elements at one place");
                    image[offset] = (column * 16 + k) as u16;
                }
            }
            let bits = leading << 16 | stride << 32 | mode(width) << 62;
            let shape = WgmmaShape { n, transposed_a: false, transposed_b: mn_major };
            let operands = gather(&shape, &NO_A(), bits, &swizzled(&image, width)).unwrap();
            for k in 0..16 {
                for column in 0..n {
                    assert_eq!(operands.b[k * n + column], (column * 16 + k) as u16);
                }
            }
        }
    }

    /// A K-major tile of rows as long as the swizzle: steps of K advance the start address by 32
    /// bytes within the row.
    #[test]
    fn k_major_tiles_stepped_along_k() {
        for width in [32, 64, 128] {
            let tile: Vec<u16> = (0..256 * width / 2).map(|i| i as u16).collect();
            let mut shared = vec![0xee; 4096];
            shared.extend(swizzled(&tile, width));
            for step in 0..width / 32 {
                // LBO is not used in this mode: any value will do.
                let leading = [16, 0, 0x2340, 128][step];
                let bits = descriptor(4096 + 32 * step, leading, 8 * width, width);
                let n = 256;
                let shape = WgmmaShape { n, transposed_a: false, transposed_b: false };
                let operands = gather(&shape, &MatrixA::Shared(bits), bits, &shared).unwrap();
                for k in 0..16 {
                    for row in 0..n {
                        let expected = (row * width / 2 + step * 16 + k) as u16;
                        assert_eq!(operands.b[k * n + row], expected);
                        if row < 64 {
                            assert_eq!(operands.a[row * 16 + k], expected);
                        }
                    }
                }
            }
        }
    }

    /// An MN-major tile of 64 rows of K in blocks as wide as the swizzle: steps of K advance the
    /// start address by 16 rows; LBO goes to the next block.
    #[test]
    fn mn_major_tiles_stepped_along_k() {
        for width in [32, 64, 128] {
            let (depth, n, columns) = (64, 96, width / 2);
            let blocks = 128 / columns;
            let mut tile = Vec::new();
            for block in 0..blocks {
                for k in 0..depth {
                    tile.extend((0..columns).map(|i| (k * 128 + block * columns + i) as u16));
                }
            }
            let mut shared = vec![0xee; 2048];
            shared.extend(swizzled(&tile, width));
            for step in 0..depth / 16 {
                let bits = descriptor(2048 + step * 16 * width, depth * width, 8 * width, width);
                let shape = WgmmaShape { n, transposed_a: true, transposed_b: true };
                let operands = gather(&shape, &MatrixA::Shared(bits), bits, &shared).unwrap();
                for k in 0..16 {
                    for column in 0..n {
                        let expected = ((step * 16 + k) * 128 + column) as u16;
                        assert_eq!(operands.b[k * n + column], expected);
                        if column < 64 {
                            assert_eq!(operands.a[column * 16 + k], expected);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn registers_of_a_follow_cute() {
        let mut registers = Box::new([[0u32; 4]; 128]);
        for (thread, fragment) in registers.iter_mut().enumerate() {
            for element in 0..8 {
                // ALayout_64x16 is CLayout_64x16.
                let (row, k) = cute_d_of_wgmma(thread, element, 16);
                put(&mut fragment[element / 2], element % 2, (row * 16 + k) as u16);
            }
        }
        let shape = WgmmaShape { n: 8, transposed_a: false, transposed_b: false };
        let b = descriptor(0, 128, 256, 16);
        let operands = gather(&shape, &MatrixA::Registers(registers), b, &[0; 4096]).unwrap();
        assert!(operands.a.iter().enumerate().all(|(i, value)| usize::from(*value) == i));
    }

    #[test]
    fn multiply_is_the_plain_product() {
        let mut random = Random(6);
        for n in [8, 16, 72, 192, 256] {
            let a: Vec<u16> = (0..64 * 16).map(|_| small(&mut random)).collect();
            let b: Vec<u16> = (0..16 * n).map(|_| small(&mut random)).collect();
            let old: Vec<f32> = (0..64 * n).map(|i| (i % 97) as f32).collect();
            let operands = Operands { a: a.clone(), b: b.clone() };
            let shape = WgmmaShape { n, transposed_a: false, transposed_b: false };
            for add in [false, true] {
                let mut d = old.clone();
                multiply(&shape, &operands, 0..4, add, &mut d);
                for thread in 0..128 {
                    for element in 0..n / 2 {
                        let (row, column) = cute_d_of_wgmma(thread, element, n);
                        let mut expected: i64 = (0..16)
                            .map(|k| number(a[row * 16 + k]) * number(b[k * n + column]))
                            .sum();
                        let at = thread * (n / 2) + element;
                        if add {
                            expected += old[at] as i64;
                        }
                        assert_eq!(d[at] as i64, expected);
                    }
                }
            }
        }
    }

    /// Rounding once: 1 + 2^-24 + 2^-24 is above the half-way point only if the sum is exact.
    #[test]
    fn sums_are_rounded_once() {
        let tiny = (2f32.powi(-12).to_bits() >> 16) as u16;
        let mut a = vec![0; 64 * 16];
        let mut b = vec![0; 16 * 8];
        a[..3].copy_from_slice(&[whole(1), tiny, tiny]);
        b[0] = whole(1);
        b[8] = tiny;
        b[16] = tiny;
        let shape = WgmmaShape { n: 8, transposed_a: false, transposed_b: false };
        let mut d = vec![0f32; 128 * 4];
        multiply(&shape, &Operands { a, b }, 0..4, false, &mut d);
        assert_eq!(d[0], 1.0 + 2f32.powi(-23));
    }

    #[test]
    fn errors_name_the_field() {
        let shared = vec![0u8; 16384];
        let b_shape = |n, transposed_b| WgmmaShape { n, transposed_a: false, transposed_b };
        let error = |shape: &WgmmaShape, bits| gather(shape, &NO_A(), bits, &shared).err().unwrap();
        let good = descriptor(0, 16, 1024, 128);
        assert!(gather(&b_shape(64, false), &NO_A(), good, &shared).is_ok());
        let cases = [
            (b_shape(12, false), good, "n = 12"),
            (b_shape(264, false), good, "n = 264"),
            (b_shape(64, false), good | 1 << 49, "base offset 1"),
            (b_shape(64, false), good | 1 << 14, "reserved bits"),
            (b_shape(64, false), good | 1 << 61, "reserved bits"),
            // 136 rows need 17 patterns of 1024 bytes.
            (b_shape(136, false), good, "outside"),
            (b_shape(64, false), descriptor(128, 16, 1024, 128), "start address 0x80"),
            (b_shape(64, false), descriptor(112, 16, 1024, 128), "leave"),
            (b_shape(64, true), descriptor(32, 16, 1024, 128), "leave"),
            (b_shape(64, false), descriptor(0, 16, 512, 128), "stride byte offset"),
            (b_shape(128, true), descriptor(0, 128, 1024, 128), "leading byte offset"),
        ];
        for (shape, bits, part) in cases {
            let message = error(&shape, bits);
            assert!(message.contains(part), "{message:?} does not say {part:?}");
        }
        // Not used, so not checked: SBO with one group of eight rows, LBO with one pattern.
        assert!(gather(&b_shape(8, false), &NO_A(), descriptor(0, 0, 0, 128), &shared).is_ok());
        assert!(gather(&b_shape(64, true), &NO_A(), descriptor(0, 16, 1024, 128), &shared).is_ok());
        let transposed = WgmmaShape { n: 8, transposed_a: true, transposed_b: false };
        assert!(error(&transposed, good).contains("matrix A from registers"));
    }
}
