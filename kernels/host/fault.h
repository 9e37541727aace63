// Faults: how a kernel's mistake becomes the error of its launch.
//
// `fail` records the first message of the launch, abandons the team's fibers and goes back to the
// worker. Kernels and wrappers own nothing on their stacks, so nothing is lost with them.
#pragma once
#include <cstdint>
#include <string>

#include "language.h"

namespace simt {

struct Fiber;
struct Block;
struct Launch;

[[noreturn]] void fail(const std::string& message);
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string describe(Site);               // "kernels/norm.cu:71"
std::string describe(const Fiber&);       // "block (0,1,0) thread 37 (warp 1, lane 5)"
std::string describe(const uint3&);       // "(0,1,0)"
std::string describe_code(uintptr_t pc);  // for the caller of simt_launch to resolve

[[noreturn]] void fail_at(const Fiber&, const char* what, Site, const std::string& message);

// Signals become faults, and threads that spin are found: from the first launch on.
void install_fault_handlers();
void prepare_thread_for_faults();
void watch(struct Worker*);
void unwatch(struct Worker*);
int64_t milliseconds();

[[noreturn]] void report_deadlock();

}  // namespace simt
