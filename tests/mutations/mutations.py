"""Plants faults in the GPU kernels and says which check finds each.

    python tests/mutations/mutations.py [word ...]

A fault is a change of source text that must occur exactly once in its file, or of one instruction of the compiled PTX.
Each faulty kernel runs a small suite of its op (gpu_suites.py) in the emulator.  It is

    caught       the emulator raises, or an output breaks the tolerance rule of cibr_kernels/testing.py
    equivalent   every output of the suite has the same bits as without the fault
    missed       anything else

Words restrict the run to the faults whose name or suite contains one of them.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
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


def run(faults: Sequence[Fault], suites: dict[str, Suite]) -> Iterator[Verdict]:
    """Verdicts in order.  Raises StaleAnchor before anything runs, AssertionError where a suite fails without fault."""
    for fault in faults:
        if fault.path:
            fault.source()
    sound: dict[str, dict[str, Tensor]] = {}
    for fault in faults:
        suite = suites[fault.suite]
        if fault.suite not in sound:
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


def main(words: Sequence[str]) -> int:
    from gpu_faults import FAULTS
    from gpu_suites import SUITES, missing

    for name in SUITES:
        if reason := missing(name):
            print(f"not run: {name}, {reason}")
    chosen = [f for f in FAULTS if not missing(f.suite)]
    chosen = [f for f in chosen if not words or any(w in f.name or w in f.suite for w in words)]
    torch.set_num_threads(1)
    start, count = time.perf_counter(), {"caught": 0, "equivalent": 0, "missed": 0}
    with poisoned():
        for v in run(chosen, SUITES):
            count[v.kind] += 1
            print(f"{v.kind:10} {v.seconds:5.1f} s  {v.fault.suite:14} {v.fault.name:45} {v.by[:150]}", flush=True)
    total = len(chosen) - count["equivalent"]
    print(
        f"score {count['caught']} of {total}; {count['equivalent']} equivalent (bit-identical outputs over the suite); "
        f"{time.perf_counter() - start:.0f} s"
    )
    return count["missed"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
