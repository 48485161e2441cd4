"""Lines of arithmetic that operators, losses, estimators and references share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)  # what `promote` leaves


def promote(t: Tensor) -> Tensor:
    """float64 stays, every other dtype becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


def sum_dtype(t: Tensor) -> torch.dtype:
    """The dtype of scores and sums of tensors like `t`: what `promote` makes of them."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def softplus(t: Tensor) -> Tensor:
    """log(1 + exp t); F.softplus stops being exact at 20."""
    return torch.logaddexp(t, torch.zeros_like(t))


def logsumexp(t: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is zero, not NaN, where the sum is empty: -inf."""
    empty = (t == -math.inf).all(dim, keepdim=True)
    return t.masked_fill(empty, 0.0).logsumexp(dim).masked_fill(empty.squeeze(dim), -math.inf)


def log_count(count: int, like: Tensor) -> Tensor | float:
    """log of a number of rows or pairs.  Compilers know it as a symbol, of which math.log would make a constant."""
    if torch.compiler.is_compiling():
        return torch.full((), count, dtype=torch.float64, device=like.device).log().to(like.dtype)
    return math.log(count)


def log_mean_exp_of_rows(rows: Tensor, per_row: int) -> Tensor:
    """rows (n,), log-sum-exps of `per_row` numbers each -> the log-mean-exp of all, ().

    In float64, O(n): it is often near 0, where the logarithm of the sum less that of the count cancels.
    """
    rows64 = rows.double()
    return (rows64.logsumexp(0) - log_count(rows.shape[0] * per_row, rows64)).to(rows.dtype)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The least multiple of b that is at least a."""
    return ceil_div(a, b) * b


def panel_rows(budget: int, bytes_per_row: int, n: int, least: int = 1, multiple: int = 1) -> int:
    """Rows of a panel that fits `budget` bytes: whole multiples, but at least `least` and at most n."""
    return min(n, max(least, budget // bytes_per_row // multiple * multiple))


def early_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients that are made in the forward: float32 for float16, else the features'.

    A loss scale multiplies them in the backward, after float16 would have lost those below 6e-8.
    """
    return torch.float32 if dtype == torch.float16 else dtype
