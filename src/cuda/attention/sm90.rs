//! bf16 with wgmma and TMA on compute capability 9.0: the kernels of kernels/attention_sm90.cu, and
//! for backward those of short.rs and one_pass.rs where they are estimated to be faster. As many
//! blocks as there are multiprocessors, each of which takes item after item: a tile of a head's
//! rows.

use super::maps::{BF16_BYTES, LOADED_ROWS, STORED_ROWS, map};
use super::one_pass::{self, Teams};
use super::short;
use super::{AttentionBackward, AttentionForward, Passes, Sizes, scale, scale_log2};
use crate::backend::HeadSpec;
use crate::cuda::{Allocation, Arguments, DevicePointer, Driver, KernelId, Launch};
use crate::error::{Error, Result};

/// Rows of a result that a consumer computes; two consumers share an item of backward.
const CONSUMER_ROWS: usize = 64;
pub(super) const BACKWARD_ROWS: usize = 128;

/// Stages of the rings, and rows of the other side in each, as the kernels are compiled.
const FORWARD_KEYS: usize = 128;
const BACKWARD_STAGES: usize = 3;
const BACKWARD_QUERIES: usize = 64;

/// Rows of an item: 192 are three consumers, for which wide heads leave no registers.
const fn forward_rows(head_dim: usize) -> &'static [usize] {
    if head_dim <= 64 { &[128, 192] } else { &[128] }
}

/// Scores that an item takes the time of. Estimated, as long as no GPU has timed it: it takes as
/// many steps as its last row sees tiles of keys, and the time of one more in which nothing is
/// hidden; three consumers make a step 10% faster for each of their rows.
pub(super) fn forward_item(sequence: usize, rows: usize, tile: usize) -> f64 {
    let steps = sequence.min((tile + 1) * rows).div_ceil(FORWARD_KEYS) + 1;
    (steps * FORWARD_KEYS * rows) as f64 * if rows == 192 { 0.9 } else { 1.0 }
}

/// Rows of an item, of those that there are kernels for: as is estimated to take the least.
pub(super) fn rows_of_forward(head_dim: usize, sequence: usize) -> usize {
    let cost = |rows: usize| -> f64 {
        (0..sequence.div_ceil(rows)).map(|tile| forward_item(sequence, rows, tile)).sum()
    };
    let all = forward_rows(head_dim).iter().copied();
    let cheapest = all.min_by(|&a, &b| cost(a).total_cmp(&cost(b)));
    cheapest.expect("every head dim has a kernel")
}

const fn forward_stages(head_dim: usize) -> usize {
    match head_dim {
        ..=64 => 4,
        65..=96 => 3,
        _ => 2,
    }
}
const fn backward_keys(head_dim: usize) -> usize {
    if head_dim <= 64 { 128 } else { 64 }
}

#[derive(Clone, Debug)]
pub(super) struct Kernels {
    heads: HeadSpec,
    multiprocessors: usize,
    /// The rows of an item, and the kernel.
    forward: Vec<(usize, KernelId)>,
    backward_q: KernelId,
    backward_kv: KernelId,
    short: Option<short::Kernels>,
    one_pass: Option<one_pass::Kernels>,
    /// `None`: the cost model chooses.
    passes: Option<Passes>,
    /// What is added up by several blocks is added up in one order.
    deterministic: bool,
    /// For passes on one stream: each plan's is in one of them.
    scratch: Vec<Allocation>,
}

/// How a backward pass is run.
pub(super) enum Way {
    Short,
    One(Teams),
    Two,
}

impl Way {
    /// As `passes` say, where there is such a kernel; `None`: the cost model decides.
    pub fn chosen(
        multiprocessors: usize,
        heads: HeadSpec,
        sizes: Sizes,
        documents: bool,
        passes: Option<Passes>,
    ) -> Self {
        if short::chosen(multiprocessors, heads, sizes, passes) {
            return Way::Short;
        }
        let teams = Teams::chosen(multiprocessors, heads, sizes, documents, passes);
        teams.map_or(Way::Two, Way::One)
    }

    /// Device memory that the pass needs while it runs.
    pub fn scratch_bytes(&self, heads: HeadSpec, sizes: Sizes) -> u64 {
        match self {
            Way::One(teams) => teams.scratch(heads, sizes).bytes,
            Way::Short | Way::Two => 0,
        }
    }
}

/// The heads of a result, and how they are walked.
#[derive(Clone, Copy)]
struct Walk {
    /// Of one sequence.
    heads: usize,
    /// Of all sequences, walked together: what they read fits in half of the L2 cache.
    section: usize,
}

