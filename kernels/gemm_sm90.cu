// Matrix products on Hopper: bf16 factors, fp32 accumulation; TMA in, wgmma, TMA out.
//
//   nt  out = A B^T (+ addend)    A [M,K], B [N,K]    a layer forward
//   nn  out = A B   (+ addend)    A [M,K], B [K,N]    the gradient of its input
//   tn  out += A^T B              A [K,M], B [K,N]    the gradient of its weight
//   nt_rotary  out = A B^T, rotated                   q, k and v
//   nt_swiglu  out = A B^T, product = SwiGLU(out)     gate and up, B [2,N,K]
//   nn_swiglu  out = SwiGLU'(gate, up) A B            their gradient, by that of the product
//
// Contract: everything row-major; rows are multiples of 8 values; out [M,N] is bf16, and fp32 for
// tn. The tensor maps (src/cuda/gemm/sm90.rs) have 128-byte swizzles and boxes of 64 columns,
// innermost first: {64, TILE} for a factor whose rows lie along K, half as high for B of a pair of
// blocks and of two halves; {64, 64} for one whose rows lie along M or N, for out, and for the
// addend and the gate and up that are read. Where a tile has 96 columns of gate and of up, out and
// product are stored in boxes {32, 64} with 64-byte swizzles. Tails cost nothing but work: TMA
// fills what lies outside with zeros and does not store it. One rounding, at the end. Where gate
// and up lie side by side, [M,2,N], maps have three dimensions, so that a box that leaves one does
// not enter the other. The addend may be out itself.
//
// A block of three warpgroups keeps its multiprocessor to itself and takes one tile after the
// other. The producer (one thread) loads A and B into a ring of stages, which runs on across tiles.
// Two consumers either share a tile, half of its rows each, or take tiles in turn, each a whole one
// of fewer columns, so that one writes its tile while the other multiplies.
//
// Two blocks may be launched as a cluster. They take tiles one below the other, and each loads half
// of B's tile for both.
//
// tn adds to its result in the L2 cache, by reductions that nobody waits for, which take subnormal
// numbers for zeros and make none. Where the last tiles are fewer than the blocks, the K of each
// may be cut into `splits`, a block for each. They add one after the other, in the order of K:
// semaphores[] say whose turn it is, so that every run has the same bits.
#include "isobath.cuh"

// ---------------------------------------------------------------- sizes
constexpr int WARPGROUP = 128;
constexpr int CONSUMERS = 2;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int MMA_M = 64, MMA_K = 16;  // of one wgmma
constexpr int TILE_K = 64;             // 128 bytes: the span of the swizzle
constexpr int SPAN = 128;
constexpr int BLOCK_BYTES = 64 * SPAN;  // of a box of 64 rows and 64 columns
constexpr int STORES = 2;               // store tiles of a consumer: one is written, one is read
// Tile rows that are visited together: so many rows of A and about as many of B stay in the L2
// cache while the multiprocessors go through them.
constexpr int GROUP = 8;
// 168 registers at launch x 3 = 24 + 240 + 240.
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

// How a factor lies in memory: its rows along K, or along M (A) and N (B). HALVES_ALONG_K: [2,N,K],
// of which a tile takes as many rows of each half.
enum Rows { ALONG_K, ACROSS_K, HALVES_ALONG_K };

// What a kernel is compiled for. `SHARED_TILES`: both consumers work on one tile.
template <Rows A_, Rows B_, int TILE_M_, int TILE_N_, int STAGES_, bool SHARED_TILES_>
struct Kind {
  static constexpr Rows A = A_, B = B_;
  static constexpr int TILE_M = TILE_M_, TILE_N = TILE_N_, STAGES = STAGES_;
  static constexpr bool SHARED_TILES = SHARED_TILES_;
  static constexpr int CONSUMER_M = SHARED_TILES ? TILE_M / CONSUMERS : TILE_M;
  static constexpr int BLOCKS = CONSUMER_M / MMA_M;  // wgmmas that a consumer's rows take
  // Columns of the result, counted once where a tile has them of both halves.
  static constexpr int COLUMNS = B == HALVES_ALONG_K ? TILE_N / 2 : TILE_N;
  static constexpr int A_BYTES = TILE_M * SPAN, STAGE_BYTES = A_BYTES + TILE_N * SPAN;
  static constexpr int ACCUMULATORS = BLOCKS * TILE_N / 2;  // of a thread
  static constexpr int PARTS = ACCUMULATORS / 32;           // of 64 x 64, of a consumer's rows
  static_assert(PARTS % STORES == 0);  // a tile begins with the first store tile
  // Columns of a store tile: of a result; or, where those of the tile are no multiple of that, of
  // gate, up and product.
  static constexpr int STORED = COLUMNS % 64 == 0 ? 64 : 3 * 32;
  // Consumers' warps that read a stage.
  static constexpr int READERS = (SHARED_TILES ? CONSUMERS : 1) * WARPGROUP / 32;
};
template <class K>
using Accumulators = float[K::BLOCKS][K::TILE_N / 2];

// ---------------------------------------------------------------- the ring
// Past what another consumer reads.
template <int STAGES>
DEVICE void skip(Position<STAGES>& at, int steps) {
  const int stage = at.stage + steps;
  at.parity ^= uint32_t(stage / STAGES) & 1;
  at.stage = stage % STAGES;
}

