// Causal attention on Hopper, backward in one pass: five products for each pair of tiles, where the
// two kernels of attention_sm90.cu take seven. Formulas, contract and tensor maps are theirs; d_k
// and d_v are written through the map, d_q by ordinary stores.
//
// An item is 128 keys of one head. Its queries come through a ring of stages, the query heads of
// its group one after the other, from the diagonal on. Two consumers have 64 keys each and keep
// their d_k and d_v in registers. dS of both goes to shared memory, from where each multiplies it
// by one half of the columns of all 128 keys: a part of d_q, which is added to those of other items
// in `sums` (fp32, in the order of accumulators, so that a tile is one copy).
//
// The items of a head are a team's: `team` blocks, resident together, that deal the tiles of keys
// among them, the last ones first. To a tile of queries its diagonal adds first, then each tile of
// keys before it: as all blocks of a team walk from their diagonals at the same speed, that is
// the order in which they come, and nobody waits long. `semaphores` hold that order, whatever the
// speed: the same bits each time. When a tile is complete, one of two warps that do nothing else
// makes d_q of it and gives its place to the team's next head. If the order is not asked for, the
// diagonal is still first, and the others add when they come.
#include "isobath.cuh"

#include "attention_sm90.cuh"

// ---------------------------------------------------------------- sizes
using T = Team<2>;
constexpr int KEYS = T::ROWS, QUERIES = 64;
constexpr int QUERY_TILES = KEYS / QUERIES;  // in a tile of keys
template <int D>
constexpr int STAGES = D <= 64 ? 3 : 2;
// d_v is multiplied while dS is computed, by P as it was rounded for that product where there are
// no registers to keep it in fp32.
template <int D>
constexpr bool D_SCORES_OF_ROUNDED = D > 64;
// Two warps of the producer's compute, so that it needs more than in the other kernels.
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
// dS [keys,queries] of an item and a tile of queries.
constexpr int D_SCORES_BYTES = TILE_BYTES<QUERIES, KEYS>;
// d_q of a tile of queries, fp32.
template <int D>
constexpr int SUMS = QUERIES * D;

// ---------------------------------------------------------------- the work
// In shared memory: in registers it would cost each role what it needs for other things.
struct Work {
  int heads, kv_heads, group;  // of one sequence; query heads for one of k and v
  int sequence;
  int units;  // heads of k and v of all sequences
  int key_tiles, query_tiles;
  int team, member;       // blocks that share a head, and which one this is
  int first_unit, teams;  // a team's units are `teams` apart
  int first_place;        // of the team, in `sums` and `semaphores`
  bool in_order;          // tiles of keys add one after the other
};
// A head of k and v with its group of query heads, as the `round`-th one of this block's team.
struct Unit {
  int b, kv_head;
  uint32_t round;
};

DEVICE Work work_of(int batch, int sequence, int heads, int kv_heads, int team, bool in_order) {
  const int key_tiles = (sequence + KEYS - 1) / KEYS;
  const int query_tiles = (sequence + QUERIES - 1) / QUERIES;
  const int group = heads / kv_heads, index = int(blockIdx.x) / team;
  return {heads,
          kv_heads,
          group,
          sequence,
          batch * kv_heads,
          key_tiles,
          query_tiles,
          team,
          int(blockIdx.x) % team,
          index,
          int(gridDim.x) / team,
          index * group * query_tiles,
          in_order};
}

// Each head of this block's team.
template <class Finish>
DEVICE void each_unit(const Work& work, const Finish& finish) {
  uint32_t round = 0;
  for (int unit = work.first_unit; unit < work.units; unit += work.teams)
    finish(Unit{unit / work.kv_heads, unit % work.kv_heads, round++});
}
// Each tile of keys of this block: the team takes them from the last, which has the fewest queries,
// to the first, every second round of blocks in the opposite order.
template <class Finish>
DEVICE void each_item(const Work& work, const Finish& finish) {
  each_unit(work, [&](const Unit& unit) {
    for (int round = 0; round * work.team < work.key_tiles; ++round) {
      const int turn = round % 2 ? work.team - 1 - work.member : work.member;
      const int place = round * work.team + turn;
      if (place < work.key_tiles) finish(unit, work.key_tiles - 1 - place);
    }
  });
}

