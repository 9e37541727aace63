// Places: where in a kernel something was done, in 32 bits, so that millions can be remembered.
//
// A place comes from a code address (the access hooks) or from a Site (the wrappers); only a report
// turns it back into a file and a line.
#pragma once
#include <cstdint>
#include <string>

#include "language.h"

namespace simt {

using Place = uint32_t;

Place place_of_code(uintptr_t pc);
std::string describe(Place);

// The numbers of sites, which are the same for all workers. Each worker has a memory of its own:
// kernels use few sites, each very often.
class Places {
 public:
  Place of(Site site) {
    Entry& entry =
        entries_[(reinterpret_cast<uintptr_t>(site.file) / 16 + size_t(site.line)) % ENTRIES];
    if (entry.site.line != site.line || entry.site.file != site.file) [[unlikely]]
      entry = {site, number(site)};
    return entry.place;
  }

 private:
  static Place number(Site);
  struct Entry {
    Site site;
    Place place;
  };
  static constexpr size_t ENTRIES = 256;
  Entry entries_[ENTRIES]{};
};

}  // namespace simt
