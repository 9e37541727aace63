// The wrappers of host/wrappers.h on a GPU: the same names and arguments, one PTX instruction each
// and no logic; mbarrier_wait's loop is the exception. Where a pointer stands, a generic address
// is taken and converted to the state space of the instruction.
//
// Whatever reads or writes memory, or orders it, is volatile and clobbers memory, so that the
// compiler moves no access across it. Instructions of sm_90 are declared from sm_90 on, wgmma and
// setmaxnreg (wgmma.cuh) on sm_90a.
#pragma once
#include "language.cuh"

// ---------------------------------------------------------------- conversions
DEVICE uint16_t bf16_bits(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
DEVICE uint32_t bf16x2_bits(float low, float high) {
  uint32_t pair;  // the instruction's first source is the upper half
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---------------------------------------------------------------- approximate arithmetic
// One MUFU each: arguments and results below 2^-126 count as zero.
DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---------------------------------------------------------------- addresses
// 32-bit address in the shared window.
DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
namespace ptx {
DEVICE uint64_t global_address(const void* p) { return __cvta_generic_to_global(p); }
}  // namespace ptx

// ---------------------------------------------------------------- warp
// Matrices of 8x8 b16; each lane's address is one 16-byte row (PTX ISA, ldmatrix).
#define PTX_LDMATRIX_1(name, variant)                                              \
  DEVICE void name(uint32_t(&d)[1], const void* row) {                             \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" variant ".shared.b16 {%0}, [%1];" \
                 : "=r"(d[0])                                                      \
                 : "r"(shared_address(row))                                        \
                 : "memory");                                                      \
  }
#define PTX_LDMATRIX_2(name, variant)                                                  \
  DEVICE void name(uint32_t(&d)[2], const void* row) {                                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" variant ".shared.b16 {%0, %1}, [%2];" \
                 : "=r"(d[0]), "=r"(d[1])                                              \
                 : "r"(shared_address(row))                                            \
                 : "memory");                                                          \
  }
#define PTX_LDMATRIX_4(name, variant)                                                          \
  DEVICE void name(uint32_t(&d)[4], const void* row) {                                         \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" variant ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                              \
                 : "r"(shared_address(row))                                                    \
                 : "memory");                                                                  \
  }
PTX_LDMATRIX_1(ldmatrix_x1, "")
PTX_LDMATRIX_2(ldmatrix_x2, "")
PTX_LDMATRIX_4(ldmatrix_x4, "")
PTX_LDMATRIX_1(ldmatrix_x1_trans, ".trans")
PTX_LDMATRIX_2(ldmatrix_x2_trans, ".trans")
PTX_LDMATRIX_4(ldmatrix_x4_trans, ".trans")
#undef PTX_LDMATRIX_1
#undef PTX_LDMATRIX_2
#undef PTX_LDMATRIX_4

// d += a b, A row-major 16x16, B column-major 16x8, fp32 accumulation.
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---------------------------------------------------------------- block
DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}
DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// ---------------------------------------------------------------- memory order
DEVICE uint32_t load_acquire(const uint32_t* p) {  // .gpu scope
  uint32_t value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
DEVICE void store_release(uint32_t* p, uint32_t value) {  // .gpu scope
  asm volatile("st.release.gpu.u32 [%0], %1;" : : "l"(p), "r"(value) : "memory");
}

// ---------------------------------------------------------------- cp.async
DEVICE void cp_async_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
               :
               : "r"(shared_address(shared)), "l"(ptx::global_address(global))
               : "memory");
}
DEVICE void cp_async_8(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;"
               :
               : "r"(shared_address(shared)), "l"(ptx::global_address(global))
               : "memory");
}
DEVICE void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(shared_address(shared)), "l"(ptx::global_address(global))
               : "memory");
}
// Copies the first `bytes` (0 to 16) and fills the rest of the 16 with zeros.
DEVICE void cp_async_16_zfill(void* shared, const void* global, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(ptx::global_address(global)), "r"(bytes)
               : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Groups>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(Groups) : "memory");
}

#if DEVICE_HAS_SM90

// ---------------------------------------------------------------- warp, from sm_90
DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(elected)
      :
      : "memory");
  return elected != 0;
}
#define PTX_STMATRIX_1(name, variant)                                              \
  DEVICE void name(void* row, const uint32_t(&s)[1]) {                             \
    asm volatile("stmatrix.sync.aligned.m8n8.x1" variant ".shared.b16 [%0], {%1};" \
                 :                                                                 \
                 : "r"(shared_address(row)), "r"(s[0])                             \
                 : "memory");                                                      \
  }
