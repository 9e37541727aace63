// What the lanes of a warp do together: shuffles, votes, matrices in fragments.
//
// Each lane leaves the address of its arguments; the last one to arrive acts for all. That gives no
// order between the lanes' other accesses (only __syncwarp does).
#include <cstring>
#include <utility>

#include "fault.h"
#include "order.h"
#include "race.h"
#include "shared.h"

namespace simt {

static const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::Shuffle: return "shuffle";
    case Collective::Vote: return "vote";
    case Collective::Syncwarp: return "__syncwarp";
    case Collective::Elect: return "elect_one";
    case Collective::Ldmatrix: return "ldmatrix";
    case Collective::Stmatrix: return "stmatrix";
    case Collective::Mma: return "mma";
    case Collective::Setmaxnreg: return "setmaxnreg";
  }
  return "?";
}

template <class F>
static void each_lane(uint32_t mask, F&& f) {
  for (; mask; mask &= mask - 1) f(uint32_t(__builtin_ctz(mask)));
}

// PTX leaves these undefined when a lane has exited; shuffles and votes go on without it.
static bool needs_whole_warp(Collective kind) {
  return kind == Collective::Ldmatrix || kind == Collective::Stmatrix || kind == Collective::Mma ||
         kind == Collective::Setmaxnreg;
}

static void hold(Warp& warp, Meeting& meeting) {
  const uint32_t arrived = std::exchange(meeting.arrived, 0);
  if (!meeting.act) return;
  void* arguments[WARP_THREADS];
  std::memcpy(arguments, meeting.argument, sizeof arguments);
  meeting.act(warp, arrived, arguments);
}

void leave_meetings(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  for (Meeting& meeting : warp.meetings) {
    const uint32_t arrived = meeting.arrived;
    if (!arrived || !(meeting.mask >> fiber.id % WARP_THREADS & 1)) continue;
    if (needs_whole_warp(meeting.kind))
      fail_at(fiber, name_of(meeting.kind), meeting.site,
              format("it needs all 32 lanes, and lane %u exits instead", fiber.id % WARP_THREADS));
    if (meeting.mask & ~warp.exited & ~arrived) continue;
    hold(warp, meeting);
    each_lane(arrived, [&](uint32_t lane) { make_ready(warp.lanes[lane]); });
  }
}

void meet(Collective kind, uint32_t mask, void* argument, Act act, Site site) {
  Fiber& fiber = *self();
  Warp& warp = *fiber.warp;
  const uint32_t lane = fiber.id % WARP_THREADS, bit = 1u << lane;
  if (!(mask & bit)) {
    fail_at(fiber, name_of(kind), site, format("the calling lane is not in the mask %08x", mask));
  }
  const bool whole_warp = needs_whole_warp(kind);
  if (whole_warp && warp.exists != ~0u)
    fail_at(fiber, name_of(kind), site,
            "it needs all 32 lanes, and the block's last warp is short");
  if (whole_warp && warp.exited)
    fail_at(fiber, name_of(kind), site,
            format("it needs all 32 lanes, and the lanes %08x have exited", warp.exited));
  mask &= warp.exists;  // the last warp of a block may be short
  Meeting* meeting = nullptr;
  Meeting* unused = nullptr;
  bool others = false;
  for (Meeting& other : warp.meetings) {
    if (!other.arrived) {
      unused = &other;
    } else if (other.mask == mask && other.kind == kind && other.site.line == site.line &&
               !(other.arrived & bit) && !meeting) {
      meeting = &other;
    } else {
      others = true;
    }
  }
  if (!meeting) {
    if (!unused) unused = &warp.meetings.emplace_back();
    meeting = unused;
    meeting->mask = mask;
    meeting->kind = kind;
    meeting->act = act;
    meeting->site = site;
  }
  // Halves of a warp may be at different places, as long as neither waits for the other.
  for (const Meeting& other : warp.meetings) {
    if (!others) [[likely]]
      break;
    if (&other == meeting || !other.arrived) continue;
    const uint32_t together = meeting->arrived | bit;
    const bool waits_for_other = mask & ~together & other.arrived;
    const bool awaited_by_other = other.mask & ~other.arrived & together;
    if (waits_for_other && awaited_by_other) {
      fail_at(
          fiber, name_of(kind), site,
          format("the warp has diverged: lanes %08x wait in %s (mask %08x) at %s, each side for "
                 "the other",
                 other.arrived, name_of(other.kind), other.mask, describe(other.site).c_str()));
    }
  }
  meeting->argument[lane] = argument;
  meeting->arrived |= bit;
  const uint32_t arrived = meeting->arrived;
  if (mask & ~warp.exited & ~arrived) {
    block_on(Wait::Collective, &warp, uint64_t(kind), site);
    return;
  }
  hold(warp, *meeting);
  each_lane(arrived & ~bit, [&](uint32_t other) { make_ready(warp.lanes[other]); });
}

