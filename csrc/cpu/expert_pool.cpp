#include "expert_pool.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace dmoe::cpu {

namespace {

constexpr int64_t kAlign = 4096;  // of offsets, sizes and memory past the page cache

const Fault kClosed{ECANCELED, "", "expert memory was closed"};

std::string at_byte(int64_t offset) { return " at byte " + std::to_string(offset); }

bool same(const struct stat& a, const struct stat& b) {
  return a.st_size == b.st_size && a.st_mtim.tv_sec == b.st_mtim.tv_sec && a.st_mtim.tv_nsec == b.st_mtim.tv_nsec;
}

}  // namespace

struct ExpertPool::File {
  File(const std::string& path, bool wants_direct) : path(path), fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd < 0 || ::fstat(fd, &opened) != 0) {
      const int code = errno;
      if (fd >= 0) ::close(fd);
      throw ReadError({code, path, std::strerror(code)});
    }
#ifdef O_DIRECT
    if (wants_direct) direct_fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
#else
    (void)wants_direct;
#endif
    direct = direct_fd >= 0;
  }
  ~File() {
    ::close(fd);
    if (direct_fd >= 0) ::close(direct_fd);
  }

  std::string path;
  int fd, direct_fd = -1;
  std::atomic<bool> direct{false};  // false from the first time that the file system refuses
  struct stat opened{};
};

struct ExpertPool::Bounce {
  explicit Bounce(int64_t bytes) : bytes(bytes), data(static_cast<char*>(std::aligned_alloc(kAlign, bytes))) {
    if (!data) throw std::bad_alloc();
  }
  ~Bounce() { std::free(data); }
  Bounce(const Bounce&) = delete;
  const int64_t bytes;
  char* const data;
};

ExpertPool::ExpertPool(PoolLayout layout)
    : layout_(std::move(layout)),
      per_expert_(layout_.layers > 0 && layout_.experts > 0
                      ? static_cast<int64_t>(layout_.pieces.size()) / (layout_.layers * layout_.experts)
                      : 0),
      process_(::getpid()) {
  const int64_t keys = layout_.layers * layout_.experts;
  if (layout_.slots < 1 || per_expert_ < 1 || layout_.readers < 1 || layout_.ahead_slots < 0 || layout_.chunk < 1 ||
      static_cast<int64_t>(layout_.pieces.size()) != keys * per_expert_) {
    throw std::invalid_argument("an expert pool needs slots, readers, and the pieces of every expert");
  }
  for (const std::string& path : layout_.files) files_.push_back(std::make_unique<File>(path, layout_.direct));
  for (const Piece& piece : layout_.pieces) {
    const bool known = piece.file >= 0 && piece.file < static_cast<int32_t>(files_.size()) && piece.part >= 0 &&
                       piece.part < static_cast<int32_t>(layout_.parts.size());
    if (!known || piece.offset < 0 || piece.bytes < 1 || piece.at < 0 ||
        piece.at + piece.bytes > layout_.parts[piece.part].stride) {
      throw std::invalid_argument("a piece of an expert must lie in a file, and fit into its slot");
    }
    const File& file = *files_[piece.file];
    if (piece.offset + piece.bytes > file.opened.st_size) {
      throw ReadError({EIO, file.path,
                       "the file ends" + at_byte(file.opened.st_size) + ", before an expert does" +
                           at_byte(piece.offset + piece.bytes)});
    }
  }
  slots_.resize(layout_.slots);
  slot_of_.assign(keys, -1);
  visits_.assign(layout_.layers, 0);
  used_.resize(layout_.layers);
  for (int i = 0; i < layout_.readers; ++i) readers_.emplace_back([this] { run_reader(); });
}

ExpertPool::~ExpertPool() {
  close();
  if (process_ != ::getpid()) {  // a fork: there are no threads here to wait for
    for (std::thread& reader : readers_) reader.detach();
    return;
  }
  for (std::thread& reader : readers_) reader.join();
}

void ExpertPool::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  work_.notify_all();
  done_.notify_all();
}

void ExpertPool::check_open() const {
  if (process_ != ::getpid()) throw ReadError({ECANCELED, "", "expert memory has no readers in a forked process"});
  if (closed_) throw ReadError(kClosed);
}