#define PTX_STMATRIX_2(name, variant)                                                  \
  DEVICE void name(void* row, const uint32_t(&s)[2]) {                                 \
    asm volatile("stmatrix.sync.aligned.m8n8.x2" variant ".shared.b16 [%0], {%1, %2};" \
                 :                                                                     \
                 : "r"(shared_address(row)), "r"(s[0]), "r"(s[1])                      \
                 : "memory");                                                          \
  }
#define PTX_STMATRIX_4(name, variant)                                                          \
  DEVICE void name(void* row, const uint32_t(&s)[4]) {                                         \
    asm volatile("stmatrix.sync.aligned.m8n8.x4" variant ".shared.b16 [%0], {%1, %2, %3, %4};" \
                 :                                                                             \
                 : "r"(shared_address(row)), "r"(s[0]), "r"(s[1]), "r"(s[2]), "r"(s[3])        \
                 : "memory");                                                                  \
  }
PTX_STMATRIX_1(stmatrix_x1, "")
PTX_STMATRIX_2(stmatrix_x2, "")
PTX_STMATRIX_4(stmatrix_x4, "")
PTX_STMATRIX_1(stmatrix_x1_trans, ".trans")
PTX_STMATRIX_2(stmatrix_x2_trans, ".trans")
PTX_STMATRIX_4(stmatrix_x4_trans, ".trans")
#undef PTX_STMATRIX_1
#undef PTX_STMATRIX_2
#undef PTX_STMATRIX_4

// ---------------------------------------------------------------- reductions, from sm_90
// Adds to two neighbours, at a multiple of 8 bytes in global memory; nobody waits for the sums.
// Subnormal numbers count as zeros (PTX ISA, red).
DEVICE void reduce_add_f32x2(float* global, float first, float second) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};"
               :
               : "l"(ptx::global_address(global)), "f"(first), "f"(second)
               : "memory");
}

// ---------------------------------------------------------------- mbarrier
DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(count)
               : "memory");
}
DEVICE void mbarrier_invalidate(uint64_t* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" : : "r"(shared_address(barrier)) : "memory");
}
DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
               :
               : "r"(shared_address(barrier))
               : "memory");
}
DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
DEVICE void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// On the barrier at the same shared address in block `rank` of the cluster.
DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}"
      :
      : "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}
// The same where only asynchronous accesses that have completed come before it: it orders no
// ordinary ones for the other block, and so needs no fence of the whole GPU.
DEVICE void mbarrier_arrive_peer(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
      :
      : "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}
DEVICE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
namespace ptx {
DEVICE bool mbarrier_try_wait_cluster(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
}  // namespace ptx
// Until the phase of this parity has completed; `_cluster` orders arrivals from other blocks.
DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}
DEVICE void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait_cluster(barrier, parity)) {
  }
}

// ---------------------------------------------------------------- fences between proxies
DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---------------------------------------------------------------- TMA
// Coordinates innermost first. Loads complete on `barrier` with the bytes of the full box. A map
// is read at its generic address.
DEVICE void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}
// The texts are the coordinates' operands: after two others (store), three (load) or four.
#define PTX_TMA(rank, parameters, coordinates, behind_2, behind_3, behind_4)                      \
  DEVICE void tma_load_##rank##d(void* shared, const TensorMap* map, uint64_t* barrier,           \
                                 parameters) {                                                    \
    asm volatile("cp.async.bulk.tensor." #rank                                                    \
                 "d.shared::cluster.global.tile"                                                  \
                 ".mbarrier::complete_tx::bytes [%0], [%1, " behind_3 "], [%2];"                  \
                 :                                                                                \
                 : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)),           \
                   coordinates                                                                    \
                 : "memory");                                                                     \
  }                                                                                               \
  DEVICE void tma_load_multicast_##rank##d(void* shared, const TensorMap* map, uint64_t* barrier, \
                                           parameters, uint16_t ranks) {                          \
    asm volatile("cp.async.bulk.tensor." #rank                                                    \
                 "d.shared::cluster.global.tile"                                                  \
                 ".mbarrier::complete_tx::bytes.multicast::cluster"                               \
                 " [%0], [%1, " behind_4 "], [%2], %3;"                                           \
                 :                                                                                \
                 : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)),           \
                   "h"(ranks), coordinates                                                        \
                 : "memory");                                                                     \
  }                                                                                               \
  DEVICE void tma_store_##rank##d(const TensorMap* map, const void* shared, parameters) {         \
    asm volatile("cp.async.bulk.tensor." #rank                                                    \
                 "d.global.shared::cta.tile.bulk_group"                                           \
                 " [%0, " behind_2 "], [%1];"                                                     \
                 :                                                                                \
                 : "l"(map), "r"(shared_address(shared)), coordinates                             \
                 : "memory");                                                                     \
  }                                                                                               \
  DEVICE void tma_reduce_add_##rank##d(const TensorMap* map, const void* shared, parameters) {    \
    asm volatile("cp.reduce.async.bulk.tensor." #rank                                             \
                 "d.global.shared::cta.add.tile.bulk_group"                                       \
                 " [%0, " behind_2 "], [%1];"                                                     \
                 :                                                                                \
                 : "l"(map), "r"(shared_address(shared)), coordinates                             \
                 : "memory");                                                                     \
  }
