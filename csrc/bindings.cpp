// dmoe_ops._C: what was built, and the CPU kernels behind the ops that dmoe_ops/_library.py defines.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bind_expert_pool.h"
#include "cpu/decoder.h"
#include "cpu/experts.h"
#include "cpu/isa.h"
#include "cpu/matrix.h"
#include "cpu/router.h"
#ifdef USE_CUDA
#include "cuda/ops.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The ops have validated everything in Python, with better messages; here whatever would read or write out of bounds is
// looked at again, for callers that come past them.
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

// `shape` has -1 where a size is free.
void check(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.is_contiguous();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || tensor.size(i) == shape[i];
  std::string want;
  for (int64_t size : shape) want.append(want.empty() ? "" : ", ").append(size < 0 ? "any" : std::to_string(size));
  STD_TORCH_CHECK(fits, "dmoe: ", name, " must be contiguous with shape [", want, "]");
  STD_TORCH_CHECK(tensor.is_cpu(), "dmoe: ", name, " must be on the CPU");
}

void check(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape, ScalarType dtype) {
  check(tensor, name, shape);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "dmoe: ", name, " has the wrong dtype");
}

// The settings are BlockRouting's, which has looked at most of them; these are what the kernels index by.
dmoe::Routing routing_of(const std::vector<int64_t>& ints, const std::vector<double>& floats, int64_t experts) {
  STD_TORCH_CHECK(ints.size() == 12 && floats.size() == 2, "dmoe: the settings must be 12 integers and 2 numbers");
  const dmoe::Routing routing = dmoe::unpack_routing(ints, floats);
  const auto within = [](int64_t value, int64_t least, int64_t most) { return least <= value && value <= most; };
  STD_TORCH_CHECK(within(routing.top_k, 1, experts) && routing.block_size >= 1 && within(routing.n_group, 1, experts) &&
                      experts % routing.n_group == 0 && within(routing.topk_group, 1, routing.n_group) &&
                      within(ints[4], 0, 1) && within(ints[5], 0, 3) && within(ints[6], 0, 3) &&
                      routing.min_experts >= 0 && routing.max_experts >= 1 && routing.capacity >= 0 &&
                      (routing.aggregate != dmoe::Aggregate::union_ || routing.select == dmoe::Select::all ||
                       within(routing.union_k, 1, experts)),
                  "dmoe: the settings are not those of a BlockRouting for ", experts, " experts");
  return routing;
}

// BlockRouting.coreset_width.
int64_t coreset_width(const dmoe::Routing& routing, int64_t experts) {
  if (routing.select == dmoe::Select::top_p) return std::min(routing.max_experts, experts);
  if (routing.select == dmoe::Select::top_n) return std::min(routing.capacity, experts);
  if (routing.select == dmoe::Select::all) return experts;
  const bool union_of = routing.aggregate == dmoe::Aggregate::union_;
  if (routing.block_size >= experts || (!union_of && routing.aggregate != dmoe::Aggregate::topk_sum)) return experts;
  return std::min(routing.block_size * (union_of ? routing.union_k : routing.top_k), experts);
}

void check_blocks(const std::optional<Tensor>& offsets, int64_t tokens, int64_t seq_len, int64_t n_blocks,
                  int64_t block_size) {
  if (!offsets) {
    const bool whole = tokens == 0 || (seq_len >= 1 && tokens % seq_len == 0);
    const int64_t want = whole && tokens ? tokens / seq_len * ((seq_len - 1) / block_size + 1) : 0;
    STD_TORCH_CHECK(whole && n_blocks == want,
                    "dmoe: seq_len must divide the tokens, and coreset_ids have a row per block");
    return;
  }
  check(*offsets, "block_offsets", {n_blocks + 1}, ScalarType::Int);
  const auto* begin = static_cast<const int32_t*>(offsets->const_data_ptr());
  bool rises = begin[0] == 0 && begin[n_blocks] == tokens;
  for (int64_t b = 0; b < n_blocks; ++b)
    rises = rises && begin[b] < begin[b + 1] && begin[b + 1] - begin[b] <= block_size;
  STD_TORCH_CHECK(rises, "dmoe: block_offsets must rise from 0 to ", tokens, " by at most ", block_size);
}

