// The pages of global memory's shadow: a table over the whole reservation, committed as it is used.
#include "shadow.h"

#include <sys/mman.h>

namespace simt {

std::atomic<ShadowPage*>* shadow_pages = nullptr;
uintptr_t shadow_base = 0;

bool reserve_shadow(const void* base, size_t bytes) {
  void* table = mmap(nullptr, bytes / SHADOW_PAGE_BYTES * sizeof *shadow_pages,
                     PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (table == MAP_FAILED) return false;
  shadow_pages = static_cast<std::atomic<ShadowPage*>*>(table);
  shadow_base = reinterpret_cast<uintptr_t>(base);
  return true;
}

void drop_shadow(const void* start, size_t bytes) {
  const size_t first = (reinterpret_cast<uintptr_t>(start) - shadow_base) / SHADOW_PAGE_BYTES;
  for (size_t page = first; page < first + bytes / SHADOW_PAGE_BYTES; page++)
    delete shadow_pages[page].exchange(nullptr);
}

ShadowPage& new_shadow_page(std::atomic<ShadowPage*>& slot) {
  auto* made = new ShadowPage;
  ShadowPage* present = nullptr;
  if (slot.compare_exchange_strong(present, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *present;
}

}  // namespace simt
