// Asynchronous copies: cp.async, and everything that TMA does, by tensor map or in bulk.
//
// A cp.async happens at its wait at the latest, a TMA operation when the schedule lets it: when no
// thread can go on (late), at once (early), or at any time. What a kernel may rely on is only what
// it waited for.
#include <algorithm>
#include <cstring>

#include "device_memory.h"
#include "fault.h"
#include "order.h"
#include "race.h"
#include "shared.h"

namespace simt {

// ---------------------------------------------------------------- cp.async
static void check_global_read(Fiber& fiber, const void* p, uint32_t bytes, const char* what,
                              Site site) {
  check_waited(fiber, what, p, site);
  if (!owns(p, bytes))
    fail_at(fiber, what, site,
            format("out of bounds: %u bytes at %s", bytes, describe_global(p).c_str()));
}

static void do_copy(const CpAsync& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(copy.to + copy.bytes, 0, copy.zeros);
}

static void cp_async(void* shared, const void* global, uint32_t bytes, uint32_t size, Site site) {
  Fiber& fiber = *self();
  const char* what = "cp.async";
  if (bytes > size) fail_at(fiber, what, site, format("%u of %u bytes", bytes, size));
  const uintptr_t both = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if (both % size)
    fail_at(fiber, what, site, format("both addresses must be multiples of %u", size));
  check_own_block(fiber, shared, what, site);
  checked_shared(shared, size, what, site);
  if (bytes) check_global_read(fiber, global, bytes, what, site);
  CpAsync copy{static_cast<uint8_t*>(shared),
               static_cast<const uint8_t*>(global),
               uint8_t(bytes),
               uint8_t(size - bytes),
               false,
               fiber.copy_group,
               site};
  Worker& w = *worker;
  if (w.race) {
    // Both are as long as the wait takes to come.
    if (bytes) prefetch_global(global);
    race_thread(fiber, shared, size, WRITE | PENDING, place_of(site));
    if (bytes) race_thread(fiber, global, bytes, READ | PENDING, place_of(site));
  }
  if (w.asynchronous == SIMT_EARLY || (w.asynchronous == SIMT_ANYTIME && random_bits() % 4 == 0)) {
    do_copy(copy);
    copy.copied = true;
  }
  fiber.copies.push_back(copy);
}

void cp_async_wait(int groups, Site) {
  Fiber& fiber = *self();
  size_t done = 0;
  for (; done < fiber.copies.size(); done++) {
    const CpAsync& copy = fiber.copies[done];
    if (copy.group + uint32_t(groups) >= fiber.copy_group) break;
    if (!copy.copied) do_copy(copy);
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + long(done));
  if (!worker->race || fiber.copy_group <= fiber.copies_done + uint32_t(groups)) return;
  fiber.copies_done = fiber.copy_group - uint32_t(groups);
  fiber.copy_waits.emplace_back(fiber.copies_done, fiber.now);
}

// ---------------------------------------------------------------- issue
static bool writes_global(Copy kind) {
  switch (kind) {
    case Copy::TensorStore:
    case Copy::TensorAdd:
    case Copy::Store:
    case Copy::AddF32:
    case Copy::AddBf16: return true;
    case Copy::TensorLoad:
    case Copy::Load:
    case Copy::Peer: return false;
  }
  return false;
}

static const char* name_of(Copy kind) {
  switch (kind) {
    case Copy::TensorLoad: return "tma_load";
    case Copy::TensorStore: return "tma_store";
    case Copy::TensorAdd: return "tma_reduce_add";
    case Copy::Load: return "bulk_load";
    case Copy::Store: return "bulk_store";
    case Copy::AddF32: return "bulk_reduce_add_f32";
    case Copy::AddBf16: return "bulk_reduce_add_bf16";
    case Copy::Peer: return "bulk_copy_cluster";
  }
  return "?";
}

// A thread's stores by group, the last tick of each, for the waits to come. Only a wait for the
// results forgets a group. Should nobody ever wait so, the oldest groups become one.
static void note_bulk(Fiber& fiber, uint32_t group, Tick tick) {
  constexpr size_t MOST_GROUPS = 1024;
  std::vector<std::pair<uint32_t, Tick>>& ticks = fiber.bulk_ticks;
  if (!ticks.empty() && ticks.back().first == group) {
    ticks.back().second = tick;
    return;
  }
  ticks.emplace_back(group, tick);
  if (ticks.size() > MOST_GROUPS) ticks.erase(ticks.begin());  // the one after it came later
}

// Every kind: checks what can be checked now, and enters the race detector's order.
static void issue(AsyncCopy copy) {
  Fiber& fiber = *self();
  const char* what = name_of(copy.kind);
  copy.issuer = &fiber;
  copy.group = fiber.bulk_group;
  const bool tensor = copy.kind <= Copy::TensorAdd;
  if (tensor) check_waited(fiber, what, nullptr, copy.site);
  const uint32_t alignment = tensor ? 128 : 16;
  if (reinterpret_cast<uintptr_t>(copy.shared) % alignment)
    fail_at(fiber, what, copy.site,
            format("the shared address must be a multiple of %u bytes", alignment));
  if (writes_global(copy.kind)) check_own_block(fiber, copy.shared, what, copy.site);
  if (copy.kind == Copy::Peer) check_own_block(fiber, copy.global, what, copy.site);
  checked_shared(copy.shared, copy.bytes, what, copy.site);
  copy.block = block_of(copy.shared);
  if (copy.block->finished == copy.block->threads)
    fail_at(fiber, what, copy.site,
            format("block %s has exited", describe(copy.block->index).c_str()));
  if (!tensor) {
    if (copy.bytes == 0 || copy.bytes % 16 || reinterpret_cast<uintptr_t>(copy.global) % 16)
      fail_at(fiber, what, copy.site,
              format("%u bytes to or from %p: both must be multiples of 16", copy.bytes,
                     static_cast<void*>(copy.global)));
    if (copy.kind == Copy::Peer)
      checked_shared(copy.global, copy.bytes, what, copy.site);
    else
      check_global_read(fiber, copy.global, copy.bytes, what, copy.site);
  }
  if (writes_global(copy.kind)) {
    fiber.bulk_last = copy.group + 1;
    fiber.bulk_site = copy.site;
    fiber.bulk_kind = copy.kind;
  }
  if (copy.barrier) {
    copy.barrier->last_copy = copy.kind;
    copy.barrier->copy_site = copy.site;
  }
  Worker& w = *worker;
  if (w.race) {
    if (writes_global(copy.kind)) {
      if (!fiber.bulk_reader) {
        const std::string me = describe(fiber);
        fiber.bulk_reader = new_agent("a bulk store of " + me);
        fiber.bulk_writer = new_agent("a bulk store of " + me);
      }
      const Tick tick = fiber.now;  // ticks of its agents follow the thread's
      copy.clock = race_handover(fiber, fiber.bulk_reader, tick);
      copy.write_clock = {fiber.bulk_writer, tick, copy.clock.known};
      note_bulk(fiber, copy.group, tick);
    } else {
      Mbarrier& barrier = *copy.barrier;
      const Fiber& init = *barrier.init_fiber;
      const Tick proxy_fence = init.shared_fences.empty() ? 0 : init.shared_fences.back();
      if (max(init.mbarrier_fence, proxy_fence) < barrier.init_tick)
        fail_at(fiber, what, copy.site,
                format("no fence_mbarrier_init followed the initialisation of the mbarrier at "
                       "shared 0x%x",
                       offset_in(barrier.block, barrier.address)));
      copy.clock = race_handover(fiber, barrier.actor, ++barrier.tick);
      // Its source must be there until it has been read.
      if (copy.kind == Copy::Peer)
        fiber.block->visitors[copy.clock.actor] = {copy.clock.tick, place_of(copy.site)};
    }
  }
  w.copies.push_back(std::move(copy));
  progress();
}

// ---------------------------------------------------------------- execution
static uint32_t swizzled(uint32_t address, uint32_t span) {
  return span ? address ^ ((address >> 3) & (span - 16)) : address;
}

static float bf16_sum(uint16_t a, uint16_t b) { return to_float(bf16{a}) + to_float(bf16{b}); }

// Each addition is atomic by itself, also against other workers and atomicAdd.
static void add_bf16(uint8_t* at, uint16_t added) {
  auto* p = reinterpret_cast<uint16_t*>(at);
  uint16_t before = __atomic_load_n(p, __ATOMIC_RELAXED), after;
  do {
    after = to_bf16(bf16_sum(before, added)).bits;
  } while (
      !__atomic_compare_exchange_n(p, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

template <class T, class F>
static void add_each(uint8_t* to, const uint8_t* from, uint32_t bytes, F&& add) {
  for (uint32_t i = 0; i < bytes; i += uint32_t(sizeof(T))) {
    T added;
    std::memcpy(&added, from + i, sizeof added);
    add(to + i, added);
  }
}

static void add(uint8_t* to, const uint8_t* from, uint32_t bytes, uint8_t data_type) {
  if (data_type == TENSOR_FLOAT32)
    add_each<float>(to, from, bytes,
                    [](uint8_t* at, float added) { add_f32(reinterpret_cast<float*>(at), added); });
  else
    add_each<uint16_t>(to, from, bytes, add_bf16);
}

static void race_on(const AsyncCopy& copy, const void* global, uint32_t bytes) {
  if (!worker->race || !bytes) return;
  const Place place = place_of(copy.site);
  switch (copy.kind) {
    case Copy::TensorLoad:
    case Copy::Load:
    case Copy::Peer: race_clock(copy.clock, global, bytes, READ | ASYNC, place); break;
    case Copy::TensorStore:
    case Copy::Store: race_clock(copy.write_clock, global, bytes, WRITE | ASYNC, place); break;
    case Copy::TensorAdd:
    case Copy::AddF32:
    case Copy::AddBf16:
      race_clock(copy.write_clock, global, bytes, WRITE | ASYNC | ATOMIC, place);
      break;
  }
}

// One row of a box: `inside` of its bytes from `skip` on exist in the tensor.
static void move_row(const AsyncCopy& copy, uint32_t shared_address, uint8_t* global, uint32_t skip,
                     uint32_t inside, uint32_t row_bytes) {
  constexpr uint32_t CHUNK = 16;
  uint8_t* window = copy.block->window;
  const uint32_t span = copy.map.swizzle_bytes;
  race_on(copy, global + skip, inside);
  for (uint32_t offset = 0; offset < row_bytes; offset += CHUNK) {
    uint8_t* chunk = window + swizzled(shared_address + offset, span);
    const uint32_t first = max(offset, skip), last = min(offset + CHUNK, skip + inside);
    const bool whole = first == offset && last == offset + CHUNK;
    if (whole && copy.kind == Copy::TensorLoad) {
      std::memcpy(chunk, global + offset, CHUNK);
      continue;
    }
    if (worker->race && copy.clipped && copy.kind != Copy::TensorLoad && last > first)
      race_clock(copy.clock, chunk + (first - offset), last - first, READ | ASYNC,
                 place_of(copy.site));
    switch (copy.kind) {
      case Copy::TensorLoad:
        // All bits set is a NaN in every floating-point type.
        std::memset(chunk, copy.map.nan_fill ? 0xff : 0, CHUNK);
        if (last > first) std::memcpy(chunk + (first - offset), global + first, last - first);
        break;
      case Copy::TensorStore:
        if (last > first) std::memcpy(global + first, chunk + (first - offset), last - first);
        break;
      default:
        if (last > first)
          add(global + first, chunk + (first - offset), last - first, copy.map.data_type);
    }
  }
}

static void run_tensor(const AsyncCopy& copy) {
  const TensorMapFields& map = copy.map;
  const uint32_t row_bytes = map.box[0] * map.element_bytes;
  const int64_t first = copy.at[0], end = first + map.box[0];
  const auto clamp = [&](int64_t x) {
    return uint32_t((min(max(x, first), end) - first) * map.element_bytes);
  };
  const uint32_t skip = clamp(0), inside_end = clamp(int64_t(map.dimensions[0]));
  uint32_t shared_address = offset_in(copy.block, copy.shared);
  uint32_t i[5] = {};
  for (;;) {
    bool exists = inside_end > skip;
    int64_t offset = first * map.element_bytes;
    for (int d = 1; d < 5; d++) {
      const int64_t at = int64_t(copy.at[d]) + i[d];
      exists &= at >= 0 && uint64_t(at) < map.dimensions[d];
      offset += at * int64_t(map.strides[d - 1]);
    }
    auto* global = reinterpret_cast<uint8_t*>(map.address + uint64_t(offset));
    move_row(copy, shared_address, global, exists ? skip : 0, exists ? inside_end - skip : 0,
             row_bytes);
    shared_address += row_bytes;
    int d = 1;
    while (d < 5 && ++i[d] == map.box[d]) i[d++] = 0;
    if (d == 5) return;
  }
}

static void run_bulk(const AsyncCopy& copy) {
  race_on(copy, copy.global, copy.bytes);
  switch (copy.kind) {
    case Copy::Load:
    case Copy::Peer: std::memcpy(copy.shared, copy.global, copy.bytes); break;
    case Copy::Store: std::memcpy(copy.global, copy.shared, copy.bytes); break;
    case Copy::AddF32: add(copy.global, copy.shared, copy.bytes, TENSOR_FLOAT32); break;
    default: add(copy.global, copy.shared, copy.bytes, TENSOR_BFLOAT16);
  }
}

void run_copy(AsyncCopy& copy) {
  Block& block = *copy.block;
  const bool store = writes_global(copy.kind);
  if (block.finished == block.threads && worker->finished < worker->threads) {
    fail(format("%s at %s: block %s exited while the copy was under way", name_of(copy.kind),
                describe(copy.site).c_str(), describe(block.index).c_str()));
  }
  if (worker->race && !(store && copy.clipped)) {  // else what exists is read, row by row
    race_clock(copy.clock, copy.shared, copy.bytes, (store ? READ : WRITE) | ASYNC,
               place_of(copy.site));
  }
  if (copy.kind <= Copy::TensorAdd)
    run_tensor(copy);
  else
    run_bulk(copy);
  if (store) return;
  if (worker->race) {
    copy.barrier->arriving.add(copy.clock.known, copy.clock.actor, copy.clock.tick);
  }
  complete_bytes(*copy.barrier, copy.bytes);
}

// ---------------------------------------------------------------- TMA
static AsyncCopy tensor_copy(Copy kind, const TensorMap* map, const void* shared,
                             const int* coordinates, int rank, Site site) {
  AsyncCopy copy{};
  copy.kind = kind;
  copy.site = site;
  std::memcpy(&copy.map, map, sizeof copy.map);
  if (copy.map.magic != TensorMapFields::MAGIC)
    fail_at(*self(), name_of(kind), site, "the argument is not a tensor map of this machine");
  if (copy.map.rank != rank)
    fail_at(*self(), name_of(kind), site,
            format("%d coordinates for a tensor map of rank %d", rank, copy.map.rank));
  std::copy(coordinates, coordinates + rank, copy.at);
  copy.shared = static_cast<uint8_t*>(const_cast<void*>(shared));
  copy.bytes = copy.map.element_bytes;
  for (int d = 0; d < rank; d++) {
    const int64_t size = copy.map.box[d];
    copy.bytes *= uint32_t(size);
    copy.clipped |= copy.at[d] < 0 || copy.at[d] + size > int64_t(copy.map.dimensions[d]);
  }
  return copy;
}

// To every block of the mask, each at the same shared addresses.
template <class F>
static void each_rank(uint32_t mask, const char* what, Site site, F&& f) {
  if (!mask || mask >> cluster_size())
    fail_at(*self(), what, site, format("mask %04x in a cluster of %u", mask, cluster_size()));
  for (; mask; mask &= mask - 1) f(uint32_t(__builtin_ctz(mask)));
}

void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, const int* coordinates,
              int rank, uint32_t mask, bool multicast, Site site) {
  AsyncCopy copy = tensor_copy(Copy::TensorLoad, map, shared, coordinates, rank, site);
  if (!multicast) {
    check_own_block(*self(), shared, "tma_load", site);
    copy.barrier = &own_mbarrier(barrier, "tma_load", site);
    return issue(std::move(copy));
  }
  each_rank(mask, "tma_load_multicast", site, [&](uint32_t to) {
    AsyncCopy one = copy;
    one.shared = static_cast<uint8_t*>(cluster_map(shared, to, site));
    auto* there = static_cast<uint64_t*>(cluster_map(barrier, to, site));
    one.barrier = &mbarrier_at(there, "tma_load_multicast", site);
    issue(std::move(one));
  });
}

void tma_store(const TensorMap* map, const void* shared, const int* coordinates, int rank,
               TmaReduce reduce, Site site) {
  const Copy kind = reduce == TmaReduce::Add ? Copy::TensorAdd : Copy::TensorStore;
  AsyncCopy copy = tensor_copy(kind, map, shared, coordinates, rank, site);
  if (kind == Copy::TensorAdd && copy.map.data_type != TENSOR_FLOAT32 &&
      copy.map.data_type != TENSOR_BFLOAT16)
    fail_at(*self(), "tma_reduce_add", site, "only float and bf16 are added by this machine");
  issue(std::move(copy));
}

static AsyncCopy bulk_copy(Copy kind, const void* shared, const void* global, uint32_t bytes,
                           Site site) {
  AsyncCopy copy{};
  copy.kind = kind;
  copy.site = site;
  copy.shared = static_cast<uint8_t*>(const_cast<void*>(shared));
  copy.global = static_cast<uint8_t*>(const_cast<void*>(global));
  copy.bytes = bytes;
  return copy;
}

// Until at most `groups` of the thread's groups are under way; here they have happened entirely.
void bulk_wait(int groups, bool read_only, Site) {
  Fiber& fiber = *self();
  Worker& w = *worker;
  const uint32_t all = fiber.bulk_group;
  const uint32_t upto = all > uint32_t(groups) ? all - uint32_t(groups) : 0;  // groups below it
  fiber.bulk_read = max(fiber.bulk_read, upto);
  for (size_t i = w.copies_head; i < w.copies.size();) {
    AsyncCopy& candidate = w.copies[i];
    if (candidate.issuer != &fiber || !writes_global(candidate.kind) || candidate.group >= upto) {
      i++;
      continue;
    }
    AsyncCopy copy = std::move(candidate);
    w.copies.erase(w.copies.begin() + long(i));
    run_copy(copy);
  }
  progress();
  if (!w.race || !fiber.bulk_reader) return;
  // Ticks rise from group to group.
  auto& ticks = fiber.bulk_ticks;
  const auto behind = std::find_if(ticks.begin(), ticks.end(),
                                   [&](const auto& entry) { return entry.first >= upto; });
  if (behind == ticks.begin()) return;
  const Tick tick = std::prev(behind)->second;
  fiber.known = raised(fiber.known, fiber.bulk_reader, tick);
  if (read_only) return;
  fiber.known = raised(fiber.known, fiber.bulk_writer, tick);
  ticks.erase(ticks.begin(), behind);
}

// ---------------------------------------------------------------- the end of a thread, of a block
void check_copies_at_exit(const Fiber& fiber) {
  if (fiber.bulk_last <= fiber.bulk_read) return;
  fail(format("%s exits although it never waited for the %s at %s to read its source",
              describe(fiber).c_str(), name_of(fiber.bulk_kind),
              describe(fiber.bulk_site).c_str()));
}

void check_copies_at_exit(const Block& block) {
  const Worker& w = *worker;
  for (size_t i = w.copies_head; i < w.copies.size(); i++) {
    const AsyncCopy& copy = w.copies[i];
    const bool from = copy.kind == Copy::Peer && copy.issuer->block == &block;
    if (!from && (copy.block != &block || writes_global(copy.kind))) continue;
    fail(format("block %s exits while the %s at %s by %s is under way %s its shared memory",
                describe(block.index).c_str(), name_of(copy.kind), describe(copy.site).c_str(),
                describe(*copy.issuer).c_str(), from ? "from" : "to"));
  }
  if (!w.race) return;
  for (const Mbarrier& barrier : block.mbarriers) {
    const auto waited = [&](const Fiber& fiber) {
      return knows(fiber.known, barrier.actor, barrier.tick);
    };
    if (!barrier.tick || std::any_of(block.fibers.begin(), block.fibers.end(), waited)) continue;
    fail(format(
        "block %s exits although no thread of it waited for the %s at %s, which completes on "
        "its mbarrier at shared 0x%x",
        describe(block.index).c_str(), name_of(barrier.last_copy),
        describe(barrier.copy_site).c_str(), offset_in(&block, barrier.address)));
  }
}

}  // namespace simt

using namespace simt;

void cp_async_4(void* shared, const void* global, Site site) {
  cp_async(shared, global, 4, 4, site);
}
void cp_async_8(void* shared, const void* global, Site site) {
  cp_async(shared, global, 8, 8, site);
}
void cp_async_16(void* shared, const void* global, Site site) {
  cp_async(shared, global, 16, 16, site);
}
void cp_async_16_zfill(void* shared, const void* global, uint32_t bytes, Site site) {
  cp_async(shared, global, bytes, 16, site);
}
void cp_async_commit(Site) { self()->copy_group++; }

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Site site) {
  AsyncCopy copy = bulk_copy(Copy::Load, shared, global, bytes, site);
  check_own_block(*self(), shared, "bulk_load", site);
  copy.barrier = &own_mbarrier(barrier, "bulk_load", site);
  issue(std::move(copy));
}

void bulk_load_multicast(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                         uint16_t ranks, Site site) {
  each_rank(ranks, "bulk_load_multicast", site, [&](uint32_t to) {
    AsyncCopy copy =
        bulk_copy(Copy::Load, simt::cluster_map(shared, to, site), global, bytes, site);
    auto* there = static_cast<uint64_t*>(simt::cluster_map(barrier, to, site));
    copy.barrier = &mbarrier_at(there, "bulk_load_multicast", site);
    issue(std::move(copy));
  });
}

void bulk_store(void* global, const void* shared, uint32_t bytes, Site site) {
  issue(bulk_copy(Copy::Store, shared, global, bytes, site));
}
void bulk_reduce_add_f32(float* global, const void* shared, uint32_t bytes, Site site) {
  issue(bulk_copy(Copy::AddF32, shared, global, bytes, site));
}
void bulk_reduce_add_bf16(bf16* global, const void* shared, uint32_t bytes, Site site) {
  issue(bulk_copy(Copy::AddBf16, shared, global, bytes, site));
}

void bulk_copy_cluster(void* shared, const void* from, uint32_t bytes, uint64_t* barrier,
                       uint32_t rank, Site site) {
  AsyncCopy copy = bulk_copy(Copy::Peer, simt::cluster_map(shared, rank, site), from, bytes, site);
  auto* there = static_cast<uint64_t*>(simt::cluster_map(barrier, rank, site));
  copy.barrier = &mbarrier_at(there, "bulk_copy_cluster", site);
  issue(std::move(copy));
}

void bulk_commit(Site) { self()->bulk_group++; }
