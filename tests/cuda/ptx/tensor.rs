//! Tensor maps in tiled mode as pure functions: what `cuTensorMapEncodeTiled` keeps, and which
//! bytes `cp.async.bulk.tensor` moves between global and shared memory. Written from the CUDA
//! driver API (`cuTensorMapEncodeTiled`), the CUDA programming guide (swizzling) and PTX ISA
//! section 5.5 "Tensors".

/// Marks the 128 bytes of an encoded map; no part of any NVIDIA format.
const MAGIC: u64 = 0x6d61_705f_7465_7374;

/// What `cuTensorMapEncodeTiled` keeps (no interleave, element strides 1).
#[derive(Clone, PartialEq, Debug)]
pub struct Map {
    pub element_bytes: u32,
    /// The number in `CUtensorMapDataType`.
    pub kind: u32,
    pub address: u64,
    /// In elements, innermost first.
    pub dimensions: Vec<u64>,
    /// Of dimensions 1 and up.
    pub stride_bytes: Vec<u64>,
    /// In elements, innermost first.
    pub box_dimensions: Vec<u32>,
    /// 0, 32, 64 or 128.
    pub swizzle_bytes: u32,
    /// Elements outside of the tensor read as NaN instead of 0.
    pub nan_fill: bool,
}

/// Sixteen bytes of a box.
#[derive(Clone, PartialEq, Debug)]
pub struct Chunk {
    /// Shared-memory address, after swizzling.
    pub shared: u32,
    /// Global address of the first byte; where that lies outside of the tensor, the address it
    /// would have (wrapping).
    pub global: u64,
    /// Which of the 16 bytes lie inside of the tensor; 0..0 if none.
    pub inside: std::ops::Range<u32>,
}

/// Element size and whether it is a floating-point type, of a `CUtensorMapDataType`: UINT8,
/// UINT16, UINT32, INT32, UINT64, INT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16, FLOAT32_FTZ,
/// TFLOAT32, TFLOAT32_FTZ in this order from 0 on.
fn data_type(kind: u32) -> Option<(u32, bool)> {
    const TYPES: [(u32, bool); 13] = [
        (1, false),
        (2, false),
        (4, false),
        (4, false),
        (8, false),
        (8, false),
        (2, true),
        (4, true),
        (8, true),
        (2, true),
        (4, true),
        (4, true),
        (4, true),
    ];
    TYPES.get(kind as usize).copied()
}

impl Map {
    /// The requirements of `cuTensorMapEncodeTiled` (CUDA driver API, "Tensor Map Object
    /// Management"), without interleave and with element strides 1.
    ///
    /// The programming guide also wants global memory aligned to 128 bytes under a swizzle; the
    /// driver API asks for 16, and that is checked.
    pub fn check(&self) -> Result<(), String> {
        let Some((size, floating)) = data_type(self.kind) else {
            return Err(format!("data type {} is none of CUtensorMapDataType", self.kind));
        };
        if size != self.element_bytes {
            return Err(format!("element bytes {}, but {size} by the type", self.element_bytes));
        }
        if self.nan_fill && !floating {
            return Err("NaN fill for a type that is not floating point".to_string());
        }
        let rank = self.dimensions.len();
        if !(1..=5).contains(&rank) {
            return Err(format!("rank {rank} is not 1 to 5"));
        }
        if self.stride_bytes.len() != rank - 1 || self.box_dimensions.len() != rank {
            return Err(format!(
                "rank {rank} with {} strides and {} box dimensions",
                self.stride_bytes.len(),
                self.box_dimensions.len()
            ));
        }
        if !self.address.is_multiple_of(16) {
            return Err(format!("global address {:#x} not aligned to 16 bytes", self.address));
        }
        if let Some(size) = self.dimensions.iter().find(|size| !(1..=1 << 32).contains(*size)) {
            return Err(format!("dimension {size} is not 1 to 2^32"));
        }
        if let Some(stride) = self
            .stride_bytes
            .iter()
            .find(|stride| !stride.is_multiple_of(16) || **stride >= 1 << 40)
        {
            return Err(format!("stride {stride} is not a multiple of 16 below 2^40"));
        }
        if let Some(size) = self.box_dimensions.iter().find(|size| !(1..=256).contains(*size)) {
            return Err(format!("box dimension {size} is not 1 to 256"));
        }
        let row_bytes = self.box_dimensions[0] * self.element_bytes;
        if !row_bytes.is_multiple_of(16) {
            return Err(format!("box rows of {row_bytes} bytes are no multiple of 16"));
        }
        match self.swizzle_bytes {
            0 => Ok(()),
            32 | 64 | 128 if row_bytes > self.swizzle_bytes => Err(format!(
                "box rows of {row_bytes} bytes do not fit swizzle {}",
                self.swizzle_bytes
            )),
            32 | 64 | 128 => Ok(()),
            other => Err(format!("swizzle {other} is not 0, 32, 64 or 128")),
        }
    }