// ---------------------------------------------------------------- shuffles, votes
struct ShuffleArgument {
  uint32_t value, result;
  Shuffle kind;
  int lane, width;
  Site site;
};

static int source_lane(const ShuffleArgument& argument, int lane) {
  const int segment = lane & ~(argument.width - 1), end = segment + argument.width;
  int source = lane;
  switch (argument.kind) {
    case Shuffle::Index: return segment + (argument.lane & (argument.width - 1));
    case Shuffle::Up: source = lane - argument.lane; return source < segment ? lane : source;
    case Shuffle::Down: source = lane + argument.lane; break;
    case Shuffle::Xor: source = lane ^ argument.lane; break;
  }
  return source >= end ? lane : source;
}

uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, int lane, int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail_at(*self(), "shuffle", site, format("width %d is not a power of two up to 32", width));
  constexpr uint32_t UNDEFINED = 0xdeadbeef;  // the source lane takes no part
  ShuffleArgument argument{value, UNDEFINED, kind, lane, width, site};
  meet(
      Collective::Shuffle, mask, &argument,
      [](Warp& warp, uint32_t mask, void** arguments) {
        each_lane(mask, [&](uint32_t lane) {
          auto& mine = *static_cast<ShuffleArgument*>(arguments[lane]);
          const int source = source_lane(mine, int(lane));
          if (warp.exited >> source & 1)
            fail_at(*warp.lanes[lane], "shuffle", mine.site,
                    format("lane %d, whose value it takes, has exited", source));
          if (mask >> source & 1)
            mine.result = static_cast<ShuffleArgument*>(arguments[source])->value;
        });
      },
      site);
  return argument.result;
}

struct VoteArgument {
  int predicate;
  uint32_t result;
};

uint32_t ballot(uint32_t mask, int predicate, Site site) {
  VoteArgument argument{predicate, 0};
  meet(
      Collective::Vote, mask, &argument,
      [](Warp&, uint32_t mask, void** arguments) {
        uint32_t result = 0;
        each_lane(mask, [&](uint32_t lane) {
          if (static_cast<VoteArgument*>(arguments[lane])->predicate) result |= 1u << lane;
        });
        each_lane(mask, [&](uint32_t lane) {
          static_cast<VoteArgument*>(arguments[lane])->result = result;
        });
      },
      site);
  return argument.result;
}

// ---------------------------------------------------------------- 8x8 matrices
struct MatrixArgument {
  uint32_t* registers;
  uint8_t* row;
  int count;
  bool transposed;
  Site site;
};

constexpr uint32_t MATRIX_ROW_BYTES = 16;

static void check_matrix_row(const Fiber& fiber, const MatrixArgument& argument, const char* what) {
  if (reinterpret_cast<uintptr_t>(argument.row) % MATRIX_ROW_BYTES) [[unlikely]] {
    fail_at(fiber, what, argument.site, "the row's address is not a multiple of 16");
  }
  check_own_block(fiber, argument.row, what, argument.site);
  checked_shared(argument.row, MATRIX_ROW_BYTES, what, argument.site);
}

// Lanes 8j to 8j+7 give the rows of matrix j.
static void matrix_rows(Warp& warp, void** arguments, int count, bool write, uint16_t** rows) {
  Block& block = *warp.lanes[0]->block;
  uint32_t addresses[WARP_THREADS];
  const auto lanes = uint32_t(count * 8);
  for (uint32_t lane = 0; lane < lanes; lane++) {
    const auto& argument = *static_cast<MatrixArgument*>(arguments[lane]);
    check_matrix_row(*warp.lanes[lane], argument, write ? "stmatrix" : "ldmatrix");
    addresses[lane] = offset_in(&block, argument.row);
    rows[lane] = reinterpret_cast<uint16_t*>(argument.row);
  }
  if (!worker->race) return;
  const Site site = static_cast<MatrixArgument*>(arguments[0])->site;
  check_shared_rows(block, warp.lanes, addresses, lanes, write ? WRITE : READ, place_of(site));
}

static void load_matrices(Warp& warp, uint32_t, void** arguments) {
  const auto& first = *static_cast<MatrixArgument*>(arguments[0]);
  uint16_t* all[WARP_THREADS];
  matrix_rows(warp, arguments, first.count, false, all);
  for (int matrix = 0; matrix < first.count; matrix++) {
    const uint16_t* const* rows = all + matrix * 8;
    for (int lane = 0; lane < 32; lane++) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = first.transposed ? rows[column][row] : rows[row][column];
      const uint32_t high = first.transposed ? rows[column + 1][row] : rows[row][column + 1];
      static_cast<MatrixArgument*>(arguments[lane])->registers[matrix] = low | high << 16;
    }
  }
}

