"""The measuring function: `measure(case)` -> times, peaks, passes and agreement of every implementation of it.

Memory: one call per implementation (on the CPU a process of its own), which warms up, runs once and reads the peak
beyond what was there before.  Time: one call per case that runs the implementations in turn (A B C A B C ...), so that
a busy moment hits all of them; the unit of the floor (floor.py) is timed after each A.  Devices: devices.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import processes
from bench.cases import Case, Passes
from bench.devices import Cpu, Device
from bench.disassembly import Unreadable
from bench.floor import DOT_FAMILY, Floor, critic_floor, floor_seconds
from bench.inputs import Inputs, make_inputs
from bench.peers import IMPLEMENTATIONS, Loss, gigabytes

# largest relative difference from the fused op of the loss and of the gradients: bfloat16 peers round their logits
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (5e-2, 5e-2)}
CPU = Cpu()
ROUNDS = 15
AT_LEAST = 0.5  # seconds of all implementations: cases of milliseconds take more rounds, because many are disturbed
Gradients = tuple[Tensor | None, ...]


@dataclass
class Row:
    """One implementation of one case; fields stay None where it did not run, and `note` says why."""

    implementation: str
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    loss_diff: float | None = None
    grad_diff: float | None = None
    wrong: bool = False
    note: str = ""
    passes: Passes | None = None
    numerics: str = ""
    floor_percent: float | None = None
    loss: float | None = None

    @property
    def time(self) -> float | None:
        """Median seconds."""
        return median(self.seconds) if self.seconds else None

    @property
    def best(self) -> float | None:
        """Least seconds."""
        return min(self.seconds, default=None)


@dataclass
class Result:
    """A measured case; the best `rates` of its floor's unit: flop/s of the vendor's X Y^T, G Y and G^T X, or the vector
    instructions or floors of a second and how often a second it could do the critics' matmuls.
    """

    case: Case
    rows: list[Row]
    rates: tuple[float, ...] | None
    unit: str = ""
    floor_note: str = ""


def measure(
    case: Case,
    budget: float,
    tick: Callable[[str], None] = lambda label: None,
    deadline: float | None = None,
    device: Device = CPU,
) -> Result:
    """Runs a case; timing takes about `budget` seconds, and at least one round.  `tick` is told of every step.

    What is unfinished at `deadline`, on the clock of time.monotonic, is stopped and noted.
    """
    rows = [Row(name) for name in case.implementations]
    for row in rows:
        tick(f"{case.name} {row.implementation}: memory")
        implementation = IMPLEMENTATIONS[case.op, row.implementation]
        row.passes, row.numerics = implementation.passes(case), implementation.numerics(case)
        needed, available = implementation.peak_bytes(case), device.available()
        if needed > available:
            row.note = f"needs about {gigabytes(needed)}, {gigabytes(available)} may be used: not run"
            continue
        try:
            row.extra_bytes = device.call(memory_child, case, row.implementation, device, deadline=deadline)
        except processes.Failed as error:
            row.note, row.wrong = f"failed: {error}", row.implementation == "fused"
    tick(f"{case.name}: time")
    able = tuple(row.implementation for row in rows if row.extra_bytes is not None)
    if not able:
        return Result(case, rows, None)
    try:
        timed, rates, unit = device.call(time_child, case, able, budget, device, deadline=deadline)
    except processes.Failed as error:
        for row in rows:
            row.note = row.note or f"failed: {error}"
        return Result(case, rows, None)
    for row in rows:
        for key, value in timed.get(row.implementation, {}).items():
            setattr(row, key, value)
        row.wrong = row.wrong or not agrees(case, row)
    best = tuple(max(kind) for kind in zip(*rates, strict=True))
    result = Result(case, rows, best or None, unit)
    add_floor(result)
    return result


def add_floor(result: Result) -> None:
    """Percent of the floor: of every row in the dot family, of the fused one elsewhere.

    The floor is from the best rates of its unit, so from the best run's time too.
    """
    case, fused = result.case, result.rows[0]
    if result.rates is None:
        return
    if case.op in DOT_FAMILY:
        size = (case.n, case.n, case.width)
        for row in result.rows:
            if row.best and row.passes:
                row.floor_percent = 100 * floor_seconds(row.passes, *size, result.rates) / row.best
        if len(result.rates) > 1 and fused.best and fused.passes:
            strict = floor_seconds(Passes(fused.passes.total, 0), *size, result.rates) / fused.best
            result.floor_note = f"with every matmul at the rate of X Y^T: {100 * strict:.0f} %"
        return
    rate, of_projections = result.rates
    floor = Floor(1 / rate, None, f"floor: {result.unit}")
    try:
        floor = critic_floor(case, rate) if case.op == "critic_moments" else floor
    except Unreadable as error:
        result.floor_note = f"no floor: {error}"
        return
    projections = 1 / of_projections
    result.floor_note = f"{floor.note}: {1e3 * floor.seconds:.3g} ms, the critics' matmuls {1e3 * projections:.3g} ms"
    if fused.best:
        fused.floor_percent = 100 * (floor.seconds + projections) / fused.best
        result.floor_note += f"; without those {100 * floor.seconds / fused.best:.0f} %"
        if floor.arithmetic:
            strict = floor.arithmetic + projections
            result.floor_note += f"; what computes alone: {1e3 * strict:.3g} ms, {100 * strict / fused.best:.0f} %"


def agrees(case: Case, row: Row) -> bool:
    """False when a row's loss or gradients differ from the fused op's by more than rounding, or are NaN."""
    loss, grad = TOLERANCE[case.dtype]
    return all(d is None or d <= limit for d, limit in ((row.loss_diff, loss), (row.grad_diff, grad)))


def turns(seconds: Mapping[str, Sequence[float]], budget: float, rounds: int, at_least: float = 0.0) -> Iterator[str]:
    """Who runs next, for a caller that adds to `seconds`: in turn, from 1 to `rounds` times each.

    Who has used up its share of `budget` seconds sits the next rounds out.  Where all of them together took less than
    `at_least` seconds, more rounds follow.
    """
    done = 0
    while done < rounds or sum(map(sum, seconds.values())) < min(at_least, budget):
        for name in seconds:
            if not done or sum(seconds[name]) <= budget / len(seconds):
                yield name
        done += 1


def run(loss: Loss, inputs: Inputs, backward: bool) -> tuple[Tensor, Gradients]:
    """One forward, or one training step's forward and backward."""
    if not backward:
        with torch.no_grad():
            return loss(inputs), ()
    value = loss(inputs)
    return value.detach(), torch.autograd.grad(value, inputs.leaves, allow_unused=True)


