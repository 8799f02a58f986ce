"""What the compiled kernels hold: compiled here, or read from facts.json, where the results of this machine are kept."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .machine_code import Loop, analyse

HERE = Path(__file__).parent
FILE = HERE / "facts.json"
KINDS = ("tcgen05.mma", "wgmma", "mma.sync", "v_mfma")


@dataclasses.dataclass
class Facts:
    """kind: of its matrix instructions; the first loop is what lies outside all of them. shared: bytes; width: of a warp."""

    registers: int
    shared: int
    warps: int
    width: int
    kind: str
    loops: list[Loop]

    @property
    def instructions(self) -> int:
        """Of all its code."""
        return sum(loop.instructions for loop in self.loops)

    def row(self) -> dict:
        """For JSON; the loops without their addresses."""
        loops = [[getattr(loop, name) for name in COLUMNS] for loop in self.loops]
        return dict(dataclasses.asdict(self), loops=loops)

    @classmethod
    def of_row(cls, row: dict) -> Facts:
        loops = [Loop(0, 0, **dict(zip(COLUMNS, values))) for values in row["loops"]]
        return cls(**{**row, "loops": loops})


COLUMNS = [field.name for field in dataclasses.fields(Loop)][2:]


class Store:
    """Facts by key. Those of `file` are used as they are, others are compiled; without a file all are compiled anew."""

    def __init__(self, file: Path | None = FILE):
        self.kept = json.loads(file.read_text()) if file else {}
        self.used: dict[str, Facts] = {}

    def get(self, key: str, make) -> Facts:
        if key not in self.used:
            self.used[key] = Facts.of_row(self.kept[key]) if key in self.kept else make()
        return self.used[key]

    def triton(self, call, chip) -> Facts:
        """Of a launch recorded by triton_resources, on one of its chips."""
        import triton_resources

        source = triton_resources.source(call)
        said = repr((sorted(source.constants.items()), sorted(source.signature.items()), sorted(call.options.items())))
        digest = hashlib.sha256(said.encode()).hexdigest()[:12]
        return self.get(f"{chip.target.arch}/{call.fn.__name__}/{digest}", lambda: compiled_triton(call, chip))

    def cuda(self, kernel: str, tokens: int, cluster: int, arch: str = "sm_90a") -> Facts:
        """Of probe.cu's kernel of that name."""
        key = f"{arch}/{kernel}/T={tokens},cluster={cluster}"
        return self.get(key, lambda: compiled_cuda(tokens, cluster, arch)[kernel])

    def write(self, file: Path = FILE) -> None:
        rows = {"compilers": compilers()} | {key: facts.row() for key, facts in sorted(self.used.items())}
        file.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(row)}" for k, row in rows.items()) + "\n}\n")

    def differing(self, file: Path = FILE) -> list[str]:
        """Keys whose facts in the file are others than these."""
        kept = json.loads(file.read_text())
        return [key for key, facts in self.used.items() if kept.get(key) != facts.row()]


def compilers() -> dict[str, str]:
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout if shutil.which("nvcc") else ""
    return dict(triton=importlib.metadata.version("triton"), nvcc="".join(re.findall(r"release ([\d.]+)", said)))


def compiled_triton(call, chip) -> Facts:
    import triton_resources

    kernel = triton_resources.compiled(call, chip)
    found = triton_resources.resources(kernel, chip)
    text = kernel.asm.get("amdgcn") or sass(kernel.asm["cubin"])
    instructions = kernel.asm.get("ptx") or text
    return Facts(
        registers=found["registers"],
        shared=found["shared"],
        warps=kernel.metadata.num_warps,
        width=chip.target.warp_size,
        kind=next((kind for kind in KINDS if kind in instructions), ""),
        loops=analyse(text, rare=call.fn.__name__ == "route_kernel"),  # tokens short of experts in the kept groups
    )


def sass(cubin: bytes, function: str | None = None) -> str:
    import triton_resources

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton_resources._tool("cuobjdump"), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)\n", text)
    return text if function is None else parts[parts.index(function) + 1]


@functools.lru_cache(maxsize=8)
def compiled_cuda(tokens: int, cluster: int, arch: str) -> dict[str, Facts]:
    """The kernels of probe.cu by name; needs nvcc."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "probe.cubin"
        command = [nvcc(), "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v", f"-DTOKENS={tokens}"]
        command += [f"-DCLUSTER={cluster}", f"-I{HERE.parents[1] / 'csrc' / 'cuda'}", HERE / "probe.cu", "-o", cubin]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        code = cubin.read_bytes()
    registers = {name: int(n) for name, n in re.findall(r"function '(\w+)'[\s\S]*?Used (\d+) registers", said)}
    return {
        name: Facts(registers[name], 0, warps, 32, "mma.sync", analyse(sass(code, name)))
        for name, warps in (("router", 8), ("experts", 12))
    }


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        raise RuntimeError("facts of a CUDA kernel are not in facts.json, and nvcc is not there to compile it")
    return found