    /// 128 opaque bytes, as PTX ISA section 5.5.8 "Tensor-map" has it; the format is our own. It
    /// starts with a magic word and ends with a check word, so that bytes that are no map, or a
    /// map that was partly overwritten, are refused.
    ///
    /// Panics if the map has more than five dimensions.
    pub fn encode(&self) -> [u64; 16] {
        assert!(self.dimensions.len() <= 5, "rank above 5");
        assert!(self.stride_bytes.len() <= 4, "more than 4 strides");
        assert!(self.box_dimensions.len() <= 5, "more than 5 box dimensions");
        let mut words = [0u64; 16];
        words[0] = MAGIC;
        words[1] = self.dimensions.len() as u64
            | (self.stride_bytes.len() as u64) << 8
            | (self.box_dimensions.len() as u64) << 16
            | u64::from(self.nan_fill) << 24
            | u64::from(self.swizzle_bytes) << 32;
        words[2] = u64::from(self.element_bytes) | u64::from(self.kind) << 32;
        words[3] = self.address;
        words[4..4 + self.dimensions.len()].copy_from_slice(&self.dimensions);
        words[9..9 + self.stride_bytes.len()].copy_from_slice(&self.stride_bytes);
        // Box dimensions are at most 256, so that nine bits each suffice; twelve are kept.
        for (index, size) in self.box_dimensions.iter().enumerate() {
            assert!(*size < 1 << 12, "box dimension {size}");
            words[13] |= u64::from(*size) << (12 * index);
        }
        words[15] = check_word(&words);
        words
    }

    /// The map of [`Map::encode`]'s words; an error if they are none or if the map breaks a
    /// requirement of `cuTensorMapEncodeTiled`.
    pub fn decode(words: &[u64; 16]) -> Result<Map, String> {
        if words[0] != MAGIC {
            return Err(format!("first word {:#018x}: no encoded tensor map", words[0]));
        }
        if words[15] != check_word(words) {
            return Err("encoded tensor map was changed".to_string());
        }
        let length = |shift: u32| ((words[1] >> shift) & 0xff) as usize;
        let (rank, strides, boxes) = (length(0), length(8), length(16));
        if rank > 5 || strides > 4 || boxes > 5 {
            return Err("encoded tensor map of more than 5 dimensions".to_string());
        }
        let map = Map {
            element_bytes: words[2] as u32,
            kind: (words[2] >> 32) as u32,
            address: words[3],
            dimensions: words[4..4 + rank].to_vec(),
            stride_bytes: words[9..9 + strides].to_vec(),
            box_dimensions: (0..boxes)
                .map(|index| ((words[13] >> (12 * index)) & 0xfff) as u32)
                .collect(),
            swizzle_bytes: (words[1] >> 32) as u32,
            nan_fill: (words[1] >> 24) & 1 != 0,
        };
        map.check()?;
        Ok(map)
    }

    /// Bytes of a whole box, which is also what a load counts at its mbarrier, elements outside
    /// of the tensor included.
    pub fn box_bytes(&self) -> u32 {
        self.box_dimensions.iter().product::<u32>() * self.element_bytes
    }

