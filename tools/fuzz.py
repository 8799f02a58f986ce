"""Random routings and broken checkpoints, until something breaks.

    python tools/fuzz.py                                 # 100,000 routings and 2,000 checkpoints, on all cores
    python tools/fuzz.py --count 1000 --seed 7           # 1,000 routings and 20 checkpoints, other ones

A routing: the reference, the C++ kernel and the oracle of the tests (plain loops, no code in common) must agree, on ids and
coresets to the bit. A checkpoint: loading must give the weights that the files hold, read by a second reader, or a
ValueError of one line. Each case has a number, and runs in a process of its own group: a crash is a finding like any other.
Prints what breaks, and ends with 1 if anything does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import selectors
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import oracle  # noqa: E402

from dmoe_ops import BlockRouting, _backends, reference, router  # noqa: E402
from dmoe_ops.models import LLaDA2Config, LLaDA2ForDiffusion  # noqa: E402

inf, nan = math.inf, math.nan
MEMORY = 4 << 30  # more than a process may ask for beyond what it has at its start
SECONDS = 60  # longer than any case may take

# ---- routings

GROUPS = ((1, 1), (5, 1), (8, 1), (33, 1), (2, 2), (4, 2), (1, 6), (3, 5), (4, 4), (8, 8))  # experts per group, groups
LOGITS = {
    "normal": None,
    "few values": (-1.0, 0.0, -0.0, 0.5, 2.0),
    "equal": (0.25,),
    "extreme": (-90.0, 90.0, -200.0, 200.0, 0.0, inf, -inf),
    "broken": (nan, nan, 0.0, 1.0, -1.0, inf, -inf),
    "votes": (inf, -inf, -inf, -inf),  # scores of 0 and 1: shares that meet thresholds
}
BIASES = {
    "normal": None,
    "negative": (-0.9, -0.8, -2.0),
    "cancelling": (-0.5, 0.5),
    "infinite": (inf, -inf, 0.0, 0.1),
    "broken": (nan, -inf, 0.0),
}


def routing_case(seed: int):
    """(logits [.., E], bias or None, BlockRouting, offsets or None)."""
    rng = np.random.default_rng(seed)

    def pick(values):
        return values[rng.integers(len(values))]

    def fill(shape, palette):
        return (rng.normal(size=shape) if palette is None else rng.choice(palette, size=shape)).astype(np.float32)

    size, groups = pick(GROUPS)
    experts = size * groups
    upto = [int(rng.integers(1, limit + 1)) for limit in (min(experts, 9), groups, experts + 2, experts + 2, experts)]
    routing = BlockRouting(
        num_experts=experts,
        top_k=upto[0],
        block_size=int(rng.integers(1, 10)),
        n_group=groups,
        topk_group=upto[1],
        score=pick(("sigmoid", "softmax")),
        aggregate=pick(("topk_sum", "topk_sum", "sum", "max", "union")),
        select=pick(("top_p", "top_p", "top_n", "nonzero", "all")),
        top_p=float(pick((1e-6, 0.25, 0.3, 0.5, 0.6, 0.75, 0.95, 1.0))),
        min_experts=int(rng.integers(0, experts + 2)) if rng.random() < 0.7 else 0,
        max_experts=None if rng.random() < 0.5 else upto[2],
        capacity=upto[3],
        union_k=upto[4],
        norm_topk_prob=bool(rng.random() < 0.7),
        routed_scaling_factor=pick((1.0, 2.5)),
    )
    lead = pick(((int(rng.integers(1, 14)),), (int(rng.integers(1, 3)), int(rng.integers(1, 9)))))
    logits = fill((*lead, experts), LOGITS[pick(list(LOGITS))])
    if lead[-1] > 1 and rng.random() < 0.3:
        logits[..., -1, :] = logits[..., 0, :]
    bias = None if rng.random() < 0.3 else fill(experts, BIASES[pick(list(BIASES))])
    offsets = None
    if rng.random() < 0.4:
        offsets, tokens = [0], math.prod(lead)
        while offsets[-1] < tokens:
            offsets.append(min(tokens, offsets[-1] + int(rng.integers(1, routing.block_size + 1))))
    return logits, bias, routing, offsets


def check_routing(seed: int) -> str | None:
    """What differs, if anything does."""
    logits, bias, routing, offsets = routing_case(seed)
    rows = logits.reshape(-1, routing.num_experts)
    blocks = oracle.cut(len(rows), logits.shape[-2], routing.block_size, offsets)
    ids, weights, coresets = oracle.route(rows, bias, routing, blocks)
    tensors = [None if t is None else torch.from_numpy(t) for t in (logits, bias)]
    packed = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    found = {"reference": reference.block_route(*tensors, routing=routing, block_offsets=packed)}
    if "cpp" not in _backends.missing():
        out = router.allocate_routing(len(rows), logits.shape[-2], packed, routing, tensors[0])
        for tensor in out:
            tensor.fill_(-7)
        _backends.Cpp.block_route(torch.from_numpy(rows), tensors[1], packed, logits.shape[-2], routing, out)
        found["cpp"] = out
    for name, result in found.items():
        sizes = result.coreset_sizes.tolist()
        if [row[:size] for row, size in zip(result.coreset_ids.tolist(), sizes)] != coresets:
            return f"the coresets of {name} are not the oracle's: {routing}"
        if any(set(row[size:]) - {-1} for row, size in zip(result.coreset_ids.tolist(), sizes)):
            return f"the coresets of {name} are not filled up with -1: {routing}"
        if result.topk_ids.tolist() != ids.tolist():
            return f"the ids of {name} are not the oracle's: {routing}"
        if not np.allclose(result.topk_weights.numpy(), weights, rtol=1e-6, atol=1e-9):
            return f"the weights of {name} are not the oracle's: {routing}"
    return None


# ---- checkpoints

CONFIG = LLaDA2Config(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=4,
    intermediate_size=8,
    num_key_value_heads=1,
    num_shared_experts=1,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
JUNK = (
    None,
    True,
    -1,
    0,
    1.5,
    2**20,
    2**31 - 1,
    2**31,
    2**63,
    10**400,
    "",
    "x",
    "F32",
    "../x",
    [],
    [0],
    [[0]],
    {},
    {"a": 1},
)


def make_checkpoint(folder: Path, rng) -> None:
    """A sound checkpoint, in one file or in three."""
    model = LLaDA2ForDiffusion(CONFIG, dtype=torch.float32).init_weights(int(rng.integers(99)))
    model.save_pretrained(folder)
    if rng.random() < 0.5:
        tensors = {name: t.contiguous() for name, t in model.checkpoint_tensors().items()}
        (folder / SINGLE).unlink()
        shard_of = {name: f"model-{rng.integers(3)}.safetensors" for name in tensors}
        for shard in set(shard_of.values()):
            save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, folder / shard)
        (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=shard_of)))


def break_checkpoint(folder: Path, rng) -> str:
    """Does one thing to a checkpoint, and says what."""
    files = sorted(folder.glob("*.safetensors"))
    path = files[rng.integers(len(files))]
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    kinds = [truncate, length_bomb, flip_header, change_header, text_bomb, break_json]
    kinds += [break_index] * (3 if (folder / INDEX).exists() else 1)
    kind = kinds[rng.integers(len(kinds))]
    said = kind(folder, path, data, header, names, rng)
    return f"{kind.__name__} of {path.name}: {said}"


def put_header(path: Path, data: bytearray, header) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode(errors="surrogatepass")
    (length,) = struct.unpack("<Q", data[:8])
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def truncate(folder, path, data, header, names, rng):
    size = int(rng.integers(len(data) + 1))
    path.write_bytes(data[:size])
    return f"{size} of {len(data)} bytes are left"


def length_bomb(folder, path, data, header, names, rng):
    length = (0, 1, 7, 8, 2**20, 10**8, 10**8 + 1, 2**31, 2**40, 2**63, 2**64 - 1, len(data) - 8)[rng.integers(12)]
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    return f"a header of {length} bytes"


def flip_header(folder, path, data, header, names, rng):
    (length,) = struct.unpack("<Q", data[:8])
    places = rng.integers(0, 8 + length, size=int(rng.integers(1, 5))).tolist()
    for place in places:
        data[place] = int(rng.integers(256))
    path.write_bytes(data)
    return f"random bytes at {places}"


def change_header(folder, path, data, header, names, rng):
    name = names[rng.integers(len(names))]
    entry = header[name]
    begin, end = entry["data_offsets"]
    junk = JUNK[rng.integers(len(JUNK))]
    changes = [
        lambda: entry.update(data_offsets=[begin + int(rng.integers(-9, 9)), end + int(rng.integers(-9, 9))]),
        lambda: entry.update(data_offsets=[end, begin]),
        lambda: entry.update(data_offsets=header[names[0]]["data_offsets"]),
        lambda: entry.update(data_offsets=[begin, 2 ** int(rng.integers(30, 70))]),
        lambda: entry.update(data_offsets=junk),
        lambda: entry.update(shape=[*entry["shape"], 1]),
        lambda: entry.update(shape=[2**31, 2**33]),
        lambda: entry.update(shape=[0, *entry["shape"]]),
        lambda: entry.update(shape=entry["shape"][::-1]),
        lambda: entry.update(shape=junk),
        lambda: entry.update(dtype=("I32", "BF16", "F64", "F8_E4M3", "f32")[rng.integers(5)]),
        lambda: entry.update(dtype=junk),
        lambda: header.update({name: junk}),
        lambda: header.update({"n" * 5000: entry}),
        lambda: header.update({"new\nline\0\ud800": header.pop(name)}),
        lambda: header.update(__metadata__=junk),
        lambda: header.pop(name),
    ]
    which = int(rng.integers(len(changes)))
    changes[which]()
    put_header(path, data, header)
    return f"change {which} of {name}, {str(junk)[:40]}"


def text_bomb(folder, path, data, header, names, rng):
    texts = [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 100_000 + b"}",
        b"\xff\xfe{}",
        b"",
        b"[]",
        b"null",
        json.dumps(header).encode() + b" " * 1_000_000,
        b"{"
        + b",".join(b'"%d": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}' % i for i in range(20_000))
        + b"}",
    ]
    which = int(rng.integers(len(texts)))
    put_header(path, data, texts[which])
    return f"header {which}"


def break_json(folder, path, data, header, names, rng):
    """config.json or the index: any value may become any other, or the text something else."""
    files = sorted(folder.glob("*.json"))
    file = files[rng.integers(len(files))]
    if rng.random() < 0.4:
        texts = ["", "[]", "null", "[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "NaN", "9" * 5000, '{"a": Infinity}']
        which = int(rng.integers(len(texts)))
        file.write_text(texts[which], encoding="utf-8")
        return f"{file.name}, text {which}"
    values = json.loads(file.read_text())
    key = sorted(values)[rng.integers(len(values))]
    values[key] = JUNK[rng.integers(len(JUNK))]
    file.write_text(json.dumps(values))
    return f"{file.name}, {key}={str(values[key])[:40]}"


def break_index(folder, path, data, header, names, rng):
    """A sharded checkpoint whose index lies; in a folder without an index one is made."""
    index = folder / INDEX
    shard_of = json.loads(index.read_text())["weight_map"] if index.exists() else dict.fromkeys(names, path.name)
    name = sorted(shard_of)[rng.integers(len(shard_of))]
    outside = folder.parent / "outside.safetensors"
    shutil.copy(path, outside)
    shards = [p.name for p in folder.glob("*.safetensors")]
    targets = [
        str(outside),
        f"../{outside.name}",
        f"./{path.name}",
        "",
        ".",
        "..",
        "config.json",
        "x" * 5000,
        "a\nb",
        "a\0b",
    ]
    targets += ["\ud800", "sub/../" + path.name, *shards]
    which = int(rng.integers(6))
    target = targets[rng.integers(len(targets))]
    if which == 0:
        shard_of[name] = target
    elif which == 1:
        shard_of = dict.fromkeys(shard_of, target)
    elif which == 2:
        del shard_of[name]
    elif which == 3:
        shard_of["x" * int(rng.integers(1, 6000))] = target
    elif which == 4:  # the tensor lies in another file too, with other values
        other = folder / "model-9.safetensors"
        save_file({name: torch.full((3, 3), 7.0)}, other)
        shard_of["stray"] = other.name
    else:
        shard_of[name] = JUNK[rng.integers(len(JUNK))]
    index.write_text(json.dumps(dict(weight_map=shard_of)))
    return f"change {which} of {name}, {target[:40]!r}"


def read_plainly(folder: Path) -> dict[str, np.ndarray]:
    """The tensors as the format and the index have them; KeyError, ValueError and the like where they make no sense."""
    index = folder / INDEX
    shard_of = json.loads(index.read_text())["weight_map"] if index.exists() else None
    tensors = {}
    for shard in sorted(set(shard_of.values())) if shard_of else [SINGLE]:
        if "/" in shard:
            raise ValueError("outside")
        data = (folder / shard).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name == "__metadata__" or (shard_of and shard_of.get(name) != shard):
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(data[begin:end], np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(data[begin:end], {"F32": np.float32, "F64": np.float64}[entry["dtype"]])
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def check_checkpoint(seed: int) -> str | None:
    """What is wrong with how a broken checkpoint is received, if anything is."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        folder.mkdir()
        make_checkpoint(folder, rng)
        done = break_checkpoint(folder, rng)
        try:
            model = LLaDA2ForDiffusion.from_pretrained(folder)
        except ValueError as error:
            said = str(error)
            if "\n" in said or len(said) > 1000 or not said.isprintable():
                return f"{done}: the error is no short line: {said[:200]!r}"
            return None
        except BaseException as error:
            return f"{done}: {type(error).__name__}: {str(error)[:200]}"
        try:
            expected = read_plainly(folder)
            for name, tensor in model.checkpoint_tensors().items():
                if not np.array_equal(tensor.numpy(), expected[name].astype(np.float32)):
                    return f"{done}: {name} is not what the file holds"
        except Exception as error:
            return f"{done}: it loads, and a plain reader says {type(error).__name__}: {str(error)[:100]}"
    return None


