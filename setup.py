"""Builds dmoe_ops._C by driving CMakeLists.txt. Where that fails, the package installs all the same and runs on the torch
reference; the reason is printed here and kept in the package for `dmoe info`. DMOE_REQUIRE_EXTENSION=1 makes it an error."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_folder() -> Path | None:
    """torch of the environment that is installed into; an isolated build does not have that on sys.path."""
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations) if spec else []
    folders += [os.path.join(sysconfig.get_path(kind), "torch") for kind in ("purelib", "platlib")]
    return next((Path(f) for f in folders if (Path(f) / "include" / "torch" / "csrc" / "stable").is_dir()), None)


class NotBuilt(Exception):
    """Says why in one line."""


class CMakeBuild(build_ext):
    def run(self) -> None:
        self.reason = None
        super().run()
        # In the wheel's folder, or the source's in an editable installation.
        built = Path(self.get_ext_fullpath("dmoe_ops._C")).resolve()
        keep_reason(built.parent / "_why_no_c.txt", self.reason)
        if not self.reason:
            return
        built.unlink(missing_ok=True)  # of an earlier build, which is not what was asked for now
        if os.environ.get("DMOE_REQUIRE_EXTENSION") == "1":
            raise SystemExit(
                f"dmoe: the extension was not built: {self.reason}\n"
                "dmoe: DMOE_REQUIRE_EXTENSION=0 installs without it, on the torch reference"
            )
        print(f"dmoe: installing without C++ kernels, on the torch reference: {self.reason}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        try:
            self.run_cmake(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (ImportError, OSError, NotBuilt) as error:
            self.reason = " ".join(str(error).split())

    def run_cmake(self, target: Path) -> None:
        import pybind11

        torch = torch_folder()
        if torch is None:
            raise NotBuilt("torch is not installed here, so its headers are missing; install torch >= 2.11 first")
        if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            raise NotBuilt("no C++ compiler was found")
        version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
        # CMake keeps what it once found, so another compiler or torch gets its own folder.
        found = [
            torch,
            sys.executable,
            shutil.which("nvcc"),
            *map(os.environ.get, ("CXX", "CUDACXX", "CUDAARCHS", "DMOE_BUILD_CUDA")),
        ]
        build = Path(self.build_temp).resolve() / hashlib.sha256(repr(found).encode()).hexdigest()[:8]
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        configure = [
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_INCLUDE={torch / 'include'}",
            f"-DTORCH_LIB={torch / 'lib'}",
            f"-DTORCH_VERSION={version.group(1) if version else 'unknown'}",
        ]
        run(["cmake", str(ROOT), *configure], build)
        run(["cmake", "--build", "."], build)


def run(command: list[str], folder: Path) -> None:
    """Passes the output on as it comes. NotBuilt has the first error in it."""
    lines = []
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise NotBuilt(first_error(lines) or f"{command[0]} ended with exit status {process.returncode}")


def first_error(lines: list[str]) -> str | None:
    """The first error that a build's output names. CMake's is the sentence that follows, indented."""
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            below = " ".join(itertools.takewhile(lambda text: text[:1] in " \n", lines[i + 1 :]))
            sentence = re.match(r"(.*?[.:])(\s|$)", " ".join(below.split()))
            return f"CMake: {sentence.group(1)}" if sentence else line.strip()
        if re.search(r"\berror\s*:|undefined reference", line, re.I):
            return line.strip()[:400]
    return None


def keep_reason(file: Path, reason: str | None) -> None:
    if reason:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(reason + "\n")
    else:
        file.unlink(missing_ok=True)


if tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1) and not importlib.util.find_spec("wheel"):
    raise SystemExit(
        f"dmoe: setuptools {setuptools.__version__} makes wheels with the package wheel, which is not installed here: "
        "pip install --upgrade setuptools (or: pip install wheel)"
    )

setup(
    version=re.search(r'__version__ = "([^"]+)"', (ROOT / "dmoe_ops/__init__.py").read_text()).group(1),
    license="Apache-2.0",  # not in pyproject.toml: no one spelling there suits setuptools before and from 77 on
    # The folders triton_kernels/ and bench/ are sub-packages: a top-level module triton_kernels would shadow OpenAI's.
    package_dir={
        "dmoe_ops.triton_kernels": "triton_kernels",
        "dmoe_ops.bench": "bench",
        "dmoe_ops.demo_checkpoint": "examples/miniature/checkpoints/dmoe",
    },
    packages=[
        "dmoe_ops",
        "dmoe_ops.models",
        "dmoe_ops.models.llada2",
        "dmoe_ops.models.llada_moe",
        "dmoe_ops.models.qwen3_moe",
        "dmoe_ops.models.auto_classes",  # copied into checkpoints, imported by transformers alone
        "dmoe_ops.engines",
        "dmoe_ops.eval",
        "dmoe_ops.gpu_check",
        "dmoe_ops.triton_kernels",
        "dmoe_ops.bench",
        "dmoe_ops.demo_checkpoint",  # no code: what `dmoe demo` decodes with
    ],
    package_data={
        "dmoe_ops": ["py.typed"],
        "dmoe_ops.eval": ["data/*.jsonl"],
        "dmoe_ops.demo_checkpoint": ["config.json", "model.safetensors", "tokenizer.json"],
    },
    ext_modules=[Extension("dmoe_ops._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
