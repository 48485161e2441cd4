"""additive_scores in C++: csrc/additive/scores.  a and b are read in their dtype; the rest is float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends
from cibr_kernels.dispatch.native_call import DTYPES, call
from cibr_kernels.primitives.additive.moments.reference import ACTIVATIONS


def unsupported(*tensors: Tensor) -> str | None:
    """Float32, bfloat16 and float16 on the CPU; a and b must share one."""
    if tensors[0].dtype != tensors[1].dtype:
        return f"the C++ kernel takes a and b of one dtype, got {tensors[0].dtype} and {tensors[1].dtype}"
    return backends.native_unsupported(*tensors)


def _problem(a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float) -> dict[str, Any]:
    return {
        "work": a.numel() * b.shape[0],
        "a": a, "b": b, "w": w.float(), "n": a.shape[0], "m": b.shape[0], "h": a.shape[1],
        "features_dtype": DTYPES[a.dtype],
        "activation": list(ACTIVATIONS).index(activation), "slope": slope,
    }  # fmt: skip


def forward(a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float) -> Tensor:
    """-> S (n, m) float32."""
    scores = a.new_empty((a.shape[0], b.shape[0]), dtype=torch.float32)
    call("additive_scores_forward", "AdditiveScores", **_problem(a, b, w, activation, slope), scores=scores)
    return scores


def backward(
    grad: Tensor, a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float, need_a: bool, need_b: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad (n, m) -> da (n, h), db (m, h), dw (h,), each empty unless needed."""
    da, db = (torch.empty_like(t) if need else t.new_empty(0) for t, need in ((a, need_a), (b, need_b)))
    dw = torch.empty_like(w, dtype=torch.float32) if need_w else w.new_empty(0)
    call(
        "additive_scores_backward", "AdditiveScores", **_problem(a, b, w, activation, slope), grad=grad, ga=da, gb=db,
        gw=dw,
    )  # fmt: skip
    return da, db, dw.to(w.dtype)
