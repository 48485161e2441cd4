"""Two lines of arithmetic that losses, estimators and references share."""

from __future__ import annotations

import torch
from torch import Tensor


def promote(t: Tensor) -> Tensor:
    """float64 stays, every other dtype becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


def softplus(t: Tensor) -> Tensor:
    """log(1 + exp t); F.softplus stops being exact at 20."""
    return torch.logaddexp(t, torch.zeros_like(t))
