"""The modules: critics, running statistics, MINE's moving average, and the CIBR objective over training steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cibr_kernels as ck
from cibr_kernels.losses.penalty import TERMS
from cibr_kernels.primitives.additive.activations import ACTIVATIONS

N, D, DV, DT = 32, 8, 6, 5


class Identity(nn.Module):
    """x times `factor`."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, t: Tensor) -> Tensor:
        return self.factor * t


def batch(seed: int = 0) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(N, D, generator=g)
    z = [F.normalize(shared + 0.5 * torch.randn(N, D, generator=g), dim=1) for _ in range(2)]
    return z[0], z[1], 10.0, torch.randn(N, DV, generator=g) * 3 + 1, torch.randn(N, DT, generator=g) - 2


def objective(**options: Any) -> ck.nn.CIBRLoss:
    return ck.nn.CIBRLoss(D, DV, DT, hidden=16, **options)


# ------------------------------------------------------------------------------------- critics
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_concat_critic_is_one_hidden_layer_on_the_concatenation(activation):
    critic = ck.nn.ConcatCritic(DV, D, 16, activation=activation, slope=0.3)
    x, z = torch.randn(9, DV), torch.randn(7, D)
    weight = torch.cat([critic.x_proj.weight, critic.z_proj.weight], 1)
    pairs = torch.cat([x[:, None].expand(9, 7, DV), z[None].expand(9, 7, D)], -1)
    phi = {
        "relu": F.relu,
        "leaky_relu": lambda t: F.leaky_relu(t, 0.3),
        "gelu": F.gelu,
        "silu": F.silu,
        "tanh": F.tanh,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "elu": lambda t: F.elu(t, 0.3),
        "softplus": F.softplus,
    }[activation]
    expected = critic.out(phi(F.linear(pairs, weight, critic.z_proj.bias))).squeeze(-1)
    torch.testing.assert_close(critic.pairwise(x, z), expected)
    torch.testing.assert_close(critic.paired(x[:7], z), expected.diagonal())
    a, b, w, bias, name, slope = critic.additive_parts(x, z)
    assert (name, slope, a.shape, b.shape, w.shape, bias.shape) == (activation, 0.3, (9, 16), (7, 16), (16,), ())


@pytest.mark.parametrize("activation", ["relu", "elu", "gelu"])
def test_concat_critic_of_two_layers_is_an_mlp_on_the_concatenation(activation):
    critic = ck.nn.ConcatCritic(DV, D, 16, layers=2, activation=activation, slope=0.3)
    x, z = torch.randn(9, DV), torch.randn(7, D)
    first = F.linear(
        torch.cat([x[:, None].expand(9, 7, DV), z[None].expand(9, 7, D)], -1),
        torch.cat([critic.x_proj.weight, critic.z_proj.weight], 1),
        critic.z_proj.bias,
    )
    phi = {"relu": F.relu, "elu": lambda t: F.elu(t, 0.3), "gelu": F.gelu}[activation]
    assert critic.inner is not None
    expected = critic.out(phi(critic.inner(phi(first)))).squeeze(-1)
    torch.testing.assert_close(critic.pairwise(x, z), expected)
    torch.testing.assert_close(critic.paired(x[:7], z), expected.diagonal())
    assert not hasattr(critic, "additive_parts") and hasattr(ck.nn.ConcatCritic(2, 2, 2), "additive_parts")
    copied = copy.deepcopy(critic)
    copied.load_state_dict(critic.state_dict())
    assert torch.equal(copied.pairwise(x, z), critic.pairwise(x, z))


def test_concat_critic_starts_like_the_linear_layer_it_splits():
    critic = ck.nn.ConcatCritic(300, 100, 64)
    limit = 1 / math.sqrt(400)
    for p in (critic.x_proj.weight, critic.z_proj.weight, critic.z_proj.bias):
        assert 0.9 * limit < p.abs().max() <= limit
    assert ck.nn.ConcatCritic(2, 2, 2).slope == 0.01 and ck.nn.ConcatCritic(2, 2, 2, activation="elu").slope == 1.0