// ---------------------------------------------------------------- the work
// In shared memory: it is asked for once a tile, and would hold registers that the accumulators
// need.
struct Work {
  int rows, columns;  // how many tiles M and N have, those of a cluster counted as one
  int whole;          // tiles that a block, or cluster, takes whole; of those after them,
  int splits;         // so many share the K of one
  int steps;          // of K, all splits together
  int cluster, rank;  // blocks that share B's tiles, and which of them this one is
};
struct Item {
  int m, n;           // of the tile's first element
  int split, splits;  // which of how many; 1: the tile is whole
  int shared;         // which tile of those that are split, of this block alone
  int first, end;     // steps of K
};
DEVICE int split_tiles(const Work& work) { return work.rows * work.columns - work.whole; }
DEVICE int items(const Work& work) { return work.whole + split_tiles(work) * work.splits; }
DEVICE int first_item(const Work& work) { return int(blockIdx.x) / work.cluster; }
DEVICE int item_step(const Work& work) { return int(gridDim.x) / work.cluster; }
template <class K>
DEVICE Work work_of(int m, int n, int k, int splits) {
  const int cluster = int(cluster_size()), cluster_m = cluster * K::TILE_M;
  const int rows = (m + cluster_m - 1) / cluster_m, columns = (n + K::COLUMNS - 1) / K::COLUMNS;
  const int tiles = rows * columns, clusters = int(gridDim.x) / cluster;
  return {rows,
          columns,
          splits == 1 ? tiles : tiles / clusters * clusters,
          splits,
          (k + TILE_K - 1) / TILE_K,
          cluster,
          int(cluster_rank())};
}
template <class K>
DEVICE Item item_at(const Work& work, int index) {
  // After the whole tiles, first all that begin with the first step.
  const int behind = index - work.whole;
  const bool whole = behind < 0;
  const int split = whole ? 0 : behind / split_tiles(work);
  const int splits = whole ? 1 : work.splits;
  const int tile = whole ? index : work.whole + behind % split_tiles(work);
  const int group = GROUP / work.cluster, group_tiles = group * work.columns;
  const int first_row = tile / group_tiles * group, within = tile % group_tiles;
  const int group_rows = min(group, work.rows - first_row);
  // As even as possible, and none without a step: there are no more splits than steps.
  const int each = work.steps / splits, left = work.steps % splits;
  const int first_step = split * each + min(split, left);
  return {((first_row + within % group_rows) * work.cluster + work.rank) * K::TILE_M,
          within / group_rows * K::COLUMNS,
          split,
          splits,
          (tile - work.whole) * work.cluster + work.rank,
          first_step,
          first_step + each + (split < left ? 1 : 0)};
}

// ---------------------------------------------------------------- producer
// Step `step` of a tile's rows of a factor, `first` the first of them.
template <Rows ROWS, int TILE>
DEVICE void load(uint8_t* to, const TensorMap* map, uint64_t* full, int step, int first) {
  if constexpr (ROWS == ALONG_K) {
    tma_load_2d(to, map, full, step * TILE_K, first);
  } else if constexpr (ROWS == HALVES_ALONG_K) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      tma_load_3d(to + half * (TILE / 2 * SPAN), map, full, step * TILE_K, first, half);
  } else {
#pragma unroll
    for (int block = 0; block < TILE / 64; ++block)
      tma_load_2d(to + block * BLOCK_BYTES, map, full, first + block * 64, step * TILE_K);
  }
}
// The same to both blocks of a pair, of which each loads its part.
template <Rows ROWS, int TILE>
DEVICE void load_for_pair(uint8_t* to, const TensorMap* map, uint64_t* full, int step, int first,
                          int rank) {
  constexpr uint16_t BOTH = 0b11;
  uint8_t* const half = to + rank * (TILE / 2 * SPAN);
  if constexpr (ROWS == ALONG_K) {
    tma_load_multicast_2d(half, map, full, step * TILE_K, first + rank * (TILE / 2), BOTH);
  } else if constexpr (ROWS == HALVES_ALONG_K) {
    tma_load_multicast_3d(half, map, full, step * TILE_K, first, rank, BOTH);
  } else {
    for (int block = rank; block < TILE / 64; block += 2)
      tma_load_multicast_2d(to + block * BLOCK_BYTES, map, full, first + block * 64, step * TILE_K,
                            BOTH);
  }
}

template <class K>
DEVICE void produce(const TensorMap* map_a, const TensorMap* map_b, uint8_t* ring, uint64_t* full,
                    uint64_t* empty, const Work& work) {
  Position<K::STAGES> at;
  for (int index = first_item(work); index < items(work); index += item_step(work)) {
    const Item item = item_at<K>(work, index);
    for (int step = item.first; step < item.end; ++step) {
      uint8_t *const a = ring + at.stage * K::STAGE_BYTES, *const b = a + K::A_BYTES;
      uint64_t* const arrived = &full[at.stage];
      // The first round passes at once. What the other block of a pair has not read, either, is not
      // overwritten.
      mbarrier_wait(&empty[at.stage], at.parity ^ 1);
      mbarrier_arrive_expect_tx(arrived, K::STAGE_BYTES);  // the other block's part included
      load<K::A, K::TILE_M>(a, map_a, arrived, step, item.m);
      if (work.cluster == 1)
        load<K::B, K::TILE_N>(b, map_b, arrived, step, item.n);
      else
        load_for_pair<K::B, K::TILE_N>(b, map_b, arrived, step, item.n, work.rank);
      advance(at);
    }
  }
}

