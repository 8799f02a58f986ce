// AMX: tdpbf16ps, and tdpbssd for int8. A product of tiles is 16 rows of weights, straight from the matrix, against up to 16
// columns of activations: tokens, or parts of tokens, packed as [step][four bytes of the depth][column]. Two by two of them
// share what they load. A sum takes in its depth step by step, whatever else is in the tile.
#if defined(__x86_64__) || defined(DMOE_EMULATE)
#include "dot_body.h"

#ifdef DMOE_EMULATE
#include "emulated_tiles.h"
#endif

namespace dmoe::cpu {
namespace {

constexpr int64_t kTileRows = 16;

// The registers: sums 0 to 3, [row tile][column tile]; weights 4 and 5; activations 6 and 7.
struct TileShapes {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes() = default;
  // A second tile of 0 rows or columns stays out of use.
  TileShapes(const int64_t (&tile_rows)[2], const int64_t (&tile_columns)[2]) : palette(1) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) set(2 * i + j, tile_rows[i], 4 * tile_columns[j]);
      set(4 + i, tile_rows[i], kStepBytes);
      set(6 + i, kStepBytes / 4, 4 * tile_columns[i]);
    }
  }

 private:
  void set(int tile, int64_t n_rows, int64_t bytes) {
    if (n_rows && bytes) rows[tile] = n_rows, row_bytes[tile] = bytes;
  }
};
static_assert(sizeof(TileShapes) == 64);

// Assembly, as GCC 12's intrinsics do not tell that memory is read.
#ifndef DMOE_EMULATE
void load_shapes(const TileShapes* shapes) { asm volatile("ldtilecfg %0" : : "m"(*shapes)); }
void release_tiles() { asm volatile("tilerelease"); }

template <int tile>
void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int sum, int weights, int activations, bool integers>
void add_products() {
  if constexpr (integers) {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(weights), "i"(activations));
  } else {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(weights), "i"(activations));
  }
}
#endif

// The thread's tile registers, given back at the end: the system would save them at every switch of threads.
class TileRegisters {
  TileShapes shapes_;

 public:
  void shape(const TileShapes& wanted) {
    if (std::memcmp(&wanted, &shapes_, sizeof shapes_) == 0) return;
    shapes_ = wanted;
    load_shapes(&shapes_);
  }
  ~TileRegisters() { release_tiles(); }
};

