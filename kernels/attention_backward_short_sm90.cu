// Causal attention on Hopper, backward over rows of at most 256 tokens: a block takes a whole head
// of k and v with the query heads of its group, reads each matrix once and writes each result once.
// Formulas, contract and tensor maps are those of attention_sm90.cu, with another map to read out;
// no sums in global memory, and no block waits for another.
//
// Such rows are bound by memory: the products of a head take less than half of the time of its 8
// matrices. So loads never stop: queries with d_out and out come through a ring of stages, whatever
// head they are of, and each tile of keys and values has a place, into which the next head's comes
// as soon as the last queries that see it are done with.
//
// A head is up to four tiles of 64 rows. A step is a tile of queries, the last one first, as it
// sees all keys; pairs of tiles that do not see each other are left out. Consumer 0 has the first
// and the last tile, consumer 1 the two between, as keys and as queries: d_k and d_v of its keys
// stay in its registers, and it multiplies d_q of its queries by itself, from dS of both consumers
// in shared memory. So each has five of the ten pairs, and five of the parts of d_q; and only the
// one that makes d_q waits for the other. In the last step of its tile it has d_q, d_k and d_v of
// the same 64 rows, which leave through the place of dS.
//
// Two warps of the producer's make delta from the tiles of out and d_out.
#include "isobath.cuh"

#include "attention_sm90.cuh"

// ---------------------------------------------------------------- sizes
using T = Team<2>;
constexpr int ROWS = 64;       // of a tile, of keys and of queries
constexpr int MOST_TILES = 4;  // of a head
constexpr int STAGES = 4;      // of queries, d_out and out; at a head dim of 64 all shared memory
// Whether d_v is multiplied while dS is computed; P takes registers until then.
template <int D>
constexpr bool D_V_AHEAD = D < 64;
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
// dS [keys,queries] of a pair of tiles; a step has MOST_TILES, and two steps are under way.
constexpr int D_SCORES_BYTES = TILE_BYTES<ROWS, ROWS>;

// ---------------------------------------------------------------- the work
struct Work {
  int sequence, heads, kv_heads;
  int group;  // query heads for one of k and v
  int units;  // heads of k and v of all sequences
  int tiles;  // of a head
};
// A head of k and v, as the `round`-th one of this block.
struct Unit {
  int b, kv_head;
  uint32_t round;
};
// A tile of queries of a query head, the `count`-th one of this block.
struct Step {
  int member, tile;  // of the group; of the head
  uint32_t count;
  int stage;
  uint32_t parity;
};

template <class Finish>
DEVICE void each_unit(const Work& work, const Finish& finish) {
  uint32_t round = 0;
  for (int unit = int(blockIdx.x); unit < work.units; unit += int(gridDim.x))
    finish(Unit{unit / work.kv_heads, unit % work.kv_heads, round++});
}
template <class Finish>
DEVICE void each_step(const Work& work, uint32_t& count, const Finish& finish) {
  for (int member = 0; member < work.group; ++member)
    for (int tile = work.tiles - 1; tile >= 0; --tile) {
      finish(Step{member, tile, count, int(count % STAGES), count / STAGES % 2});
      ++count;
    }
}

// ---------------------------------------------------------------- statistics
// Of the queries of a stage, read in pairs.
struct Statistics {
  float2* lses_log2;
  float2* deltas;
  uint8_t* starts;  // of their documents
};
// A warp's half of a tile: delta, which it also writes, and what else is known of the queries.
template <int D>
DEVICE void add_statistics(const Statistics& to, const uint8_t* d_outs, const uint8_t* outs,
                           const float* log_sum_exp, float* delta,  // of the head's first query
                           Documents documents, int half, int first, int sequence) {
  constexpr int VECTORS = D / VALUES<bf16>, LANES = VECTORS > 4 ? 8 : 4, AT_ONCE = 32 / LANES;
  const int lane = int(threadIdx.x) % 32, vector = lane % LANES;
  const int column = vector * 16;  // in bytes
#pragma unroll 2
  for (int i = half * ROWS / 2; i < (half + 1) * ROWS / 2; i += AT_ONCE) {
    const int row = i + lane / LANES, query = first + row;
    float sum = 0;
    if (LANES == VECTORS || vector < VECTORS) {
      // Without the swizzle: it changes places in a row, the same in both, and no sum of two lanes.
      const int at = (column / SPAN<D> * ROWS + row) * SPAN<D> + column % SPAN<D>;
      float o[8], d_o[8];
      unpack(*reinterpret_cast<const uint4*>(outs + at), o);
      unpack(*reinterpret_cast<const uint4*>(d_outs + at), d_o);
#pragma unroll
      for (int value = 0; value < 8; ++value) sum += o[value] * d_o[value];
    }
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (vector == 0) {
      reinterpret_cast<float*>(to.deltas)[row] = sum;
      if (query < sequence) delta[query] = sum;
    }
  }
  const int row = half * ROWS / 2 + lane, query = first + row;
  // No probability after the end of the sequence.
  reinterpret_cast<float*>(to.lses_log2)[row] =
      query < sequence ? log_sum_exp[query] * LOG2_E : -MINUS_INFINITY;
  to.starts[row] = uint8_t(start_of(documents, query));
}

