"""Checkpoints of the Hugging Face hub, by their name."""

from __future__ import annotations

import re
from pathlib import Path

EVERYTHING = ("*.json", "*.jinja", "*.safetensors")


def folder_of(name, revision: str | None = None, files: tuple[str, ...] = EVERYTHING) -> Path:
    """A folder as it is; for a name "owner/model" that is no folder here, the folder of the hub's cache that holds the
    `files` of that model, fetched where they are missing (HF_HUB_OFFLINE, HF_HOME and HF_TOKEN count).

    Raises ValueError, one line with the name, when huggingface_hub is not installed or the files can't be had.
    """
    if Path(name).is_absolute() or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", str(name)):
        return Path(name)
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{name} is no folder here, and fetching it from the Hugging Face hub takes the package huggingface_hub: "
            "pip install 'dmoe-ops[hub]'"
        ) from None
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(files)))
    except Exception as error:  # a dozen kinds, of several packages: offline, unknown, private, a full disk
        why = " ".join(str(error).split())
        raise ValueError(f"{name} is no folder here, and the Hugging Face hub did not give it: {why[:400]}") from None
