"""The estimators of pairs against formulas on the n x m scores, in float64, for every kind of critic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Recorded, leaves
from estimators import CONTRASTS, CRITICS, DZ, SMALL, N, all_scores, check, data, definition, formula, made
from torch import Tensor, nn

import cibr_kernels as ck
from cibr_kernels.information.estimators import MAXIMISED, gaussian_log_likelihood
from cibr_kernels.information.negatives import derangement, permutation

OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "include": {"diagonal": "include"},
    "shifts": {"negatives": ck.shifts(5)},
}


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("estimator", CONTRASTS)
@pytest.mark.parametrize("name", list(CRITICS))
def test_estimators_equal_their_formulas(name, estimator, options):
    ck.set_stash_budget(SMALL)
    chosen = OPTIONS[options]
    more = {"tau": 1.5} if estimator == "smile" else {}
    check(
        lambda critic, x, z: ck.mutual_information(x, z, critic, estimator=estimator, **chosen, **more),
        lambda critic, x, z: definition(estimator, x, z, critic, **chosen, **more),
        made(name),
        data()[:2],
    )


@pytest.mark.parametrize("diagonal", ["exclude", "include"])
@pytest.mark.parametrize("estimator", ["dv", "nwj", *CONTRASTS])
@pytest.mark.parametrize("name", list(CRITICS))
def test_a_queue_is_more_columns(name, estimator, diagonal):
    ck.set_stash_budget(SMALL)

    def truth(critic: nn.Module, x: Tensor, z: Tensor, queue: Tensor) -> Tensor:
        if estimator in CONTRASTS:
            return definition(estimator, x, z, critic, diagonal=diagonal, marginals=queue)
        scores = all_scores(critic, x, torch.cat([z, queue]))
        chosen = scores if diagonal == "include" else scores[~torch.eye(*scores.shape, dtype=torch.bool)]
        el = chosen.exp().mean().log()
        return scores.diagonal().mean() - (el if estimator == "dv" else (el - 1).exp())

    def ours(critic: nn.Module, x: Tensor, z: Tensor, queue: Tensor) -> Tensor:
        return ck.mutual_information(x, z, critic, estimator=estimator, diagonal=diagonal, marginals=queue)

    check(ours, truth, made(name), data())


@pytest.mark.parametrize("negatives", ["all", ck.shifts(4)], ids=str)
@pytest.mark.parametrize("name", ["two layers", "pairwise", "callable"])
def test_moments_of_critics_without_kernels(name, negatives):
    ck.set_stash_budget(SMALL)

    def truth(critic: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        scores, i = all_scores(critic, x, z), torch.arange(N)
        chosen = (
            scores[i[:, None] != i] if negatives == "all" else torch.cat([scores[i, (i + s) % N] for s in range(1, 5)])
        )
        return 0.3 * scores.diagonal().mean() + 1.9 * chosen.exp().mean().log()

    def ours(critic: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        j, el = ck.critic_moments(x, z, critic, negatives=negatives)
        return 0.3 * j + 1.9 * el

    check(ours, truth, made(name), data()[:2])


def test_a_plain_function_is_a_critic():
    x, z, _ = data()
    value = ck.mutual_information(x, z, lambda p, q: (p[:, :DZ] * q).sum(1), estimator="infonce")
    scores = (x[:, :DZ] @ z.T).double()
    torch.testing.assert_close(value, formula("infonce", scores.diagonal(), scores, columns=scores).float())


@pytest.mark.parametrize("estimator", ["dv", *CONTRASTS])
@pytest.mark.parametrize("name", ["relu", "separable", "two layers"])
def test_estimates_compile(name, estimator):
    critic, (x, z, _) = made(name), data()

    def f(x: Tensor, z: Tensor) -> Tensor:
        return ck.mutual_information(x, z, critic, estimator=estimator)

    expected = f(x, z)
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    tensors = leaves(x, z)
    value = compiled(*tensors)
    torch.testing.assert_close(value, expected)
    others = leaves(x, z)
    for p, q in zip(torch.autograd.grad(value, tensors), torch.autograd.grad(f(*others), others), strict=True):
        torch.testing.assert_close(p, q)


# ------------------------------------------------------------------------------------- units, options, NaN
@pytest.mark.parametrize("estimator", [*MAXIMISED, "club"])
def test_bits_are_nats_over_ln_2(estimator):
    x, z, _ = data()
    critic = (lambda t: t[:, :DZ]) if estimator == "club" else made("relu")
    nats = ck.mutual_information(x, z, critic, estimator=estimator)
    bits = ck.mutual_information(x, z, critic, estimator=estimator, unit="bits")
    torch.testing.assert_close(bits, nats / math.log(2))


@pytest.mark.parametrize("estimator", ["dv", *CONTRASTS])
@pytest.mark.parametrize("where", ["x", "z", "queue"])
@pytest.mark.parametrize("name", list(CRITICS))
def test_a_bad_feature_is_nan(name, where, estimator):
    for value in (math.nan, math.inf, -math.inf):
        x, z, queue = leaves(*data())
        with torch.no_grad():
            {"x": x, "z": z, "queue": queue}[where][5, 2] = value
        estimate = ck.mutual_information(x, z, made(name), estimator=estimator, marginals=queue)
        estimate.backward()
        assert estimate.isnan()
        assert not all(t.grad.isfinite().all() for t in (x, z, queue))


@pytest.mark.parametrize("estimator", ["dv", *CONTRASTS])
@pytest.mark.parametrize("name", ["relu", "separable", "two layers"])
def test_large_scores_stay_finite(name, estimator):
    x, z, _ = data()
    critic = made(name)
    tensors = leaves(300 * x, 300 * z)
    estimate = ck.mutual_information(*tensors, critic, estimator=estimator)
    estimate.backward()
    assert estimate.isfinite() and all(t.grad.isfinite().all() for t in tensors)


def test_infonce_is_capped_at_the_log_of_its_columns():
    eye = 40 * torch.eye(16)
    queue = torch.zeros(16, 16)
    for critic in (lambda p, q: (p * q).sum(1), ck.nn.SeparableCritic.from_maps(nn.Identity(), nn.Identity())):
        assert ck.mutual_information(eye, eye, critic, estimator="infonce").item() == pytest.approx(math.log(16))
        value = ck.mutual_information(eye, eye, critic, estimator="infonce", marginals=queue)
        assert value.item() == pytest.approx(math.log(32))
        value = ck.mutual_information(eye, eye, critic, estimator="infonce", negatives=ck.shifts(3))
        assert value.item() == pytest.approx(math.log(4))


X = torch.randn(6, 4)
CRITIC = ck.nn.ConcatCritic(4, 4, 8)


def mi(critic: Any = CRITIC, **options: Any):
    return lambda: ck.mutual_information(X, X, critic, **options)


def cmi(**options: Any):
    return lambda: ck.conditional_mutual_information(X, X, X, (CRITIC, CRITIC), **options)


REFUSED = {
    "estimator": (mi(estimator="jsd"), ValueError, r"estimator is 'jsd'; known are 'mine', .*'infonce', 'club'"),
    "unit": (mi(unit="bans"), ValueError, r"unit is 'bans'; known are 'nats', 'bits'"),
    "cmi unit": (cmi(unit="bans"), ValueError, r"unit is 'bans'"),
    "cmi estimator": (cmi(estimator="club"), ValueError, r"estimator is 'club'; known .*'ceb', 'variance', 'align'"),
    "ema": (mi(estimator="infonce", ema=X[0, 0]), ValueError, r"ema corrects .* got estimator 'infonce'"),
    "tau": (mi(estimator="smile", tau=0.0), ValueError, r"SMILE's tau must be positive, got 0.0"),
    "option": (mi(estimator="js", tau=1.0), TypeError, r"estimator 'js' takes no options, got tau"),
    "other option": (mi(estimator="remine", a=1.0), TypeError, r"'remine' takes the options rho, c, got a"),
    "derangement 0": (lambda: derangement(0), ValueError, r"derangement needs k >= 1, got 0"),
    "permutation 0": (lambda: permutation(0), ValueError, r"permutation needs k >= 1, got 0"),
    "derangement n": (mi(negatives=derangement(6)), ValueError, r"derangement\(6\) needs more than 6 rows, got 6"),
    "marginals shifts": (mi(negatives=ck.shifts(2), marginals=X), ValueError, r"marginals are .* got .*Shifts\(k=2\)"),
    "marginals width": (mi(marginals=X[:, :3]), ValueError, r"z has width 4 but marginals has width 3"),
    "marginals integer": (mi(marginals=X.long()), TypeError, r"marginals must be float32"),
    "marginals device": (mi(marginals=X.to("meta")), ValueError, r"z is .* on cpu but marginals is .* on meta"),
    "marginals ring": (
        mi(ck.nn.SeparableCritic(4, 4), marginals=X, strategy="ring"),
        ValueError,
        r"'ring' has no marginals",
    ),
    "smile ring": (
        mi(ck.nn.SeparableCritic(4, 4), estimator="smile", strategy="ring"),
        ValueError,
        r"neither smile nor club",
    ),
    "critic arguments": (mi(nn.Linear(4, 4)), TypeError, r"critic must have .* callable with \(x, z\), got Linear"),
    "critic none": (mi(3), TypeError, r"critic must have .* got 3"),
    "club critic": (mi(lambda p, q: p, estimator="club"), TypeError, r"'club' must be callable with x alone"),
    "club shifts": (mi(lambda p: p, estimator="club", negatives=ck.shifts(1)), ValueError, r"be 'all', got Shifts"),
    "club shape": (mi(lambda p: p[:, :2], estimator="club"), ValueError, r"critic\(x\) has shape \(6, 2\) but z is"),
    "likelihood shape": (
        lambda: gaussian_log_likelihood(X, X, lambda t: t[:5]),
        ValueError,
        r"q\(x\) has shape \(5, 4\)",
    ),
    "likelihood rows": (lambda: gaussian_log_likelihood(X, X[:5], lambda t: t), ValueError, r"x has 6 rows but z .* 5"),
    "wrong width": (
        mi(ck.nn.ConcatCritic(3, 4, 8, layers=2)),
        ValueError,
        r"x has width 4 but the critic was made for 3",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_bad_arguments_are_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message), Recorded() as seen:
        call()
    assert not seen.calls


@pytest.mark.parametrize("negatives", ["all", ck.shifts(2)], ids=str)
def test_a_critic_of_the_wrong_shape_is_named(negatives):
    for wrong, message in (
        (lambda p, q: p[:, :1], r"critic must return shape \(\d+,\), got \(\d+, 1\)"),
        (lambda p, q: p.sum(), r"critic must return shape \(\d+,\), got \(\)"),
        (lambda p, q: 3.0, r"critic must return a tensor of shape \(\d+,\), got float"),
    ):
        with pytest.raises(TypeError, match=message):
            mi(wrong, negatives=negatives)()
    module = CRITICS["pairwise"]()
    module.pairwise = lambda x, z: x
    with pytest.raises(TypeError, match=r"critic must return shape \(6, 6\), got \(6, 4\)"):
        mi(module)()


# ------------------------------------------------------------------------------------- conditional
@pytest.mark.parametrize("estimator", MAXIMISED)
def test_conditional_estimates_are_differences(estimator):
    torch.manual_seed(6)
    z, own, other = torch.randn(N, 3), torch.randn(N, 5), torch.randn(N, 4)
    critics = ck.nn.ConcatCritic(5, 3, 8), ck.nn.ConcatCritic(4, 3, 8)
    one, two = (ck.mutual_information(x, z, t, estimator=estimator) for x, t in zip((own, other), critics, strict=True))
    value = ck.conditional_mutual_information(z, own, other, critics, estimator=estimator)
    assert torch.equal(value, one - two)
    bits = ck.conditional_mutual_information(z, own, other, critics, estimator=estimator, unit="bits")
    torch.testing.assert_close(bits, (one - two) / math.log(2))


def test_upper_bounds_in_bits():
    torch.manual_seed(6)
    z, other = torch.randn(N, 3), torch.randn(N, 3)
    for estimator, q in (("align", None), ("ceb", lambda t: 0.5 * t)):
        values = [
            ck.conditional_mutual_information(z, z, other, q, estimator=estimator, noise_std=0.7, unit=unit)
            for unit in ("nats", "bits")
        ]
        torch.testing.assert_close(values[1], values[0] / math.log(2))
