// The wrappers of device/wrappers.cuh on a CPU: the same names and arguments, and the place of the
// call as a last argument that no kernel writes.
#pragma once
#include "language.h"

#define SIMT_SITE ::simt::Site site = ::simt::Site::here()
// For isobath.cuh, whose functions pass on the place of their own call.
#define SIMT_AND_SITE , SIMT_SITE
#define SIMT_HERE site
#define SIMT_AND_HERE , site

// ---------------------------------------------------------------- conversions
DEVICE uint16_t bf16_bits(float x) {
  const uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
DEVICE uint32_t bf16x2_bits(float low, float high) {
  return uint32_t(bf16_bits(low)) | uint32_t(bf16_bits(high)) << 16;
}

// ---------------------------------------------------------------- approximate arithmetic
// Correctly rounded here, the device's error is a few units in the last place. Both take subnormal
// numbers for zeros and give none (.ftz).
namespace simt {
DEVICE float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
// What the L2 cache makes of an addition to global memory, by one thread or in bulk (PTX ISA, red).
DEVICE float global_sum(float x, float added) { return flushed(flushed(x) + flushed(added)); }
}  // namespace simt
DEVICE float exp2_approx(float x) { return simt::flushed(std::exp2(simt::flushed(x))); }
DEVICE float log2_approx(float x) { return std::log2(simt::flushed(x)); }
DEVICE float rsqrt_approx(float x) { return 1.0f / std::sqrt(simt::flushed(x)); }
DEVICE float reciprocal_approx(float x) { return simt::flushed(1.0f / simt::flushed(x)); }
DEVICE float tanh_approx(float x) { return std::tanh(x); }

// ---------------------------------------------------------------- warp
namespace simt {
enum class Shuffle { Index, Up, Down, Xor };
uint32_t shuffle(Shuffle, uint32_t mask, uint32_t value, int lane, int width, Site);
uint32_t ballot(uint32_t mask, int predicate, Site);
template <class T>
DEVICE T shuffled(Shuffle kind, uint32_t mask, T value, int lane, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof(T));
  for (uint32_t& word : words) word = shuffle(kind, mask, word, lane, width, site);
  std::memcpy(&value, words, sizeof(T));
  return value;
}
}  // namespace simt
template <class T>
DEVICE T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, SIMT_SITE) {
  return simt::shuffled(simt::Shuffle::Index, mask, value, lane, width, site);
}
template <class T>
DEVICE T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32, SIMT_SITE) {
  return simt::shuffled(simt::Shuffle::Up, mask, value, delta, width, site);
}
template <class T>
DEVICE T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32, SIMT_SITE) {
  return simt::shuffled(simt::Shuffle::Down, mask, value, delta, width, site);
}
template <class T>
DEVICE T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, SIMT_SITE) {
  return simt::shuffled(simt::Shuffle::Xor, mask, value, lanes, width, site);
}
DEVICE uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_SITE) {
  return simt::ballot(mask, predicate, site);
}
DEVICE int __any_sync(uint32_t mask, int predicate, SIMT_SITE) {
  return simt::ballot(mask, predicate, site) != 0;
}
DEVICE int __all_sync(uint32_t mask, int predicate, SIMT_SITE) {
  return simt::ballot(mask, !predicate, site) == 0;
}
void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_SITE);
bool elect_one(SIMT_SITE);  // true in one lane of a converged warp: here the first
// Matrices of 8x8 b16; each lane's address is one 16-byte row (PTX ISA, ldmatrix).
void ldmatrix_x1(uint32_t (&d)[1], const void* row, SIMT_SITE);
void ldmatrix_x2(uint32_t (&d)[2], const void* row, SIMT_SITE);
void ldmatrix_x4(uint32_t (&d)[4], const void* row, SIMT_SITE);
void ldmatrix_x1_trans(uint32_t (&d)[1], const void* row, SIMT_SITE);
void ldmatrix_x2_trans(uint32_t (&d)[2], const void* row, SIMT_SITE);
void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row, SIMT_SITE);
void stmatrix_x1(void* row, const uint32_t (&s)[1], SIMT_SITE);
void stmatrix_x2(void* row, const uint32_t (&s)[2], SIMT_SITE);
void stmatrix_x4(void* row, const uint32_t (&s)[4], SIMT_SITE);
void stmatrix_x1_trans(void* row, const uint32_t (&s)[1], SIMT_SITE);
void stmatrix_x2_trans(void* row, const uint32_t (&s)[2], SIMT_SITE);
void stmatrix_x4_trans(void* row, const uint32_t (&s)[4], SIMT_SITE);
// d += a b, A row-major 16x16, B column-major 16x8, fp32 accumulation.
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_SITE);

