// Logical time for the race detector: what each actor knows of every other one.
//
// An actor is a thread or something that works on its own: a TMA load's mbarrier, a thread's bulk
// stores, a warp's part of wgmma. Each counts ticks; `Known` says up to which tick of every actor
// the holder is ordered after. A known vector never changes once it is shared, so that all threads
// after one barrier share one vector and the usual join is the comparison of two pointers.
// Vector clocks: Fidge 1988, Mattern 1989; epochs: Flanagan & Freund, "FastTrack", PLDI 2009.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace simt {

using Tick = uint32_t;
using Actor = uint32_t;

struct Vector;
using Known = std::shared_ptr<const Vector>;

struct Vector {
  std::vector<Tick> ticks;  // by actor of the holder's team; missing ones are 0
  // By thread of that team: the groups of cp.async for which it has waited. They complete later
  // than they are issued, so that the thread's ticks cannot say when.
  std::vector<Tick> copies;
  // By other team: what came over atomics. These vectors have no foreign ones themselves, and the
  // holder's own team is never among them.
  std::map<uint32_t, Known> foreign;
  Tick at(Actor actor) const { return actor < ticks.size() ? ticks[actor] : 0; }
};

inline bool knows(const Vector* known, Actor actor, Tick tick) {
  return known && known->at(actor) >= tick;
}
inline bool knows(const Known& known, Actor actor, Tick tick) {
  return knows(known.get(), actor, tick);
}
inline bool knows_copy(const Vector* known, Actor thread, Tick group) {
  return known && thread < known->copies.size() && known->copies[thread] > group;
}
// The same of an actor of another team.
bool knows_foreign(const Vector* known, uint32_t team, Actor, Tick);
bool knows_foreign_copy(const Vector* known, uint32_t team, Actor thread, Tick group);

// The union of two vectors; `raised` also reaches `tick` of `actor`. Both return one of their
// arguments where nothing is added.
Known joined(const Known&, const Known&);
Known raised(const Known&, Actor, Tick);
Known raised_copies(const Known&, Actor thread, Tick groups);
// What a thread of team `team` makes of a vector of team `of`: its own team's part, which may have
// come back, are its ticks again.
Known seen_from(uint32_t team, uint32_t of, const Known&);

// As whom an access is made: a thread, or an asynchronous actor with the knowledge it started with.
struct Clock {
  Actor actor = 0;
  Tick tick = 0;
  Known known;
};

// Where releases are collected until someone acquires them: a barrier, a phase of an mbarrier.
class Collected {
 public:
  void add(const Known& known, Actor actor, Tick tick, Tick copies = 0) {
    add(known);
    raise(sum_->ticks, actor, tick);
    if (copies) raise(sum_->copies, actor, copies);
  }
  void add(const Known& known);
  Known take();  // and starts anew

 private:
  static void raise(std::vector<Tick>& ticks, Actor actor, Tick tick) {
    if (ticks.size() <= actor) ticks.resize(actor + 1);
    ticks[actor] = std::max(ticks[actor], tick);
  }
  std::shared_ptr<Vector> sum_;
  Known last_;  // already in the sum
};

}  // namespace simt
