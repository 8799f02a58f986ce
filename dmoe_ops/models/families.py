"""The families of models, and the choice between them by what a config.json says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import _files
from . import checkpoint, hub
from .config import OWN, DiffusionConfig
from .llada2 import LLaDA2ForDiffusion
from .llada_moe import LLaDAMoEForDiffusion
from .model import DiffusionModel
from .qwen3_moe import SDARForDiffusion

FAMILIES: tuple[type[DiffusionModel], ...] = (LLaDA2ForDiffusion, SDARForDiffusion, LLaDAMoEForDiffusion)


def load(
    folder: str | Path, policy: str | None = None, *, revision: str | None = None, **options: Any
) -> DiffusionModel:
    """A model from a checkpoint folder or a name on the Hugging Face hub (owner/model), of the family that its config.json
    names.

    policy: None or "own" is the one that the weights were trained for. revision, options, errors: those of
    `DiffusionModel.from_pretrained`, which is what it calls; fields of `BlockRouting` are among them.

    Raises ValueError, one line with the architectures that are known, for any other.
    """
    family = family_of(folder, revision)
    return family.from_pretrained(folder, policy=OWN if policy is None else policy, revision=revision, **options)


def config_of(folder: str | Path, revision: str | None = None) -> DiffusionConfig:
    """The config of a folder or a model on the hub, whatever its family. Errors are those of `load`."""
    return family_of(folder, revision).config_type.from_pretrained(folder, revision=revision)


def family_of(folder: str | Path, revision: str | None = None) -> type[DiffusionModel]:
    path = hub.folder_of(folder, revision, files=("config.json",)) / "config.json"
    values = checkpoint.read_json(path)
    named, kind = values.get("architectures"), values.get("model_type")
    named = [one for one in named if isinstance(one, str)] if isinstance(named, list) else []
    for family in FAMILIES:
        if not set(named).isdisjoint(family.config_type.architectures):
            return family
    # A config of ours or of an older date has no architectures. One that has others is another model, whatever its type.
    if not named and isinstance(kind, str):
        for family in FAMILIES:
            if kind.startswith(family.config_type.model_types):
                return family
    known = ", ".join(f"{f.config_type.architectures[0]} ({f.config_type.family})" for f in FAMILIES)
    said = _files.short(", ".join(named) or str(kind))
    raise ValueError(f"{path}: architectures must be one of {known}, got {said}")
