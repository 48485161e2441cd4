"""Plants faults in the kernels of the CPU and the GPU and says which check finds each.

    python tests/mutations/mutations.py [word ...] [--update]

A fault is a change of source text that must occur exactly once in its file, or of one instruction of the compiled PTX.
A faulty C++ kernel is judged by the project's own tests of its op (cpu_kernels.py).  A faulty GPU kernel runs a small
suite of its op (gpu_suites.py) in the emulator.  It is

    caught       a test fails; the emulator raises, or an output breaks the tolerance rule of cibr_kernels/testing.py
    equivalent   every output of the suite has the same bits as without the fault; GPU only
    missed       anything else

Words restrict the run to the faults one of them is in: "cpu", "gpu", "cpu lse:", "stash" in "cpu lse: a stash ...".
--update keeps the verdicts (verdicts.py), for the tests, and for the next run to begin with what found a fault.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/support"), str(HERE)]

import torch  # noqa: E402
from emulator import PtxError  # noqa: E402
from torch import Tensor  # noqa: E402


class StaleAnchor(Exception):
    """The text that a fault replaces does not occur exactly once: the kernel changed, and the fault has to follow."""


@dataclass
class Fault:
    """In `path` (from the repository's root) `old` becomes `new`; or `ptx` edits the PTX of `kernel`."""

    name: str
    suite: str  # of gpu_suites.SUITES
    path: str = ""
    old: str = ""
    new: str = ""
    kernel: str = ""
    ptx: Callable[[str], str] | None = None
    edited: int = 0  # launches whose PTX was edited

    def source(self) -> str:
        text = (ROOT / self.path).read_text()
        if text.count(self.old) != 1:
            raise StaleAnchor(f"{self.name}: {self.path} has {text.count(self.old)} times {self.old!r}")
        return text.replace(self.old, self.new)

    def edit_ptx(self, kernel: str, ptx: str) -> str:
        if self.ptx is None or kernel != self.kernel:
            return ptx
        self.edited += 1
        return self.ptx(ptx)


class Suite(Protocol):
    """Small problems of one op, run with a fault or without (None): the outputs of one problem after the other."""

    def run(self, fault: Fault | None) -> Iterator[dict[str, Tensor]]: ...

    def check(self, outputs: dict[str, Tensor]) -> None:
        """Raises AssertionError for an output of a problem that is not right."""


@dataclass(frozen=True)
class Verdict:
    fault: Fault
    kind: str  # caught, equivalent, missed
    by: str
    seconds: float
    finder: str = ""  # the test, of the CPU's

    def __str__(self) -> str:
        return f"{self.kind:10} {self.seconds:5.1f} s  {self.fault.suite:14} {self.fault.name:45} {self.by[:150]}"


def delete(text: str, number: int = 0) -> Callable[[str], str]:
    """Deletes the `number`-th instruction of the PTX that starts with `text`."""

    def edit(ptx: str) -> str:
        lines = ptx.splitlines()
        found = [i for i, line in enumerate(lines) if line.strip().startswith(text)]
        if len(found) <= number:
            raise StaleAnchor(f"the PTX has {len(found)} times {text!r}")
        del lines[found[number]]
        return "\n".join(lines)

    return edit


def later(text: str) -> Callable[[str], str]:
    """Lets every wait that starts with `text` leave one more group in flight."""

    def edit(ptx: str) -> str:
        ptx, count = re.subn(rf"({re.escape(text)}\S*\s+)(\d+)", lambda found: f"{found[1]}{int(found[2]) + 1}", ptx)
        if count == 0:
            raise StaleAnchor(f"the PTX has no {text!r}")
        return ptx

    return edit


def judge(fault: Fault, suite: Suite, sound: dict[str, Tensor]) -> Verdict:
    """Runs the suite with the fault; `sound` are its outputs without."""
    start = time.perf_counter()

    def verdict(kind: str, by: str) -> Verdict:
        return Verdict(fault, kind, by, time.perf_counter() - start)

    same = True
    try:
        with closing(suite.run(fault)) as problems:
            for outputs in problems:
                if not all(same_bits(t, sound[name]) for name, t in outputs.items()):
                    same = False
                    suite.check(outputs)
    except PtxError as error:
        return verdict("caught", f"emulator, {type(error).__name__}: {str(error).splitlines()[0]}")
    except AssertionError as error:
        return verdict("caught", f"tolerance, {str(error).splitlines()[0]}")
    if fault.ptx is not None and not fault.edited:
        raise StaleAnchor(f"{fault.name}: no launch of {fault.kernel}")
    if same:
        return verdict("equivalent", f"bit-identical over {len(sound)} outputs")
    return verdict("missed", "another result, within the tolerance")


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (a, b)))