static void store_matrices(Warp& warp, uint32_t, void** arguments) {
  const auto& first = *static_cast<MatrixArgument*>(arguments[0]);
  uint16_t* all[WARP_THREADS];
  matrix_rows(warp, arguments, first.count, true, all);
  for (int matrix = 0; matrix < first.count; matrix++) {
    uint16_t* const* rows = all + matrix * 8;
    for (int lane = 0; lane < 32; lane++) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t pair = static_cast<MatrixArgument*>(arguments[lane])->registers[matrix];
      (first.transposed ? rows[column][row] : rows[row][column]) = uint16_t(pair);
      (first.transposed ? rows[column + 1][row] : rows[row][column + 1]) = uint16_t(pair >> 16);
    }
  }
}

static void move_matrices(Collective kind, uint32_t* registers, const void* row, int count,
                          bool transposed, Site site) {
  MatrixArgument argument{registers, static_cast<uint8_t*>(const_cast<void*>(row)), count,
                          transposed, site};
  meet(kind, ~0u, &argument, kind == Collective::Ldmatrix ? load_matrices : store_matrices, site);
}

// ---------------------------------------------------------------- mma
struct MmaArgument {
  float* d;
  const uint32_t *a, *b;
};

typedef float Eight __attribute__((vector_size(32)));

// Lane l holds row l/4 (and l/4 + 8), columns 2 (l%4) and the next: pairs of bf16 are moved whole,
// and split into the even and the odd k for all lanes at once.
EVERY_X86 static void multiply_all(void** arguments) {
  constexpr int M = 16, PAIRS = 8, N = 8, TOGETHER = 4;
  uint32_t a[M][PAIRS], b[PAIRS][N];
  float a_even[M][PAIRS], a_odd[M][PAIRS];
  Eight b_even[PAIRS], b_odd[PAIRS], d[M];
  auto* const columns = reinterpret_cast<float(*)[N]>(d);
  for (int lane = 0; lane < 32; lane++) {
    const auto& mine = *static_cast<MmaArgument*>(arguments[lane]);
    const int group = lane / 4, quad = lane % 4;
    for (int i = 0; i < 4; i++) a[group + i % 2 * 8][quad + i / 2 * 4] = mine.a[i];
    for (int i = 0; i < 2; i++) b[quad + i * 4][group] = mine.b[i];
    for (int i = 0; i < 2; i++)
      std::memcpy(&columns[group + i * 8][quad * 2], mine.d + i * 2, 2 * sizeof(float));
  }
  for (int m = 0; m < M; m++)
    for (int pair = 0; pair < PAIRS; pair++) {
      a_even[m][pair] = __uint_as_float(a[m][pair] << 16);
      a_odd[m][pair] = __uint_as_float(a[m][pair] & 0xffff0000u);
    }
  for (int pair = 0; pair < PAIRS; pair++)
    for (int n = 0; n < N; n++) {
      b_even[pair][n] = __uint_as_float(b[pair][n] << 16);
      b_odd[pair][n] = __uint_as_float(b[pair][n] & 0xffff0000u);
    }
  for (int m = 0; m < M; m += TOGETHER) {
    Eight sum[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) sum[i] = d[m + i];
    for (int pair = 0; pair < PAIRS; pair++) {
      for (int i = 0; i < TOGETHER; i++) sum[i] += a_even[m + i][pair] * b_even[pair];
      for (int i = 0; i < TOGETHER; i++) sum[i] += a_odd[m + i][pair] * b_odd[pair];
    }
    for (int i = 0; i < TOGETHER; i++) d[m + i] = sum[i];
  }
  for (int lane = 0; lane < 32; lane++) {
    auto& mine = *static_cast<MmaArgument*>(arguments[lane]);
    for (int i = 0; i < 2; i++)
      std::memcpy(mine.d + i * 2, &columns[lane / 4 + i * 8][lane % 4 * 2], 2 * sizeof(float));
  }
}

static void multiply(Warp&, uint32_t, void** arguments) { multiply_all(arguments); }

// ---------------------------------------------------------------- setmaxnreg
struct RegisterArgument {
  int registers;
  bool increase, granted;
  Site site;
};

// Whether the warp has that many now.
static bool take_registers(Block& block, uint32_t warp, uint32_t wanted) {
  uint32_t& now = block.warp_registers[warp];
  if (wanted > now && (wanted - now) * WARP_THREADS > block.free_registers) return false;
  block.free_registers -= (wanted - now) * WARP_THREADS;  // modulo 2^32
  now = wanted;
  return true;
}

