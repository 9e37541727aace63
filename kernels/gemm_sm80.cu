// Every matrix product of a training step in bf16 with fp32 accumulation, from sm_80 on.
//
// Contract: matrices are row-major without gaps, rows multiples of 16 bytes, addresses aligned to
// them; src/cuda/gemm/sm80.rs launches one block for each tile of the result.
//   NT  out [M,N] = A [M,K] B [N,K]^T (+ addend)   a layer forward
//   NN  out [M,N] = A [M,K] B [K,N]   (+ addend)   the gradient of its input
//   TN  out [M,N] += A [K,M]^T B [K,N], fp32       the gradient of its weight; any K
// The addend [M,N] may be `out` itself and is added before the one rounding. Tails are exact: what
// lies outside is loaded as zeros and not written. Every sum has a fixed order.
//
// cp.async fills a ring of stages in shared memory; warps read their fragments with ldmatrix, one
// part of a stage ahead of the mma.sync that multiplies them. A step of the tile 128 x 128 is, in
// machine code (nvcc 13.0, every layout), 64 HMMA, 16 LDSM of four matrices, 8 LDGSTS of 16 bytes
// and one barrier.
#include "isobath.cuh"

// ---------------------------------------------------------------- sizes
constexpr int WARP = 32;
constexpr int WARPS_M = 2, WARPS_N = 2;  // how the warps of a block share its tile
constexpr int THREADS = WARPS_M * WARPS_N * WARP;
constexpr int MMA_M = 16, MMA_N = 8, MMA_K = 16;
constexpr int CHUNK = 8;  // values of 16 bytes
// 32 values of k and 4 stages are 64 KiB for the tile 128 x 128: two blocks find room on an A100.
constexpr int TILE_K = 32;
constexpr int PARTS = TILE_K / MMA_K;
constexpr int STAGES = 4;
// Tile rows that are visited together: 8 x 128 rows of A and as many of B stay in the L2 cache
// while the multiprocessors go through them.
constexpr int GROUP = 8;

// ---------------------------------------------------------------- tiles in shared memory
// How an operand lies in memory: K, rows of k values for each m (or n); Mn, rows of m (or n)
// values for each k.
enum class Major { K, Mn };

// A stage of one operand: EXTENT values of m (or n) times TILE_K of k, as they lie in memory.
template <Major MAJOR, int EXTENT>
struct Stage {
  static constexpr int ROWS = MAJOR == Major::K ? EXTENT : TILE_K;
  static constexpr int COLUMNS = MAJOR == Major::K ? TILE_K : EXTENT;
  static constexpr int ROW_BYTES = COLUMNS * int(sizeof(bf16));
  static constexpr int ROW_CHUNKS = COLUMNS / CHUNK;
  static constexpr int BYTES = ROWS * ROW_BYTES;
};

// Where chunk `chunk` of a row lies. The 32 banks are 128 bytes wide; chunks are permuted so that
// the same chunk of 8 consecutive rows, which is what ldmatrix reads, lies in all of them.
template <int ROW_BYTES>
DEVICE int chunk_offset(int row, int chunk) {
  constexpr int BANKS_BYTES = 128;
  constexpr int ROWS = ROW_BYTES < BANKS_BYTES ? BANKS_BYTES / ROW_BYTES : 1;  // of one such width
  constexpr int CHUNKS = 8 / ROWS;
  return row * ROW_BYTES + (chunk ^ (row / ROWS % CHUNKS)) * 16;
}

// ---------------------------------------------------------------- loads
// What a thread copies of an operand: one chunk of every ROW_STEP-th row of each stage.
template <Major MAJOR, int EXTENT>
struct Source {
  using Shape = Stage<MAJOR, EXTENT>;
  static constexpr int ROW_STEP = THREADS / Shape::ROW_CHUNKS;
  static constexpr int COPIES = Shape::ROWS / ROW_STEP;
  static_assert(ROW_STEP % 8 == 0, "the chunks of all rows of a thread are permuted alike");

  const bf16* next;             // the first chunk, in the stage that is copied next
  size_t row_step, stage_step;  // values to the next chunk, to the next stage
  int rows_left, columns_left;  // of the matrix, from that chunk on
  int offset;                   // of the first chunk in a stage
};

