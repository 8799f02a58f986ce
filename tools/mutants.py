"""What tools/mutate.py runs: the tests of each module, mutants by hand, and the mutants that no test can kill."""

# The tests that state what a module does; a mutant that these miss counts as a survivor.
TESTS = {
    "dmoe_ops/reference.py": [
        "test_router",
        "test_experts",
        "test_layer",
        "test_golden",
        "test_bad_input",
        "test_quantized",
        "test_expert_map",
    ],
    "dmoe_ops/routing.py": ["test_routing", "test_router", "test_bad_input"],
    "dmoe_ops/router.py": ["test_router", "test_layer", "test_bad_input"],
    "dmoe_ops/experts.py": ["test_experts", "test_layer", "test_bad_input", "test_quantized", "test_expert_map"],
    "dmoe_ops/layer.py": [
        "test_layer",
        "test_bad_input",
        "test_patch",
        "test_quantized",
        "test_quantized_checkpoints",
        "test_expert_map",
    ],
    "dmoe_ops/formats.py": ["test_quantized", "test_quantize", "test_quantized_checkpoints", "test_expert_map"],
    "dmoe_ops/models/checkpoint.py": ["test_llada2", "test_sharing", "test_quantized_checkpoints"],
    "dmoe_ops/models/quantized.py": ["test_quantized_checkpoints"],
    "dmoe_ops/models/decoding.py": ["test_llada2"],
    "dmoe_ops/models/llada2.py": ["test_llada2", "test_training", "test_quantized_checkpoints"],
    "dmoe_ops/engines/hf.py": ["test_layer", "test_bad_input", "test_patch"],
}

