//! What each instruction does to a warp: registers, loads and stores, and what its threads do
//! together.

use super::arithmetic::Arithmetic;
use super::code::{Address, Atomic, MatrixA as CodeA, Op, Shuffle, Space, Special, Value, Vote};
use super::copies::add_flushed;
use super::matrix::{self, MatrixA, WgmmaShape};
use super::memory::{
    self, PARAMETER_WINDOW, SHARED_WINDOW, aligned, range, rank_and_offset, shared_range, to_shared,
};
use super::run::{Location, Result, Run, Then};
use super::warp::{LANES, Lanes, Product, Wait, Warp, lanes};

impl Run<'_> {
    // -------------------------------------------------------------- instructions

    /// `mask`: the threads at this instruction; `active`: those whose guard lets them run it.
    pub fn execute(
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
            Op::Mapa { to, from, rank } => {
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
                        Atomic::AddF32 if matches!(at, Location::Global(_)) => {
                            add_flushed(old as u32, a as u32)
                        }
                        Atomic::AddF32 => {
                            (f32::from_bits(old as u32) + f32::from_bits(a as u32)).to_bits()
                        }
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
            | Op::Mma { .. }
            | Op::Barrier { .. }
            | Op::ClusterArrive
            | Op::ClusterWait
            | Op::Wgmma { .. }
            | Op::WgmmaFence
            | Op::WgmmaCommit
            | Op::WgmmaWait { .. }
            | Op::SetMaxRegisters => {
                if mask != warp.live {
                    return Ok(Then::Held);
                }
                let matrices = matches!(
                    op,
                    Op::LoadMatrix { .. }
                        | Op::StoreMatrix { .. }
                        | Op::Mma { .. }
                        | Op::Wgmma { .. }
                );
                if active != mask || matrices && mask != u32::MAX {
                    return Err("only some of a warp's threads run it".to_string());
                }
                self.together(warp, op, place)?;
            }
            _ => {
                let mut ready = true;
                for lane in lanes(active) {
                    ready &= self.alone(warp, op, lane)?;
                }
                if !ready {
                    return Ok(Then::Yield);
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

    pub fn locate(&self, warp: &Warp, space: Space, address: u64) -> Result<Location> {
        let in_cluster = |address: u64| -> Result<Location> {
            let (block, offset) = self.shared_place(warp, address)?;
            Ok(Location::Shared(block, offset))
        };
        match space {
            Space::Global => Ok(Location::Global(address)),
            Space::Shared => Ok(Location::Shared(warp.block, self.own_place(address)?)),
            Space::SharedOfCluster => in_cluster(address),
            Space::Parameter => Ok(Location::Parameter(address as u32)),
            Space::Generic if address & SHARED_WINDOW == SHARED_WINDOW => {
                in_cluster(to_shared(address))
            }
            Space::Generic if address & PARAMETER_WINDOW != 0 => {
                Ok(Location::Parameter(address as u32))
            }
            Space::Generic => Ok(Location::Global(address)),
        }
    }

    /// The offset of an address in the block's own shared memory. Errors: it names a block.
    pub fn own_place(&self, address: u64) -> Result<u32> {
        match rank_and_offset(address) {
            (None, offset) => Ok(offset),
            (Some(rank), _) => Err(format!(
                "{address:#x} is of block {rank} of the cluster, or generic; not of the block itself"
            )),
        }
    }

    /// The block that a shared address names, and the offset there. Errors: it has ended.
    pub fn shared_place(&self, warp: &Warp, address: u64) -> Result<(usize, u32)> {
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

    pub fn read(&self, at: Location, to: &mut [u8]) -> Result<()> {
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
                to.copy_from_slice(&self.parameters[range(self.parameters, at, bytes)?]);
                Ok(())
            }
        }
    }

    pub fn put(&mut self, at: Location, from: &[u8]) -> Result<()> {
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
        &mut self,
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
                // Who polls for a value has got on when there is another one.
                self.progress |= warp.value(Value::Register(to), lane) != value;
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
                    let (block, at) = (warp.block, self.own_place(address(warp, at, lane))?);
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
                    let (block, at) = (warp.block, self.own_place(address(warp, at, lane))?);
                    self.put(Location::Shared(block, at), row)?;
                }
            }
            Op::Mma { to, a, b, c } => {
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
            Op::Wgmma { d, n, a, b, add, transposed } => {
                self.wgmma(warp, (d, *n), a, *b, *add, *transposed, place)?;
            }
            Op::WgmmaFence | Op::SetMaxRegisters => self.of_group(warp, place, [0; 2])?,
            Op::WgmmaCommit => {
                self.of_group(warp, place, [0; 2])?;
                warp.commit_products();
            }
            Op::WgmmaWait { groups } => {
                self.of_group(warp, place, [0; 2])?;
                for product in warp.end_products(*groups) {
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

    /// All warps of a warpgroup come to `place` with these descriptors, in one order.
    fn of_group(&mut self, warp: &Warp, place: usize, descriptors: [u64; 2]) -> Result<()> {
        let number = warp.first_thread as usize / LANES;
        let group = &mut self.blocks[warp.block].warpgroups[number / 4];
        group.comes_to(number % 4, (place, descriptors))
    }

    /// Each warp of a warpgroup computes its 16 rows.
    #[allow(clippy::too_many_arguments, reason = "an instruction's fields")]
    fn wgmma(
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
        let mut in_a = vec![];
        if let CodeA::Registers(a) = a {
            in_a.extend(a.iter().filter_map(|it| match it {
                Value::Register(register) => Some(*register),
                Value::Constant(_) => None,
            }));
        }
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
        let descriptor = if let MatrixA::Shared(a) = a { a } else { 0 };
        self.of_group(warp, place, [descriptor, b])?;
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
        let (d, instruction) = (d.to_vec(), place);
        warp.begin(Product { shape, a, b, operands, instruction, d, in_a });
        Ok(())
    }
}

// ------------------------------------------------------------------ without memory

pub fn address(warp: &Warp, address: &Address, lane: usize) -> u64 {
    warp.value(address.base, lane).wrapping_add_signed(address.offset)
}

pub fn coordinates_of(warp: &Warp, coordinates: &[Value], lane: usize) -> Vec<i32> {
    coordinates.iter().map(|&it| warp.value(it, lane) as i32).collect()
}

/// Of the threads `here`, those whose groups are here, too: each names its own. Errors: a thread
/// that is not in its group.
fn ready(warp: &Warp, members: &Lanes<u64>, here: u32) -> Result<u32> {
    let mut ready = 0;
    for lane in lanes(here) {
        let group = members[lane] as u32;
        if group >> lane & 1 == 0 {
            return Err(format!("thread {lane} is not in its group {group:#x}"));
        }
        if group & warp.live & !here == 0 {
            if lanes(group & here).any(|other| members[other] as u32 != group) {
                return Err(format!("threads of group {group:#x} name different groups"));
            }
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
