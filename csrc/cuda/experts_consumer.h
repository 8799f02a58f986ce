// The consumer warps of the expert kernel: they multiply what the ring holds, and write h, the parts of y, and y.
#pragma once

#include "experts_multiply.h"

namespace dmoe::cuda {

struct alignas(8) Quad {
  uint16_t value[4];
};

template <bool kHalf>
DMOE_DEVICE uint16_t round16(float value) {
  return kHalf ? dev::float_to_half(value) : dev::float_to_bf16(value);
}

// One piece of a row's y from the parts, in their order: four columns of a token at a time, all loads before the first addition.
template <bool kHalf, bool kFp8>
DMOE_DEVICE void add_parts(const Plan<kFp8>& p, const Tile& tile, const float* parts, uint16_t* y, int thread) {
  const int fours = p.form.rows / 4, all = static_cast<int>(p.tokens) * fours, pieces = p.form.splits;
  const int end = all * (tile.split + 1) / pieces;
  for (int j = all * tile.split / pieces + thread; j < end; j += p.form.consumers()) {
    const int64_t at = j / fours * p.hidden + tile.row + j % fours * 4;
    dev::Four part[kMaxSplits];
#pragma unroll
    for (int s = 0; s < kMaxSplits; ++s) {
      part[s] = s < p.form.splits ? dev::load_fresh(&parts[s * p.tokens * p.hidden + at]) : dev::Four{};
    }
    Quad out;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float total = 0;
#pragma unroll
      for (int s = 0; s < kMaxSplits; ++s) total += part[s].v[c];
      out.value[c] = round16<kHalf>(total);
    }
    *reinterpret_cast<Quad*>(y + at) = out;
  }
}

// The products of one stage, chunk c of a tile, in one warp.
template <bool kHalf, bool kFp8, int kEights>
DMOE_DEVICE void multiply_stage(float (&sum)[kEights][4], const Plan<kFp8>& p, const Tile& tile, int c,
                                const Ring& ring, const char* shared, int64_t bytes, int warp, int stage) {
  constexpr Pitch kPitch = pitch(kFp8);
  const char* weights = shared + kExpertsHeader + stage * bytes + warp * 16 * kPitch.weights;
  const char* of_tokens = shared + kExpertsHeader + stage * bytes + p.form.rows * kPitch.weights;
  const int steps = ring.steps[stage];
  if constexpr (!kFp8) {
    multiply<kHalf>(sum, weights, of_tokens, steps);
  } else if (p.fp8(tile.shared(p, c))) {
    multiply_scaled<kHalf, true>(sum, weights, of_tokens, 16 * steps, ring.scales[stage]);
  } else {
    multiply_scaled<kHalf, false>(sum, weights, of_tokens, 16 * steps, ring.scales[stage]);
  }
}

// h of an up tile: of a thread's sums 0-1 are of a gate row and 2-3 of its up row.
template <bool kHalf, bool kGelu, int kEights>
DMOE_DEVICE void store_h(const Tile& tile, const float (&sum)[kEights][4], const float* weights, uint16_t* h,
                         int64_t intermediate, int lane, int warp, int low, int tokens) {
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int token = n * 8 + lane % 4 * 2 + j;
      if (token < tokens) {
        const float weight = weights[token], gate = sum[n][j], up = sum[n][2 + j];
        // Weight 0: the token did not choose this expert, and an overflow there must not reach it.
        const float value = weight == 0 ? 0.0f : (kGelu ? dev::gelu_tanh(gate) : dev::silu(gate)) * up * weight;
        h[token * intermediate + tile.row + warp * 8 + low] = round16<kHalf>(value);
      }
    }
  }
}

// y of a down tile, or its split's part of it: a thread's sums 0-1 are of row `low`, 2-3 of row low + 8.
template <bool kHalf, bool kFp8, int kEights>
DMOE_DEVICE void store_y(const Plan<kFp8>& p, const Tile& tile, const float (&sum)[kEights][4], float* parts,
                         uint16_t* y, int lane, int warp, int low, int tokens) {
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = n * 8 + lane % 4 * 2 + j % 2, column = tile.row + warp * 16 + low + j / 2 * 8;
      if (token < tokens) {
        if (p.form.splits == 1) {
          y[token * p.hidden + column] = round16<kHalf>(sum[n][j]);
        } else {
          parts[(tile.split * p.tokens + token) * p.hidden + column] = sum[n][j];
        }
      }
    }
  }
}