#define PTX_LIST(...) __VA_ARGS__
PTX_TMA(1, PTX_LIST(int c0), PTX_LIST("r"(c0)), "{%2}", "{%3}", "{%4}")
PTX_TMA(2, PTX_LIST(int c0, int c1), PTX_LIST("r"(c0), "r"(c1)), "{%2, %3}", "{%3, %4}", "{%4, %5}")
PTX_TMA(3, PTX_LIST(int c0, int c1, int c2), PTX_LIST("r"(c0), "r"(c1), "r"(c2)), "{%2, %3, %4}",
        "{%3, %4, %5}", "{%4, %5, %6}")
PTX_TMA(4, PTX_LIST(int c0, int c1, int c2, int c3), PTX_LIST("r"(c0), "r"(c1), "r"(c2), "r"(c3)),
        "{%2, %3, %4, %5}", "{%3, %4, %5, %6}", "{%4, %5, %6, %7}")
PTX_TMA(5, PTX_LIST(int c0, int c1, int c2, int c3, int c4),
        PTX_LIST("r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)), "{%2, %3, %4, %5, %6}",
        "{%3, %4, %5, %6, %7}", "{%4, %5, %6, %7, %8}")
#undef PTX_LIST
#undef PTX_TMA

// ---------------------------------------------------------------- bulk copies (16-byte multiples)
DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];"
      :
      : "r"(shared_address(shared)), "l"(ptx::global_address(global)), "r"(bytes),
        "r"(shared_address(barrier))
      : "memory");
}
DEVICE void bulk_load_multicast(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;"
      :
      : "r"(shared_address(shared)), "l"(ptx::global_address(global)), "r"(bytes),
        "r"(shared_address(barrier)), "h"(ranks)
      : "memory");
}
DEVICE void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :
               : "l"(ptx::global_address(global)), "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
DEVICE void bulk_reduce_add_f32(float* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               :
               : "l"(ptx::global_address(global)), "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
DEVICE void bulk_reduce_add_bf16(bf16* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;"
               :
               : "l"(ptx::global_address(global)), "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
// To block `rank` of the cluster, completing on its barrier; both addresses as they are there.
DEVICE void bulk_copy_cluster(void* shared, const void* from, uint32_t bytes, uint64_t* barrier,
                              uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %4;\n"
      "mapa.shared::cluster.u32 remote_barrier, %3, %4;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
      "[remote], [%1], %2, [remote_barrier];\n}"
      :
      : "r"(shared_address(shared)), "r"(shared_address(from)), "r"(bytes),
        "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}
// Groups of stores and reductions of this thread, tensor or not.
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int Groups>
DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" : : "n"(Groups) : "memory");
}
// Until the sources have been read; the results may not be written yet.
template <int Groups>
DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(Groups) : "memory");
}

// ---------------------------------------------------------------- cluster
DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE uint32_t cluster_size() {
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" : : : "memory");
}
DEVICE void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" : : : "memory");
}
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The address of `p`'s counterpart in block `rank`, for ordinary loads and stores.
template <class T>
DEVICE T* cluster_map(T* p, uint32_t rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(address);
}

// ---------------------------------------------------------------- dependent launches
// Waits until the previous kernel has ended and all that it wrote is visible.
DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel may begin when each block of this one has come here, or ended.
DEVICE void grid_dependency_launch() {
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
}

#else  // DEVICE_HAS_SM90

// isobath.cuh's cluster_sync names these on every architecture. Never defined: a kernel that calls
// it below sm_90 is refused by ptxas, "unresolved extern function".
extern __device__ void cluster_arrive();
extern __device__ void cluster_wait();

// There are dependent launches from sm_90 on; below, a kernel begins when the previous one has
// ended.
DEVICE void grid_dependency_wait() {}
DEVICE void grid_dependency_launch() {}

#endif  // DEVICE_HAS_SM90

#include "wgmma.cuh"
