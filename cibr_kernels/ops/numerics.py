"""A few lines of arithmetic that losses, estimators and references share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def promote(t: Tensor) -> Tensor:
    """float64 stays, every other dtype becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


def softplus(t: Tensor) -> Tensor:
    """log(1 + exp t); F.softplus stops being exact at 20."""
    return torch.logaddexp(t, torch.zeros_like(t))


def mean_softplus(logits: Tensor, below: Tensor) -> Tensor:
    """The mean of softplus(logits - below) as one node of autograd: logits (k, n), below (n,) -> ().

    Five small operators forward and seven backward, where autograd would record and run twice as many: 60 us a call.
    """
    if torch.compiler.is_compiling():
        return softplus(logits - below).mean()
    return _MeanSoftplus.apply(logits, below)


class _MeanSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, below: Tensor) -> Tensor:
        ctx.save_for_backward(logits, below)
        gap = logits - below
        return torch.logaddexp(gap, gap.new_zeros(())).mean()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        logits, below = ctx.saved_tensors
        slope = torch.sigmoid(logits - below) * (g / logits.numel())
        return slope, -slope.sum(0)
