"""What the commands of `dmoe bench` do with their parsed arguments."""

from __future__ import annotations

import dataclasses
import os
import sys

import torch

from ..models import load
from . import cases, compare, decode, measure, memory, peers, released, report, results, roofline, sweep

INTERRUPTED = 130  # by Ctrl-C, as a shell reports it


def run_op(args) -> int:
    dtype = cases.DTYPES[args.dtype]
    model = prepare(args)
    forms = [] if args.op == "route" else forms_of(args, model)
    try:
        groups = [groups_of(args, model, tokens, dtype) for tokens in args.tokens]
    except ValueError as error:
        args.parser.error(str(error))

    def work(out: dict) -> None:
        out["ceilings"] = roofline.measure_ceilings(args.device, dtype)._asdict()
        sets = make_weights(args, model, forms, out, args.peers) if forms else [[]]
        measure.run(out, args.op, groups, sets, args.peers, args.seconds)

    return measured(args, work, measure.print_rows, lambda out: [f": {line}" for line in measure.wrong(out)])


def run_sweep(args) -> int:
    dtype = cases.DTYPES[args.dtype]
    model = prepare(args)

    def work(out: dict) -> None:
        def fill() -> list[cases.Weights]:
            return make_weights(args, model, [args.dtype], out)[0]

        if not args.no_time:
            out["ceilings"] = roofline.measure_ceilings(args.device, dtype)._asdict()
        timed = None if args.no_time else fill
        sweep.run(out, model, timed, args.blocks, args.min_experts, args.seed, args.seconds, dtype)

    return measured(args, work, sweep.print_rows, lambda out: [f" at {key}" for key in sweep.wrong(out)])


def measured(args, work, show, wrong) -> int:
    """Runs work(out) as `finish` does, then names the wrong outputs that `wrong` finds: exit status 1."""
    out = results.new(args.command_line, args.device, dtype=args.dtype, seed=args.seed, seconds=args.seconds)
    code = finish(args, out, lambda: work(out), show)
    for where in wrong(out):
        print(f"wrong output of dmoe_ops{where}", file=sys.stderr)
        code = code or 1
    return code


def run_decode(args) -> int:
    prepare_machine(args)
    if args.rounds < 2:
        args.parser.error(f"--rounds must be at least 2, got {args.rounds}")
    if args.expert_memory and not args.checkpoint:
        args.parser.error("--expert-memory needs --checkpoint, in whose files the experts stay")
    out = results.new(args.command_line, args.device, dtype=args.dtype, seed=args.seed)
    return finish(args, out, lambda: measure_decode(args, out), decode.print_rows)


def measure_decode(args, out: dict) -> None:
    dtype = cases.DTYPES[args.dtype]
    model, about = decode_model(args, dtype)
    out["settings"]["model"] = about
    generator = torch.Generator().manual_seed(args.seed)
    prompt = torch.randint(model.config.mask_token_id - 1, (1, args.prompt), generator=generator)

    def run(use_graphs: bool = False, gen_length: int = args.gen_length) -> object:
        return model.generate(prompt, gen_length=gen_length, steps=args.steps, eos_id=None, use_graphs=use_graphs)

    if not args.checkpoint:
        target = decode.TARGET_UNIQUE * model.config.num_experts / 256
        model.set_routing("token")
        with torch.no_grad():
            touched = decode.calibrate(model, lambda: run(gen_length=model.config.block_length), target, args.seed)
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
        long = torch.randint(model.config.mask_token_id - 1, (1, args.prefill), generator=generator).to(model.device)
        peer = code and released.prefill(code, model.config, long)
        decode.run_prefill(out, model, args.policies, long, args.rounds, peer)


def decode_model(args, dtype) -> tuple:
    """The model, and what it is in one line."""
    if args.checkpoint:
        if args.expert_memory:
            model = load(args.checkpoint, expert_memory=args.expert_memory)
            return model, f"checkpoint {args.checkpoint}, {args.expert_memory} of experts in memory"
        model = load(args.checkpoint).to(args.device, dtype)
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


def run_memory(args) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.rounds < 2:
        args.parser.error(f"--rounds must be at least 2, got {args.rounds}")
    out = results.new(args.command_line, "cpu", seed=args.seed, model=args.checkpoint)
    options = dict(ahead=args.ahead, resident_bias=args.resident_bias, readers=args.readers)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(100, (1, args.prompt), generator=generator)

    def decode_with(model) -> object:
        return model.generate(ids, gen_length=args.gen_length, steps=args.steps, eos_id=None)

    def work() -> None:
        budgets = args.budgets.split(",")
        memory.run(out, args.checkpoint, args.policies, budgets, args.rounds, decode_with, args.resident, options)

    try:
        return finish(args, out, work, memory.print_rows)
    except (ValueError, OSError) as error:
        args.parser.error(str(error))


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
