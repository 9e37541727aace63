// The global gradient norm and AdamW, over flat buffers of any length.
//
// Contract: src/cuda/adamw.rs launches; nothing is allocated. Buffers are 16-byte aligned, f32, the
// working copy bf16, the moments and the parameters as the kernel's name says. Both kernels of the
// norm add in f64 and in an order that only n decides, so the norm is the same on every machine.
// The update computes in f32, reads everything that changes from step to step from device memory
// (so a captured graph can be replayed), clips by grad_norm[0], and does nothing at all where that
// is not finite. It reads and writes each element once: 28 bytes, 20 with moments in bf16; 2 more
// where it also writes a working copy, which parameters in two halves hold already.
#include "isobath.cuh"

constexpr int WARP = 32;

// ---------------------------------------------------------------- gradient norm
// f64 for each element, not compensated f32: squares of f32 are exact in f64 and cannot leave its
// range, and an element costs one conversion and one fma. A GPU of compute capability 8.0 or 9.0
// converts 16 a clock and multiprocessor, and 4-byte elements come at 6 or fewer from its memory.
constexpr int NORM_THREADS = 256, NORM_VECTORS = 4;

DEVICE double warp_sum(double value) {
#pragma unroll
  for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}
// In thread 0. Called once by a block.
DEVICE double block_sum(double value) {
  constexpr int WARPS = NORM_THREADS / WARP;
  SHARED(double, sums, WARPS);
  value = warp_sum(value);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = value;
  __syncthreads();
  double total = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) total += sums[warp];
  return total;
}
DEVICE double square(float x) { return double(x) * double(x); }

// partials[block] = sum of squares of the tiles block, block + blocks, ... of 4096 elements.
KERNEL(adamw_norm_partials, NORM_THREADS, 4)
(const float* gradients,  // [n]
 double* partials,        // [blocks]
 uint64_t n) {
  begin_after_previous();
  constexpr int TILE = NORM_THREADS * NORM_VECTORS;
  const uint64_t vectors = n / 4;
  double sums[NORM_VECTORS] = {};
  for (uint64_t tile = blockIdx.x; tile * TILE < vectors; tile += gridDim.x) {
    float4 held[NORM_VECTORS];
#pragma unroll
    for (int i = 0; i < NORM_VECTORS; ++i) {
      const uint64_t at = tile * TILE + i * NORM_THREADS + threadIdx.x;
      held[i] =
          at < vectors ? reinterpret_cast<const float4*>(gradients)[at] : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < NORM_VECTORS; ++i) {
      sums[i] += square(held[i].x);
      sums[i] += square(held[i].y);
      sums[i] += square(held[i].z);
      sums[i] += square(held[i].w);
    }
  }
  // What is left of the last vector.
  if (blockIdx.x == 0 && threadIdx.x < n % 4)
    sums[0] += square(gradients[vectors * 4 + threadIdx.x]);
  const double total = block_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}
EXPORT_KERNEL(adamw_norm_partials)

KERNEL(adamw_norm_total, NORM_THREADS)
(const double* partials,  // [count]
 float* grad_norm,        // [1]
 int count) {
  begin_after_previous();
  double sum = 0;
  for (int at = int(threadIdx.x); at < count; at += NORM_THREADS) sum += partials[at];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) grad_norm[0] = float(sqrt(total));
}
EXPORT_KERNEL(adamw_norm_total)

// ---------------------------------------------------------------- update
// What a step is, as src/cuda/adamw.rs lays it out.
struct alignas(16) Scalars {
  float lr, beta1, rest1, beta2;              // rest: 1 - beta
  float rest2, inverse1, inverse2, eps;       // inverse: 1 / (1 - beta^step)
  float decoupled, coupled, clip, alignment;  // one of the decays is 0; clip 0: off
  uint64_t seed, stream;                      // of the bits that round; the stream names the update
};

// Which elements decay: `boundaries` ascend, and an element that an odd number of them have passed
// (are not above) does. first <= answer <= count, where the first ones are known to have passed.
DEVICE int boundaries_passed(const uint64_t* boundaries, int first, int count, uint64_t element) {
  int above = count;
  while (first < above) {
    const int middle = first + (above - first) / 2;
    if (boundaries[middle] <= element)
      first = middle + 1;
    else
      above = middle;
  }
  return first;
}

