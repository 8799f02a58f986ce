"""How a block of tokens chooses its experts: the settings (`BlockRouting`) and what comes out (`RoutingResult`)."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, NamedTuple

import torch

SCORES = ("sigmoid", "softmax")
AGGREGATES = ("topk_sum", "sum", "max", "union")
SELECTS = ("top_p", "top_n", "nonzero", "all")
CHOICES = ("block", "pool")
# The order in which settings reach C++ and CUDA (csrc/routing.h), where a name of the three tuples above is its position.
PACKED_INTS = (
    "top_k",
    "block_size",
    "n_group",
    "topk_group",
    "score",
    "aggregate",
    "select",
    "min_experts",
    "max_experts",
    "capacity",
    "union_k",
    "norm_topk_prob",
)
PACKED_FLOATS = ("top_p", "routed_scaling_factor")

# Spec of each policy as a change to LLaDA2.0-mini's dMoE defaults. Sources: dMoE arXiv 2605.30876 (Algorithm 1, tables
# 2 and 3), DES arXiv 2602.00879 (des_seq, des_vote), the LLaDA2.2 report (capacity), OEA arXiv 2511.02237 (oea), XShare
# arXiv 2602.07265 (xshare, without its warm-up, which has no bound).
POLICIES: dict[str, dict[str, Any]] = {
    "token": dict(select="all"),
    "top4": dict(select="all", top_k=4),
    "des_seq": dict(aggregate="union", select="nonzero", union_k=3),
    "des_vote": dict(aggregate="topk_sum", select="top_n"),  # capacity: 0.15 E unless given
    "capacity": dict(aggregate="max", select="top_n", capacity=48, n_group=1, topk_group=1),
    "dmoe": dict(aggregate="topk_sum", select="top_p"),
    "oea": dict(aggregate="union", select="nonzero", union_k=1, choose="pool"),
    "xshare": dict(aggregate="sum", select="all", choose="pool"),  # pool_capacity: 3/16 E unless given
}
# The settings of a policy that are a share of the experts, unless given.
SHARES = {"des_vote": ("capacity", 0.15), "xshare": ("pool_capacity", 3 / 16)}


class RoutingResult(NamedTuple):
    """What `block_route` returns for T tokens in n blocks.

    topk_ids: int32 [T, top_k], best first, -1 for a slot without an expert.
    topk_weights: float32 [T, top_k], 0 for a slot without an expert.
    coreset_ids: int32 [n, width], ascending, padded with -1; width is `BlockRouting.coreset_width`, or that of the
        coresets that were passed in.
    coreset_sizes: int32 [n].
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    coreset_ids: torch.Tensor
    coreset_sizes: torch.Tensor


