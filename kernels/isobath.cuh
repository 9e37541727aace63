// The header of every kernel file: the CUDA language, one wrapper per instruction, and what both
// machines share (types, bf16, swizzles, descriptors, reductions). Kernel files of one op have
// another one in common, beside them, which includes nothing.
//
// device/ holds the wrappers as inline PTX, host/ the same names on a CPU; a kernel file cannot
// tell which it got. A kernel is written
//
//   KERNEL(norm_forward, 256)(bf16* out, const bf16* inp, int columns) { ... }
//   EXPORT_KERNEL(norm_forward)
//
// where the numbers after the name are those of __launch_bounds__. Shared memory is declared with
// SHARED(type, name, count) and SHARED_DYNAMIC(name). No #if, no inline asm, no CUDA header.
#pragma once
#include <cstdint>

struct bf16 {
  uint16_t bits;
};

// A CUtensorMap: opaque, passed by value as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

#if defined(__CUDACC__)
#include "device/language.cuh"
#include "device/wrappers.cuh"
#else
#include "host/language.h"
#include "host/wrappers.h"
#endif

// ---------------------------------------------------------------- bf16
DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE bf16 to_bf16(float x) { return bf16{bf16_bits(x)}; }  // to nearest, ties to even
// Two values in one register, the first in the lower half.
DEVICE uint32_t pack_bf16(float low, float high) { return bf16x2_bits(low, high); }
DEVICE float low_float(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high_float(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// The upper half is x in bf16, away from zero where what x is beyond the value below it makes a
// whole step together with `added` of 65536 parts of one. NaN stays NaN.
DEVICE uint32_t raised(float x, uint32_t added) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff0000u : bits + added;
}
DEVICE uint32_t upper_halves(uint32_t low, uint32_t high) {
  return low >> 16 | (high & 0xffff0000u);
}
// How parameters become bf16, everywhere: to nearest, ties away from zero. What that changes, as
// a number of bits, fits into 16 with a sign, so that both are the parameter exactly.
DEVICE uint32_t rounded_parameter(float x) { return raised(x, 0x8000u); }
DEVICE uint32_t rounded_parameters(float low, float high) {
  return upper_halves(rounded_parameter(low), rounded_parameter(high));
}

// ---------------------------------------------------------------- vectors of 16 bytes
using f32 = float;  // kernels' names end in the type

// 8 values of bf16 or 4 of f32.
template <class T>
constexpr int VALUES = 16 / int(sizeof(T));

DEVICE void unpack(uint4 vector, float (&values)[8]) {
  const uint32_t pairs[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = low_float(pairs[i]);
    values[2 * i + 1] = high_float(pairs[i]);
  }
}
DEVICE void unpack(uint4 vector, float (&values)[4]) {
  values[0] = __uint_as_float(vector.x);
  values[1] = __uint_as_float(vector.y);
  values[2] = __uint_as_float(vector.z);
  values[3] = __uint_as_float(vector.w);
}
DEVICE uint4 pack(const float (&values)[8]) {
  return make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                    pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
}
DEVICE uint4 pack(const float (&values)[4]) {
  return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                    __float_as_uint(values[2]), __float_as_uint(values[3]));
}

// ---------------------------------------------------------------- swizzles
// Where TMA and wgmma keep the byte at `offset` of a tile whose rows are `Span` bytes wide; the
// tile's base is aligned to 8 * Span bytes (PTX ISA, "shared memory matrix layout").
template <int Span>
DEVICE uint32_t swizzle(uint32_t offset) {
  static_assert(Span == 32 || Span == 64 || Span == 128);
  return offset ^ ((offset >> 3) & (Span - 16));
}

