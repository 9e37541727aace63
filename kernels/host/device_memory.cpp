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

namespace simt {

namespace {

constexpr size_t RESERVED_BYTES = size_t(1) << 38;  // of addresses, not of memory
constexpr size_t PAGES = RESERVED_BYTES / PAGE_BYTES;
constexpr size_t ALIGNMENT = 256;

struct Buffer {
  uintptr_t address;
  uint64_t bytes;
  size_t first_page, pages;  // the guard page included
  std::string label;
};

struct DeviceMemory {
  uint8_t* base = nullptr;
  uint32_t* buffer_of_page = nullptr;           // index + 1
  std::atomic<ShadowPage*>* shadows = nullptr;  // by page
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
    base = static_cast<uint8_t*>(map(RESERVED_BYTES, PROT_NONE));
    buffer_of_page = static_cast<uint32_t*>(map(PAGES * 4, PROT_READ | PROT_WRITE));
    shadows = static_cast<std::atomic<ShadowPage*>*>(map(PAGES * 8, PROT_READ | PROT_WRITE));
    if (!buffer_of_page || !shadows) base = nullptr;
    buffers.reserve(1 << 16);  // readers index it without the lock
  }
  size_t page_of(const void* p) const {
    return size_t(static_cast<const uint8_t*>(p) - base) / PAGE_BYTES;
  }
  const Buffer* find(const void* p) const {
    if (!in_device_memory(p)) return nullptr;
    const uint32_t index = buffer_of_page[page_of(p)];
    return index ? &buffers[index - 1] : nullptr;
  }
};

DeviceMemory& memory() {
  static auto* device_memory = new DeviceMemory;  // for the life of the process
  return *device_memory;
}

}  // namespace

bool in_device_memory(const void* p) {
  const DeviceMemory& m = memory();
  return m.base && size_t(static_cast<const uint8_t*>(p) - m.base) < RESERVED_BYTES;
}

bool owns(const void* p, uint64_t bytes) {
  const Buffer* buffer = memory().find(p);
  const auto address = reinterpret_cast<uintptr_t>(p);
  return buffer && address >= buffer->address && bytes <= buffer->bytes &&
         address - buffer->address <= buffer->bytes - bytes;
}

std::string describe_global(const void* p) {
  const Buffer* buffer = memory().find(p);
  // Just before the first buffer of all, there is none whose guard page it would be.
  if (!buffer) buffer = memory().find(static_cast<const uint8_t*>(p) + PAGE_BYTES);
  if (!buffer) return format("address %p, not in any device buffer", p);
  const auto address = reinterpret_cast<uintptr_t>(p);
  const auto bytes = static_cast<unsigned long long>(buffer->bytes);
  if (address < buffer->address) {
    return format("%lu bytes before buffer \"%s\" of %llu bytes",
                  static_cast<unsigned long>(buffer->address - address), buffer->label.c_str(),
                  bytes);
  }
  const auto offset = static_cast<unsigned long long>(address - buffer->address);
  // On its guard page, the buffer behind may be nearer.
  const Buffer* next = memory().find(static_cast<const uint8_t*>(p) + PAGE_BYTES);
  if (next && next != buffer && offset >= bytes && next->address - address < offset - bytes) {
    return format("%lu bytes before buffer \"%s\" of %llu bytes",
                  static_cast<unsigned long>(next->address - address), next->label.c_str(),
                  static_cast<unsigned long long>(next->bytes));
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

ShadowPage& shadow_page(uintptr_t address) {
  std::atomic<ShadowPage*>& slot =
      memory().shadows[memory().page_of(reinterpret_cast<void*>(address))];
  ShadowPage* page = slot.load(std::memory_order_acquire);
  if (page) return *page;
  auto* made = new ShadowPage;
  if (slot.compare_exchange_strong(page, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *page;
}

}  // namespace simt

using namespace simt;

extern "C" void* simt_allocate(uint64_t bytes, const char* label) {
  DeviceMemory& m = memory();
  if (!m.base || bytes > RESERVED_BYTES / 2) return nullptr;
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
  uint8_t* start = m.base + first * PAGE_BYTES;
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
  m.buffers[index] = {reinterpret_cast<uintptr_t>(address), bytes, first, pages, label};
  for (size_t page = first; page < first + pages; page++) m.buffer_of_page[page] = index + 1;
  return address;
}

extern "C" int simt_free(void* address) {
  DeviceMemory& m = memory();
  std::lock_guard lock(m.mutex);
  const Buffer* found = m.find(address);
  if (!found || found->address != reinterpret_cast<uintptr_t>(address)) return 1;
  const Buffer buffer = *found;
  const uint32_t index = m.buffer_of_page[buffer.first_page] - 1;
  uint8_t* start = m.base + buffer.first_page * PAGE_BYTES;
  madvise(start, (buffer.pages - 1) * PAGE_BYTES, MADV_DONTNEED);
  mprotect(start, (buffer.pages - 1) * PAGE_BYTES, PROT_NONE);
  for (size_t page = buffer.first_page; page < buffer.first_page + buffer.pages; page++) {
    m.buffer_of_page[page] = 0;
    delete m.shadows[page].exchange(nullptr);
  }
  m.free_pages.emplace(buffer.pages, buffer.first_page);
  m.free_indices.push_back(index);
  return 0;
}
