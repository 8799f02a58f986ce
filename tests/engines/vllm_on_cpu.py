"""vLLM on a CPU: `python vllm_on_cpu.py JOB.json` runs LLM(**job["engine"]) over every batch of job["batches"] (prompts as
token ids) and writes the tokens, and the sum of their log-probabilities, of every answer to job["out"]."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def run(job: dict) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    settings = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=1)
    answers = []
    for batch in job["batches"]:
        outputs = llm.generate([dict(prompt_token_ids=ids) for ids in batch], settings, use_tqdm=False)
        answers.append([(list(o.outputs[0].token_ids), o.outputs[0].cumulative_logprob) for o in outputs])
    Path(job["out"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
