"""nn.NTXentLoss against SimCLR's equation 1; several ranks are in tests/distributed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cibr_kernels as ck


def nt_xent(out0: Tensor, out1: Tensor, temperature: float) -> Tensor:
    """Equation 1 as it is written: 2n rows, each against all others, the diagonal left out."""
    z = F.normalize(torch.cat([out0, out1]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(out0)))


def views(n: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [(3 * torch.randn(n, 6, generator=g, dtype=torch.float64)).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_equation_1_of_simclr(n, dtype):
    pair = views(n, dtype)
    truth = nt_xent(*(t.double() for t in pair), 0.2)
    loss = ck.nn.NTXentLoss(0.2)(*pair)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), truth, rtol=eps, atol=eps / 0.2)
    ours, theirs = torch.autograd.grad(loss, pair), torch.autograd.grad(truth, pair)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=eps)


def test_autocast_and_compile_give_the_same_number():
    pair, loss = views(9, torch.float32), ck.nn.NTXentLoss(0.5)
    expected = loss(*pair)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(*pair), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(*pair), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (partial(ck.nn.NTXentLoss, 0.0), ValueError, "temperature must be positive, got 0.0"),
        (partial(ck.nn.NTXentLoss, float("nan")), ValueError, "temperature must be positive, got nan"),
        (partial(ck.nn.NTXentLoss, strategy="both"), ValueError, "strategy is 'both'"),
        (partial(ck.nn.NTXentLoss(), torch.ones(3, 2), torch.ones(4, 2)), ValueError, "out0 has 3 rows but out1 has 4"),
        (partial(ck.nn.NTXentLoss(), torch.ones(3, 2), torch.ones(3, 1)), ValueError, "out0 has width 2 but out1 has"),
        (partial(ck.nn.NTXentLoss(), torch.ones(3), torch.ones(3, 1)), ValueError, "out0 must be 2-d"),
        (partial(ck.nn.NTXentLoss(), torch.ones(3, 1), [1.0]), TypeError, "out1 must be a tensor, got list"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals_are_in_the_callers_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
