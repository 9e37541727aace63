// Embedding lookup, and the gradient of its table.
//
// Contract: src/cuda/embedding.rs launches; nothing is allocated, no scratch. The table and out are
// activations (bf16 or f32), d_table is fp32 and added to; all rows are 16-byte aligned. A token
// outside the table ends the forward pass with a trap; the backward pass leaves it out.
//
// Backward: no two blocks add to one element, and no sum depends on a schedule. A block has a set
// of ids and 32 vectors of columns. It reads all T tokens (from L2, but for the first block), lists
// those of its ids, sorts a full list by id and token, and adds up each id's rows in registers
// before it touches the table; its warps take equal parts of the list, so a frequent id is shared
// by all. Costs: d_out and the table's rows with a token once from memory; 4 T bytes per block from
// L2; one sort of 66 steps for every 2048 tokens of a block. An id with more than its share of the
// tokens is added up by one block per 32 vectors, eight rows at a time for each of its eight warps.
#include "isobath.cuh"

constexpr int WARP = 32;
constexpr int THREADS = 256, WARPS = THREADS / WARP;

// ---------------------------------------------------------------- forward
// Vectors of a lane in one task of a warp, all under way at once.
constexpr int COPIED = 4;

// out[t] = table[tokens[t]], the bytes as they are.
KERNEL(embedding_forward, THREADS, 6)
(const int* tokens,   // [T]
 const uint4* table,  // [V,vectors]
 uint4* out,          // [T,vectors]
 int rows, int vocab, int vectors) {
  begin_after_previous();
  const int tasks_of_row = (vectors + COPIED * WARP - 1) / (COPIED * WARP);
  const int step = int(gridDim.x) * WARPS;
  for (int task = int(blockIdx.x) * WARPS + int(threadIdx.x) / WARP; task < rows * tasks_of_row;
       task += step) {
    const int row = task / tasks_of_row;
    const int first = (task - row * tasks_of_row) * COPIED * WARP + int(threadIdx.x) % WARP;
    const int token = tokens[row];
    if (uint32_t(token) >= uint32_t(vocab)) __trap();
    const uint4* const from = table + size_t(token) * vectors;
    uint4 held[COPIED];
#pragma unroll
    for (int i = 0; i < COPIED; ++i)
      if (first + i * WARP < vectors) held[i] = from[first + i * WARP];
#pragma unroll
    for (int i = 0; i < COPIED; ++i)
      if (first + i * WARP < vectors) out[size_t(row) * vectors + first + i * WARP] = held[i];
  }
}
EXPORT_KERNEL(embedding_forward)

// ---------------------------------------------------------------- backward
// A token of the block's ids: id in the upper half, place of the token in the lower one.
using Match = uint64_t;
DEVICE int id_of(Match match) { return int(match >> 32); }
DEVICE int token_of(Match match) { return int(uint32_t(match)); }

constexpr int STEP = 4 * THREADS;  // tokens
// Processed when the next step might not fit: never short, but for the last one of a block.
constexpr int CAPACITY = 2 * STEP;
// Rows of d_out that a warp has under way.
constexpr int BATCH = 8;

