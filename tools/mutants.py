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
        "test_pooled",
        "test_decoder_ops",
        "test_unmasking_ops",
        "test_activation",
    ],
    "dmoe_ops/routing.py": ["test_routing", "test_router", "test_bad_input"],
    "dmoe_ops/router.py": ["test_router", "test_layer", "test_bad_input", "test_dispatch"],
    "dmoe_ops/experts.py": [
        "test_experts",
        "test_layer",
        "test_bad_input",
        "test_quantized",
        "test_expert_map",
        "test_activation",
    ],
    "dmoe_ops/layer.py": [
        "test_layer",
        "test_bad_input",
        "test_patch",
        "test_quantized",
        "test_quantized_checkpoints",
        "test_expert_map",
        "test_activation",
    ],
    "dmoe_ops/hf_block.py": ["test_layer", "test_bad_input", "test_patch", "test_activation"],
    "dmoe_ops/formats.py": [
        "test_quantized",
        "test_quantize",
        "test_quantized_checkpoints",
        "test_expert_map",
        "test_dispatch",
        "test_activation",
    ],
    "dmoe_ops/models/checkpoint.py": ["test_llada2", "test_sharing", "test_quantized_checkpoints"],
    "dmoe_ops/models/quantized.py": ["test_quantized_checkpoints"],
    "dmoe_ops/models/decoding.py": ["test_step", "test_llada2", "test_pooled"],
    "dmoe_ops/models/sampling.py": ["test_llada2"],
    "dmoe_ops/models/attention.py": ["test_step", "test_llada2"],
    "dmoe_ops/models/graphs.py": ["test_step"],
    "dmoe_ops/models/step.py": ["test_step", "test_llada2"],
    "dmoe_ops/models/config.py": ["test_llada2", "test_sharing", "test_quantized_checkpoints", "test_families"],
    "dmoe_ops/models/families.py": ["test_families"],
    "dmoe_ops/models/layers.py": ["test_llada2", "test_training"],
    "dmoe_ops/models/model.py": ["test_llada2", "test_training", "test_quantized_checkpoints"],
    "dmoe_ops/models/names.py": ["test_llada2", "test_quantized_checkpoints"],
    "dmoe_ops/models/llada2/config.py": ["test_llada2", "test_sharing", "test_quantized_checkpoints"],
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
    ("dmoe_ops/models/model.py", "test_llada2"): [
        ("norm(dim=0, keepdim=True)", "norm(dim=1, keepdim=True)"),
    ],
    ("dmoe_ops/reference.py", "test_llada2"): [
        ("sure = confidence > threshold", "sure = confidence >= threshold"),
    ],
    ("dmoe_ops/models/sampling.py", "test_llada2"): [
        ("(1, 0)) > top_p", "(1, 0)) >= top_p"),
    ],
    ("csrc/cpu/router.cpp", "test_router"): [
        ("value > values_[at - 1]", "value >= values_[at - 1]"),
        ("if (std::isnan(logits[e])) score[e] = 0;", ""),
        ("selection[e] = std::isnan(logits[e]) ? kOut :", "selection[e] ="),
        ("logit == top ? 1.0 : std::exp(logit - top)", "std::exp(logit - top)"),
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
        ("return value[a] > value[b];", "return value[a] >= value[b];"),
    ],
    ("csrc/cpu/experts.cpp", "test_experts"): [
        ("slots.token[slot] = i / a.top_k;", "slots.token[slot] = i % a.tokens;"),
        ("slots.scale[slot] = a.topk_weights[i];", "slots.scale[slot] = 1.f;"),
        ("if (args.tokens == 0) return;", "return;"),
    ],
    ("csrc/cpu/experts.cpp", "test_layer"): [
        ("slots.scale.resize(routed + shared, 1.f);", "slots.scale.resize(routed + shared, 0.f);"),
    ],
    ("csrc/cpu/experts.cpp", "test_quantized"): [
        ("2 * inner, a.hidden, 2}", "2 * inner, a.hidden, 1}"),
    ],
    ("csrc/cpu/widen.cpp", "test_experts"): [
        ("std::fill_n(gate, kSums, 0.f);", ""),
        ("first_sums(a, t, first, count, sums.data() + t * rows);", ""),
        ("slots.token[slot] * rows, slots.scale[slot]}", "slots.token[slot] * rows, 1.f}"),
        ("group.intermediate + task.row, group.intermediate + end", "task.row, end"),
    ],
    ("csrc/cpu/widen.cpp", "test_layer"): [
        ("std::fill_n(out, tokens * rows, 0.f);", ""),
    ],
    ("csrc/cpu/widen.cpp", "test_quantized"): [
        ("most / 127 == 0 ? 1.f : most / 127", "most / 127"),
        ("rounded.data && group.w13.weight.format == Format::int8 ? rounded : x", "rounded.data ? rounded : x"),
        ("i < group.count && group.w2.weight.format == Format::int8", "i < group.count"),
        ("args.w13.format != Format::plain || args.shared_w13.format", "args.w13.format"),
        ("std::nearbyint(row[i] / scale)", "std::trunc(row[i] / scale)"),
    ],
    ("csrc/cpu/matrix.h", "test_quantized"): [
        ("r / half * blocks + r % half / kScaleGroup", "r / kScaleGroup"),
        ("return r * groups();", "return r;"),
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
    ("csrc/cpu/dot.cpp", "test_experts"): [
        ("first_sums(a, part.token + t, part.row, part.rows, sums.data() + t * kDownRows);", ";"),
        ("half * group.intermediate + task.row", "task.row"),
        ("if (begin == end) continue;", "if (begin + 1 == end) continue;"),
        ("if (first == end) continue;", "if (first + 1 == end) continue;"),
    ],
    ("csrc/cpu/dot.cpp", "test_quantized"): [
        ("a.quantize_activations ? Parts::int8 : Parts::int16", "Parts::int16"),
        ("std::copy_n(&rounding.sum[2 * token[t]], 2,", "std::copy_n(&rounding.sum[2 * token[t]], 1,"),
        ("routed_parts(parts_for(a.w13))", "routed_parts(parts_for(a.shared_w13))"),
    ],
    ("csrc/cpu/dot_avx512.cpp", "test_quantized"): [
        ("x += kMost * kLines * kStepBytes)", "x += kStepBytes)"),
        ("sums[t][p][r][0] -= 128 * block.x_sum[2 * (slot + t) + p];", ""),
        ("whole[r] * 256.f", "whole[r] * 255.f"),
        ("scale[r] * block.x_scale[slot + t]", "scale[r]"),
        ("x + (t * parts + p) * kStepBytes", "x + t * parts * kStepBytes"),
        ("block.n_tiles == 1 && matrix.depth % kScaleGroup == 0", "block.n_tiles == 1"),
    ],
    ("csrc/cpu/dot_amx.cpp", "test_amx"): [
        ("if (n_rows && bytes) rows[tile] = n_rows", "rows[tile] = n_rows"),
        ("set(2 * i + j, tile_rows[i], 4 * tile_columns[j])", "set(2 * i + j, tile_rows[j], 4 * tile_columns[i])"),
        ("set(6 + i, kStepBytes / 4, 4 * tile_columns[i])", "set(6 + i, kStepBytes / 4, kStepBytes)"),
        ("if (std::memcmp(&wanted, &shapes_, sizeof shapes_) == 0) return;", "if (shapes_.palette) return;"),
        ("~TileRegisters() { release_tiles(); }", "~TileRegisters() {}"),
        ("pass < 4; ++pass", "pass < 3; ++pass"),
        ("first < width; first += kMostTile", "first < 1; first += kMostTile"),
        (
            "std::memcpy(to + (i * width + first) * 4, &lines[i], 4 * count);",
            "std::memcpy(to + i * width * 4, &lines[i], 4 * count);",
        ),
        ("  zero_tile<0>();", ""),
        ("  if constexpr (column_tiles == 2) zero_tile<1>();", ""),
        ("  if constexpr (row_tiles == 2) zero_tile<2>();", ""),
        ("  if constexpr (row_tiles * column_tiles == 4) zero_tile<3>();", ""),
        ("lower = upper + kTileRows * weights.stride", "lower = upper + weights.stride"),
        ("load_tile<6>(left + k * 16 * left_stride, left_stride)", "load_tile<6>(left + k * kStepBytes, left_stride)"),
        (
            "load_tile<7>(right + k * 16 * right_stride, right_stride)",
            "load_tile<7>(right + k * 16 * left_stride, right_stride)",
        ),
        ("add_products<2, 5, 6, integers>", "add_products<2, 4, 6, integers>"),
        ("add_products<3, 5, 7, integers>", "add_products<3, 5, 6, integers>"),
        ("number(2 * t) * 256.f", "number(2 * t) * 255.f"),
        ("block.matrix->scale_at(block.row + row + r)", "block.matrix->scale_at(block.row + r)"),
        ("sum * (scale * block.x_scale[slot + t])", "sum * scale"),
        ("4 * part * width, width, 4 * width * kLines", "4 * part * width, width, 4 * width"),
        ("block.tiles[at] * bytes + 4 * part * width", "block.tiles[at] * bytes + 8 * part * width"),
        ("else if (tile + 1 < block.n_tiles)\n    columns", "else\n    columns"),
        ("side_by_side + j * columns[0].count", "side_by_side + j * kMostTile"),
        ("row + i * kTileRows, block.tiles[tile]", "row, block.tiles[tile]"),
        ("kTiles = 2 / lines_of(parts)", "kTiles = 2"),
        ("= {kMostTile, false,", "= {8, false,"),
    ],
    ("csrc/cpu/dot.cpp", "test_amx"): [
        ("slots.token[slot] % tiles.chunk", "slots.token[slot] % 256"),
        ("slots.token[slot] < (c + 1) * chunk", "slots.token[slot] <= (c + 1) * chunk"),
        ("format == Format::plain || format == Format::int8;", "format == Format::plain || format != Format::int8;"),
        ("constexpr int64_t kAmxTokens = 1;", "constexpr int64_t kAmxTokens = 20;"),
        ("kernels.resize(begin.size(), own);", "kernels.resize(begin.size(), &vectors);"),
        ("block.kernels = call.tiles.kernels[task.tile];", "block.kernels = call.tiles.kernels[0];"),
        ("block.kernels = tiles.kernels[first];", "block.kernels = tiles.kernels[0];"),
        ("call.tiles.kernels[task.tile + i]->hidden(", "call.kernels.hidden("),
    ],
    ("csrc/cpu/dot_body.h", "test_amx"): [
        ("store(to, load<Sums>(to) + ", "store(to, "),
        ("block.scale[slot] * sums", "sums"),
        ("(slot - block.tiles[0]) * block.out_stride", "slot * block.out_stride"),
    ],
    ("csrc/cpu/dot_body.h", "test_experts"): [
        ("store(to, load<Sums>(to) + ", "store(to, "),
        ("block.scale[slot] * sums", "sums"),
        ("if (whole == bytes) return;", "return;"),
        ("gate + kUpRows), activation);\n      store(line", "gate), activation);\n      store(line"),
        ("n - i < 8 ? n - i : 8;\n    Eight eight{};", "8;\n    Eight eight{};"),
    ],
    ("csrc/cpu/dot_body.h", "test_quantized"): [
        ("(value + 128) >> 8", "value >> 8"),
        ("largest / limit == 0 ? 1.f : largest / limit", "largest / limit"),
        ("value + 0x1.8p23f - 0x1.8p23f", "value"),
        ('*scale = __builtin_nanf("");', ""),
    ],
    ("csrc/cpu/decode_avx512.h", "test_quantized"): [
        ("_mm512_srli_epi16(words, 8)", "words"),
        ("look_up(table + 128), 0x6a)", "look_up(table + 128), 0xaa)"),
        ("matrix.scale_at(scales[r] + group)", "matrix.scale_at(scales[r])"),
        ("first != block.row && matrix.scales_of(first - 1) == scales", "first != block.row"),
        ("set(int64_t group) { decoder.table = tables + 256 * group; }", "set(int64_t) { decoder.table = tables; }"),
        ("(bit + 12) << 48 | (bit + 8) << 32", "(bit + 8) << 48 | (bit + 12) << 32"),
    ],
    ("csrc/cpu/elementwise.h", "test_experts"): [
        ("x = x < -87.f ? Eight{} - 87.f : x;", ""),
        ("magnitude > 0x7f800000 ? EightBits{} + 0x7fc0 : rounded", "rounded"),
        ("0x7fff + ((bits >> 16) & 1)", "0x8000"),
        ("half = magnitude >= 0x477ff000 ? EightBits{} + 0x7c00 : half;", ""),
        ("magnitude < 0x38800000 ? subnormal : half", "half"),
        ("(exp(-z) + 1.f) * up", "(exp(-z) + 1.f)"),
    ],
    ("csrc/cpu/elementwise.h", "test_activation"): [
        ("kGeluCubic * gate * gate", "kGeluCubic * gate"),
        ("activation == Activation::silu ? gate", "activation == Activation::gelu_tanh ? gate"),
    ],
    ("dmoe_ops/experts.py", "test_activation"): [
        ("topk_ids.clamp(-1, torch.iinfo(torch.int32).max).int()", "topk_ids.int()"),
    ],
    ("csrc/select.h", "test_select_host"): [
        ("return wide == top ? 1.0 : exp(wide - top);", "return exp(wide - top);"),
        ("return is_nan(score) ? 0.0f : score;", "return score;"),
        ("count ? routing.union_k : routing.top_k", "routing.top_k"),
        ("if (j >= count) continue;", "if (j > count) continue;"),
        ("keys[i] = order_key(second > kNever ? best + second : kNever)", "keys[i] = order_key(best + second)"),
        ("routing.norm_topk_prob ? s / norm : s", "s / norm"),
        ("r[i] > votes[i] ? r[i] : votes[i]", "r[i]"),
        ("is_nan(logits[e]) ? 0 : order_key(logits[e])", "order_key(logits[e])"),
        ("position == i * 32 + dev::lane()) keys[i] = 0;", "dev::lane() == position % 32) keys[i] = 0;"),
    ],
    ("csrc/cuda/router_layout.h", "test_select_host"): [
        ("{ return word & ((1u << bit) - 1); }", "{ return word & ((2u << bit) - 1); }"),
        ("row + block_size < a.seq_len ? row + block_size : a.seq_len", "row + block_size"),
    ],
    ("csrc/cuda/router_gate.h", "test_select_host"): [
        ("if (value != value) b |= 0x00400000u;", ""),
        ("if (p + q > 2) continue;", "if (p + q > 0) continue;"),
    ],
    ("csrc/cuda/router_coreset.h", "test_select_host"): [
        ("mine - (q < at / 4)", "mine"),
        ("i < at % 4 && own.word[i] == mine", "false"),
        ("if (lane >= by) upto += other;", "upto += other;"),
        ("if (lane == 0) lower = 0;", ""),
        ("static_cast<float>(lower + covered[i]) <= routing", "static_cast<float>(lower + covered[i]) < routing"),
        ("limit < routing.max_experts ? limit : routing.max_experts", "limit"),
        ("const uint32_t word = dev::ballot(in && e < p.experts);", "const uint32_t word = dev::ballot(in);"),
    ],
    ("csrc/cuda/router_schedule.h", "test_select_host"): [
        ("if (id >= 0 && id < experts && is_here", "if (id >= 0 && is_here"),
    ],
    ("csrc/cuda/experts_layout.h", "test_experts_host"): [
        ("(r % 16 < 8 ? 0 : up_rows)", "(r % 16 < 8 ? up_rows : 0)"),
        ("chunks = p.split_begin(split + 1) - first", "chunks = p.split_begin(1)"),
        ("(last + 1 - first) * up_tiles_of_member", "(last - first) * up_tiles_of_member"),
        ("if (end <= chunks_of_shared) return shared;", ""),
    ],
    ("csrc/cuda/experts_producer.h", "test_experts_host"): [
        ("static_cast<uint32_t>(p.awaited(split))", "static_cast<uint32_t>(p.awaited(split) - 1)"),
    ],
    ("csrc/cuda/experts_consumer.h", "test_experts_host"): [
        ("weight == 0 ? 0.0f : (kGelu", "(kGelu"),
        ("kGelu ? dev::gelu_tanh(gate)", "kGelu ? dev::silu(gate)"),
        ("weight += chosen_weights[", "weight = chosen_weights["),
        ("tile.member < 0 ? 1.0f : 0.0f", "tile.member < 0 ? 0.5f : 0.0f"),
        ("dev::silu(gate)) * up", "dev::silu(up)) * gate"),
        ("total += part[s].v[c]", "total = part[s].v[c]"),
        ("static_cast<uint32_t>(p.form.splits)) dev::pause", "static_cast<uint32_t>(p.form.splits - 1)) dev::pause"),
        ("all * (tile.split + 1) / pieces", "all * (tile.split + 1) / pieces - 1"),
        ("intermediate = tile.member < 0 ? p.shared_intermediate : p.intermediate;", "intermediate = p.intermediate;"),
        ("round16<kHalf>(total)", "round16<false>(total)"),
    ],
    ("triton_kernels/router.py", "test_triton_router"): [
        ("return bits ^ ((bits >> 31) & 0x7FFFFFFF)", "return bits"),
        ("return tl.where(score == score, score, 0.0), selection, keys", "return score, selection, keys"),
        ('UNION_K if AGGREGATE == "union" else K)', "K)"),
        ("return real & (value > 0)", "return real & (value >= 0)"),
        ("(covered <= top_p)", "(covered < top_p)"),
        (
            "tl.minimum(tl.maximum(size, MIN_EXPERTS), MAX_EXPERTS)",
            "tl.maximum(tl.minimum(size, MAX_EXPERTS), MIN_EXPERTS)",
        ),
        ("tl.cumsum(zero, 0) - 1", "tl.cumsum(zero, 0)"),
        ("tl.where(second > NONE, value_of(best)", "tl.where(best > NONE, value_of(best)"),
        ("outside = tl.where(kept, NONE, candidates)", "outside = candidates"),
        ("tl.where(wide == top, 0.0, wide - top)", "wide - top"),
        ("power = tl.where(real, ", "power = tl.where(wide == wide, "),
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
        ("return gate / (1.0 + tl.exp(-exponent(gate, ACTIVATION))) * up", "return up / (1.0 + tl.exp(-up)) * gate"),
        ("gate *= GELU_LINEAR + GELU_CUBIC * gate * gate", "gate *= GELU_LINEAR"),
        ("tl.sum(tl.where(ids == expert, weights, 0.0), 1)", "tl.max(tl.where(ids == expert, weights, 0.0), 1)"),
    ],
    ("triton_kernels/dense.py", "test_triton_experts"): [
        ("w2 = tl.where(member == 0, shared_w2_ptr, w2)", "w2 = w2"),
    ],
    ("triton_kernels/gradient.py", "test_triton_experts"): [
        (
            "weight = tl.sum(tl.where(ids == expert, weights, 0.0), 1)",
            "weight = tl.max(tl.where(ids == expert, weights, 0.0), 1)",
        ),
        ("sigmoid * (1.0 + gate * (1.0 - sigmoid))", "sigmoid * (1.0 + gate)"),
        ("activated * (1.0 - sigmoid) * slope", "activated * (1.0 - sigmoid)"),
        ("rounded(hidden * weight, dtype)", "rounded(hidden, dtype)"),
        ("tl.maximum(position, tl.load(position_ptr + token * K + j))", "tl.load(position_ptr + token * K + j)"),
        ("mask=h < tl.where(row >= 0, H, 0)", "mask=h < H"),
        (
            "tl.store(d_gate_up_ptr + at + I, rounded(d_hidden * activated, dtype)",
            "tl.store(d_gate_up_ptr + at + I, rounded(d_hidden * gate, dtype)",
        ),
    ],
}

