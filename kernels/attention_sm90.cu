// Causal attention with grouped KV heads on Hopper, bf16, forward and backward: TMA in, wgmma, TMA
// out. The formulas and the contract are those of attention_sm80.cu: qkv [T,(H+2K)D] with T = B S,
// out and d_out [T,HD], log_sum_exp (natural) and delta [B,H,S] fp32, d_qkv written entirely; no
// atomics, every sum in a fixed order. document_starts [B,S] or null: query i of a row sees keys
// document_starts[i] to i.
//
// A tensor map (src/cuda/attention/sm90.rs) is {D, heads, S, B}, innermost first; boxes are
// {COLUMNS, 1, 64, 1} where it is read, {COLUMNS, 1, 16, 1} where it is written, with a swizzle as
// wide as their rows. So no box reaches into another head or sequence; what lies after S is zeros
// and is not stored.
//
// A block keeps its multiprocessor to itself and takes one item after the other: 128 rows of a
// result, or 192. One thread loads the item's own rows, and through a ring of stages the rows of
// the other side; each of two or three consumers computes 64 rows of the result. Scores and what
// comes of them never leave registers: an accumulator, rounded, is the A operand of the next
// product. Backward is two kernels, one for each side that is summed over, as in attention_sm80.cu.
// attention_backward_sm90.cu and attention_backward_short_sm90.cu do it in one, where that is
// estimated to be faster.
#include "isobath.cuh"

#include "attention_sm90.cuh"

// ---------------------------------------------------------------- sizes
// Below every score, yet what a mask hides lies infinitely far below it: a row that sees nothing of
// its first tiles adds up exp(-infinity), not exp(0).
constexpr float LOWEST = -3.402823466e38f;

// Stages of a ring, and the rows of the other side in each. Products that are 128 wide read shared
// memory least; 64 is what the registers hold beside wide heads, or two results.
template <int D>
constexpr int FORWARD_STAGES = D <= 64   ? 4
                               : D <= 96 ? 3
                                         : 2;
constexpr int FORWARD_KEYS = 128;
constexpr int BACKWARD_STAGES = 3;
template <int D>
constexpr int BACKWARD_KEYS = D <= 64 ? 128 : 64;
constexpr int BACKWARD_QUERIES = 64;

// ---------------------------------------------------------------- the work
// All sequences' heads, each with `tiles` tiles of an item's rows. The heads of a section are
// walked together: what they read fits in the L2 cache.
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

// ---------------------------------------------------------------- keys that are seen
// Of `n` keys each, that the queries from `first` to before `end` see.
DEVICE Tiles keys_seen(Documents documents, int first, int end, int n) {
  const int last = min(end, documents.sequence);
  if (first >= last) return {0, 0};
  return {start_of(documents, first) / n, (last + n - 1) / n};
}
// Hides keys from queries. Of a consumer's thread, for an item of queries.
struct Mask {
  int first;       // of the consumer's queries
  int row;         // the thread's first one
  int starts[2];   // of its two rows' documents
  int last_start;  // of the consumer's last query's document
};
DEVICE Mask mask_of(Documents documents, int first) {
  const int row = first + first_row();
  return {first,
          row,
          {start_of(documents, row), start_of(documents, row + 8)},
          start_of(documents, first + MMA_M - 1)};
}
// Of N keys from `first_key` on. Those after a query's own are also those after the end of the
// sequence, for all queries that are in it.
template <int N>
DEVICE void hide(const Mask& mask, float (&scores)[N / 2], int first_key) {
  const int key = first_key + first_column();
  if (first_key + N - 1 > mask.first) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      if (key + i / 4 * 8 + i % 2 > mask.row + i / 2 % 2 * 8) scores[i] = MINUS_INFINITY;
  }
  if (first_key < mask.last_start) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      if (key + i / 4 * 8 + i % 2 < mask.starts[i / 2 % 2]) scores[i] = MINUS_INFINITY;
  }
}

