// mbarriers: arrivals and bytes of a phase. The 8 bytes in shared memory hold the number of the
// machine's own record, so that a barrier that something overwrote is noticed.
#include <algorithm>
#include <cstring>

#include "fault.h"
#include "order.h"
#include "race.h"
#include "shared.h"

namespace simt {

static constexpr uint64_t MAGIC = uint64_t(0x6d626172) << 32;
static constexpr int64_t MOST_BYTES = (1 << 20) - 1;  // of a phase
static constexpr uint32_t MOST_ARRIVALS = (1 << 20) - 1;

Mbarrier& mbarrier_at(const uint64_t* address, const char* what, Site site) {
  Fiber& fiber = *self();
  checked_shared(address, sizeof *address, what, site);
  Block* block = block_of(address);
  uint64_t content;
  std::memcpy(&content, address, sizeof content);
  const uint64_t index = content & 0xffffffff;
  const bool valid = (content >> 32) << 32 == MAGIC && index < block->mbarriers.size() &&
                     block->mbarriers[index].address == address;
  if (!valid)
    fail_at(fiber, what, site,
            format("shared address 0x%x of block %s holds no initialised mbarrier",
                   offset_in(block, address), describe(block->index).c_str()));
  Mbarrier& barrier = block->mbarriers[index];
  if (worker->race && fiber.actor != barrier.init_actor &&
      !knows(fiber.known, barrier.init_actor, barrier.init_tick)) {
    fail_at(fiber, what, site,
            format("data race: the mbarrier at shared 0x%x was initialised by %s at %s, with "
                   "nothing that orders the two",
                   offset_in(block, address), describe(*barrier.init_fiber).c_str(),
                   describe(barrier.init_site).c_str()));
  }
  return barrier;
}

Mbarrier& own_mbarrier(const uint64_t* address, const char* what, Site site) {
  check_own_block(*self(), address, what, site);
  return mbarrier_at(address, what, site);
}

void report_mbarrier_access(const Block& block, uint32_t address, bool write, uintptr_t pc) {
  fail(
      format("%s of the mbarrier at shared 0x%x of block %s by %s at %s: until it is invalidated, "
             "its own instructions alone may touch it",
             write ? "write" : "read", address / 8 * 8, describe(block.index).c_str(),
             describe(*self()).c_str(), describe_code(pc - 1).c_str()));
}

static void set_live(Block& block, const uint64_t* address, bool live) {
  const uint32_t word = offset_in(&block, address) / 8;
  const uint64_t bit = uint64_t(1) << word % 64;
  uint64_t& bits = block.mbarrier_words[word / 64];
  bits = live ? bits | bit : bits & ~bit;
}

static void complete_if_due(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase++;
  barrier.pending = barrier.count;
  if (worker->race) barrier.completed = barrier.arriving.take();
  for (Fiber* fiber : barrier.waiting) {  // for this phase: that of the other parity has passed
    if (worker->race) race_acquire(*fiber, barrier.completed);
    make_ready(fiber);
  }
  barrier.waiting.clear();
  progress();
}

void complete_bytes(Mbarrier& barrier, uint32_t bytes) {
  barrier.bytes -= bytes;
  if (barrier.bytes < -MOST_BYTES)
    fail(format("the mbarrier at shared 0x%x of block %s got %lld bytes more than were expected",
                offset_in(barrier.block, barrier.address), describe(barrier.block->index).c_str(),
                static_cast<long long>(-barrier.bytes)));
  complete_if_due(barrier);
}

static void expect(Mbarrier& barrier, int64_t bytes, const char* what, Site site) {
  barrier.bytes += bytes;
  barrier.expect_site = site;
  if (barrier.bytes > MOST_BYTES)
    fail_at(*self(), what, site,
            format("a phase expects at most %lld bytes, this one %lld",
                   static_cast<long long>(MOST_BYTES), static_cast<long long>(barrier.bytes)));
}

static void arrive(Mbarrier& barrier, const char* what, Site site) {
  Fiber& fiber = *self();
  if (!barrier.pending)
    fail_at(fiber, what, site,
            format("more arrivals than the count %u in one phase (%lld bytes are still missing)",
                   barrier.count, static_cast<long long>(barrier.bytes)));
  if (worker->race) race_release(fiber, barrier.arriving);
  barrier.pending--;
  complete_if_due(barrier);
}

// The phase of this parity has completed if the current one has the other parity.
static bool completed(const Mbarrier& barrier, uint32_t parity) {
  return (barrier.phase & 1) != (parity & 1);
}

static void wait(uint64_t* address, uint32_t parity, const char* what, Site site) {
  Fiber& fiber = *self();
  Mbarrier& barrier = own_mbarrier(address, what, site);
  if (!completed(barrier, parity)) {
    barrier.waiting.push_back(&fiber);
    block_on(Wait::Mbarrier, &barrier, parity & 1, site);
    return;
  }
  if (worker->race) race_acquire(fiber, barrier.completed);
}

}  // namespace simt

using namespace simt;

