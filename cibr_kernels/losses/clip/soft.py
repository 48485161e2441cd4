"""The mean of all candidates under a guide's softmax, without its n x m matrix: two passes of `dot_lse`'s kernels.

    t_i = sum_j T_ij v_j        T_ij = softmax_j(scale <a_i, b_j>)

The gradient of dot_lse's rows in x is scale sum_j T_ij y_j.  With x = [a, 0] and y = [b, v] the logits are the guide's
and that gradient ends in scale t; the same with y = [b, 0] and x = [a, g] makes the gradient of the v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cibr_kernels.primitives.dot.lse.op import dot_lse_backward, dot_lse_forward


def guided_mean(
    a: Tensor, b: Tensor | None, values: Tensor, scale: Tensor, first_positive: int, backend: str
) -> Tensor:
    """a (n, g), b (m, g) constants (None: a), values (m, d), scale () -> t (n, d), differentiable in the values.

    Row i's own column is first_positive + i.  All in float32, or all in float64.
    """
    mean: Tensor = _GuidedMean.apply(a, b, values, scale, first_positive, backend)
    return mean


class _GuidedMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor | None, values: Tensor, scale: Tensor, first_positive: int, backend: str
    ) -> Tensor:
        b = a if b is None else b
        x, y = _beside(a, values.shape[1]), torch.cat([b, values], 1)
        rows, _, positives, _, _, shift, _ = dot_lse_forward(
            x, y, scale, None, None, None, first_positive, False, False, False, 0, backend
        )
        ctx.save_for_backward(a, b, scale, rows, positives, shift)
        ctx.first_positive, ctx.backend = first_positive, backend
        dx, _, _ = _slopes(x, y, scale, rows, positives, shift, first_positive, True, backend)
        return dx[:, a.shape[1] :] / scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b, scale, rows, positives, shift = ctx.saved_tensors
        x, y = torch.cat([a, g], 1), _beside(b, g.shape[1])
        _, dy, _ = _slopes(x, y, scale, rows, positives, shift, ctx.first_positive, False, ctx.backend)
        return None, None, dy[:, a.shape[1] :] / scale, None, None, None


def _beside(guide: Tensor, width: int) -> Tensor:
    """guide (n, g) -> (n, g + width), zeros in the place of the values."""
    return torch.cat([guide, guide.new_zeros(guide.shape[0], width)], 1)


def _slopes(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    rows: Tensor,
    positives: Tensor,
    shift: Tensor,
    first_positive: int,
    of_rows: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the sum of all rows' log-sum-exps in x, or in y."""
    none = rows.new_empty(0)
    return dot_lse_backward(
        torch.ones_like(rows),
        none,
        torch.zeros_like(rows),
        x,
        y,
        scale,
        None,
        None,
        None,
        rows,
        none,
        positives,
        shift,
        none,
        first_positive,
        False,
        of_rows,
        not of_rows,
        backend,
    )
