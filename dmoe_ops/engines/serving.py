"""What the plugins of serving engines share: the routing that the environment asks for, and counts of what was routed."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
from typing import NamedTuple

import torch

from ..models.llada2 import OWN
from ..routing import FIELDS, POLICIES, BlockRouting, RoutingResult


class Asked(NamedTuple):
    policy: str
    overrides: dict


def asked(environ=os.environ) -> Asked | None:
    """The policy that DMOE_POLICY names ("own": the one the weights were trained for), with the fields of `BlockRouting`
    that DMOE_ROUTING, a JSON object, gives. None where DMOE_POLICY is not set.

    Raises ValueError, naming the variable and its value.
    """
    policy, text = environ.get("DMOE_POLICY"), environ.get("DMOE_ROUTING") or "{}"
    if not policy:
        return None
    if policy not in (OWN, *POLICIES):
        raise ValueError(f"DMOE_POLICY must be one of {OWN}, {', '.join(POLICIES)}, got {policy!r}")
    try:
        overrides = json.loads(text)
    except ValueError:
        overrides = None
    if not isinstance(overrides, dict):
        raise ValueError(f"DMOE_ROUTING must be a JSON object, got {text!r:.200}")
    for name, value in overrides.items():
        if name not in FIELDS:
            raise ValueError(f"DMOE_ROUTING must hold fields of BlockRouting, got {name}={value!r:.100}")
    return Asked(policy, overrides)


def report_every(environ=os.environ) -> int:
    """DMOE_STATISTICS: after how many forwards the counts are reported; 0, never, where it is not set. Raises ValueError."""
    text = environ.get("DMOE_STATISTICS") or "0"
    if not text.isdecimal():
        raise ValueError(f"DMOE_STATISTICS must be a number of forwards, got {text!r:.100}")
    return int(text)


def settings(logger: logging.Logger, engine: str) -> tuple[Asked | None, int]:
    """`asked` and `report_every`, for a plugin: what is wrong with them is logged, and the engine's routing stays."""
    try:
        return asked(), report_every()
    except ValueError as error:
        if multiprocessing.parent_process() is None:  # every process of the engine comes here: one line is enough
            logger.error("dmoe: %s; routing stays %s's own", error, engine)
        return None, 0


class Counts:
    """Sums over the blocks that a layer routed, kept on its device; adding to them waits for nothing and can be captured.

    sums: int64 [3]: blocks, distinct experts that their tokens were routed to, and experts in their coresets.
    """

    NAMES = ("blocks", "unique_experts", "coreset_experts")

    def __init__(self, device):
        self.sums = torch.zeros(3, dtype=torch.int64, device=device)

    def add(self, routed: RoutingResult, routing: BlockRouting, block_offsets=None) -> None:
        """Of blocks cut every `block_size` tokens, or at `block_offsets`."""
        n_blocks, experts = routed.coreset_sizes.shape[0], routing.num_experts
        token = torch.arange(routed.topk_ids.shape[0], device=self.sums.device)
        if block_offsets is None:
            block = token // routing.block_size
        else:
            block = torch.searchsorted(block_offsets, token, right=True) - 1
        taken = routed.topk_ids.long() % (experts + 1) + (experts + 1) * block[:, None]  # -1 becomes the last column
        seen = torch.zeros(n_blocks * (experts + 1), dtype=torch.int64, device=self.sums.device)
        unique = seen.index_fill_(0, taken.flatten(), 1).view(n_blocks, experts + 1)[:, :experts].sum()
        self.sums[0] += n_blocks
        self.sums[1] += unique
        self.sums[2] += routed.coreset_sizes.sum()


def tell_counts(logger, counts: list[Counts], in_metrics: bool) -> None:
    """Of the layers' counts: a line with the means per block and, where an engine collects the metrics of its processes, the
    sums as gauges. Waits for the device."""
    sums = sum(one.sums for one in counts).tolist()
    blocks, unique, coreset = sums
    means = unique / max(blocks, 1), coreset / max(blocks, 1)
    logger.info("dmoe: %d blocks routed, %.2f unique experts and %.2f in the coreset of each", blocks, *means)
    if in_metrics:
        for name, value in zip(Counts.NAMES, sums):
            gauge(name).set(value)


@functools.cache
def gauge(name: str):
    """In the files that an engine's /metrics collects."""
    import prometheus_client

    return prometheus_client.Gauge(f"dmoe:{name}", f"{name} since the start", multiprocess_mode="mostrecent")
