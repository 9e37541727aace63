// Causal attention with grouped KV heads on Hopper, bf16, forward and backward: TMA in, wgmma, TMA
// out. The formulas and the contract are those of attention_sm80.cu: qkv [T,(H+2K)D] with T = B S,
// out and d_out [T,HD], log_sum_exp (natural) and delta [B,H,S] fp32, d_qkv written entirely; no
// atomics, every sum in a fixed order. document_starts [B,S] or null: query i of a row sees keys
// document_starts[i] to i.
//
// A tensor map (src/cuda/attention/sm90.rs) is {D, heads, S, B}, innermost first, with 128-byte
// swizzles; boxes are {64, 1, 64, 1} where it is read, {64, 1, 16, 1} where it is written. So no
// box reaches into another head or sequence, and what lies behind D or S is zeros and is not
// stored.
//
// A block of three warpgroups keeps its multiprocessor to itself and takes one item after the
// other: 128 rows of a result. One thread loads the item's own rows, and through a ring of stages
// the rows of the other side; each of two consumers computes 64 rows of the result. Scores and what
// comes of them never leave registers: an accumulator, rounded, is the A operand of the next
// product. Backward is two kernels, one for each side that is summed over, as in attention_sm80.cu.
#include "isobath.cuh"

// ---------------------------------------------------------------- sizes
constexpr int WARPGROUP = 128, CONSUMERS = 2, THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int MMA_M = 64, MMA_K = 16;    // of one wgmma
constexpr int ROWS = CONSUMERS * MMA_M;  // of a result, in an item
constexpr int WARP_ROWS = 16;            // of a consumer's, in accumulators
constexpr int SPAN = 128, COLUMNS = 64;  // bytes and values of a row: the span of the swizzle
constexpr int BOX_ROWS = 64;             // of a load
constexpr int READERS = CONSUMERS * 4;   // warps that release what all consumers read
// 168 registers at launch x 3 = 40 + 232 + 232.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

constexpr float MINUS_INFINITY = -__builtin_huge_valf();
// Below every score, yet what a mask hides lies infinitely far below it: a row that sees nothing of
// its first tiles adds up exp(-infinity), not exp(0).
constexpr float LOWEST = -3.402823466e38f;
constexpr float LOG2_E = 1.44269504088896340736f, LN_2 = 0.69314718055994530942f;

// A tile is rows of one head, in blocks of 64 columns; behind D, a block is zeros.
template <int D>
constexpr int BLOCKS = (D + COLUMNS - 1) / COLUMNS;
template <int D, int N>
constexpr int TILE_BYTES = BLOCKS<D> * N * SPAN;

// Stages of the ring, and the rows of the other side in each, for a forward and a backward kernel.
// Wide products read shared memory least; with wide heads, backward's registers hold 64 rows.
template <int D>
constexpr int FORWARD_STAGES = D <= 64 ? 4 : 2;
constexpr int FORWARD_KEYS = 128;
constexpr int BACKWARD_STAGES = 3;
template <int D>
constexpr int BACKWARD_OTHERS = D <= 64 ? 128 : 64;

