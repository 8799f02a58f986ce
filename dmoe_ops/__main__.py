"""The command `dmoe` (= python -m dmoe_ops)."""

from __future__ import annotations

import argparse
import sys

from . import __version__


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:  # it has its own argument parser, and gets everything behind its name
        from .bench.__main__ import main as bench

        return bench(argv[1:])
    parser = argparse.ArgumentParser(prog="dmoe", description="Block-level expert routing for MoE diffusion LLMs.")
    parser.add_argument("--version", action="version", version=f"dmoe-ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="which backends are there, and why others are not")
    commands.add_parser("bench", help="the microbenchmark: dmoe bench --help", add_help=False)
    demo_parser = commands.add_parser("demo", help="decode a prompt with token routing and with dMoE, side by side")
    from . import chat, convert, decode, demo, tune
    from .eval import command as evaluate

    demo.add_arguments(demo_parser)
    decode.add_arguments(commands.add_parser("decode", help="decode prompts, on several ranks under torchrun"))
    chat.add_arguments(commands.add_parser("chat", help="talk to a model in the terminal"))
    evaluate.add_arguments(
        commands.add_parser("eval", help="accuracy on GSM8K, MATH-500, ARC-C and MMLU, beside the paper's")
    )
    tune.add_arguments(commands.add_parser("tune", help="measure the Triton tile choices on this machine's GPU"))
    convert.add_arguments(
        commands.add_parser("quantize", help="write a checkpoint with its experts in fp8, int8 or int4")
    )

    args = parser.parse_args(argv)
    if args.command == "info":
        from .info import report

        print(report())
        return 0
    modules = dict(chat=chat, demo=demo, decode=decode, eval=evaluate, tune=tune, quantize=convert)
    return modules[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main())
