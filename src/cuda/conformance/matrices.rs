//! ldmatrix, stmatrix, mma and wgmma: which register of which thread is which element.
//!
//! The formulas are those of the PTX ISA's figures of fragments and of its matrix descriptors.
//! Elements are small integers, so every order of adding gives the same bits; one case each with
//! normal numbers bounds the rounding.

use half::bf16;

use super::{Case, Inputs, Needs, Tolerance, UNTOUCHED, pair};

pub(super) fn cases() -> Vec<Case> {
    [ldmatrix(), stmatrix(), vec![mma(false), mma(true)], wgmma(), vec![wgmma_groups()]].concat()
}

// ------------------------------------------------------------------ 8x8 matrices

/// The row of the tile whose address lane `lane` gives.
fn given_row(lane: usize) -> usize {
    (5 * lane + 3) % 32
}

/// The two elements (row, column) of matrix `register` that `lane` holds, lower half first.
fn held(lane: usize, transposed: bool) -> [(usize, usize); 2] {
    let (line, start) = (lane / 4, 2 * (lane % 4));
    [start, start + 1].map(|along| if transposed { (along, line) } else { (line, along) })
}

fn halves(words: &[u32]) -> Vec<u16> {
    words.iter().flat_map(|&word| [word as u16, (word >> 16) as u16]).collect()
}

fn words_of(halves: &[u16]) -> Vec<u32> {
    halves.chunks(2).map(|two| u32::from(two[0]) | u32::from(two[1]) << 16).collect()
}

/// Element (row, column) of matrix `matrix` in the tile of 32 rows of 8.
fn place(matrix: usize, (row, column): (usize, usize)) -> usize {
    8 * given_row(8 * matrix + row) + column
}

fn forms() -> Vec<(usize, bool, &'static str)> {
    [(1, "x1"), (2, "x2"), (4, "x4")]
        .into_iter()
        .flat_map(|(count, name)| [(count, false, name), (count, true, name)])
        .collect()
}

fn ldmatrix() -> Vec<Case> {
    let case = |(count, transposed, form): (usize, bool, &str)| {
        let name = format!("ldmatrix_{form}{}", if transposed { "_trans" } else { "" });
        let inp = Inputs::of(&name).words(128);
        let tile = halves(&inp);
        let mut registers = vec![];
        for matrix in 0..count {
            for lane in 0..32 {
                registers.extend(held(lane, transposed).map(|at| tile[place(matrix, at)]));
            }
        }
        Case::new(&name, Needs::Sm80, 32, inp, words_of(&registers))
    };
    forms().into_iter().map(case).collect()
}

fn stmatrix() -> Vec<Case> {
    let case = |(count, transposed, form): (usize, bool, &str)| {
        let name = format!("stmatrix_{form}{}", if transposed { "_trans" } else { "" });
        let inp = Inputs::of(&name).words(32 * count);
        let registers = halves(&inp);
        let mut tile = halves(&[UNTOUCHED; 128]);
        for matrix in 0..count {
            for lane in 0..32 {
                for (half, at) in held(lane, transposed).into_iter().enumerate() {
                    tile[place(matrix, at)] = registers[2 * (32 * matrix + lane) + half];
                }
            }
        }
        Case::new(&name, Needs::Sm90a, 32, inp, words_of(&tile))
    };
    forms().into_iter().map(case).collect()
}

// ------------------------------------------------------------------ products

/// Values that bf16 holds, row-major.
struct Matrix {
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn integers(name: &str, rows: usize, columns: usize, most: i32) -> Self {
        let integers = Inputs::of(name).integers(rows * columns, most);
        Matrix { columns, values: integers.into_iter().map(|i| i as f32).collect() }
    }

    fn normals(name: &str, rows: usize, columns: usize) -> Self {
        let normals = Inputs::of(name).normals(rows * columns);
        Matrix {
            columns,
            values: normals.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect(),
        }
    }

    fn at(&self, row: usize, column: usize) -> f32 {
        self.values[row * self.columns + column]
    }

    fn bf16(&self, row: usize, column: usize) -> bf16 {
        bf16::from_f32(self.at(row, column))
    }

