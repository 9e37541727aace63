//! What kernels can reach: buffers in global memory, a launch's parameters, and the shared memory
//! of blocks. Every access is checked: it lies in one buffer, at a multiple of its size.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;

/// Set in a generic address of shared memory, and in one of a parameter; neither is an address that
/// a program has. Bit 31 is there so that a generic address that was only cut to 32 bits is none.
pub const SHARED_WINDOW: u64 = 1 << 62 | 1 << 31;
pub const PARAMETER_WINDOW: u64 = 1 << 61;

/// Bits of an address in a block's shared memory; above them the rank of a block in its cluster,
/// plus one, or 0 for the block itself.
const OFFSET_BITS: u32 = 24;

/// Of a generic address.
pub fn to_shared(address: u64) -> u64 {
    address & 0x7fff_ffff
}

/// The address of the same variable in block `rank`.
pub fn of_rank(address: u64, rank: u64) -> u64 {
    let offset = (1 << OFFSET_BITS) - 1;
    address & (!0x7fff_ffff | offset) | (rank + 1) << OFFSET_BITS
}

/// The rank that a shared address names, and its offset there.
pub fn rank_and_offset(address: u64) -> (Option<usize>, u32) {
    let rank = (address & 0xffff_ffff) >> OFFSET_BITS;
    (rank.checked_sub(1).map(|rank| rank as usize), address as u32 & ((1 << OFFSET_BITS) - 1))
}

/// The buffers of a machine; they lie where this program has allocated them.
#[derive(Default)]
pub struct Global {
    /// Bytes and label by address.
    buffers: BTreeMap<u64, (*mut [Unit], u64, String)>,
    /// The buffer of the last access.
    last: Cell<(u64, u64)>,
}

/// So that a buffer begins at a multiple of 256.
#[derive(Clone, Copy)]
#[repr(align(256))]
struct Unit(#[allow(dead_code, reason = "read through addresses")] [u8; 256]);

impl Global {
    /// Every byte is 0xff, which makes NaNs. `None`: there is no such memory.
    pub fn allocate(&mut self, bytes: u64, label: &str) -> Option<u64> {
        let (count, mut units) = (bytes.div_ceil(256) as usize, vec![]);
        units.try_reserve_exact(count).ok()?;
        units.resize(count, Unit([0xff; 256]));
        let units = Box::into_raw(units.into_boxed_slice());
        let address = units.cast::<u8>().expose_provenance() as u64;
        self.buffers.insert(address, (units, bytes, label.to_string()));
        Some(address)
    }

    pub fn free(&mut self, address: u64) {
        self.last.set((0, 0));
        if let Some((units, ..)) = self.buffers.remove(&address) {
            // SAFETY: it came from `Box::into_raw` and is in no table any more.
            drop(unsafe { Box::from_raw(units) });
        }
    }

    fn check(&self, address: u64, bytes: usize) -> Result<(), String> {
        let inside = |(start, end): (u64, u64)| {
            address >= start && address.checked_add(bytes as u64).is_some_and(|it| it <= end)
        };
        if !inside(self.last.get()) {
            let nearest = self.buffers.range(..=address).next_back();
            let range = nearest.map(|(&start, (_, bytes, _))| (start, start + bytes));
            if !range.is_some_and(inside) {
                let near = nearest.map_or("no buffer".to_string(), |(start, (_, bytes, label))| {
                    format!("`{label}`, {bytes} bytes, at byte {}", address - start)
                });
                return Err(format!("{bytes} bytes at {address:#x}: nearest is {near}"));
            }
            self.last.set(range.unwrap_or_default());
        }
        Ok(())
    }

    pub fn read(&self, address: u64, to: &mut [u8]) -> Result<(), String> {
        self.check(address, to.len())?;
        // SAFETY: the range lies in one of our buffers, which no reference points into.
        unsafe {
            let from = std::ptr::with_exposed_provenance(address as usize);
            std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len());
        }
        Ok(())
    }

    pub fn write(&self, address: u64, from: &[u8]) -> Result<(), String> {
        self.check(address, from.len())?;
        // SAFETY: as above; the buffers belong to this machine and nobody else reads them now.
        unsafe {
            let to = std::ptr::with_exposed_provenance_mut(address as usize);
            std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
        }
        Ok(())
    }
}

