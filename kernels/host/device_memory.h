// The device's global memory: buffers with exact bounds.
#pragma once
#include <cstdint>
#include <string>

namespace simt {

struct Bounds {
  uintptr_t address = 0;
  uint64_t bytes = 0;
};

// Where buffers come from: one large reservation of addresses. Empty before the first buffer.
struct DeviceRange {
  static constexpr size_t PAGE = 4096;
  uintptr_t base = 0;
  size_t bytes = 0;
  uint32_t* buffer_of_page = nullptr;  // 0: none
  Bounds* bounds = nullptr;            // of buffer 1, 2, ...
};
extern DeviceRange device_range;

inline bool in_device_memory(const void* p) {
  return reinterpret_cast<uintptr_t>(p) - device_range.base < device_range.bytes;
}
// Whether [p, p + bytes) lies within one buffer.
inline bool owns(const void* p, uint64_t bytes) {
  if (!in_device_memory(p)) return false;
  const auto address = reinterpret_cast<uintptr_t>(p);
  const uint32_t index =
      device_range.buffer_of_page[(address - device_range.base) / DeviceRange::PAGE];
  const Bounds& buffer = device_range.bounds[index];
  return index && address >= buffer.address && bytes <= buffer.bytes &&
         address - buffer.address <= buffer.bytes - bytes;
}
// "buffer \"inp\" + 0x40", or what is near.
std::string describe_global(const void* p);
// Whether `p` lies in the program or library that holds the kernels.
bool in_image(const void* p);

}  // namespace simt
