"""dmoe::block_moe, the whole MoE layer as one op, and BlockMoE, the module that holds its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import _backends, _checks, _library, hf_block, router
from ._call import LayerCall
from .formats import FORMATS, MATRICES, QUANTIZED, ExpertWeights, check_columns, empty
from .quantize import check_form, quantize
from .routing import BlockRouting, RoutingResult


def block_moe(
    x: Tensor,
    gate_weight: Tensor,
    expert_bias: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    shared_w13: Tensor | None,
    shared_w2: Tensor | None,
    *,
    routing: BlockRouting,
    block_offsets: Tensor | None = None,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    shared_w13_scale: Tensor | None = None,
    shared_w2_scale: Tensor | None = None,
    activations: Literal["int8"] | None = None,
    expert_map: Tensor | None = None,
    activation: Literal["silu", "gelu_tanh"] = "silu",
    domain_offsets: Tensor | None = None,
    coreset_ids: Tensor | None = None,
) -> tuple[Tensor, RoutingResult, Tensor]:
    """The whole MoE layer as one op: router logits, block routing, the routed experts and the shared expert.

    Args:
        x: [T, H] or [bsz, seq, H]; its dtypes, and those of the weights, are those of `moe_experts`.
        gate_weight: [E, H], any float dtype; the router logits are computed in float32.
        expert_bias, routing, block_offsets, domain_offsets, coreset_ids: see `block_route`.
        w13, w2, w13_scale, w2_scale, activations: see `moe_experts`.
        shared_w13: [2I_shared, H] and shared_w2: [H, I_shared], of an expert that takes every token with weight 1; both None
            for a layer without one. Plain in the dtype of x, or quantised like w13 with shared_w13_scale, shared_w2_scale.
        expert_map: see `moe_experts`; int32 [E]. Tokens are routed over all E experts, and y is the part of those that are
            here. The shared expert is added whole.
        activation: see `moe_experts`; of the shared expert too.

    Returns:
        (y in the shape and dtype of x, `RoutingResult`, router_logits float32 [T, E]). y is rounded once, after the shared
        expert. Differentiable once, with respect to x, gate_weight and weights that are not quantised.

    Raises:
        ValueError: a wrong argument. The message names it and its value.

    `dmoe_ops.reference.block_moe` is the contract.
    """
    _checks.routing(routing)
    _checks.activations(activations, w13)
    _checks.activation(activation)
    scales = (w13_scale, w2_scale, shared_w13_scale, shared_w2_scale)
    weights = ExpertWeights(w13, w2, shared_w13, shared_w2, *scales, activations is not None, expert_map, activation)
    arguments = (x, gate_weight, expert_bias, weights, block_offsets)
    shared = domain_offsets, coreset_ids
    if _library.nobody_listens(x, gate_weight, expert_bias, block_offsets, *shared, *weights.tensors()):
        _checks.once(_checks.layer_call, *arguments, routing)
        rows = x.reshape(-1, x.shape[-1])
        y, *routed, router_logits = block_moe_run(rows, *arguments[1:], x.shape[-2], routing, *shared)
    else:
        _checks.layer_arguments(*arguments, domain_offsets=domain_offsets, coreset_ids=coreset_ids)
        rows = x.reshape(-1, x.shape[-1])
        plain = (gate_weight, expert_bias, w13, w2, shared_w13, shared_w2, block_offsets, x.shape[-2])
        rest = (*scales, activations is not None, expert_map, activation, *routing.pool_args(), *shared)
        y, *routed, router_logits = torch.ops.dmoe.block_moe(rows, *plain, *routing.args(), *rest)
    return y.view(x.shape), router.routing_result(routed), router_logits


class Routed(NamedTuple):
    """What `route` returns: the experts that tokens chose, router_logits float32 [T, E], and the other half of the layer."""

    result: RoutingResult
    router_logits: torch.Tensor
    experts: Callable | None  # None without tokens


@torch.no_grad()
def route(
    x,
    gate_weight,
    expert_bias,
    weights: ExpertWeights,
    *,
    routing: BlockRouting,
    block_offsets=None,
    domain_offsets=None,
    coreset_ids=None,
) -> Routed:
    """The first half of `block_moe`, for a caller that brings experts to memory between the two: arguments and errors as
    there, without gradients. Of `weights` no value is looked at, of the map neither."""
    _checks.routing(routing)
    _checks.once(_checks.layer_call, x, gate_weight, expert_bias, weights, block_offsets, routing)
    rows, seq_len, shared = x.reshape(-1, x.shape[-1]), x.shape[-2], (domain_offsets, coreset_ids)
    _, *routed, router_logits = allocate_layer(rows, block_offsets, seq_len, routing, *shared)
    _checks.block_offset_values(block_offsets, rows.shape[0], routing.block_size)
    result, rest = router.routing_result(routed), None
    shared = router.sharing_for_kernels(routing, *shared, result)
    if rows.shape[0]:
        rows, gate, bias, offsets = _library.contiguous(rows, gate_weight, expert_bias, block_offsets)
        outputs = None, result, router_logits
        call = LayerCall(rows, gate, bias, weights, offsets, seq_len, routing, *outputs, *shared)
        rest = _backends.backend(x).route(call)
    return Routed(result, router_logits, rest)


@torch.no_grad()
def experts(x, weights: ExpertWeights, routed: Routed, waves=None) -> torch.Tensor:
    """The second half: y like x, with the bits of `block_moe`. Whatever tokens chose has its row in weights.expert_map now.

    waves: ranges (begin, end) of the model's experts that adjoin from 0 to E, for weights that hold too few at a time. It is
    advanced lazily: what tokens chose of a range has its row when the range is drawn, and until the next one is.

    Raises ValueError for waves that do not adjoin, and where a GPU's kernels need all experts at once.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty_like(rows)
    _checks.expert_map_values(weights)
    if routed.experts is not None:
        routed.experts(rows, weights, y, None if waves is None else _adjoining(waves, weights.experts))
    return y.view(x.shape)


