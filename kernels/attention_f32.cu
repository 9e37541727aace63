// Causal attention with grouped KV heads in fp32, forward and backward: for runs that are compared
// with the CPU value by value. attention_sm80.cu is the fast one.
//
// Contract: as attention_sm80.cu, with every value fp32: qkv, d_qkv [T,(H+2K)D], out, d_out [T,HD],
// log_sum_exp and delta [B,H,S]; d_qkv is written entirely; addresses are multiples of 16 bytes; no
// atomics, every sum has a fixed order; `documents` kernels as there. The same algorithm in tiles
// of 32 x 32 scores; a thread has 4 rows and 2 columns of them, 16 threads share a row and its
// softmax. Nothing is loaded while something is computed: this kernel is for parity, not for speed.
#include "isobath.cuh"

constexpr int TILE = 32, ROW_THREADS = 16, THREADS = 128;
constexpr int ROWS = TILE / (THREADS / ROW_THREADS), COLUMNS = TILE / ROW_THREADS;  // of a thread
constexpr float MINUS_INFINITY = -__builtin_huge_valf();
constexpr float LOWEST = -3.402823466e38f;  // as in attention_sm80.cu

// ---------------------------------------------------------------- tiles in shared memory
// Rows are 16 bytes longer than what they hold: then vectors of 8 rows in a row, an odd number of
// vectors apart, lie in different banks.
template <int D>
constexpr int STRIDE = D + 4;
constexpr int WEIGHTS_STRIDE = TILE + 4;
template <int D>
constexpr int TILE_FLOATS = TILE * STRIDE<D>;

DEVICE float4 four_at(const float* from) { return *reinterpret_cast<const float4*>(from); }

// Rows `first` on of a sequence, `stride` values apart, asynchronously; zeros after its end.
template <int D>
DEVICE void load_tile(float* tile, const float* from, size_t stride, int first, int sequence) {
  constexpr int VECTORS = D / 4;
#pragma unroll
  for (int i = 0; i < TILE * VECTORS; i += THREADS) {
    const int at = i + int(threadIdx.x), row = at / VECTORS, vector = at % VECTORS;
    const bool exists = first + row < sequence;
    cp_async_16_zfill(tile + row * STRIDE<D> + vector * 4,
                      from + (exists ? first + row : 0) * stride + vector * 4, exists ? 16 : 0);
  }
}
// All copies of all threads; who loads next waits at a __syncthreads first.
DEVICE void finish_loads() {
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
}

// ---------------------------------------------------------------- products of a block
// A thread's rows are `row` to row + ROWS - 1, its columns `column`, column + ROW_THREADS, ...
struct Place {
  int row, column;
};
DEVICE Place place() {
  return {int(threadIdx.x) / ROW_THREADS * ROWS, int(threadIdx.x) % ROW_THREADS};
}

// scores = rows of tile `a` times rows of tile `b`; 16 products at a time are added up by
// themselves, which keeps more digits than one long sum.
template <int D>
DEVICE void multiply_rows(float (&scores)[ROWS][COLUMNS], const float* a, const float* b) {
  const auto [row, column] = place();
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) scores[i][j] = 0;
#pragma unroll 1
  for (int part = 0; part < D; part += 16) {
    float sums[ROWS][COLUMNS] = {};
#pragma unroll
    for (int d = part; d < part + 16; d += 4) {
      float4 of_a[ROWS], of_b[COLUMNS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) of_a[i] = four_at(a + (row + i) * STRIDE<D> + d);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
        of_b[j] = four_at(b + (column + j * ROW_THREADS) * STRIDE<D> + d);
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          sums[i][j] += of_a[i].x * of_b[j].x;
          sums[i][j] += of_a[i].y * of_b[j].y;
          sums[i][j] += of_a[i].z * of_b[j].z;
          sums[i][j] += of_a[i].w * of_b[j].w;
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) scores[i][j] += sums[i][j];
  }
}

