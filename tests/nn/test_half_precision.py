"""Modules cast to bfloat16 or float16: their layers compute in it, statistics, scores and sums in float32."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import leaves
from estimators import CRITICS, DX, DZ, all_scores, by_scores, data
from torch import Tensor, nn

import cibr_kernels as ck
from cibr_kernels.information.estimators import MAXIMISED
from cibr_kernels.losses.penalty import TERMS

HALVES = (torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.bfloat16).eps
# every pair of critic, estimator and dtype of parameters or features, without their product
CASES = [
    (critic, estimator, HALVES[(i + k) % 2], (torch.float32, *HALVES)[(i + k // 2) % 3])
    for i, critic in enumerate(CRITICS)
    for k, estimator in enumerate(MAXIMISED)
]


def pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A critic in half precision, and a float32 one with the same parameters."""
    torch.manual_seed(3)
    half = CRITICS[name]().to(dtype)
    return half, copy.deepcopy(half).float()


def by_definition(critic: nn.Module, x: Tensor, z: Tensor, estimator: str) -> Tensor:
    """From the n x n scores, in float32."""
    return by_scores(all_scores(critic, x, z).float(), estimator)


def gradients(value: Tensor, critic: nn.Module, *inputs: Tensor) -> Tensor:
    return torch.cat([g.flatten().float() for g in torch.autograd.grad(value, [*inputs, *critic.parameters()])])


@pytest.mark.parametrize(("name", "estimator", "dtype", "features"), CASES, ids=str)
def test_estimates_of_a_half_precision_critic(name, estimator, dtype, features):
    half, wide = pair(name, dtype)
    eps = torch.finfo(dtype).eps
    x, z = leaves(*(t.to(dtype) for t in data()[:2]), dtype=features)
    value = ck.mutual_information(x, z, half, estimator=estimator)
    assert value.dtype == torch.float32
    value.backward()
    assert x.grad.dtype == z.grad.dtype == features and all(p.grad.dtype == dtype for p in half.parameters())
    actual = torch.cat([t.grad.flatten().float() for t in (x, z, *half.parameters())])
    # the same layers, all scores at once
    xh, zh = leaves(x, z, dtype=dtype)
    same = by_definition(half, xh, zh, estimator)
    torch.testing.assert_close(value, same, rtol=eps / 4, atol=eps / 16)
    expected = gradients(same, half, xh, zh)
    assert (actual - expected).norm() < 2 * eps * expected.norm()
    # the float32 module
    xw, zw = leaves(x, z, dtype=torch.float32)
    exact = by_definition(wide, xw, zw, estimator)
    torch.testing.assert_close(value, exact, rtol=4 * eps, atol=eps)
    expected = gradients(exact, wide, xw, zw)
    assert (actual - expected).norm() < 6 * eps * expected.norm()


