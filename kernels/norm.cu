// RMSNorm and LayerNorm (no bias) with a depth scale, forward and backward.
//
// Contract: src/cuda/norm.rs launches; nothing is allocated. Activations are bf16 or f32 (type T),
// gains and statistics fp32, all rows 16-byte aligned. `mean` null: RMSNorm, else LayerNorm.
// sqrt_depth is the rounded square root of the depth: the gain that is multiplied by is
// round(gain / sqrt_depth), so a run with that gain and depth 1 gives the same bits. d_inp is
// written, or added to where `accumulate` is not 0; d_gain is always added to. Every sum has a
// fixed order.
//
// A row lives in registers: THREADS threads hold VECTORS vectors of 16 bytes each, vector i of
// thread t being vector t + i THREADS of the row. Blocks walk over rows, so that a gain is read and
// divided once by a block and the sums of its gradient stay in registers until the end.
#include "isobath.cuh"

// ---------------------------------------------------------------- rows
constexpr int WARP = 32;

template <class T>
DEVICE const uint4* row_of(const T* matrix, int row, int columns) {  // matrix [rows,C]
  return reinterpret_cast<const uint4*>(matrix + size_t(row) * columns);
}
template <class T>
DEVICE uint4* row_of(T* matrix, int row, int columns) {
  return reinterpret_cast<uint4*>(matrix + size_t(row) * columns);
}

// Who this thread is: lane `thread` of the THREADS that share a row, `slot` of the block's rows.
template <int THREADS>
struct Place {
  static constexpr int BLOCK = THREADS > 256 ? THREADS : 256;
  static constexpr int ROWS = BLOCK / THREADS;  // that a block works on at once
  int thread, slot, first_row, row_step;
};
template <int THREADS>
DEVICE Place<THREADS> place() {
  constexpr int ROWS = Place<THREADS>::ROWS;
  const int slot = int(threadIdx.x) / THREADS;
  return {int(threadIdx.x) % THREADS, slot, int(blockIdx.x) * ROWS + slot, int(gridDim.x) * ROWS};
}

// Sums over the threads of a row; every one of them gets the same bits. A wider row goes through
// shared memory, in two halves that take turns: the barrier of one sum is what allows the half of
// the sum before it to be written again.
template <int THREADS, int COUNT>
DEVICE void row_sums(float (&sums)[COUNT], int& turn) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sums[i] = warp_sum(sums[i]);
  if constexpr (THREADS > WARP) {
    constexpr int WARPS = THREADS / WARP;
    SHARED(float, halves, 2 * COUNT * WARPS);
    float* const half = halves + turn * COUNT * WARPS;
    turn ^= 1;
    const int warp = int(threadIdx.x) / WARP;
    if (threadIdx.x % WARP == 0) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) half[i * WARPS + warp] = sums[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      sums[i] = 0;
#pragma unroll
      for (int other = 0; other < WARPS; ++other) sums[i] += half[i * WARPS + other];
    }
  }
}

// The gain that is multiplied by, four columns at once.
DEVICE float4 effective_gain(const float* gain, int column, float sqrt_depth) {
  const float4 w = *reinterpret_cast<const float4*>(gain + column);
  return make_float4(__fdiv_rn(w.x, sqrt_depth), __fdiv_rn(w.y, sqrt_depth),
                     __fdiv_rn(w.z, sqrt_depth), __fdiv_rn(w.w, sqrt_depth));
}

DEVICE void to_array(float4 four, float* values) {
  values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
}
DEVICE float4 to_float4(const float* values) {
  return make_float4(values[0], values[1], values[2], values[3]);
}

// ---------------------------------------------------------------- forward
// out = (inp - mean) rstd gain_effective
template <class T, int THREADS, int VECTORS>
DEVICE void norm_forward(const T* inp,       // [rows,C]
                         const float* gain,  // [C]
                         T* out,             // [rows,C]
                         float* mean,        // [rows], null: RMSNorm
                         float* rstd,        // [rows]
                         int rows, int columns, float eps, float sqrt_depth) {
  begin_after_previous();
  const auto [thread, slot, first_row, row_step] = place<THREADS>();
  const int vectors = columns / VALUES<T>;
  int turn = 0;
  float gains[VECTORS][VALUES<T>];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int at = thread + i * THREADS;
#pragma unroll
    for (int j = 0; j < VALUES<T>; j += 4) {
      float4 four = make_float4(0, 0, 0, 0);
      if (at < vectors) four = effective_gain(gain, at * VALUES<T> + j, sqrt_depth);
      to_array(four, &gains[i][j]);
    }
  }

  for (int row = first_row; row < rows; row += row_step) {
    uint4 held[VECTORS];  // the row, zeros after its end
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int at = thread + i * THREADS;
      held[i] = at < vectors ? row_of(inp, row, columns)[at] : make_uint4(0, 0, 0, 0);
    }

    float centre = 0;
    if (mean) {
      float total[1] = {};
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        float values[VALUES<T>];
        unpack(held[i], values);
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j) total[0] += values[j];
      }
      row_sums<THREADS>(total, turn);
      centre = __fdiv_rn(total[0], float(columns));
    }
    float squares[1] = {};
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      if (thread + i * THREADS < vectors) {  // the zeros after the end are not centred
        float values[VALUES<T>];
        unpack(held[i], values);
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j) {
          const float centred = values[j] - centre;
          squares[0] += centred * centred;
        }
      }
    }
    row_sums<THREADS>(squares, turn);
    const float variance = __fdiv_rn(squares[0], float(columns));
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(variance + eps));

