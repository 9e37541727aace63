// Messages, signals, deadlocks, and the watchdog.
#include "fault.h"

#include <cxxabi.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "device_memory.h"
#include "shared.h"

// The section of all kernels of this image (language.h); absent without kernels.
extern "C" const char __start_simt_kernels[] __attribute__((weak, visibility("hidden")));
extern "C" const char __stop_simt_kernels[] __attribute__((weak, visibility("hidden")));

namespace simt {

// ---------------------------------------------------------------- words
std::string format(const char* pattern, ...) {
  va_list arguments, again;
  va_start(arguments, pattern);
  va_copy(again, arguments);
  std::string text(size_t(vsnprintf(nullptr, 0, pattern, arguments)), '\0');
  va_end(arguments);
  vsnprintf(text.data(), text.size() + 1, pattern, again);
  va_end(again);
  return text;
}

std::string describe(Site site) {
  const char* kernels = strstr(site.file, "kernels/");
  return format("%s:%d", kernels ? kernels : site.file, site.line);
}

std::string describe(const uint3& index) { return format("(%u,%u,%u)", index.x, index.y, index.z); }

std::string describe(const Fiber& fiber) {
  return format("block %s thread %u (warp %u, lane %u)", describe(fiber.block->index).c_str(),
                fiber.id, fiber.id / WARP_THREADS, fiber.id % WARP_THREADS);
}

std::string describe_code(uintptr_t pc) {
  return format("\x01%lx\x02", static_cast<unsigned long>(pc));
}

// ---------------------------------------------------------------- the end of a launch
void fail(const std::string& message) {
  Worker& w = *worker;
  {
    std::lock_guard lock(w.launch->mutex);
    if (!w.launch->aborted.exchange(true)) w.launch->fault = message;
  }
  w.dead = true;
  void* abandoned;
  simt_switch_stack(&abandoned, w.main_stack);
  abort();
}

void fail_at(const Fiber& fiber, const char* what, Site site, const std::string& message) {
  fail(format("%s at %s: %s\n  by %s", what, describe(site).c_str(), message.c_str(),
              describe(fiber).c_str()));
}

// ---------------------------------------------------------------- deadlocks
static const char* name_of_wait(Wait wait) {
  switch (wait) {
    case Wait::Nothing: return "ready";
    case Wait::Barrier: return "barrier";
    case Wait::Collective: return "warp collective";
    case Wait::Mbarrier: return "mbarrier_wait";
    case Wait::Wgmma: return "wgmma_wait";
    case Wait::Cluster: return "cluster_wait";
  }
  return "?";
}

static std::string describe_wait(const Fiber& fiber) {
  switch (fiber.wait) {
    case Wait::Barrier: {
      const auto* barrier = static_cast<const NamedBarrier*>(fiber.wait_for);
      const uint32_t bit = 1u << fiber.id % WARP_THREADS;
      for (const Aligned& call : fiber.warp->aligned)
        if (call.expected && call.lanes & bit)
          return format("barrier %u, which the lanes %08x of its warp have not reached",
                        unsigned(fiber.wait_detail), fiber.warp->live() & ~call.lanes);
      return format("barrier %u, where %u of %u threads arrived", unsigned(fiber.wait_detail),
                    barrier->arrived, barrier->expected);
    }
    case Wait::Mbarrier: {
      const auto* barrier = static_cast<const Mbarrier*>(fiber.wait_for);
      const auto bytes = static_cast<long long>(barrier->bytes);
      return format(
          "mbarrier at shared 0x%x to complete its phase of parity %u (%u of %u arrivals "
          "%s in the current one, of parity %u)",
          offset_in(barrier->block, barrier->address), unsigned(fiber.wait_detail),
          barrier->pending, barrier->count,
          bytes >= 0
              ? format("and %lld bytes are missing", bytes).c_str()
              : format("are missing, and %lld bytes more than expected have come", -bytes).c_str(),
          barrier->phase & 1);
    }
    case Wait::Wgmma: {
      const auto* group = static_cast<const Warpgroup*>(fiber.wait_for);
      return format("wgmma_wait, where %u of 128 threads arrived", group->arrived);
    }
    case Wait::Cluster:
      return format("cluster_wait, where %u of %u threads arrived", worker->cluster_barrier.arrived,
                    worker->threads - worker->finished);
    default: return name_of_wait(fiber.wait);
  }
}

static std::string ranges(const std::vector<uint32_t>& ids) {
  std::string text;
  for (size_t i = 0; i < ids.size();) {
    size_t last = i;
    while (last + 1 < ids.size() && ids[last + 1] == ids[last] + 1) last++;
    text += format(i == last ? "%s%u" : "%s%u-%u", text.empty() ? "" : ",", ids[i], ids[last]);
    i = last + 1;
  }
  return text;
}

void report_deadlock() {
  std::string text = "deadlock: no thread can go on";
  const Launch& launch = *worker->launch;
  for (uint32_t rank = 0; rank < launch.team_blocks; rank++) {
    const Block& block = worker->blocks[rank];
    std::vector<std::pair<std::string, std::vector<uint32_t>>> groups;
    for (const Fiber& fiber : block.fibers) {
      if (fiber.done) continue;
      const std::string what =
          format("at %s for %s", describe(fiber.wait_site).c_str(), describe_wait(fiber).c_str());
      auto group = std::find_if(groups.begin(), groups.end(),
                                [&](const auto& other) { return other.first == what; });
      if (group == groups.end()) group = groups.insert(groups.end(), {what, {}});
      group->second.push_back(fiber.id);
    }
    for (const auto& [what, ids] : groups) {
      text += format("\n  block %s: %s %s %s", describe(block.index).c_str(),
                     ids.size() == 1 ? "thread" : "threads", ranges(ids).c_str(),
                     ids.size() == 1 ? "waits" : "wait");
      text += " " + what;
    }
    if (block.finished && block.finished < block.threads)
      text += format("\n  block %s: %u %s exited", describe(block.index).c_str(), block.finished,
                     block.finished == 1 ? "thread has" : "threads have");
    if (rank == 7 && launch.team_blocks > 8) {
      text += format("\n  and %u more blocks", launch.team_blocks - 8);
      break;
    }
  }
  fail(text);
}

// ---------------------------------------------------------------- signals
static constexpr int WATCHDOG_SIGNAL_OFFSET = 5;
static int watchdog_signal() { return SIGRTMIN + WATCHDOG_SIGNAL_OFFSET; }

static struct sigaction previous[NSIG];

// Runs on the second service stack, outside any signal.
static void report_signal() {
  Worker& w = *worker;
  const Fiber& fiber = *self();
  const std::string where = describe_code(w.fault_pc);
  if (w.fault_signal == watchdog_signal()) {
    fail(format("%s runs without end: no wrapper was called for %u ms\n  it is at %s",
                describe(fiber).c_str(), w.launch->options.watchdog_ms, where.c_str()));
  }
  const auto* address = reinterpret_cast<const void*>(w.fault_address);
  if (w.fault_signal == SIGFPE)
    fail(format("%s divides an integer by zero at %s", describe(fiber).c_str(), where.c_str()));
  if (w.fault_signal == SIGILL)
    fail(
        format("%s does at %s what C++ leaves undefined, and the compiler put a trap in its place: "
               "an access to a null pointer, for example",
               describe(fiber).c_str(), where.c_str()));
  if (w.stacks.overflowed(address) >= 0)
    fail(format("%s uses more than %zu KiB of local memory at %s", describe(fiber).c_str(),
                STACK_BYTES / 1024, where.c_str()));
  // The processor names no address for a misaligned vector access.
  if (w.fault_signal == SIGSEGV && !address)
    fail(format("%s makes a misaligned vector access, or one to a null pointer, at %s",
                describe(fiber).c_str(), where.c_str()));
  fail(format("%s makes an access out of bounds at %s: %s", describe(fiber).c_str(), where.c_str(),
              in_device_memory(address) ? describe_global(address).c_str()
                                        : format("address %p", address).c_str()));
}

static void on_signal(int signal, siginfo_t* info, void* context) {
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Worker* w = worker;
  const bool ours = w && w->in_team && current;
  if (signal == watchdog_signal() && ours) {
    if (!w->expired()) return;
    const auto pc = static_cast<uintptr_t>(registers[REG_RIP]);
    const bool in_kernel = pc >= reinterpret_cast<uintptr_t>(__start_simt_kernels) &&
                           pc < reinterpret_cast<uintptr_t>(__stop_simt_kernels);
    if (!in_kernel) return;  // the machine may hold a lock; the watchdog tries again
  } else if (!ours) {
    // Perhaps it is for another machine of this process, in a shared library.
    const struct sigaction& old = previous[signal];
    if (old.sa_flags & SA_SIGINFO) return old.sa_sigaction(signal, info, context);
    if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) return old.sa_handler(signal);
    if (signal == watchdog_signal()) return;
    struct sigaction standard{};
    standard.sa_handler = SIG_DFL;
    sigaction(signal, &standard, nullptr);
    return;  // and the access happens again
  }
  w->fault_signal = signal;
  w->fault_pc = static_cast<uintptr_t>(registers[REG_RIP]);
  w->fault_address = reinterpret_cast<uintptr_t>(info->si_addr);
  void* stack = prepare_stack(w->service.top(1), report_signal);
  // Continue in report_signal as if it had been called there.
  registers[REG_RIP] = greg_t(reinterpret_cast<uintptr_t>(&report_signal));
  registers[REG_RSP] = greg_t(reinterpret_cast<uintptr_t>(stack) + 7 * sizeof(void*));
}

