// The table of sites that have a number, and code addresses relative to this file's.
#include "place.h"

#include <mutex>
#include <vector>

#include "fault.h"

namespace simt {

static constexpr Place SITE = 0x80000000u;

static std::mutex sites_mutex;
static std::vector<Site> sites;

Place Places::number(Site site) {
  std::lock_guard lock(sites_mutex);
  for (size_t i = 0; i < sites.size(); i++)
    if (sites[i].file == site.file && sites[i].line == site.line) return SITE | Place(i);
  sites.push_back(site);
  return SITE | Place(sites.size() - 1);
}

// Code lies within 1 GiB of this function.
static constexpr uintptr_t MIDDLE = 0x40000000u;

Place place_of_code(uintptr_t pc) {
  return Place(pc - reinterpret_cast<uintptr_t>(&place_of_code) + MIDDLE) & ~SITE;
}

std::string describe(Place place) {
  if (place & SITE) {
    std::lock_guard lock(sites_mutex);
    return describe(sites[place & ~SITE]);
  }
  // A return address points after the access.
  return describe_code(reinterpret_cast<uintptr_t>(&place_of_code) + place - MIDDLE - 1);
}

}  // namespace simt
