// Small wrong kernels, one for each rule of the machine, and right uses of each mechanism.
//
// Contract: tests/cuda/faults.rs launches each kernel alone and says what the machine must find.
// The comments `here` and `there` mark the two lines that a fault has to name. Every kernel takes
// the same arguments: a map of a float matrix [64,32] with boxes of 8 rows, a buffer, and a number
// that the compiler does not know.
#include "isobath.cuh"

#define TEST_KERNEL(name)                                                                     \
  KERNEL(name, 1024)                                                                          \
  ([[maybe_unused]] const __grid_constant__ TensorMap map, [[maybe_unused]] uint32_t* global, \
   [[maybe_unused]] int n)

// ---------------------------------------------------------------- races
TEST_KERNEL(shared_race) {
  SHARED(uint32_t, words, 64);
  const int i = int(threadIdx.x);
  words[i] = 0;
  __syncthreads();
  words[i] = 1;               // here
  global[i] = words[i ^ 32];  // there
}
EXPORT_KERNEL(shared_race)

TEST_KERNEL(lockstep) {
  SHARED(uint32_t, words, 32);
  const int i = int(threadIdx.x);
  words[i] = 0;
  __syncwarp();
  words[i] = 1;              // here
  global[i] = words[i ^ 1];  // there
}
EXPORT_KERNEL(lockstep)

// A shuffle orders nothing but the values that it passes.
TEST_KERNEL(shuffle_is_no_barrier) {
  SHARED(uint32_t, words, 32);
  const int i = int(threadIdx.x);
  words[i] = 0;
  __syncwarp();
  words[i] = 1;  // there
  const uint32_t passed = __shfl_xor_sync(0xffffffffu, uint32_t(i), 1);
  global[i] = words[i ^ 1] + passed;  // here
}
EXPORT_KERNEL(shuffle_is_no_barrier)

TEST_KERNEL(global_race) {
  global[threadIdx.x / 2] = threadIdx.x;  // here
}
EXPORT_KERNEL(global_race)

TEST_KERNEL(blocks_race) {
  if (threadIdx.x == 0) global[0] = blockIdx.x;  // here
}
EXPORT_KERNEL(blocks_race)

// One block writes what another reads: the flag is set too early.
TEST_KERNEL(flag_before_value) {
  if (blockIdx.x == 0) {
    store_release(&global[0], 1);
    global[1] = 7;  // here
  } else {
    while (load_acquire(&global[0]) == 0) {
    }
    global[2] = global[1];  // there
  }
}
EXPORT_KERNEL(flag_before_value)

// An atomic without a fence publishes nothing.
TEST_KERNEL(atomic_without_fence) {
  if (blockIdx.x == 0) {
    global[1] = 7;  // there
    atomicExch(&global[0], 1);
  } else {
    while (load_acquire(&global[0]) == 0) {
    }
    global[2] = global[1];  // here
  }
}
EXPORT_KERNEL(atomic_without_fence)

TEST_KERNEL(atomic_and_plain) {
  if (threadIdx.x == 0) atomicAdd(&global[0], 1u);  // there
  if (threadIdx.x == 1) global[0] = 5;              // here
}
EXPORT_KERNEL(atomic_and_plain)

// Both orders are a sum, but not of the same bits.
TEST_KERNEL(sums_in_no_order) {
  reduce_add_f32x2(reinterpret_cast<float*>(global), 1, 2);  // here
}
EXPORT_KERNEL(sums_in_no_order)

TEST_KERNEL(shared_uninitialised) {
  SHARED(uint32_t, words, 32);
  if (threadIdx.x == 0) words[0] = 0;
  __syncthreads();
  global[threadIdx.x] = words[threadIdx.x];  // here
}
EXPORT_KERNEL(shared_uninitialised)

TEST_KERNEL(dynamic_uninitialised) {
  SHARED_DYNAMIC(bytes);
  global[threadIdx.x] = bytes[threadIdx.x];  // here
}
EXPORT_KERNEL(dynamic_uninitialised)

// ---------------------------------------------------------------- addresses
TEST_KERNEL(global_write) {
  reinterpret_cast<uint8_t*>(global)[n] = 1;  // here
}
EXPORT_KERNEL(global_write)

TEST_KERNEL(global_read) {
  global[0] = reinterpret_cast<uint8_t*>(global)[n];  // here
}
EXPORT_KERNEL(global_read)

TEST_KERNEL(global_misaligned) {
  *reinterpret_cast<uint32_t*>(reinterpret_cast<uint8_t*>(global) + n) = 1;  // here
}
EXPORT_KERNEL(global_misaligned)

TEST_KERNEL(global_misaligned_vector) {
  const uint4 values = *reinterpret_cast<const uint4*>(global + n);  // here
  global[8] = values.x + values.y + values.z + values.w;
}
EXPORT_KERNEL(global_misaligned_vector)

TEST_KERNEL(global_misaligned_vector_write) {
  const uint32_t one = uint32_t(n);
  *reinterpret_cast<uint4*>(global + n) = make_uint4(one, one, one, one);  // here
}
EXPORT_KERNEL(global_misaligned_vector_write)

TEST_KERNEL(shared_misaligned) {
  SHARED_DYNAMIC(bytes);
  *reinterpret_cast<uint32_t*>(bytes + n) = 1;  // here
}
EXPORT_KERNEL(shared_misaligned)

TEST_KERNEL(shared_misaligned_vector) {
  SHARED_DYNAMIC(bytes);
  *reinterpret_cast<float4*>(bytes + n) = make_float4(1, 2, 3, float(n));  // here
}
EXPORT_KERNEL(shared_misaligned_vector)

TEST_KERNEL(reduction_misaligned) {
  reduce_add_f32x2(reinterpret_cast<float*>(global) + n, 1, 2);  // here
}
EXPORT_KERNEL(reduction_misaligned)

TEST_KERNEL(reduction_of_shared_memory) {
  SHARED_DYNAMIC(bytes);
  reduce_add_f32x2(reinterpret_cast<float*>(bytes), 1, 2);  // here
}
EXPORT_KERNEL(reduction_of_shared_memory)

TEST_KERNEL(null_argument) {
  global[n] = 1;  // here
}
EXPORT_KERNEL(null_argument)

// The compiler sees the null pointer and puts a trap in its place.
TEST_KERNEL(null_constant) {
  uint32_t* to = global;
  if (n == 0) to = nullptr;
  *to = 1;  // here
}
EXPORT_KERNEL(null_constant)

TEST_KERNEL(shared_bounds) {
  SHARED_DYNAMIC(bytes);
  bytes[n] = 1;  // here
}
EXPORT_KERNEL(shared_bounds)

TEST_KERNEL(static_shared_bounds) {
  SHARED(uint8_t, bytes, 64);
  bytes[n] = 1;  // here
}
EXPORT_KERNEL(static_shared_bounds)

TEST_KERNEL(too_much_shared) {
  SHARED(uint8_t, bytes, 200000);  // here
  SHARED_DYNAMIC(more);
  bytes[0] = more[0] = 1;
}
EXPORT_KERNEL(too_much_shared)

// ---------------------------------------------------------------- collectives
TEST_KERNEL(divergent_calls) {
  if (threadIdx.x < 16)
    __syncwarp();  // there
  else
    global[threadIdx.x] = __shfl_sync(0xffffffffu, threadIdx.x, 0);  // here
}
EXPORT_KERNEL(divergent_calls)

TEST_KERNEL(not_in_mask) {
  __syncwarp(0x0000ffffu);  // here
}
EXPORT_KERNEL(not_in_mask)

TEST_KERNEL(lane_is_missing) {
  if (threadIdx.x != 7)
    __syncwarp();  // here
  else
    barrier_sync(1, 64);  // there
}
EXPORT_KERNEL(lane_is_missing)

