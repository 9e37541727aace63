// Causal attention with grouped KV heads in bf16, forward and backward, on mma.sync: any GPU from
// sm_80, and the oracle of what comes later.
//
// Contract: src/cuda/attention/tiled.rs launches; nothing is allocated. q, k and v are read where
// the fused projection put them, qkv [T,(H+2K)D] with T = B S; out, d_out [T,HD]; log_sum_exp
// (natural) and delta [B,H,S] fp32; d_qkv, like qkv, is written entirely. Addresses are multiples
// of 16 bytes. Softmax, sums and statistics are fp32; P and dS are rounded to bf16 where they are
// multiplied. No atomics, every sum has a fixed order. The kernels named `documents` read
// document_starts [B,S] besides: query i of a row sees keys document_starts[i] to i, and tiles
// that this hides are not computed either.
//
// FlashAttention-2 (Dao 2023, algorithms 1 and 2). A warp owns rows of the result, and the scores
// of these rows never leave its registers: what mma.sync gives as D fits as A of the next product.
// Backward is two kernels, one for each side that is summed over: d_q by blocks of queries, then
// d_k and d_v by blocks of keys, which compute the transposed scores. Tiles that the causal mask
// hides are not computed, tiles that it does not touch not masked; the longest blocks come first.
#include "isobath.cuh"

constexpr int WARP = 32, THREADS = 128, WARPS = THREADS / WARP;
constexpr float MINUS_INFINITY = -__builtin_huge_valf();
// Below every score, yet what a mask hides lies infinitely far below it: a row that sees nothing of
// its first tiles adds up exp(-infinity), not exp(0).
constexpr float LOWEST = -3.402823466e38f;
constexpr float LOG2_E = 1.44269504088896340736f, LN_2 = 0.69314718055994530942f;

// ---------------------------------------------------------------- tiles in shared memory
// A tile is rows of D values; a chunk is 8 of them, 16 bytes. ldmatrix reads one chunk of 8 rows in
// a row, which lie in different banks where their places differ modulo 8. So chunk c of a row lies
// at c ^ permutation(row), which moves it within its group of GROUP chunks, the greatest common
// divisor of 8 and a row's chunks: 48 wide rows (6 chunks) need pairs exchanged every 4 rows, 32
// and 96 wide ones groups of 4 every 2 rows, 64 and 128 wide ones groups of 8 in every row.
template <int D>
constexpr int CHUNKS = D / 8;
template <int D>
constexpr int GROUP = CHUNKS<D> % 8 == 0   ? 8
                      : CHUNKS<D> % 4 == 0 ? 4
                                           : 2;
template <int D, int ROWS>
constexpr int TILE_BYTES = ROWS * D * int(sizeof(bf16));

// Where a chunk of a tile lies, in bytes. The permutation is the same 8 rows further on.
template <int D>
DEVICE constexpr int offset_of(int row, int chunk) {
  constexpr int STEP = 8 / GROUP<D>, MASK = GROUP<D> - 1;
  return (row * CHUNKS<D> + (chunk ^ (row / STEP & MASK))) * 16;
}
// Whether a chunk of 8 rows in a row, from a multiple of 8 on, covers all banks.
template <int D>
DEVICE constexpr bool covers_banks() {
  for (int chunk = 0; chunk < CHUNKS<D>; ++chunk) {
    int covered = 0;
    for (int row = 0; row < 8; ++row) covered |= 1 << offset_of<D>(row, chunk) / 16 % 8;
    if (covered != 0xff) return false;
  }
  return true;
}
// The chunk `rows` rows (a multiple of 8) and `chunks` chunks (even, to a chunk 0 or 1) after the
// one at `offset`: numbers that are known when it is compiled leave one XOR of it.
template <int D>
DEVICE int offset_behind(int offset, int rows, int chunks) {
  const int permuted = chunks % GROUP<D>;
  return (offset ^ permuted * 16) + (rows * CHUNKS<D> + chunks - permuted) * 16;
}

// Rows of one head in a matrix of tokens, `stride` values apart.
struct Rows {
  const bf16* first;
  size_t stride;
};