// Forgets what a slot holds.
void ExpertPool::clear(Slot& slot) {
  if (slot.key >= 0) slot_of_[slot.key] = -1;
  held_ahead_ -= slot.ahead;
  slot = Slot{};
}

// A slot to fill while `layer` has its turn, or -1: an empty one; else of those that nobody holds the one that its layer did
// without at its last visit, the longest unused first; else that of the layer whose turn is farthest away (an LRU would throw
// out just what is needed next, as layers go round). only_idle: not the last kind.
int32_t ExpertPool::claim(int64_t layer, bool only_idle) {
  int32_t best = -1;
  std::pair<int64_t, uint64_t> best_rank{};
  for (int32_t i = 0; i < static_cast<int32_t>(slots_.size()); ++i) {
    const Slot& slot = slots_[i];
    if (slot.state == State::empty) return i;
    if (slot.pins > 0 || slot.state != State::ready) continue;
    const int64_t owner = slot.key / layout_.experts;
    const bool idle = slot.visit != visits_[owner];
    if (only_idle && !idle) continue;
    const int64_t nearness = (owner - layer - 1 + layout_.layers) % layout_.layers;
    const std::pair<int64_t, uint64_t> rank{idle ? layout_.layers : nearness, ~slot.clock};
    if (best < 0 || rank > best_rank) best = i, best_rank = rank;
  }
  return best;
}

void ExpertPool::fill(int32_t index, int64_t key, bool ahead) {
  Slot& slot = slots_[index];
  clear(slot);
  slot.key = key;
  slot.state = State::filling;
  slot.ahead = ahead;
  slot.left = 0;
  slot.visit = visits_[key / layout_.experts];
  slot.clock = ++clock_;
  slot_of_[key] = index;
  held_ahead_ += ahead;
  for (int64_t piece = key * per_expert_; piece < (key + 1) * per_expert_; ++piece) {
    for (int64_t begin = 0; begin < layout_.pieces[piece].bytes; begin += layout_.chunk, ++slot.left) {
      (ahead ? later_ : urgent_).push_back({index, piece, begin});
    }
  }
}

Lease ExpertPool::request(int64_t layer, std::vector<int32_t> ids, bool new_visit) {
  if (layer < 0 || layer >= layout_.layers) throw std::invalid_argument("the pool has no such layer");
  for (int32_t id : ids) {
    if (id < 0 || id >= layout_.experts) throw std::invalid_argument("the pool has no expert " + std::to_string(id));
  }
  Lease lease(this, std::move(ids));
  std::unique_lock lock(mutex_);
  check_open();
  const auto slot_of = [&](int32_t id) { return slot_of_[layer * layout_.experts + id]; };
  // Pinned first, so that none of them makes room for another.
  std::vector<int32_t> pinned, missing;
  for (int32_t id : lease.ids_) {
    const int32_t slot = slot_of(id);
    if (slot >= 0) ++slots_[slot].pins;
    (slot >= 0 ? pinned : missing).push_back(slot >= 0 ? slot : id);
  }
  const auto give_up = [&] {
    lease.pool_ = nullptr;
    unpin(pinned);
  };
  const auto unpinned = [&] {
    return std::count_if(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.pins == 0; });
  };
  if (const int64_t room = unpinned() - owed_; room < static_cast<int64_t>(missing.size())) {
    const std::string why = "expert memory holds " + std::to_string(layout_.slots) + " experts, of which " +
                            std::to_string(room) + " may be replaced, and " + std::to_string(missing.size()) +
                            " have to be read";
    give_up();
    throw std::invalid_argument(why);
  }
  if (new_visit) {
    ++visits_[layer];
    for (Slot& slot : slots_) {  // what was read ahead for this visit, and is not used in it, was in vain
      if (slot.ahead && slot.pins == 0 && slot.key / layout_.experts == layer) slot.ahead = false, --held_ahead_;
    }
  }
  for (int32_t slot : pinned) {
    counts_.ahead_used += slots_[slot].ahead;
    held_ahead_ -= std::exchange(slots_[slot].ahead, false);
  }
  if (!later_.empty()) {  // what is needed now goes before what may be
    const auto now = [&](const Job& job) { return slots_[job.slot].pins > 0; };
    std::copy_if(later_.begin(), later_.end(), std::back_inserter(urgent_), now);
    later_.erase(std::remove_if(later_.begin(), later_.end(), now), later_.end());
  }
  for (size_t i = 0; i < missing.size(); ++i) {
    const auto there = [&] { return slot_of(missing[i]); };  // another request may have been faster
    const auto find = [&] { return there() >= 0 ? there() : claim(layer, false); };
    int32_t slot = find();
    while (slot < 0) {  // some are being filled ahead of their use
      owed_ += missing.size() - i;
      done_.wait(lock);
      owed_ -= missing.size() - i;
      if (closed_) {
        give_up();
        check_open();
      }
      slot = find();
    }
    if (there() < 0) fill(slot, layer * layout_.experts + missing[i], false);
    ++slots_[slot].pins;
    pinned.push_back(slot);
  }
  counts_.misses += missing.size();
  counts_.hits += lease.ids_.size() - missing.size();
  std::vector<int32_t>& used = used_[layer];
  if (new_visit) used.clear();
  used.insert(used.end(), lease.ids_.begin(), lease.ids_.end());
  for (int32_t id : lease.ids_) {
    lease.slots_.push_back(slot_of(id));
    slots_[lease.slots_.back()].visit = visits_[layer];
    slots_[lease.slots_.back()].clock = ++clock_;
  }
  work_.notify_all();
  return lease;
}

