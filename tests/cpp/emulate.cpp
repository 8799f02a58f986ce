// The machine behind emulate.h, and its record of who touched what. Compiled without the hooks that it implements.
#include "emulate.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>

namespace dmoe::emulate {
namespace {

// --- what a thread has been told
// An agent is a thread, the start of a thread block, or the copies that one barrier counts; agent 0 is what ran before the
// stream. Each counts its steps (ticks). An access is ordered before another if the second one's thread has been told of the
// tick in which the first happened.
struct Known {
  std::vector<uint32_t> seen, fenced;  // per agent; fenced: up to where a fence for the copy engine followed its writes
};
using Told = std::shared_ptr<const Known>;

struct Cta;

struct Fiber {
  ucontext_t context;
  int thread = 0;
  Cta* cta = nullptr;
  const uint32_t* waits_for = nullptr;  // resumed once *waits_for differs from `seen`
  uint32_t seen = 0, cluster_seen = 0;
  bool started = false, done = false, in_cluster_barrier = false;
  uint32_t agent = 0, now = 1, fenced = 0;
  Told told;
  Told engine;  // what the copies that it asks for may rely on: told at its last fence
  uint32_t engine_own = 0;

  bool knows(uint32_t other, uint32_t tick) const { return other == agent || tick <= told->seen[other]; }
};

void join(Known& into, const Known& from) {
  for (size_t i = 0; i < into.seen.size(); ++i) {
    into.seen[i] = std::max(into.seen[i], from.seen[i]);
    into.fenced[i] = std::max(into.fenced[i], from.fenced[i]);
  }
}

// What threads leave for those that come by later.
struct Channel {
  std::shared_ptr<Known> sum;
  std::vector<Told> from;  // all that is already in it

