// One tiny kernel per wrapper of sm_90 and sm_90a; conformance_sm80.cu holds the rest and says how
// such kernels are written.
//
// Architectures: sm_90a
#include "isobath.cuh"

// What no kernel writes: shared memory holds it before a copy, to show what the copy left alone.
constexpr uint32_t UNTOUCHED = 0xa5a5a5a5u;
// After each tile that a copy fills, words that it must leave alone.
constexpr uint32_t MARGIN = 4;

DEVICE void fill(void* to, uint32_t words) {
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
    static_cast<uint32_t*>(to)[i] = UNTOUCHED;
}
DEVICE void copy(void* to, const void* from, uint32_t words) {
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
    static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
}

// ---------------------------------------------------------------- warp
// Which lane is elected is the machine's choice: out [2]: how many of each warp are.
KERNEL(conform_elect_one, 64)(uint32_t* out, const uint32_t*) {
  const uint32_t elected = __ballot_sync(0xffffffffu, elect_one());
  if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = uint32_t(__popc(elected));
}
EXPORT_KERNEL(conform_elect_one)

// inp [count,32]: register r of each lane. Lane l gives row 5 l + 3 (mod 32) of the tile.
#define CONFORM_STMATRIX(wrapper, count)                              \
  KERNEL(conform_##wrapper, 32)(uint32_t* out, const uint32_t* inp) { \
    SHARED(uint4, tile, 32);                                          \
    const uint32_t lane = threadIdx.x;                                \
    fill(tile, 128);                                                  \
    __syncthreads();                                                  \
    uint32_t s[count];                                                \
    for (int r = 0; r < count; ++r) s[r] = inp[32 * r + lane];        \
    wrapper(tile + (5 * lane + 3) % 32, s);                           \
    __syncthreads();                                                  \
    copy(out, tile, 128);                                             \
  }                                                                   \
  EXPORT_KERNEL(conform_##wrapper)
CONFORM_STMATRIX(stmatrix_x1, 1)
CONFORM_STMATRIX(stmatrix_x2, 2)
CONFORM_STMATRIX(stmatrix_x4, 4)
CONFORM_STMATRIX(stmatrix_x1_trans, 1)
CONFORM_STMATRIX(stmatrix_x2_trans, 2)
CONFORM_STMATRIX(stmatrix_x4_trans, 4)

// ---------------------------------------------------------------- reductions
// Two pairs, inp [2,64], one after the other to each lane's pair of out [64].
KERNEL(conform_reduce_add_f32x2, 32)(uint32_t* out, const uint32_t* inp) {
  const uint32_t pair = 2 * threadIdx.x;
  float* const sums = reinterpret_cast<float*>(out) + pair;
  for (uint32_t i = pair; i < 128; i += 64)
    reduce_add_f32x2(sums, __uint_as_float(inp[i]), __uint_as_float(inp[i + 1]));
}
EXPORT_KERNEL(conform_reduce_add_f32x2)

// ---------------------------------------------------------------- mbarrier
// One thread asks a barrier of two arrivals after each step whether a phase is over. out [12].
KERNEL(conform_mbarrier_phases, 32)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint4, landed, 1);
  if (threadIdx.x != 0) return;
  mbarrier_init(barrier, 2);
  fence_mbarrier_init();
  out[0] = mbarrier_try_wait(barrier, 1);
  out[1] = mbarrier_try_wait(barrier, 0);
  mbarrier_arrive(barrier);
  out[2] = mbarrier_try_wait(barrier, 0);
  mbarrier_arrive(barrier);
  out[3] = mbarrier_try_wait(barrier, 0);
  out[4] = mbarrier_try_wait(barrier, 1);
  // Both arrivals of the second phase, but 16 bytes still to come.
  mbarrier_arrive_expect_tx(barrier, 16);
  mbarrier_arrive(barrier);
  out[5] = mbarrier_try_wait(barrier, 1);
  out[6] = mbarrier_try_wait(barrier, 0);
  bulk_load(landed, inp, 16, barrier);
  mbarrier_wait(barrier, 1);
  out[7] = mbarrier_try_wait(barrier, 1);
  out[8] = mbarrier_try_wait(barrier, 0);
  mbarrier_invalidate(barrier);
  // The same place again, with another count.
  mbarrier_init(barrier, 1);
  fence_mbarrier_init();
  out[9] = mbarrier_try_wait(barrier, 0);
  mbarrier_arrive(barrier);
  out[10] = mbarrier_try_wait(barrier, 0);
  out[11] = landed[0].x;
}
EXPORT_KERNEL(conform_mbarrier_phases)

