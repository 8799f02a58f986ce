"""The geometry of a LLaDA-MoE model, by the names that its config.json has for it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ..config import NEUTRAL
from ..qwen3_moe.config import SeparateConfig, softmax_geometry

NAMES = dict(expert_intermediate_size="moe_intermediate_size", dense_intermediate_size="intermediate_size")


@dataclasses.dataclass(frozen=True)
class LLaDAMoEConfig(SeparateConfig):
    """LLaDA-MoE-7B-A1B; see `DiffusionConfig`. moe_layer_freq: for each layer 1, or 0 where it has no experts."""

    qk_layernorm: bool = False
    moe_layer_freq: tuple = ()
    model_type: str = "lladamoe"

    family: ClassVar[str] = "LLaDA-MoE"
    model_types: ClassVar[tuple[str, ...]] = ("lladamoe", "llada_moe")
    architectures: ClassVar[tuple[str, ...]] = ("LLaDAMoEModelLM", "LLaDAMoEModel")
    released_ids: ClassVar[dict[int, tuple[int, int]]] = {157184: (156892, 156895)}
    sees_all: ClassVar[bool] = True

    def _check_types(self) -> None:
        super()._check_types()
        self._check(len(self.moe_layer_freq) == self.num_hidden_layers, "moe_layer_freq", "have a value for each layer")
        self._check(set(self.moe_layer_freq) <= {0, 1}, "moe_layer_freq", "hold 0 and 1")

    @classmethod
    def translated(cls, values: dict) -> dict:
        given = {name: values[theirs] for theirs, name in NAMES.items() if values.get(theirs) is not None}
        # The released config has the model_type of the dense LLaDA, or one that was put in its place.
        return {**values, **given, "model_type": cls.model_type}

    @classmethod
    def neutral(cls, values: dict) -> dict[str, tuple]:
        return NEUTRAL | dict(router_num_group=(1,), router_topk_group=(1,))

    def to_dict(self) -> dict:
        values = super().to_dict()
        for theirs, name in NAMES.items():
            if name in values:
                values[theirs] = values.pop(name)
        return dict(moe_router_score_function="softmax", moe_router_enable_expert_bias=False) | values

    @property
    def use_qk_norm(self) -> bool:
        return self.qk_layernorm

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        return ("moe_layer_freq",)

    @property
    def moe_layers(self) -> int:
        return sum(self.moe_layer_freq)

    def has_experts(self, layer: int) -> bool:
        return bool(self.moe_layer_freq[layer])

    def geometry(self) -> dict[str, Any]:
        # Its code never divides by the sum of the weights, whatever norm_topk_prob says.
        return softmax_geometry(self, norm_topk_prob=False)
