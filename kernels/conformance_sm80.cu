// One tiny kernel per wrapper that every GPU from sm_80 on has; conformance.cu holds the rest.
//
// src/cuda/conformance/mod.rs runs each with inputs it knows, on a GPU and on the CPU machine, and
// compares `out` with the golden output. So a kernel passes raw registers and raw bytes through
// its one instruction: what they mean as matrices stands in the Rust formulas only. Nothing here
// depends on which thread comes first.
#include "isobath.cuh"

// What no kernel writes: shared memory holds it before a copy, to show what the copy left alone.
constexpr uint32_t UNTOUCHED = 0xa5a5a5a5u;

DEVICE void fill(void* to, uint32_t words) {
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
    static_cast<uint32_t*>(to)[i] = UNTOUCHED;
}
DEVICE void copy(void* to, const void* from, uint32_t words) {
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
    static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
}

// ---------------------------------------------------------------- conversions and arithmetic
KERNEL(conform_bf16_bits, 128)(uint32_t* out, const uint32_t* inp) {
  const uint32_t i = threadIdx.x;
  out[i] = bf16_bits(__uint_as_float(inp[i]));
}
EXPORT_KERNEL(conform_bf16_bits)

KERNEL(conform_bf16x2_bits, 128)(uint32_t* out, const uint32_t* inp) {
  const uint32_t i = threadIdx.x;
  out[i] = bf16x2_bits(__uint_as_float(inp[i]), __uint_as_float(inp[128 + i]));
}
EXPORT_KERNEL(conform_bf16x2_bits)

#define CONFORM_FUNCTION(function)                                      \
  KERNEL(conform_##function, 128)(uint32_t* out, const uint32_t* inp) { \
    const uint32_t i = threadIdx.x;                                     \
    out[i] = __float_as_uint(function(__uint_as_float(inp[i])));        \
  }                                                                     \
  EXPORT_KERNEL(conform_##function)
CONFORM_FUNCTION(exp2_approx)
CONFORM_FUNCTION(log2_approx)
CONFORM_FUNCTION(rsqrt_approx)
CONFORM_FUNCTION(reciprocal_approx)
CONFORM_FUNCTION(tanh_approx)

// [6,128]: bit counts, then the correctly rounded operations.
KERNEL(conform_intrinsics, 128)(uint32_t* out, const uint32_t* inp) {
  const uint32_t i = threadIdx.x, bits = inp[i];
  const float x = __uint_as_float(inp[128 + i]), y = __uint_as_float(inp[256 + i]);
  out[i] = uint32_t(__popc(bits)) | uint32_t(__clz(bits)) << 8 | uint32_t(__ffs(bits)) << 16;
  out[128 + i] = __float_as_uint(__fdiv_rn(x, y));
  out[256 + i] = __float_as_uint(__frcp_rn(x));
  out[384 + i] = __float_as_uint(__fsqrt_rn(x));
  out[512 + i] = __float_as_uint(fmaf(x, y, -1.0f));
  out[640 + i] = __float_as_uint(fmaxf(x, y)) ^ uint32_t(min(int(bits), 77));
}
EXPORT_KERNEL(conform_intrinsics)

// ---------------------------------------------------------------- loads and stores with a hint
KERNEL(conform_cache_hints, 32)(uint32_t* out, const uint32_t* inp) {
  const uint32_t i = threadIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(inp);
  uint4* to = reinterpret_cast<uint4*>(out);
  to[i] = __ldg(from + i);
  __stcs(to + 32 + i, __ldcs(from + 32 + i));
  __stcg(to + 64 + i, __ldcg(from + 64 + i));
}
EXPORT_KERNEL(conform_cache_hints)

// ---------------------------------------------------------------- shuffles and votes
// inp: [64] values, [64] lanes or distances. out: [9,64]: widths 32, 16, 8, 4, 2; both halves of a
// 64-bit value; the two halves of the warp apart; a float.
#define CONFORM_SHUFFLE(shuffle)                                          \
  KERNEL(conform_##shuffle, 64)(uint32_t* out, const uint32_t* inp) {     \
    const uint32_t i = threadIdx.x, all = 0xffffffffu;                    \
    const uint32_t value = inp[i];                                        \
    const int by = int(inp[64 + i]);                                      \
    out[i] = shuffle(all, value, by);                                     \
    out[64 + i] = shuffle(all, value, by, 16);                            \
    out[128 + i] = shuffle(all, value, by, 8);                            \
    out[192 + i] = shuffle(all, value, by, 4);                            \
    out[256 + i] = shuffle(all, value, by, 2);                            \
    const uint64_t wide = shuffle(all, uint64_t(value) << 32 | i, by, 8); \
    out[320 + i] = uint32_t(wide);                                        \
    out[384 + i] = uint32_t(wide >> 32);                                  \
    if (i % 32 < 16) {                                                    \
      out[448 + i] = shuffle(0x0000ffffu, value, by % 16, 16);            \
    } else {                                                              \
      out[448 + i] = shuffle(0xffff0000u, value, by % 16, 16);            \
    }                                                                     \
    out[512 + i] = __float_as_uint(shuffle(all, float(i), by, 32));       \
  }                                                                       \
  EXPORT_KERNEL(conform_##shuffle)
CONFORM_SHUFFLE(__shfl_sync)
CONFORM_SHUFFLE(__shfl_up_sync)
CONFORM_SHUFFLE(__shfl_down_sync)
CONFORM_SHUFFLE(__shfl_xor_sync)

// [4,96]: ballot, any, all of the warp; then the ballot of each half of it.
KERNEL(conform_votes, 96)(uint32_t* out, const uint32_t* inp) {
  const uint32_t i = threadIdx.x, all = 0xffffffffu;
  const int predicate = int(inp[i]);
  out[i] = __ballot_sync(all, predicate);
  out[96 + i] = uint32_t(__any_sync(all, predicate) != 0);
  out[192 + i] = uint32_t(__all_sync(all, predicate) != 0);
  if (i % 32 < 16) {
    out[288 + i] = __ballot_sync(0x0000ffffu, predicate);
  } else {
    out[288 + i] = __ballot_sync(0xffff0000u, predicate);
  }
}
EXPORT_KERNEL(conform_votes)

KERNEL(conform_reductions, 32)(uint32_t* out, const uint32_t* inp) {
  const float x = __uint_as_float(inp[threadIdx.x]);
  out[threadIdx.x] = __float_as_uint(warp_sum(x));
  out[32 + threadIdx.x] = __float_as_uint(warp_max(x));
}
EXPORT_KERNEL(conform_reductions)

// ---------------------------------------------------------------- barriers
KERNEL(conform_syncwarp, 64)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint32_t, values, 64);
  const uint32_t i = threadIdx.x;
  values[i] = inp[i];
  __syncwarp();
  out[i] = values[i ^ 31];
}
EXPORT_KERNEL(conform_syncwarp)