  void add(const Told& told) {
    if (!sum) {
      sum = std::make_shared<Known>(*told);
      from.push_back(told);
      return;
    }
    if (sum.use_count() > 1) sum = std::make_shared<Known>(*sum);
    if (std::find(from.begin(), from.end(), told) == from.end()) {
      join(*sum, *told);
      from.push_back(told);
    }
  }
  void publish(Fiber& f) {
    add(f.told);
    sum->seen[f.agent] = f.now;
    sum->fenced[f.agent] = f.fenced;
    ++f.now;
  }
};

std::map<std::pair<Told, Told>, Told> merged;

void tell(Fiber& f, const Channel& channel) {
  const Told news = channel.sum;
  if (!news || f.told == news) return;
  if (std::find(channel.from.begin(), channel.from.end(), f.told) != channel.from.end()) {
    f.told = news;
    return;
  }
  if (merged.size() > 256) merged.clear();
  Told& both = merged[{f.told, news}];
  if (!both) {
    auto sum = std::make_shared<Known>(*f.told);
    join(*sum, *news);
    both = sum;
  }
  f.told = both;
}

// A barrier of n threads. `generation` counts how often it has opened.
struct Meeting {
  int arrived = 0, expected = 0;
  uint32_t generation = 0;
  Channel gathering, opened;
};

struct Warp {
  Meeting meeting;
  alignas(16) char in[32][64], out[32][64];
};

// A barrier of bulk copies, as the hardware keeps it in eight bytes: phase, arrivals still due and bytes still due.
struct Phase {
  uint32_t generation : 8;
  uint32_t expected : 12;
  int32_t due : 12;
  int32_t bytes;
};
static_assert(sizeof(Phase) == 8);

struct Gate {
  Channel gathering, opened;
  uint32_t agent = 0, tick = 1, init_agent = 0, init_tick = 0, fence_tick = 0, generation = 0;
};

enum Kind { kRead, kWrite, kRelaxed, kOrdered };  // the last two: atomics without and with an order of memory

struct Touch {
  uint32_t agent, tick;
  Kind kind;
};

// Two bytes of memory: the last plain write, and what came after it.
struct Cell {
  uint32_t writer = 0, tick = 0;
  std::vector<Touch> reads, atomics;
};

constexpr int kGates = 16;

struct Cta {
  int launch, index, rank;
  char* shared;
  int64_t bytes;
  std::vector<Warp> warps;
  Meeting barriers[16];
  Meeting* cluster;
  std::vector<Cta*> peers;
  std::vector<Cell> cells;
  std::map<uint64_t*, Gate> gates;
  size_t first_fiber = 0;
  uint32_t agent = 0;  // of its start; those of its gates follow
  Told start;          // what its threads know when they start
  bool admitted = false, left = false, triggered = false;
  int running = 0;
};

struct Range {
  uintptr_t begin, end;
  std::string name;
  std::vector<Cell> cells;
};

struct Running {  // one launch
  const Launch* launch;
  std::vector<Cta*> ctas;
  size_t first_cta = 0, admitted = 0;
  uint32_t left = 0;
  uint32_t complete = 0;
  Told begin;     // what its threads know when they start
  Channel after;  // what it leaves behind
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t* barrier;
  Cta* cta;
};

struct Machine {
  ucontext_t scheduler;
  Fiber* current = nullptr;
  std::mt19937 random;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<Fiber> fibers;
  std::vector<Running> launches;
  std::vector<std::unique_ptr<Meeting>> clusters;
  std::vector<Copy> copies;  // asked for, not yet done
  std::vector<Range> ranges;
  uintptr_t lowest = 0, highest = 0;  // of the ranges
  std::vector<char> arena;            // shared memory of all thread blocks
  size_t agents = 0;
  int resident = 0;
  Channel before;
  std::unordered_map<const uint32_t*, Channel> ordered;  // what atomics with an order leave, per address
  Totals totals{};
  std::string error;
};
Machine machine;

constexpr size_t kStack = 128 << 10, kGuard = 4096;
constexpr char kPoison = static_cast<char>(0xff);  // NaN, until the kernel writes

Fiber& self() { return *machine.current; }
Launch const& launch_of(const Cta& cta) { return *machine.launches[cta.launch].launch; }

// --- races

std::string name_of(uint32_t agent) {
  if (agent == 0) return "what ran before";
  const auto block = [](const Cta& c) {
    return "block " + std::to_string(c.index) +
           (machine.launches.size() > 1 ? " of launch " + std::to_string(c.launch) : "");
  };
  if (agent <= machine.fibers.size()) {
    const Fiber& f = machine.fibers[agent - 1];
    return "thread " + std::to_string(f.thread) + " of " + block(*f.cta);
  }
  const size_t at = (agent - 1 - machine.fibers.size()) / (1 + kGates);
  return (agent == machine.ctas[at]->agent ? "the start of " : "a copy into ") + block(*machine.ctas[at]);
}

void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
}

struct Place {
  Cell* cells = nullptr;  // null: not a memory that is watched
  size_t n = 0;
  std::string_view name;
  int64_t offset = 0;
};

Place find(const void* address, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address), arena = reinterpret_cast<uintptr_t>(machine.arena.data());
  if (at - arena < machine.arena.size()) {
    Cta* cta = self().cta;
    if (static_cast<uint64_t>(static_cast<const char*>(address) - cta->shared) >= static_cast<uint64_t>(cta->bytes)) {
      const auto after = std::upper_bound(machine.ctas.begin(), machine.ctas.end(), address,
                                          [](const void* a, const auto& c) { return a < c->shared; });
      cta = after == machine.ctas.begin() ? nullptr : std::prev(after)->get();
    }
    const int64_t offset = cta ? static_cast<const char*>(address) - cta->shared : -1;
    if (!cta || offset + static_cast<int64_t>(bytes) > cta->bytes) {
      fail(name_of(self().agent) + " goes past the end of shared memory");
      return {};
    }
    if (cta->left) {
      fail(name_of(self().agent) + " touches shared memory of block " + std::to_string(cta->index) +
           ", which has left");
      return {};
    }
    return {&cta->cells[offset / 2], (offset % 2 + bytes + 1) / 2, "shared memory", offset};
  }
  if (at < machine.lowest || at >= machine.highest) return {};
  for (Range& range : machine.ranges) {
    if (at < range.begin || at >= range.end) continue;
    const size_t offset = at - range.begin;
    if (at + bytes > range.end) {
      fail(name_of(self().agent) + " goes past the end of " + range.name);
      return {};
    }
    return {&range.cells[offset / 2], (offset % 2 + bytes + 1) / 2, range.name, static_cast<int64_t>(offset)};
  }
  return {};
}

const char* verb(Kind kind) { return kind == kRead ? "reads" : kind == kWrite ? "writes" : "changes by an atomic"; }

