// The race detector's order: how synchronisation passes on what threads know of each other.
//
// Barriers, mbarriers, waits, fences, flags and atomics call these; race.cpp asks `Known` whether
// an access is ordered after another one. Nothing here runs unless the launch asked for race mode.
#pragma once
#include <functional>

#include "machine.h"

namespace simt {

void race_release(Fiber&, Collected&);
void race_acquire(Fiber&, const Known&);
void race_fence(Fiber&, bool global);
void race_threadfence(Fiber&);

// A relaxed atomic, or an acquiring load or a releasing store, on shared or global memory. `act`
// is the access itself: it and what it orders happen together, whatever other workers do.
enum class Order : uint8_t { Relaxed, Acquire, Release };
void race_atomic(Fiber&, const void* p, uint32_t bytes, bool reads, bool writes, Order, Site,
                 const std::function<void()>& act);

// What a thread hands to something asynchronous, and a new tick for the thread.
Clock race_handover(Fiber&, Actor, Tick);

}  // namespace simt
