// A branch added to the residual stream with scales, forward and backward.
//
// Contract: src/cuda/residual.rs launches; nothing is allocated. Activations are bf16 or f32 (type
// T), computed with in fp32 and rounded once; gains and their sums are fp32. Every address and
// every row is 16-byte aligned. `gain` null: 1; gains 1: one number for all columns, else one a
// column. d_inp is written; d_out is multiplied by the stream's scale in place, unless that is 1;
// sums have a fixed order.
//
// A block has a strip of 32 vectors and CHUNK rows; a warp walks over the rows of its strip, so
// that a column's factor is loaded once and the sums of its gradient stay in registers until the
// end.
#include "isobath.cuh"

constexpr int WARP = 32;
constexpr int THREADS = 256, WARPS = THREADS / WARP;
// Rows of a block, and of a partial sum: NORM_PARTIAL_ROWS in src/backend/mod.rs.
constexpr int CHUNK = 64;
// Rows that a warp loads before the first is used: two loads of each operand are under way; with
// four the registers do not suffice for the blocks below.
constexpr int ROWS = 2;

// The strip and the rows of this thread.
struct Place {
  int vector, first_row, end_row;
};
template <class T>
DEVICE Place place(int rows, int columns) {
  const int strips = (columns / VALUES<T> + WARP - 1) / WARP;
  const int chunk = int(blockIdx.x) / strips, strip = int(blockIdx.x) - chunk * strips;
  const int end = (chunk + 1) * CHUNK;
  return {strip * WARP + int(threadIdx.x) % WARP, chunk * CHUNK + int(threadIdx.x) / WARP,
          end < rows ? end : rows};
}

// branch_scale gain of the columns of a vector.
template <class T>
DEVICE void factors(const float* gain, int gains, int vector, float branch_scale, float* out) {
#pragma unroll
  for (int j = 0; j < VALUES<T>; ++j) {
    const float factor = !gain ? 1.0f : gain[gains == 1 ? 0 : vector * VALUES<T> + j];
    out[j] = branch_scale * factor;
  }
}

// ---------------------------------------------------------------- forward
// out = stream_scale residual + branch_scale gain inp
template <class T>
DEVICE void forward(const T* inp,       // [T,C]
                    const T* residual,  // [T,C]
                    const float* gain,  // [gains] or null
                    T* out,             // [T,C]
                    int rows, int columns, int gains, float stream_scale, float branch_scale) {
  begin_after_previous();
  const auto [vector, first_row, end_row] = place<T>(rows, columns);
  const int vectors = columns / VALUES<T>;
  if (vector >= vectors) return;
  float factor[VALUES<T>];
  factors<T>(gain, gains, vector, branch_scale, factor);
  for (int first = first_row; first < end_row; first += ROWS * WARPS) {
    uint4 held_inp[ROWS], held_residual[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = first + i * WARPS;
      const size_t at = size_t(row) * vectors + vector;
      if (row < end_row) {
        held_inp[i] = reinterpret_cast<const uint4*>(inp)[at];
        held_residual[i] = reinterpret_cast<const uint4*>(residual)[at];
      }
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = first + i * WARPS;
      if (row < end_row) {
        float values[VALUES<T>], stream[VALUES<T>];
        unpack(held_inp[i], values);
        unpack(held_residual[i], stream);
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j)
          values[j] = stream_scale * stream[j] + factor[j] * values[j];
        reinterpret_cast<uint4*>(out)[size_t(row) * vectors + vector] = pack(values);
      }
    }
  }
}

