"""`python bench/ gradient`: the oracle is the gradient of a closed form, and the command says who missed."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import cli
from bench.experiments import gradient
from bench.experiments.gradient import PRIVATE, SIGMA, Z_DIM


@pytest.fixture
def source() -> gradient.Source:
    torch.manual_seed(0)
    return gradient.Source()


def test_the_oracle_is_the_slope_of_the_conditional_information(source):
    """Of 1/2 log det(I + Cov(Z | y) / s^2) where z moves by t D p: the mean of <oracle, D p> over rows."""
    d = torch.randn(Z_DIM, PRIVATE) / 10
    p = torch.linalg.qr(torch.randn(4096, PRIVATE))[0] * 64  # (n, 32) whose second moments are exactly I
    oracle = p @ source.b.T @ source.inverse

    def information(t: Tensor) -> Tensor:
        b = (source.b + t * d).double()
        return torch.logdet(torch.eye(Z_DIM, dtype=torch.float64) + b @ b.T / SIGMA**2) / 2

    t = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(information(t), t)
    assert (oracle * (p @ d.T)).sum(1).mean().item() == pytest.approx(slope.item(), rel=1e-3)


def test_views_share_what_they_are_conditioned_on(source):
    s = torch.randn(20_000, gradient.SHARED)
    first, second = source.view(s), source.view(s)
    assert torch.equal(first.y, second.y)
    apart = (first.z - second.z).square().sum(1).mean() / 2
    assert apart.item() == pytest.approx(source.b.square().sum().item(), rel=0.02)
    assert first.z.square().sum(1).mean().item() == pytest.approx(1, rel=0.05)


def test_the_cosine_is_of_the_mean_and_ignores_what_a_normalised_embedding_cannot_follow(source):
    batch = source.sample(400)
    noise = batch.oracle.std() * torch.randn(16, *batch.oracle.shape)
    mean, one = gradient.cosines([batch], [-2 * batch.oracle + 3 * batch.z + noise])
    assert mean == pytest.approx(-1, abs=0.02) and -0.95 < one < -0.8  # the noise's part is 1/5 of the square
    assert abs(gradient.cosines([batch], [torch.randn(16, *batch.oracle.shape) + torch.randn_like(batch.z)])[0]) < 0.05


def test_the_command_writes_every_estimator_and_says_who_missed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(gradient, "run", partial(gradient.run, checkpoints=(1, 2)))
    monkeypatch.setattr(gradient, "BATCH", 32)
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert cli.main(["gradient", "--quick", *files]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}" in printed for name in (*gradient.LEARNT, *gradient.VIEWS)) and printed.endswith("PASS\n")
    cells = json.loads((tmp_path / "a.json").read_text())["cells"]
    assert len(cells) == 2 * len(gradient.LEARNT) + len(gradient.VIEWS)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    worst = [
        gradient.Cell(name, 100, 0, value, value)
        for name, value in (("mine, one shuffle", 0.3), ("mine, all pairs", 0.2), ("ceb", 0.5))
    ]
    assert gradient.missed(worst, [100]) == ["after 100 steps mine, all pairs is not above mine, one shuffle"]
