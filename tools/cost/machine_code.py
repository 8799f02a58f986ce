"""Loops, instructions and latencies of a compiled kernel, read from its assembly (SASS or GCN).

The program is followed in the order of its addresses by one warp that issues in order: an instruction waits until its
operands are there. Both sides of a branch count, called functions (slow paths) do not. What a loop's third turn takes is
what each of its turns takes.
"""

from __future__ import annotations

import collections
import dataclasses
import re

# By the start of an instruction's name, the first match counts: cycles until its result is there, the pipe of its
# scheduler that it goes through, and for how many cycles. NVIDIA: latencies of A100 (arXiv:2208.11174) and H100
# (arXiv:2501.12084): ALU 4, shared memory 29, L2 about 280; rates by the CUDA C++ Programming Guide's table of arithmetic
# throughput. Assumed: REDUX, VOTE, R2UR, conversions, FP64's latency.
NVIDIA = [
    ("HGMMA|UTC", 32, "mma", 0),
    ("HMMA|IMMA", 33, "mma", 0),
    ("LDGSTS|UBLK|UTMA", 1, "lsu", 4),
    ("LDGDEPBAR", 1, "other", 1),
    ("LDC|ULDC|S2R|S2UR|CS2R|R2UR|BMOV", 20, "other", 1),
    ("LDSM", 33, "lsu", 4),
    ("LDS", 29, "lsu", 4),
    ("LDG|ATOMG|ATOM.E", 280, "lsu", 4),
    ("LD.E.64", 200, "lsu", 4),  # in these kernels: shared memory of another thread block
    ("LD", 35, "lsu", 4),  # a pointer that turns out to be to shared memory
    ("ATOMS", 60, "lsu", 4),
    ("ST|RED.|REDG", 1, "lsu", 4),
    ("SHFL", 24, "lsu", 4),
    ("REDUX|CREDUX", 14, "redux", 8),
    ("VOTE|MATCH", 14, "alu", 2),
    ("MUFU|F2F|F2I|I2F|FRND|POPC|FLO|BREV", 18, "xu", 8),
    ("D(ADD|MUL|FMA|SETP|MNMX)", 8, "fp64", 1),
    ("IMAD|IDP", 4, "fma", 2),
    ("FMUL|FFMA|FADD|HADD2|HFMA2", 4, "fma", 1),
    ("U[A-Z]", 6, "uniform", 2),
    ("NOP|BSSY|BSYNC|WARPSYNC|DEPBAR|WARPGROUP|BRA|EXIT|PREEXIT|ACQBULK", 1, "other", 1),
    ("", 4, "alu", 2),
]
# AMD CDNA 3: 64 lanes pass 16 units in four cycles; LDS and L2 by chipsandcheese.com/p/testing-amds-giant-mi300x, as
# cycles at 2.1 GHz; the rest is assumed.
AMD = [
    ("v_mfma", 32, "mma", 0),
    ("ds_", 130, "lsu", 8),
    ("(buffer|global|flat)_load", 500, "lsu", 8),
    ("(buffer|global|flat)_(store|atomic)", 1, "lsu", 8),
    ("s_load|s_buffer", 200, "scalar", 1),
    ("v_(rcp|exp|log|sqrt|rsq)", 16, "alu", 16),
    ("v_.*_f64", 8, "alu", 8),
    ("v_", 8, "alu", 4),
    ("s_", 4, "scalar", 1),
    ("", 4, "other", 1),
]
# What holds a warp up though nothing of it has a result. Assumed: a cluster's barrier is about a way of 180 cycles between
# multiprocessors (arXiv:2402.13499); the fence in front of it, that the release costs, waits for what was stored.
STALLS = {"UCGABAR_WAIT": 200, "MEMBAR.ALL.GPU": 300, "MEMBAR.SC.GPU": 300, "buffer_wbl2": 300, "buffer_inv": 100}
BARRIER = re.compile(r"BAR\.(SYNC|RED)|s_barrier")
MATRIX = re.compile(r"HGMMA|HMMA|IMMA|QGMMA|QMMA|UTC\wMMA|v_mfma")


@dataclasses.dataclass
class Instruction:
    at: int
    op: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    text: str
    target: int | None = None  # of a branch


@dataclasses.dataclass
class Loop:
    """Of one turn of one warp, without the loops inside: instructions; issue: cycles for which its scheduler is taken; fp64:
    instructions in double (not in `issue`, as GPUs differ in those); latency: cycles it takes alone, barriers not counted;
    barriers; matrix: instructions for the matrix units. trips: turns, None where the code does not say."""

    begin: int
    end: int
    inside: int  # index of the loop around this one; -1: the kernel itself, which is entry 0
    trips: int | None = None
    instructions: int = 0
    issue: int = 0
    fp64: int = 0
    latency: int = 0
    barriers: int = 0
    matrix: int = 0