# ---- running them

CHECKS = {"routing": check_routing, "checkpoint": check_checkpoint}


def worker(kind: str, seeds: range, pipe: int) -> None:
    """Runs in its own process: one line of JSON before each case, and one behind a case that finds something."""
    torch.set_num_threads(1)
    pages = Path("/proc/self/statm")
    if pages.exists():
        limit = int(pages.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with os.fdopen(pipe, "w", buffering=1) as out:
        for seed in seeds:
            out.write(json.dumps([seed, None]) + "\n")
            try:
                said = CHECKS[kind](seed)
            except BaseException as error:
                said = f"{type(error).__name__}: {str(error)[:300]}"
            if said:
                out.write(json.dumps([seed, said]) + "\n")


def start(kind: str, seeds: range, selector) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        worker(kind, seeds, writer)
        os._exit(0)
    os.close(writer)
    state = dict(pid=pid, seeds=seeds, at=seeds.start, heard=time.monotonic(), rest=b"")
    selector.register(reader, selectors.EVENT_READ, state)


def run(kind: str, count: int, first: int, workers: int) -> list[str]:
    """The findings of `count` cases; a worker that dies is replaced, and goes on behind the case that it died of."""
    selector, wrong, step = selectors.DefaultSelector(), [], -(-count // workers)
    for begin in range(first, first + count, step):
        start(kind, range(begin, min(begin + step, first + count)), selector)
    with tqdm(total=count, desc=kind, unit="case", disable=not sys.stderr.isatty()) as bar:
        while selector.get_map():
            for key, _ in selector.select(timeout=1):
                state, data = key.data, os.read(key.fd, 1 << 16)
                state["heard"] = time.monotonic()
                *lines, state["rest"] = (state["rest"] + data).split(b"\n")
                for state["at"], said in map(json.loads, lines):
                    bar.update(said is None)
                    wrong += [f"{kind} {state['at']}: {said}"] * (said is not None)
                if not data:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _, status = os.waitpid(state["pid"], 0)
                    if status:
                        wrong.append(f"{kind} {state['at']}: the process ended with {describe(status)}")
                        if rest := state["seeds"][state["seeds"].index(state["at"]) + 1 :]:
                            start(kind, rest, selector)
            for key in list(selector.get_map().values()):
                if time.monotonic() - key.data["heard"] > SECONDS:
                    os.kill(key.data["pid"], signal.SIGKILL)
    return wrong


def describe(status: int) -> str:
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="routings; a 50th of it checkpoints (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    parser.add_argument("--only", choices=CHECKS, help="only these")
    args = parser.parse_args(argv)
    if args.count < 1 or args.workers < 1 or args.seed < 0:
        parser.error("--count and --workers must be at least 1, and --seed at least 0")
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = 0
    for kind in [args.only] if args.only else CHECKS:
        count = args.count if kind == "routing" else max(1, args.count // 50)
        begin = time.perf_counter()
        wrong = run(kind, count, args.seed, min(args.workers, count))
        print("\n".join(wrong[:20]) or f"{kind}: nothing wrong", file=sys.stderr if wrong else sys.stdout)
        print(f"{kind}: {count} cases from {args.seed} on, {len(wrong)} findings, {time.perf_counter() - begin:.0f} s")
        failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
