"""critic_moments and mutual_information against the critics' own pairwise definition, values and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from cases import each_isa, leaves
from torch import Tensor, nn

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.primitives.additive.activations import ACTIVATIONS

N, DX, DZ = 37, 6, 4
CRITICS = {name: ck.nn.ConcatCritic(DX, DZ, 24, activation=name) for name in ACTIVATIONS}
CRITICS["separable"] = ck.nn.SeparableCritic(DX, DZ, 24, 10)
FORMULAS = {
    "dv": lambda j, el: j - el,
    "mine": lambda j, el: j - el,
    "nwj": lambda j, el: j - torch.exp(el - 1),
    "tuba": lambda j, el: j - torch.exp(el) / 2.2 - math.log(2.2) + 1,
    "remine": lambda j, el: j - el - 0.4 * (el - 0.5) ** 2,
}
OPTIONS = {"tuba": {"a": 2.2}, "remine": {"rho": 0.4, "c": 0.5}}


def eager_moments(
    x: Tensor, z: Tensor, critic: nn.Module, negatives="all", diagonal="exclude"
) -> tuple[Tensor, Tensor]:
    """J and L from the (n, n) scores, in words of one syllable."""
    scores = critic.pairwise(x, z)
    i = torch.arange(len(x))
    if negatives == "all":
        chosen = scores.flatten() if diagonal == "include" else scores[i[:, None] != i]
    else:
        chosen = torch.cat([scores[i, (i + s) % len(x)] for s in range(1, negatives.k + 1)])
    return scores[i, i].mean(), chosen.exp().mean().log()


def values_and_gradients(estimate, critic: nn.Module, x: Tensor, z: Tensor) -> list[Tensor]:
    inputs = leaves(x, z)
    value = estimate(*inputs, critic)
    return [value.detach(), *torch.autograd.grad(value, [*inputs, *critic.parameters()])]


def check(estimate, definition, critic: nn.Module) -> None:
    torch.manual_seed(5)
    x, z = torch.randn(N, DX), torch.randn(N, DZ)
    ours = values_and_gradients(estimate, critic, x, z)
    truth = values_and_gradients(definition, critic.double(), x.double(), z.double())
    critic.float()
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "options", [{}, {"diagonal": "include"}, {"negatives": ck.shifts(1)}, {"negatives": ck.shifts(5)}], ids=str
)
@pytest.mark.parametrize("name", list(CRITICS))
def test_moments_equal_the_definition(name, options, backend):
    def ours(x: Tensor, z: Tensor, critic: nn.Module) -> Tensor:
        j, el = ck.critic_moments(x, z, critic, **options, backend=backend)
        return 0.3 * j + 1.9 * el

    def definition(x: Tensor, z: Tensor, critic: nn.Module) -> Tensor:
        j, el = eager_moments(x, z, critic, **options)
        return 0.3 * j + 1.9 * el

    check(ours, definition, CRITICS[name])


@pytest.mark.parametrize("name", ["relu", "gelu", "separable"])
@pytest.mark.parametrize("estimator", list(FORMULAS))
def test_estimators_equal_their_formulas(estimator, name):
    def ours(x: Tensor, z: Tensor, critic: nn.Module) -> Tensor:
        return ck.mutual_information(x, z, critic, estimator=estimator, **OPTIONS.get(estimator, {}))

    check(ours, lambda x, z, critic: FORMULAS[estimator](*eager_moments(x, z, critic)), CRITICS[name])


def test_tuba_at_e_is_nwj_and_bounds_order():
    j, el = torch.tensor(1.3), torch.tensor(0.4)
    dv, nwj = ck.bound(j, el, "dv"), ck.bound(j, el, "nwj")
    torch.testing.assert_close(ck.bound(j, el, "tuba"), nwj)
    assert nwj < dv  # log u <= u / e
    torch.testing.assert_close(ck.bound(j, torch.ones(()), "nwj"), ck.bound(j, torch.ones(()), "dv"))


@pytest.mark.parametrize("name", ["relu", "separable"])
@pytest.mark.parametrize("negatives", ["all", ck.shifts(4)], ids=str)
def test_mine_with_an_average_has_the_surrogates_gradient(negatives, name):
    ema = torch.tensor(0.8)
    definition_ema = math.exp(0.8)

    def ours(x: Tensor, z: Tensor, critic: nn.Module) -> Tensor:
        return ck.mutual_information(x, z, critic, negatives=negatives, ema=ema)

    def definition(x: Tensor, z: Tensor, critic: nn.Module) -> Tensor:
        j, el = eager_moments(x, z, critic, negatives)
        surrogate = j - el.exp() / definition_ema
        return (j - el).detach() + surrogate - surrogate.detach()

    check(ours, definition, CRITICS[name])


@each_isa
@pytest.mark.parametrize("name", list(CRITICS))
def test_moments_on_every_instruction_set(name, isa):
    critic = CRITICS[name]
    x, z = torch.randn(300, DX), torch.randn(300, DZ)
    with testing.instruction_set(isa):
        moments = ck.critic_moments(x, z, critic, backend="native")
    torch.testing.assert_close(moments, eager_moments(x, z, critic), rtol=1e-5, atol=2e-6)


def test_cmi_decompositions_are_differences_of_terms():
    torch.manual_seed(6)
    z, own, other = torch.randn(N, 3), torch.randn(N, 5), torch.randn(N, 4)
    joint, pair = ck.nn.ConcatCritic(5, 7, 8), ck.nn.ConcatCritic(5, 4, 8)
    own_z, other_z, both_z = ck.nn.ConcatCritic(5, 3, 8), ck.nn.ConcatCritic(4, 3, 8), ck.nn.ConcatCritic(9, 3, 8)
    mi, cmi = ck.mutual_information, ck.conditional_mutual_information
    second = mi(other, z, other_z)
    assert torch.equal(cmi(z, own, other, (own_z, other_z)), mi(own, z, own_z) - second)
    chain = cmi(z, own, other, (both_z, other_z), decomposition="chain")
    assert torch.equal(chain, mi(torch.cat([own, other], 1), z, both_z) - second)
    first = mi(own, torch.cat([z, other], 1), joint)
    assert torch.equal(cmi(z, own, other, (joint,), decomposition="joint"), first)
    assert torch.equal(cmi(z, own, other, (joint, pair), decomposition="joint"), first - mi(own, other, pair))
