// The stack switch in assembly, and the mapping that holds the stacks.
#include "fiber.h"

#include <sys/mman.h>

#include <atomic>
#include <fstream>

asm(R"(
.text
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack,@function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack,.-simt_switch_stack
)");

namespace simt {

void* prepare_stack(void* top, void (*entry)()) {
  constexpr int SAVED_REGISTERS = 6;
  auto** pointer = reinterpret_cast<void**>(top) - 8;
  *--pointer = nullptr;  // a return address for the debugger to stop at, which aligns the entry
  *--pointer = reinterpret_cast<void*>(entry);
  for (int i = 0; i < SAVED_REGISTERS; i++) *--pointer = nullptr;
  return pointer;
}

static std::atomic<size_t> stacks_of_process{0};

size_t Stacks::most() {
  static const size_t most = [] {
    size_t mappings = 65530;  // Linux's own value
    std::ifstream("/proc/sys/vm/max_map_count") >> mappings;
    return mappings / 3;
  }();
  return most;
}

Stacks::~Stacks() { release(); }

void Stacks::release() {
  if (!memory_) return;
  munmap(memory_, count_ * stride);
  stacks_of_process -= count_;
  memory_ = nullptr;
  count_ = 0;
}

bool Stacks::grow_to(size_t count) {
  if (count <= count_) return true;
  release();
  if ((stacks_of_process += count) > most()) {
    stacks_of_process -= count;
    return false;
  }
  void* memory = mmap(nullptr, count * stride, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    stacks_of_process -= count;
    return false;
  }
  memory_ = static_cast<uint8_t*>(memory);
  count_ = count;
  for (size_t i = 0; i < count; i++) {
    if (mprotect(memory_ + i * stride, PAGE_BYTES, PROT_NONE) == 0) continue;
    release();
    return false;
  }
  return true;
}

long Stacks::overflowed(const void* address) const {
  const size_t offset = size_t(static_cast<const uint8_t*>(address) - memory_);
  if (!memory_ || offset >= count_ * stride || offset % stride >= PAGE_BYTES) return -1;
  return long(offset / stride);
}

}  // namespace simt