    /// The 16-byte chunks of the box at `coordinates` (innermost first, may be negative), laid out
    /// densely from shared-memory address `at` on, innermost dimension fastest, in the order of
    /// the addresses before swizzling.
    ///
    /// PTX ISA 5.5.3 "Tiled Mode" (bounding box, out of boundary access): an element is outside if
    /// its coordinate is outside in any dimension. Only the sizes count, not the strides: an
    /// element past the end of a row is outside even where its address lies in the next row.
    ///
    /// PTX ISA 5.5.7 "Swizzling Modes": the tables move 16-byte chunks within lines of 128 bytes,
    /// for a start address aligned to 1024, 512 or 256 bytes (128B, 64B, 32B mode); for others a
    /// base offset (at / 128) % 8, % 4 or % 2 is added to the number of the line. Both together
    /// make the position a function of the absolute shared-memory address: bits 4-6 are xored with
    /// bits 7-9 (128B), bits 4-5 with 7-8 (64B), bit 4 with bit 7 (32B).
    ///
    /// Errors: wrong number of coordinates; a map that [`Map::check`] refuses; `at` not aligned to
    /// 128 bytes, which the programming guide requires in all modes (also swizzled ones: there the
    /// 1024, 512 or 256 bytes are a recommendation "for simplicity", the instruction works without,
    /// though a wgmma descriptor with base offset 0 needs them); rows shorter than the swizzle,
    /// for which "ensure that the shared memory is allocated to accommodate the full swizzle
    /// width" in the guide speaks against a dense layout, but nothing states the layout.
    pub fn chunks(&self, coordinates: &[i32], at: u32) -> Result<Vec<Chunk>, String> {
        self.check()?;
        let rank = self.dimensions.len();
        if coordinates.len() != rank {
            return Err(format!("{} coordinates for rank {rank}", coordinates.len()));
        }
        if !at.is_multiple_of(128) {
            return Err(format!("shared-memory address {at:#x} not aligned to 128 bytes"));
        }
        let row_bytes = self.box_dimensions[0] * self.element_bytes;
        if self.swizzle_bytes != 0 && row_bytes != self.swizzle_bytes {
            return Err(format!(
                "box rows of {row_bytes} bytes with swizzle {}: layout not documented",
                self.swizzle_bytes
            ));
        }
        if at.checked_add(self.box_bytes()).is_none() {
            return Err(format!("box at shared-memory address {at:#x} wraps around"));
        }
        let mut chunks = Vec::with_capacity((self.box_bytes() / 16) as usize);
        let rows: u32 = self.box_dimensions[1..].iter().product();
        for row in 0..rows {
            // Coordinates of this row in dimensions 1 and up, first as position in the box.
            let mut rest = row;
            let mut row_inside = true;
            let mut row_address = self.address;
            for (dimension, start) in coordinates.iter().enumerate().skip(1) {
                let position = rest % self.box_dimensions[dimension];
                rest /= self.box_dimensions[dimension];
                let coordinate = i64::from(*start) + i64::from(position);
                row_inside &= (0..self.dimensions[dimension] as i64).contains(&coordinate);
                let stride = self.stride_bytes[dimension - 1];
                row_address = row_address.wrapping_add((coordinate as u64).wrapping_mul(stride));
            }
            // Byte offsets in the row of the tensor, at most 2^35 in size.
            let first = i64::from(coordinates[0]) * i64::from(self.element_bytes);
            let end = self.dimensions[0] as i64 * i64::from(self.element_bytes);
            for position in (0..row_bytes).step_by(16) {
                let byte = first + i64::from(position);
                let low = (-byte).clamp(0, 16) as u32;
                let high = (end - byte).clamp(0, 16) as u32;
                chunks.push(Chunk {
                    shared: self.swizzle(at + row * row_bytes + position),
                    global: row_address.wrapping_add(byte as u64),
                    inside: if row_inside && low < high { low..high } else { 0..0 },
                });
            }
        }
        Ok(chunks)
    }

    /// Where the swizzle puts the 16-byte chunk at a shared-memory address; see [`Map::chunks`].
    fn swizzle(&self, address: u32) -> u32 {
        let line = address / 128;
        let flip = match self.swizzle_bytes {
            128 => line % 8,
            64 => line % 4,
            32 => line % 2,
            _ => 0,
        };
        address ^ (flip * 16)
    }
}

