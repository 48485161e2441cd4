"""What people put around critics and inside them takes part in every estimate, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import Recorded, leaves
from estimators import DX, DZ, by_scores, data
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

import cibr_kernels as ck

ESTIMATORS = ("dv", "js", "infonce")
MADE: dict[str, Callable[[], nn.Module]] = {
    "concat": lambda: ck.nn.ConcatCritic(DX, DZ, 24, activation="silu"),
    "two layers": lambda: ck.nn.ConcatCritic(DX, DZ, 24, layers=2),
    "separable": lambda: ck.nn.SeparableCritic(DX, DZ, 24, 10),
}


class LowRank(nn.Module):
    """LoRA: a linear layer and a learnt product beside it; the weight it shows is the frozen one's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, t: Tensor) -> Tensor:
        return self.base(t) + self.up(self.down(t))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Squashed(ck.nn.ConcatCritic):
    """Its scores go through a tanh."""

    def paired(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(super().paired(x, z))


class Called(ck.nn.SeparableCritic):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 2 * self.paired(x, z)


class Scored(ck.nn.ConcatCritic):
    def score_parts(self, a: Tensor, b: Tensor) -> Tensor:
        return 3 * super().score_parts(a, b)


def lora(critic: nn.Module, name: str) -> nn.Module:
    setattr(critic, name, LowRank(getattr(critic, name)))
    return critic


def with_hook(critic: nn.Module, module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return critic


def with_pre_hook(critic: nn.Module, module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, inputs: tuple(2 * t for t in inputs))
    return critic


def with_own_forward(critic: nn.Module) -> nn.Module:
    forward = critic.forward
    critic.forward = lambda x, z: 2 * forward(x, z)
    return critic


def parametrized(critic: nn.Module) -> nn.Module:
    torch.nn.utils.parametrize.register_parametrization(critic.out, "weight", Doubled())
    return critic


def pruned(critic: nn.Module) -> nn.Module:
    prune.random_unstructured(critic.out, "weight", amount=0.5)
    prune.random_unstructured(critic.x_proj, "weight", amount=0.5)
    return critic


FUSED = {
    "LoRA on x": ("concat", lambda c: lora(c, "x_proj")),
    "hook on z": ("concat", lambda c: with_hook(c, c.z_proj)),
    "hook on f": ("separable", lambda c: with_hook(c, c.embed_x[0])),
    "parametrized": ("concat", parametrized),
    "weight norm": ("concat", lambda c: parametrizations.weight_norm(c.out) and c),
    "older weight norm": ("concat", lambda c: weight_norm(c.out) and c),
    "spectral norm": ("separable", lambda c: parametrizations.spectral_norm(c.embed_z[2]) and c.eval()),
    "pruned": ("concat", pruned),
    "average": ("concat", AveragedModel),
    "average of a separable one": ("separable", AveragedModel),
}
CALLED = {
    "LoRA on out": ("concat", lambda c: lora(c, "out")),
    "LoRA on two layers": ("two layers", lambda c: lora(lora(c, "inner"), "out")),
    "another out": ("concat", lambda c: setattr(c, "out", nn.Linear(24, 1)) or c),
    "hook on out": ("concat", lambda c: with_hook(c, c.out)),
    "hook before out": ("concat", lambda c: with_pre_hook(c, c.out)),
    "hook on the critic": ("concat", lambda c: with_hook(c, c)),
    "hook before the critic": ("separable", lambda c: with_pre_hook(c, c)),
    "hook on a separable one": ("separable", lambda c: with_hook(c, c)),
    "hook on two layers": ("two layers", lambda c: with_hook(c, c)),
    "hook on an average": ("concat", lambda c: (lambda average: with_hook(average, average))(AveragedModel(c))),
    "own forward": ("concat", with_own_forward),
    "own paired": (Squashed, lambda c: c),
    "own score_parts": (Scored, lambda c: c),
    "forward of a subclass": (Called, lambda c: c),
}


def critic_of(kind: str | type, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(7)
    return change(MADE[kind]() if isinstance(kind, str) else kind(DX, DZ, 24))


def by_calls(critic: nn.Module, x: Tensor, z: Tensor, estimator: str) -> Tensor:
    """What a user gets who calls the critic on one row of x after the other."""
    return by_scores(torch.stack([critic(row.expand(len(z), -1), z) for row in x]), estimator)


def check(critic: nn.Module) -> None:
    """Values and gradients of estimates are those of calls."""
    x, z = leaves(*data()[:2])
    for estimator in ESTIMATORS:
        tensors = [x, z, *(p for p in critic.parameters() if p.requires_grad)]
        ours = ck.mutual_information(x, z, critic, estimator=estimator)
        truth = by_calls(critic, x, z, estimator)
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(ours, tensors, allow_unused=True)
        for ours_g, truth_g in zip(found, torch.autograd.grad(truth, tensors, allow_unused=True), strict=True):
            assert (ours_g is None) == (truth_g is None)
            if ours_g is not None:
                torch.testing.assert_close(ours_g, truth_g, rtol=1e-3, atol=1e-5)


def fused(critic: nn.Module) -> bool:
    with Recorded() as seen, torch.no_grad():
        ck.mutual_information(*data()[:2], critic, estimator="dv")
    return bool(seen.named("additive_moments_forward") or seen.named("dot_lse_forward"))


@pytest.mark.parametrize("name", list(FUSED))
def test_what_the_fused_path_sees(name):
    critic = critic_of(*FUSED[name])
    check(critic)
    assert fused(critic)


@pytest.mark.parametrize("name", list(CALLED))
def test_what_only_a_call_shows(name):
    critic = critic_of(*CALLED[name])
    check(critic)
    assert not fused(critic)


def test_pruned_weights_follow_the_optimizer():
    critic = critic_of(*FUSED["pruned"])
    optimizer = torch.optim.SGD(critic.parameters(), 0.1)
    for _ in range(3):
        loss = -ck.mutual_information(*data()[:2], critic)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    check(critic)


def test_backward_hooks_run():
    for kind in MADE:
        critic, seen = critic_of(kind, lambda c: c), []
        critic.register_full_backward_hook(lambda module, inputs, outputs, seen=seen: seen.append(module))
        ck.mutual_information(*leaves(*data()[:2]), critic).backward()
        assert seen, kind


def test_a_removed_hook_gives_the_fused_path_back():
    critic = critic_of("concat", lambda c: c)
    handle = critic.register_forward_hook(lambda *_: None)
    assert not fused(critic)
    handle.remove()
    assert fused(critic)


@pytest.mark.parametrize("kind", list(MADE))
def test_critics_are_called_like_modules(kind):
    critic, (x, z, _) = critic_of(kind, lambda c: c), data()
    assert torch.equal(critic(x, z), critic.paired(x, z))
    assert torch.equal(copy.deepcopy(critic)(x, z), critic(x, z))


@pytest.mark.parametrize("kind", list(MADE))
@pytest.mark.parametrize("way", ["function", "module"])
def test_compiled_critics(kind, way):
    critic, (x, z, _) = critic_of(kind, lambda c: c), data()
    compiled = torch.compile(copy.deepcopy(critic), backend="aot_eager") if way == "function" else copy.deepcopy(critic)
    if way == "module":
        compiled.compile(backend="aot_eager")
    torch.testing.assert_close(compiled(x, z), critic(x, z))
    for estimator in ESTIMATORS:
        expected = ck.mutual_information(x, z, critic, estimator=estimator)
        torch.testing.assert_close(ck.mutual_information(x, z, compiled, estimator=estimator), expected)
    torch.compiler.reset()


def test_hooks_of_a_critic_without_forward_are_refused():
    class Parts(nn.Module):
        def dot_parts(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            return x[:, :DZ], z

    x, z, _ = data()
    critic = Parts()
    assert ck.mutual_information(x, z, critic).isfinite()
    critic.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"got Parts\(\), whose hooks only a call would run"):
        ck.mutual_information(x, z, critic)