# By module: a part of a survivor's name, as tools/mutate.py gives it, and why no test can tell it from the original. A part
# that ends with a line's end ends the name.
EQUIVALENT: dict[str, dict[str, str]] = {
    "dmoe_ops/router.py": {
        "if logits.shape[0]: | 0 -> 1": "spares a GPU empty launches; the CPU's backends take no rows too",
        "ctx.mark_non_differentiable": "integers are never differentiable; it spares autograd the look",
        "ctx.n_inputs - 1 -> ctx.n_inputs + 1": "autograd drops a None beyond the inputs",
    },
    "dmoe_ops/experts.py": {
        "ctx.n_inputs - 5 -> ctx.n_inputs + 5": "autograd drops a None beyond the inputs",
    },
    "dmoe_ops/layer.py": {
        "ctx.mark_non_differentiable": "integers are never differentiable; it spares autograd the look",
        "if x.shape[0]: | 0 -> 1": "spares a GPU empty launches; the CPU's backends take no rows too",
        "'bias' -> 'biasX'": "nobody asks for that name: the bias has no gradient",
        "ones = topk_weights.new_ones(x.shape[0], 1) | 1 -> 2": "all entries are 1, and the first T are read",
        "ctx.n_inputs - 7 -> ctx.n_inputs + 7": "autograd drops a None beyond the inputs",
        "recurse=True): | True -> False": "a layer has no modules in it",
        "shape[0], dtype=first.dtype)\n": "the result is the same; memory peaks higher",
    },
    "dmoe_ops/hf_block.py": {
        ".shape[0], at) | 3 -> 4\n": "zip ends with the three projections",
        "(slice(None),)) | 3 -> 4\n": "zip ends with the three projections",
        "return False | return False -> return": "None is as false",
        (
            "shapes = dict( | dict(gate_proj=[intermediate, hidden], up_proj=[intermediate, hidden], "
            "down_proj=[hidden, intermediate]) -> dict(up_proj"
        ): "the sizes are those of gate_proj",
        "setattr(owner, name, own) | ": "for a weight that moves between kinds of devices; the tests have the CPU alone",
    },
    "dmoe_ops/models/decoding.py": {
        "prompts = input_ids.masked_fill(padding, 0) | 0 -> 1": "any token will do: padding is not looked at",
        "PREFILL_TOKENS = 2048": "a bound of memory; a test sets others",
        "-> bar.set_postfix_str(str(said))": "how soon a bar shows it",
        "refresh=False) | False -> True": "how soon a bar shows it",
        "if not all(finite": "a step tells it of all rows together",
    },
    "dmoe_ops/models/step.py": {
        "num_experts + 1, dtype=torch.bool) -> ": "ones and zeros sum up to the same counts in any dtype",
        "logits.amax(-1).isfinite().all() # the largest of a row is NaN where the row holds one | -1 -> 1": (
            "the largest of all are looked at, along whichever dimension"
        ),
        "logits.amax(-1).isfinite().all() # the largest of a row is NaN where the row holds one | 1 -> 2": (
            "the largest of all are looked at, along whichever dimension"
        ),
        "if masks < masked.numel(): | masks < masked.numel() -> masks <= masked.numel()": "all positions, reordered",
        "stable=True) -> masked.flatten().sort(descending=True)": "masks in any order: what fills up is not looked at",
        "indices[:masks] | True -> False (2)": "masks in any order: what fills up is not looked at",
    },
    "csrc/cpu/decode_avx512.h": {
        "scales_of(first - 1) == scales -> ": "rows of a task, 32 or 64 of them, lie in one block of 128",
    },
    "csrc/cpu/dot_body.h": {
        "largest / limit == 0 ? 1.f": "spares a cast of NaN to an integer; a scale of 0 makes any integer 0",
        '*scale = __builtin_nanf("");': "the scale is infinite or NaN there, and times 0 that is NaN",
    },
    "dmoe_ops/models/sampling.py": {
        "top_k < logits.shape[1] -> top_k <= logits.shape[1]": "the k most probable of k tokens are all of them",
        "top_p < 1 -> top_p <= 1": "at 1 it could leave out only what vanishes in the rounding of a sum",
        "top_p < 1: | 1 -> 2": "at 1 it could leave out only what vanishes in the rounding of a sum",
        "nan_to_num(1.0), 1, generator=generator) | 1.0 -> 2.0": "what is drawn where a row is NaN ends the decode",
        "nan_to_num(1.0), 1, generator=generator) | 1 -> 2": "the first of two is the one that is drawn alone",
    },
    "dmoe_ops/models/checkpoint.py": {
        "].append(name) | '.' -> '.X'\n": "joins a key that is looked at nowhere",
        "encoding='utf-8') -> (folder": "JSON is written in ASCII",
    },
    "dmoe_ops/reference.py": {
        "dtype=torch.bool) -> topk_ids.new_zeros(layers, n, blocks, num_experts + 1)": "ones add up to the same",
        ">= share -> sure.sum(-1, keepdim=True) > share": "sure tokens are the most confident ones",
        "active | torch.zeros_like -> torch.ones_like": "an order names every position",
        "torch.tensor(routing.top_p, dtype=value.dtype, device=value.device) -> torch.tensor(routing.top_p, device": (
            "float32 is torch's default, and one number takes the dtype of what it is compared with"
        ),
        "order = topk_ids.flatten().argsort(stable=True) |": "any order within an expert adds up the same numbers",
        "zip(ends, counts[1:])) if count ->  for": "an expert without tokens multiplies empty matrices",
        "group_score = torch.full(grouped.shape[:2], -torch.inf, device=candidates.device) | -torch": (
            "groups of one expert all rank alike, whatever the number"
        ),
        "0.0, -torch.inf), wide) | 0.0 -> 1.0": "a softmax is the same for logits that are all larger by 1",
        "if routing.select == \"all\": | 'all' -> 'allX'\n": "spares the votes, which nothing looks at then",
        "cos.shape[-1]], dim=-1) | -1 -> 1\n": "cos has two dimensions",
        "cos.shape[-1]], dim=-1) | -1 -> 1 (3)": "cos has two dimensions",
        "activation: str = 'silu') -> torch.Tensor: | False -> True": "weights without a scale are never rounded",
    },
    "dmoe_ops/routing.py": {
        "dict(aggregate='topk_sum', select='top_n') -> dict(select='top_n')": "topk_sum is the default",
        "dict(aggregate='topk_sum', select='top_p') -> dict(select='top_p')": "topk_sum is the default",
        "dict(aggregate='topk_sum', select='top_p') -> dict(aggregate='topk_sum')": "top_p is the default",
    },
}