TEST_KERNEL(skipped_barrier) {
  if (threadIdx.x != 5)
    __syncthreads();  // here
  else
    __syncwarp();  // there
}
EXPORT_KERNEL(skipped_barrier)

TEST_KERNEL(barrier_counts) {
  if (threadIdx.x < 32)
    barrier_sync(1, 64);
  else
    barrier_sync(1, 96);  // here
}
EXPORT_KERNEL(barrier_counts)

TEST_KERNEL(barrier_id) {
  barrier_sync(16, 32);  // here
}
EXPORT_KERNEL(barrier_id)

TEST_KERNEL(barrier_of_part_of_a_warp) {
  barrier_sync(1, 40);  // here
}
EXPORT_KERNEL(barrier_of_part_of_a_warp)

TEST_KERNEL(barrier_half_full) {
  barrier_arrive(1, 64);  // here
}
EXPORT_KERNEL(barrier_half_full)

// Lane 3 takes another of the barriers than the rest of its warp.
TEST_KERNEL(divergent_barrier) {
  if (threadIdx.x == 3)
    barrier_sync(1, 64);  // there
  else
    barrier_sync(1, 64);  // here
}
EXPORT_KERNEL(divergent_barrier)

TEST_KERNEL(divergent_arrival) {
  if (threadIdx.x < 32) {
    if (threadIdx.x == 3) barrier_arrive(2, 64);  // there
    barrier_arrive(1, 64);                        // here
  } else {
    barrier_sync(1, 64);
  }
}
EXPORT_KERNEL(divergent_arrival)

TEST_KERNEL(divergent_syncthreads) {
  if (threadIdx.x == 3) __syncthreads();  // there
  __syncthreads();                        // here
}
EXPORT_KERNEL(divergent_syncthreads)

TEST_KERNEL(divergent_cluster_arrival) {
  if (threadIdx.x == 3)
    cluster_arrive();  // there
  else
    cluster_arrive();  // here
  cluster_wait();
}
EXPORT_KERNEL(divergent_cluster_arrival)

TEST_KERNEL(divergent_cluster_wait) {
  cluster_arrive();
  if (threadIdx.x == 3)
    cluster_wait();  // there
  else
    cluster_wait();  // here
}
EXPORT_KERNEL(divergent_cluster_wait)

// A barrier of two warps, one of which has ended.
TEST_KERNEL(barrier_of_a_warp_that_exited) {
  if (threadIdx.x < 32) return;
  barrier_sync(1, 64);  // here
}
EXPORT_KERNEL(barrier_of_a_warp_that_exited)

TEST_KERNEL(shuffle_from_an_exited_lane) {
  if (threadIdx.x >= 24) return;
  global[threadIdx.x] = __shfl_xor_sync(0xffffffffu, threadIdx.x, 8);  // here
}
EXPORT_KERNEL(shuffle_from_an_exited_lane)

TEST_KERNEL(mma_without_a_lane) {
  if (threadIdx.x == 31) return;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  mma_m16n8k16(d, a, b);  // here
  global[threadIdx.x] = __float_as_uint(d[0]);
}
EXPORT_KERNEL(mma_without_a_lane)

// ---------------------------------------------------------------- mbarriers
DEVICE void start(uint64_t* barrier, uint32_t count) {
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, count);
    fence_mbarrier_init();
  }
  __syncthreads();
}

TEST_KERNEL(arrival_is_missing) {
  SHARED(uint64_t, barrier, 1);
  start(barrier, 2);
  if (threadIdx.x == 0) mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);  // here
}
EXPORT_KERNEL(arrival_is_missing)

TEST_KERNEL(too_many_arrivals) {
  SHARED(uint64_t, barrier, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, 16);
    mbarrier_arrive(barrier);  // here
  }
}
EXPORT_KERNEL(too_many_arrivals)

TEST_KERNEL(mbarrier_uninitialised) {
  SHARED(uint64_t, barrier, 1);
  mbarrier_arrive(barrier);  // here
}
EXPORT_KERNEL(mbarrier_uninitialised)

TEST_KERNEL(mbarrier_overwritten) {
  SHARED(uint64_t, barrier, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) barrier[0] = 0;  // there
  __syncthreads();
  if (threadIdx.x == 0) mbarrier_arrive(barrier);  // here
}
EXPORT_KERNEL(mbarrier_overwritten)

TEST_KERNEL(mbarrier_initialised_twice) {
  SHARED(uint64_t, barrier, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);  // here
}
EXPORT_KERNEL(mbarrier_initialised_twice)

TEST_KERNEL(mbarrier_count_zero) {
  SHARED(uint64_t, barrier, 1);
  if (threadIdx.x == 0) mbarrier_init(barrier, 0);  // here
}
EXPORT_KERNEL(mbarrier_count_zero)

TEST_KERNEL(mbarrier_init_not_fenced) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint4, tile, 1);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_arrive_expect_tx(barrier, 16);
    bulk_load(tile, global, 16, barrier);  // here
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
}
EXPORT_KERNEL(mbarrier_init_not_fenced)

TEST_KERNEL(mbarrier_init_not_ordered) {
  SHARED(uint64_t, barrier, 1);
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);  // there
  if (threadIdx.x == 32) mbarrier_arrive(barrier);  // here
}
EXPORT_KERNEL(mbarrier_init_not_ordered)

TEST_KERNEL(mbarrier_read) {
  SHARED(uint64_t, barrier, 2);
  start(barrier, 1);
  global[0] = reinterpret_cast<const uint32_t*>(barrier)[1];  // here
}
EXPORT_KERNEL(mbarrier_read)

TEST_KERNEL(mbarrier_invalidated_early) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint4, tile, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, 16);
    bulk_load(tile, global, 16, barrier);  // there
  }
  __syncwarp();
  if (threadIdx.x == 0) mbarrier_invalidate(barrier);  // here
}
EXPORT_KERNEL(mbarrier_invalidated_early)

// Expects n bytes of a copy of 16.
TEST_KERNEL(wrong_bytes) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint4, tile, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, uint32_t(n));
    bulk_load(tile, global, 16, barrier);
  }
  mbarrier_wait(barrier, 0);  // here
}
EXPORT_KERNEL(wrong_bytes)

// Nobody waits, and no copy comes.
TEST_KERNEL(bytes_never_come) {
  SHARED(uint64_t, barrier, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) mbarrier_expect_tx(barrier, 16);  // here
}
EXPORT_KERNEL(bytes_never_come)