def test_separable_critic_is_a_dot_product_of_embeddings():
    critic = ck.nn.SeparableCritic(DV, D, 16, 10)
    x, z = torch.randn(9, DV), torch.randn(9, D)
    f, g = critic.dot_parts(x, z)
    assert f.shape == g.shape == (9, 10)
    torch.testing.assert_close(critic.pairwise(x, z), f @ g.T)
    torch.testing.assert_close(critic.paired(x, z), (f * g).sum(1))
    custom = ck.nn.SeparableCritic.from_maps(nn.Linear(DV, 3), nn.Linear(D, 3))
    assert custom.pairwise(x, z).shape == (9, 9) and len(list(custom.parameters())) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ck.nn.ConcatCritic(2, 2, activation="swish"), "activation is 'swish'; known are 'relu'"),
        (lambda: ck.nn.ConcatCritic(0, 2), "widths must be positive, got x_dim=0"),
        (lambda: ck.nn.ConcatCritic(2, 2, layers=3), "one or two hidden layers, got layers=3"),
        (lambda: ck.nn.SeparableCritic(2, 2, 0), "widths must be positive, got 2, 2, 0, 128"),
        (lambda: ck.nn.LogEMA(1.0), r"decay must lie in \[0, 1\), got 1.0"),
        (lambda: objective(lam=-1.0), "must not be negative: lam=-1.0"),
        (lambda: objective(warmup_steps=-1), "warmup_steps=-1"),
        (lambda: objective(estimator="nwj", ema_decay=0.9), "ema_decay belongs to estimator 'mine', got .* 'nwj'"),
        (
            lambda: ck.critic_moments(torch.ones(3, 5), torch.ones(3, 2), ck.nn.ConcatCritic(4, 2, 8)),
            "x has width 5 but the critic was made for 4",
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------- running statistics
def test_standardize_starts_with_the_first_batch_and_then_moves_slowly():
    layer = ck.nn.Standardize(3, momentum=0.1)
    first, second = torch.randn(500, 3) * 4 + 7, torch.randn(500, 3) * 2 - 1
    out = layer(first)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(0, unbiased=False), torch.ones(3), atol=1e-4, rtol=0)
    layer(second)
    torch.testing.assert_close(layer.mean, 0.9 * first.mean(0) + 0.1 * second.mean(0))
    torch.testing.assert_close(layer.var, 0.9 * first.var(0, unbiased=False) + 0.1 * second.var(0, unbiased=False))