// ---------------------------------------------------------------- consumers
template <Rows ROWS>
DEVICE uint64_t descriptor(const uint8_t* tile) {
  if constexpr (ROWS == ACROSS_K) return descriptor_mn_major(tile, BLOCK_BYTES);
  return descriptor_k_major(tile);
}
// From one value of k to the next, in the 16 bytes that descriptors count.
template <Rows ROWS>
DEVICE uint64_t along(int k) {
  return uint64_t(k) * (ROWS == ACROSS_K ? SPAN : sizeof(bf16)) / 16;
}

// Says for a warp that it has read a stage, to the producer of each block that writes there. What
// has been read so far was read by wgmmas, which are complete.
DEVICE void release(uint64_t* empty, int cluster) {
  const int lane = int(threadIdx.x) % 32;
  if (cluster == 1) {
    if (lane == 0) mbarrier_arrive(empty);
  } else if (lane < cluster) {
    mbarrier_arrive_peer(empty, uint32_t(lane));
  }
}

// accumulators = the consumer's rows of the tile, over all steps. One batch of wgmma is always in
// flight; when it is known that the one before has read its stage, that is released, by one arrival
// for each warp; so is `next`, if there is one, when the last step has been issued. `first_row`: of
// the consumer's, in the tile.
template <class K>
DEVICE void multiply(Accumulators<K>& accumulators, const uint8_t* ring, uint64_t* full,
                     uint64_t* empty, uint64_t* next, Position<K::STAGES>& at, int first_row,
                     int steps, int cluster) {
  int previous_stage = 0;
  for (int step = 0; step < steps; ++step) {
    const uint8_t* const stage = ring + at.stage * K::STAGE_BYTES;
    const uint64_t a = descriptor<K::A>(stage + first_row * SPAN);
    const uint64_t b = descriptor<K::B>(stage + K::A_BYTES);
    mbarrier_wait(&full[at.stage], at.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < TILE_K; k += MMA_K) {
#pragma unroll
      for (int block = 0; block < K::BLOCKS; ++block)
        wgmma<K::TILE_N, K::A == ACROSS_K, K::B == ACROSS_K>(
            accumulators[block], a + block * (BLOCK_BYTES / 16) + along<K::A>(k),
            b + along<K::B>(k), step > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0) release(&empty[previous_stage], cluster);
    previous_stage = at.stage;
    advance(at);
  }
  if (next && threadIdx.x % 32 == 0) mbarrier_arrive(next);
  wgmma_wait<0>();
  release(&empty[previous_stage], cluster);
}

// Accumulator i of a thread: row 8 (i/2 % 2) + lane/4 of its warp's 16, column 8 (i/4) + 2 (lane%4)
// + i%2 (PTX ISA, "wgmma register fragments"). Here i is within 64 columns; it is even.
struct Place {
  int row, column;
};
DEVICE Place place_of(int i, int row, int column) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) % WARPGROUP / 32;
  return {row + warp * 16 + lane / 4 + 8 * (i / 2 % 2), column + 8 * (i / 4) + 2 * (lane % 4)};
}

// ---------------------------------------------------------------- epilogues
// How a consumer writes bf16: 64 rows of 64 or 96 columns at a time, through its store tiles. In
// shared memory, as Work is.
struct Outbox {
  uint8_t* tiles;
  int barrier;  // of the consumer's threads
};
// Columns of the boxes of a store tile, which lie one after the other. Of eight rows of a box the
// same 16 bytes, which stmatrix writes at once, take each of the 32 banks once, whether rows are of
// 128 bytes or of 64.
template <int COLUMNS>
constexpr int BOX = COLUMNS % 64 == 0 ? 64 : 32;
// Of a store tile or box of so many columns.
template <int COLUMNS>
constexpr int STORE_BYTES = 64 * COLUMNS * int(sizeof(bf16));
// The thread's place for 16 columns in a swizzled store tile; as ldmatrix and stmatrix have them,
// its values are those of the accumulators.
template <int COLUMNS = 64>
DEVICE uint8_t* place_in(uint8_t* tile, int group) {
  constexpr int BOX_SPAN = BOX<COLUMNS> * int(sizeof(bf16)), GROUPS = BOX<COLUMNS> / 16;
  static_assert(COLUMNS % BOX<COLUMNS> == 0);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) % WARPGROUP / 32;
  const int row = warp * 16 + lane % 16, column = group % GROUPS * 16 + lane / 16 * 8;
  const uint32_t offset = row * BOX_SPAN + column * int(sizeof(bf16));
  return tile + group / GROUPS * STORE_BYTES<BOX<COLUMNS>> + swizzle<BOX_SPAN>(offset);
}
// 64 rows of so many columns, the `index`th of a tile's, of which there is an even number.
// fill(group, quarters) packs the thread's 8 of 16 columns, in the order of the accumulators; one
// thread then calls store(store tile).
template <int COLUMNS = 64, class Fill, class Store>
DEVICE void send(const Outbox& out, int index, const Fill& fill, const Store& store) {
  const bool storing = threadIdx.x % WARPGROUP == 0;
  uint8_t* const tile = out.tiles + index % STORES * STORE_BYTES<COLUMNS>;
  // The store before has left this tile; the last one may still read the other.
  if (storing) bulk_wait_read<STORES - 1>();
  barrier_sync(out.barrier, WARPGROUP);
#pragma unroll
  for (int group = 0; group < COLUMNS / 16; ++group) {
    uint32_t quarters[4];
    fill(group, quarters);
    stmatrix_x4(place_in<COLUMNS>(tile, group), quarters);
  }
  fence_proxy_async();
  barrier_sync(out.barrier, WARPGROUP);
  if (storing) {
    store(tile);
    bulk_commit();
  }
}
DEVICE void pack_eight(const float* values, uint32_t (&quarters)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) quarters[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
}