// ---------------------------------------------------------------- backward
// d_inp = branch_scale gain d_out; partial[chunk] = branch_scale times the sum of d_out inp over
// its rows (where there is a gain); d_out *= stream_scale
template <class T>
DEVICE void backward(const T* inp,       // [T,C], null without a gain
                     const float* gain,  // [gains] or null
                     T* d_out,           // [T,C]
                     T* d_inp,           // [T,C]
                     float* partial,     // [ceil(T/CHUNK),C], null without a gain
                     int rows, int columns, int gains, float stream_scale, float branch_scale) {
  begin_after_previous();
  const auto [vector, first_row, end_row] = place<T>(rows, columns);
  const int vectors = columns / VALUES<T>;
  float sums[VALUES<T>];
#pragma unroll
  for (int j = 0; j < VALUES<T>; ++j) sums[j] = 0;
  if (vector < vectors) {
    float factor[VALUES<T>];
    factors<T>(gain, gains, vector, branch_scale, factor);
    for (int first = first_row; first < end_row; first += ROWS * WARPS) {
      uint4 held_d_out[ROWS], held_inp[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int row = first + i * WARPS;
        const size_t at = size_t(row) * vectors + vector;
        if (row < end_row) {
          held_d_out[i] = reinterpret_cast<const uint4*>(d_out)[at];
          if (gain) held_inp[i] = reinterpret_cast<const uint4*>(inp)[at];
        }
      }
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int row = first + i * WARPS;
        const size_t at = size_t(row) * vectors + vector;
        if (row < end_row) {
          float d_values[VALUES<T>], result[VALUES<T>];
          unpack(held_d_out[i], d_values);
          if (gain) {
            float values[VALUES<T>];
            unpack(held_inp[i], values);
#pragma unroll
            for (int j = 0; j < VALUES<T>; ++j) sums[j] += d_values[j] * values[j];
          }
#pragma unroll
          for (int j = 0; j < VALUES<T>; ++j) result[j] = factor[j] * d_values[j];
          reinterpret_cast<uint4*>(d_inp)[at] = pack(result);
          if (stream_scale != 1.0f) {
#pragma unroll
            for (int j = 0; j < VALUES<T>; ++j) d_values[j] *= stream_scale;
            reinterpret_cast<uint4*>(d_out)[at] = pack(d_values);
          }
        }
      }
    }
  }
  if (!gain) return;

  // The warps' sums, added up in the order of the warps; column j of a vector lies at j WARP +
  // lane, where neighbours meet no bank conflict.
  constexpr int SPAN = WARP * VALUES<T>;
  SHARED(float, warp_sums, WARPS* SPAN);
  const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
#pragma unroll
  for (int j = 0; j < VALUES<T>; ++j) warp_sums[warp * SPAN + j * WARP + lane] = sums[j];
  __syncthreads();
  const int strips = (vectors + WARP - 1) / WARP;
  const int chunk = int(blockIdx.x) / strips, strip = int(blockIdx.x) - chunk * strips;
  for (int i = int(threadIdx.x); i < SPAN; i += THREADS) {
    const int column = (strip * WARP + i % WARP) * VALUES<T> + i / WARP;
    float total = 0;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) total += warp_sums[other * SPAN + i];
    if (column < columns) partial[size_t(chunk) * columns + column] = branch_scale * total;
  }
}

// ---------------------------------------------------------------- kernels
#define RESIDUAL_KERNELS(type)                                                                 \
  KERNEL(scaled_residual_forward_##type, THREADS, 4)                                           \
  (const type* inp, const type* residual, const float* gain, type* out, int rows, int columns, \
   int gains, float stream_scale, float branch_scale) {                                        \
    forward<type>(inp, residual, gain, out, rows, columns, gains, stream_scale, branch_scale); \
  }                                                                                            \
  EXPORT_KERNEL(scaled_residual_forward_##type)                                                \
  KERNEL(scaled_residual_backward_##type, THREADS, 3)                                          \
  (const type* inp, const float* gain, type* d_out, type* d_inp, float* partial, int rows,     \
   int columns, int gains, float stream_scale, float branch_scale) {                           \
    backward<type>(inp, gain, d_out, d_inp, partial, rows, columns, gains, stream_scale,       \
                   branch_scale);                                                              \
  }                                                                                            \
  EXPORT_KERNEL(scaled_residual_backward_##type)

RESIDUAL_KERNELS(bf16)
RESIDUAL_KERNELS(f32)

// d_gain[0] += sum of all partial sums, in one block: thread t adds up t, t + THREADS, ..., warp 0
// the sums of the warps.
KERNEL(scaled_residual_backward_gain, THREADS)
(const float* partial,  // [count]
 float* d_gain,         // [1]
 int count) {
  begin_after_previous();
  SHARED(float, sums, WARPS);
  float sum = 0;
  for (int i = int(threadIdx.x); i < count; i += THREADS) sum += partial[i];
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) total += sums[other];
    d_gain[0] += total;
  }
}
EXPORT_KERNEL(scaled_residual_backward_gain)