def analyse(text: str, rare: bool = False) -> list[Loop]:
    """Entry 0 is the kernel outside its loops, the others are the loops by address. rare: what a branch can skip, with one
    loop of constant length in it, is skipped."""
    code = parse_gcn(text) if "s_endpgm" in text else parse_sass(text)
    if rare:
        code = without_rare(code)
    loops = [Loop(code[0].at, code[-1].at, -1, 1)]
    for branch in sorted(
        (i for i in code if i.target is not None and i.target < i.at), key=lambda i: (i.target, -i.at)
    ):
        if branch.target == loops[-1].begin and len(loops) > 1:
            loops[-1].end = max(loops[-1].end, branch.at)  # `continue`
            continue
        around = [n for n, loop in enumerate(loops) if loop.begin <= branch.target and branch.at <= loop.end]
        loops.append(Loop(branch.target, branch.at, around[-1], trips(code, branch)))
    _follow(code, loops)
    return loops


def without_rare(code: list[Instruction]) -> list[Instruction]:
    counted = [i for i in code if i.target is not None and i.target < i.at and trips(code, i)]
    for branch in code:
        inside = [loop for loop in counted if branch.at < loop.target and loop.at < (branch.target or 0)]
        if len(inside) == 1:
            code = [i for i in code if not branch.at < i.at < branch.target]
    return code


def _follow(code: list[Instruction], loops: list[Loop]) -> None:
    """Fills in what the loops' turns take."""
    table = AMD if code[-1].op.startswith("s_") else NVIDIA
    costs = {op: next(row[1:] for row in table if re.match(row[0], op)) for op in {i.op for i in code}}
    places = {i.at: n for n, i in enumerate(code)}
    begins = {loop.begin: n for n, loop in reversed(list(enumerate(loops))) if n}
    ready: dict[str, int] = {}

    def turn(n: int, now: int) -> int:
        loop, at = loops[n], places[loops[n].begin]
        pipes = collections.Counter()
        loop.instructions = loop.latency = loop.barriers = loop.matrix = 0
        while at < len(code) and code[at].at <= loop.end:
            one = code[at]
            inner = begins.get(one.at, n)
            if inner != n and loops[inner].inside == n:
                now = turn(inner, turn(inner, turn(inner, now)))  # the first turns find other things ready
                at = places[loops[inner].end] + 1
                continue
            cycles, pipe, taken = costs[one.op]
            begin = max([now, *(ready[r] for r in one.reads if r in ready)])
            begin += next((held for name, held in STALLS.items() if one.op.startswith(name)), 0)
            loop.latency += begin + 1 - now
            now = begin + 1
            ready.update((register, begin + cycles) for register in one.writes)
            pipes[pipe] += taken
            loop.instructions += 1
            loop.barriers += bool(BARRIER.match(one.op))
            loop.matrix += bool(MATRIX.match(one.op))
            at += 1
        loop.fp64 = pipes.pop("fp64", 0)
        loop.issue = max([loop.instructions, *pipes.values()])
        return now

    turn(0, 0)


