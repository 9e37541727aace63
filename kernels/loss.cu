// Cross-entropy over rows of logits: the losses, or the losses and the gradient in place.
//
// Contract: src/cuda/loss.rs launches; nothing is allocated. Logits are bf16 or f32 (type T), rows
// 16-byte aligned; the formula stands in cross_entropy.cuh. losses[row] and the row's gradient are
// 0 where the target is IGNORE_INDEX. Any other target that is no class makes both NaN, which the
// caller finds before it updates anything. Every sum has a fixed order, the same in both kernels:
// their losses have the same bits.
//
// A block has a row. Its threads hold a tile of THREADS VECTORS vectors of 16 bytes in registers;
// a row that fits is read once. A longer one is read tile by tile, each thread keeping a maximum
// and a sum that refers to it, then again for the gradient, backwards: the last tile is still
// there, those before it were read last. Where there are clusters, loss_sm90.cu takes such rows.
#include "isobath.cuh"

#include "cross_entropy.cuh"

// ---------------------------------------------------------------- softmax
constexpr int WARP = 32;

// Called once by a block; every thread gets the same bits.
template <int THREADS>
DEVICE Partition block_partition(Partition own) {
  constexpr int WARPS = THREADS / WARP;
  SHARED(float2, partitions, WARPS);
  const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
  const Partition of_warp = warp_partition(own);
  if (lane == 0) partitions[warp] = make_float2(of_warp.max, of_warp.sum);
  __syncthreads();
  Partition other;
  if (lane < WARPS) other = {partitions[lane].x, partitions[lane].y};
  return warp_partition(other);
}

// ---------------------------------------------------------------- rows
template <class T>
DEVICE T* row_of(T* logits, int columns) {  // logits [T,V], the block's row
  return logits + size_t(blockIdx.x) * columns;
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
template <class T, int THREADS, int VECTORS>
DEVICE void load_tile(const uint4* row, int tile, int classes, uint4 (&held)[VECTORS]) {
  load_vectors<T>(row, classes, [&](int i) { return vector_of<THREADS, VECTORS>(tile, i); }, held);
}

// Z of a row; its last tile is in `held` afterwards.
template <class T, int THREADS, int VECTORS>
DEVICE Partition row_partition(const uint4* row, int tiles, int classes, uint4 (&held)[VECTORS]) {
  Partition own;
  for (int tile = 0; tile < tiles; ++tile) {
    load_tile<T, THREADS, VECTORS>(row, tile, classes, held);
    // Vector by vector: a maximum of the whole tile first would keep it unpacked in registers.
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) own = joined<T>(own, held[i]);
  }
  return block_partition<THREADS>(own);
}

// ---------------------------------------------------------------- forward
template <class T, int THREADS, int VECTORS>
DEVICE void loss_forward(const T* logits,     // [T,V]
                         const int* targets,  // [T]
                         float* losses,       // [T]
                         int classes, int columns, float z_loss) {
  begin_after_previous();
  const int target = targets[blockIdx.x];
  if (target == IGNORE_INDEX) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0;
    return;
  }
  const T* const row = row_of(logits, columns);
  const int tiles = tiles_of<T, THREADS, VECTORS>(columns);
  uint4 held[VECTORS] = {};
  const Partition z =
      row_partition<T, THREADS, VECTORS>(reinterpret_cast<const uint4*>(row), tiles, classes, held);
  if (threadIdx.x == 0)
    losses[blockIdx.x] = row_loss(z, target_logit(row, target, classes), z_loss);
}

// ---------------------------------------------------------------- forward and backward
template <class T, int THREADS, int VECTORS>
DEVICE void loss_backward(T* logits,           // [T,V], replaced by d_logits
                          const int* targets,  // [T]
                          const float* scale,  // [1]
                          float* losses,       // [T]
                          int classes, int columns, float z_loss) {
  begin_after_previous();
  uint4* const row = reinterpret_cast<uint4*>(row_of(logits, columns));
  const int vectors = columns / VALUES<T>;
  const int target = targets[blockIdx.x];
  if (target == IGNORE_INDEX) {
    for (int at = int(threadIdx.x); at < vectors; at += THREADS) row[at] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) losses[blockIdx.x] = 0;
    return;
  }
  // Read by the thread that needs it, before the barrier after which it may be overwritten.
  float logit = 0;
  if (threadIdx.x == 0) logit = target_logit(row_of(logits, columns), target, classes);
  const int tiles = tiles_of<T, THREADS, VECTORS>(columns);
  uint4 held[VECTORS] = {};
  const Partition z = row_partition<T, THREADS, VECTORS>(row, tiles, classes, held);
  if (threadIdx.x == 0) losses[blockIdx.x] = row_loss(z, logit, z_loss);

  const RowGradient gradient = row_gradient(z, target, classes, scale[0], z_loss);
  for (int tile = tiles - 1; tile >= 0; --tile) {
    if (tile < tiles - 1) load_tile<T, THREADS, VECTORS>(row, tile, classes, held);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      const int at = vector_of<THREADS, VECTORS>(tile, i);
      if (at < vectors) row[at] = gradient_of<T>(gradient, held[i], at * VALUES<T>);
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