// ---------------------------------------------------------------- proxies
TEST_KERNEL(store_not_fenced) {
  SHARED(uint32_t, tile, 4);
  if (threadIdx.x < 4) tile[threadIdx.x] = threadIdx.x;  // there
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(global, tile, 16);  // here
    bulk_commit();
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(store_not_fenced)

TEST_KERNEL(tensor_store_not_fenced) {
  SHARED_DYNAMIC(tile);
  for (int i = int(threadIdx.x); i < 256; i += int(blockDim.x))
    reinterpret_cast<float*>(tile)[i] = float(i);  // there
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_2d(&map, tile, 0, 8);  // here
    bulk_commit();
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(tensor_store_not_fenced)

// fence_mbarrier_init makes mbarriers visible and nothing else.
TEST_KERNEL(store_after_the_wrong_fence) {
  SHARED(uint32_t, tile, 4);
  if (threadIdx.x < 4) tile[threadIdx.x] = threadIdx.x;  // there
  fence_mbarrier_init();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(global, tile, 16);  // here
    bulk_commit();
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(store_after_the_wrong_fence)

// The fence comes before the write.
TEST_KERNEL(store_fenced_too_early) {
  SHARED(uint32_t, tile, 4);
  fence_proxy_async();
  if (threadIdx.x < 4) tile[threadIdx.x] = threadIdx.x;  // there
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(global, tile, 16);  // here
    bulk_commit();
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(store_fenced_too_early)

TEST_KERNEL(load_of_ordinary_writes) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint4, tile, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) {
    global[2] = 3;  // there
    mbarrier_arrive_expect_tx(barrier, 16);
    bulk_load(tile, global, 16, barrier);  // here
  }
  mbarrier_wait(barrier, 0);
}
EXPORT_KERNEL(load_of_ordinary_writes)

// ---------------------------------------------------------------- dependent launches
TEST_KERNEL(dependent_read) {
  const uint32_t word = global[threadIdx.x];  // here
  begin_after_previous();
  global[threadIdx.x] = word + 1;
}
EXPORT_KERNEL(dependent_read)

TEST_KERNEL(dependent_write) {
  if (threadIdx.x == 3) global[0] = 1;  // here
  grid_dependency_wait();
}
EXPORT_KERNEL(dependent_write)

// One thread has waited, before a barrier: the others have not.
TEST_KERNEL(dependent_on_another_thread) {
  if (threadIdx.x == 0) begin_after_previous();
  __syncthreads();
  global[threadIdx.x] = 1;  // here
}
EXPORT_KERNEL(dependent_on_another_thread)

TEST_KERNEL(dependent_atomic) {
  atomicAdd(&global[0], 1u);  // here
  begin_after_previous();
}
EXPORT_KERNEL(dependent_atomic)

TEST_KERNEL(dependent_reduction) {
  reduce_add_f32x2(reinterpret_cast<float*>(global), 1, 2);  // here
  begin_after_previous();
}
EXPORT_KERNEL(dependent_reduction)

TEST_KERNEL(dependent_flag) {
  while (load_acquire(&global[0]) != 0) __nanosleep(32);  // here
  begin_after_previous();
}
EXPORT_KERNEL(dependent_flag)

TEST_KERNEL(dependent_cp_async) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[threadIdx.x], global + threadIdx.x * 4);  // here
  cp_async_commit();
  cp_async_wait<0>();
  begin_after_previous();
}
EXPORT_KERNEL(dependent_cp_async)

TEST_KERNEL(dependent_tma) {
  SHARED_DYNAMIC(tile);
  SHARED(uint64_t, barrier, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, 1024);
    tma_load_2d(tile, &map, barrier, 0, 0);  // here
  }
  begin_after_previous();
  mbarrier_wait(barrier, 0);
}
EXPORT_KERNEL(dependent_tma)

TEST_KERNEL(dependent_bulk) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint4, tile, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, 16);
    bulk_load(tile, global, 16, barrier);  // here
  }
  begin_after_previous();
  mbarrier_wait(barrier, 0);
}
EXPORT_KERNEL(dependent_bulk)

TEST_KERNEL(dependent_exit) {
  if (threadIdx.x == 5) return;
  begin_after_previous();
  global[threadIdx.x] = 1;
}
EXPORT_KERNEL(dependent_exit)

// Sets itself up, and even uses what it set up, before it waits.
TEST_KERNEL(right_dependent) {
  SHARED_DYNAMIC(tile);
  SHARED(uint64_t, barrier, 1);
  SHARED(uint32_t, words, 32);
  if (threadIdx.x == 0) tma_prefetch(&map);
  words[threadIdx.x] = threadIdx.x;
  if (threadIdx.x == 0) atomicAdd(&words[0], 1u);
  start(barrier, 1);
  begin_after_previous();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, 1024);
    tma_load_2d(tile, &map, barrier, 0, 0);
  }
  mbarrier_wait(barrier, 0);
  global[threadIdx.x] += words[31 - threadIdx.x] + tile[threadIdx.x];
}
EXPORT_KERNEL(right_dependent)

// ---------------------------------------------------------------- cp.async
TEST_KERNEL(cp_async_read_early) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[threadIdx.x], global + threadIdx.x * 4);  // there
  cp_async_commit();
  global[512 + threadIdx.x] = tile[threadIdx.x].y;  // here
  cp_async_wait<0>();
}
EXPORT_KERNEL(cp_async_read_early)

// The wait is for what was committed.
TEST_KERNEL(cp_async_not_committed) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[threadIdx.x], global + threadIdx.x * 4);  // there
  cp_async_wait<0>();
  global[512 + threadIdx.x] = tile[threadIdx.x].y;  // here
  cp_async_commit();
  cp_async_wait<0>();
}
EXPORT_KERNEL(cp_async_not_committed)

TEST_KERNEL(cp_async_of_another_thread) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[threadIdx.x], global + threadIdx.x * 4);  // here
  cp_async_commit();
  cp_async_wait<0>();
  __shfl_sync(0xffffffffu, threadIdx.x, 0);
  global[512 + threadIdx.x] = tile[threadIdx.x ^ 1].y;  // there
}
EXPORT_KERNEL(cp_async_of_another_thread)

TEST_KERNEL(cp_async_at_exit) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[threadIdx.x], global + threadIdx.x * 4);  // here
  cp_async_commit();
}
EXPORT_KERNEL(cp_async_at_exit)

TEST_KERNEL(cp_async_misaligned) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[0], global + n);  // here
  cp_async_commit();
  cp_async_wait<0>();
}
EXPORT_KERNEL(cp_async_misaligned)

TEST_KERNEL(cp_async_out_of_bounds) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[0], global + n);  // here
  cp_async_commit();
  cp_async_wait<0>();
}
EXPORT_KERNEL(cp_async_out_of_bounds)

// ---------------------------------------------------------------- bulk copies
DEVICE void fill(uint32_t* tile) {
  if (threadIdx.x < 4) tile[threadIdx.x] = threadIdx.x;
  fence_proxy_async();
  __syncthreads();
}

TEST_KERNEL(store_source_overwritten) {
  SHARED(uint32_t, tile, 4);
  fill(tile);
  if (threadIdx.x == 0) {
    bulk_store(global, tile, 16);  // here
    bulk_commit();
    tile[0] = 5;  // there
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(store_source_overwritten)

TEST_KERNEL(store_result_read_early) {
  SHARED(uint32_t, tile, 4);
  fill(tile);
  if (threadIdx.x == 0) {
    bulk_store(global, tile, 16);  // there
    bulk_commit();
    bulk_wait_read<0>();
  }
  __syncthreads();
  if (threadIdx.x == 32) global[8] = global[1];  // here
  if (threadIdx.x == 0) bulk_wait<0>();
}
EXPORT_KERNEL(store_result_read_early)

TEST_KERNEL(store_not_committed) {
  SHARED(uint32_t, tile, 4);
  fill(tile);
  if (threadIdx.x == 0) {
    bulk_store(global, tile, 16);  // here
    bulk_wait<0>();
    tile[0] = 5;  // there
    bulk_commit();
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(store_not_committed)

// The block's shared memory is gone before it has been read.
TEST_KERNEL(store_at_exit) {
  SHARED(uint32_t, tile, 4);
  fill(tile);
  if (threadIdx.x == 0) {
    bulk_store(global, tile, 16);  // here
    bulk_commit();
  }
}
EXPORT_KERNEL(store_at_exit)

TEST_KERNEL(load_at_exit) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint4, tile, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, 16);
    bulk_load(tile, global, 16, barrier);  // here
  }
}
EXPORT_KERNEL(load_at_exit)

TEST_KERNEL(load_read_early) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint32_t, tile, 4);
  if (threadIdx.x < 4) tile[threadIdx.x] = 0;
  fence_proxy_async();
  start(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, 16);
    bulk_load(tile, global, 16, barrier);  // here
  }
  if (threadIdx.x < 4) global[8 + threadIdx.x] = tile[threadIdx.x];  // there
  mbarrier_wait(barrier, 0);
}
EXPORT_KERNEL(load_read_early)