// ---------------------------------------------------------------- sums of d_q
// A team has a place in `sums` and in `semaphores` for each tile of queries of each head of its
// group. What a semaphore is when so many tiles of keys have been added for the round's head; 0:
// free for it.
DEVICE uint32_t state_of(uint32_t round, int added) { return round << 16 | uint32_t(added); }

// By one thread: whether the place is in this state, with all that was done before; with
// `at_least_one` in any after the diagonal, which stores where the others add.
DEVICE bool has_state(const uint32_t* semaphore, uint32_t state, bool at_least_one = false) {
  const uint32_t now = load_acquire(semaphore);
  return at_least_one ? now >> 16 == state >> 16 && now % (1 << 16) > 0 : now == state;
}
DEVICE void await_state(const uint32_t* semaphore, uint32_t state, bool at_least_one = false) {
  while (!has_state(semaphore, state, at_least_one)) __nanosleep(32);
}

// d_q of the place's tile, by one warp: the accumulators of each of a consumer's warps hold 16
// rows, and in each 8 columns of them a thread has two of two rows. The other consumer has the
// columns D/2 further: the other half of rotary pairs.
template <int D>
DEVICE void finish_tile(const float* sums, bf16* d_q,  // both of the tile's first row
                        size_t row_stride, int rows, Angles angles, const int* positions,
                        float scale) {
  constexpr int EIGHTS = D / 2 / 8;
  const int lane = int(threadIdx.x) % 32, row_in_eight = lane / 4;
  // Of this lane's rows, asked for at once: each would cost a round trip of its own.
  int upper = 0, lower = 0;
  if (angles.table) {
    upper = positions[min(lane, rows - 1)];
    lower = positions[min(lane + 32, rows - 1)];
  }
#pragma unroll 1
  for (int eight = 0; eight < QUERIES / 8; ++eight) {
    const int row = eight * 8 + row_in_eight;
    const int position = __shfl_sync(0xffffffffu, eight < 4 ? upper : lower, row % 32);
    if (row >= rows) continue;
    const float* const own = sums + eight / 2 * EIGHTS * 128 + lane * 4 + eight % 2 * 2;
    bf16* const to = d_q + row * row_stride + first_column();
    const float* of_row = nullptr;
    if (angles.table) of_row = angles.table + size_t(position) * D + first_column();
#pragma unroll 4
    for (int n = 0; n < EIGHTS; ++n) {
      const float2 x = *reinterpret_cast<const float2*>(own + n * 128);
      const float2 y = *reinterpret_cast<const float2*>(own + SUMS<D> / 2 + n * 128);
      float2 cosines = make_float2(1, 1), sines = make_float2(0, 0);
      if (of_row) {
        cosines = *reinterpret_cast<const float2*>(of_row + 8 * n);
        sines = *reinterpret_cast<const float2*>(of_row + 8 * n + D / 2);
      }
      *reinterpret_cast<uint32_t*>(to + 8 * n) = pack_bf16(
          (x.x * cosines.x + y.x * sines.x) * scale, (x.y * cosines.y + y.y * sines.y) * scale);
      *reinterpret_cast<uint32_t*>(to + 8 * n + D / 2) = pack_bf16(
          (y.x * cosines.x - x.x * sines.x) * scale, (y.y * cosines.y - x.y * sines.y) * scale);
    }
  }
}

