// The kernel of experts.cu, as one function per thread block.
//
// Persistent thread blocks draw tiles, up tiles before down tiles. Eight warps fill a ring of stages in shared memory by bulk
// copies, four or eight multiply. The down phase's k is cut into parts, and a tile of it needs the up tiles of its part's
// experts only: parts of early experts are drawn while late ones are still in the up phase. Its weights don't need even
// those, so the ring holds them by then. Last come sums of the parts, in pieces that keep all thread blocks busy. Tiles are
// drawn, not given out by block index: whoever waits for a tile waits for a thread block that already runs, however many fit
// on the chip. Who computes a tile does not change its bits.
#pragma once

#include "../select.h"
#include "experts.h"

namespace dmoe::cuda {

// What one launch computes, known once the schedule is. kFp8: the routed experts are in fp8.
template <bool kFp8>
struct Plan {
  int64_t tokens, hidden, inner, shared_inner;
  Form form;
  bool shared_fp8;
  int members, up_chunks, chunks_of_member, chunks_of_shared;
  int up_tiles, up_tiles_of_member, up_tiles_of_shared, down_rows, down_end, tiles;

  DMOE_DEVICE Plan(const Experts& a, const Form& form_)
      : tokens(a.tokens),
        hidden(a.hidden),
        inner(a.intermediate),
        shared_inner(a.shared_intermediate),
        form(form_),
        shared_fp8(kFp8 && a.shared_w13_scale),
        members(static_cast<int>(a.schedule[kCount])),
        up_chunks(chunks(hidden, false)),
        chunks_of_member(chunks(inner, false)),
        chunks_of_shared(chunks(shared_inner, true)),
        up_tiles(0),
        up_tiles_of_member(static_cast<int>(inner / (form.rows / 2))),
        up_tiles_of_shared(static_cast<int>(shared_inner / (form.rows / 2))),
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
  const int64_t inner = shared ? p.shared_inner : p.inner, length = p.chunk(shared);
  Chunk c{};
  c.weight_bytes = p.weight_bytes(shared);
  if (tile.up) {
    const int64_t k0 = i * length;
    const char* base =
        shared ? static_cast<const char*>(a.shared_w13)
               : static_cast<const char*>(a.w13) + c.weight_bytes * expert(tile.member) * 2 * inner * p.hidden;
    c.weights_step = c.weight_bytes * p.hidden;
    c.tokens_step = 2 * p.hidden;
    c.weights = base + tile.row * c.weights_step + c.weight_bytes * k0;
    c.up_rows = inner * c.weights_step;
    c.tokens = static_cast<const char*>(a.x) + 2 * k0;
    c.k = static_cast<int>(p.hidden - k0 < length ? p.hidden - k0 : length);
    if (p.fp8(shared)) {
      const float* scales = shared ? a.shared_w13_scale : a.w13_scale;
      set_scales(c, scales, shared ? 0 : expert(tile.member), inner, p.hidden, 2, tile.row, k0);
    }
    return c;
  }
  const int at = tile.first + i;
  const int member = shared ? 0 : (at - p.chunks_of_shared) / p.chunks_of_member;
  const int64_t k0 = (shared ? at : (at - p.chunks_of_shared) % p.chunks_of_member) * length;
  const char* base = shared ? static_cast<const char*>(a.shared_w2)
                            : static_cast<const char*>(a.w2) + c.weight_bytes * expert(member) * p.hidden * inner;
  c.weights_step = c.weight_bytes * inner;
  c.tokens_step = 2 * inner;
  c.weights = base + tile.row * c.weights_step + c.weight_bytes * k0;
  c.tokens = work + (shared ? w.shared_h : w.h + 2 * member * p.tokens * inner) + 2 * k0;
  c.k = static_cast<int>(inner - k0 < length ? inner - k0 : length);
  if (p.fp8(shared)) {
    const float* scales = shared ? a.shared_w2_scale : a.w2_scale;
    set_scales(c, scales, shared ? 0 : expert(member), p.hidden, inner, 1, tile.row, k0);
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

struct Place {
  int stage = 0;
  uint32_t phase = 0;
  DMOE_DEVICE void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The warps that fill the ring, one row per lane: an eighth of the weights' rows, and tokens i, 8 + i, … of warp i.
template <bool kFp8>
DMOE_DEVICE void produce(const Experts& a, const Plan<kFp8>& p, const ExpertsWorkspace& w, char* shared) {
  Ring& ring = *reinterpret_cast<Ring*>(shared);
  const int lane = dev::lane(), warp = dev::warp() - p.form.consumers() / 32, tokens = static_cast<int>(p.tokens);
  const int n_stages = p.form.stages, own_weights = p.form.rows / kProducerWarps;
  const bool weights = lane < own_weights, first = warp == 0 && lane == 0;
  const int row = weights ? warp * own_weights + lane : (lane - own_weights) * kProducerWarps + warp;
  const bool copies_tokens = !weights && row < tokens;
  const int own_tokens = (tokens - warp + kProducerWarps - 1) / kProducerWarps;
  const int64_t bytes = stage_bytes(p.tokens, p.form.rows, kFp8);
  constexpr Pitch kPitch = pitch(kFp8);
  const int64_t to =
      kExpertsHeader + (weights ? row * kPitch.weights : p.form.rows * kPitch.weights + row * kPitch.tokens);
  uint32_t* counters = a.schedule;
  int ready = -1;  // the last split whose h is there; they are drawn in order
  Place at;

  const auto open = [&](const Place& place, int tile, const Chunk& c) {
    Scales scales;
    if (kFp8 && first) scales = scales_of(c);  // on their way while the stage is in use
    dev::barrier_wait(&ring.empty[place.stage], place.phase ^ 1);
    if (first) {
      ring.tile[place.stage] = tile;
      ring.steps[place.stage] = c.k / 16;
      if (kFp8) ring.scales[place.stage] = scales;
    }
    if (lane == 0) dev::barrier_expect(&ring.full[place.stage], c.k * (own_weights * c.weight_bytes + own_tokens * 2));
    // Bytes may be counted before they are expected, as this warp's arrival is still due; an H100 runs it so.
    dev::sync_warp();  // not shown: the phase can't end before lane 0 has arrived, so nothing goes wrong without it
  };
  const auto copy = [&](const Place& place, const Tile& tile, const Chunk& c) {
    char* into = shared + place.stage * bytes + to;
    dev::Barrier* full = &ring.full[place.stage];
    if (weights) {
      dev::bulk_copy<true>(into, c.weight_row(tile.down, row), c.weight_bytes * c.k, full);
    } else {
      dev::bulk_copy<false>(into, c.tokens + row * c.tokens_step, 2 * c.k, full);
    }
  };

  for (int turn = 0;; turn ^= 1) {
    if (first) ring.drawn[turn] = static_cast<int>(dev::atomic_add(&counters[kTickets], 1));
    dev::sync_some(2, kProducers);
    const int i = ring.drawn[turn];
    if (i >= p.tiles) break;
    const Tile tile(p, i);
    int done = 0;
    if (tile.down && tile.split > ready) {
      // Weights as far as the ring reaches, then h, which other thread blocks may still be computing.
      Place ahead = at;
      const int n = tile.chunks < n_stages ? tile.chunks : n_stages;
      for (int c = 0; c < n; ++c, ahead.next(n_stages)) {
        const Chunk part = chunk(a, p, w, tile, c);
        open(ahead, i, part);
        if (weights) copy(ahead, tile, part);
      }
      if (first) {
        const uint32_t awaited = static_cast<uint32_t>(p.awaited(tile.split));
        while (dev::load_acquire(&counters[kUpDone + tile.split]) < awaited) dev::pause(kPollPause);
      }
      dev::sync_some(2, kProducers);
      dev::fence_copies();
      ready = tile.split;
      for (; done < n; ++done, at.next(n_stages)) {
        if (copies_tokens) copy(at, tile, chunk(a, p, w, tile, done));
      }
    }
    for (; done < tile.chunks; ++done, at.next(n_stages)) {
      const Chunk part = chunk(a, p, w, tile, done);
      open(at, i, part);
      if (weights || copies_tokens) copy(at, tile, part);
    }
    if (tile.chunks == 0) {  // a sum; or a part of no expert at all: zeros
      open(at, i, Chunk{});
      at.next(n_stages);
    }
  }
  open(at, -1, Chunk{});
}

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

// The warps that multiply. Warp i has rows 16 i .. 16 i + 15 of a tile, all tokens: at most 16 * kSixteens.
template <bool kHalf, bool kFp8, int kSixteens, bool kGelu>
DMOE_DEVICE void consume(const Experts& a, const Plan<kFp8>& p, const ExpertsWorkspace& w, char* shared) {
  Ring& ring = *reinterpret_cast<Ring*>(shared);
  const int n_stages = p.form.stages, threads = p.form.consumers();
  const int lane = dev::lane(), warp = dev::warp(), thread = dev::thread(), tokens = static_cast<int>(p.tokens);
  const int top_k = static_cast<int>(a.top_k);
  const int64_t bytes = stage_bytes(p.tokens, p.form.rows, kFp8);
  constexpr Pitch kPitch = pitch(kFp8);
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
  Place at;

  for (;;) {
    dev::barrier_wait(&ring.full[at.stage], at.phase);
    const int i = ring.tile[at.stage];
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
      dev::barrier_wait(&ring.full[at.stage], at.phase);
      const char* weights = shared + kExpertsHeader + at.stage * bytes + warp * 16 * kPitch.weights;
      const char* of_tokens = shared + kExpertsHeader + at.stage * bytes + p.form.rows * kPitch.weights;
      const int steps = ring.steps[at.stage];
      if constexpr (!kFp8) {
        multiply<kHalf>(sum, weights, of_tokens, steps);
      } else if (p.fp8(tile.shared(p, c))) {
        multiply_scaled<kHalf, true>(sum, weights, of_tokens, 16 * steps, ring.scales[at.stage]);
      } else {
        multiply_scaled<kHalf, false>(sum, weights, of_tokens, 16 * steps, ring.scales[at.stage]);
      }
      dev::sync_warp();
      if (lane == 0) dev::barrier_arrive(&ring.empty[at.stage]);
    }

    char* work = static_cast<char*>(a.workspace);
    float* parts = reinterpret_cast<float*>(work + w.parts);
    uint16_t* y = static_cast<uint16_t*>(a.y);
    if (!tile.up && !tile.down) {
      const uint32_t* arrived = &counters[kColumns + tile.row / p.form.rows];
      if (thread == 0) {
        while (dev::load_acquire(arrived) < static_cast<uint32_t>(p.form.splits)) dev::pause(kPollPause);
      }
      dev::sync_some(1, threads);
      add_parts<kHalf>(p, tile, parts, y, thread);
      continue;
    }
    const int low = lane >> 2;  // this thread's rows of the product: low and low + 8
    if (tile.up) {
      dev::sync_some(1, threads);  // the weights of the tokens are there
      const int64_t inner = tile.member < 0 ? p.shared_inner : p.inner;
      uint16_t* h =
          reinterpret_cast<uint16_t*>(work + (tile.member < 0 ? w.shared_h : w.h + 2 * tile.member * p.tokens * inner));
#pragma unroll
      for (int n = 0; n < 2 * kSixteens; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int token = n * 8 + lane % 4 * 2 + j;
          if (token < tokens) {
            const float weight = ring.weight[token], gate = sum[n][j], up = sum[n][2 + j];
            // Weight 0: the token did not choose this expert, and an overflow there must not reach it.
            const float value = weight == 0 ? 0.0f : (kGelu ? dev::gelu_tanh(gate) : dev::silu(gate)) * up * weight;
            h[token * inner + tile.row + warp * 8 + low] = round16<kHalf>(value);
          }
        }
      }
      dev::fence_copies();  // h is read by bulk copies
      dev::sync_some(1, threads);
      const bool read = split_begin < p.member_begin(tile.member + 1) && p.member_begin(tile.member) < split_end;
      if (thread < p.form.splits && read) dev::atomic_add_ordered(&counters[kUpDone + thread], 1);
      continue;
    }

#pragma unroll
    for (int n = 0; n < 2 * kSixteens; ++n) {
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
    if (p.form.splits == 1) continue;
    dev::sync_some(1, threads);
    if (thread == 0) dev::atomic_add_ordered(&counters[kColumns + tile.row / p.form.rows], 1);
  }
}

// The shared expert is always needed: its weights come into the L2 while the router still runs.
template <bool kFp8>
DMOE_DEVICE void prefetch_shared(const Experts& a, int warp) {
  constexpr int64_t kPiece = kFp8 ? 2048 : 4096;  // not measured
  const int64_t down = (kFp8 && a.shared_w2_scale ? 1 : 2) * a.hidden * a.shared_intermediate, all = 3 * down;
  // Over all thread blocks, then over their warps: a warp hands them over one lane at a time.
  const int64_t turn = dev::lane() * kProducerWarps + warp;
  for (int64_t at = (turn * dev::ctas() + dev::cta()) * kPiece; at < all; at += kPiece * dev::ctas() * kProducers) {
    // Both sizes are multiples of a piece (64 columns by 32 rows), so no piece spans the two.
    const char* from = at < 2 * down ? static_cast<const char*>(a.shared_w13) + at
                                     : static_cast<const char*>(a.shared_w2) + (at - 2 * down);
    dev::bulk_prefetch(from, static_cast<uint32_t>(kPiece));
  }
}

// kGelu: activation is gelu_tanh, else silu.
template <bool kHalf, bool kFp8, int kSixteens, bool kGelu = false>
DMOE_DEVICE void experts_kernel(const Experts& a, const Form& form, char* shared) {
  Ring& ring = *reinterpret_cast<Ring*>(shared);
  const int consumer_warps = form.consumers() / 32;
  const bool producer = dev::warp() >= consumer_warps;
  if (dev::thread() == 0) {
    for (int i = 0; i < form.stages; ++i) {
      dev::barrier_init(&ring.full[i], kProducerWarps);
      dev::barrier_init(&ring.empty[i], consumer_warps);
    }
    dev::barrier_init_done();
  }
  if (producer) prefetch_shared<kFp8>(a, dev::warp() - consumer_warps);
  dev::sync();
  dev::wait_for_primary();
  const Plan<kFp8> plan(a, form);
  const ExpertsWorkspace w =
      experts_workspace(a.tokens, a.hidden, a.intermediate, a.shared_intermediate, a.experts, a.top_k);
  if (producer) {
    produce(a, plan, w, shared);
  } else {
    consume<kHalf, kFp8, kSixteens, kGelu>(a, plan, w, shared);
  }
}

}  // namespace dmoe::cuda
