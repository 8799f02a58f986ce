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

// What one launch computes, known once the schedule is.
struct Plan {
  int64_t tokens, hidden, inner, shared_inner;
  Form form;
  int members, up_chunks, chunks_of_member, chunks_of_shared;
  int up_tiles, up_tiles_of_member, up_tiles_of_shared, down_rows, down_end, tiles;

  DMOE_DEVICE Plan(const Experts& a, const Form& form_)
      : tokens(a.tokens),
        hidden(a.hidden),
        inner(a.intermediate),
        shared_inner(a.shared_intermediate),
        form(form_),
        members(static_cast<int>(a.schedule[kCount])),
        up_chunks(static_cast<int>((hidden + kChunk - 1) / kChunk)),
        chunks_of_member(static_cast<int>((inner + kChunk - 1) / kChunk)),
        chunks_of_shared(static_cast<int>((shared_inner + kChunk - 1) / kChunk)),
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

  // The down phase's k: the shared expert's chunks, then the members'. Chunks before a split, and before a member (-1: shared).
  DMOE_DEVICE int split_begin(int split) const {
    return (chunks_of_shared + members * chunks_of_member) * split / form.splits;
  }
  DMOE_DEVICE int member_begin(int member) const { return member < 0 ? 0 : chunks_of_shared + member * chunks_of_member; }
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

  DMOE_DEVICE Tile(const Plan& p, int i)
      : up(i < p.up_tiles),
        down(!up && i < p.down_end),
        member(-1),
        row(0),
        split(0),
        first(0),
        chunks(p.up_chunks) {
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
    } else {
      member = (i - p.up_tiles_of_shared) / p.up_tiles_of_member;
      row = (i - p.up_tiles_of_shared) % p.up_tiles_of_member * (p.form.rows / 2);
    }
  }
};

// One chunk of a tile in memory: row r of the weights, row t of the tokens, and how many bytes of each.
struct Chunk {
  const char* weights;   // row 0
  int64_t weights_step;  // bytes from one row to the next
  int64_t up_rows;       // up: bytes from a gate row to its up row
  const char* tokens;
  int64_t tokens_step;
  int k;  // elements, a multiple of 16

  DMOE_DEVICE const char* weight_row(bool down, int r) const {
    if (down) return weights + r * weights_step;
    // Eight gate rows, then their eight up rows: the MMA leaves both in one thread.
    return weights + (r / 16 * 8 + r % 8) * weights_step + (r % 16 < 8 ? 0 : up_rows);
  }
};

DMOE_DEVICE Chunk chunk(const Experts& a, const Plan& p, const ExpertsWorkspace& w, const Tile& tile, int i) {
  const char* work = static_cast<const char*>(a.workspace);
  Chunk c{};
  if (tile.up) {
    const int64_t k0 = static_cast<int64_t>(i) * kChunk;
    const int64_t inner = tile.member < 0 ? p.shared_inner : p.inner;
    const char* base = tile.member < 0
                           ? static_cast<const char*>(a.shared_w13)
                           : static_cast<const char*>(a.w13) +
                                 2 * static_cast<int64_t>(a.schedule[kUsed + tile.member]) * 2 * inner * p.hidden;
    c.weights_step = c.tokens_step = 2 * p.hidden;
    c.weights = base + tile.row * c.weights_step + 2 * k0;
    c.up_rows = inner * c.weights_step;
    c.tokens = static_cast<const char*>(a.x) + 2 * k0;
    c.k = static_cast<int>(p.hidden - k0 < kChunk ? p.hidden - k0 : kChunk);
    return c;
  }
  const int at = tile.first + i;
  const bool shared = at < p.chunks_of_shared;
  const int member = shared ? 0 : (at - p.chunks_of_shared) / p.chunks_of_member;
  const int64_t k0 = static_cast<int64_t>(shared ? at : (at - p.chunks_of_shared) % p.chunks_of_member) * kChunk;
  const int64_t inner = shared ? p.shared_inner : p.inner;
  const char* base = shared ? static_cast<const char*>(a.shared_w2)
                            : static_cast<const char*>(a.w2) +
                                  2 * static_cast<int64_t>(a.schedule[kUsed + member]) * p.hidden * inner;
  c.weights_step = c.tokens_step = 2 * inner;
  c.weights = base + tile.row * c.weights_step + 2 * k0;
  c.tokens = work + (shared ? w.shared_h : w.h + 2 * member * p.tokens * inner) + 2 * k0;
  c.k = static_cast<int>(inner - k0 < kChunk ? inner - k0 : kChunk);
  return c;
}