// Rows become columns: every pass moves the last bit of [row][column] to the front, and four of them swap the two.
void transpose(Vec (&v)[16]) {
  for (int pass = 0; pass < 4; ++pass) {
    Vec w[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      w[2 * i] = __builtin_shufflevector(v[i], v[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      w[2 * i + 1] =
          __builtin_shufflevector(v[i], v[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::memcpy(v, w, sizeof w);
  }
}

void place(const char* const* line, int64_t offset, int64_t width, char* to) {
  for (int64_t first = 0; first < width; first += kMostTile) {
    const int64_t count = width - first < kMostTile ? width - first : kMostTile;
    Vec lines[16] = {};
    for (int64_t t = 0; t < count; ++t) lines[t] = load<Vec>(line[first + t] + offset);
    transpose(lines);
    for (int64_t i = 0; i < 16; ++i) std::memcpy(to + (i * width + first) * 4, &lines[i], 4 * count);
  }
}

// What a tile of activations is loaded from.
struct Columns {
  const char* x;
  int64_t count, stride;  // stride: bytes from four bytes of the depth to the next four
};

// sums[row tile][column tile] = 16 rows of numbers.
template <int row_tiles, int column_tiles, bool integers>
void multiply_tiles(const Rows& weights, const Columns (&columns)[2], int64_t steps, Ahead& next,
                    Vec (&sums)[2][2][16]) {
  const char *upper = weights.first, *lower = upper + kTileRows * weights.stride;
  const char *left = columns[0].x, *right = columns[1].x;
  const int64_t stride = weights.stride, left_stride = columns[0].stride, right_stride = columns[1].stride;
  Ahead ahead = next;
  zero_tile<0>();
  if constexpr (column_tiles == 2) zero_tile<1>();
  if constexpr (row_tiles == 2) zero_tile<2>();
  if constexpr (row_tiles * column_tiles == 4) zero_tile<3>();
  for (int64_t k = 0; k < steps; ++k) {
    ahead.fetch();
    load_tile<4>(upper + k * kStepBytes, stride);
    load_tile<6>(left + k * 16 * left_stride, left_stride);
    add_products<0, 4, 6, integers>();
    if constexpr (column_tiles == 2) {
      load_tile<7>(right + k * 16 * right_stride, right_stride);
      add_products<1, 4, 7, integers>();
    }
    if constexpr (row_tiles == 2) {
      load_tile<5>(lower + k * kStepBytes, stride);
      add_products<2, 5, 6, integers>();
    }
    if constexpr (row_tiles * column_tiles == 4) add_products<3, 5, 7, integers>();
  }
  next = ahead;
  store_tile<0>(sums[0][0], kStepBytes);
  if constexpr (column_tiles == 2) store_tile<1>(sums[0][1], kStepBytes);
  if constexpr (row_tiles == 2) store_tile<2>(sums[1][0], kStepBytes);
  if constexpr (row_tiles * column_tiles == 4) store_tile<3>(sums[1][1], kStepBytes);
}

// The sums of 16 rows for `tokens` tokens, whose parts are in columns side by side.
template <bool down, Parts parts>
void add_columns(const DotBlock& block, int64_t row, int64_t slot, int64_t tokens, const Vec* columns) {
  if constexpr (parts == Parts::bf16) {
    for (int64_t t = 0; t < tokens; ++t) put_sums<down>(block, row, slot + t, columns[t]);
  } else {
    const auto number = [&](int64_t column) {
      return __builtin_convertvector(reinterpret_cast<VectorOf<int32_t, 16>::type>(columns[column]), Vec);
    };
    Vec scale{};
    for (int64_t r = 0; r < kTileRows && row + r < block.rows; ++r)
      scale[r] = block.matrix->scale_at(block.row + row + r);
    for (int64_t t = 0; t < tokens; ++t) {
      const Vec sum = parts == Parts::int8 ? number(t) : number(2 * t) * 256.f + number(2 * t + 1);
      put_sums<down>(block, row, slot + t, sum * (scale * block.x_scale[slot + t]));
    }
  }
}

// Up to 32 rows against two tiles of tokens, or one whose tokens have two parts each.
template <bool down, Parts parts>
void multiply_patch(const DotBlock& block, const Rows& weights, int64_t row, int64_t tile, TileRegisters& registers,
                    Ahead& next) {
  constexpr int kLines = lines_of(parts);
  constexpr bool kIntegers = parts != Parts::bf16;
  const int64_t steps = steps_of(block.matrix->depth, parts), bytes = packed_bytes(block.matrix->depth, parts);
  const auto columns_of = [&](int64_t at, int64_t part) {
    const int64_t width = block.tiles[at + 1] - block.tiles[at];
    return Columns{block.x + block.tiles[at] * bytes + 4 * part * width, width, 4 * width * kLines};
  };
  Columns columns[2] = {columns_of(tile, 0), {}};
  if (kLines == 2)
    columns[1] = columns_of(tile, 1);
  else if (tile + 1 < block.n_tiles)
    columns[1] = columns_of(tile + 1, 0);

  const int64_t rows[2] = {weights.count < kTileRows ? weights.count : kTileRows,
                           weights.count < kTileRows ? 0 : weights.count - kTileRows};
  registers.shape(TileShapes(rows, {columns[0].count, columns[1].count}));
  Vec sums[2][2][16] = {};
  const auto run = [&](auto multiply) { multiply(weights, columns, steps, next, sums); };
  if (rows[1] && columns[1].count)
    run(multiply_tiles<2, 2, kIntegers>);
  else if (rows[1])
    run(multiply_tiles<2, 1, kIntegers>);
  else if (columns[1].count)
    run(multiply_tiles<1, 2, kIntegers>);
  else
    run(multiply_tiles<1, 1, kIntegers>);

  const int64_t tokens = (columns[0].count + columns[1].count) / kLines;
  for (int64_t i = 0; i < 2 && rows[i]; ++i) {
    Vec side_by_side[32];
    for (int64_t j = 0; j < 2; ++j) {
      transpose(sums[i][j]);
      std::memcpy(side_by_side + j * columns[0].count, sums[i][j], sizeof sums[i][j]);
    }
    add_columns<down, parts>(block, row + i * kTileRows, block.tiles[tile], tokens, side_by_side);
  }
}

template <bool down, Parts parts>
void multiply_as(const DotBlock& block, const DotBlock& next) {
  constexpr int64_t kRows = 2 * kTileRows, kTiles = 2 / lines_of(parts);
  TileRegisters registers;
  Ahead ahead(next, (block.rows + kRows - 1) / kRows * ((block.n_tiles + kTiles - 1) / kTiles) *
                        steps_of(block.matrix->depth, parts));
  for (int64_t row = 0; row < block.rows; row += kRows) {
    const Rows weights = rows_of(block, row, kRows);
    for (int64_t tile = 0; tile < block.n_tiles; tile += kTiles)
      multiply_patch<down, parts>(block, weights, row, tile, registers, ahead);
  }
}

template <bool down>
void multiply(const DotBlock& block, const DotBlock& next) {
  if (block.parts == Parts::int8) return multiply_as<down, Parts::int8>(block, next);
  if (block.parts == Parts::int16) return multiply_as<down, Parts::int16>(block, next);
  multiply_as<down, Parts::bf16>(block, next);
}

}  // namespace

const DotKernels kDotAmx = {kMostTile, false,      pack,     multiply<false>, multiply<true>,
                            hidden,    hidden_f32, quantize, narrow};

}  // namespace dmoe::cpu
#endif