// out = the product.
struct Plain {
  const TensorMap* map_out;
  int m, n;
};
template <class K>
DEVICE void write(const Plain& to, Accumulators<K>& accumulators, const Outbox& out, int row,
                  int column) {
#pragma unroll
  for (int block = 0; block < K::BLOCKS; ++block) {
#pragma unroll
    for (int part = 0; part < K::TILE_N / 64; ++part) {
      const int at_row = row + block * MMA_M, at_column = column + part * 64;
      const auto fill = [&](int group, uint32_t(&quarters)[4]) {
        pack_eight(&accumulators[block][part * 32 + group * 8], quarters);
      };
      send(out, block * (K::TILE_N / 64) + part, fill, [&](const uint8_t* tile) {
        if (at_row < to.m && at_column < to.n) tma_store_2d(to.map_out, tile, at_column, at_row);
      });
    }
  }
}

// out = the product [T,(H+2K)D], q and k rotated as in pointwise.cu, but before they are rounded.
// Heads do not cross tiles, so that a pair (i, i + D/2) is in one thread.
struct Rotated {
  static constexpr int TILES_READ = 0;
  Plain plain;
  const float* table;    // [P,D]: D/2 cosines of a position, then D/2 sines
  const int* positions;  // [T], each below P
  int rotated;           // columns of q and k
  int head_dim;
};
template <class K, int D>
DEVICE void rotate(const Rotated& to, Accumulators<K>& accumulators, int row, int column) {
  if constexpr (K::TILE_N % D == 0) {
#pragma unroll
    for (int block = 0; block < K::BLOCKS; ++block) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {  // the thread's two rows, 8 apart
        const Place at = place_of(2 * lower, row + block * MMA_M, 0);
        if (at.row >= to.plain.m) continue;
        const float* const angles = to.table + size_t(to.positions[at.row]) * D + at.column;
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {  // 8 columns of the first half
          const float2 cosines = *reinterpret_cast<const float2*>(angles + 8 * j);
          const float2 sines = *reinterpret_cast<const float2*>(angles + D / 2 + 8 * j);
#pragma unroll
          for (int head = 0; head < K::TILE_N / D; ++head) {
            if (column + head * D >= to.rotated) continue;
            float* const x = &accumulators[block][head * (D / 2) + 4 * j + 2 * lower];
            float* const y = x + D / 4;
            const float2 low = make_float2(x[0], x[1]), high = make_float2(y[0], y[1]);
            x[0] = low.x * cosines.x - high.x * sines.x;
            x[1] = low.y * cosines.y - high.y * sines.y;
            y[0] = high.x * cosines.x + low.x * sines.x;
            y[1] = high.y * cosines.y + low.y * sines.y;
          }
        }
      }
    }
  }
}
template <class K>
DEVICE void write(const Rotated& to, Accumulators<K>& accumulators, const Outbox& out, int row,
                  int column) {
  switch (to.head_dim) {  // one of those that divide the tile
    case 32: rotate<K, 32>(to, accumulators, row, column); break;
    case 48: rotate<K, 48>(to, accumulators, row, column); break;
    case 64: rotate<K, 64>(to, accumulators, row, column); break;
    case 96: rotate<K, 96>(to, accumulators, row, column); break;
    default: rotate<K, 128>(to, accumulators, row, column);
  }
  write<K>(to.plain, accumulators, out, row, column);
}

// out = gate and up [T,2F], the two halves of the tile; product = silu(gate) up [T,F] of the
// rounded ones: whoever makes it again from what was stored gets the same bits.
struct Gated {
  static constexpr int TILES_READ = 0;
  const TensorMap *map_out, *map_product;  // {F, 2, T} and {F, T}
  int m, n;                                // n is F
};
template <class K>
DEVICE void write(const Gated& to, Accumulators<K>& accumulators, const Outbox& out, int row,
                  int column) {
  // Gate, up and product: a store tile has 64 columns of one of them, or 32 of each.
  constexpr int RESULTS = 3, WIDTH = BOX<K::STORED>, HELD = K::STORED / WIDTH;
  constexpr int ACROSS = K::COLUMNS / WIDTH, GROUPS = WIDTH / 16;
  static_assert(RESULTS % HELD == 0 && K::BLOCKS * ACROSS * RESULTS / HELD % STORES == 0);
#pragma unroll
  for (int block = 0; block < K::BLOCKS; ++block) {
#pragma unroll
    for (int part = 0; part < ACROSS; ++part) {
      const int at_row = row + block * MMA_M, at_column = column + part * WIDTH;
      const bool inside = at_row < to.m && at_column < to.n;
#pragma unroll
      for (int first = 0; first < RESULTS; first += HELD) {
        const int sent = ((block * ACROSS + part) * RESULTS + first) / HELD;
        const auto fill = [&](int group, uint32_t(&quarters)[4]) {
          const int result = first + group / GROUPS;
          const float* const gates = &accumulators[block][part * (WIDTH / 2) + group % GROUPS * 8];
          const float* const ups = gates + K::COLUMNS / 2;
          if (result < 2) return pack_eight(result == 0 ? gates : ups, quarters);
          uint32_t gate[4], up[4];
          pack_eight(gates, gate);
          pack_eight(ups, up);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            quarters[i] = pack_bf16(swiglu<bf16>(low_float(gate[i]), low_float(up[i])),
                                    swiglu<bf16>(high_float(gate[i]), high_float(up[i])));
        };
        send<K::STORED>(out, sent, fill, [&](const uint8_t* tile) {
          if (!inside) return;
#pragma unroll
          for (int box = 0; box < HELD; ++box) {
            const uint8_t* const values = tile + box * STORE_BYTES<WIDTH>;
            if (first + box < 2)
              tma_store_3d(to.map_out, values, at_column, first + box, at_row);
            else
              tma_store_2d(to.map_product, values, at_column, at_row);
          }
        });
      }
    }
  }
}

