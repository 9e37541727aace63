// The CUDA language on a GPU: nvcc has it built in, so only what host/language.h must spell as a
// macro stands here. The names CUDA itself provides (shuffles, votes, __syncthreads, atomics,
// __ldg, mathematics) are CUDA's own. Included by kernel files through isobath.cuh.
#pragma once

#define DEVICE static __device__ __forceinline__
// The numbers after the name are those of __launch_bounds__.
#define KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name
#define EXPORT_KERNEL(name)
// The places of calls, which the host machine names in its reports.
#define SIMT_SITE
#define SIMT_AND_SITE
#define SIMT_HERE
#define SIMT_AND_HERE
// SHARED(float, rows, 32): `rows` is a float[32] in static shared memory.
#define SHARED(T, name, n) __shared__ T name[n]
// `name` is a uint8_t*, aligned to 1024 bytes; every such name of a kernel is the same address.
#define SHARED_DYNAMIC(name) uint8_t* const name = ptx::dynamic_shared
namespace ptx {
extern __shared__ __align__(1024) uint8_t dynamic_shared[];
}

// Device functions exist from one architecture on. nvcc's host pass, which has no architecture,
// reads every kernel too and must know all names; on a GPU that lacks the instruction the wrapper
// is not declared, and its use an error that names it.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DEVICE_HAS_SM90 1
#else
#define DEVICE_HAS_SM90 0
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DEVICE_HAS_SM90A 1
#else
#define DEVICE_HAS_SM90A 0
#endif