// `matrix` [rows,columns]; the tile begins at `first` on the axis of m (or n).
template <Major MAJOR, int EXTENT>
DEVICE Source<MAJOR, EXTENT> source(const bf16* matrix, int rows, int columns, int first) {
  using Shape = Stage<MAJOR, EXTENT>;
  const int stage_row = int(threadIdx.x) / Shape::ROW_CHUNKS;
  const int chunk = int(threadIdx.x) % Shape::ROW_CHUNKS;
  const int row = stage_row + (MAJOR == Major::K ? first : 0);
  const int column = chunk * CHUNK + (MAJOR == Major::K ? 0 : first);
  return {matrix + size_t(row) * columns + column,
          size_t(Source<MAJOR, EXTENT>::ROW_STEP) * columns,
          MAJOR == Major::K ? size_t(TILE_K) : size_t(TILE_K) * columns,
          rows - row,
          columns - column,
          chunk_offset<Shape::ROW_BYTES>(stage_row, chunk)};
}

template <Major MAJOR, int EXTENT>
DEVICE void copy_stage(uint8_t* stage, Source<MAJOR, EXTENT>& from) {
  using Place = Source<MAJOR, EXTENT>;
#pragma unroll
  for (int i = 0; i < Place::COPIES; ++i) {
    const bool inside = i * Place::ROW_STEP < from.rows_left && from.columns_left > 0;
    uint8_t* const to = stage + from.offset + i * Place::ROW_STEP * Place::Shape::ROW_BYTES;
    cp_async_16_zfill(to, from.next + i * from.row_step, inside ? 16 : 0);
  }
  from.next += from.stage_step;
  (MAJOR == Major::K ? from.columns_left : from.rows_left) -= TILE_K;
}

// ---------------------------------------------------------------- fragments
// The operands of a warp's products over MMA_K values of k: registers as mma.sync wants them, of B
// two matrices of 8 columns side by side. Lane l names a row of the matrix l / 8 of the four that
// ldmatrix reads; what lies m-major (or n-major) is transposed on the way.
template <int WARP_M, int WARP_N>
struct Fragments {
  uint32_t a[WARP_M / MMA_M][4];        // rows 0-7 | 8-15 of k 0-7, then of k 8-15
  uint32_t b[WARP_N / (2 * MMA_N)][4];  // k 0-7 | 8-15 of columns 0-7, then of columns 8-15
};

// From m (or n) `first` on, part `part` of the stage.
template <Major MAJOR, int EXTENT>
DEVICE void load_a(uint32_t (&a)[4], const uint8_t* stage, int first, int part) {
  constexpr int ROW_BYTES = Stage<MAJOR, EXTENT>::ROW_BYTES;
  const int lane = int(threadIdx.x) % WARP;
  if constexpr (MAJOR == Major::K) {
    const int row = first + lane % 16, chunk = part * (MMA_K / CHUNK) + lane / 16;
    ldmatrix_x4(a, stage + chunk_offset<ROW_BYTES>(row, chunk));
  } else {
    const int row = part * MMA_K + lane % 8 + lane / 16 * 8, chunk = first / CHUNK + lane / 8 % 2;
    ldmatrix_x4_trans(a, stage + chunk_offset<ROW_BYTES>(row, chunk));
  }
}
template <Major MAJOR, int EXTENT>
DEVICE void load_b(uint32_t (&b)[4], const uint8_t* stage, int first, int part) {
  constexpr int ROW_BYTES = Stage<MAJOR, EXTENT>::ROW_BYTES;
  const int lane = int(threadIdx.x) % WARP;
  if constexpr (MAJOR == Major::K) {
    const int row = first + lane % 8 + lane / 16 * 8;
    const int chunk = part * (MMA_K / CHUNK) + lane / 8 % 2;
    ldmatrix_x4(b, stage + chunk_offset<ROW_BYTES>(row, chunk));
  } else {
    const int row = part * MMA_K + lane % 16, chunk = first / CHUNK + lane / 16;
    ldmatrix_x4_trans(b, stage + chunk_offset<ROW_BYTES>(row, chunk));
  }
}

template <int WARP_M, int WARP_N>
DEVICE void multiply(float (&sums)[WARP_M / MMA_M][WARP_N / MMA_N][4],
                     const Fragments<WARP_M, WARP_N>& of) {
#pragma unroll
  for (int i = 0; i < WARP_M / MMA_M; ++i) {
#pragma unroll
    for (int j = 0; j < WARP_N / MMA_N; ++j) {
      const int half = j % 2 * 2;
      const uint32_t b[2] = {of.b[j / 2][half], of.b[j / 2][half + 1]};
      mma_m16n8k16(sums[i][j], of.a[i], b);
    }
  }
}

