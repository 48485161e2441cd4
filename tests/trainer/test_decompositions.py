"""How cibr takes a conditional information apart, and where its noise enters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CIBR, config
from torch import Tensor, nn
from torch.nn import functional as F

import cibr_kernels as ck
from cibr.models import Features, Output
from cibr.objectives import build
from cibr.objectives.cibr import Cibr

N, DV, DT, D = 24, 5, 4, 3
LAMS = torch.tensor(0.4), torch.tensor(0.1)


class Widths(nn.Module):
    """What an objective wants to know of a model."""

    image_width, text_width, embed_dim, objective = DV, DT, D, None


def objective(**options: Any) -> Cibr:
    torch.manual_seed(0)
    made = build(config(Path("run"), **{**CIBR, **options}).objective, Widths())  # type: ignore[arg-type]
    assert isinstance(made, Cibr)
    return made


def output() -> Output:
    generator = torch.Generator().manual_seed(1)
    draw = lambda width: torch.randn(N, width, generator=generator)  # noqa: E731
    towers = [Features(draw(w), F.normalize(draw(D), dim=1).requires_grad_()) for w in (DV, DT)]
    return Output(*towers, torch.tensor(10.0), None)


@pytest.mark.parametrize("decomposition", ["markov", "chain", "joint"])
def test_values_and_both_players_gradients(decomposition: str) -> None:
    """Encoders descend on lam times the difference that the library computes, critics ascend on their own terms."""
    ours, given = objective(decomposition=decomposition), output()
    z = [given.image.embedding, given.text.embedding]
    torch.manual_seed(2)
    surrogate, parts = ours.penalty(given, *LAMS)
    found = torch.autograd.grad(surrogate, [*z, *ours.critics.parameters()])

    torch.manual_seed(2)
    noisy = [(t + 0.25 * torch.randn(N, D)) * D**0.5 for t in z]
    x = [ours.standardize_image.eval()(given.image.inputs), ours.standardize_text.eval()(given.text.inputs)]
    values, encoders = [], torch.zeros(())
    for k, (side, lam) in enumerate(zip(("image", "text"), LAMS, strict=True)):
        critics = ours.critics[f"{side}_own"], ours.critics[f"{side}_other"]
        value = ck.conditional_mutual_information(
            noisy[k], x[k], x[1 - k], critics, decomposition=decomposition, estimator="mine"
        )
        values.append(value)
        encoders = encoders + lam * value
        torch.testing.assert_close(parts[f"{side}_cmi"], value.detach())
    assert parts["image_own"] - parts["image_other"] == parts["image_cmi"]
    expected = torch.autograd.grad(encoders, z, retain_graph=True)
    for one, other in zip(found, expected, strict=False):
        torch.testing.assert_close(one, other)
    for side, value in zip(("image", "text"), values, strict=True):
        for term, sign in (("own", -1.0), ("other", 1.0)):  # the difference rises with the first, falls with the second
            weights = list(ours.critics[f"{side}_{term}"].parameters())
            upward = torch.autograd.grad(sign * value, weights, retain_graph=True)
            mine = torch.autograd.grad(ours_again(ours, given), weights)
            for one, other in zip(mine, upward, strict=True):
                torch.testing.assert_close(one, other)


def ours_again(ours: Cibr, given: Output) -> Tensor:
    torch.manual_seed(2)
    return ours.penalty(given, *LAMS)[0]


def test_noise_enters_the_penalty_or_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training alone: what a run is measured by has no noise."""
    seen: list[Tensor] = []
    for enters in ("penalty", "both"):
        ours, given = objective(noise_enters=enters, noise_std=0.5), output()
        forward = ours.contrastive.forward
        monkeypatch.setattr(
            ours.contrastive, "forward", lambda o, b, f=forward: (seen.append(o.image.embedding), f(o, b))[1]
        )
        for training in (True, False):
            torch.manual_seed(3)
            ours.train(training)(given, {})
    clean = output().image.embedding
    torch.manual_seed(3)
    noisy = F.normalize(clean + 0.5 * torch.randn(N, D), dim=1)
    for found, expected in zip(seen, (clean, clean, noisy, clean), strict=True):
        torch.testing.assert_close(found, expected)
