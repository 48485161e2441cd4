"""dot_lse: any weights on rows, columns and positives, against float64, in both tiers, on every instruction set.

clip_loss and dot_moments (their own files) cover shapes and scales; here every output has a gradient of its own.
"""

from __future__ import annotations

import functools

import pytest
import torch
from cases import LARGE, each_dtype, each_isa, leaves, towers
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.ops.dot_lse.op import dot_lse
from cibr_kernels.ops.dot_lse.reference import dot_lse as reference

SHAPES = [(1, 1, 0, 8), (1, 3, 1, 5), (33, 33, 0, 100), (40, 100, 17, 65)]
NAMES = ("rows", "cols", "positives", "dx", "dy", "dscale")


def weighted(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, then the gradients of their sum with weights of both signs; empty sums have no weight."""
    torch.manual_seed(3)
    total = torch.zeros((), dtype=outputs[0].dtype)
    for t in outputs:
        weights = torch.randn(t.shape, dtype=torch.float64).to(t.dtype)
        total = total + (weights * t.masked_fill(t.detach() == float("-inf"), 0.0)).sum()
    return [*(t.detach() for t in outputs), *torch.autograd.grad(total, inputs)]


@functools.lru_cache(maxsize=2)
def expected(shape: tuple[int, ...], dtype: torch.dtype, kind: str, scale: float, mask: bool):
    n, m, offset, d = shape
    x, y = (t.to(dtype) for t in towers(n, m, d, offset, kind))
    inputs = x, y, torch.tensor(scale)
    eager, truth = (
        weighted(reference(*tensors, offset, mask), tensors)
        for tensors in (leaves(*inputs), leaves(*inputs, dtype=torch.float64))
    )
    logits = scale * x.double() @ y.double().T
    return inputs, eager, truth, logits.abs().max().item()


def check(shape, dtype, kind, scale, mask, isa, budgets=(0, LARGE)) -> None:
    inputs, eager, truth, exponent = expected(shape, dtype, kind, scale, mask)
    _, m, offset, d = shape
    for budget in budgets:
        ck.set_stash_budget(budget)
        tensors = leaves(*inputs)
        with testing.instruction_set(isa):
            actual = weighted(dot_lse(*tensors, offset=offset, mask_positives=mask, backend="native"), tensors)
        for name, a, e, t in zip(NAMES, actual, eager, truth, strict=True):
            empty = t == float("-inf")
            assert torch.equal(a == float("-inf"), empty), name
            a, e, t = (v.masked_fill(empty, 0.0) for v in (a, e, t))
            # weights of both signs cancel in dscale = sum <x, dx> / scale: measured against the sum of absolute terms
            magnitude = (truth[3] * inputs[0]).abs().sum().item() / scale if name == "dscale" else 0.0
            testing.assert_close(
                f"{name}, stash budget {budget}", a, e, t, terms=m + d, exponent=exponent, features=dtype,
                magnitude=magnitude,
            )  # fmt: skip


@each_isa
@pytest.mark.parametrize("mask", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize(("kind", "scale"), [("unit", 1.0), ("unit", 100.0), ("raw", 14.3)])
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_weights(shape, dtype, kind, scale, mask, isa):
    check(shape, dtype, kind, scale, mask, isa)


@each_isa
def test_an_empty_sum_has_no_gradient(isa):
    x, y = leaves(*towers(1, 1, 8))
    with testing.instruction_set(isa):
        rows, cols, positives = dot_lse(x, y, torch.tensor(2.0), backend="native")
        assert rows.item() == cols.item() == float("-inf")
        dx, dy = torch.autograd.grad(rows.sum() + cols.sum() + positives.sum(), (x, y))
    torch.testing.assert_close((dx, dy), (2 * y.detach(), 2 * x.detach()))


def test_columns_are_computed_only_when_needed():
    x, y = towers(5, 7, 4)
    assert dot_lse(x, y, torch.tensor(2.0), need_cols=False)[1].shape == (0,)
