//! One launch: blocks, their warps, and what goes on behind their backs.
//!
//! Warps take turns at random, each for a random number of instructions. Of a warp's threads, those
//! go on that are the farthest back in the program, all that are at one place together;
//! instructions that a warp or a warpgroup shares wait for all their threads. Copies by TMA and
//! bulk copies end at random, as late as the waits for them allow. Products of warpgroups are
//! computed at once; when they are waited for, what they have read must still be there.
//!
//! A fault is a text that names kernel, block, threads, instruction and place.

use std::collections::VecDeque;
use std::ops::Range;

use super::code::{Instruction, Kernel, Op, Value};
use super::memory::Global;
use super::tensor::Chunk;
use super::warp::{BulkStore, LANES, Wait, Warp, lanes};

pub type Result<T> = std::result::Result<T, String>;

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
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ bits >> 31) % bound as u64) as usize
    }
}

/// One of a block's 16 named barriers.
#[derive(Clone, Copy, Default)]
pub struct Named {
    pub arrived: u32,
    /// That it is for; 0: all of the block. Of no meaning while nobody has come.
    pub threads: u32,
    pub round: u64,
}

pub struct Block {
    pub index: [u32; 3],
    /// Its cluster's place among the clusters, and its own in there.
    pub cluster: usize,
    pub rank: usize,
    pub shared: Vec<u8>,
    pub barriers: [Named; 16],
    pub live_warps: u32,
    pub warpgroups: Vec<Warpgroup>,
}

/// What its four warps do together, each at its own time: instruction and descriptors of what some
/// of them have come to and others have not.
#[derive(Default)]
pub struct Warpgroup {
    open: VecDeque<Shared>,
    /// Such instructions of each warp so far.
    counts: [usize; 4],
}

type Shared = (usize, [u64; 2]);

impl Warpgroup {
    /// Errors: another warp of the group has done something else.
    pub fn comes_to(&mut self, warp: usize, shared: Shared) -> Result<()> {
        let least = self.counts.iter().min().copied().unwrap_or_default();
        let ahead = self.counts[warp] - least;
        match self.open.get(ahead) {
            None => self.open.push_back(shared),
            Some(other) if *other == shared => {}
            Some(other) => {
                return Err(format!(
                    "a warp of the group has instruction and descriptors {other:x?}, another one \
                     {shared:x?}"
                ));
            }
        }
        self.counts[warp] += 1;
        if self.counts.iter().all(|&count| count > least) {
            self.open.pop_front();
        }
        Ok(())
    }
}

#[derive(Default)]
pub struct Cluster {
    /// The first of its blocks.
    pub first: usize,
    pub blocks: usize,
    pub arrived: u32,
    pub live_threads: u32,
    pub round: u64,
}

/// A copy to shared memory that is under way.
pub struct Load {
    /// Blocks that get it, and whose barriers hear of it.
    pub blocks: Vec<usize>,
    pub source: Source,
    pub to: u32,
    pub bytes: u32,
    pub barrier: u32,
    /// Of the instruction.
    pub place: usize,
}