// A consumer's 64 keys, or their values, as A of its products: for a whole item in registers, where
// they have room. An A and a B of 64 columns from shared memory take all of its bandwidth.
template <int D>
constexpr bool HELD = D <= 64;
template <int D>
struct Held {
  uint32_t parts[HELD<D> ? D / MMA_K : 1][4];
};
template <int D>
DEVICE void hold(Held<D>& held, const uint8_t* own) {
  if constexpr (HELD<D>) {
    const int lane = int(threadIdx.x) % 32, row = warp_of_block() % 4 * WARP_ROWS + lane % 16;
#pragma unroll
    for (int k = 0; k < D / MMA_K; ++k) {
      const int column = k * MMA_K + lane / 16 * 8;
      const uint32_t offset = row * SPAN<D> + column * int(sizeof(bf16));
      ldmatrix_x4(held.parts[k], own + swizzle<SPAN<D>>(offset));
    }
  }
}
template <int D>
DEVICE void multiply_own(float (&scores)[QUERIES / 2], const Held<D>& held, const uint8_t* own,
                         const uint8_t* rows) {
  if constexpr (HELD<D>) {
#pragma unroll
    for (int k = 0; k < D; k += MMA_K)
      wgmma<QUERIES>(scores, held.parts[k / MMA_K], along<D, QUERIES>(rows, k), k > 0);
  } else {
    multiply_rows<D, KEYS, QUERIES>(scores, own, rows);
  }
}

// ---------------------------------------------------------------- a block
// Arguments of the kernel.
struct Pass {
  const TensorMap *qkv, *d_out, *d_kv;  // the last one of d_qkv
  const int* document_starts;           // [B,S] or null
  Angles angles;
  const float *log_sum_exp, *delta;  // [B,H,S]
  bf16* d_qkv;                       // [T,(H+2K)D]
  float* sums;                       // [teams,H/K,query tiles,64,D]
  uint32_t* semaphores;              // [teams,H/K,query tiles], all 0
  int sequence;
  float scale, scale_log2;
};

// What the warps of a block share.
template <int D>
struct Shared {
  static constexpr int OWN_BYTES = TILE_BYTES<D, KEYS>, QUERY_BYTES = TILE_BYTES<D, QUERIES>;
  static constexpr int SUMS_BYTES = SUMS<D> * int(sizeof(float));
  static constexpr int STATISTICS = STAGES<D> * QUERIES;  // of the stages' queries
  uint8_t *keys, *values;                                 // of an item
  uint8_t* stages;                                        // (queries, d_out) each
  uint8_t* d_scores_tiles;                                // two
  uint8_t* part;                                          // of d_q
  uint8_t* outs;                                          // a tile for each of the consumers' warps
  float2 *lses_log2, *deltas;                             // read in pairs
  int* starts;
  const Work& work;
  uint64_t *own, *sent;    // full, empty: the item's keys and values; the part
  uint64_t *full, *empty;  // of the stages
};
template <int D>
DEVICE uint8_t* queries_in(const Shared<D>& shared, int stage) {
  return shared.stages + stage * 2 * Shared<D>::QUERY_BYTES;
}
template <int D>
DEVICE uint8_t* d_outs_in(const Shared<D>& shared, int stage) {
  return queries_in(shared, stage) + Shared<D>::QUERY_BYTES;
}

// Each tile of queries of an item, from the diagonal on, for one query head after the other.
template <class Finish>
DEVICE void each_step(const Pass& pass, const Work& work, const Unit& unit, int key_tile,
                      const Finish& finish) {
  const Documents documents = documents_of(pass.document_starts, unit.b, work.sequence);
  const int first = key_tile * KEYS;
  const Tiles tiles = queries_seeing(documents, first, first + KEYS, QUERIES);
  for (int head = unit.kv_head * work.group; head < (unit.kv_head + 1) * work.group; ++head)
    for (int tile = tiles.first; tile < tiles.end; ++tile) finish(documents, head, tile);
}

