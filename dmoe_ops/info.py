"""`dmoe info`: what this installation can run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys

import torch

from . import __version__, _backends, _library
from .engines import serving

# Of each serving engine, the group of entry points in which it looks for plugins.
PLUGINS = {"sglang": "sglang.srt.plugins", "vllm": "vllm.general_plugins"}


def report() -> str:
    missing = _backends.missing()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = [
        f"dmoe-ops {__version__}, python {platform.python_version()} on {sys.platform} {platform.machine()}",
        f"torch {torch.__version__}, triton {_version('triton')}, {torch.get_num_threads()} CPU threads",
        f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
        *(f"{device} tensors {_used_by(device)}" for device in devices),
        "backends:",
    ]
    for name, backend in _backends.BACKENDS.items():
        what = backend.__doc__.splitlines()[0]
        lines.append(f"  {name:10} {what}: " + (f"not here, {missing[name]}" if name in missing else "ready"))
    if _library._C is not None:
        built = _library._C
        cuda = f"for sm {built.cuda_architectures}" if built.cuda_architectures else f"not built, {built.why_no_cuda}"
        lines.append(
            f"extension: {built.compiler}, torch {built.torch_version}; CPU kernels run as {built.cpu_isa()}; "
            f"CUDA kernels {cuda}"
        )
    lines += ["engines:", *(f"  {name:12} {_engine(name, group)}" for name, group in PLUGINS.items())]
    lines.append(
        f"  transformers {_version('transformers')}; block routing by dmoe_ops.patch or, as it loads, "
        "dmoe_ops.engines.hf_loading.register"
    )
    return "\n".join(lines)


def _engine(name: str, group: str) -> str:
    version = _version(name)
    if version == "not installed":
        version = _version(f"{name}-cpu")  # a build of vLLM for CPUs has its own name
    if version == "not installed":
        return version
    points = importlib.metadata.entry_points(group=group)
    if not any(point.value.startswith("dmoe_ops.") for point in points):
        return f"{version}; its plugin is not registered: this folder was not installed (pip install .)"
    try:
        asked = serving.asked()
    except ValueError as error:
        return f"{version}; its plugin is off: {error}"
    if asked is None:
        return f"{version}; its plugin is off: DMOE_POLICY is not set"
    return f"{version}; its plugin is on: policy {asked.policy}, {json.dumps(asked.overrides)}"


def _used_by(device: str) -> str:
    try:
        return f"use {_backends.name_for(device)} (DMOE_BACKEND={os.environ.get('DMOE_BACKEND', 'auto')})"
    except ValueError as error:  # this report is where one looks for the reason
        return f"are refused: {error}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
