"""Batches of seven sizes, the last short one and single rows among them, through compiled and exported losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from cases import leaves, towers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import cibr_kernels as ck

D, H = 8, 16
SIZES = (64, 48, 33, 64, 70, 2, 1)  # the second makes sizes symbols; two more graphs are one for each limit of theirs
RECOMPILATIONS = 2  # after the first two sizes


def ids(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0]) % 10


class Loss(nn.Module):
    """f(x, y, critic); parameters of the critic are the module's, as compilers and exporters want them."""

    def __init__(self, f: Callable[..., Tensor], critic: nn.Module | None = None, least: int = 1) -> None:
        super().__init__()
        self.f, self.critic, self.least = f, critic, least

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.f(x, y) if self.critic is None else self.f(x, y, self.critic)


def information(critic: nn.Module, estimator: str, **options: Any) -> Loss:
    return Loss(lambda x, y, c: ck.mutual_information(x, y, c, estimator=estimator, **options), critic, least=2)


def cibr(**options: Any) -> Loss:
    return Loss(lambda x, y, c: c(x, y, 9.0, x, y), ck.nn.CIBRLoss(D, D, D, hidden=H, **options), least=2)


def concat(**options: Any) -> nn.Module:
    return ck.nn.ConcatCritic(D, D, H, **options)


def separable() -> nn.Module:
    return ck.nn.SeparableCritic(D, D, H, D)


LOSSES: dict[str, Callable[[], Loss]] = {
    "clip_loss, everything": lambda: Loss(
        lambda x, y: ck.clip_loss(
            x,
            y,
            torch.full((x.shape[0],), 9.0),
            group_ids=ids(x),
            group_mode="positives",
            label_smoothing=0.1,
            text_negatives=torch.ones(7, D),
            weights=torch.ones(x.shape[0]),
            return_metrics=True,
        )[0],
        least=2,
    ),
    "ClipLoss": lambda: Loss(lambda x, y, m: m(x, y, 9.0), ck.nn.ClipLoss()),
    "siglip_loss, everything": lambda: Loss(
        lambda x, y: ck.siglip_loss(
            x,
            y,
            9.0,
            -5.0,
            group_ids=ids(x),
            group_mode="positives",
            image_negatives=torch.ones(5, D),
            weights=torch.ones(x.shape[0]),
            return_metrics=True,
        )[0],
        least=2,
    ),
    "siglip_loss, each": lambda: Loss(lambda x, y: ck.siglip_loss(x, y, 9.0, -5.0, reduction="none").square().sum()),
    "log_mean_exp": lambda: Loss(lambda x, y: ck.log_mean_exp(x @ y.T, mask=(x @ y.T) < 9, ema=0.3)),
    "mine, marginals": lambda: information(concat(), "mine", marginals=torch.ones(5, D)),
    "mine, separable": lambda: information(separable(), "mine"),
    "mine, derangement": lambda: information(concat(), "mine", negatives=ck.derangement(1)),
    "mine, two layers": lambda: information(concat(layers=2), "mine"),
    "smile": lambda: information(concat(), "smile"),
    "smile, separable": lambda: information(separable(), "smile"),
    "infonce": lambda: information(concat(), "infonce"),
    "club": lambda: information(nn.Linear(D, D), "club"),
    "align": lambda: Loss(
        lambda x, y: ck.conditional_mutual_information(x, x, y, None, estimator="align", noise_std=0.3)
    ),
    "CIBRLoss": lambda: cibr(ema_decay=0.9),
}
EXPORTED = ("clip_loss, everything", "ClipLoss", "siglip_loss, each", "smile", "infonce", "mine, separable")


def sizes(loss: Loss) -> list[int]:
    return [n for n in SIZES if n >= loss.least]


def step(loss: Callable[..., Tensor], n: int) -> list[Tensor]:
    x, y = leaves(*towers(n, n, D))
    torch.manual_seed(n)
    value = loss(x, y)
    value.backward()
    assert y.grad is not None
    return [value.detach(), *(t.grad for t in (x, y) if t.grad is not None)]


def check(name: str, backend: str, **options: Any) -> None:
    torch.compiler.reset()
    torch.manual_seed(3)
    eager = LOSSES[name]()
    torch.manual_seed(3)
    own = LOSSES[name]()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(own, fullgraph=True, backend=counter, **options)
    counts = []
    for n in sizes(own):
        for found, expected in zip(step(compiled, n), step(eager, n), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[-1] - counts[1] <= RECOMPILATIONS, counts


@pytest.mark.parametrize("name", list(LOSSES))
def test_seven_sizes_make_few_graphs(name):
    check(name, "aot_eager")


@pytest.mark.parametrize("name", ["ClipLoss", "infonce"])
def test_symbols_from_the_first_batch(name):
    check(name, "aot_eager", dynamic=True)


@pytest.mark.slow
def test_seven_sizes_with_inductor():
    with torch._inductor.config.patch(fallback_random=True):  # eager's numbers
        check("CIBRLoss", "inductor", dynamic=True)  # symbols at once: how they come to be is aot_eager's above


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_with_any_number_of_rows(name):
    loss, rows = LOSSES[name](), Dim("rows", min=2, max=2000)
    program = export(loss, towers(33, 33, D), dynamic_shapes={"x": {0: rows}, "y": {0: rows}}).module()
    for n in (33, 70, 2):
        inputs = towers(n, n, D)
        torch.manual_seed(n)
        found = program(*inputs)
        torch.manual_seed(n)
        torch.testing.assert_close(found, loss(*inputs), rtol=1e-4, atol=1e-5)
