// Rotary embedding, SwiGLU, addition and casts: what changes each value by its own neighbours only.
//
// Contract: src/cuda/pointwise.rs launches; nothing is allocated. Activations are bf16 or f32 (type
// T), computed with in fp32 and rounded once; the rotary table is fp32 always. Every address and
// every row is 16-byte aligned. Rotation and addition work in place, everything else writes (=).
//
// No value is used twice, so a kernel is as fast as memory: 16 bytes an access, and several of them
// on their way before the first is used. Rows are cut into tasks of a warp, `ITEMS` vectors a lane;
// flat buffers are walked vector by vector. As many blocks run as the machine holds.
#include "isobath.cuh"

constexpr int WARP = 32;
constexpr int THREADS = 256, WARPS = THREADS / WARP;
// Vectors of a lane in one task: two of each operand, so that four loads or six are under way.
constexpr int ITEMS = 2;
constexpr int TASK = ITEMS * WARP;

// A warp's part of a [rows, items] matrix: item `first`, first + WARP, ... of `row`.
struct Task {
  int row, first;
};
DEVICE int first_task() { return int(blockIdx.x) * WARPS + int(threadIdx.x) / WARP; }
DEVICE int task_step() { return int(gridDim.x) * WARPS; }
DEVICE Task task_of(int task, int tasks_of_row) {
  const int row = task / tasks_of_row;
  return {row, (task - row * tasks_of_row) * TASK + int(threadIdx.x) % WARP};
}

// ---------------------------------------------------------------- rotary
// (x, y) = (x cos - y sin, y cos + x sin) for the pairs (i, i + D/2) of the first `rotated` heads
// of each row (q, then k; v stays), with the angles of the row's position; `sign` -1: the inverse.
template <class T>
DEVICE void rotary(const float* table,    // [P,D]: D/2 cosines of a position, then D/2 sines
                   const int* positions,  // [T], each below P
                   T* qkv,                // [T,columns], in place
                   int rows, int columns, int rotated, int head_dim, float sign) {
  begin_after_previous();
  const int half_vectors = head_dim / 2 / VALUES<T>;
  const int items = rotated * half_vectors;
  const int tasks_of_row = (items + TASK - 1) / TASK;
  for (int task = first_task(); task < rows * tasks_of_row; task += task_step()) {
    const auto [row, first] = task_of(task, tasks_of_row);
    const float* const angles = table + size_t(positions[row]) * head_dim;
    uint4* const vectors = reinterpret_cast<uint4*>(qkv + size_t(row) * columns);
    uint4 held_low[ITEMS], held_high[ITEMS];
    int low_at[ITEMS], angle[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int item = first + i * WARP;
      const int head = item / half_vectors, vector = item - head * half_vectors;
      low_at[i] = 2 * head * half_vectors + vector;
      angle[i] = vector * VALUES<T>;
      if (item < items) {
        held_low[i] = vectors[low_at[i]];
        held_high[i] = vectors[low_at[i] + half_vectors];
      }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (first + i * WARP < items) {
        float low[VALUES<T>], high[VALUES<T>];
        unpack(held_low[i], low);
        unpack(held_high[i], high);
#pragma unroll
        for (int j = 0; j < VALUES<T>; j += 4) {
          float cosines[4], sines[4];
          unpack(*reinterpret_cast<const uint4*>(angles + angle[i] + j), cosines);
          unpack(*reinterpret_cast<const uint4*>(angles + head_dim / 2 + angle[i] + j), sines);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float x = low[j + k], y = high[j + k], sine = sign * sines[k];
            low[j + k] = x * cosines[k] - y * sine;
            high[j + k] = y * cosines[k] + x * sine;
          }
        }
        vectors[low_at[i]] = pack(low);
        vectors[low_at[i] + half_vectors] = pack(high);
      }
    }
  }
}

// ---------------------------------------------------------------- SwiGLU
// out = silu(gate) up
template <class T>
DEVICE void swiglu_forward(const T* inp,  // [T,2F]: gate, then up
                           T* out,        // [T,F]
                           int rows, int ffn) {
  begin_after_previous();
  const int items = ffn / VALUES<T>;
  const int tasks_of_row = (items + TASK - 1) / TASK;
  for (int task = first_task(); task < rows * tasks_of_row; task += task_step()) {
    const auto [row, first] = task_of(task, tasks_of_row);
    const uint4* const gates = reinterpret_cast<const uint4*>(inp + size_t(row) * 2 * ffn);
    uint4 held_gate[ITEMS], held_up[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int item = first + i * WARP;
      if (item < items) {
        held_gate[i] = gates[item];
        held_up[i] = gates[items + item];
      }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int item = first + i * WARP;
      if (item < items) {
        float gate[VALUES<T>], up[VALUES<T>];
        unpack(held_gate[i], gate);
        unpack(held_up[i], up);
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j) up[j] = swiglu<T>(gate[j], up[j]);
        reinterpret_cast<uint4*>(out + size_t(row) * ffn)[item] = pack(up);
      }
    }
  }
}

