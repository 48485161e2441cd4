"""clip_loss and siglip_loss without options in Triton, executed without a GPU, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from cases import towers
from executor import emulated
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels.losses.clip import triton as clip
from cibr_kernels.losses.clip.reference import clip_loss as clip_reference
from cibr_kernels.losses.siglip.reference import siglip_loss as siglip_reference
from cibr_kernels.primitives.dot.lse import triton as lse
from cibr_kernels.primitives.dot.softplus import triton as softplus
from cibr_kernels.testing import assert_close

NAMES = ("loss", "dx", "dy", "dscale", "dbias")


def loss_and_gradients(loss, *inputs: Tensor) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = loss(*leaves)
    gradients = torch.autograd.grad(3 * value, leaves)  # of which upstream's share shows
    return dict(zip(NAMES[: 1 + len(inputs)], [value.detach(), *gradients], strict=True))


@pytest.mark.parametrize(
    ("capability", "dtype", "n", "d", "kind", "one_way"),
    [
        (90, torch.bfloat16, 200, 130, "unit", False),
        (80, torch.float32, 37, 24, "unit", True),
        (100, torch.bfloat16, 140, 40, "opposed", False),  # underflows, then online
        (120, torch.float32, 1, 1, "unit", False),
        (90, torch.float16, 40, 32, "unit", False),  # its ends are PyTorch's
    ],
)
def test_clip_loss(capability, dtype, n, d, kind, one_way):
    """The loss without options, whose ends are kernels too, against float64."""
    x, y = (t.to(dtype) for t in towers(n, n, d, 0, kind))
    scale = torch.tensor(100.0)
    with emulated(capability) as gpu:
        ours = loss_and_gradients(lambda *t: ck.clip_loss(*t, one_way=one_way, backend="triton"), x, y, scale)
    check_clip_loss(ours, x, y, scale, one_way)
    names = [name for name, _ in gpu.launches]
    assert ("clip_loss_ends_kernel" in names, "dot_exponent_kernel" in names) == (
        (True, False) if dtype != torch.float16 else (False, True)
    )


def test_clip_loss_in_panels():
    """Of 128 rows and columns, features of a width that 32 does not divide; the sums underflow, and are made online."""
    x, y = (t.bfloat16() for t in towers(140, 140, 136, 0, "opposed"))
    scale, panels = torch.tensor(100.0), lse.Panels(forward_rows=128, backward_rows=128, backward_cols=128)
    with emulated(90) as gpu:
        loss, *kept = clip.launch_forward(x, y, scale, False, 0, True, panels)
        gradients = clip.launch_backward(torch.tensor(3.0), x, y, scale, kept, False, True, True, panels)
    assert [name for name, _ in gpu.launches].count("dot_lse_gradient_kernel") == 4
    check_clip_loss(dict(zip(NAMES[:4], (loss, *gradients), strict=True)), x, y, scale, False)


def check_clip_loss(ours: dict[str, Tensor], x: Tensor, y: Tensor, scale: Tensor, one_way: bool) -> None:
    """Holds the loss and three times its gradients to float64's."""
    eager = loss_and_gradients(lambda *t: clip_reference(*t, 0, one_way), x, y, scale)
    truth = loss_and_gradients(lambda *t: clip_reference(*t, 0, one_way), x.double(), y.double(), scale.double())
    products = x.double() @ y.double().T
    for name, t in truth.items():
        features = torch.float32 if name == "loss" else x.dtype
        assert_close(
            name,
            ours[name],
            eager[name],
            t,
            terms=len(x),
            exponent=100 * products.abs().max().item(),
            features=features,
            magnitude=products.abs().max().item(),
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
    before, sweep = (
        ["siglip_loss_positives_kernel", "dot_total_kernel"],
        ["dot_softplus_sweep_kernel", "siglip_loss_losses_kernel"],
    )
    ends = ["dot_both_features_gradients_kernel", *["dot_total_kernel"] * 3]
    assert [name for name, _ in gpu.launches] == [*before, *sweep, *ends, "loss_times_kernel"]


def test_siglip_loss_in_panels():
    """Of 128 rows and columns: the loss and gradients of one panel, up to the order of sums."""
    x, y = (t.bfloat16() for t in towers(300, 300, 96))
    numbers = torch.tensor(10.0), torch.tensor(-4.0), 1 / 300
    with emulated(90):
        loss, *kept = softplus.mean_loss(x, y, *numbers, True, True)
        whole = loss, *softplus.gradients(kept, x)
    with emulated(90) as gpu:
        panels = softplus.Panels(rows=128, gradient_rows=128, gradient_cols=128)
        cut = softplus.mean_loss(x, y, *numbers, True, True, panels)
    for ours, theirs in zip(cut, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if ours.dtype == torch.float32 else 2e-2, atol=1e-6)
    sweep = [*["dot_softplus_sweep_kernel"] * 3, "siglip_loss_losses_kernel", "dot_features_gradient_kernel"] * 3
    expected = [
        "siglip_loss_positives_kernel",
        "dot_total_kernel",
        *sweep,
        "dot_features_gradient_kernel",
        *["dot_total_kernel"] * 3,
    ]
    assert [name for name, _ in gpu.launches] == expected


@pytest.mark.parametrize(("name", "value"), [("x", math.nan), ("y", -math.inf), ("bias", math.inf)])
def test_siglip_loss_of_what_is_not_finite(name, value):
    inputs = dict(zip(("x", "y"), towers(20, 20, 32), strict=True))
    inputs |= {"scale": torch.tensor(10.0), "bias": torch.tensor(-4.0)}
    inputs[name].view(-1)[-1] = value
    with emulated(80):
        ours = loss_and_gradients(lambda *leaves: ck.siglip_loss(*leaves, backend="triton"), *inputs.values())
    assert all(t.isnan().all() for t in ours.values()), ours
