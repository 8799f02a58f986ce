"""The backend "triton": chooses a form, allocates the workspaces, launches. What `_backends` describes of a backend."""

from __future__ import annotations

import functools

import torch
import triton

from .._call import LayerCall
from ..formats import ExpertWeights
from . import attention, decoder, dense, gathered, gradient, launch, router, schedule, tiles, unmasking
from .weights import stored

DENSE_TOKENS = 64  # up to so many, `moe_experts` takes the dense form; not measured
MAX_DENSE_BLOCK = 128


def form_of(n_blocks: int, routing, dense_blocks: int) -> str:
    """Which form serves a layer call, from what the host knows without asking the device.

    The dense form reads the experts of every block for themselves; the gathered one reads each expert once per 32 to 128
    of its tokens, but writes and adds up a row per slot, in one launch more. Two coresets hardly overlap where they are
    independent (15 of 256 experts each: 30 reads against 29), so dense saves the rest of the work; where they are the same,
    every further block costs as much as the first. Token routing has no coreset: there a second block reads most experts
    again, and so it does where tokens choose in a pool of blocks. `dense_blocks` is the GPU's entry in the tile table.
    """
    if routing.block_size > MAX_DENSE_BLOCK:
        return "gathered"
    alike = routing.select == "all" or routing.choose == "pool"
    return "dense" if n_blocks <= (1 if alike else dense_blocks) else "gathered"


def least_experts(routing) -> int:
    """How many experts a layer call may use at the fewest, roughly: those of one coreset."""
    if routing.select == "all":
        return routing.num_experts
    return min(routing.num_experts, routing.capacity or max(routing.min_experts, routing.top_k))


