"""Which small mistakes would the tests miss? Makes one mistake at a time, runs the tests, and lists the ones that pass.

    python tools/mutate.py dmoe_ops/reference.py                   # every mutant of the syntax tree
    python tools/mutate.py dmoe_ops/reference.py --seconds 150     # part of them; the next call goes on
    python tools/mutate.py hand                                    # the text substitutions of tools/mutants.py
    python tools/mutate.py report                                  # the table; 1 if a survivor has no explanation

What was killed stays in build/mutants/; survivors run again when the module or its tests change. A mutant runs in a fork of
this process, which has imported torch already, and in memory: the checkout stays as it is. Only the tests that reach its
line run, those that killed another first, then the quickest, up to the first failure; a mutant that tools/mutants.py
explains counts as a survivor unseen. For csrc/ the folder is copied, changed and built in build/mutated/.
"""

from __future__ import annotations

import argparse
import ast
import copy
import filecmp
import gc
import hashlib
import importlib.util
import json
import linecache
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import mutants  # noqa: E402

FOUND, COPY = ROOT / "build" / "mutants", ROOT / "build" / "mutated"
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = [("min", "max"), ("amin", "amax"), ("any", "all"), ("zeros", "ones"), ("zeros_like", "ones_like")]
NAMES = {a: b for pair in NAMES for a, b in (pair, pair[::-1])}


# ---- the mutants of a syntax tree


def sites(node, statement=None):
    """(parent, field, index, node, statement) of all that may change: no annotations, docstrings or messages."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "type_comment") or isinstance(node, (ast.Raise, ast.JoinedStr)):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not docstring:
                of = child if isinstance(child, ast.stmt) else statement
                yield node, field, index, child, of
                yield from sites(child, of)


def variants(node):
    """Functions that give what may stand in the node's place; each takes a node that it may change."""

    def swap_operator(new, at=None):
        def change(n):
            if at is None:
                n.op = new()
            else:
                n.ops[at] = new()
            return n

        return change

    def without(field, at=None):
        def change(n):
            if at is None:
                setattr(n, field, None)
            else:
                del getattr(n, field)[at]
            return n

        return change

    if isinstance(node, ast.Compare):
        return [swap_operator(SWAPS[type(op)], i) for i, op in enumerate(node.ops) if type(op) in SWAPS]
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        made = [swap_operator(SWAPS[type(node.op)])] if type(node.op) in SWAPS else []
        return made + [lambda n: ast.Pass()] * isinstance(node, ast.AugAssign)
    if isinstance(node, ast.UnaryOp):
        return [lambda n: n.operand]
    if isinstance(node, ast.Constant) and node.value not in (None, ...):
        value = node.value
        new = not value if isinstance(value, bool) else value + "X" if isinstance(value, str) else value + 1
        return [lambda n: ast.Constant(new)]
    if isinstance(node, (ast.If, ast.IfExp, ast.While)) and isinstance(node.test, (ast.Name, ast.Call, ast.Attribute)):
        return [lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test)) or n]
    if isinstance(node, ast.Return) and not (node.value is None or ast.unparse(node.value) == "None"):
        return [without("value")]
    if isinstance(node, (ast.Expr, ast.Raise)):
        return [lambda n: ast.Pass()]
    if isinstance(node, ast.Assign) and not isinstance(node.targets[0], (ast.Name, ast.Tuple)):
        return [lambda n: ast.Pass()]
    if isinstance(node, (ast.Break, ast.Continue)):
        return [lambda n: ast.Pass()]
    if isinstance(node, ast.Call):
        return [without("keywords", i) for i, word in enumerate(node.keywords) if word.arg]
    if (isinstance(node, ast.Attribute) and node.attr in NAMES) or (isinstance(node, ast.Name) and node.id in NAMES):
        field = "attr" if isinstance(node, ast.Attribute) else "id"
        return [lambda n: setattr(n, field, NAMES[getattr(n, field)]) or n]
    if isinstance(node, ast.Slice):
        return [without(field) for field in ("lower", "upper") if getattr(node, field) is not None]
    if isinstance(node, ast.comprehension):
        return [without("ifs", i) for i in range(len(node.ifs))]
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [without("decorator_list", i) for i in range(len(node.decorator_list))]
    return []


