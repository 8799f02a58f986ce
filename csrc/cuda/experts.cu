// Launch of the experts, latency form: sm_90 and above.
#include "experts_kernel.h"
#include "launch.h"

namespace dmoe::cuda {
namespace {

// Threads that tiles of as many rows take as so many tokens allow.
constexpr int max_threads(int sixteens, bool fp8) {
  return Form{16 * sixteens <= max_tokens_of_wide(fp8) ? kMaxRows : kMaxRows / 2}.threads();
}

template <bool kHalf, bool kFp8, int kSixteens, bool kGelu>
__global__ void __launch_bounds__(max_threads(kSixteens, kFp8), 1)
    experts_entry(const __grid_constant__ Experts args, const __grid_constant__ Form form) {
  extern __shared__ __align__(128) char shared[];
  experts_kernel<kHalf, kFp8, kSixteens, kGelu>(args, form, shared);
}

using Kernel = void (*)(Experts, Form);

// By tokens / 16, rounded up.
template <bool kHalf, bool kFp8, bool kGelu>
constexpr Kernel kKernels[] = {experts_entry<kHalf, kFp8, 1, kGelu>, experts_entry<kHalf, kFp8, 2, kGelu>,
                               experts_entry<kHalf, kFp8, 3, kGelu>, experts_entry<kHalf, kFp8, 4, kGelu>};
static_assert(kMaxTokens == 64);

template <bool kGelu>
Kernel kernel_of(const Experts& args) {
  const bool half = args.dtype == Dtype::f16;
  return (args.fp8()
              ? (half ? kKernels<true, true, kGelu> : kKernels<false, true, kGelu>)
              : (half ? kKernels<true, false, kGelu> : kKernels<false, false, kGelu>))[(args.tokens + 15) / 16 - 1];
}

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
  const Kernel kernel = args.activation == Activation::silu ? kernel_of<false>(args) : kernel_of<true>(args);
  return text(launch(kernel, shape, stream, args, form));
}

}  // namespace dmoe::cuda
