"""The penalty on the closed-form toy (`python bench/ toy`): it removes redundancy, and only in the right direction."""

import json
import math
from functools import partial

import pytest
import torch

from bench import cli
from bench.experiments import frame, toy


def test_closed_form_of_an_encoder_that_keeps_only_shared_factors():
    q = torch.linalg.qr(torch.randn(toy.X_DIM, toy.X_DIM, dtype=torch.float64))[0]
    weight = torch.zeros(toy.Z_DIM, toy.X_DIM, dtype=torch.float64)
    weight[: toy.SHARED] = 3 * q[:, : toy.SHARED].T
    cmi, shared = toy.closed_form(weight, q)
    assert cmi == pytest.approx(toy.OPTIMUM, rel=1e-12) and abs(toy.OPTIMUM - 0.3629) < 5e-5
    total = toy.SHARED / 2 * math.log1p(1 / (toy.SHARED * toy.SIGMA**2))
    assert cmi + shared == pytest.approx(total, rel=1e-12)


def test_closed_form_is_the_block_determinant_formula():
    torch.manual_seed(3)
    views = toy.Views()
    weight = torch.randn(toy.Z_DIM, toy.X_DIM)
    a, q_v, q_t = (weight / weight.norm()).double(), views.q_v.double(), views.q_t.double()
    n, s = toy.X_DIM, toy.SHARED
    middle = torch.zeros(n, n, dtype=torch.float64)
    middle[:s, :s] = toy.RHO * torch.eye(s, dtype=torch.float64)
    cross = q_v @ middle @ q_t.T  # Cov(x_v, x_t)
    eye = torch.eye(n, dtype=torch.float64)
    z = a @ a.T + toy.SIGMA**2 * torch.eye(toy.Z_DIM, dtype=torch.float64)
    joint = torch.cat([torch.cat([z, a @ cross], 1), torch.cat([cross.T @ a.T, eye], 1)])
    assert toy.closed_form(weight, views.q_v)[1] == pytest.approx(
        (torch.logdet(z) - torch.logdet(joint)).item() / 2, rel=1e-5
    )


def test_views_have_the_stated_covariance():
    torch.manual_seed(0)
    views = toy.Views()
    x_v, x_t = views.sample(200_000)
    s, t = x_v @ views.q_v, x_t @ views.q_t
    assert torch.cov(x_v.T).sub(torch.eye(toy.X_DIM)).abs().max() < 0.02
    expected = torch.tensor([toy.RHO] * toy.SHARED + [0.0] * toy.PRIVATE).diag()
    assert (s.T @ t / len(s)).sub(expected).abs().max() < 0.02


def test_penalty_lowers_redundancy_and_a_reversed_one_does_not():
    plain, penalised = toy.train("none", 0, steps=500), toy.train("all pairs", 0, steps=500)
    reversed_sign = toy.train("all pairs", 0, steps=500, lam=-toy.LAM)
    assert penalised.cmi < plain.cmi - 0.1 < reversed_sign.cmi - 0.1
    assert penalised.shared > plain.shared - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", frame.SEEDS)
@pytest.mark.parametrize("variant", ["none", "all pairs"])
def test_only_all_pairs_reach_the_optimum(variant, seed):
    outcome = toy.train(variant, seed, steps=1600)  # where both variants are clear of their limits
    assert toy.accepted(outcome), outcome


def test_the_command_runs_every_variant_and_says_who_missed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "run", partial(toy.run, steps=2))
    assert cli.main(["toy", "--quick", "--json", str(tmp_path / "toy.json")]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(toy.STARTS) * len(toy.VARIANTS)
    assert [line.split()[0] for line in printed[2:]] == [start for start in toy.STARTS for _ in toy.VARIANTS]
    assert sum("FAIL <= 0.43, shared > 1.65" in line for line in printed) == 1
    assert len(json.loads((tmp_path / "toy.json").read_text())["runs"]) == len(printed) - 2