def tree_mutants(source: str, path: str):
    """(name, first line, last line, function that compiles it) of every mutant of a module."""
    lines, tree, seen = source.splitlines(), ast.parse(source), {}
    for parent, field, index, node, statement in list(sites(tree)):
        for vary in variants(node):
            new = ast.copy_location(vary(copy.deepcopy(node)), node)
            name = f"{' '.join(lines[statement.lineno - 1].split())} | {headline(node)} -> {headline(new)}"
            seen[name] = seen.get(name, 0) + 1
            name += f" ({seen[name]})" if seen[name] > 1 else ""
            body = getattr(statement, "body", None)
            last = body[0].lineno - 1 if body else statement.end_lineno

            def build(parent=parent, field=field, index=index, node=node, new=new):
                put(parent, field, index, new)
                code = compile(ast.fix_missing_locations(tree), path, "exec")
                put(parent, field, index, node)
                return code

            yield name, statement.lineno, max(last, statement.lineno), build


def put(parent, field: str, index: int | None, node) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def headline(node) -> str:
    text = [line for line in ast.unparse(ast.fix_missing_locations(node)).splitlines() if line.strip()]
    return text[0][:160] if text else "nothing"


# ---- running tests on a mutant, in a fork


class Watch:
    """A pytest plugin: keeps the chosen tests in the given order, notes those that fail, and, where `file` is given,
    which lines of it each test runs and how long the test takes."""

    def __init__(self, order: list[str] | None = None, file: str | None = None):
        self.order, self.file, self.failed, self.tests = order, file, [], {}

    def pytest_collection_modifyitems(self, items):
        if self.order is not None:
            rank = {name: i for i, name in enumerate(self.order)}
            items[:] = sorted((i for i in items if i.nodeid in rank), key=lambda i: rank[i.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtest_logstart(self, nodeid):
        self.lines, self.begin = set(), time.perf_counter()
        if self.file is not None:
            sys.settrace(self._trace)

    def pytest_runtest_logfinish(self, nodeid):
        sys.settrace(None)
        self.tests[nodeid] = [time.perf_counter() - self.begin, sorted(self.lines)]

    def _trace(self, frame, event, arg):
        if frame.f_code.co_filename != self.file:
            return None
        self.lines.add(frame.f_lineno)
        return self._trace


class Loader(SourceFileLoader):
    def __init__(self, name, path, code):
        super().__init__(name, path)
        self.code = code

    def get_code(self, fullname):
        return self.code


class Finder:
    """Finds changed modules before anybody else does."""

    def __init__(self, specs):
        self.specs = specs

    def find_spec(self, name, path=None, target=None):
        return self.specs.get(name)


def module_name(file: str) -> str:
    name = file.removesuffix(".py").replace("/", ".")
    return f"dmoe_ops.{name}" if name.startswith(("triton_kernels", "bench")) else name


def run_tests(tests: list[str], spec=None, order=None, trace=None, timeout: float = 600.0) -> dict:
    """{"code": pytest's exit code or None after the timeout, "failed": the tests that failed, "tests": what Watch saw}."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            silence = os.open(os.devnull, os.O_RDWR)
            os.setsid()
            if not os.environ.get("MUTATE_SHOW"):
                for stream in (0, 1, 2):
                    os.dup2(silence, stream)
            import pytest
            import torch

            torch.set_num_threads(1)
            os.environ.pop("TRITON_INTERPRET", None)
            if spec is not None:
                sys.meta_path.insert(0, Finder({spec.name: spec}))
            watch = Watch(order, trace)
            # Rewritten assertions and the plugins of other packages would take most of the time.
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            options = ["-q", "--assert=plain", "-pno:cacheprovider", *(["-x"] if trace is None else [])]
            code = pytest.main([*tests, *options], plugins=[watch])
            with os.fdopen(writer, "w") as pipe:
                json.dump(dict(code=int(code), failed=watch.failed, tests=watch.tests), pipe)
        except BaseException as error:  # a mutant may do anything
            with os.fdopen(writer, "w") as pipe:
                json.dump(dict(code=3, failed=[f"{type(error).__name__}: {error}"], tests={}), pipe)
        finally:
            os._exit(0)
    os.close(writer)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, timeout)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.waitpid(child, 0)
    return json.loads(said) if said else dict(code=None, failed=["killed or timed out"], tests={})


def spec_of(file: str, code):
    path = str(ROOT / file)
    return importlib.util.spec_from_file_location(module_name(file), path, loader=Loader(module_name(file), path, code))


def preload() -> None:
    """What every fork would import. No thread may start here: it would be missing in the forks."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    names = "torch torch._dynamo torch._functorch.aot_autograd torch.testing numpy hypothesis pytest safetensors.torch"
    for name in [*names.split(), "triton.language", "triton.runtime.interpreter", "tqdm"]:
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)
    sys.path.insert(0, str(ROOT))  # examples/
    gc.freeze()


# ---- what is kept


class Record:
    """What has been found of one module, in build/mutants/."""

    def __init__(self, module: str, tests: list[str]):
        self.path = FOUND / (module.replace("/", "+") + ".json")
        self.data = json.loads(self.path.read_text()) if self.path.is_file() else {}
        files = [file for file in dict.fromkeys([*tests, "tests/conftest.py"]) if (ROOT / file).is_file()]
        state = {file: hashlib.sha256((ROOT / file).read_bytes()).hexdigest() for file in files}
        if (old := self.data.get("state")) != state:
            # Kills stay while the module is the same: tests are added, seldom weakened. Survivors run again.
            same = [file for file in files if old and old.get(file) == state[file]]
            same = same if "tests/conftest.py" in same else []
            reach = {test: seen for test, seen in self.data.get("reach", {}).items() if test.split("::")[0] in same}
            kept = dict(killed=self.data.get("killed", {}), source=self.data.get("source"), reach=reach)
            self.data = dict(module=module, state=state, mutants=0, survived=[], **kept)

    def save(self) -> None:
        FOUND.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1))