// The start of shared memory; the stages follow at kExpertsHeader.
struct Ring {
  dev::Barrier full[kMaxStages], empty[kMaxStages];
  int tile[kMaxStages], steps[kMaxStages];  // tile -1: no more; steps: k / 16
  int drawn[2];          // by the producers, in turn
  float weight[kMaxTokens];
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
DMOE_DEVICE void produce(const Experts& a, const Plan& p, const ExpertsWorkspace& w, char* shared) {
  Ring& ring = *reinterpret_cast<Ring*>(shared);
  const int lane = dev::lane(), warp = dev::warp() - p.form.consumers() / 32, tokens = static_cast<int>(p.tokens);
  const int n_stages = p.form.stages, own_weights = p.form.rows / kProducerWarps;
  const bool weights = lane < own_weights, first = warp == 0 && lane == 0;
  const int row = weights ? warp * own_weights + lane : (lane - own_weights) * kProducerWarps + warp;
  const bool copies_tokens = !weights && row < tokens;
  const int rows = own_weights + (tokens - warp + kProducerWarps - 1) / kProducerWarps;
  const int64_t bytes = stage_bytes(p.tokens, p.form.rows);
  const int64_t to = kExpertsHeader + (weights ? row : p.form.rows + row) * kPitch;
  uint32_t* counters = a.schedule;
  int ready = -1;  // the last split whose h is there; they are drawn in order
  Place at;

  const auto open = [&](const Place& place, int tile, int k) {
    dev::barrier_wait(&ring.empty[place.stage], place.phase ^ 1);
    if (first) {
      ring.tile[place.stage] = tile;
      ring.steps[place.stage] = k / 16;
    }
    if (lane == 0) dev::barrier_expect(&ring.full[place.stage], 2u * k * rows);
    // Bytes may be counted before they are expected, as this warp's arrival is still due; an H100 runs it so.
    dev::sync_warp();  // not shown: the phase can't end before lane 0 has arrived, so nothing goes wrong without it
  };
  const auto copy = [&](const Place& place, const Tile& tile, const Chunk& c) {
    char* into = shared + place.stage * bytes + to;
    dev::Barrier* full = &ring.full[place.stage];
    if (weights) {
      dev::bulk_copy<true>(into, c.weight_row(tile.down, row), 2 * c.k, full);
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
        open(ahead, i, part.k);
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
      open(at, i, part.k);
      if (weights || copies_tokens) copy(at, tile, part);
    }
    if (tile.chunks == 0) {  // a sum; or a part of no expert at all: zeros
      open(at, i, 0);
      at.next(n_stages);
    }
  }
  open(at, -1, 0);
}

struct alignas(8) Quad {
  uint16_t value[4];
};

template <bool kHalf>
DMOE_DEVICE uint16_t round16(float value) {
  return kHalf ? dev::float_to_half(value) : dev::float_to_bf16(value);
}

// One piece of a row's y from the parts, in their order: four columns of a token at a time, all loads before the first addition.
template <bool kHalf>
DMOE_DEVICE void add_parts(const Plan& p, const Tile& tile, const float* parts, uint16_t* y, int thread) {
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

// The warps that multiply. Warp i has rows 16 i .. 16 i + 15 of a tile, all tokens: at most 16 * kSixteens.
template <bool kHalf, int kSixteens>
DMOE_DEVICE void consume(const Experts& a, const Plan& p, const ExpertsWorkspace& w, char* shared) {
  Ring& ring = *reinterpret_cast<Ring*>(shared);
  const int n_stages = p.form.stages, threads = p.form.consumers();
  const int lane = dev::lane(), warp = dev::warp(), thread = dev::thread(), tokens = static_cast<int>(p.tokens);
  const int top_k = static_cast<int>(a.top_k);
  const int64_t bytes = stage_bytes(p.tokens, p.form.rows);
  uint32_t* counters = a.schedule;
  // Every token's choice, slot by slot.
  int32_t* chosen = reinterpret_cast<int32_t*>(shared + kExpertsHeader + n_stages * bytes);
  float* chosen_weights = reinterpret_cast<float*>(chosen + tokens * top_k);
  for (int i = thread; i < tokens * top_k; i += threads) {
    chosen[i % top_k * tokens + i / top_k] = a.topk_ids[i];
    chosen_weights[i % top_k * tokens + i / top_k] = a.topk_weights[i];
  }
  dev::sync_some(1, threads);
  // What each lane names in a load of matrices: rows 0-7, 8-15 and k 0-7, 8-15 in the order of the MMA's registers.
  const int own_weights = (warp * 16 + (lane & 15)) * kPitch + (lane >> 4) * 16;
  const int own_tokens = (p.form.rows + (lane >> 4) * 8 + (lane & 7)) * kPitch + (lane >> 3 & 1) * 16;
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
      const char* stage = shared + kExpertsHeader + at.stage * bytes;
      const auto step = [&](int k) {
        uint32_t m[4];
        dev::load_matrices(m, stage + own_weights + k * 32);
#pragma unroll
        for (int n = 0; n < kSixteens; ++n) {
          uint32_t b[4];
          dev::load_matrices(b, stage + own_tokens + n * 16 * kPitch + k * 32);
          dev::mma<kHalf>(sum[2 * n], m[0], m[1], m[2], m[3], b[0], b[1]);
          dev::mma<kHalf>(sum[2 * n + 1], m[0], m[1], m[2], m[3], b[2], b[3]);
        }
      };
      const int steps = ring.steps[at.stage];
      if (steps == kChunk / 16) {
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) step(k);
      } else {
#pragma unroll 1
        for (int k = 0; k < steps; ++k) step(k);
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
      uint16_t* h = reinterpret_cast<uint16_t*>(work + (tile.member < 0 ? w.shared_h : w.h + 2 * tile.member * p.tokens * inner));
#pragma unroll
      for (int n = 0; n < 2 * kSixteens; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int token = n * 8 + lane % 4 * 2 + j;
          if (token < tokens) {
            const float weight = ring.weight[token], gate = sum[n][j], up = sum[n][2 + j];
            // Weight 0: the token did not choose this expert, and an overflow there must not reach it.
            const float value = weight == 0 ? 0.0f : dev::silu(gate) * up * weight;
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
DMOE_DEVICE void prefetch_shared(const Experts& a, int warp) {
  constexpr int64_t kPiece = 4096;  // not measured
  const int64_t down = 2 * a.hidden * a.shared_intermediate, all = 3 * down;
  // Over all thread blocks, then over their warps: a warp hands them over one lane at a time.
  const int64_t turn = dev::lane() * kProducerWarps + warp;
  for (int64_t at = (turn * dev::ctas() + dev::cta()) * kPiece; at < all; at += kPiece * dev::ctas() * kProducers) {
    // Both sizes are multiples of 4096 (64 columns by 32 rows), so no piece spans the two.
    const char* from = at < 2 * down ? static_cast<const char*>(a.shared_w13) + at
                                     : static_cast<const char*>(a.shared_w2) + (at - 2 * down);
    dev::bulk_prefetch(from, static_cast<uint32_t>(kPiece));
  }
}

template <bool kHalf, int kSixteens>
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
  if (producer) prefetch_shared(a, dev::warp() - consumer_warps);
  dev::sync();
  dev::wait_for_primary();
  const Plan plan(a, form);
  const ExpertsWorkspace w =
      experts_workspace(a.tokens, a.hidden, a.intermediate, a.shared_intermediate, a.experts, a.top_k);
  if (producer) {
    produce(a, plan, w, shared);
  } else {
    consume<kHalf, kSixteens>(a, plan, w, shared);
  }
}

}  // namespace dmoe::cuda