    /// Row `row` of A times row `column` of B, both [.., k], over these k.
    fn dot(&self, row: usize, b: &Matrix, column: usize, k: std::ops::Range<usize>) -> f64 {
        k.map(|k| f64::from(self.at(row, k)) * f64::from(b.at(column, k))).sum()
    }
}

/// |error| of fp32 accumulation of `k` products of normals: the tensor cores truncate at 2^-22 of
/// the largest partial sum, which stays below 8 sqrt(k).
fn rounding(k: usize) -> Tolerance {
    let partial = 8.0 * (k as f64).sqrt();
    Tolerance::Float { relative: 0.0, absolute: k as f64 * partial * 2f64.powi(-22) }
}

/// mma.m16n8k16: A [16,16], B [8,16] (its columns), D [16,8].
fn mma(normal: bool) -> Case {
    let (name, matrix): (_, fn(&str, usize, usize) -> Matrix) = match normal {
        false => ("mma_m16n8k16", |name, rows, columns| Matrix::integers(name, rows, columns, 8)),
        true => ("mma_m16n8k16 of normals", Matrix::normals),
    };
    let [a, b, d] = [("a", 16, 16), ("b", 8, 16), ("d", 16, 8)]
        .map(|(operand, rows, columns)| matrix(&format!("{name} {operand}"), rows, columns));
    let mut inp = vec![];
    for register in 0..4 {
        inp.extend((0..32).map(|lane| {
            let row = lane / 4 + 8 * (register % 2);
            let k = 2 * (lane % 4) + 8 * (register / 2);
            pair(a.bf16(row, k), a.bf16(row, k + 1))
        }));
    }
    for register in 0..2 {
        inp.extend((0..32).map(|lane| {
            let k = 2 * (lane % 4) + 8 * register;
            pair(b.bf16(lane / 4, k), b.bf16(lane / 4, k + 1))
        }));
    }
    let mut expected = vec![];
    for register in 0..4 {
        for lane in 0..32 {
            let (row, column) = (lane / 4 + 8 * (register / 2), 2 * (lane % 4) + register % 2);
            inp.push(d.at(row, column).to_bits());
            let sum = f64::from(d.at(row, column)) + a.dot(row, &b, column, 0..16);
            expected.push((sum as f32).to_bits());
        }
    }
    Case {
        kernel: "conform_mma_m16n8k16".to_string(),
        tolerance: if normal { rounding(16) } else { Tolerance::Exact },
        ..Case::new(name, Needs::Sm80, 32, inp, expected)
    }
}

// ------------------------------------------------------------------ wgmma

/// How an operand of wgmma lies in shared memory.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Layout {
    /// The contiguous dimension: k, or m (n for B).
    mn_major: bool,
    /// Bytes of a row, which the swizzle permutes; 16: no swizzle.
    span: usize,
}

const K_MAJOR: Layout = Layout { mn_major: false, span: 128 };
const MN_MAJOR: Layout = Layout { mn_major: true, span: 128 };

/// An operand's bytes in shared memory, and its words in the kernel's header.
struct Operand {
    image: Vec<u32>,
    /// Without the offset: leading and stride bytes, swizzle field, bytes from k to k + 16.
    descriptor: [u32; 4],
}

impl Layout {
    /// The matrix [mn, k] as core matrices of 8 rows of 16 bytes, gathered into rows of `span`
    /// bytes (PTX ISA, "strides" and "shared memory matrix layout").
    fn lay(self, matrix: &Matrix) -> Operand {
        let k_count = matrix.columns;
        let mn_count = matrix.values.len() / k_count;
        let per_row = self.span / 2;
        // The contiguous dimension in rows of `span`, the other one in groups of 8 rows.
        let (along_count, across_count) =
            if self.mn_major { (mn_count, k_count) } else { (k_count, mn_count) };
        let group = 8 * self.span;
        let block = across_count.div_ceil(8) * group;
        let bytes = along_count.div_ceil(per_row) * block;
        let mut image = vec![0u16; bytes / 2];
        for mn in 0..mn_count {
            for k in 0..k_count {
                let (along, across) = if self.mn_major { (mn, k) } else { (k, mn) };
                let row = across / 8 * group + across % 8 * self.span;
                let linear = along / per_row * block + row + along % per_row * 2;
                image[swizzled(linear, self.span) / 2] = matrix.bf16(mn, k).to_bits();
            }
        }
        let field = match self.span {
            16 => 0,
            32 => 3,
            64 => 2,
            _ => 1,
        };
        let [leading, stride, advance] = match (self.mn_major, self.span) {
            // Leading: from 8 k to the next 8. Stride: from 8 rows to the next 8.
            (false, 16) => [block, group, 2 * block],
            // 16 k further on in the same row; the leading bytes have no meaning.
            (false, _) => [16, group, 32],
            // The two roles exchanged.
            (true, 16) => [group, block, 2 * group],
            // Leading: from `per_row` m to the next. Stride: from 8 k to the next 8.
            (true, _) => [block, group, 2 * group],
        };
        Operand {
            image: words_of(&image),
            descriptor: [leading as u32, stride as u32, field, advance as u32],
        }
    }

