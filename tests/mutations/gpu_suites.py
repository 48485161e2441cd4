"""The suites of mutations.py: each op's small problems that tell right kernels from wrong ones, by family."""

from __future__ import annotations

import gpu_suites_additive
import gpu_suites_dot
import gpu_suites_ends
import gpu_suites_objective
import nvcc
from gpu_suites_additive import AdditiveCuda
from mutations import Suite

from cibr_kernels.dispatch import backends

SUITES: dict[str, Suite] = {
    **gpu_suites_dot.SUITES,
    **gpu_suites_additive.SUITES,
    **gpu_suites_ends.SUITES,
    **gpu_suites_objective.SUITES,
}


def missing(suite: str) -> str | None:
    """Why a suite cannot run here; None when it can."""
    if not isinstance(SUITES[suite], AdditiveCuda):
        return None
    return backends.cuda_missing() or (None if nvcc.find() else "nvcc was not found")