KERNEL(conform_syncthreads, 256)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint32_t, values, 256);
  const uint32_t i = threadIdx.x;
  values[i] = inp[i];
  __syncthreads();
  out[i] = values[255 - i];
}
EXPORT_KERNEL(conform_syncthreads)

// Each half of the block has a barrier of its own.
KERNEL(conform_barrier_sync, 256)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint32_t, values, 256);
  const uint32_t i = threadIdx.x;
  values[i] = inp[i];
  barrier_sync(1 + int(i / 128), 128);
  out[i] = values[i ^ 127];
}
EXPORT_KERNEL(conform_barrier_sync)

// The first half writes and goes on, the second waits and reads.
KERNEL(conform_barrier_arrive, 256)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint32_t, values, 128);
  const uint32_t i = threadIdx.x;
  if (i < 128) {
    values[i] = inp[i];
    barrier_arrive(15, 256);
  } else {
    barrier_sync(15, 256);
    out[i - 128] = values[255 - i];
  }
}
EXPORT_KERNEL(conform_barrier_arrive)

// Where shared memory lies is the machine's affair; distances and alignment are not.
KERNEL(conform_shared_address, 32)(uint32_t* out, const uint32_t*) {
  SHARED_DYNAMIC(tile);
  SHARED_DYNAMIC(again);
  SHARED(uint4, rows, 8);
  const uint32_t i = threadIdx.x;
  out[i] = shared_address(tile + 36 * i) - shared_address(tile);
  if (i == 0) {
    out[32] = shared_address(tile) % 1024;
    out[33] = shared_address(again) - shared_address(tile);
    out[34] = shared_address(rows) % 16;
    out[35] = shared_address(rows + 7) - shared_address(rows);
  }
}
EXPORT_KERNEL(conform_shared_address)

