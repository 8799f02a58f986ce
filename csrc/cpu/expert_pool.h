// Routed experts that stay in their files, and a pool of slots in memory for those that are in use. No torch, no Python.
//
//   request(layer, ids) -> Lease   pins the experts that are there, claims slots for the others and queues their reads
//   lease.wait(map)                returns when all are whole; map[id] is the slot of every expert of the lease
//   ~Lease                         unpins
//
// A slot holds one expert of any layer. Reader threads fill slots; only a lease makes one visible, and only when it is whole.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace dmoe::cpu {

constexpr int32_t kNotLoaded = -2;  // in a map: formats.NOT_LOADED

// What a read ran into. code: of errno.
struct Fault {
  int code;
  std::string file, what;
};

struct ReadError : std::runtime_error {
  explicit ReadError(const Fault& fault) : std::runtime_error(fault.what), code(fault.code), file(fault.file) {}
  int code;
  std::string file;
};

// A run of bytes of one expert: where it lies in the files, and where in a slot it goes.
struct Piece {
  int32_t file;
  int32_t part;
  int64_t offset, bytes;
  int64_t at;  // bytes from the beginning of the slot, in its part
};

// A tensor of the pool: slot s begins at data + s * stride.
struct Part {
  char* data;
  int64_t stride;
};

struct PoolLayout {
  std::vector<std::string> files;
  std::vector<Part> parts;
  int64_t slots, layers, experts;  // experts: of each layer
  std::vector<Piece> pieces;       // [layers, experts, pieces of an expert]
  int readers = 2;
  int64_t ahead_slots = 0;     // how many may hold experts that were read ahead and not used yet
  bool direct = true;          // past the page cache, where the file system has that
  int64_t chunk = 512l << 10;  // bytes of a read, at most: readers share an expert
  // Takes the place of pread, for tests.
  std::function<ssize_t(int fd, void* to, size_t bytes, off_t offset)> read;
};

struct PoolCounts {
  int64_t hits = 0, misses = 0;  // experts of all leases, there or not when they were asked for
  int64_t bytes_read = 0;
  int64_t stall_ns = 0;               // spent in Lease::wait
  int64_t ahead = 0, ahead_used = 0;  // experts read ahead, and those of them that were used in time
  int64_t pinned = 0, resident = 0;   // slots, now
};

class ExpertPool;

// Experts that are held in the pool. Not to outlive it.
class Lease {
 public:
  Lease(Lease&& other) noexcept : pool_(other.pool_), ids_(std::move(other.ids_)), slots_(std::move(other.slots_)) {
    other.pool_ = nullptr;
  }
  Lease& operator=(Lease&&) = delete;
  ~Lease() { release(); }

  // map [experts]: the slot of each expert of the lease, kNotLoaded elsewhere. Throws ReadError, with the lease released.
  // `interrupted` is asked every 50 ms; where it is true, the lease is released and wait returns false.
  bool wait(int32_t* map, const std::function<bool()>& interrupted = {});
  void release();

 private:
  friend ExpertPool;
  Lease(ExpertPool* pool, std::vector<int32_t> ids) : pool_(pool), ids_(std::move(ids)) {}
  ExpertPool* pool_;
  std::vector<int32_t> ids_, slots_;
};

class ExpertPool {
 public:
  // Throws ReadError for a file that can't be opened or is too short, std::invalid_argument for a layout that isn't one.
  explicit ExpertPool(PoolLayout layout);
  ~ExpertPool();  // ends the readers; there must be no lease any more
  ExpertPool(const ExpertPool&) = delete;

  // ids: distinct. new_visit: false for what is not the first of several requests of one visit of the layer.
  // Throws std::invalid_argument where unpinned slots are too few; nothing is changed then.
  Lease request(int64_t layer, std::vector<int32_t> ids, bool new_visit = true);

  // Reads experts ahead, as far as free slots and those of experts that their layers have done without go.
  void ahead(int64_t layer, const std::vector<int32_t>& ids);
  // What the layer used at its last visit.
  std::vector<int32_t> last_used(int64_t layer) const;

  // resident [experts]: whether an expert is whole in memory.
  void resident(int64_t layer, bool* resident) const;
  PoolCounts counts() const;
  int64_t experts() const { return layout_.experts; }
  // Ends the readers. Who waits for them, or asks later, gets a ReadError (ECANCELED).
  void close();

 private:
  friend Lease;
  enum class State : uint8_t { empty, filling, ready };
  struct Slot {
    int64_t key = -1;  // layer * experts + expert
    State state = State::empty;
    bool ahead = false;             // read ahead, and not used yet
    int32_t pins = 0, left = 0;     // left: chunks still to be read
    uint64_t visit = 0, clock = 0;  // of its layer, and of all, at its last use
    std::optional<Fault> error;     // of its first chunk that failed
  };
  // A chunk of a piece, from its byte `begin` on.
  struct Job {
    int32_t slot;
    int64_t piece, begin;
  };
  struct File;
  struct Bounce;

  void run_reader();
  int64_t chunk_bytes(const Job& job) const;
  std::optional<Fault> read(const Job& job, Bounce& bounce);
  int32_t claim(int64_t layer, bool only_idle);
  void fill(int32_t slot, int64_t key, bool ahead);
  void clear(Slot& slot);
  void unpin(const std::vector<int32_t>& slots);
  void check_open() const;

  const PoolLayout layout_;
  const int64_t per_expert_;  // pieces
  std::vector<std::unique_ptr<File>> files_;
  mutable std::mutex mutex_;
  std::condition_variable work_, done_;
  std::vector<Slot> slots_;
  std::vector<int32_t> slot_of_;            // of every key, or -1
  std::vector<uint64_t> visits_;            // of every layer
  std::vector<std::vector<int32_t>> used_;  // at the last visit of every layer
  int64_t owed_ = 0;                        // slots that requests which wait for them have been promised
  std::deque<Job> urgent_, later_;
  uint64_t clock_ = 0;
  int64_t held_ahead_ = 0;  // slots with `ahead`
  PoolCounts counts_;
  bool closed_ = false;
  const pid_t process_;
  std::vector<std::thread> readers_;
};

}  // namespace dmoe::cpu
