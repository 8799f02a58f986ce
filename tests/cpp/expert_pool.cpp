// The pool of experts alone, for tests/test_expert_memory.py: what it gives out is whole and right, under several threads and
// with reads that fail; nothing is left behind. Usage: expert_pool FOLDER RUNS. Prints one line; a fault ends it with 1.
#include "cpu/expert_pool.h"

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

using namespace dmoe::cpu;

namespace {

constexpr int64_t kLayers = 3, kExperts = 10, kPieces = 3, kBytes = 5000, kOdd = 77;

char value(int64_t key, int64_t piece, int64_t i) { return static_cast<char>(key * 31 + piece * 7 + i * 13 + i / 251); }

[[noreturn]] void fail(const std::string& why) {
  std::printf("%s\n", why.c_str());
  std::exit(1);
}

int entries(const char* folder) {
  DIR* dir = opendir(folder);
  int count = 0;
  while (readdir(dir)) ++count;
  closedir(dir);
  return count;
}

long resident_pages() {
  long size = 0, resident = 0;
  FILE* file = std::fopen("/proc/self/statm", "r");
  if (!file || std::fscanf(file, "%ld %ld", &size, &resident) != 2) fail("no /proc/self/statm");
  std::fclose(file);
  return resident;
}

// Two files; the second has every other expert. Parts: pieces 0 and 1 are halves of part 0, piece 2 is part 1.
std::vector<Piece> write_files(const std::vector<std::string>& paths) {
  std::vector<Piece> pieces;
  std::string data[2] = {std::string(kOdd, 'x'), std::string(kOdd + 1, 'y')};
  for (int64_t key = 0; key < kLayers * kExperts; ++key) {
    for (int64_t p = 0; p < kPieces; ++p) {
      std::string& to = data[key % 2];
      pieces.push_back(
          {static_cast<int32_t>(key % 2), p == 2, static_cast<int64_t>(to.size()), kBytes, p == 1 ? kBytes : 0});
      for (int64_t i = 0; i < kBytes; ++i) to.push_back(value(key, p, i));
    }
  }
  for (int f = 0; f < 2; ++f) {
    FILE* file = std::fopen(paths[f].c_str(), "wb");
    if (!file || std::fwrite(data[f].data(), 1, data[f].size(), file) != data[f].size())
      fail("can't write " + paths[f]);
    std::fclose(file);
  }
  return pieces;
}

struct Memory {
  explicit Memory(int64_t slots) : w13(slots * 2 * kBytes), w2(slots * kBytes) {}
  std::vector<char> w13, w2;
};

PoolLayout layout(const std::vector<std::string>& paths, const std::vector<Piece>& pieces, Memory& memory,
                  int64_t slots) {
  PoolLayout layout;
  layout.files = paths;
  layout.parts = {{memory.w13.data(), 2 * kBytes}, {memory.w2.data(), kBytes}};
  layout.slots = slots, layout.layers = kLayers, layout.experts = kExperts;
  layout.pieces = pieces;
  return layout;
}

void check_held(const Memory& memory, const std::vector<int32_t>& map, int64_t layer, const std::vector<int32_t>& ids) {
  for (int64_t e = 0; e < kExperts; ++e) {
    const bool held = std::find(ids.begin(), ids.end(), e) != ids.end();
    if (held != (map[e] >= 0) || (!held && map[e] != kNotLoaded))
      fail("the map holds what the lease does not, or lacks it");
    if (!held) continue;
    for (int64_t p = 0; p < kPieces; ++p) {
      const char* from = p == 2 ? &memory.w2[map[e] * kBytes] : &memory.w13[map[e] * 2 * kBytes + p * kBytes];
      for (int64_t i = 0; i < kBytes; ++i)
        if (from[i] != value(layer * kExperts + e, p, i)) fail("an expert is not whole");
    }
  }
}

struct Totals {
  std::atomic<int64_t> good{0}, failed{0}, refused{0};
};

// Visits of layers at random; every lease that is given holds what it says.
void visit(ExpertPool& pool, const Memory& memory, uint32_t seed, int visits, Totals& totals) {
  std::mt19937 random(seed);
  std::vector<int32_t> map(kExperts), all(kExperts);
  std::iota(all.begin(), all.end(), 0);
  for (int i = 0; i < visits; ++i) {
    std::shuffle(all.begin(), all.end(), random);
    const int64_t layer = random() % kLayers;
    std::vector<int32_t> ids(all.begin(), all.begin() + 1 + random() % 3);
    try {
      Lease lease = pool.request(layer, ids);
      pool.ahead((layer + 1) % kLayers, pool.last_used((layer + 1) % kLayers));
      if (random() % 8 == 0) continue;  // cancelled mid-read
      lease.wait(map.data());
      check_held(memory, map, layer, ids);
      ++totals.good;
    } catch (const ReadError& error) {
      if (error.file.empty() || !std::strstr(error.what(), "at byte"))
        fail(std::string("no place in: ") + error.what());
      ++totals.failed;
    } catch (const std::invalid_argument&) {  // the other threads hold the slots
      ++totals.refused;
    }
  }
}

void random_run(const std::vector<std::string>& paths, const std::vector<Piece>& pieces, uint32_t seed,
                Totals& totals) {
  std::mt19937 random(seed);
  const int64_t slots = 3 + random() % 12;
  const int rate = random() % 4 ? 2 + random() % 30 : 0;  // one read of so many goes wrong
  Memory memory(slots);
  PoolLayout made = layout(paths, pieces, memory, slots);
  made.readers = 1 + random() % 3;
  made.ahead_slots = random() % 4;
  made.direct = random() % 2;
  made.chunk = 1 + random() % (2 * kBytes);
  std::atomic<uint32_t> count{seed};
  made.read = [&](int fd, void* to, size_t bytes, off_t offset) -> ssize_t {
    const uint32_t n = count++ * 2654435761u >> 8;
    if (rate && n % rate == 0) {
      const int kind = n / rate % 4;
      errno = kind == 0 ? EINTR : EIO;
      if (kind < 2) return -1;
      if (kind == 2) return 0;  // the file ends
      bytes = (bytes + 1) / 2;  // a short read
      if (made.direct) bytes = (bytes + 4095) / 4096 * 4096;
    }
    return ::pread(fd, to, bytes, offset);
  };
  ExpertPool pool(made);
  std::vector<std::thread> users;
  for (uint32_t u = 0; u < 2; ++u) users.emplace_back([&, u] { visit(pool, memory, seed * 2 + u, 40, totals); });
  for (std::thread& user : users) user.join();
  if (pool.counts().pinned) fail("slots stay pinned");
  if (random() % 2) {  // closed with a read under way, then destroyed
    try {
      const Lease lease = pool.request(0, {0});
    } catch (const ReadError&) {
    }
  }
}

void turn_beats_lru(const std::vector<std::string>& paths, const std::vector<Piece>& pieces) {
  Memory memory(6);
  ExpertPool pool(layout(paths, pieces, memory, 6));
  std::vector<int32_t> map(kExperts);
  for (int round = 0; round < 20; ++round) {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      Lease lease = pool.request(layer, {1, 4, 7});  // 9 experts in a round: an LRU of 6 slots never hits
      lease.wait(map.data());
    }
  }
  const PoolCounts counts = pool.counts();
  if (counts.hits < 19 * 3) fail("turn eviction hits " + std::to_string(counts.hits) + " of 180");
  if (counts.bytes_read != counts.misses * 3 * kBytes) fail("bytes read are not those of the misses");
}

