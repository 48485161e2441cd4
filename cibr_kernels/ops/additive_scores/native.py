"""additive_scores in C++: csrc/additive_scores, in float32 inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels.backends import native_unsupported as unsupported  # noqa: F401
from cibr_kernels.ops.additive_moments.reference import ACTIVATIONS
from cibr_kernels.ops.native_call import call


def _problem(a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float) -> dict[str, Any]:
    return {
        "work": a.numel() * b.shape[0],
        "a": a.float(), "b": b.float(), "w": w.float(), "n": a.shape[0], "m": b.shape[0], "h": a.shape[1],
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
    da, db, dw = (
        torch.empty_like(t, dtype=torch.float32) if need else a.new_empty(0)
        for t, need in ((a, need_a), (b, need_b), (w, need_w))
    )
    call(
        "additive_scores_backward", "AdditiveScores", **_problem(a, b, w, activation, slope), grad=grad, ga=da, gb=db,
        gw=dw,
    )  # fmt: skip
    return da.to(a.dtype), db.to(b.dtype), dw.to(w.dtype)
