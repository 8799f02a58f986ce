// dmoe_ops._C: what was built, and the CPU kernels behind the ops that dmoe_ops/_library.py defines.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/experts.h"
#include "cpu/isa.h"
#include "cpu/router.h"
#ifdef USE_CUDA
#include "cuda/ops.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The ops have validated shapes, dtypes, devices and layout in Python; here only what would read out of bounds is looked
// at again, for callers that come past them.
dmoe::cpu::Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return dmoe::cpu::Dtype::f32;
    case ScalarType::BFloat16:
      return dmoe::cpu::Dtype::bf16;
    case ScalarType::Half:
      return dmoe::cpu::Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "dmoe: the C++ kernels take float32, bfloat16 and float16");
  }
}

void check(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim && tensor.is_contiguous(), "dmoe: ", name, " must be contiguous with ", dim,
                  " dimensions");
}

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

void block_route_out(const Tensor logits, const std::optional<Tensor> expert_bias,
                     const std::optional<Tensor> block_offsets, int64_t seq_len, const std::vector<int64_t> ints,
                     const std::vector<double> floats, Tensor topk_ids, Tensor topk_weights, Tensor coreset_ids,
                     Tensor coreset_sizes) {
  check(logits, "logits", 2);
  dmoe::cpu::BlockRoute args{};
  args.tokens = logits.size(0);
  args.experts = logits.size(1);
  args.n_blocks = coreset_ids.size(0);
  args.coreset_width = coreset_ids.size(1);
  args.logits = static_cast<const float*>(logits.const_data_ptr());
  args.expert_bias = expert_bias ? static_cast<const float*>(expert_bias->const_data_ptr()) : nullptr;
  args.block_offsets = block_offsets ? static_cast<const int32_t*>(block_offsets->const_data_ptr()) : nullptr;
  args.seq_len = seq_len;
  args.topk_ids = static_cast<int32_t*>(topk_ids.mutable_data_ptr());
  args.topk_weights = static_cast<float*>(topk_weights.mutable_data_ptr());
  args.coreset_ids = static_cast<int32_t*>(coreset_ids.mutable_data_ptr());
  args.coreset_sizes = static_cast<int32_t*>(coreset_sizes.mutable_data_ptr());
  dmoe::cpu::block_route(args, dmoe::unpack_routing(ints, floats), parallel_for);
}

void gate_out(const Tensor x, const Tensor gate_weight, Tensor logits) {
  check(x, "x", 2);
  check(gate_weight, "gate_weight", 2);
  dmoe::cpu::linear_f32(x.const_data_ptr(), dtype_of(x), gate_weight.const_data_ptr(), dtype_of(gate_weight), x.size(0),
                        x.size(1), gate_weight.size(0), static_cast<float*>(logits.mutable_data_ptr()), parallel_for);
}

void moe_experts_out(const Tensor x, const Tensor w13, const Tensor w2, const std::optional<Tensor> shared_w13,
                     const std::optional<Tensor> shared_w2, const Tensor topk_ids, const Tensor topk_weights, Tensor y) {
  check(x, "x", 2);
  check(w13, "w13", 3);
  check(w2, "w2", 3);
  check(topk_ids, "topk_ids", 2);
  dmoe::cpu::Experts args{};
  args.tokens = x.size(0);
  args.hidden = x.size(1);
  args.intermediate = w2.size(2);
  args.experts = w13.size(0);
  args.top_k = topk_ids.size(1);
  args.dtype = dtype_of(x);
  args.x = x.const_data_ptr();
  args.w13 = w13.const_data_ptr();
  args.w2 = w2.const_data_ptr();
  args.topk_ids = static_cast<const int32_t*>(topk_ids.const_data_ptr());
  args.topk_weights = static_cast<const float*>(topk_weights.const_data_ptr());
  if (shared_w13) {
    args.shared_intermediate = shared_w2->size(1);
    args.shared_w13 = shared_w13->const_data_ptr();
    args.shared_w2 = shared_w2->const_data_ptr();
  }
  args.y = y.mutable_data_ptr();
  dmoe::cpu::experts_forward(args, parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("_block_route_out", TORCH_BOX(&block_route_out));
  m.impl("_gate_out", TORCH_BOX(&gate_out));
  m.impl("_moe_experts_out", TORCH_BOX(&moe_experts_out));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was built into dmoe_ops, and the registration of its C++ kernels.";
  m.attr("compiler") = DMOE_COMPILER;
  m.attr("torch_version") = DMOE_TORCH_VERSION;
  m.attr("cuda_architectures") = DMOE_CUDA_ARCHITECTURES;  // "" without CUDA kernels
  m.attr("why_no_cuda") = DMOE_WHY_NO_CUDA;
#ifdef USE_CUDA
  dmoe::cuda::add_rules(m);
#endif
  m.def("cpu_isa", [] { return dmoe::cpu::name_of(dmoe::cpu::isa()); },
        "The body of the CPU kernels that runs here: amx, avx512_bf16, avx512, avx2 or plain.");
}
