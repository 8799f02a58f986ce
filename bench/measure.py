"""Runs the contenders of `route`, `experts` and `layer`: checks each against the fp32 reference, then times them."""

from __future__ import annotations

import dataclasses
import functools
import sys

import torch

import dmoe_ops

from .. import reference
from ..routing import RoutingResult
from . import peers, results, roofline, timing
from .cases import DTYPES, FORMS, Case, Weights

OURS = "dmoe_ops"
# An output may be this many times as far from the fp32 reference as plain torch is in the same dtype (and FLOOR is
# for fp32, where torch's own error is mere luck). Beyond it no speedup is printed.
TOLERANCE, FLOOR = 2.0, 2e-6


class Entry:
    """One contender in one case. functions: one per layer of weights, each giving y (or a RoutingResult)."""

    def __init__(
        self,
        name: str,
        case: Case,
        route: RoutingResult,
        weights: list[Weights],
        functions: list,
        device: str,
        capturable: bool,
    ):
        self.name, self.case, self.unique = name, case, len(used_experts(route))
        self.stored = weights[0].w13.dtype if weights else case.x.dtype
        self.form = weights[0].form if weights else None
        self.output = functions[0]()
        self.contender = timing.Contender(functions, device, capturable)
        self.error = self.allowed = None

    @property
    def key(self) -> str:
        return f"{contender(self.name, self.form)} @ {self.case.label}"


def contender(name: str, form: str | None) -> str:
    """A name that tells quantised weights from plain ones."""
    return name if form is None or form in DTYPES else f"{name} {form}"


def of_row(row: dict) -> str:
    """The contender of a row; rows of older files have no form."""
    return contender(row["impl"], row.get("weights"))


def own_key(row: dict, case: str | None = None) -> str:
    """The key of dmoe_ops with the weights of a row, in its case or another."""
    return f"{contender(OURS, row.get('weights'))} @ {row.get('case') if case is None else case}"


def run(
    out: dict, op: str, groups: list[list[Case]], sets: list[list[Weights]], names: list[str], seconds: float
) -> None:
    """groups: cases that are timed against each other, with each of the sets of weights (`route`: one empty set), one per
    form. Adds rows and absent peers to `out`, whole groups and, after an interrupt, what was timed of the last one."""
    device = out["machine"]["device"]
    for peer in peers.PEERS.values():
        if peer.name in names and not any(peer.takes(weights[0].form) for weights in sets if weights):
            out["absent"][peer.name] = "takes plain weights: add those of --dtype to --weights"
    alone = [name for name in names if name in peers.PEERS and peers.PEERS[name].alone]
    together, built = [name for name in names if name not in alone], {}
    for cases in groups:
        time_group(out, op, cases, sets, together, seconds, built)
    # Once more: what kept the machine from its best at the start may be gone.
    again = roofline.measure_ceilings(device, groups[0][0].x.dtype)._asdict()
    out["ceilings"] = roofline.best(out["ceilings"], again)
    set_floors(out)
    built.clear()  # packed copies
    for name in alone:  # last: what they leave behind would slow the others
        if why := peers.PEERS[name].absent(device):
            out["absent"].setdefault(name, why)
            continue
        fitting = [weights for weights in sets if peers.PEERS[name].takes(weights[0].form)]
        for cases in groups:
            time_group(out, op, cases, fitting, [name], seconds, built, alone=True)


def time_group(
    out: dict,
    op: str,
    cases: list[Case],
    sets: list[list[Weights]],
    names: list[str],
    seconds: float,
    built: dict,
    alone: bool = False,
) -> None:
    """Times dmoe_ops and the named peers against each other. alone: with rests between the runs, and only the peers' rows
    are kept; their ratios are to dmoe_ops in the same rounds."""
    entries = []
    for case in cases:
        route = routed(op, case, sets[0]) if sets else None
        for weights in sets:
            of_case = entries_of(op, case, route, weights, names, out, built)
            check(op, case, route, weights, of_case)
            entries += of_case
    if alone and all(entry.name == OURS for entry in entries):
        return
    contenders = [timing.Rested(entry.contender) if alone else entry.contender for entry in entries]
    label = f"{op}, {len(cases[0].x)} tokens" + (f", {names[0]} alone" if alone else "")
    try:
        timing.interleave(contenders, seconds, label)
    finally:
        if all(len(entry.contender.samples) > 1 for entry in entries):
            out["rows"] += [dict(row, alone=alone) for row in rows(op, entries) if not alone or row["impl"] != OURS]
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