// ---------------------------------------------------------------- SwiGLU
// 1 / (1 + e^-x). For bf16 two MUFUs, each within 2^-22: nothing beside the rounding to 8 bits, and
// the exact ones would cost more time than the memory. f32 has them exact.
template <class T>
DEVICE float sigmoid(float x) {
  if constexpr (sizeof(T) == 2) {
    constexpr float LOG2_E = 1.44269504f;
    return reciprocal_approx(1.0f + exp2_approx(-LOG2_E * x));
  } else {
    return __fdiv_rn(1.0f, 1.0f + expf(-x));
  }
}
// silu(gate) up
template <class T>
DEVICE float swiglu(float gate, float up) {
  return up * (gate * sigmoid<T>(gate));
}
struct GateUp {
  float gate, up;
};
// d_gate = d_out up silu'(gate), silu' = sigmoid + silu (1 - sigmoid); d_up = d_out silu(gate)
template <class T>
DEVICE GateUp swiglu_gradient(float gate, float up, float d_out) {
  const float part = sigmoid<T>(gate), silu = gate * part;
  return {d_out * up * (part + silu * (1.0f - part)), d_out * silu};
}

// ---------------------------------------------------------------- wgmma descriptors
// Field "swizzle" of a shared-memory matrix descriptor; the tensor map's enum counts otherwise.
constexpr uint64_t DESCRIPTOR_SWIZZLE_NONE = 0, DESCRIPTOR_SWIZZLE_128 = 1,
                   DESCRIPTOR_SWIZZLE_64 = 2, DESCRIPTOR_SWIZZLE_32 = 3;

DEVICE uint64_t matrix_descriptor(const void* tile, uint32_t leading_bytes, uint32_t stride_bytes,
                                  uint64_t swizzle_field) {
  const uint64_t start = (shared_address(tile) & 0x3ffff) >> 4;
  return start | uint64_t((leading_bytes & 0x3ffff) >> 4) << 16 |
         uint64_t((stride_bytes & 0x3ffff) >> 4) << 32 | swizzle_field << 62;
}
// K-major, 128-byte swizzle: a row of 64 k values for each m (or n); 8 rows are 1024 bytes.
DEVICE uint64_t descriptor_k_major(const void* tile) {
  return matrix_descriptor(tile, 16, 1024, DESCRIPTOR_SWIZZLE_128);
}
// MN-major, 128-byte swizzle: a row of 64 m (or n) values for each k; `block_bytes` from one block
// of 64 values to the next.
DEVICE uint64_t descriptor_mn_major(const void* tile, uint32_t block_bytes) {
  return matrix_descriptor(tile, block_bytes, 1024, DESCRIPTOR_SWIZZLE_128);
}

// ---------------------------------------------------------------- reductions, in a fixed order
// On the host, a fault inside names the line of the call (SIMT_SITE, nothing on a GPU).
DEVICE float warp_sum(float value SIMT_AND_SITE) {
#pragma unroll
  for (int step = 16; step; step >>= 1)
    value += __shfl_xor_sync(0xffffffffu, value, step, 32 SIMT_AND_HERE);
  return value;
}
DEVICE float warp_max(float value SIMT_AND_SITE) {
#pragma unroll
  for (int step = 16; step; step >>= 1)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step, 32 SIMT_AND_HERE));
  return value;
}

// ---------------------------------------------------------------- cluster and grid
DEVICE void cluster_sync(SIMT_SITE) {
  cluster_arrive(SIMT_HERE);
  cluster_wait(SIMT_HERE);
}

// ---------------------------------------------------------------- dependent launches
// Every kernel that src/cuda/overlap.rs may let begin while the one before it still runs calls
// this, each of its threads, on every path, once. What comes before sets up shared memory
// (barriers, prefetched tensor maps) and touches no global memory at all, not even to read. As each
// thread has waited before it ends, a kernel that has ended says the same of all that came before
// it: it is enough to wait for the one before.
//
// The next kernel may begin as soon as every block of this one has come here: none of its blocks
// takes the place of one that is still to come, so that blocks which wait for each other find room
// as they would without it.
DEVICE void begin_after_previous(SIMT_SITE) {
  grid_dependency_launch();
  grid_dependency_wait(SIMT_HERE);
}

// ---------------------------------------------------------------- rings of stages
// Where in a ring a producer or a consumer is; `parity` is that of the stage's current round.
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