static void change_registers(Warp& warp, uint32_t, void** arguments) {
  const auto& first = *static_cast<RegisterArgument*>(arguments[0]);
  Fiber& fiber = *warp.lanes[0];
  Block& block = *fiber.block;
  const uint32_t now = block.warp_registers[fiber.id / WARP_THREADS];
  const auto wanted = uint32_t(first.registers);
  // In a small block the compiler decides how many registers a thread starts with.
  const bool known = block.threads > REGISTERS / 256;
  if (known && (first.increase ? wanted < now : wanted > now)) {
    fail_at(fiber, "setmaxnreg", first.site,
            format("the warp has %u registers a thread: %s cannot make it %u", now,
                   first.increase ? "an increase" : "a decrease", wanted));
  }
  const bool granted = take_registers(block, fiber.id / WARP_THREADS, wanted);
  for (int lane = 0; lane < 32; lane++)
    static_cast<RegisterArgument*>(arguments[lane])->granted = granted;
}

void setmaxnreg(int registers, bool increase, Site site) {
  RegisterArgument argument{registers, increase, false, site};
  meet(Collective::Setmaxnreg, ~0u, &argument, change_registers, site);
  if (argument.granted) return;
  // Each lane looks on its own: a second meeting would look like progress, for ever.
  const Fiber& fiber = *self();
  while (!take_registers(*fiber.block, fiber.id / WARP_THREADS, uint32_t(registers)))
    yield("setmaxnreg: no registers are free;", site);
}

}  // namespace simt

using namespace simt;

void __syncwarp(uint32_t mask, Site site) {
  meet(
      Collective::Syncwarp, mask, nullptr,
      [](Warp& warp, uint32_t mask, void**) {
        if (!worker->race) return;
        Collected all;
        each_lane(mask, [&](uint32_t lane) { race_release(*warp.lanes[lane], all); });
        const Known known = all.take();
        each_lane(mask, [&](uint32_t lane) { warp.lanes[lane]->known = known; });
      },
      site);
}

bool elect_one(Site site) {
  bool elected = false;
  meet(
      Collective::Elect, ~0u, &elected,
      [](Warp&, uint32_t mask, void** arguments) {
        *static_cast<bool*>(arguments[__builtin_ctz(mask)]) = true;
      },
      site);
  return elected;
}

void ldmatrix_x1(uint32_t (&d)[1], const void* row, Site site) {
  move_matrices(Collective::Ldmatrix, d, row, 1, false, site);
}
void ldmatrix_x2(uint32_t (&d)[2], const void* row, Site site) {
  move_matrices(Collective::Ldmatrix, d, row, 2, false, site);
}
void ldmatrix_x4(uint32_t (&d)[4], const void* row, Site site) {
  move_matrices(Collective::Ldmatrix, d, row, 4, false, site);
}
void ldmatrix_x1_trans(uint32_t (&d)[1], const void* row, Site site) {
  move_matrices(Collective::Ldmatrix, d, row, 1, true, site);
}
void ldmatrix_x2_trans(uint32_t (&d)[2], const void* row, Site site) {
  move_matrices(Collective::Ldmatrix, d, row, 2, true, site);
}
void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row, Site site) {
  move_matrices(Collective::Ldmatrix, d, row, 4, true, site);
}
void stmatrix_x1(void* row, const uint32_t (&s)[1], Site site) {
  move_matrices(Collective::Stmatrix, const_cast<uint32_t*>(s), row, 1, false, site);
}
void stmatrix_x2(void* row, const uint32_t (&s)[2], Site site) {
  move_matrices(Collective::Stmatrix, const_cast<uint32_t*>(s), row, 2, false, site);
}
void stmatrix_x4(void* row, const uint32_t (&s)[4], Site site) {
  move_matrices(Collective::Stmatrix, const_cast<uint32_t*>(s), row, 4, false, site);
}
void stmatrix_x1_trans(void* row, const uint32_t (&s)[1], Site site) {
  move_matrices(Collective::Stmatrix, const_cast<uint32_t*>(s), row, 1, true, site);
}
void stmatrix_x2_trans(void* row, const uint32_t (&s)[2], Site site) {
  move_matrices(Collective::Stmatrix, const_cast<uint32_t*>(s), row, 2, true, site);
}
void stmatrix_x4_trans(void* row, const uint32_t (&s)[4], Site site) {
  move_matrices(Collective::Stmatrix, const_cast<uint32_t*>(s), row, 4, true, site);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MmaArgument argument{d, a, b};
  meet(Collective::Mma, ~0u, &argument, multiply, site);
}
