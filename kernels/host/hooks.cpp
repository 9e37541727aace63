// A kernel's own loads and stores: the calls that the compiler inserts into the hooked kernels
// (-fsanitize=thread,alignment), supplied here in place of libtsan and libubsan, which are never
// linked.
//
// An address on the thread's stack is a register of the GPU, of which only wgmma's are watched.
// Shared and global memory are checked to the byte, then handed to the race detector.
#include "device_memory.h"
#include "fault.h"
#include "race.h"
#include "shared.h"

namespace simt {

static bool overlaps(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
  const auto *first = static_cast<const uint8_t*>(a), *second = static_cast<const uint8_t*>(b);
  return first < second + b_bytes && second < first + a_bytes;
}

// Registers of a running wgmma belong to it.
static void check_registers(const Fiber& fiber, const void* p, uint32_t bytes, bool write,
                            uintptr_t pc) {
  const Warpgroup& group = warpgroup_of(fiber);
  const uint32_t thread = fiber.id % WARPGROUP_THREADS;
  for (size_t i = 0; i < fiber.products - group.retired; i++) {
    const Product& product = *group.products[i];
    const bool accumulator = overlaps(p, bytes, product.d[thread], size_t(product.n) * 2);
    const bool operand = product.in_registers && write &&
                         overlaps(p, bytes, product.source[thread], sizeof product.registers[0]);
    if (!accumulator && !operand) continue;
    fail(format("%s: the %s of the wgmma at %s is %s at %s before wgmma_wait",
                describe(fiber).c_str(), accumulator ? "accumulator" : "register operand",
                describe(product.site).c_str(), write ? "written" : "read",
                describe_code(pc - 1).c_str()));
  }
}

[[noreturn]] static void spins(const Fiber& fiber, uintptr_t pc) {
  fail(format("%s runs without end: no wrapper was called for %u ms\n  it was at %s",
              describe(fiber).c_str(), worker->launch->options.watchdog_ms,
              describe_code(pc - 1).c_str()));
}

[[noreturn]] static void out_of_bounds(const Fiber& fiber, const void* p, uint32_t bytes,
                                       bool write, uintptr_t pc) {
  const char* what = write ? "write" : "read";
  const std::string me = describe(fiber), here = describe_code(pc - 1);
  if (const Block* block = block_of(p)) {
    fail(
        format("%s out of bounds: %u bytes at shared address 0x%x by %s at %s; the launch gave "
               "%u bytes of dynamic shared memory, from 0x%x on",
               what, bytes, offset_in(block, p), me.c_str(), here.c_str(),
               block->dynamic_end - DYNAMIC_BASE, DYNAMIC_BASE));
  }
  if (in_device_memory(p)) {
    fail(format("%s out of bounds: %u bytes by %s at %s: %s", what, bytes, me.c_str(), here.c_str(),
                describe_global(p).c_str()));
  }
  fail(
      format("%s of %u bytes by %s at %s: address %p is neither shared memory nor in a device "
             "buffer%s",
             what, bytes, me.c_str(), here.c_str(), p,
             p < reinterpret_cast<void*>(PAGE_BYTES) ? " (a null pointer)" : ""));
}

static void access_shared(Fiber& fiber, Block& block, const void* p, uint32_t bytes, bool write,
                          uintptr_t pc) {
  const uint32_t address = offset_in(&block, p);
  const Place place = place_of_code(pc);
  if (&block != fiber.block) {
    if (block.finished == block.threads) {
      fail(format("%s at %s uses shared memory of block %s, which has exited",
                  describe(fiber).c_str(), describe_code(pc - 1).c_str(),
                  describe(block.index).c_str()));
    }
    race_visit(fiber, block, place);
  }
  if (!in_bounds(block, address, bytes)) out_of_bounds(fiber, p, bytes, write, pc);
  if (holds_mbarrier(block, address, bytes)) report_mbarrier_access(block, address, write, pc);
  check_shared(block, address, bytes, Access(fiber, write ? WRITE : READ, place));
}

static bool on_stack(const Fiber& fiber, const void* p) {
  return size_t(static_cast<const uint8_t*>(p) - fiber.stack_bottom) < STACK_BYTES;
}

[[gnu::noinline]] static void access(const void* p, uint32_t bytes, bool write, uintptr_t pc) {
  Worker& w = *worker;
  Fiber& fiber = *self();
  if (w.expired()) [[unlikely]]
    spins(fiber, pc);
  if (on_stack(fiber, p)) {
    if (fiber.registers) touch_registers(fiber, p, bytes, write, pc);
    if (pending_product(fiber)) check_registers(fiber, p, bytes, write, pc);
    return;
  }
  if (Block* block = block_of(p)) return access_shared(fiber, *block, p, bytes, write, pc);
  if (owns(p, bytes)) [[likely]] {
    if (fiber.must_wait) [[unlikely]]
      report_early_access(fiber, format("a %s of %u bytes", write ? "write" : "read", bytes), p,
                          describe_code(pc - 1));
    return check_global(p, bytes, Access(fiber, write ? WRITE : READ, place_of_code(pc)));
  }
  if (!in_device_memory(p) && in_image(p)) return;  // constants of the kernel file
  out_of_bounds(fiber, p, bytes, write, pc);
}

[[noreturn]] static void misaligned(const void* p, uint32_t alignment, Site site) {
  const Block* block = block_of(p);
  fail(format("misaligned access by %s at %s: a multiple of %u bytes is needed, not %s",
              describe(*self()).c_str(), describe(site).c_str(), alignment,
              block ? format("shared address 0x%x", offset_in(block, p)).c_str()
                    : describe_global(p).c_str()));
}

// Whether a kernel runs in race mode; not in constructors, or after its end.
static bool watched() { return worker && worker->race && current; }

// Most accesses are to the stack of a thread that uses no wgmma.
[[gnu::always_inline]] static inline void hook(const void* p, uint32_t bytes, bool write,
                                               uintptr_t pc) {
  const Fiber* fiber = self();
  if (fiber && on_stack(*fiber, p) && !fiber->registers && !fiber->products && !worker->expired())
      [[likely]]
    return;
  if (watched() && p != &current) access(p, bytes, write, pc);
}

}  // namespace simt

// `current` is one of the registers of a GPU: threadIdx and its like.
#define HOOK(name, bytes, write)                                                           \
  void __tsan_##name(void* p) {                                                            \
    simt::hook(p, bytes, write, reinterpret_cast<uintptr_t>(__builtin_return_address(0))); \
  }
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
void __tsan_read_range(void* p, size_t bytes) {
  if (simt::watched())
    simt::access(p, uint32_t(bytes), false,
                 reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}
void __tsan_write_range(void* p, size_t bytes) {
  if (simt::watched())
    simt::access(p, uint32_t(bytes), true,
                 reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

// -fsanitize=alignment: a pointer that is less aligned than its type says. The hooks above do not
// see it where the compiler takes a vector apart, and a GPU would trap.
struct Mismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  uint8_t log2_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(const Mismatch* mismatch, const void* p) {
  if (simt::watched())
    simt::misaligned(p, 1u << mismatch->log2_alignment, {mismatch->file, int(mismatch->line)});
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
