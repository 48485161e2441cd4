"""float16 features under a loss scale, which gradients that are made in the forward have not met yet.

They are kept in float32: half of those here are zero in float16.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import leaves, towers
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels.losses.clip.reference import clip_loss as clip_reference
from cibr_kernels.losses.siglip.reference import siglip_loss as siglip_reference

N, D, WIDTH, LOSS_SCALE = 256, 64, 512, 65536.0
ROUNDING = 2e-3  # eager float16's own error under the same loss scale


def scaled(loss, *tensors: Tensor) -> list[Tensor]:
    own = leaves(*tensors)
    return [g.double() for g in torch.autograd.grad(loss(*own) * LOSS_SCALE, own)]


def assert_rounded(found: list[Tensor], truth: list[Tensor]) -> None:
    for f, t in zip(found, truth, strict=True):
        assert (f - t).norm() <= ROUNDING * t.norm(), ((f - t).norm() / t.norm()).item()


@pytest.mark.parametrize(
    "options", [{}, {"group_ids": torch.arange(N)}, {"backend": "reference"}], ids=["plain", "groups", "reference"]
)
@pytest.mark.parametrize(("name", "scale", "bias"), [("clip_loss", 20.0, 0.0), ("siglip_loss", 50.0, -17.0)])
def test_features(name, options, scale, bias):
    x, noise = towers(N, N, WIDTH)
    x, y = x.half(), F.normalize(x + 0.1 * noise, dim=1).half()  # well trained: what is left is in small weights
    s, b = (torch.tensor(t, dtype=torch.float64) for t in (scale, bias))
    if name == "siglip_loss":
        truth = scaled(lambda x, y: siglip_reference(x, y, s, b).mean(), x.double(), y.double())
        found = scaled(lambda x, y: ck.siglip_loss(x, y, scale, bias, **options), x, y)
    else:
        truth = scaled(lambda x, y: clip_reference(x, y, s), x.double(), y.double())
        found = scaled(lambda x, y: ck.clip_loss(x, y, scale, **options), x, y)
    assert_rounded(found, truth)


@pytest.mark.parametrize("estimator", ["mine", "infonce", "js"])
def test_projections_of_a_critic(estimator):
    """Weights of 1e-3, as of a critic that has just begun, and 1 / n^2 of a pair's."""
    torch.manual_seed(0)
    wide = ck.nn.ConcatCritic(D, D, 32, activation="silu")
    with torch.no_grad():
        wide.out.weight.mul_(1e-2)
    half = ck.nn.ConcatCritic(D, D, 32, activation="silu", storage=torch.float16)
    half.load_state_dict(wide.state_dict())
    x, z = towers(N, N, D)
    found, truth = (
        scaled(lambda x, z, c=c: ck.mutual_information(x, z, c, estimator=estimator), x, z) for c in (half, wide)
    )
    assert_rounded(found, truth)