// Bytes announced in two pieces, one without an arrival; two copies in the same phase. out [16].
KERNEL(conform_mbarrier_expect_tx, 32)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint4, landed, 4);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_expect_tx(barrier, 48);
    bulk_load(landed, inp, 48, barrier);
    mbarrier_arrive_expect_tx(barrier, 16);
    bulk_load(landed + 3, inp + 16, 16, barrier);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  copy(out, landed, 16);
}
EXPORT_KERNEL(conform_mbarrier_expect_tx)

// A ring of one stage: the first warp fills it, the second empties it, four times. out [4,32].
KERNEL(conform_mbarrier_wait, 64)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint64_t, full, 1);
  SHARED(uint64_t, empty, 1);
  SHARED(uint32_t, stage, 32);
  const uint32_t lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 32);
    mbarrier_init(empty, 32);
    fence_mbarrier_init();
  }
  __syncthreads();
  for (uint32_t round = 0; round < 4; ++round) {
    if (threadIdx.x < 32) {
      mbarrier_wait(empty, (round & 1) ^ 1);
      stage[lane] = inp[32 * round + lane];
      mbarrier_arrive(full);
    } else {
      mbarrier_wait(full, round & 1);
      out[32 * round + lane] = stage[lane ^ 1];
      mbarrier_arrive(empty);
    }
  }
}
EXPORT_KERNEL(conform_mbarrier_wait)

// ---------------------------------------------------------------- cluster
// Clusters of 4. out [blocks,4]: rank, size, what the next block wrote for all to read, what the
// block before wrote into this one.
KERNEL(conform_cluster, 32)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint32_t, own, 1);
  SHARED(uint32_t, mailbox, 1);
  const uint32_t rank = cluster_rank(), size = cluster_size();
  if (threadIdx.x == 0) own[0] = inp[blockIdx.x];
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) {
    const uint32_t next = (rank + 1) % size;
    out[4 * blockIdx.x] = rank;
    out[4 * blockIdx.x + 1] = size;
    out[4 * blockIdx.x + 2] = *cluster_map(own, next);
    *cluster_map(mailbox, next) = 3 * inp[blockIdx.x];
  }
  __syncwarp();
  cluster_sync();
  if (threadIdx.x == 0) out[4 * blockIdx.x + 3] = mailbox[0];
  __syncwarp();
  // Nothing is handed over here; both forms of arrival end the same phase.
  cluster_arrive_relaxed();
  cluster_wait();
}
EXPORT_KERNEL(conform_cluster)

// Clusters of 2: each block writes into the other, then arrives there; and once more, when it has
// read what it got. out [blocks,32].
KERNEL(conform_mbarrier_cluster, 32)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint64_t, barrier, 2);
  SHARED(uint32_t, mailbox, 32);
  const uint32_t lane = threadIdx.x, peer = cluster_rank() ^ 1;
  if (lane == 0) {
    mbarrier_init(&barrier[0], 32);
    mbarrier_init(&barrier[1], 32);
    fence_mbarrier_init();
  }
  __syncwarp();
  cluster_sync();
  cluster_map(mailbox, peer)[lane] = inp[32 * blockIdx.x + lane];
  mbarrier_arrive_cluster(&barrier[0], peer);
  mbarrier_wait_cluster(&barrier[0], 0);
  const uint32_t received = mailbox[lane ^ 5];
  mbarrier_arrive_peer(&barrier[1], peer);
  mbarrier_wait(&barrier[1], 0);
  out[32 * blockIdx.x + lane] = received;
  __syncwarp();
  cluster_sync();
}
EXPORT_KERNEL(conform_mbarrier_cluster)

// ---------------------------------------------------------------- bulk copies
// Two copies into the middle of a tile. out [64].
KERNEL(conform_bulk_load, 32)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint4, tile, 16);
  SHARED(uint64_t, barrier, 1);
  fill(tile, 64);
  fence_proxy_async();
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, 96);
    bulk_load(tile + 1, inp + 8, 80, barrier);
    bulk_load(tile + 9, inp, 16, barrier);
  }
  mbarrier_wait(barrier, 0);
  copy(out, tile, 64);
}
EXPORT_KERNEL(conform_bulk_load)

