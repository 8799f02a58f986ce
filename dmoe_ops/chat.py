"""`dmoe chat`: a conversation in the terminal, whose answers appear block by block, as they are unmasked."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import time
import unicodedata

import torch

from .models import DiffusionModel, TextCodec, hub, load
from .models.config import OWN
from .models.devices import default_device, usable
from .models.text import before
from .routing import POLICIES

HELP = """\
/new           forget the conversation
/policy NAME   route by another policy: {policies}
/length N      answers of up to N tokens
/help          this list
/quit          leave (Ctrl-D does, too)
Ctrl-C stops an answer."""
MASK, DIM, PLAIN = "░", "\x1b[2m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", help="a folder or a hub id")
    parser.add_argument("--policy", choices=(OWN, *POLICIES), default=OWN, help="default: what the weights are for")
    parser.add_argument("--gen-length", metavar="N", type=int, default=256, help="tokens of an answer (default: 256)")
    parser.add_argument("--threshold", metavar="P", type=float, default=0.95, help="confidence that unmasks a token")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0: the most probable tokens")
    parser.add_argument("--stop", metavar="TEXT", nargs="+", default=[], help="texts that end an answer")
    parser.add_argument("--raw", action="store_true", help="leave the model's chat template out")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as stored")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--expert-memory", metavar="SIZE", help="keep experts in the files, so much in memory: 4GB, 25%%"
    )


def run(args: argparse.Namespace) -> int:
    try:
        folder = hub.folder_of(args.model)
        codec = TextCodec(folder, chat=not args.raw)
        if codec.why_no_text:
            raise ValueError(codec.why_no_text)
        device = usable(args.device or default_device())
        print(f"loading {folder} on {device}", flush=True)
        options = dict(policy=args.policy, dtype=args.dtype, expert_memory=args.expert_memory)
        model = load(folder, device=device, **options)
    except (ValueError, OSError) as error:
        print(f"dmoe chat: {error}", file=sys.stderr)
        return 2
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() its editing and history)
    print("/help lists the commands.")
    Chat(model, codec, args).loop()
    return 0


class Chat:
    def __init__(self, model: DiffusionModel, codec: TextCodec, args: argparse.Namespace):
        self.model, self.codec = model, codec
        self.policy, self.gen_length, self.stop = args.policy, args.gen_length, args.stop
        self.options = dict(threshold=args.threshold, temperature=args.temperature)
        self.messages: list[dict[str, str]] = []

    def loop(self) -> None:
        while True:
            try:
                line = input("\n> ").strip()
            except KeyboardInterrupt:
                print("\n/quit leaves.", end="")
                continue
            except EOFError:
                print()
                return
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    print(self.command(*line.split()))
                elif line:
                    self.answer(line)
            except (ValueError, OSError) as error:
                print(f"error: {error}")

    def command(self, name: str, *values: str) -> str:
        if name == "/help":
            return HELP.format(policies=", ".join(POLICIES))
        if name == "/new":
            self.messages.clear()
            return "a new conversation"
        if name == "/policy" and len(values) == 1:
            self.model.set_routing(values[0])
            self.policy = values[0]
            return f"policy {self.policy}"
        if name == "/length" and len(values) == 1 and values[0].isdecimal() and int(values[0]):
            self.gen_length = int(values[0])
            return f"answers of up to {self.gen_length} tokens"
        return f"{' '.join((name, *values))} is no command; /help lists them"

    def answer(self, question: str) -> None:
        """Raises ValueError, and forgets the question, where it can't be answered."""
        messages = [*self.messages, dict(role="user", content=question)]
        ids = torch.tensor([self.codec.encode(messages)])
        sampled = dict(generator=torch.Generator(self.model.device)) if self.options["temperature"] else {}
        with contextlib.ExitStack() as stack:
            screen, stopped = Screen(), stack.enter_context(interruptible())
            begin, text, tokens, last = time.perf_counter(), "", 0, None
            # The iterator is closed, and the decode with it, where the loop ends early.
            blocks = self.model.stream(
                ids.to(self.model.device), gen_length=self.gen_length, every_step=True, **self.options, **sampled
            )
            shown: list[int] = []
            steps = 0
            while not stopped:
                try:
                    block = next(blocks)
                except StopIteration as end:
                    last = end.value
                    break
                steps += 1
                at = block.begin - ids.shape[1]
                shown[max(at, 0) :] = block.tokens[0].tolist()[max(-at, 0) :]
                shown = shown[: self.gen_length]
                text, ended = before(self.text(shown), self.stop if block.done else [])
                tokens = len(shown) - shown.count(self.model.config.mask_token_id)
                screen.draw(text, self.status(tokens, steps, time.perf_counter() - begin))
                if ended:
                    break
            if last is not None:
                text, _ = before(self.text(last.tokens[0].tolist()), self.stop)
                tokens = last.stats.tokens
            experts = None if last is None else last.stats.unique_experts_denoising
            screen.draw(text, self.status(tokens, steps, time.perf_counter() - begin, experts, bool(stopped)))
            screen.leave()
        self.messages = [*messages, dict(role="assistant", content=text.replace(MASK, ""))]

    def text(self, ids: list[int]) -> str:
        """Masks are shown as such, and nothing behind the end."""
        config, parts, run = self.model.config, [], []
        for token in [*ids, None]:
            if token is not None and token not in (config.mask_token_id, config.eos_token_id):
                run.append(token)
                continue
            parts.append(self.codec.decode(run) if run else "")
            run = []
            if token == config.eos_token_id:
                break
            parts.append(MASK if token is not None else "")
        return "".join(parts)

    def status(self, tokens: int, steps: int, seconds: float, experts=None, stopped: bool = False) -> str:
        parts = [f"{tokens / seconds:.1f} tokens/s", f"{tokens} tokens in {steps} steps"]
        parts += [f"{experts:.1f} experts per block"] if experts is not None else []
        memory = self.model.expert_memory
        parts += [f"{memory.stats().hit_rate:.0%} of experts in memory"] if memory is not None else []
        parts += [f"policy {self.policy}"] + ["stopped"] * stopped
        return " · ".join(parts)


