// The tile instructions of csrc/cpu/dot_amx.cpp in plain C++, as the processor's manual has them. What a processor would refuse
// (shapes that do not fit, registers without a shape) is a std::logic_error.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace dmoe::emulated {

inline std::atomic<int> threads_with_tiles{0};
inline std::atomic<int64_t> products{0};

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t row[16][64];
};

struct Tiles {
  bool shaped = false;
  Tile tile[8];
};

inline thread_local Tiles tiles;

inline void check(bool good, const char* why) {
  if (!good) throw std::logic_error(why);
}

inline Tile& shaped(int i) {
  check(tiles.shaped && tiles.tile[i].rows > 0, "a tile without a shape");
  return tiles.tile[i];
}

template <class T>
T element(const Tile& tile, int row, int i) {
  T value;
  std::memcpy(&value, tile.row[row] + i * sizeof(T), sizeof(T));
  return value;
}

// Subnormal numbers count as zero, before and after.
inline float flushed(float value) { return value > -0x1p-126f && value < 0x1p-126f ? 0.f * value : value; }

inline float bf16(const Tile& tile, int row, int i) {
  const uint32_t bits = static_cast<uint32_t>(element<uint16_t>(tile, row, i)) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return flushed(value);
}

// Even and odd elements of the depth have sums of their own, which are added up before they meet the tile's.
inline float dot_bf16(const Tile& a, const Tile& b, int m, int n, float sum) {
  float even = 0, odd = 0;
  for (int k = 0; k < a.bytes / 4; ++k) {
    even = flushed(even + bf16(a, m, 2 * k) * bf16(b, k, 2 * n));
    odd = flushed(odd + bf16(a, m, 2 * k + 1) * bf16(b, k, 2 * n + 1));
  }
  return flushed(sum + flushed(even + odd));
}

inline int32_t dot_int8(const Tile& a, const Tile& b, int m, int n, int32_t sum) {
  for (int k = 0; k < a.bytes / 4; ++k)
    for (int i = 0; i < 4; ++i) sum += element<int8_t>(a, m, 4 * k + i) * element<int8_t>(b, k, 4 * n + i);
  return sum;
}

}  // namespace dmoe::emulated

namespace dmoe::cpu {
namespace {

inline void load_shapes(const void* from) {
  using namespace emulated;
  uint8_t bytes[64];
  std::memcpy(bytes, from, 64);
  check(bytes[0] == 1 && bytes[1] == 0, "palette 1 from row 0");
  for (int i = 2; i < 16; ++i) check(bytes[i] == 0, "reserved");
  if (!tiles.shaped) ++threads_with_tiles;
  tiles = {};
  tiles.shaped = true;
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    const int rows = bytes[48 + i];
    check(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0) && (i < 8 || rows == 0), "a shape");
    if (i < 8) tiles.tile[i].rows = rows, tiles.tile[i].bytes = row_bytes;
  }
}

inline void release_tiles() {
  using namespace emulated;
  if (tiles.shaped) --threads_with_tiles;
  tiles = {};
}

template <int tile>
void zero_tile() {
  std::memset(emulated::shaped(tile).row, 0, sizeof emulated::Tile::row);
}

template <int tile>
void load_tile(const void* from, int64_t stride) {
  zero_tile<tile>();
  emulated::Tile& to = emulated::shaped(tile);
  for (int r = 0; r < to.rows; ++r) std::memcpy(to.row[r], static_cast<const char*>(from) + r * stride, to.bytes);
}

template <int tile>
void store_tile(void* to, int64_t stride) {
  const emulated::Tile& from = emulated::shaped(tile);
  for (int r = 0; r < from.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, from.row[r], from.bytes);
}

template <int sum, int weights, int activations, bool integers>
void add_products() {
  using namespace emulated;
  Tile& c = shaped(sum);
  const Tile &a = shaped(weights), &b = shaped(activations);
  check(c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows && c.bytes % 4 == 0, "tiles that do not fit");
  check(sum != weights && sum != activations && weights != activations, "a tile twice");
  ++products;
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      if constexpr (integers) {
        const int32_t value = dot_int8(a, b, m, n, element<int32_t>(c, m, n));
        std::memcpy(c.row[m] + 4 * n, &value, 4);
      } else {
        const float value = dot_bf16(a, b, m, n, element<float>(c, m, n));
        std::memcpy(c.row[m] + 4 * n, &value, 4);
      }
    }
}

}  // namespace
}  // namespace dmoe::cpu
