"""additive_shifts in C++: csrc/additive/shifts, on the CPU in float32 inside and on CUDA in every feature dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends, cuda_call
from cibr_kernels.dispatch.native_call import DTYPES, call
from cibr_kernels.primitives.additive.moments.reference import ACTIVATIONS


def unsupported(*tensors: Tensor) -> str | None:
    """Float32, bfloat16 and float16, on the CPU and on CUDA."""
    if cuda_call.takes(*tensors):
        return cuda_call.unsupported(*tensors)
    return backends.native_unsupported(*tensors)


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
    dtype = None if cuda_call.takes(a) else torch.float32
    da, db, dw = (
        torch.empty_like(t, dtype=dtype) if need else t.new_empty(0)
        for t, need in ((a, need_a), (b, need_b), (w, need_w))
    )
    if need_a or need_b or need_w:
        _call(
            "additive_shifts_backward", a, b, w, first, k, activation, slope, g=grad, need_a=need_a, need_b=need_b,
            need_w=need_w, da=da, db=db, dw=dw,
        )  # fmt: skip
    return da.to(a.dtype), db.to(b.dtype), dw.to(w.dtype)


def _call(
    kernel: str, a: Tensor, b: Tensor, w: Tensor, first: int, k: int, activation: str, slope: float, **fields: Any
) -> None:
    fields |= {
        "n": a.shape[0], "m": b.shape[0], "h": a.shape[1], "first": first, "k": k,
        "activation": list(ACTIVATIONS).index(activation), "slope": slope,
    }  # fmt: skip
    if cuda_call.takes(a):
        dtypes = {"dtype": DTYPES[a.dtype], "w_dtype": DTYPES[w.dtype]}
        cuda_call.call(kernel, "AdditiveShiftsCuda", a=a, b=b, w=w, **dtypes, **fields)
    else:
        call(kernel, "AdditiveShifts", k * a.numel(), a=a.float(), b=b.float(), w=w.float(), **fields)
