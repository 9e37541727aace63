// Attention of new tokens of one sequence to a cache of keys and values, for generation: bf16 and
// fp32, forward only.
//
// Contract: src/cuda/attention/mod.rs launches; nothing is allocated. qkv [T,(H+2K)D] of the new
// tokens, token t at positions[t] = positions[0] + t; their k and v are written to these rows of
// keys and values [P,KD], and token t attends to all rows up to its own; out [T,HD]. Positions that
// do not ascend by 1 or lie outside of the cache end the kernel with a trap. Sums are fp32, in a
// fixed order; P is not rounded.
//
// A block has one head of one token. Four threads share a key, so that a block walks over 64 keys
// at once; each four have a softmax of their own until the end. The new rows are read from qkv, not
// from the cache: no block waits for another one's writes.
#include "isobath.cuh"

constexpr int WARP = 32, THREADS = 256, WARPS = THREADS / WARP;
constexpr int KEY_THREADS = 4, KEYS = THREADS / KEY_THREADS;  // at once
constexpr float MINUS_INFINITY = -__builtin_huge_valf();

// ---------------------------------------------------------------- rows
DEVICE void store(bf16* to, float value) { *to = to_bf16(value); }
DEVICE void store(float* to, float value) { *to = value; }

// A row of one head, spread over KEY_THREADS: vector i of thread t is vector t + i KEY_THREADS.
template <class T, int D>
struct Row {
  static constexpr int VECTORS = D / VALUES<T>;
  static constexpr int COUNT = (VECTORS + KEY_THREADS - 1) / KEY_THREADS;  // of a thread
  uint4 vectors[COUNT];
};
template <class T, int D>
DEVICE Row<T, D> load_row(const T* from) {
  Row<T, D> row;
#pragma unroll
  for (int i = 0; i < Row<T, D>::COUNT; ++i) {
    const int at = int(threadIdx.x) % KEY_THREADS + i * KEY_THREADS;
    row.vectors[i] = make_uint4(0, 0, 0, 0);
    if (at < Row<T, D>::VECTORS) row.vectors[i] = reinterpret_cast<const uint4*>(from)[at];
  }
  return row;
}