// Rows `first` to `first` + ROWS of a sequence, asynchronously; zeros after its end. A group of
// threads has a row, so that its next places are a constant away.
template <int D, int ROWS>
DEVICE void load_tile(uint8_t* tile, Rows from, int first, int sequence) {
  static_assert(covers_banks<D>());
  constexpr int ROW_THREADS = GROUP<D>, PASS_ROWS = THREADS / ROW_THREADS;
  const int row = int(threadIdx.x) / ROW_THREADS, chunk = int(threadIdx.x) % ROW_THREADS;
  if (PASS_ROWS > ROWS && row >= ROWS) return;
  uint8_t* const to = tile + offset_of<D>(row, chunk);
  const bf16* there = from.first + size_t(first + row) * from.stride + chunk * 8;
#pragma unroll
  for (int pass = 0; pass < ROWS; pass += PASS_ROWS) {
    const int bytes = first + row + pass < sequence ? 16 : 0;
#pragma unroll
    for (int group = 0; group < CHUNKS<D>; group += ROW_THREADS)
      cp_async_16_zfill(to + (pass * CHUNKS<D> + group) * 16, there + group * 8, bytes);
    there += PASS_ROWS * from.stride;
  }
}

// ---------------------------------------------------------------- products of a warp
// Offsets of a lane's rows for ldmatrix_x4. `across`: of 16 rows, two chunks each, 8 rows first:
// operand A, and operand B of a tile that is summed over its rows. `along`: both chunks of 8 rows
// first: operand B of a tile that is summed over its columns.
struct Lane {
  int across, along;
};
template <int D>
DEVICE Lane lane_offsets() {
  const int lane = int(threadIdx.x) % WARP;
  return {offset_of<D>(lane % 16, lane / 16), offset_of<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2)};
}

// scores[m] [16,ROWS] = rows 16 m on of tile `a` times the rows of tile `b`.
template <int D, int M, int ROWS>
DEVICE void multiply_rows(float (&scores)[M][ROWS / 8][4], const uint8_t* a, const uint8_t* b,
                          Lane lane) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] = 0;
#pragma unroll
  for (int part = 0; part < D / 16; ++part) {
    uint32_t of_a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
      ldmatrix_x4(of_a[m], a + offset_behind<D>(lane.across, m * 16, part * 2));
#pragma unroll
    for (int pair = 0; pair < ROWS / 16; ++pair) {
      uint32_t of_b[4];
      ldmatrix_x4(of_b, b + offset_behind<D>(lane.along, pair * 16, part * 2));
      const uint32_t left[2] = {of_b[0], of_b[1]}, right[2] = {of_b[2], of_b[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_m16n8k16(scores[m][pair * 2], of_a[m], left);
        mma_m16n8k16(scores[m][pair * 2 + 1], of_a[m], right);
      }
    }
  }
}

// sums[m] [16,D] += weights[m] [16,ROWS], rounded to bf16, times tile `b` [ROWS,D].
template <int D, int M, int ROWS>
DEVICE void add_weighted_rows(float (&sums)[M][D / 8][4], const float (&weights)[M][ROWS / 8][4],
                              const uint8_t* b, Lane lane) {
#pragma unroll
  for (int part = 0; part < ROWS / 16; ++part) {
    uint32_t of_a[M][4];  // D of the scores' product, as A of this one
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        of_a[m][i] = pack_bf16(weights[m][part * 2 + i / 2][i % 2 * 2],
                               weights[m][part * 2 + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int pair = 0; pair < D / 16; ++pair) {
      uint32_t of_b[4];
      ldmatrix_x4_trans(of_b, b + offset_behind<D>(lane.across, part * 16, pair * 2));
      const uint32_t left[2] = {of_b[0], of_b[1]}, right[2] = {of_b[2], of_b[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_m16n8k16(sums[m][pair * 2], of_a[m], left);
        mma_m16n8k16(sums[m][pair * 2 + 1], of_a[m], right);
      }
    }
  }
}

// The 16 M rows from `row` on, times a factor each, to global memory in vectors; through rows of a
// tile that only this warp still uses.
template <int D, int M>
DEVICE void store_rows(bf16* to, size_t stride, int row, int sequence,
                       const float (&values)[M][D / 8][4], const float (&factors)[M][2],
                       uint8_t* tile) {
  const int lane = int(threadIdx.x) % WARP;
  __syncwarp();  // all lanes have read what the tile held
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint8_t* const chunk = tile + offset_of<D>(m * 16 + half * 8 + lane / 4, n);
        reinterpret_cast<uint32_t*>(chunk)[lane % 4] =
            pack_bf16(values[m][n][half * 2] * factors[m][half],
                      values[m][n][half * 2 + 1] * factors[m][half]);
      }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * M * CHUNKS<D>; i += WARP) {
    const int at = i + lane, offset = at / CHUNKS<D>, chunk = at % CHUNKS<D>;
    if (row + offset < sequence)
      *reinterpret_cast<uint4*>(to + (row + offset) * stride + chunk * 8) =
          *reinterpret_cast<uint4*>(tile + offset_of<D>(offset, chunk));
  }
}

