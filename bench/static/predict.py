"""Predicted time of a recorded step on a GPU that is not here.  Every number is a prediction, never a measurement.

Per Triton launch, from the compiler's output and the launch itself:
    pipes    clocks that a program keeps each pipe of a processor busy: instructions of every loop of the SASS x how
             often it runs (counted in the TTIR), over the pipe's rate; tensor flop and second-level cache bytes from
             the TTIR
    alone    sum over the loops of the busiest pipe of each: a program that has the processor to itself
    program  max(busiest pipe / efficiency, alone / blocks per processor): co-resident blocks overlap their phases
    launch   max(waves of programs, bytes of device memory / (bandwidth x efficiency)) + a fixed start
A vendor GEMM takes max(flop / (peak x efficiency), bytes); any other PyTorch kernel its bytes.

Assumed, and nowhere measured here: EFFICIENCY, START, CACHE_RATE.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.static import sass, ttir
from bench.static.compiled import Compiled, compile_launch
from bench.static.gpus import GPUS, Gpu
from bench.static.record import Event, Gemm, Launch, Other

TENSOR_EFFICIENCY = {80: 0.82, 90: 0.72, 100: 0.70, 120: 0.80}  # of a large vendor GEMM, and of our tensor loops
PIPE_EFFICIENCY = 0.80
MEMORY_EFFICIENCY = 0.85
CACHE_RATE = 64  # bytes per clock that a processor takes from the second-level cache
START = 2e-6  # seconds from the end of one kernel to the start of the next
SLOWER = {"bf16": 1, "f16": 1, "tf32": 2, "f8E4M3FN": 0.5, "f8E5M2": 0.5, "ieee": 0, "bf16x3": 3, "tf32x3": 6}


@dataclass
class Part:
    """Launches of one kernel, or of one kind of vendor kernel, in a step."""

    name: str
    kind: str  # "triton", "vendor GEMM" or "torch"
    launches: int = 0
    flops: float = 0.0  # of matrix products
    bytes: float = 0.0  # of device memory
    seconds: float = 0.0  # predicted
    bound: float = 0.0  # seconds of the busiest pipe or of device memory at full rate: no launch can be faster
    limits: Counter[str] = field(default_factory=Counter)  # seconds by what limits the launches
    pipes: Counter[str] = field(default_factory=Counter)  # seconds of every pipe at full rate
    note: str = ""


@dataclass
class Step:
    """What a whole forward, or forward and backward, is predicted to take."""

    gpu: Gpu
    parts: list[Part]

    def total(self, name: str) -> float:
        return float(sum(getattr(part, name) for part in self.parts))

    @property
    def percent_of_peak(self) -> float:
        """Executed matrix flop over what the tensor cores could do in bfloat16 in the predicted time."""
        return 100 * self.total("flops") / self.total("seconds") / self.gpu.peak

    def passes(self, n: int, m: int, d: int) -> float:
        """Matrix products of n x m x d that the recorded flops make."""
        return self.total("flops") / (2 * n * m * d)

    @property
    def limit(self) -> str:
        """What limits the part that takes longest."""
        longest = max(self.parts, key=lambda part: part.seconds)
        return f"{longest.name}: {longest.limits.most_common(1)[0][0]}"


@functools.cache
def _compile(key: Any, holder: _Held, capability: int) -> Compiled:
    return compile_launch(holder.launch, capability)


@dataclass(frozen=True)
class _Held:
    """A launch that hashes as nothing: the key beside it decides."""

    launch: Launch = field(compare=False)


def compiled(launch: Launch, capability: int) -> Compiled:
    """The launch's kernel, compiled once for equal launches."""
    return _compile(launch.key, _Held(launch), capability)


def predict(events: Iterable[Event], capability: int, memory: Mapping[str, float] | None = None) -> Step:
    """The recorded events on the GPU of `capability`; `memory` is what kernels find in named scalars (ttir.work)."""
    gpu = GPUS[capability]
    parts: dict[tuple[str, str], Part] = {}
    for event in events:
        part = _one(event, gpu, memory)
        total = parts.setdefault((part.kind, part.name), Part(part.name, part.kind))
        total.note = total.note or part.note
        for name in ("launches", "flops", "bytes", "seconds", "bound"):
            setattr(total, name, getattr(total, name) + getattr(part, name))
        total.limits.update(part.limits)
        total.pipes.update(part.pipes)
    return Step(gpu, list(parts.values()))