// out += the consumer's part of a tile. A thread that loaded what it adds to would wait for memory
// once for each few columns that it has registers for. TMA would add from shared memory, which the
// stages take; and four values at once, traded between lanes, are the same 32 bytes of each row.
template <class K>
DEVICE void add(const Accumulators<K>& accumulators, float* out, int row, int column, int m,
                int n) {
#pragma unroll
  for (int block = 0; block < K::BLOCKS; ++block) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {  // the thread's two rows, 8 apart
      const Place at = place_of(2 * lower, row + block * MMA_M, column);
      if (at.row >= m) continue;
      float* const first = out + size_t(at.row) * n + at.column;
#pragma unroll
      for (int j = 0; j < K::TILE_N / 8; ++j) {  // 8 columns, of which a thread has two
        if (at.column + 8 * j >= n) break;
        const float* const two = &accumulators[block][4 * j + 2 * lower];
        reduce_add_f32x2(first + 8 * j, two[0], two[1]);
      }
    }
  }
}

// Calls finish(accumulators, item, first row of the consumer in the tile) for each of its items.
// Consumers that take tiles in turn multiply in turn, too: by its parity a full stage cannot be
// told from one that is two rounds later. order[c]: phase i is over when the other consumer has
// issued what comes before item i of consumer c; the first item of consumer 0 has nothing before
// it.
template <class K, class Finish>
DEVICE void consume(const uint8_t* ring, uint64_t* full, uint64_t* empty, uint64_t* order,
                    const Work& work, int consumer, const Finish& finish) {
  Position<K::STAGES> at;
  Accumulators<K> accumulators;
  int count = 0;
  for (int index = first_item(work); index < items(work); index += item_step(work), ++count) {
    const Item item = item_at<K>(work, index);
    const int steps = item.end - item.first;
    if constexpr (K::SHARED_TILES) {
      const int first_row = consumer * K::CONSUMER_M;
      multiply<K>(accumulators, ring, full, empty, nullptr, at, first_row, steps, work.cluster);
      finish(accumulators, item, first_row);
    } else if (count % CONSUMERS != consumer) {
      skip(at, steps);
    } else {
      const uint32_t own = uint32_t(count / CONSUMERS);
      mbarrier_wait(&order[consumer], (own + (consumer == 0 ? 1 : 0)) & 1);
      multiply<K>(accumulators, ring, full, empty, &order[1 - consumer], at, 0, steps,
                  work.cluster);
      finish(accumulators, item, 0);
    }
  }
}

// ---------------------------------------------------------------- epilogues that read
// What they read is as much as they write, and they must not wait for global memory. So each
// consumer has STORES buffers, of TILES_READ tiles each, and a thread of the producer's warpgroup,
// its mover: that one loads 64 x 64 values of each matrix ahead of the consumer, which puts results
// in their place; the mover stores them from there and loads what comes next.

// Of one consumer. Both barriers have a phase for each use of a buffer.
struct Exchange {
  Outbox out;         // its tiles: STORES buffers, each of TILES_READ, or one where nothing is read
  uint64_t* loaded;   // STORES: by the mover's copies
  uint64_t* written;  // STORES: by every warp of the consumer
};
template <class Epilogue>
DEVICE uint8_t* buffer_of(const Exchange& exchange, int buffer) {
  return exchange.out.tiles + Epilogue::TILES_READ * buffer * BLOCK_BYTES;
}

// Where 64 x 64 values of a matrix are, as tensor maps count.
struct Corner {
  int row, column;
};
// Stores a buffer's results once they are there, and waits until it can be loaded again.
template <class Epilogue>
DEVICE void store_results(const Epilogue& to, const Exchange& exchange, int buffer, uint32_t parity,
                          Corner from) {
  mbarrier_wait(&exchange.written[buffer], parity);
  if (from.row >= to.m || from.column >= to.n) return;
  store_tiles(to, buffer_of<Epilogue>(exchange, buffer), from);
  bulk_commit();
  bulk_wait_read<0>();
}
template <class K, class Epilogue>
DEVICE void move(const Epilogue& to, const Exchange& exchange, const Work& work, int consumer) {
  constexpr int ACROSS = K::TILE_N / 64;
  Corner held[STORES];  // what the buffers are used for
  bool any = false;     // before the first use there is nothing to be stored
  uint32_t parity = 1;  // of the use before
  int count = 0;
  for (int index = first_item(work); index < items(work); index += item_step(work), ++count) {
    if (!K::SHARED_TILES && count % CONSUMERS != consumer) continue;
    const Item item = item_at<K>(work, index);
    const int first_row = item.m + (K::SHARED_TILES ? consumer * K::CONSUMER_M : 0);
    for (int first = 0; first < K::PARTS; first += STORES) {
#pragma unroll
      for (int buffer = 0; buffer < STORES; ++buffer) {
        if (any) store_results(to, exchange, buffer, parity, held[buffer]);
        const int part = first + buffer;
        held[buffer] = {first_row + part / ACROSS * MMA_M, item.n + part % ACROSS * 64};
        uint64_t* const loaded = &exchange.loaded[buffer];
        mbarrier_arrive_expect_tx(loaded, Epilogue::TILES_READ * BLOCK_BYTES);
        load_tiles(to, buffer_of<Epilogue>(exchange, buffer), loaded, held[buffer]);
      }
      any = true;
      parity ^= 1;
    }
  }
#pragma unroll
  for (int buffer = 0; buffer < STORES; ++buffer)
    if (any) store_results(to, exchange, buffer, parity, held[buffer]);
}