// ---------------------------------------------------------------- epilogues
// 16 bytes of the result, from `at` on, of sums that lie in shared memory.
struct Store {
  static constexpr int VALUES = 8;
  bf16* out;
  const bf16* addend;  // null: none
};
DEVICE void write(const Store& to, size_t at, const float* sums) {
  const float4 left = *reinterpret_cast<const float4*>(sums);
  const float4 right = *reinterpret_cast<const float4*>(sums + 4);
  float values[8] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
  if (to.addend) {
    const uint4 vector = *reinterpret_cast<const uint4*>(to.addend + at);
    const uint32_t pairs[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] += low_float(pairs[i]);
      values[2 * i + 1] += high_float(pairs[i]);
    }
  }
  *reinterpret_cast<uint4*>(to.out + at) =
      make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                 pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
}

struct Accumulate {
  static constexpr int VALUES = 4;
  float* out;
};
DEVICE void write(const Accumulate& to, size_t at, const float* sums) {
  const float4 added = *reinterpret_cast<const float4*>(sums);
  float4* const place = reinterpret_cast<float4*>(to.out + at);
  const float4 before = *place;
  *place =
      make_float4(before.x + added.x, before.y + added.y, before.z + added.z, before.w + added.w);
}

// A warp writes MMA_M of its rows at once: first into its own piece of shared memory, from where
// each thread takes 16 bytes of a row of the result.
// Sum i of a thread: row lane/4 + 8 (i/2), column 2 (lane%4) + i%2 of its matrix 16 x 8.
template <int WARP_N>
struct Slab {
  static constexpr int ROW = WARP_N + 8;  // the pairs of 4 rows, which are written at once, lie in
                                          // all banks
  static constexpr int BYTES = MMA_M * ROW * int(sizeof(float));
};
template <int WARP_N, class Output>
DEVICE void write_slab(float* slab, const float (&sums)[WARP_N / MMA_N][4], const Output& output,
                       int first_row, int first_column, int m, int n) {
  constexpr int ROW = Slab<WARP_N>::ROW;
  constexpr int ROW_LANES = WARP_N / Output::VALUES;
  const int lane = int(threadIdx.x) % WARP;
  __syncwarp();  // the slab before this one has been read
#pragma unroll
  for (int j = 0; j < WARP_N / MMA_N; ++j) {
    float* const to = slab + lane / 4 * ROW + j * MMA_N + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(sums[j][0], sums[j][1]);
    *reinterpret_cast<float2*>(to + 8 * ROW) = make_float2(sums[j][2], sums[j][3]);
  }
  __syncwarp();
  const int column = lane % ROW_LANES * Output::VALUES;
#pragma unroll
  for (int row = lane / ROW_LANES; row < MMA_M; row += WARP / ROW_LANES) {
    const int at_row = first_row + row, at_column = first_column + column;
    if (at_row < m && at_column < n)
      write(output, size_t(at_row) * n + at_column, slab + row * ROW + column);
  }
}

// ---------------------------------------------------------------- the product
struct Tile {
  int m, n;  // of its first element
};
template <int TILE_M, int TILE_N>
DEVICE Tile tile_at(int index, int m, int n) {
  const int rows = (m + TILE_M - 1) / TILE_M, columns = (n + TILE_N - 1) / TILE_N;
  const int group_tiles = GROUP * columns;
  const int first_row = index / group_tiles * GROUP, within = index % group_tiles;
  const int group_rows = min(GROUP, rows - first_row);
  return {(first_row + within % group_rows) * TILE_M, within / group_rows * TILE_N};
}