def explanation(file: str, name: str) -> str | None:
    """Why no test can kill a mutant, where tools/mutants.py says so."""
    known = mutants.EQUIVALENT.get(file, {})
    return next((why for part, why in known.items() if part in name + "\n"), None)


def run_module(file: str, seconds: float) -> bool:
    """Whether all mutants of the module have run."""
    begin, tests = time.perf_counter(), [f"tests/{name}.py" for name in mutants.TESTS[file]]
    source = (ROOT / file).read_text()
    record = Record(file, tests)
    data = record.data
    made = list(tree_mutants(source, str(ROOT / file)))
    names = {name for name, *_ in made}
    data["mutants"] = len(made)
    data["killed"] = {name: by for name, by in data["killed"].items() if name in names}
    if data["source"] != source:
        data.update(source=source, survived=[], reach={})
    if untraced := [file for file in tests if not any(test.split("::")[0] == file for test in data["reach"])]:
        found = run_tests(untraced, spec_of(file, compile(source, str(ROOT / file), "exec")), trace=str(ROOT / file))
        if not found["tests"]:
            sys.exit(f"{file}: no test has run: {found['failed']}")
        print(*(f"left out, it fails without a mutant: {test}" for test in found["failed"]), sep="\n")
        data["reach"] |= {test: seen for test, seen in found["tests"].items() if test not in found["failed"]}
        record.save()
    for name, first, last, build in made:
        if name in data["killed"] or name in data["survived"]:
            continue
        if explanation(file, name):
            data["survived"].append(name)
            continue
        if time.perf_counter() - begin > seconds:
            break
        reach = {
            test: took for test, (took, lines) in data["reach"].items() if set(lines) & set(range(first, last + 1))
        }
        if not reach:  # run at import, or by another thread: any test may notice
            reach = {test: took for test, (took, _) in data["reach"].items()}
        killers = set(data["killed"].values())
        order = sorted(reach, key=lambda test: (test not in killers, reach[test]))
        files = list(dict.fromkeys(test.split("::")[0] for test in order))
        found = run_tests(files, spec_of(file, build()), order, timeout=20 + 4 * sum(reach.values()))
        if found["code"] == 0:
            data["survived"].append(name)
            print(f"{file}:{first}: {name}", flush=True)
        else:
            data["killed"][name] = (found["failed"] or ["pytest could not run"])[0]
        record.save()
    else:
        record.save()
        return True
    record.save()
    return False


def run_hand(seconds: float, only: str | None) -> bool:
    for (file, _), entries in mutants.HAND.items():
        for old, _ in entries:
            if (times := (ROOT / file).read_text().count(old)) != 1:
                sys.exit(f"tools/mutants.py: {old!r} occurs {times} times in {file}, it must occur once")
    begin, done = time.perf_counter(), True
    for (file, test), entries in mutants.HAND.items():
        if only and only not in file:
            continue
        source = (ROOT / file).read_text()
        record = Record(f"by hand: {file}, {test}", [f"tests/{test}.py"])
        data = record.data
        data["mutants"] = len(entries)
        if data.get("source") != source:
            data.update(source=source, survived=[], sound=False)
        names = {f"{old} -> {new}" for old, new in entries}
        data["killed"] = {name: by for name, by in data["killed"].items() if name in names}
        for old, new in entries:
            name = f"{old} -> {new}"
            if name in data["killed"] or name in data["survived"]:
                continue
            if time.perf_counter() - begin > seconds:
                done = False
                break
            if not data.get("sound") and (found := run_changed(file, source, test))["code"] != 0:
                sys.exit(f"tests/{test}.py fails without a mutant: {found['failed']}")
            data["sound"] = True
            found = run_changed(file, source.replace(old, new), test)
            if found["code"] == 0:
                data["survived"].append(name)
                print(f"{file}: {name} (tests/{test}.py)", flush=True)
            else:
                data["killed"][name] = (found["failed"] or ["pytest could not run"])[0]
            record.save()
        record.save()
    return done


