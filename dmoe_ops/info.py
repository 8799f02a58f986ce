"""`dmoe info`: what this installation can run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from . import __version__, _library


def report() -> str:
    missing = _library.missing()
    chosen = {device: _library.backend(torch.empty(0, device=device)).__name__.lower() for device in _devices()}
    lines = [
        f"dmoe-ops {__version__}, python {platform.python_version()} on {sys.platform} {platform.machine()}",
        f"torch {torch.__version__}, triton {_version('triton')}, {torch.get_num_threads()} CPU threads",
        f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
        f"DMOE_BACKEND={os.environ.get('DMOE_BACKEND', 'auto')}: "
        + ", ".join(f"{device} tensors use {name}" for device, name in chosen.items()),
        "backends:",
    ]
    for name, backend in _library.BACKENDS.items():
        state = f"not here: {missing[name]}" if name in missing else "ready"
        lines.append(f"  {name:10} {state:10} {backend.__doc__.strip().splitlines()[0]}")
    if _library._C is not None:
        extension = _library._C
        lines.append(
            f"extension: {extension.compiler}, built with torch {extension.torch_version}, CPU kernels run as "
            f"{extension.cpu_isa()}, CUDA kernels "
            + (f"for sm {extension.cuda_architectures}" if extension.cuda_architectures else "not built")
        )
    return "\n".join(lines)


def _devices() -> list[str]:
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