void race(const Fiber& f, Kind kind, const Place& place, uint32_t other, Kind was) {
  fail("race: " + name_of(f.agent) + " " + verb(kind) + " " + std::string(place.name) + " + " +
       std::to_string(place.offset) + ", and nothing orders this after " + name_of(other) + ", which " + verb(was) +
       " it");
}

void check(const Fiber& f, Kind kind, const Place& place, const std::vector<Touch>& earlier) {
  for (const Touch& t : earlier) {
    if (!f.knows(t.agent, t.tick)) race(f, kind, place, t.agent, t.kind);
  }
}

void touch(const void* at, size_t bytes, Kind kind) {
  if (!machine.current) return;
  const Place place = find(at, bytes);
  if (!place.cells) return;
  Fiber& f = self();
  for (Cell* cell = place.cells; cell < place.cells + place.n; ++cell) {
    if (!f.knows(cell->writer, cell->tick)) race(f, kind, place, cell->writer, kWrite);
    if (kind != kRead) check(f, kind, place, cell->reads);
    if (kind == kWrite) {
      check(f, kind, place, cell->atomics);
      cell->reads.clear();
      cell->atomics.clear();
      cell->writer = f.agent;
      cell->tick = f.now;
    } else if (kind == kRead) {
      check(f, kind, place, cell->atomics);
      if (cell->reads.empty() || cell->reads.back().agent != f.agent) cell->reads.push_back({f.agent, f.now, kind});
      cell->reads.back().tick = f.now;
    } else {
      bool found = false;
      for (Touch& t : cell->atomics) {
        if (t.agent != f.agent || t.kind != kind) continue;
        t.tick = f.now;
        found = true;
      }
      if (!found) cell->atomics.push_back({f.agent, f.now, kind});
    }
  }
}

// A copy as its thread asks for it. Writes of threads have to be followed by a fence of theirs, and by one of this thread.
void touch_copy(const Copy& copy, const Gate& gate) {
  Fiber& f = self();
  if (const Place from = find(copy.from, copy.bytes); from.cells) {
    for (Cell* cell = from.cells; cell < from.cells + from.n; ++cell) {
      if (!f.knows(cell->writer, cell->tick)) race(f, kRead, from, cell->writer, kWrite);
      const uint32_t fenced = cell->writer == f.agent ? f.engine_own : f.engine->fenced[cell->writer];
      if (cell->tick > fenced) {
        fail(name_of(f.agent) + " copies " + std::string(from.name) + " + " + std::to_string(from.offset) + ", which " +
             name_of(cell->writer) + " wrote, without a fence for the copy engine on both sides");
      }
      check(f, kRead, from, cell->atomics);
      if (cell->reads.empty() || cell->reads.back().agent != gate.agent) cell->reads.push_back({gate.agent, 0, kRead});
      cell->reads.back().tick = gate.tick;
    }
  }
  if (const Place to = find(copy.to, copy.bytes); to.cells) {
    for (Cell* cell = to.cells; cell < to.cells + to.n; ++cell) {
      if (!f.knows(cell->writer, cell->tick)) race(f, kWrite, to, cell->writer, kWrite);
      check(f, kWrite, to, cell->reads);
      check(f, kWrite, to, cell->atomics);
      cell->reads.clear();
      cell->atomics.clear();
      cell->writer = gate.agent;
      cell->tick = gate.tick;
    }
  }
}

// --- meeting

void wait_for(const uint32_t* generation, uint32_t seen) {
  while (*generation == seen) {
    self().waits_for = generation;
    self().seen = seen;
    yield();
    self().waits_for = nullptr;
  }
}

// only: in place of what this thread knows and has done.
void arrive(Meeting& meeting, int n, const Told& only = nullptr) {
  if (meeting.arrived && meeting.expected != n) throw std::runtime_error("threads meet at different barriers");
  meeting.expected = n;
  only ? meeting.gathering.add(only) : meeting.gathering.publish(self());
  if (++meeting.arrived == n) {
    meeting.arrived = 0;
    meeting.opened = std::move(meeting.gathering);
    meeting.gathering = {};
    ++meeting.generation;
  }
}

void meet(Meeting& meeting, int n) {
  const uint32_t seen = meeting.generation;
  arrive(meeting, n);
  wait_for(&meeting.generation, seen);
  tell(self(), meeting.opened);
}