// ---------------------------------------------------------------- layout
// One query head and its KV head of one sequence. The grid's x walks over sequences and heads, so
// that heads with the same keys run side by side.
struct Head {
  Rows q, k, v;
  size_t out_stride;  // of out and d_out
  size_t out;         // first value of this head in them
  size_t statistics;  // first value of this head in log_sum_exp and delta
};

template <int D>
DEVICE Head head_of(const bf16* qkv, int b, int head, int sequence, int heads, int kv_heads) {
  const size_t stride = size_t(heads + 2 * kv_heads) * D, out_stride = size_t(heads) * D;
  const size_t token = size_t(b) * sequence;
  const bf16* const rows = qkv + token * stride;
  const int kv_head = head / (heads / kv_heads);
  return {{rows + head * D, stride},
          {rows + (heads + kv_head) * D, stride},
          {rows + (heads + kv_heads + kv_head) * D, stride},
          out_stride,
          token * out_stride + head * D,
          (size_t(b) * heads + head) * sequence};
}

// ---------------------------------------------------------------- documents
// Where the documents of one sequence begin; without DOCUMENTS, one begins at 0. Starts do not
// descend, so that the first and the last row of a tile bound what its rows see.
template <bool DOCUMENTS>
struct Documents {
  const int* starts;  // [S]
  int sequence;
};

// The first key that a row sees. Rows after the end of the sequence see what the last one sees.
template <bool DOCUMENTS>
DEVICE int start_of(Documents<DOCUMENTS> documents, int row) {
  return DOCUMENTS ? documents.starts[min(row, documents.sequence - 1)] : 0;
}
// Whether `row`, and with it every later one, sees no key before `end`.
template <bool DOCUMENTS>
DEVICE bool hidden_before(Documents<DOCUMENTS> documents, int end, int row) {
  return DOCUMENTS && start_of(documents, row) >= end;
}
// The first tile of `rows` rows, of first to end, that sees no key before `key_end`; or end.
template <bool DOCUMENTS>
DEVICE int tiles_seeing(Documents<DOCUMENTS> documents, int key_end, int first, int end, int rows) {
  while (DOCUMENTS && first < end) {
    const int middle = first + (end - first) / 2;
    if (hidden_before(documents, key_end, middle * rows))
      end = middle;
    else
      first = middle + 1;
  }
  return end;
}

// ---------------------------------------------------------------- forward
// 32 rows for a warp: a fragment of k or v, once read, serves two products. Tiles of keys and
// values take turns in a ring of three, of which one is used and two are loaded or being loaded;
// with the queries these are at most 60 KiB (D = 96): two blocks on a multiprocessor of sm_80.
constexpr int FORWARD_QUERIES = WARPS * 32, FORWARD_RING = 3;

