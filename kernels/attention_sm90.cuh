// What the Hopper attention kernels share: tiles of heads, the ring that they come through,
// documents, and the products and results of a consumer. attention_sm90.cu says how a block works.
#pragma once

// ---------------------------------------------------------------- sizes
constexpr int WARPGROUP = 128;
constexpr int MMA_M = 64, MMA_K = 16;  // of one wgmma
constexpr int WARP_ROWS = 16;          // of a consumer's, in accumulators
constexpr int BOX_ROWS = 64;           // of a load

// A block: a producer, and consumers of 64 rows each. Three where their registers allow: more
// products to hide a softmax behind, but fewer items, and more rows after the end of a sequence.
template <int CONSUMERS_>
struct Team {
  static_assert(CONSUMERS_ == 2 || CONSUMERS_ == 3);
  static constexpr int CONSUMERS = CONSUMERS_, THREADS = (1 + CONSUMERS) * WARPGROUP;
  static constexpr int ROWS = CONSUMERS * MMA_M;  // of a result, in an item
  static constexpr int READERS = CONSUMERS * 4;   // warps that release what all consumers read
  // At launch 168 registers x 3 warpgroups, or 128 x 4.
  static constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 40 : 32;
  static constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 232 : 160;
};

constexpr float MINUS_INFINITY = -__builtin_huge_valf();
constexpr float LOG2_E = 1.44269504088896340736f, LN_2 = 0.69314718055994530942f;

// A tile is rows of one head, in blocks of COLUMNS columns: the widest span of a swizzle, in bytes,
// that divides a row.
template <int D>
constexpr int SPAN = D % 64 == 0   ? 128
                     : D % 32 == 0 ? 64
                                   : 32;
template <int D>
constexpr int COLUMNS = SPAN<D> / int(sizeof(bf16));
template <int D>
constexpr uint64_t SWIZZLE = D % 64 == 0   ? DESCRIPTOR_SWIZZLE_128
                             : D % 32 == 0 ? DESCRIPTOR_SWIZZLE_64
                                           : DESCRIPTOR_SWIZZLE_32;
template <int D, int N>
constexpr int TILE_BYTES = N * D * int(sizeof(bf16));

