"""additive_shifts in CUDA C++: csrc/additive_shifts.  There is no CPU kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels.ops import cuda_call
from cibr_kernels.ops.additive_moments.reference import ACTIVATIONS
from cibr_kernels.ops.native_call import DTYPES


def unsupported(*tensors: Tensor) -> str | None:
    """CUDA only, in float32, bfloat16 and float16."""
    if not cuda_call.takes(*tensors):
        return f"the C++ kernel runs on CUDA devices, got {tensors[0].device}"
    return cuda_call.unsupported(*tensors)


def forward(a: Tensor, b: Tensor, w: Tensor, first: int, k: int, activation: str, slope: float) -> Tensor:
    """-> scores (k, n) float32."""
    scores = a.new_empty((k, a.shape[0]), dtype=torch.float32)
    _call("additive_shifts_forward", a, b, w, first, k, activation, slope, scores=scores)
    return scores


def backward(
    grad: Tensor, a: Tensor, b: Tensor, w: Tensor, first: int, k: int, activation: str, slope: float,
    need_a: bool, need_b: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad (k, n) float32 -> da (n, h), db (m, h), dw (h,) as their inputs, each empty unless needed."""
    da, db, dw = (
        torch.empty_like(t) if need else t.new_empty(0) for t, need in ((a, need_a), (b, need_b), (w, need_w))
    )
    if need_a or need_b or need_w:
        _call(
            "additive_shifts_backward", a, b, w, first, k, activation, slope, g=grad, need_a=need_a, need_b=need_b,
            need_w=need_w, da=da, db=db, dw=dw,
        )  # fmt: skip
    return da, db, dw


def _call(
    kernel: str, a: Tensor, b: Tensor, w: Tensor, first: int, k: int, activation: str, slope: float, **fields: Any
) -> None:
    cuda_call.call(
        kernel, "AdditiveShiftsCuda", a=a, b=b, w=w, dtype=DTYPES[a.dtype], w_dtype=DTYPES[w.dtype], n=a.shape[0],
        m=b.shape[0], h=a.shape[1], first=first, k=k, activation=list(ACTIVATIONS).index(activation), slope=slope,
        **fields,
    )  # fmt: skip