@pytest.mark.parametrize("name", ["relu", "two layers", "separable"])
def test_scores_of_a_direct_call_are_float32(name):
    half, wide = pair(name, torch.bfloat16)
    x, z, _ = data()
    for features in (x, x.half()):
        paired, pairwise = half(features, z), half.pairwise(features, z)
        assert paired.dtype == pairwise.dtype == torch.float32
        torch.testing.assert_close(paired, wide(x, z), rtol=4 * EPS, atol=4 * EPS)
        torch.testing.assert_close(pairwise, wide.pairwise(x, z), rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("negatives", [ck.shifts(3), ck.derangement(2)], ids=str)
@pytest.mark.parametrize("name", ["relu", "separable", "callable"])
def test_sampled_pairs_and_a_queue(name, negatives):
    half, wide = pair(name, torch.bfloat16)
    x, z, queue = data()
    for options in ({"negatives": negatives}, {"marginals": queue.half()}):
        found = []
        for critic in (half, wide):
            torch.manual_seed(1)
            found.append(ck.mutual_information(x, z, critic, estimator="smile", **options))
        torch.testing.assert_close(found[0], found[1], rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("name", ["relu", "separable"])
def test_autocast_changes_nothing(name):
    x, z, _ = data()
    for critic in pair(name, torch.bfloat16):
        for estimator in ("mine", "js", "infonce"):
            outside = ck.mutual_information(x, z, critic, estimator=estimator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(outside, ck.mutual_information(x, z, critic, estimator=estimator))


def test_models_of_z_given_x():
    x, z, _ = data()
    half = nn.Linear(DX, DZ).bfloat16()
    wide = copy.deepcopy(half).float()
    calls = {
        "club": lambda q: ck.mutual_information(x, z, q, estimator="club"),
        "likelihood": lambda q: ck.gaussian_log_likelihood(x.half(), z, q),
        "ceb": lambda q: ck.conditional_mutual_information(z, x, x.half(), q, estimator="ceb", noise_std=0.3),
    }
    for name, call in calls.items():
        value = call(half)
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, call(wide), rtol=4 * EPS, atol=4 * EPS, msg=name)
        value.backward()
        assert half.weight.grad.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------- the objective
def batch(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    z = [F.normalize(torch.randn(32, 8, generator=g), dim=1) for _ in range(2)]
    return [t.to(dtype) for t in (*z, torch.randn(32, 6, generator=g) * 3 + 1, torch.randn(32, 5, generator=g) - 2)]


def run(loss: ck.nn.CIBRLoss, inputs: list[Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    x, y, *rest = inputs
    return loss(x, y, torch.tensor(10.0, dtype=x.dtype), *rest, output_dict=True)


CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "twice": lambda m: m.half().to("cpu").bfloat16().half(),
}


@pytest.mark.parametrize("features", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("cast", list(CASTS))
def test_objective_in_half_precision(cast, features):
    torch.manual_seed(1)
    wide = ck.nn.CIBRLoss(8, 6, 5, hidden=16, ema_decay=0.9)
    half = CASTS[cast](copy.deepcopy(wide))
    dtype = next(half.parameters()).dtype
    for step in range(2):
        inputs = batch(features)
        expected, actual = run(wide, [t.float() for t in inputs]), run(half, inputs)
        for name, t in actual.items():
            assert t.dtype == torch.float32, name
            torch.testing.assert_close(t, expected[name], rtol=4 * EPS, atol=4 * EPS, msg=f"{name}, step {step}")
        actual["loss"].backward()  # the second adds up
        expected["loss"].backward()
    for (name, p), q in zip(half.named_parameters(), wide.parameters(), strict=True):
        assert p.dtype == p.grad.dtype == dtype, name
        torch.testing.assert_close(p.grad.float(), q.grad, rtol=12 * EPS, atol=4 * EPS, msg=name)
    for (name, b), expected_b in zip(half.named_buffers(), wide.buffers(), strict=True):
        assert b.dtype == expected_b.dtype, name
        assert name.startswith("ema") or torch.equal(b, expected_b), name


def test_small_steps_of_statistics_are_not_lost():
    """bfloat16 cannot move 256 by 1 % of 1."""
    layer = ck.nn.Standardize(1, momentum=0.01).bfloat16()
    ema = ck.nn.LogEMA(0.99).half()
    layer(torch.full((4, 1), 256.0))
    ema.update(torch.tensor(10.0))
    for _ in range(100):
        layer(torch.full((4, 1), 257.0))
        ema.update(torch.tensor(10.01))
    assert layer.mean.item() == pytest.approx(256 + 1 - 0.99**100, rel=1e-6)
    assert ema.value.item() == pytest.approx(10.00634, abs=2e-5)


def test_statistics_that_were_cast_by_force_are_promoted():
    """As FSDP's buffer_dtype, or load_state_dict(assign=True), can leave them."""
    layer, ema, x = ck.nn.Standardize(6), ck.nn.LogEMA(), batch()[2]
    layer.mean, layer.var, ema.value = layer.mean.half(), layer.var.half(), ema.value.half()
    assert layer(x.half()).dtype == ema(torch.tensor(1.0)).dtype == torch.float32
    assert layer.mean.dtype == torch.float16
    torch.testing.assert_close(layer.eval()(x), (x - x.mean(0)) / x.std(0, unbiased=False), rtol=0.01, atol=0.01)


def test_state_dicts_load_both_ways():
    wide, half = (ck.nn.CIBRLoss(8, 6, 5, hidden=16, ema_decay=0.9) for _ in range(2))
    half.bfloat16()
    run(wide, batch())
    half.load_state_dict(wide.state_dict())
    assert all(torch.equal(b, w) for b, w in zip(half.buffers(), wide.buffers(), strict=True))
    old = {k: v.bfloat16() if v.is_floating_point() else v for k, v in wide.state_dict().items()}
    wide.load_state_dict(old)
    assert all(t.dtype != torch.bfloat16 for t in wide.state_dict().values())
    for loaded in (half, wide):
        assert run(loaded, batch())["loss"].isfinite()


def test_made_under_a_half_precision_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss = ck.nn.CIBRLoss(8, 6, 5, hidden=16, ema_decay=0.9)
        out = run(loss, batch(torch.bfloat16))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {b.dtype for b in loss.buffers()} == {torch.float32, torch.int64, torch.bool}
    assert {t.dtype for t in out.values()} == {torch.float32} and next(loss.parameters()).dtype == torch.bfloat16


def test_a_float64_module_stays_float64():
    loss = ck.nn.CIBRLoss(8, 6, 5, hidden=16, ema_decay=0.9).double()
    out = run(loss, batch(torch.float64))
    assert all(out[name].dtype == torch.float64 for name in ("loss", *TERMS))
    assert loss.standardize_image.mean.dtype == loss.ema["image_own"].value.dtype == torch.float64
