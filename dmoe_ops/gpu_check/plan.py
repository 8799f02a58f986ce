"""What is done, in which order: tests side by side, then what measures time, alone; CUDA before Triton, what tells most
first."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

from .steps import Step

PYTHON = (sys.executable, "-m")
RECORD = str(Path(__file__).with_name("record.py"))
# A file's tests by their names, in classes that an illegal access, a hang or a crash ends one by one; "" is the rest.
CLASSES = {
    "routing": r"rout|gate|golden|ragged",
    "races": r"graph|bits|stream|race|replay|poison|scratch|compile|launch|barrier",
    "layers": "",
}
# Limits in seconds: on an H200 with 16 cores races had not ended after 90.
LIMITS = {"cuda": 150.0, "all": 150.0, "triton": 150.0}
TOOLS = ("memcheck", "synccheck", "initcheck", "racecheck")
# What is small enough for Triton's interpreter runs compiled here; a selection, as every case compiles kernels of its own.
SMALL = {
    "small routing": ("tests/test_triton_router.py", "golden or named or hard or ends or scarce or nan"),
    "small experts": ("tests/test_triton_experts.py", ""),
    "small quantised": ("tests/test_triton_quantized.py", ""),
    "small decoder": ("tests/test_decoder_ops.py", "triton"),
    "small steps": ("tests/test_unmasking_ops.py", "triton"),
}
BENCHES = {
    "cuda": {
        "layer": "layer --tokens 32,64 --unique 8,15,32,70 --no-baseline --peers eager --seconds 6",
        "quantised": "experts --tokens 32 --unique 15,70 --weights bf16,fp8 --layers 4 --peers none --seconds 6",
        "decode": "decode --policies token,dmoe --gen-length 256 --rounds 3",
    },
    "triton": {
        "layer beside peers": "layer --tokens 32 --unique 15,70 --peers all --seconds 12",
        "layer": "layer --tokens 128,512,2048 --unique 15,70,256 --no-baseline --peers none --seconds 6",
        "decode": "decode --policies token,dmoe --gen-length 256 --rounds 3",
        "quantised": "experts --tokens 32 --unique 15,70 --weights bf16,fp8,int8,int4 --layers 4 --peers none --seconds 8",
        "experts beside peers": "experts --tokens 32 --unique 15,70 --peers all --no-baseline --seconds 8",
        "routing beside peers": "route --tokens 32,1024 --peers all --seconds 4",
    },
}


def on_gpu(backends: list[str]) -> list[Step]:
    """Everything of `backends`, one after the other."""
    steps = test_steps(Path("tests/gpu"))
    order = [*backends, "all"] if len(backends) < 2 else [backends[0], "all", *backends[1:]]
    result = []
    for backend in order:
        result += [step for step in steps if step.backend == backend]
        if backend == "all":
            continue
        if backend == "triton":
            result += [small_step(name, file, chosen) for name, (file, chosen) in SMALL.items()]
        result += sanitizer_steps(backend)
        result.append(module_step(f"{backend} times", "times", backend, "kernels", "--json", "{json}"))
        result.append(module_step(f"{backend} step", "times", backend, "step", "--json", "{json}"))
        for name, arguments in BENCHES[backend].items():
            result.append(bench_step(f"{backend} bench {name}", backend, f"{arguments} --device cuda", backend))
    return sorted(result, key=lambda step: step.alone)


def test_steps(folder: Path) -> list[Step]:
    """A step per class of each file of tests; a file's name says which backend it is about."""
    steps = []
    for file in sorted(folder.glob("test_*.py")):
        names = re.findall(r"^def (test_\w+)", file.read_text(), re.M)
        backend = next((name for name in ("cuda", "triton") if name in file.stem), "all")
        stem = re.sub(r"^test_|_gpu$", "", file.stem)
        parts = {"": []} if backend != "all" else {", cuda": ["-k", "cuda"], ", the rest": ["-k", "not cuda"]}
        for kind, pattern in CLASSES.items():
            chosen = [f"{file}::{name}" for name in names if re.search(pattern, name)]
            names = [name for name in names if not re.search(pattern, name)]
            if not chosen:
                continue
            for part, about in parts.items():
                steps.append(tests_step(f"{stem} tests: {kind}{part}", backend, [*chosen, *about], LIMITS[backend]))
    return steps


def tests_step(name: str, backend: str, chosen: list[str], seconds: float, env: dict | None = None) -> Step:
    options = ["-v", "-rs", "--tb=short", "-p", "no:cacheprovider"]
    options += ["-o", f"faulthandler_timeout={0.8 * seconds:.0f}"]  # a test that takes so long shows where it stands
    env = {"OMP_NUM_THREADS": "2", **(env or {})}  # many run side by side
    return Step(name, "tests", backend, (sys.executable, RECORD, *chosen, *options), seconds, env)


def small_step(name: str, file: str, chosen: str) -> Step:
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # most of the time is compilation
    return tests_step(f"triton tests: {name}", "triton", [file, *(["-k", chosen] if chosen else []), *spread], 150.0)


def sanitizer() -> str | None:
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def sanitizer_steps(backend: str) -> list[Step]:
    """None without the tool, which `losses` names then. racecheck knows nothing of barriers in clusters and of bulk copies,
    so what it says is information."""
    tool = sanitizer()
    small = (*PYTHON, "dmoe_ops.gpu_check.small", "--backend", backend)
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor is its own allocation
    return [
        Step(
            f"{backend} {name}",
            "sanitizer",
            backend,
            (tool, "--tool", name, "--error-exitcode", "9", *small),
            75.0,
            env,
            information=name == "racecheck",
        )
        for name in (TOOLS if tool else ())
    ]


def module_step(name: str, kind: str, backend: str, module: str, *arguments: str, env: dict | None = None) -> Step:
    command = (*PYTHON, f"dmoe_ops.gpu_check.{module}", "--backend", backend, *arguments)
    return Step(name, kind, backend, command, 90.0, env or {}, alone=kind == "times")


def bench_step(name: str, backend: str, arguments: str, dmoe_backend: str, env: dict | None = None) -> Step:
    command = (*PYTHON, "dmoe_ops", "bench", *arguments.split(), "--backend", dmoe_backend, "--json", "{json}")
    return Step(name, "bench", backend, command, 120.0, env or {}, alone=True)


def rehearsal() -> list[Step]:
    """Every kind of step at its smallest: the emulator and C++ stand in for CUDA, the interpreter for Triton."""
    interpreted = {"TRITON_INTERPRET": "1"}
    emulator = ["tests/test_experts_host.py::test_deterministic"]
    interpreter = ["tests/test_triton_router.py::test_one_token_and_none"]
    sanitize = ("--device", "cpu", "--tokens", "7")
    times = ("--json", "{json}", "--rehearse")
    return [
        tests_step("cuda tests: emulator", "cuda", emulator, 120.0),
        module_step("cuda without a sanitizer", "sanitizer", "cuda", "small", *sanitize),
        module_step("cuda times", "times", "cuda", "kernels", *times),
        module_step("cuda step", "times", "cuda", "step", *times),
        bench_step(
            "cuda bench decode", "cuda", "decode --device cpu --model tiny --gen-length 32 --steps 2 --rounds 2", "cpp"
        ),
        tests_step("triton tests: interpreter", "triton", interpreter, 120.0, interpreted),
        module_step("triton without a sanitizer", "sanitizer", "triton", "small", *sanitize, env=interpreted),
        module_step("triton times", "times", "triton", "kernels", *times, env=interpreted),
    ]