// ---------------------------------------------------------------- block
void __syncthreads(SIMT_SITE);
void barrier_sync(int id, int threads, SIMT_SITE);
void barrier_arrive(int id, int threads, SIMT_SITE);
uint32_t shared_address(const void* p);  // 32-bit address in the shared window

// ---------------------------------------------------------------- memory order, atomics
void __threadfence(SIMT_SITE);
void __threadfence_block(SIMT_SITE);
uint32_t load_acquire(const uint32_t* p, SIMT_SITE);         // .gpu scope
void store_release(uint32_t* p, uint32_t value, SIMT_SITE);  // .gpu scope
float atomicAdd(float* p, float value, SIMT_SITE);           // atomics are relaxed, .gpu scope
uint32_t atomicAdd(uint32_t* p, uint32_t value, SIMT_SITE);
int atomicAdd(int* p, int value, SIMT_SITE);
uint32_t atomicMax(uint32_t* p, uint32_t value, SIMT_SITE);
uint32_t atomicExch(uint32_t* p, uint32_t value, SIMT_SITE);
uint32_t atomicCAS(uint32_t* p, uint32_t compare, uint32_t value, SIMT_SITE);
// Adds to two neighbours, at a multiple of 8 bytes in global memory; nobody waits for the sums. The
// order of two sums decides their bits: here it is a race unless something orders them.
void reduce_add_f32x2(float* global, float first, float second, SIMT_SITE);
void __nanosleep(uint32_t nanoseconds, SIMT_SITE);
[[noreturn]] void __trap(SIMT_SITE);

// ---------------------------------------------------------------- cp.async
void cp_async_4(void* shared, const void* global, SIMT_SITE);
void cp_async_8(void* shared, const void* global, SIMT_SITE);
void cp_async_16(void* shared, const void* global, SIMT_SITE);
// Copies the first `bytes` (0 to 16) and fills the rest of the 16 with zeros.
void cp_async_16_zfill(void* shared, const void* global, uint32_t bytes, SIMT_SITE);
void cp_async_commit(SIMT_SITE);
namespace simt {
void cp_async_wait(int groups, Site);
}
template <int Groups>
DEVICE void cp_async_wait(SIMT_SITE) {
  simt::cp_async_wait(Groups, site);
}

// ---------------------------------------------------------------- mbarrier
void mbarrier_init(uint64_t* barrier, uint32_t count, SIMT_SITE);
void mbarrier_invalidate(uint64_t* barrier, SIMT_SITE);
void mbarrier_arrive(uint64_t* barrier, SIMT_SITE);
void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes, SIMT_SITE);
void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes, SIMT_SITE);
// On the barrier at the same shared address in block `rank` of the cluster.
void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank, SIMT_SITE);
// The same where only asynchronous accesses that have completed come before it. That it orders no
// others is not modelled.
void mbarrier_arrive_peer(uint64_t* barrier, uint32_t rank, SIMT_SITE);
bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity, SIMT_SITE);
// Until the phase of this parity has completed; `_cluster` orders arrivals from other blocks.
void mbarrier_wait(uint64_t* barrier, uint32_t parity, SIMT_SITE);
void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity, SIMT_SITE);

// ---------------------------------------------------------------- fences between proxies
void fence_mbarrier_init(SIMT_SITE);  // fence.mbarrier_init.release.cluster
void fence_proxy_async(SIMT_SITE);    // shared memory
void fence_proxy_async_global(SIMT_SITE);

// ---------------------------------------------------------------- TMA
// Coordinates innermost first. Loads complete on `barrier` with the bytes of the full box.
DEVICE void tma_prefetch(const TensorMap*) {}
namespace simt {
enum class TmaReduce { None, Add };
void tma_load(void* shared, const TensorMap*, uint64_t* barrier, const int* coordinates, int rank,
              uint32_t mask, bool multicast, Site);
void tma_store(const TensorMap*, const void* shared, const int* coordinates, int rank, TmaReduce,
               Site);
}  // namespace simt
#define SIMT_TMA(rank, parameters, coordinates)                                                   \
  DEVICE void tma_load_##rank##d(void* shared, const TensorMap* map, uint64_t* barrier,           \
                                 parameters, SIMT_SITE) {                                         \
    const int at[] = coordinates;                                                                 \
    simt::tma_load(shared, map, barrier, at, rank, 0, false, site);                               \
  }                                                                                               \
  DEVICE void tma_load_multicast_##rank##d(void* shared, const TensorMap* map, uint64_t* barrier, \
                                           parameters, uint16_t ranks, SIMT_SITE) {               \
    const int at[] = coordinates;                                                                 \
    simt::tma_load(shared, map, barrier, at, rank, ranks, true, site);                            \
  }                                                                                               \
  DEVICE void tma_store_##rank##d(const TensorMap* map, const void* shared, parameters,           \
                                  SIMT_SITE) {                                                    \
    const int at[] = coordinates;                                                                 \
    simt::tma_store(map, shared, at, rank, simt::TmaReduce::None, site);                          \
  }                                                                                               \
  DEVICE void tma_reduce_add_##rank##d(const TensorMap* map, const void* shared, parameters,      \
                                       SIMT_SITE) {                                               \
    const int at[] = coordinates;                                                                 \
    simt::tma_store(map, shared, at, rank, simt::TmaReduce::Add, site);                           \
  }
