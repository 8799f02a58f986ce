"""The kernels of csrc/cuda on the CPU (tests/cpp): built, and called with torch tensors. A call that the emulator finds
fault with (a race, a deadlock, an access out of bounds) raises AssertionError."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
import types
from pathlib import Path

import torch

from dmoe_ops import _backends, _library, reference
from dmoe_ops.formats import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # in the order of dmoe::cuda::Dtype


def structure(name, *groups):
    """A ctypes structure from ("fields of one type", type) pairs."""
    fields = [(field, kind) for names, kind in groups for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


INT, POINTER = ctypes.c_int64, ctypes.c_void_p
Experts = structure(
    "Experts",
    ("tokens hidden intermediate experts top_k shared_intermediate", INT),
    ("dtype", ctypes.c_int32),
    ("x w13 w2 shared_w13 shared_w2 topk_ids topk_weights schedule workspace y", POINTER),
    ("w13_scale w2_scale shared_w13_scale shared_w2_scale expert_map", POINTER),
    ("activation", ctypes.c_int32),
)
Router = structure(
    "Router",
    ("tokens hidden experts n_blocks coreset_width seq_len", INT),
    ("x gate_weight", POINTER),
    ("x_dtype gate_dtype", ctypes.c_int32),
    ("logits expert_bias block_offsets topk_ids topk_weights coreset_ids coreset_sizes schedule expert_map", POINTER),
)
Form = structure(
    "Form", ("cluster two_launches ctas rows stages splits resident", ctypes.c_int32), ("seed", ctypes.c_uint32)
)


def form(cluster=4, two_launches=False, ctas=4, rows=64, stages=3, splits=2, resident=0, seed=0):
    """How a call is launched. resident: thread blocks at a time, 0 for all."""
    return Form(cluster, two_launches, ctas, rows, stages, splits, resident, seed)


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


@functools.cache
def machine(folder: Path) -> Path:
    return _compiled(ROOT / "tests/cpp/emulate.cpp", folder / "emulate.o", ROOT / "csrc", "-O2")


def _compiled(source: Path, target: Path, csrc: Path, *flags: str) -> Path:
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = [f"-I{csrc}", f"-I{ROOT / 'tests/cpp'}"]
    subprocess.run(
        [compiler(), "-std=c++20", *warnings, "-fPIC", *flags, *include, "-c", source, "-o", target], check=True
    )
    return target


def build(folder: Path, source: str = "host.cpp", csrc: Path = ROOT / "csrc", *flags: str) -> ctypes.CDLL:
    """A file of tests/cpp with the emulator, from these sources of the kernels."""
    # The hooks of -fsanitize=thread are the emulator's own, so its library is not linked.
    target = Path(tempfile.mkdtemp(dir=folder)) / source
    objects = [
        _compiled(ROOT / "tests/cpp" / source, target.with_suffix(".o"), csrc, "-O1", "-fsanitize=thread", *flags)
    ]
    library = target.with_suffix(".so")
    link = [compiler(), "-shared", "-Wl,-Bsymbolic,-z,defs", *objects, machine(folder), "-o", library]
    subprocess.run(link, check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def packed(ints, floats):
    return (ctypes.c_int64 * len(ints))(*ints), (ctypes.c_double * len(floats))(*floats)


class Emulator:
    def __init__(self, library: ctypes.CDLL):
        self.library = library
        for name in ("emulate_route", "emulate_schedule", "emulate_experts", "emulate_layers", "refuses_experts"):
            getattr(library, name).restype = ctypes.c_char_p
        for name in ("schedule_words", "workspace_bytes", "router_shared_bytes"):
            getattr(library, name).restype = INT
        library.schedule_words.argtypes = [INT]
        library.cluster_size.argtypes = [INT, ctypes.c_int]
        library.emulate_schedule.argtypes = [POINTER, INT, INT, POINTER, POINTER, ctypes.c_uint32]
        library.totals.argtypes = [ctypes.c_uint64, POINTER]

    @staticmethod
    def _must(problem: bytes | None) -> None:
        assert problem is None, problem.decode()

    def schedule_of(self, experts: int) -> torch.Tensor:
        """Memory for a schedule, filled with 0xFF."""
        return torch.full((self.library.schedule_words(experts),), -1, dtype=torch.int32)

    def used(self, schedule) -> torch.Tensor:
        """The experts that a schedule lists."""
        at = self.library.used_at()
        return schedule[at : at + int(schedule[self.library.count_at()])]

    def experts_form(self, multiprocessors: int, shared_memory: int, **sizes) -> tuple[int, int, int, int]:
        """Rows of a tile, stages, parts of the down phase and bytes of shared memory that the launcher takes."""
        out, args = (INT * 4)(), Experts(**sizes)
        self.library.experts_form(ctypes.byref(args), multiprocessors, INT(shared_memory), out)
        return tuple(out)

    def totals(self, base: int = 0) -> list[int]:
        """Of the last call: bytes fetched ahead, where they begin and end, from `base` on; bytes of weights copied."""
        out = (INT * 4)()
        self.library.totals(base, out)
        return list(out)

    def router(self, logits, bias, offsets, out, schedule, seq_len, x=None, gate=None, expert_map=None) -> Router:
        """logits [tokens, experts]; out: a RoutingResult; offsets int32 or None."""
        return Router(
            *(logits.shape[0], 0 if x is None else x.shape[-1], logits.shape[1]), *out.coreset_ids.shape, seq_len,
            pointer(x), pointer(gate), *(0 if t is None else DTYPES.index(t.dtype) for t in (x, gate)),
            *map(pointer, (logits, bias, offsets, *out, schedule, expert_map)),
        )  # fmt: skip

    def experts(
        self, x, w13, w2, shared_w13, shared_w2, ids, weights, schedule=None, workspace=None, y=None, scales=(None,) * 4,
        expert_map=None, activation="silu",
    ) -> Experts:  # fmt: skip
        """scales: of w13, w2, shared_w13 and shared_w2, where they are float8_e4m3fn."""
        experts = len(w13 if expert_map is None else expert_map)
        shared = 0 if shared_w2 is None else shared_w2.shape[1]
        return Experts(
            *x.shape, w2.shape[2], experts, ids.shape[1], shared, DTYPES.index(x.dtype),
            *map(pointer, (x, w13, w2, shared_w13, shared_w2, ids, weights, schedule, workspace, y, *scales, expert_map)),
            ACTIVATIONS.index(activation),
        )  # fmt: skip

    def workspace_of(self, args: Experts) -> torch.Tensor:
        """Memory for a workspace and 64 bytes more, all 0xFF, which are NaN."""
        return torch.full((self.library.workspace_bytes(ctypes.byref(args)) + 64,), 255, dtype=torch.uint8)

    def run_route(self, args: Router, routing, how: Form) -> None:
        self.run_packed_route(args, *_library.packed_routing(routing), how)

    def run_packed_route(self, args: Router, ints, floats, how: Form) -> None:
        self._must(self.library.emulate_route(ctypes.byref(args), *packed(ints, floats), ctypes.byref(how)))

    def run_schedule(self, topk_ids, experts: int, out, seed=0, expert_map=None) -> None:
        arguments = pointer(topk_ids), topk_ids.numel(), experts, pointer(expert_map), pointer(out), seed
        self._must(self.library.emulate_schedule(*arguments))

    def run_experts(self, args: Experts, scheduled: bool, how: Form) -> None:
        self._must(self.library.emulate_experts(ctypes.byref(args), scheduled, ctypes.byref(how)))

    def run_layers(self, routers: list[Router], experts: list[Experts], routing, how: Form) -> None:
        n = len(routers)
        many = (Router * n)(*routers), (Experts * n)(*experts)
        self._must(self.library.emulate_layers(*many, n, *packed(*_library.packed_routing(routing)), ctypes.byref(how)))


def outputs(tokens: int, n_blocks: int, routing) -> reference.RoutingResult:
    """Of block_route, filled with what a kernel has to overwrite."""
    return reference.RoutingResult(
        torch.full((tokens, routing.top_k), -77, dtype=torch.int32),
        torch.full((tokens, routing.top_k), torch.nan),
        torch.full((n_blocks, routing.coreset_width), -77, dtype=torch.int32),
        torch.full((n_blocks,), -77, dtype=torch.int32),
    )


class Backend:
    """dmoe_ops._backends.Cuda on the CPU: its own code as far as the launches, which the emulator then runs."""

    def __init__(self, emulator: Emulator, how: Form):
        self.emulator, self.how = emulator, how

    def install(self, monkeypatch) -> None:
        """For one test: DMOE_BACKEND=cuda serves tensors of the CPU."""
        call = self.emulator.library

        def workspace_bytes(tokens, hidden, inner, shared, experts, top_k):
            return call.workspace_bytes(ctypes.byref(Experts(tokens, hidden, inner, experts, top_k, shared)))

        rules = types.SimpleNamespace(
            cuda_router_refuses=lambda *_: None,  # the emulator's calls refuse by the same rules
            cuda_experts_refuses=lambda *_: None,
            cuda_schedule_words=call.schedule_words,
            cuda_workspace_bytes=lambda *sizes: call.workspace_bytes(
                ctypes.byref(Experts(*sizes[:3], *sizes[4:], sizes[3]))
            ),
        )
        monkeypatch.setenv("DMOE_BACKEND", "cuda")
        monkeypatch.setattr(_backends, "_C", rules)
        monkeypatch.setattr(_backends, "_has_cuda_experts", lambda device: True)
        monkeypatch.setattr(_backends.Cuda, "unavailable_reason", staticmethod(lambda device: None))
        monkeypatch.setattr(_backends.Cuda, "block_route", staticmethod(self.block_route))
        ops = types.SimpleNamespace(_gate_route_out=self.gate_route_out, _block_dense_out=self.block_dense_out)
        fake = types.SimpleNamespace(dmoe=ops)
        monkeypatch.setattr(_backends, "torch", with_attributes(torch, ops=fake))

    def block_route(self, logits, bias, offsets, seq_len, routing, out) -> None:
        args = self.emulator.router(logits, bias, offsets, out, None, seq_len)
        self.emulator.run_route(args, routing, self.how)

    def gate_route_out(self, x, gate, bias, offsets, seq_len, ints, floats, logits, *rest) -> None:
        out = reference.RoutingResult(*rest[:4])
        schedule, expert_map = rest[4:]
        args = self.emulator.router(logits, bias, offsets, out, schedule, seq_len, x, gate, expert_map)
        self.emulator.run_packed_route(args, ints, floats, self.how)

    def block_dense_out(self, x, w13, w2, shared_w13, shared_w2, *rest) -> None:
        *scales, expert_map, activation, ids, weights, schedule, workspace, scheduled, y = rest
        tensors = (x, w13, w2, shared_w13, shared_w2, ids, weights, schedule, workspace, y)
        args = self.emulator.experts(*tensors, scales, expert_map, activation)
        self.emulator.run_experts(args, scheduled, self.how)


def with_attributes(module, **attributes):
    """A module as it is, but for these."""
    fake = types.ModuleType(module.__name__)
    fake.__getattr__ = lambda name: getattr(module, name)
    fake.__dict__.update(attributes)
    return fake
