//! One launch: blocks, their warps, and what goes on behind their backs.
//!
//! Warps take turns at random, each for a random number of instructions. Of a warp's threads, those go
//! on that are the farthest back in the program, all that are at one place together; instructions that
//! a warp or a warpgroup shares wait for all their threads. Copies by TMA and bulk copies end at
//! random, as late as the waits for them allow. Products of warpgroups are computed at once; when they
//! are waited for, what they have read must still be there.
//!
//! A fault is a text that names kernel, block, threads, instruction and place.

use std::ops::Range;

use super::arithmetic::{Arithmetic, bf16};
use super::code::{
    Address, Atomic, Kernel, MatrixA as CodeA, Op, Reduce, Shuffle, Space, Special, Value, Vote,
};
use super::matrix::{self, MatrixA, WgmmaShape};
use super::memory::{
    self, Global, Mbarrier, PARAMETER_WINDOW, SHARED_WINDOW, aligned, rank_and_offset, shared_range,
};
use super::tensor::{Chunk, Map};
use super::warp::{BulkStore, Copy, LANES, Lanes, Product, Target, Wait, Warp, lanes};

type Result<T> = std::result::Result<T, String>;

#[derive(Clone, Copy)]
pub struct Shape {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Blocks of a cluster: [x, y, z].
    pub cluster: [u32; 3],
    pub dynamic_shared_bytes: u32,
    /// Blocks that are resident at a time, at least one cluster.
    pub resident: u32,
    /// Instructions of warps that no launch of ours comes near.
    pub limit: u64,
}

pub fn run(
    kernel: &Kernel,
    memory: &Global,
    parameters: &[u8],
    shape: Shape,
    seed: u64,
) -> Result<()> {
    let of_cluster: u32 = shape.cluster.iter().product();
    let clusters = shape.grid.iter().product::<u32>() / of_cluster;
    let at_once = (shape.resident / of_cluster).max(1);
    let mut random = Random(seed);
    for first in (0..clusters).step_by(at_once as usize) {
        let some = first..(first + at_once).min(clusters);
        let mut run = Run::new(kernel, memory, parameters, shape, some, &mut random);
        run.all()?;
    }
    Ok(())
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ bits >> 31) % bound as u64) as usize
    }
}

/// One of a block's 16 named barriers.
#[derive(Clone, Copy, Default)]
struct Named {
    arrived: u32,
    /// 0: nobody has come.
    threads: u32,
    round: u64,
}

struct Block {
    index: [u32; 3],
    /// Its cluster's place among the clusters, and its own in there.
    cluster: usize,
    rank: usize,
    shared: Vec<u8>,
    barriers: [Named; 16],
    live_warps: u32,
}

#[derive(Default)]
struct Cluster {
    /// The first of its blocks.
    first: usize,
    blocks: usize,
    arrived: u32,
    live_threads: u32,
    round: u64,
}

/// A copy to shared memory that is under way.
struct Load {
    /// Blocks that get it, and whose barriers hear of it.
    blocks: Vec<usize>,
    source: Source,
    to: u32,
    bytes: u32,
    barrier: u32,
    text: String,
}

enum Source {
    Range(u64),
    Chunks(Vec<Chunk>, /* NaNs outside */ Option<&'static [u8]>),
    Shared(usize, u32),
}

/// How a warp's turn goes on.
enum Then {
    Next,
    /// Where it is, it has been set already.
    Moved,
    /// The same instruction again, when the rest of the threads has come.
    Held,
    /// Behind this instruction, others first.
    Yield,
}

#[derive(Clone, Copy)]
enum Location {
    Global(u64),
    Shared(usize, u32),
    Parameter(u32),
}

struct Run<'a> {
    kernel: &'a Kernel,
    memory: &'a Global,
    parameters: &'a [u8],
    shape: Shape,
    blocks: Vec<Block>,
    clusters: Vec<Cluster>,
    warps: Vec<Warp>,
    loads: Vec<Load>,
    /// Stores that have read what they store and that nobody waits for.
    late: Vec<BulkStore>,
    random: &'a mut Random,
    /// Whether anything has happened that another warp can see.
    progress: bool,
    /// Instructions so far.
    count: u64,
}