// The consumer's part of a tile: change(values, place) for the thread's 8 of each 16 columns, whose
// place is that in a buffer's first tile. `parity`: of its next use of the buffers.
template <class K, class Epilogue, class Change>
DEVICE void exchange_tiles(const Accumulators<K>& accumulators, const Exchange& exchange,
                           uint32_t& parity, const Change& change) {
#pragma unroll
  for (int part = 0; part < K::PARTS; ++part) {
    const int buffer = part % STORES, block = part / (K::TILE_N / 64);
    uint8_t* const tile = buffer_of<Epilogue>(exchange, buffer);
    mbarrier_wait(&exchange.loaded[buffer], parity);
#pragma unroll
    for (int group = 0; group < 4; ++group)
      change(&accumulators[block][part % (K::TILE_N / 64) * 32 + group * 8], place_in(tile, group));
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&exchange.written[buffer]);
    if (buffer == STORES - 1) parity ^= 1;
  }
}

// out = the product, plus the addend where there is one. That may be `out` itself: its mover loads
// every 64 x 64 values before it stores them.
struct Sum {
  static constexpr int TILES_READ = 1;
  const TensorMap *map_out, *map_addend;
  int m, n;
  bool added;
};
DEVICE bool reads(const Sum& from) { return from.added; }
DEVICE void load_tiles(const Sum& from, uint8_t* tiles, uint64_t* loaded, Corner at) {
  tma_load_2d(tiles, from.map_addend, loaded, at.column, at.row);
}
DEVICE void store_tiles(const Sum& to, const uint8_t* tiles, Corner at) {
  tma_store_2d(to.map_out, tiles, at.column, at.row);
}
template <class K>
DEVICE void write(const Sum& to, Accumulators<K>& accumulators, const Exchange& exchange,
                  uint32_t& parity, int row, int column) {
  if (!to.added) {
    const Outbox out = exchange.out;
    return write<K>(Plain{to.map_out, to.m, to.n}, accumulators, out, row, column);
  }
  const auto change = [](const float* values, uint8_t* place) {
    uint32_t pairs[4];
    ldmatrix_x4(pairs, place);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] =
          pack_bf16(values[2 * i] + low_float(pairs[i]), values[2 * i + 1] + high_float(pairs[i]));
    stmatrix_x4(place, pairs);
  };
  exchange_tiles<K, Sum>(accumulators, exchange, parity, change);
}

// out = the gradients of gate and up [T,2F], where the product is that of silu(gate) up [T,F].
struct GatedGradient {
  static constexpr int TILES_READ = 2;
  const TensorMap *map_out, *map_gates;  // both {F, 2, T}
  int m, n;                              // n is F
};
DEVICE bool reads(const GatedGradient&) { return true; }
DEVICE void load_tiles(const GatedGradient& from, uint8_t* tiles, uint64_t* loaded, Corner at) {
  for (int half = 0; half < 2; ++half)
    tma_load_3d(tiles + half * BLOCK_BYTES, from.map_gates, loaded, at.column, half, at.row);
}
DEVICE void store_tiles(const GatedGradient& to, const uint8_t* tiles, Corner at) {
  for (int half = 0; half < 2; ++half)
    tma_store_3d(to.map_out, tiles + half * BLOCK_BYTES, at.column, half, at.row);
}
template <class K>
DEVICE void write(const GatedGradient&, Accumulators<K>& accumulators, const Exchange& exchange,
                  uint32_t& parity, int, int) {
  const auto change = [](const float* d_out, uint8_t* place) {
    uint32_t gates[4], ups[4];  // pairs, and then those of their gradients
    ldmatrix_x4(gates, place);
    ldmatrix_x4(ups, place + BLOCK_BYTES);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint32_t gate = gates[pair], up = ups[pair];
      const GateUp low = swiglu_gradient<bf16>(low_float(gate), low_float(up), d_out[2 * pair]);
      const GateUp high =
          swiglu_gradient<bf16>(high_float(gate), high_float(up), d_out[2 * pair + 1]);
      gates[pair] = pack_bf16(low.gate, high.gate);
      ups[pair] = pack_bf16(low.up, high.up);
    }
    stmatrix_x4(place, gates);
    stmatrix_x4(place + BLOCK_BYTES, ups);
  };
  exchange_tiles<K, GatedGradient>(accumulators, exchange, parity, change);
}

