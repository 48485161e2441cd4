"""What the reductions of an additive critic's scores have in common.

    S_ij = sum_h w_h phi(a_ih + b_jh)

The registered operators are flat, because torch.library wants tensors and numbers.  Right behind them stands a problem,
the one argument that every backend takes, whatever it reduces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

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
        n, h = self.a.shape[-2:]
        return n, self.b.shape[-2], h

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
            for t, need in zip((self.a, self.b, self.w), needs, strict=True)
        ]


@dataclass(frozen=True)
class MomentsProblem(AdditiveProblem):
    """Of `additive_moments`: row i's positive is column first_positive + i, in L where the diagonal is included.

    A group of critics is one problem: a (groups, n, h), b (groups, m, h), w (groups, h), bias (groups,).
    """

    first_positive: int
    include_diagonal: bool
    bias: Tensor | None = None  # (), float32 (float64), on every score

    @property
    def grouped(self) -> tuple[int, ...]:
        """The shape of J and L: (), or (groups,)."""
        return tuple(self.a.shape[:-2])

    @property
    def groups(self) -> int:
        return self.a.shape[0] if self.a.dim() == 3 else 1

    def members(self) -> Iterator[MomentsProblem]:
        """The problems of a group, one by one."""
        biases = [None] * self.groups if self.bias is None else self.bias.unbind(0)
        for a, b, w, bias in zip(self.a, self.b, self.w, biases, strict=True):
            yield replace(self, a=a, b=b, w=w, bias=bias)


@dataclass(frozen=True)
class ShiftsProblem(AdditiveProblem):
    """Of `additive_shifts`: row i meets the k columns (i + first + r) mod m."""

    first: int
    k: int