template <int D, int KEYS, bool DOCUMENTS>
DEVICE void attention_forward(const bf16* qkv,             // [T,(H+2K)D]
                              const int* document_starts,  // [B,S], if DOCUMENTS
                              bf16* out,                   // [T,HD]
                              float* log_sum_exp,          // [B,H,S]
                              int sequence, int heads, int kv_heads, float scale_log2) {
  begin_after_previous();
  constexpr int QUERIES = FORWARD_QUERIES;
  SHARED_DYNAMIC(queries);
  uint8_t* const ring = queries + TILE_BYTES<D, QUERIES>;
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
  const Lane offsets = lane_offsets<D>();
  const int first = (int(gridDim.y) - 1 - int(blockIdx.y)) * QUERIES;
  const int b = int(blockIdx.x) / heads, head = int(blockIdx.x) % heads;
  const Head at = head_of<D>(qkv, b, head, sequence, heads, kv_heads);
  const Documents<DOCUMENTS> documents{document_starts + size_t(b) * sequence, sequence};
  const int first_tile = start_of(documents, first) / KEYS;
  const int tiles = (min(first + QUERIES, sequence) + KEYS - 1) / KEYS;

  // Item 2 t of the ring are the keys of tile t, item 2 t + 1 its values.
  int loaded = 2 * first_tile, load_slot = 0, use_slot = 0;
  const auto load_next = [&] {
    if (loaded < 2 * tiles)
      load_tile<D, KEYS>(ring + load_slot * TILE_BYTES<D, KEYS>, loaded % 2 ? at.v : at.k,
                         loaded / 2 * KEYS, sequence);
    cp_async_commit();  // of nothing after the last item, so that the wait is the same
    ++loaded;
    load_slot = load_slot + 1 == FORWARD_RING ? 0 : load_slot + 1;
  };
  // The next item, when all warps are done with the one before it, whose place is loaded again.
  const auto use_next = [&] {
    uint8_t* const item = ring + use_slot * TILE_BYTES<D, KEYS>;
    use_slot = use_slot + 1 == FORWARD_RING ? 0 : use_slot + 1;
    cp_async_wait<FORWARD_RING - 2>();
    __syncthreads();
    load_next();
    return item;
  };
  load_tile<D, QUERIES>(queries, at.q, first, sequence);
#pragma unroll
  for (int i = 0; i < FORWARD_RING - 1; ++i) load_next();

  // Lane l holds rows l / 4 and l / 4 + 8 of each 16, columns l % 4 * 2 and the next of each 8.
  float sums[2][D / 8][4] = {};
  float highest[2][2], totals[2][2];  // of the scores, scaled and in powers of two; of exp(score)
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) highest[m][half] = LOWEST, totals[m][half] = 0;
  uint8_t* const warp_queries = queries + warp * TILE_BYTES<D, 32>;
  const int first_row = first + warp * 32;

  for (int tile = first_tile; tile < tiles; ++tile) {
    const int first_key = tile * KEYS;
    uint8_t* const keys = use_next();
    // To any row of this warp. Where its documents begin later than the block's first one, it
    // computes what is masked anyway: registers are short, and other warps have to be waited for.
    const bool visible = first_key <= first_row + 31;
    float scores[2][KEYS / 8][4];
    if (visible) {
      multiply_rows<D, 2, KEYS>(scores, warp_queries, keys, offsets);
      if (hidden_before(documents, first_key + 1, first_row + 31)) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int start = start_of(documents, first_row + m * 16 + half * 8 + lane / 4);
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
              for (int i = 0; i < 2; ++i)
                if (first_key + n * 8 + lane % 4 * 2 + i < start)
                  scores[m][n][half * 2 + i] = MINUS_INFINITY;
          }
      }
      if (first_key + KEYS - 1 > first_row) {
        // Also what lies after the end of the sequence, for all rows that are in it.
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int key = first_key + n * 8 + lane % 4 * 2 + i % 2;
              if (key > first_row + m * 16 + lane / 4 + i / 2 * 8) scores[m][n][i] = MINUS_INFINITY;
            }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float most = scores[m][0][half * 2];
#pragma unroll
          for (int n = 0; n < KEYS / 8; ++n)
            most = fmaxf(most, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
          most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
          most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
          most = fmaxf(highest[m][half], most * scale_log2);
          const float rescale = exp2_approx(highest[m][half] - most);
          highest[m][half] = most;
          float total = 0;
#pragma unroll
          for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = half * 2; i < half * 2 + 2; ++i) {
              scores[m][n][i] = exp2_approx(scores[m][n][i] * scale_log2 - most);
              total += scores[m][n][i];
            }
          totals[m][half] = totals[m][half] * rescale + total;