impl<'a> Run<'a> {
    fn new(
        kernel: &'a Kernel,
        memory: &'a Global,
        parameters: &'a [u8],
        shape: Shape,
        clusters: Range<u32>,
        random: &'a mut Random,
    ) -> Self {
        let mut run = Run {
            kernel,
            memory,
            parameters,
            shape,
            blocks: vec![],
            clusters: vec![],
            warps: vec![],
            loads: vec![],
            late: vec![],
            random,
            progress: false,
            count: 0,
        };
        let threads: u32 = shape.block.iter().product();
        let shared_bytes = kernel.static_shared_end.next_multiple_of(1024);
        let shared_bytes = (shared_bytes + shape.dynamic_shared_bytes) as usize;
        let wide: Vec<u32> = (0..3).map(|axis| shape.grid[axis] / shape.cluster[axis]).collect();
        for number in clusters {
            let corner = [
                number % wide[0] * shape.cluster[0],
                number / wide[0] % wide[1] * shape.cluster[1],
                number / (wide[0] * wide[1]) * shape.cluster[2],
            ];
            let of_cluster: u32 = shape.cluster.iter().product();
            run.clusters.push(Cluster {
                first: run.blocks.len(),
                blocks: of_cluster as usize,
                live_threads: threads * of_cluster,
                ..Cluster::default()
            });
            for rank in 0..of_cluster {
                let [x, y, _] = shape.cluster;
                let index =
                    [corner[0] + rank % x, corner[1] + rank / x % y, corner[2] + rank / (x * y)];
                for first_thread in (0..threads).step_by(LANES) {
                    let rest = threads - first_thread;
                    let block = run.blocks.len();
                    run.warps.push(Warp::new(block, first_thread, rest, kernel.registers));
                }
                run.blocks.push(Block {
                    index,
                    cluster: run.clusters.len() - 1,
                    rank: rank as usize,
                    // NaNs.
                    shared: vec![0xff; shared_bytes],
                    barriers: [Named::default(); 16],
                    live_warps: threads.div_ceil(LANES as u32),
                });
            }
        }
        run
    }

    // -------------------------------------------------------------- turns

    fn all(&mut self) -> Result<()> {
        let mut warps: Vec<usize> = (0..self.warps.len()).collect();
        let mut idle = 0;
        while !warps.is_empty() {
            self.progress = false;
            for last in (1..warps.len()).rev() {
                warps.swap(last, self.random.below(last + 1));
            }
            for &warp in &warps {
                self.turn(warp)?;
                if !self.loads.is_empty() && self.random.below(4) == 0 {
                    let one = self.random.below(self.loads.len());
                    self.end_load(one)?;
                }
            }
            warps.retain(|&warp| self.warps[warp].live != 0);
            // Who polls needs some turns to see what the last round has brought.
            idle = if self.progress { 0 } else { idle + 1 };
            if idle > 0 && !self.loads.is_empty() {
                let one = self.random.below(self.loads.len());
                self.end_load(one)?;
            } else if idle == 64 && !warps.is_empty() {
                return Err(self.deadlock(&warps));
            }
        }
        if let Some(load) = self.loads.first() {
            return Err(format!("{}: a copy that nobody has waited for", load.text));
        }
        while !self.late.is_empty() {
            let one = self.random.below(self.late.len());
            let store = self.late.swap_remove(one);
            self.write(&store)?;
        }
        Ok(())
    }

    fn deadlock(&self, warps: &[usize]) -> String {
        let mut text = format!("kernel {}: nothing goes on:", self.kernel.name);
        for &index in warps {
            let warp = &self.warps[index];
            let place = warp.next().map_or("held".to_string(), |(place, _)| self.describe(place));
            let block = self.blocks[warp.block].index;
            let (thread, wait) = (warp.first_thread, warp.wait);
            text.push_str(&format!(
                "\n  block {block:?} threads from {thread}: {wait:?} at {place}"
            ));
        }
        text
    }

    fn describe(&self, place: usize) -> String {
        let instruction = self.kernel.instructions.get(place);
        instruction.map_or("the end".to_string(), |it| format!("{} at {}", it.text, it.place))
    }

    fn turn(&mut self, index: usize) -> Result<()> {
        let mut warp = std::mem::replace(&mut self.warps[index], Warp::new(0, 0, 0, 0));
        let result = self.turn_of(&mut warp);
        self.warps[index] = warp;
        result
    }

    fn turn_of(&mut self, warp: &mut Warp) -> Result<()> {
        match warp.wait {
            Wait::Nothing => {}
            Wait::Barrier { id, round } => {
                if self.blocks[warp.block].barriers[id].round == round {
                    return Ok(());
                }
            }
            Wait::Cluster { round } => {
                if self.clusters[self.blocks[warp.block].cluster].round == round {
                    return Ok(());
                }
            }
        }
        warp.wait = Wait::Nothing;
        let kernel = self.kernel;
        for _ in 0..8 + self.random.below(248) {
            if warp.live == 0 {
                return Ok(());
            }
            let Some((place, mask)) = warp.next() else {
                let places: Vec<String> =
                    lanes(warp.live).map(|lane| self.describe(warp.place(lane))).collect();
                return Err(format!(
                    "kernel {}, block {:?}, threads from {}: they wait for each other at different \
                     places: {places:?}",
                    kernel.name, self.blocks[warp.block].index, warp.first_thread
                ));
            };
            self.count += 1;
            if self.count > self.shape.limit {
                return Err(format!("kernel {}: it does not end", kernel.name));
            }
            let Some(instruction) = kernel.instructions.get(place) else {
                self.leave(warp, mask)?;
                continue;
            };
            let active = match instruction.guard {
                None => mask,
                Some(guard) => {
                    let values = warp.values(Value::Register(guard.register));
                    lanes(mask)
                        .filter(|&lane| (values[lane] == 1) != guard.negated)
                        .fold(0, |active, lane| active | 1 << lane)
                }
            };
            let then = self.execute(warp, &instruction.op, place, mask, active).map_err(|why| {
                format!(
                    "kernel {}, block {:?}, threads {} + {:?}: `{}` at {}: {why}",
                    kernel.name,
                    self.blocks[warp.block].index,
                    warp.first_thread,
                    lanes(active).collect::<Vec<_>>(),
                    instruction.text,
                    instruction.place
                )
            })?;
            match then {
                Then::Next => warp.go(mask, place + 1),
                Then::Moved => {}
                Then::Held => warp.hold(mask),
                Then::Yield => {
                    warp.go(mask, place + 1);
                    return Ok(());
                }
            }
            if warp.wait != Wait::Nothing {
                return Ok(());
            }
        }
        // It was at work and is not at its end.
        self.progress = true;
        Ok(())
    }

