// Buffers lie in one large reservation of addresses: each ends at a guard page, so that in plain
// runs too a kernel that runs over the end of a buffer is caught by the hardware.
#include "device_memory.h"

#include <elf.h>
#include <link.h>
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "abi.h"
#include "fault.h"
#include "fiber.h"
#include "shadow.h"

namespace simt {

namespace {

constexpr size_t RESERVED_BYTES = size_t(1) << 38;  // of addresses, not of memory
constexpr size_t PAGES = RESERVED_BYTES / PAGE_BYTES;
constexpr size_t ALIGNMENT = 256;

struct Buffer {
  Bounds bounds;
  size_t first_page, pages;  // the guard page included
  std::string label;
};

struct DeviceMemory {
  static constexpr size_t MOST_BUFFERS = 1 << 16;
  std::mutex mutex;
  std::vector<Buffer> buffers;
  std::vector<uint32_t> free_indices;
  std::multimap<size_t, size_t> free_pages;  // count -> first
  size_t next_page = 1;                      // the first page stays a guard

  DeviceMemory() {
    const auto map = [](size_t bytes, int protection) {
      void* p =
          mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      return p == MAP_FAILED ? nullptr : p;
    };
    constexpr int BOTH = PROT_READ | PROT_WRITE;
    void* base = map(RESERVED_BYTES, PROT_NONE);
    device_range.buffer_of_page = static_cast<uint32_t*>(map(PAGES * sizeof(uint32_t), BOTH));
    device_range.bounds = static_cast<Bounds*>(map((MOST_BUFFERS + 1) * sizeof(Bounds), BOTH));
    buffers.reserve(MOST_BUFFERS);  // readers index it without the lock
    if (!base || !device_range.buffer_of_page || !device_range.bounds) return;
    if (!reserve_shadow(base, RESERVED_BYTES)) return;
    device_range.base = reinterpret_cast<uintptr_t>(base);
    device_range.bytes = RESERVED_BYTES;
  }
  const Buffer* find(const void* p) const {
    if (!in_device_memory(p)) return nullptr;
    const size_t page = (reinterpret_cast<uintptr_t>(p) - device_range.base) / PAGE_BYTES;
    const uint32_t index = device_range.buffer_of_page[page];
    return index ? &buffers[index - 1] : nullptr;
  }
};

DeviceMemory& memory() {
  static auto* device_memory = new DeviceMemory;  // for the life of the process
  return *device_memory;
}

uint8_t* page_start(size_t page) {
  return reinterpret_cast<uint8_t*>(device_range.base + page * PAGE_BYTES);
}

}  // namespace

DeviceRange device_range;

std::string describe_global(const void* p) {
  const Buffer* buffer = memory().find(p);
  // Just before the first buffer of all, there is none whose guard page it would be.
  if (!buffer) buffer = memory().find(static_cast<const uint8_t*>(p) + PAGE_BYTES);
  if (!buffer) return format("address %p, not in any device buffer", p);
  const auto address = reinterpret_cast<uintptr_t>(p);
  const auto bytes = static_cast<unsigned long long>(buffer->bounds.bytes);
  if (address < buffer->bounds.address) {
    return format("%lu bytes before buffer \"%s\" of %llu bytes",
                  static_cast<unsigned long>(buffer->bounds.address - address),
                  buffer->label.c_str(), bytes);
  }
  const auto offset = static_cast<unsigned long long>(address - buffer->bounds.address);
  // On its guard page, the next buffer may be nearer.
  const Buffer* next = memory().find(static_cast<const uint8_t*>(p) + PAGE_BYTES);
  if (next && next != buffer && offset >= bytes &&
      next->bounds.address - address < offset - bytes) {
    return format("%lu bytes before buffer \"%s\" of %llu bytes",
                  static_cast<unsigned long>(next->bounds.address - address), next->label.c_str(),
                  static_cast<unsigned long long>(next->bounds.bytes));
  }
  return format("global memory at byte %llu of buffer \"%s\" (%llu bytes)", offset,
                buffer->label.c_str(), bytes);
}

bool in_image(const void* p) {
  struct Search {
    uintptr_t address, code;
    bool found;
  } search{reinterpret_cast<uintptr_t>(p), reinterpret_cast<uintptr_t>(&in_image), false};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& wanted = *static_cast<Search*>(data);
        bool has_code = false, has_address = false;
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& segment = info->dlpi_phdr[i];
          if (segment.p_type != PT_LOAD) continue;
          const uintptr_t start = info->dlpi_addr + segment.p_vaddr;
          has_code |= wanted.code - start < segment.p_memsz;
          has_address |= wanted.address - start < segment.p_memsz;
        }
        wanted.found |= has_code && has_address;
        return 0;
      },
      &search);
  return search.found;
}

}  // namespace simt

using namespace simt;

extern "C" void* simt_allocate(uint64_t bytes, const char* label) {
  DeviceMemory& m = memory();
  if (!device_range.bytes || bytes > RESERVED_BYTES / 2) return nullptr;
  const uint64_t padded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  const size_t data_pages = (padded + PAGE_BYTES - 1) / PAGE_BYTES;
  const size_t pages = data_pages + 1;
  std::lock_guard lock(m.mutex);
  if (m.free_indices.empty() && m.buffers.size() == m.buffers.capacity()) return nullptr;
  size_t first = m.next_page;
  if (auto reused = m.free_pages.lower_bound(pages);
      reused != m.free_pages.end() && reused->first < 2 * pages) {
    first = reused->second;
    const size_t rest = reused->first - pages;
    m.free_pages.erase(reused);
    if (rest) m.free_pages.emplace(rest, first + pages);
  } else {
    if (first + pages > PAGES) return nullptr;
    m.next_page += pages;
  }
  uint8_t* start = page_start(first);
  if (data_pages && mprotect(start, data_pages * PAGE_BYTES, PROT_READ | PROT_WRITE) != 0) {
    m.free_pages.emplace(pages, first);
    return nullptr;
  }
  uint8_t* address = start + data_pages * PAGE_BYTES - padded;
  std::memset(start, 0xff, data_pages * PAGE_BYTES);
  uint32_t index;
  if (m.free_indices.empty()) {
    index = uint32_t(m.buffers.size());
    m.buffers.emplace_back();
  } else {
    index = m.free_indices.back();
    m.free_indices.pop_back();
  }
  const Bounds bounds{reinterpret_cast<uintptr_t>(address), bytes};
  m.buffers[index] = {bounds, first, pages, label};
  device_range.bounds[index + 1] = bounds;
  for (size_t page = first; page < first + pages; page++)
    device_range.buffer_of_page[page] = index + 1;
  return address;
}

extern "C" int simt_free(void* address) {
  DeviceMemory& m = memory();
  std::lock_guard lock(m.mutex);
  const Buffer* found = m.find(address);
  if (!found || found->bounds.address != reinterpret_cast<uintptr_t>(address)) return 1;
  const Buffer buffer = *found;
  const uint32_t index = device_range.buffer_of_page[buffer.first_page] - 1;
  uint8_t* start = page_start(buffer.first_page);
  madvise(start, (buffer.pages - 1) * PAGE_BYTES, MADV_DONTNEED);
  mprotect(start, (buffer.pages - 1) * PAGE_BYTES, PROT_NONE);
  for (size_t page = buffer.first_page; page < buffer.first_page + buffer.pages; page++)
    device_range.buffer_of_page[page] = 0;
  drop_shadow(start, buffer.pages * PAGE_BYTES);
  m.free_pages.emplace(buffer.pages, buffer.first_page);
  m.free_indices.push_back(index);
  return 0;
}
