"""The objective `aib`: its closed forms, temperatures, and a run."""

from __future__ import annotations

import pytest
import torch
from runs import config, log_of, state
from torch.nn import functional as F

import cibr_kernels as ck
from cibr import objectives
from cibr.models import Features, Output
from cibr.objectives.alignment_ib import AlignmentBottleneck, AlignmentOptions, gaussian_kl
from cibr.train import train

pytestmark = pytest.mark.filterwarnings("ignore:cibr_kernels")


class Shape:
    """What an objective asks of a model."""

    objective = None
    image_width, text_width, embed_dim = 7, 5, 6


def output(n: int = 12) -> Output:
    torch.manual_seed(0)
    rows = [torch.randn(n, width) for width in (7, 6, 5, 6)]
    zv, zt = (F.normalize(rows[i], dim=1).requires_grad_() for i in (1, 3))
    return Output(Features(rows[0], zv), Features(rows[2], zt), torch.tensor(10.0, requires_grad=True), None)


def make(**options) -> AlignmentBottleneck:
    made = objectives.build(AlignmentOptions(**options), Shape())  # type: ignore[arg-type]
    assert isinstance(made, AlignmentBottleneck)
    return made


def test_kl_is_that_of_torch():
    a, s, b, t = torch.randn(4, 9, 3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(a, s.exp()), normal(b, t.exp())).sum(1)
    torch.testing.assert_close(gaussian_kl(a, s, b, t), expected)


@pytest.mark.parametrize("direction", ["symmetric", "image_to_text"])
def test_cosine(direction):
    out = output()
    found = make(beta=0.3, direction=direction)(out, {})
    zv, zt = out.image.embedding, out.text.embedding
    logits, labels = 10 * zv @ zt.T, torch.arange(12)
    ways = [F.cross_entropy(logits, labels), F.cross_entropy(logits.T, labels)]
    info = ways[0] if direction == "image_to_text" else sum(ways) / 2
    torch.testing.assert_close(found["loss"], info + 0.3 * (1 - F.cosine_similarity(zv, zt).mean()))
    torch.testing.assert_close(found["tau"], torch.tensor(0.1))


def test_fixed_is_cosine_over_the_variance_and_a_bound_in_nats():
    out = output()
    objective = make(bottleneck="fixed", noise_std=0.2, beta=1.0).eval()
    found = objective(out, {})
    z, other = out.image.embedding, out.text.embedding
    cosine = 1 - F.cosine_similarity(z, other).mean()
    torch.testing.assert_close(found["bottleneck"], cosine.detach() / 0.04)
    library = ck.conditional_mutual_information(z, out.image.inputs, other, None, estimator="align", noise_std=0.2)
    torch.testing.assert_close(found["bottleneck"], library.detach())


def test_noise_is_seen_by_infonce_in_training_alone():
    out, objective = output(), make(bottleneck="fixed", noise_std=0.5, beta=0.0)
    clean = make(beta=0.0)(out, {})["loss"]
    assert objective(out, {})["loss"] != clean
    torch.testing.assert_close(objective.eval()(out, {})["loss"], clean)


def test_learned_variances_start_as_fixed_and_have_gradients():
    out, objective = output(), make(bottleneck="learned", noise_std=0.2, beta=1.0)
    found = objective(out, {})
    torch.testing.assert_close(found["bottleneck"], make(bottleneck="fixed", noise_std=0.2)(out, {})["bottleneck"])
    torch.testing.assert_close(found["image_std"], torch.tensor(0.2))
    found["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())


def test_raw_tau_is_learnt_as_it_is():
    out, objective = output(), make(tau="raw", beta=0.0)
    found = objective(out, {})
    found["loss"].backward()
    assert found["tau"].item() == pytest.approx(0.07) and out.logit_scale.grad is None
    zv, zt = out.image.embedding.detach(), out.text.embedding.detach()
    step = 1e-3

    def loss(tau: float) -> float:
        return ck.clip_loss(zv, zt, 1 / tau).item()

    slope = (loss(0.07 + step) - loss(0.07 - step)) / (2 * step)
    assert objective.tau.grad.item() == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("options", [{}, {"bottleneck": "learned", "tau": "raw", "direction": "image_to_text"}])
def test_a_run(tmp_path, options):
    train(config(tmp_path / "run", objective="aib", beta=2.0, log_every=1, lr=1e-2, steps=12, **options))
    entries = log_of(tmp_path / "run")
    assert entries[-1]["bottleneck"] < entries[0]["bottleneck"]
    assert ("objective.tau" in state(tmp_path / "run")) == (options.get("tau") == "raw")
