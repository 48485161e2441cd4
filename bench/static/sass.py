"""Reading a cubin: its resources, its instructions and their loops, and the cycles each pipe of a processor needs.

resources(cubin)      registers, stack, spills, static shared memory of every kernel in it
functions(cubin)      the instructions of every kernel
loops(code)           natural loops, outermost first: a back edge whose target dominates its source
mix(instructions)     {class: count}
cycles(gpu, mix, ...) {pipe: clocks of one processor}
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.static.gpus import Gpu

TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "QGMMA", "IGMMA", "UTCQMMA", "QMMA", "DMMA")
CLASSES = {
    "fma": "FADD FMUL FFMA FADD32I FMUL32I FFMA32I IMAD IMAD32I HADD2 HFMA2 HMUL2 UIMAD",
    "fma2": "FADD2 FMUL2 FFMA2",
    "max": "FMNMX FMNMX3 HMNMX2 VHMNMX",
    "add": "IADD IADD3 VIADD",
    "alu": "FSETP FSEL FSET LEA LOP3 SHF PRMT ISETP SEL IMNMX VIMNMX VIMNMX3 VIADDMNMX IABS PLOP3 MOV "
    "F2FP HSETP2 SGXT BMSK ISCADD R2P P2R FCHK LOP SHL SHR MOVM",
    "mufu": "MUFU",
    "convert": "F2F F2I I2F I2FP FRND POPC FLO BREV",
    "shuffle": "SHFL",
    "shared": "LDS LDSM STS STSM ATOMS",
    "load": "LDG LD",
    "store": "STG ST",
    "atomic": "RED REDG ATOM ATOMG UBLKRED",
    "copy": "LDGSTS UBLKCP UTMALDG UTMASTG UTMAPF UBLKPF",
    "spill": "LDL STL",
    "tmem": "LDTM STTM UTCCP UTCBAR UTCATOMSWS UTCCP",
    "barrier": "BAR SYNCS WARPSYNC BSYNC BSSY DEPBAR LDGDEPBAR MEMBAR ARRIVES CGAERRBAR WARPGROUP UTMACMDFLUSH "
    "UTMACCTL FENCE UCGABAR_ARV UCGABAR_WAIT WARPGROUPSET USETMAXREG NANOSLEEP ELECT CCTL",
}
CLASS_OF = {name: group for group, names in CLASSES.items() for name in names.split()} | dict.fromkeys(TENSOR, "tensor")
SHARED_BYTES = {"8": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: the opcode with its modifiers, its operands and where it may jump to."""

    op: str
    operands: str
    target: str | None  # a label
    predicated: bool

    @property
    def base(self) -> str:
        return self.op.partition(".")[0]

    @functools.cached_property
    def group(self) -> str:
        return CLASS_OF.get(self.base, "uniform" if self.base.startswith("U") or self.base == "R2UR" else "other")


@dataclass
class Code:
    """A kernel's instructions in order, and where its labels stand among them."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class Loop:
    """A natural loop: indices of its instructions and of those that belong to no inner loop; the loops inside it."""

    all: list[int]
    own: list[int]
    inner: list[Loop] = field(default_factory=list)


@functools.cache
def tool(name: str) -> str:
    """The path of cuobjdump, nvdisasm or ptxas, from Triton's wheel or the PATH.  Raises FileNotFoundError."""
    try:
        import triton
    except ImportError:
        pass
    else:
        inside = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        if os.access(inside, os.X_OK):
            return str(inside)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in Triton's wheel nor on the PATH")
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:500]}")
    return done.stdout


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """{kernel: {"registers", "stack", "shared", "local"}}: per thread, except the static shared bytes of a block."""
    text = run(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
    pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    keys = ("registers", "stack", "shared", "local")
    return {m[1]: dict(zip(keys, map(int, m.groups()[1:]), strict=True)) for m in re.finditer(pattern, text)}


def functions(cubin: Path) -> dict[str, Code]:
    """The SASS of every kernel in a cubin."""
    return parse(run(tool("nvdisasm"), "-c", str(cubin)))


def parse(listing: str) -> dict[str, Code]:
    """nvdisasm's text -> {kernel: Code}."""
    found: dict[str, Code] = {}
    code = Code()
    line_pattern = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)\s*(.*?)\s*;")
    for line in listing.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\S+?),", line):
            code = found.setdefault(section[1], Code())
        elif label := re.match(r"\s*(\.L\w*):", line):
            code.labels[label[1]] = len(code.instructions)
        elif m := line_pattern.match(line):
            to = re.search(r"`\((\.L\w+)\)", m[3])
            guarded = bool(m[1]) or bool(re.match(r"!?U?P\w+,|U?R\d+,", m[3]))
            code.instructions.append(Instruction(m[2], m[3], to[1] if to else None, guarded))
    return found


def loops(code: Code) -> list[Loop]:
    """The natural loops that are in no other loop, by position; each holds those inside it."""
    blocks, follow = _blocks(code)
    dominators = _dominators(follow)
    before: list[set[int]] = [set() for _ in follow]
    for b, after in enumerate(follow):
        for s in after:
            before[s].add(b)
    bodies: dict[int, set[int]] = {}
    for b, after in enumerate(follow):
        for head in after:
            if b in dominators and head in dominators[b]:
                body, todo = bodies.setdefault(head, {head}), [b]
                while todo:
                    node = todo.pop()
                    if node not in body and node in dominators:
                        body.add(node)
                        todo += before[node]
    return _nest([bodies[h] for h in bodies], blocks)


