// The race detector: every byte remembers who touched it last, and each access is checked against
// what its actor knows of the others.
//
// Shared and global memory are kept in lines of 16 bytes; a line holds one slot for each access
// that can still conflict, with a mask of its bytes, so that neighbours are never confused. Nothing
// here runs unless the launch asked for race mode. The hooks in hooks.cpp feed it the kernels'
// loads and stores, the wrappers everything else.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "clock.h"
#include "language.h"

namespace simt {

struct Fiber;
struct Block;
struct Mbarrier;
struct AsyncCopy;
struct Worker;
struct Launch;

// Where in the kernel: a code address (hooks) or a Site (wrappers), in 32 bits.
using Place = uint32_t;
Place place_of(Site);
Place place_of_code(uintptr_t pc);
std::string describe(Place);

// As whom an access is made: a thread, or an asynchronous actor with the knowledge it started with.
struct Clock {
  Actor actor = 0;
  Tick tick = 0;
  Known known;
};

enum AccessFlags : uint8_t {
  READ = 0,
  WRITE = 1,
  ATOMIC = 2,
  ASYNC = 4,       // through the asynchronous proxy: TMA, bulk copies, wgmma operands
  PENDING = 8,     // a cp.async that nobody has waited for
  WARPGROUP = 16,  // four actors, one per warp, beginning with `actor`
  COMPLETES = 32,  // the thread has waited for its own cp.async: PENDING no more
};

struct Slot {
  uint32_t team;
  Tick tick;
  Place place;
  Actor actor;
  uint16_t mask;
  uint8_t flags;
};

// The reads of a line that many threads of one team read: by thread, so that each costs O(1).
struct Readers {
  struct Read {
    Tick tick;
    Place place;
    uint16_t mask;
  };
  uint32_t team;
  std::vector<Read> by_thread;
};

// 16 bytes of memory and the slots of what touched them, in no particular order. Most lines never
// have more than two, and then fill one line of the processor's cache.
class alignas(64) Line {
 public:
  static constexpr uint32_t BYTES = 16;
  uint32_t generation = 0;
  uint16_t initialised = 0;

  uint32_t size() const { return size_; }
  Slot& operator[](uint32_t i) { return i < INLINE ? first_[i] : more_->slots[i - INLINE]; }
  void push_back(const Slot& slot) {
    if (size_ >= INLINE) more().slots.resize(size_ + 1 - INLINE);
    size_++;
    (*this)[size_ - 1u] = slot;
  }
  void shrink(uint32_t size) { size_ = uint16_t(size); }
  void clear() {
    initialised = 0;
    size_ = 0;
    if (more_) more_->readers.reset();
  }
  Readers* readers() { return more_ ? more_->readers.get() : nullptr; }
  std::unique_ptr<Readers>& readers_slot() { return more().readers; }

 private:
  struct More {
    std::vector<Slot> slots;
    std::unique_ptr<Readers> readers;
  };
  More& more() {
    if (!more_) more_ = std::make_unique<More>();
    return *more_;
  }
  static constexpr uint32_t INLINE = 2;
  uint16_t size_ = 0;
  Slot first_[INLINE];
  std::unique_ptr<More> more_;
};
static_assert(sizeof(Line) == 64);

// What is kept for the team that runs.
struct RaceTeam {
  std::vector<std::vector<Line>> shared;  // by block rank
  uint32_t generation = 0;
  std::vector<std::string> agents;  // names of the actors behind the threads
  Actor thread_actors = 0;
};

void race_begin(Worker&);
Actor new_agent(std::string name);
std::string name_of(Actor, uint32_t team);

// ---------------------------------------------------------------- accesses
void race_thread(Fiber&, const void* p, uint32_t bytes, uint8_t flags, Place);
void race_clock(const Clock&, const void* p, uint32_t bytes, uint8_t flags, Place);
// A load or store of a kernel, from the hooks: any address.
[[noreturn]] void report_misaligned(const void* p, uint32_t alignment, Site);
void race_hook(const void* p, uint32_t bytes, bool write, uintptr_t pc);

// Brings the line of a shared address, which will be checked soon, near.
void race_prefetch(const Block&, uint32_t address);

// ---------------------------------------------------------------- order
inline Clock clock_of(const Actor actor, const Tick tick, const Known& known) {
  return {actor, tick, known};
}
void race_release(Fiber&, Collected&);
void race_acquire(Fiber&, const Known&);
void race_fence(Fiber&, bool global);
void race_threadfence(Fiber&);
// A relaxed atomic, or an acquiring load or a releasing store, on shared or global memory.
enum class Order : uint8_t { Relaxed, Acquire, Release };
void race_atomic(Fiber&, const void* p, uint32_t bytes, bool reads, bool writes, Order, Site);
// What a thread hands to something asynchronous, and a new tick for the thread.
Clock race_handover(Fiber&, Actor, Tick);

// A thread uses shared memory of another block, which must not exit before.
void race_visit(const Fiber&, Block&, Place);

}  // namespace simt
