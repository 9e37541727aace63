// Cross-entropy over rows of logits that no block alone can hold, on GPUs that have clusters.
//
// Contract: that of loss.cu, whose kernels these replace for wide rows; the formula stands in
// cross_entropy.cuh. A row has at most VECTORS vectors of 16 bytes for each thread of a cluster.
//
// The blocks of a cluster, 8 at most, share a row. Its vectors go around their threads, so that
// each block has as many as another, and holds them in registers: a row is read once and, where
// there is a gradient, written once. Each warp sends the part of Z that it knows to every block;
// after the cluster's barrier all of them add up the same parts in the same order. Several
// clusters have a place on the same multiprocessors, so that one loads while another waits.
#include "isobath.cuh"

#include "cross_entropy.cuh"

constexpr int WARP = 32;
constexpr int MOST_BLOCKS = 8;  // of a cluster

// ---------------------------------------------------------------- the cluster's part of the grid
DEVICE int row_index() { return int(blockIdx.x / cluster_size()); }
template <int THREADS>
DEVICE int cluster_threads() {
  return int(cluster_size()) * THREADS;
}
template <int THREADS>
DEVICE int cluster_thread() {
  return int(cluster_rank()) * THREADS + int(threadIdx.x);
}

// Whether the thread answers for the row's loss: it holds the target, and so nobody else writes
// over the logit that it reads. Of a target that is no class, the first thread of all.
template <class T, int THREADS>
DEVICE bool holds_target(int target, int classes) {
  const bool is_class = uint32_t(target) < uint32_t(classes);
  const int vector = is_class ? target / VALUES<T> : 0;
  return vector % cluster_threads<THREADS>() == cluster_thread<THREADS>();
}

// Called once; every thread of the cluster gets the same bits. Every block must have arrived at
// the cluster's barrier before: only then it is known to run, and its shared memory to be there.
template <int THREADS>
DEVICE Partition cluster_partition(Partition own) {
  constexpr int WARPS = THREADS / WARP;
  SHARED(float2, partitions, MOST_BLOCKS * WARPS);
  const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
  const int blocks = int(cluster_size());
  const Partition of_warp = warp_partition(own);
  cluster_wait();
  if (lane < blocks)
    cluster_map(partitions, uint32_t(lane))[int(cluster_rank()) * WARPS + warp] =
        make_float2(of_warp.max, of_warp.sum);
  // From here on a block reads its own memory alone: it may end before its peers do.
  cluster_sync();
  Partition of_lane;
  for (int at = lane; at < blocks * WARPS; at += WARP)
    of_lane = joined(of_lane, Partition{partitions[at].x, partitions[at].y});
  return warp_partition(of_lane);
}

// Z of a row, the thread's vectors of which are in `held` afterwards.
template <class T, int THREADS, int VECTORS>
DEVICE Partition row_partition(const uint4* row, int classes, uint4 (&held)[VECTORS]) {
  cluster_arrive_relaxed();
  const int first = cluster_thread<THREADS>(), step = cluster_threads<THREADS>();
  load_vectors<T>(row, classes, [&](int i) { return first + i * step; }, held);
  Partition own;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) own = joined<T>(own, held[i]);
  return cluster_partition<THREADS>(own);
}

// ---------------------------------------------------------------- forward
template <class T, int THREADS, int VECTORS>
DEVICE void loss_forward(const T* logits,     // [T,V]
                         const int* targets,  // [T]
                         float* losses,       // [T]
                         int classes, int columns, float z_loss) {
  begin_after_previous();
  const int index = row_index(), target = targets[index];
  if (target == IGNORE_INDEX) {
    if (cluster_thread<THREADS>() == 0) losses[index] = 0;
    return;
  }
  const T* const row = logits + size_t(index) * columns;
  uint4 held[VECTORS];
  const Partition z =
      row_partition<T, THREADS, VECTORS>(reinterpret_cast<const uint4*>(row), classes, held);
  if (holds_target<T, THREADS>(target, classes))
    losses[index] = row_loss(z, target_logit(row, target, classes), z_loss);
}

// ---------------------------------------------------------------- forward and backward
template <class T, int THREADS, int VECTORS>
DEVICE void loss_backward(T* logits,           // [T,V], replaced by d_logits
                          const int* targets,  // [T]
                          const float* scale,  // [1]
                          float* losses,       // [T]
                          int classes, int columns, float z_loss) {
  begin_after_previous();
  const int index = row_index(), target = targets[index];
  const int first = cluster_thread<THREADS>(), step = cluster_threads<THREADS>();
  T* const row = logits + size_t(index) * columns;
  uint4* const row_vectors = reinterpret_cast<uint4*>(row);
  const int vectors = columns / VALUES<T>;
  if (target == IGNORE_INDEX) {
    for (int at = first; at < vectors; at += step) row_vectors[at] = make_uint4(0, 0, 0, 0);
    if (first == 0) losses[index] = 0;
    return;
  }
  uint4 held[VECTORS];
  const Partition z = row_partition<T, THREADS, VECTORS>(row_vectors, classes, held);
  if (holds_target<T, THREADS>(target, classes))
    losses[index] = row_loss(z, target_logit(row, target, classes), z_loss);

  const RowGradient gradient = row_gradient(z, target, classes, scale[0], z_loss);
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int at = first + i * step;
    if (at < vectors) row_vectors[at] = gradient_of<T>(gradient, held[i], at * VALUES<T>);
  }
}

// ---------------------------------------------------------------- kernels
// Threads of a block x vectors of a thread, and the blocks that a multiprocessor shall hold.
#define LOSS_KERNELS(type, threads, vectors, blocks)                                               \
  KERNEL(loss_forward_sm90_##type##_##threads##x##vectors, threads, blocks)                        \
  (const type* logits, const int* targets, float* losses, int classes, int columns,                \
   float z_loss) {                                                                                 \
    loss_forward<type, threads, vectors>(logits, targets, losses, classes, columns, z_loss);       \
  }                                                                                                \
  EXPORT_KERNEL(loss_forward_sm90_##type##_##threads##x##vectors)                                  \
  KERNEL(loss_backward_sm90_##type##_##threads##x##vectors, threads, blocks)                       \
  (type * logits, const int* targets, const float* scale, float* losses, int classes, int columns, \
   float z_loss) {                                                                                 \
    loss_backward<type, threads, vectors>(logits, targets, scale, losses, classes, columns,        \
                                          z_loss);                                                 \
  }                                                                                                \
  EXPORT_KERNEL(loss_backward_sm90_##type##_##threads##x##vectors)

// In clusters of 4 up to 131072 columns of bf16; of 8 up to 163840, where three blocks hold no more
// than two of the others, up to 262144, and with twice the threads up to 524288. Half as many of
// f32.
#define LOSS_KERNELS_OF(type)    \
  LOSS_KERNELS(type, 256, 10, 3) \
  LOSS_KERNELS(type, 256, 16, 2) \
  LOSS_KERNELS(type, 512, 16, 1)
LOSS_KERNELS_OF(bf16)
LOSS_KERNELS_OF(f32)