void mbarrier_init(uint64_t* address, uint32_t count, Site site) {
  Fiber& fiber = *self();
  if (reinterpret_cast<uintptr_t>(address) % 8)
    fail_at(fiber, "mbarrier_init", site, "the address is not a multiple of 8");
  check_own_block(fiber, address, "mbarrier_init", site);
  checked_shared(address, 8, "mbarrier_init", site);
  if (!count || count > MOST_ARRIVALS)
    fail_at(fiber, "mbarrier_init", site, format("a count of %u is not possible", count));
  Block* block = block_of(address);
  for (const Mbarrier& other : block->mbarriers) {
    if (other.address != address) continue;
    uint64_t content;
    std::memcpy(&content, address, sizeof content);
    if (content == (MAGIC | uint64_t(&other - &block->mbarriers[0])))
      fail_at(fiber, "mbarrier_init", site, "the mbarrier is in use: invalidate it first");
  }
  if (worker->race) race_thread(fiber, address, 8, WRITE, place_of(site));
  const uint64_t content = MAGIC | block->mbarriers.size();
  std::memcpy(address, &content, sizeof content);
  set_live(*block, address, true);
  Mbarrier& barrier = block->mbarriers.emplace_back();
  barrier.address = address;
  barrier.block = block;
  barrier.count = barrier.pending = count;
  barrier.init_fiber = &fiber;
  barrier.init_actor = fiber.actor;
  barrier.init_tick = fiber.now;
  barrier.init_site = site;
  if (worker->race) {
    barrier.actor =
        new_agent(format("a copy that completes on the mbarrier at shared 0x%x of block "
                         "%s",
                         offset_in(block, address), describe(block->index).c_str()));
  }
}

void mbarrier_invalidate(uint64_t* address, Site site) {
  Fiber& fiber = *self();
  const char* what = "mbarrier_invalidate";
  Mbarrier& barrier = own_mbarrier(address, what, site);
  if (!barrier.waiting.empty()) fail_at(fiber, what, site, "threads wait at it");
  if (barrier.bytes)
    fail_at(fiber, what, site,
            format("%lld bytes of its phase are still missing (expect_tx at %s)",
                   static_cast<long long>(barrier.bytes), describe(barrier.expect_site).c_str()));
  const std::vector<AsyncCopy>& copies = worker->copies;
  const bool under_way =
      std::any_of(copies.begin() + long(worker->copies_head), copies.end(),
                  [&](const AsyncCopy& copy) { return copy.barrier == &barrier; });
  const bool waited =
      !worker->race || !barrier.tick || knows(fiber.known, barrier.actor, barrier.tick);
  if (under_way || !waited)
    fail_at(fiber, what, site,
            format("nothing waited for the copy at %s, which completes on it",
                   describe(barrier.copy_site).c_str()));
  if (worker->race) race_thread(fiber, address, 8, WRITE, place_of(site));
  set_live(*barrier.block, address, false);
  barrier.address = nullptr;
  std::memset(address, 0xff, sizeof *address);
}

void mbarrier_arrive(uint64_t* address, Site site) {
  arrive(own_mbarrier(address, "mbarrier_arrive", site), "mbarrier_arrive", site);
}

void mbarrier_arrive_expect_tx(uint64_t* address, uint32_t bytes, Site site) {
  Mbarrier& barrier = own_mbarrier(address, "mbarrier_arrive_expect_tx", site);
  expect(barrier, bytes, "mbarrier_arrive_expect_tx", site);
  arrive(barrier, "mbarrier_arrive_expect_tx", site);
}

void mbarrier_expect_tx(uint64_t* address, uint32_t bytes, Site site) {
  Mbarrier& barrier = own_mbarrier(address, "mbarrier_expect_tx", site);
  expect(barrier, bytes, "mbarrier_expect_tx", site);
  complete_if_due(barrier);
}

static void arrive_elsewhere(uint64_t* address, uint32_t rank, const char* what, Site site) {
  auto* there = static_cast<uint64_t*>(simt::cluster_map(address, rank, site));
  const Block* block = block_of(there);
  if (block->finished == block->threads)
    fail_at(*self(), what, site, format("block %s has exited", describe(block->index).c_str()));
  if (worker->race) race_visit(*self(), *block_of(there), place_of(site));
  arrive(mbarrier_at(there, what, site), what, site);
}

void mbarrier_arrive_cluster(uint64_t* address, uint32_t rank, Site site) {
  arrive_elsewhere(address, rank, "mbarrier_arrive_cluster", site);
}

void mbarrier_arrive_peer(uint64_t* address, uint32_t rank, Site site) {
  arrive_elsewhere(address, rank, "mbarrier_arrive_peer", site);
}

bool mbarrier_try_wait(uint64_t* address, uint32_t parity, Site site) {
  Mbarrier& barrier = own_mbarrier(address, "mbarrier_try_wait", site);
  if (!completed(barrier, parity)) {
    yield("mbarrier_try_wait", site);
    if (!completed(barrier, parity)) return false;
  }
  if (worker->race) race_acquire(*self(), barrier.completed);
  return true;
}

void mbarrier_wait(uint64_t* address, uint32_t parity, Site site) {
  wait(address, parity, "mbarrier_wait", site);
}

void mbarrier_wait_cluster(uint64_t* address, uint32_t parity, Site site) {
  wait(address, parity, "mbarrier_wait_cluster", site);
}

// ---------------------------------------------------------------- fences between proxies
void fence_mbarrier_init(Site) {
  if (!worker->race) return;
  Fiber& fiber = *self();
  fiber.mbarrier_fence = fiber.now++;
}
void fence_proxy_async(Site) {
  if (worker->race) race_fence(*self(), false);
}
void fence_proxy_async_global(Site) {
  if (worker->race) race_fence(*self(), true);
}