const char (*meet_warp(const void* value, size_t bytes, bool orders))[64] {
  Fiber& f = self();
  Warp& w = f.cta->warps[f.thread >> 5];
  std::memcpy(w.in[f.thread & 31], value, bytes);
  const uint32_t seen = w.meeting.generation;
  if (w.meeting.arrived == 31) std::memcpy(w.out, w.in, sizeof(w.in));
  // Lanes that meet in different instructions disagree on the number.
  Meeting& m = w.meeting;
  const int what = static_cast<int>(bytes) + (orders ? 1000 : 0);
  if (m.arrived && m.expected != what) throw std::runtime_error("lanes of a warp meet in different instructions");
  m.expected = what;
  if (orders) m.gathering.publish(f);
  if (++m.arrived == 32) {
    m.arrived = 0;
    m.opened = std::move(m.gathering);
    m.gathering = {};
    ++m.generation;
  }
  wait_for(&m.generation, seen);
  if (orders) tell(f, m.opened);
  return w.out;
}

// --- barriers of copies

Gate& gate_of(uint64_t* barrier) {
  const auto found = self().cta->gates.find(barrier);
  if (found == self().cta->gates.end()) throw std::runtime_error("a barrier of copies that is not initialised");
  Gate& gate = found->second;
  if (!self().knows(gate.init_agent, gate.init_tick))
    fail("race: a barrier of copies is used before its initialisation is known");
  return gate;
}

void settle(Cta& cta, uint64_t* barrier) {
  Phase& phase = *reinterpret_cast<Phase*>(barrier);
  if (phase.due != 0 || phase.bytes != 0) return;
  Gate& gate = cta.gates[barrier];
  phase.generation = phase.generation + 1;
  phase.due = static_cast<int32_t>(phase.expected);
  if (gate.gathering.sum) gate.gathering.sum->seen[gate.agent] = gate.gathering.sum->fenced[gate.agent] = gate.tick;
  ++gate.tick;
  gate.opened = std::move(gate.gathering);
  gate.gathering = {};
  ++gate.generation;
}

void finish_copy(size_t i) {
  const Copy copy = machine.copies[i];
  machine.copies[i] = machine.copies.back();
  machine.copies.pop_back();
  std::memcpy(copy.to, copy.from, copy.bytes);
  reinterpret_cast<Phase*>(copy.barrier)->bytes -= static_cast<int32_t>(copy.bytes);
  settle(*copy.cta, copy.barrier);
}

// --- running

void entry() {
  try {
    launch_of(*self().cta).kernel(self().cta->shared);
    if (self().in_cluster_barrier) throw std::runtime_error("a thread leaves a barrier of its cluster without waiting");
  } catch (const std::exception& error) {
    fail(error.what());
  }
  self().done = true;
  yield();
}

void give_stack(Fiber& f, char* stack) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
}

