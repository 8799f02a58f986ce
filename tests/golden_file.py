"""What the scripts tools/golden_*.py wrote of a family: small models, their logits, and decodes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


class Golden:
    """tensors: by their names in the file; decodes: the settings of each decode."""

    def __init__(self, family: str):
        with safe_open(Path(__file__).parent / "golden" / f"{family}.safetensors", "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            self.about = file.metadata()
        self.decodes = json.loads(self.about["decodes"])

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        prefix = f"{name}.weights."
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def write(self, folder: Path, name: str = "model", **changes) -> Path:
        """A checkpoint of one of the models."""
        (folder / "config.json").write_text(json.dumps(json.loads(self.about[f"{name}.config"]) | changes))
        save_file(self.weights(name), folder / "model.safetensors")
        return folder
