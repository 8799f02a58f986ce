"""Runs the contenders of `route`, `experts` and `layer`: checks each against the fp32 reference, then times them."""

from __future__ import annotations

import sys

import torch

import dmoe_ops

from .. import reference
from ..routing import RoutingResult
from . import peers, results, roofline, timing
from .cases import Case, Weights

OURS = "dmoe_ops"
# An output may be this many times as far from the fp32 reference as plain torch is in the same dtype (and FLOOR is
# for fp32, where torch's own error is mere luck). Beyond it no speedup is printed.
TOLERANCE, FLOOR = 2.0, 2e-6


class Entry:
    """One contender in one case. functions: one per layer of weights, each giving y (or a RoutingResult)."""

    def __init__(self, name: str, case: Case, route: RoutingResult, functions: list, device: str, capturable: bool):
        self.name, self.case, self.unique = name, case, unique_experts(route.topk_ids)
        self.output = functions[0]()
        self.contender = timing.Contender(functions, device, capturable)
        self.error = self.allowed = None

    @property
    def key(self) -> str:
        return f"{self.name} @ {self.case.label}"


def run(out: dict, op: str, groups: list[list[Case]], weights: list[Weights], names: list[str], seconds: float) -> None:
    """groups: cases that are timed against each other. Adds rows and absent peers to `out`, whole groups and, after an
    interrupt, what was timed of the last one."""
    device = out["machine"]["device"]
    for cases in groups:
        entries = []
        for case in cases:
            route = routed(op, case, weights)
            of_case = entries_of(op, case, route, weights, names, out)
            check(op, case, route, weights, of_case)
            entries += of_case
        label = f"{op}, {cases[0].x.shape[0]} tokens"
        try:
            timing.interleave([entry.contender for entry in entries], seconds, label)
        finally:
            if all(len(entry.contender.samples) > 1 for entry in entries):
                out["rows"] += rows(op, entries)
                set_floors(out)
    # Once more: what kept the machine from its best at the start may be gone.
    out["ceilings"] = roofline.best(out["ceilings"], roofline.measure_ceilings(device, case.x.dtype)._asdict())
    set_floors(out)


def set_floors(out: dict) -> None:
    """Fills what rows owe to the ceilings."""
    ceilings = roofline.Ceilings(**out["ceilings"])
    for row in out["rows"]:
        work = roofline.Work(row["bytes"], row["flops"])
        row["floor_us"], row["bound"] = 1e6 * work.floor(ceilings), work.bound(ceilings)
        row["roofline"] = row["floor_us"] / row["median_us"]


def routed(op: str, case: Case, weights: list[Weights]) -> RoutingResult:
    """The reference's routing of a case."""
    logits = case.logits if op == "route" else case.x.float() @ weights[0].gate_weight.float().T
    return reference.block_route(logits, case.expert_bias, routing=case.routing)


def entries_of(op: str, case: Case, route, weights: list[Weights], names: list[str], out: dict) -> list[Entry]:
    """dmoe_ops and the named peers; those that can't run are added to out["absent"]."""
    device, kernels = out["machine"]["device"], out["machine"]["backend"] != "reference"
    entries = [Entry(OURS, case, route, calls(op, dmoe_ops, case, route, weights), device, kernels)]
    if "reference" in names:
        entries.append(Entry("reference", case, route, calls(op, reference, case, route, weights), device, False))
    for peer in (peers.ROUTE_PEERS if op == "route" else peers.PEERS).values():
        if peer.name not in names:
            continue
        why = peer.absent(device)
        if why is None:
            print(f"preparing {peer.name} for {case.label}", file=sys.stderr)
            try:
                functions = peer_calls(op, peer, case, route, weights)
                entries.append(Entry(peer.name, case, route, functions, device, peer.capturable))
            except Exception as error:  # whatever a foreign package raises
                first_line = (str(error).strip() or repr(error)).splitlines()[0]
                why = f"failed at {case.label}: {type(error).__name__}: {first_line}"
        if why is not None:
            out["absent"].setdefault(peer.name, why)
    return entries


def calls(op: str, source, case: Case, route: RoutingResult, weights: list[Weights]) -> list:
    """source: dmoe_ops or its reference, which has the same names."""
    if op == "route":
        return [lambda: source.block_route(case.logits, case.expert_bias, routing=case.routing)]
    if op == "experts":
        return [lambda w=w: source.moe_experts(case.x, w.w13, w.w2, *route[:2]) for w in weights]
    return [lambda w=w: source.block_moe(case.x, *w, routing=case.routing)[0] for w in weights]


def peer_calls(op: str, peer: peers.Peer, case: Case, route: RoutingResult, weights: list[Weights]) -> list:
    if op == "route":
        function = peer.build(case.routing)
        return [lambda: function(case.logits, case.expert_bias)]
    if op == "experts":
        built = [peer.build(case.model, w) for w in weights]
        return [lambda f=f: f(case.x, *route[:2]) for f in built]
    built = [peers.layer(peer, case.model, w, case.routing) for w in weights]
    return [lambda f=f: f(case.x) for f in built]


def unique_experts(ids: torch.Tensor) -> int:
    return len(ids[ids >= 0].unique())


def check(op: str, case: Case, route: RoutingResult, weights: list[Weights], entries: list[Entry]) -> None:
    """Fills the error and the allowed error of entries of one case, from their first output."""
    if op == "route":
        wanted = dense(route, case.model.num_experts)
        allowed = 1e-5
    else:
        wanted = exact(op, case, weights[0], route)
        # Torch's own error in this dtype: the stock loop on the same routing.
        plain = peers.PEERS["eager"].build(case.model, weights[0])(case.x, *route[:2])
        if op == "layer" and weights[0].shared_w13 is not None:
            plain = plain + reference.mlp(case.x, weights[0].shared_w13, weights[0].shared_w2)
        allowed = max(FLOOR, TOLERANCE * distance(plain, wanted))
    for entry in entries:
        output = dense(entry.output, case.model.num_experts) if op == "route" else entry.output
        entry.error, entry.allowed, entry.output = distance(output, wanted), allowed, None


