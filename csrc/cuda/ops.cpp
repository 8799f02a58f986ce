// The CUDA kernels behind the ops that dmoe_ops/_library.py defines, and their host rules for Python.
#include "ops.h"

#include <dlfcn.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "experts.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace dmoe::cuda;

std::optional<Dtype> dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      return std::nullopt;
  }
}

Dtype dtype_of(const Tensor& tensor) {
  const auto dtype = dtype_of(tensor.scalar_type());
  STD_TORCH_CHECK(dtype.has_value(), "dmoe: the CUDA kernels take float32, bfloat16 and float16");
  return *dtype;
}

// The ops have validated shapes, dtypes and devices in Python. A view may still start anywhere.
const void* aligned(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim && tensor.is_contiguous(), "dmoe: ", name, " must be contiguous with ", dim,
                  " dimensions");
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, "dmoe: ", name,
                  " must start at a multiple of 16 bytes, which a fresh tensor does and a view may not: clone it");
  return data;
}

// torch's current stream on a device. libtorch_cuda has it in its stable C interface, but is not there in a CPU build of
// torch, with which this file is linked as well: so it is looked up once it is needed.
void* current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get != nullptr, "dmoe: this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "dmoe: torch has no current stream on CUDA device ", device);
  return stream;
}

void check_launch(const char* what, const char* kernel) {
  STD_TORCH_CHECK(what == nullptr, "dmoe: launching the CUDA ", kernel, ": ", what ? what : "");
}

void route(const Tensor* x, const Tensor* gate_weight, const Tensor& logits, const std::optional<Tensor>& expert_bias,
           const std::optional<Tensor>& block_offsets, int64_t seq_len, const std::vector<int64_t>& ints,
           const std::vector<double>& floats, Tensor& topk_ids, Tensor& topk_weights, Tensor& coreset_ids,
           Tensor& coreset_sizes, Tensor* schedule, const int32_t* expert_map) {
  Router args{};
  args.tokens = logits.size(0);
  args.experts = logits.size(1);
  args.n_blocks = coreset_ids.size(0);
  args.coreset_width = coreset_ids.size(1);
  args.seq_len = seq_len;
  if (x) {
    args.x = aligned(*x, "x", 2);
    args.hidden = x->size(1);
    args.gate_weight = aligned(*gate_weight, "gate_weight", 2);
    args.x_dtype = dtype_of(*x);
    args.gate_dtype = dtype_of(*gate_weight);
  }
  args.logits = static_cast<float*>(logits.data_ptr());
  args.expert_bias = expert_bias ? static_cast<const float*>(expert_bias->const_data_ptr()) : nullptr;
  args.block_offsets = block_offsets ? static_cast<const int32_t*>(block_offsets->const_data_ptr()) : nullptr;
  args.topk_ids = static_cast<int32_t*>(topk_ids.mutable_data_ptr());
  args.topk_weights = static_cast<float*>(topk_weights.mutable_data_ptr());
  args.coreset_ids = static_cast<int32_t*>(coreset_ids.mutable_data_ptr());
  args.coreset_sizes = static_cast<int32_t*>(coreset_sizes.mutable_data_ptr());
  if (schedule) {
    STD_TORCH_CHECK(schedule->numel() >= schedule_words(args.experts), "dmoe: the schedule is too small");
    args.schedule = static_cast<uint32_t*>(schedule->mutable_data_ptr());
    args.expert_map = expert_map;
  }
  const dmoe::Routing routing = dmoe::unpack_routing(ints, floats);
  const char* why = refuses(args, routing);
  STD_TORCH_CHECK(why == nullptr, "dmoe: the CUDA router does not take ", why ? why : "");
  if (args.tokens == 0 || args.n_blocks == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(block_route(args, routing, current_stream(logits.get_device_index())), "router");
}

const int32_t* map_of(const std::optional<Tensor>& map, int64_t experts) {
  STD_TORCH_CHECK(!map || map->numel() == experts, "dmoe: expert_map must have an entry per expert");
  return map ? static_cast<const int32_t*>(map->const_data_ptr()) : nullptr;
}

void block_route_out(const Tensor logits, const std::optional<Tensor> expert_bias,
                     const std::optional<Tensor> block_offsets, int64_t seq_len, const std::vector<int64_t> ints,
                     const std::vector<double> floats, Tensor topk_ids, Tensor topk_weights, Tensor coreset_ids,
                     Tensor coreset_sizes, const std::optional<Tensor> domain_offsets, int64_t, bool,
                     const std::optional<Tensor> given) {
  STD_TORCH_CHECK(!domain_offsets && !given, "dmoe: the CUDA router takes no domain_offsets and no given_coresets");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "dmoe: logits must be contiguous with 2 dimensions");
  route(nullptr, nullptr, logits, expert_bias, block_offsets, seq_len, ints, floats, topk_ids, topk_weights,
        coreset_ids, coreset_sizes, nullptr, nullptr);
}

void gate_route_out(const Tensor x, const Tensor gate_weight, const std::optional<Tensor> expert_bias,
                    const std::optional<Tensor> block_offsets, int64_t seq_len, const std::vector<int64_t> ints,
                    const std::vector<double> floats, Tensor logits, Tensor topk_ids, Tensor topk_weights,
                    Tensor coreset_ids, Tensor coreset_sizes, std::optional<Tensor> schedule,
                    const std::optional<Tensor> expert_map) {
  route(&x, &gate_weight, logits, expert_bias, block_offsets, seq_len, ints, floats, topk_ids, topk_weights,
        coreset_ids, coreset_sizes, schedule ? &*schedule : nullptr, map_of(expert_map, logits.size(1)));
}

