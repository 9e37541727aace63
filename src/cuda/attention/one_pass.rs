//! The kernels of kernels/attention_backward_sm90.cu: the whole backward pass at once, where a head
//! has work for a team of blocks, see [`Teams`].

use super::maps::{self, BF16_BYTES, LOADED_ROWS, STORED_ROWS};
use super::{AttentionBackward, Passes, Sizes, scale, scale_log2};
use crate::backend::HeadSpec;
use crate::cuda::{Arguments, DevicePointer, Driver, KernelId, Launch};
use crate::error::Result;

/// Head dims with a kernel: those of which a half is a part of a swizzle's span.
const HEAD_DIMS: [usize; 3] = [32, 64, 128];

/// As the kernel is compiled: rows of an item and of a stage, and stages.
const KEYS: usize = 128;
const QUERIES: usize = 64;
const fn stages(head_dim: usize) -> usize {
    if head_dim <= 64 { 3 } else { 2 }
}
const THREADS: u32 = 384;
const DELTA_THREADS: u64 = 256;

/// Sums of d_q that are added to at a time, one query head of each team's group, take no more, so
/// that they and what is read for them fit in an L2 cache; and all sums no more than the second.
const MOST_ACTIVE_BYTES: usize = 32 << 20;
const MOST_SUMS_BYTES: usize = 256 << 20;
/// See [`Teams::pay`].
const LEAST_KEY_TILES: usize = 4;
/// A semaphore counts a team's heads in its upper 16 bits, tiles of keys in its lower 16.
const MOST_COUNT: usize = (1 << 16) - 1;

/// How blocks are dealt to heads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Teams {
    /// Heads of k and v that are worked on at a time.
    pub count: usize,
    /// Blocks that share a head.
    pub blocks: usize,
    /// Steps of the longest block, each of 128 keys and 64 queries.
    pub steps: usize,
}

impl Teams {
    /// The division with the shortest longest block, and of equal ones that with the fewest heads,
    /// which read least memory at a time. `None`: no team's sums have a place.
    pub fn new(multiprocessors: usize, heads: HeadSpec, sizes: Sizes) -> Option<Self> {
        let HeadSpec { heads, kv_heads, head_dim } = heads;
        let (units, group) = (sizes.batch * kv_heads, heads / kv_heads);
        let key_tiles = sizes.sequence.div_ceil(KEYS);
        let query_tiles = sizes.sequence.div_ceil(QUERIES);
        let head_bytes = query_tiles * QUERIES * head_dim * size_of::<f32>();
        let most = most_sums_bytes(group) / head_bytes;
        let divisions = (1..=key_tiles.min(multiprocessors)).filter_map(|blocks| {
            let count = (multiprocessors / blocks).min(units).min(most);
            let rounds = units.div_ceil(count.max(1));
            let steps = rounds * group * longest(key_tiles, query_tiles, blocks);
            let counted = rounds < MOST_COUNT && key_tiles < MOST_COUNT;
            (count > 0 && counted).then_some(Teams { count, blocks, steps })
        });
        divisions.min_by_key(|teams| (teams.steps, std::cmp::Reverse(teams.blocks)))
    }

    /// Of a pass in one, where nobody asked for `passes`: as it pays. `None`: in two.
    pub fn chosen(
        multiprocessors: usize,
        heads: HeadSpec,
        sizes: Sizes,
        documents: bool,
        passes: Option<Passes>,
    ) -> Option<Self> {
        let teams = || Teams::new(multiprocessors, heads, sizes);
        match passes {
            _ if !HEAD_DIMS.contains(&heads.head_dim) => None,
            Some(Passes::Short | Passes::Two) => None,
            Some(Passes::One) => teams(),
            None => teams().filter(|it| !documents && it.pay(multiprocessors, heads, sizes)),
        }
    }

    /// Of the longest block.
    pub fn scores(&self) -> f64 {
        (self.steps * KEYS * QUERIES) as f64
    }

    /// Tiles of queries that the sums of d_q have a place for.
    fn places(self, heads: HeadSpec, sizes: Sizes) -> usize {
        self.count * (heads.heads / heads.kv_heads) * sizes.sequence.div_ceil(QUERIES)
    }

    pub fn scratch(self, heads: HeadSpec, sizes: Sizes) -> Scratch {
        let places = self.places(heads, sizes);
        let semaphores_at = (places * QUERIES * heads.head_dim * size_of::<f32>()) as u64;
        Scratch { bytes: semaphores_at + (places * size_of::<u32>()) as u64, semaphores_at }
    }

    /// Estimated, as long as no GPU has timed it: whether five products for each step of the
    /// longest block are less than the seven of two passes, whose blocks all take as long. Below 4
    /// tiles of keys the two warps that make d_q of complete sums would be what everybody waits
    /// for; with documents, too, as each of them is short.
    fn pay(&self, multiprocessors: usize, heads: HeadSpec, sizes: Sizes) -> bool {
        let key_tiles = sizes.sequence.div_ceil(KEYS);
        let all = longest(key_tiles, sizes.sequence.div_ceil(QUERIES), 1);
        let two = (sizes.batch * heads.heads * all).div_ceil(multiprocessors);
        key_tiles >= LEAST_KEY_TILES && 5 * self.steps < 7 * two
    }
}