void refuses(const std::vector<std::string>& paths, const std::vector<Piece>& pieces) {
  Memory memory(4);
  ExpertPool pool(layout(paths, pieces, memory, 4));
  std::vector<int32_t> map(kExperts);
  {
    Lease lease = pool.request(0, {0, 1, 2});
    try {
      pool.request(1, {3, 4});
      fail("a pool full of pins gave out more");
    } catch (const std::invalid_argument&) {
    }
    Lease same = pool.request(0, {2, 1});  // pins of its own on the same slots
    lease.wait(map.data());
    lease.release();
    same.wait(map.data());
    check_held(memory, map, 0, {1, 2});
  }
  pool.close();
  try {
    pool.request(0, {5});
    fail("a closed pool gave out experts");
  } catch (const ReadError& error) {
    if (error.code != ECANCELED) fail("a closed pool should say so");
  }
  const std::string copy = paths[0] + ".changed";
  write_files({copy, paths[1]});
  ExpertPool other(layout({copy, paths[1]}, pieces, memory, 4));
  if (::truncate(copy.c_str(), kOdd + 100) != 0) fail("truncate");
  try {
    other.request(0, {0}).wait(map.data());
    fail("a truncated file gave an expert");
  } catch (const ReadError& error) {
    if (error.file != copy) fail("the error names another file");
  }
  other.request(0, {1}).wait(map.data());  // of the other file
}

}  // namespace

int main(int argc, char** argv) {
  const int runs = argc > 2 ? std::atoi(argv[2]) : 200;
  const std::vector<std::string> paths = {std::string(argv[1]) + "/a", std::string(argv[1]) + "/b"};
  const std::vector<Piece> pieces = write_files(paths);
  Totals totals;
  random_run(paths, pieces, 0, totals);
  turn_beats_lru(paths, pieces);
  refuses(paths, pieces);
  const int threads = entries("/proc/self/task"), files = entries("/proc/self/fd");
  for (int i = 1; i <= 20; ++i) random_run(paths, pieces, i, totals);
  const long pages = resident_pages();
  for (int i = 21; i <= runs; ++i) random_run(paths, pieces, i, totals);
  if (entries("/proc/self/task") != threads) fail("threads are left");
  if (entries("/proc/self/fd") != files) fail("files are left open");
  std::printf("good %ld failed %ld refused %ld pages %ld\n", static_cast<long>(totals.good),
              static_cast<long>(totals.failed), static_cast<long>(totals.refused), resident_pages() - pages);
  return 0;
}