void prepare(const std::vector<Launch>& stream, const std::vector<Memory>& memory, int resident, uint32_t seed) {
  Machine& m = machine;
  m.current = nullptr;
  m.random.seed(seed);
  m.error.clear();
  m.copies.clear();
  m.totals = {0, 0, ~uintptr_t{0}, 0};
  m.resident = resident;
  merged.clear();
  m.ordered.clear();
  m.ctas.clear();
  m.clusters.clear();
  m.launches.clear();
  m.fibers.clear();
  size_t threads = 0, bytes = 128, blocks = 0;
  for (const Launch& l : stream) {
    threads += static_cast<size_t>(l.ctas) * l.threads;
    bytes += static_cast<size_t>(l.ctas) * ((l.shared_bytes + 127) / 128 * 128 + kGuard);
    blocks += l.ctas;
  }
  m.agents = 1 + threads + blocks * (1 + kGates);
  m.arena.assign(bytes, kPoison);
  m.fibers.resize(threads);
  static std::vector<char*> stacks;
  while (stacks.size() < threads) {
    stacks.push_back(static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  }
  char* next = m.arena.data() + (128 - reinterpret_cast<uintptr_t>(m.arena.data()) % 128) % 128;
  size_t fiber = 0;
  for (size_t i = 0; i < stream.size(); ++i) {
    const Launch& l = stream[i];
    m.launches.push_back({&l, {}, m.ctas.size(), 0, 0, 0, nullptr, {}});
    for (int c = 0; c < l.ctas; ++c) {
      if (c % l.cluster == 0) m.clusters.push_back(std::make_unique<Meeting>());
      m.ctas.push_back(std::make_unique<Cta>());
      Cta& cta = *m.ctas.back();
      m.launches.back().ctas.push_back(&cta);
      cta.launch = static_cast<int>(i);
      cta.index = c;
      cta.rank = c % l.cluster;
      cta.shared = next;
      cta.bytes = l.shared_bytes;
      next += (l.shared_bytes + 127) / 128 * 128 + kGuard;
      cta.warps.resize((l.threads + 31) / 32);
      cta.cluster = m.clusters.back().get();
      cta.first_fiber = fiber;
      cta.running = l.threads;
      cta.agent = static_cast<uint32_t>(1 + threads + (m.ctas.size() - 1) * (1 + kGates));
      for (int t = 0; t < l.threads; ++t, ++fiber) {
        Fiber& f = m.fibers[fiber];
        f.thread = t;
        f.cta = &cta;
        f.agent = static_cast<uint32_t>(1 + fiber);
        give_stack(f, stacks[fiber]);
      }
    }
    Running& r = m.launches.back();
    for (int c = 0; c < l.ctas; ++c) {
      for (int k = 0; k < l.cluster; ++k) r.ctas[c]->peers.push_back(r.ctas[c / l.cluster * l.cluster + k]);
    }
    // Clusters come in any order.
    std::vector<int> order(l.ctas / l.cluster);
    for (size_t c = 0; c < order.size(); ++c) order[c] = static_cast<int>(c);
    std::shuffle(order.begin(), order.end(), m.random);
    std::vector<Cta*> shuffled;
    for (int c : order)
      shuffled.insert(shuffled.end(), r.ctas.begin() + c * l.cluster, r.ctas.begin() + (c + 1) * l.cluster);
    r.ctas = shuffled;
  }
  m.before = {};
  m.before.sum = std::make_shared<Known>(Known{std::vector<uint32_t>(m.agents), std::vector<uint32_t>(m.agents)});
  m.before.sum->seen[0] = m.before.sum->fenced[0] = 1;
  m.ranges.clear();
  m.lowest = ~uintptr_t{0};
  m.highest = 0;
  for (const Memory& x : memory) {
    if (!x.begin || !x.bytes) continue;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(x.begin), end = begin + x.bytes;
    m.ranges.push_back({begin, end, x.name, std::vector<Cell>((x.bytes + 1) / 2)});
    for (Cell& cell : m.ranges.back().cells) cell.tick = 1;  // by agent 0
    m.lowest = std::min(m.lowest, begin);
    m.highest = std::max(m.highest, end);
  }
}

// Whether a launch's first thread block may start, and what its threads know then.
bool may_begin(size_t i) {
  Machine& m = machine;
  Running& r = m.launches[i];
  if (r.begin) return true;
  if (r.launch->early) {
    if (i > 0) {
      if (!m.launches[i - 1].begin) return false;
      for (const Cta* cta : m.launches[i - 1].ctas) {
        if (!cta->triggered && !cta->left) return false;
      }
    }
    const Told nothing =
        std::make_shared<Known>(Known{std::vector<uint32_t>(m.agents), std::vector<uint32_t>(m.agents)});
    r.begin = i > 0 ? m.launches[i - 1].begin : nothing;
    return true;
  }
  auto all = std::make_shared<Known>(*m.before.sum);
  for (size_t j = 0; j < i; ++j) {
    if (!m.launches[j].complete) return false;
    join(*all, *m.launches[j].after.sum);
  }
  r.begin = all;
  return true;
}

void admit() {
  Machine& m = machine;
  int running = 0;
  for (const auto& cta : m.ctas) running += cta->admitted && !cta->left;
  for (size_t i = 0; i < m.launches.size(); ++i) {
    Running& r = m.launches[i];
    while (r.admitted < r.ctas.size() && may_begin(i)) {
      if (m.resident && running + r.launch->cluster > m.resident) return;
      for (int k = 0; k < r.launch->cluster; ++k, ++r.admitted, ++running) {
        Cta& cta = *r.ctas[r.admitted];
        cta.admitted = true;
        cta.cells.assign((cta.bytes + 1) / 2, Cell{cta.agent, 1, {}, {}});
        auto told = std::make_shared<Known>(*r.begin);
        told->seen[cta.agent] = told->fenced[cta.agent] = 1;
        cta.start = told;
        for (int t = 0; t < r.launch->threads; ++t) {
          Fiber& f = m.fibers[cta.first_fiber + t];
          f.told = f.engine = told;
        }
      }
    }
    if (r.admitted < r.ctas.size()) return;
  }
}

// A thread block leaves: nothing may still be on its way to or from its shared memory.
void leave(Cta& cta) {
  Machine& m = machine;
  Running& r = m.launches[cta.launch];
  Channel all;
  for (int t = 0; t < r.launch->threads; ++t) all.publish(m.fibers[cta.first_fiber + t]);
  const auto late = [&](uint32_t agent, uint32_t tick) {
    if (tick > all.sum->seen[agent])
      fail("race: block " + std::to_string(cta.index) + " leaves while " + name_of(agent) +
           " may still use its shared memory");
  };
  for (const Cell& cell : cta.cells) {
    late(cell.writer, cell.tick);
    for (const Touch& t : cell.reads) late(t.agent, t.tick);
    for (const Touch& t : cell.atomics) late(t.agent, t.tick);
  }
  for (int t = 0; t < r.launch->threads; ++t) {
    Fiber& f = m.fibers[cta.first_fiber + t];
    f.fenced = f.now;  // the end of a launch is a fence for everything
    r.after.publish(f);
  }
  cta.left = true;
  std::vector<Cell>().swap(cta.cells);
  if (++r.left == r.ctas.size()) r.complete = 1;
}

void check_guards() {
  for (const auto& cta : machine.ctas) {
    const char* end = cta->shared + cta->bytes;
    for (const char* p = end; p < end + kGuard; ++p) {
      if (*p != kPoison) fail("a write past the end of shared memory");
    }
  }
}

bool resume(Fiber& f) {
  if (f.done || !f.cta->admitted || (f.waits_for && *f.waits_for == f.seen)) return false;
  const bool moved = f.waits_for != nullptr || !f.started;
  f.started = true;
  machine.current = &f;
  swapcontext(&machine.scheduler, &f.context);
  machine.current = nullptr;
  if (f.done && --f.cta->running == 0) leave(*f.cta);
  return moved || f.done;
}

void schedule() {
  Machine& m = machine;
  std::vector<size_t> order(m.fibers.size() / 32);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::vector<uint8_t> late(order.size());  // 0: no lane, 1: all, 2 + i: lane i
  int idle = 0;
  const auto running = [&] {
    return std::any_of(m.launches.begin(), m.launches.end(), [](const Running& r) { return !r.complete; });
  };
  for (int round = 0; running() && m.error.empty(); ++round) {
    admit();
    // Some warps, lanes and whole thread blocks get nothing for a while: they are late where the kernel does not wait for them.
    if (round % 32 == 0) {
      for (uint8_t& l : late) l = m.random() % 4 == 0 ? 1 : m.random() % 4 == 0 ? 2 + m.random() % 32 : 0;
      for (const auto& cta : m.ctas) {
        if (m.random() % 8) continue;
        std::fill_n(late.begin() + cta->first_fiber / 32, cta->warps.size(), 1);
      }
    }
    std::shuffle(order.begin(), order.end(), m.random);
    const size_t turn = m.random();
    bool moved = false;
    for (size_t group : order) {
      if (late[group] == 1) continue;
      for (size_t j = 0; j < 32; ++j) {
        const size_t lane = (j + turn) % 32;
        if (late[group] != 2 + lane) moved |= resume(m.fibers[group * 32 + lane]);
      }
    }
    // Copies arrive in any order, late ones too.
    for (size_t due = m.copies.size(); due > 0; --due) {
      if (m.random() % 4 == 0) {
        finish_copy(m.random() % m.copies.size());
        moved = true;
      }
    }
    idle = moved ? 0 : idle + 1;
    if (idle > 2000) fail("deadlock");
  }
}

}  // namespace