void ExpertPool::ahead(int64_t layer, const std::vector<int32_t>& ids) {
  if (layer < 0 || layer >= layout_.layers) throw std::invalid_argument("the pool has no such layer");
  const std::lock_guard lock(mutex_);
  check_open();
  for (int32_t id : ids) {
    if (id < 0 || id >= layout_.experts) throw std::invalid_argument("the pool has no expert " + std::to_string(id));
    const int64_t key = layer * layout_.experts + id;
    if (slot_of_[key] >= 0) continue;
    const int32_t slot = held_ahead_ < layout_.ahead_slots ? claim(layer, true) : -1;
    if (slot < 0) break;
    fill(slot, key, true);
    ++counts_.ahead;
  }
  work_.notify_all();
}

std::vector<int32_t> ExpertPool::last_used(int64_t layer) const {
  const std::lock_guard lock(mutex_);
  return used_.at(layer);
}

void ExpertPool::resident(int64_t layer, bool* resident) const {
  const std::lock_guard lock(mutex_);
  for (int64_t e = 0; e < layout_.experts; ++e) {
    const int32_t slot = slot_of_.at(layer * layout_.experts + e);
    resident[e] = slot >= 0 && slots_[slot].state == State::ready;
  }
}

PoolCounts ExpertPool::counts() const {
  const std::lock_guard lock(mutex_);
  PoolCounts counts = counts_;
  for (const Slot& slot : slots_) counts.pinned += slot.pins > 0, counts.resident += slot.state == State::ready;
  return counts;
}

void ExpertPool::unpin(const std::vector<int32_t>& slots) {
  for (int32_t i : slots) {
    Slot& slot = slots_[i];
    if (--slot.pins == 0 && slot.left == 0 && slot.error) clear(slot);
  }
}

void Lease::release() {
  if (!pool_) return;
  const std::lock_guard lock(pool_->mutex_);
  pool_->unpin(slots_);
  pool_->done_.notify_all();
  pool_ = nullptr;
}

