// wgmma: recorded by each of the 128 threads, computed when they wait, in the order of issue.
//
// A thread's accumulators are worked on where they lie. In register i of thread t stands
//   row 16 (t/32) + (t%32)/4 + 8 (i/2 % 2), column 8 (i/4) + 2 (t%4) + i%2,
// so that four consecutive registers want a row pair of A as (r, r, r+8, r+8) and a column pair of
// B as (c, c+1, c, c+1): both operands are laid out so, and the inner loop is whole vectors. (PTX
// ISA, "Register Fragments for wgmma"; the reference "Hopper kernels" has the checked formulas.)
#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>

#include "fault.h"
#include "race.h"
#include "shared.h"

namespace simt {

static constexpr int M = 64, K_STEP = 16, MOST_STEPS = 4, MOST_K = K_STEP * MOST_STEPS,
                     MOST_N = 256;
static constexpr int ROW_PAIRS = 32, QUADS = 4;

namespace {

// Operands of up to MOST_STEPS wgmmas that add to the same accumulators.
struct Operands {
  float a[MOST_K][ROW_PAIRS][4];       // (r, r, r+8, r+8) of row pair p = 8 warp + group
  float b[MOST_K][QUADS][MOST_N / 2];  // by register, for the threads of one quad position
};

typedef float Four __attribute__((vector_size(16), aligned(4)));

}  // namespace

// On the heap: a machine in a shared library finds little room for thread-local storage. `operands`
// is set by whoever uses it first in `compute`.
static thread_local std::unique_ptr<Operands> own_operands;
static __thread Operands* operands;

static inline float value_of(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

// ---------------------------------------------------------------- where the operands lie
namespace {

struct Descriptor {
  uint32_t start, leading, stride, span;
  Descriptor(uint64_t bits, Site site) {
    start = uint32_t(bits & 0x3fff) << 4;
    leading = uint32_t(bits >> 16 & 0x3fff) << 4;
    stride = uint32_t(bits >> 32 & 0x3fff) << 4;
    constexpr uint32_t SPANS[] = {0, 128, 64, 32};
    span = SPANS[bits >> 62];
    if (bits >> 49 & 7)
      fail_at(*self(), "wgmma", site, "descriptors with a base offset are not supported here");
  }
  uint32_t swizzled(uint32_t address) const {
    return span ? address ^ ((address >> 3) & (span - 16)) : address;
  }
  // K-major: the 8 values k = 8 half ... of row `row`.
  uint32_t k_major(uint32_t row, uint32_t half) const {
    const uint32_t row_bytes = span ? span : 16;
    return swizzled(start + row / 8 * stride + row % 8 * row_bytes + half * (span ? 16 : leading));
  }
  // MN-major: the 8 values m = 8 eighth ... of k. With a swizzle, rows of `span` bytes hold span/2
  // values of one k; blocks of them are `leading` bytes apart, groups of 8 k `stride` bytes.
  // Without one, core matrices are 8 k by 8 m, `stride` apart along m and `leading` along k.
  uint32_t mn_major(uint32_t eighth, uint32_t k) const {
    if (!span) return start + eighth * stride + k / 8 * leading + k % 8 * 16;
    const uint32_t per_row = span / 16;
    return swizzled(start + eighth / per_row * leading + k / 8 * stride + k % 8 * span +
                    eighth % per_row * 16);
  }
};

}  // namespace

namespace {

// An operand in shared memory: what is read of it is checked.
class Source {
 public:
  Source(Block* block, const Clock& clock, Site site)
      : block_(block),
        site_(site),
        accesses_(*block, clock, READ | ASYNC | WARPGROUP, place_of(site)) {}
  const uint16_t* eight(uint32_t address) {
    const uint8_t* p = checked_shared(block_, address, 16, "wgmma", site_);
    if (worker->race) accesses_.line(address);
    return reinterpret_cast<const uint16_t*>(p);
  }
  // The lines of an operand lie far apart for the detector: asked for some rows ahead.
  static constexpr uint32_t AHEAD = 8;
  void prefetch(uint32_t address) const {
    if (worker->race) accesses_.prefetch(address);
  }

 private:
  Block* block_;
  Site site_;
  SharedAccesses accesses_;
};

}  // namespace

static void put_a(int row, int k, float value) {
  float* four = operands->a[k][row / 16 * 8 + row % 8];
  four[row / 8 % 2 * 2] = four[row / 8 % 2 * 2 + 1] = value;
}

static void load_a(Block* block, const Product& product, int k0, const Clock& clock) {
  const Descriptor descriptor(product.a, product.site);
  Source source(block, clock, product.site);
  if (product.trans_a) {
    for (int k = 0; k < K_STEP; k++)
      for (int m = 0; m < M; m += 8) {
        const uint16_t* values = source.eight(descriptor.mn_major(uint32_t(m) / 8, uint32_t(k)));
        for (int i = 0; i < 8; i++) put_a(m + i, k0 + k, value_of(values[i]));
      }
    return;
  }
  for (int pair = 0; pair < ROW_PAIRS; pair++) {
    const uint32_t row = uint32_t(pair / 8 * 16 + pair % 8);
    source.prefetch(descriptor.k_major(row + Source::AHEAD, 0));
    source.prefetch(descriptor.k_major(row + 8 + Source::AHEAD, 0));
    for (int half = 0; half < 2; half++) {
      const uint16_t* upper = source.eight(descriptor.k_major(row, uint32_t(half)));
      const uint16_t* lower = source.eight(descriptor.k_major(row + 8, uint32_t(half)));
      for (int i = 0; i < 8; i++) {
        const float u = value_of(upper[i]), l = value_of(lower[i]);
        const Four four = {u, u, l, l};
        std::memcpy(operands->a[k0 + half * 8 + i][pair], &four, sizeof four);
      }
    }
  }
}

static void load_registers(const Product& product, uint32_t thread, int k0) {
  const uint32_t(&registers)[4] = product.registers[thread];
  for (int r = 0; r < 4; r++) {
    const int row = int(thread / 32 * 16 + thread % 32 / 4) + r % 2 * 8;
    const int k = k0 + int(thread % 4) * 2 + r / 2 * 8;
    put_a(row, k, value_of(uint16_t(registers[r])));
    put_a(row, k + 1, value_of(uint16_t(registers[r] >> 16)));
  }
}

static void load_b(Block* block, const Product& product, int k0, const Clock& clock) {
  const Descriptor descriptor(product.b, product.site);
  Source source(block, clock, product.site);
  const int n = product.n;
  if (product.trans_b) {
    for (int k = 0; k < K_STEP; k++)
      for (int column = 0; column < n; column += 8) {
        const uint16_t* values =
            source.eight(descriptor.mn_major(uint32_t(column) / 8, uint32_t(k)));
        for (int quad = 0; quad < QUADS; quad++) {
          const float c0 = value_of(values[2 * quad]), c1 = value_of(values[2 * quad + 1]);
          const Four four = {c0, c1, c0, c1};
          std::memcpy(&operands->b[k0 + k][quad][column / 2], &four, sizeof four);
        }
      }
    return;
  }
  for (int column = 0; column < n; column += 2) {
    source.prefetch(descriptor.k_major(uint32_t(column) + Source::AHEAD, 0));
    source.prefetch(descriptor.k_major(uint32_t(column) + Source::AHEAD + 1, 0));
    for (int half = 0; half < 2; half++) {
      const uint16_t* first = source.eight(descriptor.k_major(uint32_t(column), uint32_t(half)));
      const uint16_t* second =
          source.eight(descriptor.k_major(uint32_t(column) + 1, uint32_t(half)));
      const int quad = column % 8 / 2, at = column / 8 * 4;
      for (int i = 0; i < 8; i++) {
        const float c0 = value_of(first[i]), c1 = value_of(second[i]);
        const Four four = {c0, c1, c0, c1};
        std::memcpy(&operands->b[k0 + half * 8 + i][quad][at], &four, sizeof four);
      }
    }
  }
}

// ---------------------------------------------------------------- the product
namespace {

// Vectors of three instruction sets, and how many of them a loop keeps of each of its threads:
// these sums, a row and a column fit in the registers. A vector that the processor does not have
// would be taken apart in memory.
struct Avx512 {
  typedef float Vector __attribute__((vector_size(64), aligned(4)));
  static constexpr int LANES = 16, BLOCKS = 4;
  static void repeat(Four a, Vector& rows) {
    rows = __builtin_shufflevector(a, a, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  }
};
struct Avx2 {
  typedef float Vector __attribute__((vector_size(32), aligned(4)));
  static constexpr int LANES = 8, BLOCKS = 2;
  static void repeat(Four a, Vector& rows) {
    rows = __builtin_shufflevector(a, a, 0, 1, 2, 3, 0, 1, 2, 3);
  }
};
struct Sse {
  typedef float Vector __attribute__((vector_size(16), aligned(4)));
  static constexpr int LANES = 4, BLOCKS = 2;
  static void repeat(Four a, Vector& rows) { rows = a; }
};

}  // namespace

constexpr int TOGETHER = 4;  // threads: their row pairs share what is read of B

// d of TOGETHER threads, registers [first, first + LANES Blocks): all of k for a few vectors at a
// time.
template <class Kind, int Blocks>
static inline __attribute__((always_inline)) void multiply_vectors(float* const (&d)[TOGETHER],
                                                                   int group, int quad, int first,
                                                                   int ks, bool keep) {
  using Vector = typename Kind::Vector;
  Vector sum[TOGETHER][Blocks];
  for (int t = 0; t < TOGETHER; t++)
    for (int j = 0; j < Blocks; j++)
      sum[t][j] =
          keep ? *reinterpret_cast<const Vector*>(d[t] + first + Kind::LANES * j) : Vector{};
  for (int k = 0; k < ks; k++) {
    Vector b[Blocks];
    for (int j = 0; j < Blocks; j++)
      b[j] = *reinterpret_cast<const Vector*>(&operands->b[k][quad][first + Kind::LANES * j]);
    for (int t = 0; t < TOGETHER; t++) {
      Vector a;
      Kind::repeat(*reinterpret_cast<const Four*>(operands->a[k][group + t]), a);
      for (int j = 0; j < Blocks; j++) sum[t][j] += a * b[j];
    }
  }
  for (int t = 0; t < TOGETHER; t++)
    for (int j = 0; j < Blocks; j++)
      *reinterpret_cast<Vector*>(d[t] + first + Kind::LANES * j) = sum[t][j];
}

template <class Kind>
static inline __attribute__((always_inline)) void multiply_with(float* const* d, int n, int ks,
                                                                bool keep) {
  constexpr int MOST = Kind::LANES * Kind::BLOCKS;
  const int registers = n / 2, whole = registers / Kind::LANES * Kind::LANES;
  for (int quad = 0; quad < QUADS; quad++)
    for (int group = 0; group < ROW_PAIRS; group += TOGETHER) {
      float* mine[TOGETHER];
      for (int t = 0; t < TOGETHER; t++) mine[t] = d[(group + t) * 4 + quad];
      int first = 0;
      for (; first + MOST <= whole; first += MOST)
        multiply_vectors<Kind, Kind::BLOCKS>(mine, group, quad, first, ks, keep);
      for (; first < whole; first += Kind::LANES)
        multiply_vectors<Kind, 1>(mine, group, quad, first, ks, keep);
      for (; first < registers; first += Sse::LANES)
        multiply_vectors<Sse, 1>(mine, group, quad, first, ks, keep);
    }
}

__attribute__((target("arch=x86-64-v4"))) static void multiply_all(float* const* d, int n, int ks,
                                                                   bool keep) {
  multiply_with<Avx512>(d, n, ks, keep);
}
__attribute__((target("arch=x86-64-v3"))) static void multiply_all(float* const* d, int n, int ks,
                                                                   bool keep) {
  multiply_with<Avx2>(d, n, ks, keep);
}
__attribute__((target("default"))) static void multiply_all(float* const* d, int n, int ks,
                                                            bool keep) {
  multiply_with<Sse>(d, n, ks, keep);
}

// ---------------------------------------------------------------- registers
// In race mode: what ordinary instructions touched since the thread's last wgmma_fence. A wgmma may
// use registers that were not, and accumulators of another wgmma of the same shape (PTX ISA,
// wgmma.fence).
struct Registers {
  static constexpr uint32_t WORD = 4, BITS = 64, ELEMENTS = STACK_BYTES / WORD / BITS;
  uint64_t touched[ELEMENTS] = {};
  uint32_t first = ELEMENTS, last = 0;  // elements that are not 0 lie within
  struct Touch {
    const uint8_t *begin, *end;
    uintptr_t pc;
    bool write;
  };
  Touch recent[16] = {};
  uint32_t touches = 0;
  struct Range {
    const uint8_t *begin, *end;
    Site site;
  };
  std::vector<Range> accumulators;  // of the wgmmas since the fence

  void fence() {
    for (; first <= last && first < ELEMENTS; first++) touched[first] = 0;
    first = ELEMENTS;
    last = touches = 0;
    accumulators.clear();
  }
};

void touch_registers(Fiber& fiber, const void* p, uint32_t bytes, bool write, uintptr_t pc) {
  Registers& registers = *fiber.registers;
  const auto* begin = static_cast<const uint8_t*>(p);
  const auto* end = min(begin + bytes, fiber.stack_bottom + STACK_BYTES);
  const auto from = uint32_t(begin - fiber.stack_bottom) / Registers::WORD;
  const auto to = uint32_t(end - 1 - fiber.stack_bottom) / Registers::WORD;
  for (uint32_t word = from; word <= to; word++)
    registers.touched[word / Registers::BITS] |= uint64_t(1) << word % Registers::BITS;
  registers.first = min(registers.first, from / Registers::BITS);
  registers.last = max(registers.last, to / Registers::BITS);
  registers.recent[registers.touches++ % std::size(registers.recent)] = {begin, end, pc, write};
}

// Registers of a wgmma that is being issued: [begin, begin + bytes).
static void check_untouched(const Fiber& fiber, const void* p, uint32_t bytes, const char* name,
                            Site site) {
  const Registers& registers = *fiber.registers;
  const auto *begin = static_cast<const uint8_t*>(p), *end = begin + bytes;
  if (size_t(begin - fiber.stack_bottom) >= STACK_BYTES) return;
  const auto from = uint32_t(begin - fiber.stack_bottom) / Registers::WORD;
  for (uint32_t word = from; word < from + bytes / Registers::WORD; word++) {
    if (!(registers.touched[word / Registers::BITS] >> word % Registers::BITS & 1)) continue;
    std::string where = "used";
    for (uint32_t back = 1; back <= min<uint32_t>(registers.touches, 16); back++) {
      const Registers::Touch& touch = registers.recent[(registers.touches - back) % 16];
      if (touch.end <= begin || touch.begin >= end) continue;
      where =
          format("%s at %s", touch.write ? "written" : "read", describe_code(touch.pc - 1).c_str());
      break;
    }
    fail_at(fiber, "wgmma", site,
            format("its %s were %s after the last wgmma_fence", name, where.c_str()));
  }
}

static void check_accumulators(Fiber& fiber, const void* p, uint32_t bytes, Site site) {
  std::vector<Registers::Range>& before = fiber.registers->accumulators;
  const auto *begin = static_cast<const uint8_t*>(p), *end = begin + bytes;
  for (const Registers::Range& other : before) {
    if (other.begin == begin && other.end == end) return;
    if (other.begin < end && begin < other.end)
      fail_at(fiber, "wgmma", site,
              format("its accumulators are those of the wgmma of another shape at %s, with no "
                     "wgmma_fence in between",
                     describe(other.site).c_str()));
  }
  before.push_back({begin, end, site});
}

// ---------------------------------------------------------------- issue
const Product* pending_product(const Fiber& fiber) {
  if (!fiber.products) return nullptr;
  const Warpgroup& group = warpgroup_of(fiber);
  return fiber.products > group.retired ? group.products.front() : nullptr;
}

namespace {

// What a thread passes to a wgmma.
struct Call {
  float* d;
  const uint32_t* registers;  // null: A lies in shared memory
  uint64_t a, b;
  int n, scale_d;
  bool trans_a, trans_b;
};

}  // namespace

static bool agrees(const Product& product, const Call& call, uint32_t group, Site site) {
  return product.a == call.a && product.b == call.b && product.n == call.n &&
         product.scale_d == (call.scale_d != 0) && product.trans_a == call.trans_a &&
         product.trans_b == call.trans_b && product.in_registers == (call.registers != nullptr) &&
         product.group == group && product.site.line == site.line;
}

static void issue(const Call& call, Site site) {
  Fiber& fiber = *self();
  if (!fiber.product_fenced) fail_at(fiber, "wgmma", site, "no wgmma_fence came before");
  if ((fiber.id / WARPGROUP_THREADS + 1) * WARPGROUP_THREADS > fiber.block->threads)
    fail_at(fiber, "wgmma", site, "the thread belongs to no whole warpgroup");
  if (fiber.registers) {
    const auto bytes = uint32_t(call.n) * 2;
    check_untouched(fiber, call.d, bytes, "accumulators", site);
    check_accumulators(fiber, call.d, bytes, site);
    if (call.registers)
      check_untouched(fiber, call.registers, sizeof(Product::registers[0]), "register operand",
                      site);
  }
  Warpgroup& group = warpgroup_of(fiber);
  const uint32_t index = fiber.products++ - group.retired;
  if (index == group.products.size()) {
    std::vector<Product*>& unused = worker->free_products;
    Product* fresh = unused.empty() ? new Product : unused.back();
    if (!unused.empty()) unused.pop_back();
    fresh->a = call.a;
    fresh->b = call.b;
    fresh->n = call.n;
    fresh->scale_d = call.scale_d != 0;
    fresh->in_registers = call.registers != nullptr;
    fresh->trans_a = call.trans_a;
    fresh->trans_b = call.trans_b;
    fresh->group = fiber.product_group;
    fresh->site = site;
    for (Collected& known : fresh->known) known.take();
    group.products.push_back(fresh);
  }
  Product& product = *group.products[index];
  if (!agrees(product, call, fiber.product_group, site))
    fail_at(fiber, "wgmma", site,
            format("another thread of the warpgroup has the wgmma of %s in its place, or other "
                   "operands: all 128 must agree",
                   describe(product.site).c_str()));
  const uint32_t thread = fiber.id % WARPGROUP_THREADS;
  product.d[thread] = call.d;
  if (call.registers) {
    product.source[thread] = call.registers;
    std::memcpy(product.registers[thread], call.registers, sizeof product.registers[thread]);
  }
  if (worker->race) {
    product.known[thread / WARP_THREADS].add(fiber.known, fiber.actor, fiber.now,
                                             fiber.copies_done);
  }
}

void wgmma_shared(float* d, int n, uint64_t a, uint64_t b, int scale_d, bool trans_a, bool trans_b,
                  Site site) {
  issue({d, nullptr, a, b, n, scale_d, trans_a, trans_b}, site);
}

void wgmma_registers(float* d, int n, const uint32_t* a, uint64_t b, int scale_d, bool trans_b,
                     Site site) {
  issue({d, a, 0, b, n, scale_d, false, trans_b}, site);
}

// ---------------------------------------------------------------- wait
// What the whole warpgroup knows at issue: the least of what its warps know.
static Known known_by_all(Product& product) {
  Known warps[4];
  std::transform(product.known, product.known + 4, warps, [](Collected& of) { return of.take(); });
  auto least = std::make_shared<Vector>(*warps[0]);
  for (const Known& other : warps) {
    if (least->ticks.size() > other->ticks.size()) least->ticks.resize(other->ticks.size());
    for (size_t i = 0; i < least->ticks.size(); i++)
      least->ticks[i] = std::min(least->ticks[i], other->ticks[i]);
  }
  return least;
}

// Its warps' actors, four in a row.
static Actor actor_of(Warpgroup& group, const Fiber& first) {
  if (group.actor) return group.actor;
  const std::string name = "the wgmma of " + describe(first) + " and the 127 after it";
  group.actor = new_agent(name);
  for (int warp = 1; warp < 4; warp++) new_agent(name);
  return group.actor;
}

// Computes the first `count` products.
static void compute(Warpgroup& group, const Fiber& first, size_t count) {
  if (!own_operands) own_operands = std::make_unique<Operands>();
  operands = own_operands.get();
  std::vector<bool> done(count);
  for (size_t i = 0; i < count; i++) {
    if (done[i]) continue;
    const Product& head = *group.products[i];
    int steps = 0;
    for (size_t j = i; j < count && steps < MOST_STEPS; j++) {
      Product& product = *group.products[j];
      if (done[j] || product.d[0] != head.d[0]) continue;
      if (product.n != head.n) break;
      if (steps && !product.scale_d) break;
      Clock clock;
      if (worker->race) clock = {actor_of(group, first), product.group + 1, known_by_all(product)};
      if (product.in_registers) {
        for (uint32_t t = 0; t < WARPGROUP_THREADS; t++) load_registers(product, t, steps * K_STEP);
      } else {
        load_a(first.block, product, steps * K_STEP, clock);
      }
      load_b(first.block, product, steps * K_STEP, clock);
      done[j] = true;
      steps++;
    }
    multiply_all(head.d, head.n, steps * K_STEP, head.scale_d);
  }
}

void wgmma_wait(int groups, Site site) {
  Fiber& fiber = *self();
  Block& block = *fiber.block;
  if ((fiber.id / WARPGROUP_THREADS + 1) * WARPGROUP_THREADS > block.threads)
    fail_at(fiber, "wgmma_wait", site, "the thread belongs to no whole warpgroup");
  Warpgroup& group = warpgroup_of(fiber);
  fiber.product_wait = groups;
  if (++group.arrived < WARPGROUP_THREADS) {
    group.waiting.push_back(&fiber);
    block_on(Wait::Wgmma, &group, uint64_t(groups), site);
    return;
  }
  group.arrived = 0;
  Fiber* first = &block.fibers[fiber.id / WARPGROUP_THREADS * WARPGROUP_THREADS];
  for (uint32_t t = 1; t < WARPGROUP_THREADS; t++) {
    if (first[t].products != first->products || first[t].product_wait != first->product_wait)
      fail_at(first[t], "wgmma_wait", site,
              format("the warpgroup has diverged: thread %u issued %u wgmmas and waits for all but "
                     "%d groups, this one %u and %d",
                     first->id, first->products, first->product_wait, first[t].products,
                     first[t].product_wait));
  }
  size_t count = 0;
  while (count < group.products.size() &&
         group.products[count]->group + uint32_t(groups) < first->product_group)
    count++;
  compute(group, *first, count);
  if (worker->race && count) {
    // A thread waits for the part of its own warp only.
    const Tick upto = group.products[count - 1]->group + 1;
    const Actor actor = actor_of(group, *first);
    for (uint32_t t = 0; t < WARPGROUP_THREADS; t++)
      first[t].known = raised(first[t].known, actor + t / WARP_THREADS, upto);
  }
  for (size_t i = 0; i < count; i++) worker->free_products.push_back(group.products[i]);
  group.products.erase(group.products.begin(), group.products.begin() + long(count));
  group.retired += uint32_t(count);
  for (Fiber* waiting : group.waiting) make_ready(waiting);
  group.waiting.clear();
}

}  // namespace simt

using namespace simt;

void wgmma_fence(Site) {
  Fiber& fiber = *self();
  fiber.product_fenced = true;
  if (!worker->race) return;
  if (!fiber.registers) fiber.registers = std::make_shared<Registers>();
  fiber.registers->fence();
}
void wgmma_commit(Site) { self()->product_group++; }