def test_standardize_is_frozen_in_eval_and_survives_a_state_dict():
    layer, other = ck.nn.Standardize(3), ck.nn.Standardize(3)
    layer(torch.randn(50, 3) * 4 + 7)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(5, 3)
    out = layer(x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    other.load_state_dict(before)
    assert torch.equal(other.eval()(x), out)


def test_standardize_detaches_and_takes_any_precision():
    layer = ck.nn.Standardize(3)
    out = layer(torch.randn(50, 3, dtype=torch.bfloat16, requires_grad=True))
    assert out.dtype == torch.float32 and not out.requires_grad
    constant = ck.nn.Standardize(1)(torch.full((9, 1), 5.0))
    assert not constant.any()


# ------------------------------------------------------------------------------------- MINE's moving average
def test_decay_weighs_the_old_value_and_the_first_batch_starts_it():
    ema = ck.nn.LogEMA(0.9)
    assert ema.update(torch.tensor(math.log(2.0))).item() == pytest.approx(math.log(2))
    assert ema.update(torch.tensor(math.log(10.0))).item() == pytest.approx(math.log(0.9 * 2 + 0.1 * 10), rel=1e-6)
    forgetful = ck.nn.LogEMA(0.0)
    for el in (3.0, -2.0):
        assert forgetful.update(torch.tensor(el)).item() == pytest.approx(el)


def test_average_lives_in_log_space():
    ema = ck.nn.LogEMA(0.99)
    for el in (200.0, 190.0, 205.0):  # e^200 is past float32, and past a clamp at 1e4
        ema.update(torch.tensor(el))
    expected = math.log(0.99 * (0.99 + 0.01 * math.exp(-10)) + 0.01 * math.exp(5)) + 200
    assert ema.value.item() == pytest.approx(expected, rel=1e-6)
    scores = torch.full((4, 4), 205.0, requires_grad=True)
    ck.log_mean_exp(scores, ema=ema.value).backward()
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_average_is_a_constant_of_the_gradient_and_stands_still_in_eval():
    ema, el = ck.nn.LogEMA(0.5), torch.tensor(1.0, requires_grad=True)
    ema.update(torch.zeros(()))
    ck.bound(torch.zeros(()), el, ema=ema).backward()  # takes el in first: the average is (1 + e) / 2
    assert ema.value.item() == pytest.approx(math.log((1 + math.e) / 2)) and not ema.value.requires_grad
    assert el.grad is not None and el.grad.item() == pytest.approx(-math.e / ((1 + math.e) / 2), rel=1e-6)
    ema.eval()
    before = ema.value.clone()
    assert torch.equal(ema(torch.tensor(9.0)), before) and torch.equal(ema.value, before)


def test_output_bias_has_the_gradient_one_minus_kappa():
    critic, x, z = ck.nn.ConcatCritic(4, 4, 16), torch.randn(50, 4), torch.randn(50, 4)
    el = ck.critic_moments(x, z, critic)[1].item()
    for log_ema in (el, el - 1, el + 2):
        critic.zero_grad()
        ck.mutual_information(x, z, critic, ema=torch.tensor(log_ema)).backward()
        assert critic.out.bias.grad.item() == pytest.approx(1 - math.exp(el - log_ema), abs=1e-5)


# ------------------------------------------------------------------------------------- the objective
def test_lambda_warms_up_then_grows_linearly():
    module = objective(lam=0.8, warmup_steps=3, ramp_steps=3)
    lams = [module(*batch(step), output_dict=True)["lam"].item() for step in range(9)]
    assert lams == pytest.approx([0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert objective(lam=0.8)(*batch(), output_dict=True)["lam"].item() == pytest.approx(0.8)


def test_critics_learn_and_encoders_see_only_clip_in_the_warm_up():
    module = objective(lam=0.8, warmup_steps=1)
    x, y, *rest = batch()
    x.requires_grad_()
    module(x, y, *rest).backward()
    plain = x.detach().clone().requires_grad_()
    ck.clip_loss(plain, y, 10.0).backward()
    torch.testing.assert_close(x.grad, plain.grad)
    for name, p in module.critics.named_parameters():
        assert name.endswith("out.bias") or (p.grad is not None and p.grad.any()), name


def test_dictionary_of_parts():
    out = objective()(*batch(), output_dict=True)
    assert set(out) == {"loss", "lam", "contrastive_loss", "image_cmi", "text_cmi", *TERMS}
    expected = out["contrastive_loss"] + out["lam"] * (out["image_cmi"] + out["text_cmi"])
    torch.testing.assert_close(out["loss"], expected)
    assert out["loss"].requires_grad and not any(v.requires_grad for k, v in out.items() if k != "loss")
    assert torch.equal(out["contrastive_loss"], ck.clip_loss(*batch()[:3]))


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_eval_moves_no_state(ema_decay):
    module = objective(ema_decay=ema_decay, warmup_steps=2)
    module(*batch(0))
    before = copy.deepcopy(module.state_dict())
    module.eval()
    module(*batch(1))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    module.train()
    module(*batch(1))
    moved = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    averages = {f"ema.{name}.value" for name in TERMS} if ema_decay else set()
    assert moved == averages | {"step"} | {f"standardize_{k}.{s}" for k in ("image", "text") for s in ("mean", "var")}


@pytest.mark.parametrize(
    "options", [{}, {"ema_decay": 0.9, "negatives": ck.shifts(4)}, {"estimator": "nwj", "ramp_steps": 9}], ids=str
)
def test_state_dict_reproduces_the_next_losses(options):
    def steps(module: ck.nn.CIBRLoss, optimizer: torch.optim.Optimizer, start: int) -> list[Tensor]:
        losses = []
        for step in range(start, start + 3):
            torch.manual_seed(step)
            loss = module(*batch(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    module, other = objective(**options), objective(**options)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (module, other)]
    steps(module, optimizers[0], 0)
    other.load_state_dict(module.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for a, b in zip(steps(module, optimizers[0], 3), steps(other, optimizers[1], 3), strict=True):
        assert torch.equal(a, b)


def test_deterministic_embeddings_are_warned_about():
    with pytest.warns(UserWarning, match="noise_std is 0"):
        objective(noise_std=0.0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("concat", {}),
        ("concat", {"estimator": "nwj"}),
        ("concat", {"negatives": ck.shifts(8), "ema": ck.nn.LogEMA(0.9)}),
        ("separable", {}),
    ],
    ids=str,
)
def test_training_finds_the_information_of_gaussians(kind, options):
    rho, truth = 0.9, 0.830366
    critic = ck.nn.ConcatCritic(1, 1, 64) if kind == "concat" else ck.nn.SeparableCritic(1, 1, 64, 16)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)

    def estimate(n: int) -> Tensor:
        x = torch.randn(n, 1)
        z = rho * x + math.sqrt(1 - rho**2) * torch.randn(n, 1)
        return ck.mutual_information(x, z, critic, **options)

    before = estimate(2000).item()
    for _ in range(100):
        loss = -estimate(256)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.2 and estimate(2000).item() == pytest.approx(truth, abs=0.15)
