//! What one thread does alone, and most of which goes on behind its back: mbarriers, cp.async, bulk
//! copies and TMA.

use super::arithmetic::bf16;
use super::code::{Address, Op, Reduce};
use super::instructions::{address, coordinates_of};
use super::memory::{Mbarrier, PARAMETER_WINDOW, aligned, range, shared_range};
use super::run::{Load, Location, Result, Run, Source};
use super::tensor::Map;
use super::warp::{BulkStore, Copy, Target, Warp};

impl Run<'_> {
    // -------------------------------------------------------------- of one thread

    /// False: a barrier that is not ready.
    pub fn alone(&mut self, warp: &mut Warp, op: &Op, lane: usize) -> Result<bool> {
        match op {
            Op::MbarrierInit { at, count } => {
                let at = self.own_place(address(warp, at, lane))?;
                if self.mbarrier(warp.block, at).is_ok() {
                    return Err("there is an mbarrier already".to_string());
                }
                let barrier = Mbarrier::new(warp.value(*count, lane))?;
                self.set_mbarrier(warp.block, at, barrier)?;
            }
            Op::MbarrierInvalidate { at } => {
                let at = self.own_place(address(warp, at, lane))?;
                self.mbarrier(warp.block, at)?;
                self.put(Location::Shared(warp.block, at), &[0xff; 8])?;
            }
            Op::MbarrierArrive { space, at, expected } => {
                let at = self.locate(warp, *space, address(warp, at, lane))?;
                let Location::Shared(block, at) = at else {
                    return Err("an mbarrier that is not in shared memory".to_string());
                };
                let bytes = expected.map_or(0, |bytes| warp.value(bytes, lane) as i64);
                let barrier = self.mbarrier(block, at)?.expect(bytes)?.arrive()?;
                self.set_mbarrier(block, at, barrier)?;
            }
            Op::MbarrierExpect { at, bytes } => {
                let at = self.own_place(address(warp, at, lane))?;
                let bytes = warp.value(*bytes, lane) as i64;
                let barrier = self.mbarrier(warp.block, at)?.expect(bytes)?;
                self.set_mbarrier(warp.block, at, barrier)?;
            }
            Op::MbarrierTryWait { to, at, parity } => {
                let at = self.own_place(address(warp, at, lane))?;
                let parity = warp.value(*parity, lane);
                if parity > 1 {
                    return Err(format!("a parity of {parity}"));
                }
                let done = self.mbarrier(warp.block, at)?.parity != parity;
                warp.set(*to, lane, u64::from(done));
                return Ok(done);
            }
            Op::CopyAsync { to, from, bytes, of_source } => {
                let to = self.own_place(address(warp, to, lane))?;
                let from = address(warp, from, lane);
                aligned(from, *bytes)?;
                aligned(u64::from(to), *bytes)?;
                let of_source = of_source.map_or(*bytes, |it| warp.value(it, lane) as u32);
                if of_source > *bytes {
                    return Err(format!("{of_source} of {bytes} bytes"));
                }
                let copy = Copy { to, from, bytes: *bytes, of_source };
                // It may be over at once, or at its wait.
                match self.random.below(4) {
                    0 => self.copy(warp.block, &copy)?,
                    _ => warp.copies[lane].open.push(copy),
                }
            }
            Op::CopyCommit => warp.copies[lane].commit(),
            Op::CopyWait { groups } => {
                for copy in warp.copies[lane].older_than(*groups) {
                    self.copy(warp.block, &copy)?;
                }
            }
            Op::BulkCommit => {
                warp.stores[lane].commit();
                // It may be over at once.
                if self.random.below(3) == 0
                    && let Some(mut stores) = warp.stores[lane].committed.pop_back()
                {
                    for store in &mut stores {
                        self.read_of(warp.block, store)?;
                    }
                    warp.stores[lane].committed.push_back(stores);
                }
            }
            Op::BulkWait { groups, read } => {
                let count = warp.stores[lane].committed.len().saturating_sub(*groups);
                if *read {
                    for index in 0..count {
                        let mut stores = std::mem::take(&mut warp.stores[lane].committed[index]);
                        for store in &mut stores {
                            self.read_of(warp.block, store)?;
                        }
                        warp.stores[lane].committed[index] = stores;
                    }
                } else {
                    for mut store in warp.stores[lane].older_than(*groups) {
                        self.read_of(warp.block, &mut store)?;
                        self.write(&store)?;
                    }
                }
            }
            Op::BulkLoad { to, from, bytes, barrier, blocks } => {
                let (from, bytes) = (address(warp, from, lane), warp.value(*bytes, lane) as u32);
                aligned(from, 16)?;
                let blocks = blocks.map(|it| warp.value(it, lane));
                self.begin_load(warp, lane, (to, bytes), Source::Range(from), barrier, blocks)?;
            }
            Op::BulkToBlock { to, from, bytes, barrier } => {
                let bytes = warp.value(*bytes, lane) as u32;
                let (from, to) = (address(warp, from, lane), address(warp, to, lane));
                let (source, from) = (warp.block, self.own_place(from)?);
                let (block, to) = self.shared_place(warp, to)?;
                let (of_barrier, barrier) =
                    self.shared_place(warp, address(warp, barrier, lane))?;
                if of_barrier != block {
                    return Err("the barrier is not in the block of the target".to_string());
                }
                self.push_load(vec![block], Source::Shared(source, from), to, bytes, barrier)?;
            }
            Op::TensorLoad { to, map, coordinates, barrier, blocks } => {
                let map = self.map(warp.value(*map, lane))?;
                let at = self.shared_place(warp, address(warp, to, lane))?.1;
                let chunks = map.chunks(&coordinates_of(warp, coordinates, lane), at)?;
                let fill = map.nan_fill.then_some(match map.element_bytes {
                    2 => &[0xff, 0x7f][..],
                    4 => &[0xff, 0xff, 0xff, 0x7f],
                    _ => return Err("NaNs of this type".to_string()),
                });
                let blocks = blocks.map(|it| warp.value(it, lane));
                let source = Source::Chunks(chunks, fill);
                self.begin_load(warp, lane, (to, map.box_bytes()), source, barrier, blocks)?;
            }
            Op::BulkStore { to, from, bytes, reduce } => {
                let (to, bytes) = (address(warp, to, lane), warp.value(*bytes, lane) as u32);
                aligned(to, 16)?;
                aligned(u64::from(bytes), 16)?;
                let target = match reduce {
                    None => Target::Range(to),
                    Some(Reduce::F32) => Target::AddF32(to),
                    Some(Reduce::Bf16) => Target::AddBf16(to),
                };
                self.begin_store(warp, lane, from, bytes, target)?;
            }
            Op::TensorStore { map, coordinates, from, add } => {
                let map = self.map(warp.value(*map, lane))?;
                let at = self.own_place(address(warp, from, lane))?;
                let chunks = map.chunks(&coordinates_of(warp, coordinates, lane), at)?;
                if *add && map.element_bytes != 4 {
                    return Err("only fp32 is added here".to_string());
                }
                let target = if *add { Target::AddBox(chunks) } else { Target::Box(chunks) };
                self.begin_store(warp, lane, from, map.box_bytes(), target)?;
            }
            _ => return Err("this instruction is of whole warps".to_string()),
        }
        Ok(true)
    }

    // -------------------------------------------------------------- barriers of copies

    fn mbarrier(&self, block: usize, at: u32) -> Result<Mbarrier> {
        let mut bits = [0; 8];
        self.read(Location::Shared(block, at), &mut bits)?;
        Mbarrier::of_bits(u64::from_le_bytes(bits))
    }

    fn set_mbarrier(&mut self, block: usize, at: u32, barrier: Mbarrier) -> Result<()> {
        self.put(Location::Shared(block, at), &barrier.completed().bits().to_le_bytes())
    }

    // -------------------------------------------------------------- copies

    pub fn copy(&mut self, block: usize, copy: &Copy) -> Result<()> {
        let mut values = [0; 16];
        if copy.of_source > 0 {
            self.memory.read(copy.from, &mut values[..copy.of_source as usize])?;
        }
        self.put(Location::Shared(block, copy.to), &values[..copy.bytes as usize])
    }

    /// The tensor map at a generic address.
    fn map(&self, address: u64) -> Result<Map> {
        if address & PARAMETER_WINDOW == 0 {
            return Err("a tensor map that is no parameter".to_string());
        }
        aligned(address, 64)?;
        let at = address as u32;
        let bytes = &self.parameters[range(self.parameters, at, 128)?];
        let mut words = [0; 16];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        }
        Map::decode(&words)
    }

    /// To the block itself, or to those whose ranks `blocks` has bits for.
    fn begin_load(
        &mut self,
        warp: &Warp,
        lane: usize,
        (to, bytes): (&Address, u32),
        source: Source,
        barrier: &Address,
        blocks: Option<u64>,
    ) -> Result<()> {
        let (own, to) = self.shared_place(warp, address(warp, to, lane))?;
        let (of_barrier, barrier) = self.shared_place(warp, address(warp, barrier, lane))?;
        if of_barrier != own {
            return Err("the barrier is not in the block of the target".to_string());
        }
        let cluster = &self.clusters[self.blocks[warp.block].cluster];
        let blocks: Vec<usize> = match blocks {
            None => vec![own],
            Some(ranks) if ranks >> cluster.blocks != 0 || ranks == 0 => {
                return Err(format!("blocks {ranks:#b} of a cluster of {}", cluster.blocks));
            }
            Some(ranks) => (0..cluster.blocks)
                .filter(|it| ranks >> it & 1 == 1)
                .map(|it| cluster.first + it)
                .collect(),
        };
        self.push_load(blocks, source, to, bytes, barrier)
    }

    fn push_load(
        &mut self,
        blocks: Vec<usize>,
        source: Source,
        to: u32,
        bytes: u32,
        barrier: u32,
    ) -> Result<()> {
        aligned(u64::from(to), 16)?;
        aligned(u64::from(bytes), 16)?;
        self.loads.push(Load { blocks, source, to, bytes, barrier, place: self.place });
        Ok(())
    }

    pub fn end_load(&mut self, index: usize) -> Result<()> {
        let load = self.loads.swap_remove(index);
        let begun = self.describe(load.place);
        let (kernel, index) = (&self.kernel.name, self.blocks[load.blocks[0]].index);
        let named = |why: String| format!("kernel {kernel}, block {index:?}, {begun}: {why}");
        self.progress = true;
        let mut values = vec![0; load.bytes as usize];
        match &load.source {
            Source::Range(from) => self.memory.read(*from, &mut values).map_err(named)?,
            Source::Shared(block, from) => {
                let shared = &self.blocks[*block].shared;
                let range = shared_range(shared, *from, load.bytes).map_err(named)?;
                values.copy_from_slice(&shared[range]);
            }
            Source::Chunks(..) => {}
        }
        for &block in &load.blocks {
            if self.blocks[block].live_warps == 0 {
                return Err(named("the block has ended".to_string()));
            }
            let shared = &mut self.blocks[block].shared;
            match &load.source {
                Source::Chunks(chunks, fill) => {
                    for chunk in chunks {
                        let mut values = [0; 16];
                        if let Some(fill) = fill {
                            let fill = fill.iter().cycle();
                            values.iter_mut().zip(fill).for_each(|(to, from)| *to = *from);
                        }
                        let (from, to) = (chunk.inside.start as usize, chunk.inside.end as usize);
                        if from < to {
                            let at = chunk.global.wrapping_add(from as u64);
                            self.memory.read(at, &mut values[from..to]).map_err(named)?;
                        }
                        let range = shared_range(shared, chunk.shared, 16).map_err(named)?;
                        shared[range].copy_from_slice(&values);
                    }
                }
                _ => {
                    let range = shared_range(shared, load.to, load.bytes).map_err(named)?;
                    shared[range].copy_from_slice(&values);
                }
            }
            let barrier = self.mbarrier(block, load.barrier).map_err(named)?;
            let barrier = barrier.expect(-i64::from(load.bytes)).map_err(named)?;
            self.set_mbarrier(block, load.barrier, barrier)?;
        }
        Ok(())
    }

    fn begin_store(
        &mut self,
        warp: &mut Warp,
        lane: usize,
        from: &Address,
        bytes: u32,
        target: Target,
    ) -> Result<()> {
        let (block, from) = (warp.block, self.own_place(address(warp, from, lane))?);
        aligned(u64::from(from), 16)?;
        shared_range(&self.blocks[block].shared, from, bytes)?;
        warp.stores[lane].open.push(BulkStore { from, bytes, target, values: None });
        Ok(())
    }

    /// The store reads what it stores. Of a box, chunk by chunk.
    pub fn read_of(&self, block: usize, store: &mut BulkStore) -> Result<()> {
        if store.values.is_some() {
            return Ok(());
        }
        let shared = &self.blocks[block].shared;
        store.values = Some(match &store.target {
            Target::Box(chunks) | Target::AddBox(chunks) => {
                let mut values = vec![];
                for chunk in chunks {
                    values.extend_from_slice(&shared[shared_range(shared, chunk.shared, 16)?]);
                }
                values
            }
            _ => shared[shared_range(shared, store.from, store.bytes)?].to_vec(),
        });
        Ok(())
    }

    pub fn write(&mut self, store: &BulkStore) -> Result<()> {
        self.progress = true;
        let values = store.values.as_deref().unwrap_or_default();
        match &store.target {
            Target::Range(to) => self.memory.write(*to, values),
            Target::AddF32(to) => self.add_f32(*to, values),
            Target::AddBf16(to) => {
                for (index, value) in values.chunks_exact(2).enumerate() {
                    let at = to + 2 * index as u64;
                    let mut old = [0; 2];
                    self.memory.read(at, &mut old)?;
                    let wide =
                        |it: &[u8]| f32::from_bits(u32::from(it[1]) << 24 | u32::from(it[0]) << 16);
                    let new = bf16(wide(&old) + wide(value)) as u16;
                    self.memory.write(at, &new.to_le_bytes())?;
                }
                Ok(())
            }
            Target::Box(chunks) | Target::AddBox(chunks) => {
                for (chunk, values) in chunks.iter().zip(values.chunks_exact(16)) {
                    let (from, to) = (chunk.inside.start as usize, chunk.inside.end as usize);
                    if from >= to {
                        continue;
                    }
                    let at = chunk.global.wrapping_add(from as u64);
                    match store.target {
                        Target::Box(_) => self.memory.write(at, &values[from..to])?,
                        _ => self.add_f32(at, &values[from..to])?,
                    }
                }
                Ok(())
            }
        }
    }

    fn add_f32(&self, to: u64, values: &[u8]) -> Result<()> {
        for (index, value) in values.chunks_exact(4).enumerate() {
            let at = to + 4 * index as u64;
            let mut old = [0; 4];
            self.memory.read(at, &mut old)?;
            let value = u32::from_le_bytes(value.try_into().expect("four bytes"));
            let new = add_flushed(u32::from_le_bytes(old), value);
            self.memory.write(at, &new.to_le_bytes())?;
        }
        Ok(())
    }
}

/// fp32 additions in memory count subnormal numbers as zeros (PTX ISA, red).
pub fn add_flushed(a: u32, b: u32) -> u32 {
    let flush = |it: f32| if it.is_subnormal() { 0f32.copysign(it) } else { it };
    flush(flush(f32::from_bits(a)) + flush(f32::from_bits(b))).to_bits()
}