def entries_of(
    op: str, case: Case, route, weights: list[Weights], names: list[str], out: dict, built: dict
) -> list[Entry]:
    """dmoe_ops and the named peers that take such weights; those that can't run are added to out["absent"]. built: what
    was made of the weights so far, by peer and form."""
    device, kernels = out["machine"]["device"], out["machine"]["backend"] != "reference"
    entry = functools.partial(Entry, case=case, route=route, weights=weights, device=device)
    entries = [entry(OURS, functions=calls(op, dmoe_ops, case, route, weights), capturable=kernels)]
    if "reference" in names:
        entries.append(entry("reference", functions=calls(op, reference, case, route, weights), capturable=False))
    for peer in (peers.ROUTE_PEERS if op == "route" else peers.PEERS).values():
        if peer.name not in names or (weights and not peer.takes(weights[0].form)):
            continue
        name, why = peer.name, peer.absent(device)
        if why is None:
            name = contender(peer.name, weights[0].form if weights else None)
            print(f"preparing {name} for {case.label}", file=sys.stderr)
            try:
                functions = peer_calls(op, peer, case, route, weights, built)
                entries.append(entry(peer.name, functions=functions, capturable=peer.capturable))
            except Exception as error:  # whatever a foreign package raises
                first_line = (str(error).strip() or repr(error)).splitlines()[0]
                why = f"failed at {case.label}: {type(error).__name__}: {first_line}"
        if why is not None:
            out["absent"].setdefault(name, why)
    return entries


def calls(op: str, source, case: Case, route: RoutingResult, weights: list[Weights]) -> list:
    """source: dmoe_ops or its reference, which has the same names."""
    if op == "route":
        return [lambda: source.block_route(case.logits, case.expert_bias, routing=case.routing)]
    if op == "experts":
        chosen = dict(topk_ids=route.topk_ids, topk_weights=route.topk_weights)
        return [functools.partial(source.moe_experts, case.x, **w.experts(), **chosen) for w in weights]
    layers = [functools.partial(source.block_moe, case.x, **w._asdict(), routing=case.routing) for w in weights]
    return [lambda layer=layer: layer()[0] for layer in layers]


def peer_calls(
    op: str, peer: peers.Peer, case: Case, route: RoutingResult, weights: list[Weights], built: dict
) -> list:
    if op == "route":
        function = peer.build(case.routing)
        return [lambda: function(case.logits, case.expert_bias)]
    place = peer.name, weights[0].form
    if place not in built:  # once for all cases: some pack a copy of the weights
        built[place] = [peer.build(case.model, w) for w in weights]
    if op == "experts":
        return [lambda f=f: f(case.x, *route[:2]) for f in built[place]]
    layers = [peers.layer(f, w, case.routing) for f, w in zip(built[place], weights)]
    return [lambda f=f: f(case.x) for f in layers]


def check(op: str, case: Case, route: RoutingResult, weights: list[Weights], entries: list[Entry]) -> None:
    """Fills the error and the allowed error of entries of one case, from their first output."""
    if op == "route":
        wanted = dense(route, case.model.num_experts)
        allowed = 1e-5
    else:
        wanted = exact(op, case, weights[0], route)
        allowed = max(FLOOR, TOLERANCE * distance(plain(op, case, weights[0], route), wanted))
    for entry in entries:
        output = dense(entry.output, case.model.num_experts) if op == "route" else entry.output
        entry.error, entry.allowed, entry.output = distance(output, wanted), allowed, None


