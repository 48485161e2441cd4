"""What the C++ calls of the additive family share: csrc/additive."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cibr_kernels.primitives.additive.activations import CODES
from cibr_kernels.primitives.additive.problem import AdditiveProblem


def problem_fields(problem: AdditiveProblem) -> dict[str, Any]:
    """The fields of a parameter struct that say what is computed, but for w, whose dtype depends on the kernel."""
    n, m, h = problem.sizes
    return {
        "a": problem.a,
        "b": problem.b,
        "n": n,
        "m": m,
        "h": h,
        "activation": CODES[problem.activation],
        "slope": problem.slope,
    }


def unlike_dtypes(*tensors: Tensor) -> str | None:
    """Why kernels that read a and b in their dtype cannot; None when they can."""
    if tensors[0].dtype != tensors[1].dtype:
        return f"the C++ kernel takes a and b of one dtype, got {tensors[0].dtype} and {tensors[1].dtype}"
    return None