// ---------------------------------------------------------------- backward
template <int D>
DEVICE void attention_backward_short(const TensorMap* qkv, const TensorMap* d_out,
                                     const TensorMap* out, const TensorMap* d_qkv,
                                     const int* document_starts,  // [B,S] or null
                                     Angles angles,
                                     const float* log_sum_exp,  // [B,H,S]
                                     float* delta,              // [B,H,S]
                                     const Work& work, float scale, float scale_log2) {
  constexpr int BYTES = TILE_BYTES<D, ROWS>;
  SHARED_DYNAMIC(all_keys);                                   // tiles of (keys, values)
  uint8_t* const stages = all_keys + MOST_TILES * 2 * BYTES;  // (queries, d_out, out) each
  uint8_t* const all_d_scores = stages + STAGES * 3 * BYTES;  // two steps'
  SHARED(float2, lses_log2, STAGES * ROWS / 2);
  SHARED(float2, deltas, STAGES * ROWS / 2);
  SHARED(uint8_t, starts, STAGES* ROWS);
  SHARED(uint64_t, keys_full, MOST_TILES);
  SHARED(uint64_t, keys_empty, MOST_TILES);
  SHARED(uint64_t, full, STAGES);
  SHARED(uint64_t, known, STAGES);  // their statistics
  SHARED(uint64_t, empty, STAGES);
  SHARED(uint64_t, d_scores_full, 2);
  SHARED(uint64_t, d_scores_empty, 2);
  begin(all_keys);
  if (threadIdx.x == 0) {
    tma_prefetch(qkv);
    tma_prefetch(d_out);
    tma_prefetch(out);
    tma_prefetch(d_qkv);
    init_ring<T, MOST_TILES>(keys_full, keys_empty, 1);
    init_ring<T, STAGES>(full, empty, 1);
    for (int stage = 0; stage < STAGES; ++stage) mbarrier_init(&known[stage], 2);
    for (int step = 0; step < 2; ++step) {
      mbarrier_init(&d_scores_full[step], T::READERS);
      mbarrier_init(&d_scores_empty[step], T::READERS);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  begin_after_previous();

  uint32_t count = 0;
  if (threadIdx.x < WARPGROUP) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    const int warp = warp_of_block();
    if (warp == 0 && elect_one()) {
      each_unit(work, [&](const Unit& unit) {
        each_step(work, count, [&](const Step& step) {
          uint8_t* const queries = stages + step.stage * 3 * BYTES;
          uint64_t* const loaded = &full[step.stage];
          const int head = unit.kv_head * work.group + step.member, first = step.tile * ROWS;
          mbarrier_wait(&empty[step.stage], step.parity ^ 1);  // the first round passes at once
          mbarrier_arrive_expect_tx(loaded, 3 * BYTES);
          load_tile<D, ROWS>(queries, qkv, loaded, head, first, unit.b);
          load_tile<D, ROWS>(queries + BYTES, d_out, loaded, head, first, unit.b);
          load_tile<D, ROWS>(queries + 2 * BYTES, out, loaded, head, first, unit.b);
        });
      });
    } else if (warp == 1 && elect_one()) {
      each_unit(work, [&](const Unit& unit) {
        const int k_head = work.heads + unit.kv_head, v_head = k_head + work.kv_heads;
        for (int tile = work.tiles - 1; tile >= 0; --tile) {
          uint8_t* const keys = all_keys + tile * 2 * BYTES;
          uint64_t* const loaded = &keys_full[tile];
          mbarrier_wait(&keys_empty[tile], unit.round % 2 ^ 1);
          mbarrier_arrive_expect_tx(loaded, 2 * BYTES);
          load_tile<D, ROWS>(keys, qkv, loaded, k_head, tile * ROWS, unit.b);
          load_tile<D, ROWS>(keys + BYTES, qkv, loaded, v_head, tile * ROWS, unit.b);
        }
      });
    } else if (warp >= 2) {
      each_unit(work, [&](const Unit& unit) {
        const Documents documents = documents_of(document_starts, unit.b, work.sequence);
        each_step(work, count, [&](const Step& step) {
          const int head = unit.kv_head * work.group + step.member;
          const size_t statistics = (size_t(unit.b) * work.heads + head) * work.sequence;
          const uint8_t* const d_outs = stages + step.stage * 3 * BYTES + BYTES;
          const int place = step.stage * ROWS;
          mbarrier_wait(&full[step.stage], step.parity);
          add_statistics<D>({lses_log2 + place / 2, deltas + place / 2, starts + place}, d_outs,
                            d_outs + BYTES, log_sum_exp + statistics, delta + statistics, documents,
                            warp - 2, step.tile * ROWS, work.sequence);
          release(&known[step.stage]);
        });
      });
    }
    return;
  }

  setmaxnreg_inc<CONSUMER_REGISTERS>();
  const int consumer = warp_of_block() / 4 - 1, warp = warp_of_block() % 4;
  // The consumer's tiles.
  const int near = consumer, far = MOST_TILES - 1 - consumer;
  each_unit(work, [&](const Unit& unit) {
    float near_d_k[D / 2], near_d_v[D / 2], far_d_k[D / 2], far_d_v[D / 2];
    each_step(work, count, [&](const Step& step) {
      const int stage = step.stage, tile = step.tile;
      const bool add = step.member > 0 || tile < work.tiles - 1;
      const bool last_member = step.member == work.group - 1;
      const uint8_t* const queries = stages + stage * 3 * BYTES;
      const uint8_t* const d_outs = queries + BYTES;
      uint8_t* const d_scores_step = all_d_scores + step.count % 2 * MOST_TILES * D_SCORES_BYTES;
      // The pair of this tile of queries and one of keys: what it adds to d_k and d_v, and its dS.
      const auto differentiate = [&](float(&d_k)[D / 2], float(&d_v)[D / 2], int key_tile) {
        const uint8_t* const keys = all_keys + key_tile * 2 * BYTES;
        float scores[ROWS / 2], d_scores[ROWS / 2];  // transposed: [keys,queries]
        uint32_t weights[ROWS / MMA_K][4], d_weights[ROWS / MMA_K][4];
        mbarrier_wait(&keys_full[key_tile], unit.round % 2);
        wgmma_fence();
        multiply_rows<D, ROWS, ROWS>(scores, keys, queries);
        wgmma_commit();
        multiply_rows<D, ROWS, ROWS>(d_scores, keys + BYTES, d_outs);
        wgmma_commit();
        mbarrier_wait(&known[stage], step.parity);
        wgmma_wait<1>();
        const int first_statistic = stage * ROWS + first_column();
        if (key_tile == tile || starts[stage * ROWS + ROWS - 1] > key_tile * ROWS) {
          const int key = key_tile * ROWS + first_row(), query = tile * ROWS + first_column();
#pragma unroll
          for (int i = 0; i < ROWS / 2; ++i) {
            const int column = i / 4 * 8 + i % 2, own_key = key + i / 2 % 2 * 8;
            const int start = starts[first_statistic + column];
            if ((own_key > query + column) | (own_key < start)) scores[i] = MINUS_INFINITY;
          }
        }
#pragma unroll
        for (int i = 0; i < ROWS / 2; i += 4) {
          const float2 lse = lses_log2[(first_statistic + i / 4 * 8) / 2];
#pragma unroll
          for (int j = i; j < i + 4; ++j)
            scores[j] = exp2_approx(scores[j] * scale_log2 - (j % 2 ? lse.y : lse.x));
        }
        if constexpr (D_V_AHEAD<D>) {
          round_weights<ROWS>(weights, scores);
          wgmma_fence();
          add_weighted_rows<D, ROWS>(d_v, weights, d_outs, add);
          wgmma_commit();
        }
        mbarrier_wait(&d_scores_empty[step.count % 2], step.count / 2 % 2 ^ 1);
        wgmma_wait<D_V_AHEAD<D> ? 1 : 0>();
#pragma unroll
        for (int i = 0; i < ROWS / 2; i += 4) {
          const float2 row_sums = deltas[(first_statistic + i / 4 * 8) / 2];
#pragma unroll
          for (int j = i; j < i + 4; ++j)
            d_scores[j] = scores[j] * (d_scores[j] - (j % 2 ? row_sums.y : row_sums.x));
        }
        if constexpr (!D_V_AHEAD<D>) round_weights<ROWS>(weights, scores);
        round_weights<ROWS>(d_weights, d_scores);
        // Columns of 32 bytes follow by xor, as they are bits that the rows are not in.
        const int lane = int(threadIdx.x) % 32;
        const uint32_t in_tile =
            swizzle<SPAN<ROWS>>((warp * WARP_ROWS + lane % 16) * SPAN<ROWS> + lane / 16 * 16);
#pragma unroll
        for (int i = 0; i < ROWS / MMA_K; ++i)
          stmatrix_x4(d_scores_step + key_tile * D_SCORES_BYTES + (in_tile ^ i * 32), d_weights[i]);
        fence_proxy_async();
        wgmma_fence();
        if constexpr (!D_V_AHEAD<D>) add_weighted_rows<D, ROWS>(d_v, weights, d_outs, add);
        add_weighted_rows<D, ROWS>(d_k, d_weights, queries, add);
        wgmma_commit();
        wgmma_wait<0>();
      };
      mbarrier_wait(&full[stage], step.parity);
      if (far <= tile) differentiate(far_d_k, far_d_v, far);
      if (near <= tile) {
        differentiate(near_d_k, near_d_v, near);
      } else {
        // Said to be full before it is empty, it would be taken for that of the round before.
        mbarrier_wait(&d_scores_empty[step.count % 2], step.count / 2 % 2 ^ 1);
      }
      release(&empty[stage]);
      release(&d_scores_full[step.count % 2]);
      if (step.count > 0) {
        // What has left from the place of the step before.
        if (threadIdx.x % 32 == 0) bulk_wait_read<0>();
        release(&d_scores_empty[step.count % 2 ^ 1]);
      }
      if (tile == near || tile == far) {
        float d_q[D / 2];
        mbarrier_wait(&d_scores_full[step.count % 2], step.count / 2 % 2);
        // The other one's, too, of which dS says only that they have come.
        for (int key_tile = 0; key_tile < tile; ++key_tile)
          mbarrier_wait(&keys_full[key_tile], unit.round % 2);
        // The first one overwrites d_q, whatever its tile: else ptxas would keep registers for it.
        const auto add_keys = [&](int key_tile, bool add) {
          wgmma_fence();  // the first one is enough, but not for ptxas, after a loop
          const uint8_t* const keys = all_keys + key_tile * 2 * BYTES;
          const uint8_t* const d_scores = d_scores_step + key_tile * D_SCORES_BYTES;
#pragma unroll
          for (int k = 0; k < ROWS; k += MMA_K)
            wgmma<D, 1, 1>(d_q, across<ROWS, ROWS>(d_scores, k), across<D, ROWS>(keys, k),
                           add || k > 0);
          wgmma_commit();
        };
        add_keys(tile, false);
        for (int key_tile = tile - 1; key_tile >= 0; --key_tile) add_keys(key_tile, true);
        Rotation<D> rotation{};  // not read without a table, but ptxas would keep its registers
        if (angles.table) read_rotation(rotation, angles, tile * ROWS, unit.b, work.sequence);
        wgmma_wait<0>();
        barrier_sync(1 + consumer, WARPGROUP);  // all warps have read dS
        const float scales[2] = {scale, scale}, ones[2] = {1, 1};
        const int row = tile * ROWS + warp * WARP_ROWS;
        const int k_head = work.heads + unit.kv_head;
        uint8_t* const outs = d_scores_step + warp * TILE_BYTES<D, WARP_ROWS>;
        if (angles.table) rotate_back<D>(d_q, rotation);
        send_rows<D>(d_qkv, outs, d_q, scales, unit.kv_head * work.group + step.member, row, unit.b,
                     work.sequence);
        const auto finish = [&](float(&d_k)[D / 2], float(&d_v)[D / 2]) {
          if (angles.table) rotate_back<D>(d_k, rotation);
          send_rows<D>(d_qkv, outs + BYTES, d_k, scales, k_head, row, unit.b, work.sequence);
          send_rows<D>(d_qkv, outs + 2 * BYTES, d_v, ones, k_head + work.kv_heads, row, unit.b,
                       work.sequence);
        };
        if (last_member && tile == far) finish(far_d_k, far_d_v);
        if (last_member && tile == near) finish(near_d_k, near_d_v);
      }
      if (last_member) {
        mbarrier_wait(&keys_full[tile], unit.round % 2);  // of a consumer that has not read it, too
        release(&keys_empty[tile]);
      }
    });
  });
  if (threadIdx.x % 32 == 0) bulk_wait<0>();
}

// ---------------------------------------------------------------- kernels
#define BACKWARD_KERNEL(d)                                                                         \
  KERNEL(attention_backward_short_sm90_256x##d, T::THREADS, 1)                                     \
  (const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap d_out,                 \
   const __grid_constant__ TensorMap out, const __grid_constant__ TensorMap d_qkv,                 \
   const int* document_starts, const float* table, const int* positions, const float* log_sum_exp, \
   float* delta, int sequence, int heads, int kv_heads, int group, int units, int tiles,           \
   float scale, float scale_log2) {                                                                \
    attention_backward_short<d>(                                                                   \
        &qkv, &d_out, &out, &d_qkv, document_starts, Angles{table, positions}, log_sum_exp, delta, \
        Work{sequence, heads, kv_heads, group, units, tiles}, scale, scale_log2);                  \
  }                                                                                                \
  EXPORT_KERNEL(attention_backward_short_sm90_256x##d)

BACKWARD_KERNEL(32)
BACKWARD_KERNEL(48)
BACKWARD_KERNEL(64)
