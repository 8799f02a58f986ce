// The kernels of csrc/cuda with all that a call decides known to the compiler, so that their code is that call's way alone:
// LLaDA2.0-mini, block routing by its defaults, bf16. Only the cost model compiles this; it is never run.
// TOKENS: of a call; CLUSTER: thread blocks per block of tokens.
#include <cuda_runtime.h>
#define __clusterSizeInBlocks() CLUSTER
#define __clusterRelativeBlockRank() (blockIdx.x % CLUSTER)
#include "../select.h"
// Only what a coreset of more than 32 members takes calls this: that way is left out.
#define load_keys(...) __builtin_unreachable()
#include "experts_kernel.h"
#include "router_kernel.h"

using namespace dmoe;
using namespace dmoe::cuda;

extern "C" __global__ void __launch_bounds__(kRouterThreads, 1) router(const __grid_constant__ Router given) {
  extern __shared__ __align__(128) char shared[];
  __builtin_assume(threadIdx.x < kRouterThreads);
  __builtin_assume(given.x != nullptr);
  __builtin_assume(given.expert_bias != nullptr);
  Router a = given;
  Routing r{};
  a.tokens = a.seq_len = TOKENS;
  a.hidden = 2048;
  a.experts = a.coreset_width = 256;
  a.n_blocks = (TOKENS + 31) / 32;
  a.x_dtype = a.gate_dtype = Dtype::bf16;
  a.block_offsets = nullptr;
  r.top_k = 8;
  r.block_size = TOKENS < 32 ? TOKENS : 32;
  r.n_group = 8;
  r.topk_group = 4;
  r.max_experts = 256;
  r.min_experts = 16;
  r.score = Score::sigmoid;
  r.aggregate = Aggregate::topk_sum;
  r.select = Select::top_p;
  r.norm_topk_prob = true;
  r.top_p = 0.6f;
  r.routed_scaling_factor = 2.5f;
  route_kernel<8>(a, r, shared);
}

extern "C" __global__ void __launch_bounds__(TOKENS <= max_tokens_of_wide(false) ? 512 : 384, 1)
    experts(const __grid_constant__ Experts given) {
  extern __shared__ __align__(128) char shared[];
  __builtin_assume(threadIdx.x < 512);
  Experts a = given;
  a.tokens = TOKENS;
  a.hidden = 2048;
  a.intermediate = a.shared_intermediate = 512;
  a.experts = 256;
  a.top_k = 8;
  const Form form = TOKENS <= max_tokens_of_wide(false) ? Form{128, 2, 8} : Form{64, 3, 4};
  experts_kernel<false, false, (TOKENS + 15) / 16>(a, form, shared);
}