# By file and the test file that has to fail: text that occurs in the file once, and what takes its place.
HAND = {
    ("bench/compare.py", "test_bench"): [
        (
            'apart = b["p10"] > a["p90"] or b["p90"] < a["p10"]',
            'apart = b["median"] > a["p90"] or b["median"] < a["p10"]',
        ),
    ],
    ("bench/timing.py", "test_bench"): [
        ("zip(slower, faster)", "zip(sorted(slower), sorted(faster))"),
        ("p10=deciles[0], p90=deciles[-1]", "p10=deciles[1], p90=deciles[-2]"),
    ],
    ("examples/miniature/table.py", "test_miniature"): [
        ("(0.025, 0.975)", "(0.25, 0.75)"),
        (
            "sum(s.unique_experts_denoising * n for s, n in zip(stats, steps)) / sum(steps)",
            "sum(s.unique_experts_denoising for s in stats) / len(stats)",
        ),
    ],
    ("dmoe_ops/reference.py", "test_router"): [
        ("logits.isnan() | selection.isnan()", "logits.isnan()"),
        ("size = (covered <= threshold)", "size = (covered.double() <= routing.top_p)"),
    ],
    ("dmoe_ops/layer.py", "test_layer"): [
        ("module.train(self.training)", "pass"),
    ],
    ("dmoe_ops/models/llada2.py", "test_llada2"): [
        ("norm(dim=0, keepdim=True)", "norm(dim=1, keepdim=True)"),
    ],
    ("dmoe_ops/models/decoding.py", "test_llada2"): [
        ("sure = confidence > threshold", "sure = confidence >= threshold"),
        ("(1, 0)) > top_p", "(1, 0)) >= top_p"),
    ],
    ("csrc/cpu/router.cpp", "test_router"): [
        ("value > values_[at - 1]", "value >= values_[at - 1]"),
        ("if (std::isnan(logits[e])) score[e] = 0;", ""),
        ("std::isnan(logits[e]) || std::isnan(r) ? kOut : r", "std::isnan(logits[e]) ? kOut : r"),
        ("std::isinf(top) ? 0.0 : std::exp(logit - top)", "std::exp(logit - top)"),
        ("routing.aggregate == Aggregate::union_ ? routing.union_k : routing.top_k", "routing.top_k"),
        ("|| value[e] > 0;", "|| value[e] >= 0;"),
        ("static_cast<float>(covered) <= routing.top_p", "static_cast<float>(covered) < routing.top_p"),
        (
            "std::min(std::max(size, routing.min_experts), routing.max_experts)",
            "std::max(std::min(size, routing.max_experts), routing.min_experts)",
        ),
        ("best_group_.offer(first + second,", "best_group_.offer(first,"),
        ("routing_.n_group && free > 0", "routing_.n_group && free > 1"),
        ("if (inside < routing_.top_k)", "if (false)"),
        ("const float norm = static_cast<float>(sum) + kEps;", "const float norm = static_cast<float>(sum);"),
        ("std::fill(ids + size, ids + args.coreset_width, -1);", ""),
        ("std::vector<double> total_;", "std::vector<float> total_;"),
        ("begins[b + 1] - begins[b], value.data()", "routing.block_size, value.data()"),
        ("row < args.seq_len; row += block_size", "row + block_size <= args.seq_len; row += block_size"),
        (
            "begins.begin(), begins.end(), t) - begins.begin() - 1",
            "begins.begin(), begins.end(), t + 1) - begins.begin() - 1",
        ),
        ("std::min(size, experts); ++i", "size; ++i"),
        ("return std::isnan(value[a]) && !std::isnan(value[b]);", "return false;"),
    ],
    ("csrc/cpu/experts.cpp", "test_experts"): [
        ("slots.token[slot] = i / a.top_k;", "slots.token[slot] = i % a.tokens;"),
        ("slots.scale[slot] = a.topk_weights[i];", "slots.scale[slot] = 1.f;"),
        ("slots.scale.resize(routed + shared, 1.f);", "slots.scale.resize(routed + shared, 0.f);"),
        ("if (args.tokens == 0) return;", "return;"),
        ("2 * inner, a.hidden, 2}", "2 * inner, a.hidden, 1}"),
    ],
    ("csrc/cpu/widen.cpp", "test_experts"): [
        ("std::fill_n(gate, kSums, 0.f);", ""),
        ("std::fill(sums.begin(), sums.end(), 0.f);", ""),
        ("slots.token[slot] * rows, slots.scale[slot]}", "slots.token[slot] * rows, 1.f}"),
        ("group.intermediate + task.row, group.intermediate + end", "task.row, end"),
        ("std::fill_n(out, tokens * rows, 0.f);", ""),
    ],
    ("csrc/cpu/widen.cpp", "test_quantized"): [
        ("most / 127 == 0 ? 1.f : most / 127", "most / 127"),
        ("finite ? (most", "true ? (most"),
        ("rounded.data && group.w13.weight.format == Format::int8 ? rounded : x", "rounded.data ? rounded : x"),
        ("i < group.count && group.w2.weight.format == Format::int8", "i < group.count"),
        ("unpack = unpack || group.w13.quantized() || group.w2.quantized()", "unpack = group.w13.quantized()"),
        ("std::nearbyint(row[i] / scale)", "std::trunc(row[i] / scale)"),
    ],
    ("csrc/cpu/matrix.h", "test_quantized"): [
        ("r / half * blocks + r % half / kScaleGroup", "r / kScaleGroup"),
        ("at = r * groups() + group;", "at = group * rows + r;"),
        ("* (weight.scale_bf16 ? 2 : 4)", "* 4"),
        ("e = exponent ? exponent : 1; e < 10", "e = exponent; e < 10"),
        ("(depth + kScaleGroup - 1) / kScaleGroup; }", "depth / kScaleGroup; }"),
        ("return halves * ((rows / halves + kScaleGroup - 1)", "return ((rows + kScaleGroup - 1)"),
    ],
    ("csrc/cpu/matrix.cpp", "test_quantized"): [
        ("bytes[k] & 128 ? -kFp8.value[bytes[k] & 127] : kFp8.value[bytes[k]]", "kFp8.value[bytes[k] & 127]"),
        (">> k % 2 * 4 & 15) - 8", ">> k % 2 * 4 & 15) - 7"),
        ("(bytes[k / 2] >> k % 2 * 4", "(bytes[k / 2] >> (k + 1) % 2 * 4"),
        ("magnitude >= 0x7c00 ? 0x7f800000 : 0", "0"),
        ("static_cast<uint32_t>(bits & 0x8000) << 16", "0"),
        ("value *= 0x1p112f;", "value *= 0x1p111f;"),
    ],
    ("csrc/cpu/elementwise.h", "test_experts"): [
        ("x < -87.f ? Eight{} - 87.f", "x < -30.f ? Eight{} - 30.f"),
        ("magnitude > 0x7f800000 ? EightBits{} + 0x7fc0 : rounded", "rounded"),
        ("0x7fff + ((bits >> 16) & 1)", "0x8000"),
        ("magnitude >= 0x477ff000", "magnitude > 0x477ff000"),
        ("magnitude < 0x38800000 ? subnormal : half", "half"),
        ("(exp(-gate) + 1.f) * up", "(exp(-gate) + 1.f)"),
    ],
    ("csrc/select.h", "test_select_host"): [
        ("dev::bits(value + 0.0f)", "dev::bits(value)"),
        ("if (wide == top) return 1.0;", ""),
        ("is_nan(logit) || is_nan(r) ? kNever : r", "is_nan(logit) ? kNever : r"),
        ("if (keys[i] > best) {", "if (keys[i] >= best) {"),
        ("count ? routing.union_k : routing.top_k", "routing.top_k"),
        ("r > best ? best : r > second ? r : second", "r > second ? r : second"),
        ("second > kNever ? best + second : kNever", "best + second"),
        ("routing.norm_topk_prob ? s / norm : s", "s / norm"),
        ("value > votes[i] ? value : votes[i]", "value"),
        ("is_nan(logits[e]) ? 0 : order_key(logits[e])", "order_key(logits[e])"),
        ("position == i * 32 + dev::lane()) keys[i] = 0;", "dev::lane() == position % 32) keys[i] = 0;"),
    ],
    ("csrc/cuda/router_kernel.h", "test_select_host"): [
        ("if (value != value) b |= 0x00400000u;", ""),
        ("if (p + q > 2) continue;", "if (p + q > 0) continue;"),
        ("dev::popcount(word & (bit - 1))", "dev::popcount(word & bit)"),
        ("key[other] > mine - (other < e)", "key[other] > mine"),
        ("(v.word[1] >= mine)", "(v.word[1] > mine)"),
        ("if (lane >= by) upto += other;", "upto += other;"),
        ("if (lane == 0) lower = 0;", ""),
        ("limit < routing.max_experts ? limit : routing.max_experts", "limit"),
        ("dev::ballot(in && e < experts)", "dev::ballot(in)"),
        ("if (id >= 0 && id < experts)", "if (id >= 0)"),
        ("row + block_size < a.seq_len ? row + block_size : a.seq_len", "row + block_size"),
        ("1u << (e & 31)) - 1));", "2u << (e & 31)) - 1));"),
    ],
    ("csrc/cuda/experts_kernel.h", "test_experts_host"): [
        ("weight == 0 ? 0.0f : gate", "gate"),
        ("weight += a.topk_weights[", "weight = a.topk_weights["),
        ("tile.member < 0 ? 1.0f : 0.0f", "tile.member < 0 ? 0.5f : 0.0f"),
        ("gate / (1.0f + expf(-gate)) * up", "up / (1.0f + expf(-up)) * gate"),
        ("total += part[i][s].v[c]", "total = part[i][s].v[c]"),
        ("static_cast<uint32_t>(p.up_tiles)", "static_cast<uint32_t>(p.up_tiles - 1)"),
        ("before + 1 == static_cast<uint32_t>(p.n_splits)", "true"),
        ("(r % 16 < 8 ? 0 : up_rows)", "(r % 16 < 8 ? up_rows : 0)"),
        ("static_cast<int>(all * (split + 1) / p.n_splits) - first", "static_cast<int>(all / p.n_splits)"),
        (
            "const int64_t inner = tile.member < 0 ? p.shared_inner : p.inner;\n    const char* base",
            ("const int64_t inner = p.inner;\n    const char* base"),
        ),
        ("round16<kHalf>(total)", "round16<false>(total)"),
    ],
    ("triton_kernels/router.py", "test_triton_router"): [
        ("value = tl.where(value == 0, 0.0, value)", "value = value"),
        ("return tl.where(score == score, score, 0.0), selection, keys", "return score, selection, keys"),
        ('UNION_K if AGGREGATE == "union" else K)', "K)"),
        ("return real & (value > 0)", "return real & (value >= 0)"),
        ("tl.float32) <= top_p", "tl.float32) < top_p"),
        (
            "tl.minimum(tl.maximum(size, MIN_EXPERTS), MAX_EXPERTS)",
            "tl.maximum(tl.minimum(size, MAX_EXPERTS), MIN_EXPERTS)",
        ),
        ("tl.where(other_key >= keys[:, None]", "tl.where(other_key > keys[:, None]"),
        ("tl.where(second > NONE, value_of(first)", "tl.where(first > NONE, value_of(first)"),
        ("outside = tl.where(kept, NONE, candidates)", "outside = candidates"),
        ('tl.where(infinite, tl.where(wide == top, 0.0, -float("inf")), wide - top)', "wide - top"),
    ],
    ("triton_kernels/schedule.py", "test_triton_experts"): [
        ("& 0x3F)", "& 0x1F)"),
        ("popcount(bits & ((one << bit) - 1))", "popcount(bits & (one << bit))"),
        ("tl.minimum(begin + (i + 1) * TILE, begin + total)", "begin + (i + 1) * TILE"),
        ("mask=real, other=-1) >= 0)", "mask=real, other=-1) > 0)"),
        ("mask=inside & (j < slot % K)", "mask=inside & (j <= slot % K)"),
    ],
    ("triton_kernels/experts.py", "test_triton_experts"): [
        ("return tl.where(weight != 0, hidden * weight, 0.0)", "return hidden * weight"),
        ("return gate / (1.0 + tl.exp(-gate)) * up", "return up / (1.0 + tl.exp(-up)) * gate"),
        ("tl.sum(tl.where(ids == expert, weights, 0.0), 1)", "tl.max(tl.where(ids == expert, weights, 0.0), 1)"),
        ("+ (1 if HAS_SHARED else 0)", "+ 0"),
        ("if tl.max(position, 0) < 0:", "if tl.max(position, 0) <= 0:"),
        ("w2 = tl.where(member == 0, shared_w2_ptr, w2)", "w2 = w2"),
    ],
    ("triton_kernels/gradient.py", "test_triton_experts"): [
        (
            "weight = tl.sum(tl.where(ids == expert, weights, 0.0), 1)",
            "weight = tl.max(tl.where(ids == expert, weights, 0.0), 1)",
        ),
        ("sigmoid * (1.0 + gate * (1.0 - sigmoid))", "sigmoid * (1.0 + gate)"),
        ("rounded(hidden * weight, dtype)", "rounded(hidden, dtype)"),
        ("tl.maximum(position, tl.load(position_ptr + token * K + j))", "tl.load(position_ptr + token * K + j)"),
        ("mask=h < tl.where(row >= 0, H, 0)", "mask=h < H"),
        (
            "tl.store(d_gate_up_ptr + at + I, rounded(d_hidden * silu, dtype)",
            "tl.store(d_gate_up_ptr + at + I, rounded(d_hidden * gate, dtype)",
        ),
    ],
}