TEST_KERNEL(bulk_bytes) {
  SHARED(uint32_t, tile, 4);
  fill(tile);
  if (threadIdx.x == 0) bulk_store(global, tile, uint32_t(n));  // here
}
EXPORT_KERNEL(bulk_bytes)

TEST_KERNEL(bulk_out_of_bounds) {
  SHARED(uint32_t, tile, 4);
  fill(tile);
  if (threadIdx.x == 0) bulk_store(global + n, tile, 16);  // here
}
EXPORT_KERNEL(bulk_out_of_bounds)

TEST_KERNEL(tensor_tile_misaligned) {
  SHARED_DYNAMIC(tile);
  SHARED(uint64_t, barrier, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) tma_load_2d(tile + n, &map, barrier, 0, 0);  // here
}
EXPORT_KERNEL(tensor_tile_misaligned)

TEST_KERNEL(tensor_rank) {
  SHARED_DYNAMIC(tile);
  SHARED(uint64_t, barrier, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) tma_load_3d(tile, &map, barrier, 0, 0, 0);  // here
}
EXPORT_KERNEL(tensor_rank)

// Of a tensor whose buffer the host has released.
TEST_KERNEL(tensor_load) {
  SHARED_DYNAMIC(tile);
  SHARED(uint64_t, barrier, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, 1024);
    tma_load_2d(tile, &map, barrier, 0, 0);  // here
  }
  mbarrier_wait(barrier, 0);
}
EXPORT_KERNEL(tensor_load)

// ---------------------------------------------------------------- wgmma
// A [64,16] and B [8,16] of bf16, both K-major without a swizzle, in 2304 bytes: core matrices of
// 8 rows by 8 k, 128 bytes each.
DEVICE uint64_t operand_a(const uint8_t* tile) {
  return matrix_descriptor(tile, 128, 256, DESCRIPTOR_SWIZZLE_NONE);
}
DEVICE uint64_t operand_b(const uint8_t* tile) {
  return matrix_descriptor(tile + 2048, 128, 256, DESCRIPTOR_SWIZZLE_NONE);
}
DEVICE void fill_operands(uint8_t* tile) {
  for (int i = int(threadIdx.x); i < 576; i += int(blockDim.x))
    reinterpret_cast<uint32_t*>(tile)[i] = pack_bf16(1, 2);
  fence_proxy_async();
  __syncthreads();
}
DEVICE void put(uint32_t* global, const float (&d)[4]) {
  for (int i = 0; i < 4; ++i) global[threadIdx.x * 4 + i] = __float_as_uint(d[i]);
}

TEST_KERNEL(wgmma_not_fenced) {
  SHARED_DYNAMIC(tile);
  for (int i = int(threadIdx.x); i < 576; i += int(blockDim.x))
    reinterpret_cast<uint32_t*>(tile)[i] = pack_bf16(1, 2);  // there
  __syncthreads();
  float d[4];
  wgmma_fence();
  wgmma<8>(d, operand_a(tile), operand_b(tile), 0);  // here
  wgmma_commit();
  wgmma_wait<0>();
  put(global, d);
}
EXPORT_KERNEL(wgmma_not_fenced)

TEST_KERNEL(wgmma_without_wgmma_fence) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  wgmma<8>(d, operand_a(tile), operand_b(tile), 0);  // here
  wgmma_commit();
  wgmma_wait<0>();
  put(global, d);
}
EXPORT_KERNEL(wgmma_without_wgmma_fence)

TEST_KERNEL(wgmma_read_early) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  wgmma_fence();
  wgmma<8>(d, operand_a(tile), operand_b(tile), 0);  // there
  wgmma_commit();
  global[threadIdx.x] = __float_as_uint(d[1]);  // here
  wgmma_wait<0>();
  put(global, d);
}
EXPORT_KERNEL(wgmma_read_early)

TEST_KERNEL(wgmma_not_committed) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  wgmma_fence();
  wgmma<8>(d, operand_a(tile), operand_b(tile), 0);  // there
  wgmma_wait<0>();
  global[threadIdx.x] = __float_as_uint(d[1]);  // here
}
EXPORT_KERNEL(wgmma_not_committed)

TEST_KERNEL(wgmma_operand_overwritten) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  uint32_t a[4] = {1, 2, 3, uint32_t(n)};
  wgmma_fence();
  wgmma<8>(d, a, operand_b(tile), 0);  // there
  wgmma_commit();
  a[2] = threadIdx.x;  // here
  wgmma_wait<0>();
  wgmma_fence();
  wgmma<8>(d, a, operand_b(tile), 1);
  wgmma_commit();
  wgmma_wait<0>();
  put(global, d);
}
EXPORT_KERNEL(wgmma_operand_overwritten)

TEST_KERNEL(wgmma_at_exit) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  wgmma_fence();
  wgmma<8>(d, operand_a(tile), operand_b(tile), 0);  // here
  wgmma_commit();
}
EXPORT_KERNEL(wgmma_at_exit)

TEST_KERNEL(descriptors_diverge) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  wgmma_fence();
  wgmma<8>(d, operand_a(tile) + threadIdx.x / 64, operand_b(tile), 0);  // here
  wgmma_commit();
  wgmma_wait<0>();
  put(global, d);
}
EXPORT_KERNEL(descriptors_diverge)

TEST_KERNEL(warp_skips_a_wgmma) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  wgmma_fence();
  wgmma<8>(d, operand_a(tile), operand_b(tile), 0);
  if (threadIdx.x / 32 != 2) wgmma<8>(d, operand_a(tile), operand_b(tile), 1);
  wgmma_commit();
  wgmma_wait<0>();  // here
  put(global, d);
}
EXPORT_KERNEL(warp_skips_a_wgmma)

TEST_KERNEL(wgmma_out_of_bounds) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  wgmma_fence();
  wgmma<8>(d, operand_a(tile), operand_b(tile + n), 0);  // here
  wgmma_commit();
  wgmma_wait<0>();
  put(global, d);
}
EXPORT_KERNEL(wgmma_out_of_bounds)

TEST_KERNEL(half_a_warpgroup) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  wgmma_fence();
  wgmma<8>(d, operand_a(tile), operand_b(tile), 0);  // here
  wgmma_commit();
  wgmma_wait<0>();
}
EXPORT_KERNEL(half_a_warpgroup)

TEST_KERNEL(wgmma_accumulators_written) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  wgmma_fence();
  for (int i = 0; i < 4; ++i) d[i] = float(n);       // there
  wgmma<8>(d, operand_a(tile), operand_b(tile), 1);  // here
  wgmma_commit();
  wgmma_wait<0>();
  put(global, d);
}
EXPORT_KERNEL(wgmma_accumulators_written)

TEST_KERNEL(wgmma_accumulators_read) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  wgmma_fence();
  wgmma<8>(d, operand_a(tile), operand_b(tile), 0);
  wgmma_commit();
  wgmma_wait<0>();
  global[threadIdx.x] = __float_as_uint(d[2]);       // there
  wgmma<8>(d, operand_a(tile), operand_b(tile), 1);  // here
  wgmma_commit();
  wgmma_wait<0>();
  put(global, d);
}
EXPORT_KERNEL(wgmma_accumulators_read)

TEST_KERNEL(wgmma_operand_written) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  uint32_t a[4] = {1, 2, 3, 4};
  wgmma_fence();
  a[1] = uint32_t(n);                  // there
  wgmma<8>(d, a, operand_b(tile), 0);  // here
  wgmma_commit();
  wgmma_wait<0>();
  put(global, d);
}
EXPORT_KERNEL(wgmma_operand_written)

