"""Registers, spills and shared memory of every Triton kernel, compiled ahead of time: no GPU needed.

    python tools/triton_resources.py --target sm_90 --model mini --tokens 32 [--form dense] [--asm FOLDER]

The launchers themselves say what is launched: they run on meta tensors, and their kernel calls are recorded and compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from dmoe_ops.triton_kernels import backend, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dmoe_ops import router
from dmoe_ops._call import LayerCall
from dmoe_ops.formats import FORMATS, ExpertWeights, scale_dtypes, scale_shape, stored_columns
from dmoe_ops.routing import BlockRouting


@dataclasses.dataclass(frozen=True)
class Chip:
    """A compilation target and the GPU that stands for it. shared_memory: bytes that one program may have."""

    target: GPUTarget
    name: str
    shared_memory: int
    processors: int
    pdl: bool = False
    fp8: bool = False


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), "A100", 163 << 10, 108),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), "L40S", 99 << 10, 142, fp8=True),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), "H100", 227 << 10, 132, pdl=True, fp8=True),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), "B200", 227 << 10, 148, pdl=True, fp8=True),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), "RTX PRO 6000", 99 << 10, 188, pdl=True, fp8=True),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), "MI300X", 64 << 10, 304),
    "gfx950": Chip(GPUTarget("hip", "gfx950", 64), "MI355X", 160 << 10, 256),
}
# hidden size, intermediate size, intermediate size of the shared expert, routing
MODELS = {
    "mini": (2048, 512, 512, BlockRouting()),
    "flash": (4096, 1024, 1024, BlockRouting()),
    "flash22": (4096, 1024, 1024, BlockRouting.policy("capacity")),
    "llada_moe": (2048, 1024, 0, BlockRouting(num_experts=64, n_group=1, topk_group=1, score="softmax",
                                             norm_topk_prob=False, routed_scaling_factor=1.0)),
    "sdar": (2048, 768, 0, BlockRouting(num_experts=128, block_size=4, n_group=1, topk_group=1, score="softmax")),
    # No model: the widest rows and blocks that the dense form takes.
    "wide": (2048, 512, 512, BlockRouting(num_experts=512, top_k=32, block_size=128)),
    "gemma": (2816, 704, 704, BlockRouting(num_experts=128, block_size=256, n_group=1, topk_group=1, score="softmax")),
}  # fmt: skip


@dataclasses.dataclass
class Call:
    """One recorded launch."""

    fn: JITFunction
    args: dict
    options: dict
    grid: tuple


@contextlib.contextmanager
def recorded():
    """Collects the launches of Triton kernels in place of making them."""
    calls = []

    def run(self, *args, grid, warmup, **kwargs):
        names = [p.name for p in self.params]
        options = {key: value for key, value in kwargs.items() if key not in names}
        bound = dict(zip(names, args)) | {key: value for key, value in kwargs.items() if key in names}
        assert sorted(bound) == sorted(names), (self.__name__, set(names) ^ set(bound))
        calls.append(Call(self, bound, options, grid))

    with mock.patch.object(JITFunction, "run", run):
        yield calls


def launches(
    chip: Chip,
    model: str,
    n_tokens: int,
    form: str | None = None,
    dtype=torch.bfloat16,
    ops: bool = False,
    stored: str | None = None,
    decoder: bool = False,
    pools: bool = False,
) -> list[Call]:
    """What `block_moe` launches for that many tokens; with `ops`, `block_route`, `moe_experts` and its gradient; with
    `decoder`, the ops beside the products, with LLaDA2.0-mini's heads and vocabulary; with `pools`, `block_route` of blocks
    that share a pool, or have coresets passed in. stored: a quantised format."""
    hidden, intermediate, shared, routing = MODELS[model]
    empty = functools.partial(torch.empty, device="meta", dtype=dtype)
    x, n_experts = empty(n_tokens, hidden), routing.num_experts
    activation = "gelu_tanh" if model == "gemma" else "silu"
    weights = ExpertWeights(**_mlp(stored, dtype, hidden, intermediate, n_experts), activation=activation)
    if shared:
        own = _mlp(stored, dtype, hidden, shared)
        weights = weights._replace(**{f"shared_{name}": value for name, value in own.items()})
    bias = empty(n_experts, dtype=torch.float32)
    logits = empty(n_tokens, n_experts, dtype=torch.float32)
    out = router.allocate_routing(n_tokens, n_tokens, None, routing, x)
    table = tiles.for_name(chip.name, chip.shared_memory, chip.processors)
    with contextlib.ExitStack() as stack:
        calls = stack.enter_context(recorded())
        stack.enter_context(mock.patch.object(tiles, "for_device", lambda device: table))
        stack.enter_context(mock.patch.object(backend, "has_pdl", lambda device: chip.pdl))
        stack.enter_context(mock.patch.object(backend, "has_fp8", lambda device: chip.fp8))
        if form:
            stack.enter_context(mock.patch.object(backend, "form_of", lambda *_: form))
        serve = backend.Triton
        if decoder:
            _decoder_ops(serve, empty, n_tokens, hidden)
        elif pools:
            _pools(serve, logits, bias, n_tokens, routing)
        elif not ops:
            gate_weight = empty(n_experts, hidden)
            serve.block_moe(LayerCall(x, gate_weight, bias, weights, None, n_tokens, routing, x, out, logits))
        else:
            serve.block_route(logits, bias, None, n_tokens, routing, out)
            experts = weights._replace(**{f"shared_{name}": None for name in own}) if shared else weights
            serve.moe_experts(x, experts, out.topk_ids, out.topk_weights, x)
            grads = (x, *(weights[:2] if stored is None else (None, None)), out.topk_weights)
            serve.moe_experts_backward(x, x, experts, out.topk_ids, out.topk_weights, grads)
    return calls


def _pools(serve, logits, bias, n_tokens: int, routing: BlockRouting) -> None:
    ids = functools.partial(torch.empty, dtype=torch.int32, device="meta")
    domains, given = ids(2), ids(-(-n_tokens // routing.block_size), 64)
    for settings, shared in (
        (dict(choose="pool"), (domains, None)),
        (dict(pool_capacity=48), (domains, None)),
        (dict(pool_capacity=48, choose="pool"), (domains, None)),
        ({}, (None, given)),
    ):
        of = dataclasses.replace(routing, **settings)
        out = router.allocate_routing(n_tokens, n_tokens, None, of, logits, *shared)
        serve.block_route(logits, bias, None, n_tokens, of, out, *shared)


def _decoder_ops(serve, empty, n_tokens: int, hidden: int) -> None:
    x, past, size = empty(n_tokens, hidden), empty(1, dtype=torch.int64), 128
    serve.add_rms_norm(x, x, empty(hidden), 1e-6, x, x)
    cache, turn, norm = empty(2, 4, 4096, size), empty(4096, size // 2), empty(size)
    for rows in (None, past):
        qkv, query = empty(1, n_tokens, 24 * size), empty(1, 16, n_tokens, size)
        serve.qk_norm_rope(qkv, norm, norm, 1e-6, turn, turn, rows, past, cache, cache, query)
    for sequences in (1, 8):  # shares of the keys, and none
        query, keys = empty(sequences, 16, n_tokens, size), empty(sequences, 4, 1024, size)
        serve.block_attention(query, keys, keys, past, 32, empty(sequences, n_tokens, 16 * size))
    long = functools.partial(empty, dtype=torch.int64)
    ids, router_logits = empty(19, 1, 64, 8, dtype=torch.int32), empty(19, 1, 64, 256, dtype=torch.float32)
    broken, active = empty(19, 1, dtype=torch.int32), empty(1, dtype=torch.bool)
    text, new = long(1, 1024), empty(1, 1024, dtype=torch.bool)
    serve.count_step(ids, router_logits, past, active, past, past, 32, long(3), long(3), long(3, 19), broken)
    confidence = empty(1, 32, dtype=torch.float32)
    state = (text, new, past, active, past, past)
    serve.unmask(long(1, 32), confidence, broken, past, *state, 156895, 156892, True, 0.95, long(1, 3))
    serve.greedy(empty(n_tokens, 157184), empty(n_tokens, dtype=torch.int64), empty(n_tokens, dtype=torch.float32))


def _mlp(stored: str | None, dtype, hidden: int, intermediate: int, *lead: int) -> dict[str, torch.Tensor]:
    """w13 and w2, and their scales where `stored` names a format."""
    tensors = {}
    for name, rows, columns, halves in (("w13", 2 * intermediate, hidden, 2), ("w2", hidden, intermediate, 1)):
        kind = FORMATS.get(stored, dtype)
        tensors[name] = torch.empty(*lead, rows, stored_columns(kind, columns), dtype=kind, device="meta")
        if stored:
            shape = scale_shape(kind, rows, columns, halves)
            tensors[f"{name}_scale"] = torch.empty(*lead, *shape, dtype=scale_dtypes(kind)[0], device="meta")
    return tensors


def source(call: Call) -> ASTSource:
    """A recorded launch as the just-in-time compiler would specialise it."""
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(call.fn.params):
        value = call.args[param.name]
        free = isinstance(value, int) and not param.do_not_specialize
        if param.is_constexpr or value is None or (free and value == 1):
            signature[param.name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[param.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else _scalar_type(value)
        if isinstance(value, torch.Tensor) or (free and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(call.fn, signature, constants, attributes)


TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def _scalar_type(value) -> str:
    return "fp32" if isinstance(value, float) else "i32"


def compiled(call: Call, chip: Chip):
    return triton.compile(source(call), target=chip.target, options=call.options)


def resources(kernel, chip: Chip) -> dict:
    """registers, spills (a count, 0 when none), shared (bytes) of a compiled kernel."""
    if chip.target.backend == "hip":
        text = kernel.asm["amdgcn"]
        count = {name: int(re.search(rf"\.{name}:\s*(\d+)", text).group(1)) for name in HIP_FIELDS}
        # Spilled scalar registers go to lanes of vector registers, not to memory, unless scratch memory shows up.
        spills = count["vgpr_spill_count"] + count["private_segment_fixed_size"]
        return dict(registers=count["vgpr_count"], spills=spills, shared=kernel.metadata.shared)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        text = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", cubin], capture_output=True, text=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK", "LOCAL"))
    spills = _spilled(kernel.asm["ptx"]) if stack + local else 0  # a stack frame may be there without spills
    return dict(registers=registers, spills=spills, shared=kernel.metadata.shared)


def _spilled(ptx: str) -> int:
    """Bytes that ptxas spills, loads and stores together."""
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    tool = "ptxas-blackwell" if int(re.search(r"\d+", arch).group()) >= 100 else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [_tool(tool), "-v", f"-arch={arch}", path, "-o", Path(folder) / "out"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))


HIP_FIELDS = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")


def _texts(kernel):
    return (text for kind, text in kernel.asm.items() if kind in ("ptx", "amdgcn"))


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def report(
    chip_name: str,
    model: str,
    n_tokens: int,
    form: str | None,
    dtype,
    ops: bool = False,
    asm: str | None = None,
    stored: str | None = None,
    kernels: list[str] | None = None,
    decoder: bool = False,
    pools: bool = False,
):
    """One row (a dict) per distinct kernel."""
    chip, seen = CHIPS[chip_name], set()
    for call in launches(chip, model, n_tokens, form, dtype, ops, stored, decoder, pools):
        if kernels and call.fn.__name__ not in kernels:
            continue
        kernel = compiled(call, chip)
        if kernel.hash in seen:
            continue
        seen.add(kernel.hash)
        row = dict(
            chip=chip_name,
            model=model,
            tokens=n_tokens,
            weights=stored,
            kernel=call.fn.__name__,
            warps=kernel.metadata.num_warps,
        )
        row |= resources(kernel, chip) | dict(limit=chip.shared_memory, grid=list(call.grid))
        row["mma"] = sorted(set(re.findall(r"wgmma|tcgen05\.mma|mma\.sync|v_mfma", "".join(map(str, _texts(kernel))))))
        if asm:
            Path(asm).mkdir(parents=True, exist_ok=True)
            for kind, text in kernel.asm.items():
                if isinstance(text, str):
                    (Path(asm) / f"{chip_name}-{model}-{n_tokens}-{stored or ''}{call.fn.__name__}.{kind}").write_text(
                        text
                    )
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["mini"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[32])
    parser.add_argument("--form", choices=["dense", "gathered"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--weights", nargs="+", choices=FORMATS, default=[None], help="quantised weights (default: of the dtype)"
    )
    parser.add_argument(
        "--ops", action="store_true", help="block_route, moe_experts and its gradient in place of block_moe"
    )
    parser.add_argument(
        "--decoder", action="store_true", help="norms, rotary embedding and the choice of tokens instead"
    )
    parser.add_argument("--pools", action="store_true", help="block_route of blocks that share a pool instead")
    parser.add_argument("--kernels", nargs="+", help="these alone")
    parser.add_argument("--json", action="store_true", help="one row per line, as JSON")
    parser.add_argument("--asm", help="folder for the assembly of each kernel")
    args = parser.parse_args()
    bad = 0
    if not args.json:
        print(
            f"{'chip':7} {'model':9} {'tokens':>6} {'kernel':22} {'warps':>5} {'regs':>5} {'spills':>6} {'shared':>7}"
        )
    for chip, model, tokens, stored in itertools.product(args.target, args.model, args.tokens, args.weights):
        for row in report(
            chip,
            model,
            tokens,
            args.form,
            getattr(torch, args.dtype),
            args.ops,
            args.asm,
            stored,
            args.kernels,
            args.decoder,
            args.pools,
        ):
            bad += row["spills"] > 0 or row["shared"] > row["limit"]
            if args.json:
                print(json.dumps(row), flush=True)
            else:
                print(
                    f"{chip:7} {model:9} {tokens:6} {row['kernel']:22} {row['warps']:5} {row['registers']:5} "
                    f"{row['spills']:6} {row['shared']:7}  {stored or ''}",
                    flush=True,
                )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
