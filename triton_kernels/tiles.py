"""Tile sizes of every kernel, per GPU. One table, and one file of the user's own that `dmoe tune` writes.

Every entry says who measured it. What nobody measured was chosen from the resource report
(`python tools/triton_resources.py`: registers, spills, shared memory), and says that. `dmoe tune` measures all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from pathlib import Path

import torch

from ..formats import GROUP, QUANTIZED

UNMEASURED = "not measured; chosen from the resource report (python tools/triton_resources.py); measure with: dmoe tune"


@dataclasses.dataclass(frozen=True)
class Gate:
    """gate_kernel: experts x tokens per program, `hidden` of the sum at a time."""

    experts: int
    tokens: int
    hidden: int
    stages: int
    warps: int


@dataclasses.dataclass(frozen=True)
class Route:
    """route_kernel: tokens at a time, at most 32."""

    tokens: int
    warps: int


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of weights with tokens. rows: rows of the output per tile (of gate and of up each); depth: of the sum at a
    time; per_processor: programs per multiprocessor (dense_up only, whose programs take tiles in turn)."""

    rows: int
    depth: int
    stages: int
    warps: int
    per_processor: int = 1


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity: `launch` looks for it at every call
class Tiles:
    """Tiles of one GPU. dense_blocks: up to how many blocks the dense form serves, see `backend.form_of`; shared_memory:
    bytes that one program may use; processors: how many multiprocessors there are."""

    gate: Gate
    route: Route
    dense_up: Product
    dense_down: Product
    gathered_up: Product
    gathered_down: Product
    dense_blocks: int
    measured_by: str
    shared_memory: int
    processors: int

    def gate_for(self, n_tokens: int, *dtypes: torch.dtype) -> Gate:
        """The tile of the gate: large where there are tokens for all multiprocessors even so, as small ones pass x and the
        weights through the L2 many times. With a float32 operand the product runs in float32, without matrix units: a
        small and shallow tile."""
        if max(dtype.itemsize for dtype in dtypes) > 2:
            return dataclasses.replace(self.gate, hidden=min(self.gate.hidden, 64), stages=2)
        if n_tokens > 6 * self.processors:
            return dataclasses.replace(self.gate, experts=64, tokens=64, hidden=64, warps=8)
        return self.gate

    def fit(self, name: str, tokens: int, dtype: torch.dtype, stored: torch.dtype) -> Product:
        """The tile of a product with `tokens` tokens of `dtype` per tile, its pipeline cut down to the shared memory at
        hand. stored: dtype of the weights; a step over quantised ones stays within a group of columns.

        float32 is there for checks, not for speed: it gets a shallow tile, as its products run without matrix units."""
        product = getattr(self, name)
        size = dtype.itemsize
        if size > 2:
            product = dataclasses.replace(product, depth=min(product.depth, 32), rows=min(product.rows, 64), stages=2)
        if stored in QUANTIZED:
            product = dataclasses.replace(product, depth=min(product.depth, GROUP))
        if tokens >= 128:  # the accumulators of 4 warps would not fit into their registers, nor those of a group's sum
            most = 64 if name.endswith("up") else 128
            rows = min(product.rows, most) if stored in QUANTIZED else product.rows
            product = dataclasses.replace(product, rows=rows, warps=max(product.warps, 8))
        m = product.rows * (2 if name.endswith("up") else 1)
        weight_bits = 4 if stored == torch.uint8 else 8 * stored.itemsize
        stage = product.depth * (m * weight_bits // 8 + tokens * size)
        return dataclasses.replace(product, stages=max(1, min(product.stages, self.shared_memory // stage)))


HOPPER = dict(
    gate=Gate(experts=16, tokens=32, hidden=256, stages=4, warps=4),
    route=Route(tokens=32, warps=16),
    dense_up=Product(rows=32, depth=128, stages=3, warps=4, per_processor=3),
    dense_down=Product(rows=64, depth=128, stages=6, warps=4),
    gathered_up=Product(rows=128, depth=64, stages=4, warps=8),
    gathered_down=Product(rows=256, depth=64, stages=4, warps=8),
    dense_blocks=2,
    measured_by=UNMEASURED,
)
TABLE = {
    "H100": HOPPER,
    "H200": HOPPER,
    "B200": HOPPER,
    "A100": dict(
        gate=Gate(experts=16, tokens=32, hidden=256, stages=4, warps=4),
        route=Route(tokens=32, warps=16),
        dense_up=Product(rows=32, depth=128, stages=3, warps=4, per_processor=2),
        dense_down=Product(rows=64, depth=128, stages=5, warps=4),
        gathered_up=Product(rows=32, depth=64, stages=4, warps=8),
        gathered_down=Product(rows=64, depth=64, stages=4, warps=8),
        dense_blocks=2,
        measured_by=UNMEASURED,
    ),
    # Any other GPU; fits the 64 KB of AMD's CDNA 3 and the 99 KB of NVIDIA's consumer chips.
    "default": dict(
        gate=Gate(experts=16, tokens=32, hidden=128, stages=2, warps=4),
        route=Route(tokens=32, warps=16),
        dense_up=Product(rows=32, depth=64, stages=3, warps=4, per_processor=2),
        dense_down=Product(rows=64, depth=64, stages=3, warps=4),
        gathered_up=Product(rows=32, depth=64, stages=2, warps=4),
        gathered_down=Product(rows=64, depth=64, stages=2, warps=4),
        dense_blocks=2,
        measured_by=UNMEASURED,
    ),
}
KINDS = dict(gate=Gate, route=Route, dense_up=Product, dense_down=Product, gathered_up=Product, gathered_down=Product)


def user_file() -> Path:
    """Where `dmoe tune` keeps what it measured."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dmoe-ops" / "tiles.json"


def for_name(device_name: str, shared_memory: int, processors: int) -> Tiles:
    """The user's own tiles for a GPU of that name, else the table's."""
    entry = _user_table().get(device_name)
    if entry is None:
        entry = next((tiles for name, tiles in TABLE.items() if name in device_name), TABLE["default"])
    return Tiles(**entry, shared_memory=shared_memory, processors=processors)


@functools.lru_cache(maxsize=64)
def for_device(device: torch.device) -> Tiles:
    """The tiles of a device; read once per process."""
    if device.type == "cpu":  # the interpreter; few programs, so that each one takes several tiles
        return for_name("cpu", 1 << 20, 2)
    properties = torch.cuda.get_device_properties(device)
    memory = getattr(properties, "shared_memory_per_block_optin", 64 << 10)
    return for_name(properties.name, memory, properties.multi_processor_count)


@contextlib.contextmanager
def using(tiles: Tiles):
    """These tiles for every device, for as long as they are being measured."""
    global for_device
    before = for_device
    for_device = lambda device: tiles  # noqa: E731
    try:
        yield
    finally:
        for_device = before


def save(device_name: str, entry: dict) -> Path:
    """Keeps tiles (as in TABLE) for a GPU in the user's file."""
    table = _user_table(parse=False)
    table[device_name] = {name: dataclasses.asdict(value) if name in KINDS else value for name, value in entry.items()}
    path = user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    temporary.replace(path)
    for_device.cache_clear()
    return path


def _user_table(parse: bool = True) -> dict:
    path = user_file()
    try:
        table = json.loads(path.read_text())
        return {name: _parse(entry) for name, entry in table.items()} if parse else table
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} does not hold tiles ({error}); delete it or run: dmoe tune") from error


def _parse(entry: dict) -> dict:
    parsed = {name: kind(**entry[name]) for name, kind in KINDS.items()}
    return {**parsed, "dense_blocks": int(entry["dense_blocks"]), "measured_by": str(entry["measured_by"])}
