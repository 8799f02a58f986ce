// Products of a stage of the ring on tensor cores, in one warp.
#pragma once

#include "experts_layout.h"

namespace dmoe::cuda {

// sum += weights * tokens over a chunk of 16 * steps numbers; weights, tokens: the warp's rows of a stage.
template <bool kHalf, int kEights>
DMOE_DEVICE void multiply(float (&sum)[kEights][4], const char* weights, const char* tokens, int steps) {
  // What each lane names in a load of matrices: rows 0-7, 8-15 and k 0-7, 8-15 in the order of the MMA's registers.
  constexpr int kRow = pitch(false).weights;  // of tokens too
  const int lane = dev::lane();
  weights += (lane & 15) * kRow + (lane >> 4) * 16;
  tokens += ((lane >> 4) * 8 + (lane & 7)) * kRow + (lane >> 3 & 1) * 16;
  const auto step = [&](int k) {
    uint32_t m[4];
    dev::load_matrices(m, weights + k * 32);
#pragma unroll
    for (int n = 0; n < kEights; n += 2) {
      uint32_t b[4];
      dev::load_matrices(b, tokens + n * 8 * kRow + k * 32);
      dev::mma<kHalf>(sum[n], m[0], m[1], m[2], m[3], b[0], b[1]);
      dev::mma<kHalf>(sum[n + 1], m[0], m[1], m[2], m[3], b[2], b[3]);
    }
  };
  if (steps == kChunk / 16) {
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) step(k);
  } else {
#pragma unroll 1
    for (int k = 0; k < steps; ++k) step(k);
  }
}

template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t v[kWords];
};

// The same over k numbers in the layout of fp8 (`pitch`), each block of 128 under its scales. kFp8: whether the weights are, or
// as plain as the tokens. A lane takes eight numbers in a row from both, so that k has another order in the MMA.
template <bool kHalf, bool kFp8, int kEights>
DMOE_DEVICE void multiply_scaled(float (&sum)[kEights][4], const char* weights, const char* tokens, int k,
                                 const Scales& scales) {
  constexpr int kBytes = kFp8 ? 1 : 2, kStep = 32, kSteps = kScaleBlock / kStep;
  constexpr int kRow = pitch(true).weights, kToken = pitch(true).tokens;
  const int row = dev::lane() >> 2, eight = dev::lane() % 4 * 8;
  weights += row * kRow + eight * kBytes;
  tokens += row * kToken + eight * 2;
#pragma unroll 1
  for (int block = 0; k > 0; ++block) {
    float part[kEights][4] = {};
    const auto step = [&](int i) {
      uint32_t m[2][4];  // rows 0-7, 8-15 of four numbers, then of the next four
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto w = *reinterpret_cast<const Words<2 * kBytes>*>(weights + half * 8 * kRow + i * kStep * kBytes);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          if constexpr (kFp8) {
            m[half][pair] = dev::widen_fp8<kHalf>(w.v[pair / 2] >> pair % 2 * 16);
          } else {
            m[half][pair] = w.v[pair];
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        const auto b = *reinterpret_cast<const Words<4>*>(tokens + n * 8 * kToken + i * kStep * 2);
        dev::mma<kHalf>(part[n], m[0][0], m[1][0], m[0][1], m[1][1], b.v[0], b.v[1]);
        dev::mma<kHalf>(part[n], m[0][2], m[1][2], m[0][3], m[1][3], b.v[2], b.v[3]);
      }
    };
    if (k >= kScaleBlock) {
#pragma unroll(kEights > 6 ? 2 : kSteps)  // as many as registers last for
      for (int i = 0; i < kSteps; ++i) step(i);
    } else {
#pragma unroll 1
      for (int i = 0; i < k / kStep; ++i) step(i);
    }
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[n][j] += scales.of[j / 2][block] * part[n][j];
    }
    k -= kScaleBlock;
    weights += kScaleBlock * kBytes;
    tokens += kScaleBlock * 2;
  }
}

}  // namespace dmoe::cuda
