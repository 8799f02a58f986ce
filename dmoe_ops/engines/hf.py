"""Block routing inside a Hugging Face model: `patch` replaces every LLaDA2 sparse MoE block, `undo` puts it back."""

from __future__ import annotations

from torch import nn

from ..layer import BlockMoE, check_reference, is_reference
from ..routing import POLICIES, BlockRouting


class PatchHandle:
    """What `patch` changed. layers: the replacements by name; routing: theirs. A context manager undoes on leaving."""

    def __init__(self, model: nn.Module, layers: dict[str, BlockMoE], originals: dict[str, nn.Module]):
        self.layers = layers
        self._model = model
        self._originals = originals

    @property
    def routing(self) -> BlockRouting:
        return next(iter(self.layers.values())).routing

    def undo(self) -> None:
        """Puts the original modules back, their weights bit for bit as they are in the layers. A second call does
        nothing."""
        for name, module in self._originals.items():
            module.train(self.layers[name].training)
            self._model.set_submodule(name, module)
        self._originals = {}

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc) -> None:
        self.undo()


def patch(model: nn.Module, policy: str = "dmoe", **overrides) -> PatchHandle:
    """Replaces the forward of every LLaDA2 sparse MoE block of `model` by block routing under `policy`.

    A block is found by its members (see `BlockMoE.from_reference`), never by its class. Experts, top-k, groups and
    scaling are read from each block; `overrides` are fields of `BlockRouting` and win over both. The patched block returns
    what the original does, (y, (router_logits, topk_ids)). Weights are held once; the peak is one layer above the model.
    Save a model's weights after `undo`: while patched they carry the names of `BlockMoE`.

    Blocks of tokens are cut every `block_size` (32 unless given) from the first token of each forward: it has to be the
    model's `block_length`, or a part of it, and forwards have to begin with a block.

    Raises ValueError, before anything is changed, when no block is found or one can't be taken over.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {model!r}")
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    originals = {name: module for name, module in model.named_modules() if name and is_reference(module)}
    if not originals:
        again = " (it is patched already)" if any(isinstance(m, BlockMoE) for m in model.modules()) else ""
        raise ValueError(f"model must contain LLaDA2 sparse MoE blocks, got {type(model).__name__} without any{again}")
    routings = {}
    for name, module in originals.items():
        try:
            routings[name] = routing_of(module, policy, **overrides)
            check_reference(module, routings[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    layers = {}
    for name, module in originals.items():
        layers[name] = BlockMoE.from_reference(module, routings[name])
        model.set_submodule(name, layers[name])
    return PatchHandle(model, layers, originals)


def routing_of(module: nn.Module, policy: str, **overrides) -> BlockRouting:
    """The policy with the geometry of a LLaDA2 block, read from its gate or its config."""
    config = getattr(module, "config", None) or getattr(module.gate, "config", None)

    def read(default, *names):
        for name in names:
            for source in (module.gate, module, config):
                value = getattr(source, name, None)
                if value is not None and not isinstance(value, nn.Module):
                    return value
        return default

    top_k = read(None, "top_k", "num_experts_per_tok")
    if top_k is None and "top_k" not in {**POLICIES[policy], **overrides}:
        raise ValueError("gate.top_k or config.num_experts_per_tok must be there, or top_k given, got neither")
    geometry = dict(
        num_experts=len(module.experts),
        top_k=top_k,
        n_group=read(1, "n_group") or 1,
        topk_group=read(1, "topk_group") or 1,
        score=read("sigmoid", "score_function", "scoring_func"),
        # LLaDA2's gate normalises except at top-1, whatever its config says.
        norm_topk_prob=top_k != 1,
        routed_scaling_factor=float(read(1.0, "routed_scaling_factor")),
    )
    return BlockRouting.of_model(policy, geometry, **overrides)
