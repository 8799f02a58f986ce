// The kernel of csrc/cuda/experts.cu on the CPU, for tests/test_experts_host.py (by ctypes).
#include "cuda/experts_kernel.h"

namespace {
std::string error;
}

extern "C" {

// `weight_bytes`: what was copied of the weights.
const char* emulate_experts(const dmoe::cuda::Experts* args, int ctas, int n_stages, int n_splits, uint32_t seed,
                            int64_t* weight_bytes) {
  using namespace dmoe::cuda;
  if (const char* why = refuses(*args)) return why;
  error = dmoe::emulate::launch(ctas, kExpertsThreads, 1, experts_shared(args->tokens, n_stages), seed, [&](char* shared) {
    if (args->dtype == Dtype::f16) {
      experts_kernel<true>(*args, n_stages, n_splits, shared);
    } else {
      experts_kernel<false>(*args, n_stages, n_splits, shared);
    }
  });
  *weight_bytes = dmoe::emulate::machine.copied_once;
  return error.empty() ? nullptr : error.c_str();
}

const char* refuses_experts(const dmoe::cuda::Experts* args) { return dmoe::cuda::refuses(*args); }
int64_t workspace_bytes(const dmoe::cuda::Experts* a) {
  return dmoe::cuda::experts_workspace(a->tokens, a->hidden, a->intermediate, a->shared_intermediate, a->experts, a->top_k)
      .bytes;
}
int64_t schedule_words(int64_t experts) { return dmoe::cuda::schedule_words(experts); }
int used_at() { return dmoe::cuda::kUsed; }
int splits(int64_t hidden, int multiprocessors) { return dmoe::cuda::splits(hidden, multiprocessors); }
int stages(int64_t tokens) { return dmoe::cuda::stages(tokens); }
int64_t shared_bytes(int64_t tokens, int n_stages) { return dmoe::cuda::experts_shared(tokens, n_stages); }
}
