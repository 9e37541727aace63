// The race detector's rules: which two accesses to a byte are a fault.
//
// Each access is compared with what the shadow remembers of its bytes. Two of them, one a write,
// need an order between them (order.h); a cp.async needs its wait, the asynchronous proxy needs
// its fence. Nothing here runs unless the launch asked for race mode. The hooks in hooks.cpp feed
// it the kernels' loads and stores, the wrappers everything else.
#pragma once
#include "machine.h"

namespace simt {

// Who makes an access, when and where, and what it knows then. It lives no longer than `known`.
struct Access {
  const Vector* known;
  Actor actor;
  Tick tick;
  uint32_t team;
  Place place;
  uint8_t flags;
  Tick copies = 0;  // groups of cp.async for which the thread has waited
  Access(const Fiber& fiber, uint8_t flags, Place place)
      : known(fiber.known.get()),
        actor(fiber.actor),
        tick(flags & PENDING ? fiber.copy_group : fiber.now),
        team(worker->team),
        place(place),
        flags(flags),
        copies(fiber.copies_done) {}
  Access(const Clock& clock, uint8_t flags, Place place)
      : known(clock.known.get()),
        actor(clock.actor),
        tick(clock.tick),
        team(worker->team),
        place(place),
        flags(flags) {}
};

// What the last line was before an access and after it. The lines of one copy are often alike, so
// that what was found for one holds for the next.
template <class L>
class Repeat {
 public:
  bool applies(L& line) const {
    if (!known_ || std::memcmp(&line, before_, BYTES) != 0) return false;
    std::memcpy(static_cast<void*>(&line), after_, BYTES);
    return true;
  }
  void before(const L& line) {
    known_ = false;
    plain_ = line.plain();
    std::memcpy(before_, &line, BYTES);
  }
  void after(const L& line) {
    known_ = plain_ && line.plain();
    std::memcpy(after_, &line, BYTES);
  }

 private:
  static constexpr size_t BYTES = L::CONTENT_BYTES;
  bool known_ = false, plain_ = false;
  alignas(64) unsigned char before_[BYTES], after_[BYTES];
};

// An access to bytes of shared or global memory that exist.
void check_shared(Block&, uint32_t address, uint32_t bytes, const Access&);
void check_global(const void* p, uint32_t bytes, const Access&);
// Brings the line of an address, which will be checked soon, near.
inline void prefetch_global(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  __builtin_prefetch(&shadow_page(address).lines[address % SHADOW_PAGE_BYTES / GlobalLine::BYTES],
                     1);
}

// The same of 16 bytes by each of some lanes, at multiples of 16 in their block's shared memory.
void check_shared_rows(Block&, Fiber* const* lanes, const uint32_t* addresses, uint32_t count,
                       uint8_t flags, Place);

// The same for a thread, and for an asynchronous actor: whichever memory it is.
void race_thread(Fiber&, const void* p, uint32_t bytes, uint8_t flags, Place);
void race_clock(const Clock&, const void* p, uint32_t bytes, uint8_t flags, Place);

// Accesses of one actor, at one time and place, to many lines of a block's shared memory.
class SharedAccesses {
 public:
  SharedAccesses(Block& block, const Clock& clock, uint8_t flags, Place place)
      : block_(block), access_(clock, flags, place) {}
  // The 16 bytes at a multiple of 16.
  void line(uint32_t address);
  // Brings the line of an address, which will be checked soon, near.
  void prefetch(uint32_t address) const {
    if (address < WINDOW_BYTES)
      __builtin_prefetch(&worker->race_team.shared[block_.rank][address / SharedLine::BYTES], 1);
  }

 private:
  Block& block_;
  Access access_;
  Repeat<SharedLine> repeat_;
};

// A thread uses shared memory of another block, which must not exit before.
inline void race_visit(const Fiber& fiber, Block& block, Place place) {
  block.visitors[fiber.actor] = {fiber.now, place};
}

void race_begin(Worker&);
Actor new_agent(std::string name);
std::string name_of(Actor, uint32_t team);

}  // namespace simt
