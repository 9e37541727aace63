// What the host machine offers to the program: the C interface that src/cuda/host/abi.rs binds.
//
// Every function may be called from any thread. A launch runs to its end before it returns.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

struct SimtKernelInfo {
  const char* name;
  const char* file;
  const uint32_t* argument_bytes;
  uint32_t arguments;
  uint32_t max_threads;  // of a block, from its launch bounds
};

struct SimtLaunch {
  uint32_t grid[3], block[3], cluster[3];
  uint32_t dynamic_shared_bytes;
  uint32_t cooperative;
  uint32_t dependent;  // 1: each thread must wait for the previous kernel (grid_dependency_wait)
};

enum SimtOrder : uint32_t { SIMT_FIFO = 0, SIMT_LIFO = 1, SIMT_RANDOM = 2 };
enum SimtAsync : uint32_t { SIMT_LATE = 0, SIMT_EARLY = 1, SIMT_ANYTIME = 2 };

struct SimtOptions {
  uint64_t seed;         // of the random schedules
  uint32_t workers;      // OS threads that run blocks; 0: one per core
  uint32_t order;        // SimtOrder: which ready thread runs next
  uint32_t async;        // SimtAsync: when asynchronous copies happen
  uint32_t race;         // 1: the hooked kernels, every access checked
  uint32_t watchdog_ms;  // a thread that runs so long without a wrapper call is a fault; 0: 10 s
};

struct SimtFault;  // owned by the caller

// The i-th kernel of the build, or null after the last.
const SimtKernelInfo* simt_kernel(uint32_t index);

// The launch keeps the rules that both machines share (src/cuda/driver/launch.rs); `arguments[i]`
// points to the i-th argument's value, one for each parameter. 0: done; 1: `*fault` says what went
// wrong.
int simt_launch(const char* kernel, const SimtLaunch*, void* const* arguments, const SimtOptions*,
                SimtFault** fault);
// English, several lines; code addresses stand as "\x01<hex>\x02" for the caller to resolve.
const char* simt_fault_text(const SimtFault*);
void simt_fault_free(SimtFault*);

// Device memory: 256-byte aligned, exact bounds, filled with NaNs, a guard page after it. `label`
// names it in faults and is copied. Null: no memory.
void* simt_allocate(uint64_t bytes, const char* label);
// 0: done, 1: not the start of a buffer.
int simt_free(void* address);
// Writes the 128 bytes of a tensor map. All rules of cuTensorMapEncodeTiled hold
// (src/cuda/driver/tensor_map.rs has them); `data_type` is a CUtensorMapDataType, dimensions are
// innermost first, and there is one stride fewer. swizzle_bytes 0: none.
void simt_tensor_map(void* map, uint32_t data_type, uint32_t element_bytes, uint32_t rank,
                     void* address, const uint64_t* dimensions, const uint64_t* stride_bytes,
                     const uint32_t* box, uint32_t swizzle_bytes, uint32_t nan_fill);

// Fiber switches so far, for the benches.
uint64_t simt_switches(void);
}
