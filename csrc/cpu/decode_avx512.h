// Quantised weights as bf16(float(q) * scale), 64 bytes at a time, by looking the numbers up: a group of weights has at most
// 256 different ones. A decoder has kWeights, what one call decodes, into kWeights / 32 steps of bf16.
#pragma once

#include <immintrin.h>

#include "dot_kernels.h"

namespace dmoe::cpu {
namespace {

inline __m512i as_bf16(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

// The 16 numbers of int4 times their scale.
struct Int4 {
  static constexpr int64_t kWeights = 32;
  alignas(64) char table[64];  // twice, as lookups go by five bits

  static constexpr int64_t bytes(int64_t weights) { return (weights + 1) / 2; }
  void set(float scale) {
    const __m512 numbers = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    const __m512 values = _mm512_mul_ps(numbers, _mm512_set1_ps(scale));
    _mm512_store_si512(table, as_bf16(values, values));
  }
  void operator()(const char* q, __m512i out[1]) const {
    // Each 64 bits take the 16 that hold their four nibbles, then each word the bits of its own.
    const __m512i copies =
        _mm512_permutexvar_epi64(_mm512_set_epi64(1, 1, 1, 1, 0, 0, 0, 0),
                                 _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
    const auto four = [](int64_t bit) { return (bit + 12) << 48 | (bit + 8) << 32 | (bit + 4) << 16 | bit; };
    const __m512i bits = _mm512_set_epi64(four(48), four(32), four(16), four(0), four(48), four(32), four(16), four(0));
    out[0] = _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(bits, copies), _mm512_load_si512(table));
  }
};

// The 128 magnitudes of fp8 times their scale: the low bytes of bf16, then the high ones.
struct E4m3 {
  static constexpr int64_t kWeights = 64;
  const char* table;  // 256 bytes

  static constexpr int64_t bytes(int64_t weights) { return weights; }
  static void make(float scale, char* table) {
    for (int i = 0; i < 4; ++i) {
      const auto part = [&](int at) { return _mm512_mul_ps(_mm512_loadu_ps(kFp8.value + at), _mm512_set1_ps(scale)); };
      const __m512i words = as_bf16(part(32 * i), part(32 * i + 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(table + 32 * i), _mm512_cvtepi16_epi8(words));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(table + 128 + 32 * i),
                          _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8)));
    }
  }
  void operator()(const char* q, __m512i out[2]) const {
    // Unpacking interleaves within 128 bits: low halves of those are to hold the first 32 bytes.
    const __m512i codes = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), _mm512_loadu_si512(q));
    const auto look_up = [&](const char* at) {
      return _mm512_permutex2var_epi8(_mm512_loadu_si512(at), codes, _mm512_loadu_si512(at + 64));
    };
    const __m512i low = look_up(table);
    // (128 & code) ^ high
    const __m512i high = _mm512_ternarylogic_epi32(_mm512_set1_epi8(-128), codes, look_up(table + 128), 0x6a);
    out[0] = _mm512_unpacklo_epi8(low, high);
    out[1] = _mm512_unpackhi_epi8(low, high);
  }
};

// The decoders of a few rows, group after group.
template <class Decoder, int rows>
struct Decoders;

template <int rows>
struct Decoders<Int4, rows> {
  Int4 decoder[rows];
  const Matrix& matrix;
  int64_t scales[rows];

  Decoders(const DotBlock& block, int64_t first, int64_t count) : matrix(*block.matrix) {
    for (int r = 0; r < rows; ++r) scales[r] = matrix.scales_of(first + (r < count ? r : count - 1));
  }
  void set(int64_t group) {
    for (int r = 0; r < rows; ++r) decoder[r].set(matrix.scale_at(scales[r] + group));
  }
  const Int4& operator()(int r) const { return decoder[r]; }
};

// The tables of fp8 are those of the block, made for its first rows, and again where a block of scales ends.
template <int rows>
struct Decoders<E4m3, rows> {
  E4m3 decoder;
  const char* tables;

  Decoders(const DotBlock& block, int64_t first, int64_t) : decoder(), tables(block.tables) {
    const Matrix& matrix = *block.matrix;
    const int64_t scales = matrix.scales_of(first);
    if (first != block.row && matrix.scales_of(first - 1) == scales) return;
    for (int64_t g = 0; g < matrix.groups(); ++g) E4m3::make(matrix.scale_at(scales + g), block.tables + 256 * g);
  }
  void set(int64_t group) { decoder.table = tables + 256 * group; }
  const E4m3& operator()(int) const { return decoder; }
};

}  // namespace
}  // namespace dmoe::cpu