@dataclasses.dataclass(frozen=True)
class BlockRouting:
    """Settings of block-level routing. The defaults are LLaDA2.0-mini under dMoE at p = 0.6.

    num_experts, top_k: experts E, and experts per token k.
    block_size: tokens per block B; a block may be shorter, never longer.
    n_group, topk_group: group-limited top-k keeps `topk_group` of `n_group` groups of experts for each token.
    score: "sigmoid" or "softmax" of the router logits.
    aggregate: one score per block and expert: "topk_sum", "sum", "max" or "union".
    select: the coreset from these scores: "top_p", "top_n", "nonzero" or "all" (token routing; ignores `aggregate`).
    top_p, min_experts, max_experts: of "top_p": threshold in (0, 1], least and largest coreset (None: E).
    capacity: of "top_n": the size of the coreset.
    union_k: of "union": how many of each token's best experts join.
    norm_topk_prob, routed_scaling_factor: weights are divided by their sum over the token's experts, then scaled.
    pool_capacity, choose: of blocks that share a pool, see `dmoe_ops.reference.block_route`: at most so many experts in a
        domain (None: no limit); and whether tokens choose in their "block"'s coreset or in the whole "pool".

    Raises ValueError, naming the field and its value, when a value is outside its range.
    """

    num_experts: int = 256
    top_k: int = 8
    block_size: int = 32
    n_group: int = 8
    topk_group: int = 4
    score: str = "sigmoid"
    aggregate: str = "topk_sum"
    select: str = "top_p"
    top_p: float = 0.6
    min_experts: int = 16
    max_experts: int | None = None
    capacity: int | None = None
    union_k: int | None = None
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    pool_capacity: int | None = None
    choose: str = "block"

    def __post_init__(self):
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain(value))
        for name in ("num_experts", "top_k", "block_size", "n_group", "topk_group"):
            _check_int(name, getattr(self, name), 1)
        _check_int("min_experts", self.min_experts, 0)
        for name in ("max_experts", "capacity", "union_k", "pool_capacity"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        choices = dict(score=SCORES, aggregate=AGGREGATES, select=SELECTS, choose=CHOICES)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not is_number(self.routed_scaling_factor) or not math.isfinite(self.routed_scaling_factor):
            raise ValueError(f"routed_scaling_factor must be a finite number, got {self.routed_scaling_factor!r}")
        if not isinstance(self.norm_topk_prob, bool):
            raise ValueError(f"norm_topk_prob must be True or False, got {self.norm_topk_prob!r}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts={self.num_experts}, got {self.top_k}")
        if self.num_experts % self.n_group:
            raise ValueError(f"n_group must divide num_experts={self.num_experts}, got {self.n_group}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group must be at most n_group={self.n_group}, got {self.topk_group}")
        if self.select == "top_n" and self.capacity is None:
            raise ValueError("capacity must be given with select='top_n', got None")
        needs_union_k = self.votes and self.aggregate == "union"
        if needs_union_k and (self.union_k is None or self.union_k > self.num_experts):
            raise ValueError(
                f"union_k must be in [1, num_experts={self.num_experts}] with aggregate='union', got {self.union_k}"
            )

    @classmethod
    def policy(cls, name: str, **overrides) -> BlockRouting:
        """The named policy ("dmoe", "token", "top4", "des_seq", "des_vote", "capacity", "oea" or "xshare") with
        LLaDA2.0-mini's geometry, every field open to an override. Raises ValueError for an unknown name or field."""
        if name not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
        for key in overrides:
            if key not in FIELDS:
                raise ValueError(f"{key} is not a field of BlockRouting, got {key}={overrides[key]!r}")
        values = {**POLICIES[name], **overrides}
        if name in SHARES:
            field, share = SHARES[name]
            num_experts = values.get("num_experts", cls.num_experts)
            _check_int("num_experts", num_experts, 1)
            values.setdefault(field, max(1, round(share * num_experts)))
        return cls(**values)

    @classmethod
    def for_model(cls, policy: str, geometry: dict, **overrides) -> BlockRouting:
        """The named policy with the fields of `geometry`, a model's own, but for those that make the policy (top4's top_k);
        `overrides` win over both. Raises ValueError for an unknown name or field."""
        fixed = POLICIES.get(policy, {})
        return cls.policy(policy, **{k: v for k, v in geometry.items() if k not in fixed} | overrides)

    @classmethod
    def of_model(cls, policy: str, geometry: dict, **overrides) -> BlockRouting:
        """The name of `for_model` before 0.2."""
        return cls.for_model(policy, geometry, **overrides)

    def args(self) -> tuple:
        """The fields in order, but for those of `pool_args`: how the settings travel through an op's schema
        (`_library.ROUTING`)."""
        return tuple(getattr(self, name) for name in FIELDS[:-2])

    def pool_args(self) -> tuple:
        """The rest of them (`_library.SHARING`), which ops of 0.1 did not have."""
        return self.pool_capacity, self.choose

    @property
    def votes(self) -> bool:
        """Whether stage 1 has anything to do."""
        return self.select != "all" or self.pool_capacity is not None

    @property
    def pooled(self) -> bool:
        """Whether blocks of one domain reach each other."""
        return self.pool_capacity is not None or (self.choose == "pool" and self.select != "all")

    @property
    def coreset_width(self) -> int:
        """The largest coreset that these settings allow: the second dimension of `coreset_ids`."""
        limit: Any = self.num_experts  # the options that these settings use are integers, see __post_init__
        if self.choose == "pool":
            pass  # any number of blocks add to it
        elif self.select == "top_p" and self.max_experts is not None:
            limit = self.max_experts
        elif self.select == "top_n":
            limit = self.capacity
        elif self.select == "nonzero" and self.aggregate in ("union", "topk_sum"):
            votes: Any = self.union_k if self.aggregate == "union" else self.top_k
            limit = self.block_size * votes
        limit = min(limit, self.num_experts)
        return limit if self.pool_capacity is None else min(limit, self.pool_capacity)


FIELDS = tuple(field.name for field in dataclasses.fields(BlockRouting))


def count_blocks(tokens: int, seq_len: int, block_offsets: torch.Tensor | None, block_size: int) -> int:
    """Blocks of `tokens` rows, in sequences of `seq_len` unless there are offsets."""
    if block_offsets is not None:
        return block_offsets.shape[0] - 1
    if isinstance(tokens, int) and tokens == 0:
        return 0
    return tokens // seq_len * ((seq_len + block_size - 1) // block_size)


def is_int(value: Any) -> bool:
    """NumPy's integers are integers too."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """An integer that no float can hold is none."""
    if is_int(value):
        return abs(value) < 2**1023
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """The int or float of Python that a number of another type (NumPy's) equals; anything else as it is."""
    if isinstance(value, (bool, int)) or not is_number(value):
        return value
    return int(value) if is_int(value) else float(value)


def int_rule(value: Any, least: int) -> str | None:
    """What a setting must be where `value` is not; C++ and CUDA count in 32 bits."""
    if not is_int(value) or value < least:
        return f"an integer of at least {least}"
    return "an integer below 2**31" if value >= 2**31 else None


def _check_int(name: str, value: Any, least: int) -> None:
    if rule := int_rule(value, least):
        raise ValueError(f"{name} must be {rule}, got {value!r}")