    fn leave(&mut self, warp: &mut Warp, mask: u32) -> Result<()> {
        warp.leave(mask);
        self.progress = true;
        for lane in lanes(mask) {
            let copies = &mut warp.copies[lane];
            copies.commit();
            for copy in copies.older_than(0) {
                self.copy(warp.block, &copy)?;
            }
            let stores = &mut warp.stores[lane];
            stores.commit();
            for store in stores.older_than(0) {
                if store.values.is_none() {
                    return Err(format!(
                        "kernel {}: a thread ends, and a store of its from shared memory was not \
                         waited for",
                        self.kernel.name
                    ));
                }
                self.late.push(store);
            }
        }
        let block = &mut self.blocks[warp.block];
        let cluster = &mut self.clusters[block.cluster];
        cluster.live_threads -= mask.count_ones();
        if warp.live == 0 {
            if !warp.products.open.is_empty() || !warp.products.committed.is_empty() {
                return Err(format!(
                    "kernel {}: a warp ends with products under way",
                    self.kernel.name
                ));
            }
            block.live_warps -= 1;
            for id in 0..16 {
                self.barrier_completed(warp.block, id);
            }
        }
        self.cluster_completed(self.blocks[warp.block].cluster);
        Ok(())
    }

    // -------------------------------------------------------------- instructions