// Elements from `element` on, zeros after the end. No cache keeps them: whoever reads them next
// comes a step later.
DEVICE void load_four(const float* from, uint64_t element, uint64_t n, float (&values)[4]) {
  if (element + 4 <= n) {
    const float4 four = __ldcs(reinterpret_cast<const float4*>(from + element));
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = element + j < n ? from[element + j] : 0.0f;
  }
}
DEVICE void store_four(float* to, uint64_t element, uint64_t n, const float (&values)[4]) {
  if (element + 4 <= n) {
    __stcs(reinterpret_cast<float4*>(to + element),
           make_float4(values[0], values[1], values[2], values[3]));
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (element + j < n) to[element + j] = values[j];
  }
}
// Of 16 bits each, two in a number, the first in the lower half. 8 bytes of a thread, 256 of a warp
// without a gap: whole sectors, as with 16.
DEVICE uint2 load_halves(const uint16_t* from, uint64_t element, uint64_t n) {
  if (element + 4 <= n) return __ldcs(reinterpret_cast<const uint2*>(from + element));
  uint32_t pairs[2] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (element + j < n) pairs[j / 2] |= uint32_t(from[element + j]) << (j % 2 * 16);
  return make_uint2(pairs[0], pairs[1]);
}
// Kept in the caches where the next forward pass reads it.
template <bool Kept = false>
DEVICE void store_halves(uint16_t* to, uint64_t element, uint64_t n, uint2 four) {
  if (element + 4 <= n) {
    uint2* const place = reinterpret_cast<uint2*>(to + element);
    if constexpr (Kept)
      *place = four;
    else
      __stcs(place, four);
  } else {
    const uint32_t pairs[2] = {four.x, four.y};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (element + j < n) to[element + j] = uint16_t(pairs[j / 2] >> (j % 2 * 16));
  }
}
DEVICE const uint16_t* halves(const bf16* values) {
  return reinterpret_cast<const uint16_t*>(values);
}
DEVICE uint16_t* halves(bf16* values) { return reinterpret_cast<uint16_t*>(values); }
DEVICE void load_four(const bf16* from, uint64_t element, uint64_t n, float (&values)[4]) {
  const uint2 four = load_halves(halves(from), element, n);
  values[0] = low_float(four.x), values[1] = high_float(four.x);
  values[2] = low_float(four.y), values[3] = high_float(four.y);
}

// ---------------------------------------------------------------- parameters
DEVICE void store_working(bf16* to, uint64_t element, uint64_t n, const float (&w)[4]) {
  store_halves<true>(halves(to), element, n,
                     make_uint2(rounded_parameters(w[0], w[1]), rounded_parameters(w[2], w[3])));
}

// As f32, with a rounded copy or without.
struct Whole {
  float* parameters;  // [n]
  bf16* working;      // [n], rounded_parameter of each, or null
};
DEVICE void load_four(const Whole& from, uint64_t element, uint64_t n, float (&w)[4]) {
  load_four(from.parameters, element, n, w);
}
DEVICE void store_four(const Whole& to, uint64_t element, uint64_t n, const float (&w)[4]) {
  store_four(to.parameters, element, n, w);
  if (to.working) store_working(to.working, element, n, w);
}

// As the rounded copy and the lower half of the bits of each: from 0x8000 on, it has raised the
// upper half by 1, which is what a 16-bit number with a sign takes back when it is added. Some
// parameters are vectors that kernels read in f32: those have a copy, too.
struct Split {
  bf16* working;               // [n]
  uint16_t* lower;             // [n]
  float* vectors;              // copies of all of them, whatever part of the parameters this is
  const uint64_t* boundaries;  // [2 count], ascending: where each vector begins and ends
  const uint64_t* places;      // [count]: where its copy begins
  int count;
};
DEVICE float joined(uint32_t upper, uint32_t lower) {
  return __uint_as_float((upper & 0xffff0000u) + uint32_t(int32_t(lower) >> 16));
}
DEVICE void load_four(const Split& from, uint64_t element, uint64_t n, float (&w)[4]) {
  const uint2 upper = load_halves(halves(from.working), element, n);
  const uint2 lower = load_halves(from.lower, element, n);
  w[0] = joined(upper.x << 16, lower.x << 16);
  w[1] = joined(upper.x, lower.x);
  w[2] = joined(upper.y << 16, lower.y << 16);
  w[3] = joined(upper.y, lower.y);
}
DEVICE uint32_t lower_halves(float low, float high) {
  return (__float_as_uint(low) & 0xffffu) | __float_as_uint(high) << 16;
}
DEVICE void store_four(const Split& to, uint64_t element, uint64_t n, const float (&w)[4]) {
  store_working(to.working, element, n, w);
  store_halves(to.lower, element, n,
               make_uint2(lower_halves(w[0], w[1]), lower_halves(w[2], w[3])));
}

