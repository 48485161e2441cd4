"""torch.compile(fullgraph=True): one graph, forward and backward, with eager's numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import LARGE, leaves, towers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import cibr_kernels as ck
from cibr_kernels.losses.penalty import TERMS

N, D = 24, 8
CONCAT, SEPARABLE = ck.nn.ConcatCritic(D, D, 16), ck.nn.SeparableCritic(D, D, 16, 8)
CRITICS = {name: ck.nn.ConcatCritic(D, D, 16, activation="gelu") for name in TERMS}
PENALTY = {"image_inputs": torch.randn(N, D), "text_inputs": torch.randn(N, D), "critics": CRITICS}


def moments(critic: torch.nn.Module, **options) -> Callable[..., Tensor]:
    def f(x: Tensor, z: Tensor, s: Tensor) -> Tensor:
        j, el = ck.critic_moments(x, z, critic, **options)
        return j - s * el

    return f


MEANS = {"image_mean": ck.nn.MeanNetwork(D, D, 8), "text_mean": ck.nn.MeanNetwork(D, D, 8)}
FUNCTIONS = {
    "clip_loss": lambda x, y, s: ck.clip_loss(x, y, s),
    "clip_loss_one_way": lambda x, y, s: ck.clip_loss(x, y, s, s, one_way=True),
    "siglip_loss": lambda x, y, s: ck.siglip_loss(x, y, s, -s),
    "siglip_loss_none": lambda x, y, s: ck.siglip_loss(x, y, s, -s, reduction="none").square().sum(),
    "concat": moments(CONCAT),
    "concat_include": moments(CONCAT, diagonal="include"),
    "concat_shifts": moments(CONCAT, negatives=ck.shifts(3)),
    "separable": moments(SEPARABLE),
    "log_mean_exp": lambda x, y, s: ck.log_mean_exp(s * x @ y.T),
    "log_mean_exp_mask_ema": lambda x, y, s: ck.log_mean_exp(s * x @ y.T, mask=~torch.eye(N).bool(), ema=0.3),
    "mine_with_ema": lambda x, y, s: ck.mutual_information(s * x, y, CONCAT, ema=torch.tensor(0.1)),
    "cmi_align": lambda x, y, s: ck.conditional_mutual_information(s * x, x, y, None, estimator="align", noise_std=0.3),
    "cibr_loss": lambda x, y, s: ck.cibr_loss(x, y, s, **PENALTY, noise_std=0.0),
    "cibr_loss_variance": lambda x, y, s: ck.cibr_loss(
        x, y, s, estimator="variance", image_features2=x.roll(1, 0), group_ids=torch.arange(N) % 5
    ),
    "cibr_loss_groups": lambda x, y, s: ck.cibr_loss(x, y, s, estimator="variance", group_ids=torch.arange(N) % 5),
    "cibr_loss_ceb": lambda x, y, s: ck.cibr_loss(
        x, y, s, estimator="ceb", critics=MEANS, image_inputs=PENALTY["image_inputs"], text_condition=y
    ),
    "cibr_loss_nwj": lambda x, y, s: ck.cibr_loss(x, y, s, **PENALTY, noise_std=0.0, estimator="nwj", lam=0.1),
}


def step(f: Callable[..., Tensor], n: int = N) -> list[Tensor]:
    """The value, or values, and every gradient, critics' included."""
    x, y = towers(n, n, D)
    inputs = leaves(x, y, torch.tensor(3.0))
    parameters = [p for c in (CONCAT, SEPARABLE, *CRITICS.values(), *MEANS.values()) for p in c.parameters()]
    value = f(*inputs)
    grads = torch.autograd.grad(value.sum(), [*inputs, *parameters], allow_unused=True)
    return [value.detach(), *(g for g in grads if g is not None)]


def run(f: Callable[..., Tensor], **options) -> list[Tensor]:
    """A step, compiled if options name a backend."""
    torch.compiler.reset()
    return step(torch.compile(f, fullgraph=True, **options) if options else f)


def check(f: Callable[..., Tensor], **options) -> None:
    for compiled, eager in zip(run(f, **options), run(f), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_compiled_graph_equals_eager(name):
    check(FUNCTIONS[name], backend="aot_eager")


@pytest.mark.parametrize("budget", [0, LARGE])
def test_both_tiers_compile(budget):
    ck.set_stash_budget(budget)
    check(FUNCTIONS["clip_loss"], backend="aot_eager")


def test_dynamic_shapes_compile():
    torch.compiler.reset()
    compiled = torch.compile(lambda x, y: ck.clip_loss(x, y, 5.0), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 24, 33):
        (x, y), (x2, y2) = leaves(*towers(n, n, D)), leaves(*towers(n, n, D))
        compiled(x, y).backward()
        ck.clip_loss(x2, y2, 5.0).backward()
        torch.testing.assert_close((x.grad, y.grad), (x2.grad, y2.grad))


def test_generator_seeds_the_noise_of_a_compiled_loss():
    def f(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        return ck.cibr_loss(x, y, s, **PENALTY)

    def seeded(**options) -> list[Tensor]:
        torch.manual_seed(7)
        return run(f, **options)

    for compiled, eager in zip(seeded(backend="aot_eager"), seeded(), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_cibr_module_compiles_and_keeps_its_state(ema_decay):
    torch.compiler.reset()
    torch.manual_seed(8)
    eager = ck.nn.CIBRLoss(D, D, D, hidden=16, warmup_steps=1, ramp_steps=2, ema_decay=ema_decay)
    other = ck.nn.CIBRLoss(D, D, D, hidden=16, warmup_steps=1, ramp_steps=2, ema_decay=ema_decay)
    other.load_state_dict(eager.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x, y = towers(N, N, D)
    for step in range(4):
        losses = []
        for module in (eager, compiled):
            torch.manual_seed(step)
            losses.append(module(x, y, 5.0, PENALTY["image_inputs"], PENALTY["text_inputs"]))
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_scheduled_variance_module_compiles():
    torch.compiler.reset()
    ids = torch.arange(N) % 5
    eager, other = (ck.nn.CIBRLoss.recommended(D, total_steps=8, accumulation_steps=2) for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x, y = towers(N, N, D)
    for _ in range(6):
        torch.testing.assert_close(compiled(x, y, 5.0, group_ids=ids), eager(x, y, 5.0, group_ids=ids))
    assert other.step == eager.step == 3


@pytest.mark.slow
def test_inductor_equals_eager_at_any_number_of_rows():
    """Functions of four families in one graph of symbolic sizes: inductor sees their operators from outside alone.

    Additive moments are in test_ragged.py's CIBRLoss, and sizes that are numbers in the tests of the losses' options.
    """

    def f(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        names = ("clip_loss", "siglip_loss", "separable", "log_mean_exp")
        return torch.stack([FUNCTIONS[name](x, y, s) for name in names])

    torch.compiler.reset()
    graphs = CompileCounterWithBackend("inductor")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for n in (N, 33):
        for found, eager in zip(step(compiled, n), step(f, n), strict=True):
            torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-6)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1]
