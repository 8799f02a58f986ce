"""Interleaved timing: every contender once per round, round after round, so that what the machine does meanwhile hits
all of them. Medians and p10–p90 over the rounds; a ratio is taken within each round, so its p10–p90 is its noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

MIN_ROUNDS, MAX_ROUNDS = 7, 200


class Contender:
    """calls: one function per layer of weights, each running one layer. On a GPU one sample is a pass over all layers,
    from one CUDA graph where `capturable`; on the CPU a sample is one call, and the layers take turns."""

    def __init__(self, calls: list[Callable[[], object]], device: str, capturable: bool = True):
        self.calls, self.device, self.graph = calls, device, None
        self.samples: list[float] = []  # seconds per layer, one a round
        if device == "cuda" and capturable:
            self.graph = _capture(self._all_layers)

    def _all_layers(self) -> None:
        for call in self.calls:
            call()

    def run(self, turn: int) -> float:
        """Seconds per layer of sample number `turn`."""
        if self.device != "cuda":
            begin = time.perf_counter()
            self.calls[turn % len(self.calls)]()
            return time.perf_counter() - begin
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay() if self.graph else self._all_layers()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(self.calls)


def _capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisation must not be captured
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


class Rested:
    """A contender that lets the machine come to rest before each run."""

    REST = 0.2  # seconds

    def __init__(self, contender: Contender):
        self.contender, self.samples = contender, contender.samples

    def run(self, turn: int) -> float:
        time.sleep(self.REST)
        return self.contender.run(turn)


def interleave(contenders: list, seconds: float, label: str = "") -> None:
    """Fills the samples of all contenders, in about `seconds`. An interrupt leaves the samples of whole rounds."""
    begin = time.perf_counter()
    for contender in contenders:
        contender.run(0)
    one_round = time.perf_counter() - begin
    take_turns(contenders, min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / one_round))), label)


def take_turns(contenders: list, rounds: int, label: str = "") -> None:
    """`rounds` rounds: adds what run(turn) of each contender returns to its samples."""
    for turn in tqdm(range(rounds), desc=label, unit="round", leave=False, disable=None):
        # Another one begins each round: nobody always follows the same neighbour.
        first = turn % len(contenders)
        order = contenders[first:] + contenders[:first]
        times = [contender.run(turn) for contender in order]
        for contender, taken in zip(order, times):
            contender.samples.append(taken)


def spread(values: list[float]) -> dict[str, float]:
    """median, p10 and p90 of at least two values."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return dict(median=statistics.median(values), p10=deciles[0], p90=deciles[-1])


def ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """`spread` of slower/faster, taken within each round."""
    return spread([a / b for a, b in zip(slower, faster)])
