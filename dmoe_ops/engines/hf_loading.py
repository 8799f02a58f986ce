"""Block routing inside transformers 5 as it loads: after `register`, every LLaDA2 that AutoModelForCausalLM makes has our
MoE layers, and its checkpoint is read straight into their stacked weights; models of transformers' own take our experts.
"""

from __future__ import annotations

import torch
from torch import nn

from ..experts import moe_experts
from ..hf_block import ACTIVATIONS, difference
from ..models.llada2 import OWN, rotary, routing_for
from ..routing import FIELDS, POLICIES
from .hf import PatchedMoE

MODEL_TYPE = "llada2_moe"


def register(policy: str = OWN, *, returns: str = PatchedMoE.returns, **overrides) -> None:
    """Tells transformers, for the rest of the process, to build LLaDA2's sparse MoE blocks as `BlockMoE` routing by `policy`
    (with `overrides`, fields of `BlockRouting`), to load checkpoints of separate experts into them, and to save them back as
    separate experts. A second call replaces the first.

    policy: "own" is what the config of each model was trained for, see `patch`. returns: what a block returns, as in
    `PatchedMoE`; the released one's y, (router_logits, topk_ids) by default.

    Its rotary embedding is replaced too: under transformers 5 the released class looks for a function that is gone, or keeps
    frequencies that nobody has computed.
    Experts of transformers' own models take `experts_implementation="dmoe"` in from_pretrained; see `experts_forward`.

    Raises ValueError for an unknown policy or field, and where transformers is missing or too old.
    """
    if policy not in (OWN, *POLICIES):
        raise ValueError(f"policy must be one of {OWN}, {', '.join(POLICIES)}, got {policy!r}")
    for name, value in overrides.items():
        if name not in FIELDS:
            raise ValueError(f"overrides must be fields of BlockRouting, got {name}={value!r:.100}")
    try:
        from transformers.conversion_mapping import register_checkpoint_conversion_mapping
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.monkey_patching import register_patch_mapping
    except ImportError as error:
        raise ValueError(f"transformers must be a version that replaces classes as it loads: {error}") from None

    class LoadedMoE(PatchedMoE):
        def __init__(self, config, *args, **kwargs):
            shared = config.moe_intermediate_size * (config.num_shared_experts or 0)
            routing = routing_for(config, policy, **overrides)
            sizes = config.hidden_size, config.moe_intermediate_size
            super().__init__(*sizes, routing, shared_intermediate_size=shared)
            self.returns = returns

    classes = {"LLaDA2MoeSparseMoeBlock": LoadedMoE, "LLaDA2MoeRotaryEmbedding": RotaryEmbedding}
    register_patch_mapping({f"^{name}$": made for name, made in classes.items()}, overwrite=True)
    register_checkpoint_conversion_mapping(MODEL_TYPE, conversions(), overwrite=True)
    ALL_EXPERTS_FUNCTIONS.register("dmoe", experts_forward)


def conversions() -> list:
    """From the names of a checkpoint to those of `BlockMoE`."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

    up = [f"mlp.experts.*.{name}.weight" for name in ("gate_proj", "up_proj")]
    return [
        WeightRenaming("mlp.gate.weight", "mlp.gate_weight"),
        WeightRenaming("mlp.gate.expert_bias", "mlp.expert_bias"),
        WeightConverter(up, "mlp.w13", [MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.w2", [MergeModulelist(dim=0)]),
        WeightConverter(
            [name.replace("experts.*", "shared_experts") for name in up], "mlp.shared_w13", [Concatenate(dim=0)]
        ),
        WeightRenaming("mlp.shared_experts.down_proj.weight", "mlp.shared_w2"),
    ]


class RotaryEmbedding(nn.Module):
    """cos and sin of a LLaDA2, of the default kind. It holds no buffer that loading could leave empty."""

    def __init__(self, config, device=None):
        super().__init__()
        rope = getattr(config, "rope_parameters", None) or {}
        scaling = getattr(config, "rope_scaling", None) or rope
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope_scaling must be null or of type default, got {kind!r}")

        def read(name, default=None):
            return rope.get(name) or getattr(config, name, None) or default

        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.theta, self.size = read("rope_theta", 10000.0), int(head_dim * read("partial_rotary_factor", 1.0))

    @torch.no_grad()
    def forward(self, x, position_ids):
        """x: for its dtype; position_ids int64 [bsz, T] -> cos, sin [bsz, T, size]; the angles are fp32."""
        return rotary(position_ids, self.size, self.theta, x.dtype)


def experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """`moe_experts` as an implementation of transformers' own experts modules: hidden_states [T, H], int64 top_k_index and
    top_k_weights [T, k], self.gate_up_proj [E, 2I, H], self.down_proj [E, H, I]; ids from E on are another rank's, and add
    nothing. The activation is the config's hidden_act or hidden_activation.

    Raises ValueError, naming what is different, for experts that are not gated by SiLU or GELU (tanh) in this layout.
    """
    cls = type(self)
    activation = getattr(self.config, "hidden_act", None) or getattr(self.config, "hidden_activation", None)
    what = difference(self) or (f"has hidden_act={activation!r}" if activation not in ACTIVATIONS else None)
    if what:
        raise ValueError(f"experts_implementation must not be 'dmoe' for {cls.__name__}: it {what}")
    weights = self.gate_up_proj, self.down_proj
    named = ACTIVATIONS[activation]
    return moe_experts(hidden_states, *weights, top_k_index, top_k_weights.float(), activation=named)
