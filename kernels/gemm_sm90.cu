// out = A B^T (+ residual) on Hopper: bf16 in and out, fp32 accumulation.
//
// Contract: A [M,K], B [N,K], out and residual [M,N], row-major; K and N multiples of 8. The tensor
// maps (src/cuda/gemm/sm90.rs) have 128-byte swizzles and the boxes A {64, 128}, B {64, TILE_N},
// out {64, 64}, innermost first. Tails cost nothing but work: TMA fills what lies outside with
// zeros and does not store it. One rounding, of the accumulator plus the residual.
//
// A block of three warpgroups keeps its multiprocessor to itself and takes one tile after the
// other. The producer (one thread) loads A and B into a ring of stages; two consumers, each with 64
// rows of the tile, multiply what is there and write the tile through shared memory. The ring runs
// on across tiles, so that the next tile is loaded while this one is written.
#include "isobath.cuh"

// ---------------------------------------------------------------- sizes
constexpr int WARPGROUP = 128;
constexpr int CONSUMERS = 2;  // the accumulators of 128 x 256 need two warpgroups
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int CONSUMER_M = 64;  // rows of one wgmma
constexpr int TILE_M = CONSUMERS * CONSUMER_M;
constexpr int TILE_K = 64;  // 128 bytes: the span of the swizzle
constexpr int MMA_K = 16;
constexpr int STORE_N = 64;  // columns of a store box: the span of the swizzle again
constexpr int SWIZZLE_SPAN = 128;
constexpr int ROW_BYTES = TILE_K * int(sizeof(bf16));
constexpr int STORE_BYTES = CONSUMER_M * ROW_BYTES;
constexpr int STORES = 2;  // store tiles of a consumer: one is written, one is read
// Tile rows that are visited together: 8 x 128 rows of A and as many of B stay in the L2 cache
// while the multiprocessors go through them.
constexpr int GROUP = 8;
// 168 registers at launch x 3 = 40 + 232 + 232.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

template <int TILE_N>
constexpr int STAGE_BYTES = (TILE_M + TILE_N) * ROW_BYTES;

// ---------------------------------------------------------------- the ring and the tiles
// Where in the ring a producer or a consumer is; `parity` is that of the stage's current round.
template <int STAGES>
struct Position {
  int stage = 0;
  uint32_t parity = 0;
};
template <int STAGES>
DEVICE void advance(Position<STAGES>& at) {
  if (++at.stage == STAGES) {
    at.stage = 0;
    at.parity ^= 1;
  }
}

struct Tiles {
  int rows, columns;  // how many tiles M and N have
};
struct Tile {
  int m, n;  // of its first element
};
template <int TILE_N>
DEVICE Tiles tiles_of(int m, int n) {
  return {(m + TILE_M - 1) / TILE_M, (n + TILE_N - 1) / TILE_N};
}
template <int TILE_N>
DEVICE Tile tile_at(Tiles tiles, int index) {
  const int group_tiles = GROUP * tiles.columns;
  const int first_row = index / group_tiles * GROUP, within = index % group_tiles;
  const int group_rows = min(GROUP, tiles.rows - first_row);
  return {(first_row + within % group_rows) * TILE_M, within / group_rows * TILE_N};
}

// ---------------------------------------------------------------- producer
template <int TILE_N, int STAGES>
DEVICE void produce(const TensorMap* map_a, const TensorMap* map_b, uint8_t* ring, uint64_t* full,
                    uint64_t* empty, Tiles tiles, int steps) {
  Position<STAGES> at;
  for (int index = int(blockIdx.x); index < tiles.rows * tiles.columns; index += int(gridDim.x)) {
    const Tile tile = tile_at<TILE_N>(tiles, index);
    for (int step = 0; step < steps; ++step) {
      uint8_t* const stage_a = ring + at.stage * STAGE_BYTES<TILE_N>;
      uint8_t* const stage_b = stage_a + TILE_M * ROW_BYTES;
      mbarrier_wait(&empty[at.stage], at.parity ^ 1);  // the first round passes at once
      mbarrier_arrive_expect_tx(&full[at.stage], STAGE_BYTES<TILE_N>);
      tma_load_2d(stage_a, map_a, &full[at.stage], step * TILE_K, tile.m);
      tma_load_2d(stage_b, map_b, &full[at.stage], step * TILE_K, tile.n);
      advance(at);
    }
  }
}

// ---------------------------------------------------------------- consumers
// accumulators [64,TILE_N] = the consumer's rows of A times B^T, over all K. One batch of wgmma is
// always in flight; when it is known that the one before has read its stage, that is released, by
// one arrival for each warp.
template <int TILE_N, int STAGES>
DEVICE void multiply(float (&accumulators)[TILE_N / 2], const uint8_t* ring, uint64_t* full,
                     uint64_t* empty, Position<STAGES>& at, int consumer, int steps) {
  const bool first_lane = threadIdx.x % 32 == 0;
  int previous_stage = 0;
  for (int step = 0; step < steps; ++step) {
    const uint8_t* const stage_a = ring + at.stage * STAGE_BYTES<TILE_N>;
    const uint64_t a = descriptor_k_major(stage_a + consumer * CONSUMER_M * ROW_BYTES);
    const uint64_t b = descriptor_k_major(stage_a + TILE_M * ROW_BYTES);
    mbarrier_wait(&full[at.stage], at.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < TILE_K; k += MMA_K) {
      const uint64_t offset = uint64_t(k) * sizeof(bf16) / 16;  // descriptors count 16 bytes
      wgmma<TILE_N>(accumulators, a + offset, b + offset, step > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0 && first_lane) mbarrier_arrive(&empty[previous_stage]);
    previous_stage = at.stage;
    advance(at);
  }
  wgmma_wait<0>();
  if (first_lane) mbarrier_arrive(&empty[previous_stage]);
}

// Columns column ... column + 63 of the consumer's rows: the accumulators of the four groups of 16
// columns, plus the residual, rounded, into a swizzled store tile.
// Accumulator i of a thread: row 8 (i/2 % 2) + lane/4 of its warp's 16, column 8 (i/4) + 2 (lane%4)
// + i%2 (PTX ISA, "wgmma register fragments").
template <int TILE_N>
DEVICE void write_store_tile(uint8_t* store_tile, const float (&accumulators)[TILE_N / 2],
                             int block, const bf16* residual, int row, int column, int m, int n) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) % WARPGROUP / 32;