void yield() { swapcontext(&machine.current->context, &machine.scheduler); }
const char (*exchange(const void* value, size_t bytes))[64] { return meet_warp(value, bytes, false); }
Totals totals() { return machine.totals; }

std::string run(const std::vector<Launch>& stream, const std::vector<Memory>& memory, int resident, uint32_t seed) {
  prepare(stream, memory, resident, seed);
  schedule();
  if (machine.error.empty() && !machine.copies.empty()) fail("a copy was still under way at the end");
  check_guards();
  return machine.error;
}

}  // namespace dmoe::emulate

namespace dmoe::dev {

using namespace dmoe::emulate;

int thread() { return self().thread; }
int lane() { return thread() & 31; }
int warp() { return thread() >> 5; }
int cta() { return self().cta->index; }
int ctas() { return launch_of(*self().cta).ctas; }

void sync_warp() { meet_warp("", 1, true); }
void sync() { meet(self().cta->barriers[0], launch_of(*self().cta).threads); }
void sync_some(int barrier, int threads) { meet(self().cta->barriers[barrier], threads); }

int cluster_rank() { return self().cta->rank; }
int cluster_index() { return self().cta->index / cluster_size(); }
int cluster_size() { return launch_of(*self().cta).cluster; }
void cluster_arrive_with(const Told& only) {
  if (self().in_cluster_barrier) throw std::runtime_error("a thread arrives twice at the barrier of its cluster");
  self().in_cluster_barrier = true;
  Meeting& all = *self().cta->cluster;
  self().cluster_seen = all.generation;
  arrive(all, cluster_size() * launch_of(*self().cta).threads, only);
}
void cluster_arrive() { cluster_arrive_with(nullptr); }
void cluster_arrive_relaxed() { cluster_arrive_with(self().cta->start); }
void cluster_wait() {
  if (!self().in_cluster_barrier)
    throw std::runtime_error("a thread waits at the barrier of its cluster without arriving");
  self().in_cluster_barrier = false;
  Meeting& all = *self().cta->cluster;
  wait_for(&all.generation, self().cluster_seen);
  tell(self(), all.opened);
}
void* remote_address(void* shared, int rank) {
  const Cta& own = *self().cta;
  return own.peers.at(rank)->shared + (static_cast<char*>(shared) - own.shared);
}

void atomic_or(uint32_t* at, uint32_t value) {
  touch(at, 4, kRelaxed);
  *at |= value;
}
uint32_t atomic_add(uint32_t* at, uint32_t value) {
  touch(at, 4, kRelaxed);
  const uint32_t before = *at;
  *at += value;
  return before;
}
uint32_t atomic_add_ordered(uint32_t* at, uint32_t value) {
  touch(at, 4, kOrdered);
  tell(self(), machine.ordered[at]);
  machine.ordered[at].publish(self());
  const uint32_t before = *at;
  *at += value;
  return before;
}
uint32_t load_acquire(const uint32_t* at) {
  yield();  // it may be polled
  touch(at, 4, kOrdered);
  tell(self(), machine.ordered[at]);
  return *at;
}
uint32_t load_relaxed(const uint32_t* at) {
  yield();
  touch(at, 4, kRelaxed);
  return *at;
}
void launch_dependents() { self().cta->triggered = true; }
void wait_for_primary() {
  Fiber& f = self();
  const size_t i = f.cta->launch;
  if (!machine.launches[i].launch->early) return;
  if (i > 0) {
    wait_for(&machine.launches[i - 1].complete, 0);
    tell(f, machine.launches[i - 1].after);
  } else {
    tell(f, machine.before);
  }
  f.engine = f.told;  // what a launch leaves behind is there for the copy engine too
}

void mma16816(float (&c)[4], const uint32_t (&own)[6], bool half) {
  struct Fragment {
    uint32_t word[6];
  };
  const auto all = emulate::exchange(own, sizeof(own));
  const auto number = [half](uint32_t word, int high) {
    const uint16_t raw = static_cast<uint16_t>(word >> (16 * high));
    return half ? half_to_float(raw) : bf16_to_float(raw);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const auto a = read<Fragment>(all, row % 8 * 4 + k % 8 / 2), b = read<Fragment>(all, column * 4 + k % 8 / 2);
      sum += number(a.word[row / 8 + k / 8 * 2], k % 2) * number(b.word[4 + k / 8], k % 2);
    }
    c[i] += sum;
  }
}

