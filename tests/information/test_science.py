"""What the estimators must say about Gaussians whose information is known, and about the product of marginals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import cibr_kernels as ck
from cibr_kernels.information.dot_moments import dot_moments
from cibr_kernels.primitives.additive.moments.op import additive_moments

N = 4096


class Map(nn.Module):
    """A function as a module."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, t: Tensor) -> Tensor:
        return self.f(t)


def column(t: Tensor) -> Tensor:
    return t.square().sum(1, keepdim=True)


def optimal(rho: float, d: int, z_scale: float = 1.0, start: int = 0) -> ck.nn.SeparableCritic:
    """T*(x, z) = log p(x, z) / p(x) p(z) of unit Gaussians with correlation rho per dimension, as <f(x), g(z)>.

    T* = -d/2 log(1 - rho^2) - [rho^2 (|x|^2 + |z|^2) - 2 rho x.z] / 2 (1 - rho^2); z comes divided by `z_scale`, and x
    is the d columns from `start`.
    """
    a, b = rho / (1 - rho**2), rho**2 / (2 * (1 - rho**2))
    constant = -d / 2 * math.log1p(-(rho**2))

    def f(x: Tensor) -> Tensor:
        x = x[:, start : start + d]
        return torch.cat([a * x, constant - b * column(x), torch.ones(len(x), 1)], 1)

    def g(z: Tensor) -> Tensor:
        z = z / z_scale
        return torch.cat([z, torch.ones(len(z), 1), -b * column(z)], 1)

    return ck.nn.SeparableCritic.from_maps(Map(f), Map(g))