// d_up = d_out silu(gate); d_gate = d_out up silu'(gate), silu' = sigmoid + silu (1 - sigmoid)
template <class T>
DEVICE void swiglu_backward(const T* inp,    // [T,2F]: gate, then up
                            const T* d_out,  // [T,F]
                            T* d_inp,        // [T,2F]: d_gate, then d_up
                            int rows, int ffn) {
  begin_after_previous();
  const int items = ffn / VALUES<T>;
  const int tasks_of_row = (items + TASK - 1) / TASK;
  for (int task = first_task(); task < rows * tasks_of_row; task += task_step()) {
    const auto [row, first] = task_of(task, tasks_of_row);
    const uint4* const gates = reinterpret_cast<const uint4*>(inp + size_t(row) * 2 * ffn);
    const uint4* const d_outs = reinterpret_cast<const uint4*>(d_out + size_t(row) * ffn);
    uint4 held_gate[ITEMS], held_up[ITEMS], held_d_out[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int item = first + i * WARP;
      if (item < items) {
        held_gate[i] = gates[item];
        held_up[i] = gates[items + item];
        held_d_out[i] = d_outs[item];
      }
    }
    uint4* const d_gates = reinterpret_cast<uint4*>(d_inp + size_t(row) * 2 * ffn);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int item = first + i * WARP;
      if (item < items) {
        float gate[VALUES<T>], up[VALUES<T>], d[VALUES<T>];
        unpack(held_gate[i], gate);
        unpack(held_up[i], up);
        unpack(held_d_out[i], d);
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j) {
          const GateUp gradient = swiglu_gradient<T>(gate[j], up[j], d[j]);
          gate[j] = gradient.gate;
          up[j] = gradient.up;
        }
        d_gates[item] = pack(gate);
        d_gates[items + item] = pack(up);
      }
    }
  }
}

// ---------------------------------------------------------------- flat buffers
DEVICE uint64_t first_thread() { return uint64_t(blockIdx.x) * THREADS + threadIdx.x; }
DEVICE uint64_t thread_step() { return uint64_t(gridDim.x) * THREADS; }

DEVICE float as_float(bf16 value) { return to_float(value); }
DEVICE float as_float(float value) { return value; }
DEVICE void assign(bf16* to, float value) { *to = to_bf16(value); }
DEVICE void assign(float* to, float value) { *to = value; }

// to += from
template <class T>
DEVICE void add(const T* from, T* to, uint64_t elements) {
  begin_after_previous();
  const uint64_t vectors = elements / VALUES<T>;
  for (uint64_t at = first_thread(); at < vectors; at += thread_step()) {
    uint4* const sum = reinterpret_cast<uint4*>(to) + at;
    float values[VALUES<T>], added[VALUES<T>];
    unpack(*sum, values);
    unpack(reinterpret_cast<const uint4*>(from)[at], added);
#pragma unroll
    for (int j = 0; j < VALUES<T>; ++j) values[j] += added[j];
    *sum = pack(values);
  }
  const uint64_t rest = vectors * VALUES<T> + first_thread();
  if (rest < elements) assign(to + rest, as_float(to[rest]) + as_float(from[rest]));
}

// ---------------------------------------------------------------- kernels
// The second launch bound is the number of blocks that src/cuda/pointwise.rs gives a
// multiprocessor.
#define POINTWISE_KERNELS(type)                                                                  \
  KERNEL(rotary_##type, THREADS, 4)                                                              \
  (const float* table, const int* positions, type* qkv, int rows, int columns, int rotated,      \
   int head_dim, float sign) {                                                                   \
    rotary<type>(table, positions, qkv, rows, columns, rotated, head_dim, sign);                 \
  }                                                                                              \
  EXPORT_KERNEL(rotary_##type)                                                                   \
  KERNEL(swiglu_forward_##type, THREADS, 4)                                                      \
  (const type* inp, type* out, int rows, int ffn) { swiglu_forward<type>(inp, out, rows, ffn); } \
  EXPORT_KERNEL(swiglu_forward_##type)                                                           \
  KERNEL(swiglu_backward_##type, THREADS, 4)                                                     \
  (const type* inp, const type* d_out, type* d_inp, int rows, int ffn) {                         \
    swiglu_backward<type>(inp, d_out, d_inp, rows, ffn);                                         \
  }                                                                                              \
  EXPORT_KERNEL(swiglu_backward_##type)                                                          \
  KERNEL(add_##type, THREADS, 8)(const type* from, type* to, uint64_t elements) {                \
    add<type>(from, to, elements);                                                               \
  }                                                                                              \
  EXPORT_KERNEL(add_##type)

POINTWISE_KERNELS(bf16)
POINTWISE_KERNELS(f32)

// to = from, rounded as parameters are
KERNEL(cast_to_bf16, THREADS, 8)(const float* from, bf16* to, uint64_t elements) {
  begin_after_previous();
  const uint64_t vectors = elements / VALUES<bf16>;
  for (uint64_t at = first_thread(); at < vectors; at += thread_step()) {
    const float4* const four = reinterpret_cast<const float4*>(from) + 2 * at;
    const float4 low = four[0], high = four[1];
    reinterpret_cast<uint4*>(to)[at] =
        make_uint4(rounded_parameters(low.x, low.y), rounded_parameters(low.z, low.w),
                   rounded_parameters(high.x, high.y), rounded_parameters(high.z, high.w));
  }
  const uint64_t rest = vectors * VALUES<bf16> + first_thread();
  if (rest < elements) to[rest] = bf16{uint16_t(rounded_parameter(from[rest]) >> 16)};
}
EXPORT_KERNEL(cast_to_bf16)