#pragma unroll
  for (int group = 0; group < STORE_N / 16; ++group) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = accumulators[block * (STORE_N / 2) + group * 8 + i];
    if (residual) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int at_row = row + warp * 16 + lane / 4 + 8 * (i / 2 % 2);
        const int at_column = column + group * 16 + 8 * (i / 4) + 2 * (lane % 4);
        if (at_row < m && at_column < n) {
          const bf16* const pair = residual + size_t(at_row) * n + at_column;
          const uint32_t bits = *reinterpret_cast<const uint32_t*>(pair);
          values[i] += low_float(bits);
          values[i + 1] += high_float(bits);
        }
      }
    }
    const uint32_t quarters[4] = {pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                                  pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7])};
    const int matrix_row = warp * 16 + lane % 16, matrix_column = group * 16 + lane / 16 * 8;
    const uint32_t offset = matrix_row * ROW_BYTES + matrix_column * int(sizeof(bf16));
    stmatrix_x4(store_tile + swizzle<SWIZZLE_SPAN>(offset), quarters);
  }
}

template <int TILE_N, int STAGES>
DEVICE void consume(const TensorMap* map_out, const bf16* residual, const uint8_t* ring,
                    uint8_t* store_tiles, uint64_t* full, uint64_t* empty, Tiles tiles, int m,
                    int n, int steps) {
  const int consumer = int(threadIdx.x) / WARPGROUP - 1;
  const int own_barrier = 1 + consumer;  // 0 is __syncthreads
  const bool storing = threadIdx.x % WARPGROUP == 0;
  Position<STAGES> at;
  float accumulators[TILE_N / 2];
  for (int index = int(blockIdx.x); index < tiles.rows * tiles.columns; index += int(gridDim.x)) {
    multiply<TILE_N, STAGES>(accumulators, ring, full, empty, at, consumer, steps);
    const Tile tile = tile_at<TILE_N>(tiles, index);
    const int row = tile.m + consumer * CONSUMER_M;
#pragma unroll
    for (int block = 0; block < TILE_N / STORE_N; ++block) {
      const int column = tile.n + block * STORE_N;
      uint8_t* const store_tile = store_tiles + (consumer * STORES + block % STORES) * STORE_BYTES;
      // The store before the last one has left this tile; the last one may still read the other.
      if (storing) bulk_wait_read<STORES - 1>();
      barrier_sync(own_barrier, WARPGROUP);
      write_store_tile<TILE_N>(store_tile, accumulators, block, residual, row, column, m, n);
      fence_proxy_async();
      barrier_sync(own_barrier, WARPGROUP);
      if (storing) {
        if (row < m && column < n) tma_store_2d(map_out, store_tile, column, row);
        bulk_commit();
      }
    }
  }
  if (storing) bulk_wait<0>();
}

// ---------------------------------------------------------------- kernels
template <int TILE_N, int STAGES>
DEVICE void gemm(const TensorMap* map_a, const TensorMap* map_b, const TensorMap* map_out,
                 const bf16* residual, int m, int n, int k) {
  static_assert(TILE_N / STORE_N % STORES == 0, "a tile's first store must find its store tile");
  SHARED_DYNAMIC(ring);  // STAGES stages, then CONSUMERS x STORES store tiles
  SHARED(uint64_t, full, STAGES);
  SHARED(uint64_t, empty, STAGES);
  uint8_t* const store_tiles = ring + STAGES * STAGE_BYTES<TILE_N>;
  const Tiles tiles = tiles_of<TILE_N>(m, n);
  const int steps = (k + TILE_K - 1) / TILE_K;

  if (threadIdx.x == 0) {
    // Swizzles take bits of the address itself; that the ring is aligned so is not in the language.
    if (shared_address(ring) % (8 * SWIZZLE_SPAN)) __trap();
    tma_prefetch(map_a);
    tma_prefetch(map_b);
    tma_prefetch(map_out);
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(&full[stage], 1);                            // the producer
      mbarrier_init(&empty[stage], CONSUMERS * WARPGROUP / 32);  // every consumer warp
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x < WARPGROUP) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (threadIdx.x < 32 && elect_one())
      produce<TILE_N, STAGES>(map_a, map_b, ring, full, empty, tiles, steps);
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume<TILE_N, STAGES>(map_out, residual, ring, store_tiles, full, empty, tiles, m, n, steps);
  }
}

// As many stages as 227 KiB hold beside 32 KiB of store tiles.
#define GEMM_KERNEL(tile_n, stages)                                                        \
  KERNEL(gemm_sm90_128x##tile_n, THREADS, 1)                                               \
  (const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,       \
   const __grid_constant__ TensorMap map_out, const bf16* residual, int m, int n, int k) { \
    gemm<tile_n, stages>(&map_a, &map_b, &map_out, residual, m, n, k);                     \
  }                                                                                        \
  EXPORT_KERNEL(gemm_sm90_128x##tile_n)

GEMM_KERNEL(256, 4)
GEMM_KERNEL(128, 6)
