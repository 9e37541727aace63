// Cross-entropy over rows of logits: the losses, or the losses and the gradient in place.
//
// Contract: src/cuda/loss.rs launches; nothing is allocated. Logits are bf16 or f32 (type T), rows
// 16-byte aligned. Columns from `classes` on are padding: whatever they hold, they take no part,
// and their gradient is 0. With log Z = log sum exp(logit),
//   losses[row] = log Z - logit[target] + z_loss (log Z)^2,
//   d_logit = scale[0] (softmax (1 + 2 z_loss log Z) - [column = target]),
// and 0 for both where the target is IGNORE_INDEX. Any other target that is no class makes the
// loss and the row's gradient NaN, which the caller finds before it updates anything. Every sum
// has a fixed order, the same in both kernels: their losses have the same bits.
//
// A block has a row. Its threads hold a tile of THREADS VECTORS vectors of 16 bytes in registers;
// a row that fits is read once. A longer one is read tile by tile, each thread keeping a maximum
// and a sum that refers to it (online softmax; Milakov and Gimelshein 2018, algorithm 3), then
// again for the gradient, backwards: the last tile is still there, those before it were read last.
#include "isobath.cuh"

// ---------------------------------------------------------------- vectors
constexpr int WARP = 32;
constexpr int IGNORE_INDEX = -100;
DEVICE float to_float(float x) { return x; }

// Replaces what lies in columns from `classes` on; `first` is the column of values[0].
template <int COUNT>
DEVICE void replace_padding(float (&values)[COUNT], int first, int classes, float by) {
#pragma unroll
  for (int j = 0; j < COUNT; ++j)
    if (first + j >= classes) values[j] = by;
}

// ---------------------------------------------------------------- softmax
// The part of Z that some columns make: exp(max) sum. A maximum is never -inf, so that no column
// at all is {LOWEST, 0} and needs no case of its own.
constexpr float LOWEST = -3.4028234663852886e38f;
struct Partition {
  float max, sum;
};

// exp(x) for a difference to a maximum, which is taken before the scaling to base 2: scaled alone,
// large logits would lose what tells them apart.
DEVICE float exp_of(float difference) { return exp2_approx(difference * 1.4426950408889634f); }

DEVICE Partition warp_partition(Partition own) {
  const float max = warp_max(own.max);
  return {max, warp_sum(own.sum * exp_of(own.max - max))};
}
// Called once by a block; every thread gets the same bits.
template <int THREADS>
DEVICE Partition block_partition(Partition own) {
  constexpr int WARPS = THREADS / WARP;
  SHARED(float2, partitions, WARPS);
  const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
  const Partition of_warp = warp_partition(own);
  if (lane == 0) partitions[warp] = make_float2(of_warp.max, of_warp.sum);
  __syncthreads();
  const float2 other = lane < WARPS ? partitions[lane] : make_float2(LOWEST, 0);
  return warp_partition({other.x, other.y});
}

// ---------------------------------------------------------------- rows
template <class T>
DEVICE const uint4* row_of(const T* logits, int columns) {  // logits [T,V], the block's row
  return reinterpret_cast<const uint4*>(logits + size_t(blockIdx.x) * columns);
}
template <class T>
DEVICE uint4* row_of(T* logits, int columns) {
  return reinterpret_cast<uint4*>(logits + size_t(blockIdx.x) * columns);
}

// How a row is cut: tile t has its vectors from t THREADS VECTORS on, and vector i of a thread
// in it is number i THREADS + thread.
template <class T, int THREADS, int VECTORS>
DEVICE int tiles_of(int columns) {
  constexpr int SPAN = THREADS * VECTORS;
  return (columns / VALUES<T> + SPAN - 1) / SPAN;
}
template <int THREADS, int VECTORS>
DEVICE int vector_of(int tile, int i) {
  return (tile * VECTORS + i) * THREADS + int(threadIdx.x);
}

// A thread's part of a tile; -inf, which exp makes 0, where there is no class.
template <class T, int THREADS, int VECTORS>
DEVICE void load_tile(const uint4* row, int tile, int classes, uint4 (&held)[VECTORS]) {
  const float nothing = __uint_as_float(0xff800000u);
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int at = vector_of<THREADS, VECTORS>(tile, i), first = at * VALUES<T>;
    float values[VALUES<T>];
    if (first + VALUES<T> <= classes) {
      held[i] = row[at];
    } else {
      if (first < classes) {
        unpack(row[at], values);
      } else {
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j) values[j] = nothing;
      }
      replace_padding(values, first, classes, nothing);
      held[i] = pack(values);
    }
  }
}

// Z of a row; its last tile is in `held` afterwards.
template <class T, int THREADS, int VECTORS>
DEVICE Partition row_partition(const uint4* row, int tiles, int classes, uint4 (&held)[VECTORS]) {
  Partition own = {LOWEST, 0};
  for (int tile = 0; tile < tiles; ++tile) {
    load_tile<T, THREADS, VECTORS>(row, tile, classes, held);
    // Vector by vector: a maximum of the whole tile first would keep it unpacked in registers.
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      float values[VALUES<T>];
      unpack(held[i], values);
      float max = own.max;
#pragma unroll
      for (int j = 0; j < VALUES<T>; ++j) max = fmaxf(max, values[j]);
      float sum = own.sum * exp_of(own.max - max);
#pragma unroll
      for (int j = 0; j < VALUES<T>; ++j) sum += exp_of(values[j] - max);
      own = {max, sum};
    }
  }
  return block_partition<THREADS>(own);
}

