// Joins of vectors. The one-entry caches serve the usual case: a warpgroup's threads, one after
// the other, join the same two vectors.
#include "clock.h"

namespace simt {

bool knows_foreign(const Vector* known, uint32_t team, Actor actor, Tick tick) {
  if (!known) return false;
  const auto other = known->foreign.find(team);
  return other != known->foreign.end() && knows(other->second, actor, tick);
}

bool knows_foreign_copy(const Vector* known, uint32_t team, Actor thread, Tick group) {
  if (!known) return false;
  const auto other = known->foreign.find(team);
  return other != known->foreign.end() && knows_copy(other->second.get(), thread, group);
}

static void join_ticks(std::vector<Tick>& sum, const std::vector<Tick>& other) {
  if (sum.size() < other.size()) sum.resize(other.size());
  Tick* to = sum.data();
  const Tick* from = other.data();
  for (size_t i = 0; i < other.size(); i++) to[i] = std::max(to[i], from[i]);
}

static void join_into(Vector& sum, const Vector& other) {
  join_ticks(sum.ticks, other.ticks);
  join_ticks(sum.copies, other.copies);
  for (const auto& [team, known] : other.foreign) {
    Known& mine = sum.foreign[team];
    mine = joined(mine, known);
  }
}

Known joined(const Known& a, const Known& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  static thread_local Known left, right, result;
  if (left == a && right == b) return result;
  auto sum = std::make_shared<Vector>(*a);
  join_into(*sum, *b);
  left = a, right = b, result = sum;
  return sum;
}

Known raised(const Known& known, Actor actor, Tick tick) {
  if (knows(known, actor, tick)) return known;
  static thread_local Known from, result;
  static thread_local Actor cached_actor;
  static thread_local Tick cached_tick;
  if (from == known && cached_actor == actor && cached_tick == tick && result) return result;
  auto sum = known ? std::make_shared<Vector>(*known) : std::make_shared<Vector>();
  if (sum->ticks.size() <= actor) sum->ticks.resize(actor + 1);
  sum->ticks[actor] = tick;
  from = known, cached_actor = actor, cached_tick = tick, result = sum;
  return sum;
}

Known raised_copies(const Known& known, Actor thread, Tick groups) {
  if (!groups || knows_copy(known.get(), thread, groups - 1)) return known;
  auto sum = known ? std::make_shared<Vector>(*known) : std::make_shared<Vector>();
  if (sum->copies.size() <= thread) sum->copies.resize(thread + 1);
  sum->copies[thread] = groups;
  return sum;
}

Known seen_from(uint32_t team, uint32_t of, const Known& known) {
  if (team == of || !known) return known;
  auto seen = std::make_shared<Vector>();
  if (const auto own = known->foreign.find(team); own != known->foreign.end())
    seen->ticks = own->second->ticks, seen->copies = own->second->copies;
  for (const auto& [third, its] : known->foreign)
    if (third != team) seen->foreign.emplace(third, its);
  auto theirs = std::make_shared<Vector>();
  theirs->ticks = known->ticks, theirs->copies = known->copies;
  seen->foreign.emplace(of, std::move(theirs));
  return seen;
}

void Collected::add(const Known& known) {
  if (!sum_) sum_ = std::make_shared<Vector>();
  if (known && known != last_) {
    join_into(*sum_, *known);
    last_ = known;
  }
}

Known Collected::take() {
  last_.reset();
  Known taken = std::move(sum_);
  sum_.reset();
  return taken;
}

}  // namespace simt
