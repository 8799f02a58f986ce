"""dmoe bench: the command line."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

import torch

from ..models.llada2 import LLaDA2ForDiffusion
from ..routing import POLICIES
from . import cases, compare, decode, measure, peers, released, report, results, roofline, sweep

# Interrupted by Ctrl-C, as a shell reports it.
INTERRUPTED = 130


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
    text = (
        "Expert counts and layer times over p = 0.3 to 0.95 and blocks of 8 to 64, beside the paper's tables 3 and 4."
    )
    one = command("sweep", run_sweep, text, "dmoe bench sweep --device cpu --json sweep.json")
    _machine_arguments(one)
    _model_arguments(one)
    one.add_argument("--blocks", type=_positive, default=200, help="calibrated blocks to count experts on")
    one.add_argument("--min-experts", type=_positive, default=16, help="least coreset")
    one.add_argument("--no-time", action="store_true", help="count only")
    text = "Times block-diffusion decoding end to end, one policy against the other, and splits a forward's time."
    one = command("decode", run_decode, text, "dmoe bench decode --device cpu --policies token,dmoe --json decode.json")
    _machine_arguments(one)
    one.add_argument("--model", choices=decode.CONFIGS, default="llada2-mini", help="whose shapes, with random weights")
    one.add_argument("--checkpoint", metavar="FOLDER", help="decode with this checkpoint in place of random weights")
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


def run_op(args) -> int:
    dtype = cases.DTYPES[args.dtype]
    model = prepare(args)
    forms = [] if args.op == "route" else forms_of(args, model)
    try:
        groups = [groups_of(args, model, tokens, dtype) for tokens in args.tokens]
    except ValueError as error:
        args.parser.error(str(error))
    out = results.new(args.command_line, args.device, dtype=args.dtype, seed=args.seed, seconds=args.seconds)

    def work() -> None:
        out["ceilings"] = roofline.measure_ceilings(args.device, dtype)._asdict()
        sets = make_weights(args, model, forms, out, args.peers) if forms else [[]]
        measure.run(out, args.op, groups, sets, args.peers, args.seconds)

    code = finish(args, out, work, measure.print_rows)
    for line in measure.wrong(out):
        print(f"wrong output of dmoe_ops: {line}", file=sys.stderr)
        code = code or 1
    return code


def run_sweep(args) -> int:
    dtype = cases.DTYPES[args.dtype]
    model = prepare(args)
    out = results.new(args.command_line, args.device, dtype=args.dtype, seed=args.seed, seconds=args.seconds)

    def work() -> None:
        def fill() -> list[cases.Weights]:
            return make_weights(args, model, [args.dtype], out)[0]

        if args.no_time:
            fill = None
        else:
            out["ceilings"] = roofline.measure_ceilings(args.device, dtype)._asdict()
        sweep.run(out, model, fill, args.blocks, args.min_experts, args.seed, args.seconds, dtype)

    code = finish(args, out, work, sweep.print_rows)
    for key in sweep.wrong(out):
        print(f"wrong output of dmoe_ops at {key}", file=sys.stderr)
        code = code or 1
    return code


def run_decode(args) -> int:
    prepare_machine(args)
    dtype = cases.DTYPES[args.dtype]
    out = results.new(args.command_line, args.device, dtype=args.dtype, seed=args.seed)
    if args.rounds < 2:
        args.parser.error(f"--rounds must be at least 2, got {args.rounds}")

    def work() -> None:
        model, about = decode_model(args, dtype)
        out["settings"]["model"] = about
        generator = torch.Generator().manual_seed(args.seed)
        prompt = torch.randint(model.config.mask_token_id - 1, (1, args.prompt), generator=generator)

        def run(gen_length: int = args.gen_length) -> object:
            # The stopwatch sees nothing of a graph's replay, and its events can't be read from a capture.
            return model.generate(prompt, gen_length=gen_length, steps=args.steps, eos_id=None, use_graphs=False)

        if not args.checkpoint:
            target = decode.TARGET_UNIQUE * model.config.num_experts / 256
            model.set_routing("token")
            with torch.no_grad():
                touched = decode.calibrate(model, lambda: run(model.config.block_length), target, args.seed)
            out["settings"]["model"] += f"; routers set so that token routing touches {touched:.0f} experts"
        ceilings = roofline.measure_ceilings(args.device, dtype)
        out["ceilings"] = ceilings._asdict()
        out["settings"]["counts"] = decode.counted(model, prompt, args.steps)
        code = released.load(args.released, model) if args.released else None
        peer = code and released.decoder(code, model.config, prompt, args.gen_length, args.steps)
        decode.run(out, model, args.policies, run, args.rounds, peer)
        for row in out["rows"]:
            row.update(decode.floors(model, row["unique"], ceilings.read, ceilings.gemm))
        if args.prefill:
            long = torch.randint(model.config.mask_token_id - 1, (1, args.prefill), generator=generator).to(
                model.device
            )
            peer = code and released.prefill(code, model.config, long)
            decode.run_prefill(out, model, args.policies, long, args.rounds, peer)

    return finish(args, out, work, decode.print_rows)


def decode_model(args, dtype) -> tuple:
    """The model, and what it is in one line."""
    if args.checkpoint:
        model = LLaDA2ForDiffusion.from_pretrained(args.checkpoint).to(args.device, dtype)
        return model, f"checkpoint {args.checkpoint}"
    config = decode.CONFIGS[args.model]
    # A CPU spends seconds on the full vocabulary's head, which block routing does not touch.
    vocab = min(config.vocab_size, args.vocab or (config.vocab_size if args.device == "cuda" else 8192))
    layers = args.layers or config.num_hidden_layers
    while (
        not args.layers and layers > 2 and decode.weight_bytes(config, layers, dtype) > cases.memory_budget(args.device)
    ):
        layers -= 1
    about = f"{args.model}, random weights, {layers} of {config.num_hidden_layers} layers (each of full size)"
    about += "" if vocab == config.vocab_size else f", {vocab} of {config.vocab_size} tokens"
    return decode.random_model(decode.reduced(config, layers, vocab), dtype, args.device, args.seed), about


def run_report(args) -> int:
    try:
        for path in report.run(args.files, args.html):
            print(f"written: {path}")
    except results.BadFile as error:
        args.parser.error(str(error))
    return 0


def run_compare(args) -> int:
    try:
        before, after = results.read(args.before), results.read(args.after)
    except results.BadFile as error:
        args.parser.error(str(error))
    by = args.by or compare.how(before, after)
    if not compare.compare(before, after, by):
        args.parser.error(f"the files have no {by}s in common")
    return compare.run(before, after, by)


def prepare_machine(args) -> None:
    """Device, backend and threads."""
    if args.device == "cuda" and not torch.cuda.is_available():
        args.parser.error("--device cuda: torch sees no CUDA GPU")
    if args.backend:
        os.environ["DMOE_BACKEND"] = args.backend
    try:
        results.backend(args.device)
    except ValueError as error:
        args.parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.seconds <= 0:
        args.parser.error(f"--seconds must be positive, got {args.seconds:g}")


def prepare(args) -> cases.Model:
    """The model with the numbers given in its place, on a settled machine."""
    prepare_machine(args)
    names = dict(
        hidden="hidden", intermediate="intermediate", experts="num_experts", top_k="top_k", groups="n_group",
        kept_groups="topk_group", block_size="block_size", shared="shared",
    )  # fmt: skip
    given = {field: getattr(args, name) for name, field in names.items() if getattr(args, name) is not None}
    model = cases.MODELS[args.model]
    return dataclasses.replace(model, name=f"{model.name} changed", **given) if given else model


def groups_of(args, model: cases.Model, tokens: int, dtype) -> list[cases.Case]:
    """The cases that are timed against each other at one number of tokens."""
    overrides = {name: getattr(args, name) for name in ("top_p", "min_experts") if getattr(args, name) is not None}
    routing = model.routing(args.policy, **overrides)
    common = (tokens, dtype, args.device, args.seed)
    if args.unique:
        made = [cases.forced_case(f"U={unique}", model, routing, tokens, unique, *common[1:]) for unique in args.unique]
    else:
        label = f"dmoe p={routing.top_p:g}" if args.policy == "dmoe" else args.policy
        made = [cases.calibrated_case(label, model, routing, *common)]
    if args.op != "route" and not args.no_baseline and made[0].label != "token":
        made.append(cases.calibrated_case("token", model, model.routing("token"), *common))
    return made


def forms_of(args, model: cases.Model) -> list[str]:
    """What --weights asks for, if this dtype and model have it."""
    forms = args.weights or [args.dtype]
    for form in forms:
        if form in cases.DTYPES and form != args.dtype:
            args.parser.error(f"--weights {form}: --dtype is {args.dtype}")
    if "int4" in forms and (model.hidden % 2 or model.intermediate % 2 or model.shared % 2):
        sizes = f"{model.hidden}, {model.intermediate} and {model.shared}"
        args.parser.error(f"--weights int4: hidden, intermediate and shared size must be even, got {sizes}")
    return forms


def make_weights(args, model: cases.Model, forms: list[str], out: dict, names=()) -> list[list[cases.Weights]]:
    """A set of layers for each form; names: of peers, some of which make copies."""
    dtype, sizes = cases.DTYPES[args.dtype], {form: model.layer_bytes(cases.FORMS[form]) for form in forms}
    copying = [
        peer for peer in peers.PEERS.values() if peer.name in names and peer.copies and not peer.absent(args.device)
    ]
    held = sum(size * (1 + sum(peer.takes(form) for peer in copying)) for form, size in sizes.items())
    count = args.layers or cases.layers_that_fit(model, held, cases.memory_budget(args.device))
    out["settings"]["weights"] = (
        f"{count} of the model's {model.moe_layers} layers take turns, "
        + ", ".join(f"{form} {count * size / 1e9:.1f} GB" for form, size in sizes.items())
        + ("" if count >= model.moe_layers else " (as many as fit)" if not args.layers else " (as asked)")
    )
    made = {form: [] for form in forms}
    for layer in results.progress(range(count), "filling weights", "layer"):
        for form in forms:
            made[form].append(cases.random_weights(model, dtype, args.device, args.seed + layer, form))
    return list(made.values())


def finish(args, out: dict, work, show) -> int:
    """Runs `work`, which fills `out`; shows and writes what there is, after an interrupt too."""
    if args.json:
        try:
            results.check_writable(args.json)
        except results.BadFile as error:
            args.parser.error(str(error))
    try:
        work()
    except KeyboardInterrupt:
        out["complete"] = False
    if out["rows"]:
        show(out)
        results.write(out, args.json)
    if out["complete"]:
        return 0
    kept = f"{len(out['rows'])} rows were finished and are {'in ' + args.json if args.json else 'above'}"
    print(f"interrupted: {kept if out['rows'] else 'nothing was measured yet'}", file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
