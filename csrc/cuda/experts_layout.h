// What the expert kernel computes, in which order and where it lies: the plan, its tiles, their chunks, and the ring in
// shared memory that the producers fill and the consumers read.
#pragma once

#include "device.h"
#include "experts.h"

namespace dmoe::cuda {

// What one launch computes, known once the schedule is. kFp8: the routed experts are in fp8.
template <bool kFp8>
struct Plan {
  int64_t tokens, hidden, intermediate, shared_intermediate;
  Form form;
  bool shared_fp8;
  int members, up_chunks, chunks_of_member, chunks_of_shared;
  int up_tiles, up_tiles_of_member, up_tiles_of_shared, down_rows, down_end, tiles;

  DMOE_DEVICE Plan(const Experts& a, const Form& form_)
      : tokens(a.tokens),
        hidden(a.hidden),
        intermediate(a.intermediate),
        shared_intermediate(a.shared_intermediate),
        form(form_),
        shared_fp8(kFp8 && a.shared_w13_scale),
        members(static_cast<int>(a.schedule[kCount])),
        up_chunks(chunks(hidden, false)),
        chunks_of_member(chunks(intermediate, false)),
        chunks_of_shared(chunks(shared_intermediate, true)),
        up_tiles(0),
        up_tiles_of_member(static_cast<int>(intermediate / (form.rows / 2))),
        up_tiles_of_shared(static_cast<int>(shared_intermediate / (form.rows / 2))),
        down_rows(static_cast<int>(hidden / form.rows)),
        down_end(0),
        tiles(0) {
    up_tiles = up_tiles_of_shared + members * up_tiles_of_member;
    down_end = up_tiles + down_rows * form.splits;
    tiles = down_end + (form.splits > 1 ? down_rows * form.splits : 0);
  }

  // Of the shared expert or of a member: bytes of a weight, numbers of a chunk along k, chunks of so many numbers.
  DMOE_DEVICE bool fp8(bool shared) const { return kFp8 && (!shared || shared_fp8); }
  DMOE_DEVICE int weight_bytes(bool shared) const { return fp8(shared) ? 1 : 2; }
  DMOE_DEVICE int chunk(bool shared) const { return fp8(shared) ? 2 * kChunk : kChunk; }
  DMOE_DEVICE int chunks(int64_t k, bool shared) const {
    return static_cast<int>((k + chunk(shared) - 1) / chunk(shared));
  }

  // The down phase's k: the shared expert's chunks, then the members'. Chunks before a split, and before a member (-1: shared).
  DMOE_DEVICE int split_begin(int split) const {
    return (chunks_of_shared + members * chunks_of_member) * split / form.splits;
  }
  DMOE_DEVICE int member_begin(int member) const {
    return member < 0 ? 0 : chunks_of_shared + member * chunks_of_member;
  }
  // Up tiles of the experts that a split reads.
  DMOE_DEVICE int awaited(int split) const {
    const int begin = split_begin(split), end = split_begin(split + 1);
    if (begin == end) return 0;
    const int shared = begin < chunks_of_shared ? up_tiles_of_shared : 0;
    if (end <= chunks_of_shared) return shared;
    const int first = begin < chunks_of_shared ? 0 : (begin - chunks_of_shared) / chunks_of_member;
    const int last = (end - 1 - chunks_of_shared) / chunks_of_member;
    return shared + (last + 1 - first) * up_tiles_of_member;
  }
};

// Tile i of the plan: the shared expert's up tiles, the members' up tiles, the down tiles, then sums of their parts.
struct Tile {
  bool up, down;      // or neither: a sum
  int member;         // up: position in the schedule, -1 for the shared expert
  int row;            // up: first row of gate; else first column of y
  int split;          // down; sum: which of as many pieces of the columns' y
  int first, chunks;  // chunks along k

  template <bool kFp8>
  DMOE_DEVICE Tile(const Plan<kFp8>& p, int i)
      : up(i < p.up_tiles), down(!up && i < p.down_end), member(-1), row(0), split(0), first(0), chunks(p.up_chunks) {
    if (!up && !down) {
      split = (i - p.down_end) / p.down_rows;
      row = (i - p.down_end) % p.down_rows * p.form.rows;
      chunks = 0;
    } else if (down) {
      split = (i - p.up_tiles) / p.down_rows;
      row = (i - p.up_tiles) % p.down_rows * p.form.rows;
      first = p.split_begin(split);
      chunks = p.split_begin(split + 1) - first;
    } else if (i < p.up_tiles_of_shared) {
      row = i * (p.form.rows / 2);
      if (kFp8) chunks = p.chunks(p.hidden, true);
    } else {
      member = (i - p.up_tiles_of_shared) / p.up_tiles_of_member;
      row = (i - p.up_tiles_of_shared) % p.up_tiles_of_member * (p.form.rows / 2);
    }
  }
  // Whether chunk i is the shared expert's.
  template <bool kFp8>
  DMOE_DEVICE bool shared(const Plan<kFp8>& p, int i) const {
    return up ? member < 0 : first + i < p.chunks_of_shared;
  }
};

// One chunk of a tile in memory: row r of the weights, row t of the tokens, and how much of each.
struct Chunk {
  const char* weights;   // row 0
  int64_t weights_step;  // bytes from one row to the next
  int64_t up_rows;       // up: bytes from a gate row to its up row
  const char* tokens;
  int64_t tokens_step;
  int k;               // numbers along k, a multiple of 16; of 32 in fp8
  int weight_bytes;    // of one
  const float* scale;  // fp8: of row 0, for each 128 along k; else null
  int64_t up_scale;    // up: from a gate row's scale to its up row's

