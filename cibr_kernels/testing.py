"""The one tolerance rule, and what tests need to apply it.

An implementation may be at most twice as far from float64 as eager PyTorch is in the precision the op documents
(float32 logits and sums, outputs in the dtype of the input), plus the rounding of a float32 sum of `terms` and of the
largest `exponent`, whose absolute rounding is a relative one of its exponential:

    error(t)  = max |t - truth| / max |truth|
    error(actual) <= 2 error(eager) + eps(features) + (sqrt(terms) + exponent) eps(float32)

eps(features) is that of the features' dtype: bfloat16 features are multiplied with bfloat16 weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cibr_kernels.dispatch import backends


def error(actual: Tensor, truth: Tensor, magnitude: float = 0.0) -> float:
    """Largest deviation from the float64 `truth`, relative to its largest entry (or `magnitude`); infinite for NaN.

    Entries below 1e-30 count as zero: their parts leave float32's range.
    """
    if truth.numel() == 0:
        return 0.0
    worst = (actual.double() - truth).abs().max().item()
    return math.inf if math.isnan(worst) else worst / max(truth.abs().max().item(), magnitude, 1e-30)


def assert_close(
    name: str,
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    terms: int,
    exponent: float,
    features: torch.dtype,
    magnitude: float = 0.0,
) -> None:
    """Holds `actual` to the rule.

    truth is float64; eager is PyTorch's, in `actual`'s dtype; terms: length of the sums; exponent: largest |logit|;
    features: dtype of the features; magnitude: sum of the absolute terms of an output that cancels.
    Raises AssertionError naming the output and the three numbers.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    rounding = torch.finfo(features).eps + (math.sqrt(terms) + exponent) * torch.finfo(torch.float32).eps
    ours, theirs = error(actual, truth, magnitude), error(eager, truth, magnitude)
    assert ours <= 2 * theirs + rounding, f"{name}: error {ours:.3e}, eager {theirs:.3e}, rounding {rounding:.3e}"


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Runs the C++ kernels built for this instruction set: one of `cibr_kernels._C.supported_isas()`."""
    module = backends.compiled()
    before = module.isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)
