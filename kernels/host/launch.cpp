// Launches: the registry of kernels, the checks that a driver makes, and the workers, which stay
// for the life of the process so that a small launch costs no thread.
#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sys/mman.h>
#include <thread>

#include "fault.h"
#include "machine.h"

struct SimtFault {
  std::string text;
};

namespace simt {

// ---------------------------------------------------------------- registry
static Kernel* kernels = nullptr;  // filled before main
void register_kernel(Kernel* kernel) {
  kernel->next = kernels;
  kernels = kernel;
}

static const Kernel* find_kernel(const char* name, bool hooked) {
  for (const Kernel* kernel = kernels; kernel; kernel = kernel->next)
    if (bool(kernel->hooked) == hooked && !std::strcmp(kernel->name, name)) return kernel;
  return nullptr;
}

// ---------------------------------------------------------------- geometry
// Teams of a plain launch are clusters; the one team of a cooperative launch is the grid.
uint3 Launch::block_index(uint32_t team, uint32_t rank) const {
  const uint32_t *grid = shape.grid, *cluster = shape.cluster;
  const uint32_t cluster_blocks = cluster[0] * cluster[1] * cluster[2];
  const uint64_t index = shape.cooperative ? rank / cluster_blocks : team;
  const uint32_t within = rank % cluster_blocks;
  const uint32_t across[3] = {grid[0] / cluster[0], grid[1] / cluster[1], grid[2] / cluster[2]};
  return {uint32_t(index % across[0]) * cluster[0] + within % cluster[0],
          uint32_t(index / across[0] % across[1]) * cluster[1] + within / cluster[0] % cluster[1],
          uint32_t(index / across[0] / across[1]) * cluster[2] + within / cluster[0] / cluster[1]};
}

// What the rules that both machines share do not say.
static std::string refuse(const SimtLaunch& shape) {
  const auto product = [](const uint32_t(&size)[3]) {
    return uint64_t(size[0]) * size[1] * size[2];
  };
  constexpr uint64_t MOST_COOPERATIVE_THREADS = 32768;  // each has a stack
  const uint64_t cluster = product(shape.cluster);
  if (product(shape.grid) / cluster > UINT32_MAX) return "a grid of more than 2^32 clusters";
  if (shape.cooperative && cluster > 1)
    return "this machine runs no cooperative launch with clusters";
  const uint64_t threads = product(shape.grid) * product(shape.block);
  if (shape.cooperative && threads > MOST_COOPERATIVE_THREADS)
    return format("a cooperative launch of %llu threads: this machine runs at most %llu at once",
                  static_cast<unsigned long long>(threads),
                  static_cast<unsigned long long>(MOST_COOPERATIVE_THREADS));
  return "";
}

// ---------------------------------------------------------------- workers
bool Worker::reserve(uint32_t block_count, uint32_t thread_count) {
  if (window_count < block_count) {
    if (windows) munmap(windows, window_count * WINDOW_BYTES);
    // Windows are aligned to their size: a little more is mapped and cut to fit.
    const size_t bytes = block_count * WINDOW_BYTES;
    void* mapped = mmap(nullptr, bytes + WINDOW_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    windows = nullptr;
    window_count = 0;
    if (mapped == MAP_FAILED) return false;
    auto* start = static_cast<uint8_t*>(mapped);
    const size_t skip =
        (WINDOW_BYTES - reinterpret_cast<uintptr_t>(start) % WINDOW_BYTES) % WINDOW_BYTES;
    if (skip) munmap(start, skip);
    munmap(start + skip + bytes, WINDOW_BYTES - skip);
    windows = start + skip;
    window_count = block_count;
  }
  uint32_t capacity = 1;
  while (capacity < thread_count) capacity *= 2;
  if (ready.size() < capacity) {
    ready.resize(capacity);
    ready_mask = capacity - 1;
  }
  return service.grow_to(2) && stacks.grow_to(thread_count);
}

Worker::~Worker() {
  unwatch(this);
  worker = nullptr;
  for (Product* product : free_products) delete product;
  for (const Block& block : blocks)
    for (const Warpgroup& group : block.warpgroups)
      for (Product* product : group.products) delete product;
  if (windows) munmap(windows, window_count * WINDOW_BYTES);
}

// The calling thread's worker, made at its first launch.
static Worker* this_worker() {
  static thread_local Worker* const mine = [] {
    static thread_local const auto own = std::make_unique<Worker>();  // large: see place_of
    own->thread = pthread_self();
    watch(own.get());
    return own.get();
  }();
  worker = mine;
  return mine;
}

static std::atomic<uint64_t> all_switches{0};

// The calling thread's worker with what a team needs; null: there are no stacks for that.
static Worker* prepared_worker(const Launch& launch) {
  Worker* const mine = this_worker();
  prepare_thread_for_faults();
  const uint32_t threads = launch.team_blocks * launch.block_threads;
  return mine->reserve(launch.team_blocks, threads) ? mine : nullptr;
}

// `kept`: stacks that the worker may keep for the next launch. Those of a large grid or cluster
// would be missing elsewhere.
static void work(Launch& launch, Worker& w, size_t kept) {
  const uint64_t switches = w.switches;
  launch.running++;  // before a team is claimed: others may wait for it at once
  while (!launch.aborted) {
    const uint64_t team = launch.next_team.fetch_add(1);
    if (team >= launch.team_count) break;
    run_team(launch, uint32_t(team));
  }
  launch.running--;
  if (w.stacks.count() > kept) w.stacks.release();
  all_switches += w.switches - switches;
}

namespace {

// Helpers of launches that have more than one team. The launching thread works too.
class Pool {
 public:
  // Asks for up to `count` helpers, works, and returns when nobody works on the launch any more.
  // The launching thread takes its stacks first: helpers that find none leave the work to it.
  void run(Launch& launch, uint32_t count) {
    constexpr size_t KEPT = 4096;
    Worker* const mine = prepared_worker(launch);
    if (!mine) {
      launch.aborted = true;
      launch.fault = format(
          "no stacks for the %u threads that must run at once: all launches of the process "
          "together have %zu, a third of vm.max_map_count; raise that, or launch fewer threads",
          launch.team_blocks * launch.block_threads, Stacks::most());
      return;
    }
    Job job{&launch, count, 0};
    if (count) {
      std::lock_guard lock(mutex_);
      while (threads_ < count) {
        std::thread([this] { serve(); }).detach();
        threads_++;
      }
      jobs_.push_back(&job);
    }
    if (count) wake_.notify_all();
    work(launch, *mine, KEPT);
    if (count) {
      std::unique_lock lock(mutex_);
      std::erase(jobs_, &job);
      job.wanted = 0;
      left_.wait(lock, [&] { return job.inside == 0; });
    }
  }

 private:
  struct Job {
    Launch* launch;
    uint32_t wanted, inside;
  };
  [[noreturn]] void serve() {
    constexpr size_t KEPT = 1024;  // of each of many
    std::unique_lock lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      wake_.wait(lock, [&] {
        const auto found = std::find_if(jobs_.begin(), jobs_.end(),
                                        [](const Job* other) { return other->wanted > 0; });
        job = found == jobs_.end() ? nullptr : *found;
        return job != nullptr;
      });
      job->wanted--;
      job->inside++;
      lock.unlock();
      if (Worker* const mine = prepared_worker(*job->launch)) work(*job->launch, *mine, KEPT);
      lock.lock();
      job->inside--;
      left_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_, left_;
  std::vector<Job*> jobs_;
  uint32_t threads_ = 0;
};

Pool& pool() {
  static auto* one = new Pool;
  return *one;
}

}  // namespace
}  // namespace simt

using namespace simt;

extern "C" const SimtKernelInfo* simt_kernel(uint32_t index) {
  static const std::vector<SimtKernelInfo> all = [] {
    std::vector<SimtKernelInfo> found;
    for (const Kernel* kernel = kernels; kernel; kernel = kernel->next) {
      const bool known = std::any_of(found.begin(), found.end(), [&](const SimtKernelInfo& other) {
        return !std::strcmp(other.name, kernel->name);
      });
      if (known) continue;
      found.push_back({kernel->name, kernel->file, kernel->argument_bytes, kernel->arguments,
                       kernel->max_threads});
    }
    return found;
  }();
  return index < all.size() ? &all[index] : nullptr;
}

extern "C" int simt_launch(const char* name, const SimtLaunch* shape, void* const* arguments,
                           const SimtOptions* options, SimtFault** fault) {
  static std::atomic<uint32_t> generations{0};
  const auto give_up = [&](std::string text) {
    *fault = new SimtFault{std::move(text)};
    return 1;
  };
  *fault = nullptr;
  const Kernel* kernel = find_kernel(name, options->race != 0);
  if (!kernel) {
    return give_up(options->race && find_kernel(name, false)
                       ? "it was not compiled for race mode"
                       : "the build has no kernel of this name");
  }
  const std::string refusal = refuse(*shape);
  if (!refusal.empty()) return give_up(refusal);
  install_fault_handlers();

  const uint32_t cluster = shape->cluster[0] * shape->cluster[1] * shape->cluster[2];
  const uint64_t blocks = uint64_t(shape->grid[0]) * shape->grid[1] * shape->grid[2];
  Launch launch{};
  launch.kernel = kernel;
  launch.shape = *shape;
  launch.arguments = arguments;
  launch.options = *options;
  constexpr uint32_t DEFAULT_WATCHDOG_MS = 10'000;
  if (!launch.options.watchdog_ms) launch.options.watchdog_ms = DEFAULT_WATCHDOG_MS;
  launch.team_blocks = shape->cooperative ? uint32_t(blocks) : cluster;
  launch.team_count = shape->cooperative ? 1 : blocks / cluster;
  launch.block_threads = shape->block[0] * shape->block[1] * shape->block[2];
  launch.generation = ++generations;

  uint64_t workers = options->workers ? options->workers : std::thread::hardware_concurrency();
  workers = std::clamp<uint64_t>(workers, 1, launch.team_count);
  pool().run(launch, uint32_t(workers - 1));
  if (launch.aborted) return give_up(launch.fault);
  return 0;
}

extern "C" const char* simt_fault_text(const SimtFault* fault) { return fault->text.c_str(); }
extern "C" void simt_fault_free(SimtFault* fault) { delete fault; }
extern "C" uint64_t simt_switches(void) { return all_switches; }