    /// `mask`: the threads at this instruction; `active`: those whose guard lets them run it.
    fn execute(
        &mut self,
        warp: &mut Warp,
        op: &Op,
        place: usize,
        mask: u32,
        active: u32,
    ) -> Result<Then> {
        match op {
            Op::Compute { to, function, from } => {
                compute(warp, *to, *function, from, active);
            }
            Op::Branch { target } => {
                if active != 0 {
                    warp.go(active, *target);
                }
                if mask & !active != 0 {
                    warp.go(mask & !active, place + 1);
                }
                return Ok(Then::Moved);
            }
            Op::Return => {
                if mask & !active != 0 {
                    warp.go(mask & !active, place + 1);
                }
                if active != 0 {
                    self.leave(warp, active)?;
                }
                return Ok(Then::Moved);
            }
            _ if active == 0 => {}
            Op::Trap => return Err("trap".to_string()),
            Op::Nothing => {}
            Op::Sleep => return Ok(Then::Yield),
            Op::Special { to, which } => {
                let values = self.special(warp, *which);
                warp.set_all(*to, active, &values);
            }
            Op::Pack { to, parts, bits } => {
                let parts: Vec<Lanes<u64>> = parts.iter().map(|&it| warp.values(it)).collect();
                for lane in lanes(active) {
                    let packed = parts.iter().rev().fold(0u64, |all, part| {
                        all.unbounded_shl(*bits) | part[lane] & ((1 << bits) - 1)
                    });
                    warp.set(*to, lane, packed);
                }
            }
            Op::Unpack { to, from, bits } => {
                let values = warp.values(*from);
                for lane in lanes(active) {
                    for (index, to) in to.iter().enumerate() {
                        if let Some(to) = to {
                            let value = values[lane] >> (index as u32 * bits) & ((1 << bits) - 1);
                            warp.set(*to, lane, value);
                        }
                    }
                }
            }
            Op::MapToRank { to, from, rank } => {
                for lane in lanes(active) {
                    let rank = warp.value(*rank, lane);
                    let mapped = memory::of_rank(warp.value(*from, lane), rank);
                    warp.set(*to, lane, mapped);
                }
            }
            Op::Load { space, bytes, signed, to, at, acquire } => {
                self.load(warp, *space, *bytes, *signed, to, at, active)?;
                if *acquire {
                    return Ok(Then::Yield);
                }
            }
            Op::Store { space, bytes, at, values } => {
                self.store(warp, *space, *bytes, at, values, active)?;
            }
            Op::Atomic { space, which, to, at, values } => {
                self.progress = true;
                for lane in lanes(active) {
                    let at = self.locate(warp, *space, address(warp, at, lane))?;
                    let mut old = [0; 4];
                    self.read(at, &mut old)?;
                    let old = u64::from(u32::from_le_bytes(old));
                    let [a, b] = values.map(|value| warp.value(value, lane));
                    let new = match which {
                        Atomic::AddU32 => (old + a) as u32,
                        Atomic::AddF32 => add_flushed(old as u32, a as u32),
                        Atomic::MaxU32 => old.max(a) as u32,
                        Atomic::Exchange => a as u32,
                        Atomic::CompareAndSwap if old == a => b as u32,
                        Atomic::CompareAndSwap => old as u32,
                    };
                    self.put(at, &new.to_le_bytes())?;
                    if let Some(to) = to {
                        warp.set(*to, lane, old);
                    }
                }
            }
            Op::ReduceAdd { at, values } => {
                self.progress = true;
                for lane in lanes(active) {
                    let at = address(warp, at, lane);
                    aligned(at, 4 * values.len() as u32)?;
                    for (index, &value) in values.iter().enumerate() {
                        let at = at + 4 * index as u64;
                        let mut old = [0; 4];
                        self.memory.read(at, &mut old)?;
                        let new =
                            add_flushed(u32::from_le_bytes(old), warp.value(value, lane) as u32);
                        self.memory.write(at, &new.to_le_bytes())?;
                    }
                }
            }

            Op::WarpBarrier { mask: members }
            | Op::Elect { mask: members, .. }
            | Op::Shuffle { mask: members, .. }
            | Op::Vote { mask: members, .. } => {
                let members = warp.values(*members);
                let ready = ready(warp, &members, active)?;
                in_groups(warp, op, &members, ready)?;
                if ready != active {
                    warp.hold(active & !ready);
                    if ready | mask & !active != 0 {
                        warp.go(ready | mask & !active, place + 1);
                    }
                    return Ok(Then::Moved);
                }
            }
            // From here on, all threads of the warp run it together, or one of them.
            Op::LoadMatrix { .. }
            | Op::StoreMatrix { .. }
            | Op::Multiply { .. }
            | Op::Barrier { .. }
            | Op::ClusterArrive
            | Op::ClusterWait
            | Op::GroupMultiply { .. }
            | Op::GroupFence
            | Op::GroupCommit
            | Op::GroupWait { .. }
            | Op::Registers => {
                if mask != warp.live {
                    return Ok(Then::Held);
                }
                if active != mask {
                    return Err("only some of a warp's threads run it".to_string());
                }
                self.together(warp, op, place)?;
            }
            _ => {
                for lane in lanes(active) {
                    if !self.alone(warp, op, lane)? {
                        // A barrier is not ready: the loop around it, later.
                        if active.count_ones() > 1 {
                            // The other threads see the same or a later state.
                            for lane in lanes(active).filter(|&it| it > lane) {
                                self.alone(warp, op, lane)?;
                            }
                        }
                        return Ok(Then::Yield);
                    }
                }
            }
        }
        Ok(Then::Next)
    }

    fn special(&self, warp: &Warp, which: Special) -> Lanes<u64> {
        let block = &self.blocks[warp.block];
        std::array::from_fn(|lane| {
            let thread = warp.first_thread + lane as u32;
            let [x, y, _] = self.shape.block;
            u64::from(match which {
                Special::Thread(0) => thread % x,
                Special::Thread(1) => thread / x % y,
                Special::Thread(_) => thread / (x * y),
                Special::Threads(axis) => self.shape.block[axis],
                Special::Block(axis) => block.index[axis],
                Special::Blocks(axis) => self.shape.grid[axis],
                Special::RankInCluster => block.rank as u32,
                Special::BlocksOfCluster => self.shape.cluster.iter().product(),
                Special::Lane => lane as u32,
            })
        })
    }

    // -------------------------------------------------------------- loads and stores

    fn locate(&self, warp: &Warp, space: Space, address: u64) -> Result<Location> {
        let in_shared = |address: u64| -> Result<Location> {
            let (block, offset) = self.shared_place(warp, address)?;
            Ok(Location::Shared(block, offset))
        };
        match space {
            Space::Global => Ok(Location::Global(address)),
            Space::Shared => in_shared(address),
            Space::Parameter => Ok(Location::Parameter(address as u32)),
            Space::Generic if address & SHARED_WINDOW != 0 => in_shared(address),
            Space::Generic if address & PARAMETER_WINDOW != 0 => {
                Ok(Location::Parameter(address as u32))
            }
            Space::Generic => Ok(Location::Global(address)),
        }
    }

    /// The block that a shared address names, and the offset there. Errors: it has ended.
    fn shared_place(&self, warp: &Warp, address: u64) -> Result<(usize, u32)> {
        let (rank, offset) = rank_and_offset(address);
        let Some(rank) = rank else { return Ok((warp.block, offset)) };
        let cluster = &self.clusters[self.blocks[warp.block].cluster];
        if rank >= cluster.blocks {
            return Err(format!("block {rank} of a cluster of {}", cluster.blocks));
        }
        let block = cluster.first + rank;
        match self.blocks[block].live_warps {
            0 => Err(format!("shared memory of block {rank} of the cluster, which has ended")),
            _ => Ok((block, offset)),
        }
    }

