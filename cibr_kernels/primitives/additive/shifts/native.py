"""additive_shifts in C++: csrc/additive/shifts, on the CPU in float32 inside and on CUDA in every feature dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends, cuda_call
from cibr_kernels.dispatch.native_call import DTYPES, call
from cibr_kernels.primitives.additive.native import problem_fields
from cibr_kernels.primitives.additive.problem import Needs, ShiftsProblem


def unsupported(*tensors: Tensor) -> str | None:
    """Float32, bfloat16 and float16, on the CPU and on CUDA."""
    if cuda_call.takes(*tensors):
        return cuda_call.unsupported(*tensors)
    return backends.native_unsupported(*tensors)


def forward(problem: ShiftsProblem) -> Tensor:
    """-> scores (k, n) float32."""
    scores = problem.a.new_empty((problem.k, problem.a.shape[0]), dtype=torch.float32)
    _call("additive_shifts_forward", problem, scores=scores)
    return scores


def backward(grad: Tensor, problem: ShiftsProblem, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """grad (k, n) float32 -> da (n, h), db (m, h), dw (h,) as their inputs, each empty unless needed."""
    (a, b, w), (need_a, need_b, need_w) = problem.tensors, needs
    da, db, dw = problem.gradients(needs, None if cuda_call.takes(a) else torch.float32)
    if any(needs):
        flags = {"need_a": need_a, "need_b": need_b, "need_w": need_w}
        _call("additive_shifts_backward", problem, g=grad, **flags, da=da, db=db, dw=dw)
    return da.to(a.dtype), db.to(b.dtype), dw.to(w.dtype)


def _call(kernel: str, problem: ShiftsProblem, **fields: Any) -> None:
    a, b, w = problem.tensors
    fields = problem_fields(problem) | {"first": problem.first, "k": problem.k} | fields
    if cuda_call.takes(a):
        fields |= {"w": w, "dtype": DTYPES[a.dtype], "w_dtype": DTYPES[w.dtype]}
        cuda_call.call(kernel, "AdditiveShiftsCuda", fields)
    else:
        fields |= {"a": a.float(), "b": b.float(), "w": w.float()}
        call(kernel, "AdditiveShifts", problem.k * a.numel(), fields)
