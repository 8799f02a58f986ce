#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "widen_kernels.h"
#include "work.h"

namespace dmoe::cpu {
namespace {

// Elements worth a second thread: waking one takes longer than a block of 32 tokens.
constexpr int64_t kGrain = 1 << 17;

// A row of numbers as fp32, with zeros up to a multiple of kPad.
struct Row {
  Buffer<float> data;
  explicit Row(int64_t n) : data(uninitialized<float>(padded(n))) {}
  float* get() { return data.get(); }
  float& operator[](int64_t i) { return data[i]; }
  void read(const void* from, Dtype dtype, int64_t n) { widen_kernels().widen(from, dtype, n, Dtype::f32, get()); }
};

// Rounds n numbers to `dtype`, into `to`, and back.
void round_to(float* x, int64_t n, Dtype dtype, void* to) {
  widen_kernels().narrow(x, n, dtype, to);
  if (dtype != Dtype::f32) widen_kernels().widen(to, dtype, n, Dtype::f32, x);
}

// x and out become weight * round(x / rms).
void normalise(float* x, const float* weight, int64_t n, float eps, Dtype dtype, void* out) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += x[i] * x[i];
  const float scale = 1 / std::sqrt(static_cast<float>(squares / n) + eps);
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
  round_to(x, n, dtype, out);
  for (int64_t i = 0; i < n; ++i) x[i] *= weight[i];
  round_to(x, n, dtype, out);
}

}  // namespace

void add_rms_norm(const AddRmsNorm& args, const ParallelFor& parallel) {
  parallel(args.rows, 1 + kGrain / args.size, [&](int64_t begin, int64_t end) {
    Row x(args.size), delta(args.size), weight(args.size);
    weight.read(args.weight, args.dtype, args.size);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * args.size * size_of(args.dtype);
      x.read(static_cast<const char*>(args.x) + at, args.dtype, args.size);
      delta.read(static_cast<const char*>(args.delta) + at, args.dtype, args.size);
      for (int64_t i = 0; i < args.size; ++i) x[i] += delta[i];
      round_to(x.get(), args.size, args.dtype, static_cast<char*>(args.sum) + at);
      normalise(x.get(), weight.get(), args.size, args.eps, args.dtype, static_cast<char*>(args.normed) + at);
    }
  });
}

void qk_norm_rope(const QkNormRope& a, const ParallelFor& parallel) {
  const int64_t bytes = a.size * size_of(a.dtype), heads = a.heads + 2 * a.kv_heads, half = a.rotary / 2;
  parallel(a.sequences * a.tokens, 1 + kGrain / (heads * a.size), [&](int64_t begin, int64_t end) {
    Row x(a.size), q_weight(a.size), k_weight(a.size), cos(a.rotary), sin(a.rotary), straight(a.rotary),
        across(a.rotary);
    Buffer<char> rounded = uninitialized<char>(padded(a.rotary) * 4);
    if (a.q_weight) q_weight.read(a.q_weight, a.dtype, a.size);
    if (a.q_weight) k_weight.read(a.k_weight, a.dtype, a.size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / a.tokens, token = i % a.tokens, row = a.rows ? a.rows[sequence] : sequence;
      const auto turning = [&](const void* from) {
        return static_cast<const char*>(from) + (a.past + token) * a.rotary * size_of(a.dtype);
      };
      cos.read(turning(a.cos), a.dtype, a.rotary);
      sin.read(turning(a.sin), a.dtype, a.rotary);
      for (int64_t head = 0; head < heads; ++head) {
        const char* from = static_cast<const char*>(a.qkv) + (i * heads + head) * bytes;
        const int64_t kv_head = head < a.heads + a.kv_heads ? head - a.heads : head - a.heads - a.kv_heads;
        const int64_t place = ((row * a.kv_heads + kv_head) * a.capacity + a.past + token) * bytes;
        if (head >= a.heads + a.kv_heads) {
          std::memcpy(static_cast<char*>(a.values) + place, from, bytes);
          continue;
        }
        char* to = head < a.heads
                       ? static_cast<char*>(a.query) + ((sequence * a.heads + head) * a.tokens + token) * bytes
                       : static_cast<char*>(a.keys) + place;
        x.read(from, a.dtype, a.size);
        if (a.q_weight) normalise(x.get(), (head < a.heads ? q_weight : k_weight).get(), a.size, a.eps, a.dtype, to);
        for (int64_t k = 0; k < a.rotary; ++k) {
          straight[k] = x[k] * cos[k];
          across[k] = (k < half ? -x[k + half] : x[k - half]) * sin[k];
        }
        round_to(straight.get(), a.rotary, a.dtype, rounded.get());
        round_to(across.get(), a.rotary, a.dtype, rounded.get());
        for (int64_t k = 0; k < a.rotary; ++k) x[k] = straight[k] + across[k];
        widen_kernels().narrow(x.get(), a.size, a.dtype, to);
      }
    }
  });
}

void greedy(const Greedy& args, const ParallelFor& parallel) {
  constexpr int64_t kChunk = 2048;  // in L1 as fp32
  constexpr float kLow = -std::numeric_limits<float>::infinity();
  parallel(args.rows, 1, [&](int64_t begin, int64_t end) {
    Row x(kChunk);
    for (int64_t row = begin; row < end; ++row) {
      const char* logits = static_cast<const char*>(args.logits) + row * args.vocab * size_of(args.dtype);
      float most = kLow, sum = 0;
      int64_t token = 0;
      for (int64_t first = 0; first < args.vocab; first += kChunk) {
        const int64_t n = std::min(kChunk, args.vocab - first);
        x.read(logits + first * size_of(args.dtype), args.dtype, n);
        std::fill(x.get() + n, x.get() + padded(n), kLow);
        const float chunk = widen_kernels().max_of(x.get(), padded(n));
        if (chunk > most) {
          sum *= std::exp(most - chunk);
          most = chunk;
          token = first + (std::find(x.get(), x.get() + n, chunk) - x.get());
        }
        // -infinity adds 2^-126, which rounds away; infinity at the top makes the sum NaN.
        sum += widen_kernels().sum_exp(x.get(), padded(n), most == kLow ? 0 : most);
      }
      args.token[row] = token;
      args.probability[row] = most == kLow ? std::numeric_limits<float>::quiet_NaN() : 1 / sum;
    }
  });
}

}  // namespace dmoe::cpu