TEST_KERNEL(wgmma_of_another_shape) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[8];
  wgmma_fence();
  wgmma<8>(reinterpret_cast<float(&)[4]>(d), operand_a(tile), operand_b(tile), 0);  // there
  wgmma<16>(d, operand_a(tile), operand_b(tile), 0);                                // here
  wgmma_commit();
  wgmma_wait<0>();
  global[threadIdx.x] = __float_as_uint(d[0]);
}
EXPORT_KERNEL(wgmma_of_another_shape)

// Threads 0 to 127 multiply what thread 128 loads, twice into the same stage.
DEVICE void load_twice(uint8_t* tile, uint64_t* full, uint64_t* empty, const uint32_t* global) {
  for (uint32_t round = 0; round < 2; ++round) {
    mbarrier_wait(empty, round ^ 1);
    mbarrier_arrive_expect_tx(full, 2304);
    bulk_load(tile, global, 2304, full);
  }
}
DEVICE void multiply_once(float (&d)[4], const uint8_t* tile, uint64_t* full, uint32_t round) {
  mbarrier_wait(full, round);
  wgmma_fence();
  wgmma<8>(d, operand_a(tile), operand_b(tile), int(round));
  wgmma_commit();
}
DEVICE void start_ring(uint64_t* full, uint64_t* empty, uint32_t arrivals) {
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, arrivals);
    fence_mbarrier_init();
  }
  __syncthreads();
}

TEST_KERNEL(stage_released_early) {
  SHARED_DYNAMIC(tile);
  SHARED(uint64_t, full, 1);
  SHARED(uint64_t, empty, 1);
  start_ring(full, empty, 4);
  if (threadIdx.x == 128) load_twice(tile, full, empty, global);
  if (threadIdx.x >= 128) return;
  float d[4];
  for (uint32_t round = 0; round < 2; ++round) {
    multiply_once(d, tile, full, round);
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
    wgmma_wait<0>();
  }
  put(global + 1024, d);
}
EXPORT_KERNEL(stage_released_early)

// A warp knows of its own quarter of a wgmma only: one thread cannot speak for four warps.
TEST_KERNEL(stage_released_by_one_thread) {
  SHARED_DYNAMIC(tile);
  SHARED(uint64_t, full, 1);
  SHARED(uint64_t, empty, 1);
  start_ring(full, empty, 1);
  if (threadIdx.x == 128) load_twice(tile, full, empty, global);
  if (threadIdx.x >= 128) return;
  float d[4];
  for (uint32_t round = 0; round < 2; ++round) {
    multiply_once(d, tile, full, round);
    wgmma_wait<0>();
    if (threadIdx.x == 0) mbarrier_arrive(empty);
  }
  put(global + 1024, d);
}
EXPORT_KERNEL(stage_released_by_one_thread)

// 65536 registers: 384 threads begin with 168 each, and nobody gives any back.
TEST_KERNEL(registers_never_fit) {
  setmaxnreg_inc<232>();  // here
}
EXPORT_KERNEL(registers_never_fit)

TEST_KERNEL(registers_wrong_way) {
  setmaxnreg_dec<232>();  // here
}
EXPORT_KERNEL(registers_wrong_way)

// ---------------------------------------------------------------- clusters
TEST_KERNEL(block_has_exited) {
  SHARED(uint32_t, words, 32);
  words[threadIdx.x] = threadIdx.x;
  cluster_sync();
  if (cluster_rank() == 0) global[threadIdx.x] = cluster_map(words, 1)[threadIdx.x];  // here
}
EXPORT_KERNEL(block_has_exited)

TEST_KERNEL(peer_not_ordered) {
  SHARED(uint32_t, words, 32);
  words[threadIdx.x] = 0;
  cluster_sync();
  words[threadIdx.x] = threadIdx.x;  // here
  global[cluster_rank() * 32 + threadIdx.x] =
      cluster_map(words, cluster_rank() ^ 1)[threadIdx.x];  // there
  cluster_sync();
}
EXPORT_KERNEL(peer_not_ordered)

TEST_KERNEL(relaxed_arrival) {
  SHARED(uint32_t, words, 32);
  words[threadIdx.x] = 0;
  cluster_sync();
  if (cluster_rank() == 0) words[threadIdx.x] = threadIdx.x;  // there
  cluster_arrive_relaxed();
  cluster_wait();
  if (cluster_rank() == 1) global[threadIdx.x] = cluster_map(words, 0)[threadIdx.x];  // here
  cluster_sync();
}
EXPORT_KERNEL(relaxed_arrival)

TEST_KERNEL(cluster_arrive_twice) {
  cluster_arrive();
  cluster_arrive();  // here
}
EXPORT_KERNEL(cluster_arrive_twice)

TEST_KERNEL(cluster_wait_alone) {
  cluster_wait();  // here
}
EXPORT_KERNEL(cluster_wait_alone)

TEST_KERNEL(cluster_never_waits) {
  cluster_arrive();  // here
}
EXPORT_KERNEL(cluster_never_waits)

TEST_KERNEL(rank_is_not_in_the_cluster) {
  SHARED(uint32_t, words, 32);
  global[0] = *cluster_map(words, 2);  // here
}
EXPORT_KERNEL(rank_is_not_in_the_cluster)

TEST_KERNEL(multicast_mask) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint4, tile, 1);
  start(barrier, 1);
  if (threadIdx.x == 0) bulk_load_multicast(tile, global, 16, barrier, uint16_t(n));  // here
}
EXPORT_KERNEL(multicast_mask)

// What takes addresses of the own block only, with those of a peer.
TEST_KERNEL(peer_address) {
  SHARED_DYNAMIC(tile);
  SHARED(uint64_t, barrier, 1);
  uint8_t* const peer = cluster_map(tile, cluster_rank() ^ 1);
  uint64_t* const peer_barrier = cluster_map(barrier, cluster_rank() ^ 1);
  uint32_t registers[1] = {};
  start(barrier, 1);
  cluster_sync();
  if (n == 0) cp_async_16(peer, global);                            // cp.async
  if (n == 1) ldmatrix_x1(registers, peer + threadIdx.x % 8 * 16);  // ldmatrix
  if (n == 2) stmatrix_x1(peer + threadIdx.x % 8 * 16, registers);  // stmatrix
  if (n == 3) mbarrier_init(peer_barrier, 1);                       // mbarrier_init
  if (n == 4) mbarrier_invalidate(peer_barrier);                    // mbarrier_invalidate
  if (n == 5) mbarrier_arrive(peer_barrier);                        // mbarrier_arrive
  if (n == 6) mbarrier_arrive_expect_tx(peer_barrier, 16);          // mbarrier_arrive_expect_tx
  if (n == 7) mbarrier_expect_tx(peer_barrier, 16);                 // mbarrier_expect_tx
  if (n == 8) mbarrier_try_wait(peer_barrier, 0);                   // mbarrier_try_wait
  if (n == 9) mbarrier_wait(peer_barrier, 0);                       // mbarrier_wait
  if (n == 10) tma_load_2d(peer, &map, barrier, 0, 0);              // tma_load
  if (n == 11) tma_store_2d(&map, peer, 0, 0);                      // tma_store
  if (n == 12) tma_reduce_add_2d(&map, peer, 0, 0);                 // tma_reduce_add
  if (n == 13) bulk_load(tile, global, 16, peer_barrier);           // bulk_load
  if (n == 14) bulk_store(global, peer, 16);                        // bulk_store
  if (n == 15) bulk_copy_cluster(tile, peer, 16, barrier, 0);       // bulk_copy_cluster
  global[0] = registers[0];
  cluster_sync();
}
EXPORT_KERNEL(peer_address)

