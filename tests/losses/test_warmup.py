"""warmup refuses in words; what it compiles is in gpu_without_gpu/test_plans.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cibr_kernels as ck


@pytest.mark.parametrize(
    ("losses", "error", "words"),
    [
        (("cibr_loss",), ValueError, "losses is 'cibr_loss'; known are 'clip_loss', 'siglip_loss'"),
        ((torch.nn.Linear(4, 4),), TypeError, r"\['clip_loss', 'siglip_loss'\] or an nn.CIBRLoss, got Linear"),
    ],
)
def test_what_is_no_loss_is_refused(losses: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ck.warmup(64, 16, losses=losses, device="cpu")


def test_on_the_cpu_there_is_nothing_to_compile() -> None:
    assert ck.warmup(64, 16, losses=("clip_loss", ck.nn.CIBRLoss(16, 4, 4, hidden=8)), device="cpu") == 0


@pytest.mark.parametrize("estimator", ["mine", "ceb", "variance", "align"])
def test_zeros_are_a_call(estimator: str) -> None:
    module = ck.nn.CIBRLoss(16, 4, 6, image_condition_dim=5, hidden=8, estimator=estimator)
    given = module.zeros(8, 16, torch.float32, torch.device("cpu"))
    given["image_features"].requires_grad_()
    module(**given, logit_scale=1.0).backward()
    assert given["image_features"].grad is not None


def test_of_another_width_they_are_refused_in_words() -> None:
    module = ck.nn.CIBRLoss(16, 4, 6, hidden=8)
    with pytest.raises(ValueError, match="16"):
        module(**module.zeros(8, 32, torch.float32, torch.device("cpu")), logit_scale=1.0)
