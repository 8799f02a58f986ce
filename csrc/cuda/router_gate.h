// The gate: logits = x @ gate_weight.T with exact products and fp32 sums.
//
// bf16 is one part; fp16 and fp32 are cut into three bf16 parts, which hold every bit. Products of parts below 2^-24 of the
// result are left out. So tensor cores serve every pair of dtypes, and bf16 weights cost one product.
#pragma once

#include "router_layout.h"

namespace dmoe::cuda {

DMOE_DEVICE void split(float value, uint32_t (&part)[3]) {
  uint32_t b = dev::bits(value);
  const bool finite = (b & 0x7f800000u) != 0x7f800000u;
  if (value != value) b |= 0x00400000u;  // a NaN stays one when it is cut
  part[0] = b >> 16;
  float rest = finite ? value - dev::from_bits(b & 0xffff0000u) : 0.0f;
  part[1] = dev::bits(rest) >> 16;
  rest -= dev::from_bits(dev::bits(rest) & 0xffff0000u);
  part[2] = dev::bits(rest) >> 16;
}

// Elements at .. at + 7 as pairs of bf16, for each part.
template <int P>
DMOE_DEVICE void load_parts(const void* base, Dtype dtype, int64_t at, bool valid, uint32_t (&out)[P][4]) {
  if (!valid) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[p][j] = 0;
    }
    return;
  }
  if constexpr (P == 1) {
    const Vector v = *reinterpret_cast<const Vector*>(static_cast<const uint16_t*>(base) + at);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[0][j] = v.word[j];
  } else {
    Vector v[2];
    if (dtype == Dtype::f32) {
      v[0] = reinterpret_cast<const Vector*>(static_cast<const float*>(base) + at)[0];
      v[1] = reinterpret_cast<const Vector*>(static_cast<const float*>(base) + at)[1];
    } else {
      v[0] = *reinterpret_cast<const Vector*>(static_cast<const uint16_t*>(base) + at);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t low[3], high[3];
      if (dtype == Dtype::f32) {
        split(dev::from_bits(v[j >> 1].word[j % 2 * 2]), low);
        split(dev::from_bits(v[j >> 1].word[j % 2 * 2 + 1]), high);
      } else {
        split(dev::half_to_float(static_cast<uint16_t>(v[0].word[j])), low);
        split(dev::half_to_float(static_cast<uint16_t>(v[0].word[j] >> 16)), high);
      }
#pragma unroll
      for (int p = 0; p < P; ++p) out[p][j] = low[p] | high[p] << 16;
    }
  }
}

// Partial logits of up to 32 tokens and 32 experts, one part of the sum per warp: partial[warp][token][kGatePitch].
// A lane reads 8 neighbouring elements of a row. Which of them an MMA calls its k-th does not matter as long as both
// operands agree, so the 16-byte vectors are the fragments.
template <int PX, int PW>
DMOE_DEVICE void gate_tile(const Router& a, int64_t token0, int n_tokens, int expert0, int n_experts, float* partial) {
  constexpr int kAhead = PX * PW == 1 ? 4 : 1;  // vectors in flight; 4 fills the registers. Not measured.
  const int lane = dev::lane(), group = lane >> 2, column = lane % 4 * 8;
  const int chunks = static_cast<int>((a.hidden + 31) / 32);
  float sum[2][4][4] = {};
  for (int first = dev::warp(); first < chunks; first += kRouterWarps * kAhead) {
    uint32_t w[kAhead][2][2][PW][4], x[kAhead][4][PX][4];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t k = (first + u * kRouterWarps) * 32ll + column;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = i * 8 + group;
        load_parts<PW>(a.gate_weight, a.gate_dtype, (expert0 + e) * a.hidden + k, k < a.hidden && e < n_experts,
                       w[u][i >> 1][i & 1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = i * 8 + group;
        load_parts<PX>(a.x, a.x_dtype, (token0 + t) * a.hidden + k, k < a.hidden && t < n_tokens, x[u][i]);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int p = 0; p < PW; ++p) {
#pragma unroll
            for (int q = 0; q < PX; ++q) {
              if (p + q > 2) continue;
              const auto& low = w[u][m][0][p];
              const auto& high = w[u][m][1][p];
              const auto& b = x[u][n][q];
              dev::mma<false>(sum[m][n], low[0], high[0], low[1], high[1], b[0], b[1]);
              dev::mma<false>(sum[m][n], low[2], high[2], low[3], high[3], b[2], b[3]);
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int expert = m * 16 + group + c / 2 * 8, token = n * 8 + lane % 4 * 2 + c % 2;
        partial[(dev::warp() * kGateTile + token) * kGatePitch + expert] = sum[m][n][c];
      }
    }
  }
}

// Calls store(token, expert, logits of four experts from there on) for a tile; the same sum in the same order, in
// whichever kernel. Behind n_experts they may be anything.
template <class Store>
DMOE_DEVICE void gate(const Router& a, int64_t token0, int n_tokens, int expert0, int n_experts, float* partial,
                      const Store& store) {
  if (a.x_dtype == Dtype::bf16) {
    if (a.gate_dtype == Dtype::bf16) {
      gate_tile<1, 1>(a, token0, n_tokens, expert0, n_experts, partial);
    } else {
      gate_tile<1, 3>(a, token0, n_tokens, expert0, n_experts, partial);
    }
  } else if (a.gate_dtype == Dtype::bf16) {
    gate_tile<3, 1>(a, token0, n_tokens, expert0, n_experts, partial);
  } else {
    gate_tile<3, 3>(a, token0, n_tokens, expert0, n_experts, partial);
  }
  dev::sync();
  static_assert(kGateTile * kGateTile == 4 * kRouterThreads);
  const int token = dev::thread() / (kGateTile / 4), expert = dev::thread() % (kGateTile / 4) * 4;
  if (token < n_tokens && expert < n_experts) {
    float logit[4] = {};
#pragma unroll
    for (int warp = 0; warp < kRouterWarps; ++warp) {
      const float* from = &partial[(warp * kGateTile + token) * kGatePitch + expert];
      const dev::Four part = *reinterpret_cast<const dev::Four*>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) logit[i] += part.v[i];
    }
    store(token, expert, logit);
  }
  dev::sync();
}