void install_fault_handlers() {
  static const bool once = [] {
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    // The watchdog's signals queue up while a thread does not run; nested in each other they would
    // overflow the small stack for signals.
    sigaddset(&action.sa_mask, watchdog_signal());
    for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, watchdog_signal()}) {
      // Known before the handler can run in another thread; then exactly.
      sigaction(signal, nullptr, &previous[signal]);
      struct sigaction replaced{};
      sigaction(signal, &action, &replaced);
      previous[signal] = replaced;
    }
    return true;
  }();
  (void)once;
}

void prepare_thread_for_faults() {
  // Fibers overflow onto their guard pages: the handler needs a stack of its own. Threads that
  // Rust made have one.
  static thread_local bool done = false;
  if (done) return;
  done = true;
  stack_t now{};
  sigaltstack(nullptr, &now);
  if (!(now.ss_flags & SS_DISABLE)) return;
  static thread_local std::vector<uint8_t> memory(64 * 1024);
  stack_t alternate{};
  alternate.ss_sp = memory.data();
  alternate.ss_size = memory.size();
  sigaltstack(&alternate, nullptr);
}

// ---------------------------------------------------------------- watchdog
int64_t milliseconds() {
  using namespace std::chrono;
  return duration_cast<std::chrono::milliseconds>(steady_clock::now().time_since_epoch()).count();
}

