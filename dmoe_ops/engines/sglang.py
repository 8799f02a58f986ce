"""Block routing inside SGLang: `plugin` is an entry point of the group `sglang.srt.plugins`, which every process of the
engine calls before it looks at a model. Active where DMOE_POLICY is set; else it changes nothing.

It replaces the class of LLaDA2's sparse MoE block by one whose routing and experts are `block_moe`. Loaders, shared experts,
all-reduce and decoding stay SGLang's. Of SGLang 0.5.23: in its block-diffusion mode each request of a batch brings whole
blocks, so blocks are the consecutive runs of the flat batch; the block returns a partial sum under tensor and expert
parallelism, which its layer adds up.
"""

from __future__ import annotations

import copy
import functools
import logging

from ..experts import map_of_rank
from ..layer import block_moe
from ..models.llada2 import routing_for
from . import serving

logger = logging.getLogger(__name__)
RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
KNOWN = "LLaDA2's"


def plugin() -> None:
    asked, report_every = serving.settings(logger, "SGLang")
    if asked is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    block = "sglang.srt.models.llada2.LLaDA2MoeSparseMoeBlock"
    HookRegistry.register(block, llada2_block(asked, counted=report_every > 0), HookType.REPLACE)
    HookRegistry.register(f"{RUNNER}.load_model", report, HookType.AFTER)
    if report_every:
        HookRegistry.register(f"{RUNNER}.forward", functools.partial(count, report_every), HookType.AFTER)


def llada2_block(asked: serving.Asked, counted: bool = False):
    """A subclass of SGLang's block that routes as is asked for, or stays as it is and has the reason in `left_alone`."""
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
    from sglang.srt.layers.moe.topk import capture_routed_experts_if_allowed
    from sglang.srt.models.llada2 import LLaDA2MoeSparseMoeBlock

    class BlockRoutedMoE(LLaDA2MoeSparseMoeBlock):
        block_routed = True

        def __init__(self, layer_id, config, quant_config=None, *args, **kwargs):
            try:
                routing, left_alone = routing_here(config, quant_config, asked), None
            except ValueError as error:
                left_alone = str(error)
            if left_alone is None and getattr(config, "expert_capacity", None) is not None:
                config = copy.copy(config)
                config.expert_capacity = None  # SGLang's own block routing refuses expert parallelism, and CPUs
            super().__init__(layer_id, config, quant_config, *args, **kwargs)
            self.left_alone = left_alone
            if left_alone is None:
                self._copy_expert_weights(routing)

        def _copy_expert_weights(self, routing) -> None:
            experts = self.experts
            self.routing = routing
            # Whatever a runner of SGLang would make of the weights (packed, permuted), ours reads them as they are loaded.
            experts.quant_method.process_weights_after_loading = leave
            place = experts.num_local_experts, experts.moe_ep_rank, experts.w13_weight.device
            self.register_buffer("expert_map", map_of_rank(self.num_experts, *place), persistent=False)
            self.counts = serving.Counts(experts.w13_weight.device) if counted else None

        def _forward_router_experts(self, hidden_states):
            """This rank's part of the routed experts' output, scaled by routed_scaling_factor."""
            if self.left_alone is not None:
                return super()._forward_router_experts(hidden_states)
            y, routed, _ = block_moe(
                hidden_states,
                self.gate.weight,
                self.correction_bias,
                self.experts.w13_weight,
                self.experts.w2_weight,
                None,
                None,
                routing=self.routing,
                expert_map=self.expert_map,
            )
            capture_routed_experts_if_allowed(self.topk.topk_config, self.layer_id, routed.topk_ids)
            get_global_expert_distribution_recorder().on_select_experts(topk_ids=routed.topk_ids)
            if self.counts is not None:
                self.counts.add(routed, self.routing)
            return y

    return BlockRoutedMoE


def leave(layer) -> None:
    pass


def routing_here(config, quant_config, asked: serving.Asked):
    """The routing of a model in this engine; its blocks are the engine's unless a block size is asked for. Raises ValueError
    that says why the model has to keep SGLang's own routing."""
    from sglang.srt.dllm.config import DllmConfig
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend, get_moe_runner_backend
    from sglang.srt.runtime_context import get_exec, get_parallel, get_server_args

    args = get_server_args()
    dllm, runner, exchange = DllmConfig.from_server_args(args), get_moe_runner_backend(), get_moe_a2a_backend()
    if dllm is None:
        raise ValueError("it needs --dllm-algorithm: in other batches nothing tells where a block begins")
    routing = routing_for(config, asked.policy, **{"block_size": dllm.block_size} | asked.overrides)
    for refused, why in (
        (dllm.block_size % routing.block_size, f"block_size must divide the engine's {dllm.block_size} tokens"),
        (quant_config is not None, "quantised weights are not served"),
        (args.device not in ("cpu", "cuda"), f"--device must be cpu or cuda, got {args.device}"),
        (not (runner.is_auto() or runner.is_triton()), "--moe-runner-backend must be auto or triton"),
        (not exchange.is_none(), "--moe-a2a-backend must be none"),
        (get_exec().moe.enable_eplb, "--enable-eplb moves experts while the engine runs, which is not served"),
        (get_parallel().attn_dp_size > 1, "data-parallel attention is not served"),
    ):
        if refused:
            raise ValueError(why)
    return routing


def blocks_of(model) -> list:
    return [module for module in model.modules() if getattr(module, "block_routed", False)]


def report(_, runner) -> None:
    """After a model is loaded: one line on what was replaced, or why nothing was."""
    from sglang.srt.runtime_context import get_parallel

    model, blocks = type(runner.model).__name__, blocks_of(runner.model)
    if get_parallel().tp_rank != 0 or runner.is_draft_worker:
        return
    if not blocks:
        logger.warning("dmoe: %s is left alone: it has no MoE block of a kind that is known (%s)", model, KNOWN)
    elif blocks[0].left_alone is not None:
        logger.warning("dmoe: %s is left alone: %s", model, blocks[0].left_alone)
    else:
        logger.info(
            "dmoe: routing and experts of %d MoE blocks of %s are replaced: %s",
            len(blocks),
            model,
            blocks[0].routing,
        )


def count(every: int, _, runner, *args, **kwargs) -> None:
    """After every `every` forwards: a line with the means per block, and the sums in the engine's metrics."""
    from sglang.srt.runtime_context import get_parallel

    if runner.forward_pass_id % every or get_parallel().tp_rank != 0:
        return
    counted = [block.counts for block in blocks_of(runner.model) if block.left_alone is None]
    if counted:
        serving.tell_counts(logger, counted, runner.server_args.enable_metrics)