    /// k that the descriptor can reach by advancing: without a swizzle or MN-major any.
    fn most_k(self) -> usize {
        if self.mn_major || self.span == 16 { 64 } else { self.span / 2 }
    }
}

/// The byte that lies at `offset` of a tile goes to: bits 4.. are xored with those from bit 7 on.
fn swizzled(offset: usize, span: usize) -> usize {
    match span {
        16 => offset,
        span => offset ^ ((offset >> 3) & (span - 16)),
    }
}

/// One launch: SS where `a` is a layout, RS where it is none.
struct Wgmma {
    n: usize,
    a: Option<Layout>,
    b: Layout,
    /// Columns of B before those that are multiplied, in the same rows of the swizzle.
    skipped: usize,
    scale_d: bool,
    normal: bool,
}

/// The element of D that `register` of `thread` holds.
fn element_of_d(thread: usize, register: usize) -> (usize, usize) {
    let row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (register / 2 % 2);
    (row, 8 * (register / 4) + 2 * (thread % 4) + register % 2)
}

/// Accumulator `register` of `thread` before the product.
fn before(thread: usize, register: usize) -> f64 {
    register as f64 - thread as f64
}

/// The kernel's header and shared memory. `a` begins at 0, `b` at the next multiple of 1024.
fn wgmma_input(steps: usize, scale_d: bool, a: Option<Operand>, b: Operand) -> (Vec<u32>, u32) {
    let a = a.unwrap_or(Operand { image: vec![], descriptor: [0; 4] });
    let mut image = a.image;
    image.resize(image.len().next_multiple_of(256), 0);
    let b_offset = 4 * image.len() as u32;
    image.extend(b.image);
    let mut inp = vec![0u32; 2080];
    inp[..3].copy_from_slice(&[steps as u32, u32::from(scale_d), image.len() as u32]);
    inp[5..9].copy_from_slice(&a.descriptor);
    inp[9] = b_offset;
    inp[10..14].copy_from_slice(&b.descriptor);
    let bytes = 4 * image.len() as u32;
    inp.extend(image);
    (inp, bytes)
}

impl Wgmma {
    fn kernel(&self) -> String {
        let a = match self.a {
            Some(layout) => format!("a{}", u32::from(layout.mn_major)),
            None => "registers".to_string(),
        };
        format!("wgmma_n{}_{a}_b{}", self.n, u32::from(self.b.mn_major))
    }

    fn name(&self) -> String {
        let span = |layout: Layout| match layout.span {
            128 => String::new(),
            16 => " unswizzled".to_string(),
            span => format!(" swizzle {span}"),
        };
        let kind = if self.normal { " of normals" } else { "" };
        let behind = match self.skipped {
            0 => String::new(),
            columns => format!(" behind {columns} columns"),
        };
        format!("{}{}{behind}{kind}", self.kernel(), span(self.b))
    }