def copy_changed(source: str, target: str) -> None:
    """As shutil.copy, but a file that is there already keeps its time, so that it is not compiled again."""
    if not (os.path.isfile(target) and filecmp.cmp(source, target, shallow=False)):
        shutil.copyfile(source, target)


def run_changed(file: str, source: str, test: str) -> dict:
    """What `run_tests` gives of a test file, with `source` for what a file contains."""
    if file.endswith(".py"):
        path = str(ROOT / file)
        linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)  # Triton reads the source
        found = run_tests([f"tests/{test}.py"], spec_of(file, compile(source, path, "exec")))
        del linecache.cache[path]
        return found
    for folder in ("csrc", "tests"):
        shutil.copytree(ROOT / folder, COPY / folder, copy_function=copy_changed, dirs_exist_ok=True)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        copy_changed(str(ROOT / name), str(COPY / name))
    (COPY / file).write_text(source)
    spec = None
    try:
        if file.startswith("csrc/cpu"):
            spec = importlib.util.spec_from_file_location("dmoe_ops._C", build_extension())
        found = run_tests([str(COPY / "tests" / f"{test}.py"), f"--rootdir={COPY}"], spec)
    except subprocess.CalledProcessError:
        sys.exit(f"tools/mutants.py: a mutant of {file} does not compile")
    return found


def build_extension() -> str:
    import pybind11
    import torch

    folder = Path(torch.__file__).parent
    build = COPY / "build"
    if not (build / "build.ninja").is_file():
        options = dict(
            CMAKE_BUILD_TYPE="Release",
            CMAKE_LIBRARY_OUTPUT_DIRECTORY=build / "out",
            Python_EXECUTABLE=sys.executable,
            pybind11_DIR=pybind11.get_cmake_dir(),
            TORCH_INCLUDE=folder / "include",
            TORCH_LIB=folder / "lib",
            TORCH_VERSION=torch.__version__,
        )
        command = [
            "cmake",
            "-GNinja",
            "-S",
            COPY,
            "-B",
            build,
            *(f"-D{name}={value}" for name, value in options.items()),
        ]
        environment = {**os.environ, "DMOE_BUILD_CUDA": "0"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", build], check=True, stdout=subprocess.DEVNULL)
    return str(next((build / "out").glob("_C.*")))


def report() -> int:
    """Prints the table and every survivor with its reason; 1 if one has none."""
    unexplained, lines = 0, []
    for path in sorted(FOUND.glob("*.json")):
        data = json.loads(path.read_text())
        ran, killed = len(data["killed"]) + len(data["survived"]), len(data["killed"])
        file = data["module"].removeprefix("by hand: ").split(",")[0]
        reasons = {name: why for name in data["survived"] if (why := explanation(file, name))}
        open_ = [name for name in data["survived"] if name not in reasons]
        unexplained += len(open_)
        share = f"{killed / ran:.1%}" if ran else ""
        cells = (data["module"], data["mutants"], ran, killed, share, len(data["survived"]) - len(open_), len(open_))
        print("| " + " | ".join(map(str, cells)) + " |")
        lines += [f"{data['module']}: {name}\n    {reasons.get(name, 'NO REASON')}" for name in data["survived"]]
    print("(module, mutants, run, killed, of those run, survivors with a reason, survivors without)\n")
    print("\n".join(lines))
    return 1 if unexplained else 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", help="a module of tools/mutants.py, hand, or report")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after about so long (default: never)")
    parser.add_argument("--only", help="with hand: the files whose names contain this")
    args = parser.parse_args(argv)
    if args.what == "report":
        return report()
    if args.what != "hand" and args.what not in mutants.TESTS:
        parser.error(f"what must be hand, report or one of {', '.join(mutants.TESTS)}, got {args.what}")
    preload()
    done = run_hand(args.seconds, args.only) if args.what == "hand" else run_module(args.what, args.seconds)
    print("all have run" if done else "there are more: call again")
    return 0 if done else 2


if __name__ == "__main__":
    sys.exit(main())
