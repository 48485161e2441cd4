"""log_mean_exp in Triton: two launches forward, one backward (and a count of the mask), for any number of scores."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call
from cibr_kernels.numerics import ceil_div

PIECE = 4096  # scores of one program
BLOCK = 512  # pieces that the second launch reads at a time


def forward(scores: Tensor, mask: Tensor | None) -> Tensor:
    """-> L (), float32.  NaN where the mask has no True: reading it would stall the device."""
    number = ceil_div(scores.numel(), PIECE)
    tops, sums = (torch.empty(number, dtype=torch.float32, device=scores.device) for _ in range(2))
    pairs = torch.empty(number, dtype=torch.int32, device=scores.device)
    el = torch.empty((), dtype=torch.float32, device=scores.device)
    partial = {"tops": tops, "sums": sums, "pairs": pairs}
    triton_call.launch(
        _kernels().log_mean_exp_pieces_kernel,
        (number,),
        {**_problem(scores, mask), **partial},
        {"MASKED": mask is not None, "PIECE": PIECE},
    )
    triton_call.launch(
        _kernels().log_mean_exp_merge_kernel, (1,), {**partial, "el": el, "number": number}, {"BLOCK": BLOCK}
    )
    return el


def backward(grad: Tensor, scores: Tensor, mask: Tensor | None, el: Tensor) -> Tensor:
    """-> dscores, the shape and dtype of scores."""
    dscores = torch.empty_like(scores)
    pairs = el if mask is None else mask.sum()
    triton_call.launch(
        _kernels().log_mean_exp_backward_kernel,
        (ceil_div(scores.numel(), PIECE),),
        {**_problem(scores, mask), "grad": grad, "el": el, "pairs": pairs, "dscores": dscores},
        {"MASKED": mask is not None, "BLOCK": PIECE},
    )
    return dscores


def _problem(scores: Tensor, mask: Tensor | None) -> dict:
    return {"scores": scores, "mask": scores if mask is None else mask.view(torch.uint8), "count": scores.numel()}


def _kernels() -> ModuleType:
    from cibr_kernels.primitives.log_mean_exp import triton_kernels

    return triton_kernels
