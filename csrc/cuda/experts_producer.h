// The producer warps of the expert kernel: they draw tiles and copy weights and tokens into the ring.
#pragma once

#include "experts_layout.h"

namespace dmoe::cuda {

// Waits until a stage is free, and says what it will hold; the bytes are those that this warp adds.
template <bool kFp8>
DMOE_DEVICE void open_stage(Ring& ring, const Stage& stage, int tile, const Chunk& c, int lane, bool first,
                            int own_weights, int own_tokens) {
  Scales scales;
  if (kFp8 && first) scales = scales_of(c);  // on their way while the stage is in use
  dev::barrier_wait(&ring.empty[stage.index], stage.phase ^ 1);
  if (first) {
    ring.tile[stage.index] = tile;
    ring.steps[stage.index] = c.k / 16;
    if (kFp8) ring.scales[stage.index] = scales;
  }
  if (lane == 0) dev::barrier_expect(&ring.full[stage.index], c.k * (own_weights * c.weight_bytes + own_tokens * 2));
  // Bytes may be counted before they are expected, as this warp's arrival is still due; an H100 runs it so.
  dev::sync_warp();  // not shown: the phase can't end before lane 0 has arrived, so nothing goes wrong without it
}

// Starts the copy of one row of a chunk, of the weights or of the tokens.
DMOE_DEVICE void copy_row(char* into, dev::Barrier* full, const Tile& tile, const Chunk& c, bool weights, int row) {
  if (weights) {
    dev::bulk_copy<true>(into, c.weight_row(tile.down, row), c.weight_bytes * c.k, full);
  } else {
    dev::bulk_copy<false>(into, c.tokens + row * c.tokens_step, 2 * c.k, full);
  }
}

// All producers wait until the up tiles that a split reads are done.
template <bool kFp8>
DMOE_DEVICE void await_h(const Plan<kFp8>& p, int split, const uint32_t* counters, bool first) {
  if (first) {
    const uint32_t awaited = static_cast<uint32_t>(p.awaited(split));
    while (dev::load_acquire(&counters[kUpDone + split]) < awaited) dev::pause(kPollPause);
  }
  dev::sync_some(2, kProducers);
  dev::fence_copies();
}

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
  Stage at;

  const auto open = [&](const Stage& stage, int tile, const Chunk& c) {
    open_stage<kFp8>(ring, stage, tile, c, lane, first, own_weights, own_tokens);
  };
  const auto copy = [&](const Stage& stage, const Tile& tile, const Chunk& c) {
    copy_row(shared + stage.index * bytes + to, &ring.full[stage.index], tile, c, weights, row);
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
      Stage ahead = at;
      const int n = tile.chunks < n_stages ? tile.chunks : n_stages;
      for (int c = 0; c < n; ++c, ahead.next(n_stages)) {
        const Chunk part = chunk(a, p, w, tile, c);
        open(ahead, i, part);
        if (weights) copy(ahead, tile, part);
      }
      await_h(p, tile.split, counters, first);
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

}  // namespace dmoe::cuda
