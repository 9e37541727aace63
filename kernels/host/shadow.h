// Shadow memory: for each 16 bytes of shared and global memory, who touched them.
//
// A line holds one slot for each access that can still conflict, with a mask of its bytes, so that
// neighbours are never confused. Nothing here decides what a fault is: race.cpp does, and it alone
// changes lines. Shared memory belongs to one team, so that its slots need no team; global memory
// is shared by workers, so that its pages have locks.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "clock.h"
#include "place.h"

namespace simt {

enum AccessFlags : uint8_t {
  READ = 0,
  WRITE = 1,
  ATOMIC = 2,
  ASYNC = 4,       // through the asynchronous proxy: TMA, bulk copies, wgmma operands
  PENDING = 8,     // a cp.async: complete, and ordered, when its thread has waited for its group
  WARPGROUP = 16,  // four actors, one per warp, beginning with `actor`
  READS_TOO = 64,  // an atomic that writes what it read
};

struct SharedSlot {
  Tick tick;  // of a cp.async: its group
  Place place;
  Actor actor;
  uint16_t mask;
  uint8_t flags;
  // The same read by the same lane of several warps (shared memory): bit w stands for the thread
  // 32 w after `actor`. 0: `actor` alone.
  uint8_t warps = 0;
};

struct GlobalSlot : SharedSlot {
  uint32_t team;
};

// The same read by several of 32 neighbouring threads: a line that many threads read has such
// entries in place of slots.
struct SameReads {
  uint32_t team;
  Tick tick;
  Place place;
  Actor first;     // the actor of bit 0
  uint32_t lanes;  // whose read it is
  uint16_t mask;
  uint8_t flags;  // READ, PENDING
};

// The reads of a line that many threads read, and the first two teams to do so with their bytes.
struct Reads {
  std::vector<SameReads> entries;
  struct {
    uint32_t team;
    uint16_t mask;
  } teams[2]{};
};

// 16 bytes of memory and the slots of what touched them, in no particular order. Most lines never
// have more than the inline ones, and then fill one line of the processor's cache.
template <class S, uint32_t INLINE>
class alignas(64) Line {
 public:
  using Slot = S;
  static constexpr uint32_t BYTES = 16, INLINE_SLOTS = INLINE;
  // Of the object: without the padding after the slots.
  static constexpr size_t CONTENT_BYTES = 16 + INLINE * sizeof(S);

  uint16_t initialised = 0;  // of shared memory: bytes that somebody wrote

  Line() = default;
  Line(const Line&) = delete;
  Line& operator=(const Line&) = delete;
  ~Line() { delete more_; }

  // What an earlier team or launch left is nothing.
  void start(uint32_t generation) {
    if (generation_ == generation) [[likely]]
      return;
    generation_ = generation;
    initialised = 0;
    size_ = 0;
    std::memset(static_cast<void*>(slots_), 0, sizeof slots_);  // for `Repeat`
    if (more_) more_->reads = {};
  }

  uint32_t size() const { return size_; }
  S* slots() { return size_ <= INLINE ? slots_ : more_->slots.data(); }
  void push_back(const S& slot) {
    if (size_ < INLINE) {
      slots_[size_++] = slot;
      return;
    }
    std::vector<S>& all = more().slots;
    if (size_ == INLINE) all.assign(slots_, slots_ + INLINE);
    all.resize(size_);
    all.push_back(slot);
    size_++;
  }
  void shrink(uint32_t size) {
    if (size_ > INLINE && size <= INLINE)
      for (uint32_t i = 0; i < size; i++) slots_[i] = more_->slots[i];
    size_ = uint16_t(size);
  }

  // Reads of threads beyond those in slots.
  bool has_reads() const { return more_ && !more_->reads.entries.empty(); }
  Reads& reads() { return more().reads; }

  // Whether all there is to know is in these 64 bytes.
  bool plain() const { return !more_; }

 private:
  struct More {
    std::vector<S> slots;  // all of them, if they are too many
    Reads reads;
  };
  More& more() {
    if (!more_) more_ = new More;
    return *more_;
  }
  uint16_t size_ = 0;
  uint32_t generation_ = 0;
  More* more_ = nullptr;
  S slots_[INLINE]{};
};

using SharedLine = Line<SharedSlot, 3>;
using GlobalLine = Line<GlobalSlot, 2>;
static_assert(sizeof(SharedLine) == 64 && sizeof(GlobalLine) == 64);

class SpinLock {
 public:
  void lock() {
    while (flag_.test_and_set(std::memory_order_acquire)) __builtin_ia32_pause();
  }
  void unlock() { flag_.clear(std::memory_order_release); }

 private:
  std::atomic_flag flag_;
};

constexpr size_t SHADOW_PAGE_BYTES = 4096;  // of global memory

struct ShadowPage {
  SpinLock lock;
  GlobalLine lines[SHADOW_PAGE_BYTES / GlobalLine::BYTES];
};

// The shadow of the addresses that global memory comes from; false: no address space for it.
bool reserve_shadow(const void* base, size_t bytes);
// Forgets whole pages.
void drop_shadow(const void* start, size_t bytes);

extern std::atomic<ShadowPage*>* shadow_pages;  // by page after the base, made at the first use
extern uintptr_t shadow_base;
ShadowPage& new_shadow_page(std::atomic<ShadowPage*>&);
inline ShadowPage& shadow_page(uintptr_t address) {
  std::atomic<ShadowPage*>& slot = shadow_pages[(address - shadow_base) / SHADOW_PAGE_BYTES];
  ShadowPage* page = slot.load(std::memory_order_acquire);
  return page ? *page : new_shadow_page(slot);
}

}  // namespace simt
