// Barriers of a block, by number, and of a cluster.
#include <algorithm>

#include "fault.h"
#include "order.h"
#include "shared.h"

namespace simt {

// ---------------------------------------------------------------- aligned instructions
static const char* name_of(const Aligned& call) {
  switch (call.kind) {
    case Aligned::Sync: return call.expected ? "barrier_sync" : "__syncthreads";
    case Aligned::Arrive: return "barrier_arrive";
    case Aligned::ClusterArrive: return "cluster_arrive";
    case Aligned::ClusterWait: return "cluster_wait";
  }
  return "?";
}

// All lanes of a warp that have not exited run the same aligned instructions in the same order.
// Whether `fiber` is the last of them at this one; then `call.lanes` says which ran it.
static bool completes_warp(Fiber& fiber, Aligned& call) {
  Warp& warp = *fiber.warp;
  const uint32_t bit = 1u << fiber.id % WARP_THREADS;
  const auto open_for = [&](const Aligned& other) { return !(other.lanes & bit); };
  auto found = std::find_if(warp.aligned.begin(), warp.aligned.end(), open_for);
  if (found == warp.aligned.end()) {
    found = warp.aligned.insert(found, call);
  } else if (found->kind != call.kind || found->id != call.id || found->expected != call.expected ||
             found->site.line != call.site.line) {
    fail_at(fiber, name_of(call), call.site,
            format("the warp has diverged: its lanes %08x are at the %s at %s, and all must run "
                   "the same one",
                   found->lanes, name_of(*found), describe(found->site).c_str()));
  }
  found->lanes |= bit;
  if (worker->race && call.kind == Aligned::Arrive) race_release(fiber, found->released);
  if (warp.live() & ~found->lanes) return false;
  call = std::move(*found);
  warp.aligned.erase(found);  // the oldest: who is here has run those before
  return true;
}

// ---------------------------------------------------------------- block
// `last` came last and goes on, with what the others gave if it `waits`.
static void open(NamedBarrier& barrier, Fiber* last, bool waits) {
  barrier.arrived = 0;
  if (worker->race) {
    // Everyone who waits released into it, so that what it collected is more than they know.
    const Known known = barrier.released.take();
    for (Fiber* fiber : barrier.waiting) fiber->known = known;
    if (last && waits) last->known = known;
  }
  for (Fiber* fiber : barrier.waiting)
    if (fiber != last) make_ready(fiber);
  barrier.waiting.clear();
  progress();
}

static void open_cluster(NamedBarrier& barrier) {
  Worker& w = *worker;
  barrier.arrived = 0;
  barrier.expected++;  // phases so far
  const Known known = w.race ? barrier.released.take() : nullptr;
  for (uint32_t rank = 0; rank < w.launch->team_blocks; rank++)
    for (Fiber& other : w.blocks[rank].fibers) other.pending_cluster = known;
  for (Fiber* waiting : barrier.waiting) make_ready(waiting);
  barrier.waiting.clear();
  progress();
}

static void check_count(const Fiber& fiber, const NamedBarrier& barrier, const Aligned& call) {
  if (!barrier.arrived || (barrier.expected == call.expected && !barrier.whole)) return;
  fail_at(fiber, name_of(call), call.site,
          format("barrier %d is used with %u threads while %u threads wait at it with %u", call.id,
                 call.expected, barrier.arrived, barrier.expected));
}

// A warp counts for 32 threads when all of its lanes have come: a short one, too, and one of which
// lanes have exited. Whether the barrier opens.
static bool count_warp(const Warp& warp, NamedBarrier& barrier, Aligned& call) {
  barrier.expected = call.expected;
  barrier.whole = false;
  barrier.last = call.site;
  barrier.arrived += WARP_THREADS;
  if (call.kind == Aligned::Arrive) {
    if (worker->race) barrier.released.add(call.released.take());
  } else {
    for (uint32_t lanes = call.lanes; lanes; lanes &= lanes - 1) {
      Fiber& fiber = *warp.lanes[__builtin_ctz(lanes)];
      if (worker->race) race_release(fiber, barrier.released);
      barrier.waiting.push_back(&fiber);
    }
  }
  return barrier.arrived == barrier.expected;
}

static void arrive(int id, int threads, bool wait, Site site) {
  Fiber& fiber = *self();
  Block& block = *fiber.block;
  Aligned call{wait ? Aligned::Sync : Aligned::Arrive, uint8_t(id), uint32_t(threads), site};
  if (id < 0 || uint32_t(id) >= NAMED_BARRIERS)
    fail_at(fiber, name_of(call), site, format("there is no barrier %d: 0 to 15 exist", id));
  const uint32_t all = (block.threads + WARP_THREADS - 1) / WARP_THREADS * WARP_THREADS;
  if (threads <= 0 || call.expected % WARP_THREADS || call.expected > all)
    fail_at(fiber, name_of(call), site,
            format("%d threads: a multiple of 32 up to the block's %u is needed", threads,
                   block.threads));
  NamedBarrier& barrier = block.barriers[id];
  check_count(fiber, barrier, call);
  if (completes_warp(fiber, call)) {
    if (count_warp(*fiber.warp, barrier, call)) return open(barrier, &fiber, wait);
  }
  if (wait) block_on(Wait::Barrier, &barrier, uint64_t(id), site);
}

// The barrier of all threads that have not exited, number 0.
static void arrive_with_all(Site site) {
  Fiber& fiber = *self();
  Block& block = *fiber.block;
  NamedBarrier& barrier = block.barriers[0];
  Aligned call{Aligned::Sync, 0, 0, site};
  if (barrier.arrived && !barrier.whole)
    fail_at(fiber, name_of(call), site,
            format("barrier 0 is that of all threads, and %u threads wait at it with %u",
                   barrier.arrived, barrier.expected));
  completes_warp(fiber, call);
  barrier.whole = true;
  barrier.expected = block.threads - block.finished;
  barrier.arrived++;
  barrier.last = site;
  if (worker->race) race_release(fiber, barrier.released);
  if (barrier.arrived == barrier.expected) return open(barrier, &fiber, true);
  barrier.waiting.push_back(&fiber);
  block_on(Wait::Barrier, &barrier, 0, site);
}

void leave_barriers(Fiber& fiber) {
  Worker& w = *worker;
  Block& block = *fiber.block;
  Warp& warp = *fiber.warp;
  while (!warp.aligned.empty() && !(warp.live() & ~warp.aligned.front().lanes)) {
    Aligned call = std::move(warp.aligned.front());
    warp.aligned.erase(warp.aligned.begin());
    if (!call.expected) continue;
    NamedBarrier& barrier = block.barriers[call.id];
    check_count(fiber, barrier, call);
    if (count_warp(warp, barrier, call)) open(barrier, nullptr, false);
  }
  NamedBarrier& all = block.barriers[0];
  if (all.whole && all.arrived) {
    all.expected = block.threads - block.finished;
    if (all.arrived == all.expected) open(all, nullptr, false);
  }
  if (w.cluster_barrier.arrived && w.cluster_barrier.arrived == w.threads - w.finished)
    open_cluster(w.cluster_barrier);
}

}  // namespace simt