bool Lease::wait(int32_t* map, const std::function<bool()>& interrupted) {
  if (!pool_) throw std::invalid_argument("the experts were released");
  ExpertPool& pool = *pool_;
  const auto begin = std::chrono::steady_clock::now();
  std::unique_lock lock(pool.mutex_);
  const auto whole = [&] {
    return pool.closed_ ||
           std::all_of(slots_.begin(), slots_.end(), [&](int32_t i) { return pool.slots_[i].left == 0; });
  };
  bool stop = false;
  // By the system's clock: what the steady one calls is unknown to older thread sanitizers.
  const auto soon = [] { return std::chrono::system_clock::now() + std::chrono::milliseconds(50); };
  while (!stop && !pool.done_.wait_until(lock, soon(), whole)) {
    lock.unlock();
    stop = interrupted && interrupted();
    lock.lock();
  }
  pool.counts_.stall_ns += std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count();
  std::optional<Fault> error;
  for (int32_t i : slots_) {
    if (pool.slots_[i].error && !error) error = pool.slots_[i].error;
    if (pool.closed_ && !error && pool.slots_[i].left > 0) error = kClosed;
  }
  lock.unlock();
  if (stop || error) release();
  if (stop) return false;
  if (error) throw ReadError(*error);
  std::fill_n(map, pool.layout_.experts, kNotLoaded);
  for (size_t i = 0; i < ids_.size(); ++i) map[ids_[i]] = slots_[i];
  return true;
}

void ExpertPool::run_reader() {
  int64_t largest = 0;
  for (const Piece& piece : layout_.pieces) largest = std::max(largest, piece.bytes);
  Bounce bounce((std::min(layout_.chunk, largest) / kAlign + 3) * kAlign);
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [&] { return closed_ || !urgent_.empty() || !later_.empty(); });
    if (closed_) return;
    std::deque<Job>& queue = urgent_.empty() ? later_ : urgent_;
    const Job job = queue.front();
    queue.pop_front();
    std::optional<Fault> error;
    const bool wanted = !slots_[job.slot].error;  // else it is not going to be whole
    if (wanted) {
      lock.unlock();
      error = read(job, bounce);
      lock.lock();
    }
    Slot& slot = slots_[job.slot];
    if (error && !slot.error) slot.error = error;
    if (wanted && !error) counts_.bytes_read += chunk_bytes(job);
    if (--slot.left == 0) {
      if (!slot.error) {
        slot.state = State::ready;
      } else if (slot.pins == 0) {
        clear(slot);
      }
      done_.notify_all();
    }
  }
}

int64_t ExpertPool::chunk_bytes(const Job& job) const {
  return std::min(layout_.chunk, layout_.pieces[job.piece].bytes - job.begin);
}

std::optional<Fault> ExpertPool::read(const Job& job, Bounce& bounce) {
  const Piece& piece = layout_.pieces[job.piece];
  File& file = *files_[piece.file];
  const Part& part = layout_.parts[piece.part];
  const int64_t begin = piece.offset + job.begin, bytes = chunk_bytes(job);
  char* to = part.data + job.slot * part.stride + piece.at + job.begin;
  const auto fail = [&](int code, int64_t offset, const std::string& what) {
    const int64_t key = job.piece / per_expert_;
    return Fault{code, file.path,
                 what + at_byte(offset) + " (expert " + std::to_string(key % layout_.experts) + " of MoE layer " +
                     std::to_string(key / layout_.experts) + ")"};
  };
  for (int64_t done = 0; done < bytes;) {
    const int64_t offset = begin + done, left = bytes - done;
    const bool direct = file.direct;
    const int64_t skip = direct ? offset % kAlign : 0;
    const int64_t want = direct ? std::min(bounce.bytes, (skip + left + kAlign - 1) / kAlign * kAlign) : left;
    char* into = direct ? bounce.data : to + done;
    const int fd = direct ? file.direct_fd : file.fd;
    const ssize_t got =
        layout_.read ? layout_.read(fd, into, want, offset - skip) : ::pread(fd, into, want, offset - skip);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EINVAL && direct) {
      file.direct = false;
      continue;
    }
    if (got < 0) return fail(errno, offset, std::strerror(errno));
    if (got <= skip) return fail(EIO, offset, "the file ends before the expert does,");
    const int64_t fresh = std::min<int64_t>(got - skip, left);
    if (direct) std::memcpy(to + done, bounce.data + skip, fresh);
    done += fresh;
  }
  // Looked at afterwards: what was read before a change is right.
  struct stat now{};
  if (::fstat(file.fd, &now) != 0) return fail(errno, begin, std::strerror(errno));
  if (!same(now, file.opened)) return fail(ESTALE, begin, "the file has changed since it was opened,");
  return {};
}

}  // namespace dmoe::cpu