def chain(d: int, r: float, sigma: float, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Z, own, other with z - own - other Markov: own ~ N(0, I), other = r own + noise, z = own + sigma noise."""
    own = torch.randn(n, d)
    return own + sigma * torch.randn(n, d), own, r * own + math.sqrt(1 - r * r) * torch.randn(n, d)


# ------------------------------------------------------------------------------------- known information
@pytest.mark.parametrize(
    ("rho", "per_dimension"), [(0.5, 0.143841), (0.75, 0.413339), (0.9, 0.830366), (0.99, 1.958518)]
)
@pytest.mark.parametrize("d", [1, 2])
def test_optimal_critic_of_correlated_gaussians(rho, per_dimension, d):
    x = torch.randn(N, d)
    z = rho * x + math.sqrt(1 - rho**2) * torch.randn(N, d)
    j, el = ck.critic_moments(x, z, optimal(rho, d))
    # var T* = d rho^2; L is a degenerate U-statistic with variance (e^(2 I') - 1) / n^2, e^(2 I') = (1 - rho^2)^-d
    assert abs(j.item() - d * per_dimension) < 5 * math.sqrt(d) * rho / math.sqrt(N)
    assert abs(el.item()) < 5 * math.sqrt((1 - rho**2) ** -d - 1) / N + 1e-3
    assert -0.5 * math.log1p(-(rho**2)) == pytest.approx(per_dimension, abs=1e-6)


@pytest.mark.parametrize(
    ("information", "rho"), [(2, 0.425757), (4, 0.574178), (6, 0.671706), (8, 0.742072), (10, 0.795060)]
)
def test_staircase_of_twenty_dimensions(information, rho):
    x = torch.randn(N, 20)
    z = rho * x + math.sqrt(1 - rho**2) * torch.randn(N, 20)
    j, el = ck.critic_moments(x, z, optimal(rho, 20))
    assert abs(j.item() - information) < 5 * math.sqrt(20) * rho / math.sqrt(N)
    if information <= 6:  # beyond log(0.3 n) = 7.1 nats no batch of this size can tell
        assert abs(el.item()) < 0.3


def test_more_negatives_make_the_log_mean_exp_steadier():
    d, rho, n = 20, 0.425757, 256  # I = 2: sd .303 with one shift, .094 with 16, .026 with all pairs
    spread = {}
    for negatives in (ck.shifts(1), ck.shifts(16), "all"):
        values = []
        for seed in range(40):
            torch.manual_seed(seed)
            x = torch.randn(n, d)
            z = rho * x + math.sqrt(1 - rho**2) * torch.randn(n, d)
            values.append(ck.critic_moments(x, z, optimal(rho, d), negatives=negatives)[1])
        spread[negatives] = torch.stack(values).std().item()
    one, some, every = spread.values()
    assert one > 2 * some > 4 * every
    assert every < 0.05


CHAINS = {  # (d, r, sigma): I(Z; Xv | Xt), I(Z; Xv), I(Z; Xt), I(Xv; Xt)
    (1, 0.8, 0.5): (0.445999, 0.804719, 0.358720, 0.510826),
    (5, 0.8, 1.0): (0.768712, 1.732868, 0.964156, 2.554128),
}


@pytest.mark.parametrize("case", list(CHAINS), ids=str)
@pytest.mark.parametrize("decomposition", ["markov", "chain"])
def test_conditional_information_of_the_chain(case, decomposition):
    d, r, sigma = case
    truth, with_own, with_other, _ = CHAINS[case]
    z, own, other = chain(d, r, sigma)
    spread = math.sqrt(1 + sigma**2)
    critics = optimal(1 / spread, d, spread), optimal(r / spread, d, spread)  # "chain" reads own of [own, other]
    estimate = ck.conditional_mutual_information(z, own, other, critics, decomposition=decomposition)
    assert ck.mutual_information(own, z, critics[0]).item() == pytest.approx(with_own, abs=0.15)
    assert ck.mutual_information(other, z, critics[1]).item() == pytest.approx(with_other, abs=0.15)
    assert estimate.item() == pytest.approx(truth, abs=0.12)  # own minus other: the other sign gives -truth


@pytest.mark.parametrize("case", list(CHAINS), ids=str)
def test_shuffling_own_alone_is_not_conditional(case):
    """One critic on (own; z, other) measures I(Z; own | other) + I(own; other)."""
    d, r, sigma = case
    truth, _, _, between = CHAINS[case]
    z, own, other = chain(d, r, sigma)
    precision = 1 + 1 / sigma**2 + r * r / (1 - r * r)  # of own given (z, other)

    def natural(t: Tensor) -> Tensor:  # precision times that mean
        return t[:, :d] / sigma**2 + t[:, d:] * r / (1 - r * r)

    def f(x: Tensor) -> Tensor:
        constant = d / 2 * math.log(precision)
        return torch.cat([x, constant - (precision - 1) / 2 * column(x), torch.ones(len(x), 1)], 1)

    def g(t: Tensor) -> Tensor:
        eta = natural(t)
        return torch.cat([eta, torch.ones(len(t), 1), -column(eta) / (2 * precision)], 1)

    joint = ck.nn.SeparableCritic.from_maps(Map(f), Map(g))
    cmi = ck.conditional_mutual_information
    unconditional = cmi(z, own, other, (joint,), decomposition="joint")
    conditional = cmi(z, own, other, (joint, optimal(r, d)), decomposition="joint")
    assert unconditional.item() == pytest.approx(truth + between, abs=0.15)
    assert conditional.item() == pytest.approx(truth, abs=0.12)


def test_upper_bound_is_tight_at_the_optimal_decoder():
    """At d = 5, r = .8, sigma = 1: q = p(z | other) gives the information, .768712; q centred at `other` gives 1."""
    _, own, other = chain(5, 0.8, 1.0, n=200_000)
    width = math.sqrt(1 + 1 - 0.8**2)  # of z given other

    def q(t: Tensor) -> tuple[Tensor, Tensor]:
        return 0.8 * t, torch.full_like(t, math.log(width))

    cmi = ck.conditional_mutual_information
    tight = cmi(own, own, other, q, estimator="ceb", noise_std=1.0)  # own is the mean of z
    loose = cmi(own, own, other, lambda t: t, estimator="ceb", noise_std=1.0)
    aligned = cmi(own, own, other, None, estimator="align", noise_std=1.0)
    assert tight.item() == pytest.approx(0.768712, abs=0.01)
    assert loose.item() == pytest.approx(1.0, abs=0.01)
    torch.testing.assert_close(aligned, loose)


def test_alignment_of_unit_vectors_is_one_minus_cosine():
    z, other = (nn.functional.normalize(torch.randn(50, 8), dim=1) for _ in range(2))
    value = ck.conditional_mutual_information(z, z, other, None, estimator="align", noise_std=0.3)
    assert value.item() == pytest.approx(((1 - (z * other).sum(1)) / 0.3**2).mean().item(), rel=1e-5)


# ------------------------------------------------------------------------------------- the product of marginals
@pytest.mark.parametrize("n", [2, 5, 8])
def test_shifts_have_no_fixed_points_and_no_repeats(n):
    """A pair with itself among the negatives adds e^2I / n."""
    seen: list[Tensor] = []

    class Witness(nn.Module):
        def paired(self, x: Tensor, z: Tensor) -> Tensor:
            seen.append(torch.stack([x[:, 0], z[:, 0]], 1))
            return x.sum(-1) * 0

    rows = torch.arange(n)[:, None].float()
    for k in range(1, n):
        seen.clear()
        ck.critic_moments(rows, rows, Witness(), negatives=ck.shifts(k))
        negatives = {tuple(p) for p in torch.cat(seen).tolist() if p[0] != p[1]}
        assert len(negatives) == k * n and sum((s[:, 0] == s[:, 1]).all().item() for s in seen) == 1


@pytest.mark.parametrize("n", [2, 3, 70])
@pytest.mark.parametrize("options", [{}, {"diagonal": "include"}, {"negatives": ck.shifts(1)}], ids=str)
def test_constant_critic_has_no_information(n, options):
    """Log of the number of pairs that were summed, n^2, n^2 - n or k n."""
    concat = ck.nn.ConcatCritic(2, 3, 5)
    nn.init.zeros_(concat.out.weight)
    nn.init.constant_(concat.out.bias, 2.5)
    separable = ck.nn.SeparableCritic.from_maps(Map(lambda t: t[:, :1] * 0 + 2.5), Map(lambda t: t[:, :1] * 0 + 1))
    for critic in (concat, separable):
        j, el = ck.critic_moments(torch.randn(n, 2), torch.randn(n, 3), critic, **options)
        assert (j.item(), el.item()) == pytest.approx((2.5, 2.5), abs=1e-6)


def test_including_the_diagonal_caps_the_estimate_at_log_n():
    """Scores of 100 on the positives say ln 64 with the diagonal and 100 without."""
    identity = ck.nn.SeparableCritic.from_maps(Map(lambda t: 100 * t), Map(lambda t: t))
    eye = torch.eye(64)
    assert ck.mutual_information(eye, eye, identity, diagonal="include").item() == pytest.approx(math.log(64), rel=1e-6)
    assert ck.mutual_information(eye, eye, identity).item() == pytest.approx(100, rel=1e-6)
    for seed in range(5):
        torch.manual_seed(seed)
        critic, x, z = ck.nn.ConcatCritic(4, 4, 32), 30 * torch.randn(64, 4), 30 * torch.randn(64, 4)
        assert ck.mutual_information(x, z, critic, diagonal="include").item() <= math.log(64)


@pytest.mark.parametrize("size", [1.0, 10.0, 80.0])
@pytest.mark.parametrize("include", [False, True])
def test_weights_of_the_pairs_sum_to_one(size, include):
    """Forward and backward must see the same scores, also where a few of them dominate."""
    f, g = size * torch.randn(300, 33) / 6, torch.randn(310, 33)
    g[:, 0], f[:, 0] = 1.0, 0.3  # dL/df_i0 = sum_j P_ij
    f.requires_grad_()
    dot_moments(f, g, first_positive=3, include_diagonal=include)[1].backward()
    assert abs(f.grad[:, 0].double().sum().item() - 1) < 1e-5
    a, b, w = torch.randn(300, 33), torch.randn(310, 33), size * torch.randn(33) / 6
    a[:, 0], b[:, 0] = 1.0, 0.0  # relu(a + b) = 1: dL/dw_0 = sum P
    w.requires_grad_()
    additive_moments(a, b, w, first_positive=3, include_diagonal=include)[1].backward()
    assert abs(w.grad[0].item() - 1) < 1e-5


def test_output_bias_of_an_uncorrected_estimate_has_no_gradient():
    critic = ck.nn.ConcatCritic(4, 4, 16)
    ck.mutual_information(torch.randn(50, 4), torch.randn(50, 4), critic).backward()
    assert abs(critic.out.bias.grad.item()) < 1e-6