// ---------------------------------------------------------------- the ring
// By each warp, when all its lanes have waited for a stage and read it.
DEVICE void release(uint64_t* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
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
// The first key that a row sees. Rows after the end of the sequence see what the last one sees.
DEVICE int start_of(Documents documents, int row) {
  return documents.starts ? documents.starts[min(row, documents.sequence - 1)] : 0;
}

// Tiles of the other side: those that all rows of an item need, or of one consumer's.
struct Tiles {
  int first, end;
};
// Of `n` queries each, that see the keys from `first` to before `end`.
DEVICE Tiles queries_seeing(Documents documents, int first, int end, int n) {
  const int tiles = (documents.sequence + n - 1) / n;
  if (first >= documents.sequence) return {tiles, tiles};
  int seeing = first / n, hidden = tiles;
  if (!documents.starts) return {seeing, hidden};
  // The first tile whose first query sees none of the keys: its document begins after them.
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
  for (int column = 0; column < D; column += COLUMNS<D>)
#pragma unroll
    for (int row = 0; row < N; row += BOX_ROWS)
      tma_load_4d(tile + column * N * int(sizeof(bf16)) + row * SPAN<D>, map, full, column, head,
                  first + row, b);
}

// A warp's 16 rows of accumulators, times a factor each, through a tile of its own that holds
// nothing any more.
template <int D>
DEVICE void send_rows(const TensorMap* map, uint8_t* tile, const float (&values)[D / 2],
                      const float (&factors)[2], int head, int first, int b, int sequence) {
  if (first >= sequence) return;
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int group = 0; group < D / 16; ++group) {
    uint32_t quarters[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      quarters[i] = pack_bf16(values[group * 8 + 2 * i] * factors[i % 2],
                              values[group * 8 + 2 * i + 1] * factors[i % 2]);
    const int block = group * 16 / COLUMNS<D>, column = group * 16 % COLUMNS<D> + lane / 16 * 8;
    const uint32_t offset = lane % 16 * SPAN<D> + column * int(sizeof(bf16));
    stmatrix_x4(tile + block * WARP_ROWS * SPAN<D> + swizzle<SPAN<D>>(offset), quarters);
  }
  fence_proxy_async();
  __syncwarp();
  if (lane == 0) {
#pragma unroll
    for (int column = 0; column < D; column += COLUMNS<D>)
      tma_store_4d(map, tile + column * WARP_ROWS * int(sizeof(bf16)), column, head, first, b);
    bulk_commit();
  }
}
// The same through the tile of the store before.
template <int D>
DEVICE void store_rows(const TensorMap* map, uint8_t* tile, const float (&values)[D / 2],
                       const float (&factors)[2], int head, int first, int b, int sequence) {
  if (first >= sequence) return;
  if (threadIdx.x % 32 == 0) bulk_wait_read<0>();
  __syncwarp();
  send_rows<D>(map, tile, values, factors, head, first, b, sequence);
}

// ---------------------------------------------------------------- products of a consumer
// Of operands along a row, which is K: from value k on, of a tile of N rows.
template <int D, int N>
DEVICE uint64_t along(const uint8_t* rows, int k) {
  const int offset = k / COLUMNS<D> * N * SPAN<D> + k % COLUMNS<D> * int(sizeof(bf16));
  return matrix_descriptor(rows, 16, 8 * SPAN<D>, SWIZZLE<D>) + uint64_t(offset / 16);
}
// Of operand B across rows, from row k on.
template <int D, int N>
DEVICE uint64_t across(const uint8_t* tile, int k) {
  return matrix_descriptor(tile, N * SPAN<D>, 8 * SPAN<D>, SWIZZLE<D>) + uint64_t(k * SPAN<D> / 16);
}

// scores [64,N] = 64 rows of tile `a` times the rows of tile `b`.
// `A_ROWS`: of the tile that they are in.
template <int D, int A_ROWS, int N>
DEVICE void multiply_rows(float (&scores)[N / 2], const uint8_t* a, const uint8_t* b) {
#pragma unroll
  for (int k = 0; k < D; k += MMA_K)
    wgmma<N>(scores, along<D, A_ROWS>(a, k), along<D, N>(b, k), k > 0);
}

// sums [64,D] += weights [64,N] times tile `b` [N,D]; = where `add` is false.
template <int D, int N>
DEVICE void add_weighted_rows(float (&sums)[D / 2], const uint32_t (&weights)[N / MMA_K][4],
                              const uint8_t* b, bool add) {
#pragma unroll
  for (int k = 0; k < N; k += MMA_K)
    wgmma<D, 1>(sums, weights[k / MMA_K], across<D, N>(b, k), add || k > 0);
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

// A thread's accumulators are those of two rows, this one of its consumer's 64 and the one 8 below
// it, and of two columns of each 8, `first_column` and the next (PTX ISA, "wgmma register
// fragments"): accumulator 4 n + 2 half + odd.
DEVICE int first_row() {
  return int(threadIdx.x) % WARPGROUP / 32 * WARP_ROWS + int(threadIdx.x) % 32 / 4;
}
DEVICE int first_column() { return int(threadIdx.x) % 4 * 2; }

// The angles that q and k were rotated by, whose gradients are rotated back; null: not here.
struct Angles {
  const float* table;    // [P,D]: D/2 cosines of a position, then D/2 sines
  const int* positions;  // [B,S], each below P
};
// What a thread's two rows were rotated by, of a consumer's from `first` on.
template <int D>
struct Rotation {
  float2 cosines[2][D / 16], sines[2][D / 16];
};
template <int D>
DEVICE void read_rotation(Rotation<D>& rotation, Angles angles, int first, int b, int sequence) {
  const int* const positions = angles.positions + size_t(b) * sequence;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int row = min(first + first_row() + 8 * lower, sequence - 1);
    const float* const of_row = angles.table + size_t(positions[row]) * D + first_column();
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      rotation.cosines[lower][n] = *reinterpret_cast<const float2*>(of_row + 8 * n);
      rotation.sines[lower][n] = *reinterpret_cast<const float2*>(of_row + D / 2 + 8 * n);
    }
  }
}
// Accumulators of these rows: a pair (i, i + D/2) is in one thread.
template <int D>
DEVICE void rotate_back(float (&values)[D / 2], const Rotation<D>& rotation) {
#pragma unroll
  for (int lower = 0; lower < 2; ++lower)
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      const float2 cosines = rotation.cosines[lower][n], sines = rotation.sines[lower][n];
      float* const x = &values[4 * n + 2 * lower];
      float* const y = x + D / 4;
      const float2 low = make_float2(x[0], x[1]), high = make_float2(y[0], y[1]);
      x[0] = low.x * cosines.x + high.x * sines.x;
      x[1] = low.y * cosines.y + high.y * sines.y;
      y[0] = high.x * cosines.x - low.x * sines.x;
      y[1] = high.y * cosines.y - low.y * sines.y;
    }
}
template <int D>
DEVICE void rotate_back(float (&values)[D / 2], Angles angles, int first, int b, int sequence) {
  if (!angles.table) return;
  Rotation<D> rotation;
  read_rotation(rotation, angles, first, b, sequence);
  rotate_back<D>(values, rotation);
}

// ---------------------------------------------------------------- roles
// The same in all lanes, and known to be: what follows from it needs no register in each.
DEVICE int warp_of_block() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0); }
DEVICE void begin(const uint8_t* shared) {
  // Swizzles take bits of the address itself; that it is aligned so is not in the language.
  if (threadIdx.x == 0 && shared_address(shared) % 1024) __trap();
}
template <class T, int STAGES>
DEVICE void init_ring(uint64_t* full, uint64_t* empty, int loaders) {
  for (int stage = 0; stage < STAGES; ++stage) {
    mbarrier_init(&full[stage], loaders);
    mbarrier_init(&empty[stage], T::READERS);
  }
}
