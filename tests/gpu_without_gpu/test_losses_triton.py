"""clip_loss and siglip_loss without options in Triton, executed without a GPU, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from cases import towers
from executor import emulated
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels.losses.clip.reference import clip_loss as clip_reference
from cibr_kernels.losses.siglip.reference import siglip_loss as siglip_reference
from cibr_kernels.primitives.dot.lse import triton as lse
from cibr_kernels.primitives.dot.softplus import triton as softplus
from cibr_kernels.testing import assert_close


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    monkeypatch.setattr(lse, "panels", lse.Panels(forward_rows=128, backward_rows=128, backward_cols=128))
    monkeypatch.setattr(softplus, "panels", softplus.Panels(rows=128, gradient_rows=128, gradient_cols=128))


def loss_and_gradients(loss, *inputs: Tensor) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = loss(*leaves)
    gradients = torch.autograd.grad(3 * value, leaves)  # of which upstream's share shows
    names = ("loss", "dx", "dy", "dscale", "dbias")[: 1 + len(inputs)]
    return dict(zip(names, [value.detach(), *gradients], strict=True))


@pytest.mark.parametrize(
    ("capability", "dtype", "n", "d", "kind", "one_way", "rows"),
    [
        (90, torch.bfloat16, 200, 130, "unit", False, 8192),
        (80, torch.float32, 37, 24, "unit", True, 8192),
        (100, torch.bfloat16, 140, 40, "opposed", False, 8192),  # underflows, then online
        (90, torch.bfloat16, 140, 136, "opposed", False, 128),  # the same in panels
        (120, torch.float32, 1, 1, "unit", False, 8192),
        (90, torch.float16, 40, 32, "unit", False, 8192),  # its ends are PyTorch's
    ],
)
def test_clip_loss(monkeypatch, capability, dtype, n, d, kind, one_way, rows):
    """The loss without options, whose ends are kernels too, against float64."""
    monkeypatch.setattr(lse, "panels", lse.Panels(rows, rows))
    x, y = (t.to(dtype) for t in towers(n, n, d, 0, kind))
    scale = torch.tensor(100.0)
    with emulated(capability) as gpu:
        ours = loss_and_gradients(lambda *t: ck.clip_loss(*t, one_way=one_way, backend="triton"), x, y, scale)
    eager = loss_and_gradients(lambda *t: clip_reference(*t, 0, one_way), x, y, scale)
    truth = loss_and_gradients(lambda *t: clip_reference(*t, 0, one_way), x.double(), y.double(), scale.double())
    products = x.double() @ y.double().T
    for name, t in truth.items():
        features = torch.float32 if name == "loss" else dtype
        assert_close(
            name,
            ours[name],
            eager[name],
            t,
            terms=n,
            exponent=100 * products.abs().max().item(),
            features=features,
            magnitude=products.abs().max().item(),
        )
    names = [name for name, _ in gpu.launches]
    assert ("ends_kernel" in names, "exponent_kernel" in names) == (
        (True, False) if dtype != torch.float16 else (False, True)
    )


def test_clip_loss_of_what_is_not_finite():
    x, y = towers(20, 20, 32, 0)
    y[3, 3] = math.inf
    with emulated(80):
        ours = loss_and_gradients(lambda *t: ck.clip_loss(*t, backend="triton"), x, y, torch.tensor(10.0))
    assert all(t.isnan().all() for t in ours.values()), ours


@pytest.mark.parametrize(
    ("capability", "dtype", "n", "d"),
    [
        (90, torch.bfloat16, 300, 96),
        (80, torch.float32, 37, 24),
        (120, torch.float16, 140, 40),
        (100, torch.bfloat16, 1, 1),
    ],
)
def test_siglip_loss(capability, dtype, n, d):
    """siglip_loss without options is one node: loss and gradients against float64, and no launch besides."""
    x, y = (t.to(dtype) for t in towers(n, n, d))
    scale, bias = torch.tensor(10.0), torch.tensor(-4.0)
    with emulated(capability) as gpu:
        ours = loss_and_gradients(lambda *leaves: ck.siglip_loss(*leaves, backend="triton"), x, y, scale, bias)
    eager = loss_and_gradients(lambda *leaves: siglip_reference(*leaves).mean(), x, y, scale, bias)
    wide = [t.double() for t in (x, y, scale, bias)]
    truth = loss_and_gradients(lambda *leaves: siglip_reference(*leaves).mean(), *wide)
    magnitude = truth["loss"].item()
    for name, t in truth.items():
        features = torch.float32 if name in ("loss", "dbias") else dtype
        assert_close(name, ours[name], eager[name], t, terms=n, exponent=14.0, features=features, magnitude=magnitude)
    panels = -(-n // 128)
    sweep = [*["softplus_kernel"] * panels, "losses_kernel", "features_gradient_kernel"] * panels
    last = ["features_gradient_kernel"]
    if panels == 1:
        sweep, last = ["softplus_kernel", "losses_kernel"], ["both_features_gradients_kernel"]
    expected = ["positives_kernel", "total_kernel", *sweep, *last, *["total_kernel"] * 3, "times_kernel"]
    assert [name for name, _ in gpu.launches] == expected


@pytest.mark.parametrize(("name", "value"), [("x", math.nan), ("y", -math.inf), ("bias", math.inf)])
def test_siglip_loss_of_what_is_not_finite(name, value):
    inputs = dict(zip(("x", "y"), towers(20, 20, 32), strict=True))
    inputs |= {"scale": torch.tensor(10.0), "bias": torch.tensor(-4.0)}
    inputs[name].view(-1)[-1] = value
    with emulated(80):
        ours = loss_and_gradients(lambda *leaves: ck.siglip_loss(*leaves, backend="triton"), *inputs.values())
    assert all(t.isnan().all() for t in ours.values()), ours