// Block 0 gives 16 bytes to block 1 and ends; only block 1 waits for them.
TEST_KERNEL(source_has_exited) {
  SHARED(uint32_t, tile, 4);
  SHARED(uint64_t, barrier, 1);
  fill(tile);
  start(barrier, 1);
  cluster_sync();
  if (cluster_rank() == 0) {
    if (threadIdx.x == 0) bulk_copy_cluster(tile, tile, 16, barrier, 1);  // here
  } else {
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(barrier, 16);
    mbarrier_wait_cluster(barrier, 0);
  }
}
EXPORT_KERNEL(source_has_exited)

// A fault inside one of isobath.cuh's own functions.
TEST_KERNEL(lines_of_sums) {
  if (threadIdx.x == 0) return;
  global[threadIdx.x] = __float_as_uint(n ? warp_sum(1.0f) : warp_max(1.0f));  // here
}
EXPORT_KERNEL(lines_of_sums)

TEST_KERNEL(line_of_a_cluster_barrier) {
  SHARED(uint64_t, barrier, 1);
  start(barrier, 1);
  if (cluster_rank() == 0)
    cluster_sync();  // here
  else
    mbarrier_wait(barrier, 0);
}
EXPORT_KERNEL(line_of_a_cluster_barrier)

TEST_KERNEL(many_threads) {
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&global[0], 1u);
}
EXPORT_KERNEL(many_threads)

// ---------------------------------------------------------------- time and arithmetic
TEST_KERNEL(endless_reads) {
  const volatile uint32_t* flag = global;
  while (*flag == 0) {  // here
  }
}
EXPORT_KERNEL(endless_reads)

TEST_KERNEL(endless_arithmetic) {
  uint32_t x = uint32_t(n);
  uint32_t steps = 0;
  while (x != 1) x = x * x + ++steps * 2;  // here
  global[0] = steps;
}
EXPORT_KERNEL(endless_arithmetic)

TEST_KERNEL(spin_on_a_flag) {
  while (load_acquire(global) == 0) continue;  // here
}
EXPORT_KERNEL(spin_on_a_flag)

TEST_KERNEL(spin_on_an_exchange) {
  while (atomicCAS(global, 1, 2) != 1) continue;  // here
}
EXPORT_KERNEL(spin_on_an_exchange)

TEST_KERNEL(spin_on_an_addition) {
  while (atomicAdd(global, 0u) == 0) continue;  // here
}
EXPORT_KERNEL(spin_on_an_addition)

TEST_KERNEL(spin_on_an_mbarrier) {
  SHARED(uint64_t, barrier, 1);
  start(barrier, 1);
  while (!mbarrier_try_wait(barrier, 0)) continue;  // here
}
EXPORT_KERNEL(spin_on_an_mbarrier)

TEST_KERNEL(division) {
  global[0] = uint32_t(int(threadIdx.x) / n);  // here
}
EXPORT_KERNEL(division)

// Not inlined: the recursion has to use the stack.
__attribute__((noinline)) static uint32_t deep(uint32_t depth, const uint32_t* global) {
  volatile uint32_t local[256];
  local[depth % 256] = depth;
  return depth == 0 ? local[0] : deep(depth - 1, global) + local[depth % 256] + *global;
}
TEST_KERNEL(stack_overflow) { global[1] = deep(1000000, global); }
EXPORT_KERNEL(stack_overflow)

TEST_KERNEL(trap) {
  if (blockIdx.x == 1 && threadIdx.x == 3) __trap();  // here
}
EXPORT_KERNEL(trap)

TEST_KERNEL(spin_on_a_maximum) {
  while (atomicMax(global, 0u) == 0) continue;  // here
}
EXPORT_KERNEL(spin_on_a_maximum)

// ---------------------------------------------------------------- right
// Threads, then a whole warp, then a whole block leave early; the others do not wait for them.
TEST_KERNEL(right_early_exit) {
  SHARED(uint32_t, words, 96);
  SHARED(uint32_t, sums, 40);
  const uint32_t i = threadIdx.x;
  if (i >= 72) return;
  words[i] = i;
  const uint32_t voted = __ballot_sync(0xffffffffu, i % 2 == 0);
  __syncwarp();
  const uint32_t together = words[i ^ 1] + voted % 256;
  __syncthreads();
  if (i >= 40) return;
  sums[i] = words[i] + words[i + 32];
  barrier_sync(1, 64);  // of two warps, the second with 8 threads left
  const uint32_t leader = elect_one();
  cluster_sync();
  if (cluster_rank() == 1) return;
  cluster_sync();
  global[64 + i] = sums[i ^ 1] + together + leader * 1000;
}
EXPORT_KERNEL(right_early_exit)

// Block 1 polls what block 0 will set, with everything that reads atomically.
TEST_KERNEL(right_polls) {
  if (blockIdx.x == 0) {
    for (uint32_t word = 0; word < 4; ++word) {
      for (uint32_t i = 0; i < 100; ++i) atomicAdd(&global[9], 1u);
      atomicExch(&global[word], 1);
    }
    return;
  }
  while (atomicAdd(&global[0], 0u) == 0) {
  }
  while (atomicMax(&global[1], 0u) == 0) {
  }
  while (atomicCAS(&global[2], 1, 2) != 1) {
  }
  while (atomicExch(&global[3], 3) == 3 || load_acquire(&global[2]) == 0) {
  }
  global[128] = atomicAdd(&global[9], 0u);
}
EXPORT_KERNEL(right_polls)

// Finds the same again and again, and is no poll.
TEST_KERNEL(right_repetition) {
  for (int i = 0; i < 100000; ++i) atomicMax(&global[0], 5u);
}
EXPORT_KERNEL(right_repetition)

// Block 0 gives a value to block 1, which waits for a flag.
TEST_KERNEL(right_flag) {
  if (blockIdx.x == 0) {
    global[64 + threadIdx.x] = threadIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) store_release(&global[0], 1);
  } else {
    if (threadIdx.x == 0)
      while (load_acquire(&global[0]) == 0) {
      }
    __syncthreads();
    global[128 + threadIdx.x] = global[64 + (threadIdx.x ^ 33)];
  }
}
EXPORT_KERNEL(right_flag)

// The last block to come adds up what all have left: the pattern of CUDA's threadFenceReduction.
TEST_KERNEL(right_last_block) {
  SHARED(uint32_t, last, 1);
  if (threadIdx.x == 0) {
    global[64 + blockIdx.x] = blockIdx.x + 1;
    __threadfence();
    last[0] = atomicAdd(&global[0], 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last[0] && threadIdx.x < gridDim.x)
    global[128 + threadIdx.x] = global[64 + (threadIdx.x + 1) % gridDim.x];
}
EXPORT_KERNEL(right_last_block)

TEST_KERNEL(right_syncwarp) {
  SHARED(uint32_t, words, 64);
  const int i = int(threadIdx.x);
  for (uint32_t round = 0; round < 3; ++round) {
    words[i] = round * 64 + uint32_t(i);
    __syncwarp();
    global[round * 64 + uint32_t(i)] = words[i ^ 5];
    __syncwarp();
  }
}
EXPORT_KERNEL(right_syncwarp)

// Warps 0 and 1 fill what warps 2 and 3 read: one barrier says full, another one empty.
TEST_KERNEL(right_named_barriers) {
  constexpr int FULL = 1, EMPTY = 2;
  SHARED(uint32_t, words, 64);
  const uint32_t i = threadIdx.x % 64;
  for (uint32_t round = 0; round < 3; ++round) {
    if (threadIdx.x < 64) {
      if (round > 0) barrier_sync(EMPTY, 128);
      words[i] = round * 64 + i;
      barrier_arrive(FULL, 128);
    } else {
      barrier_sync(FULL, 128);
      global[round * 64 + i] = words[i ^ 40];
      if (round < 2) barrier_arrive(EMPTY, 128);
    }
  }
}
EXPORT_KERNEL(right_named_barriers)

TEST_KERNEL(right_cluster) {
  SHARED(uint32_t, words, 32);
  const uint32_t rank = cluster_rank(), peer = (rank + 1) % cluster_size();
  words[threadIdx.x] = blockIdx.x * 32 + threadIdx.x;
  cluster_sync();
  global[blockIdx.x * 32 + threadIdx.x] = cluster_map(words, peer)[threadIdx.x ^ 3];
  cluster_sync();
}
EXPORT_KERNEL(right_cluster)

// Every block signals an mbarrier of the next one, which then reads what that block has left.
TEST_KERNEL(right_remote_arrival) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint32_t, word, 1);
  const uint32_t next = (cluster_rank() + 1) % cluster_size();
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    *cluster_map(word, next) = blockIdx.x;
    mbarrier_arrive_cluster(barrier, next);
  }
  mbarrier_wait_cluster(barrier, 0);
  global[blockIdx.x * 32 + threadIdx.x] = word[0];
  cluster_sync();
}
EXPORT_KERNEL(right_remote_arrival)