def _one(event: Event, gpu: Gpu, memory: Mapping[str, float] | None) -> Part:
    if isinstance(event, Launch):
        return _launch(event, gpu, memory)
    moved = event.bytes / gpu.bandwidth
    if isinstance(event, Other):
        seconds = moved / MEMORY_EFFICIENCY + START
        return Part("pointwise and sums", "torch", 1, 0, event.bytes, seconds, moved, Counter({"memory": seconds}))
    assert isinstance(event, Gemm)
    # float32 products are exact unless PyTorch is told otherwise: no tensor cores
    rate = gpu.processors * gpu.ghz * 1e9 * 2 * gpu.fma if event.dtype == "float32" else gpu.peak
    busy = event.flops / rate
    at = {"tensor": busy / TENSOR_EFFICIENCY[gpu.capability], "memory": moved / MEMORY_EFFICIENCY}
    limit = max(at, key=lambda name: at[name])
    seconds = at[limit] + START
    limits, pipes = Counter({limit: seconds}), Counter({"tensor": busy, "memory": moved})
    return Part("GEMM", "vendor GEMM", 1, event.flops, event.bytes, seconds, max(busy, moved), limits, pipes)  # type: ignore[arg-type]


def _launch(launch: Launch, gpu: Gpu, memory: Mapping[str, float] | None) -> Part:
    kernel = compiled(launch, gpu.capability)
    structure = _structure(kernel)
    numbers = {name: a.value for name, a in launch.args.items() if a.value is not None}
    note = f"{launch.name} cannot be launched: it needs more than a processor has" if not kernel.blocks else ""
    note = note or (f"{launch.name} spills: {kernel.spills} instructions" if kernel.spills else "")
    try:
        done = ttir.work(structure.function, numbers, launch.grid, memory)
    except ttir.Unknown as error:
        note = f"not predicted: {error}"
        return Part(launch.name, "triton", 1, seconds=START, limits=Counter({"unknown": START}), note=note)  # type: ignore[arg-type]
    warps = kernel.warps
    pipes: Counter[str] = Counter()
    alone = flops = 0.0
    for count, work in _regions(structure, done, warps):
        here: dict[str, float] = sass.cycles(gpu, count, warps, _tensor(work))
        here["cache"] = sum(v for k, v in work.items() if k.startswith(("read:", "write:"))) / CACHE_RATE
        alone += max(v / _efficiency(k, gpu) for k, v in here.items())
        pipes.update(here)
    for work in done.values():
        flops += sum(v for k, v in work.items() if k.startswith("flops:"))
    busiest = max(pipes, key=lambda name: pipes[name] / _efficiency(name, gpu))
    choices = {busiest: pipes[busiest] / _efficiency(busiest, gpu)}
    if not kernel.specialised:  # otherwise its own warps overlap the phases
        choices["one block at a time"] = alone / max(1, kernel.blocks)
    limit = max(choices, key=lambda name: choices[name])
    hertz = gpu.ghz * 1e9
    # a few rounds of the processors are whole rounds: the last is partly empty
    exact = launch.programs / gpu.processors
    rounds = math.ceil(exact) if exact < 8 else exact
    moved = _bytes(launch, done)
    times = {limit: rounds * choices[limit] / hertz, "memory": moved / gpu.bandwidth / MEMORY_EFFICIENCY}
    limit = max(times, key=lambda name: times[name])
    per_second = {name: value * launch.programs / gpu.processors / hertz for name, value in pipes.items()}
    per_second["memory"] = moved / gpu.bandwidth
    seconds = times[limit] + START
    return Part(
        launch.name,
        "triton",
        1,
        flops * launch.programs,
        moved,
        seconds,
        max(per_second.values()),
        Counter({limit: seconds}),
        Counter(per_second),
        note,  # type: ignore[arg-type]
    )


def _efficiency(pipe: str, gpu: Gpu) -> float:
    return TENSOR_EFFICIENCY[gpu.capability] if pipe == "tensor" else PIPE_EFFICIENCY


def _tensor(work: Counter[str]) -> float:
    """Flops of tl.dot in units of bfloat16's rate."""
    return sum(v * SLOWER.get(k[6:], 1) for k, v in work.items() if k.startswith("flops:"))


