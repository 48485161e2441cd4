"""additive_scores in C++: csrc/additive/scores.  a and b are read in their dtype; the rest is float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends
from cibr_kernels.dispatch.native_call import DTYPES, call
from cibr_kernels.primitives.additive.native import problem_fields, unlike_dtypes
from cibr_kernels.primitives.additive.problem import AdditiveProblem, Needs


def unsupported(*tensors: Tensor) -> str | None:
    """Float32, bfloat16 and float16 on the CPU; a and b must share one."""
    return unlike_dtypes(*tensors) or backends.native_unsupported(*tensors)


def forward(problem: AdditiveProblem) -> Tensor:
    """-> S (n, m) float32."""
    n, m, _ = problem.sizes
    scores = problem.a.new_empty((n, m), dtype=torch.float32)
    _call("additive_scores_forward", problem, scores=scores)
    return scores


def backward(grad: Tensor, problem: AdditiveProblem, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """grad (n, m) -> da (n, h), db (m, h), dw (h,), each empty unless needed."""
    da, db, _ = problem.gradients(needs)
    *_, dw = problem.gradients(needs, torch.float32)
    _call("additive_scores_backward", problem, grad=grad, da=da, db=db, dw=dw)
    return da, db, dw.to(problem.w.dtype)


def _call(kernel: str, problem: AdditiveProblem, **fields: Any) -> None:
    n, m, h = problem.sizes
    fields |= {"w": problem.w.float(), "features_dtype": DTYPES[problem.a.dtype]}
    call(kernel, "AdditiveScores", n * m * h, problem_fields(problem) | fields)