// ---------------------------------------------------------------- the producer's warps
// By a warp: keys and values of each item; queries, d_out and statistics of each step.
template <int D>
DEVICE void load_items(const Pass& pass, const Shared<D>& shared) {
  const Work& work = shared.work;
  const int lane = int(threadIdx.x) % 32;
  const bool loads = elect_one();
  Position<1> item_at;
  Position<STAGES<D>> at;
  each_item(work, [&](const Unit& unit, int key_tile) {
    const int first = key_tile * KEYS;
    const int k_head = work.heads + unit.kv_head, v_head = k_head + work.kv_heads;
    if (loads) {
      uint64_t* const loaded = &shared.own[0];
      mbarrier_wait(&shared.own[1], item_at.parity ^ 1);  // the first round passes at once
      mbarrier_arrive_expect_tx(loaded, 2 * Shared<D>::OWN_BYTES);
      load_tile<D, KEYS>(shared.keys, pass.qkv, loaded, k_head, first, unit.b);
      load_tile<D, KEYS>(shared.values, pass.qkv, loaded, v_head, first, unit.b);
    }
    advance(item_at);
    each_step(pass, work, unit, key_tile, [&](Documents documents, int head, int tile) {
      uint64_t* const loaded = &shared.full[at.stage];
      mbarrier_wait(&shared.empty[at.stage], at.parity ^ 1);
      if (loads) {
        const int query = tile * QUERIES;
        mbarrier_arrive_expect_tx(loaded, 2 * Shared<D>::QUERY_BYTES);
        load_tile<D, QUERIES>(queries_in(shared, at.stage), pass.qkv, loaded, head, query, unit.b);
        load_tile<D, QUERIES>(d_outs_in(shared, at.stage), pass.d_out, loaded, head, query, unit.b);
      }
      const size_t statistics = (size_t(unit.b) * work.heads + head) * work.sequence;
#pragma unroll
      for (int i = lane; i < QUERIES; i += 32) {
        const int query = tile * QUERIES + i, to = at.stage * QUERIES + i;
        const bool exists = query < work.sequence;
        // No probability after the end of the sequence.
        reinterpret_cast<float*>(shared.lses_log2)[to] =
            exists ? pass.log_sum_exp[statistics + query] * LOG2_E : -MINUS_INFINITY;
        reinterpret_cast<float*>(shared.deltas)[to] = exists ? pass.delta[statistics + query] : 0;
        shared.starts[to] = start_of(documents, query);
      }
      mbarrier_arrive(loaded);
      advance(at);
    });
  });
}

// By one thread: adds each step's part of d_q to its sums. A part is complete long after it was
// sent: its semaphore is released when the next one has been asked for, and before anything is
// waited for.
template <int D>
DEVICE void add_parts(const Pass& pass, const Shared<D>& shared) {
  const Work& work = shared.work;
  Position<1> part_at;
  uint32_t* sent_semaphore = nullptr;
  uint32_t next_state = 0;
  const auto release_sent = [&] {
    if (!sent_semaphore) return;
    bulk_wait<0>();
    fence_proxy_async_global();
    if (work.in_order) {
      store_release(sent_semaphore, next_state);
    } else {
      __threadfence();
      atomicAdd(sent_semaphore, 1u);
    }
    sent_semaphore = nullptr;
  };
  each_item(work, [&](const Unit& unit, int key_tile) {
    each_step(pass, work, unit, key_tile, [&](Documents, int head, int tile) {
      const int member = head - unit.kv_head * work.group, added = tile / QUERY_TILES - key_tile;
      const int place = work.first_place + member * work.query_tiles + tile;
      float* const sum = pass.sums + size_t(place) * SUMS<D>;
      uint32_t* const semaphore = &pass.semaphores[place];
      const uint32_t state = state_of(unit.round, added);
      const bool any_order = !work.in_order && added > 0;
      const bool free = has_state(semaphore, state, any_order);
      release_sent();
      if (!free) await_state(semaphore, state, any_order);
      mbarrier_wait(&shared.sent[0], part_at.parity);
      fence_proxy_async_global();
      if (added == 0)
        bulk_store(sum, shared.part, Shared<D>::SUMS_BYTES);
      else
        bulk_reduce_add_f32(sum, shared.part, Shared<D>::SUMS_BYTES);
      bulk_commit();
      bulk_wait_read<0>();
      mbarrier_arrive(&shared.sent[1]);
      advance(part_at);
      sent_semaphore = semaphore;
      next_state = state + 1;
    });
    release_sent();
  });
}

