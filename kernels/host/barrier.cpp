// Barriers of a block, by number, and of a cluster.
#include "fault.h"
#include "order.h"
#include "shared.h"

namespace simt {

static void open(NamedBarrier& barrier, Fiber& last, bool last_waits) {
  barrier.arrived = 0;
  if (worker->race) {
    // Everyone who waits released into it, so that what it collected is more than they know.
    const Known known = barrier.released.take();
    for (Fiber* fiber : barrier.waiting) fiber->known = known;
    if (last_waits) last.known = known;
  }
  for (Fiber* fiber : barrier.waiting) make_ready(fiber);
  barrier.waiting.clear();
  progress();
}

static void arrive(int id, int threads, bool wait, Site site) {
  Fiber& fiber = *self();
  Block& block = *fiber.block;
  const char* what = wait ? "barrier_sync" : "barrier_arrive";
  if (id < 0 || uint32_t(id) >= NAMED_BARRIERS)
    fail_at(fiber, what, site, format("there is no barrier %d: 0 to 15 exist", id));
  const auto expected = uint32_t(threads);
  const uint32_t all = (block.threads + WARP_THREADS - 1) / WARP_THREADS * WARP_THREADS;
  const bool whole = id == 0 && expected == block.threads;
  if (!whole && (threads <= 0 || expected % WARP_THREADS || expected > all))
    fail_at(fiber, what, site,
            format("%d threads: a multiple of 32 up to the block's %u is needed", threads,
                   block.threads));
  NamedBarrier& barrier = block.barriers[id];
  if (barrier.arrived && barrier.expected != expected)
    fail_at(fiber, what, site,
            format("barrier %d is used with %u threads while %u threads wait at it with %u", id,
                   expected, barrier.arrived, barrier.expected));
  barrier.expected = expected;
  barrier.arrived++;
  barrier.last = site;
  if (worker->race) race_release(fiber, barrier.released);
  if (barrier.arrived == expected) return open(barrier, fiber, wait);
  if (!wait) return;
  barrier.waiting.push_back(&fiber);
  block_on(Wait::Barrier, &barrier, uint64_t(id), site);
}

}  // namespace simt

using namespace simt;

void __syncthreads(Site site) { arrive(0, int(self()->block->threads), true, site); }
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
  fiber.cluster_arrived = true;
  barrier.arrived++;
  barrier.last = site;
  if (w.race && release) race_release(fiber, barrier.released);
  if (barrier.arrived < w.threads) return;
  barrier.arrived = 0;
  barrier.expected++;  // phases so far
  const Known known = w.race ? barrier.released.take() : nullptr;
  for (uint32_t rank = 0; rank < w.launch->team_blocks; rank++)
    for (Fiber& other : w.blocks[rank].fibers) other.pending_cluster = known;
  for (Fiber* waiting : barrier.waiting) make_ready(waiting);
  barrier.waiting.clear();
  progress();
}

void cluster_arrive(Site site) { arrive_at_cluster(true, site); }
void cluster_arrive_relaxed(Site site) { arrive_at_cluster(false, site); }

void cluster_wait(Site site) {
  Worker& w = *worker;
  Fiber& fiber = *self();
  if (!fiber.cluster_arrived)
    fail_at(fiber, "cluster_wait", site, "the thread did not arrive before");
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