// All blocks of a cooperative launch wait for each other, three times.
TEST_KERNEL(right_grid_barrier) {
  for (uint32_t round = 1; round <= 3; ++round) {
    global[64 * round + blockIdx.x * 32 + threadIdx.x] = round * 100 + threadIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(&global[0], 1u);
      while (load_acquire(&global[0]) < round * gridDim.x) {
      }
    }
    __syncthreads();
    const uint32_t other = gridDim.x - 1 - blockIdx.x;
    global[512 + 64 * round + blockIdx.x * 32 + threadIdx.x] =
        global[64 * round + other * 32 + threadIdx.x];
  }
}
EXPORT_KERNEL(right_grid_barrier)

// In through an mbarrier, changed, and out in two groups, the second before the first is through.
TEST_KERNEL(right_bulk_copies) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint32_t, tiles, 2 * 32);
  start(barrier, 1);
  for (uint32_t round = 0; round < 4; ++round) {
    uint32_t* const tile = tiles + round % 2 * 32;
    if (threadIdx.x == 0) {
      bulk_wait_read<1>();
      mbarrier_arrive_expect_tx(barrier, 128);
      bulk_load(tile, global + 32 * round, 128, barrier);
    }
    mbarrier_wait(barrier, round % 2);
    tile[threadIdx.x] += 1000 + threadIdx.x;
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      bulk_store(global + 512 + 32 * round, tile, 128);
      bulk_commit();
    }
  }
  if (threadIdx.x == 0) bulk_wait<0>();
  __syncthreads();
  global[800 + threadIdx.x] = global[512 + (threadIdx.x ^ 9)];
}
EXPORT_KERNEL(right_bulk_copies)

// Half of the box lies after the tensor's last row: those rows of the tile are not there.
TEST_KERNEL(right_clipped_store) {
  SHARED_DYNAMIC(tile);
  auto* const rows = reinterpret_cast<float*>(tile);
  for (int i = int(threadIdx.x); i < 128; i += int(blockDim.x)) rows[i] = float(i);
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) tma_store_2d(&map, tile, 0, 60);
  rows[128 + threadIdx.x] = 1;  // is not read
  if (threadIdx.x == 0) {
    bulk_commit();
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(right_clipped_store)

TEST_KERNEL(clipped_source_overwritten) {
  SHARED_DYNAMIC(tile);
  auto* const rows = reinterpret_cast<float*>(tile);
  for (int i = int(threadIdx.x); i < 128; i += int(blockDim.x)) rows[i] = float(i);
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_2d(&map, tile, 0, 60);  // here
    rows[127] = 1;                    // there
    bulk_commit();
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(clipped_source_overwritten)

// Accumulators that nothing else touched need no second fence.
TEST_KERNEL(right_wgmma_fences) {
  SHARED_DYNAMIC(tile);
  fill_operands(tile);
  float d[4];
  wgmma_fence();
  wgmma<8>(d, operand_a(tile), operand_b(tile), 0);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma<8>(d, operand_a(tile), operand_b(tile), 1);
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 4; ++i) d[i] += 1;
  wgmma_fence();
  wgmma<8>(d, operand_a(tile), operand_b(tile), 1);
  wgmma_commit();
  wgmma_wait<0>();
  put(global, d);
}
EXPORT_KERNEL(right_wgmma_fences)

// The 8 bytes of an mbarrier are ordinary memory again once it is invalidated.
TEST_KERNEL(right_invalidation) {
  SHARED(uint64_t, barrier, 1);
  SHARED(uint32_t, tile, 4);
  start(barrier, 1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(barrier, 16);
    bulk_load(tile, global + 4, 16, barrier);
  }
  mbarrier_wait(barrier, 0);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_invalidate(barrier);
    barrier[0] = 77 + tile[1];
    global[128] = uint32_t(barrier[0]);
  }
}
EXPORT_KERNEL(right_invalidation)

// Block 0's source is read before it ends, because block 1 says so.
TEST_KERNEL(right_copy_to_a_peer) {
  SHARED(uint32_t, tile, 4);
  SHARED(uint64_t, barrier, 1);
  fill(tile);
  start(barrier, 1);
  cluster_sync();
  if (cluster_rank() == 0) {
    if (threadIdx.x == 0) bulk_copy_cluster(tile, tile, 16, barrier, 1);
  } else {
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(barrier, 16);
    mbarrier_wait_cluster(barrier, 0);
    if (threadIdx.x < 4) global[128 + threadIdx.x] = tile[threadIdx.x];
  }
  cluster_sync();
}
EXPORT_KERNEL(right_copy_to_a_peer)

// Many blocks add to the same tile.
TEST_KERNEL(right_reduction) {
  SHARED_DYNAMIC(tile);
  SHARED(float, row, 32);
  for (int i = int(threadIdx.x); i < 256; i += int(blockDim.x))
    reinterpret_cast<float*>(tile)[i] = float(blockIdx.x + 1);
  if (threadIdx.x < 32) row[threadIdx.x] = 2;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_reduce_add_2d(&map, tile, 0, 8);
    bulk_reduce_add_f32(reinterpret_cast<float*>(global), row, 128);
    bulk_commit();
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(right_reduction)

TEST_KERNEL(right_cp_async) {
  SHARED(uint4, tiles, 2 * 32);
  const uint32_t i = threadIdx.x;
  cp_async_16(&tiles[i], global + 4 * i);
  cp_async_commit();
  for (uint32_t round = 0; round < 3; ++round) {
    const uint32_t now = round % 2 * 32, next = 32 - now;
    if (round < 2) cp_async_16(&tiles[next + i], global + (round + 1) * 128 + 4 * i);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    global[512 + round * 32 + i] = tiles[now + (i ^ 7)].z;
    __syncthreads();
  }
}
EXPORT_KERNEL(right_cp_async)

// load_twice with a release by each warp, and with one thread that speaks for all after a barrier.
TEST_KERNEL(right_ring) {
  SHARED_DYNAMIC(tile);
  SHARED(uint64_t, full, 1);
  SHARED(uint64_t, empty, 1);
  start_ring(full, empty, n ? 1 : 4);
  if (threadIdx.x == 128) load_twice(tile, full, empty, global);
  if (threadIdx.x >= 128) return;
  float d[4];
  for (uint32_t round = 0; round < 2; ++round) {
    multiply_once(d, tile, full, round);
    wgmma_wait<0>();
    if (n) barrier_sync(1, 128);
    if (threadIdx.x % (n ? 128 : 32) == 0) mbarrier_arrive(empty);
  }
  put(global + 1024, d);
}
EXPORT_KERNEL(right_ring)

// All threads read two neighbours; then one of these is written while the other is read again.
TEST_KERNEL(right_neighbours) {
  SHARED(uint32_t, words, 4);
  const int i = int(threadIdx.x);
  if (i < 4) words[i] = uint32_t(i + 1);
  __syncthreads();
  uint32_t sum = words[0] + words[1];
  __syncthreads();
  if (i == 1)
    words[1] = 7;
  else
    sum += words[0];
  __syncthreads();
  global[i] = sum + words[1];
}
EXPORT_KERNEL(right_neighbours)

// ---------------------------------------------------------------- what the shadow remembers
// All lanes have read the word; the flag speaks for thread 0 only.
TEST_KERNEL(readers_of_another_block) {
  if (blockIdx.x == 0) {
    global[64 + threadIdx.x] = global[8];  // there
    if (threadIdx.x == 0) store_release(&global[0], 1);
  } else if (threadIdx.x == 0) {
    while (load_acquire(&global[0]) == 0) {
    }
    global[8] = 7;  // here
  }
}
EXPORT_KERNEL(readers_of_another_block)

// Block 1 passes on to block 0 what block 0 has told it.
TEST_KERNEL(right_return) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    global[8] = 7;
    store_release(&global[0], 1);
  } else if (blockIdx.x == 1 && threadIdx.x == 0) {
    while (load_acquire(&global[0]) == 0) {
    }
    store_release(&global[1], 1);
  } else if (blockIdx.x == 0 && threadIdx.x == 32) {
    while (load_acquire(&global[1]) == 0) {
    }
    global[16] = global[8];
  }
}
EXPORT_KERNEL(right_return)

