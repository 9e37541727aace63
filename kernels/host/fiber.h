// Stacks and the switch between them: what a simulated thread is, below any CUDA.
//
// x86-64 System V only. A switch saves the callee-saved registers on the stack that it leaves and
// takes about 2 ns; fibers stay on the OS thread that made them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {

constexpr size_t PAGE_BYTES = 4096;
constexpr size_t STACK_BYTES = 64 * 1024;  // of one simulated thread, a guard page below it

// Leaves the current stack (its pointer goes to *save) and continues on `to`.
extern "C" void simt_switch_stack(void** save, void* to);

// A stack pointer that, once switched to, calls `entry`, which must never return.
void* prepare_stack(void* top, void (*entry)());

// Many stacks in one mapping; memory is committed as it is touched and kept for the next launch.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();
  bool grow_to(size_t count);  // false: no address space, or not enough mappings
  void release();
  size_t count() const { return count_; }
  // Of the process, for all its stacks: each takes two mappings, and a part is left for others.
  static size_t most();
  uint8_t* top(size_t index) const { return memory_ + (index + 1) * stride; }
  uint8_t* bottom(size_t index) const { return top(index) - STACK_BYTES; }
  // The stack whose guard page holds this address, or -1.
  long overflowed(const void* address) const;

 private:
  static constexpr size_t stride = STACK_BYTES + PAGE_BYTES;
  uint8_t* memory_ = nullptr;
  size_t count_ = 0;
};

}  // namespace simt
