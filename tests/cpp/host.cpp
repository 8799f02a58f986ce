// The kernels of csrc/cuda on the CPU, for tests/emulated.py (by ctypes).
#include "launches.h"

namespace {

std::string error;

const char* report(const std::string& what) {
  error = what;
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace

extern "C" {

// The way of a launch: what the launchers take from the device, and how the emulator goes about it.
struct Way {
  int32_t cluster, two_launches, ctas, rows, stages, splits, resident;
  uint32_t seed;
};

// Both forms of the router: cluster > 0 is the fused one (or takes ready-made logits, when x is null).
const char* emulate_route(const dmoe::cuda::Router* args, const int64_t* ints, const double* floats, const Way* way) {
  using namespace dmoe;
  const Routing routing = unpack_routing(ints, floats);
  if (const char* why = cuda::refuses(*args, routing)) return why;
  return report(emulate::run(cuda::route_launches(*args, routing, way->cluster, way->two_launches),
                             cuda::route_memory(*args, routing), way->resident, way->seed));
}

const char* emulate_schedule(const int32_t* topk_ids, int64_t slots, int64_t experts, const int32_t* expert_map,
                             uint32_t* out, uint32_t seed) {
  using namespace dmoe;
  return report(emulate::run({cuda::schedule_launch(topk_ids, slots, static_cast<int>(experts), expert_map, out)},
                             {{topk_ids, 4 * slots, "topk_ids"}, {out, 4 * cuda::schedule_words(experts), "schedule"}},
                             0, seed));
}

// `scheduled`: the schedule is there; else it is made by its own launch.
const char* emulate_experts(const dmoe::cuda::Experts* a, int scheduled, const Way* way) {
  using namespace dmoe;
  if (const char* why = cuda::refuses(*a)) return why;
  cuda::Launches stream;
  if (!scheduled) {
    const int experts = static_cast<int>(a->experts);
    stream.push_back(cuda::schedule_launch(a->topk_ids, a->tokens * a->top_k, experts, a->expert_map, a->schedule));
  }
  stream.push_back(cuda::experts_launch(*a, way->ctas, {way->rows, way->stages, way->splits}));
  return report(emulate::run(stream, cuda::experts_memory(*a), way->resident, way->seed));
}

// n layers, one behind the other in a stream; they may share their schedule and workspace.
const char* emulate_layers(const dmoe::cuda::Router* routers, const dmoe::cuda::Experts* experts, int n,
                           const int64_t* ints, const double* floats, const Way* way) {
  using namespace dmoe;
  const Routing routing = unpack_routing(ints, floats);
  cuda::Launches stream;
  cuda::Memories memory;
  for (int i = 0; i < n; ++i) {
    if (const char* why = cuda::refuses(routers[i], routing)) return why;
    if (const char* why = cuda::refuses(experts[i])) return why;
    for (const auto& launch : cuda::route_launches(routers[i], routing, way->cluster, way->two_launches)) {
      stream.push_back(launch);
    }
    stream.push_back(cuda::experts_launch(experts[i], way->ctas, {way->rows, way->stages, way->splits}));
    for (const auto& all : {cuda::route_memory(routers[i], routing), cuda::experts_memory(experts[i])}) {
      for (const emulate::Memory& m : all) {
        bool known = false;
        for (const emulate::Memory& other : memory) known |= other.begin == m.begin;
        if (!known) memory.push_back(m);
      }
    }
  }
  return report(emulate::run(stream, memory, way->resident, way->seed));
}

// What the last run would have fetched into the L2: bytes, and the range from `base` on; and what it copied of the weights.
void totals(uintptr_t base, int64_t* out) {
  const dmoe::emulate::Totals totals = dmoe::emulate::totals();
  out[0] = totals.fetched;
  out[1] = static_cast<int64_t>(totals.fetched_from - base);
  out[2] = static_cast<int64_t>(totals.fetched_to - base);
  out[3] = totals.copied_once;
}

const char* refuses_experts(const dmoe::cuda::Experts* args) { return dmoe::cuda::refuses(*args); }
int64_t workspace_bytes(const dmoe::cuda::Experts* a) {
  return dmoe::cuda::experts_workspace(a->tokens, a->hidden, a->intermediate, a->shared_intermediate, a->experts,
                                       a->top_k)
      .bytes;
}
int64_t schedule_words(int64_t experts) { return dmoe::cuda::schedule_words(experts); }
int used_at() { return dmoe::cuda::kUsed; }
int count_at() { return dmoe::cuda::kCount; }
// rows, stages, splits, and the shared memory that they take.
void experts_form(const dmoe::cuda::Experts* a, int multiprocessors, int64_t limit, int64_t* out) {
  const dmoe::cuda::Form form = dmoe::cuda::experts_form(*a, multiprocessors, limit);
  out[0] = form.rows, out[1] = form.stages, out[2] = form.splits;
  out[3] = dmoe::cuda::experts_shared(*a, form);
}
int64_t router_shared_bytes(int experts, int block_size, int cluster, int fused) {
  return dmoe::cuda::router_shared(experts, block_size, cluster, fused).bytes;
}
int cluster_size(int64_t n_blocks, int multiprocessors) { return dmoe::cuda::cluster_size(n_blocks, multiprocessors); }
}
