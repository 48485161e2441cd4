"""log_mean_exp in C++: csrc/log_mean_exp."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch.native_call import DTYPES, call


def forward(scores: Tensor, mask: Tensor | None) -> Tensor:
    """-> L ()."""
    el = torch.empty((), dtype=torch.float32, device=scores.device)
    _call("log_mean_exp_forward", scores, mask, el=el)
    return el


def backward(grad: Tensor, scores: Tensor, mask: Tensor | None, el: Tensor) -> Tensor:
    """-> dscores, the shape and dtype of scores."""
    dscores = torch.empty_like(scores)
    _call("log_mean_exp_backward", scores, mask, el=el, grad=grad, dscores=dscores)
    return dscores


def _call(kernel: str, scores: Tensor, mask: Tensor | None, **fields: Tensor) -> None:
    count = scores.numel()
    problem = {"scores": scores, "mask": mask, "dtype": DTYPES[scores.dtype], "count": count}
    call(kernel, "LogMeanExp", 8 * count, problem | fields)
