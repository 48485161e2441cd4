"""Probes, shares of variance, neighbours and CKA where their values are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cibr.errors import UsageError
from cibr.evaluate.probes import cka, linear_probe, mutual_knn, same_style_neighbours, within_class_share


def clusters(n: int, classes: int, spread: float, d: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(1))
    return centres[labels] + spread * torch.randn(n, d), labels


def test_a_probe_reads_what_is_there_and_only_that() -> None:
    x, labels = clusters(200, 4, 0.1)
    z, _ = clusters(100, 4, 0.1)
    found = linear_probe(x, labels, z, labels[:100])
    assert found["accuracy"] == 100 and found["majority"] == 25
    assert linear_probe(torch.randn(200, 8), labels, torch.randn(100, 8), labels[:100])["accuracy"] < 45


def test_noise_hides_what_is_small() -> None:
    x, labels = clusters(400, 4, 0.02)
    small = [0.05 * f for f in (x, clusters(200, 4, 0.02)[0])]
    clean = linear_probe(small[0], labels, small[1], labels[:200])["accuracy"]
    noisy = linear_probe(small[0], labels, small[1], labels[:200], noise_std=0.5)["accuracy"]
    assert clean == 100 and noisy < 60  # standardised columns: only the noisy probe sees the shrinkage


def test_share_of_variance_in_closed_form() -> None:
    x, labels = clusters(2000, 5, 1.0, d=3)
    centres = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    between = (centres - centres.mean(0)).square().sum() / 5
    assert within_class_share(x, labels) == pytest.approx(3 / (3 + between).item(), rel=0.05)
    assert within_class_share(torch.randn(2000, 3), labels) == pytest.approx(1, abs=0.01)
    assert within_class_share(centres[labels].float(), labels) == pytest.approx(0, abs=1e-12)


def test_neighbours_of_one_style() -> None:
    labels, styles = torch.arange(60) // 2, torch.arange(60) % 2
    by_style = F.normalize(torch.eye(2)[styles].repeat(1, 4) + 0.01 * torch.randn(60, 8), dim=1)
    found = same_style_neighbours(by_style, labels, styles, k=5)
    assert found["same_style"] == 100 and found["chance"] == pytest.approx(50)
    assert same_style_neighbours(F.normalize(torch.randn(60, 8), dim=1), labels, styles, k=5)["same_style"] < 65


def test_cka_is_one_for_a_rotation_and_zero_debiased_for_strangers() -> None:
    x = torch.randn(64, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    same = cka(x, 3 * x @ rotation + 5)
    assert same["biased"] == pytest.approx(1, abs=1e-5) and same["debiased"] == pytest.approx(1, abs=1e-5)
    strangers = [cka(torch.randn(64, 512), torch.randn(64, 512)) for _ in range(10)]
    assert sum(s["biased"] for s in strangers) / 10 == pytest.approx(0.885, abs=0.01)
    assert sum(s["debiased"] for s in strangers) / 10 == pytest.approx(0, abs=0.02)


def test_mutual_neighbours() -> None:
    x = torch.randn(200, 16)
    assert mutual_knn(x, 2 * x) == 100
    assert mutual_knn(x, torch.randn(200, 16)) == pytest.approx(100 * 10 / 199, abs=2)


def test_what_has_no_answer_is_refused() -> None:
    x = torch.randn(8, 4)
    nan = x.clone()
    nan[0, 0] = float("nan")
    with pytest.raises(UsageError, match="training features are NaN or infinite in 1 of 8"):
        linear_probe(nan, torch.arange(8) % 2, x, torch.arange(8) % 2)
    with pytest.raises(UsageError, match="five rows of two classes to train on, got 8 of 1"):
        linear_probe(x, torch.zeros(8, dtype=torch.long), x, torch.arange(8) % 2)
    with pytest.raises(UsageError, match="a class of its own"):
        within_class_share(x, torch.arange(8))
    with pytest.raises(UsageError, match="no variance to share"):
        within_class_share(torch.ones(8, 4), torch.arange(8) % 2)
    with pytest.raises(UsageError, match="fewer than the 5 asked for"):
        same_style_neighbours(x, torch.arange(8) // 4, torch.arange(8) % 2, k=5)
    with pytest.raises(UsageError, match="at least four"):
        cka(x[:3], x[:3])
    with pytest.raises(UsageError, match="second features are NaN"):
        cka(x, nan)
    with pytest.raises(UsageError, match="the same in all rows"):
        cka(x, torch.ones(8, 2))
    with pytest.raises(UsageError, match="k = 8"):
        mutual_knn(x, x, k=8)