def _bytes(launch: Launch, done: dict[int, Counter[str]]) -> float:
    """Device memory of a launch: every operand read once if it is read at all, every element written once."""
    total = 0.0
    moved: Counter[str] = Counter()
    for work in done.values():
        moved.update({k: v for k, v in work.items() if k.startswith(("read:", "write:"))})
    for key, count in moved.items():
        names = [name for name in key.partition(":")[2].split("|") if name in launch.args]
        sizes = [launch.args[name].bytes for name in names]
        total += min(count * launch.programs, sum(sizes)) if sizes else count * launch.programs
    return total


@dataclass(frozen=True)
class _Structure:
    """A kernel's instructions (per warp) in no loop, and in each loop that the source has too."""

    function: ttir.Function
    straight: Counter[str]
    loops: list[tuple[int, Counter[str]]]  # number in the TTIR, instructions of one trip


@functools.cache
def _structure(kernel: Compiled) -> _Structure:
    function, code = ttir.parse(kernel.ttir), kernel.code
    inside: set[int] = set()
    found: list[tuple[int, Counter[str]]] = []

    def match(machine: list[sass.Loop], source: list[ttir.LoopNode]) -> None:
        real = [loop for loop in machine if not sass.spins(code, loop)]
        for loop, node in zip(real, _align(code, real, source, kernel.specialised), strict=True):
            if node is not None:
                inside.update(loop.all)
                held = {i for inner in loop.inner if not sass.spins(code, inner) for i in inner.all}
                found.append((node.number, sass.mix(code.instructions[i] for i in loop.all if i not in held)))
                match(loop.inner, node.inner)

    match(sass.loops(code), function.loops)
    straight = sass.mix(instruction for i, instruction in enumerate(code.instructions) if i not in inside)
    return _Structure(function, straight, found)


def _align(
    code: sass.Code, machine: list[sass.Loop], source: list[ttir.LoopNode], specialised: bool
) -> list[ttir.LoopNode | None]:
    """For each loop of the SASS the loop of the TTIR that it comes from: in order, the most alike.

    With specialised warps several come from one: each has a part of its body.
    """

    def alike(loop: sass.Loop, node: ttir.LoopNode) -> int:
        count = sass.mix(code.instructions[i] for i in loop.all)
        pairs = (("tensor", "flops"), ("mufu", "exp"), ("max", "max"), ("store", "write"))
        return 1 + sum((count[group] > 0) == (kind in node.kinds) for group, kind in pairs)

    if specialised:
        return [max(source, key=lambda node, loop=loop: alike(loop, node), default=None) for loop in machine]  # type: ignore[misc]
    best: dict[tuple[int, int], tuple[int, tuple[ttir.LoopNode | None, ...]]] = {}

    def solve(i: int, j: int) -> tuple[int, tuple[ttir.LoopNode | None, ...]]:
        if i == len(machine):
            return 0, ()
        if (i, j) not in best:
            skipped = solve(i + 1, j)
            choices = [(skipped[0], (None, *skipped[1]))]
            for k in range(j, len(source)):
                rest = solve(i + 1, k + 1)
                choices.append((rest[0] + alike(machine[i], source[k]), (source[k], *rest[1])))
            best[i, j] = max(choices, key=lambda choice: choice[0])
        return best[i, j]

    return list(solve(0, 0)[1])


def _regions(
    structure: _Structure, done: dict[int, Counter[str]], warps: int
) -> Iterable[tuple[Counter[str], Counter[str]]]:
    """(instructions per warp, counted work) of a program: the code in no loop, then every loop in all its runs."""
    matched = {0, *(number for number, _ in structure.loops)}
    root = Counter(done[0])
    for number, work in done.items():
        if number not in matched:  # unrolled: what it does is in the code around it
            root.update({k: v for k, v in work.items() if k != "runs"})
    yield structure.straight, root
    counted: set[int] = set()
    for number, own in structure.loops:
        work = done.get(number, Counter())
        runs = work["runs"] / _unrolled(own, work, warps) if work["runs"] else 0
        yield Counter({name: count * runs for name, count in own.items()}), Counter() if number in counted else work  # type: ignore[misc]
        counted.add(number)


def _unrolled(own: Counter[str], work: Counter[str], warps: int) -> float:
    """Trips of the source's loop that one trip of the machine's makes, from what compilers neither add nor remove."""
    for group, kind in (("mufu", "exp"), ("max", "max")):
        per_trip = work[kind] / work["runs"] / (32 * warps)
        if own[group] and per_trip >= 1:
            return max(1, round(own[group] / per_trip))
    return 1
