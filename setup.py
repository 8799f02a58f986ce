"""Builds dmoe_ops._C by driving CMakeLists.txt. Where a tool for that or torch's headers are missing, the package installs
all the same and runs on the torch reference; it says so here and in `dmoe info`."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_folder() -> Path | None:
    """torch of the environment that is installed into; an isolated build does not have that on sys.path."""
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations) if spec else []
    folders += [os.path.join(sysconfig.get_path(kind), "torch") for kind in ("purelib", "platlib")]
    return next((Path(f) for f in folders if (Path(f) / "include" / "torch" / "csrc" / "stable").is_dir()), None)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            self.run_cmake(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if os.environ.get("DMOE_REQUIRE_EXTENSION") == "1":
                raise
            print(f"dmoe: installing without C++ kernels, on the torch reference: {error}", file=sys.stderr, flush=True)

    def run_cmake(self, target: Path) -> None:
        import pybind11

        torch = torch_folder()
        if torch is None:
            raise RuntimeError("torch is not installed here, so its headers are missing; install torch >= 2.11 first")
        if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            raise RuntimeError("no C++ compiler was found")
        version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
        build = Path(self.build_temp).resolve()
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
        subprocess.run(["cmake", str(ROOT), *configure], cwd=build, check=True)
        subprocess.run(["cmake", "--build", "."], cwd=build, check=True)


setup(
    version=re.search(r'__version__ = "([^"]+)"', (ROOT / "dmoe_ops/__init__.py").read_text()).group(1),
    # The folders triton_kernels/ and bench/ are sub-packages: a top-level module triton_kernels would shadow OpenAI's.
    package_dir={
        "dmoe_ops.triton_kernels": "triton_kernels",
        "dmoe_ops.bench": "bench",
        "dmoe_ops.demo_checkpoint": "examples/miniature/checkpoints/dmoe",
    },
    packages=[
        "dmoe_ops",
        "dmoe_ops.models",
        "dmoe_ops.engines",
        "dmoe_ops.triton_kernels",
        "dmoe_ops.bench",
        "dmoe_ops.demo_checkpoint",  # no code: what `dmoe demo` decodes with
    ],
    package_data={"dmoe_ops.demo_checkpoint": ["config.json", "model.safetensors", "tokenizer.json"]},
    ext_modules=[Extension("dmoe_ops._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
