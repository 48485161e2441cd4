"""`python bench/ instructions`: how many instructions the C++ kernels take, counted by valgrind's callgrind.

One thread and seeded data: counts repeat within 0.3 % (what is left is where memory happens to lie), whatever else the
machine does.  They stand in results/instructions.json by compiler and instruction set, and a kernel whose count is more
than MARGIN from its record fails (`pytest` runs this).  After a change that is meant: `python bench/ instructions
--update`.  With a compiler that is not recorded another's record is compared, within OTHER_COMPILER.  Valgrind (3.19)
knows no AVX-512, so these are the kernels for AVX2 and for plain SSE.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import report
from bench.guards import RESULTS
from bench.guards.instructions_driver import calls
from cibr_kernels.dispatch import backends

RECORD = RESULTS / "instructions.json"
DRIVER = Path(__file__).parent / "instructions_driver.py"
ISAS = ("avx2", "generic")
MARGIN = 0.02
OTHER_COMPILER = 0.30
Counts = dict[str, dict[str, int]]  # by instruction set, by label


class Uncountable(RuntimeError):
    """Instructions cannot be counted here; the message says why."""


def available() -> list[str]:
    """The instruction sets to count.  Raises Uncountable."""
    if shutil.which("valgrind") is None:
        raise Uncountable("valgrind is not installed")
    if not backends.native_available():
        raise Uncountable("the compiled kernels are not built")
    return [isa for isa in ISAS if isa in backends.compiled().supported_isas()]


def inclusive(profile: str, function: str) -> int:
    """The cost of a function and all it called, in one callgrind file; names are numbered where they first stand."""
    number = re.search(rf"\((\d+)\) {re.escape(function)}$", profile, re.MULTILINE)
    assert number is not None, function
    calls_of = rf"^cfn=\({number[1]}\).*\ncalls=.*\n\S+ (\d+)$"
    return sum(int(cost) for cost in re.findall(calls_of, profile, re.MULTILINE))


def count() -> Counts:
    """Runs the driver under callgrind, half a minute.  Raises Uncountable, or CalledProcessError."""
    isas = available()
    functions = [f"ck::{isa}::{kernel}(ck::{struct} const&)" for isa in isas for _, kernel, struct, _ in calls()]
    # a file after each kernel; of several --dump-before or --toggle-collect callgrind 3.19 obeys one alone
    options = [f"--dump-after={function}" for function in dict.fromkeys(functions)]
    found: Counts = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", *options, sys.executable, str(DRIVER)]
        command += [str(backends.compiled().__file__), *isas]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for number, (line, function) in enumerate(zip(lines, functions, strict=True), start=1):
            isa, label = line.split(" ", 1)
            profile = out.with_name(f"out.{number}").read_text()
            found.setdefault(isa, {})[label] = inclusive(profile, function)
    return found


def read() -> dict[str, Counts]:
    """The record, by compiler."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def compare(now: Counts, then: Counts, margin: float) -> list[str]:
    """Counts more than `margin` from the record, the most grown first; and what only one of them has."""
    changed, found = [], []
    for isa in now:
        known = then.get(isa, {})
        for label in sorted(now[isa].keys() | known.keys()):
            a, b = known.get(label), now[isa].get(label)
            if a is None or b is None:
                found.append(f"{isa} {label}: {'not recorded' if a is None else 'not counted'}")
            elif abs(b / a - 1) > margin:
                changed.append((a / b, f"{isa} {label}: {a} -> {b} instructions ({b / a - 1:+.1%})"))
    return [text for _, text in sorted(changed)] + found


def check(now: Counts, compiler: str, record: dict[str, Counts]) -> tuple[list[str], str]:
    """-> what changed, and with whose record and margin `now` was compared."""
    if compiler in record:
        return compare(now, record[compiler], MARGIN), f"recorded with {compiler}, margin {MARGIN:.0%}"
    if not record:
        return ["nothing is recorded"], "no record"
    other = sorted(record)[-1]
    says = f"recorded with {other}, this is {compiler}: margin {OTHER_COMPILER:.0%}"
    return compare(now, record[other], OTHER_COMPILER), says


def table(now: Counts) -> str:
    labels = list(dict.fromkeys(label for counts in now.values() for label in counts))
    lines = [f"{'instructions':<36}" + "".join(f"{isa:>12}" for isa in now)]
    return "\n".join(lines + [f"{x:<36}" + "".join(f"{now[isa].get(x, 0):>12}" for isa in now) for x in labels])


def main(update: bool = False) -> int:
    """Prints the counts and what changed -> 0; 1 when something did; 2 when nothing can be counted."""
    try:
        now = count()
    except Uncountable as error:
        print(error, file=sys.stderr)
        return 2
    compiler, record = backends.compiled().compiler, read()
    changed, against = check(now, compiler, record)
    print(f"{table(now)}\n\n{against}")
    print("\n".join(changed) or "nothing changed")
    if update:
        report.write(RECORD, {**record, compiler: now})
        print(f"recorded for {compiler} in {RECORD.name}")
    return 1 if changed and not update else 0
