"""log_mean_exp in plain PyTorch: the specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean_exp(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """log of the mean of exp(scores) over the entries where mask is True (all of them without one) -> ()."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if mask is None:
        return scores.flatten().logsumexp(0) - math.log(scores.numel())
    return scores.masked_fill(~mask, float("-inf")).flatten().logsumexp(0) - mask.sum().to(scores.dtype).log()


def forward(scores: Tensor, mask: Tensor | None) -> Tensor:
    """-> L ()."""
    return log_mean_exp(scores, mask)


def backward(grad: Tensor, scores: Tensor, mask: Tensor | None, el: Tensor) -> Tensor:
    """-> dscores, the shape and dtype of scores."""
    count = scores.numel() if mask is None else mask.sum()
    g = (scores.to(el.dtype) - el).exp() * (grad / count)
    return (g if mask is None else g.masked_fill(~mask, 0.0)).to(scores.dtype)