using namespace simt;

void __syncthreads(Site site) { arrive_with_all(site); }
void barrier_sync(int id, int threads, Site site) { arrive(id, threads, true, site); }
void barrier_arrive(int id, int threads, Site site) { arrive(id, threads, false, site); }

// ---------------------------------------------------------------- cluster
// A team is one cluster, or the many clusters of one block each of a cooperative launch.
uint32_t cluster_rank() { return self()->block->rank % cluster_size(); }

uint32_t cluster_size() {
  const uint32_t(&cluster)[3] = worker->launch->shape.cluster;
  return cluster[0] * cluster[1] * cluster[2];
}

static void arrive_at_cluster(bool release, Site site) {
  Worker& w = *worker;
  Fiber& fiber = *self();
  if (w.launch->shape.cooperative)
    fail_at(fiber, "cluster_arrive", site, "this machine has no clusters in a cooperative launch");
  NamedBarrier& barrier = w.cluster_barrier;
  if (fiber.cluster_arrived)
    fail_at(fiber, "cluster_arrive", site, "the thread has arrived already and did not wait");
  Aligned call{Aligned::ClusterArrive, 0, 0, site};
  completes_warp(fiber, call);
  fiber.cluster_arrived = true;
  barrier.arrived++;
  barrier.last = site;
  if (w.race && release) race_release(fiber, barrier.released);
  if (barrier.arrived == w.threads - w.finished) open_cluster(barrier);
}

void cluster_arrive(Site site) { arrive_at_cluster(true, site); }
void cluster_arrive_relaxed(Site site) { arrive_at_cluster(false, site); }

void cluster_wait(Site site) {
  Worker& w = *worker;
  Fiber& fiber = *self();
  if (!fiber.cluster_arrived)
    fail_at(fiber, "cluster_wait", site, "the thread did not arrive before");
  Aligned call{Aligned::ClusterWait, 0, 0, site};
  completes_warp(fiber, call);
  if (w.cluster_barrier.expected == fiber.cluster_phase) {
    w.cluster_barrier.waiting.push_back(&fiber);
    block_on(Wait::Cluster, &w.cluster_barrier, 0, site);
  }
  fiber.cluster_phase++;
  fiber.cluster_arrived = false;
  if (w.race) race_acquire(fiber, fiber.pending_cluster);
}

void* simt::cluster_map(const void* p, uint32_t rank, Site site) {
  Block* block = block_of(p);
  if (!block || rank >= cluster_size())
    fail_at(*self(), "cluster_map", site,
            !block ? format("%p is not in shared memory", p)
                   : format("rank %u of a cluster of %u", rank, cluster_size()));
  const uint32_t first = self()->block->rank / cluster_size() * cluster_size();
  return worker->blocks[first + rank].window + offset_in(block, p);
}