// ---------------------------------------------------------------- blocks
// What all kernels do before and around the consumers' work; `consumer_part(consumer)`, and for a
// warp beside each of them `mover_part(consumer)`. Thread 0 has written `work`.
template <class K, class MoverPart, class ConsumerPart>
DEVICE void run(const TensorMap* map_a, const TensorMap* map_b, const Work* work, uint8_t* ring,
                uint64_t* full, uint64_t* empty, uint64_t* order, const MoverPart& mover_part,
                const ConsumerPart& consumer_part) {
  if (threadIdx.x == 0) {
    // Swizzles take bits of the address itself; that the ring is aligned so is not in the language.
    if (shared_address(ring) % (8 * SPAN)) __trap();
    tma_prefetch(map_a);
    tma_prefetch(map_b);
    for (int stage = 0; stage < K::STAGES; ++stage) {
      mbarrier_init(&full[stage], 1);  // the producer
      // Every warp that reads what this block writes, its own and its peer's.
      mbarrier_init(&empty[stage], uint32_t(K::READERS * work->cluster));
    }
    for (int consumer = 0; consumer < CONSUMERS; ++consumer)
      mbarrier_init(&order[consumer], WARPGROUP / 32);  // every warp of the other one
    fence_mbarrier_init();
  }
  __syncthreads();
  if (work->cluster > 1) cluster_sync();  // the peer may load into the ring
  begin_after_previous();

  if (threadIdx.x < WARPGROUP) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    const int warp = int(threadIdx.x) / 32;
    if (warp == 0 && elect_one()) produce<K>(map_a, map_b, ring, full, empty, *work);
    if (warp > 0 && warp <= CONSUMERS) mover_part(warp - 1);
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consumer_part(int(threadIdx.x) / WARPGROUP - 1);
  }
  if (work->cluster > 1) cluster_sync();  // the peer's last arrivals find the barriers
}

// `epilogue`: Sum and the like, [m,n] its result.
template <class K, class Epilogue>
DEVICE void multiply_and_store(const TensorMap* map_a, const TensorMap* map_b, int m, int n, int k,
                               const Epilogue& epilogue) {
  constexpr bool READS = Epilogue::TILES_READ > 0;
  constexpr int BUFFERS = CONSUMERS * STORES;
  constexpr int BUFFER_BYTES = READS ? Epilogue::TILES_READ * BLOCK_BYTES : STORE_BYTES<K::STORED>;
  SHARED_DYNAMIC(ring);  // STAGES stages, then BUFFERS buffers
  SHARED(uint64_t, full, K::STAGES);
  SHARED(uint64_t, empty, K::STAGES);
  SHARED(uint64_t, order, CONSUMERS);
  SHARED(uint64_t, loaded, BUFFERS);
  SHARED(uint64_t, written, BUFFERS);
  SHARED(Work, work, 1);
  SHARED(Exchange, exchanges, CONSUMERS);
  if (threadIdx.x == 0) {
    *work = work_of<K>(m, n, k, 1);
    uint8_t* const tiles = ring + K::STAGES * K::STAGE_BYTES;
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
      const int first = consumer * STORES;
      const Outbox out = {tiles + first * BUFFER_BYTES, 1 + consumer};
      exchanges[consumer] = {out, loaded + first, written + first};
    }
    for (int buffer = 0; READS && buffer < BUFFERS; ++buffer) {
      mbarrier_init(&loaded[buffer], 1);  // its mover
      mbarrier_init(&written[buffer], WARPGROUP / 32);
    }
  }
  const auto mover_part = [&](int consumer) {
    if constexpr (READS)
      if (reads(epilogue) && elect_one()) move<K>(epilogue, exchanges[consumer], *work, consumer);
  };
  run<K>(map_a, map_b, work, ring, full, empty, order, mover_part, [&](int consumer) {
    uint32_t parity = 0;
    consume<K>(ring, full, empty, order, *work, consumer,
               [&](Accumulators<K>& accumulators, const Item& item, int first_row) {
                 const int row = item.m + first_row;
                 if constexpr (READS) {
                   write<K>(epilogue, accumulators, exchanges[consumer], parity, row, item.n);
                 } else {
                   const Outbox out = exchanges[consumer].out;
                   write<K>(epilogue, accumulators, out, row, item.n);
                 }
               });
    if (threadIdx.x % WARPGROUP == 0) bulk_wait<0>();
  });
}

// semaphores [2 x tiles that are split]: all 0, and 0 again when the kernel ends. A block has one
// split at most, as its last item, and waits for blocks of lower indices alone.
template <class K>
DEVICE void multiply_and_add(const TensorMap* map_a, const TensorMap* map_b, float* out,
                             uint32_t* semaphores, int m, int n, int k, int splits) {
  SHARED_DYNAMIC(ring);
  SHARED(uint64_t, full, K::STAGES);
  SHARED(uint64_t, empty, K::STAGES);
  SHARED(uint64_t, order, CONSUMERS);
  SHARED(Work, work, 1);
  if (threadIdx.x == 0) *work = work_of<K>(m, n, k, splits);
  const auto no_mover = [](int) {};
  run<K>(map_a, map_b, work, ring, full, empty, order, no_mover, [&](int consumer) {
    const bool first_thread = threadIdx.x % WARPGROUP == 0;
    consume<K>(ring, full, empty, order, *work, consumer,
               [&](Accumulators<K>& accumulators, const Item& item, int first_row) {
                 // Each consumer of a shared tile takes turns with its own rows of other splits.
                 uint32_t* const semaphore =
                     semaphores + CONSUMERS * item.shared + (K::SHARED_TILES ? consumer : 0);
                 if (item.splits > 1) {
                   if (first_thread)
                     while (load_acquire(semaphore) != uint32_t(item.split)) __nanosleep(64);
                   barrier_sync(1 + consumer, WARPGROUP);
                 }
                 add<K>(accumulators, out, item.m + first_row, item.n, m, n);
                 // The barrier puts all threads' reductions before the release, and the one above
                 // puts the acquire before those of the next split (PTX ISA, causality order).
                 if (item.splits > 1) {
                   barrier_sync(1 + consumer, WARPGROUP);
                   const int next = item.split + 1;
                   if (first_thread)
                     store_release(semaphore, uint32_t(next == item.splits ? 0 : next));
                 }
               });
  });
}

