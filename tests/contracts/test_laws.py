"""Laws of the losses: symmetries, exactness of tiny losses, and open_clip as an independent witness."""

from __future__ import annotations

import inspect
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from cases import LARGE, each_dtype, each_isa, towers, with_gradients

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.information.dot_moments import dot_moments
from cibr_kernels.primitives.additive.moments.op import additive_moments

SCALE = torch.tensor(14.3)


@each_dtype
@pytest.mark.parametrize("budget", [0, LARGE])
def test_swapping_towers_swaps_gradients(budget, dtype):
    ck.set_stash_budget(budget)
    x, y = (t.to(dtype) for t in towers(70, 70, 33))
    loss, dx, dy, ds = with_gradients(ck.clip_loss, x, y, SCALE)
    swapped, dy2, dx2, ds2 = with_gradients(ck.clip_loss, y, x, SCALE)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close((loss, ds), (swapped, ds2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((dx, dy), (dx2, dy2), rtol=8 * eps, atol=2 * eps * dx.abs().max().item())


def test_permuting_pairs_permutes_gradients():
    x, y = towers(70, 70, 33)
    order = torch.randperm(70)
    loss, dx, dy, _ = with_gradients(ck.clip_loss, x, y, SCALE)
    permuted, dxp, dyp, _ = with_gradients(ck.clip_loss, x[order], y[order], SCALE)
    torch.testing.assert_close((permuted, dxp, dyp), (loss, dx[order], dy[order]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["concat", "separable"])
def test_permuting_pairs_keeps_moments(kind):
    a, b = towers(70, 70, 33)
    w, order = torch.randn(33), torch.randperm(70)
    moments = dot_moments if kind == "separable" else lambda f, g: additive_moments(f, g, w)
    torch.testing.assert_close(moments(a, b), moments(a[order], b[order]), rtol=1e-5, atol=1e-6)


def test_bias_has_no_effect_and_a_zero_gradient():
    x, y = towers(20, 20, 8)
    bias = torch.tensor(-7.0)
    loss, *grads, dbias = with_gradients(ck.clip_loss, x, y, SCALE, bias)
    assert dbias.item() == 0
    for a, b in zip([loss, *grads], with_gradients(ck.clip_loss, x, y, SCALE), strict=True):
        assert torch.equal(a, b)


def test_repeating_every_pair_adds_log_two():
    # each row then has its positive twice and each negative twice: -log(p / 2)
    x, y = towers(50, 50, 16)
    once, twice = ck.clip_loss(x, y, SCALE), ck.clip_loss(x.repeat(2, 1), y.repeat(2, 1), SCALE)
    assert (twice - once).item() == pytest.approx(math.log(2), abs=1e-5)


@each_isa
def test_rotating_both_towers_changes_nothing(isa):
    x, y = towers(70, 70, 33)
    q = torch.linalg.qr(torch.randn(33, 33))[0]
    with testing.instruction_set(isa):
        torch.testing.assert_close(ck.clip_loss(x @ q, y @ q, SCALE), ck.clip_loss(x, y, SCALE), rtol=1e-5, atol=1e-6)


def test_equal_features_give_log_n():
    for n in (1, 2, 33, 100):
        x = F.normalize(torch.ones(n, 8), dim=1)
        assert ck.clip_loss(x, x, 20.0).item() == pytest.approx(math.log(n), abs=1e-6)


@each_isa
@pytest.mark.parametrize("budget", [0, LARGE])
@pytest.mark.parametrize("cosine", [0.9, 0.5, 0.2, -1.0])
def test_tiny_losses_are_exact(cosine, budget, isa):
    # two pairs, perfectly aligned: loss = softplus(100 (cosine - 1)), 2e-22 at cosine 0.5 and 0 in float32 at -1
    ck.set_stash_budget(budget)
    x = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
    with testing.instruction_set(isa):
        loss, dx, dy, dscale = with_gradients(ck.clip_loss, x, x.clone(), torch.tensor(100.0))
    x64 = x.double()
    gap = x64[0] @ x64[1] - x64.square().sum(1)  # of the negative's cosine to the positive's
    p = torch.sigmoid(100 * gap)
    assert loss.item() == pytest.approx(torch.log1p(torch.exp(100 * gap)).mean().item(), rel=1e-3, abs=1e-44)
    assert dscale.item() == pytest.approx((p * gap).mean().item(), rel=1e-3, abs=1e-38)
    expected = (50 * p[0] * (x64[1] - x64[0])).tolist()
    for gradient in (dx, dy):
        assert gradient[0].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-36)


@each_isa
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_gradient_of_the_positive_is_exact_where_the_loss_is_small(scale, isa):
    # a single direction per pair: dx_i along y_i is -scale (2 - p_row - p_col) / 2n, kept to float32 precision
    x = torch.eye(40)
    with testing.instruction_set(isa):
        _, dx, _, _ = with_gradients(ck.clip_loss, x, x.clone(), torch.tensor(scale))
    others = 39 * math.exp(-scale)
    assert dx.diagonal().double().mean().item() == pytest.approx(-scale / 40 * others / (1 + others), rel=1e-4)


@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("n", [1, 7, 130])
def test_equal_to_open_clip(n, bias):
    x, y = towers(n, n, 24)
    arguments = [x, y, SCALE] + ([] if bias is None else [torch.tensor(bias)])
    ours, theirs = with_gradients(ck.nn.ClipLoss(), *arguments), with_gradients(open_clip.ClipLoss(), *arguments)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_drop_in_for_open_clip():
    for method in ("__init__", "forward"):
        ours = inspect.signature(getattr(ck.nn.ClipLoss, method)).parameters
        theirs = inspect.signature(getattr(open_clip.ClipLoss, method)).parameters
        shared = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]  # what is ours alone has to be named
        assert [(p.name, p.default, p.kind) for p in shared] == [(p.name, p.default, p.kind) for p in theirs.values()]
    x, y = towers(9, 9, 4)
    ours, theirs = (loss(x, y, SCALE, output_dict=True) for loss in (ck.nn.ClipLoss(), open_clip.ClipLoss()))
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match=r"world_size=2, but torch\.distributed is not initialised"):
        ck.nn.ClipLoss(world_size=2)(x, y, SCALE)


@pytest.mark.parametrize("include", [False, True])
def test_a_constant_added_to_every_score_is_added_to_both_moments(include):
    f, g = towers(70, 70, 33)
    plain = dot_moments(f, g, include_diagonal=include)
    one = torch.ones(70, 1)
    shifted = dot_moments(torch.cat([f, 5 * one], 1), torch.cat([g, one], 1), include_diagonal=include)
    for a, b in zip(shifted, plain, strict=True):
        assert (a - b).item() == pytest.approx(5, abs=2e-5)