// sums [TILE,D] += weights [TILE,TILE] times tile `b`. The weights go through `exchange`, between
// threads of a row, which are in one warp.
template <int D>
DEVICE void add_weighted_rows(float (&sums)[ROWS][D / ROW_THREADS],
                              const float (&weights)[ROWS][COLUMNS], const float* b,
                              float* exchange) {
  const auto [row, column] = place();
  __syncwarp();  // the reads of the product before
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
      exchange[(row + i) * WEIGHTS_STRIDE + column + j * ROW_THREADS] = weights[i][j];
  __syncwarp();
#pragma unroll 2
  for (int k = 0; k < TILE; k += 4) {
    float of_a[ROWS][4];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const float4 four = four_at(exchange + (row + i) * WEIGHTS_STRIDE + k);
      of_a[i][0] = four.x, of_a[i][1] = four.y, of_a[i][2] = four.z, of_a[i][3] = four.w;
    }
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int j = 0; j < D / ROW_THREADS; ++j) {
        const float of_b = b[(k + step) * STRIDE<D> + column + j * ROW_THREADS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) sums[i][j] += of_a[i][step] * of_b;
      }
  }
}

template <int D>
DEVICE void clear(float (&sums)[ROWS][D / ROW_THREADS]) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < D / ROW_THREADS; ++j) sums[i][j] = 0;
}

// The rows of a tile that lie in the sequence; each value times the factor of its row.
template <int D>
DEVICE void store_rows(float* to, size_t stride, int first, int sequence,
                       const float (&sums)[ROWS][D / ROW_THREADS], const float (&factors)[ROWS]) {
  const auto [row, column] = place();
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
    if (first + row + i < sequence)
#pragma unroll
      for (int j = 0; j < D / ROW_THREADS; ++j)
        to[(first + row + i) * stride + column + j * ROW_THREADS] = sums[i][j] * factors[i];
}

// Over the threads of a row, in a fixed order.
DEVICE float row_sum(float value) {
#pragma unroll
  for (int step = ROW_THREADS / 2; step; step >>= 1)
    value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}
DEVICE float row_max(float value) {
#pragma unroll
  for (int step = ROW_THREADS / 2; step; step >>= 1)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}

// ---------------------------------------------------------------- layout
// The first values of one query head and its KV head of one sequence.
struct Head {
  const float *q, *k, *v;
  size_t stride;      // of qkv and d_qkv
  size_t out_stride;  // of out and d_out
  size_t out;         // in out and d_out
  size_t statistics;  // in log_sum_exp and delta
};
template <int D>
DEVICE Head head_of(const float* qkv, int b, int head, int sequence, int heads, int kv_heads) {
  const size_t stride = size_t(heads + 2 * kv_heads) * D, out_stride = size_t(heads) * D;
  const size_t token = size_t(b) * sequence;
  const float* const rows = qkv + token * stride;
  const int kv_head = head / (heads / kv_heads);
  return {rows + head * D,
          rows + (heads + kv_head) * D,
          rows + (heads + kv_heads + kv_head) * D,
          stride,
          out_stride,
          token * out_stride + head * D,
          (size_t(b) * heads + head) * sequence};
}

// The first key that a row of one sequence sees: where its document begins. Starts [S] do not
// descend. Rows after the end of the sequence see what the last row sees.
template <bool DOCUMENTS>
DEVICE int document_start(const int* starts, int row, int sequence) {
  return DOCUMENTS ? starts[min(row, sequence - 1)] : 0;
}