def run(
    faults: Sequence[Fault],
    suites: dict[str, Suite],
    watched: Callable[[str], AbstractContextManager[None]] = lambda suite: nullcontext(),
) -> Iterator[Verdict]:
    """Verdicts in order.  Raises StaleAnchor before anything runs, AssertionError where a suite fails without fault.

    watched: what a suite runs in without a fault.
    """
    for fault in faults:
        if fault.path:
            fault.source()
    sound: dict[str, dict[str, Tensor]] = {}
    for fault in faults:
        suite = suites[fault.suite]
        if fault.suite not in sound:
            with watched(fault.suite):
                sound[fault.suite] = {name: t for outputs in suite.run(None) for name, t in outputs.items()}
            suite.check(sound[fault.suite])
        yield judge(fault, suite, sound[fault.suite])


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def chosen(
    words: Sequence[str], device: str, faults: Sequence[Fault], missing: Callable[[str], str | None]
) -> list[Fault]:
    """The faults that the words ask for; says which cannot be judged here."""
    asked = [f for f in faults if not words or any(w in f"{device} {f.suite}: {f.name}" for w in words)]
    for suite in dict.fromkeys(f.suite for f in asked):
        if reason := missing(suite):
            print(f"not run: {device} {suite}, {reason}")
    return [f for f in asked if not missing(f.suite)]


def score(device: str, verdicts: Sequence[Verdict], seconds: float) -> int:
    """Prints it; the number of faults missed."""
    count = Counter(v.kind for v in verdicts)
    print(
        f"{device} score {count['caught']} of {len(verdicts) - count['equivalent']}; {count['equivalent']} equivalent "
        f"(bit-identical outputs over the suite); {seconds:.0f} s"
    )
    return count["missed"]


def main(words: Sequence[str]) -> int:
    import cpu_faults
    import cpu_kernels
    import cpu_keys
    import gpu_faults
    import gpu_suites
    from verdicts import CPU, GPU, load, name, row, save

    torch.set_num_threads(1)
    update, words = "--update" in words, [word for word in words if word != "--update"]
    missed = 0
    if faults := chosen(words, "cpu", cpu_faults.FAULTS, cpu_kernels.missing):
        start = time.perf_counter()
        found = cpu_kernels.run(faults, {fault: kept["by"] for fault, kept in load(CPU).items()}, cpu_keys.known)
        missed += score("cpu", found, time.perf_counter() - start)
        if update:
            rows = {name(v.fault): row(v.kind, v.finder, cpu_keys.key(v.fault, v.finder)) for v in found}
            save(CPU, rows, cpu_faults.FAULTS)
    if faults := chosen(words, "gpu", gpu_faults.FAULTS, gpu_suites.missing):
        start, found = time.perf_counter(), []
        with poisoned():
            for verdict in run(faults, gpu_suites.SUITES, gpu_suites.watched):
                print(verdict, flush=True)
                found.append(verdict)
        missed += score("gpu", found, time.perf_counter() - start)
        if update:
            rows = {name(v.fault): row(v.kind, v.by[:150], gpu_suites.key(v.fault)) for v in found}
            save(GPU, rows, gpu_faults.FAULTS)
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