// ---------------------------------------------------------------- matrices
// out [count,32]: register r of each lane. Lane l gives row 5 l + 3 (mod 32) of the tile.
#define CONFORM_LDMATRIX(wrapper, count)                              \
  KERNEL(conform_##wrapper, 32)(uint32_t* out, const uint32_t* inp) { \
    SHARED(uint4, tile, 32);                                          \
    const uint32_t lane = threadIdx.x;                                \
    copy(tile, inp, 128);                                             \
    __syncthreads();                                                  \
    uint32_t d[count];                                                \
    wrapper(d, tile + (5 * lane + 3) % 32);                           \
    for (int r = 0; r < count; ++r) out[32 * r + lane] = d[r];        \
  }                                                                   \
  EXPORT_KERNEL(conform_##wrapper)
CONFORM_LDMATRIX(ldmatrix_x1, 1)
CONFORM_LDMATRIX(ldmatrix_x2, 2)
CONFORM_LDMATRIX(ldmatrix_x4, 4)
CONFORM_LDMATRIX(ldmatrix_x1_trans, 1)
CONFORM_LDMATRIX(ldmatrix_x2_trans, 2)
CONFORM_LDMATRIX(ldmatrix_x4_trans, 4)

// inp: registers [4,32] of A, [2,32] of B, [4,32] of D; out [4,32].
KERNEL(conform_mma_m16n8k16, 32)(uint32_t* out, const uint32_t* inp) {
  const uint32_t lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int r = 0; r < 4; ++r) a[r] = inp[32 * r + lane];
  for (int r = 0; r < 2; ++r) b[r] = inp[128 + 32 * r + lane];
  for (int r = 0; r < 4; ++r) d[r] = __uint_as_float(inp[192 + 32 * r + lane]);
  mma_m16n8k16(d, a, b);
  for (int r = 0; r < 4; ++r) out[32 * r + lane] = __float_as_uint(d[r]);
}
EXPORT_KERNEL(conform_mma_m16n8k16)

// ---------------------------------------------------------------- memory order and atomics
// Block 0 hands two words to block 1. out: [0] flag, [1,2] the words, [3,4] as block 1 saw them.
KERNEL(conform_acquire_release, 32)(uint32_t* out, const uint32_t* inp) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    out[1] = inp[0];
    out[2] = inp[1];
    store_release(out, 1);
  } else {
    while (load_acquire(out) == 0) __nanosleep(32);
    out[3] = out[1];
    out[4] = out[2];
  }
}
EXPORT_KERNEL(conform_acquire_release)

// All blocks meet. out: [0] arrivals, [1,8] one word per block, [9,16] the next block's word.
KERNEL(conform_grid_barrier, 32)(uint32_t* out, const uint32_t* inp) {
  if (threadIdx.x != 0) return;
  const uint32_t block = blockIdx.x, blocks = gridDim.x;
  out[1 + block] = inp[block];
  __threadfence();
  atomicAdd(out, 1u);
  while (load_acquire(out) < blocks) __nanosleep(32);
  out[1 + blocks + block] = out[1 + (block + 1) % blocks];
}
EXPORT_KERNEL(conform_grid_barrier)

// A word written before __threadfence_block is seen by a thread that has read the flag that was set
// after it.
KERNEL(conform_threadfence_block, 64)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint32_t, flag, 1);
  SHARED(uint32_t, word, 1);
  if (threadIdx.x == 0) flag[0] = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    word[0] = inp[0];
    __threadfence_block();
    atomicExch(flag, 1u);
  } else if (threadIdx.x == 32) {
    while (atomicAdd(flag, 0u) == 0) __nanosleep(32);
    __threadfence_block();
    out[0] = word[0];
  }
}
EXPORT_KERNEL(conform_threadfence_block)

// out: [8] sums of integers, for which the order does not matter.
KERNEL(conform_atomic_add_f32, 128)(uint32_t* out, const uint32_t* inp) {
  const uint32_t i = 128 * blockIdx.x + threadIdx.x;
  atomicAdd(reinterpret_cast<float*>(out) + i % 8, __uint_as_float(inp[i]));
}
EXPORT_KERNEL(conform_atomic_add_f32)

