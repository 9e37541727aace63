// The machine inside: what a thread, a warp, a block and a worker are while a kernel runs.
//
// A launch is cut into teams: the blocks that must be resident together, which is a cluster, or
// the whole grid of a cooperative launch. A worker (an OS thread) runs one team at a time; each
// CUDA thread of it is a fiber, and a fiber runs until it has to wait for another. So within a team
// nothing is concurrent, and every order of events is one that the options chose.
//
// scheduler.cpp runs teams; launch.cpp hands them to workers; warp, barrier, mbarrier, copy, wgmma,
// shared and atomics implement the wrappers; order and race check each access, dependent.cpp that
// none comes too early in a dependent launch; fault.h ends a launch.
// This file knows of none of them but the parts that it declares below; they all include it.
#pragma once
#include <pthread.h>

#include <atomic>
#include <deque>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../isobath.cuh"
#include "abi.h"
#include "clock.h"
#include "fiber.h"
#include "place.h"
#include "shadow.h"
#include "tensor_map.h"

// A function of inner loops, compiled for each generation of vector instructions; the processor at
// hand decides.
#define EVERY_X86 __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))

namespace simt {

// ---------------------------------------------------------------- limits of an sm_90
constexpr uint32_t WARP_THREADS = 32, WARPGROUP_THREADS = 128;
constexpr uint32_t NAMED_BARRIERS = 16;
constexpr uint32_t SHARED_LIMIT = 232448;    // dynamic and static bytes of a block
constexpr size_t WINDOW_BYTES = 256 * 1024;  // of shared addresses, per block
constexpr uint32_t DYNAMIC_BASE = 1024;      // as on the device, which keeps the first KiB
constexpr uint32_t GAP_BYTES = 256;          // after dynamic and static memory: never valid
constexpr uint32_t REGISTERS = 65536;        // of a multiprocessor

struct Block;
struct Warp;
struct Mbarrier;
struct Fiber;

// ---------------------------------------------------------------- a thread
enum class Wait : uint8_t { Nothing, Barrier, Collective, Mbarrier, Wgmma, Cluster };

// Bulk copies, those by tensor map first.
enum class Copy : uint8_t {
  TensorLoad,
  TensorStore,
  TensorAdd,
  Load,
  Store,
  AddF32,
  AddBf16,
  Peer
};

struct CpAsync {
  uint8_t* to;          // shared
  const uint8_t* from;  // global
  uint8_t bytes, zeros;
  bool copied;
  uint32_t group;
  Site site;
};

// A wgmma: what its 128 threads agree on, and what each brings.
struct Product {
  uint64_t a, b;  // descriptors; `a` unused if it came in registers
  int n;
  bool scale_d, in_registers, trans_a, trans_b;
  uint32_t group;
  Site site;
  float* d[128];
  const uint32_t* source[128];  // where the registers were
  uint32_t registers[128][4];
  Collected known[4];  // race detector: by warp, what one of its lanes knew
};

// What a thread saw when it last looked somewhere with an atomic: the same again is a poll.
struct Look {
  const void* address;
  int line;
  uint64_t operands, seen;
};

struct Registers;  // of a thread that uses wgmma (wgmma.cpp)

struct Fiber : ThreadIndices {
  void* stack_pointer = nullptr;
  const uint8_t* stack_bottom = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint32_t id = 0;  // in its block
  bool done = false;
  bool must_wait = false;  // for the previous kernel, before it touches global memory

  Wait wait = Wait::Nothing;
  const void* wait_for = nullptr;
  uint64_t wait_detail = 0;
  Site wait_site{};

  std::vector<CpAsync> copies;
  uint32_t copy_group = 0;  // the one that is open
  uint32_t bulk_group = 0;
  uint32_t bulk_read = 0;  // the sources of groups below it have been read
  Copy bulk_kind{};        // of the last store
  Site bulk_site{};
  uint32_t bulk_last = 0;  // 1 + the group of the last store; 0: none
  uint32_t products = 0;   // wgmmas so far
  uint32_t product_group = 0;
  int product_wait = 0;
  bool product_fenced = false;  // at least once
  uint32_t cluster_phase = 0;   // cluster barriers it has arrived at
  bool cluster_arrived = false;
  Look looks[4] = {};
  uint32_t next_look = 0;

