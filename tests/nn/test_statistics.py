"""One bad batch has a NaN for its loss and leaves nothing behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cibr_kernels as ck

BAD = (math.nan, math.inf, -math.inf)


def batch(seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = [F.normalize(torch.randn(32, 8, generator=g), dim=1) for _ in range(2)]
    return [*z, torch.randn(32, 6, generator=g) * 3 + 1, torch.randn(32, 5, generator=g) - 2]


def spoilt(inputs: list[Tensor], which: int, value: float) -> list[Tensor]:
    inputs = [t.clone() for t in inputs]
    inputs[which][7, 2] = value
    return inputs


def run(loss: ck.nn.CIBRLoss, inputs: list[Tensor], seed: int) -> Tensor:
    torch.manual_seed(seed)
    x, y, *rest = inputs
    return loss(x, y, 10.0, *rest)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_batch_is_nan_and_forgotten(value, which, first):
    """`which`: image_features, text_features, image_inputs or text_inputs; as the first batch, or after a good one."""
    torch.manual_seed(1)
    loss = ck.nn.CIBRLoss(8, 6, 5, hidden=16, ema_decay=0.9)
    if not first:
        run(loss, batch(0), 0)
    other = copy.deepcopy(loss)
    assert run(loss, spoilt(batch(1), which, value), 1).isnan()
    for name, b in loss.named_buffers():
        assert b.isfinite().all(), name
    if which >= 2:  # those of the other modality, and of good X, have moved
        changed = "standardize_image" if which == 2 else "standardize_text"
        statistics = getattr(loss, changed), getattr(other, changed)
        assert all(torch.equal(a, b) for a, b in zip(*(m.buffers() for m in statistics), strict=True))
    assert run(loss, batch(2), 2).isfinite()


@pytest.mark.parametrize("value", BAD)
def test_statistics_after_a_bad_batch_are_those_without_it(value):
    layers = ck.nn.Standardize(6), ck.nn.Standardize(6)
    batches = [batch(seed)[2] for seed in range(3)]
    for i, x in enumerate(batches):
        bad = x.clone()
        bad[i, i] = value
        out = layers[0](bad)
        assert not out[i, i].isfinite()
        for layer in layers:
            layer(x)
    assert all(torch.equal(a, b) for a, b in zip(layers[0].buffers(), layers[1].buffers(), strict=True))


def test_an_average_ignores_what_is_not_finite():
    emas = ck.nn.LogEMA(0.9), ck.nn.LogEMA(0.9)
    for el in (2.0, 1.0, -3.0):
        for value in BAD:
            before = emas[0].value.clone()
            assert torch.equal(emas[0].update(torch.tensor(value)), before)
        for ema in emas:
            ema.update(torch.tensor(el))
    assert torch.equal(emas[0].value, emas[1].value)


def test_an_average_ignores_a_batch_whose_l_alone_is_finite():
    """The critic hides the infinity: J is a NaN, L a number."""
    ema, x, z = ck.nn.LogEMA(), torch.randn(9, 1), torch.randn(9, 1)
    x[3] = -math.inf

    def critic(x: Tensor, z: Tensor) -> Tensor:
        return (x * z).squeeze(1).clamp(-5, 5)

    assert ck.critic_moments(x, z, critic)[1].isfinite()
    assert ck.mutual_information(x, z, critic, ema=ema).isnan()
    assert not ema.started and ema.value == 0


def test_the_decision_waits_for_no_device():
    """On meta tensors, whose values nobody can read."""
    with torch.device("meta"):
        layer, ema = ck.nn.Standardize(6), ck.nn.LogEMA()
        assert layer(torch.ones(4, 6)).shape == (4, 6) and ema(torch.ones(())).shape == ()
