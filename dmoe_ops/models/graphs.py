"""Denoising steps as CUDA graphs: captured once per batch bucket and block length, replayed for every prefix.

On the CPU the tests replay what was recorded, op by op; tests/gpu has the graphs themselves.
"""

from __future__ import annotations

import warnings

import torch

from .. import _backends
from .step import Batch, Rule, denoise

CAPACITY = 1024  # tokens of the smallest cache; larger ones double
KEPT = 4  # sets of graphs, each with a cache


def of(model, rule: Rule, sequences: int, capacity: int, wanted: bool | None) -> StepGraphs | None:
    """The graphs for a decode, its own until it gives them to `keep`; captured where none of their kind are kept. None where
    steps run one op after the other. Raises ValueError, with the reason, where `wanted` is True and there can be none."""
    if wanted is False:
        return None
    why = ungraphable_reason(model, rule)
    if why is None:
        bucket, room = 1 << (sequences - 1).bit_length(), CAPACITY
        while room < capacity:
            room *= 2
        key = (bucket, room, rule, model.routing, _weights(model))
        try:
            return _kept(model).pop(key, None) or StepGraphs(model, rule, bucket, room, key)
        except RuntimeError as error:
            why = f"the capture failed: {' '.join(str(error).split())[:300]}"
            if wanted is None:
                warnings.warn(f"steps are not replayed as CUDA graphs: {why}", stacklevel=3)
    if wanted:
        raise ValueError(f"use_graphs must not be True here: {why}")
    return None


def keep(model, graphs: StepGraphs) -> None:
    """For the next decode of their kind."""
    kept = _kept(model)
    kept[graphs.key] = graphs
    while len(kept) > KEPT:
        del kept[next(iter(kept))]


def _kept(model) -> dict[tuple, StepGraphs]:
    return model.__dict__.setdefault("_step_graphs", {})


def ungraphable_reason(model, rule: Rule) -> str | None:
    """Why the steps of a decode can't be captured."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}, and graphs are CUDA's"
    if rule.temperature > 0:
        return "tokens are drawn, from random numbers that a graph would repeat"
    if getattr(model, "expert_memory", None) is not None:
        return "experts are read from files, as the host sees which are used"
    if model.config.sees_all:
        return "each step computes the whole text"
    if hasattr(model, "mesh"):
        return "the model is spread over several ranks"
    if _backends.name_for(str(model.device)) == "reference":
        return "the reference backend reads values back"
    return None


def _weights(model) -> tuple:
    """Where the weights lie: a graph reads them there."""
    return tuple(tensor.data_ptr() for tensor in model.state_dict().values())


class StepGraphs:
    """The steps of up to `sequences` sequences and `capacity` tokens: two graphs, one of them with a block to commit, and a
    third with coresets that were kept, where some are, over one `Batch` and in one memory pool. key: their kind. What they
    read has to be held here: a graph holds no tensor."""

    def __init__(self, model, rule: Rule, sequences: int, capacity: int, key: tuple):
        self.key = key
        keeps = rule.refresh_every is not None
        self.batch = Batch.empty(model, rule.block_length, sequences, capacity, keeps)
        self.batch.begin.fill_(rule.block_length)
        self.rows = torch.arange(sequences, device=model.device)
        pool = torch.cuda.graph_pool_handle()
        self.replays = {}
        for rides, fresh in ((False, True), (True, True), *([(False, False)] if keeps else [])):

            def run(rides=rides, fresh=fresh):
                every = sequences * rule.block_length
                return denoise(model, self.batch, rule, self.rows, every, rides, fixed=True, fresh=fresh)

            # Nothing is active yet, so a run for warming up leaves the batch as it was.
            self.replays[rides, fresh] = capture(run, pool)

    def step(self, rides: bool, fresh: bool = True) -> torch.Tensor:
        """`denoise` of all sequences. The tensor is that of the last replay, too."""
        graph, flags = self.replays[rides, fresh]
        graph.replay()
        return flags


def capture(run, pool) -> tuple:
    """(the graph of what run() launches, what it returned)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled here, and plans made
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = run()
    return graph, out