// The first launch of the two-launch form: thread block i computes one tile.
DMOE_DEVICE void gate_kernel(const Router& a, char* shared) {
  const int expert_tiles = static_cast<int>((a.experts + kGateTile - 1) / kGateTile);
  const int64_t token0 = static_cast<int64_t>(dev::cta() / expert_tiles) * kGateTile;
  const int expert0 = dev::cta() % expert_tiles * kGateTile;
  const int n_tokens = static_cast<int>(a.tokens - token0 < kGateTile ? a.tokens - token0 : kGateTile);
  const int n_experts =
      static_cast<int>(a.experts) - expert0 < kGateTile ? static_cast<int>(a.experts) - expert0 : kGateTile;
  gate(a, token0, n_tokens, expert0, n_experts, reinterpret_cast<float*>(shared),
       [&](int token, int expert, const float (&logit)[4]) {
         float* to = a.logits + (token0 + token) * a.experts + expert0 + expert;
         for (int i = 0; i < 4 && expert + i < n_experts; ++i) to[i] = logit[i];
       });
}

// Logits: every thread block of the cluster computes its experts for all tokens, and sends them to the tokens' owners,
// with the scores where those need nothing else.
DMOE_DEVICE void gate_of_cluster(const Router& a, const Routing& routing, const Part& p) {
  const int slice = (p.experts + 4 * p.size - 1) / (4 * p.size) * 4;  // fours do not cross from one to the next
  const int begin = p.rank * slice, last = p.experts < begin + slice ? p.experts : begin + slice;
  for (int expert0 = begin; expert0 < last; expert0 += kGateTile) {
    for (int token0 = 0; token0 < p.rows.count; token0 += kGateTile) {
      const int n_tokens = p.rows.count - token0 < kGateTile ? p.rows.count - token0 : kGateTile;
      const int n_experts = last - expert0 < kGateTile ? last - expert0 : kGateTile;
      gate(a, p.rows.begin + token0, n_tokens, expert0, n_experts, reinterpret_cast<float*>(p.scratch),
           [&](int t, int e, const float (&logit)[4]) {
             const int at = (token0 + t) / p.size * p.padded + expert0 + e, owner = (token0 + t) % p.size;
             dev::Four out = {{logit[0], logit[1], logit[2], logit[3]}};
             *reinterpret_cast<dev::Four*>(&dev::remote(p.logits, owner)[at]) = out;
             if (routing.score == Score::sigmoid) {
#pragma unroll
               for (int i = 0; i < 4; ++i) out.v[i] = score(logit[i], Score::sigmoid, Row{});
               *reinterpret_cast<dev::Four*>(&dev::remote(p.scores, owner)[at]) = out;
             }
           });
    }
  }
}

}  // namespace dmoe::cuda