  // Race detector.
  Actor actor = 0;
  Tick now = 1;
  Known known;
  Tick copies_done = 0;                               // groups of cp.async for which it has waited
  std::vector<std::pair<uint32_t, Tick>> copy_waits;  // those groups, and when it waited
  // When fence.proxy.async came, for each kind of memory; and fence.mbarrier_init last.
  std::vector<Tick> shared_fences, global_fences;
  Tick mbarrier_fence = 0;
  Known released;  // what a __threadfence put before later relaxed atomics
  Tick released_now = 0;
  Known pending_cluster;  // what the last phase of the cluster barrier released
  Known pending;          // what relaxed atomics read, until a __threadfence acquires it
  std::shared_ptr<Registers> registers;               // from its first wgmma_fence on
  Actor bulk_reader = 0, bulk_writer = 0;             // 0: none yet
  std::vector<std::pair<uint32_t, Tick>> bulk_ticks;  // of its groups
};

// ---------------------------------------------------------------- a warp, a block
enum class Collective : uint8_t {
  Shuffle,
  Vote,
  Syncwarp,
  Elect,
  Ldmatrix,
  Stmatrix,
  Mma,
  Setmaxnreg,
};

// `mask`: the lanes that arrived and may have left their arguments.
using Act = void (*)(Warp&, uint32_t mask, void** arguments);

struct Meeting {
  uint32_t mask = 0, arrived = 0;
  Collective kind{};
  Act act = nullptr;
  Site site{};
  void* argument[WARP_THREADS];
};

// An instruction that all lanes of a warp must run together, while some of them still have to.
// Lanes do not always wait in it, so that a warp may be in several.
struct Aligned {
  enum Kind : uint8_t { Sync, Arrive, ClusterArrive, ClusterWait };
  Kind kind;
  uint8_t id;         // of the barrier
  uint32_t expected;  // threads; 0: all of the block
  Site site;
  uint32_t lanes = 0;    // that have run it
  Collected released{};  // Arrive: by them
};

struct Warp {
  Fiber* lanes[WARP_THREADS];
  uint32_t exists = 0, exited = 0;
  std::vector<Meeting> meetings;
  std::vector<Aligned> aligned;  // oldest first
  uint32_t live() const { return exists & ~exited; }
};

// Of all threads of a block or a cluster, or of a number of threads, which is counted by warps.
struct NamedBarrier {
  uint32_t expected = 0, arrived = 0;
  bool whole = false;
  std::vector<Fiber*> waiting;
  Collected released;
  Site last;  // where a thread arrived last
};

struct Warpgroup {
  std::deque<Product*> products;  // issued by at least one thread, oldest first
  uint32_t retired = 0;           // products before those
  uint32_t arrived = 0;           // at wgmma_wait
  std::vector<Fiber*> waiting;
  Actor actor = 0;  // of its first warp, the other three follow; 0: none yet
};

struct Mbarrier {
  uint64_t* address;
  Block* block;
  uint32_t count, pending;
  int64_t bytes;  // expected and not yet arrived
  uint32_t phase;
  std::vector<Fiber*> waiting;
  Collected arriving;
  Known completed;
  Actor actor;
  Tick tick, init_tick;
  Actor init_actor;
  Fiber* init_fiber;
  Copy last_copy;
  Site copy_site;               // of the last copy that completes on it
  Site init_site, expect_site;  // where it was initialised and bytes were expected last
};

struct StaticVariable {
  const void* key;
  uint8_t* address;
};

struct Block {
  uint3 index;
  uint32_t rank;  // in its team
  uint32_t threads;
  uint8_t* window;
  uint32_t dynamic_end, static_end;  // shared addresses
  uint32_t free_registers;
  uint32_t finished;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint32_t> warp_registers;
  NamedBarrier barriers[NAMED_BARRIERS];
  std::vector<Warpgroup> warpgroups;
  std::vector<StaticVariable> statics;
  std::deque<Mbarrier> mbarriers;                  // addresses stay
  uint64_t mbarrier_words[WINDOW_BYTES / 8 / 64];  // a bit for each 8 bytes: a live one is there
  // Race detector: the last access of each thread of another block to this one's shared memory.
  std::unordered_map<Actor, std::pair<Tick, Place>> visitors;
};

// ---------------------------------------------------------------- asynchronous copies
struct AsyncCopy {
  Copy kind;
  bool clipped;  // by tensor map: part of the box lies outside the tensor
  TensorMapFields map;
  int at[5];
  uint8_t* shared;
  Block* block;     // whose shared memory `shared` is
  uint8_t* global;  // bulk copies; the source of Copy::Peer
  uint32_t bytes;
  Mbarrier* barrier;
  Fiber* issuer;
  uint32_t group;
  Site site;
  Clock clock;        // race detector: as whom it acts
  Clock write_clock;  // stores: as whom it writes global memory
};

// ---------------------------------------------------------------- the race detector's
// Of the team that runs.
struct RaceTeam {
  std::vector<std::vector<SharedLine>> shared;  // by block rank
  uint32_t generation = 0;
  std::vector<std::string> agents;  // names of the actors behind the threads
  Actor thread_actors = 0;
};

// ---------------------------------------------------------------- a launch, a worker
struct Launch {
  const Kernel* kernel;
  SimtLaunch shape;
  void* const* arguments;
  SimtOptions options;
  uint64_t team_count;
  uint32_t team_blocks, block_threads;
  std::atomic<uint64_t> next_team{0};
  std::atomic<uint32_t> running{0};  // workers that claim and run teams
  std::atomic<bool> aborted{false};
  std::mutex mutex;
  std::string fault;  // under the mutex
  std::unordered_map<uintptr_t, std::pair<uint32_t, Known>>
      atomics;          // under the mutex: last release
  uint32_t generation;  // of the global shadow
  uint3 block_index(uint32_t team, uint32_t rank) const;
};

struct Worker {
  // The team that runs.
  Launch* launch = nullptr;
  uint32_t team = 0;
  std::vector<Block> blocks;  // the first `launch->team_blocks` of them
  uint32_t finished = 0, threads = 0;
  bool dead = false;
  std::vector<Fiber*> ready;  // a ring
  uint32_t ready_head = 0, ready_count = 0, ready_mask = 0;
  std::vector<AsyncCopy> copies;  // in flight, oldest first
  size_t copies_head = 0;
  std::vector<Product*> free_products;
  NamedBarrier cluster_barrier;
  uint64_t random = 1;
  bool race = false;
  uint32_t order = 0, asynchronous = 0;
  uint32_t idle_yields = 0;
  int64_t idle_since_ms = 0;
  RaceTeam race_team;