// Sorts matches[0, count) in ascending order (Batcher's bitonic sort). Its first barrier is after
// what the other threads have listed; it ends with another one.
DEVICE void sort(Match* matches, int count) {
  int padded = 1;
  while (padded < count) padded *= 2;
  for (int i = count + int(threadIdx.x); i < padded; i += THREADS) matches[i] = ~Match(0);
  __syncthreads();
  for (int size = 2; size <= padded; size *= 2) {
    for (int distance = size / 2; distance; distance /= 2) {
      for (int pair = int(threadIdx.x); pair < padded / 2; pair += THREADS) {
        const int low = 2 * pair - (pair & (distance - 1)), high = low + distance;
        const Match a = matches[low], b = matches[high];
        const bool ascending = (low & size) == 0;
        if ((a > b) == ascending) {
          matches[low] = b;
          matches[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// d_table[id] += sum, in this lane's columns
template <class T>
DEVICE void add_to_row(float* d_table, int id, int columns, int vector,
                       const float (&sum)[VALUES<T>]) {
  float4* const row =
      reinterpret_cast<float4*>(d_table + size_t(id) * columns) + size_t(vector) * (VALUES<T> / 4);
#pragma unroll
  for (int part = 0; part < VALUES<T> / 4; ++part) {
    float4 four = row[part];
    four.x += sum[4 * part], four.y += sum[4 * part + 1];
    four.z += sum[4 * part + 2], four.w += sum[4 * part + 3];
    row[part] = four;
  }
}

// d_table[id] += the rows of d_out of the matches of this id; `matches` is sorted. Each warp has an
// equal part of the list. An id that reaches over the ends of parts belongs to the warp where it
// begins; the others leave their sums for it in `heads`, and it adds them in the order of the
// warps. Begins and ends with a barrier that protects `matches` and `heads`.
template <class T>
DEVICE void add_rows(const Match* matches, int count, float* heads, const T* d_out, float* d_table,
                     int columns, int vector) {
  const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
  const int begin = warp * count / WARPS, end = (warp + 1) * count / WARPS;
  const bool in_row = vector < columns / VALUES<T>;
  float sum[VALUES<T>];
#pragma unroll
  for (int j = 0; j < VALUES<T>; ++j) sum[j] = 0;
  int id = begin < end ? id_of(matches[begin]) : -1;
  bool began_before = begin < end && begin > 0 && id_of(matches[begin - 1]) == id;

  const auto leave = [&] {
#pragma unroll
    for (int j = 0; j < VALUES<T>; ++j) heads[(warp * VALUES<T> + j) * WARP + lane] = sum[j];
  };
  for (int first = begin; first < end; first += BATCH) {
    uint4 held[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      held[i] = make_uint4(0, 0, 0, 0);
      if (first + i < end && in_row) {
        const T* const row = d_out + size_t(token_of(matches[first + i])) * columns;
        held[i] = reinterpret_cast<const uint4*>(row)[vector];
      }
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (first + i < end) {
        const int next = id_of(matches[first + i]);
        if (next != id) {
          if (began_before)
            leave();
          else if (in_row)
            add_to_row<T>(d_table, id, columns, vector, sum);
          began_before = false;
          id = next;
#pragma unroll
          for (int j = 0; j < VALUES<T>; ++j) sum[j] = 0;
        }
        float values[VALUES<T>];
        unpack(held[i], values);
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j) sum[j] += values[j];
      }
    }
  }
  if (began_before) leave();
  __syncthreads();
  if (begin < end && !began_before) {
    for (int other = warp + 1; other < WARPS; ++other) {
      const int from = other * count / WARPS, to = (other + 1) * count / WARPS;
      if (from < to && id_of(matches[from]) == id) {
#pragma unroll
        for (int j = 0; j < VALUES<T>; ++j) sum[j] += heads[(other * VALUES<T> + j) * WARP + lane];
      }
    }
    if (in_row) add_to_row<T>(d_table, id, columns, vector, sum);
  }
  __syncthreads();
}

// Four tokens from `first` on; -1 after the last one.
DEVICE int4 four_tokens(const int* tokens, int first, int rows) {
  if (first + 4 <= rows) return *reinterpret_cast<const int4*>(tokens + first);
  int4 four = make_int4(-1, -1, -1, -1);
  if (first < rows) four.x = tokens[first];
  if (first + 1 < rows) four.y = tokens[first + 1];
  if (first + 2 < rows) four.z = tokens[first + 2];
  return four;
}

// Block (x, y): ids whose last bits are x (gridDim.x is a power of two), and vectors 32 y and on.
// Neighbouring ids are of different blocks: frequent tokens often stand together in a vocabulary.
template <class T>
DEVICE void embedding_backward(const int* tokens,  // [T]
                               const T* d_out,     // [T,C]
                               float* d_table,     // [V,C], +=
                               int rows, int vocab, int columns) {
  begin_after_previous();
  SHARED(Match, matches, CAPACITY);
  SHARED(float, heads, WARPS* WARP* VALUES<T>);
  SHARED(int, totals, 2 * WARPS);  // two halves that take turns: one barrier a step is enough
  const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
  const int vector = int(blockIdx.y) * WARP + lane;
  int listed = 0, turn = 0;
  int4 coming = four_tokens(tokens, 4 * int(threadIdx.x), rows);
  for (int step = 0; step < rows; step += STEP, turn ^= 1) {
    const int first = step + 4 * int(threadIdx.x);
    const int ids[4] = {coming.x, coming.y, coming.z, coming.w};
    coming = four_tokens(tokens, first + STEP, rows);
    // Where this thread's matches go: their order does not matter, they are sorted.
    int mine[4], found = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool own =
          uint32_t(ids[i]) < uint32_t(vocab) && (uint32_t(ids[i]) & (gridDim.x - 1)) == blockIdx.x;
      const uint32_t lanes = __ballot_sync(0xffffffffu, own);
      mine[i] = own ? found + __popc(lanes & ((1u << lane) - 1)) : -1;
      found += __popc(lanes);
    }
    int* const half = totals + turn * WARPS;
    if (lane == 0) half[warp] = found;
    __syncthreads();
    int before = 0, all = 0;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) {
      if (other < warp) before += half[other];
      all += half[other];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (mine[i] >= 0)
        matches[listed + before + mine[i]] = Match(ids[i]) << 32 | uint32_t(first + i);
    listed += all;
    if (listed > CAPACITY - STEP || step + STEP >= rows) {
      sort(matches, listed);
      add_rows<T>(matches, listed, heads, d_out, d_table, columns, vector);
      listed = 0;
    }
  }
}

// ---------------------------------------------------------------- kernels
#define EMBEDDING_KERNELS(type)                                                              \
  KERNEL(embedding_backward_##type, THREADS, 3)                                              \
  (const int* tokens, const type* d_out, float* d_table, int rows, int vocab, int columns) { \
    embedding_backward<type>(tokens, d_out, d_table, rows, vocab, columns);                  \
  }                                                                                          \
  EXPORT_KERNEL(embedding_backward_##type)
EMBEDDING_KERNELS(bf16)
EMBEDDING_KERNELS(f32)
