// The access hooks that the compiler inserts into the hooked kernels (-fsanitize=thread), supplied
// here in place of libtsan, which is never linked.
#include "fault.h"
#include "machine.h"

namespace {

// `return_address`: behind the access in the kernel. `aligned`: whether the compiler took it so.
inline __attribute__((always_inline)) void access(const void* p, size_t bytes, bool write,
                                                  bool aligned, void* return_address) {
  if (!simt::worker || !simt::worker->race || !simt::current) return;
  if (p == &simt::current) return;  // threadIdx and its like are registers of the GPU
  simt::race_hook(p, uint32_t(bytes), write, aligned, reinterpret_cast<uintptr_t>(return_address));
}

}  // namespace

#define HOOK(name, bytes, write, aligned)                            \
  void __tsan_##name(void* p) {                                      \
    access(p, bytes, write, aligned, __builtin_return_address(0));   \
  }
#define HOOKS(bytes)                                     \
  HOOK(read##bytes, bytes, false, true)                  \
  HOOK(write##bytes, bytes, true, true)                  \
  HOOK(volatile_read##bytes, bytes, false, true)         \
  HOOK(volatile_write##bytes, bytes, true, true)         \
  HOOK(unaligned_read##bytes, bytes, false, false)       \
  HOOK(unaligned_write##bytes, bytes, true, false)

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) {
  access(p, n, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  access(p, n, true, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