// Whether a block of elements may hold some of a vector, then the copies of four of them.
DEVICE bool holds_vectors(const Whole&, uint64_t, uint64_t) { return false; }
DEVICE void store_vectors(const Whole&, uint64_t, const float (&)[4]) {}
DEVICE bool holds_vectors(const Split& to, uint64_t begin, uint64_t end) {
  const int passed = boundaries_passed(to.boundaries, 0, 2 * to.count, begin);
  return passed % 2 != 0 || (passed < 2 * to.count && to.boundaries[passed] < end);
}
DEVICE void store_vectors(const Split& to, uint64_t index, const float (&w)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int passed = boundaries_passed(to.boundaries, 0, 2 * to.count, index + j);
    if (passed % 2 != 0)
      to.vectors[to.places[passed / 2] + (index + j - to.boundaries[passed - 1])] = w[j];
  }
}

// ---------------------------------------------------------------- moments
// Philox4x32, as src/random.rs has it, with 7 rounds: the fewest with which it passes BigCrush
// (Salmon et al. 2011, table 2). Random numbers of other uses have 10.
DEVICE uint4 philox(uint64_t seed, uint64_t stream, uint64_t counter) {
  uint32_t x[4] = {uint32_t(counter), uint32_t(counter >> 32), uint32_t(stream),
                   uint32_t(stream >> 32)};
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t first = uint64_t(0xd2511f53u) * x[0], second = uint64_t(0xcd9e8d57u) * x[2];
    x[0] = uint32_t(second >> 32) ^ x[1] ^ key[0];
    x[1] = uint32_t(second);
    x[2] = uint32_t(first >> 32) ^ x[3] ^ key[1];
    x[3] = uint32_t(first);
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
  return make_uint4(x[0], x[1], x[2], x[3]);
}
// The moments of four elements; `index` is that of the first one in the whole flat buffer.
DEVICE void store_moments(const Scalars&, float* moment1, float* moment2, uint64_t element,
                          uint64_t n, uint64_t, const float (&m)[4], const float (&v)[4]) {
  store_four(moment1, element, n, m);
  store_four(moment2, element, n, v);
}
// Each is raised by a random part of a step: it becomes a neighbour as often as it is near it, and
// the mean is exact. One draw for the four: of the number of each the lower half for the first
// moment, the upper half for the second one. Who computes an element, and in which launch, does not
// matter.
DEVICE void store_moments(const Scalars& step, bf16* moment1, bf16* moment2, uint64_t element,
                          uint64_t n, uint64_t index, const float (&m)[4], const float (&v)[4]) {
  const uint4 drawn = philox(step.seed, step.stream, index / 4);
  const uint32_t random[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
  uint32_t rounded[2][4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    rounded[0][j] = raised(m[j], random[j] & 0xffffu);
    rounded[1][j] = raised(v[j], random[j] >> 16);
  }
  uint2 pairs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    pairs[i] = make_uint2(upper_halves(rounded[i][0], rounded[i][1]),
                          upper_halves(rounded[i][2], rounded[i][3]));
  store_halves(halves(moment1), element, n, pairs[0]);
  store_halves(halves(moment2), element, n, pairs[1]);
}

// m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
// w -= lr (m / c1 / (sqrt(v / c2) + eps) + decay w)
DEVICE void update(const Scalars& step, float scale, bool decays, float gradient, float& w,
                   float& m, float& v) {
  const float g = gradient * scale + (decays ? step.coupled : 0.0f) * w;
  m = step.beta1 * m + step.rest1 * g;
  v = step.beta2 * v + step.rest2 * g * g;
  const float direction = __fdiv_rn(m * step.inverse1, __fsqrt_rn(v * step.inverse2) + step.eps);
  w -= step.lr * (direction + (decays ? step.decoupled : 0.0f) * w);
}

// Two vectors of four arrays are 128 bytes in flight for a thread (96 where moments are bf16),
// which at half occupancy is more than memory can deliver in the time of one access.
constexpr int UPDATE_THREADS = 256, UPDATE_VECTORS = 2;
constexpr int CHUNK = 4 * UPDATE_THREADS * UPDATE_VECTORS;  // elements of a block

template <class Parameters, class Moment>
DEVICE void update_chunk(const Scalars* scalars,      // [1]
                         const float* grad_norm,      // [1]
                         const uint64_t* boundaries,  // [boundary_count], ascending
                         int boundary_count, const Parameters& parameters,
                         const float* gradients,  // [n]
                         Moment* moment1,         // [n]
                         Moment* moment2,         // [n]
                         uint64_t n,
                         uint64_t first) {  // of the whole flat buffer; 4 divides it
  begin_after_previous();
  const uint64_t chunk = uint64_t(blockIdx.x) * CHUNK;
  float w[UPDATE_VECTORS][4], g[UPDATE_VECTORS][4], m[UPDATE_VECTORS][4], v[UPDATE_VECTORS][4];
#pragma unroll
  for (int i = 0; i < UPDATE_VECTORS; ++i) {
    const uint64_t element = chunk + 4 * (i * UPDATE_THREADS + threadIdx.x);
    load_four(parameters, element, n, w[i]);
    load_four(gradients, element, n, g[i]);
    load_four(moment1, element, n, m[i]);
    load_four(moment2, element, n, v[i]);
  }

  // The same for the whole block, from the cache, while the elements are on their way.
  const float norm = grad_norm[0];
  if ((__float_as_uint(norm) & 0x7f800000u) == 0x7f800000u) return;
  const Scalars step = *scalars;
  const float scale = step.clip > 0 && norm > step.clip ? __fdiv_rn(step.clip, norm) : 1.0f;
  const int passed = boundaries_passed(boundaries, 0, boundary_count, first + chunk);
  const bool mixed = passed < boundary_count && boundaries[passed] < first + chunk + CHUNK;
  const bool vectors = holds_vectors(parameters, first + chunk, first + chunk + CHUNK);

#pragma unroll
  for (int i = 0; i < UPDATE_VECTORS; ++i) {
    const uint64_t element = chunk + 4 * (i * UPDATE_THREADS + threadIdx.x);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int count = passed;
      if (mixed) count = boundaries_passed(boundaries, passed, boundary_count, first + element + j);
      update(step, scale, count % 2 != 0, g[i][j], w[i][j], m[i][j], v[i][j]);
    }
    store_four(parameters, element, n, w[i]);
    store_moments(step, moment1, moment2, element, n, first + element, m[i], v[i]);
    if (vectors) store_vectors(parameters, first + element, w[i]);
  }
}