const int32_t* check_domains(const Tensor& offsets, int64_t n_blocks) {
  check(offsets, "domain_offsets", {-1}, ScalarType::Int);
  const auto* begin = static_cast<const int32_t*>(offsets.const_data_ptr());
  const int64_t size = offsets.numel();
  const bool rises = size > 0 && begin[0] == 0 && begin[size - 1] == n_blocks && std::is_sorted(begin, begin + size);
  STD_TORCH_CHECK(rises, "dmoe: domain_offsets must rise from 0 to ", n_blocks);
  return begin;
}

void check_hidden(const Tensor& x) { STD_TORCH_CHECK(x.size(1) > 0, "dmoe: x must have at least one column"); }

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, grain, body);
}

void block_route_out(const Tensor logits, const std::optional<Tensor> expert_bias,
                     const std::optional<Tensor> block_offsets, int64_t seq_len, const std::vector<int64_t> ints,
                     const std::vector<double> floats, Tensor topk_ids, Tensor topk_weights, Tensor coreset_ids,
                     Tensor coreset_sizes, const std::optional<Tensor> domain_offsets, int64_t pool_capacity,
                     bool choose_in_pool, const std::optional<Tensor> given) {
  check(logits, "logits", {-1, -1}, ScalarType::Float);
  check(coreset_ids, "coreset_ids", {-1, -1}, ScalarType::Int);
  dmoe::cpu::BlockRoute args{};
  args.tokens = logits.size(0);
  args.experts = logits.size(1);
  args.n_blocks = coreset_ids.size(0);
  args.coreset_width = coreset_ids.size(1);
  const dmoe::Routing routing = routing_of(ints, floats, args.experts);
  if (expert_bias) check(*expert_bias, "expert_bias", {args.experts}, ScalarType::Float);
  check(topk_ids, "topk_ids", {args.tokens, routing.top_k}, ScalarType::Int);
  check(topk_weights, "topk_weights", {args.tokens, routing.top_k}, ScalarType::Float);
  check(coreset_sizes, "coreset_sizes", {args.n_blocks}, ScalarType::Int);
  check_blocks(block_offsets, args.tokens, seq_len, args.n_blocks, routing.block_size);
  if (given) {
    check(*given, "given_coresets", {args.n_blocks, args.coreset_width}, ScalarType::Int);
    args.given = static_cast<const int32_t*>(given->const_data_ptr());
  } else {
    int64_t width = choose_in_pool && domain_offsets ? args.experts : coreset_width(routing, args.experts);
    if (pool_capacity && domain_offsets) width = std::min(width, pool_capacity);
    STD_TORCH_CHECK(args.coreset_width >= width, "dmoe: coreset_ids is too narrow");
  }
  if (domain_offsets) {
    args.n_domains = domain_offsets->numel() - 1;
    args.domain_offsets = check_domains(*domain_offsets, args.n_blocks);
    args.pool_capacity = pool_capacity;
    args.choose_in_pool = choose_in_pool;
  }
  args.logits = static_cast<const float*>(logits.const_data_ptr());
  args.expert_bias = expert_bias ? static_cast<const float*>(expert_bias->const_data_ptr()) : nullptr;
  args.block_offsets = block_offsets ? static_cast<const int32_t*>(block_offsets->const_data_ptr()) : nullptr;
  args.seq_len = seq_len;
  args.topk_ids = static_cast<int32_t*>(topk_ids.mutable_data_ptr());
  args.topk_weights = static_cast<float*>(topk_weights.mutable_data_ptr());
  args.coreset_ids = static_cast<int32_t*>(coreset_ids.mutable_data_ptr());
  args.coreset_sizes = static_cast<int32_t*>(coreset_sizes.mutable_data_ptr());
  dmoe::cpu::block_route(args, routing, parallel_for);
}