    fn read(&self, at: Location, to: &mut [u8]) -> Result<()> {
        let bytes = to.len() as u32;
        match at {
            Location::Global(address) => {
                aligned(address, bytes)?;
                self.memory.read(address, to)
            }
            Location::Shared(block, at) => {
                aligned(u64::from(at), bytes)?;
                let shared = &self.blocks[block].shared;
                to.copy_from_slice(&shared[shared_range(shared, at, bytes)?]);
                Ok(())
            }
            Location::Parameter(at) => {
                to.copy_from_slice(&self.parameters[shared_range(self.parameters, at, bytes)?]);
                Ok(())
            }
        }
    }

    fn put(&mut self, at: Location, from: &[u8]) -> Result<()> {
        let bytes = from.len() as u32;
        self.progress = true;
        match at {
            Location::Global(address) => {
                aligned(address, bytes)?;
                self.memory.write(address, from)
            }
            Location::Shared(block, at) => {
                aligned(u64::from(at), bytes)?;
                let shared = &mut self.blocks[block].shared;
                let range = shared_range(shared, at, bytes)?;
                shared[range].copy_from_slice(from);
                Ok(())
            }
            Location::Parameter(_) => Err("a parameter is written".to_string()),
        }
    }

    #[allow(clippy::too_many_arguments, reason = "an instruction's fields")]
    fn load(
        &self,
        warp: &mut Warp,
        space: Space,
        bytes: u32,
        signed: Option<u32>,
        to: &[u32],
        at: &Address,
        active: u32,
    ) -> Result<()> {
        let mut buffer = [0; 32];
        let all = &mut buffer[..bytes as usize * to.len()];
        for lane in lanes(active) {
            let at = self.locate(warp, space, address(warp, at, lane))?;
            self.read(at, all)?;
            for (index, &to) in to.iter().enumerate() {
                let mut word = [0; 8];
                let from = index * bytes as usize;
                word[..bytes as usize].copy_from_slice(&all[from..from + bytes as usize]);
                let mut value = u64::from_le_bytes(word);
                if let Some(bits) = signed {
                    let unused = 64 - 8 * bytes;
                    value = ((value << unused) as i64 >> unused) as u64;
                    value = value << (64 - bits) >> (64 - bits);
                }
                warp.set(to, lane, value);
            }
        }
        Ok(())
    }

    fn store(
        &mut self,
        warp: &Warp,
        space: Space,
        bytes: u32,
        at: &Address,
        values: &[Value],
        active: u32,
    ) -> Result<()> {
        let mut buffer = [0; 32];
        let all = &mut buffer[..bytes as usize * values.len()];
        for lane in lanes(active) {
            for (part, &value) in all.chunks_exact_mut(bytes as usize).zip(values) {
                part.copy_from_slice(&warp.value(value, lane).to_le_bytes()[..bytes as usize]);
            }
            let at = self.locate(warp, space, address(warp, at, lane))?;
            self.put(at, all)?;
        }
        Ok(())
    }

    // -------------------------------------------------------------- of a whole warp