  // The worker itself.
  Places places;
  void* main_stack = nullptr;
  uint8_t* windows = nullptr;
  size_t window_count = 0;
  Stacks stacks;
  Stacks service;  // 0: checks at the end of a team; 1: reports of faults
  pthread_t thread{};
  std::atomic<uint64_t> switches{0};  // written by this worker only
  std::atomic<bool> in_team{false};
  // The watchdog's verdict: 1 + the switches at which the worker stood still. A verdict that comes
  // late, after a switch, means nothing, so that it cannot hit the next launch.
  std::atomic<uint64_t> expired_at{0};
  bool expired() const {
    return expired_at.load(std::memory_order_relaxed) ==
           switches.load(std::memory_order_relaxed) + 1;
  }
  std::atomic<uint32_t> watchdog_ms{0};
  uintptr_t fault_pc = 0, fault_address = 0;
  int fault_signal = 0;

  bool reserve(uint32_t blocks, uint32_t threads);
  ~Worker();
};

extern __thread Worker* worker __attribute__((tls_model("initial-exec")));
inline Fiber* self() { return static_cast<Fiber*>(current); }
inline Place place_of(Site site) { return worker->places.of(site); }

// ---------------------------------------------------------------- scheduler.cpp
void run_team(Launch&, uint32_t team);
void make_ready(Fiber*);
void block_on(Wait, const void* object, uint64_t detail, Site);
// Lets the others run; a fault if nothing but such yields happens.
void yield(const char* what, Site);
void progress();  // something happened that a spinning thread may wait for
// Before an atomic of these operands that will find `value`: if this thread has done just that
// before, it polls, and the others get a turn first.
void look(const void* address, uint64_t operands, uint64_t value, const char* what, Site);
uint64_t random_bits();
// Calls `function` on a service stack and comes back when it ends or fails.
void on_service_stack(size_t index, void (*function)());

// ---------------------------------------------------------------- dependent.cpp
// `what`: the access, "a read of 4 bytes"; `here`: where it is.
[[noreturn]] void report_early_access(const Fiber&, const std::string& what, const void* p,
                                      const std::string& here);
// Before a wrapper of this name reads or writes global memory at `p`, null: wherever it is.
void check_waited(const Fiber&, const char* what, const void* p, Site);
// The thread has ended.
void check_waited_at_exit(const Fiber&);

// ---------------------------------------------------------------- mbarrier.cpp, copy.cpp
Mbarrier& mbarrier_at(const uint64_t* address, const char* what, Site);
Mbarrier& own_mbarrier(const uint64_t* address, const char* what, Site);
// Whether an mbarrier stands in these bytes, which only its own instructions may touch.
inline bool holds_mbarrier(const Block& block, uint32_t address, uint32_t bytes) {
  for (uint32_t word = address / 8; word <= (address + bytes - 1) / 8; word++)
    if (block.mbarrier_words[word / 64] >> word % 64 & 1) return true;
  return false;
}
[[noreturn]] void report_mbarrier_access(const Block&, uint32_t address, bool write, uintptr_t pc);
void complete_bytes(Mbarrier&, uint32_t bytes);
void run_copy(AsyncCopy&);
bool run_one_copy();  // the oldest, or any; false: none in flight
// The thread, or the whole block, has ended: nothing may be under way that needs it.
void check_copies_at_exit(const Fiber&);
void check_copies_at_exit(const Block&);

// ---------------------------------------------------------------- atomics.cpp
// Of global memory; atomic by itself.
void add_f32(float* p, float added);

// ---------------------------------------------------------------- wgmma.cpp
inline Warpgroup& warpgroup_of(const Fiber& fiber) {
  return fiber.block->warpgroups[fiber.id / WARPGROUP_THREADS];
}
// An ordinary instruction reads or writes the thread's stack, which stands for its registers.
void touch_registers(Fiber&, const void* p, uint32_t bytes, bool write, uintptr_t pc);
// The oldest wgmma of this thread that it has not waited for, or null.
const Product* pending_product(const Fiber&);

// ---------------------------------------------------------------- warp.cpp, barrier.cpp
void meet(Collective, uint32_t mask, void* argument, Act, Site);
// The thread has ended and is counted as such: those who wait for it need not any more.
void leave_meetings(Fiber&);
void leave_barriers(Fiber&);

}  // namespace simt