template <Major MAJOR_A, Major MAJOR_B, int TILE_M, int TILE_N, class Output>
DEVICE void gemm(const bf16* a, const bf16* b, const Output& output, int m, int n, int k) {
  begin_after_previous();
  using StageA = Stage<MAJOR_A, TILE_M>;
  using StageB = Stage<MAJOR_B, TILE_N>;
  constexpr int STAGE_BYTES = StageA::BYTES + StageB::BYTES;
  constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
  static_assert(WARPS_M * WARPS_N * Slab<WARP_N>::BYTES <= STAGES * STAGE_BYTES);
  SHARED_DYNAMIC(ring);  // STAGES x (A, B); after the product, one slab for each warp
  const int warp = int(threadIdx.x) / WARP;
  const int warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
  const Tile tile = tile_at<TILE_M, TILE_N>(int(blockIdx.x), m, n);
  const bool a_k_major = MAJOR_A == Major::K, b_k_major = MAJOR_B == Major::K;
  auto from_a = source<MAJOR_A, TILE_M>(a, a_k_major ? m : k, a_k_major ? k : m, tile.m);
  auto from_b = source<MAJOR_B, TILE_N>(b, b_k_major ? n : k, b_k_major ? k : n, tile.n);
  const int steps = (k + TILE_K - 1) / TILE_K;

  // A group of copies is committed for every step, of nothing after the last one, so that the
  // same wait is right everywhere.
  const auto load = [&](int step) {
    if (step < steps) {
      uint8_t* const stage = ring + step % STAGES * STAGE_BYTES;
      copy_stage(stage, from_a);
      copy_stage(stage + StageA::BYTES, from_b);
    }
    cp_async_commit();
  };
  Fragments<WARP_M, WARP_N> fragments[2];
  const auto read = [&](int step, int part) {
    const uint8_t* const stage = ring + step % STAGES * STAGE_BYTES;
    auto& to = fragments[part % 2];
#pragma unroll
    for (int i = 0; i < WARP_M / MMA_M; ++i)
      load_a<MAJOR_A, TILE_M>(to.a[i], stage, warp_m + i * MMA_M, part);
#pragma unroll
    for (int j = 0; j < WARP_N / (2 * MMA_N); ++j)
      load_b<MAJOR_B, TILE_N>(to.b[j], stage + StageA::BYTES, warp_n + j * 2 * MMA_N, part);
  };
  static_assert(PARTS % 2 == 0, "the first part of a step finds the same registers each time");

  float sums[WARP_M / MMA_M][WARP_N / MMA_N][4] = {};
  for (int step = 0; step < STAGES - 1; ++step) load(step);
  cp_async_wait<STAGES - 2>();
  __syncthreads();
  read(0, 0);
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      if (part + 1 < PARTS) {
        read(step, part + 1);
      } else if (step + 1 < steps) {
        // The next stage has arrived, and the one of this step has been read by every warp.
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        read(step + 1, 0);
      }
      // Into the stage of the step before.
      if (part == 0) load(step + STAGES - 1);
      multiply<WARP_M, WARP_N>(sums, fragments[part % 2]);
    }
  }

  __syncthreads();  // the last stage has been read
  float* const slab = reinterpret_cast<float*>(ring + warp * Slab<WARP_N>::BYTES);
#pragma unroll
  for (int i = 0; i < WARP_M / MMA_M; ++i)
    write_slab<WARP_N>(slab, sums[i], output, tile.m + warp_m + i * MMA_M, tile.n + warp_n, m, n);
}

// ---------------------------------------------------------------- kernels
// `blocks` of a multiprocessor: what the registers of the sums and of two sets of fragments allow.
#define GEMM_STORES(layout, major_a, major_b, tile_m, tile_n, blocks)                        \
  KERNEL(gemm_sm80_##layout##_##tile_m##x##tile_n, THREADS, blocks)                          \
  (const bf16* a, const bf16* b, bf16* out, const bf16* addend, int m, int n, int k) {       \
    gemm<Major::major_a, Major::major_b, tile_m, tile_n>(a, b, Store{out, addend}, m, n, k); \
  }                                                                                          \
  EXPORT_KERNEL(gemm_sm80_##layout##_##tile_m##x##tile_n)
#define GEMM_ACCUMULATES(layout, major_a, major_b, tile_m, tile_n, blocks)                \
  KERNEL(gemm_sm80_##layout##_##tile_m##x##tile_n, THREADS, blocks)                       \
  (const bf16* a, const bf16* b, float* out, int m, int n, int k) {                       \
    gemm<Major::major_a, Major::major_b, tile_m, tile_n>(a, b, Accumulate{out}, m, n, k); \
  }                                                                                       \
  EXPORT_KERNEL(gemm_sm80_##layout##_##tile_m##x##tile_n)

GEMM_STORES(nt, K, K, 128, 128, 2)
GEMM_STORES(nn, K, Mn, 128, 128, 2)
GEMM_ACCUMULATES(tn, Mn, Mn, 128, 128, 2)
GEMM_STORES(nt, K, K, 64, 64, 4)
GEMM_STORES(nn, K, Mn, 64, 64, 4)
GEMM_ACCUMULATES(tn, Mn, Mn, 64, 64, 4)
