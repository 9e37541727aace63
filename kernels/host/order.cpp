// Releases and acquires. A release gives what a thread knows and its own tick, and starts a new
// one, so that what the thread does afterwards is not covered.
#include "order.h"

#include "race.h"

namespace simt {

// What a thread knows, and what it has done until now.
static Known given_by(const Fiber& fiber) {
  const Known known = raised(fiber.known, fiber.actor, fiber.now);
  return raised_copies(known, fiber.actor, fiber.copies_done);
}

void race_release(Fiber& fiber, Collected& to) {
  to.add(fiber.known, fiber.actor, fiber.now, fiber.copies_done);
  fiber.now++;
}

void race_acquire(Fiber& fiber, const Known& known) { fiber.known = joined(fiber.known, known); }

void race_fence(Fiber& fiber, bool global) {
  (global ? fiber.global_fences : fiber.shared_fences).push_back(fiber.now++);
}

void race_threadfence(Fiber& fiber) {
  if (fiber.pending) {
    fiber.known = joined(fiber.known, fiber.pending);
    fiber.pending.reset();
  }
  fiber.released = given_by(fiber);
  fiber.now++;
}

Clock race_handover(Fiber& fiber, Actor actor, Tick tick) {
  Clock clock{actor, tick, given_by(fiber)};
  fiber.now++;
  return clock;
}

void race_atomic(Fiber& fiber, const void* p, uint32_t bytes, bool reads, bool writes, Order order,
                 Site site, const std::function<void()>& act) {
  const uint8_t reads_too = reads && writes ? READS_TOO : 0;
  race_thread(fiber, p, bytes, ATOMIC | (writes ? WRITE : READ) | reads_too, place_of(site));
  Launch& launch = *worker->launch;
  const uint32_t team = worker->team;
  std::lock_guard lock(launch.mutex);
  act();
  auto& [of_team, last] = launch.atomics[reinterpret_cast<uintptr_t>(p)];
  const Known seen = reads ? seen_from(team, of_team, last) : nullptr;
  if (order == Order::Acquire)
    fiber.known = joined(fiber.known, seen);
  else
    fiber.pending = joined(fiber.pending, seen);
  if (!writes) return;
  Known given = fiber.released;
  if (order == Order::Release) {
    given = given_by(fiber);
    fiber.now++;
  }
  // An atomic read-modify-write continues the release sequence of the one before it.
  given = joined(given, seen);
  if (given || !reads) of_team = team, last = given;
}

}  // namespace simt