void gate_out(const Tensor x, const Tensor gate_weight, Tensor logits) {
  check(x, "x", {-1, -1});
  check_hidden(x);
  check(gate_weight, "gate_weight", {-1, x.size(1)});
  check(logits, "logits", {x.size(0), gate_weight.size(0)}, ScalarType::Float);
  dmoe::cpu::linear_f32(x.const_data_ptr(), dtype_of(x), gate_weight.const_data_ptr(), dtype_of(gate_weight), x.size(0),
                        x.size(1), gate_weight.size(0), static_cast<float*>(logits.mutable_data_ptr()), parallel_for);
}

dmoe::cpu::Format format_of(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float8_e4m3fn:
      return dmoe::cpu::Format::fp8;
    case ScalarType::Char:
      return dmoe::cpu::Format::int8;
    case ScalarType::Byte:
      return dmoe::cpu::Format::int4;
    default:
      return dmoe::cpu::Format::plain;
  }
}

dmoe::cpu::Weight weight_of(const Tensor& weight, const std::optional<Tensor>& scale) {
  if (!scale) return weight.const_data_ptr();
  return {weight.const_data_ptr(), format_of(weight), scale->const_data_ptr(),
          scale->scalar_type() == ScalarType::BFloat16};
}

// A weight [rows, depth], of `experts` where that is not negative, with its scale where it is quantised.
void check_weight(const Tensor& x, const char* name, const Tensor& weight, const std::optional<Tensor>& scale,
                  int64_t experts, int64_t rows, int64_t depth, int64_t halves) {
  using dmoe::cpu::Format;
  const Format format = format_of(weight);
  const auto shape = [&](std::vector<int64_t> sizes) {
    if (experts >= 0) sizes.insert(sizes.begin(), experts);
    return sizes;
  };
  check(weight, name, shape({rows, format == Format::int4 ? (depth + 1) / 2 : depth}),
        format == Format::plain ? x.scalar_type() : weight.scalar_type());
  STD_TORCH_CHECK(scale.has_value() == (format != Format::plain), "dmoe: ", name, " has a scale where it is quantised");
  if (!scale) return;
  const int64_t groups = (depth + dmoe::cpu::kScaleGroup - 1) / dmoe::cpu::kScaleGroup;
  const int64_t blocks = halves * ((rows / halves + dmoe::cpu::kScaleGroup - 1) / dmoe::cpu::kScaleGroup);
  const bool half = format == Format::int4 && scale->scalar_type() == ScalarType::BFloat16;
  check(*scale, "a scale",
        shape(format == Format::int8 ? std::vector<int64_t>{rows}
                                     : std::vector<int64_t>{format == Format::int4 ? rows : blocks, groups}),
        half ? ScalarType::BFloat16 : ScalarType::Float);
}

// The intermediate size of a pair of weights.
int64_t check_experts(const Tensor& x, const char* w13_name, const Tensor& w13, const std::optional<Tensor>& w13_scale,
                      const char* w2_name, const Tensor& w2, const std::optional<Tensor>& w2_scale, int64_t experts) {
  STD_TORCH_CHECK(w13.dim() == (experts < 0 ? 2 : 3), "dmoe: ", w13_name, " must have ", experts < 0 ? 2 : 3,
                  " dimensions");
  const int64_t hidden = x.size(1), rows = w13.size(w13.dim() - 2);
  STD_TORCH_CHECK(rows % 2 == 0, "dmoe: ", w13_name, " must have gate and up rows");
  STD_TORCH_CHECK(w13.scalar_type() == w2.scalar_type(), "dmoe: ", w13_name, " and ", w2_name, " must have one dtype");
  check_weight(x, w13_name, w13, w13_scale, experts, rows, hidden, 2);
  check_weight(x, w2_name, w2, w2_scale, experts, hidden, rows / 2, 1);
  return rows / 2;
}

const int32_t* check_map(const Tensor& map, int64_t rows) {
  check(map, "expert_map", {-1}, ScalarType::Int);
  const auto* row = static_cast<const int32_t*>(map.const_data_ptr());
  const bool within = std::all_of(row, row + map.numel(), [&](int32_t r) { return -2 <= r && r < rows; });
  STD_TORCH_CHECK(within, "dmoe: expert_map must hold rows of w13, -1 or -2");
  return row;
}

