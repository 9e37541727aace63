// Runs one team: its fibers, in the order that the options ask for, until all have ended.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <sched.h>
#include <utility>

#include "fault.h"
#include "race.h"
#include "shared.h"

__thread simt::ThreadIndices* simt::current __attribute__((tls_model("initial-exec")));

namespace simt {

__thread Worker* worker __attribute__((tls_model("initial-exec")));

// ---------------------------------------------------------------- the order of things
uint64_t random_bits() {  // xorshift64: Marsaglia, "Xorshift RNGs", 2003
  uint64_t& state = worker->random;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

void make_ready(Fiber* fiber) {
  Worker& w = *worker;
  fiber->wait = Wait::Nothing;
  w.ready[(w.ready_head + w.ready_count++) & w.ready_mask] = fiber;
}

void progress() { worker->idle_yields = 0; }

bool run_one_copy() {
  Worker& w = *worker;
  const size_t count = w.copies.size() - w.copies_head;
  if (!count) return false;
  if (w.asynchronous == SIMT_ANYTIME) {
    std::swap(w.copies[w.copies_head], w.copies[w.copies_head + random_bits() % count]);
  }
  AsyncCopy copy = std::move(w.copies[w.copies_head++]);
  if (w.copies_head == w.copies.size()) {
    w.copies.clear();
    w.copies_head = 0;
  }
  run_copy(copy);
  progress();
  return true;
}

static Fiber* next_ready() {
  Worker& w = *worker;
  for (;;) {
    if (w.asynchronous == SIMT_EARLY) {
      while (run_one_copy()) {
      }
    } else if (w.asynchronous == SIMT_ANYTIME && w.copies_head < w.copies.size()) {
      constexpr uint64_t ONE_IN = 32;
      if (random_bits() % ONE_IN == 0) {
        run_one_copy();
        continue;
      }
    }
    if (w.ready_count) {
      uint32_t at = w.ready_head;
      if (w.order == SIMT_RANDOM)
        at += uint32_t(((random_bits() >> 32) * w.ready_count) >> 32);
      else if (w.order == SIMT_LIFO)
        at += w.ready_count - 1;
      Fiber* fiber = w.ready[at & w.ready_mask];
      if (w.order == SIMT_LIFO) {
        w.ready_count--;
      } else {
        w.ready[at & w.ready_mask] = w.ready[w.ready_head & w.ready_mask];
        w.ready_head++;
        w.ready_count--;
      }
      return fiber;
    }
    if (!run_one_copy()) return nullptr;
  }
}

static void count_switch(Worker& w) {  // nobody else writes it
  w.switches.store(w.switches.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

static void leave(void** save) {
  Worker& w = *worker;
  Fiber* next = next_ready();
  count_switch(w);
  if (!next) {
    simt_switch_stack(save, w.main_stack);
    return;
  }
  const bool same = save == &next->stack_pointer;
  current = next;
  if (!same) simt_switch_stack(save, next->stack_pointer);
}

void block_on(Wait wait, const void* object, uint64_t detail, Site site) {
  Fiber& fiber = *self();
  fiber.wait = wait;
  fiber.wait_for = object;
  fiber.wait_detail = detail;
  fiber.wait_site = site;
  progress();
  leave(&fiber.stack_pointer);
}

void yield(const char* what, Site site) {
  Worker& w = *worker;
  Fiber& fiber = *self();
  const uint32_t live = w.threads - w.finished;
  if (w.idle_yields++ == 0) w.idle_since_ms = 0;
  // Everyone had a turn: let a copy happen that all may be waiting for.
  if (w.idle_yields % (live + 1) == 0 && run_one_copy()) w.idle_yields = 0;
  // Loops that end by themselves may find the same again and again, too, but not so often. A count,
  // not a time, so that the verdict is the same on a busy machine.
  const uint32_t patience = 1000 + 64 * live, last_patience = 1'000'000 + 4096 * live;
  if (w.idle_yields > patience) {
    // Blocks of other workers may still bring what it waits for, unless there are none.
    const bool alone = w.launch->running == 1;
    if (w.launch->aborted) fail("another block of the launch failed before");
    const int64_t now = alone ? 0 : milliseconds();
    if (!w.idle_since_ms) w.idle_since_ms = now;
    if (alone ? w.idle_yields > last_patience : now - w.idle_since_ms > int64_t(w.watchdog_ms)) {
      const bool partial = w.launch->team_count > 1;
      fail_at(fiber, what, site,
              format("the thread spins, and nothing else happens%s",
                     partial ? "; blocks that wait for each other need a cooperative launch" : ""));
    }
    if (!alone) sched_yield();
  }
  // To the end that is served last.
  fiber.wait = Wait::Nothing;
  fiber.wait_site = site;
  if (w.order == SIMT_LIFO) {
    w.ready[--w.ready_head & w.ready_mask] = &fiber;
    w.ready_count++;
  } else {
    make_ready(&fiber);
  }
  leave(&fiber.stack_pointer);
}

void look(const void* address, uint64_t operands, uint64_t value, const char* what, Site site) {
  Fiber& fiber = *self();
  for (Look& before : fiber.looks) {
    if (before.address != address || before.line != site.line || before.operands != operands)
      continue;
    if (std::exchange(before.seen, value) == value) yield(what, site);
    return;
  }
  fiber.looks[fiber.next_look++ % std::size(fiber.looks)] = {address, site.line, operands, value};
}

// ---------------------------------------------------------------- a thread's life
uint3 thread_index() { return current->thread; }
uint3 block_index() { return current->block; }
dim3 block_size() { return current->block_dim; }
dim3 grid_size() { return current->grid_dim; }

static void check_nothing_pending(const Fiber& fiber) {
  check_waited_at_exit(fiber);
  if (const Product* product = pending_product(fiber)) {
    fail(format("%s exits although it never waited for the wgmma at %s", describe(fiber).c_str(),
                describe(product->site).c_str()));
  }
  if (!fiber.copies.empty()) {
    fail(format("%s exits although it never waited for the cp.async at %s", describe(fiber).c_str(),
                describe(fiber.copies.front().site).c_str()));
  }
  if (fiber.cluster_arrived) {
    fail(
        format("%s exits although it arrived at the cluster's barrier and never called cluster_wait"
               "\n  the last arrival was at %s",
               describe(fiber).c_str(), describe(worker->cluster_barrier.last).c_str()));
  }
  check_copies_at_exit(fiber);
}

// Its shared memory is now another block's.
static void check_end_of_block(const Block& block) {
  check_copies_at_exit(block);
  for (const auto& [actor, visit] : block.visitors) {
    const auto ordered = [&](const Fiber& fiber) { return knows(fiber.known, actor, visit.first); };
    if (std::any_of(block.fibers.begin(), block.fibers.end(), ordered)) continue;
    fail(
        format("%s at %s uses shared memory of block %s, which may have exited: nothing orders the "
               "exit after the access",
               name_of(actor, worker->team).c_str(), describe(visit.second).c_str(),
               describe(block.index).c_str()));
  }
}

static void fiber_main() {
  worker->launch->kernel->call(worker->launch->arguments);
  Fiber& fiber = *self();
  check_nothing_pending(fiber);
  fiber.done = true;
  Block& block = *fiber.block;
  block.finished++;
  worker->finished++;
  fiber.warp->exited |= 1u << fiber.id % WARP_THREADS;
  leave_meetings(fiber);
  leave_barriers(fiber);
  if (block.finished == block.threads) check_end_of_block(block);
  progress();
  void* abandoned;
  leave(&abandoned);
  abort();
}

// ---------------------------------------------------------------- a team
static void prepare_block(Worker& w, uint32_t rank) {
  const Launch& launch = *w.launch;
  const SimtLaunch& shape = launch.shape;
  Block& block = w.blocks[rank];
  const uint32_t threads = launch.block_threads;
  block.index = launch.block_index(w.team, rank);
  block.rank = rank;
  block.threads = threads;
  block.finished = 0;
  block.window = w.windows + rank * WINDOW_BYTES;
  block.dynamic_end = DYNAMIC_BASE + shape.dynamic_shared_bytes;
  block.static_end = block.dynamic_end + GAP_BYTES;
  const uint32_t warps = (threads + WARP_THREADS - 1) / WARP_THREADS;
  const uint32_t registers = std::min(REGISTERS / (warps * WARP_THREADS), 255u) / 8 * 8;
  block.warp_registers.assign(warps, registers);
  block.free_registers = REGISTERS - warps * WARP_THREADS * registers;
  block.statics.clear();
  if (!block.mbarriers.empty()) std::memset(block.mbarrier_words, 0, sizeof block.mbarrier_words);
  block.mbarriers.clear();
  block.visitors.clear();
  for (NamedBarrier& barrier : block.barriers) barrier = NamedBarrier{};
  for (const Warpgroup& group : block.warpgroups)
    w.free_products.insert(w.free_products.end(), group.products.begin(), group.products.end());
  block.warpgroups.clear();
  block.warpgroups.resize(threads / WARPGROUP_THREADS);
  block.warps.resize(warps);
  for (Warp& warp : block.warps) {
    warp.exists = warp.exited = 0;
    warp.meetings.clear();
    warp.aligned.clear();
  }
  block.fibers.resize(threads);
  for (uint32_t id = 0; id < threads; id++) {
    Fiber& fiber = block.fibers[id];
    const uint32_t lane = id % WARP_THREADS;
    fiber = Fiber{};
    fiber.id = id;
    fiber.block = &block;
    fiber.must_wait = shape.dependent;
    fiber.warp = &block.warps[id / WARP_THREADS];
    fiber.warp->lanes[lane] = &fiber;
    fiber.warp->exists |= 1u << lane;
    const uint32_t *size = shape.block, *grid = shape.grid;
    fiber.thread = {id % size[0], id / size[0] % size[1], id / size[0] / size[1]};
    fiber.ThreadIndices::block = block.index;
    fiber.block_dim = {size[0], size[1], size[2]};
    fiber.grid_dim = {grid[0], grid[1], grid[2]};
    fiber.actor = rank * threads + id;
    const size_t stack = size_t(rank) * threads + id;
    fiber.stack_bottom = w.stacks.bottom(stack);
    // Tops a multiple of pages apart would all meet in the same few lines of the first cache.
    const size_t apart = stack % 32 * 128;
    fiber.stack_pointer = prepare_stack(w.stacks.top(stack) - apart, fiber_main);
  }
  poison(block);
}

static void check_end_of_team() {
  while (run_one_copy()) {
  }
  const Worker& w = *worker;
  for (uint32_t rank = 0; rank < w.launch->team_blocks; rank++) {
    const Block& block = w.blocks[rank];
    check_gaps(block);
    for (const Mbarrier& barrier : block.mbarriers) {
      if (!barrier.bytes) continue;
      fail(
          format("block %s ends while its mbarrier at shared 0x%x is out of balance by %lld bytes: "
                 "what was expected (expect_tx, last at %s) and what the copies brought differ",
                 describe(block.index).c_str(), offset_in(&block, barrier.address),
                 static_cast<long long>(barrier.bytes),
                 barrier.expect_site.line ? describe(barrier.expect_site).c_str() : "no place"));
    }
    for (uint32_t id = 0; id < NAMED_BARRIERS; id++) {
      const NamedBarrier& barrier = block.barriers[id];
      if (!barrier.arrived) continue;
      fail(format("block %s ends with %u of %u threads arrived at barrier %u, the last one at %s",
                  describe(block.index).c_str(), barrier.arrived, barrier.expected, id,
                  describe(barrier.last).c_str()));
    }
  }
}

static thread_local void (*on_service)();
static void service_main() {
  on_service();
  void* abandoned;
  simt_switch_stack(&abandoned, worker->main_stack);
}

void on_service_stack(size_t index, void (*function)()) {
  on_service = function;
  simt_switch_stack(&worker->main_stack, prepare_stack(worker->service.top(index), service_main));
}

void run_team(Launch& launch, uint32_t team) {
  Worker& w = *worker;
  w.launch = &launch;
  w.team = team;
  w.dead = false;
  w.finished = 0;
  w.threads = launch.team_blocks * launch.block_threads;
  w.order = launch.options.order;
  w.asynchronous = launch.options.async;
  w.race = launch.options.race;
  w.watchdog_ms = launch.options.watchdog_ms;
  w.idle_yields = 0;
  w.copies.clear();
  w.copies_head = 0;
  w.cluster_barrier = NamedBarrier{};
  // A different schedule for each team, the same one whichever worker runs it.
  w.random = (launch.options.seed + 1) * 0x9e3779b97f4a7c15u ^ (team + 1) * 0xd1b54a32d192ed03u;
  if (!w.random) w.random = 1;
  w.ready_head = w.ready_count = 0;
  if (w.blocks.size() < launch.team_blocks) w.blocks.resize(launch.team_blocks);
  for (uint32_t rank = 0; rank < launch.team_blocks; rank++) prepare_block(w, rank);
  for (uint32_t rank = 0; rank < launch.team_blocks; rank++)
    for (Fiber& fiber : w.blocks[rank].fibers) make_ready(&fiber);
  if (w.race) race_begin(w);

  count_switch(w);  // what the watchdog saw of the team before means nothing now
  w.in_team = true;
  Fiber* first = next_ready();
  current = first;
  simt_switch_stack(&w.main_stack, first->stack_pointer);
  current = &w.blocks[0].fibers[0];  // for the checks' messages
  if (!w.dead && w.finished < w.threads) on_service_stack(0, report_deadlock);
  if (!w.dead) on_service_stack(0, check_end_of_team);
  w.in_team = false;
  current = nullptr;
}

}  // namespace simt