/// FNV-1a over all words but the last.
fn check_word(words: &[u64; 16]) -> u64 {
    words[..15]
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ word).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// bf16, with rows `pitch` bytes apart.
    fn map(dimensions: &[u64], strides: &[u64], boxes: &[u32], swizzle_bytes: u32) -> Map {
        Map {
            element_bytes: 2,
            kind: 9,
            address: 0x10_0000,
            dimensions: dimensions.to_vec(),
            stride_bytes: strides.to_vec(),
            box_dimensions: boxes.to_vec(),
            swizzle_bytes,
            nan_fill: false,
        }
    }

    #[test]
    fn encoding_is_reversible_and_guarded() {
        let mut example = map(&[1 << 32, 7, 3], &[1 << 39, 16], &[64, 256, 2], 128);
        example.nan_fill = true;
        let words = example.encode();
        assert_eq!(Map::decode(&words), Ok(example));
        let flat = map(&[100], &[], &[8], 0);
        assert_eq!(Map::decode(&flat.encode()), Ok(flat));
        for word in 0..16 {
            for bit in [0, 9, 40] {
                let mut changed = words;
                changed[word] ^= 1 << bit;
                assert!(Map::decode(&changed).is_err(), "word {word} bit {bit}");
            }
        }
        assert!(Map::decode(&[0; 16]).is_err());
    }

    #[test]
    fn requirements() {
        let good = map(&[64, 64], &[128], &[64, 8], 128);
        assert_eq!(good.check(), Ok(()));
        type Change = fn(&mut Map);
        let changes: [(Change, &str); 13] = [
            (|m| m.element_bytes = 4, "element bytes"),
            (|m| m.kind = 13, "data type"),
            (|m| m.address += 8, "global address"),
            (|m| m.dimensions[1] = 0, "dimension 0"),
            (|m| m.dimensions[0] = (1 << 32) + 1, "dimension"),
            (|m| m.stride_bytes[0] = 136, "stride 136"),
            (|m| m.stride_bytes[0] = 1 << 40, "stride"),
            (|m| m.stride_bytes.push(16), "rank 2"),
            (|m| m.box_dimensions[1] = 257, "box dimension 257"),
            (|m| m.box_dimensions[0] = 60, "multiple of 16"),
            (|m| m.box_dimensions[0] = 128, "do not fit"),
            (|m| m.swizzle_bytes = 96, "swizzle 96"),
            (|m| (m.kind, m.nan_fill) = (1, true), "NaN"),
        ];
        for (change, part) in changes {
            let mut changed = good.clone();
            change(&mut changed);
            let message = changed.check().err().unwrap();
            assert!(message.contains(part), "{message:?} does not say {part:?}");
            assert!(changed.chunks(&[0, 0], 0).is_err());
        }
        let error = |coordinates: &[i32], at| good.chunks(coordinates, at).err().unwrap();
        assert!(error(&[0], 0).contains("rank"));
        assert!(error(&[0, 0], 64).contains("128 bytes"));
        assert!(error(&[0, 0], 0xffff_ff80).contains("wraps"));
        let narrow = map(&[64, 64], &[128], &[32, 8], 128);
        assert!(narrow.chunks(&[0, 0], 0).err().unwrap().contains("not documented"));
    }

    /// The chunks as the box's elements: for each position of the box, the global address or none
    /// where outside, found through shared memory addresses counted from `at`.
    fn elements(map: &Map, coordinates: &[i32], at: u32) -> Vec<Option<u64>> {
        let chunks = map.chunks(coordinates, at).unwrap();
        assert_eq!(chunks.len() as u32 * 16, map.box_bytes());
        let mut found = vec![None; (map.box_bytes() / map.element_bytes) as usize];
        let mut seen = vec![false; chunks.len()];
        for chunk in chunks {
            let offset = chunk.shared - at;
            assert!(!std::mem::replace(&mut seen[offset as usize / 16], true));
            for byte in chunk.inside.step_by(map.element_bytes as usize) {
                let index = (offset + byte) / map.element_bytes;
                found[index as usize] = Some(chunk.global + u64::from(byte));
            }
        }
        found
    }

    /// Against a loop over all elements of the tensor, in three dimensions with padded strides.
    #[test]
    fn boxes_over_every_edge() {
        let tensor = map(&[20, 5, 3], &[48, 320], &[16, 4, 2], 0);
        for x in [-40, -17, -16, -3, 0, 1, 8, 17, 20, 30] {
            for y in [-5, -2, 0, 3, 5] {
                for z in [-2, -1, 0, 2, 3] {
                    let found = elements(&tensor, &[x, y, z], 1024);
                    let mut expected = vec![None; 16 * 4 * 2];
                    for (c, b, a) in (0..3 * 5 * 20).map(|i| (i / 100, i / 20 % 5, i % 20)) {
                        let (i, j, k) = (a - x, b - y, c - z);
                        if (0..16).contains(&i) && (0..4).contains(&j) && (0..2).contains(&k) {
                            expected[(i + 16 * (j + 4 * k)) as usize] =
                                Some(0x10_0000 + (a * 2 + b * 48 + c * 320) as u64);
                        }
                    }
                    assert_eq!(found, expected, "box at {x}, {y}, {z}");
                }
            }
        }
    }

    #[test]
    fn addresses_outside_wrap() {
        let mut tensor = map(&[64, 4], &[128], &[8, 1], 0);
        tensor.address = 0;
        let chunks = tensor.chunks(&[-8, -1], 0).unwrap();
        let outside = Chunk { shared: 0, global: 0u64.wrapping_sub(144), inside: 0..0 };
        assert_eq!(chunks, [outside]);
        // Partly outside at both ends of the row.
        assert_eq!(tensor.chunks(&[-3, 1], 0).unwrap()[0].inside, 6..16);
        assert_eq!(tensor.chunks(&[59, 1], 0).unwrap()[0].inside, 0..10);
    }

    /// The tables of PTX ISA 5.5.7, for an aligned start: chunks of each line of 128 bytes.
    #[test]
    fn swizzle_tables() {
        let tables: [(u32, &[[u64; 8]]); 4] = [
            (0, &[[0, 1, 2, 3, 4, 5, 6, 7]]),
            (32, &[[0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6]]),
            (
                64,
                &[
                    [0, 1, 2, 3, 4, 5, 6, 7],
                    [1, 0, 3, 2, 5, 4, 7, 6],
                    [2, 3, 0, 1, 6, 7, 4, 5],
                    [3, 2, 1, 0, 7, 6, 5, 4],
                ],
            ),
            (
                128,
                &[
                    [0, 1, 2, 3, 4, 5, 6, 7],
                    [1, 0, 3, 2, 5, 4, 7, 6],
                    [2, 3, 0, 1, 6, 7, 4, 5],
                    [3, 2, 1, 0, 7, 6, 5, 4],
                    [4, 5, 6, 7, 0, 1, 2, 3],
                    [5, 4, 7, 6, 1, 0, 3, 2],
                    [6, 7, 4, 5, 2, 3, 0, 1],
                    [7, 6, 5, 4, 3, 2, 1, 0],
                ],
            ),
        ];
        for (swizzle, table) in tables {
            // The whole tensor is one box without gaps, so that a global offset is the offset
            // in shared memory before swizzling.
            let row_bytes = if swizzle == 0 { 128 } else { swizzle };
            let rows = 2048 / row_bytes;
            let tensor = map(
                &[u64::from(row_bytes / 2), u64::from(rows)],
                &[u64::from(row_bytes)],
                &[row_bytes / 2, rows],
                swizzle,
            );
            // Starts that are aligned to 1024 bytes, and others: there the guide adds the
            // number of the start line to the line, which the same table shows from another line.
            for at in [0, 1024, 128, 2048 + 384, 896] {
                let offset = at as usize / 128 % table.len();
                for chunk in tensor.chunks(&[0, 0], at).unwrap() {
                    let place = (chunk.shared - at) as usize / 16;
                    let source = (chunk.global - 0x10_0000) / 16;
                    let line = &table[(place / 8 + offset) % table.len()];
                    assert_eq!(source, (place / 8 * 8) as u64 + line[place % 8]);
                    assert_eq!(chunk.inside, 0..16);
                }
            }
        }
    }

    #[test]
    fn box_bytes_counts_everything() {
        assert_eq!(map(&[64, 64], &[128], &[64, 64], 128).box_bytes(), 8192);
        assert_eq!(map(&[1, 1, 1], &[16, 16], &[8, 3, 5], 0).box_bytes(), 240);
    }
}