void moe_experts_out(const Tensor x, const Tensor w13, const Tensor w2, const std::optional<Tensor> shared_w13,
                     const std::optional<Tensor> shared_w2, const std::optional<Tensor> w13_scale,
                     const std::optional<Tensor> w2_scale, const std::optional<Tensor> shared_w13_scale,
                     const std::optional<Tensor> shared_w2_scale, bool quantize_activations,
                     const std::optional<Tensor> expert_map, const std::string activation, const Tensor topk_ids,
                     const Tensor topk_weights, Tensor y, std::optional<Tensor> carry, int64_t begin, int64_t end) {
  check(x, "x", {-1, -1});
  check_hidden(x);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check(topk_ids, "topk_ids", {tokens, -1}, ScalarType::Int);
  check(topk_weights, "topk_weights", {tokens, topk_ids.size(1)}, ScalarType::Float);
  check(y, "y", {tokens, hidden}, x.scalar_type());
  STD_TORCH_CHECK(shared_w13.has_value() == shared_w2.has_value(), "dmoe: shared_w13 and shared_w2 go together");
  dmoe::cpu::Experts args{};
  args.tokens = tokens;
  args.hidden = hidden;
  args.intermediate = check_experts(x, "w13", w13, w13_scale, "w2", w2, w2_scale, w13.size(0));
  args.experts = expert_map ? expert_map->numel() : w13.size(0);
  if (expert_map) args.expert_map = check_map(*expert_map, w13.size(0));
  if (carry) {
    check(*carry, "carry", {tokens, hidden}, ScalarType::Float);
    STD_TORCH_CHECK(0 <= begin && begin <= end && end <= args.experts, "dmoe: a wave must be experts of the model");
    args.carry = static_cast<float*>(carry->mutable_data_ptr());
    args.begin = begin;
    args.end = end;
  }
  args.top_k = topk_ids.size(1);
  args.dtype = dtype_of(x);
  args.x = x.const_data_ptr();
  args.w13 = weight_of(w13, w13_scale);
  args.w2 = weight_of(w2, w2_scale);
  args.topk_ids = static_cast<const int32_t*>(topk_ids.const_data_ptr());
  args.topk_weights = static_cast<const float*>(topk_weights.const_data_ptr());
  if (shared_w13) {
    args.shared_intermediate =
        check_experts(x, "shared_w13", *shared_w13, shared_w13_scale, "shared_w2", *shared_w2, shared_w2_scale, -1);
    args.shared_w13 = weight_of(*shared_w13, shared_w13_scale);
    args.shared_w2 = weight_of(*shared_w2, shared_w2_scale);
  }
  args.quantize_activations = quantize_activations;
  const auto named = dmoe::activation_of(activation);
  STD_TORCH_CHECK(named.has_value(), "dmoe: activation must be silu or gelu_tanh, got ", activation);
  args.activation = *named;
  args.y = y.mutable_data_ptr();
  dmoe::cpu::experts_forward(args, parallel_for);
}

void add_rms_norm_out(const Tensor x, const Tensor delta, const Tensor weight, double eps, Tensor normed, Tensor sum) {
  check(x, "x", {-1, -1});
  const int64_t rows = x.size(0), size = x.size(1);
  check(delta, "delta", {rows, size}, x.scalar_type());
  check(weight, "weight", {size}, x.scalar_type());
  check(normed, "normed", {rows, size}, x.scalar_type());
  check(sum, "sum", {rows, size}, x.scalar_type());
  dmoe::cpu::add_rms_norm({rows, size, dtype_of(x), x.const_data_ptr(), delta.const_data_ptr(), weight.const_data_ptr(),
                           static_cast<float>(eps), normed.mutable_data_ptr(), sum.mutable_data_ptr()},
                          parallel_for);
}

