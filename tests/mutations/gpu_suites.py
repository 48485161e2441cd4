"""The suites of mutations.py: each op's small problems that tell right kernels from wrong ones, by family."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import gpu_suites_additive
import gpu_suites_dot
import gpu_suites_ends
import gpu_suites_objective
import nvcc
from gpu_suites_additive import AdditiveCuda
from mutations import ROOT, Fault, Suite
from verdicts import cpp, of_fault, package, python, short, tests, within

from cibr_kernels.dispatch import backends

_SUMS = "primitives/triton_sums.py"
_LOSSES = "losses/clip", "losses/siglip", "losses/targets.py"
_GROUP = "information/group.py", "information/group_device.py", "information/triton_group.py"
_GAME = "losses/game.py", "losses/triton_game.py"
_STATISTICS = "nn/statistics.py", "nn/statistics_device.py", "nn/triton_statistics.py"
FAMILIES = {  # and what they run of the package, beside the launching
    gpu_suites_dot: ("primitives/dot", _SUMS),
    gpu_suites_additive: ("primitives/additive", _SUMS),
    gpu_suites_ends: ("primitives/dot", "primitives/log_mean_exp", *_LOSSES, _SUMS),
    gpu_suites_objective: ("primitives/additive", *_GROUP, *_GAME, *_STATISTICS, _SUMS),
}
SUITES: dict[str, Suite] = {suite: own for family in FAMILIES for suite, own in family.SUITES.items()}


def missing(suite: str) -> str | None:
    """Why a suite cannot run here; None when it can."""
    if not isinstance(SUITES[suite], AdditiveCuda):
        return None
    return backends.cuda_missing() or (None if nvcc.find() else "nvcc was not found")


@lru_cache
def code(suite: str) -> tuple[Path, ...]:
    """The Python that decides what a suite finds."""
    family, places = next((family, places) for family, places in FAMILIES.items() if suite in family.SUITES)
    return *package(("dispatch", *places)), *tests(Path(family.__file__))


@lru_cache
def _of_suite(suite: str) -> str:
    parts = [*map(python, code(suite)), *(version(name) for name in ("triton", "torch"))]
    if isinstance(SUITES[suite], AdditiveCuda):
        parts += [nvcc.version(), *cpp(ROOT / "csrc", "additive/moments/cuda.cu")]
    return short(parts)


def key(fault: Fault) -> str:
    """Of its verdict, where nothing is missing."""
    return short([_of_suite(fault.suite), *of_fault(fault)])


def watched(suite: str) -> AbstractContextManager[None]:
    """Inside, code that is not in the keys of a suite's faults may not run."""
    return within(code(suite))