def exact(op: str, case: Case, weights: Weights, route: RoutingResult, chunk: int = 16) -> torch.Tensor:
    """y [T, H] in fp32, unrounded, from the weights' values. The experts are widened a few at a time, as all of them
    would take gigabytes."""
    x = case.x.float()
    y = torch.zeros_like(x)
    for some in used_experts(route).split(chunk):
        ids = renumbered(route, some, case.model.num_experts)
        y += reference.moe_experts(x, *weights.values(torch.float32, some), ids, route.topk_weights)
    if op == "layer" and weights.shared_w13 is not None:
        y += reference.mlp(x, *weights.values(torch.float32))
    return y


def plain(op: str, case: Case, weights: Weights, route: RoutingResult) -> torch.Tensor:
    """What torch makes of the weights in the dtype of x, by the stock loop; with rounded activations the reference."""
    if weights.activations is not None:
        return calls(op, reference, case, route, [weights])[0]()
    used = used_experts(route)
    w13, w2 = weights.values(case.x.dtype, used)
    model = dataclasses.replace(case.model, num_experts=len(used))
    ids = renumbered(route, used, case.model.num_experts)
    y = peers.PEERS["eager"].build(model, weights._replace(w13=w13, w2=w2))(case.x, ids, route.topk_weights)
    if op == "layer" and weights.shared_w13 is not None:
        y = y + reference.mlp(case.x, *weights.values(case.x.dtype))
    return y


def used_experts(route: RoutingResult) -> torch.Tensor:
    return route.topk_ids[route.topk_ids >= 0].unique()


def renumbered(route: RoutingResult, experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """topk_ids as places in `experts`; -1 where an id is none of them."""
    index = torch.full((num_experts + 1,), -1, dtype=torch.int32, device=experts.device)
    index[experts] = torch.arange(len(experts), dtype=torch.int32, device=experts.device)
    return index[route.topk_ids.long()]  # id -1 reads the last entry, which is -1


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
        work = roofline.work(op, case.model, len(case.x), case.routing.top_k, entry.unique, entry.stored)
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
                weights=entry.form,
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
    alone = dict.fromkeys(row["impl"] for row in out["rows"] if row["alone"])
    if alone:
        print(
            f"\n{', '.join(alone)}: timed apart, beside dmoe_ops alone and with rests; × dmoe_ops is of those rounds."
        )
    print(
        "\nµs: median of the rounds. roofline: floor / median, floor = max(bytes / read bandwidth, FLOPs / GEMM peak)."
        "\n× dmoe_ops: time over that of dmoe_ops in the same case with the same weights, with p10–p90 of the rounds."
        "\nerror: against the fp32 reference on the same (dequantised) weights; refused beyond "
        f"{TOLERANCE:g} times torch's own in this dtype\n(w8a8: the reference's, which rounds activations too)."
    )


def _speedup(row: dict) -> str:
    if row["error"] > row["allowed_error"]:
        return f"refused: error above {row['allowed_error']:.1e}"
    if row["impl"] == OURS:
        return ""
    ratio = row["ratios"].get(own_key(row))
    return "refused: dmoe_ops is off" if ratio is None else results.ratio(ratio)


def _print_across(rows: list[dict]) -> None:
    """What block routing itself gains: a contender's token routing over our dMoE routing. And what quantised weights gain:
    our plain ones over them."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    for case in cases:
        for row in rows:
            ours = own_key(row, case)
            if row["case"] == "token" and case != "token" and ours in row["ratios"]:
                print(f"  {row['key']} / {ours} = {results.ratio(row['ratios'][ours])}")
    plain_rows = [row for row in rows if of_row(row) == OURS]
    for row in plain_rows:
        for form in FORMS:
            quantized = own_key(dict(row, weights=form))
            if quantized in row["ratios"]:
                print(f"  {row['key']} / {quantized} = {results.ratio(row['ratios'][quantized])}")


def wrong(out: dict) -> list[str]:
    """Our own rows whose output is off."""
    return [
        f"{row['key']}, {row['tokens']} tokens: error {row['error']:.1e}, allowed {row['allowed_error']:.1e}"
        for row in out["rows"]
        if row["impl"] == OURS and row["error"] > row["allowed_error"]
    ]