  DMOE_DEVICE const char* weight_row(bool down, int r) const {
    if (down) return weights + r * weights_step;
    // Eight gate rows, then their eight up rows: the MMA leaves both in one thread.
    return weights + (r / 16 * 8 + r % 8) * weights_step + (r % 16 < 8 ? 0 : up_rows);
  }
};

// Points a chunk to its scales: of an expert's matrix [rows, columns], or of two of them, one above the other, from `row` and
// `column` on.
DMOE_DEVICE void set_scales(Chunk& c, const float* scales, int64_t expert, int64_t rows, int64_t columns, int matrices,
                            int row, int64_t column) {
  const int64_t across = (columns + kScaleBlock - 1) / kScaleBlock,
                all = (rows + kScaleBlock - 1) / kScaleBlock * across;
  c.scale = scales + matrices * expert * all + row / kScaleBlock * across + column / kScaleBlock;
  c.up_scale = (matrices - 1) * all;
}

template <bool kFp8>
DMOE_DEVICE Chunk chunk(const Experts& a, const Plan<kFp8>& p, const ExpertsWorkspace& w, const Tile& tile, int i) {
  const char* work = static_cast<const char*>(a.workspace);
  const auto expert = [&](int member) {  // its row
    const auto id = static_cast<int64_t>(a.schedule[kUsed + member]);
    return a.expert_map ? static_cast<int64_t>(a.expert_map[id]) : id;
  };
  const bool shared = tile.shared(p, i);
  const int64_t intermediate = shared ? p.shared_intermediate : p.intermediate, length = p.chunk(shared);
  Chunk c{};
  c.weight_bytes = p.weight_bytes(shared);
  if (tile.up) {
    const int64_t k0 = i * length;
    const char* base =
        shared ? static_cast<const char*>(a.shared_w13)
               : static_cast<const char*>(a.w13) + c.weight_bytes * expert(tile.member) * 2 * intermediate * p.hidden;
    c.weights_step = c.weight_bytes * p.hidden;
    c.tokens_step = 2 * p.hidden;
    c.weights = base + tile.row * c.weights_step + c.weight_bytes * k0;
    c.up_rows = intermediate * c.weights_step;
    c.tokens = static_cast<const char*>(a.x) + 2 * k0;
    c.k = static_cast<int>(p.hidden - k0 < length ? p.hidden - k0 : length);
    if (p.fp8(shared)) {
      const float* scales = shared ? a.shared_w13_scale : a.w13_scale;
      set_scales(c, scales, shared ? 0 : expert(tile.member), intermediate, p.hidden, 2, tile.row, k0);
    }
    return c;
  }
  const int at = tile.first + i;
  const int member = shared ? 0 : (at - p.chunks_of_shared) / p.chunks_of_member;
  const int64_t k0 = (shared ? at : (at - p.chunks_of_shared) % p.chunks_of_member) * length;
  const char* base = shared
                         ? static_cast<const char*>(a.shared_w2)
                         : static_cast<const char*>(a.w2) + c.weight_bytes * expert(member) * p.hidden * intermediate;
  c.weights_step = c.weight_bytes * intermediate;
  c.tokens_step = 2 * intermediate;
  c.weights = base + tile.row * c.weights_step + c.weight_bytes * k0;
  c.tokens = work + (shared ? w.shared_h : w.h + 2 * member * p.tokens * intermediate) + 2 * k0;
  c.k = static_cast<int>(intermediate - k0 < length ? intermediate - k0 : length);
  if (p.fp8(shared)) {
    const float* scales = shared ? a.shared_w2_scale : a.w2_scale;
    set_scales(c, scales, shared ? 0 : expert(member), p.hidden, intermediate, 1, tile.row, k0);
  }
  return c;
}

// Of a chunk, for each 128 along k: of a warp's rows 0-7 and 8-15, which are gate and up rows or under one scale. Plain: ones.
struct Scales {
  float of[2][kScaleBlocks];
};

DMOE_DEVICE Scales scales_of(const Chunk& c) {
  Scales s;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int b = 0; b < kScaleBlocks; ++b) {
      s.of[half][b] = c.scale && b * kScaleBlock < c.k ? c.scale[half * c.up_scale + b] : 1.0f;
    }
  }
  return s;
}

// The start of shared memory; the stages follow at kExpertsHeader.
struct Ring {
  dev::Barrier full[kMaxStages], empty[kMaxStages];
  int tile[kMaxStages], steps[kMaxStages];  // tile -1: no more; steps: k / 16
  int drawn[2];                             // by the producers, in turn
  float weight[kMaxTokens];
  Scales scales[kMaxStages];  // fp8
};
static_assert(sizeof(Ring) <= kExpertsHeader);

// A place in the ring: which stage, and the phase of its barriers. Producers and consumers walk round it in step.
struct Stage {
  int index = 0;
  uint32_t phase = 0;
  DMOE_DEVICE void next(int stages) {
    if (++index == stages) {
      index = 0;
      phase ^= 1;
    }
  }
};

}  // namespace dmoe::cuda