    fn together(&mut self, warp: &mut Warp, op: &Op, place: usize) -> Result<()> {
        match op {
            Op::LoadMatrix { count, transposed, to, at } => {
                let mut rows = [[0; 16]; LANES];
                for (lane, row) in rows.iter_mut().enumerate().take(8 * count) {
                    let (block, at) = self.shared_place(warp, address(warp, at, lane))?;
                    self.read(Location::Shared(block, at), row)?;
                }
                let loaded = matrix::ldmatrix(*count, *transposed, &rows);
                for (index, &to) in to.iter().enumerate() {
                    let values: Lanes<u64> = std::array::from_fn(|it| u64::from(loaded[it][index]));
                    warp.set_all(to, u32::MAX, &values);
                }
            }
            Op::StoreMatrix { count, transposed, at, values } => {
                let mut registers = [[0; 4]; LANES];
                for (index, &value) in values.iter().enumerate() {
                    let values = warp.values(value);
                    (0..LANES).for_each(|lane| registers[lane][index] = values[lane] as u32);
                }
                let rows = matrix::stmatrix(*count, *transposed, &registers);
                for (lane, row) in rows.iter().enumerate().take(8 * count) {
                    let (block, at) = self.shared_place(warp, address(warp, at, lane))?;
                    self.put(Location::Shared(block, at), row)?;
                }
            }
            Op::Multiply { to, a, b, c } => {
                let mut left = [[0; 4]; LANES];
                let mut right = [[0; 2]; LANES];
                let mut sums = [[0.0; 4]; LANES];
                for lane in 0..LANES {
                    (0..4).for_each(|it| left[lane][it] = warp.value(a[it], lane) as u32);
                    (0..2).for_each(|it| right[lane][it] = warp.value(b[it], lane) as u32);
                    (0..4).for_each(|it| {
                        sums[lane][it] = f32::from_bits(warp.value(c[it], lane) as u32);
                    });
                }
                let found = matrix::mma_m16n8k16(&sums, &left, &right);
                for (index, &to) in to.iter().enumerate() {
                    let values = std::array::from_fn(|it| u64::from(found[it][index].to_bits()));
                    warp.set_all(to, u32::MAX, &values);
                }
            }
            Op::Barrier { id, threads, waits } => {
                let id = warp.uniform(*id, warp.live)? as usize;
                let threads = match threads {
                    Some(threads) => warp.uniform(*threads, warp.live)? as u32,
                    None => 0,
                };
                self.arrive_at(warp, id, threads, *waits)?;
            }
            Op::ClusterArrive => {
                let cluster = self.blocks[warp.block].cluster;
                if warp.arrived.is_some() {
                    return Err("a second arrival without a wait".to_string());
                }
                warp.arrived = Some(self.clusters[cluster].round);
                self.clusters[cluster].arrived += warp.live.count_ones();
                self.cluster_completed(cluster);
            }
            Op::ClusterWait => {
                let round = warp.arrived.take().ok_or("a wait without an arrival")?;
                warp.wait = Wait::Cluster { round };
                let cluster = self.blocks[warp.block].cluster;
                if self.clusters[cluster].round != round {
                    warp.wait = Wait::Nothing;
                }
            }
            Op::GroupMultiply { d, n, a, b, add, transposed } => {
                self.group_multiply(warp, (d, *n), a, *b, *add, *transposed, place)?;
            }
            Op::GroupFence | Op::Registers => {}
            Op::GroupCommit => warp.products.commit(),
            Op::GroupWait { groups } => {
                for product in warp.products.older_than(*groups) {
                    let shared = &self.blocks[warp.block].shared;
                    let now = matrix::gather(&product.shape, &product.a, product.b, shared)?;
                    if now != product.operands {
                        let place = &self.kernel.instructions[product.instruction].place;
                        return Err(format!(
                            "what the product at {place} reads was written before it was waited for"
                        ));
                    }
                }
            }
            _ => unreachable!("`execute` has chosen"),
        }
        Ok(())
    }

    /// `threads` 0: all of the block.
    fn arrive_at(&mut self, warp: &mut Warp, id: usize, threads: u32, waits: bool) -> Result<()> {
        let block = &mut self.blocks[warp.block];
        let barrier = block.barriers.get_mut(id).ok_or(format!("barrier {id} of 16"))?;
        if !threads.is_multiple_of(LANES as u32) {
            return Err(format!("a barrier for {threads} threads, which are no whole warps"));
        }
        if barrier.arrived > 0 && barrier.threads != threads {
            return Err(format!("barrier {id} for {threads} threads, and for {}", barrier.threads));
        }
        barrier.threads = threads;
        barrier.arrived += LANES as u32;
        if waits {
            warp.wait = Wait::Barrier { id, round: barrier.round };
        }
        self.barrier_completed(warp.block, id);
        let barrier = &self.blocks[warp.block].barriers[id];
        if threads != 0 && barrier.arrived > threads {
            return Err(format!("more than {threads} threads at barrier {id}"));
        }
        if waits && warp.wait != (Wait::Barrier { id, round: barrier.round }) {
            warp.wait = Wait::Nothing;
        }
        Ok(())
    }

    fn barrier_completed(&mut self, block: usize, id: usize) {
        let block = &mut self.blocks[block];
        let all = LANES as u32 * block.live_warps;
        let barrier = &mut block.barriers[id];
        let threads = if barrier.threads == 0 { all } else { barrier.threads };
        if barrier.arrived > 0 && barrier.arrived == threads {
            *barrier = Named { round: barrier.round + 1, ..Named::default() };
            self.progress = true;
        }
    }

    fn cluster_completed(&mut self, cluster: usize) {
        let cluster = &mut self.clusters[cluster];
        if cluster.arrived > 0 && cluster.arrived >= cluster.live_threads {
            cluster.arrived = 0;
            cluster.round += 1;
            self.progress = true;
        }
    }