// ---------------------------------------------------------------- forward
template <int D, bool DOCUMENTS>
DEVICE void attention_forward(const float* qkv,            // [T,(H+2K)D]
                              const int* document_starts,  // [B,S], if DOCUMENTS
                              float* out,                  // [T,HD]
                              float* log_sum_exp,          // [B,H,S]
                              int sequence, int heads, int kv_heads, float scale) {
  begin_after_previous();
  SHARED_DYNAMIC(shared);
  float* const queries = reinterpret_cast<float*>(shared);
  float* const keys = queries + TILE_FLOATS<D>;
  float* const values = keys + TILE_FLOATS<D>;
  float* const exchange = values + TILE_FLOATS<D>;
  const auto [row, column] = place();
  const int first = (int(gridDim.y) - 1 - int(blockIdx.y)) * TILE;
  const int b = int(blockIdx.x) / heads, head = int(blockIdx.x) % heads;
  const Head at = head_of<D>(qkv, b, head, sequence, heads, kv_heads);
  load_tile<D>(queries, at.q, at.stride, first, sequence);

  float sums[ROWS][D / ROW_THREADS];
  clear<D>(sums);
  float highest[ROWS], totals[ROWS];
  const int* const starts = document_starts + size_t(b) * sequence;
  int start[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    highest[i] = LOWEST, totals[i] = 0;
    start[i] = document_start<DOCUMENTS>(starts, first + row + i, sequence);
  }
  const int first_tile = document_start<DOCUMENTS>(starts, first, sequence) / TILE;
  for (int first_key = first_tile * TILE; first_key <= first; first_key += TILE) {
    __syncthreads();
    load_tile<D>(keys, at.k, at.stride, first_key, sequence);
    load_tile<D>(values, at.v, at.stride, first_key, sequence);
    finish_loads();
    float scores[ROWS][COLUMNS];
    multiply_rows<D>(scores, queries, keys);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      float most = MINUS_INFINITY;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        // Only on the diagonal can a later key be hidden, or lie after the end of the sequence.
        const int key = first_key + column + j * ROW_THREADS;
        const bool hidden = key > first + row + i || (DOCUMENTS && key < start[i]);
        scores[i][j] = hidden ? MINUS_INFINITY : scores[i][j] * scale;
        most = fmaxf(most, scores[i][j]);
      }
      most = fmaxf(highest[i], row_max(most));
      const float rescale = expf(highest[i] - most);
      highest[i] = most;
      float total = 0;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        scores[i][j] = expf(scores[i][j] - most);
        total += scores[i][j];
      }
      totals[i] = totals[i] * rescale + row_sum(total);
#pragma unroll
      for (int j = 0; j < D / ROW_THREADS; ++j) sums[i][j] *= rescale;
    }
    add_weighted_rows<D>(sums, scores, values, exchange);
  }
  float inverse[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    inverse[i] = __fdiv_rn(1.0f, totals[i]);
    if (column == 0 && first + row + i < sequence)
      log_sum_exp[at.statistics + first + row + i] = highest[i] + logf(totals[i]);
  }
  store_rows<D>(out + at.out, at.out_stride, first, sequence, sums, inverse);
}