    fn case(&self) -> Case {
        let (name, n) = (self.name(), self.n);
        let k = self.a.map_or(64, Layout::most_k).min(self.b.most_k());
        let matrix = |operand: &str, rows| match self.normal {
            true => Matrix::normals(&format!("{name} {operand}"), rows, k),
            false => Matrix::integers(&format!("{name} {operand}"), rows, k, 3),
        };
        let (a, b) = (matrix("a", 64), matrix("b", self.skipped + n));
        let shared_a = self.a.map(|layout| layout.lay(&a));
        let (mut inp, bytes) = wgmma_input(k / 16, self.scale_d, shared_a, self.b.lay(&b));
        inp[9] += 2 * self.skipped as u32;
        if self.a.is_none() {
            for (index, thread) in (0..16).flat_map(|index| (0..128).map(move |t| (index, t))) {
                let (step, register) = (index / 4, index % 4);
                let row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (register % 2);
                let k = 16 * step + 2 * (thread % 4) + 8 * (register / 2);
                inp[32 + 128 * index + thread] = pair(a.bf16(row, k), a.bf16(row, k + 1));
            }
        }
        let d = |register: usize, thread: usize| {
            let (row, column) = element_of_d(thread, register);
            let sum = a.dot(row, &b, self.skipped + column, 0..k);
            let kept = if self.scale_d { before(thread, register) } else { 0.0 };
            ((sum + kept) as f32).to_bits()
        };
        let sampled = !matches!(n, 8 | 64 | 96);
        let expected = if sampled {
            let lane = |i: usize, warp: usize| d(i, 32 * warp + i % 32);
            (0..n / 2)
                .flat_map(|i| (0..4).map(move |warp| (i, warp)))
                .map(|(i, w)| lane(i, w))
                .collect()
        } else {
            (0..n / 2).flat_map(|i| (0..128).map(move |t| (i, t))).map(|(i, t)| d(i, t)).collect()
        };
        Case {
            kernel: format!("conform_{}", self.kernel()),
            dynamic_shared_bytes: bytes,
            tolerance: if self.normal { rounding(k) } else { Tolerance::Exact },
            ..Case::new(&name, Needs::Sm90a, 128, inp, expected)
        }
    }
}

fn wgmma() -> Vec<Case> {
    let mut launches = vec![];
    let both = [K_MAJOR, MN_MAJOR];
    for n in (8..=256).step_by(8) {
        // The kernel file has all forms of these, and two of the others.
        let all = matches!(n, 8 | 64 | 96 | 128 | 192 | 256);
        for b in both {
            for a in both.map(Some).into_iter().chain([None]) {
                let of_two = (a, b) == (Some(K_MAJOR), K_MAJOR) || (a, b) == (None, MN_MAJOR);
                if all || of_two {
                    // Alternately with and without what was in D.
                    let scale_d = (n / 8 + launches.len()) % 2 == 0;
                    launches.push(Wgmma { n, a, b, skipped: 0, scale_d, normal: false });
                }
            }
        }
    }
    for span in [16, 32, 64] {
        for mn_major in [false, true] {
            let layout = Layout { mn_major, span };
            let (a, b) = (Some(layout), layout);
            launches.push(Wgmma { n: 64, a, b, skipped: 0, scale_d: false, normal: false });
        }
    }
    // Half of the columns of a row, the second one.
    for (span, n) in [(128, 32), (64, 16)] {
        let b = Layout { mn_major: true, span };
        launches.push(Wgmma { n, a: None, b, skipped: n, scale_d: false, normal: false });
    }
    let (a, b) = (Some(K_MAJOR), K_MAJOR);
    launches.push(Wgmma { n: 64, a, b, skipped: 0, scale_d: false, normal: true });
    launches.iter().map(Wgmma::case).collect()
}

/// Two products of 16 k each: the first without, the second with what was in D.
fn wgmma_groups() -> Case {
    let a = Matrix::integers("wgmma_groups a", 64, 64, 3);
    let b = Matrix::integers("wgmma_groups b", 64, 64, 3);
    let (inp, bytes) = wgmma_input(2, false, Some(K_MAJOR.lay(&a)), K_MAJOR.lay(&b));
    let d = |group: usize, register: usize, thread: usize| {
        let (row, column) = element_of_d(thread, register);
        let sum = a.dot(row, &b, column, 16 * group..16 * (group + 1));
        let kept = if group == 1 { before(thread, register) } else { 0.0 };
        ((sum + kept) as f32).to_bits()
    };
    let mut expected = vec![];
    for group in 0..2 {
        for register in 0..32 {
            expected.extend((0..128).map(|thread| d(group, register, thread)));
        }
    }
    let case = Case::new("wgmma_groups", Needs::Sm90a, 128, inp, expected);
    Case { dynamic_shared_bytes: bytes, ..case }
}
