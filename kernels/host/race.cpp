// Lines and slots: where accesses are remembered, and the rules that make two of them a fault.
#include "race.h"

#include <algorithm>
#include <memory>
#include <mutex>

#include "device_memory.h"
#include "fault.h"
#include "machine.h"

namespace simt {

// ---------------------------------------------------------------- places
static constexpr Place SITE = 0x80000000u;

static std::mutex places_mutex;
static std::vector<Site> places;

static Place new_place(Site site) {
  std::lock_guard lock(places_mutex);
  for (size_t i = 0; i < places.size(); i++)
    if (places[i].file == site.file && places[i].line == site.line) return SITE | Place(i);
  places.push_back(site);
  return SITE | Place(places.size() - 1);
}

Place place_of(Site site) {
  // Kernels use few sites, each very often.
  struct Known {
    Site site;
    Place place;
  };
  constexpr size_t ENTRIES = 256;
  // On the heap, as all that is large: a machine in a shared library finds little room in the
  // static block of thread-local memory.
  static thread_local const auto cache = std::make_unique<Known[]>(ENTRIES);
  Known& entry = cache[(reinterpret_cast<uintptr_t>(site.file) / 16 + size_t(site.line)) % ENTRIES];
  if (entry.site.line != site.line || entry.site.file != site.file) entry = {site, new_place(site)};
  return entry.place;
}

Place place_of_code(uintptr_t pc) {
  // A relative address: code lies within 2 GiB of this function.
  return Place(pc - reinterpret_cast<uintptr_t>(&place_of) + 0x40000000u) & ~SITE;
}

std::string describe(Place place) {
  if (place & SITE) {
    std::lock_guard lock(places_mutex);
    return describe(places[place & ~SITE]);
  }
  // A return address points behind the access.
  return describe_code(reinterpret_cast<uintptr_t>(&place_of) + place - 0x40000000u - 1);
}

// ---------------------------------------------------------------- actors
void race_begin(Worker& w) {
  RaceTeam& team = w.race_team;
  const uint32_t blocks = w.launch->team_blocks;
  team.generation++;
  team.agents.clear();
  team.thread_actors = blocks * w.launch->block_threads;
  if (team.shared.size() < blocks) team.shared.resize(blocks);
  for (uint32_t rank = 0; rank < blocks; rank++)
    if (team.shared[rank].empty()) team.shared[rank].resize(WINDOW_BYTES / Line::BYTES);
}

Actor new_agent(std::string name) {
  RaceTeam& team = worker->race_team;
  team.agents.push_back(std::move(name));
  return team.thread_actors + Actor(team.agents.size()) - 1;
}

std::string name_of(Actor actor, uint32_t team) {
  const Launch& launch = *worker->launch;
  const uint32_t threads = launch.block_threads;
  if (actor < worker->race_team.thread_actors) {
    const uint3 block = launch.block_index(team, actor / threads);
    const uint32_t thread = actor % threads;
    return format("block (%u,%u,%u) thread %u (warp %u, lane %u)", block.x, block.y, block.z,
                  thread, thread / WARP_THREADS, thread % WARP_THREADS);
  }
  if (team != worker->team) return "an asynchronous copy of another block";
  return worker->race_team.agents[actor - worker->race_team.thread_actors];
}

static Fiber* thread_of(Actor actor) {
  const uint32_t threads = worker->launch->block_threads;
  return &worker->blocks[actor / threads].fibers[actor % threads];
}

// ---------------------------------------------------------------- rules
namespace {

struct Access {
  const Clock& clock;
  uint8_t flags;
  Place place;
  // The last slot that it was found to be ordered after: the lines of one copy often have the same.
  mutable Slot ordered_after{};
};

enum class Verdict : uint8_t { Fine, Race, NotWaited, NoProxyFence, Uninitialised };

struct Conflict {
  Verdict verdict = Verdict::Fine;
  Slot slot{};
  uint16_t bytes = 0;
};

}  // namespace

static bool ordered(const Slot& slot, const Access& access) {
  const Slot& last = access.ordered_after;
  if (slot.tick == last.tick && slot.actor == last.actor && slot.team == last.team &&
      slot.flags == last.flags)
    return true;
  const Clock& me = access.clock;
  const uint32_t actors = slot.flags & WARPGROUP ? 4 : 1;
  const bool foreign = slot.team != worker->team;
  for (Actor actor = slot.actor; actor < slot.actor + actors; actor++) {
    if (foreign) {
      if (!knows_foreign(me.known, slot.team, actor, slot.tick)) return false;
    } else if (actor == me.actor) {
      const bool thread = actor < worker->race_team.thread_actors;
      if (!thread && slot.tick != me.tick && !knows(me.known, actor, slot.tick)) return false;
    } else if (!knows(me.known, actor, slot.tick)) {
      return false;
    }
  }
  access.ordered_after = slot;
  return true;
}

// An asynchronous access after an ordinary store needs a proxy fence of the writer behind the
// store, and has to be ordered after that fence as well.
static bool fenced(const Slot& slot, const Access& access, bool shared) {
  if (slot.flags & ASYNC || slot.team != worker->team) return true;
  const Fiber& writer = *thread_of(slot.actor);
  const std::vector<Tick>& fences = shared ? writer.shared_fences : writer.global_fences;
  const auto fence = std::lower_bound(fences.begin(), fences.end(), slot.tick);
  return fence != fences.end() && knows(access.clock.known, slot.actor, *fence + 1);
}

static Slot slot_of(const Readers& readers, Actor actor) {
  const Readers::Read& read = readers.by_thread[actor];
  return {readers.team, read.tick, read.place, actor, read.mask, READ};
}

// Another team's table shrinks to one read for each byte: any of them is unordered for us.
static void shrink_readers(Line& line) {
  uint16_t covered = 0;
  const Readers& readers = *line.readers();
  for (Actor actor = 0; actor < readers.by_thread.size(); actor++) {
    Slot slot = slot_of(readers, actor);
    slot.mask &= ~covered;
    if (!slot.mask) continue;
    covered |= slot.mask;
    line.push_back(slot);
  }
  line.readers_slot().reset();
}

// The reads of threads move into a table once there are many.
static void record_read(Line& line, const Slot& slot) {
  constexpr size_t MANY = 8;
  RaceTeam& team = worker->race_team;
  const bool plain = slot.flags == READ && slot.actor < team.thread_actors;
  if (plain && line.size() >= MANY && !line.readers()) {
    line.readers_slot() = std::make_unique<Readers>();
    line.readers()->team = slot.team;
    line.readers()->by_thread.resize(team.thread_actors, Readers::Read{0, 0, 0});
  }
  if (!plain || !line.readers()) {
    line.push_back(slot);
    return;
  }
  Readers::Read& read = line.readers()->by_thread[slot.actor];
  // Bytes that it read earlier, and does not read now, keep their tick: somebody who is ordered
  // after that read alone may write them.
  if (const uint16_t others = read.mask & ~slot.mask; others && read.tick != slot.tick) {
    line.push_back({slot.team, read.tick, read.place, slot.actor, others, READ});
    read.mask = 0;
  }
  read = {slot.tick, slot.place, uint16_t(read.mask | slot.mask)};
}

static Conflict check_readers(Line& line, const Access& access, uint16_t mask) {
  if (!(access.flags & WRITE)) return {};
  for (Actor actor = 0; actor < line.readers()->by_thread.size(); actor++) {
    Readers::Read& read = line.readers()->by_thread[actor];
    if (!(read.mask & mask)) continue;
    const Slot slot = slot_of(*line.readers(), actor);
    if (!ordered(slot, access)) return {Verdict::Race, slot, uint16_t(slot.mask & mask)};
    read.mask &= ~mask;
  }
  return {};
}

static Conflict check(Line& line, const Access& access, uint16_t mask, bool shared) {
  const bool write = access.flags & WRITE;
  if (line.readers()) {
    if (line.readers()->team != worker->team)
      shrink_readers(line);
    else if (Conflict found = check_readers(line, access, mask); found.verdict != Verdict::Fine)
      return found;
  }
  uint32_t kept = 0;
  bool recorded = false;
  uint32_t other_team = worker->team;  // one that has read all of these bytes
  for (uint32_t i = 0; i < line.size(); i++) {
    Slot& slot = line[i];
    const uint16_t common = slot.mask & mask;
    if (common) {
      const bool conflicting = write || slot.flags & WRITE;
      const bool both_atomic = slot.flags & access.flags & ATOMIC;
      if (conflicting && !both_atomic) {
        const bool own_pending =
            slot.flags & PENDING && access.flags & COMPLETES && slot.actor == access.clock.actor;
        if (slot.flags & PENDING && !own_pending) return {Verdict::NotWaited, slot, common};
        if (!ordered(slot, access)) return {Verdict::Race, slot, common};
        if (access.flags & ASYNC && slot.flags & WRITE && !fenced(slot, access, shared))
          return {Verdict::NoProxyFence, slot, common};
      }
      const bool earlier_read = !write && !(slot.flags & WRITE);
      if (earlier_read && slot.team != worker->team && slot.mask == (slot.mask | mask)) {
        // Reads of two other teams: whoever writes here is unordered with one of them.
        if (other_team != worker->team && other_team != slot.team) recorded = true;
        other_team = slot.team;
      }
      // What this access replaces: all that a write is ordered after, the earlier reads of a read.
      if (write ? !both_atomic : earlier_read && ordered(slot, access)) {
        slot.mask &= ~mask;
        if (!slot.mask) continue;
      } else if (both_atomic && slot.actor == access.clock.actor && slot.team == worker->team &&
                 slot.mask == mask && slot.flags == access.flags) {
        slot.tick = access.clock.tick;
        recorded = true;
      }
    }
    if (kept != i) line[kept] = slot;
    kept++;
  }
  line.shrink(kept);
  const bool reads = !write || access.flags & READS_TOO;
  if (shared && reads && (line.initialised & mask) != mask)
    return {Verdict::Uninitialised, {}, uint16_t(mask & ~line.initialised)};
  if (write) line.initialised |= mask;
  if (recorded) return {};
  const Slot slot{worker->team, access.clock.tick,
                  access.place, access.clock.actor,
                  mask,         uint8_t(access.flags & ~COMPLETES)};
  if (write) {
    line.push_back(slot);
  } else {
    record_read(line, slot);
  }
  return {};
}

static const char* verb(uint8_t flags) {  // with its article
  if (flags & ATOMIC) return "an atomic access";
  if (flags & ASYNC) return flags & WRITE ? "an asynchronous write" : "an asynchronous read";
  return flags & WRITE ? "a write" : "a read";
}

[[noreturn]] static void report(const Conflict& conflict, const std::string& where,
                                const Access& access) {
  const std::string me = name_of(access.clock.actor, worker->team);
  const std::string here = describe(access.place);
  const Slot& other = conflict.slot;
  if (conflict.verdict == Verdict::Uninitialised) {
    fail(format("read of uninitialised %s\n  %s by %s at %s", where.c_str(), verb(access.flags),
                me.c_str(), here.c_str()));
  }
  const char* title = conflict.verdict == Verdict::Race ? "data race on"
                      : conflict.verdict == Verdict::NotWaited
                          ? "cp.async that was not waited for:"
                          : "no fence.proxy.async between an ordinary write and an asynchronous "
                            "access:";
  fail(format("%s %s\n  %s by %s at %s\n  after %s by %s at %s%s", title, where.c_str(),
              verb(access.flags), me.c_str(), here.c_str(), verb(other.flags),
              name_of(other.actor, other.team).c_str(), describe(other.place).c_str(),
              conflict.verdict == Verdict::Race ? ", with nothing that orders the two" : ""));
}

// ---------------------------------------------------------------- shared and global memory
static void check_shared(Block& block, uint32_t address, uint32_t bytes, const Access& access) {
  std::vector<Line>& lines = worker->race_team.shared[block.rank];
  const uint32_t end = address + bytes;
  while (address < end) {
    const uint32_t first = address % Line::BYTES;
    const uint32_t count = min(Line::BYTES - first, end - address);
    Line& line = lines[address / Line::BYTES];
    if (line.generation != worker->race_team.generation) {
      line.generation = worker->race_team.generation;
      line.clear();
    }
    const auto mask = uint16_t(((1u << count) - 1) << first);
    const Conflict conflict = check(line, access, mask, true);
    if (conflict.verdict != Verdict::Fine) {
      const uint32_t at = address - first + uint32_t(__builtin_ctz(conflict.bytes));
      report(conflict, format("shared memory 0x%x of block %s", at, describe(block.index).c_str()),
             access);
    }
    address += count;
  }
}

static void check_global(const void* p, uint32_t bytes, const Access& access) {
  auto address = reinterpret_cast<uintptr_t>(p);
  const uintptr_t end = address + bytes;
  while (address < end) {
    ShadowPage& page = shadow_page(address);
    Conflict conflict;
    uintptr_t base;
    {
      std::lock_guard lock(page.lock);
      if (page.generation != worker->launch->generation) page.start(worker->launch->generation);
      const uintptr_t page_end = min(end, (address / PAGE_BYTES + 1) * PAGE_BYTES);
      do {
        const uint32_t first = address % Line::BYTES;
        const auto count = uint32_t(min<uintptr_t>(Line::BYTES - first, page_end - address));
        base = address - first;
        const auto mask = uint16_t(((1u << count) - 1) << first);
        conflict = check(page.lines[address % PAGE_BYTES / Line::BYTES], access, mask, false);
        address += count;
      } while (conflict.verdict == Verdict::Fine && address < page_end);
    }
    if (conflict.verdict != Verdict::Fine) {
      const auto* at =
          reinterpret_cast<const void*>(base + uintptr_t(__builtin_ctz(conflict.bytes)));
      report(conflict, describe_global(at), access);
    }
  }
}

static void check_anywhere(const void* p, uint32_t bytes, const Access& access) {
  if (Block* block = block_of(p))
    check_shared(*block, offset_in(block, p), bytes, access);
  else
    check_global(p, bytes, access);
}

void race_prefetch(const Block& block, uint32_t address) {
  if (address < WINDOW_BYTES)
    __builtin_prefetch(&worker->race_team.shared[block.rank][address / Line::BYTES], 1);
}

void race_thread(Fiber& fiber, const void* p, uint32_t bytes, uint8_t flags, Place place) {
  const Clock clock{fiber.actor, fiber.now, fiber.known};
  check_anywhere(p, bytes, {clock, flags, place});
  if (Block* block = block_of(p); block && block != fiber.block) race_visit(fiber, *block, place);
}

void race_visit(const Fiber& fiber, Block& block, Place place) {
  block.visitors[fiber.actor] = {fiber.now, place};
}

void race_clock(const Clock& clock, const void* p, uint32_t bytes, uint8_t flags, Place place) {
  check_anywhere(p, bytes, {clock, flags, place});
}

void report_misaligned(const void* p, uint32_t alignment, Site site) {
  const Block* block = block_of(p);
  fail(format("misaligned access by %s at %s: a multiple of %u bytes is needed, not %s",
              describe(*self()).c_str(), describe(site).c_str(), alignment,
              block ? format("shared address 0x%x", offset_in(block, p)).c_str()
                    : describe_global(p).c_str()));
}

void race_hook(const void* p, uint32_t bytes, bool write, uintptr_t pc) {
  Worker& w = *worker;
  Fiber& fiber = *self();
  if (w.expired()) {
    fail(format("%s runs without end: no wrapper was called for %u ms\n  it was at %s",
                describe(fiber).c_str(), w.launch->options.watchdog_ms,
                describe_code(pc - 1).c_str()));
  }
  const auto* byte = static_cast<const uint8_t*>(p);
  if (size_t(byte - fiber.stack_bottom) < STACK_BYTES) {
    // Registers of the GPU. Those of a running wgmma belong to it.
    if (!pending_product(fiber)) return;
    const Warpgroup& group = warpgroup_of(fiber);
    const uint32_t thread = fiber.id % WARPGROUP_THREADS;
    for (size_t i = 0; i < fiber.products - group.retired; i++) {
      const Product& product = *group.products[i];
      const auto* d = reinterpret_cast<const uint8_t*>(product.d[thread]);
      const auto* a = reinterpret_cast<const uint8_t*>(product.source[thread]);
      const bool accumulator = byte + bytes > d && byte < d + size_t(product.n) * 2;
      const bool operand = product.in_registers && write && byte + bytes > a && byte < a + 16;
      if (accumulator || operand) {
        fail(format("%s: the %s of the wgmma at %s is %s at %s before wgmma_wait",
                    describe(fiber).c_str(), accumulator ? "accumulator" : "register operand",
                    describe(product.site).c_str(), write ? "written" : "read",
                    describe_code(pc - 1).c_str()));
      }
    }
    return;
  }
  const uint8_t flags = write ? WRITE : READ;
  Block* block = block_of(p);
  const bool global = !block && in_device_memory(p);
  if (!block && !global) {
    if (in_image(p)) return;  // constants of the kernel file
    fail(format(
        "%s of %u bytes by %s at %s: address %p is neither shared memory nor in a device "
        "buffer%s",
        write ? "write" : "read", bytes, describe(fiber).c_str(), describe_code(pc - 1).c_str(), p,
        p < reinterpret_cast<void*>(PAGE_BYTES) ? " (a null pointer)" : ""));
  }
  const Clock clock{fiber.actor, fiber.now, fiber.known};
  if (global) {
    if (!owns(p, bytes)) {
      fail(format("%s out of bounds: %u bytes by %s at %s: %s", write ? "write" : "read", bytes,
                  describe(fiber).c_str(), describe_code(pc - 1).c_str(),
                  describe_global(p).c_str()));
    }
    check_global(p, bytes, {clock, flags, place_of_code(pc)});
    return;
  }
  const uint32_t address = offset_in(block, p);
  if (block != fiber.block && block->finished == block->threads) {
    fail(format("%s at %s uses shared memory of block %s, which has exited",
                describe(fiber).c_str(), describe_code(pc - 1).c_str(),
                describe(block->index).c_str()));
  }
  const bool dynamic = address >= DYNAMIC_BASE && address + bytes <= block->dynamic_end;
  const bool in_static =
      address >= block->dynamic_end + GAP_BYTES && address + bytes <= block->static_end;
  if (!dynamic && !in_static) {
    fail(
        format("%s out of bounds: %u bytes at shared address 0x%x by %s at %s; the launch gave "
               "%u bytes of dynamic shared memory, from 0x%x on",
               write ? "write" : "read", bytes, address, describe(fiber).c_str(),
               describe_code(pc - 1).c_str(), block->dynamic_end - DYNAMIC_BASE, DYNAMIC_BASE));
  }
  check_shared(*block, address, bytes, {clock, flags, place_of_code(pc)});
  if (block != fiber.block) race_visit(fiber, *block, place_of_code(pc));
}

// ---------------------------------------------------------------- order
void race_release(Fiber& fiber, Collected& to) {
  to.add(fiber.known, fiber.actor, fiber.now);
  fiber.now++;
}

void race_acquire(Fiber& fiber, const Known& known) { fiber.known = joined(fiber.known, known); }

void race_fence(Fiber& fiber, bool global) {
  (global ? fiber.global_fences : fiber.shared_fences).push_back(fiber.now++);
}

void race_threadfence(Fiber& fiber) {
  if (fiber.pending) {
    fiber.known = joined(fiber.known, fiber.pending);
    fiber.pending.reset();
  }
  fiber.released = raised(fiber.known, fiber.actor, fiber.now);
  fiber.now++;
}

Clock race_handover(Fiber& fiber, Actor actor, Tick tick) {
  Clock clock{actor, tick, raised(fiber.known, fiber.actor, fiber.now)};
  fiber.now++;
  return clock;
}

void race_atomic(Fiber& fiber, const void* p, uint32_t bytes, bool reads, bool writes, Order order,
                 Site site, const std::function<void()>& act) {
  const uint8_t reads_too = reads && writes ? READS_TOO : 0;
  race_thread(fiber, p, bytes, ATOMIC | (writes ? WRITE : READ) | reads_too, place_of(site));
  Launch& launch = *worker->launch;
  std::lock_guard lock(launch.mutex);
  act();
  auto& [team, last] = launch.atomics[reinterpret_cast<uintptr_t>(p)];
  if (reads && last) {
    const Known seen = team == worker->team ? last : joined_foreign(nullptr, team, last);
    if (order == Order::Acquire)
      fiber.known = joined(fiber.known, seen);
    else
      fiber.pending = joined(fiber.pending, seen);
  }
  if (writes) {
    Known given = fiber.released;
    if (order == Order::Release) {
      given = raised(fiber.known, fiber.actor, fiber.now);
      fiber.now++;
    }
    // An atomic read-modify-write continues the release sequence of the one before it.
    if (reads && last && team == worker->team)
      given = joined(given, last);
    else if (reads && last)
      given = joined_foreign(given, team, last);
    if (given || !reads) team = worker->team, last = given;
  }
}

}  // namespace simt