// By one of two warps: d_q of every tile of queries whose sums are complete.
template <int D>
DEVICE void finish_tiles(const Pass& pass, const Work& work, int finisher_of_block) {
  const int lane = int(threadIdx.x) % 32;
  const int finishers = 2 * work.team, finisher = 2 * work.member + finisher_of_block;
  each_unit(work, [&](const Unit& unit) {
    const Documents documents = documents_of(pass.document_starts, unit.b, work.sequence);
    for (int i = finisher; i < work.group * work.query_tiles; i += finishers) {
      const int tile = i % work.query_tiles, first = tile * QUERIES;
      const int head = unit.kv_head * work.group + i / work.query_tiles;
      const int added = tile / QUERY_TILES - start_of(documents, first) / KEYS + 1;
      uint32_t* const semaphore = &pass.semaphores[work.first_place + i];
      if (lane == 0) await_state(semaphore, state_of(unit.round, added));
      __syncwarp();
      const size_t token = size_t(unit.b) * work.sequence + first;
      const size_t stride = size_t(work.heads + 2 * work.kv_heads) * D;
      finish_tile<D>(pass.sums + size_t(work.first_place + i) * SUMS<D>,
                     pass.d_qkv + token * stride + head * D, stride, work.sequence - first,
                     pass.angles, pass.angles.positions + token, pass.scale);
      __syncwarp();
      if (lane == 0) store_release(semaphore, state_of(unit.round + 1, 0));
    }
  });
}

