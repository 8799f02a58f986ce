"""SGLang on a machine without a GPU and without its own kernels: what `python sglang_on_cpu.py` runs.

    python sglang_on_cpu.py engine JOB.json     sgl.Engine(**job["engine"]); every batch of job["batches"] is one generate
                                                call; the token ids go to job["out"] as JSON
    python sglang_on_cpu.py rounds JOB.json     the same engine; whenever a line comes in, job["batch"] is one generate
                                                call, whose seconds and tokens go to job["out"], a line of JSON
    python sglang_on_cpu.py serve ARGS...       python -m sglang.launch_server ARGS

The processes of the engine import this file too (multiprocessing's spawn), before anything of SGLang: so the stand-ins below
are everywhere. With DMOE_RECORD=FOLDER, every process saves there what the first layers that it runs were given and gave.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

watching = False  # calls that `watch` makes are not recorded


class Missing(types.ModuleType):
    """A module that can be imported from; what it gives raises when it is called."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args, **kwargs):
            raise RuntimeError(f"{self.__name__}.{name} is a stand-in: this machine has no kernels of SGLang")

        return absent


def stand_in() -> None:
    """sgl_kernel has no build for CPUs among the packages, and PyPI's torchvision is one for CUDA: its ops are not there,
    and it describes them as soon as it is imported."""
    sys.modules["sgl_kernel"] = module = Missing("sgl_kernel")
    module.__spec__ = ModuleSpec("sgl_kernel", None)
    global operators  # a library lives as long as its object
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def take_mask_from_config() -> None:
    """SGLang knows the mask of LLaDA2.0's own vocabulary alone; the checkpoints here have small ones."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def mask_of_folder(result, server_args):
        if result is not None:
            result.mask_id = json.loads((Path(server_args.model_path) / "config.json").read_text())["mask_token_id"]

    HookRegistry.register("sglang.srt.dllm.config.DllmConfig.from_server_args", mask_of_folder, HookType.AFTER)


def record(folder: Path, calls: int = 12) -> None:
    """Saves arguments and results of the first calls of block_moe that the plugin makes, a file per call."""
    from dmoe_ops.engines import sglang as plugin

    block_moe, done = plugin.block_moe, []

    def recording(*args, **kwargs):
        result = block_moe(*args, **kwargs)
        if len(args[0]) and len(done) < calls and not watching:
            done.append(None)
            rank = torch.distributed.get_rank()
            plain = [
                arg if arg is None else arg.detach() for arg in args
            ]  # without what the engine keeps in a parameter
            torch.save((plain, kwargs, tuple(result)), folder / f"rank{rank}-call{len(done):02}.pt")
        return result

    plugin.block_moe = recording


def watch(folder: Path) -> None:
    """What the block itself asks of torch in its first and its second call, to FOLDER/ops-RANK.json; and that fake tensors
    pass, of which nothing can look at a value."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def after(_, runner):
        from torch._subclasses import FakeTensorMode
        from torch.utils._python_dispatch import TorchDispatchMode

        class Log(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                self.names.append(str(op))
                return op(*args, **(kwargs or {}))

        global watching
        watching, seen = True, []
        for block in (module for module in runner.model.modules() if getattr(module, "block_routed", False)):
            x = torch.randn(64, block.hidden_size, dtype=block.experts.w13_weight.dtype)
            for _ in range(2):
                with torch.no_grad(), Log() as log:
                    log.names = []
                    y = block._forward_router_experts(x)
                seen.append(log.names)
            with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = block._forward_router_experts(mode.from_tensor(x))
            assert (fake.shape, fake.dtype) == (y.shape, y.dtype)
        watching = False
        (folder / f"ops-{torch.distributed.get_rank()}.json").write_text(json.dumps(seen))

    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.initialize", after, HookType.AFTER)


def engine(job: dict) -> None:
    import sglang

    model = sglang.Engine(**job["engine"])
    try:
        Path(job["out"]).write_text(json.dumps([answer(model, batch) for batch in job["batches"]]))
    finally:
        model.shutdown()


def rounds(job: dict) -> None:
    import sglang

    model = sglang.Engine(**job["engine"])
    try:
        with open(job["out"], "w", buffering=1) as out:
            out.write("ready\n")
            for _ in sys.stdin:
                begin = time.perf_counter()
                ids = answer(model, job["batch"])
                out.write(json.dumps(dict(seconds=time.perf_counter() - begin, tokens=ids)) + "\n")
    finally:
        model.shutdown()


def answer(model, batch: dict) -> list[list[int]]:
    settings = [
        dict(temperature=0, max_new_tokens=n, ignore_eos=batch.get("ignore_eos", False)) for n in batch["new_tokens"]
    ]
    return [one["output_ids"] for one in model.generate(input_ids=batch["input_ids"], sampling_params=settings)]


stand_in()
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
take_mask_from_config()
if os.environ.get("DMOE_RECORD"):
    record(Path(os.environ["DMOE_RECORD"]))
    watch(Path(os.environ["DMOE_RECORD"]))

if __name__ == "__main__":
    if sys.argv[1] in ("engine", "rounds"):
        dict(engine=engine, rounds=rounds)[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    else:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.launch_server import prepare_server_args, run_server

        run_server(prepare_server_args(sys.argv[2:]))