// ---------------------------------------------------------------- the ring
// Where in the ring a producer or a consumer is; `parity` is that of the stage's current round.
template <int STAGES>
struct Position {
  int stage = 0;
  uint32_t parity = 0;
};
template <int STAGES>
DEVICE void advance(Position<STAGES>& at) {
  if (++at.stage == STAGES) {
    at.stage = 0;
    at.parity ^= 1;
  }
}
// By each warp, when it has read a stage.
DEVICE void release(uint64_t* empty) {
  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

// ---------------------------------------------------------------- the work
// All sequences' heads, each with `tiles` tiles of ROWS rows. The heads of a section are walked
// together: what they read fits in the L2 cache.
struct Work {
  int heads;           // of one sequence, on the side of the result
  int total, section;  // of all sequences, and of a section
  int tiles;
};
struct Item {
  int b, head, tile;
};

// Each item of this block, the longest ones of a section first: tiles forwards or backwards. The
// blocks take turns, and every second round in the opposite order, so that no block gets the longer
// one of every round.
template <bool BACKWARDS, class Finish>
DEVICE void each_item(const Work& work, const Finish& finish) {
  const int blocks = int(gridDim.x), items = work.total * work.tiles;
  for (int round = 0; round * blocks < items; ++round) {
    const int turn = round % 2 ? blocks - 1 - int(blockIdx.x) : int(blockIdx.x);
    const int index = round * blocks + turn;
    if (index >= items) continue;
    const int section = index / (work.section * work.tiles);
    const int within = index - section * work.section * work.tiles;
    const int together = min(work.section, work.total - section * work.section);
    const int tile = within / together, head = section * work.section + within % together;
    finish(Item{head / work.heads, head % work.heads, BACKWARDS ? work.tiles - 1 - tile : tile});
  }
}

// ---------------------------------------------------------------- documents
// Where the documents of one sequence begin; null: one begins at 0. Starts do not descend, so that
// the first and the last row of a tile bound what its rows see.
struct Documents {
  const int* starts;  // [S]
  int sequence;
};
DEVICE Documents documents_of(const int* document_starts, int b, int sequence) {
  return {document_starts ? document_starts + size_t(b) * sequence : nullptr, sequence};
}
// The first key that a row sees. Rows behind the end of the sequence see what the last one sees.
DEVICE int start_of(Documents documents, int row) {
  return documents.starts ? documents.starts[min(row, documents.sequence - 1)] : 0;
}

// Tiles of the other side: those that all rows of an item need, or of one consumer's.
struct Tiles {
  int first, end;
};
// Of `n` keys each, that the queries from `first` to before `end` see.
DEVICE Tiles keys_seen(Documents documents, int first, int end, int n) {
  const int last = min(end, documents.sequence);
  if (first >= last) return {0, 0};
  return {start_of(documents, first) / n, (last + n - 1) / n};
}
// Of `n` queries each, that see the keys from `first` to before `end`.
DEVICE Tiles queries_seeing(Documents documents, int first, int end, int n) {
  const int tiles = (documents.sequence + n - 1) / n;
  if (first >= documents.sequence) return {tiles, tiles};
  int seeing = first / n, hidden = tiles;
  if (!documents.starts) return {seeing, hidden};
  // The first tile behind whose first query sees none of the keys.
  const int own = seeing;
  while (seeing < hidden) {
    const int middle = seeing + (hidden - seeing) / 2;
    if (start_of(documents, middle * n) >= end)
      hidden = middle;
    else
      seeing = middle + 1;
  }
  return {own, hidden};
}

// ---------------------------------------------------------------- loads and stores
// Rows `first` to `first` + N of a head.
template <int D, int N>
DEVICE void load_tile(uint8_t* tile, const TensorMap* map, uint64_t* full, int head, int first,
                      int b) {
#pragma unroll
  for (int block = 0; block < BLOCKS<D>; ++block)
#pragma unroll
    for (int row = 0; row < N; row += BOX_ROWS)
      tma_load_4d(tile + (block * N + row) * SPAN, map, full, block * COLUMNS, head, first + row,
                  b);
}

// A warp's 16 rows of accumulators, times a factor each, through a tile of its own.
template <int D>
DEVICE void store_rows(const TensorMap* map, uint8_t* tile, const float (&values)[D / 2],
                       const float (&factors)[2], int head, int first, int b, int sequence) {
  constexpr int BLOCK_BYTES = WARP_ROWS * SPAN;
  if (first >= sequence) return;
  const int lane = int(threadIdx.x) % 32;
  if (lane == 0) bulk_wait_read<0>();  // the last store has left the tile
  __syncwarp();
#pragma unroll
  for (int group = 0; group < D / 16; ++group) {
    uint32_t quarters[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      quarters[i] = pack_bf16(values[group * 8 + 2 * i] * factors[i % 2],
                              values[group * 8 + 2 * i + 1] * factors[i % 2]);
    const uint32_t column = group % 4 * 16 + lane / 16 * 8;
    const uint32_t offset = lane % 16 * SPAN + column * int(sizeof(bf16));
    stmatrix_x4(tile + group / 4 * BLOCK_BYTES + swizzle<SPAN>(offset), quarters);
  }
  fence_proxy_async();
  __syncwarp();
  if (lane == 0) {
#pragma unroll
    for (int block = 0; block < BLOCKS<D>; ++block)
      tma_store_4d(map, tile + block * BLOCK_BYTES, block * COLUMNS, head, first, b);
    bulk_commit();
  }
}

// ---------------------------------------------------------------- products of a consumer
// From one value of a row to another, in the 16 bytes that descriptors count; N rows in the tile.
template <int N>
DEVICE constexpr uint64_t along(int k) {
  return uint64_t(k / COLUMNS * N * SPAN + k % COLUMNS * int(sizeof(bf16))) / 16;
}

// scores [64,N] = 64 rows of tile `a` times the rows of tile `b`.
template <int D, int N>
DEVICE void multiply_rows(float (&scores)[N / 2], const uint8_t* a, const uint8_t* b) {
  const uint64_t of_a = descriptor_k_major(a), of_b = descriptor_k_major(b);
#pragma unroll
  for (int k = 0; k < D; k += MMA_K)
    wgmma<N>(scores, of_a + along<ROWS>(k), of_b + along<N>(k), k > 0);
}

// sums [64,D] += weights [64,N] times tile `b` [N,D]; = where `add` is false.
template <int D, int N>
DEVICE void add_weighted_rows(float (&sums)[D / 2], const uint32_t (&weights)[N / MMA_K][4],
                              const uint8_t* b, bool add) {
  const uint64_t of_b = descriptor_mn_major(b, N * SPAN);
#pragma unroll
  for (int k = 0; k < N; k += MMA_K)
    wgmma<D, 1>(sums, weights[k / MMA_K], of_b + uint64_t(k * SPAN / 16), add || k > 0);
}

// Accumulators of [64,N], rounded, as A of the next product.
template <int N>
DEVICE void round_weights(uint32_t (&weights)[N / MMA_K][4], const float (&values)[N / 2]) {
#pragma unroll
  for (int part = 0; part < N / MMA_K; ++part)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[part][i] = pack_bf16(values[part * 8 + 2 * i], values[part * 8 + 2 * i + 1]);
}

// A thread's accumulators are those of two rows, this one of its consumer's 64 and the one 8 behind
// it, and of two columns of each 8, `first_column` and the next (PTX ISA, "wgmma register
// fragments"): accumulator 4 n + 2 half + odd.
DEVICE int first_row() {
  return int(threadIdx.x) % WARPGROUP / 32 * WARP_ROWS + int(threadIdx.x) % 32 / 4;
}
DEVICE int first_column() { return int(threadIdx.x) % 4 * 2; }

// ---------------------------------------------------------------- roles
DEVICE void begin(const uint8_t* shared) {
  // Swizzles take bits of the address itself; that it is aligned so is not in the language.
  if (threadIdx.x == 0 && shared_address(shared) % (8 * SPAN)) __trap();
}
template <int STAGES>
DEVICE void init_ring(uint64_t* full, uint64_t* empty, int loaders) {
  for (int stage = 0; stage < STAGES; ++stage) {
    mbarrier_init(&full[stage], loaders);
    mbarrier_init(&empty[stage], READERS);
  }
}

// ---------------------------------------------------------------- forward
// The issue of a step's products, one consumer after the other: while one computes its softmax, the
// other one's products run. Each consumer has a barrier, at which the other one passes the turn on.
DEVICE void take_turn(int consumer) { barrier_sync(1 + consumer, CONSUMERS * WARPGROUP); }
DEVICE void pass_turn(int consumer) { barrier_arrive(2 - consumer, CONSUMERS * WARPGROUP); }

// What a consumer's thread knows about its two rows.
struct Softmax {
  float highest[2];  // of the scores, scaled and in powers of two
  float totals[2];   // of exp(score), of this thread's columns
};

// scores = exp(score - highest). `rescale`: what was summed before has to be multiplied by it.
template <int N>
DEVICE void add_scores(Softmax& softmax, float (&scores)[N / 2], float (&rescale)[2],
                       float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = scores[half * 2];
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
      most = fmaxf(most, fmaxf(scores[n * 4 + half * 2], scores[n * 4 + half * 2 + 1]));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    most = fmaxf(softmax.highest[half], most * scale_log2);
    rescale[half] = exp2_approx(softmax.highest[half] - most);
    softmax.highest[half] = most;
    float total = 0;
#pragma unroll
    for (int n = 0; n < N / 8; ++n)
#pragma unroll
      for (int i = n * 4 + half * 2; i < n * 4 + half * 2 + 2; ++i) {
        scores[i] = exp2_approx(scores[i] * scale_log2 - most);
        total += scores[i];
      }
    softmax.totals[half] = softmax.totals[half] * rescale[half] + total;
  }
}

template <int D>
DEVICE void attention_forward(const TensorMap* qkv, const TensorMap* out,
                              const int* document_starts,  // [B,S] or null
                              float* log_sum_exp,          // [B,H,S]
                              int sequence, int kv_heads, const Work& work, float scale_log2) {
  constexpr int KEYS = FORWARD_KEYS, STAGES = FORWARD_STAGES<D>;
  constexpr int OWN_BYTES = TILE_BYTES<D, ROWS>, KEY_BYTES = TILE_BYTES<D, KEYS>;
  SHARED_DYNAMIC(queries);
  uint8_t* const keys = queries + OWN_BYTES;          // STAGES tiles
  uint8_t* const values = keys + STAGES * KEY_BYTES;  // STAGES tiles
  uint8_t* const outs = values + STAGES * KEY_BYTES;  // OWN_BYTES
  SHARED(uint64_t, own, 2);                           // full, empty
  SHARED(uint64_t, keys_full, STAGES);
  SHARED(uint64_t, keys_empty, STAGES);
  SHARED(uint64_t, values_full, STAGES);
  SHARED(uint64_t, values_empty, STAGES);
  begin(queries);
  if (threadIdx.x == 0) {
    tma_prefetch(qkv);
    tma_prefetch(out);
    init_ring<1>(&own[0], &own[1], 1);
    init_ring<STAGES>(keys_full, keys_empty, 1);
    init_ring<STAGES>(values_full, values_empty, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  const int heads = work.heads;

  Position<1> item_at;
  Position<STAGES> at;
  if (threadIdx.x < WARPGROUP) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (threadIdx.x >= 32 || !elect_one()) return;
    each_item<true>(work, [&](const Item& item) {
      const Documents documents = documents_of(document_starts, item.b, sequence);
      const int first = item.tile * ROWS, kv_head = item.head / (heads / kv_heads);
      const Tiles tiles = keys_seen(documents, first, first + ROWS, KEYS);
      mbarrier_wait(&own[1], item_at.parity ^ 1);  // the first round passes at once
      mbarrier_arrive_expect_tx(&own[0], OWN_BYTES);
      load_tile<D, ROWS>(queries, qkv, &own[0], item.head, first, item.b);
      advance(item_at);
      for (int tile = tiles.end - 1; tile >= tiles.first; --tile) {
        mbarrier_wait(&keys_empty[at.stage], at.parity ^ 1);
        mbarrier_arrive_expect_tx(&keys_full[at.stage], KEY_BYTES);
        load_tile<D, KEYS>(keys + at.stage * KEY_BYTES, qkv, &keys_full[at.stage], heads + kv_head,
                           tile * KEYS, item.b);
        mbarrier_wait(&values_empty[at.stage], at.parity ^ 1);
        mbarrier_arrive_expect_tx(&values_full[at.stage], KEY_BYTES);
        load_tile<D, KEYS>(values + at.stage * KEY_BYTES, qkv, &values_full[at.stage],
                           heads + kv_heads + kv_head, tile * KEYS, item.b);
        advance(at);
      }
    });
    return;
  }

  setmaxnreg_inc<CONSUMER_REGISTERS>();
  const int consumer = int(threadIdx.x) / WARPGROUP - 1;
  const int warp = int(threadIdx.x) % WARPGROUP / 32;
  const uint8_t* const own_queries = queries + consumer * MMA_M * SPAN;
  uint8_t* const store_tile = outs + (consumer * 4 + warp) * TILE_BYTES<D, WARP_ROWS>;
  if (consumer == 1) pass_turn(consumer);
  each_item<true>(work, [&](const Item& item) {
    const Documents documents = documents_of(document_starts, item.b, sequence);
    const int first = item.tile * ROWS, own_first = first + consumer * MMA_M;
    const int row = own_first + first_row();
    const Tiles tiles = keys_seen(documents, first, first + ROWS, KEYS);
    // No row of this consumer sees a key before the first of these.
    const int starts[2] = {start_of(documents, row), start_of(documents, row + 8)};
    const int last_start = start_of(documents, own_first + MMA_M - 1);

    float scores[KEYS / 2], sums[D / 2], rescale[2];
    uint32_t weights[KEYS / MMA_K][4];
    Softmax softmax{{LOWEST, LOWEST}, {0, 0}};
    const auto mask = [&](int tile) {
      const int first_key = tile * KEYS;
      if (first_key + KEYS - 1 <= own_first && first_key >= last_start) return;
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i) {
        // Also hides what lies behind the end of the sequence, from all rows that are in it.
        const int half = i / 2 % 2, key = first_key + i / 4 * 8 + first_column() + i % 2;
        if (key > row + half * 8 || key < starts[half]) scores[i] = MINUS_INFINITY;
      }
    };

    mbarrier_wait(&own[0], item_at.parity);
    advance(item_at);
    mbarrier_wait(&keys_full[at.stage], at.parity);
    wgmma_fence();
    multiply_rows<D, KEYS>(scores, own_queries, keys + at.stage * KEY_BYTES);
    wgmma_commit();
    wgmma_wait<0>();
    release(&keys_empty[at.stage]);
    mask(tiles.end - 1);
    add_scores<KEYS>(softmax, scores, rescale, scale_log2);
    round_weights<KEYS>(weights, scores);

    // Of each step the scores, and of the step before it the weighted values.
    Position<STAGES> before = at;
    advance(at);
    for (int tile = tiles.end - 2; tile >= tiles.first; --tile) {
      mbarrier_wait(&keys_full[at.stage], at.parity);
      take_turn(consumer);
      wgmma_fence();
      multiply_rows<D, KEYS>(scores, own_queries, keys + at.stage * KEY_BYTES);
      wgmma_commit();
      mbarrier_wait(&values_full[before.stage], before.parity);
      wgmma_fence();
      add_weighted_rows<D, KEYS>(sums, weights, values + before.stage * KEY_BYTES,
                                 tile < tiles.end - 2);
      wgmma_commit();
      pass_turn(consumer);
      wgmma_wait<1>();
      release(&keys_empty[at.stage]);
      mask(tile);
      add_scores<KEYS>(softmax, scores, rescale, scale_log2);
      wgmma_wait<0>();
      release(&values_empty[before.stage]);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) sums[i] *= rescale[i / 2 % 2];
      round_weights<KEYS>(weights, scores);
      before = at;
      advance(at);
    }
    release(&own[1]);
    mbarrier_wait(&values_full[before.stage], before.parity);
    wgmma_fence();
    add_weighted_rows<D, KEYS>(sums, weights, values + before.stage * KEY_BYTES,
                               tiles.end - tiles.first > 1);
    wgmma_commit();

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = softmax.totals[half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      inverse[half] = __fdiv_rn(1.0f, total);
      const int at_row = row + half * 8;
      if (first_column() == 0 && at_row < sequence)
        log_sum_exp[(size_t(item.b) * heads + item.head) * sequence + at_row] =
            softmax.highest[half] * LN_2 + logf(total);
    }
    wgmma_wait<0>();
    release(&values_empty[before.stage]);
    store_rows<D>(out, store_tile, sums, inverse, item.head, own_first + warp * WARP_ROWS, item.b,
                  sequence);
  });
  if (consumer == 0) take_turn(consumer);  // the turn that is left
  if (threadIdx.x % 32 == 0) bulk_wait<0>();
}

// ---------------------------------------------------------------- kernels
#define ATTENTION_KERNELS(d)                                                                 \
  KERNEL(attention_forward_sm90_##d, THREADS, 1)                                             \
  (const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap out,             \
   const int* document_starts, float* log_sum_exp, int batch, int sequence, int heads,       \
   int kv_heads, int section, float scale_log2) {                                            \
    const Work work{heads, batch * heads, section, (sequence + ROWS - 1) / ROWS};            \
    attention_forward<d>(&qkv, &out, document_starts, log_sum_exp, sequence, kv_heads, work, \
                         scale_log2);                                                        \
  }                                                                                          \
  EXPORT_KERNEL(attention_forward_sm90_##d)

ATTENTION_KERNELS(32)
ATTENTION_KERNELS(48)
ATTENTION_KERNELS(64)
ATTENTION_KERNELS(96)
ATTENTION_KERNELS(128)