// ---------------------------------------------------------------- forward
// The issue of a step's products, one consumer after the other: while one computes its softmax, the
// others' products run. Each consumer has a barrier, at which the one before it passes the turn on.
DEVICE void take_turn(int consumer) { barrier_sync(1 + consumer, 2 * WARPGROUP); }
template <class T>
DEVICE void pass_turn(int consumer) {
  barrier_arrive(1 + (consumer + 1) % T::CONSUMERS, 2 * WARPGROUP);
}

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

template <class T, int D>
DEVICE void attention_forward(const TensorMap* qkv, const TensorMap* out,
                              const int* document_starts,  // [B,S] or null
                              float* log_sum_exp,          // [B,H,S]
                              int sequence, int kv_heads, const Work& work, float scale_log2) {
  constexpr int ROWS = T::ROWS, KEYS = FORWARD_KEYS, STAGES = FORWARD_STAGES<D>;
  constexpr int OWN_BYTES = TILE_BYTES<D, ROWS>, KEY_BYTES = TILE_BYTES<D, KEYS>;
  SHARED_DYNAMIC(queries);                            // of this item and of the next
  uint8_t* const keys = queries + 2 * OWN_BYTES;      // STAGES tiles
  uint8_t* const values = keys + STAGES * KEY_BYTES;  // STAGES tiles
  uint8_t* const outs = values + STAGES * KEY_BYTES;  // OWN_BYTES
  SHARED(uint64_t, own_full, 2);
  SHARED(uint64_t, own_empty, 2);
  SHARED(uint64_t, keys_full, STAGES);
  SHARED(uint64_t, keys_empty, STAGES);
  SHARED(uint64_t, values_full, STAGES);
  SHARED(uint64_t, values_empty, STAGES);
  begin(queries);
  if (threadIdx.x == 0) {
    tma_prefetch(qkv);
    tma_prefetch(out);
    init_ring<T, 2>(own_full, own_empty, 1);
    init_ring<T, STAGES>(keys_full, keys_empty, 1);
    init_ring<T, STAGES>(values_full, values_empty, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  begin_after_previous();
  const int heads = work.heads;

  Position<2> item_at;
  Position<STAGES> at;
  if (threadIdx.x < WARPGROUP) {
    setmaxnreg_dec<T::PRODUCER_REGISTERS>();
    if (threadIdx.x >= 32 || !elect_one()) return;
    each_item<true>(work, [&](const Item& item) {
      const Documents documents = documents_of(document_starts, item.b, sequence);
      const int first = item.tile * ROWS, kv_head = item.head / (heads / kv_heads);
      const Tiles tiles = keys_seen(documents, first, first + ROWS, KEYS);
      uint64_t* const own_loaded = &own_full[item_at.stage];
      // The first round passes at once.
      mbarrier_wait(&own_empty[item_at.stage], item_at.parity ^ 1);
      mbarrier_arrive_expect_tx(own_loaded, OWN_BYTES);
      load_tile<D, ROWS>(queries + item_at.stage * OWN_BYTES, qkv, own_loaded, item.head, first,
                         item.b);
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

  setmaxnreg_inc<T::CONSUMER_REGISTERS>();
  const int consumer = warp_of_block() / 4 - 1, warp = warp_of_block() % 4;
  uint8_t* const store_tile = outs + (consumer * 4 + warp) * TILE_BYTES<D, WARP_ROWS>;
  if (consumer == T::CONSUMERS - 1) pass_turn<T>(consumer);
  each_item<true>(work, [&](const Item& item) {
    const Documents documents = documents_of(document_starts, item.b, sequence);
    const int first = item.tile * ROWS, own_first = first + consumer * MMA_M;
    const int row = own_first + first_row();
    const Tiles tiles = keys_seen(documents, first, first + ROWS, KEYS);
    const Mask mask = mask_of(documents, own_first);
    const int own_stage = item_at.stage;
    const uint8_t* const own_queries = queries + own_stage * OWN_BYTES + consumer * MMA_M * SPAN<D>;

    float scores[KEYS / 2], sums[D / 2], rescale[2];
    uint32_t weights[KEYS / MMA_K][4];
    Softmax softmax{{LOWEST, LOWEST}, {0, 0}};

    mbarrier_wait(&own_full[own_stage], item_at.parity);
    advance(item_at);
    mbarrier_wait(&keys_full[at.stage], at.parity);
    wgmma_fence();
    multiply_rows<D, ROWS, KEYS>(scores, own_queries, keys + at.stage * KEY_BYTES);
    wgmma_commit();
    wgmma_wait<0>();
    release(&keys_empty[at.stage]);
    hide<KEYS>(mask, scores, (tiles.end - 1) * KEYS);
    add_scores<KEYS>(softmax, scores, rescale, scale_log2);
    round_weights<KEYS>(weights, scores);

    // Of each step the scores, and of the step before it the weighted values.
    Position<STAGES> before = at;
    advance(at);
    if (tiles.end - tiles.first > 1) mbarrier_wait(&keys_full[at.stage], at.parity);
    for (int tile = tiles.end - 2; tile >= tiles.first; --tile) {
      take_turn(consumer);
      wgmma_fence();
      multiply_rows<D, ROWS, KEYS>(scores, own_queries, keys + at.stage * KEY_BYTES);
      wgmma_commit();
      mbarrier_wait(&values_full[before.stage], before.parity);
      wgmma_fence();  // the one above is enough, but not for ptxas, after a loop
      add_weighted_rows<D, KEYS>(sums, weights, values + before.stage * KEY_BYTES,
                                 tile < tiles.end - 2);
      wgmma_commit();
      pass_turn<T>(consumer);
      wgmma_wait<1>();
      release(&keys_empty[at.stage]);
      hide<KEYS>(mask, scores, tile * KEYS);
      add_scores<KEYS>(softmax, scores, rescale, scale_log2);
      const int values_stage = before.stage;
      before = at;
      advance(at);
      // The next step's. This is a loop, over which ptxas moves nothing: else it would wait for the
      // values above the softmax that is to hide them.
      if (tile > tiles.first) mbarrier_wait(&keys_full[at.stage], at.parity);
      wgmma_wait<0>();
      release(&values_empty[values_stage]);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) sums[i] *= rescale[i / 2 % 2];
      round_weights<KEYS>(weights, scores);
    }
    release(&own_empty[own_stage]);
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

// ---------------------------------------------------------------- backward
// With P = exp(q k^T scale - lse), dP = d_out v^T, dS = P (dP - delta):
//   d_q = scale dS k, d_k = scale dS^T q, d_v = P^T d_out, delta = row sums of out d_out.
// A stage holds two tiles of the other side. The exponents of a step are computed while its dP is
// multiplied; its last products run while the next step's scores wait for their turn.

// Stages of tiles that a consumer has nothing to do with.
template <int STAGES>
DEVICE void pass_over(Position<STAGES>& at, uint64_t* full, uint64_t* empty, int steps) {
  for (int step = 0; step < steps; ++step) {
    // Released before it is full, it would be taken for the stage of the round before.
    mbarrier_wait(&full[at.stage], at.parity);
    release(&empty[at.stage]);
    advance(at);
  }
}
// A consumer's tiles, as part of its item's.
DEVICE Tiles within(Tiles own, Tiles all) {
  const int first = min(max(own.first, all.first), all.end);
  return {first, max(first, min(own.end, all.end))};
}

// Of a thread's two queries.
struct Statistics {
  float lse_log2[2], deltas[2];
};
// Reads log_sum_exp; makes delta, of which the four lanes that share a row add up parts, and writes
// it.
template <int D>
DEVICE Statistics statistics_of(const bf16* out, const bf16* d_out, const float* log_sum_exp,
                                float* delta, const Item& item, int heads, int row, int sequence) {
  Statistics found;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at_row = row + half * 8;
    const size_t statistic = (size_t(item.b) * heads + item.head) * sequence + at_row;
    float sum = 0;
    found.lse_log2[half] = -MINUS_INFINITY;  // no probability after the end of the sequence
    if (at_row < sequence) {
      found.lse_log2[half] = log_sum_exp[statistic] * LOG2_E;
      const size_t token = size_t(item.b) * sequence + at_row;
      const size_t begin = (token * heads + item.head) * D;
#pragma unroll
      for (int i = 0; i < D; i += 4 * VALUES<bf16>) {
        const int column = i + first_column() / 2 * VALUES<bf16>;
        if (D % (4 * VALUES<bf16>) != 0 && column >= D) break;
        float o[8], d_o[8];
        unpack(*reinterpret_cast<const uint4*>(out + begin + column), o);
        unpack(*reinterpret_cast<const uint4*>(d_out + begin + column), d_o);
#pragma unroll
        for (int value = 0; value < 8; ++value) sum += o[value] * d_o[value];
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    found.deltas[half] = sum;
    if (first_column() == 0 && at_row < sequence) delta[statistic] = sum;
  }
  return found;
}

template <int D>
DEVICE void attention_backward_q(const TensorMap* qkv, const TensorMap* of_d_out,
                                 const TensorMap* d_qkv,      // the q heads of it
                                 const int* document_starts,  // [B,S] or null
                                 Angles angles,
                                 const bf16* out,           // [T,HD]
                                 const bf16* d_out,         // [T,HD]
                                 const float* log_sum_exp,  // [B,H,S]
                                 float* delta,              // [B,H,S]
                                 int sequence, int kv_heads, const Work& work, float scale,
                                 float scale_log2) {
  using T = Team<2>;
  constexpr int ROWS = T::ROWS, KEYS = BACKWARD_KEYS<D>, STAGES = BACKWARD_STAGES;
  constexpr int OWN_BYTES = TILE_BYTES<D, ROWS>, KEY_BYTES = TILE_BYTES<D, KEYS>;
  SHARED_DYNAMIC(queries);
  uint8_t* const d_outs = queries + OWN_BYTES;
  uint8_t* const stages = d_outs + OWN_BYTES;  // STAGES x (keys, values)
  uint8_t* const outs = stages + STAGES * 2 * KEY_BYTES;
  SHARED(uint64_t, own, 2);  // full, empty
  SHARED(uint64_t, full, STAGES);
  SHARED(uint64_t, empty, STAGES);
  begin(queries);
  if (threadIdx.x == 0) {
    tma_prefetch(qkv);
    tma_prefetch(of_d_out);
    tma_prefetch(d_qkv);
    init_ring<T, 1>(&own[0], &own[1], 1);
    init_ring<T, STAGES>(full, empty, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  begin_after_previous();
  const int heads = work.heads;

  Position<1> item_at;
  Position<STAGES> at;
  if (threadIdx.x < WARPGROUP) {
    setmaxnreg_dec<T::PRODUCER_REGISTERS>();
    if (threadIdx.x >= 32 || !elect_one()) return;
    each_item<true>(work, [&](const Item& item) {
      const Documents documents = documents_of(document_starts, item.b, sequence);
      const int first = item.tile * ROWS, kv_head = item.head / (heads / kv_heads);
      const Tiles tiles = keys_seen(documents, first, first + ROWS, KEYS);
      mbarrier_wait(&own[1], item_at.parity ^ 1);  // the first round passes at once
      mbarrier_arrive_expect_tx(&own[0], 2 * OWN_BYTES);
      load_tile<D, ROWS>(queries, qkv, &own[0], item.head, first, item.b);
      load_tile<D, ROWS>(d_outs, of_d_out, &own[0], item.head, first, item.b);
      advance(item_at);
      for (int tile = tiles.first; tile < tiles.end; ++tile) {
        uint8_t* const keys = stages + at.stage * 2 * KEY_BYTES;
        uint64_t* const loaded = &full[at.stage];
        mbarrier_wait(&empty[at.stage], at.parity ^ 1);
        mbarrier_arrive_expect_tx(loaded, 2 * KEY_BYTES);
        const int k_head = heads + kv_head, v_head = heads + kv_heads + kv_head;
        load_tile<D, KEYS>(keys, qkv, loaded, k_head, tile * KEYS, item.b);
        load_tile<D, KEYS>(keys + KEY_BYTES, qkv, loaded, v_head, tile * KEYS, item.b);
        advance(at);
      }
    });
    return;
  }

  setmaxnreg_inc<T::CONSUMER_REGISTERS>();
  const int consumer = warp_of_block() / 4 - 1, warp = warp_of_block() % 4;
  const uint8_t* const own_queries = queries + consumer * MMA_M * SPAN<D>;
  const uint8_t* const own_d_outs = d_outs + consumer * MMA_M * SPAN<D>;
  uint8_t* const store_tile = outs + (consumer * 4 + warp) * TILE_BYTES<D, WARP_ROWS>;
  each_item<true>(work, [&](const Item& item) {
    const Documents documents = documents_of(document_starts, item.b, sequence);
    const int first = item.tile * ROWS, own_first = first + consumer * MMA_M;
    const int row = own_first + first_row();
    const Tiles all = keys_seen(documents, first, first + ROWS, KEYS);
    const Tiles tiles = within(keys_seen(documents, own_first, own_first + MMA_M, KEYS), all);
    const Mask mask = mask_of(documents, own_first);

    float scores[KEYS / 2], d_scores[KEYS / 2], d_q[D / 2];
    uint32_t weights[KEYS / MMA_K][4];
    Statistics rows{};
    int before = 0;
    mbarrier_wait(&own[0], item_at.parity);
    advance(item_at);
    pass_over(at, full, empty, tiles.first - all.first);
    if (tiles.first < tiles.end) mbarrier_wait(&full[at.stage], at.parity);
    for (int tile = tiles.first; tile < tiles.end; ++tile) {
      const uint8_t* const keys = stages + at.stage * 2 * KEY_BYTES;
      wgmma_fence();
      multiply_rows<D, ROWS, KEYS>(scores, own_queries, keys);
      wgmma_commit();
      if (tile == tiles.first) {  // while the scores are multiplied
        rows = statistics_of<D>(out, d_out, log_sum_exp, delta, item, heads, row, sequence);
        wgmma_fence();  // the one above is enough, but not for ptxas, after a branch
      }
      multiply_rows<D, ROWS, KEYS>(d_scores, own_d_outs, keys + KEY_BYTES);
      wgmma_commit();
      wgmma_wait<1>();
      if (tile > tiles.first) release(&empty[before]);
      hide<KEYS>(mask, scores, tile * KEYS);
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i)
        scores[i] = exp2_approx(scores[i] * scale_log2 - rows.lse_log2[i / 2 % 2]);
      before = at.stage;
      advance(at);
      // The next step's, here because ptxas would otherwise wait for dP above the exponents.
      if (tile + 1 < tiles.end) mbarrier_wait(&full[at.stage], at.parity);
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i)
        d_scores[i] = scores[i] * (d_scores[i] - rows.deltas[i / 2 % 2]);
      round_weights<KEYS>(weights, d_scores);
      wgmma_fence();
      add_weighted_rows<D, KEYS>(d_q, weights, keys, tile > tiles.first);
      wgmma_commit();
    }
    release(&own[1]);
    wgmma_wait<0>();
    if (tiles.first < tiles.end) release(&empty[before]);
    pass_over(at, full, empty, all.end - tiles.end);
    const float scales[2] = {scale, scale};
    rotate_back<D>(d_q, angles, own_first, item.b, sequence);
    store_rows<D>(d_qkv, store_tile, d_q, scales, item.head, own_first + warp * WARP_ROWS, item.b,
                  sequence);
  });
  if (threadIdx.x % 32 == 0) bulk_wait<0>();
}

template <int D>
DEVICE void attention_backward_kv(const TensorMap* qkv, const TensorMap* d_out,
                                  const TensorMap* d_qkv,      // the k and v heads of it
                                  const int* document_starts,  // [B,S] or null
                                  Angles angles,
                                  const float* log_sum_exp,  // [B,H,S]
                                  const float* delta,        // [B,H,S]
                                  int sequence, int heads, const Work& work, float scale,
                                  float scale_log2) {
  using T = Team<2>;
  constexpr int ROWS = T::ROWS, QUERIES = BACKWARD_QUERIES, STAGES = BACKWARD_STAGES;
  constexpr int OWN_BYTES = TILE_BYTES<D, ROWS>, QUERY_BYTES = TILE_BYTES<D, QUERIES>;
  SHARED_DYNAMIC(keys);
  uint8_t* const values = keys + OWN_BYTES;
  uint8_t* const stages = values + OWN_BYTES;  // STAGES x (queries, d_out)
  uint8_t* const outs = stages + STAGES * 2 * QUERY_BYTES;
  constexpr int STATISTICS = STAGES * QUERIES;  // of the stages' queries, read in pairs
  SHARED(float2, lses_log2, STATISTICS / 2);
  SHARED(float2, deltas, STATISTICS / 2);
  SHARED(int, starts, STATISTICS);
  SHARED(uint64_t, own, 2);  // full, empty
  SHARED(uint64_t, full, STAGES);
  SHARED(uint64_t, empty, STAGES);
  begin(keys);
  if (threadIdx.x == 0) {
    tma_prefetch(qkv);
    tma_prefetch(d_out);
    tma_prefetch(d_qkv);
    init_ring<T, 1>(&own[0], &own[1], 1);
    init_ring<T, STAGES>(full, empty, 1 + 32);  // the tiles, and each lane's statistics
    fence_mbarrier_init();
  }
  __syncthreads();
  begin_after_previous();
  const int kv_heads = work.heads, group = heads / kv_heads;

  Position<1> item_at;
  Position<STAGES> at;
  if (threadIdx.x < WARPGROUP) {
    setmaxnreg_dec<T::PRODUCER_REGISTERS>();
    // Tiles of queries from the diagonal on, for one query head after the other.
    const auto each_stage = [&](const Item& item, const auto& load) {
      const Documents documents = documents_of(document_starts, item.b, sequence);
      const int first = item.tile * ROWS;
      const Tiles tiles = queries_seeing(documents, first, first + ROWS, QUERIES);
      for (int head = item.head * group; head < (item.head + 1) * group; ++head)
        for (int tile = tiles.first; tile < tiles.end; ++tile) {
          mbarrier_wait(&empty[at.stage], at.parity ^ 1);  // the first round passes at once
          load(documents, head, tile * QUERIES);
          advance(at);
        }
    };
    if (threadIdx.x < 32 && elect_one()) {
      each_item<false>(work, [&](const Item& item) {
        const int first = item.tile * ROWS;
        const int k_head = heads + item.head, v_head = heads + kv_heads + item.head;
        mbarrier_wait(&own[1], item_at.parity ^ 1);
        mbarrier_arrive_expect_tx(&own[0], 2 * OWN_BYTES);
        load_tile<D, ROWS>(keys, qkv, &own[0], k_head, first, item.b);
        load_tile<D, ROWS>(values, qkv, &own[0], v_head, first, item.b);
        advance(item_at);
        each_stage(item, [&](Documents, int head, int first_query) {
          uint8_t* const queries = stages + at.stage * 2 * QUERY_BYTES;
          uint64_t* const loaded = &full[at.stage];
          mbarrier_arrive_expect_tx(loaded, 2 * QUERY_BYTES);
          load_tile<D, QUERIES>(queries, qkv, loaded, head, first_query, item.b);
          load_tile<D, QUERIES>(queries + QUERY_BYTES, d_out, loaded, head, first_query, item.b);
        });
      });
    } else if (threadIdx.x / 32 == 1) {
      each_item<false>(work, [&](const Item& item) {
        each_stage(item, [&](Documents documents, int head, int first_query) {
          const size_t statistics = (size_t(item.b) * heads + head) * sequence;
#pragma unroll 1
          for (int i = int(threadIdx.x) % 32; i < QUERIES; i += 32) {
            const int query = first_query + i, to = at.stage * QUERIES + i;
            const bool exists = query < sequence;
            // No probability after the end of the sequence.
            reinterpret_cast<float*>(lses_log2)[to] =
                exists ? log_sum_exp[statistics + query] * LOG2_E : -MINUS_INFINITY;
            reinterpret_cast<float*>(deltas)[to] = exists ? delta[statistics + query] : 0;
            starts[to] = start_of(documents, query);
          }
          mbarrier_arrive(&full[at.stage]);
        });
      });
    }
    return;
  }

  setmaxnreg_inc<T::CONSUMER_REGISTERS>();
  const int consumer = warp_of_block() / 4 - 1, warp = warp_of_block() % 4;
  const uint8_t* const own_keys = keys + consumer * MMA_M * SPAN<D>;
  const uint8_t* const own_values = values + consumer * MMA_M * SPAN<D>;
  uint8_t* const store_tile = outs + (consumer * 4 + warp) * TILE_BYTES<D, WARP_ROWS>;
  each_item<false>(work, [&](const Item& item) {
    const Documents documents = documents_of(document_starts, item.b, sequence);
    const int first = item.tile * ROWS, own_first = first + consumer * MMA_M;
    const int key = own_first + first_row();
    const Tiles all = queries_seeing(documents, first, first + ROWS, QUERIES);
    const Tiles tiles =
        within(queries_seeing(documents, own_first, own_first + MMA_M, QUERIES), all);

    float scores[QUERIES / 2], d_scores[QUERIES / 2];  // transposed: [keys,queries]
    float d_k[D / 2], d_v[D / 2];
    uint32_t weights[QUERIES / MMA_K][4], d_weights[QUERIES / MMA_K][4];
    bool added = false;
    mbarrier_wait(&own[0], item_at.parity);
    advance(item_at);
    for (int member = 0; member < group; ++member) {
      int before = 0;
      pass_over(at, full, empty, tiles.first - all.first);
      if (tiles.first < tiles.end) mbarrier_wait(&full[at.stage], at.parity);
      for (int tile = tiles.first; tile < tiles.end; ++tile) {
        const uint8_t* const queries = stages + at.stage * 2 * QUERY_BYTES;
        const uint8_t* const d_outs = queries + QUERY_BYTES;
        const int first_statistic = at.stage * QUERIES + first_column();
        wgmma_fence();
        multiply_rows<D, ROWS, QUERIES>(scores, own_keys, queries);
        wgmma_commit();
        multiply_rows<D, ROWS, QUERIES>(d_scores, own_values, d_outs);
        wgmma_commit();
        wgmma_wait<1>();
        if (tile > tiles.first) release(&empty[before]);
        const int first_query = tile * QUERIES;
        if (first_query < own_first + MMA_M - 1 ||
            starts[at.stage * QUERIES + QUERIES - 1] > own_first) {
#pragma unroll
          for (int i = 0; i < QUERIES / 2; ++i) {
            const int column = i / 4 * 8 + i % 2, own_key = key + i / 2 % 2 * 8;
            const int start = starts[first_statistic + column];
            if ((own_key > first_query + first_column() + column) | (own_key < start))
              scores[i] = MINUS_INFINITY;
          }
        }
#pragma unroll
        for (int i = 0; i < QUERIES / 2; i += 4) {
          const float2 lse = lses_log2[(first_statistic + i / 4 * 8) / 2];
#pragma unroll
          for (int j = i; j < i + 4; ++j)
            scores[j] = exp2_approx(scores[j] * scale_log2 - (j % 2 ? lse.y : lse.x));
        }
        before = at.stage;
        advance(at);
        // The next step's, here because ptxas would otherwise wait for dP above the exponents.
        if (tile + 1 < tiles.end) mbarrier_wait(&full[at.stage], at.parity);
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < QUERIES / 2; i += 4) {
          const float2 row_sums = deltas[(first_statistic + i / 4 * 8) / 2];
#pragma unroll
          for (int j = i; j < i + 4; ++j)
            d_scores[j] = scores[j] * (d_scores[j] - (j % 2 ? row_sums.y : row_sums.x));
        }
        round_weights<QUERIES>(weights, scores);
        round_weights<QUERIES>(d_weights, d_scores);
        wgmma_fence();
        add_weighted_rows<D, QUERIES>(d_v, weights, d_outs, added);
        add_weighted_rows<D, QUERIES>(d_k, d_weights, queries, added);
        wgmma_commit();
        if constexpr (D > 96) wgmma_wait<0>();  // there are no registers for the next step's scores
        added = true;
      }
      wgmma_wait<0>();
      if (tiles.first < tiles.end) release(&empty[before]);
      pass_over(at, full, empty, all.end - tiles.end);
    }
    release(&own[1]);
    const float scales[2] = {scale, scale}, ones[2] = {1, 1};
    const int row = own_first + warp * WARP_ROWS;
    wgmma_wait<0>();  // for ptxas, which does not see that the last one was enough
    rotate_back<D>(d_k, angles, own_first, item.b, sequence);
    store_rows<D>(d_qkv, store_tile, d_k, scales, heads + item.head, row, item.b, sequence);
    store_rows<D>(d_qkv, store_tile, d_v, ones, heads + kv_heads + item.head, row, item.b,
                  sequence);
  });
  if (threadIdx.x % 32 == 0) bulk_wait<0>();
}

// ---------------------------------------------------------------- kernels
// Their names end in an item's rows and the head dim.
DEVICE Work work_of(int batch, int heads, int section, int sequence, int rows) {
  return {heads, batch * heads, section, (sequence + rows - 1) / rows};
}

#define FORWARD_KERNEL(rows, d)                                                                  \
  KERNEL(attention_forward_sm90_##rows##x##d, Team<rows / MMA_M>::THREADS, 1)                    \
  (const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap out,                 \
   const int* document_starts, float* log_sum_exp, int batch, int sequence, int heads,           \
   int kv_heads, int section, float scale_log2) {                                                \
    const Work work = work_of(batch, heads, section, sequence, rows);                            \
    attention_forward<Team<rows / MMA_M>, d>(&qkv, &out, document_starts, log_sum_exp, sequence, \
                                             kv_heads, work, scale_log2);                        \
  }                                                                                              \
  EXPORT_KERNEL(attention_forward_sm90_##rows##x##d)
#define BACKWARD_KERNELS(d)                                                                     \
  KERNEL(attention_backward_q_sm90_128x##d, Team<2>::THREADS, 1)                                \
  (const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap of_d_out,           \
   const __grid_constant__ TensorMap d_qkv, const int* document_starts, const float* table,     \
   const int* positions, const bf16* out, const bf16* d_out, const float* log_sum_exp,          \
   float* delta, int batch, int sequence, int heads, int kv_heads, int section, float scale,    \
   float scale_log2) {                                                                          \
    const Work work = work_of(batch, heads, section, sequence, 128);                            \
    attention_backward_q<d>(&qkv, &of_d_out, &d_qkv, document_starts, Angles{table, positions}, \
                            out, d_out, log_sum_exp, delta, sequence, kv_heads, work, scale,    \
                            scale_log2);                                                        \
  }                                                                                             \
  EXPORT_KERNEL(attention_backward_q_sm90_128x##d)                                              \
  KERNEL(attention_backward_kv_sm90_128x##d, Team<2>::THREADS, 1)                               \
  (const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap d_out,              \
   const __grid_constant__ TensorMap d_qkv, const int* document_starts, const float* table,     \
   const int* positions, const float* log_sum_exp, const float* delta, int batch, int sequence, \
   int heads, int kv_heads, int section, float scale, float scale_log2) {                       \
    const Work work = work_of(batch, kv_heads, section, sequence, 128);                         \
    attention_backward_kv<d>(&qkv, &d_out, &d_qkv, document_starts, Angles{table, positions},   \
                             log_sum_exp, delta, sequence, heads, work, scale, scale_log2);     \
  }                                                                                             \
  EXPORT_KERNEL(attention_backward_kv_sm90_128x##d)

FORWARD_KERNEL(128, 32)
FORWARD_KERNEL(128, 48)
FORWARD_KERNEL(128, 64)
FORWARD_KERNEL(128, 96)
FORWARD_KERNEL(128, 128)
FORWARD_KERNEL(192, 32)
FORWARD_KERNEL(192, 48)
FORWARD_KERNEL(192, 64)
BACKWARD_KERNELS(32)
BACKWARD_KERNELS(48)
BACKWARD_KERNELS(64)
BACKWARD_KERNELS(96)
BACKWARD_KERNELS(128)
