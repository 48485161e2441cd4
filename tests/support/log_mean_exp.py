"""What the tests of log_mean_exp's kernels share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from cases import with_gradients
from torch import Tensor

from cibr_kernels import testing
from cibr_kernels.primitives.log_mean_exp.reference import log_mean_exp as reference

Problem = tuple[Tensor, Tensor | None]


def problems(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> Iterator[Problem]:
    """Scores and a mask that leaves at least the last one, for sizes at which a maximum matters and does not."""
    for scale, shift in ((1.0, 0.0), (100.0, 0.0), (10.0, -300.0)):
        scores = (scale * torch.randn(shape) + shift).to(dtype)
        mask = torch.rand(shape) < 0.3 if masked else None
        if mask is not None:
            mask.view(-1)[-1] = True
        yield scores, mask


def check(run: Callable[[Tensor], Tensor], scores: Tensor, mask: Tensor | None) -> None:
    """Holds L and its gradient by `run`, of scores, to the rule."""

    def eager(s: Tensor) -> Tensor:
        return reference(s, mask)

    count = scores.numel() if mask is None else int(mask.sum())
    truth = with_gradients(eager, scores, dtype=torch.float64)
    sizes = abs(truth[0].item() + math.log(count)) + math.log(count), 0.0
    found = with_gradients(run, scores), with_gradients(eager, scores), truth, sizes
    exponent = scores.double().abs().max().item()
    for name, a, e, t, size in zip(("L", "dscores"), *found, strict=True):
        testing.assert_close(name, a, e, t, terms=count, exponent=exponent, features=scores.dtype, magnitude=size)