#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int at = thread + i * THREADS;
      if (at < vectors) {
        float values[VALUES<T>];
        unpack(held[i], values);
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j) values[j] = (values[j] - centre) * scale * gains[i][j];
        row_of(out, row, columns)[at] = pack(values);
      }
    }
    if (thread == 0) {
      rstd[row] = scale;
      if (mean) mean[row] = centre;
    }
  }
}

// ---------------------------------------------------------------- backward
// With x = (inp - mean) rstd and g = d_out gain_effective:
//   d_inp (+)= rstd (g - mean(g) - x mean(g x)), without mean(g) for RMSNorm;
//   partial[block] = sum of d_out x over the block's rows.
template <class T, int THREADS, int VECTORS>
DEVICE void norm_backward(const T* inp,       // [rows,C]
                          const float* gain,  // [C]
                          const float* mean,  // [rows], null: RMSNorm
                          const float* rstd,  // [rows]
                          const T* d_out,     // [rows,C]
                          float* partial,     // [blocks,C]
                          T* d_inp,           // [rows,C]
                          int accumulate, int rows, int columns, float sqrt_depth) {
  begin_after_previous();
  const auto [thread, slot, first_row, row_step] = place<THREADS>();
  const int vectors = columns / VALUES<T>;
  int turn = 0;
  // In shared memory: beside two rows and the sums, the registers have no room for them. Part p of
  // vector `at` lies at p SPAN + at, where neighbours meet no bank conflict.
  constexpr int PARTS = VALUES<T> / 4, SPAN = VECTORS * THREADS;
  SHARED(float4, gains, PARTS * SPAN);
  for (int four = int(threadIdx.x); four < vectors * PARTS; four += Place<THREADS>::BLOCK)
    gains[four % PARTS * SPAN + four / PARTS] = effective_gain(gain, four * 4, sqrt_depth);
  __syncthreads();
  float d_gains[VECTORS][VALUES<T>];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
#pragma unroll
    for (int j = 0; j < VALUES<T>; ++j) d_gains[i][j] = 0;

  for (int row = first_row; row < rows; row += row_step) {
    // As they came: unpacked they would take twice the registers. All that a row reads is under
    // way at once.
    uint4 held_inp[VECTORS], held_d_out[VECTORS], held_before[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int at = thread + i * THREADS;
      const uint4 zeros = make_uint4(0, 0, 0, 0);
      held_inp[i] = at < vectors ? row_of(inp, row, columns)[at] : zeros;
      held_d_out[i] = at < vectors ? row_of(d_out, row, columns)[at] : zeros;
      held_before[i] = accumulate && at < vectors ? row_of(d_inp, row, columns)[at] : zeros;
    }
    const float centre = mean ? mean[row] : 0.0f, scale = rstd[row];

    float sums[2] = {};  // of g and of g x
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int at = thread + i * THREADS;
      if (at < vectors) {
        float values[VALUES<T>], d_values[VALUES<T>], w[VALUES<T>];
        unpack(held_inp[i], values);
        unpack(held_d_out[i], d_values);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) to_array(gains[part * SPAN + at], &w[4 * part]);
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j) {
          const float x = (values[j] - centre) * scale, g = d_values[j] * w[j];
          sums[0] += g;
          sums[1] += g * x;
          d_gains[i][j] += d_values[j] * x;
        }
      }
    }
    row_sums<THREADS>(sums, turn);
    const float mean_g = mean ? __fdiv_rn(sums[0], float(columns)) : 0.0f;
    const float mean_gx = __fdiv_rn(sums[1], float(columns));

