// Launch of the experts, latency form: sm_90 and above.
#include "experts_kernel.h"
#include "launch.h"

namespace dmoe::cuda {
namespace {

// Threads that tiles of as many rows take as so many tokens allow.
constexpr int max_threads(int sixteens, bool fp8) {
  return Form{16 * sixteens <= max_tokens_of_wide(fp8) ? kMaxRows : kMaxRows / 2}.threads();
}

template <bool kHalf, bool kFp8, int kSixteens>
__global__ void __launch_bounds__(max_threads(kSixteens, kFp8), 1)
    experts_entry(const __grid_constant__ Experts args, const __grid_constant__ Form form) {
  extern __shared__ __align__(128) char shared[];
  experts_kernel<kHalf, kFp8, kSixteens>(args, form, shared);
}

using Kernel = void (*)(Experts, Form);

// By tokens / 16, rounded up.
template <bool kHalf, bool kFp8>
constexpr Kernel kKernels[] = {experts_entry<kHalf, kFp8, 1>, experts_entry<kHalf, kFp8, 2>,
                               experts_entry<kHalf, kFp8, 3>, experts_entry<kHalf, kFp8, 4>};
static_assert(kMaxTokens == 64);

}  // namespace

const char* experts_forward(const Experts& args, void* stream) {
  int major = 0, multiprocessors = 0, shared = 0;
  cudaError_t error = attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (error == cudaSuccess) error = attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (error == cudaSuccess) error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared);
  if (error != cudaSuccess) return text(error);
  if (major < 9) return "the expert kernel needs compute capability 9.0 or above";
  const Form form = experts_form(args, multiprocessors, shared);
  if (form.stages < 2) return "the expert kernel needs more shared memory than this GPU has";
  const Shape shape{multiprocessors, form.threads(), experts_shared(args, form), 1, true};
  const int64_t sixteens = (args.tokens + 15) / 16;
  const bool half = args.dtype == Dtype::f16;
  const Kernel kernel = (args.fp8() ? (half ? kKernels<true, true> : kKernels<false, true>)
                                    : (half ? kKernels<true, false> : kKernels<false, false>))[sixteens - 1];
  return text(launch(kernel, shape, stream, args, form));
}

}  // namespace dmoe::cuda
