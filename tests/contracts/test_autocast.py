"""Autocast casts clip_loss's features as a matmul would cast them, and leaves critics in float32."""

from __future__ import annotations

import pytest
import torch
from cases import Recorded, leaves, towers

import cibr_kernels as ck
from cibr_kernels.losses.penalty import TERMS

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_clip_loss_takes_bfloat16_features(dtype):
    x, y, s = leaves(*towers(33, 33, 16), torch.tensor(14.3))
    x, y = leaves(x, y, dtype=dtype)
    with torch.autocast(**BF16), Recorded() as seen:
        loss = ck.clip_loss(x, y, s)
    ((arguments, _),) = seen.named("dot_lse_forward")
    assert arguments[0].dtype == arguments[1].dtype == torch.bfloat16 and arguments[2].dtype == torch.float32
    assert loss.dtype == torch.float32
    loss.backward()
    assert x.grad.dtype == y.grad.dtype == dtype and s.grad.dtype == torch.float32
    with Recorded():  # the same way: unseen, a small batch's loss and gradients are made in one call
        assert torch.equal(loss, ck.clip_loss(x.bfloat16(), y.bfloat16(), s))


def test_siglip_loss_takes_bfloat16_features():
    x, y, s, b = leaves(*towers(33, 33, 16), torch.tensor(14.3), torch.tensor(-5.0))
    with torch.autocast(**BF16), Recorded() as seen:
        loss = ck.siglip_loss(x, y, s, b)
    ((arguments, _),) = seen.named("dot_softplus_total")
    assert arguments[0].dtype == arguments[1].dtype == torch.bfloat16 and arguments[2].dtype == torch.float32
    loss.backward()
    assert loss.dtype == x.grad.dtype == y.grad.dtype == s.grad.dtype == b.grad.dtype == torch.float32


def test_float64_features_stay_as_they_are():
    x, y = (t.double() for t in towers(5, 5, 4))
    with torch.autocast(**BF16):
        assert ck.clip_loss(x, y, 5.0).dtype == torch.float64


@pytest.mark.parametrize("critic", [ck.nn.ConcatCritic(6, 4, 16), ck.nn.SeparableCritic(6, 4, 16, 8)])
@pytest.mark.parametrize("negatives", ["all", ck.shifts(3)], ids=str)
def test_critics_stay_float32(critic, negatives):
    x, z = torch.randn(20, 6), torch.randn(20, 4)
    plain = ck.critic_moments(x, z, critic, negatives=negatives)
    with torch.autocast(**BF16):
        inside = ck.critic_moments(x, z, critic, negatives=negatives)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_cibr_loss_computes_its_critics_in_float32():
    torch.manual_seed(1)
    critics = {name: ck.nn.ConcatCritic(6, 4, 16) for name in TERMS}
    options = {"image_inputs": torch.randn(20, 6), "text_inputs": torch.randn(20, 6), "critics": critics}

    def parts(x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(2)
        return ck.cibr_loss(x, y, 5.0, **options, generator=generator, return_parts=True)[1]

    x, y = towers(20, 20, 4)
    plain = parts(x, y)
    with torch.autocast(**BF16):
        inside = parts(x, y)
    assert all(torch.equal(inside[name], plain[name]) for name in TERMS)
    assert inside["contrastive_loss"].dtype == torch.float32
    assert torch.equal(inside["contrastive_loss"], ck.clip_loss(x.bfloat16(), y.bfloat16(), 5.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_critic_inputs_are_computed_in_float32(dtype):
    critic = ck.nn.ConcatCritic(6, 4, 16)
    x, z = leaves(torch.randn(20, 6), torch.randn(20, 4), dtype=dtype)
    j, el = ck.critic_moments(x, z, critic)
    assert j.dtype == el.dtype == torch.float32
    (j - el).backward()
    assert x.grad.dtype == z.grad.dtype == dtype
    torch.testing.assert_close((j, el), ck.critic_moments(x.float(), z.float(), critic), rtol=0, atol=0)