/// Of one query head of each of a number of teams.
fn most_sums_bytes(group: usize) -> usize {
    MOST_ACTIVE_BYTES.min(MOST_SUMS_BYTES / group)
}

/// Tokens of the longest sequence whose sums have a place.
pub(super) fn most_tokens(HeadSpec { heads, kv_heads, head_dim }: HeadSpec) -> usize {
    let rows = most_sums_bytes(heads / kv_heads) / (head_dim * size_of::<f32>());
    (rows / QUERIES * QUERIES).min((MOST_COUNT - 1) * KEYS)
}

/// Tiles of queries of that one of a team's blocks that has most of them, for one query head: as
/// the kernel deals tiles of keys.
fn longest(key_tiles: usize, query_tiles: usize, blocks: usize) -> usize {
    let mut steps = vec![0; blocks];
    for place in 0..key_tiles {
        let (round, turn) = (place / blocks, place % blocks);
        let member = if round % 2 == 1 { blocks - 1 - turn } else { turn };
        steps[member] += query_tiles - (key_tiles - 1 - place) * (KEYS / QUERIES);
    }
    steps.into_iter().max().unwrap_or(0)
}

#[derive(Clone, Debug)]
pub(super) struct Kernels {
    heads: HeadSpec,
    delta: KernelId,
    backward: KernelId,
}

/// Device memory that a pass needs while it runs; all passes on one stream share it.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    pub bytes: u64,
    semaphores_at: u64,
}

impl Kernels {
    /// `None`: no kernel for this head dim. Errors: a build without them.
    pub fn new(driver: &mut dyn Driver, heads: HeadSpec) -> Result<Option<Self>> {
        let head_dim = heads.head_dim;
        if !HEAD_DIMS.contains(&head_dim) {
            return Ok(None);
        }
        let delta = driver.kernel(&format!("attention_delta_sm90_{head_dim}"))?;
        let backward = driver.kernel(&format!("attention_backward_sm90_{KEYS}x{head_dim}"))?;
        Ok(Some(Kernels { heads, delta, backward }))
    }

    /// Makes delta, then everything else. `sums`: as many bytes as [`Teams::scratch`] says.
    /// `deterministic`: tiles of keys add to d_q one after the other, which decides its bits.
    ///
    /// Errors: matrices that leave their buffers.
    pub fn backward(
        &self,
        driver: &mut dyn Driver,
        sizes: Sizes,
        pass: &AttentionBackward,
        teams: Teams,
        deterministic: bool,
        sums: DevicePointer,
    ) -> Result<[(Launch, Arguments); 2]> {
        let AttentionBackward { forward, d_out, delta, d_qkv, angles } = *pass;
        let HeadSpec { heads, kv_heads, head_dim } = self.heads;
        let semaphores = sums.offset(teams.scratch(self.heads, sizes).semaphores_at);
        let rows = (sizes.batch * sizes.sequence * heads) as u64;
        let blocks = (rows * head_dim as u64 / 8).div_ceil(DELTA_THREADS);
        let of_delta = Arguments::new()
            .with(forward.out)
            .with(d_out)
            .with(delta)
            .with(semaphores)
            .with(teams.places(self.heads, sizes) as i32)
            .with(sizes.batch as i32)
            .with(sizes.sequence as i32)
            .with(heads as i32);
        let delta_launch =
            Launch::new(self.delta, [blocks as u32, 1, 1], [DELTA_THREADS as u32, 1, 1]);

        let null = DevicePointer::NULL;
        let [table, positions] = angles.map_or([null; 2], |it| [it.table, it.positions]);
        let mut map = |address, heads, rows| {
            maps::map(driver, address, self.heads.head_dim, heads, sizes, rows)
        };
        let qkv_heads = heads + 2 * kv_heads;
        let arguments = Arguments::new()
            .with(map(forward.qkv, qkv_heads, LOADED_ROWS)?)
            .with(map(d_out, heads, LOADED_ROWS)?)
            .with(map(d_qkv, qkv_heads, STORED_ROWS)?)
            .with(forward.document_starts.unwrap_or_default())
            .with(table)
            .with(positions)
            .with(forward.log_sum_exp)
            .with(delta)
            .with(d_qkv)
            .with(sums)
            .with(semaphores)
            .with(sizes.batch as i32)
            .with(sizes.sequence as i32)
            .with(heads as i32)
            .with(kv_heads as i32)
            .with(teams.blocks as i32)
            .with(i32::from(deterministic))
            .with(scale(self.heads) as f32)
            .with(scale_log2(self.heads) as f32);
        let tile_bytes = |rows: usize| rows * head_dim * BF16_BYTES;
        // Keys, values and the tiles that results leave through; stages of queries and d_out; dS
        // twice; a part of d_q in f32.
        let shared_bytes = 3 * tile_bytes(KEYS)
            + 2 * stages(head_dim) * tile_bytes(QUERIES)
            + 2 * KEYS * QUERIES * BF16_BYTES
            + QUERIES * head_dim * size_of::<f32>();
        let blocks = (teams.count * teams.blocks) as u32;
        let launch = Launch::new(self.backward, [blocks, 1, 1], [THREADS, 1, 1])
            .shared_bytes(shared_bytes as u32);
        // Blocks of one team wait for each other.
        let launch = if teams.blocks > 1 { launch.cooperative() } else { launch };
        Ok([(delta_launch, of_delta), (launch, arguments)])
    }
}
