// The CUDA language on a CPU: qualifiers, vector types, thread indices, shared memory, exports.
//
// Included by kernel files through isobath.cuh. build.rs compiles each kernel file inside an
// anonymous namespace, once plain and once with access hooks, so nothing here may define a symbol
// with external linkage: functions are declared (the machine defines them) or DEVICE.
#pragma once
#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__ __restrict
#define DEVICE [[maybe_unused]] static inline __attribute__((always_inline))

// ---------------------------------------------------------------- vector types
struct alignas(4) ushort2 {
  uint16_t x, y;
};
struct alignas(8) ushort4 {
  uint16_t x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct uint3 {
  uint32_t x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
DEVICE int2 make_int2(int x, int y) { return {x, y}; }
DEVICE int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
DEVICE uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
DEVICE uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace simt {

// A line of a kernel file: the default argument of a wrapper is the place of its call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// What a thread knows of itself; the machine's Fiber derives from it.
struct ThreadIndices {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern __thread ThreadIndices* current __attribute__((tls_model("initial-exec")));
// For a thread they never change; out of line, so that no access hook sees the machine's memory.
uint3 thread_index() __attribute__((const));
uint3 block_index() __attribute__((const));
dim3 block_size() __attribute__((const));
dim3 grid_size() __attribute__((const));

void* static_shared(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();

// ---------------------------------------------------------------- exported kernels
struct Kernel {
  const char* name;
  const char* file;
  void (*call)(void* const* arguments);
  const uint32_t* argument_bytes;
  uint32_t arguments;
  uint32_t max_threads;
  uint32_t hooked;  // compiled with access hooks: the race detector sees its loads and stores
  Kernel* next;
};
void register_kernel(Kernel*);

template <auto F>
struct Trampoline;
template <class... A, void (*F)(A...)>
struct Trampoline<F> {
  static constexpr uint32_t count = sizeof...(A);
  static constexpr uint32_t bytes[count + 1] = {uint32_t(sizeof(A))..., 0};
  // Not hooked: the arguments lie in the caller's memory, on a GPU in constant memory.
  template <size_t... I>
  __attribute__((no_sanitize("thread"), noinline)) static void unpack(
      [[maybe_unused]] void* const* arguments, std::index_sequence<I...>) {
    F(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
  }
  __attribute__((no_sanitize("thread"))) static void call(void* const* arguments) {
    unpack(arguments, std::index_sequence_for<A...>{});
  }
};
template <auto F>
struct Registration {
  Kernel kernel;
  Registration(const char* name, const char* file, uint32_t max_threads, uint32_t hooked)
      : kernel{name,
               file,
               &Trampoline<F>::call,
               Trampoline<F>::bytes,
               Trampoline<F>::count,
               max_threads,
               hooked,
               nullptr} {
    register_kernel(&kernel);
  }
};
#if defined(__SANITIZE_THREAD__)
#define SIMT_HOOKED 1
#else
#define SIMT_HOOKED 0
#endif

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
constexpr int warpSize = 32;

// Kernels share one section, so that the watchdog knows a spinning kernel from a busy machine.
#define KERNEL(name, ...)                                    \
  static constexpr uint32_t name##_bounds[] = {__VA_ARGS__}; \
  __attribute__((section("simt_kernels"), noinline)) static void name
#define EXPORT_KERNEL(name)                                                                 \
  static ::simt::Registration<&name> name##_registration{#name, __FILE__, name##_bounds[0], \
                                                         SIMT_HOOKED};
// SHARED(float, rows, 32): `rows` is a float[32] in static shared memory.
#define SHARED(T, name, n)          \
  static const char name##_key = 0; \
  T(&name)                          \
  [n] = *static_cast<T(*)[n]>(::simt::static_shared(&name##_key, sizeof(T) * (n), alignof(T)))
// `name` is a uint8_t*, aligned to 1024 bytes.
#define SHARED_DYNAMIC(name) uint8_t* const name = static_cast<uint8_t*>(::simt::dynamic_shared())

// ---------------------------------------------------------------- arithmetic
DEVICE uint32_t __float_as_uint(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
DEVICE float __uint_as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
DEVICE int __float_as_int(float x) { return int(__float_as_uint(x)); }
DEVICE float __int_as_float(int i) { return __uint_as_float(uint32_t(i)); }
DEVICE float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// The C library has functions of these names.
#define __expf(x) ::expf(x)
#define __logf(x) ::logf(x)
DEVICE float __fdividef(float x, float y) { return x / y; }
DEVICE float __frcp_rn(float x) { return 1.0f / x; }
DEVICE float __fdiv_rn(float x, float y) { return x / y; }
DEVICE float __fsqrt_rn(float x) { return std::sqrt(x); }
DEVICE int __popc(uint32_t x) { return __builtin_popcount(x); }
DEVICE int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
DEVICE int __ffs(uint32_t x) { return __builtin_ffs(int(x)); }
template <class T>
DEVICE T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
DEVICE T max(T a, T b) {
  return a < b ? b : a;
}

// ---------------------------------------------------------------- loads and stores with a hint
template <class T>
DEVICE T __ldg(const T* p) {
  return *p;
}
template <class T>
DEVICE T __ldcs(const T* p) {
  return *p;
}
template <class T>
DEVICE T __ldcg(const T* p) {
  return *p;
}
template <class T>
DEVICE void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
DEVICE void __stcg(T* p, T value) {
  *p = value;
}