    /// Each warp of a warpgroup computes its 16 rows.
    #[allow(clippy::too_many_arguments, reason = "an instruction's fields")]
    fn group_multiply(
        &mut self,
        warp: &mut Warp,
        (d, n): (&[u32], usize),
        a: &CodeA,
        b: Value,
        add: Value,
        [transposed_a, transposed_b]: [bool; 2],
        place: usize,
    ) -> Result<()> {
        let shape = WgmmaShape { n, transposed_a, transposed_b };
        let quarter = warp.first_thread as usize / LANES % 4;
        let a = match a {
            CodeA::Descriptor(a) => MatrixA::Shared(warp.uniform(*a, u32::MAX)?),
            CodeA::Registers(a) => {
                let mut registers = Box::new([[0; 4]; 4 * LANES]);
                for (index, &value) in a.iter().enumerate() {
                    let values = warp.values(value);
                    for lane in 0..LANES {
                        registers[quarter * LANES + lane][index] = values[lane] as u32;
                    }
                }
                MatrixA::Registers(registers)
            }
        };
        let b = warp.uniform(b, u32::MAX)?;
        let add = warp.uniform(add, u32::MAX)? == 1;
        let operands = matrix::gather(&shape, &a, b, &self.blocks[warp.block].shared)?;
        let mut sums = vec![0.0; LANES * n / 2];
        for (index, &register) in d.iter().enumerate() {
            let values = warp.values(Value::Register(register));
            (0..LANES).for_each(|it| sums[it * n / 2 + index] = f32::from_bits(values[it] as u32));
        }
        matrix::multiply(&shape, &operands, quarter..quarter + 1, add, &mut sums);
        for (index, &register) in d.iter().enumerate() {
            let bits = |it: usize| u64::from(sums[it * n / 2 + index].to_bits());
            warp.set_all(register, u32::MAX, &std::array::from_fn(bits));
        }
        warp.products.open.push(Product { shape, a, b, operands, instruction: place });
        Ok(())
    }

    // -------------------------------------------------------------- of one thread

