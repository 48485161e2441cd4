"""How many times as fast as its strongest baseline a fused op is, compared with a record: what `pytest bench/` holds.

Seconds differ between machines and between minutes; the ratio of two implementations that take turns does much less.
An attempt runs them in turn on one thread and compares the least processor time of each: on two threads a busy
neighbour stops one of them at a barrier and the fused op with it (a ratio of 50 became 8), and wall time counts the
neighbour's share.  The record (results/ratios.json) is by processor and instruction set of the float32 kernels.
bfloat16 is left out: there the ratio is that of the vendor's bfloat16 units.

A case fails when none of ATTEMPTS attempts reaches MARGIN of its record; on a processor without one, OTHER_PROCESSOR of
one with the same instruction set, whose caches and vendor kernels are others.  On two cores under a load of 4, single
attempts were between 0.77 and 1.2 of their median, so this finds an op that became a third slower; smaller changes are
for instructions.py, which has no such noise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

from bench import machine, measure
from bench.cases import CASES, Case
from bench.critic_code import NAMESPACES
from bench.guards import RESULTS
from bench.inputs import make_inputs
from cibr_kernels.dispatch import backends

RECORD = RESULTS / "ratios.json"
MARGIN, OTHER_PROCESSOR, ATTEMPTS = 0.75, 0.4, 4
RECORDED_ATTEMPTS = 5  # the record is their median
SECONDS, LEAST_ROUNDS = 2.5, 4  # of one attempt
NAMES = (
    "clip_loss-train-1024-float32",
    "clip_loss-train-2048-float32",
    "clip_loss-forward-2048-float32",
    "siglip_loss-train-1024-float32",
    "critic_moments-train-512-float32",
    "cibr_loss-train-256-float32",
)
Record = dict[str, dict[str, float]]  # by instruction set and processor, by case


def cases() -> list[Case]:
    return [case for case in CASES if case.name in NAMES]


def key() -> str:
    """The record's: the instruction set of the float32 kernels in use, and the processor."""
    return f"{instruction_set()}, {machine.processor()}"


def instruction_set() -> str:
    isa = backends.compiled().isa()
    return NAMESPACES.get(isa, isa)


def least(record: Record, case: str) -> float | None:
    """The ratio that `case` must reach here; None where nothing of this instruction set is recorded."""
    if case in (own := record.get(key(), {})):
        return MARGIN * own[case]
    others = [r[case] for name, r in record.items() if name.startswith(f"{instruction_set()},") and case in r]
    return OTHER_PROCESSOR * min(others) if others else None


def read() -> Record:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


class Race:
    """The implementations of one case, warmed up, on one thread."""

    def __init__(self, case: Case) -> None:
        torch.set_num_threads(1)
        self.case, self.inputs = case, make_inputs(case)
        self.losses = {name: measure.prepare(case, name) for name in case.implementations}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.losses}
        self.run_baselines()
        self.run_fused()
        once = sum(times[0] for times in self.seconds.values())
        self.rounds = max(LEAST_ROUNDS, int(SECONDS / once))

    def _run(self, name: str) -> None:
        began = time.process_time()
        measure.run(self.losses[name], self.inputs, self.case.backward)
        self.seconds[name].append(time.process_time() - began)

    def run_fused(self) -> None:
        self._run("fused")

    def run_baselines(self) -> None:
        for name in self.case.baselines:
            self._run(name)

    def attempt(self) -> float:
        """-> the ratio of one attempt."""
        self.forget()
        for _ in range(self.rounds):
            self.run_baselines()
            self.run_fused()
        return self.ratio()

    def forget(self) -> None:
        for times in self.seconds.values():
            times.clear()

    def ratio(self) -> float:
        """The strongest baseline's least time over the fused op's, of what has run since `forget`."""
        return min(self.seconds[self.strongest()]) / min(self.seconds["fused"])

    def strongest(self) -> str:
        return min(self.case.baselines, key=lambda name: min(self.seconds[name]))


def attempts(first: float, again: Callable[[], float], needed: float) -> list[float]:
    """The ratios of as many attempts as it takes to reach `needed`, or ATTEMPTS."""
    found = [first]
    while max(found) < needed and len(found) < ATTEMPTS:
        found.append(again())
    return found
