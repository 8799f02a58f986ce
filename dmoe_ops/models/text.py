"""Text to tokens and back, by the tokenizer and the chat template of a checkpoint folder."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import torch

from .. import _files
from . import checkpoint

INSTALL = "pip install 'dmoe-ops[text]'"


class TextCodec:
    """folder: of a checkpoint, with tokenizer.json and, where the model was trained to chat, a template in
    chat_template.jinja or under chat_template in tokenizer_config.json. chat: put prompts into the template there is.

    `template` is its source or None. Where tokens can only be shown as numbers, `why_no_text` says what is missing.

    Raises ValueError, one line that names the file, when a file is corrupt.
    """

    def __init__(self, folder: str | Path, *, chat: bool = True) -> None:
        folder = Path(folder)
        self.tokenizer, self.why_no_text = None, None
        self.template, self._special = _template(folder) if chat else (None, {})
        path = folder / "tokenizer.json"
        if not _files.is_file(path):
            self.why_no_text = f"tokenizer.json is missing in {_files.short(folder)}"
            return
        try:
            from tokenizers import Tokenizer
        except ImportError:
            self.why_no_text = f"the package tokenizers is not installed: {INSTALL}"
            return
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # a bare Exception is what tokenizers raises
            raise ValueError(f"{path} is corrupt: {' '.join(str(error).split())}") from None

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """The tokens of a prompt, as the user's turn of a chat where there is a template; or of a chat's messages, each with
        a role (user, assistant) and content, of which only the last counts without a template."""
        if self.tokenizer is None:
            raise ValueError(f"prompts must be token ids: {self.why_no_text}")
        if self.template is None:
            return self.tokenizer.encode(prompt if isinstance(prompt, str) else prompt[-1]["content"]).ids
        return self.tokenizer.encode(self.chat_of(prompt), add_special_tokens=False).ids

    def batch(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids [bsz, T] and prompt_lengths [bsz], both int64, as `generate` takes them."""
        return padded([self.encode(prompt) for prompt in prompts])

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(ids)

    def chat_of(self, prompt: str | list[dict[str, str]]) -> str:
        """What the template makes of one message of the user, or of a chat's, up to where the answer begins."""
        try:
            import jinja2
            import jinja2.ext
            import jinja2.sandbox
        except ImportError:
            raise ValueError(f"the chat template takes the package jinja2: {INSTALL}") from None

        def refuse(message):
            raise jinja2.TemplateError(message)

        # The settings that templates are written for: those of transformers' apply_chat_template.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
        environment.globals.update(
            raise_exception=refuse, strftime_now=lambda form: datetime.datetime.now().strftime(form)
        )
        messages = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        try:
            template = environment.from_string(self.template or "")
            return template.render(messages=messages, add_generation_prompt=True, **self._special)
        except Exception as error:  # the template is a program: it may raise whatever it likes
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"the chat template fails: {why[:400]}") from None


def before(text: str, stops: list[str]) -> tuple[str, bool]:
    """What stands in front of the first stop string, and whether there was one."""
    places = [at for at in (text.find(stop) for stop in stops if stop) if at >= 0]
    return (text[: min(places)], True) if places else (text, False)


class StopStrings:
    """For `generate(stream=…)`: ends a decode once every text has one of the stop strings, or has ended by itself.
    lengths: tokens of the prompts."""

    def __init__(self, codec: TextCodec, stops: list[str], lengths: list[int], eos_id: int | None):
        self.codec, self.stops, self.lengths, self.eos_id = codec, stops, lengths, eos_id
        self.rows: list[list[int]] = []
        self.begin = -1

    def __call__(self, block) -> bool:
        if block.begin <= self.begin or not self.rows:  # the first of another decode
            self.rows = [[] for _ in self.lengths]
        self.begin = block.begin
        for row, ids, length in zip(self.rows, block.tokens.tolist(), self.lengths):
            row += ids[max(0, length - block.begin) :]
        return all(self.eos_id in row or before(self.codec.decode(row), self.stops)[1] for row in self.rows)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [bsz, longest] with zeros behind the shorter rows, and their lengths, int64 [bsz]."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([len(row) for row in rows])


def _template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The chat template, and the special tokens that it may name (bos_token and so on)."""
    path = folder / "tokenizer_config.json"
    config = checkpoint.read_json(path) if _files.is_file(path) else {}
    special = {}
    for name, value in config.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            special[name] = value
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if _files.is_file(file) else config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"{path}: chat_template must be a string or a list of named ones, got {type(template).__name__}"
        )
    return template, special
