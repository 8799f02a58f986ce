// The experts of csrc/cpu by dot products, with emulated instructions: for tests/test_amx.py (by ctypes).
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dot.h"
#include "cpu/experts.h"
#include "cpu/isa.h"
#include "cpu/widen.h"
#include "cpu/work.h"
#include "emulated_tiles.h"

using namespace dmoe::cpu;

namespace {

Isa chosen = Isa::amx;

// A copy of memory, or bytes of 255, that ends at a page which nobody may touch: where it begins is whatever remains.
class Guarded {
 public:
  Guarded(const void* from, int64_t bytes) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page;
    mapped_ = (pages + 1) * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + pages * page, page, PROT_NONE);
    from ? std::memcpy(data(), from, bytes) : std::memset(data(), 255, bytes);
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  char* data() const { return base_ + mapped_ - sysconf(_SC_PAGESIZE) - bytes_; }

 private:
  int64_t bytes_, mapped_;
  char* base_;
};

// Equal parts on `threads` threads. What one of them throws comes out.
ParallelFor on_threads(int threads) {
  return [=](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    std::exception_ptr thrown;
    std::mutex mutex;
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i) {
      const int64_t begin = n * i / threads, end = n * (i + 1) / threads;
      if (begin == end) continue;
      running.emplace_back([&, begin, end] {
        try {
          body(begin, end);
        } catch (...) {
          const std::lock_guard lock(mutex);
          thrown = std::current_exception();
        }
      });
    }
    for (std::thread& thread : running) thread.join();
    if (thrown) std::rethrow_exception(thrown);
  };
}

int64_t bytes_of(const Weight& weight, int64_t count) {
  return weight.format == Format::plain ? 2 * count : weight.format == Format::int4 ? count / 2 : count;
}

}  // namespace

namespace dmoe::cpu {

Isa isa() { return chosen; }
void widen_forward(const Experts&, const Slots&, const ParallelFor&) { throw std::logic_error("bf16 alone"); }

}  // namespace dmoe::cpu

extern "C" {

struct Layer {
  int64_t tokens, hidden, intermediate, experts, top_k, shared_intermediate;
  int32_t isa, threads, format, shared_format, quantize_activations, activation;
  const void *x, *w13, *w13_scale, *w2, *w2_scale, *shared_w13, *shared_w13_scale, *shared_w2, *shared_w2_scale;
  const int32_t* topk_ids;
  const float* topk_weights;
  void* y;
};

// Null, or what went wrong.
const char* forward(const Layer* layer) try {
  const Layer& l = *layer;
  chosen = static_cast<Isa>(l.isa);
  std::vector<std::unique_ptr<Guarded>> guarded;
  const auto guard = [&](Weight& weight, int64_t count) {
    if (!weight.data) return;
    guarded.push_back(std::make_unique<Guarded>(weight.data, bytes_of(weight, count)));
    weight.data = guarded.back()->data();
  };
  const auto format = static_cast<Format>(l.format), shared = static_cast<Format>(l.shared_format);
  Experts args{l.tokens,
               l.hidden,
               l.intermediate,
               l.experts,
               l.top_k,
               Dtype::bf16,
               nullptr,
               Weight(l.w13, format, l.w13_scale, false),
               Weight(l.w2, format, l.w2_scale, false),
               l.topk_ids,
               l.topk_weights,
               l.shared_intermediate,
               Weight(l.shared_w13, shared, l.shared_w13_scale, false),
               Weight(l.shared_w2, shared, l.shared_w2_scale, false),
               nullptr,
               l.quantize_activations != 0};
  args.activation = static_cast<dmoe::Activation>(l.activation);
  const Guarded x(l.x, 2 * l.tokens * l.hidden), y(nullptr, 2 * l.tokens * l.hidden);
  args.x = x.data(), args.y = y.data();
  guard(args.w13, 2 * l.experts * l.intermediate * l.hidden);
  guard(args.w2, l.experts * l.intermediate * l.hidden);
  guard(args.shared_w13, 2 * l.shared_intermediate * l.hidden);
  guard(args.shared_w2, l.shared_intermediate * l.hidden);
  dmoe::emulated::products = 0;
  experts_forward(args, on_threads(l.threads));
  std::memcpy(l.y, y.data(), 2 * l.tokens * l.hidden);
  return dmoe::emulated::threads_with_tiles == 0 ? nullptr : "a thread kept its tiles";
} catch (const std::exception& error) {
  static std::string why;
  why = error.what();
  return why.c_str();
}

int64_t products() { return dmoe::emulated::products; }
}