def _nest(bodies: list[set[int]], blocks: list[range]) -> list[Loop]:
    outer = [b for b in bodies if not any(b < other for other in bodies)]
    made = []
    for body in sorted(outer, key=min):
        inner = _nest([b for b in bodies if b < body], blocks)
        indices = [i for b in sorted(body) for i in blocks[b]]
        held = {i for loop in inner for i in loop.all}
        made.append(Loop(indices, [i for i in indices if i not in held], inner))
    return made


def _blocks(code: Code) -> tuple[list[range], list[list[int]]]:
    """Basic blocks and, for each, the blocks that may follow it."""
    ends = ("BRA", "EXIT", "RET", "BRX", "BRXU", "JMP", "CALL", "BREAK")
    starts = {0, *code.labels.values()}
    for i, instruction in enumerate(code.instructions):
        if instruction.base in ends:
            starts.add(i + 1)
    order = sorted(s for s in starts if s < len(code.instructions))
    blocks = [range(a, b) for a, b in zip(order, [*order[1:], len(code.instructions)], strict=True)]
    at = {block.start: i for i, block in enumerate(blocks)}
    follow: list[list[int]] = []
    for i, block in enumerate(blocks):
        last = code.instructions[block[-1]]
        after = []
        if last.base in ("BRA", "CALL", "BRX", "BRXU", "JMP") and last.target in code.labels:
            start = code.labels[last.target]
            if start in at:
                after.append(at[start])
        falls = last.base not in ("BRA", "EXIT", "RET", "BRX", "BRXU", "JMP") or last.predicated
        if falls and i + 1 < len(blocks):
            after.append(i + 1)
        follow.append(after)
    # a branch through a table (how specialised warps find their part) leads to what nothing else leads to
    tables = [i for i, block in enumerate(blocks) if code.instructions[block[-1]].base in ("BRX", "BRXU", "JMX")]
    reached = _reached(follow)
    for i in range(len(blocks)) if tables else ():
        if i not in reached:
            follow[tables[0]].append(i)
            reached = _reached(follow)
    return blocks, follow


def _reached(follow: Sequence[Sequence[int]]) -> set[int]:
    seen, todo = {0}, [0]
    while todo:
        new = [s for s in follow[todo.pop()] if s not in seen]
        seen.update(new)
        todo += new
    return seen


def _dominators(follow: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """{block reached from block 0: the blocks on every path to it, itself included}."""
    before: dict[int, set[int]] = {0: set()}
    todo = [0]
    while todo:
        b = todo.pop()
        for s in follow[b]:
            if s not in before:
                before[s] = set()
                todo.append(s)
            before[s].add(b)
    everything = set(before)
    found = {b: set(everything) for b in before}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in sorted(everything - {0}):
            new = set.intersection(*(found[p] for p in before[b])) | {b}
            if new != found[b]:
                found[b], changed = new, True
    return found


def spins(code: Code, loop: Loop) -> bool:
    """Whether a loop only waits for a barrier in memory (or for nothing: the trap after a kernel's end)."""
    groups = {code.instructions[i].group for i in loop.all}
    return (
        not loop.inner
        and not groups & {"tensor", "mufu", "shared", "load", "store", "max", "copy", "fma2"}
        and len(loop.all) <= 16
    )


def hot_loop(code: Code) -> Loop | None:
    """The innermost loop with the most tensor-core instructions, or else the one with the most float32 work."""
    flat: list[Loop] = []

    def collect(some: Iterable[Loop]) -> None:
        for loop in some:
            flat.append(loop)
            collect(loop.inner)

    collect(loops(code))

    def weight(loop: Loop) -> tuple[int, int, int]:
        count = mix(code.instructions[i] for i in loop.own)
        return count["tensor"], count["fma"] + 2 * count["fma2"] + count["max"] + count["mufu"], -len(loop.all)

    best = max(flat, key=weight, default=None)
    return best if best and weight(best)[:2] != (0, 0) else None


def mix(instructions: Iterable[Instruction]) -> Counter[str]:
    """Warp instructions by class, "instructions" in all, and "shared bytes" that they move in shared memory."""
    count: Counter[str] = Counter()
    for instruction in instructions:
        count[instruction.group] += 1
        count["instructions"] += 1
        if instruction.group == "shared":
            count["shared bytes"] += 32 * _width(instruction)
    return count


def _width(instruction: Instruction) -> int:
    """Bytes that one lane moves."""
    parts = instruction.op.split(".")
    if "M88" in instruction.op or parts[0] in ("LDSM", "STSM"):
        return 4 * (int(parts[-1]) if parts[-1] in ("2", "4") else 1)
    return next((SHARED_BYTES[p] for p in parts[1:] if p in SHARED_BYTES), 4)


def cycles(gpu: Gpu, count: Counter[str] | dict[str, float], warps: int, tensor_flops: float = 0.0) -> dict[str, float]:
    """{pipe: clocks that one processor's pipe is busy} for `count` instructions in each of `warps` warps.

    `tensor_flops`, of all warps together, counts bfloat16 as 1 and TF32 as 2.
    """
    lanes = 32 * warps

    def of(*names: str) -> float:
        return sum(count.get(name, 0) for name in names)

    return {
        "tensor": tensor_flops / gpu.tensor,
        "exp": of("mufu", "convert") * lanes / gpu.mufu,
        "fma": (of("fma") + 2 * of("fma2")) * lanes / gpu.fma,
        "alu": (of("alu") / gpu.alu + of("add") / gpu.add + of("max") / gpu.minmax) * lanes,
        "shared": of("shared bytes") * warps / gpu.shared_rate + of("shuffle") * lanes / gpu.shuffle,
        "issue": of("instructions") * warps / gpu.issue,
    }