#define SIMT_LIST(...) __VA_ARGS__
SIMT_TMA(1, SIMT_LIST(int c0), SIMT_LIST({c0}))
SIMT_TMA(2, SIMT_LIST(int c0, int c1), SIMT_LIST({c0, c1}))
SIMT_TMA(3, SIMT_LIST(int c0, int c1, int c2), SIMT_LIST({c0, c1, c2}))
SIMT_TMA(4, SIMT_LIST(int c0, int c1, int c2, int c3), SIMT_LIST({c0, c1, c2, c3}))
SIMT_TMA(5, SIMT_LIST(int c0, int c1, int c2, int c3, int c4), SIMT_LIST({c0, c1, c2, c3, c4}))
#undef SIMT_LIST
#undef SIMT_TMA

// ---------------------------------------------------------------- bulk copies (16-byte multiples)
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, SIMT_SITE);
void bulk_load_multicast(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                         uint16_t ranks, SIMT_SITE);
void bulk_store(void* global, const void* shared, uint32_t bytes, SIMT_SITE);
void bulk_reduce_add_f32(float* global, const void* shared, uint32_t bytes, SIMT_SITE);
void bulk_reduce_add_bf16(bf16* global, const void* shared, uint32_t bytes, SIMT_SITE);
// To block `rank` of the cluster, completing on its barrier; both addresses as they are there.
void bulk_copy_cluster(void* shared, const void* from, uint32_t bytes, uint64_t* barrier,
                       uint32_t rank, SIMT_SITE);
// Groups of stores and reductions of this thread, tensor or not.
void bulk_commit(SIMT_SITE);
namespace simt {
void bulk_wait(int groups, bool read_only, Site);
}
template <int Groups>
DEVICE void bulk_wait(SIMT_SITE) {
  simt::bulk_wait(Groups, false, site);
}
// Until the sources have been read; the results may not be written yet.
template <int Groups>
DEVICE void bulk_wait_read(SIMT_SITE) {
  simt::bulk_wait(Groups, true, site);
}

// ---------------------------------------------------------------- cluster
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive(SIMT_SITE);  // release
void cluster_arrive_relaxed(SIMT_SITE);
void cluster_wait(SIMT_SITE);  // acquire
namespace simt {
void* cluster_map(const void* p, uint32_t rank, Site);
}
// The address of `p`'s counterpart in block `rank`, for ordinary loads and stores.
template <class T>
DEVICE T* cluster_map(T* p, uint32_t rank, SIMT_SITE) {
  return static_cast<T*>(simt::cluster_map(p, rank, site));
}

// ---------------------------------------------------------------- wgmma, bf16 to fp32
namespace simt {
void setmaxnreg(int registers, bool increase, Site);
void wgmma_wait(int groups, Site);
void wgmma_shared(float* d, int n, uint64_t a, uint64_t b, int scale_d, bool trans_a, bool trans_b,
                  Site);
void wgmma_registers(float* d, int n, const uint32_t* a, uint64_t b, int scale_d, bool trans_b,
                     Site);
}  // namespace simt
template <int Registers>
DEVICE void setmaxnreg_inc(SIMT_SITE) {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
  simt::setmaxnreg(Registers, true, site);
}
template <int Registers>
DEVICE void setmaxnreg_dec(SIMT_SITE) {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
  simt::setmaxnreg(Registers, false, site);
}
void wgmma_fence(SIMT_SITE);
void wgmma_commit(SIMT_SITE);
template <int Groups>
DEVICE void wgmma_wait(SIMT_SITE) {
  simt::wgmma_wait(Groups, site);
}
// d [64,N] (+)= a [64,16] b [16,N]: = where scale_d is 0. Trans: 0 K-major, 1 MN-major.
template <int N, int TransA = 0, int TransB = 0>
DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d, SIMT_SITE) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  simt::wgmma_shared(d, N, a, b, scale_d, TransA, TransB, site);
}
// The same with A in registers.
template <int N, int TransB = 0>
DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int scale_d, SIMT_SITE) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  simt::wgmma_registers(d, N, a, b, scale_d, TransB, site);
}

// ---------------------------------------------------------------- dependent launches
// Kernels run one after the other here: there is nothing to wait for. That a thread waits before
// it touches global memory is checked where a launch is dependent.
void grid_dependency_wait(SIMT_SITE);
DEVICE void grid_dependency_launch() {}
