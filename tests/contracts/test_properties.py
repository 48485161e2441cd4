"""Properties that hold for every shape, dtype, stride, scale, mask and weight: searched by hypothesis."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.moments.op import additive_moments
from cibr_kernels.primitives.dot.lse.op import dot_lse
from cibr_kernels.primitives.dot.softplus.op import dot_softplus_sums

search = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SCALES = st.sampled_from([0.01, 1.0, 14.3, 100.0])


@st.composite
def batches(draw: Any) -> dict[str, Any]:
    """A batch for a contrastive loss: x, y (n, d) in one dtype and any strides, a scale, groups, weights."""
    n, d = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    norm = draw(st.sampled_from([1.0, 0.05, 3.0]))
    x, y = (norm * torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1) for _ in range(2))
    y = torch.lerp(y, x, draw(st.floats(0, 1)))
    dtype = draw(DTYPES)
    x, y = (_strided(t.to(dtype), draw(st.sampled_from(["plain", "transposed", "sliced"]))) for t in (x, y))
    groups = draw(st.sampled_from([0, 1, 3, n]))
    return {
        "x": x,
        "y": y,
        "scale": draw(SCALES),
        "group_ids": torch.randint(0, groups, (n,), generator=g) * 7 - 3 if groups else None,
        "group_mode": draw(st.sampled_from(["mask", "positives"])),
        "weights": torch.rand(n, generator=g) + 0.1 if draw(st.booleans()) else None,
    }


def _strided(t: Tensor, kind: str) -> Tensor:
    if kind == "transposed":
        return t.T.contiguous().T
    return torch.cat([t, t], 1)[:, : t.shape[1]] if kind == "sliced" else t


def losses(batch: dict[str, Any], **changes: Any) -> list[Tensor]:
    """[clip_loss, siglip_loss], their gradients for x and for y, float32."""
    options = {k: v for k, v in (batch | changes).items() if k not in ("x", "y")}
    scale = options.pop("scale")
    found = []
    for loss in (ck.clip_loss, lambda x, y, s, **o: ck.siglip_loss(x, y, s, -2.0, **o)):
        x, y = (batch | changes)["x"].detach().requires_grad_(), (batch | changes)["y"].detach().requires_grad_()
        value = loss(x, y, scale, **options)
        found += [value.detach(), *(g.float() for g in torch.autograd.grad(value, (x, y)))]
    return found


def assert_close(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype, scale: float) -> None:
    eps = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for a, e in zip(actual, expected, strict=True):
        size = e.abs().max().item() if e.dim() else max(1.0, abs(e.item()))
        torch.testing.assert_close(a, e, rtol=eps, atol=eps * size + 1e-7 * scale)


@search
@given(batches())
def test_swapping_towers_swaps_gradients(batch):
    clip, cx, cy, siglip, sx, sy = losses(batch)
    swapped = losses(batch, x=batch["y"], y=batch["x"])
    assert_close(swapped, [clip, cy, cx, siglip, sy, sx], batch["x"].dtype, batch["scale"])


@search
@given(batches(), st.randoms(use_true_random=False))
def test_permuting_pairs_permutes_gradients(batch, random):
    order = list(range(len(batch["x"])))
    random.shuffle(order)
    moved = {k: v[order] for k, v in batch.items() if isinstance(v, Tensor)}
    clip, cx, cy, siglip, sx, sy = losses(batch)
    expected = [clip, cx[order], cy[order], siglip, sx[order], sy[order]]
    assert_close(losses(batch, **moved), expected, batch["x"].dtype, batch["scale"])


@search
@given(batches(), st.sampled_from([2.0, 0.125, 1024.0]))
def test_scaling_all_weights_changes_nothing(batch, factor):
    n = len(batch["x"])
    weights = torch.full((n,), factor) if batch["weights"] is None else batch["weights"] * factor
    assert_close(losses(batch, weights=weights), losses(batch), batch["x"].dtype, batch["scale"])


@search
@given(batches())
def test_a_pair_of_weight_zero_still_is_a_negative(batch):
    """Its own loss does not count: the weighted mean is that of the losses of the others."""
    n = len(batch["x"])
    weights = torch.ones(n)
    weights[n // 2] = 0 if n > 1 else 1
    options = {k: v for k, v in batch.items() if k not in ("x", "y", "scale", "weights")}
    for loss in (ck.clip_loss, lambda x, y, s, **o: ck.siglip_loss(x, y, s, -2.0, **o)):
        each = loss(batch["x"], batch["y"], batch["scale"], reduction="none", **options)
        value = loss(batch["x"], batch["y"], batch["scale"], weights=weights, **options)
        torch.testing.assert_close(value, (each * weights).sum() / weights.sum(), rtol=1e-5, atol=1e-5)


@search
@given(batches(), st.integers(1, 69))
def test_splitting_columns_merges_exactly(batch, at):
    """Sums over columns are those over two parts of them."""
    x, y, scale, bias = batch["x"], batch["y"], torch.tensor(batch["scale"]), torch.tensor(-1.0)
    at = min(at, len(y) - 1)
    assume(at >= 1)
    ids = batch["group_ids"]
    kwargs = [
        {"row_ids": ids, "col_ids": ids if ids is None else ids[part]} for part in (slice(0, at), slice(at, None))
    ]
    whole = dot_lse(x, y, scale, mask_positives=False, row_ids=ids, col_ids=ids, need_cols=False, need_max=True)
    # a part with fewer columns than rows has no place for positives: ask it for its columns' sums instead
    parts = [
        dot_lse(part, x, scale, mask_positives=False, row_ids=k["col_ids"], col_ids=ids, need_max=True)
        for part, k in zip((y[:at], y[at:]), kwargs, strict=True)
    ]
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), whole[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.maximum(parts[0][4], parts[1][4]), whole[3], rtol=1e-5, atol=1e-4)
    far = len(y)
    total, _ = dot_softplus_sums(x, y, scale, bias, row_ids=ids, col_ids=ids, first_positive=far)
    split = [
        dot_softplus_sums(x, part, scale, bias, first_positive=far, **k)[0]
        for part, k in zip((y[:at], y[at:]), kwargs, strict=True)
    ]
    torch.testing.assert_close(split[0] + split[1], total, rtol=1e-5, atol=1e-6)


@search
@given(
    st.integers(2, 60),
    st.integers(1, 40),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.floats(-30, 30),
    st.integers(0, 99),
    st.booleans(),
)
def test_shifting_every_score_shifts_both_moments(n, h, activation, shift, seed, include):
    """A constant added through a hidden unit that is the same for every pair."""
    g = torch.Generator().manual_seed(seed)
    a, b, w = torch.randn(n, h, generator=g), torch.randn(n, h, generator=g), torch.randn(h, generator=g)
    one = torch.full((n, 1), 2.0)
    unit = ACTIVATIONS[activation][0](torch.tensor(4.0), 0.01)  # phi(2 + 2)
    options: dict[str, Any] = {"activation": activation, "include_diagonal": include}
    j, el = additive_moments(a, b, w, **options)
    wide = additive_moments(
        torch.cat([a, one], 1), torch.cat([b, one], 1), torch.cat([w, w.new_tensor([shift])]), **options
    )
    for moved, plain in zip(wide, (j, el), strict=True):
        assert math.isclose(moved.item(), plain.item() + shift * unit.item(), rel_tol=1e-4, abs_tol=1e-4)
