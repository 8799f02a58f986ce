// The kernel of experts.cu, as one function per thread block.
//
// Persistent thread blocks draw tiles, up tiles before down tiles. Eight warps fill a ring of stages in shared memory by bulk
// copies, four or eight multiply. The down phase's k is cut into parts, and a tile of it needs the up tiles of its part's
// experts only: parts of early experts are drawn while late ones are still in the up phase. Its weights don't need even
// those, so the ring holds them by then. Last come sums of the parts, in pieces that keep all thread blocks busy. Tiles are
// drawn, not given out by block index: whoever waits for a tile waits for a thread block that already runs, however many fit
// on the chip. Who computes a tile does not change its bits.
#pragma once

#include "experts_consumer.h"
#include "experts_producer.h"

namespace dmoe::cuda {

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