#pragma unroll
          for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int i = half * 2; i < half * 2 + 2; ++i) sums[m][n][i] *= rescale;
        }
    }
    uint8_t* const values = use_next();
    if (visible) add_weighted_rows<D, 2, KEYS>(sums, scores, values, offsets);
  }

  float inverse[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = totals[m][half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      inverse[m][half] = __fdiv_rn(1.0f, total);
      const int row = first_row + m * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && row < sequence)
        log_sum_exp[at.statistics + row] = highest[m][half] * LN_2 + logf(total);
    }
  store_rows<D, 2>(out + at.out, at.out_stride, first_row, sequence, sums, inverse, warp_queries);
}

// ---------------------------------------------------------------- backward
// With P = exp(q k^T scale - lse), dP = d_out v^T, dS = P (dP - delta):
//   d_q = scale dS k, d_k = scale dS^T q, d_v = P^T d_out, delta = row sums of out d_out.
// 16 rows of a result for a warp. The other side comes in two stages, one used and one loaded; so
// long as 64 rows of it fit beside the scores' and the results' registers.
constexpr int BACKWARD_ROWS = WARPS * 16;

// The score's p = exp(score scale - lse), both in powers of two.
DEVICE float probability(float score, float scale_log2, float lse_log2) {
  return exp2_approx(score * scale_log2 - lse_log2);
}

template <int D, int KEYS, bool DOCUMENTS>
DEVICE void attention_backward_q(const bf16* qkv,             // [T,(H+2K)D]
                                 const int* document_starts,  // [B,S], if DOCUMENTS
                                 const bf16* out,             // [T,HD]
                                 const float* log_sum_exp,    // [B,H,S]
                                 const bf16* d_out,           // [T,HD]
                                 float* delta,                // [B,H,S]
                                 bf16* d_qkv,                 // [T,(H+2K)D], the q heads of it
                                 int sequence, int heads, int kv_heads, float scale,
                                 float scale_log2) {
  begin_after_previous();
  constexpr int QUERIES = BACKWARD_ROWS, KEY_BYTES = TILE_BYTES<D, KEYS>;
  SHARED_DYNAMIC(queries);
  uint8_t* const d_outs = queries + TILE_BYTES<D, QUERIES>;
  uint8_t* const stages = d_outs + TILE_BYTES<D, QUERIES>;  // 2 x (keys, values)
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
  const Lane offsets = lane_offsets<D>();
  const int first = (int(gridDim.y) - 1 - int(blockIdx.y)) * QUERIES;
  const int b = int(blockIdx.x) / heads, head = int(blockIdx.x) % heads;
  const Head at = head_of<D>(qkv, b, head, sequence, heads, kv_heads);
  const Documents<DOCUMENTS> documents{document_starts + size_t(b) * sequence, sequence};
  const int first_tile = start_of(documents, first) / KEYS;
  const int tiles = (min(first + QUERIES, sequence) + KEYS - 1) / KEYS;
  const auto load_stage = [&](int tile) {
    uint8_t* const stage = stages + tile % 2 * 2 * KEY_BYTES;
    load_tile<D, KEYS>(stage, at.k, tile * KEYS, sequence);
    load_tile<D, KEYS>(stage + KEY_BYTES, at.v, tile * KEYS, sequence);
    cp_async_commit();
  };
  load_tile<D, QUERIES>(queries, at.q, first, sequence);
  load_tile<D, QUERIES>(d_outs, {d_out + at.out, at.out_stride}, first, sequence);
  load_stage(first_tile);

  // Meanwhile delta: the four lanes that share a row of the scores add up its row of out d_out.
  uint8_t* const warp_queries = queries + warp * TILE_BYTES<D, 16>;
  const int first_row = first + warp * 16;
  float lse_log2[2], deltas[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + half * 8 + lane / 4;
    float sum = 0;
    lse_log2[half] = -MINUS_INFINITY;  // no probability after the end of the sequence
    if (row < sequence) {
      lse_log2[half] = log_sum_exp[at.statistics + row] * LOG2_E;
      const size_t begin = at.out + row * at.out_stride;
#pragma unroll
      for (int i = 0; i < CHUNKS<D>; i += 4) {
        const int chunk = i + lane % 4;
        if (CHUNKS<D> % 4 != 0 && chunk >= CHUNKS<D>) break;
        const uint4 o = *reinterpret_cast<const uint4*>(out + begin + chunk * 8);
        const uint4 d = *reinterpret_cast<const uint4*>(d_out + begin + chunk * 8);
        const uint32_t os[4] = {o.x, o.y, o.z, o.w}, ds[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          sum += low_float(os[pair]) * low_float(ds[pair]);
          sum += high_float(os[pair]) * high_float(ds[pair]);
        }
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    deltas[half] = sum;
    if (lane % 4 == 0 && row < sequence) delta[at.statistics + row] = sum;
  }

  float d_q[1][D / 8][4] = {};
  for (int tile = first_tile; tile < tiles; ++tile) {
    uint8_t* const keys = stages + tile % 2 * 2 * KEY_BYTES;
    uint8_t* const values = keys + KEY_BYTES;
    const int first_key = tile * KEYS;
    cp_async_wait<0>();
    __syncthreads();  // everyone's copies, and the end of the use of the other stage
    if (tile + 1 < tiles) load_stage(tile + 1);
    // Hidden from all rows of this warp.
    if (first_key > first_row + 15 || hidden_before(documents, first_key + KEYS, first_row))
      continue;

    float p[1][KEYS / 8][4], d_s[1][KEYS / 8][4];
    multiply_rows<D, 1, KEYS>(p, warp_queries, keys, offsets);
    multiply_rows<D, 1, KEYS>(d_s, d_outs + warp * TILE_BYTES<D, 16>, values, offsets);
    const bool masked = first_key + KEYS - 1 > first_row;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + n * 8 + lane % 4 * 2 + i % 2;
        float probable = probability(p[0][n][i], scale_log2, lse_log2[i / 2]);
        if (masked && key > first_row + lane / 4 + i / 2 * 8) probable = 0;
        d_s[0][n][i] = probable * (d_s[0][n][i] - deltas[i / 2]);
      }
    if (hidden_before(documents, first_key + 1, first_row + 15)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int start = start_of(documents, first_row + half * 8 + lane / 4);
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (first_key + n * 8 + lane % 4 * 2 + i < start) d_s[0][n][half * 2 + i] = 0;
      }
    }
    add_weighted_rows<D, 1, KEYS>(d_q, d_s, keys, offsets);
  }

  const size_t stride = at.q.stride;
  const float scales[1][2] = {{scale, scale}};
  store_rows<D, 1>(d_qkv + (at.q.first - qkv), stride, first_row, sequence, d_q, scales,
                   warp_queries);
}

