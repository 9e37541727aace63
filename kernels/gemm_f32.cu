// Every matrix product of a training step in fp32, without tensor cores: for the f32 mode, which is
// compared with the CPU.
//
// Contract: as gemm_sm80.cu, with fp32 for bf16; src/cuda/gemm/f32.rs launches one block for each
// tile of the result.
//   NT  out [M,N] = A [M,K] B [N,K]^T (+ addend)
//   NN  out [M,N] = A [M,K] B [K,N]   (+ addend)
//   TN  out [M,N] += A [K,M]^T B [K,N]; any K
// The addend [M,N] may be `out` itself. Tails are exact. Every sum goes through k in order.
//
// A thread sums 8 x 8 values in registers. Stages of 32 values of k are copied with cp.async, one
// ahead, and lie in shared memory as in the matrix; they are read 16 bytes at a time either way.
#include "isobath.cuh"

// ---------------------------------------------------------------- sizes
constexpr int TILE = 64;         // of m and of n
constexpr int THREADS_SIDE = 8;  // threads along m and along n
constexpr int THREADS = THREADS_SIDE * THREADS_SIDE;
constexpr int FOUR = 4;  // values of 16 bytes
constexpr int GROUPS = TILE / (THREADS_SIDE * FOUR);
constexpr int SUMS = GROUPS * FOUR;  // of a thread along m, and along n
constexpr int TILE_K = 32;           // 128 bytes: all banks of shared memory
constexpr int STAGES = 2;
constexpr int OPERAND_VALUES = TILE * TILE_K;

// How an operand lies in memory: K, rows of k values for each m (or n); Mn, rows of m (or n)
// values for each k.
enum class Major { K, Mn };

template <Major MAJOR>
struct Stage {
  static constexpr int ROWS = MAJOR == Major::K ? TILE : TILE_K;
  static constexpr int COLUMNS = MAJOR == Major::K ? TILE_K : TILE;
};

// m (or n) number `index` of a thread that is at `place` along that axis: groups of four, so that
// eight neighbours write, and read what is m-major, 128 bytes without a gap.
DEVICE int axis_of(int place, int index) {
  return index / FOUR * (THREADS_SIDE * FOUR) + place * FOUR + index % FOUR;
}

// Where 16 bytes of a stage lie, counted in values. What eight neighbours read at once of a K-major
// stage are rows 4 apart: their chunks are permuted so that these lie in all banks.
template <Major MAJOR>
DEVICE int value_at(int row, int chunk) {
  if constexpr (MAJOR == Major::K) chunk ^= row / FOUR % THREADS_SIDE;
  return row * Stage<MAJOR>::COLUMNS + chunk * FOUR;
}

// `matrix` [rows,columns], from [first_row,first_column] on; zeros outside of it.
template <Major MAJOR>
DEVICE void copy_stage(float* stage, const float* matrix, int rows, int columns, int first_row,
                       int first_column) {
  constexpr int ROW_CHUNKS = Stage<MAJOR>::COLUMNS / FOUR;
#pragma unroll
  for (int i = 0; i < OPERAND_VALUES / FOUR / THREADS; ++i) {
    const int index = int(threadIdx.x) + i * THREADS;
    const int row = index / ROW_CHUNKS, chunk = index % ROW_CHUNKS;
    const int at_row = first_row + row, at_column = first_column + chunk * FOUR;
    const bool inside = at_row < rows && at_column < columns;
    cp_async_16_zfill(stage + value_at<MAJOR>(row, chunk),
                      matrix + size_t(at_row) * columns + at_column, inside ? 16 : 0);
  }
}

DEVICE void to_array(float4 four, float* values) {
  values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
}