// ---------------------------------------------------------------- backward
template <int D, bool DOCUMENTS>
DEVICE void attention_backward_q(const float* qkv,            // [T,(H+2K)D]
                                 const int* document_starts,  // [B,S], if DOCUMENTS
                                 const float* out,            // [T,HD]
                                 const float* log_sum_exp,    // [B,H,S]
                                 const float* d_out,          // [T,HD]
                                 float* delta,                // [B,H,S]
                                 float* d_qkv,                // [T,(H+2K)D], the q heads of it
                                 int sequence, int heads, int kv_heads, float scale) {
  begin_after_previous();
  SHARED_DYNAMIC(shared);
  float* const queries = reinterpret_cast<float*>(shared);
  float* const d_outs = queries + TILE_FLOATS<D>;
  float* const keys = d_outs + TILE_FLOATS<D>;
  float* const values = keys + TILE_FLOATS<D>;
  float* const exchange = values + TILE_FLOATS<D>;
  const auto [row, column] = place();
  const int first = (int(gridDim.y) - 1 - int(blockIdx.y)) * TILE;
  const int b = int(blockIdx.x) / heads, head = int(blockIdx.x) % heads;
  const Head at = head_of<D>(qkv, b, head, sequence, heads, kv_heads);
  load_tile<D>(queries, at.q, at.stride, first, sequence);
  load_tile<D>(d_outs, d_out + at.out, at.out_stride, first, sequence);
  load_tile<D>(keys, out + at.out, at.out_stride, first, sequence);  // until the first keys
  finish_loads();

  const int* const starts = document_starts + size_t(b) * sequence;
  int start[ROWS];
  float lse[ROWS], deltas[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const bool exists = first + row + i < sequence;
    start[i] = document_start<DOCUMENTS>(starts, first + row + i, sequence);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < D / ROW_THREADS; ++j) {
      const int value = (row + i) * STRIDE<D> + column + j * ROW_THREADS;
      sum += keys[value] * d_outs[value];
    }
    deltas[i] = row_sum(sum);
    // No probability after the end of the sequence.
    lse[i] = exists ? log_sum_exp[at.statistics + first + row + i] : -MINUS_INFINITY;
    if (column == 0 && exists) delta[at.statistics + first + row + i] = deltas[i];
  }

  float d_q[ROWS][D / ROW_THREADS];
  clear<D>(d_q);
  const int first_tile = document_start<DOCUMENTS>(starts, first, sequence) / TILE;
  for (int first_key = first_tile * TILE; first_key <= first; first_key += TILE) {
    __syncthreads();
    load_tile<D>(keys, at.k, at.stride, first_key, sequence);
    load_tile<D>(values, at.v, at.stride, first_key, sequence);
    finish_loads();
    float p[ROWS][COLUMNS], d_s[ROWS][COLUMNS];
    multiply_rows<D>(p, queries, keys);
    multiply_rows<D>(d_s, d_outs, values);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const int key = first_key + column + j * ROW_THREADS;
        const bool hidden = key > first + row + i || (DOCUMENTS && key < start[i]);
        const float probable = hidden ? 0.0f : expf(p[i][j] * scale - lse[i]);
        d_s[i][j] = probable * (d_s[i][j] - deltas[i]);
      }
    add_weighted_rows<D>(d_q, d_s, keys, exchange);
  }
  float scales[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) scales[i] = scale;
  store_rows<D>(d_qkv + (at.q - qkv), at.stride, first, sequence, d_q, scales);
}

// Rows are keys here, columns queries.
template <int D, bool DOCUMENTS>
DEVICE void attention_backward_kv(const float* qkv,            // [T,(H+2K)D]
                                  const int* document_starts,  // [B,S], if DOCUMENTS
                                  const float* log_sum_exp,    // [B,H,S]
                                  const float* d_out,          // [T,HD]
                                  const float* delta,          // [B,H,S]
                                  float* d_qkv,                // [T,(H+2K)D], its k and v heads
                                  int sequence, int heads, int kv_heads, float scale) {
  begin_after_previous();
  SHARED_DYNAMIC(shared);
  float* const keys = reinterpret_cast<float*>(shared);
  float* const values = keys + TILE_FLOATS<D>;
  float* const queries = values + TILE_FLOATS<D>;
  float* const d_outs = queries + TILE_FLOATS<D>;
  float* const exchange = d_outs + TILE_FLOATS<D>;
  const auto [row, column] = place();
  const int first_key = int(blockIdx.y) * TILE;
  const int b = int(blockIdx.x) / kv_heads, kv_head = int(blockIdx.x) % kv_heads;
  const int group = heads / kv_heads;
  const Head at = head_of<D>(qkv, b, kv_head * group, sequence, heads, kv_heads);
  load_tile<D>(keys, at.k, at.stride, first_key, sequence);
  load_tile<D>(values, at.v, at.stride, first_key, sequence);

  float d_k[ROWS][D / ROW_THREADS], d_v[ROWS][D / ROW_THREADS];
  clear<D>(d_k);
  clear<D>(d_v);
  const int* const starts = document_starts + size_t(b) * sequence;
  for (int member = 0; member < group; ++member) {
    const size_t statistics = at.statistics + size_t(member) * sequence;
    for (int first = first_key; first < sequence; first += TILE) {
      // From here on no query sees one of these keys.
      if (document_start<DOCUMENTS>(starts, first, sequence) >= first_key + TILE) break;
      __syncthreads();
      load_tile<D>(queries, at.q + member * D, at.stride, first, sequence);
      load_tile<D>(d_outs, d_out + at.out + member * D, at.out_stride, first, sequence);
      finish_loads();
      float p[ROWS][COLUMNS], d_s[ROWS][COLUMNS];
      multiply_rows<D>(p, keys, queries);
      multiply_rows<D>(d_s, values, d_outs);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const int query = first + column + j * ROW_THREADS;
        const bool exists = query < sequence;
        const float lse = exists ? log_sum_exp[statistics + query] : -MINUS_INFINITY;
        const float query_delta = exists ? delta[statistics + query] : 0.0f;
        const int start = document_start<DOCUMENTS>(starts, query, sequence);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          const int key = first_key + row + i;
          const bool hidden = key > query || (DOCUMENTS && key < start);
          p[i][j] = hidden ? 0.0f : expf(p[i][j] * scale - lse);
          d_s[i][j] = p[i][j] * (d_s[i][j] - query_delta);
        }
      }
      add_weighted_rows<D>(d_v, p, d_outs, exchange);
      add_weighted_rows<D>(d_k, d_s, queries, exchange);
    }
  }
  float scales[ROWS], ones[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) scales[i] = scale, ones[i] = 1;
  store_rows<D>(d_qkv + (at.k - qkv), at.stride, first_key, sequence, d_k, scales);
  store_rows<D>(d_qkv + (at.v - qkv), at.stride, first_key, sequence, d_v, ones);
}

