// Launch of the experts, latency form: sm_90 and above.
#include "experts_kernel.h"
#include "launch.h"

namespace dmoe::cuda {
namespace {

template <bool kHalf, int kSixteens>
__global__ void __launch_bounds__(kExpertsThreads, 1)
    experts_entry(const __grid_constant__ Experts args, int n_stages, int n_splits) {
  extern __shared__ __align__(128) char shared[];
  experts_kernel<kHalf, kSixteens>(args, n_stages, n_splits, shared);
}

using Kernel = void (*)(Experts, int, int);

// By tokens / 16, rounded up.
template <bool kHalf>
constexpr Kernel kKernels[] = {experts_entry<kHalf, 1>, experts_entry<kHalf, 2>, experts_entry<kHalf, 3>,
                               experts_entry<kHalf, 4>};
static_assert(kMaxTokens == 64);

}  // namespace

const char* experts_forward(const Experts& args, void* stream) {
  int major = 0, multiprocessors = 0, shared = 0;
  cudaError_t error = attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (error == cudaSuccess) error = attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (error == cudaSuccess) error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared);
  if (error != cudaSuccess) return text(error);
  if (major < 9) return "the expert kernel needs compute capability 9.0 or above";
  const int n_stages = stages(args.tokens, args.top_k, shared);
  if (n_stages < 2) return "the expert kernel needs more shared memory than this GPU has";
  const Shape shape{multiprocessors, kExpertsThreads, experts_shared(args.tokens, args.top_k, n_stages), 1, true};
  const int64_t sixteens = (args.tokens + 15) / 16;
  const Kernel kernel = (args.dtype == Dtype::f16 ? kKernels<true> : kKernels<false>)[sixteens - 1];
  return text(launch(kernel, shape, stream, args, n_stages, splits(args.hidden, multiprocessors)));
}

}  // namespace dmoe::cuda