def _adjoining(waves, n_experts: int):
    done = 0
    for begin, end in waves:
        if begin != done or not begin < end <= n_experts:
            raise ValueError(f"waves must adjoin from 0 to {n_experts}, got {begin} to {end} behind {done}")
        yield begin, end
        done = end
    if done != n_experts:
        raise ValueError(f"waves must adjoin from 0 to {n_experts}, got {done} for the end")


N_EXPERTS = _library.N_ROUTING + len(ExpertWeights._fields) - 4  # of the op's arguments behind seq_len, all but SHARING


def op_settings(experts: tuple, rest: tuple) -> tuple:
    """From the op's arguments w13 to shared_w2, and those behind seq_len, where torch leaves out trailing defaults:
    (weights, routing, domain_offsets, coreset_ids)."""
    routing, weights = rest[: _library.N_ROUTING], rest[_library.N_ROUTING : N_EXPERTS]
    pool_args, *shared = _library.unpack_sharing(rest[N_EXPERTS:])
    return ExpertWeights(*experts, *weights), _library.unpack_routing(routing, pool_args), *shared


def allocate_layer(
    x: Tensor,
    block_offsets: Tensor | None,
    seq_len: int,
    routing: BlockRouting,
    domain_offsets: Tensor | None = None,
    coreset_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The op's outputs, empty."""
    logits_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    routed = router.allocate_routing(x.shape[0], seq_len, block_offsets, routing, x, domain_offsets, coreset_ids)
    router_logits = x.new_empty((x.shape[0], routing.num_experts), dtype=logits_dtype)
    return x.new_empty(x.shape), *router.route_outputs(routed), router_logits


def block_moe_fake(x, gate_weight, expert_bias, w13, w2, shared_w13, shared_w2, block_offsets, seq_len, *rest):
    weights, routing, *shared = op_settings((w13, w2, shared_w13, shared_w2), rest)
    _checks.layer(x, gate_weight, expert_bias, weights, block_offsets, routing)
    router.check_seq_len(seq_len, x.shape[0])
    return allocate_layer(x, block_offsets, seq_len, routing, *shared)


def block_moe_impl(x, gate_weight, expert_bias, w13, w2, shared_w13, shared_w2, block_offsets, seq_len, *rest):
    weights, routing, *shared = op_settings((w13, w2, shared_w13, shared_w2), rest)
    _checks.once(_checks.layer, x, gate_weight, expert_bias, weights, block_offsets, routing)
    router.check_seq_len(seq_len, x.shape[0])
    return block_moe_run(x, gate_weight, expert_bias, weights, block_offsets, seq_len, routing, *shared)


def block_moe_run(
    x: Tensor,
    gate_weight: Tensor,
    expert_bias: Tensor | None,
    weights: ExpertWeights,
    block_offsets: Tensor | None,
    seq_len: int,
    routing: BlockRouting,
    domain_offsets: Tensor | None,
    coreset_ids: Tensor | None,
) -> tuple[Tensor, ...]:
    """The op, once its arguments are checked but for the values that only the CPU may look at."""
    out = allocate_layer(x, block_offsets, seq_len, routing, domain_offsets, coreset_ids)
    _checks.block_offset_values(block_offsets, x.shape[0], routing.block_size)
    _checks.expert_map_values(weights)
    y, *routed, router_logits = out
    result = router.routing_result(routed)
    shared = router.sharing_for_kernels(routing, domain_offsets, coreset_ids, result)
    if x.shape[0]:
        x, gate_weight, expert_bias, block_offsets = _library.contiguous(x, gate_weight, expert_bias, block_offsets)
        inputs = (x, gate_weight, expert_bias, weights, block_offsets)
        call = LayerCall(*inputs, seq_len, routing, y, result, router_logits, *shared)
        _backends.backend(x).block_moe(call)
    return out


def block_moe_setup_context(ctx, inputs, output):
    x, gate_weight = inputs[:2]
    weights, ctx.routing, *_ = op_settings(inputs[3:7], inputs[9:])
    _checks.differentiable(weights, x=x, gate_weight=gate_weight)
    ctx.n_inputs, ctx.activation = len(inputs), weights.activation
    _, topk_weights, topk_ids, coreset_ids, coreset_sizes, router_logits = output
    ctx.mark_non_differentiable(topk_ids, coreset_ids, coreset_sizes)
    tensors = weights._replace(quantize_activations=None, activation=None)  # no tensors
    ctx.save_for_backward(x, gate_weight, topk_ids, topk_weights.detach(), router_logits.detach(), *tensors)


@_library.once_differentiable
def block_moe_backward(ctx, d_y, d_topk_weights, _ids, _coreset_ids, _coreset_sizes, d_router_logits):
    x, gate_weight, topk_ids, topk_weights, router_logits, *weights = ctx.saved_tensors
    weights = ExpertWeights(*weights)
    needs = dict(zip(("x", "gate_weight", "bias", "w13", "w2", "shared_w13", "shared_w2"), ctx.needs_input_grad))
    expert_gradient = torch.ops.dmoe._moe_experts_backward

    of_weights, scales = needs["w13"] or needs["w2"], (weights.w13_scale, weights.w2_scale)
    d_x, d_w13, d_w2, d_weights = expert_gradient(
        d_y, x, weights.w13, weights.w2, weights.local(topk_ids), topk_weights, of_weights, *scales, ctx.activation
    )
    d_logits = d_router_logits + router.topk_weights_backward(
        d_weights + d_topk_weights, router_logits, topk_ids, ctx.routing
    )
    d_x = d_x + (d_logits @ gate_weight.to(d_logits.dtype)).to(x.dtype)
    d_gate = (d_logits.T @ x.to(d_logits.dtype)).to(gate_weight.dtype) if needs["gate_weight"] else None

    d_shared_w13 = d_shared_w2 = None
    if weights.shared_w13 is not None:  # one more expert, taken by every token with weight 1
        ids = topk_ids.new_zeros(x.shape[0], 1)
        ones = topk_weights.new_ones(x.shape[0], 1)
        w13, w2, *scales = (
            tensor if tensor is None else tensor[None]
            for tensor in (weights.shared_w13, weights.shared_w2, weights.shared_w13_scale, weights.shared_w2_scale)
        )
        d_shared_x, d_shared_w13, d_shared_w2, _ = expert_gradient(
            d_y, x, w13, w2, ids, ones, needs["shared_w13"] or needs["shared_w2"], *scales, ctx.activation
        )
        d_x = d_x + d_shared_x
        d_shared_w13 = d_shared_w13[0] if needs["shared_w13"] else None
        d_shared_w2 = d_shared_w2[0] if needs["shared_w2"] else None
    return (
        d_x if needs["x"] else None,
        d_gate,
        None,
        d_w13 if needs["w13"] else None,
        d_w2 if needs["w2"] else None,
        d_shared_w13,
        d_shared_w2,
        *[None] * (ctx.n_inputs - 7),
    )


_library.define(
    "block_moe(Tensor x, Tensor gate_weight, Tensor? expert_bias, Tensor w13, Tensor w2, Tensor? shared_w13, "
    f"Tensor? shared_w2, Tensor? block_offsets, SymInt seq_len, {_library.ROUTING}, Tensor? w13_scale=None, "
    "Tensor? w2_scale=None, Tensor? shared_w13_scale=None, Tensor? shared_w2_scale=None, "
    f"bool quantize_activations=False, Tensor? expert_map=None, str activation='silu', {_library.SHARING}) -> (Tensor y, "
    "Tensor topk_weights, Tensor topk_ids, Tensor coreset_ids, Tensor coreset_sizes, Tensor router_logits)",
    block_moe_impl,
    block_moe_fake,
    block_moe_setup_context,
    block_moe_backward,
)


class BlockMoE(nn.Module):
    """A sparse MoE layer that routes by block.

    Weights: gate_weight [E, H], expert_bias float32 [E] (a buffer; None without one), w13 [E, 2I, H] (gate rows first),
    w2 [E, H, I], shared_w13 [2I_shared, H] and shared_w2 [H, I_shared] (None without a shared expert). Created empty.
    w13_scale, w2_scale, shared_w13_scale, shared_w2_scale: buffers beside quantised weights (see `quantize`), else None.
    expert_map: where w13 and w2 hold some of the experts, see `block_moe`; the output is then a part of the sum.
    activation: see `moe_experts`.
    """

    gate_weight: nn.Parameter
    expert_bias: Tensor | None
    w13: Tensor
    w2: Tensor
    shared_w13: Tensor | None
    shared_w2: Tensor | None
    w13_scale: Tensor | None
    w2_scale: Tensor | None
    shared_w13_scale: Tensor | None
    shared_w2_scale: Tensor | None
    expert_map: Tensor | None
    ids_dtype = torch.int64  # of the topk_ids that `forward` returns; int32, what the ops give, spares a copy

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        routing: BlockRouting,
        *,
        shared_intermediate_size: int = 0,
        expert_bias: bool = True,
        activation: Literal["silu", "gelu_tanh"] = "silu",
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ):
        _checks.routing(routing)
        _checks.activation(activation)
        super().__init__()
        self.routing, self.activation = routing, activation

        def parameter(*shape):
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))

        self.gate_weight = parameter(routing.num_experts, hidden_size)
        bias = torch.zeros(routing.num_experts, dtype=torch.float32, device=device) if expert_bias else None
        self.register_buffer("expert_bias", bias)
        self.w13 = parameter(routing.num_experts, 2 * intermediate_size, hidden_size)
        self.w2 = parameter(routing.num_experts, hidden_size, intermediate_size)
        self.shared_w13 = parameter(2 * shared_intermediate_size, hidden_size) if shared_intermediate_size else None
        self.shared_w2 = parameter(hidden_size, shared_intermediate_size) if shared_intermediate_size else None
        for name in MATRICES:
            self.register_buffer(f"{name}_scale", None)
        self.register_buffer("expert_map", None, persistent=False)

    @property
    def form(self) -> str | None:
        """The format of the routed experts, a key of `dmoe_ops.formats.FORMATS`; None where they are floats."""
        return next((form for form, dtype in FORMATS.items() if self.w13.dtype == dtype), None)

    @property
    def bytes_per_expert(self) -> int:
        parts = (self.w13, self.w2, self.w13_scale, self.w2_scale)
        return sum(part[0].nbytes for part in parts if part is not None)

    def quantize(self, form: str, *, shared: bool = False) -> BlockMoE:
        """Puts w13 and w2, and with `shared` the shared expert's weights, into a format of `dmoe_ops.formats`: "fp8", "int8"
        or "int4". They become buffers, which have no gradients, and the float weights are let go one after the other.
        Casts of the module leave them as they are. Layers on the meta device get their shapes alone.

        Raises ValueError, before anything is changed, for an unknown format, weights that are quantised already, and odd
        columns in int4; for values that are not finite see `dmoe_ops.quantize`.
        """
        check_form(form)
        names = [name for name in MATRICES if getattr(self, name) is not None and (shared or "shared" not in name)]
        for name in names:
            if getattr(self, name).dtype in QUANTIZED:
                raise ValueError(f"{name} must be float to be quantised, got {getattr(self, name).dtype}")
            check_columns(getattr(self, name), form, name)
        for name in names:
            weight = getattr(self, name)
            made = (empty if weight.is_meta else quantize)(weight.data, form, halves=2 if name.endswith("w13") else 1)
            delattr(self, name)
            self.register_buffer(name, made[0])
            setattr(self, f"{name}_scale", made[1])
        return self

    def widen_scales(self) -> BlockMoE:
        """Holds all scales in float32; those of int4 may be bfloat16."""
        for name in MATRICES:
            scale = getattr(self, f"{name}_scale")
            setattr(self, f"{name}_scale", scale if scale is None else scale.float())
        return self

    def _apply(self, fn, recurse=True):
        """Quantised weights and their scales follow the module to another device, but no cast: it would lose digits."""
        names = [name for name in MATRICES if getattr(self, f"{name}_scale") is not None]
        fixed = {id(getattr(self, part)) for name in names for part in (name, f"{name}_scale")}

        def move(tensor):
            return fn(tensor.view(torch.uint8)).view(tensor.dtype) if id(tensor) in fixed else fn(tensor)

        return super()._apply(move, recurse)

    def forward(
        self,
        hidden_states: Tensor,
        block_offsets: Tensor | None = None,
        *,
        domain_offsets: Tensor | None = None,
        coreset_ids: Tensor | None = None,
        coresets_out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """hidden_states [bsz, seq, H] or [T, H], the dtype of w13 -> (y of that shape, (router_logits float32 [..., E],
        topk_ids `ids_dtype` [..., k])): what LLaDA2's own block returns. coresets_out: int32 [n_blocks, width], where the
        blocks' coreset_ids are put as well. The rest, errors too: see `block_moe`."""
        bias_dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        bias = None if self.expert_bias is None else self.expert_bias.to(bias_dtype)
        y, routed, router_logits = self.compute(hidden_states, bias, block_offsets, domain_offsets, coreset_ids)
        if coresets_out is not None:
            coresets_out.copy_(routed.coreset_ids)
        lead = hidden_states.shape[:-1]
        router_logits = router_logits.view(*lead, self.routing.num_experts)
        return y, (router_logits, routed.topk_ids.view(*lead, self.routing.top_k).to(self.ids_dtype))

    def compute(
        self,
        x: Tensor,
        expert_bias: Tensor | None,
        block_offsets: Tensor | None,
        domain_offsets: Tensor | None = None,
        coreset_ids: Tensor | None = None,
    ) -> tuple[torch.Tensor, RoutingResult, torch.Tensor]:
        """`block_moe` with what the layer holds."""
        return block_moe(
            x,
            self.gate_weight,
            expert_bias,
            self.w13,
            self.w2,
            self.shared_w13,
            self.shared_w2,
            routing=self.routing,
            block_offsets=block_offsets,
            w13_scale=self.w13_scale,
            w2_scale=self.w2_scale,
            shared_w13_scale=self.shared_w13_scale,
            shared_w2_scale=self.shared_w2_scale,
            expert_map=self.expert_map,
            activation=self.activation,
            domain_offsets=domain_offsets,
            coreset_ids=coreset_ids,
        )

    @classmethod
    def from_hf(cls, module: Any, routing: BlockRouting) -> BlockMoE:
        """Takes over the weights of a sparse MoE block of Hugging Face, LLaDA2's or one in the shape of Qwen3-MoE:
        `gate.weight`, `experts[i].{gate,up,down}_proj` (or stacked: `experts.{gate,up}_proj` [E, I, H], as dFactory has
        them, or `experts.gate_up_proj` [E, 2I, H], as transformers 5 has, and `experts.down_proj` [E, H, I]) and, if there,
        `gate.expert_bias` and `shared_experts`. The experts' activation is SiLU or GELU (tanh).

        The weights are held once: the parameters of `module` become views of the stacked ones, so it goes on working
        and the peak is one layer. Raises ValueError, naming the member, before anything is moved.
        """
        _checks.routing(routing)
        hf_block.check(module, routing)
        first = hf_block.first_weight(module)
        shared, bias = getattr(module, "shared_experts", None), hf_block.expert_bias(module)
        layer = cls(
            first.shape[-1],
            hf_block.intermediate_size(module),
            routing,
            shared_intermediate_size=0 if shared is None else shared.gate_proj.weight.shape[0],
            expert_bias=bias is not None,
            activation=hf_block.activation_of(module),
            dtype=first.dtype,
            device="meta",
        )
        layer.gate_weight = module.gate.weight
        layer.expert_bias = None if bias is None else bias.detach().float()
        for name in MATRICES:
            like = getattr(layer, name)
            if like is not None:
                setattr(layer, name, nn.Parameter(torch.empty_like(like, device=first.device), first.requires_grad))
        for owner, name, stacked, at in hf_block.places(module):
            weight = getattr(owner, name)
            weight.data = getattr(layer, stacked).data[at].copy_(weight.data)
        return layer.train(module.training)

    @classmethod
    def from_reference(cls, module: nn.Module, routing: BlockRouting) -> BlockMoE:
        """The name of `from_hf` before 0.2."""
        return cls.from_hf(module, routing)

    def check_give_back(self, module: Any) -> None:
        """Raises ValueError, naming the weight, unless `give_back` can give everything to the module."""
        gate = [(module.gate, "weight", "gate_weight", ())]
        if hf_block.expert_bias(module) is not None:
            gate.append((module.gate, "expert_bias", "expert_bias", ()))
        for owner, name, held, at in [*gate, *hf_block.places(module)]:
            weight: Any = getattr(self, held, None)
            try:
                fits = not weight.is_meta and weight[at].shape == getattr(owner, name).shape
                fits = fits and weight.dtype not in QUANTIZED
            except (AttributeError, IndexError):
                fits = False
            if not fits:
                got = f"{list(weight.shape)} on {weight.device}" if isinstance(weight, torch.Tensor) else weight
                got = f"{got}, quantised" if self.form else got
                raise ValueError(f"{held} must still hold the weights that the layer took over, got {got}")

    def give_back(self, module: Any) -> None:
        """Gives a module that `from_hf` has taken the weights of what the layer holds now: values, dtype, device,
        gradients and, where it has changed, requires_grad. The module's parameters stay the same objects; they are views
        of the stacked weights (stacked ones are copied where a view would have gaps).
        """
        self.check_give_back(module)
        first = hf_block.first_weight(module)
        trained, dtype = first.requires_grad, first.dtype
        hf_block.give(module.gate, "weight", self.gate_weight, (), module.gate.weight.requires_grad)
        for owner, name, held, at in hf_block.places(module):
            hf_block.give(owner, name, getattr(self, held), at, trained)
        if self.expert_bias is not None:
            # Held in float32; the module's own dtype holds the same where nothing has changed.
            bias, own = self.expert_bias.detach(), module.gate.expert_bias
            narrow = bias.to(own.dtype)
            same = self.w13.dtype == dtype and torch.equal(narrow.to(bias.dtype), bias)
            own.data = narrow if same else bias
        module.train(self.training)

    def extra_repr(self) -> str:
        return repr(self.routing) if self.activation == "silu" else f"{self.routing!r}, {self.activation}"