// ---------------------------------------------------------------- kernels
// As many stages as 227 KiB hold beside the store tiles, of which tn has none, nn_swiglu twice as
// many and nt_swiglu's of 192 half as many again.
#define STORE_KERNEL(name, b, tile_m, tile_n, stages, shared)                                      \
  KERNEL(gemm_sm90_##name##_##tile_m##x##tile_n, THREADS, 1)                                       \
  (const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,               \
   const __grid_constant__ TensorMap map_out, const __grid_constant__ TensorMap map_addend, int m, \
   int n, int k, int added) {                                                                      \
    multiply_and_store<Kind<ALONG_K, b, tile_m, tile_n, stages, shared>>(                          \
        &map_a, &map_b, m, n, k, Sum{&map_out, &map_addend, m, n, added != 0});                    \
  }                                                                                                \
  EXPORT_KERNEL(gemm_sm90_##name##_##tile_m##x##tile_n)
#define ADD_KERNEL(tile_m, tile_n, stages, shared)                                               \
  KERNEL(gemm_sm90_tn_##tile_m##x##tile_n, THREADS, 1)                                           \
  (const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, float* out, \
   uint32_t* semaphores, int m, int n, int k, int splits) {                                      \
    multiply_and_add<Kind<ACROSS_K, ACROSS_K, tile_m, tile_n, stages, shared>>(                  \
        &map_a, &map_b, out, semaphores, m, n, k, splits);                                       \
  }                                                                                              \
  EXPORT_KERNEL(gemm_sm90_tn_##tile_m##x##tile_n)
#define ROTARY_KERNEL(tile_m, tile_n, stages, shared)                                          \
  KERNEL(gemm_sm90_nt_rotary_##tile_m##x##tile_n, THREADS, 1)                                  \
  (const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,           \
   const __grid_constant__ TensorMap map_out, const float* table, const int* positions, int m, \
   int n, int k, int rotated, int head_dim) {                                                  \
    multiply_and_store<Kind<ALONG_K, ALONG_K, tile_m, tile_n, stages, shared>>(                \
        &map_a, &map_b, m, n, k,                                                               \
        Rotated{Plain{&map_out, m, n}, table, positions, rotated, head_dim});                  \
  }                                                                                            \
  EXPORT_KERNEL(gemm_sm90_nt_rotary_##tile_m##x##tile_n)
#define SWIGLU_KERNEL(tile_m, tile_n, stages, shared)                                        \
  KERNEL(gemm_sm90_nt_swiglu_##tile_m##x##tile_n, THREADS, 1)                                \
  (const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,         \
   const __grid_constant__ TensorMap map_out, const __grid_constant__ TensorMap map_product, \
   int m, int n, int k) {                                                                    \
    multiply_and_store<Kind<ALONG_K, HALVES_ALONG_K, tile_m, tile_n, stages, shared>>(       \
        &map_a, &map_b, m, n, k, Gated{&map_out, &map_product, m, n});                       \
  }                                                                                          \
  EXPORT_KERNEL(gemm_sm90_nt_swiglu_##tile_m##x##tile_n)
#define SWIGLU_GRADIENT_KERNEL(tile_m, tile_n, stages, shared)                                    \
  KERNEL(gemm_sm90_nn_swiglu_##tile_m##x##tile_n, THREADS, 1)                                     \
  (const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,              \
   const __grid_constant__ TensorMap map_out, const __grid_constant__ TensorMap map_gates, int m, \
   int n, int k) {                                                                                \
    multiply_and_store<Kind<ALONG_K, ACROSS_K, tile_m, tile_n, stages, shared>>(                  \
        &map_a, &map_b, m, n, k, GatedGradient{&map_out, &map_gates, m, n});                      \
  }                                                                                               \
  EXPORT_KERNEL(gemm_sm90_nn_swiglu_##tile_m##x##tile_n)

STORE_KERNEL(nt, ALONG_K, 128, 256, 4, true)
STORE_KERNEL(nt, ALONG_K, 128, 192, 4, false)
STORE_KERNEL(nt, ALONG_K, 128, 128, 6, false)
STORE_KERNEL(nn, ACROSS_K, 128, 256, 4, true)
STORE_KERNEL(nn, ACROSS_K, 128, 192, 4, false)
STORE_KERNEL(nn, ACROSS_K, 128, 128, 6, false)
ADD_KERNEL(128, 256, 4, true)
ADD_KERNEL(128, 192, 5, false)
ADD_KERNEL(128, 128, 7, false)
ROTARY_KERNEL(128, 256, 4, true)
ROTARY_KERNEL(128, 192, 4, false)
ROTARY_KERNEL(128, 128, 6, false)
SWIGLU_KERNEL(128, 256, 4, true)
SWIGLU_KERNEL(128, 192, 4, false)
SWIGLU_KERNEL(128, 128, 6, false)
SWIGLU_GRADIENT_KERNEL(128, 256, 3, true)
SWIGLU_GRADIENT_KERNEL(128, 192, 4, false)
SWIGLU_GRADIENT_KERNEL(128, 128, 5, false)
