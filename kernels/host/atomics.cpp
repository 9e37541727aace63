// Atomics, fences and flags, on shared and global memory. A thread that finds with one of them what
// it found before lets the others run: it may be waiting for them.
#include <cstring>

#include "device_memory.h"
#include "fault.h"
#include "order.h"
#include "race.h"
#include "shared.h"

namespace simt {

static void check(const void* p, uint32_t bytes, const char* what, Site site) {
  Fiber& fiber = *self();
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail_at(fiber, what, site, format("the address %p is not a multiple of %u", p, bytes));
  if (block_of(p)) {
    checked_shared(p, bytes, what, site);
    return;
  }
  check_waited(fiber, what, p, site);
  if (!owns(p, bytes))
    fail_at(fiber, what, site, format("out of bounds: %s", describe_global(p).c_str()));
}

template <class T>
static uint64_t bits_of(T value) {
  uint32_t bits;
  static_assert(sizeof value == sizeof bits);
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The value before; what `changed` makes of it stands in its place. `operands`: what the kernel
// passed, so that a poll is known from different calls that found the same.
template <class T, class F>
static T update(T* p, uint64_t operands, const char* what, Site site, F&& changed) {
  check(p, sizeof(T), what, site);
  T before, after;
  __atomic_load(p, &before, __ATOMIC_RELAXED);
  look(p, operands, bits_of(before), what, site);
  const auto exchange = [&] {
    __atomic_load(p, &before, __ATOMIC_RELAXED);
    after = changed(before);
    while (
        !__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
      after = changed(before);
  };
  if (worker->race)
    race_atomic(*self(), p, sizeof(T), true, true, Order::Relaxed, site, exchange);
  else
    exchange();
  if (bits_of(before) != bits_of(after)) progress();
  return before;
}

void add_f32(float* p, float added) {
  float before, after;
  __atomic_load(p, &before, __ATOMIC_RELAXED);
  do {
    after = global_sum(before, added);
  } while (
      !__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

}  // namespace simt

using namespace simt;

float atomicAdd(float* p, float value, Site site) {
  return update(p, bits_of(value), "atomicAdd", site,
                [&](float x) { return block_of(p) ? x + value : global_sum(x, value); });
}
uint32_t atomicAdd(uint32_t* p, uint32_t value, Site site) {
  return update(p, value, "atomicAdd", site, [&](uint32_t x) { return x + value; });
}
int atomicAdd(int* p, int value, Site site) {
  return update(p, bits_of(value), "atomicAdd", site,
                [&](int x) { return int(uint32_t(x) + uint32_t(value)); });
}
uint32_t atomicMax(uint32_t* p, uint32_t value, Site site) {
  return update(p, value, "atomicMax", site, [&](uint32_t x) { return x < value ? value : x; });
}
uint32_t atomicExch(uint32_t* p, uint32_t value, Site site) {
  return update(p, value, "atomicExch", site, [&](uint32_t) { return value; });
}
uint32_t atomicCAS(uint32_t* p, uint32_t compare, uint32_t value, Site site) {
  return update(p, uint64_t(compare) << 32 | value, "atomicCAS", site,
                [&](uint32_t x) { return x == compare ? value : x; });
}

uint32_t load_acquire(const uint32_t* p, Site site) {
  check(p, sizeof *p, "load_acquire", site);
  look(p, 0, __atomic_load_n(p, __ATOMIC_RELAXED), "load_acquire", site);
  uint32_t value;
  const auto load = [&] { value = __atomic_load_n(p, __ATOMIC_ACQUIRE); };
  if (worker->race)
    race_atomic(*self(), p, sizeof *p, true, false, Order::Acquire, site, load);
  else
    load();
  return value;
}

void store_release(uint32_t* p, uint32_t value, Site site) {
  check(p, sizeof *p, "store_release", site);
  const auto store = [&] { __atomic_store_n(p, value, __ATOMIC_RELEASE); };
  if (worker->race)
    race_atomic(*self(), p, sizeof *p, false, true, Order::Release, site, store);
  else
    store();
  progress();
}

void reduce_add_f32x2(float* global, float first, float second, Site site) {
  Fiber& fiber = *self();
  const char* what = "reduce_add_f32x2";
  if (block_of(global)) fail_at(fiber, what, site, "the address is of shared memory");
  check(global, 2 * sizeof(float), what, site);
  if (worker->race)
    race_thread(fiber, global, 2 * sizeof(float), WRITE | READS_TOO, place_of(site));
  add_f32(global, first);
  add_f32(global + 1, second);
  progress();
}

void __threadfence(Site) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (worker->race) race_threadfence(*self());
}

void __threadfence_block(Site site) { __threadfence(site); }

void __nanosleep(uint32_t, Site site) { yield("__nanosleep", site); }

void __trap(Site site) { fail_at(*self(), "__trap", site, "the kernel gave up"); }
