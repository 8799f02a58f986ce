"""`dmoe info`: what this installation can run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from . import __version__, _backends, _library


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
    return "\n".join(lines)


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
