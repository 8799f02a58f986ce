"""Any generative task of lm-eval, answered by a model of this package:

    from lm_eval import simple_evaluate
    from dmoe_ops.eval.harness import LM

    lm = LM.from_pretrained("folder", policy="dmoe", batch=8)
    results = simple_evaluate(model=lm, tasks=["gsm8k"], apply_chat_template=True)

lm-eval has no plugins, so `lm-eval --model` can't know it.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..models import DiffusionModel, TextCodec, hub, load
from ..models.config import OWN
from ..models.text import StopStrings, before, padded
from .grader import INSTALL

try:
    from lm_eval.api import model as lm_eval_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError(f"an LM for lm-eval takes the package {error.name}: {INSTALL}") from None

NO_LIKELIHOOD = (
    "a block-diffusion model has no likelihood of a text from left to right: only tasks with output_type generate_until"
)
SAMPLING = ("top_k", "top_p")
logger = logging.getLogger(__name__)


class LM(lm_eval_model.LM):
    """model, codec: of one checkpoint; batch: requests that are decoded together; gen_length: new tokens at most, in place
    of what each task says (max_gen_toks, else 2048); options: those of `generate`, such as threshold and steps.

    Contexts go in as they are, by the chat template where `simple_evaluate(apply_chat_template=True)` asks for it. An answer
    that reaches its length is counted in `cut_short`, and the log says so.
    """

    def __init__(
        self,
        model: DiffusionModel,
        codec: TextCodec,
        *,
        batch: int = 1,
        gen_length: int | None = None,
        name: str = "dmoe",
        **options: Any,
    ) -> None:
        super().__init__()
        if codec.tokenizer is None:
            raise ValueError(codec.why_no_text)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.model, self.codec, self.batch, self.gen_length, self.options = model, codec, batch, gen_length, options
        self.tokenizer = codec.tokenizer
        self.name, self.templated, self.cut_short = name, False, 0
        self._device = model.device

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        policy: str = OWN,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        expert_memory: str | None = None,
        routing: dict[str, Any] | None = None,
        **options: Any,
    ) -> LM:
        """Reads a folder or a hub id. routing: fields of `BlockRouting` beside the policy; options: those of `LM`."""
        folder = hub.folder_of(folder)
        wanted: dict[str, Any] = dict(dtype=dtype, device=device, expert_memory=expert_memory, **routing or {})
        return cls(load(folder, policy, **wanted), TextCodec(folder), name=str(folder), **options)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The texts that follow the contexts, in front of the first of their stop strings (until)."""
        answers, cut_before = [], self.cut_short
        with tqdm(total=len(requests), unit="answer", disable=True if disable_tqdm else None) as bar:
            for wanted, group in itertools.groupby(requests, key=lambda request: request.args[1]):
                for part in batches(group, self.batch):
                    texts = self._decode([request.args[0] for request in part], dict(wanted))
                    for request, text in zip(part, texts):
                        self.cache_hook.add_partial("generate_until", request.args, text)
                    answers += texts
                    bar.update(len(part))
        if cut := self.cut_short - cut_before:
            logger.warning(
                "%d of %d answers were cut off at their length (max_gen_toks of the task, or gen_length)",
                cut,
                len(answers),
            )
        return answers

    def _decode(self, contexts: list[str], wanted: dict) -> list[str]:
        wanted = normalize_gen_kwargs(wanted, default_max_gen_toks=2048)
        length = self.gen_length or wanted["max_gen_toks"]
        options = dict(temperature=wanted.get("temperature", 0.0))
        if options["temperature"]:
            options.update((name, wanted[name]) for name in SAMPLING if name in wanted)
        stops, eos_id = wanted["until"], self.model.config.eos_token_id
        rows = [self.tokenizer.encode(text, add_special_tokens=not self.templated).ids for text in contexts]
        input_ids, lengths = padded(rows)
        stream = StopStrings(self.codec, stops, lengths.tolist(), eos_id) if stops else None
        decoded = self.model.generate(
            input_ids.to(self.model.device),
            prompt_lengths=lengths,
            gen_length=length,
            stream=stream,
            **{**options, **self.options},
        )
        texts = []
        for tokens in decoded.tokens.tolist():
            ended = eos_id in tokens
            text, stopped = before(self.codec.decode(tokens[: tokens.index(eos_id)] if ended else tokens), stops)
            self.cut_short += not ended and not stopped
            texts.append(text)
        return texts

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        raise NotImplementedError(NO_LIKELIHOOD)

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        raise NotImplementedError(NO_LIKELIHOOD)

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's own, which is the only one there is."""
        return self.codec.template if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.codec.template is None:
            raise ValueError(f"apply_chat_template must be False: {self.name} has no chat template")
        if not add_generation_prompt:
            raise ValueError("a task with gen_prefix can't be answered: the prompt ends where the answer begins")
        self.templated = True
        return self.codec.chat_of(chat_history)


def batches(group, size: int):
    """Lists of up to `size` elements, in order."""
    group = iter(group)
    while part := list(itertools.islice(group, size)):
        yield part
