// The access hooks that the compiler inserts into the hooked kernels (-fsanitize=thread,alignment),
// supplied here in place of libtsan and libubsan, which are never linked.
#include "fault.h"
#include "machine.h"

namespace {

// `return_address`: behind the access in the kernel.
inline __attribute__((always_inline)) void access(const void* p, size_t bytes, bool write,
                                                  void* return_address) {
  if (!simt::worker || !simt::worker->race || !simt::current) return;
  if (p == &simt::current) return;  // threadIdx and its like are registers of the GPU
  simt::race_hook(p, uint32_t(bytes), write, reinterpret_cast<uintptr_t>(return_address));
}

}  // namespace

#define HOOK(name, bytes, write) \
  void __tsan_##name(void* p) { access(p, bytes, write, __builtin_return_address(0)); }
#define HOOKS(bytes)                        \
  HOOK(read##bytes, bytes, false)           \
  HOOK(write##bytes, bytes, true)           \
  HOOK(volatile_read##bytes, bytes, false)  \
  HOOK(volatile_write##bytes, bytes, true)  \
  HOOK(unaligned_read##bytes, bytes, false) \
  HOOK(unaligned_write##bytes, bytes, true)

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) { access(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { access(p, n, true, __builtin_return_address(0)); }

// -fsanitize=alignment: a pointer that is less aligned than its type says. The hooks above do not
// see it where the compiler takes a vector apart, and a GPU would trap.
struct Mismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  uint8_t log2_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(const Mismatch* mismatch, const void* p) {
  if (!simt::worker || !simt::worker->race || !simt::current) return;
  simt::report_misaligned(p, 1u << mismatch->log2_alignment, {mismatch->file, int(mismatch->line)});
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