// The statistics of a stage's queries: log_sum_exp, then delta.
template <int QUERIES>
constexpr int STATISTICS_BYTES = 2 * QUERIES * int(sizeof(float));

template <int D, int QUERIES, bool DOCUMENTS>
DEVICE void attention_backward_kv(const bf16* qkv,             // [T,(H+2K)D]
                                  const int* document_starts,  // [B,S], if DOCUMENTS
                                  const float* log_sum_exp,    // [B,H,S]
                                  const bf16* d_out,           // [T,HD]
                                  const float* delta,          // [B,H,S]
                                  bf16* d_qkv,                 // [T,(H+2K)D], its k and v heads
                                  int sequence, int heads, int kv_heads, float scale,
                                  float scale_log2) {
  begin_after_previous();
  constexpr int KEYS = BACKWARD_ROWS, QUERY_BYTES = TILE_BYTES<D, QUERIES>;
  constexpr int STAGE_BYTES = 2 * QUERY_BYTES + STATISTICS_BYTES<QUERIES>;
  static_assert(2 * QUERIES <= THREADS && KEYS % QUERIES == 0);
  SHARED_DYNAMIC(keys);
  uint8_t* const values = keys + TILE_BYTES<D, KEYS>;
  uint8_t* const stages = values + TILE_BYTES<D, KEYS>;  // 2 x (queries, d_out, statistics)
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
  const Lane offsets = lane_offsets<D>();
  const int first_key = int(blockIdx.y) * KEYS;
  const int b = int(blockIdx.x) / kv_heads, kv_head = int(blockIdx.x) % kv_heads;
  const int group = heads / kv_heads;
  const Head at = head_of<D>(qkv, b, kv_head * group, sequence, heads, kv_heads);

  // Steps: all tiles of queries from the diagonal on, up to the end of the last key's document, for
  // one query head after the other.
  const Documents<DOCUMENTS> documents{document_starts + size_t(b) * sequence, sequence};
  const int first_tile = first_key / QUERIES;
  const int end_tile = tiles_seeing(documents, first_key + KEYS, first_tile,
                                    (sequence + QUERIES - 1) / QUERIES, QUERIES);
  const int steps = group * (end_tile - first_tile);
  int load_member = 0, load_tile_index = first_tile, load_stage_index = 0;
  const auto load_stage = [&] {
    uint8_t* const stage = stages + load_stage_index * STAGE_BYTES;
    const int first = load_tile_index * QUERIES;
    load_tile<D, QUERIES>(stage, {at.q.first + load_member * D, at.q.stride}, first, sequence);
    load_tile<D, QUERIES>(stage + QUERY_BYTES, {d_out + at.out + load_member * D, at.out_stride},
                          first, sequence);
    float* const statistics = reinterpret_cast<float*>(stage + 2 * QUERY_BYTES);
    const int i = int(threadIdx.x), query = first + i % QUERIES;
    if (i < 2 * QUERIES) {
      const float* const from = i < QUERIES ? log_sum_exp : delta;
      if (query < sequence)
        cp_async_4(statistics + i, from + at.statistics + size_t(load_member) * sequence + query);
      else  // no probability after the end of the sequence
        statistics[i] = i < QUERIES ? -MINUS_INFINITY : 0.0f;
    }
    cp_async_commit();
    load_stage_index ^= 1;
    if (++load_tile_index == end_tile) load_tile_index = first_tile, ++load_member;
  };
  load_tile<D, KEYS>(keys, at.k, first_key, sequence);
  load_tile<D, KEYS>(values, at.v, first_key, sequence);
  load_stage();

  uint8_t* const warp_keys = keys + warp * TILE_BYTES<D, 16>;
  uint8_t* const warp_values = values + warp * TILE_BYTES<D, 16>;
  const int warp_key = first_key + warp * 16;
  float d_k[1][D / 8][4] = {}, d_v[1][D / 8][4] = {};
  int tile = first_tile;
  for (int step = 0; step < steps; ++step) {
    uint8_t* const queries = stages + step % 2 * STAGE_BYTES;
    uint8_t* const d_outs = queries + QUERY_BYTES;
    const float* const statistics = reinterpret_cast<float*>(queries + 2 * QUERY_BYTES);
    const int first = tile * QUERIES;
    tile = tile + 1 == end_tile ? first_tile : tile + 1;
    cp_async_wait<0>();
    __syncthreads();  // everyone's copies, and the end of the use of the other stage
    if (step + 1 < steps) load_stage();
    // No query sees a key of this warp.
    if (first + QUERIES - 1 < warp_key || hidden_before(documents, warp_key + 16, first)) continue;

    float p[1][QUERIES / 8][4], d_s[1][QUERIES / 8][4];  // transposed: [keys,queries]
    multiply_rows<D, 1, QUERIES>(p, warp_keys, queries, offsets);
    multiply_rows<D, 1, QUERIES>(d_s, warp_values, d_outs, offsets);
    const bool masked = first < warp_key + 15;
#pragma unroll
    for (int n = 0; n < QUERIES / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      const float2 lse = *reinterpret_cast<const float2*>(statistics + column);
      const float2 deltas = *reinterpret_cast<const float2*>(statistics + QUERIES + column);
      const float lse_log2[2] = {lse.x * LOG2_E, lse.y * LOG2_E};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float probable = probability(p[0][n][i], scale_log2, lse_log2[i % 2]);
        if (masked && warp_key + lane / 4 + i / 2 * 8 > first + column + i % 2) probable = 0;
        p[0][n][i] = probable;
        d_s[0][n][i] = probable * (d_s[0][n][i] - (i % 2 ? deltas.y : deltas.x));
      }
    }
    if (hidden_before(documents, warp_key + 1, first + QUERIES - 1)) {
#pragma unroll
      for (int n = 0; n < QUERIES / 8; ++n)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int start = start_of(documents, first + n * 8 + lane % 4 * 2 + odd);
#pragma unroll
          for (int half = 0; half < 2; ++half)
            if (warp_key + lane / 4 + half * 8 < start)
              p[0][n][half * 2 + odd] = d_s[0][n][half * 2 + odd] = 0;
        }
    }
    add_weighted_rows<D, 1, QUERIES>(d_v, p, d_outs, offsets);
    add_weighted_rows<D, 1, QUERIES>(d_k, d_s, queries, offsets);
  }

  const size_t stride = at.k.stride;
  const float scales[1][2] = {{scale, scale}}, ones[1][2] = {{1, 1}};
  store_rows<D, 1>(d_qkv + (at.k.first - qkv), stride, warp_key, sequence, d_k, scales, warp_keys);
  store_rows<D, 1>(d_qkv + (at.v.first - qkv), stride, warp_key, sequence, d_v, ones, warp_values);
}