    /// False: a barrier that is not ready.
    fn alone(&mut self, warp: &mut Warp, op: &Op, lane: usize) -> Result<bool> {
        match op {
            Op::BarrierInit { at, count } => {
                let barrier = Mbarrier::new(warp.value(*count, lane))?.bits();
                let at = self.locate(warp, Space::Shared, address(warp, at, lane))?;
                self.put(at, &barrier.to_le_bytes())?;
            }
            Op::BarrierInvalidate { at } => {
                let (block, at) = self.shared_place(warp, address(warp, at, lane))?;
                self.mbarrier(block, at)?;
                self.put(Location::Shared(block, at), &[0xff; 8])?;
            }
            Op::BarrierArrive { at, expected } => {
                let (block, at) = self.shared_place(warp, address(warp, at, lane))?;
                let bytes = expected.map_or(0, |bytes| warp.value(bytes, lane) as i64);
                let barrier = self.mbarrier(block, at)?.expect(bytes)?.arrive()?;
                self.set_mbarrier(block, at, barrier)?;
            }
            Op::BarrierExpect { at, bytes } => {
                let (block, at) = self.shared_place(warp, address(warp, at, lane))?;
                let barrier = self.mbarrier(block, at)?.expect(warp.value(*bytes, lane) as i64)?;
                self.set_mbarrier(block, at, barrier)?;
            }
            Op::BarrierTryWait { to, at, parity } => {
                let (block, at) = self.shared_place(warp, address(warp, at, lane))?;
                let parity = warp.value(*parity, lane);
                if parity > 1 {
                    return Err(format!("a parity of {parity}"));
                }
                let done = self.mbarrier(block, at)?.parity != parity;
                warp.set(*to, lane, u64::from(done));
                return Ok(done);
            }
            Op::CopyAsync { to, from, bytes, of_source } => {
                let (block, to) = self.shared_place(warp, address(warp, to, lane))?;
                if block != warp.block {
                    return Err("cp.async to another block".to_string());
                }
                let from = address(warp, from, lane);
                aligned(from, *bytes)?;
                aligned(u64::from(to), *bytes)?;
                let of_source = of_source.map_or(*bytes, |it| warp.value(it, lane) as u32);
                if of_source > *bytes {
                    return Err(format!("{of_source} of {bytes} bytes"));
                }
                warp.copies[lane].open.push(Copy { to, from, bytes: *bytes, of_source });
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
                let (source, from) = self.shared_place(warp, from)?;
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
                let at = self.shared_place(warp, address(warp, from, lane))?.1;
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

    fn copy(&mut self, block: usize, copy: &Copy) -> Result<()> {
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
        let bytes = &self.parameters[shared_range(self.parameters, at, 128)?];
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
        let text = format!("kernel {}, block {:?}", self.kernel.name, self.blocks[blocks[0]].index);
        self.loads.push(Load { blocks, source, to, bytes, barrier, text });
        Ok(())
    }

    fn end_load(&mut self, index: usize) -> Result<()> {
        let load = self.loads.swap_remove(index);
        let named =
            |why: String| format!("{}, a copy to {} of shared memory: {why}", load.text, load.to);
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
        let (block, from) = self.shared_place(warp, address(warp, from, lane))?;
        if block != warp.block {
            return Err("a store from another block's shared memory".to_string());
        }
        aligned(u64::from(from), 16)?;
        shared_range(&self.blocks[block].shared, from, bytes)?;
        warp.stores[lane].open.push(BulkStore { from, bytes, target, values: None });
        Ok(())
    }

    /// The store reads what it stores. Of a box, chunk by chunk.
    fn read_of(&self, block: usize, store: &mut BulkStore) -> Result<()> {
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

    fn write(&mut self, store: &BulkStore) -> Result<()> {
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

// ------------------------------------------------------------------ without memory

fn address(warp: &Warp, address: &Address, lane: usize) -> u64 {
    warp.value(address.base, lane).wrapping_add_signed(address.offset)
}

fn coordinates_of(warp: &Warp, coordinates: &[Value], lane: usize) -> Vec<i32> {
    coordinates.iter().map(|&it| warp.value(it, lane) as i32).collect()
}

/// Of the threads `here`, those whose groups are here, too: each names its own. Errors: a thread that is
/// not in its group.
fn ready(warp: &Warp, members: &Lanes<u64>, here: u32) -> Result<u32> {
    let mut ready = 0;
    for lane in lanes(here) {
        let group = members[lane] as u32;
        if group >> lane & 1 == 0 {
            return Err(format!("thread {lane} is not in its group {group:#x}"));
        }
        if group & warp.live & !here == 0 {
            ready |= 1 << lane;
        }
    }
    Ok(ready)
}

/// What threads of a warp do with those that they name. All of their groups are here.
fn in_groups(warp: &mut Warp, op: &Op, members: &Lanes<u64>, active: u32) -> Result<()> {
    let group = |lane: usize| members[lane] as u32 & active;
    match op {
        Op::Elect { leader, .. } => {
            for lane in lanes(active) {
                let elected = group(lane).trailing_zeros() as usize;
                warp.set(*leader, lane, u64::from(lane == elected));
            }
        }
        Op::Shuffle { which, to, valid, value, by, bounds, .. } => {
            shuffle(warp, *which, *to, *valid, [*value, *by, *bounds], members, active)?;
        }
        Op::Vote { which, to, predicate, .. } => {
            let values = warp.values(*predicate);
            for lane in lanes(active) {
                let group = group(lane);
                let ballot = lanes(group).fold(0, |all, it| all | (values[it] as u32 & 1) << it);
                let result = match which {
                    Vote::Any => u64::from(ballot != 0),
                    Vote::All => u64::from(ballot == group),
                    Vote::Ballot => u64::from(ballot),
                };
                warp.set(*to, lane, result);
            }
        }
        _ => {}
    }
    Ok(())
}

fn compute(warp: &mut Warp, to: u32, function: Arithmetic, from: &[Value; 4], active: u32) {
    let a = warp.values(from[0]);
    let values: Lanes<u64> = match function {
        Arithmetic::One(f) => std::array::from_fn(|lane| f(a[lane])),
        Arithmetic::Two(f) => {
            let b = warp.values(from[1]);
            std::array::from_fn(|lane| f(a[lane], b[lane]))
        }
        Arithmetic::Three(f) => {
            let (b, c) = (warp.values(from[1]), warp.values(from[2]));
            std::array::from_fn(|lane| f(a[lane], b[lane], c[lane]))
        }
        Arithmetic::Four(f) => {
            let [b, c, d] = [from[1], from[2], from[3]].map(|it| warp.values(it));
            std::array::from_fn(|lane| f(a[lane], b[lane], c[lane], d[lane]))
        }
    };
    warp.set_all(to, active, &values);
}

/// PTX ISA, shfl.sync. Errors: a value of a thread that does not take part.
fn shuffle(
    warp: &mut Warp,
    which: Shuffle,
    to: u32,
    valid: Option<u32>,
    [value, by, bounds]: [Value; 3],
    members: &Lanes<u64>,
    active: u32,
) -> Result<()> {
    let values = warp.values(value);
    for lane in lanes(active) {
        let (by, bounds) = (warp.value(by, lane) as i64 & 31, warp.value(bounds, lane) as i64);
        let (clamp, segment) = (bounds & 31, bounds >> 8 & 31);
        let own = lane as i64;
        let (lowest, highest) = (own & segment, own & segment | clamp & !segment);
        let (source, inside) = match which {
            Shuffle::Up => (own - by, own - by >= highest),
            Shuffle::Down => (own + by, own + by <= highest),
            Shuffle::Butterfly => (own ^ by, own ^ by <= highest),
            Shuffle::Index => {
                let source = lowest | by & !segment;
                (source, source <= highest)
            }
        };
        let source = if inside { source as usize } else { lane };
        if members[lane] as u32 & active & 1 << source == 0 {
            return Err(format!("thread {lane} reads of thread {source}, which is not there"));
        }
        warp.set(to, lane, values[source]);
        if let Some(valid) = valid {
            warp.set(valid, lane, u64::from(inside));
        }
    }
    Ok(())
}

/// fp32 additions in memory count subnormal numbers as zeros (PTX ISA, red).
fn add_flushed(a: u32, b: u32) -> u32 {
    let flush = |it: f32| if it.is_subnormal() { 0f32.copysign(it) } else { it };
    flush(flush(f32::from_bits(a)) + flush(f32::from_bits(b))).to_bits()
}
