"""The launches of a call, found out at the first call and repeated at the next ones.

What precedes a launch (tiles, grids, scratch) and what Triton adds to it (binding arguments, specialising on them, looking
for the kernel) follows from shapes, dtypes and settings, and takes the host longer than the kernels take the GPU. So a
function under `repeated` runs once for each of these; after that its kernels are launched with this call's addresses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import threading

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .._checks import flat, kinds
from . import tiles

# Of the versions whose launches have been compared (tests/test_triton_launch.py, tests/gpu). AMD's kernels are specialised
# on the sizes of storages too, which nobody keeps equal here.
COMPARED = triton.__version__.startswith(("3.6.", "3.8."))
REPEATS = COMPARED and torch.version.hip is None and not knobs.runtime.interpret
SCRATCH_ALIGNMENT = 512
ALLOCATIONS = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty}
MAX_PLANS = 1024

_plans: dict[tuple, Plan | None] = {}
_recording = threading.Lock()


def repeated(function):
    """For a function of tensors, tuples of tensors, None and settings that allocates scratch and launches kernels. What it
    launches may depend on no more than the settings, and shapes, strides, dtypes and devices of the tensors; one that calls
    other ops of torch is found out, and called every time."""

    @functools.wraps(function)
    def run(*args):
        if not REPEATS:
            return function(*args)
        values = flat(args)
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        addresses = [tensor.data_ptr() for tensor in tensors]
        # Both rare: another specialisation, and arguments that a plan could not tell apart.
        if any(address % 16 for address in addresses) or len(set(addresses)) < len(addresses):
            return function(*args)
        device = tensors[0].device
        compiled_for = tiles.for_device(device), knobs.runtime.debug, knobs.compilation.instrumentation_mode
        key = (function, compiled_for, *kinds(values))
        if key not in _plans:
            _record(key, function, args, tensors)
        elif (plan := _plans[key]) and not any(plan.hooks):
            with on(device):
                plan.launch(addresses, device)
        else:
            function(*args)

    return run


def on(device: torch.device):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def early(pdl: bool) -> dict:
    """Options of a launch that may begin before the one in front of it ends, by programmatic dependent launch."""
    return dict(PDL=pdl, **(dict(launch_pdl=True) if pdl else {}))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The launches of one call. scratch: bytes; places: (index, offset) of each address that a kernel takes, where index
    counts the call's tensors and then the scratch; constants: the other arguments; launches: the kernel on its grid, and a
    function that picks its arguments from places and constants; hooks: lists of what Triton would call before launches."""

    scratch: int
    places: list
    constants: list
    launches: list
    hooks: list

    def launch(self, addresses: list[int], device) -> None:
        scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device)
        addresses.append(scratch.data_ptr())
        values = [addresses[index] + offset for index, offset in self.places] + self.constants
        for kernel, pick in self.launches:
            kernel(*pick(values))


class _Recorder(TorchDispatchMode):
    """What one thread launches: (kernel, compiled kernel, grid, arguments by name)."""

    def __init__(self):
        super().__init__()
        self.calls, self.complete = [], True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.complete &= func.overloadpacket in ALLOCATIONS or func.is_view
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        launch, thread = JITFunction.run, threading.get_ident()

        def run(kernel, *args, grid, **kwargs):
            compiled = launch(kernel, *args, grid=grid, **kwargs)
            if threading.get_ident() == thread:
                self.calls.append((kernel, compiled, grid, dict(zip(kernel.arg_names, args)) | kwargs))
            return compiled

        self.restore = launch
        JITFunction.run = run
        return super().__enter__()

    def __exit__(self, *error):
        JITFunction.run = self.restore
        return super().__exit__(*error)


def _record(key, function, args, tensors) -> None:
    """Calls the function, and keeps its plan if it has one."""
    if not _recording.acquire(blocking=False):
        return function(*args)
    try:
        with _Recorder() as recorder:
            function(*args)
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = _plan(recorder.calls, tensors) if recorder.complete else None
    finally:
        _recording.release()


def _plan(calls: list, tensors: list) -> Plan | None:
    """Where the arguments of the recorded launches come from; None if that is not plain to see."""
    if not calls:
        return None
    held = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    slots, scratch, places, constants, launches = {}, 0, [], [], []
    for kernel, compiled, grid, arguments in calls:
        if not isinstance(compiled, CompiledKernel) or not isinstance(grid, tuple):
            return None
        order = []  # of this launch's arguments: places as they are, constants as ~index
        for parameter in kernel.params:
            value = arguments[parameter.name]
            if not isinstance(value, torch.Tensor):
                if not parameter.is_constexpr and not isinstance(value, (int, float, type(None))):
                    return None
                order.append(~len(constants))
                constants.append(value)
                continue
            storage = value.untyped_storage()
            owners = [i for i, tensor in enumerate(tensors) if tensor is value]
            owners = owners or [i for i, address in enumerate(held) if address == storage.data_ptr()]
            if len(owners) > 1:
                return None
            if owners:
                place = owners[0], value.data_ptr() - tensors[owners[0]].data_ptr()
            else:
                if storage.data_ptr() not in slots:
                    slots[storage.data_ptr()] = scratch
                    scratch += -(-storage.nbytes() // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
                place = len(tensors), slots[storage.data_ptr()] + value.data_ptr() - storage.data_ptr()
            order.append(len(places))
            places.append(place)
        launches.append((compiled[(*grid, 1, 1)[:3]], order))
    picks = [(kernel, [i if i >= 0 else len(places) + ~i for i in order]) for kernel, order in launches]
    launches = [(kernel, operator.itemgetter(*order)) for kernel, order in picks]
    return Plan(scratch, places, constants, launches, [kernel.pre_run_hooks for kernel, *_ in calls])
