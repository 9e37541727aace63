// Shared memory: which block an address belongs to, and whether the launch gave it.
#pragma once
#include "machine.h"

namespace simt {

// The block of the team in whose window `p` lies, or null.
inline Block* block_of(const void* p) {
  Worker& w = *worker;
  const size_t offset = size_t(static_cast<const uint8_t*>(p) - w.windows);
  return offset < w.launch->team_blocks * WINDOW_BYTES ? &w.blocks[offset / WINDOW_BYTES] : nullptr;
}
inline uint32_t offset_in(const Block* block, const void* p) {
  return uint32_t(static_cast<const uint8_t*>(p) - block->window);
}

// Whether [address, address + bytes) is shared memory that this launch asked for.
inline bool in_bounds(const Block& block, uint32_t address, uint32_t bytes) {
  const uint64_t end = uint64_t(address) + bytes;
  const bool dynamic = address >= DYNAMIC_BASE && end <= block.dynamic_end;
  const bool in_static = address >= block.dynamic_end + GAP_BYTES && end <= block.static_end;
  return dynamic || in_static;
}
[[noreturn]] void out_of_shared(const Block&, uint32_t address, uint32_t bytes, const char* what,
                                Site site);
// The memory at these addresses, if it is the launch's; else a fault.
inline uint8_t* checked_shared(Block* block, uint32_t address, uint32_t bytes, const char* what,
                               Site site) {
  if (!in_bounds(*block, address, bytes)) [[unlikely]]
    out_of_shared(*block, address, bytes, what, site);
  return block->window + address;
}
[[noreturn]] void not_shared(const void* p, const char* what, Site);
inline void checked_shared(const void* p, uint32_t bytes, const char* what, Site site) {
  Block* block = block_of(p);
  if (!block) [[unlikely]]
    not_shared(p, what, site);
  checked_shared(block, offset_in(block, p), bytes, what, site);
}

// A fault if `p` lies in another block's shared memory: most instructions take .shared::cta only.
void check_own_block(const Fiber&, const void* p, const char* what, Site);

// Fills a block's memory with NaNs and the gap after it; whether the gaps are whole.
void poison(Block&);
void check_gaps(const Block&);

}  // namespace simt