void qk_norm_rope_out(const Tensor qkv, const std::optional<Tensor> q_weight, const std::optional<Tensor> k_weight,
                      double eps, const Tensor cos, const Tensor sin, const std::optional<Tensor> rows,
                      const Tensor past, Tensor keys, Tensor values, Tensor query) {
  const ScalarType dtype = qkv.scalar_type();
  check(query, "query", {-1, -1, -1, -1}, dtype);
  check(keys, "keys", {-1, -1, -1, query.size(3)}, dtype);
  check(values, "values", {keys.size(0), keys.size(1), keys.size(2), query.size(3)}, dtype);
  dmoe::cpu::QkNormRope args{};
  args.sequences = query.size(0);
  args.heads = query.size(1);
  args.tokens = query.size(2);
  args.size = query.size(3);
  args.kv_heads = keys.size(1);
  args.capacity = keys.size(2);
  args.dtype = dtype_of(qkv);
  check(qkv, "qkv", {args.sequences, args.tokens, (args.heads + 2 * args.kv_heads) * args.size});
  check(cos, "cos", {-1, -1}, dtype);
  args.rotary = cos.size(1);
  check(sin, "sin", {cos.size(0), args.rotary}, dtype);
  check(past, "past", {1}, ScalarType::Long);
  args.past = *static_cast<const int64_t*>(past.const_data_ptr());
  STD_TORCH_CHECK(args.rotary % 2 == 0 && args.rotary <= args.size,
                  "dmoe: cos must have an even number of columns, at most head_dim");
  STD_TORCH_CHECK(args.past >= 0 && args.past + args.tokens <= args.capacity,
                  "dmoe: keys have no room for these tokens");
  STD_TORCH_CHECK(args.past + args.tokens <= cos.size(0), "dmoe: cos must have a row for each position");
  STD_TORCH_CHECK(q_weight.has_value() == k_weight.has_value(), "dmoe: q_weight and k_weight go together");
  if (q_weight) {
    check(*q_weight, "q_weight", {args.size}, dtype);
    check(*k_weight, "k_weight", {args.size}, dtype);
    args.q_weight = q_weight->const_data_ptr();
    args.k_weight = k_weight->const_data_ptr();
  }
  if (rows) {
    check(*rows, "rows", {args.sequences}, ScalarType::Long);
    args.rows = static_cast<const int64_t*>(rows->const_data_ptr());
  }
  for (int64_t i = 0; i < args.sequences; ++i) {
    const int64_t row = args.rows ? args.rows[i] : i;
    STD_TORCH_CHECK(row >= 0 && row < keys.size(0), "dmoe: rows must be sequences of the cache");
  }
  args.qkv = qkv.const_data_ptr();
  args.eps = static_cast<float>(eps);
  args.cos = cos.const_data_ptr();
  args.sin = sin.const_data_ptr();
  args.query = query.mutable_data_ptr();
  args.keys = keys.mutable_data_ptr();
  args.values = values.mutable_data_ptr();
  dmoe::cpu::qk_norm_rope(args, parallel_for);
}

void greedy_out(const Tensor logits, Tensor token, Tensor probability) {
  check(logits, "logits", {-1, -1});
  check(token, "token", {logits.size(0)}, ScalarType::Long);
  check(probability, "probability", {logits.size(0)}, ScalarType::Float);
  dmoe::cpu::greedy(
      {logits.size(0), logits.size(1), dtype_of(logits), logits.const_data_ptr(),
       static_cast<int64_t*>(token.mutable_data_ptr()), static_cast<float*>(probability.mutable_data_ptr())},
      parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dmoe, CPU, m) {
  m.impl("_add_rms_norm_out", TORCH_BOX(&add_rms_norm_out));
  m.impl("_qk_norm_rope_out", TORCH_BOX(&qk_norm_rope_out));
  m.impl("_greedy_out", TORCH_BOX(&greedy_out));
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
  dmoe::add_expert_pool(m);
  m.def(
      "cpu_isa", [] { return dmoe::cpu::name_of(dmoe::cpu::isa()); },
      "The body of the CPU kernels that runs here: amx, avx512_bf16, avx512, avx2 or plain.");
}