// ---------------------------------------------------------------- a consumer
// By 128 threads: d_k and d_v of 64 keys of each item, and parts of d_q.
template <int D>
DEVICE void consume_items(const Pass& pass, const Shared<D>& shared) {
  const Work& work = shared.work;
  Position<1> item_at, part_at;
  Position<STAGES<D>> at;
  const int consumer = warp_of_block() / 4 - 1, warp = warp_of_block() % 4;
  const int lane = int(threadIdx.x) % 32;
  const uint8_t* const own_keys = shared.keys + consumer * MMA_M * SPAN<D>;
  const uint8_t* const own_values = shared.values + consumer * MMA_M * SPAN<D>;
  // The columns of d_q that are this consumer's, of the keys.
  constexpr int HALF = D / 2;
  static_assert(COLUMNS<D> % HALF == 0);
  const int column = consumer * HALF;
  const uint8_t* const key_columns =
      shared.keys + column / COLUMNS<D> * KEYS * SPAN<D> + column % COLUMNS<D> * int(sizeof(bf16));
  float4* const own_part =
      reinterpret_cast<float4*>(shared.part) + (consumer * 4 + warp) * (HALF / 8) * 32 + lane;
  uint8_t* const store_tile = shared.outs + (consumer * 4 + warp) * TILE_BYTES<D, WARP_ROWS>;
  // In a tile of dS; columns of 32 bytes follow by xor, as they are bits that the rows are not in.
  const uint32_t in_d_scores = swizzle<SPAN<QUERIES>>(
      (consumer * MMA_M + warp * WARP_ROWS + lane % 16) * SPAN<QUERIES> + lane / 16 * 16);
  each_item(work, [&](const Unit& unit, int key_tile) {
    const Documents documents = documents_of(pass.document_starts, unit.b, pass.sequence);
    const int first = key_tile * KEYS, own_first = first + consumer * MMA_M;
    const int key = own_first + first_row();
    const Tiles tiles = queries_seeing(documents, first, first + KEYS, QUERIES);
    const int steps = work.group * (tiles.end - tiles.first);

    float scores[QUERIES / 2], d_scores[QUERIES / 2];  // transposed: [keys,queries]
    float d_k[D / 2], d_v[D / 2], d_q[HALF / 2];
    uint32_t weights[QUERIES / MMA_K][4], d_weights[QUERIES / MMA_K][4];
    int tile = tiles.first, d_scores_tile = 0;
    Held<D> held_keys, held_values;
    const auto multiply_scores = [&] {
      mbarrier_wait(&shared.full[at.stage], at.parity);
      wgmma_fence();
      multiply_own<D>(scores, held_keys, own_keys, queries_in(shared, at.stage));
      wgmma_commit();
    };
    // From scores to dS in shared memory, and products for d_v and d_k.
    const auto differentiate = [&](bool add) {
      const uint8_t *const queries = queries_in(shared, at.stage), *const d_outs =
                                                                       d_outs_in(shared, at.stage);
      const int first_statistic = at.stage * QUERIES + first_column();
      wgmma_fence();  // the one of the scores is enough, but not for ptxas, after a loop
      multiply_own<D>(d_scores, held_values, own_values, d_outs);
      wgmma_commit();
      const int first_query = tile * QUERIES;
      if (first_query < own_first + MMA_M - 1 ||
          shared.starts[at.stage * QUERIES + QUERIES - 1] > own_first) {
#pragma unroll
        for (int i = 0; i < QUERIES / 2; ++i) {
          const int query = i / 4 * 8 + i % 2, own_key = key + i / 2 % 2 * 8;
          const int start = shared.starts[first_statistic + query];
          if ((own_key > first_query + first_column() + query) | (own_key < start))
            scores[i] = MINUS_INFINITY;
        }
      }
      // d_v by halves: its first products run under the second half's exponents.
      constexpr int HALVES = 2, VALUES = QUERIES / 2 / HALVES;
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const int begin = half * VALUES, end = begin + VALUES;
#pragma unroll
        for (int i = begin; i < end; i += 4) {
          const float2 lse = shared.lses_log2[(first_statistic + i / 4 * 8) / 2];
#pragma unroll
          for (int j = i; j < i + 4; ++j)
            scores[j] = exp2_approx(scores[j] * pass.scale_log2 - (j % 2 ? lse.y : lse.x));
          weights[i / 8][i / 4 % 2 * 2] = pack_bf16(scores[i], scores[i + 1]);
          weights[i / 8][i / 4 % 2 * 2 + 1] = pack_bf16(scores[i + 2], scores[i + 3]);
        }
        wgmma_fence();
#pragma unroll
        for (int k = 2 * begin; k < 2 * end; k += MMA_K)
          wgmma<D, 1>(d_v, weights[k / MMA_K], across<D, QUERIES>(d_outs, k), add || k > 0);
        wgmma_commit();
      }
      // The part of the step before has left its place. Here because ptxas would otherwise wait for
      // dP above the exponents: it moves little over a loop.
      mbarrier_wait(&shared.sent[1], part_at.parity ^ 1);
      wgmma_wait<HALVES>();
#pragma unroll
      for (int i = 0; i < QUERIES / 2; i += 4) {
        const float2 row_sums = shared.deltas[(first_statistic + i / 4 * 8) / 2];
#pragma unroll
        for (int j = i; j < i + 4; ++j) {
          const uint32_t rounded = weights[j / 8][j % 8 / 2];
          const float p = !D_SCORES_OF_ROUNDED<D> ? scores[j]
                          : j % 2                 ? high_float(rounded)
                                                  : low_float(rounded);
          d_scores[j] = p * (d_scores[j] - (j % 2 ? row_sums.y : row_sums.x));
        }
      }
      round_weights<QUERIES>(d_weights, d_scores);
      // Nobody reads this one of the two tiles any more: the other consumer had waited for its last
      // product by it when it came to the barrier before.
      d_scores_tile ^= D_SCORES_BYTES;
#pragma unroll
      for (int i = 0; i < QUERIES / MMA_K; ++i)
        stmatrix_x4(shared.d_scores_tiles + d_scores_tile + (in_d_scores ^ i * 32), d_weights[i]);
      fence_proxy_async();
      wgmma_fence();
      add_weighted_rows<D, QUERIES>(d_k, d_weights, queries, add);
      wgmma_commit();
      barrier_sync(1, T::CONSUMERS * WARPGROUP);
    };
    // After the fence of d_k's products, and so after the last use of d_q.
    const auto multiply_d_scores = [&] {
#pragma unroll
      for (int k = 0; k < KEYS; k += MMA_K)
        wgmma<HALF, 1, 1>(d_q, across<QUERIES, KEYS>(shared.d_scores_tiles + d_scores_tile, k),
                          across<D, KEYS>(key_columns, k), k > 0);
      wgmma_commit();
    };
    const auto send = [&] {
      advance(part_at);
#pragma unroll
      for (int n = 0; n < HALF / 8; ++n)
        own_part[n * 32] = make_float4(d_q[4 * n], d_q[4 * n + 1], d_q[4 * n + 2], d_q[4 * n + 3]);
      fence_proxy_async();
      release(&shared.sent[0]);
    };

    mbarrier_wait(&shared.own[0], item_at.parity);
    advance(item_at);
    hold<D>(held_keys, own_keys);
    hold<D>(held_values, own_values);
    multiply_scores();
    wgmma_wait<0>();
    for (int left = steps; left > 0; --left) {
      differentiate(left < steps);
      multiply_d_scores();
      wgmma_wait<1>();
      // After the last step once more, for nothing: a branch around it would make ptxas wait.
      if (left > 1) {
        release(&shared.empty[at.stage]);
        advance(at);
      }
      multiply_scores();
      wgmma_wait<1>();
      send();
      wgmma_wait<0>();
      if (++tile == tiles.end) tile = tiles.first;
    }
    release(&shared.empty[at.stage]);
    advance(at);
    release(&shared.own[1]);
    const float scales[2] = {pass.scale, pass.scale}, ones[2] = {1, 1};
    const int row = own_first + warp * WARP_ROWS;
    rotate_back<D>(d_k, pass.angles, own_first, unit.b, pass.sequence);
    store_rows<D>(pass.d_kv, store_tile, d_k, scales, work.heads + unit.kv_head, row, unit.b,
                  pass.sequence);
    store_rows<D>(pass.d_kv, store_tile, d_v, ones, work.heads + work.kv_heads + unit.kv_head, row,
                  unit.b, pass.sequence);
  });
  if (threadIdx.x % 32 == 0) bulk_wait<0>();
}