#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int at = thread + i * THREADS;
      if (at < vectors) {
        float values[VALUES<T>], d_values[VALUES<T>], w[VALUES<T>];
        unpack(held_inp[i], values);
        unpack(held_d_out[i], d_values);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) to_array(gains[part * SPAN + at], &w[4 * part]);
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j) {
          const float x = (values[j] - centre) * scale, g = d_values[j] * w[j];
          values[j] = (g - mean_g - x * mean_gx) * scale;
        }
        if (accumulate) {
          float before[VALUES<T>];
          unpack(held_before[i], before);
#pragma unroll
          for (int j = 0; j < VALUES<T>; ++j) values[j] += before[j];
        }
        row_of(d_inp, row, columns)[at] = pack(values);
      }
    }
  }

  // The rows that a block works on at once add up one after the other, in shared memory.
  constexpr int ROWS = Place<THREADS>::ROWS;
  SHARED(float4, totals, ROWS > 1 ? PARTS * SPAN : 1);
  float4* const to = reinterpret_cast<float4*>(partial + size_t(blockIdx.x) * columns);
  for (int row_slot = 0; row_slot < ROWS; ++row_slot) {
    if (slot == row_slot) {
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        const int at = thread + i * THREADS;
        if (at < vectors) {
#pragma unroll
          for (int part = 0; part < PARTS; ++part) {
            float4 total = to_float4(&d_gains[i][4 * part]);
            if (slot > 0) {
              const float4 before = totals[part * SPAN + at];
              total = make_float4(before.x + total.x, before.y + total.y, before.z + total.z,
                                  before.w + total.w);
            }
            if (slot < ROWS - 1)
              totals[part * SPAN + at] = total;
            else
              to[at * PARTS + part] = total;
          }
        }
      }
    }
    if (row_slot < ROWS - 1) __syncthreads();
  }
}

// ---------------------------------------------------------------- kernels
// Threads of a row x vectors of a thread: rows of up to 16 threads vectors bytes. The second launch
// bound is the number of blocks that a multiprocessor shall hold: without it the compiler spends
// registers on one block and leaves too few loads in flight.
#define NORM_KERNELS(type, threads, vectors, forward_blocks, backward_blocks)                      \
  KERNEL(norm_forward_##type##_##threads##x##vectors, Place<threads>::BLOCK, forward_blocks)       \
  (const type* inp, const float* gain, type* out, float* mean, float* rstd, int rows, int columns, \
   float eps, float sqrt_depth) {                                                                  \
    norm_forward<type, threads, vectors>(inp, gain, out, mean, rstd, rows, columns, eps,           \
                                         sqrt_depth);                                              \
  }                                                                                                \
  EXPORT_KERNEL(norm_forward_##type##_##threads##x##vectors)                                       \
  KERNEL(norm_backward_##type##_##threads##x##vectors, Place<threads>::BLOCK, backward_blocks)     \
  (const type* inp, const float* gain, const float* mean, const float* rstd, const type* d_out,    \
   float* partial, type* d_inp, int accumulate, int rows, int columns, float sqrt_depth) {         \
    norm_backward<type, threads, vectors>(inp, gain, mean, rstd, d_out, partial, d_inp,            \
                                          accumulate, rows, columns, sqrt_depth);                  \
  }                                                                                                \
  EXPORT_KERNEL(norm_backward_##type##_##threads##x##vectors)

// 32: a warp for each row, no barrier. All of them together: up to 8192 columns of either type.
#define NORM_KERNELS_OF(type)      \
  NORM_KERNELS(type, 32, 1, 8, 4)  \
  NORM_KERNELS(type, 32, 2, 4, 3)  \
  NORM_KERNELS(type, 32, 4, 3, 2)  \
  NORM_KERNELS(type, 256, 1, 8, 4) \
  NORM_KERNELS(type, 256, 2, 4, 3) \
  NORM_KERNELS(type, 256, 4, 3, 2)
NORM_KERNELS_OF(bf16)
NORM_KERNELS_OF(f32)
NORM_KERNELS(f32, 512, 4, 2, 1)

// d_gain[c] += (sum over b of partial[b,c]) / sqrt_depth. A block has 32 columns; warp w of it adds
// up the rows w, w + 8, ..., and warp 0 the eight sums.
constexpr int GAIN_WARPS = 8;
KERNEL(norm_backward_gain, GAIN_WARPS* WARP)
(const float* partial,  // [partials,C]
 float* d_gain,         // [C]
 int partials, int columns, float sqrt_depth) {
  begin_after_previous();
  SHARED(float, sums, GAIN_WARPS* WARP);
  const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
  const int column = int(blockIdx.x) * WARP + lane;
  float sum = 0;
  if (column < columns)
    for (int row = warp; row < partials; row += GAIN_WARPS)
      sum += partial[size_t(row) * columns + column];
  sums[warp * WARP + lane] = sum;
  __syncthreads();
  if (warp == 0 && column < columns) {
    float total = 0;
#pragma unroll
    for (int other = 0; other < GAIN_WARPS; ++other) total += sums[other * WARP + lane];
    d_gain[column] += __fdiv_rn(total, sqrt_depth);
  }
}
EXPORT_KERNEL(norm_backward_gain)
