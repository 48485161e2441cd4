"""log_mean_exp in C++: csrc/log_mean_exp."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch.native_call import DTYPES, call


def forward(scores: Tensor, mask: Tensor | None) -> Tensor:
    """-> L ()."""
    el = torch.empty((), dtype=torch.float32, device=scores.device)
    call("log_mean_exp_forward", "LogMeanExp", **_problem(scores, mask), el=el)
    return el


def backward(grad: Tensor, scores: Tensor, mask: Tensor | None, el: Tensor) -> Tensor:
    """-> dscores, the shape and dtype of scores."""
    dscores = torch.empty_like(scores)
    call("log_mean_exp_backward", "LogMeanExp", **_problem(scores, mask), el=el, grad=grad, dscores=dscores)
    return dscores


def _problem(scores: Tensor, mask: Tensor | None) -> dict:
    return {
        "work": 8 * scores.numel(),
        "scores": scores,
        "mask": mask,
        "dtype": DTYPES[scores.dtype],
        "count": scores.numel(),
    }