// One piece of y, once all parts of its columns are there.
template <bool kHalf, bool kFp8>
DMOE_DEVICE void sum_tile(const Plan<kFp8>& p, const Tile& tile, const uint32_t* counters, const float* parts,
                          uint16_t* y, int thread) {
  const int threads = p.form.consumers();
  const uint32_t* arrived = &counters[kColumns + tile.row / p.form.rows];
  if (thread == 0) {
    while (dev::load_acquire(arrived) < static_cast<uint32_t>(p.form.splits)) dev::pause(kPollPause);
  }
  dev::sync_some(1, threads);
  add_parts<kHalf>(p, tile, parts, y, thread);
}

// The warps that multiply. Warp i has rows 16 i .. 16 i + 15 of a tile, all tokens: at most 16 * kSixteens. A few lines stay
// here, and a few arguments are passed on, because nvcc 13.0 makes other code of it otherwise.
template <bool kHalf, bool kFp8, int kSixteens, bool kGelu>
DMOE_DEVICE void consume(const Experts& a, const Plan<kFp8>& p, const ExpertsWorkspace& w, char* shared) {
  Ring& ring = *reinterpret_cast<Ring*>(shared);
  const int n_stages = p.form.stages, threads = p.form.consumers();
  const int lane = dev::lane(), warp = dev::warp(), thread = dev::thread(), tokens = static_cast<int>(p.tokens);
  const int top_k = static_cast<int>(a.top_k);
  const int64_t bytes = stage_bytes(p.tokens, p.form.rows, kFp8);
  uint32_t* counters = a.schedule;
  // Every token's choice, slot by slot.
  int32_t* chosen = reinterpret_cast<int32_t*>(shared + kExpertsHeader + n_stages * bytes);
  float* chosen_weights = reinterpret_cast<float*>(chosen + tokens * top_k);
  for (int i = thread; i < tokens * top_k; i += threads) {
    chosen[i % top_k * tokens + i / top_k] = a.topk_ids[i];
    chosen_weights[i % top_k * tokens + i / top_k] = a.topk_weights[i];
  }
  dev::sync_some(1, threads);
  // Known early, as its divisions would stand between h and those who wait for it.
  const int split_begin = p.split_begin(thread), split_end = p.split_begin(thread + 1);
  Stage at;

  for (;;) {
    dev::barrier_wait(&ring.full[at.index], at.phase);
    const int i = ring.tile[at.index];
    if (i < 0) return;
    const Tile tile(p, i);
    if (tile.up && thread < tokens) {
      float weight = tile.member < 0 ? 1.0f : 0.0f;
      if (tile.member >= 0) {
        const int expert = static_cast<int>(a.schedule[kUsed + tile.member]);
        for (int j = 0; j < top_k; ++j) {
          // A token may name an expert twice.
          if (chosen[j * tokens + thread] == expert) weight += chosen_weights[j * tokens + thread];
        }
      }
      ring.weight[thread] = weight;
    }

    float sum[2 * kSixteens][4] = {};
    for (int c = 0; c < (tile.chunks ? tile.chunks : 1); ++c, at.next(n_stages)) {
      dev::barrier_wait(&ring.full[at.index], at.phase);
      multiply_stage<kHalf>(sum, p, tile, c, ring, shared, bytes, warp, at.index);
      dev::sync_warp();
      if (lane == 0) dev::barrier_arrive(&ring.empty[at.index]);
    }

    char* work = static_cast<char*>(a.workspace);
    float* parts = reinterpret_cast<float*>(work + w.parts);
    uint16_t* y = static_cast<uint16_t*>(a.y);
    if (!tile.up && !tile.down) {
      sum_tile<kHalf>(p, tile, counters, parts, y, thread);
      continue;
    }
    const int low = lane >> 2;  // this thread's rows of the product: low and low + 8
    if (tile.up) {
      dev::sync_some(1, threads);  // the weights of the tokens are there
      const int64_t intermediate = tile.member < 0 ? p.shared_intermediate : p.intermediate;
      uint16_t* h = reinterpret_cast<uint16_t*>(
          work + (tile.member < 0 ? w.shared_h : w.h + 2 * tile.member * p.tokens * intermediate));
      store_h<kHalf, kGelu>(tile, sum, ring.weight, h, intermediate, lane, warp, low, tokens);
      dev::fence_copies();  // h is read by bulk copies
      dev::sync_some(1, threads);
      const bool read = split_begin < p.member_begin(tile.member + 1) && p.member_begin(tile.member) < split_end;
      if (thread < p.form.splits && read) dev::atomic_add_ordered(&counters[kUpDone + thread], 1);
      continue;
    }
    store_y<kHalf>(p, tile, sum, parts, y, lane, warp, low, tokens);
    if (p.form.splits == 1) continue;
    dev::sync_some(1, threads);
    if (thread == 0) dev::atomic_add_ordered(&counters[kColumns + tile.row / p.form.rows], 1);
  }
}

}  // namespace dmoe::cuda