// Clusters of 2, rank 0 loads 64 bytes for the ranks of inp[0]. out [blocks,32].
KERNEL(conform_bulk_load_multicast, 32)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint4, tile, 8);
  SHARED(uint64_t, barrier, 1);
  const uint32_t ranks = inp[0], rank = cluster_rank();
  const bool lands_here = (ranks >> rank & 1) != 0;
  fill(tile, 32);
  fence_proxy_async();
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    if (lands_here) mbarrier_arrive_expect_tx(barrier, 64);
  }
  __syncthreads();
  cluster_sync();
  if (rank == 0 && threadIdx.x == 0)
    bulk_load_multicast(tile + 2, inp + 4, 64, barrier, uint16_t(ranks));
  if (lands_here) mbarrier_wait(barrier, 0);
  copy(out + 32 * blockIdx.x, tile, 32);
  __syncthreads();
  cluster_sync();
}
EXPORT_KERNEL(conform_bulk_load_multicast)

// Clusters of 2: each block sends 64 bytes to the other. out [blocks,32].
KERNEL(conform_bulk_copy_cluster, 32)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint4, source, 4);
  SHARED(uint4, tile, 8);
  SHARED(uint64_t, barrier, 1);
  fill(tile, 32);
  copy(source, inp + 16 * blockIdx.x, 16);
  fence_proxy_async();
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(barrier, 64);
  }
  __syncthreads();
  cluster_sync();
  if (threadIdx.x == 0) bulk_copy_cluster(tile + 3, source, 64, barrier, cluster_rank() ^ 1);
  mbarrier_wait_cluster(barrier, 0);
  copy(out + 32 * blockIdx.x, tile, 32);
  __syncthreads();
  cluster_sync();
}
EXPORT_KERNEL(conform_bulk_copy_cluster)

// 64 bytes of shared memory to the middle of `out`; `inp` [16].
#define CONFORM_BULK_STORE(name, wrapper, type)            \
  KERNEL(name, 32)(uint32_t* out, const uint32_t* inp) {   \
    SHARED(uint4, tile, 4);                                \
    copy(tile, inp, 16);                                   \
    fence_proxy_async();                                   \
    __syncthreads();                                       \
    if (threadIdx.x == 0) {                                \
      wrapper(reinterpret_cast<type*>(out + 4), tile, 64); \
      bulk_commit();                                       \
      bulk_wait<0>();                                      \
    }                                                      \
  }                                                        \
  EXPORT_KERNEL(name)
CONFORM_BULK_STORE(conform_bulk_store, bulk_store, void)
CONFORM_BULK_STORE(conform_bulk_reduce_add_f32, bulk_reduce_add_f32, float)
CONFORM_BULK_STORE(conform_bulk_reduce_add_bf16, bulk_reduce_add_bf16, bf16)

// The tile is rewritten as soon as its last store has read it; two groups. out [2,32].
KERNEL(conform_bulk_groups, 32)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint4, tile, 16);
  uint32_t* const words = reinterpret_cast<uint32_t*>(tile);
  const uint32_t lane = threadIdx.x;
  for (uint32_t half = 0; half < 2; ++half) words[32 * half + lane] = inp[32 * half + lane];
  fence_proxy_async();
  __syncthreads();
  if (lane == 0) {
    bulk_store(out, tile, 128);
    bulk_commit();
    bulk_store(out + 32, tile + 8, 128);
    bulk_commit();
    bulk_wait_read<1>();
  }
  __syncthreads();
  words[lane] = UNTOUCHED;
  if (lane == 0) bulk_wait_read<0>();
  __syncthreads();
  words[32 + lane] = UNTOUCHED;
  if (lane == 0) bulk_wait<0>();
}
EXPORT_KERNEL(conform_bulk_groups)