namespace {

struct Watched {
  Worker* worker;
  uint64_t switches;
  int64_t since_ms;
};

struct Watchdog {
  std::mutex mutex;
  std::vector<Watched> all;
  Watchdog() {
    std::thread([this] { run(); }).detach();
  }
  [[noreturn]] void run() {
    constexpr auto PERIOD = std::chrono::milliseconds(20);
    for (;;) {
      std::this_thread::sleep_for(PERIOD);
      std::lock_guard lock(mutex);
      const int64_t now = milliseconds();
      for (Watched& watched : all) {
        Worker& w = *watched.worker;
        const uint64_t switches = w.switches.load(std::memory_order_relaxed);
        if (!w.in_team || switches != watched.switches) {
          watched.switches = switches;
          watched.since_ms = now;
        } else if (now - watched.since_ms > w.watchdog_ms) {
          w.expired_at = switches + 1;  // the hooks look at it
          pthread_kill(w.thread, watchdog_signal());
        }
      }
    }
  }
};

Watchdog& watchdog() {
  static auto* one = new Watchdog;
  return *one;
}

}  // namespace

void watch(Worker* w) {
  Watchdog& dog = watchdog();
  std::lock_guard lock(dog.mutex);
  dog.all.push_back({w, w->switches, milliseconds()});
}

void unwatch(Worker* w) {
  Watchdog& dog = watchdog();
  std::lock_guard lock(dog.mutex);
  std::erase_if(dog.all, [w](const Watched& watched) { return watched.worker == w; });
}

}  // namespace simt