# By module: a part of a survivor's name, as tools/mutate.py gives it, and why no test can tell it from the original.
EQUIVALENT: dict[str, dict[str, str]] = {
    "dmoe_ops/router.py": {
        "if logits.shape[0]: | 0 -> 1": "spares a GPU empty launches; the CPU's backends take no rows too",
        "ctx.mark_non_differentiable": "integers are never differentiable; it spares autograd the look",
        "ctx.n_inputs - 1 -> ctx.n_inputs + 1": "autograd drops a None beyond the inputs",
    },
    "dmoe_ops/experts.py": {
        "ctx.n_inputs - 5 -> ctx.n_inputs + 5": "autograd drops a None beyond the inputs",
    },
    "dmoe_ops/formats.py": {
        "(topk_ids >= experts), -1) | 1 -> 2": "no expert, as any id below 0",
    },
    "dmoe_ops/layer.py": {
        "ctx.mark_non_differentiable": "integers are never differentiable; it spares autograd the look",
        "if x.shape[0]: | 0 -> 1": "spares a GPU empty launches; the CPU's backends take no rows too",
        "'bias' -> 'biasX'": "nobody asks for that name: the bias has no gradient",
        "ones = topk_weights.new_ones(x.shape[0], 1) | 1 -> 2": "all entries are 1, and the first T are read",
        "ctx.n_inputs - 7 -> ctx.n_inputs + 7": "autograd drops a None beyond the inputs",
        '3 * ("weight",)': "zip ends with the three projections",
        "3 * (experts,)": "zip ends with the three projections",
        "return False | return False -> return": "None is as false",
        "dict(gate_proj=[intermediate, hidden], up_proj": "the sizes are those of gate_proj",
        "setattr(owner, name, own) | ": "for a weight that moves between kinds of devices; the tests have the CPU alone",
        "recurse=True): | True -> False": "a layer has no modules in it",
        "device='me": "the result is the same; memory peaks higher",
    },
    "dmoe_ops/models/decoding.py": {
        "-> torch.zeros(layers, blocks, self.num_experts + 1, device": (
            "ones and zeros sum up to the same counts in float32"
        ),
        "begin:end -> :end": "no mask is left in the blocks before the current one",
        "top_k < logits.shape[1] -> top_k <= logits.shape[1]": "the k most probable of k tokens are all of them",
        ">= share -> sure.sum(-1, keepdim=True) > share": "sure tokens are the most confident ones",
        "for router, _ in routed]).any() | -1 -> 1": "the largest of all are looked at, along whichever dimension",
        "for router, _ in routed]).any() | 1 -> 2": "the largest of all are looked at, along whichever dimension",
        "if top_p is not None and top_p < 1: |": "at 1 it could leave out only what vanishes in the rounding of a sum",
        "torch.multinomial(probability, 1, generator=generator) | 1 -> 2": "the first of two is the one that is drawn alone",
        "prompts = input_ids.masked_fill(padding, 0) | 0 -> 1": "any token will do: padding is not looked at",
    },
    "dmoe_ops/models/checkpoint.py": {
        "].append(name) | '.' -> '.X'": "joins a key that is looked at nowhere",
        "encoding='utf-8') -> (folder": "JSON is written in ASCII",
    },
    "dmoe_ops/reference.py": {
        "torch.tensor(routing.top_p, dtype=value.dtype, device=value.device) -> torch.tensor(routing.top_p, device": (
            "float32 is torch's default, and one number takes the dtype of what it is compared with"
        ),
        "order = topk_ids.flatten().argsort(stable=True) |": "any order within an expert adds up the same numbers",
        "zip(ends, counts[1:])) if count ->  for": "an expert without tokens multiplies empty matrices",
        "group_score = torch.full(grouped.shape[:2], -torch.inf, device=candidates.device) | -torch": (
            "groups of one expert all rank alike, whatever the number"
        ),
        "0.0, -torch.inf), wide) | 0.0 -> 1.0": "a softmax is the same for logits that are all larger by 1",
        "if routing.select == \"all\": | 'all' -> 'allX'": "spares the votes, which nothing looks at then",
        "quantize_activations: bool = False) -> torch.Tensor: | False -> True": "weights without a scale are never rounded",
    },
    "dmoe_ops/routing.py": {
        "dict(aggregate='topk_sum', select='top_n') -> dict(select='top_n')": "topk_sum is the default",
        "dict(aggregate='topk_sum', select='top_p') -> dict(select='top_p')": "topk_sum is the default",
        "dict(aggregate='topk_sum', select='top_p') -> dict(aggregate='topk_sum')": "top_p is the default",
    },
    "csrc/cpu/router.cpp": {
        "std::isnan(r) ? kOut": "a NaN is no candidate anyway: it is not above -inf",
        "std::isinf(top) ? 0.0": "exp of minus infinity is 0, and where the top is -inf every logit equals it",
    },
    "csrc/select.h": {
        "dev::bits(value + 0.0f) -> dev::bits(value)": "no score or vote is -0",
        "is_nan(r) ? kNever : r": "a NaN is no candidate anyway: it is not above -inf",
    },
}
