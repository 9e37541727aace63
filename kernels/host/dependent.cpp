// Dependent launches: one may begin while the previous kernel still runs, so that each of its
// threads waits for that kernel before it touches global memory, and before it ends.
//
// Here kernels run one after another, and nothing could go wrong; what would on a GPU is a fault.
// Wrappers are checked always, ordinary loads and stores in race mode.
#include "device_memory.h"
#include "fault.h"
#include "machine.h"

namespace simt {

void report_early_access(const Fiber& fiber, const std::string& what, const void* p,
                         const std::string& here) {
  fail(
      format("global memory is touched before grid_dependency_wait in a dependent launch: %s by %s "
             "at %s%s; the previous kernel may still run",
             what.c_str(), describe(fiber).c_str(), here.c_str(),
             p ? (": " + describe_global(p)).c_str() : ""));
}

void check_waited(const Fiber& fiber, const char* what, const void* p, Site site) {
  if (fiber.must_wait) [[unlikely]]
    report_early_access(fiber, what, p, describe(site));
}

void check_waited_at_exit(const Fiber& fiber) {
  if (!fiber.must_wait) return;
  fail(
      format("%s exits without grid_dependency_wait in a dependent launch: kernels after it could "
             "begin while the previous one still runs",
             describe(fiber).c_str()));
}

}  // namespace simt

void grid_dependency_wait(simt::Site) { simt::self()->must_wait = false; }
