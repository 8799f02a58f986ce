// Small kernels with one fault each, for tests/test_races.py: what the emulator is there to find.
#include <map>

#include "cuda/device.h"

namespace {

using namespace dmoe;

uint32_t memory[64];
alignas(16) char source[1024];
std::string error;

struct Fault {
  std::vector<emulate::Launch> stream;
  int resident = 0;
};

emulate::Launch launch(int ctas, int cluster, std::function<void(char*)> kernel, bool early = false) {
  return {ctas, 64, cluster, 2048, early, std::move(kernel)};
}

uint32_t* words(char* shared) { return reinterpret_cast<uint32_t*>(shared); }

// Each thread writes its word, and reads that of the thread 32 further on (or of its neighbour).
void pass_on(char* shared, int by, const std::function<void()>& between) {
  words(shared)[dev::thread()] = 1;
  between();
  const uint32_t got = words(shared)[(dev::thread() + by) % 64];
  if (dev::thread() == 0) memory[dev::cta()] = got;
}

void copy(char* shared, bool fence_init, bool fence_source, bool wait) {
  auto* barrier = reinterpret_cast<dev::Barrier*>(shared);
  if (dev::thread() == 0) {
    dev::barrier_init(barrier, 1);
    if (fence_init) dev::barrier_init_done();
  }
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(source)[4 * dev::thread() + i] = 5;
  if (fence_source) dev::fence_copies();
  dev::sync();
  if (dev::thread() == 0) {
    dev::fence_copies();
    dev::barrier_expect(barrier, 1024);
    dev::bulk_copy<true>(shared + 1024, source, 1024, barrier);
  }
  if (wait && dev::warp() == 0) dev::barrier_wait(barrier, 0);
  if (dev::thread() == 1) memory[0] = words(shared + 1024)[0];
  if (!wait) return;
  dev::sync();
}

// Thread block 0 waits for what block 1 leaves.
void wait_for_the_other(bool ordered) {
  if (dev::thread() != 0) return;
  if (dev::cta() == 1) {
    memory[1] = 7;
    if (ordered) {
      dev::atomic_add_ordered(&memory[2], 1);
    } else {
      dev::atomic_add(&memory[2], 1);
    }
  } else {
    while (dev::load_acquire(&memory[2]) == 0) dev::pause(10);
    memory[3] = memory[1];
  }
}

void first(char*) {
  dev::launch_dependents();
  if (dev::thread() == 0) memory[5] = 1;
}
void second(bool waits) {
  if (waits) dev::wait_for_primary();
  if (dev::thread() == 0) memory[6] = memory[5];
}

// Every block reads a word of its neighbour in the cluster.
void read_neighbour(char* shared, bool before, bool after) {
  words(shared)[dev::thread()] = 3;
  if (before) {
    dev::cluster_arrive();
    dev::cluster_wait();
  }
  const uint32_t got = dev::remote(words(shared), 1 - dev::cluster_rank())[dev::thread()];
  if (dev::thread() == 0) memory[dev::cta()] = got;
  if (after) {
    dev::cluster_arrive();
    dev::cluster_wait();
  }
}

const std::map<std::string, Fault> faults = {
    {"none",
     {{launch(2, 2, [](char* s) { read_neighbour(s, true, true); }),
       launch(1, 1, [](char* s) { pass_on(s, 32, dev::sync); }),
       launch(1, 1, [](char* s) { copy(s, true, true, true); }), launch(2, 1, [](char*) { wait_for_the_other(true); }),
       launch(1, 1, first),
       launch(
           1, 1, [](char*) { second(true); }, true)}}},
    {"no barrier", {{launch(1, 1, [](char* s) { pass_on(s, 32, [] {}); })}}},
    {"shuffle for a barrier", {{launch(1, 1, [](char* s) { pass_on(s, 1, [] { dev::shuffle(1, 0); }); })}}},
    {"write after read",
     {{launch(1, 1,
              [](char* s) {
                pass_on(s, 32, dev::sync);
                words(s)[dev::thread()] = 2;
              })}}},
    {"atomic without order", {{launch(2, 1, [](char*) { wait_for_the_other(false); })}}},
    {"no wait for the launch before",
     {{launch(1, 1, first), launch(
                                1, 1, [](char*) { second(false); }, true)}}},
    {"remote before start", {{launch(2, 2, [](char* s) { read_neighbour(s, false, true); })}}},
    {"remote after exit", {{launch(2, 2, [](char* s) { read_neighbour(s, true, false); })}}},
    // Whichever comes first waits for the other.
    {"waits for a block that does not fit",
     {{launch(2, 1,
              [](char*) {
                if (dev::thread() != 0) return;
                dev::atomic_add_ordered(&memory[2], 1);
                while (dev::load_acquire(&memory[2]) != 2) dev::pause(10);
              })},
      1}},
    {"copy of what no fence followed", {{launch(1, 1, [](char* s) { copy(s, true, false, true); })}}},
    {"copy that nobody waits for", {{launch(1, 1, [](char* s) { copy(s, true, true, false); })}}},
    {"barrier without its fence", {{launch(1, 1, [](char* s) { copy(s, false, true, true); })}}},
    {"past the end", {{launch(1, 1, [](char* s) { words(s)[512 + dev::thread()] = 1; })}}},
    {"lanes apart",
     {{launch(1, 1,
              [](char*) {
                if (dev::lane() < 16) {
                  dev::sync_warp();
                } else {
                  dev::ballot(true);
                }
              })}}},
};

}  // namespace

extern "C" const char* run_fault(const char* name, uint32_t seed) {
  std::memset(memory, 0, sizeof(memory));
  const Fault& fault = faults.at(name);
  error = emulate::run(fault.stream, {{memory, sizeof(memory), "memory"}, {source, sizeof(source), "source"}},
                       fault.resident, seed);
  return error.empty() ? nullptr : error.c_str();
}