def tile_tokens(n_tokens: int, top_k: int, n_experts: int) -> int:
    """Tokens per tile of the gathered form: twice what each of n_experts gets on average. Rather too many than too few:
    memory takes longer to bring an expert's weights than matrix units take for 128 tokens, many of which may be missing;
    but tokens that need a second tile pass all the weights through the L2 once more."""
    return min(128, max(32, triton.next_power_of_2(2 * n_tokens * top_k // n_experts)))


@functools.lru_cache(maxsize=64)
def has_pdl(device: torch.device) -> bool:
    """Programmatic dependent launch: NVIDIA, compute capability 9.0 and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


@functools.lru_cache(maxsize=64)
def has_fp8(device: torch.device) -> bool:
    """Conversions of float8_e4m3fn: NVIDIA, compute capability 8.9 and later. Those of AMD's gfx942 are of another e4m3."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def plan_of(call: LayerCall) -> schedule.Dense | schedule.Gathered:
    """Where `_route` writes the schedule of a layer call."""
    x, routing, n_blocks = call.x, call.routing, call.routed.coreset_sizes.shape[0]
    table = tiles.for_device(x.device)
    if form_of(n_blocks, routing, table.dense_blocks) == "dense":
        width = min(routing.num_experts, call.routed.coreset_ids.shape[1], routing.block_size * routing.top_k)
        return schedule.Dense.empty(n_blocks, width, x.device)
    words = n_blocks * router.route_constants(routing, table.route, call.routed.coreset_ids.shape[1])["N_WORDS"]
    tile = tile_tokens(x.shape[0], routing.top_k, least_experts(routing))
    return schedule.Gathered.empty(x.shape[0], routing.num_experts, routing.top_k, words, tile, x.device)


def _route(call: LayerCall, plan) -> None:
    """Gate and route. Experts that the map of the weights says are elsewhere stay out of the plan."""
    x, routing = call.x, call.routing
    table, pdl = tiles.for_device(x.device), has_pdl(x.device)
    score = torch.empty_like(call.router_logits) if routing.score == "sigmoid" else None
    gate_tile = table.gate_for(x.shape[0], x.dtype, call.gate_weight.dtype)
    router.gate(x, call.gate_weight, call.router_logits, score, plan.done, gate_tile, pdl)
    router.route(
        call.router_logits,
        score,
        call.expert_bias,
        call.block_offsets,
        call.seq_len,
        routing,
        call.routed,
        plan,
        table.route,
        call.weights.expert_map,
        pdl,
        call.domain_offsets,
        call.coreset_ids,
    )


def _experts(call: LayerCall, plan, waves=None) -> None:
    """Up and down; in the gathered form combine, and where there are waves their rows one after the other before it."""
    x, routed, block_size = call.x, call.routed, call.routing.block_size
    weights = stored(call.weights, has_fp8(x.device))
    table, pdl = tiles.for_device(x.device), has_pdl(x.device)
    chosen = routed.topk_ids, routed.topk_weights
    if plan.form == "dense":
        buffers = dense.buffers(x, weights, plan, block_size, table)
        blocks = call.block_offsets, call.seq_len, block_size
        dense.experts(x, weights, *chosen, *blocks, plan, buffers, call.y, table, pdl)
        return
    h, rows = gathered.buffers(x, weights, call.routing.top_k)
    for wave in (None,) if waves is None else waves:
        gathered.experts(x, weights, *chosen, plan, h, rows, call.y, table, pdl, wave)


@launch.repeated
def _whole(*call) -> None:
    call = LayerCall(*call)
    with launch.on(call.x.device):
        plan = plan_of(call)
        _route(call, plan)
        _experts(call, plan)


@launch.repeated
def _first_half(plan, *call) -> None:
    call = LayerCall(*call)
    with launch.on(call.x.device):
        _route(call, plan)


@launch.repeated
def _second_half(plan, *call) -> None:
    call = LayerCall(*call)
    with launch.on(call.x.device):
        _experts(call, plan)


class Triton:
    """triton_kernels."""

    @staticmethod
    @launch.repeated
    def block_route(logits, expert_bias, block_offsets, seq_len, routing, out, *shared) -> None:
        with launch.on(logits.device):
            tile = tiles.for_device(logits.device).route
            inputs = logits, None, expert_bias, block_offsets
            router.route(*inputs, seq_len, routing, out, None, tile, None, False, *shared)

    @staticmethod
    @launch.repeated
    def moe_experts(x, weights: ExpertWeights, topk_ids, topk_weights, y) -> None:
        """Without blocks the schedule takes one launch of its own before the two (dense), or two (gathered)."""
        n_tokens, top_k = topk_ids.shape
        expert_map, n_experts = weights.expert_map, weights.experts
        with launch.on(x.device):
            weights = stored(weights, has_fp8(x.device))
            table, pdl = tiles.for_device(x.device), has_pdl(x.device)
            if n_tokens <= DENSE_TOKENS:
                chunk = max(16, triton.next_power_of_2(n_tokens))  # few different ones: kernels are compiled for each
                plan = schedule.Dense.empty(1, min(n_experts, chunk * top_k), x.device)
                schedule.mark(topk_ids, n_experts, chunk, plan, expert_map)
                buffers = dense.buffers(x, weights, plan, chunk, table)
                dense.experts(x, weights, topk_ids, topk_weights, None, n_tokens, chunk, plan, buffers, y, table, pdl)
            else:
                words = -(-n_tokens // schedule.MAX_WORD)
                # Routed by blocks or not, nobody said: a quarter of the experts lies between.
                tile = tile_tokens(n_tokens, top_k, max(1, n_experts // 4))
                plan = schedule.Gathered.empty(n_tokens, n_experts, top_k, words, tile, x.device)
                schedule.mark(topk_ids, n_experts, schedule.MAX_WORD, plan, expert_map)
                schedule.order_all(topk_ids, n_experts, plan, pdl)
                h, rows = gathered.buffers(x, weights, top_k)
                gathered.experts(x, weights, topk_ids, topk_weights, plan, h, rows, y, table, pdl)

    @staticmethod
    @launch.repeated
    def moe_experts_backward(d_y, x, weights: ExpertWeights, topk_ids, topk_weights, out) -> None:
        n_tokens, top_k = topk_ids.shape
        n_experts = weights.w13.shape[0]
        tile = min(gradient.most_positions(x.dtype), tile_tokens(n_tokens, top_k, n_experts))
        words = -(-n_tokens // schedule.MAX_WORD)
        with launch.on(x.device):
            plan = schedule.Gathered.empty(n_tokens, n_experts, top_k, words, tile, x.device)
            schedule.mark(topk_ids, n_experts, schedule.MAX_WORD, plan, None)
            schedule.order_all(topk_ids, n_experts, plan, has_pdl(x.device))
            weights = stored(weights, has_fp8(x.device))
            buffers = gradient.gradient_buffers(x, weights.intermediate, n_tokens * top_k)
            gradient.experts_gradient(d_y, x, weights, topk_ids, topk_weights, plan, buffers, out)

    @staticmethod
    def block_moe(call: LayerCall) -> None:
        """Four launches: gate, route, up, down; in the gathered form a fifth that combines."""
        _whole(*call)

    @staticmethod
    def route(call: LayerCall):
        """The first two launches of `block_moe`, with all experts in the plan, wherever they are; see `_backends`."""
        with launch.on(call.x.device):
            plan = plan_of(call)
        call = call._replace(weights=call.weights._replace(expert_map=None))
        _first_half(plan, *call)

        def rest(x, weights, y, waves=None) -> None:
            placed = call._replace(x=x, weights=weights, y=y)
            if waves is None:
                _second_half(plan, *placed)
            elif plan.form == "dense":
                raise ValueError(
                    "waves must be None: the dense form, of few tokens, needs all experts of a call at once"
                )
            else:
                with launch.on(x.device):
                    _experts(placed, plan, waves)

        return rest

    @staticmethod
    @launch.repeated
    def add_rms_norm(x, *args) -> None:
        with launch.on(x.device):
            decoder.add_rms_norm(x, *args, has_pdl(x.device))

    @staticmethod
    @launch.repeated
    def qk_norm_rope(qkv, *args) -> None:
        with launch.on(qkv.device):
            decoder.qk_norm_rope(qkv, *args, has_pdl(qkv.device))

    @staticmethod
    @launch.repeated
    def block_attention(query, *args) -> None:
        with launch.on(query.device):
            attention.block_attention(query, *args, has_pdl(query.device))

    @staticmethod
    @launch.repeated
    def greedy(logits, *args) -> None:
        with launch.on(logits.device):
            decoder.greedy(logits, *args, has_pdl(logits.device))

    @staticmethod
    @launch.repeated
    def count_step(topk_ids, *args) -> None:
        with launch.on(topk_ids.device):
            unmasking.count_step(topk_ids, *args, has_pdl(topk_ids.device))

    @staticmethod
    @launch.repeated
    def unmask(tokens, *args) -> None:
        with launch.on(tokens.device):
            unmasking.unmask(tokens, *args, has_pdl(tokens.device))