def exact(op: str, case: Case, weights: Weights, route: RoutingResult, chunk: int = 16) -> torch.Tensor:
    """y [T, H] in fp32, unrounded, from the weights' values. The experts are widened a few at a time, as all of them
    would take gigabytes."""
    x = case.x.float()
    y = torch.zeros_like(x)
    used = route.topk_ids[route.topk_ids >= 0].unique()
    for some in used.split(chunk):
        index = torch.full((case.model.num_experts + 1,), -1, dtype=torch.int32, device=x.device)
        index[some] = torch.arange(len(some), dtype=torch.int32, device=x.device)
        ids = index[route.topk_ids.long()]  # id -1 reads the last entry, which is -1
        y += reference.moe_experts(x, weights.w13[some].float(), weights.w2[some].float(), ids, route.topk_weights)
    if op == "layer" and weights.shared_w13 is not None:
        y += reference.mlp(x, weights.shared_w13, weights.shared_w2)
    return y


def dense(result: RoutingResult, num_experts: int) -> torch.Tensor:
    """Routing weights as a matrix [T, E]: compares the choices of experts as sets."""
    ids = result.topk_ids.long()
    weights = result.topk_weights.float().masked_fill(ids < 0, 0)
    return torch.zeros(len(ids), num_experts, device=ids.device).scatter_add(1, ids.clamp(min=0), weights)


def distance(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖value − wanted‖ / ‖wanted‖; NaN and inf count as infinite."""
    error = ((value.double() - wanted.double()).norm() / wanted.double().norm()).item()
    return error if error == error else float("inf")


def rows(op: str, entries: list[Entry]) -> list[dict]:
    """One row per entry. Times in µs per layer. ratios: its time over every other entry's of the group, by key, with
    the noise (p10, p90); only between entries whose output was right."""
    right = {entry.key: entry for entry in entries if entry.error <= entry.allowed}
    made = []
    for entry in entries:
        case = entry.case
        work = roofline.work(op, case.model, len(case.x), case.routing.top_k, entry.unique, case.x.dtype)
        time = timing.spread(entry.contender.samples)
        ratios = {
            key: timing.ratio(entry.contender.samples, other.contender.samples)
            for key, other in right.items()
            if other is not entry and entry.key in right
        }
        made.append(
            dict(
                op=op,
                model=case.model.name,
                tokens=len(case.x),
                case=case.label,
                impl=entry.name,
                key=entry.key,
                unique=entry.unique,
                median_us=1e6 * time["median"],
                p10_us=1e6 * time["p10"],
                p90_us=1e6 * time["p90"],
                samples=len(entry.contender.samples),
                graph=entry.contender.graph is not None,
                bytes=work.bytes,
                flops=work.flops,
                error=entry.error,
                allowed_error=entry.allowed,
                ratios=ratios,
            )
        )
    return made


def print_rows(out: dict) -> None:
    """A table for each number of tokens; ratios are to dmoe_ops in the same case."""
    results.print_header(out)
    for tokens in dict.fromkeys(row["tokens"] for row in out["rows"]):
        of_tokens = [row for row in out["rows"] if row["tokens"] == tokens]
        header = ["contender", "unique", "µs", "p10–p90", "MB", "GFLOP", "floor µs", "roofline", "error", "× dmoe_ops"]
        lines = [
            [
                row["key"],
                str(row["unique"]),
                results.number(row["median_us"]),
                f"{results.number(row['p10_us'])}–{results.number(row['p90_us'])}",
                results.number(row["bytes"] / 1e6),
                results.number(row["flops"] / 1e9),
                results.number(row["floor_us"]),
                f"{row['roofline']:.2f}",
                f"{row['error']:.1e}",
                _speedup(row),
            ]
            for row in of_tokens
        ]
        print(f"\n{of_tokens[0]['op']}, {of_tokens[0]['model']}, {tokens} tokens, {out['settings']['dtype']}")
        print(results.table(header, lines))
        _print_across(of_tokens)
    print(
        "\nµs: median of the rounds. roofline: floor / median, floor = max(bytes / read bandwidth, FLOPs / GEMM peak)."
        "\n× dmoe_ops: time over that of dmoe_ops in the same case, with p10–p90 of the rounds."
        f"\nerror: against the fp32 reference; refused beyond {TOLERANCE:g} times torch's own in this dtype."
    )


def _speedup(row: dict) -> str:
    if row["error"] > row["allowed_error"]:
        return f"refused: error above {row['allowed_error']:.1e}"
    if row["impl"] == OURS:
        return ""
    ratio = row["ratios"].get(f"{OURS} @ {row['case']}")
    return "refused: dmoe_ops is off" if ratio is None else results.ratio(ratio)


def _print_across(rows: list[dict]) -> None:
    """What block routing itself gains: a contender's token routing over our dMoE routing."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for case in cases:
        for row in rows:
            ratio = row["ratios"].get(f"{OURS} @ {case}")
            if row["case"] == "token" and case != "token" and ratio is not None:
                print(f"  {row['key']} / {OURS} @ {case} = {results.ratio(ratio)}")


def wrong(out: dict) -> list[str]:
    """Our own rows whose output is off."""
    return [
        f"{row['key']}, {row['tokens']} tokens: error {row['error']:.1e}, allowed {row['allowed_error']:.1e}"
        for row in out["rows"]
        if row["impl"] == OURS and row["error"] > row["allowed_error"]
    ]