impl Kernels {
    /// Errors: a build without them.
    pub fn new(driver: &mut dyn Driver, heads: HeadSpec) -> Result<Self> {
        let HeadSpec { head_dim, .. } = heads;
        let multiprocessors = driver.properties().multiprocessors as usize;
        let mut kernel = |pass: &str, rows: usize| {
            driver.kernel(&format!("attention_{pass}_sm90_{rows}x{head_dim}"))
        };
        let all_rows = forward_rows(head_dim).iter();
        let forward = all_rows.map(|&rows| Ok((rows, kernel("forward", rows)?)));
        Ok(Kernels {
            heads,
            multiprocessors,
            forward: forward.collect::<Result<_>>()?,
            backward_q: kernel("backward_q", BACKWARD_ROWS)?,
            backward_kv: kernel("backward_kv", BACKWARD_ROWS)?,
            short: short::Kernels::new(driver, heads)?,
            one_pass: one_pass::Kernels::new(driver, heads)?,
            passes: None,
            deterministic: true,
            scratch: vec![],
        })
    }

    /// False: there is no such kernel.
    pub fn set_passes(&mut self, passes: Passes) -> bool {
        self.passes = Some(passes);
        match passes {
            Passes::Short => self.short.is_some(),
            Passes::One => self.one_pass.is_some(),
            Passes::Two => true,
        }
    }

    /// Those that there are kernels for.
    pub fn all_passes(&self, sizes: Sizes) -> Vec<Passes> {
        let one = self.one_pass.as_ref().and(self.teams(sizes)).map(|_| Passes::One);
        let short = short::applies(self.heads, sizes).then_some(Passes::Short);
        [Some(Passes::Two), one, short].into_iter().flatten().collect()
    }

    fn teams(&self, sizes: Sizes) -> Option<Teams> {
        Teams::new(self.multiprocessors, self.heads, sizes)
    }

    pub fn set_deterministic(&mut self, deterministic: bool) {
        self.deterministic = deterministic;
    }

    /// Gives its memory back, after all its work has run.
    pub fn release(self, driver: &mut dyn Driver) -> Result<()> {
        self.scratch.into_iter().try_for_each(|memory| driver.release(memory))
    }

    fn tile_bytes(&self, rows: usize) -> usize {
        rows * self.heads.head_dim * BF16_BYTES
    }

    /// Errors: matrices that leave their buffers.
    pub fn forward(
        &self,
        driver: &mut dyn Driver,
        sizes: Sizes,
        pass: &AttentionForward,
    ) -> Result<(Launch, Arguments)> {
        let HeadSpec { heads, kv_heads, head_dim } = self.heads;
        let ring_bytes = 2 * forward_stages(head_dim) * self.tile_bytes(FORWARD_KEYS);
        let rows = rows_of_forward(head_dim, sizes.sequence);
        let found = self.forward.iter().find(|(of, _)| *of == rows);
        let &(_, kernel) = found.expect("it is one of those that were looked up");
        // This item's own rows and the next one's, the ring, and a tile to store through.
        let shared_bytes = 3 * self.tile_bytes(rows) + ring_bytes;
        let walk = self.of_queries(driver, sizes);
        let arguments = Arguments::new()
            .with(map(driver, pass.qkv, head_dim, heads + 2 * kv_heads, sizes, LOADED_ROWS)?)
            .with(map(driver, pass.out, head_dim, heads, sizes, STORED_ROWS)?)
            .with(pass.document_starts.unwrap_or_default())
            .with(pass.log_sum_exp);
        let arguments = self.sized(arguments, sizes, walk).with(scale_log2(self.heads) as f32);
        Ok((launch(driver, kernel, rows, sizes, walk, shared_bytes), arguments))
    }

    /// As [`Kernels::set_passes`] said, or what the cost model says, and which passes these are.
    /// Errors: as [`Kernels::forward`]; sums of d_q that have no place where one pass was asked
    /// for, or no memory.
    pub fn backward(
        &mut self,
        driver: &mut dyn Driver,
        sizes: Sizes,
        pass: &AttentionBackward,
    ) -> Result<(Passes, Vec<(Launch, Arguments)>)> {
        if self.passes == Some(Passes::One) && self.teams(sizes).is_none() {
            let Sizes { batch, sequence } = sizes;
            return Err(Error::launch(
                "attention",
                driver.device(),
                format!("no place for d_q's sums of {batch} sequences of {sequence} tokens"),
                format!(
                    "choose Passes::Two; Passes::One takes sequences of at most {} tokens with \
                     these heads, and no more than 65534 of them for each team of blocks",
                    one_pass::most_tokens(self.heads)
                ),
            ));
        }
        let documents = pass.forward.document_starts.is_some();
        let way = Way::chosen(self.multiprocessors, self.heads, sizes, documents, self.passes);
        match (way, &self.short, &self.one_pass) {
            (Way::Short, Some(kernels), _) => {
                Ok((Passes::Short, vec![kernels.backward(driver, sizes, pass)?]))
            }
            (Way::One(teams), _, Some(kernels)) => {
                let bytes = teams.scratch(self.heads, sizes).bytes;
                let memory = match self.scratch.iter().find(|memory| memory.bytes >= bytes) {
                    Some(memory) => *memory,
                    None => {
                        let memory = driver.allocate("sums of attention's gradients", bytes)?;
                        self.scratch.push(memory);
                        memory
                    }
                };
                let place = memory.address;
                let order = self.deterministic;
                let launches = kernels.backward(driver, sizes, pass, teams, order, place)?;
                Ok((Passes::One, launches.into()))
            }
            _ => Ok((Passes::Two, self.backward_in_two(driver, sizes, pass)?.into())),
        }
    }