// Global memory that this kernel wrote with ordinary stores, read by a bulk copy. out [2,32].
KERNEL(conform_fence_proxy_async_global, 32)(uint32_t* out, const uint32_t* inp) {
  SHARED(uint4, tile, 8);
  SHARED(uint64_t, barrier, 1);
  const uint32_t lane = threadIdx.x;
  out[lane] = inp[lane] + 1;
  fence_proxy_async_global();
  if (lane == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (lane == 0) {
    mbarrier_arrive_expect_tx(barrier, 128);
    bulk_load(tile, out, 128, barrier);
  }
  mbarrier_wait(barrier, 0);
  copy(out + 32, tile, 32);
}
EXPORT_KERNEL(conform_fence_proxy_async_global)

// ---------------------------------------------------------------- TMA
// inp: [0] shots, [1] words of a box, [2] ranks of a multicast, [4 + 5 s + i] coordinate i of shot
// s, [64...] what a store stores. `map` is of inp (loads) or of out (stores and reductions).
constexpr uint32_t SHOTS = 0, BOX_WORDS = 1, RANKS = 2, COORDINATES = 4, STORED = 64;

// out [shots, box + MARGIN]: the box as it lies in shared memory.
#define CONFORM_TMA_LOAD(wrapper, ...)                                                            \
  KERNEL(conform_##wrapper, 128)(uint32_t* out, const uint32_t* inp,                              \
                                 const __grid_constant__ TensorMap map) {                         \
    SHARED_DYNAMIC(tile);                                                                         \
    SHARED(uint64_t, barrier, 1);                                                                 \
    const uint32_t shots = inp[SHOTS], words = inp[BOX_WORDS];                                    \
    if (threadIdx.x == 0) {                                                                       \
      tma_prefetch(&map);                                                                         \
      mbarrier_init(barrier, 1);                                                                  \
      fence_mbarrier_init();                                                                      \
    }                                                                                             \
    for (uint32_t shot = 0; shot < shots; ++shot) {                                               \
      [[maybe_unused]] const int* c = reinterpret_cast<const int*>(inp + COORDINATES + 5 * shot); \
      fill(tile, words + MARGIN);                                                                 \
      fence_proxy_async();                                                                        \
      __syncthreads();                                                                            \
      if (threadIdx.x == 0) {                                                                     \
        mbarrier_arrive_expect_tx(barrier, 4 * words);                                            \
        wrapper(tile, &map, barrier, __VA_ARGS__);                                                \
      }                                                                                           \
      mbarrier_wait(barrier, shot & 1);                                                           \
      copy(out + shot * (words + MARGIN), tile, words + MARGIN);                                  \
      __syncthreads();                                                                            \
    }                                                                                             \
  }                                                                                               \
  EXPORT_KERNEL(conform_##wrapper)

// One shot, issued by rank 0 of a cluster of 2. out [blocks, box + MARGIN].
#define CONFORM_TMA_MULTICAST(wrapper, ...)                                                        \
  KERNEL(conform_##wrapper, 128)(uint32_t* out, const uint32_t* inp,                               \
                                 const __grid_constant__ TensorMap map) {                          \
    SHARED_DYNAMIC(tile);                                                                          \
    SHARED(uint64_t, barrier, 1);                                                                  \
    const uint32_t words = inp[BOX_WORDS], ranks = inp[RANKS], rank = cluster_rank();              \
    const bool lands_here = (ranks >> rank & 1) != 0;                                              \
    const int* c = reinterpret_cast<const int*>(inp + COORDINATES);                                \
    fill(tile, words + MARGIN);                                                                    \
    fence_proxy_async();                                                                           \
    if (threadIdx.x == 0) {                                                                        \
      mbarrier_init(barrier, 1);                                                                   \
      fence_mbarrier_init();                                                                       \
      if (lands_here) mbarrier_arrive_expect_tx(barrier, 4 * words);                               \
    }                                                                                              \
    __syncthreads();                                                                               \
    cluster_sync();                                                                                \
    if (rank == 0 && threadIdx.x == 0) wrapper(tile, &map, barrier, __VA_ARGS__, uint16_t(ranks)); \
    if (lands_here) mbarrier_wait(barrier, 0);                                                     \
    copy(out + blockIdx.x * (words + MARGIN), tile, words + MARGIN);                               \
    __syncthreads();                                                                               \
    cluster_sync();                                                                                \
  }                                                                                                \
  EXPORT_KERNEL(conform_##wrapper)

// Each shot stores the same tile, or adds it, to `out`, one after the other.
#define CONFORM_TMA_STORE(wrapper, ...)                                          \
  KERNEL(conform_##wrapper, 128)(uint32_t*, const uint32_t* inp,                 \
                                 const __grid_constant__ TensorMap map) {        \
    SHARED_DYNAMIC(tile);                                                        \
    copy(tile, inp + STORED, inp[BOX_WORDS]);                                    \
    fence_proxy_async();                                                         \
    __syncthreads();                                                             \
    if (threadIdx.x != 0) return;                                                \
    for (uint32_t shot = 0; shot < inp[SHOTS]; ++shot) {                         \
      const int* c = reinterpret_cast<const int*>(inp + COORDINATES + 5 * shot); \
      wrapper(&map, tile, __VA_ARGS__);                                          \
      bulk_commit();                                                             \
      bulk_wait<0>();                                                            \
    }                                                                            \
  }                                                                              \
  EXPORT_KERNEL(conform_##wrapper)

#define CONFORM_TMA(rank, ...)                                     \
  CONFORM_TMA_LOAD(tma_load_##rank##d, __VA_ARGS__)                \
  CONFORM_TMA_MULTICAST(tma_load_multicast_##rank##d, __VA_ARGS__) \
  CONFORM_TMA_STORE(tma_store_##rank##d, __VA_ARGS__)              \
  CONFORM_TMA_STORE(tma_reduce_add_##rank##d, __VA_ARGS__)
CONFORM_TMA(1, c[0])
CONFORM_TMA(2, c[0], c[1])
CONFORM_TMA(3, c[0], c[1], c[2])
CONFORM_TMA(4, c[0], c[1], c[2], c[3])
CONFORM_TMA(5, c[0], c[1], c[2], c[3], c[4])

// ---------------------------------------------------------------- registers, dependent launches
// Three warpgroups hand registers over and go on. out [384].
KERNEL(conform_setmaxnreg, 384, 1)(uint32_t* out, const uint32_t* inp) {
  const uint32_t i = threadIdx.x;
  if (i < 128) {
    setmaxnreg_dec<24>();
    out[i] = inp[i];
  } else {
    setmaxnreg_inc<240>();
    out[i] = ~inp[i];
  }
}
EXPORT_KERNEL(conform_setmaxnreg)

KERNEL(conform_grid_dependency, 32)(uint32_t* out, const uint32_t* inp) {
  grid_dependency_launch();
  grid_dependency_wait();
  out[threadIdx.x] = inp[threadIdx.x];
}
EXPORT_KERNEL(conform_grid_dependency)

// ---------------------------------------------------------------- wgmma
// inp: [0] steps of 16 k, [1] scale_d of the first, [2] words of shared memory, [4...] where A lies
// in it, [9...] where B does, [32...] A's registers [4,4,128] (RS), [2080...] the shared memory.
// A tile: byte offset, leading bytes, stride bytes, swizzle field, bytes from one step to the next.
// Accumulator i of each thread was i - thread before. out [N/2,128]: all of them; or, to keep the
// goldens of the many other shapes small, [N/2,4]: accumulator i of lane i mod 32 of each warp.
constexpr uint32_t STEPS = 0, SCALE_D = 1, SHARED_WORDS = 2, TILE_A = 4, TILE_B = 9,
                   A_REGISTERS = 32, SHARED_IMAGE = 2080;

DEVICE uint64_t descriptor(const uint8_t* shared, const uint32_t* tile, uint32_t step) {
  return matrix_descriptor(shared + tile[0] + step * tile[4], tile[1], tile[2], tile[3]);
}
DEVICE void load_image(uint8_t* shared, const uint32_t* inp) {
  copy(shared, inp + SHARED_IMAGE, inp[SHARED_WORDS]);
  fence_proxy_async();
  __syncthreads();
}
template <int Count>
DEVICE void begin(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) d[i] = float(i - int(threadIdx.x));
}
template <int Count>
DEVICE void end(uint32_t* out, const float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) out[128 * i + threadIdx.x] = __float_as_uint(d[i]);
}

template <int Count>
DEVICE void end_sampled(uint32_t* out, const float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i)
    if (int(threadIdx.x % 32) == i % 32) out[4 * i + threadIdx.x / 32] = __float_as_uint(d[i]);
}

template <int N, int TransA, int TransB, bool Sampled>
DEVICE void shared_times_shared(uint32_t* out, const uint32_t* inp) {
  SHARED_DYNAMIC(image);
  load_image(image, inp);
  float d[N / 2];
  begin(d);
  int scale_d = int(inp[SCALE_D]);
  wgmma_fence();
  for (uint32_t step = 0; step < inp[STEPS]; ++step) {
    wgmma<N, TransA, TransB>(d, descriptor(image, inp + TILE_A, step),
                             descriptor(image, inp + TILE_B, step), scale_d);
    scale_d = 1;
  }
  wgmma_commit();
  wgmma_wait<0>();
  if constexpr (Sampled) {
    end_sampled(out, d);
  } else {
    end(out, d);
  }
}
template <int N, int TransB, bool Sampled>
DEVICE void registers_times_shared(uint32_t* out, const uint32_t* inp) {
  SHARED_DYNAMIC(image);
  load_image(image, inp);
  float d[N / 2];
  begin(d);
  uint32_t a[4][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = inp[A_REGISTERS + 128 * i + threadIdx.x];
  const int scale_d = int(inp[SCALE_D]);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step)
    wgmma<N, TransB>(d, a[step], descriptor(image, inp + TILE_B, step), step ? 1 : scale_d);
  wgmma_commit();
  wgmma_wait<0>();
  if constexpr (Sampled) {
    end_sampled(out, d);
  } else {
    end(out, d);
  }
}

#define CONFORM_WGMMA_SHARED(N, TransA, TransB, Sampled)                                        \
  KERNEL(conform_wgmma_n##N##_a##TransA##_b##TransB, 128)(uint32_t* out, const uint32_t* inp) { \
    shared_times_shared<N, TransA, TransB, Sampled>(out, inp);                                  \
  }                                                                                             \
  EXPORT_KERNEL(conform_wgmma_n##N##_a##TransA##_b##TransB)
#define CONFORM_WGMMA_REGISTERS(N, TransB, Sampled)                                           \
  KERNEL(conform_wgmma_n##N##_registers_b##TransB, 128)(uint32_t* out, const uint32_t* inp) { \
    registers_times_shared<N, TransB, Sampled>(out, inp);                                     \
  }                                                                                           \
  EXPORT_KERNEL(conform_wgmma_n##N##_registers_b##TransB)
#define CONFORM_WGMMA(N, Sampled)        \
  CONFORM_WGMMA_SHARED(N, 0, 0, Sampled) \
  CONFORM_WGMMA_SHARED(N, 0, 1, Sampled) \
  CONFORM_WGMMA_SHARED(N, 1, 0, Sampled) \
  CONFORM_WGMMA_SHARED(N, 1, 1, Sampled) \
  CONFORM_WGMMA_REGISTERS(N, 0, Sampled) \
  CONFORM_WGMMA_REGISTERS(N, 1, Sampled)
CONFORM_WGMMA(8, false)
CONFORM_WGMMA(64, false)
CONFORM_WGMMA(96, false)
CONFORM_WGMMA(128, true)
CONFORM_WGMMA(192, true)
CONFORM_WGMMA(256, true)
// Every other shape, in two forms.
#define CONFORM_WGMMA_TWO(N)          \
  CONFORM_WGMMA_SHARED(N, 0, 0, true) \
  CONFORM_WGMMA_REGISTERS(N, 1, true)
CONFORM_WGMMA_TWO(16)
CONFORM_WGMMA_TWO(24)
CONFORM_WGMMA_TWO(32)
CONFORM_WGMMA_TWO(40)
CONFORM_WGMMA_TWO(48)
CONFORM_WGMMA_TWO(56)
CONFORM_WGMMA_TWO(72)
CONFORM_WGMMA_TWO(80)
CONFORM_WGMMA_TWO(88)
CONFORM_WGMMA_TWO(104)
CONFORM_WGMMA_TWO(112)
CONFORM_WGMMA_TWO(120)
CONFORM_WGMMA_TWO(136)
CONFORM_WGMMA_TWO(144)
CONFORM_WGMMA_TWO(152)
CONFORM_WGMMA_TWO(160)
CONFORM_WGMMA_TWO(168)
CONFORM_WGMMA_TWO(176)
CONFORM_WGMMA_TWO(184)
CONFORM_WGMMA_TWO(200)
CONFORM_WGMMA_TWO(208)
CONFORM_WGMMA_TWO(216)
CONFORM_WGMMA_TWO(224)
CONFORM_WGMMA_TWO(232)
CONFORM_WGMMA_TWO(240)
CONFORM_WGMMA_TWO(248)

// Two groups in flight: the first is read while the second may still run. out [2,32,128].
KERNEL(conform_wgmma_groups, 128)(uint32_t* out, const uint32_t* inp) {
  SHARED_DYNAMIC(image);
  load_image(image, inp);
  float first[32], second[32];
  const uint64_t a[2] = {descriptor(image, inp + TILE_A, 0), descriptor(image, inp + TILE_A, 1)};
  const uint64_t b[2] = {descriptor(image, inp + TILE_B, 0), descriptor(image, inp + TILE_B, 1)};
  begin(first);
  begin(second);
  wgmma_fence();
  wgmma<64>(first, a[0], b[0], 0);
  wgmma_commit();
  wgmma<64>(second, a[1], b[1], 1);
  wgmma_commit();
  wgmma_wait<1>();
  end(out, first);
  wgmma_wait<0>();
  end(out + 4096, second);
}
EXPORT_KERNEL(conform_wgmma_groups)