// The target's logit, NaN where the target is no class.
template <class T>
DEVICE float target_logit(const T* logits, int target, int classes, int columns) {
  if (uint32_t(target) >= uint32_t(classes)) return __uint_as_float(0x7fffffffu);
  return to_float(logits[size_t(blockIdx.x) * columns + target]);
}

DEVICE float row_loss(Partition z, float target, float z_loss) {
  const float log_sum = logf(z.sum), log_z = z.max + log_sum;
  // Not log_z - target: between large logits that would keep no digit of the loss. What is small
  // is added first.
  return (z.max - target) + (log_sum + z_loss * log_z * log_z);
}

// ---------------------------------------------------------------- forward
template <class T, int THREADS, int VECTORS>
DEVICE void loss_forward(const T* logits,     // [T,V]
                         const int* targets,  // [T]
                         float* losses,       // [T]
                         int classes, int columns, float z_loss) {
  const int target = targets[blockIdx.x];
  if (target == IGNORE_INDEX) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0;
    return;
  }
  const int tiles = tiles_of<T, THREADS, VECTORS>(columns);
  uint4 held[VECTORS] = {};
  const Partition z =
      row_partition<T, THREADS, VECTORS>(row_of(logits, columns), tiles, classes, held);
  if (threadIdx.x == 0) {
    const float logit = target_logit(logits, target, classes, columns);
    losses[blockIdx.x] = row_loss(z, logit, z_loss);
  }
}

// ---------------------------------------------------------------- forward and backward
template <class T, int THREADS, int VECTORS>
DEVICE void loss_backward(T* logits,           // [T,V], replaced by d_logits
                          const int* targets,  // [T]
                          const float* scale,  // [1]
                          float* losses,       // [T]
                          int classes, int columns, float z_loss) {
  uint4* const row = row_of(logits, columns);
  const int vectors = columns / VALUES<T>;
  const int target = targets[blockIdx.x];
  if (target == IGNORE_INDEX) {
    for (int at = int(threadIdx.x); at < vectors; at += THREADS) row[at] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) losses[blockIdx.x] = 0;
    return;
  }
  // Read by the thread that needs it, in front of the barrier behind which it may be overwritten.
  float logit = 0;
  if (threadIdx.x == 0) logit = target_logit(logits, target, classes, columns);
  const int tiles = tiles_of<T, THREADS, VECTORS>(columns);
  uint4 held[VECTORS] = {};
  const Partition z = row_partition<T, THREADS, VECTORS>(row, tiles, classes, held);
  if (threadIdx.x == 0) losses[blockIdx.x] = row_loss(z, logit, z_loss);

  const float log_z = z.max + logf(z.sum);
  const float of_target = scale[0];
  float of_exp = __fdiv_rn(of_target * (1.0f + 2.0f * z_loss * log_z), z.sum);
  if (uint32_t(target) >= uint32_t(classes)) of_exp = __uint_as_float(0x7fffffffu);
  for (int tile = tiles - 1; tile >= 0; --tile) {
    if (tile < tiles - 1) load_tile<T, THREADS, VECTORS>(row, tile, classes, held);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int at = vector_of<THREADS, VECTORS>(tile, i), first = at * VALUES<T>;
      if (at < vectors) {
        float values[VALUES<T>];
        unpack(held[i], values);
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j) values[j] = exp_of(values[j] - z.max) * of_exp;
        if (uint32_t(target - first) < uint32_t(VALUES<T>)) {
#pragma unroll
          for (int j = 0; j < VALUES<T>; ++j)
            if (first + j == target) values[j] -= of_target;
        }
        replace_padding(values, first, classes, 0);  // 0 times a NaN would not be 0
        row[at] = pack(values);
      }
    }
  }
}

// ---------------------------------------------------------------- kernels
// Threads of a row x vectors of a thread, and the blocks that a multiprocessor shall hold.
#define LOSS_KERNELS(type, threads, vectors, blocks)                                               \
  KERNEL(loss_forward_##type##_##threads##x##vectors, threads, blocks)                             \
  (const type* logits, const int* targets, float* losses, int classes, int columns,                \
   float z_loss) {                                                                                 \
    loss_forward<type, threads, vectors>(logits, targets, losses, classes, columns, z_loss);       \
  }                                                                                                \
  EXPORT_KERNEL(loss_forward_##type##_##threads##x##vectors)                                       \
  KERNEL(loss_backward_##type##_##threads##x##vectors, threads, blocks)                            \
  (type * logits, const int* targets, const float* scale, float* losses, int classes, int columns, \
   float z_loss) {                                                                                 \
    loss_backward<type, threads, vectors>(logits, targets, scale, losses, classes, columns,        \
                                          z_loss);                                                 \
  }                                                                                                \
  EXPORT_KERNEL(loss_backward_##type##_##threads##x##vectors)

// In one tile: up to 1024, 4096, 16384, 32768 and 65536 columns of bf16, half as many of f32. The
// last one takes every wider row: of all shapes it keeps the largest part of a row in registers.
#define LOSS_KERNELS_OF(type)    \
  LOSS_KERNELS(type, 128, 1, 12) \
  LOSS_KERNELS(type, 128, 4, 8)  \
  LOSS_KERNELS(type, 256, 8, 4)  \
  LOSS_KERNELS(type, 512, 8, 2)  \
  LOSS_KERNELS(type, 1024, 8, 1)
LOSS_KERNELS_OF(bf16)
LOSS_KERNELS_OF(f32)
