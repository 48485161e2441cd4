"""What a model gives: two towers' features, before and after the projection, and the temperature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]  # as cibr.data.batch makes it; models do not import data


@dataclass(frozen=True)
class Features:
    inputs: Tensor  # X: (n, width) fp32, pooled, what enters the projection
    embedding: Tensor  # Z = normalize(X W): (n, d) fp32, unit norm

    def __getitem__(self, rows: slice) -> Features:
        return Features(self.inputs[rows], self.embedding[rows])


@dataclass(frozen=True)
class Output:
    image: Features
    text: Features
    logit_scale: Tensor  # 0-d, exp already taken
    logit_bias: Tensor | None  # 0-d; None for models without one
    image_2: Features | None = None  # of another image of each row's class or concept, where the batch has it
    text_2: Features | None = None  # of another caption
    captions: Features | None = None  # means of X and, normalised, of Z over all captions of a row

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name: "image.inputs" (n, width), "image.embedding", ..., "logit_scale"; no entry for None."""
        found: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if isinstance(value, Features):
                found |= {f"{name}.inputs": value.inputs, f"{name}.embedding": value.embedding}
            elif value is not None:
                found[name] = value
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Output:
        """The inverse of `tensors`."""
        given: dict[str, Any] = {"logit_bias": None}
        for name, value in tensors.items():
            tower, dot, _ = name.partition(".")
            given[tower] = Features(tensors[f"{tower}.inputs"], tensors[f"{tower}.embedding"]) if dot else value
        return cls(**given)


def unit_rows(x: Tensor) -> Tensor:
    """F.normalize(x, dim=-1) of x (n, d), the same bits, in a third of the time: its backward is one formula.

    The gradient of z = x / |x| is (g - <g, z> z) / |x|.
    """
    return _UnitRows.apply(x)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
        z = x / norm
        ctx.save_for_backward(z, norm)
        return z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        z, norm = ctx.saved_tensors
        along = (gradient * z).sum(-1, keepdim=True)
        return torch.addcmul(gradient, z, along, value=-1) / norm
