"""CLUB and its model of Z given X; what every estimator says of Gaussians whose information is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from estimators import DX, DZ, check, data
from torch import Tensor, nn

import cibr_kernels as ck
from cibr_kernels.information.estimators import gaussian_log_likelihood


# ------------------------------------------------------------------------------------- club
class Gaussian(nn.Module):
    """mean and log_std, each linear in x."""

    def __init__(self, spread: bool) -> None:
        super().__init__()
        self.mean = nn.Linear(DX, DZ)
        self.log_std = nn.Linear(DX, DZ) if spread else None

    def forward(self, x: Tensor) -> Any:
        return self.mean(x) if self.log_std is None else (self.mean(x), 0.3 * self.log_std(x))


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("diagonal", ["exclude", "include"])
@pytest.mark.parametrize("spread", [False, True])
def test_club_in_closed_form_is_the_mean_over_all_pairs(spread, diagonal, queued):
    torch.manual_seed(4)
    x, z, queue = data()
    z, queue = z + 3, queue - 2  # means that differ, and are not 0

    def log_q(q: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        out = q(x)
        mean, log_std = out if isinstance(out, tuple) else (out, torch.zeros_like(out))
        normal = torch.distributions.Normal(mean[:, None], log_std.exp()[:, None])
        return normal.log_prob(z[None]).sum(-1)  # (n, m)

    def truth(q: nn.Module, *inputs: Tensor) -> Tensor:
        scores = log_q(q, inputs[0], torch.cat(inputs[1:]))
        off = scores[~torch.eye(*scores.shape, dtype=torch.bool)]
        return scores.diagonal().mean() - (scores if diagonal == "include" else off).mean()

    def ours(q: nn.Module, x: Tensor, z: Tensor, *queue: Tensor) -> Tensor:
        more = {"marginals": queue[0]} if queue else {}
        return ck.mutual_information(x, z, q, estimator="club", diagonal=diagonal, **more)

    q, inputs = Gaussian(spread), (x, z, queue)[: 2 + queued]
    check(ours, truth, q, inputs, vectors=1.0)

    q.double()
    likelihood = gaussian_log_likelihood(x.double(), z.double(), q)
    torch.testing.assert_close(likelihood, log_q(q, x.double(), z.double()).diagonal().mean())


def test_bad_features_of_club_are_nan():
    x, z, queue = data()
    q = Gaussian(True)
    for value in (math.nan, math.inf):
        for k in range(3):
            inputs = [x.clone(), z.clone(), queue.clone()]
            inputs[k][3, 1] = value
            assert ck.mutual_information(inputs[0], inputs[1], q, estimator="club", marginals=inputs[2]).isnan()


# ------------------------------------------------------------------------------------- Gaussians
RHO, D = 0.574178, 20  # I = 4 nats


def gaussians(n: int, rho: float, d: int) -> tuple[Tensor, Tensor, float]:
    x = torch.randn(n, d)
    return x, rho * x + math.sqrt(1 - rho**2) * torch.randn(n, d), -d / 2 * math.log1p(-(rho**2))


def optimal(rho: float, d: int):
    """T* = log p(x, z) / p(x) p(z) as a function of matching rows."""

    def critic(x: Tensor, z: Tensor) -> Tensor:
        quadratic = rho**2 * (x.square().sum(1) + z.square().sum(1)) - 2 * rho * (x * z).sum(1)
        return -d / 2 * math.log1p(-(rho**2)) - quadratic / (2 * (1 - rho**2))

    return critic


@pytest.mark.parametrize(("rho", "d"), [(0.75, 1), (0.5, 5), (0.425757, 20)])
def test_the_optimal_critic_gives_the_information(rho, d):
    torch.manual_seed(0)
    n = 1500
    x, z, truth = gaussians(n, rho, d)
    critic = optimal(rho, d)
    spread = math.sqrt(d) * rho / math.sqrt(n)  # of J
    wild = math.sqrt((1 - rho**2) ** -d - 1) / n  # of L, all pairs
    for estimator in ("mine", "dv", "nwj", "tuba", "remine"):
        best = (lambda p, q: critic(p, q) + 1) if estimator == "nwj" else critic
        more = {"a": 1.0} if estimator == "tuba" else {}
        value = ck.mutual_information(x, z, best, estimator=estimator, **more).item()
        assert value == pytest.approx(truth, abs=5 * (spread + wild) + 0.01), estimator
    # the clamp at 5 takes e^T > 148 off, at most P(T > 5 | positives) of the mean of e^T = 1
    smile = ck.mutual_information(x, z, critic, estimator="smile").item()
    assert smile == pytest.approx(truth, abs=5 * (spread + wild) + 0.12)
    infonce = ck.mutual_information(x, z, critic, estimator="infonce").item()
    assert infonce == pytest.approx(truth, abs=5 * spread + 0.05) and infonce < math.log(n)  # I << log n = 7.3

    def decoder(t: Tensor) -> tuple[Tensor, Tensor]:
        return rho * t, torch.full_like(t, math.log(1 - rho**2) / 2)

    club = ck.mutual_information(x, z, decoder, estimator="club").item()  # I + KL(p(x) p(z) || p(x, z)) >= I
    reverse = d * rho**2 / (1 - rho**2)
    assert club == pytest.approx(reverse, rel=0.15) and club > truth


def test_js_at_the_optimal_critic_is_the_divergence():
    """2 JSD - log 4 >= -log 4, reached by T = 0 where x and z are independent."""
    torch.manual_seed(1)
    x, z, _ = gaussians(1500, 0.75, 1)
    critic = optimal(0.75, 1)
    value = ck.mutual_information(x, z, critic, estimator="js").item()
    for factor in (0.5, 0.8, 1.25, 2.0):  # T* is where the gradient vanishes
        other = ck.mutual_information(x, z, lambda p, q, f=factor: f * critic(p, q), estimator="js").item()
        assert other < value
    assert -math.log(4) < value < 0
    independent = ck.mutual_information(x, z, lambda p, q: 0 * p[:, 0], estimator="js").item()
    assert independent == pytest.approx(-math.log(4))


@pytest.mark.parametrize("estimator", ["js", "smile", "infonce"])
@pytest.mark.parametrize("kind", ["concat", "separable"])
def test_training_finds_the_information_of_gaussians(kind, estimator):
    """0.83 nats; js-trained critics are read with the value of smile."""
    torch.manual_seed(0)
    rho = 0.9
    critic = ck.nn.ConcatCritic(1, 1, 32) if kind == "concat" else ck.nn.SeparableCritic(1, 1, 64, 16)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(150):
        x, z, _ = gaussians(128, rho, 1)
        loss = -ck.mutual_information(x, z, critic, estimator=estimator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, z, truth = gaussians(2000, rho, 1)
    with torch.no_grad():
        read = "infonce" if estimator == "infonce" else "smile"
        assert ck.mutual_information(x, z, critic, estimator=read).item() == pytest.approx(truth, abs=0.15)


def test_maximising_the_likelihood_makes_club_an_upper_bound():
    torch.manual_seed(0)
    rho = 0.5
    mean, log_std = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))

    def q(t: Tensor) -> tuple[Tensor, Tensor]:
        m = mean(t)
        return m, log_std.expand_as(m)

    optimizer = torch.optim.Adam([*mean.parameters(), log_std], 2e-2)
    for _ in range(200):
        x, z, _ = gaussians(512, rho, 2)
        loss = -gaussian_log_likelihood(x, z, q)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, z, truth = gaussians(20_000, rho, 2)
    entropy = 2 * 0.5 * math.log(2 * math.pi * math.e * (1 - rho**2))
    assert gaussian_log_likelihood(x, z, q).item() == pytest.approx(-entropy, abs=0.03)
    club = ck.mutual_information(x, z, q, estimator="club").item()
    assert club == pytest.approx(2 * rho**2 / (1 - rho**2), abs=0.06) and club > truth
