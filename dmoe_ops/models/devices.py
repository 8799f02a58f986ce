"""The device that a model runs on."""

from __future__ import annotations

import torch


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable(device) -> torch.device | None:
    """A device that can hold weights and give them back; None stays None. Raises ValueError for any other."""
    if device is None:
        return None
    try:
        torch.zeros(1, device=device).cpu()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError) as error:
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"device must be one that torch can use here, got {str(device)!r}: {why[:300]}") from None
