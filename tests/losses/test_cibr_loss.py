"""cibr_loss: one backward gives each player its own gradient, checked in float64 against separate autograd passes."""

from __future__ import annotations

import math

import pytest
import torch
from cases import leaves, towers
from torch import Tensor

import cibr_kernels as ck
from cibr_kernels.losses.penalty import TERMS, noisy

N, D, DV, DT = 24, 5, 7, 6
WIDTHS = {"image_own": DV, "image_other": DT, "text_own": DT, "text_other": DV}


@pytest.fixture
def problem() -> dict:
    torch.manual_seed(9)
    x, y, scale = leaves(*towers(N, N, D), torch.tensor(6.0), dtype=torch.float64)
    return {
        "features": (x, y, scale),
        "image_inputs": torch.randn(N, DV, dtype=torch.float64),
        "text_inputs": torch.randn(N, DT, dtype=torch.float64),
        "critics": {k: ck.nn.ConcatCritic(w, D, 12, activation="tanh").double() for k, w in WIDTHS.items()},
    }


def loss_of(problem: dict, *features: Tensor, **options):
    inputs = {k: v for k, v in problem.items() if k != "features"}
    options = {"noise_std": 0.3, **options}
    generator = torch.Generator().manual_seed(11)
    return ck.cibr_loss(*(features or problem["features"]), **inputs, generator=generator, **options)


def estimates(problem: dict, noise_std: float = 0.3) -> dict[str, Tensor]:
    """The four Donsker-Varadhan estimates, with the gradients that they have by themselves."""
    generator = torch.Generator().manual_seed(11)
    z = {k: noisy(t, noise_std, generator) for k, t in zip(("image", "text"), problem["features"], strict=False)}
    values = {}
    for name, critic in problem["critics"].items():
        own_image = name in ("image_own", "text_other")
        scores = critic.pairwise(problem["image_inputs" if own_image else "text_inputs"], z[name.split("_")[0]])
        negatives = scores[~torch.eye(N, dtype=torch.bool)]
        values[name] = scores.diagonal().mean() - negatives.logsumexp(0) + math.log(N * N - N)
    return values


def penalty(values: dict[str, Tensor]) -> Tensor:
    """I(Zv; Xv) - I(Zv; Xt) + I(Zt; Xt) - I(Zt; Xv): own minus other, not the other way round."""
    return values["image_own"] - values["image_other"] + values["text_own"] - values["text_other"]


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0, torch.tensor(0.7, dtype=torch.float64)], ids=str)
def test_value_is_clip_plus_lam_times_the_penalty(problem, lam):
    loss, parts = loss_of(problem, lam=lam, return_parts=True)
    values = estimates(problem)
    clip = ck.clip_loss(*problem["features"])
    torch.testing.assert_close(loss, clip + lam * penalty(values))
    torch.testing.assert_close(parts["contrastive_loss"], clip)
    torch.testing.assert_close(parts["image_cmi"], values["image_own"] - values["image_other"])
    torch.testing.assert_close(parts["text_cmi"], values["text_own"] - values["text_other"])
    assert not any(p.requires_grad for p in parts.values())
    assert set(parts) == {"contrastive_loss", "image_cmi", "text_cmi", *TERMS}


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0, torch.tensor(0.7, dtype=torch.float64)], ids=str)
def test_critics_maximise_their_own_estimate_whatever_lam_is(problem, lam):
    loss_of(problem, lam=lam).backward()
    values = estimates(problem)
    for name, critic in problem["critics"].items():
        own = torch.autograd.grad(values[name], list(critic.parameters()), retain_graph=True)
        for p, g in zip(critic.parameters(), own, strict=True):
            torch.testing.assert_close(p.grad, -g)


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0])
def test_encoders_minimise_the_returned_value(problem, lam):
    features = problem["features"]
    grads = torch.autograd.grad(loss_of(problem, lam=lam), features)
    truth = torch.autograd.grad(ck.clip_loss(*features) + lam * penalty(estimates(problem)), features)
    for g, t in zip(grads, truth, strict=True):
        torch.testing.assert_close(g, t)