// A thread's values of one operand for k = first_k ... first_k + 3.
template <Major MAJOR>
DEVICE void read(float (&values)[FOUR][SUMS], const float* stage, int place, int first_k) {
  if constexpr (MAJOR == Major::K) {
#pragma unroll
    for (int index = 0; index < SUMS; ++index) {
      float four[FOUR];
      const int at = value_at<MAJOR>(axis_of(place, index), first_k / FOUR);
      to_array(*reinterpret_cast<const float4*>(stage + at), four);
#pragma unroll
      for (int k = 0; k < FOUR; ++k) values[k][index] = four[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < FOUR; ++k) {
#pragma unroll
      for (int index = 0; index < SUMS; index += FOUR) {
        const int at = value_at<MAJOR>(first_k + k, axis_of(place, index) / FOUR);
        to_array(*reinterpret_cast<const float4*>(stage + at), &values[k][index]);
      }
    }
  }
}

// ---------------------------------------------------------------- epilogues
// Four values of the result, from `at` on.
DEVICE float4 sum_of(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
struct Store {
  float* out;
  const float* addend;  // null: none
};
DEVICE void write(const Store& to, size_t at, float4 sums) {
  if (to.addend) sums = sum_of(sums, *reinterpret_cast<const float4*>(to.addend + at));
  *reinterpret_cast<float4*>(to.out + at) = sums;
}
struct Accumulate {
  float* out;
};
DEVICE void write(const Accumulate& to, size_t at, float4 sums) {
  float4* const place = reinterpret_cast<float4*>(to.out + at);
  *place = sum_of(*place, sums);
}

// ---------------------------------------------------------------- the product
template <Major MAJOR_A, Major MAJOR_B, class Output>
DEVICE void gemm(const float* a, const float* b, const Output& output, int m, int n, int k) {
  begin_after_previous();
  SHARED(float4, ring, STAGES * 2 * OPERAND_VALUES / FOUR);  // STAGES x (A, B)
  const int columns = (n + TILE - 1) / TILE;
  const int tile_m = int(blockIdx.x) / columns * TILE, tile_n = int(blockIdx.x) % columns * TILE;
  const int thread_m = int(threadIdx.x) / THREADS_SIDE, thread_n = int(threadIdx.x) % THREADS_SIDE;
  const int steps = (k + TILE_K - 1) / TILE_K;
  const auto stage_of = [&](int step) {
    return reinterpret_cast<float*>(ring) + step % STAGES * 2 * OPERAND_VALUES;
  };
  const auto load = [&](int step) {
    float* const stage = stage_of(step);
    const int first_k = step * TILE_K;
    if constexpr (MAJOR_A == Major::K) {
      copy_stage<MAJOR_A>(stage, a, m, k, tile_m, first_k);
    } else {
      copy_stage<MAJOR_A>(stage, a, k, m, first_k, tile_m);
    }
    if constexpr (MAJOR_B == Major::K) {
      copy_stage<MAJOR_B>(stage + OPERAND_VALUES, b, n, k, tile_n, first_k);
    } else {
      copy_stage<MAJOR_B>(stage + OPERAND_VALUES, b, k, n, first_k, tile_n);
    }
    cp_async_commit();
  };

  float sums[SUMS][SUMS] = {};
  load(0);
  for (int step = 0; step < steps; ++step) {
    // This step's stage has arrived, and the one of the step before has been read by everyone.
    cp_async_wait<0>();
    __syncthreads();
    if (step + 1 < steps) load(step + 1);
    const float* const stage = stage_of(step);
#pragma unroll 1
    for (int first_k = 0; first_k < TILE_K; first_k += FOUR) {
      float of_a[FOUR][SUMS], of_b[FOUR][SUMS];
      read<MAJOR_A>(of_a, stage, thread_m, first_k);
      read<MAJOR_B>(of_b, stage + OPERAND_VALUES, thread_n, first_k);
#pragma unroll
      for (int i = 0; i < FOUR; ++i) {
#pragma unroll
        for (int row = 0; row < SUMS; ++row) {
#pragma unroll
          for (int column = 0; column < SUMS; ++column)
            sums[row][column] += of_a[i][row] * of_b[i][column];
        }
      }
    }
  }

#pragma unroll
  for (int row = 0; row < SUMS; ++row) {
    const int at_row = tile_m + axis_of(thread_m, row);
#pragma unroll
    for (int column = 0; column < SUMS; column += FOUR) {
      const int at_column = tile_n + axis_of(thread_n, column);
      const float* const four = &sums[row][column];
      if (at_row < m && at_column < n)
        write(output, size_t(at_row) * n + at_column,
              make_float4(four[0], four[1], four[2], four[3]));
    }
  }
}

// ---------------------------------------------------------------- kernels
KERNEL(gemm_f32_nt_64x64, THREADS, 4)
(const float* a, const float* b, float* out, const float* addend, int m, int n, int k) {
  gemm<Major::K, Major::K>(a, b, Store{out, addend}, m, n, k);
}
EXPORT_KERNEL(gemm_f32_nt_64x64)

KERNEL(gemm_f32_nn_64x64, THREADS, 4)
(const float* a, const float* b, float* out, const float* addend, int m, int n, int k) {
  gemm<Major::K, Major::Mn>(a, b, Store{out, addend}, m, n, k);
}
EXPORT_KERNEL(gemm_f32_nn_64x64)

KERNEL(gemm_f32_tn_64x64, THREADS, 4)
(const float* a, const float* b, float* out, int m, int n, int k) {
  gemm<Major::Mn, Major::Mn>(a, b, Accumulate{out}, m, n, k);
}
EXPORT_KERNEL(gemm_f32_tn_64x64)
