"""A checkpoint in several files."""

import json

from safetensors.torch import load_file, save_file


def shard(folder, files=3):
    """Splits the checkpoint: tensors in turn into one of the files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