const float* scale_of(const std::optional<Tensor>& scale) {
  return scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
}

void block_dense_out(const Tensor x, const Tensor w13, const Tensor w2, const std::optional<Tensor> shared_w13,
                     const std::optional<Tensor> shared_w2, const std::optional<Tensor> w13_scale,
                     const std::optional<Tensor> w2_scale, const std::optional<Tensor> shared_w13_scale,
                     const std::optional<Tensor> shared_w2_scale, const std::optional<Tensor> expert_map,
                     const std::string activation, const Tensor topk_ids, const Tensor topk_weights, Tensor schedule,
                     Tensor workspace, bool scheduled, Tensor y) {
  Experts args{};
  args.x = aligned(x, "x", 2);
  args.w13 = aligned(w13, "w13", 3);
  args.w2 = aligned(w2, "w2", 3);
  args.tokens = x.size(0);
  args.hidden = x.size(1);
  args.intermediate = w2.size(2);
  args.experts = expert_map ? expert_map->numel() : w13.size(0);
  args.expert_map = map_of(expert_map, args.experts);
  args.top_k = topk_ids.size(1);
  args.dtype = dtype_of(x);
  const auto named = dmoe::activation_of(activation);
  STD_TORCH_CHECK(named.has_value(), "dmoe: activation must be silu or gelu_tanh, got ", activation);
  args.activation = *named;
  if (shared_w13) {
    args.shared_intermediate = shared_w2->size(1);
    args.shared_w13 = aligned(*shared_w13, "shared_w13", 2);
    args.shared_w2 = aligned(*shared_w2, "shared_w2", 2);
  }
  args.w13_scale = scale_of(w13_scale);
  args.w2_scale = scale_of(w2_scale);
  args.shared_w13_scale = scale_of(shared_w13_scale);
  args.shared_w2_scale = scale_of(shared_w2_scale);
  STD_TORCH_CHECK(
      args.fp8() == (w13.scalar_type() == ScalarType::Float8_e4m3fn) && (args.fp8() || !args.shared_w13_scale),
      "dmoe: the CUDA expert kernel takes plain weights, or float8_e4m3fn and its scales");
  args.topk_ids = static_cast<const int32_t*>(topk_ids.const_data_ptr());
  args.topk_weights = static_cast<const float*>(topk_weights.const_data_ptr());
  args.schedule = static_cast<uint32_t*>(schedule.mutable_data_ptr());
  args.workspace = workspace.mutable_data_ptr();
  args.y = y.mutable_data_ptr();
  const char* why = refuses(args);
  STD_TORCH_CHECK(why == nullptr, "dmoe: the CUDA expert kernel does not take ", why ? why : "");
  const int64_t bytes =
      experts_workspace(args.tokens, args.hidden, args.intermediate, args.shared_intermediate, args.experts, args.top_k)
          .bytes;
  STD_TORCH_CHECK(schedule.numel() >= schedule_words(args.experts) && workspace.numel() >= bytes,
                  "dmoe: the schedule or the workspace is too small");
  aligned(workspace, "workspace", 1);
  if (args.tokens == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = current_stream(x.get_device_index());
  if (!scheduled) {
    check_launch(dmoe::cuda::schedule(args.topk_ids, args.tokens * args.top_k, args.experts, args.expert_map,
                                      args.schedule, stream),
                 "schedule");
  }
  check_launch(experts_forward(args, stream), "experts");
}

std::optional<std::string> reason(const char* why) { return why ? std::optional<std::string>(why) : std::nullopt; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dmoe, CUDA, m) {
  m.impl("_block_route_out", TORCH_BOX(&block_route_out));
  m.impl("_gate_route_out", TORCH_BOX(&gate_route_out));
  m.impl("_block_dense_out", TORCH_BOX(&block_dense_out));
}

void dmoe::cuda::add_rules(pybind11::module_& m) {
  m.def(
      "cuda_router_refuses",
      [](int64_t experts, int64_t top_k, int64_t block_size, int64_t hidden) {
        Router args{};
        args.experts = experts;
        args.hidden = hidden;
        args.x = hidden ? &args : nullptr;
        dmoe::Routing routing{};
        routing.top_k = top_k;
        routing.block_size = block_size;
        return reason(refuses(args, routing));
      },
      "Why the CUDA router does not take a call, or None; hidden is 0 where the logits are ready-made.");
  m.def(
      "cuda_experts_refuses",
      [](int64_t tokens, int64_t hidden, int64_t intermediate, int64_t shared_intermediate, int64_t experts,
         int64_t top_k, int element_size, bool fp8) {
        Experts args{};
        const float scale = 1;
        args.w13_scale = fp8 ? &scale : nullptr;
        args.tokens = tokens;
        args.hidden = hidden;
        args.intermediate = intermediate;
        args.shared_intermediate = shared_intermediate;
        args.experts = experts;
        args.top_k = top_k;
        args.dtype = element_size == 2 ? Dtype::bf16 : Dtype::f32;
        return reason(refuses(args));
      },
      "Why the CUDA expert kernel does not take a call, or None.");
  m.def("cuda_schedule_words", &schedule_words, "Elements (int32) of the schedule for so many experts.");
  m.def(
      "cuda_workspace_bytes",
      [](int64_t tokens, int64_t hidden, int64_t intermediate, int64_t shared_intermediate, int64_t experts,
         int64_t top_k) {
        return experts_workspace(tokens, hidden, intermediate, shared_intermediate, experts, top_k).bytes;
      },
      "Bytes of the expert kernel's workspace.");
}
