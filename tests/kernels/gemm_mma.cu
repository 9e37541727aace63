// out = A B^T with cp.async, ldmatrix and mma.sync: what a kernel for sm_80 is made of, for the
// tests of the machine.
//
// Contract: A [M,K], B [N,K] bf16, out [M,N] float, row-major; M and N multiples of 64, K of 32. A
// block of four warps makes one tile 64 x 64, two stages of 32 k in turn: one is multiplied while
// the other one is loaded.
#include "isobath.cuh"

constexpr int TILE = 64, DEPTH = 32, STAGES = 2, CHUNK = 8;  // a chunk: 8 values, 16 bytes
constexpr int ROW_BYTES = DEPTH * int(sizeof(bf16));
constexpr int TILE_BYTES = TILE * ROW_BYTES;

// Chunk `chunk` of a row; chunks are permuted so that the 8 rows of an ldmatrix meet no conflict.
DEVICE uint8_t* chunk_of(uint8_t* tile, int row, int chunk) {
  return tile + swizzle<64>(uint32_t(row * ROW_BYTES + chunk * 16));
}

DEVICE void load_tile(uint8_t* tile, const bf16* matrix, int first_row, int first_k, int k) {
#pragma unroll
  for (int i = int(threadIdx.x); i < TILE * DEPTH / CHUNK; i += 128) {
    const int row = i / (DEPTH / CHUNK), chunk = i % (DEPTH / CHUNK);
    cp_async_16(chunk_of(tile, row, chunk),
                matrix + size_t(first_row + row) * k + first_k + chunk * CHUNK);
  }
}

KERNEL(gemm_mma, 128)
(const bf16* a, const bf16* b, float* out, int n, int k) {
  begin_after_previous();
  SHARED_DYNAMIC(stages);  // STAGES x (A, B)
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int row = int(blockIdx.y) * TILE, column = int(blockIdx.x) * TILE;
  float sums[TILE / 8][4] = {};
  const int steps = k / DEPTH;
  load_tile(stages, a, row, 0, k);
  load_tile(stages + TILE_BYTES, b, column, 0, k);
  cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    uint8_t* const tile_a = stages + step % STAGES * 2 * TILE_BYTES;
    uint8_t* const tile_b = tile_a + TILE_BYTES;
    if (step + 1 < steps) {
      uint8_t* const next = stages + (step + 1) % STAGES * 2 * TILE_BYTES;
      load_tile(next, a, row, (step + 1) * DEPTH, k);
      load_tile(next + TILE_BYTES, b, column, (step + 1) * DEPTH, k);
    }
    cp_async_commit();  // of nothing after the last step, so that the wait is the same
    cp_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int part = 0; part < DEPTH / 16; ++part) {
      uint32_t of_a[4];
      ldmatrix_x4(of_a, chunk_of(tile_a, warp * 16 + lane % 16, part * 2 + lane / 16));
#pragma unroll
      for (int group = 0; group < TILE / 16; ++group) {
        uint32_t of_b[4];
        const int b_row = group * 16 + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(of_b, chunk_of(tile_b, b_row, part * 2 + lane / 8 % 2));
        const uint32_t left[2] = {of_b[0], of_b[1]}, right[2] = {of_b[2], of_b[3]};
        mma_m16n8k16(sums[group * 2], of_a, left);
        mma_m16n8k16(sums[group * 2 + 1], of_a, right);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int group = 0; group < TILE / 8; ++group) {
    float* const to =
        out + size_t(row + warp * 16 + lane / 4) * n + column + group * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(sums[group][0], sums[group][1]);
    *reinterpret_cast<float2*>(to + size_t(8) * n) = make_float2(sums[group][2], sums[group][3]);
  }
}
EXPORT_KERNEL(gemm_mma)