#define ADAMW_UPDATE(moment)                                                                       \
  KERNEL(adamw_update_##moment, UPDATE_THREADS, 4)                                                 \
  (const Scalars* scalars, const float* grad_norm, const uint64_t* boundaries, int boundary_count, \
   const float* gradients, moment* moment1, moment* moment2, uint64_t n, uint64_t first,           \
   float* parameters, bf16* working) {                                                             \
    const Whole whole = {parameters, working};                                                     \
    update_chunk(scalars, grad_norm, boundaries, boundary_count, whole, gradients, moment1,        \
                 moment2, n, first);                                                               \
  }                                                                                                \
  EXPORT_KERNEL(adamw_update_##moment)                                                             \
  KERNEL(adamw_update_split_##moment, UPDATE_THREADS, 4)                                           \
  (const Scalars* scalars, const float* grad_norm, const uint64_t* boundaries, int boundary_count, \
   const float* gradients, moment* moment1, moment* moment2, uint64_t n, uint64_t first,           \
   bf16* working, uint16_t* lower, float* vectors, const uint64_t* vector_boundaries,              \
   const uint64_t* vector_places, int vector_count) {                                              \
    const Split split = {working, lower, vectors, vector_boundaries, vector_places, vector_count}; \
    update_chunk(scalars, grad_norm, boundaries, boundary_count, split, gradients, moment1,        \
                 moment2, n, first);                                                               \
  }                                                                                                \
  EXPORT_KERNEL(adamw_update_split_##moment)
ADAMW_UPDATE(f32)
ADAMW_UPDATE(bf16)
