"""Block routing inside vLLM: `plugin` is an entry point of the group `vllm.general_plugins`, which every process of the
engine calls before it looks at a model. Active where DMOE_POLICY is set; else it changes nothing.

By vLLM's out-of-tree registration it puts its own runner in the place of `MoERunner`, whose routing and experts are
`block_route` and `moe_experts`. Loaders, shared experts, all-reduce and schedulers stay vLLM's. Its batches are flat and cut
anywhere, so blocks are cut inside each request, at multiples of the block size from the request's first token (vLLM 0.32.0).
"""

from __future__ import annotations

import functools
import logging
import os

import torch

from .. import experts, router
from ..models.llada2 import OWN, own_policy, trained_for
from ..routing import BlockRouting
from . import serving

logger = logging.getLogger("vllm.dmoe")  # vLLM shows what loggers below its own say


@functools.cache  # vLLM may call it several times in a process
def plugin() -> None:
    asked, report_every = serving.settings(logger, "vLLM")
    if asked is not None:
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        MoERunner.register_oot(runner(asked, report_every))


def runner(asked: serving.Asked, report_every: int = 0):
    """A subclass of vLLM's runner that routes as is asked for, or stays as it is and has the reason in `left_alone`.
    report_every: after how many forwards what was routed is told; 0: never."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder

    statistics = Statistics(report_every) if report_every else None

    class BlockRoutedRunner(MoERunner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            try:
                self.routing, self.left_alone = routing_here(self, asked), None
            except ValueError as error:
                self.left_alone = str(error)
            tell(self)
            if self.left_alone is None:
                # Whatever a kernel of vLLM would make of the weights (packed, shuffled), ours reads them as they are loaded.
                self._quant_method.process_weights_after_loading = leave

        def _apply_quant_method(
            self, hidden_states, router_logits, shared_experts_input, input_ids=None, shared_experts_overlapping=False
        ):
            """(the shared experts' output or None, this rank's part of the routed experts')."""
            if self.left_alone is not None:
                return super()._apply_quant_method(
                    hidden_states, router_logits, shared_experts_input, input_ids, shared_experts_overlapping
                )
            self._maybe_apply_shared_experts(shared_experts_input, SharedExpertsOrder.NO_OVERLAP)
            layer, offsets = self.routed_experts, offsets_here(router_logits, self.routing.block_size)
            routed = router.block_route(
                router_logits.float(), layer.e_score_correction_bias, routing=self.routing, block_offsets=offsets
            )
            if statistics is not None and offsets is not None:  # a warm-up has none
                statistics.add(self, routed, offsets)
            y = experts.moe_experts(
                hidden_states, layer.w13_weight, layer.w2_weight, *routed[:2], expert_map=layer._expert_map
            )
            if shared_experts_overlapping:
                self._shared_experts.wait()
            return None if self._shared_experts is None else self._shared_experts.output, y

    return BlockRoutedRunner


class Statistics:
    """What the layers of a model have routed; told when the first of them begins the next round of forwards."""

    def __init__(self, every: int):
        self.every, self.forwards, self.counts = every, 0, {}

    def add(self, runner, routed, offsets) -> None:
        counts = self.counts.setdefault(runner, serving.Counts(routed.topk_ids.device))
        if runner is next(iter(self.counts)):
            if self.forwards and self.forwards % self.every == 0 and is_first_rank(runner):
                serving.tell_counts(logger, list(self.counts.values()), "PROMETHEUS_MULTIPROC_DIR" in os.environ)
            self.forwards += 1
        counts.add(routed, runner.routing, offsets)


def leave(layer) -> None:
    pass


def routing_here(runner, asked: serving.Asked) -> BlockRouting:
    """The routing of a runner's layer. Raises ValueError that says why it has to keep vLLM's own."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    vllm, layer, moe = get_current_vllm_config(), runner.routed_experts, runner.moe_config
    config = vllm.model_config.hf_text_config
    policy = own_policy(config) if asked.policy == OWN else asked.policy
    grouped = layer.use_grouped_topk
    geometry = dict(
        num_experts=layer.global_num_experts,
        top_k=layer.top_k,
        n_group=(grouped and layer.num_expert_group) or 1,
        topk_group=(grouped and layer.topk_group) or 1,
        score=layer.scoring_func,
        norm_topk_prob=layer.renormalize,
        # 1 where the runner scales its output by itself.
        routed_scaling_factor=float(layer.routed_scaling_factor),
    )
    blocks = {} if vllm.diffusion_config is None else dict(block_size=vllm.diffusion_config.canvas_length)
    routing = BlockRouting.for_model(policy, geometry, **blocks | trained_for(config, policy) | asked.overrides)
    cached = vllm.cache_config.enable_prefix_caching and (vllm.cache_config.block_size or 0) % routing.block_size
    for refused, why in (
        (type(layer.quant_method) is not UnquantizedFusedMoEMethod, "quantised weights are not served"),
        (
            layer.activation != MoEActivation.SILU or moe.has_bias,
            "its experts are not SwiGLU with SiLU and without bias",
        ),
        (layer.custom_routing_function or moe.has_hash_routing, "its routing is not top-k of sigmoid or softmax"),
        (layer.apply_router_weight_on_input, "its weights are applied to the experts' input"),
        (moe.dp_size > 1 or moe.pcp_size > 1 or moe.is_sequence_parallel, "tokens are spread over ranks"),
        (moe.moe_parallel_config.enable_eplb, "--enable-eplb moves experts while the engine runs"),
        (cached, f"--block-size must be a multiple of block_size={routing.block_size} under prefix caching"),
        (not vllm.model_config.enforce_eager, "it needs --enforce-eager: the blocks of a batch are no constants"),
    ):
        if refused:
            raise ValueError(why)
    return routing


@functools.cache
def told(said: str) -> bool:
    return True


def is_first_rank(runner) -> bool:
    return runner.moe_config.tp_rank == 0 and runner.moe_config.ep_rank == 0


def tell(runner) -> None:
    """One line for a model: what is replaced, or why nothing is."""
    from vllm.config import get_current_vllm_config

    model = get_current_vllm_config().model_config.architectures[0]
    if not is_first_rank(runner):
        return
    if runner.left_alone is None:
        said = f"dmoe: routing and experts of the MoE layers of {model} are replaced: {runner.routing}"
    else:
        said = f"dmoe: {model} is left alone: {runner.left_alone}"
    if told.cache_info().currsize == 0 and told(said):
        logger.log(logging.INFO if runner.left_alone is None else logging.WARNING, said)


def offsets_here(rows, block_size: int):
    """int32 [n_blocks + 1] of the requests in this forward, on the device of `rows` [T, ..]; None where there are none (a
    warm-up). Computed in the first layer of a forward, for all."""
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    if not context.attn_metadata:
        return None
    kept = context.additional_kwargs.get("dmoe_offsets")
    if kept is None or kept[0] != len(rows):
        metadata = next(iter(context.attn_metadata.values()))
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        offsets = block_offsets(starts, lengths, len(rows), block_size)
        kept = len(rows), torch.tensor(offsets, dtype=torch.int32, device=rows.device)
        context.additional_kwargs["dmoe_offsets"] = kept
    return kept[1]


def block_offsets(starts: list[int], lengths: list[int], rows: int, block_size: int) -> list[int]:
    """Where blocks begin, and `rows`: request i has the rows starts[i] to starts[i + 1] - 1, the last of its lengths[i]
    tokens; its blocks begin at multiples of `block_size`. Rows behind the last request are blocks by themselves."""
    begins = []
    for begin, end, length in zip(starts, starts[1:], lengths):
        position = length - (end - begin)
        begins += [begin] if end > begin else []
        begins += range(begin + block_size - position % block_size, end, block_size)
    return [*begins, *range(starts[-1], rows, block_size), rows]
