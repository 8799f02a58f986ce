"""The package as a user gets it: its wheel, its imports, its command."""

from __future__ import annotations

import ast
import inspect
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dmoe_ops
import dmoe_ops.models

ROOT = Path(__file__).resolve().parents[1]

# Imports run one way, from the top of this list down; modules of one line don't import each other's package.
LAYERS = [
    {"__main__"},
    {"decode", "eval"},
    {"gpu_check", "tune", "demo", "convert", "chat"},
    {"bench", "info"},
    {"__init__"},
    {"engines"},
    {"models"},
    {"pooled"},
    {"layer"},
    {"router", "experts", "decoder", "unmasking", "expert_memory", "hf_block"},
    {"_backends"},
    {"triton_kernels", "reference"},
    {"_library"},
    {"_C"},
    {"_checks", "_call", "quantize"},
    {"routing", "_files", "formats"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_files() -> list[tuple[Path, list[str]]]:
    """Every source file of the package with the parts of its module name below dmoe_ops."""
    roots = {"dmoe_ops": [], "triton_kernels": ["triton_kernels"], "bench": ["bench"]}
    return [
        (file, prefix + list(file.relative_to(ROOT / folder).with_suffix("").parts))
        for folder, prefix in roots.items()
        for file in (ROOT / folder).rglob("*.py")
    ]


def imported_parts(tree: ast.AST, parts: list[str]) -> set[str]:
    """First parts below dmoe_ops of everything that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "dmoe_ops"}
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                package = parts[:-1]
                module = ["dmoe_ops", *package[: len(package) - node.level + 1], *module]
            if module[:1] == ["dmoe_ops"]:
                if len(module) > 1:
                    found.add(module[1])
                else:
                    found |= {alias.name if alias.name in RANK else "__init__" for alias in node.names}
    return found


def test_imports_run_one_way():
    upward = []
    for file, parts in module_files():
        here = parts[0]
        assert here in RANK, f"{file} has no place in the order of imports"
        for there in imported_parts(ast.parse(file.read_text()), parts) - {here}:
            if RANK[there] <= RANK[here]:
                upward.append(f"{file.relative_to(ROOT)} imports {there}")
    assert not upward


def public_functions(module) -> list[tuple[str, object]]:
    """What a module exports: functions, and the public methods of classes."""
    found = []
    for name in module.__all__:
        exported = getattr(module, name)
        members = {name: exported}
        if isinstance(exported, type):
            members = {f"{name}.{key}": value for key, value in vars(exported).items() if not key.startswith("_")}
            members[f"{name}.__init__"] = vars(exported).get("__init__")
        for path, value in members.items():
            function = inspect.unwrap(
                getattr(getattr(value, "__func__", value), "fget", None) or getattr(value, "__func__", value)
            )
            if inspect.isfunction(function) and Path(function.__code__.co_filename).is_relative_to(ROOT):
                found.append((path, function))
    return found


@pytest.mark.parametrize("path, function", public_functions(dmoe_ops) + public_functions(dmoe_ops.models))
def test_public_functions_are_annotated(path, function):
    signature = inspect.signature(function)
    spread = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = [p for p in signature.parameters.values() if p.name not in ("self", "cls") and p.kind not in spread]
    assert not [p.name for p in named if p.annotation is p.empty]
    assert path.endswith("__init__") or signature.return_annotation is not signature.empty


def test_every_subpackage_is_listed():
    """An unlisted one imports in editable mode and is missing from the wheel."""
    listed = next(
        ast.literal_eval(keyword.value)
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
        for keyword in node.keywords
        if keyword.arg == "packages"
    )
    found = {".".join(["dmoe_ops", *parts[:-1]]) for _, parts in module_files()}
    assert set(listed) - {"dmoe_ops.demo_checkpoint"} == found  # that one holds no code


@pytest.fixture(scope="module")
def make_wheel(tmp_path_factory):
    """make_wheel(**environment) runs pip wheel on a copy of the source and gives the process and the wheel's folder."""
    source = tmp_path_factory.mktemp("package") / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "results"))

    def make(**env: str) -> tuple[subprocess.CompletedProcess, Path]:
        folder = tmp_path_factory.mktemp("wheel")
        build = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            ".",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-w",
            folder,
        ]
        return subprocess.run(build, cwd=source, env={**os.environ, **env}, capture_output=True, text=True), folder

    return make


@pytest.fixture(scope="module")
def wheel(make_wheel) -> Path:
    # Without a compiler on the way, as on a machine that has none: the package must install there too.
    done, folder = make_wheel(CXX="", PATH=str(Path(sys.executable).parent), DMOE_REQUIRE_EXTENSION="0")
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_a_build_that_is_required_fails_by_name(make_wheel):
    done, folder = make_wheel(CXX="/bin/false", DMOE_REQUIRE_EXTENSION="1")
    assert done.returncode != 0 and not list(folder.iterdir())
    assert 'the extension was not built: CMake: The C++ compiler "/bin/false" is not able' in done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++, whose archive of libstdc++ it links")
