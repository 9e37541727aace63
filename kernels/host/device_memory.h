// The device's global memory: buffers with exact bounds, and the shadow that the race detector
// keeps of it.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>

#include "race.h"

namespace simt {

// Whether `p` lies in the address range that buffers come from.
bool in_device_memory(const void* p);
// Whether [p, p + bytes) lies within one buffer.
bool owns(const void* p, uint64_t bytes);
// "buffer \"inp\" + 0x40", or what is near.
std::string describe_global(const void* p);
// Whether `p` lies in the program or library that holds the kernels.
bool in_image(const void* p);

class SpinLock {
 public:
  void lock() {
    while (flag_.test_and_set(std::memory_order_acquire)) __builtin_ia32_pause();
  }
  void unlock() { flag_.clear(std::memory_order_release); }

 private:
  std::atomic_flag flag_;
};

struct ShadowPage {
  SpinLock lock;
  uint32_t generation = 0;
  Line lines[4096 / Line::BYTES];
  void start(uint32_t launch_generation) {
    generation = launch_generation;
    for (Line& line : lines) line.clear();
  }
};
// Of the page of global memory that holds `address`, made at its first use.
ShadowPage& shadow_page(uintptr_t address);

}  // namespace simt