def trips(code: list[Instruction], branch: Instruction) -> int | None:
    """How often a loop turns that ends in this branch, where it counts a register by a constant up to a constant."""
    body = [i for i in code if branch.target <= i.at < branch.at]
    leaves = [i.reads for i in body if re.match(r"CALL|BRA|EXIT|s_cbranch", i.op)]
    deciding = set(branch.reads or (leaves[-1] if leaves else ()))
    for compare in reversed([i for i in body if re.match(r"U?ISETP|s_cmp", i.op)]):
        if not deciding.intersection(compare.writes):
            continue
        deciding = {name for name in compare.reads if "P" in name}  # the lower half of 64 bits decides as well
        limits = re.findall(r"(?<=, )(-?0x[0-9a-f]+|-?\d+|U?RZ)\b", compare.text)
        for register in compare.reads:
            steps = [by for i in body if register in i.writes and (by := step(i, register))]
            before = [i for i in code if i.at < branch.target and register in i.writes]
            start = constant(before[-1]) if before else None
            if len(steps) == 1 and limits and start is not None:
                turns = -(-(number(limits[-1]) - start) // steps[0])
                if turns > 0:
                    return turns
    return None


def step(i: Instruction, register: str) -> int | None:
    """What an instruction adds to a register, if that is a constant."""
    if register not in i.reads or not re.match(r"VIADD|U?IADD3|IMAD\.IADD|s_add", i.op):
        return None
    found = re.findall(r", (-?(?:0x[0-9a-f]+|\d+))\b", i.text)
    return number(found[-1]) if found else None


def constant(i: Instruction) -> int | None:
    """What an instruction sets its register to, if that is a constant."""
    last = i.text.split(",")[-1].strip()
    if not re.match(r"U?MOV|IMAD\.MOV|CS2R|s_mov", i.op) or not re.fullmatch(r"-?0x[0-9a-f]+|-?\d+|[US]?RZ", last):
        return None
    return number(last)


def number(text: str) -> int:
    value = 0 if text.endswith("RZ") else int(text, 0)
    return value - (1 << 32) if value >= 1 << 31 else value


LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[0-9T]+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
REGISTER = re.compile(r"\b(U?R\d+|U?P\d)\b")


def parse_sass(text: str) -> list[Instruction]:
    """`cuobjdump -sass` of one kernel, up to its last EXIT: what follows are functions that are called on slow paths."""
    code = []
    for at, guard, op, operands in LINE.findall(text):
        found = REGISTER.findall(operands)
        n = written(op, operands)
        writes, reads = found[:n], [*found[n:], *REGISTER.findall(guard)]
        writes = [w for first in writes for w in wide(first, op)]
        branch = re.search(r"\b(0x[0-9a-f]+)$", operands.strip()) if op.startswith("BRA") else None
        code.append(
            Instruction(int(at, 16), op, tuple(writes), tuple(reads), operands, int(branch[1], 16) if branch else None)
        )
    last = max(n for n, i in enumerate(code) if i.op == "EXIT")
    return code[: last + 1]


def written(op: str, operands: str) -> int:
    """How many of the registers named first are results."""
    if re.match(r"ST|RED\.|REDG|BRA|BAR|EXIT|LDGSTS|UBLK|UTMA|BSSY|BSYNC|SYNCS\.ARR|CCTL|MEMBAR|DEPBAR", op):
        return 0
    first = operands.split(",")[0].strip()
    if re.fullmatch(r"!?U?P[0-9T]", first):
        return (
            len(re.findall(r"\bU?P\d", ",".join(operands.split(",")[:2])))
            if "SETP" in op
            else 1 + op.startswith("SHFL")
        )
    return 1 if REGISTER.fullmatch(first.replace(".reuse", "")) else 0


def wide(register: str, op: str) -> list[str]:
    """The registers that a result fills."""
    if "P" in register:
        return [register]
    size = 4 if re.search(r"\.128|HMMA|M88\.4", op) else 2 if re.search(r"\.64|^D|WIDE|CS2R$", op) else 1
    name, number = re.match(r"(U?R)(\d+)", register).groups()
    return [f"{name}{int(number) + i}" for i in range(size)]


GCN = re.compile(r"\b([vsa])(?:(\d+)\b|\[(\d+):(\d+)\])|\b(vcc|scc|exec)\b")


def parse_gcn(text: str) -> list[Instruction]:
    """The assembly that Triton keeps for AMD. Addresses are line numbers."""
    code, labels, jumps, named = [], {}, [], []
    for number, line in enumerate(text[: text.rindex("s_endpgm") + 9].splitlines()):
        line = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", line):
            named.append(label[1])
        if not re.match(r"[a-z]+_\w+", line) or ":" in line.split()[0]:
            continue
        op, _, operands = line.partition(" ")
        found = [name for match in GCN.finditer(operands) for name in registers(match)]
        first = [name for match in GCN.finditer(operands.split(",")[0]) for name in registers(match)]
        stores = re.match(r"s_cbranch|s_cmp|\w+_store|s_barrier|s_waitcnt|ds_write", op)
        writes = [] if stores else first
        reads = found if stores else found[len(first) :]
        writes += ["scc"] if op.startswith("s_cmp") else []
        reads += ["scc"] if op.startswith("s_cbranch_scc") else []
        code.append(Instruction(number, op, tuple(writes), tuple(reads), operands))
        labels.update((name, number) for name in named)
        named = []
        if op.startswith(("s_cbranch", "s_branch")):
            jumps.append((code[-1], operands.strip()))
    for jump, label in jumps:
        jump.target = labels.get(label)
    return code


def registers(match: re.Match) -> list[str]:
    kind, one, first, last, special = match.groups()
    if special:
        return [special]
    return [f"{kind}{one}"] if one else [f"{kind}{i}" for i in range(int(first), int(last) + 1)]
