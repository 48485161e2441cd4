"""What the reductions of an additive critic's scores have in common.

    S_ij = sum_h w_h phi(a_ih + b_jh)

The registered operators are flat, because torch.library wants tensors and numbers.  Right behind them stands a problem,
the one argument that every backend takes, whatever it reduces.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cibr_kernels.primitives.additive.activations import ACTIVATIONS, Activation

Needs = tuple[bool, bool, bool]  # whether the gradients of a, b and w are asked for


@dataclass(frozen=True)
class AdditiveProblem:
    """n rows against m columns, over h hidden units."""

    a: Tensor  # (n, h)
    b: Tensor  # (m, h)
    w: Tensor  # (h,)
    activation: str
    slope: float  # leaky_relu's negative slope, elu's alpha

    @property
    def sizes(self) -> tuple[int, int, int]:
        """n, m, h."""
        return self.a.shape[0], self.b.shape[0], self.a.shape[1]

    @property
    def phi(self) -> Activation:
        return ACTIVATIONS[self.activation]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.a, self.b, self.w

    def gradients(self, needs: Iterable[bool], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Room for those of a (n, h), b (m, h) and w (h,), in their dtypes or `dtype`, each empty unless needed."""
        return [
            torch.empty_like(t, dtype=dtype) if need else t.new_empty(0)
            for t, need in zip(self.tensors, needs, strict=True)
        ]


@dataclass(frozen=True)
class MomentsProblem(AdditiveProblem):
    """Of `additive_moments`: row i's positive is column first_positive + i, in L where the diagonal is included."""

    first_positive: int
    include_diagonal: bool


@dataclass(frozen=True)
class ShiftsProblem(AdditiveProblem):
    """Of `additive_shifts`: row i meets the k columns (i + first + r) mod m."""

    first: int
    k: int
