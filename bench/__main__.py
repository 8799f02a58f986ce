"""dmoe bench: the command line. What its commands do is in commands.py."""

from __future__ import annotations

import argparse
import sys

import torch

from ..routing import POLICIES
from . import cases, decode, peers
from .commands import run_compare, run_decode, run_memory, run_op, run_report, run_sweep


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="dmoe bench", description="Measures dmoe_ops against its roofline and its peers.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.command_line = "dmoe bench " + " ".join(sys.argv[1:] if argv is None else argv)
    with torch.no_grad():
        return args.function(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sub = parser.add_subparsers(metavar="command", required=True, parser_class=Parser)

    def command(name: str, function, text: str, example: str) -> argparse.ArgumentParser:
        made = sub.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        made.set_defaults(function=function, parser=made)
        return made

    _add_ops(command)
    _add_sweep(command)
    _add_decode(command)
    _add_memory(command)
    _add_files(command)


def _add_ops(command) -> None:
    for op, text in (
        ("route", "Times routing alone: logits to expert ids."),
        ("experts", "Times the routed experts alone, on given expert ids."),
        ("layer", "Times the whole layer, from the gate to the output, the shared expert included."),
    ):
        example = f"dmoe bench {op} --device cpu --model llada2-mini --tokens 32 --unique 15 --peers all"
        one = command(op, run_op, text, example)
        one.set_defaults(op=op)
        _machine_arguments(one)
        _model_arguments(one)
        _case_arguments(one, op)


def _add_sweep(command) -> None:
    text = (
        "Expert counts and layer times over p = 0.3 to 0.95 and blocks of 8 to 64, beside the paper's tables 3 and 4."
    )
    one = command("sweep", run_sweep, text, "dmoe bench sweep --device cpu --json sweep.json")
    _machine_arguments(one)
    _model_arguments(one)
    one.add_argument("--blocks", type=_positive, default=200, help="calibrated blocks to count experts on")
    one.add_argument("--min-experts", type=_positive, default=16, help="least coreset")
    one.add_argument("--no-time", action="store_true", help="count only")


def _add_decode(command) -> None:
    text = "Times block-diffusion decoding end to end, one policy against the other, and splits a forward's time."
    one = command("decode", run_decode, text, "dmoe bench decode --device cpu --policies token,dmoe --json decode.json")
    _machine_arguments(one)
    one.add_argument("--model", choices=decode.CONFIGS, default="llada2-mini", help="whose shapes, with random weights")
    one.add_argument("--checkpoint", metavar="FOLDER", help="decode with this checkpoint in place of random weights")
    one.add_argument(
        "--expert-memory", metavar="SIZE", help="of the checkpoint's experts, as they are stored: 4GB, 25%%"
    )
    one.add_argument("--policies", type=_policies, default=["token", "dmoe"], metavar="NAME,…", help="what to compare")
    one.add_argument("--prompt", type=_positive, default=64, metavar="TOKENS", help="random prompt tokens")
    one.add_argument("--gen-length", type=_positive, default=32, metavar="TOKENS", help="tokens to decode")
    one.add_argument("--steps", type=_positive, default=8, help="denoising steps per block of 32")
    one.add_argument("--rounds", type=_positive, default=5, help="decodes of each policy")
    one.add_argument("--prefill", type=_positive, metavar="TOKENS", help="times a prompt of so many tokens as well")
    one.add_argument("--vocab", type=_positive, metavar="TOKENS", help="tokens of the head (on a CPU 8192, else all)")
    one.add_argument(
        "--released",
        metavar="FOLDER",
        help="the authors' code, whose generate() decodes the same weights (transformers 4.57)",
    )


def _add_memory(command) -> None:
    text = "Times decoding with experts in files: a budget of memory against speed, hits and bytes read."
    example = "dmoe bench memory FOLDER --budgets 1.3W,2W --resident --json memory.json"
    one = command("memory", run_memory, text, example)
    one.add_argument("checkpoint", metavar="FOLDER", help="of a LLaDA2 (tools/random_checkpoint.py makes random ones)")
    one.add_argument(
        "--budgets", default="0.57W,1.3W,2W", metavar="SIZE,…", help='"4GB", "25%%", or "1.3W" of a forward\'s'
    )
    one.add_argument("--resident", action="store_true", help="beside all experts in memory")
    one.add_argument("--policies", type=_policies, default=["dmoe"], metavar="NAME,…", help="one after the other")
    one.add_argument("--prompt", type=_positive, default=64, metavar="TOKENS", help="random prompt tokens")
    one.add_argument("--gen-length", type=_positive, default=64, metavar="TOKENS", help="tokens to decode")
    one.add_argument("--steps", type=_positive, default=8, help="denoising steps per block")
    one.add_argument("--rounds", type=_positive, default=5, help="decodes of each contender")
    one.add_argument("--ahead", choices=("previous", "gate"), help="read ahead by the next layer's last visit or gate")
    one.add_argument("--resident-bias", type=float, default=0.0, metavar="B", help="prefer experts that are in memory")
    one.add_argument("--readers", type=_positive, default=2, help="threads that read")
    one.add_argument("--threads", type=_positive, help="CPU threads; without it torch's own choice")
    one.add_argument("--seed", type=int, default=0, help="of the prompt")
    one.add_argument("--json", metavar="FILE", help="write the results here")


def _add_files(command) -> None:
    text = "Draws results: one HTML page that needs nothing else, and PNGs beside it. Needs matplotlib."
    one = command("report", run_report, text, "dmoe bench report layer.json sweep.json --html report.html")
    one.add_argument("files", nargs="+", metavar="FILE", help="results written by --json")
    one.add_argument("--html", default="report.html", metavar="FILE", help="the page to write")

    text = "Says what changed from one result to another. Exit status 1: dmoe_ops became slower beyond the noise."
    one = command("compare", run_compare, text, "dmoe bench compare before.json after.json")
    one.add_argument("before", metavar="BEFORE", help="results written by --json")
    one.add_argument("after", metavar="AFTER", help="results of the same command")
    one.add_argument(
        "--by", choices=("time", "ratio"), help="times, or ratios to the peers; by default times on one machine"
    )


def _machine_arguments(parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where to run")
    parser.add_argument("--dtype", choices=cases.DTYPES, default="bf16", help="of weights and activations")
    parser.add_argument("--backend", help="of dmoe_ops: auto, reference, cpp, triton or cuda (sets DMOE_BACKEND)")
    parser.add_argument("--threads", type=_positive, help="CPU threads; without it torch's own choice")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and weights")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each number of tokens")
    parser.add_argument("--layers", type=_positive, help="layers of weights that take turns; without it as many as fit")
    parser.add_argument("--json", metavar="FILE", help="write the results here")


def _model_arguments(parser) -> None:
    parser.add_argument("--model", choices=cases.MODELS, default="llada2-mini", help="whose shapes")
    for name, text in (
        ("hidden", "hidden size H"),
        ("intermediate", "intermediate size I of an expert"),
        ("experts", "experts E"),
        ("top-k", "experts per token"),
        ("groups", "expert groups"),
        ("kept-groups", "groups a token may use"),
        ("block-size", "tokens per block"),
    ):
        parser.add_argument(f"--{name}", type=_positive, help=f"{text}, in place of the model's")
    parser.add_argument("--shared", type=int, help="I of the shared expert (0: none), in place of the model's")


def _case_arguments(parser, op: str) -> None:
    parser.add_argument("--tokens", type=_positives, default=[32], metavar="T,…", help="tokens per call")
    parser.add_argument("--policy", choices=POLICIES, default="dmoe", help="routing policy, on the calibrated workload")
    parser.add_argument("--top-p", type=float, help="threshold p of dmoe, in place of 0.6")
    parser.add_argument("--min-experts", type=int, help="least coreset of dmoe, in place of 16")
    parser.add_argument(
        "--unique",
        type=_positives,
        metavar="N,…",
        help="force the routed unique count",
    )
    known = [*(peers.ROUTE_PEERS if op == "route" else peers.PEERS), "reference"]
    parser.add_argument(
        "--peers",
        type=lambda text: _peers(text, known),
        default="torch" if op == "route" else "eager,grouped_mm",
        metavar="NAME,…",
        help=f"all (but reference, which is slow), none, or some of {', '.join(known)}",
    )
    if op == "route":
        return
    parser.add_argument(
        "--no-baseline",
        action="store_true",
        help="leave out token routing on the calibrated workload",
    )
    parser.add_argument(
        "--weights",
        type=_forms,
        metavar="FORM,…",
        help="how they are stored, timed against each other: --dtype as it is (the default), fp8, int8, int4, or w8a8 "
        "(int8, activations too)",
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _policies(text: str) -> list[str]:
    for name in text.split(","):
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"{name!r} is no policy; there are {', '.join(POLICIES)}")
    return text.split(",")


def _positives(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _forms(text: str) -> list[str]:
    for name in text.split(","):
        if name not in cases.FORMS:
            raise argparse.ArgumentTypeError(f"{name!r} is no form of weights; there are {', '.join(cases.FORMS)}")
    return list(dict.fromkeys(text.split(",")))


def _peers(text: str, known: list[str]) -> list[str]:
    if text in ("all", "none"):
        return [name for name in known if name != "reference"] if text == "all" else []
    for name in text.split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is no peer; there are {', '.join(known)}")
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
