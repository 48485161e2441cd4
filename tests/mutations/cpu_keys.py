"""The keys of the CPU's verdicts, and which of its faults a run of the tests judges."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from cpu_kernels import CSRC, OPS, Op, isa
from mutations import HERE, ROOT, Fault
from verdicts import CPU, cpp, load, name, of_fault, package, python, short, tests, unsettled

CALL = "dispatch/backends.py", "dispatch/library.py", "dispatch/native_call.py"
# What runs too, and decides nothing here: whether CUDA or a counter of operations is asked for, and the budget of a
# stash, which conftest.py puts back.
ASIDE = "dispatch/cuda_call.py", "dispatch/flops.py", "primitives/dot/lse/op.py"
MANY = 20  # faults that one run judges; of more, one of each file


def code(op: Op, *files: Path) -> list[Path]:
    """The Python between an op's kernels and the tests of these files."""
    ours = [path for path in package((*CALL, *op.package)) if not path.name.startswith("triton")]
    return [*ours, *tests(ROOT / "tests/conftest.py", *files), HERE / "cpu_kernels.py", HERE / "mutations.py"]


def known(op: Op, *files: Path) -> list[Path]:
    """The Python that may run for a fault of the op."""
    return [*code(op, *files), *package(ASIDE)]


def key(fault: Fault, by: str) -> str:
    """Of its verdict, which the test `by` gave; of all of the op's tests where none did.

    Without bindings.cpp, which hands over parameters: what is wrong there fails tests without a fault.
    """
    op = OPS[fault.suite]
    files = [ROOT / t.partition("::")[0] for t in ([by] if by else [f"tests/{t}" for t in op.tests])]
    finder = by.partition("::")[2].partition("[")[0]
    texts = [python(path, finder if path in files else "") for path in code(op, *files)]
    return short([*of_fault(fault), by, isa(op), *compilers(), *cpp(CSRC, *op.sources, "common/scratch.cpp"), *texts])


@cache
def compilers() -> tuple[str, str]:
    """The versions of g++ and of torch, whose results those of kernels are compared with."""
    done = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True)
    return done.stdout.strip(), torch.__version__.partition("+")[0]


def judged_anew(faults: Sequence[Fault]) -> list[Fault]:
    """The faults whose key is another than in the table, and a share of the others.

    Where many keys differ (another g++, another instruction set, a change of what all share): one of each file, and
    those that the table does not have.
    """
    rows = load(CPU)
    changed, again = unsettled(faults, rows, lambda fault: key(fault, rows.get(name(fault), {}).get("by", "")))
    if len(changed) <= MANY:
        return changed + again
    sample = {f.path: f for f in reversed(changed)}.values()
    some = [f for f in changed if f in sample or name(f) not in rows]
    warnings.warn(f"{len(changed)} faults have no verdict of this key; of these {len(some)} are judged", stacklevel=2)
    return some