// ---------------------------------------------------------------- kernels
#define ATTENTION_KERNELS(name, documents, d, forward_keys, keys, queries, forward_blocks,         \
                          q_blocks, kv_blocks)                                                     \
  KERNEL(attention_forward_##name##bf16_##d, THREADS, forward_blocks)                              \
  (const bf16* qkv, const int* document_starts, bf16* out, float* log_sum_exp, int sequence,       \
   int heads, int kv_heads, float, float scale_log2) {                                             \
    attention_forward<d, forward_keys, documents>(qkv, document_starts, out, log_sum_exp,          \
                                                  sequence, heads, kv_heads, scale_log2);          \
  }                                                                                                \
  EXPORT_KERNEL(attention_forward_##name##bf16_##d)                                                \
  KERNEL(attention_backward_q_##name##bf16_##d, THREADS, q_blocks)                                 \
  (const bf16* qkv, const int* document_starts, const bf16* out, const float* log_sum_exp,         \
   const bf16* d_out, float* delta, bf16* d_qkv, int sequence, int heads, int kv_heads,            \
   float scale, float scale_log2) {                                                                \
    attention_backward_q<d, keys, documents>(qkv, document_starts, out, log_sum_exp, d_out, delta, \
                                             d_qkv, sequence, heads, kv_heads, scale, scale_log2); \
  }                                                                                                \
  EXPORT_KERNEL(attention_backward_q_##name##bf16_##d)                                             \
  KERNEL(attention_backward_kv_##name##bf16_##d, THREADS, kv_blocks)                               \
  (const bf16* qkv, const int* document_starts, const float* log_sum_exp, const bf16* d_out,       \
   const float* delta, bf16* d_qkv, int sequence, int heads, int kv_heads, float scale,            \
   float scale_log2) {                                                                             \
    attention_backward_kv<d, queries, documents>(qkv, document_starts, log_sum_exp, d_out, delta,  \
                                                 d_qkv, sequence, heads, kv_heads, scale,          \
                                                 scale_log2);                                      \
  }                                                                                                \
  EXPORT_KERNEL(attention_backward_kv_##name##bf16_##d)

// Of documents or not, head dim, rows of the other side in a stage (d_q, d_k and d_v), and blocks
// that a multiprocessor shall hold, which is what the registers allow without spills (forward, d_q,
// d_k and d_v). The plain ones are given a null for document_starts, so that all are launched
// alike.
ATTENTION_KERNELS(, false, 32, 64, 64, 64, 3, 3, 3)
ATTENTION_KERNELS(, false, 48, 64, 64, 64, 2, 3, 2)
ATTENTION_KERNELS(, false, 64, 64, 64, 64, 2, 3, 2)
ATTENTION_KERNELS(, false, 96, 64, 64, 32, 2, 2, 2)
ATTENTION_KERNELS(, false, 128, 32, 32, 32, 2, 2, 2)
ATTENTION_KERNELS(documents_, true, 32, 64, 64, 64, 2, 3, 2)
ATTENTION_KERNELS(documents_, true, 48, 64, 64, 64, 2, 3, 2)
ATTENTION_KERNELS(documents_, true, 64, 64, 64, 64, 2, 2, 2)
ATTENTION_KERNELS(documents_, true, 96, 64, 64, 32, 2, 2, 2)
ATTENTION_KERNELS(documents_, true, 128, 32, 32, 32, 2, 2, 2)