    /// The kernel for d_q, which makes delta, and the one for d_k and d_v.
    fn backward_in_two(
        &self,
        driver: &mut dyn Driver,
        sizes: Sizes,
        pass: &AttentionBackward,
    ) -> Result<[(Launch, Arguments); 2]> {
        let AttentionBackward { forward, d_out, delta, d_qkv, angles } = *pass;
        let null = DevicePointer::NULL;
        let [table, positions] = angles.map_or([null; 2], |it| [it.table, it.positions]);
        let HeadSpec { heads, kv_heads, head_dim } = self.heads;
        let qkv_heads = heads + 2 * kv_heads;
        let maps = Arguments::new()
            .with(map(driver, forward.qkv, head_dim, qkv_heads, sizes, LOADED_ROWS)?)
            .with(map(driver, d_out, head_dim, heads, sizes, LOADED_ROWS)?)
            .with(map(driver, d_qkv, head_dim, qkv_heads, sizes, STORED_ROWS)?)
            .with(forward.document_starts.unwrap_or_default())
            .with(table)
            .with(positions);
        let of_q = maps.clone().with(forward.out).with(d_out).with(forward.log_sum_exp).with(delta);
        let of_kv = maps.with(forward.log_sum_exp).with(delta);
        // Two own tiles, stages of two tiles, and a tile to store through.
        let passes = [
            (self.backward_q, of_q, self.of_queries(driver, sizes), backward_keys(head_dim)),
            (self.backward_kv, of_kv, self.of_keys(driver, sizes), BACKWARD_QUERIES),
        ];
        Ok(passes.map(|(kernel, arguments, walk, others)| {
            let ring_bytes = 2 * BACKWARD_STAGES * self.tile_bytes(others);
            let shared_bytes = 3 * self.tile_bytes(BACKWARD_ROWS) + ring_bytes;
            let arguments = self
                .sized(arguments, sizes, walk)
                .with(scale(self.heads) as f32)
                .with(scale_log2(self.heads) as f32);
            (launch(driver, kernel, BACKWARD_ROWS, sizes, walk, shared_bytes), arguments)
        }))
    }

    /// Results for queries: the heads of a group read one head of k and of v.
    fn of_queries(&self, driver: &dyn Driver, sizes: Sizes) -> Walk {
        let HeadSpec { heads, kv_heads, .. } = self.heads;
        let groups = self.in_half_l2(driver, sizes, 1);
        Walk { heads, section: (groups * heads / kv_heads).min(sizes.batch * heads) }
    }

    /// Results for keys: a head reads its group's heads of q and of d_out.
    fn of_keys(&self, driver: &dyn Driver, sizes: Sizes) -> Walk {
        let HeadSpec { heads, kv_heads, .. } = self.heads;
        let section = self.in_half_l2(driver, sizes, heads / kv_heads);
        Walk { heads: kv_heads, section: section.min(sizes.batch * kv_heads) }
    }

    /// How often `count` heads of each of two matrices fit in half of the L2 cache, at least once.
    fn in_half_l2(&self, driver: &dyn Driver, sizes: Sizes, count: usize) -> usize {
        let bytes = 2 * count * sizes.sequence * self.heads.head_dim * BF16_BYTES;
        (driver.properties().l2_bytes as usize / 2 / bytes).max(1)
    }

    fn sized(&self, arguments: Arguments, sizes: Sizes, walk: Walk) -> Arguments {
        arguments
            .with(sizes.batch as i32)
            .with(sizes.sequence as i32)
            .with(self.heads.heads as i32)
            .with(self.heads.kv_heads as i32)
            .with(walk.section as i32)
    }
}

/// No more blocks than there are multiprocessors, each of which has room for one.
fn launch(
    driver: &dyn Driver,
    kernel: KernelId,
    rows: usize,
    Sizes { batch, sequence }: Sizes,
    walk: Walk,
    shared_bytes: usize,
) -> Launch {
    let items = batch * walk.heads * sequence.div_ceil(rows);
    let blocks = items.min(driver.properties().multiprocessors as usize);
    let threads = 128 * (1 + rows / CONSUMER_ROWS);
    Launch::new(kernel, [blocks as u32, 1, 1], [threads as u32, 1, 1])
        .shared_bytes(shared_bytes as u32)
}