// ---------------------------------------------------------------- backward
template <int D>
DEVICE void attention_backward(const Pass& pass, const Work& all_work) {
  using S = Shared<D>;
  SHARED_DYNAMIC(keys);
  uint8_t* const values = keys + S::OWN_BYTES;
  uint8_t* const stages = values + S::OWN_BYTES;
  uint8_t* const d_scores_tiles = stages + STAGES<D> * 2 * S::QUERY_BYTES;
  uint8_t* const part = d_scores_tiles + 2 * D_SCORES_BYTES;
  uint8_t* const outs = part + S::SUMS_BYTES;
  SHARED(float2, lses_log2, S::STATISTICS / 2);
  SHARED(float2, deltas, S::STATISTICS / 2);
  SHARED(int, starts, S::STATISTICS);
  SHARED(Work, work, 1);
  SHARED(uint64_t, own, 2);
  SHARED(uint64_t, sent, 2);
  SHARED(uint64_t, full, STAGES<D>);
  SHARED(uint64_t, empty, STAGES<D>);
  begin(keys);
  if (threadIdx.x == 0) {
    *work = all_work;
    tma_prefetch(pass.qkv);
    tma_prefetch(pass.d_out);
    tma_prefetch(pass.d_kv);
    init_ring<T, 1>(&own[0], &own[1], 1);
    init_ring<T, STAGES<D>>(full, empty, 1 + 32);  // the tiles, and each lane's statistics
    mbarrier_init(&sent[0], T::READERS);
    mbarrier_init(&sent[1], 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  begin_after_previous();

  const S shared{keys,   values, stages, d_scores_tiles, part, outs, lses_log2, deltas,
                 starts, *work,  own,    sent,           full, empty};
  const int warp = warp_of_block();
  if (threadIdx.x >= WARPGROUP) {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume_items<D>(pass, shared);
    return;
  }
  setmaxnreg_dec<PRODUCER_REGISTERS>();
  if (warp == 0) {
    load_items<D>(pass, shared);
  } else if (warp == 2) {
    if (elect_one()) add_parts<D>(pass, shared);
  } else {
    finish_tiles<D>(pass, *work, warp / 2);
  }
}

// ---------------------------------------------------------------- before it
// delta of each token and head, by D/8 threads each; semaphores = 0.
constexpr int DELTA_THREADS = 256;
template <int D>
DEVICE void attention_delta(const bf16* out, const bf16* d_out, float* delta, uint32_t* semaphores,
                            int semaphore_count, int batch, int sequence, int heads) {
  begin_after_previous();
  constexpr int LANES = D / VALUES<bf16>;
  const size_t thread = size_t(blockIdx.x) * DELTA_THREADS + threadIdx.x;
  for (size_t i = thread; i < size_t(semaphore_count); i += size_t(gridDim.x) * DELTA_THREADS)
    semaphores[i] = 0;
  const size_t row = thread / LANES;  // of [T,H]
  float sum = 0;
  const bool exists = row < size_t(batch) * sequence * heads;
  if (exists) {
    float o[8], d_o[8];
    unpack(reinterpret_cast<const uint4*>(out)[thread], o);
    unpack(reinterpret_cast<const uint4*>(d_out)[thread], d_o);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += o[i] * d_o[i];
  }
#pragma unroll
  for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (!exists || threadIdx.x % LANES != 0) return;
  const size_t token = row / heads, head = row % heads;
  delta[(token / sequence * heads + head) * sequence + token % sequence] = sum;
}

// ---------------------------------------------------------------- kernels
#define BACKWARD_KERNELS(d)                                                                        \
  KERNEL(attention_delta_sm90_##d, DELTA_THREADS)                                                  \
  (const bf16* out, const bf16* d_out, float* delta, uint32_t* semaphores, int semaphore_count,    \
   int batch, int sequence, int heads) {                                                           \
    attention_delta<d>(out, d_out, delta, semaphores, semaphore_count, batch, sequence, heads);    \
  }                                                                                                \
  EXPORT_KERNEL(attention_delta_sm90_##d)                                                          \
  KERNEL(attention_backward_sm90_128x##d, T::THREADS, 1)                                           \
  (const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap d_out,                 \
   const __grid_constant__ TensorMap d_kv, const int* document_starts, const float* table,         \
   const int* positions, const float* log_sum_exp, const float* delta, bf16* d_qkv, float* sums,   \
   uint32_t* semaphores, int batch, int sequence, int heads, int kv_heads, int team, int in_order, \
   float scale, float scale_log2) {                                                                \
    const Pass pass{&qkv,                                                                          \
                    &d_out,                                                                        \
                    &d_kv,                                                                         \
                    document_starts,                                                               \
                    Angles{table, positions},                                                      \
                    log_sum_exp,                                                                   \
                    delta,                                                                         \
                    d_qkv,                                                                         \
                    sums,                                                                          \
                    semaphores,                                                                    \
                    sequence,                                                                      \
                    scale,                                                                         \
                    scale_log2};                                                                   \
    attention_backward<d>(pass, work_of(batch, sequence, heads, kv_heads, team, in_order != 0));   \
  }                                                                                                \
  EXPORT_KERNEL(attention_backward_sm90_128x##d)

BACKWARD_KERNELS(32)
BACKWARD_KERNELS(64)
BACKWARD_KERNELS(128)