impl Drop for Global {
    fn drop(&mut self) {
        let addresses: Vec<u64> = self.buffers.keys().copied().collect();
        addresses.into_iter().for_each(|address| self.free(address));
    }
}

pub fn aligned(address: u64, bytes: u32) -> Result<(), String> {
    match address.is_multiple_of(u64::from(bytes)) {
        true => Ok(()),
        false => Err(format!("address {address:#x} is no multiple of {bytes}")),
    }
}

/// What the system keeps for itself at the beginning of a block's shared memory.
pub const RESERVED_SHARED_BYTES: u32 = 1024;

/// A range of shared memory. Errors: it lies outside, or in what is the system's.
pub fn shared_range(shared: &[u8], at: u32, bytes: u32) -> Result<Range<usize>, String> {
    match at >= RESERVED_SHARED_BYTES {
        true => range(shared, at, bytes),
        false => Err(format!("{bytes} bytes at {at} of shared memory, which are the system's")),
    }
}

/// A range of some memory. Errors: it lies outside.
pub fn range(memory: &[u8], at: u32, bytes: u32) -> Result<Range<usize>, String> {
    let (from, to) = (at as usize, at as usize + bytes as usize);
    match to <= memory.len() {
        true => Ok(from..to),
        false => Err(format!("{bytes} bytes at {at} of {}", memory.len())),
    }
}

// ------------------------------------------------------------------ barriers in shared memory

/// An mbarrier object as it lies in shared memory (PTX ISA 9.0, section 9.7.13.15): our own form,
/// with a mark so that bytes which are none are noticed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Mbarrier {
    /// Completed phases, modulo 2.
    pub parity: u64,
    pub expected: u64,
    pub pending: u64,
    /// Bytes of copies that are expected and have not come yet; less than none if they came first.
    pub bytes: i64,
}

const MARK: u64 = 0b101;
const COUNT_BITS: u32 = 19;
const BYTES_BITS: u32 = 21;

impl Mbarrier {
    pub fn new(count: u64) -> Result<Self, String> {
        match (1..1 << COUNT_BITS).contains(&count) {
            true => Ok(Mbarrier { parity: 0, expected: count, pending: count, bytes: 0 }),
            false => Err(format!("an mbarrier for {count} arrivals")),
        }
    }

    pub fn of_bits(bits: u64) -> Result<Self, String> {
        if bits >> 61 != MARK {
            return Err(format!("there is no mbarrier here, but {bits:#018x}"));
        }
        let count = (1 << COUNT_BITS) - 1;
        let bytes = (bits >> (2 * COUNT_BITS)) & ((1 << BYTES_BITS) - 1);
        Ok(Mbarrier {
            parity: bits >> (2 * COUNT_BITS + BYTES_BITS) & 1,
            expected: bits & count,
            pending: bits >> COUNT_BITS & count,
            bytes: bytes as i64 - (1 << (BYTES_BITS - 1)),
        })
    }

    pub fn bits(self) -> u64 {
        let bytes = (self.bytes + (1 << (BYTES_BITS - 1))) as u64;
        MARK << 61
            | self.parity << (2 * COUNT_BITS + BYTES_BITS)
            | bytes << (2 * COUNT_BITS)
            | self.pending << COUNT_BITS
            | self.expected
    }

    pub fn expect(self, bytes: i64) -> Result<Self, String> {
        let bytes = self.bytes + bytes;
        match bytes.abs() < 1 << (BYTES_BITS - 1) {
            true => Ok(Mbarrier { bytes, ..self }),
            false => Err(format!("an mbarrier waits for {bytes} bytes")),
        }
    }

    pub fn arrive(self) -> Result<Self, String> {
        match self.pending.checked_sub(1) {
            Some(pending) => Ok(Mbarrier { pending, ..self }),
            None => {
                Err(format!("more arrivals than the {} of this mbarrier's phase", self.expected))
            }
        }
    }

    /// The next phase, if this one is over.
    pub fn completed(self) -> Self {
        match (self.pending, self.bytes) {
            (0, 0) => Mbarrier { parity: self.parity ^ 1, pending: self.expected, ..self },
            _ => self,
        }
    }
}