KERNEL(conform_atomic_add_i32, 128)(uint32_t* out, const uint32_t* inp) {
  const uint32_t i = 128 * blockIdx.x + threadIdx.x;
  atomicAdd(reinterpret_cast<int*>(out) + i % 8, int(inp[i]));
}
EXPORT_KERNEL(conform_atomic_add_i32)

// Tickets: each number comes out once. out: [0] the counter, [1 + ticket] one.
KERNEL(conform_atomic_add_u32, 128)(uint32_t* out, const uint32_t*) {
  const uint32_t ticket = atomicAdd(out, 3u);
  atomicAdd(out + 1 + ticket / 3, 1u);
}
EXPORT_KERNEL(conform_atomic_add_u32)

KERNEL(conform_atomic_max_u32, 128)(uint32_t* out, const uint32_t* inp) {
  const uint32_t i = 128 * blockIdx.x + threadIdx.x;
  atomicMax(out + i % 8, inp[i]);
}
EXPORT_KERNEL(conform_atomic_max_u32)

// Each thread alone: out [3,128]: the word, and what two exchanges returned.
KERNEL(conform_atomic_exch_u32, 128)(uint32_t* out, const uint32_t* inp) {
  const uint32_t i = threadIdx.x;
  out[128 + i] = atomicExch(out + i, inp[i]);
  out[256 + i] = atomicExch(out + i, inp[128 + i]);
}
EXPORT_KERNEL(conform_atomic_exch_u32)

// out: [128] words, [128] and [128] what a failing and a fitting exchange returned; then a lock
// that all threads try: [0] who won is not told, only that one did.
KERNEL(conform_atomic_cas_u32, 128)(uint32_t* out, const uint32_t* inp) {
  const uint32_t i = threadIdx.x;
  out[128 + i] = atomicCAS(out + i, inp[i] + 1, 5u);
  out[256 + i] = atomicCAS(out + i, inp[i], inp[128 + i]);
  if (atomicCAS(out + 384, 0u, 1u) == 0) atomicAdd(out + 385, 1u);
}
EXPORT_KERNEL(conform_atomic_cas_u32)

// ---------------------------------------------------------------- cp.async
// Each lane copies its piece to every second place of its size; out: the shared memory.
#define CONFORM_CP_ASYNC(wrapper, words)                              \
  KERNEL(conform_##wrapper, 32)(uint32_t* out, const uint32_t* inp) { \
    SHARED(uint4, tile, 16 * words);                                  \
    uint32_t* const shared = reinterpret_cast<uint32_t*>(tile);       \
    const uint32_t lane = threadIdx.x;                                \
    fill(shared, 64 * words);                                         \
    __syncthreads();                                                  \
    wrapper(shared + 2 * words * lane, inp + words * lane);           \
    cp_async_commit();                                                \
    cp_async_wait<0>();                                               \
    __syncthreads();                                                  \
    copy(out, shared, 64 * words);                                    \
  }                                                                   \
  EXPORT_KERNEL(conform_##wrapper)
CONFORM_CP_ASYNC(cp_async_4, 1)
CONFORM_CP_ASYNC(cp_async_8, 2)
CONFORM_CP_ASYNC(cp_async_16, 4)

// Lane l copies l mod 17 bytes.
KERNEL(conform_cp_async_16_zfill, 32)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint4, tile, 64);
  const uint32_t lane = threadIdx.x;
  fill(tile, 256);
  __syncthreads();
  cp_async_16_zfill(tile + 2 * lane, inp + 4 * lane, lane % 17);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  copy(out, tile, 256);
}
EXPORT_KERNEL(conform_cp_async_16_zfill)

// Three groups; each is read as soon as at most 2, 1, 0 are left.
KERNEL(conform_cp_async_groups, 32)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint4, tile, 96);
  const uint32_t lane = threadIdx.x;
  uint4* const to = reinterpret_cast<uint4*>(out);
  for (uint32_t group = 0; group < 3; ++group) {
    cp_async_16(tile + 32 * group + lane, inp + 4 * (32 * group + lane));
    cp_async_commit();
  }
  cp_async_wait<2>();
  to[lane] = tile[lane];
  cp_async_wait<1>();
  to[32 + lane] = tile[32 + lane];
  cp_async_wait<0>();
  to[64 + lane] = tile[64 + lane];
}
EXPORT_KERNEL(conform_cp_async_groups)