pub enum Source {
    Range(u64),
    Chunks(Vec<Chunk>, /* NaNs outside */ Option<&'static [u8]>),
    Shared(usize, u32),
}

/// How a warp's turn goes on.
pub enum Then {
    Next,
    /// Where it is, it has been set already.
    Moved,
    /// The same instruction again, when the rest of the threads has come.
    Held,
    /// After this instruction, others first.
    Yield,
}

#[derive(Clone, Copy)]
pub enum Location {
    Global(u64),
    Shared(usize, u32),
    Parameter(u32),
}

pub struct Run<'a> {
    pub kernel: &'a Kernel,
    pub memory: &'a Global,
    pub parameters: &'a [u8],
    pub shape: Shape,
    pub blocks: Vec<Block>,
    pub clusters: Vec<Cluster>,
    pub warps: Vec<Warp>,
    pub loads: Vec<Load>,
    /// Stores that have read what they store and that nobody waits for.
    pub late: Vec<BulkStore>,
    pub random: &'a mut Random,
    /// Whether anything has happened that another warp can see.
    pub progress: bool,
    /// Instructions so far.
    pub count: u64,
    /// Of the instruction that runs.
    pub place: usize,
    /// Copies to shared memory end when nothing else goes on; else at any time.
    pub late_loads: bool,
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
            progress: false,
            count: 0,
            place: 0,
            late_loads: random.below(2) == 0,
            random,
        };
        let threads: u32 = shape.block.iter().product();
        let shared_bytes = match shape.dynamic_shared_bytes {
            0 => kernel.static_shared_end as usize,
            bytes => (kernel.static_shared_end.next_multiple_of(1024) + bytes) as usize,
        };
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
                    warpgroups: (0..threads.div_ceil(128)).map(|_| Warpgroup::default()).collect(),
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
                if !self.late_loads && !self.loads.is_empty() && self.random.below(4) == 0 {
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
                idle = 0;
            } else if idle == 64 && !warps.is_empty() {
                return Err(self.deadlock(&warps));
            }
        }
        if let Some(load) = self.loads.first() {
            return Err(format!(
                "kernel {}: nobody has waited for {}",
                self.kernel.name,
                self.describe(load.place)
            ));
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
            let place =
                warp.next(false).map_or("held".to_string(), |(place, _)| self.describe(place));
            let block = self.blocks[warp.block].index;
            let (thread, wait) = (warp.first_thread, warp.wait);
            text.push_str(&format!(
                "\n  block {block:?} threads from {thread}: {wait:?} at {place}"
            ));
        }
        text
    }

    pub fn describe(&self, place: usize) -> String {
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
            // A thread that polls must not keep those from going on that it polls for.
            let last = warp.polled || !warp.is_together() && self.random.below(8) == 0;
            warp.polled = false;
            let Some((place, mask)) = warp.next(last) else {
                let places: Vec<String> =
                    lanes(warp.live).map(|lane| self.describe(warp.place(lane))).collect();
                return Err(format!(
                    "kernel {}, block {:?}, threads from {}: they wait for each other at different \
                     places: {places:?}",
                    kernel.name, self.blocks[warp.block].index, warp.first_thread
                ));
            };
            self.count += 1;
            self.place = place;
            if self.count > self.shape.limit {
                return Err(format!("kernel {}: it does not end", kernel.name));
            }
            let Some(instruction) = kernel.instructions.get(place) else {
                self.leave(warp, mask)?;
                continue;
            };
            self.check_products(warp, instruction)?;
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
                    warp.polled = true;
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

    /// Errors: it reads or writes accumulators of products that are under way, other than to add to
    /// just these, or writes a register that one of the products reads.
    fn check_products(&self, warp: &Warp, instruction: &Instruction) -> Result<()> {
        let (first, others) = instruction.registers.split_at(instruction.first_operand);
        let adds = matches!(instruction.op, Op::Wgmma { .. });
        for product in warp.products_with(&instruction.registers) {
            let touched = |them: &[u32], these: &[u32]| them.iter().any(|it| these.contains(it));
            if touched(&product.d, first) && !(adds && first == product.d)
                || touched(&product.d, others)
                || touched(&product.in_a, first)
            {
                return Err(format!(
                    "kernel {}: `{}` at {} touches registers of {}, which is under way",
                    self.kernel.name,
                    instruction.text,
                    instruction.place,
                    self.describe(product.instruction)
                ));
            }
        }
        Ok(())
    }

    pub fn leave(&mut self, warp: &mut Warp, mask: u32) -> Result<()> {
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
        if warp.arrived == Some(cluster.round) {
            cluster.arrived -= mask.count_ones();
        }
        if warp.live == 0 {
            if warp.has_products() {
                return Err(format!(
                    "kernel {}: a warp ends with products under way",
                    self.kernel.name
                ));
            }
            block.live_warps -= 1;
            if block.live_warps == 0 && block.warpgroups.iter().any(|it| !it.open.is_empty()) {
                return Err(format!(
                    "kernel {}: warps of a group have ended before what they share",
                    self.kernel.name
                ));
            }
            for id in 0..16 {
                self.barrier_completed(warp.block, id);
            }
        }
        self.cluster_completed(self.blocks[warp.block].cluster);
        Ok(())
    }

    // ---------------------------------------------------------- barriers of blocks and clusters

    /// `threads` 0: all of the block.
    pub fn arrive_at(
        &mut self,
        warp: &mut Warp,
        id: usize,
        threads: u32,
        waits: bool,
    ) -> Result<()> {
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

    pub fn barrier_completed(&mut self, block: usize, id: usize) {
        let block = &mut self.blocks[block];
        let all = LANES as u32 * block.live_warps;
        let barrier = &mut block.barriers[id];
        let threads = if barrier.threads == 0 { all } else { barrier.threads };
        if barrier.arrived > 0 && barrier.arrived == threads {
            *barrier = Named { round: barrier.round + 1, ..Named::default() };
            self.progress = true;
        }
    }

    pub fn cluster_completed(&mut self, cluster: usize) {
        let cluster = &mut self.clusters[cluster];
        if cluster.arrived > 0 && cluster.arrived == cluster.live_threads {
            cluster.arrived = 0;
            cluster.round += 1;
            self.progress = true;
        }
    }
}