// ---------------------------------------------------------------- kernels
#define ATTENTION_KERNELS_OF(name, documents, d, blocks)                                          \
  KERNEL(attention_forward_##name##f32_##d, THREADS, blocks)                                      \
  (const float* qkv, const int* document_starts, float* out, float* log_sum_exp, int sequence,    \
   int heads, int kv_heads, float scale, float) {                                                 \
    attention_forward<d, documents>(qkv, document_starts, out, log_sum_exp, sequence, heads,      \
                                    kv_heads, scale);                                             \
  }                                                                                               \
  EXPORT_KERNEL(attention_forward_##name##f32_##d)                                                \
  KERNEL(attention_backward_q_##name##f32_##d, THREADS, blocks)                                   \
  (const float* qkv, const int* document_starts, const float* out, const float* log_sum_exp,      \
   const float* d_out, float* delta, float* d_qkv, int sequence, int heads, int kv_heads,         \
   float scale, float) {                                                                          \
    attention_backward_q<d, documents>(qkv, document_starts, out, log_sum_exp, d_out, delta,      \
                                       d_qkv, sequence, heads, kv_heads, scale);                  \
  }                                                                                               \
  EXPORT_KERNEL(attention_backward_q_##name##f32_##d)                                             \
  KERNEL(attention_backward_kv_##name##f32_##d, THREADS, blocks)                                  \
  (const float* qkv, const int* document_starts, const float* log_sum_exp, const float* d_out,    \
   const float* delta, float* d_qkv, int sequence, int heads, int kv_heads, float scale, float) { \
    attention_backward_kv<d, documents>(qkv, document_starts, log_sum_exp, d_out, delta, d_qkv,   \
                                        sequence, heads, kv_heads, scale);                        \
  }                                                                                               \
  EXPORT_KERNEL(attention_backward_kv_##name##f32_##d)

// Head dim, and blocks that a multiprocessor shall hold: what shared memory has room for on sm_80.
// Plain kernels are given a null for document_starts, so that all are launched alike.
#define ATTENTION_KERNELS(...)               \
  ATTENTION_KERNELS_OF(, false, __VA_ARGS__) \
  ATTENTION_KERNELS_OF(documents_, true, __VA_ARGS__)
ATTENTION_KERNELS(32, 4)
ATTENTION_KERNELS(48, 3)
ATTENTION_KERNELS(64, 3)
ATTENTION_KERNELS(96, 2)
ATTENTION_KERNELS(128, 2)