# ------------------------------------------------------------------------------------------------ in the child
def memory_child(case: Case, name: str, device: Device = CPU) -> int:
    """-> bytes at the peak beyond those there before, gradients included."""
    device.fresh()
    loss, inputs = prepare(case, name, device), make_inputs(case, device.name)
    return device.peak_bytes(lambda: run(loss, inputs, case.backward))


def time_child(
    case: Case, names: tuple[str, ...], budget: float, device: Device = CPU
) -> tuple[dict[str, dict[str, Any]], list[tuple[float, ...]], str]:
    """-> per implementation {"seconds", "loss", differences from the first}; rates and name of the floor's unit."""
    inputs = make_inputs(case, device.name)
    steps = {name: _step(case, name, inputs, device) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    answers: dict[str, dict[str, Any]] = {name: {"seconds": seconds[name]} for name in names}
    unit, rates = device.gauge(case), []
    first: tuple[Tensor, Gradients] | None = None
    for name in turns(seconds, budget, ROUNDS, AT_LEAST):
        took, (value, grads) = device.timed(steps[name])
        seconds[name].append(took)
        if "loss" not in answers[name]:
            answers[name]["loss"] = value.item()
            if first is None:
                first = value, grads
            elif IMPLEMENTATIONS[case.op, name].same:
                answers[name] |= difference(first, value, grads)
        del value, grads
        if unit and name == names[0]:
            rates.append(unit.rates())
    return answers, rates, unit.what if unit else ""


def _step(case: Case, name: str, inputs: Inputs, device: Device) -> Callable[[], tuple[Tensor, Gradients]]:
    loss = prepare(case, name, device)

    def step() -> tuple[Tensor, Gradients]:
        return run(loss, inputs, case.backward)

    return device.graph(step) if IMPLEMENTATIONS[case.op, name].graph else step


def prepare(case: Case, name: str, device: Device = CPU) -> Loss:
    """The implementation, warmed up: libraries are loaded and threads started; a compiler has seen the real shapes."""
    implementation = IMPLEMENTATIONS[case.op, name]
    loss = implementation.build(case)
    inputs = make_inputs(case.shrunk() if device.small_warm_up and not implementation.compiles else case, device.name)
    for _ in range(device.warm_ups):
        run(loss, inputs, case.backward)
    return loss


def difference(first: tuple[Tensor, Gradients], value: Tensor, grads: Gradients) -> dict[str, float | None]:
    """From the first implementation: the loss (relative, absolute below 1 nat) and the worst gradient by norm.

    A gradient that one of them lacks (None) is left out.
    """

    def relative(a: Tensor, b: Tensor, scale: float) -> float:
        return (a.double() - b.double()).norm().item() / max(scale, 1e-30)

    reference, reference_grads = first
    pairs = [(a, b) for a, b in zip(reference_grads, grads, strict=True) if a is not None and b is not None]
    norms = [a.double().norm().item() for a, _ in pairs]
    least = 1e-2 * max(norms, default=0.0)  # a critic's last bias has gradient 0: it is held against the others
    differences = [relative(a, b, max(s, least)) for (a, b), s in zip(pairs, norms, strict=True)]
    return {
        "loss_diff": relative(reference, value, max(1.0, abs(reference.item()))),
        "grad_diff": max(differences) if differences else None,
    }