// Only the writer can fence its writes.
TEST_KERNEL(fence_after_the_barrier) {
  SHARED(uint32_t, tile, 4);
  if (threadIdx.x < 4) tile[threadIdx.x] = threadIdx.x;  // there
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_proxy_async();
    bulk_store(global, tile, 16);  // here
    bulk_commit();
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(fence_after_the_barrier)

// The source may be read until the wait, whatever barrier comes before.
TEST_KERNEL(cp_async_source_overwritten) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[threadIdx.x], global + threadIdx.x * 4);  // there
  cp_async_commit();
  __syncthreads();
  global[(threadIdx.x ^ 1) * 4] = 5;  // here
  cp_async_wait<0>();
}
EXPORT_KERNEL(cp_async_source_overwritten)

TEST_KERNEL(cp_async_source_overwritten_by_itself) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[threadIdx.x], global + threadIdx.x * 4);  // there
  cp_async_commit();
  global[threadIdx.x * 4] = 5;  // here
  cp_async_wait<0>();
}
EXPORT_KERNEL(cp_async_source_overwritten_by_itself)

// Barriers on both sides of the write order it with the instruction, not with the copy.
TEST_KERNEL(cp_async_source_overwritten_between_barriers) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[threadIdx.x], global + threadIdx.x * 4);  // there
  cp_async_commit();
  __syncthreads();
  global[(threadIdx.x ^ 1) * 4] = 5;  // here
  __syncthreads();
  cp_async_wait<0>();
}
EXPORT_KERNEL(cp_async_source_overwritten_between_barriers)

// What cp.async wrote needs the fence too, after the wait.
TEST_KERNEL(cp_async_fenced_before_its_wait) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[threadIdx.x], global + threadIdx.x * 4);  // there
  cp_async_commit();
  fence_proxy_async();
  cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(global + 128, tile, 512);  // here
    bulk_commit();
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(cp_async_fenced_before_its_wait)

TEST_KERNEL(right_cp_async_fence) {
  SHARED(uint4, tile, 32);
  cp_async_16(&tile[threadIdx.x], global + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(global + 128, tile, 512);
    bulk_commit();
    bulk_wait<0>();
  }
}
EXPORT_KERNEL(right_cp_async_fence)

// Additions of many blocks to the same elements, in bulk and one by one.
TEST_KERNEL(right_additions) {
  SHARED(float, row, 32);
  SHARED(uint32_t, halves, 32);
  row[threadIdx.x] = 2;
  halves[threadIdx.x] = pack_bf16(1, 1);
  fence_proxy_async();
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(global);
  if (threadIdx.x == 0) {
    bulk_reduce_add_f32(sums, row, 128);
    bulk_reduce_add_bf16(reinterpret_cast<bf16*>(global + 32), halves, 128);
    bulk_commit();
  }
  atomicAdd(&sums[threadIdx.x], 1.0f);
  if (threadIdx.x == 0) bulk_wait<0>();
}
EXPORT_KERNEL(right_additions)

// Blocks add to the same pairs in turn: 2^24 first, to which a single 1 adds nothing.
TEST_KERNEL(right_sums_in_turn) {
  float* const sums = reinterpret_cast<float*>(global) + 32 + 2 * threadIdx.x;
  if (threadIdx.x == 0)
    while (load_acquire(&global[0]) != blockIdx.x) __nanosleep(64);
  __syncthreads();
  reduce_add_f32x2(sums, blockIdx.x == 0 ? 0x1p24f : 1.0f, 1);
  __syncthreads();
  if (threadIdx.x == 0) store_release(&global[0], blockIdx.x + 1);
}
EXPORT_KERNEL(right_sums_in_turn)

// Blocks claim tiles in turn, and each tile needs the sum that the one before it has left.
TEST_KERNEL(right_chain) {
  constexpr uint32_t TILES = 24;
  uint32_t* const flags = global + 32;
  uint32_t* const sums = global + 128;
  if (threadIdx.x != 0) return;
  for (;;) {
    const uint32_t tile = atomicAdd(&global[0], 1u);
    if (tile >= TILES) return;
    uint32_t before = 0;
    if (tile > 0) {
      while (load_acquire(&flags[tile - 1]) == 0) {
      }
      before = sums[tile - 1];
    }
    sums[tile] = before + tile;
    store_release(&flags[tile], 1);
  }
}
EXPORT_KERNEL(right_chain)

// Each block waits for the one before it, whichever worker runs it, and takes on its numbers.
TEST_KERNEL(right_handoff) {
  uint32_t* const rows = global + 128;
  const uint32_t block = blockIdx.x, i = threadIdx.x;
  if (block > 0) {
    if (i == 0)
      while (load_acquire(&global[block - 1]) == 0) {
      }
    __syncthreads();
    rows[block * 64 + i] = rows[(block - 1) * 64 + (i ^ 33)] + 1;
  } else {
    rows[i] = 1;
  }
  __syncthreads();
  if (i == 0) store_release(&global[block], 1);
}
EXPORT_KERNEL(right_handoff)

// A block of 40 threads: the last warp has 8 lanes.
TEST_KERNEL(right_short_warp) {
  SHARED(uint32_t, words, 40);
  const uint32_t i = threadIdx.x;
  words[i] = i;
  __syncwarp();
  const uint32_t passed = __shfl_xor_sync(0xffffffffu, words[i ^ 2], 3);
  global[i] = passed;
  global[64 + i] = __ballot_sync(0xffffffffu, 1);
}
EXPORT_KERNEL(right_short_warp)

// Thousands of groups whose results nobody waits for until the end.
TEST_KERNEL(right_many_stores) {
  SHARED(uint32_t, tile, 4);
  if (threadIdx.x < 4) tile[threadIdx.x] = 40 + threadIdx.x;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (uint32_t group = 0; group < 3000; ++group) {
    bulk_store(global + 4 * group, tile, 16);
    bulk_commit();
    bulk_wait_read<0>();
  }
  bulk_wait<0>();
  for (uint32_t group = 0; group < 3000; group += 100) global[4 * group] += 1;
}
EXPORT_KERNEL(right_many_stores)