void load_matrices(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix: a row is not aligned to 16 bytes");
  const auto all = emulate::exchange(&row, sizeof(row));
  for (int i = 0; i < 4; ++i) {
    const char* from = read<const char*>(all, i * 8 + lane() / 4) + lane() % 4 * 4;
    touch(from, 4, kRead);
    std::memcpy(&out[i], from, 4);
  }
}

void barrier_init(Barrier* barrier, int arrivals) {
  Cta& cta = *self().cta;
  if (cta.gates.size() == kGates) throw std::runtime_error("more barriers of copies than the emulator keeps");
  Gate gate;
  gate.agent = cta.agent + 1 + static_cast<uint32_t>(cta.gates.size());
  gate.init_agent = self().agent;
  gate.init_tick = self().now;
  cta.gates[barrier] = gate;
  touch(barrier, 8, kWrite);
  *reinterpret_cast<Phase*>(barrier) = {0, static_cast<uint32_t>(arrivals), arrivals, 0};
}
void barrier_init_done() {
  for (auto& [at, gate] : self().cta->gates) {
    if (gate.init_agent == self().agent) gate.fence_tick = self().now;
  }
}
void barrier_expect(Barrier* barrier, uint32_t bytes) {
  Gate& gate = gate_of(barrier);
  Phase& phase = *reinterpret_cast<Phase*>(barrier);
  gate.gathering.publish(self());
  phase.bytes += static_cast<int32_t>(bytes);
  phase.due = phase.due - 1;
  settle(*self().cta, barrier);
}
void barrier_arrive(Barrier* barrier) { barrier_expect(barrier, 0); }
void barrier_wait(Barrier* barrier, uint32_t parity) {
  const Gate& gate = gate_of(barrier);
  const Phase& phase = *reinterpret_cast<Phase*>(barrier);
  while ((phase.generation & 1) == parity) wait_for(&gate.generation, gate.generation);
  tell(self(), gate.opened);
  meet_warp("", 2, false);
}
void bulk_copy_of(void* shared, const void* global, uint32_t bytes, Barrier* barrier, bool once) {
  Cta& own = *self().cta;
  const int64_t at = static_cast<char*>(shared) - own.shared;
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16 || !bytes) {
    throw std::runtime_error("a bulk copy is not aligned to 16 bytes");
  }
  if (at < 0 || at + bytes > own.bytes) throw std::runtime_error("a bulk copy past the end of shared memory");
  Gate& gate = gate_of(barrier);
  if (gate.fence_tick == 0 || !self().knows(gate.init_agent, gate.fence_tick)) {
    throw std::runtime_error("a bulk copy counts on a barrier whose initialisation no fence followed");
  }
  const Copy copy{shared, global, bytes, barrier, &own};
  touch_copy(copy, gate);
  machine.copies.push_back(copy);
  if (once) machine.totals.copied_once += bytes;
}
void bulk_prefetch(const void* global, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16 || !bytes)
    throw std::runtime_error("a prefetch is not aligned");
  Totals& t = machine.totals;
  t.fetched_from = std::min(t.fetched_from, reinterpret_cast<uintptr_t>(global));
  t.fetched_to = std::max(t.fetched_to, reinterpret_cast<uintptr_t>(global) + bytes);
  t.fetched += bytes;
}
void fence_copies() {
  Fiber& f = self();
  f.fenced = f.engine_own = f.now++;
  f.engine = f.told;
}

}  // namespace dmoe::dev

// --- the hooks of -fsanitize=thread
using dmoe::emulate::kRead;
using dmoe::emulate::kWrite;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define DMOE_HOOK(n)                                                              \
  void __tsan_read##n(void* at) { dmoe::emulate::touch(at, n, kRead); }           \
  void __tsan_write##n(void* at) { dmoe::emulate::touch(at, n, kWrite); }         \
  void __tsan_unaligned_read##n(void* at) { dmoe::emulate::touch(at, n, kRead); } \
  void __tsan_unaligned_write##n(void* at) { dmoe::emulate::touch(at, n, kWrite); }
DMOE_HOOK(1) DMOE_HOOK(2) DMOE_HOOK(4) DMOE_HOOK(8) DMOE_HOOK(16) void __tsan_read_range(void* at, unsigned long n) {
  dmoe::emulate::touch(at, n, kRead);
}
void __tsan_write_range(void* at, unsigned long n) { dmoe::emulate::touch(at, n, kWrite); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