class Screen:
    """A text and a line of status under it, drawn again in place. What has scrolled off the screen is left alone."""

    def __init__(self, out=None):
        self.out, self.drawn = out or sys.stdout, None
        self.live = self.out.isatty()

    def draw(self, text: str, status: str) -> None:
        if self.live:
            width, height = shutil.get_terminal_size()
            if self.drawn is not None:  # a terminal that was resized has wrapped the lines anew
                up = sum(rows_of(line, width) for line in self.drawn) - 1
                self.out.write("\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J")
            lines = text.split("\n")
            while len(lines) > 1 and sum(rows_of(line, width) for line in lines) > height - 3:
                lines = lines[1:]
            lines[0] = tail(lines[0], width * max(1, height - 3))
            self.drawn = [*lines, status[: width - 1]]
            self.out.write("\n".join(lines) + f"\n{DIM}{self.drawn[-1]}{PLAIN}")
            self.out.flush()
        else:
            self.drawn = [text, status]

    def leave(self) -> None:
        if self.drawn is not None:
            self.out.write("" if self.live else "\n".join(self.drawn))
            self.out.write("\n")


def rows_of(line: str, width: int) -> int:
    """How many rows of the screen a line takes."""
    return max(1, -(-columns(line) // width))


def columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in line)


def tail(line: str, most: int) -> str:
    """The end of a line, in at most so many columns."""
    while columns(line) > most:
        line = line[max(1, (columns(line) - most) // 2) :]
    return line


class interruptible(contextlib.AbstractContextManager):
    """Ctrl-C makes this true, in place of raising anywhere."""

    def __init__(self):
        self.pressed = False

    def __bool__(self) -> bool:
        return self.pressed

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, *_) -> None:
        if self.pressed:  # a second time: no step ends soon enough
            raise KeyboardInterrupt
        self.pressed = True

    def __exit__(self, *error) -> bool:
        signal.signal(signal.SIGINT, self.before)
        return error[0] is KeyboardInterrupt