// ---------------------------------------------------------------- the kernel
template <class T, int D>
DEVICE void attention_decode(const T* qkv,          // [T,(H+2K)D]
                             T* keys,               // [P,KD]
                             T* values,             // [P,KD]
                             const int* positions,  // [T]
                             T* out,                // [T,HD]
                             int cache_rows, int heads, int kv_heads, float scale) {
  begin_after_previous();
  using HeadRow = Row<T, D>;
  const int token = int(blockIdx.x) / heads, head = int(blockIdx.x) % heads;
  const int group = heads / kv_heads, kv_head = head / group;
  const int begin = positions[0], own = positions[token];  // the first new row, and the last seen
  if (begin < 0 || own != begin + token || own >= cache_rows) __trap();
  const size_t stride = size_t(heads + 2 * kv_heads) * D, cache_stride = size_t(kv_heads) * D;
  const T* const new_keys = qkv + size_t(heads + kv_head) * D;
  const T* const new_values = new_keys + cache_stride;
  T* const old_keys = keys + kv_head * D;
  T* const old_values = values + kv_head * D;

  if (head % group == 0) {
    const int i = int(threadIdx.x) % HeadRow::VECTORS;
    const auto copy = [&](T* to, const T* from) {
      reinterpret_cast<uint4*>(to + own * cache_stride)[i] =
          reinterpret_cast<const uint4*>(from + token * stride)[i];
    };
    if (int(threadIdx.x) < HeadRow::VECTORS)
      copy(old_keys, new_keys);
    else if (int(threadIdx.x) < 2 * HeadRow::VECTORS)
      copy(old_values, new_values);
  }

  float query[HeadRow::COUNT][VALUES<T>], sums[HeadRow::COUNT][VALUES<T>];
  {
    const HeadRow row = load_row<T, D>(qkv + token * stride + head * D);
#pragma unroll
    for (int i = 0; i < HeadRow::COUNT; ++i) {
      unpack(row.vectors[i], query[i]);
#pragma unroll
      for (int j = 0; j < VALUES<T>; ++j) sums[i][j] = 0;
    }
  }
  float highest = MINUS_INFINITY, total = 0;
  // The four threads of a key reach their shuffles together, others may have left the loop.
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
  const uint32_t four = 0xfu << (lane & ~(KEY_THREADS - 1));
  for (int key = int(threadIdx.x) / KEY_THREADS; key <= own; key += KEYS) {
    const bool is_new = key >= begin;
    const size_t new_at = size_t(key - begin) * stride, old_at = size_t(key) * cache_stride;
    const HeadRow k = load_row<T, D>(is_new ? new_keys + new_at : old_keys + old_at);
    const HeadRow v = load_row<T, D>(is_new ? new_values + new_at : old_values + old_at);
    float score = 0;
#pragma unroll
    for (int i = 0; i < HeadRow::COUNT; ++i) {
      float of_k[VALUES<T>];
      unpack(k.vectors[i], of_k);
#pragma unroll
      for (int j = 0; j < VALUES<T>; ++j) score += query[i][j] * of_k[j];
    }
    score += __shfl_xor_sync(four, score, 1);
    score += __shfl_xor_sync(four, score, 2);
    score *= scale;
    const float most = fmaxf(highest, score);
    const float rescale = expf(highest - most), probable = expf(score - most);
    highest = most;
    total = total * rescale + probable;
#pragma unroll
    for (int i = 0; i < HeadRow::COUNT; ++i) {
      float of_v[VALUES<T>];
      unpack(v.vectors[i], of_v);
#pragma unroll
      for (int j = 0; j < VALUES<T>; ++j) sums[i][j] = sums[i][j] * rescale + probable * of_v[j];
    }
  }

  // One softmax for the warp, then one for the block. Who saw no key has 0 of everything; key 0 is
  // seen by every token's warp 0, so that the block's maximum is finite.
  __syncwarp();
  float most = highest;
#pragma unroll
  for (int step = KEY_THREADS; step < WARP; step <<= 1)
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  const float rescale = highest == MINUS_INFINITY ? 0.0f : expf(highest - most);
  const auto over_keys = [&](float value) {
    value *= rescale;
#pragma unroll
    for (int step = KEY_THREADS; step < WARP; step <<= 1)
      value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
  };
  SHARED(float, warp_sums, WARPS* D);
  SHARED(float, warp_most, WARPS);
  SHARED(float, warp_totals, WARPS);
  total = over_keys(total);
#pragma unroll
  for (int i = 0; i < HeadRow::COUNT; ++i) {
    const int at = lane % KEY_THREADS + i * KEY_THREADS;
#pragma unroll
    for (int j = 0; j < VALUES<T>; ++j) {
      const float sum = over_keys(sums[i][j]);
      if (lane < KEY_THREADS && at < HeadRow::VECTORS)
        warp_sums[warp * D + at * VALUES<T> + j] = sum;
    }
  }
  if (lane == 0) warp_most[warp] = most, warp_totals[warp] = total;
  __syncthreads();
  const int d = int(threadIdx.x);
  if (d < D) {
    float block_most = warp_most[0];
#pragma unroll
    for (int other = 1; other < WARPS; ++other) block_most = fmaxf(block_most, warp_most[other]);
    float sum = 0, block_total = 0;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) {
      const float factor = expf(warp_most[other] - block_most);
      sum += factor * warp_sums[other * D + d];
      block_total += factor * warp_totals[other];
    }
    store(out + size_t(token) * heads * D + head * D + d, __fdiv_rn(sum, block_total));
  }
}

// ---------------------------------------------------------------- kernels
#define DECODE_KERNEL(type, d)                                                                 \
  KERNEL(attention_decode_##type##_##d, THREADS)                                               \
  (const type* qkv, type* keys, type* values, const int* positions, type* out, int cache_rows, \
   int heads, int kv_heads, float scale) {                                                     \
    attention_decode<type, d>(qkv, keys, values, positions, out, cache_rows, heads, kv_heads,  \
                              scale);                                                          \
  }                                                                                            \
  EXPORT_KERNEL(attention_decode_##type##_##d)
#define DECODE_KERNELS_OF(type) \
  DECODE_KERNEL(type, 32)       \
  DECODE_KERNEL(type, 48)       \
  DECODE_KERNEL(type, 64)       \
  DECODE_KERNEL(type, 96)       \
  DECODE_KERNEL(type, 128)
DECODE_KERNELS_OF(bf16)
DECODE_KERNELS_OF(f32)
