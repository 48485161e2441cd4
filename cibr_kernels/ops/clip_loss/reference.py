"""clip_loss in plain PyTorch: the specification.  It promotes instead of casting, so float64 in is the oracle.

    l_ij = scale * <x_i, y_j>        row i's positive is column offset + i
    loss = 1/n sum_i [LSE_j l_ij - l_i,pos]                                  one_way
    loss = half of that plus half of the same over the n columns that have a positive

LSE_j l_ij - l_i,pos is written softplus(LSE_{j != pos} l_ij - l_i,pos): the same number, whose gradient does not cancel
when the loss is tiny (at scale 100 even float64 loses every digit of softmax - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = float("-inf")


def clip_loss(x: Tensor, y: Tensor, scale: Tensor, offset: int = 0, one_way: bool = False) -> Tensor:
    """x (n, d), y (m, d), scale () -> loss (), differentiable in all three.  Source: CLIP (2103.00020), Figure 3."""
    logits = scale * (_promote(x) @ _promote(y).T)  # (n, m)
    n, m = logits.shape
    positives = logits.diagonal(offset)[:n]
    others = logits.masked_fill(_is_positive(n, m, offset, x.device), NONE)
    rows = _softplus(others.logsumexp(1) - positives).mean()
    if one_way:
        return rows
    return (rows + _softplus(others[:, offset : offset + n].logsumexp(0) - positives).mean()) / 2


def _is_positive(n: int, m: int, offset: int, device: torch.device) -> Tensor:
    return torch.arange(m, device=device) == torch.arange(n, device=device)[:, None] + offset


def _promote(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _softplus(t: Tensor) -> Tensor:
    return torch.logaddexp(t, torch.zeros_like(t))  # F.softplus stops being exact at 20


def unsupported(*tensors: Tensor) -> str | None:
    return None


def forward(
    x: Tensor, y: Tensor, scale: Tensor, offset: int, one_way: bool, stash: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss (), off-diagonal LSE of rows (n,) and of columns (m,), positives (n,), stash offset (NaN: not used)."""
    n = x.shape[0]
    logits = scale * (_promote(x) @ _promote(y).T)
    positives = logits.diagonal(offset)[:n].clone()
    logits.diagonal(offset)[:n].fill_(NONE)
    row_lse, col_lse = logits.logsumexp(1), logits.logsumexp(0)
    loss = _softplus(row_lse - positives).mean()
    if not one_way:
        cols = _softplus(col_lse[offset : offset + n] - positives).mean()
        loss = (loss + cols) / 2
    return loss, row_lse, col_lse, positives, torch.full_like(loss, float("nan"))


def backward(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor, positives: Tensor,
    stash_offset: Tensor, stash: Tensor, offset: int, one_way: bool, need_dx: bool, need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx (n, d), dy (m, d), dscale ()."""
    n, cols = x.shape[0], slice(offset, offset + x.shape[0])
    cosines = _promote(x) @ _promote(y).T
    logits = scale * cosines
    g = (logits - torch.logaddexp(row_lse, positives)[:, None]).exp()
    of_positive = torch.sigmoid(row_lse - positives)
    if not one_way:
        g[:, cols] += (logits[:, cols] - torch.logaddexp(col_lse[cols], positives)).exp()
        of_positive = of_positive + torch.sigmoid(col_lse[cols] - positives)
    g.diagonal(offset)[:n].copy_(-of_positive)
    g *= grad / (n if one_way else 2 * n)
    dx = (scale * (g @ _promote(y))).to(x.dtype) if need_dx else x.new_empty(0)
    dy = (scale * (g.T @ _promote(x))).to(y.dtype) if need_dy else y.new_empty(0)
    return dx, dy, (g * cosines).sum().to(scale.dtype)
