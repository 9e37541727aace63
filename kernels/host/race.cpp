// The rules, line by line, and what a report says.
#include "race.h"

#include <bit>
#include <memory>
#include <mutex>

#include "device_memory.h"
#include "fault.h"
#include "shared.h"

namespace simt {

// ---------------------------------------------------------------- actors
void race_begin(Worker& w) {
  RaceTeam& team = w.race_team;
  const uint32_t blocks = w.launch->team_blocks;
  team.generation++;
  team.agents.clear();
  team.thread_actors = blocks * w.launch->block_threads;
  while (team.shared.size() < blocks) team.shared.emplace_back(WINDOW_BYTES / SharedLine::BYTES);
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

// ---------------------------------------------------------------- slots of either memory
static uint32_t team_of(const SharedSlot&, const Access& access) { return access.team; }
static uint32_t team_of(const GlobalSlot& slot, const Access&) { return slot.team; }

namespace {

enum class Verdict : uint8_t { Fine, Race, NotWaited, NoProxyFence, Uninitialised };

struct Conflict {
  Verdict verdict = Verdict::Fine;
  GlobalSlot other{};
  uint16_t bytes = 0;
};

}  // namespace

static Conflict conflict(Verdict verdict, const SharedSlot& slot, uint32_t team, uint16_t bytes) {
  return {verdict, {slot, team}, bytes};
}

// ---------------------------------------------------------------- the same lane of several warps
constexpr Actor WARPS = 8;  // bits of SharedSlot::warps

static Actor first_of(Actor thread) {
  return thread - thread / WARP_THREADS % WARPS * WARP_THREADS;
}
static uint8_t warp_bit(Actor thread) { return uint8_t(1u << thread / WARP_THREADS % WARPS); }

// Calls `f` with a slot for each of those who are in this one, until it is false.
template <class F>
static bool each_actor(const SharedSlot& slot, F&& f) {
  if (!slot.warps) return f(slot);
  SharedSlot one = slot;
  one.warps = 0;
  for (uint32_t warps = slot.warps; warps; warps &= warps - 1) {
    one.actor = slot.actor + Actor(std::countr_zero(warps)) * WARP_THREADS;
    if (!f(one)) return false;
  }
  return true;
}

static void record(SharedLine& line, const Access& access, uint16_t mask) {
  const bool read = access.flags == READ && access.actor < worker->race_team.thread_actors;
  if (read)
    line.push_back(
        {access.tick, access.place, first_of(access.actor), mask, READ, warp_bit(access.actor)});
  else
    line.push_back({access.tick, access.place, access.actor, mask, access.flags});
}
static void record(GlobalLine& line, const Access& access, uint16_t mask) {
  line.push_back({{access.tick, access.place, access.actor, mask, access.flags}, access.team});
}

// ---------------------------------------------------------------- rules
static bool ordered_one(const SharedSlot& slot, uint32_t team, const Access& access) {
  if (slot.flags & PENDING) {
    if (team != access.team) return knows_foreign_copy(access.known, team, slot.actor, slot.tick);
    return slot.actor == access.actor ? access.copies > slot.tick
                                      : knows_copy(access.known, slot.actor, slot.tick);
  }
  if (team != access.team) [[unlikely]] {
    const Actor actors = slot.flags & WARPGROUP ? 4 : 1;
    for (Actor actor = slot.actor; actor < slot.actor + actors; actor++)
      if (!knows_foreign(access.known, team, actor, slot.tick)) return false;
    return true;
  }
  // A thread's own accesses; those of one asynchronous operation.
  if (slot.actor == access.actor &&
      (slot.tick == access.tick || access.actor < worker->race_team.thread_actors))
    return true;
  if (!knows(access.known, slot.actor, slot.tick)) return false;
  if (!(slot.flags & WARPGROUP)) [[likely]]
    return true;
  for (Actor actor = slot.actor + 1; actor < slot.actor + 4; actor++)
    if (!knows(access.known, actor, slot.tick)) return false;
  return true;
}

static bool ordered(const SharedSlot& slot, uint32_t team, const Access& access) {
  if (!slot.warps) [[likely]]
    return ordered_one(slot, team, access);
  return each_actor(slot, [&](const SharedSlot& one) { return ordered_one(one, team, access); });
}

// Whether the thread that began a cp.async has not waited for it; it may have, and told nobody.
static bool pending(const SharedSlot& slot, uint32_t team, const Access& access) {
  return slot.flags & PENDING && slot.flags & WRITE && team == access.team &&
         thread_of(slot.actor)->copies_done <= slot.tick;
}

// An asynchronous access after an ordinary store needs a proxy fence of the writer after the
// store, and has to be ordered after that fence as well.
static bool fenced(const SharedSlot& slot, uint32_t team, const Access& access, bool shared) {
  if (slot.flags & ASYNC || team != access.team) return true;
  const Fiber& writer = *thread_of(slot.actor);
  const std::vector<Tick>& fences = shared ? writer.shared_fences : writer.global_fences;
  Tick tick = slot.tick;
  if (slot.flags & PENDING) {
    const std::vector<std::pair<uint32_t, Tick>>& waits = writer.copy_waits;
    const auto wait = std::upper_bound(
        waits.begin(), waits.end(), slot.tick,
        [](Tick group, const std::pair<uint32_t, Tick>& wait) { return group < wait.first; });
    if (wait == waits.end()) return false;
    tick = wait->second;
  }
  const auto fence = std::lower_bound(fences.begin(), fences.end(), tick);
  return fence != fences.end() && knows(access.known, slot.actor, *fence + 1);
}

// Of neighbours that made several reads, only the latest counts, byte by byte.
static void forget_earlier(std::vector<SameReads>& entries, const SameReads& of) {
  const auto neighbour = [&](const SameReads& read) {
    return read.first == of.first && read.team == of.team && read.flags == of.flags;
  };
  for (size_t later = entries.size() - 1; later > 0; later--) {
    if (!neighbour(entries[later])) continue;
    for (size_t i = 0; i < later; i++) {
      const bool replaced = neighbour(entries[i]) && entries[i].tick <= entries[later].tick &&
                            !(entries[i].mask & ~entries[later].mask);
      if (replaced) entries[i].lanes &= ~entries[later].lanes;
    }
  }
  std::erase_if(entries, [](const SameReads& read) { return !read.lanes; });
}

// A read where there are many: the same read of neighbours is one entry.
static void add_read(Reads& reads, const SharedSlot& slot, uint32_t team) {
  constexpr Actor TOGETHER = 32;
  constexpr uint32_t MANY = 12;  // entries of the same neighbours
  std::vector<SameReads>& entries = reads.entries;
  const uint16_t mask = slot.mask;
  const uint32_t bit = 1u << slot.actor % TOGETHER;
  const SameReads mine{team, slot.tick, slot.place, slot.actor / TOGETHER * TOGETHER,
                       bit,  mask,      slot.flags};
  // Reads of two other teams: whoever writes here has to be ordered after both, and one more adds
  // hardly anything.
  const auto& [one, two] = reads.teams;
  if (!(mask & ~(one.mask & two.mask)) && one.team != mine.team && two.team != mine.team) return;
  uint32_t neighbours = 0;
  SameReads* unused = nullptr;
  for (size_t i = entries.size(); i-- > 0;) {
    SameReads& other = entries[i];
    if (other.first != mine.first || other.team != mine.team || other.flags != mine.flags) continue;
    if (other.tick == mine.tick && other.place == mine.place && other.mask == mine.mask) {
      other.lanes |= bit;
      return;
    }
    neighbours++;
    if (other.lanes == bit && other.tick <= mine.tick && !(other.mask & ~mask)) unused = &other;
  }
  if (unused) {
    *unused = mine;
    return;
  }
  entries.push_back(mine);
  for (auto& known : reads.teams) {
    if (known.mask && known.team != mine.team) continue;
    known.team = mine.team;
    known.mask |= mask;
    break;
  }
  if (neighbours >= MANY) forget_earlier(entries, mine);
}

// A write has to be ordered after each of them, and then replaces them.
static Conflict check_reads(Reads& reads, const Access& access, uint16_t mask) {
  for (SameReads& read : reads.entries) {
    if (!(read.mask & mask)) continue;
    for (uint32_t lanes = read.lanes; lanes; lanes &= lanes - 1) {
      const Actor actor = read.first + Actor(std::countr_zero(lanes));
      const SharedSlot slot{read.tick, read.place, actor, read.mask, read.flags};
      if (!ordered(slot, read.team, access))
        return conflict(Verdict::Race, slot, read.team, read.mask & mask);
    }
    read.mask &= ~mask;
  }
  std::erase_if(reads.entries, [](const SameReads& read) { return !read.mask; });
  for (auto& team : reads.teams) team.mask &= ~mask;
  return {};
}

// Once there is a table, all reads of threads are in it.
template <class L>
static void move_reads(L& line, const Access& access) {
  typename L::Slot* slots = line.slots();
  const uint32_t size = line.size();
  uint32_t kept = 0;
  for (uint32_t i = 0; i < size; i++) {
    if (!(slots[i].flags & ~PENDING) && slots[i].actor < worker->race_team.thread_actors)
      each_actor(slots[i], [&](const SharedSlot& one) {
        add_read(line.reads(), one, team_of(slots[i], access));
        return true;
      });
    else
      slots[kept++] = slots[i];
  }
  line.shrink(kept);
}

template <class L>
static Conflict check(L& line, const Access& access, uint16_t mask) {
  using Slot = typename L::Slot;
  constexpr bool SHARED_MEMORY = std::is_same_v<L, SharedLine>;
  const bool write = access.flags & WRITE;
  if (write && line.has_reads())
    if (Conflict found = check_reads(line.reads(), access, mask); found.verdict != Verdict::Fine)
      return found;
  bool recorded = false;
  uint32_t other_team = access.team;  // one that has read all of these bytes
  const uint32_t size = line.size();
  uint32_t kept = 0;
  if (size) {
    Slot* slots = line.slots();
    for (uint32_t i = 0; i < size; i++) {
      Slot& slot = slots[i];
      const uint16_t common = slot.mask & mask;
      if (common) {
        const uint32_t team = team_of(slot, access);
        const bool slot_writes = slot.flags & WRITE;
        const bool both_atomic = slot.flags & access.flags & ATOMIC;
        if ((write || slot_writes) && !both_atomic) {
          if (!ordered(slot, team, access)) {
            each_actor(slot, [&](const SharedSlot& one) {  // the first of them that is not
              if (ordered_one(one, team, access)) return true;
              static_cast<SharedSlot&>(slot) = one;
              return false;
            });
            const bool not_waited = pending(slot, team, access);
            return conflict(not_waited ? Verdict::NotWaited : Verdict::Race, slot, team, common);
          }
          if (access.flags & ASYNC && slot_writes && !fenced(slot, team, access, SHARED_MEMORY))
            return conflict(Verdict::NoProxyFence, slot, team, common);
        }
        const bool earlier_read = !write && !slot_writes;
        if (earlier_read && team != access.team && slot.mask == (slot.mask | mask)) {
          // Reads of two other teams: whoever writes here is unordered with one of them.
          if (other_team != access.team && other_team != team) recorded = true;
          other_team = team;
        }
        // What this access replaces: all that a write is ordered after, the earlier reads of a
        // read.
        const bool same_read = SHARED_MEMORY && slot.warps && slot.mask == mask &&
                               slot.tick == access.tick && slot.place == access.place &&
                               access.flags == READ && slot.actor == first_of(access.actor) &&
                               access.actor < worker->race_team.thread_actors;
        if (same_read) {
          slot.warps |= warp_bit(access.actor);
          recorded = true;
        } else if (write ? !both_atomic : earlier_read && ordered(slot, team, access)) {
          slot.mask &= ~mask;
          if (!slot.mask) continue;
        } else if (both_atomic && slot.actor == access.actor && team == access.team &&
                   slot.mask == mask && slot.flags == access.flags) {
          slot.tick = access.tick;
          recorded = true;
        }
      }
      if (kept != i) slots[kept] = slot;
      kept++;
    }
    if (kept != size) line.shrink(kept);
  }
  if constexpr (SHARED_MEMORY) {
    const bool reads = !write || access.flags & READS_TOO;
    if (reads && (line.initialised & mask) != mask)
      return {Verdict::Uninitialised, {}, uint16_t(mask & ~line.initialised)};
    if (write) line.initialised |= mask;
  }
  if (recorded) return {};
  const bool by_thread =
      !(access.flags & ~PENDING) && access.actor < worker->race_team.thread_actors;
  if (by_thread && (line.has_reads() || kept >= L::INLINE_SLOTS)) {
    if (!line.has_reads()) move_reads(line, access);
    add_read(line.reads(), {access.tick, access.place, access.actor, mask, access.flags},
             access.team);
  } else {
    record(line, access, mask);
  }
  return {};
}

// ---------------------------------------------------------------- reports
static const char* verb(uint8_t flags) {  // with its article
  if (flags & ATOMIC) return "an atomic access";
  if (flags & ASYNC) return flags & WRITE ? "an asynchronous write" : "an asynchronous read";
  return flags & WRITE ? "a write" : "a read";
}

static const char* title(Verdict verdict) {
  switch (verdict) {
    case Verdict::Fine: return "nothing wrong with";
    case Verdict::Race: return "data race on";
    case Verdict::NotWaited: return "cp.async that was not waited for:";
    case Verdict::NoProxyFence:
      return "no fence.proxy.async between an ordinary write and an asynchronous access:";
    case Verdict::Uninitialised: return "read of uninitialised";
  }
  return "?";
}

[[noreturn]] static void report(const Conflict& found, const std::string& where,
                                const Access& access) {
  const GlobalSlot& other = found.other;
  const std::string me = name_of(access.actor, access.team), here = describe(access.place);
  const std::string one = format("%s %s\n  %s by %s at %s", title(found.verdict), where.c_str(),
                                 verb(access.flags), me.c_str(), here.c_str());
  if (found.verdict == Verdict::Uninitialised) fail(one);
  fail(format("%s\n  after %s by %s at %s%s", one.c_str(), verb(other.flags),
              name_of(other.actor, other.team).c_str(), describe(other.place).c_str(),
              found.verdict == Verdict::Race ? ", with nothing that orders the two" : ""));
}

[[noreturn]] static void report_shared(const Conflict& found, const Block& block, uint32_t line,
                                       const Access& access) {
  const uint32_t at = line * SharedLine::BYTES + uint32_t(std::countr_zero(found.bytes));
  report(found, format("shared memory 0x%x of block %s", at, describe(block.index).c_str()),
         access);
}

// ---------------------------------------------------------------- accesses
// The bytes of [address, end) that lie in its first line.
template <class T>
static uint16_t first_mask(T address, T end) {
  constexpr uint32_t ALL = 0xffff;
  const auto first = uint32_t(address % SharedLine::BYTES);
  const uint32_t from = ALL << first;
  const T count = end - address + first;
  return uint16_t(count >= SharedLine::BYTES ? from : from & ~(ALL << count));
}

static void check_shared_line(Block& block, std::vector<SharedLine>& lines, uint32_t index,
                              uint16_t mask, const Access& access) {
  SharedLine& line = lines[index];
  line.start(worker->race_team.generation);
  if (const Conflict found = check(line, access, mask); found.verdict != Verdict::Fine)
    report_shared(found, block, index, access);
}

void SharedAccesses::line(uint32_t address) {
  const RaceTeam& team = worker->race_team;
  const uint32_t index = address / SharedLine::BYTES;
  SharedLine& line = const_cast<SharedLine&>(team.shared[block_.rank][index]);
  line.start(team.generation);
  if (repeat_.applies(line)) return;
  repeat_.before(line);
  if (const Conflict found = check(line, access_, 0xffff); found.verdict != Verdict::Fine)
    report_shared(found, block_, index, access_);
  repeat_.after(line);
}

void check_shared(Block& block, uint32_t address, uint32_t bytes, const Access& access) {
  std::vector<SharedLine>& lines = worker->race_team.shared[block.rank];
  const uint32_t end = address + bytes;
  uint32_t index = address / SharedLine::BYTES;
  check_shared_line(block, lines, index, first_mask(address, end), access);
  for (index++; index * SharedLine::BYTES < end; index++)
    check_shared_line(block, lines, index, first_mask(index * SharedLine::BYTES, end), access);
}

void check_shared_rows(Block& block, Fiber* const* lanes, const uint32_t* addresses, uint32_t count,
                       uint8_t flags, Place place) {
  std::vector<SharedLine>& lines = worker->race_team.shared[block.rank];
  for (uint32_t i = 0; i < count; i++) {
    const Access access(*lanes[i], flags, place);
    check_shared_line(block, lines, addresses[i] / SharedLine::BYTES, 0xffff, access);
  }
}

// The lines of [address, end), which are of one page; the first that is not fine, or null.
static GlobalLine* check_page(uintptr_t address, uintptr_t end, const Access& access,
                              Conflict& found) {
  constexpr uint16_t ALL = 0xffff;
  ShadowPage& page = shadow_page(address);
  const uint32_t generation = worker->launch->generation;
  std::lock_guard lock(page.lock);
  Repeat<GlobalLine> repeat;
  GlobalLine* line = &page.lines[address % SHADOW_PAGE_BYTES / GlobalLine::BYTES];
  for (; address < end; line++) {
    const uint16_t mask = first_mask(address, end);
    address = (address / GlobalLine::BYTES + 1) * GlobalLine::BYTES;
    line->start(generation);
    const bool many = mask == ALL && end >= address + GlobalLine::BYTES;
    if (mask == ALL && repeat.applies(*line)) continue;
    if (many) repeat.before(*line);
    found = check(*line, access, mask);
    if (found.verdict != Verdict::Fine) return line;
    if (many) repeat.after(*line);
  }
  return nullptr;
}

void check_global(const void* p, uint32_t bytes, const Access& access) {
  auto address = reinterpret_cast<uintptr_t>(p);
  const uintptr_t end = address + bytes;
  while (address < end) {
    const uintptr_t next = min(end, (address / SHADOW_PAGE_BYTES + 1) * SHADOW_PAGE_BYTES);
    Conflict found;
    if (const GlobalLine* line = check_page(address, next, access, found)) {
      const auto index = size_t(line - shadow_page(address).lines);
      const uintptr_t at = address / SHADOW_PAGE_BYTES * SHADOW_PAGE_BYTES +
                           index * GlobalLine::BYTES + uintptr_t(std::countr_zero(found.bytes));
      report(found, describe_global(reinterpret_cast<const void*>(at)), access);
    }
    address = next;
  }
}

void race_thread(Fiber& fiber, const void* p, uint32_t bytes, uint8_t flags, Place place) {
  const Access access(fiber, flags, place);
  Block* block = block_of(p);
  if (!block) return check_global(p, bytes, access);
  check_shared(*block, offset_in(block, p), bytes, access);
  if (block != fiber.block) race_visit(fiber, *block, place);
}

void race_clock(const Clock& clock, const void* p, uint32_t bytes, uint8_t flags, Place place) {
  Block* block = block_of(p);
  if (!block) return check_global(p, bytes, Access(clock, flags, place));
  const uint32_t address = offset_in(block, p);
  if ((address | bytes) % SharedLine::BYTES)
    return check_shared(*block, address, bytes, Access(clock, flags, place));
  SharedAccesses accesses(*block, clock, flags, place);
  for (uint32_t offset = 0; offset < bytes; offset += SharedLine::BYTES)
    accesses.line(address + offset);
}

}  // namespace simt