def test_encoder_gradient_is_the_slope_of_the_value(problem):
    features = problem["features"]
    grads = torch.autograd.grad(loss_of(problem), features)
    directions = [torch.randn_like(t) for t in features]
    h = 1e-6
    moved = [[t.detach() + s * h * v for t, v in zip(features, directions, strict=True)] for s in (1, -1)]
    ends = [loss_of(problem, *inputs) for inputs in moved]
    slope = sum((g * v).sum() for g, v in zip(grads, directions, strict=True))
    assert ((ends[0] - ends[1]) / (2 * h)).item() == pytest.approx(slope.item(), rel=1e-6)


def test_inputs_are_data(problem):
    inputs = problem["image_inputs"].requires_grad_(), problem["text_inputs"].requires_grad_()
    loss_of(problem).backward()
    assert inputs[0].grad is None and inputs[1].grad is None
    assert problem["features"][0].grad is not None


def test_critics_see_noise_on_features_scaled_by_sqrt_d():
    z = torch.nn.functional.normalize(torch.randn(2000, 64), dim=1)
    torch.testing.assert_close(noisy(z, 0.0), z * 8)
    assert noisy(z, 0.0).square().mean().item() == pytest.approx(1, rel=1e-4)  # entries of order one
    residual = noisy(z, 0.25) / 8 - z
    assert residual.std().item() == pytest.approx(0.25, rel=0.02) and abs(residual.mean().item()) < 0.005
    assert noisy(z.bfloat16(), 0.1).dtype == torch.float32


def test_each_modality_draws_its_own_noise_from_the_generator(problem):
    x = problem["features"][0]
    same = dict.fromkeys(TERMS, problem["critics"]["image_own"])
    problem |= {"features": (x, x, problem["features"][2]), "critics": same, "text_inputs": problem["image_inputs"]}
    parts = loss_of(problem, return_parts=True)[1]
    assert parts["image_own"] != parts["text_own"]
    torch.testing.assert_close(parts, loss_of(problem, return_parts=True)[1], rtol=0, atol=0)
    torch.manual_seed(1)
    first = ck.cibr_loss(*problem["features"], **{k: v for k, v in problem.items() if k != "features"})
    torch.manual_seed(1)
    again = ck.cibr_loss(*problem["features"], **{k: v for k, v in problem.items() if k != "features"})
    assert torch.equal(first, again)


@pytest.mark.parametrize("estimator", ["dv", "nwj", "tuba", "remine"])
@pytest.mark.parametrize("one_way", [False, True])
@pytest.mark.parametrize("options", [{}, {"negatives": ck.shifts(3)}, {"diagonal": "include"}], ids=str)
def test_parts_are_those_of_mutual_information(problem, estimator, options, one_way):
    options = {"estimator": estimator, **options}
    loss, parts = loss_of(problem, noise_std=0.0, return_parts=True, one_way=one_way, **options)
    z = noisy(problem["features"][0], 0.0)
    own = ck.mutual_information(problem["image_inputs"], z, problem["critics"]["image_own"], **options)
    torch.testing.assert_close(parts["image_own"], own.detach())
    torch.testing.assert_close(
        loss, ck.clip_loss(*problem["features"], one_way=one_way) + 0.5 * (parts["image_cmi"] + parts["text_cmi"])
    )


@pytest.mark.parametrize("kind", ["tensor", "module"])
def test_moving_average_corrects_every_critics_gradient(problem, kind):
    log_ema = torch.tensor(0.4, dtype=torch.float64)
    ema = dict.fromkeys(TERMS, log_ema if kind == "tensor" else lambda el: log_ema)
    loss = loss_of(problem, ema=ema)
    torch.testing.assert_close(loss, loss_of(problem))
    loss.backward()
    critic, z = problem["critics"]["image_own"], noisy(problem["features"][0], 0.3, torch.Generator().manual_seed(11))
    _, el = ck.critic_moments(problem["image_inputs"], z, critic)
    # the gradients of -I over all scores sum to kappa - 1
    assert critic.out.bias.grad.item() == pytest.approx(math.exp(el.item() - 0.4) - 1, rel=1e-9)
