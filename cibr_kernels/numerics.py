"""A few lines of arithmetic that losses, estimators and references share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def promote(t: Tensor) -> Tensor:
    """float64 stays, every other dtype becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


def softplus(t: Tensor) -> Tensor:
    """log(1 + exp t); F.softplus stops being exact at 20."""
    return torch.logaddexp(t, torch.zeros_like(t))


def log_count(count: int, like: Tensor) -> Tensor | float:
    """log of a number of rows or pairs.  Compilers know it as a symbol, of which math.log would make a constant."""
    if torch.compiler.is_compiling():
        return torch.full((), count, dtype=torch.float64, device=like.device).log().to(like.dtype)
    return math.log(count)
