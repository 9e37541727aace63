// Shared memory: static variables, the gaps after what a launch asked for, device addresses.
#include "shared.h"

#include <cstring>

#include "fault.h"

namespace simt {

// A byte that no kernel writes by chance, after dynamic and static memory.
static constexpr uint8_t GAP = 0xca;

void out_of_shared(const Block& block, uint32_t address, uint32_t bytes, const char* what,
                   Site site) {
  fail_at(*self(), what, site,
          format("%u bytes at shared address 0x%x are out of bounds: the launch gave %u bytes of "
                 "dynamic shared memory, from 0x%x on",
                 bytes, address, block.dynamic_end - DYNAMIC_BASE, DYNAMIC_BASE));
}

void not_shared(const void* p, const char* what, Site site) {
  fail_at(*self(), what, site, format("address %p is not in shared memory", p));
}

void check_own_block(const Fiber& fiber, const void* p, const char* what, Site site) {
  const Block* block = block_of(p);
  if (!block || block == fiber.block) [[likely]]
    return;
  fail_at(fiber, what, site,
          format("shared address 0x%x is that of block %s, and it works on the thread's own block "
                 "only",
                 offset_in(block, p), describe(block->index).c_str()));
}

void poison(Block& block) {
  std::memset(block.window, 0xff, block.dynamic_end);
  std::memset(block.window + block.dynamic_end, GAP, GAP_BYTES);
}

void check_gaps(const Block& block) {
  const auto changed = [&](uint32_t start) {
    for (uint32_t i = start; i < start + GAP_BYTES; i++)
      if (block.window[i] != GAP) return true;
    return false;
  };
  if (changed(block.dynamic_end)) {
    fail(format("block %s wrote past its %u bytes of dynamic shared memory",
                describe(block.index).c_str(), block.dynamic_end - DYNAMIC_BASE));
  }
  if (!block.statics.empty() && changed(block.static_end)) {
    fail(format("block %s wrote past its static shared memory", describe(block.index).c_str()));
  }
}

void* dynamic_shared() { return self()->block->window + DYNAMIC_BASE; }

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  Block& block = *self()->block;
  for (const StaticVariable& variable : block.statics)
    if (variable.key == key) return variable.address;
  constexpr size_t LEAST_ALIGNMENT = 16;  // so that the detector's lines are not shared
  alignment = std::max(alignment, LEAST_ALIGNMENT);
  const size_t start = (block.static_end + alignment - 1) / alignment * alignment;
  const size_t end = start + bytes;
  if (end - GAP_BYTES - DYNAMIC_BASE > SHARED_LIMIT) {
    fail(
        format("%u bytes of dynamic and %zu bytes of static shared memory: a block has at most %u"
               "\n  by %s",
               block.dynamic_end - DYNAMIC_BASE, end - GAP_BYTES - block.dynamic_end, SHARED_LIMIT,
               describe(*self()).c_str()));
  }
  uint8_t* address = block.window + start;
  std::memset(address, 0xff, bytes);
  std::memset(address + bytes, GAP, GAP_BYTES);
  block.static_end = uint32_t(end);
  block.statics.push_back({key, address});
  return address;
}

}  // namespace simt

using namespace simt;

uint32_t shared_address(const void* p) {
  const Block* block = block_of(p);
  if (!block) {
    fail(format("shared_address: %p is not in shared memory\n  by %s", p,
                describe(*self()).c_str()));
  }
  // As on the device: addresses in the block's own window, others with the rank above bit 24.
  const uint32_t offset = offset_in(block, p);
  return block == self()->block ? offset : (block->rank + 1) << 24 | offset;
}