def test_libstdcxx_as_an_archive(make_wheel, tmp_path):
    """Its locales stay apart from those of torch's libstdc++: a number in an error ended the message, or the process."""
    done, folder = make_wheel(CXX="g++", LDFLAGS="-static-libstdc++", DMOE_BUILD_CUDA="0", DMOE_REQUIRE_EXTENSION="1")
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(tmp_path)
    assert b"libstdc++.so" not in next(tmp_path.glob("dmoe_ops/_C*.so")).read_bytes()
    code = (
        "import torch, dmoe_ops\n"
        "torch.ops.dmoe._gate_out(torch.zeros(3, 4)[:, ::2], torch.zeros(2, 4), torch.zeros(3, 2))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr.rstrip().endswith("dmoe: x must be contiguous with shape [any, any]")


@pytest.mark.parametrize(
    ["output", "error"],
    [
        (
            "[1/2] Building CXX object bindings.cpp.o\nFAILED: bindings.cpp.o\nIn file included from bindings.cpp:2:\n"
            "include/pybind11/pybind11.h:3649:2: error: #error This file\nx.h:1:2: error: another\n",
            "include/pybind11/pybind11.h:3649:2: error: #error This file",
        ),
        (
            "-- Detecting\nCMake Error at Find.cmake:63 (message):\n  Could NOT find it.  More is\n  below\n\nCall Stack:\n",
            "CMake: Could NOT find it.",
        ),
        ("ptxas error   : Entry function uses too much\n", "ptxas error   : Entry function uses too much"),
        ("ld: undefined reference to `f'\ncollect2: error: ld\n", "ld: undefined reference to `f'"),
        ("error.cpp.o\nKilled\n", None),
    ],
)
def test_the_first_error_of_a_build(monkeypatch, output, error):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    assert runpy.run_path(str(ROOT / "setup.py"))["first_error"](output.splitlines(True)) == error


def test_the_wheel_owns_one_top_level_name(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dmoe_ops"}


def test_the_wheel_carries_the_items_of_eval(wheel):
    data = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("dmoe_ops/eval/data/")}
    assert data == {"gsm8k.jsonl", "math500.jsonl", "arc-c.jsonl", "mmlu.jsonl"}


def test_the_wheel_runs_without_the_extension(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert not list(tmp_path.glob("dmoe_ops/_C*"))
    assert (tmp_path / "dmoe_ops/_why_no_c.txt").read_text() == "no C++ compiler was found\n"
    code = (
        # An editable installation in this environment would lend the modules that the wheel lacks.
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "import torch, dmoe_ops, dmoe_ops.bench, dmoe_ops.triton_kernels\n"
        "from dmoe_ops.info import report\n"
        "result = dmoe_ops.block_route(torch.randn(40, 256), routing=dmoe_ops.BlockRouting())\n"
        "assert result.coreset_sizes.tolist()[0] >= 16\n"
        "print(dmoe_ops.__file__); print(report())"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    env.pop("DMOE_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, said = done.stdout.split("\n", 1)
    assert Path(where).is_relative_to(tmp_path)
    assert (
        "cpp        csrc/cpu, on the CPU: not here, the extension module was not built: no C++ compiler was found"
        in said
    )
    assert "cpu tensors use reference" in said


def test_the_wheel_carries_the_demo(wheel, tmp_path):
    pytest.importorskip("tokenizers")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "from dmoe_ops.__main__ import main\n"
        "sys.exit(main(['demo', '--device', 'cpu', '--gen-length', '8', '--prompt', 'work 8767+2064:']))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"loading {tmp_path / 'site'}" in done.stdout and "work 8767+2064: 7+4+0=" in done.stdout


@pytest.mark.parametrize("model", ["my folder", """it's "a" $HOME folder"""])
def test_make_demo_takes_any_folder_name(model, tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
    python.chmod(0o755)
    command = ["make", "--silent", "--no-print-directory", "--old-file=given-python", "demo", f"PY={python}"]

    def demo(**env: str) -> str:
        return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True).stdout

    assert demo(MODEL=model) == f"{['-m', 'dmoe_ops', 'demo', '--model', model]}\n"
    assert demo(MODEL="") == f"{['-m', 'dmoe_ops', 'demo']}\n"


def test_triton_kernels_stays_inside_the_package():
    """OpenAI's package, vLLM and SGLang own the bare name."""
    code = "import triton_kernels"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr


def run_dmoe(*args: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dmoe_ops", *args]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


def test_info_names_every_backend():
    said = run_dmoe("info").stdout
    for name in dmoe_ops._backends.BACKENDS:
        assert f"\n  {name}" in said
    assert f"dmoe-ops {dmoe_ops.__version__}" in said


@pytest.mark.parametrize("wanted, says", [("cuda", "DMOE_BACKEND=cuda: "), ("fastest", "'fastest'"), ("", "got ''")])
def test_info_reports_a_backend_that_cannot_serve(wanted, says):
    if wanted == "cuda" and "cuda" not in dmoe_ops._backends.missing():
        says = "it serves tensors of a GPU"
    done = run_dmoe("info", DMOE_BACKEND=wanted)
    assert done.returncode == 0 and not done.stderr
    refused = next(line for line in done.stdout.splitlines() if line.startswith("cpu tensors are refused: "))
    assert says in refused and "\n  reference" in done.stdout


def test_the_version():
    done = run_dmoe("--version")
    assert done.returncode == 0 and done.stdout == f"dmoe-ops {dmoe_ops.__version__}\n"


def test_wrong_arguments_exit_with_2():
    for args in ([], ["nonsense"], ["demo", "--no-such-flag"]):
        done = run_dmoe(*args)
        assert done.returncode == 2 and "usage: dmoe" in done.stderr


def test_unknown_backend_is_a_clear_error(monkeypatch):
    import torch

    monkeypatch.setenv("DMOE_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"DMOE_BACKEND must be auto or one of .*'fastest'"):
        dmoe_ops.block_route(torch.randn(4, 256), routing=dmoe_ops.BlockRouting())
